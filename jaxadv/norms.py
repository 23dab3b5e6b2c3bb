"""Per-example lp geometry: norms, steepest directions, balls and boxes.

The geometry that depends on the choice of norm is in one table in this module; attacks branch on
the norm only where its sparse or signed steps need another algorithm. All functions take a batch
`[B, ...]` and treat each example as one vector. The steepest directions are the maximisers of
Proposition 3 and Section 6.1.1 (Huang et al., 2015): over the unit ball of a norm, `<g, r>` is
greatest at `steepest(g)`, where it equals the dual norm of g.

Arithmetic is in float32 or wider. Each example is first divided by its largest magnitude, so that
784 entries of 1e-23, or of 1e20, have a norm and a direction. A zero example has norm 0 and
direction 0, both with derivative 0. A gradient that is 0 or not finite is unusable: `steepest` and
`rescale`, which give every method its direction, return exactly 0 for it.

Next: `jacobian` computes the vectors to measure, `perturb` turns directions into perturbations.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from jaxadv import inputs
from jaxadv.types import Bounds, Eps, Norm

__all__ = [
    "clip_to_box",
    "dual",
    "is_zero",
    "log_norm",
    "norm",
    "project",
    "rescale",
    "sample",
    "steepest",
]


class _Geometry(NamedTuple):
    """One norm's row of the table: functions of flattened, scaled examples `[B, D]`."""

    dual: Norm
    size: Callable[[jax.Array], jax.Array]  # [B, D] -> [B]
    steepest: Callable[[jax.Array], jax.Array]  # [B, D] -> [B, D]
    project: Callable[[jax.Array, jax.Array], jax.Array]  # outside points [B, D], [B] -> [B, D]
    draw: Callable[..., jax.Array]  # (key, shape, dtype): entries of density exp(-|t|^p)


def _l2(u: jax.Array) -> jax.Array:
    square = jnp.sum(u * u, axis=1)
    # Double where: the square root's derivative at 0 is infinite, and infinity times 0 is NaN.
    positive = square != 0  # or NaN, which stays NaN
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, square, 1)), 0)


def _magnitude(u: jax.Array) -> jax.Array:
    return u * jnp.sign(u)  # jnp.abs, but with derivative 0 at 0, not 1


def _l2_steepest(u: jax.Array) -> jax.Array:
    size = _l2(u)
    return u / jnp.where(size == 0, 1, size)[:, None]


def _l1_steepest(u: jax.Array) -> jax.Array:
    k = jnp.argmax(jnp.abs(u), axis=1)  # the lowest index on ties
    return jnp.where(jnp.arange(u.shape[1])[None] == k[:, None], jnp.sign(u), 0)


def _l2_project(v: jax.Array, eps: jax.Array) -> jax.Array:
    return _flat_rescale(v, eps, "l2")


def _linf_project(v: jax.Array, eps: jax.Array) -> jax.Array:
    return jnp.clip(v, -eps[:, None], eps[:, None])


def _l1_project(v: jax.Array, eps: jax.Array) -> jax.Array:
    # optax's projection divides by its radius, so it needs a stand-in for radius 0.
    positive = eps > 0
    # Outside of the ball, it lowers all magnitudes by the same amount, at least largest - eps.
    # Subtract that first, so that rounding cannot swallow a small eps.
    magnitude = jnp.abs(v)
    largest = jnp.max(magnitude, axis=1, keepdims=True)
    lowered = jnp.maximum(magnitude - largest + eps[:, None], 0)
    v = jnp.where(largest > eps[:, None], jnp.sign(v) * lowered, v)
    # From outside, the nearest point of the ball is on the sphere. In 64-bit mode optax returns a
    # wider dtype.
    to_sphere = jax.vmap(optax.projections.projection_l1_sphere)
    nearest = to_sphere(v, jnp.where(positive, eps, 1)).astype(v.dtype)
    # optax subtracts one rounded threshold from every entry: the errors add up in the norm.
    excess = jnp.sum(_magnitude(nearest), axis=1) / jnp.where(positive, eps, 1)
    return jnp.where(positive[:, None], nearest / jnp.maximum(excess, 1)[:, None], 0)


_GEOMETRY: dict[Norm, _Geometry] = {
    "l1": _Geometry(
        "linf",
        lambda u: jnp.sum(_magnitude(u), axis=1),
        _l1_steepest,
        _l1_project,
        jax.random.laplace,
    ),
    "l2": _Geometry("l2", _l2, _l2_steepest, _l2_project, jax.random.normal),
    "linf": _Geometry(
        "l1",
        lambda u: jnp.max(_magnitude(u), axis=1),
        jnp.sign,
        _linf_project,
        partial(jax.random.uniform, minval=-1, maxval=1),
    ),
}


def _geometry(norm: Norm) -> _Geometry:
    if norm not in _GEOMETRY:
        raise ValueError(
            f"expected norm to be one of {', '.join(map(repr, _GEOMETRY))}, got {norm!r}; "
            "choose one of these names"
        )
    return _GEOMETRY[norm]


def _flat(v: jax.Array) -> jax.Array:
    v = inputs.examples(v, "v")
    return v.reshape(v.shape[0], math.prod(v.shape[1:])).astype(inputs.accum_dtype(v.dtype))


def _scaled(v: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return `v / m`, each row's largest magnitude m (1 if 0 or not finite), and finite rows."""
    largest = jnp.max(jnp.abs(v), axis=1)  # NaN where an entry is
    finite = jnp.isfinite(largest)
    # A constant for derivatives: norms and directions are homogeneous in v, so the terms through m
    # cancel.
    m = lax.stop_gradient(jnp.where((largest > 0) & finite, largest, 1))
    # A compiler may multiply by 1 / m instead, which underflows to 0 for m close to overflow.
    m = jnp.minimum(m, jnp.finfo(m.dtype).max / 8)
    return v / m[:, None], m, finite


def _flat_rescale(v: jax.Array, eps: jax.Array, norm: Norm) -> jax.Array:
    u, *_ = _scaled(v)
    size = _geometry(norm).size(u)
    return u * (eps / jnp.where(size == 0, 1, size))[:, None]


def norm(v: jax.Array, norm: Norm) -> jax.Array:
    r"""The norm of each example.

    Args:
      v: `[B, ...]`, floating point.
      norm: `"l1"`, `"l2"` or `"linf"`.

    Returns:
      `[B]`, in float32 at least; 0 with derivative 0 for a zero example.

    Raises:
      TypeError: if `v` is not floating point.
      ValueError: if `v` has no batch axis, or the norm is unknown.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxadv import norms
      >>> norms.norm(jnp.array([[3.0, -4.0]]), "l2").tolist()
      [5.0]
    """
    u, m, _ = _scaled(_flat(v))
    return m * _geometry(norm).size(u)


def log_norm(v: jax.Array, norm: Norm) -> jax.Array:
    r"""The logarithm of each example's norm, finite even where the norm overflows.

    Args:
      v: `[B, ...]`, floating point.
      norm: `"l1"`, `"l2"` or `"linf"`.

    Returns:
      `[B]`, in float32 at least; -inf with derivative 0 for a zero example.

    Raises:
      TypeError: if `v` is not floating point.
      ValueError: if `v` has no batch axis, or the norm is unknown.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxadv import norms
      >>> round(float(norms.log_norm(jnp.full((1, 4), 3e38), "l1")[0]), 3)
      89.983
    """
    u, m, _ = _scaled(_flat(v))
    size = _geometry(norm).size(u)
    zero = size == 0  # double where: the logarithm's derivative at 0 is infinite
    return jnp.where(zero, -jnp.inf, jnp.log(m) + jnp.log(jnp.where(zero, 1, size)))


def is_zero(v: jax.Array) -> jax.Array:
    """Return which examples are exactly zero.

    Args:
      v: `[B, ...]`, floating point.

    Returns:
      bool `[B]`.

    Raises:
      TypeError: if `v` is not floating point.
      ValueError: if `v` has no batch axis.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxadv import norms
      >>> norms.is_zero(jnp.array([[0.0, 0.0], [0.0, 1.0]])).tolist()
      [True, False]
    """
    # `steepest` needs the same maximum: under jit it is computed once.
    return jnp.max(jnp.abs(_flat(v)), axis=1) == 0


def dual(norm: Norm) -> Norm:
    r"""The dual norm's name: :math:`\|u\|_* = \max_{\|v\| \le 1} \langle u, v \rangle`.

    Args:
      norm: `"l1"`, `"l2"` or `"linf"`.

    Returns:
      `"linf"`, `"l2"` or `"l1"`.

    Raises:
      ValueError: if the norm is unknown.

    Example:
      >>> from jaxadv import norms
      >>> norms.dual("linf")
      'l1'

    References:
      Huang et al., 2015, Section 1.1.
    """
    return _geometry(norm).dual


def steepest(g: jax.Array, norm: Norm) -> jax.Array:
    r"""The perturbation of norm 1 with the largest inner product with a gradient.

    .. math:: \arg\max_{\|r\| \le 1} \langle g, r \rangle

    l2: :math:`g / \|g\|_2`. linf: :math:`\mathrm{sign}(g)`. l1: :math:`\mathrm{sign}(g_k) e_k` with
    :math:`k = \arg\max |g_k|`, the lowest such k on ties.

    Args:
      g: gradients, `[B, ...]`, floating point.
      norm: the norm of the unit ball.

    Returns:
      Of g's shape and dtype; exactly zero for an example that is zero or not finite.

    Raises:
      TypeError: if `g` is not floating point.
      ValueError: if `g` has no batch axis, or the norm is unknown.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxadv import norms
      >>> norms.steepest(jnp.array([[3.0, -4.0]]), "l1").tolist()
      [[0.0, -1.0]]

    References:
      Huang et al., 2015, Proposition 3 and Section 6.1.1.
    """
    g = inputs.examples(g, "g")
    u, _, usable = _scaled(_flat(g))
    direction = jnp.where(usable[:, None], _geometry(norm).steepest(u), 0)
    return direction.reshape(g.shape).astype(g.dtype)


def rescale(v: jax.Array, eps: Eps, norm: Norm) -> jax.Array:
    r"""Rescale each example to norm eps: :math:`\epsilon v / \|v\|` (step 5 of Algorithm 2).

    Args:
      v: `[B, ...]`, floating point.
      eps: the size, a scalar or `[B]`; a negative traced value counts as 0.
      norm: the norm that the size is measured in.

    Returns:
      Of v's shape and dtype; exactly zero for an example that is zero or not finite.

    Raises:
      TypeError: if `v` is not floating point.
      ValueError: if `v` has no batch axis, if a Python `eps` is negative, or the norm is unknown.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxadv import norms
      >>> norms.rescale(jnp.array([[3.0, -4.0]]), 10.0, "l2").tolist()
      [[6.0, -8.0]]

    References:
      Huang et al., 2015, Algorithm 2 and Section 6.1.2.
    """
    v = inputs.examples(v, "v")
    flat = _flat(v)
    rescaled = _flat_rescale(flat, inputs.radius(eps, flat), norm)
    usable = jnp.isfinite(jnp.max(jnp.abs(flat), axis=1, keepdims=True))
    return jnp.where(usable, rescaled, 0).reshape(v.shape).astype(v.dtype)


def project(v: jax.Array, eps: Eps, norm: Norm) -> jax.Array:
    r"""Project each example onto the ball of radius eps, in Euclidean distance.

    .. math:: \arg\min_{\|r\| \le \epsilon} \|r - v\|_2

    Args:
      v: `[B, ...]`, floating point.
      eps: the radius, a scalar or `[B]`; a negative traced value counts as 0.
      norm: the norm of the ball. The l1 ball's projection is optax's.

    Returns:
      Of v's shape and dtype; an example inside the ball is returned bit for bit.

    Raises:
      TypeError: if `v` is not floating point.
      ValueError: if `v` has no batch axis, if a Python `eps` is negative, or the norm is unknown.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxadv import norms
      >>> norms.project(jnp.array([[3.0, -4.0]]), 2.0, "linf").tolist()
      [[2.0, -2.0]]
    """
    v = inputs.examples(v, "v")
    flat = _flat(v)
    eps = inputs.radius(eps, flat)
    u, m, _ = _scaled(flat)
    geometry = _geometry(norm)
    inside = m * geometry.size(u) <= eps
    nearest = jnp.where(inside[:, None], flat, geometry.project(flat, eps))
    return nearest.reshape(v.shape).astype(v.dtype)


def sample(keys: jax.Array, x: jax.Array, eps: Eps, norm: Norm) -> jax.Array:
    r"""Draw a point uniformly at random from the ball around 0, for each example.

    Args:
      keys: one key per example, `[B]`, or one key, which is split.
      x: `[B, ...]`, floating point; only its shape and dtype are used.
      eps: the radius, a scalar or `[B]`; a negative traced value counts as 0.
      norm: the norm of the ball.

    Returns:
      `[B, ...]`, in float32 at least.

    Raises:
      TypeError: if `x` is not floating point.
      ValueError: if `x` has no batch axis, if a Python `eps` is negative, or the norm is unknown.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxadv import norms
      >>> keys = jax.random.split(jax.random.key(0), 4)
      >>> r = norms.sample(keys, jnp.zeros((4, 3)), 2.0, "l1")
      >>> bool(jnp.all(norms.norm(r, "l1") <= 2.0))
      True

    References:
      Barthe et al., "A probabilistic approach to the geometry of the l_p^n-ball", 2005: entries of
      density `exp(-|t|^p)`, normalised, at a radius distributed as U^(1/D).
    """
    x = inputs.examples(x)
    keys = inputs.keys(keys, x.shape[0], "norms.sample")
    n_entries = math.prod(x.shape[1:])
    dtype = inputs.accum_dtype(x.dtype)
    geometry = _geometry(norm)

    def draw(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        direction, radius = jax.random.split(key)
        share = jax.random.uniform(radius, (), dtype) ** (1 / n_entries)
        return geometry.draw(direction, x.shape[1:], dtype), share

    v, share = jax.vmap(draw)(keys)
    return rescale(v, inputs.radius(eps, x) * share, norm)


def clip_to_box(x: jax.Array, r: jax.Array, bounds: Bounds | None) -> jax.Array:
    r"""Round r to x's dtype, and clip its entries so that x + r lies in a box.

    Entries shrink toward 0 and never change sign, so that no norm of r grows. x + r lies in the box
    as computed in x's dtype: where rounding would carry it past a bound, r moves toward 0 by one
    unit in the last place. Entries of x outside the box are never moved further out.

    Args:
      x: `[B, ...]`, floating point, inside the box.
      r: of x's shape, in x's dtype or a wider one (then rounded toward 0 to x's dtype).
      bounds: `(lo, hi)`, numbers or arrays that broadcast to x; None for no box.

    Returns:
      Of x's shape and dtype.

    Raises:
      TypeError: if `x` or `r` is not floating point.
      ValueError: if r is not of x's shape; if `bounds` is not a pair with lo <= hi, or doesn't
        broadcast to `x`.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxadv import norms
      >>> x, r = jnp.array([[0.75, 0.5]]), jnp.array([[1.0, -0.25]])
      >>> norms.clip_to_box(x, r, (0.0, 1.0)).tolist()
      [[0.25, -0.25]]
    """
    x = inputs.examples(x)
    r = jnp.asarray(inputs.perturbation(r, x, rounded=True))
    if bounds is None:
        return _rounded_toward_zero(r, x.dtype).astype(x.dtype)
    lo, hi = inputs.box(bounds, x)
    start = x.astype(lo.dtype)
    r = r.astype(lo.dtype)
    r = jnp.clip(r, jnp.minimum(lo - start, 0), jnp.maximum(hi - start, 0))
    rounded = _rounded_toward_zero(r, x.dtype)
    # One unit is enough: lo - x and hi - x were rounded by at most half a unit.
    end = start + rounded
    return _toward_zero(rounded, (end < lo) | (end > hi), x.dtype).astype(x.dtype)


def _rounded_toward_zero(r: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Round r toward 0 to values of `dtype`, kept in r's dtype; overflow becomes infinite."""
    if r.dtype == dtype:
        return r
    kind = jnp.finfo(dtype)
    # reduce_precision, since a compiler may remove a cast to a narrower dtype and back.
    rounded = lax.reduce_precision(r, exponent_bits=kind.nexp, mantissa_bits=kind.nmant)
    longer = (jnp.abs(rounded) > jnp.abs(r)) & jnp.isfinite(rounded)
    return _toward_zero(rounded, longer, dtype)


def _toward_zero(r: jax.Array, where: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Move entries of `r`, values of `dtype` stored wider, toward 0 by one ulp of `dtype`.

    One ulp from infinity is the largest number of `dtype`.
    """
    narrow = lax.stop_gradient(r).astype(dtype)
    nearer = lax.nextafter(narrow, jnp.zeros_like(narrow)).astype(r.dtype)
    finite = jnp.isfinite(r)
    # nextafter has no derivative; the shift is a constant.
    shift = jnp.where(where & finite, nearer - lax.stop_gradient(r), 0)
    return jnp.where(where & ~finite, nearer, r + shift)
