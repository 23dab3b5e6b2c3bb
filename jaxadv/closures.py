"""Functions as cache keys of compiled programs, by the values of the arrays that they capture.

JAX caches one program per function object. Arrays that the function doesn't get as arguments (from
a bound method's object, a closure, a global) are constants of that program. If they change later,
as the weights of a `flax.nnx` module do in training, JAX still sees the same function, and the
cached program computes with the old values.

`keyed` traces the net each time it is passed. Two of its results compare equal only if the net's
program and captured arrays are the same; otherwise JAX compiles again. Where the net has derivative
rules of its own (`jax.custom_vjp` or `jax.custom_jvp`), these belong to the program. `digest`
identifies a net in the same way for evaluations that are stored.
"""

from __future__ import annotations

import hashlib
import inspect
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, count
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxadv import host, inputs
from jaxadv.types import Params

__all__ = ["digest", "hashable", "keyed", "method", "preset", "source_net", "without_presets"]

_ARRAYS = jax.Array | np.ndarray | np.generic | complex | float | int  # that jit accepts
# JAX prints only the names of derivative rules. That of jax.nn.relu, which is jitted, is known.
_RULE = re.compile(
    r"custom_vjp_call|custom_jvp_call(?!\[\s*name=relu\s+call_jaxpr=\{[^=]*= p?jit\[\s*name=relu\b)"
)
_TRACED = count()


@dataclass(frozen=True)
class _Keyed:
    """A function that equals another only if their digests are equal too."""

    function: Any
    digest: str

    def __call__(self, *args: Any) -> Any:
        return self.function(*args)


def hashable(name: str, function: Any) -> None:
    """Check that JAX can cache a compiled program for a function.

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
            "function that takes the net's arrays as params; with equinox: params, static = "
            "eqx.partition(net, eqx.is_inexact_array), and eqx.combine(params, static) inside it"
        ) from error


def method(name: str, perturb_fn: Any) -> None:
    """Check that a method is hashable and takes the arguments of `types.PerturbFn`.

    Raises:
      TypeError: if it isn't a function, has no hash, has another signature, is set to bounds of its
        own, or is targeted.
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
    without_presets(name, perturb_fn)


def without_presets(name: str, perturb_fn: Any) -> None:
    """Check that a method has no bounds of its own, and isn't targeted.

    Its caller passes bounds, which would replace them, and true labels.

    Raises:
      TypeError: if it has bounds or is targeted.
    """
    own = preset(perturb_fn, "bounds")
    if own is not None:
        raise TypeError(
            f"expected {name} without bounds of its own, got bounds={own}; leave them out, and "
            "pass them to the evaluation or the objective, which gives them to its attacks"
        )
    if preset(perturb_fn, "targeted"):
        raise TypeError(
            f"expected {name} to lead away from y, got targeted=True; leave it out, or call the "
            "attack with the targets as y and jaxadv.attack.with_info, which says where it succeeds"
        )


def preset(function: Any, name: str) -> Any:
    """Return what an argument is set to, by `partial` or by default; None if it isn't."""
    try:
        parameters = inspect.signature(function).parameters
    except ValueError:  # of a built-in function
        return None
    own = parameters[name].default if name in parameters else None
    return None if own is inspect.Parameter.empty else own


def source_net(source: Any, x: Any) -> tuple[Any, Params]:
    """Check that a source of perturbations is a net with its parameters; return it `keyed`.

    Raises:
      TypeError: if it isn't a pair, or as `keyed`.
    """
    if not isinstance(source, tuple | list) or len(source) != 2:
        raise TypeError(
            f"expected source=(apply_fn, params), got {type(source).__name__}; pass another net "
            "with its parameters, or None for the attacked net itself"
        )
    apply_fn, params = source
    return keyed(apply_fn, params, x), params


def keyed(apply_fn: Any, params: Params, x: Any, *, draws: bool | None = None) -> Any:
    """Wrap `apply_fn` so that it compares unequal once its captured arrays change.

    Args:
      apply_fn: `(params, x) -> logits`, or `(params, x, key) -> logits`.
      params: its first argument.
      x: `[B, ...]`, or a `jax.ShapeDtypeStruct` of it.
      draws: whether it takes a key; None to tell by its signature.

    Returns:
      A hashable function with the same arguments and results.

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
                f"{jax.tree_util.keystr(path)}; keep it out of params and in apply_fn; with "
                "equinox, use eqx.partition(net, eqx.is_inexact_array)"
            )
    keys = (jax.random.key(0),) if (_draws(apply_fn) if draws is None else draws) else ()

    def anew(*args: Any) -> Any:  # a new function each time: JAX reuses the trace of a known one
        return inputs.called(apply_fn, *args)

    def differentiated(params: Params, x: jax.Array, *keys: jax.Array) -> Any:
        logits, pull = jax.vjp(lambda v: anew(params, v, *keys), x)
        return logits, pull(logits)

    traced = jax.make_jaxpr(anew)(params, x, *keys)
    printed = str(traced)
    if _RULE.search(printed):
        with suppress(Exception):  # of a net without a derivative, and so without such rules
            traced = jax.make_jaxpr(differentiated)(params, x, *keys)
            printed = str(traced)
    constants = list(_constants(traced))
    if any(isinstance(constant, jax.core.Tracer) for constant in constants):
        # It captured the caller's tracers: no program is used beyond this trace.
        return _Keyed(apply_fn, f"traced {next(_TRACED)}")
    # No addresses; and no mesh, since JAX itself tells programs in the contexts of meshes apart.
    # Only the mesh goes: JAX prints a short call on one line, its arguments after the mesh.
    mesh = r"\s+ctx_mesh=\w+\((?:[^()]|\([^()]*\))*\)"
    text = re.sub(rf"0x[0-9a-f]+|{mesh}", "", printed)
    checksum = hashlib.sha256(text.encode())
    for array in host.fetch(constants):
        checksum.update(f"{array.dtype}{array.shape}".encode() + array.tobytes())
    return _Keyed(apply_fn, checksum.hexdigest())


def digest(apply_fn: Any, params: Params, x: jax.Array | np.ndarray) -> str:
    """Identify a net by its program and the arrays that it captures.

    Args:
      apply_fn: the net, perhaps `keyed` already.
      params: its first argument.
      x: the examples, `[n, ...]`.

    Returns:
      A text. It is the same in each process with the same version of JAX, for any n, and for any
      number of devices that divides 64.
    """
    # A batch of fixed size, which the devices divide, since nets may name shardings.
    some = jax.ShapeDtypeStruct((host.spread(x).multiple(64), *x.shape[1:]), x.dtype)
    net = keyed(apply_fn.function if isinstance(apply_fn, _Keyed) else apply_fn, params, some)
    return str(net.digest)


def _draws(apply_fn: Any) -> bool:
    """Return whether a net also takes a key."""
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
    """Yield the constant arrays in a jaxpr, at any depth; keys as their raw data.

    Jaxprs are recognised by their attributes, since their classes differ between versions of JAX.
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
