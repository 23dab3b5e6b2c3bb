r"""DeepFool: smallest steps across the nearest linearised boundary, until the prediction changes.

One step is `perturb.alpha` without eps, on logits instead of probabilities: for each wrong class j
the distance to the linearised boundary is :math:`|z_y - z_j| / \|\nabla (z_j - z_y)\|_*`, and the
step goes to the nearest class. On probabilities it is Adv_Alpha itself, iterated (Huang et al.,
2015, Algorithm 1). The softmax of a confident net is flat, so these steps are far too long, and r
becomes small only in the final bisection.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxadv import inputs, jacobian, losses, norms, perturb
from jaxadv.attack._info import Answer, Found, reports
from jaxadv.boxes import box_limits, drop_blocked, project_hyperplane_in_box
from jaxadv.problem import (
    CROSSING,
    Least,
    Problem,
    beyond_rounding,
    bisect_to_boundary,
    gap_to_cross,
    iterate,
)
from jaxadv.types import ApplyFn, Bounds, Eps, Norm, Params

__all__ = ["deepfool"]

_OUTPUTS = "logits", "probabilities"
_OVERSHOOT = 2 * CROSSING  # the smallest overshoot


@reports
def deepfool(
    apply_fn: ApplyFn,
    params: Params,
    x: jax.Array,
    y: jax.Array,
    /,
    *,
    eps: Eps | None = None,
    norm: Norm = "l2",
    steps: int = 50,
    overshoot: float = 0.02,
    output: Literal["logits", "probabilities"] = "logits",
    key: jax.Array | None = None,
    bounds: Bounds | None = None,
) -> Found:
    r"""DeepFool: repeated smallest steps across the nearest linearised decision boundary.

    .. math:: r \leftarrow r + \frac{|z_y - z_I|}{\|d_I\|_*} \arg\max_{\|u\| \le 1} \langle d_I, u
              \rangle, \qquad d_j = \nabla_x (z_j - z_y)(x + r), \quad
              I = \arg\min_j \frac{|z_y - z_j|}{\|d_j\|_*}

    until :math:`(1 + \text{overshoot}) r` changes the prediction, followed by a bisection between 0
    and that point.

    In a box, l2 and linf steps include the entries that the box blocks. Such a step falls short of
    the boundary, and many short steps end at a smaller r than a few long ones. After half of the
    steps, blocked entries are excluded, so that the boundary is reached.

    Args:
      apply_fn: `(params, x) -> logits`, `[B, ...]` to `[B, K]`. Hashable; compiled once per object.
      params: the first argument of `apply_fn`.
      x: `[B, ...]`, floating point.
      y: integer labels, `[B]`.
      eps: None for the smallest r found, whatever its size. With a size, a scalar or `[B]`, a
        larger r is projected onto the ball of that radius.
      norm: the norm to minimise: `"l1"`, `"l2"` or `"linf"`.
      steps: maximum number of steps, at least 1; each takes three forward and K - 1 backward
        passes, on probabilities four and 2 (K - 1).
      overshoot: relative amount by which r is lengthened to cross the boundary, at least 0. Values
        below 2e-4 count as 2e-4, or rounding would decide whether r has crossed.
      output: what to linearise: `"logits"`, or `"probabilities"` to iterate Adv_Alpha. The latter's
        steps ignore the box, and for a confident net they are so long that they end in a corner of
        it; where the prediction there is still y, nothing is found.
      key: ignored; this method is deterministic.
      bounds: `(lo, hi)`, the box that x + r stays in. None: no box.

    Returns:
      r, of x's shape and dtype. It is exactly 0 where x is already misclassified, and where nothing
      was found. Rows are 0 or NaN as in `perturb`.

    Raises:
      TypeError: if `x` or the logits are not floating-point arrays, or `y` not integers.
      ValueError: if shapes don't match, if the norm or the output is unknown, if a Python `eps` is
        negative, if `steps` < 1, if `overshoot` < 0, or if `bounds` is not a pair.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxadv import attack
      >>> w = jnp.array([[3.0, -3.0], [4.0, -4.0]])
      >>> x, y = jnp.array([[1.0, 0.5]]), jnp.array([0])
      >>> r = attack.deepfool(lambda w, x: x @ w, w, x, y)
      >>> bool(jnp.allclose(r, jnp.array([[-0.6, -0.8]]), rtol=0.01))
      True

    References:
      Moosavi-Dezfooli, Fawzi and Frossard, "DeepFool: a simple and accurate method to fool deep
      neural networks", 2015.
    """
    inputs.at_least(1, "steps", steps, "perturb.alpha takes one step")
    if not 0 <= overshoot < math.inf:
        raise ValueError(
            f"expected a finite overshoot >= 0, got {overshoot}; 0.02 is the published number"
        )
    if output not in _OUTPUTS:
        raise ValueError(
            f"expected output to be one of {', '.join(map(repr, _OUTPUTS))}, got {output!r}; "
            "choose one of these"
        )
    problem = Problem.of(apply_fn, params, x, y, norm=norm, eps=eps, bounds=bounds, minimal=True)
    problem = problem.keyed()
    overshoot = max(overshoot, _OVERSHOOT)
    return Found(problem, *_run(problem, overshoot, steps=steps, output=output))


def boundary_step(
    problem: Problem,
    r: jax.Array,
    candidates: int | None = None,
    *,
    unblocked: jax.Array | bool = True,
) -> jax.Array:
    r"""Return the smallest step from x + r to the nearest linearised boundary between two logits.

    .. math:: \min_{d, j \ne y} \|d\| \quad \text{s.t.} \quad
              \langle \nabla (z_j - z_y), d \rangle = z_y - z_j

    An l1 step has one entry, which the box may stop halfway. Therefore in l1 it is the smallest
    step within the box to a thousandth beyond the boundary.

    Args:
      problem: a problem with integer labels.
      r: perturbations, `[B, D]`, of x's dtype.
      candidates: number of wrong classes to consider, those with the largest logits; None for all.
        Each costs a backward pass.
      unblocked: whether distances count only the entries that the box doesn't block, a bool, which
        may be traced.

    Returns:
      The step, of x's shape, in the dtype of norms; 0 where no boundary can be reached.
    """
    norm, bounds = problem.norm, problem.bounds
    z, distances = class_distances(problem, r, unblocked=unblocked)
    classes = jacobian.wrong_classes(z, problem.y, candidates)
    best = jacobian.nearest(distances, problem.x, classes)
    size = jnp.where(best.reachable, best.distance, 0)
    d = best.d.astype(size.dtype)
    if norm == "l1" and bounds is not None:
        # A thousandth beyond, since the overshoot can't move entries that are at a bound.
        gap = 1.001 * size * norms.norm(d, norms.dual(norm))
        return project_hyperplane_in_box(d, gap, *box_limits(problem.x + r, bounds), norm)
    return size[:, None] * norms.steepest(d, norm)


def class_distances(
    problem: Problem, r: jax.Array, *, unblocked: jax.Array | bool = True
) -> tuple[jax.Array, Callable[[jax.Array], jacobian.Nearest]]:
    r"""Return the distances from x + r to the linearised boundary with each wrong class.

    .. math:: |z_y - z_j| \,/\, \|\nabla (z_j - z_y)\|_*

    Args:
      problem: a problem with integer labels.
      r: perturbations, `[B, D]`, of x's dtype.
      unblocked: whether distances count only the entries that the box doesn't block, a bool, which
        may be traced.

    Returns:
      The shifted logits, `[B, K]`; and a function from classes `[B, J]` to their distances, which
      makes J backward passes.
    """
    x, norm = problem.x + r, problem.norm
    logits, pull = jacobian.pullback(problem.apply_fn, problem.params, x)
    n_classes = logits.shape[1]
    y = jnp.clip(problem.y, 0, n_classes - 1)
    z = losses.shift_logits(logits)
    z_y = jnp.take_along_axis(z, y[:, None], axis=1)
    at_y = jax.nn.one_hot(y, n_classes)

    def free(g: jax.Array) -> jax.Array:
        return drop_blocked(g, jnp.zeros_like(x), x, problem.bounds)

    def distances(j: jax.Array) -> jacobian.Nearest:
        rows = jax.nn.one_hot(j, n_classes) - at_y[:, None]
        d = jax.vmap(pull, in_axes=1, out_axes=1)(rows.astype(logits.dtype))  # [B, J, D]
        d = jnp.where(unblocked, jax.vmap(free, in_axes=1, out_axes=1)(d), d)
        slope = norms.norm(d.reshape(j.size, x.shape[1]), norms.dual(norm)).reshape(j.shape)
        usable = (slope > 0) & jnp.isfinite(slope)
        reachable = usable & ~jnp.isneginf(jnp.take_along_axis(logits, j, axis=1))
        behind = jnp.abs(z_y - jnp.take_along_axis(z, j, axis=1))
        behind = gap_to_cross(behind, logits, x.dtype).astype(slope.dtype)
        size = jnp.where(reachable, behind / jnp.where(reachable, slope, 1), jnp.inf)
        return jacobian.Nearest(size, size, d, reachable)

    return z, distances


def _probability_step(problem: Problem, r: jax.Array) -> jax.Array:
    """Return Adv_Alpha's step, between a few ulps and 1000 (1 + ||x + r||); it ignores the box."""
    x, norm = problem.x + r, problem.norm
    alpha = partial(
        perturb.alpha, problem.apply_fn, problem.params, x, problem.y, norm=norm,
        candidates=problem.logits.shape[1] - 1,  # all, without a warning about their number
    )  # fmt: skip
    step = alpha().astype(inputs.accum_dtype(x.dtype))
    unit = alpha(eps=1.0).astype(step.dtype)
    longest = 1000 * (1 + norms.norm(x, norm))
    size = norms.norm(jnp.clip(step, -1e37, 1e37), norm)  # beyond that, 1 / size may flush to 0
    shortest = 16e-3 * float(jnp.finfo(x.dtype).eps) * longest
    off = (size == 0) | (size > longest)  # 0 exactly on the boundary, where no step would leave it
    return jnp.where(off[:, None], jnp.where(size > 0, longest, shortest)[:, None] * unit, step)


class _State(NamedTuple):
    r: jax.Array  # the sum of the steps, in the dtype of norms
    end: jax.Array  # the point after the last step
    done: jax.Array  # [B], whether that is misclassified by more than rounding error
    barely: Least  # the smallest point that is misclassified at all
    taken: jax.Array  # [B], number of steps


@partial(jax.jit, static_argnames=("steps", "output"))
def _run(problem: Problem, overshoot: float, *, steps: int, output: str) -> Answer:
    problem = problem.start()
    x, norm = problem.x, problem.norm
    clear = beyond_rounding(problem)
    over = jnp.asarray(1 + overshoot, inputs.accum_dtype(x.dtype))

    def crossed(r: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return whether r is misclassified by more than rounding error, and whether at all."""
        success, loss = problem.value(r)
        return clear(success, loss) | ~problem.attackable, success

    def step(i: jax.Array, state: _State) -> _State:
        at = problem.clip_to_box(state.r)
        if output == "probabilities":
            ahead = _probability_step(problem, at)
        else:
            unblocked = (norm == "l1") | (i >= steps // 2)
            ahead = boundary_step(problem, at, unblocked=unblocked)
        moved = at.astype(over.dtype) + ahead
        near, far = problem.clip_to_box(moved), problem.clip_to_box(over * moved)
        (hit_near, barely_near), (hit, barely) = crossed(near), crossed(far)
        # Where the boundary is curved, the far point may be back on the near side.
        point = jnp.where(hit[:, None], far, near)
        past = jnp.where(barely[:, None], far, near)
        stay = state.done[:, None]
        success = (barely | barely_near) & ~state.done
        return _State(
            jnp.where(stay, state.r, moved),
            jnp.where(stay, state.end, point),
            state.done | hit | hit_near,
            state.barely.with_point(past, norms.norm(past, norm), success),
            state.taken + (~state.done).astype(jnp.int32),
        )

    zero = jnp.zeros_like(x)
    none = jnp.zeros(x.shape[0], jnp.int32)
    start = _State(zero.astype(over.dtype), zero, crossed(zero)[0], Least.empty(x), none)
    state = iterate(step, start, steps, while_any=lambda state: ~state.done)
    _, end, done, least, taken = state

    def misleads(r: jax.Array) -> jax.Array:
        clearly, barely = crossed(r)
        return jnp.where(done, clearly, barely)

    found = done | least.found
    r = jnp.where(done[:, None], end, least.r)
    r, tries = bisect_to_boundary(misleads, r, found)
    r = problem.clip_to_ball(jnp.where(found[:, None], r, 0))
    logits = output == "logits"
    forward = 3 + (3 if logits else 4) * taken + tries
    backward = (1 if logits else 2) * (problem.logits.shape[1] - 1) * taken
    return problem.answer(r), forward, backward
