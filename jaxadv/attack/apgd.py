r"""Auto-PGD: projected gradient ascent with momentum that chooses its own step sizes.

PGD's figure depends on a step size that somebody chose. This one starts with steps as long as the
ball is wide, and halves them, for each example by itself, whenever the loss has risen too seldom
since the last of some fixed checkpoints, or hasn't reached a new maximum; it then goes on from the
best point so far (Croce and Hein, 2020). In an l1 ball, where dense steps are useless, steps are
sparse, and how sparse is adapted in the same way, in three balls that shrink to the one that is
asked for (Croce and Hein, 2021).

Losses: the margin form of cross-entropy (it orders points and directs steps as cross-entropy does,
and its gradient doesn't die), `dlr`, which doesn't change when the logits are scaled, and in
`apgd_multitargeted` the latter's targeted form, for one class after another.
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

from jaxadv import _cpu, closures, inputs, losses, meshes, norms
from jaxadv.attack import boxed, search
from jaxadv.types import ApplyFn, Bounds, Eps, LossFn, Norm, Params, StochasticFn

__all__ = ["apgd", "apgd_multitargeted"]

_RISES = 0.75  # the share of steps that have to raise the loss for the step size to be kept


@meshes.auto_axes(meshes.as_x)
def apgd(
    apply_fn: ApplyFn | StochasticFn,
    params: Params,
    x: jax.Array,
    y: jax.Array,
    /,
    *,
    eps: Eps,
    norm: Norm = "l2",
    steps: int = 100,
    loss_fn: LossFn = losses.margin,
    targeted: bool = False,
    restarts: int = 1,
    samples: int = 0,
    key: jax.Array | None = None,
    bounds: Bounds | None = None,
) -> jax.Array:
    r"""Auto-PGD: gradient ascent with momentum and step sizes that halve when it gets stuck.

    .. math:: z_{t+1} &= \Pi\bigl(r_t + s_t \arg\max_{\|u\| \le 1} \langle \nabla \ell, u
              \rangle\bigr) \\
              r_{t+1} &= \Pi\bigl(r_t + 0.75 (z_{t+1} - r_t) + 0.25 (r_t - r_{t-1})\bigr)

    from a random point, with :math:`s_0 = 2 \epsilon` and :math:`\Pi` the projection onto the ball
    (and the box). For l1: sparse steps without momentum, see the module.

    The point that is returned is the best of all iterates: one that is misclassified before one
    that isn't, then by loss. Restarts leave an example alone that has been fooled before.

    Args:
      apply_fn: `(params, x) -> logits`, `[B, ...]` to `[B, K]`. Hashable: compiled once each.
      params: the first argument of `apply_fn`.
      x: `[B, ...]`, floating point.
      y: labels, handed to `loss_fn` unchanged; integers `[B]` for the default loss. For other
        labels (soft targets) the best point is that of greatest loss.
      eps: the ball's radius, a scalar or `[B]`; a negative traced value counts as 0.
      norm: the ball's norm: `"l1"`, `"l2"` or `"linf"`.
      steps: number of steps, at least 1 (in l1 at least 3 are made, one in each of three balls);
        each a forward and a backward pass.
      loss_fn: `(logits, labels) -> [B]`, which is raised (lowered if `targeted`): the default,
        `losses.margin`, is cross-entropy's margin form; `dlr` is the other published one.
      targeted: y are the classes to reach instead of those to leave.
      restarts: how many random starts, at least 1.
      samples: 0 for a deterministic net. For one that draws random numbers, `apply_fn(params, x,
        key)`: how many draws the loss and its gradient are averaged over, new ones at each step.
      key: one key, or one per example, `[B]`.
      bounds: `(lo, hi)`, the box that x + r stays in. None: no box.

    Returns:
      r, of x's shape and dtype, of a size of at most eps. Rows are 0 or NaN as in `perturb`.

    Raises:
      TypeError: if `x` or the logits are not floating-point arrays; if `y` are not integers, for
        the default loss.
      ValueError: if shapes don't match, if the norm is unknown, if a Python `eps` is negative, if
        `steps` or `restarts` < 1, if `samples` < 0, if `bounds` is not a pair, or without a key.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxadv import attack
      >>> w = jnp.array([[3.0, -3.0], [4.0, -4.0]])
      >>> x, y = jnp.array([[1.0, 1.0]]), jnp.array([0])
      >>> r = attack.apgd(lambda w, x: x @ w, w, x, y, eps=5.0, key=jax.random.key(0))
      >>> bool(jnp.allclose(r, jnp.array([[-3.0, -4.0]]), atol=1e-3))
      True

    References:
      Croce and Hein, "Reliable evaluation of adversarial robustness with an ensemble of diverse
      parameter-free attacks", 2020; "Mind the box: l1-APGD for sparse adversarial attacks on image
      classifiers", 2021.
    """
    x, y, eps = _checked(x, y, eps, norm, steps, bounds)
    keys = search.keys(key, x, True, restarts, samples)
    apply_fn = closures.keyed(apply_fn, params, x)
    return _run(
        apply_fn, norm, steps, loss_fn, targeted, restarts, samples, params, x, y, eps, keys, bounds
    )


@meshes.auto_axes(meshes.as_x)
def apgd_multitargeted(
    apply_fn: ApplyFn,
    params: Params,
    x: jax.Array,
    y: jax.Array,
    /,
    *,
    eps: Eps,
    norm: Norm = "l2",
    steps: int = 100,
    n_targets: int = 9,
    key: jax.Array | None = None,
    bounds: Bounds | None = None,
) -> jax.Array:
    r"""Auto-PGD towards each of the likeliest wrong classes in turn, by the targeted DLR loss.

    .. math:: -\frac{z_y - z_t}{z_{\pi_1} - (z_{\pi_3} + z_{\pi_4}) / 2}

    for t the likeliest class but y, the next, and so on; an example that has been fooled is left
    alone. (With fewer than four classes: :math:`z_t - z_y`.)

    Args:
      apply_fn: `(params, x) -> logits`, `[B, ...]` to `[B, K]`. Hashable: compiled once each.
      params: the first argument of `apply_fn`.
      x: `[B, ...]`, floating point.
      y: integer labels, `[B]`.
      eps: the ball's radius, a scalar or `[B]`; a negative traced value counts as 0.
      norm: the ball's norm: `"l1"`, `"l2"` or `"linf"`.
      steps: number of steps for each target, at least 1.
      n_targets: how many targets, at least 1; K - 1 where that is less.
      key: one key, or one per example, `[B]`.
      bounds: `(lo, hi)`, the box that x + r stays in. None: no box.

    Returns:
      r, of x's shape and dtype, of a size of at most eps. Rows are 0 or NaN as in `perturb`.

    Raises:
      TypeError: if `x` or the logits are not floating-point arrays, or `y` not integers.
      ValueError: if shapes don't match, if the norm is unknown, if a Python `eps` is negative, if
        `steps` or `n_targets` < 1, if `bounds` is not a pair, or without a key.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxadv import attack
      >>> x, y = jnp.array([[1.0, 0.0, 0.5, 0.0]]), jnp.array([0])
      >>> r = attack.apgd_multitargeted(lambda _, x: x, None, x, y, eps=0.5, key=jax.random.key(0))
      >>> int(jnp.argmax(x + r))
      2

    References:
      Croce and Hein, 2020, Section 4.
    """
    inputs.at_least(1, "n_targets", n_targets, "9 is the published number")
    y = inputs.labels(y, np.shape(x)[0])
    x, y, eps = _checked(x, y, eps, norm, steps, bounds)
    keys = search.keys(key, x, True, 1, 0)
    apply_fn = closures.keyed(apply_fn, params, x)
    return _run_targets(apply_fn, norm, steps, n_targets, params, x, y, eps, keys, bounds)


def _checked(
    x: jax.Array, y: jax.Array, eps: Eps, norm: Norm, steps: int, bounds: Bounds | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    inputs.at_least(1, "steps", steps, "100 is the published number")
    norms.dual(norm)  # known?
    x = inputs.examples(x)
    y = inputs.paired(x, y)
    if bounds is not None:
        inputs.box(bounds, x)  # now, while they are numbers
    return x, y, inputs.radius(eps, x)


@partial(jax.jit, static_argnums=range(7))
def _run(
    apply_fn: Callable[..., jax.Array],
    norm: Norm,
    steps: int,
    loss_fn: LossFn,
    targeted: bool,
    restarts: int,
    samples: int,
    params: Params,
    x: jax.Array,
    y: jax.Array,
    eps: jax.Array,
    keys: jax.Array,
    bounds: Bounds | None,
) -> jax.Array:
    starts, draws = search.streams(keys)
    problem = search.Problem(
        apply_fn, params, x, y, loss_fn, targeted=targeted, samples=samples, keys=draws
    )

    def run(restart: jax.Array | int) -> search.Best:
        first = restart * len(_PHASES[norm]) * (steps + 1)
        return _ascend(problem, search.fold(starts, restart), eps, norm, steps, bounds, first)

    return problem.answer(search.restarted(run, restarts, search.nothing(x)).r, eps)


@partial(jax.jit, static_argnums=range(4))
def _run_targets(
    apply_fn: ApplyFn,
    norm: Norm,
    steps: int,
    n_targets: int,
    params: Params,
    x: jax.Array,
    y: jax.Array,
    eps: jax.Array,
    keys: jax.Array,
    bounds: Bounds | None,
) -> jax.Array:
    logits = inputs.apply(apply_fn, params, x)
    is_y = jax.nn.one_hot(y, logits.shape[1], dtype=bool)
    n_targets = min(n_targets, logits.shape[1] - 1)
    largest, targets = lax.top_k(jnp.where(is_y, -jnp.inf, logits), n_targets)  # [B, n_targets]
    # A masked class is out of reach: once more towards the likeliest instead.
    targets = jnp.where(jnp.isneginf(largest), targets[:, :1], targets)

    def problem_for(target: jax.Array) -> search.Problem:
        return search.Problem(
            apply_fn, params, x, y, partial(losses.targeted_dlr, target=target), targeted=False
        )

    def run(rank: jax.Array | int) -> search.Best:
        starts = search.fold(keys, rank)
        return _ascend(problem_for(targets[:, rank]), starts, eps, norm, steps, bounds, 0)

    best = search.restarted(run, n_targets, search.nothing(x))
    return problem_for(targets[:, 0]).answer(best.r, eps)


# The radius of the ball, in eps, and the share of the steps that are made in it.
_PHASES: dict[Norm, tuple[tuple[float, float], ...]] = {
    "l1": ((3.0, 0.3), (2.0, 0.3), (1.0, 0.4)),
    "l2": ((1.0, 1.0),),
    "linf": ((1.0, 1.0),),
}


def _ascend(
    problem: search.Problem,
    starts: jax.Array,
    eps: jax.Array,
    norm: Norm,
    steps: int,
    bounds: Bounds | None,
    first: jax.Array | int,
) -> search.Best:
    """Run once from a random point; return the best of the ball of radius eps."""
    x = problem.x
    climb = partial(_climb_l1, boxed.free(x, bounds)) if norm == "l1" else partial(_climb, norm)
    phases = _PHASES[norm]
    counts = [max(1, round(share * steps)) for _, share in phases[:-1]]
    counts.append(max(1, steps - sum(counts)))
    if norm == "l1":  # whose ball is all corners: of the nearest point most entries are 0
        r = jax.vmap(lambda key: jax.random.normal(key, x.shape[1:], eps.dtype))(starts)
    else:
        r = norms.sample(starts, x, phases[0][0] * eps, norm)
    for (factor, _), n in zip(phases, counts, strict=True):
        inside = boxed.ball(x, factor * eps, norm, bounds)
        r, best = climb(problem, inside(r), factor * eps, n, inside, first)
        first = first + n + 1
    return best


class _Climb(NamedTuple):
    """What the ascent of each example has come to; every leaf has B rows."""

    r: jax.Array
    g: jax.Array  # the gradient there
    previous: jax.Array  # the r before
    loss: jax.Array  # where the last step led, whether or not that was gone back from
    highest: jax.Array
    highest_r: jax.Array
    highest_g: jax.Array
    step_size: jax.Array
    best: search.Best  # by success first, which `highest` isn't

    def from_highest(self, where: jax.Array) -> _Climb:
        """Go back to the highest point."""
        rows = inputs.expand_like(where, self.r)
        return self._replace(
            r=jnp.where(rows, self.highest_r, self.r), g=jnp.where(rows, self.highest_g, self.g)
        )


def _begin(
    problem: search.Problem, r: jax.Array, step_size: jax.Array, first: jax.Array | int
) -> _Climb:
    success, loss, g = problem.gradient(r, first)
    best = search.nothing(problem.x).with_point(r, success, loss)
    return _Climb(r, g, r, loss, loss, r, g, step_size, best)


def _move(problem: search.Problem, state: _Climb, r: jax.Array, step: jax.Array | int) -> _Climb:
    """Step to r, and look where that is."""
    success, loss, g = problem.gradient(r, step)
    higher = loss > state.highest
    rows = inputs.expand_like(higher, r)
    return state._replace(
        r=r,
        g=g,
        previous=state.r,
        loss=loss,
        highest=jnp.where(higher, loss, state.highest),
        highest_r=jnp.where(rows, r, state.highest_r),
        highest_g=jnp.where(rows, g, state.highest_g),
        best=state.best.with_point(r, success, loss),
    )


def _windows(steps: int) -> np.ndarray:
    """Return, for each step, how many steps it completes since the last checkpoint; 0 if none."""
    length, shorter, least = (max(int(share * steps), 1) for share in (0.22, 0.03, 0.06))
    windows = np.zeros(steps, np.int32)
    at = length
    while at <= steps:
        windows[at - 1] = length
        length = max(length - shorter, least)
        at += length
    return windows


# An ascent; how often it rose since the checkpoint before, whether it was stuck there, how high.
_Watched = tuple[_Climb, jax.Array, jax.Array, jax.Array]


def _climb(
    norm: Norm,
    problem: search.Problem,
    r: jax.Array,
    eps: jax.Array,
    steps: int,
    inside: Callable[[jax.Array], jax.Array],
    first: jax.Array | int,
) -> tuple[jax.Array, search.Best]:
    """Ascend with momentum; return the highest point and the best."""
    windows = jnp.asarray(_windows(steps), eps.dtype)

    @_cpu.fast_convolutions
    def step(i: jax.Array, carry: _Watched) -> _Watched:
        state, rises, halved, before = carry
        at = state.r.astype(state.g.dtype)
        share = jnp.where(i > 0, 0.75, 1).astype(at.dtype)
        size = inputs.expand_like(state.step_size, at)
        ahead = inside(at + size * norms.steepest(state.g, norm)).astype(at.dtype)
        momentum = at - state.previous.astype(at.dtype)
        moved = _move(
            problem, state, inside(at + share * (ahead - at) + (1 - share) * momentum),
            first + 1 + i,
        )  # fmt: skip
        rises = rises + (moved.loss > state.loss).astype(rises.dtype)
        # Checkpoint: too few steps went up, or (at the second in a row) none to a new height.
        stuck = (rises <= _RISES * windows[i]) | (~halved & (before >= moved.highest))
        due = windows[i] > 0
        stuck &= due
        moved = moved.from_highest(stuck)
        moved = moved._replace(step_size=jnp.where(stuck, moved.step_size / 2, moved.step_size))
        return (
            moved,
            jnp.where(due, 0, rises),
            jnp.where(due, stuck, halved),
            jnp.where(due, moved.highest, before),
        )

    state = _begin(problem, r, 2 * eps, first)
    carry = (state, jnp.zeros_like(eps), jnp.ones(eps.shape, bool), state.highest)
    state = lax.fori_loop(0, steps, step, carry)[0]
    return state.highest_r, state.best


def _climb_l1(
    free: Callable[[jax.Array, jax.Array], jax.Array],
    problem: search.Problem,
    r: jax.Array,
    eps: jax.Array,
    steps: int,
    inside: Callable[[jax.Array], jax.Array],
    first: jax.Array | int,
) -> tuple[jax.Array, search.Best]:
    """Ascend by sparse steps; return the highest point and the best.

    Unlike the published one's, a step has no entries that a wall of the box stops, nor do these
    count when the next one's are: on images with much black or white they would be most of it.
    """
    size = math.prod(r.shape[1:])
    every = max(int(0.04 * steps), 1)

    def nonzeros(r: jax.Array) -> jax.Array:
        return jnp.sum(free(jnp.sign(r), r).reshape(-1, size) != 0, axis=1).astype(eps.dtype)

    @_cpu.fast_convolutions
    def step(
        i: jax.Array, carry: tuple[_Climb, jax.Array, jax.Array]
    ) -> tuple[_Climb, jax.Array, jax.Array]:
        state, share, support = carry
        g = free(state.g, state.r).reshape(-1, size)
        magnitude = jnp.abs(g)
        # Rounded: rounding up, a support of two would never become one.
        rank = size - jnp.clip(jnp.round(share * size), 1, size).astype(jnp.int32)
        least = jnp.take_along_axis(jnp.sort(magnitude, axis=1), rank[:, None], axis=1)
        sparse = jnp.where(magnitude >= least, jnp.sign(g), 0)
        ahead = norms.rescale(sparse.reshape(r.shape), state.step_size, "l1")
        moved = _move(problem, state, inside(state.r.astype(ahead.dtype) + ahead), first + 1 + i)

        now = nonzeros(moved.highest_r)
        due = (i + 1) % every == 0
        sparser = due & (now < 0.95 * support)
        step_size = jnp.where(sparser, eps, jnp.clip(moved.step_size / 1.5, eps / 10, eps))
        moved = moved.from_highest(sparser)
        moved = moved._replace(step_size=jnp.where(due, step_size, moved.step_size))
        share, support = (
            jnp.where(due, new, old) for new, old in ((now / size / 1.5, share), (now, support))
        )
        return moved, share, support

    state = _begin(problem, r, eps, first)
    support = nonzeros(r)
    state = lax.fori_loop(0, steps, step, (state, support / size / 1.5, support))[0]
    return state.highest_r, state.best
