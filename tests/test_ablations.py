"""The ablations: nets that differ in one respect, with a table for each question."""

import dataclasses
import io

import jax
import jax.numpy as jnp
import pytest
from rich.console import Console

from experiments import ablations
from experiments.lib import recipes, records
from experiments.lib.models import init, mlp
from experiments.lib.recipes import Adversarial


def test_every_net_of_every_question_is_made_and_no_other():
    made = ablations.Settings().nets()
    assert set(made) == {name for group in ablations.GROUPS.values() for name in group.values()}
    assert all(method.widths == (500, 500) for method in made.values())
    assert {method.epochs for method in made.values()} == {15}


def test_a_question_needs_only_its_own_nets():
    settings = ablations.Settings(groups=("split of LWA_Rep",))
    assert list(settings.nets()) == ["lwa", "rep_1", "rep_2"]


@pytest.mark.parametrize(
    ("question", "differs"),
    [
        ("inner adversary of LWA", {"adversary"}),
        ("training size of LWA", {"eps"}),
        ("split of LWA_Rep", {"split", "objective", "eps", "warmup", "lr"}),
    ],
)
def test_a_questions_nets_differ_only_in_what_it_asks(question, differs):
    made = ablations.Settings(groups=(question,)).nets()
    nets = [dataclasses.asdict(method) for method in made.values()]
    assert {field for field in nets[0] if len({net[field] for net in nets}) > 1} == differs


@pytest.mark.slow
def test_each_objective_and_adversary_gives_a_different_loss():
    net = mlp((8, 7))
    x = jax.random.uniform(jax.random.key(0), (6, 28, 28, 1))
    params = init(net, jax.random.key(1), x)
    losses = {}
    for name, method in ablations.Settings().nets().items():
        if isinstance(method, Adversarial) and method.objective == "representation":
            continue
        objective = jax.jit(recipes.make_objective(net, method, 10))
        value, _ = objective(params, None, (x, jnp.arange(6)), key=jax.random.key(2), step=100)
        losses[name] = float(value)
    assert len(set(losses.values())) == len(losses)
    assert losses["normal"] == min(losses.values())
    assert losses["lwa_3.0"] == max(losses.values())


@pytest.mark.slow
def test_rows_say_which_questions_they_answer(tmp_path, monkeypatch):
    small = {
        "normal": recipes.Method((9,), 1, 0.1),
        "rep_1": Adversarial((9,), 1, 0.1, objective="representation", eps=0.1, split=1),
        "lwa": Adversarial((9,), 1, 0.1),
    }
    monkeypatch.setattr(ablations.Settings, "nets", lambda settings: small)
    monkeypatch.setattr(ablations, "WIDTHS", (9,))
    settings = ablations.Settings(
        out=tmp_path, holdout=59_600, n_eval=60, n_pgd=20, pgd_steps=2, curve=(0.0, 1.0)
    )
    rows = ablations.run(settings, Console(file=io.StringIO()))
    assert rows == records.load(tmp_path / "results.json", records.TableRow)
    assert {row.method: set(row.groups) for row in rows} == {
        "normal": {"objective"},
        "rep_1": {"split of LWA_Rep"},
        "lwa": set(ablations.GROUPS),
    }
    assert rows == ablations.run(settings, Console(file=io.StringIO()))
    assert (tmp_path / "ablations.png").exists()
