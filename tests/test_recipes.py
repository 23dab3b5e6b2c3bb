"""Training recipes: adversaries of one and several steps, averaged weights, shifted images."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.lib import recipes
from experiments.lib.models import function, init, mlp
from experiments.lib.recipes import FewSteps, MultiStep, OneStep
from jaxadv import attack, norms, objectives, perturb, train

KEY = jax.random.key(0)
NET = mlp((6, 5))
BOX = (0.0, 1.0)


def problem():
    x = jax.random.uniform(jax.random.key(1), (12, 4, 4, 1))
    return init(NET, KEY, x), x, jnp.arange(12) % 10


few_steps = functools.partial(recipes.few_steps, step=perturb.loss, steps=1)


def value(objective):
    params, x, y = problem()
    loss, (_, aux) = objective(params, None, (x, y), key=KEY, step=jnp.int32(3))
    return loss, aux


METHODS = {
    "multi": (
        MultiStep((6, 5), 1, 0.1, eps=0.7, steps=4),
        lambda **kwargs: objectives.adversarial(
            function(NET), lambda *args, **kw: attack.pgd(*args, steps=4, random_start=True, **kw),
            **kwargs,
        ),
    ),
    "mixed": (
        MultiStep((6, 5), 1, 0.1, eps=0.7, steps=2, random_start=False, objective="mixed"),
        lambda **kwargs: objectives.mixed(
            function(NET), lambda *args, **kw: attack.pgd(*args, steps=2, **kw), **kwargs
        ),
    ),
    "trades": (
        MultiStep((6, 5), 1, 0.1, eps=0.7, steps=3, objective="virtual", weight=6.0),
        lambda **kwargs: objectives.kl_regularized(
            function(NET), lambda *args, **kw: attack.pgd_kl(*args, steps=3, **kw), weight=6.0,
            **kwargs,
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", METHODS)
def test_a_multi_step_method_makes_its_objective_with_the_box(name):
    method, make = METHODS[name]
    got, aux = value(recipes.make_objective(NET, method, 10))
    want, want_aux = value(make(eps=0.7, bounds=BOX))
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(aux.accuracy, want_aux.accuracy)
    free, _ = value(make(eps=0.7))
    assert free != got  # the box is binding


def test_the_size_rises_over_the_warmup_epochs():
    method = MultiStep((6, 5), 4, 0.1, eps=0.8, warmup=2, steps=1)
    _, aux = value(recipes.make_objective(NET, method, 3))  # step 3 of 6
    np.testing.assert_allclose(aux.eps, 0.4, rtol=1e-6)


def test_the_average_is_of_all_steps_at_first_and_then_decays():
    decay, tx = 0.75, optax.chain(optax.sgd(0.1), recipes.averaging(0.75))
    params = {"w": jnp.array([1.0, -2.0])}
    state = tx.init(params)
    seen, want = [], None
    for step in range(1, 9):
        grads = {"w": params["w"] * step}
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        seen.append(np.asarray(params["w"], np.float64))
        if step <= 4:  # as long as 1 / step >= 1 - decay
            want = np.mean(seen, axis=0)
        else:
            want = decay * want + (1 - decay) * seen[-1]
        average = optax.tree_utils.tree_get(state, "average")["w"]
        np.testing.assert_allclose(average, want, rtol=1e-6)


def test_the_average_is_found_in_a_net_with_a_layer_of_that_name():
    params = {"average": jnp.ones(2)}
    tx = recipes.optimiser(MultiStep((), 2, 0.1, average=0.9), 5, recipes.Optimiser())
    state = train.init(params, tx, key=KEY)
    result = recipes.result(MultiStep((), 2, 0.1, average=0.9), state)
    np.testing.assert_array_equal(result["average"], params["average"])


def test_the_result_is_the_average_if_there_is_one():
    params, x, y = problem()
    for average in (0.0, 0.9):
        method = MultiStep((6, 5), 2, 0.1, eps=0.7, steps=1, average=average)
        tx = recipes.optimiser(method, 5, recipes.Optimiser())
        state = train.init(params, tx, key=KEY)
        step = train.make_step(recipes.make_objective(NET, method, 5), tx)
        for _ in range(3):
            state, _ = step(state, (x, y))
        result, last = (
            jax.tree.leaves(tree) for tree in (recipes.result(method, state), state.params)
        )
        same = [np.array_equal(one, other) for one, other in zip(result, last, strict=True)]
        assert all(same) == (average == 0)
        assert not average or not any(same)


def test_images_are_shifted_independently_by_at_most_the_given_pixels():
    x = jnp.zeros((500, 5, 6, 2)).at[:, 2, 3, 1].set(jnp.arange(1, 501))
    moved = np.asarray(recipes.shifted(1)(KEY, x))
    example, row, column, channel = np.nonzero(moved)
    np.testing.assert_array_equal(example, np.arange(500))
    np.testing.assert_array_equal(moved[moved > 0], np.arange(1, 501))
    assert set(channel) == {1}
    # All nine shifts, about equally often: 500 / 9 = 56, standard deviation 7.
    _, counts = np.unique((row - 2) * 3 + column - 3, return_counts=True)
    assert len(counts) == 9
    assert 56 - 5 * 7 < min(counts) <= max(counts) < 56 + 5 * 7
    assert (abs(row - 2) <= 1).all()
    assert (abs(column - 3) <= 1).all()


def test_pixels_shifted_out_of_the_image_are_lost():
    x = jnp.ones((300, 3, 3, 1))
    left = np.asarray(recipes.shifted(2)(KEY, x)).sum(axis=(1, 2, 3))
    assert set(left) == {9.0, 6.0, 3.0, 4.0, 2.0, 1.0}  # 1 to 3 rows times 1 to 3 columns


# Remembered perturbations


def ending(change):
    """An objective whose aux has `change` of r."""

    def objective(params, model_state, batch, /, *, key, step):
        aux = objectives.Aux(0.0, 0.0, 0, 0, change(batch[2]))
        return jnp.float32(0), (batch, aux)

    return objective


def test_a_perturbation_is_shifted_with_its_image_and_back():
    x = jnp.arange(1.0, 1 + 40 * 12).reshape(40, 4, 3, 1)  # pixels are different numbers, none 0
    r = -x
    moving = recipes.augmented(ending(lambda r: r - 1000), recipes.shifted(2))
    _, ((moved_x, _, moved_r), aux) = moving(None, None, (x, x[:, 0, 0, 0], r), key=KEY, step=0)
    np.testing.assert_array_equal(moved_r, -moved_x)
    kept = np.stack([np.isin(a, b) for a, b in zip(np.asarray(x), moved_x, strict=True)])
    assert 0.2 < kept.mean() < 0.8
    # Changes in the area that the shift filled in are lost.
    np.testing.assert_array_equal(aux.r, np.where(kept, r - 1000, r))


def test_shifting_perturbations_with_unscaled_images_is_an_error():
    x = jnp.zeros((2, 4, 3, 1), jnp.uint8)
    moving = recipes.augmented(ending(lambda r: r), recipes.shifted(1))
    with pytest.raises(TypeError, match=r"dtype, float32, got uint8; scale them first"):
        moving(None, None, (x, jnp.zeros(2), jnp.zeros(x.shape)), key=KEY, step=0)


@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_perturbations_are_drawn_anew_every_few_epochs(noise):
    _, x, y = problem()
    r = 3 + 0 * x
    method = FewSteps((6, 5), 9, 0.1, eps=0.5, noise=noise, memory=3)
    renew = recipes.renewed(ending(lambda r: r), method, 10)
    new = norms.sample(jax.random.split(jax.random.split(KEY)[0], len(x)), x, noise * 0.5, "l2")
    for step in (0, 9, 10, 29, 30, 39, 40):
        _, (_, aux) = renew(None, None, (x, y, r), key=KEY, step=jnp.int32(step))
        np.testing.assert_array_equal(aux.r, new if step // 10 in (0, 3) else r)


@pytest.mark.parametrize("steps", [1, 3])
def test_steps_of_adv_loss_from_a_point_are_those_of_pgd(steps):
    params, x, y = problem()
    eps, start = jnp.full(len(x), 0.7), jax.random.normal(KEY, x.shape)
    r = few_steps(
        function(NET), params, x, y, steps=steps, eps=eps, noise=0.3, stride=0.4, reach=1.0,
        key=KEY, bounds=BOX, start=start,
    )  # fmt: skip
    want = attack.pgd(
        function(NET), params, x, y, eps=eps, steps=steps, step_size=0.4 * eps, start=start,
        keep="last", bounds=BOX,
    )  # fmt: skip
    # A direction computed in two ways, each off by a few 2^-24 of its largest entries.
    np.testing.assert_allclose(r, want, atol=3e-6)


def test_steps_of_alpha_go_to_the_nearest_of_the_candidates():
    params, x, _ = problem()
    y, losses = function(NET)(params, x).argmax(axis=1), []  # all classified correctly
    for candidates, compared in ((1, 1), (0, None)):
        method = FewSteps((6, 5), 1, 0.1, eps=0.7, adversary="alpha", candidates=candidates)
        nearest = functools.partial(perturb.alpha, candidates=compared)
        by_hand = objectives.adversarial(function(NET), nearest, eps=0.7, bounds=BOX)
        got, want = (
            objective(params, None, (x, y), key=KEY, step=jnp.int32(0))[0]
            for objective in (recipes.make_objective(NET, method, 10), by_hand)
        )
        np.testing.assert_allclose(got, want, rtol=1e-6)
        losses.append(round(float(got), 5))
    assert losses[0] != losses[1]


def test_an_adversary_with_a_memory_starts_where_the_last_epoch_ended():
    method = FewSteps((6, 5), 1, 0.1, eps=0.7, stride=0.4, memory=2, steps=2)
    params, x, y = problem()
    objective = recipes.renewed(recipes.make_objective(NET, method, 5), method, 5)
    start = 0.3 * jax.random.normal(KEY, x.shape)
    for step, r in ((3, 0 * start), (7, start)):
        _, (_, aux) = objective(params, None, (x, y, start), key=KEY, step=jnp.int32(step))
        want = attack.pgd(
            function(NET), params, x, y, eps=0.7, steps=2, step_size=0.4 * 0.7, start=r,
            keep="last", bounds=BOX,
        )  # fmt: skip
        np.testing.assert_allclose(aux.r, want, atol=3e-6)


def curved(params, x):
    """Logits (w . x + c |x|^2 / 2, 0), whose gradients are w + c x and 0."""
    w, c = params
    logit = x @ w + c * jnp.sum(x**2, axis=1) / 2
    return jnp.stack([logit, jnp.zeros_like(logit)], axis=1)


@pytest.mark.parametrize(("noise", "stride", "reach"), [(1.0, 1.25, 1.0), (0.5, 1.0, 2.0)])
def test_noise_stride_and_reach_set_start_length_and_end_of_the_step(noise, stride, reach):
    params, x, y = problem()
    eps = jnp.float32(0.7)
    r = few_steps(
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


def test_random_starts_take_a_key_for_each_example():
    params, x, y = problem()
    r, same = (
        few_steps(
            function(NET), params, x, y, eps=jnp.float32(0.7), noise=1.0, stride=1.0, reach=1.0,
            key=key, bounds=(-9.0, 9.0),
        )
        for key in (KEY, jax.random.split(KEY, 12))
    )  # fmt: skip
    np.testing.assert_array_equal(r, same)


def test_the_step_stays_in_the_box():
    params, x, y = problem()
    r = few_steps(
        function(NET), params, x, y, eps=jnp.float32(2.0), noise=1.0, stride=1.0, reach=2.0,
        key=KEY, bounds=BOX,
    )  # fmt: skip
    inside = (x <= BOX[1]) & (x + r >= BOX[0])
    assert bool(jnp.all(inside & (x + r <= BOX[1]) | (x > BOX[1]) & (r <= 0)))
    assert bool(jnp.any(x + r == BOX[1]))


def test_without_noise_one_step_is_lwa():
    method = OneStep((6, 5), 1, 0.1, eps=0.7)
    by_hand = objectives.adversarial(function(NET), perturb.loss, eps=0.7, bounds=BOX)
    got = value(recipes.make_objective(NET, method, 10))[0]
    np.testing.assert_allclose(got, value(by_hand)[0], rtol=1e-6)


def test_the_alignment_penalty_is_1_minus_the_cosine_of_the_gradients():
    x, y = jax.random.normal(jax.random.key(3), (400, 3)), jnp.zeros(400, jnp.int32)
    natural = objectives.natural(curved)
    w, eps, weight = jnp.array([1.0, -2.0, 0.5]), 0.5, 3.0

    def penalty(c):
        objective = recipes.aligned(natural, curved, eps, weight)
        args = (w, jnp.float32(c)), None, (x, y)
        with_it, without = (o(*args, key=KEY, step=jnp.int32(0))[0] for o in (objective, natural))
        return float(with_it - without)

    assert abs(penalty(0.0)) < 1e-5
    # The mean over the ball, in float64 from many independent draws.
    rng = np.random.default_rng(0)
    u = rng.normal(size=(200, *x.shape))
    r = eps * u / np.linalg.norm(u, axis=2, keepdims=True) * rng.random((200, 400, 1)) ** (1 / 3)
    at = np.asarray(w, np.float64) + 2.0 * np.asarray(x, np.float64)
    near = at + 2.0 * r
    sizes = np.linalg.norm(near, axis=2) * np.linalg.norm(at, axis=1)
    turned = 1 - np.sum(at * near, axis=2) / sizes
    # One draw for each of 400 examples: the deviation of their mean is smaller by sqrt(400).
    np.testing.assert_allclose(
        penalty(2.0), weight * turned.mean(), atol=4 * weight * turned.mean(axis=0).std() / 20
    )


def penalised(params, x, y):
    objective = recipes.aligned(objectives.natural(curved), curved, lambda step: 0.5, 1.0)
    return objective(params, None, (x, y), key=KEY, step=jnp.int32(0))[0]


def test_training_can_align_the_gradients():
    x, y = jax.random.normal(jax.random.key(3), (40, 3)), jnp.zeros(40, jnp.int32)

    def turned(c):
        params = jnp.array([1.0, -2.0, 0.5]), c
        args = params, None, (x, y)
        return penalised(params, x, y) - objectives.natural(curved)(*args, key=KEY, step=0)[0]

    c, h = jnp.float32(2.0), 0.05
    difference = (turned(c + h) - turned(c - h)) / (2 * h)
    # Central differences: h^2 of truncation and 1e-7 / h of rounding in float32.
    np.testing.assert_allclose(jax.grad(turned)(c), difference, rtol=0.02, atol=1e-5)
    assert abs(difference) > 1e-3


def test_the_penaltys_gradients_are_finite_where_the_input_gradient_is_0():
    x, y = jnp.ones((4, 3)), jnp.zeros(4, jnp.int32)
    w, c = jax.grad(penalised)((jnp.zeros(3), jnp.float32(0.0)), x, y)
    assert np.isfinite(w).all()
    assert np.isfinite(c)


def test_a_rate_may_rise_until_the_last_epoch():
    recipes.check("normal", recipes.Method((6, 5), 2, 0.1), lr_warmup=1)


REFUSED = [
    ("lwa_multi", MultiStep((6, 5), 2, 0.1, eps=0.7, warmup=3), 0,
     r"--lwa-multi\.warmup to be at most 2, .* got 3; lower"),
    ("normal", recipes.Method((6, 5), 2, 0.1), 2,
     r"--lr-warmup to be less than 2, .*normal, got 2; lower"),
    ("start", OneStep((6, 5), 1, 0.1, eps=0.7, objective="mixed"), 0,
     r"--start\.adversary to be loss, got .* and .*; choose"),
    ("start", OneStep((6, 5), 1, 0.1, eps=0.7, adversary="alpha"), 0,
     r"--start\.adversary to be loss, got .* and .*; choose"),
    ("memory", FewSteps((6, 5), 1, 0.1, eps=0.7, adversary="virtual"), 0,
     r"--memory\.adversary to be loss or alpha, got adversarial and virtual; choose"),
    ("memory", FewSteps((6, 5), 1, 0.1, eps=0.7, candidates=2), 0,
     r"--memory\.candidates to be 0, got 2; only the adversary alpha"),
    ("four", MultiStep((6, 5), 1, 0.1, eps=0.7, adversary="alpha"), 0,
     r"--four\.adversary to be loss, got alpha; the adversary of several steps is PGD"),
    ("four", MultiStep((6, 5), 1, 0.1, eps=0.7, objective="representation"), 0,
     r"--four\.objective to be adversarial, mixed or virtual,"),
    ("four", MultiStep((6, 5), 1, 0.1, eps=0.7, weight=6.0), 0,
     r"--four\.weight to be 1, got 6; only the objective virtual .* is adversarial"),
    ("four", MultiStep((6, 5), 1, 0.1, eps=0.7, split=1), 0,
     r"--four\.split to be 0, got 1; only the objective representation .* is adversarial"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "method", "lr_warmup", "message"), REFUSED)
def test_inconsistent_recipes_are_refused(name, method, lr_warmup, message):
    with pytest.raises(ValueError, match=message):
        recipes.check(name, method, lr_warmup=lr_warmup)


def test_an_epoch_without_a_step_is_refused():
    with pytest.raises(ValueError, match=r"at least one step in an epoch.*smaller --batch-size"):
        recipes.optimiser(recipes.Method((6, 5), 2, 0.1), 0, recipes.Optimiser())
