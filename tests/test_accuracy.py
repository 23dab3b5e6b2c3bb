"""`evaluate.measure` and `score`: what counts as correct; `accuracy`, `interval` and `compare`."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references
from references import NORMS, mostly_right
from scipy import stats

from jaxadv import evaluate

D, K = 5, 3
INF, NAN = float("inf"), float("nan")


def identity(params, x):
    """A net whose logits are its inputs."""
    return x


def linear(params, x):
    return x @ params


# What is correct

# name: logits, label, whether the prediction is correct
ROWS = {
    "largest": ([1, 3, 2], 1, True),
    "not largest": ([1, 3, 2], 2, False),
    "tie, lowest index": ([3, 3, 2], 0, True),
    "tie, not the lowest": ([3, 3, 2], 1, False),
    "tie of all": ([2, 2, 2], 0, True),
    "others masked": ([1, -INF, -INF], 0, True),
    "label masked": ([1, -INF, 2], 1, False),
    "all masked": ([-INF, -INF, -INF], 0, False),
    "NaN": ([NAN, NAN, NAN], 0, False),
    "one NaN elsewhere": ([NAN, 3, 2], 1, False),
    "one NaN at the label": ([NAN, 3, 2], 0, False),
    "+inf at the label": ([INF, 3, 2], 0, False),
    "+inf elsewhere": ([INF, 3, 2], 1, False),
    "label of K": ([1, 2, 3], K, False),
    "label of -1": ([1, 2, 3], -1, False),
    "label of -K": ([3, 2, 1], -K, False),
}


@pytest.mark.parametrize("name", ROWS)
def test_an_example_is_correct_if(name):
    z, label, right = ROWS[name]
    # In the middle of a batch of correct rows, which must stay correct.
    z, y = jnp.array([[0, 1, 2], z, [2, 1, 0]], jnp.float32), jnp.array([2, label, 0])
    # The net looks the logits up, so that x itself is finite.
    x = jnp.arange(3, dtype=jnp.float32)[:, None]
    got = evaluate.measure(lambda z, x: z[x[:, 0].astype(int)], z, x, y).clean
    assert got.dtype == bool
    np.testing.assert_array_equal(got, [True, right, True])


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_an_example_that_is_not_finite_is_wrong_whatever_its_logits(bad):
    x = jnp.array([[1.0, 2.0], [bad, 2.0]])
    logits = jnp.array([[1.0, 0.0, 0.0]] * 2)
    got = evaluate.measure(lambda z, x: z, logits, x, jnp.zeros(2, int)).clean
    np.testing.assert_array_equal(got, [True, False])


def test_measure_works_under_jit_and_vmap():
    w, x, y = mostly_right(12)
    want = np.argmax(x @ w, axis=1) == y
    assert 0 < want.sum() < 12
    measure = partial(evaluate.measure, linear)
    np.testing.assert_array_equal(jax.jit(measure)(w, x, y).clean, want)
    batches = x.reshape(4, 3, D), y.reshape(4, 3)
    got = jax.vmap(measure, in_axes=(None, 0, 0))(w, *batches)
    np.testing.assert_array_equal(got.clean.reshape(12), want)


# Perturbations


@pytest.mark.parametrize("function", [evaluate.measure, evaluate.score])
def test_without_perturbations_examples_are_measured_as_they_are(function):
    x, y, _ = faulty()
    outcome = function(identity, None, x, y)
    want = evaluate.measure(identity, None, x, y, np.zeros_like(x))
    np.testing.assert_array_equal(outcome.robust, outcome.clean)
    for got, expected in zip(outcome, want, strict=True):
        np.testing.assert_array_equal(got, expected)


def test_a_perturbation_may_be_a_list():
    outcome = evaluate.score(identity, None, *faulty()[:2], np.zeros((8, 3)).tolist())
    assert outcome.zero.all()


def test_an_example_that_is_misclassified_is_wrong_even_where_r_repairs_it():
    x, y = jnp.array([[1.0, 2.0], [3.0, 2.0]]), jnp.array([0, 0])
    r = jnp.array([[4.0, 0.0], [4.0, 0.0]])
    assert np.all(evaluate.measure(identity, None, x + r, y).clean)
    outcome = evaluate.measure(identity, None, x, y, r, norm="l2")
    np.testing.assert_array_equal(outcome.clean, [False, True])
    np.testing.assert_array_equal(outcome.robust, [False, True])


@pytest.mark.parametrize("norm", NORMS)
def test_the_norm_is_that_of_the_given_perturbation(norm):
    w, x, y = mostly_right(7)
    r = np.random.default_rng(1).normal(size=x.shape).astype(np.float32)
    outcome = evaluate.measure(linear, w, x, y, r, norm=norm)
    want = [references.length(row, norm) for row in r]
    np.testing.assert_allclose(outcome.norm, want, rtol=1e-6)


def faulty():
    """Eight examples, each with a different fault: x (its logits), y, r."""
    x = np.tile(np.array([2, 1, 0], np.float32), (8, 1))
    y, r = np.zeros(8, int), np.full((8, 3), 0.25, np.float32)
    r[1] = 0
    r[2, 1] = NAN
    r[3, 1] = -INF
    x[4, 1] = NAN
    x[5, 1] = INF
    y[6] = 3
    y[7] = -1
    return x, y, r


def test_measure_reports_the_problems_of_each_example():
    outcome = evaluate.measure(identity, None, *faulty(), norm="l2")
    np.testing.assert_array_equal(outcome.clean, [1, 1, 1, 1, 0, 0, 0, 0])
    np.testing.assert_array_equal(outcome.robust, [1, 1, 0, 0, 0, 0, 0, 0])
    np.testing.assert_array_equal(outcome.zero, [0, 1, 0, 0, 0, 0, 0, 0])
    np.testing.assert_array_equal(outcome.nonfinite, [0, 0, 1, 1, 1, 1, 0, 0])
    np.testing.assert_array_equal(outcome.invalid, [0, 0, 0, 0, 0, 0, 1, 1])


def test_logits_that_overflow_are_not_finite_and_masks_are():
    def overflowing(z, x):
        return z + jnp.where(x[:, :1] > 0, jnp.inf, 0)

    x = jnp.array([[0.0, 1.0], [1.0, 1.0]])
    z, y, r = jnp.array([[2.0, 1.0, -INF]] * 2), jnp.zeros(2, int), jnp.full((2, 2), -2.0)
    outcome = evaluate.measure(overflowing, z, x, y, r, norm="l2")
    np.testing.assert_array_equal(outcome.nonfinite, [False, True])
    np.testing.assert_array_equal(outcome.robust, [True, False])


def test_logits_that_overflow_at_the_perturbed_input_are_counted():
    # Such an example counts as wrong, and the outcome must show why.
    def overflowing(params, x):
        return jnp.where(jnp.abs(x) > 10, jnp.nan, x)

    x, y = jnp.array([[2.0, 1.0], [2.0, 1.0]]), jnp.zeros(2, int)
    r = jnp.array([[20.0, 0.0], [1.0, 0.0]])
    outcome = evaluate.measure(overflowing, None, x, y, r, norm="l2")
    np.testing.assert_array_equal(outcome.robust, [False, True])
    np.testing.assert_array_equal(outcome.nonfinite, [True, False])


@pytest.mark.parametrize("norm", NORMS)
def test_a_data_set_is_measured_as_a_batch_is(norm):
    w, x, y = mostly_right(11)
    r = np.random.default_rng(1).normal(size=x.shape).astype(np.float32)
    got = evaluate.score(linear, w, x, y, r, norm=norm, batch_size=4)
    want = evaluate.measure(linear, w, x, y, r, norm=norm)
    np.testing.assert_allclose(got.norm, want.norm, rtol=1e-6)
    for leaf, expected in zip(got, want, strict=True):
        assert isinstance(leaf, np.ndarray)
        assert leaf.dtype == expected.dtype
        if leaf.dtype == bool:
            np.testing.assert_array_equal(leaf, expected)


def test_a_label_beyond_int32_is_none_of_the_classes_of_a_data_set():
    w, x, y = mostly_right(7)
    y = y.astype(np.int64)
    y[2] += 2**32  # the same class after a plain cast to int32
    outcome = evaluate.score(linear, w, x, y)
    np.testing.assert_array_equal(outcome.invalid, np.arange(7) == 2)
    assert not outcome.clean[2]


W, X, Y = mostly_right(7)
# name: call, error
BAD = {
    "r like one example": (lambda: evaluate.measure(linear, W, X, Y, X[:1]), ValueError),
    "unknown norm of nothing": (lambda: evaluate.score(linear, W, X, Y, norm="l3"), ValueError),
    "batch size 0": (lambda: evaluate.score(linear, W, X, Y, batch_size=0), ValueError),
    "half a batch": (lambda: evaluate.score(linear, W, X, Y, batch_size=3.5), TypeError),
    "no batch size": (lambda: evaluate.score(linear, W, X, Y, batch_size=None), TypeError),
    "empty mask": (lambda: evaluate.accuracy(np.zeros(0, bool)), ValueError),
    "accuracy of an accuracy": (lambda: evaluate.accuracy(0.5), ValueError),
    "accuracy of an outcome": (
        lambda: evaluate.accuracy(evaluate.score(linear, W, X, Y)),
        TypeError,
    ),
    "accuracy of sizes": (lambda: evaluate.accuracy(np.ones(3)), TypeError),
    "interval of sizes": (lambda: evaluate.interval(np.ones(3)), TypeError),
    "confidence of 0": (lambda: evaluate.interval(np.ones(3, bool), 0), ValueError),
    "confidence of 1": (lambda: evaluate.interval(np.ones(3, bool), 1), ValueError),
    "two lengths": (lambda: evaluate.compare(np.ones(3, bool), np.ones(4, bool)), ValueError),
    "sizes and a mask": (lambda: evaluate.compare(np.ones(3), np.ones(3, bool)), TypeError),
    "a mask and sizes": (lambda: evaluate.compare(np.ones(3, bool), np.ones(3)), TypeError),
    "sure of it": (lambda: evaluate.compare(*np.ones((2, 3), bool), confidence=1), ValueError),
}


@pytest.mark.parametrize("name", BAD)
def test_errors_about_bad_input_say_what_was_expected_and_what_was_passed(name):
    function, error = BAD[name]
    with pytest.raises(error, match=r"(?s)expected .*got .*;"):
        function()


# Masks


def test_accuracy_is_the_share_of_true():
    assert evaluate.accuracy(np.array([True, False, False, True, True])) == 0.6
    assert evaluate.accuracy(jnp.array([False, False])) == 0
    assert isinstance(evaluate.accuracy(jnp.array([True])), float)


@pytest.mark.parametrize("n_right", [0, 7, 40])
@pytest.mark.parametrize("confidence", [0.9, 0.999])
def test_the_interval_is_wilsons(n_right, confidence):
    want = stats.binomtest(n_right, 40).proportion_ci(confidence, method="wilson")
    got = evaluate.interval(np.arange(40) < n_right, confidence)
    np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("n", [1, 10, 1000])
@pytest.mark.parametrize("confidence", [0.5, 0.95])
def test_the_interval_of_none_or_all_has_an_exact_end(n, confidence):
    low, high = evaluate.interval(np.zeros(n, bool), confidence)
    assert (low, 0 < high < 1) == (0.0, True)
    low, high = evaluate.interval(np.ones(n, bool), confidence)
    assert (0 < low < 1, high) == (True, 1.0)


# Two masks of the same examples


def split(n, only_first, only_second):
    """Two masks that agree except on given numbers of examples, where only one is true."""
    first = np.arange(n) % 2 == 0
    second = first.copy()
    second[np.flatnonzero(first)[:only_first]] = False
    second[np.flatnonzero(~first)[:only_second]] = True
    return first, second


def test_a_comparison_counts_the_examples_that_only_one_gets_right():
    found = evaluate.compare(*split(200, 12, 5))
    assert (found.only_first, found.only_second, found.difference) == (12, 5, 7 / 200)
    b, c, n = 12.5, 5.5, 202  # Agresti and Min, 2005
    half = stats.norm.ppf(0.975) * np.sqrt((b + c) - (b - c) ** 2 / n) / n
    np.testing.assert_allclose(found.interval, [(b - c) / n - half, (b - c) / n + half], rtol=1e-12)
    wider = evaluate.compare(*split(200, 12, 5), confidence=0.99).interval
    half = stats.norm.ppf(0.995) * np.sqrt((b + c) - (b - c) ** 2 / n) / n
    np.testing.assert_allclose(wider, [(b - c) / n - half, (b - c) / n + half], rtol=1e-12)


@pytest.mark.parametrize(("b", "c"), [(0, 0), (3, 3), (1, 0), (0, 6), (5, 2), (4, 9)])
def test_the_p_value_is_the_share_of_splits_at_least_as_uneven(b, c):
    uneven = [abs(b + c - 2 * sum(split)) for split in itertools.product((0, 1), repeat=b + c)]
    want = np.mean(np.array(uneven) >= abs(b - c))
    np.testing.assert_allclose(evaluate.compare(*split(40, b, c)).p_value, want, rtol=1e-12)


def test_the_p_value_of_many_is_that_of_scipy():
    got = evaluate.compare(*split(10_000, 310, 240)).p_value
    np.testing.assert_allclose(got, stats.binomtest(310, 550).pvalue, rtol=1e-10)


def test_swapping_the_masks_negates_the_difference():
    one, other = evaluate.compare(*split(50, 7, 2)), evaluate.compare(*split(50, 7, 2)[::-1])
    assert (one.difference, one.p_value) == (-other.difference, other.p_value)
    np.testing.assert_allclose(one.interval, [-other.interval[1], -other.interval[0]], rtol=1e-12)


@pytest.mark.parametrize("n", [1, 2, 5, 50])
def test_a_difference_and_its_interval_are_between_minus_1_and_1(n):
    found = evaluate.compare(np.ones(n, bool), np.zeros(n, bool))
    assert found.difference == 1
    assert -1 <= found.interval[0] < found.interval[1] <= 1
