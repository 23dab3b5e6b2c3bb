"""The board: the nets of a record under AutoAttack, beside what one step makes believe.

    python experiments/board.py mnist_mlp                     # hours on 2 CPU cores
    python experiments/board.py mnist_lenet --methods lwa     # one net
    python experiments/board.py cifar10 --image-folder DIR
    python experiments/board.py --help                        # every setting

Takes the weights in experiments/results/RECORD/METHOD and attacks them in the pixel range, at
several sizes and norms, by one step (Adv_Loss), by PGD of 100 steps (from x, then from 9 random
points) and by AutoAttack, all of them through `evaluate`: blocks of images are saved, and the same
command resumes where it was interrupted. `check` says what there is to doubt.

Writes results.json and results.md to --out; one such folder can hold all three records.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, from anywhere

import tyro
from rich.console import Console

from experiments import evaluate
from experiments.lib import options, parallel, records
from experiments.lib.options import Checked, Count, Distinct, OutputFolder, Several
from experiments.lib.recipes import NAMES
from experiments.lib.records import RESULTS
from jaxadv.types import Norm

__all__ = ["COLUMNS", "Settings", "figures_of", "run", "tables"]

COLUMNS: tuple[evaluate.AttackName, ...] = ("one-step", "pgd-100x10", "standard")

Record = Literal["mnist_mlp", "mnist_lenet", "cifar10"]
Threat = Literal["l2 0.25", "l2 0.5", "l2 1.0", "l2 1.5", "l2 2.0", "linf 0.3"]
SIZES: dict[Threat, tuple[Norm, float]] = {
    "l2 0.25": ("l2", 0.25),
    "l2 0.5": ("l2", 0.5),
    "l2 1.0": ("l2", 1.0),
    "l2 1.5": ("l2", 1.5),
    "l2 2.0": ("l2", 2.0),
    "linf 0.3": ("linf", 0.3),
}
THREATS: dict[Record, tuple[Threat, ...]] = {
    "mnist_mlp": ("l2 1.5", "l2 1.0", "l2 2.0", "linf 0.3"),
    "mnist_lenet": ("l2 1.5", "l2 1.0", "l2 2.0", "linf 0.3"),
    "cifar10": ("l2 0.5", "l2 0.25"),
}


@dataclasses.dataclass(frozen=True)
class Settings(Checked):
    """Attack the nets of a record with all there is, and rank them."""

    record: Annotated[Record, tyro.conf.Positional]
    """Which record's nets."""
    methods: Annotated[tuple[str, ...], Distinct()] = ()
    """Which of them; all if none is named."""
    threats: Annotated[tuple[Threat, ...], Distinct()] = ()
    """Norms and sizes; l2 at 1.5, 1.0 and 2.0 and linf at 0.3 for MNIST, the sizes of Table 3 for
    CIFAR-10, if none is named."""
    n: Count = 1000
    """How many test images."""
    attacks: Several[evaluate.AttackName] = (*COLUMNS, "check")
    """What to run."""
    image_folder: Path | None = None
    """Read CIFAR-10 from here, DIR/{train,test}/CLASS/*, instead of downloading it."""
    folder: Path = RESULTS
    """Where the records are."""
    out: OutputFolder = Path("runs/board")
    """Where results go."""

    def __post_init__(self) -> None:
        """Check that a folder of images is given for CIFAR-10 only.

        Raises:
          UsageError: if it is given for another record.
        """
        super().__post_init__()
        if self.image_folder is not None and self.record != "cifar10":
            raise options.UsageError(
                f"expected --image-folder with the record cifar10 only, got {self.record}, whose "
                "images are here; leave it out"
            )


def run(settings: Settings, console: Console) -> list[records.Row]:
    """Attack each net in every way; return the rows of these and of earlier runs.

    Raises:
      UsageError: if there are no nets, or if one that is asked for isn't there.
    """
    record = settings.folder / settings.record
    methods = settings.methods or tuple(
        name for name in NAMES if (record / name / "params.safetensors").is_file()
    )
    if not methods:
        raise options.UsageError(
            f"expected nets of --folder as {record}/METHOD/params.safetensors, got none; "
            "train them first"
        )
    missing = [name for name in methods if not (record / name / "params.safetensors").is_file()]
    if missing:
        raise options.UsageError(
            f"expected --methods to be nets in {record}, got {', '.join(missing)}, which aren't "
            "there; train them first, or leave them out"
        )
    cifar = settings.record == "cifar10"
    rows: list[records.Row] = []
    for threat in settings.threats or THREATS[settings.record]:
        norm, eps = SIZES[threat]
        for method in methods:
            rows = evaluate.run(
                evaluate.Settings(
                    net=str(record / method / "params.safetensors"),
                    name=f"{settings.record}/{method}",
                    data=str(settings.image_folder or "cifar10") if cifar else "mnist",
                    subtract=117 if cifar else 0,
                    divide=256,
                    crop=28 if cifar else None,
                    attacks=settings.attacks,
                    eps=(eps,),
                    norm=norm,
                    n=settings.n,
                    out=settings.out,
                ),
                console,
            )
    return rows


def figures_of(rows: Sequence[records.Row], method: str, norm: str, eps: float) -> list[str]:
    """Return a net's figures under PGD and AutoAttack, and how far above one step's is.

    Args:
      rows: the board's.
      method: the net, as the rows call it.
      norm: of the size.
      eps: the size.

    Returns:
      PGD-100x10, AutoAttack and the difference between one step's robust accuracy and AutoAttack's
      on the same images, the most that AutoAttack has been run on; empty where an attack hasn't.
      PGD that has been run on other images alone says on how many, and what AutoAttack leaves of
      these.
    """
    here = [
        row
        for row in rows
        if (row["method"], row["norm"], row["eps"]) == (method, norm, eps)
        and row["attack"] in COLUMNS
    ]
    full = [row for row in here if row["attack"] == "standard"]
    most = max((row["n"] for row in full or here), default=0)
    own = {row["attack"]: row["columns"]["robust"] for row in here if row["n"] == most}
    one, pgd, worst = map(own.get, COLUMNS)
    difference = "" if one is None or worst is None else f"{one - worst:.4f}"
    cells = ["" if figure is None else f"{figure:.4f}" for figure in (pgd, worst)]
    others = {row["n"]: row["columns"]["robust"] for row in here if row["attack"] == "pgd-100x10"}
    if pgd is None and others:
        n = max(others)
        beside = [f" AutoAttack {row['columns']['robust']:.4f}" for row in full if row["n"] == n]
        cells[0] = f"{others[n]:.4f} ({','.join([f'of {n:,}', *beside])})"
    return [*cells, difference]


def tables(rows: Sequence[records.Row]) -> list[str]:
    """Return Markdown: for each record and threat a table, the most robust net first."""
    lines: list[str] = []

    def place(row: records.Row) -> tuple[str, str, float]:
        return row["method"].split("/")[0], row["norm"], row["eps"]

    for key in dict.fromkeys(map(place, rows)):
        record, norm, eps = key
        here = [row for row in rows if place(row) == key]
        by_n = sorted(here, key=lambda row: row["n"])  # the most images come last, and stay
        best = {row["method"]: row for row in by_n if row["attack"] == "standard"}
        ranked = sorted(best.values(), key=lambda row: -row["columns"]["robust"])
        lines += [
            f"## {record}: {norm} size {eps:g}",
            "",
            "| Net | Layers | Images | Clean | One step | PGD-100x10 | AutoAttack | 95 % "
            "| One step less AutoAttack |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for row in ranked:
            same = row["method"], "one-step", row["n"]
            one = [r for r in here if (r["method"], r["attack"], r["n"]) == same]
            pgd, full, difference = figures_of(here, row["method"], norm, eps)
            low, high = row["interval"]
            name = row["method"].split("/")[1]
            cells = [
                NAMES.get(name, name), row["network"], f"{row['n']:,}",
                f"{row['columns']['clean']:.4f}",
                f"{one[0]['columns']['robust']:.4f}" if one else "", pgd, f"**{full}**",
                f"{low:.3f} to {high:.3f}", difference,
            ]  # fmt: skip
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
        checks = {row["method"]: row["flags"] for row in here if row["attack"] == "check"}
        unchecked = [row["method"].split("/")[1] for row in ranked if row["method"] not in checks]
        for method, flags in checks.items():
            doubts = "; ".join(flags.values()) or "nothing to doubt was found"
            lines.append(f"- {method.split('/')[1]}: {doubts}")
        if unchecked:
            lines.append(f"- not checked: {', '.join(unchecked)}")
        lines.append("")
    return lines


@options.command
def main() -> None:
    """Run from the command line."""
    settings = tyro.cli(Settings, description=__doc__)
    console = parallel.start()
    lines = [
        "# Robust accuracy",
        "",
        "Perturbed images stay in the pixel range. AutoAttack: the standard ensemble.",
        "",
        *tables(run(settings, console)),
    ]
    (settings.out / "results.md").write_text("\n".join(lines))
    console.print("\n".join(lines), highlight=False, markup=False)


if __name__ == "__main__":
    main()
