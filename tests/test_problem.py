"""`jaxadv.problem`: the parts of attacks; test_contract tests whole attacks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from nets import ATTACKS
from references import NORMS, lengths

from jaxadv import attack, perturb
from jaxadv.attack import with_info
from jaxadv.problem import (
    Best,
    Problem,
    beyond_rounding,
    bisect_to_boundary,
    iterate,
    run_restarts,
)


def problem(x, norm="l2", eps=None):
    y = np.zeros(len(x), int)
    return Problem.of(lambda _, x: x, None, x, y, norm=norm, eps=eps, bounds=None, minimal=True)


def test_start_at_r_also_gives_the_gradient_there():
    w = jnp.array([[3.0, -3.0, 0.0], [4.0, -4.0, 1.0]])
    x = jnp.array([[1.0, 0.5], [jnp.nan, 1.0], [-1.0, 2.0]])[:, :, None]
    y, r = jnp.array([0, 1, 5]), jnp.array([[0.5, -0.5], [0.25, 0.0], [0.0, -1.0]])[:, :, None]
    posed = Problem.of(lambda w, x: x[:, :, 0] @ w, w, x, y, norm="l2", eps=1.0, bounds=None)
    apart = posed.start()
    together, known = posed.start_at(r)
    np.testing.assert_array_equal(together.logits, (x + r)[:, :, 0] @ w)
    np.testing.assert_array_equal(together.attackable, apart.attackable)
    for got, want in zip(known, apart.gradient(r[:, :, 0]), strict=True):
        np.testing.assert_array_equal(got, want)


def test_an_attack_works_on_rows_and_its_result_has_the_shape_of_x():
    x = jnp.arange(12.0).reshape(2, 3, 2)
    seen = []

    def apply_fn(_, x):
        seen.append(x.shape)
        return x.sum(axis=1)

    bounds = np.zeros((3, 2)), 20.0  # one of the image's shape, one scalar
    posed = Problem.of(
        apply_fn, None, x, jnp.array([1, 1]), norm="l2", eps=1.0, bounds=bounds
    ).start()
    assert posed.x.shape == posed.bounds[0].shape == (2, 6)
    np.testing.assert_array_equal(
        posed.clip_to_box(jnp.full((2, 6), -8.0)), -x.reshape(2, 6).clip(max=8)
    )
    posed.value(jnp.zeros((2, 6)))
    assert set(seen) == {(2, 3, 2)}
    np.testing.assert_array_equal(posed.answer(posed.x), x)


def test_a_loop_ends_when_no_example_needs_another_step():
    def step(i, carry):
        state, numbers = carry
        return state + 1, numbers + i

    start = jnp.array([0, 5, 3]), jnp.int32(0)
    state, numbers = iterate(step, start, 10, while_any=lambda carry: carry[0] < 6)
    np.testing.assert_array_equal(state, [6, 11, 9])
    assert numbers == 0 + 1 + 2 + 3 + 4 + 5
    state, _ = iterate(step, start, 4, while_any=lambda carry: carry[0] < 6)
    np.testing.assert_array_equal(state, [4, 9, 7])
    assert jax.grad(lambda x: iterate(lambda i, x: x * x, x, 3))(1.5) == pytest.approx(8 * 1.5**7)


def test_success_comes_before_loss_in_the_best():
    r = jnp.arange(4.0)[:, None]
    flags, loss = jnp.array([True, True, False, False]), jnp.array([1.0, 1, 1, 1])
    best = Best(r, flags, loss)
    other = Best(-1 - r, jnp.array([True, False, True, False]), jnp.array([2.0, 2, 0, 0]))
    np.testing.assert_array_equal(best.with_point(*other).r[:, 0], [-1, 1, -3, 3])
    np.testing.assert_array_equal(best.with_point(*other).success, [True, True, True, False])
    np.testing.assert_array_equal(best.with_point(*other).loss, [2, 1, 0, 1])
    # Rows that succeed are kept, even if the other has a higher loss.
    np.testing.assert_array_equal(best.unless_done(other).r[:, 0], [0, 1, -3, 3])
    np.testing.assert_array_equal(best.unless_done(other).loss, [1, 1, 0, 1])


def test_bisection_finds_the_boundary_to_a_thousandth():
    edge = jnp.array([0.9, 0.013, 1.0, 0.5, 0.3])
    r, found = jnp.full((5, 1), 2.0), jnp.array([True, True, True, True, False])
    got, _ = bisect_to_boundary(lambda r: r[:, 0] >= 2 * edge, r, found)
    got = got[:, 0] / 2
    assert (got >= edge)[:4].all()
    assert (got <= edge * 1.0011)[:4].all()
    assert got[4] == 1


def test_an_examples_bisection_does_not_depend_on_others():
    near, far = jnp.array([0.9]), jnp.array([0.9, 1e-6])
    (one, tries), (two, more) = (
        bisect_to_boundary(lambda r, e=e: r[:, 0] >= e, jnp.ones((e.size, 1)), e > 0)
        for e in (near, far)
    )
    np.testing.assert_array_equal(one[0], two[0])
    assert tries[0] == more[0] < more[1]


def test_bisecting_0_evaluates_nothing():
    asked = []

    def succeeds(r):
        jax.debug.callback(lambda: asked.append(1))
        return jnp.ones(2, bool)

    r, tries = bisect_to_boundary(succeeds, jnp.array([[0.0], [1.0]]), jnp.array([True, False]))
    jax.effects_barrier()
    np.testing.assert_array_equal(r, [[0], [1]])
    assert not asked
    np.testing.assert_array_equal(tries, 0)


@pytest.mark.parametrize("norm", NORMS)
def test_clip_to_ball_keeps_bfloat16_in_the_ball(norm):
    r = jnp.asarray(np.random.default_rng(3).normal(size=(50, 7)), jnp.bfloat16)
    eps = np.linspace(0, 6, 50).astype(np.float32)
    got = problem(r, norm, eps).clip_to_ball(r)
    assert got.dtype == r.dtype
    size = lengths(got, norm)
    assert (size <= eps * (1 + 1e-6)).all()
    fits = lengths(r, norm) <= eps
    assert 0 < fits.sum() < 50
    np.testing.assert_array_equal(got[fits], r[fits])
    # Each entry is rounded toward 0 by at most an ulp.
    assert (size >= 0.99 * eps)[~fits].all()


def test_runs_stop_once_all_examples_are_fooled():
    def run(i):
        hit = jnp.array([True, i >= 1])
        return Best(jnp.full((2, 1), i, jnp.float32), hit, jnp.full(2, i, jnp.float32))

    x = jnp.zeros((2, 1))
    for restarts, r, needed in ((5, [0, 1], [1, 2]), (1, [0, 0], [1, 1])):
        best, runs = run_restarts(run, restarts, x)
        np.testing.assert_array_equal(best.r[:, 0], r)
        np.testing.assert_array_equal(runs, needed)
    # Among failures, the one of largest loss is kept.
    best, runs = run_restarts(lambda i: run(i)._replace(success=jnp.zeros(2, bool)), 4, x)
    np.testing.assert_array_equal(best.r, [[3], [3]])
    np.testing.assert_array_equal(runs, 4)


# Reports of attacks


W = jnp.array([[3.0, -3.0, 1.0], [4.0, -4.0, 2.0]])
X = jnp.array([[1.0, 1.0], [2.0, 1.0], [-1.0, -1.0]])  # the last is misclassified
Y = jnp.array([0, 0, 0])


def net(w, x):
    return x @ w


LEAST = ("ddn", "deepfool", "fab", "fmn")
REPORTING = {
    name: method if name in LEAST else functools.partial(method, eps=3.0)
    for name, method in ATTACKS.items()
}


def test_every_attack_reports():
    assert set(REPORTING) == {
        name for name in attack.__all__ if hasattr(getattr(attack, name), "with_report")
    }


@pytest.mark.parametrize("name", REPORTING)
def test_with_info_returns_the_same_r(name):
    method, key = REPORTING[name], jax.random.split(jax.random.key(0), 3)
    r, info = with_info(method)(net, W, X, Y, key=key)
    np.testing.assert_array_equal(r, method(net, W, X, Y, key=key))
    for leaf in info:
        assert leaf.shape == (3,)
    if name != "pgd_kl":  # it ignores labels
        np.testing.assert_array_equal(info.success, net(W, X + r).argmax(1) != Y)


@pytest.mark.parametrize(
    ("logits", "y", "success", "loss"),
    [
        ([-np.inf, 5, -np.inf], 1, False, -np.inf),  # no other class is left
        ([-np.inf, 1, 2], 0, True, np.inf),  # its own class is masked
        ([1, 2, 0], 7, True, None),
        ([1, np.nan, 0], 0, False, None),
    ],
)
def test_rows_that_can_not_be_attacked_are_judged_by_their_logits(logits, y, success, loss):
    net, z = (lambda z, x: z + 0 * x[:, :1]), jnp.array([logits])
    _, info = with_info(attack.pgd)(net, z, jnp.ones((1, 2)), jnp.array([y]), eps=1.0)
    assert info.success.item() is success
    assert loss is None or info.loss.item() == loss


def calls(method):
    """The numbers of passes, forward and backward, that an attack makes and reports."""
    forward, backward = [], []

    @jax.custom_vjp
    def counted(x):
        jax.debug.callback(lambda: forward.append(1))
        return x

    def bwd(_, g):
        jax.debug.callback(lambda: backward.append(1))
        return (g,)

    counted.defvjp(lambda x: (counted(x), None), bwd)
    key = jax.random.split(jax.random.key(0), 1)
    of = (lambda w, x: counted(x) @ w), W, X[:1], Y[:1]
    jax.block_until_ready(method(*of, key=key))
    jax.effects_barrier()
    made = len(forward), len(backward)
    _, info = with_info(method)(*of, key=key)
    return made, (int(info.forward[0]), int(info.backward[0]))


@pytest.mark.parametrize("name", ["pgd", "pgd_kl", "apgd", "apgd_multitargeted", "fab", "square"])
def test_the_reported_passes_are_those_made(name):
    made, reported = calls(REPORTING[name])
    assert made == reported


def test_keep_last_does_not_evaluate_the_last_point():
    method = functools.partial(attack.pgd, eps=3.0, start=0.1 * X[:1], steps=2, keep="last")
    assert calls(method) == ((2, 2), (2, 2))


def test_restarts_cost_nothing_for_examples_that_are_fooled_already():
    method = functools.partial(attack.pgd, eps=1.0, steps=4, restarts=3, key=jax.random.key(0))
    _, info = with_info(method)(net, W, X, Y)
    fooled = np.asarray(info.success)
    assert 0 < fooled.sum() < 3
    np.testing.assert_array_equal(info.backward, np.where(fooled, 4, 12))
    np.testing.assert_array_equal(info.forward, 1 + np.where(fooled, 5, 15))


def test_with_info_works_under_jit_and_refuses_methods_that_do_not_report():
    run = jax.jit(lambda w, x: with_info(REPORTING["fmn"])(net, w, x, Y))
    r, info = run(W, X)
    np.testing.assert_allclose(r, REPORTING["fmn"](net, W, X, Y), atol=1e-6)
    assert info.forward.dtype == info.backward.dtype == jnp.int32
    with pytest.raises(TypeError, match=r"expected an attack of jaxadv\.attack.*attack\.reports"):
        with_info(perturb.loss)


@pytest.mark.parametrize("masked", [-np.inf, -1e4, -1e9])
def test_a_masked_class_does_not_change_what_is_beyond_rounding(masked):
    x, y = jnp.array([[1.0, 0.5, -2.0]]), jnp.array([0])

    def net(_, x):
        return jnp.pad(x, ((0, 0), (0, 1)), constant_values=masked)

    def least(net):  # the smallest loss that counts
        posed = Problem.of(net, None, x, y, norm="l2", eps=1.0, bounds=None)
        clear = beyond_rounding(posed.start())
        tried = jnp.geomspace(1e-8, 1e3, 500)
        found = jax.vmap(lambda loss: clear(jnp.array([True]), loss[None]))(tried)
        return tried[jnp.argmax(found)]

    assert least(net) == least(lambda _, x: x) < 1e-4
