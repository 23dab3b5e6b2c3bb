"""Inputs that broke this library, or others that do its job, across all methods."""

import functools
import math
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxadv import attack, evaluate, inputs, norms, objectives, perturb

KEYS = jax.random.split(jax.random.key(0), 4)
EPS = 0.5
BOUNDED = {  # methods whose r has at most size eps, in a few steps
    "alpha": perturb.alpha,
    "loss": perturb.loss,
    "loss_sign": perturb.loss_sign,
    "vat": functools.partial(perturb.virtual, key=KEYS),
    "pgd": functools.partial(attack.pgd, steps=3),
    "pgd restarts": functools.partial(attack.pgd, steps=3, restarts=2, key=KEYS),
    "apgd": functools.partial(attack.apgd, steps=3, key=KEYS),
    "apgd_targeted": functools.partial(attack.apgd_targeted, steps=3, n_targets=2, key=KEYS),
    "fab": functools.partial(attack.fab, steps=3, n_targets=2),
    "fmn": functools.partial(attack.fmn, steps=3),
    "deepfool": functools.partial(attack.deepfool, steps=3),
    "square": functools.partial(attack.square, steps=3, key=KEYS),
}
every_method = pytest.mark.parametrize("name", BOUNDED)


def linear(w, x):
    return x.reshape(x.shape[0], -1) @ w


def batch(*shape, seed=0):
    """Return weights `[D, 3]`, examples of this shape and the labels that the net gives them."""
    key_w, key_x = jax.random.split(jax.random.key(seed))
    w = jax.random.normal(key_w, (math.prod(shape[1:]), 3))
    x = jax.random.normal(key_x, shape)
    return w, x, jnp.argmax(linear(w, x), axis=1)


# Gradients


def norm_at_zero(w, x):
    """A net of finite logits whose gradient is NaN at 0."""
    size = jnp.sqrt(jnp.sum(x**2, axis=(1, 2, 3)))[:, None]
    return linear(w, x) + jnp.where(jnp.arange(3) == 0, size, 0)


@every_method
def test_a_gradient_that_is_not_finite_gives_0_in_its_row(name):
    w, x, _ = batch(4, 2, 2, 1)
    x = x.at[1].set(0)
    y = jnp.argmax(norm_at_zero(w, x), axis=1)
    assert bool(jnp.all(jnp.isfinite(norm_at_zero(w, x))))
    r = BOUNDED[name](norm_at_zero, w, x, y, eps=EPS)
    assert bool(jnp.all(jnp.isfinite(r)))
    others = jnp.array([0, 2, 3])
    assert bool(jnp.all(norms.norm(r[others], "l2") > 0))
    if name not in ("apgd", "apgd_targeted", "pgd restarts", "square"):  # which leave x at random
        np.testing.assert_array_equal(r[1], 0)


@pytest.mark.parametrize("norm", ["l1", "l2", "linf"])
def test_a_gradient_that_is_not_finite_is_counted(norm):
    w, x, _ = batch(4, 2, 2, 1)
    x = x.at[1].set(0)
    y = jnp.argmax(norm_at_zero(w, x), axis=1)
    method = functools.partial(perturb.loss, norm=norm)
    outcome = evaluate.robust(norm_at_zero, w, x, y, method, eps=EPS, norm=norm)
    np.testing.assert_array_equal(outcome.zero, [False, True, False, False])
    assert not outcome.nonfinite.any()


def same_gradient(gap, constant=False, matrix=False):
    """Return a net whose top wrong class has y's gradient, and the ascent of the third class."""
    g, v = np.random.default_rng(0).normal(size=(2, 6)).astype(np.float32)
    g = 0 * g if constant else g
    shift = jnp.array([gap, 0, -gap], jnp.float32)

    def as_matrix(_, x):
        return x @ jnp.stack([g, g, v], axis=1) + shift[None]

    def as_stack(_, x):
        return jnp.stack([x @ g, x @ g, x @ v], axis=1) + shift[None]

    return as_matrix if matrix else as_stack, v - g


@pytest.mark.parametrize("gap", [20.0, 90.0, 300.0])
@pytest.mark.parametrize("kind", ["stack", "constant", "matrix"])
@pytest.mark.parametrize("method", [perturb.alpha, perturb.loss])
def test_a_third_class_is_found_behind_one_with_the_true_class_s_gradient(method, kind, gap):
    net, ascent = same_gradient(gap, constant=kind == "constant", matrix=kind == "matrix")
    x, y = 0.1 * jax.random.normal(KEYS[0], (4, 6)), jnp.zeros(4, jnp.int32)
    r = np.asarray(method(net, None, x, y, eps=EPS))
    cosine = r @ ascent / np.linalg.norm(ascent) / np.linalg.norm(r, axis=1)
    np.testing.assert_allclose(cosine, 1, atol=1e-5)  # some ulps of float32, over 6 entries
    np.testing.assert_allclose(np.linalg.norm(r, axis=1), EPS, rtol=1e-6)


@pytest.mark.parametrize("gap", [90.0, 300.0])
def test_pgd_finds_a_third_class_behind_one_with_the_true_class_s_gradient(gap):
    net, ascent = same_gradient(gap)
    x, y = 0.1 * jax.random.normal(KEYS[0], (4, 6)), jnp.zeros(4, jnp.int32)
    eps = 2.5 * gap / float(np.linalg.norm(ascent))  # beyond the boundary
    r = attack.pgd(net, None, x, y, eps=eps, steps=10)
    np.testing.assert_array_equal(jnp.argmax(net(None, x + r), axis=1), 2)


def test_two_classes_of_one_gradient_leave_no_direction():
    w = jnp.ones((5, 2))
    x, y = jax.random.normal(KEYS[0], (4, 5)), jnp.zeros(4, jnp.int32)
    for name in ("alpha", "loss", "loss_sign", "pgd"):
        np.testing.assert_array_equal(BOUNDED[name](linear, w, x, y, eps=EPS), 0)


def near_overflow(scale):
    """Return a net, its weights, examples and labels, with logits of about this size."""
    w, x, y = batch(50, 8)
    assert bool(jnp.all(jnp.isfinite(scale * linear(w, x))))
    return (lambda w, x: scale * linear(w, x)), w, x, y


@pytest.mark.parametrize("norm", ["l1", "l2", "linf"])
def test_logits_of_1e37_have_the_nearest_class(norm):
    net, w, x, y = near_overflow(1e37)
    r = np.asarray(perturb.alpha(net, w, x, y, norm=norm, eps=EPS))
    # Probabilities fall so steeply there that the second largest logit is the nearest class.
    nearest = jnp.argsort(linear(w, x), axis=1)[:, -2]
    d = w.T[nearest] - w.T[y]
    # A direction is rounded some ulps of its largest entry.
    np.testing.assert_allclose(r, EPS * norms.steepest(d, norm), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("norm", ["l1", "l2", "linf"])
@pytest.mark.parametrize("method", [perturb.alpha, perturb.loss])
def test_logits_whose_differences_overflow_have_a_direction(method, norm):
    net, w, x, y = near_overflow(4e37)
    r = method(net, w, x, y, norm=norm, eps=EPS)
    np.testing.assert_allclose(norms.norm(r, norm), EPS, rtol=1e-6)
    before, after = (
        jnp.take_along_axis(linear(w, v), y[:, None], axis=1) - linear(w, v).mean(1, keepdims=True)
        for v in (x, x + r)
    )
    assert bool(jnp.all(after < before))


@pytest.mark.parametrize("norm", ["l1", "l2", "linf"])
def test_the_least_perturbation_of_logits_near_overflow_is_infinite_and_not_nan(norm):
    net, w, x, y = near_overflow(4e37)
    least = perturb.alpha(net, w, x, y, norm=norm)
    np.testing.assert_array_equal(jnp.max(jnp.abs(least), axis=1), jnp.inf)


# Sizes


@every_method
def test_a_traced_eps_that_is_not_finite_gives_nan_in_its_row(name):
    w, x, y = batch(4, 2, 2, 1)

    @jax.jit
    def r(eps):
        return BOUNDED[name](linear, w, x, y, eps=eps)

    got = np.asarray(r(jnp.array([EPS, jnp.nan, jnp.inf, EPS]))).reshape(4, -1)
    assert np.isnan(got[1:3]).all()
    assert np.isfinite(got[[0, 3]]).all()


def test_a_relative_eps_of_an_input_whose_norm_overflows_is_nan_and_counted():
    w, x, y = batch(4, 2, 2, 1)
    x = x.at[2].set(3e38)
    lwa = objectives.adversarial(linear, perturb.loss, eps=objectives.Relative(0.1))
    _, (_, aux) = lwa(w, None, (x, y), key=KEYS[0], step=jnp.zeros((), jnp.int32))
    assert int(aux.nonfinite) == 1


@every_method
@pytest.mark.parametrize("bounds", [None, (-8.0, 8.0)])
def test_a_bfloat16_r_is_no_larger_than_eps(name, bounds):
    w, x, _ = batch(4, 6, 6, 1)
    w, x = w.astype(jnp.bfloat16), x.astype(jnp.bfloat16)
    y = jnp.argmax(linear(w, x), axis=1)
    eps = 8 / 255
    r = BOUNDED[name](linear, w, x, y, eps=eps, bounds=bounds)
    assert r.dtype == jnp.bfloat16
    # The norm adds up 36 float32 squares, and eps is rounded once.
    assert float(norms.norm(r, "l2").max()) <= eps * (1 + 1e-6)


@pytest.mark.parametrize("largest", [1e5, 1e8, 1e12, 1e30])
def test_the_l1_projection_of_huge_entries_has_size_eps(largest):
    v = jnp.array([[largest, 0.5 * largest, -0.1]])
    got = norms.project(v, 0.3, "l1")
    np.testing.assert_allclose(got, [[0.3, 0, 0]], rtol=1e-6)  # an ulp or two
    got = norms.project(jnp.full((1, 4), largest), 0.3, "l1")
    np.testing.assert_allclose(got, np.full((1, 4), 0.075), rtol=1e-6)


# Arguments


class Unhashable:
    __hash__ = None

    def __call__(self, w, x):
        return linear(w, x)


@pytest.mark.parametrize(
    "name", [n for n in BOUNDED if n not in ("alpha", "loss", "loss_sign", "vat")]
)
def test_an_unhashable_net_is_an_error_with_a_cure(name):
    w, x, y = batch(4, 2, 2, 1)
    with pytest.raises(TypeError, match=r"expected a hashable apply_fn.*got Unhashable; make its"):
        BOUNDED[name](Unhashable(), w, x, y, eps=EPS)


@every_method
@pytest.mark.parametrize("bounds", [(None, 1.0), (0.0, None)])
def test_an_open_end_of_the_box_is_an_error_with_a_cure(name, bounds):
    w, x, y = batch(4, 2, 2, 1)
    with pytest.raises(ValueError, match=r"expected two bounds, got .*None.*; pass -jnp.inf"):
        BOUNDED[name](linear, w, x, y, eps=EPS, bounds=bounds)


@pytest.mark.parametrize("method", [attack.pgd, functools.partial(attack.apgd, key=KEYS)])
def test_a_mean_over_the_batch_is_no_loss_of_an_attack(method):
    w, x, y = batch(4, 5)

    def mean(logits, labels):
        return jnp.mean(attack.dlr(logits, labels))

    with pytest.raises(ValueError, match=r"one loss per example, \[4\], got shape \(\); leave out"):
        method(linear, w, x, y, eps=EPS, steps=2, loss_fn=mean)


def test_tokens_are_told_from_pixels():
    with pytest.raises(TypeError, match=r"got int32; cast pixels.*tokens.*embeddings as x"):
        perturb.loss(linear, jnp.ones((5, 3)), jnp.zeros((4, 5), jnp.int32), jnp.zeros(4), eps=EPS)


def test_many_classes_name_candidates():
    w, x = jnp.eye(6, 120), jax.random.normal(KEYS[0], (2, 6))
    y = jnp.zeros(2, jnp.int32)
    with pytest.warns(UserWarning, match="119 backward passes.*candidates=10"):
        r = perturb.alpha(linear, w, x, y, eps=EPS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(r, perturb.alpha(linear, w, x, y, eps=EPS, candidates=119))


# Shapes


@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 3, 2, 2)])
@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("bounds", [None, (-1.0, 1.0)])
def test_square_takes_vectors(shape, norm, bounds):
    w, x, _ = batch(4, *shape)
    x = jnp.clip(x, -1, 1)
    y = jnp.argmax(linear(w, x), axis=1)
    r = attack.square(linear, w, x, y, eps=3.0, norm=norm, steps=100, key=KEYS, bounds=bounds)
    assert r.shape == x.shape
    assert float(norms.norm(r, norm).max()) <= 3 * (1 + 1e-6)
    if bounds is not None:
        assert bool(jnp.all(jnp.abs(x + r) <= 1))
    reach = perturb.loss(linear, w, x, y, eps=3.0, norm=norm, bounds=bounds)
    fooled = jnp.argmax(linear(w, x + r), axis=1) != y
    # A linear net that one step misleads, random search misleads as well.
    assert bool(jnp.all(fooled >= (jnp.argmax(linear(w, x + reach), axis=1) != y)))


def test_finite_takes_the_size_into_account():
    x, logits = jnp.ones((3, 2)), jnp.ones((3, 2))
    got = inputs.finite(x, logits, jnp.array([1.0, jnp.nan, jnp.inf]))
    np.testing.assert_array_equal(got, [True, False, False])
