"""Attacks with another norm, too large a size or outside the box, which evaluation refuses."""

import warnings
from functools import partial

import chex
import jax.numpy as jnp
import numpy as np
import pytest
from references import NORMS

from jaxadv import attack, evaluate, norms, perturb


def linear(params, x):
    return x @ params


def problem(n=7):
    """Weights of a linear net, examples in 0..1, and labels that it predicts."""
    rng = np.random.default_rng(0)
    w = rng.normal(size=(5, 3)).astype(np.float32)
    x = rng.uniform(size=(n, 5)).astype(np.float32)
    return w, x, np.argmax(x @ w, axis=1)


def outcome(attacks, **of):
    return evaluate.attack_and_score(linear, *problem(), attacks, **of).outcome


# Norms


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("method", [perturb.loss, attack.pgd])
def test_the_norm_is_given_once_to_the_attack(norm, method):
    of_norm = partial(method, norm=norm)
    found = outcome(of_norm, eps=0.5)
    np.testing.assert_allclose(found.norm, np.full(7, 0.5), rtol=1e-5)
    chex.assert_trees_all_equal(found, outcome(of_norm, eps=0.5, norm=norm))
    several = outcome({"it": of_norm}, eps=0.5)
    np.testing.assert_allclose(several.norm, np.where(found.robust, 0, 0.5), rtol=1e-5)


@pytest.mark.parametrize(
    "method", [perturb.loss, partial(attack.pgd, norm="l1"), partial(partial(attack.fab), steps=3)]
)
@pytest.mark.parametrize("several", [False, True])
def test_a_norm_that_is_not_the_attacks_is_an_error(method, several):
    # In linf, an l2 ball of that radius would never be too large, only too weak.
    attacks = {"it": method} if several else method
    with pytest.raises(ValueError, match=r"expected one norm, got .*'linf'\]; set it once"):
        outcome(attacks, eps=0.5, norm="linf")


def test_attacks_of_two_norms_are_an_error():
    two = {"pgd": attack.pgd, "fgsm": partial(perturb.loss, norm="linf")}
    with pytest.raises(ValueError, match=r"expected one norm, got \['l2', 'linf'\]"):
        outcome(two, eps=0.5)


def test_an_unknown_norm_is_an_error():
    for attacks in (None, perturb.loss, {"loss": perturb.loss}):
        with pytest.raises(ValueError, match="expected norm to be one of"):
            outcome(attacks, eps=0.5, norm="l3")


# Sizes and boxes


def far(apply_fn, params, x, y, /, *, eps, key=None, bounds=None):
    """A user's attack that ignores the size and the box."""
    return jnp.broadcast_to(jnp.array([3.0, -3.0, 3.0, -3.0, 3.0]), x.shape)


@pytest.mark.parametrize(("norm", "size"), [(None, r"6\.7"), ("l1", "15"), ("linf", "3")])
def test_an_attack_that_exceeds_its_size_is_an_error(norm, size):
    for attacks, name in ((far, "the attack"), ({"far": far}, "'far'")):
        message = rf"{norm or 'l2'} size 2 at most, got {size}.* by {name}; pass the"
        with pytest.raises(ValueError, match=message):
            outcome(attacks, eps=2.0, norm=norm)
        outcome(attacks, eps=20.0, norm=norm)


def test_the_attack_that_exceeds_an_examples_size_is_named():
    # With several attacks only the r that fools the net counts; sizes are per example.
    w, x, y = np.eye(3, dtype=np.float32), 2 * np.eye(3, dtype=np.float32)[[0, 0]], np.zeros(2, int)
    x[1] *= 9

    def push(size):
        return lambda *args, **of: jnp.broadcast_to(jnp.array([0, size, 0]), args[2].shape)

    attacks = {"weak": push(1.0), "strong": push(3.0)}
    eps = np.array([2.9, 0.1])
    with pytest.raises(ValueError, match=r"l2 size 2\.9 at most, got 3 by 'strong'"):
        evaluate.attack_and_score(linear, w, x, y, attacks, eps=eps)
    found = evaluate.attack_and_score(linear, w, x, y, attacks, eps=eps + 0.2)
    assert found.outcome.robust.tolist() == [False, True]


def test_an_attack_that_leaves_the_box_is_an_error():
    for attacks in (far, {"far": far}):
        with pytest.raises(ValueError, match=r"x \+ r within bounds, got -?\d.* where at"):
            outcome(attacks, eps=20.0, bounds=(0.0, np.array([1.0, 2.5, 1, 1, 1])))
        outcome(attacks, eps=20.0, bounds=(-4.0, 4.0))


def test_perturbations_that_are_not_finite_are_counted_and_exceed_no_size():
    def broken(apply_fn, params, x, y, /, *, eps, key=None, bounds=None):
        r = perturb.loss(apply_fn, params, x, y, eps=eps, bounds=bounds)
        return r.at[2].set(jnp.nan).at[3].set(jnp.inf)

    found = outcome(broken, eps=0.5, bounds=(0.0, 1.0))
    np.testing.assert_array_equal(found.nonfinite, np.isin(np.arange(7), [2, 3]))
    assert not found.robust[2:4].any()


def test_an_attack_after_one_that_is_not_finite_decides():
    def broken(apply_fn, params, x, y, /, *, eps, key=None, bounds=None):
        return jnp.full_like(x, jnp.nan)

    near = evaluate.NearBoundary(broken, 1 - 1e-6)
    attacks = {"broken": broken, "loss": perturb.loss, "near": near}
    found = evaluate.attack_and_score(linear, *problem(), attacks, eps=0.5)
    fooled = found.stages["loss"].fooled
    assert 0 < fooled.sum() < 7
    np.testing.assert_array_equal(found.stages["near"].tried, ~fooled)
    np.testing.assert_array_equal(found.outcome.nonfinite, ~fooled)
    np.testing.assert_array_equal(np.isfinite(found.r).all(axis=1), fooled)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_the_librarys_attacks_keep_their_size_in_every_dtype(dtype, norm):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(20, 50)), dtype)
    w = jnp.asarray(rng.normal(size=(50, 4)), dtype)
    y = np.asarray(x @ w).argmax(axis=1)
    attacks = {"loss": partial(perturb.loss, norm=norm)}
    attacks["pgd"] = partial(attack.pgd, norm=norm, steps=3)
    eps = {"l1": 4.0, "l2": 1.0, "linf": 0.2}[norm]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = evaluate.attack_and_score(linear, w, x, y, attacks, eps=eps, norm=norm)
    assert 0 < found.outcome.robust.sum() < 20
    assert (norms.norm(jnp.asarray(found.r), norm) <= eps * (1 + 1e-6)).all()
    # In a narrow dtype x + r is rounded to a point that may be farther away, which is reported.
    realised = norms.norm(jnp.float32(x + found.r) - jnp.float32(x), norm)
    over = realised > eps * (1 + max(1e-5, float(jnp.finfo(dtype).eps)))
    assert len(said) == over.any()
    assert all(f"rounded to {jnp.dtype(dtype).name}" in str(warning.message) for warning in said)
    if dtype == jnp.bfloat16 and norm == "linf":
        assert over.any()
