"""`jaxadv.losses`: margin, logit margin and DLR, against their formulas."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxadv import losses

B, K = 5, 4


# The margin


def test_cross_entropy_is_log_1_plus_e_to_the_margin(x64):
    z = np.random.default_rng(4).normal(size=(B, K)) * 3
    y = np.array([0, 3, 1, 2, 3])
    cross_entropy = np.log(np.exp(z).sum(axis=1)) - z[np.arange(B), y]
    got = np.logaddexp(0, losses.margin(jnp.asarray(z), y))
    np.testing.assert_allclose(got, cross_entropy, rtol=1e-13)


def test_the_gradient_of_cross_entropy_is_a_sigmoid_times_that_of_the_margin(x64):
    z = np.random.default_rng(5).normal(size=(B, K)) * 3
    y = np.array([0, 3, 1, 2, 3])
    a = np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)
    m, g = losses.margin(jnp.asarray(z), y), jax.grad(lambda z: losses.margin(z, y).sum())(z)
    want = a - np.eye(K)[y]
    np.testing.assert_allclose(g / (1 + np.exp(-m))[:, None], want, atol=1e-14)


def test_the_gradient_of_the_margin_vanishes_at_no_confidence():
    y = np.array([0, 3, 1, 2, 3])
    for scale in (1, 1e2, 1e4, 1e30):
        z = np.float32(scale) * np.eye(K, dtype=np.float32)[y]
        g = np.asarray(jax.grad(lambda z: losses.margin(z, y).sum())(z))
        np.testing.assert_array_equal(g[np.arange(B), y], -1)
        np.testing.assert_allclose(g.sum(axis=1), 0, atol=1e-6)


def test_the_margin_is_minus_infinity_if_all_wrong_classes_are_masked():
    z = np.array([[-np.inf, 2, -np.inf], [1, 2, -np.inf]], np.float32)
    np.testing.assert_array_equal(losses.margin(jnp.asarray(z), np.array([1, 0])), [-np.inf, 1])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("name", ["margin", "logit_margin", "dlr", "targeted_dlr"])
def test_losses_of_narrow_logits_are_in_float32(name, dtype, strict_dtypes):
    loss = getattr(losses, name)
    if name == "targeted_dlr":
        loss = functools.partial(loss, target=np.array([2]))
    z = jnp.asarray([[11.0, 0.1, 3.3, -2.7]], dtype)
    got = loss(z, np.array([0]))
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, loss(z.astype(jnp.float32), np.array([0])), rtol=1e-6)


# The logit margin


def test_the_logit_margin_is_the_top_wrong_class_s_lead_over_the_label():
    z = jnp.array([[3.0, 1, 2], [1, 5, -jnp.inf], [1e4, 1e4, 0], [2, 7, 1]])
    np.testing.assert_array_equal(losses.logit_margin(z, jnp.array([0, 0, 1, 1])), [-1, 4, 0, -5])


# DLR


def dlr_of(z, y):
    z = np.asarray(z, np.float64)
    top = np.sort(z, axis=1)[:, ::-1]
    own = z[np.arange(len(y)), y]
    other = np.array([np.delete(row, k).max() for row, k in zip(z, y, strict=True)])
    return -(own - other) / (top[:, 0] - top[:, 2])


def targeted_dlr_of(z, y, t):
    z, rows = np.asarray(z, np.float64), np.arange(len(y))
    top = np.sort(z, axis=1)[:, ::-1]
    return -(z[rows, y] - z[rows, t]) / (top[:, 0] - (top[:, 2] + top[:, 3]) / 2)


def logits_and_labels(scale=1.0):
    rng = np.random.default_rng(2)
    z = (scale * rng.normal(size=(50, K))).astype(np.float32)
    return z, rng.integers(K, size=50), rng.integers(K, size=50)


@pytest.mark.parametrize("scale", [1e-4, 1, 1e4])
def test_dlr_is_its_formula(scale):
    z, y, t = logits_and_labels(scale)
    # Three differences, rounded relative to the largest logit.
    np.testing.assert_allclose(losses.dlr(z, y), dlr_of(z, y), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(
        losses.targeted_dlr(jnp.asarray(z), jnp.asarray(y), target=jnp.asarray(t)),
        targeted_dlr_of(z, y, t),
        rtol=1e-4,
        atol=1e-6,
    )


def test_dlr_is_positive_where_misclassified_and_at_least_minus_1_elsewhere():
    z, y, _ = logits_and_labels()
    loss = np.asarray(losses.dlr(z, y))
    np.testing.assert_array_equal(loss > 0, z.argmax(axis=1) != y)
    assert (loss[z.argmax(axis=1) == y] >= -1).all()


@pytest.mark.parametrize("loss", ["dlr", "targeted"])
def test_dlr_does_not_change_when_logits_are_shifted_or_scaled(loss):
    z, y, t = logits_and_labels()
    fn = (
        losses.dlr
        if loss == "dlr"
        else functools.partial(losses.targeted_dlr, target=jnp.asarray(t))
    )
    want = fn(jnp.asarray(z), jnp.asarray(y))
    for other in (z + 3, 100 * z, 0.01 * z - 5):
        # A shift of 5 costs logits of 0.01 three of their seven digits.
        np.testing.assert_allclose(fn(jnp.asarray(other), jnp.asarray(y)), want, atol=2e-3)


@pytest.mark.parametrize("value", [0.0, 1e4, -1e4, 3e38])
@pytest.mark.parametrize("loss", ["dlr", "targeted"])
def test_where_all_logits_tie_dlr_is_0_with_a_finite_gradient(loss, value):
    z, y = jnp.full((2, K), value), jnp.array([0, 3])
    fn = (
        losses.dlr
        if loss == "dlr"
        else functools.partial(losses.targeted_dlr, target=jnp.array([1, 1]))
    )
    np.testing.assert_array_equal(fn(z, y), 0)
    assert np.isfinite(jax.grad(lambda z: fn(z, y).sum())(z)).all()


@pytest.mark.parametrize("name", losses.__all__)
@pytest.mark.parametrize(
    ("logits", "labels", "error", "match"),
    [
        (jnp.zeros((2, 3)), jnp.zeros(2), TypeError, "expected integer labels"),
        (jnp.zeros((2, 1)), jnp.zeros(2, int), ValueError, "logits of at least 2 classes"),
        (jnp.zeros(2), jnp.zeros(2, int), ValueError, r"logits of shape \[2, K\], got \(2,\)"),
        (jnp.zeros((2, 3), int), jnp.zeros(2, int), TypeError, "floating-point logits, got int32"),
        ([[0.0, 1.0]], jnp.zeros(1, int), TypeError, "got list"),
    ],
)
def test_logits_and_labels_are_checked(name, logits, labels, error, match):
    targets = {"target": labels} if name == "targeted_dlr" else {}
    with pytest.raises(error, match=match):
        getattr(losses, name)(logits, labels, **targets)


def test_dlr_with_two_and_three_classes():
    z, y, t = jnp.array([[3.0, 1, 2], [0, 5, 7]]), jnp.array([0, 1]), jnp.array([2, 0])
    np.testing.assert_allclose(losses.dlr(z, y), [-1 / 2, 2 / 7])
    np.testing.assert_allclose(losses.targeted_dlr(z, y, target=t), [-1 / 2, -5 / 7])
    np.testing.assert_array_equal(losses.dlr(z[:, :2], y), [-2, -5])
    np.testing.assert_array_equal(losses.targeted_dlr(z[:, :2], y, target=1 - y), [-2, -5])


def test_in_dlr_masked_classes_count_as_absent():
    z, y, t = np.float32([[3, 1, 2, 0], [0, 5, 7, 4]]), jnp.array([0, 1]), jnp.array([2, 0])
    for k in (4, 3, 2):
        few, target = z[:, :k], jnp.minimum(t, k - 1)
        masked = np.pad(few, ((0, 0), (0, 3)), constant_values=-np.inf)
        np.testing.assert_array_equal(losses.dlr(masked, y), losses.dlr(few, y))
        got = losses.targeted_dlr(masked, y, target=target)
        np.testing.assert_array_equal(got, losses.targeted_dlr(few, y, target=target))


@pytest.mark.parametrize("loss", [losses.dlr, functools.partial(losses.targeted_dlr, target=[1])])
def test_in_float16_dlr_has_a_gradient_if_classes_are_masked(loss):
    z = jnp.array([[2.0, 1.0, -jnp.inf, -jnp.inf]], jnp.float16)
    g = jax.grad(lambda z: jnp.sum(loss(z, jnp.array([0]))))(z)
    np.testing.assert_array_equal(g, np.float16([[-1, 1, 0, 0]]))
