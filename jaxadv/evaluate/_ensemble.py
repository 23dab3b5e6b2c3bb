"""Attack a data set and score it, with one attack or with several in turn.

A single attack may fail for reasons that have nothing to do with robustness. AutoAttack (Croce and
Hein, 2020) takes the worst case over four attacks that fail for different reasons: `attack.apgd` on
cross-entropy, `attack.apgd_multitargeted`, `attack.fab`, and `attack.square`, which uses no
gradients. Each runs only on the examples that are still classified correctly.

The loop runs on the host, since these examples are known only after an attack has ended.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np
from numpy.typing import NDArray

from jaxadv import attack, closures, host, inputs, meshes, norms
from jaxadv.evaluate import _budget
from jaxadv.evaluate._accuracy import Outcome, measure, score
from jaxadv.problem import fold
from jaxadv.types import ApplyFn, Bounds, Eps, Norm, Params, PerturbFn

__all__ = ["Result", "Stage", "attack_and_score", "autoattack"]

_log = logging.getLogger("jaxadv.evaluate")
_fold = jax.jit(fold)


class Stage(NamedTuple):
    """The result of one of several attacks.

    Attributes:
      tried: which examples it was run on, bool `[n]`.
      fooled: which of them it made the net misclassify, bool `[n]`.
      seconds: time taken, including compilation.
    """

    tried: NDArray[np.bool_]
    fooled: NDArray[np.bool_]
    seconds: float


class Result(NamedTuple):
    """The result of attacking a data set.

    Attributes:
      outcome: the score of r; each leaf `[n]`.
      r: the perturbations, `[n, ...]`. For several attacks, an example's is the first that made the
        net misclassify it, or 0 if none did.
      stages: the result of each of several attacks, by name, in order; empty for a single attack.
    """

    outcome: Outcome
    r: NDArray[Any]
    stages: dict[str, Stage]


def autoattack(norm: Norm = "l2") -> Mapping[str, PerturbFn]:
    """The attacks of AutoAttack, the standard ensemble, with their published budgets.

    `apgd-ce`: 100 steps (l1: 5 restarts). `apgd-t`: 100 steps for each of 9 targets (l1: 5).
    `fab-t`: 100 steps for each of 9 targets. `square`: 5000 queries.

    Args:
      norm: `"l1"`, `"l2"` or `"linf"`.

    Returns:
      Attacks by name, read-only (`dict` makes a copy to change); each call returns the same
      objects, so that they are compiled once. For l1 there are three: the published l1 ensemble
      (2021) also has Square.

    Raises:
      ValueError: if the norm is unknown.

    Example:
      >>> from jaxadv import evaluate
      >>> list(evaluate.autoattack("linf"))
      ['apgd-ce', 'apgd-t', 'fab-t', 'square']

    References:
      Croce and Hein, "Reliable evaluation of adversarial robustness with an ensemble of diverse
      parameter-free attacks", 2020; for l1 "Mind the box: l1-APGD for sparse adversarial attacks on
      image classifiers", 2021.
    """
    norms.dual(norm)  # known?
    return _autoattack(norm)


@cache
def _autoattack(norm: Norm) -> Mapping[str, PerturbFn]:
    sparse = norm == "l1"
    attacks: dict[str, PerturbFn] = {
        "apgd-ce": partial(attack.apgd, norm=norm, restarts=5 if sparse else 1),
        "apgd-t": partial(attack.apgd_multitargeted, norm=norm, n_targets=5 if sparse else 9),
        "fab-t": partial(attack.fab, norm=norm, n_targets=9),
    }
    if not sparse:
        attacks["square"] = partial(attack.square, norm=norm)
    return MappingProxyType(attacks)  # shared by all callers


@meshes.auto_axes()
def attack_and_score(
    apply_fn: ApplyFn,
    params: Params,
    x: Any,
    y: Any,
    attacks: PerturbFn | Mapping[str, PerturbFn] | None = None,
    *,
    eps: Eps | None,
    norm: Norm | None = None,
    key: jax.Array | None = None,
    bounds: Bounds | None = None,
    source: tuple[ApplyFn, Params] | None = None,
    batch_size: int = 500,
) -> Result:
    """Attack a data set and score the perturbations.

    A single attack runs on every example. Several run in turn, each on the examples that are still
    classified correctly; each is logged as it begins (`logging`, level INFO, logger
    `jaxadv.evaluate`). Report `accuracy(result.outcome.robust)`: it is measured from the stored r,
    and doesn't rely on what the attacks claim.

    Args:
      apply_fn: `(params, x) -> logits`, `[B, ...]` to `[B, K]`.
      params: the first argument of `apply_fn`.
      x: `[n, ...]`, floating point, on the host or the device.
      y: integer labels, `[n]`.
      attacks: None for AutoAttack; or one attack, e.g. `attack.pgd`; or several by name, in order.
        Make a `functools.partial` once and pass it again: each object is compiled once.
      eps: the size, a scalar or `[n]`; None for the smallest perturbations that minimal-norm
        attacks find, of any size.
      norm: the norm in which no perturbation may exceed eps; None for the norm that the attacks are
        set to, by `functools.partial` or by default (l2 if they have none). AutoAttack uses it.
      key: one key, split per example, or `[n]` keys; None for methods without random numbers. Each
        of several attacks gets keys of its own.
      bounds: `(lo, hi)`, numbers or arrays that broadcast to one example; None for no box.
      source: another net with its parameters, on which perturbations are made (transfer); None for
        the net itself.
      batch_size: number of examples per batch; the result depends on it by rounding only. The
        examples for each of several attacks are split into batches of this size, an eighth and a
        64th of it, so that an attack compiles at most three times.

    Returns:
      `Result`.

    Raises:
      TypeError: as the attacks; if they are neither a function nor a mapping; and under a trace.
      ValueError: as the attacks; if there are none; if the norm is unknown, or not that of the
        attacks; if x leaves the bounds; if a perturbation is larger than eps or leaves the bounds,
        by more than rounding.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxadv import attack, evaluate, perturb
      >>> x, y = jnp.array([[3.0, 0.0], [0.0, 1.0]]), jnp.array([0, 1])
      >>> net = lambda params, x: x
      >>> result = evaluate.attack_and_score(net, None, x, y, perturb.loss, eps=1.5)
      >>> evaluate.accuracy(result.outcome.clean), evaluate.accuracy(result.outcome.robust)
      (1.0, 0.5)
      >>> attacks = {"one step": perturb.loss, "pgd": attack.pgd}
      >>> result = evaluate.attack_and_score(net, None, x, y, attacks, eps=1.5)
      >>> result.stages["pgd"].tried.tolist()
      [True, False]
    """
    x, y = host.arrays("evaluate.attack_and_score", x, y, (params, eps, key, bounds, source))
    if attacks is None:
        attacks = autoattack("l2" if norm is None else norm)
    _check_attacks(attacks)
    methods = attacks.values() if isinstance(attacks, Mapping) else [attacks]
    norm = _budget.norm_of(methods, norm)
    shape = host.one_batch(x, batch_size)
    net = _Net(closures.keyed(apply_fn, params, shape), params)
    made_on = net
    if source is not None:
        source_fn, source_params = closures.pair(source)
        made_on = _Net(closures.keyed(source_fn, source_params, shape), source_params)
    bounds = host.checked(bounds, x)
    examples = (x, y, *host.per_example(x, eps, key))
    scored = partial(score, net.apply_fn, params, x, y, norm=norm, batch_size=batch_size)
    stages: dict[str, Stage] = {}
    if isinstance(attacks, Mapping):
        batch = partial(_attack, net, made_on, bounds)
        r, stages = _in_turn(batch, attacks, examples, scored().clean, batch_size)
        outcome = scored(r)
        broken = np.zeros_like(outcome.nonfinite)  # a NaN is never a success
    else:
        perturb = partial(_perturb, made_on, bounds, method=attacks)
        r = host.over_batches(perturb, examples, batch_size)
        outcome = scored(r)
        broken = outcome.nonfinite  # counted as non-finite: it has no size

    def name_of(example: int) -> str:
        fooled_by = (repr(name) for name, stage in stages.items() if stage.fooled[example])
        return next(fooled_by, "the attack")

    _budget.keep(
        np.where(broken.reshape(-1, *(1,) * (r.ndim - 1)), 0, r),
        np.where(broken, 0, outcome.norm),
        x, eps=np.inf if eps is None else eps, norm=norm, bounds=bounds, name_of=name_of,
    )  # fmt: skip
    return Result(outcome, r, stages)


def _check_attacks(attacks: PerturbFn | Mapping[str, PerturbFn]) -> None:
    """Check that `attacks` is one attack, or several by name.

    Raises:
      TypeError: if it is neither, or one isn't a hashable function with the signature of attacks.
      ValueError: if there are none.
    """
    if isinstance(attacks, Mapping):
        if not attacks:
            raise ValueError("expected at least one attack, got none; pass None for AutoAttack")
        for name, method in attacks.items():
            closures.method(f"attack {name!r}", method)
    elif not callable(attacks):
        raise TypeError(
            f"expected an attack or several by name, got {type(attacks).__name__}; pass e.g. "
            'attack.pgd, or a dict {"pgd": attack.pgd}, or None for AutoAttack'
        )
    else:
        closures.method("the attack", attacks)


@partial(jax.tree_util.register_dataclass, data_fields=["params"], meta_fields=["apply_fn"])
@dataclass(frozen=True)
class _Net:
    """A net as an argument of compiled functions; `apply_fn` is static."""

    apply_fn: ApplyFn
    params: Params


@partial(jax.jit, static_argnames="method")
def _perturb(
    net: _Net,
    bounds: Bounds | None,
    x: jax.Array,
    y: jax.Array,
    eps: Any,
    key: jax.Array | None,
    *,
    method: PerturbFn,
) -> jax.Array:
    r = method(net.apply_fn, net.params, x, y, eps=eps, key=key, bounds=bounds)
    return inputs.perturbation(r, x)


@partial(jax.jit, static_argnames="method")
def _attack(
    net: _Net,
    made_on: _Net,
    bounds: Bounds | None,
    x: jax.Array,
    y: jax.Array,
    eps: Any,
    key: jax.Array | None,
    *,
    method: PerturbFn,
) -> tuple[jax.Array, jax.Array]:
    """Return r, and which examples it makes the net misclassify."""
    r = _perturb(made_on, bounds, x, y, eps, key, method=method)
    return r, ~measure(net.apply_fn, net.params, x + r, y).clean


def _in_turn(
    batch_of: Callable[..., tuple[jax.Array, jax.Array]],
    attacks: Mapping[str, PerturbFn],
    examples: tuple[Any, Any, Any, jax.Array | None],
    clean: NDArray[np.bool_],
    batch_size: int,
) -> tuple[NDArray[Any], dict[str, Stage]]:
    """Run each attack on the examples that are still classified correctly.

    Args:
      batch_of: runs an attack on a batch of examples; returns r and which examples it fooled.
      attacks: by name, in order.
      examples: x, y, sizes and keys.
      clean: which examples are classified correctly, bool `[n]`.
      batch_size: number of examples in the largest batches.

    Returns:
      r, `[n, ...]`, 0 where no attack succeeded; and the result of each attack.
    """
    x, y, sizes, keys = examples
    robust, worst = clean.copy(), np.zeros(x.shape, x.dtype)
    on = host.spread(x)
    whole = max(1, min(batch_size, len(y)))
    shapes = [max(1, whole // part) for part in (1, 8, 64)]
    overhead = whole // 80  # for small nets, which take large batches; little for large ones
    some = on.take(examples, np.arange(len(y))[: on.multiple(whole)])
    for method in attacks.values():  # raise the errors of all before any of them runs
        jax.eval_shape(partial(batch_of, method=method), *some)
    stages = {}
    for number, (name, method) in enumerate(attacks.items()):
        start, tried = time.perf_counter(), robust.copy()
        _log.info("%s on %d of %d examples", name, tried.sum(), len(y))
        own = None if keys is None else _fold(keys, number)
        for rows, size in _batches(np.flatnonzero(tried), shapes, overhead):
            filled = np.resize(rows, on.multiple(size))  # repeated; results of repeats are dropped
            batch = on.take((x, y, sizes, own), filled)
            r, fooled = host.fetch(batch_of(*batch, method=method))
            hit = fooled[: len(rows)]
            worst[rows[hit]] = r[: len(rows)][hit]
            robust[rows[hit]] = False
        stages[name] = Stage(tried, tried & ~robust, time.perf_counter() - start)
    return worst, stages


def _batches(
    rows: NDArray[np.intp], sizes: Sequence[int], overhead: int
) -> list[tuple[NDArray[np.intp], int]]:
    """Split indices into batches; return each with the size to pad it to.

    Instead of padding the last batch to the first size, use smaller ones if that costs less: a
    batch costs its padded size plus the overhead, in examples.
    """
    size, *smaller = sizes
    cut = len(rows) - len(rows) % size
    batches = [(rows[at : at + size], size) for at in range(0, cut, size)]
    if cut == len(rows):
        return batches
    one = [(rows[cut:], size)]
    several = _batches(rows[cut:], smaller, overhead) if smaller else one
    return batches + min(several, one, key=lambda rest: sum(of + overhead for _, of in rest))
