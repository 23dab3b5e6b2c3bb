"""What the library promises its users: its names, its documentation, its layers."""

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

# The public surface: a change to it must change this list. Starred names cite their paper.
SURFACE = """
jaxadv: attack certify evaluate jacobian logistic losses nets norms objectives perturb problem
    report train types
jaxadv.attack: AttackInfo Found apgd* apgd_multitargeted* ddn* deepfool* fab* fmn* pgd* pgd_kl*
    reports square* with_info
jaxadv.certify: STAGES Certificate Prediction certify* predict* smooth*
jaxadv.evaluate: Audit Comparison Distances Flag NearBoundary Outcome Passes Progress Report Result
    Stage accuracy attack_and_score autoattack* check* compare* distances* fast_autoattack* interval
    measure minimal_attacks score
jaxadv.jacobian: Rows class_differences* class_pullback* pullback softmax_jacobian*
jaxadv.logistic: adversary* fit* logits loss* objective*
jaxadv.losses: dlr* logit_margin* margin targeted_dlr*
jaxadv.nets: mean_of_draws* two_logits
jaxadv.norms: clip_to_box dual* is_zero log_norm norm project rescale* sample* steepest*
jaxadv.objectives: Aux Memory Relative adversarial* kl_regularized* mixed* natural noisy*
    representation* with_memory*
jaxadv.perturb: alpha* loss* loss_sign* vat*
jaxadv.problem: Best Least Problem beyond_rounding bisect_to_boundary fold iterate run_restarts
jaxadv.report: Cost Part Robustness cost robustness
jaxadv.train: StepInfo TrainState init make_epoch* make_step* update
jaxadv.types: ApplyFn Bounds EncodeFn Eps LossFn Norm Objective Params PerturbFn Schedule
    StochasticFn TrainFn
"""
STARRED = {
    module: names.split()
    for module, names in re.findall(r"^([\w.]+): (.*(?:\n    .*)*)", SURFACE, re.MULTILINE)
}
PUBLIC = {module: {name.rstrip("*") for name in names} for module, names in STARRED.items()}
CITING = [
    (module, name[:-1]) for module, names in STARRED.items() for name in names if name[-1] == "*"
]
OBJECTS = [
    (module, name)
    for module in PUBLIC
    if module not in ("jaxadv", "jaxadv.types")
    for name in sorted(PUBLIC[module])
]


def found(module, name):
    return getattr(importlib.import_module(module), name)


FUNCTIONS = [pair for pair in OBJECTS if inspect.isfunction(inspect.unwrap(found(*pair)))]
TUPLES = [pair for pair in OBJECTS if pair not in FUNCTIONS and not pair[1].isupper()]
every_function = pytest.mark.parametrize(("module", "name"), FUNCTIONS)


def documentation(module, name):
    """Split a docstring into the text before its sections, and the sections by heading."""
    text = inspect.getdoc(found(module, name))
    parts = re.split(r"(?m)^(Args|Returns|Raises|Attributes|Example|References):$", text)
    return parts[0], dict(zip(parts[1::2], parts[2::2], strict=True))


# Names


@pytest.mark.parametrize("module", PUBLIC)
def test_the_public_names_of_a_module_are_those_listed_and_exist(module):
    exported = importlib.import_module(module).__all__
    assert sorted(exported) == sorted(PUBLIC[module])  # each once
    assert all(hasattr(importlib.import_module(module), name) for name in exported)


def test_a_name_is_exported_where_it_is_defined():
    for module, name in OBJECTS:
        if not name.isupper():  # a constant doesn't know where it was defined
            assert f"{found(module, name).__module__}.".startswith(f"{module}."), name


def test_every_module_is_public_but_the_listed_internal_ones():
    modules = {info.name for info in pkgutil.iter_modules(jaxadv.__path__)}
    assert modules - PUBLIC["jaxadv"] == {
        "_cpu",
        "_gaussian",
        "boxes",
        "closures",
        "host",
        "inputs",
        "meshes",
    }


def test_the_version_is_a_version():
    assert re.fullmatch(r"\d+\.\d+\.\d+", jaxadv.__version__)


# Documentation


def test_every_module_says_what_it_is_for():
    assert all(inspect.getdoc(importlib.import_module(module)) for module in PUBLIC)


@every_function
def test_every_function_says_in_one_line_what_it_does_then_what_it_returns(module, name):
    summary, sections = documentation(module, name)
    first, *rest = summary.splitlines()
    assert first.endswith((".", "`."))
    assert not rest or not rest[0]
    assert sections["Returns"].strip()
    assert ">>> " in sections["Example"]  # doctest runs it
    order = ["Args", "Returns", "Raises", "Example", "References"]
    assert list(sections) == [section for section in order if section in sections]


@every_function
def test_every_argument_is_documented(module, name):
    documented = re.findall(r"(?m)^  (\*?\w+): ", documentation(module, name)[1]["Args"])
    assert documented == [
        f"*{p.name}" if p.kind is p.VAR_POSITIONAL else p.name
        for p in inspect.signature(found(module, name)).parameters.values()
    ]


@pytest.mark.parametrize(("module", "name"), CITING)
def test_docstrings_of_published_methods_cite_the_paper(module, name):
    _, sections = documentation(module, name)
    assert re.search(r"(et al\.|and \w+), .*20\d\d", sections["References"], re.DOTALL)


@pytest.mark.parametrize(("module", "name"), TUPLES)
def test_every_field_of_a_tuple_is_documented(module, name):
    documented = re.findall(r"(?m)^  (\w+): ", documentation(module, name)[1]["Attributes"])
    assert documented == list(inspect.get_annotations(found(module, name)))


# Layers


def imports(source, package=""):
    """Every module, or name in a module, that a source imports, at any nesting depth."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: -node.level + 1 or None] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            names |= {f"{origin}.{alias.name}" for alias in node.names}
    return names


def sources(directory):
    return {
        ".".join(path.relative_to(directory.parent).with_suffix("").parts): path.read_text()
        for path in sorted(directory.rglob("*.py"))
    }


SOURCES = sources(LIBRARY)


def layers_of(module):
    """The other top-level modules of jaxadv that one of its modules imports."""
    used = {name.split(".")[1] for name in imports(SOURCES[module], module.rpartition(".")[0])
            if name.startswith("jaxadv.")}  # fmt: skip
    return used - {module.split(".")[1]}


CHAIN = [
    "types", "meshes", "inputs", "host", "closures", "_cpu", "losses", "norms", "_gaussian",
    "boxes", "jacobian", "problem", "perturb", "attack", "evaluate", "certify", "report",
]  # fmt: skip


@pytest.mark.parametrize("layer", CHAIN)
def test_imports_go_one_way(layer):
    below = set(CHAIN[: CHAIN.index(layer)])
    modules = [name for name in SOURCES if name.split(".")[1] == layer]
    assert modules
    for module in modules:
        assert layers_of(module) <= below, module


def test_the_perturbation_is_an_argument():
    for module in ("jaxadv.objectives", "jaxadv.train"):
        assert not layers_of(module) & {"perturb", "attack"}


def test_the_library_imports_only_jax_numpy_optax_scipy_and_the_standard_library():
    allowed = {"jax", "jaxlib", "numpy", "optax", "scipy", "jaxadv"} | sys.stdlib_module_names
    for module, source in SOURCES.items():
        package = module.rpartition(".")[0]
        assert {name.split(".")[0] for name in imports(source, package)} <= allowed, module


def private_uses(source):
    """Every use in a source of a name of jaxadv that isn't public, as dotted names."""
    bound, uses = {}, set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            origin = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
            for alias in node.names:
                uses.add(f"{origin}{alias.name}")
                bound[alias.asname or alias.name] = f"{origin}{alias.name}"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and re.fullmatch(r"[\w.]+", ast.unparse(node)):
            head, _, rest = ast.unparse(node).partition(".")
            uses.add(f"{bound.get(head)}.{rest}")
    return {use for use in uses if use.split(".")[0] == "jaxadv" and not is_public(use)}


def is_public(use):
    _, *path = use.split(".")  # attributes of a public name don't matter
    module = f"jaxadv.{path[0]}" if path else ""
    return path[:1] in ([], ["__version__"]) or (
        module in PUBLIC and (len(path) == 1 or path[1] in PUBLIC[module])
    )


def test_private_uses_are_found():
    for source, private in (
        ("import jaxadv\njaxadv.perturb.loss\njaxadv.__version__", set()),
        ("from jaxadv import attack, train as t\nattack.pgd\nt.TrainState._fields", set()),
        ("from jaxadv.perturb import alpha\nalpha.__name__", set()),
        ("import jax\njax._src\nfrom os import _exit", set()),
        ("import jaxadv\njaxadv.inputs.radius", {"jaxadv.inputs", "jaxadv.inputs.radius"}),
        ("from jaxadv.inputs import radius", {"jaxadv.inputs.radius"}),
        ("import jaxadv.inputs as checks", {"jaxadv.inputs"}),
        ("from jaxadv import norms\nnorms._flat(v)", {"jaxadv.norms._flat"}),
        ("def f():\n    from jaxadv.norms import _flat", {"jaxadv.norms._flat"}),
    ):
        assert private_uses(source) == private


def test_experiments_use_only_public_names():
    assert {name: private_uses(text) for name, text in sources(ROOT / "experiments").items()
            if private_uses(text)} == {}  # fmt: skip
