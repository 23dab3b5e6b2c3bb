"""Every message of `jaxadv.inputs`: what was expected, what came, and the cure; never silent."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxadv import attack, evaluate, inputs, jacobian, logistic, norms, perturb

B, D, K = 4, 5, 3
X = np.linspace(-1, 1, B * D, dtype=np.float32).reshape(B, D)
W = np.linspace(1, -1, D * K, dtype=np.float32).reshape(D, K) ** 3
Y = np.array([0, 1, 2, 1])
KEY = jax.random.key(0)

METHODS = {
    "alpha": functools.partial(perturb.alpha, eps=0.5),
    "minimal": perturb.alpha,
    "loss": functools.partial(perturb.loss, eps=0.5),
    "loss_sign": functools.partial(perturb.loss_sign, eps=0.5),
    "virtual": functools.partial(perturb.vat, eps=0.5, key=KEY),
    "pgd": functools.partial(attack.pgd, eps=0.5, steps=2),
}
WITH_LABELS = METHODS | {
    "class_differences": jacobian.class_differences,
    "measure": evaluate.measure,
    "measure of r": functools.partial(evaluate.measure, r=X),
}
WITH_NET = WITH_LABELS | {
    "softmax_jacobian": lambda apply_fn, params, x, y: jacobian.softmax_jacobian(
        apply_fn, params, x
    ),
    "pullback": lambda apply_fn, params, x, y: jacobian.pullback(apply_fn, params, x),
}
WITH_NORM = {
    "norm": lambda norm: norms.norm(X, norm),
    "dual": norms.dual,
    "steepest": lambda norm: norms.steepest(X, norm),
    "rescale": lambda norm: norms.rescale(X, 1.0, norm),
    "project": lambda norm: norms.project(X, 1.0, norm),
    "sample": lambda norm: norms.sample(jax.random.split(KEY, B), X, 1.0, norm),
    "alpha": lambda norm: METHODS["alpha"](net, W, X, Y, norm=norm),
    "minimal": lambda norm: METHODS["minimal"](net, W, X, Y, norm=norm),
    "loss": lambda norm: METHODS["loss"](net, W, X, Y, norm=norm),
    "virtual": lambda norm: METHODS["virtual"](net, W, X, Y, norm=norm),
    "pgd": lambda norm: METHODS["pgd"](net, W, X, Y, norm=norm),
    "measure": lambda norm: evaluate.measure(net, W, X, Y, X, norm=norm),
    "logistic.loss": lambda norm: logistic.loss(X[0], X, np.ones(B), eps=0.1, norm=norm),
    "logistic.adversary": lambda norm: logistic.adversary(X[0], X, np.ones(B), eps=0.1, norm=norm),
}


def net(params, x):
    return x.reshape(x.shape[0], -1) @ params


def raises(error, expected, got, cure):
    """One error of exactly this type, with these three parts in this order."""
    pattern = ".*".join(re.escape(part) for part in (expected, got, cure))
    return pytest.raises(error, match=f"(?s)^expected {pattern}", check=lambda e: type(e) is error)


def traced(fn, *args, **kwargs):
    """Call without computing anything: all errors are raised at trace time."""
    jax.eval_shape(lambda: fn(*args, **kwargs))


# x


@pytest.mark.parametrize("dtype", ["int32", "uint8", "bool"])
@pytest.mark.parametrize("name", WITH_NET)
def test_x_must_be_floating_point(name, dtype):
    with raises(TypeError, "x of a floating-point dtype", f"got {dtype}", "x.astype(jnp.float32)"):
        traced(WITH_NET[name], net, W, X.astype(dtype), Y)


@pytest.mark.parametrize("name", WITH_NET)
def test_x_must_have_a_batch_axis(name):
    with raises(ValueError, "x of shape [B, ...]", f"got ({D},)", "x[None]"):
        traced(WITH_NET[name], net, W, X[0], Y[:1])


@pytest.mark.parametrize("x", [np.float32(1), np.zeros(3, np.float32), np.zeros((3, 0, 2), "f4")])
def test_examples_must_have_entries(x):
    with raises(ValueError, "x of shape [B, ...]", f"got {np.shape(x)}", "x[None]"):
        inputs.examples(x)


def test_an_empty_batch_is_a_batch():
    assert inputs.examples(X[:0]).shape == (0, D)


# Labels


@pytest.mark.parametrize("name", WITH_LABELS)
def test_soft_labels_are_no_labels(name):
    with raises(TypeError, "integer labels [B", "got float32 of shape (4, 3)", "jnp.argmax(y, "):
        traced(WITH_LABELS[name], net, W, X, np.eye(K, dtype=np.float32)[Y])


@pytest.mark.parametrize("name", WITH_LABELS)
def test_one_hot_labels_are_no_labels(name):
    with raises(ValueError, "integer labels of shape [4]", "got (4, 3)", "jnp.argmax(y, "):
        traced(WITH_LABELS[name], net, W, X, np.eye(K, dtype=np.int32)[Y])


@pytest.mark.parametrize("name", WITH_LABELS)
@pytest.mark.parametrize("n", [1, B - 1, B + 1])
def test_there_are_as_many_labels_as_examples(name, n):
    # As pgd can't know what labels its loss takes, its words for "got" are its own.
    with pytest.raises(ValueError, match=r"expected as many labels as examples, got .*this very"):
        traced(WITH_LABELS[name], net, W, X, np.zeros(n, np.int32))


def test_the_message_on_the_number_of_labels_has_both_numbers():
    with raises(ValueError, "as many labels as examples", "got 3 labels for 4", "pass the labels"):
        inputs.labels(Y[:3], B)


@pytest.mark.parametrize("y", [0, np.int32(0)])
def test_one_label_is_not_a_batch_of_labels(y):
    with raises(ValueError, "integer labels of shape [1]", "got ()", "jnp.argmax(y, axis=-1)"):
        inputs.labels(y, 1)


@pytest.mark.parametrize("y", [Y == 1, Y.astype(np.float32), Y.astype(np.complex64)])
def test_labels_are_integers(y):
    with raises(TypeError, "integer labels [B", f"got {y.dtype} of shape (4,)", "y.astype(int)"):
        inputs.labels(y, B)


@pytest.mark.parametrize("y", [[0, 1, 2, 1], Y, Y.astype(np.uint8), Y.astype(np.int16)])
def test_labels_of_any_integer_dtype_become_int32(y):
    got = inputs.labels(y, B)
    assert got.dtype == jnp.int32
    np.testing.assert_array_equal(got, Y)


def test_labels_beyond_int32_do_not_wrap_into_a_class(x64):
    y = jnp.array([2**32, -(2**32), 2**33 + 1, 2**63 - 1])
    got = inputs.labels(y, B)
    assert not np.isin(got, np.arange(K)).any()


@pytest.mark.parametrize("fn", [attack.pgd, attack.apgd, perturb.loss])
def test_a_numpy_label_beyond_int32_is_no_class(fn):
    r = fn(net, W, X, np.int64([2**32, 0, 2**32 + 1, -(2**32)]), eps=1.0, key=KEY)
    assert jnp.any(r != 0, axis=1).tolist() == [False, True, False, False]


# Logits


@pytest.mark.parametrize("name", WITH_NET)
@pytest.mark.parametrize(
    ("output", "got"),
    [
        (lambda z: (z, {"batch_stats": z}), "got tuple"),
        (lambda z: {"logits": z}, "got dict"),
        (lambda z: None, "got NoneType"),
    ],
    ids=["tuple", "dict", "None"],
)
def test_apply_fn_returns_one_array(name, output, got):
    with raises(TypeError, "apply_fn to return logits", got, "wrap it so that it returns"):
        traced(WITH_NET[name], lambda params, x: output(net(params, x)), W, X, Y)


@pytest.mark.parametrize("name", WITH_NET)
def test_logits_are_floating_point(name):
    with raises(TypeError, "apply_fn to return floating-point logits", "got int32", "argmax"):
        traced(WITH_NET[name], lambda params, x: jnp.sign(net(params, x)).astype(int), W, X, Y)


@pytest.mark.parametrize("name", WITH_LABELS)
@pytest.mark.parametrize(
    ("output", "shape"),
    [
        (lambda z: z[:, 0], "(4,)"),
        (lambda z: z[:, None], "(4, 1, 3)"),
        (lambda z: z[0], "(3,)"),
        (lambda z: z[:2], "(2, 3)"),
        (lambda z: z.T, "(3, 4)"),
    ],
    ids=["[B]", "[B, 1, K]", "[K]", "fewer rows", "transposed"],
)
def test_logits_are_a_row_for_each_example(name, output, shape):
    with raises(
        ValueError, "apply_fn to return logits of shape [4, K]", f"got {shape}", "one row of K"
    ):
        traced(WITH_LABELS[name], lambda params, x: output(net(params, x)), W, X, Y)


def test_softmax_jacobian_too_wants_a_row_for_each_example():
    with raises(ValueError, "apply_fn to return logits of shape [1, K]", "got (1,)", "one row of"):
        traced(jacobian.softmax_jacobian, lambda params, x: net(params, x)[:, 0], W, X)


@pytest.mark.parametrize("name", WITH_NET)
@pytest.mark.parametrize("n_logits", [0, 1])
def test_one_logit_is_not_two_classes(name, n_logits):
    with raises(ValueError, "logits of at least 2 classes", f", {n_logits})", "jnp.concatenate"):
        traced(WITH_NET[name], net, W[:, :n_logits], X, 0 * Y)


# eps

WITH_EPS = {
    name: functools.partial(lambda fn, eps: fn(net, W, X, Y, eps=eps), fn)
    for name, fn in METHODS.items()
    if name != "minimal"
} | {
    "step_size": lambda eps: METHODS["pgd"](net, W, X, Y, step_size=eps),
    "rescale": lambda eps: norms.rescale(X, eps, "l2"),
    "project": lambda eps: norms.project(X, eps, "l2"),
    "sample": lambda eps: norms.sample(jax.random.split(KEY, B), X, eps, "l2"),
    "logistic.loss": lambda eps: logistic.loss(X[0], X, np.ones(B), eps=eps, norm="l2"),
    "logistic.adversary": lambda eps: logistic.adversary(X[0], X, np.ones(B), eps=eps, norm="l2"),
}
with_eps = pytest.mark.parametrize("name", WITH_EPS)


@with_eps
@pytest.mark.parametrize("eps", [-0.5, -1, float("nan"), float("inf"), np.float64(-0.5)])
def test_a_number_eps_is_finite_and_not_negative(name, eps):
    with raises(ValueError, "a finite eps >= 0", f"got {eps}", "eps is a size"):
        traced(WITH_EPS[name], eps)


@with_eps
def test_a_numpy_eps_is_checked_in_each_entry(name):
    with raises(ValueError, "a finite eps >= 0", "got [ 0.5  0.5 -0.5  0.5]", "eps is a size"):
        traced(WITH_EPS[name], np.array([0.5, 0.5, -0.5, 0.5]))


@with_eps
@pytest.mark.parametrize("shape", [(1,), (B - 1,), (B, 1), (B, D), (1, 1)])
@pytest.mark.parametrize("kind", [np.ones, jnp.ones], ids=["NumPy", "jax"])
def test_eps_is_one_size_or_one_per_example(name, shape, kind):
    with raises(ValueError, "eps of shape () or [4]", f"got {shape}", "one for each example"):
        traced(WITH_EPS[name], kind(shape))


@with_eps
@pytest.mark.parametrize("eps", ["0.5", [0.5] * B, (0.5,), {"eps": 0.5}])
def test_eps_is_a_number_or_an_array(name, eps):
    got = f"got {type(eps).__name__}"
    with raises(TypeError, "eps to be a number or an array", got, "one size per example"):
        traced(WITH_EPS[name], eps)


def test_the_radius_has_the_dtype_of_norms_and_one_entry_per_example():
    for eps in (2, 0.5, np.float64(0.5), jnp.ones(B, jnp.int32), jnp.float16(0.5)):
        got = inputs.radius(eps, X)
        assert (got.shape, got.dtype) == ((B,), jnp.float32)


# bounds

WITH_BOUNDS = {
    name: functools.partial(lambda fn, bounds: fn(net, W, X, Y, bounds=bounds), fn)
    for name, fn in METHODS.items()
} | {"clip_to_box": lambda bounds: norms.clip_to_box(X, X, bounds)}
with_bounds = pytest.mark.parametrize("name", WITH_BOUNDS)


@with_bounds
@pytest.mark.parametrize("bounds", [0.5, (0.0,), (0.0, 0.5, 1.0), np.array([0.0, 1.0])])
def test_bounds_are_a_pair(name, bounds):
    with pytest.raises(ValueError, match=r"^expected bounds=\(lo, hi\), got .*pass a pair, e\.g\."):
        traced(WITH_BOUNDS[name], bounds)


@with_bounds
@pytest.mark.parametrize(
    "bounds",
    [(1.0, 0.0), (1, 0), (np.ones((B, D)), np.zeros(D)), (0.0, float("nan"))],
    ids=["floats", "integers", "arrays", "NaN"],
)
def test_bounds_that_are_swapped_are_named(name, bounds):
    with raises(ValueError, "bounds (lo, hi) with lo <= hi", "got (", "swap them"):
        traced(WITH_BOUNDS[name], bounds)


@with_bounds
@pytest.mark.parametrize("shape", [(B,), (B, 1, D), (D, B), (2, B, D)])
def test_bounds_broadcast_to_x(name, shape):
    want = f"bounds that broadcast to x of shape ({B}, {D})"
    with raises(ValueError, want, f"got shapes {shape} and ()", "arrays like x"):
        traced(WITH_BOUNDS[name], (np.zeros(shape), 1.0))


def test_bounds_of_unlike_shapes_are_named():
    with raises(
        ValueError, "bounds that broadcast to x", f"got shapes ({D},) and ({D + 1},)", "like x"
    ):
        inputs.box((np.zeros(D), np.ones(D + 1)), jnp.asarray(X))


def test_bounds_of_one_example_broadcast_to_the_batch():
    lo, hi = inputs.box((np.zeros(D), np.ones((1, 1))), jnp.asarray(X))
    assert lo.shape == hi.shape == (B, D)


# Norms


@pytest.mark.parametrize("norm", ["L2", "l_inf", "l0", 2, None])
@pytest.mark.parametrize("name", WITH_NORM)
def test_an_unknown_norm_is_named_and_so_are_the_known(name, norm):
    known = "norm to be one of 'l1', 'l2', 'linf'"
    with raises(ValueError, known, f"got {norm!r}", "choose one of these"):
        traced(WITH_NORM[name], norm)


# Keys

WITH_KEY = {
    "virtual": lambda key: perturb.vat(net, W, X, eps=0.5, key=key),
    "pgd": lambda key: attack.pgd(net, W, X, Y, eps=0.5, steps=2, random_start=True, key=key),
}
with_key = pytest.mark.parametrize("name", WITH_KEY)


@with_key
def test_a_method_that_draws_asks_for_a_key(name):
    with raises(ValueError, "a key: ", "draws random numbers", "pass key=jax.random.key(0)"):
        traced(WITH_KEY[name], None)


@with_key
@pytest.mark.parametrize("shape", [(1,), (B - 1,), (B + 1,), (B, 1)])
def test_there_is_one_key_or_one_per_example(name, shape):
    with raises(ValueError, "one key or 4 keys", f"got keys of shape {shape}", "jax.random.split("):
        traced(WITH_KEY[name], jax.random.split(KEY, shape))


@pytest.mark.parametrize("key", [KEY, jax.random.PRNGKey(0)], ids=["typed", "raw"])
def test_one_key_becomes_one_per_example(key):
    assert inputs.keys(key, B, "").shape == (B,)
    np.testing.assert_array_equal(
        jax.random.key_data(inputs.keys(key, B, "")), jax.random.key_data(jax.random.split(KEY, B))
    )


def test_keys_per_example_are_taken_as_they_are():
    keys = jax.random.split(KEY, B)
    assert inputs.keys(keys, B, "") is keys
    raw = jax.random.key_data(keys)
    np.testing.assert_array_equal(jax.random.key_data(inputs.keys(raw, B, "")), raw)


@with_key
@pytest.mark.parametrize("key", [0, 1.5, np.zeros(3)], ids=["integer", "float", "floats"])
def test_a_seed_is_not_a_key(name, key):
    with pytest.raises((TypeError, ValueError), match=r"^expected .*jax\.random\.key"):
        traced(WITH_KEY[name], key)


# Steps


@pytest.mark.parametrize("name", ["virtual", "pgd"])
@pytest.mark.parametrize("steps", [0, -1])
def test_there_is_at_least_one_step(name, steps):
    with raises(ValueError, "steps >= 1", f"got {steps}", ""):
        traced(METHODS[name], net, W, X, Y, steps=steps)


# Values that only a run knows


def test_a_row_is_sound_without_nan_or_infinity_in_x_and_nan_or_plus_infinity_in_logits():
    x = np.array([[0, 0], [np.nan, 0], [0, np.inf], [-np.inf, 0], [0, 0], [0, 0], [0, 0]], "f4")
    z = np.zeros((7, 3), np.float32)
    z[4:, 1] = np.nan, np.inf, -np.inf
    got = inputs.finite(x, z)
    np.testing.assert_array_equal(got, [True, False, False, False, False, False, True])


def test_a_row_poses_a_problem_if_its_label_and_another_class_have_finite_logits():
    none = -np.inf
    z = np.array([[0, 1, 2], [0, 1, 2], [0, 1, 2], [none, 1, 2], [0, none, none], [0, none, 2]])
    y = np.array([0, -1, 3, 0, 0, 2])
    got = inputs.attackable(z.astype(np.float32), y)
    np.testing.assert_array_equal(got, [True, False, False, False, False, True])


def test_without_labels_two_finite_logits_pose_a_problem():
    none = -np.inf
    z = np.array([[0, 1, 2], [none, 1, 2], [none, 1, none], [none] * 3], np.float32)
    np.testing.assert_array_equal(inputs.attackable(z, None), [True, True, False, False])


@pytest.mark.parametrize(
    ("dtype", "wide"),
    [("bfloat16", "float32"), ("float16", "float32"), ("float32", "float32")],
)
def test_arithmetic_is_in_float32_at_least(dtype, wide, strict_dtypes):
    assert inputs.accum_dtype(jnp.dtype(dtype)) == wide


def test_arithmetic_on_float64_is_in_float64(x64):
    assert inputs.accum_dtype(jnp.dtype("float64")) == "float64"
