"""Robust accuracy of a net at every size, next to AutoAttack's at a few.

    python experiments/curve.py experiments/results/mnist_mlp/lwa/params.safetensors --eps 1 1.5 2
    python experiments/curve.py --help   # every setting; NET and the images are as in evaluate.py

`evaluate.distances` finds the smallest perturbation of each image, once. These give the median and
the robust accuracy at any size. The attacks of --attacks also run, at the sizes of --eps.

Finished work is kept in --out, and the same command resumes after an interruption. Writes
results.json, results.md, curve.png, and the size for each image to NET-NORM.npz. Rows of other nets
and norms are kept, and drawn in the same figure. The attacks' own rows are in --out/attacks.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, from anywhere

import numpy as np
import tyro
from rich.console import Console

from experiments.lib import (
    evaluation,
    figures,
    options,
    parallel,
    problems,
    records,
    tables,
    training,
)
from experiments.lib.attacks import LABELS, AttackName
from experiments.lib.options import OutputFolder, Range, Several
from experiments.lib.records import CurveRow, RobustRow


@dataclasses.dataclass(frozen=True)
class Settings(evaluation.Settings):
    """Find the smallest perturbation of each image, and the accuracy at every size."""

    attacks: Several[AttackName] = ("standard",)
    """Attacks to compare with, at the sizes of --eps."""
    budget: Annotated[int, Range(ge=600)] = 2000
    """Most forward plus backward passes that the search may take per image."""
    out: OutputFolder = Path("runs/curve")
    """Where results go."""

    def __post_init__(self) -> None:
        """Refuse an option of `evaluate.py` that has no place in this figure.

        Raises:
          UsageError: if certification is asked for.
        """
        super().__post_init__()
        if self.certify is not None:
            raise options.UsageError(
                f"expected no --certify, got {self.certify:g}; evaluate.py certifies"
            )


def run(settings: Settings, console: Console) -> list[CurveRow]:
    """Measure the net; return the rows of this and of earlier runs."""
    of_attacks = {name: value for name, value in vars(settings).items() if name != "budget"}
    of_attacks["out"] = settings.out / "attacks"
    attacked = evaluation.run(evaluation.Settings(**of_attacks), console)
    problem = problems.load(settings)
    here = {**problem.identity, "norm": settings.norm, "seed": settings.seed, **records.made_by()}
    with training.bars(console) as progress:
        found, row = evaluation.curve(
            problem,
            eps=settings.eps,
            norm=settings.norm,
            attacks={
                name: {
                    f"{row.eps:g}": row.columns["robust"]
                    for row in attacked
                    if isinstance(row, RobustRow)
                    and {**here, "attack": name}.items() <= row.to_json().items()
                }
                for name in settings.attacks
            },
            budget=settings.budget,
            seed=settings.seed,
            batch_size=settings.batch_size,
            out=settings.out,
            progress=progress,
        )
    name = f"{row.method.replace('/', '-')}-{row.norm}"
    np.savez_compressed(settings.out / f"{name}.npz", size=found.size, attack=found.attack)
    rows = records.put(settings.out / "results.json", row, place=("method", "norm"))
    figures.draw(settings.out)
    return rows


def as_markdown(rows: Sequence[CurveRow]) -> list[str]:
    """Return a table of each net's accuracy by the smallest perturbations, and under attacks."""
    cells = []
    for row in rows:
        median = "none" if row.median is None else f"{row.median:.4f}"
        for eps, accuracy in row.accuracy.items():
            line = [row.method, row.norm, f"{row.n:,}", median, eps, f"{accuracy:.4f}"]
            beside = [
                [LABELS[name], f"{found[eps]:.4f}", f"{accuracy - found[eps]:+.4f}"]
                for name, found in row.attacks.items()
                if eps in found
            ]
            cells += [[*line, *others] for others in beside or [["", "", ""]]]
    headings = (
        "Net", "Norm", "Images", "Median size", "Size", "Accuracy", "Attack", "Under attack",
        "Difference",
    )  # fmt: skip
    budgets = " or ".join(f"{budget:,}" for budget in sorted({row.budget for row in rows}))
    return [
        "# Robust accuracy from the smallest perturbations",
        "",
        f"{budgets} passes per image, over all attacks of the search. {tables.machines(rows)}.",
        "",
        *tables.markdown(headings, cells),
        "",
        "![Accuracy against size](curve.png)",
        "",
    ]


@options.command
def main() -> None:
    """Run from the command line."""
    settings = tyro.cli(Settings, description=__doc__)
    console = parallel.start()
    tables.write(settings.out, as_markdown(run(settings, console)), console)


if __name__ == "__main__":
    main()
