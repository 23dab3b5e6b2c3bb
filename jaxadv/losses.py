r"""Losses that attacks maximise: functions `(logits, labels) -> [B]`, see `types.LossFn`.

- `margin`: cross-entropy's margin form. It ranks points as cross-entropy does and its gradient has
  the same direction, but doesn't vanish where the net is confident.
- `logit_margin`: the top wrong class's lead over y, positive where an example is misclassified.
- `dlr` and `targeted_dlr`: the difference of logits ratio, which doesn't change when the logits are
  scaled.

All are computed in float32 or wider, and treat a logit of -inf as a masked class. Any other loss
per example can be used as well, for instance optax's with integer labels.

Next: `perturb` takes one step along the gradient of `margin`; `attack` takes many, on any loss.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxadv import inputs

__all__ = ["dlr", "logit_margin", "margin", "targeted_dlr"]

# Replaces logits of -inf, and those further than this below the largest. Its probability is 0 in
# every dtype; it is finite, so that no derivative is infinity minus infinity; and its reciprocal,
# needed in ratios of logits, doesn't underflow in float32.
MASKED = -1e30


def margin(logits: jax.Array, labels: jax.Array) -> jax.Array:
    r"""Cross-entropy's margin form: it increases with the loss, and its gradient never vanishes.

    .. math:: m = \mathrm{logsumexp}_{k \ne y} z_k - z_y, \qquad \mathrm{CE} = \log(1 + e^m)

    Args:
      logits: `[B, K]`, floating point; a logit of -inf masks its class.
      labels: integers, `[B]`, in 0..K-1.

    Returns:
      `[B]`, in float32 at least; -inf where all classes except y are masked.

    Raises:
      TypeError: if `logits` are not a floating-point array, or `labels` not integers.
      ValueError: if `logits` are not `[B, K]` with K >= 2, or `labels` not `[B]`.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxadv import losses
      >>> losses.margin(jnp.array([[3.0, 1.0]]), jnp.array([0])).tolist()
      [-2.0]
    """
    logits, labels = _checked(logits, labels)
    is_y = jax.nn.one_hot(labels, logits.shape[1], dtype=bool)
    others = jax.nn.logsumexp(jnp.where(is_y, -jnp.inf, logits), axis=1)
    return others - jnp.sum(jnp.where(is_y, logits, 0), axis=1)


def logit_margin(logits: jax.Array, labels: jax.Array) -> jax.Array:
    r"""The top wrong class's lead over the label, positive where an example is misclassified.

    .. math:: \max_{k \ne y} z_k - z_y

    Args:
      logits: `[B, K]`, floating point; a logit of -inf masks its class.
      labels: integers, `[B]`, in 0..K-1.

    Returns:
      `[B]`, in float32 at least.

    Raises:
      TypeError: if `logits` are not a floating-point array, or `labels` not integers.
      ValueError: if `logits` are not `[B, K]` with K >= 2, or `labels` not `[B]`.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxadv import losses
      >>> losses.logit_margin(jnp.array([[3.0, 1.0, 2.0]]), jnp.array([0])).tolist()
      [-1.0]

    References:
      Carlini and Wagner, "Towards Evaluating the Robustness of Neural Networks", 2017.
    """
    logits, labels = _checked(logits, labels)
    logits = shift_logits(logits)
    is_y = jax.nn.one_hot(labels, logits.shape[1], dtype=bool)
    z_y = jnp.sum(jnp.where(is_y, logits, 0), axis=1)
    return jnp.max(jnp.where(is_y, -jnp.inf, logits), axis=1) - z_y


def dlr(logits: jax.Array, labels: jax.Array) -> jax.Array:
    r"""The difference of logits ratio, positive where an example is misclassified.

    .. math:: -\frac{z_y - \max_{k \ne y} z_k}{z_{\pi_1} - z_{\pi_3}}

    with :math:`z_{\pi_1} \ge z_{\pi_2} \ge z_{\pi_3}` the three largest logits. It doesn't change
    when the logits are shifted or scaled. Its gradient is 0 where y has the third largest logit.
    With two classes there is no third logit, and the loss is the numerator, `logit_margin`.

    Args:
      logits: `[B, K]`, floating point; a class with a logit of -inf counts as absent.
      labels: integers, `[B]`, in 0..K-1.

    Returns:
      `[B]`, in float32 at least; 0 where the three largest logits are equal.

    Raises:
      TypeError: if `logits` are not a floating-point array, or `labels` not integers.
      ValueError: if `logits` are not `[B, K]` with K >= 2, or `labels` not `[B]`.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxadv import losses
      >>> losses.dlr(jnp.array([[5.0, 2.0, 1.0]]), jnp.array([0])).tolist()
      [-0.75]

    References:
      Croce and Hein, "Reliable evaluation of adversarial robustness with an ensemble of diverse
      parameter-free attacks", 2020, Section 4.
    """
    logits, labels = _checked(logits, labels)
    lead = logit_margin(logits, labels)
    if logits.shape[1] < 3:
        return lead
    return _ratio(lead, shift_logits(logits), 3)


def targeted_dlr(logits: jax.Array, labels: jax.Array, *, target: jax.Array) -> jax.Array:
    r"""The difference of logits ratio toward one class, positive where the target leads the label.

    .. math:: -\frac{z_y - z_t}{z_{\pi_1} - (z_{\pi_3} + z_{\pi_4}) / 2}

    With three classes the denominator is :math:`z_{\pi_1} - z_{\pi_3}`, as in `dlr`; with two
    classes there is no denominator.

    Args:
      logits: `[B, K]`, floating point; a class with a logit of -inf counts as absent.
      labels: integers, `[B]`, in 0..K-1.
      target: t, integers, `[B]`, in 0..K-1.

    Returns:
      `[B]`, in float32 at least; 0 where the four largest logits are equal.

    Raises:
      TypeError: if `logits` are not a floating-point array, or `labels` or `target` not integers.
      ValueError: if `logits` are not `[B, K]` with K >= 2, or `labels` or `target` not `[B]`.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxadv import losses
      >>> z, y = jnp.array([[5.0, 3.0, 2.0, 0.0]]), jnp.array([0])
      >>> losses.targeted_dlr(z, y, target=jnp.array([1])).tolist()
      [-0.5]

    References:
      Croce and Hein, 2020, Section 4.
    """
    logits, labels, target = _checked(logits, labels, target)
    shifted = shift_logits(logits)
    z = jnp.take_along_axis(shifted, jnp.stack([target, labels], axis=1), axis=1)
    lead, classes = z[:, 0] - z[:, 1], logits.shape[1]
    if classes < 3:
        return lead
    return _ratio(lead, shifted, min(classes, 4))


def _checked(logits: jax.Array, *labels: jax.Array) -> tuple[jax.Array, ...]:
    """Return the logits, in float32 at least, and the labels."""
    n = len(logits) if np.ndim(logits) else 0
    logits = inputs.logits_of(logits, n)
    return logits.astype(inputs.accum_dtype(logits.dtype)), *(inputs.labels(k, n) for k in labels)


def _ratio(lead: jax.Array, shifted: jax.Array, n: int) -> jax.Array:
    """Divide by the largest logit minus the mean of the third and the nth, 3 or 4.

    If the nth is masked, use only the third; if the third is masked too, divide by 1.
    """
    top = lax.top_k(shifted, n)[0]
    third, last = top[:, 2], top[:, -1]
    last = jnp.where(last > MASKED / 2, last, third)
    below = jnp.where(third > MASKED / 2, top[:, 0] - (third + last) / 2, 1)
    zero = below == 0  # double where: no derivative of 0 / 0
    return jnp.where(zero, 0, lead / jnp.where(zero, 1, below))


def shift_logits(logits: jax.Array) -> jax.Array:
    """Shift logits `[B, K]` so that the largest is 0, and replace -inf by `MASKED`.

    The softmax and all differences of logits stay the same, and no difference of two entries
    overflows or is NaN. A row of logits that are all -inf becomes finite as well.
    """
    largest = lax.stop_gradient(jnp.max(logits, axis=1, keepdims=True))
    # The softmax doesn't depend on the shift, so the shift is a constant for derivatives.
    return jnp.maximum(logits - jnp.where(jnp.isneginf(largest), 0, largest), MASKED)


def largest_wrong(logits: jax.Array, y: jax.Array, n: int) -> tuple[jax.Array, jax.Array]:
    """Return each row's n largest logits except y's, and their classes, `[B, n]`; y comes last."""
    is_y = jax.nn.one_hot(y, logits.shape[1], dtype=bool)
    return lax.top_k(jnp.where(is_y, -jnp.inf, logits), n)


def top_wrong(logits: jax.Array, is_y: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Find each row's top wrong class.

    Args:
      logits: `[B, K]`.
      is_y: the true class, bool `[B, K]`.

    Returns:
      The top wrong class, bool `[B, K]`, and the logits with -inf for it and for y.
    """
    others = jnp.where(is_y, -jnp.inf, logits)
    top = jax.nn.one_hot(jnp.argmax(others, axis=1), logits.shape[1], dtype=bool)
    return top, jnp.where(top, -jnp.inf, others)
