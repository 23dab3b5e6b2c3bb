"""The fast ensemble compared with AutoAttack: verdicts, passes and time.

    python experiments/fast.py                                    # hours on 2 CPU cores
    python experiments/fast.py --nets mnist_mlp/lwa --norms l2    # minutes
    python experiments/fast.py --image-folder DIR                 # where CIFAR-10 is
    python experiments/fast.py --published                        # to install: see reference.py

Attacks the recorded nets within the pixel range, by both ensembles and with several seeds. Passes
are those executed, per image, padding included. Seconds exclude tracing and compilation; the table
uses only rows whose `machine` says that the machine was quiet. With --orders, accuracies after one,
two, ... targets of APGD show which order of targets is best.

Batches are kept in --out, and the same command resumes an interrupted run. Writes results.json,
results.md, and the verdicts on each image to NET-NORM-SEED.npz.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal, get_args

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, from anywhere

import jax
import numpy as np
import tyro
from rich.console import Console

from experiments.compare import published, pytorch
from experiments.lib import evaluation, options, parallel, problems, records, tables, timing
from experiments.lib.options import Checked, Count, OutputFolder, Seed, Several
from experiments.lib.problems import Problem
from experiments.lib.records import RESULTS, FastRow
from jaxadv import attack, evaluate
from jaxadv.types import Norm, PerturbFn

NetName = Literal[
    "mnist_mlp/normal", "mnist_mlp/lwa", "mnist_mlp/lwa_multi", "mnist_lenet/lwa",
    "mnist_lenet/lwa_noisy", "mnist_lenet/lwa_multi", "cifar10/normal", "cifar10/lwa",
]  # fmt: skip
NETS: tuple[NetName, ...] = get_args(NetName)
EPS: Mapping[tuple[str, Norm], float] = {
    ("mnist", "l2"): 1.5,
    ("mnist", "linf"): 0.1,
    ("cifar10", "l2"): 0.5,
    ("cifar10", "linf"): 2 / 256,  # two grey levels
}
KINDS = ("standard", "fast")
TARGETS = (1, 2, 3, 5, 9)
ORDERS = ("logit", "distance", "alpha")


@dataclasses.dataclass(frozen=True)
class Settings(Checked):
    """Compare the fast ensemble with AutoAttack."""

    nets: Several[NetName] = NETS
    """Which recorded nets."""
    norms: Several[Literal["l2", "linf"]] = ("l2", "linf")
    """Which norms: l2 1.5 and linf 0.1 for MNIST, l2 0.5 and linf 2/256 for CIFAR-10."""
    seeds: Several[Seed] = (0, 1, 2)
    """Random seeds of both ensembles."""
    n: Count = 1000
    """How many test images."""
    published: bool = False
    """Whether to run the published AutoAttack too, with the first seed."""
    orders: bool = False
    """Whether to compare orders of targets too, with the first seed."""
    image_folder: Path | None = None
    """Read CIFAR-10 from here, DIR/{train,test}/CLASS/*, instead of downloading it."""
    folder: Path = RESULTS
    """Where the records are."""
    out: OutputFolder = Path("runs/fast")
    """Where results go."""


@cache
def in_order(norm: Norm, order: Literal["logit", "distance", "alpha"]) -> dict[str, PerturbFn]:
    """Return APGD toward growing numbers of targets; the same objects each time."""
    targeted = partial(attack.apgd_multitargeted, norm=norm, order=order)
    return {str(n): partial(targeted, n_targets=n) for n in TARGETS}


Span = tuple[float, float]


@contextmanager
def compiling() -> Iterator[list[Span]]:
    """Collect when JAX traces, lowers and compiles: starts and ends, in seconds.

    They are in the order of their ends. A trace also contains those of functions called within it.
    """
    spans: list[Span] = []

    def add(event: str, duration_secs: float, **_: Any) -> None:
        if event.startswith("/jax/core/compile/"):
            end = time.perf_counter()
            spans.append((end - duration_secs, end))

    jax.monitoring.register_event_duration_secs_listener(add)
    try:
        yield spans
    finally:
        jax.monitoring.unregister_event_duration_listener(add)


def covered(spans: Sequence[Span]) -> float:
    """Return the length of the union of spans in the order of their ends."""
    length, first = 0.0, math.inf
    for start, end in reversed(spans):
        if start < first:
            length += min(end, first) - start
            first = start
    return length


def store_of(out: Path, identity: Mapping[str, Any], kind: str) -> Path:
    """Return the folder for an ensemble's finished batches."""
    return evaluation.store_of(out, {**identity, "kind": kind})


def measure(
    identity: Mapping[str, Any], problem: Problem, settings: Settings, console: Console
) -> FastRow:
    """Attack a net by both ensembles; return its row, which starts with these entries."""
    net, norm, seed, eps = (identity[field] for field in ("net", "norm", "seed", "eps"))
    name = f"{net.replace('/', '-')}-{norm}-{seed}"
    attack_by = partial(
        evaluate.attack_and_score, problem.apply_fn, problem.params, problem.x, problem.y,
        eps=eps, key=jax.random.key(seed), bounds=problem.bounds,
    )  # fmt: skip
    old = records.find(records.load(settings.out / "results.json", FastRow), identity)
    columns, passes, seconds, compile_seconds = {}, {}, {}, {}
    verdicts: dict[str, Any] = {}
    quiet = timing.Quiet()
    ensembles = evaluate.autoattack(norm), evaluate.fast_autoattack(norm)
    for kind, attacks in zip(KINDS, ensembles, strict=True):
        store = store_of(settings.out, identity, kind)
        anew, start = not store.exists(), time.perf_counter()
        with compiling() as spans:
            found = attack_by(attacks, store=store)
        wall, compiled = time.perf_counter() - start, covered(spans)
        stages = found.stages.values()
        columns["clean"] = evaluate.accuracy(found.outcome.clean)
        columns[kind] = evaluate.accuracy(found.outcome.robust)
        passes[kind] = {
            way: round(sum(getattr(stage.executed, way) for stage in stages) / len(problem.y), 1)
            for way in ("forward", "backward")
        }
        if anew:
            seconds[kind], compile_seconds[kind] = round(wall - compiled, 1), round(compiled, 1)
        verdicts[kind] = found.outcome.robust
        verdicts[f"{kind} by stage"] = np.array([stage.fooled for stage in stages])
        console.print(f"{name}, {kind}: {columns[kind]:.4f}, {wall:.0f} s")
    if settings.published and seed == settings.seeds[0]:
        seconds["published"], columns["published"] = run_published(problem, eps, norm, seed)
    elif old is not None and "published" in old.columns:
        columns["published"] = old.columns["published"]
        if old.machine["valid"]:  # else the time says little, and this run's machine may be quiet
            seconds["published"] = old.seconds["published"]
    machine = quiet.report()
    orders = None if old is None else old.orders
    if settings.orders and seed == settings.seeds[0]:
        orders = {}
        for order in ORDERS:
            found = attack_by(in_order(norm, order))
            fooled = np.logical_or.accumulate([stage.fooled for stage in found.stages.values()])
            orders[order] = [evaluate.accuracy(found.outcome.clean & ~row) for row in fooled]
    np.savez_compressed(settings.out / f"{name}.npz", **verdicts)
    return FastRow(
        experiment="fast", columns=columns, passes=passes, seconds=seconds,
        compile_seconds=compile_seconds, orders=orders, machine=machine, **identity,
    )  # fmt: skip


def run_published(problem: Problem, eps: float, norm: Norm, seed: int) -> tuple[float, float]:
    """Run the published AutoAttack; return its seconds and the robust accuracy."""
    pytorch.need("torch", "autoattack")
    import torch

    torch.set_num_threads(records.cores())
    net = pytorch.fixed_net(problem.params)
    start = time.perf_counter()
    found = published.autoattack(
        net, problem.x, problem.y, eps=eps, norm=norm, seed=seed, batch_size=500,
        low=problem.low,
    )  # fmt: skip
    seconds = time.perf_counter() - start
    with torch.no_grad():
        robust = net(found).numpy().argmax(1) == problem.y
    return round(seconds, 1), float(robust.mean())


def has_all(settings: Settings, row: FastRow) -> bool:
    """Return whether a row has what the settings ask for besides both ensembles."""
    if row.seed != settings.seeds[0]:
        return True
    published = "published" in row.columns or not settings.published
    return published and (row.orders is not None or not settings.orders)


def run(settings: Settings, console: Console) -> list[FastRow]:
    """Compare both ensembles on each net; return the rows of this and of earlier runs."""
    settings.out.mkdir(parents=True, exist_ok=True)
    results = settings.out / "results.json"
    for net in settings.nets:
        problem = problems.recorded(net, settings.n, settings.folder, settings.image_folder)
        for norm, seed in itertools.product(settings.norms, settings.seeds):
            identity = {
                "net": net,
                "norm": norm,
                "seed": seed,
                "n": len(problem.y),
                "eps": EPS["cifar10" if net.startswith("cifar10") else "mnist", norm],
                **{name: problem.identity[name] for name in ("weights", "data")},
                **records.made_by(),
            }
            records.find_or_run(
                results, FastRow, identity, partial(measure, identity, problem, settings, console),
                place=("net", "norm", "seed", "n"), enough=partial(has_all, settings),
            )  # fmt: skip
            for kind in KINDS:  # not those of other runs, which may be going on
                shutil.rmtree(store_of(settings.out, identity, kind), ignore_errors=True)
    return records.load(results, FastRow)


def as_markdown(rows: Sequence[FastRow]) -> list[str]:
    """Return a table of the means over seeds, and one of the orders of targets."""
    headings = (
        "Net", "Norm", "Size", "Images", "Seeds", "Clean", "AutoAttack", "Fast", "Difference",
        "Passes", "fast", "Ratio", "Seconds", "fast", "published",
    )  # fmt: skip
    cells, order_cells = [], []
    for net, norm, n in dict.fromkeys((row.net, row.norm, row.n) for row in rows):
        own = [row for row in rows if (row.net, row.norm, row.n) == (net, norm, n)]
        mean = {name: np.mean([row.columns[name] for row in own]) for name in own[0].columns
                if name != "published"}  # fmt: skip
        passes = {kind: np.mean([sum(row.passes[kind].values()) for row in own])
                  for kind in ("standard", "fast")}  # fmt: skip
        quiet = [row for row in own if row.machine["valid"]]
        times = [
            f"{np.median(of):.1f}"
            if (of := [r.seconds[k] for r in quiet if k in r.seconds])
            else ""
            for k in ("standard", "fast", "published")
        ]
        cells.append([
            net, norm, f"{own[0].eps:.4g}", n, len(own),
            *(f"{mean[kind]:.4f}" for kind in ("clean", "standard", "fast")),
            f"{mean['fast'] - mean['standard']:+.4f}",
            *(f"{passes[kind]:,.0f}" for kind in ("standard", "fast")),
            f"{passes['fast'] / passes['standard']:.3f}", *times,
        ])  # fmt: skip
        for row in own:
            for order, left in (row.orders or {}).items():
                order_cells.append([net, norm, order, *(f"{robust:.4f}" for robust in left)])
    lines = [
        "# The fast ensemble compared with AutoAttack",
        "",
        "Robust accuracy on test images perturbed within the pixel range, mean over seeds; forward "
        "plus backward passes executed per image, padding included; seconds without compilation, "
        "median of the runs on a quiet machine.",
        "",
        *tables.markdown(headings, cells),
        "",
    ]
    if order_cells:
        lines += [
            "Accuracy after APGD, 100 steps each, toward the first n targets in each order:",
            "",
            *tables.markdown(("Net", "Norm", "Order", *map(str, TARGETS)), order_cells),
            "",
        ]
    return [*lines, f"{tables.machines(rows)}.", ""]


@options.command
def main() -> None:
    """Run from the command line."""
    settings = tyro.cli(Settings, description=__doc__)
    console = parallel.start()
    tables.write(settings.out, as_markdown(run(settings, console)), console)


if __name__ == "__main__":
    main()
