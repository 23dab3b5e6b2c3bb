"""Signs that a robust accuracy shouldn't be believed.

Robust accuracy is what attacks have failed to break, so that whatever weakens an attack looks like
robustness: gradients that vanish, a net that answers at random, examples that influence each other,
a box or a budget too small to get anywhere (Athalye et al., 2018; Carlini et al., 2019). Each has a
symptom that can be measured. `check` measures them on some hundred examples and raises a flag for
each that it finds; that no flag is raised proves nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from numpy.typing import NDArray

from jaxadv import attack, host, inputs, jacobian, meshes, norms, perturb
from jaxadv.evaluate.masks import accuracy, clean, perturbations
from jaxadv.types import ApplyFn, Bounds, Eps, LossFn, Norm, Params, PerturbFn

__all__ = ["Flag", "Report", "check"]

# How large a symptom has to be. Accuracies are compared on the same examples, so that a difference
# isn't sampling noise; these are the differences between sound attacks on sound nets, doubled.
_SAME = 1e-4  # logits of the same row, relative to the largest
_BLACK_BOX = 0.005  # accuracy that Square, or a transferred attack, takes from the gradient attacks
_BUDGET = 0.02  # accuracy that four times the steps and four restarts take from PGD
_ONE_STEP = 0.2  # how far one step's accuracy may be above the iterated one
_FAR = 0.02  # accuracy left where every example is known to have an adversarial one
_DISAGREE = 1.25  # ratio of the median sizes that two minimal attacks find


class Flag(NamedTuple):
    """One sign that a figure shouldn't be believed.

    Attributes:
      name: which.
      message: what was measured, what it means, and what to do.
    """

    name: str
    message: str


class Report(NamedTuple):
    """What `check` has found.

    Attributes:
      flags: what is wrong, if anything.
      figures: all that was measured, by name.
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
    """Look for signs that a net's robust accuracy shouldn't be believed.

    The names of the flags, and what raises them:

    - `probabilities`: outputs are in [0, 1] and sum to 1.
    - `random`: the same input gives other logits at another call.
    - `interacting rows`: a row's logits depend on its batch.
    - `zero gradients`, `non-finite gradients`: of the loss that attacks follow, at the examples or
      at the points where PGD ended without success.
    - `one step`: a single step's accuracy is far above PGD's, so that the former says nothing.
    - `budget`: more steps and restarts still lower PGD's accuracy.
    - `black box`: Square breaks what PGD doesn't (images in l2 and linf alone).
    - `transfer`: so do perturbations made on `source`.
    - `far`: without a box, and at the distance of the nearest other example that the net answers
      otherwise, PGD still fails.
    - `disagreement`: `fmn` and `fab` find minimal sizes that are far apart.

    Args:
      apply_fn: `(params, x) -> logits`, `[B, ...]` to `[B, K]`.
      params: the first argument of `apply_fn`.
      x: `[n, ...]`, floating point; some hundred examples are enough.
      y: integer labels, `[n]`.
      eps: the size that is evaluated, a scalar or `[n]`.
      norm: its norm.
      key: one key, or one per example, `[n]`.
      bounds: `(lo, hi)`, the box that is evaluated in; None for no box.
      source: another net with its parameters, to make transferred perturbations on.
      steps: PGD's number of steps; other budgets are multiples of it.
      batch_size: how many go through the net at a time.

    Returns:
      `Report`. Its figures also have the share of examples without a usable gradient for each loss
      that attacks climb: `margin zero gradients` (PGD, APGD on cross-entropy), `dlr zero
      gradients`, `ce zero gradients`, and the same `non-finite`. Where plain cross-entropy alone
      has none, in float32, it is no fault of the net, and no obstacle to the attacks of this
      library, but one for others. Of a net that answers no example right there are no figures of
      attacks.

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
        raise ValueError("expected at least one example, got none; pass some hundred")
    eps = host.per_example(x, eps, None)[0]
    keys = inputs.keys(key, len(y), "an attack of the check")
    figures: dict[str, float] = {}
    flags: list[Flag] = []

    def flag(name: str, raised: bool, message: str) -> None:
        if raised:
            flags.append(Flag(name, message))

    _look_at_outputs(apply_fn, params, x[:batch_size], y[:batch_size], figures, flag)

    right = clean(apply_fn, params, x, y, batch_size=batch_size)
    figures["clean"] = accuracy(right)
    if not right.any():
        return Report(tuple(flags), figures)

    def standing(
        method: PerturbFn,
        eps: Eps = eps,
        *,
        bounds: Bounds | None = bounds,
        of: tuple[ApplyFn, Params] = (apply_fn, params),
    ) -> tuple[NDArray[np.bool_], NDArray[Any]]:
        r = perturbations(
            *of, x, y, method, eps=eps, key=keys, bounds=bounds, batch_size=batch_size
        )
        return right & clean(apply_fn, params, x + r, y, batch_size=batch_size), r

    attacks = _attacks(norm, steps)
    one_step, _ = standing(attacks["one step"])
    iterated, r = standing(attacks["pgd"])
    thorough, _ = standing(attacks["thorough"])
    figures["one step"], figures["pgd"] = accuracy(one_step), accuracy(iterated)
    figures["pgd, 4 times the steps, 4 starts"] = accuracy(iterated & thorough)

    _look_at_gradients(apply_fn, params, x, y, r, iterated, batch_size, figures, flag)
    flag(
        "one step", figures["one step"] > figures["pgd"] + _ONE_STEP,
        f"one step leaves {figures['one step']:.3f}, {steps} steps {figures['pgd']:.3f}: "
        "the net bends its loss where single steps look; report iterated attacks",
    )  # fmt: skip
    gained = figures["pgd"] - figures["pgd, 4 times the steps, 4 starts"]
    flag(
        "budget", gained > _BUDGET,
        f"four times the steps and four starts lower PGD's accuracy by {gained:.3f}: it has not "
        "converged; raise steps and restarts until it has, or use the standard ensemble",
    )  # fmt: skip

    gradient = iterated & thorough
    if norm != "l1" and x.ndim == 4:
        square, _ = standing(attacks["square"])
        _compare("black box", "Square", gradient, square, figures, flag)
    if source is not None:
        transferred, _ = standing(attacks["pgd"], of=source)
        _compare("transfer", "a transferred attack", gradient, transferred, figures, flag)

    apart = _nearest_other(apply_fn, params, x, norm, batch_size)
    known = np.isfinite(apart)
    far, _ = standing(attacks["pgd"], jnp.where(known, apart, 0), bounds=None)
    if known.any():
        figures["pgd, far"] = accuracy((far & known)[known])
        flag(
            "far", figures["pgd, far"] > _FAR,
            f"without a box, {figures['pgd, far']:.3f} withstand PGD at a size that reaches an "
            "example of another answer: gradients don't lead where adversarial points are known",
        )  # fmt: skip

    medians = {}
    for name in ("fmn", "fab"):
        batch = partial(_minimal_sizes, apply_fn, attacks[name], norm, params, bounds)
        sizes = np.asarray(host.over_batches(batch, (x, y), batch_size))
        medians[name] = figures[f"{name}, median size"] = float(np.median(sizes[right]))
    low, high = min(medians.values()), max(medians.values())
    flag(
        "disagreement", high > _DISAGREE * low,
        f"half of the examples need {medians['fmn']:.3g} by fmn and {medians['fab']:.3g} by fab: "
        "one of them is misled; believe the smaller, and look for attacks that find less still",
    )  # fmt: skip
    return Report(tuple(flags), figures)


@cache
def _attacks(norm: Norm, steps: int) -> dict[str, Any]:
    """Return the attacks of a check; the same objects each time, so that they are compiled once."""
    return {
        "one step": partial(perturb.loss, norm=norm),
        "pgd": partial(attack.pgd, norm=norm, steps=steps),
        "thorough": partial(attack.pgd, norm=norm, steps=4 * steps, restarts=4),
        "square": partial(attack.square, norm=norm, steps=10 * steps),
        "fmn": partial(attack.fmn, norm=norm, steps=4 * steps),
        "fab": partial(attack.fab, norm=norm, steps=steps),
    }


Raise = Callable[[str, bool, str], None]


def _look_at_outputs(
    apply_fn: ApplyFn, params: Params, x: Any, y: Any, figures: dict[str, float], flag: Raise
) -> None:
    x = jnp.asarray(x)
    # Not compiled, so that a net that draws random numbers behind JAX's back draws them anew.
    first, second = (host.fetch(inputs.apply(apply_fn, params, x)) for _ in range(2))
    logits, again = (np.asarray(outputs, np.float64) for outputs in (first, second))
    alone = np.concatenate(
        [host.fetch(inputs.apply(apply_fn, params, x[i : i + 1])) for i in range(min(8, len(x)))]
    )
    scale = max(np.abs(logits, where=np.isfinite(logits), out=np.zeros_like(logits)).max(), 1e-30)

    def apart(a: NDArray[Any], b: NDArray[Any]) -> float:
        both = np.isfinite(a)
        if np.any(both != np.isfinite(b)):
            return np.inf
        return float(np.max(np.abs(np.where(both, a, 0) - np.where(both, b, 0))) / scale)

    figures["call to call"] = apart(logits, again)
    figures["alone or in a batch"] = apart(logits[: len(alone)], alone)
    sound = logits[np.isfinite(logits).all(axis=1)]
    rounding = max(1e-3, 2 * float(jnp.finfo(first.dtype).eps))  # of a sum of rounded entries
    sums = np.abs(sound.sum(axis=1) - 1) < rounding
    probabilities = bool(len(sound) and (sound >= 0).all() and (sound <= 1).all() and sums.all())
    flag(
        "probabilities", probabilities,
        "the outputs are in [0, 1] and sum to 1: probabilities, whose gradients vanish where the "
        "net is confident; return logits, or their logarithms",
    )  # fmt: skip
    flag(
        "random", figures["call to call"] > _SAME,
        "the same input gives other logits at another call: attacks that take one gradient are "
        "misled; switch the randomness off, or pass it as a key and attack with samples",
    )  # fmt: skip
    flag(
        "interacting rows",
        figures["alone or in a batch"] > _SAME and figures["call to call"] <= _SAME,
        "an example's logits depend on its batch: batch norm in training mode? Use the stored "
        "statistics, or figures depend on the batch size and gradients are not the example's own",
    )


def _look_at_gradients(
    apply_fn: ApplyFn,
    params: Params,
    x: Any,
    y: Any,
    r: NDArray[Any],
    standing: NDArray[np.bool_],
    batch_size: int,
    figures: dict[str, float],
    flag: Raise,
) -> None:
    losses: dict[str, LossFn] = {
        "ce": optax.softmax_cross_entropy_with_integer_labels,
        "margin": jacobian.margin,
    }
    if jax.eval_shape(apply_fn, params, x[:1]).shape[1] > 2:
        losses["dlr"] = attack.dlr
    for name, loss_fn in losses.items():
        batch = partial(_gradient_kind, apply_fn, loss_fn, params)
        at_x = host.over_batches(batch, (x, y), batch_size)
        at_end = host.over_batches(batch, (x + r, y), batch_size)
        for kind, start, end in zip(("zero", "non-finite"), at_x, at_end, strict=True):
            figures[f"{name} {kind} gradients"] = accuracy(start | (end & standing))
    # The loss that all gradient attacks here follow; plain cross-entropy is counted for others.
    zero, broken = (figures[f"margin {kind} gradients"] for kind in ("zero", "non-finite"))
    flag(
        "zero gradients", zero > 0,
        f"the loss has a gradient of exactly 0 on {zero:.3f} of the examples, at x or where PGD "
        "ended: gradient attacks can't move there; remove what rounds, quantises or saturates, "
        "or attack a smooth stand-in",
    )  # fmt: skip
    flag(
        "non-finite gradients", broken > 0,
        f"the loss's gradient is NaN or infinite on {broken:.3f} of the examples: these count as "
        "they are, not as attacked; mend the net's arithmetic",
    )  # fmt: skip


def _compare(
    name: str,
    who: str,
    gradient: NDArray[np.bool_],
    other: NDArray[np.bool_],
    figures: dict[str, float],
    flag: Raise,
) -> None:
    figures[name] = accuracy(gradient & ~other)
    flag(
        name, figures[name] > _BLACK_BOX,
        f"{who} breaks {figures[name]:.3f} of the examples that gradients of the net itself don't: "
        "these gradients mislead; the true accuracy is lower than any of these figures",
    )  # fmt: skip


@partial(jax.jit, static_argnums=(0, 1))
def _gradient_kind(
    apply_fn: ApplyFn, loss_fn: LossFn, params: Params, x: jax.Array, y: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return which examples have a gradient of exactly 0, and which one that isn't finite."""

    def total(x: jax.Array) -> jax.Array:
        return jnp.sum(loss_fn(inputs.apply(apply_fn, params, x), y))

    g = jax.grad(total)(x)
    of_example = tuple(range(1, g.ndim))
    return jnp.all(g == 0, axis=of_example), ~jnp.all(jnp.isfinite(g), axis=of_example)


def _nearest_other(
    apply_fn: ApplyFn, params: Params, x: Any, norm: Norm, batch_size: int
) -> NDArray[Any]:
    """Return how far each example is from the nearest one with another answer; inf if none has."""
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


@partial(jax.jit, static_argnums=(0, 1, 2))
def _minimal_sizes(
    apply_fn: ApplyFn,
    method: Callable[..., jax.Array],
    norm: Norm,
    params: Params,
    bounds: Bounds | None,
    x: jax.Array,
    y: jax.Array,
) -> jax.Array:
    """Return the size of each right example's minimal perturbation; inf where none was found."""
    size = norms.norm(method(apply_fn, params, x, y, bounds=bounds), norm)
    # As the attack has seen it: a net that computes in bfloat16 may round in this program to the
    # other side of the boundary that r ends on.
    return jnp.where(size > 0, size, jnp.inf)
