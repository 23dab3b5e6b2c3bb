r"""Decoupled direction and norm: the loss sets the direction, success or failure sets the size.

An attack that trades off the size of r against the loss has to find the weight. This one decouples
the two (Rony et al., 2019): a step along the loss's gradient turns r, which is then rescaled to a
size that shrinks by a fixed fraction after a success and grows by it after a failure. So the
iterates cross the boundary again and again while the steps, whose length decays by a cosine, turn r
toward its nearest point. The smallest perturbation found is then scaled down to the boundary.
"""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxadv import inputs, losses, norms
from jaxadv.attack._closest import Closest
from jaxadv.attack._info import Answer, Found, reports
from jaxadv.boxes import farthest
from jaxadv.problem import Problem, beyond_rounding, iterate
from jaxadv.types import ApplyFn, Bounds, Eps, Params

__all__ = ["ddn"]

_LAST = 0.01  # the length of the last step, relative to the first


class _State(NamedTuple):
    r: jax.Array
    size: jax.Array  # the size that r was rescaled to, before clipping to the box
    closest: Closest


@reports
def ddn(
    apply_fn: ApplyFn,
    params: Params,
    x: jax.Array,
    y: jax.Array,
    /,
    *,
    eps: Eps | None = None,
    steps: int = 100,
    gamma: float = 0.05,
    step_size: float = 1.0,
    targeted: bool = False,
    key: jax.Array | None = None,
    bounds: Bounds | None = None,
) -> Found:
    r"""Decoupled direction and norm: the smallest l2 perturbation that changes the prediction.

    .. math:: r \leftarrow \sigma_{t+1} \frac{r + s_t u}{\|r + s_t u\|_2}, \qquad
              u = \frac{\nabla \ell}{\|\nabla \ell\|_2}, \qquad
              \sigma_{t+1} = (1 \mp \gamma) \sigma_t

    with the minus where x + r is misclassified, :math:`s_t` decaying from :math:`s_0` to
    :math:`s_0 / 100` by a cosine, and :math:`\sigma_0 = s_0`. The loss is cross-entropy in its
    margin form, whose gradient doesn't vanish where the net is confident. Unlike in the published
    attack, pixels aren't rounded to 256 levels, and r is scaled down to the boundary at the end.

    Args:
      apply_fn: `(params, x) -> logits`, `[B, ...]` to `[B, K]`. Hashable; compiled once per object.
      params: the first argument of `apply_fn`.
      x: `[B, ...]`, floating point.
      y: integer labels, `[B]`.
      eps: None for the smallest r found, whatever its size. With a size, a scalar or `[B]`, a
        larger r is projected onto the ball of that radius.
      steps: number of steps, at least 1; each a forward and a backward pass.
      gamma: the fraction by which the size changes from step to step, in (0, 1).
      step_size: :math:`s_0`, the length of the first step and the first size of r, in units of x.
        The published 1 suits images in [0, 1].
      targeted: y has target classes instead of true labels.
      key: ignored; this method is deterministic. (Where a gradient is 0, the published attack makes
        a random step and this one makes none.)
      bounds: `(lo, hi)`, the box that x + r stays in. None: no box.

    Returns:
      r, of x's shape and dtype. It is exactly 0 where x is already misclassified, and where nothing
      was found. Rows are 0 or NaN as in `perturb`.

    Raises:
      TypeError: if `x` or the logits are not floating-point arrays, or `y` not integers.
      ValueError: if shapes don't match, if a Python `eps` is negative, if `steps` < 1, if `gamma`
        is not in (0, 1), if `step_size` <= 0, or if `bounds` is not a pair.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxadv import attack
      >>> w = jnp.array([[3.0, -3.0], [4.0, -4.0]])
      >>> x, y = jnp.array([[1.0, 0.5]]), jnp.array([0])
      >>> r = attack.ddn(lambda w, x: x @ w, w, x, y)
      >>> bool(jnp.allclose(r, jnp.array([[-0.6, -0.8]]), rtol=0.01))
      True

    References:
      Rony et al., "Decoupling Direction and Norm for Efficient Gradient-Based L2 Adversarial
      Attacks and Defenses", 2019.
    """
    inputs.at_least(1, "steps", steps, "100 is usual, 1000 thorough")
    if not 0 < gamma < 1:
        raise ValueError(f"expected 0 < gamma < 1, got {gamma}; 0.05 is the published value")
    if not 0 < step_size < math.inf:
        raise ValueError(
            f"expected a finite step_size > 0, got {step_size}; 1 suits images in [0, 1]"
        )
    problem = Problem.of(
        apply_fn, params, x, y, norm="l2", eps=eps, bounds=bounds, loss_fn=_by_cross_entropy,
        minimal=True, targeted=targeted,
    ).keyed()  # fmt: skip
    return Found(problem, *_run(problem, gamma, step_size, steps=steps))


def _by_cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Return the logit margin, on which success depends, with the gradient of `losses.margin`."""
    loss = losses.margin(logits, labels)
    loss = jnp.where(jnp.isfinite(loss), loss, 0)  # it is infinite where y is masked
    return lax.stop_gradient(losses.logit_margin(logits, labels)) + (loss - lax.stop_gradient(loss))


@partial(jax.jit, static_argnames="steps")
def _run(problem: Problem, gamma: float, step_size: float, *, steps: int) -> Answer:
    problem = problem.start()
    x = problem.x
    clear = beyond_rounding(problem)
    closest = Closest.at_x(problem, clear)
    dtype = closest.clearly.size.dtype
    largest = jnp.full(x.shape[0], jnp.inf, dtype)
    if problem.bounds is not None:
        largest = farthest(x, problem.bounds, "l2")

    def step(i: jax.Array, state: _State) -> _State:
        success, loss, g = problem.gradient(state.r)
        clearly = clear(success, loss)
        closest = state.closest.with_point(state.r, norms.norm(state.r, "l2"), success, clearly)
        anneal = (1 + jnp.cos(jnp.pi * i.astype(dtype) / steps)) / 2
        length = step_size * (_LAST + (1 - _LAST) * anneal)
        size = jnp.minimum(state.size * jnp.where(clearly, 1 - gamma, 1 + gamma), largest)
        turned = state.r.astype(dtype) + length * norms.steepest(g, "l2")
        return _State(problem.clip_to_box(norms.rescale(turned, size, "l2")), size, closest)

    first = jnp.full(x.shape[0], step_size, dtype)
    r, _, closest = iterate(step, _State(jnp.zeros_like(x), first, closest), steps)
    success, loss = problem.value(r)
    closest = closest.with_point(r, norms.norm(r, "l2"), success, clear(success, loss))
    r, tries = closest.shortened(problem, clear)
    return problem.answer(r), steps + 4 + tries, jnp.full_like(tries, steps)
