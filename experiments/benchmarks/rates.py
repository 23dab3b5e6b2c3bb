"""Training steps and attacks per second, relative to matrix products, up to ResNet-50's size."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax

from experiments.benchmarks import common
from experiments.lib import models, timing
from jaxadv import attack, perturb
from jaxadv.types import PerturbFn

STEPS = {"plain, step": 3, "LWA, step": 5}
"""How many passes over the net's products each step takes."""


class ResNet(nn.Module):
    """ResNet-50 (He et al., 2015) with group norm, so that images don't affect each other's logits.

    Attributes:
      depths: number of bottleneck blocks in each stage.
      width: channels of the first stage's 3x3 convolutions, doubled from stage to stage.
      classes: K.
      dtype: dtype of the hidden layers' arithmetic; parameters and logits are float32.
    """

    depths: Sequence[int] = (3, 4, 6, 3)
    width: int = 64
    classes: int = 1000
    dtype: jnp.dtype = jnp.dtype("float32")

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return logits `[B, K]` of images `[B, H, W, C]`."""
        conv = partial(nn.Conv, use_bias=False, dtype=self.dtype)
        norm = partial(nn.GroupNorm, dtype=self.dtype)
        h = nn.relu(norm()(conv(self.width, (7, 7), 2)(x)))
        h = lax.reduce_window(h, -jnp.inf, lax.max, (1, 3, 3, 1), (1, 2, 2, 1), "SAME")
        for stage, depth in enumerate(self.depths):
            width = self.width * 2**stage
            for block in range(depth):
                stride = 2 if stage and not block else 1
                out = nn.relu(norm()(conv(width, (1, 1))(h)))
                out = nn.relu(norm()(conv(width, (3, 3), stride)(out)))
                out = norm()(conv(4 * width, (1, 1))(out))
                if h.shape != out.shape:
                    h = norm()(conv(4 * width, (1, 1), stride)(h))
                h = nn.relu(h + out)
        return nn.Dense(self.classes)(h.mean((1, 2)).astype(jnp.float32))


class Attack(NamedTuple):
    """An attack to time.

    Attributes:
      method: the attack.
      n: how many images it perturbs.
      passes: how many passes over the net's products it takes, forward and backward to the image.
    """

    method: PerturbFn
    n: int
    passes: int


class Load(NamedTuple):
    """A net whose training steps and attacks are timed.

    Attributes:
      name: what to call it.
      net: the net, in float32.
      shape: shape of an image.
      batch: images per training step.
      attacks: the attacks, by name.
    """

    name: str
    net: nn.Module
    shape: tuple[int, ...]
    batch: int
    attacks: Mapping[str, Attack]


def loads(*, quick: bool) -> list[Load]:
    """Return the nets and attacks to time; only a few of them in a short run."""
    pgd, alpha = partial(attack.pgd, eps=1.5, steps=10), partial(perturb.alpha, eps=1.5)

    def small_net(name: str, batch: int) -> Load:
        attacks = {"PGD-10": Attack(pgd, batch, 20), "Adv_Alpha": Attack(alpha, batch, 10)}
        return Load(name, *common.make_net(name), batch, attacks)

    def many_classes(classes: int, n: int, chunk: int, candidates: int) -> dict[str, Attack]:
        few = partial(alpha, candidates=candidates)
        return {
            # An eighth of the images, since memory holds a backward pass for each class.
            f"Adv_Alpha, all {classes - 1} classes": Attack(alpha, n // 8, classes),
            f"Adv_Alpha, chunk={chunk}": Attack(partial(alpha, chunk=chunk), n, classes),
            f"Adv_Alpha, candidates={candidates}": Attack(few, n, 1 + candidates),
        }

    if quick:
        net = ResNet(depths=(1,), width=32, classes=20)
        few = Load("ResNet of one block", net, (32, 32, 3), 8, many_classes(20, 8, 5, 3))
        return [small_net("mlp", 100), few]
    attacks = {"PGD-10": Attack(pgd, 64, 20), **many_classes(1000, 8, 50, 10)}
    large = Load("ResNet-50", ResNet(), (224, 224, 3), 64, attacks)
    return [*(small_net(name, 500) for name in ("mlp", "lenet", "vgg-1")), large]


def run(*, quick: bool, done: Callable[..., bool]) -> Iterator[dict[str, Any]]:
    """Time each call in turn with a product of large matrices in the same precision.

    Args:
      quick: whether this is a short run.
      done: returns whether a figure with these entries exists already.

    Yields:
      A figure for each net, precision and call.
    """
    rounds, seconds = (1, 0.05) if quick else (5, 0.1)
    size = 512 if quick else 2048 if jax.default_backend() == "cpu" else 8192
    for load in loads(quick=quick):
        for dtype in ("bfloat16",) if quick else ("float32", "bfloat16"):
            net = load.net.clone(dtype=jnp.dtype(dtype))
            apply_fn = models.function(net)
            x, y = common.some_images(load.batch, load.shape, net.classes)
            params = models.init(net, jax.random.key(0), x[:1])
            steps = common.step_objectives(net, all_kinds=False)
            step_calls = common.training_calls(steps, params, x, y, epoch_steps=1)
            calls = {name: (step_calls[name], load.batch, passes) for name, passes in STEPS.items()}
            for name, (method, n, passes) in load.attacks.items():
                compiled = jax.jit(partial(method, apply_fn))
                calls[name] = partial(compiled, params, x[:n], y[:n]), n, passes
            forward = sum(timing.flops(net, params, x[:1]))
            for name, (call, n, passes) in calls.items():
                identity = {"net": load.name, "dtype": dtype, "call": name, "images": n}
                if not done(**identity):
                    product = timing.matrix_products(size, dtype)
                    try:
                        times = timing.in_turn({"": call, "rate": product}, rounds, seconds=seconds)
                    except jax.errors.JaxRuntimeError as error:  # most likely out of memory
                        why = str(error).splitlines()[0]
                        yield identity | {"failure": f"{load.name}, {dtype}, {name}: {why}"}
                        continue
                    rate = 2 * size**3 / times["rate"]
                    yield identity | {
                        "images a second": n / float(np.median(times[""])),
                        "calls a second": 1 / float(np.median(times[""])),
                        "TFLOP/s of products": float(np.median(rate)) / 1e12,
                        "share": common.ratio(passes * n * forward / rate, times[""]),
                    }
