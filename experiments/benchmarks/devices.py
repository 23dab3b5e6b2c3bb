"""Training steps on one batch, spread over more and more devices."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import optax

from experiments.benchmarks import common
from experiments.lib import models, parallel
from experiments.lib.models import function, init
from experiments.lib.timing import Call, in_turn
from jaxadv import objectives, perturb, train


def run(settings: common.Settings) -> common.Figures:
    """Time a training step of LWA on one batch, spread over more and more devices."""
    if jax.device_count() == 1 and jax.default_backend() == "cpu":
        return common.in_child("devices", settings, devices=8)
    net, tx = models.mlp((500, 500)), optax.sgd(0.1, momentum=0.9)
    x, y = common.some_images(1024, (28, 28, 1))
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
            "ms a step of 1,024 images": common.milliseconds(times[str(n)]),
            "speed-up": common.ratio(times["1"], times[str(n)]),
            "steps compared": shared,
            "greatest difference of loss": float(np.abs(alone - losses[n][:shared]).max()),
        }
        for n in counts
    ]
