"""Options of the command lines: what each takes, checked before anything runs.

An experiment's settings are a frozen dataclass that derives from `Checked`. Its annotations say
what each option takes: `Count` is 1, 2, ...; `Annotated[float, Range(ge=0, lt=1)]` a number within
these bounds; `Several[Count]` one or more different counts; `OutputFolder` a folder that can be
written to. Everything is checked when settings are made, recipes within them included, on the
command line and in Python alike. Errors name the option as it is typed (`--lwa.warmup`), and
`command` shows them without a traceback.
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

_LARGEST = float(np.finfo(np.float32).max)  # what is computed with is float32


class UsageError(ValueError):
    """A command was misused. The message says what was expected, what it got, and the cure."""


Refusal = tuple[str, str]
"""What was expected instead of a value, and the cure.

A limit, among an annotation's metadata, is a function from a value to a refusal, or None.
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Range:
    """A limit: finite numbers within bounds, which are named as in `operator`."""

    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None

    def __call__(self, value: float) -> Refusal | None:
        """Refuse a number outside the bounds."""
        if not abs(value) <= _LARGEST:  # so that NaN is refused, too
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
    """A limit: values that all differ."""
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
"""0, 1, 2, ... as far as JAX's integers go."""
Count = Annotated[int, Range(ge=1, le=2**31 - 1)]
"""1, 2, ... likewise."""
Seed = Annotated[int, Range(ge=0, le=2**32 - 1)]
"""What a generator of random numbers takes."""
Size = Annotated[float, Range(ge=0)]
"""A number that isn't negative."""
Positive = Annotated[float, Range(gt=0)]
"""A number above 0."""
Share = Annotated[float, Range(ge=0, le=1)]
"""A part of a whole."""
Several = Annotated[tuple[T, ...], _not_empty, distinct]
"""One or more different values."""
OutputFolder = Annotated[Path, _writable]
"""A folder to write to, which may be made."""


@dataclasses.dataclass(frozen=True)
class Checked:
    """Settings that are checked against their annotations when they are made.

    A class that has more to check, such as options that don't go together, does so in its own
    `__post_init__`, after this one.
    """

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
          UsageError: if a value isn't what its annotation says.
        """
        _check_fields("--", self)

    def without(self, *names: str) -> dict[str, Any]:
        """Return all options but these, by name, for a record."""
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
    """Check a value, and what is in it."""
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
      UsageError: if the module or its function isn't there.
    """
    module, _, function = name.partition(":")
    sys.path.insert(0, str(Path.cwd()))
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise UsageError(
            f"expected a function {function} in a module {module}, got: {error}; name it "
            "module:function, from the folder that the module is in"
        ) from error


def command(main: Callable[[], None]) -> Callable[[], None]:
    """Let a command end by a message where it can't be used so, without a traceback.

    Args:
      main: what runs from the command line.

    Returns:
      The same, but for a `UsageError` or a file that isn't there: these exit with status 2, as an
      unknown option does.
    """

    @functools.wraps(main)
    def guarded() -> None:
        try:
            main()
        except (UsageError, FileNotFoundError) as error:
            print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
            sys.exit(2)

    return guarded
