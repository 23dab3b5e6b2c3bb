"""Attacks of a few steps, nets that several test files share, and problems with known answers."""

from functools import partial

import jax.numpy as jnp
import numpy as np
from references import DUAL_ORDER

from jaxadv import attack

ATTACKS = {
    "pgd": partial(attack.pgd, steps=3, random_start=True),
    "pgd_kl": partial(attack.pgd_kl, steps=3),
    "apgd": partial(attack.apgd, steps=4),
    "apgd_multitargeted": partial(attack.apgd_multitargeted, steps=4, n_targets=2),
    "ddn": partial(attack.ddn, steps=3),
    "deepfool": attack.deepfool,
    "fab": partial(attack.fab, steps=3, n_targets=2),
    "fmn": partial(attack.fmn, steps=3),
    "square": partial(attack.square, steps=3),
}
"""Every iterated attack; pass eps and a key."""


def linear(params, x):
    w, b = params
    return x @ w + b[None]


def curved(params, x):
    w, v = params
    return jnp.tanh(x @ w) @ v


def linear_problem(n_classes, n=60, size=6, seed=0):
    """A linear net and examples that it classifies correctly."""
    rng = np.random.default_rng(seed)
    params = rng.normal(size=(size, n_classes)), rng.normal(size=n_classes)
    w, b = (p.astype(np.float32) for p in params)
    x = rng.normal(size=(n, size)).astype(np.float32)
    return (w, b), x, (x @ w + b).argmax(axis=1)


def distances(params, x, y, norm):
    """Distances to each class's hyperplane of a linear net, in float64; inf for the label."""
    w, b = (p.astype(np.float64) for p in params)
    z = x.astype(np.float64) @ w + b
    gap = z[np.arange(len(y)), y][:, None] - z
    size = np.linalg.norm(w.T[y][:, None] - w.T[None], DUAL_ORDER[norm], axis=2)
    return np.where(size > 0, gap / np.where(size > 0, size, 1), np.inf)


def curved_problem(n=60, size=6):
    rng = np.random.default_rng(7)
    params = tuple(rng.normal(size=shape).astype(np.float32) for shape in ((size, 8), (8, 4)))
    x = rng.normal(size=(n, size)).astype(np.float32)
    return params, x, np.asarray(curved(params, x)).argmax(axis=1)


def misled(apply_fn, params, x, y, r):
    """Which examples are misclassified at x + r."""
    return np.asarray(apply_fn(params, x + np.asarray(r))).argmax(axis=1) != y
