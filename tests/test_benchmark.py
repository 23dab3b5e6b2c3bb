"""The step benchmark counts the right products; its figures themselves are not tested here."""

import json
import sys

import pytest

from experiments import benchmark


def test_the_products_of_a_step_are_those_of_its_passes():
    kinds = ("forward", "weights", "input", "inputs")
    seconds = {
        f"{kind} {layer}": 10.0**k * (layer + 1) for k, kind in enumerate(kinds) for layer in (0, 1)
    }
    forward, weights, to_second, to_image, to_image_alpha = 3, 30, 200, 300, 3000
    plain = forward + weights + to_second
    assert benchmark.floors(seconds, 2) == {
        "plain": plain,
        "lwa": plain + forward + to_image,
        "lwa_alpha": plain + forward + to_image_alpha,
    }


def test_the_timed_products_have_the_shapes_of_the_net():
    calls = benchmark.products(benchmark.Settings(widths=(6, 5), batch_size=4), 7, 3)
    shapes = {name: call().shape for name, call in calls.items()}
    assert shapes == {
        "forward 0": (4, 6), "forward 1": (4, 5), "forward 2": (4, 3),
        "weights 0": (7, 6), "weights 1": (6, 5), "weights 2": (5, 3),
        "input 0": (4, 7), "input 1": (4, 6), "input 2": (4, 5),
        "inputs 0": (8, 7), "inputs 1": (8, 6), "inputs 2": (8, 5),
    }  # fmt: skip


@pytest.mark.slow
def test_it_prints_and_stores_a_ratio_for_each_step(tmp_path, monkeypatch, capsys):
    out = tmp_path / "steps.json"
    arguments = ["--rounds", "1", "--seconds", "0.001", "--widths", "8", "6", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *arguments])
    benchmark.main()
    printed = capsys.readouterr().out
    record = json.loads(out.read_text())
    figures = record["figures"]
    for net in ("mlp", "lenet"):
        cost = record["cost_of_alpha"][net]
        assert cost["ratio"] == pytest.approx(cost["adv_alpha_ms"] / cost["adv_loss_ms"], rel=1e-9)
        assert f"{net:15} Adv_Loss" in printed
    kinds = {"plain", "lwa", "lwa_alpha"}
    assert figures.keys() == kinds | {f"{kind} epoch" for kind in kinds}
    for name, figure in figures.items():
        assert f"{name:15} products" in printed
        # Of one round, all three are medians of the same two numbers.
        expected = figure["products_ms"] / figure["step_ms"]
        assert figure["ratio"] == pytest.approx(expected, rel=1e-9)
