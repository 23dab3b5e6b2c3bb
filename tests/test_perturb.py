"""`jaxadv.perturb`: sizes, classes of equal gradients, and logits near overflow.

test_exactness tests directions, test_contract what all methods have in common. All methods are
compiled as one program, and the net takes what a test changes as parameters.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from references import NORMS, lengths, steepest

from jaxadv import perturb


def each_norm(name, fn, **kwargs):
    return {f"{name}-{norm}": functools.partial(fn, norm=norm, **kwargs) for norm in NORMS}


METHODS = {
    **each_norm("alpha", perturb.alpha),
    **each_norm("loss", perturb.loss),
    "loss_sign-l2": functools.partial(perturb.loss_sign),
    **each_norm("vat", perturb.vat),
}


def norm_of(name):
    return name.split("-")[1]


def call(name, apply_fn, params, x, y, eps, key, bounds=None):
    return METHODS[name](apply_fn, params, x, y, eps=eps, key=key, bounds=bounds)


@functools.partial(jax.jit, static_argnums=0)
def every(apply_fn, params, x, y, eps, key):
    return {name: call(name, apply_fn, params, x, y, eps, key) for name in METHODS}


def net(params, x):
    """One tanh layer; `c` is [B, K], so that a test can set the logits of one example."""
    w, b, v, c = (params[k].astype(x.dtype) for k in "wbvc")
    return jnp.tanh(x @ w + b[None]) @ v + c


B, D, H, K = 5, 6, 4, 3


def problem():
    """Arguments of `every` after the net, which classifies all examples correctly."""
    rng = np.random.default_rng(0)
    shapes = {"w": (D, H), "b": (H,), "v": (H, K), "c": (B, K)}
    params = {k: rng.normal(size=shape).astype(np.float32) for k, shape in shapes.items()}
    x = rng.normal(size=(B, D)).astype(np.float32)
    eps = np.linspace(0.3, 1.1, B).astype(np.float32)
    y = np.asarray(net(params, x)).argmax(axis=1)
    return params, x, y, eps, jax.random.split(jax.random.key(0), B)


# Sizes


@functools.cache
def in_dtype(dtype):
    params, x, y, eps, key = problem()
    x = jnp.asarray(x, dtype)
    return every(net, params, x, y, eps, key), eps


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(
    ("dtype", "rtol"), [(jnp.float32, 1e-6), (jnp.bfloat16, 0.01), (jnp.float16, 0.01)]
)
def test_a_single_step_has_exactly_the_size_eps_of_its_example(name, dtype, rtol):
    r, eps = in_dtype(dtype)
    # In float32, a few roundings of 6e-8; in the others, entries of r have 8 and 11 bits.
    np.testing.assert_allclose(lengths(r[name], norm_of(name)), eps, rtol=rtol)


# Op by op, each intermediate result is rounded to x's dtype; a compiler may keep it in float32.
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("width", [0.5, 255.0])
@pytest.mark.parametrize("name", ["alpha-l2", "loss_sign-l2"])
def test_scalar_bounds_hold_op_by_op_in_low_precision(name, dtype, width):
    params, _, y, _, key = problem()
    for seed in range(3):
        rng = np.random.default_rng(seed)
        middle, below, above = rng.normal(), width * rng.random(), width * rng.random()
        lo, hi = (float(jnp.asarray(end, dtype)) for end in (middle - below, middle + above))
        x = jnp.asarray(rng.normal(size=(B, D)).clip(lo, hi), dtype)
        r = call(name, net, params, x, y, 1.0, key, (lo, hi))
        assert r.dtype == dtype
        assert (lo <= x + r).all()
        assert (x + r <= hi).all()
        assert (lengths(r, norm_of(name)) <= 1 + 1e-6).all()


@pytest.mark.parametrize(
    "method",
    [perturb.loss, perturb.alpha, functools.partial(perturb.alpha, chunk=1), perturb.vat],
    ids=["loss", "alpha", "alpha by chunks", "vat"],
)
def test_outside_of_jit_a_second_call_compiles_nothing(method, caplog):
    w, x, y = near_overflow(1.0)[1:]

    def again(x):
        return method(lambda w, x: jnp.tanh(x @ w), w, x, y, eps=0.5, key=jax.random.key(0))

    again(x)
    with jax.log_compiles(), caplog.at_level("WARNING"):
        again(2 * x)
    assert [line for line in caplog.messages if "ompil" in line] == []


# Classes of equal gradients, and logits near overflow

alpha, loss = (
    jax.jit(fn, static_argnums=0, static_argnames="norm") for fn in (perturb.alpha, perturb.loss)
)


def same_gradient(gap, kind):
    """A net whose top wrong class has y's gradient, and the direction toward the third class."""
    g, v = np.random.default_rng(0).normal(size=(2, 6)).astype(np.float32)
    g = 0 * g if kind == "constant" else g
    shift = jnp.array([gap, 0, -gap], jnp.float32)[None]

    def apply_fn(_, x):
        if kind == "matrix":
            return x @ jnp.stack([g, g, v], axis=1) + shift
        return jnp.stack([x @ g, x @ g, x @ v], axis=1) + shift

    return apply_fn, v - g


@pytest.mark.parametrize("gap", [20.0, 300.0])
@pytest.mark.parametrize("kind", ["stack", "constant", "matrix"])
@pytest.mark.parametrize(
    "method",
    [alpha, jax.jit(functools.partial(perturb.alpha, candidates=1), static_argnums=0), loss],
    ids=["alpha", "alpha of one candidate", "loss"],
)
def test_the_third_class_is_found_if_the_top_wrong_class_has_ys_gradient(method, kind, gap):
    apply_fn, ascent = same_gradient(gap, kind)
    x, y = 0.1 * np.random.default_rng(1).normal(size=(4, 6)).astype(np.float32), np.zeros(4, int)
    want = 0.5 * ascent / np.linalg.norm(ascent)
    # A few float32 ulps over 6 entries.
    np.testing.assert_allclose(method(apply_fn, None, x, y, eps=0.5), [want] * 4, atol=1e-5)


def test_two_classes_of_equal_gradients_give_no_direction():
    w, x, y = np.ones((D, 2), np.float32), problem()[1], np.zeros(B, int)
    for method in (alpha, loss):
        np.testing.assert_array_equal(method(lambda w, x: x @ w, w, x, y, eps=0.5), 0)


def near_overflow(scale):
    """A net, its weights, examples and labels, with logits of at most `scale`."""
    rng = np.random.default_rng(0)
    w, x = (rng.normal(size=shape).astype(np.float32) for shape in ((8, 3), (50, 8)))
    w /= np.abs(x @ w).max()
    return (lambda w, x: scale * (x @ w)), w, x, (x @ w).argmax(axis=1)


@pytest.mark.parametrize("norm", NORMS)
def test_the_nearest_class_is_found_at_logits_of_1e29(norm):
    apply_fn, w, x, y = near_overflow(1e29)
    r = alpha(apply_fn, w, x, y, norm=norm, eps=0.5)
    # Probabilities fall so steeply there that the class with the second largest logit is nearest.
    d = w.T[np.argsort(x @ w, axis=1)[:, -2]] - w.T[y]
    want = [0.5 * steepest(row, norm) for row in d]
    # A direction is off by a few ulps of its largest entry.
    np.testing.assert_allclose(r, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", [alpha, loss])
@pytest.mark.parametrize("scale", [60_000, 8_000])
def test_in_float16_too_gradients_near_overflow_are_scaled(method, scale):
    apply_fn, w, x, y = near_overflow(scale)
    w, x = 64 * w, x / 64  # the same logits, but their gradients are larger than 65,504

    def half(w, x):
        return np.float16(scale) * (x.astype(jnp.float16) @ w.astype(jnp.float16))

    r = np.asarray(method(half, w, x, y, eps=0.5))
    np.testing.assert_allclose(lengths(r, "l2"), 0.5, rtol=1e-6)
    # The net's weights and gradients are rounded to 11 bits.
    np.testing.assert_allclose(r, method(apply_fn, w, x, y, eps=0.5), atol=2e-3)


@pytest.mark.parametrize("norm", NORMS)
def test_logits_whose_differences_overflow_have_a_direction_and_an_infinite_distance(norm):
    apply_fn, w, x, y = near_overflow(3.3e38)

    def lead(x):  # of the label over the mean
        z = x @ w
        return z[np.arange(len(y)), y] - z.mean(axis=1)

    for method in (alpha, loss):
        r = np.asarray(method(apply_fn, w, x, y, norm=norm, eps=0.5))
        np.testing.assert_allclose(lengths(r, norm), 0.5, rtol=1e-6)
        assert (lead(x + r) < lead(x)).all()
    least = alpha(apply_fn, w, x, y, norm=norm)
    np.testing.assert_array_equal(np.abs(least).max(axis=1), np.inf)


def test_an_ensemble_of_parameters_is_perturbed_under_vmap():
    params, x, y, eps, _ = problem()
    ensemble = jax.tree.map(lambda a: np.stack([a, 2 * a, -a]), params)
    several = jax.jit(jax.vmap(lambda p: perturb.alpha(net, p, x, y, eps=eps)))(ensemble)
    one = alpha(net, jax.tree.map(lambda a: a[2], ensemble), x, y, eps=eps)
    np.testing.assert_allclose(several[2], one, rtol=1e-5, atol=1e-6)  # a different program
