r"""AutoAttack in its authors' implementation, on the same nets and images: an independent check.

    python -m venv reference
    reference/bin/pip install -e '.[experiments]' -c constraints.txt torch
    reference/bin/pip install \
        "git+https://github.com/fra31/auto-attack@a39220048b3c9f2cca9a4d3a54604793c68eca7e"
    reference/bin/python experiments/reference.py \
        experiments/results/mnist_mlp/lwa/params.safetensors

Needs PyTorch and the authors' code; the project depends on neither. Each net is rebuilt in PyTorch
from its weights and must give the same logits as here. Each attack of the ensemble runs separately,
on all correctly classified images; `standard` is the ensemble, in which each attack runs on the
images that are still robust.

Writes rows to results.json in --out. The matching rows of ours are made by `evaluate`, with
`--attacks apgd-ce apgd-t fab-t square standard` and `--name`; `summary` compares the two.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, from anywhere

import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console

from experiments.compare import published, pytorch
from experiments.lib import evaluation, options, problems, records
from experiments.lib.options import Checked, Count, OutputFolder, Seed, Several, Size
from experiments.lib.records import AttackRow, PublishedRow

MemberName = Literal["apgd-ce", "apgd-t", "fab-t", "square", "standard"]
MEMBERS: tuple[MemberName, ...] = get_args(MemberName)


@dataclasses.dataclass(frozen=True)
class Settings(Checked):
    """Attack MNIST nets by the published AutoAttack."""

    net: Annotated[str, tyro.conf.Positional]
    """File of weights."""
    name: str = ""
    """What to call the net in the table; by default its file's folder."""
    attacks: Several[MemberName] = MEMBERS
    """Attacks to run."""
    eps: Several[Size] = (1.5,)
    """Sizes of the perturbations."""
    norm: Literal["l2", "linf"] = "l2"
    """Norm of the perturbations."""
    seed: Several[Seed] = (0,)
    """Random seeds: one run for each."""
    n: Count = 1000
    """How many test images."""
    batch_size: Count = 500
    """Images perturbed at once."""
    threads: Count = 2
    """Threads for PyTorch."""
    out: OutputFolder = Path("runs/reference")
    """Where results go."""

    def __post_init__(self) -> None:
        """Check that the net is a file.

        Raises:
          UsageError: if it is `module:function`, which can't be converted to PyTorch.
        """
        super().__post_init__()
        if ":" in self.net:
            raise options.UsageError(
                f"expected NET to be a file of weights, got {self.net}; for a function of your "
                "own, run AutoAttack yourself"
            )


def run(settings: Settings, console: Console) -> list[AttackRow]:
    """Run the chosen attacks; return the rows of this and of earlier runs.

    Raises:
      UnavailableError: if PyTorch or the authors' code isn't installed.
      ValueError: if the net's logits aren't the same in PyTorch.
    """
    pytorch.need("torch", "autoattack")
    import torch

    torch.set_num_threads(settings.threads)
    problem = problems.load(problems.Settings(net=settings.net, name=settings.name, n=settings.n))
    net = pytorch.fixed_net(problem.params)
    x = pytorch.images(problem.x)
    with torch.no_grad():
        theirs = net(x).numpy()
    ours = np.asarray(problem.apply_fn(problem.params, jnp.asarray(problem.x)))
    if not np.allclose(theirs, ours, rtol=1e-4, atol=1e-4):
        raise ValueError(
            f"expected the same logits in PyTorch, got some that differ by "
            f"{np.abs(theirs - ours).max():g}; pytorch.torch_net doesn't know this kind of net"
        )
    clean = theirs.argmax(1) == problem.y
    settings.out.mkdir(parents=True, exist_ok=True)
    results = settings.out / "results.json"
    for seed, eps, name in itertools.product(settings.seed, settings.eps, settings.attacks):
        identity = {
            **problem.identity,
            "experiment": "reference",
            "attack": name,
            "eps": eps,
            "norm": settings.norm,
            "seed": seed,
            "versions": {"torch": version("torch"), "autoattack": version("autoattack")},
            "threads": settings.threads,
            "settings": {"batch_size": settings.batch_size},
        }

        def attacked(
            name: MemberName = name, eps: float = eps, seed: int = seed,
            identity: dict[str, Any] = identity,
        ) -> AttackRow:  # fmt: skip
            start = time.perf_counter()
            found = published.autoattack(
                net, problem.x, problem.y, eps=eps, norm=settings.norm, seed=seed,
                attacks=[] if name == "standard" else [name], batch_size=settings.batch_size,
            )  # fmt: skip
            seconds = time.perf_counter() - start
            with torch.no_grad():
                robust = clean & (net(found).numpy().argmax(1) == problem.y)
            sizes = (found - x).flatten(1).norm(p=2 if settings.norm == "l2" else np.inf, dim=1)
            console.print(
                f"{identity['method']}: {name}, {settings.norm} {eps:g}, seed {seed}: "
                f"{robust.mean():.4f}, {seconds:.0f} s"
            )
            return PublishedRow(
                **identity,
                columns={"clean": float(clean.mean()), "robust": float(robust.mean())},
                counts={"max_norm": float(sizes.max())},
                seconds=round(seconds, 1),
            )

        records.find_or_run(results, AttackRow, identity, attacked, place=evaluation.PLACE)
    return records.load(results, AttackRow)


@options.command
def main() -> None:
    """Run from the command line."""
    settings = tyro.cli(Settings, description=__doc__)
    run(settings, Console())


if __name__ == "__main__":
    main()
