"""What Adv_Alpha loses when it looks only at the likeliest classes (`perturb.alpha(candidates=)`).

    python experiments/candidates.py

Two nets: the LWA net of Table 1's record on the test images of MNIST, 10 classes; and one of 1,000
classes, trained here, that reads three digits side by side as a number from 0 to 999. For each
number of candidates: how often the least perturbation belongs to another class than with all of
them, how much longer it is then, and what accuracy a step of a fixed size leaves.

Writes results.json and results.md to --out.
"""

from __future__ import annotations

import dataclasses
import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, from anywhere

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from numpy.typing import NDArray
from rich.console import Console

from experiments.lib import data, models, options, problems, records, tables
from experiments.lib.options import Checked, Count, OutputFolder, Range, Seed, Several, Size
from jaxadv import objectives, perturb, train
from jaxadv.types import ApplyFn, Params


@dataclasses.dataclass(frozen=True)
class Settings(Checked):
    """Measure what fewer candidates cost in strength."""

    few: Several[Annotated[int, Range(ge=1, le=9)]] = (1, 2, 3, 5)
    """Candidates out of 10 classes."""
    many: Several[Annotated[int, Range(ge=1, le=999)]] = (1, 5, 10, 20)
    """Candidates out of 1,000 classes."""
    n: Count = 1000
    """Test images."""
    steps: Count = 10000
    """Training steps of the net of 1,000 classes."""
    eps: Size = 1.5
    """l2 size of the step."""
    seed: Seed = 0
    """Of the net of 1,000 classes and of its images."""
    out: OutputFolder = Path("runs/candidates")
    """Where results go."""


class Net(NamedTuple):
    """A net and the images it is attacked on."""

    name: str
    apply_fn: ApplyFn
    params: Params
    x: jax.Array
    y: jax.Array


def ten_classes(settings: Settings) -> Net:
    """Return the recorded net and the first test images."""
    problem = problems.recorded("mnist_mlp/lwa", settings.n)
    x, y = jnp.asarray(problem.x), jnp.asarray(problem.y)
    return Net("MNIST, 10 classes", problem.apply_fn, problem.params, x, y)


def numbers(
    rng: np.random.Generator, images: NDArray[np.float32], labels: NDArray[Any], n: int
) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    """Return n images `[n, 28, 84, 1]` of three random digits each, and their numbers."""
    chosen = rng.integers(0, len(images), (n, 3))
    y = labels[chosen] @ np.array([100, 10, 1])
    return np.concatenate([images[chosen[:, i]] for i in range(3)], axis=2), y.astype(np.int32)


def thousand_classes(settings: Settings) -> Net:
    """Train a net that reads three digits as one class of 1,000."""
    mnist = data.mnist()
    net = models.Classifier((1000, 1000), classes=1000)
    apply_fn = models.function(net)
    rng = np.random.default_rng(settings.seed)
    pixels, labels = data.MNIST.inputs(mnist.train_images), np.asarray(mnist.train_labels)
    key = jax.random.key(settings.seed)
    tx = optax.sgd(optax.cosine_decay_schedule(0.1, settings.steps), momentum=0.9)
    params = models.init(net, key, jnp.zeros((1, 28, 84, 1)))
    state = train.init(params, tx, key=key)
    step = train.make_step(objectives.natural(apply_fn), tx)
    for _ in range(settings.steps):
        state, _ = step(state, numbers(rng, pixels, labels, 100))
    tested = data.MNIST.inputs(mnist.test_images), np.asarray(mnist.test_labels)
    x, y = map(jnp.asarray, numbers(rng, *tested, settings.n))
    return Net("three digits of MNIST, 1,000 classes", apply_fn, state.params, x, y)


def sizes(r: jax.Array) -> NDArray[np.float64]:
    """Return the l2 size of each perturbation."""
    return np.linalg.norm(np.asarray(r, np.float64).reshape(len(r), -1), axis=1)


def compare(net: Net, candidates: tuple[int, ...], settings: Settings) -> list[dict[str, Any]]:
    """Return a row for each number of candidates, beside one for all classes."""

    def perturbed(n: int | None, eps: float | None) -> jax.Array:
        # By hundreds: a batch of all images has no place in a cache.
        method = jax.jit(partial(perturb.alpha, net.apply_fn, eps=eps, candidates=n))
        starts = range(0, len(net.x), 100)
        parts = [method(net.params, net.x[i : i + 100], net.y[i : i + 100]) for i in starts]
        return jnp.concatenate(parts)

    logits = net.apply_fn(net.params, net.x)
    right = np.asarray(logits.argmax(-1) == net.y)
    least = sizes(perturbed(None, None))
    rows = []
    for n in (*candidates, None):
        longer = sizes(perturbed(n, None))[right] / least[right]
        attacked = net.x + perturbed(n, settings.eps)
        left = np.asarray(net.apply_fn(net.params, attacked).argmax(-1) == net.y)
        rows.append(
            {
                "experiment": "candidates",
                "net": net.name,
                "candidates": n or logits.shape[1] - 1,
                "n": len(right),
                "clean": float(right.mean()),
                # The same class gives the same r: what differs by more than rounding is another.
                "another class": float((longer > 1 + 1e-4).mean()),
                "times longer, mean": float(longer.mean()),
                "times longer, 99th percentile": float(np.quantile(longer, 0.99)),
                f"accuracy at l2 {settings.eps:g}": float(left.mean()),
                "seed": settings.seed,
                **records.made_by(),
            }
        )
    return rows


def as_markdown(rows: list[dict[str, Any]]) -> list[str]:
    """Return the rows as a table."""
    kept = [key for key in rows[0] if key not in ("experiment", "seed", "versions", "device")]
    cells = [
        [f"{row[k]:.4g}" if isinstance(row[k], float) else row[k] for k in kept] for row in rows
    ]
    lines = ["# Adv_Alpha with only the likeliest classes", "", *tables.markdown(kept, cells)]
    device, versions = rows[0]["device"], rows[0]["versions"]
    return [*lines, "", f"Seed {rows[0]['seed']}, {device}, jax {versions['jax']}.", ""]


def run(settings: Settings, console: Console) -> list[dict[str, Any]]:
    """Compare on both nets; return the rows."""
    rows = compare(ten_classes(settings), settings.few, settings)
    rows += compare(thousand_classes(settings), settings.many, settings)
    settings.out.mkdir(parents=True, exist_ok=True)
    records.save(settings.out / "results.json", rows)
    tables.write(settings.out, as_markdown(rows), console)
    return rows


@options.command
def main() -> None:
    """Run from the command line."""
    run(tyro.cli(Settings, description=__doc__), Console())


if __name__ == "__main__":
    main()
