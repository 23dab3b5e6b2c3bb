"""Complete rows of results.json, from the few fields that a test gives; a small problem and net."""

import jax
import jax.numpy as jnp
import numpy as np

from experiments.lib import models, problems, records, tables

VERSIONS = {"jax": "0"}
CONV = models.Classifier((6,), blocks=((3,), (5,)), size=3, padding=1)


def drawn(seed=0):
    """Weights of CONV."""
    return models.init(CONV, jax.random.key(seed), jnp.zeros((1, 28, 28, 1)))


def table_row(**fields):
    usual = {
        "experiment": "mnist_mlp", "network": "12x11", "method": "lwa", "seed": 0, "eps": 1.5,
        "norm": "l2", "n": 100, "settings": {"holdout": 0}, "versions": VERSIONS,
        "device": "cpu x1", "columns": dict.fromkeys(tables.LABELS, 0.5), "counts": {},
        "n_pgd": 100, "curves": {}, "epochs": 2, "train_seconds": 2.0, "history": [],
    }  # fmt: skip
    return records.TableRow(**usual | fields)


def _problem(fields):
    return {
        "experiment": "evaluate", "method": "mnist_mlp/lwa", "network": "7x5", "weights": "0",
        "data": "mnist", "subtract": 0, "divide": 256, "crop": None, "box": True, "n": 100,
        "attack": "standard", "eps": 1.5, "norm": "l2", "seed": 0, "versions": VERSIONS,
        "settings": {}, "columns": {"clean": 0.99, "robust": 0.5},
    } | fields  # fmt: skip


def robust_row(**fields):
    usual = {"device": "cpu", "interval": [0.4, 0.6], "stages": {}, "counts": {}, "seconds": 1.0}
    return records.RobustRow(**_problem(usual | fields))


def published_row(**fields):
    usual = {"experiment": "reference", "threads": 2, "counts": {}, "seconds": 1.0}
    return records.PublishedRow(**_problem(usual | fields))


def check_row(**fields):
    return records.CheckRow(**_problem({"device": "cpu", "attack": "check"} | fields))


def problem_of(net, n=3):
    """A problem of n images of 2x2 pixels."""
    rng = np.random.default_rng(0)
    x = 0.4 + 0.2 * rng.random((n, 2, 2, 1), np.float32)  # far from the edges of the box
    params = models.init(net, jax.random.key(0), x)
    return problems.Problem(models.function(net), params, x, np.arange(n), (0.0, 1.0), {})
