"""Convolutions in the forms that XLA's CPU backend runs fast.

XLA has two fast kernels, Eigen's and YNNPACK's, both for one layout only. It prefers YNNPACK's,
which is slower for narrow convolutions (it runs them on a single core) and for weight gradients.
YNNPACK doesn't take convolutions whose result or kernel is larger than the image, so adding a few
rows selects Eigen's kernel.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

__all__ = ["convolve"]

# The settings, with the speed-up of each in a `scan`, measured for 3x3 convolutions of 64 images,
# 28x28x32 to 7x7x256, with jax 0.10.2 on one of 2 virtual cores unless stated. `tests/test_cpu.py`
# tests whether XLA still needs each; False or 0 switches it off.

# Transpose into the fast layout: image gradients 8 to 65 times faster, weight gradients 43 to 165.
# False also switches off everything below.
FAST_LAYOUT = True
# Add rows to the result, at most this fraction of its rows: 1.7 to 1.9 times faster on both cores
# up to 64 channels, no faster on one core.
RESULT_ROWS = 0.25
# Add rows to the kernel of a weight gradient, at most this fraction of its rows: 1.4 to 1.9 times
# faster than YNNPACK's kernel, and 1.3 to 1.7 times faster than patches.
KERNEL_ROWS = 0.25
# Compute other weight gradients (those with strides) as matrix products with patches, one for each
# of the kernel's taps: 1.3 to 1.6 times faster, 1x1 kernels 3 times. More taps than this compile
# slowly.
PATCH_PLACES = 64
# Bytes of patches at a time, to fit into a cache: 30 MB is 1.3 times slower, 3 MB 1.2 times faster.
# It sets the order of summation, so results change with it, by rounding error.
PATCH_BYTES = 10_000_000


def convolve(
    x: jax.Array,
    kernel: jax.Array,
    shape: tuple[int, ...],
    *,
    dimension_numbers: lax.ConvDimensionNumbers,
    **params: Any,
) -> jax.Array:
    """Convolve as `lax.conv_general_dilated_p` does with these parameters, but faster on CPU.

    Args:
      x: images, in any layout.
      kernel: the kernel, in any layout.
      shape: the shape of the result.
      dimension_numbers: the layouts of x, of the kernel and of the result.
      **params: the other parameters of `lax.conv_general_dilated_p`.
    """
    (batch, feature, *space), (out, into, *taps), result = dimension_numbers
    x = lax.transpose(x, (batch, *space, feature))
    kernel = lax.transpose(kernel, (*taps, into, out))
    y = _convolve(x, kernel, tuple(shape[axis] for axis in result[2:]), params)
    order = (result[0], *result[2:], result[1])  # for each axis of y, its axis in the result
    return lax.transpose(y, sorted(range(y.ndim), key=order.__getitem__))


def _convolve(
    x: jax.Array, kernel: jax.Array, size: tuple[int, ...], params: dict[str, Any]
) -> jax.Array:
    """Convolve images `[N, H, W, C]` and a kernel `[H, W, I, O]`; the result is `[N, *size, O]`.

    There may be any number of spatial axes in place of H and W.
    """
    (low, high), *padding = params["padding"]
    if math.prod(kernel.shape[:-2]) <= math.prod(size):
        high += _missing_rows(x, size[0], RESULT_ROWS, params)
    elif rows := _missing_kernel_rows(x, kernel, params):
        kernel = jnp.pad(kernel, ((0, rows), (0, 0), (0, 0), (0, 0)))
        high += rows * params["rhs_dilation"][0]
        if any(padding[0]):  # the kernel may exceed the unpadded image, and XLA swap the operands
            x = jnp.pad(x, ((0, 0), (0, 0), padding[0], (0, 0)))
            x, padding = lax.optimization_barrier(x), [(0, 0)]
    elif _takes_patches(x, size, params):
        return _by_patches(x, kernel, size, params)
    last = x.ndim - 1
    images = (0, last, *range(1, last))
    numbers = lax.ConvDimensionNumbers(images, (last, last - 1, *range(last - 1)), images)
    params = params | {"padding": ((low, high), *padding), "dimension_numbers": numbers}
    y = lax.conv_general_dilated_p.bind(x, kernel, **params)
    return lax.slice_in_dim(y, 0, size[0], axis=1)


def _missing_rows(x: jax.Array, rows: int, most: float, params: dict[str, Any]) -> int:
    """Return how many rows to add to exceed those of the image, or 0 if that is too many."""
    # Depthwise convolutions are slower in Eigen's kernel: 149 ms instead of 100 at 28x28x64.
    depthwise = params["feature_group_count"] == x.shape[-1] > 1
    # Also false unless there are two spatial axes.
    plain = params["window_strides"] == params["lhs_dilation"] == (1, 1)
    if depthwise or not plain or params["batch_group_count"] > 1:
        return 0
    missing = x.shape[1] - rows + 1
    return missing if 0 < missing <= most * rows else 0


def _missing_kernel_rows(x: jax.Array, kernel: jax.Array, params: dict[str, Any]) -> int:
    """Return how many rows to add to a kernel, or 0 if it would become larger than the image."""
    rows = _missing_rows(x, kernel.shape[0], KERNEL_ROWS, params)
    if not rows:
        return 0
    left, right = params["padding"][1]
    fits = (kernel.shape[0] + rows) * kernel.shape[1] <= x.shape[1] * (x.shape[2] + left + right)
    return rows if fits and min(left, right) >= 0 else 0


def _takes_patches(x: jax.Array, size: tuple[int, ...], params: dict[str, Any]) -> bool:
    """Return whether `_by_patches` supports the convolution, and compiles in reasonable time."""
    grouped = max(params["feature_group_count"], params["batch_group_count"]) > 1
    sharded = jax.device_count() > 1  # an array on several devices can't be split into parts
    is_float = jnp.issubdtype(x.dtype, jnp.floating)
    return math.prod(size) <= PATCH_PLACES and is_float and not grouped and not sharded


def _by_patches(
    x: jax.Array, kernel: jax.Array, size: tuple[int, ...], params: dict[str, Any]
) -> jax.Array:
    """Convolve by matrix products of kernel and patches of x, summed over parts of the channels."""
    strides, dilation = params["window_strides"], params["rhs_dilation"]
    dtype = params["preferred_element_type"] or x.dtype
    sum_dtype = jnp.promote_types(dtype, jnp.float32)
    x = jnp.swapaxes(x, 0, -1)  # [C, H, W, N]
    kernel = jnp.moveaxis(kernel, -2, 0)  # [C, H, W, O]
    n, taps, features = x.shape[-1], kernel.shape[1:-1], kernel.shape[-1]
    extents = [(tap - 1) * by + 1 for tap, by in zip(taps, dilation, strict=True)]
    edges = [
        (*pad, by - 1) for pad, by in zip(params["padding"], params["lhs_dilation"], strict=True)
    ]
    x = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *edges, (0, 0, 0)])

    def patches(x: jax.Array) -> jax.Array:
        found = []
        for place in itertools.product(*map(range, size)):
            first = [i * stride for i, stride in zip(place, strides, strict=True)]
            stop = [i + extent for i, extent in zip(first, extents, strict=True)]
            patch = lax.slice(x, (0, *first, 0), (len(x), *stop, n), (1, *dilation, 1))
            found.append(patch.reshape(-1, n))
        return jnp.concatenate(found, axis=1)

    def add(total: jax.Array, part: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        x, kernel = part
        product = lax.dot_general(
            kernel.reshape(-1, features),
            patches(x),
            dimension_numbers=(((0,), (0,)), ((), ())),
            precision=params["precision"] and params["precision"][::-1],
            preferred_element_type=sum_dtype,
        )
        return total + product, None

    channels = _part(len(x), math.prod((*taps, *size)) * n * x.dtype.itemsize)

    def split(array: jax.Array) -> jax.Array:  # zeros fill the last part
        fill = [(0, -len(array) % channels)] + [(0, 0)] * (array.ndim - 1)
        return jnp.pad(array, fill).reshape(-1, channels, *array.shape[1:])

    # Like x: in a `shard_map`, the scan's carry has to vary over the same mesh axes throughout.
    zeros = jnp.zeros_like(x, sum_dtype, (features, math.prod(size) * n))
    total, _ = lax.scan(add, zeros, (split(x), split(kernel)))
    return jnp.swapaxes(total.reshape(features, *size, n), 0, -1).astype(dtype)


def _part(channels: int, size: int) -> int:
    """Return the number of channels in a part, given the bytes of patches for each."""
    most = max(PATCH_BYTES // max(size, 1), 1)
    parts = -(-channels // most)
    return -(-channels // parts)
