r"""What the attacks that climb a loss have in common: the problem they solve, and the best answer.

A `Problem` is a loss per example, as a function of r, with everything settled that isn't the
attack's own affair: rows that pose no problem, labels that aren't integers, targets to be reached
instead of labels to be left, nets that draw random numbers. A `Best` is the most harmful
perturbation of each example so far. `restarted` repeats an attack from other points.

`pgd` and `apgd` are written on these. For the attacks that look for the least perturbation
instead (`deepfool`, `fmn`): `lead`, `clearly`, `Least`, `to_boundary`, `shrunk` and `within`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxadv import _cpu, inputs, jacobian, losses, norms
from jaxadv.attack import boxed
from jaxadv.types import ApplyFn, Bounds, LossFn, Norm, Params

__all__ = [
    "CROSSING",
    "Best",
    "Least",
    "Problem",
    "clearly",
    "fold",
    "keys",
    "nothing",
    "restarted",
    "shrunk",
    "streams",
    "to_boundary",
    "within",
]


CROSSING = 1e-4  # of the way from x to the boundary, by which r is beyond it for certain


class Best(NamedTuple):
    """The most harmful perturbation so far, by (success, loss), of each example."""

    r: jax.Array  # [B, ...]
    success: jax.Array  # [B]
    loss: jax.Array  # [B]

    def with_point(self, r: jax.Array, success: jax.Array, loss: jax.Array) -> Best:
        """Return the better of these and another point, for each example."""
        better = jnp.where(success == self.success, loss > self.loss, success)
        return self._choose(better, Best(r, success, loss))

    def unless_done(self, other: Best) -> Best:
        """Return these where they succeed already, and the better of both elsewhere."""
        return self._choose(~self.success & (other.success | (other.loss > self.loss)), other)

    def _choose(self, better: jax.Array, other: Best) -> Best:
        return Best(
            jnp.where(inputs.expand_like(better, self.r), other.r, self.r),
            jnp.where(better, other.success, self.success),
            jnp.where(better, other.loss, self.loss),
        )


def nothing(x: jax.Array) -> Best:
    """Return r = 0 with the loss that any point is better than."""
    n = x.shape[0]
    return Best(
        jnp.zeros_like(x), jnp.zeros(n, bool), jnp.full(n, -jnp.inf, inputs.accum_dtype(x.dtype))
    )


class Problem:
    """A loss to be raised in r, for each example of a batch.

    With `samples`, the net is a random one, `(params, x, key) -> logits`: each evaluation draws
    that many for each example by the example's own key, and takes the mean of losses and of logits
    (expectation over transformation, Athalye et al., 2018). Examples then go through it one by one,
    so that what is drawn for one doesn't depend on its batch.
    """

    def __init__(
        self,
        apply_fn: Callable[..., jax.Array],
        params: Params,
        x: jax.Array,
        y: jax.Array,
        loss_fn: LossFn,
        *,
        targeted: bool,
        samples: int = 0,
        keys: jax.Array | None = None,
    ) -> None:
        """Look at the net's answers to x."""
        self.x, self.y = x, y
        self._apply_fn, self._params, self._loss_fn = apply_fn, params, loss_fn
        self._integer = jnp.issubdtype(y.dtype, jnp.integer) and y.ndim == 1
        self._targeted, self._samples = targeted, samples
        self._keys: Any = keys
        self.clean = jnp.mean(self._draws(x, 0), axis=0)  # [B, K]
        self.posed = inputs.attackable(self.clean, y if self._integer else None)

    def _draws(self, x: jax.Array, step: jax.Array | int) -> jax.Array:
        """Return logits `[samples, B, K]`."""
        if not self._samples:
            logits = inputs.apply(self._apply_fn, self._params, x)
            return logits.astype(inputs.accum_dtype(logits.dtype))[None]

        def draw(sample: jax.Array) -> jax.Array:
            def one(example: jax.Array, key: jax.Array) -> jax.Array:
                key = jax.random.fold_in(jax.random.fold_in(key, step), sample)
                return inputs.apply(self._apply_fn, self._params, example[None], key)[0]

            logits = jax.vmap(one)(x, self._keys)
            return logits.astype(inputs.accum_dtype(logits.dtype))

        return jax.vmap(draw)(jnp.arange(self._samples))

    def _loss(self, draws: jax.Array) -> jax.Array:
        """Return the loss of each example, `[B]`, from logits `[samples, B, K]`."""

        def of_one(logits: jax.Array) -> jax.Array:
            return inputs.losses_of(self._loss_fn(logits, self.y), self.x.shape[0])

        loss = (-1 if self._targeted else 1) * jnp.mean(jax.vmap(of_one)(draws), axis=0)
        return loss.astype(
            inputs.accum_dtype(self.x.dtype)
        )  # in 64-bit mode logits may be wider than x

    def _losses(
        self, r: jax.Array, step: jax.Array | int, without_top: jax.Array | None = None
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        draws = self._draws(self.x + r, step)
        # Rows that pose no problem are decided: finite logits keep their derivatives finite.
        draws = jnp.where(self.posed[None, :, None], draws, 0)
        loss = climbed = self._loss(draws)
        if without_top is not None and self._integer and not self._targeted:
            climbed = self._loss(jax.vmap(self._without_top, (0, None))(draws, without_top))
        # A sum over examples, so that the gradient of each is its own.
        return jnp.sum(climbed), (loss, jnp.mean(draws, axis=0))

    def _without_top(self, logits: jax.Array, where: jax.Array) -> jax.Array:
        is_y = jax.nn.one_hot(self.y, logits.shape[1], dtype=bool)
        top, after = losses.top_wrong(logits, is_y)
        where &= jnp.any(after > -jnp.inf, axis=1)
        return jnp.where(top & where[:, None], -jnp.inf, logits)

    def _succeeds(self, logits: jax.Array) -> jax.Array:
        if not self._integer:
            return jnp.zeros(self.x.shape[0], bool)
        hit = (jnp.argmax(logits, axis=1) == self.y) == self._targeted
        return hit & jnp.all(logits < jnp.inf, axis=1)  # NaN is no answer

    def value(self, r: jax.Array, step: jax.Array | int = 0) -> tuple[jax.Array, jax.Array]:
        """Return whether each example is where the attack wants it, and its loss."""
        _, (loss, logits) = self._losses(r, step)
        return self._succeeds(logits), loss

    def gradient(
        self, r: jax.Array, step: jax.Array | int = 0, without_top: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Return the same, and the loss's gradient in r, in the dtype of norms.

        Args:
          r: perturbations, `[B, ...]`.
          step: the number of the step, for a net that draws random numbers.
          without_top: bool `[B]`, whose gradients are taken without the top wrong class. Where that
            class has y's own gradient, it hides those of all others.
        """
        (_, (loss, logits)), g = jax.value_and_grad(self._losses, has_aux=True)(
            r, step, without_top
        )
        # A bfloat16 gradient's direction would swallow small steps.
        return self._succeeds(logits), loss, g.astype(inputs.accum_dtype(g.dtype))

    def answer(self, r: jax.Array, eps: jax.Array | None) -> jax.Array:
        """Return r, 0 where no problem is posed, NaN where x, its logits or eps are not finite."""
        r = jnp.where(inputs.expand_like(self.posed, r), r, 0)
        return jnp.where(inputs.expand_like(inputs.finite(self.x, self.clean, eps), r), r, jnp.nan)


def restarted(run: Callable[[jax.Array | int], Best], restarts: int, initial: Best) -> Best:
    """Return the best of several runs; an example that has been fooled is left as it is.

    Args:
      run: from the number of the run to the best of it.
      restarts: how many runs, at most: none is made once all examples are fooled.
      initial: the best before the first.
    """
    if restarts == 1:  # a loop of unknown length has no derivative
        return initial.unless_done(run(0))

    def more(carry: tuple[jax.Array, Best]) -> Any:
        return (carry[0] < restarts) & ~jnp.all(carry[1].success)

    @_cpu.fast_convolutions
    def again(carry: tuple[jax.Array, Best]) -> tuple[jax.Array, Best]:
        i, best = carry
        return i + 1, best.unless_done(run(i))

    return lax.while_loop(more, again, (jnp.int32(0), initial))[1]


def keys(
    key: jax.Array | None, x: jax.Array, random_start: bool, restarts: int, samples: int
) -> jax.Array | None:
    """Check how often and from where an attack starts; return a key per example if it draws any.

    Raises:
      TypeError: if `key` isn't one.
      ValueError: if `restarts` < 1 or `samples` < 0, or a key is missing.
    """
    inputs.at_least(1, "restarts", restarts, "1 is a single run")
    inputs.at_least(0, "samples", samples, "0 is for a net that draws no random numbers")
    if random_start or restarts > 1 or samples:
        name = "the net" if samples else "a random start"
        return inputs.keys(key, x.shape[0], name)
    return None


def fold(keys: jax.Array, data: jax.Array | int) -> jax.Array:
    """Return each example's key for one more purpose, or one more run."""
    return jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, data)


def streams(keys: jax.Array | None) -> tuple[Any, Any]:
    """Return each example's keys for its starts and for its net's draws; None without keys."""
    return (None, None) if keys is None else (fold(keys, 0), fold(keys, 1))


def clearly(problem: Problem) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """Return the function that tells which successes, of which lead, are more than rounding.

    A least perturbation ends on the boundary itself, on one side of it in this program and on the
    other in the next. Beyond it by `CROSSING` of the way there, and by some ulps of the largest
    logit, it is on the far side in both.
    """
    started, start = problem.value(jnp.zeros_like(problem.x))
    size = jnp.max(jnp.where(jnp.isfinite(problem.clean), jnp.abs(problem.clean), 0), axis=1)
    ulps = (16 * jnp.finfo(start.dtype).eps * size).astype(start.dtype)
    least = jnp.where(started, start, jnp.maximum(CROSSING * jnp.abs(start), ulps))

    def clear(success: jax.Array, loss: jax.Array) -> jax.Array:
        return success & (loss >= least)

    return clear


class Least(NamedTuple):
    """The smallest r that succeeds so far, of each example."""

    r: jax.Array  # [B, ...]; 0 before one is found
    size: jax.Array  # [B]; inf before one is found

    def with_point(self, r: jax.Array, size: jax.Array, success: jax.Array) -> Least:
        """Return the smaller of these and another point, for each example that it succeeds on."""
        less = success & (size < self.size)
        return Least(
            jnp.where(inputs.expand_like(less, r), r, self.r), jnp.where(less, size, self.size)
        )


def to_boundary(
    apply_fn: ApplyFn,
    params: Params,
    x: jax.Array,
    y: jax.Array,
    norm: Norm,
    bounds: Bounds | None,
    candidates: int | None = None,
    *,
    walls: jax.Array | bool = True,
) -> jax.Array:
    """Return the least step onto the nearest linearised boundary between two logits.

    Nearest by the entries that no wall of the box stops at x, or by all of them. In l1, whose step
    has one entry that a wall may stop halfway, the step is the least inside the box to a thousandth
    beyond the boundary.

    Args:
      apply_fn: `(params, x) -> logits`.
      params: its parameters.
      x: `[B, ...]`.
      y: labels, `[B]`.
      norm: of the step.
      bounds: the box; None for no box.
      candidates: consider only this many classes, the likeliest besides y; all if None. Each costs
        a backward pass.
      walls: leave out the entries that a wall stops.

    Returns:
      The step, of x's shape, in the dtype of norms; 0 where no boundary can be seen.
    """
    logits, pull = jacobian.pullback(apply_fn, params, x)
    n_classes = logits.shape[1]
    y = jnp.clip(y, 0, n_classes - 1)
    z = losses.shift_logits(logits)
    z_y = jnp.take_along_axis(z, y[:, None], axis=1)
    at_y = jax.nn.one_hot(y, n_classes)
    free = jax.vmap(boxed.free(x, bounds), in_axes=(1, None), out_axes=1)

    def distances(j: jax.Array) -> jacobian.Nearest:  # to classes [B, J]
        rows = jax.nn.one_hot(j, n_classes) - at_y[:, None]
        d = jax.vmap(pull, in_axes=1, out_axes=1)(rows.astype(logits.dtype))  # [B, J, ...]
        d = jnp.where(walls, free(d, jnp.zeros_like(x)), d)
        slope = norms.norm(d.reshape(j.size, *x.shape[1:]), norms.dual(norm)).reshape(j.shape)
        usable = (slope > 0) & jnp.isfinite(slope)
        reachable = usable & ~jnp.isneginf(jnp.take_along_axis(logits, j, axis=1))
        behind = jnp.abs(z_y - jnp.take_along_axis(z, j, axis=1)).astype(slope.dtype)
        size = jnp.where(reachable, behind / jnp.where(reachable, slope, 1), jnp.inf)
        return jacobian.Nearest(size, size, d, reachable)

    classes = jacobian.other_classes(y, n_classes)
    if candidates is not None and candidates < n_classes - 1:
        classes = lax.top_k(jnp.where(at_y == 1, -jnp.inf, z), candidates)[1]
    best = jacobian.nearest(distances, x, classes)
    size = jnp.where(best.reachable, best.distance, 0)
    d = best.d.astype(size.dtype)
    if norm == "l1" and bounds is not None:
        # A thousandth past it: to lengthen the step moves none of its entries that are at a wall.
        gap = 1.001 * size * norms.norm(d, norms.dual(norm))
        return boxed.to_plane(d, gap, *boxed.room(x, bounds), norm)
    return inputs.expand_like(size, x) * norms.steepest(d, norm)


def shrunk(succeeds: Callable[[jax.Array], jax.Array], r: jax.Array, found: jax.Array) -> jax.Array:
    """Return each r scaled down, as far as a bisection between 0 and r still finds success.

    Args:
      succeeds: from perturbations to bool `[B]`.
      r: perturbations `[B, ...]`.
      found: which of them succeed; the others come back as they are.
    """
    dtype = inputs.accum_dtype(r.dtype)

    def scaled(t: jax.Array) -> jax.Array:
        return (inputs.expand_like(t, r) * r.astype(dtype)).astype(r.dtype)

    def coarse(low: jax.Array, high: jax.Array) -> jax.Array:
        return high - low > 1e-3 * high

    def more(carry: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        i, low, high = carry
        return (i < 64) & jnp.any(coarse(low, high))

    @_cpu.fast_convolutions
    def halve(carry: tuple[jax.Array, jax.Array, jax.Array]) -> Any:
        i, low, high = carry
        middle = (low + high) / 2
        hit = succeeds(scaled(middle))
        # An example that is done stays as it is, however long the others take.
        going = coarse(low, high)
        low = jnp.where(going & ~hit, middle, low)
        return i + 1, low, jnp.where(going & hit, middle, high)

    # Between 0 and 0 there is nothing to look for.
    high = (found & (norms.norm(r, "linf") > 0)).astype(dtype)
    _, _, t = lax.while_loop(more, halve, (jnp.int32(0), jnp.zeros_like(high), high))
    return jnp.where(inputs.expand_like(found, r), scaled(t), r)


def within(r: jax.Array, eps: jax.Array | None, norm: Norm) -> jax.Array:
    """Return the nearest point of the ball of radius eps; r itself if there is no eps."""
    if eps is None:
        return r
    return norms.clip_to_box(
        r, norms.project(r.astype(inputs.accum_dtype(r.dtype)), eps, norm), None
    )
