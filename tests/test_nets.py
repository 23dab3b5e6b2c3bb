"""`jaxadv.nets`: nets with one logit, and means of random nets."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxadv import attack, evaluate, nets

KEY = jax.random.key(4)


def binary(w, x):
    return x @ w


def noisy(params, x, key):
    return x + params * jax.random.normal(key, x.shape)


@pytest.mark.parametrize("of_columns", [False, True])
def test_two_logits_give_class_1_the_probability_sigmoid(of_columns):
    w = np.array([3.0, -4.0], np.float32)
    x = np.array([[1, 1], [2, 0.5], [0, 0]], np.float32)
    net = nets.two_logits(lambda w, x: binary(w, x)[:, None] if of_columns else binary(w, x))
    want = 1 / (1 + np.exp(-x.astype(np.float64) @ w))
    np.testing.assert_allclose(jax.nn.softmax(net(w, x))[:, 1], want, rtol=1e-6)


def test_attacks_on_a_net_of_one_logit_find_the_distance():
    w, x = np.array([3.0, -4.0], np.float32), np.array([[1, 0], [0, 1]], np.float32)
    found = evaluate.distances(
        nets.two_logits(binary), w, x, np.array([1, 0]), attacks={"fmn": attack.fmn}
    )
    np.testing.assert_allclose(found.size, [3 / 5, 4 / 5], rtol=0.01)


def test_wrapping_the_same_net_twice_gives_equal_functions():
    assert nets.two_logits(binary) == nets.two_logits(binary)
    assert hash(nets.two_logits(binary)) == hash(nets.two_logits(binary))


def test_more_than_one_logit_is_refused():
    with pytest.raises(ValueError, match=r"one logit for each of 3 examples, got shape \(3, 2\)"):
        nets.two_logits(lambda params, x: x)(None, np.zeros((3, 2), np.float32))


@pytest.mark.parametrize(
    "net",
    [nets.two_logits(lambda w, x: (x, w)), nets.mean_of_draws(lambda w, x, key: (x, w), KEY)],
    ids=["two_logits", "mean_of_draws"],
)
def test_logits_with_features_are_refused(net):
    with pytest.raises(TypeError, match=r"logits, .*got tuple|logits, got tuple; return only"):
        net(None, np.zeros((3, 2), np.float32))


def test_the_mean_is_taken_of_the_probabilities():
    x = np.array([[1, 0, -jnp.inf], [0, 2, 5]], np.float32)
    net = nets.mean_of_draws(noisy, KEY, draws=7)
    total = 0
    for one in jax.random.split(KEY, 7):
        z = x.astype(np.float64) + 2 * np.asarray(jax.random.normal(one, (1, 3)), np.float64)
        e = np.exp(z)
        total = total + e / e.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(np.exp(net(2.0, x)), total / 7, rtol=1e-5)
    np.testing.assert_allclose(np.exp(net(2.0, x[1:])), total[1:] / 7, rtol=1e-5)


def test_a_random_net_is_attacked_with_averaged_gradients_and_measured_by_its_mean():
    x = np.array([[1, 0, 0], [0, 9, 0]], np.float32)
    found = evaluate.attack_and_score(
        nets.mean_of_draws(noisy, KEY, draws=50), 0.1, x, np.array([0, 1]),
        evaluate.autoattack("linf", samples=3), eps=1.0, key=KEY, source=(noisy, 0.1),
    )  # fmt: skip
    assert list(found.stages) == ["apgd-ce", "apgd-dlr"]
    assert found.outcome.clean.tolist() == [True, True]
    assert found.outcome.robust.tolist() == [False, True]
    assert found.stages["apgd-ce"].passes.backward.tolist() == [3 * 101] * 2


@pytest.mark.parametrize(
    ("kwargs", "error", "match"),
    [
        ({"draws": 0}, ValueError, r"draws >= 1, got 0; 100 is"),
        ({"key": 3}, TypeError, r"key"),
        ({"key": jax.random.split(KEY, 2)}, ValueError, r"one key"),
    ],
)
def test_arguments_that_mean_of_draws_refuses(kwargs, error, match):
    with pytest.raises(error, match=match):
        nets.mean_of_draws(noisy, **{"key": KEY, **kwargs})


def test_a_mean_of_draws_has_the_gradient_of_the_classes_that_are_not_masked():
    def masked(params, x, key):
        return jnp.pad(noisy(params, x, key), ((0, 0), (0, 2)), constant_values=-jnp.inf)

    x = jnp.array([[1.0, -0.5, 0.2], [0.3, 0.1, -2.0]])

    def loss(net, x):
        return -jnp.sum(net(0.5, x)[:, 0])

    some, every = (nets.mean_of_draws(net, KEY, draws=5) for net in (masked, noisy))
    np.testing.assert_array_equal(some(0.5, x)[:, 3:], -np.inf)
    assert np.isnan(some(jnp.nan, x)).all()
    np.testing.assert_allclose(some(0.5, x)[:, :3], every(0.5, x), rtol=1e-6)
    np.testing.assert_allclose(
        jax.grad(loss, argnums=1)(some, x), jax.grad(loss, argnums=1)(every, x), rtol=1e-6
    )
