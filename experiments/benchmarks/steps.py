"""Training steps, by themselves and in epochs, compared with floors and with PyTorch."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks import common
from experiments.compare import libraries, pytorch
from experiments.lib import parallel, records, timing
from experiments.lib.models import Classifier, init
from experiments.lib.timing import Call, in_turn

LARGE = ("vgg-0.5", "vgg-1")  # their steps take seconds
# Enough steps to spread a call's one-off costs, such as allocating memory, as a real epoch does.
EPOCH_STEPS = {"mlp": 20, "lenet": 20, "vgg-0.25": 10, "vgg-0.5": 10, "vgg-1": 5}


def products(net: Classifier, n_inputs: int, batch: int) -> dict[str, Call]:
    """Return the compiled matrix products of a dense net, one of each kind for each layer."""
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


def before_split(net: Classifier) -> int:
    """Return how many layers come before LWA_Rep's representation."""
    in_blocks = sum(len(block) for block in net.blocks[: net.split])
    return in_blocks + max(0, net.split - len(net.blocks))


def floors(seconds: Mapping[str, Any], layers: int, split: int) -> dict[str, Any]:
    """Return the total time of the products in each kind of step.

    Args:
      seconds: the time of each product, named as in `products`.
      layers: number of layers.
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


def counted(flops: Sequence[int], classes: int, batch: int, rate: Any) -> dict[str, Any]:
    """Return the time of each product, named as in `products`, at a given rate of operations."""
    seconds = {}
    for layer, count in enumerate(flops):
        for kind in ("forward", "weights", "input"):
            seconds[f"{kind} {layer}"] = count * batch / rate
        seconds[f"inputs {layer}"] = (classes - 1) * count * batch / rate
    return seconds


def run(settings: common.Settings) -> common.Figures:
    """Time training steps, and compare with floors and with PyTorch."""
    found: common.Figures = []
    several = jax.device_count() > 1
    for name in settings.nets:
        net, shape = common.make_net(name)
        large = name in LARGE
        epoch_steps = EPOCH_STEPS[name]
        x, y = common.some_images(settings.batch_size, shape)
        params = init(net, jax.random.key(0), x)
        kinds = common.step_objectives(net, all_kinds=not large and not several)
        mesh = parallel.mesh(parallel.Devices(), len(x))
        calls = common.training_calls(kinds, params, x, y, epoch_steps, mesh)
        calls["rate"] = timing.matrix_products()
        if not net.blocks:
            calls |= products(net, int(np.prod(shape)), len(x))
        theirs = {"plain": None, "LWA": 1.5} if libraries.installed() else {}
        for kind, eps in theirs.items():
            calls[f"{kind}, PyTorch"] = pytorch.training(params, *map(np.asarray, (x, y)), eps=eps)
        rounds = settings.rounds // 3 if name.startswith("vgg") else settings.rounds
        times = in_turn(calls, max(rounds, 1), seconds=settings.seconds)
        rate = 2 * 2048**3 / times["rate"]
        flops = timing.flops(net, params, x[:1])
        seconds = times if not net.blocks else counted(flops, net.classes, len(x), rate)
        floor = floors(seconds, len(flops), before_split(net))
        for kind, way in itertools.product(kinds, ("step", "epoch")):
            taken = times[f"{kind}, {way}"] / (epoch_steps if way == "epoch" else 1)
            figure = {
                "net": name,
                "objective": kind,
                "called": "by itself" if way == "step" else "in an epoch",
                "devices": mesh.size if mesh else 1,
                "ms": common.milliseconds(taken),
                "floor ms": common.milliseconds(floor[kind]),
                "floor / time": common.ratio(floor[kind], taken),
            }
            if kind in theirs:
                figure["PyTorch ms"] = common.milliseconds(times[f"{kind}, PyTorch"])
                figure["PyTorch / time"] = common.ratio(times[f"{kind}, PyTorch"], taken)
            found.append(figure)
    if jax.default_backend() == "cpu" and not several and records.cores() > 1:
        found += common.in_child("steps", settings, devices=records.cores())
    return found
