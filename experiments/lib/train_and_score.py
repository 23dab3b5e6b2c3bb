"""The common part of Section 7's experiments: train nets, attack them and score them.

`run` trains a net by each method with each seed, perturbs the images in the ways of Section 7.2,
writes results.json, weights and checkpoints, and returns the rows of a table. Work that an earlier
run has finished is not repeated. `recipes` defines the methods; `mnist`, `cifar10`, `ablations` and
`remedies` choose nets, data and settings; `training` has the loop over epochs; `records` and
`tables` store and show the rows.
"""

from __future__ import annotations

import dataclasses
import itertools
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jax.typing import DTypeLike
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress

from experiments.lib import (
    cache,
    data,
    models,
    options,
    parallel,
    recipes,
    records,
    timing,
    training,
    weights,
)
from experiments.lib.models import Classifier, function, init
from experiments.lib.options import Count, OutputFolder, Seed, Several, Size, Whole
from experiments.lib.recipes import Method
from experiments.lib.records import TableRow
from jaxadv import attack, evaluate, objectives, perturb
from jaxadv.train import TrainState, make_epoch
from jaxadv.train import init as start
from jaxadv.types import ApplyFn, Objective, Params, PerturbFn

# The settings that determine how nets are scored.
_SCORING = ("n_eval", "n_pgd", "pgd_steps", "fixed_seed")
# The fields of a row that tell it from others in its file.
_PLACE = ("method", "seed", "eps")


@dataclasses.dataclass(frozen=True)
class Settings(parallel.Settings, recipes.Optimiser):
    """The settings common to all experiments; each has its own defaults."""

    seed: Several[Seed] = (0,)
    """Random seeds: one run for each. The table shows means over them."""
    out: OutputFolder = Path("runs")
    """Where results, figures, weights and checkpoints go."""
    holdout: Whole = 0
    """Training images to hold out, and to score instead of the test images; 0 for final figures."""
    n_eval: Count = 10_000
    """Most images to score."""
    n_pgd: Count = 10_000
    """Most images attacked by PGD."""
    eps: Several[Size] = (1.5,)
    """l2 sizes of the perturbations in the table."""
    pgd_steps: Count = 100
    """Steps of the iterated attack, each of 2.5 eps / steps."""
    curve: Several[Size] = tuple(np.arange(0, 4.01, 0.2).round(1).tolist())
    """l2 sizes of the curves."""
    batch_size: Count = 100
    """Images per training step."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Precision of the hidden layers; parameters, logits and perturbed images are float32."""
    eval_batch: Count = 1000
    """Images perturbed at once when a net is scored."""
    fixed_seed: Seed = 1000
    """Seed of the Normal net that the Fixed set is made on."""

    def __post_init__(self) -> None:
        """Check options against each other.

        Raises:
          UsageError: if the net that the Fixed set is made on would itself be scored on it, or as
            `recipes.check`.
        """
        super().__post_init__()
        if self.fixed_seed in self.seed:
            raise options.UsageError(
                f"expected --fixed-seed not to be among --seed, got {self.fixed_seed} among "
                f"{self.seed}; choose another"
            )
        for name, method in self.nets().items():
            recipes.check(name, method, lr_warmup=self.lr_warmup)

    def nets(self) -> Mapping[str, Method]:
        """Return how to train each net of the table, by name: the fields that `methods` names."""
        return {name: getattr(self, name) for name in getattr(self, "methods", ())}


S = TypeVar("S", bound=Settings)


def shortened(settings: S, names: Iterable[str], **changes: Any) -> S:
    """Return the settings of --quick: one epoch of training, and another output folder.

    Args:
      settings: an experiment's defaults.
      names: the names of its fields that are recipes.
      **changes: other fields to set.
    """
    short: dict[str, Any] = {name: recipes.shortened(getattr(settings, name)) for name in names}
    out = settings.out.with_name(f"{settings.out.name}_quick")
    return dataclasses.replace(settings, out=out, **short, **changes)


Pixels = tuple[NDArray[np.uint8], NDArray[np.int32]]


class Images(NamedTuple):
    """Images and labels, on the device."""

    x: jax.Array  # [n, H, W, C]
    y: jax.Array  # [n]


class Net(NamedTuple):
    """A trained net, as a function and parameters."""

    apply_fn: ApplyFn
    params: Params
    fitted: training.Fitted


class Task(NamedTuple):
    """The data and the nets of an experiment.

    Attributes:
      experiment: name of the experiment in the rows.
      methods: how to train each net, by name.
      normal: how to train the Normal net that the Fixed set is made on, with another seed.
      names: names of the methods in tables.
      make_net: makes the net for a method.
      network: names that net in the rows.
      train: images to train on.
      test: images to score, scaled.
      source: source of the images, for the record.
      interface: meaning of the nets' inputs and logits, saved with their weights.
      augment: `(key, x) -> x`, from a batch of training images to the net's inputs.
      groups: labels of a method in each question that it belongs to, if there are any.
      stored: dtype that weights are rounded to before scoring, and saved as.
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
    interface: data.Interface
    augment: Callable[[jax.Array, jax.Array], jax.Array] | None = None
    groups: Callable[[str], dict[str, str] | None] = lambda name: None
    stored: DTypeLike = jnp.float32
    mesh: Mesh | None = None


class Training(NamedTuple):
    """Arguments of training, for `training.fit` and `step_seconds`.

    Attributes:
      objective: the objective to minimise.
      tx: the optimiser.
      data: the arrays whose rows make up a batch.
      model_state: the initial model state.
    """

    objective: Objective
    tx: optax.GradientTransformation
    data: tuple[jax.Array, ...]
    model_state: objectives.Memory | None


def prepare(method: Method, settings: Settings, task: Task) -> Training:
    """Return the arguments of a net's training."""
    epoch_steps = len(task.train.y) // settings.batch_size
    objective = recipes.make_objective(task.make_net(method), method, epoch_steps)
    if isinstance(method, recipes.Robust) and method.shift:
        objective = recipes.augmented(objective, recipes.shifted(method.shift))
    if task.augment:
        objective = recipes.augmented(objective, task.augment)
    tx = recipes.optimiser(method, epoch_steps, settings)
    if not recipes.remembers(method):
        return Training(objective, tx, task.train, None)
    objective = recipes.renewed(objective, method, epoch_steps)
    data = (*task.train, jnp.arange(len(task.train.y)))
    memory = objectives.Memory(jnp.zeros(task.train.x.shape))
    return Training(objectives.with_memory(objective), tx, data, memory)


def train(
    name: str, method: Method, seed: int, settings: Settings, task: Task, progress: Progress
) -> Net:
    """Train a net, or restore it if an earlier run finished it.

    Raises:
      UsageError: as `recipes.check`.
    """
    recipes.check(name, method, lr_warmup=settings.lr_warmup)
    net = task.make_net(method)
    apply_fn = function(net)
    init_key, fit_key = jax.random.split(jax.random.key(seed))
    made = prepare(method, settings, task)
    watched = scored(task, settings.n_pgd)
    attacked = partial(
        evaluate.attack_and_score, apply_fn, eps=settings.eps[0], batch_size=settings.eval_batch
    )

    def watch(state: TrainState) -> dict[str, float]:
        seen = attacked(recipes.result(method, state), *watched, perturb.loss).outcome
        return {
            "validation": evaluate.accuracy(seen.clean),
            "adv_loss": evaluate.accuracy(seen.robust),
            "watched_eps": settings.eps[0],
            "watched_n": len(watched.y),
        }

    fitted = training.fit(
        made.objective,
        made.tx,
        init(net, init_key, np.asarray(task.test.x[:1])),
        made.data,
        model_state=made.model_state,
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
    return Net(apply_fn, _as_stored(recipes.result(method, fitted.state), task), fitted)


def step_seconds(
    methods: Mapping[str, Method], settings: Settings, task: Task, *, steps: int, rounds: int
) -> dict[str, NDArray[np.float64]]:
    """Time training steps of several methods in turn, on one device.

    Args:
      methods: the methods, by name.
      settings: settings of the experiment.
      task: its data.
      steps: how many steps to time at once; at most an epoch's.
      rounds: how often to time them.

    Returns:
      Seconds per step in each round, by name, without compilation.
    """
    epoch_steps = len(task.train.y) // settings.batch_size
    rows = settings.batch_size * min(steps, epoch_steps)
    order = jax.random.permutation(jax.random.key(0), len(task.train.y))[:rows]
    order = order.reshape(-1, settings.batch_size)

    def run(method: Method) -> timing.Call:
        made = prepare(method, settings, task)
        net = task.make_net(method)
        params = init(net, jax.random.key(0), np.asarray(task.test.x[:1]))
        epoch = make_epoch(made.objective, made.tx)
        state = [start(params, made.tx, model_state=made.model_state, key=jax.random.key(1))]

        def call() -> jax.Array:
            # Past the first epoch, in which a method with a memory also draws new perturbations.
            second = state[0]._replace(step=jnp.int32(epoch_steps))
            state[0], info = epoch(second, made.data, order)
            return info.loss

        return call

    calls = {name: run(method) for name, method in methods.items()}
    taken = timing.in_turn(calls, rounds, seconds=0.0)
    return {name: seconds / len(order) for name, seconds in taken.items()}


def _as_stored(params: Params, task: Task) -> Params:
    """Return weights rounded as in their file, so that the scored net is the saved one."""
    return jax.tree.map(lambda leaf: leaf.astype(task.stored).astype(leaf.dtype), params)


def train_settings(method: Method, settings: Settings, task: Task) -> dict[str, Any]:
    """Return everything that a net depends on except its seed, in JSON's types."""
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


def _made(method: Method, seed: int, settings: Settings, task: Task) -> dict[str, Any]:
    """Return what a net's file of weights says about how they were made."""
    return {"seed": seed, **train_settings(method, settings, task)}


def row_settings(method: Method, settings: Settings, task: Task, eps: float) -> dict[str, Any]:
    """Return everything that a row of the table depends on except its seed, in JSON's types."""
    stored = jnp.dtype(task.stored).name
    return {
        **train_settings(method, settings, task),
        **{field: getattr(settings, field) for field in _SCORING},
        "eps": eps,
        "curve": list(settings.curve),
        **({"weights": stored} if stored != "float32" else {}),  # older rows, all float32, lack it
    }


def parts(holdout: int, images: data.Dataset) -> tuple[Pixels, Pixels]:
    """Return the pixels and labels to train on, and those to score.

    Args:
      holdout: how many training images to hold out, and to score; 0 to score the test images.
      images: the data set.

    Raises:
      UsageError: if no images are left to train on.
    """
    train = images.train_images, images.train_labels
    if not holdout:
        return train, (images.test_images, images.test_labels)
    n = len(images.train_labels)
    if holdout >= n:
        raise options.UsageError(
            f"expected --holdout to be less than {n}, the number of training images, got "
            f"{holdout}; hold out fewer"
        )
    kept, held = data.split(n, holdout, seed=0)
    return (train[0][kept], train[1][kept]), (train[0][held], train[1][held])


def in_precision(task: Task, precision: str) -> Task:
    """Return the task with nets of another precision, which is added to their names."""
    if precision == "float32":
        return task
    return task._replace(
        make_net=lambda method: task.make_net(method).clone(dtype=jnp.dtype(precision)),
        network=lambda method: f"{task.network(method)}, {precision}",
    )


def scored(task: Task, n: int | None = None) -> Images:
    """Return the first n of the images to score, or all of them, spread over the devices."""
    return Images(*parallel.spread(task.mesh, tuple(part[:n] for part in task.test)))


ONE_STEP: Mapping[str, PerturbFn] = {
    "adv_loss_sign": perturb.loss_sign,
    "adv_loss": perturb.loss,
    "adv_alpha": perturb.alpha,
}
"""The paper's perturbations, by column of the table."""


def directions(
    net: Net, task: Task, settings: Settings, tick: Callable[[], None]
) -> dict[str, np.ndarray]:
    """Return each one-step method's perturbations at l2 size 1, to be scaled to all sizes."""
    found = {}
    for column, method in ONE_STEP.items():
        found[column] = evaluate.attack_and_score(
            net.apply_fn, net.params, *scored(task), method,
            eps=1.0, batch_size=settings.eval_batch,
        ).r  # fmt: skip
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
) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Return the columns and the counts of one row."""
    batch_size = settings.eval_batch
    images = scored(task)
    scores = partial(evaluate.score, net.apply_fn, net.params, batch_size=batch_size)
    clean = scores(*images).clean
    transferred = scores(images.x + fixed, images.y).clean
    columns = {
        "validation": evaluate.accuracy(clean),
        "fixed": evaluate.accuracy(clean & transferred),
    }
    outcomes = {column: scores(*images, eps * r) for column, r in one_step.items()}
    outcomes["pgd"] = evaluate.attack_and_score(
        net.apply_fn, net.params, *scored(task, settings.n_pgd), pgd,
        eps=eps, batch_size=batch_size,
    ).outcome  # fmt: skip
    tick()
    counts: dict[str, dict[str, float]] = {}
    for column, outcome in outcomes.items():
        columns[column] = evaluate.accuracy(outcome.robust)
        counts[column] = {
            "zero": int(outcome.zero.sum()),
            "nonfinite": int(outcome.nonfinite.sum()),
            "invalid": int(outcome.invalid.sum()),
            "max_norm": float(np.where(np.isfinite(outcome.norm), outcome.norm, 0).max()),
        }
    return columns, counts


def curves(
    net: Net,
    task: Task,
    one_step: Mapping[str, np.ndarray],
    settings: Settings,
    tick: Callable[[], None],
) -> dict[str, list[float]]:
    """Return the accuracy at each size of the paper's figures."""
    images = scored(task)
    scores = partial(evaluate.score, net.apply_fn, net.params, batch_size=settings.eval_batch)
    clean = scores(*images).clean
    found: dict[str, list[float]] = {"eps": list(settings.curve)}
    for column, r in one_step.items():
        masks = (scores(images.x + eps * r, images.y).clean for eps in settings.curve)
        found[column] = [evaluate.accuracy(clean & mask) for mask in masks]
        tick()
    return found


class _Fixed(NamedTuple):
    """The perturbations of the Fixed set at one size: Adv_Loss on a Normal net."""

    r: np.ndarray  # [n, H, W, C]
    accuracy: float  # of that net on them


def _fixed_net(settings: Settings, task: Task, progress: Progress) -> tuple[ApplyFn, Params]:
    """Train the net that the Fixed set is made on, or load its weights from an earlier run."""
    path = settings.out / "fixed" / "params.safetensors"
    made = _made(task.normal, settings.fixed_seed, settings, task)
    if weights.made(path) == made:
        params = _as_stored(weights.load(path, jnp.float32), task)
        normal = task.make_net(task.normal)
        models.check(normal, params, task.interface.shape)
        return function(normal), parallel.replicate(task.mesh, params)
    net = train("normal", task.normal, settings.fixed_seed, settings, task, progress)
    if parallel.first_process():
        weights.save(path, net.params, task.stored, interface=task.interface, made=made)
    return net.apply_fn, net.params


def _make_fixed(settings: Settings, task: Task, progress: Progress) -> dict[float, _Fixed]:
    """Return the Fixed set at each size."""
    net = _fixed_net(settings, task, progress)
    batch_size = settings.eval_batch
    images = scored(task)
    one = evaluate.attack_and_score(*net, *images, perturb.loss, eps=1.0, batch_size=batch_size).r
    fixed = {}
    for eps in settings.eps:
        own = evaluate.score(*net, images.x + eps * one, images.y, batch_size=batch_size)
        fixed[eps] = _Fixed(eps * one, evaluate.accuracy(own.clean))
    return fixed


def run(settings: Settings, task: Task, console: Console) -> tuple[list[TableRow], dict[str, Net]]:
    """Train, attack and score; return the rows of the table, and each method's first net.

    Rows of other methods, seeds and sizes from earlier runs stay in the file.

    Raises:
      UsageError: if a net is split above its last hidden layer.
    """
    _check_splits(task)
    results = settings.out / "results.json"
    settings.out.mkdir(parents=True, exist_ok=True)
    known = records.load(results, TableRow)
    n = len(task.test.y)
    sizes = settings.batch_size, n, min(settings.n_pgd, n)
    task = in_precision(task, settings.precision)
    task = task._replace(mesh=parallel.mesh(settings, *sizes))
    pgd = partial(attack.pgd, norm="l2", steps=settings.pgd_steps)  # one object: compiles once
    rows: list[TableRow] = []
    nets: dict[str, Net] = {}

    with training.bars(console) as progress:
        fixed = _make_fixed(settings, task, progress)
        for seed, (name, method) in itertools.product(settings.seed, task.methods.items()):
            net = train(name, method, seed, settings, task, progress)
            nets.setdefault(name, net)
            title = f"{task.names.get(name, name)}, seed {seed}"
            one_step: dict[str, np.ndarray] = {}  # shared by all sizes, like the curves
            found: dict[str, list[float]] = {}
            for eps in settings.eps:
                identity: dict[str, Any] = {
                    "experiment": task.experiment,
                    "network": task.network(method),
                    "method": name,
                    "seed": seed,
                    "eps": eps,
                    "norm": "l2",
                    "n": n,
                    "settings": row_settings(method, settings, task, eps),
                    **records.made_by(),
                }
                row = records.find(known, identity)
                # Figures on another Fixed set, told apart by this accuracy, are for another column.
                if row is None or row.columns["fixed_source"] != fixed[eps].accuracy:
                    total = 1 if found else 7
                    bar = progress.add_task(f"{title}: attacks", total=total, note="")
                    tick = partial(progress.advance, bar)
                    one_step = one_step or directions(net, task, settings, tick)
                    columns, counts = score(
                        net, task, fixed[eps].r, one_step, settings, eps, pgd, tick
                    )
                    found = found or curves(net, task, one_step, settings, tick)
                    row = TableRow(
                        **identity,
                        groups=task.groups(name),
                        columns={**columns, "fixed_source": fixed[eps].accuracy},
                        counts=counts,
                        n_pgd=min(settings.n_pgd, n),
                        curves=found,
                        epochs=method.epochs,
                        train_seconds=round(net.fitted.seconds, 1),
                        history=net.fitted.history,
                    )
                rows.append(row)
                if parallel.first_process():
                    with cache.locked(settings.out):  # others may have added rows meanwhile
                        kept = _others(records.load(results, TableRow), rows)
                        records.save(results, [*rows, *kept])
            if parallel.first_process():
                made = _made(method, seed, settings, task)
                with cache.locked(settings.out):
                    path = weights_path(settings, name, seed)
                    _make_way(path, seed)
                    weights.save(path, net.params, task.stored, interface=task.interface, made=made)
    return rows, nets


def weights_path(settings: Settings, method: str, seed: int) -> Path:
    """Return the file for a net's weights: those of the least seed with any are METHOD's own."""
    path = settings.out / method / "params.safetensors"
    if not path.exists() or seed <= _seed_of(path):
        return path
    return path.parent / f"seed_{seed}" / path.name


def _make_way(path: Path, seed: int) -> None:
    """Move weights of a larger seed from where this seed's will be written to their own folder."""
    there = _seed_of(path)
    if seed < there:
        own = path.parent / f"seed_{there}"
        own.mkdir(exist_ok=True)
        path.replace(own / path.name)


def _seed_of(path: Path) -> int:
    """Return the seed of a file's weights; 0 if it doesn't say, as older ones, or doesn't exist."""
    return (weights.made(path) or {}).get("seed", 0)


def _check_splits(task: Task) -> None:
    for name, method in {"normal": task.normal, **task.methods}.items():
        net, option = task.make_net(method), f"--{name.replace('_', '-')}"
        layers = len(net.blocks) + len(net.dense)
        if net.split > layers:
            raise options.UsageError(
                f"expected {name} to have at least {net.split} blocks and hidden dense layers, "
                f"since it is split after them, got {layers}; add to {option}.widths, or lower "
                f"{option}.split"
            )


def record(folder: Path, rows: Sequence[TableRow]) -> list[TableRow]:
    """Return the rows of a run, and those of earlier runs that belong in the same table.

    Args:
      folder: folder of results.json.
      rows: rows of the run.

    Returns:
      These rows, then the file's rows of other methods, seeds and sizes, so that a table can be
      made in several runs. Only rows with the same images and attacks are included and, since a
      table shows means over seeds, only those trained like their method's first row.
    """

    def scoring(row: TableRow) -> list[Any]:
        return [row.settings.get(field) for field in ("data", "holdout", *_SCORING)]

    def training(row: TableRow) -> dict[str, Any]:
        of_size = ("eps", "curve")
        return {key: value for key, value in row.settings.items() if key not in of_size}

    kept = list(rows)
    for row in _others(records.load(folder / "results.json", TableRow), rows):
        first = next((other for other in kept if other.method == row.method), row)
        if scoring(row) == scoring(rows[0]) and training(row) == training(first):
            kept.append(row)
    return kept


def _others(known: Sequence[TableRow], rows: Sequence[TableRow]) -> list[TableRow]:
    """Return the known rows, without those that the given rows replace."""
    place = operator.attrgetter(*_PLACE)
    taken = set(map(place, rows))
    return [row for row in known if place(row) not in taken]
