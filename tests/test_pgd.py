"""`jaxadv.attack.pgd`; test_contract tests what all methods have in common."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import references
from nets import linear
from references import DUAL_ORDER, NORMS, ORDER, lengths

from jaxadv import attack, losses

B, D, H, K = 6, 5, 8, 3
KEYS = jax.random.split(jax.random.key(9), B)

pgd = jax.jit(
    attack.pgd,
    static_argnums=0,
    static_argnames=(
        *("norm", "steps", "loss_fn", "targeted", "random_start", "restarts", "keep", "samples"),
    ),
)

every_norm = pytest.mark.parametrize("norm", NORMS)


def net(params, x):
    w, v, b = params
    return jnp.tanh(x @ w) @ v + b[None]


def problem(seed=0):
    """A net, examples and labels; only the last label isn't the net's own."""
    rng = np.random.default_rng(seed)
    shapes = (D, H), (H, K), (K,)
    params = tuple(rng.normal(size=shape).astype(np.float32) for shape in shapes)
    x = rng.normal(size=(B, D)).astype(np.float32)
    y = np.asarray(net(params, x)).argmax(axis=1)
    y[-1] = (y[-1] + 1) % K
    return params, x, y


def outcome(params, x, y, r):
    """Whether each example is misclassified at x + r, and its margin there."""
    z = net(params, x + r)
    return np.asarray(z.argmax(axis=1)) != y, np.asarray(losses.margin(z, y))


# The best iterate


def test_a_custom_loss_of_soft_targets_never_decreases_with_more_steps():
    params, x, y = problem()
    soft = 0.8 * np.eye(K, dtype=np.float32)[y] + np.float32(0.2 / K)
    losses = [optax.softmax_cross_entropy(net(params, x), soft)]
    for steps in (1, 9):
        r = pgd(
            net, params, x, soft, eps=1.0, steps=steps, step_size=0.7,
            loss_fn=optax.softmax_cross_entropy,
        )  # fmt: skip
        losses.append(optax.softmax_cross_entropy(net(params, x + r), soft))
    rise = np.diff(np.array(losses), axis=0)
    assert (rise >= -1e-5).all()
    assert (rise.sum(axis=0) > 0.1).all()


def test_the_start_is_kept_if_no_step_does_better():
    params, x, y = problem()
    r = pgd(net, params, x, y, eps=1.0, steps=3, loss_fn=lambda z, y: 0 * z[:, 0])
    np.testing.assert_array_equal(r, 0)


def test_success_comes_before_loss():
    def ramp(params, x):  # class 1 wins from 0.8 on
        t = x[:, 0]
        return jnp.stack([jnp.zeros_like(t), t - 0.8, jnp.full_like(t, -9)], axis=1)

    def hill(logits, y):  # highest at 0.55, and still rising at 0.5
        return -((logits[:, 1] + 0.25) ** 2)

    x, y = np.zeros((1, 2), np.float32), np.array([0])
    r = pgd(ramp, None, x, y, eps=1.0, norm="linf", steps=2, step_size=0.5, loss_fn=hill)
    np.testing.assert_array_equal(r, [[1, 0]])  # among 0, 0.5 and 1


# Closed forms


@functools.cache
def linear_problem():
    rng = np.random.default_rng(1)
    w, b = rng.normal(size=(D, 2)).astype(np.float32), rng.normal(size=2).astype(np.float32)
    return (w, b), rng.normal(size=(B, D)).astype(np.float32), np.array([0, 1, 1, 0, 1, 0])


@every_norm
@pytest.mark.parametrize("steps", [1, 10])
def test_on_a_linear_net_the_loss_reaches_minus_the_margin_plus_eps_times_the_dual_norm(
    norm, steps
):
    params, x, y = linear_problem()
    w, b = (p.astype(np.float64) for p in params)
    eps = np.linspace(0.2, 2, B).astype(np.float32)
    r = pgd(linear, params, x, y, eps=eps, norm=norm, steps=steps)
    away = (w[:, 1] - w[:, 0]) * np.where(y == 0, 1, -1)[:, None]
    margin = -(x @ away.T)[np.arange(B), np.arange(B)] - (b[1] - b[0]) * np.where(y == 0, 1, -1)
    want = -margin + eps * np.linalg.norm(away, DUAL_ORDER[norm], axis=1)
    got = losses.margin(linear(params, x + r), y)
    # Float32 sums of D products of about 1.
    np.testing.assert_allclose(got, want, atol=3e-6)
    np.testing.assert_allclose(lengths(r, norm), eps, rtol=1e-6)


@pytest.mark.parametrize(
    ("box", "dtype"),
    [((0.8, 1.0), np.float32), ((-1.0, 0.2), np.float32), ((0.0, 1.0), jnp.bfloat16)],
    ids=["symmetric", "rounded bounds", "bfloat16"],
)
def test_in_l1_other_entries_grow_once_the_box_stops_the_best_ones(box, dtype):
    rng = np.random.default_rng(0)
    n, lo, hi = 20, *box
    w = rng.normal(size=(n, 2)).astype(np.float32)
    x = jnp.asarray(rng.uniform(*box, (B, n)), dtype)
    y = np.asarray(x.astype(jnp.float32) @ w).argmax(axis=1)
    away = (w.T[1 - y] - w.T[y]).astype(np.float64)
    x_64 = np.asarray(x, np.float64)
    room = np.where(away > 0, hi - x_64, x_64 - lo)
    best = np.argsort(-np.abs(away), axis=1)[:, :10]
    # The radius lets exactly the ten best entries reach their bounds.
    eps = np.take_along_axis(room, best, 1).sum(axis=1)
    want = np.take_along_axis(room * np.abs(away), best, 1).sum(axis=1)
    r = pgd(
        lambda w, x: x.astype(w.dtype) @ w, w, x, y, eps=eps.astype(np.float32), norm="l1",
        steps=400, bounds=box,
    )  # fmt: skip
    gained = (away * np.asarray(r, np.float64)).sum(axis=1)
    # bfloat16 rounds by 2^-9 of an entry; in float32, part of the last step may be missing.
    assert (gained >= 0.98 * want).all()
    assert (lengths(r, "l1") <= eps * (1 + 1e-2)).all()


@pytest.mark.parametrize(
    ("norm", "bounds"), [("l1", (0.0, 1.0)), ("l2", None), ("linf", (0.0, 1.0)), ("linf", None)]
)
def test_steps_far_below_the_resolution_of_bfloat16_add_up(bounds, norm):
    rng = np.random.default_rng(1)
    w = rng.normal(size=(20, 2)).astype(np.float32)
    x = jnp.asarray(rng.uniform(0.4, 0.6, (B, 20)), jnp.bfloat16)
    y = np.asarray(x.astype(jnp.float32) @ w).argmax(axis=1)
    r = pgd(
        lambda w, x: x.astype(w.dtype) @ w, w, x, y, eps=0.3, norm=norm, steps=1000, bounds=bounds
    )
    away = (w.T[1 - y] - w.T[y]).astype(np.float64)
    gained = (away * np.asarray(r, np.float64)).sum(axis=1)
    most = 0.3 * np.linalg.norm(away, DUAL_ORDER[norm], axis=1)
    # Rounding the last point costs at most 2^-8 of an entry.
    assert (gained >= 0.99 * most).all()


def test_a_targeted_attack_lowers_the_loss_of_its_target_to_the_closed_form():
    params, x, y = linear_problem()
    away = pgd(linear, params, x, y, eps=0.5, steps=4)
    toward = pgd(linear, params, x, 1 - y, eps=0.5, steps=4, targeted=True)
    # With two classes, reaching one means leaving the other.
    np.testing.assert_allclose(toward, away, atol=1e-6)


# The ball


@every_norm
def test_a_random_start_is_a_point_of_the_ball_and_not_x(norm):
    params, x, y = problem()
    r = pgd(
        net, params, x, y, eps=0.5, norm=norm, steps=1, step_size=0.0, random_start=True, key=KEYS
    )
    size = lengths(r, norm)
    assert (size > 0).all()
    assert (size <= 0.5 * (1 + 1e-6)).all()


def test_radius_and_step_size_are_per_example():
    params, x, y = problem()
    eps = np.linspace(0.1, 1.2, B).astype(np.float32)
    together = pgd(net, params, x, y, eps=eps, steps=3, step_size=eps / 2)
    for i in range(B):
        row = slice(i, i + 1)
        size = float(eps[i])
        r = pgd(net, params, x[row], y[row], eps=size, steps=3, step_size=size / 2)
        np.testing.assert_allclose(together[row], r, rtol=1e-5, atol=1e-5)


def test_the_default_step_is_two_and_a_half_times_eps_over_the_steps():
    params, x, y = problem()
    fn = functools.partial(pgd, net, params, x, y, eps=0.8, steps=4)
    np.testing.assert_allclose(fn(), fn(step_size=2.5 * 0.8 / 4), atol=1e-6)


# Given starts, and the last point

START = np.random.default_rng(5).normal(size=(B, D)).astype(np.float32)


@every_norm
@pytest.mark.parametrize("steps", [1, 3])
def test_the_last_point_is_steps_away_from_the_projected_start(norm, steps):
    (w, b), x, y = linear_problem()
    away = (w[:, 1] - w[:, 0]).astype(np.float64) * np.where(y == 0, 1, -1)[:, None]
    radii = np.linspace(0.5, 3, B)
    want = np.stack([references.project(*row, norm) for row in zip(START, radii, strict=True)])
    for _ in range(steps):
        for i in range(B):
            moved = want[i] + 0.4 * references.steepest(away[i], norm)
            want[i] = references.project(moved, radii[i], norm)
    r = pgd(
        linear, (w, b), x, y, eps=radii.astype(np.float32), norm=norm, steps=steps, step_size=0.4,
        start=START, keep="last",
    )  # fmt: skip
    # Each step rounds entries of up to 3 a few times.
    np.testing.assert_allclose(r, want, atol=2e-6)


def test_a_start_may_be_finer_than_the_examples():
    params, x, y = problem()
    x = jnp.asarray(x, jnp.bfloat16)
    r = pgd(net, params, x, y, eps=0.5, steps=2, start=START, keep="last")
    assert r.dtype == jnp.bfloat16
    assert np.isfinite(r.astype(np.float32)).all()


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_the_first_gradient_is_taken_at_the_start_clipped_to_the_box(norm):
    params, x, y = problem()
    x, eps = np.clip(x, 0, 1), 0.7
    start = np.clip([references.project(v, eps, norm) for v in START], 0 - x, 1 - x)
    g = jax.grad(lambda x: losses.margin(net(params, x), y).sum())(jnp.float32(x + start))
    want = [
        references.project(v + 0.3 * references.steepest(u, norm), eps, norm)
        for v, u in zip(start, g, strict=True)
    ]
    r = pgd(
        net, params, x, y, eps=eps, norm=norm, steps=1, step_size=0.3, start=START, keep="last",
        bounds=(0.0, 1.0),
    )  # fmt: skip
    # The entries of a gradient of order 1 are rounded by 2^-24.
    np.testing.assert_allclose(r, np.clip(want, 0 - x, 1 - x), atol=2e-6)


@pytest.mark.parametrize(("keep", "end"), [("best", 0.5), ("last", 1.0)])
def test_keep_last_returns_the_last_point_even_if_an_earlier_one_is_better(keep, end):
    def hill(logits, y):  # highest at 0.6, and still rising at 0.5
        return -((logits[:, 0] - 0.6) ** 2)

    x, y = np.zeros((1, 2), np.float32), np.array([0])
    r = pgd(
        lambda _, x: x * np.array([[1, 0]], np.float32), None, x, y, eps=1.0, norm="linf", steps=2,
        step_size=0.5, loss_fn=hill, keep=keep,
    )  # fmt: skip
    np.testing.assert_array_equal(r[:, 0], end)


@pytest.mark.parametrize("restarts", [1, 2])
def test_the_best_point_is_never_worse_than_the_start(restarts):
    params, x, y = problem()
    start = pgd(net, params, x, y, eps=0.8, steps=20)
    (was_hit, before), (hit, loss) = (
        outcome(params, x, y, r)
        for r in (
            start,
            pgd(
                net, params, x, y, eps=0.8, steps=1, step_size=0.0, start=start, restarts=restarts,
                key=KEYS,
            ),
        )
    )  # fmt: skip
    assert (hit >= was_hit).all()
    assert (loss >= before - 1e-5).all()


@pytest.mark.parametrize("how", [{"keep": "last"}, {"restarts": 2, "key": KEYS}])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_start_that_is_not_finite_makes_its_row_nan_and_no_other(how, bad):
    params, x, y = problem()
    go = functools.partial(pgd, net, params, x, y, eps=0.5, steps=2, **how)
    r = go(start=references.edited(START, 1, bad))
    assert np.isnan(r[1]).all()
    others = np.arange(B) != 1
    np.testing.assert_array_equal(r[others], go(start=START)[others])


@pytest.mark.parametrize(
    ("wrong", "error", "match"),
    [
        ({"start": START[:3]}, ValueError, r"start of x's shape \(6, 5\), got \(3, 5\); pass one"),
        ({"start": START.astype(int)}, TypeError, r"start of a floating-point dtype, got int64"),
        ({"start": START, "random_start": True}, ValueError, r"start or random_start, got both;"),
        ({"keep": "first"}, ValueError, r"keep to be 'best' or 'last', got 'first'; choose"),
        ({"keep": "last", "restarts": 3}, ValueError, r"restarts=1 with keep='last', got 3; .*out"),
    ],
)
def test_values_of_start_and_keep_that_are_refused(wrong, error, match):
    with pytest.raises(error, match=match):
        attack.pgd(net, *problem(), eps=0.5, key=KEYS, **wrong)


# Labels and losses


@pytest.mark.parametrize(
    "labels", [np.full((B, K), 1 / K, np.float32), np.full((B, 2, 2), 7, np.uint8)]
)
def test_labels_reach_the_loss_unchanged(labels):
    params, x, _ = problem()
    seen = []

    def loss_fn(logits, y):
        seen.append((y.shape, y.dtype))
        return logits[:, 0] + 0 * y.reshape(B, -1)[:, 0].astype(jnp.float32)

    r = pgd(net, params, x, labels, eps=1.0, steps=2, loss_fn=loss_fn)
    assert set(seen) == {(labels.shape, labels.dtype)}
    assert r.shape == x.shape


# Compilation


def test_the_number_of_traces_does_not_depend_on_steps():
    traces = {2: [], 50: []}
    for steps, calls in traces.items():

        def apply_fn(params, x, calls=calls):
            calls.append(x.shape)
            return net(params, x)

        attack.pgd(apply_fn, *problem(), eps=0.5, steps=steps)
    assert len(traces[2]) == len(traces[50])


# Restarts


def test_more_restarts_never_do_worse_and_keep_earlier_successes():
    params, x, y = problem()
    eps = np.linspace(0.02, 0.6, B).astype(np.float32)
    fn = functools.partial(pgd, net, params, x, y, eps=eps, steps=1, key=KEYS)
    few, many = fn(restarts=2), fn(restarts=7)
    (hit, loss), (later_hit, later_loss) = (outcome(params, x, y, r) for r in (few, many))
    assert 0 < hit.sum() < B
    assert (later_hit >= hit).all()
    assert (later_loss >= loss)[later_hit == hit].all()
    assert (np.asarray(many) != few)[~hit].any()
    np.testing.assert_array_equal(many[hit], few[hit])


@pytest.mark.parametrize("random_start", [False, True])
def test_the_first_of_several_runs_starts_at_x(random_start):
    params, x, y = problem()
    fn = functools.partial(
        pgd, net, params, x, y, eps=0.4, steps=1, step_size=0.0, random_start=random_start, key=KEYS
    )
    # With steps of 0, the best point is a start, which is never worse than x.
    worse = outcome(params, x, y, fn(restarts=2))[1] < outcome(params, x, y, 0 * x)[1] - 1e-5
    assert not worse.any()
    np.testing.assert_array_equal(fn(restarts=2)[-1], 0)  # misclassified at x


# Random nets


def flipping(params, x, key):
    """A random net whose gradient has the wrong sign with probability 0.3."""
    sign = jnp.where(jax.random.bernoulli(key, 0.7), 1.0, -1.0)
    t = sign * (x @ params)
    return jnp.stack([-t, t], axis=1)


def cosines(samples):
    n = 64
    w = np.array([3.0, -4.0, 1.0], np.float32)
    x, y = np.zeros((n, 3), np.float32), np.zeros(n, np.int32)
    keys = jax.random.split(jax.random.key(2), n)
    # At x all draws tie and the loss is 0; the step's end is kept if its loss is higher, or else x.
    r = pgd(flipping, w, x, y, eps=1.0, steps=1, step_size=1.0, samples=samples, key=keys)
    return np.asarray(r) @ w / np.linalg.norm(w)


def test_with_many_draws_the_step_follows_the_mean_gradient():
    assert (cosines(64) > 0.9).all()


def test_with_one_draw_the_step_often_does_not():
    assert 0.2 < (cosines(1) > 0.9).mean() < 0.8


def test_each_step_of_each_run_has_its_own_draws():
    seen = []

    def noisy(params, x, key):
        jax.debug.callback(lambda data: seen.append(tuple(data.tolist())), jax.random.key_data(key))
        return x + jax.random.normal(key, x.shape) + jnp.array([[50.0, 0, 0]])

    x, y = np.zeros((1, 3), np.float32), np.array([0])
    attack.pgd(noisy, None, x, y, eps=0.1, steps=4, restarts=3, samples=2, key=KEYS[:1])
    jax.effects_barrier()
    assert len(set(seen)) == 3 * (4 + 1) * 2


def test_an_examples_draws_do_not_depend_on_its_batch():
    w = np.array([3.0, -4.0, 1.0], np.float32)
    x = np.random.default_rng(0).normal(size=(B, 3)).astype(np.float32)
    y, order = np.zeros(B, np.int32), np.array([3, 0, 4, 2, 5, 1])
    fn = functools.partial(pgd, flipping, w, eps=1.0, steps=3, samples=1)
    r = np.asarray(fn(x, y, key=KEYS))
    np.testing.assert_allclose(fn(x[order], y, key=KEYS[order]), r[order], atol=1e-6)
    np.testing.assert_allclose(fn(x[:1], y[:1], key=KEYS[:1]), r[:1], atol=1e-6)
    assert (np.asarray(fn(x, y, key=KEYS[::-1])) != r).any()


# Virtual attacks


def divergence(params, x, r):
    """KL divergence of the output at x + r from that at x."""
    return np.array(
        [references.kl(*z) for z in zip(net(params, x), net(params, x + r), strict=True)]
    )


virtual = jax.jit(attack.pgd_kl, static_argnums=0, static_argnames=("norm", "steps"))


# Without l1, whose steps along one axis don't suit a curved net.
@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_the_virtual_attack_changes_the_output_more_than_random_points_of_the_ball(norm):
    params, x, _ = problem()
    r = virtual(net, params, x, eps=0.5, norm=norm, steps=20, key=KEYS)
    assert (lengths(r, norm) <= 0.5 * (1 + 1e-6)).all()
    draws = np.random.default_rng(4).normal(size=(300, B, D)).astype(np.float32)
    sizes = np.linalg.norm(draws, ORDER[norm], axis=2, keepdims=True)
    random = np.array([divergence(params, x, 0.5 * v) for v in draws / sizes])
    found = divergence(params, x, np.asarray(r))
    # A start on the wrong side may end at the lower of two maxima.
    assert (found >= random.max(axis=0)).sum() >= B - 2
    assert (found > np.median(random, axis=0)).all()


def test_the_virtual_attack_needs_no_labels():
    params, x, y = problem()
    r = virtual(net, params, x, eps=0.5, norm="l2", steps=2, key=KEYS)
    np.testing.assert_array_equal(
        r, virtual(net, params, x, y, eps=0.5, norm="l2", steps=2, key=KEYS)
    )


def test_the_third_class_is_found_if_the_top_wrong_class_has_ys_gradient():
    g, v = np.random.default_rng(0).normal(size=(2, D)).astype(np.float32)
    for gap in (90.0, 300.0):

        def apply_fn(_, x, gap=gap):
            z = jnp.stack([x @ g, x @ g, x @ v], axis=1)
            return z + jnp.array([gap, 0, -gap], jnp.float32)[None]

        x, y = 0.1 * problem()[1], np.zeros(B, int)
        eps = 2.5 * gap / float(np.linalg.norm(v - g))  # beyond the boundary
        r = attack.pgd(apply_fn, None, x, y, eps=eps, steps=10)
        np.testing.assert_array_equal(np.argmax(apply_fn(None, x + r), axis=1), 2)


@pytest.mark.parametrize("method", [attack.pgd, attack.apgd])
def test_a_loss_that_averages_over_the_batch_is_an_error(method):
    def mean(logits, labels):
        return jnp.mean(losses.dlr(logits, labels))

    with pytest.raises(ValueError, match=r"one loss per example, \[6\], got shape \(\); leave out"):
        method(net, *problem(), eps=1.0, steps=2, loss_fn=mean, key=KEYS)
