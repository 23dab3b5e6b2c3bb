r"""DeepFool: least steps over the nearest linearised boundary, until it is crossed.

One step of it is `perturb.alpha` without a size, on logits instead of probabilities: for each class
j but y the distance to the linearised boundary is :math:`|z_y - z_j| / \|\nabla (z_j - z_y)\|_*`,
and the nearest class is taken. On probabilities it *is* Adv_Alpha, repeated (Huang et al., 2015,
Algorithm 1); since the softmax of a confident net is flat, its steps are far too long there, and
it's the final bisection that makes the answer small.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxadv import _cpu, closures, inputs, losses, meshes, norms, perturb
from jaxadv.attack import search
from jaxadv.types import ApplyFn, Bounds, Eps, Norm, Params

__all__ = ["deepfool"]

_OUTPUTS = "logits", "probabilities"
_OVERSHOOT = 2 * search.CROSSING  # at least


@meshes.auto_axes(meshes.as_x)
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
) -> jax.Array:
    r"""DeepFool: repeated least steps over the nearest linearised decision boundary.

    .. math:: r \leftarrow r + \frac{|z_y - z_I|}{\|d_I\|_*} \arg\max_{\|u\| \le 1} \langle d_I, u
              \rangle, \qquad d_j = \nabla_x (z_j - z_y)(x + r), \quad
              I = \arg\min_j \frac{|z_y - z_j|}{\|d_j\|_*}

    until :math:`(1 + \text{overshoot}) r` changes the answer; then a bisection between 0 and there.

    In a box, l2 and linf steps count the entries that a wall stops as well. Such a step falls short
    of the boundary, and many short steps end at a smaller r than a few long ones. After half of the
    steps these entries are left out, so that the boundary is reached.

    Args:
      apply_fn: `(params, x) -> logits`, `[B, ...]` to `[B, K]`. Hashable: compiled once each.
      params: the first argument of `apply_fn`.
      x: `[B, ...]`, floating point.
      y: integer labels, `[B]`.
      eps: None for the least r found. With a size, a scalar or `[B]`: where that r is larger, the
        nearest point of the ball of that radius, so that sizes never exceed eps.
      norm: the norm that is minimal: `"l1"`, `"l2"` or `"linf"`.
      steps: number of steps at most, at least 1; each three forward and K - 1 backward passes.
      overshoot: by how much r is lengthened to cross the boundary, at least 0; below 2e-4 it is
        that, or rounding would decide whether r has crossed.
      output: what is linearised: `"logits"`, or `"probabilities"` for Adv_Alpha repeated. Its steps
        ignore the box, and for a confident net they are so long that they end in a corner of it;
        where the answer there is still y, it finds nothing.
      key: ignored; this method draws nothing.
      bounds: `(lo, hi)`, the box that x + r stays in. None: no box.

    Returns:
      r, of x's shape and dtype: exactly 0 where x is misclassified already, and where no r that
      changes the answer was found. Rows are 0 or NaN as in `perturb`.

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
    inputs.at_least(1, "steps", steps, "one step is perturb.alpha's")
    if not overshoot >= 0:
        raise ValueError(f"expected overshoot >= 0, got {overshoot}; 0.02 is the published number")
    if output not in _OUTPUTS:
        raise ValueError(
            f"expected output to be one of {', '.join(map(repr, _OUTPUTS))}, got {output!r}; "
            "choose what is linearised"
        )
    norms.dual(norm)  # known?
    x = inputs.examples(x)
    y = inputs.labels(y, x.shape[0])
    if eps is not None:
        eps = inputs.radius(eps, x)
    if bounds is not None:
        inputs.box(bounds, x)  # now, while they are numbers
    overshoot = max(overshoot, _OVERSHOOT)
    apply_fn = closures.keyed(apply_fn, params, x)
    return _run(apply_fn, norm, steps, output, params, x, y, eps, overshoot, bounds)


def _probability_step(
    apply_fn: ApplyFn, params: Params, x: jax.Array, y: jax.Array, norm: Norm
) -> jax.Array:
    """Return Adv_Alpha's step, at most a thousand times as long as x is large; it has no box."""
    r = perturb.alpha(apply_fn, params, x, y, norm=norm).astype(inputs.accum_dtype(x.dtype))
    unit = perturb.alpha(apply_fn, params, x, y, norm=norm, eps=1.0).astype(r.dtype)
    longest = 1000 * (1 + norms.norm(x, norm))
    size = norms.norm(jnp.clip(r, -1e37, 1e37), norm)  # of more, 1 / size could be flushed to 0
    capped = inputs.expand_like(longest, x) * unit
    return jnp.where(inputs.expand_like(size <= longest, x), r, capped)


class _State(NamedTuple):
    i: jax.Array
    r: jax.Array  # the sum of the steps, in the dtype of norms
    end: jax.Array  # where the last step led
    done: jax.Array  # [B]; whether that is on the far side by more than rounding
    barely: search.Least  # what was there by however little


@partial(jax.jit, static_argnums=range(4))
def _run(
    apply_fn: ApplyFn,
    norm: Norm,
    steps: int,
    output: str,
    params: Params,
    x: jax.Array,
    y: jax.Array,
    eps: jax.Array | None,
    overshoot: float,
    bounds: Bounds | None,
) -> jax.Array:
    problem = search.Problem(apply_fn, params, x, y, losses.logit_margin, targeted=False)
    clear = search.clearly(problem)
    over = jnp.asarray(1 + overshoot, inputs.accum_dtype(x.dtype))

    def inside(r: jax.Array) -> jax.Array:
        return norms.clip_to_box(x, r, bounds)

    def crossed(r: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return whether r is on the far side by more than rounding, and whether at all."""
        success, loss = problem.value(r)
        return clear(success, loss) | ~problem.posed, success

    def more(state: _State) -> Any:
        return (state.i < steps) & ~jnp.all(state.done)

    @_cpu.fast_convolutions
    def step(state: _State) -> _State:
        r = state.r
        at = inside(r)
        if output == "logits":
            walls = (norm == "l1") | (state.i >= steps // 2)
            ahead = search.to_boundary(apply_fn, params, x + at, y, norm, bounds, walls=walls)
        else:
            ahead = _probability_step(apply_fn, params, x + at, y, norm)
        moved = at.astype(r.dtype) + ahead
        near, far = inside(moved), inside(over * moved)
        (hit_near, barely_near), (hit, barely) = crossed(near), crossed(far)
        # Where the boundary is curved, further on may be back on this side.
        point = jnp.where(inputs.expand_like(hit, r), far, near)
        stay = inputs.expand_like(state.done, r)
        over_it = jnp.where(inputs.expand_like(barely, r), far, near)
        size = norms.norm(over_it, norm)
        return _State(
            state.i + 1,
            jnp.where(stay, r, moved),
            jnp.where(stay, state.end, point),
            state.done | hit | hit_near,
            state.barely.with_point(over_it, size, (barely | barely_near) & ~state.done),
        )

    zero, nowhere = jnp.zeros_like(x), jnp.full(x.shape[0], jnp.inf, over.dtype)
    start = _State(
        jnp.int32(0), zero.astype(over.dtype), zero, crossed(zero)[0], search.Least(zero, nowhere)
    )
    _, _, end, done, least = lax.while_loop(more, step, start)

    def misleads(r: jax.Array) -> jax.Array:
        clearly, barely = crossed(r)
        return jnp.where(done, clearly, barely)

    found = done | jnp.isfinite(least.size)
    r = search.shrunk(misleads, jnp.where(inputs.expand_like(done, x), end, least.r), found)
    r = jnp.where(inputs.expand_like(found, r), r, 0)
    return problem.answer(search.within(r, eps, norm), eps)
