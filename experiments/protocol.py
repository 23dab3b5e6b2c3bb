"""What the experiments of Section 7 have in common: how a net is trained, attacked and scored.

`run` trains each of some methods for each seed, perturbs the images in the ways of Section 7.2 and
returns the rows of a table, having written results.json, weights and checkpoints. Whatever of it an
earlier run has finished is taken from there. `mnist`, `cifar10` and `ablations` say which nets,
data and settings; `training` has the loop over epochs, `report` what becomes of the rows.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from rich.console import Console
from rich.progress import Progress

from experiments import parallel, report, training
from experiments.models import Classifier, function, init, train_function
from jaxadv import attack, evaluate, jacobian, norms, objectives, perturb
from jaxadv.train import TrainState
from jaxadv.types import ApplyFn, Bounds, Objective, Params, PerturbFn, Schedule, TrainFn

__all__ = [
    "NAMES",
    "Adversarial",
    "Images",
    "Method",
    "MethodName",
    "MultiStep",
    "Net",
    "OneStep",
    "PaperMethod",
    "Robust",
    "Settings",
    "Task",
    "aligned",
    "augmented",
    "averaging",
    "make_objective",
    "one_step",
    "result",
    "run",
    "shifted",
    "split_of",
    "train",
]

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

ADVERSARIES: dict[str, PerturbFn] = {
    "alpha": perturb.alpha,
    "loss": perturb.loss,
    "loss_sign": perturb.loss_sign,
    "virtual": perturb.virtual,
}


@dataclasses.dataclass(frozen=True)
class Method:
    """How a net is made."""

    widths: tuple[int, ...]
    """Sizes of the hidden dense layers."""
    epochs: int
    """Passes over the training images."""
    lr: float
    """Greatest learning rate; it falls to 0 by a cosine."""
    dropout: float = 0.0
    """Probability of dropping a hidden dense unit."""


@dataclasses.dataclass(frozen=True)
class Adversarial(Method):
    """How a net that has an adversary is made."""

    objective: Literal["adversarial", "mixed", "virtual", "representation"] = "adversarial"
    """Which objective of jaxadv.objectives."""
    adversary: Literal["alpha", "loss", "loss_sign", "virtual"] = "loss"
    """Which perturbation of jaxadv.perturb."""
    eps: float = 1.5
    """l2 size of the training perturbations, the paper's c; relative to ||h|| for LWA_Rep."""
    warmup: int = 0
    """Epochs over which that size rises from 0."""
    split: int = 0
    """Blocks and dense layers before the perturbed representation; 0 for where the paper has it."""


@dataclasses.dataclass(frozen=True)
class Robust(Adversarial):
    """How a net is made that is to withstand iterated attacks: not in the paper.

    Its perturbed images stay in the range of pixels.
    """

    average: float = 0.0
    """Share of the past in the moving average of the weights that is the result; 0 for the last."""
    shift: int = 0
    """Pixels by which training images are moved at random, at most, either way and up or down."""


@dataclasses.dataclass(frozen=True)
class MultiStep(Robust):
    """A net that is made by several steps.

    Its adversary is `attack.pgd` for the objectives `adversarial` and `mixed`, and `attack.virtual`
    for `virtual`, which is then TRADES.
    """

    steps: int = 5
    """Of the adversary; each of 2.5 eps / steps."""
    random_start: bool = True
    """Whether it starts at a random point of the ball; TRADES always does."""
    weight: float = 1.0
    """Of the divergence, for TRADES."""


@dataclasses.dataclass(frozen=True)
class OneStep(Robust):
    """A net that is made by one step, and is to withstand many.

    Trained by one step from x, a net may learn to withstand that step alone: it bends its
    gradients, so that they lead nowhere from there.
    """

    noise: float = 0.0
    """Radius, in units of eps, of the ball that the step starts in, at random."""
    stride: float = 1.0
    """Length of the step, in units of eps."""
    reach: float = 1.0
    """Radius of the ball that it ends in at the latest."""
    alignment: float = 0.0
    """Weight of the angle between the gradients at x and at a random point of the ball of eps."""


@dataclasses.dataclass(frozen=True)
class Settings(parallel.Settings):
    """What every experiment can be told; each has its own defaults."""

    seed: tuple[int, ...] = (0,)
    """One run for each; the table has their means."""
    out: Path = Path("runs")
    """Where results, figures, weights and checkpoints go."""
    holdout: int = 0
    """Training images held out and scored instead of the test images; 0 for reported figures."""
    n_eval: int = 10_000
    """How many images are scored."""
    n_pgd: int = 10_000
    """How many of them, at most, are attacked by PGD."""
    eps: tuple[float, ...] = (1.5,)
    """l2 sizes of the perturbations in the table."""
    pgd_steps: int = 100
    """Steps of the iterated attack, each of 2.5 eps / steps."""
    curve: tuple[float, ...] = tuple(np.arange(0, 4.01, 0.2).round(1).tolist())
    """l2 sizes of the curves."""
    batch_size: int = 100
    """Images per training step."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """What hidden layers compute in; parameters, logits and perturbed images are float32."""
    eval_batch: int = 1000
    """Images perturbed at once when a net is scored."""
    momentum: float = 0.9
    """Of SGD."""
    weight_decay: float = 0.0
    """Added to the gradients of the kernels, per unit of weight."""
    lr_warmup: int = 0
    """Epochs over which the learning rate rises from 0."""
    fixed_seed: int = 1000
    """Seed of the Normal net that the Fixed set is made on."""


class Images(NamedTuple):
    """Images and labels, on the device."""

    x: jax.Array  # [n, H, W, C]
    y: jax.Array  # [n]


class Net(NamedTuple):
    """A trained net, as the library takes it."""

    apply_fn: ApplyFn
    params: Params
    fitted: training.Fitted


class Task(NamedTuple):
    """What is learnt, and by which nets.

    Attributes:
      experiment: its name in the rows.
      methods: by name, how each net is made.
      normal: how the Normal net is made that the Fixed set comes from, under another seed.
      names: what to call each of them in tables.
      make_net: the net for a method.
      network: what to call that net in the rows.
      train: what to train on.
      test: what to score, scaled.
      source: where the images are from, for the record.
      augment: `(key, x) -> x`, from a batch of training images to what the net is trained on.
      extra: what else a method's rows say.
      box: the range of pixels, scaled.
      mesh: the devices that batches are spread over; None for one.
    """

    experiment: str
    methods: Mapping[str, Method]
    normal: Method
    names: Mapping[str, str]
    make_net: Callable[[Method], Classifier]
    network: Callable[[Method], str]
    train: Images
    test: Images
    source: str
    augment: Callable[[jax.Array, jax.Array], jax.Array] | None = None
    extra: Callable[[str], dict[str, Any]] = lambda name: {}
    box: Bounds = (0.0, 1.0)
    mesh: Mesh | None = None


def split_of(method: Method) -> dict[str, int]:
    """Return the argument that puts the split of a net elsewhere than where the paper has it."""
    return {"split": method.split} if isinstance(method, Adversarial) and method.split else {}


def make_objective(
    net: Classifier, method: Method, epoch_steps: int, box: Bounds = (0.0, 1.0)
) -> Objective:
    """Return what a method minimises."""
    apply_fn = function(net)
    train_fn = train_function(net) if net.dropout else None
    if not isinstance(method, Adversarial):
        return objectives.natural(apply_fn, train_fn=train_fn)
    eps: float | Schedule = method.eps
    if method.warmup:
        eps = optax.linear_schedule(0, method.eps, method.warmup * epoch_steps)
    if isinstance(method, MultiStep):
        return _multi_step_objective(apply_fn, train_fn, method, eps, box)
    if isinstance(method, OneStep):
        return _one_step_objective(apply_fn, train_fn, method, eps, box)
    adversary = ADVERSARIES[method.adversary]
    if method.objective == "representation":
        return objectives.representation(
            function(net, "encode"),
            function(net, "classify"),
            adversary,
            # As the authors' script has it: a net escapes an absolute size by scaling features up.
            eps=objectives.Relative(eps),
            encode_train_fn=train_function(net, "encode") if net.dropout else None,
            classify_train_fn=train_function(net, "classify") if net.dropout else None,
        )
    make = {
        "adversarial": objectives.adversarial,
        "mixed": objectives.mixed,
        "virtual": objectives.virtual,
    }[method.objective]
    return make(apply_fn, adversary, eps=eps, train_fn=train_fn)


def _multi_step_objective(
    apply_fn: ApplyFn,
    train_fn: TrainFn | None,
    method: MultiStep,
    eps: float | Schedule,
    box: Bounds,
) -> Objective:
    if method.objective == "virtual":
        adversary: PerturbFn = partial(attack.virtual, steps=method.steps)
        return objectives.virtual(
            apply_fn, adversary, eps=eps, weight=method.weight, train_fn=train_fn, bounds=box
        )
    adversary = partial(attack.pgd, steps=method.steps, random_start=method.random_start)
    make = {"adversarial": objectives.adversarial, "mixed": objectives.mixed}[method.objective]
    return make(apply_fn, adversary, eps=eps, train_fn=train_fn, bounds=box)


def _one_step_objective(
    apply_fn: ApplyFn,
    train_fn: TrainFn | None,
    method: OneStep,
    eps: float | Schedule,
    box: Bounds,
) -> Objective:
    adversary = partial(one_step, noise=method.noise, stride=method.stride, reach=method.reach)
    objective = objectives.adversarial(apply_fn, adversary, eps=eps, train_fn=train_fn, bounds=box)
    if method.alignment:
        objective = aligned(objective, apply_fn, eps, method.alignment)
    return objective


def one_step(
    apply_fn: ApplyFn,
    params: Params,
    x: jax.Array,
    y: jax.Array,
    /,
    *,
    eps: jax.Array,
    noise: float,
    stride: float,
    reach: float,
    key: jax.Array,
    bounds: Bounds,
) -> jax.Array:
    """Adv_Loss from a random point; `OneStep` says what noise, stride and reach are."""
    start = norms.sample(jax.random.split(key, len(x)), x, noise * eps, "l2")
    start = norms.confine(x, start, bounds)
    step = perturb.loss(apply_fn, params, x + start, y, eps=stride * eps)
    return norms.confine(x, norms.project(start + step, reach * eps, "l2"), bounds)


def aligned(
    objective: Objective, apply_fn: ApplyFn, eps: float | Schedule, weight: float
) -> Objective:
    """Add to an objective how far the gradient turns within the ball: GradAlign.

    That is `weight` times the mean of 1 - cos of the loss's gradients at x and at a random point of
    the l2 ball of radius eps (Andriushchenko and Flammarion, "Understanding and Improving Fast
    Adversarial Training", 2020).
    """

    def penalised(
        params: Params, model_state: Any, batch: Any, /, *, key: jax.Array, step: jax.Array
    ) -> Any:
        x, y = batch
        start_key, key = jax.random.split(key)
        size = eps(step) if callable(eps) else eps
        r = norms.sample(jax.random.split(start_key, len(x)), x, size, "l2")

        @jax.grad
        def gradient(x: jax.Array) -> jax.Array:  # of a multiple of each example's cross-entropy
            return jnp.sum(jacobian.margin(apply_fn(params, x), y))

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
    """Keep a moving average of the parameters in the optimiser's state; last in a chain.

    The first steps count equally, so that the initial parameters are soon forgotten.
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
    """Return what training has made: the average of the weights if there is one, or the last."""
    if isinstance(method, Robust) and method.average:
        return optax.tree_utils.tree_get(state.opt_state, "average")
    return state.params


def augmented(
    objective: Objective, augment: Callable[[jax.Array, jax.Array], jax.Array]
) -> Objective:
    """Return an objective that first draws a variant of each image, by the step's key."""

    def draw(
        params: Params, model_state: Any, batch: Any, /, *, key: jax.Array, step: jax.Array
    ) -> Any:
        x, y = batch
        image_key, key = jax.random.split(key)
        return objective(params, model_state, (augment(image_key, x), y), key=key, step=step)

    return draw


def shifted(pixels: int) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """Return `(key, x) -> x`, which moves each image by at most so many pixels, over zeros."""

    def shift(key: jax.Array, x: jax.Array) -> jax.Array:
        around = (pixels, pixels)
        padded = jnp.pad(x, ((0, 0), around, around, (0, 0)))

        def cut(image: jax.Array, corner: jax.Array) -> jax.Array:
            return jax.lax.dynamic_slice(image, (corner[0], corner[1], 0), x.shape[1:])

        corners = jax.random.randint(key, (len(x), 2), 0, 2 * pixels + 1)
        return jax.vmap(cut)(padded, corners)

    return shift


def optimiser(method: Method, settings: Settings, epoch_steps: int) -> optax.GradientTransformation:
    """Return SGD with momentum, its rate by a cosine to 0, as the settings have it.

    Raises:
      ValueError: if the rate would rise for the whole of the training, or longer.
    """
    if settings.lr_warmup >= method.epochs:
        raise ValueError(
            f"expected fewer epochs of rising rate than {method.epochs}, the epochs in all, got "
            f"lr_warmup = {settings.lr_warmup}; lower it, or train longer"
        )
    total = method.epochs * epoch_steps
    lr = optax.cosine_decay_schedule(method.lr, total)
    if settings.lr_warmup:
        lr = optax.warmup_cosine_decay_schedule(
            0, method.lr, settings.lr_warmup * epoch_steps, total
        )
    sgd = optax.sgd(lr, momentum=settings.momentum)
    if settings.weight_decay:
        kernels = partial(jax.tree.map, lambda leaf: leaf.ndim > 1)
        sgd = optax.chain(optax.add_decayed_weights(settings.weight_decay, kernels), sgd)
    if isinstance(method, Robust) and method.average:
        return optax.chain(sgd, averaging(method.average))
    return sgd


def train(
    name: str, method: Method, seed: int, settings: Settings, task: Task, progress: Progress
) -> Net:
    """Train one net, or restore it."""
    net = task.make_net(method)
    apply_fn = function(net)
    init_key, fit_key = jax.random.split(jax.random.key(seed))
    epoch_steps = len(task.train.y) // settings.batch_size
    objective = make_objective(net, method, epoch_steps, task.box)
    if isinstance(method, Robust) and method.shift:
        objective = augmented(objective, shifted(method.shift))
    if task.augment:
        objective = augmented(objective, task.augment)
    watched = scored(task, settings.n_pgd)
    outcome = partial(
        evaluate.robust, apply_fn, eps=settings.eps[0], batch_size=settings.eval_batch
    )

    def watch(state: TrainState) -> dict[str, float]:
        seen = outcome(result(method, state), *watched, perturb.loss)
        return {
            "validation": evaluate.accuracy(seen.clean),
            "adv_loss": evaluate.accuracy(seen.robust),
            "watched_eps": settings.eps[0],
            "watched_n": len(watched.y),
        }

    fitted = training.fit(
        objective,
        optimiser(method, settings, epoch_steps),
        init(net, init_key, np.asarray(task.test.x[:1])),
        task.train,
        epochs=method.epochs,
        batch_size=settings.batch_size,
        key=fit_key,
        directory=settings.out / "checkpoints" / f"{name}-{seed}",
        settings=train_settings(method, settings, task),
        progress=progress,
        name=f"{task.names.get(name, name)}, seed {seed}",
        watch=watch,
        mesh=task.mesh,
    )
    return Net(apply_fn, result(method, fitted.state), fitted)


def train_settings(method: Method, settings: Settings, task: Task) -> dict[str, Any]:
    """Return all that a net depends on but its seed, in the form that JSON gives back."""
    fields = dataclasses.asdict(method)
    shared = ("holdout", "batch_size", "momentum", "weight_decay", "lr_warmup")
    return {
        **{field: value for field, value in fields.items() if field not in ("widths", "eps")},
        "widths": list(method.widths),
        "train_eps": fields.get("eps", 0.0),
        "network": task.network(method),
        "data": task.source,
        "optimiser": "sgd, cosine to 0",
        **{field: getattr(settings, field) for field in shared},
    }


def row_settings(method: Method, settings: Settings, task: Task, eps: float) -> dict[str, Any]:
    """Return all that a row of the table depends on but its seed, likewise."""
    scoring = ("n_eval", "n_pgd", "pgd_steps", "fixed_seed")
    return {
        **train_settings(method, settings, task),
        **{field: getattr(settings, field) for field in scoring},
        "eps": eps,
        "curve": list(settings.curve),
    }


def in_precision(task: Task, precision: str) -> Task:
    """Return the task with nets that compute in another precision, and are called so."""
    if precision == "float32":
        return task
    return task._replace(
        make_net=lambda method: task.make_net(method).clone(dtype=jnp.dtype(precision)),
        network=lambda method: f"{task.network(method)}, {precision}",
    )


def scored(task: Task, n: int | None = None) -> Images:
    """Return the first n of the images to score, or all, spread over the devices."""
    return Images(*parallel.spread(task.mesh, tuple(part[:n] for part in task.test)))


ONE_STEP: Mapping[str, PerturbFn] = {
    "adv_loss_sign": perturb.loss_sign,
    "adv_loss": perturb.loss,
    "adv_alpha": perturb.alpha,
}
"""The paper's perturbations, by column."""


def directions(
    net: Net, task: Task, settings: Settings, tick: Callable[[], None]
) -> dict[str, np.ndarray]:
    """Return each one-step method's perturbations of l2 size 1, which serve all sizes."""
    found = {}
    for column, method in ONE_STEP.items():
        found[column] = evaluate.perturbations(
            net.apply_fn, net.params, *scored(task), method,
            eps=1.0, batch_size=settings.eval_batch,
        )  # fmt: skip
        tick()
    return found


def score(
    net: Net,
    task: Task,
    fixed: np.ndarray,
    one_step: Mapping[str, np.ndarray],
    settings: Settings,
    eps: float,
    pgd: PerturbFn,
    tick: Callable[[], None],
) -> dict[str, Any]:
    """Return the columns of one row and what was counted on the way."""
    batch_size = settings.eval_batch
    images = scored(task)
    clean = evaluate.clean(net.apply_fn, net.params, *images, batch_size=batch_size)
    transferred = evaluate.clean(
        net.apply_fn, net.params, images.x + fixed, images.y, batch_size=batch_size
    )
    columns = {
        "validation": evaluate.accuracy(clean),
        "fixed": evaluate.accuracy(evaluate.worst_case(clean, transferred)),
    }
    outcomes = {
        column: evaluate.outcome(net.apply_fn, net.params, *images, eps * r, batch_size=batch_size)
        for column, r in one_step.items()
    }
    outcomes["pgd"] = evaluate.robust(
        net.apply_fn, net.params, *scored(task, settings.n_pgd), pgd,
        eps=eps, batch_size=batch_size,
    )  # fmt: skip
    tick()
    counts = {}
    for column, outcome in outcomes.items():
        columns[column] = evaluate.accuracy(outcome.robust)
        total = evaluate.count(outcome)
        counts[column] = {
            "zero": int(total.zero),
            "nonfinite": int(total.nonfinite),
            "invalid": int(total.invalid),
            "max_norm": float(total.max_norm),
        }
    return {"columns": columns, "counts": counts}


def curves(
    net: Net,
    task: Task,
    one_step: Mapping[str, np.ndarray],
    settings: Settings,
    tick: Callable[[], None],
) -> dict[str, list[float]]:
    """Return the accuracy at each size of the paper's figures."""
    images = scored(task)
    right = partial(evaluate.clean, net.apply_fn, net.params, batch_size=settings.eval_batch)
    clean = right(*images)
    found: dict[str, list[float]] = {"eps": list(settings.curve)}
    for column, r in one_step.items():
        masks = (right(images.x + eps * r, images.y) for eps in settings.curve)
        found[column] = [evaluate.accuracy(evaluate.worst_case(clean, mask)) for mask in masks]
        tick()
    return found


class _Fixed(NamedTuple):
    """What a Normal net's Adv_Loss makes of the scored images, at one size."""

    r: np.ndarray  # [n, H, W, C]
    accuracy: float  # of that net itself


def _make_fixed(settings: Settings, task: Task, progress: Progress) -> dict[float, _Fixed]:
    """Return the Fixed set of each size."""
    net = train("normal", task.normal, settings.fixed_seed, settings, task, progress)
    batch_size = settings.eval_batch
    images = scored(task)
    one = evaluate.perturbations(
        net.apply_fn, net.params, *images, perturb.loss, eps=1.0, batch_size=batch_size
    )
    fixed = {}
    for eps in settings.eps:
        own = evaluate.clean(
            net.apply_fn, net.params, images.x + eps * one, images.y, batch_size=batch_size
        )
        fixed[eps] = _Fixed(eps * one, evaluate.accuracy(own))
    return fixed


def run(
    settings: Settings, task: Task, console: Console
) -> tuple[list[report.Row], dict[str, Net]]:
    """Train, attack and score; return the rows of the table, and each method's first net.

    Rows of other methods, seeds and sizes that the file has from an earlier run stay in it.

    Raises:
      ValueError: if the net that makes the Fixed set would be one of those scored on it.
    """
    if settings.fixed_seed in settings.seed:
        raise ValueError(
            f"expected a Fixed set from a net of another seed, got fixed_seed = "
            f"{settings.fixed_seed} among the seeds {settings.seed}; choose another --fixed-seed"
        )
    results = settings.out / "results.json"
    settings.out.mkdir(parents=True, exist_ok=True)
    known = report.load_rows(results)
    n = len(task.test.y)
    sizes = settings.batch_size, n, min(settings.n_pgd, n)
    task = in_precision(task, settings.precision)
    task = task._replace(mesh=parallel.mesh(settings, *sizes))
    pgd = partial(attack.pgd, norm="l2", steps=settings.pgd_steps)  # one object, one compilation
    rows: list[report.Row] = []
    nets: dict[str, Net] = {}

    def place(row: report.Row) -> tuple[str, int, float]:
        return row["method"], row["seed"], row["eps"]

    with training.bars(console) as progress:
        fixed = _make_fixed(settings, task, progress)
        for seed, (name, method) in itertools.product(settings.seed, task.methods.items()):
            net = train(name, method, seed, settings, task, progress)
            nets.setdefault(name, net)
            title = f"{task.names.get(name, name)}, seed {seed}"
            one_step: dict[str, np.ndarray] = {}  # these and the curves serve all sizes
            found: dict[str, list[float]] = {}
            for eps in settings.eps:
                identity = {
                    "experiment": task.experiment,
                    "network": task.network(method),
                    "method": name,
                    "seed": seed,
                    "eps": eps,
                    "norm": "l2",
                    "n": len(task.test.y),
                    "settings": row_settings(method, settings, task, eps),
                    "versions": report.versions(),
                    "device": report.device(),
                }
                row = next((r for r in known if identity.items() <= r.items()), None)
                if row is None:
                    total = 1 if found else 7
                    bar = progress.add_task(f"{title}: attacks", total=total, note="")
                    tick = partial(progress.advance, bar)
                    one_step = one_step or directions(net, task, settings, tick)
                    scores = score(net, task, fixed[eps].r, one_step, settings, eps, pgd, tick)
                    scores["columns"]["fixed_source"] = fixed[eps].accuracy
                    found = found or curves(net, task, one_step, settings, tick)
                    row = {
                        **identity,
                        **task.extra(name),
                        **scores,
                        "n_pgd": min(settings.n_pgd, len(task.test.y)),
                        "curves": found,
                        "epochs": method.epochs,
                        "train_seconds": round(net.fitted.seconds, 1),
                        "history": net.fitted.history,
                    }
                rows.append(row)
                done = {place(row) for row in rows}
                if parallel.first_process():
                    report.save_rows(results, rows + [r for r in known if place(r) not in done])
            first = seed == settings.seed[0]
            folder = settings.out / name if first else settings.out / name / f"seed_{seed}"
            if parallel.first_process():
                report.save_params(folder / "params.safetensors", net.params)
    return rows, nets
