"""The comparison of what keeps one step from being fooled."""

import io
from typing import get_args

import numpy as np
import pytest
from rich.console import Console
from rows import robust_row, table_row

from experiments import remedies
from experiments.lib import attack_tables, records, tasks, train_and_score
from experiments.lib.recipes import FewSteps, MultiStep, OneStep


def test_the_ways_differ_only_in_the_step():
    settings = remedies.Settings()
    made = settings.nets()
    assert list(made) == list(attack_tables.WAYS)
    shared = {"widths", "epochs", "lr", "eps", "warmup", "average", "shift", "objective"}
    for field in shared:
        assert len({getattr(method, field) for method in made.values()}) == 1
    assert set(get_args(remedies.Way)) == set(attack_tables.WAYS)
    assert [m.alignment > 0 for m in made.values() if isinstance(m, OneStep)].count(True) == 1
    several = {name: m.steps for name, m in made.items() if isinstance(m, MultiStep)}
    assert several == {"best": 1, "four": 4}
    kept = {name: (m.steps, m.adversary) for name, m in made.items() if isinstance(m, FewSteps)}
    assert kept == {"memory": (1, "loss"), "memory_two": (2, "loss"), "nearest": (1, "alpha")}
    assert {m.memory for m in made.values() if isinstance(m, FewSteps)} == {settings.memory}


@pytest.mark.parametrize(
    "changes",
    [{"precision": "bfloat16"}, {"coordinator": "localhost:1", "processes": 2, "process": 0}],
    ids=["bfloat16", "processes"],
)
def test_settings_that_autoattack_does_not_support_are_refused(changes):
    with pytest.raises(ValueError, match=r"--precision float32 and no --processes.*; leave these"):
        remedies.Settings(**changes)


def test_devices_that_cant_share_the_attacked_images_are_refused_before_training(monkeypatch):
    monkeypatch.setattr(remedies.train_and_score, "run", pytest.fail)
    settings = remedies.Settings(devices=4, n_autoattack=50)
    with pytest.raises(ValueError, match="devices to divide 50"):
        remedies.run(settings, Console(file=io.StringIO()))


def test_with_a_holdout_the_test_images_are_not_attacked(tmp_path, monkeypatch):
    rows = [table_row(method="four", ratio_to_lwa=2.5)]
    monkeypatch.setattr(remedies.train_and_score, "run", lambda *_: (rows, {}))
    monkeypatch.setattr(remedies.evaluation, "run", pytest.fail)
    settings = remedies.Settings(out=tmp_path, holdout=59_000)
    assert remedies.run(settings, Console(file=io.StringIO())) == (rows, [])


def test_a_ratio_is_the_median_over_rounds_and_is_measured_once(tmp_path, monkeypatch):
    # The machine slows down between rounds, so the ratio of the medians would be different.
    # The last call of `four` was so long that it was timed no further.
    seconds = {"from_x": [1.0, 2.0, 8.0, 9.0], "four": [2.5, 5.0, 8.0]}

    def timed(methods, *_, **how):
        assert list(methods) == ["from_x", "four"]
        assert how == {"steps": 50, "rounds": 3}
        return {name: np.array(taken) for name, taken in seconds.items()}

    monkeypatch.setattr(remedies.train_and_score, "step_seconds", timed)
    settings = remedies.Settings(out=tmp_path, methods=("four",), timed=3)
    older = table_row(method="memory", ratio_to_lwa=1.2)
    records.save(tmp_path / "results.json", [table_row(method="four"), older])
    rows = remedies.with_ratios(settings, None, [table_row(method="four")])
    assert [row.ratio_to_lwa for row in rows] == [2.5]
    assert records.load(tmp_path / "results.json", records.TableRow) == [*rows, older]
    monkeypatch.setattr(remedies.train_and_score, "step_seconds", pytest.fail)
    assert remedies.with_ratios(settings, None, rows) == rows


def test_the_page_describes_its_rows_and_not_the_last_run():
    made = {"epochs": 8, "train_eps": 2.0, "alignment": 0.2, "pgd_steps": 100}
    rows = [
        table_row(method="aligned", settings={**made, "stride": 1.0}),
        table_row(method="memory", settings={**made, "stride": 1.5}, device="gpu x1"),
    ]
    attacked = [robust_row(method=f"{name}, seed 0", n=700) for name in ("aligned", "memory")]
    settings = remedies.Settings(alignment=0.5, stride=3.0, n_autoattack=4, pgd_steps=2)
    page = "\n".join(remedies.as_markdown(settings, rows, attacked))
    for said in (
        "penalty has weight 0.2.",
        "are 1.5 times",
        "| 700 |",
        "PGD: 100 steps",
        "x1, jax 0; gpu x1",
    ):
        assert said in page


@pytest.mark.slow
def test_each_way_is_trained_attacked_and_listed_in_the_table(tmp_path, monkeypatch):
    few = {"widths": (5,), "epochs": 1, "lr": 0.05, "eps": 1.0}
    made = {"from_x": OneStep(**few), "memory": FewSteps(memory=1, shift=1, **few)}
    monkeypatch.setattr(remedies.Settings, "nets", lambda settings: made)
    make_task = tasks.mnist

    def make_small(*args):
        task = make_task(*args)
        return task._replace(train=train_and_score.Images(*(part[:200] for part in task.train)))

    monkeypatch.setattr(tasks, "mnist", make_small)
    settings = remedies.Settings(
        out=tmp_path, n_eval=40, n_pgd=20, pgd_steps=2, curve=(0.0, 1.0), epochs=1, n_autoattack=4
    )
    rows, attacked = remedies.run(settings, Console(file=io.StringIO()))
    assert [row.method for row in rows] == list(made)
    assert rows[0].ratio_to_lwa == 1
    assert rows[1].ratio_to_lwa > 0
    assert len(attacked) == 4
    heading, _, *lines = attack_tables.ways(rows, attacked)
    assert [line.split(" | ")[0] for line in lines] == [
        f"| {attack_tables.WAYS[name]}" for name in made
    ]
    assert all(line.count("|") == heading.count("|") for line in lines)
    columns = {row.attack: row.columns["robust"] for row in attacked[:2]}
    assert f"{columns['standard']:.4f} |" in lines[0]
    assert (rows, attacked) == remedies.run(settings, Console(file=io.StringIO()))
