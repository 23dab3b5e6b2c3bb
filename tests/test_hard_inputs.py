"""Inputs that broke this library, or others that do its job, across all methods."""

import functools
import math
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxadv import attack, evaluate, logistic, losses, norms, objectives, perturb, train

KEYS = jax.random.split(jax.random.key(0), 4)
EPS = 0.5
BOUNDED = {  # methods whose r has at most size eps, in a few steps
    "alpha": perturb.alpha,
    "loss": perturb.loss,
    "loss_sign": perturb.loss_sign,
    "vat": functools.partial(perturb.vat, key=KEYS),
    "pgd": functools.partial(attack.pgd, steps=3),
    "pgd restarts": functools.partial(attack.pgd, steps=3, restarts=2, key=KEYS),
    "apgd": functools.partial(attack.apgd, steps=3, key=KEYS),
    "apgd_multitargeted": functools.partial(
        attack.apgd_multitargeted, steps=3, n_targets=2, key=KEYS
    ),
    "fab": functools.partial(attack.fab, steps=3, n_targets=2),
    "fmn": functools.partial(attack.fmn, steps=3),
    "deepfool": functools.partial(attack.deepfool, steps=3),
    "square": functools.partial(attack.square, steps=3, key=KEYS),
}


def linear(w, x):
    return x.reshape(x.shape[0], -1) @ w


def batch(*shape, seed=0):
    """Return weights `[D, 3]`, examples of this shape and the labels that the net gives them."""
    key_w, key_x = jax.random.split(jax.random.key(seed))
    w = jax.random.normal(key_w, (math.prod(shape[1:]), 3))
    x = jax.random.normal(key_x, shape)
    return w, x, jnp.argmax(linear(w, x), axis=1)


# Gradients


def norm_at_zero(w, x):
    """A net of finite logits whose gradient is NaN at 0."""
    size = jnp.sqrt(jnp.sum(x**2, axis=(1, 2, 3)))[:, None]
    return linear(w, x) + jnp.where(jnp.arange(3) == 0, size, 0)


@pytest.mark.parametrize("norm", ["l1", "l2", "linf"])
def test_a_gradient_that_is_not_finite_is_counted(norm):
    w, x, _ = batch(4, 2, 2, 1)
    x = x.at[1].set(0)
    y = jnp.argmax(norm_at_zero(w, x), axis=1)
    method = functools.partial(perturb.loss, norm=norm)
    outcome = evaluate.attack_and_score(norm_at_zero, w, x, y, method, eps=EPS).outcome
    np.testing.assert_array_equal(outcome.zero, [False, True, False, False])
    assert not outcome.nonfinite.any()


def same_gradient(gap, constant=False, matrix=False):
    """Return a net whose top wrong class has y's gradient, and the ascent of the third class."""
    g, v = np.random.default_rng(0).normal(size=(2, 6)).astype(np.float32)
    g = 0 * g if constant else g
    shift = jnp.array([gap, 0, -gap], jnp.float32)

    def as_matrix(_, x):
        return x @ jnp.stack([g, g, v], axis=1) + shift[None]

    def as_stack(_, x):
        return jnp.stack([x @ g, x @ g, x @ v], axis=1) + shift[None]

    return as_matrix if matrix else as_stack, v - g


@pytest.mark.parametrize("gap", [20.0, 90.0, 300.0])
@pytest.mark.parametrize("kind", ["stack", "constant", "matrix"])
@pytest.mark.parametrize("method", [perturb.alpha, perturb.loss])
def test_a_third_class_is_found_behind_one_with_the_true_class_s_gradient(method, kind, gap):
    net, ascent = same_gradient(gap, constant=kind == "constant", matrix=kind == "matrix")
    x, y = 0.1 * jax.random.normal(KEYS[0], (4, 6)), jnp.zeros(4, jnp.int32)
    r = np.asarray(method(net, None, x, y, eps=EPS))
    cosine = r @ ascent / np.linalg.norm(ascent) / np.linalg.norm(r, axis=1)
    np.testing.assert_allclose(cosine, 1, atol=1e-5)  # some ulps of float32, over 6 entries
    np.testing.assert_allclose(np.linalg.norm(r, axis=1), EPS, rtol=1e-6)


@pytest.mark.parametrize("gap", [90.0, 300.0])
def test_pgd_finds_a_third_class_behind_one_with_the_true_class_s_gradient(gap):
    net, ascent = same_gradient(gap)
    x, y = 0.1 * jax.random.normal(KEYS[0], (4, 6)), jnp.zeros(4, jnp.int32)
    eps = 2.5 * gap / float(np.linalg.norm(ascent))  # beyond the boundary
    r = attack.pgd(net, None, x, y, eps=eps, steps=10)
    np.testing.assert_array_equal(jnp.argmax(net(None, x + r), axis=1), 2)


def test_two_classes_of_one_gradient_leave_no_direction():
    w = jnp.ones((5, 2))
    x, y = jax.random.normal(KEYS[0], (4, 5)), jnp.zeros(4, jnp.int32)
    for name in ("alpha", "loss", "loss_sign", "pgd"):
        np.testing.assert_array_equal(BOUNDED[name](linear, w, x, y, eps=EPS), 0)


def near_overflow(scale):
    """Return a net, its weights, examples and labels, with logits of about this size."""
    w, x, y = batch(50, 8)
    assert bool(jnp.all(jnp.isfinite(scale * linear(w, x))))
    return (lambda w, x: scale * linear(w, x)), w, x, y


@pytest.mark.parametrize("norm", ["l1", "l2", "linf"])
def test_logits_of_1e28_have_the_nearest_class(norm):
    net, w, x, y = near_overflow(1e28)
    r = np.asarray(perturb.alpha(net, w, x, y, norm=norm, eps=EPS))
    # Probabilities fall so steeply there that the second largest logit is the nearest class.
    nearest = jnp.argsort(linear(w, x), axis=1)[:, -2]
    d = w.T[nearest] - w.T[y]
    # A direction is rounded some ulps of its largest entry.
    np.testing.assert_allclose(r, EPS * norms.steepest(d, norm), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("norm", ["l1", "l2", "linf"])
@pytest.mark.parametrize("method", [perturb.alpha, perturb.loss])
def test_logits_whose_differences_overflow_have_a_direction(method, norm):
    net, w, x, y = near_overflow(4e37)
    r = method(net, w, x, y, norm=norm, eps=EPS)
    np.testing.assert_allclose(norms.norm(r, norm), EPS, rtol=1e-6)
    before, after = (
        jnp.take_along_axis(linear(w, v), y[:, None], axis=1) - linear(w, v).mean(1, keepdims=True)
        for v in (x, x + r)
    )
    assert bool(jnp.all(after < before))


@pytest.mark.parametrize("norm", ["l1", "l2", "linf"])
def test_the_least_perturbation_of_logits_near_overflow_is_infinite_and_not_nan(norm):
    net, w, x, y = near_overflow(4e37)
    least = perturb.alpha(net, w, x, y, norm=norm)
    np.testing.assert_array_equal(jnp.max(jnp.abs(least), axis=1), jnp.inf)


# Sizes


def test_a_relative_eps_of_an_input_whose_norm_overflows_is_nan_and_counted():
    w, x, y = batch(4, 2, 2, 1)
    x = x.at[2].set(3e38)
    lwa = objectives.adversarial(linear, perturb.loss, eps=objectives.Relative(0.1))
    _, (_, aux) = lwa(w, None, (x, y), key=KEYS[0], step=jnp.zeros((), jnp.int32))
    assert int(aux.nonfinite) == 1


@pytest.mark.parametrize("largest", [1e5, 1e8, 1e12, 1e30])
def test_the_l1_projection_of_huge_entries_has_size_eps(largest):
    v = jnp.array([[largest, 0.5 * largest, -0.1]])
    got = norms.project(v, 0.3, "l1")
    np.testing.assert_allclose(got, [[0.3, 0, 0]], rtol=1e-6)  # an ulp or two
    got = norms.project(jnp.full((1, 4), largest), 0.3, "l1")
    np.testing.assert_allclose(got, np.full((1, 4), 0.075), rtol=1e-6)


# Arguments


class Unhashable:
    __hash__ = None

    def __call__(self, w, x):
        return linear(w, x)


@pytest.mark.parametrize(
    "name", [n for n in BOUNDED if n not in ("alpha", "loss", "loss_sign", "vat")]
)
def test_an_unhashable_net_is_an_error_with_a_cure(name):
    w, x, y = batch(4, 2, 2, 1)
    with pytest.raises(TypeError, match=r"apply_fn to be hashable, got Unhashable.*; pass a"):
        BOUNDED[name](Unhashable(), w, x, y, eps=EPS)


@pytest.mark.parametrize("method", [attack.pgd, functools.partial(attack.apgd, key=KEYS)])
def test_a_mean_over_the_batch_is_no_loss_of_an_attack(method):
    w, x, y = batch(4, 5)

    def mean(logits, labels):
        return jnp.mean(losses.dlr(logits, labels))

    with pytest.raises(ValueError, match=r"one loss per example, \[4\], got shape \(\); leave out"):
        method(linear, w, x, y, eps=EPS, steps=2, loss_fn=mean)


def test_tokens_are_told_from_pixels():
    with pytest.raises(TypeError, match=r"got int32; cast pixels.*tokens.*embeddings as x"):
        perturb.loss(linear, jnp.ones((5, 3)), jnp.zeros((4, 5), jnp.int32), jnp.zeros(4), eps=EPS)


def test_many_classes_name_candidates():
    w, x = jnp.eye(6, 120), jax.random.normal(KEYS[0], (2, 6))
    y = jnp.zeros(2, jnp.int32)
    with pytest.warns(UserWarning, match="119 backward passes.*candidates=10"):
        r = perturb.alpha(linear, w, x, y, eps=EPS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(r, perturb.alpha(linear, w, x, y, eps=EPS, candidates=119))


# Shapes


@pytest.mark.parametrize(
    ("shape", "norm", "bounds"),
    [
        ((7,), "l2", None),
        ((7,), "linf", (-1.0, 1.0)),
        ((3, 5), "linf", None),
        ((2, 3, 2, 2), "l2", (-1.0, 1.0)),
    ],
)
def test_square_takes_vectors(shape, norm, bounds):
    w, x, _ = batch(4, *shape)
    x = jnp.clip(x, -1, 1)
    y = jnp.argmax(linear(w, x), axis=1)
    r = attack.square(linear, w, x, y, eps=3.0, norm=norm, steps=100, key=KEYS, bounds=bounds)
    assert r.shape == x.shape
    assert float(norms.norm(r, norm).max()) <= 3 * (1 + 1e-6)
    if bounds is not None:
        assert bool(jnp.all(jnp.abs(x + r) <= 1))
    reach = perturb.loss(linear, w, x, y, eps=3.0, norm=norm, bounds=bounds)
    fooled = jnp.argmax(linear(w, x + r), axis=1) != y
    # A linear net that one step misleads, random search misleads as well.
    assert bool(jnp.all(fooled >= (jnp.argmax(linear(w, x + reach), axis=1) != y)))


# Counts

COUNTS = {  # by name: who takes it
    "steps": {
        "pgd": attack.pgd,
        "pgd of the divergence": functools.partial(attack.pgd_kl, key=KEYS),
        "apgd": functools.partial(attack.apgd, key=KEYS),
        "apgd_multitargeted": functools.partial(attack.apgd_multitargeted, key=KEYS),
        "fab": attack.fab,
        "fmn": attack.fmn,
        "deepfool": attack.deepfool,
        "square": functools.partial(attack.square, key=KEYS),
        "vat": functools.partial(perturb.vat, key=KEYS),
    },
    "restarts": {"pgd": functools.partial(attack.pgd, key=KEYS)},
    "samples": {"apgd": functools.partial(attack.apgd, key=KEYS)},
    "n_targets": {"apgd_multitargeted": functools.partial(attack.apgd_multitargeted, key=KEYS)},
    "candidates": {"alpha": perturb.alpha},
    "chunk": {"alpha": perturb.alpha},
}


@pytest.mark.parametrize(
    ("count", "name"), [(count, name) for count, takers in COUNTS.items() for name in takers]
)
def test_a_count_is_an_integer(count, name):
    w, x, y = batch(4, 5)
    with pytest.raises(TypeError, match=rf"expected an integer {count}, got 2.5; "):
        COUNTS[count][name](linear, w, x, y, eps=EPS, **{count: 2.5})


@pytest.mark.parametrize("steps", [10.0, "10", True, jnp.int32(10)])
def test_what_is_like_an_integer_is_no_number_of_steps(steps):
    w, x, y = batch(4, 5)
    with pytest.raises(TypeError, match=r"expected an integer steps, got .*; one step is"):
        attack.pgd(linear, w, x, y, eps=EPS, steps=steps)


def test_an_integer_of_numpy_is_a_number_of_steps():
    w, x, y = batch(4, 5)
    assert attack.pgd(linear, w, x, y, eps=EPS, steps=np.int64(2)).shape == x.shape


# Arrays of other libraries, and of other machines


class Table:
    """A column of a data frame after a shuffle: its rows have names, by which it is indexed."""

    def __init__(self, values):
        self.values = np.asarray(values)
        self.dtype, self.shape, self.ndim = self.values.dtype, self.values.shape, 1

    def __len__(self):
        return len(self.values)

    def __array__(self, dtype=None, copy=None):
        return np.asarray(self.values, dtype)

    def __getitem__(self, names):
        return self.values[::-1][names]


def test_labels_are_taken_by_their_place_and_not_by_the_names_of_rows():
    w, x, y = batch(4, 5)
    expected = evaluate.score(linear, w, x, np.array([int(y[0]), 0, 1, 2])).clean
    got = evaluate.score(linear, w, x, Table([int(y[0]), 0, 1, 2])).clean
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("kind", [">f4", ">f8", ">f2", np.longdouble])
def test_numpy_s_other_floats_are_taken(kind):
    w, x, y = batch(4, 5)
    foreign = np.asarray(x).astype(kind)
    assert evaluate.score(linear, w, foreign, y).clean.all()
    np.testing.assert_allclose(
        perturb.loss(linear, w, foreign, y, eps=EPS),
        perturb.loss(linear, w, x, y, eps=EPS),
        rtol=1e-2,  # of a float16
        atol=1e-3,
    )


@pytest.mark.parametrize("kind", [">i2", ">i4", ">i8", np.uint64])
def test_numpy_s_other_integers_are_labels(kind):
    w, x, y = batch(4, 5)
    foreign = np.asarray(y).astype(kind)
    assert evaluate.score(linear, w, x, foreign).clean.all()
    np.testing.assert_array_equal(
        attack.pgd(linear, w, x, foreign, eps=EPS, steps=2),
        attack.pgd(linear, w, x, y, eps=EPS, steps=2),
    )


def test_a_perturbation_may_be_a_list():
    w, x, y = batch(4, 5)
    outcome = evaluate.score(linear, w, x, y, np.zeros(x.shape).tolist())
    assert outcome.robust.all()
    assert outcome.zero.all()


# Labels of the wrong kind get the cure for their kind


def test_a_column_of_labels_is_not_told_to_take_an_argmax():
    w, x, y = batch(4, 5)
    with pytest.raises(ValueError, match=r"got \(4, 1\); a column of labels becomes .* y\[:, 0\]"):
        perturb.loss(linear, w, x, y[:, None], eps=EPS)


@pytest.mark.parametrize("y", [np.ones(4, np.float32), np.ones(4, bool), list("abca")])
def test_class_numbers_of_another_dtype_are_told_to_be_cast(y):
    w, x, _ = batch(4, 5)
    with pytest.raises(TypeError, match=r"astype\(int\); names become numbers by np.unique"):
        evaluate.score(linear, w, x, y)


# What callers' functions take and return


@pytest.mark.parametrize("name", ["the attack", "attack 'mine'"])
def test_an_attack_of_another_signature_is_named_before_any_runs(name):
    w, x, y = batch(4, 5)

    def mine(apply_fn, params, x, y, eps):
        return 0 * x

    attacks = mine if name == "the attack" else {"mine": mine}
    with pytest.raises(TypeError, match=rf"expected {name} to take .*eps, key, bounds\), got"):
        evaluate.attack_and_score(linear, w, x, y, attacks, eps=EPS)


RETURNED = {
    "nothing": (lambda x: None, TypeError, "expected r, an array like x, got None"),
    "one row": (lambda x: x[:1], ValueError, r"expected r of x's shape \(4, 5\), got \(1, 5\)"),
    "integers": (lambda x: x.astype(int), TypeError, "expected r of a floating-point dtype"),
}


def as_objective(net, w, x, y, method, *, eps):
    lwa = objectives.adversarial(net, method, eps=eps)
    return lwa(w, None, (x, y), key=KEYS[0], step=0)


USERS = {
    "one attack": evaluate.attack_and_score,
    "several": lambda *args, eps: evaluate.attack_and_score(*args[:4], {"it": args[4]}, eps=eps),
    "objective": as_objective,
}


@pytest.mark.parametrize("kind", RETURNED)
@pytest.mark.parametrize("user", USERS)
def test_what_a_method_returns_is_a_perturbation(user, kind):
    w, x, y = batch(4, 5)
    make, error, message = RETURNED[kind]

    def mine(apply_fn, params, x, y, *, eps, key=None, bounds=None):
        return make(x)

    with pytest.raises(error, match=message):
        USERS[user](linear, w, x, y, mine, eps=EPS)


def note_of(call):
    with pytest.raises(TypeError) as caught:
        call()
    return "".join(caught.value.__notes__)


def test_what_a_net_raises_says_what_it_was_called_with():
    w, x, y = batch(4, 5)
    source = linear, jnp.ones((7, 3))
    note = note_of(
        lambda: evaluate.attack_and_score(linear, w, x, y, perturb.loss, eps=EPS, source=source)
    )
    assert "x of shape (4, 5) and dtype float32. If the net takes other inputs" in note


def test_a_net_that_draws_is_told_of_samples():
    w, x, y = batch(4, 5)
    note = note_of(lambda: attack.pgd(lambda w, x, key: linear(w, x), w, x, y, eps=EPS))
    assert "samples=1" in note


def test_a_net_that_does_not_draw_is_told_of_no_samples():
    w, x, y = batch(4, 5)
    note = note_of(lambda: attack.pgd(linear, w, x, y, eps=EPS, samples=2, key=KEYS))
    assert "apply_fn(params, x, key)" in note
    assert "samples=0" in note


def test_logits_in_a_dict_are_told_to_be_taken_out():
    w, x, y = batch(4, 5)
    with pytest.raises(TypeError, match=r'got dict; wrap it .*\["logits"\]'):
        perturb.loss(lambda w, x: {"logits": linear(w, x)}, w, x, y, eps=EPS)


# Training


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda x, y: {"image": x, "label": y}, r"got \['image', 'label'\]; pass a pair"),
        (lambda x, y: (x, y, y), "got tuple; pass a pair"),
        (lambda x, y: x, "got ArrayImpl; pass a pair"),
    ],
    ids=["dict", "three", "array"],
)
def test_a_batch_is_a_pair(make, message):
    w, x, y = batch(2, 5)  # an array of two rows is no pair
    with pytest.raises(TypeError, match=rf"expected a batch \(x, y\), {message}"):
        objectives.natural(linear)(w, None, make(x, y), key=KEYS[0], step=0)


def test_an_empty_batch_is_an_error_and_no_loss_of_nan():
    w, x, y = batch(4, 5)
    with pytest.raises(ValueError, match="batch of at least one example, got none"):
        objectives.natural(lambda w, x: x @ w)(w, None, (x[:0], y[:0]), key=KEYS[0], step=0)


def test_tokens_are_no_inputs_of_an_adversary():
    tokens, y = jnp.zeros((4, 5), jnp.int32), jnp.zeros(4, jnp.int32)
    lwa = objectives.adversarial(linear, perturb.loss, eps=EPS)
    with pytest.raises(TypeError, match=r"got int32; cast pixels.*embeddings as x"):
        lwa(jnp.ones((5, 3)), None, (tokens, y), key=KEYS[0], step=0)


def test_a_train_fn_without_a_state_is_told_to_return_one():
    w, x, y = batch(4, 5)
    natural = objectives.natural(linear, train_fn=lambda params, state, x, key: linear(params, x))
    with pytest.raises(TypeError, match=r"train_fn to return \(output, model_state\), got Array"):
        natural(w, None, (x, y), key=KEYS[0], step=0)


@pytest.mark.parametrize(
    ("key", "error", "message"),
    [
        (0, TypeError, "expected a key, got 0; pass jax.random.key"),
        (None, TypeError, "expected a key, got None; pass jax.random.key"),
        (KEYS, ValueError, r"expected one key, got keys of shape \(4,\)"),
    ],
    ids=["seed", "none", "several"],
)
def test_a_run_has_one_key(key, error, message):
    with pytest.raises(error, match=message):
        train.init(jnp.zeros((5, 3)), optax.sgd(0.1), key=key)


def epoch_loss(order):
    w, x, y = batch(4, 5)
    epoch = train.make_epoch(objectives.natural(linear), optax.sgd(0.1))
    state = train.init(w, optax.sgd(0.1), key=KEYS[0])
    return epoch(state, (x, y), order)[1].loss


def test_an_example_beyond_the_last_is_seen_and_is_not_the_last():
    np.testing.assert_array_equal(np.isnan(epoch_loss(jnp.array([[1, 2], [3, 4]]))), [False, True])


@pytest.mark.parametrize("order", [jnp.array([[1.0, 2.0]]), jnp.array([1, 2])])
def test_an_order_is_of_integers_for_each_step(order):
    with pytest.raises(ValueError, match=r"expected order of integers \[S, B\], got"):
        epoch_loss(order)


# Measuring, norms and bounds


def test_a_data_set_in_reversed_bounds_of_jax_is_told_to_swap_them():
    w, x, y = batch(4, 5)
    bounds = jnp.float32(9), jnp.float32(-9)
    with pytest.raises(ValueError, match=r"with lo <= hi, got .*; swap them"):
        evaluate.attack_and_score(linear, w, x, y, perturb.loss, eps=EPS, bounds=bounds)


def test_one_key_draws_a_point_for_each_example():
    x = jnp.zeros((4, 5))
    one = norms.sample(jax.random.key(1), x, EPS, "l2")
    np.testing.assert_array_equal(
        one, norms.sample(jax.random.split(jax.random.key(1), 4), x, EPS, "l2")
    )


@pytest.mark.parametrize(
    ("keys", "error"), [(KEYS[:3], ValueError), (0, TypeError)], ids=["too few", "a seed"]
)
def test_points_of_a_ball_take_a_key_each(keys, error):
    with pytest.raises(error, match=r"expected (one key or 4 keys|a key), .*; pass"):
        norms.sample(keys, jnp.zeros((4, 5)), EPS, "l2")


@pytest.mark.parametrize("function", [norms.steepest, functools.partial(norms.rescale, eps=5.0)])
def test_directions_of_lists(function):
    got = function([[3.0, 4.0]], norm="l2")
    np.testing.assert_allclose(got / jnp.max(got), [[0.75, 1.0]], rtol=1e-6)


@pytest.mark.parametrize(
    ("x", "r", "error", "message"),
    [
        (np.ones((4, 5), int), np.ones((4, 5)), TypeError, "expected x of a floating-point dtype"),
        (np.ones((4, 5)), np.ones((4, 5), int), TypeError, "expected r of a floating-point dtype"),
        (np.ones((4, 5)), np.ones((1, 5)), ValueError, r"expected r of x's shape"),
    ],
    ids=["integer x", "integer r", "one row"],
)
@pytest.mark.parametrize("bounds", [None, (-1.0, 1.0)])
def test_what_is_confined_is_a_perturbation_of_x(x, r, error, message, bounds):
    with pytest.raises(error, match=message):
        norms.clip_to_box(x, r, bounds)


def test_logistic_takes_lists():
    r = logistic.adversary([3.0, 4.0], [[1.0, 1.0]], [1], eps=5.0, norm="l2")
    np.testing.assert_allclose(r, [[-3, -4]], rtol=1e-6)


def test_integer_weights_of_logistic_are_named():
    with pytest.raises(TypeError, match=r"expected w of a floating-point dtype.*w.astype"):
        logistic.loss(jnp.array([3, 4]), jnp.ones((1, 2)), jnp.ones(1), eps=1.0, norm="l2")


# Right already


@pytest.mark.parametrize("name", ["alpha", "loss", "pgd", "fmn"])
def test_a_float32_input_of_a_float16_net_has_a_float32_perturbation(name):
    w, x, y = batch(4, 5)
    r = BOUNDED[name](lambda w, x: linear(w, x).astype(jnp.float16), w, x, y, eps=EPS)
    assert r.dtype == jnp.float32
    assert bool(jnp.all(jnp.isfinite(r)))
    assert float(norms.norm(r, "l2").max()) <= EPS * (1 + 1e-6)


@pytest.mark.parametrize("name", ["alpha", "loss", "vat", "pgd"])
def test_an_ensemble_of_parameters_is_perturbed_under_vmap(name):
    w, x, y = batch(4, 5)
    ensemble = jnp.stack([w, 2 * w, -w])
    together = jax.jit(jax.vmap(lambda w: BOUNDED[name](linear, w, x, y, eps=EPS)))(ensemble)
    one = BOUNDED[name](linear, ensemble[2], x, y, eps=EPS)
    np.testing.assert_allclose(together[2], one, rtol=1e-5, atol=1e-6)  # other programs round so
