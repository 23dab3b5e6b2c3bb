"""The nets: two parts that make a whole, the paper's sizes, dropout only in training."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.models import MLP, function, train_function

X = jnp.asarray(np.random.default_rng(0).random((5, 4, 3, 1)), jnp.float32)


def made(**kwargs):
    net = MLP((7, 6), classes=3, **kwargs)
    return net, net.init(jax.random.key(0), X)


def test_the_two_parts_make_the_whole():
    net, params = made()
    h = function(net, "encode")(params, X)
    assert h.shape == (5, 7)
    logits = function(net, "classify")(params, h)
    np.testing.assert_array_equal(logits, function(net)(params, X))


@pytest.mark.parametrize(("split", "width"), [(1, 7), (2, 6)])
def test_split_says_where_the_representation_is(split, width):
    net, params = made(split=split)
    assert function(net, "encode")(params, X).shape == (5, width)


def test_it_is_the_net_of_section_7_2():
    net, params = made()
    p = jax.tree.map(np.asarray, params["params"])
    h = np.asarray(X).reshape(5, -1)
    for name in ("hidden_0", "hidden_1"):
        h = np.maximum(h @ p[name]["kernel"] + p[name]["bias"], 0)
    logits = h @ p["logits"]["kernel"] + p["logits"]["bias"]
    # Sums of at most 12 products of order 1, in another order.
    np.testing.assert_allclose(function(net)(params, X), logits, atol=1e-6)


def test_dropout_acts_in_training_alone_and_by_key():
    net, params = made(dropout=0.5)
    clean = function(net)(params, X)
    np.testing.assert_array_equal(clean, function(MLP((7, 6), classes=3))(params, X))
    train = train_function(net)
    one, state = train(params, None, X, jax.random.key(1))
    again, _ = train(params, None, X, jax.random.key(1))
    other, _ = train(params, None, X, jax.random.key(2))
    assert state is None
    np.testing.assert_array_equal(one, again)
    assert not np.array_equal(one, other)
    assert not np.array_equal(one, clean)
