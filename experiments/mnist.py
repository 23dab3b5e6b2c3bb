"""Tables 1 and 2 of the paper: five ways of training an MNIST classifier, each attacked.

    python experiments/mnist.py                    # Table 1, a few minutes on 2 CPU cores
    python experiments/mnist.py --network lenet    # Table 2 and Figures 1 and 2, a few hours
    python experiments/mnist.py --quick            # about a minute, to see that it works
    python experiments/mnist.py --help             # every setting

Trains the nets of Section 7.2 (Huang et al., 2015) by Normal, Dropout, Goodfellow's method, LWA and
LWA_Rep, perturbs the test images at l2 size 1.5 and prints the accuracies next to the paper's. The
column PGD isn't in the paper: it is an iterated attack of 100 steps, so that nobody mistakes
one-step figures for robustness. As in the paper, perturbed images are not clipped to the pixel
range.

Writes results.json, results.md, digits.json, figures and each net's weights to --out. After an
interruption at any moment, the same command resumes. With --holdout 10000 the nets are trained on
50,000 images and scored on the other 10,000. The settings of Table 1 and, for LeNet, the sizes of
LWA's and LWA_Rep's perturbations were chosen in this way; the test images are used only for the
reported figures, for which the nets are trained on all 60,000 images.

Beyond the paper, --methods takes lwa_noisy, lwa_multi and trades: adversarial training for
robustness to iterated attacks, by one step from a random start, by several steps, and by TRADES.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, from anywhere

import jax
import numpy as np
import tyro
from rich.console import Console

from experiments.lib import (
    figures,
    options,
    paper,
    parallel,
    tables,
    tasks,
    train_and_score,
)
from experiments.lib.options import OutputFolder, Several
from experiments.lib.recipes import NAMES, Adversarial, Method, MethodName, MultiStep
from experiments.lib.records import TableRow
from experiments.lib.train_and_score import Images, Net
from jaxadv import evaluate, perturb

MLP_NOISY = MultiStep((500, 500), 80, 0.1, eps=2.0, steps=1, average=0.9995, shift=1)
MLP_MULTI = dataclasses.replace(MLP_NOISY, steps=5)
MLP_TRADES = dataclasses.replace(MLP_MULTI, objective="virtual", weight=6.0)
LENET_NOISY = dataclasses.replace(MLP_NOISY, widths=(500,), epochs=30, lr=0.05, warmup=3)


@dataclasses.dataclass(frozen=True)
class Settings(train_and_score.Settings):
    """Train the classifiers of Table 1 or 2 on MNIST, attack them, and print the table."""

    network: Literal["mlp", "lenet"] = "mlp"
    """Two hidden layers (Table 1) or LeNet (Table 2), each with its own defaults."""
    quick: bool = False
    """Train for one epoch, score 1,000 images, and use another folder by default."""
    methods: Several[MethodName] = ("normal", "dropout", "goodfellow", "lwa", "lwa_rep")
    """Which rows of the table."""
    out: OutputFolder = Path("runs/mnist_mlp")
    """Where results, figures, weights and checkpoints go."""
    normal: Method = Method((100, 100), epochs=20, lr=0.1)
    dropout: Method = Method((200, 200), epochs=30, lr=0.05, dropout=0.5)
    # The sign direction rescaled to an l2 size, as in the authors' code.
    goodfellow: Adversarial = Adversarial(
        (500, 500), epochs=20, lr=0.1, objective="mixed", adversary="loss_sign"
    )
    lwa: Adversarial = Adversarial((500, 500), epochs=30, lr=0.1, eps=1.7)
    lwa_rep: Adversarial = Adversarial(
        (200, 500), epochs=20, lr=0.05, objective="representation", eps=0.12, warmup=10
    )
    lwa_noisy: MultiStep = MLP_NOISY
    lwa_multi: MultiStep = MLP_MULTI
    trades: MultiStep = MLP_TRADES


MLP = Settings()
LENET = Settings(
    network="lenet",
    eval_batch=100,
    out=Path("runs/mnist_lenet"),
    normal=Method((500,), epochs=20, lr=0.05),
    dropout=Method((500,), epochs=20, lr=0.05, dropout=0.5),
    goodfellow=Adversarial(
        (500,), epochs=20, lr=0.05, dropout=0.5, objective="mixed", adversary="loss_sign"
    ),
    lwa=Adversarial((500,), epochs=25, lr=0.05, dropout=0.5, eps=1.3),
    lwa_rep=Adversarial(
        (500,), epochs=20, lr=0.05, objective="representation", eps=0.06, warmup=10
    ),
    lwa_noisy=LENET_NOISY,
    lwa_multi=dataclasses.replace(LENET_NOISY, steps=4),
    trades=dataclasses.replace(LENET_NOISY, objective="virtual", steps=4, weight=6.0),
)


def run(settings: Settings, console: Console) -> list[TableRow]:
    """Train, attack and score; return the rows of the table."""
    task = tasks.mnist(settings, settings.network, settings.normal)
    rows, nets = train_and_score.run(settings, task, console)
    images = Images(*(part[: settings.eval_batch] for part in task.test))
    digits = {name: _digits(net, images, settings.eps[0]) for name, net in nets.items()}
    if parallel.first_process():
        figures.save_digits(
            settings.out / "digits.json", task.test.x[:8], task.test.y[:8], digits, settings.eps[0]
        )
        figures.draw(settings.out)
    return rows


def _digits(net: Net, test: Images, eps: float) -> figures.Digits:
    """Return r, and the predictions without and with it, for the first eight images."""
    # Perturb a whole batch, of the size that this was compiled for when the net was scored.
    r = evaluate.attack_and_score(
        net.apply_fn, net.params, *test, perturb.alpha, eps=eps, batch_size=len(test.y)
    ).r[:8]
    x = np.asarray(test.x[:8])
    before, after = (
        np.asarray(jax.jit(net.apply_fn)(net.params, z)).argmax(-1) for z in (x, x + r)
    )
    return figures.Digits(r, before, after)


def defaults(arguments: list[str]) -> Settings:
    """Return the default settings for these arguments' --network and --quick."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--network", default="mlp")
    parser.add_argument("--quick", action="store_true")
    known, _ = parser.parse_known_args(arguments)
    chosen = LENET if known.network == "lenet" else MLP
    return train_and_score.shortened(chosen, NAMES, n_eval=1000) if known.quick else chosen


@options.command
def main() -> None:
    """Run the experiment from the command line."""
    settings = tyro.cli(Settings, default=defaults(sys.argv[1:]), description=__doc__)
    console = parallel.start(settings)
    rows = train_and_score.record(settings.out, run(settings, console))
    which = "images held out of the training set" if settings.holdout else "test images"
    net = {"mlp": "two hidden layers", "lenet": "LeNet"}[settings.network]
    notes = [
        f"The Fixed set is made on a Normal net of seed {settings.fixed_seed}, whose own accuracy "
        f"on it is {tables.fixed_source(rows)}.",
        tables.pgd_note(rows, settings.pgd_steps),
        f"Trained on {60_000 - settings.holdout:,} images. {tables.seeds(rows, NAMES)}",
    ]
    title = f"MNIST, {net}: accuracy on {rows[0].n:,} {which}"
    table = rows[0].experiment
    sections = tables.by_size(rows, NAMES, paper.PRINTED[table], paper.PRINTED_EPS[table])
    tables.show(console, settings.out, title, rows, sections, notes)


if __name__ == "__main__":
    main()
