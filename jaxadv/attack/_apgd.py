r"""Auto-PGD: projected gradient ascent with momentum that chooses its own step sizes.

PGD needs a step size that the user has to choose. Auto-PGD starts with a step size equal to the
diameter of the ball. At fixed checkpoints it halves the step size of each example whose loss has
risen in too few steps since the last checkpoint, or has reached no new maximum, and continues from
the example's best point (Croce and Hein, 2020). In an l1 ball, where dense steps are ineffective,
steps are sparse. Their sparsity is adapted at checkpoints too, in three balls that shrink to the
ball of radius eps (Croce and Hein, 2021).

Without eps both attacks search for the smallest ball in which they succeed, by bisection.

Losses: the margin form of cross-entropy (it ranks points as cross-entropy does and its gradient has
the same direction, but doesn't vanish); `dlr`, which doesn't change when the logits are scaled; and
in `apgd_multitargeted` the targeted form of `dlr`, for one class after another.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxadv import _cpu, boxes, inputs, jacobian, losses, norms
from jaxadv.attack._closest import Closest
from jaxadv.attack._deepfool import class_distances
from jaxadv.attack._info import Answer, Found, reports
from jaxadv.problem import (
    Best,
    Problem,
    beyond_rounding,
    bisect_to_boundary,
    fold,
    gap_to_cross,
    iterate,
    run_restarts,
)
from jaxadv.types import ApplyFn, Bounds, Eps, LossFn, Norm, Params, StochasticFn

__all__ = ["apgd", "apgd_multitargeted"]

_ORDERS = "logit", "distance", "alpha"
RANKED = 100  # number of classes to rank by distance, those with the largest logits
_ROUNDS = 20  # number of balls in a search for the smallest one
_REFUTED = 0.9  # a success of size s lowers the lower end of the search to this multiple of s
_RISES = 0.75  # fraction of steps that have to raise the loss for the step size to be kept


@reports
def apgd(
    apply_fn: ApplyFn | StochasticFn,
    params: Params,
    x: jax.Array,
    y: jax.Array,
    /,
    *,
    eps: Eps | None,
    norm: Norm = "l2",
    steps: int = 100,
    loss_fn: LossFn = losses.margin,
    targeted: bool = False,
    restarts: int = 1,
    samples: int = 0,
    key: jax.Array | None = None,
    bounds: Bounds | None = None,
) -> Found:
    r"""Auto-PGD: gradient ascent with momentum and step sizes that halve when it gets stuck.

    .. math:: z_{t+1} &= \Pi\bigl(r_t + s_t \arg\max_{\|u\| \le 1} \langle \nabla \ell, u
              \rangle\bigr) \\
              r_{t+1} &= \Pi\bigl(r_t + 0.75 (z_{t+1} - r_t) + 0.25 (r_t - r_{t-1})\bigr)

    from a random point, with :math:`s_0 = 2 \epsilon` and :math:`\Pi` the projection onto the ball
    (and the box). For l1, steps are sparse and without momentum, see the module.

    Each example's best iterate is returned: misclassified points rank first, then those of higher
    loss. Restarts skip examples that are already misclassified.

    With `eps=None`, r is the smallest that a search over eps finds, separately for each example. It
    tries 20 balls, each with all `steps` and `restarts`. The first reaches the decision boundary of
    the linearised net. The radius is doubled until a run succeeds; from then on it is halfway
    between the largest failure and the smallest success. Each success is scaled down to the
    boundary.

    Args:
      apply_fn: `(params, x) -> logits`, `[B, ...]` to `[B, K]`. Hashable; compiled once per object.
      params: the first argument of `apply_fn`.
      x: `[B, ...]`, floating point.
      y: labels, passed to `loss_fn` unchanged; integers `[B]` for the default loss. For other
        labels (soft targets) the best point is the one of highest loss.
      eps: the ball's radius, a scalar or `[B]`; a negative traced value counts as 0. None for the
        smallest r.
      norm: the ball's norm: `"l1"`, `"l2"` or `"linf"`.
      steps: number of steps in each ball, at least 1 (in l1 at least 3 are made, one in each of
        three balls); each a forward and a backward pass.
      loss_fn: `(logits, labels) -> [B]`, to maximise (to minimise if `targeted`). The default,
        `losses.margin`, is cross-entropy's margin form; the paper's other loss is `losses.dlr`.
      targeted: y has target classes instead of true labels.
      restarts: number of random starts, at least 1.
      samples: 0 for a deterministic net. For one that draws random numbers, `apply_fn(params, x,
        key)`: number of draws that the loss and its gradient are averaged over, new ones at each
        step.
      key: one key, or one per example, `[B]`.
      bounds: `(lo, hi)`, the box that x + r stays in. None: no box.

    Returns:
      r, of x's shape and dtype, of size at most eps. Without eps it is exactly 0 where x is already
      misclassified, and where nothing was found. Rows are 0 or NaN as in `perturb`.

    Raises:
      TypeError: if `x` or the logits are not floating-point arrays; if `y` are not integers, for
        the default loss or without eps.
      ValueError: if shapes don't match, if the norm is unknown, if a Python `eps` is negative, if
        `steps` or `restarts` < 1, if `samples` < 0, if `bounds` is not a pair, or if the key is
        missing.

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
    inputs.at_least(1, "steps", steps, "100 is the published number")
    inputs.at_least(1, "restarts", restarts, "1 is a single run")
    problem = Problem.of(
        apply_fn, params, x, y, norm=norm, eps=eps, bounds=bounds, loss_fn=loss_fn,
        minimal=True, any_labels=eps is not None, targeted=targeted, samples=samples, key=key,
        drawn_by="a random start",
    ).keyed()  # fmt: skip
    return Found(problem, *_run(problem, steps=steps, restarts=restarts))


@reports
def apgd_multitargeted(
    apply_fn: ApplyFn,
    params: Params,
    x: jax.Array,
    y: jax.Array,
    /,
    *,
    eps: Eps | None,
    norm: Norm = "l2",
    steps: int = 100,
    n_targets: int = 9,
    order: Literal["logit", "distance", "alpha"] = "logit",
    key: jax.Array | None = None,
    bounds: Bounds | None = None,
) -> Found:
    r"""Auto-PGD toward one wrong class after another, on the targeted DLR loss.

    .. math:: -\frac{z_y - z_t}{z_{\pi_1} - (z_{\pi_3} + z_{\pi_4}) / 2}

    for t the first class of the order, the next, and so on (see `losses.targeted_dlr` for nets with
    two or three classes). Once an example is misclassified, further targets skip it. With
    `eps=None`, r is the smallest found by the search of `apgd`, where each of the 20 balls tries
    the targets in turn until one succeeds.

    Args:
      apply_fn: `(params, x) -> logits`, `[B, ...]` to `[B, K]`. Hashable; compiled once per object.
      params: the first argument of `apply_fn`.
      x: `[B, ...]`, floating point.
      y: integer labels, `[B]`.
      eps: the ball's radius, a scalar or `[B]`; a negative traced value counts as 0. None for the
        smallest r.
      norm: the ball's norm: `"l1"`, `"l2"` or `"linf"`.
      steps: number of steps for each target in each ball, at least 1.
      n_targets: number of targets, at least 1; at most K - 1 are used.
      order: the order of the targets: `"logit"`, by logit at x, largest first (as published);
        `"distance"`, by distance to the linearised boundary, nearest first, without the entries
        that the box blocks (MALT); `"alpha"`, the same with the softmax linearised, ignoring the
        box. The last two cost a forward pass, and a backward pass for each ranked class: the 100
        with the largest logits, or `n_targets` if that is more.
      key: one key, or one per example, `[B]`.
      bounds: `(lo, hi)`, the box that x + r stays in. None: no box.

    Returns:
      r, of x's shape and dtype, of size at most eps. Without eps it is exactly 0 where x is already
      misclassified, and where nothing was found. Rows are 0 or NaN as in `perturb`.

    Raises:
      TypeError: if `x` or the logits are not floating-point arrays, or `y` not integers.
      ValueError: if shapes don't match, if the norm is unknown, if a Python `eps` is negative, if
        `steps` or `n_targets` < 1, if the order is unknown, if `bounds` is not a pair, or if the
        key is missing.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxadv import attack
      >>> x, y = jnp.array([[1.0, 0.0, 0.5, 0.0]]), jnp.array([0])
      >>> r = attack.apgd_multitargeted(lambda _, x: x, None, x, y, eps=0.5, key=jax.random.key(0))
      >>> int(jnp.argmax(x + r))
      2

    References:
      Croce and Hein, 2020, Section 4; Melamed et al., "MALT Powers Up Adversarial Attacks", 2024.
    """
    inputs.at_least(1, "n_targets", n_targets, "9 is the published number")
    inputs.at_least(1, "steps", steps, "100 is the published number")
    if order not in _ORDERS:
        raise ValueError(
            f"expected order to be one of {', '.join(map(repr, _ORDERS))}, got {order!r}; choose "
            "one of these"
        )
    problem = Problem.of(
        apply_fn, params, x, y, norm=norm, eps=eps, bounds=bounds, minimal=True, key=key,
        drawn_by="a random start",
    ).keyed()  # fmt: skip
    found = _run_targets(problem, steps=steps, n_targets=n_targets, order=order)
    return Found(problem, *found)


@partial(jax.jit, static_argnames=("steps", "restarts"))
def _run(problem: Problem, *, steps: int, restarts: int) -> Answer:
    problem = problem.start()
    keys = fold(problem.keys, 0)
    draws = max(problem.samples, 1)
    passes = draws * sum(n + 1 for _, n in phases_of(problem.norm, steps))
    # Each run gets its own range of step numbers, from which a random net's draws derive.
    stride = len(_PHASES[problem.norm]) * (steps + 1)

    def in_ball(problem: Problem, first: jax.Array | int) -> tuple[Best, jax.Array]:
        def run(restart: jax.Array | int) -> Best:
            number = first * restarts + restart
            return _ascend(problem, fold(keys, number), steps, number * stride)

        return run_restarts(run, restarts, problem.x)

    if problem.eps is None:
        r, runs, others = _search(problem, in_ball)
        return problem.answer(r), draws * (1 + others) + runs * passes, draws + runs * passes
    best, runs = in_ball(problem, 0)
    return problem.answer(best.r), draws + runs * passes, runs * passes


@partial(jax.jit, static_argnames=("steps", "n_targets", "order"))
def _run_targets(problem: Problem, *, steps: int, n_targets: int, order: str) -> Answer:
    problem = problem.start()
    n_targets = min(n_targets, problem.logits.shape[1] - 1)
    targets = _by_logit(problem, n_targets if order == "logit" else max(n_targets, RANKED))
    forward: jax.Array | int = 1
    backward: jax.Array | int = 0
    if order != "logit":
        forward, backward = 2, targets.shape[1]
        targets = _by_distance(problem, targets, order)[:, :n_targets]
    passes = sum(n + 1 for _, n in phases_of(problem.norm, steps))

    def in_ball(problem: Problem, first: jax.Array | int) -> tuple[Best, jax.Array]:
        def run(rank: jax.Array | int) -> Best:
            toward = partial(losses.targeted_dlr, target=targets[:, rank])
            keys = fold(problem.keys, first * n_targets + rank)
            return _ascend(replace(problem, loss_fn=toward), keys, steps, 0)

        return run_restarts(run, n_targets, problem.x)

    if problem.eps is None:
        r, runs, others = _search(problem, in_ball)
        forward, backward = forward + others, backward + 1
    else:
        best, runs = in_ball(problem, 0)
        r = best.r
    return problem.answer(r), forward + runs * passes, backward + runs * passes


def _by_logit(problem: Problem, n: int) -> jax.Array:
    """Return the n wrong classes with the largest logits (or all), `[B, n]`, largest first."""
    n = min(n, problem.logits.shape[1] - 1)
    largest, classes = losses.largest_wrong(problem.logits, problem.y, n)
    # A masked class can't be reached: the top wrong class is tried once more instead.
    return jnp.where(jnp.isneginf(largest), classes[:, :1], classes)


def _by_distance(problem: Problem, classes: jax.Array, order: str) -> jax.Array:
    """Return the classes `[B, J]` sorted by distance to their linearised boundary.

    Repetitions of the first class come last.
    """
    if order == "alpha":
        _, rows_of = jacobian.class_pullback(
            problem.apply_fn, problem.params, problem.x, problem.y
        )  # fmt: skip
    else:
        _, distances = class_distances(problem, jnp.zeros_like(problem.x))

    def to_one(classes: jax.Array) -> jax.Array:
        if order == "distance":
            return distances(classes[:, None]).distance[:, 0]
        rows = rows_of(classes[:, None])
        slope = norms.log_norm(rows.d[:, 0], norms.dual(problem.norm))
        return rows.log_gap[:, 0] - rows.log_scale[:, 0] - slope

    sizes = lax.map(_cpu.fast_convolutions(to_one), classes.T).T  # one by one, for memory
    repeated = (classes == classes[:, :1]) & (jnp.arange(classes.shape[1]) > 0)[None]
    order_of = jnp.argsort(jnp.where(repeated, jnp.inf, sizes), axis=1)
    return jnp.take_along_axis(classes, order_of, axis=1)


class _Searched(NamedTuple):
    closest: Closest
    eps: jax.Array  # [B], radius of the next ball
    low: jax.Array  # [B], radius of the largest ball in which nothing was found
    runs: jax.Array  # [B], number of runs made
    tries: jax.Array  # [B], number of other forward passes


def _search(
    problem: Problem, in_ball: Callable[[Problem, jax.Array], tuple[Best, jax.Array]]
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Search for the smallest ball in which an attack succeeds.

    Args:
      problem: with the logits at x, without eps.
      in_ball: attacks in a ball, given the problem with its eps and the number of the round;
        returns the best point and the number of runs.

    Returns:
      r; the number of runs, `[B]`; the number of other forward passes, `[B]`.
    """
    x, norm = problem.x, problem.norm
    judge = replace(problem, loss_fn=losses.logit_margin)
    clear = beyond_rounding(judge)
    dtype = inputs.accum_dtype(x.dtype)
    largest = jnp.full(x.shape[0], jnp.sqrt(jnp.finfo(dtype).max), dtype)
    if problem.bounds is not None:
        largest = jnp.minimum(largest, boxes.farthest(x, problem.bounds, norm))

    def misleads(r: jax.Array) -> jax.Array:
        return clear(*judge.value(r))

    def narrow(i: jax.Array, state: _Searched) -> _Searched:
        best, runs = in_ball(replace(problem, eps=state.eps), i)
        hit = misleads(best.r)
        r, tries = bisect_to_boundary(misleads, best.r, hit)
        closest = state.closest.with_point(r, norms.norm(r, norm), best.success, hit)
        size = closest.clearly.size
        # A success within a ball refutes an earlier failure there.
        low = jnp.where(hit, jnp.minimum(state.low, _REFUTED * size), state.eps)
        wider = jnp.minimum(2 * state.eps, largest)
        eps = jnp.where(jnp.isfinite(size), (low + size) / 2, wider)
        return _Searched(closest, eps, low, state.runs + runs, state.tries + tries + 1)

    closest = Closest.at_x(judge, clear)
    _, loss, g = judge.gradient(jnp.zeros_like(x))
    slope = norms.norm(g, norms.dual(norm))
    flat = ~((slope > 0) & jnp.isfinite(slope))
    # Start with the distance to the boundary of the linearised net.
    gap = gap_to_cross(jnp.abs(loss), problem.logits, x.dtype)
    eps = jnp.minimum(jnp.where(flat, 1, gap / jnp.where(flat, 1, slope)), largest)
    eps = jnp.where(closest.clearly.found, 0, eps)  # where x itself succeeds
    none = jnp.zeros(x.shape[0], jnp.int32)
    state = _Searched(closest, eps, jnp.zeros_like(eps), none, none)
    state = iterate(narrow, state, _ROUNDS)
    return state.closest.r, state.runs, state.tries + 3


# The radius of each ball, in units of eps, and the fraction of the steps made in it.
_PHASES: dict[Norm, tuple[tuple[float, float], ...]] = {
    "l1": ((3.0, 0.3), (2.0, 0.3), (1.0, 0.4)),
    "l2": ((1.0, 1.0),),
    "linf": ((1.0, 1.0),),
}


def phases_of(norm: Norm, steps: int) -> list[tuple[float, int]]:
    """Return each phase of an ascent: its ball's radius in units of eps, and its steps."""
    factors, shares = zip(*_PHASES[norm], strict=True)
    counts = [max(1, round(share * steps)) for share in shares[:-1]]
    counts.append(max(1, steps - sum(counts)))
    return list(zip(factors, counts, strict=True))


def _ascend(problem: Problem, keys: jax.Array, steps: int, first: jax.Array | int) -> Best:
    """Run once from a random point; return the best point in the ball of radius eps."""
    x, eps, norm = problem.x, problem.eps, problem.norm
    phases = phases_of(norm, steps)
    if norm == "l1":  # projected below, which leaves few nonzero entries
        r = jax.vmap(lambda key: jax.random.normal(key, x.shape[1:], eps.dtype))(keys)
    else:
        r = norms.sample(keys, x, phases[0][0] * eps, norm)
    climb = _climb_l1 if norm == "l1" else _climb
    for factor, n in phases:
        ball = replace(problem, eps=factor * eps)
        r, best = climb(ball, ball.project(r), n, first)
        first = first + n + 1
    return best


class _Climb(NamedTuple):
    """The state of each example's ascent; every leaf has B rows."""

    r: jax.Array
    g: jax.Array  # the gradient at r
    previous: jax.Array  # the r before
    loss: jax.Array  # after the last step, whether or not its point was kept
    highest: jax.Array  # the highest loss so far
    highest_r: jax.Array
    highest_g: jax.Array
    step_size: jax.Array
    best: Best  # ranked by success first, unlike `highest`

    def from_highest(self, where: jax.Array) -> _Climb:
        """Return the state moved to the highest point, in some rows."""
        rows = where[:, None]
        return self._replace(
            r=jnp.where(rows, self.highest_r, self.r), g=jnp.where(rows, self.highest_g, self.g)
        )


def _begin(problem: Problem, r: jax.Array, step_size: jax.Array, first: jax.Array | int) -> _Climb:
    success, loss, g = problem.gradient(r, first)
    best = Best.empty(problem.x).with_point(r, success, loss)
    # Where a random start leads to NaN, begin at x; the first step finds the gradient there.
    lost = jnp.isnan(loss) | ~jnp.all(jnp.isfinite(g), axis=1)
    r, g = (jnp.where(lost[:, None], 0, of) for of in (r, g))
    loss = jnp.where(lost, -jnp.inf, loss)
    return _Climb(r, g, r, loss, loss, r, g, step_size, best)


def _move(problem: Problem, state: _Climb, r: jax.Array, step: jax.Array | int) -> _Climb:
    """Move to r, and record its loss and gradient."""
    success, loss, g = problem.gradient(r, step)
    higher = loss > state.highest
    rows = higher[:, None]
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
    """Return, for each step, the steps since the last checkpoint if it ends at one, else 0."""
    length, shorter, least = (max(int(share * steps), 1) for share in (0.22, 0.03, 0.06))
    windows = np.zeros(steps, np.int32)
    at = length
    while at <= steps:
        windows[at - 1] = length
        length = max(length - shorter, least)
        at += length
    return windows


# The ascent, and of the last checkpoint: the rises since then, whether it was stuck, the highest
# loss then.
_Watched = tuple[_Climb, jax.Array, jax.Array, jax.Array]


def _climb(
    problem: Problem, r: jax.Array, steps: int, first: jax.Array | int
) -> tuple[jax.Array, Best]:
    """Ascend with momentum; return the point of highest loss, and the best."""
    eps, inside = problem.eps, problem.project
    windows = jnp.asarray(_windows(steps), eps.dtype)

    def step(i: jax.Array, carry: _Watched) -> _Watched:
        state, rises, halved, before = carry
        at = state.r.astype(state.g.dtype)
        share = jnp.where(i > 0, 0.75, 1).astype(at.dtype)
        size = state.step_size[:, None]
        ahead = inside(at + size * norms.steepest(state.g, problem.norm)).astype(at.dtype)
        momentum = at - state.previous.astype(at.dtype)
        moved = _move(
            problem, state, inside(at + share * (ahead - at) + (1 - share) * momentum),
            first + 1 + i,
        )  # fmt: skip
        rises = rises + (moved.loss > state.loss).astype(rises.dtype)
        # At a checkpoint: too few steps raised the loss; or there was no new maximum, and the step
        # size wasn't halved at the last checkpoint.
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
    state = iterate(step, carry, steps)[0]
    return state.highest_r, state.best


def _climb_l1(
    problem: Problem, r: jax.Array, steps: int, first: jax.Array | int
) -> tuple[jax.Array, Best]:
    """Ascend by sparse steps; return the point of highest loss, and the best.

    Unlike in the published attack, steps exclude the entries that the box blocks, and so does the
    choice of their sparsity: on images with many saturated pixels these entries would dominate.
    """
    eps, inside = problem.eps, problem.project
    size = r.shape[1]
    every = max(int(0.04 * steps), 1)

    def free(g: jax.Array, r: jax.Array) -> jax.Array:
        return boxes.drop_blocked(g, r, problem.x, problem.bounds)

    def nonzeros(r: jax.Array) -> jax.Array:
        return jnp.sum(free(jnp.sign(r), r) != 0, axis=1).astype(eps.dtype)

    def step(
        i: jax.Array, carry: tuple[_Climb, jax.Array, jax.Array]
    ) -> tuple[_Climb, jax.Array, jax.Array]:
        state, share, support = carry
        g = free(state.g, state.r)
        magnitude = jnp.abs(g)
        # Rounded to nearest: rounded up, a support of two would never become one.
        rank = size - jnp.clip(jnp.round(share * size), 1, size).astype(jnp.int32)
        least = jnp.take_along_axis(jnp.sort(magnitude, axis=1), rank[:, None], axis=1)
        sparse = jnp.where(magnitude >= least, jnp.sign(g), 0)
        ahead = norms.rescale(sparse, state.step_size, "l1")
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
    state = iterate(step, (state, support / size / 1.5, support), steps)[0]
    return state.highest_r, state.best
