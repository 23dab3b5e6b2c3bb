"""A workaround for slow convolutions in loops on CPU, to be deleted once XLA no longer needs it.

XLA's CPU backend has fast kernels for convolutions in one layout only: images `[N, H, W, C]` and
kernels `[H, W, I, O]`. It converts other convolutions to that layout, except those in the bodies of
loops. The gradients of a convolution have other layouts, so the gradient of a plain
`flax.linen.Conv` is up to fifty times slower in a `lax.scan`, `fori_loop` or `while_loop` than
outside. Epochs and iterated attacks are such loops.

`fast_convolutions` rewrites a function before XLA sees it: `_interpreter` finds the convolutions,
and `_convolutions` replaces them. All loops of this library that evaluate a net use it, and so does
`train.make_step`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

import jax

from jaxadv._cpu import _interpreter

__all__ = ["fast_convolutions"]

F = TypeVar("F", bound=Callable[..., Any])


def fast_convolutions(function: F) -> F:
    """Return a function whose convolutions are fast on CPU, even in the body of a loop.

    The function is traced, and each convolution in it, including those of gradients, is replaced by
    a faster one. Results differ by rounding only. On other backends the function runs unchanged, as
    does the inside of a `jax.shard_map`.

    The representation of traced functions differs between versions of JAX. If this one cannot be
    read, the function runs unchanged and a `RuntimeWarning` is issued.

    Args:
      function: the body of a `lax.scan`, `fori_loop`, `while_loop` or `map`, or any other function
        of arrays, for example a training step.

    Returns:
      A function with the same arguments and results.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jax import lax
      >>> from jaxadv import _cpu
      >>> def half(i, x):
      ...     return x - 0.25 * jax.grad(lambda x: jnp.sum(x**2))(x)
      >>> float(lax.fori_loop(0, 3, _cpu.fast_convolutions(half), 8.0))
      1.0

    References:
      https://github.com/jax-ml/jax/issues/12868
    """

    @wraps(function)
    def fast(*args: Any, **kwargs: Any) -> Any:
        if jax.default_backend() != "cpu":
            return function(*args, **kwargs)
        jaxpr, shape = jax.make_jaxpr(function, return_shape=True)(*args, **kwargs)
        try:
            results = _interpreter.evaluate(jaxpr, *jax.tree.leaves((args, kwargs)))
        except Exception as error:
            unchanged = function(*args, **kwargs)  # raises the function's own errors
            # The location and text never change, so Python's default filter shows this once.
            warnings.warn(
                f"jaxadv cannot read functions traced by jax {jax.__version__} "
                f"({type(error).__name__}: {error}), and leaves them unchanged: results are right, "
                "but convolutions in loops may be slow on CPU. Update jaxadv, or install a version "
                "of jax that it was tested with.",
                RuntimeWarning,
                stacklevel=1,
            )
            return unchanged
        return jax.tree.unflatten(jax.tree.structure(shape), results)

    return cast(F, fast)
