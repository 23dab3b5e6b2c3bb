"""`jaxadv.certify`: exact radii of linear nets, the rule under simulated draws, the noise."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from nets import linear
from scipy import stats

from jaxadv import _gaussian, attack, certify, objectives, train
from jaxadv.evaluate import _batches

KEY = jax.random.key(3)
SIGMA, ALPHA, STAGES = 0.5, 0.001, certify.STAGES


def binary_problem(n=12, size=6, seed=0):
    """A linear net of two classes, and the distances of examples to its boundary, in float64."""
    rng = np.random.default_rng(seed)
    w, b = rng.normal(size=(size, 2)).astype(np.float32), np.zeros(2, np.float32)
    normal = np.diff(w.astype(np.float64))[:, 0]
    normal /= np.linalg.norm(normal)
    x = rng.normal(size=(n, size))
    wanted = rng.permutation(np.linspace(0.02, 1.1, n)) * (-1) ** np.arange(n)
    x = (x + np.outer(wanted - x @ normal, normal)).astype(np.float32)
    exact = x.astype(np.float64) @ normal
    return (w, b), x, (exact > 0).astype(int), np.abs(exact)


def certified(params, x, y=None, **settings):
    common = {"sigma": SIGMA, "radii": (0.25,), "stages": (2000,), "key": KEY, "batch_size": 64}
    return certify.certify(linear, params, x, y, **{**common, **settings})


# Against known answers


def test_a_linear_nets_radius_is_bounded_from_below_and_nearly_reached():
    params, x, y, exact = binary_problem()
    found = certified(params, x, y, stages=(20_000,), batch_size=2000)
    sure = exact > 0.1  # nearer the boundary, the first 100 draws may choose the other class
    np.testing.assert_array_equal(found.label[sure], y[sure])
    assert np.all(found.radius[found.label == y] <= exact[found.label == y])
    # The share of y is within four standard errors of p_A, and the bound subtracts 3.1.
    p = stats.norm.cdf(exact / SIGMA)
    low = p - 7.5 * np.sqrt(p * (1 - p) / 20_000)
    assert np.all(found.radius[sure] >= SIGMA * stats.norm.ppf(low[sure]))
    assert np.all(found.radius[sure] >= exact[sure] - 0.06)
    np.testing.assert_array_equal(found.abstained, found.radius == 0)


def rule(radii=(0.5, 1.0, 1.5), alpha=ALPHA, stages=STAGES, off=0.0):
    return certify._Rule.of(SIGMA, radii, alpha, stages, off)


@pytest.mark.parametrize("n", [1, 100, 30_000])
def test_the_bound_is_clopper_and_pearsons(n):
    right = np.unique(np.linspace(0, n, 23).astype(int))
    got = certify._Rule(SIGMA, (0.5,), (n,), 0.0, (0.3,)).bound(right, 0)
    for k, low in zip(right, got, strict=True):
        want = stats.binomtest(k, n, alternative="greater").proportion_ci(1 - 0.3, "exact").low
        np.testing.assert_allclose(low, want, rtol=1e-10, atol=1e-300)


def run(rule, p, runs, seed=0):
    """Simulate the whole procedure at a known p_A; return the radii and the numbers of draws."""
    rng = np.random.default_rng(seed)
    right, lower, samples = np.zeros(runs, int), np.zeros(runs), np.zeros(runs, int)
    undecided, before = np.ones(runs, bool), 0
    for look, n in enumerate(rule.stages):
        rows = np.flatnonzero(undecided)
        right[rows] += rng.binomial(n - before, p, len(rows))
        lower[rows] = np.maximum(lower[rows], rule.bound(right[rows], look))
        undecided[rows] = ~rule.decided(lower[rows], right[rows], look, np.zeros(1))
        samples[rows], before = n, n
    return rule.radius(lower, np.zeros(1)), samples


@pytest.mark.parametrize(
    ("alpha", "radii", "tested"),
    [
        (0.001, (0.5, 1.0, 1.5), 1.5),
        (0.05, (0.5, 1.0, 1.5), 1.5),
        (0.05, (0.5, 1.0, 1.5), 0.5),
        (0.05, (1.5,), 1.5),
    ],
)
def test_false_certificates_are_at_most_alpha_over_the_whole_procedure(alpha, radii, tested):
    runs = 100_000
    # p_A is that of a radius just below the one tested.
    radius, _ = run(rule(radii, alpha), stats.norm.cdf((tested - 1e-6) / SIGMA), runs)
    wrong = np.mean(radius >= tested)
    assert wrong <= alpha + 3 * np.sqrt(alpha / runs)
    assert wrong > alpha / 20  # and not because nothing is certified


@pytest.mark.parametrize("p", [0.9984, 0.9988, 0.999, 0.9998])
def test_looks_cost_little_power_and_save_draws(p):
    runs = 20_000
    looks, samples = run(rule(), p, runs)
    fixed, _ = run(rule(stages=STAGES[-1:]), p, runs, seed=1)
    power, whole = (np.mean(radius >= 1.5) for radius in (looks, fixed))
    assert whole - 0.06 <= power <= whole + 0.02  # a fifth less alpha, and giving up early
    assert samples.mean() < {0.9984: 0.2, 0.9988: 0.65, 0.999: 0.92, 0.9998: 0.15}[p] * STAGES[-1]


def test_hopeless_examples_stop_at_the_first_look():
    right, three = np.array([0, 5000, 9000, 9990, 9997, 10_000]), rule(stages=(10_000, 100_000))
    assert three.decided(three.bound(right, 0), right, 0, np.zeros(1)).tolist() == [
        True, True, True, False, False, True,
    ]  # fmt: skip


def test_only_looks_that_can_certify_share_alpha():
    few = rule(stages=(100, 1000, 30_000), radii=(1.5,))
    assert few.share == (0.0, 0.0, ALPHA)  # 1.5 takes at least 5114 draws
    assert few.bound(np.array([100]), 0).tolist() == [0]
    assert rule(stages=(100, 1000, 30_000), radii=(0.25, 1.5)).share == (
        ALPHA / 10, ALPHA / 10, 0.8 * ALPHA,
    )  # fmt: skip
    assert rule(stages=(30_000,)).share == (ALPHA,)
    # With all of alpha, 2000 draws could certify this radius; with a fifth of it, they can't.
    assert rule(stages=(2000, 100_000), radii=(1.325,)).share == (0.0, ALPHA)


def test_a_bound_is_kept_even_if_later_draws_are_worse():
    params, x, _, _ = binary_problem(n=30)
    settings = {"radii": np.arange(0.1, 1, 0.1), "batch_size": 3000}
    settings["key"] = jax.random.key(4)  # the share of A falls between the looks for one example
    looks = certified(params, x, stages=(1000, 1050), **settings)
    first = certified(params, x, stages=(1000,), alpha=ALPHA / 5, **settings).lower
    last = certified(params, x, stages=(1050,), alpha=ALPHA * 0.8, **settings).lower
    whole = looks.samples == 1050
    np.testing.assert_allclose(looks.lower, np.where(whole, np.maximum(first, last), first))
    assert np.any(whole & (first > last))


def test_the_samplers_error_and_the_distance_to_the_grid_are_subtracted():
    right, last = np.array([99_990]), len(STAGES) - 1
    plain, off = rule().bound(right, last), rule(off=1e-4).bound(right, last)
    np.testing.assert_allclose(off, plain - 1e-4, rtol=1e-12)
    apart = rule().radius(plain, np.array([0.0])) - rule().radius(plain, np.array([0.01]))
    np.testing.assert_allclose(apart, 0.01, rtol=1e-10)
    # Also when a look decides: this count certifies 1.5 only for an image on the grid.
    size = rule().radius(rule().bound(np.array([99_904]), last), np.array([0, 0.01]))
    assert (size >= 1.5).tolist() == [True, False]
    assert rule().radius(np.array([0.5001]), np.array([0.01])).tolist() == [0]


# The noise


def law(table):
    """The probability that a table gives to each integer, in float64."""
    share = table.threshold.astype(np.float64) / 2**32
    drawn = share.copy()
    np.add.at(drawn, table.other, 1 - share)
    return drawn / len(share)


@pytest.mark.parametrize("sigma", [0.1, 0.25, 0.5, 1.0, 3.0])
def test_the_noise_is_a_gaussian_rounded_to_the_grid_up_to_the_stated_error(sigma):
    table = _gaussian.table(sigma)
    assert 2048 <= sigma / table.step < 4096
    assert np.log2(table.step) == np.floor(np.log2(table.step))
    edges = (np.arange(2**16 + 1) - 2**15 - 0.5) * table.step / sigma
    assert -edges[0] >= 8
    assert edges[-1] > 7.99
    exact = np.diff(stats.norm.cdf(-np.abs(edges))) * np.where(edges[1:] > 0, -1, 1)
    exact[2**15] = 1 - 2 * stats.norm.cdf(edges[2**15])  # the bin around 0
    tails = stats.norm.cdf(edges[0]) + stats.norm.sf(edges[-1])
    variation = (np.abs(law(table) - exact).sum() + tails) / 2
    np.testing.assert_allclose(table.off, variation, rtol=1e-3)  # float64's own error
    assert 784 * table.off < 1e-7


def test_draws_are_gaussian_and_add_to_pixels_exactly():
    step = _gaussian.table(SIGMA).step
    noise = np.asarray(_gaussian.noise(KEY, (1000, 1000), SIGMA))
    assert noise.dtype == np.float32
    places = noise.astype(np.float64) / step
    np.testing.assert_array_equal(places, np.round(places))
    z = noise.ravel().astype(np.float64) / SIGMA
    assert abs(z.mean()) < 5e-3
    assert abs(z.std() - 1) < 4e-3
    assert stats.kstest(z, "norm").pvalue > 0.001
    assert abs(np.corrcoef(z[:-1], z[1:])[0, 1]) < 5e-3
    x = (np.random.default_rng(0).integers(0, 256, (1000, 1000)) / 256).astype(np.float32)
    np.testing.assert_array_equal(x + noise, x.astype(np.float64) + noise.astype(np.float64))


def test_pixels_are_on_the_grid_and_others_are_rounded_to_it():
    x = np.array([[3 / 256, 255 / 256], [0.1, 0.7]], np.float32)
    step = _gaussian.table(SIGMA).step
    shift, exact = _gaussian.distance_to_grid(step, x)
    want = np.linalg.norm(x[1] - np.round(x[1].astype(np.float64) / step) * step)
    assert shift[0] == 0
    np.testing.assert_allclose(shift[1], want, rtol=2e-5)
    assert exact.all()


def test_counts_are_those_of_the_smoothed_net_draw_by_draw():
    params, x, _, _ = binary_problem(n=3)
    x = np.round(x * 256) / 256
    found = certified(params, x, n0=5, stages=(30,))
    net = certify.smooth(linear, SIGMA)
    keys = jax.random.split(KEY, 3)
    for row in range(3):
        draws = jax.vmap(partial(jax.random.fold_in, keys[row]))(5 + jnp.arange(30))
        logits = jax.vmap(lambda key, row=row: net(params, x[row : row + 1], key)[0])(draws)
        np.testing.assert_array_equal(
            found.counts[row], np.bincount(logits.argmax(axis=1), minlength=2)
        )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("method", [attack.pgd, attack.apgd])
def test_attacks_take_the_smoothed_net(method, dtype):
    params, x, y, exact = binary_problem()
    net = certify.smooth(linear, SIGMA)
    assert net == certify.smooth(linear, SIGMA)
    assert net != certify.smooth(linear, 0.25)
    x = jnp.asarray(x, dtype)
    assert certify.smooth(lambda params, x: x, SIGMA)(None, x, KEY).dtype == dtype
    r = method(net, params, x, y, eps=0.3, steps=5, samples=64, key=KEY, bounds=(-4.0, 4.0))

    def typed(params, x):
        assert x.dtype == dtype
        return linear(params, x)

    moved = certify.predict(typed, params, x + r, sigma=SIGMA, n=1000, key=KEY)
    clear = np.abs(exact - 0.3) > 0.1  # elsewhere noise decides which point is best
    np.testing.assert_array_equal((moved.label == y)[clear], (exact > 0.3)[clear])


def test_smooth_adv_is_adversarial_training_of_the_smoothed_net():
    params, x, y, _ = binary_problem(n=64)
    net = certify.smooth(linear, SIGMA)
    pgd = partial(attack.pgd, steps=4, samples=4)
    losses = {}
    for eps in (0.0, 0.5):
        objective = objectives.adversarial(
            net, pgd, eps=eps, train_fn=lambda params, state, x, key: (net(params, x, key), state)
        )
        tx = optax.adam(0.1)
        step = train.make_step(objective, tx)
        state = train.init((jnp.zeros((6, 2)), jnp.zeros(2)), tx, key=KEY)
        for _ in range(40):
            state, info = step(state, (x, y))
        losses[eps] = info.loss
    (w, _), normal = state.params, np.diff(params[0])[:, 0]
    learned = np.asarray(w[:, 1] - w[:, 0])
    cosine = learned @ normal / np.linalg.norm(learned) / np.linalg.norm(normal)
    assert cosine > 0.9
    assert losses[0.5] > losses[0.0] + 0.05


# Batches, dtypes, devices and interruptions


def test_counts_do_not_depend_on_batches_or_on_the_place_in_one():
    params, x, _, _ = binary_problem()
    keys = jax.random.split(KEY, len(x))
    settings = {"n0": 10, "stages": (100, 1000)}
    found = certified(params, x, key=keys, **settings)
    order = np.random.default_rng(1).permutation(len(x))
    for batch_size, rows in ((5, np.arange(len(x))), (4000, order), (64, order[:1])):
        again = certified(params, x[rows], key=keys[rows], batch_size=batch_size, **settings)
        for one, other in zip(found, again, strict=True):
            np.testing.assert_array_equal(one[rows], other)


def test_float64_examples_give_the_same_counts(x64):
    params, x, _, _ = binary_problem()
    wide = certified(params, x.astype(np.float64)).counts
    narrow = certified(params, x).counts
    np.testing.assert_array_equal(wide, narrow)


ON_DEVICES = """
import json, sys
sys.path.insert(0, {tests!r})
import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from test_certify import binary_problem, certified
params, x, _, _ = binary_problem()
print(jax.device_count())
for kind in AxisType.Auto, AxisType.Explicit:
    mesh = jax.make_mesh((8,), ("rows",), axis_types=(kind,))
    some = jax.device_put(x[:8], NamedSharding(mesh, P("rows")))
    print(json.dumps(certified(params, some).counts.tolist()))
"""


def test_eight_devices_count_as_one_does():
    tests = Path(__file__).parent
    own = {"JAX_NUM_CPU_DEVICES": "8", "JAX_PLATFORMS": "cpu"}
    own["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # as in this process; see conftest
    done = subprocess.run(
        [sys.executable, "-c", ON_DEVICES.format(tests=str(tests))],
        env={**os.environ, **own}, cwd=tests.parent, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    devices, *counts = map(json.loads, done.stdout.splitlines())
    assert devices == 8
    params, x, _, _ = binary_problem()
    want = certified(params, x[:8]).counts.tolist()
    assert counts == [want, want]


def test_looks_decide_as_all_draws_would_and_cost_less():
    params, x, _, exact = binary_problem(n=30)
    settings = {"radii": (0.3, 0.6), "batch_size": 3000}
    looks = certified(params, x, stages=(1000, 3000, 30_000), **settings)
    fixed = certified(params, x, stages=(30_000,), **settings)
    for size in settings["radii"]:
        clear = np.abs(exact - size) > 0.03
        np.testing.assert_array_equal((looks.radius >= size)[clear], (fixed.radius >= size)[clear])
    assert set(looks.samples) == {1000, 3000, 30_000}
    np.testing.assert_array_equal(looks.counts.sum(axis=1), looks.samples)
    whole = looks.samples == 30_000
    np.testing.assert_array_equal(looks.counts[whole], fixed.counts[whole])


def test_examples_of_another_class_are_not_sampled():
    params, x, y, _ = binary_problem()
    y[1] = 1 - y[1]
    found = certified(params, x, y)
    assert (found.samples[1], found.lower[1], found.radius[1], found.abstained[1]) == (0, 0, 0, 1)
    assert (np.delete(found.samples, 1) == 2000).sum() > 8


def test_an_interrupted_run_resumes_where_it_stopped(tmp_path):
    params, x, _, _ = binary_problem()
    settings = {"stages": (1000, 3000), "radii": (0.3, 0.6)}
    whole = certified(params, x, **settings)

    class Stopped(Exception):
        pass

    seen = []

    def stop(at):
        seen.append(at)
        if len(seen) == 3:  # in the first look
            raise Stopped

    with pytest.raises(Stopped):
        certified(params, x, store=tmp_path, progress=stop, **settings)
    left = []
    found = certified(params, x, store=tmp_path, progress=left.append, **settings)
    for one, other in zip(whole, found, strict=True):
        np.testing.assert_array_equal(one, other)
    assert [at.attack for at in seen] == ["draws 0 to 100"] * 2 + ["draws 100 to 1100"]
    assert (seen[2].done, seen[2].of) == (8, 12)
    assert left[0] == seen[2]._replace(done=12)
    with pytest.raises(ValueError, match=r"got other sigma; choose another folder"):
        certified(params, x, store=tmp_path, **{**settings, "sigma": 0.4})


def test_stored_draws_of_stopped_examples_are_ignored(tmp_path):
    params, x, _, _ = binary_problem()
    settings = {"stages": (1000, 3000), "radii": (0.3, 0.6), "store": tmp_path}
    whole = certified(params, x, **settings)
    stopped = np.flatnonzero(whole.samples == 1000)[-1]
    # As if its first look had been recomputed, after a damaged file, with other rounding.
    batch = {"rows": np.array([stopped]), "counts": np.array([[0, 2000]])}
    _batches.Store(tmp_path).add(2, batch)
    for one, other in zip(whole, certified(params, x, **settings), strict=True):
        np.testing.assert_array_equal(one, other)


def test_predictions_resume_too(tmp_path):
    params, x, _, _ = binary_problem()
    predict = partial(certify.predict, linear, params, sigma=SIGMA, n=1000, batch_size=64)
    whole, left = predict(x, key=KEY, store=tmp_path), []
    again = predict(x, key=KEY, store=tmp_path, progress=left.append)
    np.testing.assert_array_equal(whole.counts, again.counts)
    assert left == []
    with pytest.raises(ValueError, match=r"got other key; choose another folder"):
        predict(x, key=jax.random.key(0), store=tmp_path)


# Rows without a prediction


def test_examples_that_are_not_finite_have_no_class_and_no_certificate():
    params, x, y, _ = binary_problem()
    x[2, 0], x[5, 1] = np.nan, np.inf
    found = certified(params, x, y)
    assert np.flatnonzero(found.label < 0).tolist() == [2, 5]
    assert found.counts[[2, 5]].sum() == 0
    assert found.prediction.tolist() == [row.argmax() if row.any() else -1 for row in found.counts]
    assert found.radius[[2, 5]].tolist() == [0, 0]
    np.testing.assert_array_equal(found.counts.sum(axis=1), found.samples)
    predicted = certify.predict(linear, params, x, sigma=SIGMA, n=100, key=KEY)
    assert predicted.label[2] == -1
    assert predicted.abstained[2]


def test_an_empty_batch_gives_empty_results():
    params, x, y, _ = binary_problem()
    assert [len(part) for part in certified(params, x[:0], y[:0])] == [0] * 6
    assert len(certify.predict(linear, params, x[:0], sigma=SIGMA, key=KEY).label) == 0


def test_a_prediction_abstains_as_the_binomial_test_does():
    params, x, _, _ = binary_problem(n=20)
    found = certify.predict(linear, params, x / 10, sigma=SIGMA, n=200, alpha=0.05, key=KEY)
    p_values = [stats.binomtest(row.max(), row.sum()).pvalue for row in found.counts]
    np.testing.assert_array_equal(found.abstained, np.array(p_values) > 0.05)
    assert 0 < found.abstained.sum() < 20
    np.testing.assert_array_equal(found.label, found.counts.argmax(axis=1))


def test_a_prediction_stops_early_only_with_the_answer_of_all_draws(monkeypatch):
    params, x, _, _ = binary_problem()
    predict = partial(certify.predict, linear, params, sigma=SIGMA, n=1000, key=KEY)
    x = np.concatenate([x, x / 10, x / 30])  # answers that are clear, less clear, and not
    early = predict(x)
    monkeypatch.setattr(certify, "_LOOKS", [20])
    whole = predict(x)
    assert (whole.counts.sum(axis=1) == 1000).all()
    np.testing.assert_array_equal(early.label, whole.label)
    np.testing.assert_array_equal(early.abstained, whole.abstained)
    drawn = early.counts.sum(axis=1)
    assert set(drawn) >= {600, 1000}  # 550 draws of one class aren't enough at alpha 0.001
    assert (drawn[early.abstained] == 1000).all()
    assert 0.1 < early.abstained.mean() < 0.9


# Wrong use


def batch_norm(params, x, eps=1e-5):
    x = (x - x.mean(axis=0)[None]) / (x.std(axis=0)[None] + eps)
    return linear(params, x)


@pytest.mark.parametrize("function", [certify.certify, certify.predict])
@pytest.mark.parametrize(
    ("settings", "error", "match"),
    [
        ({"sigma": 0.0}, ValueError, r"sigma > 0, got 0.0; it is the noise's"),
        ({"sigma": -1}, ValueError, r"sigma > 0, got -1"),
        ({"sigma": float("nan")}, ValueError, r"sigma > 0, got nan"),
        ({"sigma": jnp.ones(3)}, TypeError, r"sigma to be a number"),
        ({"progress": "bar"}, TypeError, r"progress to be a function, got str"),
        ({"alpha": 0}, ValueError, r"0 < alpha < 1, got 0; 0.001 is usual"),
        ({"alpha": 1.0}, ValueError, r"0 < alpha < 1, got 1.0"),
        ({"key": None}, ValueError, r"expected a key: certify\.\w+ draws random numbers"),
        ({"apply_fn": batch_norm}, ValueError, r"batch norm in training mode\? Use its stored"),
        # NaN for a single row
        ({"apply_fn": partial(batch_norm, eps=0)}, ValueError, r"difference of inf, relative"),
        ({"apply_fn": lambda p, x: (linear(p, x), 0)}, TypeError, r"got tuple; wrap it"),
        ({"x": np.full((2, 6), 1e6, np.float32)}, ValueError, r"scale the examples, or raise"),
    ],
)
def test_arguments_that_both_refuse(function, settings, error, match):
    params, x, _, _ = binary_problem()
    own = {"radii": (0.25,)} if function is certify.certify else {}
    settings = {"apply_fn": linear, "x": x, "sigma": SIGMA, "key": KEY, **own, **settings}
    with pytest.raises(error, match=match):
        function(settings.pop("apply_fn"), params, settings.pop("x"), **settings)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"norm": "linf"}, r"expected norm 'l2', got 'linf'.*radius e \* sqrt\(d\)"),
        ({"stages": (100, 100)}, r"ascending stages, got \(100, 100\)"),
        ({"stages": ()}, r"ascending stages"),
        ({"stages": (0, 1)}, r"stages >= 1"),
        ({"radii": ()}, r"positive radii"),
        ({"radii": (0.0, 1.0)}, r"positive radii"),
        ({"radii": (0.5, 1.5)}, r"radii below 1.351, the most that 2000 draws can certify"),
        ({"n0": 0}, r"n0 >= 1"),
        ({"y": np.zeros(3, int)}, r"3 labels for 12 examples"),
    ],
)
def test_arguments_that_certify_refuses(settings, match):
    params, x, _, _ = binary_problem()
    with pytest.raises(ValueError, match=match):
        certified(params, x, **settings)


def test_arguments_that_smooth_refuses():
    with pytest.raises(ValueError, match="sigma > 0"):
        certify.smooth(linear, 0)
    with pytest.raises(TypeError, match="expected apply_fn to be a function"):
        certify.smooth(None, 0.5)


def test_a_trace_is_refused():
    params, x, _, _ = binary_problem()
    with pytest.raises(TypeError, match=r"expected arrays, got a tracer: certify.predict loops"):
        jax.jit(lambda x: certify.predict(linear, params, x, sigma=SIGMA, key=KEY))(x)
    with pytest.raises(TypeError, match=r"expected arrays, got a tracer: certify.predict loops"):
        jax.vmap(lambda key: certify.predict(linear, params, x, sigma=SIGMA, key=key))(KEY[None])
