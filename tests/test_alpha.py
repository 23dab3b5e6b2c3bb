"""`perturb.alpha` with `candidates` (some of the classes) and `chunk` (some at a time)."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references
from flax import linen as nn
from references import NORMS

from jaxadv import jacobian, perturb

B, D, H, K = 30, 6, 8, 7
# Matrix products of other shapes are summed in another order.
RTOL, ATOL = 1e-5, 1e-6

alpha = jax.jit(
    perturb.alpha, static_argnums=0, static_argnames=("norm", "candidates", "chunk", "bounds")
)


def net(params, x):
    w, v, c = params
    return jnp.tanh(x @ w) @ v + c


@pytest.fixture(scope="module")
def problem():
    """Correct, wrong, tied and masked examples, labels out of range, NaN, unreachable classes."""
    rng = np.random.default_rng(0)
    w, v = rng.normal(size=(D, H)) / 3, rng.normal(size=(H, K))
    v *= np.linspace(0.1, 3, K)  # so that the top wrong class often isn't the nearest
    v[:, 3] = v[:, 4]  # classes 3 and 4 always tie
    x, c = rng.normal(size=(B, D)), rng.normal(size=(B, K))
    c[:, 4] = c[:, 3]
    w, v, c, x = (a.astype(np.float32) for a in (w, v, c, x))
    y = np.argmax(np.tanh(x @ w) @ v + c, axis=1)
    y[1], y[2] = (y[1] + 1) % K, (y[2] + 3) % K
    c[3, [0, 5]], c[4, 1:], c[5, y[5]] = -np.inf, -np.inf, -np.inf
    y[6], y[7] = K, -1
    x[8, 0] = np.nan
    x[9] *= 1e3
    return (w, v, c), jnp.asarray(x), jnp.asarray(y, jnp.int32)


@pytest.mark.parametrize(("norm", "eps"), [("l1", None), ("l2", 0.5), ("linf", None)])
@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_r_is_the_same_however_many_classes_are_held_at_once(problem, norm, eps, chunk):
    got = alpha(net, *problem, norm=norm, eps=eps, chunk=chunk)
    np.testing.assert_allclose(
        got, alpha(net, *problem, norm=norm, eps=eps), rtol=RTOL, atol=ATOL, strict=True
    )


@pytest.mark.parametrize("candidates", [K - 1, 100])
def test_with_all_candidates_it_is_the_same_program(problem, candidates):
    got = alpha(net, *problem, candidates=candidates)
    np.testing.assert_array_equal(got, alpha(net, *problem))


def found(problem, norm):
    """Yield the reference and the logits of each example without a fault."""
    params, x, y = problem
    logits = np.asarray(net(params, x), np.float64)
    one = jax.jacrev(lambda x, c: net((*params[:2], c[None]), x[None])[0])
    jacobians = np.asarray(jax.jit(jax.vmap(one))(x, params[2]))
    for i in (*range(6), *range(10, B)):
        yield i, logits[i], references.alpha(logits[i], jacobians[i], int(y[i]), norm=norm)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(("candidates", "chunk"), [(1, None), (2, 2), (3, None)])
def test_the_nearest_of_the_top_wrong_classes_is_taken(problem, norm, candidates, chunk):
    got = alpha(net, *problem, norm=norm, eps=1.0, candidates=candidates, chunk=chunk)
    y, changed = np.asarray(problem[2]), 0
    for i, logits, all_classes in found(problem, norm):
        top_wrong = np.argsort(-np.where(np.arange(K) == y[i], -np.inf, logits), kind="stable")
        sizes = np.full(K, np.inf)
        sizes[top_wrong[:candidates]] = all_classes.log_sizes[top_wrong[:candidates]]
        right = logits[y[i]] > np.delete(logits, y[i]).max()
        cls = sizes.argmin() if right else all_classes.cls
        changed += cls != all_classes.cls
        want = references.steepest(all_classes.rows[cls], norm) if sizes.min() < np.inf else 0
        np.testing.assert_allclose(got[i], np.broadcast_to(want, D), atol=1e-4)
    assert changed or candidates > 1  # else nothing was tested


def test_the_least_perturbation_grows_as_candidates_are_left_out(problem):
    def sizes(candidates):
        r = alpha(net, *problem, candidates=candidates)
        return np.linalg.norm(np.delete(r, 8, axis=0), axis=1)

    few, more, every = sizes(1), sizes(3), sizes(None)
    assert (few >= more * (1 - RTOL)).all()
    assert (more >= every * (1 - RTOL)).all()
    assert (few > every * 1.01).any()


def test_its_derivatives_are_the_same(problem):
    params, x, y = jax.tree.map(lambda a: a[:3] if len(a) == B else a, problem)

    @partial(jax.jit, static_argnums=1)
    @partial(jax.grad, argnums=0)
    def derivative(x, chunk):
        return jnp.sum(jnp.sin(perturb.alpha(net, params, x, y, eps=1.0, chunk=chunk)))

    np.testing.assert_allclose(derivative(x, 4), derivative(x, None), rtol=1e-4, atol=1e-4)


def test_r_is_the_same_under_vmap(problem):
    params, x, y = problem

    def one(x, y, c):
        r = perturb.alpha(net, (*params[:2], c[None]), x[None], y[None], eps=1.0, chunk=2)
        return r[0]

    got = jax.jit(jax.vmap(one))(x, y, jnp.asarray(params[2]))
    np.testing.assert_allclose(got, alpha(net, *problem, eps=1.0), rtol=RTOL, atol=ATOL)


def test_chunks_work_in_a_shard_map_with_replicated_labels(problem):
    params, x, _ = problem
    y = jnp.zeros(len(x), jnp.int32)
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((1,), ("data",), auto, devices=jax.devices()[:1])

    def local(x):
        return perturb.alpha(net, params, x, jnp.zeros(len(x), jnp.int32), eps=1.0, chunk=2)

    spec = jax.sharding.PartitionSpec("data")
    got = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec))(x)
    np.testing.assert_allclose(got, alpha(net, params, x, y, eps=1.0), rtol=RTOL, atol=ATOL)
    assert np.isfinite(got).all(axis=1).sum() == B - 1  # all but the row with NaN


# What it costs


def wide_problem(n=8, size=512, classes=100):
    params = [jnp.ones((size, 64)), jnp.ones((64, classes)), jnp.zeros((1, classes))]
    return params, jnp.ones((n, size)), jnp.zeros(n, jnp.int32)


def compiled(n=8, **kwargs):
    args = wide_problem(n)
    return jax.jit(partial(perturb.alpha, net, eps=1.0, **kwargs)).lower(*args).compile()


def test_the_memory_is_that_of_a_chunk():
    x_bytes = wide_problem()[1].nbytes
    every, some = (compiled(chunk=chunk).memory_analysis().temp_size_in_bytes for chunk in (99, 5))
    assert every > 99 * x_bytes
    # Rows, their magnitudes, what the norms keep of them, the rows of logits, and the best.
    assert some < 8 * 5 * x_bytes


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="the cache matters only on CPU")
def test_on_cpu_as_many_classes_are_backpropagated_at_once_as_the_cache_holds(monkeypatch):
    def memory(cached, n=8, **kwargs):
        monkeypatch.setattr(jacobian, "_CACHED", cached)
        return compiled(n, **kwargs).memory_analysis().temp_size_in_bytes

    one, every = (memory(1, chunk=chunk) for chunk in (1, 99))
    assert memory(0) == memory(50_000) == one
    assert memory(10**9) == every
    # XLA needs less memory than all arrays together, since it reuses what is no longer needed.
    assert one < memory(1_000_000) < 1_000_000 < every
    assert one < memory(1_000_000, n=16) < 1_000_000


@pytest.mark.parametrize(("chunk", "size"), [(5, 3), (4, 3), (3, 3), (2, 2), (1, 1)])
def test_chunks_are_of_one_size(problem, chunk, size):
    program = jax.make_jaxpr(partial(perturb.alpha, net, eps=0.5, chunk=chunk))(*problem)
    (loop,) = (eqn for eqn in program.eqns if eqn.primitive.name == "scan")
    assert loop.invars[-1].aval.shape == ((K - 1) // size, B, size)


def test_the_cost_is_one_backward_pass_for_each_candidate():
    params, x, _ = wide_problem()
    forward = 2 * len(x) * sum(w.size for w in params[:2])
    flops = compiled(candidates=5).cost_analysis()["flops"]
    # The matrix products, of 64 rows, and some operations per pixel.
    assert 0.99 < flops / (6 * forward) < 1.3


def test_there_is_only_one_forward_pass():
    passes = []

    def counted(params, x):
        passes.append(1)
        return net(params, x)

    jax.eval_shape(partial(perturb.alpha, counted, chunk=7), *wide_problem())
    assert len(passes) == 1


def test_the_backward_pass_is_compiled_once_however_many_chunks_there_are(problem):
    params, x, y = problem

    def products(chunk):
        program = jax.make_jaxpr(partial(perturb.alpha, net, eps=0.5, chunk=chunk))(params, x, y)
        return str(program).count("dot_general")

    assert products(1) == products(2) == products(None) > 0


# Rows of chosen classes


def test_rows_of_some_classes_are_those_of_all(problem):
    index = jnp.asarray(np.random.default_rng(1).integers(0, K - 1, size=(B, 3)))

    @jax.jit
    def all_and_some(params, x, y):
        rows = jacobian.class_differences(net, params, x, y)
        _, rows_of = jacobian.class_pullback(net, params, x, y)
        return rows, rows_of(jnp.take_along_axis(rows.classes, index, axis=1))

    rows, some = all_and_some(*problem)
    np.testing.assert_array_equal(some.logits, rows.logits)
    for name in ("classes", "log_scale", "log_gap"):
        want = jnp.take_along_axis(getattr(rows, name), index, axis=1)
        np.testing.assert_allclose(getattr(some, name), want, rtol=1e-6)
    np.testing.assert_allclose(some.d, rows.d[jnp.arange(B)[:, None], index], rtol=RTOL, atol=ATOL)


@pytest.mark.slow
def test_a_thousand_classes_of_images_of_224_pixels_fit_in_four_gigabytes():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            for features in (32, 64, 128, 256):
                x = nn.relu(nn.Conv(features, (3, 3), strides=2)(x))
            return nn.Dense(1000)(x.mean((1, 2)))

    net = Net()
    x = jax.ShapeDtypeStruct((8, 224, 224, 3), jnp.float32)
    y = jax.ShapeDtypeStruct((8,), jnp.int32)
    params = jax.eval_shape(net.init, jax.random.key(0), x)
    at_once, chunked = (
        jax.jit(partial(perturb.alpha, net.apply, eps=1.0, chunk=chunk))
        .lower(params, x, y)
        .compile()
        .memory_analysis()
        .temp_size_in_bytes
        for chunk in (999, 16)
    )
    assert at_once > 4e9
    assert chunked < 1e9


def test_many_classes_warn_and_suggest_candidates():
    problem = wide_problem(n=2, size=6, classes=120)
    with pytest.warns(UserWarning, match="119 backward passes.*candidates=10"):
        jax.eval_shape(partial(perturb.alpha, net, eps=1.0), *problem)
    # Which can also ask for all classes, without a warning.
    jax.eval_shape(partial(perturb.alpha, net, eps=1.0, candidates=119), *problem)
