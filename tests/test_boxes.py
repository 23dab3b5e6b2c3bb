"""`jaxadv.boxes`: ball, box and hyperplane together, against slow references."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references
from references import NORMS, lengths

from jaxadv import boxes
from jaxadv.boxes import drop_blocked, project_ball_and_box

D = 5

every_norm = pytest.mark.parametrize("norm", NORMS)
to_plane = jax.jit(boxes.project_hyperplane_in_box, static_argnums=4)


# The hyperplane and the box


@functools.cache
def planes():
    """Hyperplanes, and boxes around 0; the last ten hyperplanes don't meet their box."""
    rng = np.random.default_rng(2)
    n, _ = shape = 60, 12
    w = rng.normal(size=shape) * rng.choice([0, 1e-2, 1], p=[0.2, 0.2, 0.6], size=shape)
    w[0, 1:] = 0
    w[1:6] = np.sign(w[1:6])  # all entries tie

    def wall():  # at 0 (as for black pixels), near, or too far to matter
        return rng.uniform(0.05, 1, size=shape) * rng.choice(
            [0, 1, 1e3], p=[0.3, 0.6, 0.1], size=shape
        )

    lower, upper = -wall(), wall()
    most = np.where(w > 0, w * upper, w * lower).sum(axis=1)
    c = np.linspace(0, 0.9, n) * np.minimum(most, 4)
    c[-10:] = 1.5 * most[-10:]
    return tuple(a.astype(np.float32) for a in (w, c, lower, upper))


@every_norm
def test_the_projection_onto_the_hyperplane_is_feasible_and_optimal(norm):
    w, c, lower, upper = planes()
    sign = np.resize([1, -1], len(c)).astype(np.float32)  # the hyperplane may be on either side
    got = to_plane(w * sign[:, None], c * sign, lower, upper, norm)
    assert (got >= lower).all()
    assert (got <= upper).all()
    w, c, lower, upper, got = (np.asarray(a, np.float64) for a in (w, c, lower, upper, got))
    reached = (w * got).sum(axis=1)
    np.testing.assert_allclose(reached[:-10], c[:-10], rtol=2e-6, atol=1e-6)
    want = [references.to_plane(*row, norm) for row in zip(w, c, lower, upper, strict=True)]
    np.testing.assert_array_equal(np.isinf(want), np.arange(len(c)) >= len(c) - 10)
    np.testing.assert_allclose(lengths(got, norm)[:-10], want[:-10], rtol=1e-5, atol=1e-6)
    # The nearest corner; entries that gain nothing stay where they are.
    corner = np.where(w > 0, upper, np.where(w < 0, lower, 0))
    np.testing.assert_array_equal(got[-10:], corner[-10:])


@every_norm
@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_the_projection_onto_the_hyperplane_does_not_depend_on_the_scale_of_the_net(norm, scale):
    w, c, lower, upper = planes()
    want = to_plane(w, c, lower, upper, norm)
    got = to_plane(w * np.float32(scale), c * np.float32(scale), lower, upper, norm)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


@every_norm
def test_the_projection_onto_the_hyperplane_takes_infinite_boxes_and_normals_of_zero(norm):
    w, c, _, _ = (np.zeros_like(a) for a in planes())
    w[0, :3], w[2], c[:2] = [2, -1, 0], 1, 3
    wall = np.full_like(w, np.inf)
    w[3, :2], c[3], wall[3] = 2e-38, 1e5, 0.5  # farther than the largest float
    got = to_plane(w, c, -wall, wall, norm)
    want = np.zeros_like(w)
    want[3, :2] = 0.5
    want[0, :2] = {"l1": [1.5, 0], "l2": [1.2, -0.6], "linf": [1, -1]}[norm]
    np.testing.assert_allclose(got, want, rtol=1e-6)


# The ball and the box


def project_l1(r, eps):
    """The projection of one example onto the l1 ball, by sorting."""
    if np.abs(r).sum() <= eps:
        return r
    falling = np.sort(np.abs(r))[::-1]
    excess = (np.cumsum(falling) - eps) / np.arange(1, r.size + 1)
    return np.sign(r) * np.maximum(np.abs(r) - excess[falling >= excess][-1], 0)


def dykstra(r, x, eps, lo, hi):
    """The nearest point of the intersection, by alternating projections with memory."""
    p = q = np.zeros_like(r)
    for _ in range(3000):
        ball = project_l1(r + p, eps)
        p = r + p - ball
        r = np.clip(ball + q, lo - x, hi - x)
        q = ball + q - r
    return r


def test_the_nearest_point_of_the_l1_ball_and_the_box():
    rng = np.random.default_rng(4)
    n = 20
    x = rng.uniform(-1, 1, (n, D)).astype(np.float32)
    x[:, 0] = 1  # on a face
    r = (2 * rng.normal(size=(n, D))).astype(np.float32)
    eps = np.linspace(0, 5, n).astype(np.float32)
    got = np.asarray(project_ball_and_box(r, x, jnp.asarray(eps), "l1", (-1.0, 1.0)))
    want = [dykstra(*map(np.float64, (r[i], x[i], eps[i])), -1, 1) for i in range(n)]
    np.testing.assert_allclose(got, want, atol=2e-5)  # Dykstra's own precision
    assert (np.abs(got.astype(np.float64)).sum(axis=1) <= eps * (1 + 1e-6)).all()
    assert (np.abs(x + got) <= 1).all()
    # In some of these cases, projecting onto the ball and then the box gives another point.
    naive = np.clip(x + [project_l1(*pair) for pair in zip(r, eps, strict=True)], -1, 1) - x
    assert (np.abs(naive - got).max(axis=1) > 0.1).mean() > 0.3


def test_a_point_inside_the_l1_ball_and_the_box_stays_where_it_is():
    x, r = np.full((1, 4), 0.5, np.float32), np.array([[0.25, -0.5, 0, 0.125]], np.float32)
    got = project_ball_and_box(r, x, jnp.array([1.0]), "l1", (0.0, 1.0))
    np.testing.assert_array_equal(got, r)


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_the_limits_span_the_box_and_contain_0(dtype):
    x = jnp.asarray([[-1.0, 0.25, 0.2, 3.0]], dtype)  # the last entry is out of the box
    lower, upper = boxes.box_limits(x, (-1.0, 0.25))
    assert lower.dtype == upper.dtype == jnp.float32
    near = np.asarray(x, np.float32)
    np.testing.assert_array_equal(lower, np.minimum(-1 - near, 0))
    np.testing.assert_array_equal(upper, np.maximum(np.float32(0.25) - near, 0))


def test_the_farthest_corner_of_the_box_is_across_in_each_entry():
    x = jnp.array([[1.0, 4.0], [2.0, 2.0]])
    bounds = jnp.array([0.0, 0.0]), jnp.array([4.0, 5.0])
    for norm, want in {"l1": [7.0, 5.0], "l2": [5.0, 13**0.5], "linf": [4.0, 3.0]}.items():
        np.testing.assert_allclose(boxes.farthest(x, bounds, norm), want, rtol=1e-6)


def test_a_gradient_keeps_the_entries_that_the_box_does_not_block():
    x = np.array([[0.0, 0.0, 1.0, 1.0, 0.5, 0.2]], np.float32)
    r = np.array([[0.0, 0.0, 0.0, 0.0, 0.5, -0.2]], np.float32)
    ascent = np.array([[-3.0, 3.0, -2.0, 2.0, 1.0, -1.0]], np.float32)
    got = drop_blocked(ascent, r, x, (0.0, 1.0))
    np.testing.assert_array_equal(got, [[0, 3, -2, 0, 0, 0]])
    np.testing.assert_array_equal(drop_blocked(ascent, r, x, None), ascent)


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_an_entry_at_its_bound_is_blocked(dtype):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.uniform(-1, 0.2, (20, D)), dtype)
    far = project_ball_and_box(9 * jnp.ones_like(x), x, jnp.full(20, 100.0), "l1", (-1.0, 0.2))
    got = drop_blocked(np.ones((20, D), np.float32), far, x, (-1.0, 0.2))
    np.testing.assert_array_equal(got, 0)
