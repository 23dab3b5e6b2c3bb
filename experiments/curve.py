"""Robust accuracy of a net at every size, beside AutoAttack's at some.

    python experiments/curve.py experiments/results/mnist_mlp/lwa/params.safetensors --eps 1 1.5 2
    python experiments/curve.py --help   # every setting; NET and the images are as in evaluate.py

`evaluate.distances` finds the least perturbation of each image, once. From these follow the median
and the robust accuracy at any size. At the sizes of --eps the attacks of --attacks run as well.

What is finished is kept in --out: the same command goes on after an interruption. Writes
results.json, results.md, curve.png, and the sizes of each image, NET-NORM.npz; rows of other nets
and norms are kept, and drawn beside. The attacks' own rows are in --out/attacks.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, from anywhere

import jax
import numpy as np
import tyro
from rich.console import Console

from experiments.lib import evaluation, figures, options, parallel, problems, records, tables
from experiments.lib.attacks import LABELS, AttackName
from experiments.lib.options import OutputFolder, Range, Several
from experiments.lib.records import CurveRow, RobustRow
from jaxadv import evaluate

POINTS = 200
"""Sizes at which the curve is kept."""


@dataclasses.dataclass(frozen=True)
class Settings(evaluation.Settings):
    """Find the least perturbation of each image, and the accuracy at every size."""

    attacks: Several[AttackName] = ("standard",)
    """What else to run, at the sizes of --eps."""
    budget: Annotated[int, Range(ge=600)] = 2000
    """Forward plus backward passes that the search may take for each image."""
    out: OutputFolder = Path("runs/curve")
    """Where results go."""


def run(settings: Settings, console: Console) -> list[CurveRow]:
    """Measure the net; return its row and those of earlier runs."""
    of_attacks = {
        field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)
    }
    del of_attacks["budget"]
    attacked = evaluation.run(
        evaluation.Settings(**of_attacks | {"out": settings.out / "attacks"}), console
    )
    problem = problems.load(settings)
    identity = {
        **problem.identity, "norm": settings.norm, "seed": settings.seed,
        "budget": settings.budget, **records.made_by(),
    }  # fmt: skip
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    start = time.perf_counter()
    found = evaluate.distances(
        problem.apply_fn, problem.params, problem.x, problem.y, norm=settings.norm,
        budget=settings.budget, key=jax.random.key(settings.seed), bounds=problem.bounds,
        batch_size=settings.batch_size, store=settings.out / "batches" / digest,
    )  # fmt: skip
    seconds = time.perf_counter() - start
    spent = list(found.passes.values())
    finite = found.size[np.isfinite(found.size)]
    at = np.linspace(0, finite.max(initial=0), POINTS)
    row = CurveRow(
        **identity | {"experiment": "curve"},
        median=found.median,
        curve={"eps": at.tolist(), "accuracy": found.accuracy(at).tolist()},
        accuracy={f"{eps:g}": float(found.accuracy(eps)) for eps in settings.eps},
        attacks={
            name: {
                f"{row.eps:g}": row.columns["robust"]
                for row in attacked
                if isinstance(row, RobustRow) and _same(row, identity, name)
            }
            for name in settings.attacks
        },
        by={name: int(np.sum(found.attack == name)) for name in found.passes},
        passes={
            "forward": float(np.mean(sum(passes.forward for passes in spent))),
            "backward": float(np.mean(sum(passes.backward for passes in spent))),
        },
        seconds=round(seconds, 1),
    )
    name = f"{row.method.replace('/', '-')}-{row.norm}"
    np.savez_compressed(settings.out / f"{name}.npz", size=found.size, attack=found.attack)
    results = settings.out / "results.json"
    others = [old for old in records.load(results, CurveRow) if _place(old) != _place(row)]
    records.save(results, [*others, row])
    figures.draw(settings.out)
    return [*others, row]


def _same(row: RobustRow, identity: dict[str, Any], name: str) -> bool:
    wanted = {**identity, "attack": name}
    del wanted["budget"]
    return wanted.items() <= row.to_json().items()


def _place(row: CurveRow) -> tuple[Any, ...]:
    return row.method, row.norm, row.n, row.seed, row.budget


def as_markdown(rows: Sequence[CurveRow]) -> list[str]:
    """Return a table of each net's accuracy by the distances, and by the attacks."""
    cells = []
    for row in rows:
        for eps, accuracy in row.accuracy.items():
            others = {name: found[eps] for name, found in row.attacks.items() if eps in found}
            cells += [
                [row.method, row.norm, f"{row.n:,}", f"{row.median:.4f}", eps, f"{accuracy:.4f}",
                 LABELS[name], f"{robust:.4f}", f"{accuracy - robust:+.4f}"]
                for name, robust in others.items()
            ]  # fmt: skip
    headings = (
        "Net", "Norm", "Images", "Median size", "Size", "By distances", "Attack", "By this",
        "Difference",
    )  # fmt: skip
    budgets = " or ".join(f"{budget:,}" for budget in sorted({row.budget for row in rows}))
    return [
        "# Robust accuracy by the least perturbations",
        "",
        f"{budgets} passes for each image, all attacks together. {rows[0].device}, "
        f"jax {rows[0].versions['jax']}.",
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
