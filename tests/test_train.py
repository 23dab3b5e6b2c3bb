"""`jaxadv.train` against hand-written optax loops; state, donation, tracing, errors."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxadv import objectives, perturb, train

B, D, K, S = 4, 5, 3, 6  # S batches of B examples
KEY = jax.random.key(11)

# The same operations, fused differently: a few roundings of 2^-24 each.
RTOL = 2e-6
ATOL = 2e-7


@pytest.fixture(autouse=True)
def _fresh_trace_counter():
    chex.clear_trace_counter()


def linear(params, x):
    return x @ params["w"] + params["b"][None]


def draw_params(seed=0):
    rng = np.random.default_rng(seed)
    w, b = rng.normal(size=(D, K)), rng.normal(size=K)
    return {"w": jnp.asarray(w, jnp.float32), "b": jnp.asarray(b, jnp.float32)}


def draw_batches(seed=1):
    """Stacked batches, [S, B, D] and [S, B]."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(S, B, D)).astype(np.float32)
    return jnp.asarray(x), jnp.asarray(np.arange(S * B).reshape(S, B) % K)


PARAMS, BATCHES = draw_params(), draw_batches()


def batch(s):
    return jax.tree.map(lambda leaf: leaf[s], BATCHES)


def run(step, state, steps=S):
    infos = []
    for s in range(steps):
        state, info = step(state, batch(s))
        infos.append(info)
    return state, infos


def cross_entropy(params, x, y):
    z = linear(params, x)
    return jnp.mean(jax.nn.logsumexp(z, axis=1) - z[jnp.arange(B), y])


NATURAL = objectives.natural(linear)


def noise(apply_fn, params, x, y, /, *, eps, key=None, bounds=None):
    return eps[:, None] * jax.random.uniform(key, x.shape, x.dtype, -1, 1)


# Its adversary draws random numbers with the key of the step.
KEYED = objectives.adversarial(linear, noise, eps=0.5)
ADAM = optax.adam(0.1)


@functools.cache
def keyed_step():
    """Compiled once for several tests."""
    return train.make_step(KEYED, ADAM)


@functools.cache
def keyed_epoch():
    return train.make_epoch(KEYED, ADAM)


def start(key=KEY):
    return train.init(PARAMS, ADAM, key=key)


def report_key(params, model_state, batch, /, *, key, step):
    """An objective whose aux is the key and the step that it gets."""
    return jnp.sum(params["w"] ** 2), (model_state, (jax.random.key_data(key), step))


# name: the transformation, and whether it takes `value`
TRANSFORMATIONS = {
    "sgd with momentum": (lambda: optax.sgd(0.1, momentum=0.9), False),
    "adamw": (lambda: optax.adamw(0.1, weight_decay=0.1), False),
    "chain with clipping": (
        lambda: optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(0.1)),
        False,
    ),
    "reduce on plateau": (
        lambda: optax.chain(
            optax.sgd(0.1),
            # Every second loss counts as no improvement, so the scale does change.
            optax.contrib.reduce_on_plateau(factor=0.5, patience=1, atol=10.0),
        ),
        True,
    ),
}


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_a_step_is_the_gradient_and_the_optax_update(name):
    make, takes_value = TRANSFORMATIONS[name]
    tx = make()
    state, infos = run(train.make_step(NATURAL, tx), train.init(PARAMS, tx, key=KEY))

    @jax.jit
    def by_hand(params, opt_state, x, y):
        value, grad = jax.value_and_grad(cross_entropy)(params, x, y)
        extra = {"value": value} if takes_value else {}
        updates, opt_state = tx.update(grad, opt_state, params, **extra)
        return optax.apply_updates(params, updates), opt_state, value

    params, opt_state = PARAMS, tx.init(PARAMS)
    for s in range(S):
        params, opt_state, value = by_hand(params, opt_state, *batch(s))
        np.testing.assert_allclose(infos[s].loss, value, rtol=RTOL)
    chex.assert_trees_all_close(state.params, params, rtol=RTOL, atol=ATOL)
    chex.assert_trees_all_close(state.opt_state, opt_state, rtol=RTOL, atol=ATOL)
    if takes_value:
        assert opt_state[1].scale < 1  # there was a plateau


# State


def test_the_initial_state_is_step_0_in_int32():
    tx = optax.adam(0.1)
    state = train.init(PARAMS, tx, model_state={"count": 2.0}, key=KEY)
    assert state.step.dtype == jnp.int32
    assert state.step.shape == ()
    assert state.step == 0
    chex.assert_trees_all_equal(state.params, PARAMS)
    chex.assert_trees_all_equal(state.opt_state, tx.init(PARAMS))
    chex.assert_trees_all_equal(state.model_state, {"count": jnp.float32(2)})
    assert state.key == KEY


def test_donation_takes_the_state_and_leaves_the_callers_arrays():
    tx = optax.adam(0.1)
    mine = {"params": draw_params(), "model_state": jnp.ones(K), "key": jax.random.key(5)}
    step = train.make_step(NATURAL, tx)
    ends = []
    for _ in range(2):
        state = train.init(mine["params"], tx, model_state=mine["model_state"], key=mine["key"])
        after, _ = step(state._replace(model_state=None), batch(0))
        assert state.params["w"].is_deleted()
        ends.append(after.params)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(mine))
    chex.assert_trees_all_equal(*ends)


def test_donation_leaves_the_callers_model_state_and_key():
    def train_fn(params, model_state, x, key):
        return linear(params, x), model_state + 1

    tx = optax.sgd(0.1)
    step = train.make_step(objectives.natural(linear, train_fn=train_fn), tx)
    model_state, key = jnp.ones(K), jax.random.key(5)
    state, _ = run(step, train.init(PARAMS, tx, model_state=model_state, key=key), 2)
    np.testing.assert_array_equal(state.model_state, np.full(K, 3))
    np.testing.assert_array_equal(model_state, np.ones(K))
    assert jax.random.uniform(key) == jax.random.uniform(state.key)


def test_an_array_that_appears_twice_in_the_parameters_can_be_donated():
    # JAX refuses to donate a buffer twice, as tied weights and states with parameters would.
    shared = jnp.ones((D, K))
    objective = objectives.natural(lambda params, x: x @ (params["a"] + params["b"]))
    tx = optax.sgd(0.1)
    state = train.init({"a": shared, "b": shared}, tx, key=KEY)
    state, _ = train.make_step(objective, tx)(state, batch(0))
    chex.assert_trees_all_equal(state.params["a"], state.params["b"])


def test_without_donation_the_state_stays_valid():
    tx = optax.adam(0.1)
    state = train.init(PARAMS, tx, key=KEY)
    step = train.make_step(NATURAL, tx, donate=False)
    epoch = train.make_epoch(NATURAL, tx, donate=False)
    first, second = step(state, batch(0)), step(state, batch(0))
    chex.assert_trees_all_equal(first, second)
    epoch(state, BATCHES)
    chex.assert_trees_all_equal(state.params, PARAMS)


@pytest.mark.parametrize("made", [jax.random.key, jax.random.PRNGKey])
def test_a_steps_key_is_the_runs_key_with_the_step_folded_in(made):
    tx, key = optax.sgd(0.0), made(5)
    state, infos = run(train.make_step(report_key, tx), train.init(PARAMS, tx, key=key))
    for s, info in enumerate(infos):
        data, step = info.aux
        np.testing.assert_array_equal(data, jax.random.key_data(jax.random.fold_in(key, s)))
        assert step == s
    np.testing.assert_array_equal(jax.random.key_data(state.key), jax.random.key_data(key))


def test_the_same_key_gives_the_same_bits_and_another_key_others():
    first, again, other = (
        run(keyed_step(), start(key), 3)[0].params for key in (KEY, KEY, jax.random.key(12))
    )
    chex.assert_trees_all_equal(first, again)
    assert np.any(first["w"] != other["w"])


def test_a_run_resumed_from_its_state_ends_in_the_same_bits():
    whole, _ = run(keyed_step(), start())
    half, _ = run(keyed_step(), start(), 2)
    key = jax.random.wrap_key_data(np.asarray(jax.random.key_data(half.key)))
    stored = jax.tree.map(np.asarray, half._replace(key=None))  # as in a checkpoint
    resumed, step = stored._replace(key=key), train.make_step(KEYED, ADAM)
    for s in range(2, S):
        resumed, _ = step(resumed, batch(s))
    chex.assert_trees_all_equal(resumed.params, whole.params)


# Epochs


def test_an_epoch_is_the_loop_of_its_steps():
    stepped, infos = run(keyed_step(), start())
    scanned, info = keyed_epoch()(start(), BATCHES)
    assert scanned.step == S
    # In a scan the step is compiled differently, so some roundings differ.
    want = jax.tree.map(lambda *leaves: jnp.stack(leaves), *infos)
    chex.assert_trees_all_close(info, want, rtol=1e-6, atol=1e-6)
    chex.assert_trees_all_close(scanned[:3], stepped[:3], rtol=1e-6, atol=1e-6)


def test_an_epoch_with_an_order_is_the_epoch_of_the_gathered_batches():
    x, y = BATCHES
    examples = x.reshape(S * B, D), y.reshape(S * B)
    order = jax.random.permutation(jax.random.key(3), S * B).reshape(S, B)
    ordered, info = keyed_epoch()(start(), examples, order)
    stacked = jax.tree.map(lambda leaf: leaf[order], examples)
    want, want_info = keyed_epoch()(start(), stacked)
    assert ordered.step == S
    chex.assert_trees_all_close(info, want_info, rtol=1e-6, atol=1e-6)
    chex.assert_trees_all_close(ordered[:3], want[:3], rtol=1e-6, atol=1e-6)


def test_the_second_epoch_continues_the_step_count():
    tx = optax.sgd(0.0)
    epoch = train.make_epoch(report_key, tx)
    state, first = epoch(train.init(PARAMS, tx, key=KEY), BATCHES)
    _, second = epoch(state, BATCHES)
    _, steps = jax.tree.map(lambda a, b: np.concatenate([a, b]), first.aux, second.aux)
    np.testing.assert_array_equal(steps, np.arange(2 * S))


# Tracing


def weak(shape):
    return jnp.broadcast_to(jnp.asarray(0.5), shape)


WEAK = {"w": weak((D, K)), "b": weak((K,))}


def test_a_step_is_traced_once():
    assert WEAK["w"].weak_type
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(optax.linear_schedule(0.1, 0, S)))
    eps = optax.linear_schedule(0.0, 1.0, S)
    objective = objectives.adversarial(linear, perturb.loss, eps=eps)
    step = train.make_step(chex.assert_max_traces(objective, n=1), tx)
    state, _ = run(step, train.init(WEAK, tx, key=KEY))
    assert state.step == S


def test_a_step_with_weakly_typed_model_state_is_traced_once():
    def train_fn(params, model_state, x, key):
        return linear(params, x), 0.9 * model_state + 0.1

    tx = optax.sgd(0.1)
    objective = objectives.natural(linear, train_fn=train_fn)
    step = train.make_step(chex.assert_max_traces(objective, n=1), tx)
    state, _ = run(step, train.init(PARAMS, tx, model_state=2.0, key=KEY))
    np.testing.assert_allclose(state.model_state, 1 + 0.9**S, rtol=RTOL)


def test_an_epoch_is_traced_once():
    tx = optax.adam(0.1)
    traces = []

    def counted(*args, **kwargs):
        traces.append(None)
        return NATURAL(*args, **kwargs)

    epoch = train.make_epoch(counted, tx)
    state = train.init(WEAK, tx, key=KEY)
    state, _ = epoch(state, BATCHES)
    once = len(traces)  # scan may trace its body more than once
    for _ in range(2):
        state, _ = epoch(state, BATCHES)
    assert len(traces) == once
    assert state.step == 3 * S


# All objectives


def layers(params, x):
    for w, b in params[:-1]:
        x = jnp.tanh(x @ w + b[None])
    return x @ params[-1][0] + params[-1][1][None]


def draw_layer(seed, fan_in, fan_out):
    w = np.random.default_rng(seed).normal(size=(fan_in, fan_out)) / np.sqrt(fan_in)
    return jnp.asarray(w, jnp.float32), jnp.zeros(fan_out)


OBJECTIVES = {
    "natural": objectives.natural(layers),
    "adversarial": objectives.adversarial(layers, perturb.loss, eps=0.3),
    "mixed": objectives.mixed(layers, perturb.loss, eps=0.3),
    "virtual": objectives.kl_regularized(layers, perturb.vat, eps=0.3),
    "representation": objectives.representation(
        lambda params, x: jnp.tanh(x @ params[0][0] + params[0][1][None]),
        lambda params, h: h @ params[1][0] + params[1][1][None],
        perturb.loss,
        eps=objectives.Relative(0.1),
    ),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_loss_falls_with_every_objective(name):
    # Three clusters that a net with one hidden layer separates easily, perturbed or not.
    rng = np.random.default_rng(4)
    centres = 2 * rng.normal(size=(K, D))
    y = np.arange(S * B) % K
    x = (centres[y] + 0.1 * rng.normal(size=(S * B, D))).astype(np.float32)
    tx = optax.adam(0.03)
    state = train.init([draw_layer(0, D, 7), draw_layer(1, 7, K)], tx, key=KEY)
    data = jnp.asarray(x).reshape(S, B, D), jnp.asarray(y).reshape(S, B)
    epoch, means = train.make_epoch(OBJECTIVES[name], tx), []
    for _ in range(15):
        state, info = epoch(state, data)
        means.append(float(info.loss.mean()))
    assert means[-1] < means[0] / 2


# Transformations that need more than gradients

EXTRA = {
    "opaque sam": lambda: optax.contrib.sam(
        optax.sgd(0.1), optax.chain(optax.contrib.normalize(), optax.sgd(0.05)), opaque_mode=True
    ),
    "sophia": lambda: optax.contrib.sophia(0.1),
    "lbfgs in MultiSteps": lambda: optax.MultiSteps(optax.lbfgs(), 2),
}


@pytest.mark.parametrize("name", EXTRA)
def test_a_transformation_that_needs_more_than_gradients_trains(name):
    tx = EXTRA[name]()
    adversarial = objectives.adversarial(linear, perturb.loss, eps=0.1)
    step = train.make_step(adversarial, tx, donate=False)
    state, losses = train.init(PARAMS, tx, key=KEY), []
    for _ in range(12):  # some move only every second step
        state, info = step(state, batch(0))
        losses.append(float(info.loss))
    assert losses[-1] < losses[0] - 0.05


def test_lbfgs_in_a_step_matches_a_hand_written_loop():
    tx, (x, y) = optax.lbfgs(), batch(0)
    step = train.make_step(NATURAL, tx, donate=False)
    state = train.init(PARAMS, tx, key=KEY)
    params, opt_state = PARAMS, tx.init(PARAMS)

    def value_fn(params):
        return cross_entropy(params, x, y)

    @jax.jit
    def by_hand(params, opt_state):
        value, grad = jax.value_and_grad(value_fn)(params)
        updates, opt_state = tx.update(
            grad, opt_state, params, value=value, grad=grad, value_fn=value_fn
        )
        return optax.apply_updates(params, updates), opt_state

    for _ in range(3):
        state, _ = step(state, batch(0))
        params, opt_state = by_hand(params, opt_state)
    chex.assert_trees_all_close(state.params, params, rtol=1e-4, atol=1e-5)


def test_a_transformation_that_needs_unknown_arguments_is_an_error():
    def update(updates, state, params=None, *, teacher):
        return updates, state

    tx = optax.GradientTransformationExtraArgs(lambda params: (), update)
    state = train.init(PARAMS, tx, key=KEY)
    with pytest.raises(TypeError, match=r"no more than value, .*got .*'teacher'.*; .*write the"):
        train.make_step(NATURAL, tx)(state, batch(0))


@pytest.mark.parametrize("make", [train.make_step, train.make_epoch])
@pytest.mark.parametrize("tx", [optax.adam, NATURAL, 0.1])
def test_objects_that_are_no_transformation_are_refused_with_a_remedy(make, tx):
    with pytest.raises(
        TypeError, match=r"optax transformation, got .*; make one, e\.g\. optax\.adam"
    ):
        make(NATURAL, tx)
    with pytest.raises(TypeError, match="optax transformation, got"):
        train.init(PARAMS, tx, key=KEY)


# Leaves that can't be trained

UNTRAINABLE = {
    "a counter of PyTorch's batch norm": (np.int64(7), "int64"),
    "integers": (jnp.arange(3), "int32"),
    "a mask": (np.ones(3, bool), "bool"),
    "a Python integer": (3, "int"),
    "a key": (jax.random.key(0), r"key<fry>"),
    "a function": (jax.nn.relu, ""),
}


@pytest.mark.parametrize("name", UNTRAINABLE)
def test_an_untrainable_leaf_is_named_with_a_remedy(name):
    leaf, kind = UNTRAINABLE[name]
    params, tx = PARAMS | {"bn.num_batches_tracked": leaf}, optax.sgd(0.1)
    message = rf"arrays, got {kind}.* at \['bn\.num_batches_tracked'\].*model_state.*eqx\.partition"
    state = train.init(PARAMS, tx, key=KEY)._replace(params=params)
    for call in (
        lambda: train.init(params, tx, key=KEY),
        lambda: train.update(NATURAL, tx, state, batch(0)),
    ):
        with pytest.raises(TypeError, match=message):
            call()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.complex64, np.float32, float])
def test_every_inexact_leaf_is_trainable(dtype):
    leaf = 1.0 if dtype is float else jnp.ones(2, dtype)
    train.init({"w": leaf}, optax.sgd(0.1), key=KEY)


@pytest.mark.parametrize("key", [0, None, jax.random.split(KEY, 4)], ids=["seed", "none", "four"])
def test_a_run_has_one_key(key):
    with pytest.raises((TypeError, ValueError), match=r"expected (a|one) key, got .*; pass jax"):
        train.init(PARAMS, ADAM, key=key)


def epoch_loss(order):
    epoch = train.make_epoch(NATURAL, ADAM)
    return epoch(start(), batch(0), order)[1].loss


@pytest.mark.parametrize("wrong", [4, -1])
def test_an_index_of_no_example_makes_the_loss_nan(wrong):
    np.testing.assert_array_equal(
        np.isnan(epoch_loss(jnp.array([[0, 1, 2, 3], [1, 2, 3, wrong]]))), [False, True]
    )


@pytest.mark.parametrize("order", [jnp.array([[1.0, 2.0]]), jnp.array([1, 2])])
def test_an_order_must_be_integers_for_each_step(order):
    with pytest.raises(ValueError, match=r"expected order of integers \[S, B\], got"):
        epoch_loss(order)
