"""How fast training steps and attacks are, beside what the machine allows and what peers reach.

    python experiments/benchmark.py                  # everything, about half an hour on 2 cores
    python experiments/benchmark.py --parts steps    # one part; the others' figures stay

Each part times its calls in turn over several rounds, and quotes medians; a ratio is of times of
the same round and has its quartiles beside it. A part during which other programs loaded the
machine is marked as not valid, and the command ends with an error.

- `steps`: a training step, called by itself (`train.make_step`) and within an epoch on the device
  (`train.make_epoch`), against a floor, about the least that it can take, and against a step
  written by hand in PyTorch. On CPU also over as many simulated devices as there are cores.
- `loops`: the library's loops over a net of plain `flax.linen.Conv`, against a Python loop over a
  jitted step; XLA has a trap there on CPU (see `jaxadv.loops`).
- `attacks`: perturbations of 1,000 test images, against the floor and against other libraries.
- `growth`: what batch, classes, steps and input size cost, in time and memory.
- `devices`: a step of one batch over more and more devices; on CPU, simulated ones.
- `starts`: how long compiling takes, and what the cache of compiled programs saves.

The floor is the time of the matrix products that can't be done without. For dense nets each product
is timed by itself, of the same shape, forward or transposed; convolutions are counted at the rate
of 2048x2048 products. A step needs, of each layer, one forward product and one for the gradient of
its weights, and one for the gradient of its input but in the first layer; an adversary one forward
pass, and one back to the image, or K - 1 of them for Adv_Alpha.

Other libraries are timed where they are installed (`pip install -e ".[bench]"`). Writes
results.json, results.md and figures to --out.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, from anywhere

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import linen as nn
from jax.sharding import Mesh
from rich.console import Console

from experiments import evaluate, figures, models, parallel, peers, report, timing
from experiments.models import Classifier, function, init
from experiments.timing import in_turn
from jaxadv import attack, objectives, perturb, train

Part = Literal["steps", "loops", "attacks", "growth", "devices", "starts"]
NetName = Literal["mlp", "lenet", "vgg-0.25", "vgg-0.5", "vgg-1"]
Call = Callable[[], Any]
Figures = list[dict[str, Any]]

ROOT = Path(__file__).resolve().parents[1]
PARTS: tuple[Part, ...] = get_args(Part)
LARGE = ("vgg-0.5", "vgg-1")  # whose steps take seconds
# So many that what a call does once, as getting memory, is spread as in a real epoch.
EPOCH_STEPS = {"mlp": 20, "lenet": 20, "vgg-0.25": 10, "vgg-0.5": 10, "vgg-1": 5}


@dataclasses.dataclass(frozen=True)
class Settings:
    """Time training steps and attacks against their floors and their peers."""

    parts: tuple[Part, ...] = PARTS
    """What to measure."""
    nets: tuple[NetName, ...] = ("mlp", "lenet", "vgg-0.25", "vgg-0.5", "vgg-1")
    """Whose steps; vgg is the CIFAR-10 net at a share of its width."""
    batch_size: int = 100
    """Images per step."""
    n: int = 1000
    """Images attacked."""
    rounds: int = 15
    """How often everything is timed, a third of it where calls take seconds."""
    seconds: float = 0.1
    """Least time of one timing; calls are repeated until then."""
    out: Path = Path("runs/benchmark")
    """Where results go."""


def ratio(of: Any, to: Any) -> list[float]:
    """Return the quartiles of a ratio of times, over the rounds in which both were timed."""
    of, to = np.atleast_1d(of), np.atleast_1d(to)
    rounds = min(len(of), len(to))  # `timing.in_turn` leaves long calls out of later rounds
    return np.quantile(of[:rounds] / to[:rounds], [0.25, 0.5, 0.75]).tolist()


def milliseconds(times: Any) -> float:
    """Return the median of times in seconds."""
    return float(np.median(times) * 1e3)


def has_peers() -> bool:
    """Say whether the libraries to compare with are installed."""
    modules = "torch", "foolbox", "torchattacks", "cleverhans", "art"
    return all(map(importlib.util.find_spec, modules))


def products(net: Classifier, n_inputs: int, batch: int) -> dict[str, Call]:
    """Return one compiled matrix product for each kind and layer of a dense net."""
    sizes = (n_inputs, *net.dense, net.classes)
    rng = np.random.default_rng(0)

    def array(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    dot = jax.jit(jnp.matmul)
    left_transposed = jax.jit(lambda a, b: a.T @ b)
    right_transposed = jax.jit(lambda a, b: a @ b.T)
    calls: dict[str, Call] = {}
    for layer, (i, o) in enumerate(itertools.pairwise(sizes)):
        w, h, g = array(i, o), array(batch, i), array(batch, o)
        gs = array((net.classes - 1) * batch, o)
        calls[f"forward {layer}"] = partial(dot, h, w)
        calls[f"weights {layer}"] = partial(left_transposed, h, g)
        calls[f"input {layer}"] = partial(right_transposed, g, w)
        calls[f"inputs {layer}"] = partial(right_transposed, gs, w)
    return calls


def floors(seconds: Mapping[str, Any], layers: int, split: int) -> dict[str, Any]:
    """Return the summed time of each kind of step's products.

    Args:
      seconds: the time of each product, named as in `products`.
      layers: how many there are.
      split: how many of them come before LWA_Rep's representation.
    """
    forward, weights, back, backs = (
        [seconds[f"{kind} {layer}"] for layer in range(layers)]
        for kind in ("forward", "weights", "input", "inputs")
    )
    plain = sum(forward) + sum(weights) + sum(back[1:])
    return {
        "plain": plain,
        "LWA": plain + sum(forward) + sum(back),
        "LWA, Adv_Alpha": plain + sum(forward) + sum(backs),
        "LWA_Rep": plain + sum(forward[split:]) + sum(back[split:]),
        "LWA, 3 steps": plain + 3 * (sum(forward) + sum(back)),
    }


def counted(net: Classifier, shape: tuple[int, ...], batch: int, rate: Any) -> dict[str, Any]:
    """Return the time of each product, as `products` names them, at a rate of operations."""
    seconds = {}
    for layer, count in enumerate(timing.flops(net, shape)):
        for kind in ("forward", "weights", "input"):
            seconds[f"{kind} {layer}"] = count * batch / rate
        seconds[f"inputs {layer}"] = (net.classes - 1) * count * batch / rate
    return seconds


def make_net(name: str) -> tuple[Classifier, tuple[int, ...]]:
    """Return a net by its name, and the shape of its images."""
    if name == "mlp":
        return models.mlp((500, 500)), (28, 28, 1)
    if name == "lenet":
        return models.lenet((500,)), (28, 28, 1)
    return models.vgg((2048, 2048), width=float(name.removeprefix("vgg-"))), (28, 28, 3)


def some_images(n: int, shape: tuple[int, ...], classes: int = 10) -> tuple[jax.Array, jax.Array]:
    """Return random images and labels."""
    rng = np.random.default_rng(1)
    y = jnp.asarray(rng.integers(0, classes, n), jnp.int32)
    return jnp.asarray(rng.random((n, *shape)), jnp.float32), y


def training_calls(
    objectives_: Mapping[str, Any],
    params: Any,
    x: jax.Array,
    y: jax.Array,
    epoch_steps: int,
    mesh: Mesh | None = None,
) -> dict[str, Call]:
    """Return compiled steps of each objective, one and an epoch of them, that carry their state."""
    tx = optax.sgd(1e-3, momentum=0.9)
    order = jnp.tile(jnp.arange(len(x)), (epoch_steps, 1))

    def call(compiled: Any, *arguments: Any) -> Call:
        state = parallel.replicate(mesh, train.init(params, tx, key=jax.random.key(1)))

        def go() -> Any:
            nonlocal state
            state, info = compiled(state, *arguments)
            return info.loss

        return go

    batch, images = parallel.spread(mesh, (x, y)), parallel.replicate(mesh, (x, y))
    order = parallel.spread(mesh, order, axis=1)
    calls = {}
    for name, objective in objectives_.items():
        calls[f"{name}, step"] = call(train.make_step(objective, tx), batch)
        calls[f"{name}, epoch"] = call(train.make_epoch(objective, tx), images, order)
    return calls


def step_objectives(net: Classifier, *, all_kinds: bool) -> dict[str, Any]:
    """Return what the steps that are timed minimise."""
    apply_fn = function(net)
    kinds = {
        "plain": objectives.natural(apply_fn),
        "LWA": objectives.adversarial(apply_fn, perturb.loss, eps=1.5),
    }
    if all_kinds:
        pgd = partial(attack.pgd, steps=3)
        parts = function(net, "encode"), function(net, "classify")
        kinds |= {
            "LWA, Adv_Alpha": objectives.adversarial(apply_fn, perturb.alpha, eps=1.5),
            "LWA_Rep": objectives.representation(*parts, perturb.loss, eps=1.5),
            "LWA, 3 steps": objectives.adversarial(apply_fn, pgd, eps=1.5),
        }
    return kinds


def steps(settings: Settings) -> Figures:
    """Time training steps against their floors, and against PyTorch's."""
    found: Figures = []
    several = jax.device_count() > 1
    for name in settings.nets:
        net, shape = make_net(name)
        large = name in LARGE
        epoch_steps = EPOCH_STEPS[name]
        x, y = some_images(settings.batch_size, shape)
        params = init(net, jax.random.key(0), x)
        kinds = step_objectives(net, all_kinds=not large and not several)
        mesh = parallel.mesh(parallel.Devices(), len(x))
        calls = training_calls(kinds, params, x, y, epoch_steps, mesh)
        calls["rate"] = timing.matrix_products()
        if not net.blocks:
            calls |= products(net, int(np.prod(shape)), len(x))
        theirs = {"plain": None, "LWA": 1.5} if has_peers() else {}
        for kind, eps in theirs.items():
            calls[f"{kind}, PyTorch"] = peers.training(params, *map(np.asarray, (x, y)), eps=eps)
        rounds = settings.rounds // 3 if name.startswith("vgg") else settings.rounds
        times = in_turn(calls, max(rounds, 1), seconds=settings.seconds)
        rate = 2 * 2048**3 / times["rate"]
        seconds = times if not net.blocks else counted(net, shape, len(x), rate)
        floor = floors(seconds, len(timing.flops(net, shape)), net.split)
        for kind, way in itertools.product(kinds, ("step", "epoch")):
            taken = times[f"{kind}, {way}"] / (epoch_steps if way == "epoch" else 1)
            figure = {
                "net": name,
                "objective": kind,
                "called": "by itself" if way == "step" else "in an epoch",
                "devices": mesh.size if mesh else 1,
                "ms": milliseconds(taken),
                "floor ms": milliseconds(floor[kind]),
                "floor / time": ratio(floor[kind], taken),
            }
            if kind in theirs:
                figure["PyTorch ms"] = milliseconds(times[f"{kind}, PyTorch"])
                figure["PyTorch / time"] = ratio(times[f"{kind}, PyTorch"], taken)
            found.append(figure)
    if jax.default_backend() == "cpu" and not several and report.cores() > 1:
        found += in_child("steps", settings, devices=report.cores())
    return found


class PlainNet(nn.Module):
    """A net as flax's users write it."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return logits `[B, 10]` of images `[B, H, W, C]`."""
        for features in (32, 64):
            x = nn.relu(nn.Conv(features, (3, 3), strides=2)(x))
        return nn.Dense(10)(nn.relu(nn.Dense(128)(x.reshape(len(x), -1))))


def loops(settings: Settings) -> Figures:
    """Time the library's loops over a user's convolutions against loops in Python."""
    net = PlainNet()

    def apply_fn(params: Any, x: jax.Array, /) -> Any:
        return net.apply(params, x)

    x, _ = some_images(settings.batch_size, (28, 28, 1))
    x = 0.5 + 1e-4 * x  # in a box so narrow that no attack succeeds, and all iterations are made
    params = init(net, jax.random.key(0), x)
    y = apply_fn(params, x).argmax(-1).astype(jnp.int32)
    n = 10
    kinds = {
        "plain": objectives.natural(apply_fn),
        "LWA": objectives.adversarial(apply_fn, perturb.loss, eps=1.5),
        "LWA, Adv_Alpha": objectives.adversarial(apply_fn, perturb.alpha, eps=1.5),
    }
    calls = training_calls(kinds, params, x, y, n)
    one_step = {  # with the passes of an iteration of the attack, and no loop
        "PGD": partial(perturb.loss, eps=1e-4),
        "APGD": partial(perturb.loss, eps=1e-4),
        "DeepFool": partial(perturb.alpha, eps=1e-4),
    }
    attacks_ = {
        "PGD": partial(attack.pgd, eps=1e-4, steps=n),
        "APGD": partial(attack.apgd, eps=1e-4, steps=n, key=jax.random.key(0)),
        "DeepFool": partial(attack.deepfool, steps=n, bounds=(0.5, 0.5001)),
    }
    for name in attacks_:
        for way, method in (("step", one_step[name]), ("epoch", attacks_[name])):
            calls[f"{name}, {way}"] = partial(jax.jit(partial(method, apply_fn)), params, x, y)
    times = in_turn(calls, settings.rounds, seconds=settings.seconds)
    return [
        {
            "loop": f"{'make_epoch, ' if name in kinds else 'attack: '}{name}",
            "ms, an iteration": milliseconds(times[f"{name}, epoch"] / n),
            "outside, ms": milliseconds(times[f"{name}, step"]),
            "outside / inside": ratio(times[f"{name}, step"], times[f"{name}, epoch"] / n),
        }
        for name in (*kinds, *attacks_)
    ]


METHODS: Mapping[str, tuple[Any, int]] = {  # with passes over the net's products, if fixed
    "Adv_Loss": (partial(perturb.loss, eps=1.5), 2),
    "Adv_Loss_Sign": (partial(perturb.loss_sign, eps=1.5), 2),
    "Adv_Alpha": (partial(perturb.alpha, eps=1.5), 10),
    "Miyato": (partial(perturb.virtual, eps=1.5, key=jax.random.key(0)), 0),
    "one step": (partial(perturb.loss, eps=1.5, bounds=(0.0, 1.0)), 2),
    "PGD-40": (partial(attack.pgd, eps=1.5, steps=40, bounds=(0.0, 1.0)), 80),
    "APGD-CE, 100 steps": (
        partial(attack.apgd, eps=1.5, steps=100, bounds=(0.0, 1.0), key=jax.random.key(0)),
        200,
    ),
    "DeepFool": (partial(attack.deepfool, steps=50, bounds=(0.0, 1.0)), 0),
    "FMN, 100 steps": (partial(attack.fmn, steps=100, bounds=(0.0, 1.0)), 0),
    "FAB-T, 10 steps": (partial(attack.fab, eps=1.5, steps=10, bounds=(0.0, 1.0)), 0),
    "Square, 100 queries": (
        partial(attack.square, eps=1.5, steps=100, bounds=(0.0, 1.0), key=jax.random.key(0)),
        100,
    ),
}  # fmt: skip


def attacks(settings: Settings) -> Figures:
    """Time perturbations of test images against their floors and against other libraries."""
    found: Figures = []
    for name in ("mlp", "lenet"):
        weights = ROOT / "experiments" / "results" / f"mnist_{name}" / "lwa" / "params.safetensors"
        problem = evaluate.load(evaluate.Settings(net=str(weights), n=settings.n))
        x, y = jnp.asarray(problem.x), jnp.asarray(problem.y)
        net = models.recognised(problem.params)
        # DeepFool of a net of convolutions takes some libraries many minutes for 1,000 images.
        counts = {method: len(x) for method in METHODS}
        if net.blocks:
            counts["DeepFool"] = max(len(x) // 10, 1)
        calls: dict[str, Call] = {}
        for method, (perturbation, _) in METHODS.items():
            n = counts[method]
            compiled = jax.jit(partial(perturbation, problem.apply_fn))
            calls[method] = partial(compiled, problem.params, x[:n], y[:n])
        of_peers: dict[str, dict[str, Call]] = {}
        tasks: tuple[peers.Task, ...] = ("one step", "PGD-40", "DeepFool") if has_peers() else ()
        for task in tasks:
            n = counts[task]
            of_peers[task] = peers.attacks(
                problem.params, problem.x[:n], problem.y[:n], eps=1.5, task=task
            )
            calls |= {f"{task}, {peer}": call for peer, call in of_peers[task].items()}
        rate = {"rate": timing.matrix_products()}
        rounds = max(settings.rounds // 3, 1)
        times = in_turn(calls | rate, rounds, seconds=settings.seconds)
        forward = sum(timing.flops(net, x.shape[1:])) / (2 * 2048**3 / times["rate"])
        for method, (_, passes) in METHODS.items():
            n = counts[method]
            for library in ("jaxadv", *of_peers.get(method, {})):
                ours = library == "jaxadv"
                call = method if ours else f"{method}, {library}"
                perturbed = x[:n] + calls[call]() if ours else jnp.asarray(calls[call]())
                logits = problem.apply_fn(problem.params, perturbed)
                figure: dict[str, Any] = {
                    "net": name,
                    "method": method,
                    "library": library,
                    "images": n,
                    "images a second": round(n / float(np.median(times[call]))),
                    "accuracy": float((logits.argmax(-1) == y[:n]).mean()),
                }
                if not ours:
                    figure["time / ours"] = ratio(times[call], times[method])
                elif passes:
                    figure["floor / time"] = ratio(passes * n * forward, times[method])
                found.append(figure)
    return found


def measured(calls: Mapping[str, tuple[Any, int]], settings: Settings) -> dict[str, dict[str, Any]]:
    """Return microseconds an image and megabytes of working memory of compiled calls.

    Args:
      calls: for each name, a jitted function with its arguments bound, and how many images it is
        given.
      settings: how often it is timed.
    """
    programs = {name: call.func.lower(*call.args).compile() for name, (call, _) in calls.items()}
    timed: dict[str, Call] = {
        name: partial(programs[name], *call.args) for name, (call, _) in calls.items()
    }
    times = in_turn(timed, max(settings.rounds // 3, 1), seconds=settings.seconds)
    found = {}
    for name, (_, n) in calls.items():
        memory = programs[name].memory_analysis()
        found[name] = {"µs an image": milliseconds(times[name]) * 1e3 / n}
        if memory is not None:
            found[name]["MB"] = round(memory.temp_size_in_bytes / 1e6, 2)
    return found


def growth(settings: Settings) -> Figures:
    """Time perturbations as batches, classes, steps and images grow."""
    mlp, lenet = models.mlp((500, 500)), models.lenet((500,))
    methods = {
        "Adv_Loss": partial(perturb.loss, eps=1.5),
        "Adv_Alpha": partial(perturb.alpha, eps=1.5),
        "PGD-10": partial(attack.pgd, eps=1.5, steps=10),
    }

    def call(net: Classifier, method: Any, n: int, shape: tuple[int, ...]) -> tuple[Any, int]:
        x, y = some_images(n, shape, net.classes)
        params = init(net, jax.random.key(0), x[:1])
        return partial(jax.jit(partial(method, function(net))), params, x, y), n

    found: Figures = []

    def of(grows: str, calls: Mapping[tuple[str, str, int], tuple[Any, int]]) -> None:
        named = {str(key): value for key, value in calls.items()}
        results = measured(named, settings)
        for net, method, size in calls:
            figure = results[str((net, method, size))]
            found.append({"net": net, "method": method, "what grows": grows, "to": size, **figure})

    digit = (28, 28, 1)
    for name, net in (("mlp", mlp), ("lenet", lenet)):
        of(
            "images",
            {
                (name, method, n): call(net, perturbation, n, digit)
                for method, perturbation in methods.items()
                for n in (1, 10, 128, 250, 1000, 10000)
                if not (name == "lenet" and n == 10000 and method == "Adv_Alpha")
            },
        )
    of(
        "classes",
        {
            ("mlp", method, k): call(dataclasses.replace(mlp, classes=k), perturbation, 100, digit)
            for method, perturbation in {
                "Adv_Loss": methods["Adv_Loss"],
                "Adv_Alpha": methods["Adv_Alpha"],
                "Adv_Alpha, chunks of 50": partial(perturb.alpha, eps=1.5, chunk=50),
                "Adv_Alpha, 10 candidates": partial(perturb.alpha, eps=1.5, candidates=10),
            }.items()
            for k in (2, 10, 100, 1000)
            if not (k < 100 and "," in method)
        },
    )
    of(
        "steps",
        {
            ("mlp", "PGD", n): call(mlp, partial(attack.pgd, eps=1.5, steps=n), 100, digit)
            for n in (1, 10, 100, 1000)
        },
    )
    small = models.vgg((64, 64), width=0.125)
    of(
        "pixels a side",
        {
            ("vgg-0.125", method, side): call(small, methods[method], 8, (side, side, 3))
            for method in ("Adv_Loss", "Adv_Alpha")
            for side in (28, 56, 112, 224)
        },
    )
    return found


def devices(settings: Settings) -> Figures:
    """Time LWA's step, of one batch over more and more devices."""
    if jax.device_count() == 1 and jax.default_backend() == "cpu":
        return in_child("devices", settings, devices=8)
    net, tx = models.mlp((500, 500)), optax.sgd(0.1, momentum=0.9)
    x, y = some_images(1024, (28, 28, 1))
    params = init(net, jax.random.key(0), x)
    step = train.make_step(objectives.adversarial(function(net), perturb.loss, eps=1.5), tx)
    counts = [n for n in (1, 2, 4, 8, 16, 32, 64, 128, 256) if n <= jax.device_count()]
    calls: dict[str, Call] = {}
    losses: dict[int, list[float]] = {}
    states: dict[int, train.TrainState] = {}
    for n in counts:
        mesh = parallel.mesh(parallel.Devices(devices=n), len(x))
        batch = parallel.spread(mesh, (x, y))
        states[n] = parallel.replicate(mesh, train.init(params, tx, key=jax.random.key(1)))
        losses[n] = []

        def go(batch: Any = batch, n: int = n) -> Any:
            states[n], info = step(states[n], batch)
            losses[n].append(float(info.loss))
            return info.loss

        calls[str(n)] = go
    times = in_turn(calls, max(settings.rounds // 3, 1), seconds=settings.seconds)
    shared = min(map(len, losses.values()))
    alone = np.array(losses[1][:shared])
    return [
        {
            "devices": n,
            "ms a step of 1,024 images": milliseconds(times[str(n)]),
            "speed-up": ratio(times["1"], times[str(n)]),
            "steps compared": shared,
            "greatest difference of loss": float(np.abs(alone - losses[n][:shared]).max()),
        }
        for n in counts
    ]


def starts(settings: Settings) -> Figures:
    """Time the compilation of steps and attacks, and two starts of an experiment."""
    found: Figures = []
    for name in ("mlp", "lenet"):
        net, shape = make_net(name)
        x, y = some_images(settings.batch_size, shape)
        params = init(net, jax.random.key(0), x)
        tx = optax.sgd(1e-3, momentum=0.9)
        state = train.init(params, tx, key=jax.random.key(1))
        programs: dict[str, Callable[[], Any]] = {}
        for kind, objective in step_objectives(net, all_kinds=True).items():
            step: Any = train.make_step(objective, tx)
            programs[f"step: {kind}"] = partial(step.lower, state, (x, y))
        for kind, (method, _) in METHODS.items():
            compiled: Any = jax.jit(partial(method, function(net)))
            programs[f"attack: {kind}"] = partial(compiled.lower, params, x, y)
        for kind, lower in programs.items():
            start = time.perf_counter()
            lowered = lower()
            traced = time.perf_counter()
            lowered.compile()
            found.append(
                {
                    "net": name,
                    "program": kind,
                    "seconds to trace": round(traced - start, 2),
                    "to compile": round(time.perf_counter() - traced, 2),
                }
            )
    with tempfile.TemporaryDirectory() as folder:
        for start_ in ("first", "second"):
            found.append(
                {"program": f"mnist.py --quick, {start_} start", **_quick(Path(folder), start_)}
            )
    return found


QUICK = """
import sys, time
import jax.monitoring
seconds = {"compile": 0.0, "all": 0.0}
def heard(event, duration, **_):
    if event == "/jax/core/compile/backend_compile_duration":
        seconds["compile"] += duration
jax.monitoring.register_event_duration_secs_listener(heard)
from experiments import mnist
sys.argv = ["mnist.py", "--quick", "--out", sys.argv[1]]
start = time.perf_counter()
mnist.main()
seconds["all"] = time.perf_counter() - start
import json
print(json.dumps(seconds))
"""


def _quick(folder: Path, name: str) -> dict[str, Any]:
    environment = {"JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"), "PYTHONPATH": str(ROOT)}
    seconds = _child(["-c", QUICK, str(folder / name)], environment)
    return {
        "to compile": round(seconds["compile"], 2),
        "seconds in all": round(seconds["all"], 2),
    }


def in_child(part: Part, settings: Settings, *, devices: int) -> Figures:
    """Run a part in another process, in which CPU has so many devices; return its figures."""
    arguments = [str(Path(__file__)), "--parts", part, "--nets", *settings.nets]
    for name in ("batch_size", "rounds", "seconds"):
        arguments += [f"--{name.replace('_', '-')}", str(getattr(settings, name))]
    flags = f"--xla_force_host_platform_device_count={devices}"
    environment = {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()}
    with tempfile.TemporaryDirectory() as folder:
        _child([*arguments, "--out", folder], environment, parse=False)
        (row,) = report.load_rows(Path(folder) / "results.json")
        return list(row["figures"])


def _child(arguments: list[str], environment: Mapping[str, str], *, parse: bool = True) -> Any:
    """Run Python; return the JSON of the last line it prints, if asked to."""
    command = [sys.executable, *arguments]
    child = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, **environment}
    )
    if child.returncode and "not valid" not in child.stderr:
        raise RuntimeError(f"expected {command[1:3]} to succeed, got: {child.stderr[-2000:]}")
    return json.loads(child.stdout.splitlines()[-1]) if parse else None


RUN: Mapping[Part, Callable[[Settings], Figures]] = {
    "steps": steps,
    "loops": loops,
    "attacks": attacks,
    "growth": growth,
    "devices": devices,
    "starts": starts,
}


def as_markdown(rows: Iterable[report.Row]) -> str:
    """Return the figures of each part as a table."""
    lines = ["# Benchmark", ""]
    for row in rows:
        machine = row["machine"]
        lines += [
            f"## {row['part']}",
            "",
            f"On {row['device']}, jax {row['versions']['jax']}, {machine['gflops_at_start']:.0f} "
            f"GFLOP/s in 2048x2048 products before and {machine['gflops_at_end']:.0f} after; other "
            f"programs had {machine['cpu_of_others']:.1%} of the cores' time. Medians of "
            f"{row['settings']['rounds']} rounds, a third of it where calls take long; in brackets "
            "quartiles.",
            "",
            *(f"Not valid: {reason}.\n" for reason in machine["reasons"]),
        ]
        headings = list(dict.fromkeys(itertools.chain.from_iterable(row["figures"])))
        lines.append("| " + " | ".join(headings) + " |")
        lines.append("|---" * len(headings) + "|")
        for figure in row["figures"]:
            cells = (_cell(figure.get(heading, "")) for heading in headings)
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if isinstance(value, list):
        low, median, high = value
        return f"{median:.2f} ({low:.2f} to {high:.2f})"
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)


def run(settings: Settings, console: Console) -> list[report.Row]:
    """Measure the parts that are asked for; return the rows of these and of earlier runs."""
    results = settings.out / "results.json"
    settings.out.mkdir(parents=True, exist_ok=True)
    rows = report.load_rows(results)
    for part in settings.parts:
        quiet = timing.Quiet()
        start = time.perf_counter()
        row: report.Row = {
            "experiment": "benchmark",
            "part": part,
            "figures": RUN[part](settings),
            "machine": quiet.report(),
            "versions": report.versions() | (peers.versions() if has_peers() else {}),
            "device": report.device(),
            "settings": {
                key: value
                for key, value in dataclasses.asdict(settings).items()
                if key not in ("out", "parts")
            },
        }
        rows = [*(row for row in rows if row["part"] != part), row]
        rows.sort(key=lambda row: PARTS.index(row["part"]))
        report.save_rows(results, rows)
        (settings.out / "results.md").write_text(as_markdown(rows))
        console.print(f"{part}: {time.perf_counter() - start:.0f} s")
        for reason in row["machine"]["reasons"]:
            console.print(f"  not valid: {reason}")
    figures.draw(settings.out)
    console.print(f"Results and figures are in {settings.out}.")
    return rows


def main() -> None:
    """Run the benchmark from the command line."""
    settings = tyro.cli(Settings, description=__doc__)
    rows = run(settings, Console())
    invalid = [row["part"] for row in rows if not row["machine"]["valid"]]
    if set(invalid) & set(settings.parts):
        sys.exit(
            f"not valid, since the machine wasn't quiet: {', '.join(invalid)}; end what else runs, "
            f"and measure again with --parts {' '.join(invalid)}"
        )


if __name__ == "__main__":
    main()
