"""`attack.ddn` and `fmn` against the published algorithms; `apgd` searching for a smallest ball."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from nets import curved, distances, linear, linear_problem, misled
from references import ORDER, lengths, steepest

from jaxadv import attack

B, D = 40, 12
BOX = (0.0, 1.0)


@functools.cache
def boxed_problem():
    """Return a curved net, and images in [0, 1] with many pixels at 0 and 1."""
    rng = np.random.default_rng(0)
    params = rng.normal(size=(D, 16)), rng.normal(size=(16, 5))
    x = np.clip(rng.normal(0.5, 0.6, size=(B, D)), 0, 1)
    y = np.argmax(np.tanh(x @ params[0]) @ params[1], axis=1)
    return params, x, y


def logits(params, x):
    """Logits [K] and their Jacobian [K, D] at one x, in float64."""
    w, v = params
    hidden = np.tanh(x @ w)
    return hidden @ v, (w @ ((1 - hidden**2)[:, None] * v)).T


def anneal(i, steps):
    return (1 + np.cos(np.pi * i / steps)) / 2


def published_ddn(params, x, y, steps=100, gamma=0.05):
    """The smallest r that the authors' DDN finds for one x, without rounding to 256 levels."""
    r, size, best = np.zeros_like(x), 1.0, np.full_like(x, np.inf)
    largest = np.linalg.norm(np.maximum(x, 1 - x))
    for i in range(steps):
        z, jac = logits(params, x + r)
        wrong = np.argmax(z) != y
        if wrong and np.linalg.norm(r) < np.linalg.norm(best):
            best = r
        p = np.exp(z - z.max())
        g = p / p.sum() @ jac - jac[y]  # of cross-entropy
        r = r + (0.01 + 0.99 * anneal(i, steps)) * steepest(g, "l2")
        size = min(size * (1 - gamma if wrong else 1 + gamma), largest)
        r = np.clip(x + size * steepest(r, "l2"), 0, 1) - x
    return best


def published_fmn(params, x, y, steps=100):
    """The smallest r that the authors' FMN finds for one x in l2; infinite if it finds none."""
    r, radius, best = np.zeros_like(x), np.inf, np.full_like(x, np.inf)
    largest, found = np.linalg.norm(np.maximum(x, 1 - x)), False
    for i in range(steps):
        z, jac = logits(params, x + r)
        top = np.argmax(np.where(np.arange(len(z)) == y, -np.inf, z))
        wrong, g = np.argmax(z) != y, jac[top] - jac[y]
        found |= wrong
        if wrong and np.linalg.norm(r) < np.linalg.norm(best):
            best = r
        share = 0.001 + 0.049 * anneal(i, steps)
        if wrong:
            radius = min(radius * (1 - share), np.linalg.norm(best))
        elif found:
            radius *= 1 + share
        else:
            radius = np.linalg.norm(r) + abs(z[top] - z[y]) / np.linalg.norm(g)
        radius = min(radius, largest)
        r = r + (0.01 + 0.99 * anneal(i, steps)) * steepest(g, "l2")
        r = r * min(1, radius / np.linalg.norm(r))
        r = np.clip(x + r, 0, 1) - x
    return best


@pytest.mark.parametrize(
    ("fn", "published"), [(attack.ddn, published_ddn), (attack.fmn, published_fmn)]
)
def test_r_is_no_longer_than_that_of_the_published_algorithm(fn, published):
    params, x, y = boxed_problem()
    r = fn(curved, as_float32(params), as_float32(x), y, bounds=BOX)
    ours = lengths(r, "l2")
    theirs = np.array([np.linalg.norm(published(params, *row)) for row in zip(x, y, strict=True)])
    moved = x + np.asarray(r, np.float64)
    assert (np.argmax(np.tanh(moved @ params[0]) @ params[1], axis=1) != y).all()
    # Both take the same steps; the bisection at the end makes ours smaller.
    assert np.median(ours / theirs) <= 1
    assert np.mean(ours > 1.02 * theirs) <= 0.05


def as_float32(tree):
    return jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), tree)


SEARCHES = {
    "apgd": functools.partial(attack.apgd, eps=None, steps=25, key=jax.random.key(0)),
    "targeted": functools.partial(
        attack.apgd_multitargeted, eps=None, steps=25, key=jax.random.key(0)
    ),
}
every_search = pytest.mark.parametrize("fn", SEARCHES.values(), ids=SEARCHES)


@pytest.mark.parametrize(
    ("fn", "norm"),
    [(attack.ddn, "l2"), *((fn, norm) for fn in SEARCHES.values() for norm in ORDER)],
)
def test_on_a_linear_net_the_size_is_the_distance_to_the_boundary(fn, norm):
    params, x, y = linear_problem(2, B, D, seed=1)
    options = {} if fn is attack.ddn else {"norm": norm}
    r = fn(linear, params, x, y, **options)
    assert misled(linear, params, x, y, r).all()
    size, least = lengths(r, norm), distances(params, x, y, norm).min(axis=1)
    assert (size >= least).all()
    np.testing.assert_allclose(size, least, rtol=0.02)


@pytest.mark.parametrize("fn", [attack.ddn, *SEARCHES.values()])
def test_r_is_0_where_no_attack_can_succeed_or_the_net_is_wrong_already(fn):
    def net(params, x):  # in the box, class 2 is out of reach
        lead = jnp.stack([0 * x[:, 0], x[:, 0] - 0.5, jnp.sum(x, axis=1) - 10], axis=1)
        return jnp.where(x[:, 1:2] == 0.25, jnp.array([9.0, 0.0, 0.0]), lead)

    x = np.array([[0.2, 0.4], [0.2, 0.4], [0.7, 0.25]], np.float32)
    y = np.array([0, 2, 1])
    r = np.asarray(fn(net, None, x, y, bounds=BOX))
    np.testing.assert_allclose(np.abs(r[0]), [0.3, 0], atol=0.01)
    np.testing.assert_array_equal(r[1:], 0)


def test_ddn_reaches_a_target_and_step_size_sets_the_units_of_x():
    params, x, _ = boxed_problem()
    params, x = as_float32((params, x))
    target = np.full(B, 2)
    r = np.asarray(attack.ddn(curved, params, x, target, targeted=True))
    hit = np.asarray(curved(params, x + r)).argmax(axis=1) == 2
    assert hit.mean() > 0.9
    thousand = attack.ddn(
        curved, (params[0] / 1024, params[1]), 1024 * x, target, targeted=True, step_size=1024.0
    )
    np.testing.assert_allclose(thousand / 1024, r, rtol=1e-2, atol=1e-2)


def test_ddns_first_step_fits_a_small_box():
    (w, _), *_ = linear_problem(2, B, D, seed=1)
    away = w[:, 1] - w[:, 0]
    half = 0.0005

    def net(params, x):  # class 1 begins at a distance of `half` along w
        lead = (x - 0.5) @ away - half * jnp.linalg.norm(away)
        return jnp.stack([0 * lead, lead], axis=1)

    x = np.full((1, D), 0.5, np.float32)
    r = attack.ddn(net, None, x, np.array([0]), steps=40, bounds=(0.499, 0.501))
    np.testing.assert_allclose(lengths(r, "l2"), half, rtol=0.01)


def trap(params, x):
    """Class 1's lead has a local maximum below 0 near x, and is positive from t = 2.83 on."""
    t = x[:, 0]
    lead = 4 * jnp.exp(-8 * (t - 0.6) ** 2) - 5 + jnp.maximum(t - 2, 0) * 6
    return jnp.stack([0 * t, lead], axis=1)


def test_fmn_escapes_a_local_maximum():
    x, y = np.zeros((1, 2), np.float32), np.array([0])
    r = np.asarray(attack.fmn(trap, None, x, y))
    assert int(jnp.argmax(trap(None, x + r))) == 1
    np.testing.assert_allclose(lengths(r, "l2"), 2 + 5 / 6, rtol=0.01)


@every_search
def test_a_search_counts_the_passes_of_every_ball(fn):
    _, info = attack.with_info(fn)(linear, *linear_problem(2, B, D, seed=1))
    np.testing.assert_array_equal(info.backward, 1 + 20 * 26)
    assert (info.forward > info.backward).all()
    assert info.success.all()


def test_a_search_needs_labels():
    params, x, _ = linear_problem(2, B, D, seed=1)
    with pytest.raises(TypeError, match="integer labels"):
        SEARCHES["apgd"](linear, params, x, np.full((B, 2), 0.5, np.float32))
