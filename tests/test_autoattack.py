"""`attack.cascade`, `attack.autoattack` and `evaluate.ensemble`, which run several attacks."""

import functools
import importlib
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from jaxadv import attack, evaluate, norms, perturb

module = importlib.import_module("jaxadv.attack.autoattack")  # not the function of that name

N, D = 11, 3
KEY = jax.random.key(5)


def net(params, x):
    """Logits are the inputs themselves."""
    return params * x


def push(direction, size):
    """An attack that moves every example along an axis, ignoring its budget."""

    def method(apply_fn, params, x, y, /, *, eps, key=None, bounds=None):
        return jnp.broadcast_to(size * jnp.eye(D, dtype=x.dtype)[direction], x.shape)

    return method


def problem():
    """Example i is class 0 by 0.5 i; number 3 is misclassified, number 4 isn't finite."""
    x = np.zeros((N, D), np.float32)
    x[:, 0] = 0.5 * np.arange(N) + 0.25
    x[3] = 0, 9, 0
    x[4] = np.nan
    return x, np.zeros(N, np.int64)


ATTACKS = {"weak": push(1, 1.0), "sideways": push(2, 2.0), "strong": push(1, 3.0)}


def run(**kwargs):
    return attack.cascade(net, 1.0, *problem(), ATTACKS, eps=1.0, **kwargs)


# The cascade


def test_each_attack_is_run_on_what_those_before_have_left():
    stages = run().stages
    assert list(stages) == list(ATTACKS)
    wrong = {name: np.flatnonzero(stage.fooled).tolist() for name, stage in stages.items()}
    assert wrong == {"weak": [0, 1], "sideways": [2], "strong": [5]}
    tried = {name: np.flatnonzero(stage.tried).tolist() for name, stage in stages.items()}
    assert tried == {
        "weak": [0, 1, 2, 5, 6, 7, 8, 9, 10],
        "sideways": [2, 5, 6, 7, 8, 9, 10],
        "strong": [5, 6, 7, 8, 9, 10],
    }
    assert all(stage.seconds > 0 for stage in stages.values())


def test_the_perturbation_that_misled_the_net_is_kept_and_others_are_0():
    result = run()
    want = np.zeros((N, D))
    want[[0, 1], 1], want[2, 2], want[5, 1] = 1, 2, 3
    np.testing.assert_array_equal(result.r, want)
    assert np.flatnonzero(result.robust).tolist() == [6, 7, 8, 9, 10]
    assert np.flatnonzero(~result.clean).tolist() == [3, 4]


@pytest.mark.parametrize("batch_size", [1, 2, 4, 8, 500])
def test_the_batch_size_changes_nothing(batch_size):
    for one, other in zip(run()[:3], run(batch_size=batch_size)[:3], strict=True):
        np.testing.assert_array_equal(one, other)


def test_nothing_is_attacked_where_nothing_is_right():
    x, y = problem()
    result = attack.cascade(net, 1.0, x[3:5], y[3:5], ATTACKS, eps=1.0)
    assert not any(stage.tried.any() for stage in result.stages.values())
    np.testing.assert_array_equal(result.r, 0)


def test_what_an_attack_refuses_is_said_before_any_runs():
    x, y = problem()
    ran = []

    def first(apply_fn, params, x, y, /, *, eps, key=None, bounds=None):
        jax.debug.callback(lambda: ran.append(1))
        return x * jnp.inf  # leaves nothing to the next

    attacks = {"first": first, "square": functools.partial(attack.square, steps=0)}
    with pytest.raises(ValueError, match="expected steps >= 1, got 0"):
        attack.cascade(net, 1.0, x, y, attacks, eps=1.0, key=KEY)
    with pytest.raises(ValueError, match="expected a key"):
        attack.cascade(net, 1.0, x, y, {**attacks, "square": attack.apgd}, eps=1.0)
    jax.effects_barrier()
    assert not ran


@pytest.mark.parametrize("norm", ["l1", "l2", "linf"])
def test_of_no_examples_there_is_nothing_to_attack(norm):
    def of_pixels(w, x):
        return x.reshape(x.shape[0], 16) @ w

    x, y = np.zeros((0, 4, 4, 1), np.float32), np.zeros(0, int)
    attacks = attack.standard(norm)
    result = evaluate.ensemble(
        of_pixels, np.ones((16, 3), np.float32), x, y, attacks, eps=1.0, norm=norm, key=KEY
    )
    assert result.r.shape == x.shape
    assert result.outcome.robust.shape == (0,)
    assert list(result.stages) == list(attacks)


@given(st.integers(0, 3000), st.integers(1, 600))
def test_batches_hold_every_index_once_and_cost_least(n, batch_size):
    rows = 7 * np.arange(n)
    sizes = [max(1, batch_size // part) for part in (1, 8, 64)]
    overhead = batch_size // 80
    batches = module._batches(rows, sizes, overhead)
    np.testing.assert_array_equal(np.concatenate([rows[:0], *(part for part, _ in batches)]), rows)
    assert all(0 < len(part) <= size for part, size in batches)
    assert {size for _, size in batches} <= set(sizes)
    # Copies that fill them up are an eighth of a batch at most.
    assert sum(size for _, size in batches) - n <= batch_size // 8
    cost = sum(size + overhead for _, size in batches)
    for only in sizes:
        assert cost <= -(-n // only) * (only + overhead)


def test_a_few_that_are_left_cost_a_few():
    for n, expected in [(14, [7, 7]), (71, [62, 7, 7]), (40, [62]), (450, [500])]:
        batches = module._batches(np.arange(n), (500, 62, 7), 6)
        assert [size for _, size in batches] == expected


def test_an_attack_is_compiled_for_three_shapes_at_the_most():
    traced = []

    def counting(apply_fn, params, x, y, /, *, eps, key=None, bounds=None):
        traced.append(x.shape)
        return jnp.zeros_like(x)

    x, y = np.tile([[5.0, 0.0, 0.0]], (45, 1)).astype(np.float32), np.zeros(45, int)
    for n in (45, 44, 41, 17, 3):
        attack.cascade(net, 1.0, x[:n], y[:n], {"a": counting}, eps=1.0, batch_size=16)
    assert set(traced) <= {(16, D), (2, D), (3, D), (1, D)}
    assert len(traced) == len(set(traced))


def test_sizes_and_keys_belong_to_the_examples_and_each_attack_has_keys_of_its_own():
    seen = {}

    def spy(name):
        def method(apply_fn, params, x, y, /, *, eps, key=None, bounds=None):
            jax.debug.callback(
                lambda *values: seen.setdefault(name, []).append(values), x[:, 0], eps,
                jax.random.key_data(key),
            )  # fmt: skip
            return jnp.zeros_like(x)

        return method

    x = np.zeros((5, D), np.float32)
    x[:, 0] = np.arange(1, 6)
    attacks = {name: spy(name) for name in ("first", "second")}
    eps = np.array([0.1, 0.2, 0.3, 0.4, 0.5], np.float32)
    attack.cascade(net, 1.0, x, np.zeros(5, int), attacks, eps=eps, key=KEY, batch_size=2)
    jax.effects_barrier()
    keys = {}
    for name, calls in seen.items():
        for values in calls:
            for place, size, key in zip(*map(np.asarray, values), strict=True):
                assert size == np.float32(place / 10)
                keys.setdefault((name, int(place)), set()).add(tuple(key.tolist()))
    assert len(keys) == 10
    assert all(len(of_example) == 1 for of_example in keys.values())
    assert len(set.union(*keys.values())) == 10


def test_a_cascade_without_attacks_and_one_under_a_trace_raise():
    x, y = problem()
    with pytest.raises(ValueError, match=r"at least one attack, got none; pass attack\.standard"):
        attack.cascade(net, 1.0, x, y, {}, eps=1.0)
    with pytest.raises(TypeError, match=r"attack\.cascade loops over a data set on the host"):
        jax.jit(lambda x: attack.cascade(net, 1.0, x, y, ATTACKS, eps=1.0).r)(x)
    with pytest.raises(ValueError, match="expected a key"):
        attack.autoattack(net, 1.0, x, y, eps=1.0, norm="l1")


# The standard ensemble


def test_the_standard_ensemble_has_the_published_attacks_and_budgets():
    for norm in ("l2", "linf"):
        attacks = attack.standard(norm)
        assert list(attacks) == ["apgd-ce", "apgd-t", "fab-t", "square"]
        assert all(method.keywords["norm"] == norm for method in attacks.values())
        assert attacks["apgd-t"].keywords["n_targets"] == 9
        assert attacks["fab-t"].keywords["n_targets"] == 9
        assert attack.standard(norm) is attack.standard(norm=norm) is attacks
        with pytest.raises(TypeError, match="does not support item assignment"):
            attacks["apgd-ce"] = attack.pgd
    assert attack.standard() is attack.standard("l2")
    sparse = attack.standard("l1")
    assert list(sparse) == ["apgd-ce", "apgd-t", "fab-t"]
    assert sparse["apgd-ce"].keywords["restarts"] == 5
    assert sparse["apgd-t"].keywords["n_targets"] == 5
    assert sparse["fab-t"].keywords["n_targets"] == 9  # the authors' code lowers APGD's alone
    with pytest.raises(ValueError, match="expected norm to be one of"):
        attack.standard("l3")


def linear(w, x):
    return x.reshape(len(x), -1) @ w


def separated(norm, n=8):
    """Images whose margin is 10% below and above what size 1 can cross, by turns."""
    rng = np.random.default_rng(3)
    w = rng.normal(size=(16, 4)).astype(np.float32)
    x = rng.uniform(0.3, 0.7, size=(n, 4, 4, 1)).astype(np.float32)
    y = (x.reshape(n, -1) @ w).argmax(axis=1)
    z = x.reshape(n, -1) @ w
    others = [[k for k in range(4) if k != label] for label in y]
    order = {"l1": np.inf, "l2": 2, "linf": 1}[norm]
    distances = [
        min((z[i, y[i]] - z[i, k]) / np.linalg.norm(w[:, y[i]] - w[:, k], order) for k in others[i])
        for i in range(n)
    ]
    return w, x, y, np.array(distances)


@pytest.mark.parametrize(
    "norm", ["l2", *(pytest.param(norm, marks=pytest.mark.slow) for norm in ("l1", "linf"))]
)
def test_on_a_linear_net_the_ensemble_breaks_what_can_be_broken_and_nothing_else(norm):
    w, x, y, distances = separated(norm)
    # Square does least steps worth its name on images of this size; it must break nothing more.
    eps = (distances * np.where(np.arange(len(y)) % 2, 1.02, 0.98)).astype(np.float32)
    attacks = dict(attack.standard(norm))
    attacks.pop("square", None)
    r = attack.cascade(linear, w, x, y, attacks, eps=eps, key=KEY).r
    assert (np.abs(r).reshape(len(y), -1).max(axis=1) > 0).tolist() == [False, True] * (len(y) // 2)
    size = np.linalg.norm(r.reshape(len(y), -1), {"l1": 1, "l2": 2, "linf": np.inf}[norm], axis=1)
    assert (size <= eps * (1 + 1e-6)).all()


def test_autoattack_returns_the_perturbations_of_the_standard_cascade():
    w, x, y, distances = separated("l2", n=3)
    kwargs = {"eps": float(distances.max() * 1.1), "key": KEY, "bounds": (-5.0, 5.0)}
    r = attack.autoattack(linear, w, x, y, **kwargs)
    result = attack.cascade(linear, w, x, y, attack.standard("l2"), **kwargs)
    np.testing.assert_array_equal(r, result.r)
    assert not result.robust.any()


# The evaluation


def test_the_outcome_is_measured_again_on_the_stored_points():
    x, y = problem()
    result = evaluate.ensemble(net, 1.0, x, y, ATTACKS, eps=3.0, norm="l1", batch_size=4)
    want = evaluate.measure(net, 1.0, x, y, run().r, norm="l1")
    for got, expected in zip(result.outcome, want, strict=True):
        np.testing.assert_array_equal(got, expected)
    assert evaluate.accuracy(result.outcome.robust) == 5 / N
    np.testing.assert_array_equal(result.r, run().r)
    assert list(result.stages) == list(ATTACKS)


def test_an_attack_that_misleads_nobody_gains_nothing():
    x, y = problem()
    result = evaluate.ensemble(net, 1.0, x, y, {"none": push(0, 0.0)}, eps=1.0)
    np.testing.assert_array_equal(result.outcome.robust, result.outcome.clean)


@pytest.mark.parametrize(
    ("norm", "eps"), [("linf", 2.9), ("l2", np.where(np.arange(N) == 5, 2.9, 3.1)), ("l1", 2.9)]
)
def test_success_beyond_the_size_is_an_error_that_names_the_attack(norm, eps):
    x, y = problem()
    with pytest.raises(ValueError, match=rf"{norm} size 2\.9 at most, got 3 by 'strong'; pass"):
        evaluate.ensemble(net, 1.0, x, y, ATTACKS, eps=eps, norm=norm)
    # Where it isn't kept, it isn't asked either.
    evaluate.ensemble(net, 1.0, x[6:], y[6:], ATTACKS, eps=eps if norm != "l2" else 2.9, norm=norm)


def test_nan_is_no_success():
    x, y = problem()

    def broken(apply_fn, params, x, y, /, *, eps, key=None, bounds=None):
        return jnp.full_like(x, jnp.nan)

    with pytest.raises(ValueError, match="l2 size 9 at most, got nan by 'broken'"):
        evaluate.ensemble(net, 1.0, x, y, {"broken": broken}, eps=9.0)


def test_the_norm_is_that_of_the_attacks():
    x, y = problem()
    attacks = {"fgsm": functools.partial(perturb.loss, norm="linf")}
    found = evaluate.ensemble(net, 1.0, x, y, attacks, eps=2.0)
    assert found.outcome.norm.max() == 2
    with pytest.raises(ValueError, match=r"expected one norm, got \['l2', 'linf'\]; say it once"):
        evaluate.ensemble(net, 1.0, x, y, attacks, eps=2.0, norm="l2")


@pytest.mark.parametrize("attacks", [[attack.pgd], (attack.pgd, perturb.loss), attack.pgd, "pgd"])
@pytest.mark.parametrize("driver", [attack.cascade, evaluate.ensemble])
def test_attacks_without_names_are_refused(driver, attacks):
    x, y = problem()
    with pytest.raises(TypeError, match=r"expected attacks by name, got \w+; pass a dict"):
        driver(net, 1.0, x, y, attacks, eps=2.0)


@pytest.mark.parametrize("driver", [attack.cascade, evaluate.ensemble])
def test_an_attack_that_is_no_function_is_named(driver):
    x, y = problem()
    with pytest.raises(TypeError, match=r"expected attack 'pgd' to be a function, got str"):
        driver(net, 1.0, x, y, {"loss": perturb.loss, "pgd": "pgd"}, eps=2.0)


def test_success_outside_of_the_box_is_an_error():
    x, y = np.array([[2.0, 0.0, 0.0]], np.float32), np.zeros(1, int)
    bounds = (0.0, np.array([4.0, 2.5, 4.0]))
    with pytest.raises(ValueError, match=r"x \+ r within bounds, got 3 where at most 2\.5 is"):
        evaluate.ensemble(net, 1.0, x, y, ATTACKS, eps=9.0, bounds=bounds)
    found = evaluate.ensemble(net, 1.0, x, y, ATTACKS, eps=9.0, bounds=(0.0, 4.0))
    assert not found.outcome.robust.any()


@pytest.mark.parametrize("norm", ["l1", "l2", "linf"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_the_librarys_attacks_keep_their_size_in_every_dtype(dtype, norm):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(20, 50)), dtype)
    w = jnp.asarray(rng.normal(size=(50, 4)), dtype)
    y = np.asarray(x @ w).argmax(axis=1)
    attacks = {"loss": functools.partial(perturb.loss, norm=norm)}
    attacks["pgd"] = functools.partial(attack.pgd, norm=norm, steps=3)
    eps = {"l1": 4.0, "l2": 1.0, "linf": 0.2}[norm]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = evaluate.ensemble(lambda w, x: x @ w, w, x, y, attacks, eps=eps, norm=norm)
    assert 0 < found.outcome.robust.sum() < 20
    assert (norms.norm(jnp.asarray(found.r), norm) <= eps * (1 + 1e-6)).all()
    # In a narrow dtype x + r is rounded to a point that may be further away: that is reported.
    realised = norms.norm(jnp.float32(x + found.r) - jnp.float32(x), norm)
    over = realised > eps * (1 + max(1e-5, float(jnp.finfo(dtype).eps)))
    assert len(said) == over.any()
    assert all(f"rounded to {jnp.dtype(dtype).name}" in str(warning.message) for warning in said)
    if dtype == jnp.bfloat16 and norm == "linf":
        assert over.any()


@pytest.mark.parametrize("n_right", [0, 1, 7, 40])
@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.999])
def test_the_interval_is_wilsons(n_right, confidence):
    want = stats.binomtest(n_right, 40).proportion_ci(confidence, method="wilson")
    got = evaluate.interval(np.arange(40) < n_right, confidence)
    np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("n", [1, 10, 37, 1000])
@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.999])
def test_the_interval_of_none_or_all_has_an_exact_end(n, confidence):
    low, high = evaluate.interval(np.zeros(n, bool), confidence)
    assert (low, 0 < high < 1) == (0.0, True)
    low, high = evaluate.interval(np.ones(n, bool), confidence)
    assert (0 < low < 1, high) == (True, 1.0)


def test_an_interval_of_nothing_or_of_no_confidence_raises():
    with pytest.raises(ValueError, match=r"a mask \[n\] of at least one example, got shape"):
        evaluate.interval(np.zeros(0, bool))
    for confidence in (0, 1, 95):
        with pytest.raises(ValueError, match="0 < confidence < 1, got"):
            evaluate.interval(np.ones(3, bool), confidence)


def test_perturbations_made_on_another_net_are_scored_on_this_one():
    x = np.array([[3.0, 0.0, 0.0], [1.0, 0.0, 0.0]], np.float32)
    y = np.zeros(2, int)

    def turned(params, x):  # class 2 is where class 1 would be
        return x[:, jnp.array([0, 2, 1])]

    def steps(apply_fn, params, x, y, /, *, eps, key=None, bounds=None):
        toward = jax.grad(lambda x: jnp.sum(apply_fn(params, x)[:, 1] + params))(x)
        return eps[:, None] * toward

    own = evaluate.robust(net, 1.0, x, y, steps, eps=2.0)
    other = evaluate.robust(net, 1.0, x, y, steps, eps=2.0, source=(turned, 2.0))
    assert own.robust.tolist() == other.robust.tolist() == [True, False]
    want = evaluate.perturbations(turned, 2.0, x, y, steps, eps=2.0)
    assert want[:, 2].all()
    assert not want[:, 1].any()
    np.testing.assert_array_equal(
        other.norm, evaluate.measure(net, 1.0, x, y, want, norm="l2").norm
    )
    blind = evaluate.robust(
        lambda p, x: x[:, :2] * p, 1.0, x, y, steps, eps=2.0, source=(turned, 2.0)
    )
    assert blind.robust.all()  # this net doesn't see class 2
