"""The networks of the paper's Section 7, and one for any image size, as flax modules in two parts.

Each has `encode` (the paper's N_rep) and `classify` (N_cla), and `__call__` composes the two, so
that the same parameters serve training on raw data and at the representation. Dropout is active
only if a module is applied with `train=True` and a `dropout` key; otherwise the net is
deterministic.

`mlp`, `lenet` and `vgg` return the paper's nets, `conv` the other one; each is a `Classifier`.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax
from jax.typing import ArrayLike

from experiments.lib import options
from jaxadv.types import ApplyFn, Params, TrainFn

_LARGE = 5
"""Kernels of at least this side, over few channels, are faster by windows than in XLA."""
_PART = 100
"""Batch size at which convolving by windows is fastest; larger ones don't fit into the cache."""


def init(net: nn.Module, key: jax.Array, x: ArrayLike) -> Params:
    """Return a module's initial parameters. Compiles once for equal modules."""
    return _init(net)(key, x)


@functools.cache
def _init(net: nn.Module) -> Callable[..., Params]:
    # This runs once, so it need not be fast: on CPU, optimising takes LLVM three times as long.
    options = {"xla_backend_optimization_level": 1} if jax.default_backend() == "cpu" else None
    return jax.jit(net.init, compiler_options=options)


@functools.cache
def function(net: nn.Module, method: str | None = None) -> ApplyFn:
    """Return a module, or one of its methods, as a deterministic `(params, x) -> output`.

    Equal modules get the same function object, so that they share compiled programs. A net that
    convolves by windows takes large batches in parts, whose windows fit into the cache.
    """

    def apply(params: Params, x: jax.Array, /) -> jax.Array:
        return cast(jax.Array, net.apply(params, x, method=method))

    def apply_in_parts(params: Params, x: jax.Array, /) -> jax.Array:
        # A batch that is spread over several devices can't be taken in parts.
        several = jax.device_count() > 1
        if x.shape[0] <= _PART or several or jax.default_backend() != "cpu":
            return apply(params, x)
        return lax.map(lambda example: apply(params, example[None])[0], x, batch_size=_PART)

    return apply_in_parts if isinstance(net, Classifier) and net.size >= _LARGE else apply


def train_function(net: nn.Module, method: str | None = None) -> TrainFn:
    """Return a module, or one of its methods, for training: with dropout, and without state."""

    def apply(params: Params, state: Any, x: jax.Array, key: jax.Array, /) -> tuple[jax.Array, Any]:
        dropped = net.apply(params, x, train=True, rngs={"dropout": key}, method=method)
        return cast(jax.Array, dropped), state

    return apply


class Conv(nn.Module):
    """A convolution of stride 1, in the form that suits the backend, initialised for ReLU.

    XLA's own convolution is fast when there are many channels. On CPU, a large kernel over few
    channels, such as LeNet's, takes half the time when written as one matrix product.

    Attributes:
      features: number of output channels.
      size: side of the kernel.
      padding: pixels of zeros on every side.
      dtype: dtype of the arithmetic; parameters are float32.
    """

    features: int
    size: int
    padding: int
    dtype: jnp.dtype = jnp.dtype("float32")

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return `[B, H', W', features]` of `[B, H, W, C]`."""
        shape = (self.size, self.size, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.he_normal(), shape)
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        x, kernel, bias = (a.astype(self.dtype) for a in (x, kernel, bias))
        few = self.size >= _LARGE and x.shape[-1] < 32  # as measured
        convolve = _by_windows if few and jax.default_backend() == "cpu" else _convolve
        return convolve(x, kernel, self.padding) + bias[None, None, None]


def _convolve(x: jax.Array, kernel: jax.Array, padding: int) -> jax.Array:
    pads = [(padding, padding)] * 2
    return lax.conv_general_dilated(
        x, kernel, (1, 1), pads, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def _by_windows(x: jax.Array, kernel: jax.Array, padding: int) -> jax.Array:
    """Convolve by one matrix product of flattened windows, each with the inputs of several outputs.

    Windows as wide as the kernel, for one output each, would repeat the input once for every entry
    of the kernel. That copying takes longer than multiplying by the zeros that wider windows need.
    """
    size, _, channels, features = kernel.shape
    x = jnp.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    batch, height, width = x.shape[0], x.shape[1] - size + 1, x.shape[2] - size + 1
    n = math.gcd(width, 4 if channels < 8 else 2)  # adjacent outputs per window
    wide = n + size - 1
    bands = jnp.stack(
        [x[:, :, i : i + wide].reshape(batch, -1, wide * channels) for i in range(0, width, n)], 2
    )
    windows = jnp.concatenate([bands[:, i : i + height] for i in range(size)], axis=-1)
    # For the i-th output of a window, the kernel is shifted by i pixels.
    ways = [jnp.pad(kernel, ((0, 0), (i, n - 1 - i), (0, 0), (0, 0))) for i in range(n)]
    out = windows @ jnp.stack(ways, axis=3).reshape(-1, n * features)
    return out.reshape(batch, height, width, features)


def _max_pool(x: jax.Array) -> jax.Array:
    """Return the maxima of 2x2 pixels. Unlike `nn.max_pool`, its gradient is fast on CPU."""
    x = x[:, : x.shape[1] // 2 * 2, : x.shape[2] // 2 * 2]  # drop an odd last row or column
    b, h, w, c = x.shape
    return x.reshape(b, h // 2, 2, w // 2, 2, c).max((2, 4))


class Classifier(nn.Module):
    """Blocks of convolutions, each followed by a 2x2 max pool, then dense layers, with ReLUs.

    Attributes:
      dense: sizes of the hidden dense layers.
      blocks: for each block, the numbers of channels of its convolutions.
      size: side of the convolution kernels.
      padding: pixels of zeros around the input of a convolution.
      classes: K.
      dropout: probability of dropping a unit of a hidden dense layer in training.
      split: how many blocks and hidden dense layers, counted together, belong to `encode`.
      dtype: dtype of the hidden layers' arithmetic; parameters and logits are float32.
      pooled: whether dense layers take the mean of each channel over the image, whatever its size,
        instead of all pixels.
    """

    dense: Sequence[int]
    blocks: Sequence[Sequence[int]] = ()
    size: int = 3
    padding: int = 1
    classes: int = 10
    dropout: float = 0.0
    split: int = 1
    dtype: jnp.dtype = jnp.dtype("float32")
    pooled: bool = False

    def setup(self) -> None:
        """Make the layers; flax calls this."""
        self.convs = [
            [Conv(features, self.size, self.padding, self.dtype) for features in block]
            for block in self.blocks
        ]
        self.hidden = [nn.Dense(width, dtype=self.dtype) for width in self.dense]
        self.logits = nn.Dense(self.classes)
        self.drop = nn.Dropout(self.dropout)

    def encode(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Return the representation of images `[B, ...]` after `split` stages.

        Raises:
          ValueError: if the images are too small for the pools.
        """
        least = 1
        for block in reversed(self.blocks):
            least = 2 * least + len(block) * (self.size - 1 - 2 * self.padding)
        if self.blocks and min(x.shape[1:3]) < least:
            raise options.UsageError(
                f"expected images of at least {least}x{least} pixels for {describe(self)}, got "
                f"{x.shape[1]}x{x.shape[2]}; choose larger ones, or a net without convolutions"
            )
        return self._stages(x, 0, self.split, train)

    def classify(self, h: jax.Array, *, train: bool = False) -> jax.Array:
        """Return logits `[B, K]` of a representation."""
        h = self._stages(h, self.split, len(self.blocks) + len(self.dense), train)
        return self.logits(h.reshape(h.shape[0], -1).astype(jnp.float32))

    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Return logits `[B, K]` of images `[B, ...]`."""
        return self.classify(self.encode(x, train=train), train=train)

    def _stages(self, h: jax.Array, first: int, last: int, train: bool) -> jax.Array:
        for stage in range(first, last):
            if stage < len(self.blocks):
                for conv in self.convs[stage][:-1]:
                    h = nn.relu(conv(h))
                h = nn.relu(_max_pool(self.convs[stage][-1](h)))  # relu on a quarter of the pixels
                if self.pooled and stage + 1 == len(self.blocks):
                    h = h.mean((1, 2))
            else:
                layer = self.hidden[stage - len(self.blocks)]
                h = nn.relu(layer(h.reshape(h.shape[0], -1)))
                h = self.drop(h, deterministic=not train)
        return h


def mlp(widths: Sequence[int], *, dropout: float = 0.0, split: int = 1) -> Classifier:
    """Return a net of Table 1, whose hidden layers are 100x100 to 500x500."""
    return Classifier(tuple(widths), dropout=dropout, split=split)


def lenet(widths: Sequence[int], *, dropout: float = 0.0, split: int = 2) -> Classifier:
    """Return the net of Table 2: 5x5 convolutions with 20 and 50 channels, then dense layers.

    Section 7.2 doesn't say where LWA_Rep splits it; here it is after the convolutions.
    """
    return Classifier(
        tuple(widths), blocks=((20,), (50,)), size=5, padding=0, dropout=dropout, split=split
    )


def vgg(
    widths: Sequence[int], *, width: float = 1.0, dropout: float = 0.0, split: int = 3
) -> Classifier:
    """Return the net of Table 3, with the sizes of all its layers multiplied by `width`.

    It has three 3x3 convolutions with 128 channels, three with 256, and two dense layers of 2048;
    as in the paper, the representation ends after the first dense layer.
    """
    narrow, wide, *dense = (max(1, round(n * width)) for n in (128, 256, *widths))
    return Classifier(
        tuple(dense), blocks=((narrow,) * 3, (wide,) * 3), dropout=dropout, split=split
    )


def conv(widths: Sequence[int] = ()) -> Classifier:
    """Return a small net for images of any size: 3x3 convolutions, then the mean per channel."""
    return Classifier(tuple(widths), blocks=((16, 16), (32, 32), (64, 64)), pooled=True)


def by_path(params: Params) -> dict[str, Any]:
    """Return a pytree's leaves by their paths, joined by "/".

    Raises:
      ValueError: if two paths give the same name.
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    names = [jax.tree_util.keystr(keys, simple=True, separator="/") for keys, _ in leaves]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(
            f"expected a different name for each array, got several called "
            f"{', '.join(sorted(twice))}; use no '/' in the pytree's keys"
        )
    return dict(zip(names, (leaf for _, leaf in leaves), strict=True))


def recognised(params: Params, shape: Sequence[int]) -> Classifier:
    """Return the net that parameters belong to, going by their names and shapes.

    Args:
      params: parameters of a net that `mlp`, `lenet`, `vgg` or `conv` returns.
      shape: shape of the images that the net is for, (H, W, C).

    Raises:
      ValueError: if they aren't the parameters of such a net; or as `check`.
    """
    widths: dict[str, int] = {}  # number of outputs of each layer, from its kernel or bias
    inputs: dict[str, int] = {}  # number of inputs of each dense layer
    sides = []
    for path, leaf in by_path(params).items():
        match path.split("/"), np.shape(leaf):
            case ["params", layer, "kernel" | "bias"], (*inner, width) if width:
                widths[layer] = width
                if len(inner) == 3:
                    sides.append(inner[0])
                if len(inner) == 1:
                    inputs[layer] = inner[0]

    def numbered(name: str) -> Iterator[int]:
        """Yield the widths of NAME_0, NAME_1, ..., up to the last such layer."""
        return itertools.takewhile(bool, (widths.get(f"{name}_{i}", 0) for i in itertools.count()))

    dense = tuple(numbered("hidden"))
    every = (tuple(numbered(f"convs_{i}")) for i in itertools.count())
    blocks = tuple(itertools.takewhile(bool, every))
    if "logits" not in widths or not (dense or blocks):
        raise options.UsageError(
            "expected the parameters of an mlp, lenet, vgg or conv, such as "
            f"params/hidden_0/kernel, got {', '.join(list(by_path(params))[:10]) or 'none'}; for a "
            "net of your own pass module:function and --weights"
        )
    size = sides[0] if sides else 3
    padding = 0 if size == 5 else 1  # lenet's; the others'
    pooled = bool(blocks) and inputs.get("hidden_0" if dense else "logits") == blocks[-1][-1]
    net = Classifier(
        dense, blocks=blocks, size=size, padding=padding, classes=widths["logits"], pooled=pooled
    )
    check(net, params, shape)
    return net


def check(net: Classifier, params: Params, shape: Sequence[int]) -> None:
    """Check that parameters are a net's, for images of a shape (H, W, C).

    Raises:
      ValueError: if the images are too small for the net; or if parameters are missing, unexpected,
        or of another shape, all of which it lists.
    """
    x = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    differences = _differences(by_path(jax.eval_shape(net.init, jax.random.key(0), x)), params)
    if differences:
        raise options.UsageError(
            f"expected the parameters of {describe(net)} for images of "
            f"{'x'.join(map(str, shape))}, got {'; '.join(differences)}. Choose images like "
            "those that it was trained on, or save all of its parameters; for a net of your own "
            "pass module:function and --weights"
        )


def _differences(expected: Mapping[str, Any], params: Params) -> list[str]:
    """Return a description of each parameter that isn't as expected."""
    there = by_path(params)
    said = []
    for name in sorted(expected.keys() | there.keys()):
        if name not in there:
            said.append(f"no {name}, which should be {list(expected[name].shape)}")
        elif name not in expected:
            said.append(f"{name}, which the net doesn't have")
        elif there[name].shape != expected[name].shape:
            shapes = f"{list(there[name].shape)} and not {list(expected[name].shape)}"
            said.append(f"{name} of shape {shapes}")
    return said


def describe(net: Classifier) -> str:
    """Return a short description of a net's layers, e.g. `conv20-conv50-500`."""
    convs = [f"conv{width}" for block in net.blocks for width in block]
    pool = ["mean"] if net.pooled else []
    dense = ["x".join(map(str, net.dense))] if net.dense else []
    return "-".join([*convs, *pool, *dense])
