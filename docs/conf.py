"""Sphinx: the documentation site, built by `python -m sphinx -W docs docs/_build`."""

import importlib
import inspect
import shutil
import sys
from pathlib import Path

from docutils.nodes import abbreviation

import jaxadv

_HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(_HERE))
from recorded import recorded  # noqa: E402

# The repository's public address, without a slash at its end. While it is empty, there are no links
# to it, and the site has the source itself.
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
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.linkcode" if repository else "sphinx.ext.viewcode",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx_llm.txt",
]
exclude_patterns = ["_build"]
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
    source[0] = source[0].replace("](../experiments/results/", "](results/")


def _children_only(translator, node):
    """Write a node as its children."""


def setup(app):
    """Sphinx calls this."""
    app.connect("source-read", _records)
    if not repository:
        app.connect("viewcode-follow-imported", _home)
    app.connect("autodoc-skip-member", _skip)
    # What separates arguments by position and by keyword, which the builder has no way to write.
    visit_and_depart = (_children_only, _children_only)
    app.add_node(abbreviation, override=True, **{"llms-markdown": visit_and_depart})
