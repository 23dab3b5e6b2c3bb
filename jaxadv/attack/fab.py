r"""The fast adaptive boundary attack: how far is the nearest point that is misclassified?

Where `pgd` asks what a ball of a given size holds, this attack looks for the least perturbation
(Croce and Hein, 2020). Take a class t other than y. Near a point x + r the decision boundary
between y and t is almost a plane, that on which the linearised :math:`z_t - z_y` is 0. Each step
goes to the plane and a little beyond, mostly from where it stands, in part from x, which keeps r
small; after a misclassified point it sets out from nearer to x. So the iterates cross the boundary
again and again at smaller and smaller distances, and the smallest r that is misclassified is kept.
There is no step size to choose, and scaling the logits changes nothing.

A step costs one forward and one backward pass. The logits that come with the gradient also tell
whether the point itself is misclassified; where it is, the plane is the one found there, nearer to
the boundary than the point that the step sets out from. (The published attack spends a second
forward pass on this; over as many steps, what it finds is no smaller.)

In a box, the least way to a plane is a small optimisation problem of its own, see `boxed.to_plane`.
"""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxadv import _cpu, closures, inputs, jacobian, meshes, norms
from jaxadv.attack import boxed, search
from jaxadv.types import ApplyFn, Bounds, Eps, Norm, Params

__all__ = ["fab"]


class _Best(NamedTuple):
    """The smallest perturbation that is misclassified so far, of each example."""

    r: jax.Array  # [B, ...]; 0 where there is none
    size: jax.Array  # [B]; infinite where there is none


@meshes.auto_axes(meshes.as_x)
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
) -> jax.Array:
    r"""The targeted fast adaptive boundary attack, FAB-T: the least r that is misclassified.

    For one class t at a time, with :math:`\delta` and :math:`\delta_0` the least perturbations (in
    the box) of x + r and of x to the plane on which :math:`z_t - z_y`, linearised at x + r, is 0:

    .. math:: r \leftarrow (1 - \alpha) (r + \eta \delta) + \alpha \eta \delta_0, \qquad
              \alpha = \min\Bigl(\frac{\|\delta\|}{\|\delta\| + \|\delta_0\|}, \alpha_{max}\Bigr)

    Where x + r is misclassified (as any class), r is kept if it is the smallest so far, and the
    step sets out from :math:`\beta r`. Classes are tried from the likeliest at x down.

    Args:
      apply_fn: `(params, x) -> logits`, `[B, ...]` to `[B, K]`. A logit of -inf masks its class.
        Hashable: compiled once each.
      params: the first argument of `apply_fn`.
      x: `[B, ...]`, floating point.
      y: integer labels, `[B]`.
      eps: None for the least r, whatever its size. Or the radius of a ball, a scalar or `[B]` (a
        negative traced value counts as 0): an example is then done with the first r found in it,
        and the attack ends early when all are. What is larger is projected onto the ball.
      norm: the norm that is minimal: `"l1"`, `"l2"` or `"linf"`.
      steps: number of steps for each class and start, at least 1.
      n_targets: how many of the likeliest wrong classes are tried, at least 1; K - 1 at the most.
      restarts: number of starts for each class, at least 1. The first is x, the others are random
        points of half the size of eps, or of the smallest r so far where eps is None (x again
        where there is none yet).
      alpha_max: the most that a step is pulled back toward x, in 0..1.
      eta: how far a step goes, relative to the way to the plane; at least 1.
      beta: what is left of r after a misclassified point, in 0..1.
      key: one key, or one per example, `[B]`; used by restarts alone.
      bounds: `(lo, hi)`, the box that x + r stays in. None: no box.

    Returns:
      r, of x's shape and dtype. Exactly 0 where x is misclassified already, or nothing was found,
      or the row poses no problem as in `perturb`; NaN as there. With `eps`, of at most that size.

    Raises:
      TypeError: if `x` or the logits are not floating-point arrays, or `y` not integers.
      ValueError: if shapes don't match, if the norm is unknown, if a Python `eps` is negative, if
        `steps`, `n_targets` or `restarts` < 1, if `alpha_max`, `eta` or `beta` is out of range, if
        `bounds` is not a pair, or if `restarts` > 1 lacks a key.

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
        inputs.at_least(1, name, count, "leave it out for the usual one")
    for name, value, low, high in (
        ("alpha_max", alpha_max, 0, 1),
        ("eta", eta, 1, math.inf),
        ("beta", beta, 0, 1),
    ):
        if not low <= value <= high:
            raise ValueError(
                f"expected {name} in {low}..{high}, got {value}; leave it out for the published one"
            )
    norms.dual(norm)
    x = inputs.examples(x)
    y = inputs.labels(y, x.shape[0])
    eps = None if eps is None else inputs.radius(eps, x)
    if bounds is not None:
        inputs.box(bounds, x)  # now, while they are numbers
    keys = inputs.keys(key, x.shape[0], "a restart") if restarts > 1 else None
    counts, constants = (steps, n_targets, restarts), (alpha_max, eta, beta)
    apply_fn = closures.keyed(apply_fn, params, x)
    return _run(apply_fn, norm, params, x, y, eps, counts, constants, keys, bounds)


@partial(jax.jit, static_argnums=(0, 1))
def _run(
    apply_fn: ApplyFn,
    norm: Norm,
    params: Params,
    x: jax.Array,
    y: jax.Array,
    eps: jax.Array | None,
    counts: tuple[jax.Array, jax.Array, jax.Array],
    constants: tuple[jax.Array, jax.Array, jax.Array],
    keys: jax.Array | None,
    bounds: Bounds | None,
) -> jax.Array:
    steps, n_targets, restarts = counts
    zero = jnp.int32(0)
    alpha_max, eta, beta = (jnp.asarray(c, inputs.accum_dtype(x.dtype)) for c in constants)
    clean = inputs.apply(apply_fn, params, x)
    n_classes = clean.shape[1]
    posed = inputs.finite(x, clean, eps) & inputs.attackable(clean, y)
    posed &= jnp.argmax(clean, axis=1) == y
    is_y = jax.nn.one_hot(y, n_classes, dtype=bool)
    # Likeliest first; y itself is the last.
    z_targets, targets = lax.top_k(jnp.where(is_y, -jnp.inf, clean), n_classes)
    n_targets = jnp.minimum(n_targets, n_classes - 1)
    if bounds is not None:
        lower, upper = boxed.room(x, bounds)

    def wanted(best: _Best) -> jax.Array:
        # A row that is done stays as it is, or it would depend on how long the others take.
        return posed if eps is None else posed & (best.size > eps) & (eps > 0)

    def inside(r: jax.Array) -> jax.Array:
        return norms.clip_to_box(x, r, bounds)

    def to_plane(w: jax.Array, c: jax.Array, r: jax.Array) -> jax.Array:
        """Return the least d with <w, d> = c for which x + r + d is in the box."""
        if bounds is not None:
            return boxed.to_plane(w, c, lower - r, upper - r, norm)
        size = norms.norm(w, norms.dual(norm))
        far = c / jnp.where(size == 0, jnp.inf, size)  # without a gradient, no way at all
        return inputs.expand_like(far, w) * norms.steepest(w, norm)

    def attempt(i: jax.Array, best: _Best) -> _Best:
        """Attack from one start, each example toward its class of one rank."""
        rank, restart = i % n_targets, i // n_targets
        is_target = jax.nn.one_hot(jnp.take(targets, rank, axis=1), n_classes, dtype=bool)
        exists = jnp.take(z_targets, rank, axis=1) > -jnp.inf
        ascent = is_target.astype(x.dtype) - is_y.astype(x.dtype)

        def active(best: _Best) -> jax.Array:
            return wanted(best) & exists

        def keep(best: _Best, r: jax.Array, logits: jax.Array) -> tuple[_Best, jax.Array]:
            # NaN is no class.
            wrong = (jnp.argmax(logits, axis=1) != y) & jnp.all(logits < jnp.inf, axis=1)
            size = norms.norm(r, norm)
            better = wrong & active(best) & (size < best.size)
            r = jnp.where(inputs.expand_like(better, r), r, best.r)
            return _Best(r, jnp.where(better, size, best.size)), wrong

        def step(carry: tuple[jax.Array, jax.Array, _Best]) -> tuple[jax.Array, jax.Array, _Best]:
            n, r, best = carry
            logits, pull = jacobian.pullback(apply_fn, params, x + r)
            best, wrong = keep(best, r, logits)
            w = pull(ascent).astype(alpha_max.dtype)
            gap = jnp.sum(jnp.where(is_target, logits, 0) - jnp.where(is_y, logits, 0), axis=1)
            gap = gap.astype(w.dtype)

            # On the plane <w, r + d> = <w, r> - gap, for the r that was linearised at.
            r = r.astype(w.dtype)
            along = jnp.sum(w * r, axis=tuple(range(1, w.ndim)))
            shrunk = jnp.where(wrong, beta, 1)
            r = inputs.expand_like(shrunk, r) * r
            d = to_plane(w, (1 - shrunk) * along - gap, r)
            d_0 = to_plane(w, along - gap, jnp.zeros_like(r))
            size, size_0 = norms.norm(d, norm), norms.norm(d_0, norm)
            # Double where: at x, on the plane, both are 0.
            alpha = jnp.minimum(size / jnp.where(size > 0, size + size_0, 1), alpha_max)
            alpha = inputs.expand_like(alpha, r)
            moved = (1 - alpha) * (r + eta * d) + alpha * eta * d_0
            usable = jnp.isfinite(gap + size + size_0)  # or there is no plane to go to
            return n + 1, inside(jnp.where(inputs.expand_like(usable, r), moved, r)), best

        r = jnp.zeros_like(x)
        if keys is not None:
            reach = jnp.where(restart > 0, best.size if eps is None else eps, 0)
            reach = jnp.where(jnp.isfinite(reach), reach / 2, 0)
            r = inside(norms.sample(search.fold(keys, i), x, reach, norm))
        _, r, best = lax.while_loop(
            lambda carry: (carry[0] < steps) & jnp.any(active(carry[2])), step, (zero, r, best)
        )
        best, _ = keep(best, r, inputs.apply(apply_fn, params, x + r))
        return best

    nowhere = jnp.full(x.shape[0], jnp.inf, alpha_max.dtype)
    # Restarts come last, when there is a smallest r of all classes for their size.
    _, best = lax.while_loop(
        lambda carry: (carry[0] < restarts * n_targets) & jnp.any(wanted(carry[1])),
        _cpu.fast_convolutions(lambda carry: (carry[0] + 1, attempt(*carry))),
        (zero, _Best(jnp.zeros_like(x), nowhere)),
    )
    r = search.within(best.r, eps, norm)
    sound = inputs.finite(x, clean, eps)
    return jnp.where(inputs.expand_like(sound, x), inside(r), jnp.nan)
