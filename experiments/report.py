"""What a run leaves behind: results.json, a table beside the paper's, figures, weights.

The JSON is a list of rows, one per method and seed, and the source of everything else here: tables
and the curves can be drawn again from it alone.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from rich import box
from rich.console import Console
from rich.table import Table
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

import jaxadv
from experiments import data, models, options, parallel
from jaxadv.types import Params

__all__ = [
    "LABELS",
    "Digits",
    "as_printed",
    "cores",
    "device",
    "fixed_source",
    "grouped_tables",
    "interface",
    "load_params",
    "load_rows",
    "made",
    "mean_and_spread",
    "save_digits",
    "save_params",
    "save_rows",
    "seeds",
    "tables",
    "versions",
]

Row = dict[str, Any]


class Digits(NamedTuple):
    """One method's perturbations of some images, and the predictions before and after."""

    r: np.ndarray  # [n, 28, 28, 1]
    before: np.ndarray  # [n]
    after: np.ndarray  # [n]


LABELS = {
    "validation": "Validation",
    "fixed": "Fixed",
    "adv_loss_sign": "Adv_Loss_Sign",
    "adv_loss": "Adv_Loss",
    "adv_alpha": "Adv_Alpha",
    "pgd": "PGD",
}


def versions() -> dict[str, str]:
    """Return the versions that a result depends on."""
    packages = ("jax", "jaxlib", "flax", "optax", "numpy")
    return {
        "python": platform.python_version(),
        "jaxadv": jaxadv.__version__,  # known to a checkout that isn't installed, too
        **{name: version(name) for name in packages},
    }


def device() -> str:
    """Return the kind and number of devices, e.g. `cpu x1 (2 cores)`."""
    first = jax.devices()[0]
    if first.platform != "cpu":
        return f"{first.device_kind} x{jax.device_count()}"
    n = cores()
    return f"cpu x{jax.device_count()} ({n} core{'' if n == 1 else 's'})"


def cores() -> int:
    """Return how many of the machine's cores this process may use."""
    allowed = getattr(os, "sched_getaffinity", None)  # which of them, no system but Linux's says
    return len(allowed(0)) if allowed else os.cpu_count() or 1


def load_rows(path: Path, fields: Sequence[str] = ("experiment",)) -> list[Row]:
    """Return the rows written so far; none if there is no such file.

    Args:
      path: of the file.
      fields: what every row must have.

    Raises:
      UsageError: if the file isn't a list of such rows.
    """
    if not path.exists():
        return []
    try:
        rows = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise options.UsageError(
            f"expected JSON in {path}, got: {error}; move it away, or choose another folder"
        ) from error
    found = "something else"
    if isinstance(rows, list) and all(isinstance(row, dict) for row in rows):
        lacking = [name for name in fields if any(row.get(name) is None for row in rows)]
        if not lacking:
            return rows
        found = f"some without {lacking[0]}"
    raise options.UsageError(
        f"expected a list of rows with {', '.join(fields)} in {path}, got {found}; move it away, "
        "or choose another folder"
    )


def save_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write the rows, whole or not at all; what isn't finite, which JSON has not, as null."""
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(_finite(rows), indent=1, allow_nan=False) + "\n")
    os.replace(unfinished, path)


def _finite(content: Any) -> Any:
    if isinstance(content, Mapping):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def save_params(
    path: Path,
    params: Any,
    dtype: DTypeLike | None = None,
    *,
    interface: data.Interface | None = None,
    made: Mapping[str, Any] | None = None,
) -> None:
    """Write parameters as safetensors, named by their paths joined by "/".

    Args:
      path: of the file.
      params: a pytree.
      dtype: what arrays are rounded to; None for their own.
      interface: what the net's inputs and logits stand for, which `interface` gives back.
      made: how they were made, which `made` gives back: what JSON can hold.

    Raises:
      ValueError: if two of the pytree's paths are the same name.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # In C's order, which is how safetensors reads an array's memory, whatever its strides.
    named = {
        name: np.asarray(leaf, dtype, order="C") for name, leaf in models.by_path(params).items()
    }
    said: dict[str, Any] = {} if made is None else {"made": made}
    if interface is not None:
        said["interface"] = interface._asdict()
    unfinished = path.with_suffix(".unfinished")
    save_file(named, unfinished, {key: json.dumps(value) for key, value in said.items()} or None)
    os.replace(unfinished, path)


def load_params(path: Path, dtype: DTypeLike | None = None) -> Params:
    """Return the arrays of a safetensors file, nested by the parts of their names.

    Args:
      path: of the file.
      dtype: what they are turned into, of floating-point numbers; None for what they are written
        as.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if it isn't a whole file of safetensors, if a name is both an array and a folder
        of arrays, or if arrays that aren't of floating-point numbers would be turned into such.
    """
    with _opened(path) as file:
        names = sorted(file.keys())  # a name comes before those that it is a folder of
        arrays = [file.get_tensor(name) for name in names]
    others = [
        f"{array.dtype} in {name}"
        for name, array in zip(names, arrays, strict=True)
        if not jnp.issubdtype(array.dtype, jnp.floating)
    ]
    if dtype is not None and others:
        raise options.UsageError(
            f"expected floating-point weights in {path}, got {', '.join(others)}; write them as "
            "floating-point numbers, scaled as they are used"
        )
    params: dict[str, Any] = {}
    for name, array in zip(names, arrays, strict=True):
        *folders, leaf = name.split("/")
        inner = params
        for folder in folders:
            inner = inner.setdefault(folder, {})
            if not isinstance(inner, dict):
                raise options.UsageError(
                    f"expected names that are either arrays or folders of arrays in {path}, got "
                    f"one that is both, on the way to {name}; rename one of them"
                )
        inner[leaf] = jnp.asarray(array, dtype)
    return params


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    if not path.is_file():
        raise FileNotFoundError(
            f"expected a file of weights, got {path}, which isn't there; "
            "name a .safetensors file, or module:function"
        )
    try:
        with safe_open(path, "numpy") as file:
            yield file
    except SafetensorError as error:
        raise options.UsageError(
            f"expected safetensors in {path}, got {error}; write it again, e.g. with "
            "safetensors.flax.save_file"
        ) from error


def made(path: Path) -> dict[str, Any] | None:
    """Return how the weights in a file were made; None if it doesn't say, or isn't there."""
    return _said(path, "made") if path.is_file() else None


def interface(path: Path) -> data.Interface | None:
    """Return what inputs and logits of the weights' net stand for; None if the file doesn't say.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if what the file says isn't an interface.
    """
    said = _said(path, "interface")
    if said is None:
        return None
    if said.keys() != set(data.Interface._fields):
        raise options.UsageError(
            f"expected {', '.join(data.Interface._fields)} of the interface in {path}, got "
            f"{', '.join(said)}; write it again by report.save_params"
        )
    return data.Interface(**said | {name: tuple(said[name]) for name in ("classes", "shape")})


def _said(path: Path, key: str) -> dict[str, Any] | None:
    with _opened(path) as file:
        text = (file.metadata() or {}).get(key)
    try:
        return None if text is None else dict(json.loads(text))
    except (TypeError, ValueError) as error:
        raise options.UsageError(
            f"expected a JSON object as {key!r} in the metadata of {path}, got {text!r}; write it "
            "again by report.save_params"
        ) from error


def mean_and_spread(rows: Sequence[Row], column: str) -> str:
    """Return the mean over seeds, with the standard deviation if there are several."""
    values = [row["columns"][column] for row in rows]
    if len(values) == 1:
        return f"{values[0]:.4f}"
    return f"{np.mean(values):.4f} ± {np.std(values, ddof=1):.4f}"


def as_printed(figures: Sequence[float]) -> list[str]:
    """Return published figures with as many digits as they have, three or four."""
    digits = 4 if any(round(figure, 3) != figure for figure in figures) else 3
    return [f"{figure:.{digits}f}" for figure in figures]


def seeds(rows: Sequence[Row], names: Mapping[str, str]) -> str:
    """Return a note of which seeds the rows are of, and which methods' differ."""
    of = {
        name: tuple(sorted({row["seed"] for row in rows if row["method"] == method}))
        for method, name in names.items()
    }
    most = max(of.values(), key=len)
    note = f"Seeds {', '.join(map(str, most))}" + (
        " (mean ± standard deviation)" if len(most) > 1 else ""
    )
    for name, own in of.items():
        if own and own != most:
            note += f"; of {name} {', '.join(map(str, own))}"
    return note + "."


def fixed_source(rows: Sequence[Row]) -> str:
    """Return what the Fixed set's own net scores on it; once for each such net, in several runs."""
    of_one_size = [row for row in rows if row["eps"] == rows[0]["eps"]]
    return " or ".join(
        dict.fromkeys(f"{row['columns']['fixed_source']:.4f}" for row in of_one_size)
    )


def _cells(
    rows: Sequence[Row], names: Mapping[str, str], paper: Mapping[str, Sequence[float]]
) -> list[list[str]]:
    """Return the table: a row of ours for each method, and the paper's below it."""
    cells = []
    for method, name in names.items():
        ours = [row for row in rows if row["method"] == method]
        if not ours:
            continue
        cells.append([name, *(mean_and_spread(ours, column) for column in LABELS)])
        printed = paper.get(method, ())
        if printed:
            empty = [""] * (len(LABELS) - len(printed))
            cells.append(["  paper", *as_printed(printed), *empty])
    return cells


def tables(
    console: Console,
    folder: Path,
    title: str,
    rows: Sequence[Row],
    names: Mapping[str, str],
    paper: Mapping[str, Sequence[float]],
    notes: Sequence[str],
) -> None:
    """Print a table for each size of the perturbations, and write them as `results.md`.

    Args:
      console: where to print.
      folder: where to write.
      title: what the tables are of.
      rows: the results.
      names: the methods in order, and what to call them.
      paper: for each method the printed figures, in the order of `LABELS`; shown for the first
        size.
      notes: what a reader must know, one sentence or two each.
    """
    lines = []
    sizes = list(dict.fromkeys(row["eps"] for row in rows))
    for eps in sizes:
        ours = [row for row in rows if row["eps"] == eps]
        cells = _cells(ours, names, paper if eps == sizes[0] else {})
        lines += _table(console, title, f"l2 size {eps:g}", cells)
    _finish(console, folder, title, lines, rows, notes)


def grouped_tables(
    console: Console,
    folder: Path,
    title: str,
    rows: Sequence[Row],
    groups: Sequence[str],
    notes: Sequence[str],
) -> None:
    """Print a table for each question and size, and write them as `results.md`.

    Args:
      console: where to print.
      folder: where to write.
      title: what the tables are of.
      rows: the results; `row["groups"]` has what to call its net in each question.
      groups: the questions.
      notes: what a reader must know, one sentence or two each.
    """
    lines = []
    sizes = dict.fromkeys(row["eps"] for row in rows)
    for group, eps in itertools.product(groups, sizes):
        ours = [row for row in rows if group in row["groups"] and row["eps"] == eps]
        names = {row["method"]: row["groups"][group] for row in ours}
        lines += _table(console, title, f"{group}, l2 size {eps:g}", _cells(ours, names, {}))
    _finish(console, folder, title, lines, rows, notes)


def _table(console: Console, title: str, section: str, cells: Sequence[Sequence[str]]) -> list[str]:
    """Print a table; return it as lines of Markdown."""
    headings = (label.replace("Loss_", "Loss\n_") for label in LABELS.values())
    # A terminal of 80 columns has no room for the longest heading in one line.
    table = Table("Method", *headings, title=f"{title}, {section}", box=box.SIMPLE, pad_edge=False)
    for line in cells:
        split = (cell.replace(" ±", "\n±") for cell in line)
        table.add_row(*split, style="dim" if line[0] == "  paper" else None)
    console.print(table)
    lines = [f"## {section}", "", "| Method | " + " | ".join(LABELS.values()) + " |"]
    lines.append("|---|" + "---|" * len(LABELS))
    lines += ["| " + " | ".join(cell.strip() for cell in line) + " |" for line in cells]
    return [*lines, ""]


def _finish(
    console: Console,
    folder: Path,
    title: str,
    lines: Sequence[str],
    rows: Sequence[Row],
    notes: Sequence[str],
) -> None:
    seconds = {(row["method"], row["seed"]): row["train_seconds"] for row in rows}
    notes = [
        *notes,
        f"Training took {sum(seconds.values()):.0f} s in all, on "
        f"{rows[0]['device']}, jax {rows[0]['versions']['jax']}.",
    ]
    for note in notes:
        console.print(note)
    console.print(f"Results, figures and weights are in {folder}.")
    text = [f"# {title}", "", *lines, *(f"- {note}" for note in notes), ""]
    if parallel.first_process():
        (folder / "results.md").write_text("\n".join(text))


def save_digits(
    path: Path, images: jax.Array, labels: jax.Array, perturbed: Mapping[str, Digits]
) -> None:
    """Write images and what methods did to them, pixels in thousandths, for `figures`."""

    def thousandths(pixels: Any) -> Any:
        return np.rint(1000 * np.asarray(pixels)).astype(int).tolist()

    content = {
        "images": thousandths(images),
        "labels": np.asarray(labels).tolist(),
        "perturbed": {
            name: {
                "r": thousandths(digits.r),
                "before": digits.before.tolist(),
                "after": digits.after.tolist(),
            }
            for name, digits in perturbed.items()
        },
    }
    path.write_text(json.dumps(content, separators=(",", ":")) + "\n")
