"""`evaluate.distances`: the smallest perturbation that several attacks find within a budget."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxadv import attack, evaluate
from jaxadv.problem import Problem

D = 6


def linear(w, x):
    return x @ w


def problem(n=30):
    """Return a linear net of three classes, labels (a few of them wrong), and l2 distances."""
    rng = np.random.default_rng(3)
    w, x = (rng.normal(size=shape).astype(np.float32) for shape in ((D, 3), (n, D)))
    z = x.astype(np.float64) @ w
    y = np.argmax(z, axis=1)
    gap = z[np.arange(n), y][:, None] - z
    across = np.linalg.norm(w.T[y].astype(np.float64)[:, None] - w.T[None], axis=2)
    distance = np.min(np.where(across > 0, gap / np.where(across > 0, across, 1), np.inf), axis=1)
    y[::10] = (y[::10] + 1) % 3
    distance[::10] = 0
    return w, x, y, distance


def found_by(r, passes=1):
    """Return an attack that moves every example by r and reports `passes` passes."""

    @attack.reports
    def method(apply_fn, params, x, y, /, *, eps=None, key=None, bounds=None):
        made = Problem.of(apply_fn, params, x, y, norm="l2", eps=eps, bounds=bounds, minimal=True)
        spent = jnp.full(len(x), passes)
        return attack.Found(made, jnp.broadcast_to(jnp.asarray(r, x.dtype), x.shape), spent, spent)

    return method


def test_sizes_are_distances_to_the_boundary_and_0_where_the_net_is_wrong():
    w, x, y, want = problem()
    attacks = {"ddn": attack.ddn, "fmn": attack.fmn}
    found = evaluate.distances(linear, w, x, y, attacks=attacks, batch_size=8)
    np.testing.assert_allclose(found.size, want, rtol=0.01)
    np.testing.assert_allclose(np.linalg.norm(found.r, axis=1), found.size, rtol=1e-6)
    np.testing.assert_array_equal(found.attack == "", want == 0)
    assert list(found.passes) == list(attacks)
    each = np.sort(want)
    np.testing.assert_allclose(found.accuracy(0.0), np.mean(want > 0))
    middle = (each[10] + each[11]) / 2
    np.testing.assert_allclose(found.accuracy([middle, 1e6]), [np.mean(want > middle), 0])
    np.testing.assert_allclose(found.median, np.median(want), rtol=0.01)


def test_the_smallest_perturbation_that_misleads_the_net_is_kept():
    x = np.array([[2.0, 0], [0, 3]], np.float32)
    attacks = {
        "far": found_by([-9.0, 4.0]), "short": found_by([-1.0, 0.5]), "near": found_by([-2.0, 1.0]),
    }  # fmt: skip
    found = evaluate.distances(lambda _, x: x, None, x, np.array([0, 1]), attacks=attacks)
    assert found.attack.tolist() == ["near", ""]
    np.testing.assert_allclose(found.size, [np.sqrt(5), np.inf])
    np.testing.assert_allclose(found.r, [[-2, 1], [0, 0]])
    assert found.median == np.inf
    assert found.accuracy(2.0) == 1
    assert found.accuracy(2.3) == 0.5


def test_perturbations_found_past_the_budget_do_not_count():
    x, y = np.array([[2.0, 0]], np.float32), np.array([0])
    attacks = {"far": found_by([-9.0, 4.0], 3), "near": found_by([-2.0, 1.0], 2)}
    run = functools.partial(evaluate.distances, lambda _, x: x, None, x, y, attacks=attacks)
    assert run(budget=9).attack.tolist() == ["far"]
    assert run(budget=10).attack.tolist() == ["near"]
    assert run(budget=None).attack.tolist() == ["near"]
    passes = run(budget=9).passes
    assert [int(passes["near"].forward[0]), int(passes["far"].backward[0])] == [2, 3]


def test_the_size_is_nan_for_a_nonfinite_example_and_0_for_an_invalid_label():
    x = np.array([[2.0, 0], [np.nan, 0], [2, 0]], np.float32)
    attacks = {"ddn": attack.ddn}
    found = evaluate.distances(lambda _, x: x, None, x, np.array([0, 0, 7]), attacks=attacks)
    assert np.isnan(found.size).tolist() == [False, True, False]
    np.testing.assert_allclose(found.size[[0, 2]], [np.sqrt(2), 0], rtol=0.01)
    assert found.accuracy(1.0) == pytest.approx(1 / 3)
    assert found.median == 0
    assert np.isfinite(found.r).all()


@pytest.mark.parametrize("norm", ["l1", "l2", "linf"])
def test_the_default_attacks_keep_to_the_budget(norm):
    w, x, y, _ = problem(4)
    found = evaluate.distances(
        linear, w, x, y, norm=norm, budget=1000, key=jax.random.key(0), bounds=(-9.0, 9.0)
    )
    spent = sum(forward + backward for forward, backward in found.passes.values())
    assert (spent <= 1000).all()
    assert (spent >= 300).all()
    assert np.isfinite(found.size).all()


def test_examples_may_lie_on_a_mesh():
    w, x, y, want = problem(16)
    mesh = jax.make_mesh((1,), ("data",))  # its axes are Explicit in newer JAX
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    attacks = {"fmn": attack.fmn}
    found = evaluate.distances(linear, w, jax.device_put(x, rows), y, attacks=attacks)
    np.testing.assert_allclose(found.size, want, rtol=0.01)


@pytest.mark.parametrize(
    ("wrong", "error", "match"),
    [
        ({"attacks": {}}, ValueError, "at least one attack, got none"),
        ({"attacks": attack.fmn}, TypeError, "attacks by name, got function; pass a dict"),
        ({"budget": None}, ValueError, "a budget or attacks, got neither"),
        ({"budget": 50}, ValueError, "budget >= "),
        ({"norm": "l3"}, ValueError, "norm to be one of"),
        ({"attacks": {"mine": lambda *a, **k: a[2]}}, TypeError, "others don't count their"),
        ({"attacks": {"ddn": attack.ddn}, "bounds": (0.0, 1.0)}, ValueError, "x within bounds"),
    ],
)
def test_bad_arguments_are_reported_with_a_remedy(wrong, error, match):
    w, x, y, _ = problem(4)
    with pytest.raises(error, match=match):
        evaluate.distances(linear, w, x, y, key=jax.random.key(0), **wrong)


def test_errors_of_all_attacks_are_raised_before_any_runs():
    w, x, y, _ = problem(4)
    attacks = {"ddn": attack.ddn, "mine": lambda *a, **k: a[2]}
    with pytest.raises(TypeError, match="others don't count their"):
        evaluate.distances(linear, w, x, y, attacks=attacks, progress=pytest.fail)


def test_the_default_attacks_are_the_same_objects_each_time():
    assert evaluate.minimal_attacks() is evaluate.minimal_attacks("l2", budget=2000)


def test_a_perturbation_that_leaves_the_box_is_an_error():
    x = np.array([[0.75, 0]], np.float32)
    with pytest.raises(ValueError, match=r"keep x \+ r within bounds"):
        evaluate.distances(
            lambda _, x: x, None, x, np.array([0]), attacks={"far": found_by([-2.0, 1.0])},
            bounds=(0.0, 1.0),
        )  # fmt: skip
