"""Appendix A's experiment: its claims hold, and one that doesn't is an error."""

import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from experiments import logistic
from experiments.lib import options, records


@pytest.fixture(autouse=True)
def float64(x64):
    """64-bit mode, as in the command."""


@pytest.mark.slow
def test_all_claims_hold_on_fewer_images(tmp_path):
    settings = logistic.Settings(n=60, out=tmp_path)
    rows = logistic.run(settings, Console(file=io.StringIO()))
    assert rows == records.load(tmp_path / "results.json", records.PropositionRow)
    assert [row.proposition for row in rows] == ["Equation 6, Proposition 6", "B", "C", "D"]
    assert all(claim["holds"] for row in rows for claim in row.claims)
    assert (tmp_path / "appendix_a.png").stat().st_size > 10_000
    text = (tmp_path / "results.md").read_text()
    assert all(row.statement in text for row in rows)


def test_a_claim_that_fails_is_an_error(tmp_path, monkeypatch):
    wrong = logistic.Finding("C", "wrong", [logistic.Claim("a number", 2.0, "<=", 1.0)], {})
    monkeypatch.setattr(logistic, "proposition_c", lambda: wrong)
    monkeypatch.setattr(logistic.figures, "draw", lambda folder: [])
    for name in ("equation_6", "proposition_b", "proposition_d"):
        monkeypatch.setattr(logistic, name, lambda x, y, rng: wrong._replace(claims=[]))
    with pytest.raises(ArithmeticError, match=r"a number: 2, not <= 1"):
        logistic.run(logistic.Settings(n=4, out=tmp_path), Console(file=io.StringIO()))


@pytest.mark.parametrize(
    ("value", "relation", "bound", "holds"),
    [(1, "<=", 1, True), (1, ">", 1, False), (1, ">=", 1, True), (np.nan, "<=", 1, False)],
)
def test_a_claim_holds_if_its_relation_does(value, relation, bound, holds):
    assert logistic.Claim("", value, relation, bound).holds is holds


def test_classes_that_no_hyperplane_separates_are_an_error():
    x, y = np.array([[1.0, 0.5], [0.5, 1.0], [1.0, 1.0]]), np.array([1, 1, -1])
    with pytest.raises(options.UsageError, match=r"3 digits that a hyperplane .*; lower --n"):
        logistic.margin(jnp.asarray(x), jnp.asarray(y))


def test_the_margin_is_the_l2_gap_about_a_hyperplane_through_0():
    # x_0 = 0 separates the classes, at a distance of 1.5 on one side and 2 on the other. No other
    # hyperplane through 0 is farther from the nearest point.
    x = jnp.array([[1.5, 0.0], [-2.0, 0.0], [3.0, 5.0]])
    assert logistic.margin(x, jnp.array([1, -1, 1])) == pytest.approx(3.0, rel=1e-6)
    # Two points at right angles: w points along their sum, at a distance of 1/sqrt(2) from each.
    right = jnp.eye(2)
    assert logistic.margin(right, jnp.array([1, 1])) == pytest.approx(2**0.5, rel=1e-6)


def test_images_and_labels_are_two_digits(x64):
    x, y = logistic.load(logistic.Settings(n=20))
    assert x.shape == (20, 784)
    assert x.dtype == jnp.float64
    assert sorted(np.asarray(y).tolist()) == [-1] * 10 + [1] * 10
    assert jax.numpy.max(x) < 1
