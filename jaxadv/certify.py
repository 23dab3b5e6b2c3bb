r"""Certified l2 robustness by randomized smoothing: lower bounds, where attacks give upper bounds.

Smoothing turns any net f into another classifier g, which predicts the class that f returns most
often when Gaussian noise is added to the input:

.. math:: g(x) = \arg\max_c\; p_c(x), \qquad
          p_c(x) = P\bigl(f(\lfloor x + \sigma Z \rceil) = c\bigr), \quad Z \sim N(0, I)

(:math:`\lfloor\cdot\rceil` rounds each entry to a grid that is far finer than the noise, see
below). If :math:`p_A(x) > 1/2`, then g predicts A everywhere within the radius
:math:`\sigma \Phi^{-1}(p_A(x))` of x (Cohen et al., 2019). The probability is bounded by sampling
f, so each example's certificate is wrong with a probability of at most alpha.

- `certify`: a lower bound on p_A, and from it a radius, for each example of a data set.
- `predict`: g's class, or an abstention where the draws don't decide.
- `smooth`: the net with noise, for attacks with `samples=`, which bound the robustness of g from
  above.

**Floating point.** Common samplers truncate the tails of the normal distribution, and sums with
noise are rounded, so a radius may be certified that isn't robust (Voracek and Hein, 2022). Here x
and the noise are rounded to a grid on which sums are exact (`_gaussian`), and the resulting errors
are subtracted: from p_A the total variation distance to exact noise (less than 4e-11 for each
entry), and from the radius the distance between x and the rounded x.

Two assumptions remain: that pseudo-random bits (threefry) are as good as random ones, and that f is
a function. In practice its logits may depend on the batch or the machine by rounding error, which
matters where two classes nearly tie.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from numpy.typing import NDArray
from scipy import special  # not stats, whose import takes half a second

from jaxadv import _cpu, _gaussian, closures, host, inputs, meshes
from jaxadv.evaluate import Progress, _batches
from jaxadv.types import ApplyFn, Norm, Params, StochasticFn

__all__ = ["STAGES", "Certificate", "Prediction", "certify", "predict", "smooth"]

STAGES: tuple[int, ...] = (
    2000, 8000, 10_000, 12_000, 15_000, 20_000, 30_000, 40_000, 60_000, 100_000,
)  # fmt: skip
"""Numbers of draws at the looks of `certify`; there are many, since looks cost little."""


class Prediction(NamedTuple):
    """The smoothed classifier's predictions; every leaf has n rows.

    Attributes:
      label: the class drawn most often, `[n]`; -1 if no draw had finite logits.
      counts: how often each class was drawn, `[n, K]`. An example stops when the remaining draws
        can't change its answer, after 11/20 of them at the earliest.
      abstained: whether the draws don't decide at this alpha that `label` is g's class, bool `[n]`.
    """

    label: NDArray[np.intp]
    counts: NDArray[np.int64]
    abstained: NDArray[np.bool_]


class Certificate(NamedTuple):
    """The certificates; every leaf has n rows.

    The certified accuracy at a size is the mean of `(label == y) & (radius >= size)`.

    Attributes:
      label: A, the class chosen by the first n0 draws, `[n]`; -1 if none had finite logits.
      counts: how often each class was drawn after these, `[n, K]`.
      samples: the number of draws after these, `[n]`.
      lower: a lower bound on p_A, less the sampler's error, `[n]`; 0 where none was computed.
      radius: g predicts `label` within this l2 distance of x, `[n]`; 0 if abstained.
      abstained: whether p_A may be 1/2 or less, or A isn't the label given, bool `[n]`.
    """

    label: NDArray[np.intp]
    counts: NDArray[np.int64]
    samples: NDArray[np.int64]
    lower: NDArray[np.float64]
    radius: NDArray[np.float64]
    abstained: NDArray[np.bool_]

    @property
    def prediction(self) -> NDArray[np.intp]:
        """The class drawn most often after the first n0 draws, `[n]`; -1 if there was none.

        An example with no hope of a certificate stops without a bound, so it counts as `abstained`;
        this is its class all the same.
        """
        return _most_frequent(self.counts)


@dataclass(frozen=True)
class _Smooth:
    """Compares equal for the same net and noise, so that attacks on it are compiled once."""

    apply_fn: ApplyFn
    sigma: float

    def __call__(self, params: Params, x: jax.Array, key: jax.Array, /) -> jax.Array:
        wide = x.astype(inputs.accum_dtype(x.dtype))
        noisy = wide + _gaussian.noise(key, x.shape, self.sigma).astype(wide.dtype)
        return self.apply_fn(params, noisy.astype(x.dtype))


def smooth(apply_fn: ApplyFn, sigma: float) -> StochasticFn:
    r"""Add Gaussian noise to a net's input, so that attacks can average over draws.

    To attack the smoothed classifier: `attack.pgd(net, params, x, y, eps=1.0, samples=8, key=key)`,
    and likewise with `attack.apgd`. Their bounds apply to x + r, before the noise is added. Here x
    isn't rounded to the grid, so that gradients exist.

    Args:
      apply_fn: `(params, x) -> logits`, `[B, ...]` to `[B, K]`.
      sigma: the noise's standard deviation, positive.

    Returns:
      `(params, x, key) -> logits`, the net at x plus noise, drawn as `certify` draws it.

    Raises:
      TypeError: if `apply_fn` isn't a function, or has no hash.
      ValueError: if `sigma` isn't positive and finite.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxadv import attack, certify
      >>> net = certify.smooth(lambda w, x: x @ w, 0.5)
      >>> w, x, y = jnp.eye(2), jnp.array([[2.0, 1.0]]), jnp.array([0])
      >>> r = attack.pgd(net, w, x, y, eps=0.5, steps=5, samples=4, key=jax.random.key(0))
      >>> print(r.round(2))
      [[-0.35  0.35]]

    References:
      Cohen et al., "Certified Adversarial Robustness via Randomized Smoothing", 2019; Salman et
      al., "Provably Robust Deep Learning via Adversarially Trained Smoothed Classifiers", 2019.
    """
    closures.hashable("apply_fn", apply_fn)
    return _Smooth(apply_fn, _checked_sigma(sigma))


_LOOKS = range(11, 21)
"""When `predict` checks whether the remaining draws matter, in twentieths of n."""


@meshes.auto_axes()
def predict(
    apply_fn: ApplyFn,
    params: Params,
    x: Any,
    *,
    sigma: float,
    alpha: float = 0.001,
    n: int = 10_000,
    key: jax.Array,
    batch_size: int = 500,
    store: str | os.PathLike[str] | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Prediction:
    """Predict the class that a net returns most often under noise, or abstain.

    It abstains unless a two-sided binomial test at level alpha separates the class from the
    runner-up. So for each example the probability of a class other than g's is at most alpha (for x
    rounded to the grid, and up to the sampler's total variation distance, see the module).

    Args:
      apply_fn: `(params, x) -> logits`, `[B, ...]` to `[B, K]`, deterministic.
      params: the first argument of `apply_fn`.
      x: `[n, ...]`, floating point, on the host or the device.
      sigma: the noise's standard deviation, positive.
      alpha: the probability of a wrong class, in (0, 1).
      n: number of draws for each example, at least 1; fewer if the rest can't change the answer.
      key: one key, split per example, or one per example.
      batch_size: number of noisy examples in each pass through the net.
      store: as for `certify`.
      progress: called after each batch, e.g. `print`.

    Returns:
      `Prediction`.

    Raises:
      TypeError: as `certify`.
      ValueError: as `certify`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxadv import certify
      >>> x = jnp.array([[0.0, 1.0], [0.0, 0.0]])
      >>> found = certify.predict(
      ...     lambda params, x: x, None, x, sigma=0.5, n=1000, key=jax.random.key(0)
      ... )
      >>> found.label[0].item(), found.abstained.tolist()
      (1, [False, True])

    References:
      Cohen et al., "Certified Adversarial Robustness via Randomized Smoothing", 2019.
    """
    _checked_alpha(alpha)
    inputs.at_least(1, "n", n, "10000 is usual")
    draws = _Draws.of("predict", apply_fn, params, x, None, sigma, key, batch_size, progress)
    draws = draws.kept(store, n=n, alpha=alpha)
    counts, undecided = np.zeros((len(draws.x), draws.classes), int), np.ones(len(draws.x), bool)
    looks = sorted({-(-n * part // 20) for part in _LOOKS})
    for look, (before, last) in enumerate(pairwise((0, *looks))):
        rows = np.flatnonzero(undecided)
        counts[rows] += draws.counts(rows, before, last, look)
        below, top = np.sort(counts[rows], axis=1)[:, -2:].T
        most = below + n - last  # the runner-up's count if it gets all remaining draws
        p_value = np.minimum(2 * special.bdtrc(top - 1, top + most, 0.5), 1)
        undecided[rows] = p_value > alpha
    return Prediction(_most_frequent(counts), counts, undecided)


@meshes.auto_axes()
def certify(
    apply_fn: ApplyFn,
    params: Params,
    x: Any,
    y: Any = None,
    *,
    sigma: float,
    radii: Sequence[float],
    alpha: float = 0.001,
    n0: int = 100,
    stages: Sequence[int] = STAGES,
    norm: Norm = "l2",
    key: jax.Array,
    batch_size: int = 500,
    store: str | os.PathLike[str] | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Certificate:
    r"""Compute certified l2 radii, within which the smoothed classifier's prediction is constant.

    .. math:: \text{radius} = \sigma\, \Phi^{-1}(\underline{p}_A)

    n0 draws choose a class A. The bound uses further draws, which are evaluated at interim looks,
    after the numbers of draws in `stages`. Sampling of an example stops at the first look that
    decides all `radii`: each is certified, or is unlikely to be certified.

    **The probability of an error is at most alpha for each example.** A and the bound use different
    draws. Given A, the looks have Clopper-Pearson bounds L_1, L_2, ... on p_A, where L_i exceeds
    p_A with probability at most alpha_i, and the alpha_i add up to alpha. So with probability at
    least 1 - alpha all of them hold, and with them `lower`, their maximum up to any look. Therefore
    sampling may stop at any time, for any reason, and one bound serves all radii, which are
    functions of it. Stopping without a certificate claims nothing, and needs no part of alpha: a
    look with too few draws to certify even the smallest of `radii` has no bound and alpha_i = 0.
    The last look, which decides the closest cases, gets four fifths of alpha if other looks have a
    bound; those share the rest. A radius is given up when, even if p_A were equal to its 95% upper
    bound, the last look would certify it with a probability below 5%.

    alpha is per example: among n examples, at most alpha n certificates are expected to be wrong.
    (With alpha = 0.05 / n, all hold with probability at least 0.95.)

    Args:
      apply_fn: `(params, x) -> logits`, `[B, ...]` to `[B, K]`, deterministic: batch norm uses its
        stored statistics, and dropout is off.
      params: the first argument of `apply_fn`.
      x: `[n, ...]`, floating point, on the host or the device.
      y: integer labels, `[n]`; examples for which A is another class stop at once, and abstain.
        None to certify A, whichever class it is.
      sigma: the noise's standard deviation, positive.
      radii: the l2 sizes that you will report, positive. An example stops when these are decided.
        Larger radii need more draws, so `radius` isn't tight.
      alpha: the probability of an error, in (0, 1).
      n0: number of draws that choose the class, at least 1.
      stages: numbers of further draws at the looks, ascending; with a single one there is no early
        stopping.
      norm: `"l2"`; Gaussian noise certifies no other norm directly.
      key: one key, split per example, or one per example. With keys of JAX's default kind, an
        example's draws depend only on its key and their number, so counts don't depend on batches
        or devices (except by rounding); with "rbg" keys, draws depend on the batch.
      batch_size: number of noisy examples in each pass through the net.
      store: a folder, new or from an earlier call, in which the counts of each batch are kept. The
        same call resumes where the earlier one was interrupted. With several processes, all of them
        must share the folder.
      progress: called after each batch, e.g. `print`.

    Returns:
      `Certificate`.

    Raises:
      TypeError: if `x` or the logits are not floating-point arrays (the net in training mode may
        return a tuple), or `y` not integers; under a trace.
      ValueError: if `sigma` or a radius isn't positive, `alpha` not in (0, 1), `n0` < 1, `stages`
        not ascending, or the last stage too small to certify the largest radius; if the norm isn't
        l2; if rows interact, as with batch norm in training mode; if x is too large for the grid of
        the noise; if `store` has another evaluation.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxadv import certify
      >>> found = certify.certify(  # the exact radius is 1 / sqrt(2)
      ...     lambda params, x: x, None, jnp.array([[0.0, 1.0]]), jnp.array([1]),
      ...     sigma=0.5, radii=(0.5,), stages=(1000, 10_000), key=jax.random.key(0),
      ... )
      >>> found.samples.tolist(), bool(0.5 <= found.radius[0] < 0.7071)
      ([1000], True)

    References:
      Cohen et al., "Certified Adversarial Robustness via Randomized Smoothing", 2019; Voracek and
      Hein, "Sound Randomized Smoothing in Floating-Point Arithmetics", 2022.
    """
    if norm != "l2":
        raise ValueError(
            f"expected norm 'l2', got {norm!r}; Gaussian noise certifies l2. The l2 ball of radius "
            "e * sqrt(d), with d the number of entries, contains the linf ball of radius e, and "
            "the l2 ball of radius e the l1 ball of radius e: pass these radii"
        )
    _checked_alpha(alpha)
    inputs.at_least(1, "n0", n0, "100 is usual")
    draws = _Draws.of("certify", apply_fn, params, x, y, sigma, key, batch_size, progress)
    rule = _Rule.of(sigma, radii, alpha, stages, draws.off)
    draws = draws.kept(
        store, y=draws.y, radii=rule.radii, alpha=alpha, n0=n0, stages=rule.stages
    )  # fmt: skip
    n = len(draws.x)
    label = _most_frequent(draws.counts(np.arange(n), 0, n0))
    samples, lower, counts = np.zeros(n, int), np.zeros(n), np.zeros((n, draws.classes), int)
    undecided = (label >= 0) & (label == (label if y is None else host.fetch(draws.y)))
    for look, (before, last) in enumerate(pairwise((0, *rule.stages))):
        rows = np.flatnonzero(undecided)
        counts[rows] += draws.counts(rows, n0 + before, n0 + last, look + 1)
        samples[rows] = last
        right, shift = counts[rows, label[rows]], draws.shift[rows]
        lower[rows] = np.maximum(lower[rows], rule.bound(right, look))
        undecided[rows] = ~rule.decided(lower[rows], right, look, shift)
    radius = rule.radius(lower, draws.shift)
    return Certificate(label, counts, samples, lower, radius, radius <= 0)


@dataclass(frozen=True)
class _Rule:
    """The stopping rule, and the bounds on p_A.

    Attributes:
      sigma: the noise's standard deviation.
      radii: the sizes to decide.
      stages: numbers of draws at the looks.
      off: the sampler's error, which is subtracted from bounds on p_A.
      share: alpha of each look; 0 for a look without a bound.
    """

    sigma: float
    radii: tuple[float, ...]
    stages: tuple[int, ...]
    off: float
    share: tuple[float, ...]

    @classmethod
    def of(cls, sigma: float, radii: Any, alpha: float, stages: Any, off: float) -> _Rule:
        """Check radii and stages, and divide alpha among the looks that can certify a radius.

        Raises:
          TypeError: if `stages` aren't integers.
          ValueError: if they don't ascend, a radius isn't positive, or the draws are too few.
        """
        radii = tuple(map(float, np.atleast_1d(radii)))
        if not radii or not all(0 < radius < math.inf for radius in radii):
            raise ValueError(f"expected positive radii, got {radii}; pass e.g. (0.5, 1.0, 1.5)")
        stages = tuple(np.atleast_1d(stages).tolist())
        for stage in stages:
            inputs.at_least(1, "stages", stage, "pass numbers of draws, e.g. (10000, 100000)")
        if not stages or any(b <= a for a, b in pairwise(stages)):
            raise ValueError(
                f"expected ascending stages, got {stages}; they are the numbers of draws so far, "
                "e.g. (10000, 30000, 100000)"
            )
        least, most = (special.ndtr(size / sigma) + off for size in (min(radii), max(radii)))
        # If all n draws are A, the bound on p_A is alpha^(1/n). The fewer looks share a fifth of
        # alpha, the more each of them can certify.
        able = len(stages) - 1
        while able and (alpha / 5 / able) ** (1 / stages[-1 - able]) <= least:
            able -= 1
        each = alpha / 5 / max(able, 1)
        final = alpha - each * able
        if final ** (1 / stages[-1]) <= most:
            size = max(sigma * special.ndtri(final ** (1 / stages[-1]) - off), 0)
            raise ValueError(
                f"expected radii below {size:.4g}, the most that {stages[-1]} draws can certify "
                f"with sigma={sigma:g} and alpha={alpha:g}, got {max(radii):g}; raise the number "
                "of draws, or sigma"
            )
        share = (*[0.0] * (len(stages) - 1 - able), *[each] * able, final)
        return cls(sigma, radii, stages, off, share)

    def bound(self, right: NDArray[Any], look: int) -> NDArray[np.float64]:
        """Return a look's lower bound on p_A, `[m]`, from how often A was drawn, `[m]`."""
        # Clopper and Pearson, 1934. If A was never drawn, the quantile isn't defined.
        lower = special.betaincinv(right, self.stages[look] - right + 1, self.share[look])
        return np.maximum(np.where(right > 0, lower, 0) - self.off, 0)

    def radius(self, lower: NDArray[Any], shift: NDArray[Any]) -> NDArray[np.float64]:
        """Return the certified radii, `[m]`, given the distances `shift` to rounded x, `[m]`."""
        size = self.sigma * special.ndtri(lower) - shift
        return np.where(lower > 0.5, np.maximum(size, 0), 0)

    def decided(
        self, lower: NDArray[Any], right: NDArray[Any], look: int, shift: NDArray[Any]
    ) -> NDArray[np.bool_]:
        """Return for which examples each radius is certified or unlikely to be, `[m]`."""
        radii = np.asarray(self.radii)[None]
        certified = self.radius(lower, shift)[:, None] >= radii
        n, last = self.stages[look], self.stages[-1]
        # The last look certifies p if A is drawn k times or more, with P(>= k | p) <= its share.
        p = special.ndtr((radii + shift[:, None]) / self.sigma) + self.off
        fewer = np.ceil(special.bdtrik(1 - self.share[-1], last, np.minimum(p, 1)))
        best = np.where(right < n, special.betaincinv(right + 1, n - right, 0.95), 1)
        missing = np.minimum(fewer - right[:, None], last - n)
        hope = special.bdtrc(missing, last - n, best[:, None])
        return np.all(certified | (hope < 0.05), axis=1)


class _Draws(NamedTuple):
    """A net under noise, whose predictions are counted.

    Attributes:
      name: the name of the public function.
      apply_fn: the net.
      params: its parameters.
      x: the examples, `[n, ...]`.
      y: their labels, `[n]`; 0 if there are none.
      keys: a key for each example, `[n]`.
      sigma: the noise's standard deviation.
      off: how much probabilities may differ from those under Gaussian noise.
      shift: distances from the examples to the rounded ones, `[n]`.
      classes: the number of classes, K.
      size: number of examples in a batch.
      each: number of draws of each example in a pass.
      progress: called after each batch.
      store: keeps each batch, or None.
    """

    name: str
    apply_fn: ApplyFn
    params: Params
    x: Any
    y: Any
    keys: Any
    sigma: float
    off: float
    shift: NDArray[np.float64]
    classes: int
    size: int
    each: int
    progress: Callable[[Progress], None] | None
    store: _batches.Store | None = None

    @classmethod
    def of(
        cls,
        name: str,
        apply_fn: ApplyFn,
        params: Params,
        x: Any,
        y: Any,
        sigma: float,
        key: Any,
        batch_size: int,
        progress: Callable[[Progress], None] | None,
    ) -> _Draws:
        sigma = _checked_sigma(sigma)
        _batches.check_progress(progress)
        x, y = host.arrays(
            f"certify.{name}", x, np.zeros(np.shape(x)[:1], int) if y is None else y, (params, key)
        )
        shape = host.one_batch(x, batch_size)
        apply_fn = closures.keyed(apply_fn, params, shape)
        keys = inputs.keys(key, len(x), f"certify.{name}")
        logits = jax.eval_shape(partial(inputs.apply, apply_fn), params, shape)
        spread = host.spread(x)
        size = spread.multiple(max(1, min(8, batch_size, len(x))))
        grid = _gaussian.table(sigma)
        place = partial(_gaussian.distance_to_grid, grid.step)
        shift, exact = host.over_batches(place, (x,), batch_size)
        if not exact.all():
            raise ValueError(
                f"expected x small enough for exact sums with the noise, got an example with "
                f"entries over {2**23 * grid.step:g} (2048 sigma or more); scale the examples, or "
                f"raise sigma={sigma:g}"
            )
        if len(x):
            few = spread.take((x, keys), np.resize(np.arange(len(x)), spread.multiple(4)))
            some = _together_and_alone(apply_fn, params, sigma, spread.devices, *few)
            apart = _batches.apart(*host.fetch(some))
            if apart > _batches.ALONE:
                raise ValueError(
                    f"expected logits that don't depend on the batch, got a difference of "
                    f"{apart:.2g}, relative to the largest; batch norm in training mode? Use its "
                    "stored statistics, and switch off dropout"
                )
        off = math.prod(x.shape[1:]) * grid.off
        return cls(
            name, apply_fn, params, x, y, keys, sigma, off, np.asarray(shift, np.float64),
            logits.shape[1], size, max(1, batch_size // size), progress,
        )  # fmt: skip

    def kept(self, folder: str | os.PathLike[str] | None, **settings: Any) -> _Draws:
        """Return these draws with a store in the folder, if one is given."""
        if folder is None:
            return self
        store = _batches.opened(
            folder, self.apply_fn, self.params, self.x, {}, kind=self.name, key=self.keys,
            sigma=self.sigma, **settings,
        )  # fmt: skip
        return self._replace(store=store)

    def counts(
        self, rows: NDArray[np.intp], first: int, last: int, stage: int = 0
    ) -> NDArray[np.int64]:
        """Count the classes of the draws from number `first` to before `last`, `[m, K]`."""
        counts = np.zeros((len(rows), self.classes), int)
        done = np.zeros(len(rows), bool)
        for at, batch in self.store.batches(stage, rows) if self.store else ():
            counts[at], done[at] = batch["counts"], True
        count = partial(
            _count, self.apply_fn, self.params, self.sigma, self.each, first, last, self.classes
        )
        for at, size in _batches.split(np.flatnonzero(~done), [self.size], 0):
            filled = np.resize(rows[at], size)  # repeated; counts of repeats are dropped
            made = count(*host.spread(self.x).take((self.x, self.keys), filled))
            counts[at], done[at] = host.fetch(made)[: len(at)], True
            if self.store is not None:
                self.store.add(stage, {"rows": rows[at], "counts": counts[at]})
            if self.progress is not None:
                named = f"draws {first} to {last}"
                self.progress(Progress(named, int(done.sum()), len(rows), None))
        return counts


def _most_frequent(counts: NDArray[Any]) -> NDArray[np.intp]:
    return np.where(counts.any(axis=1), counts.argmax(axis=1), -1)


@partial(jax.jit, static_argnames=("apply_fn", "sigma", "each", "classes"))
def _count(
    apply_fn: ApplyFn,
    params: Params,
    sigma: float,
    each: int,
    first: jax.Array,
    last: jax.Array,
    classes: int,
    x: jax.Array,
    keys: jax.Array,
) -> jax.Array:
    def add(i: jax.Array, counts: jax.Array) -> jax.Array:
        number = first + i * each + jnp.arange(each)
        noisy = _noisy(sigma, x, keys, number)
        logits = inputs.apply(apply_fn, params, noisy)
        answers = inputs.finite(noisy, logits) & jnp.any(logits > -jnp.inf, axis=1)
        votes = jax.nn.one_hot(jnp.argmax(logits, axis=1), classes, dtype=jnp.int32)
        votes = jnp.where(answers[:, None], votes, 0).reshape(len(x), each, classes)
        asked = (number < last)[None, :, None]
        return counts + jnp.sum(votes, axis=1, where=asked, dtype=jnp.int32)

    start = jnp.zeros((len(x), classes), jnp.int32)
    return lax.fori_loop(0, -((first - last) // each), _cpu.fast_convolutions(add), start)


@partial(jax.jit, static_argnames=("apply_fn", "sigma", "devices"))
def _together_and_alone(
    apply_fn: ApplyFn, params: Params, sigma: float, devices: int, x: jax.Array, keys: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return the logits of two draws of each example, in a batch and by themselves.

    "By itself" is a batch of copies of one draw, one per device, since a net may name shardings.
    """
    noisy = _noisy(sigma, x, keys, jnp.arange(2))
    together = inputs.apply(apply_fn, params, noisy)

    def of_one(row: jax.Array) -> jax.Array:
        rows = jnp.broadcast_to(row[None], (devices, *row.shape))
        return inputs.apply(apply_fn, params, rows)[0]

    return together, jax.vmap(of_one)(noisy)


def _noisy(sigma: float, x: jax.Array, keys: jax.Array, number: jax.Array) -> jax.Array:
    """Return the draws with these numbers of each example: `[B, ...]` to `[B * draws, ...]`."""
    wide = _gaussian.on_grid(x, _gaussian.table(sigma).step)

    def draw(example: jax.Array, key: jax.Array, number: jax.Array) -> jax.Array:
        noise = _gaussian.noise(jax.random.fold_in(key, number), example.shape, sigma)
        return (example + noise.astype(example.dtype)).astype(x.dtype)

    noisy = jax.vmap(jax.vmap(draw, (None, None, 0)), (0, 0, None))(wide, keys, number)
    return noisy.reshape(-1, *x.shape[1:])


def _checked_sigma(sigma: float) -> float:
    if isinstance(sigma, bool) or not isinstance(sigma, int | float | np.number):
        raise TypeError(f"expected sigma to be a number, got {type(sigma).__name__}; e.g. 0.5")
    if not 0 < sigma < math.inf:
        raise ValueError(
            f"expected a finite sigma > 0, got {sigma}; it is the noise's standard deviation, in "
            "x's units"
        )
    return float(sigma)


def _checked_alpha(alpha: float) -> None:
    if not 0 < alpha < 1:
        raise ValueError(f"expected 0 < alpha < 1, got {alpha}; 0.001 is usual")
