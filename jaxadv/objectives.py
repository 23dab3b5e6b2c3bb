r"""Objectives that train a net on its perturbed inputs, or on perturbed and clean inputs.

Each factory returns an `Objective` for `train.make_step`:

- `natural`: the plain loss.
- `adversarial`: the min-max problem of Equation 2 (LWA), :math:`\sum_i \max_{\|r_i\| \le \epsilon}
  \ell(g(x_i + r_i), y_i)`, with any perturbation method as its inner maximiser.
- `mixed`: Goodfellow's weighted sum of the clean and the adversarial loss.
- `kl_regularized`: Miyato's smoothing: the clean loss plus the KL divergence between the net's
  clean and perturbed outputs.
- `noisy`: for randomized smoothing (`certify`): the loss under Gaussian noise, optionally with the
  consistency regularizer.
- `representation`: the min-max problem at an inner layer, Equation 4 (LWA_Rep).
- `with_memory`: any of these, with an adversary that continues from each example's last
  perturbation.

The perturbation method is an argument, any function with the signature `types.PerturbFn`. By
Proposition 6 (Danskin), the derivative of a maximum is the partial derivative at the maximiser, so
r is treated as a constant; the `stop_gradient` for this is in this module and nowhere else.

The adversary attacks the deterministic net, `apply_fn(params, x)`. The net that is trained may
differ: for dropout or batch norm, pass
`train_fn(params, model_state, x, key) -> (output, model_state)`. If the model state isn't None, the
first argument of `apply_fn` is `(params, model_state)`: the parameters with the running statistics.

`eps` is a number, an optax schedule of the step, or `Relative` to the norm of the input.

The batch is `(x, y)`, or `(x, y, r)` for an objective with an adversary: the perturbation method
then starts from r (its argument `start`, as in `attack.pgd`), and the aux has the new r.

With the default loss, a label outside 0..K-1 makes the loss NaN, so that the mistake is noticed;
the example doesn't contribute to the gradient, and counts as misclassified.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jax import lax

from jaxadv import closures, inputs, meshes, norms
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

__all__ = [
    "Aux",
    "Memory",
    "Relative",
    "adversarial",
    "kl_regularized",
    "mixed",
    "natural",
    "noisy",
    "representation",
    "with_memory",
]


def _cross_entropy(logits: jax.Array, y: jax.Array) -> jax.Array:
    # Checked here, since versions of optax raise different errors for labels that aren't integers.
    labels = inputs.labels(y, logits.shape[0])
    losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels)
    # optax treats -1 as the last class.
    return jnp.where((labels >= 0) & (labels < logits.shape[1]), losses, jnp.nan)


class Relative(NamedTuple):
    """A perturbation size as a fraction of the norm of the input.

    Attributes:
      size: the fraction, a number or an optax schedule of the step.
      norm: the norm of the input.
    """

    size: float | Schedule
    norm: Norm = "l2"


Size: TypeAlias = float | jax.Array | Schedule | Relative


class Aux(NamedTuple):
    """The report of an objective on one batch, besides its loss.

    Attributes:
      accuracy: fraction of the (perturbed) examples that the trained net classifies correctly.
      eps: mean size allowed to the adversary; 0 without an adversary.
      zero: number of examples whose perturbation is exactly 0 although their eps isn't: for lack of
        a usable gradient or, with a minimal-norm adversary, because x is misclassified already.
      nonfinite: number of examples whose perturbation has NaN or infinite entries.
      r: the perturbations, `[B, ...]`, if the batch was `(x, y, r)`, else None.
    """

    accuracy: jax.Array
    eps: jax.Array
    zero: jax.Array
    nonfinite: jax.Array
    r: jax.Array | None = None


def natural(
    apply_fn: ApplyFn, *, loss_fn: LossFn = _cross_entropy, train_fn: TrainFn | None = None
) -> Objective:
    r"""Plain training: the mean loss of the batch.

    Args:
      apply_fn: `(params, x) -> logits`; trained itself unless `train_fn` is given.
      loss_fn: `(logits, labels) -> [B]`; cross-entropy by default.
      train_fn: `(params, model_state, x, key) -> (logits, model_state)`, the net in training mode.

    Returns:
      An `Objective`; its aux is `Aux`.

    Raises:
      TypeError: when called, if labels aren't integers and `loss_fn` is the default.
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
    r"""Learning with a strong adversary, LWA: the loss on the perturbed inputs only.

    .. math:: \min_g \sum_i \max_{\|r_i\| \le \epsilon} \ell(g(x_i + r_i), y_i)

    Args:
      apply_fn: `(params, x) -> logits`, the deterministic net that the adversary attacks.
      perturb_fn: the inner maximiser, e.g. `perturb.loss` or a `functools.partial` of it.
      eps: the adversary's size: a number, a schedule of the step, or `Relative`.
      loss_fn: `(logits, labels) -> [B]`; cross-entropy by default.
      train_fn: `(params, model_state, x, key) -> (logits, model_state)`, the net in training mode.
      bounds: the box that perturbed inputs stay in; None for no box, as in the paper.

    Returns:
      An `Objective`; its aux is `Aux`.

    Raises:
      TypeError: if `perturb_fn` has bounds of its own or is targeted; when called, if labels aren't
        integers and `loss_fn` is the default.
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
        x, y, *given = _examples(batch, 3)
        attack_key, train_key = jax.random.split(key)
        r, size = adversary(_variables(params, model_state), x, y, step, attack_key, *given)
        logits, model_state = run(params, model_state, x + r, train_key)
        return _mean_loss(loss_fn, logits, x, y), (model_state, _aux(logits, y, r, size, *given))

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

    Weight 0 gives `adversarial`, the objective of Nøkland (2015). Both passes use the same dropout
    key; the clean pass updates the model state first.

    Args:
      apply_fn: `(params, x) -> logits`, the deterministic net that the adversary attacks.
      perturb_fn: the inner maximiser; Goodfellow's is `partial(perturb.loss, norm="linf")`.
      eps: the adversary's size: a number, a schedule of the step, or `Relative`.
      weight: weight of the clean loss, in [0, 1].
      loss_fn: `(logits, labels) -> [B]`; cross-entropy by default.
      train_fn: `(params, model_state, x, key) -> (logits, model_state)`, the net in training mode.
      bounds: the box that perturbed inputs stay in; None for no box, as in the paper.

    Returns:
      An `Objective`; its aux is `Aux`.

    Raises:
      TypeError: if `perturb_fn` has bounds of its own or is targeted; when called, if labels aren't
        integers and `loss_fn` is the default.
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
        raise ValueError(f"expected a weight in [0, 1], got {weight}; it weights the clean loss")
    run = _trained(apply_fn, train_fn)
    adversary = _adversary(perturb_fn, apply_fn, eps, bounds)

    @meshes.auto_axes(meshes.as_objective)
    def objective(
        params: Params, model_state: Any, batch: Any, /, *, key: jax.Array, step: jax.Array
    ) -> tuple[jax.Array, tuple[Any, Aux]]:
        x, y, *given = _examples(batch, 3)
        attack_key, train_key = jax.random.split(key)
        r, size = adversary(_variables(params, model_state), x, y, step, attack_key, *given)
        clean, model_state = run(params, model_state, x, train_key)
        logits, model_state = run(params, model_state, x + r, train_key)
        loss = weight * _mean_loss(loss_fn, clean, x, y)
        loss += (1 - weight) * _mean_loss(loss_fn, logits, x, y)
        return loss, (model_state, _aux(logits, y, r, size, *given))

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
    r"""Miyato's objective: the clean loss plus the KL divergence that a perturbation causes.

    .. math:: \ell(g(x), y) + w \max_{\|r\| \le \epsilon} D_{KL}(p \,\|\, g(x + r)),
              \qquad p = g(x) \text{ held constant}

    (The formula as printed lacks the maximum, the weight and the constant p.) Both passes use the
    same dropout key; the clean pass updates the model state first.

    Args:
      apply_fn: `(params, x) -> logits`, the deterministic net that the adversary attacks.
      perturb_fn: the inner maximiser; Miyato's is `perturb.vat`.
      eps: the adversary's size: a number, a schedule of the step, or `Relative`.
      weight: weight of the divergence, at least 0.
      loss_fn: `(logits, labels) -> [B]`; cross-entropy by default.
      train_fn: `(params, model_state, x, key) -> (logits, model_state)`, the net in training mode.
      bounds: the box that perturbed inputs stay in; None for no box.

    Returns:
      An `Objective`; its aux is `Aux`, with the accuracy at the perturbed inputs.

    Raises:
      TypeError: if `perturb_fn` has bounds of its own or is targeted; when called, if labels aren't
        integers and `loss_fn` is the default.
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
        x, y, *given = _examples(batch, 3)
        attack_key, train_key = jax.random.split(key)
        r, size = adversary(_variables(params, model_state), x, y, step, attack_key, *given)
        clean, model_state = run(params, model_state, x, train_key)
        moved, model_state = run(params, model_state, x + r, train_key)
        loss = _mean_loss(loss_fn, clean, x, y)
        p, q = (jax.nn.log_softmax(z.astype(inputs.accum_dtype(z.dtype))) for z in (clean, moved))
        divergence = optax.losses.kl_divergence_with_log_targets(
            q, lax.stop_gradient(p), where=p > -jnp.inf
        )
        return loss + weight * jnp.mean(divergence), (model_state, _aux(moved, y, r, size, *given))

    return objective


def noisy(
    apply_fn: ApplyFn,
    *,
    sigma: float,
    copies: int = 1,
    consistency: float = 0.0,
    entropy: float = 0.0,
    loss_fn: LossFn = _cross_entropy,
    train_fn: TrainFn | None = None,
) -> Objective:
    r"""Training for randomized smoothing: the loss under Gaussian noise, and consistency.

    .. math:: \frac{1}{m} \sum_{i=1}^m \ell(g(x + \sigma z_i), y)
              + \frac{\lambda}{m} \sum_{i=1}^m D_{KL}(p \,\|\, g(x + \sigma z_i)) + \eta\, H(p),
              \qquad p = \frac{1}{m} \sum_{i=1}^m g(x + \sigma z_i)

    By default this is plain training under noise (Cohen et al., 2019). The regularizer makes the
    predictions under noise agree (Jeong and Shin, 2020); gradients flow through p too. On MNIST at
    sigma 0.5, the authors certified a LeNet trained with m = 2 copies, lambda = 5 and eta = 0.5.

    The net gets all copies in one batch, m times as large.

    Args:
      apply_fn: `(params, x) -> logits`; trained itself unless `train_fn` is given.
      sigma: standard deviation of the noise, positive; use the same for `certify`.
      copies: m, noisy copies of each example, at least 1; 2 or more for `consistency`.
      consistency: lambda, the weight of the divergences, at least 0.
      entropy: eta, the weight of the mean prediction's entropy, at least 0.
      loss_fn: `(logits, labels) -> [B]`; cross-entropy by default.
      train_fn: `(params, model_state, x, key) -> (logits, model_state)`, the net in training mode.

    Returns:
      An `Objective`; its aux is `Aux`, with the accuracy under noise.

    Raises:
      TypeError: if `copies` isn't an integer; when called, if labels aren't integers and `loss_fn`
        is the default.
      ValueError: if `sigma` isn't positive and finite, `copies` < 1, a weight is negative, or
        `consistency` is positive for a single copy; when called, if `loss_fn` doesn't return one
        loss per example.

    Example:
      >>> from jaxadv import objectives
      >>> gaussian = objectives.noisy(lambda w, x: x @ w, sigma=0.5)
      >>> consistent = objectives.noisy(
      ...     lambda w, x: x @ w, sigma=0.5, copies=2, consistency=5.0, entropy=0.5
      ... )

    References:
      Cohen et al., "Certified Adversarial Robustness via Randomized Smoothing", 2019; Jeong and
      Shin, "Consistency Regularization for Certified Robustness of Smoothed Classifiers", 2020.
    """
    if not 0 < sigma < jnp.inf:
        raise ValueError(f"expected a finite sigma > 0, got {sigma}; without noise, use natural")
    inputs.at_least(1, "copies", copies, "2 is usual for consistency")
    if not (consistency >= 0 and entropy >= 0):
        raise ValueError(
            f"expected weights >= 0, got consistency={consistency}, entropy={entropy}; they "
            "multiply a divergence and an entropy"
        )
    if consistency and copies == 1:
        raise ValueError("expected copies >= 2 for consistency, got 1; a single copy always agrees")
    run = _trained(apply_fn, train_fn)

    @meshes.auto_axes(meshes.as_objective)
    def objective(
        params: Params, model_state: Any, batch: Any, /, *, key: jax.Array, step: jax.Array
    ) -> tuple[jax.Array, tuple[Any, Aux]]:
        x, y = _examples(batch)
        x, y = inputs.examples(x), inputs.paired(x, y)
        noise_key, train_key = jax.random.split(key)
        x, y = (jnp.concatenate([a] * copies) for a in (x, y))
        x += (sigma * jax.random.normal(noise_key, x.shape)).astype(x.dtype)
        logits, model_state = run(params, model_state, x, train_key)
        loss = _mean_loss(loss_fn, logits, x, y)
        if consistency or entropy:
            log_p = jax.nn.log_softmax(logits.astype(inputs.accum_dtype(logits.dtype)))
            log_p = log_p.reshape(copies, -1, log_p.shape[1])
            p = jnp.mean(jnp.exp(log_p), axis=0)
            # Zeros for classes without probability, so that derivatives are finite.
            mean = jnp.log(jnp.where(p > 0, p, 1))
            each = jnp.mean(jnp.where((p > 0)[None], log_p, 0), axis=0)
            divergence, spread = jnp.sum(p * (mean - each), axis=1), -jnp.sum(p * mean, axis=1)
            loss += jnp.mean(consistency * divergence + entropy * spread)
        return loss, (model_state, _aux(logits, y))

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

    r is computed for the classifier part at h = encode(x), and is a constant. The loss at h + r
    trains both parts: its gradient passes through h + r to the encoder unchanged.

    A net can make an absolute `eps` harmless by scaling up its representation; a `Relative` one
    scales with it.

    Args:
      encode_fn: the paper's N_rep, `(params, x) -> h`, `[B, ...]`.
      classify_fn: the paper's N_cla, `(params, h) -> logits`, which the adversary attacks. Both
        take the whole of `params`.
      perturb_fn: the inner maximiser, e.g. `perturb.loss`.
      eps: the adversary's size: a number, a schedule of the step, or `Relative` to ||h||.
      loss_fn: `(logits, labels) -> [B]`; cross-entropy by default.
      encode_train_fn: `(params, model_state, x, key) -> (h, model_state)`, the encoder in training
        mode.
      classify_train_fn: `(params, model_state, h, key) -> (logits, model_state)`, likewise.

    Returns:
      An `Objective`; its aux is `Aux`.

    Raises:
      TypeError: if `perturb_fn` has bounds of its own or is targeted; when called, if labels aren't
        integers and `loss_fn` is the default.
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
        x, y, *given = _examples(batch, 3)
        attack_key, encode_key, classify_key = jax.random.split(key, 3)
        h, new_state = encode(params, model_state, x, encode_key)
        r, size = adversary(_variables(params, model_state), h, y, step, attack_key, *given)
        logits, new_state = classify(params, new_state, h + r, classify_key)
        return _mean_loss(loss_fn, logits, x, y), (new_state, _aux(logits, y, r, size, *given))

    return objective


class Memory(NamedTuple):
    """The model state of an objective `with_memory`.

    Attributes:
      r: the last perturbation of each of the N training examples, `[N, ...]`.
      model_state: the net's own state, or None.
    """

    r: jax.Array
    model_state: Any = None


def with_memory(objective: Objective) -> Objective:
    r"""Let the adversary continue from each example's last perturbation, instead of from x.

    .. math:: r_i \leftarrow \Pi_{\|r\| \le \epsilon}\bigl(r_i + s \arg\max_{\|u\| \le 1}
              \langle \nabla_x \ell(g(x_i + r_i), y_i), u \rangle\bigr)

    at each visit of example i. With one step per visit, the adversary gains strength over epochs
    instead of within a training step, and training costs no more than one-step LWA. The batch is
    `(x, y, index)`, and the model state is a `Memory`, whose rows `index` are read and written. So
    the memory is donated, saved and sharded with the training state, and no step copies it.

    To reset the memory, put other perturbations into the state between epochs, such as zeros or
    those of `norms.sample`. With random shifts or crops, r belongs to the original image: apply
    them to it as to x, and undo them afterwards.

    Args:
      objective: an objective of this module whose adversary takes `start`, for instance
        `attack.pgd` with `steps=1, keep="last"`.

    Returns:
      An `Objective`; its aux is the one of `objective`, without r.

    Raises:
      TypeError: when called, if the model state isn't `Memory`, if the batch isn't `(x, y, index)`,
        or if the adversary doesn't take `start`.
      ValueError: when called, if the index isn't integers `[B]`.

    Example:
      >>> from functools import partial
      >>> import jax, jax.numpy as jnp, optax
      >>> from jaxadv import attack, objectives, train
      >>> step = partial(attack.pgd, steps=1, step_size=0.5, keep="last")
      >>> lwa = objectives.adversarial(lambda w, x: x @ w, step, eps=1.0)
      >>> x, y, tx = jnp.eye(4), jnp.array([0, 1, 0, 1]), optax.sgd(0.1)
      >>> epoch = train.make_epoch(objectives.with_memory(lwa), tx)
      >>> memory = objectives.Memory(jnp.zeros_like(x))
      >>> state = train.init(jnp.eye(4, 2), tx, model_state=memory, key=jax.random.key(0))
      >>> order = jnp.array([[0, 3], [2, 1]])
      >>> for _ in range(3):
      ...     state, info = epoch(state, (x, y, jnp.arange(4)), order)
      >>> jnp.linalg.norm(state.model_state.r, axis=1).round(4).tolist()
      [1.0, 1.0, 1.0, 1.0]

    References:
      Zheng et al., "Efficient Adversarial Training with Transferable Adversarial Examples", 2020;
      Jia et al., "Prior-Guided Fast Adversarial Training", 2022.
    """

    @meshes.auto_axes(meshes.as_objective)
    def remembering(
        params: Params, model_state: Any, batch: Any, /, *, key: jax.Array, step: jax.Array
    ) -> tuple[jax.Array, tuple[Any, Any]]:
        if not isinstance(model_state, Memory):
            raise TypeError(
                f"expected a model state Memory(r, model_state), got {type(model_state).__name__}; "
                "pass train.init(..., model_state=objectives.Memory(jnp.zeros_like(x)))"
            )
        if not isinstance(batch, tuple | list) or len(batch) != 3:
            raise TypeError(
                f"expected a batch (x, y, index), got {type(batch).__name__}; add the indices of "
                "these examples in the data set, for all of it jnp.arange(len(x))"
            )
        x, y, index = map(inputs.native, batch)
        if index.shape != x.shape[:1] or not jnp.issubdtype(index.dtype, jnp.integer):
            raise ValueError(
                f"expected an index of integers [{len(x)}], got {index.dtype} of shape "
                f"{index.shape}; pass the index of each example in the data set"
            )
        rows = model_state.r.at[index]
        # Plain indexing would silently take another row for an index that has none.
        exact: dict[str, Any] = {"mode": "fill", "wrap_negative_indices": False}
        start = rows.get(fill_value=jnp.nan, **exact)
        loss, (inner, aux) = objective(
            params, model_state.model_state, (x, y, start), key=key, step=step
        )
        # A row that was NaN once would be NaN whenever its example is used again.
        finite = jnp.isfinite(norms.norm(aux.r, "linf"))
        kept = jnp.where(inputs.expand_like(finite, aux.r), aux.r, 0)
        r = rows.set(kept.astype(model_state.r.dtype), **exact)
        return loss, (Memory(r, inner), aux._replace(r=None))

    return remembering


def _variables(params: Params, model_state: Any) -> Any:
    return params if model_state is None else (params, model_state)


def _examples(batch: Any, most: int = 2) -> list[Any]:
    """Check a batch `(x, y)`, with at least one example, or `(x, y, r)` where `most` is 3.

    Raises:
      TypeError: if it isn't such a tuple.
      ValueError: if it is empty, so that its mean loss would be NaN.
    """
    if not isinstance(batch, tuple | list) or not 2 <= len(batch) <= most:
        got = sorted(batch) if isinstance(batch, dict) else type(batch).__name__
        if isinstance(batch, tuple | list):
            got = f"{got} of {len(batch)}"
            if len(batch) == 3:  # so most is 2
                got += ", though no adversary of this objective takes a third part, r"
        or_more = " or (x, y, r)" if most == 3 else ""
        raise TypeError(
            f"expected a batch (x, y){or_more}, got {got}; pass a pair, e.g. "
            '(batch["image"], batch["label"])'
        )
    arrays = [*map(inputs.native, batch)]
    if arrays[0].shape[:1] == (0,):
        raise ValueError("expected a batch of at least one example, got none; skip empty batches")
    return arrays


def _trained(apply_fn: ApplyFn | EncodeFn, train_fn: TrainFn | None) -> TrainFn:
    """Return `train_fn`, or `apply_fn` with the signature of one."""
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
                "return the model_state that was passed if the net doesn't change it"
            )
        return out

    return run


def _adversary(
    perturb_fn: PerturbFn, apply_fn: ApplyFn, eps: Size, bounds: Bounds | None
) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """Return a function from a batch to r, a constant, and the allowed sizes, `[B]`.

    By Proposition 6, r is a constant for derivatives. Its inputs are constants too, so that an
    objective is never differentiated through the adversary's loop, which need not be
    differentiable. The `stop_gradient` on r is for arrays that `perturb_fn` may have captured.

    Raises:
      TypeError: if `perturb_fn` is set to bounds of its own, or is targeted.
    """
    closures.without_presets("perturb_fn", perturb_fn)

    def perturb(
        variables: Any,
        x: jax.Array,
        y: jax.Array,
        step: jax.Array,
        key: jax.Array,
        start: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        variables, x = lax.stop_gradient((variables, inputs.examples(x)))
        number = eps.size if isinstance(eps, Relative) else eps
        size = inputs.radius(number(step) if callable(number) else number, x)
        if isinstance(eps, Relative):
            size = size * norms.norm(x, eps.norm)
        given = {} if start is None else _as_argument(start, perturb_fn)
        r = perturb_fn(apply_fn, variables, x, y, eps=size, key=key, bounds=bounds, **given)
        return lax.stop_gradient(inputs.perturbation(r, x)), size

    return perturb


def _as_argument(start: jax.Array, perturb_fn: PerturbFn) -> dict[str, Any]:
    takes = inspect.signature(perturb_fn).parameters
    if "start" not in takes and all(one.kind is not one.VAR_KEYWORD for one in takes.values()):
        raise TypeError(
            f"expected a perturb_fn that takes start= for a batch (x, y, r), got {perturb_fn!r}; "
            "use attack.pgd, or pass a batch (x, y)"
        )
    return {"start": start}


def _mean_loss(loss_fn: LossFn, logits: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
    logits = inputs.logits_of(logits, x.shape[0])
    y = inputs.paired(x, y)
    losses = loss_fn(logits.astype(inputs.accum_dtype(logits.dtype)), y)
    return jnp.mean(inputs.losses_of(losses, x.shape[0]))


def _aux(
    logits: jax.Array,
    y: jax.Array,
    r: jax.Array | None = None,
    size: jax.Array | None = None,
    given: jax.Array | None = None,
) -> Aux:
    # A loss_fn of one's own may take a column of labels, whose argmax would be class 0.
    labels = y.reshape(len(y)) if y.size == len(y) else jnp.argmax(y, axis=-1)
    # argmax treats NaN as the largest logit, so a diverged net would be right about class 0.
    right = (jnp.argmax(logits, axis=-1) == labels) & jnp.all(logits < jnp.inf, axis=-1)
    accuracy = jnp.mean(right.astype(jnp.float32))
    if r is None or size is None:
        none = jnp.zeros((), jnp.int32)
        return Aux(accuracy, jnp.zeros_like(accuracy), none, none)
    # One pass over r gives both counts, since a maximum propagates NaN.
    largest = jnp.max(jnp.abs(r), axis=tuple(range(1, r.ndim)))
    zero = jnp.sum((largest == 0) & (size > 0), dtype=jnp.int32)
    nonfinite = jnp.sum(~jnp.isfinite(largest), dtype=jnp.int32)
    mean_size = jnp.mean(size).astype(jnp.float32)
    return Aux(accuracy, mean_size, zero, nonfinite, None if given is None else r)
