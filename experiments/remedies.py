"""Remedies for catastrophic overfitting, when one-step training gives robustness to one step only.

    python experiments/remedies.py          # every way, one seed
    python experiments/remedies.py --help   # every setting

A LeNet that LWA trains against one step of full length becomes robust to that step but not to many
short ones: it masks its gradients, which the paper's one-step scores can't show. This command
trains LeNets that differ only in how they are perturbed in training:

- one step from x, as in LWA;
- one step from a random point of the ball, projected back into it (Wong, Rice and Kolter, 2020);
- the same with a longer step, taking the start instead wherever its loss is higher;
- one step from a random point, without projection (after de Jorge et al., 2022, whose noise is
  larger);
- one step from x, with a penalty on gradients that turn within the ball (Andriushchenko and
  Flammarion, 2020);
- one or two steps, or one toward the nearest class, from where the last epoch's perturbation ended
  (after Zheng et al., 2020);
- four steps, at several times the cost.

They are scored as in Table 2, and under AutoAttack within the pixel range. Their training steps are
timed in turn.

Writes results.json, results.md and each net's weights to --out, AutoAttack's rows to
--out/autoattack, and resumes after an interruption.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, from anywhere

import tyro
from rich.console import Console

from experiments.benchmarks import common
from experiments.lib import (
    attack_tables,
    cache,
    data,
    evaluation,
    options,
    parallel,
    records,
    tables,
    tasks,
    train_and_score,
)
from experiments.lib.attack_tables import WAYS
from experiments.lib.options import Count, OutputFolder, Positive, Several, Size
from experiments.lib.recipes import FewSteps, Method, MultiStep, OneStep
from experiments.lib.records import AttackRow, TableRow

Way = Literal[
    "from_x", "start", "best", "noise", "aligned", "memory", "memory_two", "nearest", "four"
]
EVERY: tuple[Way, ...] = get_args(Way)
KEPT: tuple[Way, ...] = ("memory", "memory_two", "nearest")
"""The ways that continue from the last epoch's perturbations."""


@dataclasses.dataclass(frozen=True)
class Settings(train_and_score.Settings):
    """Train LeNets against one step in several ways, and against four; attack and compare them."""

    methods: Several[Way] = EVERY
    """Which ways to train."""
    out: OutputFolder = Path("runs/remedies")
    """Where results, weights and checkpoints go."""
    eval_batch: Count = 100
    """Images perturbed at once when a net is scored."""
    n_pgd: Count = 1000
    """Most images attacked by PGD."""
    n_autoattack: Count = 500
    """Number of images attacked by AutoAttack."""
    epochs: Count = 8
    """Passes over the training images."""
    train_eps: Positive = 2.0
    """l2 size of the training perturbations, reached over the first eighth of the epochs."""
    alignment: Size = 0.2
    """Weight of the penalty on gradients that turn, for `aligned`."""
    stride: Positive = 1.5
    """Length of a step from the last epoch's perturbation, relative to the size."""
    memory: Count = 10
    """Number of epochs for which perturbations are kept, in the ways that keep them."""
    timed: Count = 7
    """Number of times that 50 steps of each way are timed."""

    def __post_init__(self) -> None:
        """Check that AutoAttack can be run on the trained nets.

        Raises:
          UsageError: if there are several processes, or the precision isn't float32.
        """
        super().__post_init__()
        if self.processes is not None or self.precision != "float32":
            raise options.UsageError(
                "expected --precision float32 and no --processes, since AutoAttack runs that way, "
                f"got {self.precision} and {self.processes}; leave these options out"
            )

    def nets(self) -> dict[str, Method]:
        """Return how to train each net, by its name in `WAYS`."""
        common: dict[str, Any] = {
            "widths": (500,), "epochs": self.epochs, "lr": 0.05, "eps": self.train_eps,
            "warmup": self.epochs // 8, "average": 0.999, "shift": 1,
        }  # fmt: skip
        one = partial(OneStep, **common)
        kept = partial(FewSteps, stride=self.stride, memory=self.memory, **common)
        made: dict[str, Method] = {
            "from_x": one(),
            "start": one(noise=1.0, stride=1.25),
            "best": MultiStep(steps=1, **common),  # as lwa_noisy of Table 2
            "noise": one(noise=1.0, reach=2.0),
            "aligned": one(alignment=self.alignment),
            "memory": kept(),
            "memory_two": kept(steps=2),
            "nearest": kept(adversary="alpha", candidates=2),
            "four": MultiStep(steps=4, **common),
        }
        return {name: made[name] for name in self.methods}


def run(settings: Settings, console: Console) -> tuple[list[TableRow], list[AttackRow]]:
    """Train, attack and score; return the rows of the table, and those of AutoAttack."""
    task = tasks.mnist(settings, "lenet", Method((500,), settings.epochs, 0.05))
    if not settings.holdout:  # raise its error before any training
        parallel.mesh(settings, min(settings.n_autoattack, len(data.mnist().test_labels)))
    task = task._replace(experiment="remedies", names=WAYS)
    rows, _ = train_and_score.run(settings, task, console)
    rows = with_ratios(settings, task, rows)
    attacked: list[AttackRow] = []
    # A run that chooses settings on held-out images doesn't touch the test images.
    for row in [] if settings.holdout else rows:
        attacked = evaluation.run(
            evaluation.Settings(
                net=str(train_and_score.weights_path(settings, row.method, row.seed)),
                name=f"{row.method}, seed {row.seed}",
                attacks=("one-step", "standard"),
                eps=(row.eps,),
                n=settings.n_autoattack,
                out=settings.out / "autoattack",
                devices=settings.devices,
            ),
            console,
        )
    return rows, attacked


def with_ratios(
    settings: Settings, task: train_and_score.Task, rows: list[TableRow]
) -> list[TableRow]:
    """Record the time of a step relative to LWA's, in each row that lacks it.

    Args:
      settings: settings of the experiment.
      task: its data.
      rows: rows of results.json.
    """
    missing = {row.method for row in rows if row.ratio_to_lwa is None}
    if not missing:
        return rows
    lwa = dataclasses.replace(settings, methods=("from_x",)).nets()
    seconds = train_and_score.step_seconds(
        lwa | settings.nets(), settings, task, steps=50, rounds=settings.timed
    )
    ratios = {name: common.ratio(taken, seconds["from_x"])[1] for name, taken in seconds.items()}

    def with_ratio(row: TableRow) -> TableRow:
        if row.ratio_to_lwa is not None or row.method not in ratios:
            return row
        return dataclasses.replace(row, ratio_to_lwa=round(ratios[row.method], 3))

    path = settings.out / "results.json"
    with cache.locked(settings.out):
        records.save(path, [with_ratio(row) for row in records.load(path, TableRow)])
    return [with_ratio(row) for row in rows]


def as_markdown(
    settings: Settings, rows: Sequence[TableRow], attacked: Sequence[AttackRow]
) -> list[str]:
    """Return the page: tables of the ways and of the gap that they close, and notes."""

    def of(field: str, ways: Sequence[Way] = EVERY) -> str:
        values = {row.settings[field] for row in rows if row.method in ways}
        return " or ".join(f"{value:g}" for value in sorted(values))

    first = rows[0]
    notes = [
        tables.seeds(rows, WAYS),
        f"Clean, Adv_Loss: {first.n:,} images; PGD: {of('pgd_steps')} steps on "
        f"{first.n_pgd:,}; neither stays in the pixel range.",
        f"{of('epochs')} epochs, training size {of('train_eps')}.",
    ]
    if weight := of("alignment", ["aligned"]):
        notes.append(f"The alignment penalty has weight {weight}.")
    if length := of("stride", KEPT):
        notes.append(f"Steps from the last epoch's are {length} times as long as that size.")
    if settings.holdout:
        notes.append("Test images aren't attacked while settings are chosen.")
    else:
        notes.append("In the box: the first test images.")
    notes += [
        f"On {tables.machines(rows)}.",
        "Intervals and p-values of differences are for other images, not for other seeds.",
    ]
    return [
        "# LeNet on MNIST: remedies for catastrophic overfitting",
        "",
        *attack_tables.ways(rows, attacked),
        "",
        *attack_tables.gap_closed(rows, attacked),
        *(f"- {note}" for note in notes),
        "",
    ]


@options.command
def main() -> None:
    """Run the experiment from the command line."""
    settings = tyro.cli(Settings, description=__doc__)
    console = parallel.start(settings)
    rows, attacked = run(settings, console)
    rows = train_and_score.record(settings.out, rows)
    tables.write(settings.out, as_markdown(settings, rows, attacked), console)


if __name__ == "__main__":
    main()
