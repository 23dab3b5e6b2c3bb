"""Pictures of what perturbations look like, and of what training against them changes.

    python experiments/gallery.py                # all pictures, a few minutes
    python experiments/gallery.py --pictures boundaries

Uses the nets recorded in experiments/results and a few small ones trained on the spot:

- `robust`: four digits on which PGD fools the Normal net, and what PGD does to the LWA net.
- `digits`: adversarial digits for one net, by each method, with their perturbations.
- `gradients`: the direction of steepest loss for nets trained without and with LWA.
- `boundaries`: the decision boundaries of nets between two classes of points in the plane.
- `accuracy`: robust accuracy against size, for one step, PGD, and AutoAttack (from the board).
- `surface`: the margin around an image, for a net that masks its gradients and one that doesn't.
- `saturation`: how a softmax's gradients vanish in float32, and how this library avoids it.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, from anywhere

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from jax.typing import ArrayLike
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.text import Text
from numpy.typing import NDArray
from rich.console import Console

from experiments.lib import figures, models, options, problems, records
from experiments.lib.figures import COLOURS
from experiments.lib.options import Checked, Count, OutputFolder, Seed, Several, Size
from experiments.lib.recipes import NAMES
from experiments.lib.records import RESULTS
from jaxadv import attack, objectives, perturb, train
from jaxadv.types import PerturbFn

Picture = Literal[
    "robust", "digits", "gradients", "boundaries", "accuracy", "surface", "saturation"
]
PICTURES: tuple[Picture, ...] = get_args(Picture)
BOX = (0.0, 1.0)


@dataclasses.dataclass(frozen=True)
class Settings(Checked):
    """Draw the gallery."""

    pictures: Several[Picture] = PICTURES
    """Which pictures to draw."""
    n: Count = 1000
    """Test images for pictures that show rates."""
    eps: Size = 1.5
    """l2 size of the perturbations shown."""
    seed: Seed = 0
    """Random seed."""
    out: OutputFolder = Path("runs/gallery")
    """Where the pictures go."""


def method_of(net: str) -> str:
    """Return a recorded net's name, e.g. `LWA, LeNet`."""
    record, method = net.split("/")
    return f"{NAMES[method]}, {'LeNet' if record == 'mnist_lenet' else 'MLP'}"


def robust(settings: Settings) -> Figure:
    """Draw digits on which PGD fools the Normal net, and what PGD does to the LWA net."""
    pgd = partial(attack.pgd, eps=settings.eps, bounds=BOX)
    perturbed = {}
    for method in ("normal", "lwa"):
        apply_fn, params, images, labels, *_ = problems.recorded(f"mnist_mlp/{method}", 50)
        x = jnp.asarray(images)
        r = pgd(apply_fn, params, x, jnp.asarray(labels))
        answers = (np.asarray(apply_fn(params, at).argmax(-1)) for at in (x, x + r))
        perturbed[method] = figures.Digits(np.asarray(r), *answers)
    normal = perturbed["normal"]
    fooled = np.flatnonzero((normal.before == labels) & (normal.after != labels))
    if not fooled.size:
        raise options.UsageError(
            f"expected PGD to fool the Normal net on one of {len(labels)} digits, got none at size "
            f"{settings.eps:g}; choose a larger --eps"
        )
    _, first = np.unique(labels[fooled], return_index=True)
    chosen = fooled[np.sort(first)[:4]]  # from four classes
    shown = {
        method: figures.Digits(*(values[chosen] for values in found))
        for method, found in perturbed.items()
    }
    figure = _draw_digits(
        settings.out / "robust.json", x[chosen], labels[chosen], shown, settings.eps
    )
    figure.set_size_inches(5.2, 6.9)  # shown at less than half this size on a phone
    for text in figure.findobj(Text):
        text.set_fontsize(13)
    return figure


def digits(settings: Settings) -> Figure:
    """Draw adversarial digits for the recorded Normal net, by each method."""
    problem = problems.recorded("mnist_mlp/normal", 8)
    x, y = jnp.asarray(problem.x), jnp.asarray(problem.y)
    key = jax.random.key(settings.seed)
    eps = settings.eps
    methods: dict[str, Callable[..., jax.Array]] = {
        "Adv_Alpha": partial(perturb.alpha, eps=eps),
        "Adv_Loss": partial(perturb.loss, eps=eps),
        "Adv_Loss\n_Sign": partial(perturb.loss_sign, eps=eps),
        "PGD": partial(attack.pgd, eps=eps),
        "DeepFool": attack.deepfool,
        "FAB": partial(attack.fab, key=key),
        "Square": partial(attack.square, eps=eps, steps=1000, key=key),
    }
    before = problem.apply_fn(problem.params, x).argmax(-1)
    perturbed = {}
    for name, method in methods.items():
        r = method(problem.apply_fn, problem.params, x, y, bounds=BOX)
        after = problem.apply_fn(problem.params, x + r).argmax(-1)
        perturbed[name] = figures.Digits(*map(np.asarray, (r, before, after)))
    return _draw_digits(settings.out / "digits.json", x, y, perturbed, settings.eps)


def _draw_digits(
    path: Path, x: ArrayLike, y: ArrayLike, perturbed: Mapping[str, figures.Digits], eps: float
) -> Figure:
    figures.save_digits(path, x, y, perturbed, eps)
    return figures.plot_digits(json.loads(path.read_text()))


def gradients(settings: Settings) -> Figure:
    """Draw the direction of steepest loss for nets of each kind."""
    nets = (
        "mnist_mlp/normal", "mnist_mlp/lwa", "mnist_mlp/lwa_multi",
        "mnist_lenet/normal", "mnist_lenet/lwa", "mnist_lenet/lwa_multi",
    )  # fmt: skip
    columns = 8
    figure, axes = plt.subplots(
        1 + len(nets), columns, figsize=(1.15 * columns + 1.4, 1.25 * (1 + len(nets))),
        layout="constrained",
    )  # fmt: skip
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    for line, net in enumerate(nets, start=1):
        problem = problems.recorded(net, columns)
        x, y = jnp.asarray(problem.x), jnp.asarray(problem.y)
        r = np.asarray(perturb.loss(problem.apply_fn, problem.params, x, y, eps=1.0))[..., 0]
        for i in range(columns):
            axes[0, i].imshow(problem.x[i, ..., 0], cmap="gray_r", vmin=0, vmax=1)
            limit = float(np.abs(r[i]).max())
            axes[line, i].imshow(r[i], cmap="RdBu_r", vmin=-limit, vmax=limit)
        axes[line, 0].set_ylabel(method_of(net).replace(", ", "\n"), fontsize=8)
    axes[0, 0].set_ylabel("image", fontsize=8)
    return figure


def moons(rng: np.random.Generator, n: int) -> tuple[jax.Array, jax.Array]:
    """Return points `[n, 2]` of two interleaved crescents, and their labels."""
    y = rng.integers(0, 2, n)
    angle = np.pi * rng.random(n) + np.pi * y
    centre = np.stack([y * 1.0, y * 0.5], axis=1)
    x = centre + np.stack([np.cos(angle), np.sin(angle)], axis=1)
    x = x + 0.1 * rng.normal(size=x.shape)
    return jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.int32)


def boundaries(settings: Settings) -> Figure:
    """Train nets on points in the plane, and draw their decision boundaries."""
    rng = np.random.default_rng(settings.seed)
    x, y = moons(rng, 300)
    net = models.Classifier((100, 100), classes=2)
    apply_fn = models.function(net)
    eps = 0.25
    multi = partial(attack.pgd, steps=5)
    kinds = {
        "Normal": objectives.natural(apply_fn),
        f"LWA, c = {eps}": objectives.adversarial(apply_fn, perturb.loss, eps=eps),
        f"LWA, 5 steps, c = {eps}": objectives.adversarial(apply_fn, multi, eps=eps),
    }
    figure, panels = plt.subplots(
        1, len(kinds), figsize=(4 * len(kinds), 3.4), sharey=True, layout="constrained"
    )
    horizontal, vertical = np.meshgrid(np.linspace(-1.6, 2.6, 200), np.linspace(-1.1, 1.6, 150))
    points = jnp.asarray(np.stack([horizontal.ravel(), vertical.ravel()], axis=1), jnp.float32)
    tx = optax.adam(3e-3)
    order = jnp.stack([jnp.asarray(rng.permutation(len(x))) for _ in range(1500)])
    for panel, (name, objective) in zip(panels, kinds.items(), strict=True):
        key = jax.random.key(settings.seed)
        state = train.init(models.init(net, key, x[:1]), tx, key=key)
        state, _ = train.make_epoch(objective, tx)(state, (x, y), order)
        logits = np.asarray(apply_fn(state.params, points))
        lead = (logits[:, 1] - logits[:, 0]).reshape(horizontal.shape)
        panel.contourf(
            horizontal, vertical, np.clip(lead, -8, 8), levels=np.linspace(-8, 8, 17),
            cmap="RdBu_r", alpha=0.6,
        )  # fmt: skip
        panel.contour(horizontal, vertical, lead, levels=[0.0], colors="black", linewidths=1.4)
        distance = np.linalg.norm(attack.deepfool(apply_fn, state.params, x, y), axis=1)
        right = np.asarray(apply_fn(state.params, x).argmax(-1) == y)
        for label, colour in enumerate((COLOURS[0], COLOURS[3])):
            points_of = np.asarray(x)[np.asarray(y) == label].T
            panel.scatter(*points_of, s=9, color=colour, edgecolors="black", linewidths=0.3)
        panel.set_title(f"{name}\nmean distance to the boundary {distance[right].mean():.2f}")
        panel.set_aspect("equal")
    return figure


def accuracy(settings: Settings) -> Figure:
    """Draw accuracy against size for one step and for PGD, with AutoAttack's points."""
    nets = ("mnist_mlp/normal", "mnist_mlp/lwa", "mnist_lenet/lwa", "mnist_lenet/lwa_multi")
    sizes = np.linspace(0, 3, 13)
    attacked = records.load(RESULTS / "board" / "results.json", records.AttackRow)
    figure, panel = plt.subplots(figsize=(6.4, 5.4), layout="constrained")
    for index, net in enumerate(nets):
        problem = problems.recorded(net, settings.n)
        x, y = jnp.asarray(problem.x), jnp.asarray(problem.y)
        clean = problem.correct(x)
        methods: Mapping[str, tuple[PerturbFn, str]] = {
            "one step": (perturb.loss, "--"),
            "PGD, 40 steps": (partial(attack.pgd, steps=40), "-"),
        }
        for name, (method, style) in methods.items():
            perturbed = jax.jit(partial(method, problem.apply_fn, bounds=BOX))
            left = []
            for eps in sizes:
                r = perturbed(problem.params, x, y, eps=eps)
                left.append(float((clean & problem.correct(x + r)).mean()))
            panel.plot(sizes, left, style, color=COLOURS[index], label=f"{method_of(net)}: {name}")
        ensemble = net, "l2", "standard", settings.n  # on the same images
        points = {
            row.eps: row.columns["robust"]
            for row in attacked
            if isinstance(row, records.RobustRow)
            and (row.method, row.norm, row.attack, row.n) == ensemble
        }
        if points:
            panel.plot(
                *zip(*sorted(points.items()), strict=True), figures.MARKERS[index],
                color=COLOURS[index], label=f"{method_of(net)}: AutoAttack",
            )  # fmt: skip
    panel.set(
        xlabel="l2 size, in the pixel range", ylabel=f"accuracy, {settings.n:,} test images",
        ylim=(0, 1),
    )  # fmt: skip
    figure.legend(loc="outside lower center", ncols=2, fontsize=8)
    panel.grid(alpha=0.3)
    return figure


def surface(settings: Settings) -> Figure:
    """Draw the margin around an image on which one step fails and PGD succeeds."""
    nets = ("mnist_lenet/lwa", "mnist_lenet/lwa_multi")
    figure, panels = plt.subplots(
        1, len(nets), figsize=(5.4 * len(nets), 4.6), layout="constrained"
    )
    share = np.linspace(-0.5, 1.25, 41)
    for panel, net in zip(panels, nets, strict=True):
        problem = problems.recorded(net, settings.n)
        x, y = jnp.asarray(problem.x), jnp.asarray(problem.y)
        one = perturb.loss(problem.apply_fn, problem.params, x, y, eps=settings.eps)
        many = attack.pgd(problem.apply_fn, problem.params, x, y, eps=settings.eps)
        missed = np.flatnonzero(problem.correct(x + one) & ~problem.correct(x + many))
        if not missed.size:
            raise options.UsageError(
                f"expected an image on which one step fails and PGD succeeds, got none among "
                f"{settings.n} for {net}; raise --n"
            )
        i = int(missed[0])
        u, v = (np.asarray(r[i], np.float64).ravel() for r in (one, many))
        across = v - u * (u @ v) / (u @ u)
        across *= settings.eps / np.linalg.norm(across)
        places = share[:, None, None] * across + share[None, :, None] * u
        at = problem.x[i].ravel() + places.reshape(-1, u.size)
        logits = np.asarray(
            problem.apply_fn(problem.params, jnp.asarray(at.reshape(-1, 28, 28, 1), jnp.float32))
        )
        label = int(problem.y[i])
        others = np.delete(logits, label, axis=1).max(1)
        lead = (logits[:, label] - others).reshape(len(share), len(share))
        scale = settings.eps * share
        limit = float(np.abs(lead).max())
        shown = panel.contourf(
            scale, scale, lead, levels=np.linspace(-limit, limit, 25), cmap="RdBu"
        )
        panel.contour(scale, scale, lead, levels=[0.0], colors="black", linewidths=1.4)
        figure.colorbar(shown, ax=panel, label="logit of the label less the greatest other")
        panel.plot(0, 0, "o", color="black", label="image")
        panel.plot(settings.eps, 0, "s", color=COLOURS[1], label="after one step")
        along = u @ v / np.linalg.norm(u)
        panel.plot(
            along, np.sqrt(max(v @ v - along**2, 0)), "^", color=COLOURS[2], label="after PGD"
        )
        panel.set(
            title=f"{method_of(net)}: PGD finds what\none step misses on {len(missed)} of {len(x)}",
            xlabel="along the gradient (l2)",
            ylabel="across it, towards PGD's point (l2)",
            aspect="equal",
        )
        panel.legend(fontsize=8, loc="lower right")
    return figure


def exact_direction(problem: problems.Problem, scale: float) -> NDArray[np.float64]:
    """Return a dense net's unit margin gradients `[n, 784]`, in float64, with scaled logits."""
    layers = problem.params["params"]
    names = [*sorted(name for name in layers if name != "logits"), "logits"]
    weights = [np.asarray(layers[name]["kernel"], np.float64) for name in names]
    h, active = problem.x.reshape(len(problem.x), -1).astype(np.float64), []
    for name, weight in zip(names[:-1], weights[:-1], strict=True):
        h = h @ weight + np.asarray(layers[name]["bias"], np.float64)
        active.append(h > 0)
        h = np.maximum(h, 0)
    logits = scale * (h @ weights[-1] + np.asarray(layers["logits"]["bias"], np.float64))
    of_label = np.eye(logits.shape[1])[problem.y]
    others = np.where(of_label > 0, -np.inf, logits)
    likely = np.exp(others - others.max(1, keepdims=True))
    g = (likely / likely.sum(1, keepdims=True) - of_label) @ weights[-1].T
    for mask, weight in zip(reversed(active), reversed(weights[:-1]), strict=True):
        g = (g * mask) @ weight.T
    return g / np.linalg.norm(g, axis=1, keepdims=True)


def saturation(settings: Settings) -> Figure:
    """Draw how well the gradient's direction survives as a net's confidence grows."""
    problem = problems.recorded("mnist_mlp/normal", settings.n)
    x, y = jnp.asarray(problem.x), jnp.asarray(problem.y)
    scales = np.geomspace(0.1, 1000, 17)

    @jax.jit
    def cross_entropy_gradient(scale: jax.Array) -> jax.Array:
        def total(x: jax.Array) -> jax.Array:
            logits = scale * problem.apply_fn(problem.params, x)
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).sum()

        return jax.grad(total)(x)

    def scaled(params: Any, x: jax.Array, /) -> jax.Array:
        weights, scale = params
        return scale * problem.apply_fn(weights, x)

    ours = jax.jit(partial(perturb.loss, scaled, eps=1.0))
    kinds: dict[str, Callable[[Any], Any]] = {
        "gradient of the cross-entropy, float32": cross_entropy_gradient,
        "jaxadv.perturb.loss, float32": lambda scale: ours((problem.params, scale), x, y),
    }
    figure, (cosine, dead) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for index, (name, gradient) in enumerate(kinds.items()):
        similar, zero = [], []
        for scale in scales:
            g = np.asarray(gradient(jnp.float32(scale)), np.float64).reshape(len(x), -1)
            size = np.linalg.norm(g, axis=1)
            alive = size > 0
            unit = g / np.where(alive, size, 1)[:, None]
            similar.append((unit * exact_direction(problem, float(scale))).sum(1).mean())
            zero.append(1 - alive.mean())
        colour, marker = COLOURS[3 if index == 0 else 0], figures.MARKERS[index]
        for panel, values in ((cosine, similar), (dead, zero)):
            panel.plot(scales, values, color=colour, marker=marker, label=name, markersize=4)
    cosine.set_ylabel("mean cosine to the float64 direction")
    dead.set_ylabel("share exactly 0")
    for panel in (cosine, dead):
        panel.set(xscale="log", xlabel="logits multiplied by", ylim=(-0.03, 1.03))
        panel.grid(alpha=0.3)
    dead.legend(fontsize=8, loc="center right")
    return figure


DRAW: Mapping[Picture, Callable[[Settings], Figure]] = {
    "robust": robust,
    "digits": digits,
    "gradients": gradients,
    "boundaries": boundaries,
    "accuracy": accuracy,
    "surface": surface,
    "saturation": saturation,
}


def run(settings: Settings, console: Console) -> None:
    """Draw the chosen pictures."""
    settings.out.mkdir(parents=True, exist_ok=True)
    for name in settings.pictures:
        console.print(str(figures.save(DRAW[name](settings), settings.out / f"{name}.png")))


@options.command
def main() -> None:
    """Run from the command line."""
    run(tyro.cli(Settings, description=__doc__), Console())


if __name__ == "__main__":
    main()
