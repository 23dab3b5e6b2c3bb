"""`jaxadv.attack.fmn`; test_contract tests what all attacks have in common."""

import jax
import numpy as np
import pytest
from nets import curved, curved_problem, linear, linear_problem, misled
from references import ORDER, lengths

from jaxadv import attack

fmn = jax.jit(
    attack.fmn, static_argnums=0, static_argnames=("norm", "steps", "targeted", "step_size")
)


@pytest.mark.parametrize("norm", ORDER)
def test_fmn_reaches_the_boundary_with_most_entries_on_their_bounds(norm):
    def net(params, x):
        w, v = params
        return jax.nn.relu(x @ w) @ v

    rng = np.random.default_rng(0)
    w, v = (rng.normal(size=shape).astype(np.float32) for shape in ((30, 20), (20, 4)))
    x = rng.uniform(size=(60, 30)) * (rng.uniform(size=(60, 30)) < 0.3)
    x = x.astype(np.float32)
    y = np.asarray(net((w, v), x)).argmax(axis=1)
    r = np.asarray(fmn(net, (w, v), x, y, norm=norm, bounds=(0.0, 1.0)))
    assert misled(net, (w, v), x, y, r).all()
    assert ((x + r >= 0) & (x + r <= 1)).all()
    assert not misled(net, (w, v), x, y, 0.99 * r).any()


def test_fmn_is_no_longer_than_deepfool_on_a_curved_net():
    params, x, y = curved_problem()
    r = fmn(curved, params, x, y, norm="l2")
    assert misled(curved, params, x, y, r).all()
    other = attack.deepfool(curved, params, x, y)
    ratio = lengths(r, "l2") / lengths(other, "l2")
    assert np.median(ratio) < 1
    assert np.quantile(ratio, 0.9) < 1.1


def test_a_targeted_r_reaches_the_class_and_is_0_where_it_wins_already():
    params, x, y = curved_problem()
    target = np.full(len(x), 2)
    r = np.asarray(fmn(curved, params, x, target, norm="l2", targeted=True))
    np.testing.assert_array_equal(r[y == 2], 0)
    hit = np.asarray(curved(params, x + r)).argmax(axis=1) == 2
    assert hit.mean() > 0.9
    np.testing.assert_array_equal(r[~hit], 0)


def test_scaling_x_and_step_size_scales_r():
    (w, b), x, y = linear_problem(2, seed=2)
    r = fmn(linear, (w, b), x, y, norm="l2")
    thousand = fmn(linear, (w / 1000, b), 1000 * x, y, norm="l2", step_size=1000.0)
    np.testing.assert_allclose(thousand, 1000 * np.asarray(r), rtol=1e-2, atol=1)


def test_r_is_no_longer_than_any_visited_point_that_misled_the_net():
    params, x, y = curved_problem()
    seen = []

    def watched(params, x):
        logits = curved(params, x)
        jax.debug.callback(lambda *visit: seen.append(visit), x, logits)
        return logits

    r = lengths(attack.fmn(watched, params, x, y, norm="l2", steps=8), "l2")
    jax.effects_barrier()
    sizes = np.array([lengths(at - x, "l2") for at, _ in seen])
    own = np.eye(4, dtype=bool)[y]
    lead = np.array([np.where(own, -np.inf, z).max(axis=1) - z[own] for _, z in seen])
    # A lead within rounding, 1e-4 of the initial one, doesn't count as a hit.
    hits = lead > 2e-4 * np.abs(lead[0]) + 1e-4
    assert hits.any(axis=0).mean() > 0.9
    assert (r <= 1.001 * np.where(hits, sizes, np.inf).min(axis=0)).all()
