"""An attack's norm and number of passes, and checks that perturbations keep to eps and the box.

The norm is given once, to the attack (`functools.partial(attack.pgd, norm="linf")`), and evaluation
reads it from there. A perturbation that is larger than eps in this norm, or leaves the box, makes
every figure based on it wrong, so it raises an error.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from jaxadv import attack, closures, host, norms, perturb
from jaxadv.attack._apgd import RANKED, phases_of
from jaxadv.attack._fmn import CLASSES
from jaxadv.evaluate._attacks import NearBoundary
from jaxadv.evaluate._batches import Passes
from jaxadv.types import Bounds, Eps, Norm, PerturbFn

__all__ = ["counted", "keep", "most", "named", "norm_of"]

_COUNTED = (
    attack.apgd, attack.apgd_multitargeted, attack.fab, attack.fmn, attack.pgd, attack.square,
)  # fmt: skip


def named(attacks: Mapping[str, PerturbFn], *, example: str, default: str) -> None:
    """Check attacks by name; a single attack's name is empty.

    Args:
      attacks: the attacks.
      example: what to pass instead.
      default: the attacks that None stands for.

    Raises:
      TypeError: if they aren't a mapping, or one isn't a hashable function with the signature of
        attacks.
      ValueError: if there are none.
    """
    if not isinstance(attacks, Mapping):
        raise TypeError(
            f"expected attacks by name, got {type(attacks).__name__}; pass {example}, or None for "
            f"{default}"
        )
    if not attacks:
        raise ValueError(f"expected at least one attack, got none; pass None for {default}")
    for name, method in attacks.items():
        closures.method(f"attack {name!r}" if name else "the attack", method)


def norm_of(attacks: Iterable[PerturbFn], norm: Norm | None) -> Norm:
    """Return the norm of some attacks: `norm`, or the one that they are set to, or else l2.

    Raises:
      ValueError: if they contradict each other or `norm`, or the norm is unknown.
    """
    own = {closures.preset(method, "norm") for method in attacks} - {None}
    if norm is not None:
        norms.dual(norm)  # raises if the norm is unknown
        own.add(norm)
    if len(own) > 1:
        raise ValueError(
            f"expected one norm, got {sorted(own)}; set it once, in the attack: e.g. "
            'partial(attack.pgd, norm="linf") or evaluate.autoattack("linf")'
        )
    return own.pop() if own else "l2"


def counted(method: PerturbFn) -> Callable[..., tuple[Any, Passes | None]]:
    """Make an attack return r and its passes, `[B]`; None if it doesn't count them."""
    try:
        reporting = attack.with_info(method)
    except TypeError:
        return lambda *args, **kwargs: (method(*args, **kwargs), None)

    def counting(*args: Any, **kwargs: Any) -> tuple[Any, Passes | None]:
        r, info = reporting(*args, **kwargs)
        return r, Passes(info.forward, info.backward)

    return counting


def most(method: PerturbFn, n_classes: int) -> Passes | None:
    """Return the maximum number of passes, at a given eps, on an example that an attack can't fool.

    It is known for one step, and for the attacks of the ensembles and of `check`; else None.
    """
    own: Any = method
    while isinstance(own, partial | NearBoundary):
        own = own.func if isinstance(own, partial) else own.method
    if own is perturb.loss:
        return Passes(1, 2)  # the second where y and the top wrong class have the same gradient
    if own not in _COUNTED:
        return None
    given: dict[str, Any] = {
        name: parameter.default for name, parameter in inspect.signature(method).parameters.items()
    }
    others = n_classes - 1
    steps, draws = given["steps"], max(given.get("samples", 0), 1)
    runs = given.get("restarts", 1) * min(given.get("n_targets", 1), others)
    if own is attack.square:
        return Passes(2 + steps, 0)
    if own is attack.pgd:
        return Passes(draws * (1 + runs * (steps + 1)), draws * runs * steps)
    if own is attack.fab:
        return Passes(1 + runs * (steps + 1), runs * steps)
    if own is attack.fmn:  # its bisection makes at most 64 tries
        return Passes(steps + 70, steps + min(CLASSES, others))
    climb = draws * runs * sum(n + 1 for _, n in phases_of(given["norm"], steps))  # APGD
    ranked = given.get("order", "logit") != "logit"
    targets = min(max(given["n_targets"], RANKED), others) if ranked else 0
    return Passes(draws + ranked + climb, targets + climb)


def keep(
    r: NDArray[Any],
    sizes: NDArray[Any],
    x: Any,
    *,
    eps: Eps,
    norm: Norm,
    bounds: Bounds | None,
    name_of: Callable[[int], str],
) -> None:
    """Check that perturbations don't exceed eps or the box by more than rounding error.

    Args:
      r: perturbations, `[n, ...]`.
      sizes: their measured norms, `[n]`, from `Outcome`.
      x: examples, `[n, ...]`.
      eps: the largest size allowed, a scalar or `[n]`.
      norm: the norm of these sizes.
      bounds: the box for x + r.
      name_of: from an example's index to the name of the attack that perturbed it, for messages.

    Raises:
      ValueError: if one is larger or NaN, or leaves the box.
    """
    # Entries are rounded to x's dtype, their sum to float32.
    rounding = max(1e-5, float(jnp.finfo(r.dtype).eps))
    allowed = np.broadcast_to(np.maximum(np.asarray(eps, np.float64), 0), sizes.shape)
    narrow = jnp.finfo(r.dtype).bits < 32
    own = np.asarray(norms.norm(jnp.asarray(r), norm)) if narrow else sizes
    excess = own - allowed * (1 + rounding)
    if not np.all(excess <= 0):  # so that NaN fails too
        worst = int(np.argmax(np.where(np.isnan(excess), np.inf, excess)))
        raise ValueError(
            f"expected perturbations of {norm} size {allowed[worst]:g} at most, got "
            f"{own[worst]:g} by {name_of(worst)}; pass the norm that the attack has, or project "
            "the result of your own attack with jaxadv.norms.project"
        )
    over = sizes > allowed * (1 + rounding)
    if over.any():
        worst = int(np.argmax(sizes - allowed))
        warnings.warn(
            f"{over.sum()} of {len(over)} points x + r are farther from x than eps, since they are "
            f"rounded to {r.dtype}: up to {sizes[worst]:g} where {allowed[worst]:g} is allowed; "
            "evaluate with x in float32 (the net may compute in a narrower dtype)",
            stacklevel=4,
        )
    stray = "" if bounds is None else host.outside(bounds, x + r)
    if stray:
        raise ValueError(
            f"expected attacks that keep x + r within bounds, got {stray}; clip the result of your "
            "own attack with jaxadv.norms.clip_to_box"
        )
