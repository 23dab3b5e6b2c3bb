"""Accuracies printed in the paper, and those in its authors' notebooks.

They are by experiment and method, in the order of `tables.LABELS` without PGD.
"""

from __future__ import annotations

from collections.abc import Mapping

Figures = Mapping[str, tuple[float, ...]]

PRINTED_EPS: Mapping[str, float] = {"mnist_mlp": 1.5, "mnist_lenet": 1.5, "cifar10": 0.5}
"""l2 sizes of the printed figures."""
NOTEBOOK_EPS: Mapping[str, float] = {**PRINTED_EPS, "cifar10": 0.25}
"""l2 sizes that the notebooks' code has in effect."""

PRINTED: Mapping[str, Figures] = {
    "mnist_mlp": {  # Table 1
        "normal": (0.980, 0.320, 0.187, 0.085, 0.073),
        "dropout": (0.983, 0.337, 0.233, 0.115, 0.088),
        "goodfellow": (0.991, 0.955, 0.928, 0.724, 0.711),
        "lwa": (0.990, 0.972, 0.939, 0.861, 0.854),
        "lwa_rep": (0.986, 0.797, 0.819, 0.673, 0.646),
    },
    "mnist_lenet": {  # Table 2
        "normal": (0.9916, 0.6342, 0.6940, 0.3998, 0.3792),
        "lwa": (0.9932, 0.9817, 0.9800, 0.9533, 0.9529),
    },
    "cifar10": {  # Table 3
        "normal": (0.878, 0.582, 0.486, 0.416, 0.282),
        "dropout": (0.894, 0.584, 0.454, 0.418, 0.291),
        "lwa": (0.838, 0.776, 0.606, 0.492, 0.520),
        "lwa_rep": (0.842, 0.600, 0.641, 0.549, 0.560),
    },
}
NOTEBOOK: Mapping[str, Figures] = {  # outputs saved in the notebooks that the authors released
    "mnist_mlp": {
        "normal": (0.977, 0.361, 0.287, 0.201, 0.074),
        "dropout": (0.982, 0.446, 0.440, 0.321, 0.193),
        "goodfellow": (0.991, 0.972, 0.939, 0.844, 0.836),
        "lwa": (0.990, 0.974, 0.944, 0.867, 0.862),
    },
    "mnist_lenet": {
        "normal": (0.9912, 0.7456, 0.8082, 0.5194, 0.5014),
        "lwa": (0.9934, 0.9822, 0.9859, 0.9632, 0.9627),
    },
    "cifar10": {
        "normal": (0.851, 0.747, 0.517, 0.429, 0.416),
        "dropout": (0.877, 0.777, 0.593, 0.495, 0.479),
        "goodfellow": (0.856, 0.818, 0.794, 0.745, 0.734),
        "lwa": (0.864, 0.831, 0.803, 0.760, 0.750),
    },
}
