"""`experiments/curve.py`: the accuracy at every size, compared with attacks."""

import dataclasses
import io

import jax
import numpy as np
import pytest
from rich.console import Console

from experiments import curve
from experiments.lib import figures, options, problems, records
from jaxadv import evaluate


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    settings = curve.Settings(
        net=str(records.RESULTS / "mnist_mlp" / "normal" / "params.safetensors"), n=12,
        eps=(0.5, 1.5), attacks=("one-step", "pgd"), budget=600,
        out=tmp_path_factory.mktemp("curve"),
    )  # fmt: skip
    return settings, curve.run(settings, Console(file=io.StringIO()))


def test_the_curve_comes_from_the_distances(ran):
    settings, (row,) = ran
    problem = problems.load(settings)
    found = evaluate.distances(
        problem.apply_fn, problem.params, problem.x, problem.y, norm="l2", budget=600,
        key=jax.random.key(0), bounds=problem.bounds,
    )  # fmt: skip
    assert found.size.any()
    assert row.median == found.median
    assert row.accuracy == {"0.5": found.accuracy(0.5), "1.5": found.accuracy(1.5)}
    np.testing.assert_array_equal(row.curve["accuracy"], found.accuracy(row.curve["eps"]))
    assert row.curve["accuracy"][-1] == 0
    assert sum(row.passes.values()) <= 600
    with np.load(settings.out / "mnist_mlp-normal-l2.npz") as kept:
        np.testing.assert_array_equal(kept["size"], found.size)


def test_attacks_are_compared_with_it_at_their_sizes(ran):
    settings, (row,) = ran
    attacked = records.load(settings.out / "attacks" / "results.json", records.AttackRow)
    robust = {(each.attack, f"{each.eps:g}"): each.columns["robust"] for each in attacked}
    assert {
        (name, eps): figure for name, found in row.attacks.items() for eps, figure in found.items()
    } == robust
    assert robust["one-step", "1.5"] > robust["pgd", "1.5"]
    text = "\n".join(curve.as_markdown([row]))
    difference = row.accuracy["1.5"] - robust["pgd", "1.5"]
    assert f"| PGD-100 | {robust['pgd', '1.5']:.4f} | {difference:+.4f} |" in text
    (panel,) = figures.plot_distances([row]).axes
    _, one_step, pgd, *names = panel.get_lines()
    assert [list(line.get_ydata()) for line in (one_step, pgd)] == [
        [robust[name, eps] for eps in row.accuracy] for name in row.attacks
    ]
    markers = {line.get_label(): line.get_marker() for line in names}
    assert markers == {
        "One step": one_step.get_marker(), "PGD-100": pgd.get_marker()
    }  # fmt: skip
    assert len(set(markers.values())) == 2


def test_images_that_nothing_misleads_have_no_median(ran, tmp_path, monkeypatch):
    size = np.where(np.arange(12) < 6, 0, np.inf)
    none = evaluate.Passes(*np.zeros((2, 12), int))
    found = evaluate.Distances(size, np.zeros((12, 28, 28, 1)), np.full(12, ""), {"fmn": none})
    monkeypatch.setattr(evaluate, "distances", lambda *_, **__: found)
    settings = curve.Settings(**vars(ran[0]) | {"out": tmp_path, "attacks": ("one-step",)})
    rows = curve.run(settings, Console(file=io.StringIO()))
    assert records.load(tmp_path / "results.json", records.CurveRow) == rows
    assert rows[0].accuracy == {"0.5": 0.5, "1.5": 0.5}
    assert "| 12 | none | 0.5 | 0.5000 |" in "\n".join(curve.as_markdown(rows))


def test_without_attacks_the_page_has_only_the_curves_figures(ran):
    _, (row,) = ran
    lines = curve.as_markdown([dataclasses.replace(row, attacks={"check": {}})])
    assert [line for line in lines if line.startswith("| mnist_mlp/normal")] == [
        f"| mnist_mlp/normal | l2 | 12 | {row.median:.4f} | {eps} | {accuracy:.4f} |  |  |  |"
        for eps, accuracy in row.accuracy.items()
    ]


def test_rows_of_other_nets_are_kept(ran):
    settings, (row,) = ran
    rows = records.load(settings.out / "results.json", records.CurveRow)
    assert rows == [row]
    other = curve.Settings(**vars(settings) | {"name": "net/second"})
    rows = curve.run(other, Console(file=io.StringIO()))
    assert records.load(settings.out / "results.json", records.CurveRow) == rows
    assert [each.method for each in rows] == ["mnist_mlp/normal", "net/second"]
    assert (settings.out / "curve.png").is_file()
    assert rows[1].curve == row.curve


def test_certification_is_refused(ran):
    with pytest.raises(options.UsageError, match="expected no --certify, got"):
        curve.Settings(**vars(ran[0]) | {"certify": 0.5})
