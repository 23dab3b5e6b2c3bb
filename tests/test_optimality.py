"""`experiments/optimality.py`: AttackBench's optimality, and a run."""

import dataclasses
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from experiments import optimality
from experiments.lib import models, options, records, weights
from experiments.optimality import Settings


def area(sizes, largest, n=20000):
    """The area below the curve of accuracy against size, interpolated linearly."""
    at = np.unique([0, *np.minimum(sizes, largest)])
    accuracy = [(sizes > size).mean() for size in at]  # sizes of inf count at the end too
    grid = np.linspace(at[0], at[-1], n)
    return np.trapezoid(np.interp(grid, at, accuracy), grid)


def test_the_envelope_has_optimality_1_and_an_attack_that_finds_nothing_0():
    best = np.array([0, 0.5, 1, 1.5, 3])
    assert optimality.optimality(best, best) == pytest.approx(1)
    nothing = np.where(best == 0, 0, np.inf)
    assert optimality.optimality(nothing, best) == pytest.approx(0)


@pytest.mark.parametrize("best", [[0.0, 0.0], [0.0, np.inf]], ids=["all wrong", "none fooled"])
def test_an_envelope_of_no_size_has_no_optimality(best):
    assert np.isnan(optimality.optimality(np.array(best), np.array(best)))


def test_figures_that_a_row_lacks_are_none_on_the_page():
    rows = records.load(records.RESULTS / "optimality" / "results.json", records.OptimalityRow)
    columns = {"optimality": 0.5, "median": None}
    row = dataclasses.replace(rows[0], columns=columns, budget=600)
    assert f"| {row.attack} | {row.library} | 0.5000 | none |" in optimality.as_markdown([row])


def test_optimality_is_the_area_between_the_curves():
    rng = np.random.default_rng(0)
    best = rng.gamma(2.0, size=50)
    sizes = best * rng.uniform(1, 2, 50)
    sizes[7] = np.inf
    largest = best.max()
    want = 1 - (area(sizes, largest) - area(best, largest)) / (largest - area(best, largest))
    assert optimality.optimality(sizes, best) == pytest.approx(want, abs=1e-3)


@pytest.mark.slow
def test_each_attack_runs_within_the_budget_and_its_sizes_are_stored(tmp_path):
    net = models.mlp((7, 5))
    params = models.init(net, jax.random.key(0), jnp.zeros((1, 28, 28, 1)))
    weights.save(tmp_path / "mnist_mlp" / "lwa" / "params.safetensors", params)
    settings = Settings(
        nets=("mnist_mlp/lwa",), norms=("linf",), budgets=(700,), libraries=("jaxadv",), n=12,
        folder=tmp_path, out=tmp_path / "out",
    )  # fmt: skip
    console = Console(file=io.StringIO())
    rows = optimality.run(settings, console)
    assert {row.attack for row in rows} == {"FMN", "FAB", "APGD", "APGD-T", "distances"}
    assert records.load(settings.out / "results.json", records.OptimalityRow) == rows
    assert all(sum(row.passes.values()) <= 700 for row in rows)
    assert all(len(row.pool) == len(rows) for row in rows)
    assert max(row.columns["optimality"] for row in rows) <= 1
    with np.load(settings.out / "mnist_mlp-lwa-linf.npz") as sizes:
        assert len(sizes) == len(rows)
        assert (sizes["jaxadv distances 700"] >= 0).all()
    text = "\n".join(optimality.as_markdown(rows))
    assert "| distances | jaxadv |" in text
    # A later run adds to results.json and the npz files; a checkout has nothing else.
    both = optimality.run(dataclasses.replace(settings, budgets=(700, 800)), console)
    assert [(row.seconds, row.passes) for row in both if row.budget == 700] == [
        (row.seconds, row.passes) for row in rows
    ]
    assert {row.budget for row in both} == {700, 800}
    assert all(len(row.pool) == len(both) == 2 * len(rows) for row in both)
    best = {row.attack: row.columns["optimality"] for row in both if row.budget == 700}
    assert all(best[row.attack] <= row.columns["optimality"] for row in rows)
    with pytest.raises(options.UsageError, match="to have the same n as this run"):
        optimality.run(dataclasses.replace(settings, n=11), console)


def test_curves_start_at_0_if_every_image_is_classified_correctly():
    best = np.array([1.0, 2, 3])
    assert optimality.optimality(np.full(3, np.inf), best) == pytest.approx(0)
    assert optimality.optimality(np.array([2.5, 3, 3]), best) < 0.7
