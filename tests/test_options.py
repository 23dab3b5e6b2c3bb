"""`experiments/lib/options.py`, and the options that commands refuse: before any work, by name."""

import dataclasses
import importlib
import pkgutil
import re
import sys
from pathlib import Path
from types import UnionType
from typing import Annotated, Union, get_args, get_origin, get_type_hints

import jax
import pytest

import experiments
from experiments.lib import data, options

ROOT = Path(__file__).resolve().parents[1]
NET = str(ROOT / "experiments" / "results" / "mnist_mlp" / "lwa" / "params.safetensors")

# Arguments without a default.
NEEDED = {
    "experiments.train": {"data": "mnist"},
    "experiments.curve": {"net": NET},
    "experiments.lib.evaluation": {"net": NET},
    "experiments.lib.problems": {"net": NET},
    "experiments.reference": {"net": NET},
    "experiments.board": {"record": "mnist_mlp"},
    "experiments.known": {"folder": Path()},
    "experiments.accelerator": {"out": Path()},
}


def settings_classes():
    """Every dataclass of settings in the experiments' modules."""
    found = {}
    for module in pkgutil.walk_packages(experiments.__path__, "experiments."):
        for value in vars(importlib.import_module(module.name)).values():
            if not isinstance(value, type) or not dataclasses.is_dataclass(value):
                continue
            if value.__name__ == "Settings" or issubclass(value, options.Checked):
                found[f"{value.__module__}.{value.__qualname__}"] = value
    return found


CLASSES = settings_classes()


def numbers(kind, limits=()):
    """Yield the range of each number in an annotation; None for a number without one."""
    if kind in (int, float):
        yield next((limit for limit in limits if isinstance(limit, options.Range)), None)
    elif get_origin(kind) is Annotated:
        inner, *limits = get_args(kind)
        yield from numbers(inner, limits)
    elif get_origin(kind) in (tuple, Union, UnionType):
        for inner in get_args(kind):
            yield from numbers(inner)


def numeric_fields(cls, path=()):
    """Yield each field that holds numbers, those of recipes included, with its path and ranges."""
    for name, kind in get_type_hints(cls, include_extras=True).items():
        if dataclasses.is_dataclass(kind):
            yield from numeric_fields(kind, (*path, name))
        elif ranges := list(numbers(kind)):
            yield (*path, name), kind, ranges


FIELDS = {
    f"{where}: {'.'.join(path)}": (cls, path, kind, ranges)
    for where, cls in CLASSES.items()
    for path, kind, ranges in numeric_fields(cls)
}


def test_every_command_has_checked_settings():
    assert len(CLASSES) > 15
    assert all(issubclass(cls, options.Checked) for cls in CLASSES.values())


@pytest.mark.parametrize("name", FIELDS)
def test_every_number_has_a_range_and_is_refused_outside_by_name(name):
    cls, path, kind, ranges = FIELDS[name]
    assert None not in ranges, f"{name} is a number without a range"
    outside = {float("nan"), float("inf"), float("-inf"), 1e39}  # the last is inf in float32
    for limit in ranges:
        outside |= {
            *({limit.ge - 1} if limit.ge is not None else ()),
            *({limit.gt} if limit.gt is not None else ()),
            *({limit.le + 1} if limit.le is not None else ()),
            *({limit.lt} if limit.lt is not None else ()),
        }
    sound = NEEDED.get(cls.__module__, {})
    option = "--" + ".".join(path).replace("_", "-")
    for value in outside:
        changes = tuple(value for _ in ranges) if "tuple" in str(kind) else value
        *outer, field = path
        for recipe in outer:
            changes = dataclasses.replace(getattr(cls(**sound), recipe), **{field: changes})
            field = recipe
        with pytest.raises(options.UsageError, match=rf"expected {option} to be .*, got .*; "):
            cls(**{**sound, field: changes})


# The command lines

COMMANDS = {
    name: module
    for name in sorted(path.stem for path in (ROOT / "experiments").glob("[a-z]*.py"))
    if hasattr(module := importlib.import_module(f"experiments.{name}"), "main")
}


@pytest.mark.parametrize("name", COMMANDS)
def test_help_describes_each_command_and_runs_nothing(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit) as done:
        COMMANDS[name].main()
    assert done.value.code == 0
    assert COMMANDS[name].__doc__.splitlines()[0][:40] in capsys.readouterr().out


WITH_ADVERSARY = "only with --method lwa or goodfellow or trades, got normal"
REFUSED = {
    "train.py": {
        "--eps-warmup -1": "--eps-warmup to be at least 0, got -1",
        "--steps 0": "--steps to be at least 1, got 0",
        "--n-eval -5": "--n-eval to be at least 1, got -5",
        "--average 1.5": "--average to be at most 1, got 1.5",
        "--lr -1": "--lr to be more than 0, got -1",
        "--lr=-inf": "--lr to be finite, got -inf",
        "--batch-size 0": "--batch-size to be at least 1, got 0",
        "--seed 4294967296": "--seed to be at most 4294967295, got 4294967296",
        "--widths 5 0": "--widths to be at least 1, got 0",
        "--widths 5 --net mine:make": "--widths only with --net conv or .* or vgg, got mine:make",
        "--width 1 --net mlp": "--width only with --net vgg, got mlp",
        "--memory 2 --method trades": "--memory only with --method lwa or goodfellow, got trades",
        "--weight 1": "--weight only with --method trades, got lwa",
        "--train-eps 1 --method normal": f"--train-eps {WITH_ADVERSARY}",
        "--steps 1 --method normal": f"--steps {WITH_ADVERSARY}",
        "--eps-warmup 3 --method normal --epochs 9": f"--eps-warmup {WITH_ADVERSARY}",
        "--norm linf": "--eps in linf to be less than 0.5, which makes every image grey, got 0.5",
        "--norm linf --eps .1 --train-eps 1": "--train-eps in linf to be less than 0.5",
        "--resize 0": "--resize to be at least 1, got 0",
        "--attacks pgd pgd": "--attacks to be different values, got pgd pgd",
        "--out FILE": "--out to be a folder that can be written to, got ",
        "--out FILE/runs": "--out to be a folder that can be written to, got ",
        "--processes 2": "--coordinator, --processes and --process together",
        "--coordinator here:1 --processes 2 --process 2": "--process to be less than --processes",
        "--coordinator here --processes 2 --process 0": "--coordinator to be an address and a port",
    },
    "evaluate.py": {
        "--subtract inf": "--subtract to be finite, got inf",
        "--divide 0": "--divide to be more than 0, got 0",
        "--batch-size 0": "--batch-size to be at least 1, got 0",
        "--n 0": "--n to be at least 1, got 0",
        "--weights WEIGHTS": "--weights only with a net given as module:function",
        "--eps": "--eps to be followed by at least one value, got none",
        "--eps 1 1": "--eps to be different values, got 1.0 1.0",
        "--attacks": "--attacks to be followed by at least one value, got none",
        "--out FILE": "--out to be a folder",
    },
    "mnist.py": {
        "--lwa.warmup 31": "--lwa.warmup to be at most 30, the epochs of lwa, got 31",
        "--quick --lr-warmup 1": "--lr-warmup to be less than 1, the epochs of normal, got 1",
        "--normal.dropout 1": "--normal.dropout to be less than 1, got 1",
        "--methods trades --trades.objective representation": "--trades.objective to be adversar",
        "--seed 0 0": "--seed to be different values, got 0 0",
        "--fixed-seed 0": "--fixed-seed not to be among --seed, got 0",
        "--methods": "--methods to be followed by at least one value",
        "--out FILE": "--out to be a folder",
    },
    "cifar10.py": {
        "--quick --lr-warmup 1": "--lr-warmup to be less than 1, the epochs of normal, got 1"
    },
    "ablations.py": {"--epochs 1 --lr-warmup 1": "--lr-warmup to be less than 1"},
    "board.py": {
        "--methods lwa gone": "--methods to be nets in .*mnist_mlp, got gone",
        "--image-folder .": "--image-folder only with the record cifar10, got mnist_mlp",
        "--folder FILE": "nets of --folder as .*, got none",
        "--n 0": "--n to be at least 1, got 0",
    },
    "logistic.py": {"--digits 3 3": "--digits to be different values, got 3 3"},
}
POSITIONAL = {
    "train.py": ["mnist"], "evaluate.py": [NET], "board.py": ["mnist_mlp"],
}  # fmt: skip


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """Run a command that must refuse its options before reading or writing; return its message."""
    for name in ("mnist", "cifar10", "image_folder", "from_tfds"):
        monkeypatch.setattr(data, name, pytest.fail)
    monkeypatch.setattr(jax.distributed, "initialize", pytest.fail)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")

    def run(script, line):
        line = line.replace("FILE", str(tmp_path / "file")).replace("WEIGHTS", NET)
        monkeypatch.setattr(sys, "argv", [script, *POSITIONAL.get(script, []), *line.split()])
        with pytest.raises(SystemExit) as exit_:
            importlib.import_module(f"experiments.{script.removesuffix('.py')}").main()
        assert exit_.value.code == 2
        assert [path.name for path in tmp_path.iterdir()] == ["file"]
        printed = capsys.readouterr()
        assert printed.out == ""
        return re.sub(r"[│╭╮╰╯─\s]+", " ", printed.err)  # tyro wraps it and draws a box around it

    return run


@pytest.mark.parametrize(
    ("script", "line"), [(script, line) for script, lines in REFUSED.items() for line in lines]
)
def test_a_command_refuses_by_name_before_any_work(refused, script, line):
    said = refused(script, line)
    assert re.search(rf"expected {REFUSED[script][line]}.*; .", said), said


# What an annotation can say


@dataclasses.dataclass(frozen=True)
class Inner:
    sizes: tuple[options.Positive, ...] = (1.0,)


@dataclasses.dataclass(frozen=True)
class Outer(options.Checked):
    share: Annotated[float, options.Range(gt=0, le=1)] = 0.5
    pair: Annotated[tuple[options.Whole, options.Count], options.distinct] = (0, 1)
    several: options.Several[options.Seed] = (0,)
    perhaps: options.Count | None = None
    inner_one: Inner = Inner()
    out: options.OutputFolder = Path()


def test_values_are_checked_against_their_annotations():
    assert Outer(share=1.0, pair=(1, 2), several=(2**32 - 1,), perhaps=1).share == 1
    for changes, message in (
        ({"share": 0.0}, "--share to be more than 0, got 0.0; choose a larger"),
        ({"share": 1.1}, "--share to be at most 1, got 1.1; choose a smaller"),
        ({"pair": (0, 0)}, "--pair to be at least 1, got 0"),
        ({"pair": (1, 1)}, "--pair to be different values, got 1 1; name each once"),
        ({"several": ()}, "--several to be followed by at least one value, got none"),
        ({"perhaps": 0}, "--perhaps to be at least 1, got 0"),
        ({"inner_one": Inner(sizes=(1.0, 0.0))}, "--inner-one.sizes to be more than 0, got 0.0"),
    ):
        with pytest.raises(options.UsageError, match=message):
            Outer(**changes)


def test_a_change_is_checked_too():
    with pytest.raises(options.UsageError, match="--perhaps to be at least 1, got -1"):
        dataclasses.replace(Outer(), perhaps=-1)


def test_a_folder_may_be_missing_but_not_in_a_place_that_cannot_be_written_to(
    tmp_path, monkeypatch
):
    Outer(out=tmp_path / "new" / "newer")
    assert not (tmp_path / "new").exists()
    (tmp_path / "lost").symlink_to(tmp_path / "gone")
    with pytest.raises(options.UsageError, match=r"--out .*lost; .*lost isn't a folder, choose"):
        Outer(out=tmp_path / "lost")
    monkeypatch.setattr(options.os, "access", lambda path, mode: False)
    with pytest.raises(options.UsageError, match=r"--out .*can't be written to, choose another"):
        Outer(out=tmp_path / "new")


@pytest.mark.parametrize("kind", [options.UsageError, options.UnavailableError, FileNotFoundError])
def test_an_error_that_its_user_can_cure_ends_a_command_without_a_traceback(
    kind, monkeypatch, capsys
):
    monkeypatch.setattr(sys, "argv", ["/where/it/is/do.py"])

    @options.command
    def refuse():
        raise kind("expected more, got less; give more")

    with pytest.raises(SystemExit) as exit_:
        refuse()
    assert exit_.value.code == 2
    assert capsys.readouterr().err == "do.py: expected more, got less; give more\n"


def test_other_errors_of_a_command_keep_their_traceback():
    @options.command
    def fail():
        raise ValueError("a mistake in the code")

    with pytest.raises(ValueError, match="a mistake"):
        fail()
