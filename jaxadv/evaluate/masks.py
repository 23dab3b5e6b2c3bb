"""Masks: which examples of a data set are right, as they are and as perturbed."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from jaxadv import _cpu, closures, host, inputs, meshes, norms
from jaxadv.evaluate import budget
from jaxadv.types import ApplyFn, Bounds, Eps, Norm, Params, PerturbFn

__all__ = [
    "Counts",
    "Outcome",
    "accuracy",
    "clean",
    "correct",
    "count",
    "curve",
    "measure",
    "merge",
    "outcome",
    "perturbations",
    "robust",
    "worst_case",
]

Mask = NDArray[np.bool_]


class Outcome(NamedTuple):
    """What became of each example under a perturbation; every leaf is `[n]`.

    Attributes:
      clean: classified right as it is.
      robust: classified right as it is and as perturbed.
      norm: the measured size of its perturbation; where x is narrower than float32, the larger of
        r's size and that of (x + r) - x, which rounding may make larger.
      zero: its perturbation is exactly 0.
      nonfinite: its perturbation, its input, or its logits before or after are not finite (a
        logit of -inf is a mask).
      invalid: its label is outside 0..K-1.
    """

    clean: Any
    robust: Any
    norm: Any
    zero: Any
    nonfinite: Any
    invalid: Any


class Counts(NamedTuple):
    """An `Outcome` summed up; `merge` adds these over batches.

    Attributes:
      total: number of examples.
      clean: how many are classified right as they are.
      robust: how many are classified right as they are and as perturbed.
      zero: how many perturbations are exactly 0.
      nonfinite: how many have a perturbation, an input or logits that are not finite.
      invalid: how many labels are outside 0..K-1.
      max_norm: the greatest finite size of a perturbation.
    """

    total: Any
    clean: Any
    robust: Any
    zero: Any
    nonfinite: Any
    invalid: Any
    max_norm: Any


@meshes.auto_axes(meshes.of_rows)
def correct(apply_fn: ApplyFn, params: Params, x: jax.Array, y: jax.Array) -> jax.Array:
    """Tell which examples of a batch are classified right.

    Args:
      apply_fn: `(params, x) -> logits`, `[B, ...]` to `[B, K]`.
      params: the first argument of `apply_fn`.
      x: `[B, ...]`, floating point.
      y: integer labels, `[B]`.

    Returns:
      bool `[B]`: y has the largest logit (the lowest index on ties), its row is finite, and y is a
      class that isn't masked.

    Raises:
      TypeError: if `x` or the logits are not floating-point arrays, or `y` not integers.
      ValueError: if shapes are not `[B, ...]`, `[B]` and `[B, K]` with K >= 2.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxadv import evaluate
      >>> x, y = jnp.array([[2.0, 1.0], [jnp.nan, 0.0]]), jnp.array([0, 0])
      >>> evaluate.correct(lambda params, x: x, None, x, y).tolist()
      [True, False]
    """
    x = inputs.examples(x)
    y = inputs.labels(y, x.shape[0])
    return inputs.is_correct(inputs.apply(apply_fn, params, x), x, y)


@meshes.auto_axes(meshes.of_rows)
def measure(
    apply_fn: ApplyFn, params: Params, x: jax.Array, y: jax.Array, r: jax.Array, *, norm: Norm
) -> Outcome:
    """Measure a batch of perturbations, whoever made them.

    Args:
      apply_fn: `(params, x) -> logits`, `[B, ...]` to `[B, K]`.
      params: the first argument of `apply_fn`.
      x: `[B, ...]`, floating point.
      y: integer labels, `[B]`.
      r: perturbations, of x's shape and dtype.
      norm: the norm to measure them in.

    Returns:
      `Outcome`, each leaf `[B]`.

    Raises:
      TypeError: if `x` or the logits are not floating-point arrays, or `y` not integers.
      ValueError: if shapes are not `[B, ...]`, `[B]`, `[B, K]` with K >= 2, and r like x; if the
        norm is unknown.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxadv import evaluate
      >>> x, y, r = jnp.array([[2.0, 1.0]]), jnp.array([0]), jnp.array([[-3.0, 4.0]])
      >>> outcome = evaluate.measure(lambda params, x: x, None, x, y, r, norm="l2")
      >>> outcome.clean.tolist(), outcome.robust.tolist(), outcome.norm.tolist()
      ([True], [False], [5.0])
    """
    x = inputs.examples(x)
    y = inputs.labels(y, x.shape[0])
    r = jnp.asarray(inputs.perturbation(r, x))
    moved = x + r
    logits, moved_logits = (inputs.apply(apply_fn, params, v) for v in (x, moved))
    right = inputs.is_correct(logits, x, y)
    finite = inputs.finite(x, logits) & inputs.finite(moved, moved_logits)
    of_example = tuple(range(1, r.ndim))
    return Outcome(
        clean=right,
        robust=right & inputs.is_correct(moved_logits, moved, y),
        norm=_realised(x, r, norm),
        zero=jnp.all(r == 0, axis=of_example),
        nonfinite=~(finite & jnp.all(jnp.isfinite(r), axis=of_example)),
        invalid=(y < 0) | (y >= logits.shape[1]),
    )


def _realised(x: jax.Array, r: jax.Array, norm: Norm) -> jax.Array:
    """Return the sizes of r, or of the change that x + r really is in a narrow dtype."""
    size = norms.norm(r, norm)
    wide = inputs.accum_dtype(x.dtype)
    if x.dtype == wide:
        return size
    kind = jnp.finfo(x.dtype)
    start = x.astype(wide)
    # reduce_precision, since a compiler may drop a cast down and up again.
    end = jax.lax.reduce_precision(start + r.astype(wide), kind.nexp, kind.nmant)
    return jnp.maximum(size, norms.norm(end - start, norm))


def count(outcome: Outcome) -> Counts:
    """Sum an `Outcome` up.

    Args:
      outcome: of a batch or of a whole data set, each leaf `[n]`.

    Returns:
      `Counts`, each leaf a scalar.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxadv import evaluate
      >>> x, y, r = jnp.eye(3), jnp.array([0, 1, 0]), jnp.zeros((3, 3))
      >>> counts = evaluate.count(
      ...     evaluate.measure(lambda params, x: x, None, x, y, r, norm="l2")
      ... )
      >>> int(counts.total), int(counts.robust), int(counts.zero)
      (3, 2, 3)
    """
    clean, robust, norm, zero, nonfinite, invalid = map(jnp.asarray, outcome)
    total = jnp.asarray(clean.shape[0], jnp.int32)
    sums = [jnp.sum(mask, dtype=jnp.int32) for mask in (clean, robust, zero, nonfinite, invalid)]
    return Counts._make([total, *sums, jnp.max(jnp.where(jnp.isfinite(norm), norm, 0), initial=0)])


def merge(*counts: Counts) -> Counts:
    """Add the counts of several batches; their greatest norm is the greatest of all.

    Args:
      *counts: at least one.

    Returns:
      `Counts` of all the examples.

    Raises:
      TypeError: if they aren't `Counts`.
      ValueError: if there are none.

    Example:
      >>> from jaxadv import evaluate
      >>> one = evaluate.Counts(10, 9, 5, 0, 0, 0, 1.5)
      >>> evaluate.merge(one, one).robust
      10
    """
    if not counts:
        raise ValueError("expected at least one batch's counts, got none; pass count(outcome)")
    if not all(isinstance(of_batch, Counts) for of_batch in counts):
        raise TypeError(
            f"expected Counts, got {sorted({type(c).__name__ for c in counts})}; pass "
            "count(outcome) of each batch, a list of them as merge(*counts)"
        )
    total, clean, robust, zero, nonfinite, invalid, max_norm = zip(*counts, strict=True)
    sums = [sum(column) for column in (total, clean, robust, zero, nonfinite, invalid)]
    return Counts._make([*sums, reduce(jnp.maximum, max_norm)])


def accuracy(mask: Any) -> float:
    """Return the share of True in a mask `[n]`, as a Python float.

    Args:
      mask: booleans, `[n]`, n of at least 1.

    Returns:
      A number in [0, 1].

    Raises:
      TypeError: if the mask isn't one of booleans.
      ValueError: if it is empty or not one-dimensional.

    Example:
      >>> import numpy as np
      >>> from jaxadv import evaluate
      >>> evaluate.accuracy(np.array([True, False, True, True]))
      0.75
    """
    mask = booleans(mask)
    return float(np.count_nonzero(mask) / mask.size)


def booleans(mask: Any) -> Mask:
    """Check a mask `[n]` of at least one example.

    Raises:
      TypeError: if it isn't one of booleans.
      ValueError: if it is empty or not one-dimensional.
    """
    mask = np.asarray(mask)
    if mask.ndim != 1 or mask.size == 0:
        raise ValueError(
            f"expected a mask [n] of at least one example, got shape {mask.shape}; "
            "pass the mask of one evaluation, e.g. outcome.robust"
        )
    if mask.dtype != bool:
        raise TypeError(
            f"expected a mask of booleans, got {mask.dtype}; pass that of one evaluation, e.g. "
            "outcome.robust, or compare first: predictions == labels"
        )
    return mask


def worst_case(*masks: Any) -> Mask:
    """Combine masks of the same examples: right under every one of several attacks.

    The accuracy of the result is the robust accuracy against the worst of the attacks for each
    example, at most the least of their accuracies. With the mask of perturbations that were made on
    another net, it includes transfer.

    Args:
      *masks: at least one, booleans `[n]`.

    Returns:
      bool `[n]`.

    Raises:
      TypeError: if one isn't a mask of booleans (an accuracy, say).
      ValueError: if there is no mask, if they are empty, or if their shapes differ.

    Example:
      >>> import numpy as np
      >>> from jaxadv import evaluate
      >>> evaluate.worst_case(np.array([True, True, False]), np.array([True, False, True])).tolist()
      [True, False, False]
    """
    shapes = {np.shape(mask) for mask in masks}
    if len(shapes) != 1:
        raise ValueError(
            f"expected at least one mask, all of one shape [n], got shapes {sorted(shapes)}; "
            "evaluate each attack on the same examples"
        )
    return np.logical_and.reduce([booleans(mask) for mask in masks])


@meshes.auto_axes()
def clean(apply_fn: ApplyFn, params: Params, x: Any, y: Any, *, batch_size: int = 500) -> Mask:
    """Tell which examples of a data set are classified right.

    Args:
      apply_fn: `(params, x) -> logits`, `[B, ...]` to `[B, K]`.
      params: the first argument of `apply_fn`.
      x: `[n, ...]`, floating point, on the host or the device.
      y: integer labels, `[n]`.
      batch_size: how many go through the net at a time.

    Returns:
      bool `[n]`, on the host.

    Raises:
      TypeError: as `correct`; and under a trace.
      ValueError: as `correct`.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxadv import evaluate
      >>> mask = evaluate.clean(lambda params, x: x, None, jnp.eye(3), jnp.array([0, 1, 0]))
      >>> evaluate.accuracy(mask)
      0.6666666666666666
    """
    x, y = host.arrays("evaluate.clean", x, y, params)
    apply_fn = closures.keyed(apply_fn, params, host.one_batch(x, batch_size))
    batch = partial(_clean_batch, apply_fn, params)
    return np.asarray(host.over_batches(batch, (x, y), batch_size))


@meshes.auto_axes()
def perturbations(
    apply_fn: ApplyFn,
    params: Params,
    x: Any,
    y: Any,
    perturb_fn: PerturbFn,
    *,
    eps: Eps,
    key: jax.Array | None = None,
    bounds: Bounds | None = None,
    batch_size: int = 500,
) -> NDArray[Any]:
    """Perturb a data set, for instance to score the result on another net (transfer).

    Args:
      apply_fn: `(params, x) -> logits`, the net that is attacked.
      params: the first argument of `apply_fn`.
      x: `[n, ...]`, floating point, on the host or the device.
      y: integer labels, `[n]`.
      perturb_fn: the method, e.g. `perturb.loss`, or `functools.partial` of one (made once).
      eps: the size, a scalar or `[n]`.
      key: one key, split per example, or `[n]` keys; None for methods that draw nothing.
      bounds: `(lo, hi)`, numbers or arrays that broadcast to one example; None for no box.
      batch_size: how many go through the net at a time; the result doesn't depend on it but for
        rounding.

    Returns:
      r, `[n, ...]`, of x's dtype (float32 of float64, without x64), on the host.

    Raises:
      TypeError: as the method; and under a trace.
      ValueError: as the method; if x leaves the bounds.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxadv import evaluate, perturb
      >>> x, y = 0.5 * jnp.eye(2), jnp.array([0, 1])
      >>> net, other = lambda params, x: x, lambda params, x: 3.0 * x
      >>> r = evaluate.perturbations(net, None, x, y, perturb.loss, eps=1.0)
      >>> evaluate.clean(other, None, x + r, y).tolist()
      [False, False]
    """
    x, y = host.arrays("evaluate.perturbations", x, y, (params, eps, key, bounds))
    closures.method("perturb_fn", perturb_fn)
    apply_fn = closures.keyed(apply_fn, params, host.one_batch(x, batch_size))
    batch = partial(_perturb_batch, apply_fn, perturb_fn, params, host.checked(bounds, x))
    return np.asarray(host.over_batches(batch, (x, y, *host.per_example(x, eps, key)), batch_size))


@meshes.auto_axes()
def robust(
    apply_fn: ApplyFn,
    params: Params,
    x: Any,
    y: Any,
    perturb_fn: PerturbFn,
    *,
    eps: Eps,
    norm: Norm | None = None,
    key: jax.Array | None = None,
    bounds: Bounds | None = None,
    source: tuple[ApplyFn, Params] | None = None,
    batch_size: int = 500,
) -> Outcome:
    """Attack a data set and measure what became of each example.

    Args:
      apply_fn: `(params, x) -> logits`, `[B, ...]` to `[B, K]`.
      params: the first argument of `apply_fn`.
      x: `[n, ...]`, floating point, on the host or the device.
      y: integer labels, `[n]`.
      perturb_fn: the method, e.g. `perturb.loss`, or `functools.partial` of one (made once).
      eps: the size, a scalar or `[n]`.
      norm: the norm of `perturb_fn`, in which no size may exceed eps; None for the one that it is
        set to, by `functools.partial` or by default (l2 if it has none).
      key: one key, split per example, or `[n]` keys; None for methods that draw nothing.
      bounds: `(lo, hi)`, numbers or arrays that broadcast to one example; None for no box.
      source: another net with its parameters, to make the perturbations on (transfer); None for the
        net itself.
      batch_size: how many go through the net at a time; the result doesn't depend on it but for
        rounding.

    Returns:
      `Outcome` of NumPy arrays, each `[n]`.

    Raises:
      TypeError: as the method; and under a trace.
      ValueError: as the method; if the norm is unknown, or not that of `perturb_fn`; if x leaves
        the bounds; if a perturbation is larger than eps or leaves them, by more than rounding.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxadv import evaluate, perturb
      >>> x, y = jnp.array([[3.0, 0.0], [0.0, 1.0]]), jnp.array([0, 1])
      >>> outcome = evaluate.robust(lambda params, x: x, None, x, y, perturb.loss, eps=1.5)
      >>> evaluate.accuracy(outcome.clean), evaluate.accuracy(outcome.robust)
      (1.0, 0.5)
    """
    x, y = host.arrays("evaluate.robust", x, y, (params, eps, key, bounds, source))
    closures.method("perturb_fn", perturb_fn)
    norm = budget.norm_of([perturb_fn], norm)
    shape = host.one_batch(x, batch_size)
    apply_fn = closures.keyed(apply_fn, params, shape)
    of, of_params = closures.pair(source) if source is not None else (apply_fn, params)
    of = closures.keyed(of, of_params, shape)
    batch = partial(
        _robust_batch, apply_fn, of, perturb_fn, norm, params, of_params, host.checked(bounds, x)
    )
    sizes, keys = host.per_example(x, eps, key)
    found = host.over_batches(batch, (x, y, sizes, keys), batch_size)
    result, r = jax.tree.map(np.asarray, found)
    # Those that aren't finite are counted; they can't be measured.
    broken = result.nonfinite
    budget.keep(
        np.where(broken.reshape(-1, *(1,) * (r.ndim - 1)), 0, r),
        np.where(broken, 0, result.norm),
        x, eps=eps, norm=norm, bounds=bounds, name_of=lambda _: "perturb_fn",
    )  # fmt: skip
    return result


@meshes.auto_axes()
def outcome(
    apply_fn: ApplyFn,
    params: Params,
    x: Any,
    y: Any,
    r: Any,
    *,
    norm: Norm = "l2",
    batch_size: int = 500,
) -> Outcome:
    """Measure a data set's perturbations, whoever made them and wherever they were stored.

    Args:
      apply_fn: `(params, x) -> logits`, `[B, ...]` to `[B, K]`.
      params: the first argument of `apply_fn`.
      x: `[n, ...]`, floating point, on the host or the device.
      y: integer labels, `[n]`.
      r: perturbations, of x's shape and dtype.
      norm: the norm to measure them in.
      batch_size: how many go through the net at a time.

    Returns:
      `Outcome` of NumPy arrays, each `[n]`.

    Raises:
      TypeError: as `measure`; and under a trace.
      ValueError: as `measure`.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxadv import evaluate
      >>> x, y = jnp.array([[3.0, 0.0], [0.0, 1.0]]), jnp.array([0, 1])
      >>> r = jnp.array([[-1.0, 1.0], [1.0, -1.0]])
      >>> evaluate.outcome(lambda params, x: x, None, x, y, r).robust.tolist()
      [True, False]
    """
    x, y = host.arrays("evaluate.outcome", x, y, (params, r))
    apply_fn = closures.keyed(apply_fn, params, host.one_batch(x, batch_size))
    r = inputs.perturbation(r, x)
    leaves = host.over_batches(partial(_measured, apply_fn, norm, params), (x, y, r), batch_size)
    return jax.tree.map(np.asarray, leaves)


@meshes.auto_axes()
def curve(
    apply_fn: ApplyFn,
    params: Params,
    x: Any,
    y: Any,
    perturb_fn: PerturbFn,
    *,
    eps: Sequence[float],
    key: jax.Array | None = None,
    bounds: Bounds | None = None,
    batch_size: int = 500,
) -> Mask:
    """Which examples stay right at each of several sizes, from one gradient for all sizes.

    For the one-step methods, whose direction doesn't depend on the size: the perturbation of size 1
    is made once and scaled, and shortened at the walls of the box. (An iterated attack depends on
    its size: call `robust` for each.)

    Args:
      apply_fn: `(params, x) -> logits`, `[B, ...]` to `[B, K]`.
      params: the first argument of `apply_fn`.
      x: `[n, ...]`, floating point, on the host or the device.
      y: integer labels, `[n]`.
      perturb_fn: a one-step method, e.g. `perturb.alpha`, or `functools.partial` of one.
      eps: the sizes.
      key: one key, split per example, or `[n]` keys; None for methods that draw nothing.
      bounds: `(lo, hi)`, numbers or arrays that broadcast to one example; None for no box.
      batch_size: how many go through the net at a time.

    Returns:
      bool `[len(eps), n]`: right as it is and as perturbed at each size.

    Raises:
      TypeError: as the method; and under a trace.
      ValueError: as the method; if a size is negative or not finite; if x leaves the bounds.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxadv import evaluate, perturb
      >>> x, y = jnp.array([[3.0, 0.0], [0.0, 1.0]]), jnp.array([0, 1])
      >>> net = lambda params, x: x
      >>> evaluate.curve(net, None, x, y, perturb.loss, eps=[0.0, 1.0, 3.0]).tolist()
      [[True, True], [True, False], [False, False]]
    """
    x, y = host.arrays("evaluate.curve", x, y, (params, key, bounds))
    closures.method("perturb_fn", perturb_fn)
    apply_fn = closures.keyed(apply_fn, params, host.one_batch(x, batch_size))
    values = np.asarray(eps, np.float64)
    if values.ndim != 1:
        raise ValueError(
            f"expected eps to be a sequence of sizes, got {eps!r}; pass a list, e.g. [0.5, 1.0]"
        )
    for size in values.tolist():
        inputs.radius(size, x)
    sizes = jnp.asarray(values, inputs.accum_dtype(x.dtype))
    batch = partial(_curve_batch, apply_fn, perturb_fn, params, host.checked(bounds, x), sizes)
    masks = host.over_batches(batch, (x, y, *host.per_example(x, 1.0, key)), batch_size)
    return np.asarray(masks).T


@partial(jax.jit, static_argnums=0)
def _clean_batch(apply_fn: ApplyFn, params: Params, x: jax.Array, y: jax.Array) -> jax.Array:
    return correct(apply_fn, params, x, y)


@partial(jax.jit, static_argnums=(0, 1))
def _perturb_batch(
    apply_fn: ApplyFn,
    perturb_fn: PerturbFn,
    params: Params,
    bounds: Bounds | None,
    x: jax.Array,
    y: jax.Array,
    eps: jax.Array,
    key: jax.Array | None,
) -> jax.Array:
    r = perturb_fn(apply_fn, params, x, y, eps=eps, key=key, bounds=bounds)
    return inputs.perturbation(r, x)


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _robust_batch(
    apply_fn: ApplyFn,
    source_fn: ApplyFn,
    perturb_fn: PerturbFn,
    norm: Norm,
    params: Params,
    source_params: Params,
    bounds: Bounds | None,
    x: jax.Array,
    y: jax.Array,
    eps: jax.Array,
    key: jax.Array | None,
) -> tuple[Outcome, jax.Array]:
    r = perturb_fn(source_fn, source_params, x, y, eps=eps, key=key, bounds=bounds)
    return measure(apply_fn, params, x, y, r, norm=norm), r


@partial(jax.jit, static_argnums=(0, 1))
def _measured(
    apply_fn: ApplyFn, norm: Norm, params: Params, x: jax.Array, y: jax.Array, r: jax.Array
) -> Outcome:
    return measure(apply_fn, params, x, y, r, norm=norm)


@partial(jax.jit, static_argnums=(0, 1))
def _curve_batch(
    apply_fn: ApplyFn,
    perturb_fn: PerturbFn,
    params: Params,
    bounds: Bounds | None,
    sizes: jax.Array,
    x: jax.Array,
    y: jax.Array,
    eps: jax.Array,
    key: jax.Array | None,
) -> jax.Array:
    r = inputs.perturbation(perturb_fn(apply_fn, params, x, y, eps=eps, key=key, bounds=None), x)

    @_cpu.fast_convolutions
    def at(size: jax.Array) -> jax.Array:
        scaled = norms.clip_to_box(x, size * r.astype(size.dtype), bounds)
        return correct(apply_fn, params, x + scaled, y)

    # One size at a time: a batch of the usual size fills the machine already.
    return (jax.lax.map(at, sizes) & correct(apply_fn, params, x, y)[None]).T
