"""`experiments/board.py`: nets of a record ranked under AutoAttack."""

import dataclasses
import io
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from rich.console import Console

from experiments import board, evaluate
from experiments.lib import models, records, weights


def row(method, attack, robust, eps=1.5, n=100, **extra):
    return {
        "experiment": "evaluate", "method": method, "attack": attack, "norm": "l2", "eps": eps,
        "n": n, "network": "7x5", "columns": {"clean": 0.99, "robust": robust},
        "interval": [robust - 0.01, robust + 0.01], **extra,
    }  # fmt: skip


ROWS = [
    row("mnist_mlp/normal", "one-step", 0.5),
    row("mnist_mlp/normal", "pgd-100x10", 0.2),
    row("mnist_mlp/normal", "standard", 0.1),
    row("mnist_mlp/lwa", "one-step", 0.9),
    row("mnist_mlp/lwa", "pgd-100x10", 0.8),
    row("mnist_mlp/lwa", "standard", 0.75),
    row("mnist_mlp/lwa", "standard", 0.3, eps=2.0),
    row("mnist_mlp/lwa", "check", 0.0, flags={"far": "far off", "budget": "more helps"}),
]


def test_figures_beside_a_table_are_those_of_that_net_and_size():
    assert board.figures_of(ROWS, "mnist_mlp/lwa", "l2", 1.5) == ["0.8000", "0.7500", "0.1500"]
    assert board.figures_of(ROWS, "mnist_mlp/lwa", "l2", 2.0) == ["", "0.3000", ""]
    assert board.figures_of(ROWS, "mnist_lenet/lwa", "l2", 1.5) == ["", "", ""]


def test_figures_are_those_on_the_most_images():
    few = [row("mnist_mlp/lwa", "one-step", 1.0, n=10), row("mnist_mlp/lwa", "standard", 1.0, n=10)]
    assert board.figures_of([*ROWS, *few], "mnist_mlp/lwa", "l2", 1.5)[1:] == ["0.7500", "0.1500"]
    for rows in ([*ROWS, *few], [*few, *ROWS]):
        assert board.tables(rows) == board.tables(ROWS)
    more = row("mnist_mlp/lwa", "one-step", 0.95, n=1000)  # on which AutoAttack hasn't been run
    assert board.figures_of([*ROWS, more], "mnist_mlp/lwa", "l2", 1.5)[1:] == ["0.7500", "0.1500"]


def test_pgd_on_other_images_says_on_how_many():
    few = row("mnist_mlp/lwa", "pgd-100x10", 0.6, n=10)
    fewer = row("mnist_mlp/lwa", "pgd-100x10", 0.5, n=5)
    here = [r for r in ROWS if r["attack"] != "pgd-100x10"]
    found = board.figures_of([*here, few, fewer], "mnist_mlp/lwa", "l2", 1.5)
    assert found == ["0.6000 (of 10)", "0.7500", "0.1500"]
    same = row("mnist_mlp/lwa", "standard", 0.55, n=10)
    found = board.figures_of([*here, few, same], "mnist_mlp/lwa", "l2", 1.5)
    assert found[0] == "0.6000 (of 10, AutoAttack 0.5500)"
    assert board.figures_of([*ROWS, few], "mnist_mlp/lwa", "l2", 1.5)[0] == "0.8000"


def test_the_most_robust_net_comes_first_and_flags_are_told():
    lines = board.tables(ROWS)
    nets = [line for line in lines if line.startswith("| ") and "Net" not in line]
    assert nets[0] == (
        "| LWA | 7x5 | 100 | 0.9900 | 0.9000 | 0.8000 | **0.7500** | 0.740 to 0.760 | 0.1500 |"
    )
    assert [line.split(" | ")[0] for line in nets] == ["| LWA", "| Normal", "| LWA"]
    assert [line for line in lines if line.startswith("##")] == [
        "## mnist_mlp: l2 size 1.5", "## mnist_mlp: l2 size 2",
    ]  # fmt: skip
    assert [line for line in lines if line.startswith("- ")] == [
        "- lwa: far off; more helps", "- not checked: normal", "- not checked: lwa",
    ]  # fmt: skip
    checked = [*ROWS, row("mnist_mlp/normal", "check", 0.0, flags={})]
    assert "- normal: nothing to doubt was found" in board.tables(checked)


@pytest.fixture
def settings(tmp_path):
    """A record of one small net that nobody has trained."""
    net = models.mlp((7, 5))
    params = models.init(net, jax.random.key(0), jax.numpy.zeros((1, 28, 28, 1)))
    weights.save(tmp_path / "mnist_mlp" / "lwa" / "params.safetensors", params)
    return board.Settings(
        "mnist_mlp", threats=("l2 1.5", "linf 0.3"), attacks=("one-step",), n=20, folder=tmp_path,
        out=tmp_path / "board",
    )  # fmt: skip


def test_it_attacks_each_net_of_the_record_under_each_threat(settings):
    rows = board.run(settings, Console(file=io.StringIO()))
    assert [(r["method"], r["norm"], r["eps"], r["n"], r["box"]) for r in rows] == [
        ("mnist_mlp/lwa", "l2", 1.5, 20, True), ("mnist_mlp/lwa", "linf", 0.3, 20, True),
    ]  # fmt: skip
    assert records.load(settings.out / "results.json") == rows


def test_a_record_without_nets_is_an_error(settings):
    with pytest.raises(ValueError, match="got none; train them first"):
        board.run(dataclasses.replace(settings, record="cifar10"), Console(file=io.StringIO()))


IN_HISTORY = ("dropout", "goodfellow", "lwa_rep")  # as experiments/results/README.md says


@pytest.mark.parametrize("folder", ["board", "autoattack", "autoattack/reference"])
def test_recorded_figures_are_of_the_recorded_weights(folder):
    rows = [
        row
        for row in records.load(board.RESULTS / folder / "results.json")
        if Path(row["method"]).name not in IN_HISTORY
    ]
    found = {
        method: evaluate.digest(
            weights.load(board.RESULTS / method / "params.safetensors", jnp.float32)
        )
        for method in {row["method"] for row in rows}
    }
    assert found
    assert {(row["method"], row["weights"]) for row in rows} == set(found.items())
