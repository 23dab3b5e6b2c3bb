"""Bodies of loops that keep a net's convolutions fast on CPU.

XLA's CPU backend has fast programs for convolutions of one layout alone: examples first, channels
last, kernels as height, width, input, output. It brings every other convolution into that layout,
but looks for them in a program's main computation and not in the bodies of its loops. The
convolutions that differentiation makes of a convolution have other layouts. So the gradient of a
plain `flax.linen.Conv` runs up to fifty times slower in a `lax.scan`, `fori_loop` or `while_loop`
than outside; and an epoch, and an iterated attack, is such a loop.

There are two programs for that layout. Newer versions of XLA prefer one that leaves narrow
convolutions to a single core, and that takes longer than the other for the gradient of a
convolution's weights, in loops and outside. But they have it for no convolution whose result, or
whose kernel, has more rows than its image: so those that lack a few are given them. With strides
the gradient of the weights lacks too many; it is faster as a sum of matrix products, each of a few
examples, whose patches fit into a cache.

`fast_convolutions` does what XLA leaves out. Every loop of this library over a net is written with
it (`train.make_epoch`, all of `attack`), and so is `train.make_step`.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial, wraps
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
from jax import lax

__all__ = ["fast_convolutions"]

F = TypeVar("F", bound=Callable[..., Any])

_PATCHES = 10_000_000  # bytes, which a cache may hold; measured to be the best
_PLACES = 64
_MORE = 0.25  # of the rows there are: to add so many takes less time than it saves


def fast_convolutions(function: F) -> F:
    """Put a loop's body in the form that XLA runs fast on CPU; on other backends, it is unchanged.

    The function is traced, and each convolution in it, the gradients' included, is made on
    transposed operands where its layout isn't the fast one, and with more rows where that pays; the
    gradient of weights with strides, on one device, by matrix products. The results are the same
    but for rounding. What is in a `jax.shard_map` stays as it is.

    JAX may change how it represents a traced function from one version to the next. A version that
    this module cannot read runs the function unchanged, and a `RuntimeWarning` says so.

    Args:
      function: what `lax.scan`, `fori_loop`, `while_loop` or `map` takes as a body, or any other of
        arrays, a training step say.

    Returns:
      A function of the same arguments and results.

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
            results = _evaluate(jaxpr, *jax.tree.leaves((args, kwargs)))
        except Exception as error:
            unchanged = function(*args, **kwargs)  # which raises what is the function's own error
            # At one place and with one text, which Python's default filter shows once.
            warnings.warn(
                f"jaxadv cannot read functions traced by jax {jax.__version__} "
                f"({type(error).__name__}: {error}), and leaves them unchanged: results are right, "
                "but convolutions in loops may be slow on CPU. Update jaxadv, or install a version "
                "of jax that it is tested with.",
                RuntimeWarning,
                stacklevel=1,
            )
            return unchanged
        return jax.tree.unflatten(jax.tree.structure(shape), results)

    return cast(F, fast)


# Jaxprs are known by the attributes read here, not by their classes: those have changed between
# versions of JAX. An open one has no `consts`, and since jax 0.12 every one is closed.


def _evaluate(jaxpr: Any, *args: Any) -> list[Any]:
    """Evaluate a jaxpr, all its convolutions in the fast layout."""
    consts = getattr(jaxpr, "consts", ())
    values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True))

    def read(atom: Any) -> Any:
        return atom.val if hasattr(atom, "val") else values[atom]

    for eqn in jaxpr.eqns:
        operands = [read(atom) for atom in eqn.invars]
        scope = str(eqn.source_info.name_stack)
        with eqn.ctx.manager, jax.named_scope(scope) if scope else nullcontext():
            if _is_convolution(eqn):
                (result,) = eqn.outvars
                results = [_convolve(operands[0], operands[1], result.aval.shape, **eqn.params)]
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
    if not _convolves(param):
        return param
    if isinstance(param, tuple):
        return tuple(map(_canonical, param))
    new = jax.make_jaxpr(partial(_evaluate, param))(*(v.aval for v in param.invars))
    return new if hasattr(param, "consts") else new.jaxpr


def _convolves(param: Any) -> bool:
    """Say whether a parameter is a jaxpr with a convolution anywhere in it, or a tuple with one."""
    if isinstance(param, tuple):
        return any(map(_convolves, param))
    return any(
        _is_convolution(eqn) or any(map(_convolves, eqn.params.values()))
        for eqn in getattr(param, "eqns", ())
    )


def _is_convolution(eqn: Any) -> bool:
    """Say whether an equation convolves; one with nothing to add up is none, and stays."""
    is_one = eqn.primitive is lax.conv_general_dilated_p
    return is_one and all(atom.aval.size for atom in (*eqn.invars, *eqn.outvars))


def _convolve(
    x: jax.Array,
    kernel: jax.Array,
    shape: tuple[int, ...],
    *,
    dimension_numbers: lax.ConvDimensionNumbers,
    **params: Any,
) -> jax.Array:
    """Convolve to a result of this shape: in the fast layout, or as a sum of matrix products.

    The latter where the kernel is larger than the result, as an image is for the gradient of the
    weights, with examples for channels, and no few rows would make it larger than the image, as
    none do with strides. But not for a result of many places, each of which takes a product of its
    own to be compiled.
    """
    (_, channel, *places), (_, _, *taps), (_, _, *ends) = dimension_numbers
    image = [x.shape[axis] for axis in places]
    sizes = [kernel.shape[axis] for axis in taps]
    counts = [shape[axis] for axis in ends]
    rows = _rows_to_add(image, sizes, counts, params)
    # Of channels by themselves each, the program that more rows lead to is the slower one.
    if params["batch_group_count"] > 1 or params["feature_group_count"] == x.shape[channel] > 1:
        rows = 0, 0
    grouped = max(params["feature_group_count"], params["batch_group_count"]) > 1
    # Examples that several devices share can't be taken in turn.
    whole = grouped or jax.device_count() > 1
    few = math.prod(sizes) > math.prod(counts) <= _PLACES
    if any(rows) or not few or whole or not jnp.issubdtype(x.dtype, jnp.floating):
        return _in_fast_layout(x, kernel, counts[0], rows, dimension_numbers, params)
    return _by_patches(x, kernel, shape, dimension_numbers, params)


def _rows_to_add(
    image: Sequence[int], sizes: Sequence[int], counts: Sequence[int], params: dict[str, Any]
) -> tuple[int, int]:
    """Say by how many rows to enlarge a convolution's result, and its kernel: past the image's.

    Args:
      image: rows and columns, or however many axes there are.
      sizes: of the kernel, likewise.
      counts: of the result, likewise.
      params: of the convolution.
    """
    if len(image) != 2:
        return 0, 0
    plain = params["window_strides"] == params["lhs_dilation"] == (1, 1)
    if math.prod(sizes) <= math.prod(counts):
        more = image[0] - counts[0] + 1
        return (more, 0) if plain and 0 < more <= counts[0] * _MORE else (0, 0)
    more = image[0] - sizes[0] + 1
    # Of a kernel larger than all of the image, XLA makes the image.
    wide = image[1] + sum(params["padding"][1])
    fits = (sizes[0] + more) * sizes[1] <= image[0] * wide and min(params["padding"][1]) >= 0
    return (0, more) if plain and fits and 0 < more <= sizes[0] * _MORE else (0, 0)


def _by_patches(
    x: jax.Array,
    kernel: jax.Array,
    shape: tuple[int, ...],
    dimension_numbers: lax.ConvDimensionNumbers,
    params: dict[str, Any],
) -> jax.Array:
    """Lay out the patches that the kernel meets, of some channels at a time, and multiply."""
    (batch, channel, *places), (out, into, *taps), result = dimension_numbers
    x = lax.transpose(x, (channel, *places, batch))
    kernel = lax.transpose(kernel, (into, *taps, out))
    edges = (
        (*pad, by - 1) for pad, by in zip(params["padding"], params["lhs_dilation"], strict=True)
    )
    x = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *edges, (0, 0, 0)])
    sizes, counts = kernel.shape[1:-1], tuple(shape[axis] for axis in result[2:])
    dilation, strides = params["rhs_dilation"], params["window_strides"]

    def patches(x: jax.Array) -> jax.Array:
        found = []
        for place in itertools.product(*map(range, counts)):
            first = [i * stride for i, stride in zip(place, strides, strict=True)]
            last = [i + (size - 1) * by for i, size, by in zip(first, sizes, dilation, strict=True)]
            met = lax.slice(
                x, (0, *first, 0), (len(x), *(i + 1 for i in last), x.shape[-1]), (1, *dilation, 1)
            )
            found.append(met.reshape(-1, x.shape[-1]))
        return jnp.concatenate(found, axis=1)

    dtype = params["preferred_element_type"] or x.dtype
    wide = jnp.promote_types(dtype, jnp.float32)
    product = partial(
        lax.dot_general,
        dimension_numbers=(((0,), (0,)), ((), ())),
        precision=params["precision"] and params["precision"][::-1],
        preferred_element_type=wide,
    )

    def add(total: jax.Array, parts: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        x, kernel = parts
        return total + product(kernel.reshape(-1, kernel.shape[-1]), patches(x)), None

    n = _part(len(x), math.prod((*sizes, *counts)) * x.shape[-1] * x.dtype.itemsize)
    # The last part is filled up with zeros, which add nothing.
    x, kernel = (
        jnp.pad(a, ((0, -len(a) % n), *((0, 0) for _ in a.shape[1:]))) for a in (x, kernel)
    )
    # Like x, or in a `shard_map` the loop's carry would differ from what it becomes.
    none = jnp.zeros_like(x, wide, (kernel.shape[-1], math.prod(counts) * x.shape[-1]))
    x_parts, kernel_parts = (a.reshape(-1, n, *a.shape[1:]) for a in (x, kernel))
    total, _ = lax.scan(add, none, (x_parts, kernel_parts))
    y = total.reshape(kernel.shape[-1], *counts, x.shape[-1])
    order = result[1], *result[2:], result[0]  # of the result's axes, where y has each
    return lax.transpose(y, sorted(range(y.ndim), key=order.__getitem__)).astype(dtype)


def _part(channels: int, size: int) -> int:
    """Say of how many channels, of this many bytes of patches each, a part is made."""
    most = max(_PATCHES // max(size, 1), 1)
    parts = -(-channels // most)
    return -(-channels // parts)


def _in_fast_layout(
    x: jax.Array,
    kernel: jax.Array,
    count: int,
    rows: tuple[int, int],
    dimension_numbers: lax.ConvDimensionNumbers,
    params: dict[str, Any],
) -> jax.Array:
    """Transpose the operands into the fast layout, add rows, and bring the result back.

    Args:
      x: the images.
      kernel: the kernel.
      count: how many rows the result has.
      rows: how many to add to the result, of which they are cut off again, and to the kernel.
      dimension_numbers: of the convolution.
      params: its other parameters.
    """
    (batch, channel, *places), (out, into, *taps), result = dimension_numbers
    last = x.ndim - 1
    middle = tuple(range(1, last))
    fast = lax.ConvDimensionNumbers(
        (0, last, *middle), (last, last - 1, *range(last - 1)), (0, last, *middle)
    )
    x = lax.transpose(x, (batch, *places, channel))
    kernel = lax.transpose(kernel, (*taps, into, out))
    taller, longer = rows
    (low, high), *padding = params["padding"]
    if longer:
        kernel = jnp.pad(kernel, ((0, longer), (0, 0), (0, 0), (0, 0)))
    if longer and any(padding[0]):  # or the kernel may be larger than the image
        x = jnp.pad(x, ((0, 0), (0, 0), padding[0], (0, 0)))
        x, padding = lax.optimization_barrier(x), [(0, 0)]
    high += taller + longer * params["rhs_dilation"][0]
    y = lax.conv_general_dilated_p.bind(
        x, kernel, dimension_numbers=fast, **params | {"padding": ((low, high), *padding)}
    )
    y = lax.slice_in_dim(y, 0, count, axis=1)
    # Axis result[0] of what is asked for is batch, result[1] is channel, the others are places.
    order = sorted(range(last + 1), key=lambda axis: (result[0], *result[2:], result[1])[axis])
    return lax.transpose(y, order)
