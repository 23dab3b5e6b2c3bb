"""`jaxadv.evaluate`: what counts as right, that every example counts, and that batches don't."""

import functools
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references
from references import NORMS

from jaxadv import attack, evaluate, perturb

D, K = 5, 3
INF, NAN = float("inf"), float("nan")

# Batches of different sizes may be compiled to sums in another order: a few roundings of 2^-24.
ATOL = 1e-5


@pytest.fixture(autouse=True)
def _fresh_trace_counter():
    chex.clear_trace_counter()


def identity(params, x):
    """The inputs are the logits."""
    return x


def linear(params, x):
    return x @ params


def draw(n, seed=0):
    """Weights, and n examples of which the net gets most right."""
    rng = np.random.default_rng(seed)
    w = rng.normal(size=(D, K)).astype(np.float32)
    x = rng.normal(size=(n, D)).astype(np.float32)
    y = np.argmax(x @ w, axis=1)
    y[::5] = (y[::5] + 1) % K
    return w, x, y


# correct

# name: logits, label, whether that is right
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
def test_correct_decides(name):
    z, label, right = ROWS[name]
    # In the middle of a batch of rows that are right, which must stay so.
    z, y = jnp.array([[0, 1, 2], z, [2, 1, 0]], jnp.float32), jnp.array([2, label, 0])
    # The logits are looked up, so that x itself is sound.
    x = jnp.arange(3, dtype=jnp.float32)[:, None]
    got = evaluate.correct(lambda z, x: z[x[:, 0].astype(int)], z, x, y)
    assert got.dtype == bool
    np.testing.assert_array_equal(got, [True, right, True])


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_an_example_that_is_not_finite_is_wrong_whatever_its_logits(bad):
    x = jnp.array([[1.0, 2.0], [bad, 2.0]])
    logits = jnp.array([[1.0, 0.0, 0.0]] * 2)
    got = evaluate.correct(lambda z, x: z, logits, x, jnp.zeros(2, int))
    np.testing.assert_array_equal(got, [True, False])


def test_correct_works_under_jit_and_vmap():
    w, x, y = draw(12)
    want = np.argmax(x @ w, axis=1) == y
    assert 0 < want.sum() < 12
    correct = partial(evaluate.correct, linear)
    np.testing.assert_array_equal(jax.jit(correct)(w, x, y), want)
    batches = x.reshape(4, 3, D), y.reshape(4, 3)
    got = jax.vmap(correct, in_axes=(None, 0, 0))(w, *batches)
    np.testing.assert_array_equal(got.reshape(12), want)


# measure, count, merge


def test_an_example_that_is_misclassified_is_wrong_even_where_r_repairs_it():
    x, y = jnp.array([[1.0, 2.0], [3.0, 2.0]]), jnp.array([0, 0])
    r = jnp.array([[4.0, 0.0], [4.0, 0.0]])
    assert np.all(evaluate.correct(identity, None, x + r, y))
    outcome = evaluate.measure(identity, None, x, y, r, norm="l2")
    np.testing.assert_array_equal(outcome.clean, [False, True])
    np.testing.assert_array_equal(outcome.robust, [False, True])


@pytest.mark.parametrize("norm", NORMS)
def test_the_norm_is_measured_of_the_perturbation_that_came(norm):
    w, x, y = draw(7)
    r = np.random.default_rng(1).normal(size=x.shape).astype(np.float32)
    outcome = evaluate.measure(linear, w, x, y, r, norm=norm)
    want = [references.length(row, norm) for row in r]
    np.testing.assert_allclose(outcome.norm, want, rtol=1e-6)


def faulty():
    """Eight examples, each with another fault: x (its logits), y, r."""
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


def test_measure_tells_what_went_wrong_with_each_example():
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
    # Such an example is wrong, and the figure it lowers must say why.
    def overflowing(params, x):
        return jnp.where(jnp.abs(x) > 10, jnp.nan, x)

    x, y = jnp.array([[2.0, 1.0], [2.0, 1.0]]), jnp.zeros(2, int)
    r = jnp.array([[20.0, 0.0], [1.0, 0.0]])
    outcome = evaluate.measure(overflowing, None, x, y, r, norm="l2")
    np.testing.assert_array_equal(outcome.robust, [False, True])
    np.testing.assert_array_equal(outcome.nonfinite, [True, False])


@partial(jax.jit, static_argnames="norm")
def counted(x, y, r, norm="l2"):
    return evaluate.count(evaluate.measure(identity, None, x, y, r, norm=norm))


def test_counts_are_the_sums_of_an_outcome_and_its_greatest_finite_norm():
    assert jax.tree.map(float, counted(*faulty(), norm="linf")) == evaluate.Counts(
        total=8, clean=4, robust=2, zero=1, nonfinite=4, invalid=2, max_norm=0.25
    )


def test_the_counts_of_batches_merge_to_those_of_the_whole():
    x, y, r = faulty()
    r = r * np.arange(1, 9, dtype=np.float32)[:, None]
    slices = slice(0, 3), slice(3, 4), slice(4, 8), slice(8, 8)
    parts = [counted(x[rows], y[rows], r[rows]) for rows in slices]
    whole = jax.tree.map(float, counted(x, y, r))
    assert jax.tree.map(float, evaluate.merge(*parts)) == whole
    assert jax.tree.map(float, evaluate.merge(parts[0])) == jax.tree.map(float, parts[0])


def test_measure_count_and_merge_work_under_jit_and_scan():
    x, y, r = faulty()

    def over_batches(x, y, r):
        def one(total, batch):
            return evaluate.merge(total, counted(*batch)), None

        none = counted(x[0, :0], y[0, :0], r[0, :0])
        return jax.lax.scan(one, none, (x, y, r))[0]

    got = jax.jit(over_batches)(x.reshape(4, 2, 3), y.reshape(4, 2), r.reshape(4, 2, 3))
    assert jax.tree.map(float, got) == jax.tree.map(float, counted(x, y, r))


def test_no_counts_to_merge_raise():
    with pytest.raises(ValueError, match=r"^expected at least one"):
        evaluate.merge()


# Bad input

W, X, Y = draw(7)
# name: what is called, the error
BAD = {
    "r like one example": (
        lambda: evaluate.measure(linear, W, X, Y, X[:1], norm="l2"),
        ValueError,
    ),
    "r of other examples": (lambda: evaluate.outcome(linear, W, X, Y, X[:1]), ValueError),
    "unknown norm": (lambda: evaluate.measure(linear, W, X, Y, X, norm="l3"), ValueError),
    "integer x": (lambda: evaluate.correct(linear, W, X.astype(int), Y), TypeError),
    "float labels": (lambda: evaluate.correct(linear, W, X, Y.astype(np.float32)), TypeError),
    "one-hot labels": (lambda: evaluate.clean(linear, W, X, np.eye(K)[Y]), TypeError),
    "one-hot integers": (lambda: evaluate.clean(linear, W, X, np.eye(K, dtype=int)[Y]), ValueError),
    "fewer labels": (lambda: evaluate.clean(linear, W, X, Y[:3]), ValueError),
    "scalar label": (lambda: evaluate.clean(linear, W, X, 3), ValueError),
    "scalar x": (lambda: evaluate.clean(linear, W, 3.0, Y), ValueError),
    "attack that is a string": (
        lambda: evaluate.robust(linear, W, X, Y, "pgd", eps=1.0),
        TypeError,
    ),
    "one size for a curve": (
        lambda: evaluate.curve(linear, W, X, Y, perturb.loss, eps=0.5),
        ValueError,
    ),
    "infinite size": (
        lambda: evaluate.curve(linear, W, X, Y, perturb.loss, eps=[0.5, INF]),
        ValueError,
    ),
    "batch size 0": (lambda: evaluate.clean(linear, W, X, Y, batch_size=0), ValueError),
    "negative eps": (
        lambda: evaluate.robust(linear, W, X, Y, perturb.loss, eps=-1.0),
        ValueError,
    ),
    "negative size": (
        lambda: evaluate.curve(linear, W, X, Y, perturb.loss, eps=[0.5, -1.0]),
        ValueError,
    ),
    "sizes of others": (
        lambda: evaluate.robust(linear, W, X, Y, perturb.loss, eps=np.ones(3)),
        ValueError,
    ),
    "keys of others": (
        lambda: evaluate.robust(
            linear, W, X, Y, perturb.vat, eps=1.0, key=jax.random.split(jax.random.key(0), 3)
        ),
        ValueError,
    ),
    "bounds upside down": (
        lambda: evaluate.robust(linear, W, X, Y, perturb.loss, eps=1.0, bounds=(1.0, 0.0)),
        ValueError,
    ),
    "empty mask": (lambda: evaluate.accuracy(np.zeros(0, bool)), ValueError),
    "mask of two axes": (lambda: evaluate.accuracy(np.ones((2, 3), bool)), ValueError),
    "accuracy of sizes": (lambda: evaluate.accuracy(np.ones(3)), TypeError),
    "accuracy of counts": (lambda: evaluate.accuracy([2, 0]), TypeError),
    "interval of sizes": (lambda: evaluate.interval(np.ones(3)), TypeError),
    "source without parameters": (
        lambda: evaluate.robust(linear, W, X, Y, perturb.loss, eps=1.0, source=linear),
        TypeError,
    ),
    "checked source without parameters": (
        lambda: evaluate.check(linear, W, X, Y, eps=1.0, key=jax.random.key(0), source=linear),
        TypeError,
    ),
    "batch size of a fraction": (
        lambda: evaluate.clean(linear, W, X, Y, batch_size=3.5),
        TypeError,
    ),
    "no batch size": (lambda: evaluate.clean(linear, W, X, Y, batch_size=None), TypeError),
    "no masks": (lambda: evaluate.worst_case(), ValueError),
    "masks of different sets": (
        lambda: evaluate.worst_case(np.ones(3, bool), np.ones(4, bool)),
        ValueError,
    ),
    "masks that would broadcast": (
        lambda: evaluate.worst_case(np.ones(3, bool), np.ones(1, bool)),
        ValueError,
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_raises_what_was_expected_and_what_came(name):
    function, error = BAD[name]
    with pytest.raises(error, match=r"(?s)expected .*got .*;"):
        function()


# name: x, y, what the error says of them
SHAPES = {
    "one-hot floats": (
        X,
        np.eye(K, dtype=np.float32)[Y],
        TypeError,
        r"got float32 of shape \(7, 3\)",
    ),
    "one-hot integers": (X, np.eye(K, dtype=int)[Y], ValueError, r"shape \[7\], got \(7, 3\)"),
    "scalar y": (X, np.int32(3), ValueError, r"shape \[7\], got \(\)"),
    "boolean x": (X > 0, Y, TypeError, "floating-point dtype, got bool"),
    "boolean y": (X, Y > 0, TypeError, r"got bool of shape \(7,\)"),
    "one example": (X[0], Y, ValueError, r"got \(5,\).*x\[None\]"),
    "a number": (np.float32(1), Y, ValueError, r"got \(\)"),
    "no entries": (X[:, :0], Y, ValueError, r"got \(7, 0\)"),
    "fewer labels": (X, Y[:3], ValueError, "got 3 labels for 7 examples"),
}


@pytest.mark.parametrize("driver", ["clean", "robust", "outcome", "ensemble", "check"])
@pytest.mark.parametrize("name", SHAPES)
def test_an_error_about_a_data_set_shows_its_shape(name, driver):
    x, y, error, message = SHAPES[name]
    r = np.zeros(np.shape(x), np.float32)
    calls = {
        "clean": lambda: evaluate.clean(linear, W, x, y),
        "robust": lambda: evaluate.robust(linear, W, x, y, perturb.loss, eps=1.0),
        "outcome": lambda: evaluate.outcome(linear, W, x, y, r),
        "ensemble": lambda: evaluate.ensemble(linear, W, x, y, {"loss": perturb.loss}, eps=1.0),
        "check": lambda: evaluate.check(linear, W, x, y, eps=1.0, key=jax.random.key(0)),
    }
    with pytest.raises(error, match=message):
        calls[driver]()


@pytest.mark.parametrize("size", [NAN, INF, -1.0])
@pytest.mark.parametrize("kind", [float, np.float32, jnp.float32, lambda v: jnp.full(7, v)])
@pytest.mark.parametrize("driver", ["robust", "perturbations", "ensemble", "check"])
def test_a_size_that_is_none_is_refused_whatever_array_it_is_in(driver, kind, size):
    calls = {
        "robust": partial(evaluate.robust, perturb_fn=attack.pgd),
        "perturbations": partial(evaluate.perturbations, perturb_fn=attack.pgd),
        "ensemble": partial(evaluate.ensemble, attacks={"pgd": attack.pgd}),
        "check": partial(evaluate.check, key=jax.random.key(0)),
    }
    with pytest.raises(ValueError, match="expected a finite eps >= 0"):
        calls[driver](linear, W, X, Y, eps=kind(size))


def test_a_method_that_lacks_its_key_says_so():
    with pytest.raises(ValueError, match="key"):
        evaluate.robust(linear, W, X, Y, perturb.vat, eps=1.0)


# Drivers: each as a function of (w, x, y) and more, all of whose results have a row per example

DRIVERS = {
    "clean": evaluate.clean,
    "perturbations": partial(evaluate.perturbations, perturb_fn=perturb.loss, eps=0.5),
    "robust": partial(evaluate.robust, perturb_fn=perturb.loss, eps=0.5),
    "outcome": lambda net, w, x, y, **some: evaluate.outcome(net, w, x, y, -2.0 * x, **some),
    "curve": partial(evaluate.curve, perturb_fn=perturb.loss, eps=[0.5, 1.0]),
}
every_driver = pytest.mark.parametrize("name", DRIVERS)


@functools.cache
def at_once():
    """Each driver's result for eleven examples in one batch."""
    w, x, y = draw(11)
    return {name: driver(linear, w, x, y, batch_size=11) for name, driver in DRIVERS.items()}


@every_driver
@pytest.mark.parametrize("n", [0, 1, 4, 10])
def test_every_example_is_covered_once_and_in_order(name, n):
    # n = 0 and n = 1; less than, equal to, and no multiple of the batch size.
    w, x, y = draw(11)
    got = DRIVERS[name](linear, w, x[:n], y[:n], batch_size=4)
    want = at_once()[name]
    if name == "curve":
        got, want = got.T, want.T
    want = jax.tree.map(lambda leaf: leaf[:n], want)
    for leaf, expected in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert isinstance(leaf, np.ndarray)
        assert (leaf.shape, leaf.dtype) == (expected.shape, expected.dtype)
        np.testing.assert_allclose(leaf, expected, atol=ATOL)


def test_the_drivers_do_what_the_batch_functions_do():
    w, x, y = draw(11)
    r = perturb.loss(linear, w, x, y, eps=0.5)
    np.testing.assert_array_equal(at_once()["clean"], np.argmax(x @ w, axis=1) == y)
    np.testing.assert_allclose(at_once()["perturbations"], r, atol=ATOL)
    chex.assert_trees_all_close(
        at_once()["robust"], evaluate.measure(linear, w, x, y, r, norm="l2"), atol=ATOL
    )
    for norm in NORMS:
        chex.assert_trees_all_close(
            evaluate.outcome(linear, w, x, y, np.asarray(r), norm=norm, batch_size=4),
            evaluate.measure(linear, w, x, y, r, norm=norm),
            atol=ATOL,
        )


# name: a method and a key of the whole data set
METHODS = {
    "virtual, one key": (perturb.vat, jax.random.key(3)),
    "virtual, raw key": (perturb.vat, jax.random.PRNGKey(3)),
    "virtual, keys": (perturb.vat, jax.random.split(jax.random.key(3), 11)),
    "pgd": (partial(attack.pgd, steps=3, random_start=True), jax.random.key(3)),
}


@pytest.mark.parametrize("name", METHODS)
def test_the_batch_size_changes_no_random_perturbation(name):
    perturb_fn, key = METHODS[name]
    w, x, y = draw(11)
    some = {"eps": np.linspace(0.1, 1.5, 11).astype(np.float32), "key": key}
    whole, r = (
        evaluate.perturbations(linear, w, x, y, perturb_fn, **some, batch_size=batch_size)
        for batch_size in (11, 4)
    )
    np.testing.assert_allclose(r, whole, atol=ATOL)
    again = evaluate.perturbations(linear, w, x, y, perturb_fn, **some, batch_size=4)
    np.testing.assert_array_equal(again, r)  # same key, same bits


def test_noise_belongs_to_the_example_and_not_to_its_place():
    w, x, y = draw(6)
    keys = jax.random.split(jax.random.key(3), 6)
    back = np.arange(6)[::-1]
    forth = evaluate.perturbations(linear, w, x, y, perturb.vat, eps=1.0, key=keys)
    turned = evaluate.perturbations(
        linear, w, x[back], y[back], perturb.vat, eps=1.0, key=keys[back]
    )
    np.testing.assert_allclose(turned[back], forth, atol=ATOL)


def test_sizes_are_per_example():
    w, x, y = draw(7)
    eps = np.arange(7, dtype=np.float32)
    outcome = evaluate.robust(linear, w, x, y, perturb.loss, eps=eps, batch_size=3)
    np.testing.assert_allclose(outcome.norm, eps, rtol=1e-6)
    np.testing.assert_array_equal(outcome.zero, eps == 0)


@pytest.mark.parametrize("lo", [-0.5, np.linspace(-0.5, -0.1, D).astype(np.float32)])
def test_bounds_are_handed_on(lo):
    w, x, y = draw(7)
    x = np.clip(x, lo, 0.5)
    some = {"eps": 2.0, "bounds": (lo, 0.5), "batch_size": 3}
    r = evaluate.perturbations(linear, w, x, y, perturb.loss, **some)
    assert np.all(x + r >= lo)
    assert np.all(x + r <= 0.5)
    outcome = evaluate.robust(linear, w, x, y, perturb.loss, **some)
    want = [references.length(row, "l2") for row in r]
    np.testing.assert_allclose(outcome.norm, want, rtol=1e-6)
    assert np.all(outcome.norm < 2)  # the box did bind


# Norms, sizes and boxes of attacks


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("method", [perturb.loss, attack.pgd])
def test_the_norm_is_said_once_to_the_attack(norm, method):
    w, x, y = draw(7)
    perturb_fn = partial(method, norm=norm)
    outcome = evaluate.robust(linear, w, x, y, perturb_fn, eps=0.5)
    np.testing.assert_allclose(outcome.norm, np.full(7, 0.5), rtol=1e-5)
    again = evaluate.robust(linear, w, x, y, perturb_fn, eps=0.5, norm=norm)
    chex.assert_trees_all_equal(outcome, again)


@pytest.mark.parametrize(
    "method", [perturb.loss, partial(attack.pgd, norm="l1"), partial(partial(attack.fab), steps=3)]
)
def test_a_norm_that_is_not_the_attacks_is_an_error(method):
    # In linf no l2 ball of that radius would be found too large, only too weak.
    w, x, y = draw(7)
    with pytest.raises(ValueError, match=r"expected one norm, got .*'linf'\]; say it once"):
        evaluate.robust(linear, w, x, y, method, eps=0.5, norm="linf")


def test_attacks_of_two_norms_are_an_error():
    w, x, y = draw(7)
    two = {"pgd": attack.pgd, "fgsm": partial(perturb.loss, norm="linf")}
    with pytest.raises(ValueError, match=r"expected one norm, got \['l2', 'linf'\]"):
        evaluate.ensemble(linear, w, x, y, two, eps=0.5)


def far(apply_fn, params, x, y, /, *, eps, key=None, bounds=None):
    """An attack of one's own that knows no size and no box."""
    return jnp.full_like(x, 3.0)


@pytest.mark.parametrize(("norm", "size"), [(None, r"6\.7"), ("l1", "15"), ("linf", "3")])
def test_an_attack_that_exceeds_its_size_is_an_error(norm, size):
    w, x, y = draw(7)
    with pytest.raises(ValueError, match=rf"{norm or 'l2'} size 2 at most, got {size}.*; pass the"):
        evaluate.robust(linear, w, x, y, far, eps=2.0, norm=norm)
    evaluate.robust(linear, w, x, y, far, eps=20.0, norm=norm)


def test_an_attack_that_leaves_the_box_is_an_error():
    w, x, y = draw(7)
    x = np.clip(x, 0, 1)
    with pytest.raises(ValueError, match=r"x \+ r within bounds, got 4 where at most 1 is"):
        evaluate.robust(linear, w, x, y, far, eps=20.0, bounds=(0.0, 1.0))


def test_what_is_not_finite_has_no_size_to_exceed():
    def broken(apply_fn, params, x, y, /, *, eps, key=None, bounds=None):
        r = perturb.loss(apply_fn, params, x, y, eps=eps, bounds=bounds)
        return r.at[2].set(jnp.nan).at[3].set(jnp.inf)

    w, x, y = draw(7)
    x = np.clip(x, 0, 1)
    outcome = evaluate.robust(linear, w, x, y, broken, eps=0.5, bounds=(0.0, 1.0))
    np.testing.assert_array_equal(outcome.nonfinite, np.isin(np.arange(7), [2, 3]))
    assert not outcome.robust[2:4].any()


def test_a_data_set_of_images_keeps_its_shape():
    w, x, y = draw(7)
    images = x.reshape(7, 1, D, 1)

    def flat(w, x):
        return x.reshape(x.shape[0], -1) @ w

    r = evaluate.perturbations(flat, w, images, y, perturb.loss, eps=0.5, batch_size=3)
    want = evaluate.perturbations(linear, w, x, y, perturb.loss, eps=0.5, batch_size=3)
    assert r.shape == images.shape
    np.testing.assert_allclose(r.reshape(7, D), want, atol=ATOL)


@every_driver
def test_numpy_float64_data_is_evaluated_in_float32(name):
    # NumPy's default dtype; JAX without x64 has none such.
    w, x, y = draw(7)
    got = DRIVERS[name](linear, w, x.astype(np.float64), y)
    chex.assert_trees_all_equal(got, DRIVERS[name](linear, w, x, y))


@every_driver
def test_data_on_the_device_and_on_the_host_are_alike(name):
    w, x, y = draw(7)
    got = DRIVERS[name](linear, w, jnp.asarray(x), jnp.asarray(y))
    chex.assert_trees_all_equal(got, DRIVERS[name](linear, w, x, y))


# curve

# With pgd's margin loss a one-step direction depends on no size; so do these.
ONE_STEP = {
    "alpha": perturb.alpha,
    "loss": perturb.loss,
    "loss_sign": perturb.loss_sign,
    "loss, linf": partial(perturb.loss, norm="linf"),
}


@pytest.mark.parametrize("name", ONE_STEP)
def test_a_curve_is_robust_at_each_size(name):
    def mlp(w, x):
        return jnp.tanh(2 * x) @ w

    w, x, y = draw(40)
    sizes = [0.0, 0.1, 0.3, 0.7, 1.5, 4.0]
    masks = evaluate.curve(mlp, w, x, y, ONE_STEP[name], eps=sizes, batch_size=16)
    want = [evaluate.robust(mlp, w, x, y, ONE_STEP[name], eps=eps).robust for eps in sizes]
    np.testing.assert_array_equal(masks, want)
    shares = [evaluate.accuracy(mask) for mask in masks]
    assert shares[0] > shares[2] > shares[4]  # or there is nothing to tell apart


@pytest.mark.parametrize("name", ONE_STEP)
def test_a_curve_in_a_box_is_robust_in_it_at_each_size(name):
    def mlp(w, x):
        return jnp.tanh(2 * x) @ w

    w, x, y = draw(40)
    box = {"bounds": (np.linspace(-0.5, 0, D).astype(np.float32), 1.0)}
    x, sizes = np.clip(x, *box["bounds"]), [0.0, 0.2, 0.5, 1.0]
    y = np.argmax(mlp(w, x), axis=1)
    masks = evaluate.curve(mlp, w, x, y, ONE_STEP[name], eps=sizes, batch_size=16, **box)
    want = [evaluate.robust(mlp, w, x, y, ONE_STEP[name], eps=eps, **box).robust for eps in sizes]
    np.testing.assert_array_equal(masks, want)
    free = evaluate.curve(mlp, w, x, y, ONE_STEP[name], eps=sizes, batch_size=16)
    assert masks.sum() > free.sum()  # the box did bind
    with pytest.raises(ValueError, match="within bounds"):
        evaluate.curve(mlp, w, 3 * x, y, ONE_STEP[name], eps=sizes, **box)


def test_a_curve_counts_what_a_perturbation_repairs_as_wrong():
    def helpful(apply_fn, params, x, y, /, *, eps, key=None, bounds=None):
        return -perturb.loss(apply_fn, params, x, y, eps=eps)

    w, x, y = draw(11)
    clean, masks = (
        evaluate.clean(linear, w, x, y),
        evaluate.curve(linear, w, x, y, helpful, eps=[0.0, 9.0]),
    )
    assert not np.all(clean)
    np.testing.assert_array_equal(masks, [clean, clean])


def test_a_curve_makes_its_perturbations_once_for_all_sizes():
    calls = []

    def perturb_fn(apply_fn, params, x, y, /, *, eps, key=None, bounds=None):
        calls.append(None)
        return perturb.loss(apply_fn, params, x, y, eps=eps)

    w, x, y = draw(6)
    evaluate.curve(linear, w, x, y, perturb_fn, eps=[0.1, 0.2, 0.3], batch_size=3)
    assert len(calls) == 1  # one trace, with one call in it


# Masks


def test_accuracy_is_the_share_of_true():
    assert evaluate.accuracy(np.array([True, False, False, True, True])) == 0.6
    assert evaluate.accuracy(jnp.array([False, False])) == 0
    assert isinstance(evaluate.accuracy(jnp.array([True])), float)


def test_worst_case_is_the_logical_and_of_its_masks():
    masks = np.random.default_rng(0).random((3, 20)) < 0.7
    got = evaluate.worst_case(*masks)
    np.testing.assert_array_equal(got, masks.all(axis=0))
    assert evaluate.accuracy(got) < min(evaluate.accuracy(mask) for mask in masks)
    np.testing.assert_array_equal(evaluate.worst_case(masks[0]), masks[0])


def test_transfer_is_the_perturbations_of_one_net_scored_on_another():
    w, x, y = draw(30)
    v = w + 0.5 * np.random.default_rng(9).normal(size=w.shape).astype(np.float32)
    r = evaluate.perturbations(linear, w, x, y, perturb.loss, eps=1.0, batch_size=8)
    transferred = evaluate.clean(linear, v, x + r, y, batch_size=8)
    np.testing.assert_array_equal(transferred, np.argmax((x + r) @ v, axis=1) == y)
    clean = evaluate.clean(linear, v, x, y)
    white_box = evaluate.robust(linear, v, x, y, perturb.loss, eps=1.0).robust
    both = evaluate.worst_case(clean & transferred, white_box)
    assert evaluate.accuracy(both) <= evaluate.accuracy(white_box) < evaluate.accuracy(clean)


# Compilation


@every_driver
@pytest.mark.parametrize("traced", ["x", "y", "params", "nothing"])
def test_under_a_trace_a_driver_says_what_to_use_instead(name, traced):
    arguments = {"params": W, "x": X, "y": Y}

    def driver(**some):
        everything = arguments | some
        return DRIVERS[name](linear, everything["params"], everything["x"], everything["y"])

    some = {traced: arguments[traced]} if traced in arguments else {}
    with pytest.raises(TypeError, match=rf"expected .*evaluate\.{name} .*evaluate\.measure"):
        jax.jit(driver)(**some)


@pytest.mark.parametrize("traced", ["eps", "key", "bounds"])
def test_under_a_trace_of_its_options_robust_says_what_to_use_instead(traced):
    options = {"eps": 0.5, "key": jax.random.key(0), "bounds": (-1.0, 1.0)}

    def driver(**some):
        return evaluate.robust(linear, W, X, Y, perturb.loss, **(options | some))

    with pytest.raises(TypeError, match=r"expected .*evaluate\.robust .*evaluate\.measure"):
        jax.jit(driver)(**{traced: options[traced]})


@every_driver
def test_a_net_is_compiled_once_for_many_sizes_parameters_and_batches(name):
    w, x, y = draw(11)
    traces = []

    def net(params, x):
        traces.append(None)
        return x @ params

    driver = DRIVERS[name]
    driver(net, w, x, y, batch_size=4)
    once = len(traces)
    for params in (w, 2 * w):
        for factor in (0.1, 1, 7):
            some = driver.keywords.get("eps") if isinstance(driver, partial) else None
            sizes = {} if some is None else {"eps": (factor * np.array(some)).tolist()}
            driver(net, params, x, y, batch_size=4, **sizes)
    assert len(traces) == once + 6  # what each call has captured is looked at anew


@pytest.mark.parametrize("name", ["loss", "pgd"])
def test_robust_traces_its_attack_once_for_sizes_of_every_kind(name):
    w, x, y = draw(11)
    method = {"loss": perturb.loss, "pgd": partial(attack.pgd, steps=3)}[name]

    def perturb_fn(*args, **kwargs):
        return method(*args, **kwargs)

    attacked = chex.assert_max_traces(perturb_fn, n=1)
    for eps in (0.1, 2, np.float32(1), jnp.float32(2), np.full(11, 0.5)):
        evaluate.robust(linear, w, x, y, attacked, eps=eps, batch_size=4)


@pytest.mark.parametrize("as_array", [np.asarray, jnp.asarray])
@pytest.mark.parametrize("function", ["robust", "perturbations", "ensemble", "check", "cascade"])
def test_a_data_set_outside_the_bounds_is_named(function, as_array):
    w = jnp.eye(2)
    x, y = as_array(np.array([[0.0, 255.0], [3.0, 9.0]], np.float32)), np.array([0, 1])
    calls = {
        "robust": lambda **of: evaluate.robust(linear, w, x, y, perturb.loss, **of),
        "perturbations": lambda **of: evaluate.perturbations(linear, w, x, y, perturb.loss, **of),
        "ensemble": lambda **of: evaluate.ensemble(
            linear, w, x, y, {"loss": perturb.loss}, key=jax.random.key(0), **of
        ),
        "check": lambda **of: evaluate.check(linear, w, x, y, key=jax.random.key(0), **of),
        "cascade": lambda **of: attack.cascade(
            linear, w, x, y, {"loss": perturb.loss}, key=jax.random.key(0), **of
        ),
    }
    with pytest.raises(
        ValueError, match=r"within bounds, got 255 where at most 1 is allowed; scale"
    ):
        calls[function](eps=0.1, bounds=(0.0, 1.0))
    with pytest.raises(ValueError, match=r"got 255 where at most 8 is allowed"):
        calls[function](eps=0.1, bounds=(0.0, jnp.array([255.0, 8.0])))
    with pytest.raises(ValueError, match=r"got 0 where at least 1 is allowed"):
        calls[function](eps=0.1, bounds=(1.0, 255.0))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    ("mean", "std"), [(0.1307, 0.3081), (0.4914, 0.2470), (0.4822, 0.2435), (0.4465, 0.2616)]
)
def test_standardised_black_and_white_lie_in_standardised_bounds(mean, std, dtype):
    pixels, w, y = jnp.array([[0.0, 1.0], [1.0, 0.0]], dtype), jnp.eye(2, dtype=dtype), np.arange(2)
    x = (pixels - jnp.asarray(mean, dtype)) / jnp.asarray(std, dtype)
    of = {"eps": 0.1, "bounds": ((0 - mean) / std, (1 - mean) / std)}
    r = evaluate.perturbations(linear, w, x, y, perturb.loss, **of)
    assert r.shape == x.shape
    with pytest.raises(ValueError, match="within bounds"):
        evaluate.perturbations(linear, w, x * 1.25, y, perturb.loss, **of)


def test_float64_images_lie_in_their_bounds_to_float32():
    # Made in float32, white is half a unit in its last place off; the net sees float32 too.
    white = np.float32(1.1) - np.float32(0.1)
    x, y = np.full((2, 3), np.float64(white) + 5e-8), np.zeros(2, int)
    w = np.eye(3, dtype=np.float32)
    r = evaluate.perturbations(linear, w, x, y, perturb.loss, eps=0.1, bounds=(0.0, 1.0))
    assert r.dtype == np.float32
    with pytest.raises(ValueError, match="within bounds"):
        evaluate.perturbations(linear, w, x + 1e-5, y, perturb.loss, eps=0.1, bounds=(0.0, 1.0))


def test_lists_are_data_sets_too():
    x, y = [[2.0, 1.0], [0.0, 3.0]], [0, 0]
    np.testing.assert_array_equal(evaluate.clean(identity, None, x, y), [True, False])
    with pytest.raises(TypeError, match="expected integer labels"):
        evaluate.clean(identity, None, x, [0.0, 1.0])


def test_an_empty_data_set_and_one_with_a_nan_lie_in_any_bounds():
    w = jnp.eye(2)
    for x in (np.zeros((0, 2), np.float32), np.array([[np.nan, 0.5]], np.float32)):
        y = np.zeros(len(x), int)
        r = evaluate.perturbations(linear, w, x, y, perturb.loss, eps=0.1, bounds=(0.0, 1.0))
        assert r.shape == x.shape
