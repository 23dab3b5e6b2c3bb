r"""Gaussian noise on a grid, drawn with integer arithmetic, and its distance from exact noise.

The noise is an integer times h, a power of 2 between sigma / 4096 and sigma / 2048: the integer
nearest to :math:`\sigma Z / h`, from -32768 to 32767, so that the greatest \|z\| is at least 8. It
is drawn by Walker's alias method from 48 random bits. If x is rounded to multiples of h, its sum
with the noise is exact; for sigma <= 8, pixels that are multiples of 1/256 need no rounding. The
total variation distance to the exact distribution is computed from the table.

`certify` samples nets under this noise.
"""

from __future__ import annotations

import math
from functools import cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray
from scipy import special

from jaxadv import inputs, norms

__all__ = ["Table", "distance_to_grid", "noise", "on_grid", "table"]


def on_grid(x: jax.Array, step: float) -> jax.Array:
    """Round to multiples of the step, in float32 at least."""
    wide = x.astype(inputs.accum_dtype(x.dtype))
    return jnp.round(wide / step) * step


@partial(jax.jit, static_argnums=0)
def distance_to_grid(step: float, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return distances of examples to the grid, and whether sums with noise are exact, `[B]`."""
    wide = on_grid(x, step)
    largest = jnp.max(jnp.abs(wide), axis=tuple(range(1, x.ndim)))
    exact = ~(jnp.isfinite(largest) & (largest > 2**23 * step))
    # Rounded up: the norm of up to 2^24 entries is off by less.
    return norms.norm(x.astype(wide.dtype) - wide, "l2") * (1 + 1e-5), exact


class Table(NamedTuple):
    """Walker's alias table of a Gaussian rounded to integers, for 2^16 columns.

    Attributes:
      step: the grid's step, h.
      threshold: from this of 2^32 values on, a column stands for another integer.
      other: the column of that integer.
      off: total variation distance between the table's distribution and the exact one.
    """

    step: float
    threshold: NDArray[np.uint32]
    other: NDArray[np.int32]
    off: float


_COLUMNS, _MIDDLE = 2**16, 2**15


@cache
def table(sigma: float) -> Table:
    """Return the table for a standard deviation."""
    step = 2.0 ** math.floor(math.log2(sigma / 2048))
    edges = (np.arange(_COLUMNS + 1) - _MIDDLE - 0.5) * (step / sigma)
    # Differences are taken in the lower tail, where values are small, not near 1 and rounded.
    a, b = special.ndtr(edges), special.ndtr(-edges)
    exact = np.where(edges[1:] > 0, b[:-1] - b[1:], a[1:] - a[:-1])
    weight, share = exact / exact.sum() * _COLUMNS, np.ones(_COLUMNS)
    other = np.arange(_COLUMNS, dtype=np.int32)
    small, large = (list(np.flatnonzero(mask)) for mask in (weight < 1, weight >= 1))
    while small and large:
        column, giver = small.pop(), large[-1]
        share[column], other[column] = weight[column], giver
        weight[giver] -= 1 - weight[column]
        if weight[giver] < 1:
            small.append(large.pop())
    threshold = np.minimum(np.round(share * 2.0**32), 2**32 - 1).astype(np.uint32)
    own = threshold / 2.0**32 / _COLUMNS
    drawn = own + np.bincount(other, 1 / _COLUMNS - own, minlength=_COLUMNS)
    return Table(step, threshold, other, float(np.abs(drawn - exact).sum() + a[0] + b[-1]) / 2)


def noise(key: jax.Array, shape: tuple[int, ...], sigma: float) -> jax.Array:
    """Draw Gaussian noise, rounded to multiples of the table's step, in float32."""
    made = table(sigma)
    choose, compare = jax.random.split(key)
    column = jax.random.bits(choose, shape, jnp.uint16).astype(jnp.int32)
    keep = jax.random.bits(compare, shape, jnp.uint32) < jnp.asarray(made.threshold)[column]
    column = jnp.where(keep, column, jnp.asarray(made.other)[column])
    return (column - _MIDDLE).astype(jnp.float32) * jnp.float32(made.step)
