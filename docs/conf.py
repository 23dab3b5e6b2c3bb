"""Sphinx settings of the documentation; build it with `python -m sphinx -W docs docs/_build`."""

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
from recorded import recorded  # noqa: E402, since it is found by the path added above

# The repository's public address, https://github.com/OWNER/NAME. While it is empty, the site
# contains the source code. Once it is set, names link to their lines in the repository, and
# notebooks to Colab, which opens the site's files on the branch gh-pages.
repository = ""

# The site contains the records' pages and pictures.
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
exclude_patterns = ["_build", "**.ipynb"]  # notebooks are Markdown; converted ones aren't pages
templates_path = ["_templates"]
nitpicky = True
default_role = "literal"  # docstrings put names in single backquotes, as Markdown does
# Other projects' names in annotations: the build doesn't fetch their pages to link to.
nitpick_ignore_regex = [("py:.*", r"(jax|numpy|optax|np|jnp|collections|typing|flax)\b.*")]

html_theme = "furo"
html_title = f"jaxadv {release}"
myst_enable_extensions = ["amsmath", "dollarmath", "colon_fence"]
myst_heading_anchors = 3

autosummary_context = {"recorded": recorded()}

# Notebooks are Markdown without outputs. The build runs them; the second build, of the Markdown
# pages for AI assistants, doesn't.
# Sphinx defines `tags` for this file.
nb_execution_mode = "off" if tags.has("sphinx_llm_markdown") else "force"  # noqa: F821
nb_execution_raise_on_error = True
nb_execution_timeout = 600  # seconds per cell, enough for a busy machine
nb_output_stderr = "warn"
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"  # XLA warns on stderr about slow compilation
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

# For AI assistants: llms.txt, each page as Markdown, and all pages but the records in one file.
llms_txt_description = "Adversarial perturbations, training and evaluation for classifiers in JAX."
llms_txt_full_build = True
llms_txt_exclude = ["records", "results/**"]
llms_txt_nested_enabled = False
llms_txt_suffix_mode = "append"
llms_txt_build_parallel = False  # otherwise both builds would copy the records at the same time


def linkcode_resolve(domain, info):
    """Return the address of an object's definition; None if it isn't in this project."""
    found = importlib.import_module(info["module"])
    for name in info["fullname"].split("."):
        found = getattr(found, name, None)
    try:
        found = inspect.unwrap(found)
        path = Path(inspect.getsourcefile(found)).relative_to(_HERE.parent)
        lines, first = inspect.getsourcelines(found)
    except (TypeError, ValueError):  # an alias, a property, or another project's object
        return None
    return f"{repository}/blob/main/{path}#L{first}-L{first + len(lines) - 1}"


def _skip(app, what, name, obj, skip, options):
    """Leave out the fields of named tuples, which are in the class docstrings."""
    return True if type(obj).__name__ == "_tuplegetter" else None


def _home(app, module, name):
    """Say where the source is: for aliases of built-in types, here, not in the type's module."""
    return module if module == "jaxadv.types" else None


def _records(app, docname, source):
    """Make the repository's links to the records point to the site's copy."""
    source[0] = re.sub(r"\]\(((\.\./)*)\.\./experiments/results/", r"](\1results/", source[0])


def _colab(app, docname, source):
    """Link a notebook to Colab, and write the file for it: with set-up cell and absolute links."""
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
    """Remove the executed notebooks that the build leaves next to the site."""
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
    # The separators of positional and keyword arguments, which the Markdown builder can't write.
    visit_and_depart = (_children_only, _children_only)
    app.add_node(abbreviation, override=True, **{"llms-markdown": visit_and_depart})
