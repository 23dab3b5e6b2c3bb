"""Ablations on MNIST: choices that the paper makes or leaves open without showing a table.

    python experiments/ablations.py          # all questions, one seed
    python experiments/ablations.py --help   # every setting

Section 5 says that LWA's objective works better than generalisations of Goodfellow's and Miyato's.
Section 7.1 says that Adv_Alpha is the stronger adversary but costs K times as much, so that only
Adv_Loss was used in training. Section 7.2 doesn't give the size c of the training perturbations,
and calls the place where LWA_Rep splits the net a hyperparameter. This command trains nets of
500x500 hidden units in each of these ways and otherwise alike (except that LWA_Rep's training
collapses without half the learning rate and a size that rises), then attacks and scores them as in
Table 1.

Writes results.json, results.md, a figure and each net's weights to --out, and resumes after an
interruption.
"""

from __future__ import annotations

import dataclasses
import sys
from functools import partial
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, from anywhere

import tyro
from rich.console import Console

from experiments.lib import figures, options, parallel, tables, tasks, train_and_score
from experiments.lib.options import Count, OutputFolder, Positive, Several
from experiments.lib.recipes import Adversarial, Method
from experiments.lib.records import TableRow

WIDTHS = (500, 500)
Group = Literal["inner adversary of LWA", "objective", "training size of LWA", "split of LWA_Rep"]

# For each question, the nets that are compared, by their labels in its table.
GROUPS: dict[Group, dict[str, str]] = {
    "inner adversary of LWA": {
        "Adv_Loss": "lwa",
        "Adv_Alpha": "lwa_alpha",
        "Adv_Loss_Sign": "lwa_sign",
    },
    "objective": {
        "LWA": "lwa",
        "Goodfellow, Adv_Loss": "mixed_loss",
        "Goodfellow, sign": "mixed_sign",
        "Miyato": "virtual",
        "Normal": "normal",
    },
    "training size of LWA": {
        "0.5": "lwa_0.5",
        "1.0": "lwa_1.0",
        "1.5": "lwa",
        "2.0": "lwa_2.0",
        "2.5": "lwa_2.5",
        "3.0": "lwa_3.0",
    },
    "split of LWA_Rep": {
        "input (LWA)": "lwa",
        "after layer 1": "rep_1",
        "after layer 2": "rep_2",
    },
}


@dataclasses.dataclass(frozen=True)
class Settings(train_and_score.Settings):
    """Train nets of 500x500 in several ways, attack them, and print tables."""

    groups: Several[Group] = tuple(GROUPS)
    """Which questions to answer."""
    out: OutputFolder = Path("runs/ablations")
    """Where results, figures, weights and checkpoints go."""
    n_pgd: Count = 5000
    """Most images attacked by PGD, and scored after each epoch."""
    epochs: Count = 15
    """Passes over the training images."""
    lr: Positive = 0.1
    """Initial learning rate; it decays to 0 along a cosine."""

    def nets(self) -> dict[str, Method]:
        """Return how each net is made, by the name that `GROUPS` uses."""
        adversarial = partial(Adversarial, WIDTHS, self.epochs, self.lr)
        warmup = self.epochs // 2
        made: dict[str, Method] = {
            "normal": Method(WIDTHS, self.epochs, self.lr),
            **{f"lwa_{eps}": adversarial(eps=eps) for eps in (0.5, 1.0)},
            "lwa": adversarial(eps=1.5),
            **{f"lwa_{eps}": adversarial(eps=eps) for eps in (2.0, 2.5, 3.0)},
            "lwa_alpha": adversarial(eps=1.5, adversary="alpha"),
            "lwa_sign": adversarial(eps=1.5, adversary="loss_sign"),
            "mixed_loss": adversarial(eps=1.5, objective="mixed"),
            "mixed_sign": adversarial(eps=1.5, objective="mixed", adversary="loss_sign"),
            "virtual": adversarial(eps=1.5, objective="virtual", adversary="virtual"),
            **{
                # As in Table 1: training collapses without half the rate and a size that rises.
                f"rep_{split}": dataclasses.replace(
                    adversarial(eps=0.12, objective="representation", warmup=warmup, split=split),
                    lr=self.lr / 2,
                )
                for split in (1, 2)
            },
        }
        wanted = {name for group in self.groups for name in GROUPS[group].values()}
        return {name: method for name, method in made.items() if name in wanted}


def run(settings: Settings, console: Console) -> list[TableRow]:
    """Train, attack and score; return the rows."""
    task = tasks.mnist(settings, "mlp", Method(WIDTHS, settings.epochs, settings.lr))
    task = task._replace(experiment="ablations", names={}, groups=groups_of)
    rows, _ = train_and_score.run(settings, task, console)
    if parallel.first_process():
        figures.draw(settings.out)
    return rows


def groups_of(name: str) -> dict[str, str]:
    """Return the questions that a net belongs to, with its label in each."""
    return {
        group: label for group, nets in GROUPS.items() for label, net in nets.items() if net == name
    }


@options.command
def main() -> None:
    """Run the experiment from the command line."""
    settings = tyro.cli(Settings, description=__doc__)
    console = parallel.start(settings)
    rows = train_and_score.record(settings.out, run(settings, console))
    which = "held-out images" if settings.holdout else "test images"
    title = f"MNIST, 500x500: accuracy on {rows[0].n:,} {which}"
    notes = [
        f"Epochs: {', '.join(str(n) for n in sorted({row.epochs for row in rows}))}. "
        + tables.seeds(rows, {row.method: row.method for row in rows}),
        f"The Fixed set is made on a Normal net of seed {settings.fixed_seed}.",
        tables.pgd_note(rows, settings.pgd_steps),
        "LWA_Rep: size .12 ||h||, reached over the first half of the epochs, and half the learning "
        "rate. "
        "Miyato: weight 1, one power iteration.",
    ]
    groups = [group for group in GROUPS if any(group in (row.groups or {}) for row in rows)]
    sections = tables.by_group(rows, groups)
    tables.show(console, settings.out, title, rows, sections, notes)


if __name__ == "__main__":
    main()
