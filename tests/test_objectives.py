"""`jaxadv.objectives` against explicit gradients, float64 NumPy and Danskin's theorem.

Objectives take the adversary as an argument, so most tests pass their own: one that returns a fixed
r, or one that records its arguments.
"""

import functools
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import references
from flax import linen as nn
from references import NORMS, edited

from jaxadv import attack, logistic, norms, objectives, perturb, train

B, D, H, K = 6, 5, 4, 3
KEY = jax.random.key(7)

# Sums of a dozen float32 terms, compiled in two different ways: a few roundings of 2^-24 each.
RTOL = 2e-6
ATOL = 2e-7

cross_entropy = optax.losses.softmax_cross_entropy_with_integer_labels


def mlp(params, x):
    h = jnp.tanh(x @ params["w1"] + params["b1"][None])
    return h @ params["w2"] + params["b2"][None]


def encode(params, x):
    return jnp.tanh(x @ params["w1"] + params["b1"][None])


def classify(params, h):
    return h @ params["w2"] + params["b2"][None]


def draw_params(seed):
    rng = np.random.default_rng(seed)
    shapes = {"w1": (D, H), "b1": (H,), "w2": (H, K), "b2": (K,)}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def draw_batch(seed=1):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(B, D)).astype(np.float32), np.arange(B) % K


PARAMS, BATCH = draw_params(12), draw_batch()
R = np.random.default_rng(2).normal(size=(B, D)).astype(np.float32)


def fixed(r):
    """An adversary that always returns r."""

    def perturb_fn(apply_fn, params, x, y, /, *, eps, key=None, bounds=None):
        return jnp.asarray(r, x.dtype)

    return perturb_fn


# Compiled, since op by op each call takes half a second.
adv_loss = jax.jit(perturb.loss, static_argnums=0)


def recorder(calls):
    """`perturb.loss`, which appends its arguments and its result to `calls`."""

    def perturb_fn(apply_fn, params, x, y, /, *, eps, key=None, bounds=None):
        r = adv_loss(apply_fn, params, x, y, eps=eps, bounds=bounds)
        calls.append(
            {"apply_fn": apply_fn, "params": params, "x": x, "eps": eps, "key": key, "r": r}
            | {"bounds": bounds}
        )
        return r

    return perturb_fn


def call(objective, params=PARAMS, batch=BATCH, model_state=None, step=0):
    """Call it op by op, so that a recorder sees concrete values."""
    return objective(params, model_state, batch, key=KEY, step=jnp.int32(step))


def trace(objective, batch=BATCH):
    """Trace it only, which is enough to raise errors."""
    jax.eval_shape(partial(objective, key=KEY, step=jnp.int32(0)), PARAMS, None, batch)


def value_and_grad(objective, params=PARAMS, batch=BATCH, model_state=None, step=0):
    """Return loss, gradient, aux, compiled."""
    compiled = jax.jit(jax.value_and_grad(objective, has_aux=True))
    (loss, (_, aux)), grad = compiled(params, model_state, batch, key=KEY, step=jnp.int32(step))
    return loss, grad, aux


@partial(jax.jit, static_argnames="apply_fn")
def mean_loss(params, x, y, apply_fn=mlp):
    z = apply_fn(params, x)
    return jnp.mean(jax.nn.logsumexp(z, axis=1) - z[jnp.arange(B), y])


def compiled_grad(function, *args, argnums=0):
    return jax.jit(jax.grad(function, argnums))(*args)


def every_objective(apply_fn=mlp, perturb_fn=perturb.loss, **kwargs):
    """Each factory over the same net and adversary, by name."""
    return {
        "natural": objectives.natural(apply_fn, **kwargs),
        "noisy": objectives.noisy(apply_fn, sigma=0.5, copies=2, consistency=5.0, **kwargs),
        "adversarial": objectives.adversarial(apply_fn, perturb_fn, eps=0.5, **kwargs),
        "mixed": objectives.mixed(apply_fn, perturb_fn, eps=0.5, **kwargs),
        "virtual": objectives.kl_regularized(apply_fn, perturb_fn, eps=0.5, **kwargs),
        "representation": objectives.representation(
            lambda params, x: x, apply_fn, perturb_fn, eps=0.5, **kwargs
        ),
    }


FACTORIES = tuple(every_objective())
every_factory = pytest.mark.parametrize("name", FACTORIES)


def close(got, want, rtol=RTOL, atol=ATOL):
    chex.assert_trees_all_close(got, want, rtol=rtol, atol=atol)


def furthest(a, b):
    """The largest difference between two trees, relative to the largest entry."""
    a, b = (np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(t)]) for t in (a, b))
    return np.abs(a - b).max() / np.abs(b).max()


# natural


def test_natural_is_the_mean_cross_entropy():
    x, y = BATCH
    h = np.tanh(x.astype(np.float64) @ PARAMS["w1"] + PARAMS["b1"])
    z = h @ PARAMS["w2"] + PARAMS["b2"]
    want = np.mean([-references.log_softmax(row)[label] for row, label in zip(z, y, strict=True)])
    loss, _, _ = value_and_grad(objectives.natural(mlp))
    np.testing.assert_allclose(loss, want, rtol=RTOL)


# adversarial, Equation 2


def test_adversarial_of_size_0_is_exactly_natural_training():
    tx = optax.adam(0.1)
    results = []
    for objective in (objectives.natural(mlp), objectives.adversarial(mlp, perturb.loss, eps=0.0)):
        state, step = train.init(PARAMS, tx, key=KEY), train.make_step(objective, tx)
        for _ in range(3):
            state, info = step(state, BATCH)
        results.append((state.params, info.loss))
    chex.assert_trees_all_equal(*results)


def test_adversarial_value_is_the_loss_at_the_perturbed_inputs():
    x, y = BATCH
    loss, _ = call(objectives.adversarial(mlp, fixed(R), eps=0.5))
    np.testing.assert_allclose(loss, mean_loss(PARAMS, x + R, y), rtol=RTOL)


def test_adversarial_gradient_holds_r_constant():
    x, y = BATCH
    _, grad, _ = value_and_grad(objectives.adversarial(mlp, perturb.loss, eps=0.5))
    r = adv_loss(mlp, PARAMS, x, y, eps=0.5)
    close(grad, compiled_grad(mean_loss, PARAMS, x + r, y))

    def through_r(params):
        return mean_loss(params, x + perturb.loss(mlp, params, x, y, eps=0.5), y)

    # r does depend on the parameters: differentiating through it gives another gradient.
    assert furthest(grad, compiled_grad(through_r, PARAMS)) > 1e-3


def test_training_works_with_an_adversary_that_has_no_derivative():
    x, y = BATCH

    def on_the_host(apply_fn, params, x, y, /, *, eps, key=None, bounds=None):
        # A callback has no derivative in any mode, and JAX raises if one is asked for.
        shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
        return jax.pure_callback(of_logits, shape, apply_fn(params, x))

    def of_logits(z):
        return np.sign(np.asarray(z)[:, :1]) * np.ones(D, np.float32)

    _, grad, _ = value_and_grad(objectives.adversarial(mlp, on_the_host, eps=0.5))
    close(grad, compiled_grad(mean_loss, PARAMS, x + of_logits(mlp(PARAMS, x)), y))


def in_l2(perturb_fn, norm):
    """Step 5 of Algorithm 2: divide the r* of an adversary in any norm by its l2 norm."""

    def rescaled(apply_fn, params, x, y, /, *, eps, key=None, bounds=None):
        r = perturb_fn(apply_fn, params, x, y, norm=norm)
        return norms.rescale(r, eps, "l2")

    return rescaled


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", ["alpha", "loss"])
def test_algorithm_2_normalises_in_l2_whatever_the_adversarys_norm(name, norm):
    # Algorithm 1 gives the minimal r; Adv_Loss needs a size, here 1.
    method = {"alpha": perturb.alpha, "loss": partial(perturb.loss, eps=1.0)}[name]
    x, y = BATCH
    y = np.argmax(mlp(PARAMS, x), axis=1)  # where r* isn't 0
    c = 0.3
    objective = jax.jit(objectives.adversarial(mlp, in_l2(method, norm), eps=c))
    loss, (_, aux) = objective(PARAMS, None, (x, y), key=KEY, step=0)
    star = np.asarray(jax.jit(lambda x: method(mlp, PARAMS, x, y, norm=norm))(x), np.float64)
    lengths = np.linalg.norm(star, axis=1, keepdims=True)
    pseudo = (x + c * star / lengths).astype(np.float32)  # x + c r*/||r*||_2
    np.testing.assert_allclose(np.linalg.norm(pseudo - x, axis=1), c, rtol=1e-5)
    assert int(aux.zero) == 0
    np.testing.assert_allclose(loss, cross_entropy(mlp(PARAMS, pseudo), y).mean(), rtol=RTOL)


@pytest.mark.parametrize("norm", NORMS)
def test_danskin_gradient_is_that_of_the_exact_maximum(norm, x64):
    rng = np.random.default_rng(3)
    w, x, y = rng.normal(size=D), rng.normal(size=(B, D)), np.arange(B) % 2
    eps, h = 0.3, 1e-6

    def maximum(w):  # Appendix A in closed form, in NumPy
        margins = (2 * y - 1) * (x @ w) - eps * references.length(w, references.DUAL[norm])
        return np.mean(np.log1p(np.exp(-margins)))

    lwa = objectives.adversarial(logistic.logits, partial(perturb.loss, norm=norm), eps=eps)
    loss, grad, _ = value_and_grad(lwa, w, (x, y))
    want = [(maximum(w + e) - maximum(w - e)) / (2 * h) for e in h * np.eye(D)]
    np.testing.assert_allclose(loss, maximum(w), rtol=1e-12)
    # Central differences: h^2 of truncation, 2^-53 / h = 1e-10 of rounding.
    np.testing.assert_allclose(grad, want, atol=1e-9)


# mixed


WEIGHTS = (0, 0.25, 0.5, 1)


@functools.cache
def natural_adversarial_and_mixed():
    """Loss and gradient of each, and of mixed at each weight, as one program."""
    several = [
        objectives.natural(mlp),
        objectives.adversarial(mlp, perturb.loss, eps=0.5),
        *[objectives.mixed(mlp, perturb.loss, eps=0.5, weight=weight) for weight in WEIGHTS],
    ]

    def all_of_them(params):
        return [
            jax.value_and_grad(lambda params, one=one: call(one, params)[0])(params)
            for one in several
        ]

    natural, lwa, *mixed = jax.jit(all_of_them)(PARAMS)
    return natural, lwa, dict(zip(WEIGHTS, mixed, strict=True))


@pytest.mark.parametrize("weight", WEIGHTS)
def test_mixed_is_the_weighted_sum_of_natural_and_adversarial(weight):
    natural, lwa, mixed = natural_adversarial_and_mixed()
    want = jax.tree.map(lambda n, a: weight * n + (1 - weight) * a, natural, lwa)
    close(mixed[weight], want)
    assert furthest(natural, lwa) > 0.1


def test_weights_outside_their_range_raise():
    for weight in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="weight"):
            objectives.mixed(mlp, perturb.loss, eps=0.5, weight=weight)
    for weight in (-0.1, float("nan")):
        with pytest.raises(ValueError, match="weight"):
            objectives.kl_regularized(mlp, perturb.vat, eps=0.5, weight=weight)


# kl_regularized, virtual adversarial training


def test_virtual_value_is_cross_entropy_plus_weighted_divergence():
    x, y = BATCH
    weights = [PARAMS[name].astype(np.float64) for name in ("w1", "b1", "w2", "b2")]

    def net(x):
        return np.tanh(x @ weights[0] + weights[1]) @ weights[2] + weights[3]

    clean, moved = net(x.astype(np.float64)), net(x.astype(np.float64) + 3 * R)
    entropy = np.mean([-references.log_softmax(z)[k] for z, k in zip(clean, y, strict=True)])
    divergence = np.mean([references.kl(p, q) for p, q in zip(clean, moved, strict=True)])
    assert divergence > 0.1, divergence  # otherwise its weight would not be tested
    loss, _ = call(objectives.kl_regularized(mlp, fixed(3 * R), eps=0.5, weight=3.0))
    np.testing.assert_allclose(loss, entropy + 3 * divergence, rtol=RTOL)


def test_the_gradient_of_the_virtual_divergence_passes_only_through_the_perturbed_output():
    x, y = BATCH
    p = jax.nn.softmax(mlp(PARAMS, x))

    def explicit(params, p):
        log_q = jax.nn.log_softmax(mlp(params, x + R))
        # p is a constant, and so is p log p.
        divergence = jnp.sum(jax.scipy.special.xlogy(p, p) - p * log_q, axis=1)
        return mean_loss(params, x, y) + 3 * jnp.mean(divergence)

    _, grad, _ = value_and_grad(objectives.kl_regularized(mlp, fixed(R), eps=0.5, weight=3.0))
    close(grad, compiled_grad(explicit, PARAMS, p))
    through_p = compiled_grad(
        lambda params: explicit(params, jax.nn.softmax(mlp(params, x))), PARAMS
    )
    assert furthest(grad, through_p) > 1e-3


def test_virtual_ignores_masked_classes():
    def masked(params, x):
        z = mlp(params, x)
        return jnp.concatenate([z, jnp.full_like(z[:, :1], -jnp.inf)], axis=1)

    kept, with_mask = (
        value_and_grad(objectives.kl_regularized(net, fixed(R), eps=0.5)) for net in (mlp, masked)
    )
    chex.assert_tree_all_finite(with_mask)
    close(with_mask[:2], kept[:2])


# noisy, Gaussian noise and consistency


def noise(copies, sigma):
    key, _ = jax.random.split(KEY)
    return sigma * np.asarray(jax.random.normal(key, (copies * B, D))).astype(np.float64)


@pytest.mark.parametrize(
    ("copies", "consistency", "entropy"), [(1, 0, 0), (1, 0, 2), (2, 5, 0.5), (3, 10, 0)]
)
def test_noisy_value_is_cross_entropy_plus_weighted_divergence_and_entropy(
    copies, consistency, entropy
):
    x, y = BATCH
    weights = [PARAMS[name].astype(np.float64) for name in ("w1", "b1", "w2", "b2")]
    moved = np.tile(x.astype(np.float64), (copies, 1)) + noise(copies, 0.7)
    z = np.tanh(moved @ weights[0] + weights[1]) @ weights[2] + weights[3]
    log_p = np.array([references.log_softmax(row) for row in z]).reshape(copies, B, K)
    mean = np.exp(log_p).mean(axis=0)
    plain = -np.mean(log_p[:, np.arange(B), y])
    divergence = np.mean(np.sum(mean * (np.log(mean) - log_p), axis=2))
    spread = -np.mean(np.sum(mean * np.log(mean), axis=1))
    loss, (_, aux) = call(
        objectives.noisy(mlp, sigma=0.7, copies=copies, consistency=consistency, entropy=entropy)
    )
    np.testing.assert_allclose(loss, plain + consistency * divergence + entropy * spread, rtol=RTOL)
    assert divergence > 0.01 or copies == 1
    right = z.argmax(axis=1) == np.tile(y, copies)
    np.testing.assert_allclose(aux.accuracy, right.mean(), rtol=1e-6)


def test_noisy_gradients_pass_through_the_mean():
    x, y = BATCH
    moved = jnp.asarray(np.tile(x, (2, 1)) + noise(2, 0.7), jnp.float32)

    def explicit(params):
        p = jax.nn.softmax(mlp(params, moved)).reshape(2, B, K)
        mean = p.mean(axis=0)
        divergence = jnp.sum(mean[None] * (jnp.log(mean)[None] - jnp.log(p)), axis=2).mean()
        spread = -jnp.sum(mean * jnp.log(mean), axis=1).mean()
        plain = -jnp.mean(jnp.log(p)[:, jnp.arange(B), y])
        return plain + 5 * divergence + 0.5 * spread

    objective = objectives.noisy(mlp, sigma=0.7, copies=2, consistency=5.0, entropy=0.5)
    _, grad, _ = value_and_grad(objective)
    close(grad, compiled_grad(explicit, PARAMS))


def test_noisy_ignores_masked_classes():
    def masked(params, x):
        z = mlp(params, x)
        return jnp.concatenate([z, jnp.full_like(z[:, :1], -jnp.inf)], axis=1)

    kept, with_mask = (
        value_and_grad(objectives.noisy(net, sigma=1.0, copies=2, consistency=5.0, entropy=0.5))
        for net in (mlp, masked)
    )
    chex.assert_tree_all_finite(with_mask)
    close(with_mask[:2], kept[:2])


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"sigma": 0.0}, "finite sigma > 0, got 0.0; without noise, use natural"),
        ({"sigma": np.inf}, "finite sigma > 0, got inf"),
        ({"copies": 0}, "copies >= 1, got 0"),
        ({"consistency": -1.0, "copies": 2}, "weights >= 0, got consistency=-1.0"),
        ({"entropy": -1.0}, "weights >= 0"),
        ({"consistency": 1.0}, "copies >= 2 for consistency, got 1"),
    ],
)
def test_arguments_that_noisy_refuses(kwargs, message):
    with pytest.raises(ValueError, match=message):
        objectives.noisy(mlp, **{"sigma": 0.5, **kwargs})


# representation, Equation 4


def rep(eps=0.5, perturb_fn=perturb.loss):
    return objectives.representation(encode, classify, perturb_fn, eps=eps)


@pytest.mark.parametrize("relative", [False, True])
def test_representation_gradients_are_those_of_algorithm_3(relative):
    x, y = BATCH

    @jax.jit
    def algorithm_3(params):
        h, back = jax.vjp(lambda params: encode(params, x), params)
        # A relative size is held constant too, although it depends on the encoder.
        eps = 0.5 * jnp.sqrt(jnp.sum(h**2, axis=1)) if relative else 0.5
        r = perturb.loss(classify, params, h, y, eps=eps)
        # Step 10: the classifier part at h + r. Step 12: dl/dh at h + r, times dh/dW at x.
        loss = partial(mean_loss, apply_fn=classify)
        value, (of_params, of_h) = jax.value_and_grad(loss, (0, 1))(params, h + r, y)
        return value, jax.tree.map(jnp.add, of_params, *back(of_h))

    def through_r(params):
        h = encode(params, x)
        eps = 0.5 * jnp.sqrt(jnp.sum(h**2, axis=1)) if relative else 0.5
        return mean_loss(params, h + perturb.loss(classify, params, h, y, eps=eps), y, classify)

    loss, grad, _ = value_and_grad(rep(eps=objectives.Relative(0.5) if relative else 0.5))
    close((loss, grad), algorithm_3(PARAMS))
    assert furthest(grad, compiled_grad(through_r, PARAMS)) > 1e-3


@pytest.mark.parametrize("norm", NORMS)
def test_representation_with_a_relative_size_moves_h_by_a_fraction_of_its_norm(norm):
    calls = []
    call(rep(eps=objectives.Relative(0.25, norm), perturb_fn=recorder(calls)))
    h = np.asarray(encode(PARAMS, BATCH[0]))
    want = [0.25 * references.length(row, norm) for row in h]
    np.testing.assert_allclose(norms.norm(calls[0]["r"], "l2"), want, rtol=RTOL)


# Sizes

SCHEDULE = optax.linear_schedule(0.0, 1.0, 4)
# name: eps, and its sizes [B] at a step
SIZES = {
    "number": (0.5, lambda step: np.full(B, 0.5)),
    "schedule": (SCHEDULE, lambda step: np.full(B, step / 4)),
    "relative": (objectives.Relative(0.5), lambda step: 0.5 * np.linalg.norm(BATCH[0], axis=1)),
    "relative schedule": (
        objectives.Relative(SCHEDULE, "linf"),
        lambda step: step / 4 * np.abs(BATCH[0]).max(axis=1),
    ),
}


@pytest.mark.parametrize("name", SIZES)
def test_the_adversary_gets_the_size_of_its_step(name):
    eps, want = SIZES[name]
    for step in (0, 3):
        calls = []
        _, (_, aux) = call(objectives.adversarial(mlp, recorder(calls), eps=eps), step=step)
        np.testing.assert_allclose(np.broadcast_to(calls[0]["eps"], (B,)), want(step), rtol=RTOL)
        np.testing.assert_allclose(aux.eps, np.mean(want(step)), rtol=RTOL)


def test_a_size_that_changes_with_the_step_is_traced_once():
    chex.clear_trace_counter()
    objective = objectives.adversarial(mlp, perturb.loss, eps=SIZES["relative schedule"][0])
    compiled = jax.jit(chex.assert_max_traces(objective, n=1))
    for step in range(4):
        compiled(PARAMS, None, BATCH, key=KEY, step=jnp.int32(step))


def test_bounds_are_passed_on_and_respected():
    x, y = BATCH
    box = (-0.5, 0.5)
    for factory in (objectives.adversarial, objectives.mixed, objectives.kl_regularized):
        calls = []
        call(factory(mlp, recorder(calls), eps=1.0, bounds=box), batch=(np.clip(x, *box), y))
        assert calls[0]["bounds"] == box
        end = np.clip(x, *box) + calls[0]["r"]
        assert end.min() == -0.5
        assert end.max() == 0.5


# Nets with a train_fn


class Net(nn.Module):
    """A net with dropout and batch norm, which `train` switches."""

    @nn.compact
    def __call__(self, x, *, train):
        x = nn.Dense(H)(x)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
        x = nn.Dropout(0.5, deterministic=not train)(nn.relu(x))
        return nn.Dense(K)(x)


NET = Net()
VARIABLES = NET.init(jax.random.key(1), BATCH[0], train=False)


def net_apply(variables, x):
    params, stats = variables
    return NET.apply({"params": params, "batch_stats": stats}, x, train=False)


def net_train(params, stats, x, key):
    logits, updated = NET.apply(
        {"params": params, "batch_stats": stats},
        x,
        train=True,
        rngs={"dropout": key},
        mutable=["batch_stats"],
    )
    return logits, updated["batch_stats"]


def test_the_adversary_sees_the_deterministic_net_with_parameters_and_statistics():
    calls = []
    objective = objectives.adversarial(net_apply, recorder(calls), eps=0.5, train_fn=net_train)
    variables = VARIABLES["params"], VARIABLES["batch_stats"]
    call(objective, params=variables[0], model_state=variables[1])
    (seen,) = calls
    assert seen["apply_fn"] is net_apply
    chex.assert_trees_all_equal(seen["params"], variables)
    np.testing.assert_allclose(
        seen["r"], adv_loss(net_apply, variables, *BATCH, eps=0.5), rtol=RTOL, atol=ATOL
    )


def test_batch_norm_statistics_are_those_of_the_perturbed_batch():
    x, y = BATCH
    variables = VARIABLES["params"], VARIABLES["batch_stats"]
    objective = objectives.adversarial(net_apply, perturb.loss, eps=0.5, train_fn=net_train)
    tx = optax.sgd(0.0)
    state = train.init(variables[0], tx, model_state=variables[1], key=KEY)
    state, _ = train.make_step(objective, tx)(state, BATCH)
    r = adv_loss(net_apply, variables, x, y, eps=0.5)
    _, want = net_train(*variables, x + r, KEY)  # any key, as batch norm comes before dropout
    close(state.model_state, want)
    assert furthest(want, variables[1]) > 0.01


def test_two_passes_update_the_model_state_one_after_the_other():
    x, _ = BATCH
    variables = VARIABLES["params"], VARIABLES["batch_stats"]
    _, first = net_train(*variables, x, KEY)
    _, want = net_train(variables[0], first, x + R, KEY)
    for factory in (objectives.mixed, objectives.kl_regularized):
        objective = factory(net_apply, fixed(R), eps=0.5, train_fn=net_train)
        _, (got, _) = call(objective, params=variables[0], model_state=variables[1])
        close(got, want)


@every_factory
def test_without_a_train_fn_apply_fn_gets_the_model_state_which_stays_unchanged(name):
    def shifted(variables, x):
        params, shift = variables
        return mlp(params, x) + shift[None]

    shift = np.array([0.5, -1, 2], np.float32)
    moved = PARAMS | {"b2": PARAMS["b2"] + shift}
    want = call(every_objective()[name], params=moved)[0]
    got, (state, _) = call(every_objective(shifted)[name], model_state=shift)
    np.testing.assert_allclose(got, want, rtol=RTOL)
    np.testing.assert_array_equal(state, shift)


def test_each_step_has_new_and_different_keys_for_dropout_and_the_adversary():
    attack_keys, train_keys = [], []

    def perturb_fn(apply_fn, params, x, y, /, *, eps, key=None, bounds=None):
        attack_keys.append(tuple(jax.random.key_data(key).tolist()))
        return jnp.zeros_like(x)

    def train_fn(params, model_state, x, key):
        train_keys.append(tuple(jax.random.key_data(key).tolist()))
        return mlp(params, x), model_state

    objective = objectives.adversarial(mlp, perturb_fn, eps=0.5, train_fn=train_fn)
    for t in range(4):
        objective(PARAMS, None, BATCH, key=jax.random.fold_in(KEY, t), step=jnp.int32(t))
    assert len(attack_keys) == len(train_keys) == 4
    assert len({*attack_keys, *train_keys}) == 8


def test_the_two_passes_of_one_step_share_their_dropout():
    keys = []

    def train_fn(params, model_state, x, key):
        keys.append(jax.random.key_data(key).tolist())
        return mlp(params, x), model_state

    for factory in (objectives.mixed, objectives.kl_regularized):
        keys.clear()
        call(factory(mlp, fixed(R), eps=0.5, train_fn=train_fn))
        assert len(keys) == 2
        assert keys[0] == keys[1]


def test_representation_trains_each_part_with_its_own_train_fn():
    def encode_train(params, model_state, x, key):
        return 2 * encode(params, x), model_state + 1

    def classify_train(params, model_state, h, key):
        return classify(params, h), 10 * model_state

    calls = []
    objective = objectives.representation(
        encode,
        lambda variables, h: classify(variables[0], h),
        recorder(calls),
        eps=0.5,
        encode_train_fn=encode_train,
        classify_train_fn=classify_train,
    )
    loss, (model_state, _) = call(objective, model_state=jnp.float32(1))
    h = 2 * encode(PARAMS, BATCH[0])
    np.testing.assert_allclose(
        loss, mean_loss(PARAMS, h + calls[0]["r"], BATCH[1], classify), rtol=RTOL
    )
    assert model_state == 20


# Losses and labels


@every_factory
def test_losses_logits_and_labels_of_a_wrong_kind_raise(name):
    def mean(logits, labels):
        return jnp.mean(cross_entropy(logits, labels))

    x, y = BATCH
    one_hot = np.eye(K, dtype=np.float32)[y]
    for error, match, labels, objective in (
        (ValueError, "leave out the mean", y, every_objective(loss_fn=mean)),
        (ValueError, r"expected .*logits.*got", y, every_objective(lambda p, x: mlp(p, x)[:2])),
        (TypeError, r"expected .*logits.*got", y, every_objective(lambda p, x: (mlp(p, x), x))),
        (ValueError, r"expected .*labels.*got", y[:2], every_objective()),
        (TypeError, r"expected integer labels.*argmax", one_hot, every_objective()),
    ):
        with pytest.raises(error, match=match):
            trace(objective[name], batch=(x, labels))


@every_factory
@pytest.mark.parametrize("label", [-1, K])
def test_a_label_out_of_range_makes_the_loss_nan_and_has_no_gradient(name, label):
    x, y = BATCH
    bad = np.where(np.arange(B) == 2, label, y)
    objective = every_objective()[name]
    if name == "virtual":  # its divergence doesn't depend on labels
        objective = objectives.kl_regularized(mlp, perturb.loss, eps=0.5, weight=0.0)
    if name == "noisy":  # nor does its consistency; fewer examples would get other noise
        objective = objectives.noisy(mlp, sigma=1e-9)
    differentiated = jax.jit(
        jax.value_and_grad(partial(objective, key=KEY, step=jnp.int32(0)), has_aux=True)
    )
    (loss, (_, aux)), grad = differentiated(PARAMS, None, (x, bad))
    assert np.isnan(loss)
    rest = np.arange(B) != 2
    _, want = differentiated(PARAMS, None, (x[rest], y[rest]))
    close(grad, jax.tree.map(lambda leaf: leaf * (B - 1) / B, want))
    (_, (_, among)), _ = differentiated(PARAMS, None, (x[rest], y[rest]))
    np.testing.assert_allclose(aux.accuracy, among.accuracy * (B - 1) / B, rtol=1e-6)


def test_float_labels_for_a_users_loss_count_in_the_accuracy():
    x, y = BATCH

    def loss_fn(logits, y):
        return jnp.sum(logits, axis=1) * y

    objective = objectives.natural(mlp, loss_fn=loss_fn)
    _, (_, aux) = objective(PARAMS, None, (x, y.astype(np.float32)), key=KEY, step=jnp.int32(0))
    _, (_, want) = objectives.natural(mlp)(PARAMS, None, (x, y), key=KEY, step=jnp.int32(0))
    assert 0 < want.accuracy < 1
    assert aux.accuracy == want.accuracy


def test_soft_labels_train_against_pgd_on_a_soft_loss():
    x, y = BATCH
    soft = 0.9 * np.eye(K, dtype=np.float32)[y] + np.float32(0.1 / K)
    pgd = partial(attack.pgd, loss_fn=optax.losses.softmax_cross_entropy, steps=5)
    objective = objectives.adversarial(
        mlp, pgd, eps=0.5, loss_fn=optax.losses.softmax_cross_entropy
    )
    loss, grad, aux = value_and_grad(objective, batch=(x, soft))
    r = pgd(mlp, PARAMS, x, soft, eps=0.5)

    @jax.jit
    def explicit(params, x):
        return -jnp.mean(jnp.sum(soft * jax.nn.log_softmax(mlp(params, x)), axis=1))

    close((loss, grad), jax.value_and_grad(explicit)(PARAMS, x + r))
    assert loss > explicit(PARAMS, x)
    hits = np.argmax(mlp(PARAMS, x + r), axis=1) == y
    np.testing.assert_allclose(aux.accuracy, hits.mean(), rtol=RTOL)


# Aux


@pytest.mark.parametrize(
    "name", ["a schedule at 0", "sizes of examples", "relative to an input of 0"]
)
def test_examples_of_size_0_are_not_counted_as_zero(name):
    y, x = jnp.zeros(3, int), jnp.ones((3, 2)).at[1:].set(0)
    eps, counted = {
        "a schedule at 0": (optax.linear_schedule(0.0, 1.0, 10), 0),
        "sizes of examples": (jnp.array([1.0, 0.0, 1.0]), 2),
        "relative to an input of 0": (objectives.Relative(0.5), 1),
    }[name]
    objective = objectives.adversarial(lambda p, x: x, fixed(jnp.zeros((3, 2))), eps=eps)
    _, (_, aux) = objective(None, None, (x, y), key=KEY, step=jnp.array(0))
    assert int(aux.zero) == counted


def test_aux_counts_perturbations_that_are_zero_and_that_are_not_finite():
    r = R.copy()
    r[0] = r[2] = 0
    r[1, 1:] = 0  # except one entry
    r[3, 1], r[4, 0], r[5, 2] = np.nan, np.inf, -np.inf
    _, (_, aux) = call(objectives.adversarial(mlp, fixed(r), eps=0.5))
    assert (int(aux.zero), int(aux.nonfinite)) == (2, 3)


@pytest.mark.parametrize("name", FACTORIES[2:])
def test_aux_accuracy_is_that_at_the_perturbed_inputs(name):
    # Every x is classified correctly; x + r is the same row for all, right for its label only.
    x, _ = BATCH
    labels = np.asarray(jnp.argmax(mlp(PARAMS, x), axis=1))
    share = np.mean(labels == labels[0])
    assert share < 1
    objective = every_objective(perturb_fn=fixed(x[:1] - x))[name]
    _, (_, aux) = call(objective, batch=(x, labels))
    np.testing.assert_allclose(aux.accuracy, share, rtol=RTOL)


def test_aux_accuracy_of_labels_in_a_column_is_that_of_the_labels():
    x, _ = BATCH
    labels = jnp.argmax(mlp(PARAMS, x), axis=1)[:, None]
    assert labels.any()
    own = objectives.natural(
        mlp,
        loss_fn=lambda z, y: optax.softmax_cross_entropy_with_integer_labels(z, y[:, 0]),
    )
    _, (_, aux) = call(own, batch=(x, labels))
    assert float(aux.accuracy) == 1


def test_aux_counts_no_row_of_nan_as_correct():
    # argmax of a row of NaN is 0, which is the label of some.
    everything = np.full_like(R, np.nan)
    _, (_, aux) = call(objectives.adversarial(mlp, fixed(everything), eps=0.5))
    assert float(aux.accuracy) == 0


# Starting from earlier perturbations


def onward(apply_fn, params, x, y, /, *, eps, start=None, key=None, bounds=None):
    """One step from `start`, without a projection to the ball."""
    r = jnp.zeros_like(x) if start is None else start
    return r + perturb.loss(apply_fn, params, x + r, y, eps=eps)


@pytest.mark.parametrize("name", [name for name in FACTORIES[1:] if name != "noisy"])
def test_a_third_part_of_the_batch_is_the_adversarys_start_and_aux_has_its_end(name):
    objective, (x, y) = every_objective(perturb_fn=onward)[name], BATCH
    loss, grad, aux = value_and_grad(objective, batch=(x, y, R))
    want = onward(mlp, PARAMS, jnp.asarray(x), y, eps=0.5, start=R)
    np.testing.assert_allclose(aux.r, want, rtol=1e-5, atol=1e-6)
    # An adversary that returns the same r as a constant has the same gradient.
    by_hand = every_objective(perturb_fn=fixed(aux.r))[name]
    expected = value_and_grad(by_hand)
    assert expected[2].r is None
    chex.assert_trees_all_close((loss, grad), expected[:2], rtol=1e-5, atol=1e-6)


def test_no_derivative_passes_through_the_start():
    objective = objectives.adversarial(mlp, onward, eps=0.5)

    def loss(start):
        return call(objective, batch=(*BATCH, start))[0]

    np.testing.assert_array_equal(jax.grad(loss)(jnp.asarray(R)), 0)


def test_a_start_for_an_adversary_that_takes_none_is_an_error():
    with pytest.raises(TypeError, match=r"perturb_fn that takes start= .*, got .*loss.*; use"):
        trace(objectives.adversarial(mlp, perturb.loss, eps=0.5), (*BATCH, R))


N = 11
MEMORY = objectives.Memory(np.random.default_rng(3).normal(size=(N, D)).astype(np.float32))
PGD = objectives.adversarial(
    mlp, partial(attack.pgd, steps=1, step_size=0.4, keep="last"), eps=0.7, bounds=(-1.0, 1.0)
)


def data(n=N):
    rng = np.random.default_rng(4)
    x = rng.uniform(-1, 1, (n, D)).astype(np.float32)
    return jnp.asarray(x), jnp.arange(n) % K, jnp.arange(n)


def test_memory_gathers_and_scatters_as_a_hand_written_loop():
    (x, y, numbers), tx = data(), optax.sgd(0.1)
    order = jnp.array([[7, 0, 3], [10, 2, 7], [3, 4, 5]])
    memory, state = jnp.asarray(MEMORY.r), train.init(PARAMS, tx, key=KEY)
    step, losses = train.make_step(PGD, tx), []
    for index in order:
        state, info = step(state, (x[index], y[index], memory[index]))
        memory = memory.at[index].set(info.aux.r)
        losses.append(info.loss)
    start = train.init(PARAMS, tx, model_state=MEMORY, key=KEY)
    got, info = train.make_epoch(objectives.with_memory(PGD), tx)(start, (x, y, numbers), order)
    assert info.aux.r is None
    np.testing.assert_allclose(info.loss, losses, rtol=1e-5)
    np.testing.assert_allclose(got.model_state.r, memory, rtol=1e-4, atol=1e-5)
    chex.assert_trees_all_close(got.params, state.params, rtol=1e-4, atol=1e-5)
    rest = np.array([1, 6, 8, 9])  # no step visits these
    np.testing.assert_array_equal(np.asarray(got.model_state.r)[rest], MEMORY.r[rest])


def test_memory_also_holds_the_nets_own_state():
    def train_fn(params, model_state, x, key):
        return mlp(params, x), model_state + 1

    objective = objectives.adversarial(
        lambda variables, x: variables[1] * mlp(variables[0], x), onward, eps=0.5, train_fn=train_fn
    )
    x, y, index = (part[:4] for part in data())
    args = {"key": KEY, "step": jnp.int32(0)}
    memory = objectives.Memory(jnp.asarray(MEMORY.r), jnp.float32(3))
    got = objectives.with_memory(objective)(PARAMS, memory, (x, y, index), **args)
    want = objective(PARAMS, jnp.float32(3), (x, y, memory.r[:4]), **args)
    np.testing.assert_array_equal(got[0], want[0])
    assert got[1][0].model_state == 4
    np.testing.assert_array_equal(got[1][0].r[:4], want[1][1].r)


def test_a_memory_may_be_narrower_than_the_examples():
    objective = objectives.with_memory(objectives.adversarial(mlp, onward, eps=0.5))
    args = {"key": KEY, "step": jnp.int32(0)}
    x, y, index = (part[:4] for part in data())
    exact = objectives.Memory(jnp.zeros((N, D)))
    got, want = (
        objective(PARAMS, memory, (x, y, index), **args)[1][0].r
        for memory in (jax.tree.map(jnp.bfloat16, exact), exact)
    )
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got, want.astype(jnp.bfloat16))


def test_no_step_of_an_epoch_copies_the_memory():
    n = 4096
    tx, order = optax.sgd(0.1), jnp.arange(64).reshape(8, 8)
    memory = objectives.Memory(jnp.zeros((n, D)))
    state = train.init(PARAMS, tx, model_state=memory, key=KEY)
    epoch = train.make_epoch(objectives.with_memory(PGD), tx)
    used = epoch.lower(state, data(n), order).compile().memory_analysis()
    assert used.alias_size_in_bytes >= memory.r.nbytes  # donated
    assert used.temp_size_in_bytes < memory.r.nbytes


@pytest.mark.parametrize("wrong", [N, -1])
def test_an_index_outside_the_memory_makes_the_loss_nan(wrong):
    x, y, _ = (part[:3] for part in data())
    objective = objectives.with_memory(PGD)
    loss, (memory, _) = objective(
        PARAMS, MEMORY._replace(r=jnp.asarray(MEMORY.r)), (x, y, jnp.array([0, wrong, 2])), key=KEY,
        step=jnp.int32(0),
    )  # fmt: skip
    assert np.isnan(loss)
    np.testing.assert_array_equal(memory.r[3:], MEMORY.r[3:])


def test_an_example_starts_anew_after_a_perturbation_that_is_not_finite():
    x, y, index = data()
    objective = partial(objectives.with_memory(PGD), key=KEY, step=jnp.int32(0))
    memory = MEMORY._replace(r=jnp.asarray(MEMORY.r))
    loss, (memory, aux) = objective(PARAMS, memory, (x.at[1].set(np.nan), y, index))
    assert np.isnan(loss)
    assert int(aux.nonfinite) == 1
    np.testing.assert_array_equal(memory.r[1], 0)
    assert np.isfinite(objective(PARAMS, memory, (x, y, index))[0])


@pytest.mark.parametrize(
    ("model_state", "batch", "error", "message"),
    [
        (None, data(), TypeError, r"state Memory\(r, model_state\), got NoneType; pass .*init"),
        (MEMORY, data()[:2], TypeError, r"batch \(x, y, index\), got tuple; add .*arange"),
        (MEMORY, (*data()[:2], MEMORY.r), ValueError, r"integers \[11\], got float32 of .*11, 5"),
        (MEMORY._replace(r=R[:, :2]), data(), ValueError, r"start of x's shape \(11, 5\), got"),
    ],
)
def test_memories_and_indices_that_are_refused(model_state, batch, error, message):
    objective = partial(objectives.with_memory(PGD), key=KEY, step=jnp.int32(0))
    with pytest.raises(error, match=f"expected .*{message}"):
        jax.eval_shape(objective, PARAMS, model_state, batch)


# Dtypes


BFLOAT16 = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), PARAMS)


@every_factory
def test_a_bfloat16_net_has_a_float32_loss_and_bfloat16_gradients(name):
    x, y = BATCH
    differentiated = jax.value_and_grad(
        partial(every_objective()[name], key=KEY, step=jnp.int32(0)), has_aux=True
    )
    batch = (jnp.asarray(x, jnp.bfloat16), y)
    (loss, _), grad = jax.eval_shape(differentiated, BFLOAT16, None, batch)
    assert loss.dtype == jnp.float32
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(grad))


def test_a_bfloat16_net_is_perturbed_in_bfloat16_and_scored_in_float32():
    x, y = jnp.asarray(BATCH[0], jnp.bfloat16), BATCH[1]
    calls = []
    loss, _ = call(objectives.adversarial(mlp, recorder(calls), eps=0.5), BFLOAT16, (x, y))
    assert calls[0]["r"].dtype == jnp.bfloat16
    z = np.float64(mlp(BFLOAT16, x + calls[0]["r"]))
    # The logits are bfloat16, but the loss is computed from them in float32.
    want = [-references.log_softmax(row)[k] for row, k in zip(z, y, strict=True)]
    np.testing.assert_allclose(loss, np.mean(want), rtol=RTOL)


# Refused arguments


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda x, y: {"image": x, "label": y}, r"got \['image', 'label'\]; pass a pair"),
        (lambda x, y: (x, y, y), r"got tuple of 3, though .*; pass a pair"),
        (lambda x, y: x[:2], r"got \w+; pass a pair"),  # an array of two rows isn't a pair
    ],
)
def test_a_batch_is_a_pair(make, message):
    with pytest.raises(TypeError, match=rf"expected a batch \(x, y\), {message}"):
        trace(objectives.natural(mlp), make(*BATCH))


def test_an_empty_batch_is_an_error():
    with pytest.raises(ValueError, match="batch of at least one example, got none"):
        trace(objectives.natural(mlp), (BATCH[0][:0], BATCH[1][:0]))


def test_integer_inputs_of_an_adversary_are_an_error():
    with pytest.raises(TypeError, match=r"got int64; cast pixels.*embeddings as x"):
        call(every_objective()["adversarial"], batch=(BATCH[0].astype(int), BATCH[1]))


def test_a_train_fn_that_returns_no_state_is_an_error():
    natural = objectives.natural(mlp, train_fn=lambda params, state, x, key: mlp(params, x))
    with pytest.raises(TypeError, match=r"train_fn to return \(output, model_state\), got Array"):
        call(natural)


def test_an_input_whose_norm_overflows_is_counted_and_has_no_relative_size():
    x = edited(BATCH[0], 2, 3e38)
    _, (_, aux) = call(
        objectives.adversarial(mlp, perturb.loss, eps=objectives.Relative(0.1)), batch=(x, BATCH[1])
    )
    assert int(aux.nonfinite) == 1
