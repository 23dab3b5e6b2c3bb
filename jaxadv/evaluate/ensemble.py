"""The worst of several attacks on each example, measured again on the points that are kept."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import NormalDist
from typing import Any, NamedTuple

import jax
import numpy as np
from numpy.typing import NDArray

from jaxadv import attack, closures, host, meshes
from jaxadv.attack.autoattack import check_attacks
from jaxadv.evaluate import budget
from jaxadv.evaluate.masks import Outcome, booleans, outcome
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
    norm: Norm | None = None,
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
      norm: the norm of the attacks, in which none may exceed eps; None for the one that they are
        set to (l2 if to none).
      key: one key, or one per example, `[n]`; None for methods that draw nothing.
      bounds: `(lo, hi)`, numbers or arrays that broadcast to one example; None for no box.
      batch_size: how many go through the net at a time.

    Returns:
      `Ensemble`.

    Raises:
      TypeError: as the attacks; if they aren't a mapping; and under a trace.
      ValueError: as the attacks; if there are none; if the norm is unknown, or not that of the
        attacks; if x leaves the bounds; if what misled the net is larger than eps or leaves the
        bounds, by more than rounding.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxadv import attack, evaluate, perturb
      >>> x, y = jnp.array([[3.0, 0.0], [0.0, 1.0]]), jnp.array([0, 1])
      >>> attacks = {"one step": perturb.loss, "pgd": attack.pgd}
      >>> result = evaluate.ensemble(lambda _, x: x, None, x, y, attacks, eps=1.5)
      >>> evaluate.accuracy(result.outcome.robust), result.stages["pgd"].fooled.tolist()
      (0.5, [False, False])
    """
    x, y = host.arrays("evaluate.ensemble", x, y, (params, eps, key, bounds))
    check_attacks(attacks)
    norm = budget.norm_of(attacks.values(), norm)
    apply_fn = closures.keyed(apply_fn, params, host.one_batch(x, batch_size))
    found = attack.cascade(
        apply_fn, params, x, y, attacks, eps=eps, key=key, bounds=bounds, batch_size=batch_size
    )
    measured = outcome(apply_fn, params, x, y, found.r, norm=norm, batch_size=batch_size)

    def name_of(example: int) -> str:
        return next(repr(name) for name, stage in found.stages.items() if stage.fooled[example])

    budget.keep(found.r, measured.norm, x, eps=eps, norm=norm, bounds=bounds, name_of=name_of)
    return Ensemble(measured, found.r, found.stages)


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
      TypeError: if the mask isn't one of booleans.
      ValueError: if it is empty or not one-dimensional, or `confidence` not in (0, 1).

    Example:
      >>> import numpy as np
      >>> from jaxadv import evaluate
      >>> [round(end, 3) for end in evaluate.interval(np.arange(1000) < 800)]
      [0.774, 0.824]
    """
    mask = booleans(mask)
    if not 0 < confidence < 1:
        raise ValueError(f"expected 0 < confidence < 1, got {confidence}; 0.95 is usual")
    n, successes = mask.size, np.count_nonzero(mask)
    p = successes / n
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    # Of none, and of all, the end is exact; rounding would leave it a little off.
    low = 0.0 if successes == 0 else float(centre - half)
    high = 1.0 if successes == n else float(centre + half)
    return low, high
