"""Test and time jaxadv on a GPU or TPU, and record the results, with one command.

    python experiments/accelerator.py                # all parts, under 8 minutes on one GPU
    python experiments/accelerator.py --parts b c    # some of them
    python experiments/accelerator.py --quick        # a short run, under 3 minutes on 2 CPU cores

    a  the library's tests of exactness and of attacks, with exact float32 matrix products
    b  robust accuracies of recorded nets, compared image by image with a CPU's
    e  LeNet's multi-step net, trained from scratch
    c  training steps and attacks per second, relative to the rate of large matrix products
    d  training steps next to hand-written ones in PyTorch, where it is installed

Needs no network and, besides JAX, only flax, optax, orbax-checkpoint, rich and safetensors, and for
(a) pytest, chex, hypothesis and mpmath; jaxadv may run from a checkout. Each part runs in its own
process, with a time limit. It writes PART.json to --out after each figure, so that an interrupted
run keeps what it has. The exit status is the number of parts that failed: because they ran out of
time, because tests failed, or because the verdicts of (b) differ from the CPU's in
results/accelerator/cpu (made by --parts b --timeout 36000).
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import itertools
import math
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, from anywhere

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks import common, rates
from experiments.compare import pytorch
from experiments.lib import (
    data,
    models,
    options,
    parallel,
    recipes,
    records,
    tasks,
    timing,
    train_and_score,
    training,
    weights,
)
from experiments.lib.options import OutputFolder, Positive
from experiments.lib.records import RESULTS, PartRow, TableRow
from jaxadv import attack, evaluate, perturb
from jaxadv.types import ApplyFn, Bounds, Params, PerturbFn

Figure = dict[str, Any]

CPU = RESULTS / "accelerator" / "cpu" / "b.json"


@dataclasses.dataclass(frozen=True)
class Settings(options.Checked):
    """The settings of each part."""

    out: OutputFolder
    """Where its JSON goes."""
    quick: bool = False
    """Whether this is a short run."""
    seconds: Positive = 36_000
    """Its time limit."""


class Record:
    """A part's JSON: the figures of an interrupted run, if there was one, and those added now."""

    def __init__(self, part: str, settings: Settings) -> None:
        settings.out.mkdir(parents=True, exist_ok=True)
        self._path = settings.out / f"{part}.json"
        self._start = time.perf_counter()
        self._identity: dict[str, Any] = {
            "experiment": "accelerator",
            "part": part,
            **records.made_by(),
            "settings": {"quick": settings.quick},
        }
        unfinished = {**self._identity, "finished": False}
        known = records.find(records.load(self._path, PartRow), unfinished)
        self.figures: list[Figure] = known.figures if known else []
        self._before = known.seconds if known else 0

    def done(self, **identity: Any) -> bool:
        """Return whether there is a figure with these entries."""
        return any(identity.items() <= figure.items() for figure in self.figures)

    def save(self, *, finished: bool) -> None:
        """Write the file."""
        seconds = round(self._before + time.perf_counter() - self._start, 1)
        row = PartRow(**self._identity, finished=finished, seconds=seconds, figures=self.figures)
        records.save(self._path, [row])


# (a)

TESTS = (
    "exactness", "perturb", "alpha", "jacobian", "norms", "inputs", "objectives", "train", "pgd",
    "apgd", "deepfool", "fmn", "minimal", "fab", "square", "ensemble",
)  # fmt: skip


def tests(settings: Settings, record: Record) -> Iterator[Figure]:
    """Run test files, several at a time if there are enough cores."""
    end = time.perf_counter() + settings.seconds - 10  # before this part is killed
    names = ("jacobian",) if settings.quick else TESTS
    with ThreadPoolExecutor(max(records.cores() // 2, 1)) as pool:
        runs = [pool.submit(_tested, name, end) for name in names if not record.done(tests=name)]
        for run_ in as_completed(runs):
            yield run_.result()


def _tested(name: str, end: float) -> Figure:
    """Run a test file; return how many tests passed and were skipped, and which failed."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        outcome = Path(folder) / "outcome.xml"
        arguments = ["-q", f"--junitxml={outcome}", f"tests/test_{name}.py"]
        # Without pytest-xdist, which the project's own options need.
        arguments += ["-o", "addopts=--strict-markers -m 'not slow'"]
        try:
            done = subprocess.run(
                [sys.executable, "-m", "pytest", *arguments],
                cwd=common.ROOT, capture_output=True, text=True, timeout=max(end - start, 1),
                env={**os.environ, "JAX_DEFAULT_MATMUL_PRECISION": "highest"},
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            return {"tests": name, "failure": f"test_{name}.py took over {error.timeout:.0f} s"}
        cases = list(ElementTree.parse(outcome).iter("testcase")) if outcome.is_file() else []
    kinds = [{child.tag for child in case} for case in cases]
    failed = [
        f"{case.get('name')}"
        for case, kind in zip(cases, kinds, strict=True)
        if kind & {"failure", "error"}
    ]
    skipped = sum("skipped" in kind for kind in kinds)
    figure: Figure = {
        "tests": name,
        "passed": len(cases) - len(failed) - skipped,
        "skipped": skipped,
        "failed": failed,
        "seconds": round(time.perf_counter() - start, 1),
    }
    if done.returncode:
        why = ", ".join(failed) or (done.stdout + done.stderr)[-500:]
        figure["failure"] = f"test_{name}.py: {why}"
    return figure


# (b)


class Case(NamedTuple):
    """A recorded net, and how it is attacked."""

    net: str
    eps: float
    bounds: Bounds
    quick: Mapping[str, int]
    """How many images each attack has in a short run."""


MNIST, CIFAR10 = data.MNIST.box, data.CIFAR10_CROPS.box
CASES = (
    Case("mnist_mlp/lwa", 1.5, MNIST, {"one-step": 1000, "pgd": 100, "standard": 20}),
    Case("mnist_lenet/lwa_multi", 1.5, MNIST, {"one-step": 100, "pgd": 20}),
    Case("cifar10/normal", 0.5, CIFAR10, {"one-step": 100, "pgd": 20}),
)
ATTACKS: dict[str, Mapping[str, PerturbFn]] = {
    "one-step": {"one-step": perturb.loss},
    "pgd": {"pgd": attack.pgd},
    "standard": evaluate.autoattack("l2"),
}
ALLOWED = 4 / 1000
"""Largest share of verdicts that may differ from a CPU's."""


def verdicts(settings: Settings, record: Record) -> Iterator[Figure]:
    """Attack recorded nets, and compare the verdicts with a CPU's on the same images."""
    # Exact float32 products first: the default may be TF32 on a GPU, and is bfloat16 on a TPU.
    on_cpu = jax.default_backend() == "cpu"
    precisions = ("highest",) if on_cpu else ("highest", "default")
    for precision, case, name in itertools.product(precisions, CASES, ATTACKS):
        n = case.quick.get(name, 0) if settings.quick else 1000
        identity = {
            "net": case.net, "attack": name, "norm": "l2", "eps": case.eps, "n": n,
            "precision": precision,
        }  # fmt: skip
        if n and not record.done(**identity):
            images = _test_images(case.net, n)
            path = RESULTS / case.net / "params.safetensors"
            net, params = weights.load_net(path, images.x.shape[1:])
            apply_fn = models.function(net)
            with jax.default_matmul_precision(precision):
                found = attacked(apply_fn, params, images, name, case)
            yield compared(identity | found)


def attacked(
    apply_fn: ApplyFn, params: Params, images: train_and_score.Images, name: str, case: Case
) -> Figure:
    """Attack images; return the accuracies and a verdict on each image."""
    start = time.perf_counter()
    keys = jax.random.split(jax.random.key(0), 1000)[: len(images.y)]  # as in a full run
    found = evaluate.attack_and_score(
        apply_fn, params, *images, ATTACKS[name], eps=case.eps, key=keys, bounds=case.bounds
    )
    return {
        "clean": evaluate.accuracy(found.outcome.clean),
        "robust": evaluate.accuracy(found.outcome.robust),
        "seconds": round(time.perf_counter() - start, 1),
        "verdicts": "".join("1" if robust else "0" for robust in found.outcome.robust),
    }


def compared(figure: Figure) -> Figure:
    """Add the number of verdicts that differ from the CPU's, if those are recorded."""
    identity = {key: figure[key] for key in ("net", "attack", "norm", "eps")}
    known = [other for row in records.load(CPU, PartRow) for other in row.figures]
    same = [other["verdicts"] for other in known if identity.items() <= other.items()]
    if not same:
        return figure
    n = figure["n"]
    differ = sum(a != b for a, b in zip(figure["verdicts"], same[0][:n], strict=True))
    figure = {**figure, "differ from CPU": differ}
    if differ > math.ceil(ALLOWED * n) and figure["precision"] == "highest":
        figure["failure"] = (
            f"expected a CPU's verdicts on {figure['net']} under {figure['attack']}, got {differ} "
            f"of {n} that differ"
        )
    return figure


def _test_images(net: str, n: int) -> train_and_score.Images:
    """Return the first n test images, in the order in which evaluate.py takes them."""
    if net.startswith("cifar10"):
        pixels, labels = data.cifar10_crops()
        scaled = data.CIFAR10_CROPS.inputs(pixels[:n])
        return train_and_score.Images(jnp.asarray(scaled), jnp.asarray(labels[:n]))
    mnist = data.mnist_originals()
    scaled = data.MNIST.inputs(mnist.test_images[:n])
    return train_and_score.Images(jnp.asarray(scaled), jnp.asarray(mnist.test_labels[:n]))


# (e)


def trained(settings: Settings, record: Record) -> Iterator[Figure]:
    """Train LeNet's multi-step net with the recorded settings, and attack it."""
    case = CASES[1]
    rows = records.load(RESULTS / "mnist_lenet" / "results.json", TableRow)
    made = next(row.settings for row in rows if row.method == "lwa_multi")
    fields = {field.name: made[field.name] for field in dataclasses.fields(recipes.MultiStep)}
    fields |= {"widths": tuple(made["widths"]), "eps": made["train_eps"]}
    method: recipes.Method = recipes.MultiStep(**fields)
    n_train, n_test = 60_000, 1000
    if settings.quick:
        method, n_train, n_test = recipes.shortened(method), 1000, 100
    mnist = data.mnist_originals()
    mnist = mnist._replace(
        train_images=mnist.train_images[:n_train], train_labels=mnist.train_labels[:n_train]
    )
    own = train_and_score.Settings(
        out=settings.out, n_eval=n_test, n_pgd=n_test, batch_size=made["batch_size"]
    )
    task = tasks.mnist(own, "lenet", method, mnist)
    shutil.rmtree(own.out / "checkpoints", ignore_errors=True)  # time it from scratch
    record.figures.clear()  # those of an interrupted run are of another training
    with training.bars(parallel.start()) as progress:
        net = train_and_score.train("lwa_multi", method, 0, own, task, progress)
    for name in ("one-step",) if settings.quick else ATTACKS:
        yield {
            "net": case.net, "epochs": method.epochs, "training images": n_train,
            "training seconds": round(net.fitted.seconds, 1), "attack": name, "n": n_test,
            **attacked(net.apply_fn, net.params, task.test, name, case),
        }  # fmt: skip


# (c)


def timed(settings: Settings, record: Record) -> Iterator[Figure]:
    """Time training steps and attacks of small nets and a large one."""
    return rates.run(quick=settings.quick, done=record.done)


# (d)


def by_hand(settings: Settings, record: Record) -> Iterator[Figure]:
    """Time training steps on a batch of 100, in turn with the same steps in PyTorch."""
    if importlib.util.find_spec("torch") is None:
        yield {"skipped": "PyTorch isn't installed"}
        return
    import torch

    device = "cpu" if jax.default_backend() == "cpu" else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        yield {"skipped": f"PyTorch {torch.__version__} has no CUDA device"}
        return
    torch.set_float32_matmul_precision("high")  # TF32 where available, as in JAX
    rounds, seconds = (1, 0.05) if settings.quick else (5, 0.1)
    epoch_steps = 20
    for name in ("mlp",) if settings.quick else ("mlp", "lenet", "vgg-1"):
        net, shape = common.make_net(name)
        x, y = common.some_images(100, shape)
        params = models.init(net, jax.random.key(0), x)
        steps = common.step_objectives(net, all_kinds=False)
        own = common.training_calls(steps, params, x, y, epoch_steps)
        for kind, eps in {"plain": None, "LWA": 1.5}.items():
            if record.done(net=name, objective=kind):
                continue
            arrays = params, np.asarray(x), np.asarray(y)
            calls = {
                "step": own[f"{kind}, step"],
                "epoch": own[f"{kind}, epoch"],
                "PyTorch": pytorch.training(*arrays, eps=eps, device=device),
            }
            times = timing.in_turn(calls, rounds, seconds=seconds)
            times["epoch"] /= epoch_steps
            yield {
                "net": name, "objective": kind, "images": 100, "torch": torch.__version__,
                **{f"ms, {way}": common.milliseconds(taken) for way, taken in times.items()},
                "PyTorch / step": common.ratio(times["PyTorch"], times["step"]),
                "PyTorch / epoch": common.ratio(times["PyTorch"], times["epoch"]),
            }  # fmt: skip


PARTS: dict[str, tuple[Callable[[Settings, Record], Iterator[Figure]], float]] = {
    # In this order, with their time limits: 465 s in all.
    "a": (tests, 110),
    "b": (verdicts, 125),
    "e": (trained, 90),
    "c": (timed, 120),
    "d": (by_hand, 20),
}


def run(part: str, settings: Settings) -> None:
    """Run a part in this process; exit with an error if one of its figures is a failure."""
    parallel.start()  # compiled programs are cached for the next run
    record = Record(part, settings)
    for figure in PARTS[part][0](settings, record):
        record.figures.append(figure)
        record.save(finished=False)
    record.save(finished=True)
    failures = [figure["failure"] for figure in record.figures if "failure" in figure]
    if failures:
        raise SystemExit("\n".join(failures))


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line; return how many parts failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--quick", action="store_true", help="a short run")
    parser.add_argument("--out", type=Path, default=Path("runs/accelerator"))
    parser.add_argument("--timeout", type=float, help="time limit of each part in seconds")
    chosen = parser.parse_args(arguments)
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # (a) runs several processes
    failed = 0
    for part in [name for name in PARTS if name in chosen.parts]:
        seconds = chosen.timeout or PARTS[part][1]
        try:
            settings = Settings(chosen.out, chosen.quick, seconds)
        except options.UsageError as error:
            parser.error(str(error))
        process = multiprocessing.get_context("spawn").Process(target=run, args=(part, settings))
        start = time.perf_counter()
        process.start()
        process.join(seconds)
        if process.is_alive():
            process.kill()
            process.join()
            ended = f"stopped: expected to finish within {seconds:g} s; raise --timeout"
        else:
            ended = "failed" if process.exitcode else "done"
        failed += process.exitcode != 0
        print(f"({part}) {time.perf_counter() - start:.0f} s, {ended}", flush=True)
    print(f"The figures are in {chosen.out}.")
    return failed


if __name__ == "__main__":
    sys.exit(main())
