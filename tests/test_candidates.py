"""What is measured of fewer candidates, on a linear net where it can be computed by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from experiments import candidates


def test_a_number_is_read_from_left_to_right():
    images = np.arange(10, dtype=np.float32)[:, None, None, None] * np.ones((1, 28, 28, 1), "f4")
    x, y = candidates.numbers(np.random.default_rng(0), images, np.arange(10), 5)
    assert x.shape == (5, 28, 84, 1)
    digits = x[:, 0, [0, 28, 56], 0].astype(int)
    np.testing.assert_array_equal(digits @ [100, 10, 1], y)
    assert y.dtype == np.int32


def test_a_net_whose_second_class_is_nearest_has_another_one_with_one_candidate():
    # Logits 0, 0.5 - 0.1 a, 0.4 + b at 0: the likeliest other class needs a step ten times as long.
    w = jnp.array([[0.0, -0.1, 0.0], [0.0, 0.0, 1.0]])
    bias = jnp.array([1.0, 0.5, 0.4])
    net = candidates.Net(
        "linear", lambda w, x: x @ w + bias[None], w, jnp.zeros((10, 2)), jnp.zeros(10, int)
    )
    settings = candidates.Settings(eps=0.7)
    one, two, every = candidates.compare(net, (1, 2), settings)
    assert (one["another class"], two["another class"]) == (1.0, 0.0)
    assert one["times longer, mean"] > 2
    assert two["times longer, mean"] == pytest.approx(1, abs=1e-6)
    assert (one["accuracy at l2 0.7"], every["accuracy at l2 0.7"]) == (1.0, 0.0)
    assert every["candidates"] == 2
    assert "| linear | 1 | 10 | 1 | 1 |" in "\n".join(candidates.as_markdown([one, two, every]))
