"""`experiments/features.py`, as far as it needs no other library."""

import numpy as np
from rows import problem_of

from experiments import features
from experiments.lib import models, records


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
