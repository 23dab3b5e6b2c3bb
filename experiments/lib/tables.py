"""Tables of accuracies next to the paper's, written as Markdown and printed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.markdown import Markdown

from experiments.lib import parallel, records
from experiments.lib.records import PublishedRow, RobustRow, Row, SmoothedRow, TableRow
from jaxadv import evaluate

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


def messages(flags: Iterable[evaluate.Flag]) -> dict[str, str]:
    """Return the kind and the message of each flag of `evaluate.check`, by name."""
    return {flag.name: f"{flag.kind}: {flag.message}" for flag in flags}


def doubts(flags: Mapping[str, str]) -> str:
    """Return these messages as one sentence."""
    return "; ".join(flags.values()) or "no reason for doubt was found"


def write(folder: Path, lines: Sequence[str], console: Console) -> None:
    """Write Markdown as `results.md`, in the first process, and print it."""
    text = "\n".join(lines)
    if parallel.first_process():
        (folder / "results.md").write_text(text)
    shown = Markdown(text) if console.is_terminal else text
    console.print(shown, highlight=False, markup=False, soft_wrap=not console.is_terminal)


def save(folder: Path, rows: Sequence[Row], lines: Sequence[str], console: Console) -> None:
    """Write rows as `results.json`, and their Markdown as `write` does."""
    folder.mkdir(parents=True, exist_ok=True)
    records.save(folder / "results.json", rows)
    write(folder, lines, console)


def machines(rows: Iterable[Any]) -> str:
    """Return the devices and the versions of JAX that rows were made with."""
    return "; ".join(dict.fromkeys(f"{row.device}, jax {row.versions['jax']}" for row in rows))


def mean_and_spread(
    rows: Sequence[TableRow] | Sequence[RobustRow | PublishedRow | SmoothedRow], column: str
) -> str:
    """Return the mean over seeds, with the standard deviation if there are several; "" if none."""
    values = [row.columns[column] for row in rows]
    if len(values) < 2:
        return "".join(f"{value:.4f}" for value in values)
    return f"{np.mean(values):.4f} ± {np.std(values, ddof=1):.4f}"


def as_printed(figures: Sequence[float]) -> list[str]:
    """Return published figures with as many decimals as they were printed with, three or four."""
    digits = 4 if any(round(figure, 3) != figure for figure in figures) else 3
    return [f"{figure:.{digits}f}" for figure in figures]


def seeds(rows: Sequence[TableRow], names: Mapping[str, str]) -> str:
    """Return a note on the rows' seeds, and on the methods that have different ones."""
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
    """Return the accuracy, on the Fixed set, of the net it was made on; one for each such net."""
    of_one_size = [row for row in rows if row.eps == rows[0].eps]
    return " or ".join(dict.fromkeys(f"{row.columns['fixed_source']:.4f}" for row in of_one_size))


def by_size(
    rows: Sequence[TableRow],
    names: Mapping[str, str],
    paper: Mapping[str, Sequence[float]],
    paper_eps: float,
) -> list[str]:
    """Return a table for each size of the perturbations, as lines of Markdown.

    Args:
      rows: the results.
      names: the methods, in order, and their names in the table.
      paper: for each method the paper's figures, in the order of `LABELS`.
      paper_eps: their size.
    """
    lines = []
    for eps in dict.fromkeys(row.eps for row in rows):
        ours = [row for row in rows if row.eps == eps]
        lines += _table(f"l2 size {eps:g}", ours, names, paper if eps == paper_eps else {})
    return lines


def by_group(rows: Sequence[TableRow], groups: Iterable[str]) -> list[str]:
    """Return a table for each question in `groups` and each size, as lines of Markdown."""
    lines = []
    for group in groups:
        for eps in dict.fromkeys(row.eps for row in rows):
            ours = [row for row in rows if row.eps == eps and group in (row.groups or {})]
            names = {row.method: row.groups[group] for row in ours if row.groups}
            lines += _table(f"{group}, l2 size {eps:g}", ours, names, {})
    return lines


def _table(
    title: str,
    rows: Sequence[TableRow],
    names: Mapping[str, str],
    paper: Mapping[str, Sequence[float]],
) -> list[str]:
    """Return a titled table: for each method a line of ours, and the paper's below it."""
    cells = []
    for method, name in names.items():
        ours = [row for row in rows if row.method == method]
        if not ours:
            continue
        cells.append([name, *(mean_and_spread(ours, column) for column in LABELS)])
        if printed := paper.get(method, ()):
            empty = [""] * (len(LABELS) - len(printed))
            cells.append(["paper", *as_printed(printed), *empty])
    return [f"## {title}", "", *markdown(["Method", *LABELS.values()], cells), ""]


def pgd_note(rows: Sequence[TableRow], pgd_steps: int) -> str:
    """Return a note on the column PGD, which isn't in the paper."""
    return (
        f"PGD: {pgd_steps} steps of l2 PGD on the margin loss, from x, on {rows[0].n_pgd:,} of the "
        "images; not in the paper. Nothing is clipped to the pixel range."
    )


def show(
    console: Console,
    folder: Path,
    title: str,
    rows: Sequence[TableRow],
    sections: Iterable[str],
    notes: Sequence[str],
) -> None:
    """Print tables, and write them as `results.md`.

    Args:
      console: where to print.
      folder: where to write.
      title: title of the page.
      rows: the results that the tables show.
      sections: the tables, as lines of Markdown.
      notes: what readers must know, in one or two sentences each.
    """
    seconds = {(row.method, row.seed): row.train_seconds for row in rows}
    notes = [
        *notes,
        f"Training took {sum(seconds.values()):.0f} s in all, on {machines(rows)}.",
    ]
    write(folder, [f"# {title}", "", *sections, *(f"- {note}" for note in notes), ""], console)
    console.print(f"Results, figures and weights are in {folder}.")
