"""The contract of every one-step method and attack: one table of methods, one test per property.

Compilation dominates the run time. So all methods are compiled as one program for each shape and
dtype, the net takes everything that a test changes (masks, ties, infinities) as parameters, and one
batch holds every kind of row that can't be attacked. Where `jaxadv.problem` ensures a property for
all methods, testing a few of them is enough (`SOME`). A method's own tests are in the file named
after it.
"""

import functools
import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from references import NORMS, edited, lengths

from jaxadv import attack, losses, norms, perturb


def each_norm(name, fn, among=NORMS, **kwargs):
    return {f"{name}-{norm}": functools.partial(fn, norm=norm, **kwargs) for norm in among}


ONE_STEP = {
    **each_norm("alpha", perturb.alpha),
    **each_norm("loss", perturb.loss),
    "loss_sign-l2": functools.partial(perturb.loss_sign),
    **each_norm("vat", perturb.vat, ("l2", "linf")),
}
IN_BALL = {
    **each_norm("pgd", attack.pgd, steps=3),
    **each_norm("pgd_restarts", attack.pgd, ("linf",), steps=2, random_start=True, restarts=2),
    **each_norm("pgd_kl", attack.pgd_kl, ("l2",), steps=2),
    **each_norm("apgd", attack.apgd, ("l1", "l2"), steps=8),
    **each_norm("apgd_dlr", attack.apgd, ("linf",), steps=5, loss_fn=losses.dlr, restarts=3),
    **each_norm("multitargeted", attack.apgd_multitargeted, ("linf",), steps=4, n_targets=2),
    **each_norm("square", attack.square, steps=9),
}
LEAST = {
    **each_norm("least_alpha", perturb.alpha, ("l1", "l2")),
    **each_norm("fab", attack.fab, ("l1",), steps=4, n_targets=2),
    **each_norm("fab_restarts", attack.fab, ("l2",), steps=4, n_targets=2, restarts=2),
    **each_norm("fmn", attack.fmn, ("l2", "linf"), steps=12),
    "ddn-l2": functools.partial(attack.ddn, steps=24, gamma=0.1),
    **each_norm("searched", attack.apgd, ("linf",), steps=3, eps=None),
    **each_norm(
        "searched_targets", attack.apgd_multitargeted, ("l2",), steps=3, n_targets=2, eps=None
    ),
    **each_norm("deepfool", attack.deepfool, ("l1", "linf"), steps=12),
    **each_norm("probabilities", attack.deepfool, ("l2",), steps=12, output="probabilities"),
}
PROJECTED = {f"{name}-in_ball": LEAST[name] for name in ("fmn-l2", "deepfool-l1")}
PROJECTED["fab-linf-in_ball"] = functools.partial(attack.fab, norm="linf", steps=4, n_targets=2)
METHODS = ONE_STEP | IN_BALL | LEAST | PROJECTED
FREE = (  # tested without a box too
    *(*ONE_STEP, "least_alpha-l1", "least_alpha-l2", "pgd-l1", "pgd-linf", "apgd-l1", "fab-l1"),
    *("fab_restarts-l2", "fmn-l2", "ddn-l2", "searched-linf", "deepfool-l1", "square-linf"),
)
SIZED = [name for name in METHODS if name not in LEAST]
DRAWS = {"vat", "pgd_restarts", "pgd_kl", "apgd", "apgd_dlr", "multitargeted", "square"}
DRAWS |= {"fab_restarts", "searched", "searched_targets"}
KEYED = [name for name in METHODS if name.split("-")[0] in DRAWS]
# A one-step method, two in a ball and a minimal one; `Problem` does the rest for all.
SOME = ("alpha-linf", "loss-l2", "pgd-l2", "fmn-l2")
# And some of those that draw random numbers.
SOME_KEYED = ("vat-l2", "pgd_restarts-linf", "pgd_kl-l2", "apgd-l2", "square-l2", "fab_restarts-l2")

every_method = pytest.mark.parametrize("name", METHODS)
some_methods = pytest.mark.parametrize("name", SOME)


def call(name, apply_fn, params, x, y, eps, key, bounds=None):
    size = {"eps": eps} if name in SIZED else {}
    return METHODS[name](apply_fn, params, x, y, key=key, bounds=bounds, **size)


def all_methods(apply_fn, params, x, y, eps, key, bounds=None, names=tuple(METHODS)):
    return {name: call(name, apply_fn, params, x, y, eps, key, bounds) for name in names}


compiled = jax.jit(all_methods, static_argnums=0, static_argnames="names")


def size_of(name, r):
    return lengths(r, name.split("-")[1])


# Kinds of rows that can't be attacked; the batch has one of each, after the sound ones.
ZERO = (
    "a label is negative",
    "a label is K",
    "the true class is masked",
    "only the true class is left",
    "no class is left",
)
ZERO_SIZE = "eps is 0", "eps is negative"
NAN = ("NaN in x", "inf in x", "-inf in x", "NaN in a logit", "inf in a logit", "inf in all logits")
NAN_SIZE = "eps is NaN", "eps is inf"
FLAT = "the logits are constant", "constant and wrong", "constant and tied", "the gradient is NaN"
STEEP = ("gradients near the smallest float",)
WRONG = ("x is misclassified",)
KINDS = (*ZERO, *ZERO_SIZE, *NAN, *NAN_SIZE, *FLAT, *STEEP, *WRONG)

N_SOUND, D, H, K = 5, 6, 7, 4
B = N_SOUND + len(KINDS)
SOUND, ROW = slice(N_SOUND), {kind: N_SOUND + i for i, kind in enumerate(KINDS)}
# A matrix product is summed in another order in another place, batch or program.
SAME = {"rtol": 1e-4, "atol": 1e-4}
WIDE = np.full((B, D), -100, np.float32), np.full((B, D), 100, np.float32)


def net(params, x):
    """One tanh layer; `c`, `gain` and `kink` belong to an example, so that a test can set them."""
    w, b, v, c, gain, kink = (
        params[k].astype(x.dtype) for k in ("w", "b", "v", "c", "gain", "kink")
    )
    x = x.reshape(len(x), D)
    z = gain[:, None] * (jnp.tanh(x @ w + b[None]) @ v) + c
    size = jnp.sqrt(jnp.where(kink == 0, 1, jnp.sum(x * x, axis=1)))  # whose gradient at 0 is NaN
    return z + jnp.where(jnp.arange(K)[None] == 0, (kink * size)[:, None], 0)


def problem(dtype=np.float32):
    """Arguments of `every` after the net, which classifies all examples correctly."""
    rng = np.random.default_rng(0)
    shapes = {"w": (D, H), "b": (H,), "v": (H, K), "c": (B, K)}
    params = {k: rng.normal(size=shape).astype(dtype) for k, shape in shapes.items()}
    params |= {"gain": np.ones(B, dtype), "kink": np.zeros(B, dtype)}
    x = rng.normal(size=(B, D)).astype(dtype)
    eps = np.linspace(0.1, 0.6, B).astype(dtype)
    y = np.asarray(net(params, x)).argmax(axis=1)
    return params, x, y, eps, jax.random.split(jax.random.key(0), B)


def rows_of(args, rows):
    params, x, y, eps, key = args
    params = params | {k: params[k][rows] for k in ("c", "gain", "kink")}
    return params, x[rows], y[rows], eps[rows], key[rows]


def every(args, bounds=WIDE, names=tuple(METHODS)):
    return compiled(net, *args, bounds, names=names)


@functools.cache
def plain(free=False):
    return every(problem(), None, FREE) if free else every(problem())


# Rows


def trouble():
    """The problem, with one row of each kind that can't be attacked."""
    params, x, y, eps, key = problem()
    c, gain, kink = (params[k] for k in ("c", "gain", "kink"))
    i = ROW["the gradient is NaN"]
    x[i] = 0
    y[i], kink[i] = np.asarray(net(params, x))[i].argmax(), 1
    row, is_y = ROW, np.eye(K, dtype=bool)[y]
    y[row["a label is negative"]], y[row["a label is K"]] = -1, K
    i, j = row["the true class is masked"], row["only the true class is left"]
    c[i, is_y[i]], c[j, ~is_y[j]], c[row["no class is left"]] = -np.inf, -np.inf, -np.inf
    for kind, value in zip((*ZERO_SIZE, *NAN_SIZE), (0, -0.5, np.nan, np.inf), strict=True):
        eps[row[kind]] = value
    for kind, value in zip(NAN[:3], (np.nan, np.inf, -np.inf), strict=True):
        x[row[kind], 1] = value
    c[row["NaN in a logit"], 1], c[row["inf in a logit"], 1] = np.nan, np.inf
    c[row["inf in all logits"]] = np.inf
    for kind, lead in zip(FLAT[:3], (2, -2, 0), strict=True):
        gain[row[kind]], c[row[kind]] = 0, lead * is_y[row[kind]]
    i = row["gradients near the smallest float"]
    gain[i], c[i] = 1e-38, 200 * is_y[i]  # divided by that slope, this overflows
    i = row["x is misclassified"]
    y[i] = (y[i] + 1) % K
    return params, x, y, eps, key


@functools.cache
def troubled(free):
    r = every(trouble(), None, FREE) if free else every(trouble())
    return {name: np.asarray(a) for name, a in r.items()}


CASES = [(name, False) for name in METHODS] + [(name, True) for name in FREE]
free_or_boxed = pytest.mark.parametrize(("name", "free"), CASES)


@free_or_boxed
def test_rows_that_can_not_be_attacked_are_0_and_unsound_ones_nan(name, free):
    r, sized = troubled(free)[name], name in SIZED
    zero = ZERO[3:] if name.startswith("pgd_kl") else ZERO  # it knows no labels
    for kind in (*zero, *(ZERO_SIZE if sized else WRONG)):
        np.testing.assert_array_equal(r[ROW[kind]], 0, kind)
    for kind in (*NAN, *(NAN_SIZE if sized else ())):
        assert np.isnan(r[ROW[kind]]).all(), kind
    for kind in FLAT:  # only a random start or search may move x there
        assert np.isfinite(r[ROW[kind]]).all(), kind
        if name.startswith("vat") or name not in KEYED:
            np.testing.assert_array_equal(r[ROW[kind]], 0, kind)
    if not name.startswith("least_alpha"):  # it is infinite there
        assert np.isfinite(r[ROW[STEEP[0]]]).all()


@free_or_boxed
def test_such_rows_change_no_other_row_by_a_bit(name, free):
    np.testing.assert_array_equal(troubled(free)[name][SOUND], plain(free)[name][SOUND])
    assert (np.asarray(plain(free)[name]) != 0).any(axis=1).all()


@functools.cache
def masked(steepness):
    """Results with class y[0] masked at examples of other classes, its weights scaled."""
    params, x, y, eps, key = problem()
    others = np.flatnonzero(y != y[0])
    c, v = edited(params["c"], (others, y[0]), -np.inf), params["v"].copy()
    v[:, y[0]] *= steepness
    return every((params | {"c": c, "v": v}, x, y, eps, key)), others


@every_method
def test_the_gradient_of_a_masked_class_does_not_matter(name):
    (gentle, rows), (steep, _) = masked(1), masked(-50)
    np.testing.assert_array_equal(gentle[name][rows], steep[name][rows])
    assert (gentle[name][rows] != 0).any(axis=1).all()


@functools.cache
def permuted():
    order = np.random.default_rng(1).permutation(B)
    return every(rows_of(problem(), order)), order


@every_method
def test_permuted_rows_with_their_keys_give_permuted_results(name):
    r, order = permuted()
    np.testing.assert_allclose(r[name], plain()[name][order], **SAME)


ALONE = "alpha-linf", "loss-l2", "vat-l2", "pgd-linf", "apgd-l1", "fab-l1", "fmn-l2", "deepfool-l1"


def assert_same_perturbations(name, r, expected):
    """Compare to rounding: of FMN the sizes, since its steps leave r free along the boundary."""
    if name.startswith("fmn"):
        r, expected = (size_of(name, np.reshape(a, (-1, D))) for a in (r, expected))
    np.testing.assert_allclose(r, expected, **SAME)


@functools.cache
def alone():
    """One example, as an image."""
    params, x, *rest = rows_of(problem(), np.array([2]))
    return every((params, x.reshape(1, 2, 3, 1), *rest), None, ALONE)


@pytest.mark.parametrize("name", ALONE)
def test_an_example_alone_and_as_an_image_is_its_row_of_a_batch(name):
    r = alone()[name].reshape(1, D)
    assert_same_perturbations(name, r, plain(free=True)[name][2:3])


@functools.cache
def of_no_rows():
    return every(rows_of(problem(), np.arange(0)), None, SOME)


@some_methods
def test_an_empty_batch_gives_an_empty_result(name):
    assert of_no_rows()[name].shape == (0, D)


# Sizes, boxes and dtypes


@pytest.mark.parametrize(("name", "free"), [case for case in CASES if case[0] in SIZED])
def test_r_is_in_the_ball_of_its_example(name, free):
    assert (size_of(name, plain(free)[name]) <= problem()[3] * (1 + 1e-6)).all()


@pytest.mark.parametrize("name", [*ONE_STEP, "pgd-l1", "pgd-linf"])
def test_a_box_out_of_reach_changes_nothing_but_rounding(name):
    np.testing.assert_allclose(plain()[name], plain(free=True)[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["fmn-l2", "deepfool-l1"])
def test_with_a_size_the_least_r_is_kept_where_it_fits_and_else_projected(name):
    eps = problem()[3]
    r, sized = (np.asarray(plain()[key]) for key in (name, f"{name}-in_ball"))
    fits = size_of(name, r) <= eps
    assert 0 < fits.sum() < B
    np.testing.assert_array_equal(sized[fits], r[fits])
    want = np.asarray(norms.project(r, eps, name.split("-")[1]))
    np.testing.assert_allclose(sized[~fits], want[~fits], rtol=1e-6)
    np.testing.assert_allclose(size_of(name, sized)[~fits], eps[~fits], rtol=1e-6)


IN_DTYPE = {
    jnp.float32: tuple(METHODS),
    jnp.bfloat16: (
        *("alpha-linf", "loss-l2", "loss_sign-l2", "vat-l2", "pgd-l1", "apgd-l1", "square-l2"),
        *("fmn-linf", "deepfool-l1-in_ball", "fab-linf-in_ball"),
    ),
    jnp.float16: ("alpha-l1", "alpha-linf", "loss-l2", "loss_sign-l2", "vat-l2", "pgd-l1"),
}


@pytest.mark.parametrize("dtype", IN_DTYPE)
@pytest.mark.parametrize(
    ("width", "radius"), [(1e-3, 0.5), (0.25, 2**-10), (1.0, 2.0), (1.0, 0.0), (255.0, 100.0)]
)
def test_x_plus_r_is_in_the_box_and_r_in_the_ball(dtype, width, radius):
    rng = np.random.default_rng(7)
    middle, below, above = rng.normal(size=(B, D)), rng.random((B, D)), rng.random((B, D))
    ends = middle - width * below, middle + width * above
    lo, hi = (np.asarray(jnp.asarray(end, dtype).astype(jnp.float32)) for end in ends)
    x = jnp.asarray(rng.normal(size=(B, D)).clip(lo, hi), dtype)  # some lie on a bound
    params, _, y, _, key = problem()
    eps = edited(np.full(B, radius, np.float32), 0, 0)
    for name, r in every((params, x, y, eps, key), (lo, hi), IN_DTYPE[dtype]).items():
        assert r.dtype == dtype
        moved = np.asarray((x + r).astype(jnp.float32))  # as computed in x's dtype
        assert (lo <= moved).all(), name
        assert (moved <= hi).all(), name
        if name in SIZED:
            # eps is a float32, finer than bfloat16's 8 bits: r is rounded toward 0.
            assert (size_of(name, r) <= eps * (1 + 1e-6)).all(), name
            np.testing.assert_array_equal(r[0], 0)


# optax's projection onto the l1 ball relies on promotion.
PROMOTES = ({"pgd-l1", "apgd-l1", "deepfool-l1-in_ball"}, {"pgd-l1", "deepfool-l1-in_ball"})


@pytest.mark.parametrize(
    ("name", "boxed"),
    [(name, boxed) for boxed in (False, True) for name in METHODS if name not in PROMOTES[boxed]],
)
def test_no_dtype_is_promoted_by_accident(name, boxed, strict_dtypes):
    params, x, y, eps, key = problem()
    x = jnp.asarray(x, jnp.bfloat16)
    bounds = tuple(jnp.asarray(end, x.dtype) for end in WIDE) if boxed else None
    r = jax.eval_shape(functools.partial(call, name, net), params, x, y, eps, key, bounds)
    assert (r.shape, r.dtype) == (x.shape, x.dtype)


# One method of each function.
FUNCTIONS = {method.func.__name__: name for name, method in METHODS.items()}


@pytest.mark.parametrize("name", FUNCTIONS.values())
@pytest.mark.parametrize(
    ("dtype", "logits"),
    [(np.float32, np.float64), (np.float64, np.float32), (np.float32, np.float16)],
)
def test_in_64_bit_mode_r_has_the_dtype_of_x_whatever_other_arrays_have(name, dtype, logits, x64):
    params, x, y, eps, key = problem(np.float64)

    def apply_fn(params, x):
        return net(params, x).astype(logits)

    x, y = x.astype(dtype), y.astype(np.uint8 if dtype == np.float32 else np.int64)
    r = jax.eval_shape(functools.partial(call, name, apply_fn), params, x, y, eps, key)
    assert (r.shape, r.dtype) == (x.shape, dtype)


# Keys


@functools.cache
def with_keys(seed):
    params, x, y, eps, _ = problem()
    return every((params, x, y, eps, jax.random.split(jax.random.key(seed), B)))


@every_method
def test_the_same_key_gives_the_same_bits_and_another_key_a_different_result(name):
    np.testing.assert_array_equal(with_keys(0)[name], plain()[name])
    differs = (np.asarray(with_keys(77)[name]) != np.asarray(plain()[name])).any()
    assert differs == (name in KEYED)


@functools.cache
def with_one_size_and_key():
    params, x, y, _, _ = problem()
    names, key, eps = SOME + SOME_KEYED, jax.random.key(5), np.float32(0.3)
    one = every((params, x, y, eps, key), names=names)
    return one, every((params, x, y, np.full(B, eps), jax.random.split(key, B)))


@pytest.mark.parametrize("name", SOME + SOME_KEYED)
def test_a_single_size_applies_to_each_example_and_a_single_key_is_split(name):
    one, each = with_one_size_and_key()
    np.testing.assert_allclose(one[name], each[name], **SAME)


@pytest.mark.parametrize("name", SOME_KEYED)
def test_a_missing_key_is_named(name):
    params, x, y, eps, _ = problem()
    for key, error, match in (
        (None, ValueError, r"expected a key: .* draws random numbers; pass key=jax\.random\.key"),
        (3, TypeError, r"expected a key, got 3; pass jax\.random\.key"),
    ):
        with pytest.raises(error, match=match):
            call(name, net, params, x, y, eps, key)


# Transformations


@functools.cache
def batch_by_batch():
    """Results for `[2, 3]` batches: by scan over vmap, and one by one."""
    params, _, _, eps, key = rows_of(problem(), SOUND)
    x = np.random.default_rng(21).normal(size=(2, 3, N_SOUND, D)).astype(np.float32)
    y = np.array([[np.asarray(net(params, v)).argmax(axis=1) for v in row] for row in x])
    fn = functools.partial(all_methods, net, names=SOME)

    @jax.jit
    def scan(params, x, y):
        def body(carry, batch):
            return carry, jax.vmap(lambda x, y: fn(params, x, y, eps, key))(*batch)

        return lax.scan(body, None, (x, y))[1]

    one = [
        [every((params, x[i, j], y[i, j], eps, key), None, SOME) for j in range(3)]
        for i in range(2)
    ]
    return scan(params, x, y), {k: np.array([[r[k] for r in row] for row in one]) for k in SOME}


@some_methods
def test_scan_and_vmap_over_batches_give_the_same_as_one_by_one(name):
    assert_same_perturbations(name, *(r[name] for r in batch_by_batch()))


# Derivatives of methods whose number of steps is known

DERIVED = ("alpha-l2", "loss-l2", "loss_sign-l2", "vat-l2", "pgd-l1", "pgd-l2")
DERIVED += "least_alpha-l1", "least_alpha-l2"
derived_methods = pytest.mark.parametrize("name", DERIVED)


@functools.partial(jax.jit, static_argnums=0)
def every_derivative(apply_fn, params, x, y, eps, key, weight):
    """Derivatives of <weight, r> in params, x and eps."""

    def derivatives(name):
        def total(params, x, eps):
            return jnp.sum(weight * call(name, apply_fn, params, x, y, eps, key))

        return jax.grad(total, argnums=(0, 1, 2))(params, x, eps)

    return {name: derivatives(name) for name in DERIVED}


def inner(a, b):
    return sum(np.vdot(p, q) for p, q in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


@functools.cache
def slopes():
    """Slopes of <weight, r> along random directions of params, x, eps: (derivative, difference)."""
    params, x, y, eps, key = problem(np.float64)
    rng = np.random.default_rng(11)
    weight = rng.normal(size=x.shape)
    derivatives = every_derivative(net, params, x, y, eps, key, weight)
    args, h = (params, x, eps), 1e-6
    found = {name: {} for name in DERIVED}
    for i, argument in enumerate(("params", "x", "eps")):
        u = jax.tree.map(lambda a: rng.normal(size=a.shape), args[i])
        if argument == "params":
            u["kink"] *= 0
        ends = []
        for step in (h, -h):
            moved = list(args)
            moved[i] = jax.tree.map(lambda p, q, step=step: p + step * q, args[i], u)
            ends.append(every((*moved[:2], y, moved[2], key), None, DERIVED))
        for name in DERIVED:
            difference = inner(weight, ends[0][name] - ends[1][name]) / (2 * h)
            found[name][argument] = inner(derivatives[name][i], u), difference
    return found


@derived_methods
def test_derivatives_of_r_match_central_differences(name, x64):
    # 2^-53 / h = 1e-10 of rounding and h^2 of truncation, times the size of r and its derivatives.
    for argument, (derivative, difference) in slopes()[name].items():
        np.testing.assert_allclose(derivative, difference, rtol=1e-6, atol=1e-7, err_msg=argument)


@derived_methods
@pytest.mark.parametrize("argument", ["params", "x"])
def test_derivatives_of_r_are_those_of_a_smooth_direction_and_not_all_0(name, argument, x64):
    derivative, _ = slopes()[name][argument]
    # Signs and single entries have no slope, so linf and l1 steps are constant, as is the end of an
    # iterated attack in a corner.
    smooth = name.startswith("least") or (name.endswith("l2") and name != "loss_sign-l2")
    assert (abs(derivative) > 1e-3) == smooth


@functools.cache
def derivatives(confident):
    """Derivatives for unsound rows with finite r, or for logit gaps whose exponentials overflow."""
    (params, x, *rest), sound = problem(np.float64), problem(np.float64)
    if confident:
        params |= {k: 3000 * params[k] for k in "vc"}
    else:
        params, x, *rest = trouble()
        broken = [ROW[kind] for kind in (*NAN, *NAN_SIZE, *STEEP, "the gradient is NaN")]
        for changed, whole in zip(
            jax.tree.leaves((params, x, rest[:2])), jax.tree.leaves((*sound[:2], sound[2:4])),
            strict=True,
        ):  # fmt: skip
            if len(changed) == B:
                changed[broken] = whole[broken]
        # At the first three examples, x = 0, the logits are exactly c: two of them tie, or all.
        params["b"][:], x[:3], params["c"][:3] = 0, 0, 0.25
        params["c"][0, rest[0][0]] = params["c"][1, (rest[0][1] + 1) % K] = -1
        params["c"][3, (rest[0][3] + 1) % K] = -np.inf
    args = jax.tree.map(lambda a: a.astype(np.float64) if a.dtype == np.float32 else a, (params, x))
    y, eps, key = rest
    weight = np.random.default_rng(12).normal(size=x.shape)
    return every_derivative(net, *args, y, eps.astype(np.float64), key, weight)


@pytest.mark.parametrize(
    ("name", "confident"),
    [
        *((name, False) for name in DERIVED),
        # Where the net is confident, the smallest r itself overflows.
        *((name, True) for name in DERIVED if not name.startswith("least")),
    ],
)
def test_derivatives_are_finite(name, confident, x64):
    chex.assert_tree_all_finite(derivatives(confident)[name])


# Compilation


@pytest.mark.parametrize(
    "name", [*SOME, "least_alpha-l2", "deepfool-linf", "fab-linf-in_ball", "square-linf"]
)
def test_without_jit_it_is_the_same_and_a_program_is_traced_once(name):
    params, x, y, eps, key = problem()
    calls = []

    def counted(params, x):
        calls.append(x.shape)
        return net(params, x)

    r = call(name, counted, params, x, y, eps, key, WIDE)
    np.testing.assert_allclose(r, plain()[name], **SAME)
    once = len(calls)
    call(name, counted, params, 2 * x, y, 2 * eps, key, WIDE)
    if METHODS[name].func.__module__ != "jaxadv.perturb":  # which doesn't jit
        assert len(calls) == once + 1  # a call inspects the net, and compiles nothing


def test_a_jitted_caller_traces_the_net_once_for_all_sizes():
    params, x, y, _, key = problem()
    traced = []

    def counted(params, x):
        traced.append(x.shape)
        return net(params, x)

    fn = jax.jit(functools.partial(all_methods, counted, names=SOME))
    fn.trace(params, x, y, 0.1, key)
    once = len(traced)
    fn.trace(params, 2 * x, y, 0.2, key)
    assert len(traced) == once


# Arguments


def test_the_table_holds_every_method():
    attacks = {n for n in attack.__all__ if hasattr(getattr(attack, n), "with_report")}
    assert attacks | set(perturb.__all__) == FUNCTIONS.keys()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_signature_is_that_of_perturb_fn(name):
    parameters = inspect.signature(METHODS[FUNCTIONS[name]].func).parameters
    kinds = {k: p.kind for k, p in parameters.items()}
    positional = [k for k, kind in kinds.items() if kind is inspect.Parameter.POSITIONAL_ONLY]
    assert positional == ["apply_fn", "params", "x", "y"]
    assert {"eps", "key", "bounds"} <= kinds.keys() - set(positional)
    assert {kinds[k] for k in kinds.keys() - set(positional)} == {inspect.Parameter.KEYWORD_ONLY}
    assert parameters["key"].default is parameters["bounds"].default is None
    needs_eps = parameters["eps"].default is inspect.Parameter.empty
    assert needs_eps == (name not in {"alpha", "fab", "fmn", "ddn", "deepfool"})


BEFORE_THE_NET = [
    ({"norm": "l3"}, ValueError, r"norm to be one of .*'l2', 'linf', got 'l3'"),
    ({"eps": -0.5}, ValueError, r"a finite eps >= 0, got -0.5"),
    ({"eps": np.ones(B + 1, np.float32)}, ValueError, r"eps of shape \(\) or"),
    ({"eps": "1"}, TypeError, r"eps to be a number or an array, got str"),
    ({"bounds": (1.0, 0.0)}, ValueError, r"with lo <= hi, got .*; swap them"),
    ({"x": np.ones((B, D), np.int32)}, TypeError, r"x of a floating-point dtype, got int32"),
    ({"y": None}, TypeError, "got None; pass y"),
    ({"y": np.zeros(B - 1, int)}, ValueError, "as many labels as examples"),
    ({"y": np.ones(B, np.float32)}, TypeError, "expected integer labels"),
    ({"y": np.eye(B, K, dtype=int)}, ValueError, r"expected integer labels .*jnp\.argmax"),
]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_invalid_arguments_raise_before_the_net_is_called(name):
    params, x, y, eps, key = problem()
    for wrong, error, match in BEFORE_THE_NET:
        if name in ("loss_sign", "ddn") and "norm" in wrong:  # which take no norm
            continue
        if name in ("vat", "pgd_kl") and wrong.get("y", y) is None:  # which need no labels
            continue
        # Where the loss checks the labels, it is called after the net.
        apply_fn = net if name in ("pgd", "apgd") and "y" in wrong else None
        kwargs = {"x": x, "y": y, "eps": eps, "key": key} | wrong
        with pytest.raises(error, match=match):
            METHODS[FUNCTIONS[name]].func(
                apply_fn, params, kwargs.pop("x"), kwargs.pop("y"), **kwargs
            )


class Unhashable:
    __hash__ = None

    def __call__(self, params, x):
        return net(params, x)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_net_that_returns_no_logits_or_has_no_hash_raises(name):
    params, x, y, eps, key = problem()
    for apply_fn, error, match in (
        (lambda params, x: (x, x), TypeError, "to return logits, one array, got tuple"),
        (lambda params, x: x[:, :1], ValueError, "logits of at least 2 classes"),
        (lambda params, x: x[:1], ValueError, rf"logits of shape \[{B}, K\], got \(1, {D}\)"),
        (Unhashable(), TypeError, r"apply_fn to be hashable, got Unhashable.*; pass a"),
    ):
        if "hashable" in match and name in perturb.__all__:  # which don't compile
            continue
        with pytest.raises(error, match=match):
            call(FUNCTIONS[name], apply_fn, params, x, y, eps, key)


@pytest.mark.parametrize(
    ("fn", "wrong", "match"),
    [
        (attack.pgd, {"steps": 0}, r"steps >= 1, got 0; perturb\.loss takes one step"),
        (attack.pgd, {"restarts": -1}, r"restarts >= 1, got -1; 1 is a single run"),
        (attack.pgd, {"samples": -1}, r"samples >= 0, got -1; 0 is for a deterministic net"),
        (attack.pgd, {"samples": 2, "key": None}, r"a key: the net draws random numbers"),
        (attack.pgd, {"restarts": 2, "key": None}, r"a key: a random start draws random numbers"),
        (attack.pgd_kl, {"steps": 0}, r"steps >= 1, got 0; perturb\.vat takes one step"),
        (attack.pgd_kl, {"key": None}, r"a key: attack\.pgd_kl draws random numbers"),
        (attack.apgd, {"steps": 0}, r"steps >= 1, got 0; 100 is the published"),
        (attack.apgd, {"restarts": 0}, r"restarts >= 1, got 0; 1 is a single run"),
        (attack.apgd, {"samples": 2.5}, r"an integer samples, got 2\.5; 0 is for a deter"),
        (attack.apgd_multitargeted, {"steps": 2.5}, r"an integer steps, got 2\.5; 100 is the"),
        (attack.apgd_multitargeted, {"n_targets": 0}, r"n_targets >= 1, got 0; 9 is the published"),
        (attack.apgd_multitargeted, {"order": "size"}, r"one of 'logit', 'distance', 'alpha', got"),
        (attack.fmn, {"steps": 0}, r"steps >= 1, got 0; 100 is usual"),
        (attack.fmn, {"step_size": float("nan")}, r"step_size > 0, got nan"),
        (attack.fmn, {"step_size": float("inf")}, r"finite step_size > 0, got inf"),
        (attack.ddn, {"steps": 0}, r"steps >= 1, got 0; 100 is usual"),
        (attack.ddn, {"gamma": 1.0}, r"0 < gamma < 1, got 1\.0; 0\.05"),
        (attack.ddn, {"gamma": float("nan")}, r"0 < gamma < 1, got nan"),
        (attack.ddn, {"step_size": 0.0}, r"step_size > 0, got 0.0"),
        (attack.ddn, {"step_size": float("inf")}, r"finite step_size > 0, got inf"),
        (
            attack.deepfool,
            {"steps": 2.5},
            r"an integer steps, got 2\.5; perturb\.alpha takes one step",
        ),
        (attack.deepfool, {"overshoot": -0.1}, r"overshoot >= 0, got -0.1; 0.02"),
        (attack.deepfool, {"overshoot": float("inf")}, r"finite overshoot >= 0, got inf"),
        (attack.deepfool, {"output": "odds"}, r"one of 'logits', 'probabilities', got 'odds'"),
        (attack.fab, {"steps": 2.5}, r"an integer steps, got 2\.5; "),
        (attack.fab, {"n_targets": 0}, r"n_targets >= 1, got 0; "),
        (attack.fab, {"restarts": 0}, r"restarts >= 1, got 0; "),
        (attack.fab, {"alpha_max": 1.1}, r"alpha_max in 0\.\.1, got 1\.1; "),
        (attack.fab, {"eta": 0.9}, r"eta in 1\.\.inf, got 0\.9; "),
        (attack.fab, {"beta": float("nan")}, r"beta in 0\.\.1, got nan; "),
        (attack.square, {"patience": 0}, r"patience >= 1, got 0; None sea"),
        (attack.square, {"steps": 2.5}, r"an integer steps, got 2\.5; .*5000"),
        (attack.square, {"p_init": 0}, r"0 < p_init <= 1, got 0; pass a fraction"),
        (attack.square, {"p_init": float("nan")}, r"0 < p_init <= 1, got nan"),
        (perturb.vat, {"steps": 0}, r"steps >= 1, got 0; one power iteration"),
        (perturb.alpha, {"candidates": 0}, r"candidates >= 1, got 0; None means all classes"),
        (perturb.alpha, {"chunk": -3}, r"chunk >= 1, got -3; None means all classes"),
    ],
)
def test_a_wrong_number_or_name_is_reported_with_a_remedy(fn, wrong, match):
    params, x, y, eps, key = problem()
    with pytest.raises((ValueError, TypeError), match=f"^expected .*{match}"):
        fn(net, params, x, y, **({"eps": eps, "key": key} | wrong))


@pytest.mark.parametrize("name", ["pgd-l2", "fmn-l2"])
def test_logits_that_are_nan_fool_nobody(name):
    def breaking(params, x):  # NaN beyond 0.5, and another class beyond 2
        z = jnp.stack([2 - x[:, 0], x[:, 0] - 2, -jnp.ones(len(x))], axis=1)
        return jnp.where(x[:, :1] > 0.5, jnp.nan, z)

    x, y = np.zeros((1, 3), np.float32), np.array([0])
    r = METHODS[name].func(breaking, None, x, y, eps=1.0, steps=4)
    assert not np.isnan(breaking(None, x + r)).any()
