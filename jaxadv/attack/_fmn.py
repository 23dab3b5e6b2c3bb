r"""Fast minimum-norm attack: gradient steps in a ball whose radius adapts to the boundary.

An attack in a ball shows whether some r of size eps fools the net; this one finds how small r can
be, for each example, in one run. Each step increases the logit margin, and then projects r onto a
ball whose radius shrinks after a success and grows after a failure, by a fraction that is annealed
(Pintor et al., 2021). For l2 this is close to the decoupled direction and norm attack of Rony et
al. (2019), `ddn`. Since another class than the top wrong one may be nearer, one DeepFool step from
x is tried as well. The smallest perturbation found is then scaled down to the boundary.

If the net's gradients are misleading, the published attack's steps within the ball may go round in
circles. So where a tenth of the steps, and at least ten, have found nothing, r is rescaled to the
surface of the ball, as in `ddn`, until something is found.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxadv import inputs, norms
from jaxadv.attack._closest import Closest
from jaxadv.attack._deepfool import boundary_step
from jaxadv.attack._info import Answer, Found, reports
from jaxadv.problem import Problem, beyond_rounding, gap_to_cross, iterate
from jaxadv.types import ApplyFn, Bounds, Eps, Norm, Params

__all__ = ["fmn"]

# At the first and at the last step, with a cosine between them: the fraction by which the radius
# changes, and the length of a step relative to the first.
_CHANGE = 0.05, 0.001
_STEP = 1.0, 0.01
CLASSES = 10  # number of classes for the DeepFool step, those with the largest logits
_PAST = 1.001  # the factor of that step, so that a slightly curved boundary is crossed too
_PATIENCE = 10  # steps that a slow start may need although gradients aren't misleading


class _State(NamedTuple):
    r: jax.Array
    radius: jax.Array
    closest: Closest


@reports
def fmn(
    apply_fn: ApplyFn,
    params: Params,
    x: jax.Array,
    y: jax.Array,
    /,
    *,
    eps: Eps | None = None,
    norm: Norm = "l2",
    steps: int = 100,
    step_size: float | None = None,
    targeted: bool = False,
    key: jax.Array | None = None,
    bounds: Bounds | None = None,
) -> Found:
    r"""Fast minimum-norm attack: the smallest perturbation that changes the prediction.

    .. math:: \min_r \|r\| \quad \text{s.t.} \quad \max_{k \ne y} z_k(x + r) \ge z_y(x + r)

    Args:
      apply_fn: `(params, x) -> logits`, `[B, ...]` to `[B, K]`. Hashable; compiled once per object.
      params: the first argument of `apply_fn`.
      x: `[B, ...]`, floating point.
      y: integer labels, `[B]`.
      eps: None for the smallest r found, whatever its size. With a size, a scalar or `[B]`, a
        larger r is projected onto the ball of that radius.
      norm: the norm to minimise: `"l1"`, `"l2"` or `"linf"`.
      steps: number of steps, at least 1; each a forward and a backward pass. The DeepFool step
        adds at most ten backward passes.
      step_size: the l2 length of the first step, in units of x. None for the published values, 1 or
        for linf 10, which suit images in [0, 1].
      targeted: y has target classes instead of true labels.
      key: ignored; this method is deterministic.
      bounds: `(lo, hi)`, the box that x + r stays in. None: no box.

    Returns:
      r, of x's shape and dtype. It is exactly 0 where x is already misclassified, and where nothing
      was found. Rows are 0 or NaN as in `perturb`. r ends on the boundary: if the net computes in
      bfloat16, another program may round it to the near side; 1.01 r is on the far side.

    Raises:
      TypeError: if `x` or the logits are not floating-point arrays, or `y` not integers.
      ValueError: if shapes don't match, if the norm is unknown, if a Python `eps` is negative, if
        `steps` < 1, if `step_size` <= 0, or if `bounds` is not a pair.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxadv import attack
      >>> w = jnp.array([[3.0, -3.0], [4.0, -4.0]])
      >>> x, y = jnp.array([[1.0, 0.5]]), jnp.array([0])
      >>> r = attack.fmn(lambda w, x: x @ w, w, x, y)
      >>> bool(jnp.allclose(r, jnp.array([[-0.6, -0.8]]), rtol=0.01))
      True

    References:
      Pintor et al., "Fast Minimum-norm Adversarial Attacks through Adaptive Norm Constraints",
      2021; Rony et al., "Decoupling Direction and Norm for Efficient Gradient-Based L2 Adversarial
      Attacks and Defenses", 2019.
    """
    inputs.at_least(1, "steps", steps, "100 is usual, 1000 thorough")
    if step_size is None:
        step_size = 10.0 if norm == "linf" else 1.0
    if not 0 < step_size < math.inf:
        raise ValueError(
            f"expected a finite step_size > 0, got {step_size}; 1 suits images in [0, 1]"
        )
    problem = Problem.of(
        apply_fn, params, x, y, norm=norm, eps=eps, bounds=bounds, minimal=True, targeted=targeted
    ).keyed()
    return Found(problem, *_run(problem, step_size, steps=steps))


@partial(jax.jit, static_argnames="steps")
def _run(problem: Problem, step_size: float, *, steps: int) -> Answer:
    problem = problem.start()
    x, norm = problem.x, problem.norm
    clear = beyond_rounding(problem)

    def kept(closest: Closest, r: jax.Array, success: jax.Array, loss: jax.Array) -> Closest:
        return closest.with_point(r, norms.norm(r, norm), success, clear(success, loss))

    def step(i: jax.Array, state: _State) -> _State:
        success, loss, g = problem.gradient(state.r)
        closest = kept(state.closest, state.r, success, loss)
        success = clear(success, loss)
        anneal = (1 + jnp.cos(jnp.pi * i.astype(g.dtype) / steps)) / 2
        change, length = (end + (start - end) * anneal for start, end in (_CHANGE, _STEP))
        slope = norms.norm(g, norms.dual(norm))
        # Without a usable gradient the distance to the boundary is unknown: any radius will do.
        flat = ~((slope > 0) & jnp.isfinite(slope))
        # Until the boundary has been crossed once, the radius is a little past the boundary of the
        # linearised net, since exactly on it rounding might never let r cross. It also exceeds the
        # last radius, since in a box a step may gain less than the slope promises.
        gap = gap_to_cross(jnp.abs(loss), problem.logits, x.dtype)
        away = norms.norm(state.r, norm) + gap / jnp.where(flat, 1, slope)
        away = jnp.maximum(away, state.radius)
        outward = jnp.where(closest.clearly.found, state.radius, away) * (1 + change)
        inward = jnp.minimum(state.radius * (1 - change), closest.clearly.size)
        radius = jnp.where(success, inward, outward)
        moved = state.r.astype(g.dtype) + step_size * length * norms.steepest(g, "l2")
        r = replace(problem, eps=radius).project(moved)
        leaps = ~closest.clearly.found & (i >= max(steps // 10, _PATIENCE))
        leap = jnp.minimum(radius, 2 * norms.norm(moved, norm))  # an infinite one leads nowhere
        surface = problem.clip_to_box(norms.rescale(moved, leap, norm))
        r = jnp.where(leaps[:, None], surface, r)
        return _State(r, radius, closest)

    zero, closest = jnp.zeros_like(x), Closest.at_x(problem, clear)
    state = _State(zero, jnp.zeros_like(closest.clearly.size), closest)
    r, _, closest = iterate(step, state, steps)
    closest = kept(closest, r, *problem.value(r))
    if not problem.targeted:  # another class than the top wrong one may be nearer
        r = problem.clip_to_box(_PAST * boundary_step(problem, zero, CLASSES))
        closest = kept(closest, r, *problem.value(r))
    r, tries = closest.shortened(problem, clear)
    n_tried = 0 if problem.targeted else min(CLASSES, problem.logits.shape[1] - 1)
    forward = steps + (4 if problem.targeted else 6) + tries
    return problem.answer(r), forward, jnp.full_like(tries, steps + n_tried)
