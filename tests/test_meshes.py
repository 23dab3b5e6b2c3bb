"""Arrays on a mesh of Explicit axes give the same results, sharded as the arguments are."""

from functools import partial

import jax
import jax.numpy as jnp
import nets
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxadv import _cpu, attack, evaluate, losses, meshes, objectives, perturb, train

B, K = 4, 4
KEY = jax.random.key(0)


def net(params, x):
    return jnp.tanh(x.reshape(len(x), -1) @ params["w"]) @ params["v"]


def noisy(params, x, key):
    return net(params, x) + 0.01 * jax.random.normal(key, (len(x), K))


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((jax.device_count(),), ("data",), (AxisType.Explicit,))


@pytest.fixture(scope="module")
def plain():
    rng = np.random.default_rng(0)
    params = {"w": rng.normal(size=(16, 5)), "v": rng.normal(size=(5, K))}
    x, y = rng.random((B, 4, 4, 1)), rng.integers(0, K, B)
    params, x = jax.tree.map(partial(jnp.asarray, dtype=jnp.float32), (params, x))
    return params, x, jnp.asarray(y, jnp.int32), jax.random.split(jax.random.key(1), B)


@pytest.fixture(scope="module")
def spread(mesh, plain):
    params, *rows = plain
    return (
        jax.device_put(params, NamedSharding(mesh, P())),
        *jax.device_put(rows, NamedSharding(mesh, P("data"))),
    )


def sharded_as(a, b):
    return a.sharding.mesh == b.sharding.mesh and a.sharding.is_equivalent_to(b.sharding, a.ndim)


def same(got, expected):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


METHODS = {
    "alpha": perturb.alpha,
    "loss": partial(perturb.loss, norm="l1", bounds=(0.0, 1.0)),
    "loss_sign": perturb.loss_sign,
    "vat": perturb.vat,
    **nets.ATTACKS,
    "pgd": partial(attack.pgd, steps=3, random_start=True, bounds=(0.0, 1.0)),
    "apgd dlr": partial(attack.apgd, steps=3, loss_fn=losses.dlr, norm="linf"),
    "fab": partial(attack.fab, steps=3, bounds=(0.0, 1.0)),
}
METHODS = {name: partial(method, eps=0.3) for name, method in METHODS.items()}


@pytest.mark.parametrize("name", METHODS)
def test_a_method_gives_the_same_r_sharded_as_x(name, plain, spread):
    (params, x, y, keys), method = spread, METHODS[name]
    r = method(net, params, x, y, key=keys)
    assert sharded_as(r, x)
    same(r, jax.jit(partial(method, net))(*plain[:3], key=plain[3]))


@pytest.mark.parametrize("name", ["alpha", "pgd"])
def test_a_method_in_its_callers_jit(name, plain, spread):
    @jax.jit
    def perturbed(params, x, y, keys):
        return x + METHODS[name](net, params, x, y, key=keys)

    moved = perturbed(*spread)
    assert sharded_as(moved, spread[1])
    same(moved, perturbed(*plain))


@pytest.mark.parametrize("name", ["loss", "pgd"])
def test_a_method_in_the_context_of_the_mesh(name, mesh, plain, spread):
    (params, x, y, keys), method = spread, METHODS[name]
    with jax.set_mesh(mesh):
        r = method(net, params, x, y, key=keys)
        in_jit = jax.jit(partial(method, net))(params, x, y, key=keys)
    assert sharded_as(r, x)
    assert sharded_as(in_jit, x)
    same([r, in_jit], [method(net, *plain[:3], key=plain[3])] * 2)


def test_sizes_and_bounds_of_each_example(plain, spread):
    def perturbed(params, x, y, keys):
        return perturb.loss(net, params, x, y, eps=x[:, 0, 0, 0], bounds=(x - 0.1, x + 0.1))

    same(perturbed(*spread), perturbed(*plain))


def test_a_net_that_draws_random_numbers(plain, spread):
    method = partial(attack.pgd, noisy, eps=0.3, steps=2, samples=2)
    same(method(*spread[:3], key=spread[3]), method(*plain[:3], key=plain[3]))


def test_vmap_over_examples(plain, spread):
    @jax.jit
    def each(params, x, y, keys):
        return jax.vmap(lambda x, y: perturb.alpha(net, params, x[None], y[None], eps=0.3))(x, y)

    same(each(*spread), each(*plain))


def test_derivatives_of_r(plain, spread):
    @jax.jit
    @jax.grad
    def slope(params, x, y):
        return jnp.sum(perturb.alpha(net, params, x, y) ** 2)

    same(slope(*spread[:3]), slope(*plain[:3]))


def test_a_loop_of_the_callers(plain, spread):
    def iterated(params, x, y, keys):
        @_cpu.fast_convolutions
        def step(_, x):
            return x + perturb.loss(net, params, x, y, eps=0.1)

        return jax.lax.fori_loop(0, 3, step, x)

    same(jax.jit(iterated)(*spread), iterated(*plain))


@pytest.mark.parametrize("name", ["ddn", "fab"])
def test_an_attack_works_in_a_shard_map_that_does_not_check_types(name, plain):
    mesh = jax.make_mesh((jax.device_count(),), ("data",), (AxisType.Auto,))
    rows, method = P("data"), METHODS[name]

    def local(params, x, y):
        return method(net, params, x, y)

    spread = jax.shard_map(
        local, mesh=mesh, in_specs=(P(), rows, rows), out_specs=rows, check_vma=False
    )
    params, x, y, _ = plain
    same(jax.jit(spread)(params, x, y), local(params, x, y))


# Evaluation


def test_masks_of_a_batch_are_sharded_as_its_rows(mesh, plain, spread):
    def both(params, x, y, keys):
        return (evaluate.measure(net, params, x, y), evaluate.measure(net, params, x, y, 0.1 * x))

    got = jax.jit(both)(*spread)
    assert all(sharded_as(leaf, spread[2]) for leaf in jax.tree.leaves(got))
    same(got, both(*plain))


SEVERAL = {"loss": perturb.loss, "apgd": partial(attack.apgd, steps=3)}
EVALUATIONS = {
    "score": lambda params, x, y, keys: evaluate.score(net, params, x, y),
    "score of r": lambda params, x, y, keys: evaluate.score(net, params, x, y, 0.1 * x),
    "one attack": lambda params, x, y, keys: evaluate.attack_and_score(
        net, params, x, y, perturb.vat, eps=0.3, key=keys, bounds=(0.0, 1.0), batch_size=3
    ),
    "transfer": lambda params, x, y, keys: evaluate.attack_and_score(
        net, params, x, y, perturb.loss, eps=0.3, source=(net, params)
    ),
    "several attacks": lambda params, x, y, keys: evaluate.attack_and_score(
        net, params, x, y, SEVERAL, eps=0.3, key=keys, bounds=(0.0, 1.0), batch_size=3
    )[:2],
    "check": lambda params, x, y, keys: (
        evaluate.check(net, params, x, answers(params, x), eps=0.01, key=keys, steps=2).figures
    ),
}


def answers(params, x):
    return jnp.argmax(net(params, x), axis=1)


@pytest.mark.parametrize("name", EVALUATIONS)
def test_an_evaluation_gives_the_same(name, plain, spread):
    same(EVALUATIONS[name](*spread), EVALUATIONS[name](*plain))


def test_an_evaluation_in_the_context_of_the_mesh(mesh, plain, spread):
    with jax.set_mesh(mesh):
        got = EVALUATIONS["one attack"](*spread)
    same(got, EVALUATIONS["one attack"](*plain))


def test_the_error_of_an_evaluation_under_a_trace_is_the_same_on_a_mesh(spread):
    with pytest.raises(TypeError, match=r"got a tracer: evaluate.score loops over a data set"):
        jax.jit(partial(evaluate.score, net))(*spread[:3])


# Training

OBJECTIVES = {
    "natural": objectives.natural(net),
    "adversarial": objectives.adversarial(net, perturb.alpha, eps=0.3),
    "mixed": objectives.mixed(net, perturb.loss, eps=0.3),
    "virtual": objectives.kl_regularized(net, perturb.vat, eps=0.3),
    "noisy": objectives.noisy(net, sigma=0.3, copies=2, consistency=5.0),
    "representation": objectives.representation(
        lambda params, x: jnp.tanh(x.reshape(len(x), -1) @ params["w"]),
        lambda params, h: h @ params["v"],
        perturb.loss,
        eps=0.3,
    ),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_gradient_of_an_objective_is_sharded_as_the_parameters(name, plain, spread):
    @jax.jit
    def gradient(params, x, y, keys):
        loss = partial(OBJECTIVES[name], key=KEY, step=jnp.int32(0))
        return jax.value_and_grad(loss, has_aux=True)(params, None, (x, y))

    got = gradient(*spread)
    assert all(map(sharded_as, jax.tree.leaves(got[1]), jax.tree.leaves(spread[0])))
    same(got, gradient(*plain))


ADAM = optax.adam(1e-2)


def trained(kind, params, x, y, keys):
    objective, tx = OBJECTIVES["mixed"], ADAM
    state = train.init(params, tx, key=KEY)
    if kind == "update":
        return train.update(objective, tx, state, (x, y))
    if kind == "step":
        return train.make_step(objective, tx)(state, (x, y))
    if kind == "batches":
        return train.make_epoch(objective, tx)(state, (x[None], y[None]))
    return train.make_epoch(objective, tx)(state, (x, y), order=jnp.array([[0, 1], [3, 2]]))


def test_a_memory_keeps_its_sharding(plain, spread):
    step = partial(attack.pgd, steps=1, keep="last")
    objective = objectives.with_memory(
        objectives.adversarial(net, step, eps=0.3, bounds=(0.0, 1.0))
    )
    ends = []
    for params, x, y, _ in (spread, plain):
        state = train.init(params, ADAM, model_state=objectives.Memory(0.1 * x), key=KEY)
        data, order = (x, y, jnp.arange(B)), jnp.array([[0, 1], [3, 0]])
        state, info = train.make_epoch(objective, ADAM)(state, data, order)
        ends.append((state.model_state.r, state.params, info))
    assert sharded_as(ends[0][0], spread[1])
    same(*ends)


@pytest.mark.parametrize("kind", ["update", "step", "batches", "order"])
def test_training_gives_the_same_and_parameters_keep_their_sharding(kind, plain, spread):
    (state, info), (expected, expected_info) = (trained(kind, *a) for a in (spread, plain))
    assert all(map(sharded_as, jax.tree.leaves(state.params), jax.tree.leaves(spread[0])))
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(info))
    same((state.params, info), (expected.params, expected_info))


def test_a_step_is_not_traced_again_once_its_state_is_on_the_mesh(mesh, spread):
    params, x, y, _ = spread
    traces = []

    def counted(params, x):
        traces.append(x)
        return net(params, x)

    tx = optax.adam(1e-2)
    step = train.make_step(objectives.natural(counted), tx)
    state = train.init(params, tx, key=KEY)
    state, _ = step(state, (x, y))  # this also puts the step counter and the key on the mesh
    state, _ = step(state, (x, y))
    known = len(traces)
    for _ in range(3):
        state, _ = step(state, (x, y))
    assert len(traces) == known <= 2


# Nets and other axes


def test_a_net_may_make_its_axes_explicit_again(plain, spread):
    @partial(jax.sharding.explicit_axes, in_sharding=(P(), P("data")))
    def explicit(params, x):
        h = jnp.tanh(x.reshape(len(x), -1) @ params["w"])
        return jnp.dot(h, params["v"], out_sharding=P("data", None))

    params, x, y, _ = spread
    with jax.set_mesh(x.sharding.mesh):
        r = perturb.loss(explicit, params, x, y, eps=0.3)
    same(r, perturb.loss(net, *plain[:3], eps=0.3))


def test_no_array_is_copied(spread):
    _, x, _, _ = spread
    on_auto = meshes.auto_axes()(lambda x: x)(x)
    assert set(on_auto.sharding.mesh.axis_types) == {AxisType.Auto}
    at, on_auto_at = (
        [shard.data.unsafe_buffer_pointer() for shard in a.addressable_shards] for a in (x, on_auto)
    )
    assert at == on_auto_at


def test_axes_that_are_manual_or_auto_stay_so(plain):
    axes = (AxisType.Auto, AxisType.Explicit)
    mesh = jax.make_mesh((1, 1), ("data", "model"), axes)
    r = perturb.loss(net, *jax.device_put(plain[:3], NamedSharding(mesh, P())), eps=0.3)
    assert r.sharding.mesh == mesh
    same(r, perturb.loss(net, *plain[:3], eps=0.3))
