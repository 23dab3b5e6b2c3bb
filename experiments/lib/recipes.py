"""Recipes for nets: objective, adversary and optimiser.

A recipe is a `Method`, or one of its kinds:

- `Adversarial`: the paper's LWA, LWA_Rep, Goodfellow's and Miyato's.
- `MultiStep`, `OneStep` and `FewSteps`, which are `Robust`: training for robustness to iterated
  attacks.

`make_objective` and `optimiser` turn a recipe into the arguments of `jaxadv.train`, and `result`
returns the parameters to score. `train_and_score` trains and scores nets with these.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, Literal, NamedTuple, TypeGuard

import jax
import jax.numpy as jnp
import optax

from experiments.lib import options
from experiments.lib.models import Classifier, function, train_function
from experiments.lib.options import Count, Positive, Range, Share, Size, Whole
from jaxadv import attack, losses, norms, objectives, perturb
from jaxadv.train import TrainState
from jaxadv.types import ApplyFn, Bounds, Norm, Objective, Params, PerturbFn, Schedule, TrainFn

PaperMethod = Literal["normal", "dropout", "goodfellow", "lwa", "lwa_rep"]
MethodName = PaperMethod | Literal["lwa_noisy", "lwa_multi", "trades"]
NAMES: dict[str, str] = {
    "normal": "Normal",
    "dropout": "Dropout",
    "goodfellow": "Goodfellow",
    "lwa": "LWA",
    "lwa_rep": "LWA_Rep",
    "lwa_noisy": "LWA, random start",
    "lwa_multi": "LWA, multi-step",
    "trades": "TRADES",
}

ObjectiveName = Literal["adversarial", "mixed", "virtual", "representation"]
ADVERSARIES: dict[str, PerturbFn] = {
    "alpha": perturb.alpha,
    "loss": perturb.loss,
    "loss_sign": perturb.loss_sign,
    "virtual": perturb.vat,
}


@dataclasses.dataclass(frozen=True)
class Method:
    """How to train a net."""

    widths: tuple[Count, ...]
    """Sizes of the hidden dense layers."""
    epochs: Count
    """Passes over the training images."""
    lr: Positive
    """Greatest learning rate; it falls to 0 by a cosine."""
    dropout: Annotated[float, Range(ge=0, lt=1)] = 0.0
    """Probability of dropping a hidden dense unit."""


@dataclasses.dataclass(frozen=True)
class Adversarial(Method):
    """How to train a net against an adversary."""

    objective: ObjectiveName = "adversarial"
    """Which objective of jaxadv.objectives."""
    adversary: Literal["alpha", "loss", "loss_sign", "virtual"] = "loss"
    """Which perturbation of jaxadv.perturb."""
    eps: Positive = 1.5
    """l2 size of the training perturbations, the paper's c; relative to ||h|| for LWA_Rep."""
    warmup: Whole = 0
    """Epochs over which that size rises from 0."""
    split: Whole = 0
    """Blocks and dense layers before the perturbed representation; 0 for where the paper has it."""


@dataclasses.dataclass(frozen=True)
class Robust(Adversarial):
    """How to train a net for robustness to iterated attacks, which the paper doesn't."""

    average: Share = 0.0
    """Decay of the moving average of the weights, which is the result; 0 for the last weights."""
    shift: Whole = 0
    """Most pixels by which training images are shifted at random, in each direction."""


@dataclasses.dataclass(frozen=True)
class MultiStep(Robust):
    """Adversarial training with several steps.

    The adversary is `attack.pgd` for the objectives `adversarial` and `mixed`, and `attack.pgd_kl`
    for `virtual`, which makes it TRADES; perturbed images stay in the pixel range.
    """

    steps: Count = 5
    """Steps of the adversary, each of 2.5 eps / steps."""
    random_start: bool = True
    """Whether it starts at a random point of the ball; TRADES always does."""
    weight: Size = 1.0
    """Weight of the divergence, for TRADES."""


@dataclasses.dataclass(frozen=True)
class OneStep(Robust):
    """Training with one step of Adv_Loss, in the pixel range, for robustness to many steps.

    A net trained with one step from x may become robust to that step only: it learns gradients at
    x that are useless to an attack (catastrophic overfitting).
    """

    noise: Size = 0.0
    """Radius, in units of eps, of the ball that the random start is drawn from; 0 for x itself."""
    stride: Size = 1.0
    """Length of the step, in units of eps."""
    reach: Size = 1.0
    """Radius, in units of eps, of the ball that the result is projected onto."""
    alignment: Size = 0.0
    """Weight of 1 - cos(angle between the gradients at x and at a random point of the ball)."""


@dataclasses.dataclass(frozen=True)
class FewSteps(OneStep):
    """Training with a few steps, which may continue from the last epoch's perturbations.

    Here the adversary may be alpha: steps toward the nearest class.
    """

    steps: Count = 1
    """Steps of the adversary, each with a projection."""
    memory: Whole = 0
    """Epochs after which kept perturbations are initialised again; 0 keeps none."""
    candidates: Whole = 0
    """How many of the top wrong classes alpha compares; 0 for all."""


def split_of(method: Method) -> dict[str, int]:
    """Return the argument that puts the split of a net elsewhere than where the paper has it."""
    return {"split": method.split} if isinstance(method, Adversarial) and method.split else {}


def shortened(method: Method) -> Method:
    """Return the recipe for one epoch, and for a warmup within it if there is one."""
    if isinstance(method, Adversarial) and method.warmup:
        return dataclasses.replace(method, epochs=1, warmup=1)
    return dataclasses.replace(method, epochs=1)


def check(name: str, method: Method, *, lr_warmup: int) -> None:
    """Refuse a recipe whose parts don't go together.

    Args:
      name: what its options start with.
      method: the recipe.
      lr_warmup: epochs over which the rate rises from 0.

    Raises:
      UsageError: if the rate would rise for the whole of the training, or the size of the
        perturbations for longer; if there is no such objective of several steps, or of one; or if
        an option has no use.
    """
    option = f"--{name.replace('_', '-')}"
    if lr_warmup >= method.epochs:
        raise options.UsageError(
            f"expected --lr-warmup to be less than {method.epochs}, the epochs of {name}, got "
            f"{lr_warmup}; lower it, or train longer"
        )
    if not isinstance(method, Adversarial):
        return
    if method.warmup > method.epochs:
        raise options.UsageError(
            f"expected {option}.warmup to be at most {method.epochs}, the epochs of {name}, got "
            f"{method.warmup}; lower it, or train longer"
        )
    if isinstance(method, MultiStep) and method.objective == "representation":
        raise options.UsageError(
            f"expected {option}.objective to be adversarial, mixed or virtual, got representation, "
            "whose adversary takes one step; choose another"
        )
    if isinstance(method, MultiStep) and method.adversary != "loss":
        raise options.UsageError(
            f"expected {option}.adversary to be loss, got {method.adversary}; the adversary of "
            "several steps is PGD: leave it out"
        )
    taken = ("loss", "alpha") if isinstance(method, FewSteps) else ("loss",)
    if isinstance(method, OneStep) and (
        method.objective != "adversarial" or method.adversary not in taken
    ):
        raise options.UsageError(
            f"expected {option}.objective to be adversarial and {option}.adversary to be "
            f"{' or '.join(taken)}, got {method.objective} and {method.adversary}; choose "
            "MultiStep or Adversarial for these"
        )
    if method.split and method.objective != "representation":
        raise options.UsageError(
            f"expected {option}.split to be 0, got {method.split}; only the objective "
            f"representation splits a net, this one is {method.objective}"
        )
    if isinstance(method, MultiStep) and method.weight != 1 and method.objective != "virtual":
        raise options.UsageError(
            f"expected {option}.weight to be 1, got {method.weight:g}; only the objective virtual "
            f"weighs its parts, this one is {method.objective}"
        )
    if isinstance(method, FewSteps) and method.candidates and method.adversary != "alpha":
        raise options.UsageError(
            f"expected {option}.candidates to be 0, got {method.candidates}; only the adversary "
            f"alpha compares classes, this one is {method.adversary}"
        )


def make_objective(net: Classifier, method: Method, epoch_steps: int) -> Objective:
    """Return the objective of a method that `check` accepts, on pixels in 0..1.

    For a method with a memory, wrap it in `renewed`, after any augmentation.
    """
    apply_fn = function(net)
    train_fn = train_function(net) if net.dropout else None
    if not isinstance(method, Adversarial):
        return objectives.natural(apply_fn, train_fn=train_fn)
    eps = rising(method.eps, method.warmup * epoch_steps)
    if method.objective == "representation":
        return objectives.representation(
            function(net, "encode"),
            function(net, "classify"),
            ADVERSARIES[method.adversary],
            # As in the authors' script: an absolute size could be evaded by scaling features up.
            eps=objectives.Relative(eps),
            encode_train_fn=train_function(net, "encode") if net.dropout else None,
            classify_train_fn=train_function(net, "classify") if net.dropout else None,
        )
    weight = 1.0
    if isinstance(method, MultiStep):
        adversary = several_steps(method.objective, method.steps, random_start=method.random_start)
        weight = method.weight
    elif isinstance(method, OneStep):
        step, steps = ADVERSARIES[method.adversary], 1
        if isinstance(method, FewSteps):
            steps = method.steps
            if method.adversary == "alpha":
                step = partial(perturb.alpha, candidates=method.candidates or None)
        adversary = partial(
            few_steps, step=step, steps=steps, noise=method.noise, stride=method.stride,
            reach=method.reach,
        )  # fmt: skip
    else:
        adversary = ADVERSARIES[method.adversary]
    objective = against(
        method.objective, apply_fn, adversary, eps=eps, train_fn=train_fn, weight=weight,
        bounds=(0.0, 1.0) if isinstance(method, Robust) else None,
    )  # fmt: skip
    if isinstance(method, OneStep) and method.alignment:
        objective = aligned(objective, apply_fn, eps, method.alignment)
    return objective


def remembers(method: Method) -> TypeGuard[FewSteps]:
    """Return whether a method's objective takes batches `(x, y, r)`, with an r kept per image."""
    return isinstance(method, FewSteps) and method.memory > 0


def against(
    kind: ObjectiveName,
    apply_fn: ApplyFn,
    adversary: PerturbFn,
    *,
    eps: float | Schedule,
    train_fn: TrainFn | None,
    weight: float,
    bounds: Bounds | None,
) -> Objective:
    """Return the objective of this kind on raw inputs; `weight` multiplies its divergence."""
    common: dict[str, Any] = {"eps": eps, "train_fn": train_fn, "bounds": bounds}
    if kind == "virtual":
        return objectives.kl_regularized(apply_fn, adversary, weight=weight, **common)
    make = {"adversarial": objectives.adversarial, "mixed": objectives.mixed}[kind]
    return make(apply_fn, adversary, **common)


def several_steps(
    kind: ObjectiveName, steps: int, *, norm: Norm = "l2", random_start: bool = True
) -> PerturbFn:
    """Return the adversary of several steps that goes with a kind of objective."""
    if kind == "virtual":
        return partial(attack.pgd_kl, norm=norm, steps=steps)
    return partial(attack.pgd, norm=norm, steps=steps, random_start=random_start)


def rising(eps: float, steps: int) -> float | Schedule:
    """Return a schedule that rises from 0 to eps over `steps` steps; eps itself for 0 steps."""
    return optax.linear_schedule(0.0, eps, steps) if steps else eps


def few_steps(
    apply_fn: ApplyFn,
    params: Params,
    x: jax.Array,
    y: jax.Array,
    /,
    *,
    step: PerturbFn,
    steps: int,
    eps: jax.Array,
    noise: float,
    stride: float,
    reach: float,
    key: jax.Array,
    bounds: Bounds,
    norm: Norm = "l2",
    start: jax.Array | None = None,
) -> jax.Array:
    """Take steps of a one-step method, from a random point or from `start`.

    `OneStep` explains noise, stride and reach. `norm` is the ball's; `step` has its own.
    """

    def within(r: jax.Array) -> jax.Array:
        return norms.clip_to_box(x, norms.project(r, reach * eps, norm), bounds)

    if start is not None:
        r = within(start)
    elif noise:
        r = within(norms.sample(key, x, noise * eps, norm))
    else:  # drawing from a ball of radius 0 would take a sixth of an MLP's step
        r = jnp.zeros_like(x)
    for _ in range(steps):
        r = within(r + step(apply_fn, params, x + r, y, eps=stride * eps))
    return r


def renewed(objective: Objective, method: FewSteps, epoch_steps: int) -> Objective:
    """Return an objective of batches `(x, y, r)` that initialises r every `method.memory` epochs.

    New perturbations are drawn from the l2 ball of radius noise times eps, or 0 without noise.

    Args:
      objective: an objective of such batches, already augmented: within an augmentation, the pixels
        that it leaves out would keep their old r.
      method: the recipe.
      epoch_steps: steps per epoch.
    """
    radius = rising(method.noise * method.eps, method.warmup * epoch_steps)

    def renew(
        params: Params, model_state: Any, batch: Any, /, *, key: jax.Array, step: jax.Array
    ) -> Any:
        x, y, r = batch
        start_key, key = jax.random.split(key)
        size = radius(step) if callable(radius) else radius
        first = step // epoch_steps % method.memory == 0
        r = jax.lax.cond(first, lambda: norms.sample(start_key, r, size, "l2"), lambda: r)
        return objective(params, model_state, (x, y, r), key=key, step=step)

    return renew


def aligned(
    objective: Objective, apply_fn: ApplyFn, eps: float | Schedule, weight: float
) -> Objective:
    """Add GradAlign, a penalty on gradients that turn within the ball, to an objective.

    It is `weight` times the mean of 1 - cos(angle between the loss's gradients at x and at a random
    point of the l2 ball of radius eps) (Andriushchenko and Flammarion, "Understanding and
    Improving Fast Adversarial Training", 2020).
    """

    def penalised(
        params: Params, model_state: Any, batch: Any, /, *, key: jax.Array, step: jax.Array
    ) -> Any:
        x, y, *_ = batch
        start_key, key = jax.random.split(key)
        size = eps(step) if callable(eps) else eps
        r = norms.sample(start_key, x, size, "l2")

        @jax.grad
        def gradient(x: jax.Array) -> jax.Array:  # a positive multiple of cross-entropy's
            return jnp.sum(losses.margin(apply_fn(params, x), y))

        at, near = (gradient(z).reshape(len(x), -1) for z in (x, x + r.astype(x.dtype)))
        turned = 1 - optax.losses.cosine_similarity(at, near, epsilon=1e-12)
        loss, rest = objective(params, model_state, batch, key=key, step=step)
        return loss + weight * jnp.mean(turned), rest

    return penalised


class Averaged(NamedTuple):
    """The state of `averaging`."""

    steps: jax.Array
    average: Params


def averaging(decay: float) -> optax.GradientTransformation:
    """Keep a moving average of the parameters in the optimiser's state; put it last in a chain.

    At first it is the plain mean of all steps, so that the initial parameters are soon forgotten.
    """

    def start(params: Params) -> Averaged:
        return Averaged(jnp.zeros((), jnp.int32), params)

    def update(updates: Any, state: Averaged, params: Params = None) -> tuple[Any, Averaged]:
        new = optax.apply_updates(params, updates)
        steps = state.steps + 1
        step_size = jnp.maximum(1 - decay, 1 / steps)
        return updates, Averaged(steps, optax.incremental_update(new, state.average, step_size))

    return optax.GradientTransformation(start, update)


def result(method: Method, state: TrainState) -> Params:
    """Return the trained parameters: their moving average if there is one, else the last."""
    if isinstance(method, Robust) and method.average:
        return state.opt_state[-1].average
    return state.params


def augmented(
    objective: Objective, augment: Callable[[jax.Array, jax.Array], jax.Array]
) -> Objective:
    """Return an objective that first augments each image at random, with the step's key.

    In a batch `(x, y, r)`, r belongs to the original images. It is moved like them, and the new r
    is moved back; pixels that the augmented image leaves out keep their r. So `augment` may only
    move pixels, leave pixels out, and pad with zeros.

    Raises:
      TypeError: when called, if x isn't of r's dtype, so that `augment` does more.
    """

    def draw(
        params: Params, model_state: Any, batch: Any, /, *, key: jax.Array, step: jax.Array
    ) -> Any:
        x, y, *given = batch
        image_key, key = jax.random.split(key)
        move = partial(augment, image_key)
        if not given:
            return objective(params, model_state, (move(x), y), key=key, step=step)
        (r,) = given
        if x.dtype != r.dtype:
            raise TypeError(
                f"expected images of their perturbations' dtype, {r.dtype}, got {x.dtype}; scale "
                "them first: what scales them while it moves them would scale perturbations, too"
            )
        # To move pixels is linear, and its transpose moves them back, 0 where none comes from.
        moved, back = jax.vjp(move, r)
        loss, (model_state, aux) = objective(
            params, model_state, (move(x), y, moved), key=key, step=step
        )
        (kept,), (new,) = back(moved), back(aux.r)
        return loss, (model_state, aux._replace(r=r - kept + new))

    return draw


def shifted(pixels: int) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """Return `(key, x) -> x`, which moves each image by at most `pixels`, padding with zeros."""

    def shift(key: jax.Array, x: jax.Array) -> jax.Array:
        around = (pixels, pixels)
        padded = jnp.pad(x, ((0, 0), around, around, (0, 0)))

        def cut(image: jax.Array, corner: jax.Array) -> jax.Array:
            return jax.lax.dynamic_slice(image, (corner[0], corner[1], 0), x.shape[1:])

        corners = jax.random.randint(key, (len(x), 2), 0, 2 * pixels + 1)
        return jax.vmap(cut)(padded, corners)

    return shift


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimiser(options.Checked):
    """What an experiment can be told of its optimiser."""

    momentum: Annotated[float, Range(ge=0, lt=1)] = 0.9
    """Momentum of SGD."""
    weight_decay: Size = 0.0
    """Added to the gradients of the kernels, per unit of weight."""
    lr_warmup: Whole = 0
    """Epochs over which the learning rate rises from 0."""


def optimiser(
    method: Method, epoch_steps: int, settings: Optimiser
) -> optax.GradientTransformation:
    """Return SGD with momentum, its rate by a cosine to 0.

    Args:
      method: whose epochs and rate.
      epoch_steps: steps of an epoch.
      settings: the rest; the rate rises for fewer than all epochs.

    Raises:
      UsageError: if an epoch has no step.
    """
    if epoch_steps < 1:
        raise options.UsageError(
            "expected at least one step in an epoch, got fewer training images than a batch has; "
            "choose a smaller --batch-size"
        )
    total = method.epochs * epoch_steps
    warmup = settings.lr_warmup * epoch_steps
    lr = optax.warmup_cosine_decay_schedule(0, method.lr, warmup, total)
    sgd = optax.sgd(lr, momentum=settings.momentum)
    if settings.weight_decay:
        kernels = partial(jax.tree.map, lambda leaf: leaf.ndim > 1)
        sgd = optax.chain(optax.add_decayed_weights(settings.weight_decay, kernels), sgd)
    if isinstance(method, Robust) and method.average:
        return optax.chain(sgd, averaging(method.average))
    return sgd
