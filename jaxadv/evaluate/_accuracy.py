"""Masks of the correctly classified examples, clean and perturbed, and their accuracies."""

from __future__ import annotations

from functools import partial
from statistics import NormalDist
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray
from scipy import special  # not stats, whose import takes half a second

from jaxadv import closures, host, inputs, meshes, norms
from jaxadv.types import ApplyFn, Norm, Params

__all__ = ["Comparison", "Outcome", "accuracy", "compare", "interval", "measure", "score"]


class Outcome(NamedTuple):
    """The effect of a perturbation on each example; every leaf is `[n]`.

    Attributes:
      clean: whether x is classified correctly.
      robust: whether x and x + r are classified correctly.
      norm: the measured norm of r; if x is narrower than float32, the larger of the norms of r and
        of (x + r) - x, which rounding may increase.
      zero: whether r is exactly 0.
      nonfinite: whether r, x, x + r, or the logits of x or x + r are not finite (a logit of -inf is
        a mask, and doesn't count).
      invalid: whether the label is outside 0..K-1.
    """

    clean: Any
    robust: Any
    norm: Any
    zero: Any
    nonfinite: Any
    invalid: Any


class Comparison(NamedTuple):
    """Two accuracies on the same examples.

    Attributes:
      difference: the first accuracy minus the second.
      interval: the confidence interval of the difference on randomly drawn examples.
      only_first: number of examples that only the first classifies correctly.
      only_second: number of examples that only the second classifies correctly.
      p_value: the probability of a split at least as uneven, if both were equally likely.
    """

    difference: float
    interval: tuple[float, float]
    only_first: int
    only_second: int
    p_value: float


@meshes.auto_axes(meshes.of_rows)
def measure(
    apply_fn: ApplyFn,
    params: Params,
    x: jax.Array,
    y: jax.Array,
    r: jax.Array | None = None,
    *,
    norm: Norm = "l2",
) -> Outcome:
    """Measure a batch of perturbations; pure, for use under `jax.jit`.

    Args:
      apply_fn: `(params, x) -> logits`, `[B, ...]` to `[B, K]`.
      params: the first argument of `apply_fn`.
      x: `[B, ...]`, floating point.
      y: integer labels, `[B]`.
      r: perturbations, of x's shape and dtype; None for no perturbation.
      norm: the norm to measure them in.

    Returns:
      `Outcome`, each leaf `[B]`. Correct means: y has the largest logit (the lowest index on ties),
      the row is finite, and y is a class that isn't masked.

    Raises:
      TypeError: if `x` or the logits are not floating-point arrays, or `y` not integers.
      ValueError: if shapes are not `[B, ...]`, `[B]`, `[B, K]` with K >= 2, and r like x; if the
        norm is unknown.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxadv import evaluate
      >>> x, y, r = jnp.array([[2.0, 1.0]]), jnp.array([0]), jnp.array([[-3.0, 4.0]])
      >>> outcome = evaluate.measure(lambda params, x: x, None, x, y, r)
      >>> outcome.clean.tolist(), outcome.robust.tolist(), outcome.norm.tolist()
      ([True], [False], [5.0])
    """
    x = inputs.examples(x)
    y = inputs.labels(y, x.shape[0])
    logits = inputs.apply(apply_fn, params, x)
    if r is None:
        # XLA would evaluate a constant r's norm while it compiles: seconds for a batch of images.
        r = jax.lax.optimization_barrier(jnp.zeros_like(x))
        moved, moved_logits = x, logits
    else:
        r = jnp.asarray(inputs.perturbation(r, x))
        moved = x + r
        moved_logits = inputs.apply(apply_fn, params, moved)
    correct = inputs.is_correct(logits, x, y)
    finite = inputs.finite(x, logits) & inputs.finite(moved, moved_logits)
    of_example = tuple(range(1, r.ndim))
    return Outcome(
        clean=correct,
        robust=correct & inputs.is_correct(moved_logits, moved, y),
        norm=_realised(x, r, norm),
        zero=jnp.all(r == 0, axis=of_example),
        nonfinite=~(finite & jnp.all(jnp.isfinite(r), axis=of_example)),
        invalid=(y < 0) | (y >= logits.shape[1]),
    )


def _realised(x: jax.Array, r: jax.Array, norm: Norm) -> jax.Array:
    """Return the norms of r; in a narrow dtype those of the rounded (x + r) - x, if larger."""
    size = norms.norm(r, norm)
    wide = inputs.accum_dtype(x.dtype)
    if x.dtype == wide:
        return size
    kind = jnp.finfo(x.dtype)
    start = x.astype(wide)
    # reduce_precision, since a compiler may remove a cast to a narrower dtype and back.
    end = jax.lax.reduce_precision(start + r.astype(wide), kind.nexp, kind.nmant)
    return jnp.maximum(size, norms.norm(end - start, norm))


_measure = jax.jit(measure, static_argnames=("apply_fn", "norm"))


@meshes.auto_axes()
def score(
    apply_fn: ApplyFn,
    params: Params,
    x: Any,
    y: Any,
    r: Any = None,
    *,
    norm: Norm = "l2",
    batch_size: int = 500,
) -> Outcome:
    """Measure perturbations of a data set, in batches on the host; without r, the clean examples.

    Args:
      apply_fn: `(params, x) -> logits`, `[B, ...]` to `[B, K]`.
      params: the first argument of `apply_fn`.
      x: `[n, ...]`, floating point, on the host or the device.
      y: integer labels, `[n]`.
      r: perturbations, of x's shape and dtype; None for no perturbation.
      norm: the norm to measure them in.
      batch_size: number of examples per batch.

    Returns:
      `Outcome` of NumPy arrays, each `[n]`, as `measure` defines them.

    Raises:
      TypeError: as `measure`; and under a trace.
      ValueError: as `measure`.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxadv import evaluate
      >>> x, y = jnp.array([[3.0, 0.0], [0.0, 1.0]]), jnp.array([0, 1])
      >>> evaluate.score(lambda params, x: x, None, x, y).clean.tolist()
      [True, True]
      >>> r = jnp.array([[-1.0, 1.0], [1.0, -1.0]])
      >>> evaluate.score(lambda params, x: x, None, x, y, r).robust.tolist()
      [True, False]
    """
    x, y = host.arrays("evaluate.score", x, y, (params, r))
    apply_fn = closures.keyed(apply_fn, params, host.one_batch(x, batch_size))
    r = None if r is None else inputs.perturbation(r, x)
    batch = partial(_measure, apply_fn, params, norm=norm)
    return host.over_batches(batch, (x, y, r), batch_size)


def accuracy(mask: Any) -> float:
    """Return the fraction of True in a mask `[n]`, as a Python float.

    Args:
      mask: booleans, `[n]`, n of at least 1.

    Returns:
      A number in [0, 1].

    Raises:
      TypeError: if the mask isn't boolean.
      ValueError: if it is empty or not one-dimensional.

    Example:
      >>> import numpy as np
      >>> from jaxadv import evaluate
      >>> evaluate.accuracy(np.array([True, False, True, True]))
      0.75
    """
    mask = _booleans(mask)
    return float(np.count_nonzero(mask) / mask.size)


def interval(mask: Any, confidence: float = 0.95) -> tuple[float, float]:
    r"""The confidence interval of an accuracy measured on randomly drawn examples (Wilson, 1927).

    .. math:: \frac{\hat p + \frac{z^2}{2n} \pm z \sqrt{\frac{\hat p (1 - \hat p)}{n} +
              \frac{z^2}{4n^2}}}{1 + \frac{z^2}{n}}

    Args:
      mask: booleans, `[n]`, n of at least 1.
      confidence: how often such an interval contains the accuracy on all possible examples.

    Returns:
      The lower and the upper end.

    Raises:
      TypeError: if the mask isn't boolean.
      ValueError: if it is empty or not one-dimensional, or `confidence` not in (0, 1).

    Example:
      >>> import numpy as np
      >>> from jaxadv import evaluate
      >>> [round(end, 3) for end in evaluate.interval(np.arange(1000) < 800)]
      [0.774, 0.824]
    """
    mask, z = _booleans(mask), _quantile(confidence)
    n, successes = mask.size, np.count_nonzero(mask)
    p = successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    # With no success, or only successes, one end is exactly 0 or 1, which rounding would miss.
    low = 0.0 if successes == 0 else float(centre - half)
    high = 1.0 if successes == n else float(centre + half)
    return low, high


def compare(first: Any, second: Any, confidence: float = 0.95) -> Comparison:
    r"""Compare two accuracies on the same examples, of two nets or under two attacks.

    .. math:: \frac{b - c}{n + 2} \pm z \sqrt{\frac{1}{n + 2} \Bigl(\frac{b + c}{n + 2} -
              \frac{(b - c)^2}{(n + 2)^2}\Bigr)}, \qquad
              p = \min\bigl(1,\, 2 P(X \le \min(b', c'))\bigr)

    where b' and c' are the numbers of examples that only the first, and only the second, classifies
    correctly, b = b' + 1/2, c = c' + 1/2, and X is binomial with b' + c' trials of probability 1/2
    (McNemar's test, exact). Examples on which both agree don't widen the interval, so it is much
    narrower than the intervals of the two accuracies suggest.

    Args:
      first: booleans, `[n]`, n of at least 1, e.g. one net's `outcome.robust`.
      second: another net's on the same examples, `[n]`.
      confidence: how often such an interval contains the difference on all possible examples.

    Returns:
      `Comparison`.

    Raises:
      TypeError: if a mask isn't boolean.
      ValueError: if one is empty or not one-dimensional, their lengths differ, or `confidence` is
        not in (0, 1).

    Example:
      >>> import numpy as np
      >>> from jaxadv import evaluate
      >>> found = evaluate.compare(np.arange(1000) < 800, np.arange(1000) < 790)
      >>> found.difference, [round(end, 3) for end in found.interval], round(found.p_value, 3)
      (0.01, [0.004, 0.016], 0.002)

    References:
      McNemar, "Note on the sampling error of the difference between correlated proportions or
      percentages", 1947; Agresti and Min, "Simple improved confidence intervals for comparing
      matched proportions", 2005.
    """
    first, second, z = _booleans(first), _booleans(second), _quantile(confidence)
    if first.shape != second.shape:
        raise ValueError(
            f"expected two masks of the same examples, got shapes {first.shape} and "
            f"{second.shape}; evaluate both on the same x, in the same order"
        )
    only_first, only_second = int(np.sum(first & ~second)), int(np.sum(second & ~first))
    n, split = first.size + 2, only_first + only_second
    middle = (only_first - only_second) / n
    half = float(z * np.sqrt(((split + 1) / n - middle**2) / n))
    return Comparison(
        difference=(only_first - only_second) / first.size,
        interval=(max(middle - half, -1.0), min(middle + half, 1.0)),
        only_first=only_first,
        only_second=only_second,
        p_value=min(1.0, 2 * float(special.bdtr(min(only_first, only_second), split, 0.5))),
    )


def _quantile(confidence: float) -> float:
    """Return how many standard deviations an interval reaches to each side.

    Raises:
      ValueError: if `confidence` is not in (0, 1).
    """
    if not 0 < confidence < 1:
        raise ValueError(f"expected 0 < confidence < 1, got {confidence}; 0.95 is usual")
    return NormalDist().inv_cdf((1 + confidence) / 2)


def _booleans(mask: Any) -> NDArray[np.bool_]:
    """Check a mask `[n]` of at least one example.

    Raises:
      TypeError: if it isn't an array of booleans.
      ValueError: if it is empty or not one-dimensional.
    """
    if hasattr(mask, "_fields"):
        raise TypeError(
            f"expected a mask [n], got {type(mask).__name__}; pass one of its masks, e.g. "
            "outcome.robust"
        )
    mask = np.asarray(mask)
    if mask.ndim != 1 or mask.size == 0:
        raise ValueError(
            f"expected a mask [n] of at least one example, got shape {mask.shape}; "
            "pass the mask of one evaluation, e.g. outcome.robust"
        )
    if mask.dtype != bool:
        raise TypeError(
            f"expected a mask of booleans, got {mask.dtype}; pass the mask of one evaluation, e.g. "
            "outcome.robust, or predictions == labels"
        )
    return mask
