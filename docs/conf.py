"""Sphinx: the documentation site, built by `python -m sphinx -W docs docs/_build`."""

import shutil
from pathlib import Path

import jaxadv

# The records' pages and pictures become part of the site.
_HERE = Path(__file__).resolve().parent
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
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_build"]
nitpicky = True
default_role = "literal"  # docstrings have names in single backquotes, as Markdown does
# Names that annotations have from other projects, whose pages aren't fetched to build ours.
nitpick_ignore_regex = [("py:.*", r"(jax|numpy|optax|np|jnp|collections|typing|flax)\b.*")]

html_theme = "furo"
html_title = f"jaxadv {release}"
myst_enable_extensions = ["amsmath", "dollarmath", "colon_fence"]
myst_heading_anchors = 3

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


def _skip(app, what, name, obj, skip, options):
    """Leave out the fields of named tuples, which their classes' docstrings have."""
    return True if type(obj).__name__ == "_tuplegetter" else None


def _home(app, module, name):
    """Tell where the source is: for aliases of built-in types, not where those have theirs."""
    return module if module == "jaxadv.types" else None


def _records(app, docname, source):
    """Let links to the records, as the repository has them, lead to the site's copy."""
    source[0] = source[0].replace("](../experiments/results/", "](results/")


def setup(app):
    """Sphinx calls this."""
    app.connect("source-read", _records)
    app.connect("viewcode-follow-imported", _home)
    app.connect("autodoc-skip-member", _skip)
