"""Speed of perturbing test images, compared with floors and with other libraries."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks.common import Figures, Settings, ratio
from experiments.compare import libraries
from experiments.lib import models, problems, timing
from experiments.lib.timing import Call, in_turn
from jaxadv import attack, perturb

BOX, KEY = (0.0, 1.0), jax.random.key(0)
# With the number of passes over the net that each takes; 0 if it varies.
METHODS: Mapping[str, tuple[Any, int]] = {
    "Adv_Loss": (partial(perturb.loss, eps=1.5), 2),
    "Adv_Loss_Sign": (partial(perturb.loss_sign, eps=1.5), 2),
    "Adv_Alpha": (partial(perturb.alpha, eps=1.5), 10),
    "Miyato": (partial(perturb.vat, eps=1.5, key=KEY), 0),
    "one step": (partial(perturb.loss, eps=1.5, bounds=BOX), 2),
    "PGD-40": (partial(attack.pgd, eps=1.5, steps=40, bounds=BOX), 80),
    "APGD-CE, 100 steps": (partial(attack.apgd, eps=1.5, steps=100, bounds=BOX, key=KEY), 200),
    "DeepFool": (partial(attack.deepfool, steps=50, bounds=BOX), 0),
    "FMN, 100 steps": (partial(attack.fmn, steps=100, bounds=BOX), 0),
    "FAB-T, 10 steps": (partial(attack.fab, eps=1.5, steps=10, bounds=BOX), 0),
    "Square, 100 queries": (partial(attack.square, eps=1.5, steps=100, bounds=BOX, key=KEY), 100),
}


def run(settings: Settings) -> Figures:
    """Time perturbations of test images, and compare with floors and with other libraries."""
    found: Figures = []
    for name in ("mlp", "lenet"):
        problem = problems.recorded(f"mnist_{name}/lwa", settings.n)
        x, y = jnp.asarray(problem.x), jnp.asarray(problem.y)
        net = models.recognised(problem.params, x.shape[1:])
        # DeepFool on 1,000 images takes some libraries many minutes on a convolutional net.
        counts = {method: len(x) for method in METHODS}
        if net.blocks:
            counts["DeepFool"] = max(len(x) // 10, 1)
        calls: dict[str, Call] = {}
        for method, (perturbation, _) in METHODS.items():
            n = counts[method]
            compiled = jax.jit(partial(perturbation, problem.apply_fn))
            calls[method] = partial(compiled, problem.params, x[:n], y[:n])
        of_peers: dict[str, dict[str, Call]] = {}
        for task in libraries.TASKS if libraries.installed() else ():
            n = counts[task]
            of_peers[task] = libraries.attacks(
                problem.params, problem.x[:n], problem.y[:n], eps=1.5, task=task
            )
            calls |= {f"{task}, {peer}": call for peer, call in of_peers[task].items()}
        rate = {"rate": timing.matrix_products()}
        rounds = max(settings.rounds // 3, 1)
        times = in_turn(calls | rate, rounds, seconds=settings.seconds)
        forward = sum(timing.flops(net, problem.params, x[:1])) / (2 * 2048**3 / times["rate"])
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
