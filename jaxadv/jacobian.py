r"""Per-example derivatives of the softmax output, exact at any confidence.

The paper linearises the net's output :math:`\alpha = \mathrm{softmax}(z(x))` with its Jacobian
:math:`T = \partial\alpha / \partial x`, `[K, D]` (printed as a derivative in w; it is in x), and
moves along differences of its rows, :math:`d_j = T_j - T_y`. `softmax_jacobian` is T itself.

In float32 the T of a confident net is rounding noise, and then exactly zero: a probability of
1 - 1e-8 is 1. But Adv_Alpha needs only the direction of each :math:`d_j` and its size relative to
the others, which survive if the vanishing factor is factored out first. `class_differences` does
that. Row j of :math:`V = \partial(\alpha_j - \alpha_y) / \partial z` is

.. math::
    v_{jj} = \alpha_j (1 - \alpha_j + \alpha_y), \quad
    v_{jy} = -\alpha_y (\alpha_j + 1 - \alpha_y), \quad
    v_{jk} = \alpha_k (\alpha_y - \alpha_j),

and sums to 0. It is computed as :math:`V_j e^{-c_j}` with :math:`c_j = \max(\log v_{jj}, \log
|v_{jy}|)`, from the log-softmax and without the logarithm of a difference, and then pulled back
through the net: :math:`d_j e^{-c_j}`, one backward pass for each class except y.

The remaining error comes from the net's own backward pass. Where y and the top wrong class have the
same gradient, the two cancel, and entries of other classes smaller than rounding error would leave
noise, so they are set to 0. Where all entries are 0, `perturb` tries again without the top wrong
class.

`nearest` finds each example's nearest class, backpropagating a few classes at a time.

Next: `perturb` builds Algorithm 1 on these; `attack.deepfool` iterates it on logits.

References:
  Huang et al., "Learning with a Strong Adversary", 2015, Sections 2 and 6.1.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxadv import _cpu, inputs, losses
from jaxadv.types import ApplyFn, Params

__all__ = [
    "Rows",
    "class_differences",
    "class_pullback",
    "pullback",
    "softmax_jacobian",
]

_CACHED = 20_000_000  # bytes that a backward pass may produce before it becomes slow on CPU
_HEADROOM = 12  # powers of 2 between scaled gradients and the largest number of the net's dtype


class Rows(NamedTuple):
    r"""The scaled rows of one batch: :math:`T_j - T_y = e^{c_j} d_j`, for J classes j except y.

    Attributes:
      logits: the net's output, `[B, K]`, in float32 at least.
      classes: j of each row, integers `[B, J]`.
      d: :math:`d_j`, the scaled difference, `[B, J, ...]`, of x's dtype.
      log_scale: :math:`c_j`, `[B, J]`.
      log_gap: :math:`\log |\alpha_y - \alpha_j|`, `[B, J]`; -inf on a tie.
    """

    logits: jax.Array
    classes: jax.Array
    d: jax.Array
    log_scale: jax.Array
    log_gap: jax.Array


class Nearest(NamedTuple):
    """Each example's distances to J classes, or to the nearest of them (then without axis J).

    Attributes:
      rank_by: the nearest class has the smallest value, `[B, J]`.
      distance: the distance or its logarithm, `[B, J]`.
      d: the gradient of the class's lead over y, up to a positive factor, `[B, J, ...]`.
      reachable: whether the class can be reached, `[B, J]`.
    """

    rank_by: jax.Array
    distance: jax.Array
    d: jax.Array
    reachable: jax.Array


def softmax_jacobian(apply_fn: ApplyFn, params: Params, x: jax.Array) -> jax.Array:
    r"""The Jacobian of the softmax output with respect to each input, the paper's T.

    .. math:: T = \partial\, \mathrm{softmax}(z(x)) / \partial x

    Each example goes through the net by itself (a batch of one under `jax.vmap`). For a confident
    net the entries underflow; those of `class_differences` don't.

    Args:
      apply_fn: `(params, x) -> logits`, `[B, ...]` to `[B, K]`.
      params: the first argument of `apply_fn`.
      x: `[B, ...]`, floating point.

    Returns:
      `[B, K, ...]`, of x's dtype. Its rows sum to 0 over K.

    Raises:
      TypeError: if `x` or the logits are not floating-point arrays.
      ValueError: if `x` is not `[B, ...]` or the logits are not `[B, K]` with K >= 2.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxadv import jacobian
      >>> w = jnp.array([[1.0, -1.0], [0.0, 2.0]])
      >>> jacobian.softmax_jacobian(lambda w, x: x @ w, w, jnp.zeros((1, 2))).tolist()
      [[[0.5, -0.5], [-0.5, 0.5]]]

    References:
      Huang et al., 2015, Section 2.
    """
    x = inputs.examples(x)

    def softmax(example: jax.Array) -> jax.Array:
        logits = inputs.apply(apply_fn, params, example[None])[0]
        return jax.nn.softmax(logits.astype(inputs.accum_dtype(logits.dtype)))

    return jax.vmap(jax.jacrev(softmax))(x)


def pullback(
    apply_fn: ApplyFn, params: Params, x: jax.Array
) -> tuple[jax.Array, Callable[[jax.Array], jax.Array]]:
    """One forward pass, and the function that pulls cotangents `[B, K]` back to the input.

    Like `jax.jacrev`, but for the whole batch at once: since rows don't interact, the cotangents of
    all examples are pulled back together, and `jax.vmap` over several cotangents shares the forward
    pass.

    Args:
      apply_fn: `(params, x) -> logits`.
      params: the first argument of `apply_fn`.
      x: `[B, ...]`, floating point.

    Returns:
      The logits `[B, K]` in float32 at least, and a function from `[B, K]` to `[B, ...]`.

    Raises:
      TypeError: if `x` or the logits are not floating-point arrays.
      ValueError: if `x` is not `[B, ...]` or the logits are not `[B, K]` with K >= 2.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxadv import jacobian
      >>> w = jnp.array([[1.0, -1.0], [0.0, 2.0]])
      >>> _, pull = jacobian.pullback(lambda w, x: x @ w, w, jnp.zeros((1, 2)))
      >>> pull(jnp.array([[1.0, 0.0]])).tolist()
      [[1.0, 0.0]]
    """
    logits, pull = _pullback(apply_fn, params, x)
    return logits.astype(inputs.accum_dtype(logits.dtype)), pull


def scaled_pullback(
    apply_fn: ApplyFn, params: Params, x: jax.Array
) -> tuple[jax.Array, Callable[[jax.Array], jax.Array], jax.Array]:
    """Like `pullback`, but scale the gradients where they might overflow.

    Gradients may be as large as the logits, and their sum over classes, which a backward pass
    computes first, larger than the net's dtype allows.

    Returns:
      The logits and the function, as `pullback`, and the factor of each example's gradients,
      `[B, 1]`: 1, or a smaller power of 2 where a logit is near overflow.
    """
    logits, pull = _pullback(apply_fn, params, x)
    largest = jnp.max(jnp.where(jnp.isfinite(logits), jnp.abs(logits), 0), axis=1, keepdims=True)
    _, exponent = jnp.frexp(lax.stop_gradient(largest))
    over = jnp.maximum(exponent - (jnp.finfo(logits.dtype).maxexp - _HEADROOM), 0)
    logits = logits.astype(inputs.accum_dtype(logits.dtype))
    scale = jnp.ldexp(jnp.ones_like(largest, logits.dtype), -over)
    return logits, lambda rows: pull(scale * rows), scale


def _pullback(
    apply_fn: ApplyFn, params: Params, x: jax.Array
) -> tuple[jax.Array, Callable[[jax.Array], jax.Array]]:
    """Return the logits in the net's own dtype, and the function that pulls cotangents back."""
    x = inputs.examples(x)
    logits, vjp = jax.vjp(lambda v: inputs.apply(apply_fn, params, v), x)

    def pull(rows: jax.Array) -> jax.Array:
        (pulled,) = vjp(rows.astype(logits.dtype))
        return pulled

    return logits, pull


def class_differences(apply_fn: ApplyFn, params: Params, x: jax.Array, y: jax.Array) -> Rows:
    r"""The differences :math:`T_j - T_y` of Equation 1, each scaled so that it can't underflow.

    Args:
      apply_fn: `(params, x) -> logits`, `[B, ...]` to `[B, K]`. A logit of -inf masks its class.
      params: the first argument of `apply_fn`.
      x: `[B, ...]`, floating point.
      y: integer labels, `[B]`. A label outside 0..K-1 is clipped to that range.

    Returns:
      `Rows`. The cost is one forward and K - 1 backward passes, and memory for K - 1 copies of x;
      `class_pullback` can do a few classes at a time.

    Raises:
      TypeError: if `x` or the logits are not floating-point arrays, or `y` not integers.
      ValueError: if shapes are not `[B, ...]`, `[B]` and `[B, K]` with K >= 2.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxadv import jacobian
      >>> w = jnp.array([[1.0, -1.0], [0.0, 2.0]])
      >>> x = jnp.array([[1000.0, 0.0]])  # the softmax Jacobian is exactly zero here
      >>> rows = jacobian.class_differences(lambda w, x: x @ w, w, x, jnp.array([0]))
      >>> rows.d.tolist(), rows.log_scale.tolist()
      ([[[-2.0, 2.0]]], [[-1999.306884765625]])

    References:
      Huang et al., 2015, Section 2, Equation 1.
    """
    logits, rows_of = class_pullback(apply_fn, params, x, y)
    return rows_of(wrong_classes(logits, inputs.labels(y, logits.shape[0])))


def class_pullback(
    apply_fn: ApplyFn, params: Params, x: jax.Array, y: jax.Array
) -> tuple[jax.Array, Callable[..., Rows]]:
    r"""One forward pass, and the function that computes `Rows` for some classes.

    Args:
      apply_fn: `(params, x) -> logits`, `[B, ...]` to `[B, K]`. A logit of -inf masks its class.
      params: the first argument of `apply_fn`.
      x: `[B, ...]`, floating point.
      y: integer labels, `[B]`. A label outside 0..K-1 is clipped to that range.

    Returns:
      The logits `[B, K]` in float32 at least, and a function from classes j, integers `[B, J]` in
      0..K-1 other than y, to their `Rows`; it costs J backward passes. An optional second argument,
      bool `[B, K]`, masks classes as a logit of -inf does.

    Raises:
      TypeError: if `x` or the logits are not floating-point arrays, or `y` not integers.
      ValueError: if shapes are not `[B, ...]`, `[B]` and `[B, K]` with K >= 2.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxadv import jacobian
      >>> w = jnp.array([[1.0, -1.0, 0.0], [0.0, 2.0, 3.0]])
      >>> logits, pull = jacobian.class_pullback(
      ...     lambda w, x: x @ w, w, jnp.zeros((1, 2)), jnp.array([0])
      ... )
      >>> pull(jnp.array([[2]])).d.tolist()
      [[[-1.0, 3.0]]]

    References:
      Huang et al., 2015, Section 2, Equation 1.
    """
    x = inputs.examples(x)
    y = inputs.labels(y, x.shape[0])
    logits, pull, scale = scaled_pullback(apply_fn, params, x)
    y = jnp.clip(y, 0, logits.shape[1] - 1)
    # Rows without an attackable class get dummy logits, so that their (discarded) derivatives are
    # finite: 0 * inf would be NaN.
    attackable = inputs.attackable(logits, y)[:, None]

    def rows_of(classes: jax.Array, masked: jax.Array | None = None) -> Rows:
        left = logits if masked is None else jnp.where(masked, -jnp.inf, logits)
        rows, log_scale, log_gap = _softmax_rows(jnp.where(attackable, left, 0), y, classes)
        # J cotangents of the whole batch, one forward pass: vmap over axis 1 of [B, J, K].
        d = jax.vmap(pull, in_axes=1, out_axes=1)(rows)
        return Rows(logits, classes, d, log_scale - jnp.log(scale), log_gap)

    return logits, rows_of


def nearest(
    distances: Callable[[jax.Array], Nearest],
    x: jax.Array,
    classes: jax.Array,
    chunk: int | None = None,
) -> Nearest:
    """Find each example's nearest class, backpropagating `chunk` classes at a time.

    Args:
      distances: from classes `[B, J]` to their distances, by J backward passes.
      x: the input that gradients are taken with respect to, `[B, ...]`.
      classes: `[B, J]`.
      chunk: number of classes per backward pass. None: all; on CPU as many as fit in the cache.
    """
    n_chunks = math.ceil(classes.shape[1] / (chunk or _at_once(distances, classes)))
    size = math.ceil(classes.shape[1] / n_chunks)
    # The last chunk is padded with its last class.
    classes = jnp.pad(classes, ((0, 0), (0, n_chunks * size - classes.shape[1])), mode="edge")
    chunks = classes.reshape(classes.shape[0], n_chunks, size).swapaxes(0, 1)

    def nearest_of(classes: jax.Array) -> Nearest:
        found = distances(classes)
        at = jnp.arange(classes.shape[0]), jnp.argmin(found.rank_by, axis=1)
        return jax.tree.map(lambda leaf: leaf[at], found)

    def nearer(best: Nearest, classes: jax.Array) -> tuple[Nearest, None]:
        other = nearest_of(classes)
        less = (other.rank_by < best.rank_by) | jnp.isnan(other.rank_by)
        return jax.tree.map(
            lambda new, old: jnp.where(inputs.expand_like(less, new), new, old), other, best
        ), None

    if n_chunks == 1:
        return nearest_of(classes)
    of_one = jax.eval_shape(nearest_of, chunks[0])
    # Like x: in a `shard_map`, the scan's carry has to vary over the same mesh axes throughout.
    none = jax.tree.map(lambda leaf: jnp.zeros_like(x, leaf.dtype, leaf.shape), of_one)
    none = none._replace(rank_by=jnp.full_like(none.rank_by, jnp.inf))
    if not isinstance(chunks, jax.core.Tracer):  # a scan would compile this new function each time
        return functools.reduce(lambda best, some: nearer(best, some)[0], chunks, none)
    # Also the first chunk is in the loop, so that the backward pass is compiled once.
    best, _ = lax.scan(_cpu.fast_convolutions(nearer), none, chunks)
    return best


def _at_once(backpropagate: Callable[[jax.Array], Nearest], classes: jax.Array) -> int:
    """Return the number of classes `[B, J]` per backward pass that is fastest."""
    if jax.default_backend() != "cpu":
        return classes.shape[1]
    steps = jax.make_jaxpr(backpropagate)(classes[:, :1]).eqns
    of_one = sum(v.aval.size * v.aval.dtype.itemsize for step in steps for v in step.outvars)
    return max(_CACHED // max(of_one, 1), 1)


def wrong_classes(logits: jax.Array, y: jax.Array, n: int | None = None) -> jax.Array:
    """Return the classes except y, ascending, `[B, J]`: all K - 1, or the n of largest logit.

    Args:
      logits: `[B, K]`.
      y: integer labels, `[B]`; clipped to 0..K-1.
      n: how many; None, or K - 1 or more, for all.
    """
    n_classes = logits.shape[1]
    y = jnp.clip(y, 0, n_classes - 1)
    if n is not None and n < n_classes - 1:
        return jnp.sort(losses.largest_wrong(logits, y, n)[1], axis=1)
    j = jnp.arange(n_classes - 1, dtype=y.dtype)[None]
    return j + (j >= y[:, None]).astype(y.dtype)


def _softmax_rows(
    logits: jax.Array, y: jax.Array, j: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the scaled rows of V `[B, J, K]`, their log scales and gaps `[B, J]`."""
    n_classes = logits.shape[1]
    z = losses.shift_logits(logits)
    y = y[:, None]  # [B, 1]

    log_z = jax.nn.logsumexp(z, axis=1, keepdims=True)
    log_a = z - log_z  # log alpha
    # log(1 - alpha): only the top class can have an alpha near 1, where 1 - alpha would lose all
    # digits. There 1 - alpha is computed as the sum of the other classes.
    is_top = jax.nn.one_hot(jnp.argmax(z, axis=1), n_classes, dtype=bool)
    rest_of_top = (
        jax.nn.logsumexp(jnp.where(is_top, losses.MASKED, z), axis=1, keepdims=True) - log_z
    )
    log_1ma = jnp.where(is_top, rest_of_top, jnp.log1p(-jnp.where(is_top, 0, jnp.exp(log_a))))

    def at(values: jax.Array, index: jax.Array) -> jax.Array:
        return jnp.take_along_axis(values, index, axis=1)

    log_aj, log_ay = at(log_a, j), at(log_a, y)  # [B, J], [B, 1]
    log_vjj = log_aj + jnp.logaddexp(at(log_1ma, j), log_ay)
    log_vjy = log_ay + jnp.logaddexp(log_aj, at(log_1ma, y))  # of |v_jy|
    log_scale = jnp.maximum(log_vjj, log_vjy)  # c_j, [B, J]

    # alpha_y - alpha_j = max(alpha_j, alpha_y) * gap, with gap = -sign(delta) (1 - e^-|delta|). The
    # two one-sided parts of delta keep the derivative right at 0, and no exponential overflows.
    delta = at(z, j) - at(z, y)  # [B, J]
    above = delta > 0
    gap = jnp.expm1(-jnp.where(above, delta, 0)) - jnp.expm1(jnp.where(above, 0, delta))
    log_larger = jnp.maximum(log_aj, log_ay)

    is_j, is_y = (jax.nn.one_hot(index, n_classes, dtype=bool) for index in (j, y))
    log_off = log_a[:, None] + (log_larger - log_scale)[..., None]
    # Double where: at k = y this exponential overflows, and isn't used.
    off = gap[..., None] * jnp.exp(jnp.where(is_j | is_y, 0, log_off))
    rows = jnp.where(is_j, jnp.exp(log_vjj - log_scale)[..., None], jnp.where(is_y, 0, off))
    rows = without_rounding(rows)
    rows = jnp.where(is_y, -jnp.sum(rows, axis=2, keepdims=True), rows)  # [B, J, K]

    tie = gap == 0  # double where: the logarithm's derivative at 0 is infinite
    log_gap = jnp.where(tie, -jnp.inf, log_larger + jnp.log(jnp.where(tie, 1, jnp.abs(gap))))
    return rows, log_scale, log_gap


def without_rounding(rows: jax.Array) -> jax.Array:
    """Zero the entries below rounding error, for rows whose largest entry is about 1."""
    return jnp.where(jnp.abs(rows) < jnp.finfo(rows.dtype).epsneg, 0, rows)
