"""Tables of accuracies, printed and as Markdown, beside the paper's."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from experiments.lib import parallel, records

__all__ = [
    "LABELS",
    "as_printed",
    "fixed_source",
    "mean_and_spread",
    "seeds",
    "show",
    "show_groups",
]


LABELS = {
    "validation": "Validation",
    "fixed": "Fixed",
    "adv_loss_sign": "Adv_Loss_Sign",
    "adv_loss": "Adv_Loss",
    "adv_alpha": "Adv_Alpha",
    "pgd": "PGD",
}


def mean_and_spread(rows: Sequence[records.Row], column: str) -> str:
    """Return the mean over seeds, with the standard deviation if there are several."""
    values = [row["columns"][column] for row in rows]
    if len(values) == 1:
        return f"{values[0]:.4f}"
    return f"{np.mean(values):.4f} ± {np.std(values, ddof=1):.4f}"


def as_printed(figures: Sequence[float]) -> list[str]:
    """Return published figures with as many digits as they have, three or four."""
    digits = 4 if any(round(figure, 3) != figure for figure in figures) else 3
    return [f"{figure:.{digits}f}" for figure in figures]


def seeds(rows: Sequence[records.Row], names: Mapping[str, str]) -> str:
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


def fixed_source(rows: Sequence[records.Row]) -> str:
    """Return what the Fixed set's own net scores on it; once for each such net, in several runs."""
    of_one_size = [row for row in rows if row["eps"] == rows[0]["eps"]]
    return " or ".join(
        dict.fromkeys(f"{row['columns']['fixed_source']:.4f}" for row in of_one_size)
    )


def _cells(
    rows: Sequence[records.Row], names: Mapping[str, str], paper: Mapping[str, Sequence[float]]
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


def show(
    console: Console,
    folder: Path,
    title: str,
    rows: Sequence[records.Row],
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


def show_groups(
    console: Console,
    folder: Path,
    title: str,
    rows: Sequence[records.Row],
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
    rows: Sequence[records.Row],
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
