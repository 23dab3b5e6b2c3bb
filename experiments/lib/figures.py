"""Every figure of the results, drawn from nothing but their JSON files.

`draw` draws whatever a folder's results allow: accuracy and learning curves for every table,
Figures 1 and 2 of the paper if there are LeNets among the rows, and adversarial digits.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jax.typing import ArrayLike
from matplotlib import pyplot as plt
from matplotlib import ticker
from matplotlib.axes import Axes
from numpy.typing import NDArray
from PIL import Image

from experiments.lib import cache, options, records, tables, train_and_score
from experiments.lib.attacks import LABELS
from experiments.lib.recipes import NAMES
from experiments.lib.records import BenchmarkRow, CertifyRow, CurveRow, PropositionRow, TableRow

COLOURS = (  # Okabe, Ito
    "#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#000000",
)  # fmt: skip
MARKERS = "osD^vPX"
SIZE = "l2 size of the perturbation"
CURVES = ("adv_alpha", "adv_loss", "adv_loss_sign")

AUTHORS_EPS = (0.4, 0.8, 1.0, 1.2, 1.6, 2.0, 3.0, 3.8)
AUTHORS_CURVES = {  # of the authors' notebook Efficiency.ipynb, which Figure 1 was drawn from
    "adv_loss_sign": (0.9754, 0.9383, 0.9121, 0.8729, 0.7685, 0.6372, 0.3326, 0.1900),
    "adv_loss": (0.9555, 0.8540, 0.7692, 0.6736, 0.4662, 0.3117, 0.1281, 0.0678),
    "adv_alpha": (0.9545, 0.8499, 0.7618, 0.6604, 0.4502, 0.3005, 0.1211, 0.0684),
}


def draw(folder: Path) -> list[Path]:
    """Draw all figures of a folder's results.

    Args:
      folder: contains `results.json`, and perhaps `digits.json`; figures are written to it.

    Returns:
      The files written.

    Raises:
      UsageError: if there are no results.
    """
    results = folder / "results.json"
    content = records.read(results)
    if not content:
        raise options.UsageError(f"expected rows in {results}, got none; run the experiment first")
    figures: dict[str, Any] = {}
    if "curves" in content[0]:  # the last run's first net, and the rest of its table
        last = records.load(results, TableRow)[:1]
        figures = _plot_table(train_and_score.record(folder, last))
    elif content[0].get("experiment") == "benchmark":
        parts = {row.part: row.figures for row in records.load(results, BenchmarkRow)}
        for part, plot in (("attacks", plot_speeds), ("growth", plot_growth)):
            if part in parts:
                figures[f"{part}.png"] = plot(parts[part])
    elif content[0].get("experiment") == "curve":
        figures["curve.png"] = plot_distances(records.load(results, CurveRow))
    elif content[0].get("experiment") == "certify":
        figures["certify.png"] = plot_sandwich(records.load(results, CertifyRow))
    elif content[0].get("experiment") == "logistic":
        figures["appendix_a.png"] = plot_appendix_a(records.load(results, PropositionRow))
    written = [save(figure, folder / name) for name, figure in figures.items()]
    digits = folder / "digits.json"
    if digits.exists():
        figure = plot_digits(json.loads(digits.read_text()))
        written.append(save(figure, folder / "adversarial_digits.png"))
    return written


def _plot_table(rows: Sequence[TableRow]) -> dict[str, Any]:
    """Return the figures of a table's rows, by file name."""
    if rows[0].groups is not None:
        return {"ablations.png": plot_groups(rows)}
    figures = {"accuracy_vs_eps.png": plot_curves(rows)}
    watched = _watched_alike(rows)
    if watched and "validation" in watched[0].history[0]:  # older records lack it
        figures["learning_curves.png"] = plot_learning(watched)
    if rows[0].experiment == "mnist_lenet":
        if "normal" in _methods(rows):
            figures["figure_1.png"] = plot_figure_1(rows)
        if {"normal", "lwa"} <= set(_methods(watched)):
            figures["figure_2.png"] = plot_figure_2(watched)
    return figures


def draw_history(folder: Path, history: Sequence[Mapping[str, float]], scored: str) -> Path:
    """Draw the loss and the accuracies after each epoch of a training run.

    Args:
      folder: where to write `history.png`.
      history: for each epoch, loss and accuracy in training, and `test` and `one_step` accuracy.
      scored: what the images of these two are called.

    Returns:
      The file written.
    """
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    epochs = np.arange(1, len(history) + 1)
    labels = {
        "accuracy": "training, as perturbed",
        "test": scored,
        "one_step": f"{scored}, one step",
    }
    _line(panels[0], epochs, np.array([entry["loss"] for entry in history], float), 0, "loss")
    for index, (column, label) in enumerate(labels.items()):
        _line(panels[1], epochs, np.array([entry[column] for entry in history]), index, label)
    _dress(panels[0], title="loss", xlabel="epoch")
    _dress(panels[1], legend=True, title="accuracy", xlabel="epoch", ylim=(0, 1))
    return save(figure, folder / "history.png")


def plot_curves(rows: Sequence[TableRow]) -> Any:
    """Plot accuracy against l2 size, with a panel for each perturbation."""
    figure, panels = plt.subplots(1, 3, figsize=(11, 3.6), sharey=True, layout="constrained")
    for panel, column in zip(panels, CURVES, strict=True):
        for index, method in enumerate(_methods(rows)):
            eps, mean = _curve(rows, method, column)
            _line(panel, eps, mean, index, NAMES.get(method, method))
        panel.axvline(rows[0].eps, color="0.6", linewidth=0.8, linestyle=":")
        _dress(
            panel, legend=panel is panels[0], title=tables.LABELS[column], xlabel=SIZE,
            ylim=(0, 1),
        )  # fmt: skip
    panels[0].set_ylabel("accuracy")
    return figure


def plot_learning(rows: Sequence[TableRow]) -> Any:
    """Plot accuracies after each epoch, without and with Adv_Loss, with a line for each method."""
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    titles = {"validation": "Validation", "adv_loss": f"Adv_Loss, l2 size {_watched(rows)}"}
    for panel, (column, title) in zip(panels, titles.items(), strict=True):
        for index, method in enumerate(_methods(rows)):
            _learning(panel, rows, method, column, index, NAMES.get(method, method))
        _dress(
            panel, legend=panel is panels[0], title=title, xlabel="epoch", ylabel="accuracy"
        )  # fmt: skip
    panels[1].set_ylim(0, 1)
    return figure


def plot_groups(rows: Sequence[TableRow]) -> Any:
    """Plot accuracy against the l2 size of Adv_Loss, with a panel for each question."""
    groups = list(dict.fromkeys(group for row in rows for group in row.groups or ()))
    figure, panels = plt.subplots(
        1, len(groups), figsize=(4 * len(groups), 3.8), sharey=True, layout="constrained",
        squeeze=False,
    )  # fmt: skip
    for panel, group in zip(panels[0], groups, strict=True):
        labels = {
            row.method: row.groups[group] for row in rows if row.groups and group in row.groups
        }
        for index, (method, label) in enumerate(labels.items()):
            eps, mean = _curve(rows, method, "adv_loss")
            _line(panel, eps, mean, index, label)
        panel.axvline(rows[0].eps, color="0.6", linewidth=0.8, linestyle=":")
        _dress(panel, legend=True, title=group, xlabel="l2 size of Adv_Loss", ylim=(0, 1))
    panels[0, 0].set_ylabel("accuracy")
    return figure


def plot_figure_1(rows: Sequence[TableRow]) -> Any:
    """Plot the paper's Figure 1: the Normal LeNet under three perturbations of growing size."""
    figure, panel = plt.subplots(figsize=(5.6, 4), layout="constrained")
    for index, column in enumerate(CURVES):
        eps, mean = _curve(rows, "normal", column)
        _line(panel, eps, mean, index, tables.LABELS[column])
        panel.plot(
            AUTHORS_EPS, AUTHORS_CURVES[column], color=COLOURS[index], linestyle="--", linewidth=1.2
        )
    panel.plot([], [], color="0.4", linestyle="--", linewidth=1.2, label="the authors' notebook")
    _dress(
        panel, legend=True, title=f"Figure 1: Normal LeNet, {_which(rows)}", xlabel=SIZE,
        ylabel="accuracy", xlim=(0, 4), ylim=(0, 1),
    )  # fmt: skip
    return figure


def plot_figure_2(rows: Sequence[TableRow]) -> Any:
    """Plot the paper's Figure 2: Normal and LWA LeNets, against size and over training."""
    figure, (sizes, epochs) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for index, column in enumerate(CURVES):
        for method, style in (("normal", "--"), ("lwa", "-")):
            eps, mean = _curve(rows, method, column)
            label = f"{NAMES[method]}, {tables.LABELS[column]}"
            _line(sizes, eps, mean, index, label, linestyle=style)
    titles = {"validation": "Validation", "adv_loss": f"Adv_Loss, {_watched(rows)}"}
    for index, (column, title) in enumerate(titles.items()):
        for method, style in (("normal", "--"), ("lwa", "-")):
            label = f"{NAMES[method]}, {title}"
            _learning(epochs, rows, method, column, index, label, linestyle=style)
    _dress(
        sizes, title=f"Figure 2: LeNets, {_which(rows)}", xlabel=SIZE, ylabel="accuracy",
        xlim=(0, 4), ylim=(0, 1),
    )  # fmt: skip
    _dress(epochs, title="over training", xlabel="epoch", ylabel="accuracy", ylim=(0, 1))
    for panel in (sizes, epochs):
        panel.legend(frameon=False, fontsize=8, handlelength=4)
    return figure


def plot_appendix_a(rows: Sequence[PropositionRow]) -> Any:
    """Plot the propositions of Appendix A: convexity, the regulariser, growth of solutions."""
    series = {row.proposition: row.series for row in rows}
    figure, panels = plt.subplots(1, 4, figsize=(15, 3.8), layout="constrained")
    b, c, d = series["B"], series["C"], series["D"]
    for index, (norm, along) in enumerate(b["objective"].items()):
        _line(panels[0], b["t"], np.asarray(along) / max(along), index, norm)
    panels[1].plot(c["w"], c["induced"], color=COLOURS[0], linewidth=1.6, label="corrected")
    panels[1].plot(
        c["w"], c["printed"], color=COLOURS[3], linestyle="--", linewidth=1.2, label="as printed"
    )
    for index, ratio in enumerate(d["norm"]):
        for panel, key in zip(panels[2:], ("norm", "objective"), strict=True):
            label = f"c = {ratio} margin / 2"
            style = "-" if float(ratio) > 1 else "--"
            _line(panel, d["steps"], d[key][ratio], index, label, linestyle=style)
    _dress(
        panels[0], legend=True, title="B: the objective is convex", ylim=(0, None),
        xlabel="position on a random segment of w", ylabel="objective / its maximum",
    )  # fmt: skip
    _dress(
        panels[1], legend=True, title="C: the induced regulariser isn't", xlabel="w",
        ylabel="R(w)", ylim=(-1, 2.5),
    )  # fmt: skip
    for panel, name in zip(panels[2:], ("||w||", "objective"), strict=True):
        _dress(
            panel, legend=name == "||w||", title=f"D: {name} in training", xscale="log",
            yscale="log", xlabel="steps of L-BFGS", ylabel=name,
        )  # fmt: skip
    return figure


def plot_distances(rows: Sequence[CurveRow]) -> Any:
    """Plot accuracy against size from the smallest perturbations, with markers for attacks."""
    kinds = list(dict.fromkeys((row.data, row.norm) for row in rows))
    figure, panels = plt.subplots(
        1, len(kinds), figsize=(4.8 * len(kinds), 3.6), layout="constrained", squeeze=False
    )
    for panel, (source, norm) in zip(panels[0], kinds, strict=True):
        here = [row for row in rows if (row.data, row.norm) == (source, norm)]
        attacks = dict.fromkeys(name for row in here for name in row.attacks)
        markers = {name: MARKERS[i % len(MARKERS)] for i, name in enumerate(attacks)}
        for index, row in enumerate(here):
            colour = COLOURS[index % len(COLOURS)]
            panel.plot(row.curve["eps"], row.curve["accuracy"], color=colour, label=row.method)
            for name, figures in row.attacks.items():
                panel.plot(
                    list(map(float, figures)), list(figures.values()), markers[name],
                    color=colour,
                )  # fmt: skip
        for name, marker in markers.items():
            panel.plot([], [], marker, color="0.4", label=LABELS[name])
        _dress(panel, legend=True, xlabel=f"{norm} size", ylabel="accuracy", title=source)
    return figure


def draw_worst(
    path: Path,
    x: NDArray[np.float32],
    r: NDArray[np.float32],
    size: Sequence[float],
    names: Sequence[tuple[str, str]],
) -> Path:
    """Draw images, the perturbations that fool a net on them, and the perturbed images.

    Args:
      path: file to write.
      x: images `[n, H, W, C]`, with pixels in 0..1.
      r: perturbations of the same shape; drawn around grey, scaled to full contrast.
      size: sizes of the perturbations.
      names: for each image its class, and the net's answer on the perturbed image.

    Returns:
      The file written.
    """
    largest = np.abs(r).max(axis=(1, 2, 3), keepdims=True)
    grey = 0.5 + r / np.maximum(2 * largest, 1e-12)
    rows = {"image": x, "r, magnified": grey, "image + r": x + r}
    figure, axes = plt.subplots(
        3, len(x), figsize=(1.5 * len(x) + 0.4, 5.2), layout="constrained", squeeze=False
    )
    for panels, (label, images) in zip(axes, rows.items(), strict=True):
        panels[0].set_ylabel(label, fontsize=8)
        for panel, image in zip(panels, images, strict=True):
            shown = np.clip(image if x.shape[-1] == 3 else image[..., 0], 0, 1)
            panel.imshow(shown, cmap="gray", vmin=0, vmax=1)
            panel.set(xticks=[], yticks=[])
    for i, (label, answer) in enumerate(names):
        titles = _short(label), f"size {size[i]:.3g}", _short(answer)
        for panel, title in zip(axes[:, i], titles, strict=True):
            panel.set_title(title, fontsize=8, parse_math=False)  # a class may be called $x$
    return save(figure, path)


def _short(name: str) -> str:
    return name if len(name) <= 20 else f"{name[:19]}…"


def plot_sandwich(rows: Sequence[CertifyRow]) -> Any:
    """Plot each smoothed classifier's certified and attacked accuracy, and the band between."""
    figure, panels = plt.subplots(
        1, len(rows), figsize=(4.2 * len(rows), 3.6), sharey=True, layout="constrained",
        squeeze=False,
    )  # fmt: skip
    for panel, row in zip(panels[0], rows, strict=True):
        eps, certified = map(np.asarray, (row.curve["eps"], row.curve["certified"]))
        attacked = {
            float(name.removeprefix("attacked@")): accuracy
            for name, accuracy in row.columns.items()
            if name.startswith("attacked@")
        }
        sizes = np.array(sorted(attacked))
        left = np.array([attacked[size] for size in sizes])
        # An image broken at one size is broken at larger ones, but not always at smaller ones.
        known = eps >= sizes[0]
        upper = left[np.searchsorted(sizes, eps[known], side="right") - 1]
        panel.fill_between(eps[known], certified[known], upper, color=COLOURS[0], alpha=0.2, lw=0)
        panel.plot(eps, certified, color=COLOURS[0], label="certified")
        panel.plot(sizes, left, "o", color=COLOURS[3], label="attacked")
        title = f"{row.method}, sigma {row.sigma:g}, seed {row.seed}"
        _dress(panel, legend=True, xlabel="l2 size", ylim=(0, 1), title=title)
    panels[0, 0].set_ylabel("accuracy")
    return figure


def plot_speeds(speeds: Sequence[dict[str, Any]]) -> Any:
    """Plot how many images per second each library perturbs, for attacks that several have."""
    nets = list(dict.fromkeys(speed["net"] for speed in speeds))
    libraries = list(dict.fromkeys(speed["library"] for speed in speeds))
    compared = {speed["method"] for speed in speeds if speed["library"] != "jaxadv"}
    width = 0.8 / len(libraries)
    figure, panels = plt.subplots(
        1, len(nets), figsize=(5 * len(nets), 3.6), squeeze=False, layout="constrained"
    )
    for panel, net in zip(panels[0], nets, strict=True):
        ours = [speed for speed in speeds if speed["net"] == net]
        methods = list(dict.fromkeys(s["method"] for s in ours))
        methods = [method for method in methods if method in compared or not compared]
        for index, library in enumerate(libraries):
            heights = {s["method"]: s["images a second"] for s in ours if s["library"] == library}
            shift = (index - (len(libraries) - 1) / 2) * width
            bars = {i + shift: heights[m] for i, m in enumerate(methods) if m in heights}
            panel.bar(list(bars), list(bars.values()), width, color=COLOURS[index], label=library)
        panel.set(yscale="log", ylabel="images a second", title=net)
        panel.set_xticks(range(len(methods)), methods, rotation=0 if compared else 90)
    panels[0][0].legend(fontsize=8)
    return figure


def plot_growth(points: Sequence[dict[str, Any]]) -> Any:
    """Plot time per image and working memory as batches, classes, steps and images grow."""
    kinds = list(dict.fromkeys(point["what grows"] for point in points))
    figure, panels = plt.subplots(
        2, len(kinds), figsize=(4 * len(kinds), 6.5), sharex="col", squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for column, kind in enumerate(kinds):
        here = [point for point in points if point["what grows"] == kind]
        lines = dict.fromkeys((point["net"], point["method"]) for point in here)
        for panel, unit in zip(panels[:, column], ("µs an image", "MB"), strict=True):
            for index, (net, method) in enumerate(lines):
                line = [p for p in here if (p["net"], p["method"]) == (net, method)]
                line = [p for p in line if p.get(unit)]  # a log axis has no 0
                x, y = [p["to"] for p in line], [p[unit] for p in line]
                _line(panel, x, y, index, f"{net}: {method}")
            panel.set(xscale="log", yscale="log", ylabel=unit if column == 0 else "")
            panel.yaxis.set_minor_formatter(ticker.NullFormatter())
        ticks = sorted({point["to"] for point in here})
        panels[1, column].set_xticks([], minor=True)
        panels[1, column].set_xticks(ticks, [f"{tick:,}" for tick in ticks], fontsize=8)
        panels[1, column].set_xlabel(kind)
        # Above the panel, where it covers no line.
        panels[0, column].legend(fontsize=7, loc="lower left", bbox_to_anchor=(0, 1), frameon=False)
    return figure


class Digits(NamedTuple):
    """One method's perturbations of some images, and the net's predictions before and after."""

    r: np.ndarray  # [n, 28, 28, 1]
    before: np.ndarray  # [n]
    after: np.ndarray  # [n]


def save_digits(
    path: Path, images: ArrayLike, labels: ArrayLike, perturbed: Mapping[str, Digits], eps: float
) -> None:
    """Write images and each method's perturbations of them, with pixels in thousandths.

    Perturbations of the same images and size by other methods stay in the file.
    """

    def thousandths(pixels: Any) -> Any:
        return np.rint(1000 * np.asarray(pixels)).astype(int).tolist()

    shown = {"images": thousandths(images), "labels": np.asarray(labels).tolist(), "eps": eps}
    new = {
        name: {
            "r": thousandths(digits.r),
            "before": digits.before.tolist(),
            "after": digits.after.tolist(),
        }
        for name, digits in perturbed.items()
    }
    old = json.loads(path.read_text()) if path.exists() else {}
    kept = old["perturbed"] if shown.items() <= old.items() else {}
    content = {**shown, "perturbed": {**kept, **new}}
    with cache.replacing(path) as file:
        file.write((json.dumps(content, separators=(",", ":")) + "\n").encode())


def plot_digits(content: dict[str, Any]) -> Any:
    """Plot clean digits, and each method's perturbations and adversarial digits with predictions.

    Args:
      content: what `save_digits` wrote.
    """
    images = np.asarray(content["images"])[..., 0] / 1000
    labels, perturbed = content["labels"], content["perturbed"]
    rs = {name: np.asarray(digits["r"])[..., 0] / 1000 for name, digits in perturbed.items()}
    lines = 1 + 2 * len(perturbed)
    figure, axes = plt.subplots(
        lines, len(images), figsize=(1.15 * len(images) + 1.6, 1.3 * lines),
        layout="constrained", squeeze=False,
    )  # fmt: skip
    limit = max(float(np.abs(r).max()) for r in rs.values())
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    grey: dict[str, Any] = {"cmap": "gray_r", "vmin": 0, "vmax": 1}
    for i, image in enumerate(images):
        axes[0, i].imshow(image, **grey)
        axes[0, i].set_title(f"label {labels[i]}", fontsize=8)
        for j, (name, r) in enumerate(rs.items()):
            before, after = perturbed[name]["before"][i], perturbed[name]["after"][i]
            axes[1 + 2 * j, i].imshow(r[i], cmap="RdBu_r", vmin=-limit, vmax=limit)
            axis = axes[2 + 2 * j, i]
            axis.imshow(image + r[i], **grey)
            colour = COLOURS[3] if after != labels[i] else "black"
            axis.set_title(f"{before} → {after}", fontsize=8, color=colour)
    axes[0, 0].set_ylabel("clean", fontsize=8)
    for j, name in enumerate(rs):
        axes[1 + 2 * j, 0].set_ylabel(f"{NAMES.get(name, name)}\nr", fontsize=8)
        axes[2 + 2 * j, 0].set_ylabel("x + r", fontsize=8)
    return figure


def _which(rows: Sequence[TableRow]) -> str:
    kind = "held-out" if rows[0].settings["holdout"] else "test"
    return f"{rows[0].n:,} {kind} images"


def _watched(rows: Sequence[TableRow]) -> str:
    """Return the size of the perturbations after each epoch; raise an error if it varies."""
    sizes = {epoch["watched_eps"] for row in rows for epoch in row.history}
    if len(sizes) > 1:
        raise ValueError(
            f"expected histories at a single l2 size, got {sorted(sizes)}; draw each run by itself"
        )
    return f"{sizes.pop():g}"


def _watched_alike(rows: Sequence[TableRow]) -> list[TableRow]:
    """Return the rows whose history was recorded at the same size as the last run's."""
    size = rows[0].history[-1].get("watched_eps")
    return [row for row in rows if {e.get("watched_eps") for e in row.history} == {size}]


def _methods(rows: Sequence[TableRow]) -> list[str]:
    return list(dict.fromkeys(row.method for row in rows))


def _of(rows: Sequence[TableRow], method: str) -> list[TableRow]:
    """Return a row per seed of a method; curves and history don't depend on the row's size."""
    by_seed = {row.seed: row for row in reversed(rows) if row.method == method}
    return list(reversed(by_seed.values()))


def _curve(rows: Sequence[TableRow], method: str, column: str) -> tuple[Any, Any]:
    first, *others = (row.curves for row in _of(rows, method))
    same = [first, *(curve for curve in others if curve["eps"] == first["eps"])]
    return first["eps"], np.mean([curve[column] for curve in same], axis=0)


def _line(panel: Axes, x: Any, y: Any, index: int, label: str, **style: Any) -> None:
    i = index % len(COLOURS)
    panel.plot(
        x, y, color=COLOURS[i], label=label, linewidth=1.6, marker=MARKERS[i],
        markevery=max(1, len(x) // 5), markersize=4, **style,
    )  # fmt: skip


def _learning(
    panel: Axes, rows: Sequence[TableRow], method: str, column: str, index: int, label: str,
    **style: Any,
) -> None:  # fmt: skip
    mean = np.mean([[e[column] for e in row.history] for row in _of(rows, method)], axis=0)
    _line(panel, range(1, len(mean) + 1), mean, index, label, **style)


def _dress(panel: Axes, *, legend: bool = False, **labels: Any) -> None:
    panel.set(**labels)
    panel.grid(alpha=0.3)
    if legend:
        panel.legend(frameon=False, fontsize=8)


def save(figure: Any, path: Path) -> Path:
    """Write a figure in 256 colours, which takes a third of the space."""
    with io.BytesIO() as full:
        figure.savefig(full, dpi=140, format="png")
        Image.open(full).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(
            path, optimize=True
        )
    plt.close(figure)
    return path
