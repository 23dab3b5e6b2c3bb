"""PyTorch nets converted to ours."""

import jax
import numpy as np
import pytest
from rows import CONV, drawn

from experiments.compare import pytorch
from experiments.lib import models, options


def in_pytorch(params):
    """The arrays of a `state_dict`: outputs first, and channels first in flattened images."""
    layers = jax.tree.map(np.asarray, params)["params"]
    state = {}
    for i, name in enumerate(("convs_0_0", "convs_1_0")):
        state[f"conv{i + 1}.weight"] = layers[name]["kernel"].transpose(3, 2, 0, 1)
        state[f"conv{i + 1}.bias"] = layers[name]["bias"]
    hidden = layers["hidden_0"]["kernel"].reshape(7, 7, 5, 6).transpose(2, 0, 1, 3).reshape(-1, 6)
    state["linear1.weight"], state["linear1.bias"] = hidden.T, layers["hidden_0"]["bias"]
    state["linear2.weight"] = layers["logits"]["kernel"].T
    state["linear2.bias"] = layers["logits"]["bias"]
    return state


def test_a_pytorch_net_is_converted_to_ours():
    params = drawn()
    got = pytorch.params_of(in_pytorch(params))
    assert models.recognised(got, (28, 28, 1)) == CONV
    jax.tree.map(np.testing.assert_array_equal, got, jax.tree.map(np.asarray, params))
    odd = in_pytorch(params)
    odd["linear1.weight"] = odd["linear1.weight"][:, :-5]
    with pytest.raises(
        ValueError, match="a dense layer after 5 square channels, got linear1 with 240"
    ):
        pytorch.params_of(odd)


def test_the_error_about_a_missing_library_names_it():
    pytorch.need("json")
    with pytest.raises(
        options.UnavailableError, match=r"expected json, nowhere, got no nowhere; .*help"
    ):
        pytorch.need("json", "nowhere")
