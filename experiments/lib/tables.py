"""Tables of accuracies, as Markdown and printed, beside the paper's."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from experiments.lib import parallel
from experiments.lib.records import PublishedRow, RobustRow, TableRow

LABELS = {
    "validation": "Validation",
    "fixed": "Fixed",
    "adv_loss_sign": "Adv_Loss_Sign",
    "adv_loss": "Adv_Loss",
    "adv_alpha": "Adv_Alpha",
    "pgd": "PGD",
}


def markdown(headings: Sequence[str], rows: Iterable[Iterable[Any]]) -> list[str]:
    """Return a table as lines of Markdown."""
    first, *others = ("| " + " | ".join(map(str, cells)) + " |" for cells in (headings, *rows))
    # An empty heading is one space wide.
    return [first.replace("|  |", "| |"), "|" + "---|" * len(headings), *others]


def write(folder: Path, lines: Sequence[str], console: Console) -> None:
    """Write Markdown as `results.md`, and print it."""
    text = "\n".join(lines)
    (folder / "results.md").write_text(text)
    console.print(text, highlight=False, markup=False)


def mean_and_spread(
    rows: Sequence[TableRow] | Sequence[RobustRow | PublishedRow], column: str
) -> str:
    """Return the mean over seeds, with the standard deviation if there are several; "" of none."""
    values = [row.columns[column] for row in rows]
    if len(values) < 2:
        return "".join(f"{value:.4f}" for value in values)
    return f"{np.mean(values):.4f} ± {np.std(values, ddof=1):.4f}"


def as_printed(figures: Sequence[float]) -> list[str]:
    """Return published figures with as many digits as they have, three or four."""
    digits = 4 if any(round(figure, 3) != figure for figure in figures) else 3
    return [f"{figure:.{digits}f}" for figure in figures]


def seeds(rows: Sequence[TableRow], names: Mapping[str, str]) -> str:
    """Return a note that names the rows' seeds, and the methods that have other ones."""
    of = {
        name: tuple(sorted({row.seed for row in rows if row.method == method}))
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


def fixed_source(rows: Sequence[TableRow]) -> str:
    """Return what the Fixed set's own net scores on it; once for each such net, in several runs."""
    of_one_size = [row for row in rows if row.eps == rows[0].eps]
    return " or ".join(dict.fromkeys(f"{row.columns['fixed_source']:.4f}" for row in of_one_size))


class Section(NamedTuple):
    """A table, and what it is of."""

    title: str
    cells: list[list[str]]


def by_size(
    rows: Sequence[TableRow], names: Mapping[str, str], paper: Mapping[str, Sequence[float]]
) -> Iterator[Section]:
    """Yield a table for each size of the perturbations.

    Args:
      rows: the results.
      names: the methods in order, and what to call them.
      paper: for each method the printed figures, in the order of `LABELS`; shown for the first
        size.
    """
    for i, eps in enumerate(dict.fromkeys(row.eps for row in rows)):
        ours = [row for row in rows if row.eps == eps]
        yield Section(f"l2 size {eps:g}", _cells(ours, names, {} if i else paper))


def by_group(rows: Sequence[TableRow], groups: Iterable[str]) -> Iterator[Section]:
    """Yield a table for each question and size, of the rows whose `groups` have the question."""
    for group in groups:
        for eps in dict.fromkeys(row.eps for row in rows):
            ours = [row for row in rows if row.eps == eps and group in (row.groups or {})]
            names = {row.method: row.groups[group] for row in ours if row.groups}
            yield Section(f"{group}, l2 size {eps:g}", _cells(ours, names, {}))


def _cells(
    rows: Sequence[TableRow], names: Mapping[str, str], paper: Mapping[str, Sequence[float]]
) -> list[list[str]]:
    """Return the table: a row of ours for each method, and the paper's below it."""
    cells = []
    for method, name in names.items():
        ours = [row for row in rows if row.method == method]
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
    rows: Sequence[TableRow],
    sections: Iterable[Section],
    notes: Sequence[str],
) -> None:
    """Print tables, and write them as `results.md`.

    Args:
      console: where to print.
      folder: where to write.
      title: what the tables are of.
      rows: the results that they are made from.
      sections: the tables.
      notes: what a reader must know, one sentence or two each.
    """
    # A terminal of 80 columns has no room for the longest heading in one line.
    headings = [label.replace("Loss_", "Loss\n_") for label in LABELS.values()]
    lines = [f"# {title}", ""]
    for section, cells in sections:
        table = Table(
            "Method", *headings, title=f"{title}, {section}", box=box.SIMPLE, pad_edge=False
        )
        for line in cells:
            split = (cell.replace(" ±", "\n±") for cell in line)
            table.add_row(*split, style="dim" if line[0] == "  paper" else None)
        console.print(table)
        stripped = [[cell.strip() for cell in line] for line in cells]
        lines += [f"## {section}", "", *markdown(["Method", *LABELS.values()], stripped), ""]
    seconds = {(row.method, row.seed): row.train_seconds for row in rows}
    notes = [
        *notes,
        f"Training took {sum(seconds.values()):.0f} s in all, on "
        f"{rows[0].device}, jax {rows[0].versions['jax']}.",
    ]
    for note in notes:
        console.print(note)
    console.print(f"Results, figures and weights are in {folder}.")
    if parallel.first_process():
        text = [*lines, *(f"- {note}" for note in notes), ""]
        (folder / "results.md").write_text("\n".join(text))
