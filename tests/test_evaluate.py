"""What all functions of `jaxadv.evaluate` that loop over a data set have in common."""

import functools
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from references import mostly_right

from jaxadv import evaluate, perturb

K = 3

# Batches of different sizes may be summed in a different order: a few roundings of 2^-24.
ATOL = 1e-5


def linear(params, x):
    return x @ params


W, X, Y = mostly_right(7)


def attacked(net, w, x, y, *, attacks=perturb.loss, eps=0.5, **some):
    """`attack_and_score` without its stages, which include times."""
    return evaluate.attack_and_score(net, w, x, y, attacks, eps=eps, **some)[:2]


# name: a function of (net, w, x, y) whose results have a row per example
DRIVERS = {
    "score": evaluate.score,
    "score of r": lambda net, w, x, y, **some: evaluate.score(net, w, x, y, -2.0 * x, **some),
    "attack_and_score": attacked,
    "attack_and_score of several": partial(attacked, attacks={"loss": perturb.loss}),
}
CHECK = partial(evaluate.check, eps=1.0, key=jax.random.key(0), steps=2)
every_driver = pytest.mark.parametrize("name", DRIVERS)
every_attack = pytest.mark.parametrize(
    "driver",
    [*list(DRIVERS.values())[2:], CHECK],
    ids=["attack_and_score", "attack_and_score of several", "check"],
)

# Examples, sizes, keys and bounds

# name: x, y, the error and its message
SHAPES = {
    "one-hot floats": (
        X,
        np.eye(K, dtype=np.float32)[Y],
        TypeError,
        r"got float32 of shape \(7, 3\)",
    ),
    "scalar y": (X, np.int32(3), ValueError, r"shape \[7\], got \(\)"),
    "one example": (X[0], Y, ValueError, r"got \(5,\).*x\[None\]"),
    "fewer labels": (X, Y[:3], ValueError, "got 3 labels for 7 examples"),
}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("driver", ["score", "attack_and_score", "check"])
def test_an_error_about_a_data_set_shows_its_shape(name, driver):
    x, y, error, message = SHAPES[name]
    with pytest.raises(error, match=message):
        (DRIVERS | {"check": CHECK})[driver](linear, W, x, y)


@pytest.mark.parametrize("size", [float("nan"), float("inf"), -1.0])
@pytest.mark.parametrize("kind", [float, lambda v: jnp.full(7, v)], ids=["float", "array"])
@every_attack
def test_a_size_that_is_negative_or_not_finite_is_refused(driver, kind, size):
    with pytest.raises(ValueError, match="expected a finite eps >= 0"):
        driver(linear, W, X, Y, eps=kind(size))


# name: arguments, the error
BAD = {
    "an attack that is a string": ({"attacks": "pgd"}, TypeError),
    "sizes of others": ({"eps": np.ones(3)}, ValueError),
    "keys of others": (
        {"attacks": perturb.vat, "key": jax.random.split(jax.random.key(0), 3)},
        ValueError,
    ),
    "no key": ({"attacks": perturb.vat}, ValueError),
    "bounds upside down": ({"bounds": (jnp.float32(9), jnp.float32(-9))}, ValueError),
    "source without parameters": ({"source": linear}, TypeError),
}


@pytest.mark.parametrize("name", BAD)
def test_errors_about_bad_arguments_say_what_was_expected_and_what_was_passed(name):
    arguments, error = BAD[name]
    with pytest.raises(error, match=r"(?s)expected .*(got .*;|key)"):
        attacked(linear, W, X, Y, **arguments)


def test_a_checked_source_without_parameters_raises():
    with pytest.raises(TypeError, match=r"expected source=\(apply_fn, params\), got function"):
        CHECK(linear, W, X, Y, source=linear)


@pytest.mark.parametrize("as_array", [np.asarray, jnp.asarray])
@every_attack
def test_a_data_set_outside_the_bounds_is_an_error(driver, as_array):
    x, y = as_array(np.array([[0.0, 255.0], [3.0, 9.0]], np.float32)), np.array([0, 1])
    call = partial(driver, linear, jnp.eye(2), x, y, eps=0.1)
    with pytest.raises(
        ValueError, match=r"within bounds, got 255 where at most 1 is allowed; scale"
    ):
        call(bounds=(0.0, 1.0))
    with pytest.raises(ValueError, match=r"got 255 where at most 8 is allowed"):
        call(bounds=(0.0, jnp.array([255.0, 8.0])))
    with pytest.raises(ValueError, match=r"got 0 where at least 1 is allowed"):
        call(bounds=(1.0, 255.0))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("mean", "std"), [(0.1307, 0.3081), (0.4914, 0.2470)])
def test_standardised_black_and_white_are_within_standardised_bounds(mean, std, dtype):
    pixels, w, y = jnp.array([[0.0, 1.0], [1.0, 0.0]], dtype), jnp.eye(2, dtype=dtype), np.arange(2)
    x = (pixels - jnp.asarray(mean, dtype)) / jnp.asarray(std, dtype)
    of = {"eps": 0.1, "bounds": ((0 - mean) / std, (1 - mean) / std)}
    r = attacked(linear, w, x, y, **of)[1]
    assert r.shape == x.shape
    with pytest.raises(ValueError, match="within bounds"):
        attacked(linear, w, x * 1.25, y, **of)


def test_float64_images_are_within_bounds_up_to_float32_rounding():
    # Computed in float32, white is off by half an ulp; the net sees float32 too.
    white = np.float32(1.1) - np.float32(0.1)
    x, y = np.full((2, 3), np.float64(white) + 5e-8), np.zeros(2, int)
    w = np.eye(3, dtype=np.float32)
    r = attacked(linear, w, x, y, eps=0.1, bounds=(0.0, 1.0))[1]
    assert r.dtype == np.float32
    with pytest.raises(ValueError, match="within bounds"):
        attacked(linear, w, x + 1e-5, y, eps=0.1, bounds=(0.0, 1.0))


def test_a_data_set_may_be_lists():
    x, y = [[2.0, 1.0], [0.0, 3.0]], [0, 0]

    def identity(params, x):
        return x

    np.testing.assert_array_equal(evaluate.score(identity, None, x, y).clean, [True, False])
    with pytest.raises(TypeError, match="expected integer labels"):
        evaluate.score(identity, None, x, [0.0, 1.0])


def test_an_empty_data_set_and_one_with_nan_are_within_any_bounds():
    w = jnp.eye(2)
    for x in (np.zeros((0, 2), np.float32), np.array([[np.nan, 0.5]], np.float32)):
        y = np.zeros(len(x), int)
        r = attacked(linear, w, x, y, eps=0.1, bounds=(0.0, 1.0))[1]
        assert r.shape == x.shape


# Batches


@functools.cache
def at_once(name):
    """A driver's result for eleven examples in one batch."""
    return DRIVERS[name](linear, *mostly_right(11), batch_size=11)


@every_driver
@pytest.mark.parametrize("n", [0, 4, 10])
def test_every_example_is_covered_once_and_in_order(name, n):
    # No example; one batch; not a multiple of the batch size.
    w, x, y = mostly_right(11)
    got = DRIVERS[name](linear, w, x[:n], y[:n], batch_size=4)
    want = jax.tree.map(lambda leaf: leaf[:n], at_once(name))
    for leaf, expected in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert isinstance(leaf, np.ndarray)
        assert (leaf.shape, leaf.dtype) == (expected.shape, expected.dtype)
        np.testing.assert_allclose(leaf, expected, atol=ATOL)


def test_loops_over_a_data_set_agree_with_the_functions_of_one_batch():
    w, x, y = mostly_right(11)
    r = perturb.loss(linear, w, x, y, eps=0.5)
    outcome = evaluate.measure(linear, w, x, y, r)
    chex.assert_trees_all_close(at_once("attack_and_score"), (outcome, r), atol=ATOL)
    np.testing.assert_array_equal(at_once("score").clean, np.argmax(x @ w, axis=1) == y)
    several, stored = at_once("attack_and_score of several")
    np.testing.assert_array_equal(several.robust, outcome.robust)
    harmed = outcome.clean & ~outcome.robust
    np.testing.assert_allclose(stored, np.where(harmed[:, None], r, 0), atol=ATOL)


@every_driver
@pytest.mark.parametrize("kind", [np.float64, ">f4", np.longdouble])
def test_data_of_dtypes_that_jax_lacks_are_evaluated_in_float32(name, kind):
    w, x, y = mostly_right(7)
    got = DRIVERS[name](linear, w, x.astype(kind), y.astype(">i8"))
    chex.assert_trees_all_equal(got, DRIVERS[name](linear, w, x, y), strict=True)


# Compilation


@every_driver
@pytest.mark.parametrize("traced", ["x", "y", "params", "nothing"])
def test_under_a_trace_a_driver_says_what_to_use_instead(name, traced):
    arguments = {"params": W, "x": X, "y": Y}

    def driver(**some):
        everything = arguments | some
        return DRIVERS[name](linear, everything["params"], everything["x"], everything["y"])

    some = {traced: arguments[traced]} if traced in arguments else {}
    function = name.split()[0]
    with pytest.raises(TypeError, match=rf"expected .*evaluate\.{function} .*evaluate\.measure"):
        jax.jit(driver)(**some)


@pytest.mark.parametrize("traced", ["eps", "key", "bounds"])
def test_under_a_trace_of_its_options_an_attack_says_what_to_use_instead(traced):
    options = {"eps": 0.5, "key": jax.random.key(0), "bounds": (-1.0, 1.0)}

    def driver(**some):
        return attacked(linear, W, X, Y, **(options | some))

    with pytest.raises(TypeError, match=r"expected .*evaluate\.attack_and_score .*\.measure"):
        jax.jit(driver)(**{traced: options[traced]})


@every_driver
def test_a_net_is_compiled_once_for_many_sizes_parameters_and_batches(name):
    w, x, y = mostly_right(11)
    traces = []

    def net(params, x):
        traces.append(None)
        return x @ params

    def drive(params, eps):
        sizes = {} if name.startswith("score") else {"eps": eps}
        DRIVERS[name](net, params, x, y, batch_size=4, **sizes)

    drive(w, 0.5)
    once = len(traces)
    for params in (w, 2 * w):
        for eps in (0.05, 0.5, 3.5):
            drive(params, eps)
    assert len(traces) == once + 6  # each call inspects anew what the net captures


class Table:
    """Like a column of a shuffled data frame: indexed by the names of its rows."""

    def __init__(self, values):
        self.values = np.asarray(values)
        self.dtype, self.shape, self.ndim = self.values.dtype, self.values.shape, 1

    def __len__(self):
        return len(self.values)

    def __array__(self, dtype=None, copy=None):
        return np.asarray(self.values, dtype)

    def __getitem__(self, names):
        return self.values[::-1][names]


def test_labels_are_indexed_by_position_and_not_by_row_names():
    expected, got = (evaluate.score(linear, W, X, kind(Y)).clean for kind in (np.array, Table))
    np.testing.assert_array_equal(got, expected)
