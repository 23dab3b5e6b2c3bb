"""The board: recorded nets under AutoAttack, next to the (optimistic) one-step figures.

    python experiments/board.py mnist_mlp                     # hours on 2 CPU cores
    python experiments/board.py mnist_lenet --methods lwa     # one net
    python experiments/board.py cifar10 --image-folder DIR
    python experiments/board.py --help                        # every setting

Takes the weights in experiments/results/RECORD/METHOD and attacks them within the pixel range, at
several sizes and norms: by one step (Adv_Loss), by PGD of 100 steps (from x, then from 9 random
points) and by AutoAttack. As with `evaluate.py`, each batch of images is saved, and the same
command resumes where it was interrupted. `check` lists reasons to doubt the figures.

Writes results.json and results.md to --out; one folder can hold all three records.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Annotated, Literal, cast, get_args

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, from anywhere

import tyro
from rich.console import Console

from experiments.lib import attack_tables, evaluation, options, parallel, problems, tables
from experiments.lib.attack_tables import NETS
from experiments.lib.options import Checked, Count, OutputFolder, Several, distinct
from experiments.lib.records import RESULTS, AttackRow
from jaxadv.types import Norm

Record = Literal["mnist_mlp", "mnist_lenet", "cifar10"]
Shown = Literal["one-step", "pgd-100x10", "standard", "check"]
SHOWN: tuple[Shown, ...] = get_args(Shown)
Threat = Literal["l2 0.25", "l2 0.5", "l2 1.0", "l2 1.5", "l2 2.0", "linf 0.3"]
THREATS: dict[Record, tuple[Threat, ...]] = {
    "mnist_mlp": ("l2 1.5", "l2 1.0", "l2 2.0", "linf 0.3"),
    "mnist_lenet": ("l2 1.5", "l2 1.0", "l2 2.0", "linf 0.3"),
    "cifar10": ("l2 0.5", "l2 0.25"),
}


@dataclasses.dataclass(frozen=True)
class Settings(Checked):
    """Attack a record's nets in every way, and rank them."""

    record: Annotated[Record, tyro.conf.Positional]
    """Whose nets to attack."""
    methods: Annotated[tuple[str, ...], distinct] = ()
    """Which of its nets; all of them by default."""
    threats: Annotated[tuple[Threat, ...], distinct] = ()
    """Norms and sizes. By default l2 1.5, 1.0 and 2.0 and linf 0.3 for MNIST, and the sizes of
    Table 3 for CIFAR-10."""
    n: Count = 1000
    """How many test images."""
    attacks: Several[Shown] = SHOWN
    """What to run."""
    image_folder: Path | None = None
    """Read CIFAR-10 from here, DIR/{train,test}/CLASS/*, instead of downloading it."""
    folder: Path = RESULTS
    """Where the records are."""
    out: OutputFolder = Path("runs/board")
    """Where results go."""

    def __post_init__(self) -> None:
        """Check that a folder of images is given only for CIFAR-10.

        Raises:
          UsageError: if it is given for another record.
        """
        super().__post_init__()
        if self.image_folder is not None and self.record != "cifar10":
            raise options.UsageError(
                f"expected --image-folder only with the record cifar10, got {self.record}, whose "
                "images come with the repository; leave the option out"
            )


def run(settings: Settings, console: Console) -> list[AttackRow]:
    """Attack each net in every way; return the rows of this and of earlier runs.

    Raises:
      UsageError: if there are no nets, or a chosen one doesn't exist.
    """
    record = settings.folder / settings.record
    methods = settings.methods or tuple(
        name for name in NETS if (record / name / "params.safetensors").is_file()
    )
    if not methods:
        raise options.UsageError(
            f"expected nets of --folder as {record}/METHOD/params.safetensors, got none; "
            "train some first"
        )
    missing = [name for name in methods if not (record / name / "params.safetensors").is_file()]
    if missing:
        raise options.UsageError(
            f"expected --methods to be nets in {record}, got {', '.join(missing)}, which don't "
            "exist there; train them first, or leave them out"
        )
    rows: list[AttackRow] = []
    for threat in settings.threats or THREATS[settings.record]:
        norm, eps = threat.split()
        for method in methods:
            rows = evaluation.run(
                evaluation.Settings(
                    net=str(record / method / "params.safetensors"),
                    name=f"{settings.record}/{method}",
                    attacks=settings.attacks,
                    eps=(float(eps),),
                    norm=cast(Norm, norm),
                    n=settings.n,
                    out=settings.out,
                    **problems.images_of(settings.record, settings.image_folder),
                ),
                console,
            )
    return rows


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
        *attack_tables.ranked(run(settings, console)),
    ]
    tables.write(settings.out, lines, console)


if __name__ == "__main__":
    main()
