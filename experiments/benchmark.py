"""How near the training steps come to the time of their own matrix products.

    python experiments/benchmark.py

Times plain, LWA and LWA-with-Adv_Alpha steps of the 500x500 net at batch 100 against the summed
time of the products that such a step can't do without, of the same shapes, forward and transposed,
each timed by itself in the same run:

- forward `[B, i] x [i, o]` of each layer: once for the trained pass, once more for the adversary's;
- weight gradients `[i, B] x [B, o]` of each layer: once;
- gradients to a layer's input `[M, o] x [o, i]`: down to the second layer for the trained pass (M =
  B); down to the image for the adversary, with M = B for Adv_Loss and (K - 1) B for Adv_Alpha.

Prints products / step for each, for steps called one by one (`train.make_step`) and for those of an
epoch on the device (`train.make_epoch`, as the experiments train): 1 means that everything else is
free. Beside them, how many times longer Adv_Alpha takes than Adv_Loss, perturbations alone, which
Section 7.1 of the paper puts at K, for the same net and for LeNet. All are timed in turn in every
round and the median over rounds is quoted, since a machine's speed drifts.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, from anywhere

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

from experiments import report
from experiments.models import function, init, lenet, mlp
from jaxadv import objectives, perturb, train


@dataclasses.dataclass(frozen=True)
class Settings:
    """Time training steps against their own matrix products."""

    widths: tuple[int, ...] = (500, 500)
    """Sizes of the hidden layers."""
    batch_size: int = 100
    """Images per step."""
    rounds: int = 15
    """How often everything is timed; the median is quoted."""
    seconds: float = 0.1
    """Least time of one timing; calls are repeated until then."""
    epoch_steps: int = 40
    """Steps in the epoch that is timed."""
    out: Path | None = None
    """A JSON file to write the figures to."""


Call = Callable[[], Any]


def products(settings: Settings, n_inputs: int = 784, n_classes: int = 10) -> dict[str, Call]:
    """Return one compiled matrix product for each kind and layer."""
    sizes = (n_inputs, *settings.widths, n_classes)
    rng = np.random.default_rng(0)

    def array(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    dot = jax.jit(jnp.matmul)
    left_transposed = jax.jit(lambda a, b: a.T @ b)
    right_transposed = jax.jit(lambda a, b: a @ b.T)
    batch = settings.batch_size
    calls: dict[str, Call] = {}
    for layer, (i, o) in enumerate(itertools.pairwise(sizes)):
        w, h, g = array(i, o), array(batch, i), array(batch, o)
        gs = array((n_classes - 1) * batch, o)
        calls[f"forward {layer}"] = partial(dot, h, w)
        calls[f"weights {layer}"] = partial(left_transposed, h, g)
        calls[f"input {layer}"] = partial(right_transposed, g, w)
        calls[f"inputs {layer}"] = partial(right_transposed, gs, w)
    return calls


def floors(seconds: dict[str, float], layers: int) -> dict[str, float]:
    """Return the summed time of each step's products."""
    forward, weights, back, backs = (
        [seconds[f"{kind} {layer}"] for layer in range(layers)]
        for kind in ("forward", "weights", "input", "inputs")
    )
    plain = sum(forward) + sum(weights) + sum(back[1:])
    return {
        "plain": plain,
        "lwa": plain + sum(forward) + sum(back),
        "lwa_alpha": plain + sum(forward) + sum(backs),
    }


def steps(settings: Settings) -> dict[str, Call]:
    """Return compiled training steps for each method, one and an epoch, which carry their state."""
    net = mlp(settings.widths)
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.random((settings.batch_size, 28, 28, 1)), jnp.float32)
    y = jnp.asarray(rng.integers(0, 10, settings.batch_size), jnp.int32)
    params = init(net, jax.random.key(0), x)
    apply_fn, tx = function(net), optax.sgd(1e-3, momentum=0.9)
    kinds = {
        "plain": objectives.natural(apply_fn),
        "lwa": objectives.adversarial(apply_fn, perturb.loss, eps=1.5),
        "lwa_alpha": objectives.adversarial(apply_fn, perturb.alpha, eps=1.5),
    }

    order = jnp.tile(jnp.arange(settings.batch_size), (settings.epoch_steps, 1))

    def call(compiled: Any, *inputs: Any) -> Call:
        state = train.init(params, tx, key=jax.random.key(1))

        def go() -> Any:
            nonlocal state
            state, info = compiled(state, *inputs)
            return info.loss

        return go

    calls = {}
    for name, objective in kinds.items():
        calls[name] = call(train.make_step(objective, tx), (x, y))
        calls[f"{name} epoch"] = call(train.make_epoch(objective, tx), (x, y), order)
    return calls


def perturbations(settings: Settings) -> dict[str, Call]:
    """Return compiled perturbations of a batch, by net and method."""
    rng = np.random.default_rng(2)
    x = jnp.asarray(rng.random((settings.batch_size, 28, 28, 1)), jnp.float32)
    y = jnp.asarray(rng.integers(0, 10, settings.batch_size), jnp.int32)
    calls: dict[str, Call] = {}
    for name, net in (("mlp", mlp(settings.widths)), ("lenet", lenet(settings.widths[-1:]))):
        params = init(net, jax.random.key(0), x)
        for kind, method in (("adv_loss", perturb.loss), ("adv_alpha", perturb.alpha)):
            compiled = jax.jit(partial(method, function(net), eps=1.5))
            calls[f"{name} {kind}"] = partial(compiled, params, x, y)
    return calls


def time_of(call: Call, seconds: float) -> float:
    """Return the time of one call, in seconds, from as many as fill the time given."""
    jax.block_until_ready(call())
    n, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds:
        for _ in range(5):
            result = call()
        jax.block_until_ready(result)
        n += 5
    return elapsed / n


def spread(ratios: np.ndarray) -> dict[str, Any]:
    """Return the median and the quartiles of a ratio over rounds."""
    return {
        "ratio": float(np.median(ratios)),
        "ratio_quartiles": np.quantile(ratios, [0.25, 0.75]).tolist(),
    }


def main() -> None:
    """Run the benchmark from the command line."""
    settings = tyro.cli(Settings, description=__doc__)
    load = os.getloadavg()[0]
    if load > 0.5:
        print(f"note: the load average is {load:.2f}: other work makes these ratios unreliable")
    kernels, kinds, methods = products(settings), steps(settings), perturbations(settings)
    rounds, costs = [], []
    for _ in range(settings.rounds):
        seconds = {name: time_of(call, settings.seconds) for name, call in kernels.items()}
        least = floors(seconds, len(settings.widths) + 1)
        taken = {}
        for name, call in kinds.items():
            of_call = time_of(call, settings.seconds)
            taken[name] = of_call / settings.epoch_steps if name.endswith("epoch") else of_call
        costs.append({name: time_of(call, settings.seconds) for name, call in methods.items()})
        rounds.append({name: (least[name.split()[0]], taken[name]) for name in taken})

    figures = {}
    for name in kinds:
        of_products, of_steps = np.array([r[name] for r in rounds]).T
        figures[name] = {
            "products_ms": float(np.median(of_products) * 1e3),
            "step_ms": float(np.median(of_steps) * 1e3),
            **spread(of_products / of_steps),
        }
        print(
            "{:15} products {products_ms:6.2f} ms   step {step_ms:6.2f} ms   products / step "
            "{ratio:.2f} (quartiles {ratio_quartiles[0]:.2f} to {ratio_quartiles[1]:.2f})".format(
                name, **figures[name]
            )
        )
    cost = {}
    for net in ("mlp", "lenet"):
        loss, alpha = (
            np.array([c[f"{net} {kind}"] for c in costs]) for kind in ("adv_loss", "adv_alpha")
        )
        cost[net] = {
            "adv_loss_ms": float(np.median(loss) * 1e3),
            "adv_alpha_ms": float(np.median(alpha) * 1e3),
            **spread(alpha / loss),
        }
        print(
            "{:15} Adv_Loss {adv_loss_ms:6.2f} ms   Adv_Alpha {adv_alpha_ms:6.2f} ms   {ratio:.2f} "
            "times (quartiles {ratio_quartiles[0]:.2f} to {ratio_quartiles[1]:.2f}), K = 10".format(
                net, **cost[net]
            )
        )
    if settings.out is not None:
        record = {
            "figures": figures,
            "cost_of_alpha": cost,
            "settings": {k: v for k, v in dataclasses.asdict(settings).items() if k != "out"},
            "load_average": load,
            "versions": report.versions(),
            "device": report.device(),
        }
        settings.out.parent.mkdir(parents=True, exist_ok=True)
        settings.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
