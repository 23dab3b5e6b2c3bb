"""The comparison of what keeps one step from being fooled."""

import io
from typing import get_args

import pytest
from rich.console import Console

from experiments import mnist, remedies
from experiments.lib import train_and_score
from experiments.lib.recipes import MultiStep, OneStep


def test_the_ways_differ_in_the_step_alone():
    settings = remedies.Settings()
    made = remedies.methods(settings)
    assert list(made) == list(remedies.NAMES)
    shared = {"widths", "epochs", "lr", "eps", "warmup", "average", "shift", "objective"}
    for field in shared:
        assert len({getattr(method, field) for method in made.values()}) == 1
    assert set(get_args(remedies.Way)) == set(remedies.NAMES)
    assert [m.alignment > 0 for m in made.values() if isinstance(m, OneStep)].count(True) == 1
    several = {name: m.steps for name, m in made.items() if isinstance(m, MultiStep)}
    assert several == {"best": 1, "four": 4}


def trained(method, seed, robust, eps=1.5):
    return {
        "method": method, "seed": seed, "eps": eps, "train_seconds": 40.0, "epochs": 4,
        "columns": {"validation": 0.99, "adv_loss": 0.9, "pgd": robust},
    }  # fmt: skip


def left(method, seed, robust, attack="standard", eps=1.5, n=500):
    return {
        "method": f"{method}, seed {seed}", "attack": attack, "eps": eps, "n": n,
        "columns": {"robust": robust},
    }  # fmt: skip


def test_a_line_is_of_one_way_and_size_and_of_autoattack_on_the_most_images():
    rows = [trained("four", 0, 0.8), trained("four", 1, 0.6), trained("four", 0, 0.1, eps=2.0)]
    attacked = [
        left("four", 0, 0.7), left("four", 1, 0.5), left("four", 0, 0.9, n=50),
        left("four", 0, 0.2, eps=2.0), left("start", 0, 0.3), left("four", 0, 0.95, "one-step"),
    ]  # fmt: skip
    label = remedies.NAMES["four"]
    assert remedies.table(rows, attacked)[2:] == [
        f"| {label} | 1.5 | 10.0 | 0.9900 ± 0.0000 | 0.9000 ± 0.0000 | 0.7000 ± 0.1414 | 0.9500 "
        "| 0.6000 ± 0.1414 |",
        f"| {label} | 2 | 10.0 | 0.9900 | 0.9000 | 0.1000 |  | 0.2000 |",
    ]


@pytest.mark.parametrize(
    "changes",
    [
        {"precision": "bfloat16"},
        {"coordinator": "localhost:1", "processes": 2, "process": 0},
    ],
    ids=["bfloat16", "processes"],
)
def test_what_autoattack_is_not_run_with_is_refused(changes):
    with pytest.raises(ValueError, match=r"--precision float32 and no --processes.*; leave these"):
        remedies.Settings(**changes)


def test_images_held_out_leave_the_test_images_alone(tmp_path, monkeypatch):
    rows = [trained("four", 0, 0.8)]
    monkeypatch.setattr(remedies.protocol, "run", lambda *_: (rows, {}))
    monkeypatch.setattr(remedies.evaluate, "run", pytest.fail)
    settings = remedies.Settings(out=tmp_path, holdout=59_000)
    assert remedies.run(settings, Console(file=io.StringIO())) == (rows, [])


@pytest.mark.slow
def test_each_way_is_trained_attacked_and_set_beside_the_others(tmp_path, monkeypatch):
    few = {"widths": (5,), "epochs": 1, "lr": 0.05, "eps": 1.0}
    made = {"from_x": OneStep(**few), "four": MultiStep(**few)}
    monkeypatch.setattr(remedies, "methods", lambda settings: made)
    make_task = mnist.make_task

    def make_small(settings):
        task = make_task(settings)
        return task._replace(train=train_and_score.Images(*(part[:200] for part in task.train)))

    monkeypatch.setattr(mnist, "make_task", make_small)
    settings = remedies.Settings(
        out=tmp_path, n_eval=40, n_pgd=20, pgd_steps=2, curve=(0.0, 1.0), epochs=1, n_autoattack=4
    )
    rows, attacked = remedies.run(settings, Console(file=io.StringIO()))
    assert [row["method"] for row in rows] == ["from_x", "four"]
    assert len(attacked) == 4
    heading, _, *lines = remedies.table(rows, attacked)
    assert [line.split(" | ")[0] for line in lines] == [
        f"| {remedies.NAMES[name]}" for name in ("from_x", "four")
    ]
    assert all(line.count("|") == heading.count("|") for line in lines)
    columns = {row["attack"]: row["columns"]["robust"] for row in attacked[:2]}
    assert f"{columns['standard']:.4f} |" in lines[0]
    assert (rows, attacked) == remedies.run(settings, Console(file=io.StringIO()))
