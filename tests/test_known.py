"""`experiments/known.py`: nets and figures of others."""

import io
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from experiments import known
from experiments.compare import pytorch
from experiments.lib import models, records

NET = models.Classifier((6,), blocks=((3,), (5,)), size=3, padding=1)


def drawn(seed=0):
    return models.init(NET, jax.random.key(seed), jnp.zeros((1, 28, 28, 1)))


def in_pytorch(params):
    """The arrays of a `state_dict`: outputs first, and images channels first when flattened."""
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


def test_a_net_of_pytorch_becomes_one_of_ours():
    params = drawn()
    got = pytorch.params_of(in_pytorch(params))
    assert models.recognised(got, (28, 28, 1)) == NET
    jax.tree.map(np.testing.assert_array_equal, got, jax.tree.map(np.asarray, params))
    odd = in_pytorch(params)
    odd["linear1.weight"] = odd["linear1.weight"][:, :-5]
    with pytest.raises(
        ValueError, match="a dense layer after 5 square channels, got linear1 of 240"
    ):
        pytorch.params_of(odd)


@pytest.mark.slow
def test_both_nets_are_attacked_and_checked(tmp_path, monkeypatch):
    nets = {"clntrained": drawn(0), "advtrained": drawn(1)}
    monkeypatch.setattr(known, "load", lambda path: nets[path.stem.removeprefix("mnist_lenet5_")])
    settings = known.Settings(Path("there"), n=12, steps=20, n_check=8, out=tmp_path)
    rows = known.run(settings, Console(file=io.StringIO()))
    assert records.read(tmp_path / "results.json") == rows
    assert all(row["figures"]["fmn, median size"] < 1 for row in rows)
    assert [(row["net"], row["n"]) for row in rows] == [("clntrained", 12), ("advtrained", 12)]
    for row in rows:
        assert row["network"] == "conv3-conv5-6"
        *medians, least = row["median l2"].values()
        assert 0 < least <= min(medians) < 28
    text = (tmp_path / "results.md").read_text()
    assert f"| advtrained | 0.9864 | {rows[1]['clean']:.4f} | 1.872 | 3.04 |" in text
    assert text.count("\n- ") == 2


def test_weights_that_are_not_there_are_an_error(tmp_path):
    pytest.importorskip("torch")
    with pytest.raises(ValueError, match=r"advertorch's weights, got no .*--help say where"):
        known.load(tmp_path / "gone.pt")
