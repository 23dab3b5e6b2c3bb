"""The networks of the paper's Section 7, as flax modules in two parts.

Each has `encode` (the paper's N_rep) and `classify` (N_cla), and `__call__` is one after the other,
so that the same parameters serve training on raw data and at the representation. Dropout acts where
a module is applied with `train=True` and a `dropout` key; otherwise the net is deterministic.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, cast

import jax
from flax import linen as nn

from jaxadv.types import ApplyFn, Params, TrainFn

__all__ = ["MLP", "function", "init", "train_function"]


@functools.partial(jax.jit, static_argnums=0)
def init(net: nn.Module, key: jax.Array, x: jax.Array) -> Params:
    """Return a module's initial parameters; compiled once for equal modules."""
    return net.init(key, x)


@functools.cache
def function(net: nn.Module, method: str | None = None) -> ApplyFn:
    """Return `(params, x) -> output` of a module, or of one of its methods, deterministic.

    Equal modules get the same function object, so that what is compiled for one serves the other.
    """

    def apply(params: Params, x: jax.Array, /) -> jax.Array:
        return cast(jax.Array, net.apply(params, x, method=method))

    return apply


def train_function(net: nn.Module, method: str | None = None) -> TrainFn:
    """Return a module, or one of its methods, as it is trained: with dropout, and no state."""

    def apply(params: Params, state: Any, x: jax.Array, key: jax.Array, /) -> tuple[jax.Array, Any]:
        dropped = net.apply(params, x, train=True, rngs={"dropout": key}, method=method)
        return cast(jax.Array, dropped), state

    return apply


class MLP(nn.Module):
    """Fully connected layers with ReLU (Table 1: two hidden layers, 100x100 to 500x500).

    Attributes:
      widths: the sizes of the hidden layers.
      classes: K.
      dropout: probability of dropping a hidden unit in training.
      split: how many hidden layers belong to `encode`.
    """

    widths: Sequence[int]
    classes: int = 10
    dropout: float = 0.0
    split: int = 1

    def setup(self) -> None:
        """Make the layers; flax calls this."""
        self.hidden = [nn.Dense(width) for width in self.widths]
        self.logits = nn.Dense(self.classes)
        self.drop = nn.Dropout(self.dropout)

    def encode(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Return the representation `[B, widths[split - 1]]` of images `[B, ...]`."""
        h = x.reshape(x.shape[0], -1)
        for layer in self.hidden[: self.split]:
            h = self.drop(nn.relu(layer(h)), deterministic=not train)
        return h

    def classify(self, h: jax.Array, *, train: bool = False) -> jax.Array:
        """Return logits `[B, K]` of a representation."""
        for layer in self.hidden[self.split :]:
            h = self.drop(nn.relu(layer(h)), deterministic=not train)
        return self.logits(h)

    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Return logits `[B, K]` of images `[B, ...]`."""
        return self.classify(self.encode(x, train=train), train=train)
