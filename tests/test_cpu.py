"""`jaxadv._cpu`: convolutions in loops have the layout that is fast on CPU, and the same values.

What decides the speed is counted here.
"""

import re
import warnings
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from jax import lax

from jaxadv import _cpu, attack, loops, objectives, perturb, train

pytestmark = pytest.mark.usefixtures("cpu")

FAST = {
    1: "[b, 0, f]x[0, i, o]->[b, 0, f]",
    2: "[b, 0, 1, f]x[0, 1, i, o]->[b, 0, 1, f]",
    3: "[b, 0, 1, 2, f]x[0, 1, 2, i, o]->[b, 0, 1, 2, f]",
}
# Sums of up to 250 products of numbers of size 1, in another order: a few roundings of 2^-24.
RTOL, ATOL = 1e-5, 1e-4
NHWC = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}


@pytest.fixture
def cpu():
    if jax.default_backend() != "cpu":
        pytest.skip("on other backends, loops are left as they are")


def layouts(function, *args):
    """Return the layouts of all convolutions that a function makes, one for each."""
    text = jax.jit(function).lower(*args).as_text()
    return re.findall(r"stablehlo\.convolution.*dim_numbers = (\[.*?\]x\[.*?\]->\[.*?\])", text)


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


# Each: x's shape, the kernel's, and lax.conv_general_dilated's other arguments.
CONVOLUTIONS = {
    "channels last": ((2, 6, 6, 3), (3, 3, 3, 4), (1, 1), "SAME", ("NHWC", "HWIO", "NHWC")),
    "channels first": ((2, 3, 6, 6), (4, 3, 3, 3), (1, 1), "VALID", ("NCHW", "OIHW", "NCHW")),
    "mixed": ((2, 3, 6, 5), (3, 2, 3, 4), (1, 2), "SAME", ("NCHW", "HWIO", "NHWC")),
    "examples last": ((6, 5, 3, 2), (3, 2, 3, 4), (2, 1), "SAME", ("HWCN", "HWIO", "CNHW")),
    "1-D": ((2, 9, 3), (3, 3, 4), (2,), "SAME", ("NWC", "WIO", "NWC")),
    "3-D": ((2, 3, 4, 5, 4), (4, 3, 2, 2, 2), (1, 1, 2), "VALID", ("NCDHW", "OIDHW", "NCDHW")),
}


LACKING = {("channels last", ""), ("mixed", "")}


@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize(
    "more", [{}, {"rhs_dilation": 2}, {"lhs_dilation": 2}], ids=["", "dilated", "transposed"]
)
def test_values_and_gradients_are_the_same_and_every_layout_is_the_fast_one(name, more):
    x_shape, w_shape, strides, padding, numbers = CONVOLUTIONS[name]
    x, w = draw(*x_shape), draw(*w_shape, seed=1)
    more = {name: (value,) * len(strides) for name, value in more.items()}
    if "lhs_dilation" in more:
        padding = [(1, 1)] * len(strides)

    def total(x, w):
        y = lax.conv_general_dilated(x, w, strides, padding, dimension_numbers=numbers, **more)
        return jnp.sum(jnp.sin(y))

    step = jax.value_and_grad(total, argnums=(0, 1))
    chex.assert_trees_all_close(
        _cpu.fast_convolutions(step)(x, w), step(x, w), rtol=RTOL, atol=ATOL
    )
    found = layouts(_cpu.fast_convolutions(step), x, w)
    # The gradient of the weights is a sum of matrix products, but for images that lack few rows.
    n = 3 if (name, "rhs" if "rhs_dilation" in more else "lhs" if more else "") in LACKING else 2
    assert found == [FAST[len(strides)]] * n
    if name != "channels last":
        assert found != layouts(step, x, w)


@pytest.mark.parametrize(
    ("image", "size", "strides", "padding", "rows"),
    [
        (28, 3, 1, "SAME", 29),  # one more than the image has, and than is asked for
        (28, 3, 1, "VALID", 29),
        (28, 9, 1, "VALID", 20),  # nine more would be too many
        (28, 3, 2, "SAME", 14),
        (28, 3, 1, [(2, 2), (1, 1)], 30),
        (4, 3, 1, "SAME", 5),
        (3, 3, 1, "SAME", 3),
    ],
)
def test_results_have_more_rows_than_the_image_where_few_are_missing(
    image, size, strides, padding, rows
):
    x, w = draw(2, image, image, 3), draw(size, size, 3, 4, seed=1)

    def convolve(x, w):
        return lax.conv_general_dilated(x, w, (strides, 1), padding, **NHWC)

    text = str(jax.make_jaxpr(_cpu.fast_convolutions(convolve))(x, w))
    (found,) = re.findall(r"f32\[2,(\d+),\d+,4\] = conv_general_dilated", text)
    assert int(found) == rows
    # The same sums of the same numbers: what is added is cut off.
    np.testing.assert_allclose(
        _cpu.fast_convolutions(convolve)(x, w), convolve(x, w), rtol=RTOL, atol=ATOL, strict=True
    )


@pytest.mark.parametrize(
    ("image", "size", "strides", "padding", "rows"),
    [
        (28, 3, 1, "SAME", 29),
        (28, 3, 1, "VALID", 29),
        (28, 5, 1, "SAME", 29),
        (28, 5, 1, "VALID", 29),
        (28, 2, 1, "SAME", 29),
        (28, 3, 1, [(0, 1), (2, 0)], 29),
        (28, 7, 1, "VALID", None),  # seven more would be too many
        (28, 3, 2, "SAME", None),
        (28, 1, 1, "SAME", None),  # 29 x 28 is more than the image
        (28, 3, 1, [(1, 1), (2, -1)], None),
    ],
)
def test_in_gradients_of_weights_kernels_have_more_rows_than_the_image_where_few_are_missing(
    image, size, strides, padding, rows
):
    x, w = draw(2, image, image, 3), draw(size, size, 3, 20, seed=1)

    def gradient(x, w):
        def total(w):
            y = lax.conv_general_dilated(x, w, (strides, strides), padding, **NHWC)
            return jnp.sum(jnp.sin(y))

        return jax.grad(total)(w)

    text = str(jax.make_jaxpr(_cpu.fast_convolutions(gradient))(x, w))
    results = re.findall(r"f32\[3,\d+,\d+,20\] = conv_general_dilated\[", text)
    longer = re.findall(rf":f32\[{rows},\d+,2,20\] = pad\[", text)
    assert (len(results), len(longer)) == ((1, 1) if rows else (0, 0))
    np.testing.assert_allclose(
        _cpu.fast_convolutions(gradient)(x, w),
        gradient(x, w),
        rtol=RTOL,
        atol=ATOL * size,
        strict=True,
    )

    # XLA exchanges operands of which the kernel is the larger, and has no fast program for that.
    @jax.jit
    def looped(w, xs):
        return lax.scan(lambda w, x: (_cpu.fast_convolutions(gradient)(x, w), None), w, xs)

    assert "rhs_reversal" not in looped.lower(w, x[None]).compile().as_text()


@pytest.mark.parametrize(("groups", "rows"), [(2, 7), (4, 6)], ids=["groups", "depthwise"])
def test_grouped_convolutions_keep_their_values(groups, rows):
    x, w = draw(4, 6, 6, 4), draw(3, 3, 4 // groups, 8, seed=1)

    def convolve(x, w):
        return lax.conv_general_dilated(
            x,
            w,
            (1, 1),
            "SAME",
            dimension_numbers=NHWC["dimension_numbers"],
            feature_group_count=groups,
        )

    def total(x, w):
        return jnp.sum(jnp.sin(convolve(x, w)))

    step = jax.value_and_grad(total, argnums=(0, 1))
    chex.assert_trees_all_close(
        _cpu.fast_convolutions(step)(x, w), step(x, w), rtol=RTOL, atol=ATOL
    )
    assert set(layouts(_cpu.fast_convolutions(step), x, w)) == {FAST[2]}
    # Channels convolved each by itself are fastest as they are.
    text = str(jax.make_jaxpr(_cpu.fast_convolutions(convolve))(x, w))
    assert f"f32[4,{rows},6,8] = conv_general_dilated" in re.sub(r"\w+:(f32\S+)", r"\1", text)


NUMBERS = ("NCHW", "OIHW", "NCHW")


def plain(x, w):
    return lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=NUMBERS)


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
def test_convolutions_are_found_wherever_they_are(name):
    f, x, w = NESTED[name], draw(2, 3, 5, 5), draw(3, 3, 3, 3, seed=1)
    chex.assert_trees_all_close(_cpu.fast_convolutions(f)(x, w), f(x, w), rtol=RTOL, atol=ATOL)
    assert set(layouts(_cpu.fast_convolutions(f), x, w)) == {FAST[2]}


@pytest.mark.parametrize("name", sorted(set(NESTED) - {"while"}))  # it has no reverse mode
def test_a_body_has_its_own_derivatives(name):
    f, x, w = NESTED[name], draw(2, 3, 5, 5), draw(3, 3, 3, 3, seed=1)
    gradient = jax.grad(lambda f, x, w: jnp.sum(f(x, w) ** 2), argnums=(1, 2))
    chex.assert_trees_all_close(
        gradient(_cpu.fast_convolutions(f), x, w), gradient(f, x, w), rtol=RTOL, atol=1e-3
    )


def test_a_body_may_close_over_what_is_traced():
    x, w = draw(2, 3, 5, 5), draw(3, 3, 3, 3, seed=1)

    @jax.jit
    def run(x, w):
        return lax.fori_loop(0, 2, _cpu.fast_convolutions(lambda i, x: plain(x, w)), x)

    np.testing.assert_allclose(run(x, w), plain(plain(x, w), w), rtol=RTOL, atol=ATOL)


def test_a_body_without_convolutions_gives_the_same_bits_and_keeps_its_trees():
    def f(carry, key):
        noise = jax.random.normal(key, carry["x"].shape)
        return {"x": carry["x"] * 2 + noise, "n": carry["n"] + 1}, (noise, None)

    carry, key = {"x": draw(3), "n": 0}, jax.random.key(0)
    chex.assert_trees_all_equal(
        jax.jit(_cpu.fast_convolutions(f))(carry, key), jax.jit(f)(carry, key)
    )


def test_a_function_is_traced_once():
    traces = []

    @jax.jit
    def run(x):
        return _cpu.fast_convolutions(
            lambda x: (traces.append(1), plain(x, jnp.ones((3, 3, 3, 3))))[1]
        )(x)

    run(draw(2, 3, 5, 5))
    assert len(traces) == 1


def test_other_backends_keep_the_function(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    x, w = draw(2, 3, 5, 5), draw(3, 3, 3, 3, seed=1)
    assert layouts(_cpu.fast_convolutions(plain), x, w) == layouts(plain, x, w) != [FAST[2]]


def test_what_is_in_a_shard_map_stays_as_it_is():
    x, w = draw(2, 3, 5, 5), draw(3, 3, 3, 3, seed=1)
    mesh = jax.make_mesh((1,), ("d",))
    spec = jax.sharding.PartitionSpec()

    def total(x, w):
        return lax.psum(plain(x, w), "d")

    f = jax.shard_map(total, mesh=mesh, in_specs=(spec, spec), out_specs=spec)
    got = jax.jit(_cpu.fast_convolutions(f))(x, w)
    np.testing.assert_allclose(got, plain(x, w), rtol=RTOL, atol=ATOL)


def test_scopes_keep_their_names():
    def f(x):
        with jax.named_scope("here"):
            return jnp.sin(x)

    lowered = jax.jit(_cpu.fast_convolutions(f)).lower(jnp.ones(3))
    assert "here/sin" in lowered.as_text(debug_info=True)


# Every loop of the library over a net, on a flax net as people write it.


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(3, (3, 3), strides=2)(x))
        x = nn.relu(nn.Conv(4, (3, 3))(x))
        return nn.Dense(3)(x.reshape(len(x), -1))


X, Y, KEY = jax.nn.sigmoid(draw(2, 8, 8, 1)), jnp.array([0, 2]), jax.random.key(3)
PARAMS = Net().init(KEY, X)
APPLY = Net().apply
ATTACKS = {
    "pgd": partial(attack.pgd, eps=0.5, steps=2),
    "pgd, restarts": partial(attack.pgd, eps=0.5, steps=2, restarts=2),
    "apgd": partial(attack.apgd, eps=0.5, steps=4, restarts=2),
    "apgd l1": partial(attack.apgd, norm="l1", eps=0.5, steps=4),
    "apgd_multitargeted": partial(attack.apgd_multitargeted, eps=0.5, steps=4, n_targets=2),
    "deepfool": attack.deepfool,
    "fmn": partial(attack.fmn, steps=2),
    "fab": partial(attack.fab, steps=2, n_targets=2),
    "square": partial(attack.square, eps=0.5, steps=2, bounds=(0.0, 1.0)),
    "virtual": partial(attack.pgd_kl, eps=0.5, steps=2),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_attacks_keep_a_flax_net_off_the_slow_path(name):
    def run(x):
        return ATTACKS[name](APPLY, PARAMS, x, Y, key=KEY)

    inside = in_loops(run, X)
    assert inside
    assert set(inside) == {FAST[2]}


@pytest.mark.parametrize("name", ATTACKS)
def test_attacks_take_a_batch_of_no_examples_through_a_convolution(name):
    def apply_fn(w, x):
        return jnp.sum(lax.conv_general_dilated(x, w, (1, 1), "VALID", **NHWC), axis=(1, 2))

    r = ATTACKS[name](apply_fn, draw(5, 5, 1, 3), X[:0], Y[:0], key=KEY)
    assert (r.shape, r.dtype) == ((0, 8, 8, 1), X.dtype)


@pytest.mark.parametrize("adversary", [perturb.loss, perturb.alpha, ATTACKS["pgd"]])
def test_epochs_keep_a_flax_net_off_the_slow_path(adversary):
    tx = optax.sgd(0.1)
    objective = objectives.adversarial(APPLY, adversary, eps=0.5)
    state = train.init(PARAMS, tx, key=KEY)
    inside = in_loops(train.make_epoch(objective, tx, donate=False), state, (X[None], Y[None]))
    # A gradient in x, one in the parameters, their forward passes.
    assert len(inside) >= 6
    assert set(inside) == {FAST[2]}


def in_loops(function, *args):
    """Return the layouts of the convolutions in a function's loops, functions they call included.

    What isn't in a loop is left as the net has it, and XLA sees to that.
    """
    text = jax.jit(function).lower(*args).as_text()
    functions = dict(re.findall(r"func\.func \w+ @([\w.]+)\((.*?)\n  }\n", text, re.DOTALL))
    loops_, called = [], set()
    for code in functions.values():
        indent, depth = re.compile(r"^( *)(.*)$"), None
        for line in code.splitlines():
            spaces, rest = indent.match(line).groups()
            if depth is None and "stablehlo.while" in rest:
                depth = len(spaces)
            elif depth is not None and rest == "}" and len(spaces) == depth:
                depth = None
            elif depth is not None:
                loops_.append(rest)
    code = "\n".join(loops_)
    while new := set(re.findall(r"call @([\w.]+)\(", code)) - called:
        called |= new
        code += "\n".join(functions[name] for name in new)
    return re.findall(r"stablehlo\.convolution.*dim_numbers = (\[.*?\]x\[.*?\]->\[.*?\])", code)


@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("most", [1, 700])
def test_a_weight_gradient_in_parts_is_the_same(name, most, monkeypatch):
    x_shape, w_shape, strides, padding, numbers = CONVOLUTIONS[name]
    examples = numbers[0].index("N")
    x_shape = tuple(6 if axis == examples else size for axis, size in enumerate(x_shape))
    x, w = draw(*x_shape), draw(*w_shape, seed=1)

    def total(w, x):
        y = lax.conv_general_dilated(x, w, strides, padding, dimension_numbers=numbers)
        return jnp.sum(jnp.sin(y))

    monkeypatch.setattr(loops, "_PATCHES", most)
    monkeypatch.setattr(loops, "_MORE", 0)  # rows, so that none is a convolution
    gradient = jax.grad(total)
    # Against a sum in one piece of the same numbers, in another order.
    chex.assert_trees_all_close(
        _cpu.fast_convolutions(gradient)(w, x), gradient(w, x), rtol=RTOL, atol=ATOL
    )
    assert "while" in jax.jit(_cpu.fast_convolutions(gradient)).lower(w, x).as_text()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_parts_are_summed_in_float32_and_have_the_dtype_of_the_whole(dtype, monkeypatch):
    x = jnp.ones((512, 4, 4, 1), dtype)
    w = jnp.ones((3, 3, 1, 1), dtype)

    def total(w):
        return jnp.sum(lax.conv_general_dilated(x, w, (1, 1), "VALID", **NHWC).astype(jnp.float32))

    monkeypatch.setattr(loops, "_PATCHES", 1)
    found = jax.jit(_cpu.fast_convolutions(jax.grad(total)))(w)
    assert found.dtype == dtype
    # In bfloat16, a sum of ones and fours would stop at 256.
    np.testing.assert_array_equal(found.astype(jnp.float32), 4 * 512)


@pytest.mark.parametrize(
    ("examples", "most", "n"),
    [(60, 1, 1), (60, 100, 1), (60, 500, 5), (60, 900, 9), (60, 3000, 30), (60, 10**9, 60),
     (101, 9000, 51)],
)  # fmt: skip
def test_parts_have_as_many_examples_as_fit_and_are_of_one_size(examples, most, n, monkeypatch):
    monkeypatch.setattr(loops, "_PATCHES", most)
    assert loops._part(examples, 100) == n


def test_examples_that_several_devices_share_arent_taken_in_parts(monkeypatch):
    x, w = draw(6, 8, 8, 2), draw(3, 3, 2, 4)

    def gradient(w):
        return jax.grad(lambda w: jnp.sum(lax.conv_general_dilated(x, w, (1, 1), "SAME", **NHWC)))(
            w
        )

    monkeypatch.setattr(loops, "_MORE", 0)
    forward = 1
    assert convolutions(_cpu.fast_convolutions(gradient), w) == forward
    monkeypatch.setattr(jax, "device_count", lambda: 2)
    assert convolutions(_cpu.fast_convolutions(gradient), w) == forward + 1


def convolutions(function, *args):
    return str(jax.make_jaxpr(function)(*args)).count("conv_general_dilated[")


EMPTY = {
    "no examples": ((0, 8, 8, 2), (3, 3, 2, 4), 1, "SAME"),
    "no rows": ((3, 0, 8, 2), (3, 3, 2, 4), 1, "SAME"),
    "no channels": ((3, 8, 8, 0), (3, 3, 0, 4), 1, "SAME"),
    "no features": ((3, 8, 8, 2), (3, 3, 2, 0), 1, "SAME"),
    "a kernel larger than the image": ((3, 2, 2, 2), (3, 3, 2, 4), 1, "VALID"),
    "no examples, with strides": ((0, 8, 8, 2), (3, 3, 2, 4), 2, "SAME"),
    "no examples, a kernel larger than the result": ((0, 8, 8, 2), (5, 5, 2, 4), 1, "VALID"),
}


@pytest.mark.parametrize("name", EMPTY)
def test_what_convolves_nothing_is_as_outside_a_loop(name):
    x_shape, w_shape, stride, padding = EMPTY[name]
    x, w = jnp.ones(x_shape), jnp.ones(w_shape)

    def total(x, w):
        return jnp.sum(lax.conv_general_dilated(x, w, (stride, stride), padding, **NHWC))

    step = jax.value_and_grad(total, argnums=(0, 1))
    chex.assert_trees_all_equal(_cpu.fast_convolutions(step)(x, w), step(x, w))


def test_a_gradient_of_many_places_isnt_made_place_by_place():
    x, w = draw(3, 400, 2), draw(65, 2, 4)

    def gradient(w):
        return jax.grad(
            lambda w: jnp.sum(
                lax.conv_general_dilated(
                    x, w, (1,), "VALID", dimension_numbers=("NWC", "WIO", "NWC")
                )
            )
        )(w)

    assert convolutions(_cpu.fast_convolutions(gradient), w) == 2
    chex.assert_trees_all_close(
        _cpu.fast_convolutions(gradient)(w), gradient(w), rtol=RTOL, atol=ATOL
    )


def test_a_body_takes_keywords_and_keeps_its_name():
    @_cpu.fast_convolutions
    def scaled(x, *, by):
        return by * x

    assert scaled.__name__ == "scaled"
    assert float(jax.jit(scaled)(2.0, by=3.0)) == 6


def test_parts_can_be_summed_in_a_shard_map(monkeypatch):
    auto = jax.sharding.AxisType.Auto
    mesh = jax.make_mesh((1,), ("data",), (auto,))
    x, w = draw(6, 8, 8, 2), draw(3, 3, 2, 4)

    def gradient(x, w):
        return jax.grad(
            lambda w: jnp.sum(lax.conv_general_dilated(x, w, (1, 1), "SAME", **NHWC) ** 2)
        )(w)[None]

    monkeypatch.setattr(loops, "_PATCHES", 1)
    spec = jax.sharding.PartitionSpec
    sharded = jax.shard_map(
        lambda x, ws: _cpu.fast_convolutions(gradient)(x, ws[0]),
        mesh=mesh, in_specs=spec("data"), out_specs=spec("data"),
    )  # fmt: skip
    chex.assert_trees_all_close(sharded(x, w[None]), gradient(x, w), rtol=RTOL, atol=ATOL)


class Without:
    """A jaxpr as another version of JAX may have it: without an attribute, at whatever depth."""

    def __init__(self, inner, gone):
        self._inner, self._gone = inner, gone

    def __getattr__(self, name):
        if name == self._gone:
            raise AttributeError(name)
        value = getattr(self._inner, name)
        if name == "eqns":
            return [Without(eqn, self._gone) for eqn in value]
        return Without(value, self._gone) if name in ("primitive", "ctx", "source_info") else value


GONE = (
    "bind",
    "constvars",
    "ctx",
    "eqns",
    "get_bind_params",
    "invars",
    "manager",
    "multiple_results",
    "name",
    "name_stack",
    "outvars",
    "params",
    "primitive",
    "source_info",
)


@pytest.mark.parametrize("gone", GONE)
def test_where_jax_has_renamed_what_is_read_a_function_is_unchanged_with_one_warning(
    gone, monkeypatch
):
    x, w = draw(2, 3, 5, 5), draw(3, 3, 3, 3, seed=1)
    make = jax.make_jaxpr

    def renamed(function, **options):
        def trace(*args):
            jaxpr, *shape = make(function, **options)(*args)
            return Without(jaxpr, gone), *shape

        return trace

    expected = jnp.sin(plain(x, w))
    monkeypatch.setattr(jax, "make_jaxpr", renamed)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(2):
            got = _cpu.fast_convolutions(lambda x, w: jnp.sin(plain(x, w)))(x, w)
            np.testing.assert_array_equal(got, expected)
    (one,) = caught
    assert one.category is RuntimeWarning
    assert re.match(rf"jaxadv cannot read .* jax {jax.__version__} ", str(one.message))


def test_where_jax_has_renamed_its_convolution_a_function_is_unchanged(monkeypatch):
    monkeypatch.delattr(lax, "conv_general_dilated_p")
    x, w = draw(2, 3, 5, 5), draw(3, 3, 3, 3, seed=1)
    with pytest.warns(RuntimeWarning, match="conv_general_dilated_p.*leaves them unchanged"):
        got = _cpu.fast_convolutions(plain)(x, w)
    np.testing.assert_array_equal(got, plain(x, w))


def test_an_error_of_the_function_is_its_own():
    def failing(x):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        _cpu.fast_convolutions(failing)(1.0)
