"""`jaxadv.attack.search`, and the contract of the attacks that are written on it.

All of them go through the same tests as one program for each shape, as in test_perturb, since
compiling is what costs. What is a method's own is in test_apgd, test_minimal and test_pgd.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxadv import attack, losses, norms

NORMS = ("l1", "l2", "linf")
ORDER = {"l1": 1, "l2": 2, "linf": np.inf}


def each_norm(name, fn, **kwargs):
    return {f"{name}-{norm}": functools.partial(fn, norm=norm, **kwargs) for norm in NORMS}


BUDGET = {
    "apgd-l1": functools.partial(attack.apgd, norm="l1", steps=8),
    "apgd-l2": functools.partial(attack.apgd, norm="l2", steps=8),
    "dlr-linf": functools.partial(
        attack.apgd, norm="linf", steps=5, loss_fn=losses.dlr, restarts=3
    ),
    "towards-linf": functools.partial(attack.apgd_multitargeted, norm="linf", steps=4, n_targets=2),
}
MINIMAL = {
    **each_norm("fmn", attack.fmn, steps=20),
    **each_norm("deepfool", attack.deepfool),
    "probabilities-l2": functools.partial(attack.deepfool, norm="l2", output="probabilities"),
}
SIZED_MINIMAL = {f"sized_{name}": MINIMAL[name] for name in ("fmn-l2", "deepfool-l1")}
METHODS = BUDGET | MINIMAL | SIZED_MINIMAL
SIZED = [name for name in METHODS if name not in MINIMAL]
KEYED = list(BUDGET)

every_method = pytest.mark.parametrize("name", METHODS)
minimal_methods = pytest.mark.parametrize("name", [*MINIMAL, *SIZED_MINIMAL])
sized_methods = pytest.mark.parametrize("name", SIZED)
keyed_methods = pytest.mark.parametrize("name", KEYED)

quick_jit = functools.partial(
    jax.jit,
    static_argnums=0,
)


def call(name, apply_fn, params, x, y, eps, key, bounds=None):
    size = {"eps": eps} if name in SIZED else {}
    return METHODS[name](apply_fn, params, x, y, key=key, bounds=bounds, **size)


def all_methods(apply_fn, params, x, y, eps, key, bounds=None, names=tuple(METHODS)):
    return {name: call(name, apply_fn, params, x, y, eps, key, bounds) for name in names}


every = quick_jit(all_methods, static_argnames="names")

B, D, H, K = 6, 5, 7, 4
SAME = {"rtol": 1e-4, "atol": 1e-4}
DTYPES = [jnp.float32, jnp.bfloat16]
WIDE = (np.float32(-100), np.float32(100))  # a box, so that programs with and without one are one


def net(params, x):
    """One tanh layer; `c` is [B, K], so that a test can set the logits of one example."""
    w, b, v, c = (params[k].astype(x.dtype) for k in "wbvc")
    return jnp.tanh(x @ w + b[None]) @ v + c


def logits_of(params, x):
    w, b, v, c = (np.asarray(params[k], np.float64) for k in "wbvc")
    return np.tanh(np.asarray(x, np.float64) @ w + b) @ v + c


def problem(seed=0):
    """Arguments of `every` after the net: all examples are classified right."""
    rng = np.random.default_rng(seed)
    shapes = {"w": (D, H), "b": (H,), "v": (H, K), "c": (B, K)}
    params = {k: rng.normal(size=shape).astype(np.float32) for k, shape in shapes.items()}
    x = rng.normal(size=(B, D)).astype(np.float32)
    eps = np.linspace(0.1, 0.6, B).astype(np.float32)
    y = logits_of(params, x).argmax(axis=1).astype(np.int32)
    return params, x, y, eps, jax.random.split(jax.random.key(seed), B)


def edited(a, rows, value):
    a = np.array(a)
    a[rows] = value
    return a


def rows_of(args, rows):
    params, x, y, eps, key = args
    return params | {"c": params["c"][rows]}, x[rows], y[rows], eps[rows], key[rows]


def length(name, r):
    return np.linalg.norm(np.asarray(r, np.float64), ORDER[name.split("-")[1]], axis=1)


@functools.cache
def plain():
    return every(net, *problem(), WIDE)


# Rows


def trouble(kind):
    """A problem, and the rows of it that are troublesome."""
    params, x, y, eps, key = problem()
    c, rows = params["c"], np.array([1, 4])
    if kind == "a label is out of range":
        y = edited(y, rows, [-1, K])
    elif kind == "the true class is masked":
        params["c"] = edited(c, (rows, y[rows]), -np.inf)
    elif kind == "only the true class is left":
        mask = np.where(np.eye(K, dtype=bool)[y[rows]], c[rows], -np.inf)
        params["c"] = edited(c, rows, mask)
    elif kind == "no class is left":
        params["c"] = edited(c, rows, -np.inf)
    elif kind == "x is not finite":
        x = edited(x, (rows, 2), [np.nan, np.inf])
    elif kind == "the logits are not finite":
        params["c"] = edited(c, (rows, [0, 3]), [np.nan, np.inf])
    elif kind == "x is misclassified":
        y = edited(y, rows, (y[rows] + 1) % K)
    return (params, x, y, eps, key), rows


ZERO = [
    "a label is out of range",
    "the true class is masked",
    "only the true class is left",
    "no class is left",
]
NAN = ["x is not finite", "the logits are not finite"]
TROUBLE = [*ZERO, *NAN, "x is misclassified"]


@functools.cache
def troubled(kind):
    args, rows = trouble(kind)
    return every(net, *args, WIDE), rows


@every_method
@pytest.mark.parametrize("kind", ZERO)
def test_r_is_exactly_0_where(name, kind):
    r, rows = troubled(kind)
    np.testing.assert_array_equal(r[name][rows], 0)


@every_method
@pytest.mark.parametrize("kind", NAN)
def test_r_is_nan_where(name, kind):
    r, rows = troubled(kind)
    assert np.isnan(r[name][rows]).all()


@every_method
@pytest.mark.parametrize("kind", TROUBLE)
def test_no_other_row_changes_by_a_bit_where(name, kind):
    r, rows = troubled(kind)
    others = np.setdiff1d(np.arange(B), rows)
    np.testing.assert_array_equal(r[name][others], plain()[name][others])


@minimal_methods
def test_the_least_r_of_a_misclassified_example_is_exactly_0(name):
    r, rows = troubled("x is misclassified")
    np.testing.assert_array_equal(r[name][rows], 0)


@every_method
def test_the_results_here_are_not_all_0(name):
    assert (np.asarray(plain()[name]) != 0).any(axis=1).all()


def flat(lead):
    params, x, y, eps, key = problem()
    return {k: 0 * a for k, a in params.items()} | {"c": lead * np.eye(K)[y]}, x, y, eps, key


@functools.cache
def without_gradients(lead):
    return every(net, *flat(np.float32(lead)), WIDE)


@every_method
@pytest.mark.parametrize("lead", [2, -2, 0])
def test_a_net_without_gradients_gives_a_finite_r(name, lead):
    assert np.isfinite(without_gradients(lead)[name]).all()
    if name not in BUDGET:
        np.testing.assert_array_equal(without_gradients(lead)[name], 0)


@functools.cache
def with_tiny_gradients():
    params, *rest = flat(np.float32(200))  # over that slope, more than the largest float
    v = np.zeros((H, K), np.float32)
    v[:, 0] = 1e-19
    return every(net, params | {"w": params["w"] + np.float32(1e-19), "v": v}, *rest, WIDE)


@every_method
def test_a_net_with_gradients_near_the_smallest_float_gives_a_finite_r(name):
    assert np.isfinite(with_tiny_gradients()[name]).all()


@functools.cache
def masked(steepness):
    """The class of the first example is masked in all others, however steep it is."""
    params, x, y, eps, key = problem()
    others = np.flatnonzero(y != y[0])
    c, v = edited(params["c"], (others, y[0]), -np.inf), params["v"].copy()
    v[:, y[0]] *= steepness
    return every(net, params | {"c": c, "v": v}, x, y, eps, key, WIDE), others


@every_method
def test_a_masked_class_is_never_a_target(name):
    (gentle, rows), (steep, _) = masked(1), masked(-50)
    np.testing.assert_array_equal(gentle[name][rows], steep[name][rows])
    assert (gentle[name][rows] != 0).any(axis=1).all()


# Sizes and boxes


BOXED = {
    jnp.float32: tuple(METHODS),
    jnp.bfloat16: ("apgd-l1", "apgd-l2", "towards-linf", "fmn-linf", *SIZED_MINIMAL),
}


@functools.cache
def boxed(dtype):
    params, x, y, eps, key = problem()
    x = jnp.clip(jnp.asarray(x, dtype), -1, 1)
    eps = edited(3 * eps, 0, 0)
    box = (np.float32(-1), np.float32(1))
    return every(net, params, x, y, eps, key, box, names=BOXED[dtype]), x, eps


@pytest.mark.parametrize(
    ("name", "dtype"), [(name, dtype) for dtype, names in BOXED.items() for name in names]
)
def test_x_plus_r_is_in_the_box_and_r_in_the_ball(name, dtype):
    r, x, eps = boxed(dtype)
    r = r[name]
    assert r.dtype == dtype
    moved = np.asarray(x + r).astype(np.float64)
    assert (np.abs(moved) <= 1).all()
    if name in SIZED:
        assert (length(name, r) <= eps * (1 + 1e-6)).all()
        np.testing.assert_array_equal(r[0], 0)


@sized_methods
def test_r_is_in_the_ball_of_its_example(name):
    _, _, _, eps, _ = problem()
    assert (length(name, plain()[name]) <= eps * (1 + 1e-6)).all()


@functools.cache
def with_one_size():
    params, x, y, _, key = problem()
    names = ("apgd-l2", "sized_fmn-l2")
    one = every(net, params, x, y, np.float32(0.3), key, WIDE, names=names)
    return one, every(net, params, x, y, np.full(B, 0.3, np.float32), key, WIDE)


@pytest.mark.parametrize("name", ["apgd-l2", "sized_fmn-l2"])
def test_one_size_is_that_size_for_each_example(name):
    one, each = with_one_size()
    np.testing.assert_allclose(one[name], each[name], **SAME)


@pytest.mark.parametrize("sized_name", SIZED_MINIMAL)
def test_with_a_size_the_least_r_is_kept_where_it_fits_and_else_projected(sized_name):
    name, eps = sized_name.removeprefix("sized_"), problem()[3]
    r, sized = np.asarray(plain()[name]), np.asarray(plain()[sized_name])
    fits = length(name, r) <= eps
    assert 0 < fits.sum() < B
    np.testing.assert_array_equal(sized[fits], r[fits])
    want = np.asarray(norms.project(r, eps, name.split("-")[1]))
    np.testing.assert_allclose(sized[~fits], want[~fits], rtol=1e-6)
    np.testing.assert_allclose(length(name, sized)[~fits], eps[~fits], rtol=1e-6)


# The projection onto the l1 ball alone is optax's, which relies on promotion.
STRICT = [
    (name, boxed)
    for name in METHODS
    for boxed in (False, True)
    if not name.endswith("l1") or name == "deepfool-l1" or (boxed and name not in SIZED_MINIMAL)
]


@pytest.mark.parametrize(("name", "boxed"), STRICT)
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_dtype_is_promoted_by_accident(name, boxed, dtype, strict_dtypes):
    params, x, y, eps, key = problem()
    x = jnp.asarray(x, dtype)
    bounds = (jnp.full((B, D), -9, dtype), jnp.full((B, D), 9, dtype)) if boxed else None
    fn = functools.partial(call, name, net)
    assert jax.eval_shape(fn, params, x, y, eps, key, bounds).dtype == dtype


@every_method
@pytest.mark.parametrize(
    ("dtype", "logits"), [(np.float32, np.float64), (np.float64, np.float32)], ids=["x", "logits"]
)
def test_in_64_bit_mode_x_and_the_logits_may_differ_in_dtype(name, dtype, logits, x64):
    params, x, y, eps, key = problem()

    def apply_fn(params, x):
        return net(params, x).astype(logits)

    fn = functools.partial(call, name, apply_fn)
    r = jax.eval_shape(fn, params, x.astype(dtype), y, eps, key)
    assert (r.shape, r.dtype) == (x.shape, dtype)


# Keys and places


@functools.cache
def again():
    return every(net, *problem(), WIDE)


@keyed_methods
def test_the_same_key_gives_the_same_bits(name):
    np.testing.assert_array_equal(again()[name], plain()[name])


@functools.cache
def with_other_keys():
    params, x, y, eps, _ = problem()
    return every(net, params, x, y, eps, jax.random.split(jax.random.key(77), B), WIDE)


@keyed_methods
def test_another_key_gives_another_result(name):
    assert (np.asarray(with_other_keys()[name]) != np.asarray(plain()[name])).any()


@pytest.mark.parametrize("name", [name for name in METHODS if name not in KEYED])
def test_a_method_that_draws_nothing_ignores_the_key(name):
    np.testing.assert_array_equal(with_other_keys()[name], plain()[name])


@keyed_methods
@pytest.mark.parametrize("key", [None, 3])
def test_a_missing_key_is_named(name, key):
    params, x, y, eps, _ = problem()
    error = ValueError if key is None else TypeError
    match = r"expected a key: a random start draws" if key is None else r"expected a key, got 3"
    with pytest.raises(error, match=match):
        call(name, net, params, x, y, eps, key)


@functools.cache
def permuted():
    order = np.array([3, 0, 5, 2, 1, 4])
    return every(net, *rows_of(problem(), order), WIDE), order


@every_method
def test_permuted_rows_with_their_keys_give_permuted_results(name):
    r, order = permuted()
    # A matrix product may be summed in another order in another place.
    np.testing.assert_allclose(r[name], plain()[name][order], **SAME)


SOME = ("apgd-l2", "fmn-l2", "deepfool-linf")


@functools.cache
def alone():
    return every(net, *rows_of(problem(), np.array([2])), WIDE, names=SOME)


@pytest.mark.parametrize("name", SOME)
def test_an_example_alone_is_its_row_of_a_batch(name):
    # As above; the boundary is found to a thousandth of the way, in steps that are all or nothing.
    atol = 2e-3 if name.startswith("fmn") else 1e-4
    np.testing.assert_allclose(alone()[name], plain()[name][2:3], atol=atol)


@pytest.mark.parametrize("name", ["apgd-l2", "deepfool-linf"])
def test_without_jit_it_is_the_same_and_the_net_is_traced_once(name):
    params, x, y, eps, key = problem()
    calls = []

    def counted(params, x):
        calls.append(x.shape)
        return net(params, x)

    r = call(name, counted, params, x, y, eps, key, WIDE)
    np.testing.assert_allclose(r, plain()[name], **SAME)
    once = len(calls)
    call(name, counted, params, 2 * x, y, 2 * eps, key, WIDE)
    assert len(calls) == once + 1  # a call looks at the net, and compiles nothing


# Messages


@pytest.mark.parametrize(
    ("fn", "wrong", "match"),
    [
        (attack.apgd, {"steps": 0}, r"steps >= 1, got 0; 100 is the published"),
        (attack.apgd, {"restarts": 0}, r"restarts >= 1, got 0; 1 is a single run"),
        (attack.pgd, {"restarts": -1}, r"restarts >= 1, got -1; 1 is a single run"),
        (attack.apgd, {"samples": -1}, r"samples >= 0, got -1; 0 is for a net that draws no"),
        (attack.pgd, {"samples": 2, "key": None}, r"a key: the net draws random numbers"),
        (attack.pgd, {"restarts": 2, "key": None}, r"a key: a random start draws random numbers"),
        (attack.apgd_multitargeted, {"steps": 0}, r"steps >= 1, got 0; 100 is the published"),
        (attack.apgd_multitargeted, {"n_targets": 0}, r"n_targets >= 1, got 0; 9 is the published"),
        (attack.fmn, {"steps": 0}, r"steps >= 1, got 0; 100 is usual"),
        (attack.fmn, {"step_size": 0.0}, r"step_size > 0, got 0.0"),
        (attack.fmn, {"step_size": float("nan")}, r"step_size > 0, got nan"),
        (attack.deepfool, {"steps": 0}, r"steps >= 1, got 0; one step is perturb\.alpha"),
        (attack.deepfool, {"overshoot": -0.1}, r"overshoot >= 0, got -0.1; 0.02"),
        (attack.deepfool, {"output": "odds"}, r"one of 'logits', 'probabilities', got 'odds'"),
    ],
)
def test_a_wrong_number_or_name_is_named_with_its_cure(fn, wrong, match):
    params, x, y, eps, key = problem()
    with pytest.raises(ValueError, match=match):
        fn(net, params, x, y, **({"eps": eps, "key": key} | wrong))


@pytest.mark.parametrize(
    "fn", [attack.apgd, attack.apgd_multitargeted, attack.fmn, attack.deepfool]
)
def test_wrong_arguments_that_all_methods_share_raise(fn):
    params, x, y, eps, key = problem()
    fn = functools.partial(fn, key=key)
    for kwargs, match in [
        ({"norm": "l3"}, r"norm to be one of 'l1', 'l2', 'linf', got 'l3'"),
        ({"eps": -0.5}, r"eps >= 0, got -0.5"),
        ({"bounds": 3}, r"bounds=\(lo, hi\), got 3"),
        ({"bounds": (1.0, 0.0)}, r"lo <= hi"),
    ]:
        with pytest.raises(ValueError, match=match):
            fn(net, params, x, y, **({"eps": eps} | kwargs))
    with pytest.raises(TypeError, match=r"x of a floating-point dtype, got int32"):
        fn(net, params, x.astype(np.int32), y, eps=eps)
    with pytest.raises(ValueError, match="as many labels as examples"):
        fn(net, params, x, y[:-1], eps=eps)
    with pytest.raises(TypeError, match="expected integer labels"):
        fn(net, params, x, np.eye(K, dtype=np.float32)[y], eps=eps)
    with pytest.raises(TypeError, match=r"logits, one array, got tuple"):
        fn(lambda params, x: (net(params, x),), params, x, y, eps=eps)


# What they are made of


def test_logits_that_are_nan_fool_nobody():
    def breaking(params, x):  # NaN beyond 0.5, another class from 2 on
        z = jnp.stack([2 - x[:, 0], x[:, 0] - 2, -jnp.ones(len(x))], axis=1)
        return jnp.where(x[:, :1] > 0.5, jnp.nan, z)

    x, y = np.zeros((1, 3), np.float32), np.array([0])
    for method in (attack.pgd, attack.fmn):
        r = method(breaking, None, x, y, eps=1.0, steps=4)
        assert breaking(None, x + r)[0, 0] == breaking(None, x + r)[0, 0]
