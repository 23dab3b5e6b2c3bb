"""Command-line options: the values that each takes, checked before anything runs.

An experiment's settings are a frozen dataclass that derives from `Checked`. Its annotations say
what each option takes: `Count` is 1, 2, ...; `Annotated[float, Range(ge=0, lt=1)]` is a number
within these bounds; `Several[Count]` is one or more different counts; `OutputFolder` is a folder
that can be written to. Settings, and recipes within them, are checked when they are created, on the
command line and in Python alike. Errors name the option as it is typed (`--lwa.warmup`), and
`command` prints them without a traceback.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import operator
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

import numpy as np

_LARGEST = float(np.finfo(np.float32).max)  # computations are in float32


class UsageError(ValueError):
    """A command was misused. The message says what was expected, what it got, and the remedy."""


class UnavailableError(Exception):
    """A package or the network is missing. The message says what for, and the remedy."""


Refusal = tuple[str, str]
"""What was expected instead of a value, and the remedy.

A limit is a function in an annotation's metadata that maps a value to a refusal, or to None.
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Range:
    """A limit: finite numbers within bounds, which are named as in the module `operator`."""

    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None

    def __call__(self, value: float) -> Refusal | None:
        """Refuse a number outside the bounds."""
        if not abs(value) <= _LARGEST:  # not `>`, so that NaN is refused too
            return "finite", "choose another"
        for bound, holds, words, cure in (
            (self.ge, operator.ge, "at least", "choose a larger one"),
            (self.gt, operator.gt, "more than", "choose a larger one"),
            (self.le, operator.le, "at most", "choose a smaller one"),
            (self.lt, operator.lt, "less than", "choose a smaller one"),
        ):
            if bound is not None and not holds(value, bound):
                return f"{words} {bound:.10g}", cure
        return None


def distinct(values: tuple[Any, ...]) -> Refusal | None:
    """A limit: values that are all different."""
    return None if len(set(values)) == len(values) else ("different values", "name each once")


def _not_empty(values: tuple[Any, ...]) -> Refusal | None:
    return None if values else ("followed by at least one value", "name one, or leave it out")


def _writable(folder: Path) -> Refusal | None:
    there = next(filter(os.path.lexists, (folder, *folder.absolute().parents)))
    if there.is_dir() and os.access(there, os.W_OK):
        return None
    what = "can't be written to" if there.is_dir() else "isn't a folder"
    return "a folder that can be written to", f"{there} {what}, choose another"


T = TypeVar("T")

Whole = Annotated[int, Range(ge=0, le=2**31 - 1)]
"""0, 1, 2, ..., up to JAX's largest integer."""
Count = Annotated[int, Range(ge=1, le=2**31 - 1)]
"""1, 2, ..., up to JAX's largest integer."""
Seed = Annotated[int, Range(ge=0, le=2**32 - 1)]
"""A seed for a random generator."""
Size = Annotated[float, Range(ge=0)]
"""A number that isn't negative."""
Positive = Annotated[float, Range(gt=0)]
"""A number above 0."""
Share = Annotated[float, Range(ge=0, le=1)]
"""A number between 0 and 1."""
Several = Annotated[tuple[T, ...], _not_empty, distinct]
"""One or more different values."""
OutputFolder = Annotated[Path, _writable]
"""A folder to write to, which need not exist yet."""


@dataclasses.dataclass(frozen=True)
class Checked:
    """Settings that are checked against their annotations when they are created.

    A class with more to check, such as options that exclude each other, does so in its own
    `__post_init__`, after calling this one.
    """

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
          UsageError: if a value isn't what its annotation says.
        """
        _check_fields("--", self)

    def without(self, *names: str) -> dict[str, Any]:
        """Return all options except these, by name, for a record."""
        return {
            name: value for name, value in dataclasses.asdict(self).items() if name not in names
        }


def _check_fields(prefix: str, settings: Any) -> None:
    for name, annotation in _annotations(type(settings)).items():
        _check(prefix + name.replace("_", "-"), annotation, getattr(settings, name))


def _annotations(kind: type) -> dict[str, Any]:
    hints = get_type_hints(kind, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def _check(option: str, annotation: Any, value: Any) -> None:
    """Check a value, and any values inside it."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if dataclasses.is_dataclass(value):
        _check_fields(f"{option}.", value)
    elif origin is Annotated:
        _check(option, inner[0], value)
        for limit in inner[1:]:
            if callable(limit) and (refusal := limit(value)):
                expected, cure = refusal
                raise UsageError(f"expected {option} to be {expected}, got {_shown(value)}; {cure}")
    elif origin in (Union, UnionType):  # an option that may be left out
        for kind in inner if value is not None else ():
            _check(option, kind, value)
    elif origin is tuple:
        kinds = inner[:1] * len(value) if inner[1:] == (...,) else inner
        for kind, item in zip(kinds, value, strict=True):
            _check(option, kind, item)


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join(map(str, value)) or "none"
    return str(value)


def imported(name: str) -> Any:
    """Return the function that an option names as `module:function`.

    Raises:
      UsageError: if there is no such module or function.
    """
    module, _, function = name.partition(":")
    sys.path.insert(0, str(Path.cwd()))
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise UsageError(
            f"expected a function {function} in a module {module}, got: {error}; name it as "
            "module:function, and run the command in the module's folder"
        ) from error


def command(main: Callable[[], None]) -> Callable[[], None]:
    """Make a command end with a message, not a traceback, when it is misused or lacks something.

    Args:
      main: the function that runs the command.

    Returns:
      A function that does the same, but prints the message of a `UsageError`, an
      `UnavailableError` or a `FileNotFoundError` and exits with status 2, as for an unknown option.
    """

    @functools.wraps(main)
    def guarded() -> None:
        try:
            main()
        except (UsageError, UnavailableError, FileNotFoundError) as error:
            print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
            sys.exit(2)

    return guarded
