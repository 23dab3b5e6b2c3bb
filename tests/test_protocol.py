"""What the experiments share past the paper: multi-step adversaries, TRADES, averaged weights."""

import io

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rich.console import Console

from experiments import protocol, training
from experiments.models import function, init, mlp
from experiments.protocol import MultiStep
from jaxadv import attack, objectives, train

KEY = jax.random.key(0)
NET = mlp((6, 5))


def problem():
    x = jax.random.uniform(jax.random.key(1), (12, 4, 4, 1))
    return init(NET, KEY, x), x, jnp.arange(12) % 10


def value(objective):
    params, x, y = problem()
    loss, (_, aux) = objective(params, None, (x, y), key=KEY, step=jnp.int32(3))
    return loss, aux


METHODS = {
    "multi": (
        MultiStep((6, 5), 1, 0.1, eps=0.7, steps=4),
        lambda **kwargs: objectives.adversarial(
            function(NET), lambda *args, **kw: attack.pgd(*args, steps=4, random_start=True, **kw),
            **kwargs,
        ),
    ),
    "mixed": (
        MultiStep((6, 5), 1, 0.1, eps=0.7, steps=2, random_start=False, objective="mixed"),
        lambda **kwargs: objectives.mixed(
            function(NET), lambda *args, **kw: attack.pgd(*args, steps=2, **kw), **kwargs
        ),
    ),
    "trades": (
        MultiStep((6, 5), 1, 0.1, eps=0.7, steps=3, objective="virtual", weight=6.0),
        lambda **kwargs: objectives.virtual(
            function(NET), lambda *args, **kw: attack.virtual(*args, steps=3, **kw), weight=6.0,
            **kwargs,
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", METHODS)
def test_a_multi_step_method_is_its_objective_in_the_box(name):
    method, make = METHODS[name]
    box = (-0.1, 0.9)
    got, aux = value(protocol.make_objective(NET, method, 10, box))
    want, want_aux = value(make(eps=0.7, bounds=box))
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(aux.accuracy, want_aux.accuracy)
    free, _ = value(make(eps=0.7))
    assert free != got  # the box is in the way


def test_its_size_rises_over_the_first_epochs():
    method = MultiStep((6, 5), 4, 0.1, eps=0.8, warmup=2, steps=1)
    _, aux = value(protocol.make_objective(NET, method, 3))  # step 3 of 6
    np.testing.assert_allclose(aux.eps, 0.4, rtol=1e-6)


def test_the_average_is_of_all_at_first_and_moves_with_the_share_of_the_past():
    decay, tx = 0.75, optax.chain(optax.sgd(0.1), protocol.averaging(0.75))
    params = {"w": jnp.array([1.0, -2.0])}
    state = tx.init(params)
    seen, want = [], None
    for step in range(1, 9):
        grads = {"w": params["w"] * step}
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        seen.append(np.asarray(params["w"], np.float64))
        if step <= 4:  # 1 / step is at least 1 - decay
            want = np.mean(seen, axis=0)
        else:
            want = decay * want + (1 - decay) * seen[-1]
        average = optax.tree_utils.tree_get(state, "average")["w"]
        np.testing.assert_allclose(average, want, rtol=1e-6)


def test_the_average_is_the_result_where_there_is_one():
    params, x, y = problem()
    for average in (0.0, 0.9):
        method = MultiStep((6, 5), 2, 0.1, eps=0.7, steps=1, average=average)
        tx = protocol.optimiser(method, protocol.Settings(), 5)
        state = train.init(params, tx, key=KEY)
        step = train.make_step(protocol.make_objective(NET, method, 5), tx)
        for _ in range(3):
            state, _ = step(state, (x, y))
        result, last = (
            jax.tree.leaves(tree) for tree in (protocol.result(method, state), state.params)
        )
        same = [np.array_equal(one, other) for one, other in zip(result, last, strict=True)]
        assert all(same) == (average == 0)
        assert not average or not any(same)


def test_images_are_moved_each_by_itself_and_no_further_than_told():
    x = jnp.zeros((500, 5, 6, 2)).at[:, 2, 3, 1].set(jnp.arange(1, 501))
    moved = np.asarray(protocol.shifted(1)(KEY, x))
    example, row, column, channel = np.nonzero(moved)
    np.testing.assert_array_equal(example, np.arange(500))
    np.testing.assert_array_equal(moved[moved > 0], np.arange(1, 501))
    assert set(channel) == {1}
    # All nine places, each about as often: 500 / 9 = 56, standard deviation 7.
    _, counts = np.unique((row - 2) * 3 + column - 3, return_counts=True)
    assert len(counts) == 9
    assert 56 - 5 * 7 < min(counts) <= max(counts) < 56 + 5 * 7
    assert (abs(row - 2) <= 1).all()
    assert (abs(column - 3) <= 1).all()


def test_what_leaves_the_image_is_lost():
    x = jnp.ones((300, 3, 3, 1))
    left = np.asarray(protocol.shifted(2)(KEY, x)).sum(axis=(1, 2, 3))
    assert set(left) == {9.0, 6.0, 3.0, 4.0, 2.0, 1.0}  # (3 or 2 or 1) rows times columns


def test_training_moves_the_images_of_a_method_that_says_so(tmp_path):
    x, y = jax.random.uniform(jax.random.key(2), (40, 6, 6, 1)), jnp.arange(40) % 10
    images = protocol.Images(x, y)
    trained = []
    for shift in (0, 1):
        method = MultiStep((6, 5), 1, 0.1, eps=0.7, steps=1, shift=shift)
        task = protocol.Task(
            "test", {"lwa_noisy": method}, method, {}, lambda _: NET, lambda _: "6x5", images,
            images, "squares",
        )  # fmt: skip
        settings = protocol.Settings(out=tmp_path / str(shift), batch_size=10, eval_batch=20)
        with training.bars(Console(file=io.StringIO())) as progress:
            net = protocol.train("lwa_noisy", method, 0, settings, task, progress)
        trained.append(jax.tree.leaves(net.params)[-1])
    assert not np.array_equal(*trained)


def test_nets_in_another_precision_are_called_so():
    task = protocol.Task(
        experiment="", methods={}, normal=protocol.Method((4,), 1, 0.1), names={}, source="",
        make_net=lambda method: mlp(method.widths), network=lambda method: "4",
        train=protocol.Images(None, None), test=protocol.Images(None, None),
    )  # fmt: skip
    low = protocol.in_precision(task, "bfloat16")
    assert low.network(task.normal) == "4, bfloat16"
    assert low.make_net(task.normal).dtype == jnp.bfloat16
    assert protocol.in_precision(task, "float32") is task
