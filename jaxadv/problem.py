r"""The problem that every attack solves, and the tools that attacks share.

A `Problem` holds an attack's arguments: the net, the examples, and the threat model (norm, radius,
box). It checks them once; it evaluates perturbations, the same way for every attack (`value`,
`gradient`); and it sets the result of rows that can't be attacked (`answer`). An attack adds its
algorithm. The one-step methods of `perturb` use it as well, without `start`.

An attack keeps its best perturbation of each example in one of two records:

- `Best`, if it searches a ball: misclassified points first, then the highest loss.
- `Least`, if it searches for the smallest perturbation that is misclassified.

`iterate` is every attack's loop, `run_restarts` repeats an attack from other points, and
`bisect_to_boundary` scales an attack's result down to the boundary. All of `attack` is written with
these; a page of the documentation shows how to write a new attack.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple, TypeAlias, TypeVar, cast

import jax
import jax.numpy as jnp
from jax import lax

from jaxadv import _cpu, boxes, closures, inputs, losses, norms
from jaxadv.types import Bounds, Eps, LossFn, Norm, Params

__all__ = [
    "Best",
    "Least",
    "Problem",
    "beyond_rounding",
    "bisect_to_boundary",
    "fold",
    "iterate",
    "run_restarts",
]

State = TypeVar("State")

CROSSING = 1e-4  # this far past the boundary, relative to the way there, is beyond rounding error
_MASK = 1e3  # a class this far below the top is masked, perhaps by a finite logit such as -1e9


Gradient: TypeAlias = tuple[jax.Array, jax.Array, jax.Array]
"""Whether the attack succeeds on each example, its loss, both `[B]`, and the gradient."""

_STATIC = {"static": True}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Problem:
    """An attack's problem: raise a loss of the net by perturbing x within a threat model.

    Make one with `Problem.of`, which checks the arguments. It is a pytree: the functions, the norm,
    `targeted`, `samples` and `shape` are static, the rest is traced.

    With `samples`, the net is random, `apply_fn(params, x, key)`: each evaluation makes that many
    draws for each example, with the example's own key, and averages losses and logits (expectation
    over transformation, Athalye et al., 2018). Examples then go through the net one by one, so that
    an example's draws don't depend on its batch.

    Attributes:
      apply_fn: `(params, x) -> logits`.
      loss_fn: `(logits, labels) -> [B]`, to maximise, or to minimise if `targeted`.
      norm: the norm of the perturbation.
      targeted: y has target classes instead of true labels.
      samples: number of draws of a random net to average; 0 for a deterministic net.
      params: the first argument of `apply_fn`.
      x: `[B, ...]`; after `start` flattened to `[B, D]`.
      y: labels, integers `[B]`, or whatever `loss_fn` takes; None for a loss without labels.
      eps: the radius of the ball, `[B]`, in the dtype of norms; None for minimal perturbations.
      bounds: the box that x + r stays in, or None.
      keys: one key per example, `[B]`, or None.
      shape: the shape of x before `start` flattened it; None before that.
      logits: the net's output at x, or at the starting point of `start_at`, `[B, K]`; None before
        `start`.
      attackable: which rows can be attacked, see `inputs.attackable`, bool `[B]`; None before
        `start`.
    """

    apply_fn: Callable[..., jax.Array] = field(metadata=_STATIC)
    loss_fn: LossFn = field(metadata=_STATIC)
    norm: Norm = field(metadata=_STATIC)
    targeted: bool = field(metadata=_STATIC)
    samples: int = field(metadata=_STATIC)
    params: Params
    x: jax.Array
    y: Any
    eps: Any
    bounds: Bounds | None
    keys: Any
    shape: tuple[int, ...] | None = field(default=None, metadata=_STATIC)
    logits: Any = None
    attackable: Any = None

    @classmethod
    def of(
        cls,
        apply_fn: Callable[..., jax.Array],
        params: Params,
        x: Any,
        y: Any,
        *,
        norm: Norm,
        eps: Eps | None,
        bounds: Bounds | None,
        loss_fn: LossFn = losses.logit_margin,
        minimal: bool = False,
        any_labels: bool = False,
        targeted: bool = False,
        samples: int = 0,
        key: jax.Array | None = None,
        drawn_by: str | None = None,
    ) -> Problem:
        """Check an attack's arguments, and return them as a problem.

        Args:
          apply_fn: the net.
          params: its parameters.
          x: `[B, ...]`, floating point.
          y: integer labels, `[B]`.
          norm: `"l1"`, `"l2"` or `"linf"`.
          eps: the radius, a scalar or `[B]`.
          bounds: `(lo, hi)`, or None.
          loss_fn: the loss to maximise.
          minimal: the attack can search for minimal perturbations, so eps may be None.
          any_labels: y may be whatever `loss_fn` takes, for instance soft labels, or None.
          targeted: y has target classes instead of true labels.
          samples: number of draws of a random net to average.
          key: one key, or one per example, `[B]`.
          drawn_by: what needs the random numbers, for the error if the key is missing; None if the
            attack is deterministic.

        Raises:
          TypeError: if `x` isn't floating point, `y` not integers, `eps` not a number, or `key`
            isn't a key.
          ValueError: if shapes don't match, the norm is unknown, a Python `eps` is negative,
            `samples` < 0, `bounds` isn't a pair, or a key is missing.
        """
        norms.dual(norm)  # raises if the norm is unknown
        inputs.at_least(0, "samples", samples, "0 is for a deterministic net")
        x = inputs.examples(x)
        if y is not None or not any_labels:
            y = inputs.paired(x, y) if any_labels else inputs.labels(y, x.shape[0])
        if not minimal or eps is not None:
            eps = inputs.radius(cast(Eps, eps), x)
        if bounds is not None:
            inputs.box(bounds, x)  # checked here, where numbers aren't traced yet
            lo, hi = (b if isinstance(b, int | float) else inputs.native(b) for b in bounds)
            bounds = lo, hi
        drawn_by = "the net" if samples else drawn_by
        keys = None if drawn_by is None else inputs.keys(key, x.shape[0], drawn_by)
        return cls(
            apply_fn, loss_fn, norm, targeted, samples, params, x, y, eps, bounds, keys
        )  # fmt: skip

    def keyed(self) -> Problem:
        """Return the problem as an argument for a compiled attack.

        It is recompiled if arrays that `apply_fn` has captured change.
        """
        draws = self.samples > 0
        apply_fn = closures.keyed(self.apply_fn, self.params, self.x, draws=draws)
        return replace(self, apply_fn=apply_fn)

    def start(self) -> Problem:
        """Return the problem with examples flattened to rows, and with the net's logits at x.

        Attacks work on x and r of shape `[B, D]`, whatever the shape of an example. (If the net
        flattens its input, XLA's CPU code adds rows three times as fast as images.)
        """
        problem = self._on_rows()
        return problem.with_logits(jnp.mean(problem._draws(problem.x, 0), axis=0))

    def start_at(self, r: jax.Array) -> tuple[Problem, Gradient]:
        """Return the results of `start` and `gradient`, with one pass through the net, not two.

        The logits, and so the rows that can be attacked, are those at x + r instead of at x.

        Args:
          r: of x's shape and dtype, in the ball and the box.
        """
        problem = self._on_rows()
        r = r.reshape(problem.x.shape)
        (_, (loss, masked, logits)), g = problem._derivative(r, 0)
        return problem.with_logits(logits), (problem.succeeds(masked), loss, g)

    def _on_rows(self) -> Problem:
        shape = self.x.shape
        rows = shape[0], math.prod(shape[1:])

        def flat(bound: Any) -> Any:
            return jnp.broadcast_to(bound, shape).reshape(rows) if jnp.ndim(bound) else bound

        bounds = None if self.bounds is None else (flat(self.bounds[0]), flat(self.bounds[1]))
        return replace(
            self,
            apply_fn=partial(_apply_to_rows, self.apply_fn, shape[1:]),
            x=self.x.reshape(rows),
            bounds=bounds,
            shape=shape,
        )

    def with_logits(self, logits: jax.Array) -> Problem:
        """Return the problem with these logits at x, `[B, K]`."""
        return replace(self, logits=logits, attackable=self._attackable(logits))

    def _attackable(self, logits: jax.Array) -> jax.Array:
        return inputs.attackable(logits, self.y if self._has_classes else None)

    @property
    def _has_classes(self) -> bool:
        return self.y is not None and jnp.issubdtype(self.y.dtype, jnp.integer) and self.y.ndim == 1

    def _draws(self, x: jax.Array, step: jax.Array | int) -> jax.Array:
        """Return logits `[samples, B, K]`."""
        if not self.samples:
            logits = inputs.apply(self.apply_fn, self.params, x)
            return logits.astype(inputs.accum_dtype(logits.dtype))[None]
        keys = fold(self.keys, 1)  # fold(keys, 0) is for starts

        def draw(sample: jax.Array) -> jax.Array:
            def one(example: jax.Array, key: jax.Array) -> jax.Array:
                key = jax.random.fold_in(jax.random.fold_in(key, step), sample)
                return inputs.apply(self.apply_fn, self.params, example[None], key)[0]

            logits = jax.vmap(one)(x, keys)
            return logits.astype(inputs.accum_dtype(logits.dtype))

        return jax.vmap(draw)(jnp.arange(self.samples))

    def _loss(self, draws: jax.Array) -> jax.Array:
        """Return the loss of each example, `[B]`, from logits `[samples, B, K]`."""

        def of_one(logits: jax.Array) -> jax.Array:
            return inputs.losses_of(self.loss_fn(logits, self.y), self.x.shape[0])

        loss = (-1 if self.targeted else 1) * jnp.mean(jax.vmap(of_one)(draws), axis=0)
        return loss.astype(inputs.accum_dtype(self.x.dtype))  # with x64, logits may be wider than x

    def _losses(
        self, r: jax.Array, step: jax.Array | int, without_top: jax.Array | None = None
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
        draws = self._draws(self.x + r, step)
        logits = jnp.mean(draws, axis=0)
        attackable = self._attackable(logits) if self.attackable is None else self.attackable
        # The logits of rows that can't be attacked may be infinite, and their derivatives NaN.
        draws = jnp.where(attackable[None, :, None], draws, 0)
        loss = climbed = self._loss(draws)
        if without_top is not None and self._has_classes and not self.targeted:
            climbed = self._loss(jax.vmap(self._without_top, (0, None))(draws, without_top))
        # A sum over examples, not a mean, so that each row's gradient is that example's own.
        return jnp.sum(climbed), (loss, jnp.mean(draws, axis=0), logits)

    def _derivative(
        self, r: jax.Array, step: jax.Array | int, without_top: jax.Array | None = None
    ) -> Any:
        value, g = jax.value_and_grad(self._losses, has_aux=True)(r, step, without_top)
        # A bfloat16 gradient's direction would swallow small steps.
        return value, g.astype(inputs.accum_dtype(g.dtype))

    def _without_top(self, logits: jax.Array, where: jax.Array) -> jax.Array:
        is_y = jax.nn.one_hot(self.y, logits.shape[1], dtype=bool)
        top, after = losses.top_wrong(logits, is_y)
        where &= jnp.any(after > -jnp.inf, axis=1)
        return jnp.where(top & where[:, None], -jnp.inf, logits)

    def succeeds(self, logits: jax.Array) -> jax.Array:
        """Return for which rows of logits `[B, K]` the attack succeeds, bool `[B]`."""
        if not self._has_classes:
            return jnp.zeros(self.x.shape[0], bool)
        hit = (jnp.argmax(logits, axis=1) == self.y) == self.targeted
        return hit & jnp.all(logits < jnp.inf, axis=1)  # NaN or +inf is no prediction

    def value(self, r: jax.Array, step: jax.Array | int = 0) -> tuple[jax.Array, jax.Array]:
        """Return whether the attack succeeds on each example, and its loss, both `[B]`."""
        _, (loss, logits, _) = self._losses(r, step)
        return self.succeeds(logits), loss

    def judge(self, r: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return `value` of a result r, `[B, ...]`, also in rows that can't be attacked."""
        problem = self._on_rows()
        draws = problem._draws(problem.x + r.reshape(problem.x.shape), 0)
        return problem.succeeds(jnp.mean(draws, axis=0)), problem._loss(draws)

    def gradient(
        self, r: jax.Array, step: jax.Array | int = 0, without_top: jax.Array | None = None
    ) -> Gradient:
        """Return `value` and the gradient of the loss with respect to r, in the dtype of norms.

        Args:
          r: perturbations, `[B, ...]`.
          step: the number of the step, for a net that draws random numbers.
          without_top: the examples whose gradients leave out the top wrong class, bool `[B]`. Where
            this class and y have the same gradient, it hides those of all others.
        """
        (_, (loss, logits, _)), g = self._derivative(r, step, without_top)
        return self.succeeds(logits), loss, g

    def clip_to_box(self, r: jax.Array) -> jax.Array:
        """Return r rounded to x's dtype, and clipped so that x + r lies in the box."""
        return norms.clip_to_box(self.x, r, self.bounds)

    def clip_to_ball(self, r: jax.Array) -> jax.Array:
        """Return the point of the ball of radius eps nearest to r; r itself where eps is None."""
        if self.eps is None:
            return r
        nearest = norms.project(r.astype(self.eps.dtype), self.eps, self.norm)
        return norms.clip_to_box(r, nearest, None)

    def project(self, r: jax.Array) -> jax.Array:
        """Return r projected onto the ball and the box, `[B, ...]`, rounded to x's dtype.

        In l2 this is the nearest point of the ball, clipped to the box.
        """
        return boxes.project_ball_and_box(r, self.x, self.eps, self.norm, self.bounds)

    def answer(self, r: jax.Array) -> jax.Array:
        """Return r, but 0 where a row can't be attacked, NaN where x, logits or eps are unsound.

        Args:
          r: of x's shape and dtype, in the box.

        Returns:
          r in the shape that x had before `start`.
        """
        r = jnp.where(inputs.expand_like(self.attackable, r), r, 0)
        sound = inputs.finite(self.x, self.logits, self.eps)
        r = jnp.where(inputs.expand_like(sound, r), r, jnp.nan)
        return r if self.shape is None else r.reshape(self.shape)


def _apply_to_rows(
    apply_fn: Callable[..., jax.Array],
    shape: tuple[int, ...],
    params: Params,
    rows: jax.Array,
    *key: jax.Array,
) -> jax.Array:
    return apply_fn(params, rows.reshape(rows.shape[0], *shape), *key)


class Best(NamedTuple):
    """Each example's most harmful perturbation so far, ranked by success, then by loss.

    Attributes:
      r: `[B, ...]`.
      success: whether it succeeds, bool `[B]`.
      loss: its loss, `[B]`.
    """

    r: jax.Array
    success: jax.Array
    loss: jax.Array

    @classmethod
    def empty(cls, x: jax.Array) -> Best:
        """Return r = 0 with loss -inf, which any point exceeds."""
        n = x.shape[0]
        loss = jnp.full(n, -jnp.inf, inputs.accum_dtype(x.dtype))
        return cls(jnp.zeros_like(x), jnp.zeros(n, bool), loss)

    def with_point(self, r: jax.Array, success: jax.Array, loss: jax.Array) -> Best:
        """Return the better of this point and another, for each example."""
        better = jnp.where(success == self.success, loss > self.loss, success)
        return self._choose(better, Best(r, success, loss))

    def unless_done(self, other: Best) -> Best:
        """Return this point where it succeeds already, and the better of both elsewhere."""
        return self._choose(~self.success & (other.success | (other.loss > self.loss)), other)

    def _choose(self, better: jax.Array, other: Best) -> Best:
        return Best(
            jnp.where(inputs.expand_like(better, self.r), other.r, self.r),
            jnp.where(better, other.success, self.success),
            jnp.where(better, other.loss, self.loss),
        )


class Least(NamedTuple):
    """Each example's smallest successful perturbation so far.

    Attributes:
      r: `[B, ...]`; 0 before one is found.
      size: its norm, `[B]`; inf before one is found.
    """

    r: jax.Array
    size: jax.Array

    @classmethod
    def empty(cls, x: jax.Array) -> Least:
        """Return r = 0 with size inf, for the time before anything is found."""
        size = jnp.full(x.shape[0], jnp.inf, inputs.accum_dtype(x.dtype))
        return cls(jnp.zeros_like(x), size)

    @property
    def found(self) -> jax.Array:
        """Whether a perturbation was found, bool `[B]`."""
        return jnp.isfinite(self.size)

    def with_point(self, r: jax.Array, size: jax.Array, success: jax.Array) -> Least:
        """Return the smaller of this point and another, where the other succeeds."""
        less = success & (size < self.size)
        return Least(
            jnp.where(inputs.expand_like(less, r), r, self.r), jnp.where(less, size, self.size)
        )


def fold(keys: jax.Array, data: jax.Array | int) -> jax.Array:
    """Derive new keys, one per example, for another purpose or another run.

    Args:
      keys: `[B]`.
      data: an integer.

    Returns:
      Keys, `[B]`.

    Example:
      >>> import jax
      >>> from jaxadv import problem
      >>> keys = jax.random.split(jax.random.key(0), 3)
      >>> bool((problem.fold(keys, 7)[1] == jax.random.fold_in(keys[1], 7)).all())
      True
    """
    return jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, data)


def iterate(
    step: Callable[[Any, State], State],
    state: State,
    steps: jax.Array | int,
    *,
    while_any: Callable[[State], jax.Array] | None = None,
) -> State:
    """Repeat a step of an attack.

    Args:
      step: from the number of the step and the state to the next state.
      state: a pytree of arrays.
      steps: number of steps, at most.
      while_any: from a state to bool `[B]`, the examples that need another step; the loop ends when
        none does. None: all steps are made, and reverse-mode derivatives are available.

    Returns:
      The last state.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxadv.problem import iterate
      >>> iterate(lambda i, x: x + i, jnp.zeros(2), 10, while_any=lambda x: x < 3).tolist()
      [3.0, 3.0]
    """
    step = _cpu.fast_convolutions(step)
    if while_any is None:
        return lax.fori_loop(0, steps, step, state)
    _, state = lax.while_loop(
        lambda carry: (carry[0] < steps) & jnp.any(while_any(carry[1])),
        lambda carry: (carry[0] + 1, step(*carry)),
        (jnp.int32(0), state),
    )
    return state


def run_restarts(
    run: Callable[[jax.Array | int], Best], restarts: int, x: jax.Array
) -> tuple[Best, jax.Array]:
    """Repeat an attack; once it succeeds on an example, its perturbation is kept.

    Args:
      run: from the number of the run to its best perturbations.
      restarts: number of runs, at most: they end when all examples are fooled.
      x: `[B, ...]`.

    Returns:
      The best of all runs, and the number of runs that each example needed, `[B]`.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxadv.problem import Best, run_restarts
      >>> def run(i):  # fools the first example at once, the second in the third run
      ...     r = jnp.full((2, 1), i, jnp.float32)
      ...     return Best(r, jnp.array([True, i == 2]), jnp.zeros(2))
      >>> best, runs = run_restarts(run, 5, jnp.zeros((2, 1)))
      >>> best.r.tolist(), runs.tolist()
      ([[0.0], [2.0]], [1, 3])
    """
    best, runs = Best.empty(x), jnp.zeros(x.shape[0], jnp.int32)
    if restarts == 1:  # a loop of unknown length has no reverse-mode derivative
        return best.unless_done(run(0)), runs + 1

    def again(i: jax.Array, carry: tuple[Best, jax.Array]) -> tuple[Best, jax.Array]:
        best, runs = carry
        return best.unless_done(run(i)), runs + (~best.success).astype(jnp.int32)

    return iterate(again, (best, runs), restarts, while_any=lambda carry: ~carry[0].success)


def beyond_rounding(problem: Problem) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """Return a predicate that accepts a success only if its logit margin exceeds rounding error.

    A minimal perturbation ends on the decision boundary, where two programs may round differently
    and so disagree about its side. If r passes the boundary by `CROSSING` of the way there, and by
    a few ulps of the largest logit, both see it on the far side.

    Args:
      problem: with the logits at x (`Problem.start`).

    Returns:
      A function from the results of `Problem.value`, success and loss, to bool `[B]`.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxadv.problem import Problem, beyond_rounding
      >>> x, y = jnp.array([[1.0, 0.0]]), jnp.array([0])
      >>> problem = Problem.of(lambda _, x: x, None, x, y, norm="l2", eps=1.0, bounds=None)
      >>> clear = beyond_rounding(problem.start())
      >>> clear(jnp.array([True]), jnp.array([1e-6])).tolist()
      [False]
    """
    started, start = problem.value(jnp.zeros_like(problem.x))
    ulps = _ulps(problem.logits).astype(start.dtype)
    least = jnp.where(started, start, jnp.maximum(CROSSING * jnp.abs(start), ulps))

    def clear(success: jax.Array, loss: jax.Array) -> jax.Array:
        return success & (loss >= least)

    return clear


def gap_to_cross(gap: jax.Array, logits: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Return distances between two logits, a few ulps of the largest logit where they are equal.

    At a point exactly on the decision boundary the distance to the linearised boundary is 0, and an
    attack that steps or searches that far would never leave the point.

    Args:
      gap: the distances, 0 or more, `[B]` or `[B, J]`.
      logits: all logits, `[B, K]`.
      dtype: x's dtype; if it is narrower than that of the logits, its ulps count.

    Returns:
      Positive distances, of gap's shape and dtype.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxadv.problem import gap_to_cross
      >>> logits = jnp.array([[1.0, 0.5], [2.0, 2.0]])
      >>> gap = gap_to_cross(jnp.array([0.5, 0.0]), logits, logits.dtype)
      >>> gap[0].item(), 0 < gap[1].item() < 1e-5
      (0.5, True)
    """
    if jnp.finfo(dtype).eps > jnp.finfo(logits.dtype).eps:
        logits = logits.astype(dtype)
    ulps = _ulps(logits)
    least = jnp.where(ulps > 0, ulps, _ulps(jnp.ones_like(logits)))
    return jnp.where(gap == 0, inputs.expand_like(least, gap).astype(gap.dtype), gap)


def _ulps(logits: jax.Array) -> jax.Array:
    """Return 16 ulps of each row's largest logit, of classes that aren't masked."""
    finite = jnp.isfinite(logits)
    top = jnp.max(jnp.where(finite, logits, -jnp.inf), axis=1, keepdims=True)
    counts = finite & (logits >= top - _MASK)
    size = jnp.max(jnp.where(counts, jnp.abs(logits), 0), axis=1)
    return 16 * float(jnp.finfo(logits.dtype).eps) * size


_Bisection = tuple[jax.Array, jax.Array, jax.Array]  # low end, high end, number of tries, all [B]


def bisect_to_boundary(
    succeeds: Callable[[jax.Array], jax.Array], r: jax.Array, found: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Scale each r down to the decision boundary, by bisection between 0 and r.

    Args:
      succeeds: from perturbations to bool `[B]`.
      r: perturbations `[B, ...]`.
      found: which of them succeed, bool `[B]`; the others are returned unchanged.

    Returns:
      The perturbations, and the number of tries for each, `[B]`.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxadv.problem import bisect_to_boundary
      >>> r, tries = bisect_to_boundary(
      ...     lambda r: r[:, 0] >= 3, jnp.array([[8.0]]), jnp.array([True])
      ... )
      >>> r.round(1).tolist(), tries.tolist()
      ([[3.0]], [12])
    """
    dtype = inputs.accum_dtype(r.dtype)

    def scaled(t: jax.Array) -> jax.Array:
        return (inputs.expand_like(t, r) * r.astype(dtype)).astype(r.dtype)

    def coarse(carry: _Bisection) -> jax.Array:
        low, high, _ = carry
        return high - low > 1e-3 * high

    def halve(_: jax.Array, carry: _Bisection) -> _Bisection:
        low, high, tries = carry
        middle = (low + high) / 2
        hit = succeeds(scaled(middle))
        # A finished example doesn't change, however long the others take.
        going = coarse(carry)
        low = jnp.where(going & ~hit, middle, low)
        return low, jnp.where(going & hit, middle, high), tries + going.astype(jnp.int32)

    # If r is 0, there is nothing to search.
    high = (found & (norms.norm(r, "linf") > 0)).astype(dtype)
    none = jnp.zeros(found.shape, jnp.int32)
    ends = jnp.zeros_like(high), high, none
    _, t, tries = iterate(halve, ends, 64, while_any=coarse)
    return jnp.where(inputs.expand_like(found, r), scaled(t), r), tries
