r"""The paper's perturbations: the most harmful r for a net, a batch and its labels.

Each takes one step on the linearised net: derivatives are exact (see `jacobian`), and the best
perturbation of the linearised net is known in closed form (see `norms`):

- `alpha` (Adv_Alpha, Algorithm 1): toward the class that the linearised softmax reaches with
  the smallest perturbation. K - 1 backward passes.
- `loss` (Adv_Loss, Section 6.1.1): lowers the probability of the true class; one backward pass.
  With the linf norm this is the fast gradient sign method (Goodfellow et al., 2014).
- `loss_sign` (Adv_Loss_Sign): the sign of the direction of Adv_Loss, rescaled to an l2 size.
- `vat` (Miyato et al., 2015): away from the net's own output; needs no labels.

All are pure functions, un-jitted, with one signature (`types.PerturbFn`), and return r, never
x + r. Set a method's own arguments with `functools.partial(perturb.alpha, norm="linf")`.

All of them return an r that is exactly 0, with finite derivatives, where eps is 0, where there is
no usable gradient (it is 0, or has a NaN or infinite entry), where the label is outside 0..K-1 or
its logit is -inf, and where no other class has a finite logit. A row with NaN or infinity in x,
with NaN or +inf in its logits, or with a traced eps that is NaN or infinite, becomes NaN; other
rows don't change. `evaluate` counts all of these.

Iterated methods with the same signature are in `attack`; `objectives` trains against any of them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from jaxadv import inputs, jacobian, losses, meshes, norms
from jaxadv.problem import Problem
from jaxadv.types import ApplyFn, Bounds, Eps, Norm, Params

__all__ = ["alpha", "loss", "loss_sign", "vat"]

Value = TypeVar("Value")

_MANY = 100  # backward passes that Adv_Alpha makes without a warning


@meshes.auto_axes(meshes.as_x)
def alpha(
    apply_fn: ApplyFn,
    params: Params,
    x: jax.Array,
    y: jax.Array,
    /,
    *,
    norm: Norm = "l2",
    eps: Eps | None = None,
    candidates: int | None = None,
    chunk: int | None = None,
    key: jax.Array | None = None,
    bounds: Bounds | None = None,
) -> jax.Array:
    r"""Adv_Alpha: the smallest perturbation that fools the linearised net (Algorithm 1).

    For each class j except y, with :math:`d_j = T_j - T_y` from the softmax Jacobian, the problem

    .. math:: \min_r \|r\| \quad \text{s.t.} \quad \langle d_j, r \rangle \ge \alpha_y - \alpha_j

    has the value :math:`\max(0, \alpha_y - \alpha_j) / \|d_j\|_*` (Equation 1, with the printed
    inequality corrected, and Proposition 3). r is the solution for the class I of smallest value
    (Proposition 4). Sizes are compared as logarithms, so the choice is right at any confidence.

    With `eps`, r has the direction of that solution and size eps (Section 6.1.2).

    Where x is already misclassified, or on a tie, the smallest perturbation is exactly 0. With
    `eps` the step there goes along :math:`+d_I`, away from y, where I is the top wrong class.

    Args:
      apply_fn: `(params, x) -> logits`, `[B, ...]` to `[B, K]`. A logit of -inf masks its class.
      params: the first argument of `apply_fn`.
      x: `[B, ...]`, floating point.
      y: integer labels, `[B]`.
      norm: the norm to minimise, or to set to eps: `"l1"`, `"l2"` or `"linf"`.
      eps: None for the smallest perturbation of the linearised net, else a size, a scalar or `[B]`;
        a negative traced value counts as 0.
      candidates: number of wrong classes to consider, those with the largest logits; one backward
        pass each. r may then be larger than necessary. None: all K - 1, as in the paper, with a
        warning if these are over a hundred and `chunk` is None.
      chunk: number of classes per backward pass; memory grows with it, the result doesn't change.
        None: all at once; on CPU as many as fit in the cache.
      key: ignored; this method is deterministic.
      bounds: `(lo, hi)`; r is clipped entry by entry so that x + r lies in it. None: no box.

    Returns:
      r, of x's shape and dtype. The smallest perturbation of a confident net may be huge (for two
      classes whose logits differ by a, its size is sinh(a) over the norm of the gradient of that
      difference). Where it overflows, entries are infinite, or exactly 0 if the direction is 0.

    Raises:
      TypeError: if `x` or the logits are not floating-point arrays, or `y` not integers.
      ValueError: if shapes are not `[B, ...]`, `[B]` and `[B, K]` with K >= 2, if the norm is
        unknown, if a Python `eps` is negative, if `candidates` or `chunk` is less than 1, or if
        `bounds` is not a pair.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxadv import perturb
      >>> w = jnp.array([[1.0, -1.0, 0.0], [0.0, 0.0, 3.0]])
      >>> x, y = jnp.array([[1.0, 0.0]]), jnp.array([0])
      >>> perturb.alpha(lambda w, x: x @ w, w, x, y, norm="linf", eps=0.5).tolist()
      [[-0.5, 0.5]]

    References:
      Huang et al., "Learning with a Strong Adversary", 2015, Algorithm 1, Equation 1,
      Propositions 3 and 4, Section 6.1.2.
    """
    for name, value in (("candidates", candidates), ("chunk", chunk)):
        if value is not None:
            inputs.at_least(1, name, value, "None means all classes")
    problem = Problem.of(apply_fn, params, x, y, norm=norm, eps=eps, bounds=bounds, minimal=True)
    x, y = problem.x, problem.y
    logits, rows_of = jacobian.class_pullback(apply_fn, params, x, y)
    problem = problem.with_logits(logits)
    n_classes = logits.shape[1]
    is_y = jax.nn.one_hot(y, n_classes, dtype=bool)
    z = losses.shift_logits(logits)
    others = jnp.where(is_y | jnp.isneginf(logits), -jnp.inf, z)
    top_wrong = jnp.argmax(others, axis=1)
    wrong = jnp.max(others, axis=1) >= jnp.sum(jnp.where(is_y, z, 0), axis=1)

    def distances(
        classes: jax.Array, without: jax.Array | None = None
    ) -> jacobian.Nearest:  # of classes [B, J]
        rows = rows_of(classes, without)
        # log of |alpha_y - alpha_j| / ||d_j||_*
        vectors = rows.d.reshape(classes.size, *x.shape[1:])
        log_d = norms.log_norm(vectors, norms.dual(norm)).reshape(classes.shape)
        masked = jnp.isneginf(jnp.take_along_axis(logits, classes, axis=1))
        reachable = ~masked & jnp.isfinite(log_d)  # or d_j is 0, or not finite
        log_size = rows.log_gap - rows.log_scale - jnp.where(reachable, log_d, 0)
        rank_by = jnp.where(reachable, log_size, jnp.inf)
        only = jnp.where(classes == top_wrong[:, None], -jnp.inf, jnp.inf)
        rank_by = lax.stop_gradient(jnp.where(wrong[:, None], only, rank_by))
        return jacobian.Nearest(rank_by, log_size, rows.d, reachable)

    if candidates is None and chunk is None and n_classes - 1 > _MANY:
        _warn_of_many_passes(n_classes - 1)
    classes = jacobian.wrong_classes(z, y, candidates)
    best = jacobian.nearest(distances, x, classes, chunk)  # I

    def past_top_wrong() -> jacobian.Nearest:
        """Return the class ranked after the top wrong one, where no class could be reached."""
        top, after = losses.top_wrong(logits, is_y)
        found = distances(jnp.argmax(after, axis=1)[:, None], top)
        found = jax.tree.map(lambda leaf: leaf[:, 0], found)
        hidden = ~best.reachable & ~wrong & jnp.any(after > -jnp.inf, axis=1)
        better = hidden & found.reachable
        return jax.tree.map(
            lambda new, old: jnp.where(inputs.expand_like(better, old), new, old), found, best
        )

    # Where y and the top wrong class have the same gradient, it hides those of all others.
    if n_classes > 2:
        best = _where_needed(~jnp.all(best.reachable), past_top_wrong, best)
    direction = norms.steepest(best.d.astype(inputs.accum_dtype(x.dtype)), norm)
    length = problem.eps
    if length is None:
        length = jnp.where(wrong, 0, jnp.exp(jnp.where(wrong, 0, best.distance)))
    length = inputs.expand_like(length, x).astype(direction.dtype)
    r = jnp.where(direction == 0, 0, length * direction)  # 0 times an infinite size is 0
    r = jnp.where(inputs.expand_like(best.reachable, x), r, 0)
    return problem.answer(problem.clip_to_box(r))


def _warn_of_many_passes(n: int) -> None:
    warnings.warn(
        f"perturb.alpha makes {n} backward passes, one for each wrong class; candidates=10 makes "
        f"10, for the classes with the largest logits; candidates={n} makes all without a warning",
        stacklevel=4,  # past alpha and its decorator
    )


@meshes.auto_axes(meshes.as_x)
def loss(
    apply_fn: ApplyFn,
    params: Params,
    x: jax.Array,
    y: jax.Array,
    /,
    *,
    eps: Eps,
    norm: Norm = "l2",
    key: jax.Array | None = None,
    bounds: Bounds | None = None,
) -> jax.Array:
    r"""Adv_Loss: the perturbation that most lowers the linearised probability of the true class.

    .. math:: \arg\min_{\|r\| \le \epsilon} \langle T_y, r \rangle

    l2: :math:`-\epsilon T_y / \|T_y\|_2`. linf: :math:`-\epsilon\, \mathrm{sign}(T_y)`, the fast
    gradient sign method. l1: :math:`-\epsilon\, \mathrm{sign}((T_y)_k) e_k` at the largest
    :math:`|(T_y)_k|`. (The minus is missing in print.) The direction of :math:`-T_y` comes from the
    gradient of `losses.margin`, which is a positive multiple of it and doesn't vanish.

    Args:
      apply_fn: `(params, x) -> logits`, `[B, ...]` to `[B, K]`. A logit of -inf masks its class.
      params: the first argument of `apply_fn`.
      x: `[B, ...]`, floating point.
      y: integer labels, `[B]`.
      eps: the size, a scalar or `[B]`; a negative traced value counts as 0.
      norm: the norm of that size: `"l1"`, `"l2"` or `"linf"`.
      key: ignored; this method is deterministic.
      bounds: `(lo, hi)`; r is clipped entry by entry so that x + r lies in it. None: no box.

    Returns:
      r, of x's shape and dtype, of size eps (less where `bounds` clip it).

    Raises:
      TypeError: if `x` or the logits are not floating-point arrays, or `y` not integers.
      ValueError: if shapes are not `[B, ...]`, `[B]` and `[B, K]` with K >= 2, if the norm is
        unknown, if a Python `eps` is negative, or if `bounds` is not a pair.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxadv import perturb
      >>> w = jnp.array([[3.0, -3.0], [4.0, -4.0]])
      >>> x, y = jnp.array([[1.0, 1.0]]), jnp.array([0])
      >>> perturb.loss(lambda w, x: x @ w, w, x, y, eps=5.0).tolist()
      [[-3.0, -4.0]]

    References:
      Huang et al., 2015, Section 6.1.1; Goodfellow et al., "Explaining and Harnessing Adversarial
      Examples", 2014, for the linf norm.
    """
    problem = Problem.of(apply_fn, params, x, y, norm=norm, eps=eps, bounds=bounds)
    problem, g = _margin_gradient(problem)
    r = inputs.expand_like(problem.eps, g) * norms.steepest(g, norm)
    return problem.answer(problem.clip_to_box(r))


@meshes.auto_axes(meshes.as_x)
def loss_sign(
    apply_fn: ApplyFn,
    params: Params,
    x: jax.Array,
    y: jax.Array,
    /,
    *,
    eps: Eps,
    key: jax.Array | None = None,
    bounds: Bounds | None = None,
) -> jax.Array:
    r"""Adv_Loss_Sign: the sign direction of Adv_Loss, rescaled to the l2 size eps.

    .. math:: r = -\epsilon\, \mathrm{sign}(T_y) / \|\mathrm{sign}(T_y)\|_2

    Each entry with a nonzero gradient moves by :math:`\epsilon / \sqrt{n}`, where n is the number
    of such entries. The paper's tables use it to compare methods at the same l2 size; for an linf
    ball, use `loss` with `norm="linf"`.

    Args:
      apply_fn: `(params, x) -> logits`, `[B, ...]` to `[B, K]`. A logit of -inf masks its class.
      params: the first argument of `apply_fn`.
      x: `[B, ...]`, floating point.
      y: integer labels, `[B]`.
      eps: the l2 size, a scalar or `[B]`; a negative traced value counts as 0.
      key: ignored; this method is deterministic.
      bounds: `(lo, hi)`; r is clipped entry by entry so that x + r lies in it. None: no box.

    Returns:
      r, of x's shape and dtype, of l2 size eps (less where `bounds` clip it).

    Raises:
      TypeError: if `x` or the logits are not floating-point arrays, or `y` not integers.
      ValueError: if shapes are not `[B, ...]`, `[B]` and `[B, K]` with K >= 2, if a Python `eps` is
        negative, or if `bounds` is not a pair.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxadv import perturb
      >>> w = jnp.array([[3.0, -3.0], [4.0, -4.0], [0.0, 0.0], [1.0, 0.0], [0.0, 5.0]])
      >>> x, y = jnp.ones((1, 5)), jnp.array([0])
      >>> perturb.loss_sign(lambda w, x: x @ w, w, x, y, eps=4.0).tolist()
      [[-2.0, -2.0, 0.0, -2.0, 2.0]]

    References:
      Huang et al., 2015, Section 7.1.
    """
    problem = Problem.of(apply_fn, params, x, y, norm="l2", eps=eps, bounds=bounds)
    problem, g = _margin_gradient(problem)
    r = norms.rescale(norms.steepest(g, "linf"), problem.eps, "l2")
    return problem.answer(problem.clip_to_box(r))


@meshes.auto_axes(meshes.as_x)
def vat(
    apply_fn: ApplyFn,
    params: Params,
    x: jax.Array,
    y: jax.Array | None = None,
    /,
    *,
    eps: Eps,
    norm: Norm = "l2",
    steps: int = 1,
    key: jax.Array | None = None,
    bounds: Bounds | None = None,
) -> jax.Array:
    r"""Miyato's virtual adversary: the perturbation that most changes the net's own output.

    .. math:: \arg\max_{\|r\| \le \epsilon} D_{KL}(p(x) \,\|\, p(x + r))
              \approx \arg\max_{\|r\| \le \epsilon} r^\top H r, \qquad
              H = J^\top (\mathrm{diag}(p) - p p^\top) J

    with J the Jacobian of the logits. Starting from a random direction, it makes `steps` power
    iterations on H. Each is an exact product (push forward, multiply by diag(p) - pp^T, pull back)
    rather than a finite difference, with the factor that vanishes for a confident p factored out. r
    is the norm's steepest direction for the last product, at size eps.

    Args:
      apply_fn: `(params, x) -> logits`, `[B, ...]` to `[B, K]`; differentiable in both modes. A
        logit of -inf masks its class.
      params: the first argument of `apply_fn`.
      x: `[B, ...]`, floating point.
      y: integer labels, `[B]`, or None. They don't change the direction; where one is invalid, or
        its logit is -inf, r is 0.
      eps: the size, a scalar or `[B]`; a negative traced value counts as 0.
      norm: the norm of that size: `"l1"`, `"l2"` or `"linf"`.
      steps: power iterations, at least 1, each a forward and a backward pass.
      key: one key, or one per example, `[B]`; for the random direction.
      bounds: `(lo, hi)`; r is clipped entry by entry so that x + r lies in it. None: no box.

    Returns:
      r, of x's shape and dtype, of size eps (less where `bounds` clip it). Its sign is random:
      to second order, both signs are equally harmful.

    Raises:
      TypeError: if `x` or the logits are not floating-point arrays, or `y` not integers.
      ValueError: if the key is missing, if `steps` < 1, if shapes are not `[B, ...]`, `[B]` and
        `[B, K]` with K >= 2, if the norm is unknown, if a Python `eps` is negative, or if `bounds`
        is not a pair.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxadv import perturb
      >>> w = jnp.array([[3.0, -3.0], [4.0, -4.0]])
      >>> r = perturb.vat(
      ...     lambda w, x: x @ w, w, jnp.ones((1, 2)), eps=5.0, key=jax.random.key(0)
      ... )
      >>> jnp.abs(r).round(4).tolist()
      [[3.0, 4.0]]

    References:
      Miyato et al., "Distributional Smoothing with Virtual Adversarial Training", 2015, Section 3.
    """
    inputs.at_least(1, "steps", steps, "one power iteration is usual")
    problem = Problem.of(
        apply_fn, params, x, y, norm=norm, eps=eps, bounds=bounds, any_labels=y is None, key=key,
        drawn_by="perturb.vat",
    )  # fmt: skip
    x = problem.x
    logits, push = jax.linearize(lambda v: inputs.apply(apply_fn, params, v), x)
    pull = jax.linear_transpose(push, x)

    wide = inputs.accum_dtype(x.dtype)
    v = jax.vmap(lambda k: jax.random.normal(k, x.shape[1:], wide))(problem.keys)
    for _ in range(steps):
        pushed = push(norms.steepest(v, "l2").astype(x.dtype)).astype(
            inputs.accum_dtype(logits.dtype)
        )
        (v,) = pull(_scaled_fisher(logits, pushed).astype(logits.dtype))
    r = inputs.expand_like(problem.eps, x) * norms.steepest(v.astype(wide), norm)
    return problem.with_logits(logits).answer(problem.clip_to_box(r))


def _margin_gradient(problem: Problem) -> tuple[Problem, jax.Array]:
    """Return the problem with its logits, and the gradient of logsumexp_{k != y} z_k - z_y.

    The gradient, up to a positive factor, is in float32 at least: rounding a direction before it is
    scaled would change its size. Where the gradient is 0, and so tells nothing about the other
    classes, it is computed without the top wrong class.
    """
    logits, pull, _ = jacobian.scaled_pullback(problem.apply_fn, problem.params, problem.x)
    is_y = jax.nn.one_hot(problem.y, logits.shape[1], dtype=bool)

    def gradient(others: jax.Array) -> jax.Array:
        # In z: the softmax of the other classes, and -1 at y.
        softmax = jacobian.without_rounding(jax.nn.softmax(losses.shift_logits(others), axis=1))
        g = pull(jnp.where(is_y, -1, softmax))
        return g.astype(inputs.accum_dtype(g.dtype))

    g = gradient(jnp.where(is_y, -jnp.inf, logits))
    _, after = losses.top_wrong(logits, is_y)
    hidden = norms.is_zero(g) & jnp.any(after > -jnp.inf, axis=1)

    def past_top_wrong() -> jax.Array:
        return jnp.where(inputs.expand_like(hidden, g), gradient(after), g)

    g = _where_needed(jnp.any(hidden), past_top_wrong, g)
    return problem.with_logits(logits), g


def _where_needed(needed: jax.Array, compute: Callable[[], Value], otherwise: Value) -> Value:
    """Return what is computed if it is needed, else the other.

    Outside a trace, `lax.cond` would compile its branches at each call, since they are new.
    """
    if isinstance(needed, jax.core.Tracer):
        return lax.cond(needed, compute, lambda: otherwise)
    return compute() if needed else otherwise


def _scaled_fisher(logits: jax.Array, u: jax.Array) -> jax.Array:
    """Return `(diag(p) - p p^T) u` of each row, divided by the second largest probability.

    With u taken relative to its entry at the top class, no term is the difference of nearly equal
    numbers, however close to 1 the top probability is.
    """
    z = losses.shift_logits(logits.astype(u.dtype))
    log_p = jax.nn.log_softmax(z, axis=1)
    is_top = jax.nn.one_hot(jnp.argmax(z, axis=1), z.shape[1], dtype=bool)
    log_second = jnp.max(jnp.where(is_top, -jnp.inf, log_p), axis=1, keepdims=True)
    # p / p_second, except for the top class, where it may overflow: double where.
    w = jnp.where(is_top, 0, jnp.exp(jnp.where(is_top, 0, log_p - log_second)))
    u = u - jnp.sum(jnp.where(is_top, u, 0), axis=1, keepdims=True)
    mean = jnp.sum(w * u, axis=1, keepdims=True)  # <p, u> / p_second
    return jnp.where(is_top, -jnp.exp(log_p) * mean, w * (u - jnp.exp(log_second) * mean))
