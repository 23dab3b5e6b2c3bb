"""`evaluate.attack_and_score`: one attack, several in turn, and AutoAttack."""

import functools
import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from references import mostly_right

from jaxadv import attack, evaluate, objectives, perturb

N, D = 11, 3
KEY = jax.random.key(5)


def net(params, x):
    """The logits are the inputs, scaled."""
    return params * x


def push(direction, size):
    """An attack that moves every example along an axis, ignoring its budget."""

    def method(apply_fn, params, x, y, /, *, eps, key=None, bounds=None):
        return jnp.broadcast_to(size * jnp.eye(D, dtype=x.dtype)[direction], x.shape)

    return method


def problem():
    """Example i is of class 0 with a margin that grows with i; 3 is misclassified, 4 is NaN."""
    x = np.zeros((N, D), np.float32)
    x[:, 0] = 0.5 * np.arange(N) + 0.25
    x[3] = 0, 9, 0
    x[4] = np.nan
    return x, np.zeros(N, np.int64)


ATTACKS = {"weak": push(1, 1.0), "sideways": push(2, 2.0), "strong": push(1, 3.0)}


def run(**kwargs):
    return evaluate.attack_and_score(net, 1.0, *problem(), ATTACKS, eps=3.0, **kwargs)


# Nets that return probabilities


def softmax(scale, x):
    return jax.nn.softmax(scale * x)


PGD = functools.partial(attack.pgd, steps=2)


@pytest.mark.parametrize(
    "call",
    [
        functools.partial(evaluate.attack_and_score, attacks=PGD, eps=0.1),
        functools.partial(evaluate.attack_and_score, attacks={"pgd": PGD}, eps=0.1),
        functools.partial(evaluate.distances, attacks={"fmn": attack.fmn}),
    ],
    ids=["one", "several", "distances"],
)
def test_a_net_that_returns_probabilities_causes_one_warning(call):
    x, y = np.eye(D, dtype=np.float32), np.arange(D)
    with pytest.warns(UserWarning, match="expected logits, got outputs in") as caught:
        call(softmax, 9.0, x, y)
    assert [each.filename for each in caught] == [__file__]
    call(lambda scale, x: jnp.log(softmax(scale, x)), 9.0, x, y)  # no warning


# Several attacks


def test_each_attack_runs_on_the_examples_that_survived_those_before():
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


def test_perturbations_that_misled_the_net_are_kept_and_others_are_0():
    result = run()
    want = np.zeros((N, D))
    want[[0, 1], 1], want[2, 2], want[5, 1] = 1, 2, 3
    np.testing.assert_array_equal(result.r, want)
    assert np.flatnonzero(result.outcome.robust).tolist() == [6, 7, 8, 9, 10]
    assert np.flatnonzero(~result.outcome.clean).tolist() == [3, 4]


@pytest.mark.parametrize("batch_size", [1, 4])
def test_the_batch_size_changes_nothing(batch_size):
    chex.assert_trees_all_equal(run()[:2], run(batch_size=batch_size)[:2])


def test_nothing_is_attacked_if_nothing_is_classified_correctly():
    x, y = problem()
    result = evaluate.attack_and_score(net, 1.0, x[3:5], y[3:5], ATTACKS, eps=1.0)
    assert not any(stage.tried.any() for stage in result.stages.values())
    np.testing.assert_array_equal(result.r, 0)


def test_arguments_that_an_attack_refuses_are_reported_before_any_attack_runs():
    x, y = problem()
    ran = []

    def first(apply_fn, params, x, y, /, *, eps, key=None, bounds=None):
        jax.debug.callback(lambda: ran.append(1))
        return x * jnp.inf  # so no example is left for the next attack

    attacks = {"first": first, "square": functools.partial(attack.square, steps=0)}
    with pytest.raises(ValueError, match="expected steps >= 1, got 0"):
        evaluate.attack_and_score(net, 1.0, x, y, attacks, eps=1.0, key=KEY)
    with pytest.raises(ValueError, match="expected a key"):
        evaluate.attack_and_score(net, 1.0, x, y, {**attacks, "square": attack.apgd}, eps=1.0)
    jax.effects_barrier()
    assert not ran


def test_zero_examples_give_empty_results():
    def of_pixels(w, x):
        return x.reshape(x.shape[0], 16) @ w

    x, y = np.zeros((0, 4, 4, 1), np.float32), np.zeros(0, int)
    result = evaluate.attack_and_score(
        of_pixels, np.ones((16, 3), np.float32), x, y, eps=1.0, norm="linf", key=KEY
    )
    assert result.r.shape == x.shape
    assert result.outcome.robust.shape == (0,)
    assert list(result.stages) == list(evaluate.autoattack("linf"))


def test_an_attack_is_compiled_for_few_batch_sizes():
    traced = []

    def counting(apply_fn, params, x, y, /, *, eps, key=None, bounds=None):
        traced.append(x.shape)
        return jnp.zeros_like(x)

    x, y = np.tile([[5.0, 0.0, 0.0]], (45, 1)).astype(np.float32), np.zeros(45, int)
    for n in (45, 44, 41, 17, 3):
        evaluate.attack_and_score(net, 1.0, x[:n], y[:n], {"a": counting}, eps=1.0, batch_size=16)
    assert set(traced) <= {(16, D), (2, D), (3, D), (1, D)}
    assert len(traced) == len(set(traced))


def test_sizes_and_keys_stay_with_their_examples_and_each_attack_has_its_own_keys():
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
    evaluate.attack_and_score(
        net, 1.0, x, np.zeros(5, int), attacks, eps=eps, key=KEY, batch_size=2
    )
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


def test_an_empty_dict_of_attacks_and_a_missing_key_raise():
    x, y = problem()
    with pytest.raises(ValueError, match=r"at least one attack, got none; pass None for AutoAtt"):
        evaluate.attack_and_score(net, 1.0, x, y, {}, eps=1.0)
    with pytest.raises(ValueError, match="expected a key"):
        evaluate.attack_and_score(net, 1.0, x, y, eps=1.0, norm="l1")


# AutoAttack


def test_autoattack_has_the_published_attacks_and_budgets():
    for norm in ("l2", "linf"):
        attacks = evaluate.autoattack(norm)
        assert list(attacks) == ["apgd-ce", "apgd-t", "fab-t", "square"]
        assert all(method.keywords["norm"] == norm for method in attacks.values())
        assert attacks["apgd-t"].keywords["n_targets"] == 9
        assert attacks["fab-t"].keywords["n_targets"] == 9
        assert evaluate.autoattack(norm) is evaluate.autoattack(norm=norm) is attacks
        with pytest.raises(TypeError, match="does not support item assignment"):
            attacks["apgd-ce"] = attack.pgd
    assert evaluate.autoattack() is evaluate.autoattack("l2")
    sparse = evaluate.autoattack("l1")
    assert list(sparse) == ["apgd-ce", "apgd-t", "fab-t", "square"]
    assert sparse["apgd-ce"].keywords["restarts"] == 5
    assert sparse["apgd-t"].keywords["n_targets"] == 5
    assert sparse["fab-t"].keywords["n_targets"] == 9  # the authors' code lowers only APGD's
    random = evaluate.autoattack("linf", samples=20)
    assert list(random) == ["apgd-ce", "apgd-dlr"]
    assert all(method.keywords["samples"] == 20 for method in random.values())
    with pytest.raises(ValueError, match="expected norm to be one of"):
        evaluate.autoattack("l3")
    with pytest.raises(ValueError, match="samples >= 0, got -1"):
        evaluate.autoattack(samples=-1)


def linear(w, x):
    return x.reshape(len(x), -1) @ w


def separated(norm, n=8):
    """Images, a linear net, its labels, and each image's distance to the boundary."""
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
def test_on_a_linear_net_the_ensemble_succeeds_exactly_where_the_boundary_is_in_reach(norm):
    w, x, y, distances = separated(norm)
    # Square adds nothing on images this small.
    eps = (distances * np.where(np.arange(len(y)) % 2, 1.02, 0.98)).astype(np.float32)
    attacks = dict(evaluate.autoattack(norm))
    attacks.pop("square", None)
    r = evaluate.attack_and_score(linear, w, x, y, attacks, eps=eps, key=KEY).r
    assert (np.abs(r).reshape(len(y), -1).max(axis=1) > 0).tolist() == [False, True] * (len(y) // 2)
    size = np.linalg.norm(r.reshape(len(y), -1), {"l1": 1, "l2": 2, "linf": np.inf}[norm], axis=1)
    assert (size <= eps * (1 + 1e-6)).all()


def test_the_default_is_autoattack_in_l2():
    w, x, y, distances = separated("l2", n=3)
    of = {"eps": float(distances.max() * 1.1), "key": KEY, "bounds": (-5.0, 5.0)}
    result = evaluate.attack_and_score(linear, w, x, y, **of)
    assert list(result.stages) == list(evaluate.autoattack("l2"))
    named = evaluate.attack_and_score(linear, w, x, y, evaluate.autoattack("l2"), **of)
    chex.assert_trees_all_equal(result[:2], named[:2])
    assert not result.outcome.robust.any()


def test_the_default_autoattack_is_in_the_given_norm():
    w, x, y, _ = separated("l1", n=3)
    of = {"eps": 3.0, "norm": "l1", "key": KEY}
    result = evaluate.attack_and_score(linear, w, x, y, **of)
    named = evaluate.attack_and_score(linear, w, x, y, evaluate.autoattack("l1"), **of)
    chex.assert_trees_all_equal(result[:2], named[:2])
    assert result.r.any()


@pytest.mark.parametrize(
    "norm", ["l2", *(pytest.param(norm, marks=pytest.mark.slow) for norm in ("l1", "linf"))]
)
def test_on_a_linear_net_the_fast_ensemble_succeeds_on_the_same_examples(norm):
    w, x, y, distances = separated(norm)
    eps = (distances * np.where(np.arange(len(y)) % 2, 1.02, 0.98)).astype(np.float32)
    attacks = evaluate.fast_autoattack(norm)
    assert attacks is evaluate.fast_autoattack(norm=norm)
    stages = evaluate.attack_and_score(linear, w, x, y, attacks, eps=eps, key=KEY).stages
    fooled = np.any([stage.fooled for stage in stages.values()], axis=0)
    assert fooled.tolist() == [False, True] * (len(y) // 2)
    assert all(stage.passes is not None for stage in stages.values())


def test_near_the_boundary_means_that_little_of_the_lead_is_left():
    x = np.array([[1.0, 0], [2, 0], [4, 0]], np.float32)

    def watching(apply_fn, params, x, y, /, *, eps, key=None, bounds=None):
        return jnp.zeros_like(x)

    def some(apply_fn, params, x, y, /, *, eps, key=None, bounds=None):
        return jnp.zeros_like(x).at[:, 1].set(jnp.minimum(1.5, x[:, 0] - 0.01))

    attacks = {
        "at x": evaluate.NearBoundary(watching, 1.0),
        "some": some,  # leaves .01 of 1, .5 of 2, 2.5 of 4
        "nearest": evaluate.NearBoundary(watching, 0.2),
        "near": evaluate.NearBoundary(watching, 0.3),
        "all": watching,
    }
    stages = evaluate.attack_and_score(
        lambda _, x: x, None, x, np.zeros(3, int), attacks, eps=9.0
    ).stages
    tried = {name: stage.tried.tolist() for name, stage in stages.items()}
    assert tried == {
        "at x": [True] * 3,
        "some": [True] * 3,
        "nearest": [True, False, False],
        "near": [True, True, False],
        "all": [True] * 3,
    }


def test_as_long_as_an_attack_gains_it_is_run_farther_from_the_boundary():
    shares = np.array([0.1, 0.15, 0.3, 0.7], np.float32)  # of the lead, left after the first attack
    x = np.stack([np.ones(4, np.float32), np.zeros(4, np.float32), shares], axis=1)

    def nearer(apply_fn, params, x, y, /, *, eps, key=None, bounds=None):
        return jnp.zeros_like(x).at[:, 1].set(1 - x[:, 2])

    def first(apply_fn, params, x, y, /, *, eps, key=None, bounds=None):
        return jnp.zeros_like(x).at[:, 1].set(jnp.where(x[:, 2] < 0.12, 2, 0))

    def stage(method):
        def net(_, x):
            return 2 + x[:, :2]  # not 1 and 0, which would look like probabilities

        attacks = {"nearer": nearer, "near": evaluate.NearBoundary(method, 0.12)}
        y = np.zeros(4, int)
        run = evaluate.attack_and_score(net, None, x, y, attacks, eps=9.0)
        return run.stages["near"]

    assert stage(first).tried.tolist() == [True, True, False, False]  # .15 gains nothing
    everywhere = stage(functools.partial(attack.pgd, steps=3))
    assert everywhere.fooled.all()
    assert everywhere.passes.backward.tolist() == [3] * 4
    assert everywhere.executed.backward == 12


def test_a_tie_is_near_the_boundary():
    x = np.array([[1.0, 1.0], [1.0, 0.0]], np.float32)  # of tied classes, argmax takes the lower, y

    def nothing(apply_fn, params, x, y, /, *, eps, key=None, bounds=None):
        return jnp.zeros_like(x)

    near = functools.partial(evaluate.NearBoundary(nothing, 0.1))
    attacks = {"first": nothing, "near": near}
    y = np.zeros(2, int)
    stages = evaluate.attack_and_score(lambda _, x: x, None, x, y, attacks, eps=1.0).stages
    assert stages["near"].tried.tolist() == [True, False]


def test_near_boundary_has_its_attacks_signature_and_the_class_its_own():
    near = evaluate.NearBoundary(attack.pgd, 0.1)
    assert inspect.signature(near) == inspect.signature(attack.pgd)
    assert list(inspect.signature(evaluate.NearBoundary).parameters) == ["method", "within"]


def test_called_directly_near_boundary_is_its_attack():
    near = evaluate.NearBoundary(functools.partial(attack.pgd, norm="linf", steps=3), 0.1)
    w, x, y = mostly_right(7)
    np.testing.assert_array_equal(
        near(linear, w, x, y, eps=1.0), near.method(linear, w, x, y, eps=1.0)
    )
    assert attack.with_info(near)(linear, w, x, y, eps=1.0)[1].backward.tolist() == [3] * 7
    assert evaluate.attack_and_score(linear, w, x, y, near, eps=1.0).outcome.norm.max() <= 1.001
    with pytest.raises(TypeError, match="others don't count"):
        attack.with_info(evaluate.NearBoundary(push(1, 1.0), 0.1))
    for within in (0, 1.1, float("nan")):
        with pytest.raises(ValueError, match="0 < within <= 1, got"):
            evaluate.NearBoundary(attack.pgd, within)
    with pytest.raises(TypeError, match="the attack to be a function, got str"):
        evaluate.NearBoundary("pgd", 0.1)


# The score


def test_the_outcome_is_that_of_the_returned_perturbations():
    x, y = problem()
    result = evaluate.attack_and_score(net, 1.0, x, y, ATTACKS, eps=3.0, norm="l1", batch_size=4)
    want = evaluate.measure(net, 1.0, x, y, run().r, norm="l1")
    for got, expected in zip(result.outcome, want, strict=True):
        np.testing.assert_array_equal(got, expected)
    assert evaluate.accuracy(result.outcome.robust) == 5 / N
    np.testing.assert_array_equal(result.r, run().r)


@pytest.mark.parametrize("attacks", [[attack.pgd], (attack.pgd, perturb.loss), "pgd"])
def test_several_attacks_without_names_are_refused(attacks):
    x, y = problem()
    with pytest.raises(TypeError, match=r"attacks by name, got \w+; pass an attack, or several"):
        evaluate.attack_and_score(net, 1.0, x, y, attacks, eps=2.0)


def test_the_error_about_an_attack_that_is_no_function_names_it():
    x, y = problem()
    attacks = {"loss": perturb.loss, "pgd": "pgd"}
    with pytest.raises(TypeError, match=r"expected attack 'pgd' to be a function, got str"):
        evaluate.attack_and_score(net, 1.0, x, y, attacks, eps=2.0)


# One attack


def test_one_attack_runs_on_every_example_and_all_its_perturbations_are_kept():
    x, y = problem()
    result = evaluate.attack_and_score(net, 1.0, x, y, push(1, 1.0), eps=1.0, batch_size=4)
    np.testing.assert_array_equal(result.r, np.tile([0.0, 1.0, 0.0], (N, 1)))
    assert result.stages == {}
    assert np.flatnonzero(result.outcome.robust).tolist() == [2, 5, 6, 7, 8, 9, 10]
    assert np.flatnonzero(result.outcome.nonfinite).tolist() == [4]
    one = evaluate.attack_and_score(net, 1.0, x, y, push(1, 0.0), eps=1.0)
    assert one.outcome.zero.all()


@pytest.mark.parametrize(
    ("method", "key"),
    [
        (perturb.vat, jax.random.PRNGKey(3)),
        (functools.partial(attack.pgd, steps=3, random_start=True), jax.random.key(3)),
    ],
    ids=["vat", "pgd"],
)
def test_the_batch_size_changes_no_random_perturbation(method, key):
    w, x, y = mostly_right(11)
    of = {"eps": np.linspace(0.1, 1.5, 11).astype(np.float32), "key": key}
    whole, r, again = (
        evaluate.attack_and_score(linear, w, x, y, method, **of, batch_size=batch_size).r
        for batch_size in (11, 4, 4)
    )
    np.testing.assert_allclose(r, whole, atol=1e-5)
    np.testing.assert_array_equal(again, r)  # same key, same bits


@pytest.mark.parametrize(("method", "several"), [(attack.fmn, True), (perturb.alpha, False)])
def test_without_a_size_an_attack_searches_for_the_smallest_perturbation(method, several):
    w, x, y = mostly_right(7)
    attacks = {"it": method} if several else method
    result = evaluate.attack_and_score(linear, w, x, y, attacks, eps=None, batch_size=3)
    want = jax.jit(functools.partial(method, linear))(w, x, y)
    assert np.linalg.norm(want, axis=1).max() > 0.5
    fooled = result.outcome.clean & ~result.outcome.robust if several else np.ones(7, bool)
    assert fooled.any()
    np.testing.assert_allclose(result.r, np.where(fooled[:, None], want, 0), atol=1e-5)


def test_an_attack_that_needs_a_size_says_so():
    for attacks in (perturb.loss, {"loss": perturb.loss}):
        with pytest.raises(TypeError, match="expected eps to be a number or an array, got None"):
            evaluate.attack_and_score(linear, *mostly_right(7), attacks, eps=None)


@pytest.mark.parametrize("lo", [-0.5, np.linspace(-0.5, -0.1, 5).astype(np.float32)])
def test_bounds_are_passed_on(lo):
    w, x, y = mostly_right(7)
    x = np.clip(x, lo, 0.5)
    result = evaluate.attack_and_score(
        linear, w, x, y, perturb.loss, eps=2.0, bounds=(lo, 0.5), batch_size=3
    )
    outcome, r = result.outcome, result.r
    assert np.all(x + r >= lo)
    assert np.all(x + r <= 0.5)
    np.testing.assert_allclose(outcome.norm, np.linalg.norm(r, axis=1), rtol=1e-6)
    assert np.all(outcome.norm < 2)  # the box was binding


# Transfer


def turned(params, x):
    """`net` with classes 1 and 2 swapped."""
    return params * x[:, jnp.array([0, 2, 1])]


def toward_1(apply_fn, params, x, y, /, *, eps, key=None, bounds=None):
    return eps[:, None] * jax.grad(lambda x: jnp.sum(apply_fn(params, x)[:, 1]) / params)(x)


def test_perturbations_made_on_another_net_are_scored_on_this_one():
    x = np.array([[3.0, 0.0, 0.0], [1.0, 0.0, 0.0]], np.float32)
    y = np.zeros(2, int)
    own = evaluate.attack_and_score(net, 1.0, x, y, toward_1, eps=2.0)
    of = {"eps": 2.0, "source": (turned, 2.0)}
    other = evaluate.attack_and_score(net, 1.0, x, y, toward_1, **of)
    assert own.outcome.robust.tolist() == other.outcome.robust.tolist() == [True, False]
    np.testing.assert_array_equal(other.r, [[0, 0, 2], [0, 0, 2]])
    np.testing.assert_array_equal(own.r, [[0, 2, 0], [0, 2, 0]])
    blind = evaluate.attack_and_score(lambda p, x: x[:, :2] * p, 1.0, x, y, toward_1, **of)
    assert blind.outcome.robust.all()  # this net doesn't see class 2


def test_several_attacks_on_another_net_run_on_what_this_one_still_gets_right():
    x = np.array([[3.0, 0.0, 0.0], [1.0, 0.0, 0.0]], np.float32)
    attacks = {"first": toward_1, "again": toward_1}
    result = evaluate.attack_and_score(
        net, 1.0, x, np.zeros(2, int), attacks, eps=2.0, source=(turned, 2.0)
    )
    np.testing.assert_array_equal(result.r, [[0, 0, 0], [0, 0, 2]])
    assert result.stages["again"].tried.tolist() == result.outcome.robust.tolist() == [True, False]


# Compilation


@pytest.mark.parametrize("name", ["loss", "pgd"])
def test_an_attack_is_traced_once_for_sizes_of_every_type(name):
    w, x, y = mostly_right(11)
    method = {"loss": perturb.loss, "pgd": functools.partial(attack.pgd, steps=3)}[name]
    traces = []

    def counted(*args, **kwargs):
        traces.append(None)
        return method(*args, **kwargs)

    for eps in (0.1, 2, np.float32(1), jnp.float32(2), np.full(11, 0.5)):
        evaluate.attack_and_score(linear, w, x, y, counted, eps=eps, batch_size=4)
    assert len(traces) == 1


# Users' attacks


@pytest.mark.parametrize("norm", ["l1", "l2", "linf"])
def test_a_gradient_that_is_not_finite_is_counted(norm):
    def norm_at_zero(w, x):  # its logits are finite at 0, but their gradient is NaN
        size = jnp.sqrt(jnp.sum(x**2, axis=1))[:, None]
        return linear(w, x) + jnp.where(jnp.arange(3) == 0, size, 0)

    w, x, _ = mostly_right(4)
    x[1] = 0
    y = np.argmax(norm_at_zero(w, x), axis=1)
    method = functools.partial(perturb.loss, norm=norm)
    outcome = evaluate.attack_and_score(norm_at_zero, w, x, y, method, eps=0.5).outcome
    np.testing.assert_array_equal(outcome.zero, [False, True, False, False])
    assert not outcome.nonfinite.any()


@pytest.mark.parametrize("name", ["the attack", "attack 'mine'"])
def test_an_attack_with_a_wrong_signature_is_reported_before_any_attack_runs(name):
    def mine(apply_fn, params, x, y, eps):
        return 0 * x

    attacks = mine if name == "the attack" else {"mine": mine}
    with pytest.raises(TypeError, match=rf"expected {name} to take .*eps, key, bounds\), got"):
        evaluate.attack_and_score(linear, *mostly_right(4), attacks, eps=0.5)


def test_an_attack_that_returns_another_shape_is_an_error():
    w, x, y = mostly_right(4)

    def short(apply_fn, params, x, y, *, eps, key=None, bounds=None):
        return x[:1]

    lwa = objectives.adversarial(linear, short, eps=0.5)
    for call in (
        lambda: evaluate.attack_and_score(linear, w, x, y, short, eps=0.5),
        lambda: evaluate.attack_and_score(linear, w, x, y, {"it": short}, eps=0.5),
        lambda: lwa(w, None, (x, y), key=KEY, step=0),
    ):
        with pytest.raises(ValueError, match=r"expected r of x's shape \(4, 5\), got \(1, 5\)"):
            call()
