"""`experiments/fast.py` and `evaluate.fast_autoattack`."""

import dataclasses
import functools
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from experiments import fast
from experiments.fast import Settings
from experiments.lib import models, records, weights
from jaxadv import attack


@pytest.fixture
def settings(tmp_path):
    net = models.mlp((7, 5))
    params = models.init(net, jax.random.key(0), jnp.zeros((1, 28, 28, 1)))
    weights.save(tmp_path / "mnist_mlp" / "normal" / "params.safetensors", params)
    return Settings(
        nets=("mnist_mlp/normal",), norms=("l2",), seeds=(0,), n=40, orders=True,
        folder=tmp_path, out=tmp_path / "out",
    )  # fmt: skip


def run(settings, **changes):
    (row,) = fast.run(dataclasses.replace(settings, **changes), Console(file=io.StringIO()))
    assert records.load(settings.out / "results.json", records.FastRow) == [row]
    return row


@pytest.mark.slow
def test_both_ensembles_run_and_their_verdicts_are_stored(settings):
    others = settings.out / "batches" / "of another run"
    others.mkdir(parents=True)
    row = run(settings)
    assert [*others.parent.iterdir()] == [others]
    assert row.columns["fast"] >= row.columns["standard"]
    assert sum(row.passes["fast"].values()) < sum(row.passes["standard"].values())
    with np.load(settings.out / "mnist_mlp-normal-l2-0.npz") as verdicts:
        assert verdicts["fast"].mean() == row.columns["fast"]
        assert verdicts["standard by stage"].shape == (4, 40)
    for left in row.orders.values():
        assert left == sorted(left, reverse=True)
    assert "| mnist_mlp/normal | l2 | distance |" in "\n".join(fast.as_markdown([row]))


def test_what_an_earlier_run_measured_besides_stays(settings, monkeypatch):
    weak = {"pgd": functools.partial(attack.pgd, steps=1)}
    for module, name in (
        (fast.evaluate, "autoattack"), (fast.evaluate, "fast_autoattack"), (fast, "in_order"),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, lambda *_: weak)
    monkeypatch.setattr(fast, "run_published", lambda *_: (3.0, 0.25))
    monkeypatch.setattr(fast.timing.Quiet, "report", lambda _: {"valid": True})
    ordered = run(settings)
    published = run(settings, orders=False, published=True)
    assert published.orders == ordered.orders

    def measured_after(**changes):
        before = dataclasses.replace(published, orders=None, **changes)
        records.save(settings.out / "results.json", [before])
        return run(settings)

    both = measured_after()
    assert both.orders == ordered.orders
    assert (both.seconds["published"], both.columns["published"]) == (3.0, 0.25)
    on_a_noisy_machine = measured_after(machine={"valid": False})
    assert on_a_noisy_machine.columns["published"] == 0.25
    assert "published" not in on_a_noisy_machine.seconds


def test_time_that_nested_spans_share_is_counted_once():
    spans = [(1.0, 2.0), (2.5, 3.0), (0.5, 4.0), (5.0, 7.0), (6.0, 8.0)]
    assert fast.covered(spans) == 3.5 + 3.0
    assert fast.covered([]) == 0


def test_tracing_lowering_and_compiling_are_timed():
    jax.clear_caches()
    with fast.compiling() as spans:
        jax.jit(jax.jit(lambda x: x + 1)).lower(1.0).compile()
    first, last = min(start for start, _ in spans), spans[-1][1]
    assert len(spans) >= 3  # a trace, lowering and compilation; the inner trace not everywhere
    assert 0 < fast.covered(spans) <= last - first


@pytest.mark.parametrize(
    ("asked", "enough"),
    [
        ({}, True),
        ({"orders": True}, False),
        ({"published": True}, False),
        ({"published": True, "seeds": (7, 0)}, True),  # it runs with the first seed only
    ],
)
def test_a_row_without_what_is_asked_for_is_made_again(asked, enough):
    rows = records.load(records.RESULTS / "fast" / "results.json", records.FastRow)
    row = next(r for r in rows if r.orders is None and "published" not in r.columns and not r.seed)
    assert fast.has_all(Settings(**asked), row) is enough
