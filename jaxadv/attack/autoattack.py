"""The standard ensemble: four attacks without parameters to choose, each on what is left.

A single attack fails now and then for reasons that have nothing to do with robustness. AutoAttack
(Croce and Hein, 2020) takes the worst of four that fail for different reasons: `apgd` on
cross-entropy, `apgd_multitargeted`, `fab`, and `square`, which doesn't use gradients at all. An
example that one has fooled needs no other, so each works on the rest (`cascade`, with attacks of
one's own).

These run on the host: which examples go on is known only when an attack has ended.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from functools import cache, partial
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np
from numpy.typing import NDArray

from jaxadv import closures, host, inputs, meshes, norms
from jaxadv.attack._apgd import apgd, apgd_multitargeted
from jaxadv.attack._fab import fab
from jaxadv.attack._square import square
from jaxadv.problem import fold
from jaxadv.types import ApplyFn, Bounds, Eps, Norm, Params, PerturbFn

__all__ = ["Cascade", "Stage", "autoattack", "cascade", "standard"]

_log = logging.getLogger(__name__)
_own = jax.jit(fold)  # each attack's own keys


class Stage(NamedTuple):
    """What one attack of a cascade did.

    Attributes:
      tried: which examples it was run on, bool `[n]`.
      fooled: which of them it misled the net about, bool `[n]`.
      seconds: how long it took, compilation included.
    """

    tried: NDArray[np.bool_]
    fooled: NDArray[np.bool_]
    seconds: float


class Cascade(NamedTuple):
    """The worst of several attacks.

    Attributes:
      r: the perturbation that misled the net, `[n, ...]`; 0 where none did.
      clean: classified right without one, bool `[n]`.
      robust: classified right under every attack, bool `[n]`.
      stages: what each attack did, by name, in order.
    """

    r: NDArray[Any]
    clean: NDArray[np.bool_]
    robust: NDArray[np.bool_]
    stages: dict[str, Stage]


def standard(norm: Norm = "l2") -> Mapping[str, PerturbFn]:
    """The attacks of the standard ensemble with their published budgets.

    `apgd-ce`: 100 steps (l1: 5 restarts). `apgd-t`: 100 steps for each of 9 targets (l1: 5).
    `fab-t`: 100 steps for each of 9 targets. `square`: 5000 queries.

    Args:
      norm: `"l1"`, `"l2"` or `"linf"`.

    Returns:
      Attacks by name, not to be changed (`dict` makes a copy that can be); the same objects for
      each call, so that they are compiled once. For l1 there are three: the published l1
      ensemble (2021) has Square too.

    Raises:
      ValueError: if the norm is unknown.

    Example:
      >>> from jaxadv import attack
      >>> list(attack.standard("linf"))
      ['apgd-ce', 'apgd-t', 'fab-t', 'square']

    References:
      Croce and Hein, "Reliable evaluation of adversarial robustness with an ensemble of diverse
      parameter-free attacks", 2020; for l1 "Mind the box: l1-APGD for sparse adversarial attacks on
      image classifiers", 2021.
    """
    norms.dual(norm)  # known?
    return _standard(norm)


@cache
def _standard(norm: Norm) -> Mapping[str, PerturbFn]:
    sparse = norm == "l1"
    attacks: dict[str, PerturbFn] = {
        "apgd-ce": partial(apgd, norm=norm, restarts=5 if sparse else 1),
        "apgd-t": partial(apgd_multitargeted, norm=norm, n_targets=5 if sparse else 9),
        "fab-t": partial(fab, norm=norm, n_targets=9),
    }
    if not sparse:
        attacks["square"] = partial(square, norm=norm)
    return MappingProxyType(attacks)  # shared by all callers


def autoattack(
    apply_fn: ApplyFn,
    params: Params,
    x: Any,
    y: Any,
    /,
    *,
    eps: Eps,
    norm: Norm = "l2",
    key: jax.Array | None = None,
    bounds: Bounds | None = None,
    batch_size: int = 500,
) -> NDArray[Any]:
    """AutoAttack: the standard ensemble, each attack on the examples that the others left.

    A host driver over a whole data set, with the arguments of the other attacks. For what each
    attack did, see `cascade` and `jaxadv.evaluate.ensemble`.

    Args:
      apply_fn: `(params, x) -> logits`, `[B, ...]` to `[B, K]`. Hashable: compiled once each.
      params: the first argument of `apply_fn`.
      x: `[n, H, W, C]`, floating point, on the host or the device (`[n, ...]` for l1).
      y: integer labels, `[n]`.
      eps: the ball's radius, a scalar or `[n]`.
      norm: the ball's norm: `"l1"`, `"l2"` or `"linf"`.
      key: one key, or one per example, `[n]`.
      bounds: `(lo, hi)`, the box that x + r stays in. None: no box.
      batch_size: how many go through the net at a time.

    Returns:
      r, `[n, ...]`, of x's dtype, on the host: 0 where x is misclassified already or no attack
      succeeded.

    Raises:
      TypeError: as the attacks; and under a trace.
      ValueError: as the attacks; without a key; if x leaves the bounds.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxadv import attack
      >>> x, y = jnp.array([[3.0, 0.0, 0.0], [0.0, 1.0, 0.0]]), jnp.array([0, 1])
      >>> net = lambda _, x: x
      >>> r = attack.autoattack(net, None, x, y, eps=1.0, norm="l1", key=jax.random.key(0))
      >>> jnp.argmax(x + r, axis=1).tolist()[0]
      0

    References:
      Croce and Hein, 2020.
    """
    return cascade(
        apply_fn, params, x, y, standard(norm),
        eps=eps, key=key, bounds=bounds, batch_size=batch_size,
    ).r  # fmt: skip


@meshes.auto_axes()
def cascade(
    apply_fn: ApplyFn,
    params: Params,
    x: Any,
    y: Any,
    attacks: Mapping[str, PerturbFn],
    *,
    eps: Eps,
    key: jax.Array | None = None,
    bounds: Bounds | None = None,
    batch_size: int = 500,
) -> Cascade:
    """Several attacks, each on the examples that are still classified right.

    Each is logged as it begins (`logging`, level INFO, logger `jaxadv.attack.autoattack`).

    Args:
      apply_fn: `(params, x) -> logits`, `[B, ...]` to `[B, K]`.
      params: the first argument of `apply_fn`.
      x: `[n, ...]`, floating point, on the host or the device.
      y: integer labels, `[n]`.
      attacks: by name, in order; each a method or a `functools.partial` of one (made once).
      eps: the size, a scalar or `[n]`.
      key: one key, or one per example, `[n]`; None for methods that draw nothing. Each attack
        gets keys of its own.
      bounds: `(lo, hi)`, numbers or arrays that broadcast to one example; None for no box.
      batch_size: how many go through the net at a time. What remains of the examples is cut into
        batches of this size, an eighth and a 64th of it: each attack compiles thrice at most.

    Returns:
      `Cascade`.

    Raises:
      TypeError: as the attacks; if they aren't a mapping; and under a trace.
      ValueError: as the attacks; if there are none; if x leaves the bounds.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxadv import attack, perturb
      >>> x, y = jnp.array([[3.0, 0.0], [0.0, 1.0]]), jnp.array([0, 1])
      >>> attacks = {"one step": perturb.loss, "pgd": attack.pgd}
      >>> result = attack.cascade(lambda _, x: x, None, x, y, attacks, eps=1.0)
      >>> result.robust.tolist(), result.stages["pgd"].tried.tolist()
      ([True, False], [True, False])
    """
    check_attacks(attacks)
    x, y = host.arrays("attack.cascade", x, y, (params, eps, key, bounds))
    bounds = host.checked(bounds, x)
    sizes, keys = host.per_example(x, eps, key)
    apply_fn = closures.keyed(apply_fn, params, host.one_batch(x, batch_size))
    clean = np.asarray(host.over_batches(partial(_right, apply_fn, params), (x, y), batch_size))
    robust, worst = clean.copy(), np.zeros(x.shape, x.dtype)
    on = host.spread(x)
    whole = max(1, min(batch_size, len(y)))
    shapes = [max(1, whole // part) for part in (1, 8, 64)]
    overhead = whole // 80  # of small nets, which take large batches; of large ones it is little
    some = on.take((x, y, sizes, keys), np.arange(len(y))[: on.multiple(whole)])
    for method in attacks.values():  # what one of them refuses is said before any of them runs
        jax.eval_shape(partial(_attack, apply_fn, method), params, bounds, *some)
    stages = {}
    for number, (name, method) in enumerate(attacks.items()):
        start, tried = time.perf_counter(), robust.copy()
        _log.info("%s on %d of %d examples", name, tried.sum(), len(y))
        own = None if keys is None else _own(keys, number)
        for rows, size in _batches(np.flatnonzero(tried), shapes, overhead):
            filled = np.resize(rows, on.multiple(size))  # repeated; what is too much is dropped
            batch = on.take((x, y, sizes, own), filled)
            r, fooled = host.fetch(_attack(apply_fn, method, params, bounds, *batch))
            hit = fooled[: len(rows)]
            worst[rows[hit]] = r[: len(rows)][hit]
            robust[rows[hit]] = False
        stages[name] = Stage(tried, tried & ~robust, time.perf_counter() - start)
    return Cascade(worst, clean, robust, stages)


def check_attacks(attacks: Mapping[str, PerturbFn]) -> None:
    """Check that these are attacks by name.

    Raises:
      TypeError: if they aren't a mapping, or one isn't a hashable function of their signature.
      ValueError: if there are none.
    """
    if not isinstance(attacks, Mapping):
        raise TypeError(
            f"expected attacks by name, got {type(attacks).__name__}; pass a dict, e.g. "
            '{"pgd": attack.pgd}, or attack.standard(norm)'
        )
    if not attacks:
        raise ValueError("expected at least one attack, got none; pass attack.standard(norm)")
    for name, method in attacks.items():
        closures.method(f"attack {name!r}", method)


def _batches(
    rows: NDArray[np.intp], sizes: Sequence[int], overhead: int
) -> list[tuple[NDArray[np.intp], int]]:
    """Cut indices into batches; return them with the size that each is to be filled up to.

    What a batch of the first size would leave partly empty goes into smaller ones where that costs
    less: a batch costs its examples and the overhead, in examples.
    """
    size, *smaller = sizes
    cut = len(rows) - len(rows) % size
    batches = [(rows[at : at + size], size) for at in range(0, cut, size)]
    if cut == len(rows):
        return batches
    one = [(rows[cut:], size)]
    several = _batches(rows[cut:], smaller, overhead) if smaller else one
    return batches + min(several, one, key=lambda rest: sum(of + overhead for _, of in rest))


@partial(jax.jit, static_argnums=0)
def _right(apply_fn: ApplyFn, params: Params, x: jax.Array, y: jax.Array) -> jax.Array:
    x = inputs.examples(x)
    return inputs.is_correct(inputs.apply(apply_fn, params, x), x, inputs.labels(y, x.shape[0]))


@partial(jax.jit, static_argnums=(0, 1))
def _attack(
    apply_fn: ApplyFn,
    method: PerturbFn,
    params: Params,
    bounds: Bounds | None,
    x: jax.Array,
    y: jax.Array,
    eps: jax.Array,
    keys: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    r = inputs.perturbation(method(apply_fn, params, x, y, eps=eps, key=keys, bounds=bounds), x)
    return r, ~_right(apply_fn, params, x + r, y)
