"""The nets: their two parts, the paper's sizes, convolutions, and parameters from files."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.lib import models
from experiments.lib.models import Classifier, function, init, lenet, mlp, train_function, vgg
from jaxadv import losses, perturb

X = jnp.asarray(np.random.default_rng(0).random((5, 4, 3, 1)), jnp.float32)
DIGITS = jnp.asarray(np.random.default_rng(1).random((2, 28, 28, 1)), jnp.float32)
PHOTOS = jnp.asarray(np.random.default_rng(2).random((2, 28, 28, 3)), jnp.float32)


def made(**kwargs):
    net = Classifier((7, 6), classes=3, **kwargs)
    return net, init(net, jax.random.key(0), X)


def shapes(net, x):
    leaves, _ = jax.tree_util.tree_flatten_with_path(jax.eval_shape(net.init, jax.random.key(0), x))
    return {
        jax.tree_util.keystr(path[1:-1], simple=True, separator="/"): leaf.shape
        for path, leaf in leaves
        if leaf.ndim > 1
    }


def test_the_two_parts_compose_to_the_net():
    net, params = made()
    h = function(net, "encode")(params, X)
    assert h.shape == (5, 7)
    logits = function(net, "classify")(params, h)
    np.testing.assert_array_equal(logits, function(net)(params, X))


@pytest.mark.parametrize(("split", "shape"), [(0, (4, 3, 1)), (1, (7,)), (2, (6,))])
def test_split_sets_where_the_representation_is(split, shape):
    net, params = made(split=split)
    assert function(net, "encode")(params, X).shape == (5, *shape)


def test_an_mlp_is_the_net_of_section_7_2():
    net, params = made()
    p = jax.tree.map(np.asarray, params["params"])
    h = np.asarray(X).reshape(5, -1)
    for name in ("hidden_0", "hidden_1"):
        h = np.maximum(h @ p[name]["kernel"] + p[name]["bias"], 0)
    logits = h @ p["logits"]["kernel"] + p["logits"]["bias"]
    # Sums of at most 12 products of order 1, in a different order.
    np.testing.assert_allclose(function(net)(params, X), logits, atol=1e-6)


def test_a_pooled_nets_dense_layers_get_the_means_of_the_channels():
    net = models.conv((5,))
    params = init(net, jax.random.key(0), PHOTOS)
    p = jax.tree.map(np.asarray, params["params"])
    means = np.asarray(net.clone(split=3, pooled=False).apply(params, PHOTOS, method="encode"))
    h = np.maximum(means.mean((1, 2)) @ p["hidden_0"]["kernel"] + p["hidden_0"]["bias"], 0)
    logits = h @ p["logits"]["kernel"] + p["logits"]["bias"]
    # Sums of at most 64 products of order 1, in a different order.
    np.testing.assert_allclose(function(net)(params, PHOTOS), logits, atol=1e-5)


@pytest.mark.parametrize("widths", [(), (5,)])
def test_a_pooled_net_accepts_images_of_any_size(widths):
    net = models.conv(widths)
    params = stored(net, PHOTOS)
    for shape in ((28, 28, 3), (8, 8, 3), (19, 40, 3)):
        assert models.recognised(params, shape) == net
    with pytest.raises(ValueError, match=r"images of at least 8x8 pixels for .*-mean"):
        models.recognised(params, (7, 40, 3))


def test_the_nets_have_the_papers_sizes():
    assert shapes(mlp((500, 400)), DIGITS) == {
        "hidden_0": (784, 500), "hidden_1": (500, 400), "logits": (400, 10),
    }  # fmt: skip
    assert shapes(lenet((500,)), DIGITS) == {
        "convs_0_0": (5, 5, 1, 20), "convs_1_0": (5, 5, 20, 50), "hidden_0": (800, 500),
        "logits": (500, 10),
    }  # fmt: skip
    assert shapes(vgg((2048, 2048)), PHOTOS) == {
        "convs_0_0": (3, 3, 3, 128), "convs_0_1": (3, 3, 128, 128), "convs_0_2": (3, 3, 128, 128),
        "convs_1_0": (3, 3, 128, 256), "convs_1_1": (3, 3, 256, 256), "convs_1_2": (3, 3, 256, 256),
        "hidden_0": (7 * 7 * 256, 2048), "hidden_1": (2048, 2048), "logits": (2048, 10),
    }  # fmt: skip


def test_width_scales_every_hidden_layer():
    assert shapes(vgg((2048, 2048), width=1 / 64), PHOTOS) == {
        "convs_0_0": (3, 3, 3, 2), "convs_0_1": (3, 3, 2, 2), "convs_0_2": (3, 3, 2, 2),
        "convs_1_0": (3, 3, 2, 4), "convs_1_1": (3, 3, 4, 4), "convs_1_2": (3, 3, 4, 4),
        "hidden_0": (7 * 7 * 4, 32), "hidden_1": (32, 32), "logits": (32, 10),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("net", "x", "shape"),
    [
        (lenet((30,)), DIGITS, (4, 4, 50)),
        (lenet((30,), split=1), DIGITS, (12, 12, 20)),
        (lenet((30,), split=3), DIGITS, (30,)),
        (vgg((64, 32), width=1 / 8), PHOTOS, (8,)),  # before the last two dense layers
    ],
)
def test_the_representation_of_a_convolutional_net(net, x, shape):
    params = init(net, jax.random.key(3), x)
    h = function(net, "encode")(params, x)
    assert h.shape == (2, *shape)
    np.testing.assert_array_equal(
        function(net, "classify")(params, h), function(net)(params, x), strict=True
    )


def convolved(x, kernel, padding):
    """The convolution by its definition, in float64."""
    x, kernel = (np.asarray(a, np.float64) for a in (x, kernel))
    x = np.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    size = len(kernel)
    height, width = x.shape[1] - size + 1, x.shape[2] - size + 1
    out = np.zeros((len(x), height, width, kernel.shape[3]))
    for i in range(height):
        for j in range(width):
            out[:, i, j] = np.tensordot(x[:, i : i + size, j : j + size], kernel, 3)
    return out


SIZES = [(1, 0), (3, 1), (5, 0)]  # kernel size and padding
IMAGES = [(6, 8, 4), (7, 6, 9)]
FORMS = (models._convolve, models._by_windows)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("image", IMAGES)
@pytest.mark.parametrize(("size", "padding"), SIZES)
def test_each_form_of_the_convolution_matches_the_definition(form, image, size, padding):
    rng = np.random.default_rng(size)
    x, kernel = rng.normal(size=(3, *image)), rng.normal(size=(size, size, image[2], 5))
    x, kernel = (jnp.asarray(a, jnp.float32) for a in (x, kernel))
    reference = convolved(x, kernel, padding)
    # Sums of at most 225 products of order 1 are off by at most 225 ulps.
    np.testing.assert_allclose(form(x, kernel, padding), reference, atol=225 * 2**-23)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("image", IMAGES)
@pytest.mark.parametrize(("size", "padding"), SIZES)
def test_the_gradients_of_each_form_match_the_definition(x64, form, image, size, padding):
    rng = np.random.default_rng(size)
    x, kernel = (rng.normal(size=s) for s in ((3, *image), (size, size, image[2], 5)))
    g = rng.normal(size=convolved(x, kernel, padding).shape)
    _, pull = jax.vjp(lambda *args: form(*args, padding), jnp.asarray(x), jnp.asarray(kernel))
    in_x, in_kernel = pull(jnp.asarray(g))
    # The convolution is linear in each, so a difference quotient of step 1 is exact.
    for _ in range(3):
        dx, dk = rng.normal(size=x.shape), rng.normal(size=kernel.shape)
        np.testing.assert_allclose(
            np.sum(in_x * dx), np.sum(g * convolved(dx, kernel, padding)), rtol=1e-11
        )
        np.testing.assert_allclose(
            np.sum(in_kernel * dk), np.sum(g * convolved(x, dk, padding)), rtol=1e-11
        )


@pytest.mark.parametrize(("net", "x"), [(lenet((9,)), DIGITS), (vgg((32, 32), width=0.25), PHOTOS)])
def test_on_cpu_large_kernels_over_few_channels_are_matrix_products(net, x):
    params = init(net, jax.random.key(0), x)
    text = jax.jit(function(net)).lower(params, x).as_text()
    large = net.size == 5 and jax.default_backend() == "cpu"
    expected = 0 if large else sum(map(len, net.blocks))
    assert text.count("stablehlo.convolution") == expected


@pytest.mark.parametrize("n", [101, 250])
def test_large_batches_go_through_lenet_in_parts_with_the_same_result(n):
    net, rng = lenet((9,)), np.random.default_rng(n)
    x = jnp.asarray(rng.uniform(size=(n, *DIGITS.shape[1:])), jnp.float32)
    y = jnp.asarray(rng.integers(10, size=n))
    params = init(net, jax.random.key(0), x)
    apply_fn = function(net)

    @jax.jit
    def logits_and_slopes(params, x, y):
        def loss(params, x):
            logits = apply_fn(params, x)
            return jnp.sum(losses.margin(logits, y)), logits

        slopes, logits = jax.grad(loss, (0, 1), has_aux=True)(params, x)
        return logits, *slopes

    parts = [
        logits_and_slopes(params, x[part], y[part])
        for part in np.split(np.arange(n), range(50, n, 50))
    ]
    logits, in_params, in_x = zip(*parts, strict=True)
    # Sums of some hundred float32 products, over n examples for the parameters, in other orders.
    close = partial(chex.assert_trees_all_close, rtol=1e-4, atol=1e-4)
    whole = logits_and_slopes(params, x, y)
    close(whole[0], jnp.concatenate(logits))
    close(whole[1], jax.tree.map(lambda *of_parts: sum(of_parts), *in_params))
    close(whole[2], jnp.concatenate(in_x))


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="batches are split only on CPU")
def test_the_windows_of_a_large_batch_are_not_all_in_memory_at_once():
    params = init(lenet((9,)), jax.random.key(0), DIGITS)

    def bytes_of(n):
        x, y = jnp.zeros((n, *DIGITS.shape[1:])), jnp.zeros(n, int)
        attack = jax.jit(partial(perturb.loss, function(lenet((9,))), eps=1.0))
        return attack.lower(params, x, y).compile().memory_analysis().temp_size_in_bytes

    # What the backward pass needs of the forward pass, a third of the total, is kept.
    assert bytes_of(1000) < 0.4 * 10 * bytes_of(100)


@pytest.mark.parametrize(("net", "x"), [(lenet((9,)), DIGITS), (vgg((32, 32), width=0.25), PHOTOS)])
def test_every_net_has_derivatives_in_both_modes(net, x):
    params = init(net, jax.random.key(0), x)
    r = jax.jit(partial(perturb.vat, function(net), eps=0.5))(params, x, key=jax.random.key(1))
    # A sum of at most 2352 squares.
    np.testing.assert_allclose(jnp.linalg.norm(r.reshape(2, -1), axis=1), 0.5, rtol=1e-5)


@pytest.mark.parametrize("scale", [1.0, 1000.0])
@pytest.mark.parametrize(("net", "x"), [(mlp((64, 64)), DIGITS), (lenet((32,)), DIGITS)])
def test_in_bfloat16_perturbations_keep_their_direction(net, x, scale):
    params = init(net, jax.random.key(0), x)
    last = params["params"]["logits"]
    params["params"]["logits"] = {"kernel": scale * last["kernel"], "bias": last["bias"]}
    low = net.clone(dtype=jnp.dtype("bfloat16"))
    y = function(net)(params, x).argmax(axis=1)
    assert function(low)(params, x).dtype == jnp.float32
    for method in (perturb.loss, perturb.alpha):
        attacked = [jax.jit(partial(method, function(n), eps=1.0)) for n in (net, low)]
        r = [np.ravel(fn(params, x, y)) for fn in attacked]
        assert r[0].dtype == np.float32
        # bfloat16 has 8 bits, so a few ReLUs switch.
        assert np.dot(*r) / np.prod(np.linalg.norm(r, axis=1)) > 0.99


def test_parameters_are_float32_in_bfloat16_nets_too():
    low = lenet((32,)).clone(dtype=jnp.dtype("bfloat16"))
    params = init(low, jax.random.key(0), DIGITS)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    h = function(low, "encode")(params, DIGITS)
    assert h.dtype == jnp.bfloat16


def test_dropout_acts_only_in_training_and_depends_on_the_key():
    net, params = made(dropout=0.5)
    clean = function(net)(params, X)
    np.testing.assert_array_equal(clean, function(made()[0])(params, X))
    train = train_function(net)
    one, state = train(params, None, X, jax.random.key(1))
    again, _ = train(params, None, X, jax.random.key(1))
    other, _ = train(params, None, X, jax.random.key(2))
    assert state is None
    np.testing.assert_array_equal(one, again)
    assert not np.array_equal(one, other)
    assert not np.array_equal(one, clean)


def test_equal_nets_share_their_compiled_functions():
    assert function(lenet((9,))) is function(lenet([9]))


# Parameters from files


def stored(net, x):
    return jax.tree.map(np.asarray, init(net, jax.random.key(0), x))


def without(params, layer, part):
    del params["params"][layer][part]
    return params


def with_(params, layer, part, shape):
    params["params"].setdefault(layer, {})[part] = np.zeros(shape, np.float32)
    return params


LAYER = "params/hidden_"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: without(p, "hidden_0", "kernel"), rf"no {LAYER}0/kernel, .* be \[784, 500\]"),
        (lambda p: without(p, "hidden_1", "bias"), rf"no {LAYER}1/bias, which should be \[400\]"),
        (lambda p: with_(p, "hidden_0", "kernel", ()), rf"{LAYER}0/kernel of .* \[\] and not \["),
        (lambda p: with_(p, "hidden_1", "kernel", (500, 0)), r"\[500, 0\] and not \[500, 400\]"),
        (lambda p: with_(p, "norm", "scale", (3,)), r"params/norm/scale, which the net doesn"),
        (lambda p: {**p, "batch_stats": {"mean": np.zeros(3)}}, "batch_stats/mean, which the ne"),
        (lambda p: with_(without(p, "hidden_1", "bias"), "hidden_0", "kernel", (100, 500)),
         rf"{LAYER}0/kernel of .*; no {LAYER}1/bias, which should be"),
    ],
    ids=["missing kernel", "missing bias", "scalar kernel", "empty kernel", "another layer",
         "another collection", "several"],
)  # fmt: skip
def test_the_error_about_parameters_that_dont_fit_the_net_names_them(change, message):
    params = change(stored(mlp((500, 400)), DIGITS))
    start = "expected the parameters of 500x400 for images of 28x28x1, got .*"
    with pytest.raises(ValueError, match=start + message):
        models.recognised(params, (28, 28, 1))


@pytest.mark.parametrize(
    ("net", "x", "shape", "message"),
    [
        (mlp((9,)), DIGITS, (8, 8, 1), r"images of 8x8x1, got params/hidden_0/kernel of shape"),
        (lenet((9,)), DIGITS, (32, 32, 1), r"of 32x32x1, got params/hidden_0/kernel of shape \[80"),
        (lenet((9,)), DIGITS, (28, 28, 3), r"of 28x28x3, got params/convs_0_0/kernel of shape \[5"),
        (lenet((9,)), DIGITS, (8, 8, 1), r"16x16 pixels .* conv20-conv50-9, got 8x8; choose"),
    ],
    ids=["mlp", "lenet", "colour", "too small"],
)
def test_parameters_for_other_images_are_an_error(net, x, shape, message):
    params = stored(net, x)
    assert models.describe(models.recognised(params, x.shape[1:])) == models.describe(net)
    with pytest.raises(ValueError, match=message):
        models.recognised(params, shape)


@pytest.mark.parametrize(
    "params",
    [
        None,
        [np.ones(3)],
        {"params": np.ones(3)},
        {"params": {"logits": np.ones(3)}},
        {"params": {"logits": {"kernel": np.ones((784, 10)), "bias": np.ones(10)}}},
    ],
    ids=["none", "list", "array", "array for a layer", "no hidden layer"],
)
def test_trees_that_arent_a_nets_parameters_are_an_error(params):
    with pytest.raises(ValueError, match=r"expected the parameters of an mlp, lenet, vgg or conv"):
        models.recognised(params, (28, 28, 1))
