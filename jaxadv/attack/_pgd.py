r"""Projected gradient descent: steepest steps on the loss, projected back onto the ball.

The one-step methods of `perturb` rely on a single linearisation. PGD follows the loss, and so shows
how much of the one-step robust accuracy is real (Madry et al., 2018). The default loss is the
margin form of cross-entropy, whose gradient doesn't vanish where the net is confident.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Literal, cast

import jax
import jax.numpy as jnp
import optax

from jaxadv import boxes, inputs, losses, norms
from jaxadv.attack._info import Answer, Found, reports
from jaxadv.problem import Best, Gradient, Problem, fold, iterate, run_restarts
from jaxadv.types import ApplyFn, Bounds, Eps, LossFn, Norm, Params, StochasticFn

__all__ = ["pgd", "pgd_kl"]

# r; which gradients leave out the top wrong class; the best points.
_Carry = tuple[jax.Array, jax.Array, Best]


@reports
def pgd(
    apply_fn: ApplyFn | StochasticFn,
    params: Params,
    x: jax.Array,
    y: jax.Array,
    /,
    *,
    eps: Eps,
    norm: Norm = "l2",
    steps: int = 100,
    step_size: Eps | None = None,
    loss_fn: LossFn = losses.margin,
    targeted: bool = False,
    start: jax.Array | None = None,
    random_start: bool = False,
    restarts: int = 1,
    keep: Literal["best", "last"] = "best",
    samples: int = 0,
    key: jax.Array | None = None,
    bounds: Bounds | None = None,
) -> Found:
    r"""Projected gradient descent in a ball around x.

    .. math:: r_{t+1} = \Pi_{\|r\| \le \epsilon}\bigl(r_t + s \arg\max_{\|u\| \le 1}
              \langle \nabla_x \ell(x + r_t), u \rangle\bigr)

    Each example's best iterate is returned, the start included: misclassified points rank first,
    then those of higher loss. So more steps of the same size never do worse. The first of several
    starts is x itself: in high dimension a random point of an l2 ball lies near its surface, and
    PGD started only there is often the weaker attack. Restarts skip examples that are already
    misclassified. In l1 a step moves one entry: the one with the largest gradient that the box
    doesn't block.

    For training, `keep="last"` returns the last iterate, whatever its loss, so that a step costs
    one forward and one backward pass.

    Args:
      apply_fn: `(params, x) -> logits`, `[B, ...]` to `[B, K]`. Hashable; compiled once per object.
      params: the first argument of `apply_fn`.
      x: `[B, ...]`, floating point.
      y: labels, passed to `loss_fn` unchanged; integers `[B]` for the default loss. For other
        labels (soft targets) the best point is the one of highest loss.
      eps: the ball's radius, a scalar or `[B]`; a negative traced value counts as 0.
      norm: the ball's norm: `"l1"`, `"l2"` or `"linf"`.
      steps: number of steps, at least 1; each a forward and a backward pass. In l1 a step moves one
        entry, in a box at most to its bound: images in [0, 1] need several steps for each unit of
        eps.
      step_size: s, a scalar or `[B]`; None for 2.5 eps / steps.
      loss_fn: `(logits, labels) -> [B]`, to maximise (to minimise if `targeted`). The default is
        `losses.margin`.
      targeted: y has target classes instead of true labels.
      start: perturbations to start from instead of 0, `[B, ...]`, projected onto the ball and the
        box. A single run on a deterministic net then doesn't evaluate the net at x, and rows are 0
        or NaN by its logits at x + start.
      random_start: whether a single run starts at a random point of the ball instead of at x.
      restarts: number of starts, at least 1. The first is x or `start` (random with
        `random_start` and a single run), the others are random points of the ball.
      keep: `"best"`, or `"last"` for the last iterate, which saves the forward pass to evaluate it.
      samples: 0 for a deterministic net. For one that draws random numbers, `apply_fn(params, x,
        key)`: number of draws that the loss and its gradient are averaged over, new ones at each
        step (expectation over transformation).
      key: one key, or one per example, `[B]`; for random starts and `samples`.
      bounds: `(lo, hi)`, the box that x + r stays in. None: no box.

    Returns:
      r, of x's shape and dtype, of size at most eps. Rows are 0 or NaN as in `perturb`, and NaN
      where `start` has NaN or infinity.

    Raises:
      TypeError: if `x`, `start` or the logits are not floating-point arrays; if `y` are not
        integers, for the default loss.
      ValueError: if shapes don't match, if the norm is unknown, if a Python `eps` or `step_size` is
        negative, if `steps` or `restarts` < 1, if `samples` < 0, if `bounds` is not a pair, if a
        key is missing, if both `start` and `random_start` are given, if `keep` is neither `"best"`
        nor `"last"`, or if it is `"last"` with several runs.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxadv import attack
      >>> w = jnp.array([[3.0, -3.0], [4.0, -4.0]])
      >>> x, y = jnp.array([[1.0, 1.0]]), jnp.array([0])
      >>> r = attack.pgd(lambda w, x: x @ w, w, x, y, eps=5.0, steps=10)
      >>> (r + jnp.array([[3.0, 4.0]])).round(3).tolist()
      [[0.0, 0.0]]

    References:
      Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks", 2018; Athalye
      et al., "Synthesizing Robust Adversarial Examples", 2018, for random nets.
    """
    inputs.at_least(1, "steps", steps, "perturb.loss takes one step")
    inputs.at_least(1, "restarts", restarts, "1 is a single run")
    if keep not in ("best", "last"):
        raise ValueError(f"expected keep to be 'best' or 'last', got {keep!r}; choose one")
    if keep == "last" and restarts > 1:
        raise ValueError(
            f"expected restarts=1 with keep='last', got {restarts}; the best of several runs can't "
            "be chosen without their losses: leave out one of the two"
        )
    if start is not None and random_start:
        raise ValueError(
            "expected start or random_start, got both; leave out one of them, or pass "
            "start=norms.sample(keys, x, eps, norm)"
        )
    problem = Problem.of(
        apply_fn, params, x, y, norm=norm, eps=eps, bounds=bounds, loss_fn=loss_fn, any_labels=True,
        targeted=targeted, samples=samples, key=key,
        drawn_by="a random start" if random_start or restarts > 1 else None,
    )  # fmt: skip
    if start is not None:
        start = jnp.asarray(inputs.perturbation(start, problem.x, "start", rounded=True))
    size = _step_size(step_size, problem, steps)
    problem = problem.keyed()
    answer = _run(
        problem, size, start, steps=steps, random_start=random_start, restarts=restarts,
        keep=keep,
    )  # fmt: skip
    return Found(problem, *answer)


@reports
def pgd_kl(
    apply_fn: ApplyFn,
    params: Params,
    x: jax.Array,
    y: jax.Array | None = None,
    /,
    *,
    eps: Eps,
    norm: Norm = "l2",
    steps: int = 10,
    step_size: Eps | None = None,
    key: jax.Array | None = None,
    bounds: Bounds | None = None,
) -> Found:
    r"""PGD away from the net's own output, without labels: `perturb.vat`, iterated.

    .. math:: \max_{\|r\| \le \epsilon} D_{KL}(p(x) \,\|\, p(x + r))

    from a random point, since at x the divergence has no gradient. With this adversary
    `objectives.kl_regularized` is TRADES, its `weight` being the paper's :math:`1 / \lambda`.
    Unlike `pgd`'s default loss, the divergence has a gradient that vanishes if the net is
    confident: use this attack for training, not for evaluation.

    Args:
      apply_fn: `(params, x) -> logits`, `[B, ...]` to `[B, K]`. Hashable; compiled once per object.
      params: the first argument of `apply_fn`.
      x: `[B, ...]`, floating point.
      y: unused, may be None; checked as integer labels `[B]` if given.
      eps: the ball's radius, a scalar or `[B]`; a negative traced value counts as 0.
      norm: the ball's norm: `"l1"`, `"l2"` or `"linf"`.
      steps: number of steps, at least 1; each a forward and a backward pass.
      step_size: a scalar or `[B]`; None for 2.5 eps / steps.
      key: one key, or one per example, `[B]`.
      bounds: `(lo, hi)`, the box that x + r stays in. None: no box.

    Returns:
      r, of x's shape and dtype, of size at most eps: the iterate of largest divergence. Rows are 0
      or NaN as in `perturb`, whatever the labels.

    Raises:
      TypeError: if `x` or the logits are not floating-point arrays, or `y` not integers.
      ValueError: if the key is missing, if `steps` < 1, if shapes don't match, if the norm is
        unknown, if a Python `eps` or `step_size` is negative, or if `bounds` is not a pair.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxadv import attack, objectives
      >>> trades = objectives.kl_regularized(lambda w, x: x @ w, attack.pgd_kl, eps=1.5, weight=6.0)
      >>> w, x = jnp.array([[3.0, -3.0], [4.0, -4.0]]), jnp.full((1, 2), 0.1)
      >>> r = attack.pgd_kl(lambda w, x: x @ w, w, x, eps=0.5, key=jax.random.key(0))
      >>> bool(jnp.allclose(jnp.abs(r), jnp.array([[0.3, 0.4]]), atol=0.05))
      True

    References:
      Zhang et al., "Theoretically Principled Trade-off between Robustness and Accuracy", 2019;
      Miyato et al., "Distributional Smoothing with Virtual Adversarial Training", 2015.
    """
    inputs.at_least(1, "steps", steps, "perturb.vat takes one step")
    problem = Problem.of(
        apply_fn, params, x, None, norm=norm, eps=eps, bounds=bounds, loss_fn=_divergence,
        any_labels=True, key=key, drawn_by="attack.pgd_kl",
    )  # fmt: skip
    if y is not None:
        inputs.labels(y, problem.x.shape[0])
    size = _step_size(step_size, problem, steps)
    problem = problem.keyed()
    problem = replace(problem, y=_log_probabilities(problem))
    r, forward, backward = _run(
        problem, size, None, steps=steps, random_start=True, restarts=1, keep="best"
    )
    return Found(problem, r, forward + 1, backward)


@jax.jit
def _log_probabilities(problem: Problem) -> jax.Array:
    logits = inputs.apply(problem.apply_fn, problem.params, problem.x)
    return jax.nn.log_softmax(logits.astype(inputs.accum_dtype(logits.dtype)))


def _step_size(step_size: Eps | None, problem: Problem, steps: int) -> jax.Array:
    if step_size is None:
        return cast(jax.Array, 2.5 * problem.eps / steps)
    return inputs.radius(step_size, problem.x, "step_size")


def _divergence(logits: jax.Array, log_p: jax.Array) -> jax.Array:
    log_q = jax.nn.log_softmax(logits)
    return optax.losses.kl_divergence_with_log_targets(log_q, log_p, where=log_p > -jnp.inf)


@partial(jax.jit, static_argnames=("steps", "random_start", "restarts", "keep"))
def _run(
    problem: Problem,
    step_size: jax.Array,
    given: jax.Array | None,
    *,
    steps: int,
    random_start: bool,
    restarts: int,
    keep: Literal["best", "last"],
) -> Answer:
    first = jnp.zeros_like(problem.x)
    if given is not None:
        # A row whose start isn't finite becomes NaN, as with an eps that isn't finite.
        finite = jnp.isfinite(norms.norm(given, "linf"))
        problem = replace(problem, eps=jnp.where(finite, problem.eps, jnp.nan))
        first = problem.project(given.astype(problem.eps.dtype))
    draws_start = random_start or restarts > 1
    if draws_start or problem.samples:
        problem, known = problem.start(), None
    else:
        problem, known = problem.start_at(first)
    x, eps, norm = problem.x, problem.eps, problem.norm
    # Between steps r has the dtype of norms: a bfloat16 r would swallow small steps.
    wide = replace(problem, x=x.astype(eps.dtype))
    first = first.reshape(x.shape).astype(eps.dtype)
    size = step_size[:, None]

    def rounded(r: jax.Array) -> jax.Array:
        return r if r.dtype == x.dtype else problem.clip_to_box(r)

    def start(restart: jax.Array | int) -> jax.Array:
        if not draws_start:
            return first
        keys = fold(fold(problem.keys, 0), restart)
        drawn = wide.project(norms.sample(keys, x, eps, norm))
        return drawn if restarts == 1 else jnp.where(restart > 0, drawn, first)

    def run(restart: jax.Array | int) -> Best:
        first_step = restart * (steps + 1)

        def step(i: jax.Array | int, carry: _Carry, known: Gradient | None = None) -> _Carry:
            r, without_top, best = carry
            at = rounded(r)
            success, loss, g = known or problem.gradient(at, first_step + i, without_top)
            if keep == "best":
                best = best.with_point(at, success, loss)
            # After a gradient of 0, leave out the top wrong class next, or include it again.
            without_top ^= norms.is_zero(g)
            if norm == "l1":
                g = boxes.drop_blocked(g, r, wide.x, problem.bounds)
            return wide.project(r + size * norms.steepest(g, norm)), without_top, best

        carry = start(restart), jnp.zeros_like(eps, bool), Best.empty(x)
        if known is None:
            r, _, best = iterate(step, carry, steps)
        else:
            r, _, best = iterate(step, step(0, carry, known), steps - 1)
        at = rounded(r)
        if keep == "last":
            return best._replace(r=at)
        return best.with_point(at, *problem.value(at, first_step + steps))

    draws = max(problem.samples, 1)
    before = 1 if known is None else 0
    if keep == "last":
        best, runs, last = run(0), jnp.ones(x.shape[0], jnp.int32), 0
    else:
        (best, runs), last = run_restarts(run, restarts, x), 1
    return problem.answer(best.r), draws * (before + runs * (steps + last)), draws * runs * steps
