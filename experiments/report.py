"""What a run leaves behind: results.json, a table beside the paper's, figures, weights.

The JSON is a list of rows, one per method and seed, and the source of everything else here: tables
and the curves can be drawn again from it alone.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from safetensors.numpy import save_file

__all__ = [
    "LABELS",
    "Digits",
    "device",
    "load_rows",
    "mean_and_spread",
    "plot_curves",
    "plot_digits",
    "print_table",
    "save_params",
    "save_rows",
    "versions",
    "write_markdown",
]

Row = dict[str, Any]


class Digits(NamedTuple):
    """One method's perturbations of some images, and the predictions before and after."""

    r: np.ndarray  # [n, 28, 28, 1]
    before: np.ndarray  # [n]
    after: np.ndarray  # [n]


LABELS = {
    "validation": "Validation",
    "fixed": "Fixed",
    "adv_loss_sign": "Adv_Loss_Sign",
    "adv_loss": "Adv_Loss",
    "adv_alpha": "Adv_Alpha",
    "pgd": "PGD",
}
_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7")  # Okabe and Ito's
_MARKERS = "osD^v"


def versions() -> dict[str, str]:
    """Return the versions that a result depends on."""
    packages = ("jaxadv", "jax", "jaxlib", "flax", "optax", "numpy")
    return {"python": platform.python_version()} | {name: version(name) for name in packages}


def device() -> str:
    """Return the kind and number of devices, e.g. `cpu x1 (2 cores)`."""
    first = jax.devices()[0]
    kind = first.device_kind if first.platform != "cpu" else "cpu"
    cores = f" ({os.cpu_count()} cores)" if first.platform == "cpu" else ""
    return f"{kind} x{jax.device_count()}{cores}"


def load_rows(path: Path) -> list[Row]:
    """Return the rows written so far; none if there is no such file.

    Raises:
      ValueError: if the file isn't a list of rows.
    """
    if not path.exists():
        return []
    try:
        rows = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"expected JSON in {path}, got {error}; delete the file") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"expected a list of rows in {path}, got something else; delete the file")
    return rows


def save_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write the rows, whole or not at all."""
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(rows, indent=1) + "\n")
    os.replace(unfinished, path)


def save_params(path: Path, params: Any) -> None:
    """Write parameters as safetensors, named by their paths joined by "/"."""
    path.parent.mkdir(parents=True, exist_ok=True)
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    named = {
        jax.tree_util.keystr(keys, simple=True, separator="/"): np.asarray(leaf)
        for keys, leaf in leaves
    }
    unfinished = path.with_suffix(".unfinished")
    save_file(named, unfinished)
    os.replace(unfinished, path)


def mean_and_spread(rows: Sequence[Row], column: str) -> str:
    """Return the mean over seeds, with the standard deviation if there are several."""
    values = [row["columns"][column] for row in rows]
    if len(values) == 1:
        return f"{values[0]:.4f}"
    return f"{np.mean(values):.4f} ± {np.std(values, ddof=1):.4f}"


def _cells(
    rows: Sequence[Row], names: Mapping[str, str], paper: Mapping[str, Mapping[str, float]]
) -> list[list[str]]:
    """Return the table: a row of ours for each method, and the paper's below it."""
    cells = []
    for method, name in names.items():
        ours = [row for row in rows if row["method"] == method]
        if not ours:
            continue
        cells.append([name, *(mean_and_spread(ours, column) for column in LABELS)])
        printed = paper.get(method, {})
        cells.append(
            [
                "  paper",
                *(f"{printed[column]:.3f}" if column in printed else "" for column in LABELS),
            ]
        )
    return cells


def print_table(
    console: Console,
    title: str,
    rows: Sequence[Row],
    names: Mapping[str, str],
    paper: Mapping[str, Mapping[str, float]],
) -> None:
    """Print the table to a terminal."""
    # A terminal of 80 columns has no room for the longest heading in one line.
    headings = (label.replace("Loss_", "Loss\n_") for label in LABELS.values())
    table = Table("Method", *headings, title=title, box=box.SIMPLE, pad_edge=False)
    for line in _cells(rows, names, paper):
        cells = (cell.replace(" ±", "\n±") for cell in line)
        table.add_row(*cells, style="dim" if line[0] == "  paper" else None)
    console.print(table)


def write_markdown(
    path: Path,
    title: str,
    rows: Sequence[Row],
    names: Mapping[str, str],
    paper: Mapping[str, Mapping[str, float]],
    notes: Sequence[str],
) -> None:
    """Write the table and notes as Markdown."""
    lines = [f"# {title}", "", "| Method | " + " | ".join(LABELS.values()) + " |"]
    lines.append("|---|" + "---|" * len(LABELS))
    lines += [
        "| " + " | ".join(cell.strip() for cell in line) + " |"
        for line in _cells(rows, names, paper)
    ]
    lines += ["", *(f"- {note}" for note in notes), ""]
    path.write_text("\n".join(lines))


def plot_curves(path: Path, rows: Sequence[Row], names: Mapping[str, str], eps: float) -> None:
    """Draw accuracy against the l2 size of each perturbation, a panel for each."""
    from matplotlib import pyplot as plt

    columns = ("adv_alpha", "adv_loss", "adv_loss_sign")
    figure, panels = plt.subplots(1, 3, figsize=(11, 3.6), sharey=True, layout="constrained")
    for panel, column in zip(panels, columns, strict=True):
        for (method, name), colour, marker in zip(names.items(), _COLOURS, _MARKERS, strict=False):
            curves = [row["curves"] for row in rows if row["method"] == method]
            if not curves:
                continue
            mean = np.mean([curve[column] for curve in curves], axis=0)
            panel.plot(
                curves[0]["eps"], mean, color=colour, label=name, linewidth=1.6, marker=marker,
                markevery=5, markersize=4,
            )  # fmt: skip
        panel.axvline(eps, color="0.6", linewidth=0.8, linestyle=":")
        panel.set(title=LABELS[column], xlabel="l2 size of the perturbation", ylim=(0, 1))
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("accuracy")
    panels[0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_digits(
    path: Path,
    images: np.ndarray,
    perturbed: Mapping[str, Digits],
    labels: np.ndarray,
) -> None:
    """Draw clean digits, and each method's perturbation and adversarial digit with predictions.

    Args:
      path: where to.
      images: `[n, 28, 28, 1]`, clean.
      perturbed: for each method's name, its `Digits`.
      labels: `[n]`.
    """
    from matplotlib import pyplot as plt

    n = len(images)
    figure, axes = plt.subplots(
        1 + 2 * len(perturbed), n, figsize=(1.15 * n + 1.6, 1.3 * (1 + 2 * len(perturbed))),
        layout="constrained", squeeze=False,
    )  # fmt: skip
    limit = max(float(np.abs(r).max()) for r, _, _ in perturbed.values())
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    grey = {"cmap": "gray_r", "vmin": 0, "vmax": 1}
    for i in range(n):
        axes[0, i].imshow(images[i, ..., 0], **grey)
        axes[0, i].set_title(f"label {labels[i]}", fontsize=8)
        for j, (r, before, after) in enumerate(perturbed.values()):
            axes[1 + 2 * j, i].imshow(r[i, ..., 0], cmap="RdBu_r", vmin=-limit, vmax=limit)
            axis = axes[2 + 2 * j, i]
            axis.imshow(images[i, ..., 0] + r[i, ..., 0], **grey)
            wrong = after[i] != labels[i]
            axis.set_title(
                f"{before[i]} → {after[i]}", fontsize=8, color=_COLOURS[3] if wrong else "black"
            )
    axes[0, 0].set_ylabel("clean", fontsize=8)
    for j, name in enumerate(perturbed):
        axes[1 + 2 * j, 0].set_ylabel(f"{name}\nr", fontsize=8)
        axes[2 + 2 * j, 0].set_ylabel("x + r", fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)
