"""The tables of experiments/results/README.md, filled from the records.

    python experiments/summary.py

Between a line `<!-- table NAME -->` and the next `<!-- end -->` goes the table of the record
experiments/results/NAME: for each method what the paper prints, what the authors' released notebook
shows, and ours, with what the board says of the record's weights. The table `autoattack` has what
the published AutoAttack leaves, and what ours leaves; `remedies` has the ways of training by one
step. `python experiments/figures.py` draws the figures beside them.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, from anywhere

from experiments import board, cifar10, evaluate, mnist, remedies
from experiments.lib import records, tables
from experiments.lib.recipes import NAMES
from experiments.lib.records import RESULTS

__all__ = ["fill"]


BOARD = ("PGD-100x10, in the box", "AutoAttack, in the box", "one step less AutoAttack")

Figures = Mapping[str, Sequence[float]]

PRINTED: Mapping[str, Figures] = {
    "mnist_mlp": mnist.PAPER["mlp"],
    "mnist_lenet": mnist.PAPER["lenet"],
    "cifar10": cifar10.PAPER,
}
NOTEBOOK: Mapping[str, Figures] = {  # outputs stored in the notebooks that the authors released
    "mnist_mlp": {
        "normal": (0.977, 0.361, 0.287, 0.201, 0.074),
        "dropout": (0.982, 0.446, 0.440, 0.321, 0.193),
        "goodfellow": (0.991, 0.972, 0.939, 0.844, 0.836),
        "lwa": (0.990, 0.974, 0.944, 0.867, 0.862),
    },
    "mnist_lenet": {
        "normal": (0.9912, 0.7456, 0.8082, 0.5194, 0.5014),
        "lwa": (0.9934, 0.9822, 0.9859, 0.9632, 0.9627),
    },
    "cifar10": {
        "normal": (0.851, 0.747, 0.517, 0.429, 0.416),
        "dropout": (0.877, 0.777, 0.593, 0.495, 0.479),
        "goodfellow": (0.856, 0.818, 0.794, 0.745, 0.734),
        "lwa": (0.864, 0.831, 0.803, 0.760, 0.750),
    },
}


def table(record: str, rows: Sequence[records.Row], attacked: Sequence[records.Row]) -> list[str]:
    """Return a record's table as lines of Markdown, one block for each size of perturbation.

    Args:
      record: its name.
      rows: its rows.
      attacked: the board's, whose columns are there if it has any of these nets.
    """
    lines = []
    sizes = list(dict.fromkeys(row["eps"] for row in rows))
    for eps in sizes:
        sources = {"printed": PRINTED[record], "notebook": NOTEBOOK[record]}
        if len(sizes) > 1:  # the paper names the first; the other is what its code ran
            sources.pop("notebook" if eps == sizes[0] else "printed")
            lines += ["", f"l2 size {eps:g}:", ""]
        boards = {name: board.figures_of(attacked, f"{record}/{name}", "l2", eps) for name in NAMES}
        on_board = any(map(any, boards.values()))
        headings = (*tables.LABELS.values(), *(BOARD if on_board else ()))
        lines.append("| Method | | " + " | ".join(headings) + " |")
        lines.append("|---|---|" + "---|" * len(headings))
        for method, label in NAMES.items():
            ours = [row for row in rows if row["method"] == method and row["eps"] == eps]
            if not ours:
                continue
            for source, figures in sources.items():
                if method in figures:
                    cells = tables.as_printed(figures[method])
                    cells += [""] * (len(headings) - len(cells))
                    lines.append(f"| {label} | {source} | " + " | ".join(cells) + " |")
            cells = [tables.mean_and_spread(ours, column) for column in tables.LABELS]
            cells += boards[method] if on_board else []
            lines.append(f"| {label} | ours | " + " | ".join(cells) + " |")
    return lines


def comparison(ours: Sequence[records.Row], published: Sequence[records.Row]) -> list[str]:
    """Return what AutoAttack and its members leave, ours beside the published, as Markdown.

    Args:
      ours: rows of `evaluate`.
      published: rows of `reference`.
    """
    lines = [
        "| Net | Norm, size | Attack | Published | Ours | Difference | Seconds, published | Ours |",
        "|---|---|---|---|---|---|---|---|",
    ]

    def place(row: records.Row) -> tuple[Any, ...]:
        return row["method"], row["norm"], row["eps"], row["n"], row["attack"]

    for key in dict.fromkeys(map(place, published)):
        sides = [[row for row in rows if place(row) == key] for rows in (published, ours)]
        if not all(sides):
            continue
        method, norm, eps, _, attack = key
        robust = [tables.mean_and_spread(side, "robust") for side in sides]
        means = [mean(row["columns"]["robust"] for row in side) for side in sides]
        # Of the first seed: only one run can have had the machine to itself.
        first = (min(side, key=lambda row: row["seed"]) for side in sides)
        seconds = [f"{row['seconds']:.0f}" for row in first]
        cells = [method, f"{norm} {eps:g}", evaluate.LABELS[attack], *robust]
        lines.append("| " + " | ".join([*cells, f"{means[1] - means[0]:+.4f}", *seconds]) + " |")
    return lines


def fill(text: str) -> str:
    """Return a document with its tables filled in.

    Args:
      text: Markdown with marked places.

    Returns:
      The same with the records' tables there; a place without a record is left as it is.
    """
    attacked = records.load(RESULTS / "board" / "results.json")

    def filled(match: re.Match[str]) -> str:
        rows = records.load(RESULTS / match["name"] / "results.json")
        if not rows:
            return match[0]
        if match["name"] == "autoattack":
            published = RESULTS / "autoattack" / "reference" / "results.json"
            lines = comparison(rows, records.load(published))
        elif match["name"] == "remedies":
            left = records.load(RESULTS / "remedies" / "autoattack" / "results.json")
            lines = remedies.table(rows, left)
        else:
            lines = table(match["name"], rows, attacked)
        return "\n".join([match["start"], *lines, "<!-- end -->"])

    place = r"(?P<start><!-- table (?P<name>\w+) -->)\n.*?<!-- end -->"
    return re.sub(place, filled, text, flags=re.DOTALL)


def main() -> None:
    """Fill the tables of the results' README."""
    path = RESULTS / "README.md"
    path.write_text(fill(path.read_text()))


if __name__ == "__main__":
    main()
