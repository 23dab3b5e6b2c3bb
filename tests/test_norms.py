"""`jaxadv.norms` against float64 references, closed forms and defining properties."""

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references

from jaxadv import norms

every_norm = pytest.mark.parametrize("norm", references.NORMS)

# A float32 sum of n terms, then a division or a root: a few roundings of 2^-24 each.
RTOL = 1e-6

# Nearly all tests share one shape, so that they compile once per dtype.
SHAPE = (3, 5)


@jax.jit
def geometry(v, eps):
    """All functions in all norms, as one program: {(function, norm): array}."""
    functions = {
        "norm": norms.norm,
        "steepest": norms.steepest,
        "rescale": lambda v, norm: norms.rescale(v, eps, norm),
        "project": lambda v, norm: norms.project(v, eps, norm),
    }
    return {(k, norm): f(v, norm) for k, f in functions.items() for norm in references.NORMS}


jacobians = jax.jit(jax.jacrev(geometry))
jacobians_forward = jax.jit(jax.jacfwd(geometry))


def gaussian(seed, shape=SHAPE, dtype=np.float32):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def radii(*eps, dtype=np.float32):
    return np.resize(np.array(eps, dtype), SHAPE[0])


def rowwise(reference, v, *args):
    return np.array([reference(row, *args) for row in np.asarray(v).astype(np.float64)])


def projected(v, eps, norm):
    return np.array([references.project(row, e, norm) for row, e in zip(v, eps, strict=True)])


@every_norm
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_low_precision_is_measured_in_float32_and_moved_in_its_own_dtype(norm, dtype):
    v, eps = jnp.asarray(gaussian(1), dtype), jnp.asarray(radii(0.75), dtype)
    got = geometry(v, eps)
    assert got["norm", norm].dtype == jnp.float32
    np.testing.assert_allclose(got["norm", norm], rowwise(references.length, v, norm), rtol=RTOL)
    steepest, project = (np.asarray(got[k, norm]) for k in ("steepest", "project"))
    assert steepest.dtype == project.dtype == dtype
    # Each entry is at most 1 and rounded to nearest once: an error of eps / 2 at most.
    atol = float(jnp.finfo(dtype).eps) / 2 + RTOL
    want = rowwise(references.steepest, v, norm)
    np.testing.assert_allclose(steepest.astype(np.float64), want, atol=atol)
    want = projected(np.asarray(v).astype(np.float64), [0.75] * len(v), norm)
    np.testing.assert_allclose(project.astype(np.float64), want, atol=atol)


@every_norm
def test_float64_stays_float64(norm, x64):
    v, eps = gaussian(2, dtype=np.float64), radii(0.75, dtype=np.float64)
    got = geometry(v, eps)
    # A few roundings of 2^-53.
    want = rowwise(references.length, v, norm)
    np.testing.assert_allclose(got["norm", norm], want, rtol=1e-15)
    want = rowwise(references.steepest, v, norm)
    np.testing.assert_allclose(got["steepest", norm], want, rtol=1e-15)
    np.testing.assert_allclose(got["project", norm], projected(v, eps, norm), atol=1e-15)


def test_the_dual_norms():
    assert {norm: norms.dual(norm) for norm in references.NORMS} == references.DUAL


def test_in_l1_a_tie_goes_to_the_lowest_index():
    for g, step in (([2.0, -2.0], [1, 0]), ([-2.0, 2.0], [-1, 0])):
        np.testing.assert_array_equal(norms.steepest([g], "l1"), [step])


@every_norm
def test_the_largest_magnitudes_have_a_norm_and_a_direction(norm):
    v = np.array([[3.3e38, 0, 0], [0, -2e38, 0]], np.float32)
    np.testing.assert_allclose(norms.norm(v, norm), [3.3e38, 2e38], rtol=1e-6)
    np.testing.assert_allclose(norms.steepest(v, norm), np.sign(v), rtol=1e-6)


@every_norm
@pytest.mark.parametrize("magnitude", [1e-23, 1e20])
def test_norms_whose_squares_overflow_or_underflow_float32_are_right(norm, magnitude):
    v = np.full((2, 784), magnitude, np.float32)
    v[1] *= np.where(np.arange(784) % 3 == 0, -0.5, 1).astype(np.float32)
    # Adding 784 terms one by one: at most 784 roundings of half an ulp.
    rtol = 784 * 2**-24
    size = rowwise(references.length, v, norm)
    # Half of the norm, so that projection shortens v.
    eps = (size / 2).astype(np.float32)
    got = geometry(v, eps)
    np.testing.assert_allclose(got["norm", norm], size, rtol=rtol)
    want = rowwise(references.steepest, v, norm)
    np.testing.assert_allclose(got["steepest", norm], want, rtol=rtol)
    np.testing.assert_allclose(got["rescale", norm], v * (eps / size)[:, None], rtol=rtol)
    want = projected(v, eps, norm)
    np.testing.assert_allclose(got["project", norm], want, atol=rtol * magnitude)


@every_norm
def test_a_zero_row_stays_zero_and_has_finite_derivatives(norm):
    v, eps = gaussian(3), radii(0.5)
    v[1] = 0
    value, jac = geometry(v, eps), jacobians(v, eps)
    for name in ("norm", "steepest", "rescale", "project"):
        assert not np.any(value[name, norm][1]), name
        assert np.any(value[name, norm][0]), name
        assert np.all(np.isfinite(jac[name, norm])), name
    # Inside the ball the projection is the identity, at 0 too.
    np.testing.assert_array_equal(jac["project", norm][1, :, 1], np.eye(SHAPE[1]))


@every_norm
def test_a_row_of_nan_affects_no_other(norm):
    v, eps = gaussian(4), radii(0.5)
    spoiled = v.copy()
    spoiled[1, 2] = np.nan
    got, want = geometry(spoiled, eps), geometry(v, eps)
    for name in ("norm", "steepest", "rescale", "project"):
        if name in ("norm", "project"):
            assert np.any(np.isnan(got[name, norm][1])), name
        else:  # it has no direction, like a row of zeros
            np.testing.assert_array_equal(got[name, norm][1], 0)
        np.testing.assert_array_equal(got[name, norm][::2], want[name, norm][::2])


@every_norm
def test_projection_keeps_points_of_the_ball_and_moves_others_to_the_nearest_one(norm):
    # The middle row has norm exactly 1 in every norm.
    v = np.array([[0.125, -0.25, 0, 0.0625, 0], [0, 0, -1, 0, 0], [2, -3, 0.25, 1, 0]], np.float32)
    got = np.asarray(geometry(v, radii(1))["project", norm])
    np.testing.assert_array_equal(got[:2], v[:2])
    np.testing.assert_allclose(got[2], references.project(v[2], 1, norm), rtol=RTOL, atol=RTOL)


@every_norm
def test_radii_are_per_example_and_negative_ones_count_as_0(norm):
    v, eps = gaussian(5), radii(0, 0.25, 100)
    got = geometry(v, eps)
    # Entries up to 3, minus a threshold or times a scale: a few roundings.
    np.testing.assert_allclose(got["project", norm], projected(v, eps, norm), atol=3 * RTOL)
    np.testing.assert_array_equal(got["project", norm][2], v[2])
    np.testing.assert_allclose(rowwise(references.length, got["rescale", norm], norm), eps, RTOL)
    under = geometry(v, -eps)
    for name in ("rescale", "project"):
        np.testing.assert_array_equal(got[name, norm][0], np.zeros(SHAPE[1]))
        np.testing.assert_array_equal(under[name, norm], np.zeros(SHAPE))


@every_norm
@pytest.mark.parametrize("derivative", [jacobians, jacobians_forward])
def test_derivatives_match_finite_differences_of_the_reference(norm, derivative, x64):
    v, eps, h = gaussian(7, dtype=np.float64), radii(0.75, dtype=np.float64), 1e-6
    jac = derivative(v, eps)
    for name, reference in {
        "norm": lambda v: references.length(v, norm),
        "steepest": lambda v: references.steepest(v, norm),
        "rescale": lambda v: 0.75 * v / references.length(v, norm),
        "project": lambda v: references.project(v, 0.75, norm),
    }.items():
        for i, row in enumerate(v):
            steps = h * np.eye(row.size)
            columns = [(reference(row + e) - reference(row - e)) / (2 * h) for e in steps]
            # Central differences: h^2 of truncation, 2^-53 / h = 1e-10 of rounding, and a margin.
            want = np.stack(columns, axis=-1)
            np.testing.assert_allclose(jac[name, norm][i, ..., i, :], want, atol=1e-8, err_msg=name)


# Properties

entries = hnp.arrays(np.float32, SHAPE, elements=st.floats(-1, 1, width=32))
magnitudes = st.sampled_from([1e-20, 1e-3, 1.0, 1e3, 1e15])
sizes = st.sampled_from([1e-3, 0.5, 3.0])


def properties(test):
    # The same examples in every run.
    settings = hypothesis.settings(max_examples=100, deadline=None, derandomize=True, database=None)
    return every_norm(settings(hypothesis.given(entries, magnitudes, sizes)(test)))


def at(entries, magnitude):
    """Entries times a magnitude, without subnormals, which a processor may flush to 0."""
    return np.where(np.abs(entries) < 1e-12, 0, entries) * np.float32(magnitude)


@properties
def test_steepest_has_norm_1_and_attains_the_dual_norm(norm, entries, magnitude, eps):
    g = at(entries, magnitude)
    got = np.asarray(geometry(g, radii(eps))["steepest", norm]).astype(np.float64)
    for row, v in zip(g.astype(np.float64), got, strict=True):
        if row.any():
            assert references.length(v, norm) == pytest.approx(1, rel=RTOL)
            dual = references.length(row, references.DUAL[norm])
            assert row @ v == pytest.approx(dual, rel=RTOL)
        else:
            assert not v.any()


@properties
def test_rescaled_has_size_eps_and_the_same_direction(norm, entries, magnitude, eps):
    v = at(entries, magnitude)
    got = np.asarray(geometry(v, radii(eps))["rescale", norm])
    for row, r in zip(v, got, strict=True):
        if row.any():
            assert references.length(r, norm) == pytest.approx(eps, rel=RTOL)
            assert references.cosine(row, r) == pytest.approx(1, abs=RTOL)
        else:
            assert not r.any()


@properties
def test_projection_is_the_nearest_point_of_norm_at_most_eps(norm, entries, magnitude, eps):
    v, eps = at(entries, magnitude), radii(eps)
    got = np.asarray(geometry(v, eps)["project", norm])
    # The threshold is a sum of entries as large as max|v|, so its error is in their ulps.
    atol = RTOL * max(float(np.abs(v).max()), eps[0])
    np.testing.assert_allclose(got, projected(v, eps, norm), atol=atol)
    # The tolerance for the size of every perturbation.
    assert np.all(rowwise(references.length, got, norm) <= eps * (1 + RTOL))
    again = geometry(got, eps)["project", norm]
    np.testing.assert_allclose(again, got, atol=RTOL * eps[0])


# Dtypes and clipping


@every_norm
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_no_dtype_is_promoted_by_accident(norm, dtype, strict_dtypes):
    v = jax.ShapeDtypeStruct(SHAPE, dtype)
    functions = [norms.norm, norms.steepest, lambda v, norm: norms.rescale(v, 0.5, norm)]
    if norm != "l1":  # there, optax's projection promotes
        functions.append(lambda v, norm: norms.project(v, 0.5, norm))
    measured, *moved = (jax.eval_shape(lambda v, f=f: f(v, norm), v) for f in functions)
    assert measured.dtype == jnp.float32
    assert all(r.dtype == dtype for r in moved)


def test_without_a_box_clip_to_box_rounds_toward_0():
    x, r = jnp.zeros((1, 2), jnp.bfloat16), jnp.array([[1.00390625 + 2**-9, -(1 + 2**-9)]])
    confined = norms.clip_to_box(x, r, None)
    assert confined.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(confined, np.float32), [[1.0, -1.0]])


clip_to_box = jax.jit(norms.clip_to_box)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("clip", [clip_to_box, norms.clip_to_box], ids=["jit", "plain"])
@hypothesis.settings(max_examples=60, deadline=None, derandomize=True, database=None)
@hypothesis.given(
    seed=st.integers(0, 2**32 - 1),
    width=st.sampled_from([1e-3, 0.25, 1.0, 255.0]),
    shape=st.sampled_from([(), SHAPE]),
    size=st.sampled_from([1e-4, 0.3, 3.0, 1e4]),
    wide=...,
)
def test_clipped_entries_shrink_keep_their_sign_and_stay_in_the_box(
    dtype, clip, seed, width, shape, size, wide: bool
):
    rng = np.random.default_rng(seed)
    middle, below, above = rng.normal(size=shape), rng.random(shape), rng.random(shape)
    ends = middle - width * below, middle + width * above
    lo, hi = (np.asarray(jnp.broadcast_to(jnp.asarray(end, dtype), SHAPE)) for end in ends)
    x = jnp.clip(jnp.asarray(rng.normal(size=SHAPE), dtype), lo, hi)  # some are on the bounds
    r = (size * rng.normal(size=SHAPE)).astype(np.float32)
    r = r if wide else np.asarray(jnp.asarray(r, dtype))
    got = clip(x, r, (lo, hi))
    moved = np.asarray(x + got)  # as computed in x's dtype
    assert got.dtype == x.dtype
    assert (lo <= moved).all()
    assert (moved <= hi).all()
    got, r = np.asarray(got, np.float64), np.asarray(r, np.float64)
    assert (np.abs(got) <= np.abs(r)).all()
    assert (got * r >= 0).all()


def test_in_a_box_wider_than_the_largest_number_entries_stay_finite():
    largest = float(jnp.finfo(jnp.float16).max)
    x = jnp.array([[-largest, largest, 0.0]], jnp.float16)
    r = np.array([[1.5 * largest, -3 * largest, np.inf]], np.float32)
    got = norms.clip_to_box(x, r, (-largest, largest))
    np.testing.assert_array_equal(np.asarray(got, np.float32), [[largest, -largest, largest]])


@pytest.mark.parametrize("largest", [1e5, 1e8, 1e30])
def test_the_l1_projection_of_huge_entries_has_size_eps(largest):
    got = norms.project(np.float32([[largest, 0.5 * largest, -0.1], 3 * [largest]]), 0.3, "l1")
    np.testing.assert_allclose(got, [[0.3, 0, 0], [0.1, 0.1, 0.1]], rtol=1e-6)  # an ulp or two


def test_one_key_draws_a_point_for_each_example():
    x, key = jnp.zeros((4, 5)), jax.random.key(1)
    one, each = (norms.sample(k, x, 0.5, "l2") for k in (key, jax.random.split(key, 4)))
    np.testing.assert_array_equal(one, each)
    assert len(np.unique(one, axis=0)) == 4


@every_norm
def test_points_are_drawn_uniformly_from_the_ball(norm):
    """The size to the power of D is uniform, and E r_1^2 has a closed form in each norm."""
    n, d, eps = 4000, 3, 2.0
    r = np.asarray(norms.sample(jax.random.key(0), jnp.zeros((n, d)), eps, norm), np.float64)
    radii = np.sort((references.lengths(r, norm) / eps) ** d)
    # The 1e-4 quantile of Kolmogorov's distance is 2.23 / sqrt(n).
    assert np.max(np.abs(radii - (np.arange(n) + 0.5) / n)) < 2.23 / np.sqrt(n)
    second = {"l1": 2 / ((d + 1) * (d + 2)), "l2": 1 / (d + 2), "linf": 1 / 3}[norm] * eps**2
    error = np.std(np.mean(r**2, axis=1)) / np.sqrt(n)
    np.testing.assert_allclose(np.mean(r**2), second, atol=4 * error)
    np.testing.assert_allclose(r.mean(axis=0), 0, atol=4 * np.sqrt(second / n))


def test_lists_are_accepted():
    for got in (norms.steepest([[3.0, 4.0]], "l2"), norms.rescale([[3.0, 4.0]], 5.0, "l2")):
        np.testing.assert_allclose(got / jnp.max(got), [[0.75, 1.0]], rtol=1e-6)
