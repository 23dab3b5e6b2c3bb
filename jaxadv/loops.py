"""Bodies of loops that keep a net's convolutions fast on CPU.

XLA's CPU backend has a fast kernel for convolutions of one layout alone: examples first, channels
last, kernels as height, width, input, output. It brings every other convolution into that layout,
but looks for them in a program's main computation and not in the bodies of its loops. The
convolutions that differentiation makes of a convolution have other layouts. So the gradient of a
plain `flax.linen.Conv` runs up to fifty times slower in a `lax.scan`, `fori_loop` or `while_loop`
than outside; and an epoch, and an iterated attack, is such a loop.

`body` does for a loop's body what XLA leaves out. Every loop of this library over a net is written
with it (`train.make_epoch`, all of `attack`); it is public for loops of your own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, TypeVar

import jax
from jax import lax
from jax.extend import core

__all__ = ["body"]

F = TypeVar("F", bound=Callable[..., Any])


def body(function: F) -> F:
    """Put a loop's body in the form that XLA runs fast on CPU; on other backends, it is unchanged.

    The function is traced, and each convolution in it, the gradients' included, is made on
    transposed operands where its layout isn't the fast one. The results are the same. What is in a
    `jax.shard_map` stays as it is.

    Args:
      function: what `lax.scan`, `fori_loop`, `while_loop` or `map` takes as a body.

    Returns:
      A function of the same arguments and results.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jax import lax
      >>> from jaxadv import loops
      >>> def half(i, x):
      ...     return x - 0.25 * jax.grad(lambda x: jnp.sum(x**2))(x)
      >>> float(lax.fori_loop(0, 3, loops.body(half), 8.0))
      1.0

    References:
      https://github.com/jax-ml/jax/issues/12868
    """

    def in_loop(*args: Any) -> Any:
        if jax.default_backend() != "cpu":
            return function(*args)
        closed, shape = jax.make_jaxpr(function, return_shape=True)(*args)
        results = _evaluate(closed.jaxpr, closed.consts, *jax.tree.leaves(args))
        return jax.tree.unflatten(jax.tree.structure(shape), results)

    return in_loop  # type: ignore[return-value]


def _evaluate(jaxpr: core.Jaxpr, consts: Sequence[Any], *args: Any) -> list[Any]:
    """Evaluate a jaxpr, all its convolutions in the fast layout."""
    values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, core.Literal) else values[atom]

    for eqn in jaxpr.eqns:
        operands = [read(atom) for atom in eqn.invars]
        scope = str(eqn.source_info.name_stack)
        with eqn.ctx.manager, jax.named_scope(scope) if scope else nullcontext():
            if eqn.primitive is lax.conv_general_dilated_p:
                results = [_convolve(*operands, **eqn.params)]
            else:
                params = eqn.params
                if eqn.primitive.name != "shard_map":  # its axes have a meaning inside alone
                    params = {name: _canonical(value) for name, value in params.items()}
                bound = eqn.primitive.get_bind_params(params)
                # Before jax 0.9, what is called comes first.
                called, params = bound if isinstance(bound, tuple) else ((), bound)
                result = eqn.primitive.bind(*called, *operands, **params)
                results = result if eqn.primitive.multiple_results else [result]
        values.update(zip(eqn.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _canonical(param: Any) -> Any:
    """Rewrite the jaxprs in a parameter of an equation; all else, and those with none, stays."""
    if isinstance(param, tuple) and any(map(_convolves, param)):
        return tuple(map(_canonical, param))
    if not _convolves(param):
        return param
    jaxpr, consts = (param, ()) if isinstance(param, core.Jaxpr) else (param.jaxpr, param.consts)
    new = jax.make_jaxpr(partial(_evaluate, jaxpr, consts))(*(v.aval for v in jaxpr.invars))
    return new.jaxpr if isinstance(param, core.Jaxpr) else new


def _convolves(param: Any) -> bool:
    """Say whether a parameter is a jaxpr with a convolution anywhere in it."""
    if isinstance(param, core.ClosedJaxpr):
        param = param.jaxpr
    if not isinstance(param, core.Jaxpr):
        return False
    return any(
        eqn.primitive is lax.conv_general_dilated_p
        or any(
            any(map(_convolves, value)) if isinstance(value, tuple) else _convolves(value)
            for value in eqn.params.values()
        )
        for eqn in param.eqns
    )


def _convolve(
    x: jax.Array, kernel: jax.Array, *, dimension_numbers: lax.ConvDimensionNumbers, **params: Any
) -> jax.Array:
    """Convolve in the fast layout: transpose the operands into it, and the result back."""
    (batch, channel, *places), (out, into, *taps), result = dimension_numbers
    last = x.ndim - 1
    middle = tuple(range(1, last))
    fast = lax.ConvDimensionNumbers(
        (0, last, *middle), (last, last - 1, *range(last - 1)), (0, last, *middle)
    )
    y = lax.conv_general_dilated_p.bind(
        lax.transpose(x, (batch, *places, channel)),
        lax.transpose(kernel, (*taps, into, out)),
        dimension_numbers=fast,
        **params,
    )
    # Axis result[0] of what is asked for is batch, result[1] is channel, the others are places.
    order = sorted(range(last + 1), key=lambda axis: (result[0], *result[2:], result[1])[axis])
    return lax.transpose(y, order)
