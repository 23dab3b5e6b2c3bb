"""Least perturbations of two nets whose figures others have published: a check from outside.

    pip install -e ".[bench]"
    git clone https://github.com/BorealisAI/advertorch
    python experiments/known.py advertorch/advertorch_examples/trained_models

advertorch ships a LeNet trained on MNIST as it is and one trained against PGD in linf, with the
median l2 sizes that attacks need for half of the images: by DDN and by FAB 1.388 and 1.423 for the
first, 1.872 and 3.04 for the second. That the last two are so far apart shows that the
second net's gradients mislead attacks; `evaluate.check` should say so.

Reads mnist_lenet5_clntrained.pt and mnist_lenet5_advtrained.pt with PyTorch. Writes results.json
and results.md to --out.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Mapping
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, from anywhere

import jax
import numpy as np
import tyro
from rich.console import Console

from experiments.compare import pytorch
from experiments.lib import data, models, options, problems, records, tables
from experiments.lib.options import Checked, Count, OutputFolder, Seed, Size
from jaxadv import attack
from jaxadv import evaluate as measure
from jaxadv.types import Params, PerturbFn

BOX = (0.0, 1.0)


class Published(NamedTuple):
    """What advertorch's benchmarks print of a net."""

    clean: float
    ddn: float
    fab: float


NETS: Mapping[str, Published] = {
    "clntrained": Published(0.9889, 1.388, 1.423),
    "advtrained": Published(0.9864, 1.872, 3.04),
}


@dataclasses.dataclass(frozen=True)
class Settings(Checked):
    """Find least perturbations of advertorch's nets."""

    folder: Annotated[Path, tyro.conf.Positional]
    """Where the two files of weights are."""
    n: Count = 1000
    """How many images: the first that the net has right."""
    steps: Count = 1000
    """Of FMN, as many as DDN had."""
    check_eps: Size = 1.5
    """The l2 size at which the net is checked."""
    n_check: Count = 300
    """On how many images."""
    seed: Seed = 0
    """Of what is drawn."""
    out: OutputFolder = Path("runs/known")
    """Where results go."""


def load(path: Path) -> Params:
    """Return a LeNet5 of advertorch as the parameters of a net of `models`.

    Raises:
      ModuleNotFoundError: if PyTorch isn't installed.
      UsageError: if there is no such file.
    """
    pytorch.need("torch")
    if not path.is_file():
        raise options.UsageError(
            f"expected advertorch's weights, got no {path}; the first lines of --help say where "
            "they are from"
        )
    import torch

    state = torch.load(path, map_location="cpu", weights_only=True)
    return pytorch.params_of({name: tensor.numpy() for name, tensor in state.items()})


@cache
def minimal(steps: int) -> Mapping[str, PerturbFn]:
    """Return the attacks; the same objects each time, so that they are compiled once."""
    return {
        "FMN": partial(attack.fmn, steps=steps),
        "FAB, targeted": attack.fab,
        "DeepFool": attack.deepfool,
    }


def run(settings: Settings, console: Console) -> list[dict[str, Any]]:
    """Attack and check both nets; return a row for each."""
    weights = {name: load(settings.folder / f"mnist_lenet5_{name}.pt") for name in NETS}
    mnist = data.mnist()
    pixels = np.asarray(mnist.test_images, np.float32) / 255
    labels = np.asarray(mnist.test_labels)
    rows: list[dict[str, Any]] = []
    for name, published in NETS.items():
        params = weights[name]
        net = models.recognised(params, pixels.shape[1:])
        apply_fn = models.function(net)
        right = measure.score(apply_fn, params, pixels, labels).clean
        chosen = np.flatnonzero(right)[: settings.n]
        x, y = pixels[chosen], labels[chosen]
        key = jax.random.key(settings.seed)
        medians, seconds = {}, {}
        least = np.full(len(y), np.inf)
        for attack_name, method in minimal(settings.steps).items():
            start = time.perf_counter()
            # Without a size: with one, FAB ends at the first r that fits.
            outcome = measure.attack_and_score(
                apply_fn, params, x, y, method, eps=None, bounds=BOX
            ).outcome
            size = np.where(outcome.robust, np.inf, outcome.norm)
            least = np.minimum(least, size)
            medians[attack_name] = float(np.median(size))
            seconds[attack_name] = round(time.perf_counter() - start, 1)
            console.print(f"{name}, {attack_name}: {medians[attack_name]:.3f}")
        medians["the best"] = float(np.median(least))
        few = slice(settings.n_check)
        found = measure.check(
            apply_fn, params, x[few], y[few], eps=settings.check_eps, key=key, bounds=BOX
        )
        rows.append(
            {
                "experiment": "known",
                "net": name,
                "network": models.describe(net),
                "weights": problems.digest(params),
                "published": published._asdict(),
                "clean": measure.accuracy(right),
                "median l2": medians,
                "seconds": seconds,
                "flags": {flag.name: flag.message for flag in found.flags},
                "figures": found.figures,
                "n": len(chosen),
                "seed": settings.seed,
                "settings": {
                    key: value
                    for key, value in dataclasses.asdict(settings).items()
                    if key not in ("folder", "out")
                },
                **records.made_by(),
            }
        )
    settings.out.mkdir(parents=True, exist_ok=True)
    records.save(settings.out / "results.json", rows)
    tables.write(settings.out, as_markdown(rows), console)
    return rows


def as_markdown(rows: list[dict[str, Any]]) -> list[str]:
    """Return the rows as a table, with what the checks say."""
    attacks = list(rows[0]["median l2"])
    headings = ["Net", "Clean, published", "ours", "DDN, published", "FAB, published", *attacks]
    cells = []
    for row in rows:
        printed = Published(**row["published"])
        found = (f"{row['median l2'][name]:.3f}" for name in attacks)
        cells.append([
            row["net"], f"{printed.clean:.4f}", f"{row['clean']:.4f}", printed.ddn, printed.fab,
            *found,
        ])  # fmt: skip
    lines = [
        "# Least perturbations of advertorch's nets",
        "",
        "Accuracy on the 10,000 test images, and the l2 size that misleads the net about half of "
        f"{rows[0]['n']:,} images that it has right, by each attack and by the best.",
        "",
        *tables.markdown(headings, cells),
        "",
    ]
    for row in rows:
        lines.append(
            f"- {row['net']}: {'; '.join(row['flags'].values()) or 'nothing to doubt was found'}"
        )
    device, versions = rows[0]["device"], rows[0]["versions"]
    return [*lines, "", f"Seed {rows[0]['seed']}, {device}, jax {versions['jax']}.", ""]


@options.command
def main() -> None:
    """Run from the command line."""
    run(tyro.cli(Settings, description=__doc__), Console())


if __name__ == "__main__":
    main()
