r"""Projected gradient descent: the loss's steepest steps, projected back onto the ball.

Where the one-step methods of `perturb` trust one linearisation, this one follows the loss, and so
tells how much of a one-step robust accuracy is real (Madry et al., 2018). The loss is by default
the margin form of cross-entropy, whose gradient doesn't die where the net is confident.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxadv import inputs, jacobian, norms
from jaxadv.types import ApplyFn, Bounds, Eps, LossFn, Norm, Params

__all__ = ["pgd"]


class _Best(NamedTuple):
    """The most harmful perturbation so far, by (success, loss), of each example."""

    r: jax.Array  # [B, ...]
    success: jax.Array  # [B]
    loss: jax.Array  # [B]


def pgd(
    apply_fn: ApplyFn,
    params: Params,
    x: jax.Array,
    y: jax.Array,
    /,
    *,
    eps: Eps,
    norm: Norm = "l2",
    steps: int = 100,
    step_size: Eps | None = None,
    loss_fn: LossFn = jacobian.margin,
    targeted: bool = False,
    random_start: bool = False,
    key: jax.Array | None = None,
    bounds: Bounds | None = None,
) -> jax.Array:
    r"""Projected gradient descent in a ball around x.

    .. math:: r_{t+1} = \Pi_{\|r\| \le \epsilon}\bigl(r_t + s \arg\max_{\|u\| \le 1}
              \langle \nabla_x \ell(x + r_t), u \rangle\bigr)

    The best point of each example is kept over all iterates, the start included: one that is
    misclassified before one that isn't, then by loss. More steps of the same size never do worse.

    Args:
      apply_fn: `(params, x) -> logits`, `[B, ...]` to `[B, K]`. Hashable: compiled once each.
      params: the first argument of `apply_fn`.
      x: `[B, ...]`, floating point.
      y: labels, handed to `loss_fn` unchanged; integers `[B]` for the default loss. For other
        labels (soft targets) the best point is that of greatest loss.
      eps: the ball's radius, a scalar or `[B]`; a negative traced value counts as 0.
      norm: the ball's norm: `"l1"`, `"l2"` or `"linf"`.
      steps: number of steps, at least 1; each a forward and a backward pass.
      step_size: s, a scalar or `[B]`; None for 2.5 eps / steps.
      loss_fn: `(logits, labels) -> [B]`, which is raised (lowered if `targeted`). The default is
        `jacobian.margin`.
      targeted: y are the classes to reach instead of those to leave.
      random_start: start at a random point of the ball instead of at x.
      key: one key, or one per example, `[B]`; used by `random_start` alone.
      bounds: `(lo, hi)`, the box that x + r stays in. None: no box.

    Returns:
      r, of x's shape and dtype, of a size of at most eps. Rows are 0 or NaN as in `perturb`.

    Raises:
      TypeError: if `x` or the logits are not floating-point arrays; if `y` are not integers, for
        the default loss.
      ValueError: if shapes don't match, if the norm is unknown, if a Python `eps` or `step_size` is
        negative, if `steps` < 1, if `bounds` is not a pair, or if `random_start` lacks a key.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxadv import attack
      >>> w = jnp.array([[3.0, -3.0], [4.0, -4.0]])
      >>> x, y = jnp.array([[1.0, 1.0]]), jnp.array([0])
      >>> r = attack.pgd(lambda w, x: x @ w, w, x, y, eps=5.0, steps=10)
      >>> (r + jnp.array([[3.0, 4.0]])).round(3).tolist()
      [[0.0, 0.0]]

    References:
      Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks", 2018.
    """
    if steps < 1:
        raise ValueError(f"expected steps >= 1, got {steps}; one step is perturb.loss")
    x, y = inputs.examples(x), jnp.asarray(y)
    inputs.paired(x, y)
    eps = inputs.radius(eps, x)
    step_size = 2.5 * eps / steps if step_size is None else inputs.radius(step_size, x)
    if bounds is not None:
        inputs.box(bounds, x)  # now, while they are numbers
    keys = inputs.keys(key, x.shape[0], "a random start") if random_start else None
    return _run(
        apply_fn, norm, steps, loss_fn, targeted, params, x, y, eps, step_size, keys, bounds
    )


@partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _run(
    apply_fn: ApplyFn,
    norm: Norm,
    steps: int,
    loss_fn: LossFn,
    targeted: bool,
    params: Params,
    x: jax.Array,
    y: jax.Array,
    eps: jax.Array,
    step_size: jax.Array,
    keys: jax.Array | None,
    bounds: Bounds | None,
) -> jax.Array:
    integer = jnp.issubdtype(y.dtype, jnp.integer) and y.ndim == 1
    sign = -1 if targeted else 1
    clean = inputs.apply(apply_fn, params, x)
    posed = inputs.solvable(clean, y if integer else None)

    def losses(r: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        logits = inputs.apply(apply_fn, params, x + r)
        # Rows that pose no problem are decided: finite logits keep their derivatives finite.
        logits = jnp.where(posed[:, None], logits, 0)
        loss = sign * loss_fn(logits.astype(inputs.wide(logits.dtype)), y)
        # A sum over examples, so that the gradient of each is its own.
        return jnp.sum(loss), (loss, logits)

    def succeeds(logits: jax.Array) -> jax.Array:
        if not integer:
            return jnp.zeros(x.shape[0], bool)
        hit = jnp.argmax(logits, axis=1) == y
        return hit if targeted else ~hit

    def keep(best: _Best, r: jax.Array, loss: jax.Array, logits: jax.Array) -> _Best:
        success = succeeds(logits)
        better = jnp.where(success == best.success, loss > best.loss, success)
        return _Best(
            jnp.where(inputs.batched(better, r), r, best.r),
            success | best.success,
            jnp.where(better, loss, best.loss),
        )

    def inside(r: jax.Array) -> jax.Array:
        r = norms.project(r, eps, norm)
        return r.astype(x.dtype) if bounds is None else norms.confine(x, r, bounds)

    def step(_: int, carry: tuple[jax.Array, _Best]) -> tuple[jax.Array, _Best]:
        r, best = carry
        (_, (loss, logits)), g = jax.value_and_grad(losses, has_aux=True)(r)
        best = keep(best, r, loss, logits)
        # Each step in the dtype of norms: a bfloat16 r would swallow small ones.
        direction = norms.steepest(g.astype(inputs.wide(x.dtype)), norm)
        moved = r.astype(direction.dtype) + inputs.batched(step_size, x) * direction
        return inside(moved), best

    r = jnp.zeros_like(x) if keys is None else inside(norms.sample(keys, x, eps, norm))
    nowhere = jnp.full(x.shape[0], -jnp.inf, inputs.wide(x.dtype))
    best = _Best(jnp.zeros_like(x), jnp.zeros(x.shape[0], bool), nowhere)
    r, best = lax.fori_loop(0, steps, step, (r, best))
    _, (loss, logits) = losses(r)
    best = keep(best, r, loss, logits)
    r = jnp.where(inputs.batched(posed, x), best.r, 0)
    return jnp.where(inputs.batched(inputs.finite(x, clean), x), r, jnp.nan)
