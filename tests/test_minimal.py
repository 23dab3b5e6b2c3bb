"""What the searches for a smallest perturbation, `deepfool` and `fmn`, have in common."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from nets import distances, linear, linear_problem, misled
from references import ORDER, lengths

from jaxadv import attack

B = 60
ATTACKS = {
    "fmn": jax.jit(attack.fmn, static_argnums=0, static_argnames=("norm", "steps")),
    "deepfool": jax.jit(attack.deepfool, static_argnums=0, static_argnames=("norm", "steps")),
}
both = pytest.mark.parametrize("fn", ATTACKS.values(), ids=ATTACKS)
every_norm = pytest.mark.parametrize("norm", ORDER)


@every_norm
@pytest.mark.parametrize("n_classes", [2, 10])
@both
def test_r_is_the_distance_to_the_nearest_hyperplane(fn, n_classes, norm):
    params, x, y = linear_problem(n_classes, seed=n_classes)
    r = fn(linear, params, x, y, norm=norm)
    to_each = distances(params, x, y, norm)
    assert misled(linear, params, x, y, r).all()
    np.testing.assert_allclose(lengths(r, norm), to_each.min(axis=1), rtol=0.01)
    assert (lengths(r, norm) >= to_each.min(axis=1)).all()
    # The nearest class isn't always the top wrong class.
    z = np.where(np.eye(n_classes, dtype=bool)[y], -np.inf, linear(params, x))
    assert (to_each.argmin(axis=1) != z.argmax(axis=1)).any() == (n_classes > 2)


@both
def test_examples_that_a_convolutional_net_misclassifies_need_no_perturbation(fn):
    # In a loop such a net is compiled to another program, which rounds differently.
    rng = np.random.default_rng(0)
    params = [rng.normal(size=(5, 5, *io)).astype(np.float32) / 5 for io in ((1, 8), (8, 4))]

    def net(params, x):
        for kernel in params:
            x = jnp.tanh(
                jax.lax.conv_general_dilated(
                    x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
                )
            )
        return x.sum(axis=(1, 2))

    x = rng.random((64, 12, 12, 1)).astype(np.float32)
    y = np.asarray(net(params, x)).argmin(axis=1)
    np.testing.assert_array_equal(fn(net, params, x, y, norm="l2", steps=5), 0)


@both
def test_the_wrong_class_leads_by_more_than_rounding(fn):
    params, x, y = linear_problem(2, seed=2)
    w, b = (p.astype(np.float64) for p in params)
    before = x.astype(np.float64) @ w + b
    z = (x.astype(np.float64) + np.asarray(fn(linear, params, x, y, norm="l2"))) @ w + b
    lead, gap = (np.where(y == 0, 1, -1) * (a[:, 1] - a[:, 0]) for a in (z, before))
    assert (gap < 0).all()
    assert (lead >= -5e-5 * gap).all()


@both
def test_r_is_0_where_x_is_misclassified_by_no_more_than_rounding(fn):
    params, x, _ = linear_problem(2, seed=2)
    w, b = 0 * params[0], np.array([100, np.nextafter(np.float32(100), 101)], np.float32)
    w[0] = 1, -1
    x[:, 0] = 0
    r = fn(linear, (w, b), x, np.zeros(B, np.int32), norm="l2")
    np.testing.assert_array_equal(r, 0)


@both
def test_in_l1_the_largest_entries_go_to_the_bounds_of_the_box_first(fn):
    rng = np.random.default_rng(0)
    n, room = 20, 0.1
    w = rng.normal(size=(n, 2)).astype(np.float32)
    x = np.full((B, n), 1 - room, np.float32)
    y = rng.integers(2, size=B)
    away = (w.T[1] - w.T[0]).astype(np.float64)
    best = np.sort(np.abs(away))[::-1]
    # So far from x that the best entries reach their bounds and one more goes part of the way.
    entries = np.linspace(0.5, 8, B)
    most = np.concatenate([[0], room * np.cumsum(best)])
    gap = np.interp(entries, np.arange(n + 1), most)
    b = np.where(y == 0, -gap, gap) - x.astype(np.float64) @ away

    def net(w, x):  # the last entry, which is fixed, shifts the boundary
        s = x[:, :-1] @ (w[:, 1] - w[:, 0]) + x[:, -1]
        return jnp.stack([jnp.zeros_like(s), s], axis=1)

    def beside(entries):
        return np.concatenate([entries, b[:, None]], axis=1).astype(np.float32)

    at = beside(x)
    bounds = beside(np.full((B, n), 0.8)), beside(np.full((B, n), 1.0))
    r = np.asarray(fn(net, w, at, y, norm="l1", bounds=bounds))
    assert (np.asarray(net(w, at + r)).argmax(axis=1) != y).all()
    # Bisection and FMN each overshoot the boundary by at most a thousandth of the distance.
    np.testing.assert_allclose(lengths(r, "l1"), room * entries, rtol=0.01)


@both
def test_a_boundary_beyond_which_the_lead_stays_small_is_found(fn):
    def net(w, x):  # class 0 leads by 100 at x; class 1 never by more than 5e-3
        s = jnp.sum(x, axis=1)
        ahead = -100 + 10 * s
        return jnp.stack([jnp.zeros_like(s), jnp.minimum(ahead, 5e-3)], axis=1)

    x = np.zeros((1, 2), np.float32)
    r = np.asarray(fn(net, 0.0, x, np.array([0]), norm="l2"))
    assert int(net(0.0, x + r).argmax()) == 1
    np.testing.assert_allclose(lengths(r, "l2"), 10 / np.sqrt(2), rtol=0.03)


@every_norm
@pytest.mark.parametrize("gap", [0.1, 0.3])
@both
def test_a_class_that_the_box_makes_unreachable_does_not_hide_another(fn, gap, norm):
    def net(gap, x):  # class 1 would be nearest if the first entry weren't at its bound
        return jnp.stack([0 * x[:, 0], -gap - 10 * x[:, 0], x[:, 1] - 0.7], axis=1)

    x = np.array([[0.0, 0.5]], np.float32)
    r = np.asarray(fn(net, np.float32(gap), x, np.array([0]), norm=norm, bounds=(0.0, 1.0)))
    assert int(net(gap, x + r).argmax()) == 2
    np.testing.assert_allclose(lengths(r, norm), 0.2, rtol=0.01)


@both
def test_the_boundary_is_crossed_whichever_class_wins_a_tie(fn):
    # On the hyperplane itself, argmax gives class 0, and no rounding error leads off it.
    x, y = np.array([[1.0, 0], [-1, 0]], np.float32), np.array([0, 1])
    w = np.array([[1.0, -1], [0, 0]], np.float32)
    r = fn(linear, (w, np.zeros(2, np.float32)), x, y, norm="linf")
    np.testing.assert_allclose(lengths(r, "linf"), 1, rtol=0.01)


@pytest.mark.parametrize("bounds", [None, (-9.0, 9.0)], ids=["free", "box"])
@both
def test_a_masked_class_is_no_target(fn, bounds):
    def net(b, x):  # near 0 only class 2, which is masked, has a gradient; class 1 wins from 3.5 on
        flat = jnp.maximum(x[:, 0] - 3, 0)
        return jnp.stack([5 - 10 * flat, 0 * flat, 2 * x[:, 0]], axis=1) + b[None]

    x, y = np.zeros((2, 3), np.float32), np.zeros(2, int)
    r = fn(net, np.array([0, 0, -np.inf], np.float32), x, y, norm="l2", bounds=bounds)
    np.testing.assert_array_equal(r, 0)


EXACTLY_ON = {
    "fmn": attack.fmn,
    "ddn": attack.ddn,
    "fab": attack.fab,
    "deepfool": attack.deepfool,
    "probabilities": partial(attack.deepfool, output="probabilities"),
    "searched": partial(attack.apgd, eps=None, key=jax.random.key(0)),
    "searched targets": partial(attack.apgd_multitargeted, eps=None, key=jax.random.key(0)),
}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", EXACTLY_ON)
def test_a_point_exactly_on_the_boundary_is_moved_across(name, dtype):
    """There the distance to the linearised boundary is 0, and so would be a step that long."""
    w = jnp.array([[3.0, -3.0], [4.0, -4.0]], dtype)
    params, x = (w, jnp.zeros(2, dtype)), jnp.array([[0.0, 0.0], [4.0, -3.0]], dtype)
    assert (linear(params, x) == 0).all()
    r = np.asarray(EXACTLY_ON[name](linear, params, x, jnp.zeros(2, int)), np.float64)
    assert (r @ np.array([3.0, 4.0]) < 0).all()
    assert (np.abs(r) < 0.03).all()


def test_ddn_recognises_a_success_that_masks_the_true_class():
    def net(drop, x):
        g = x[:, 0] + 4 * jnp.tanh(x[:, 0]) * x[:, 1]
        return jnp.stack([3 - g - jnp.where(g > 1, drop, 0), jnp.zeros_like(g)], axis=1)

    x, y = jnp.zeros((1, 2)), jnp.zeros(1, int)
    masked, low = (lengths(attack.ddn(net, drop, x, y), "l2") for drop in (jnp.inf, 1e4))
    np.testing.assert_allclose(masked, low, rtol=0.01)
