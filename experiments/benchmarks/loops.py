"""The library's loops over a user's own convolutional net, compared with loops in Python."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from experiments.benchmarks import common
from experiments.lib.models import init
from experiments.lib.timing import in_turn
from jaxadv import attack, objectives, perturb


class PlainNet(nn.Module):
    """A net as users of flax write it."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return logits `[B, 10]` of images `[B, H, W, C]`."""
        for features in (32, 64):
            x = nn.relu(nn.Conv(features, (3, 3), strides=2)(x))
        return nn.Dense(10)(nn.relu(nn.Dense(128)(x.reshape(len(x), -1))))


def run(settings: common.Settings) -> common.Figures:
    """Time the library's loops over a user's convolutions, and compare with loops in Python."""
    net = PlainNet()

    def apply_fn(params: Any, x: jax.Array, /) -> Any:
        return net.apply(params, x)

    x, _ = common.some_images(settings.batch_size, (28, 28, 1))
    x = 0.5 + 1e-4 * x  # in so narrow a box that no attack succeeds, so that all iterations run
    params = init(net, jax.random.key(0), x)
    y = apply_fn(params, x).argmax(-1).astype(jnp.int32)
    n = 10
    kinds = {
        "plain": objectives.natural(apply_fn),
        "LWA": objectives.adversarial(apply_fn, perturb.loss, eps=1.5),
        "LWA, Adv_Alpha": objectives.adversarial(apply_fn, perturb.alpha, eps=1.5),
    }
    calls = common.training_calls(kinds, params, x, y, n)
    # Each with a single step that takes as many passes as one iteration; DeepFool's iteration takes
    # two more forward passes.
    attacks = {
        "PGD": (partial(attack.pgd, eps=1e-4, steps=n), partial(perturb.loss, eps=1e-4)),
        "APGD": (
            partial(attack.apgd, eps=1e-4, steps=n, key=jax.random.key(0)),
            partial(perturb.loss, eps=1e-4),
        ),
        "DeepFool": (
            partial(attack.deepfool, steps=n, bounds=(0.5, 0.5001)),
            partial(perturb.alpha, eps=1e-4),
        ),
    }
    for name, (loop, step) in attacks.items():
        for way, method in (("step", step), ("epoch", loop)):
            calls[f"{name}, {way}"] = partial(jax.jit(partial(method, apply_fn)), params, x, y)
    times = in_turn(calls, settings.rounds, seconds=settings.seconds)
    return [
        {
            "loop": f"{'make_epoch, ' if name in kinds else 'attack: '}{name}",
            "ms, an iteration": common.milliseconds(times[f"{name}, epoch"] / n),
            "outside, ms": common.milliseconds(times[f"{name}, step"]),
            "outside / inside": common.ratio(times[f"{name}, step"], times[f"{name}, epoch"] / n),
        }
        for name in (*kinds, *attacks)
    ]
