"""`evaluate.check`: each flag on a net that is built to raise it, and none on healthy nets."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.lib import models
from jaxadv import attack, evaluate, objectives, train
from jaxadv.evaluate import _check

N, D, K = 60, 16, 3
KEY = jax.random.key(2)


@functools.cache
def data():
    """Three clouds of 4x4 images that a linear net can tell apart."""
    rng = np.random.default_rng(0)
    y = rng.integers(K, size=N)
    centres = rng.normal(size=(K, D))
    x = centres[y] + 0.3 * rng.normal(size=(N, D))
    # The linear net whose logits order the centres by distance.
    w = np.concatenate([centres.T, -0.5 * (centres**2).sum(axis=1, keepdims=True).T])
    return x.reshape(N, 4, 4, 1).astype(np.float32), y, w.astype(np.float32)


def flat(x):
    return x.reshape(x.shape[0], -1)


def linear(w, x):
    return flat(x) @ w[:-1] + w[-1][None]


KINDS = {
    name: kind
    for kind, those in {
        "invalid input": ["probabilities", "random", "interacting rows", "one answer",
                          "nothing right", "unusable examples"],
        "gradient masking": ["zero gradients", "non-finite gradients", "black box", "transfer",
                             "far"],
        "weak attack": ["one step", "budget", "minimal norm", "disagreement"],
    }.items()
    for name in those
}  # fmt: skip


def names(net, eps=3.0, **kwargs):
    x, y, w = data()
    report = evaluate.check(net, w, x, y, eps=eps, key=KEY, steps=10, **kwargs)
    for flag in report.flags:
        assert len(flag.message.split()) > 10
        assert flag.kind == KINDS[flag.name]
    return {flag.name for flag in report.flags}


def names_of(look, net, *args):
    """The flags that one part of the check raises."""
    x, _, w = data()
    found = _check.Findings()
    look(net, w, jnp.asarray(x), *args, found)
    return {flag.name for flag in found.flags}


def outputs(net):
    return names_of(_check._look_at_outputs, net, N)


def look_at_gradients(net, w, *args):
    _check._look_at_gradients(functools.partial(_check._gradient_kinds, net, w), *args)


def gradients(net):
    x, y, _ = data()
    every = np.ones(N, bool)
    return names_of(look_at_gradients, net, jnp.asarray(y), np.zeros_like(x), every, every, N)


# Healthy nets


def test_a_healthy_net_raises_no_flag_and_progress_is_logged(caplog):
    x, y, w = data()
    rng = np.random.default_rng(3)
    other = w + 0.2 * rng.normal(size=w.shape).astype(np.float32)
    of = {"eps": 3.0, "key": KEY, "steps": 10, "source": (linear, other)}
    with caplog.at_level("INFO", logger="jaxadv"):
        report = evaluate.check(linear, w, x, y, **of)
    lines = [record.getMessage() for record in caplog.records]
    for name in ("one step", "pgd", "thorough", "square", "fmn", "fab"):
        assert f"{name} on 60 examples" in lines
    assert report.flags == ()
    figures = report.figures
    assert figures["clean"] == 1
    for loss in ("ce", "margin", "dlr"):
        for kind in ("zero", "non-finite"):
            assert figures[f"{loss} {kind} gradients"] == 0
    # The size is about the median distance.
    assert 0.3 < figures["pgd"] <= figures["one step"] < 0.7
    assert figures["black box"] == figures["transfer"] == 0
    np.testing.assert_allclose(figures["fmn, median size"], figures["fab, median size"], rtol=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("kind", "eps"), [("dense", 2.0), ("convolutions", 1.4)])
def test_a_healthy_net_with_hidden_layers_raises_no_flag(kind, eps, dtype):
    x, y, _ = data()
    blocks = ((8,),) if kind == "convolutions" else ()
    net = models.Classifier(
        (32,), blocks=blocks, size=3, padding=1, classes=K, dtype=jnp.dtype(dtype)
    )
    apply_fn = models.function(net)
    tx = optax.adam(3e-3)
    step = train.make_step(objectives.natural(apply_fn), tx)
    state = train.init(models.init(net, KEY, x), tx, key=KEY)
    for _ in range(60):
        state, _ = step(state, (x, y))
    report = evaluate.check(apply_fn, state.params, x, y, eps=eps, key=KEY, steps=20)
    assert report.flags == ()
    assert report.figures["clean"] > 0.95
    assert 0.1 < report.figures["pgd"] < 1


@pytest.mark.slow
def test_a_very_confident_net_raises_no_flag_and_its_lost_gradients_are_counted():
    def confident(w, x):
        z = 1e3 * linear(w, x)
        return z + jnp.sin(z / 1e3)

    x, y, w = data()
    eps = np.full(N, 0.8, np.float32)
    report = evaluate.check(
        confident, w, x, y, eps=eps, norm="linf", key=KEY, steps=10, batch_size=40
    )
    assert report.flags == ()
    assert report.figures["ce zero gradients"] > 0.9
    assert report.figures["margin zero gradients"] == 0


def test_a_check_is_compiled_once_for_all_sizes_and_no_more_with_a_box_than_without():
    x, y, w = data()
    traced = []

    def counted():
        def net(w, x):
            traced.append(1)
            return linear(w, x)

        return net

    def traces(net, eps, bounds=None):
        traced.clear()
        evaluate.check(net, w, x, y, eps=eps, key=KEY, steps=2, bounds=bounds)
        return len(traced)

    net = counted()
    first, again, boxed = traces(net, 3.0), traces(net, 2.0), traces(counted(), 3.0, (-9.0, 9.0))
    assert first == boxed
    # Its outputs are checked without compiling, twice for the batch and once for each of eight
    # rows; what it captures is inspected once.
    assert again == 11 < first


def test_a_net_without_a_correct_prediction_is_flagged_and_not_attacked():
    x, y, w = data()
    report = evaluate.check(linear, w, x, (y + 1) % K, eps=3.0, key=KEY)
    (flag,) = report.flags
    assert (flag.name, flag.kind) == ("nothing right", "invalid input")
    assert flag.message.endswith("in training")  # readers of flags end sentences by them
    assert report.figures["clean"] == 0
    assert "pgd" not in report.figures


def test_examples_with_a_single_prediction_are_flagged():
    x, y, w = data()
    one = y == 1
    report = evaluate.check(linear, w, x[one], y[one], eps=3.0, key=KEY, steps=10)
    (flag,) = report.flags
    assert (flag.name, flag.kind) == ("one answer", "invalid input")
    assert "`far` was skipped; pass examples of several classes" in flag.message
    assert "pgd, far" not in report.figures


def test_a_weak_single_step_is_blamed_on_the_attack_and_not_on_the_net():
    """A curved net: its gradient at x is useful there and nowhere else."""
    x, y = np.full((20, 2), 0.0, np.float32), np.zeros(20, int)
    x[:, 1] = np.linspace(0, 0.1, 20)

    def curved(params, x):  # one class inside a spiral arm, which one step overshoots
        angle = 2.5 * x[:, :1] + 0.3
        z = 1.2 - x[:, :1] * jnp.sin(angle) - x[:, 1:] * jnp.cos(angle)
        return jnp.concatenate([z, -z], axis=1)

    report = evaluate.check(curved, None, x, y, eps=1.5, key=KEY, steps=20)
    flags = {flag.name: flag for flag in report.flags}
    assert flags["one step"].kind == "weak attack"
    assert "sound nets; report iterated attacks" in flags["one step"].message
    assert not [flag for flag in report.flags if flag.kind == "gradient masking"]


def small_scale(scale, x):
    u = x[:, :1]
    return scale * jnp.concatenate([0 * u, u - 1, -2 * u - 5], axis=1)


def test_logits_of_a_small_scale_that_weaken_pgd_are_flagged():
    x = 0.05 * np.random.default_rng(0).normal(size=(100, 4)).astype(np.float32)
    report = evaluate.check(small_scale, 1e-6, x, np.zeros(100, int), eps=1.5, key=KEY, steps=20)
    assert report.figures["pgd"] == 1
    assert report.figures["pgd, fmn and fab"] == 0
    assert "minimal norm" in {flag.name for flag in report.flags}
    # Square breaks all of them; but so do fmn and fab, so the gradients don't mislead.
    assert report.figures["black box"] == 0
    assert not [flag for flag in report.flags if flag.kind == "gradient masking"]


def test_in_an_infinite_box_pgd_is_pgd_without_one():
    x, y, w = data()
    box = jnp.float32(-jnp.inf), jnp.float32(jnp.inf)
    for norm in ("l1", "l2", "linf"):
        method = functools.partial(attack.pgd, norm=norm, steps=5)
        got, want = (method(linear, w, x, y, eps=2.0, bounds=b) for b in (box, None))
        np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize(
    ("some", "message"),
    [
        ({"norm": "l3"}, "norm"),
        ({"eps": np.nan}, "finite eps"),
        ({"bounds": (0.0, 1.0)}, "within bounds"),
    ],
)
def test_bad_arguments_are_refused_before_the_net_is_called(some, message):
    x, y, w = data()
    with pytest.raises(ValueError, match=message):
        evaluate.check(None, w, x, y, **({"eps": 1.0, "key": KEY} | some))


# Flags on the net's outputs and gradients


def test_probabilities_are_distinguished_from_logits():
    assert outputs(lambda w, x: jax.nn.softmax(linear(w, x))) == {"probabilities"}
    assert outputs(lambda w, x: jax.nn.log_softmax(linear(w, x))) == set()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_rounded_probabilities_are_flagged(dtype):
    # Close enough together that the largest isn't rounded to 1 and the others to 0.
    assert outputs(lambda w, x: jax.nn.softmax(linear(w, 0.2 * x).astype(dtype))) == {
        "probabilities"
    }


def test_a_check_flags_probabilities_without_a_warning():
    x, y, w = data()
    report = evaluate.check(
        lambda w, x: jax.nn.softmax(linear(w, x)), w, x, y, eps=1.0, key=KEY, steps=2
    )
    assert "probabilities" in [flag.name for flag in report.flags]


def test_one_broken_example_hides_nothing_of_the_others():
    def net(w, x):  # NaN in row 20, which isn't among those checked by themselves
        return jax.nn.softmax(linear(w, x)).at[20].set(jnp.nan)

    assert outputs(net) == {"probabilities"}
    x, _, w = data()
    want = _check._nearest_other(linear, w, x, "l2", N)
    assert np.isfinite(want).all()
    x = x.copy()
    x[20] = np.nan
    got = _check._nearest_other(linear, w, x, "l2", N)
    np.testing.assert_array_equal(np.isinf(got), np.arange(N) == 20)
    assert (np.delete(got, 20) >= np.delete(want, 20)).all()


def test_rows_that_are_nan_by_themselves_are_flagged_as_interacting():
    def alone_nan(w, x):
        return linear(w, x) * jnp.where(len(x) > 1, 1.0, jnp.nan)

    assert outputs(alone_nan) == {"interacting rows"}


def test_random_outputs_are_flagged():
    rng = np.random.default_rng(1)
    assert outputs(lambda w, x: linear(w, x) + rng.normal()) == {"random"}


def test_rows_that_depend_on_their_batch_are_flagged():
    def normalised(w, x):
        z = linear(w, x)
        return (z - z.mean(axis=0, keepdims=True)) / (z.std(axis=0, keepdims=True) + 1e-3)

    assert outputs(normalised) == {"interacting rows"}


def test_rows_that_depend_on_their_batch_by_rounding_are_not_flagged():
    def half(w, x):  # float16 rounds by up to 5e-4
        return linear(w, x) * jnp.where(len(x) > 1, 1.0, 1 + 5e-4)

    assert outputs(half) == set()


def test_masked_classes_are_not_flagged():
    assert outputs(lambda w, x: linear(w, x).at[:, 2].set(-jnp.inf)) == set()


def test_zero_gradients_are_flagged():
    assert gradients(lambda w, x: linear(w, jnp.round(4 * x) / 4)) == {"zero gradients"}
    assert gradients(linear) == set()


def test_gradients_that_vanish_where_an_attack_ended_are_flagged():
    start, labels, _ = data()

    def ledge(w, x):  # flat beyond a distance of 1
        return linear(w, jnp.clip(x, start - 1, start + 1))

    for moved, standing, want in (
        (2, True, {"zero gradients"}),
        (2, False, set()),
        (0, True, set()),
    ):
        flags = names_of(
            look_at_gradients, ledge, jnp.asarray(labels), np.full_like(start, moved),
            np.ones(N, bool), np.full(N, standing), N,
        )  # fmt: skip
        assert flags == want


def test_gradients_that_are_not_finite_are_flagged():
    def rooted(w, x):  # the derivative of the root is infinite at 0
        return linear(w, x) + jnp.sqrt(jnp.maximum(x[:, 0, 0, :] - 100, 0))

    assert gradients(rooted) == {"non-finite gradients"}


@pytest.mark.parametrize("bad", ["input", "label"])
def test_unusable_examples_are_flagged_and_not_blamed_on_the_net(bad):
    x, y, w = data()
    x, y = x.copy(), y.copy()
    if bad == "input":
        x[4] = np.nan
    else:
        y[4] = K
    report = evaluate.check(linear, w, x, y, eps=3.0, key=KEY, steps=10)
    assert {flag.name: flag.kind for flag in report.flags} == {"unusable examples": "invalid input"}
    assert report.figures["margin non-finite gradients"] == 0


# Flags on attacks


def test_attacks_without_gradients_that_do_better_are_flagged():
    _, _, w = data()

    def shattered(w, x):
        # The predictions are the linear net's; the gradients have the opposite sign.
        z = linear(w, x)
        return 2 * jax.lax.stop_gradient(z) - z

    found = names(shattered, eps=4.0, source=(linear, w))
    assert {"black box", "transfer", "far"} <= found
    assert "zero gradients" not in found


@pytest.mark.slow
def test_a_loss_with_misleading_single_gradients_is_flagged():
    """Ripples turn single gradients; many steps average them out, and more of them do better."""
    found = names(lambda w, x: linear(w, x + 0.03 * jnp.sin(130 * x)), eps=4.5)
    assert {"one step", "budget"} <= found


@pytest.mark.slow
def test_minimal_attacks_that_disagree_are_flagged():
    # Linearising a saturated net gives distances that are far too large.
    assert "disagreement" in names(lambda w, x: 3 * jnp.tanh(linear(w, x) / 3))


def test_an_empty_batch_is_refused():
    x, y, w = data()
    with pytest.raises(ValueError, match="expected at least one example, got none"):
        evaluate.check(linear, w, x[:0], y[:0], eps=1.0, key=KEY)


def test_a_tracer_and_a_missing_key_are_refused():
    x, y, w = data()
    with pytest.raises(TypeError, match=r"evaluate\.check loops over a data set on the host"):
        jax.jit(lambda x: evaluate.check(linear, w, x, y, eps=1.0, key=KEY).figures)(x)
    with pytest.raises(TypeError, match="expected a key, got 3"):
        evaluate.check(linear, w, x, y, eps=1.0, key=3)
