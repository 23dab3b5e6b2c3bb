"""Signs that a robust accuracy shouldn't be trusted.

Robust accuracy counts the failures of attacks, so whatever weakens an attack looks like robustness:
vanishing gradients, a randomised net, examples that influence each other, a box or a budget that is
too small (Athalye et al., 2018; Carlini et al., 2019). Each has a symptom that can be measured.
`check` looks for these symptoms on a few hundred examples and raises a flag for each that it finds.
The absence of flags proves nothing.

There are three kinds of flags. Gradient masking: the net's gradients mislead attacks. Weak attack:
the net is not at fault, but a stronger attack breaks more. Invalid input: the outputs aren't a
classifier's logits, or the examples can't be evaluated.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from numpy.typing import NDArray

from jaxadv import attack, closures, host, inputs, jacobian, losses, meshes, norms, perturb
from jaxadv.evaluate._accuracy import accuracy, score
from jaxadv.evaluate._batches import ALONE, apart, are_probabilities
from jaxadv.evaluate._ensemble import Result, attack_and_score
from jaxadv.types import ApplyFn, Bounds, Eps, LossFn, Norm, Params

__all__ = ["Flag", "Report", "attacks_of", "check"]

_log = logging.getLogger("jaxadv.evaluate")

Kind: TypeAlias = Literal["gradient masking", "weak attack", "invalid input"]

# Thresholds. Accuracies are compared on the same examples, so a difference isn't sampling noise;
# the thresholds are twice the differences between sound attacks on sound nets.
_SAME = 1e-4  # difference of the same row's logits in two calls, relative to the largest
_BLACK_BOX = 0.005  # accuracy lost to Square or a transferred attack after all gradient attacks
_BUDGET = 0.02  # accuracy lost to more steps and starts, or to minimal-norm attacks, after PGD
_ONE_STEP = 0.2  # one-step accuracy minus the iterated one
_FAR = 0.02  # accuracy at sizes where an adversarial example is known for each x
_DISAGREE = 1.25  # ratio of the median sizes that two minimal-norm attacks find


class Flag(NamedTuple):
    """One sign that a robust accuracy shouldn't be trusted.

    Attributes:
      name: one of the names that `check` lists.
      message: the measurement, what it means, and what to do.
      kind: `"gradient masking"` (the net's gradients mislead attacks), `"weak attack"` (a stronger
        one breaks more), or `"invalid input"` (the evaluation is meaningless).
    """

    name: str
    message: str
    kind: Kind


class Report(NamedTuple):
    """The findings of `check`.

    Attributes:
      flags: the flags that were raised.
      figures: all measurements, by name.
    """

    flags: tuple[Flag, ...]
    figures: dict[str, float]


@meshes.auto_axes()
def check(
    apply_fn: ApplyFn,
    params: Params,
    x: Any,
    y: Any,
    *,
    eps: Eps,
    norm: Norm = "l2",
    key: jax.Array,
    bounds: Bounds | None = None,
    source: tuple[ApplyFn, Params] | None = None,
    steps: int = 50,
    batch_size: int = 500,
) -> Report:
    """Look for signs that a net's robust accuracy shouldn't be trusted.

    The flags, by kind, with the condition that raises each. Invalid input:

    - `probabilities`: outputs are in [0, 1] and sum to 1.
    - `random`: two calls with the same input give different logits.
    - `interacting rows`: a row's logits depend on its batch.
    - `nothing right`: the net classifies no example correctly, so there is nothing to attack.
    - `one answer`: the net predicts the same class for all examples, so `far` can't be checked.
    - `unusable examples`: inputs or logits aren't finite, or labels are none of the net's classes.

    Gradient masking:

    - `zero gradients`, `non-finite gradients`: of the loss that attacks maximise, at the examples
      or at the points where PGD ended without success.
    - `black box`: Square breaks examples that PGD, `fmn` and `fab` don't.
    - `transfer`: perturbations made on `source` break examples that PGD, `fmn` and `fab` don't.
    - `far`: PGD fails even without a box and at the distance of the nearest example for which the
      net predicts another class.

    A weak attack, which is not the net's fault:

    - `one step`: the accuracy under a single step is far above PGD's, and so meaningless.
    - `budget`: more steps and restarts still lower the accuracy under PGD.
    - `minimal norm`: `fmn` or `fab` find points within eps that PGD doesn't.
    - `disagreement`: `fmn` and `fab` find minimal sizes that are far apart.

    On few examples, most of the time is compilation; progress is logged (`logging`, level INFO,
    logger `jaxadv.evaluate`).

    Args:
      apply_fn: `(params, x) -> logits`, `[B, ...]` to `[B, K]`.
      params: the first argument of `apply_fn`.
      x: `[n, ...]`, floating point; a few hundred examples are enough.
      y: integer labels, `[n]`.
      eps: the perturbation size to check, a scalar or `[n]`.
      norm: its norm.
      key: one key, or one per example, `[n]`.
      bounds: `(lo, hi)`, the box for x + r; None for no box.
      source: another net with its parameters, on which transferred perturbations are made.
      steps: PGD's number of steps; other budgets are multiples of it.
      batch_size: number of examples per batch.

    Returns:
      `Report`. Its figures include the fraction of examples without a usable gradient, for each
      loss that attacks maximise: `margin zero gradients` (PGD, APGD on cross-entropy), `dlr zero
      gradients`, `ce zero gradients`, and the same with `non-finite`. If only plain cross-entropy
      has zero gradients, in float32, the net is not at fault: the attacks of this library aren't
      affected, though others are. If no example is classified correctly, no attack runs.

    Raises:
      TypeError: as the attacks; and under a trace.
      ValueError: as the attacks; if there are no examples; if x leaves the bounds.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxadv import evaluate
      >>> x = jax.random.normal(jax.random.key(0), (60, 4))
      >>> net = lambda _, x: jnp.round(x)  # a gradient of 0 everywhere
      >>> report = evaluate.check(net, None, x, x.argmax(1), eps=0.5, key=jax.random.key(1))
      >>> "zero gradients" in [flag.name for flag in report.flags]
      True

    References:
      Athalye et al., "Obfuscated Gradients Give a False Sense of Security", 2018; Carlini et al.,
      "On Evaluating Adversarial Robustness", 2019; the checks of Croce and Hein's AutoAttack.
    """
    x, y = host.arrays("evaluate.check", x, y, (params, eps, key, bounds))
    if len(y) == 0:
        raise ValueError("expected at least one example, got none; pass a few hundred")
    norms.dual(norm)  # raises if the norm is unknown
    eps = host.per_example(x, eps, None)[0]
    keys = inputs.keys(key, len(y), "an attack of the check")
    box: Bounds | None = None
    endless: Bounds | None = None
    if bounds is not None:
        host.in_bounds(bounds, x)
        lo, hi = (jnp.asarray(bound, inputs.accum_dtype(x.dtype)) for bound in bounds)
        # An infinite box, not None, so that PGD is compiled once for both.
        box, endless = (lo, hi), (jnp.full_like(lo, -jnp.inf), jnp.full_like(hi, jnp.inf))
    shape = host.one_batch(x, batch_size)
    apply_fn = closures.keyed(apply_fn, params, shape)
    if source is not None:
        source = closures.source_net(source, shape)
    found = Findings()
    _log.info("outputs and clean accuracy")
    _look_at_outputs(apply_fn, params, x, batch_size, found)
    plain = score(apply_fn, params, x, y, batch_size=batch_size)
    right, usable = plain.clean, ~(plain.nonfinite | plain.invalid)
    _look_at_clean(right, usable, found)
    if not right.any():
        return found.report()

    attacks = attacks_of(norm, steps)

    def attacked(name: str, **others: Any) -> Result:
        _log.info("%s on %d examples", name, len(y))
        given = {"eps": eps, "key": keys, "bounds": box, "batch_size": batch_size} | others
        return attack_and_score(apply_fn, params, x, y, attacks[name], **given)

    one_step = attacked("one step").outcome.robust
    pgd = attacked("pgd")
    iterated = pgd.outcome.robust
    thorough = iterated & attacked("thorough").outcome.robust
    batch = partial(_gradient_kinds, apply_fn, params)
    _look_at_gradients(batch, x, y, pgd.r, usable, iterated, batch_size, found)
    _look_at_budget(one_step, iterated, thorough, steps, found)

    least = {name: attacked(name, eps=None).outcome.norm for name in ("fmn", "fab")}
    minimal = _look_at_sizes(least, right, thorough, np.asarray(eps), found)

    _compare("black box", "Square", minimal, attacked("square").outcome.robust, found)
    if source is not None:
        transferred = attacked("pgd", source=source).outcome.robust
        _compare("transfer", "a transferred attack", minimal, transferred, found)

    reach = _nearest_other(apply_fn, params, x, norm, batch_size)
    known = np.isfinite(reach)
    found.flag(
        "one answer", not known.any(), "invalid input",
        "the net predicts the same class for all examples, so no adversarial points are known, and "
        "`far` was skipped; pass examples of several classes: shuffle sorted data first",
    )  # fmt: skip
    if known.any():
        far = attacked("pgd", eps=jnp.where(known, reach, 0), bounds=endless).outcome.robust
        left = found.figures["pgd, far"] = accuracy(far[known])
        found.flag(
            "far", left > _FAR, "gradient masking",
            f"without a box, PGD fails on {left:.3f} at a size that reaches an example with "
            "another prediction: gradients don't lead to known adversarial points",
        )  # fmt: skip
    return found.report()


@cache
def attacks_of(norm: Norm, steps: int) -> dict[str, Any]:
    """Return the attacks of a check; the same objects each time, so that they are compiled once."""
    return {
        "one step": partial(perturb.loss, norm=norm),
        "pgd": partial(attack.pgd, norm=norm, steps=steps),
        "thorough": partial(attack.pgd, norm=norm, steps=4 * steps, restarts=4),
        "square": partial(attack.square, norm=norm, steps=10 * steps),
        "fmn": partial(attack.fmn, norm=norm, steps=4 * steps),
        "fab": partial(attack.fab, norm=norm, steps=steps),
    }


@dataclass
class Findings:
    """What a check has found so far."""

    figures: dict[str, float] = field(default_factory=dict)
    flags: list[Flag] = field(default_factory=list)

    def flag(self, name: str, raised: bool, kind: Kind, message: str) -> None:
        """Raise the flag if `raised`."""
        if raised:
            self.flags.append(Flag(name, message, kind))

    def report(self) -> Report:
        """Return the report on what was found."""
        return Report(tuple(self.flags), self.figures)


def _look_at_outputs(
    apply_fn: ApplyFn, params: Params, x: Any, batch_size: int, found: Findings
) -> None:
    x = jnp.asarray(x)
    on = host.spread(x)

    def logits_of(rows: NDArray[np.intp]) -> NDArray[Any]:
        # Not compiled, so that a net that draws random numbers outside of JAX draws new ones.
        return host.fetch(inputs.apply(apply_fn, params, *on.take((x,), rows)))

    first = np.arange(min(on.multiple(batch_size), len(x)))
    logits, again = logits_of(first), logits_of(first)
    # A batch of copies of one example, one per device, since a net may name shardings.
    alone = np.concatenate([logits_of(np.full(on.multiple(1), i))[:1] for i in first[:8]])
    random = found.figures["call to call"] = apart(logits, again)
    interacting = found.figures["alone or in a batch"] = apart(logits[: len(alone)], alone)
    found.flag(
        "probabilities", are_probabilities(logits), "invalid input",
        "the outputs are in [0, 1] and sum to 1: probabilities, whose gradients vanish where the "
        "net is confident; return logits, or their logarithms",
    )  # fmt: skip
    found.flag(
        "random", random > _SAME, "invalid input",
        "two calls with the same input give different logits: attacks that use one draw's gradient "
        "are misled; switch off the randomness, or pass it as a key and attack with samples",
    )  # fmt: skip
    found.flag(
        "interacting rows", interacting > ALONE and random <= _SAME, "invalid input",
        "an example's logits depend on its batch: batch norm in training mode? Use the stored "
        "statistics; otherwise figures depend on the batch size, and gradients mix examples",
    )  # fmt: skip


def _look_at_clean(right: NDArray[np.bool_], usable: NDArray[np.bool_], found: Findings) -> None:
    found.figures["clean"] = accuracy(right)
    found.flag(
        "unusable examples", not usable.all(), "invalid input",
        f"on {accuracy(~usable):.3f} of the examples, x or the logits aren't finite, or the label "
        "is none of the net's classes: these count as wrong; leave them out, or correct them",
    )  # fmt: skip
    found.flag(
        "nothing right", not right.any(), "invalid input",
        "the net classifies no example correctly, so there is nothing to attack; check that the "
        "labels belong to these examples, and that the examples are scaled as in training",
    )  # fmt: skip


def _look_at_budget(
    one_step: NDArray[np.bool_],
    iterated: NDArray[np.bool_],
    thorough: NDArray[np.bool_],
    steps: int,
    found: Findings,
) -> None:
    """Compare the accuracies under one step, PGD, and PGD with a larger budget."""
    single, several, many = map(accuracy, (one_step, iterated, thorough))
    found.figures |= {"one step": single, "pgd": several, "pgd, 4 times the steps, 4 starts": many}
    found.flag(
        "one step", single > several + _ONE_STEP, "weak attack",
        f"one step leaves {single:.3f}, {steps} steps {several:.3f}: a single step is far weaker "
        "here, as it is on many sound nets; report iterated attacks",
    )  # fmt: skip
    found.flag(
        "budget", several - many > _BUDGET, "weak attack",
        f"four times the steps and four starts lower PGD's accuracy by {several - many:.3f}: it "
        "hasn't converged; raise steps and restarts until it has, or use the standard ensemble",
    )  # fmt: skip


def _look_at_gradients(
    batch: Callable[..., dict[str, dict[str, jax.Array]]],
    x: Any,
    y: Any,
    r: NDArray[Any],
    usable: NDArray[np.bool_],
    standing: NDArray[np.bool_],
    batch_size: int,
    found: Findings,
) -> None:
    figures = found.figures
    at_x = host.over_batches(batch, (x, y), batch_size)
    at_end = host.over_batches(batch, (x + r, y), batch_size)
    for name, kinds in at_x.items():
        for kind, start in kinds.items():
            end = at_end[name][kind]
            figures[f"{name} {kind} gradients"] = accuracy((start & usable) | (end & standing))
    # Only the margin, which the gradient attacks above maximise; the others are for information.
    zero, broken = (figures[f"margin {kind} gradients"] for kind in ("zero", "non-finite"))
    found.flag(
        "zero gradients", zero > 0, "gradient masking",
        f"the loss has a gradient of exactly 0 on {zero:.3f} of the examples, at x or where PGD "
        "ended: gradient attacks can't move there; remove rounding, quantisation or saturation, or "
        "attack a smooth surrogate",
    )  # fmt: skip
    found.flag(
        "non-finite gradients", broken > 0, "gradient masking",
        f"the loss's gradient is NaN or infinite on {broken:.3f} of the examples: gradient attacks "
        "can't move there; fix the net's arithmetic",
    )  # fmt: skip


def _look_at_sizes(
    least: Mapping[str, NDArray[Any]],
    right: NDArray[np.bool_],
    standing: NDArray[np.bool_],
    eps: NDArray[Any],
    found: Findings,
) -> NDArray[np.bool_]:
    """Compare the smallest sizes of two attacks; return which examples are robust to all so far."""
    # Count what an attack has found, whatever the score: r ends on the decision boundary, where a
    # net that computes in bfloat16 may round to the other side.
    sizes = {name: np.where(size > 0, size, np.inf) for name, size in least.items()}
    medians = {name: float(np.median(size[right])) for name, size in sizes.items()}
    minimal = np.logical_and.reduce([standing, *(size > eps for size in sizes.values())])
    found.figures |= {f"{name}, median size": median for name, median in medians.items()}
    found.figures["pgd, fmn and fab"] = accuracy(minimal)
    missed = accuracy(standing) - accuracy(minimal)
    found.flag(
        "minimal norm", missed > _BUDGET, "weak attack",
        f"fmn or fab break {missed:.3f} of the examples within eps that PGD leaves standing: PGD's "
        "loss, which depends on the logits' scale, isn't the best guide here; use the standard "
        "ensemble",
    )  # fmt: skip
    low, high = min(medians.values()), max(medians.values())
    found.flag(
        "disagreement", high > _DISAGREE * low, "weak attack",
        f"the median size is {medians['fmn']:.3g} by fmn and {medians['fab']:.3g} by fab: one of "
        "them is misled; trust the smaller, and look for attacks that find smaller ones still",
    )  # fmt: skip
    return minimal


def _compare(
    name: str,
    who: str,
    gradient: NDArray[np.bool_],
    other: NDArray[np.bool_],
    found: Findings,
) -> None:
    misled = found.figures[name] = accuracy(gradient & ~other)
    found.flag(
        name, misled > _BLACK_BOX, "gradient masking",
        f"on {misled:.3f} of the examples, {who} succeeds where attacks with the net's own "
        "gradients fail: these mislead; the true accuracy is lower than any of these figures",
    )  # fmt: skip


@partial(jax.jit, static_argnums=0)
def _gradient_kinds(
    apply_fn: ApplyFn, params: Params, x: jax.Array, y: jax.Array
) -> dict[str, dict[str, jax.Array]]:
    """Return for each loss which gradients are exactly 0, and which are not finite."""
    logits, pull = jacobian.pullback(apply_fn, params, x)
    of = {"ce": optax.softmax_cross_entropy_with_integer_labels, "margin": losses.margin}
    if logits.shape[1] > 2:
        of["dlr"] = losses.dlr
    of_example = tuple(range(1, x.ndim))

    def kinds(loss_fn: LossFn) -> dict[str, jax.Array]:
        g = pull(jax.grad(lambda z: jnp.sum(loss_fn(z, y)))(logits))
        return {
            "zero": jnp.all(g == 0, axis=of_example),
            "non-finite": ~jnp.all(jnp.isfinite(g), axis=of_example),
        }

    return {name: kinds(loss_fn) for name, loss_fn in of.items()}


def _nearest_other(
    apply_fn: ApplyFn, params: Params, x: Any, norm: Norm, batch_size: int
) -> NDArray[Any]:
    """Return each example's distance to the nearest one with another prediction, or else inf."""
    batch = partial(_answers, apply_fn, params)
    answers = jnp.asarray(host.over_batches(batch, (x,), batch_size))
    x = jnp.asarray(x)

    def distance(i: jax.Array) -> jax.Array:
        sizes = norms.norm(x - x[i][None], norm)
        other = (answers != answers[i]) & (answers >= 0) & jnp.isfinite(sizes)
        return jnp.min(jnp.where(other, sizes, jnp.inf))

    return np.asarray(host.fetch(jax.lax.map(distance, jnp.arange(len(x)))))


@partial(jax.jit, static_argnums=0)
def _answers(apply_fn: ApplyFn, params: Params, x: jax.Array) -> jax.Array:
    logits = inputs.apply(apply_fn, params, x)
    return jnp.where(inputs.finite(x, logits), jnp.argmax(logits, axis=1), -1)
