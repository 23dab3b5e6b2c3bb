r"""Geometry of one example's ball together with the box that its pixels stay in.

`norms` has balls and boxes each for itself; here is what iterated attacks need of both: `ball`
projects onto their intersection, `to_plane` is the least way to a hyperplane inside the box, and
`free` leaves of a gradient what a step can follow.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from jaxadv import inputs, norms
from jaxadv.types import Bounds, Norm

__all__ = ["ball", "free", "room", "to_plane"]


def room(x: jax.Array, bounds: Bounds) -> tuple[jax.Array, jax.Array]:
    """Return how far each entry may fall, at most 0, and rise, at least 0, in the box."""
    lo, hi = inputs.box(bounds, x)
    start = x.astype(lo.dtype)
    return jnp.minimum(lo - start, 0), jnp.maximum(hi - start, 0)


def ball(
    x: jax.Array, eps: jax.Array, norm: Norm, bounds: Bounds | None
) -> Callable[[jax.Array], jax.Array]:
    """Return the function that takes r into the ball and the box, and to x's dtype."""
    if norm == "l1" and bounds is not None:
        return _l1_ball(x, eps, bounds)

    def inside(r: jax.Array) -> jax.Array:
        return norms.clip_to_box(x, norms.project(r, eps, norm), bounds)

    return inside


def free(x: jax.Array, bounds: Bounds | None) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """Return the function that takes from an ascent at r the entries that a wall of the box stops.

    A step of l1 has few entries, and those at the wall would be chosen again and again. The other
    norms' steps go on with the entries that are free, but for how far a boundary is these alone
    count in every norm.
    """
    if bounds is None:
        return lambda ascent, r: ascent
    # As far as rounding lets r come: short of hi - x by an ulp, it would never be at the wall.
    lower, upper = (norms.clip_to_box(x, end, bounds) for end in room(x, bounds))

    def leave(ascent: jax.Array, r: jax.Array) -> jax.Array:
        stopped = ((r >= upper) & (ascent > 0)) | ((r <= lower) & (ascent < 0))
        return jnp.where(stopped, 0, ascent)

    return leave


def _l1_ball(x: jax.Array, eps: jax.Array, bounds: Bounds) -> Callable[[jax.Array], jax.Array]:
    """Return the projection onto the intersection of the l1 ball and the box.

    Doing one after the other isn't that, and wastes most of the ball's radius near the box's faces
    (Croce and Hein, 2021). The nearest point lowers all magnitudes by the same amount, then cuts
    them at the box: the amount is found by bisection.
    """
    lower, upper = room(x, bounds)

    def inside(r: jax.Array) -> jax.Array:
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
        # Rounding may leave it a hair outside; shrinking moves no entry out of the box.
        size = jnp.sum(nearest, axis=1)
        nearest *= jnp.where(size > eps, eps / jnp.where(size > 0, size, 1), 1)[:, None]
        return norms.clip_to_box(x, jnp.sign(r) * nearest.reshape(r.shape), bounds)

    return inside


def to_plane(
    w: jax.Array, c: jax.Array, lower: jax.Array, upper: jax.Array, norm: Norm
) -> jax.Array:
    r"""The least d with <w, d> = c in a box around 0; where there is none, the nearest corner.

    In l2 and linf, :math:`d = \mathrm{clip}(t u, lower, upper)` with u the direction of steepest
    ascent toward the plane; <w, d> rises with t, piecewise linear and concave. Newton's method from
    0 never passes the root of such a function, since each piece's line lies above all of it, and
    ends there after a few pieces. In l1 the entries of largest :math:`|w|` are used up first.

    Args:
      w: `[B, ...]`, the plane's normal, float32 or wider.
      c: `[B]`.
      lower: of w's shape, at most 0.
      upper: of w's shape, at least 0.
      norm: the norm of d that is least.

    Returns:
      d, of w's shape and dtype.
    """
    shape, w = w.shape, w.reshape(w.shape[0], math.prod(w.shape[1:]))
    lower, upper = lower.reshape(w.shape), upper.reshape(w.shape)
    # From here on in magnitudes: an entry gains |w| for each unit of its way, at most to the wall.
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
    """Return min(t pace, most), `[B, D]`, with the t at which its sum of gains reaches the goal."""
    endless = jnp.finfo(gain.dtype).max

    def newton(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        _, t = carry
        moving = t[:, None] * pace < most
        rest = goal - jnp.sum(jnp.where(moving, 0, gain * most), axis=1)
        slope = jnp.sum(jnp.where(moving, gain * pace, 0), axis=1)
        # With all entries at the wall, any larger t will do.
        return t, jnp.clip(rest / jnp.where(slope > 0, slope, 1), t, endless)

    start = jnp.zeros_like(goal)
    _, t = lax.while_loop(lambda ts: jnp.any(ts[1] > ts[0]), newton, newton((start, start)))
    return jnp.minimum(t[:, None] * pace, most)


def _greatest_first(gain: jax.Array, goal: jax.Array, most: jax.Array) -> jax.Array:
    """Return the least total way, `[B, D]`, of which the sum of gains reaches the goal."""
    # An entry that reaches the goal alone needs no more room, were it endless.
    most = jnp.where(gain > 0, jnp.minimum(most, goal[:, None] / jnp.where(gain > 0, gain, 1)), 0)

    def gained(where: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(where, gain * most, 0), axis=1)

    def halve(_: int, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = carry
        middle = (low + high) / 2
        enough = gained(gain >= middle[:, None]) >= goal
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    # The last ones used differ by 2^-15 of the greatest gain; to share what is left among them
    # costs next to nothing, and to sort all would cost more than the net.
    low, high = lax.fori_loop(0, 16, halve, (jnp.zeros_like(goal), jnp.full_like(goal, 2)))
    used_up = gain >= high[:, None]
    last = (gain >= low[:, None]) & ~used_up
    left, worth = goal - gained(used_up), gained(last)
    share = jnp.clip(left / jnp.where(worth > 0, worth, 1), 0, 1)
    return jnp.where(used_up, most, jnp.where(last, share[:, None] * most, 0))
