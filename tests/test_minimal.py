"""`jaxadv.attack.deepfool` and `fmn`: what is their own; the contract is in test_contract."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from references import DUAL_ORDER, ORDER, lengths

from jaxadv import attack, jacobian

B, D = 60, 6

fmn = jax.jit(
    attack.fmn, static_argnums=0, static_argnames=("norm", "steps", "targeted", "step_size")
)
deepfool = jax.jit(
    attack.deepfool, static_argnums=0, static_argnames=("norm", "steps", "overshoot", "output")
)

every_norm = pytest.mark.parametrize("norm", ORDER)


def linear(params, x):
    w, b = params
    return x @ w + b[None]


def curved(params, x):
    w, v = params
    return jnp.tanh(x @ w) @ v


def problem(n_classes):
    """A linear net, all right."""
    rng = np.random.default_rng(n_classes)
    w = rng.normal(size=(D, n_classes))
    params = w.astype(np.float32), rng.normal(size=n_classes).astype(np.float32)
    x = rng.normal(size=(B, D)).astype(np.float32)
    return params, x, (x @ params[0] + params[1]).argmax(axis=1)


def distances(params, x, y, norm):
    """To the hyperplane of each class, in float64; inf for the label's own."""
    w, b = (p.astype(np.float64) for p in params)
    z = x.astype(np.float64) @ w + b
    gap = z[np.arange(len(y)), y][:, None] - z
    size = np.linalg.norm(w.T[y][:, None] - w.T[None], DUAL_ORDER[norm], axis=2)
    return np.where(size > 0, gap / np.where(size > 0, size, 1), np.inf)


def assert_least(r, params, x, y, norm):
    want = distances(params, x, y, norm).min(axis=1)
    assert (np.asarray(linear(params, x + r)).argmax(axis=1) != y).all()
    np.testing.assert_allclose(lengths(r, norm), want, rtol=0.01)
    assert (lengths(r, norm) >= want).all()


# Closed forms


@every_norm
@pytest.mark.parametrize("n_classes", [2, 10])
@pytest.mark.parametrize("fn", [fmn, deepfool], ids=["fmn", "deepfool"])
def test_r_is_the_distance_to_the_nearest_hyperplane(fn, n_classes, norm):
    params, x, y = problem(n_classes)
    assert_least(fn(linear, params, x, y, norm=norm), params, x, y, norm)
    # Which isn't always that of the likeliest class.
    z = np.where(np.eye(n_classes, dtype=bool)[y], -np.inf, linear(params, x))
    other = distances(params, x, y, norm).argmin(axis=1) != z.argmax(axis=1)
    assert other.any() == (n_classes > 2)


@pytest.mark.parametrize("fn", [fmn, deepfool], ids=["fmn", "deepfool"])
def test_what_a_net_of_convolutions_has_wrong_needs_no_perturbation(fn):
    # Within a loop such a net runs in another program, which rounds otherwise.
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


@every_norm
@pytest.mark.parametrize("scale", [1, 60])
def test_on_probabilities_two_classes_suffice_at_any_confidence(norm, scale):
    (w, b), x, y = problem(2)
    params = (np.float32(scale) * w, np.float32(scale) * b)
    z = linear(params, x)
    if scale > 1:
        assert np.abs(z[:, 0] - z[:, 1]).max() > 200
    r = deepfool(linear, params, x, y, norm=norm, output="probabilities")
    assert_least(r, params, x, y, norm)


def test_the_answer_is_wrong_by_more_than_rounding():
    params, x, y = problem(2)
    w, b = (p.astype(np.float64) for p in params)
    for fn in (fmn, deepfool):
        z = (x.astype(np.float64) + np.asarray(fn(linear, params, x, y, norm="l2"))) @ w + b
        before = x.astype(np.float64) @ w + b
        lead, gap = (np.abs(a[:, 1] - a[:, 0]) for a in (z, before))
        assert (lead >= 5e-5 * gap).all()


@pytest.mark.parametrize("fn", [fmn, deepfool], ids=["fmn", "deepfool"])
def test_r_is_0_where_x_is_misclassified_by_no_more_than_rounding(fn):
    params, x, _ = problem(2)
    w, b = 0 * params[0], np.array([100, np.nextafter(np.float32(100), 101)], np.float32)
    w[0] = 1, -1
    x[:, 0] = 0
    r = fn(linear, (w, b), x, np.zeros(B, np.int32), norm="l2")
    np.testing.assert_array_equal(r, 0)


@pytest.mark.parametrize("fn", [fmn, deepfool], ids=["fmn", "deepfool"])
def test_in_l1_the_way_leads_along_the_walls_of_the_box(fn):
    rng = np.random.default_rng(0)
    n, room = 20, 0.1
    w = rng.normal(size=(n, 2)).astype(np.float32)
    x = np.full((B, n), 1 - room, np.float32)
    y = rng.integers(2, size=B)
    away = (w.T[1] - w.T[0]).astype(np.float64)
    best = np.sort(np.abs(away))[::-1]
    # So far from x that the best entries go to their walls, and another a part of its way.
    entries = np.linspace(0.5, 8, B)
    most = np.concatenate([[0], room * np.cumsum(best)])
    gap = np.interp(entries, np.arange(n + 1), most)
    b = np.where(y == 0, -gap, gap) - x.astype(np.float64) @ away

    def net(w, x):  # the last entry moves the boundary, and can't be moved itself
        s = x[:, :-1] @ (w[:, 1] - w[:, 0]) + x[:, -1]
        return jnp.stack([jnp.zeros_like(s), s], axis=1)

    def beside(entries):
        return np.concatenate([entries, b[:, None]], axis=1).astype(np.float32)

    at = beside(x)
    bounds = beside(np.full((B, n), 0.8)), beside(np.full((B, n), 1.0))
    r = np.asarray(fn(net, w, at, y, norm="l1", bounds=bounds))
    assert (np.asarray(net(w, at + r)).argmax(axis=1) != y).all()
    # The bisection's thousandth, and FMN's, at most, of the way to the boundary.
    np.testing.assert_allclose(lengths(r, "l1"), room * entries, rtol=0.01)


@pytest.mark.parametrize("fn", [fmn, deepfool], ids=["fmn", "deepfool"])
def test_a_boundary_behind_which_the_net_is_hardly_surer_is_found(fn):
    def net(w, x):  # 100 ahead at x, and never more than 5e-3 behind
        s = jnp.sum(x, axis=1)
        ahead = -100 + 10 * s
        return jnp.stack([jnp.zeros_like(s), jnp.minimum(ahead, 5e-3)], axis=1)

    x = np.zeros((1, 2), np.float32)
    r = np.asarray(fn(net, 0.0, x, np.array([0]), norm="l2"))
    assert int(net(0.0, x + r).argmax()) == 1
    np.testing.assert_allclose(lengths(r, "l2"), 10 / np.sqrt(2), rtol=0.03)


@every_norm
def test_walls_that_stop_half_of_the_entries_do_not_keep_fmn_from_the_boundary(norm):
    def net(params, x):
        w, v = params
        return jax.nn.relu(x @ w) @ v

    rng = np.random.default_rng(0)
    w, v = (rng.normal(size=shape).astype(np.float32) for shape in ((30, 20), (20, 4)))
    x = rng.uniform(size=(B, 30)) * (rng.uniform(size=(B, 30)) < 0.3)
    x = x.astype(np.float32)
    y = np.asarray(net((w, v), x)).argmax(axis=1)
    r = np.asarray(fmn(net, (w, v), x, y, norm=norm, bounds=(0.0, 1.0)))
    assert (np.asarray(net((w, v), x + r)).argmax(axis=1) != y).all()


@every_norm
@pytest.mark.parametrize("gap", [0.1, 0.3])
@pytest.mark.parametrize("fn", [fmn, deepfool], ids=["fmn", "deepfool"])
def test_a_class_that_walls_keep_away_does_not_hide_another(fn, gap, norm):
    def net(gap, x):  # class 1 is nearest, were the first entry not at its wall; class 2 isn't far
        return jnp.stack([0 * x[:, 0], -gap - 10 * x[:, 0], x[:, 1] - 0.7], axis=1)

    x = np.array([[0.0, 0.5]], np.float32)
    r = np.asarray(fn(net, np.float32(gap), x, np.array([0]), norm=norm, bounds=(0.0, 1.0)))
    assert int(net(gap, x + r).argmax()) == 2
    np.testing.assert_allclose(lengths(r, norm), 0.2, rtol=0.01)


@every_norm
def test_deepfool_crosses_without_an_overshoot(norm):
    params, x, y = problem(4)
    assert_least(deepfool(linear, params, x, y, norm=norm, overshoot=0.0), params, x, y, norm)


def test_it_is_found_whichever_class_wins_a_tie():
    # On the hyperplane itself, argmax answers class 0, and rounding never leaves it.
    x, y = np.array([[1.0, 0], [-1, 0]], np.float32), np.array([0, 1])
    w = np.array([[1.0, -1], [0, 0]], np.float32)
    for fn in (fmn, deepfool):
        r = fn(linear, (w, np.zeros(2, np.float32)), x, y, norm="linf")
        np.testing.assert_allclose(lengths(r, "linf"), 1, rtol=0.01)


# Curved nets


@functools.cache
def tanh_problem():
    rng = np.random.default_rng(7)
    params = tuple(rng.normal(size=shape).astype(np.float32) for shape in ((D, 8), (8, 4)))
    x = rng.normal(size=(B, D)).astype(np.float32)
    return params, x, np.asarray(curved(params, x)).argmax(axis=1)


@pytest.mark.parametrize("output", ["logits", "probabilities"])
def test_deepfool_finds_a_boundary_of_a_curved_net_that_no_shorter_one_of_its_kind_does(output):
    params, x, y = tanh_problem()
    r = np.asarray(deepfool(curved, params, x, y, norm="l2", output=output))
    hit = np.asarray(curved(params, x + r)).argmax(axis=1) != y
    np.testing.assert_array_equal(hit, (r != 0).any(axis=1))  # where none is found it says 0
    assert hit.mean() > 0.95
    short = np.asarray(curved(params, x + np.float32(0.998) * r)).argmax(axis=1) != y
    assert short[hit].mean() < 0.1


def arch(params, x):
    """Class 1 only in a thin shell, that DeepFool's overshoot jumps over."""
    t = x[:, 0]
    return jnp.stack([0 * t, params - 400 * (t - 1) ** 2 + 1e-3 * t], axis=1)


def test_where_the_overshoot_is_too_much_the_point_before_it_counts():
    x = np.array([[0.9, 0.0]], np.float32)
    r = deepfool(arch, np.float32(0.02), x, np.array([0]), norm="l2", overshoot=2.0)
    assert int(arch(0.02, x + np.asarray(r)).argmax()) == 1


def test_fmn_is_no_longer_than_deepfool_on_a_curved_net():
    params, x, y = tanh_problem()
    r = fmn(curved, params, x, y, norm="l2")
    assert (np.asarray(curved(params, x + r)).argmax(axis=1) != y).all()
    other = deepfool(curved, params, x, y, norm="l2")
    ratio = lengths(r, "l2") / lengths(other, "l2")
    assert np.median(ratio) < 1
    assert np.quantile(ratio, 0.9) < 1.1


def test_a_targeted_r_reaches_the_class_and_is_0_where_it_is_there():
    params, x, y = tanh_problem()
    target = np.full(B, 2)
    r = np.asarray(fmn(curved, params, x, target, norm="l2", targeted=True))
    np.testing.assert_array_equal(r[y == 2], 0)
    hit = np.asarray(curved(params, x + r)).argmax(axis=1) == 2
    assert hit.mean() > 0.9
    np.testing.assert_array_equal(r[~hit], 0)


def test_fmn_takes_the_step_size_that_suits_the_units_of_x():
    (w, b), x, y = problem(2)
    r = fmn(linear, (w, b), x, y, norm="l2")
    thousand = fmn(linear, (w / 1000, b), 1000 * x, y, norm="l2", step_size=1000.0)
    np.testing.assert_allclose(thousand, 1000 * np.asarray(r), rtol=1e-2, atol=1)


def test_without_an_overshoot_or_steps_enough_what_is_not_found_is_0():
    params, x, y = tanh_problem()
    r = np.asarray(deepfool(curved, params, x, y, norm="l2", steps=1, overshoot=0.0))
    hit = np.asarray(curved(params, x + r)).argmax(axis=1) != y
    np.testing.assert_array_equal(hit, (r != 0).any(axis=1))
    assert 0 < hit.sum() < B


def test_r_is_no_longer_than_any_point_of_the_way_that_misled_the_net():
    params, x, y = tanh_problem()
    seen = []

    def watched(params, x):
        logits = curved(params, x)
        jax.debug.callback(lambda *visit: seen.append(visit), x, logits)
        return logits

    r = lengths(attack.fmn(watched, params, x, y, norm="l2", steps=8), "l2")
    jax.effects_barrier()
    sizes = np.array([lengths(at - x, "l2") for at, _ in seen])
    own = np.eye(4, dtype=bool)[y]
    lead = np.array([np.where(own, -np.inf, z).max(axis=1) - z[own] for _, z in seen])
    # A hit by no more than rounding, a ten-thousandth of the way, counts for none.
    hits = lead > 2e-4 * np.abs(lead[0]) + 1e-4
    assert hits.any(axis=0).mean() > 0.9
    assert (r <= 1.001 * np.where(hits, sizes, np.inf).min(axis=0)).all()


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="only a CPU's cache sets that number")
def test_on_cpu_deepfool_goes_back_for_as_many_classes_as_a_cache_holds(monkeypatch):
    rng = np.random.default_rng(0)
    params = rng.normal(size=(64, 50)).astype(np.float32), np.zeros(50, np.float32)
    x = rng.normal(size=(8, 64)).astype(np.float32)
    y = linear(params, x).argmax(axis=1)

    def compiled(cached):
        monkeypatch.setattr(jacobian, "_CACHED", cached)

        def net(params, x):  # anew, for another program
            return linear(params, x)

        return deepfool.lower(net, params, x, y).compile()

    one, every = compiled(0), compiled(10**9)
    # At once there are the differences of 49 classes, each of x's size.
    every_bytes, one_bytes = (p.memory_analysis().temp_size_in_bytes for p in (every, one))
    assert every_bytes > 49 * x.nbytes > 3 * one_bytes
    np.testing.assert_allclose(one(params, x, y), every(params, x, y), rtol=1e-5, atol=1e-6)
    assert lengths(one(params, x, y), "l2").min() > 0


def published_deepfool(z, x, y, lo, hi, steps=50, overshoot=0.02):
    """DeepFool in l2 as its authors publish it, clipped to the box after each step."""
    total, moved = np.zeros_like(x), x
    for _ in range(steps):
        logits, jac = z(moved)
        if np.argmax(logits) != y:
            break
        d, gap = jac - jac[y][None], logits[y] - logits
        length = np.linalg.norm(d, axis=1)
        distance = np.where(np.arange(len(logits)) == y, np.inf, gap / np.maximum(length, 1e-12))
        j = np.argmin(distance)
        total = total + (distance[j] + 1e-4) * d[j] / length[j]
        moved = np.clip(x + (1 + overshoot) * total, lo, hi)
    return moved - x


def test_deepfool_in_a_box_is_no_longer_than_the_published_one():
    rng = np.random.default_rng(0)
    v, w = rng.normal(size=(20, 30)), rng.normal(size=(30, 5))
    x = np.clip(rng.normal(0.5, 0.6, size=(60, 20)), 0, 1)  # a third of the entries at a wall

    def net(params, x):
        return jnp.tanh(x @ params[0]) @ params[1]

    def z(x):
        hidden = np.tanh(x @ v)
        return hidden @ w, (v @ ((1 - hidden**2)[:, None] * w)).T

    y = np.argmax(np.tanh(x @ v) @ w, axis=1)
    params, images = (jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), a) for a in ((v, w), x))
    r = np.asarray(attack.deepfool(net, params, images, y, bounds=(0.0, 1.0)))
    want = np.array([published_deepfool(z, *row, 0, 1) for row in zip(x, y, strict=True)])
    assert (np.argmax(np.tanh((x + r) @ v) @ w, axis=1) != y).mean() == 1
    ours, theirs = (np.linalg.norm(each, axis=1) for each in (r, want))
    # Both take the same steps; the bisection at the end makes ours the smaller.
    assert np.median(ours) <= np.median(theirs) * (1 + 1e-3)
    assert np.mean(ours > 1.02 * theirs) <= 0.05
