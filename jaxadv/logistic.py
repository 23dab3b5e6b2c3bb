r"""Appendix A: logistic regression, where the inner maximum has a closed form.

For a linear score :math:`w^\top x`, labels :math:`y \in \{-1, +1\}` and the logistic loss
:math:`\ell(z) = \log(1 + e^{-z})` (printed with the wrong sign), the adversary of Equation 6 is
exact:

.. math:: \max_{\|r\| \le \epsilon} \ell(y\, w^\top (x + r)) = \ell(y\, w^\top x - \epsilon \|w\|_*)

at :math:`r = -\epsilon\, y\, \arg\max_{\|u\| \le 1} \langle w, u \rangle`. The right side is convex
in w (Proposition B). `loss` is the maximum, `adversary` the maximiser; `fit` minimises the mean of
`loss`.

There is no bias: hyperplanes go through 0, as in the paper. `logits` is the same model as an
`ApplyFn` with two classes, for the general methods of `perturb` and `attack`, which must agree with
this closed form.

References:
  Huang et al., "Learning with a Strong Adversary", 2015, Appendix A: Equation 6 and
  Propositions B to D.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from jaxadv import inputs, norms
from jaxadv.types import Eps, Norm

__all__ = ["adversary", "fit", "logits", "loss", "objective"]


def logits(w: jax.Array, x: jax.Array) -> jax.Array:
    r"""The model as a classifier with two classes, 0 for y = -1 and 1 for y = +1.

    Args:
      w: weights, `[D]`, floating point.
      x: `[B, D]`, floating point.

    Returns:
      :math:`(-s / 2, s / 2)` with :math:`s = w^\top x`, `[B, 2]`, whose softmax is the logistic
      function of s and whose cross-entropy is the logistic loss.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxadv import logistic
      >>> logistic.logits(jnp.array([2.0, 0.0]), jnp.array([[3.0, 1.0]])).tolist()
      [[-3.0, 3.0]]

    References:
      Huang et al., 2015, Appendix A.
    """
    half = x @ w / 2
    return jnp.stack([-half, half], axis=1)


def _checked(w: jax.Array, x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Check a data set of signed labels; return w, x, and y in float32 at least."""
    x, w, y = inputs.examples(x), jnp.asarray(w), jnp.asarray(y)
    if x.ndim != 2 or w.shape != x.shape[1:] or y.shape != x.shape[:1]:
        raise ValueError(
            f"expected w [D], x [B, D] and y [B], got {w.shape}, {x.shape} and {y.shape}; "
            "flatten images with x.reshape(len(x), -1)"
        )
    inputs.are_examples(w[None], "w")
    if not isinstance(y, jax.core.Tracer) and np.any(np.abs(np.asarray(y)) != 1):
        raise ValueError(
            "expected labels -1 and +1, got other values; convert labels 0 and 1 with 2 * y - 1"
        )
    return w, x, y.astype(inputs.accum_dtype(jnp.result_type(x, w)))


def adversary(w: jax.Array, x: jax.Array, y: jax.Array, *, eps: Eps, norm: Norm) -> jax.Array:
    r"""The exact maximiser of the logistic loss over a ball.

    .. math:: r = -\epsilon\, y\, \arg\max_{\|u\| \le 1} \langle w, u \rangle

    Args:
      w: weights, `[D]`.
      x: `[B, D]`, floating point.
      y: labels -1 and +1, `[B]`.
      eps: the ball's radius, a scalar or `[B]`.
      norm: the ball's norm.

    Returns:
      r, `[B, D]`, of x's dtype and of size at most eps; 0 where w is 0.

    Raises:
      TypeError: if `x` is not floating point.
      ValueError: if shapes don't match, labels are not -1 and +1, a Python `eps` is negative, or
        the norm is unknown.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxadv import logistic
      >>> w, x, y = jnp.array([3.0, 4.0]), jnp.ones((1, 2)), jnp.array([1])
      >>> logistic.adversary(w, x, y, eps=5.0, norm="l2").tolist()
      [[-3.0, -4.0]]

    References:
      Huang et al., 2015, Appendix A, the proof of Proposition B.
    """
    w, x, y = _checked(w, x, y)
    r = -(inputs.radius(eps, x) * y)[:, None] * norms.steepest(w[None].astype(y.dtype), norm)
    return norms.clip_to_box(x, r, None)  # rounds to x's dtype toward 0, to stay in the ball


def loss(w: jax.Array, x: jax.Array, y: jax.Array, *, eps: Eps, norm: Norm) -> jax.Array:
    r"""The maximum of the logistic loss over a ball, in closed form.

    .. math:: \log(1 + e^{-y w^\top x + \epsilon \|w\|_*})

    Args:
      w: weights, `[D]`.
      x: `[B, D]`, floating point.
      y: labels -1 and +1, `[B]`.
      eps: the ball's radius, a scalar or `[B]`; 0 for plain logistic regression.
      norm: the ball's norm; its dual measures w.

    Returns:
      `[B]`, in float32 at least.

    Raises:
      TypeError: if `x` is not floating point.
      ValueError: if shapes don't match, labels are not -1 and +1, a Python `eps` is negative, or
        the norm is unknown.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxadv import logistic
      >>> w, x, y = jnp.array([3.0, 4.0]), jnp.array([[3.0, 4.0]]), jnp.array([1])
      >>> round(logistic.loss(w, x, y, eps=5.0, norm="l2").item(), 4)  # log 2: on the boundary
      0.6931

    References:
      Huang et al., 2015, Appendix A, Proposition B (with the sign of the loss corrected).
    """
    w, x, y = _checked(w, x, y)
    margins = y * (x.astype(y.dtype) @ w.astype(y.dtype))
    size = norms.norm(w[None], norms.dual(norm))  # [1]
    return jax.nn.softplus(inputs.radius(eps, x) * size - margins)


def objective(w: jax.Array, x: jax.Array, y: jax.Array, *, eps: Eps, norm: Norm) -> jax.Array:
    r"""The min-max objective of Equation 6, as a mean over examples; convex in w (Proposition B).

    Args:
      w: weights, `[D]`.
      x: `[B, D]`, floating point.
      y: labels -1 and +1, `[B]`.
      eps: the ball's radius, a scalar or `[B]`.
      norm: the ball's norm.

    Returns:
      The mean of `loss`, `[]`, in float32 at least.

    Raises:
      TypeError: if `x` is not floating point.
      ValueError: as `loss`.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxadv import logistic
      >>> w, x, y = jnp.zeros(2), jnp.ones((3, 2)), jnp.array([1, -1, 1])
      >>> round(float(logistic.objective(w, x, y, eps=1.0, norm="linf")), 4)
      0.6931

    References:
      Huang et al., 2015, Appendix A, Equation 6.
    """
    return jnp.mean(loss(w, x, y, eps=eps, norm=norm))


def fit(
    w: jax.Array,
    x: jax.Array,
    y: jax.Array,
    *,
    eps: Eps,
    norm: Norm,
    tx: optax.GradientTransformation | None = None,
    steps: int = 200,
) -> tuple[jax.Array, jax.Array]:
    r"""Minimise `objective` from an initial w with optax, on the full batch.

    The solution is bounded if the margin, the largest gap between the classes around a hyperplane
    through 0, measured in the adversary's norm, is less than 2 eps. If it is more, the loss tends
    to 0 as w grows without bound (Proposition D).

    Args:
      w: initial weights, `[D]`.
      x: `[B, D]`, floating point.
      y: labels -1 and +1, `[B]`.
      eps: the ball's radius, a scalar or `[B]`.
      norm: the ball's norm.
      tx: an optax transformation. The default, `optax.lbfgs()`, suits l2, where the objective is
        smooth except at w = 0. For l1 and linf it has kinks: pass a subgradient method, `optax.sgd`
        with a decaying step.
      steps: number of updates, at least 1.

    Returns:
      The last w, `[D]`, and the objective before each update, `[steps]`.

    Raises:
      TypeError: if `x` is not floating point.
      ValueError: as `loss`, or if `steps` < 1.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxadv import logistic
      >>> x, y = jnp.array([[2.0, 0.5], [-2.0, 0.5], [-0.5, 0.0]]), jnp.array([1, -1, 1])
      >>> w, losses = logistic.fit(jnp.ones(2), x, y, eps=0.5, norm="l2")
      >>> bool(losses[-1] < losses[0])
      True

    References:
      Huang et al., 2015, Appendix A, Equation 6 and Proposition D.
    """
    inputs.at_least(1, "steps", steps, "200 suits the default optimiser")
    full = optax.with_extra_args_support(optax.lbfgs() if tx is None else tx)
    w, x, y = _checked(w, x, y)

    def value_fn(w: jax.Array) -> jax.Array:
        return objective(w, x, y, eps=eps, norm=norm)

    def step(carry: tuple[jax.Array, Any], _: None) -> tuple[tuple[jax.Array, Any], jax.Array]:
        w, state = carry
        value, grad = jax.value_and_grad(value_fn)(w)
        updates, state = full.update(grad, state, w, value=value, grad=grad, value_fn=value_fn)
        return (optax.apply_updates(w, updates), state), value

    (w, _), values = lax.scan(step, (w, full.init(w)), None, length=steps)
    return w, values
