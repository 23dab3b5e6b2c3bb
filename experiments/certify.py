"""Certified and attacked accuracy: a lower and an upper bound for the same smoothed LeNet.

    python experiments/certify.py                                  # about two hours on 2 CPU cores
    python experiments/certify.py --methods gaussian both          # several ways of training
    python experiments/certify.py --holdout 2000 --every 4         # choose settings on other images

Trains LeNets on MNIST under Gaussian noise: plainly, with the consistency regularizer, against an
attack on the smoothed net (SmoothAdv), or both. Then certifies the smoothed classifier on every
fifth test image, and attacks it at the same sizes by APGD with gradients averaged over draws. An
image counts as broken if fresh draws at x + r reject its label. Images both certified and broken
are listed; expect at most a share alpha of them, and another alpha for each size attacked.

Everything is kept in --out, and the same command resumes an interrupted run. With other settings
for certification or attacks, the trained nets are measured again. Writes results.json, results.md,
certify.png (both bounds against size), METHOD-SEED.npz (the results for each image) and
METHOD-SEED.safetensors.
"""

from __future__ import annotations

import dataclasses
import itertools
import shutil
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, from anywhere

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax import lax
from numpy.typing import NDArray
from rich.console import Console

from experiments.lib import (
    data,
    evaluation,
    figures,
    models,
    options,
    parallel,
    recipes,
    records,
    tables,
    train_and_score,
    training,
)
from experiments.lib import weights as files
from experiments.lib.options import Count, OutputFolder, Positive, Seed, Several, Share, Size, Whole
from experiments.lib.records import CertifyRow
from jaxadv import attack, certify, evaluate, nets, objectives
from jaxadv.types import ApplyFn, Objective, Params, Schedule

Way = Literal["gaussian", "consistency", "smooth_adv", "both"]
WAYS: dict[str, str] = {
    "gaussian": "Gaussian noise",
    "consistency": "Consistency",
    "smooth_adv": "SmoothAdv",
    "both": "SmoothAdv and consistency",
}
BOX = (0.0, 1.0)
SAMPLER = "Gaussian rounded to multiples of a power of 2, by an alias table; threefry"
POINTS = 200
"""Number of sizes at which the curve is recorded."""
MEASURING = (
    *("radii", "every", "alpha", "n0", "stages", "eval_batch"),
    *("attack_steps", "attack_samples", "attack_draws"),
)
"""The settings that a net doesn't depend on, so that it can be measured again with others."""


@dataclasses.dataclass(frozen=True)
class Settings(recipes.Optimiser):
    """Train LeNets under noise, certify and attack them, and print a table."""

    methods: Several[Way] = ("both",)
    """How to train the nets."""
    seeds: Several[Seed] = (0,)
    """One net for each seed."""
    sigma: Positive = 0.5
    """Standard deviation of the noise, in training and afterwards."""
    radii: Several[Positive] = (0.5, 1.0, 1.5)
    """l2 sizes to certify and attack at."""
    copies: Count = 2
    """Noisy copies of each image in training (except `gaussian`), and draws of its attack."""
    consistency: Size = 1.0
    """Weight of the divergences, for `both` and `consistency`; its authors use 5 by itself."""
    entropy: Size = 0.5
    """Weight of the mean prediction's entropy, for the same two."""
    train_eps: Positive = 1.25
    """Size of the training perturbations, for `smooth_adv` and `both`."""
    train_steps: Count = 2
    """Steps of their attack."""
    warmup: Whole = 3
    """Epochs over which the size of the perturbations rises from 0."""
    widths: tuple[Count, ...] = (500,)
    """Sizes of the hidden dense layers."""
    epochs: Count = 26
    """Passes over the training images."""
    lr: Positive = 0.02
    """Peak learning rate, decayed to 0 along a cosine. Much higher rates leave dead units."""
    lr_warmup: Whole = 1
    """Epochs over which the learning rate rises from 0."""
    average: Share = 0.999
    """Decay of the moving average of the weights, which is what gets certified."""
    shift: Whole = 0
    """Largest random shift of training images, in pixels."""
    batch_size: Count = 100
    """Images per training step."""
    holdout: Whole = 0
    """Training images to hold out, and to certify instead of the test images."""
    every: Count = 5
    """Certify every image whose index is a multiple of this."""
    alpha: Positive = 0.001
    """Probability of a wrong certificate, for each image."""
    n0: Count = 100
    """Draws that choose the class."""
    stages: Several[Count] = certify.STAGES
    """Numbers of further draws at the looks, ascending; see `certify.certify`."""
    attack_steps: Count = 50
    """Steps of APGD."""
    attack_samples: Count = 20
    """Draws that each of its gradients is averaged over."""
    attack_draws: Count = 10_000
    """Draws that decide whether it has succeeded."""
    eval_batch: Count = 500
    """Noisy images per forward pass in certification."""
    out: OutputFolder = Path("runs/certify")
    """Where results go."""

    def __post_init__(self) -> None:
        """Check the settings of training.

        Raises:
          UsageError: if the perturbations would grow for longer than training takes, or a
            divergence between copies would have only one.
        """
        super().__post_init__()
        if self.warmup > self.epochs:
            raise options.UsageError(
                f"expected --warmup to be at most {self.epochs}, the number of epochs, got "
                f"{self.warmup}; lower it, or train longer"
            )
        if self.copies < 2 and self.consistency and {"consistency", "both"} & {*self.methods}:
            raise options.UsageError(
                "expected --copies to be at least 2, got 1; a divergence between copies needs "
                "several: raise it, or leave the divergence out with --consistency 0"
            )


def objective_of(
    way: Way, settings: Settings, apply_fn: ApplyFn, eps: Schedule | float
) -> Objective:
    """Return the training objective of a way."""
    regularized = way in ("consistency", "both")
    noisy = objectives.noisy(
        apply_fn,
        sigma=settings.sigma,
        copies=1 if way == "gaussian" else settings.copies,
        consistency=settings.consistency if regularized else 0,
        entropy=settings.entropy if regularized else 0,
    )
    if way in ("gaussian", "consistency"):
        return noisy
    net = certify.smooth(apply_fn, settings.sigma)

    # `objectives.adversarial` is enough for `smooth_adv` (see docs/certify.md), not for `both`.
    def perturbed(
        params: Params, model_state: Any, batch: Any, /, *, key: jax.Array, step: jax.Array
    ) -> Any:
        x, y = batch
        attack_key, key = jax.random.split(key)
        r = attack.pgd(
            net, lax.stop_gradient(params), x, y, eps=eps(step) if callable(eps) else eps,
            steps=settings.train_steps, samples=settings.copies, key=attack_key, bounds=BOX,
            keep="last",
        )  # fmt: skip
        moved = x + lax.stop_gradient(r)
        return noisy(params, model_state, (moved, y), key=key, step=step)

    return perturbed


def train(
    way: Way, seed: int, settings: Settings, images: tuple[Any, Any], console: Console
) -> tuple[ApplyFn, Params, float]:
    """Train a net; return it, its parameters, and the seconds that training took."""
    method = recipes.Robust(
        settings.widths, settings.epochs, settings.lr, average=settings.average,
        eps=settings.train_eps, warmup=settings.warmup, shift=settings.shift,
    )  # fmt: skip
    recipes.check("training", method, lr_warmup=settings.lr_warmup)
    net = models.lenet(method.widths)
    apply_fn = models.function(net)
    epoch_steps = len(images[1]) // settings.batch_size
    eps = recipes.rising(method.eps, method.warmup * epoch_steps)
    objective = objective_of(way, settings, apply_fn, eps)
    if settings.shift:
        objective = recipes.augmented(objective, recipes.shifted(settings.shift))
    init_key, key = jax.random.split(jax.random.key(seed))
    with training.bars(console) as progress:
        fitted = training.fit(
            objective,
            recipes.optimiser(method, epoch_steps, settings),
            models.init(net, init_key, images[0][:1]),
            images,
            epochs=settings.epochs,
            batch_size=settings.batch_size,
            key=key,
            directory=settings.out / "checkpoints" / f"{way}-{seed}",
            settings=_plain(settings, *MEASURING),
            progress=progress,
            name=WAYS[way],
        )
    return apply_fn, recipes.result(method, fitted.state), fitted.seconds


def _plain(settings: Settings, *others: str) -> dict[str, Any]:
    """Return all settings except the method, the seed and the named ones, in JSON's types."""
    kept = settings.without("methods", "seeds", "out", *others)
    return {name: list(v) if isinstance(v, tuple) else v for name, v in kept.items()}


def store_of(way: Way, seed: int, settings: Settings) -> Path:
    """Return the folder for a net's finished batches."""
    identity = {"net": f"{way}-{seed}", **_plain(settings), **records.made_by()}
    return evaluation.store_of(settings.out, identity)


def measure(
    way: Way,
    seed: int,
    settings: Settings,
    images: tuple[Any, Any],
    tested: tuple[NDArray[Any], NDArray[Any]],
    rows: NDArray[np.intp],
    console: Console,
) -> CertifyRow:
    """Train a net, certify it, and attack it."""
    x, y = tested
    name, sigma, alpha = f"{way}-{seed}", settings.sigma, settings.alpha
    folder = store_of(way, seed, settings)
    certify_key, *keys = jax.random.split(jax.random.key(seed), 2 + 2 * len(settings.radii))
    certified = partial(
        certify.certify, sigma=sigma, radii=settings.radii, alpha=alpha, n0=settings.n0,
        stages=settings.stages, key=certify_key, batch_size=settings.eval_batch,
    )  # fmt: skip
    try:  # on no images, to refuse unusable settings before training
        certified(lambda _, x: x.reshape(len(x), -1), None, x[:0])
    except ValueError as error:
        raise options.UsageError(str(error)) from error
    apply_fn, params, train_seconds = train(way, seed, settings, images, console)
    files.save(settings.out / f"{name}.safetensors", params, interface=data.MNIST)
    start = time.perf_counter()
    found = certified(apply_fn, params, x, y, store=folder / "certify")
    seconds = time.perf_counter() - start
    right = (found.label == y) & ~found.abstained

    def certified_at(size: float) -> float:
        return evaluate.accuracy(right & (found.radius >= size))

    columns = {"clean": evaluate.accuracy(found.prediction == y)}
    columns |= {f"certified@{size:g}": certified_at(size) for size in settings.radii}
    eps = np.linspace(0, max(settings.radii), POINTS)
    console.print(f"{name}: {columns}, {seconds:.0f} s")

    start = time.perf_counter()
    net: Any = certify.smooth(apply_fn, sigma)
    mean = nets.mean_of_draws(net, keys.pop())
    method = partial(attack.apgd, steps=settings.attack_steps, samples=settings.attack_samples)
    broken = np.zeros((len(settings.radii), len(y)), bool)
    before, both = np.zeros(len(y), bool), {}
    for i, size in sorted(enumerate(settings.radii), key=lambda pair: pair[1]):
        r = evaluate.attack_and_score(
            mean, params, x, y, method, eps=size, key=keys.pop(), bounds=BOX, source=(net, params),
            batch_size=100, store=folder / f"attack-{size:g}",
        ).r  # fmt: skip
        moved = certify.predict(
            apply_fn, params, x + r, sigma=sigma, alpha=alpha, n=settings.attack_draws,
            key=keys.pop(), batch_size=settings.eval_batch, store=folder / f"predict-{size:g}",
        )  # fmt: skip
        # Images broken within a smaller ball are broken within this one.
        before = broken[i] = before | ((moved.label != y) & ~moved.abstained)
        columns[f"attacked@{size:g}"] = evaluate.accuracy(~before)
        at_once = before & right & (found.radius >= size)
        both[f"{size:g}"] = rows[at_once].tolist()
        console.print(f"{name}: {columns[f'attacked@{size:g}']:.4f} attacked at {size:g}")
    attack_seconds = time.perf_counter() - start
    np.savez_compressed(
        settings.out / f"{name}.npz",
        image=rows, label=found.label, samples=found.samples, lower=found.lower,
        count=np.take_along_axis(found.counts, found.label[:, None], axis=1)[:, 0],
        radius=found.radius, sizes=np.array(settings.radii), broken=broken,
    )  # fmt: skip
    return CertifyRow(
        experiment="certify", network=models.describe(models.lenet(settings.widths)),
        method=way, sigma=sigma, alpha=alpha, n=len(y), samples=int(found.samples.sum()),
        seed=seed, columns=columns,
        curve={"eps": eps.tolist(), "certified": [certified_at(size) for size in eps]},
        abstained=int(found.abstained.sum()), both=both,
        n0=settings.n0, stages=list(settings.stages), sampler=SAMPLER,
        train_seconds=round(train_seconds, 1),
        seconds=round(seconds, 1), attack_seconds=round(attack_seconds, 1),
        settings=_plain(settings), **records.made_by(),
    )  # fmt: skip


def run(settings: Settings, console: Console) -> list[CertifyRow]:
    """Measure each net; return the rows of this and of earlier runs."""
    settings.out.mkdir(parents=True, exist_ok=True)
    images = data.mnist()
    (train_x, train_y), (x, y) = train_and_score.parts(settings.holdout, images)
    rows = np.arange(0, len(y), settings.every)
    trained = jnp.asarray(data.MNIST.inputs(train_x)), jnp.asarray(train_y)
    tested = np.asarray(data.MNIST.inputs(x[rows])), np.asarray(y[rows])
    results = settings.out / "results.json"
    for way, seed in itertools.product(settings.methods, settings.seeds):
        identity = {"method": way, "seed": seed, "settings": _plain(settings)}
        made = partial(measure, way, seed, settings, trained, tested, rows, console)
        records.find_or_run(
            results, CertifyRow, {**identity, **records.made_by()}, made,
            place=("method", "seed"),
        )  # fmt: skip
        # Not those of other runs, which may be going on.
        shutil.rmtree(store_of(way, seed, settings), ignore_errors=True)
    figures.draw(settings.out)
    return records.load(results, CertifyRow)


def as_markdown(rows: Sequence[CertifyRow]) -> list[str]:
    """Return a table with a line for each net."""
    names = list(dict.fromkeys(name for row in rows for name in row.columns))
    sizes = list(dict.fromkeys(name.partition("@")[2] for name in names if "@" in name))
    bounds = [f"{kind}@{size}" for size in sizes for kind in ("certified", "attacked")]
    cells = [
        [
            WAYS[row.method], f"{row.sigma:g}", row.seed, row.n,
            *(f"{row.columns[c]:.4f}" if c in row.columns else "" for c in ("clean", *bounds)),
            len(set().union(*row.both.values())), f"{row.samples / row.n:,.0f}",
            f"{row.train_seconds / 60:.0f}", f"{row.seconds / 60:.0f}",
        ]
        for row in rows
    ]  # fmt: skip
    heading = ("Training", "Sigma", "Seed", "Images", "Clean", *bounds)
    alphas = " or ".join(f"{alpha:g}" for alpha in dict.fromkeys(row.alpha for row in rows))
    return [
        "# Certified and attacked accuracy of smoothed LeNets on MNIST",
        "",
        "Accuracy of the smoothed classifier at the same l2 sizes: certified (a lower bound) and "
        f"attacked (an upper bound), with alpha {alphas} for each image. Both: number of images "
        "both certified and broken at the same size. Draws: mean number per image. Training and "
        "Certifying: minutes.",
        "",
        *tables.markdown((*heading, "Both", "Draws", "Training", "Certifying"), cells),
        "",
        f"{tables.machines(rows)}.",
        "",
        "![Certified and attacked accuracy against size](certify.png)",
        "",
        "An image broken at one size is broken at every larger one, so the upper bound falls in "
        "steps. Draws stop once the sizes of the table are decided: elsewhere the line is still a "
        "lower bound, but more draws would raise it.",
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
