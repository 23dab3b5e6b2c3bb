"""`jaxadv.attack.deepfool`; test_contract tests what all attacks have in common."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from nets import curved, curved_problem, distances, linear, linear_problem, misled
from references import ORDER, lengths

from jaxadv import attack, jacobian

deepfool = jax.jit(
    attack.deepfool, static_argnums=0, static_argnames=("norm", "steps", "overshoot", "output")
)

every_norm = pytest.mark.parametrize("norm", ORDER)


def assert_least(r, params, x, y, norm):
    want = distances(params, x, y, norm).min(axis=1)
    assert misled(linear, params, x, y, r).all()
    np.testing.assert_allclose(lengths(r, norm), want, rtol=0.01)
    assert (lengths(r, norm) >= want).all()


@every_norm
@pytest.mark.parametrize("scale", [1, 60])
def test_two_classes_are_exact_on_probabilities_at_any_confidence(norm, scale):
    (w, b), x, y = linear_problem(2, seed=2)
    params = (np.float32(scale) * w, np.float32(scale) * b)
    z = linear(params, x)
    if scale > 1:
        assert np.abs(z[:, 0] - z[:, 1]).max() > 200
    r = deepfool(linear, params, x, y, norm=norm, output="probabilities")
    assert_least(r, params, x, y, norm)


@every_norm
def test_deepfool_crosses_without_an_overshoot(norm):
    params, x, y = linear_problem(4, seed=4)
    assert_least(deepfool(linear, params, x, y, norm=norm, overshoot=0.0), params, x, y, norm)


@pytest.mark.parametrize("output", ["logits", "probabilities"])
def test_on_a_curved_net_deepfool_ends_just_past_the_boundary(output):
    params, x, y = curved_problem()
    r = np.asarray(deepfool(curved, params, x, y, norm="l2", output=output))
    hit = misled(curved, params, x, y, r)
    np.testing.assert_array_equal(hit, (r != 0).any(axis=1))  # 0 where it found none
    assert hit.mean() > 0.95
    assert misled(curved, params, x, y, np.float32(0.998) * r)[hit].mean() < 0.1


def arch(params, x):
    """Class 1 only in a thin shell, which DeepFool's overshoot jumps over."""
    t = x[:, 0]
    return jnp.stack([0 * t, params - 400 * (t - 1) ** 2 + 1e-3 * t], axis=1)


def test_if_the_overshoot_goes_too_far_the_point_before_it_counts():
    x = np.array([[0.9, 0.0]], np.float32)
    r = deepfool(arch, np.float32(0.02), x, np.array([0]), norm="l2", overshoot=2.0)
    assert int(arch(0.02, x + np.asarray(r)).argmax()) == 1


def test_with_too_few_steps_r_is_0_where_no_boundary_was_crossed():
    params, x, y = curved_problem()
    r = np.asarray(deepfool(curved, params, x, y, norm="l2", steps=1, overshoot=0.0))
    hit = misled(curved, params, x, y, r)
    np.testing.assert_array_equal(hit, (r != 0).any(axis=1))
    assert 0 < hit.sum() < len(x)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="the cache matters only on CPU")
def test_on_cpu_deepfool_backpropagates_as_many_classes_at_once_as_fit_the_cache(monkeypatch):
    rng = np.random.default_rng(0)
    params = rng.normal(size=(64, 50)).astype(np.float32), np.zeros(50, np.float32)
    x = rng.normal(size=(8, 64)).astype(np.float32)
    y = linear(params, x).argmax(axis=1)

    def compiled(cached):
        monkeypatch.setattr(jacobian, "_CACHED", cached)

        def net(params, x):  # a new function, which is compiled anew
            return linear(params, x)

        return deepfool.lower(net, params, x, y).compile()

    one, every = compiled(0), compiled(10**9)
    # All at once, the differences of 49 classes are in memory, each of x's size.
    every_bytes, one_bytes = (p.memory_analysis().temp_size_in_bytes for p in (every, one))
    assert every_bytes > 49 * x.nbytes > 3 * one_bytes
    np.testing.assert_allclose(one(params, x, y), every(params, x, y), rtol=1e-5, atol=1e-6)
    assert lengths(one(params, x, y), "l2").min() > 0


def published_deepfool(z, x, y, lo, hi, steps=50, overshoot=0.02):
    """DeepFool in l2 as its authors published it, clipped to the box after each step."""
    total, moved = np.zeros_like(x), x
    for _ in range(steps):
        logits, jac = z(moved)
        if np.argmax(logits) != y:
            break
        d, gap = jac - jac[y][None], logits[y] - logits
        length = np.linalg.norm(d, axis=1)
        distance = np.where(np.arange(len(logits)) == y, np.inf, gap / np.maximum(length, 1e-12))
        j = np.argmin(distance)
        total = total + (distance[j] + 1e-4) * d[j] / length[j]
        moved = np.clip(x + (1 + overshoot) * total, lo, hi)
    return moved - x


def test_deepfool_in_a_box_is_no_longer_than_the_published_one():
    rng = np.random.default_rng(0)
    v, w = rng.normal(size=(20, 30)), rng.normal(size=(30, 5))
    x = np.clip(rng.normal(0.5, 0.6, size=(60, 20)), 0, 1)  # a third of the entries are on a bound

    def net(params, x):
        return jnp.tanh(x @ params[0]) @ params[1]

    def z(x):
        hidden = np.tanh(x @ v)
        return hidden @ w, (v @ ((1 - hidden**2)[:, None] * w)).T

    y = np.argmax(np.tanh(x @ v) @ w, axis=1)
    params, images = (jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), a) for a in ((v, w), x))
    r = np.asarray(attack.deepfool(net, params, images, y, bounds=(0.0, 1.0)))
    want = np.array([published_deepfool(z, *row, 0, 1) for row in zip(x, y, strict=True)])
    assert (np.argmax(np.tanh((x + r) @ v) @ w, axis=1) != y).mean() == 1
    ours, theirs = (np.linalg.norm(each, axis=1) for each in (r, want))
    # Both take the same steps; the bisection at the end makes ours smaller.
    assert np.median(ours) <= np.median(theirs) * (1 + 1e-3)
    assert np.mean(ours > 1.02 * theirs) <= 0.05


def test_many_classes_on_probabilities_raise_no_warning():
    # The warning of perturb.alpha advises what deepfool has no argument for.
    w, x, y = np.eye(150, dtype=np.float32), np.eye(150, dtype=np.float32)[:2], np.arange(2)
    jax.eval_shape(
        lambda: attack.deepfool(linear, (w, w[0]), x, y, steps=2, output="probabilities")
    )
