"""Ensembles: attacks by name, which `attack_and_score` runs in turn.

A single attack may fail for reasons that have nothing to do with robustness. AutoAttack (Croce and
Hein, 2020) takes the worst case over four attacks that fail for different reasons: `attack.apgd` on
cross-entropy, `attack.apgd_multitargeted`, `attack.fab`, and `attack.square`, which uses no
gradients. The fast ensemble consists of the same attacks, most of which run only on examples near
the decision boundary.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from types import MappingProxyType
from typing import Any

import jax

from jaxadv import attack, closures, inputs, losses, norms
from jaxadv.types import Norm, PerturbFn

__all__ = ["NearBoundary", "autoattack", "fast_autoattack", "within_of"]


def autoattack(norm: Norm = "l2", *, samples: int = 0) -> Mapping[str, PerturbFn]:
    """The attacks of AutoAttack, the standard ensemble, with their published budgets.

    `apgd-ce`: 100 steps (l1: 5 restarts). `apgd-t`: 100 steps for each of 9 targets (l1: 5).
    `fab-t`: 100 steps for each of 9 targets. `square`: 5000 queries.

    For a net that draws random numbers there are two, `apgd-ce` and `apgd-dlr`, 100 steps each:
    the published `rand` version. They attack the random net, and their results are scored on its
    mean prediction: `attack_and_score(nets.mean_of_draws(net, key), params, x, y,
    autoattack(samples=20), source=(net, params), ...)`.

    Args:
      norm: `"l1"`, `"l2"` or `"linf"`.
      samples: 0 for a deterministic net; for a random net the number of draws that each gradient is
        averaged over, 20 as published.

    Returns:
      Attacks by name, read-only (`dict` makes a copy to change); each call returns the same
      objects, so that they are compiled once.

    Raises:
      ValueError: if the norm is unknown, or `samples` < 0.

    Example:
      >>> from jaxadv import evaluate
      >>> list(evaluate.autoattack("linf"))
      ['apgd-ce', 'apgd-t', 'fab-t', 'square']

    References:
      Croce and Hein, "Reliable evaluation of adversarial robustness with an ensemble of diverse
      parameter-free attacks", 2020; for l1 "Mind the box: l1-APGD for sparse adversarial attacks on
      image classifiers", 2021.
    """
    norms.dual(norm)  # raises if the norm is unknown
    inputs.at_least(0, "samples", samples, "0 is for a deterministic net")
    return _autoattack(norm, samples)


@cache
def _autoattack(norm: Norm, samples: int) -> Mapping[str, PerturbFn]:
    sparse = norm == "l1"
    if samples:
        ascend = partial(attack.apgd, norm=norm, samples=samples)
        return MappingProxyType({
            "apgd-ce": ascend,
            "apgd-dlr": partial(ascend, loss_fn=losses.dlr),
        })  # fmt: skip
    attacks: dict[str, PerturbFn] = {
        "apgd-ce": partial(attack.apgd, norm=norm, restarts=5 if sparse else 1),
        "apgd-t": partial(attack.apgd_multitargeted, norm=norm, n_targets=5 if sparse else 9),
        "fab-t": partial(attack.fab, norm=norm, n_targets=9),
        "square": partial(attack.square, norm=norm),
    }
    return MappingProxyType(attacks)  # shared by all callers


def fast_autoattack(norm: Norm = "l2") -> Mapping[str, PerturbFn]:
    """A fast ensemble: AutoAttack's attacks, reordered and shortened to a fraction of its passes.

    A few steps break most examples that can be broken. Next come the targets with the nearest
    linearised boundaries (MALT). Longer attacks on more targets, and with FAB, run only on the
    remaining examples near the decision boundary. Square runs on all remaining examples, for as
    long as it makes progress. For figures that you publish, request an audit:
    `attack_and_score(..., fast_autoattack("l2"), audit=0.05)` also runs AutoAttack, on a fraction
    of the examples.

    The settings were chosen for l2 and linf, on training images and five recorded nets; those for
    l1 are the same, and untested.

    Args:
      norm: `"l1"`, `"l2"` or `"linf"`.

    Returns:
      Attacks by name, read-only (`dict` makes a copy to change); each call returns the same
      objects, so that they are compiled once.

    Raises:
      ValueError: if the norm is unknown.

    Example:
      >>> from jaxadv import evaluate
      >>> list(evaluate.fast_autoattack("linf"))[:3]
      ['apgd-ce-5', 'apgd-t1-15', 'fab-t1-30']

    References:
      Croce and Hein, 2020; Melamed et al., "MALT Powers Up Adversarial Attacks", 2024.
    """
    norms.dual(norm)  # raises if the norm is unknown
    return _fast_autoattack(norm)


@cache
def _fast_autoattack(norm: Norm) -> Mapping[str, PerturbFn]:
    ascend = partial(attack.apgd, norm=norm)
    targeted = partial(attack.apgd_multitargeted, norm=norm)
    nearest = partial(targeted, order="distance")
    fab = partial(attack.fab, norm=norm)
    attacks: dict[str, PerturbFn] = {
        "apgd-ce-5": partial(ascend, steps=5),
        "apgd-t1-15": partial(nearest, steps=15, n_targets=1),
        "fab-t1-30": partial(fab, steps=30, n_targets=1),
        "apgd-t3-30": partial(nearest, steps=30, n_targets=3),
        "apgd-t5-20": NearBoundary(partial(nearest, steps=20, n_targets=5), within=0.3),
        "apgd-ce-50": NearBoundary(partial(ascend, steps=50), within=0.15),
        "apgd-t5-60": NearBoundary(partial(nearest, steps=60, n_targets=5), within=0.07),
        "fab-t9-60": NearBoundary(partial(fab, steps=60), within=0.05),
        "apgd-ce-100": NearBoundary(partial(ascend, steps=100), within=0.07),
        "apgd-t9-60": NearBoundary(partial(targeted, steps=60), within=0.03),
        "square": partial(attack.square, norm=norm, steps=1000, patience=50),
    }
    return MappingProxyType(attacks)


@dataclass(frozen=True)
class NearBoundary:
    """An attack that an ensemble runs only on examples near the decision boundary.

    These are the examples for which an earlier attack has reduced the true class's lead over the
    top wrong class to at most the fraction `within`. There an expensive attack pays off; elsewhere
    it finds almost nothing, unless gradients are misleading. So if it breaks more than a fiftieth
    of these examples, it continues with those within twice the fraction, and so on. As the first
    attack it runs on nothing, unless `within` is 1. Called directly, it is `method`.

    Attributes:
      method: the attack.
      within: the largest remaining fraction of the lead to begin with, in (0, 1].

    Example:
      >>> from jaxadv import attack, evaluate
      >>> attacks = {"pgd": attack.pgd, "fab": evaluate.NearBoundary(attack.fab, within=0.1)}
    """

    method: PerturbFn
    within: float

    def __post_init__(self) -> None:
        """Check the arguments.

        Raises:
          TypeError: if the method isn't a hashable function with the signature of attacks.
          ValueError: if `within` isn't in (0, 1].
        """
        closures.method("the attack", self.method)
        object.__setattr__(self, "__signature__", inspect.signature(self.method))
        if not 0 < self.within <= 1:
            raise ValueError(f"expected 0 < within <= 1, got {self.within}; pass a fraction")

    def __call__(self, *args: Any, **kwargs: Any) -> jax.Array:
        """Attack all examples."""
        return self.method(*args, **kwargs)

    @property
    def with_report(self) -> Callable[..., Any] | None:
        """The attack with its report, for `attack.with_info`; None if it makes no report."""
        try:
            return attack.with_info(self.method)
        except TypeError:
            return None


def within_of(method: Any) -> float:
    """Return the largest remaining fraction of the lead for which an attack is run."""
    while isinstance(method, partial):
        method = method.func
    return method.within if isinstance(method, NearBoundary) else math.inf
