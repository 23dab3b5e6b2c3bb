"""Wrappers that turn other kinds of nets into a `types.ApplyFn`, as attacks and evaluation need.

- `two_logits`: for a binary net with a single logit.
- `mean_of_draws`: for a net that draws random numbers; it predicts by the mean of many draws.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxadv import _cpu, inputs, losses
from jaxadv.types import ApplyFn, Params, StochasticFn

__all__ = ["mean_of_draws", "two_logits"]


@dataclass(frozen=True)
class _TwoLogits:
    """Compares equal for the same net, so that attacks on it are compiled once."""

    apply_fn: Callable[[Params, jax.Array], jax.Array]

    def __call__(self, params: Params, x: jax.Array, /) -> jax.Array:
        z = self.apply_fn(params, x)
        if not isinstance(z, jax.Array | np.ndarray):
            raise TypeError(
                f"expected an array of logits, got {type(z).__name__}; return only these, e.g. "
                "lambda params, x: apply_fn(params, x)[0]"
            )
        if z.size != len(x):
            raise ValueError(
                f"expected one logit for each of {len(x)} examples, got shape {z.shape}; pass a "
                "net with two or more logits as it is"
            )
        z = z.reshape(len(x))
        return jnp.stack([jnp.zeros_like(z), z], axis=1)


def two_logits(apply_fn: Callable[[Params, jax.Array], jax.Array]) -> ApplyFn:
    r"""Turn a binary net with one logit z into a net with two logits.

    .. math:: z \mapsto (0, z), \qquad \mathrm{softmax}(0, z)_1 = \mathrm{sigmoid}(z)

    Args:
      apply_fn: `(params, x) -> z`, `[B, ...]` to `[B]` or `[B, 1]`; class 1 where z > 0.

    Returns:
      A net with logits `[B, 2]`. It raises a ValueError if `apply_fn` returns more than one logit,
      and a TypeError if it doesn't return an array.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxadv import nets, perturb
      >>> net = nets.two_logits(lambda w, x: x @ w)
      >>> w, x, y = jnp.array([3.0, 4.0]), jnp.array([[1.0, 1.0]]), jnp.array([1])
      >>> net(w, x).tolist(), perturb.loss(net, w, x, y, eps=5.0).tolist()
      ([[0.0, 7.0]], [[-3.0, -4.0]])
    """
    return _TwoLogits(apply_fn)


def mean_of_draws(apply_fn: StochasticFn, key: jax.Array, draws: int = 100) -> ApplyFn:
    r"""Turn a net that draws random numbers into a deterministic one, its mean prediction.

    .. math:: z = \log \frac{1}{n} \sum_{i=1}^{n} \mathrm{softmax}(f(x, \mathrm{key}_i))

    Use it to measure accuracy; attacks average over draws of their own. Each example goes through
    the net by itself, with the same keys, so its logits don't depend on the batch.

    Args:
      apply_fn: `(params, x, key) -> logits`, `[B, ...]` to `[B, K]`.
      key: one key.
      draws: number of draws n, at least 1.

    Returns:
      A net with logits `[B, K]`. Make it once and reuse it: each new one is compiled again.

    Raises:
      TypeError: if `key` isn't a key.
      ValueError: if there is more than one key, or `draws` < 1. The net raises as
        `inputs.logits_of` if `apply_fn` doesn't return logits `[B, K]`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxadv import nets
      >>> def noisy(params, x, key):
      ...     return x + jax.random.normal(key, x.shape)
      >>> net = nets.mean_of_draws(noisy, jax.random.key(0))
      >>> net(None, jnp.array([[3.0, 0.0]])).argmax(axis=1).tolist()
      [0]

    References:
      Athalye et al., "Synthesizing Robust Adversarial Examples", 2018.
    """
    inputs.at_least(1, "draws", draws, "100 is the usual number")
    inputs.one_key(key)
    keys = jax.random.split(key, draws)

    def mean(params: Params, x: jax.Array) -> jax.Array:
        def log_probabilities(key: jax.Array) -> jax.Array:
            logits = jax.vmap(
                lambda example: inputs.apply(apply_fn, params, example[None], key)[0]
            )(x)
            logits = jax.nn.log_softmax(logits.astype(inputs.accum_dtype(logits.dtype)))
            # Finite for masked classes, too: logaddexp(-inf, -inf) has no derivative.
            return jnp.maximum(logits, losses.MASKED)

        def add(total: jax.Array, key: jax.Array) -> tuple[jax.Array, None]:
            return jnp.logaddexp(total, log_probabilities(key)), None

        total, _ = lax.scan(_cpu.fast_convolutions(add), log_probabilities(keys[0]), keys[1:])
        return jnp.where(total <= losses.MASKED / 2, -jnp.inf, total - math.log(draws))

    return mean
