"""The comparison of what keeps one step from being fooled."""

import io

import pytest
from rich.console import Console

from experiments import remedies
from experiments.recipes import MultiStep, OneStep


def test_the_ways_differ_in_the_step_alone():
    settings = remedies.Settings()
    made = remedies.methods(settings)
    assert list(made) == list(remedies.NAMES)
    shared = {"widths", "epochs", "lr", "eps", "warmup", "average", "shift", "objective"}
    for field in shared:
        assert len({getattr(method, field) for method in made.values()}) == 1
    assert [m.alignment > 0 for m in made.values() if isinstance(m, OneStep)].count(True) == 1
    several = {name: m.steps for name, m in made.items() if isinstance(m, MultiStep)}
    assert several == {"best": 1, "four": 4}


@pytest.mark.slow
def test_each_way_is_trained_attacked_and_set_beside_the_others(tmp_path, monkeypatch):
    few = {"widths": (5,), "epochs": 1, "lr": 0.05, "eps": 1.0}
    made = {"from_x": OneStep(**few), "four": MultiStep(**few)}
    monkeypatch.setattr(remedies, "methods", lambda settings: made)
    settings = remedies.Settings(
        out=tmp_path, holdout=59_800, n_eval=40, n_pgd=20, pgd_steps=2, curve=(0.0, 1.0),
        epochs=1, n_autoattack=4,
    )  # fmt: skip
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
