"""`experiments/features.py`, as far as it needs no other library."""

import jax
import numpy as np

from experiments import features
from experiments.lib import models, problems, records


def problem_of(net, n=3):
    rng = np.random.default_rng(0)
    x = 0.4 + 0.2 * rng.random((n, 2, 2, 1), np.float32)  # far from the edges of the box
    params = models.init(net, jax.random.key(0), x)
    return problems.Problem(models.function(net), params, x, np.arange(n), (0.0, 1.0), {})


def test_each_question_is_answered_or_gives_an_error():
    net = models.mlp((7,))
    problem = problem_of(net, 6)
    y = np.asarray(problem.apply_fn(problem.params, problem.x)).argmax(-1)
    asked = features.questions(problem.params, problem.x, y, eps=1.0)
    ours = {name: features.asked(question, features.by_us) for name, question in asked.items()}
    assert ours["a size for each image"] == "yes"
    assert ours["images one by one and together"] == "the same"
    assert ours["one-hot labels"].startswith("TypeError: expected integer labels")
    for name in asked:
        if name.startswith("accuracy left"):
            assert 0 <= float(ours[name]) <= 1
    row = records.FeaturesRow(
        experiment="features",
        answers={"q": dict.fromkeys(features.ATTACKS, "a|b")},
        n=3,
        eps=1.0,
        versions={"jax": "1"},
        device="cpu",
    )
    text = features.as_markdown(row)
    assert "| q | a/b | a/b |" in "\n".join(text)
