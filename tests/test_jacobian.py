"""`jaxadv.jacobian` against closed forms in float64 NumPy, and beyond the range of float64."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxadv import jacobian

B, D, H, K = 5, 7, 6, 4


def net(params, x):
    w, b, v = params
    return jnp.tanh(x.reshape(x.shape[0], -1) @ w + b[None]) @ v


def identity(params, x):
    """The logits are the input, so pulling back gives the rows of V themselves."""
    return x


def draw(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    shapes = (D, H), (H,), (H, K)
    w, b, v = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
    x = rng.normal(size=(B, D)).astype(np.float32)
    return (w, b, v * np.float32(scale)), x, np.array([0, 3, 1, 2, 3])


def to64(tree):
    return jax.tree.map(lambda a: np.asarray(a).astype(np.float64), tree)


def softmax(params, x):
    w, b, v = to64(params)
    a = np.exp(np.tanh(np.asarray(x, np.float64) @ w + b) @ v)
    return a / a.sum(axis=1, keepdims=True)


def others(y, n_classes=K):
    """All classes except y, ascending, [B, K - 1]."""
    return np.array([np.delete(np.arange(n_classes), label) for label in y])


rows_of = jax.jit(jacobian.class_differences, static_argnums=0)
jacobian_of = jax.jit(jacobian.softmax_jacobian, static_argnums=0)


# T


def test_softmax_jacobian_has_the_shape_of_the_input():
    params, x, _ = draw(0)
    image = jacobian_of(net, params, x.reshape(B, 1, D, 1))
    assert image.shape == (B, K, 1, D, 1)
    np.testing.assert_allclose(image.reshape(B, K, D), jacobian_of(net, params, x), atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_t_and_the_scaled_rows_have_the_dtype_of_x_and_logs_float32(dtype):
    params, x, y = jax.tree.map(lambda a: jnp.asarray(a), draw(0))
    params, x = jax.tree.map(lambda a: a.astype(dtype), (params, x))
    t = jax.eval_shape(functools.partial(jacobian.softmax_jacobian, net), params, x)
    rows = jax.eval_shape(functools.partial(jacobian.class_differences, net), params, x, y)
    assert t.dtype == rows.d.dtype == dtype
    assert rows.logits.dtype == rows.log_scale.dtype == rows.log_gap.dtype == jnp.float32


# Scaled rows


@functools.cache
def unconfident():
    """Rows, probabilities and T at logits of about 1, in float64."""
    params, x, y = draw(1)
    params, x = to64((params, x))
    rows = jax.tree.map(np.asarray, rows_of(net, params, x, y))
    w, b, v = params
    a = softmax(params, x)
    jac = np.einsum("hk,bh,dh->bkd", v, 1 - np.tanh(x @ w + b) ** 2, w)
    t = a[..., None] * (jac - np.einsum("bk,bkd->bd", a, jac)[:, None])
    return rows, a, t, y


def test_the_classes_are_all_but_y_in_ascending_order(x64):
    rows, *_, y = unconfident()
    np.testing.assert_array_equal(rows.classes, others(y))
    assert rows.classes.dtype == np.int32


def test_the_scaled_rows_times_their_scales_are_t_j_minus_t_y(x64):
    rows, _, t, y = unconfident()
    each = np.arange(B)[:, None]
    want = t[each, others(y)] - t[each, y[:, None]]
    # About twenty roundings of 2^-53.
    np.testing.assert_allclose(np.exp(rows.log_scale)[..., None] * rows.d, want, atol=1e-14)


def test_log_gap_is_the_logarithm_of_the_distance_in_probability(x64):
    rows, a, _, y = unconfident()
    each = np.arange(B)[:, None]
    gap = np.abs(a[each, y[:, None]] - a[each, others(y)])
    # The reference's subtraction of probabilities loses a digit or two.
    np.testing.assert_allclose(rows.log_gap, np.log(gap), atol=1e-13)


def test_the_scale_is_the_larger_of_entries_j_and_y_of_v(x64):
    rows, a, _, y = unconfident()
    each = np.arange(B)[:, None]
    a_y, a_j = a[each, y[:, None]], a[each, others(y)]
    c = np.log(np.maximum(a_j * (1 - a_j + a_y), a_y * (a_j + 1 - a_y)))
    np.testing.assert_allclose(rows.log_scale, c, atol=1e-13)


def extremes(scale):
    """Logits [B, K] of size `scale`, with ties, and labels of all ranks."""
    z = scale * np.random.default_rng(2).normal(size=(B, K))
    z[3, 1] = z[3, 2]
    z[4] = z[4, 0]
    return z.astype(np.float32), np.array([0, 3, 1, 2, 3])


@pytest.mark.parametrize("scale", [0.0, 1.0, 30.0, 100.0, 1e4, 1e30])
def test_each_scaled_row_of_v_is_bounded_by_1_reaches_it_and_sums_to_0(scale):
    z, y = extremes(scale)
    v = np.asarray(rows_of(identity, None, z, y).d)
    assert np.isfinite(v).all()
    # The larger of entries j and y is 1, and K entries of at most 1 sum to 0: a few roundings of
    # 2^-24, and of 2^-24 |c| in the exponent c of a scale.
    slack = 2**-22 * (1 + np.ptp(z)) if scale <= 100 else 1e-3
    np.testing.assert_allclose(np.abs(v).max(axis=2), 1, atol=slack)
    np.testing.assert_allclose(v.sum(axis=2), 0, atol=1e-6)


@pytest.mark.parametrize("scale", [0.0, 1.0, 30.0, 100.0, 1e4, 1e30])
def test_up_to_rounding_entry_j_of_a_scaled_row_is_positive_and_entry_y_negative(scale):
    z, y = extremes(scale)
    rows = rows_of(identity, None, z, y)
    each = np.arange(B)[:, None]
    d = np.asarray(rows.d)
    v_jj = d[each, np.arange(K - 1)[None], others(y)]
    v_jy = d[each, np.arange(K - 1)[None], y[:, None]]
    assert (v_jj >= 0).all()
    # It is minus the sum of the others, the largest of which is 1, so it may be off by rounding.
    assert (v_jy <= 2**-22).all()
    assert (np.maximum(v_jj, -v_jy) > 0.5).all()


def test_logs_of_a_confident_net_are_finite_where_there_is_no_tie():
    z, y = extremes(1e4)
    rows = rows_of(identity, None, z, y)
    each = np.arange(B)[:, None]
    ties = z[each, others(y)] == z[each, y[:, None]]
    assert ties.sum() == 1 + (K - 1)
    assert np.isfinite(rows.log_scale).all()
    np.testing.assert_array_equal(np.isneginf(rows.log_gap), ties)
    assert np.isfinite(np.asarray(rows.log_gap)[~ties]).all()


def test_a_masked_class_adds_nothing_to_the_rows_of_the_others():
    z, y = extremes(3.0)
    keep = [0, 1, 3]
    y = np.array([0, 3, 1, 0, 3])
    masked, without = z.copy(), z[:, keep]
    masked[:, 2] = -np.inf
    got = rows_of(identity, None, masked, y)
    want = rows_of(identity, None, without, np.searchsorted(keep, y))
    i, j = np.nonzero(np.asarray(got.classes) != 2)
    i, j = i.reshape(B, 2), j.reshape(B, 2)
    np.testing.assert_allclose(np.asarray(got.d)[i, j][..., keep], want.d, rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(np.asarray(got.d)[i, j, 2], 0)
    # The logarithms are of order 10.
    for name in ("log_scale", "log_gap"):
        np.testing.assert_allclose(
            np.asarray(getattr(got, name))[i, j], getattr(want, name), rtol=1e-6, atol=1e-6
        )


@pytest.mark.parametrize("scale", [1.0, 1e4])
@pytest.mark.parametrize("masked", [(0,), (1, 2), (3,)])
def test_rows_are_finite_whichever_class_is_masked(scale, masked):
    z, y = extremes(scale)
    z[:, masked] = -np.inf
    rows = rows_of(identity, None, z, y)
    assert np.isfinite(rows.d).all()
    assert not np.isnan(rows.log_gap).any()
    assert not np.isnan(rows.log_scale).any()


# The forward pass


def test_class_differences_cost_one_forward_pass_and_one_pull_back_for_each_class_but_y():
    n, width, classes = 8, 256, 3
    sizes = (128, width, width, classes)
    params = [jnp.ones(shape) for shape in itertools.pairwise(sizes)]

    def mlp(params, x):
        for w in params[:-1]:
            x = jnp.maximum(x @ w, 0)
        return x @ params[-1]

    args = params, jnp.ones((n, sizes[0])), jnp.zeros(n, jnp.int32)
    fn = jax.jit(functools.partial(jacobian.class_differences, mlp))
    flops = fn.lower(*args).compile().cost_analysis()["flops"]
    forward = 2 * n * sum(w.size for w in params)
    # Everything but the matrix products is linear in the width: a few per cent. A second forward
    # pass would give (classes + 1) / classes.
    assert 0.99 < flops / (classes * forward) < 1.1
