"""The benchmark counts the right products and writes what it measures; times are not tested."""

import json
import sys
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import benchmark
from experiments.benchmarks import attacks, common, devices, growth, loops, steps
from experiments.compare import pytorch
from experiments.lib import models, records, timing
from jaxadv import perturb


def test_the_products_of_a_step_are_those_of_its_passes():
    kinds = ("forward", "weights", "input", "inputs")
    seconds = {
        f"{kind} {layer}": 10.0**k * (layer + 1) for k, kind in enumerate(kinds) for layer in (0, 1)
    }
    forward, weights, to_second, to_image, to_image_alpha = 3, 30, 200, 300, 3000
    plain = forward + weights + to_second
    assert steps.floors(seconds, 2, split=1) == {
        "plain": plain,
        "LWA": plain + forward + to_image,
        "LWA, Adv_Alpha": plain + forward + to_image_alpha,
        "LWA_Rep": plain + 2 + 200,
        "LWA, 3 steps": plain + 3 * (forward + to_image),
    }


@pytest.mark.parametrize(
    ("net", "layers"),
    [(models.mlp((6, 5), split=1), 1), (models.lenet((6,), split=2), 2), (models.vgg((8, 8)), 7)],
    ids=["mlp", "lenet", "vgg"],
)
def test_the_layers_before_a_representation_include_all_of_a_block(net, layers):
    assert steps.before_split(net) == layers


def test_the_timed_products_have_the_shapes_of_the_net():
    net = models.Classifier((6, 5), classes=3)
    shapes = {name: call().shape for name, call in steps.products(net, 7, 4).items()}
    assert shapes == {
        "forward 0": (4, 6), "forward 1": (4, 5), "forward 2": (4, 3),
        "weights 0": (7, 6), "weights 1": (6, 5), "weights 2": (5, 3),
        "input 0": (4, 7), "input 1": (4, 6), "input 2": (4, 5),
        "inputs 0": (8, 7), "inputs 1": (8, 6), "inputs 2": (8, 5),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("net", "shape"),
    [
        (models.mlp((500, 500)), (28, 28, 1)),
        (models.Classifier((64,), blocks=((32, 32), (64,)), padding=0), (28, 28, 3)),
        (models.Classifier((64,), blocks=((32, 32), (64,)), padding=0), (15, 30, 3)),
    ],
)
def test_the_operations_counted_are_those_that_xla_counts(net, shape):
    params = models.init(net, jax.random.key(0), jnp.zeros((1, *shape)))
    x = jnp.zeros((4, *shape))
    counted = jax.jit(models.function(net)).lower(params, x).cost_analysis()["flops"] / 4
    # XLA also counts biases, relu and pooling: at most 2% for these nets.
    assert 0.98 * counted < sum(timing.flops(net, params, x)) < counted


def test_the_operations_of_lenet_are_those_of_its_layers():
    # 24x24 windows from 5x5x1 to 20, 8x8 from 5x5x20 to 50, then 800 to 500 to 10.
    expected = [576 * 25 * 20, 64 * 500 * 50, 800 * 500, 500 * 10]
    net, x = models.lenet((500,)), jnp.zeros((1, 28, 28, 1))
    params = jax.eval_shape(net.init, jax.random.key(0), x)
    assert timing.flops(net, params, x) == [2 * n for n in expected]


def test_counted_products_have_the_time_of_their_operations():
    seconds = steps.counted([48, 120], 10, 5, rate=10.0)
    assert seconds == {
        "forward 0": 24.0, "weights 0": 24.0, "input 0": 24.0, "inputs 0": 9 * 24.0,
        "forward 1": 60.0, "weights 1": 60.0, "input 1": 60.0, "inputs 1": 9 * 60.0,
    }  # fmt: skip


def test_calls_are_timed_in_turn_and_once_before():
    order = []
    calls = {name: partial(order.append, name) for name in "ab"}
    times = timing.in_turn(calls, rounds=3, seconds=0.0)
    assert order == ["a", "b"] * 4
    assert {name: len(taken) for name, taken in times.items()} == {"a": 3, "b": 3}
    assert all(taken.min() > 0 for taken in times.values())


def test_a_ratio_is_taken_round_by_round():
    assert common.ratio([1.0, 10.0, 100.0], [2.0, 20.0, 200.0]) == [0.5, 0.5, 0.5]
    # The ratio of the quartiles would be .5 here.
    np.testing.assert_allclose(
        common.ratio([1.0, 100.0, 10.0], [2.0, 20.0, 200.0]), [0.275, 0.5, 2.75]
    )


class Machine:
    """Replaces the clock and the counters of a machine with two processors."""

    def __init__(self, monkeypatch, *, others=0.0, slower=1.0, uneven=1.0):
        now = iter([(0.0, 0.0, 0.0, 0.0), (200.0, 90.0 + 200 * others, 0.0, 90.0)])
        samples = np.array([1.0, 1.0, 1.0 / uneven, 1.0 / uneven, 1.0])
        rates = iter([100.0 * samples, 100.0 / slower * samples])
        monkeypatch.setattr(timing.Quiet, "_now", staticmethod(lambda: next(now)))
        monkeypatch.setattr(timing.Quiet, "_gflops", staticmethod(lambda: next(rates)))


@pytest.mark.parametrize(
    ("machine", "reasons"),
    [
        ({}, []),
        ({"others": 0.04}, []),
        ({"others": 0.3}, ["other programs used 30%"]),
        ({"slower": 1.5}, ["100 GFLOP/s before and 67 after"]),
        ({"uneven": 1.1}, []),
        ({"uneven": 1.25}, ["at 80 and at 100 GFLOP/s within"]),
    ],
)
def test_a_loaded_machine_makes_a_run_invalid(machine, reasons, monkeypatch):
    Machine(monkeypatch, **machine)
    record = timing.Quiet().report()
    assert record["valid"] == (not reasons)
    assert len(record["reasons"]) == len(reasons)
    for found, expected in zip(record["reasons"], reasons, strict=True):
        assert expected in found


def _run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *map(str, arguments)])
    benchmark.main()


def test_an_invalid_run_is_recorded_and_ends_with_an_error(tmp_path, monkeypatch):
    Machine(monkeypatch, others=0.5)
    monkeypatch.setitem(benchmark.RUN, "loops", lambda settings: [{"loop": "a", "x": [1, 2, 3.0]}])
    with pytest.raises(SystemExit, match=r"not valid.*loops.*--parts loops"):
        _run(monkeypatch, "--parts", "loops", "--out", tmp_path)
    (row,) = json.loads((tmp_path / "results.json").read_text())
    assert row["machine"]["cpu_of_others"] == 0.5
    text = (tmp_path / "results.md").read_text()
    assert "Not valid: other programs used 50%" in text
    assert "| a | 2.00 (1.00 to 3.00) |" in text


def test_a_part_measured_again_replaces_its_figures_and_leaves_the_others(tmp_path, monkeypatch):
    for part, value in (("loops", 1), ("steps", 2), ("loops", 3)):
        Machine(monkeypatch)
        monkeypatch.setitem(benchmark.RUN, part, lambda settings, value=value: [{"loop": value}])
        _run(monkeypatch, "--parts", part, "--out", tmp_path)
    rows = json.loads((tmp_path / "results.json").read_text())
    assert [(row["part"], row["figures"]) for row in rows] == [
        ("steps", [{"loop": 2}]),
        ("loops", [{"loop": 3}]),
    ]


def test_growth_is_measured_and_drawn(tmp_path, monkeypatch):
    net, x = models.mlp((8,)), jnp.zeros((4, 2, 2, 1))
    params = models.init(net, jax.random.key(0), x)
    call = partial(jax.jit(partial(perturb.loss, models.function(net), eps=1.0)), params, x)
    settings = common.Settings(rounds=1, seconds=0.0)
    bound = partial(call.func, *call.args, jnp.zeros(4, int))
    (figure,) = growth.measured("images", {("mlp", "Adv_Loss", 1): (bound, 4)}, settings)
    assert figure["µs an image"] > 0
    assert figure["MB"] >= 0

    def points(settings):
        return [{**figure, "to": n} for n in (1, 10)]

    Machine(monkeypatch)
    monkeypatch.setitem(benchmark.RUN, "growth", points)
    _run(monkeypatch, "--parts", "growth", "--out", tmp_path)
    assert (tmp_path / "growth.png").stat().st_size > 1000


@pytest.mark.slow
def test_steps_and_loops_are_measured(tmp_path, monkeypatch):
    Machine(monkeypatch)
    settings = common.Settings(nets=("mlp",), batch_size=10, rounds=1, seconds=0.0)
    monkeypatch.setattr(records, "cores", lambda: 2)
    measured = steps.run(settings)
    every = ("plain", "LWA", "LWA, Adv_Alpha", "LWA_Rep", "LWA, 3 steps")
    assert {(s["objective"], s["called"], s["devices"]) for s in measured} == {
        (objective, called, n)
        for objectives, n in ((every, 1), (("plain", "LWA"), 2))
        for objective in objectives
        for called in ("by itself", "in an epoch")
    }
    for step in measured:  # with one round, all three come from the same two numbers
        expected = [step["floor ms"] / step["ms"]] * 3
        assert step["floor / time"] == pytest.approx(expected, rel=1e-9)
    assert len(loops.run(settings)) == 6


@pytest.mark.slow
def test_attacks_are_measured_on_a_recorded_net():
    figures = attacks.run(common.Settings(n=20, rounds=1, seconds=0.0))
    assert {figure["net"] for figure in figures} == {"mlp", "lenet"}
    assert {f["method"] for f in figures if f["library"] == "jaxadv"} == set(attacks.METHODS)
    left = {
        f["method"]: f["accuracy"] for f in figures if (f["net"], f["library"]) == ("mlp", "jaxadv")
    }
    assert left["Adv_Loss"] >= left["PGD-40"]
    assert left["DeepFool"] == 0


@pytest.mark.slow
def test_losses_are_the_same_on_any_number_of_devices():
    figures = devices.run(common.Settings(rounds=1, seconds=0.0))
    assert [figure["devices"] for figure in figures] == [1, 2, 4, 8]
    assert all(figure["greatest difference of loss"] < 1e-5 for figure in figures)


def test_a_net_in_pytorch_gives_the_same_logits():
    torch = pytest.importorskip("torch", reason="the extra bench has it")
    x = np.random.default_rng(0).random((3, 28, 28, 3), np.float32)
    for net in (models.mlp((8, 7)), models.lenet((9,)), models.vgg((8, 8), width=0.02)):
        params = models.init(net, jax.random.key(0), x)
        ours = np.asarray(models.function(net)(params, x))
        with torch.no_grad():
            theirs = pytorch.torch_net(params)(pytorch.images(x)).numpy()
        # Sums of up to a few thousand float32 products, in another order.
        np.testing.assert_allclose(theirs, ours, rtol=1e-4, atol=1e-5)


def test_a_call_that_takes_very_long_is_timed_once(monkeypatch):
    monkeypatch.setattr(timing, "LONG", 0.01)
    times = timing.in_turn({"long": lambda: time.sleep(0.02), "short": int}, 3, seconds=0.0)
    assert {name: len(taken) for name, taken in times.items()} == {"long": 1, "short": 3}
    assert common.ratio(times["long"], times["short"])[0] > 1
