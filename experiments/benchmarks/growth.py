"""What batch, classes, steps and input size cost, in time and memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax

from experiments.benchmarks.common import Call, Figures, Settings, milliseconds, some_images
from experiments.lib import models
from experiments.lib.models import Classifier, function, init
from experiments.lib.timing import in_turn
from jaxadv import attack, perturb


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


def run(settings: Settings) -> Figures:
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
