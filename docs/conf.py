"""Sphinx: the documentation site, built by `python -m sphinx -W docs docs/_build`."""

import importlib
import inspect
import os
import re
import shutil
import sys
from pathlib import Path

import nbformat
from docutils.nodes import abbreviation
from myst_nb.core.read import read_myst_markdown_notebook

import jaxadv

_HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(_HERE))
from recorded import recorded  # noqa: E402

# The repository's public address, https://github.com/OWNER/NAME. While it is empty, there are no
# links to it, and the site has the source itself; then, names link to their lines, and notebooks to
# Colab, which opens the site's files on the branch gh-pages.
repository = ""

# The records' pages and pictures become part of the site.
shutil.copytree(
    _HERE.parent / "experiments" / "results", _HERE / "results", dirs_exist_ok=True,
    ignore=shutil.ignore_patterns("*.safetensors", "checkpoints"),
)  # fmt: skip

project = "jaxadv"
author = "the jaxadv authors"
copyright = author
release = jaxadv.__version__
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.linkcode" if repository else "sphinx.ext.viewcode",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx_llm.txt",
]
exclude_patterns = ["_build", "**.ipynb"]  # notebooks are text: what a reader converts isn't a page
templates_path = ["_templates"]
nitpicky = True
default_role = "literal"  # docstrings have names in single backquotes, as Markdown does
# Names that annotations have from other projects, whose pages aren't fetched to build ours.
nitpick_ignore_regex = [("py:.*", r"(jax|numpy|optax|np|jnp|collections|typing|flax)\b.*")]

html_theme = "furo"
html_title = f"jaxadv {release}"
myst_enable_extensions = ["amsmath", "dollarmath", "colon_fence"]
myst_heading_anchors = 3

autosummary_context = {"recorded": recorded()}

# Notebooks are Markdown without outputs; the build runs them, but not once more for assistants.
nb_execution_mode = "off" if tags.has("sphinx_llm_markdown") else "force"  # noqa: F821
nb_execution_raise_on_error = True
nb_execution_timeout = 600  # seconds for a cell, on a busy machine
nb_output_stderr = "warn"
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"  # XLA says there when a busy machine compiles slowly
nb_merge_streams = True
nb_render_markdown_format = "myst"  # plain CommonMark has no tables

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # signatures have them
autodoc_type_aliases = {
    name: name
    for name in ("ApplyFn", "Bounds", "Eps", "LossFn", "Norm", "Objective", "Params", "PerturbFn")
}
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True

# For assistants: llms.txt, each page as Markdown, and all but the records as one file.
llms_txt_description = "Adversarial perturbations, training and evaluation for classifiers in JAX."
llms_txt_full_build = True
llms_txt_exclude = ["records", "results/**"]
llms_txt_nested_enabled = False
llms_txt_suffix_mode = "append"
llms_txt_build_parallel = False  # both builds would copy the records at once


def linkcode_resolve(domain, info):
    """Return the address of the lines that define an object, or None where it has none of ours."""
    found = importlib.import_module(info["module"])
    for name in info["fullname"].split("."):
        found = getattr(found, name, None)
    try:
        found = inspect.unwrap(found)
        path = Path(inspect.getsourcefile(found)).relative_to(_HERE.parent)
        lines, first = inspect.getsourcelines(found)
    except (TypeError, ValueError):  # no source: an alias, a property, or another project's
        return None
    return f"{repository}/blob/main/{path}#L{first}-L{first + len(lines) - 1}"


def _skip(app, what, name, obj, skip, options):
    """Leave out the fields of named tuples, which their classes' docstrings have."""
    return True if type(obj).__name__ == "_tuplegetter" else None


def _home(app, module, name):
    """Tell where the source is: for aliases of built-in types, not where those have theirs."""
    return module if module == "jaxadv.types" else None


def _records(app, docname, source):
    """Let links to the records, as the repository has them, lead to the site's copy."""
    source[0] = re.sub(r"\]\(((\.\./)*)\.\./experiments/results/", r"](\1results/", source[0])


def _colab(app, docname, source):
    """Link a notebook to Colab, and write the file that opens there: set-up first, links whole."""
    address = app.config.repository
    if not (address and docname.startswith("notebooks/") and "{code-cell}" in source[0]):
        return
    in_repository = rf"]({address}/blob/main/docs/notebooks/\1)"
    text = re.sub(r"\]\((?!http)([^)]+)\)", in_repository, source[0])
    notebook = read_myst_markdown_notebook(text)
    setup = (
        "# In Colab: the library, the images, and the pictures' module.\n"
        f"!git clone -q {address} repository\n"
        "%cd repository/docs/notebooks\n"
        "%pip install -q '../..[experiments]'"
    )
    notebook.cells.insert(0, nbformat.v4.new_code_cell(setup))
    path = Path(app.outdir, f"{docname}.ipynb")
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, path)
    place = f"{address.removeprefix('https://github.com/')}/blob/gh-pages/{docname}.ipynb"
    link = f"[Open this notebook in Colab](https://colab.research.google.com/github/{place})"
    source[0] = re.sub(r"^# .*\n", rf"\g<0>\n{link}\n", source[0], count=1, flags=re.MULTILINE)


def _tidy(app, exception):
    """Remove the notebooks with outputs that are left beside what is built, and within the site."""
    shutil.rmtree(Path(app.outdir).parent / "jupyter_execute", ignore_errors=True)


def _children_only(translator, node):
    """Write a node as its children."""


def setup(app):
    """Sphinx calls this."""
    app.add_config_value("repository", "", "env", str)
    app.connect("source-read", _colab)
    app.connect("source-read", _records)
    app.connect("build-finished", _tidy)
    if not repository:
        app.connect("viewcode-follow-imported", _home)
    app.connect("autodoc-skip-member", _skip)
    # What separates arguments by position and by keyword, which the builder has no way to write.
    visit_and_depart = (_children_only, _children_only)
    app.add_node(abbreviation, override=True, **{"llms-markdown": visit_and_depart})
