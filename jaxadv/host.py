"""Loops over a data set on the host: arguments are checked once, all batches have one shape.

The functions that take a whole data set are the only ones that can't run under `jit`, `vmap` or
`grad`. An example's result doesn't depend on its batch, since it has its own eps and key.

If the examples `x` are sharded over several devices (`jax.sharding.NamedSharding` of their first
axis), so is each batch; Explicit mesh axes are converted to Auto axes (`meshes`). With several
processes, all must pass the same data set, and all get the results of all examples.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from operator import itemgetter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from jaxadv import inputs
from jaxadv.types import Bounds, Eps

__all__ = [
    "Spread",
    "arrays",
    "fetch",
    "in_bounds",
    "one_batch",
    "outside",
    "over_batches",
    "per_example",
    "spread",
]


class Spread(NamedTuple):
    """How batches are sharded over devices.

    Attributes:
      sharding: the sharding of a batch's first axis; None for the default device.
      devices: number of devices that hold the examples; batch sizes are multiples of it.
    """

    sharding: NamedSharding | None
    devices: int

    def multiple(self, size: int) -> int:
        """Round a batch size up to a multiple of the number of devices."""
        return -(-size // self.devices) * self.devices

    def take(self, arrays: tuple[Any, ...], rows: Any) -> list[Any]:
        """Return these rows of each array that isn't None, sharded as a batch."""
        taken = [None if a is None else a[rows] for a in arrays]
        if self.sharding is None:
            return taken
        # Not device_put, which with several processes doesn't support keys.
        return jax.jit(_same, out_shardings=self.sharding)(taken)


def _same(tree: Any) -> Any:
    return tree


def spread(x: Any) -> Spread:
    """Return the sharding for batches of these examples, the same as that of the examples."""
    sharding = getattr(x, "sharding", None)
    if not isinstance(sharding, NamedSharding) or not any(sharding.spec[:1]):
        return Spread(None, 1)
    axes = sharding.spec[0]
    first = NamedSharding(sharding.mesh, PartitionSpec(axes))
    axes = axes if isinstance(axes, tuple) else (axes,)
    return Spread(first, math.prod(sharding.mesh.shape[axis] for axis in axes))


def fetch(tree: Any) -> Any:
    """Copy arrays to the host, including the parts that other processes hold."""

    def one(leaf: Any) -> Any:
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            return multihost_utils.process_allgather(leaf, tiled=True)
        return np.asarray(leaf)

    return jax.tree.map(one, tree)


def arrays(name: str, x: Any, y: Any, others: Any) -> tuple[Any, Any]:
    """Check that nothing is traced, and that `x` and `y` are examples with their labels.

    Returns:
      Both, where they are; labels beyond int32 are clipped, as `inputs.labels` does.

    Raises:
      TypeError: under a trace; if `x` is not floating point or `y` not integers.
      ValueError: if `x` isn't a batch, `y` isn't `[n]`, or their lengths differ.
    """
    # Under jit even a constant becomes a tracer.
    if any(isinstance(a, jax.core.Tracer) for a in jax.tree.leaves((x, y, others, jnp.zeros(())))):
        raise TypeError(
            f"expected arrays, got a tracer: {name} loops over a data set on the host; "
            "under jit, vmap or grad use evaluate.measure on a batch"
        )
    x, y = inputs.native(x), inputs.native(y)
    inputs.are_examples(x)
    inputs.labels(y, len(x))
    return x, inputs.as_classes(y)


def in_bounds(bounds: Bounds | None, x: Any) -> None:
    """Check bounds, and that the data set lies within them.

    Raises:
      ValueError: if they aren't a pair of the right shape and order, or if x exceeds them by more
        than rounding error.
    """
    stray = "" if bounds is None else outside(bounds, x)
    if stray:
        raise ValueError(
            f"expected x within bounds, got {stray}; scale the examples, and give eps in the same "
            "units, or pass their actual bounds"
        )


def outside(bounds: Bounds, x: Any) -> str:
    """Describe a value that exceeds the bounds by more than rounding error; "" if there is none.

    A pixel that is NaN in one example is not checked in the others.

    Raises:
      ValueError: if the bounds aren't a pair of the right shape and order.
    """
    dtype = jax.dtypes.canonicalize_dtype(x.dtype)  # as the net sees them
    lo, hi = (
        np.asarray(bound)[0]
        for bound in inputs.box(fetch(bounds), jnp.zeros((1, *x.shape[1:]), dtype))
    )
    if not len(x):
        return ""
    least, greatest = (np.asarray(extreme, lo.dtype) for extreme in (x.min(0), x.max(0)))
    for extreme, bound, sign, which in ((least, lo, -1, "least"), (greatest, hi, 1, "most")):
        # After standardisation in this dtype, a white pixel may be a few ulps off its bound.
        size = np.maximum(np.abs(extreme), np.abs(bound))
        rounding = np.where(np.isfinite(size), 8 * float(jnp.finfo(dtype).eps) * size, 0)
        with np.errstate(invalid="ignore"):  # inf - inf; NaN is never beyond
            beyond = sign * (extreme - bound) - rounding
        if np.any(beyond > 0):
            worst = np.nanargmax(beyond)
            return f"{extreme.flat[worst]:g} where at {which} {bound.flat[worst]:g} is allowed"
    return ""


def per_example(x: Any, eps: Eps | None, key: jax.Array | None) -> tuple[Any, jax.Array | None]:
    """Return each example's eps and key, so that its result doesn't depend on its batch.

    Raises:
      As `inputs.radius` and `inputs.keys`. The values of JAX arrays are known here, and checked as
      those of NumPy arrays are.
    """
    if isinstance(eps, jax.Array):
        eps = fetch(eps)
    sizes = None if eps is None else inputs.radius(eps, x)
    return sizes, None if key is None else inputs.keys(key, len(x), "")


def one_batch(x: Any, batch_size: int) -> jax.ShapeDtypeStruct:
    """Return the shape and dtype of the batches that `over_batches` makes from these examples.

    Raises:
      TypeError: if `batch_size` isn't an integer.
      ValueError: if `batch_size` < 1.
    """
    inputs.at_least(1, "batch_size", batch_size, "500 suits most machines")
    size = spread(x).multiple(max(1, min(batch_size, len(x))))
    return jax.ShapeDtypeStruct((size, *x.shape[1:]), jax.dtypes.canonicalize_dtype(x.dtype))


def over_batches(fn: Callable[..., Any], arrays: tuple[Any, ...], batch_size: int) -> Any:
    """Apply a compiled function to batches of one shape, and concatenate the results.

    The last batch is padded with copies of the last example, whose results are dropped, so the
    function is compiled for one shape only.
    """
    n = len(arrays[0])
    on = spread(arrays[0])
    size = one_batch(arrays[0], batch_size).shape[0]
    starts = range(0, max(n, 1), size)
    parts = []
    for start in starts:
        rows = np.minimum(np.arange(start, start + size), n - 1) if n else np.arange(0)
        parts.append(fn(*on.take(arrays, rows)))
    cut = [
        jax.tree.map(itemgetter(slice(n - start)), part)
        for start, part in zip(starts, fetch(parts), strict=True)
    ]
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *cut)
