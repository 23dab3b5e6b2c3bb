"""Every error message of `jaxadv.inputs`: what was expected, what was passed, and a remedy.

test_contract tests that the methods check their arguments.
"""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxadv import attack, evaluate, inputs, jacobian, logistic, norms, perturb

B, D, K = 4, 5, 3
X = np.linspace(-1, 1, B * D, dtype=np.float32).reshape(B, D)
W = np.linspace(1, -1, D * K, dtype=np.float32).reshape(D, K) ** 3
Y = np.array([0, 1, 2, 1])
SOFT = np.eye(K, dtype=np.float32)[Y]
KEY = jax.random.key(0)
Z = X @ W


def net(params, x):
    return x.reshape(x.shape[0], -1) @ params


def eps_of(value):
    return partial(inputs.radius, value, X)


def box_of(*bounds):
    return partial(inputs.box, bounds, jnp.asarray(X))


def keys_of(key):
    return partial(inputs.keys, key, B, "it")


# The call, the error and three parts of its message: expected, got, remedy.
ONE_ROW, COLUMN, ARGMAX = "one row of K", "y[:, 0]", "jnp.argmax(y, axis=-1)"
FLOATS, CAST = "x of a floating-point dtype", "y.astype(int); turn names into numbers with np.uni"
WRONG = [
    (lambda: inputs.examples(X.astype(np.uint8)), TypeError, FLOATS, "uint8", "jnp.float32) / 255"),
    (lambda: inputs.examples(X > 0), TypeError, FLOATS, "bool", "tokens have no gradient"),
    (lambda: inputs.examples(X.astype(int), "r"), TypeError, "r of a float", "int", "r.astype("),
    (lambda: inputs.examples(X[0]), ValueError, "x of shape [B, ...]", "(5,)", "x[None]"),
    (lambda: inputs.examples(np.float32(1)), ValueError, "x of shape [B, ...]", "()", "x[None]"),
    (lambda: inputs.examples(X[:, :0]), ValueError, "non-empty examples", "(4, 0)", "x[None]"),
    (lambda: inputs.perturbation(None, X), TypeError, "r, an array like x", "None", "return"),
    (lambda: inputs.perturbation(X[:1], X), ValueError, "r of x's shape (4, 5)", "(1, 5)", "one p"),
    (lambda: inputs.perturbation(X, jnp.bfloat16(X)), TypeError, "r of x's dtype bf", "f", "r.as"),
    (lambda: inputs.perturbation(Y, Y), TypeError, "r of a floating-point", "int", "r.astype("),
    (lambda: inputs.labels(SOFT, B), TypeError, "integer labels", "float32 of shape", ARGMAX),
    (lambda: inputs.labels(SOFT.astype(int), B), ValueError, "of shape [4]", "(4, 3)", ARGMAX),
    (lambda: inputs.labels(0, 1), ValueError, "integer labels of shape [1]", "()", ARGMAX),
    (lambda: inputs.labels(Y[:, None], B), ValueError, "of shape [4]", "(4, 1)", COLUMN),
    (lambda: inputs.labels(1.0 * Y, B), TypeError, "integer labels", "float64 of shape (4,)", CAST),
    (lambda: inputs.labels(Y == 1, B), TypeError, "integer labels", "bool of shape (4,)", CAST),
    (lambda: inputs.labels(list("abca"), B), TypeError, "integer labels", "<U1 of shape", CAST),
    (lambda: inputs.labels(Y[:3], B), ValueError, "as many labels", "3 labels for 4", "this batch"),
    (lambda: inputs.paired(X, SOFT[:3]), ValueError, "as many labels", "y of shape (3, 3)", "this"),
    (lambda: inputs.logits_of((Z, Z), B), TypeError, "to return logits", "tuple", "(params, x)[0]"),
    (lambda: inputs.logits_of({"logits": Z}, B), TypeError, "logits", "dict; wrap", '["logits"]'),
    (lambda: inputs.logits_of(None, B), TypeError, "to return logits", "NoneType", "wrap it so"),
    (lambda: inputs.logits_of(Y, B), TypeError, "floating-point logits", "int64", "before argmax"),
    (lambda: inputs.logits_of(Z[:, 0], B), ValueError, "of shape [4, K]", "(4,)", ONE_ROW),
    (lambda: inputs.logits_of(Z[:, None], B), ValueError, "of shape [4, K]", "(4, 1, 3)", ONE_ROW),
    (lambda: inputs.logits_of(Z[:2], B), ValueError, "of shape [4, K]", "(2, 3)", ONE_ROW),
    (lambda: inputs.logits_of(Z[:, :1], B), ValueError, "at least 2 cl", "(4, 1)", "two_logits"),
    (lambda: inputs.losses_of(Z, B), ValueError, "one loss per example, [4]", "(4, 3)", "leave"),
    (eps_of(-0.5), ValueError, "a finite eps >= 0", "-0.5", "eps is a size"),
    (eps_of(-1), ValueError, "a finite eps >= 0", "-1", "eps is a size"),
    (eps_of(float("nan")), ValueError, "a finite eps >= 0", "nan", "eps is a size"),
    (eps_of(np.float64("inf")), ValueError, "a finite eps >= 0", "inf", "eps is a size"),
    (eps_of(np.array([1, 1, -1, 1])), ValueError, "a finite eps >= 0", "[ 1  1 -1  1]", "eps is"),
    (eps_of(np.ones((B, 1))), ValueError, "eps of shape () or [4]", "(4, 1)", "one for each"),
    (eps_of(jnp.ones(B - 1)), ValueError, "eps of shape () or [4]", "(3,)", "one for each"),
    (eps_of("0.5"), TypeError, "eps to be a number or an array", "str", "one size per example"),
    (eps_of([0.5] * B), TypeError, "eps to be a number or an array", "list", "one size per"),
    (box_of(0.0), ValueError, "bounds=(lo, hi)", "(0.0,)", "pass a pair, e.g."),
    (lambda: inputs.box(0.5, X), ValueError, "bounds=(lo, hi)", "0.5", "pass a pair, e.g."),
    (box_of(None, 1.0), ValueError, "two bounds", "(None, 1.0)", "-jnp.inf or jnp.inf"),
    (box_of(1.0, 0.0), ValueError, "with lo <= hi", "(1.0, 0.0)", "swap them"),
    (box_of(np.ones((B, D)), np.zeros(D)), ValueError, "with lo <= hi", "(array", "swap them"),
    (box_of(0.0, float("nan")), ValueError, "with lo <= hi", "(0.0, nan)", "swap them"),
    (box_of(np.zeros(B), 1.0), ValueError, "to shape (4, 5)", "shapes (4,) and ()", "one ex"),
    (box_of(np.zeros(D), np.ones(6)), ValueError, "broadcast to sh", "(5,) and (6,)", "one ex"),
    (partial(norms.dual, "L2"), ValueError, "one of 'l1', 'l2', 'linf'", "'L2'", "choose one"),
    (keys_of(None), ValueError, "a key: it draws random numbers", "", "key=jax.random.key(0)"),
    (keys_of(jax.random.split(KEY, 3)), ValueError, "one key or 4 keys", "(3,)", "random.split("),
    (keys_of(jax.random.split(KEY, (B, 1))), ValueError, "one key or 4", "(4, 1)", "random.split("),
    (keys_of(0), TypeError, "a key", "0", "pass jax.random.key(seed)"),
    (keys_of(np.zeros(3)), TypeError, "a key", "array([0., 0., 0.])", "pass jax.random.key(seed)"),
    (partial(inputs.one_key, None), TypeError, "a key", "None", "pass jax.random.key(seed)"),
    (partial(inputs.one_key, jax.random.split(KEY)), ValueError, "one key", "shape (2,)", "pass"),
    (partial(inputs.at_least, 1, "n", 0, "cure"), ValueError, "n >= 1", "0", "cure"),
    (partial(inputs.at_least, 1, "n", 2.5, "cure"), TypeError, "an integer n", "2.5", "cure"),
    (partial(inputs.at_least, 1, "n", True, "cure"), TypeError, "an integer n", "True", "cure"),
    (partial(inputs.at_least, 1, "n", jnp.int32(1), "cure"), TypeError, "an integer n", "", "cure"),
]


@pytest.mark.parametrize(("call", "error", "expected", "got", "remedy"), WRONG)
def test_an_error_says_what_was_expected_and_passed_and_a_remedy(
    call, error, expected, got, remedy
):
    pattern = ".*".join(re.escape(part) for part in (expected, got, remedy))
    with pytest.raises(error, match=f"(?s)^expected .*{pattern}", check=lambda e: type(e) is error):
        call()


# Other functions that check their arguments

X_0, SIGNS = X[0], np.ones(B)
CHECKED = {
    "x": (
        lambda: jacobian.softmax_jacobian(net, W, X_0),
        lambda: jacobian.pullback(net, W, X_0),
        lambda: jacobian.class_differences(net, W, X_0, Y),
        lambda: evaluate.measure(net, W, X_0, Y),
        lambda: norms.steepest(X_0, "l2"),
    ),
    "labels": (
        lambda: jacobian.class_differences(net, W, X, SOFT),
        lambda: evaluate.measure(net, W, X, SOFT),
        lambda: attack.pgd_kl(net, W, X, SOFT, eps=0.5, key=KEY),
    ),
    "logits": (
        lambda: jacobian.softmax_jacobian(lambda w, x: x[:, 0], W, X),
        lambda: jacobian.pullback(lambda w, x: (x, x), W, X),
        lambda: jacobian.class_differences(lambda w, x: x[:, :1], W, X, Y),
        lambda: evaluate.measure(lambda w, x: x[:2], W, X, Y),
    ),
    "norm": (
        lambda: norms.norm(X, "l3"),
        lambda: norms.steepest(X, "l3"),
        lambda: norms.rescale(X, 1.0, "l3"),
        lambda: norms.project(X, 1.0, "l3"),
        lambda: norms.sample(KEY, X, 1.0, "l3"),
        lambda: evaluate.measure(net, W, X, Y, X, norm="l3"),
    ),
    "eps": (
        lambda: norms.rescale(X, -0.5, "l2"),
        lambda: norms.project(X, -0.5, "l2"),
        lambda: norms.sample(KEY, X, -0.5, "l2"),
    ),
    "step_size": (lambda: attack.pgd(net, W, X, Y, eps=0.5, step_size=-0.5),),
    "bounds": (lambda: norms.clip_to_box(X, X, (1.0, 0.0)),),
    "x's shape": (lambda: norms.clip_to_box(X, X[:1], None),),
    "a key": (lambda: norms.sample(0, X, 0.5, "l2"),),
    "w of a floating": (lambda: logistic.loss(Y, X[:, :4], SIGNS, eps=1.0, norm="l2"),),
}


@pytest.mark.parametrize("what", CHECKED)
def test_functions_of_arrays_check_too(what):
    for call in CHECKED[what]:
        with pytest.raises((TypeError, ValueError), match=rf"(?s)^expected .*{what}.*; "):
            jax.eval_shape(call)


# What is accepted


def test_an_empty_batch_is_accepted():
    assert inputs.examples(X[:0]).shape == (0, D)


@pytest.mark.parametrize(
    "y", [[0, 1, 2, 1], Y.astype(np.uint8), Y.astype(np.int16), Y.astype(">i8"), np.uint64(Y)]
)
def test_labels_of_any_integer_dtype_become_int32(y):
    got = inputs.labels(y, B)
    assert got.dtype == jnp.int32
    np.testing.assert_array_equal(got, Y)


@pytest.mark.parametrize("kind", [">f4", ">f8", ">f2", np.longdouble])
def test_numpys_other_floats_are_accepted(kind):
    got = inputs.examples(X.astype(kind))
    np.testing.assert_array_equal(np.float32(got), np.float32(X.astype(kind)))


def test_bounds_may_be_lists():
    lists, arrays = ([0.0] * D, [9.0] * D), (np.zeros(D), np.full(D, 9.0))
    for method in (perturb.loss, attack.pgd):
        r = method(net, W, X, Y, eps=0.5, bounds=lists)
        np.testing.assert_array_equal(r, method(net, W, X, Y, eps=0.5, bounds=arrays))


def test_labels_beyond_int32_do_not_wrap_into_a_class(x64):
    y = jnp.array([2**32, -(2**32), 2**33 + 1, 2**63 - 1])
    assert not np.isin(inputs.labels(y, B), np.arange(K)).any()
    unsigned = inputs.labels(jnp.array([0, 1, 2**63], jnp.uint64), 3)
    np.testing.assert_array_equal(unsigned, [0, 1, 2**31 - 1])


@pytest.mark.parametrize("fn", [attack.pgd, perturb.loss])
def test_a_numpy_label_beyond_int32_is_invalid(fn):
    r = fn(net, W, X, np.int64([2**32, 0, 2**32 + 1, -(2**32)]), eps=1.0)
    assert jnp.any(r != 0, axis=1).tolist() == [False, True, False, False]


def test_the_radius_has_the_dtype_of_norms_and_one_entry_per_example():
    for eps in (2, 0.5, np.float64(0.5), jnp.ones(B, jnp.int32), jnp.float16(0.5)):
        got = inputs.radius(eps, X)
        assert (got.shape, got.dtype) == ((B,), jnp.float32)


def test_bounds_of_one_example_broadcast_to_the_batch():
    lo, hi = inputs.box((np.zeros(D), np.ones((1, 1))), jnp.asarray(X))
    assert lo.shape == hi.shape == (B, D)


@pytest.mark.parametrize("key", [KEY, jax.random.PRNGKey(0)], ids=["typed", "raw"])
def test_one_key_becomes_one_per_example(key):
    keys = inputs.keys(key, B, "")
    assert (keys == jax.random.split(KEY, B)).all()
    assert inputs.keys(keys, B, "") is keys
    assert (inputs.keys(jax.random.key_data(keys), B, "") == keys).all()


def test_a_numpy_integer_is_an_integer():
    inputs.at_least(1, "n", np.int64(2), "")


@pytest.mark.parametrize(
    ("samples", "takes_key", "notes"),
    [(0, True, ["samples=1"]), (2, False, ["apply_fn(params, x, key)", "samples=0"])],
)
def test_an_error_raised_in_a_net_notes_how_it_was_called(samples, takes_key, notes):
    apply_fn = (lambda w, x, key: net(w, x)) if takes_key else net
    with pytest.raises(TypeError) as caught:
        attack.pgd(apply_fn, W, X, Y, eps=0.5, samples=samples, key=KEY)
    for note in ["5) and dtype float32. If the net takes other inputs", *notes]:
        assert note in "".join(caught.value.__notes__)


# Traced values


def test_a_row_is_sound_without_nan_or_infinity_in_x_and_nan_or_plus_infinity_in_logits():
    x = np.array([[0, 0], [np.nan, 0], [0, np.inf], [-np.inf, 0], [0, 0], [0, 0], [0, 0]], "f4")
    z = np.zeros((7, 3), np.float32)
    z[4:, 1] = np.nan, np.inf, -np.inf
    np.testing.assert_array_equal(inputs.finite(x, z), [1, 0, 0, 0, 0, 0, 1])


def test_a_row_poses_a_problem_if_its_label_and_another_class_have_finite_logits():
    none = -np.inf
    z = np.array([[0, 1, 2], [0, 1, 2], [0, 1, 2], [none, 1, 2], [0, none, none], [0, none, 2]])
    y = np.array([0, -1, 3, 0, 0, 2])
    np.testing.assert_array_equal(inputs.attackable(z.astype(np.float32), y), [1, 0, 0, 0, 0, 1])
    # Without labels, two finite logits do.
    np.testing.assert_array_equal(inputs.attackable(z.astype(np.float32), None), [1, 1, 1, 1, 0, 1])


def test_arithmetic_is_in_float32_at_least(x64):
    wide = {"bfloat16": "float32", "float16": "float32", "float32": "float32"}
    for dtype, want in (wide | {"float64": "float64"}).items():
        assert inputs.accum_dtype(jnp.dtype(dtype)) == want
