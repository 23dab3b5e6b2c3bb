r"""Square attack: a random search that needs logits but no gradients.

A net whose gradients are useless (gradient masking) may resist `pgd` without being robust. This
search uses no gradients (Andriushchenko et al., 2020). Each query repaints one square window of the
best perturbation so far, at a random place, and is kept if the loss improves. The windows shrink as
the search proceeds. The perturbation always uses the whole radius. In linf every entry is plus or
minus eps. In l2 and l1 a second window is set to 0, and the first gets a bump with the energy of
both windows and the energy lost to clipping (a sum of squares in l2, of absolute values in l1).

Inputs that aren't images are reshaped into one: a vector fills a square row by row, and a window is
then several runs of neighbouring entries.

There are at most ten window sizes, each with its own branch, so that slice sizes are static. The
net is outside the branches and compiled once, so a query costs little more than a forward pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxadv import inputs, losses, norms
from jaxadv.attack._info import Answer, Found, reports
from jaxadv.problem import Best, Problem, fold, iterate
from jaxadv.types import ApplyFn, Bounds, Eps, Norm, Params

__all__ = ["square"]

_HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
"""The steps, from 0, after which the area of the windows is halved; as published."""


class _Search(NamedTuple):
    """The search for one norm, as functions of one example, `[H, W, C]`."""

    side: Callable[[int], int]  # the side of the windows, given the side by the schedule
    start: Callable[..., jax.Array]  # (shape, key, eps) -> r
    move: Callable[..., jax.Array]  # (r, u, eps, side) -> r, with u uniform in [0, 1), [C + 5]


class _Walk(NamedTuple):
    """The state of the search."""

    best: Best  # r as images; `success` also where there is nothing to search
    queries: jax.Array  # [B], until each example was done
    hopeless: jax.Array  # [B], examples that were given up
    before: jax.Array  # [B], the loss at the last check for hopeless examples

    @property
    def going(self) -> jax.Array:
        return ~self.best.success & ~self.hopeless

    def without_hopeless(self, i: jax.Array, steps: int, patience: int, goal: float) -> _Walk:
        """Give up, after step i, where the rate of the last queries wouldn't reach the goal."""
        loss = self.best.loss
        due = i % patience == patience - 1
        reach = loss + (loss - self.before) / patience * (steps - 1 - i)
        return self._replace(
            hopeless=self.hopeless | (due & (reach < goal)),
            before=jnp.where(due, loss, self.before),
        )


def _sign(u: jax.Array) -> jax.Array:
    return jnp.where(u < 0.5, -1, 1).astype(u.dtype)


def _corner(u: jax.Array, shape: tuple[int, ...], side: int) -> tuple[jax.Array, ...]:
    """Place a window anywhere in the image, from two uniform numbers."""
    row, column = (
        jnp.floor(u[axis] * (shape[axis] - side + 1)).astype(jnp.int32) for axis in (0, 1)
    )
    return row, column, jnp.zeros_like(row)


def _energy(v: jax.Array, p: int) -> jax.Array:
    return jnp.sum(v * v if p == 2 else jnp.abs(v), axis=(0, 1))  # of each channel


def _size(energy: jax.Array, p: int) -> jax.Array:
    return jnp.sqrt(energy) if p == 2 else energy


def _unit(v: jax.Array, p: int) -> jax.Array:
    energy = _energy(v, p)[None, None]
    return v / _size(jnp.where(energy == 0, 1, energy), p)


def _linf_start(shape: tuple[int, ...], key: jax.Array, eps: jax.Array) -> jax.Array:
    """Make vertical stripes: a sign for each column and channel."""
    sign = _sign(jax.random.uniform(key, (1, *shape[1:]), jnp.float32))
    return jnp.broadcast_to(sign * eps, shape)


def _linf_move(r: jax.Array, u: jax.Array, eps: jax.Array, side: int) -> jax.Array:
    """Paint a window: a sign for each channel."""
    channels = r.shape[2]
    colour = jnp.broadcast_to(_sign(u[:channels]) * eps, (side, side, channels))
    return lax.dynamic_update_slice(r, colour, _corner(u[channels:], r.shape, side))


def _peak(height: int, width: int, p: int) -> np.ndarray:
    """Stack concentric squares of widths 1, 3, 5, ... into a unit vector.

    Their heights are 1, 1/4, 1/9, ... in l2, and the squares of these in l1.
    """
    middle = max(height, width) // 2
    levels = np.cumsum(1 / np.arange(middle + 1, 0, -1) ** (4 / p))[::-1]
    row, column = np.ogrid[:height, :width]
    peak = levels[np.maximum(abs(row - height // 2), abs(column - width // 2))]
    return peak / np.linalg.norm(peak.ravel(), p)


def _bump(side: int, turned: jax.Array, p: int) -> jax.Array:
    """Return a peak above a trough, or to the left of it where `turned`, as a unit vector.

    Args:
      side: the side of the window.
      turned: `[...]`, booleans.
      p: 1 or 2, for l1 or l2.

    Returns:
      `[..., side, side]`, in float32.
    """
    top = side // 2
    bump = np.concatenate([_peak(top, side, p), -_peak(side - top, side, p)])
    bump = (bump / np.linalg.norm(bump.ravel(), p)).astype(np.float32)
    upright, lying = (
        jnp.broadcast_to(jnp.asarray(b), (*turned.shape, side, side)) for b in (bump, bump.T)
    )
    return jnp.where(turned[..., None, None], lying, upright)


def _lp_start(p: int, shape: tuple[int, ...], key: jax.Array, eps: jax.Array) -> jax.Array:
    """Tile the image with bumps, at least five along each side if it has as many pixels."""
    height, width, channels = shape
    side = max(min(height, width) // 5, 1)
    rows, columns = height // side, width // side
    u = jax.random.uniform(key, (rows, columns, 1 + channels), jnp.float32)
    tiles = _bump(side, u[..., 0] < 0.5, p)[..., None] * _sign(u[..., None, None, 1:])
    mosaic = tiles.swapaxes(1, 2).reshape(rows * side, columns * side, channels)
    rest = height - rows * side, width - columns * side
    mosaic = jnp.pad(mosaic, [(n // 2, n - n // 2) for n in rest] + [(0, 0)])
    return mosaic * (eps / (rows * columns * channels) ** (1 / p))  # the tiles are unit vectors


def _lp_move(p: int, r: jax.Array, u: jax.Array, eps: jax.Array, side: int) -> jax.Array:
    r"""Add a bump to a window, set another to 0, and give the first all the energy available.

    In units of eps, the new energy of the first window in each of the C channels is

    .. math:: \|r_{\text{both windows}}\|_p^p + (1 - \|r\|_p^p) / C

    The second term is the energy lost to clipping. It may be slightly negative by rounding error,
    which is thereby corrected: after each move the total energy is 1 again.
    """
    channels = r.shape[2]
    here = _corner(u[channels:], r.shape, side)
    there = _corner(u[channels + 2 :], r.shape, side)
    window = side, side, channels
    unit = jnp.where(eps > 0, eps, 1)

    def cut(r: jax.Array, corner: tuple[jax.Array, ...]) -> jax.Array:
        return lax.dynamic_slice(r, corner, window) / unit

    emptied = lax.dynamic_update_slice(r, jnp.zeros(window, r.dtype), there)
    both = _energy(cut(r, there), p) + _energy(cut(emptied, here), p)
    unspent = 1 - jnp.sum(_energy(r / unit, p))
    energy = jnp.maximum(both + unspent / channels, 0)

    bump = _bump(side, u[channels + 4] < 0.5, p)[..., None] * _sign(u[None, None, :channels])
    shape = _unit(bump.astype(r.dtype) + _unit(cut(r, here), p), p)
    return lax.dynamic_update_slice(emptied, shape * _size(energy, p)[None, None] * eps, here)


def _odd(side: int) -> int:
    return max(side, 3) | 1  # so that a bump has a middle


_SEARCHES: dict[Norm, _Search] = {
    "l1": _Search(_odd, partial(_lp_start, 1), partial(_lp_move, 1)),
    "l2": _Search(_odd, partial(_lp_start, 2), partial(_lp_move, 2)),
    "linf": _Search(lambda side: max(side, 1), _linf_start, _linf_move),
}


def _image_shape(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Return an example's height, width and channels as an image; a vector may need padding."""
    if len(shape) == 3:
        return shape[0], shape[1], shape[2]
    if len(shape) == 2:
        return shape[0], shape[1], 1
    size = math.prod(shape)
    height = math.isqrt(size - 1) + 1
    return height, -(-size // height), 1


def _side(norm: Norm, p_init: float, halvings: int, height: int, width: int) -> int:
    """Return the side of a window that covers the fraction p_init / 2^halvings of an image."""
    side = round(math.sqrt(p_init / 2**halvings * height * width))
    return min(_SEARCHES[norm].side(side), height, width)


@reports
def square(
    apply_fn: ApplyFn,
    params: Params,
    x: jax.Array,
    y: jax.Array,
    /,
    *,
    eps: Eps,
    norm: Norm = "l2",
    steps: int = 5000,
    p_init: float = 0.8,
    patience: int | None = None,
    targeted: bool = False,
    key: jax.Array | None = None,
    bounds: Bounds | None = None,
) -> Found:
    r"""Random search over square windows, in a ball around x.

    .. math:: r_{t+1} = \begin{cases} q_t & \ell(x + q_t) < \ell(x + r_t) \\ r_t & \text{otherwise}
              \end{cases}, \qquad \ell = z_y - \max_{k \ne y} z_k

    q_t is r_t with one window repainted. The windows cover the fraction p_init of the image in the
    first steps. Their area is halved after steps 10, 50, 200, 500, 1000, 2000, 4000, 6000 and 8000,
    whatever the number of steps. With `targeted` the loss is the cross-entropy of y.

    The search ends for each example when it is misclassified; one that is misclassified at x has
    r = 0. More steps with the same key never do worse. With `patience`, the search for an example
    also ends when its recent progress is too slow to succeed in the remaining queries. This is a
    heuristic, and costs some successes.

    Args:
      apply_fn: `(params, x) -> logits`, `[B, ...]` to `[B, K]`. Hashable; compiled once per object.
      params: the first argument of `apply_fn`.
      x: images `[B, H, W, C]` or `[B, H, W]`, or vectors `[B, ...]`, floating point.
      y: integer labels, `[B]`.
      eps: the ball's radius, a scalar or `[B]`; a negative traced value counts as 0.
      norm: the ball's norm: `"l1"`, `"l2"` or `"linf"`.
      steps: number of queries, at least 1, besides those at x and at the start.
      p_init: fraction of the image that the first windows cover, in (0, 1].
      patience: every `patience` queries, give up an example whose loss, at its rate since the last
        check, wouldn't reach success in the remaining queries. None: never.
      targeted: y has target classes instead of true labels.
      key: one key, or one per example, `[B]`.
      bounds: `(lo, hi)`, the box that x + r stays in. None: no box.

    Returns:
      r, of x's shape and dtype, of size at most eps. Rows are 0 or NaN as in `perturb`.

    Raises:
      TypeError: if `x` or the logits are not floating-point arrays, or `y` not integers.
      ValueError: if shapes don't match, if the norm is unknown, if a Python `eps` is negative, if
        `steps` or `patience` < 1, if `p_init` is outside (0, 1], if `bounds` is not a pair, or if
        the key is missing.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxadv import attack
      >>> def net(_, x):
      ...     total = x.sum(axis=(1, 2, 3))
      ...     return jnp.stack([total, -total], axis=1)
      >>> x, y = jnp.full((1, 6, 6, 1), 0.1), jnp.array([0])
      >>> key = jax.random.key(0)
      >>> r = attack.square(net, None, x, y, eps=0.2, norm="linf", steps=50, key=key)
      >>> net(None, x + r).argmax(axis=1).tolist()
      [1]

    References:
      Andriushchenko et al., "Square Attack: a query-efficient black-box adversarial attack via
      random search", 2020; for l1 Croce and Hein, "Mind the box: l1-APGD for sparse adversarial
      attacks on image classifiers", 2021.
    """
    inputs.at_least(1, "steps", steps, "the default is the published 5000")
    if patience is not None:
        inputs.at_least(1, "patience", patience, "None searches to the end")
    if not 0 < p_init <= 1:
        raise ValueError(f"expected 0 < p_init <= 1, got {p_init}; pass a fraction of the image")
    problem = Problem.of(
        apply_fn, params, x, y, norm=norm, eps=eps, bounds=bounds, targeted=targeted, key=key,
        loss_fn=losses.margin if targeted else losses.logit_margin, drawn_by="the square attack",
    ).keyed()  # fmt: skip
    found = _run(problem, steps=steps, p_init=p_init, patience=patience)
    return Found(problem, *found)


@partial(jax.jit, static_argnames=("steps", "p_init", "patience"))
def _run(problem: Problem, *, steps: int, p_init: float, patience: int | None) -> Answer:
    shape, problem = problem.x.shape, problem.start()
    eps, bounds, search = problem.eps, problem.bounds, _SEARCHES[problem.norm]
    batch, size = problem.x.shape
    height, width, channels = image = _image_shape(shape[1:])
    padding = math.prod(image) - size

    def folded(v: jax.Array) -> jax.Array:
        return jnp.pad(v, ((0, 0), (0, padding))).reshape(batch, *image)

    def unfolded(v: jax.Array) -> jax.Array:
        return v.reshape(batch, size + padding)[:, :size]

    if bounds is not None or padding:  # the padding's bounds are 0 and 0
        lo, hi = inputs.box((-jnp.inf, jnp.inf) if bounds is None else bounds, problem.x)
        bounds = folded(lo), folded(hi)
    x = folded(problem.x)
    halvings = [step for step in _HALVINGS if step < steps - 1]  # those before the last step
    moves = [
        jax.vmap(partial(search.move, side=_side(problem.norm, p_init, n, height, width)))
        for n in range(len(halvings) + 1)
    ]

    def draw(key: jax.Array) -> jax.Array:
        return jax.random.uniform(key, (channels + 5,), jnp.float32)

    def query(walk: _Walk, r: jax.Array) -> _Walk:
        r = norms.clip_to_box(x, r, bounds)
        success, loss = problem.value(unfolded(r))
        loss = jnp.where(loss < jnp.inf, loss, -jnp.inf)  # a logit that overflows is no progress
        going = walk.going
        # Finished examples don't change.
        best = walk.best.unless_done(Best(r, success & going, jnp.where(going, loss, -jnp.inf)))
        return walk._replace(best=best, queries=walk.queries + going.astype(jnp.int32))

    def step(i: jax.Array, walk: _Walk) -> _Walk:
        halved = jnp.sum(i > jnp.array(halvings, jnp.int32), dtype=jnp.int32)
        u = jax.vmap(draw)(fold(problem.keys, i + 1))
        walk = query(walk, lax.switch(halved, moves, walk.best.r.astype(eps.dtype), u, eps))
        return walk if patience is None else walk.without_hopeless(i, steps, patience, goal)

    # The smallest targeted loss for which the target may have the largest logit.
    goal = -math.log(problem.logits.shape[1] - 1) if problem.targeted else 0
    finite = inputs.finite(problem.x, problem.logits, eps)
    over = problem.succeeds(problem.logits) | ~problem.attackable | ~finite | (eps == 0)
    none = Best.empty(x)._replace(success=over)  # where r stays 0
    start = jax.vmap(partial(search.start, image))(fold(problem.keys, 0), eps)
    nowhere = jnp.zeros(batch, bool)
    walk = query(_Walk(none, jnp.zeros(batch, jnp.int32), nowhere, none.loss), start)
    walk = walk._replace(before=walk.best.loss)
    walk = iterate(step, walk, steps, while_any=lambda walk: walk.going)
    r = problem.answer(unfolded(walk.best.r))
    return r, 1 + walk.queries, jnp.zeros_like(walk.queries)
