"""Attack a data set and score it, with one attack or with several in turn.

Each of several attacks runs only on the examples that are still classified correctly. The loop runs
on the host, since these examples aren't known before an attack has ended. The ensembles themselves
are in `_attacks`.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from jaxadv import closures, host, inputs, losses, meshes
from jaxadv.evaluate import _batches, _budget
from jaxadv.evaluate._accuracy import Outcome, compare, score
from jaxadv.evaluate._attacks import autoattack, within_of
from jaxadv.evaluate._batches import Attacked, Passes, Progress, Ran
from jaxadv.problem import fold
from jaxadv.types import ApplyFn, Bounds, Eps, Norm, Params, PerturbFn

__all__ = ["Audit", "Net", "Result", "Stage", "attack_and_score", "fold_in", "perturb"]

_log = logging.getLogger("jaxadv.evaluate")
fold_in = jax.jit(fold)
_GAIN = 0.02  # fraction of examples to break for `NearBoundary` to continue


class Stage(NamedTuple):
    """The result of one of several attacks.

    Attributes:
      tried: which examples it was run on, bool `[n]`.
      fooled: which of them it made the net misclassify, bool `[n]`.
      seconds: time taken, including compilation.
      passes: passes for each example, integers `[n]`, including one forward pass to check r; 0
        where it wasn't tried. None for an attack that was tried and doesn't count them
        (`attack.reports`).
      executed: total number of passes that the machine ran, counted per example, with padding. For
        attacks with several loops of unknown length (minimal-norm attacks) it is a lower bound.
        None if `passes` is.
    """

    tried: NDArray[np.bool_]
    fooled: NDArray[np.bool_]
    seconds: float
    passes: Passes | None = None
    executed: Passes | None = None


class Audit(NamedTuple):
    """How much a robust accuracy differs from AutoAttack's, on a fraction of the examples.

    Attributes:
      rows: the examples, evenly spaced indices, `[m]`.
      robust: which of them AutoAttack left robust, bool `[m]`.
      difference: robust accuracy on `rows` under the given attacks minus AutoAttack's.
      interval: the 95% confidence interval of the difference, by `compare`.
      result: the result of AutoAttack.
    """

    rows: NDArray[np.intp]
    robust: NDArray[np.bool_]
    difference: float
    interval: tuple[float, float]
    result: Result


class Result(NamedTuple):
    """The result of attacking a data set.

    Attributes:
      outcome: the score of r; each leaf `[n]`.
      r: the perturbations, `[n, ...]`. With several attacks, each example's is the first that fools
        the net, or 0 if none does; if none does, and one returned an r that isn't finite, that r.
      stages: the result of each of several attacks, by name, in order; empty for a single attack.
      audit: the comparison with AutoAttack, if it was asked for.
    """

    outcome: Outcome
    r: NDArray[Any]
    stages: dict[str, Stage]
    audit: Audit | None = None


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
    audit: float = 0,
    store: str | os.PathLike[str] | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Result:
    """Attack a data set and score the perturbations.

    A single attack runs on every example. Several run in turn, each on the examples that are still
    classified correctly; the start of each is logged (`logging`, level INFO, logger
    `jaxadv.evaluate`). Report `accuracy(result.outcome.robust)`: it is measured from the stored r,
    and doesn't depend on what the attacks claim.

    Args:
      apply_fn: `(params, x) -> logits`, `[B, ...]` to `[B, K]`; probabilities raise a warning.
      params: the first argument of `apply_fn`.
      x: `[n, ...]`, floating point, on the host or the device.
      y: integer labels, `[n]`.
      attacks: None for AutoAttack; or one attack, e.g. `attack.pgd`; or several by name, in order,
        e.g. `fast_autoattack("l2")`. In the latter, wrap an attack in `NearBoundary` to run it only
        near the decision boundary. Make a `functools.partial` once and reuse it: each object is
        compiled once.
      eps: the size, a scalar or `[n]`; None with minimal-norm attacks, for perturbations of any
        size.
      norm: the norm in which no perturbation may exceed eps; None for the norm that the attacks are
        set to, by `functools.partial` or by default (l2 if they have none). AutoAttack uses it.
      key: one key, split per example, or `[n]` keys; None for deterministic attacks. Each of
        several attacks gets keys of its own.
      bounds: `(lo, hi)`, numbers or arrays that broadcast to one example; None for no box.
      source: another net with its parameters, on which perturbations are made (transfer); None for
        the net itself.
      batch_size: number of examples per batch; results depend on it only by rounding error. With
        several attacks, the examples are split into batches of this size, an eighth and a 64th of
        it, so an attack is compiled at most three times.
      audit: fraction of the examples, in [0, 1], on which AutoAttack runs too, for ensembles
        cheaper than AutoAttack; `Result.audit` has the difference. It needs `eps` and a key, and if
        there is a source, a deterministic one. 0: no audit.
      store: a folder, new or from an earlier call, in which the results of each batch are kept. The
        same call resumes where the earlier one was interrupted, whatever the batch size. With
        several processes, all of them must share the folder.
      progress: called after each batch, e.g. `lambda at: print(at.attack, at.done, "of", at.of)`.

    Returns:
      `Result`.

    Raises:
      TypeError: as the attacks; if they are neither a function nor a mapping; and under a trace.
      ValueError: as the attacks; if there are none; if the norm is unknown, or not the norm of the
        attacks; if x leaves the bounds; if a perturbation is larger than eps or leaves the bounds,
        by more than rounding error; if `audit` is outside [0, 1]; if `store` has another
        evaluation.

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
    named = {"": attacks} if callable(attacks) else attacks
    _budget.named(
        named, example='an attack, or several in a dict, e.g. {"pgd": attack.pgd}',
        default="AutoAttack",
    )  # fmt: skip
    norm = _budget.norm_of(named.values(), norm)
    if not 0 <= audit <= 1:
        raise ValueError(f"expected audit in 0..1, got {audit}; it is a fraction of the examples")
    shape = host.one_batch(x, batch_size)
    net = Net(closures.keyed(apply_fn, params, shape), params)
    made_on = net if source is None else Net(*closures.source_net(source, shape))
    host.in_bounds(bounds, x)
    examples = (x, y, *host.per_example(x, eps, key))
    # Raise the errors of all attacks before any of them runs.
    some = host.spread(x).take(examples, np.arange(len(y))[: shape.shape[0]])
    several = attacks.values() if isinstance(attacks, Mapping) else ()
    for method in (*several, *(autoattack(norm).values() if audit else ())):
        jax.eval_shape(partial(_attack, net, made_on, bounds, method=method), *some)
    if net.apply_fn is not apply_fn:  # else the evaluation that called this one has checked
        _batches.warn_of_probabilities(net.apply_fn, params, x)
    kept = None
    if store is not None:
        kept = _batches.opened(
            store, net.apply_fn, params, x, named, y=y, eps=eps, norm=norm, key=key, bounds=bounds,
            source=None if source is None else (source[1], closures.digest(*source, x)),
            kind="attack_and_score",
        )  # fmt: skip
    scored = partial(score, net.apply_fn, params, x, y, norm=norm, batch_size=batch_size)
    run = partial(_batches.in_batches, store=kept, progress=progress)
    stages: dict[str, Stage] = {}
    if isinstance(attacks, Mapping):
        batch = partial(_attack, net, made_on, bounds)
        wrong, lead = host.over_batches(partial(_look, net), (x, y), batch_size)
        r, stages = _in_turn(run, batch, attacks, examples, ~wrong, lead, batch_size)
    else:
        batch = partial(perturb, made_on, bounds, method=attacks)
        rows = np.arange(len(y))
        r = run(batch, examples, rows, [shape.shape[0]], stage=0, name="").r
    outcome = scored(r)
    broken = outcome.nonfinite  # counted as such; it has no size

    def name_of(example: int) -> str:
        fooled_by = (repr(name) for name, stage in stages.items() if stage.fooled[example])
        return next(fooled_by, "the attack")

    _budget.keep(
        np.where(broken.reshape(-1, *(1,) * (r.ndim - 1)), 0, r),
        np.where(broken, 0, outcome.norm),
        x, eps=np.inf if eps is None else host.fetch(eps), norm=norm, bounds=bounds,
        name_of=name_of,
    )  # fmt: skip
    audited = None
    if audit and len(y):
        standard = partial(
            attack_and_score, net.apply_fn, params, norm=norm, bounds=bounds, source=source,
            batch_size=batch_size, store=None if store is None else Path(store) / "audit",
            progress=progress,
        )  # fmt: skip
        audited = _audit(standard, examples, outcome.robust, audit)
    return Result(outcome, r, stages, audited)


def _audit(
    standard: Callable[..., Result],
    examples: tuple[Any, Any, Any, jax.Array | None],
    robust: NDArray[np.bool_],
    share: float,
) -> Audit:
    """Run AutoAttack on a fraction of the examples, and compare its robust accuracy.

    Args:
      standard: `(x, y, *, eps, key) -> Result`, AutoAttack.
      examples: x, y, sizes and keys, `[n]`.
      robust: which examples the other attacks left robust, bool `[n]`.
      share: the fraction.
    """
    on = host.spread(examples[0])
    m = on.multiple(math.ceil(round(share * len(robust), 6)))  # 0.07 * 100 is a little over 7
    rows = np.arange(m) * len(robust) // m
    x, y, eps, key = on.take(examples, rows)
    result = standard(x, y, eps=eps, key=key)
    found = compare(robust[rows], result.outcome.robust)
    return Audit(rows, result.outcome.robust, found.difference, found.interval, result)


@partial(jax.tree_util.register_dataclass, data_fields=["params"], meta_fields=["apply_fn"])
@dataclass(frozen=True)
class Net:
    """A net as an argument of compiled functions; `apply_fn` is static."""

    apply_fn: ApplyFn
    params: Params


@partial(jax.jit, static_argnames="method")
def perturb(
    net: Net,
    bounds: Bounds | None,
    x: jax.Array,
    y: jax.Array,
    eps: Any,
    key: jax.Array | None,
    *,
    method: PerturbFn,
) -> Attacked:
    """Return the perturbations of a batch, and their passes if the attack counts them."""
    r, passes = _budget.counted(method)(
        net.apply_fn, net.params, x, y, eps=eps, key=key, bounds=bounds
    )
    return Attacked(inputs.perturbation(r, x), passes=passes)


@partial(jax.jit, static_argnames="method")
def _attack(
    net: Net, made_on: Net, bounds: Bounds | None, *batch: Any, method: PerturbFn
) -> Attacked:
    """Attack, and evaluate the net at x + r; a finite r that doesn't fool the net becomes 0."""
    r, _, _, passes = perturb(made_on, bounds, *batch, method=method)
    x, y, *_ = batch
    finite = jnp.all(jnp.isfinite(r), axis=tuple(range(1, r.ndim)))
    fooled, lead = _look(net, x + r, y)
    fooled &= finite
    if passes is not None:
        passes = passes._replace(forward=passes.forward + 1)
    r = jnp.where(inputs.expand_like(fooled | ~finite, r), r, 0)
    return Attacked(r, fooled, lead, passes)


@jax.jit
def _look(net: Net, x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return which examples are misclassified, and the top wrong class's lead over y."""
    logits = inputs.apply(net.apply_fn, net.params, x)
    return ~inputs.is_correct(logits, x, y), losses.logit_margin(logits, y)


def _in_turn(
    run: Callable[..., Ran],
    batch_of: Callable[..., Attacked],
    attacks: Mapping[str, PerturbFn],
    examples: tuple[Any, Any, Any, jax.Array | None],
    clean: NDArray[np.bool_],
    lead: NDArray[Any],
    batch_size: int,
) -> tuple[NDArray[Any], dict[str, Stage]]:
    """Run each attack on the examples that are still classified correctly.

    Args:
      run: as `in_batches`.
      batch_of: runs an attack on a batch of examples.
      attacks: by name, in order.
      examples: x, y, sizes and keys.
      clean: which examples are classified correctly, bool `[n]`.
      lead: the top wrong class's lead over the label at x, `[n]`; at most 0 for the clean examples.
      batch_size: number of examples in the largest batches.

    Returns:
      r, `[n, ...]`, 0 where no attack succeeded, or not finite if one returned that; and the result
      of each attack.
    """
    x, y, eps, keys = examples
    robust, worst = clean.copy(), np.zeros(x.shape, jax.dtypes.canonicalize_dtype(x.dtype))
    left = np.ones(len(y))  # the smallest fraction of y's lead that an attack has left
    whole = max(1, min(batch_size, len(y)))
    sizes = [max(1, whole // part) for part in (1, 8, 64)]
    stages = {}
    for number, (name, method) in enumerate(attacks.items()):
        own = None if keys is None else fold_in(keys, number)
        tried = np.zeros_like(robust)
        done: list[tuple[NDArray[np.intp], Ran]] = []
        within = within_of(method)
        while True:
            rows = np.flatnonzero(robust & ~tried & (left <= within))
            _log.info("%s on %d of %d examples", name, len(rows), len(y))
            batch = partial(batch_of, method=method)
            ran = run(batch, (x, y, eps, own), rows, sizes, stage=number, name=name)
            done.append((rows, ran))
            tried[rows] = True
            moved = ran.r.any(axis=tuple(range(1, ran.r.ndim)))
            worst[rows[moved]] = ran.r[moved]
            hit = rows[ran.fooled]
            robust[hit] = False
            clearly = lead[rows]  # 0 on a tie
            share = ran.lead / np.where(clearly < 0, clearly, 1)
            left[rows] = np.fmin(left[rows], share)  # ignores NaN
            if within >= 1 or len(hit) <= _GAIN * len(rows):
                break
            within *= 2
        stages[name] = _stage(tried, tried & ~robust, done)
    return worst, stages


def _stage(
    tried: NDArray[np.bool_], fooled: NDArray[np.bool_], done: list[tuple[NDArray[np.intp], Ran]]
) -> Stage:
    """Combine the results of an attack on several disjoint sets of examples."""
    seconds = sum(ran.seconds for _, ran in done)
    passes, executed = Passes(*np.zeros((2, len(tried)), int)), Passes(0, 0)
    for rows, ran in done:
        if ran.passes is None or ran.executed is None:
            return Stage(tried, fooled, seconds)
        passes.forward[rows], passes.backward[rows] = ran.passes
        executed = Passes(*map(sum, zip(executed, ran.executed, strict=True)))
    return Stage(tried, fooled, seconds, passes, executed)
