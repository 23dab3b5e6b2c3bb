"""The distance of each example to a misclassified point, by the best of several attacks.

A robust accuracy belongs to one eps. The size of the smallest perturbation found for each example
gives the whole curve of accuracy against eps, and the median size. Attacks fail for different
reasons, so the smallest result of several is used. Each attack is charged for its forward and
backward passes, which makes attacks of different kinds comparable (Cina et al., 2025).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from types import MappingProxyType
from typing import Any, cast

import jax
import numpy as np
from numpy.typing import NDArray

from jaxadv import attack, closures, host, inputs, meshes, norms
from jaxadv.evaluate import _batches, _budget
from jaxadv.evaluate._accuracy import score
from jaxadv.evaluate._batches import Passes, Progress
from jaxadv.evaluate._ensemble import Net, fold_in, perturb
from jaxadv.types import ApplyFn, Bounds, Norm, Params, PerturbFn

__all__ = ["Distances", "distances", "minimal_attacks"]


@dataclass(frozen=True)
class Distances:
    """The smallest perturbation that was found for each example.

    Attributes:
      size: its norm, `[n]`: 0 where x itself is misclassified, inf where none was found, NaN where
        x or its logits are not finite (`np.isnan(size).sum()` counts these).
      r: the perturbation, `[n, ...]`; 0 where size is 0, inf or NaN.
      attack: the name of the attack that found it, `[n]`; empty where none did.
      passes: the passes of each attack on each example, by the attack's name.
    """

    size: NDArray[Any]
    r: NDArray[Any]
    attack: NDArray[Any]
    passes: dict[str, Passes]

    @property
    def median(self) -> float:
        """The median size, where NaN counts as 0."""
        return float(np.median(np.where(np.isnan(self.size), 0, self.size)))

    def accuracy(self, eps: Any) -> Any:
        """Return the fraction of examples whose smallest perturbation is larger than eps.

        Args:
          eps: a number, or an array of numbers.

        Returns:
          A float, or an array like eps: the robust accuracy at each.
        """
        share = np.mean(self.size > np.asarray(eps)[..., None], axis=-1)
        return share if share.ndim else float(share)


def minimal_attacks(norm: Norm = "l2", budget: int = 2000) -> Mapping[str, PerturbFn]:
    """The default attacks of `distances`, with as many steps as a budget of passes allows.

    About an eighth of the budget goes to `attack.fmn`, two eighths to `attack.fab` with 9 targets,
    and the rest to the search over eps of `attack.apgd`, which finds the smallest perturbations
    where the nearest class is the top wrong one. With 2000 passes, the numbers of steps are 97, 24
    and 27. The split was chosen on training images and the recorded MLPs, among all pairs and
    triples of these attacks, `ddn` and `apgd_multitargeted`, with several numbers of steps.

    Args:
      norm: `"l1"`, `"l2"` or `"linf"`.
      budget: forward plus backward passes for each example, of all attacks together; at least 600.

    Returns:
      Attacks by name, read-only; calls with the same arguments return the same objects.

    Raises:
      ValueError: if the norm is unknown, or `budget` < 600.

    Example:
      >>> from jaxadv import evaluate
      >>> list(evaluate.minimal_attacks("linf"))
      ['fmn', 'fab-t', 'apgd']
    """
    norms.dual(norm)  # raises if the norm is unknown
    inputs.at_least(600, "budget", budget, "2000 is usual; or pass attacks of your own")
    return _minimal_attacks(norm, budget)


@cache
def _minimal_attacks(norm: Norm, budget: int) -> Mapping[str, PerturbFn]:
    # Not all passes are steps: FMN has a DeepFool step and a bisection; APGD has a start and a
    # check in each ball, and needs room for the bisection after each success.
    return MappingProxyType({
        "fmn": partial(attack.fmn, norm=norm, steps=int((0.12 * budget - 45) / 2)),
        "fab-t": partial(attack.fab, norm=norm, steps=int(0.23 * budget / 18 - 1)),
        "apgd": partial(attack.apgd, norm=norm, steps=int((0.65 * budget - 184) / 40)),
    })  # fmt: skip


@meshes.auto_axes()
def distances(
    apply_fn: ApplyFn,
    params: Params,
    x: Any,
    y: Any,
    *,
    norm: Norm | None = None,
    attacks: Mapping[str, PerturbFn] | None = None,
    budget: int | None = 2000,
    key: jax.Array | None = None,
    bounds: Bounds | None = None,
    batch_size: int = 500,
    store: str | os.PathLike[str] | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Distances:
    """Find the smallest perturbation of each example that fools the net, by several attacks.

    Each attack runs on every example, and the smallest r is kept. What the attacks claim doesn't
    count: a forward pass checks that x + r is misclassified, and r has to keep x + r in the box.

    Args:
      apply_fn: `(params, x) -> logits`, `[B, ...]` to `[B, K]`; probabilities raise a warning.
      params: the first argument of `apply_fn`.
      x: `[n, ...]`, floating point, on the host or the device.
      y: integer labels, `[n]`.
      norm: the norm of sizes; None for the norm that the attacks are set to, or l2.
      attacks: minimal-norm attacks by name, called with `eps=None`; they have to count their passes
        (`attack.reports`). None for `minimal_attacks(norm, budget)`.
      budget: forward plus backward passes allowed for each example. Attacks are charged in order,
        and the result of an attack that exceeds an example's budget isn't used. None for no limit.
      key: one key, split per example, or `[n]` keys; None if all attacks are deterministic (those
        of `minimal_attacks` aren't). Each attack gets keys of its own.
      bounds: `(lo, hi)`, numbers or arrays that broadcast to one example; None for no box.
      batch_size: number of examples per batch.
      store: a folder, new or from an earlier call, in which the results of each batch are kept. The
        same call resumes where the earlier one was interrupted, whatever the batch size.
      progress: called after each batch, e.g. `print`.

    Returns:
      `Distances`.

    Raises:
      TypeError: as the attacks; if one doesn't count its passes; and under a trace.
      ValueError: as the attacks; if there are none; if the norm is unknown, or the attacks have
        another; if the budget is None without attacks, or too small for them; if x or a
        perturbation leaves the bounds; if `store` has another evaluation.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxadv import attack, evaluate
      >>> x, y = jnp.array([[3.0, 0.0], [0.0, 1.0]]), jnp.array([0, 1])
      >>> net = lambda params, x: x
      >>> found = evaluate.distances(net, None, x, y, attacks={"ddn": attack.ddn})
      >>> print(found.size.round(2), found.accuracy(1.0))
      [2.12 0.71] 0.5

    References:
      Cina et al., "AttackBench: Evaluating Gradient-based Attacks for Adversarial Examples", 2025.
    """
    x, y = host.arrays("evaluate.distances", x, y, (params, key, bounds))
    if attacks is None:
        if budget is None:
            raise ValueError("expected a budget or attacks, got neither; 2000 passes is usual")
        attacks = minimal_attacks("l2" if norm is None else norm, budget)
    _budget.named(
        attacks, example='a dict, e.g. {"fmn": attack.fmn}', default="those of minimal_attacks"
    )
    norm = _budget.norm_of(attacks.values(), norm)
    shape = host.one_batch(x, batch_size)
    apply_fn = closures.keyed(apply_fn, params, shape)
    _batches.warn_of_probabilities(apply_fn, params, x)
    host.in_bounds(bounds, x)
    keys = host.per_example(x, None, key)[1]
    batch = partial(perturb, Net(apply_fn, params), bounds)
    # Raise the errors of all attacks before any of them runs.
    some = host.spread(x).take((x, y, None, keys), np.arange(len(y))[: shape.shape[0]])
    for method in attacks.values():
        attack.with_info(method)  # raises if it doesn't count its passes
        jax.eval_shape(partial(batch, method=method), *some)
    kept = None
    if store is not None:
        others = {"y": y, "norm": norm, "key": key, "bounds": bounds, "kind": "distances"}
        kept = _batches.opened(store, apply_fn, params, x, attacks, **others)
    scored = partial(score, apply_fn, params, x, y, norm=norm, batch_size=batch_size)
    plain = scored()
    size = np.where(plain.clean, np.inf, np.where(plain.nonfinite, np.nan, 0)).astype(
        plain.norm.dtype
    )
    least = np.zeros(x.shape, shape.dtype)
    by = np.full(len(y), "", dtype=np.array(list(attacks)).dtype)
    spent, passes = np.zeros(len(y), int), {}
    for number, (name, method) in enumerate(attacks.items()):
        own = None if keys is None else fold_in(keys, number)
        ran = _batches.in_batches(
            partial(batch, method=method), (x, y, None, own), np.arange(len(y)), [shape.shape[0]],
            stage=number, name=name, store=kept, progress=progress,
        )  # fmt: skip
        outcome = scored(ran.r)
        r = ran.r
        r[outcome.nonfinite] = 0
        _budget.keep(
            r, np.where(outcome.nonfinite, 0, outcome.norm), x, eps=np.inf, norm=norm,
            bounds=bounds, name_of=partial(_same, name),
        )  # fmt: skip
        passes[name] = cast(Passes, ran.passes)  # all attacks count them
        spent = spent + sum(passes[name])
        less = ~outcome.robust & ~outcome.nonfinite & (outcome.norm < size)
        if budget is not None:
            less &= spent <= budget
        least[less], size[less], by[less] = r[less], outcome.norm[less], name
    return Distances(size, least, by, passes)


def _same(name: str, example: int) -> str:
    return name
