"""Run an attack on a data set in batches, which can be stored, resumed and reported as progress."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import time
import types
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

import jaxadv
from jaxadv import closures, host, inputs
from jaxadv.types import ApplyFn, Params, PerturbFn

__all__ = [
    "Attacked",
    "Passes",
    "Progress",
    "Ran",
    "Store",
    "are_probabilities",
    "check_progress",
    "described",
    "in_batches",
    "opened",
    "split",
    "warn_of_probabilities",
]


ALONE = 1e-2
"""How much a row's logits may differ between batches, by `apart`. Rounding to bfloat16 changes them
less."""


class Passes(NamedTuple):
    """The number of passes through the net that an attack has made.

    Attributes:
      forward: forward passes, including those of gradients.
      backward: backward passes.
    """

    forward: Any
    backward: Any


class Progress(NamedTuple):
    """The progress of an attack.

    Attributes:
      attack: its name; empty for a single attack.
      done: number of examples attacked so far.
      of: number of examples to attack.
      fooled: number of these that the attack has fooled so far; None for a single attack and in
        `distances`, which measure it at the end.
    """

    attack: str
    done: int
    of: int
    fooled: int | None


class Attacked(NamedTuple):
    """The result of an attack on a batch; every leaf has B rows, or is None for all batches.

    Attributes:
      r: the perturbations, `[B, ...]`.
      fooled: whether they make the net misclassify.
      lead: the top wrong class's lead over the label at x + r.
      passes: the number of passes for each example.
    """

    r: Any
    fooled: Any = None
    lead: Any = None
    passes: Passes | None = None


class Ran(NamedTuple):
    """The result of an attack on some examples.

    Attributes:
      r: the perturbations, `[m, ...]`.
      fooled: whether they make the net misclassify, bool `[m]`; False if it wasn't evaluated.
      lead: the top wrong class's lead over the label at x + r, `[m]`; -inf if it wasn't evaluated.
      passes: the number of passes for each example, integers `[m]`; None if the attack doesn't
        count them.
      executed: the number of passes that the machine ran, counted per example: every example of a
        batch, including padding, counts as much as the one that takes longest. None if the attack
        doesn't count passes.
      seconds: time taken.
    """

    r: NDArray[Any]
    fooled: NDArray[np.bool_]
    lead: NDArray[Any]
    passes: Passes | None
    executed: Passes | None
    seconds: float


class Store:
    """A folder with the results of an evaluation so far, batch by batch.

    Each batch is a file of its own, written completely or not at all. Nothing is pickled. With
    several processes, all of them must share the folder.
    """

    def __init__(self, folder: Path) -> None:
        """Keep batches in this folder."""
        self.folder = folder

    def add(self, stage: int, batch: Mapping[str, NDArray[Any]]) -> None:
        """Keep a batch of an attack's results; with several processes, the first one writes it."""
        if jax.process_index() == 0:
            name = f"{stage:02}-{batch['rows'][0]:08}.npz"
            arrays: dict[str, Any] = dict(batch)
            _write(self.folder / name, lambda file: np.savez(file, allow_pickle=False, **arrays))

    def batches(
        self, stage: int, rows: NDArray[np.intp]
    ) -> Iterator[tuple[NDArray[np.intp], dict[str, NDArray[Any]]]]:
        """Yield the kept batches of an attack on these rows, each with its positions in `rows`.

        Rounding differences may change which rows a later attack runs on: a batch that contains
        other rows is skipped.

        Args:
          stage: the attack's number.
          rows: ascending.

        Raises:
          ValueError: if a file can't be read.
        """
        for path in sorted(self.folder.glob(f"{stage:02}-*.npz")):
            try:
                with path.open("rb") as file, np.load(file) as kept:
                    batch = dict(kept)
            except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
                raise ValueError(
                    f"expected arrays in {path}, got: {error}; delete this file to compute its "
                    "batch again"
                ) from error
            own: NDArray[np.intp] = batch["rows"]
            if np.isin(own, rows).all():
                yield np.searchsorted(rows, own), batch


def _write(path: Path, save: Callable[[Any], None]) -> None:
    unfinished = path.with_suffix(".unfinished")
    with unfinished.open("wb") as file:
        save(file)
    os.replace(unfinished, path)


def opened(
    folder: str | os.PathLike[str],
    apply_fn: ApplyFn,
    params: Params,
    x: Any,
    attacks: Mapping[str, PerturbFn],
    **others: Any,
) -> Store:
    """Open a folder for an evaluation, which is new or was interrupted.

    Args:
      folder: created if it doesn't exist.
      apply_fn: the net.
      params: its parameters.
      x: the examples, `[n, ...]`.
      attacks: the attacks by name.
      **others: everything else that the results depend on, by name: arrays, or None.

    Raises:
      ValueError: if the folder has another evaluation, in which case the message names the
        differences, or doesn't say which it has; if it is a file.
    """
    wanted = {
        "jax": jax.__version__,
        "jaxadv": jaxadv.__version__,
        "apply_fn": closures.digest(apply_fn, params, x),
        "attacks": [[name, described(method)] for name, method in attacks.items()],
        "params": _digest(params),
        "x": _digest(x),
        **{name: _digest(tree, of_values=True) for name, tree in others.items()},
    }
    logits = _first_logits(apply_fn, params, x)
    folder = Path(folder)
    evaluation = folder / "evaluation.json"
    if folder.exists() and not folder.is_dir():
        raise ValueError(
            f"expected store to be a folder, got the file {str(folder)!r}; pass another"
        )
    if not evaluation.exists():
        if any(folder.glob("*.npz")):
            raise ValueError(_damaged(evaluation, "none"))
        folder.mkdir(parents=True, exist_ok=True)
        if jax.process_index() == 0:
            text = json.dumps({**wanted, "logits": logits.astype(np.float64).tolist()}, indent=1)
            _write(evaluation, lambda file: file.write(text.encode()))
        return Store(folder)
    try:
        kept = json.loads(evaluation.read_text())
        before = np.array(kept.pop("logits"))
    except (ValueError, KeyError) as error:
        raise ValueError(_damaged(evaluation, repr(error))) from error
    different = [name for name in {**wanted, **kept} if kept.get(name) != wanted.get(name)]
    # The remaining batches may have another size or device, and so other rounding errors.
    same = before.shape == logits.shape and apart(before, logits) <= ALONE
    if not different and len(logits) and not same:
        different = ["logits of the first examples"]
    if different:
        raise ValueError(
            f"expected the same evaluation as in store={str(folder)!r}, got other "
            f"{', '.join(different)}; choose another folder, or delete this one to start over"
        )
    return Store(folder)


def _damaged(evaluation: Path, got: str) -> str:
    return (
        f"expected {str(evaluation)!r} to say which evaluation its folder holds, got {got}; delete "
        "the folder to start over, or choose another"
    )


def _first_logits(apply_fn: ApplyFn, params: Params, x: Any) -> NDArray[Any]:
    """Return the logits of the first four examples."""
    on, n = host.spread(x), min(4, len(x))
    if not n:
        return np.zeros((0, 0))
    (few,) = on.take((x,), np.resize(np.arange(n), on.multiple(n)))
    return np.asarray(host.fetch(forward(apply_fn, params, few))[:n])


forward = jax.jit(inputs.apply, static_argnums=0)
"""`(apply_fn, params, x)` to the logits, compiled."""


def apart(logits: NDArray[Any], others: NDArray[Any]) -> float:
    """Return the largest difference from other logits `[n, K]`, relative to their size.

    A difference is divided by the largest of each row's two top logits, over all rows, or by the
    logit's own size if that is larger. So a class masked by a finite logit hides no difference.
    The result is inf if logits that aren't finite differ.
    """
    these, those = (array.astype(np.float64) for array in (logits, others))
    finite = np.isfinite(these) & np.isfinite(those)
    if not np.array_equal(these[~finite], those[~finite], equal_nan=True):
        return np.inf
    top = np.sort(np.where(finite, these, -np.inf), axis=1)[:, -2:]
    largest = np.max(np.abs(top), where=np.isfinite(top), initial=1e-30)
    these, those = these[finite], those[finite]
    return float(np.max(np.abs(these - those) / np.maximum(np.abs(these), largest), initial=0))


def are_probabilities(outputs: NDArray[Any]) -> bool:
    """Return whether all finite rows of a net's outputs `[n, K]` are probability distributions."""
    rounding = max(1e-3, 2 * float(jnp.finfo(outputs.dtype).eps))  # of a sum of rounded entries
    outputs = outputs.astype(np.float64)
    sound = outputs[np.isfinite(outputs).all(axis=1)]
    sums = np.abs(sound.sum(axis=1) - 1) < rounding
    return bool(len(sound) and (sound >= 0).all() and (sound <= 1).all() and sums.all())


def warn_of_probabilities(apply_fn: ApplyFn, params: Params, x: Any) -> None:
    """Warn if a net returns probabilities instead of logits, judging by four examples."""
    if are_probabilities(_first_logits(apply_fn, params, x)):
        warnings.warn(
            "expected logits, got outputs in [0, 1] that sum to 1: probabilities, whose gradients "
            "vanish where the net is confident, so that attacks fail and its accuracy is "
            "overstated; return logits, or the logarithms of the probabilities",
            stacklevel=4,  # past the evaluation and its decorator
        )


def described(method: Any, *around: Any) -> str:
    """Describe an attack, identically in each process, by its name, its settings and its code.

    A function's code includes the functions of its package that it calls, and the arrays, numbers
    and strings among the globals that it uses. An object's code is that of its methods, as far as
    its package defines them.

    Args:
      method: the attack, or a part of it.
      *around: what it is a part of, and has been described.
    """
    seen = [*around]  # what is shared is described once, by its place here afterwards

    def of(part: Any) -> str:
        for place, other in enumerate(seen):
            if part is other:
                return f"#{place}"
        if isinstance(part, jax.Array | np.ndarray):
            return _digest(part)
        if isinstance(part, set | frozenset):  # its order differs between processes
            return f"{{{', '.join(sorted(described(member, *seen) for member in part))}}}"
        if isinstance(part, partial):
            settings = [*map(of, part.args)]
            settings += [f"{name}={of(value)}" for name, value in part.keywords.items()]
            return f"{of(part.func)}({', '.join(settings)})"
        if isinstance(part, types.MethodType):
            return f"{of(part.__self__)}.{of(part.__func__)}"
        kind: Any = type(part)
        if dataclasses.is_dataclass(kind):
            fields = [getattr(part, field.name) for field in dataclasses.fields(kind)]
        elif isinstance(part, list | tuple):
            fields = [*part]
        elif isinstance(part, Mapping):
            fields = [*part.items()]
        elif kind.__repr__ is object.__repr__:
            fields = [*getattr(part, "__dict__", {}).values()]
        else:
            return of_function(part)
        if not isinstance(part, tuple):  # whether equal ones are one object differs
            seen.append(part)
        methods = map(of_function, _methods(kind)) if callable(part) else ()
        return f"{kind.__name__}({', '.join(map(of, fields))})[{', '.join(methods)}]"

    def of_function(part: Any) -> str:
        if not hasattr(part, "__qualname__"):
            return re.sub("0x[0-9a-f]+", "", repr(part))  # no addresses
        name = f"{part.__module__}.{part.__qualname__}"
        if name.startswith("jaxadv."):  # the store has the version of jaxadv
            return name
        code = getattr(part, "__code__", None)
        if code is None:
            wrapped = getattr(part, "__wrapped__", None)  # of jax.jit and others
            return name if wrapped is None else of(wrapped)
        seen.append(part)
        captured = [cell.cell_contents for cell in part.__closure__ or ()]
        captured += [*(part.__defaults__ or ()), *(part.__kwdefaults__ or {}).values()]
        whole = *_code(code), [*map(of, captured)], [*map(of, _used(part))]
        return f"{name} {hashlib.sha256(str(whole).encode()).hexdigest()[:16]}"

    return of(method)


def _package(value: Any) -> str:
    return str(getattr(value, "__module__", None)).partition(".")[0]


def _methods(kind: type) -> list[Any]:
    """Return the functions that a class and its bases of the same package define."""
    if _package(kind) == "jaxadv":  # the store has its version
        return []
    own = [base for base in kind.__mro__ if _package(base) == _package(kind)]
    every = (value for base in own for _, value in sorted(vars(base).items()))
    # Static and class methods, properties, and others, such as jitted ones.
    inner = (getattr(v, "__func__", None) or getattr(v, "fget", None) or v for v in every)
    return [value for value in inner if callable(value) and not isinstance(value, type)]


def _used(function: types.FunctionType) -> list[Any]:
    """Return the globals that a function uses: its package's functions and classes, and values.

    Classes are followed by their methods.
    """

    def names(code: types.CodeType) -> set[str]:
        inner = (const for const in code.co_consts if isinstance(const, types.CodeType))
        return set(code.co_names).union(*map(names, inner))

    def counts(value: Any) -> bool:
        if isinstance(value, partial):
            return True
        if callable(value):
            return _package(value) == _package(function)
        return isinstance(value, jax.Array | np.ndarray | np.generic | complex | float | int | str)

    mentioned = sorted(names(function.__code__))
    values = [function.__globals__.get(name) for name in mentioned]
    for module in [value for value in values if isinstance(value, types.ModuleType)]:
        if module.__name__.partition(".")[0] == _package(function):
            values += [getattr(module, name, None) for name in mentioned]
    used = [*filter(counts, values)]
    return used + [of for kind in used if isinstance(kind, type) for of in _methods(kind)]


def _code(code: types.CodeType) -> list[Any]:
    """Return a function's bytecode, names and constants, with those of nested functions."""

    def of(constant: Any) -> Any:
        if isinstance(constant, types.CodeType):
            return _code(constant)
        # The order of a set of strings differs between processes.
        return sorted(map(repr, constant)) if isinstance(constant, frozenset) else constant

    return [code.co_code.hex(), code.co_names, [of(constant) for constant in code.co_consts]]


def _digest(tree: Any, *, of_values: bool = False) -> str:
    """Identify arrays by their values, and by their dtypes too unless it is `of_values`."""
    structure = re.sub("0x[0-9a-f]+", "", str(jax.tree.structure(tree)))  # no addresses
    digest = hashlib.sha256(structure.encode())
    for leaf in jax.tree.leaves(tree):
        if isinstance(leaf, jax.Array) and jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        array = np.ascontiguousarray(host.fetch(leaf))
        if of_values and np.issubdtype(array.dtype, np.number):
            array = array.astype(np.float64)
        digest.update(f"{array.dtype}{array.shape}".encode() + array.tobytes())
    return digest.hexdigest()[:16]


def check_progress(progress: Any) -> None:
    """Check the function to call after each batch.

    Raises:
      TypeError: if it isn't a function.
    """
    if not (progress is None or callable(progress)):
        raise TypeError(
            f"expected progress to be a function, got {type(progress).__name__}; pass e.g. print"
        )


def in_batches(
    run: Callable[..., Attacked],
    examples: tuple[Any, ...],
    rows: NDArray[np.intp],
    sizes: Sequence[int],
    *,
    stage: int,
    name: str,
    store: Store | None,
    progress: Callable[[Progress], None] | None,
) -> Ran:
    """Run an attack on some rows of the examples.

    Args:
      run: compiled; attacks a batch of the examples.
      examples: arrays with a row for each example, or None; x first.
      rows: the rows to run on, ascending.
      sizes: the sizes of batches, largest first.
      stage: the attack's number, for the store.
      name: its name, for the progress.
      store: keeps each batch; batches in it aren't run again.
      progress: called after each batch.

    Raises:
      TypeError: if `progress` isn't a function.
    """
    check_progress(progress)
    x = examples[0]
    on = host.spread(x)
    found = _Found(len(rows), x)
    for at, batch in store.batches(stage, rows) if store else ():
        found.put(at, batch)
    overhead = sizes[0] // 80  # small nets, which use large batches, have a larger overhead
    for at, size in split(np.flatnonzero(~found.done), sizes, overhead):
        begin = time.perf_counter()
        filled = np.resize(rows[at], on.multiple(size))  # repeated; results of repeats are dropped
        made = host.fetch(run(*on.take(examples, filled)))
        r, n = made.r[: len(at)], len(at)
        moved = r.reshape(n, -1).any(axis=1)
        kept = r[moved].astype(inputs.accum_dtype(r.dtype))  # npz has no bfloat16
        batch = {"rows": rows[at], "moved": moved, "r": kept}
        if made.fooled is not None:
            batch |= {"fooled": made.fooled[:n], "lead": made.lead[:n]}
        if made.passes is not None:
            batch["passes"] = np.stack([spent[:n] for spent in made.passes])
            batch["executed"] = np.array([len(filled) * int(spent.max()) for spent in made.passes])
        batch["seconds"] = np.array(time.perf_counter() - begin)
        found.put(at, batch)
        if store is not None:
            store.add(stage, batch)
        if progress is not None:
            fooled = None if made.fooled is None else int(found.fooled.sum())
            progress(Progress(name, int(found.done.sum()), len(rows), fooled))
    return found.ran()


class _Found:
    """Collects batches."""

    def __init__(self, n: int, x: Any) -> None:
        self.r = np.zeros((n, *x.shape[1:]), jax.dtypes.canonicalize_dtype(x.dtype))
        self.fooled, self.done = np.zeros(n, bool), np.zeros(n, bool)
        self.lead = np.full(n, -np.inf)
        self.passes, self.executed = np.zeros((2, n), int), np.zeros(2, int)
        self.counted, self.seconds = True, 0.0

    def put(self, at: NDArray[np.intp], batch: Mapping[str, NDArray[Any]]) -> None:
        self.done[at] = True
        if "fooled" in batch:
            self.fooled[at], self.lead[at] = batch["fooled"], batch["lead"]
        self.r[at[batch["moved"]]] = batch["r"]
        if "passes" in batch:
            self.passes[:, at] = batch["passes"]
            self.executed += batch["executed"]
        else:
            self.counted = False
        self.seconds += float(batch["seconds"])

    def ran(self) -> Ran:
        passes = Passes(*self.passes) if self.counted else None
        executed = Passes(*map(int, self.executed)) if self.counted else None
        return Ran(self.r, self.fooled, self.lead, passes, executed, self.seconds)


def split(
    rows: NDArray[np.intp], sizes: Sequence[int], overhead: int
) -> list[tuple[NDArray[np.intp], int]]:
    """Split indices into batches; return each with the size to pad it to.

    Instead of padding the last batch to the first size, use smaller batches if that costs less. The
    cost of a batch is its padded size plus the overhead, in examples.
    """
    size, *smaller = sizes
    cut = len(rows) - len(rows) % size
    batches = [(rows[at : at + size], size) for at in range(0, cut, size)]
    if cut == len(rows):
        return batches
    one = [(rows[cut:], size)]
    several = split(rows[cut:], smaller, overhead) if smaller else one
    return batches + min(several, one, key=lambda rest: sum(of + overhead for _, of in rest))
