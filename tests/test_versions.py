"""Declared and tested versions agree; XLA flags, private modules, pickle and connections."""

import re
import tomllib
from pathlib import Path

import pytest
from conftest import xla_flags
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

import jaxadv

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PYTHONS = ["3.11", "3.12", "3.13", "3.14"]


@pytest.mark.parametrize(
    ("version", "known"), [((0, 8, 0), True), ((0, 10, 2), True), ((0, 11, 0), False)]
)
def test_xla_flags_are_set_only_for_versions_known_to_accept_them(version, known):
    assert bool(xla_flags(version)) == known


def files_with(pattern, *folders):
    return {
        path.relative_to(ROOT).as_posix()
        for folder in folders
        for path in (ROOT / folder).rglob("*.py")
        if re.search(pattern, path.read_text(), re.MULTILINE)
    }


def test_no_other_file_sets_an_xla_flag():
    # XLA ends the process at a flag that it doesn't know.
    found = files_with(r"--xla_\w", "jaxadv", "experiments", "tests", "docs")
    assert found == {"tests/conftest.py"}


def test_no_unstable_module_of_jax_is_used():
    assert not files_with(
        r"\bjax(\.| import )(_src|extend|interpreters|lib)\b", "jaxadv", "experiments"
    )


def test_the_declared_pythons_are_the_tested_ones():
    name = "Programming Language :: Python :: "
    declared = [c.removeprefix(name) for c in PROJECT["classifiers"] if c.startswith(f"{name}3.")]
    assert declared == PYTHONS
    assert PROJECT["requires-python"] == f">={declared[0]}"
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    assert re.findall(r'"(3\.\d+)"', workflow) == declared
    (listed,) = re.findall(r"^pythons=\((.*)\)$", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)
    assert listed.split() == declared


def test_the_lowest_tested_versions_are_the_lowest_declared_ones():
    lines = (ROOT / "constraints-lowest.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if "==" in line)
    extras = PROJECT["optional-dependencies"]
    for line in (*PROJECT["dependencies"], *extras["experiments"], *extras["test"]):
        requirement = Requirement(line)
        if requirement.name != "jaxadv":
            (least,) = requirement.specifier
            pinned = pins[canonicalize_name(requirement.name)]
            assert pinned in SpecifierSet(f"~={least.version}.0"), line


def test_the_extra_dev_includes_the_other_extras_of_ci():
    # So that in CI's .venv the README's command for the tests has nothing left to install.
    extras = PROJECT["optional-dependencies"]
    (everything,) = (Requirement(line) for line in extras["dev"] if line.startswith("jaxadv"))
    assert everything.extras == {"docs", "test"}
    assert all("jaxadv[experiments]" in extras[name] for name in everything.extras)


def test_the_version_is_the_same_everywhere():
    (newest, *_) = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    (cited,) = re.findall(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert newest == cited == jaxadv.__version__


def test_nothing_is_read_with_pickle():
    # As SECURITY.md says. NumPy's loader doesn't by default; PyTorch's must be told not to.
    folders = ("jaxadv", "experiments")
    assert not files_with(r"^\s*(import|from) (pickle|cloudpickle|dill|joblib|marshal)", *folders)
    assert not files_with(r"allow_pickle=True|torch\.load\((?!.*weights_only=True)", *folders)


def test_the_library_opens_no_connection_and_starts_no_process():
    assert not files_with(
        r"^\s*(import|from) (subprocess|socket|ssl|http|urllib|requests|importlib)\b", "jaxadv"
    )
