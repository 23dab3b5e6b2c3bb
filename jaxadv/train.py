"""Training steps: an objective's gradient and an optax update, in one jitted function.

`TrainState` has everything that the next step needs, and a checkpoint should store; `StepInfo` is
the report. The objective provides the perturbation (see `objectives`); the optimiser provides
schedules, clipping, averaging and the rest (see optax). This module combines and compiles them.

`make_step` trains on one batch; `make_epoch` on an epoch of data on the device, in one `lax.scan`.

References:
  Huang et al., "Learning with a Strong Adversary", 2015, Algorithms 2 and 3.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from jaxadv import _cpu, inputs, meshes
from jaxadv.types import Objective, Params

__all__ = ["StepInfo", "TrainState", "init", "make_epoch", "make_step", "update"]


class TrainState(NamedTuple):
    """The state that training carries from step to step.

    Attributes:
      step: number of updates made so far, int32 `[]`.
      params: the parameters, a pytree.
      opt_state: the state of the optax transformation.
      model_state: the net's state besides its parameters (batch norm's statistics), or None.
      key: the key of the run; each step folds in its own number.
    """

    step: jax.Array
    params: Params
    opt_state: optax.OptState
    model_state: Any
    key: jax.Array


class StepInfo(NamedTuple):
    """The report of one step.

    Attributes:
      loss: the objective's value before the update, `[]`.
      aux: the objective's own report; `objectives.Aux` for the objectives of this library.
    """

    loss: jax.Array
    aux: Any


def init(
    params: Params, tx: optax.GradientTransformation, *, model_state: Any = None, key: jax.Array
) -> TrainState:
    """Return the state before the first step.

    All arrays are copied, so the caller's own stay valid when steps reuse the state's memory
    (`donate`).

    Args:
      params: the initial parameters, any pytree of floating-point arrays; all of them are trained.
      tx: the optax transformation that will be given to `make_step`.
      model_state: the net's state besides its parameters, any pytree, or None.
      key: the key from which all random numbers of the run derive.

    Returns:
      `TrainState` at step 0.

    Raises:
      TypeError: if a leaf of `params` can't be trained (its path is given); if `tx` isn't a
        transformation; if `key` isn't a key.
      ValueError: if `key` is several keys.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from jaxadv import train
      >>> state = train.init({"w": jnp.zeros(3)}, optax.sgd(0.1), key=jax.random.key(0))
      >>> int(state.step)
      0
    """
    _check_transformation(tx)
    _check_trainable(params)
    inputs.one_key(key)
    state = TrainState(jnp.zeros((), jnp.int32), params, tx.init(params), model_state, key)
    return jax.tree.map(_copy, state)


def _check_transformation(tx: optax.GradientTransformation) -> None:
    if not (hasattr(tx, "init") and hasattr(tx, "update")):
        raise TypeError(
            f"expected an optax transformation, got {tx!r}; make one, e.g. optax.adam(1e-3)"
        )


def _check_trainable(params: Params) -> None:
    for path, leaf in jax.tree.leaves_with_path(params):
        kind = getattr(leaf, "dtype", type(leaf))
        if not jnp.issubdtype(kind, jnp.inexact):
            raise TypeError(
                f"expected params of floating-point arrays, got {getattr(kind, '__name__', kind)} "
                f"at {jax.tree_util.keystr(path)}; all of params is trained: put counters, running "
                "statistics and keys into model_state, or keep them in apply_fn (with equinox, "
                "params, static = eqx.partition(net, eqx.is_inexact_array))"
            )


def _copy(leaf: Any) -> jax.Array:
    # An explicit dtype makes a weakly typed leaf strongly typed, as the first update would;
    # otherwise the step would be traced twice.
    return jnp.array(leaf, dtype=jnp.asarray(leaf).dtype, copy=True)


@meshes.auto_axes(lambda objective, tx, state, batch: meshes.as_state(state))
def update(
    objective: Objective, tx: optax.GradientTransformation, state: TrainState, batch: Any
) -> tuple[TrainState, StepInfo]:
    """Make one update: gradient of the objective, then optax. Pure, and not jitted.

    Args:
      objective: the function to minimise, see `objectives`.
      tx: an optax transformation. If it needs more than gradients, as a line search does, it gets
        `value`, `grad`, `value_fn` (or `obj_fn`) and `grad_fn` for the batch; each call of these
        functions perturbs the batch again.
      state: the current state.
      batch: the objective's batch, `(x, y)` for the objectives of this library.

    Returns:
      The new state, and `StepInfo`.

    Raises:
      TypeError: if a leaf of `params` can't be trained; if `tx` needs any other argument.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from jaxadv import objectives, train
      >>> tx, natural = optax.sgd(1.0), objectives.natural(lambda w, x: x @ w)
      >>> state = train.init(jnp.zeros((1, 2)), tx, key=jax.random.key(0))
      >>> state, _ = train.update(natural, tx, state, (jnp.ones((1, 1)), jnp.array([1])))
      >>> state.params.tolist()
      [[-0.5, 0.5]]
    """
    _check_trainable(state.params)
    key = jax.random.fold_in(state.key, state.step)

    def of_params(params: Params) -> tuple[jax.Array, Any]:
        return objective(params, state.model_state, batch, key=key, step=state.step)

    # Line searches also pass arguments that they don't use, so value_fn has to name these.
    def value_fn(params: Params, obj_fn: Any = None, grad_fn: Any = None) -> jax.Array:
        return of_params(params)[0]

    (loss, (model_state, aux)), grads = jax.value_and_grad(of_params, has_aux=True)(state.params)
    extra = {
        "value": loss,
        "grad": grads,
        "value_fn": value_fn,
        "obj_fn": value_fn,
        "grad_fn": lambda params, _: jax.grad(of_params, has_aux=True)(params)[0],
    }
    updates, opt_state = _transform(tx, grads, state, extra)
    params = optax.apply_updates(state.params, updates)
    return TrainState(state.step + 1, params, opt_state, model_state, state.key), StepInfo(
        loss, aux
    )


def _transform(
    tx: optax.GradientTransformation, grads: Any, state: TrainState, extra: dict[str, Any]
) -> tuple[Any, optax.OptState]:
    """Call an optax transformation with the extra arguments that it accepts."""
    takes, named = inspect.signature(tx.update).parameters, ", ".join(extra)
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in takes.values()):
        extra = {name: value for name, value in extra.items() if name in takes}
    try:
        return tx.update(grads, state.opt_state, state.params, **extra)
    except TypeError as error:
        if "keyword" not in str(error):
            raise
        raise TypeError(
            f"expected an optax transformation that needs no more than {named}, "
            f"got one that raises {error!r}; take it out of its wrapper (optax.chain, "
            "optax.MultiSteps), or write the step with jax.value_and_grad(objective, has_aux=True) "
            "and pass the other arguments yourself"
        ) from error


def make_step(
    objective: Objective, tx: optax.GradientTransformation, *, donate: bool = True
) -> Callable[[TrainState, Any], tuple[TrainState, StepInfo]]:
    """Compile `update` for one batch.

    Args:
      objective: the function to minimise, see `objectives`.
      tx: an optax transformation.
      donate: reuse the memory of the state that is passed in, which becomes invalid.

    Returns:
      `step(state, batch) -> (state, StepInfo)`, jitted; traced once per shape of batch. It raises
      the errors of `update`.

    Raises:
      TypeError: if `tx` isn't an optax transformation.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from jaxadv import objectives, perturb, train
      >>> tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2))
      >>> lwa = objectives.adversarial(lambda w, x: x @ w, perturb.alpha, eps=0.1)
      >>> step = train.make_step(lwa, tx)
      >>> state = train.init(jnp.eye(2), tx, key=jax.random.key(0))
      >>> for _ in range(3):
      ...     state, info = step(state, (jnp.eye(2), jnp.array([0, 1])))
      >>> int(state.step), int(info.aux.zero)
      (3, 0)

    References:
      Huang et al., 2015, Algorithms 2 and 3.
    """
    _check_transformation(tx)

    @meshes.auto_axes(meshes.as_state)
    @_cpu.fast_convolutions
    def step(state: TrainState, batch: Any) -> tuple[TrainState, StepInfo]:
        return update(objective, tx, state, batch)

    return jax.jit(step, donate_argnums=(0,) if donate else ())


def make_epoch(
    objective: Objective, tx: optax.GradientTransformation, *, donate: bool = True
) -> Callable[..., tuple[TrainState, StepInfo]]:
    """Compile `update` over many batches on the device, as one `lax.scan`.

    Args:
      objective: the function to minimise, see `objectives`.
      tx: an optax transformation.
      donate: reuse the memory of the state that is passed in, which becomes invalid.

    Returns:
      `epoch(state, data, order=None) -> (state, StepInfo)`, jitted. Without `order`, `data` is a
      pytree of batches stacked on a first axis, `[S, B, ...]`. With `order`, integers `[S, B]`,
      `data` is a pytree of examples, `[N, ...]`, and step s trains on the examples with indices
      `order[s]`; an index outside 0..N-1 makes the loss NaN, so that the mistake is noticed. The
      leaves of `StepInfo` are stacked, `[S]`. It raises the errors of `update`, and a `ValueError`
      if `order` isn't integers `[S, B]`.

    Raises:
      TypeError: if `tx` isn't an optax transformation.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from jaxadv import objectives, train
      >>> tx = optax.sgd(0.5)
      >>> epoch = train.make_epoch(objectives.natural(lambda w, x: x @ w), tx)
      >>> state = train.init(jnp.zeros((6, 2)), tx, key=jax.random.key(0))
      >>> data = jnp.eye(6), jnp.array([0, 1, 0, 1, 0, 1])
      >>> order = jax.random.permutation(jax.random.key(1), 6).reshape(3, 2)
      >>> state, info = epoch(state, data, order)
      >>> int(state.step), info.loss.shape
      (3, (3,))

    References:
      Huang et al., 2015, Algorithms 2 and 3.
    """
    _check_transformation(tx)

    @meshes.auto_axes(meshes.as_state)
    def epoch(
        state: TrainState, data: Any, order: jax.Array | None = None
    ) -> tuple[TrainState, StepInfo]:
        if order is not None:
            order = _order(order)

        @_cpu.fast_convolutions
        def one(state: TrainState, item: Any) -> tuple[TrainState, StepInfo]:
            batch = item if order is None else jax.tree.map(lambda a: _rows(a, item), data)
            return update(objective, tx, state, batch)

        return lax.scan(one, state, data if order is None else order)

    return jax.jit(epoch, donate_argnums=(0,) if donate else ())


def _order(order: Any) -> jax.Array:
    order = jnp.asarray(order)
    if order.ndim != 2 or not jnp.issubdtype(order.dtype, jnp.integer):
        raise ValueError(
            f"expected order of integers [S, B], got {order.dtype} of shape {order.shape}; make "
            "one, e.g. jax.random.permutation(key, n)[: steps * size].reshape(steps, size)"
        )
    return order


def _rows(data: jax.Array, rows: jax.Array) -> jax.Array:
    # Plain indexing would silently take another row for an index that has none.
    return data.at[rows].get(mode="fill", wrap_negative_indices=False)
