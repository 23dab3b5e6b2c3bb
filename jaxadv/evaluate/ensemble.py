"""The worst of several attacks on each example, measured again on the points that are kept."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import NormalDist
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from jaxadv import attack, host, meshes
from jaxadv.evaluate.masks import Outcome, outcome
from jaxadv.types import ApplyFn, Bounds, Eps, Norm, Params, PerturbFn

__all__ = ["Ensemble", "ensemble", "interval"]


class Ensemble(NamedTuple):
    """What became of each example under the worst of several attacks.

    Attributes:
      outcome: what `measure` says of x + r, after the attacks; each leaf `[n]`.
      r: the perturbation that misled the net, `[n, ...]`; 0 where none did.
      stages: what each attack did, by name, in order.
    """

    outcome: Outcome
    r: NDArray[Any]
    stages: dict[str, attack.Stage]


@meshes.auto_axes()
def ensemble(
    apply_fn: ApplyFn,
    params: Params,
    x: Any,
    y: Any,
    attacks: Mapping[str, PerturbFn],
    *,
    eps: Eps,
    norm: Norm = "l2",
    key: jax.Array | None = None,
    bounds: Bounds | None = None,
    batch_size: int = 500,
) -> Ensemble:
    """Attack a data set in several ways, each on what the ways before have left.

    The figure to report is `accuracy(result.outcome.robust)`. It isn't what the attacks say of
    themselves but a new measurement of the stored points, all of them in one batch size.

    Args:
      apply_fn: `(params, x) -> logits`, `[B, ...]` to `[B, K]`.
      params: the first argument of `apply_fn`.
      x: `[n, ...]`, floating point, on the host or the device.
      y: integer labels, `[n]`.
      attacks: by name, in order; `attack.standard(norm)` for AutoAttack's.
      eps: the size, a scalar or `[n]`.
      norm: the norm of the attacks, in which none may exceed eps.
      key: one key, or one per example, `[n]`; None for methods that draw nothing.
      bounds: `(lo, hi)`, numbers or arrays that broadcast to one example; None for no box.
      batch_size: how many go through the net at a time.

    Returns:
      `Ensemble`.

    Raises:
      TypeError: as the attacks; and under a trace.
      ValueError: as the attacks; if there are none; if the norm is unknown; if x leaves the bounds;
        if what misled the net is larger than eps or leaves the bounds, by more than rounding.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxadv import attack, evaluate, perturb
      >>> x, y = jnp.array([[3.0, 0.0], [0.0, 1.0]]), jnp.array([0, 1])
      >>> attacks = {"one step": perturb.loss, "pgd": attack.pgd}
      >>> result = evaluate.ensemble(lambda _, x: x, None, x, y, attacks, eps=1.5)
      >>> evaluate.accuracy(result.outcome.robust), result.stages["pgd"].fooled.tolist()
      (0.5, [False, False])
    """
    found = attack.cascade(
        apply_fn, params, x, y, attacks, eps=eps, key=key, bounds=bounds, batch_size=batch_size
    )
    measured = outcome(apply_fn, params, x, y, found.r, norm=norm, batch_size=batch_size)
    _check(found, measured.norm, x, eps, norm, bounds)
    return Ensemble(measured, found.r, found.stages)


def _check(found: attack.Cascade, sizes: Any, x: Any, eps: Eps, norm: Norm, bounds: Any) -> None:
    """Raise if an attack had more than its budget; more than its box."""
    # Entries are rounded to x's dtype, their sum to float32.
    rounding = max(1e-5, float(jnp.finfo(found.r.dtype).eps))
    allowed = np.broadcast_to(np.maximum(np.asarray(eps, np.float64), 0), sizes.shape)
    excess = sizes - allowed * (1 + rounding)
    if not np.all(excess <= 0):  # nor NaN
        worst = int(np.argmax(np.where(np.isnan(excess), np.inf, excess)))
        name = next(name for name, stage in found.stages.items() if stage.fooled[worst])
        raise ValueError(
            f"expected perturbations of {norm} size {allowed[worst]:g} at most, got "
            f"{sizes[worst]:g} by {name!r}; pass the norm that the attacks have, or project what "
            "an attack of your own returns, by jaxadv.norms.project"
        )
    stray = "" if bounds is None else host.outside(bounds, x + found.r)
    if stray:
        raise ValueError(
            f"expected attacks that keep x + r within bounds, got {stray}; confine what an attack "
            "of your own returns, by jaxadv.norms.confine"
        )


def interval(mask: Any, confidence: float = 0.95) -> tuple[float, float]:
    r"""The confidence interval of an accuracy, for the draw of the examples (Wilson, 1927).

    .. math:: \frac{\hat p + \frac{z^2}{2n} \pm z \sqrt{\frac{\hat p (1 - \hat p)}{n} +
              \frac{z^2}{4n^2}}}{1 + \frac{z^2}{n}}

    Args:
      mask: booleans, `[n]`, n of at least 1.
      confidence: how often such an interval contains the accuracy on all possible examples.

    Returns:
      Its two ends.

    Raises:
      ValueError: if the mask is empty or not one-dimensional, or `confidence` not in (0, 1).

    Example:
      >>> import numpy as np
      >>> from jaxadv import evaluate
      >>> [round(end, 3) for end in evaluate.interval(np.arange(1000) < 800)]
      [0.774, 0.824]
    """
    mask = np.asarray(mask)
    if mask.ndim != 1 or mask.size == 0:
        raise ValueError(
            f"expected a mask [n] of at least one example, got shape {mask.shape}; "
            "pass the mask of one evaluation, e.g. outcome.robust"
        )
    if not 0 < confidence < 1:
        raise ValueError(f"expected 0 < confidence < 1, got {confidence}; 0.95 is usual")
    n, p = mask.size, np.count_nonzero(mask) / mask.size
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(0.0, float(centre - half)), min(1.0, float(centre + half))
