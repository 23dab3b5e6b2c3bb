"""Evaluate a jaxpr with its convolutions replaced, including those in nested jaxprs.

Jaxprs are recognised by their attributes, not by their classes, which differ between versions of
JAX: before jax 0.12 an open jaxpr has no `consts`; since then every jaxpr is closed.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import Any

import jax
from jax import lax

from jaxadv._cpu import _convolutions

__all__ = ["evaluate"]


def evaluate(jaxpr: Any, *args: Any) -> list[Any]:
    """Evaluate a jaxpr, with `_convolutions.convolve` in place of its convolutions."""
    consts = getattr(jaxpr, "consts", ())
    values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True))

    def read(atom: Any) -> Any:
        return atom.val if hasattr(atom, "val") else values[atom]

    for eqn in jaxpr.eqns:
        operands = [read(atom) for atom in eqn.invars]
        scope = str(eqn.source_info.name_stack)
        with eqn.ctx.manager, jax.named_scope(scope) if scope else nullcontext():
            if _is_convolution(eqn):
                x, kernel = operands
                shape = eqn.outvars[0].aval.shape
                results = [_convolutions.convolve(x, kernel, shape, **eqn.params)]
            else:
                params = eqn.params
                if eqn.primitive.name != "shard_map":  # its axis names are bound only inside
                    params = {name: _rewrite(value) for name, value in params.items()}
                bound = eqn.primitive.get_bind_params(params)
                # Before jax 0.9, this also returns the functions that the primitive calls.
                called, params = bound if isinstance(bound, tuple) else ((), bound)
                result = eqn.primitive.bind(*called, *operands, **params)
                results = result if eqn.primitive.multiple_results else [result]
        values.update(zip(eqn.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _rewrite(param: Any) -> Any:
    """Rewrite an equation's parameter if it is a jaxpr with a convolution, or a tuple with one."""
    if not _convolves(param):
        return param
    if isinstance(param, tuple):
        return tuple(map(_rewrite, param))
    new = jax.make_jaxpr(partial(evaluate, param))(*(v.aval for v in param.invars))
    return new if hasattr(param, "consts") else new.jaxpr


def _convolves(param: Any) -> bool:
    """Return whether a parameter is, or as a tuple has, a jaxpr with a convolution at any depth."""
    if isinstance(param, tuple):
        return any(map(_convolves, param))
    return any(
        _is_convolution(eqn) or any(map(_convolves, eqn.params.values()))
        for eqn in getattr(param, "eqns", ())
    )


def _is_convolution(eqn: Any) -> bool:
    """Return whether an equation is a convolution to replace; those of empty arrays aren't."""
    is_one = eqn.primitive is lax.conv_general_dilated_p and _convolutions.FAST_LAYOUT
    return is_one and all(atom.aval.size for atom in (*eqn.invars, *eqn.outvars))
