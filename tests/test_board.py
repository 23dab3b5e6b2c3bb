"""`experiments/board.py`: the nets of a record, ranked under AutoAttack."""

import dataclasses
import io
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
import tyro
from rich.console import Console

from experiments import board
from experiments.lib import attack_tables, data, models, problems, records, weights


@pytest.fixture
def settings(tmp_path):
    """A record of one small, untrained net."""
    net = models.mlp((7, 5))
    params = models.init(net, jax.random.key(0), jax.numpy.zeros((1, 28, 28, 1)))
    weights.save(tmp_path / "mnist_mlp" / "lwa" / "params.safetensors", params)
    return board.Settings(
        "mnist_mlp", threats=("l2 1.5", "linf 0.3"), attacks=("one-step",), n=20, folder=tmp_path,
        out=tmp_path / "board",
    )  # fmt: skip


def test_it_attacks_each_net_of_the_record_under_each_threat(settings):
    rows = board.run(settings, Console(file=io.StringIO()))
    assert [(r.method, r.norm, r.eps, r.n, r.box) for r in rows] == [
        ("mnist_mlp/lwa", "l2", 1.5, 20, True), ("mnist_mlp/lwa", "linf", 0.3, 20, True),
    ]  # fmt: skip
    assert records.load(settings.out / "results.json", records.AttackRow) == rows


def test_a_net_that_records_its_scaling_is_attacked_in_it(settings):
    params = weights.load(settings.folder / "mnist_mlp" / "lwa" / "params.safetensors")
    path = settings.folder / "mnist_mlp" / "robust_l2" / "params.safetensors"
    weights.save(path, params, interface=data.MNIST._replace(divide=255))
    chosen = dataclasses.replace(settings, methods=("robust_l2", "lwa"), threats=("l2 1.5",))
    rows = board.run(chosen, Console(file=io.StringIO()))
    assert [(row.subtract, row.divide) for row in rows] == [(0, 255), (0, 256)]


def test_the_attacks_of_the_board_are_those_of_its_table():
    assert (*attack_tables.COLUMNS, "check") == board.SHOWN
    with pytest.raises(SystemExit):
        tyro.cli(board.Settings, args=["mnist_mlp", "--attacks", "apgd-t"])


def test_a_record_without_nets_is_an_error(settings):
    with pytest.raises(ValueError, match="got none; train some first"):
        board.run(dataclasses.replace(settings, record="cifar10"), Console(file=io.StringIO()))


# Whose weights are only in the history, as experiments/results/README.md says.
IN_HISTORY = {"dropout", "goodfellow", "lwa_rep", "mnist_mlp/lwa_noisy"}


@pytest.mark.parametrize("folder", ["board", "autoattack", "autoattack/reference"])
def test_recorded_figures_are_of_the_recorded_weights(folder):
    rows = [
        row
        for row in records.load(board.RESULTS / folder / "results.json", records.AttackRow)
        if not {row.method, Path(row.method).name} & IN_HISTORY
    ]
    found = {
        method: problems.digest(
            weights.load(board.RESULTS / method / "params.safetensors", jnp.float32)
        )
        for method in {row.method for row in rows}
    }
    assert found
    assert {(row.method, row.weights) for row in rows} == set(found.items())
