"""What is to keep one step from being fooled: the length of the step, and aligned gradients."""

import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from experiments import protocol, remedies
from experiments.models import function, init, mlp
from experiments.protocol import MultiStep, OneStep
from jaxadv import norms, objectives, perturb

KEY = jax.random.key(0)
NET = mlp((6, 5))


def problem():
    x = jax.random.uniform(jax.random.key(1), (12, 4, 4, 1))
    return init(NET, KEY, x), x, jnp.arange(12) % 10


def loss_of(objective):
    params, x, y = problem()
    return float(objective(params, None, (x, y), key=KEY, step=jnp.int32(3))[0])


def curved(params, x):
    """Logits (w . x + c |x|^2 / 2, 0), whose gradients are w + c x and 0."""
    w, c = params
    logit = x @ w + c * jnp.sum(x**2, axis=1) / 2
    return jnp.stack([logit, jnp.zeros_like(logit)], axis=1)


BOX = (-0.1, 0.9)


@pytest.mark.parametrize(("noise", "stride", "reach"), [(1.0, 1.25, 1.0), (0.5, 1.0, 2.0)])
def test_the_step_starts_ends_and_stops_where_it_is_told(noise, stride, reach):
    params, x, y = problem()
    eps = jnp.float32(0.7)
    r = protocol.one_step(
        function(NET), params, x, y, eps=eps, noise=noise, stride=stride, reach=reach, key=KEY,
        bounds=(-9.0, 9.0),
    )  # fmt: skip
    start = norms.sample(jax.random.split(KEY, 12), x, noise * eps, "l2")
    step = perturb.loss(function(NET), params, x + start, y, eps=stride * eps)
    end = np.asarray(start + step, np.float64).reshape(12, -1)
    size = np.linalg.norm(end, axis=1, keepdims=True)
    want = end * np.minimum(1, reach * 0.7 / size)
    np.testing.assert_allclose(r.reshape(12, -1), want, rtol=1e-5, atol=1e-6)
    assert (size > reach * 0.7).all() == (reach == 1)


def test_the_step_stays_in_the_box():
    params, x, y = problem()
    r = protocol.one_step(
        function(NET), params, x, y, eps=jnp.float32(2.0), noise=1.0, stride=1.0, reach=2.0,
        key=KEY, bounds=BOX,
    )  # fmt: skip
    inside = (x <= BOX[1]) & (x + r >= BOX[0])
    assert bool(jnp.all(inside & (x + r <= BOX[1]) | (x > BOX[1]) & (r <= 0)))
    assert bool(jnp.any(x + r == BOX[1]))


def test_without_noise_it_is_lwas():
    method = OneStep((6, 5), 1, 0.1, eps=0.7)
    by_hand = objectives.adversarial(function(NET), perturb.loss, eps=0.7, bounds=BOX)
    got = loss_of(protocol.make_objective(NET, method, 10, BOX))
    np.testing.assert_allclose(got, loss_of(by_hand), rtol=1e-6)


def test_with_noise_it_is_not():
    one, other = (OneStep((6, 5), 1, 0.1, eps=0.7, noise=noise) for noise in (0.0, 1.0))
    assert loss_of(protocol.make_objective(NET, one, 10, BOX)) != loss_of(
        protocol.make_objective(NET, other, 10, BOX)
    )


def test_aligned_gradients_cost_nothing_and_turned_ones_the_weight_of_their_angle():
    x, y = jax.random.normal(jax.random.key(3), (400, 3)), jnp.zeros(400, jnp.int32)
    natural = objectives.natural(curved)
    w, eps, weight = jnp.array([1.0, -2.0, 0.5]), 0.5, 3.0

    def penalty(c):
        objective = protocol.aligned(natural, curved, eps, weight)
        args = (w, jnp.float32(c)), None, (x, y)
        with_it, without = (o(*args, key=KEY, step=jnp.int32(0))[0] for o in (objective, natural))
        return float(with_it - without)

    assert abs(penalty(0.0)) < 1e-5
    # In float64, the mean over the ball from many draws of our own.
    rng = np.random.default_rng(0)
    u = rng.normal(size=(200, *x.shape))
    r = eps * u / np.linalg.norm(u, axis=2, keepdims=True) * rng.random((200, 400, 1)) ** (1 / 3)
    at = np.asarray(w, np.float64) + 2.0 * np.asarray(x, np.float64)
    near = at + 2.0 * r
    sizes = np.linalg.norm(near, axis=2) * np.linalg.norm(at, axis=1)
    turned = 1 - np.sum(at * near, axis=2) / sizes
    # One draw for each of 400 examples: the mean's own deviation is that of turned over sqrt(400).
    np.testing.assert_allclose(
        penalty(2.0), weight * turned.mean(), atol=4 * weight * turned.mean(axis=0).std() / 20
    )


def test_the_penalty_has_a_gradient_for_the_parameters_even_where_the_input_has_none():
    x, y = jnp.ones((4, 3)), jnp.zeros(4, jnp.int32)
    objective = protocol.aligned(objectives.natural(curved), curved, lambda step: 0.5, 1.0)

    def loss(params):
        return objective(params, None, (x, y), key=KEY, step=jnp.int32(0))[0]

    w, c = jax.grad(loss)((jnp.zeros(3), jnp.float32(0.0)))  # no gradient in x at all
    assert np.isfinite(w).all()
    assert np.isfinite(c)


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
