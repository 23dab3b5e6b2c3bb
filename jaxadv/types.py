"""Types and call signatures that the whole library uses; no computation here.

Call signatures are `Protocol` classes with positional-only data, so that users may name their
arguments as they like. Shapes use `B` for the batch size, `K` for the number of classes and `...`
for the shape of one example.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Protocol, TypeAlias

import jax

__all__ = [
    "ApplyFn",
    "Bounds",
    "EncodeFn",
    "Eps",
    "LossFn",
    "Norm",
    "Objective",
    "Params",
    "PerturbFn",
    "Schedule",
    "StochasticFn",
    "TrainFn",
]

Params: TypeAlias = Any
"""The first argument of the user's function: a pytree of any structure."""

Norm: TypeAlias = Literal["l1", "l2", "linf"]
"""The norms of the paper's Proposition 3."""

Eps: TypeAlias = float | jax.Array
"""A perturbation size (the paper's c), a scalar or one number per example, `[B]`."""

Bounds: TypeAlias = tuple[float | jax.Array, float | jax.Array]
"""`(lo, hi)`, the box that `x + r` stays in; each a number or an array that broadcasts to x."""

Schedule: TypeAlias = Callable[[jax.Array], jax.Array | float]
"""A number as a function of the step, as in optax."""


class ApplyFn(Protocol):
    """A classifier: `[B, ...]` to logits `[B, K]`, row by row."""

    def __call__(self, params: Params, x: jax.Array, /) -> jax.Array:
        """Return logits (not probabilities) of shape `[B, K]`.

        Rows must not interact: batch norm uses its stored statistics, and dropout is off.
        """
        ...


class StochasticFn(Protocol):
    """A classifier that draws random numbers, for instance with dropout on."""

    def __call__(self, params: Params, x: jax.Array, key: jax.Array, /) -> jax.Array:
        """Return logits `[B, K]` that depend on the key."""
        ...


class EncodeFn(Protocol):
    """The paper's N_rep: `[B, ...]` to a representation `[B, ...]`, row by row."""

    def __call__(self, params: Params, x: jax.Array, /) -> jax.Array:
        """Return the representation, the input of the classifier part."""
        ...


class TrainFn(Protocol):
    """The net in training mode: with dropout, and batch norm on the batch's statistics."""

    def __call__(
        self, params: Params, model_state: Any, x: jax.Array, key: jax.Array, /
    ) -> tuple[jax.Array, Any]:
        """Return the output for `x` (logits, or a representation) and the new model state."""
        ...


class LossFn(Protocol):
    """A loss per example, in optax's argument order."""

    def __call__(self, logits: jax.Array, labels: jax.Array, /) -> jax.Array:
        """Return the loss of each example, `[B]`, from logits `[B, K]`."""
        ...


class PerturbFn(Protocol):
    """A perturbation method: returns r, never x + r."""

    def __call__(
        self,
        apply_fn: ApplyFn,
        params: Params,
        x: jax.Array,
        y: jax.Array,
        /,
        *,
        eps: Eps,
        key: jax.Array | None = None,
        bounds: Bounds | None = None,
    ) -> jax.Array:
        """Return r of x's shape and dtype.

        Set a method's other arguments (norm, number of steps) by `functools.partial`. `key` is one
        key, which is split per row, or one key per row.
        """
        ...


class Objective(Protocol):
    """A loss for `train.make_step` to minimise; fits `jax.value_and_grad(..., has_aux=True)`."""

    def __call__(
        self,
        params: Params,
        model_state: Any,
        batch: tuple[jax.Array, ...],
        /,
        *,
        key: jax.Array,
        step: jax.Array,
    ) -> tuple[jax.Array, tuple[Any, Any]]:
        """Return `(loss, (model_state, aux))` for one batch, usually `(x, y)`."""
        ...
