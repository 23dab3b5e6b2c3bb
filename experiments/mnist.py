"""Table 1 of the paper: five ways of training a classifier of MNIST, each attacked in five ways.

    python experiments/mnist.py            # all five, full MNIST, a few minutes on 2 CPU cores
    python experiments/mnist.py --quick    # the same code in about a minute, to see it work
    python experiments/mnist.py --help     # every setting

Trains the two-hidden-layer nets of Section 7.2 (Huang et al., 2015) by Normal, Dropout,
Goodfellow's method, LWA and LWA_Rep, perturbs the test images at l2 size 1.5 and prints the
accuracies beside the paper's. The column PGD isn't in the paper: 100 steps of an iterated attack,
so that nobody takes a one-step figure for robustness. Perturbed images are not clipped to the pixel
range, as in the paper.

Writes results.json, results.md, two figures and each net's weights to --out. Interrupted at any
moment, the same command goes on where it was. With --holdout 10000 the nets are trained on 50,000
images and scored on the 10,000 held out, which is how every setting below was chosen; the test
images are for the reported figures alone, for which the nets are trained on all 60,000.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, from anywhere

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from rich.console import Console
from rich.progress import Progress

from experiments import data, report, training
from experiments.models import MLP, function, init, train_function
from jaxadv import attack, evaluate, objectives, perturb
from jaxadv.types import ApplyFn, Objective, Params, Schedule

MethodName = Literal["normal", "dropout", "goodfellow", "lwa", "lwa_rep"]


@dataclasses.dataclass(frozen=True)
class Method:
    """How one of the five nets is made."""

    widths: tuple[int, ...]
    """Sizes of the hidden layers."""
    epochs: int
    """Passes over the training images."""
    lr: float
    """Learning rate at the start; it falls to 0 by a cosine."""
    dropout: float = 0.0
    """Probability of dropping a hidden unit."""


@dataclasses.dataclass(frozen=True)
class Adversarial(Method):
    """How one of the nets that have an adversary is made."""

    eps: float = 1.5
    """l2 size of the training perturbations, the paper's c; relative to ||h|| for LWA_Rep."""
    warmup: int = 0
    """Epochs over which that size rises from 0."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """Train the five classifiers of Table 1 on MNIST, attack them, and print the table."""

    methods: tuple[MethodName, ...] = ("normal", "dropout", "goodfellow", "lwa", "lwa_rep")
    """Which rows of the table."""
    seed: tuple[int, ...] = (0,)
    """One run for each; the table has their means."""
    out: Path = Path("runs/mnist_mlp")
    """Where results, figures, weights and checkpoints go."""
    quick: bool = False
    """One epoch and 1,000 test images, unless set otherwise."""
    holdout: int = 0
    """Training images held out and scored instead of the test images; 0 for reported figures."""
    n_eval: int = 10_000
    """How many images are scored."""
    eps: float = 1.5
    """l2 size of the perturbations in the table."""
    pgd_steps: int = 100
    """Steps of the iterated attack, each of 2.5 eps / steps."""
    batch_size: int = 100
    """Images per training step."""
    momentum: float = 0.9
    """Of SGD."""
    fixed_seed: int = 1000
    """Seed of the Normal net that the Fixed set is made on."""
    normal: Method = Method((100, 100), epochs=20, lr=0.1)
    dropout: Method = Method((200, 200), epochs=30, lr=0.05, dropout=0.5)
    goodfellow: Adversarial = Adversarial((500, 500), epochs=20, lr=0.1)
    lwa: Adversarial = Adversarial((500, 500), epochs=30, lr=0.1, eps=1.7)
    lwa_rep: Adversarial = Adversarial((200, 500), epochs=20, lr=0.05, eps=0.12, warmup=10)


NAMES: dict[str, str] = {
    "normal": "Normal",
    "dropout": "Dropout",
    "goodfellow": "Goodfellow",
    "lwa": "LWA",
    "lwa_rep": "LWA_Rep",
}

COLUMNS = ("validation", "fixed", "adv_loss_sign", "adv_loss", "adv_alpha")
PAPER = {  # Table 1 as printed
    method: dict(zip(COLUMNS, figures, strict=True))
    for method, figures in {
        "normal": (0.980, 0.320, 0.187, 0.085, 0.073),
        "dropout": (0.983, 0.337, 0.233, 0.115, 0.088),
        "goodfellow": (0.991, 0.955, 0.928, 0.724, 0.711),
        "lwa": (0.990, 0.972, 0.939, 0.861, 0.854),
        "lwa_rep": (0.986, 0.797, 0.819, 0.673, 0.646),
    }.items()
}

CURVE = np.arange(0, 4.01, 0.2).round(1).tolist()  # the sizes of the paper's figures


class Images(NamedTuple):
    """Scaled images and labels, on the device."""

    x: jax.Array  # [n, 28, 28, 1], range [0, .996]
    y: jax.Array  # [n]


class Net(NamedTuple):
    """A trained net, as the library takes it."""

    apply_fn: ApplyFn
    params: Params
    fitted: training.Fitted


def load(settings: Settings) -> tuple[Images, Images]:
    """Return the images to train on and those to score."""
    mnist = data.mnist()
    if settings.holdout:
        kept, held = data.split(len(mnist.train_labels), settings.holdout, seed=0)
        train = mnist.train_images[kept], mnist.train_labels[kept]
        score = mnist.train_images[held], mnist.train_labels[held]
    else:
        train = mnist.train_images, mnist.train_labels
        score = mnist.test_images, mnist.test_labels

    def images(pixels: Any, labels: Any) -> Images:
        return Images(jnp.asarray(data.scale_mnist(pixels)), jnp.asarray(labels))

    n = settings.n_eval
    return images(*train), images(score[0][:n], score[1][:n])


def make_objective(name: str, net: MLP, method: Method, epoch_steps: int) -> Objective:
    """Return what a method of Table 1 minimises."""
    apply_fn = function(net)
    train_fn = train_function(net) if net.dropout else None
    if not isinstance(method, Adversarial):
        return objectives.natural(apply_fn, train_fn=train_fn)
    eps: float | Schedule = method.eps
    if method.warmup:
        eps = optax.linear_schedule(0, method.eps, method.warmup * epoch_steps)
    if name == "goodfellow":  # the sign direction at an l2 size, as the authors ran it
        return objectives.mixed(apply_fn, perturb.loss_sign, eps=eps, train_fn=train_fn)
    if name == "lwa":
        return objectives.adversarial(apply_fn, perturb.loss, eps=eps, train_fn=train_fn)
    return objectives.representation(
        function(net, "encode"),
        function(net, "classify"),
        perturb.loss,
        # As the authors' script has it: a net escapes an absolute size by scaling features up.
        eps=objectives.Relative(eps),
        encode_train_fn=train_function(net, "encode") if net.dropout else None,
        classify_train_fn=train_function(net, "classify") if net.dropout else None,
    )


def train(name: str, seed: int, settings: Settings, images: Images, progress: Progress) -> Net:
    """Train one net, or restore it."""
    method: Method = getattr(settings, name)
    net = MLP(method.widths, dropout=method.dropout)
    init_key, fit_key = jax.random.split(jax.random.key(seed))
    epoch_steps = len(images.y) // settings.batch_size
    lr = optax.cosine_decay_schedule(method.lr, method.epochs * epoch_steps)
    fitted = training.fit(
        make_objective(name, net, method, epoch_steps),
        optax.sgd(lr, momentum=settings.momentum),
        init(net, init_key, images.x[:1]),
        images,
        epochs=method.epochs,
        batch_size=settings.batch_size,
        key=fit_key,
        directory=settings.out / "checkpoints" / f"{name}-{seed}",
        settings=train_settings(name, settings),
        progress=progress,
        name=f"{NAMES[name]}, seed {seed}",
    )
    return Net(function(net), fitted.state.params, fitted)


def train_settings(name: str, settings: Settings) -> dict[str, Any]:
    """Return all that a net depends on but its seed, in the form that JSON gives back."""
    method = dataclasses.asdict(getattr(settings, name))
    return {
        **{field: value for field, value in method.items() if field not in ("widths", "eps")},
        "widths": list(method["widths"]),
        "train_eps": method.get("eps", 0.0),
        "holdout": settings.holdout,
        "batch_size": settings.batch_size,
        "optimiser": "sgd, cosine to 0",
        "momentum": settings.momentum,
    }


def row_settings(name: str, settings: Settings) -> dict[str, Any]:
    """Return all that a row of the table depends on but its seed, likewise."""
    scoring = ("n_eval", "eps", "pgd_steps", "fixed_seed")
    return train_settings(name, settings) | {field: getattr(settings, field) for field in scoring}


def score(
    net: Net,
    images: Images,
    fixed: np.ndarray,
    settings: Settings,
    pgd: Any,
    tick: Callable[[], None],
) -> dict[str, Any]:
    """Return the columns of one row, what was counted on the way, and the curves."""
    attacked = partial(
        evaluate.robust, net.apply_fn, net.params, *images, eps=settings.eps, batch_size=1000
    )
    columns, counts = {}, {}
    methods = {
        "adv_loss_sign": perturb.loss_sign,
        "adv_loss": perturb.loss,
        "adv_alpha": perturb.alpha,
        "pgd": pgd,
    }
    clean = evaluate.clean(net.apply_fn, net.params, *images, batch_size=1000)
    transferred = evaluate.clean(net.apply_fn, net.params, images.x + fixed, images.y)
    columns["validation"] = evaluate.accuracy(clean)
    columns["fixed"] = evaluate.accuracy(evaluate.worst_case(clean, transferred))
    for column, method in methods.items():
        outcome = attacked(method)
        columns[column] = evaluate.accuracy(outcome.robust)
        total = evaluate.count(outcome)
        counts[column] = {
            "zero": int(total.zero),
            "nonfinite": int(total.nonfinite),
            "invalid": int(total.invalid),
            "max_norm": float(total.max_norm),
        }
        tick()
    curves: dict[str, list[float]] = {"eps": CURVE}
    for column in ("adv_alpha", "adv_loss", "adv_loss_sign"):
        masks = evaluate.curve(
            net.apply_fn, net.params, *images, methods[column], eps=CURVE, batch_size=1000
        )
        curves[column] = [evaluate.accuracy(mask) for mask in masks]
        tick()
    return {"columns": columns, "counts": counts, "curves": curves}


def run(settings: Settings, console: Console) -> list[report.Row]:
    """Train, attack and score; return the rows of the table."""
    results = settings.out / "results.json"
    settings.out.mkdir(parents=True, exist_ok=True)
    known = report.load_rows(results)
    images, test = load(settings)
    pgd = partial(attack.pgd, norm="l2", steps=settings.pgd_steps)  # one object, one compilation
    rows, digits = [], {}
    with training.bars(console) as progress:
        source = train("normal", settings.fixed_seed, settings, images, progress)
        fixed = evaluate.perturbations(
            source.apply_fn, source.params, *test, perturb.loss, eps=settings.eps
        )
        own = evaluate.clean(source.apply_fn, source.params, test.x + fixed, test.y)
        for seed in settings.seed:
            for name in settings.methods:
                net = train(name, seed, settings, images, progress)
                identity = {
                    "experiment": "mnist_mlp",
                    "network": "x".join(map(str, getattr(settings, name).widths)),
                    "method": name,
                    "seed": seed,
                    "eps": settings.eps,
                    "norm": "l2",
                    "n": len(test.y),
                    "settings": row_settings(name, settings),
                    "versions": report.versions(),
                    "device": report.device(),
                }
                row = next((r for r in known if identity.items() <= r.items()), None)
                if row is None:
                    task = progress.add_task(
                        f"{NAMES[name]}, seed {seed}: attacks", total=7, note=""
                    )
                    tick = partial(progress.advance, task)
                    scores = score(net, test, fixed, settings, pgd, tick)
                    scores["columns"]["fixed_source"] = evaluate.accuracy(own)
                    row = {
                        **identity,
                        **scores,
                        "epochs": getattr(settings, name).epochs,
                        "train_seconds": round(net.fitted.seconds, 1),
                        "history": net.fitted.history,
                    }
                rows.append(row)
                first = seed == settings.seed[0]
                folder = settings.out / name if first else settings.out / name / f"seed_{seed}"
                report.save_params(folder / "params.safetensors", net.params)
                report.save_rows(results, rows)
                if first:
                    digits[NAMES[name]] = _digits(net, test, settings)
    report.plot_curves(settings.out / "accuracy_vs_eps.png", rows, NAMES, settings.eps)
    report.plot_digits(
        settings.out / "adversarial_digits.png", np.asarray(test.x[:8]), digits, np.asarray(test.y)
    )
    return rows


def _digits(net: Net, test: Images, settings: Settings) -> report.Digits:
    """Return r, and the predictions before and after it, for the first eight images."""
    x, y = test.x[:8], test.y[:8]
    r = evaluate.perturbations(net.apply_fn, net.params, x, y, perturb.alpha, eps=settings.eps)
    before, after = (np.asarray(net.apply_fn(net.params, z)).argmax(-1) for z in (x, x + r))
    return report.Digits(r, before, after)


def main() -> None:
    """Run the experiment from the command line."""
    default = Settings()
    if "--quick" in sys.argv:
        short = {
            name: dataclasses.replace(getattr(default, name), epochs=1) for name in default.methods
        }
        short["lwa_rep"] = dataclasses.replace(short["lwa_rep"], warmup=1)
        default = dataclasses.replace(default, n_eval=1000, **short)
    settings = tyro.cli(Settings, default=default, description=__doc__)
    console = Console()
    rows = run(settings, console)

    which = "images held out of the training set" if settings.holdout else "test images"
    title = (
        f"MNIST, two hidden layers: accuracy on {rows[0]['n']:,} {which}, l2 size {settings.eps}"
    )
    notes = [
        f"Fixed is made on a Normal net of seed {settings.fixed_seed}, which itself scores "
        f"{rows[0]['columns']['fixed_source']:.4f} on it.",
        f"PGD: {settings.pgd_steps} steps of l2 PGD on the margin loss, from x; not in the paper. "
        "Nothing is clipped to the pixel range.",
        f"Trained on {60_000 - settings.holdout:,} images; "
        f"seeds {', '.join(map(str, settings.seed))}"
        + (" (mean ± standard deviation)." if len(settings.seed) > 1 else "."),
        f"Training took {sum(row['train_seconds'] for row in rows):.0f} s in all, on "
        f"{rows[0]['device']}, jax {rows[0]['versions']['jax']}.",
    ]
    report.print_table(console, title, rows, NAMES, PAPER)
    for note in notes:
        console.print(note)
    report.write_markdown(settings.out / "results.md", title, rows, NAMES, PAPER, notes)
    console.print(f"Results, figures and weights are in {settings.out}.")


if __name__ == "__main__":
    main()
