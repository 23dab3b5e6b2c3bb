"""Slow references in float64 NumPy, mpmath and scipy, one example at a time; no jax, no jaxadv.

They follow the definitions (softmax, its Jacobian T, d_j = T_j - T_y, Eq. 1) and none of the
library's rearrangements: where float64 would cancel, mpmath carries as many digits as needed.
"""

import functools
import itertools
import math
from typing import NamedTuple

import mpmath
import numpy as np
from scipy import optimize

NORMS = ("l1", "l2", "linf")
DUAL = {"l1": "linf", "l2": "l2", "linf": "l1"}
ORDER = {"l1": 1, "l2": 2, "linf": np.inf}  # NumPy's ord
DUAL_ORDER = {name: ORDER[dual] for name, dual in DUAL.items()}


def edited(a, rows, value):
    """Return a copy of an array with some rows set to a value."""
    a = np.array(a)
    a[rows] = value
    return a


def lengths(r, name):
    """The norm of each example of a batch [B, ...], in float64: [B]."""
    return np.linalg.norm(np.asarray(r, np.float64).reshape(len(r), -1), ORDER[name], axis=1)


# Geometry of one vector


def length(v, name):
    v = np.abs(np.asarray(v, np.float64)).ravel()
    if name == "l2":
        return math.hypot(*v)
    return float(v.sum() if name == "l1" else v.max())


def to_plane(w, c, lower, upper, norm):
    """The size of the smallest d with <w, d> = c in a box, in float64; inf if there is none."""
    if c > np.where(w > 0, w * upper, w * lower).sum():
        return np.inf
    if norm == "l1":
        # d = p - q, both at least 0.
        bounds = [*((0, u) for u in upper), *((0, -v) for v in lower)]
        solution = optimize.linprog(np.ones(2 * len(w)), A_eq=[[*w, *-w]], b_eq=[c], bounds=bounds)
        return solution.fun
    u = w if norm == "l2" else np.sign(w)
    low, high = 0.0, 1e6
    for _ in range(200):
        t = (low + high) / 2
        short = w @ np.clip(t * u, lower, upper) < c
        low, high = (t, high) if short else (low, t)
    return length(np.clip(high * u, lower, upper), norm)


def steepest(g, name):
    """The v with ||v|| = 1 and <g, v> = ||g||_*; zero if g is; in l1, the lowest index on ties."""
    g = np.asarray(g, np.float64)
    if not g.any():
        return np.zeros_like(g)
    if name == "linf":
        return np.sign(g)
    if name == "l2":
        v = g / np.abs(g).max()
        return v / length(v, "l2")
    k = np.unravel_index(np.argmax(np.abs(g)), g.shape)
    v = np.zeros_like(g)
    v[k] = np.sign(g[k])
    return v


def project(v, eps, name):
    """The point of the ball nearest to v in l2; for l1, by bisection on the soft threshold."""
    v = np.asarray(v, np.float64)
    if length(v, name) <= eps:
        return v
    if name == "linf":
        return np.clip(v, -eps, eps)
    if name == "l2":
        return eps * steepest(v, "l2")
    low, high = 0.0, np.abs(v).max()
    for _ in range(200):
        threshold = (low + high) / 2
        too_long = np.maximum(np.abs(v) - threshold, 0).sum() > eps
        low, high = (threshold, high) if too_long else (low, threshold)
    return np.sign(v) * np.maximum(np.abs(v) - high, 0)


def cosine(a, b):
    a, b = (np.asarray(u).astype(np.float64).ravel() for u in (a, b))
    a, b = a / np.abs(a).max(), b / np.abs(b).max()
    return float(a @ b / (length(a, "l2") * length(b, "l2")))


# Nets: params are [(w, b), ...], tanh between layers, so a single pair is a linear net


def draw(seed, sizes, scale):
    """Float32 parameters of a net with layers of `sizes`, logits scaled, the last input unused."""
    rng = np.random.default_rng(seed)
    params = []
    for fan_in, fan_out in itertools.pairwise(sizes):
        w = rng.normal(size=(fan_in, fan_out)) / math.sqrt(fan_in)
        b = rng.normal(size=fan_out) / 2
        params.append((w, b))
    params[0][0][-1] = 0
    w, b = params[-1]
    params[-1] = (w * scale, b * scale)
    return [(w.astype(np.float32), b.astype(np.float32)) for w, b in params]


def net(params, x):
    """Logits [K] and their exact Jacobian [K, D] at one x, in float64."""
    h = np.asarray(x).astype(np.float64).ravel()
    jac = np.eye(h.size)
    for i, (w, b) in enumerate(params):
        w, b = np.asarray(w, np.float64), np.asarray(b, np.float64)
        h, jac = h @ w + b, w.T @ jac
        if i < len(params) - 1:
            h = np.tanh(h)
            jac = (1 - h**2)[:, None] * jac
    return h, jac


def softmax_jacobian(logits, jac):
    """Probabilities [K] and T [K, D] in plain float64, for logits that aren't confident."""
    a = np.exp(logits - logits.max())
    a /= a.sum()
    return a, (np.diag(a) - np.outer(a, a)) @ jac


# The paper's perturbations, exact at any confidence


class Found(NamedTuple):
    """Algorithm 1 at one point."""

    direction: np.ndarray  # [D], of norm 1; zeros if there is no direction
    log_size: float  # log of the minimal size; -inf where the minimal r is 0
    cls: int  # I; -1 if there is no candidate
    log_sizes: np.ndarray  # [K], from Eq. 1 for each j; inf for y and unreachable classes
    rows: np.ndarray  # [K, D], d_j over its largest magnitude

    def r(self, eps=None):
        """The minimal perturbation or, given eps, the one of that size (Section 6.1.2)."""
        return (math.exp(self.log_size) if eps is None else eps) * self.direction


_mp = np.vectorize(mpmath.mpf, otypes=[object])


def _precise(logits):
    """Enough digits for sums of probabilities not to cancel."""
    z = logits[np.isfinite(logits)]
    return mpmath.workdps(int(2 * (z.max() - z.min()) / math.log(10)) + 50)


def _rounded():
    """Enough digits once those sums are taken."""
    return mpmath.workdps(40)


def _mp_softmax_jacobian(logits, jac):
    a = np.array([mpmath.exp(mpmath.mpf(z) - mpmath.mpf(logits.max())) for z in logits])
    a = a / a.sum()
    jac = _mp(np.where(np.isfinite(logits)[:, None], jac, 0.0))  # a class at -inf has no gradient
    return a, a[:, None] * (jac - a @ jac)


def _mp_differences(logits, jac, y):
    """alpha_y - alpha_j [K], d_j = T_j - T_y [K, D], and T_y [D]."""
    return _mp_cached_differences(tuple(logits.tolist()), tuple(map(tuple, jac.tolist())), int(y))


@functools.lru_cache(maxsize=64)
def _mp_cached_differences(logits, jac, y):
    logits = np.array(logits)
    with _precise(logits):
        a, t = _mp_softmax_jacobian(logits, np.array(jac))
        differences = a[y] - a, t - t[y], t[y]
    with _rounded():
        return tuple(+difference for difference in differences)


def _mp_length(v, name):
    if name == "l2":
        return mpmath.sqrt((v * v).sum())
    return abs(v).sum() if name == "l1" else abs(v).max()


def _mp_unit(v):
    """v over its largest magnitude, which is safe in float64."""
    top = abs(v).max()
    return (v / top if top else v).astype(np.float64)


def alpha(logits, jac, y, *, norm):
    logits, jac = np.asarray(logits, np.float64), np.asarray(jac, np.float64)
    classes, size = jac.shape
    log_sizes, rows = np.full(classes, np.inf), np.zeros((classes, size))
    candidates = [j for j in range(classes) if j != y and logits[j] > -np.inf]
    if not candidates or logits[y] == -np.inf:
        return Found(np.zeros(size), -math.inf, -1, log_sizes, rows)
    gap, d, _ = _mp_differences(logits, jac, y)
    with _rounded():
        for j in candidates:
            rows[j] = _mp_unit(d[j])
            if logits[j] >= logits[y]:  # already reached, ties included
                log_sizes[j] = -np.inf
            elif d[j].any():
                log_sizes[j] = mpmath.log(gap[j] / _mp_length(d[j], DUAL[norm]))
    others = np.where(np.arange(classes) == y, -np.inf, logits)
    if others.max() >= logits[y]:
        cls = int(others.argmax())
    else:
        cls = int(log_sizes.argmin())
    direction = steepest(rows[cls], norm)
    log_size = float(log_sizes[cls]) if direction.any() else -math.inf
    return Found(direction, log_size, cls, log_sizes, rows)


def loss_row(logits, jac, y):
    """-T_y over its largest magnitude: the direction of steepest descent of alpha_y (6.1.1)."""
    logits, jac = np.asarray(logits, np.float64), np.asarray(jac, np.float64)
    others = np.delete(logits, y)
    if logits[y] == -np.inf or others.max() == -np.inf:
        return np.zeros(jac.shape[1])
    _, _, t_y = _mp_differences(logits, jac, y)
    with _rounded():
        return _mp_unit(-t_y)


def loss(logits, jac, y, *, norm):
    return steepest(loss_row(logits, jac, y), norm)


def loss_sign(logits, jac, y):
    """The sign direction at l2 size 1."""
    return steepest(np.sign(loss_row(logits, jac, y)), "l2")


# Virtual adversary


def log_softmax(logits):
    z = np.asarray(logits, np.float64) - np.max(logits)
    return z - math.log(np.exp(z).sum())


def kl(logits_p, logits_q):
    """KL(p || q) in float64."""
    log_p, log_q = log_softmax(logits_p), log_softmax(logits_q)
    return float(np.exp(log_p) @ (log_p - log_q))


def virtual(logits, jac):
    """Top eigenvector of H = J^T (diag p - p p^T) J, up to sign, and eigenvalues relative to it.

    KL(p(x) || p(x + r)) is r^T H r / 2 to second order.
    """
    logits, jac = np.asarray(logits, np.float64), np.asarray(jac, np.float64)
    with _precise(logits):
        _, t = _mp_softmax_jacobian(logits, jac)
        hessian = _mp_unit(_mp(jac).T @ t)
    values, vectors = np.linalg.eigh(hessian)
    return vectors[:, -1], values / values[-1]


# Optimisation problems solved by scipy


def linear_program(d, gap, norm):
    """A solution of min ||r|| s.t. d . r >= gap, for l1 and linf, by scipy's HiGHS."""
    n = len(d)
    if norm == "l1":  # r = u - v, u and v >= 0
        cost = np.ones(2 * n)
        rows, limits = [np.concatenate([-d, d])], [-gap]
        bounds = [(0, None)] * (2 * n)
    else:  # |r_i| <= t
        cost = np.append(np.zeros(n), 1)
        eye, ones = np.eye(n), np.ones((n, 1))
        rows = np.vstack([np.append(-d, 0), np.hstack([eye, -ones]), np.hstack([-eye, -ones])])
        limits = np.append(-gap, np.zeros(2 * n))
        bounds = [(None, None)] * n + [(0, None)]
    solved = optimize.linprog(cost, A_ub=rows, b_ub=limits, bounds=bounds)
    return solved.x[:n] - solved.x[n:] if norm == "l1" else solved.x[:n]


def least_squares(d, gap):
    """A solution of min ||r||_2 s.t. d . r >= gap, by scipy's SLSQP."""
    half_plane = {"type": "ineq", "fun": lambda r: d @ r - gap, "jac": lambda r: d}
    start = np.full(len(d), gap)
    options = {"ftol": 1e-14}
    solved = optimize.minimize(
        lambda r: r @ r / 2, start, jac=lambda r: r, constraints=half_plane, options=options
    )
    return solved.x


def proposition_4(a, t, y, *, norm):
    """The smallest r for which argmax(a + t r) isn't y, found by trying every class."""
    found = []
    for j in range(len(a)):
        if j != y:
            d, gap = t[j] - t[y], a[y] - a[j]
            found.append(least_squares(d, gap) if norm == "l2" else linear_program(d, gap, norm))
    return min(found, key=lambda r: length(r, norm))


def flip_length(a, t, y, u):
    """How far along each row of u [N, D] argmax(a + t r) stays y: [N], inf if it always does."""
    j = np.arange(len(a)) != y
    rates = u @ (t[j] - t[y]).T
    with np.errstate(divide="ignore"):
        lengths = np.where(rates > 0, (a[y] - a[j]) / rates, np.inf)
    return lengths.min(axis=1)


def mostly_right(n, seed=0):
    """Weights [5, 3] of a linear net, and n examples; it classifies four fifths correctly."""
    rng = np.random.default_rng(seed)
    w = rng.normal(size=(5, 3)).astype(np.float32)
    x = rng.normal(size=(n, 5)).astype(np.float32)
    y = np.argmax(x @ w, axis=1)
    y[::5] = (y[::5] + 1) % 3
    return w, x, y
