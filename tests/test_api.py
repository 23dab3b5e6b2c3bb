"""What the library promises to those who import it: its names, its documentation, its layers."""

import ast
import importlib
import inspect
import pkgutil
import re
import sys
from pathlib import Path

import pytest

import jaxadv

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = Path(jaxadv.__file__).parent

# The public surface. To change it, change this.
PUBLIC = {
    "jaxadv": {
        "attack",
        "evaluate",
        "jacobian",
        "logistic",
        "losses",
        "norms",
        "objectives",
        "perturb",
        "problem",
        "train",
        "types",
    },
    "jaxadv.attack": {
        "AttackInfo",
        "Found",
        "apgd",
        "apgd_multitargeted",
        "deepfool",
        "fab",
        "fmn",
        "pgd",
        "pgd_kl",
        "reports",
        "square",
        "with_info",
    },
    "jaxadv.evaluate": {
        "Flag",
        "Outcome",
        "Report",
        "Result",
        "Stage",
        "accuracy",
        "attack_and_score",
        "autoattack",
        "check",
        "interval",
        "measure",
        "score",
    },
    "jaxadv.jacobian": {
        "Rows",
        "class_differences",
        "class_pullback",
        "pullback",
        "softmax_jacobian",
    },
    "jaxadv.logistic": {"adversary", "fit", "logits", "loss", "objective"},
    "jaxadv.losses": {"dlr", "logit_margin", "margin", "targeted_dlr"},
    "jaxadv.norms": {
        "clip_to_box",
        "dual",
        "is_zero",
        "log_norm",
        "norm",
        "project",
        "rescale",
        "sample",
        "steepest",
    },
    "jaxadv.objectives": {
        "Aux",
        "Relative",
        "adversarial",
        "kl_regularized",
        "mixed",
        "natural",
        "representation",
    },
    "jaxadv.perturb": {"alpha", "loss", "loss_sign", "vat"},
    "jaxadv.problem": {
        "Best",
        "Least",
        "Problem",
        "beyond_rounding",
        "bisect_to_boundary",
        "fold",
        "run_restarts",
    },
    "jaxadv.train": {"StepInfo", "TrainState", "init", "make_epoch", "make_step", "update"},
    "jaxadv.types": {
        "ApplyFn",
        "Bounds",
        "EncodeFn",
        "Eps",
        "LossFn",
        "Norm",
        "Objective",
        "Params",
        "PerturbFn",
        "Schedule",
        "StochasticFn",
        "TrainFn",
    },
}
# What is from the paper (or another) names it.
CITING = {
    "jaxadv.attack": {
        "apgd",
        "apgd_multitargeted",
        "deepfool",
        "fab",
        "fmn",
        "pgd",
        "pgd_kl",
        "square",
    },
    "jaxadv.evaluate": {"autoattack", "check"},
    "jaxadv.jacobian": {"class_differences", "class_pullback", "softmax_jacobian"},
    "jaxadv.logistic": {"adversary", "fit", "loss", "objective"},
    "jaxadv.losses": {"dlr", "logit_margin", "targeted_dlr"},
    "jaxadv.norms": {"dual", "rescale", "sample", "steepest"},
    "jaxadv.objectives": {"adversarial", "kl_regularized", "mixed", "representation"},
    "jaxadv.perturb": {"alpha", "loss", "loss_sign", "vat"},
    "jaxadv.train": {"make_epoch", "make_step"},
}

MODULES = [name for name in PUBLIC if name != "jaxadv"]
OBJECTS = [
    (module, name)
    for module in MODULES
    if module != "jaxadv.types"
    for name in sorted(PUBLIC[module])
]
FUNCTIONS = [
    (module, name)
    for module, name in OBJECTS
    if inspect.isfunction(inspect.unwrap(getattr(importlib.import_module(module), name)))
]
TUPLES = [pair for pair in OBJECTS if pair not in FUNCTIONS]

every_function = pytest.mark.parametrize(("module", "name"), FUNCTIONS)


def documentation(module, name):
    """Split a docstring into what comes before its sections, and these by their headings."""
    text = inspect.getdoc(getattr(importlib.import_module(module), name))
    parts = re.split(r"(?m)^(Args|Returns|Raises|Attributes|Example|References):$", text)
    return parts[0], dict(zip(parts[1::2], parts[2::2], strict=True))


# Names


@pytest.mark.parametrize("module", PUBLIC)
def test_the_public_names_of_a_module_are_these(module):
    exported = importlib.import_module(module).__all__
    assert set(exported) == PUBLIC[module]
    assert len(exported) == len(set(exported))


@pytest.mark.parametrize("module", PUBLIC)
def test_every_public_name_is_there(module):
    for name in PUBLIC[module]:
        assert hasattr(importlib.import_module(module), name), name


@pytest.mark.parametrize(("module", "name"), OBJECTS)
def test_a_name_is_exported_where_it_is_defined(module, name):
    home = getattr(importlib.import_module(module), name).__module__
    assert home == module or home.startswith(f"{module}.")


def test_every_module_is_public_but_what_handles_arguments_and_loops_on_the_host():
    found = {info.name for info in pkgutil.iter_modules(jaxadv.__path__)}
    assert found - set(jaxadv.__all__) == {"_cpu", "boxes", "closures", "host", "inputs", "meshes"}


def test_the_version_is_a_version():
    assert re.fullmatch(r"\d+\.\d+\.\d+", jaxadv.__version__)


# Documentation


@pytest.mark.parametrize("module", PUBLIC)
def test_every_module_says_what_it_is_for(module):
    assert inspect.getdoc(importlib.import_module(module))


@every_function
def test_every_function_begins_with_one_line(module, name):
    summary, _ = documentation(module, name)
    first, *rest = summary.splitlines()
    assert first.endswith((".", "`."))
    assert not rest or not rest[0]


@every_function
def test_every_argument_is_documented(module, name):
    _, sections = documentation(module, name)
    function = getattr(importlib.import_module(module), name)
    documented = re.findall(r"(?m)^  (\*?\w+): ", sections["Args"])
    expected = [
        f"*{p.name}" if p.kind is p.VAR_POSITIONAL else p.name
        for p in inspect.signature(function).parameters.values()
    ]
    assert documented == expected


@every_function
def test_every_function_says_what_it_returns(module, name):
    _, sections = documentation(module, name)
    assert sections["Returns"].strip()


@every_function
def test_every_function_has_an_example_that_runs(module, name):
    _, sections = documentation(module, name)
    assert ">>> " in sections["Example"]  # doctest runs it


@every_function
def test_the_sections_of_a_docstring_come_in_one_order(module, name):
    _, sections = documentation(module, name)
    order = ["Args", "Returns", "Raises", "Example", "References"]
    assert list(sections) == [section for section in order if section in sections]


@pytest.mark.parametrize(
    ("module", "name"), [(module, name) for module in CITING for name in sorted(CITING[module])]
)
def test_what_is_from_a_paper_says_which_and_where(module, name):
    _, sections = documentation(module, name)
    assert re.search(r"(et al\.|and \w+), .*20\d\d", sections["References"], re.DOTALL)


@pytest.mark.parametrize(("module", "name"), TUPLES)
def test_every_field_of_a_tuple_is_documented(module, name):
    _, sections = documentation(module, name)
    of = getattr(importlib.import_module(module), name)
    fields = inspect.get_annotations(of)
    assert re.findall(r"(?m)^  (\w+): ", sections["Attributes"]) == list(fields)


# Layers


def imports(source, package=""):
    """Every module, or name of a module, that a source imports, at any depth of it."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: -node.level + 1 or None] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            found |= {f"{origin}.{alias.name}" for alias in node.names}
    return found


def sources(directory):
    return {
        ".".join(path.relative_to(directory.parent).with_suffix("").parts): path.read_text()
        for path in sorted(directory.rglob("*.py"))
    }


SOURCES = sources(LIBRARY)


def layers_of(module):
    """The top modules of jaxadv that a module of it imports, but its own."""
    package = module.rpartition(".")[0]
    used = {name.split(".")[1] for name in imports(SOURCES[module], package)
            if name.startswith("jaxadv.")}  # fmt: skip
    return used - {module.split(".")[1]}


CHAIN = [
    "types", "meshes", "inputs", "host", "closures", "_cpu", "losses", "norms", "boxes", "jacobian",
    "problem", "perturb", "attack", "evaluate",
]  # fmt: skip


@pytest.mark.parametrize("layer", CHAIN)
def test_imports_go_one_way(layer):
    below = set(CHAIN[: CHAIN.index(layer)])
    modules = [name for name in SOURCES if name.split(".")[1] == layer]
    assert modules
    for module in modules:
        assert layers_of(module) <= below, module


@pytest.mark.parametrize("module", ["jaxadv.objectives", "jaxadv.train"])
def test_the_perturbation_is_an_argument(module):
    assert not layers_of(module) & {"perturb", "attack"}


@pytest.mark.parametrize("module", SOURCES)
def test_the_library_imports_jax_numpy_optax_and_the_standard_library_only(module):
    allowed = {"jax", "numpy", "optax", "jaxadv"} | sys.stdlib_module_names
    package = module.rpartition(".")[0]
    assert {name.split(".")[0] for name in imports(SOURCES[module], package)} <= allowed


def private_uses(source):
    """Every use of jaxadv in a source that is not of a public name, as dotted names.

    Names are followed from imports, through attributes, for as long as they lead to modules.
    """
    bound, uses = {}, set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                uses.add(alias.name)
                short = alias.asname or alias.name.split(".")[0]
                bound[short] = alias.name if alias.asname else short
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                bound[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                uses.add(f"{node.module}.{alias.name}")
    for node in ast.walk(ast.parse(source)):
        path, inner = [], node
        while isinstance(inner, ast.Attribute):
            path.append(inner.attr)
            inner = inner.value
        if path and isinstance(inner, ast.Name) and inner.id in bound:
            uses.add(".".join([bound[inner.id], *reversed(path)]))
    return {use for use in uses if use.split(".")[0] == "jaxadv" and not is_public(use)}


def is_public(use):
    module, *path = use.split(".")
    for name in path:
        if name not in PUBLIC[module] and (module, name) != ("jaxadv", "__version__"):
            return False
        module = f"{module}.{name}"
        if module not in PUBLIC:
            return True  # no module: what it has is its own affair
    return True


# source, and what of it is private
USES = [
    ("import jaxadv\njaxadv.perturb.loss\njaxadv.__version__", set()),
    ("from jaxadv import attack, train as t\nattack.pgd\nt.TrainState._fields", set()),
    ("from jaxadv.perturb import alpha\nalpha.__name__", set()),
    ("import jax\njax._src\nfrom os import _exit", set()),
    ("import jaxadv\njaxadv.inputs.radius", {"jaxadv.inputs", "jaxadv.inputs.radius"}),
    ("from jaxadv import inputs", {"jaxadv.inputs"}),
    ("from jaxadv.inputs import radius", {"jaxadv.inputs.radius"}),
    ("import jaxadv.inputs as checks", {"jaxadv.inputs"}),
    ("from jaxadv import norms\nnorms._flat(v)", {"jaxadv.norms._flat"}),
    ("def f():\n    from jaxadv.norms import _flat", {"jaxadv.norms._flat"}),
]


@pytest.mark.parametrize(("source", "private"), USES)
def test_private_uses_are_found(source, private):
    assert private_uses(source) == private


EXPERIMENTS = sources(ROOT / "experiments")


@pytest.mark.parametrize("module", EXPERIMENTS)
def test_experiments_use_public_names_only(module):
    assert not private_uses(EXPERIMENTS[module])
