"""Time and memory of perturbations as batch, classes, steps and input size grow."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax

from experiments.benchmarks.common import Figures, Settings, milliseconds, some_images
from experiments.lib import models
from experiments.lib.models import Classifier, function, init
from experiments.lib.timing import in_turn
from jaxadv import attack, perturb

Case = tuple[str, str, int]
"""A net, a method, and the size that grows."""


def measured(grows: str, calls: Mapping[Case, tuple[Any, int]], settings: Settings) -> Figures:
    """Return microseconds per image and megabytes of working memory of compiled calls.

    Args:
      grows: the name of what grows.
      calls: for each case, a jitted function with its arguments bound, and its number of images.
      settings: how often to time it.
    """
    programs = {case: call.func.lower(*call.args).compile() for case, (call, _) in calls.items()}
    timed = {case: partial(programs[case], *call.args) for case, (call, _) in calls.items()}
    times = in_turn(timed, max(settings.rounds // 3, 1), seconds=settings.seconds)
    found: Figures = []
    for case, (_, n) in calls.items():
        net, method, size = case
        figure = {"net": net, "method": method, "what grows": grows, "to": size}
        figure["µs an image"] = milliseconds(times[case]) * 1e3 / n
        memory = programs[case].memory_analysis()
        if memory is not None:
            figure["MB"] = round(memory.temp_size_in_bytes / 1e6, 2)
        found.append(figure)
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

    digit = (28, 28, 1)
    images = {
        (name, method, n): call(net, perturbation, n, digit)
        for name, net in (("mlp", mlp), ("lenet", lenet))
        for method, perturbation in methods.items()
        for n in (1, 10, 128, 250, 1000, 10000)
        if not (name == "lenet" and n == 10000 and method == "Adv_Alpha")
    }
    for_many = {
        "Adv_Loss": methods["Adv_Loss"],
        "Adv_Alpha": methods["Adv_Alpha"],
        "Adv_Alpha, chunks of 50": partial(perturb.alpha, eps=1.5, chunk=50),
        "Adv_Alpha, 10 candidates": partial(perturb.alpha, eps=1.5, candidates=10),
    }
    classes = {
        ("mlp", method, k): call(dataclasses.replace(mlp, classes=k), perturbation, 100, digit)
        for method, perturbation in for_many.items()
        for k in (2, 10, 100, 1000)
        if not (k < 100 and "," in method)
    }
    steps = {
        ("mlp", "PGD", n): call(mlp, partial(attack.pgd, eps=1.5, steps=n), 100, digit)
        for n in (1, 10, 100, 1000)
    }
    small = models.vgg((64, 64), width=0.125)
    sides = {
        ("vgg-0.125", method, side): call(small, methods[method], 8, (side, side, 3))
        for method in ("Adv_Loss", "Adv_Alpha")
        for side in (28, 56, 112, 224)
    }
    grown = {"images": images, "classes": classes, "steps": steps, "pixels a side": sides}
    return [figure for grows, calls in grown.items() for figure in measured(grows, calls, settings)]
