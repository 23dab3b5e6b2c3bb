"""`jaxadv.attack.apgd` and `apgd_multitargeted`; the contract is in test_contract."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from nets import curved as net
from nets import distances, linear, linear_problem
from references import DUAL_ORDER, ORDER

from jaxadv import attack, losses, norms
from jaxadv.attack import _apgd
from jaxadv.problem import Problem, fold

B, D, H, K = 6, 5, 8, 4
KEYS = jax.random.split(jax.random.key(9), B)

STATIC = ("norm", "steps", "loss_fn", "targeted", "restarts", "samples")
apgd = jax.jit(attack.apgd, static_argnums=0, static_argnames=STATIC)
targeted = jax.jit(
    attack.apgd_multitargeted, static_argnums=0, static_argnames=("norm", "steps", "n_targets")
)

every_norm = pytest.mark.parametrize("norm", ORDER)


def problem(seed=0, dtype=np.float32):
    """A net and examples that it classifies correctly."""
    rng = np.random.default_rng(seed)
    params = tuple(2 * rng.normal(size=shape).astype(dtype) for shape in ((D, H), (H, K)))
    x = rng.normal(size=(B, D)).astype(dtype)
    return params, x, (np.tanh(x @ params[0]) @ params[1]).argmax(axis=1)


def leads(params, x, y):
    """Each class's lead over the label, and its gradient, in float64: [B, K], [B, K, D]."""
    w, b = (p.astype(np.float64) for p in params)
    z, rows = x.astype(np.float64) @ w + b, np.arange(len(y))
    return z - z[rows, y][:, None], w.T[None] - w.T[y][:, None]


# The algorithm


def test_the_checkpoints_of_100_steps_are_the_published_ones():
    windows = _apgd._windows(100)
    np.testing.assert_array_equal(np.flatnonzero(windows) + 1, [22, 41, 57, 70, 80, 87, 93, 99])
    np.testing.assert_array_equal(windows[windows > 0], [22, 19, 16, 13, 10, 7, 6, 6])


def margin_and_gradient(params, v, label):
    """Success, margin and gradient of one example, in float64."""
    w, out = params
    hidden = np.tanh(v @ w)
    z = hidden @ out
    others = np.arange(K) != label
    top = z[others].max()
    e = np.where(others, np.exp(z - top), 0)
    slope = e / e.sum() - (np.arange(K) == label)
    g = w @ ((1 - hidden**2) * (out @ slope))
    return z.argmax() != label, top + np.log(e.sum()) - z[label], g


def reference(params, x, label, start, eps, norm, steps, box):
    """Croce and Hein (2020), Algorithm 1, for one example; returns its best point and halvings."""

    def inside(r):
        size = np.linalg.norm(r, ORDER[norm])
        if norm == "l2" and size > eps:
            r = r * eps / size
        elif norm == "linf":
            r = np.clip(r, -eps, eps)
        return r if box is None else np.clip(x + r, *box) - x

    def steepest(g):
        return np.sign(g) if norm == "linf" else g / np.linalg.norm(g)

    def look(r):
        hit, loss, g = margin_and_gradient(params, x + r, label)
        visited.append((hit, loss, r))
        return loss, g

    visited, halvings = [], 0
    r = before = inside(start)
    f, g = look(r)
    highest, highest_r, highest_g = f, r, g
    step_size, halved, at_checkpoint = 2 * eps, True, f
    window, losses = int(0.22 * steps), [f]
    next_checkpoint = window
    for k in range(1, steps + 1):
        ahead = inside(r + step_size * steepest(g))
        if k > 1:
            ahead = inside(r + 0.75 * (ahead - r) + 0.25 * (r - before))
        before, r = r, ahead
        f, g = look(r)
        losses.append(f)
        if f > highest:
            highest, highest_r, highest_g = f, r, g
        if k == next_checkpoint:
            rises = (np.diff(losses[-window - 1 :]) > 0).sum()
            if rises <= 0.75 * window or (not halved and at_checkpoint >= highest):
                step_size, halved, halvings = step_size / 2, True, halvings + 1
                r, g = highest_r, highest_g
            else:
                halved = False
            at_checkpoint = highest
            window = max(window - max(int(0.03 * steps), 1), max(int(0.06 * steps), 1))
            next_checkpoint += window
    return max(visited, key=lambda point: point[:2])[2], halvings


@pytest.mark.parametrize(
    ("norm", "steps", "box"),
    [("l2", 30, None), ("linf", 30, (-1.2, 1.0)), ("l2", 100, (-1.2, 1.0)), ("linf", 100, None)],
)
def test_the_best_point_is_that_of_the_algorithm(norm, steps, box, x64):
    params, x, y = problem(seed=5, dtype=np.float64)
    if box is not None:
        x = np.clip(x, *box)
    eps = np.linspace(0.05, 0.8, B)
    starts = fold(fold(KEYS, 0), 0)
    starts = np.asarray(norms.sample(starts, jnp.asarray(x), jnp.asarray(eps), norm))
    got = apgd(net, params, x, y, eps=eps, norm=norm, steps=steps, key=KEYS, bounds=box)
    halvings = 0
    for i in range(B):
        want, n = reference(params, x[i], y[i], starts[i], eps[i], norm, steps, box)
        halvings += n
        _, loss, _ = margin_and_gradient(params, x[i] + np.asarray(got[i]), y[i])
        _, best, _ = margin_and_gradient(params, x[i] + want, y[i])
        # A few hundred roundings of 1e-16, which the ascent can magnify.
        np.testing.assert_allclose(loss, best, rtol=1e-9)
        np.testing.assert_allclose(got[i], want, atol=1e-7)
    assert halvings >= B


# Closed forms


def mask(logits):
    """Add three masked classes."""
    return jnp.pad(logits, ((0, 0), (0, 3)), constant_values=-jnp.inf)


@pytest.mark.parametrize("norm", ["l1", "l2", "linf"])
@pytest.mark.parametrize("order", ["distance", "alpha"])
def test_targets_are_in_the_order_of_their_linearised_distances(order, norm):
    rng = np.random.default_rng(5)
    w, b = rng.normal(size=(6, 7)), 0.3 * rng.normal(size=7)
    x = rng.normal(size=(40, 6)).astype(np.float32)
    z = x.astype(np.float64) @ w + b
    y = z.argmax(axis=1)
    posed = Problem.of(
        lambda p, x: x @ p[0] + p[1][None], (w.astype(np.float32), b.astype(np.float32)), x, y,
        norm=norm, eps=1.0, bounds=None,
    ).start()  # fmt: skip
    got = np.asarray(_apgd._by_distance(posed, _apgd._by_logit(posed, 6), order))
    masked = dataclasses.replace(posed, apply_fn=lambda p, x: mask(posed.apply_fn(p, x))).start()
    first = _apgd._by_distance(masked, _apgd._by_logit(masked, 9), order)
    np.testing.assert_array_equal(first[:, :6], got)
    for i, label in enumerate(y):
        value, slope = z[i], w.T
        if order == "alpha":
            value = np.exp(z[i]) / np.exp(z[i]).sum()
            slope = value[:, None] * (w.T - value @ w.T)
        others = [k for k in range(7) if k != label]
        lengths = np.linalg.norm(slope - slope[label], DUAL_ORDER[norm], axis=1)
        size = {k: (value[label] - value[k]) / lengths[k] for k in others}
        assert got[i].tolist() == sorted(others, key=size.get)


def test_the_passes_for_ordering_the_targets_are_counted():
    x, y = np.zeros((2, 5), np.float32), np.zeros(2, int)
    for order, passes in (("logit", (1, 0)), ("distance", (2, 4)), ("alpha", (2, 4))):
        _, info = attack.with_info(attack.apgd_multitargeted)(
            lambda _, x: x, None, x, y, eps=1.0, steps=3, n_targets=1, order=order,
            key=jax.random.key(0),
        )  # fmt: skip
        assert (int(info.forward[0]), int(info.backward[0])) == (4 + passes[0], 4 + passes[1])


@pytest.mark.parametrize(
    ("name", "norm"), [*(("apgd", norm) for norm in ORDER), ("apgd_multitargeted", "l2")]
)
def test_on_a_linear_net_of_two_classes_the_margin_rises_by_eps_times_the_dual_norm(name, norm):
    params, x, y = linear_problem(2, B, D, seed=1)
    eps = np.linspace(0, 1.5, B).astype(np.float32)
    fn = apgd if name == "apgd" else targeted
    r = fn(linear, params, x, y, eps=eps, norm=norm, steps=40, key=KEYS)
    ahead, away = (a[np.arange(B), 1 - y] for a in leads(params, x, y))
    want = ahead + eps * np.linalg.norm(away, DUAL_ORDER[norm], axis=1)
    # l2 steps approach the maximiser geometrically, the others end in a corner exactly.
    np.testing.assert_allclose(losses.margin(linear(params, x + r), y), want, atol=1e-5)


def test_in_many_dimensions_the_sparse_steps_end_in_one_entry():
    rng = np.random.default_rng(0)
    w = rng.normal(size=(200, 2)).astype(np.float32)
    x = rng.normal(size=(B, 200)).astype(np.float32)
    y = (x @ w).argmax(axis=1)
    r = apgd(lambda w, x: x @ w, w, x, y, eps=1.0, norm="l1", steps=20, key=KEYS)
    away = (w.T[1 - y] - w.T[y]).astype(np.float64)
    np.testing.assert_allclose((away * r).sum(axis=1), np.abs(away).max(axis=1), rtol=1e-5)


def test_in_l1_the_start_is_the_nearest_point_to_normal_noise(monkeypatch):
    begun = []
    climb = _apgd._climb_l1

    def watched(problem, r, *args):
        jax.debug.callback(lambda r: begun.append(np.asarray(r)), r, ordered=True)
        return climb(problem, r, *args)

    monkeypatch.setattr(_apgd, "_climb_l1", watched)
    w, x = np.ones((200, 2), np.float32), np.full((B, 200), 0.5, np.float32)
    attack.apgd(
        lambda w, x: x @ w, w, x, np.zeros(B, int), eps=2.0, norm="l1", steps=3, key=KEYS,
        bounds=(0.0, 1.0),
    )  # fmt: skip
    jax.effects_barrier()
    start = begun[0]
    # The whole radius of three balls, in few entries; dense noise cut by the box has less.
    np.testing.assert_allclose(np.abs(start).sum(axis=1), 6, rtol=1e-5)
    assert (np.count_nonzero(start, axis=1) < 60).all()
    assert len(np.unique(start, axis=0)) == B


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_on_a_linear_net_the_margin_rises_to_the_most_that_the_box_leaves(norm):
    params, x, y = linear_problem(2, B, D, seed=1)
    x, eps = np.clip(x, -1, 1), 0.7
    r = apgd(linear, params, x, y, eps=eps, norm=norm, steps=40, key=KEYS, bounds=(-1.0, 1.0))
    ahead, away = (a[np.arange(B), 1 - y] for a in leads(params, x, y))
    if norm == "linf":
        most = np.clip(np.sign(away) * eps, -1 - x, 1 - x)
    else:  # clip(t away) to the box, for the t at which it is eps long
        t = np.geomspace(1e-3, 1e4, 20001)[:, None, None]
        points = np.clip(t * away, -1 - x, 1 - x)
        inside = np.linalg.norm(points, axis=2) <= eps
        most = points[inside.sum(axis=0) - 1, np.arange(B)]
    want = ahead + (away * most).sum(axis=1)
    # The published projection, onto the ball and then the box, isn't quite that onto both.
    rise = np.asarray(losses.margin(linear(params, x + r), y)) - ahead
    np.testing.assert_allclose(rise, want - ahead, rtol=0.02 if norm == "l2" else 1e-5)


@pytest.mark.parametrize("bounded", [0.5, 0.9])
def test_in_l1_the_margin_rises_too_where_most_entries_are_at_a_bound(bounded):
    rng = np.random.default_rng(5)
    d, eps = 40, 1.0
    w = rng.normal(size=(d, 2)).astype(np.float32)
    x = rng.uniform(size=(B, d))
    x = np.where(rng.uniform(size=x.shape) < bounded, np.round(x), x).astype(np.float32)
    y = (x @ w).argmax(axis=1)
    r = np.asarray(
        apgd(
            lambda w, x: x @ w, w, x, y, eps=eps, norm="l1", steps=100, key=KEYS, bounds=(0.0, 1.0)
        ),
        np.float64,
    )
    away = (w[:, 1] - w[:, 0]) * np.where(y == 0, 1, -1)[:, None]
    order = np.argsort(-np.abs(away), axis=1)  # the steepest entries first, each up to its bound
    room = np.take_along_axis(np.where(away > 0, 1 - x, x), order, axis=1)
    used = np.diff(np.minimum(np.cumsum(room, axis=1), eps), axis=1, prepend=0)
    most = (used * np.take_along_axis(np.abs(away), order, axis=1)).sum(axis=1)
    # The published steps, which stop at bounds, fall short of that.
    assert ((away * r).sum(axis=1) >= 0.995 * most).all()


@every_norm
def test_on_a_linear_net_targets_are_reached_beyond_the_exact_distance_only(norm):
    n = 40
    params, x, y = linear_problem(K, n, D, seed=1)
    distance = distances(params, x, y, norm)
    least = distance.min(axis=1)
    keys = jax.random.split(jax.random.key(3), n)
    for factor, fooled in ((0.99, False), (1.03, True)):
        eps = (factor * least).astype(np.float32)
        r = targeted(linear, params, x, y, eps=eps, norm=norm, steps=60, key=keys)
        hit = np.asarray(linear(params, x + r)).argmax(axis=1) != y
        np.testing.assert_array_equal(hit, fooled)
    # The nearest class often isn't the top wrong one.
    top_wrong = np.where(np.eye(K, dtype=bool)[y], -np.inf, linear(params, x)).argmax(axis=1)
    assert (distance.argmin(axis=1) != top_wrong).mean() > 0.1


# Targets


def ladder(params, x):
    """Class 1 comes right after class 0, then class 2; `params` set how they depend on x."""
    none = 0 * x[:, 0]
    rungs = none, x[:, 0] * params[0] - 0.5, x[:, 1] * params[1] - 1, none - 5
    return jnp.stack(rungs, axis=1)


def climbed(slopes, n_targets, y=0):
    x, key = np.zeros((1, 2), np.float32), jax.random.key(0)
    fn = functools.partial(targeted, ladder, np.array(slopes, np.float32), x, np.array([y]))
    r = fn(eps=2.0, norm="linf", steps=9, n_targets=n_targets, key=key)
    return int(ladder(np.array(slopes), x + np.asarray(r)).argmax())


def test_the_second_target_is_tried_where_the_first_is_out_of_reach():
    assert climbed([0, 1], 1) == 0
    assert climbed([0, 1], 9) == 2  # i.e. all three classes but the label


def test_the_top_wrong_class_is_tried_first():
    # With slopes this small no random point succeeds, but either class can be reached.
    assert climbed([0.3, 0.55], 1) == 1
    assert climbed([0.3, 0.55], 9) == 1


def test_neither_a_masked_class_nor_the_label_is_a_target():
    def masked(params, x):
        return ladder(params, x).at[:, 3].set(-jnp.inf)

    # The best of three runs that all fail; toward the label itself, any start would be as good.
    x, y, slopes = np.zeros((1, 2), np.float32), np.array([0]), np.full(2, 0.1, np.float32)
    r = targeted(
        masked, slopes, x, y, eps=2.0, norm="linf", steps=9, n_targets=3, key=jax.random.key(0)
    )
    np.testing.assert_array_equal(r[0, 0], 2)


def test_no_target_is_tried_once_all_are_fooled():
    calls = []

    def counted(params, x):
        jax.debug.callback(lambda: calls.append(1))
        return ladder(params, x)

    x, y, made = np.zeros((1, 2), np.float32), np.array([0]), []
    for slope in (0.3, 0):
        calls.clear()
        slopes = np.array([slope, 0], np.float32)
        targeted(counted, slopes, x, y, eps=2.0, norm="linf", steps=9, n_targets=3, key=KEYS[:1])
        jax.effects_barrier()
        made.append(len(calls))
    assert made[0] > 9
    assert made[1] - made[0] >= 2 * 10  # two more runs, of nine steps and a start each


def test_a_targeted_ascent_reaches_the_class():
    params, x, y = problem()
    target = (y + 1) % K
    r = apgd(net, params, x, target, eps=4.0, norm="l2", steps=40, key=KEYS, targeted=True)
    assert (np.asarray(net(params, x + r)).argmax(axis=1) == target).mean() >= 0.8


def test_with_soft_labels_the_loss_decides_which_point_is_best():
    params, x, y = problem()
    soft = (0.7 * np.eye(K)[y] + 0.3 / K).astype(np.float32)
    cross_entropy = optax.losses.softmax_cross_entropy
    r = apgd(net, params, x, soft, eps=0.1, norm="l2", loss_fn=cross_entropy, steps=30, key=KEYS)
    loss = cross_entropy(net(params, x + r), soft)
    # None of a hundred random points of the sphere does better.
    points = np.random.default_rng(0).normal(size=(100, 1, D)).astype(np.float32)
    points *= 0.1 / np.linalg.norm(points, axis=2, keepdims=True)
    others = np.array([cross_entropy(net(params, x + p), soft) for p in points])
    best = np.asarray(loss) >= others.max(axis=0)
    assert best.sum() >= B - 1  # this loss has two maxima, and one ascent finds one


# Restarts and draws


def test_each_evaluation_of_each_run_has_draws_of_its_own():
    seen = []

    def noisy(params, x, key):
        jax.debug.callback(lambda data: seen.append(tuple(data.tolist())), jax.random.key_data(key))
        return x + jax.random.normal(key, x.shape) + jnp.array([[50.0, 0, 0]])

    x, y = np.zeros((1, 3), np.float32), np.array([0])
    apgd(noisy, None, x, y, eps=0.1, norm="l1", steps=5, restarts=2, samples=1, key=KEYS[:1])
    jax.effects_barrier()
    # Two runs of three phases, each of which evaluates its start too.
    assert len(set(seen)) == 2 * (5 + 3)


def test_a_start_where_the_net_is_nan_does_not_end_the_ascent():
    def net(_, x):
        z = jnp.log(x).sum(axis=1, keepdims=True)  # NaN if an entry is negative
        return jnp.concatenate([z, -z], axis=1)

    x, y = jnp.full((8, 50), 1.1), jnp.zeros(8, int)
    r = attack.apgd(net, None, x, y, eps=9.0, steps=20, key=KEYS[0])
    assert (net(None, x + r).argmax(axis=1) == 1).all()
