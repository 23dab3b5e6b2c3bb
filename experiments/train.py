"""Train a robust classifier on your own images, and report how robust it is.

    python experiments/train.py DIR              # DIR/{train,test}/CLASS/*.png or jpg
    python experiments/train.py DIR --resize 32  # photographs of any sizes, as 32x32
    python experiments/train.py mnist --net lenet --norm linf --eps 0.3
    python experiments/train.py tfds:fashion_mnist --net mynets:make --method trades --eps 0.5
    python experiments/train.py --help                   # every setting

Pixels are scaled to 0..1, and perturbed images stay there; eps is in these units. NET is `conv`
(for images of any size), `mlp`, `lenet` or `vgg`, or `module:function` for a function that takes
the number of classes and returns a flax.linen module with `__call__(x, train=False)`, whose only
variables are parameters.

Without a folder DIR/test, every fifth image of each class is held out for testing; the classes may
then be in DIR itself. A few thousand photographs of 32x32 take minutes on two CPU cores. After an
epoch or two it says how long the training will take.

Saves a checkpoint after each epoch, and resumes after an interruption. Writes to --out the weights
(params.safetensors, with the names of the classes and the scaling of pixels, for `evaluate.py`);
history.csv and history.png; results.json, the accuracies under each of --attacks; worst.png, the
images with the smallest adversarial perturbations; and curve/, the accuracy at every size. Ends
with a verdict. The documentation has the core of it in fifty lines of Python
(docs/examples/own_images.py).
"""

from __future__ import annotations

import csv
import dataclasses
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, from anywhere

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import linen as nn
from jax.sharding import Mesh
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress

from experiments.lib import (
    data,
    evaluation,
    figures,
    models,
    options,
    parallel,
    problems,
    recipes,
    records,
    train_and_score,
    training,
    weights,
)
from experiments.lib.attacks import LABELS, Attack, methods
from experiments.lib.options import (
    Count,
    OutputFolder,
    Positive,
    Seed,
    Share,
    Size,
    Whole,
    distinct,
)
from experiments.lib.problems import Problem
from experiments.lib.records import TrainRow
from jaxadv import evaluate, objectives, perturb
from jaxadv.train import TrainState
from jaxadv.types import Norm, Objective, Params

_STRIDE = 1.5  # length of a step from a kept perturbation, in units of the size
_BATCH = 250  # images that are attacked at once
_BUDGET = 1000  # passes per image in the search for its smallest perturbation
_WORST = 8  # images that are drawn
# Options that have a use only with some values of another.
_ADVERSARIES = ("lwa", "goodfellow", "trades")
_USEFUL = {
    "widths": ("net", ("conv", "mlp", "lenet", "vgg")),
    "width": ("net", ("vgg",)),
    "train_eps": ("method", _ADVERSARIES),
    "steps": ("method", _ADVERSARIES),
    "eps_warmup": ("method", _ADVERSARIES),
    "memory": ("method", ("lwa", "goodfellow")),
    "weight": ("method", ("trades",)),
}


@dataclasses.dataclass(frozen=True)
class Settings(parallel.Settings, recipes.Optimiser):
    """Train a robust classifier and report its robust accuracy."""

    data: Annotated[str, tyro.conf.Positional]
    """A folder with {train,test}/CLASS/*.png or jpg, `mnist`, `cifar10`, or `tfds:NAME`."""
    eps: Positive = 0.5
    """Size of the perturbations, with pixels in 0..1; in linf, 8/255 = 0.031 is usual."""
    resize: Count | None = None
    """Resize the middle square of each image to this side; None leaves images as they are."""
    net: str = "conv"
    """`conv`, `mlp`, `lenet`, `vgg`, or `module:function`."""
    widths: tuple[Count, ...] = ()
    """Sizes of the hidden dense layers; by default those of the paper's nets, and none for conv."""
    width: Positive = 0.25
    """Factor for all sizes of vgg; 1 is the paper's."""
    method: Literal["normal", "lwa", "goodfellow", "trades"] = "lwa"
    """The objective: without an adversary, on perturbed images, on both, or with a divergence."""
    norm: Norm = "l2"
    """Norm of eps."""
    train_eps: Positive | None = None
    """Size in training; eps unless set. A fifth more than eps is often best."""
    steps: Count = 5
    """Steps of the adversary in training, each of 2.5 sizes / steps, with --memory of 1.5 sizes; 1
    is the paper's Adv_Loss."""
    memory: Whole = 0
    """Epochs for which each image's perturbation is kept, and continued from; 0 for none. It takes
    as much memory as the images in float32. With --steps 1, a training step takes as many passes as
    LWA's."""
    eps_warmup: Whole | None = None
    """Epochs over which the adversary's size rises from 0, at most all but the last; a quarter of
    them unless set."""
    weight: Size = 6.0
    """Weight of the divergence, for trades."""
    epochs: Count | None = None
    """Passes over the training images; by default as many as show 60,000 images, from 20 to 100."""
    batch_size: Count | None = None
    """Images per training step; by default 50, or fewer if an epoch would have less than 20 steps.
    """
    lr: Positive = 0.02
    """Greatest learning rate; it falls to 0 by a cosine."""
    lr_warmup: Whole = dataclasses.field(default=2, kw_only=True)
    """Epochs over which the learning rate rises from 0; at most all but the last."""
    average: Share | None = None
    """Decay of the moving average of the weights, which is the result; 0 for the last weights. By
    default 0.999, or less if the average would extend over more than a tenth of the steps."""
    shift: Whole | None = None
    """Most pixels by which training images are shifted at random, in each direction; by default a
    sixteenth of the shorter side."""
    mirror: bool | None = None
    """Whether training images are mirrored at random; by default only colour images are."""
    seed: Seed = 0
    """Random seed."""
    holdout: Whole = 0
    """Training images to hold out, and to score instead of the test images, while you choose
    settings; 0 for final figures. Defaults that depend on the number of images are for the rest."""
    n_eval: Count = 100
    """How many of the test images, or of those held out, are attacked."""
    attacks: Annotated[tuple[Attack, ...], distinct] = ("one-step", "fast")
    """Attacks on the trained net: `standard` is AutoAttack; `fast` reaches nearly the same verdicts
    in less time. `--attacks` without a name runs none."""
    out: OutputFolder = Path("runs/train")
    """Where everything goes."""

    def __post_init__(self) -> None:
        """Check that the options fit together.

        Raises:
          UsageError: if an option is given, and not as its default, where it has no use, or if any
            two images are within reach of each other.
        """
        super().__post_init__()
        for option, eps in (("--eps", self.eps), ("--train-eps", self.train_eps)):
            if self.norm == "linf" and eps is not None and eps >= 0.5:
                raise options.UsageError(
                    f"expected {option} in linf to be less than 0.5, which makes every image grey, "
                    f"got {eps:g}; choose a smaller one, e.g. 0.031 for photographs"
                )
        usual = {option: [None, getattr(Settings, option)] for option in _USEFUL}
        usual["eps_warmup"] += [0, (self.epochs or 0) // 4]  # as `settled` sets it
        for option, (other, useful) in _USEFUL.items():
            chosen = getattr(self, other)
            if getattr(self, option) not in usual[option] and chosen not in useful:
                raise options.UsageError(
                    f"expected --{option.replace('_', '-')} only with --{other} "
                    f"{' or '.join(useful)}, got {chosen}; leave it out, or choose another "
                    f"--{other}"
                )


def make_net(settings: Settings, classes: int) -> nn.Module:
    """Return the net.

    Raises:
      UsageError: if there is no such net.
    """
    widths = settings.widths
    known = {
        "conv": lambda: models.conv(widths),
        "mlp": lambda: models.mlp(widths or (500, 500)),
        "lenet": lambda: models.lenet(widths or (500,)),
        "vgg": lambda: models.vgg(widths or (2048, 2048), width=settings.width),
    }
    if settings.net in known:
        return known[settings.net]().clone(classes=classes)
    if ":" not in settings.net:
        raise options.UsageError(
            "expected --net to be conv, mlp, lenet, vgg, or a function as module:function, got "
            f"{settings.net!r}; choose one of these"
        )
    make = options.imported(settings.net)
    made = make(classes)
    if not isinstance(made, nn.Module):
        raise options.UsageError(
            f"expected {settings.net} to return a flax.linen module, got {type(made).__name__}; "
            "for other nets write the loop yourself, the documentation shows how"
        )
    try:
        hash(made)
    except TypeError as error:
        raise options.UsageError(
            f"expected {settings.net} to return a module that can be hashed, got one that can't "
            "be; make lists among its attributes tuples"
        ) from error
    return made


def training_size(settings: Settings) -> float | None:
    """Return the size of the perturbations in training; None if there are none."""
    if settings.method == "normal":
        return None
    return settings.eps if settings.train_eps is None else settings.train_eps


KINDS: dict[str, recipes.ObjectiveName] = {
    "lwa": "adversarial", "goodfellow": "mixed", "trades": "virtual"
}  # fmt: skip


def make_objective(settings: Settings, net: nn.Module, epoch_steps: int) -> Objective:
    """Return the objective of the training."""
    apply_fn, train_fn = models.function(net), models.train_function(net)
    size = training_size(settings)
    if size is None:
        return objectives.natural(apply_fn, train_fn=train_fn)
    kind = KINDS[settings.method]
    adversary = recipes.several_steps(kind, settings.steps, norm=settings.norm)
    one_step = partial(perturb.loss, norm=settings.norm)
    if settings.memory:
        adversary = partial(
            recipes.few_steps, step=one_step, steps=settings.steps, noise=0, stride=_STRIDE,
            reach=1, norm=settings.norm,
        )  # fmt: skip
    elif settings.steps == 1 and kind != "virtual":
        adversary = one_step
    rising = recipes.rising(size, (settings.eps_warmup or 0) * epoch_steps)
    return recipes.against(
        kind, apply_fn, adversary, eps=rising,
        train_fn=train_fn, weight=settings.weight, bounds=(0.0, 1.0),
    )  # fmt: skip


def drawn(settings: Settings, objective: Objective) -> Objective:
    """Return the objective on pixels as bytes, scaled, and moved and mirrored at random."""
    shift = recipes.shifted(settings.shift or 0)

    def move(key: jax.Array, x: jax.Array) -> jax.Array:
        shift_key, mirror_key = jax.random.split(key)
        if settings.mirror:
            mirrored = jax.random.bernoulli(mirror_key, shape=(len(x), 1, 1, 1))
            x = jnp.where(mirrored, x[:, :, ::-1], x)
        return shift(shift_key, x) if settings.shift else x

    moved = recipes.augmented(objective, move)

    def draw(
        params: Params, model_state: Any, batch: Any, /, *, key: jax.Array, step: jax.Array
    ) -> Any:
        pixels, *others = batch
        scaled = pixels.astype(jnp.float32) / 255, *others
        return moved(params, model_state, scaled, key=key, step=step)

    return draw


def scored(settings: Settings) -> str:
    """Return what the scored images are called."""
    return "held-out images" if settings.holdout else "test images"


def untaught(accuracy: float, labels: NDArray[Any], settings: Settings) -> str:
    """Return advice on a net that is no better than always answering one class, else ""."""
    constant = np.bincount(labels).max() / len(labels)
    if accuracy > constant or constant == 1:
        return ""
    advice = "Lower --lr, or raise --lr-warmup or --epochs"
    if settings.method != "normal":
        advice += ", or lower --train-eps, or raise --eps-warmup"
    return (
        f"The net is no better than a constant answer: its accuracy on the {scored(settings)} is "
        f"{accuracy:.4f}; always answering the most frequent class gives {constant:.4f}. "
        f"{advice}; and choose another --out."
    )


def lengths(settings: Settings, n: int) -> tuple[int, int]:
    """Return the numbers of epochs and of images per step, by default those for n images."""
    epochs = settings.epochs or min(100, max(20, 60_000 // n))
    return epochs, settings.batch_size or min(50, max(1, n // 20))


def settled(settings: Settings, images: data.Dataset, epochs: int, batch_size: int) -> Settings:
    """Return the settings with defaults that depend on the images filled in."""
    n, height, width, channels = images.train_images.shape
    of_images = {
        "epochs": epochs,
        "batch_size": batch_size,
        "eps_warmup": epochs // 4,
        "average": max(0.0, min(0.999, 1 - 10 / (n // batch_size * epochs))),
        "shift": min(height, width) // 16,
        "mirror": channels == 3,
    }
    unsaid = {name: value for name, value in of_images.items() if getattr(settings, name) is None}
    settings = dataclasses.replace(settings, **unsaid)
    least = {name: min(getattr(settings, name), epochs - 1) for name in ("lr_warmup", "eps_warmup")}
    return dataclasses.replace(settings, **least)


def describe(settings: Settings, images: data.Dataset) -> str:
    """Return a description of the data and the training."""
    n, height, width, channels = images.train_images.shape
    moved = f"moved by up to {settings.shift} pixels" if settings.shift else "not moved"
    lines = [
        f"{n:,} training and {len(images.test_labels):,} {scored(settings)} of {width}x{height}, "
        f"{'grey' if channels == 1 else 'colour'}, in {len(images.classes)} classes; in training "
        f"{moved} and {'' if settings.mirror else 'not '}mirrored at random. {settings.epochs} "
        "epochs."
    ]
    if not settings.holdout and (held_out := data.held_out(settings.data)):
        lines.append(f"In {settings.data} {held_out}.")
    if (times := height * width / 32**2) > 4:
        lines.append(
            f"This takes about {times:.0f} times as long as with images of 32x32, which "
            "--resize 32 makes of them."
        )
    return "\n".join(lines)


def run(settings: Settings, console: Console) -> tuple[list[TrainRow], Problem]:
    """Train or restore the net, attack it, and return a row for each attack, and what is attacked.

    Raises:
      UsageError: if there are fewer images than a batch has, or all are held out; if the net
        isn't for images of this size, or has variables that aren't parameters; if images would be
        moved out of sight; if results.json isn't one of this command's.
    """
    # Before any work, raise an error if they are others.
    records.load(settings.out / "results.json", TrainRow)
    images = data.named(settings.data, resize=settings.resize)
    whole = data.fingerprint(images)
    taught, judged = train_and_score.parts(settings.holdout, images)
    images = data.Dataset(*taught, *judged, images.classes)
    n = len(images.train_labels)
    epochs, batch_size = lengths(settings, n)
    if n < batch_size:
        raise options.UsageError(
            f"expected --batch-size to be at most {n}, the training images there are, got "
            f"{batch_size}; choose a smaller one, or add images"
        )
    settings = settled(settings, images, epochs, batch_size)
    init_key, fit_key, attack_key = jax.random.split(jax.random.key(settings.seed), 3)
    chosen = data.order(settings.data, len(images.test_labels))[: settings.n_eval]
    interface = data.WHOLE._replace(
        classes=images.classes, shape=images.test_images.shape[1:], resize=settings.resize
    )
    x, y = interface.inputs(images.test_images[chosen]), images.test_labels[chosen]
    net, params = initialised(settings, images.classes, x[:1], init_key)
    apply_fn = models.function(net)
    console.print(describe(settings, images), markup=False, highlight=False)

    placed = (field.name for field in dataclasses.fields(parallel.Settings))
    kept = {key: str(value) for key, value in settings.without("attacks", "out", *placed).items()}
    for later in ("holdout", "memory"):  # runs of earlier versions, without these options, go on
        if not getattr(settings, later):
            del kept[later]
    kept["images"] = data.fingerprint(images)
    if ":" in settings.net:  # the name doesn't identify the function
        example = jnp.asarray(x[:1])
        dropped, _ = models.train_function(net)(params, None, example, init_key)
        kept["answers"] = problems.digest((apply_fn(params, example), dropped))
    mesh = parallel.mesh(settings, batch_size, len(y))
    watched = parallel.spread(mesh, (x, y))
    with training.bars(console) as progress:
        params, fitted = trained(
            settings, net, params, images, watched, kept, fit_key, mesh, progress
        )
        if parallel.first_process():
            path = settings.out / "params.safetensors"
            weights.save(path, params, interface=interface, made={"images": whole})
            save_history(settings.out, fitted.history, scored(settings))
        seen = evaluate.score(apply_fn, params, *watched, batch_size=100)
        advice = untaught(evaluate.accuracy(seen.clean), y, settings)
        where = Path(settings.data)
        if advice:
            console.print(advice, style="bold")
        identity = {
            "method": f"{settings.net}, {settings.method}",
            "network": settings.net,
            "weights": problems.digest(params),
            "data": where.resolve().name if data.is_folder(settings.data) else settings.data,
            "subtract": interface.subtract,
            "divide": interface.divide,
            "crop": None,
            "box": True,
            "n": len(y),
            "classes": images.classes,
        }
        problem = Problem(apply_fn, params, x, y, (0.0, 1.0), identity)
        measure = partial(
            attacked, settings, problem, kept, fitted.seconds, attack_key, mesh, progress
        )
        rows = [measure(name) for name in settings.attacks]
    return rows, problem


def initialised(
    settings: Settings, classes: Sequence[str], x: NDArray[Any], key: jax.Array
) -> tuple[nn.Module, Params]:
    """Return the net and its initial parameters, if it is one for these images.

    Args:
      settings: the options.
      classes: the class names.
      x: an input, `[1, H, W, C]`.
      key: for the parameters.

    Raises:
      UsageError: as `run`.
    """
    net = make_net(settings, len(classes))
    side = min(x.shape[1:3])
    if (settings.shift or 0) >= side:
        raise options.UsageError(
            f"expected --shift to be less than {side}, the pixels of a side, got {settings.shift}; "
            "choose a smaller one"
        )
    params = net.init(key, x)
    if set(params) != {"params"}:
        raise options.UsageError(
            f"expected a --net whose only variables are params, got {sorted(params)}; for batch "
            "norm write the loop yourself, the documentation shows how"
        )
    logits = jax.eval_shape(models.function(net), params, x)
    shape = getattr(logits, "shape", type(logits).__name__)  # of a tuple
    if shape != (1, len(classes)):
        raise options.UsageError(
            f"expected logits of shape (1, {len(classes)}) for an image, one for each "
            f"class, got {shape} from {settings.net}; use the number of classes it is given"
        )
    return net, params


def trained(
    settings: Settings,
    net: nn.Module,
    params: Params,
    images: data.Dataset,
    watched: tuple[Any, Any],
    kept: dict[str, str],
    key: jax.Array,
    mesh: Mesh | None,
    progress: Progress,
) -> tuple[Params, training.Fitted]:
    """Train the net, or restore it; return its parameters, and how it went.

    Args:
      settings: the options, with all defaults filled in.
      net: the net.
      params: its initial parameters.
      images: the data set.
      watched: the images and labels on which it is scored after each epoch.
      kept: the settings that results depend on, as they are recorded.
      key: for the training.
      mesh: the devices that batches are spread over; None for one.
      progress: progress bars.
    """
    x, y = watched
    epochs, batch_size = lengths(settings, len(images.train_labels))
    epoch_steps = len(images.train_labels) // batch_size
    recipe = recipes.FewSteps(
        (), epochs, settings.lr, average=settings.average or 0.0, memory=settings.memory
    )
    objective = drawn(settings, make_objective(settings, net, epoch_steps))
    examples: tuple[Any, ...] = images.train_images, images.train_labels
    model_state = None
    if settings.memory:
        objective = objectives.with_memory(recipes.renewed(objective, recipe, epoch_steps))
        examples = *examples, np.arange(len(images.train_labels))
        model_state = objectives.Memory(jnp.zeros(images.train_images.shape))

    def watch(state: TrainState) -> dict[str, float]:
        one_step = partial(perturb.loss, norm=settings.norm)
        seen = evaluate.attack_and_score(
            models.function(net), recipes.result(recipe, state), x, y, one_step,
            eps=settings.eps, bounds=(0.0, 1.0), batch_size=100,
        ).outcome  # fmt: skip
        return {
            "test": evaluate.accuracy(seen.clean),
            "one_step": evaluate.accuracy(seen.robust),
            "watched_eps": settings.eps,
            "watched_n": len(y),
        }

    # A trained net is attacked at another size, or on more images, without training it again.
    of_training = {key: value for key, value in kept.items() if key not in ("eps", "n_eval")}
    of_training["train_eps"] = str(training_size(settings))
    fitted = training.fit(
        objective,
        recipes.optimiser(recipe, epoch_steps, settings),
        params,
        tuple(map(jnp.asarray, examples)),
        model_state=model_state,
        epochs=epochs,
        batch_size=batch_size,
        key=key,
        directory=settings.out / "checkpoints",
        settings=of_training,
        progress=progress,
        name=f"{settings.net}, {settings.method}",
        watch=watch,
        mesh=mesh,
    )
    return recipes.result(recipe, fitted.state), fitted


def attacked(
    settings: Settings,
    problem: Problem,
    kept: dict[str, str],
    seconds: float,
    key: jax.Array,
    mesh: Mesh | None,
    progress: Progress,
    name: Attack,
) -> TrainRow:
    """Attack the net, or read what an earlier run recorded.

    Args:
      settings: the options.
      problem: the net and the images.
      kept: the settings that results depend on, as they are recorded.
      seconds: how long training took.
      key: for the attack.
      mesh: the devices that images are spread over; None for one.
      progress: progress bars.
      name: the attack.
    """
    identity = {
        "experiment": "train",
        "settings": kept,
        "attack": name,
        "n": len(problem.y),
        "weights": problem.identity["weights"],
        **records.made_by(),
    }

    def run_attack() -> TrainRow:
        found = evaluation.attack(
            problem, methods(name, settings.norm), eps=settings.eps, norm=settings.norm,
            key=key, batch_size=_BATCH, mesh=mesh, progress=progress,
            store=evaluation.store_of(settings.out, identity),
            title=f"{name}, {settings.norm} {settings.eps:g}",
        )  # fmt: skip
        return TrainRow(
            **identity, **evaluation.figures(found.outcome), train_seconds=round(seconds, 1)
        )

    results = settings.out / "results.json"
    return records.find_or_run(results, TrainRow, identity, run_attack, place=("attack",))


def save_history(folder: Path, history: list[dict[str, float]], scored: str) -> None:
    """Write the history of all epochs as a table and as a figure."""
    with (folder / "history.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["epoch", *history[0]])
        writer.writeheader()
        writer.writerows({"epoch": i, **entry} for i, entry in enumerate(history, 1))
    figures.draw_history(folder, history, scored)


def draw(
    settings: Settings, problem: Problem, rows: Sequence[TrainRow], console: Console
) -> list[Path]:
    """Draw the accuracy at every size, and the images with the smallest perturbations.

    Returns:
      The files written; no images if none is classified correctly.
    """
    folder = settings.out / "curve"
    # Several processes may share the parameters.
    problem = problem._replace(params=jax.tree.map(np.asarray, problem.params))
    with training.bars(console) as progress:
        found, row = evaluation.curve(
            problem,
            eps=[settings.eps],
            norm=settings.norm,
            attacks={row.attack: {f"{settings.eps:g}": row.columns["robust"]} for row in rows},
            budget=_BUDGET,
            seed=settings.seed,
            batch_size=_BATCH,
            out=folder,
            progress=progress,
        )
    records.save(folder / "results.json", [row])
    written = figures.draw(folder)
    least = np.argsort(np.where(found.size > 0, found.size, np.inf))[:_WORST]
    least = least[np.isfinite(found.size[least]) & (found.size[least] > 0)]
    if len(least):
        x, r = problem.x[least], found.r[least]
        answers = problem.apply_fn(problem.params, jnp.asarray(x + r)).argmax(-1)
        classes = problem.identity["classes"]
        names = [
            (classes[label], classes[answer])
            for label, answer in zip(problem.y[least], answers, strict=True)
        ]
        path = settings.out / "worst.png"
        written.append(figures.draw_worst(path, x, r, found.size[least], names))
    return written


def verdict(settings: Settings, row: TrainRow) -> str:
    """Return the result of an attack as a sentence."""
    clean, robust = (round(row.n * row.columns[name]) for name in ("clean", "robust"))
    low, high = (round(100 * end) for end in row.interval)
    return (
        f"Of {row.n:,} {scored(settings)} the net classifies {clean:,} correctly, and {robust:,} "
        f"also after every change of {settings.norm} size {settings.eps:g} that was tried "
        f"({LABELS[row.attack]}); of other images like these, expect {low} to {high} in a hundred "
        "(95% interval), or fewer under a stronger attack."
    )


@options.command
def main() -> None:
    """Run from the command line."""
    settings = tyro.cli(Settings, description=__doc__)
    console = parallel.start(settings)
    rows, problem = run(settings, console)
    for row in rows:
        low, high = row.interval
        console.print(
            f"{row.attack}: accuracy {row.columns['clean']:.4f}, robust accuracy "
            f"{row.columns['robust']:.4f} (95% interval {low:.3f} to {high:.3f}) at "
            f"{settings.norm} {settings.eps:g} on {row.n:,} images",
            highlight=False,
        )
    if rows and parallel.first_process():
        for path in draw(settings, problem, rows, console):
            console.print(f"Wrote {path}", markup=False, highlight=False)
        strongest = min(reversed(rows), key=lambda row: row.columns["robust"])
        console.print(verdict(settings, strongest), style="bold", markup=False, highlight=False)


if __name__ == "__main__":
    main()
