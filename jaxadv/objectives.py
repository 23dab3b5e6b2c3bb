r"""What is minimised: objectives that train a net on, or beside, its own perturbed inputs.

Each factory returns an `Objective` for `train.make_step`:

- `natural`: the plain loss.
- `adversarial`: the min-max problem of Equation 2 (LWA), :math:`\sum_i \max_{\|r_i\| \le \epsilon}
  \ell(g(x_i + r_i), y_i)`, with any perturbation method as its inner maximiser.
- `mixed`: Goodfellow's weighted sum of the clean and the adversarial loss.
- `kl_regularized`: Miyato's smoothing: the loss, and the divergence to the net's own perturbed
  output.
- `representation`: the min-max problem at an inner layer, Equation 4 (LWA_Rep).

The perturbation method is an argument (anything with the signature `types.PerturbFn`): this module
knows none. By Proposition 6 (Danskin), the derivative of a maximum is the partial derivative at the
maximiser, so r is a constant: that `stop_gradient` is in one place, here, and nowhere else.

The adversary sees the deterministic net, `apply_fn(params, x)`. What is trained may differ: with
dropout or batch norm pass `train_fn(params, model_state, x, key) -> (output, model_state)`. Where
there is a model state (anything but None), `apply_fn` gets `(params, model_state)` as its first
argument: the parameters and the running statistics together.

`eps` is a number, an optax schedule of the step, or `Relative` to the size of the input.

With the default loss, a label outside of 0 to K - 1 makes the loss NaN, so that it is seen; its
example has no part in the gradient, and counts as wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jax import lax

from jaxadv import inputs, meshes, norms
from jaxadv.types import (
    ApplyFn,
    Bounds,
    EncodeFn,
    LossFn,
    Norm,
    Objective,
    Params,
    PerturbFn,
    Schedule,
    TrainFn,
)

__all__ = ["Aux", "Relative", "adversarial", "kl_regularized", "mixed", "natural", "representation"]


def _cross_entropy(logits: jax.Array, y: jax.Array) -> jax.Array:
    # The versions of optax differ in what they raise for labels that are no integers.
    labels = inputs.labels(y, logits.shape[0])
    losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels)
    # To which -1 would be the last class.
    return jnp.where((labels >= 0) & (labels < logits.shape[1]), losses, jnp.nan)


class Relative(NamedTuple):
    """A perturbation size as a fraction of the size of the input that is perturbed.

    Attributes:
      size: the fraction, a number or an optax schedule of the step.
      norm: the norm that the input is measured in.
    """

    size: float | Schedule
    norm: Norm = "l2"


Size: TypeAlias = float | jax.Array | Schedule | Relative


class Aux(NamedTuple):
    """What an objective reports of one batch, beside its loss.

    Attributes:
      accuracy: share of the examples that the trained net classified right, as perturbed.
      eps: mean size asked of the adversary; 0 without one.
      zero: number of examples whose perturbation is exactly 0 though a size was asked for: they
        have no usable gradient.
      nonfinite: number of examples whose perturbation has NaN or infinite entries.
    """

    accuracy: jax.Array
    eps: jax.Array
    zero: jax.Array
    nonfinite: jax.Array


def natural(
    apply_fn: ApplyFn, *, loss_fn: LossFn = _cross_entropy, train_fn: TrainFn | None = None
) -> Objective:
    r"""Plain training: the mean loss of the batch.

    Args:
      apply_fn: `(params, x) -> logits`; trained as it is unless `train_fn` is given.
      loss_fn: `(logits, labels) -> [B]`; cross-entropy by default.
      train_fn: `(params, model_state, x, key) -> (logits, model_state)`, the net as trained.

    Returns:
      An `Objective`; its aux is `Aux`.

    Raises:
      TypeError: when called, if labels aren't integers and `loss_fn` is left at cross-entropy.
      ValueError: when called, if `loss_fn` doesn't return one loss per example.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from jaxadv import objectives, train
      >>> tx = optax.sgd(0.1)
      >>> step = train.make_step(objectives.natural(lambda w, x: x @ w), tx)
      >>> state = train.init(jnp.zeros((2, 3)), tx, key=jax.random.key(0))
      >>> state, info = step(state, (jnp.ones((4, 2)), jnp.array([0, 1, 2, 0])))
      >>> round(float(info.loss), 4)  # log 3
      1.0986
    """
    run = _trained(apply_fn, train_fn)

    @meshes.auto_axes(meshes.as_objective)
    def objective(
        params: Params, model_state: Any, batch: Any, /, *, key: jax.Array, step: jax.Array
    ) -> tuple[jax.Array, tuple[Any, Aux]]:
        x, y = _examples(batch)
        logits, model_state = run(params, model_state, x, key)
        return _mean_loss(loss_fn, logits, x, y), (model_state, _aux(logits, y))

    return objective


def adversarial(
    apply_fn: ApplyFn,
    perturb_fn: PerturbFn,
    *,
    eps: Size,
    loss_fn: LossFn = _cross_entropy,
    train_fn: TrainFn | None = None,
    bounds: Bounds | None = None,
) -> Objective:
    r"""Learning with a strong adversary, LWA: the loss at the perturbed inputs alone.

    .. math:: \min_g \sum_i \max_{\|r_i\| \le \epsilon} \ell(g(x_i + r_i), y_i)

    Args:
      apply_fn: `(params, x) -> logits`, the deterministic net that the adversary sees.
      perturb_fn: the inner maximiser, e.g. `perturb.loss`, or `functools.partial` of one.
      eps: the adversary's size: a number, a schedule of the step, or `Relative`.
      loss_fn: `(logits, labels) -> [B]`; cross-entropy by default.
      train_fn: `(params, model_state, x, key) -> (logits, model_state)`, the net as trained.
      bounds: the box that perturbed inputs stay in; None for no box, as in the paper.

    Returns:
      An `Objective`; its aux is `Aux`.

    Raises:
      TypeError: when called, if labels aren't integers and `loss_fn` is left at cross-entropy.
      ValueError: when called, if `loss_fn` doesn't return one loss per example.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from jaxadv import objectives, perturb, train
      >>> tx = optax.sgd(0.1)
      >>> lwa = objectives.adversarial(lambda w, x: x @ w, perturb.loss, eps=0.5)
      >>> state = train.init(jnp.eye(2), tx, key=jax.random.key(0))
      >>> state, info = train.make_step(lwa, tx)(state, (jnp.eye(2), jnp.array([0, 1])))
      >>> round(float(info.loss), 4)  # log(1 + exp(-1 + 0.5 * sqrt(2)))
      0.5574

    References:
      Huang et al., 2015, Equation 2, Algorithm 2, Proposition 6.
    """
    run = _trained(apply_fn, train_fn)
    adversary = _adversary(perturb_fn, apply_fn, eps, bounds)

    @meshes.auto_axes(meshes.as_objective)
    def objective(
        params: Params, model_state: Any, batch: Any, /, *, key: jax.Array, step: jax.Array
    ) -> tuple[jax.Array, tuple[Any, Aux]]:
        x, y = _examples(batch)
        attack_key, train_key = jax.random.split(key)
        r, size = adversary(_variables(params, model_state), x, y, step, attack_key)
        logits, model_state = run(params, model_state, x + r, train_key)
        return _mean_loss(loss_fn, logits, x, y), (model_state, _aux(logits, y, r, size))

    return objective


def mixed(
    apply_fn: ApplyFn,
    perturb_fn: PerturbFn,
    *,
    eps: Size,
    weight: float = 0.5,
    loss_fn: LossFn = _cross_entropy,
    train_fn: TrainFn | None = None,
    bounds: Bounds | None = None,
) -> Objective:
    r"""Goodfellow's objective: a weighted sum of the clean and the adversarial loss.

    .. math:: w\, \ell(g(x), y) + (1 - w) \max_{\|r\| \le \epsilon} \ell(g(x + r), y)

    Weight 0 is the objective of Nøkland (2015), and `adversarial`; weight 1 is `natural`. Both
    passes use the same dropout key; a model state goes through the clean pass first.

    Args:
      apply_fn: `(params, x) -> logits`, the deterministic net that the adversary sees.
      perturb_fn: the inner maximiser; Goodfellow's is `partial(perturb.loss, norm="linf")`.
      eps: the adversary's size: a number, a schedule of the step, or `Relative`.
      weight: of the clean loss, in [0, 1].
      loss_fn: `(logits, labels) -> [B]`; cross-entropy by default.
      train_fn: `(params, model_state, x, key) -> (logits, model_state)`, the net as trained.
      bounds: the box that perturbed inputs stay in; None for no box, as in the paper.

    Returns:
      An `Objective`; its aux is `Aux`.

    Raises:
      TypeError: when called, if labels aren't integers and `loss_fn` is left at cross-entropy.
      ValueError: if `weight` is outside [0, 1]; when called, if `loss_fn` doesn't return one loss
        per example.

    Example:
      >>> from functools import partial
      >>> from jaxadv import objectives, perturb
      >>> fast = partial(perturb.loss, norm="linf")
      >>> goodfellow = objectives.mixed(lambda w, x: x @ w, fast, eps=0.1, weight=0.5)

    References:
      Goodfellow et al., "Explaining and Harnessing Adversarial Examples", 2014, Section 6;
      Huang et al., 2015, Section 5, Related Works.
    """
    if not 0 <= weight <= 1:
        raise ValueError(f"expected a weight in [0, 1], got {weight}; it is the clean loss's share")
    run = _trained(apply_fn, train_fn)
    adversary = _adversary(perturb_fn, apply_fn, eps, bounds)

    @meshes.auto_axes(meshes.as_objective)
    def objective(
        params: Params, model_state: Any, batch: Any, /, *, key: jax.Array, step: jax.Array
    ) -> tuple[jax.Array, tuple[Any, Aux]]:
        x, y = _examples(batch)
        attack_key, train_key = jax.random.split(key)
        r, size = adversary(_variables(params, model_state), x, y, step, attack_key)
        clean, model_state = run(params, model_state, x, train_key)
        logits, model_state = run(params, model_state, x + r, train_key)
        loss = weight * _mean_loss(loss_fn, clean, x, y)
        loss += (1 - weight) * _mean_loss(loss_fn, logits, x, y)
        return loss, (model_state, _aux(logits, y, r, size))

    return objective


def kl_regularized(
    apply_fn: ApplyFn,
    perturb_fn: PerturbFn,
    *,
    eps: Size,
    weight: float = 1.0,
    loss_fn: LossFn = _cross_entropy,
    train_fn: TrainFn | None = None,
    bounds: Bounds | None = None,
) -> Objective:
    r"""Miyato's objective: the clean loss, and how far the net's output moves under perturbation.

    .. math:: \ell(g(x), y) + w \max_{\|r\| \le \epsilon} D_{KL}(p \,\|\, g(x + r)),
              \qquad p = g(x) \text{ held constant}

    (The paper's print of it lacks the maximum, the weight and the constant p.) Both passes use the
    same dropout key; a model state goes through the clean pass first.

    Args:
      apply_fn: `(params, x) -> logits`, the deterministic net that the adversary sees.
      perturb_fn: the inner maximiser; Miyato's is `perturb.vat`.
      eps: the adversary's size: a number, a schedule of the step, or `Relative`.
      weight: of the divergence, at least 0.
      loss_fn: `(logits, labels) -> [B]`; cross-entropy by default.
      train_fn: `(params, model_state, x, key) -> (logits, model_state)`, the net as trained.
      bounds: the box that perturbed inputs stay in; None for no box.

    Returns:
      An `Objective`; its aux is `Aux`, with the accuracy at the perturbed inputs.

    Raises:
      TypeError: when called, if labels aren't integers and `loss_fn` is left at cross-entropy.
      ValueError: if `weight` is negative; when called, if `loss_fn` doesn't return one loss per
        example.

    Example:
      >>> from jaxadv import objectives, perturb
      >>> vat = objectives.kl_regularized(lambda w, x: x @ w, perturb.vat, eps=1.5, weight=1.0)

    References:
      Miyato et al., "Distributional Smoothing with Virtual Adversarial Training", 2015;
      Huang et al., 2015, Section 5, Related Works.
    """
    if not weight >= 0:
        raise ValueError(f"expected a weight >= 0, got {weight}; it multiplies the divergence")
    run = _trained(apply_fn, train_fn)
    adversary = _adversary(perturb_fn, apply_fn, eps, bounds)

    @meshes.auto_axes(meshes.as_objective)
    def objective(
        params: Params, model_state: Any, batch: Any, /, *, key: jax.Array, step: jax.Array
    ) -> tuple[jax.Array, tuple[Any, Aux]]:
        x, y = _examples(batch)
        attack_key, train_key = jax.random.split(key)
        r, size = adversary(_variables(params, model_state), x, y, step, attack_key)
        clean, model_state = run(params, model_state, x, train_key)
        moved, model_state = run(params, model_state, x + r, train_key)
        loss = _mean_loss(loss_fn, clean, x, y)
        p, q = (jax.nn.log_softmax(z.astype(inputs.accum_dtype(z.dtype))) for z in (clean, moved))
        divergence = optax.losses.kl_divergence_with_log_targets(
            q, lax.stop_gradient(p), where=p > -jnp.inf
        )
        return loss + weight * jnp.mean(divergence), (model_state, _aux(moved, y, r, size))

    return objective


def representation(
    encode_fn: EncodeFn,
    classify_fn: ApplyFn,
    perturb_fn: PerturbFn,
    *,
    eps: Size,
    loss_fn: LossFn = _cross_entropy,
    encode_train_fn: TrainFn | None = None,
    classify_train_fn: TrainFn | None = None,
) -> Objective:
    r"""LWA at the representation layer, LWA_Rep: the perturbation is added to an encoder's output.

    .. math:: \min \sum_i \max_{\|r_i\| \le \epsilon}
              \ell(N_{cla}(N_{rep}(x_i) + r_i), y_i)

    r is computed for the classifier part at h = encode(x) and is a constant; the loss at h + r
    trains both parts (the derivative in h passes through h + r to the encoder unchanged).

    A net can make an absolute `eps` harmless by scaling its representation up; `Relative` can't be
    escaped so.

    Args:
      encode_fn: the paper's N_rep, `(params, x) -> h`, `[B, ...]`.
      classify_fn: the paper's N_cla, `(params, h) -> logits`, which the adversary sees. Both take
        the whole of `params`.
      perturb_fn: the inner maximiser, e.g. `perturb.loss`.
      eps: the adversary's size: a number, a schedule of the step, or `Relative` to ||h||.
      loss_fn: `(logits, labels) -> [B]`; cross-entropy by default.
      encode_train_fn: `(params, model_state, x, key) -> (h, model_state)`, the encoder as trained.
      classify_train_fn: `(params, model_state, h, key) -> (logits, model_state)`, likewise.

    Returns:
      An `Objective`; its aux is `Aux`.

    Raises:
      TypeError: when called, if labels aren't integers and `loss_fn` is left at cross-entropy.
      ValueError: when called, if `loss_fn` doesn't return one loss per example.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxadv import objectives, perturb
      >>> lwa_rep = objectives.representation(
      ...     lambda p, x: jnp.tanh(x @ p[0]), lambda p, h: h @ p[1], perturb.loss,
      ...     eps=objectives.Relative(0.25),
      ... )

    References:
      Huang et al., 2015, Equation 4 and Algorithm 3.
    """
    encode = _trained(encode_fn, encode_train_fn)
    classify = _trained(classify_fn, classify_train_fn)
    adversary = _adversary(perturb_fn, classify_fn, eps, None)

    @meshes.auto_axes(meshes.as_objective)
    def objective(
        params: Params, model_state: Any, batch: Any, /, *, key: jax.Array, step: jax.Array
    ) -> tuple[jax.Array, tuple[Any, Aux]]:
        x, y = _examples(batch)
        attack_key, encode_key, classify_key = jax.random.split(key, 3)
        h, new_state = encode(params, model_state, x, encode_key)
        r, size = adversary(_variables(params, model_state), h, y, step, attack_key)
        logits, new_state = classify(params, new_state, h + r, classify_key)
        return _mean_loss(loss_fn, logits, x, y), (new_state, _aux(logits, y, r, size))

    return objective


def _variables(params: Params, model_state: Any) -> Any:
    return params if model_state is None else (params, model_state)


def _examples(batch: Any) -> tuple[Any, Any]:
    """Check that a batch is a pair of arrays, of at least one example.

    Raises:
      TypeError: if it isn't a pair.
      ValueError: if it is empty, so that its mean loss would be NaN.
    """
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        got = sorted(batch) if isinstance(batch, dict) else type(batch).__name__
        raise TypeError(
            f"expected a batch (x, y), got {got}; pass a pair, e.g. "
            '(batch["image"], batch["label"])'
        )
    x, y = map(inputs.native, batch)
    if x.shape[:1] == (0,):
        raise ValueError("expected a batch of at least one example, got none; leave it out")
    return x, y


def _trained(apply_fn: ApplyFn | EncodeFn, train_fn: TrainFn | None) -> TrainFn:
    """Return `train_fn`, or `apply_fn` with its signature."""
    if train_fn is not None:
        return _checked(train_fn)

    def run(
        params: Params, model_state: Any, x: jax.Array, key: jax.Array, /
    ) -> tuple[jax.Array, Any]:
        return apply_fn(_variables(params, model_state), x), model_state

    return run


def _checked(train_fn: TrainFn) -> TrainFn:
    def run(
        params: Params, model_state: Any, x: jax.Array, key: jax.Array, /
    ) -> tuple[jax.Array, Any]:
        out = train_fn(params, model_state, x, key)
        if not isinstance(out, tuple) or len(out) != 2:
            raise TypeError(
                f"expected train_fn to return (output, model_state), got {type(out).__name__}; "
                "return the state that came where the net has none"
            )
        return out

    return run


def _adversary(
    perturb_fn: PerturbFn, apply_fn: ApplyFn, eps: Size, bounds: Bounds | None
) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """Return a function from a batch to r, a constant, and the sizes asked for, `[B]`.

    r is a constant for derivatives by Proposition 6. The inputs are constants as well, so that
    differentiating an objective never traces derivatives through the adversary's loop, and an
    adversary needs none; the stop at r is for what else a `perturb_fn` may have closed over.
    """

    def perturb(
        variables: Any, x: jax.Array, y: jax.Array, step: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        variables, x = lax.stop_gradient((variables, inputs.examples(x)))
        number = eps.size if isinstance(eps, Relative) else eps
        size = inputs.radius(number(step) if callable(number) else number, x)
        if isinstance(eps, Relative):
            size = size * norms.norm(x, eps.norm)
        r = perturb_fn(apply_fn, variables, x, y, eps=size, key=key, bounds=bounds)
        return lax.stop_gradient(inputs.perturbation(r, x)), size

    return perturb


def _mean_loss(loss_fn: LossFn, logits: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
    logits = inputs.logits_of(logits, x.shape[0])
    y = inputs.paired(x, y)
    losses = loss_fn(logits.astype(inputs.accum_dtype(logits.dtype)), y)
    return jnp.mean(inputs.losses_of(losses, x.shape[0]))


def _aux(
    logits: jax.Array, y: jax.Array, r: jax.Array | None = None, size: jax.Array | None = None
) -> Aux:
    labels = y if y.ndim == 1 else jnp.argmax(y, axis=-1)
    # A NaN would be the largest logit, and a net that has diverged would be right about class 0.
    right = (jnp.argmax(logits, axis=-1) == labels) & jnp.all(logits < jnp.inf, axis=-1)
    accuracy = jnp.mean(right.astype(jnp.float32))
    if r is None or size is None:
        none = jnp.zeros((), jnp.int32)
        return Aux(accuracy, jnp.zeros_like(accuracy), none, none)
    # One pass over r tells both, since a maximum hands NaN on.
    largest = jnp.max(jnp.abs(r), axis=tuple(range(1, r.ndim)))
    zero = jnp.sum((largest == 0) & (size > 0), dtype=jnp.int32)
    nonfinite = jnp.sum(~jnp.isfinite(largest), dtype=jnp.int32)
    return Aux(accuracy, jnp.mean(size).astype(jnp.float32), zero, nonfinite)
