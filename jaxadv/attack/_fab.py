r"""The fast adaptive boundary attack: how far is the nearest misclassified point?

`pgd` searches a ball of a given radius; this attack looks for the smallest perturbation (Croce and
Hein, 2020). Take a class t other than y. Near a point x + r the decision boundary between y and t
is almost a plane, on which the linearised :math:`z_t - z_y` is 0. Each step goes to that plane and
a little beyond, mostly from the current point but in part from x, which keeps r small; after a
misclassified point it starts closer to x. So the iterates cross the boundary again and again at
decreasing distances, and the smallest misclassified r is kept. There is no step size to choose, and
scaling the logits changes nothing.

A step costs one forward and one backward pass: the logits computed for the gradient also show
whether the point is misclassified. (The published attack makes a second forward pass for this; with
the same number of steps it finds nothing smaller.)

In a box, the smallest step to a plane is a small optimisation problem, see
`boxes.project_hyperplane_in_box`.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxadv import inputs, losses, norms
from jaxadv.attack._info import Answer, Found, reports
from jaxadv.boxes import box_limits, project_hyperplane_in_box
from jaxadv.problem import Least, Problem, fold, gap_to_cross, iterate
from jaxadv.types import ApplyFn, Bounds, Eps, Norm, Params

__all__ = ["fab"]


@reports
def fab(
    apply_fn: ApplyFn,
    params: Params,
    x: jax.Array,
    y: jax.Array,
    /,
    *,
    eps: Eps | None = None,
    norm: Norm = "l2",
    steps: int = 100,
    n_targets: int = 9,
    restarts: int = 1,
    alpha_max: float = 0.1,
    eta: float = 1.05,
    beta: float = 0.9,
    key: jax.Array | None = None,
    bounds: Bounds | None = None,
) -> Found:
    r"""The targeted fast adaptive boundary attack, FAB-T: the smallest r that is misclassified.

    For one class t at a time, with :math:`\delta` and :math:`\delta_0` the smallest steps (in the
    box) from x + r and from x to the plane on which :math:`z_t - z_y`, linearised at x + r, is 0:

    .. math:: r \leftarrow (1 - \alpha) (r + \eta \delta) + \alpha \eta \delta_0, \qquad
              \alpha = \min\Bigl(\frac{\|\delta\|}{\|\delta\| + \|\delta_0\|}, \alpha_{max}\Bigr)

    Where x + r is misclassified (as any class), r is kept if it is the smallest so far, and the
    step starts from :math:`\beta r`. Classes are tried in order of their logits at x.

    Args:
      apply_fn: `(params, x) -> logits`, `[B, ...]` to `[B, K]`. A logit of -inf masks its class.
        Hashable; compiled once per object.
      params: the first argument of `apply_fn`.
      x: `[B, ...]`, floating point.
      y: integer labels, `[B]`.
      eps: None for the smallest r, whatever its size. Or the radius of a ball, a scalar or `[B]` (a
        negative traced value counts as 0): an example is then done when the first r in it is found,
        and the attack ends early when all are done. A larger r is projected onto the ball.
      norm: the norm to minimise: `"l1"`, `"l2"` or `"linf"`.
      steps: number of steps for each class and start, at least 1.
      n_targets: number of wrong classes to try, at least 1; at most K - 1 are used.
      restarts: number of starts for each class, at least 1. The first is x; the others are random
        points of a ball half as large as eps, or as the smallest r so far if eps is None (x again
        if none was found yet).
      alpha_max: the largest weight of x in a step, in [0, 1].
      eta: the length of a step relative to the distance to the plane, at least 1.
      beta: the factor of r after a misclassified point, in [0, 1].
      key: one key, or one per example, `[B]`; for restarts only.
      bounds: `(lo, hi)`, the box that x + r stays in. None: no box.

    Returns:
      r, of x's shape and dtype, with `eps` of at most that size. It is exactly 0 where x is already
      misclassified, and where nothing was found. Rows are 0 or NaN as in `perturb`.

    Raises:
      TypeError: if `x` or the logits are not floating-point arrays, or `y` not integers.
      ValueError: if shapes don't match, if the norm is unknown, if a Python `eps` is negative, if
        `steps`, `n_targets` or `restarts` < 1, if `alpha_max`, `eta` or `beta` is out of range, if
        `bounds` is not a pair, or if `restarts` > 1 and the key is missing.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxadv import attack
      >>> w = jnp.array([[3.0, -3.0], [1.0, -1.0]])
      >>> x, y = jnp.array([[2.0, 2.0]]), jnp.array([0])
      >>> r = attack.fab(lambda w, x: x @ w, w, x, y, norm="linf")
      >>> r.round(1).tolist()  # the boundary goes through 0
      [[-2.0, -2.0]]

    References:
      Croce and Hein, "Minimally distorted Adversarial Examples with a Fast Adaptive Boundary
      Attack", 2020; the targeted version: Croce and Hein, "Reliable evaluation of adversarial
      robustness with an ensemble of diverse parameter-free attacks", 2020.
    """
    for name, count in (("steps", steps), ("n_targets", n_targets), ("restarts", restarts)):
        inputs.at_least(1, name, count, "leave it out for the default")
    for name, value, low, high in (
        ("alpha_max", alpha_max, 0, 1),
        ("eta", eta, 1, math.inf),
        ("beta", beta, 0, 1),
    ):
        if not low <= value <= high:
            raise ValueError(
                f"expected {name} in {low}..{high}, got {value}; the default is the published value"
            )
    drawn_by = "a restart" if restarts > 1 else None
    problem = Problem.of(
        apply_fn, params, x, y, norm=norm, eps=eps, bounds=bounds, minimal=True, key=key,
        drawn_by=drawn_by,
    ).keyed()  # fmt: skip
    counts, constants = (steps, n_targets, restarts), (alpha_max, eta, beta)
    return Found(problem, *_run(problem, counts, constants))


def _class_lead(logits: jax.Array, labels: jax.Array, *, target: jax.Array) -> jax.Array:
    """Return z_t - z_y, `[B]`, for one class t of each example."""
    is_t, is_y = (jax.nn.one_hot(k, logits.shape[1], dtype=bool) for k in (target, labels))
    return jnp.sum(jnp.where(is_t, logits, 0) - jnp.where(is_y, logits, 0), axis=1)


def _to_plane(problem: Problem, w: jax.Array, c: jax.Array, r: jax.Array) -> jax.Array:
    """Return the smallest d with <w, d> = c for which x + r + d is in the box."""
    if problem.bounds is not None:
        lower, upper = box_limits(problem.x, problem.bounds)
        return project_hyperplane_in_box(w, c, lower - r, upper - r, problem.norm)
    size = norms.norm(w, norms.dual(problem.norm))
    far = c / jnp.where(size == 0, jnp.inf, size)  # without a gradient, no step
    return far[:, None] * norms.steepest(w, problem.norm)


def _next_point(
    problem: Problem,
    r: jax.Array,
    w: jax.Array,
    gap: jax.Array,
    wrong: jax.Array,
    constants: tuple[float, float, float],
) -> jax.Array:
    """Step to the plane and a little beyond, from r and in part from x.

    Args:
      problem: the problem.
      r: where the net was linearised, `[B, D]`.
      w: the gradient of z_t - z_y there.
      gap: z_t - z_y there, `[B]`.
      wrong: whether x + r is misclassified, `[B]`.
      constants: alpha_max, eta and beta.
    """
    alpha_max, eta, beta = (jnp.asarray(c, w.dtype) for c in constants)
    # On the plane <w, r + d> = <w, r> - gap, where r is the point of linearisation.
    r = r.astype(w.dtype)
    along = jnp.sum(w * r, axis=1)
    shrunk = jnp.where(wrong, beta, 1)
    r = shrunk[:, None] * r
    d = _to_plane(problem, w, (1 - shrunk) * along - gap, r)
    d_0 = _to_plane(problem, w, along - gap, jnp.zeros_like(r))
    size, size_0 = norms.norm(d, problem.norm), norms.norm(d_0, problem.norm)
    # Double where: at x, on the plane, both are 0.
    alpha = jnp.minimum(size / jnp.where(size > 0, size + size_0, 1), alpha_max)
    alpha = alpha[:, None]
    moved = (1 - alpha) * (r + eta * d) + alpha * eta * d_0
    usable = jnp.isfinite(gap + size + size_0)  # else there is no plane to step to
    return problem.clip_to_box(jnp.where(usable[:, None], moved, r))


def _random_start(problem: Problem, i: jax.Array, restarted: jax.Array, least: Least) -> jax.Array:
    """Return the start of an attempt: x, or in a restart a random point within half the radius.

    Args:
      problem: the problem.
      i: the number of the attempt.
      restarted: whether the attempt belongs to a restart, bool.
      least: the smallest perturbations so far, whose size is the radius if there is no eps.
    """
    if problem.keys is None:
        return jnp.zeros_like(problem.x)
    reach = jnp.where(restarted, least.size if problem.eps is None else problem.eps, 0)
    reach = jnp.where(jnp.isfinite(reach), reach / 2, 0)
    drawn = norms.sample(fold(problem.keys, i), problem.x, reach, problem.norm)
    return problem.clip_to_box(drawn)


_Carry = tuple[jax.Array, Least, jax.Array]  # r, the smallest, steps taken [B]


class _State(NamedTuple):
    least: Least
    forward: jax.Array  # [B], passes made
    backward: jax.Array


@jax.jit
def _run(problem: Problem, counts: Any, constants: Any) -> Answer:
    problem = problem.start()
    x, y, eps, norm = problem.x, problem.y, problem.eps, problem.norm
    steps, n_targets, restarts = counts
    n_classes = problem.logits.shape[1]
    right = jnp.argmax(problem.logits, axis=1) == y
    attackable = problem.attackable & right & inputs.finite(x, problem.logits, eps)
    z_targets, targets = losses.largest_wrong(problem.logits, y, n_classes)
    n_targets = jnp.minimum(n_targets, n_classes - 1)

    def wanted(least: Least) -> jax.Array:
        # A finished row doesn't change, or it would depend on how long the others take.
        return attackable if eps is None else attackable & (least.size > eps) & (eps > 0)

    def attempt(i: jax.Array, state: _State) -> _State:
        """Attack from one start, each example toward its class of the same rank."""
        rank = i % n_targets
        toward = partial(_class_lead, target=jnp.take(targets, rank, axis=1))
        targeting = replace(problem, loss_fn=toward)
        exists = jnp.take(z_targets, rank, axis=1) > -jnp.inf
        start = _random_start(problem, i, i >= n_targets, state.least)

        def active(least: Least) -> jax.Array:
            return wanted(least) & exists

        def step(_: jax.Array, carry: _Carry) -> _Carry:
            r, least, taken = carry
            taken = taken + active(least).astype(jnp.int32)
            wrong, gap, w = targeting.gradient(r)
            off = gap_to_cross(jnp.abs(gap), problem.logits, x.dtype)
            gap = jnp.where(wrong | (gap != 0), gap, -off)
            least = least.with_point(r, norms.norm(r, norm), wrong & active(least))

            return _next_point(problem, r, w, gap, wrong, constants), least, taken

        r, least, taken = iterate(
            step,
            (start, state.least, jnp.zeros_like(state.backward)),
            steps,
            while_any=lambda carry: active(carry[1]),
        )
        wrong, _ = targeting.value(r)
        at_end = active(least)
        least = least.with_point(r, norms.norm(r, norm), wrong & at_end)
        forward = state.forward + taken + at_end.astype(jnp.int32)
        return _State(least, forward, state.backward + taken)

    # Restarts come last, when the smallest r over all classes, which sets their radius, is known.
    none = jnp.zeros(x.shape[0], jnp.int32)
    least, forward, backward = iterate(
        attempt,
        _State(Least.empty(x), none + 1, none),
        restarts * n_targets,
        while_any=lambda state: wanted(state.least),
    )
    r = problem.clip_to_ball(least.r)
    return problem.answer(r), forward, backward
