"""The gallery: its exact direction, and that every picture is drawn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from rows import problem_of

from experiments import gallery
from experiments.lib import models


def test_the_exact_direction_is_that_of_the_margin():
    net = models.mlp((7, 6))
    problem = problem_of(net)

    def margin(x):
        logits = 3.0 * problem.apply_fn(problem.params, x)
        own = jnp.take_along_axis(logits, problem.y[:, None], 1)[:, 0]
        others = jnp.where(jax.nn.one_hot(problem.y, 10) > 0, -jnp.inf, logits)
        return (jax.nn.logsumexp(others, axis=1) - own).sum()

    g = np.asarray(jax.grad(margin)(jnp.asarray(problem.x))).reshape(3, -1)
    found = gallery.exact_direction(problem, 3.0)
    np.testing.assert_allclose(found, g / np.linalg.norm(g, axis=1, keepdims=True), atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-12)


@pytest.mark.slow
def test_every_picture_is_drawn(tmp_path):
    settings = gallery.Settings(n=40, out=tmp_path)
    gallery.run(settings, Console(quiet=True))
    for name in gallery.PICTURES:
        with Image.open(tmp_path / f"{name}.png") as picture:
            assert min(picture.size) > 300
            assert len(np.unique(np.asarray(picture.convert("L")))) > 50
