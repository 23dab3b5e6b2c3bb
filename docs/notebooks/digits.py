"""MNIST as arrays, and pictures of digits, for the notebooks beside this file."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from IPython.display import Markdown
from matplotlib import cycler
from matplotlib import pyplot as plt
from matplotlib_inline.backend_inline import set_matplotlib_formats

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository has the images

from experiments.lib.data import mnist_originals

WIDTH = 4.8  # inches: small enough for a phone
plt.rcParams |= {
    "axes.grid": True,
    # Blue, orange and dark grey differ in lightness, too: nobody has to tell hues apart.
    "axes.prop_cycle": cycler(color=["#006ba4", "#ff800e", "#444444"]),
    "figure.constrained_layout.use": True,
    "figure.figsize": (WIDTH, 3.2),
    "grid.alpha": 0.3,
    "image.interpolation": "none",
    "legend.frameon": False,
    "svg.hashsalt": "jaxadv",  # the same picture is the same file
}
set_matplotlib_formats("svg", metadata={"Date": None})


def load(n_train=20_000, n_test=500):
    """Return x `[n, 28, 28, 1]` with pixels in 0..1 and y `[n]`, of training and of test images."""
    parts = mnist_originals()
    arrays = []
    for images, labels, n in (
        (parts.train_images, parts.train_labels, n_train),
        (parts.test_images, parts.test_labels, n_test),
    ):
        arrays += [jnp.asarray(images[:n], jnp.float32) / 255, jnp.asarray(labels[:n])]
    return arrays


def batches(n, size, seed):
    """Return the indices of n examples in random order, `[n // size, size]`."""
    order = jax.random.permutation(jax.random.key(seed), n)
    return order[: n // size * size].reshape(-1, size)


def show(rows, y, answers=None, titles=None):
    """Draw rows of digits with a net's answers above them; wrong ones are red, with a cross.

    Args:
      rows: images `[n, 28, 28, 1]` by name. Names that begin with r are perturbations, all on one
        colour scale: purple adds ink, orange removes it.
      y: the true labels, `[n]`.
      answers: a net's answers `[n]`, by the name of the row.
      titles: text `[n]` above the columns.
    """
    n = len(y)
    side = (WIDTH - 0.4) / n
    height = len(rows) * (side + 0.1) + 0.25 * (len(answers or ()) + bool(titles))
    _, axes = plt.subplots(len(rows), n, figsize=(WIDTH, height), squeeze=False)
    perturbations = [images for name, images in rows.items() if name.startswith("r")]
    limit = max((float(jnp.abs(r).max()) for r in perturbations), default=0.0) or 1.0
    for row, (name, images) in enumerate(rows.items()):
        axes[row, 0].set_ylabel(name)
        for i, axis in enumerate(axes[row]):
            image = np.asarray(images[i, ..., 0])
            if name.startswith("r"):
                axis.imshow(image, cmap="PuOr", vmin=-limit, vmax=limit)
            else:
                axis.imshow(image, cmap="gray_r", vmin=0, vmax=1)
            axis.set(xticks=[], yticks=[])
            text, colour = [titles[i]] if titles and row == 0 else [], "black"
            if answers and name in answers:
                answer = int(answers[name][i])
                right = answer == y[i]
                text.append(f"“{answer}”" if right else f"“{answer}” ✗")
                colour = "black" if right else "tab:red"
            axis.set_title("\n".join(text), fontsize=10, color=colour)
    plt.show()


def table(rows, first="net"):
    """Return accuracies as a table that notebooks display: for each name, figures by column."""
    columns = list(next(iter(rows.values())))
    lines = [[first, *columns], ["---"] * (1 + len(columns))]
    for name, figures in rows.items():
        cells = (figures.get(column) for column in columns)
        lines.append([name, *("" if cell is None else f"{cell:.3f}" for cell in cells)])
    return Markdown("\n".join(f"| {' | '.join(line)} |" for line in lines))
