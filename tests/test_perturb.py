"""The contract of a perturbation method: a table of all of them through the same tests.

Compiling is what costs here, so that all methods are compiled as one program for each shape, and
the net takes everything that a test changes (masks, ties, infinities) as parameters.
"""

import functools
import inspect

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxadv import attack, evaluate, jacobian, logistic, losses, norms, perturb

NORMS = ("l1", "l2", "linf")
ORDER = {"l1": 1, "l2": 2, "linf": np.inf}


def each_norm(name, fn, **kwargs):
    return {f"{name}-{norm}": functools.partial(fn, norm=norm, **kwargs) for norm in NORMS}


METHODS = {
    **each_norm("minimal", perturb.alpha),  # alpha without eps
    **each_norm("alpha", perturb.alpha),
    **each_norm("loss", perturb.loss),
    "loss_sign": functools.partial(perturb.loss_sign),
    **each_norm("virtual", perturb.vat),
    **each_norm("pgd", attack.pgd, steps=3),
}
KEYED = {
    **each_norm("virtual", perturb.vat),
    **each_norm("started", attack.pgd, steps=1, random_start=True),
}
SIZED = [name for name in METHODS if not name.startswith("minimal")]
ONE_STEP = [name for name in SIZED if not name.startswith("pgd")]
ALPHA = [name for name in SIZED if name.startswith("alpha")]
MINIMAL = [name for name in METHODS if name not in SIZED]
LABELLED = [name for name in SIZED if not name.startswith("virtual")]

every_method = pytest.mark.parametrize("name", METHODS)
sized_methods = pytest.mark.parametrize("name", SIZED)

quick_jit = functools.partial(
    jax.jit,
    static_argnums=0,
)


def norm_of(name):
    return "l2" if name == "loss_sign" else name.split("-")[1]


def call(name, apply_fn, params, x, y, eps, key, bounds=None):
    size = {"eps": eps} if name in SIZED else {}
    return METHODS[name](apply_fn, params, x, y, key=key, bounds=bounds, **size)


def all_methods(apply_fn, params, x, y, eps, key, bounds=None, names=tuple(METHODS)):
    return {name: call(name, apply_fn, params, x, y, eps, key, bounds) for name in names}


def all_derivatives(apply_fn, params, x, y, eps, key, weight):
    """Of <weight, r> in params, x and eps."""

    def derivatives(name):
        def total(params, x, eps):
            return jnp.sum(weight * call(name, apply_fn, params, x, y, eps, key))

        return jax.grad(total, argnums=(0, 1, 2))(params, x, eps)

    return {name: derivatives(name) for name in METHODS}


every = quick_jit(all_methods, static_argnames="names")
every_derivative = quick_jit(all_derivatives)


def net(params, x):
    """One tanh layer; `c` is [B, K], so that a test can set the logits of one example."""
    w, b, v, c = (params[k].astype(x.dtype) for k in "wbvc")
    return jnp.tanh(x.reshape(x.shape[0], D) @ w + b[None]) @ v + c


# A matrix product is summed in another order in another place, batch or program, and r has a size
# of about 1.
SAME = {"rtol": 1e-5, "atol": 1e-5}

B, D, H, K = 5, 6, 4, 3
DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16]


def problem(seed=0, dtype=np.float32):
    """Arguments of `every` after the net: all examples are classified right."""
    rng = np.random.default_rng(seed)
    shapes = {"w": (D, H), "b": (H,), "v": (H, K), "c": (B, K)}
    params = {k: rng.normal(size=shape).astype(dtype) for k, shape in shapes.items()}
    x = rng.normal(size=(B, D)).astype(dtype)
    eps = np.linspace(0.3, 1.1, B).astype(dtype)
    y = logits_of(params, x).argmax(axis=1)
    return params, x, y, eps, jax.random.split(jax.random.key(seed), B)


def logits_of(params, x):
    w, b, v, c = (np.asarray(params[k], np.float64) for k in "wbvc")
    return np.tanh(x.reshape(len(x), -1) @ w + b) @ v + c


def differences(params, x):
    """d_j = T_j - T_y for all pairs, [B, j, y, D], in float64: a - a a^T times the net's slope."""
    w, b, v, _ = (np.asarray(params[k], np.float64) for k in "wbvc")
    slope = 1 - np.tanh(x @ w + b) ** 2  # [B, H]
    jac = np.einsum("hk,bh,dh->bkd", v, slope, w)
    a = np.exp(logits_of(params, x))
    a /= a.sum(axis=1, keepdims=True)
    t = a[..., None] * (jac - np.einsum("bk,bkd->bd", a, jac)[:, None])
    return t[:, :, None] - t[:, None]


def edited(a, rows, value):
    a = np.array(a)
    a[rows] = value
    return a


def length(name, r):
    r = np.asarray(r, np.float64).reshape(len(r), -1)
    return np.linalg.norm(r, ORDER[norm_of(name)], axis=1)


def steepest(g, norm):
    g = np.asarray(g, np.float64)
    if norm == "linf":
        return np.sign(g)
    return g / np.linalg.norm(g) if norm == "l2" else np.sign(g) * (np.abs(g) == np.abs(g).max())


@functools.cache
def plain():
    return every(net, *problem())


def trouble(kind):
    """A problem, and the rows of it for which r must be 0, and what is troublesome about it."""
    params, x, y, eps, key = problem()
    c, rows, zero = params["c"], np.arange(B), np.array([1, 3])
    if kind == "eps is 0":
        eps, zero = np.zeros_like(eps), rows
    elif kind == "eps is negative":
        eps = edited(eps, zero, [-1, -0.5])
    elif kind == "the logits are constant":
        params = {k: 0 * a for k, a in params.items()} | {"c": 2 * np.eye(K, dtype=x.dtype)[y]}
        zero = rows
    elif kind == "the logits are constant and wrong":
        params = {k: 0 * a for k, a in params.items()} | {"c": -2 * np.eye(K, dtype=x.dtype)[y]}
        zero = rows
    elif kind == "a label is out of range":
        y, zero = edited(y, [0, 1, 3, 4], [-1, K, -K, K + 100]), np.array([0, 1, 3, 4])
    elif kind == "the true class is masked":
        params["c"] = edited(c, (zero, y[zero]), -np.inf)
    elif kind == "only the true class is left":
        mask = np.where(np.eye(K, dtype=bool)[y[zero]], c[zero], -np.inf)
        params["c"] = edited(c, zero, mask)
    elif kind == "no class is left":
        params["c"] = edited(c, zero, -np.inf)
    return (params, x, y, eps, key), zero


ZERO = [
    "eps is 0",
    "eps is negative",
    "the logits are constant",
    "the logits are constant and wrong",
    "a label is out of range",
    "the true class is masked",
    "only the true class is left",
    "no class is left",
]


@functools.cache
def troubled(kind):
    args, zero = trouble(kind)
    return every(net, *args), zero


def pertains(name, kind):
    """Whether `kind` says anything about the method: a minimal r has no eps."""
    return name in SIZED or not kind.startswith("eps")


zero_cases = pytest.mark.parametrize(
    ("name", "kind"), [(name, kind) for name in METHODS for kind in ZERO if pertains(name, kind)]
)


# The signature


@every_method
def test_the_signature_is_that_of_perturb_fn(name):
    parameters = inspect.signature(METHODS[name].func).parameters
    kinds = {k: p.kind for k, p in parameters.items()}
    positional = [k for k, kind in kinds.items() if kind is inspect.Parameter.POSITIONAL_ONLY]
    assert positional == ["apply_fn", "params", "x", "y"]
    assert {"eps", "key", "bounds"} <= kinds.keys() - set(positional)
    assert {kinds[k] for k in kinds.keys() - set(positional)} == {inspect.Parameter.KEYWORD_ONLY}
    assert parameters["key"].default is parameters["bounds"].default is None


@pytest.mark.parametrize("fn", [perturb.loss, perturb.loss_sign, perturb.vat, attack.pgd])
def test_all_but_alpha_need_eps(fn):
    params, x, y, _, key = problem()
    with pytest.raises(TypeError, match="eps"):
        fn(net, params, x, y, key=key)


@every_method
@pytest.mark.parametrize("shape", [(D,), (2, 3, 1)], ids=["rank 2", "rank 4"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_r_has_the_shape_and_dtype_of_x(name, shape, dtype):
    params, x, y, eps, key = problem()
    x = jnp.asarray(x, dtype).reshape(B, *shape)
    r = jax.eval_shape(functools.partial(call, name, net), params, x, y, eps, key)
    assert (r.shape, r.dtype) == (x.shape, dtype)


@every_method
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_in_64_bit_mode_r_has_the_dtype_of_x_whatever_that_of_eps(name, dtype, x64):
    params, x, y, eps, key = problem(dtype=np.float64)
    x = x.astype(dtype)
    r = jax.eval_shape(functools.partial(call, name, net), params, x, y, eps, key)
    assert (r.shape, r.dtype) == (x.shape, dtype)


# The projection on the l1 ball is optax's, which relies on implicit promotion.
@pytest.mark.parametrize("name", [name for name in METHODS if name != "pgd-l1"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_dtype_is_promoted_by_accident(name, dtype, strict_dtypes):
    params, x, y, eps, key = problem()
    x, box = jnp.asarray(x, dtype), (jnp.full((B, D), -9, dtype), jnp.full((B, D), 9, dtype))
    for bounds in (None, box):
        args = (params, x, y, eps, key, bounds)
        assert jax.eval_shape(functools.partial(call, name, net), *args).dtype == dtype


# Sizes


@functools.cache
def in_dtype(dtype):
    params, x, y, eps, key = problem()
    x = jnp.asarray(x, dtype)
    return every(net, params, x, y, eps, key, names=tuple(ONE_STEP)), eps


@pytest.mark.parametrize("name", ONE_STEP)
@pytest.mark.parametrize(
    ("dtype", "rtol"), [(jnp.float32, 1e-6), (jnp.bfloat16, 0.01), (jnp.float16, 0.01)]
)
def test_a_single_step_has_exactly_the_size_eps_of_its_example(name, dtype, rtol):
    r, eps = in_dtype(dtype)
    # Float32: a handful of roundings of 6e-8. The others: the entries of r have 8 and 11 bits.
    np.testing.assert_allclose(length(name, r[name]), eps, rtol=rtol)


class Variants(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_jitted_or_not_a_scalar_is_the_same_as_that_eps_for_each_example(self):
        params, x, y, _, key = problem()
        # Not jitted, eps stays a Python number; jitted, it is traced.
        r = self.variant(functools.partial(all_methods, net))(params, x, y, 0.5, key)
        want = every(net, params, x, y, np.full(B, 0.5, np.float32), key)
        for name in METHODS:
            np.testing.assert_allclose(r[name], want[name], **SAME, err_msg=name)


@sized_methods
def test_eps_may_be_an_integer(name):
    params, x, y, _, key = problem()
    for eps in (1, np.int32(1), jnp.ones(B, jnp.int32)):
        r = jax.eval_shape(lambda eps=eps: call(name, net, params, x, y, eps, key))
        assert r.dtype == x.dtype


@sized_methods
@pytest.mark.parametrize("eps", [-0.5, -1, np.float32(-0.5), np.array([0.5] * (B - 1) + [-0.5])])
def test_a_negative_python_or_numpy_eps_raises(name, eps):
    params, x, y, _, key = problem()
    with pytest.raises(ValueError, match="eps >= 0"):
        jax.eval_shape(lambda: call(name, net, params, x, y, eps, key))


@zero_cases
def test_r_is_exactly_0_where(name, kind):
    r, zero = troubled(kind)
    np.testing.assert_array_equal(r[name][zero], 0)


@zero_cases
def test_a_row_of_zeros_changes_no_other_row_where(name, kind):
    r, zero = troubled(kind)
    others = np.setdiff1d(np.arange(B), zero)
    np.testing.assert_array_equal(r[name][others], plain()[name][others])


# Rows


def rows_of(args, index):
    params, x, y, eps, key = args
    return params | {"c": params["c"][index]}, x[index], y[index], eps[index], key[index]


@functools.cache
def permuted():
    order = np.array([3, 0, 4, 2, 1])
    return every(net, *rows_of(problem(), order)), order


@functools.cache
def image():
    """One example alone, and as an image."""
    params, x, *rest = rows_of(problem(), np.array([2]))
    return every(net, params, x.reshape(1, 2, 3, 1), *rest)


@every_method
def test_a_permuted_batch_gives_the_permuted_result(name):
    r, order = permuted()
    np.testing.assert_allclose(r[name], plain()[name][order], **SAME)


@every_method
def test_an_example_alone_gives_its_row_of_the_batch(name):
    np.testing.assert_allclose(image()[name].reshape(1, D), plain()[name][2:3], **SAME)


UNSOUND = ["NaN in x", "inf in x", "-inf in x", "NaN in a logit", "+inf in a logit"]
UNSOUND += ["+inf in all logits"]


@functools.cache
def unsound(kind):
    params, x, *rest = problem()
    value = {"N": np.nan, "i": np.inf, "+": np.inf, "-": -np.inf}[kind[0]]
    if kind.endswith("x"):
        x = edited(x, (2, 1), value)
    else:
        entries = (2, 1) if kind.endswith("a logit") else 2
        params["c"] = edited(params["c"], entries, value)
    return every(net, params, x, *rest)


@every_method
@pytest.mark.parametrize("kind", UNSOUND)
def test_an_unsound_row_is_nan_and_leaves_the_others_bit_identical(name, kind):
    r = np.asarray(unsound(kind)[name])
    assert np.isnan(r[2]).all()
    others = np.array([0, 1, 3, 4])
    np.testing.assert_array_equal(r[others], plain()[name][others])
    assert np.isfinite(r[others]).all()


# Masks, ties, misclassified examples


@functools.cache
def masked_and_without():
    """Class 1 masked, in each place of a class; and the net that hasn't got it."""
    params, x, y, eps, key = problem()
    y = np.array([0, 2, 0, 2, 2])
    masked = params | {"c": edited(params["c"], (slice(None), 1), -np.inf)}
    without = params | {k: np.delete(params[k], 1, axis=1) for k in "vc"}
    two = (without, x, (y == 2).astype(int), eps, key)
    return every(net, masked, x, y, eps, key), every(net, *two)


@every_method
def test_a_class_at_minus_infinity_might_as_well_not_be_there(name):
    masked, without = masked_and_without()
    np.testing.assert_allclose(masked[name], without[name], **SAME)


@every_method
def test_two_classes_are_enough(name):
    _, without = masked_and_without()
    r = np.asarray(without[name])
    assert r.shape == (B, D)
    # Some of these examples are misclassified, where a minimal r is 0.
    assert np.isfinite(r).all()
    assert (r != 0).any()


def tied(n_tied):
    """The first and last examples are at 0, where the logits are c to the bit, and tie."""
    params, x, y, eps, key = problem()
    params["b"] = np.zeros_like(params["b"])
    rows = np.array([0, 4])
    y = edited(y, rows, [2, 0])
    c = np.array([[-1, 0.5, 0.5], [0.5, -1, 0.5]]) if n_tied == 2 else np.full((2, K), 0.25)
    params["c"] = edited(params["c"], rows, c)
    return (params, edited(x, rows, 0), y, eps, key), rows


@functools.cache
def ties(n_tied):
    args, rows = tied(n_tied)
    return every(net, *args), args, rows


@pytest.mark.parametrize("name", MINIMAL)
@pytest.mark.parametrize("n_tied", [2, 3])
def test_a_tie_counts_as_reached(name, n_tied):
    r, _, rows = ties(n_tied)
    np.testing.assert_array_equal(r[name][rows], 0)


@pytest.mark.parametrize("name", ALPHA)
@pytest.mark.parametrize(("n_tied", "lowest"), [(2, [1, 2]), (3, [0, 1])])
def test_on_a_tie_alpha_goes_toward_the_lowest_class_of_the_tie(name, n_tied, lowest):
    r, (params, x, y, eps, _), rows = ties(n_tied)
    d = differences(params, x)
    for i, j in zip(rows, lowest, strict=True):
        want = eps[i] * steepest(d[i, j, y[i]], norm_of(name))
        np.testing.assert_allclose(r[name][i], want, rtol=1e-5, atol=1e-6)


def wrong_labels():
    """Each label but the predicted one, and so the predicted class is I."""
    params, x, y, eps, key = problem()
    return params, x, (y + np.array([1, 2, 1, 2, 1])) % K, eps, key


@functools.cache
def misclassified():
    return every(net, *wrong_labels())


@pytest.mark.parametrize("name", MINIMAL)
def test_the_minimal_r_of_a_misclassified_example_is_exactly_0(name):
    np.testing.assert_array_equal(misclassified()[name], 0)


@pytest.mark.parametrize("name", ALPHA)
def test_alpha_drives_a_misclassified_example_on_toward_the_likeliest_other_class(name):
    params, x, y, eps, _ = wrong_labels()
    d, likeliest = differences(params, x), logits_of(params, x).argmax(axis=1)
    for i, r in enumerate(np.asarray(misclassified()[name])):
        toward = d[i, likeliest[i], y[i]]
        assert toward @ r > 0
        # Float32 gradients of a net of two layers.
        np.testing.assert_allclose(r, eps[i] * steepest(toward, norm_of(name)), **SAME)


def probability(params, x, y):
    a = np.exp(logits_of(params, x))
    return (a / a.sum(axis=1, keepdims=True))[np.arange(len(y)), y]


@pytest.mark.parametrize("name", LABELLED)
@pytest.mark.parametrize("case", [problem, wrong_labels], ids=["right", "wrong"])
def test_a_small_step_moves_away_from_the_true_class(name, case):
    params, x, y, _, key = case()
    r = np.asarray(every(net, params, x, y, np.full(B, 1e-3, np.float32), key)[name], np.float64)
    before, after = logits_of(params, x), logits_of(params, x + r)
    if name.startswith("alpha"):  # what it promises is about alpha_y - alpha_I for some I
        others = ~np.eye(K, dtype=bool)[y]
        a, b = (np.exp(z) / np.exp(z).sum(axis=1, keepdims=True) for z in (before, after))
        rise = (b - a) - (b - a)[np.arange(B), y][:, None]
        assert (np.where(others, rise, -np.inf).max(axis=1) > 0).all()
    else:
        assert (probability(params, x + r, y) < probability(params, x, y)).all()


@every_method
def test_an_empty_batch_gives_an_empty_result(name):
    args = rows_of(problem(), np.arange(0))
    assert every(net, *args)[name].shape == (0, D)


# Boxes


def boxes(seed, dtype, width, edge):
    """X within bounds of its dtype, up to `width` wide; some entries of it are on the bounds."""
    rng = np.random.default_rng(seed)
    shape = () if edge == "scalar" else (B, D)
    middle, below, above = rng.normal(size=shape), rng.random(shape), rng.random(shape)
    ends = middle - width * below, middle + width * above
    lo, hi = (np.asarray(jnp.broadcast_to(jnp.asarray(end, dtype), (B, D))) for end in ends)
    x = jnp.clip(jnp.asarray(rng.normal(size=(B, D)), dtype), lo, hi)
    assert x.dtype == dtype
    return x, lo, hi


seeds = st.integers(0, 2**32 - 1)
widths = st.sampled_from([1e-3, 0.25, 1.0, 255.0])
radii = st.one_of(st.sampled_from([0.0, 0.5, 1.0, 2.0]), st.floats(2**-10, 100))
edges = st.sampled_from(["scalar", "array"])


def properties(max_examples):
    return hypothesis.settings(
        max_examples=max_examples, deadline=None, derandomize=True, database=None
    )


def assert_in_box_and_ball(name, x, r, lo, hi, eps):
    assert r.dtype == x.dtype
    moved = np.asarray(x + r)  # as computed in x's dtype
    assert (lo <= moved).all(), name
    assert (moved <= hi).all(), name
    if name in SIZED:
        # Eps itself is a float32 here. No room for the 8 bits of bfloat16: r is rounded toward 0.
        assert (length(name, r) <= eps * (1 + 1e-6)).all(), name


@pytest.mark.parametrize("dtype", DTYPES)
@properties(40)
@hypothesis.given(seed=seeds, width=widths, eps=radii, edge=edges)
def test_with_bounds_x_plus_r_is_in_the_box_and_r_in_the_ball(dtype, seed, width, eps, edge):
    params, _, y, _, key = problem()
    x, lo, hi = boxes(seed, dtype, width, edge)
    eps = np.full(B, eps, np.float32)
    for name, r in every(net, params, x, y, eps, key, (lo, hi)).items():
        assert_in_box_and_ball(name, x, r, lo, hi, eps)


def assert_numbers_bound(names, dtype, seed, width):
    params, _, y, _, key = problem()
    x, lo, hi = boxes(seed, dtype, width, "scalar")
    bounds = (float(lo[0, 0]), float(hi[0, 0]))
    for name in names:
        r = call(name, net, params, x, y, 1.0, key, bounds)
        assert_in_box_and_ball(name, x, r, lo, hi, np.float32(1))


def test_bounds_may_be_numbers_and_jit_is_not_needed():
    names = ["minimal-linf", "alpha-l2", "loss-l1", "loss_sign", "virtual-l2", "pgd-l1"]
    assert_numbers_bound(names, jnp.float32, seed=7, width=0.5)


# Op by op, each intermediate result is rounded to x's dtype, where a compiler keeps it in float32.
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("width", [0.5, 255.0])
def test_bounds_hold_op_by_op_in_low_precision(dtype, width):
    for seed in range(8):
        assert_numbers_bound(["alpha-l2", "loss-l2", "loss_sign"], dtype, seed, width)


@functools.cache
def in_wide_box():
    args = problem()
    wide = np.full((B, D), 100, np.float32)
    return every(net, *args, (-wide, wide))


@sized_methods
def test_a_box_out_of_reach_changes_nothing_but_rounding(name):
    np.testing.assert_allclose(in_wide_box()[name], plain()[name], rtol=1e-6, atol=1e-7)


clip_to_box = jax.jit(norms.clip_to_box)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("jitted", [False, True])
@properties(60)
@hypothesis.given(
    seed=seeds, width=widths, edge=edges, size=st.sampled_from([1e-4, 0.3, 3.0, 1e4]), wide=...
)
def test_confined_entries_shrink_keep_their_sign_and_reach_no_further_than_the_box(
    dtype, jitted, seed, width, edge, size, wide: bool
):
    x, lo, hi = boxes(seed, dtype, width, edge)
    r = (size * np.random.default_rng(seed + 1).normal(size=x.shape)).astype(np.float32)
    r = r if wide else np.asarray(jnp.asarray(r, dtype))
    got = (clip_to_box if jitted else norms.clip_to_box)(x, r, (lo, hi))
    assert_in_box_and_ball("minimal-l2", x, got, lo, hi, None)
    got, r = np.asarray(got, np.float64), np.asarray(r, np.float64)
    assert (np.abs(got) <= np.abs(r)).all()
    assert (got * r >= 0).all()


# Keys


def all_keyed(apply_fn, params, x, y, eps, key):
    return {name: fn(apply_fn, params, x, y, eps=eps, key=key) for name, fn in KEYED.items()}


every_keyed = quick_jit(all_keyed)
keyed_methods = pytest.mark.parametrize("name", KEYED)


@functools.cache
def keyed(kind):
    params, x, y, eps, keys = problem()
    if kind == "one key":
        keys = jax.random.key(5)
    elif kind == "that key, split":
        keys = jax.random.split(jax.random.key(5), B)
    elif kind == "permuted":
        order = np.array([3, 0, 4, 2, 1])
        params, x, y, eps, keys = rows_of(problem(), order)
    elif kind == "other":
        keys = jax.random.split(jax.random.key(6), B)
    return every_keyed(net, params, x, y, eps, keys)


@keyed_methods
def test_the_same_key_gives_the_same_bits(name):
    again = every_keyed(net, *problem())[name]
    np.testing.assert_array_equal(again, keyed("keys")[name])


@keyed_methods
def test_another_key_gives_another_result(name):
    # A power iteration's sign is random at least.
    assert (np.asarray(keyed("keys")[name]) != np.asarray(keyed("other")[name])).any()


@keyed_methods
def test_one_key_is_split_per_row(name):
    np.testing.assert_allclose(keyed("one key")[name], keyed("that key, split")[name], **SAME)


@keyed_methods
def test_noise_belongs_to_the_key_of_an_example_and_not_to_its_place(name):
    order = np.array([3, 0, 4, 2, 1])
    np.testing.assert_allclose(keyed("permuted")[name], keyed("keys")[name][order], **SAME)


@keyed_methods
def test_a_missing_key_is_named(name):
    params, x, y, eps, _ = problem()
    with pytest.raises(ValueError, match=r"expected a key.*pass key=jax\.random\.key\(0\)"):
        KEYED[name](net, params, x, y, eps=eps)


@pytest.mark.parametrize("name", [name for name in METHODS if name not in KEYED])
def test_a_method_that_draws_nothing_ignores_the_key(name):
    params, x, y, eps, key = problem()

    def fn(key):
        return call(name, net, params, x, y, eps, key)

    jaxpr = jax.make_jaxpr(fn)(key)
    assert "random" not in str(jaxpr)
    assert jax.eval_shape(fn, None).shape == x.shape


# Labels


@pytest.mark.parametrize("name", [name for name in METHODS if not name.startswith("pgd")])
@pytest.mark.parametrize(
    ("labels", "error"),
    [
        (np.eye(K, dtype=np.float32)[[0, 1, 2, 0, 1]], TypeError),
        (np.eye(K, dtype=np.int32)[[0, 1, 2, 0, 1]], ValueError),
        (np.zeros(B, np.float32), TypeError),
    ],
    ids=["soft", "one-hot", "float"],
)
def test_labels_that_are_not_integers_per_example_raise(name, labels, error):
    params, x, _, eps, key = problem()
    with pytest.raises(error, match="expected integer labels"):
        call(name, net, params, x, labels, eps, key)


@pytest.mark.parametrize("dtype", [np.uint8, np.int64])
@every_method
def test_labels_of_any_integer_dtype_are_taken(name, dtype, x64):
    params, x, y, eps, key = problem()
    r = jax.eval_shape(functools.partial(call, name, net), params, x, y.astype(dtype), eps, key)
    assert (r.shape, r.dtype) == (x.shape, x.dtype)


# Derivatives


def inner(a, b):
    return sum(np.vdot(p, q) for p, q in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def moved(a, direction, h):
    return jax.tree.map(lambda p, q: p + h * q, a, direction)


@functools.cache
def slopes():
    """Slopes of <weight, r> along random directions of params, x, eps: (derivative, difference)."""
    params, x, y, eps, key = problem(seed=3, dtype=np.float64)
    rng = np.random.default_rng(11)
    weight = rng.normal(size=x.shape)
    derivatives = every_derivative(net, params, x, y, eps, key, weight)
    args, h = (params, x, eps), 1e-6
    found = {name: {} for name in METHODS}
    for i, argument in enumerate(("params", "x", "eps")):
        u = jax.tree.map(lambda a: rng.normal(size=a.shape), args[i])
        ends = []
        for sign in (1, -1):
            p, v, e = (moved(a, u, sign * h) if k == i else a for k, a in enumerate(args))
            ends.append(every(net, p, v, y, e, key))
        for name in METHODS:
            difference = inner(weight, ends[0][name] - ends[1][name]) / (2 * h)
            found[name][argument] = inner(derivatives[name][i], u), difference
    return found


@every_method
@pytest.mark.parametrize("argument", ["params", "x", "eps"])
def test_derivatives_of_r_match_central_differences(name, argument, x64):
    derivative, difference = slopes()[name][argument]
    # 2^-53 / h = 1e-10 of rounding and h^2 of truncation, both times the size of r and its bends.
    np.testing.assert_allclose(derivative, difference, rtol=1e-6, atol=1e-7)


@every_method
@pytest.mark.parametrize("argument", ["params", "x"])
def test_derivatives_of_r_are_those_of_a_smooth_direction_and_not_all_0(name, argument, x64):
    derivative, _ = slopes()[name][argument]
    # A sign or one entry has no slope: the sizes of linf and l1 steps are constant. So is the
    # end of an iterated one in a corner.
    smooth = name.startswith("minimal") or name.endswith("l2")
    assert (abs(derivative) > 1e-3) == smooth


def confident():
    """Logit gaps of thousands, of which no exponential is a float64."""
    params, x, *rest = problem()
    return params | {k: 3000 * params[k] for k in "vc"}, x, *rest


def at_ties():
    return tied(3)[0]


def at_pairs():
    return tied(2)[0]


def with_a_mask():
    params, x, y, eps, key = problem()
    c = edited(params["c"], (np.arange(B), (y + 1) % K), -np.inf)
    return params | {"c": c}, x, y, eps, key


FINITE = {kind: functools.partial(lambda kind: trouble(kind)[0], kind) for kind in ZERO}
FINITE |= {
    "all classes tie": at_ties,
    "two classes tie": at_pairs,
    "a class is masked": with_a_mask,
    "an example is misclassified": wrong_labels,
    "the net is confident": confident,
}


@functools.cache
def derivatives_where(kind):
    *args, key = FINITE[kind]()
    args = jax.tree.map(lambda a: a.astype(np.float64) if a.dtype == np.float32 else a, args)
    return every_derivative(net, *args, key, np.random.default_rng(12).normal(size=(B, D)))


@every_method
@pytest.mark.parametrize("kind", [kind for kind in FINITE if kind != "the net is confident"])
def test_derivatives_are_finite_where(name, kind, x64):
    chex.assert_tree_all_finite(derivatives_where(kind)[name])


@sized_methods  # the minimal r itself overflows
def test_derivatives_are_finite_where_the_net_is_confident(name, x64):
    chex.assert_tree_all_finite(derivatives_where("the net is confident")[name])


# Transformations


def stacked():
    """Batches [2, 3] of examples, that share their parameters, and so c."""
    params, x, _, eps, key = problem()
    x = np.random.default_rng(21).normal(size=(2, 3, *x.shape)).astype(np.float32)
    y = np.array([[logits_of(params, v).argmax(axis=1) for v in batches] for batches in x])
    return params, x, y, eps, key


@functools.cache
def batch_by_batch():
    params, x, y, eps, key = stacked()
    rows = [[every(net, params, x[i, j], y[i, j], eps, key) for j in range(3)] for i in range(2)]
    return {name: np.array([[r[name] for r in row] for row in rows]) for name in METHODS}


@functools.cache
def scanned():
    each_batch = jax.vmap(functools.partial(all_methods, net), in_axes=(None, 0, 0, None, None))

    def scan(params, x, y, eps, key):
        def body(carry, batch):
            return carry, each_batch(params, *batch, eps, key)

        return lax.scan(body, None, (x, y))[1]

    return functools.partial(quick_jit, static_argnums=())(scan)(*stacked())


@every_method
def test_scan_and_vmap_over_batches_give_what_they_give_one_by_one(name):
    np.testing.assert_allclose(scanned()[name], batch_by_batch()[name], **SAME)


def test_a_jitted_caller_traces_each_method_once_for_all_values_of_eps():
    chex.clear_trace_counter()
    params, x, y, _, key = problem()
    fns = {}
    for name in SIZED:

        def method(params, x, y, eps, key, name=name):
            return call(name, net, params, x, y, eps, key)

        fns[name] = chex.assert_max_traces(method, n=len(SIZED))  # chex counts by source code

    @jax.jit
    def caller(params, x, y, eps, key):
        return {name: fn(params, x, y, eps, key) for name, fn in fns.items()}

    for eps in (0.0, 0.25, 1.0):
        caller.trace(params, x + np.float32(eps), y, eps, key)


def test_a_jitted_caller_calls_apply_fn_at_trace_time_only():
    params, x, y, *_ = problem()
    chex.clear_trace_counter()
    once = chex.assert_max_traces(net, n=1)
    fn = jax.jit(functools.partial(perturb.loss, once))
    for eps in (0.1, 0.2, 0.3):
        fn(params, x, y, eps=eps)


# Export


def exported(name):
    params, x, y, eps, key = problem()
    return functools.partial(call, name, net), (params, x, y, eps, key)


def public_functions():
    params, x, y, eps, key = problem()
    w, signs, box = x[0], np.sign(x[:, 0]), (np.float32(-1), np.float32(1))
    functions = {name: exported(name) for name in METHODS}
    for norm in NORMS:
        functions |= {
            f"norm-{norm}": (lambda v, n=norm: norms.norm(v, n), (x,)),
            f"steepest-{norm}": (lambda v, n=norm: norms.steepest(v, n), (x,)),
            f"rescale-{norm}": (lambda v, e, n=norm: norms.rescale(v, e, n), (x, eps)),
            f"project-{norm}": (lambda v, e, n=norm: norms.project(v, e, n), (x, eps)),
            f"sample-{norm}": (lambda k, v, e, n=norm: norms.sample(k, v, e, n), (key, x, eps)),
            f"measure-{norm}": (
                lambda p, x, y, n=norm: evaluate.measure(net, p, x, y, x, norm=n),
                (params, x, y),
            ),
            f"logistic.adversary-{norm}": (
                lambda w, x, y, e, n=norm: logistic.adversary(w, x, y, eps=e, norm=n),
                (w, x, signs, eps),
            ),
            f"logistic.loss-{norm}": (
                lambda w, x, y, e, n=norm: logistic.loss(w, x, y, eps=e, norm=n),
                (w, x, signs, eps),
            ),
            f"logistic.objective-{norm}": (
                lambda w, x, y, e, n=norm: logistic.objective(w, x, y, eps=e, norm=n),
                (w, x, signs, eps),
            ),
        }
    return functions | {
        "clip_to_box": (norms.clip_to_box, (x, x, box)),
        "margin": (losses.margin, (params["c"], y)),
        "softmax_jacobian": (
            lambda p, x: jacobian.softmax_jacobian(lambda p, v: v @ p, p, x),
            (params["w"], x),
        ),
        "class_differences": (
            lambda p, x, y: jacobian.class_differences(net, p, x, y)._asdict(),
            (params, x, y),
        ),
        "measure": (lambda p, x, y: evaluate.measure(net, p, x, y), (params, x, y)),
        "logistic.logits": (logistic.logits, (w, x)),
        "logistic.fit": (
            lambda w, x, y: logistic.fit(w, x, y, eps=0.1, norm="l2", steps=2),
            (w, x, signs),
        ),
    }


@pytest.mark.parametrize("name", public_functions())
def test_every_function_of_arrays_lowers_for_cpu_gpu_and_tpu(name):
    fn, args = public_functions()[name]
    platforms = ("cpu", "cuda", "tpu")
    assert jax.export.export(jax.jit(fn), platforms=platforms)(*args).platforms == platforms
