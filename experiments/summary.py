"""The tables of experiments/results/README.md, filled from the records.

    python experiments/summary.py

Between a line `<!-- table NAME -->` and the next `<!-- end -->` goes the table of the record
experiments/results/NAME. For each method it has the figures printed in the paper, those of the
authors' released notebook, and ours, with the board's figures for the recorded weights. The table
`autoattack` compares the published AutoAttack with ours; `remedies` compares ways of one-step
training, `cifar10/representation` the splits and sizes of LWA_Rep, and `held_out` the settings that
were tried for a net of train.py. `python experiments/figures.py` draws the figures that go with the
tables.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, from anywhere

import tyro

from experiments.lib import attack_tables, paper, records, tables
from experiments.lib.recipes import NAMES
from experiments.lib.records import RESULTS

BOARD = ("PGD-100x10, in the box", "AutoAttack, in the box", "one step less AutoAttack")


def table(
    record: str, rows: Sequence[records.TableRow], attacked: Sequence[records.AttackRow]
) -> list[str]:
    """Return a record's table, one block for each size of perturbation.

    Args:
      record: name of the record.
      rows: its rows.
      attacked: rows of the board; its columns are shown if it has any of these nets.
    """
    lines = []
    sizes = list(dict.fromkeys(row.eps for row in rows))
    for eps in sizes:
        sources = {}
        if eps == paper.PRINTED_EPS[record]:
            sources["printed"] = paper.PRINTED[record]
        if eps == paper.NOTEBOOK_EPS[record]:
            sources["notebook"] = paper.NOTEBOOK[record]
        if len(sizes) > 1:
            lines += ["", f"l2 size {eps:g}:", ""]
        boards = {
            name: attack_tables.figures_of(attacked, f"{record}/{name}", "l2", eps)
            for name in NAMES
        }
        on_board = any(map(any, boards.values()))
        headings = ("Method", "", *tables.LABELS.values(), *(BOARD if on_board else ()))
        cells = []
        for method, label in NAMES.items():
            ours = [row for row in rows if row.method == method and row.eps == eps]
            if not ours:
                continue
            for source, figures in sources.items():
                if method in figures:
                    line = [label, source, *tables.as_printed(figures[method])]
                    cells.append(line + [""] * (len(headings) - len(line)))
            columns = [tables.mean_and_spread(ours, column) for column in tables.LABELS]
            cells.append([label, "ours", *columns, *(boards[method] if on_board else [])])
        lines += tables.markdown(headings, cells)
    return lines


SPLITS = {1: "first block", 2: "second block", 3: "first dense layer"}
"""The CIFAR-10 net's layers after which LWA_Rep can perturb the representation, by `split`."""


def by_split(rows: Sequence[records.TableRow]) -> list[str]:
    """Return a table with a line for each net of LWA_Rep, the first split first."""
    cells = [
        (
            SPLITS[row.settings["split"]], f"{row.settings['train_eps']:g}", row.epochs,
            f"{row.n:,} {'held out' if row.settings['holdout'] else 'for testing'}",
            *(tables.mean_and_spread([row], column) for column in tables.LABELS),
        )
        for row in sorted(rows, key=lambda row: (row.settings["split"], row.settings["train_eps"]))
    ]  # fmt: skip
    headings = ("Perturbed after", "Size", "Epochs", "Images", *tables.LABELS.values())
    return tables.markdown(headings, cells)


def tried(rows: Sequence[records.TrainRow]) -> list[str]:
    """Return a table of nets of train.py and the settings in which they differ."""
    settings = [row.settings for row in rows]
    differ = [name for name in settings[0] if len({of[name] for of in settings}) > 1]
    cells = [
        (
            *(row.settings[name] for name in differ), f"{row.n:,}",
            *(f"{row.columns[name]:.4f}" for name in ("clean", "robust")),
            f"{row.interval[0]:.3f} to {row.interval[1]:.3f}",
        )
        for row in rows
    ]  # fmt: skip
    names = [name.replace("_", " ") for name in differ]
    return tables.markdown((*names, "held-out images", "clean", "robust", "95% interval"), cells)


def fill(text: str) -> str:
    """Return a document with its tables filled in.

    Args:
      text: Markdown with places marked for tables.

    Returns:
      The text with the records' tables in these places. A place without a record stays unchanged.
    """

    def attacked(record: str) -> list[records.AttackRow]:
        return records.load(RESULTS / record / "results.json", records.AttackRow)

    def filled(match: re.Match[str]) -> str:
        name = match["name"]
        path = RESULTS / name / "results.json"
        if not path.exists():
            return match[0]
        if name == "autoattack":
            lines = attack_tables.beside_published(attacked(name), attacked(f"{name}/reference"))
        elif name.endswith("held_out"):
            lines = tried(records.load(path, records.TrainRow))
        else:
            rows = records.load(path, records.TableRow)
            if name == "remedies":
                lines = attack_tables.ways(rows, attacked(f"{name}/autoattack"))
            elif name == "cifar10/representation":
                lines = by_split(rows)
            else:
                lines = table(name, rows, attacked("board"))
        return "\n".join([match["start"], *lines, "<!-- end -->"])

    place = r"(?P<start><!-- table (?P<name>[\w/]+) -->)\n.*?<!-- end -->"
    return re.sub(place, filled, text, flags=re.DOTALL)


def update() -> None:
    """Fill the tables of the results' README."""
    path = RESULTS / "README.md"
    path.write_text(fill(path.read_text()))


def main() -> None:
    """Run from the command line."""
    tyro.cli(update, description=__doc__)


if __name__ == "__main__":
    main()
