"""The layout of experiments/: commands at the top, the code they share in lib/."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1] / "experiments"
COMMANDS = {path.stem: path for path in ROOT.glob("[a-z]*.py")}
MODULES = sorted(ROOT.rglob("[a-z]*.py"))


def imported(path):
    """The modules of experiments/ that a file imports, by their names there."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("experiments"):
            place = node.module.removeprefix("experiments").lstrip(".")
            yield from (f"{place}.{name.name}".lstrip(".") for name in node.names)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_module_imports_a_command(path):
    assert not COMMANDS.keys() & set(imported(path))


@pytest.mark.parametrize("name", COMMANDS)
def test_every_module_at_the_top_is_a_command(name):
    assert COMMANDS[name].read_text().endswith(("    main()\n", "    sys.exit(main())\n"))


@pytest.mark.parametrize("path", sorted(ROOT.glob("lib/*.py")), ids=lambda path: path.stem)
def test_lib_imports_only_from_lib(path):
    assert not [name for name in imported(path) if not name.startswith("lib.")]
