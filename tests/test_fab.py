"""`jaxadv.attack.fab` against exact distances; test_contract tests what attacks have in common.

Compilation dominates the run time. So all tests use one shape and one net, which takes everything
that a test changes as parameters, and share the programs that `fab` itself compiles: one for each
norm, with and without a box, eps and keys.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references
from references import NORMS, lengths

from jaxadv import attack
from jaxadv.attack import fab

B, D, H, K = 6, 5, 8, 4
KEYS = jax.random.split(jax.random.key(9), B)
BOX = (-1.0, 1.0)
HUGE = (-100.0, 100.0)  # the program with a box, but bounds that are never reached

every_norm = pytest.mark.parametrize("norm", NORMS)
boxes = pytest.mark.parametrize("bounds", [None, BOX], ids=["free", "box"])


passes = []  # the points at which `net` was evaluated


def net(params, x):
    """A tanh or a linear net; where x[0] exceeds an example's `edge`, the logits are `beyond`."""
    jax.debug.callback(lambda x: passes.append(np.array(x)), x)
    x = x.astype(params["w"].dtype)
    h = x @ params["w"]
    z = jnp.where(params["curved"], jnp.tanh(h), h) @ params["v"] + params["c"]
    beyond = params["beyond"] + jnp.where(params["added"], z, 0)
    return jnp.where((x[:, 0] > params["edge"])[:, None], beyond, z)


def parameters(w, v, c=0.0, curved=False):
    return {
        "w": np.asarray(w, np.float32),
        "v": np.asarray(v, np.float32),
        "c": np.broadcast_to(np.asarray(c, np.float32), (B, K)),
        "curved": np.array(curved),
        "edge": np.full(B, np.inf, np.float32),
        "beyond": np.zeros((B, K), np.float32),
        "added": np.array(False),  # is `beyond` added to the logits or put in their place?
    }


def problem(seed=0, curved=True):
    """A problem whose examples are all classified correctly, by a lead of at least 0.2."""
    rng = np.random.default_rng(seed)
    params = parameters(rng.normal(size=(D, H)), rng.normal(size=(H, K)), curved=curved)
    rows = []
    while len(rows) < B:
        x = rng.uniform(-1, 1, size=(B, D)).astype(np.float32)
        first, second = np.sort(np.asarray(net(params, x)))[:, :-3:-1].T
        rows.extend(x[first - second > 0.2])
    x = np.array(rows[:B])
    return params, x, np.asarray(net(params, x)).argmax(axis=1)


def with_rows(params, name, row, value):
    return params | {name: references.edited(params[name], row, value)}


def lead(params, x, y, r):
    """By how much the top wrong class leads at x + r."""
    z = np.array(net(params, x + r), np.float64)
    rows = np.arange(B)
    z_y = z[rows, y].copy()
    z[rows, y] = -np.inf
    return z.max(axis=1) - z_y


# How small r is


def distances(params, x, y, norm, bounds):
    """Each x's distance to the nearest class of a linear net, in float64; inf if out of the box."""
    w = params["w"].astype(np.float64) @ params["v"]
    z = x @ w + params["c"]
    low, high = (-1e3, 1e3) if bounds is None else bounds
    found = np.full((B, K), np.inf)
    for i, j in np.ndindex(B, K):
        if j != y[i] and z[i, j] > -np.inf:
            away = w[:, j] - w[:, y[i]]
            found[i, j] = references.to_plane(
                away, z[i, y[i]] - z[i, j], low - x[i], high - x[i], norm
            )
    return found.min(axis=1)


@every_norm
@boxes
@pytest.mark.parametrize("n_classes", [2, 4])
def test_on_a_linear_net_r_is_minimal_to_1_percent(norm, bounds, n_classes):
    met = 0
    for seed in range(6):
        params, x, y = problem(seed, curved=False)
        if n_classes == 2:
            params = with_rows(params, "c", (slice(None), slice(2, None)), -np.inf)
            y = np.asarray(net(params, x)).argmax(axis=1)
        want = distances(params, x, y, norm, bounds)
        r = fab(net, params, x, y, norm=norm, steps=30, bounds=bounds)
        size = lengths(r, norm)
        found = size > 0
        # A boundary that only cuts off a corner of the box is missed by overshooting by 5%.
        assert found.sum() >= np.isfinite(want).sum() - 1
        assert not found[np.isinf(want)].any()
        assert (lead(params, x, y, r)[found] > -1e-5).all()
        np.testing.assert_array_less(size[found], 1.01 * want[found] + 1e-6)
        np.testing.assert_array_less(0.9999 * want[found] - 1e-6, size[found])
        if bounds is not None:
            met += (np.abs(x + r) > 1 - 1e-6).sum()
    assert bounds is None or met > 0  # some bounds are active


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_r_is_no_larger_than_the_smallest_ball_in_which_pgd_succeeds(norm):
    params, x, y = problem()
    low, high = np.zeros(B, np.float32), np.full(B, 4, np.float32)
    want = np.full(B, np.inf)
    for _ in range(9):
        eps = (low + high) / 2
        r = attack.pgd(net, params, x, y, eps=eps, norm=norm, steps=60, bounds=BOX)
        hit = lead(params, x, y, r) > 0
        want = np.where(hit, np.minimum(want, lengths(r, norm)), want)
        low, high = np.where(hit, low, eps), np.where(hit, eps, high)
    assert np.isfinite(want).all()
    r = fab(net, params, x, y, norm=norm, steps=60, bounds=BOX)
    assert (lengths(r, norm) > 0).all()
    assert (lengths(r, norm) <= 1.02 * want).all()
    assert (lead(params, x, y, r) > -1e-5).all()


@every_norm
@pytest.mark.parametrize("bounds", [None, HUGE], ids=["free", "box"])
def test_one_step_goes_eta_times_the_distance_and_its_end_counts(norm, bounds):
    params, x, y = problem(curved=False)
    params["c"] = np.where(np.arange(K) == y[:, None], 0, -np.inf).astype(np.float32)
    params["c"][np.arange(B), (y + 1) % K] = 0  # one target only
    want = distances(params, x, y, norm, None)
    for eta in (1.05, 1.3):
        r = fab(net, params, x, y, norm=norm, steps=1, eta=eta, bounds=bounds)
        np.testing.assert_allclose(lengths(r, norm), eta * want, rtol=2e-5)


@every_norm
@pytest.mark.parametrize(("alpha_max", "alpha"), [(0.3, 0.3), (1.0, 0.475 / 1.475), (0.0, 0.0)])
def test_the_second_step_starts_at_beta_r_and_is_pulled_back_by_alpha(norm, alpha_max, alpha):
    # x + r stays on one line through x, so sizes add up; the distance is 1.
    params = parameters(np.eye(D, H), np.eye(H, K, 0) * 0, np.array([0, -1, -np.inf, -np.inf]))
    params["v"][:D, 1] = [2, 0, 0, 0, 0]
    params["c"] = params["c"] * np.array([1, 2, 1, 1], np.float32)
    x, y = np.zeros((B, D), np.float32), np.zeros(B, int)
    r = fab(net, params, x, y, norm=norm, steps=2, beta=0.5, alpha_max=alpha_max, bounds=HUGE)
    # From 1.05 back to 0.525, then forward by 1.05 times 0.475.
    second = (1 - alpha) * (0.525 + 1.05 * 0.475) + alpha * 1.05
    np.testing.assert_allclose(lengths(r, norm), second, rtol=2e-6)


# Targets


def two_ways():
    """At 0, class 1 is the top wrong class, at distance 10; class 2 is at distance 1."""
    v = np.zeros((H, K))
    v[:2, 1:3] = [[0.1, 0], [0, 2]]
    params = parameters(np.eye(D, H), v, [0, -1, -2, -np.inf])
    return params, np.zeros((B, D), np.float32), np.zeros(B, int)


def test_the_top_wrong_classes_are_targeted():
    params, x, y = two_ways()
    params = with_rows(params, "c", (0, 1), -np.inf)  # here class 2 is the top wrong class
    r = fab(net, params, x, y, n_targets=1, steps=20)
    np.testing.assert_allclose(r[:2, :2], [[0, 1], [10, 0]], rtol=0.01, atol=0.02)
    for n_targets in (2, 3, 9):
        r = fab(net, params, x, y, n_targets=n_targets, steps=20)
        np.testing.assert_allclose(r[:2, :2], [[0, 1], [0, 1]], rtol=0.01, atol=0.02)


@pytest.mark.parametrize("bounds", [None, HUGE], ids=["free", "box"])
def test_classes_masked_at_x_or_on_the_way_are_handled(bounds):
    params, x, y = two_ways()
    params = with_rows(params, "c", (slice(None), 2), -np.inf)  # only class 1 is left
    params["edge"] = np.array([5, 5, 5, 5, -1, np.inf], np.float32)
    params["beyond"] = np.zeros((B, K), np.float32)
    params["beyond"][:4, 1:] = [
        [-np.inf, -np.inf, -np.inf],  # all wrong classes are masked
        [-np.inf, -np.inf, 1],  # only another class leads
        [-1, -1, -1],  # no wrong class leads
        [1, 0, 0],
    ]
    params["beyond"][4] = [0, -np.inf, -np.inf, -np.inf]  # no target from the start
    r = fab(net, params, x, y, steps=20, bounds=bounds)
    assert (lengths(r, "l2")[[0, 2, 4]] == 0).all()
    # Being misclassified as any class counts; r is then scaled back by 0.9 until the edge.
    assert 5 < r[1, 0] < 5.6
    assert 5 < r[3, 0] < 5.6
    np.testing.assert_allclose(r[5], [10, 0, 0, 0, 0], rtol=0.01)


@every_norm
@pytest.mark.parametrize("bounds", [None, HUGE], ids=["free", "box"])
def test_where_the_target_is_masked_on_the_way_r_is_still_shortened(norm, bounds):
    params, x, y = two_ways()
    params["edge"][:], params["beyond"][:], params["added"] = 5, [0, -np.inf, 3, 0], True
    r = fab(net, params, x, y, norm=norm, steps=20, n_targets=1, bounds=bounds)
    # On the way to class 1 at 10, class 2 wins from 5 on.
    assert (r[:, 0] > 5).all()
    assert (r[:, 0] < 5 / 0.9).all()


# The ball


@pytest.mark.parametrize(
    ("norm", "bounds"), [("l1", BOX), ("l2", BOX), ("linf", BOX), ("l2", None)]
)
def test_with_eps_r_is_in_the_ball_and_succeeds_where_the_minimal_one_fits(norm, bounds):
    params, x, y = problem()
    least_r = fab(net, params, x, y, norm=norm, steps=12, bounds=bounds)
    least_size = lengths(least_r, norm)
    assert (least_size > 0).all()
    factor = np.array([0, 0.3, 0.7, 0.9, 1.1, 2])
    eps = (factor * least_size).astype(np.float32)
    r = fab(net, params, x, y, eps=eps, norm=norm, steps=12, bounds=bounds)
    size = lengths(r, norm)
    assert (size <= eps * (1 + 1e-6)).all()
    np.testing.assert_array_equal(r[0], 0)
    np.testing.assert_allclose(size[1:4], eps[1:4], rtol=1e-5)  # those that don't fit are projected
    if norm == "l2":
        np.testing.assert_allclose(r[1:4], factor[1:4, None] * least_r[1:4], rtol=1e-4, atol=1e-5)
    assert (lead(params, x, y, r)[4:] > -1e-5).all()
    # A scalar is every example's eps; a negative traced one counts as 0.
    r = fab(net, params, x, y, eps=0.1, norm=norm, steps=12, bounds=bounds)
    assert (lengths(r, norm) <= 0.1 * (1 + 1e-6)).all()
    r = fab(net, params, x, y, eps=jnp.float32(-1), norm=norm, steps=12, bounds=bounds)
    np.testing.assert_array_equal(r, 0)


def test_the_loops_end_when_every_example_is_done():
    params, x, y = problem(curved=False)

    def count(params=params, y=y, **kwargs):
        passes.clear()
        jax.block_until_ready(fab(net, params, x, y, steps=7, **kwargs))
        jax.effects_barrier()
        return len(passes)

    # One pass at x; for each target, one for each step and one at the end of the last.
    assert count() == 1 + 3 * (7 + 1)
    assert count(n_targets=2) == 1 + 2 * (7 + 1)
    assert count(y=(y + 1) % K) == 1
    assert count(eps=1e-6) == 1 + 3 * (7 + 1)  # nothing is ever found
    # The first step crosses the boundary, the second finds that out; then the final check.
    assert count(eps=1e6) == 1 + 2 + 1
    assert count(eps=0.0) == 1
    # An example that can't be attacked needs no pass, and a missing target no steps.
    y_alone = np.where(np.arange(K) == y[0], 0, -np.inf)
    assert count(with_rows(params, "c", 0, y_alone), eps=1e6) == 1 + 2 + 1
    two = np.where(
        (np.arange(K) == y[:, None]) | (np.arange(K) == (y[:, None] + 1) % K), 0, -np.inf
    )
    assert count(params | {"c": two.astype(np.float32)}) == 1 + (7 + 1) + 1 + 1


def test_an_example_that_is_done_does_not_depend_on_how_long_others_take():
    params, x, y = problem()
    together = fab(net, params, x, y, eps=3.0, steps=12)
    assert (lengths(together, "l2") > 1.1 * lengths(fab(net, params, x, y, steps=12), "l2")).any()
    for i in range(B):
        eps = np.where(np.arange(B) == i, 3, 1e-3).astype(np.float32)  # the others never finish
        r = fab(net, params, x, y, eps=eps, steps=12)
        np.testing.assert_array_equal(r[i], together[i])


# Rows


@every_norm
@boxes
def test_without_a_gradient_a_step_does_not_move(norm, bounds):
    params, x, y = problem()
    x[:] = 0
    params = parameters(np.eye(D, H), 0 * params["v"], [0, -0.75, -2, -2])
    params["v"][0, 1] = 1
    y[:] = 0
    # The first net is flat everywhere; the second where x[0] > 0.5, where class 1 leads.
    params["edge"][:2] = -9, 0.5
    params["beyond"][:2] = [[1, 0, 0, 0], [0, 1, 0, 0]]
    r = fab(net, params, x, y, norm=norm, steps=2, bounds=bounds)
    # One step to 1.05 times 0.75; on the plateau, the backward step goes to 0.9 times that.
    want = np.zeros((2, D))
    want[1, 0] = 0.9 * 1.05 * 0.75
    np.testing.assert_allclose(r[:2], want, rtol=1e-5)
    assert (lengths(r, norm)[2:] > 0.75).all()


@every_norm
@pytest.mark.parametrize("bounds", [None, HUGE], ids=["free", "box"])
def test_a_point_where_the_logits_are_nan_is_not_misclassified(norm, bounds):
    params, x, y = two_ways()
    params = with_rows(params, "c", (slice(None), 2), -np.inf)  # class 1, from 10 on
    params["edge"][:2] = 9
    params["beyond"][:2, 1] = np.nan, np.inf
    r = fab(net, params, x, y, norm=norm, steps=5, bounds=bounds)
    np.testing.assert_array_equal(r[:2], 0)
    np.testing.assert_allclose(r[2:, 0], 10, rtol=0.01)


@every_norm
def test_no_step_is_taken_to_a_plane_whose_distance_overflows(norm):
    params, x, y = two_ways()
    params = with_rows(params, "c", (slice(None), 1), -1e4)
    params = with_rows(params, "c", (slice(None), 2), -np.inf)
    params["v"][0, 1] = 1e-37
    r = fab(net, params, x, y, norm=norm, steps=3)
    np.testing.assert_array_equal(r, 0)


# Restarts, dtype and compilation

# The programs with keys: with eps in a box, and without either.
KEYED = pytest.mark.parametrize(
    ("norm", "eps", "bounds"), [("linf", 0.3, BOX), ("l2", None, None)], ids=["eps", "least"]
)


@KEYED
def test_restarts_never_do_worse(norm, eps, bounds):
    better = 0
    for seed in range(4):
        params, x, y = problem(seed)
        fn = functools.partial(fab, net, params, x, y, norm=norm, steps=2, bounds=bounds)
        if eps is not None:  # slightly smaller than what two steps find
            eps = 0.95 * lengths(fn(), norm).astype(np.float32)
        once, more = fn(eps=eps), fn(eps=eps, restarts=6, key=KEYS)
        if eps is None:
            sizes = lengths(once, norm), lengths(more, norm)
            once, more = (np.where(size == 0, np.inf, size) for size in sizes)
            # Programs with and without keys may round differently.
            assert (more <= once * (1 + 1e-5)).all()
            better += (more < 0.99 * once).sum()
        else:
            once, more = (lead(params, x, y, r) > 0 for r in (once, more))
            assert (more >= once).all()
            better += (more > once).sum()
    assert better > 0


def test_a_restart_is_within_half_of_the_ball_and_not_at_x():
    def starts(norm, **kwargs):
        """Return r and the sizes of the points at which the net is evaluated, ascending."""
        jax.effects_barrier()
        passes.clear()
        kwargs |= {"steps": 1, "n_targets": 1, "restarts": 3, "key": KEYS}
        r = jax.block_until_ready(fab(net, params, x, y, norm=norm, **kwargs))
        jax.effects_barrier()
        assert len(passes) == 1 + 3 * 2  # at x; for each start, there and after its step
        return r, np.sort([lengths(point, norm) for point in passes], axis=0)

    params, x, y = two_ways()
    params["edge"][:] = -1  # flat, so no start moves
    params["beyond"][:] = [1, 0, 0, 0]
    eps = np.linspace(0.5, 1, B).astype(np.float32)
    r, sizes = starts("linf", eps=eps, bounds=BOX)
    np.testing.assert_array_equal(r, 0)
    np.testing.assert_array_equal(sizes[:3], 0)
    assert (sizes[3:] > 0).all()
    assert (sizes[3:] <= eps / 2 * (1 + 1e-6)).all()
    assert (sizes[3:5] < sizes[5:]).all()  # two different points
    # Without eps, and with nothing found yet, restarts begin at x.
    _, sizes = starts("l2")
    np.testing.assert_array_equal(sizes, 0)
    # After a success, within half of its size.
    params = with_rows(params, "c", (slice(None), 2), -np.inf)
    params["edge"][:] = 9
    params["beyond"][:] = [0, 1, 0, 0]
    r, sizes = starts("l2")
    found = lengths(r, "l2")
    assert (found > 9).all()
    np.testing.assert_array_equal(sizes[:2], 0)
    assert (sizes[2] > 0.05 * found).all()
    assert (sizes[2] <= 10.5 / 2 * (1 + 1e-6)).all()


def test_fab_is_traced_once_for_all_counts_and_constants():
    params, x, y = problem()
    calls = []

    def apply_fn(params, x):
        calls.append(x.shape)
        return net(params, x)

    for number, steps in enumerate((1, 6), start=1):
        jax.eval_shape(
            lambda n=steps: fab(apply_fn, params, x, y, steps=n, n_targets=n, beta=n / 10)
        )
        # At x, in a step, and after the last; each call also traces the net once to inspect it.
        assert len(calls) == 3 + number
