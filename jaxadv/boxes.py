r"""Projections of perturbations onto sets that involve the box of pixel values.

`norms` handles a ball or a box separately. Here r is constrained by a ball and the box, or by a
hyperplane and the box. All functions treat each row of `[B, ...]` as one vector.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import lax

from jaxadv import inputs, norms
from jaxadv.types import Bounds, Norm

__all__ = [
    "box_limits",
    "drop_blocked",
    "farthest",
    "project_ball_and_box",
    "project_hyperplane_in_box",
]


def box_limits(x: jax.Array, bounds: Bounds) -> tuple[jax.Array, jax.Array]:
    """Return how far each entry of x may move within the box: down (<= 0) and up (>= 0)."""
    lo, hi = inputs.box(bounds, x)
    start = x.astype(lo.dtype)
    return jnp.minimum(lo - start, 0), jnp.maximum(hi - start, 0)


def farthest(x: jax.Array, bounds: Bounds, norm: Norm) -> jax.Array:
    """Return each example's distance to the farthest corner of the box, `[B]`."""
    lower, upper = box_limits(x, bounds)
    return norms.norm(jnp.maximum(-lower, upper), norm)


def drop_blocked(g: jax.Array, r: jax.Array, x: jax.Array, bounds: Bounds | None) -> jax.Array:
    r"""Zero the gradient entries that would push x + r out of the box.

    .. math:: g_k \leftarrow 0 \quad \text{where} \quad x_k + r_k = hi_k, g_k > 0 \quad \text{or}
              \quad x_k + r_k = lo_k, g_k < 0

    An l1 step has few nonzero entries, and would choose the blocked ones again and again. Steps in
    the other norms move all free entries anyway, but in every norm the distance to the decision
    boundary depends on the free entries only.

    Args:
      g: gradients, `[B, ...]`.
      r: perturbations, `[B, ...]`.
      x: `[B, ...]`.
      bounds: `(lo, hi)`; None for no box.
    """
    if bounds is None:
        return g
    # The extremes that rounding allows for r. They may be an ulp short of hi - x, so comparing r
    # with hi - x itself could miss a blocked entry.
    lower, upper = (norms.clip_to_box(x, end, bounds) for end in box_limits(x, bounds))
    blocked = ((r >= upper) & (g > 0)) | ((r <= lower) & (g < 0))
    return jnp.where(blocked, 0, g)


def project_ball_and_box(
    r: jax.Array, x: jax.Array, eps: jax.Array, norm: Norm, bounds: Bounds | None
) -> jax.Array:
    r"""Project r onto the intersection of the ball and the box, and round it to x's dtype.

    .. math:: \arg\min_{\rho} \|\rho - r\|_2 \quad \text{s.t.} \quad \|\rho\| \le \epsilon,
              \quad lo \le x + \rho \le hi

    For linf and l1, this is the nearest point. For l2 it is the nearest point of the ball, clipped
    to the box, which lies in the intersection but need not be nearest.

    Args:
      r: perturbations, `[B, ...]`, in the dtype of norms.
      x: `[B, ...]`.
      eps: the radius, `[B]`.
      norm: the norm of the ball.
      bounds: `(lo, hi)`; None for no box.
    """
    if norm == "l1" and bounds is not None:
        return _l1_ball_and_box(r, x, eps, bounds)
    return norms.clip_to_box(x, norms.project(r, eps, norm), bounds)


def _l1_ball_and_box(r: jax.Array, x: jax.Array, eps: jax.Array, bounds: Bounds) -> jax.Array:
    """Lower all magnitudes by the same amount, found by bisection, then clip them to the box.

    Projecting onto the ball and then the box would waste most of the radius where x is near the
    bounds (Croce and Hein, 2021).
    """
    lower, upper = box_limits(x, bounds)
    r = r.astype(lower.dtype)
    magnitude = jnp.abs(r).reshape(r.shape[0], math.prod(r.shape[1:]))
    most = jnp.where(r > 0, upper, -lower).reshape(magnitude.shape)

    def cut(amount: jax.Array) -> jax.Array:
        return jnp.clip(magnitude - amount[:, None], 0, most)

    def halve(_: int, ends: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = ends
        middle = (low + high) / 2
        outside = jnp.sum(cut(middle), axis=1) > eps
        return jnp.where(outside, middle, low), jnp.where(outside, high, middle)

    fits = jnp.sum(cut(jnp.zeros_like(eps)), axis=1) <= eps
    ends = jnp.zeros_like(eps), jnp.max(magnitude, axis=1)
    amount = jnp.where(fits, 0, lax.fori_loop(0, 30, halve, ends)[1])
    nearest = cut(amount)
    # Rounding may leave it slightly outside; shrinking moves no entry out of the box.
    size = jnp.sum(nearest, axis=1)
    nearest *= jnp.where(size > eps, eps / jnp.where(size > 0, size, 1), 1)[:, None]
    return norms.clip_to_box(x, jnp.sign(r) * nearest.reshape(r.shape), bounds)


def project_hyperplane_in_box(
    w: jax.Array, c: jax.Array, lower: jax.Array, upper: jax.Array, norm: Norm
) -> jax.Array:
    r"""Find the smallest step from 0 to a hyperplane within a box, or else to its nearest corner.

    .. math:: \arg\min_d \|d\| \quad \text{s.t.} \quad \langle w, d \rangle = c, \quad
              lower \le d \le upper

    In l2 and linf, :math:`d = \mathrm{clip}(t u, lower, upper)` with u the direction of steepest
    ascent toward the plane. <w, d> is an increasing, concave, piecewise linear function of t, whose
    graph lies below each of its tangents. So Newton's method, started from 0, never overshoots the
    root, and reaches it after a few pieces. In l1, entries move to their bounds one after another,
    in order of decreasing :math:`|w|`.

    Args:
      w: `[B, ...]`, the plane's normal, float32 or wider.
      c: the plane's offset, `[B]`.
      lower: of w's shape, at most 0.
      upper: of w's shape, at least 0.
      norm: the norm of d to minimise.

    Returns:
      d, of w's shape and dtype.
    """
    shape, w = w.shape, w.reshape(w.shape[0], math.prod(w.shape[1:]))
    lower, upper = lower.reshape(w.shape), upper.reshape(w.shape)
    # From here on, magnitudes: an entry gains |w| per unit that it moves, up to its bound.
    size = jnp.abs(w)
    largest = jnp.max(size, axis=1)
    scale = jnp.where(largest > 0, largest, 1)
    gain, goal = size / scale[:, None], jnp.abs(c) / scale
    heading = jnp.where((c < 0)[:, None], -1, 1) * jnp.sign(w)
    most = jnp.where(heading > 0, upper, -lower)
    if norm == "l1":
        way = _greatest_first(gain, goal, most)
    else:
        way = _together(gain, goal, most, gain if norm == "l2" else jnp.ones_like(gain))
    return (heading * way).reshape(shape)


def _together(gain: jax.Array, goal: jax.Array, most: jax.Array, pace: jax.Array) -> jax.Array:
    """Return min(t * pace, most), `[B, D]`, for the t at which the total gain reaches the goal."""
    endless = jnp.finfo(gain.dtype).max

    def newton(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        _, t = carry
        moving = t[:, None] * pace < most
        rest = goal - jnp.sum(jnp.where(moving, 0, gain * most), axis=1)
        slope = jnp.sum(jnp.where(moving, gain * pace, 0), axis=1)
        # With all entries at their bounds, any larger t will do.
        return t, jnp.clip(rest / jnp.where(slope > 0, slope, 1), t, endless)

    start = jnp.zeros_like(goal)
    _, t = lax.while_loop(lambda ts: jnp.any(ts[1] > ts[0]), newton, newton((start, start)))
    return jnp.minimum(t[:, None] * pace, most)


def _greatest_first(gain: jax.Array, goal: jax.Array, most: jax.Array) -> jax.Array:
    """Return how far each entry moves, `[B, D]`, to reach the goal at the smallest l1 norm."""
    # An entry that reaches the goal by itself needs no more room; its room may be infinite.
    most = jnp.where(gain > 0, jnp.minimum(most, goal[:, None] / jnp.where(gain > 0, gain, 1)), 0)

    def gained(where: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(where, gain * most, 0), axis=1)

    def halve(_: int, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = carry
        middle = (low + high) / 2
        enough = gained(gain >= middle[:, None]) >= goal
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    # The gains of the last entries to move differ by at most 2^-15 of the largest gain. Sharing the
    # remainder among them increases the norm by next to nothing, whereas sorting all entries would
    # cost more than the net.
    low, high = lax.fori_loop(0, 16, halve, (jnp.zeros_like(goal), jnp.full_like(goal, 2)))
    used_up = gain >= high[:, None]
    last = (gain >= low[:, None]) & ~used_up
    left, worth = goal - gained(used_up), gained(last)
    share = jnp.clip(left / jnp.where(worth > 0, worth, 1), 0, 1)
    return jnp.where(used_up, most, jnp.where(last, share[:, None] * most, 0))
