"""Functions as keys of compiled programs: what a function has captured is part of the key.

JAX compiles a program for each function object and keeps it. The arrays that the function finds
anywhere but in its arguments (a bound method's object, a closure, a global) are constants of that
program. Where they change afterwards, as the weights of a `flax.nnx` module do under training, the
function is still the same to JAX, and the program answers with the old ones.

`keyed` looks at the net anew, by tracing it, whenever it is handed in. Its result compares equal
only as long as the net's program and captured arrays are the same, so that another program is
compiled for others.
"""

from __future__ import annotations

import hashlib
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxadv import host, inputs
from jaxadv.types import Params

__all__ = ["hashable", "keyed", "method", "pair"]


_ARRAYS = jax.Array | np.ndarray | np.generic | complex | float | int  # which jit takes


@dataclass(frozen=True)
class _Keyed:
    """A function that is equal to another only if their digests are, too."""

    function: Any
    digest: str

    def __call__(self, *args: Any) -> Any:
        return self.function(*args)


def hashable(name: str, function: Any) -> None:
    """Check that a program can be compiled and kept for a function.

    Raises:
      TypeError: if it isn't a function, or has no hash.
    """
    if not callable(function):
        raise TypeError(
            f"expected {name} to be a function, got {type(function).__name__}; "
            "see jaxadv.types for the signatures"
        )
    try:
        hash(function)
    except TypeError as error:
        raise TypeError(
            f"expected {name} to be hashable, got {type(function).__name__} ({error}); pass a "
            "function that takes the net's arrays as params, with equinox: params, static = "
            "eqx.partition(net, eqx.is_inexact_array), and eqx.combine(params, static) inside"
        ) from error


def method(name: str, perturb_fn: Any) -> None:
    """Check that a program can be compiled for a method, and that it takes what it will be given.

    Raises:
      TypeError: if it isn't a function, has no hash, or another signature.
    """
    hashable(name, perturb_fn)
    try:
        signature = inspect.signature(perturb_fn)
    except ValueError:  # of a built-in function
        return
    try:
        signature.bind(None, None, None, None, eps=None, key=None, bounds=None)
    except TypeError as error:
        raise TypeError(
            f"expected {name} to take (apply_fn, params, x, y, *, eps, key, bounds), got "
            f"{signature} ({error}); see jaxadv.types.PerturbFn"
        ) from error


def pair(source: Any) -> tuple[Any, Params]:
    """Check that a source of perturbations is a net with its parameters.

    Raises:
      TypeError: if it isn't a pair.
    """
    if not isinstance(source, tuple | list) or len(source) != 2:
        raise TypeError(
            f"expected source=(apply_fn, params), got {type(source).__name__}; pass the net with "
            "its parameters, or None for the net itself"
        )
    return source[0], source[1]


def keyed(apply_fn: Any, params: Params, x: Any) -> Any:
    """Return `apply_fn` as it is now: not equal to what it was with other captured arrays.

    Args:
      apply_fn: `(params, x) -> logits`, or `(params, x, key) -> logits`.
      params: its first argument.
      x: `[B, ...]`, or a `jax.ShapeDtypeStruct` of it.

    Returns:
      A hashable function of the same arguments and results.

    Raises:
      TypeError: if `apply_fn` isn't a function, or has no hash; if a leaf of params isn't an array.
    """
    if isinstance(apply_fn, _Keyed):
        return apply_fn
    hashable("apply_fn", apply_fn)
    for path, leaf in jax.tree.leaves_with_path(params):
        if not isinstance(leaf, _ARRAYS) and not hasattr(leaf, "__jax_array__"):
            raise TypeError(
                f"expected params of arrays, got {type(leaf).__name__} at "
                f"{jax.tree_util.keystr(path)}; keep it out of params, in apply_fn: with equinox "
                "by eqx.partition(net, eqx.is_inexact_array)"
            )
    draws = (jax.random.key(0),) if _draws(apply_fn) else ()

    def anew(*args: Any) -> Any:  # another function each time: of the same, JAX knows the trace
        return inputs.called(apply_fn, *args)

    traced = jax.make_jaxpr(anew)(params, x, *draws)
    constants = list(_constants(traced))
    if any(isinstance(constant, jax.core.Tracer) for constant in constants):
        return apply_fn  # a closure of the caller's trace, which ends with it
    digest = hashlib.sha256(re.sub("0x[0-9a-f]+", "", str(traced)).encode())  # but for addresses
    for array in host.fetch(constants):
        digest.update(f"{array.dtype}{array.shape}".encode() + array.tobytes())
    return _Keyed(apply_fn, digest.hexdigest())


def _draws(apply_fn: Any) -> bool:
    """Tell whether a net takes a key, too."""
    try:
        signature = inspect.signature(apply_fn)
    except ValueError:  # of a built-in function
        return False

    def takes(*args: None) -> bool:
        try:
            signature.bind(*args)
        except TypeError:
            return False
        return True

    return takes(None, None, None) and not takes(None, None)


def _constants(jaxpr: Any) -> Iterator[Any]:
    """Yield the arrays in a jaxpr, at any depth; keys as the numbers that they are.

    Jaxprs are known by their attributes, since their classes differ between versions of JAX.
    """
    for constant in getattr(jaxpr, "consts", ()):
        is_key = jnp.issubdtype(constant.dtype, jax.dtypes.prng_key)
        yield jax.random.key_data(constant) if is_key else constant
    for atom in chain(getattr(jaxpr, "jaxpr", jaxpr).outvars, *(eqn.invars for eqn in jaxpr.eqns)):
        if hasattr(atom, "val"):
            yield atom.val
    for value in chain(*(eqn.params.values() for eqn in jaxpr.eqns)):
        for part in value if isinstance(value, tuple) else (value,):
            if hasattr(part, "eqns"):
                yield from _constants(part)
