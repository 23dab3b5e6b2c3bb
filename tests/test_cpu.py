"""`jaxadv._cpu`: convolutions in loops on CPU are the fast ones, with unchanged values.

These tests count the layouts that make them fast. The slow tests compare times: when one fails, XLA
no longer needs that part of the workaround, and it can be deleted.
"""

import re
import time
import warnings
from functools import partial

import chex
import jax
import jax.numpy as jnp
import nets
import numpy as np
import optax
import pytest
from flax import linen as nn
from jax import lax

from jaxadv import _cpu, attack, objectives, perturb, train
from jaxadv._cpu import _convolutions

pytestmark = pytest.mark.usefixtures("cpu")

FAST = {
    1: "[b, 0, f]x[0, i, o]->[b, 0, f]",
    2: "[b, 0, 1, f]x[0, 1, i, o]->[b, 0, 1, f]",
    3: "[b, 0, 1, 2, f]x[0, 1, 2, i, o]->[b, 0, 1, 2, f]",
}
# Sums of up to 250 products of order 1, in another order: a few roundings of 2^-24.
RTOL, ATOL = 1e-5, 1e-4


@pytest.fixture
def cpu():
    if jax.default_backend() != "cpu":
        pytest.skip("other backends run functions unchanged")


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def convolution(strides=(1, 1), padding="SAME", numbers=("NHWC", "HWIO", "NHWC"), **more):
    return lambda x, w: lax.conv_general_dilated(
        x, w, strides, padding, dimension_numbers=numbers, **more
    )


def gradients(convolve):
    """Value and gradients in x and w of a sum over a convolution."""
    return jax.value_and_grad(lambda x, w: jnp.sum(jnp.sin(convolve(x, w))), argnums=(0, 1))


def weight_gradient(convolve):
    return lambda x, w: gradients(convolve)(x, w)[1][1]


def assert_unchanged(function, *args, atol=ATOL):
    got = _cpu.fast_convolutions(function)(*args)
    chex.assert_trees_all_close(got, function(*args), rtol=RTOL, atol=atol)


LAYOUT = re.compile(r"stablehlo\.convolution.*dim_numbers = (\[.*?\]x\[.*?\]->\[.*?\])")


def layouts(function, *args):
    """Return the layouts of a function's convolutions."""
    return LAYOUT.findall(jax.jit(function).lower(*args).as_text())


def count(function, *args):
    return str(jax.make_jaxpr(function)(*args)).count("conv_general_dilated[")


# Each: x's shape, the kernel's, strides, padding, dimension numbers.
CONVOLUTIONS = {
    "channels last": ((2, 6, 6, 3), (3, 3, 3, 4), (1, 1), "SAME", ("NHWC", "HWIO", "NHWC")),
    "channels first": ((2, 3, 6, 6), (4, 3, 3, 3), (1, 1), "VALID", ("NCHW", "OIHW", "NCHW")),
    "examples last": ((6, 5, 3, 2), (3, 2, 3, 4), (2, 1), "SAME", ("HWCN", "HWIO", "CNHW")),
    "1-D": ((2, 9, 3), (3, 3, 4), (2,), "SAME", ("NWC", "WIO", "NWC")),
    "3-D": ((2, 3, 4, 5, 4), (4, 3, 2, 2, 2), (1, 1, 2), "VALID", ("NCDHW", "OIDHW", "NCDHW")),
}
# Here the kernel gets more rows; the other weight gradients are products with patches.
KERNEL_ROWS = {("channels last", None)}


@pytest.mark.parametrize(
    ("name", "dilated"),
    [(name, None) for name in CONVOLUTIONS]
    + [(name, of) for name in ("channels first", "1-D") for of in ("rhs_dilation", "lhs_dilation")],
)
def test_values_and_gradients_are_unchanged_and_all_layouts_fast(name, dilated):
    x_shape, w_shape, strides, padding, numbers = CONVOLUTIONS[name]
    x, w = draw(*x_shape), draw(*w_shape, seed=1)
    more = {dilated: (2,) * len(strides)} if dilated else {}
    padding = [(1, 1)] * len(strides) if dilated == "lhs_dilation" else padding
    step = gradients(convolution(strides, padding, numbers, **more))
    assert_unchanged(step, x, w)
    found = layouts(_cpu.fast_convolutions(step), x, w)
    assert found == [FAST[len(strides)]] * (3 if (name, dilated) in KERNEL_ROWS else 2)
    if name != "channels last":
        assert found != layouts(step, x, w)


@pytest.mark.parametrize(
    ("image", "size", "strides", "padding", "rows"),
    [
        (28, 3, 1, "SAME", 29),  # one more than the image and the result
        (28, 9, 1, "VALID", 20),  # nine more would be too many
        (28, 3, 2, "SAME", 14),
        (28, 3, 1, [(2, 2), (1, 1)], 30),
        (3, 3, 1, "SAME", 3),
    ],
)
def test_a_result_that_lacks_few_rows_gets_more_than_the_image(image, size, strides, padding, rows):
    x, w = draw(2, image, image, 3), draw(size, size, 3, 4, seed=1)
    convolve = convolution((strides, 1), padding)
    text = str(jax.make_jaxpr(_cpu.fast_convolutions(convolve))(x, w))
    (found,) = re.findall(r"f32\[2,(\d+),\d+,4\] = conv_general_dilated", text)
    assert int(found) == rows
    assert_unchanged(convolve, x, w)


@pytest.mark.parametrize(
    ("size", "strides", "padding", "rows"),
    [
        (3, 1, "SAME", 29),
        (5, 1, "VALID", 29),
        (3, 1, [(0, 1), (2, 0)], 29),
        (7, 1, "VALID", None),  # seven more would be too many
        (3, 2, "SAME", None),
        (1, 1, "SAME", None),  # 29 x 28 is more than the image
        (3, 1, [(1, 1), (2, -1)], None),
    ],
)
def test_the_kernel_of_a_weight_gradient_gets_more_rows_than_the_image(
    size, strides, padding, rows
):
    x, w = draw(2, 28, 28, 3), draw(size, size, 3, 20, seed=1)
    gradient = weight_gradient(convolution((strides, strides), padding))
    text = str(jax.make_jaxpr(_cpu.fast_convolutions(gradient))(x, w))
    results = re.findall(r"f32\[3,\d+,\d+,20\] = conv_general_dilated\[", text)
    taller = re.findall(rf":f32\[{rows},\d+,2,20\] = pad\[", text)
    assert (len(results), len(taller)) == ((1, 1) if rows else (0, 0))
    assert_unchanged(gradient, x, w, atol=ATOL * size)

    # XLA swaps the operands if the kernel is the larger one, and then has no fast implementation.
    @jax.jit
    def looped(w, xs):
        return lax.scan(lambda w, x: (_cpu.fast_convolutions(gradient)(x, w), None), w, xs)

    assert "rhs_reversal" not in looped.lower(w, x[None]).compile().as_text()


@pytest.mark.parametrize(("groups", "rows"), [(2, 7), (4, 6)], ids=["groups", "depthwise"])
def test_grouped_convolutions_keep_their_values(groups, rows):
    x, w = draw(4, 6, 6, 4), draw(3, 3, 4 // groups, 8, seed=1)
    convolve = convolution(feature_group_count=groups)
    step = gradients(convolve)
    assert_unchanged(step, x, w)
    assert set(layouts(_cpu.fast_convolutions(step), x, w)) == {FAST[2]}
    # Depthwise convolutions are fastest as they are.
    text = str(jax.make_jaxpr(_cpu.fast_convolutions(convolve))(x, w))
    assert re.search(rf":f32\[4,{rows},6,8\] = conv_general_dilated", text)


plain = convolution(numbers=("NCHW", "OIHW", "NCHW"))
X, W = draw(2, 3, 5, 5), draw(3, 3, 3, 3, seed=1)  # its arguments


@jax.custom_vjp
def own_vjp(x, w):
    return plain(x, w)


own_vjp.defvjp(lambda x, w: (plain(x, w), (x, w)), lambda saved, g: (g, jnp.zeros_like(saved[1])))


@jax.custom_jvp
def own_jvp(x, w):
    return plain(x, w)


own_jvp.defjvp(lambda values, tangents: (plain(*values), tangents[0]))


def scanned(x, w):
    return lax.scan(lambda x, _: (plain(x, w), None), x, None, length=2)[0]


def looped(x, w):
    return lax.while_loop(lambda c: c[0] < 2, lambda c: (c[0] + 1, plain(c[1], w)), (0, x))[1]


def branching(x, w):
    return lax.cond(jnp.sum(x) > 0, plain, lambda x, w: -plain(x, w), x, w)


NESTED = {
    "jit": jax.jit(plain),
    "remat": jax.checkpoint(plain),
    "custom_vjp": own_vjp,
    "custom_jvp": own_jvp,
    "scan": scanned,
    "while": looped,
    "cond": branching,
    "vmap": lambda x, w: jax.vmap(lambda one: plain(one[None], w)[0])(x),
    "deep": jax.jit(jax.checkpoint(scanned)),
}


@pytest.mark.parametrize("name", NESTED)
def test_nested_convolutions_are_found(name):
    assert_unchanged(NESTED[name], X, W)
    assert set(layouts(_cpu.fast_convolutions(NESTED[name]), X, W)) == {FAST[2]}


@pytest.mark.parametrize("name", ["custom_vjp", "custom_jvp", "cond", "vmap", "deep"])
def test_derivatives_are_unchanged(name):
    gradient = jax.grad(lambda f, x, w: jnp.sum(f(x, w) ** 2), argnums=(1, 2))
    got = gradient(_cpu.fast_convolutions(NESTED[name]), X, W)
    chex.assert_trees_all_close(got, gradient(NESTED[name], X, W), rtol=RTOL, atol=1e-3)


def test_a_body_may_close_over_tracers():
    @jax.jit
    def run(x, w):
        return lax.fori_loop(0, 2, _cpu.fast_convolutions(lambda i, x: plain(x, w)), x)

    np.testing.assert_allclose(run(X, W), plain(plain(X, W), W), rtol=RTOL, atol=ATOL)


def test_a_body_without_convolutions_gives_the_same_bits_and_trees():
    def f(carry, key):
        noise = jax.random.normal(key, carry["x"].shape)
        return {"x": carry["x"] * 2 + noise, "n": carry["n"] + 1}, (noise, None)

    args = {"x": draw(3), "n": 0}, jax.random.key(0)
    chex.assert_trees_all_equal(jax.jit(_cpu.fast_convolutions(f))(*args), jax.jit(f)(*args))


def test_a_function_is_traced_once():
    traces = []

    def traced(x, w):
        traces.append(1)
        return plain(x, w)

    jax.jit(_cpu.fast_convolutions(traced))(X, W)
    assert len(traces) == 1


def unchanged(function):
    return layouts(_cpu.fast_convolutions(function), X, W) == layouts(function, X, W) != [FAST[2]]


def test_other_backends_keep_the_function(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert unchanged(plain)


def test_the_workaround_can_be_switched_off(monkeypatch):
    monkeypatch.setattr(_convolutions, "FAST_LAYOUT", False)
    assert unchanged(plain)


def test_the_inside_of_a_shard_map_stays_as_it_is():
    mesh, spec = jax.make_mesh((1,), ("d",)), jax.sharding.PartitionSpec()
    f = jax.shard_map(
        lambda x, w: lax.psum(plain(x, w), "d"), mesh=mesh, in_specs=(spec, spec), out_specs=spec
    )
    got = jax.jit(_cpu.fast_convolutions(f))(X, W)
    np.testing.assert_allclose(got, plain(X, W), rtol=RTOL, atol=ATOL)


def test_scopes_keep_their_names():
    def f(x):
        with jax.named_scope("here"):
            return jnp.sin(x)

    lowered = jax.jit(_cpu.fast_convolutions(f)).lower(jnp.ones(3))
    assert "here/sin" in lowered.as_text(debug_info=True)


# Every loop of the library over a net, with an ordinary flax net.


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(3, (3, 3), strides=2)(x))
        x = nn.relu(nn.Conv(4, (3, 3))(x))
        return nn.Dense(3)(x.reshape(len(x), -1))


IMAGES, Y, KEY = jax.nn.sigmoid(draw(2, 8, 8, 1)), jnp.array([0, 2]), jax.random.key(3)
PARAMS = Net().init(KEY, IMAGES)
APPLY = Net().apply
ATTACKS = nets.ATTACKS | {
    "pgd, restarts": partial(attack.pgd, steps=2, restarts=2),
    "apgd l1": partial(attack.apgd, norm="l1", steps=4),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_attacks_use_the_fast_layout(name):
    def run(x):
        return ATTACKS[name](APPLY, PARAMS, x, Y, eps=0.5, key=KEY)

    inside = layouts_in_loops(run, IMAGES)
    assert inside
    assert set(inside) == {FAST[2]}


@pytest.mark.parametrize("name", ["pgd", "deepfool", "fab", "square"])
def test_attacks_take_an_empty_batch_through_a_convolution(name):
    def apply_fn(w, x):
        return jnp.sum(convolution(padding="VALID")(x, w), axis=(1, 2))

    r = ATTACKS[name](apply_fn, draw(5, 5, 1, 3), IMAGES[:0], Y[:0], eps=0.5, key=KEY)
    assert (r.shape, r.dtype) == ((0, 8, 8, 1), IMAGES.dtype)


@pytest.mark.parametrize("adversary", [perturb.loss, perturb.alpha, ATTACKS["pgd"]])
def test_epochs_use_the_fast_layout(adversary):
    tx = optax.sgd(0.1)
    objective = objectives.adversarial(APPLY, adversary, eps=0.5)
    state = train.init(PARAMS, tx, key=KEY)
    epoch = train.make_epoch(objective, tx, donate=False)
    inside = layouts_in_loops(epoch, state, (IMAGES[None], Y[None]))
    # A gradient in x, one in the parameters, and their forward passes.
    assert len(inside) >= 6
    assert set(inside) == {FAST[2]}


def layouts_in_loops(function, *args):
    """Return the layouts of the convolutions in loops, and in the functions called there.

    Convolutions outside of loops stay unchanged: XLA itself brings them into the fast layout.
    """
    text = jax.jit(function).lower(*args).as_text()
    functions = dict(re.findall(r"func\.func \w+ @([\w.]+)\((.*?)\n  }\n", text, re.DOTALL))
    inside, called = [], set()
    for code in functions.values():
        depth = None
        for line in code.splitlines():
            rest = line.lstrip(" ")
            indent = len(line) - len(rest)
            if depth is None and "stablehlo.while" in rest:
                depth = indent
            elif depth is not None and rest == "}" and indent == depth:
                depth = None
            elif depth is not None:
                inside.append(rest)
    code = "\n".join(inside)
    while new := set(re.findall(r"call @([\w.]+)\(", code)) - called:
        called |= new
        code += "\n".join(functions[name] for name in new)
    return LAYOUT.findall(code)


# Weight gradients as products with patches


@pytest.mark.parametrize(
    ("name", "most"),
    [("channels last", 700), ("channels first", 1), ("examples last", 1), ("1-D", 1), ("3-D", 1)],
)
def test_a_weight_gradient_in_parts_is_the_same(name, most, monkeypatch):
    x_shape, w_shape, *rest = CONVOLUTIONS[name]
    examples = rest[-1][0].index("N")
    x = draw(*(6 if axis == examples else size for axis, size in enumerate(x_shape)))
    w = draw(*w_shape, seed=1)
    monkeypatch.setattr(_convolutions, "PATCH_BYTES", most)
    monkeypatch.setattr(_convolutions, "KERNEL_ROWS", 0)
    gradient = weight_gradient(convolution(*rest))
    assert_unchanged(gradient, x, w)
    assert "while" in jax.jit(_cpu.fast_convolutions(gradient)).lower(x, w).as_text()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_parts_are_summed_in_float32_and_cast_to_the_dtype(dtype, monkeypatch):
    x, w = jnp.ones((512, 6, 6, 1), dtype), jnp.ones((3, 3, 1, 1), dtype)

    def total(w):
        return jnp.sum(convolution(padding="VALID")(x, w).astype(jnp.float32))

    monkeypatch.setattr(_convolutions, "PATCH_BYTES", 1)
    found = jax.jit(_cpu.fast_convolutions(jax.grad(total)))(w)
    assert found.dtype == dtype
    # In bfloat16, adding sixteens would stop at 4096.
    np.testing.assert_array_equal(found.astype(jnp.float32), 16 * 512)


@pytest.mark.parametrize(
    ("examples", "most", "n"),
    [(60, 1, 1), (60, 100, 1), (60, 500, 5), (60, 900, 9), (60, 3000, 30), (60, 10**9, 60),
     (101, 9000, 51)],
)  # fmt: skip
def test_parts_have_one_size_and_fit(examples, most, n, monkeypatch):
    monkeypatch.setattr(_convolutions, "PATCH_BYTES", most)
    assert _convolutions._part(examples, 100) == n


def test_batches_spread_over_several_devices_are_not_taken_in_parts(monkeypatch):
    x, w, gradient = draw(6, 8, 8, 2), draw(3, 3, 2, 4), weight_gradient(convolution())
    monkeypatch.setattr(_convolutions, "KERNEL_ROWS", 0)
    parts = count(_cpu.fast_convolutions(gradient), x, w)
    monkeypatch.setattr(jax, "device_count", lambda: 2)
    assert count(_cpu.fast_convolutions(gradient), x, w) == parts + 1 == count(gradient, x, w)


def test_a_gradient_of_many_taps_is_not_taken_in_patches():
    x, w = draw(3, 400, 2), draw(65, 2, 4)
    gradient = weight_gradient(convolution((1,), "VALID", ("NWC", "WIO", "NWC")))
    assert count(_cpu.fast_convolutions(gradient), x, w) == count(gradient, x, w)
    assert_unchanged(gradient, x, w, atol=2 * ATOL)


def test_parts_can_be_summed_in_a_shard_map(monkeypatch):
    mesh = jax.make_mesh((1,), ("data",), (jax.sharding.AxisType.Auto,))
    x, w = draw(6, 8, 8, 2), draw(3, 3, 2, 4)

    def gradient(x, w):
        return weight_gradient(convolution())(x, w)[None]

    monkeypatch.setattr(_convolutions, "PATCH_BYTES", 1)
    monkeypatch.setattr(_convolutions, "KERNEL_ROWS", 0)
    spec = jax.sharding.PartitionSpec("data")
    sharded = jax.shard_map(
        lambda x, ws: _cpu.fast_convolutions(gradient)(x, ws[0]),
        mesh=mesh, in_specs=spec, out_specs=spec,
    )  # fmt: skip
    chex.assert_trees_all_close(sharded(x, w[None]), gradient(x, w), rtol=RTOL, atol=ATOL)


EMPTY = {
    "no examples": ((0, 8, 8, 2), (3, 3, 2, 4), 1, "SAME"),
    "no channels": ((3, 8, 8, 0), (3, 3, 0, 4), 1, "SAME"),
    "a kernel larger than the image": ((3, 2, 2, 2), (3, 3, 2, 4), 1, "VALID"),
    "no examples, with strides": ((0, 8, 8, 2), (3, 3, 2, 4), 2, "SAME"),
}


@pytest.mark.parametrize("name", EMPTY)
def test_convolutions_of_empty_arrays_give_the_same_bits(name):
    x_shape, w_shape, stride, padding = EMPTY[name]
    step = gradients(convolution((stride, stride), padding))
    args = jnp.ones(x_shape), jnp.ones(w_shape)
    chex.assert_trees_all_equal(_cpu.fast_convolutions(step)(*args), step(*args))


def test_a_body_takes_keywords_and_keeps_its_name():
    @_cpu.fast_convolutions
    def scaled(x, *, by):
        return by * x

    assert scaled.__name__ == "scaled"
    assert float(jax.jit(scaled)(2.0, by=3.0)) == 6


# Versions of JAX


class Without:
    """A jaxpr as in another version of JAX: without an attribute, at any depth."""

    def __init__(self, inner, gone):
        self._inner, self._gone = inner, gone

    def __getattr__(self, name):
        if name == self._gone:
            raise AttributeError(name)
        value = getattr(self._inner, name)
        if name == "eqns":
            return [Without(eqn, self._gone) for eqn in value]
        return Without(value, self._gone) if name in ("primitive", "ctx", "source_info") else value


@pytest.mark.parametrize("gone", ["bind", "ctx", "eqns", "get_bind_params", "name_stack"])
def test_a_function_runs_unchanged_with_one_warning_if_jax_lacks(gone, monkeypatch):
    make = jax.make_jaxpr

    def renamed(function, **options):
        def trace(*args):
            jaxpr, *shape = make(function, **options)(*args)
            return Without(jaxpr, gone), *shape

        return trace

    expected = jnp.sin(plain(X, W))
    monkeypatch.setattr(jax, "make_jaxpr", renamed)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(2):
            got = _cpu.fast_convolutions(lambda x, w: jnp.sin(plain(x, w)))(X, W)
            np.testing.assert_array_equal(got, expected)
    (one,) = caught
    assert one.category is RuntimeWarning
    assert re.match(rf"jaxadv cannot read .* jax {jax.__version__} ", str(one.message))


def test_a_function_runs_unchanged_if_jax_lacks_its_convolution(monkeypatch):
    monkeypatch.delattr(lax, "conv_general_dilated_p")
    with pytest.warns(RuntimeWarning, match="conv_general_dilated_p.*leaves them unchanged"):
        got = _cpu.fast_convolutions(plain)(X, W)
    np.testing.assert_array_equal(got, plain(X, W))


def test_errors_of_the_function_are_raised():
    def failing(x):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        _cpu.fast_convolutions(failing)(1.0)


# Whether XLA still needs each part of the workaround. If one of these fails, try to delete it.


@pytest.fixture
def optimized():
    """Compile as users do, with the optimisations that `conftest` disables."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


def in_a_loop(function, carry):
    body = _cpu.fast_convolutions(lambda carry, _: (carry + 1e-6 * function(carry), None))
    return jax.jit(lambda x: lax.scan(body, x, None, length=3)[0]).lower(carry).compile()


def backward(convolve, argument, x, w):
    """A convolution's pull-back to x or to w, as a function of that argument; and the argument."""
    args = [x, w]

    def pull_back(value):
        args[argument] = value
        y, vjp = jax.vjp(convolve, *args)
        return vjp(jnp.full_like(y, value.ravel()[0]))[argument]

    return pull_back, args[argument]


def slowdown(function, carry, monkeypatch, **settings):
    """The ratio of CPU times of a loop with these settings of `_cpu` and without."""
    loops = [in_a_loop(function, carry)]
    with monkeypatch.context() as patch:
        for name, value in settings.items():
            patch.setattr(_convolutions, name, value)
        loops.append(in_a_loop(function, carry))
    times = [], []
    for _ in range(10):
        for loop, seconds in zip(loops, times, strict=True):
            start = time.process_time()
            jax.block_until_ready(loop(carry))
            seconds.append(time.process_time() - start)
    return min(times[1]) / min(times[0])


@pytest.mark.slow
@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize("argument", [0, 1], ids=["image", "weights"])
def test_xla_still_needs_the_fast_layout_in_loops(argument, monkeypatch):
    pull_back = backward(convolution(), argument, draw(16, 14, 14, 32), draw(3, 3, 32, 32))
    assert slowdown(*pull_back, monkeypatch, FAST_LAYOUT=False) > 2  # 8 and 40 or more


# Weight gradients: the convolution's stride and taps, settings, and the least slowdown they cause.
SLOWER = {
    "rows": (1, 3, {"KERNEL_ROWS": 0, "PATCH_PLACES": 0}, 1.1),  # 1.5 to 1.9
    "patches": (2, 1, {"PATCH_PLACES": 0}, 1.5),  # 3
}


@pytest.mark.slow
@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize("name", SLOWER)
def test_xla_still_needs_help_with_weight_gradients(name, monkeypatch):
    stride, taps, settings, least = SLOWER[name]
    x, w = draw(64, 14, 14, 128), draw(taps, taps, 128, 128)
    pull_back = backward(convolution((stride, stride)), 1, x, w)
    assert slowdown(*pull_back, monkeypatch, **settings) > least


@pytest.mark.slow
@pytest.mark.usefixtures("optimized")
def test_xla_still_needs_more_rows_in_results_to_use_another_kernel_than_ynnpack(monkeypatch):
    # Not timed: the gain comes from a second core, which may be busy.
    x, w = draw(64, 28, 28, 32), draw(3, 3, 32, 32)

    def forward(x):
        return convolution()(x, w)

    assert "__ynn_fusion" not in in_a_loop(forward, x).as_text()
    monkeypatch.setattr(_convolutions, "RESULT_ROWS", 0)
    assert "__ynn_fusion" in in_a_loop(forward, x).as_text()
