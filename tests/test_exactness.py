"""Algorithm 1 and Adv_Loss are exact at any confidence: tests against thousands of digits.

The nets run in float32; the reference evaluates the same float32 parameters in float64. So the
rounding of the logits is part of the test, and it limits the accuracy of sizes: each operation
rounds a logit z by up to 2^-24 |z|, and a size grows as exp(z_y - z_j).
"""

import functools
import itertools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references
from references import NORMS

from jaxadv import jacobian, perturb

# name: layer sizes D, ..., K and the batch size B; no two of B, K and D are equal
NETS = {
    "linear-2": ((7, 2), 10),
    "linear-3": ((8, 3), 10),
    "mlp-2": ((7, 9, 2), 10),
    "mlp-3": ((8, 9, 3), 10),
    "mlp-10": ((13, 11, 10), 8),
}
SCALES = (1, 10, 100, 1000)
LOG_MAX = math.log(np.finfo(np.float32).max)

every_norm = pytest.mark.parametrize("norm", NORMS)
every_net = pytest.mark.parametrize("name", NETS)
every_scale = pytest.mark.parametrize("scale", SCALES)


@functools.partial(jax.jit, static_argnums=0)
def of_size_half(*data):
    """All methods that take eps, in all norms, as one program: {(method, norm): r}."""
    return {
        **{("alpha", norm): perturb.alpha(*data, norm=norm, eps=0.5) for norm in NORMS},
        **{("loss", norm): perturb.loss(*data, norm=norm, eps=0.5) for norm in NORMS},
        ("loss_sign", "l2"): perturb.loss_sign(*data, eps=0.5),
    }


@functools.partial(jax.jit, static_argnums=0)
def everything(*data):
    """The same and the minimal perturbations."""
    minimal = {("minimal", norm): perturb.alpha(*data, norm=norm) for norm in NORMS}
    return {**minimal, **of_size_half(*data)}


softmax_jacobian = jax.jit(jacobian.softmax_jacobian, static_argnums=0)


def apply(params, x):
    """`references.net` in JAX, in the dtype of the parameters."""
    *hidden, (w, b) = params
    h = x.reshape(x.shape[0], -1).astype(w.dtype)
    for v, c in hidden:
        h = jnp.tanh(h @ v + c[None])
    return h @ w + b[None]


def apply_low(params, x):
    """`apply` with its logits rounded to the input's dtype."""
    return apply(params, x).astype(x.dtype)


class Problem(NamedTuple):
    params: list
    x: np.ndarray  # [B, D]
    y: np.ndarray  # [B]; even rows are classified correctly; in odd rows y has another rank
    logits: np.ndarray  # [B, K], float64
    jac: np.ndarray  # [B, K, D], float64

    @property
    def slack(self):
        """Relative tolerance of a direction's coordinates in float32.

        DESIGN requires 1e-4 + 8 ulps of the largest logit of sizes; coordinates of d_j are sums
        of rows weighted by the same exponentials, with 1e-5 in place of the 1e-4.
        """
        return 1e-5 + 8 * 2**-24 * np.abs(self.logits).max()


@functools.cache
def problem(name, scale, dtype="float32"):
    sizes, batch = NETS[name]
    params = references.draw(len(name), sizes, scale)
    x = np.random.default_rng(1).normal(size=(batch, sizes[0]))
    x = np.asarray(jnp.asarray(x, dtype))
    logits, jac = map(np.stack, zip(*(references.net(params, row) for row in x), strict=True))
    order, classes = np.argsort(-logits), sizes[-1]
    rank = [0 if i % 2 == 0 else 1 + i // 2 % (classes - 1) for i in range(batch)]
    return Problem(params, x, order[np.arange(batch), rank].astype(np.int32), logits, jac)


@functools.cache
def solved(name, scale):
    p = problem(name, scale)
    r = everything(apply, p.params, p.x, p.y)
    assert all(v.shape == p.x.shape and v.dtype == p.x.dtype for v in r.values())
    return {which: np.asarray(v) for which, v in r.items()}


def solved_in_float64(name, scale):
    p = problem(name, scale)
    x, params = jax.tree.map(lambda a: a.astype(np.float64), (p.x, p.params))
    r = everything(apply, params, x, p.y)
    assert all(v.dtype == np.float64 for v in r.values())
    return {which: np.asarray(v) for which, v in r.items()}


@functools.cache
def exact(name, scale, norm):
    p = problem(name, scale)
    rows = zip(p.logits, p.jac, p.y, strict=True)
    return [references.alpha(z, jac, y, norm=norm) for z, jac, y in rows]


def closeness(r, row, norm, slack):
    """Cosine of r with the steepest direction of `row`, up to ties within `slack`.

    Only the l2 direction is continuous in `row`. In linf, the sign of an entry with |row_k| below
    `slack` is decided by rounding; in l1, so is the coordinate if several are within `slack` of
    the largest, which is 1.
    """
    want = references.steepest(row, norm)
    r = np.asarray(r).astype(np.float64)
    assert np.all(r[row == 0] == 0)
    if norm == "linf":
        want = np.where((np.abs(row) < slack) & (row != 0), np.sign(r), want)
    if norm == "l1":
        k = np.argmax(np.abs(r))
        if np.abs(row[k]) >= 1 - slack:
            want = np.sign(row[k]) * np.eye(len(row))[k]
    return references.cosine(r, want)


def acceptable(found):
    """Classes whose distance is within 1% of the smallest: usually only I."""
    if found.log_size == -math.inf:
        return [found.cls]
    return np.flatnonzero(found.log_sizes <= found.log_size + math.log(1.01))


def direction_of(found, r, norm, slack):
    """Largest cosine of r with the direction of an acceptable class."""
    return max(closeness(r, found.rows[j], norm, slack) for j in acceptable(found))


def check_minimal(found, r, norm, p):
    """Assert that r has the size and the direction of the exact minimal perturbation."""
    tolerance = 1e-4 + 8 * 2**-24 * np.abs(p.logits).max()  # as DESIGN requires
    if found.log_size == -math.inf:
        np.testing.assert_array_equal(r, np.zeros_like(r))
    elif found.log_size < LOG_MAX - tolerance:
        log_size = math.log(references.length(r, norm))
        assert log_size == pytest.approx(found.log_size, abs=tolerance)
        assert direction_of(found, r, norm, p.slack) >= 0.9999
    else:
        assert found.log_size > LOG_MAX + tolerance
        assert np.all(np.isinf(r) | (r == 0))
        signs = "l1" if norm == "l1" else "linf"
        assert direction_of(found, np.sign(r), signs, p.slack) >= 0.9999


# The references agree with simpler arithmetic where that is accurate enough


@every_net
def test_the_reference_jacobian_is_the_slope_of_the_reference_net(name):
    p, h = problem(name, 1), 1e-6
    for x, jac in zip(p.x.astype(np.float64), p.jac, strict=True):
        steps = h * np.eye(x.size)
        logits = [[references.net(p.params, x + s * e)[0] for e in steps] for s in (1, -1)]
        slope = (np.array(logits[0]) - np.array(logits[1])).T / (2 * h)
        # Central differences: 2^-53 / h = 1e-10 of rounding, h^2 of truncation, and a margin.
        np.testing.assert_allclose(slope, jac, atol=5e-9)


@every_net
@every_norm
def test_many_digits_agree_with_float64_where_nothing_saturates(name, norm):
    p = problem(name, 1)
    for z, jac, y, found in zip(p.logits, p.jac, p.y, exact(name, 1, norm), strict=True):
        a, t = references.softmax_jacobian(z, jac)
        d = t - t[y]
        others = [j for j in range(len(a)) if j != y]
        sizes = {j: (a[y] - a[j]) / references.length(d[j], references.DUAL[norm]) for j in others}
        if min(sizes.values()) > 0:
            assert found.cls == min(sizes, key=sizes.get)
            assert found.log_size == pytest.approx(math.log(sizes[found.cls]), abs=1e-12)
        else:
            assert found.cls == max(others, key=lambda j: z[j])
            assert found.log_size == -math.inf
        assert references.cosine(found.rows[found.cls], d[found.cls]) > 1 - 1e-12
        assert references.cosine(references.loss_row(z, jac, y), -t[y]) > 1 - 1e-12


# Algorithm 1


@every_norm
@every_scale
@every_net
def test_alpha_goes_the_way_of_the_nearest_class(name, scale, norm):
    p = problem(name, scale)
    r = solved(name, scale)["alpha", norm]
    for found, row in zip(exact(name, scale, norm), r, strict=True):
        assert direction_of(found, row, norm, p.slack) >= 0.9999
        # Divisions and a root: a few roundings of 2^-24.
        assert references.length(row, norm) == pytest.approx(0.5, rel=1e-6)


@every_norm
@every_scale
@every_net
def test_alpha_takes_the_least_distance_and_stays_when_the_class_is_wrong_already(
    name, scale, norm
):
    p = problem(name, scale)
    r = solved(name, scale)["minimal", norm]
    for i, (found, row) in enumerate(zip(exact(name, scale, norm), r, strict=True)):
        assert (found.log_size == -math.inf) == (i % 2 == 1)
        check_minimal(found, row, norm, p)


def test_sizes_both_within_and_beyond_float32_are_tried():
    cases = itertools.product(NETS, SCALES)
    sizes = [found.log_size for case in cases for found in exact(*case, "l2")[::2]]
    assert min(sizes) < 0
    assert sum(math.log(1e6) < size < LOG_MAX for size in sizes) >= 15
    assert sum(size > LOG_MAX for size in sizes) >= 15


def test_nearly_every_point_has_one_nearest_class():
    cases = itertools.product(NETS, SCALES, NORMS)
    alone = [len(acceptable(found)) == 1 for case in cases for found in exact(*case)]
    assert np.mean(alone) > 0.95


@pytest.mark.parametrize("scale", [100, 1000])
def test_the_plain_softmax_jacobian_is_lost_on_these_points(scale):
    # The usual formula in float32. If it were accurate here, the tests above would prove nothing.
    lost = []
    for name in NETS:
        p = problem(name, scale)
        t = np.asarray(softmax_jacobian(apply, p.params, p.x), np.float64)
        for i, found in enumerate(exact(name, scale, "l2")):
            d = t[i, found.cls] - t[i, p.y[i]]
            lost.append(not d.any() or references.cosine(d, found.direction) < 0.9999)
    assert np.mean(lost) > 0.5


# Adv_Loss, and the virtual adversary


def test_vat_finds_the_direction_of_the_largest_curvature_of_the_divergence():
    p = problem("mlp-3", 1)
    keys = jax.random.split(jax.random.key(0), len(p.x))
    r, ratios = perturb.vat(apply, p.params, p.x, eps=0.5, steps=10, key=keys), []
    for z, jac, row in zip(p.logits, p.jac, r, strict=True):
        top, values = references.virtual(z, jac)
        # Ten power iterations, converging at the ratio of the top eigenvalues, from <= 86 degrees.
        assert abs(references.cosine(row, top)) >= 1 - 1e-4 - 100 * values[-2] ** 20
        ratios.append(values[-2])
    assert np.median(ratios) < 0.5  # otherwise the bound above would be loose


@every_norm
@every_scale
@every_net
def test_loss_lowers_the_probability_of_the_true_class_fastest(name, scale, norm):
    p = problem(name, scale)
    r = solved(name, scale)["loss", norm]
    for z, jac, y, row in zip(p.logits, p.jac, p.y, r, strict=True):
        want = references.loss_row(z, jac, y)
        assert closeness(row, want, norm, p.slack) >= 0.9999
        assert references.length(row, norm) == pytest.approx(0.5, rel=1e-6)


@every_scale
@every_net
def test_loss_sign_is_the_sign_direction_at_l2_size_eps(name, scale):
    p = problem(name, scale)
    r = solved(name, scale)["loss_sign", "l2"]
    for z, jac, y, row in zip(p.logits, p.jac, p.y, r, strict=True):
        want = references.loss_row(z, jac, y)
        assert closeness(np.sign(row), want, "linf", p.slack) >= 0.9999
        np.testing.assert_allclose(
            np.abs(row), 0.5 * np.abs(references.loss_sign(z, jac, y)), rtol=1e-6
        )


# Other precisions


@every_norm
@every_scale
@pytest.mark.parametrize("name", ["mlp-2", "mlp-10"])
def test_float64_is_exact_to_float64(name, scale, norm, x64):
    p, r = problem(name, scale), solved_in_float64(name, scale)
    for i, found in enumerate(exact(name, scale, norm)):
        # Logits of some thousands are accurate to 2^-53 of that, 1e-12; sums add some error.
        np.testing.assert_allclose(r["alpha", norm][i], found.r(0.5), atol=1e-9)
        want = 0.5 * references.loss(p.logits[i], p.jac[i], p.y[i], norm=norm)
        np.testing.assert_allclose(r["loss", norm][i], want, atol=1e-9)
        minimal = r["minimal", norm][i]
        if found.log_size < math.log(np.finfo(np.float64).max):
            np.testing.assert_allclose(minimal, found.r(), rtol=1e-9, atol=1e-9)
        else:
            np.testing.assert_array_equal(np.isinf(minimal), found.direction != 0)


@every_scale
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("net", [apply, apply_low])
def test_low_precision_keeps_the_direction(scale, dtype, net):
    p = problem("mlp-10", scale, dtype)
    # If the net itself rounds its logits, the rounded ones are the exact problem.
    logits = p.logits if net is apply else np.asarray(net(p.params, p.x)).astype(np.float64)
    r = of_size_half(net, p.params, p.x, p.y)
    assert all(v.dtype == dtype for v in r.values())
    # On its way through the net, the gradient is rounded to the dtype four times.
    slack = p.slack + 4 * float(jnp.finfo(dtype).eps)
    for i, (z, jac, y) in enumerate(zip(logits, p.jac, p.y, strict=True)):
        fastest = references.loss_row(z, jac, y)
        for norm in NORMS:
            found = references.alpha(z, jac, y, norm=norm)
            assert direction_of(found, r["alpha", norm][i], norm, slack) >= 0.99
            assert closeness(r["loss", norm][i], fastest, norm, slack) >= 0.99


# Propositions and identities


@every_norm
@every_net
def test_proposition_4_by_brute_force_on_the_linearised_net(name, norm):
    p = problem(name, 1)
    r = solved(name, 1)["minimal", norm].astype(np.float64)
    rng = np.random.default_rng(2)
    for i in range(0, len(r), 2):
        a, t = references.softmax_jacobian(p.logits[i], p.jac[i])
        size = references.length(r[i], norm)
        # Linear programs (SLSQP for l2), one for each class, solved to 1e-7; logits of order 1 in
        # float32 add a relative error of a few 1e-7.
        best = references.proposition_4(a, t, p.y[i], norm=norm)
        assert size == pytest.approx(references.length(best, norm), rel=1e-5)
        # r reaches the boundary of the linearised net, neither sooner nor later.
        assert references.flip_length(a, t, p.y[i], r[i][None])[0] == pytest.approx(1, abs=1e-5)
        # No shorter perturbation does, in random directions nor at the balls' extreme points.
        u = rng.normal(size=(2000, r.shape[1]))
        u = np.concatenate([u, np.sign(u), np.eye(r.shape[1]), -np.eye(r.shape[1])])
        u = np.array([v / references.length(v, norm) for v in u])
        assert references.flip_length(a, t, p.y[i], u).min() >= size * (1 - 1e-5)


def test_proposition_4_by_exhaustion_in_the_plane():
    # With only two inputs in use, a fine grid of directions must get as short as r.
    p = problem("linear-3", 1)
    ((w, b),) = p.params
    params = [(np.where(np.arange(len(w))[:, None] < 2, w, 0), b)]
    y = np.array([references.net(params, row)[0].argmax() for row in p.x], np.int32)
    r = everything(apply, params, p.x, y)
    angles = np.arange(100_000) * 2 * np.pi / 100_000
    circle = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    order = {"l1": 1, "l2": 2, "linf": np.inf}
    for norm in NORMS:
        u = circle / np.linalg.norm(circle, order[norm], axis=1, keepdims=True)
        for i in range(len(y)):
            a, t = references.softmax_jacobian(*references.net(params, p.x[i]))
            shortest = references.flip_length(a, t[:, :2], y[i], u).min()
            # The grid misses a corner of the ball by at most an angle of 3e-5.
            size = references.length(r["minimal", norm][i], norm)
            assert size == pytest.approx(shortest, rel=1e-4)


@every_norm
@every_net
def test_the_linearised_gap_is_closed_exactly(name, norm):
    p = problem(name, 1)
    r = solved(name, 1)["minimal", norm].astype(np.float64)
    for i, found in list(enumerate(exact(name, 1, norm)))[::2]:
        a, t = references.softmax_jacobian(p.logits[i], p.jac[i])
        gap = a[p.y[i]] - a[found.cls]
        # Corrected Prop. 3, with float32's rounding of a few 1e-7 relative to alpha_y.
        assert (t[found.cls] - t[p.y[i]]) @ r[i] == pytest.approx(gap, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("scale", [1, 10, 100])
def test_the_distance_between_two_classes_is_the_sinh_of_the_margin(scale, x64):
    p, r = problem("mlp-2", scale), solved_in_float64("mlp-2", scale)["minimal", "l2"]
    for i in range(0, len(r), 2):
        y, j = p.y[i], 1 - p.y[i]
        margin, slope = p.logits[i, y] - p.logits[i, j], p.jac[i, y] - p.jac[i, j]
        want = math.sinh(margin) / references.length(slope, "l2")
        # exp of a margin of some hundreds, which has a relative error of 2^-53.
        assert references.length(r[i], "l2") == pytest.approx(want, rel=1e-11)


@every_net
def test_softmax_jacobian_is_the_papers_t_and_its_rows_sum_to_0(name):
    p = problem(name, 1)
    t = np.asarray(softmax_jacobian(apply, p.params, p.x))
    want = [references.softmax_jacobian(z, jac)[1] for z, jac in zip(p.logits, p.jac, strict=True)]
    # Sums of K rows of order 1: a few roundings of 2^-24.
    np.testing.assert_allclose(t, want, atol=1e-6)
    np.testing.assert_allclose(t.sum(axis=1), 0, atol=1e-6)


# Ties, masks and derivatives


def with_logits(logits):
    """A linear net with the shapes of linear-3, compiled already, and x with exactly these logits.

    The first three inputs are the logits; the others are 0, but have nonzero weights.
    """
    p = problem("linear-3", 1)
    ((w, b),) = p.params
    params = [(np.concatenate([np.eye(3, dtype=np.float32), w[:-3]]), np.zeros_like(b))]
    x = np.zeros_like(p.x)
    x[:, :3] = np.resize(np.array(logits, np.float32), (len(x), 3))
    return params, x


@pytest.mark.parametrize("gap", [0.03, 7e-5, 1.3e-6])
def test_the_size_is_accurate_at_a_narrow_margin(gap):
    # 1 - e^-gap would lose its digits in float32; the logits themselves are exact.
    logits = [[1 + gap, 1, -1], [gap, 0, 0], [500 + gap, 500, -500], [500 + gap, -500, 500]]
    params, x = with_logits(logits)
    p = problem("linear-3", 1)
    r = everything(apply, params, x, np.zeros_like(p.y))
    for i, row in enumerate(x):
        z, jac = references.net(params, row)
        for norm in NORMS:
            found = references.alpha(z, jac, 0, norm=norm)
            check_minimal(found, r["minimal", norm][i], norm, p._replace(logits=z))
            # Where float32 can't represent the gap, the two classes tie.
            assert (found.log_size > -math.inf) == (row[0] > max(row[1:3]))


REACHED = [
    # logits, y, I
    ([1, 1, 0], 0, 1),  # a tie counts as reached
    ([1, 1, 1], 1, 0),  # the lower of two j
    ([5, 5, 0], 2, 0),  # misclassified; the lower of the two top classes
    ([0, 3, 5], 0, 2),  # misclassified; the top class isn't the lowest j
    ([-300, 499, 500], 0, 2),  # the same, with y's probability 0
]


def test_an_example_on_or_past_the_boundary_has_size_0_and_a_direction():
    p = problem("linear-3", 1)
    logits, y, classes = zip(*REACHED * (len(p.y) // len(REACHED)), strict=True)
    params, x = with_logits(logits)
    r = everything(apply, params, x, np.array(y, np.int32))
    for norm in NORMS:
        np.testing.assert_array_equal(r["minimal", norm], np.zeros_like(x))
        for i, cls in enumerate(classes):
            found = references.alpha(*references.net(params, x[i]), y[i], norm=norm)
            assert found.cls == cls
            assert closeness(r["alpha", norm][i], found.rows[cls], norm, p.slack) >= 0.9999


def test_a_tie_with_a_class_of_equal_weights_has_size_0():
    p = problem("linear-3", 1)
    ((w, _),) = p.params
    w = w[:, [0, 0, 2]]  # classes 0 and 1 tie everywhere; d_1 is 0, but it counts, not class 2
    params = [(w, np.array([1, 1, 0], np.float32))]
    r = everything(apply, params, np.zeros_like(p.x), np.zeros_like(p.y))
    for norm in NORMS:
        np.testing.assert_array_equal(r["minimal", norm], np.zeros_like(p.x))


@pytest.mark.parametrize("margin", [1, 100])
def test_of_two_equally_near_classes_the_lower_is_taken(margin):
    p = problem("linear-3", 1)
    # Inputs 0 and 1 have the same effect on classes 1 and 2. In l1 the tie is exact: its dual norm
    # needs no sum.
    w = np.zeros_like(p.params[0][0])
    w[0, 1] = w[1, 2] = 1
    params = [(w, np.array([margin, -margin, -margin], np.float32))]
    x, y = np.zeros_like(p.x), np.zeros_like(p.y)
    found = references.alpha(*references.net(params, x[0]), 0, norm="l1")
    assert found.log_sizes[1] == found.log_sizes[2]
    r = everything(apply, params, x, y)["alpha", "l1"]
    np.testing.assert_array_equal(r, np.broadcast_to(0.5 * np.eye(x.shape[1])[0], x.shape))


@pytest.mark.parametrize("scale", [1, 100])
@pytest.mark.parametrize("masked", [[0, 4, 7], [1, 2], list(range(9))])
def test_a_class_at_minus_infinity_is_ignored(scale, masked):
    p = problem("mlp-10", scale)
    mask = ~np.isin(np.arange(10), masked)
    logits = np.where(mask, p.logits, -np.inf)
    *hidden, (w, b) = p.params
    params = [*hidden, (w, np.where(mask, b, -np.inf))]
    y = np.where(np.arange(len(p.y)) % 2, p.y, logits.argmax(1)).astype(np.int32)
    r = everything(apply, params, p.x, y)
    for i, (z, jac) in enumerate(zip(logits, p.jac, strict=True)):
        fastest = references.loss_row(z, jac, y[i])
        for norm in NORMS:
            found = references.alpha(z, jac, y[i], norm=norm)
            if mask[y[i]] and mask.sum() > 1:
                check_minimal(found, r["minimal", norm][i], norm, p)
                assert direction_of(found, r["alpha", norm][i], norm, p.slack) >= 0.9999
                assert closeness(r["loss", norm][i], fastest, norm, p.slack) >= 0.9999
            else:
                for method in ("minimal", "alpha", "loss"):
                    np.testing.assert_array_equal(r[method, norm][i], 0)


@jax.jit
def derivatives(params, x, y):
    """Jacobians of r with respect to x at one example: {method: [D, D]}."""

    def methods(x):
        data = apply, params, x[None], y[None]
        return {
            "minimal": perturb.alpha(*data)[0],
            "alpha": perturb.alpha(*data, eps=0.5)[0],
            "loss": perturb.loss(*data, eps=0.5)[0],
        }

    return jax.jacrev(methods)(x)


@every_scale
def test_derivatives_of_r_match_finite_differences_of_the_reference(scale, x64):
    p = problem("mlp-3", scale)
    params = jax.tree.map(lambda a: a.astype(np.float64), p.params)
    x, y = p.x[0].astype(np.float64), p.y[0]

    def reference(x):
        z, jac = references.net(params, x)
        found = references.alpha(z, jac, y, norm="l2")
        loss = 0.5 * references.loss(z, jac, y, norm="l2")
        return {"minimal": found.r(), "alpha": found.r(0.5), "loss": loss}

    h = 1e-5 / scale  # the net is curved on a scale of 1 / scale
    steps = [(reference(x + e), reference(x - e)) for e in h * np.eye(x.size)]
    for method, got in derivatives(params, x, y).items():
        want = np.stack([(up[method] - down[method]) / (2 * h) for up, down in steps], axis=1)
        # Central differences: (h scale)^2 of truncation, 2^-53 / (h scale) of rounding.
        np.testing.assert_allclose(got, want, atol=1e-6 * np.abs(want).max(), err_msg=method)
