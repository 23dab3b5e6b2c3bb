"""`jaxadv.attack.square`, its search and schedule; test_contract tests what attacks share."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import io_callback
from references import DUAL_ORDER, NORMS, ORDER, lengths

from jaxadv import attack, losses, perturb
from jaxadv.attack import square as eager
from jaxadv.attack._square import _SEARCHES, _peak, _side

B, S, C, K = 6, 8, 2, 3
D = S * S * C
KEYS = jax.random.split(jax.random.key(9), B)

# Compilation dominates the run time, so all tests use a few numbers of steps.
SHORT, LONG, LONGEST = 9, 60, 1200  # they use windows of one, three and seven sizes

compiled = jax.jit(
    eager, static_argnums=0, static_argnames=("norm", "steps", "p_init", "patience", "targeted")
)


def square(apply_fn, params, x, y, *, eps, **kwargs):
    """Compile once for scalars and arrays."""
    eps = np.broadcast_to(eps, len(x)).astype(np.float32)
    return compiled(apply_fn, params, x, y, eps=eps, **kwargs)


every_norm = pytest.mark.parametrize("norm", NORMS)


def net(params, x):
    w, b = params
    return x.reshape(x.shape[0], D) @ w + b[None]


def problem(seed=0):
    """A problem whose last label is wrong and whose others are right by a wide margin."""
    rng = np.random.default_rng(seed)
    w, b = rng.normal(size=(D, K)).astype(np.float32), np.zeros(K, np.float32)
    x = rng.uniform(size=(B, S, S, C)).astype(np.float32)
    y = np.asarray(net((w, b), x)).argmax(axis=1)
    y[-1] = (y[-1] + 1) % K
    return (w, b), x, y


def robust():
    """A linear net with class 0 far ahead of class 1, and class 1 far ahead of class 2."""
    rng = np.random.default_rng(1)
    w = rng.normal(size=(D, K)).astype(np.float32)
    b = np.array([1e3, 0, -1e3], np.float32)
    return (w, b), np.zeros((B, S, S, C), np.float32), np.zeros(B, int)


def margin(params, x, y):
    """By how much y leads the other classes; negative where the net is fooled."""
    z = np.array(net(params, jnp.asarray(x)), np.float64)
    own = z[np.arange(B), y].copy()
    z[np.arange(B), y] = -np.inf
    return own - z.max(axis=1)


# The search


@every_norm
def test_on_a_linear_net_the_margin_falls_toward_the_closed_form(norm):
    params, x, y = robust()
    eps = np.array([0.1, 0.1, 0.1, 1, 1, 1])
    away = (params[0][:, 1] - params[0][:, 0]).astype(np.float64)
    shares = []
    for steps in (SHORT, LONGEST):
        r = square(net, params, x, y, eps=eps, norm=norm, steps=steps, key=KEYS)
        shares.append(np.asarray(r, np.float64).reshape(B, D) @ away)
    # Rounding errors don't accumulate.
    np.testing.assert_allclose(lengths(r, norm), eps.astype(np.float32), rtol=5e-7)
    shares = np.array(shares) / (eps * np.linalg.norm(away, DUAL_ORDER[norm]))[None]
    assert (shares <= 1 + 1e-6).all()
    assert (shares[1] > {"l1": 0.3, "l2": 0.5, "linf": 0.8}[norm]).all()
    assert (shares[0] < shares[1] - 0.1).all()


@every_norm
def test_more_steps_never_do_worse_and_fooled_rows_do_not_change(norm):
    params, x, y = problem()
    eps = {"l1": 6.0, "l2": 1.4, "linf": 0.12}[norm]
    fn = functools.partial(square, net, params, x, y, eps=eps, norm=norm, key=KEYS)
    runs = [np.asarray(fn(steps=steps)) for steps in (SHORT, LONG, LONGEST)]
    margins = np.array([margin(params, x + r, y) for r in runs])
    fooled = margins < 0
    for i, j in itertools.pairwise(range(len(runs))):
        assert (fooled[j] >= fooled[i]).all()
        assert (margins[j] <= margins[i] + 1e-5)[~fooled[i]].all()
        # Programs with different numbers of steps may round differently.
        np.testing.assert_allclose(runs[j][fooled[i]], runs[i][fooled[i]], atol=1e-6)
    # Some are fooled later than others.
    assert fooled[0, :-1].sum() < fooled[-1, :-1].sum()
    assert (margins[-1] < margins[0])[~fooled[0]].all()


def test_the_search_ends_once_all_rows_are_fooled():
    params, x, y = problem()
    queries = []

    def counted(params, x):
        io_callback(lambda: queries.append(0), None, ordered=True)
        return net(params, x)

    r = square(counted, params, x, y, eps=0.3, norm="linf", steps=LONG, key=KEYS)
    jax.effects_barrier()
    assert (margin(params, x + np.asarray(r), y) < 0).all()
    assert 3 <= len(queries) < LONG + 2
    queries.clear()
    square(counted, params, x, y, eps=0.01, norm="linf", steps=LONG, key=KEYS)
    jax.effects_barrier()
    assert len(queries) == LONG + 2  # with those of x and of the start
    # Rows that can't be fooled don't prolong it.
    w, b = params
    one_class, broken = np.float32([[0, -np.inf, -np.inf], [0, -1e3, np.nan]])
    for eps, bias, labels in ((0, b, y), (0.01, one_class, 0 * y), (0.01, broken, 0 * y)):
        queries.clear()
        square(counted, (w, bias), x, labels, eps=eps, norm="linf", steps=LONG, key=KEYS)
        jax.effects_barrier()
        assert len(queries) == 2


@every_norm
def test_a_targeted_search_lowers_the_cross_entropy_until_it_reaches_the_target(norm):
    params, x, _ = problem()
    clean = np.asarray(net(params, x)).argmax(axis=1)
    y = (clean + 1) % K
    eps = {"l1": 15.0, "l2": 3.0, "linf": 0.3}[norm]
    fn = functools.partial(square, net, params, x, y, norm=norm, targeted=True, key=KEYS)
    r = np.asarray(fn(eps=eps, steps=LONG))
    assert (np.asarray(net(params, x + r)).argmax(axis=1) == y).mean() > 0.5
    before = losses.margin(net(params, x), y)
    after = losses.margin(net(params, x + fn(eps=eps / 30, steps=LONG)), y)
    assert (after < before).all()


@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_logits_that_are_not_finite_fool_nobody(bad):
    def broken(params, x):  # everywhere except at the origin
        total = jnp.sum(jnp.abs(x), axis=(1, 2, 3))
        logits = jnp.stack([jnp.zeros_like(total), 1 - total], axis=1)
        return jnp.where(total[:, None] > 0, jnp.where(jnp.arange(2) == 0, bad, logits), logits)

    x = np.zeros((B, S, S, C), np.float32)
    for targeted in (False, True):  # argmax takes NaN for the largest, so class 0 would win
        y = np.full(B, 0 if targeted else 1)
        r = square(broken, None, x, y, eps=1.0, norm="linf", steps=1, targeted=targeted, key=KEYS)
        np.testing.assert_array_equal(r, 0)


def test_a_search_that_makes_little_progress_is_given_up():
    params, x, y = problem()
    eps = np.float32([0.3, 0.3, 0.3, 1e-3, 1e-3, 1e-3])
    report = jax.jit(
        attack.with_info(eager), static_argnums=0, static_argnames=("norm", "steps", "patience")
    )
    of = {"eps": eps, "norm": "linf", "steps": LONGEST, "key": KEYS}
    whole, patient = report(net, params, x, y, **of), report(net, params, x, y, patience=20, **of)
    assert whole[1].success.tolist() == [True] * 3 + [False] * 2 + [True]  # the last label is wrong
    assert patient[1].success.tolist() == whole[1].success.tolist()
    np.testing.assert_allclose(whole[0][:3], patient[0][:3], atol=1e-6)
    # Progress is checked every 20 queries after the start.
    given_up = np.asarray(patient[1].forward[3:5])
    assert (given_up < 200).all()
    assert ((given_up - 2) % 20 == 0).all()
    assert (whole[1].forward[3:5] == LONGEST + 2).all()
    # Each example is given up independently of the others.
    alone, info = report(
        net, params, x[3:4], y[3:4], patience=20, **of | {"eps": eps[3:4], "key": KEYS[3:4]}
    )
    assert info.forward == given_up[0]
    np.testing.assert_allclose(alone[0], patient[0][3], atol=1e-6)


def test_a_targeted_search_among_many_classes_is_not_given_up():
    # The target's cross-entropy is far from 0 although its logit is nearly the largest.
    signs = np.where(np.random.default_rng(0).uniform(size=D) < 0.5, -1, 1).astype(np.float32)

    def among(bias, x):
        return jnp.pad((x.reshape(-1, D) @ signs - bias)[:, None], ((0, 0), (0, 999)))

    _, info = attack.with_info(eager)(
        among, 0.2 * 0.01 * D, np.zeros((B, S, S, C), np.float32), np.zeros(B, int), eps=0.01,
        norm="linf", steps=LONGEST, patience=100, targeted=True, key=KEYS,
    )  # fmt: skip
    assert info.success.all()
    assert info.forward.max() > 102  # long enough for giving up


# Windows


def published_sides(size, norm, first=0.8):
    """The windows' sides from steps 0, 11, 51, ... on, by the definition."""
    for halvings in range(10):
        side = round(math.sqrt(first * 2.0**-halvings * size * size))
        if norm != "linf":
            side = max(side, 3)
            side += side % 2 == 0
        yield min(max(side, 1), size)


@every_norm
@pytest.mark.parametrize("size", [2, 8, 28, 32])
def test_the_sides_are_the_published_ones(norm, size):
    want = list(published_sides(size, norm))
    assert [_side(norm, 0.8, n, size, size) for n in range(10)] == want
    if size == 28:  # also by hand
        by_hand = {
            "linf": [25, 18, 13, 9, 6, 4, 3, 2, 2, 1],
            "l2": [25, 19, 13, 9, 7, 5, 3, 3, 3, 3],
        }
        assert want == by_hand.get(norm, by_hand["l2"])
    assert _side(norm, 1.0, 0, size, 2 * size) == size


@pytest.mark.parametrize(("steps", "p_init"), [(12, 0.8), (LONG, 0.8), (LONG, 0.2)])
def test_the_windows_shrink_after_the_published_steps(steps, p_init):
    seen = []

    def constant(params, x):  # no query improves it, so each is one window away from the start
        io_callback(lambda x: seen.append(np.array(x)), None, x, ordered=True)
        return jnp.broadcast_to(jnp.arange(2.0)[None], (x.shape[0], 2))

    x, y = np.zeros((8, 20, 20, 3), np.float32), np.ones(8, int)
    square(
        constant, None, x, y, eps=1.0, norm="linf", steps=steps, p_init=p_init,
        key=jax.random.key(3),
    )  # fmt: skip
    jax.effects_barrier()
    clean, start, *queries = seen
    np.testing.assert_array_equal(clean, 0)
    np.testing.assert_array_equal(start, np.broadcast_to(start[:, :1], start.shape))  # stripes
    assert {-1.0, 1.0} == set(np.unique(start))
    # A window may equal the stripes that it replaces, but not in all examples.
    found = [(query != start).any(axis=(2, 3)).sum(axis=1).max() for query in queries]
    first, second, third = itertools.islice(published_sides(20, "linf", p_init), 3)
    assert found == ([first] * 11 + [second] * 40 + [third] * 9)[:steps]


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("shape", [(5, 5), (2, 5), (3, 5), (4, 9), (1, 3), (6, 6)])
def test_a_peak_is_a_sum_of_nested_squares(shape, p):
    pile = np.zeros(shape)
    middle = shape[0] // 2, shape[1] // 2
    for k in range(max(middle) + 1):
        around = tuple(slice(max(m - k, 0), m + k + 1) for m in middle)
        pile[around] += 1 / (k + 1) ** {1: 4, 2: 2}[p]
    want = pile / np.linalg.norm(pile.ravel(), p)
    np.testing.assert_allclose(_peak(*shape, p), want, rtol=1e-12)


def windows(u, side):
    """The slices of a move's two windows, from its uniform numbers."""
    corners = np.floor(np.asarray(u[C : C + 4], np.float64) * (S - side + 1)).astype(int)
    rows = [slice(a, a + side) for a in corners]
    return tuple(rows[:2]), tuple(rows[2:])


@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize("side", [3, 5])
def test_a_move_concentrates_the_energy_of_two_windows_in_one(side, norm):
    p = ORDER[norm]
    move = jax.jit(functools.partial(_SEARCHES[norm].move, side=side))
    rng = np.random.default_rng(side)
    for turned in (0.2, 0.7):
        r = rng.normal(size=(S, S, C))
        r = 2e-3 * 0.9 * r / np.linalg.norm(r.ravel(), p)  # as if the box had cut a tenth
        r = r.astype(np.float32)
        u = rng.uniform(size=C + 5).astype(np.float32)
        u[-1] = turned
        here, there = windows(u, side)
        got = np.asarray(move(r, u, np.float32(2e-3)), np.float64) / 2e-3
        r = r.astype(np.float64) / 2e-3

        either = np.zeros((S, S), bool)
        either[here] = either[there] = True
        np.testing.assert_allclose(got[~either], r[~either], rtol=1e-6)
        either[here] = False
        np.testing.assert_array_equal(got[either], 0)
        either[here] = True
        energy = (abs(r[either]) ** p).sum(axis=0) + (1 - (abs(r) ** p).sum()) / C
        np.testing.assert_allclose((abs(got[here]) ** p).sum(axis=(0, 1)), energy, rtol=1e-5)
        np.testing.assert_allclose((abs(got) ** p).sum(), 1, rtol=1e-6)

        top = side // 2
        bump = np.concatenate([_peak(top, side, p), -_peak(side - top, side, p)]) / 2 ** (1 / p)
        bump = (bump.T if turned < 0.5 else bump)[:, :, None] * np.where(u[:C] < 0.5, -1, 1)
        shape = bump + r[here] / (abs(r[here]) ** p).sum(axis=(0, 1)) ** (1 / p)
        shape *= (energy / (abs(shape) ** p).sum(axis=(0, 1))) ** (1 / p)
        np.testing.assert_allclose(got[here], shape, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize("size", [(4, 7), (12, 10), (28, 28)])
def test_the_start_tiles_the_image(size, norm):
    p = ORDER[norm]
    start = jax.jit(functools.partial(_SEARCHES[norm].start, (*size, C)))
    r = np.asarray(start(KEYS[0], jnp.float32(0.5)), np.float64)
    np.testing.assert_allclose(np.linalg.norm(r.ravel(), p), 0.5, rtol=1e-6)
    side = max(min(size) // 5, 1)
    tiles = [n // side for n in size]
    first = [(n - t * side) // 2 for n, t in zip(size, tiles, strict=True)]
    for i, j in itertools.product(*map(range, tiles)):
        a, b = first[0] + i * side, first[1] + j * side
        tile = r[a : a + side, b : b + side]
        share = np.full(C, 0.5 / (math.prod(tiles) * C) ** (1 / p))
        sizes = np.linalg.norm(tile.reshape(-1, C), p, axis=0)
        np.testing.assert_allclose(sizes, share, rtol=1e-6)


@every_norm
def test_a_window_may_be_anywhere_in_the_image(norm):
    u = jax.random.uniform(KEYS[0], (2000, C + 5))
    r = jnp.zeros((4, 5, C))
    move = functools.partial(_SEARCHES[norm].move, side=3)
    moved = jax.jit(jax.vmap(move, (None, 0, None)))(r, u, np.float32(1))
    support = np.asarray((moved != 0).any(axis=3))
    corners, counts = np.unique(
        [(m.any(axis=1).argmax(), m.any(axis=0).argmax()) for m in support],
        axis=0,
        return_counts=True,
    )
    assert len(corners) == 2 * 3
    np.testing.assert_allclose(counts / 2000, 1 / 6, atol=0.04)  # 5 standard deviations
    assert (support.sum(axis=(1, 2)) == 9).all()


# The ball


def test_the_l2_ball_may_have_any_size():
    (w, b), x, y = robust()
    tiny, huge = (
        np.asarray(square(net, (w / size, b), x, y, eps=size, steps=LONG, key=KEYS)) / size
        for size in np.float32([1e-30, 1e15])
    )
    np.testing.assert_allclose(lengths(tiny, "l2"), 1, rtol=1e-6)
    np.testing.assert_allclose(tiny, huge, rtol=1e-3, atol=1e-5)


# Compilation


def test_the_number_of_traces_does_not_depend_on_steps_and_windows():
    params, x, y = problem()
    traces = []
    for steps in (2, 5000):
        calls = []

        def apply_fn(params, x, calls=calls):
            calls.append(x.shape)
            return net(params, x)

        fn = functools.partial(eager, apply_fn, eps=0.5, steps=steps, key=KEYS)
        jax.eval_shape(fn, params, x, y)
        traces.append(len(calls))
    assert traces[0] == traces[1]


@pytest.mark.parametrize(
    ("shape", "norm", "bounds"),
    [((7,), "l2", None), ((3, 5), "linf", (-1.0, 1.0)), ((2, 3, 2, 2), "l2", (-1.0, 1.0))],
)
def test_square_accepts_inputs_that_are_not_images(shape, norm, bounds):
    rng = np.random.default_rng(0)
    w = rng.normal(size=(math.prod(shape), 3)).astype(np.float32)
    x = rng.normal(size=(B, *shape)).clip(-1, 1).astype(np.float32)

    def linear(w, x):
        return x.reshape(len(x), -1) @ w

    y = np.asarray(linear(w, x)).argmax(axis=1)
    r = square(linear, w, x, y, eps=3.0, norm=norm, steps=100, key=KEYS, bounds=bounds)
    assert r.shape == x.shape
    assert (lengths(r, norm) <= 3 * (1 + 1e-6)).all()
    assert bounds is None or (np.abs(x + r) <= 1).all()
    reach = perturb.loss(linear, w, x, y, eps=3.0, norm=norm, bounds=bounds)
    fooled, by_one_step = (np.asarray(linear(w, x + v)).argmax(axis=1) != y for v in (r, reach))
    # Where one step misleads a linear net, random search does so too.
    assert (fooled >= by_one_step).all()
    assert by_one_step.any()
