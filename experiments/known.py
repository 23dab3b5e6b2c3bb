"""The smallest perturbations of two nets with published figures: an independent check.

    pip install -e ".[bench]"
    git clone https://github.com/BorealisAI/advertorch
    python experiments/known.py advertorch/advertorch_examples/trained_models

advertorch ships two LeNets for MNIST, one trained normally and one adversarially, by PGD in linf.
For each it publishes the median l2 sizes of DDN's and FAB's perturbations: 1.388 and 1.423 for the
first net, 1.872 and 3.04 for the second. The second net masks its gradients, hence the gap between
the two attacks; `evaluate.check` should report it.

Reads mnist_lenet5_clntrained.pt and mnist_lenet5_advtrained.pt with PyTorch. Writes results.json
and results.md to --out.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Annotated, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, from anywhere

import jax
import numpy as np
import tyro
from rich.console import Console

from experiments.compare import pytorch
from experiments.lib import data, models, options, problems, records, tables
from experiments.lib.options import Checked, Count, OutputFolder, Seed, Size
from experiments.lib.records import KnownRow
from jaxadv import attack, evaluate
from jaxadv.types import Params, PerturbFn

BOX = (0.0, 1.0)


class Published(NamedTuple):
    """A net's accuracy and the median l2 sizes of two attacks in advertorch's benchmarks."""

    clean: float
    ddn: float
    fab: float


NETS: Mapping[str, Published] = {
    "clntrained": Published(0.9889, 1.388, 1.423),
    "advtrained": Published(0.9864, 1.872, 3.04),
}


@dataclasses.dataclass(frozen=True)
class Settings(Checked):
    """Find the smallest perturbations of advertorch's nets."""

    folder: Annotated[Path, tyro.conf.Positional]
    """Folder of the two files of weights."""
    n: Count = 1000
    """Images attacked: the first n that the net classifies correctly."""
    steps: Count = 1000
    """Steps of DDN and FMN; the default is that of the published DDN."""
    check_eps: Size = 1.5
    """l2 size for `evaluate.check`."""
    n_check: Count = 300
    """Images for `evaluate.check`."""
    seed: Seed = 0
    """Seed of `evaluate.check`."""
    out: OutputFolder = Path("runs/known")
    """Where results go."""


def load(path: Path) -> Params:
    """Return the parameters of an advertorch LeNet5, for a net of `models`.

    Raises:
      UnavailableError: if PyTorch isn't installed.
      UsageError: if there is no such file.
    """
    pytorch.need("torch")
    if not path.is_file():
        raise options.UsageError(
            f"expected advertorch's weights, got no {path}; the first lines of --help show where "
            "to get them"
        )
    import torch

    state = torch.load(path, map_location="cpu", weights_only=True)
    return pytorch.params_of({name: tensor.numpy() for name, tensor in state.items()})


@cache
def minimal(steps: int) -> Mapping[str, PerturbFn]:
    """Return the attacks; the same objects each time, so that they compile once."""
    return {
        "DDN": partial(attack.ddn, steps=steps),
        "FMN": partial(attack.fmn, steps=steps),
        "FAB, targeted": attack.fab,
        "DeepFool": attack.deepfool,
    }


def measure(name: str, params: Params, settings: Settings, console: Console) -> KnownRow:
    """Attack and check a net of advertorch; return its row."""
    mnist = data.mnist()
    pixels = np.asarray(mnist.test_images, np.float32) / 255
    labels = np.asarray(mnist.test_labels)
    net = models.recognised(params, pixels.shape[1:])
    apply_fn = models.function(net)
    clean = evaluate.score(apply_fn, params, pixels, labels).clean
    chosen = np.flatnonzero(clean)[: settings.n]
    x, y = pixels[chosen], labels[chosen]
    medians, seconds = {}, {}
    least = np.full(len(y), np.inf)
    for attack_name, method in minimal(settings.steps).items():
        start = time.perf_counter()
        # No eps: given one, FAB stops at the first r of that size.
        outcome = evaluate.attack_and_score(
            apply_fn, params, x, y, method, eps=None, bounds=BOX
        ).outcome
        size = np.where(outcome.robust, np.inf, outcome.norm.astype(np.float64))
        least = np.minimum(least, size)
        medians[attack_name] = float(np.median(size))
        seconds[attack_name] = round(time.perf_counter() - start, 1)
        console.print(f"{name}, {attack_name}: {medians[attack_name]:.3f}")
    medians["the best"] = float(np.median(least))
    few = slice(settings.n_check)
    found = evaluate.check(
        apply_fn, params, x[few], y[few], eps=settings.check_eps,
        key=jax.random.key(settings.seed), bounds=BOX,
    )  # fmt: skip
    return KnownRow(
        experiment="known",
        net=name,
        network=models.describe(net),
        weights=problems.digest(params),
        published=NETS[name]._asdict(),
        clean=evaluate.accuracy(clean),
        median_l2=medians,
        seconds=seconds,
        flags=tables.messages(found.flags),
        figures=dict(found.figures),
        n=len(chosen),
        seed=settings.seed,
        settings=settings.without("folder", "out"),
        **records.made_by(),
    )


def run(settings: Settings, console: Console) -> list[KnownRow]:
    """Attack and check both nets; return a row for each."""
    nets = {name: load(settings.folder / f"mnist_lenet5_{name}.pt") for name in NETS}
    rows = [measure(name, params, settings, console) for name, params in nets.items()]
    tables.save(settings.out, rows, as_markdown(rows), console)
    return rows


def as_markdown(rows: Sequence[KnownRow]) -> list[str]:
    """Return the rows as a table, with the flags of the checks."""
    first = rows[0]
    headings = (
        "Net", "Clean, published", "ours", "DDN, published", "FAB, published", *first.median_l2,
    )  # fmt: skip
    cells = []
    for row in rows:
        published = Published(**row.published)
        medians = (f"{size:.3f}" for size in row.median_l2.values())
        cells.append([
            row.net, f"{published.clean:.4f}", f"{row.clean:.4f}", published.ddn, published.fab,
            *medians,
        ])  # fmt: skip
    return [
        "# Smallest perturbations of advertorch's nets",
        "",
        "Accuracy on the 10,000 test images, and the median l2 size of the perturbations of "
        f"{first.n:,} correctly classified images, by each attack and by the best for each image.",
        "",
        *tables.markdown(headings, cells),
        "",
        *(f"- {row.net}: {tables.doubts(row.flags)}" for row in rows),
        "",
        f"Seed {first.seed}, {tables.machines([first])}.",
        "",
    ]


@options.command
def main() -> None:
    """Run from the command line."""
    run(tyro.cli(Settings, description=__doc__), Console())


if __name__ == "__main__":
    main()
