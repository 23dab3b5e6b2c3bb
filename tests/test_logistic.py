"""`jaxadv.logistic`: Appendix A against brute force over the ball and SciPy's optimum."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import references
from references import NORMS
from scipy import optimize

from jaxadv import attack, logistic, norms, perturb

B, D = 9, 4
EPS = 0.3

every_norm = pytest.mark.parametrize("norm", NORMS)

# A float32 dot product of D terms and a softplus: a few roundings of 2^-24 each.
RTOL = 1e-6


def draw(seed=0, n=B, d=D):
    """Weights, examples and signed labels that no hyperplane through 0 separates."""
    rng = np.random.default_rng(seed)
    w, x = rng.normal(size=d), rng.normal(size=(n, d))
    return w.astype(np.float32), x.astype(np.float32), np.where(np.arange(n) % 2, 1, -1)


def loss_at(w, x, y):
    """log(1 + exp(-y w.x)) in float64."""
    w, x = np.asarray(w, np.float64), np.asarray(x, np.float64)
    return np.logaddexp(0, -y * (x @ w))


def exact(w, x, y, eps, norm):
    """The maximum over the ball in closed form, in float64."""
    w, x = np.asarray(w, np.float64), np.asarray(x, np.float64)
    return np.logaddexp(0, -y * (x @ w) + eps * references.length(w, references.DUAL[norm]))


def in_ball(norm, n, d, eps, seed=1):
    """n points of the ball, half of them on its surface."""
    rng = np.random.default_rng(seed)
    v = rng.normal(size=(n, d)) * np.exp(2 * rng.normal(size=(n, d)))
    v /= np.array([references.length(row, norm) for row in v])[:, None]
    return eps * v * np.where(np.arange(n) % 2, 1, rng.random(n))[:, None]


# The inner maximum, Proposition B


@every_norm
def test_the_loss_is_that_at_the_adversary(norm):
    w, x, y = draw()
    r = np.asarray(logistic.adversary(w, x, y, eps=EPS, norm=norm), np.float64)
    got = logistic.loss(w, x, y, eps=EPS, norm=norm)
    np.testing.assert_allclose(got, loss_at(w, x + r, y), rtol=RTOL)
    np.testing.assert_allclose(got, exact(w, x, y, EPS, norm), rtol=RTOL)


@every_norm
def test_no_point_of_the_ball_beats_the_loss(norm):
    w, x, y = draw()
    best = np.asarray(logistic.loss(w, x, y, eps=EPS, norm=norm), np.float64)
    for r in in_ball(norm, 2000, D, EPS):
        assert np.all(loss_at(w, x + r[None], y) <= best * (1 + RTOL))


@every_norm
def test_sizes_are_per_example(norm):
    w, x, y = draw()
    eps = np.arange(B, dtype=np.float32) / 4
    want = [exact(w, x[i : i + 1], y[i : i + 1], eps[i], norm)[0] for i in range(B)]
    np.testing.assert_allclose(logistic.loss(w, x, y, eps=eps, norm=norm), want, rtol=RTOL)
    r = np.asarray(logistic.adversary(w, x, y, eps=eps, norm=norm), np.float64)
    np.testing.assert_allclose(loss_at(w, x + r, y), want, rtol=RTOL)


def test_at_size_0_the_loss_is_that_of_logistic_regression():
    w, x, y = draw()
    np.testing.assert_allclose(
        logistic.loss(w, x, y, eps=0.0, norm="l2"), loss_at(w, x, y), rtol=RTOL
    )
    assert not np.any(logistic.adversary(w, x, y, eps=0.0, norm="l2"))


def test_in_bfloat16_the_loss_is_computed_in_float32():
    w, x, y = draw()
    w, x = (jnp.asarray(a, jnp.bfloat16) for a in (w, x))
    got = logistic.loss(w, x, y, eps=EPS, norm="l2")
    assert got.dtype == jnp.float32
    wide = (np.asarray(a, np.float32) for a in (w, x))
    np.testing.assert_allclose(got, exact(*wide, y, EPS, "l2"), rtol=RTOL)


@every_norm
def test_in_bfloat16_the_adversary_stays_in_the_ball(norm):
    w, x, y = draw()
    w, x = (jnp.asarray(a, jnp.bfloat16) for a in (w, x))
    eps = 0.3  # rounded to bfloat16 it is more
    r = logistic.adversary(w, x, y, eps=eps, norm=norm)
    assert r.dtype == jnp.bfloat16
    sizes = norms.norm(r.astype(jnp.float32), norm)
    np.testing.assert_array_less(sizes, eps * (1 + 1e-6))
    np.testing.assert_allclose(sizes, eps, rtol=2**-7)


def test_the_objective_is_the_mean_of_the_loss():
    w, x, y = draw()
    got = logistic.objective(w, x, y, eps=EPS, norm="l2")
    np.testing.assert_allclose(got, exact(w, x, y, EPS, "l2").mean(), rtol=RTOL)


def test_the_logits_are_those_whose_cross_entropy_is_the_logistic_loss():
    w, x, y = draw()
    z = logistic.logits(w, x)
    assert z.shape == (B, 2)
    log_p = [references.log_softmax(row)[(label + 1) // 2] for row, label in zip(z, y, strict=True)]
    np.testing.assert_allclose(-np.array(log_p), loss_at(w, x, y), rtol=RTOL)


# name: a general method, and the relative error that it may have
METHODS = {
    "loss": (perturb.loss, RTOL),
    "alpha": (perturb.alpha, RTOL),  # for two classes, its direction is that of loss
    "pgd": (partial(attack.pgd, steps=20), 1e-5),
}


@every_norm
@pytest.mark.parametrize("name", METHODS)
def test_the_general_methods_hit_the_closed_form(name, norm):
    method, tolerance = METHODS[name]
    w, x, y = draw()
    run = jax.jit(lambda w, x, y: method(logistic.logits, w, x, y, eps=EPS, norm=norm))
    r = np.asarray(run(w, x, (y + 1) // 2), np.float64)
    want = logistic.loss(w, x, y, eps=EPS, norm=norm)
    if name == "alpha":
        # It moves away from y whether x is misclassified or not, so it always raises the loss.
        assert np.any(y * (x @ w) < 0)
    np.testing.assert_allclose(loss_at(w, x + r, y), want, rtol=tolerance)


# The outer minimum


@every_norm
def test_the_objective_is_convex_along_every_segment(norm):
    _, x, y = draw()
    rng = np.random.default_rng(2)
    ends = 3 * rng.normal(size=(2, 500, D))
    ends[1, :100] = -ends[0, :100] * rng.random((100, 1))  # through the norm's kink at 0
    t = rng.random((500, 1))
    value = jax.jit(jax.vmap(partial(logistic.objective, x=x, y=y, eps=EPS, norm=norm)))
    first, second = value(jnp.float32(ends[0])), value(jnp.float32(ends[1]))
    between = value(jnp.float32(t * ends[0] + (1 - t) * ends[1]))
    chord = t[:, 0] * first + (1 - t[:, 0]) * second
    assert np.all(between <= chord * (1 + 1e-6))
    assert np.mean(between < 0.99 * chord) > 0.5  # not just a straight line


def regularisation(w):
    """R of Proposition C for x = y = 1 and c = 1/2 at each w [n], computed by the library."""
    one = jnp.ones((1, 1))

    def of_one(w):
        worst, plain = (
            logistic.loss(w[None], one, jnp.ones(1), eps=eps, norm="l2")[0] for eps in (0.5, 0.0)
        )
        return worst - plain

    return jax.jit(jax.vmap(of_one))(w)


def test_proposition_c_the_regularisation_is_the_corrected_formula():
    w = np.linspace(-6, 12, 37)
    # The paper prints exp(-w / 2), which holds only for w >= 0.
    want = np.logaddexp(0, -(w - 0.5 * np.abs(w))) - np.logaddexp(0, -w)
    np.testing.assert_allclose(regularisation(jnp.float32(w)), want, rtol=RTOL, atol=1e-7)


def test_proposition_c_the_regularisation_is_not_convex():
    start, middle, end = regularisation(jnp.array([0.0, 2.0, 12.0]))
    # For w >= 0 it rises from 0 and falls to 0 again, so it is above its chord.
    assert start == 0
    assert middle > 10 * max(start, end)
    assert middle > start + (end - start) * 2 / 12


def scipy_optimum(x, y, norm):
    """The minimal objective by a derivative-free search in float64, since the norm has kinks."""
    options = {"xatol": 1e-9, "fatol": 1e-13, "maxiter": 10_000, "maxfev": 10_000}
    best = optimize.OptimizeResult(x=np.full(D, 0.1))
    for _ in range(5):  # restarts a collapsed simplex
        best = optimize.minimize(
            lambda w: exact(w, x, y, EPS, norm).mean(),
            best.x,
            method="Nelder-Mead",
            options=options,
        )
    return best.fun, best.x


def draw_problem(seed=5):
    """Thirty noisy examples whose robust solution is finite and not 0."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(30, D)) * np.array([1.5, 1, 0.7, 0.4])
    y = np.where(x @ np.array([2.0, -1.0, 0.5, 0]) + 0.7 * rng.normal(size=30) > 0, 1, -1)
    return x.astype(np.float32), y


def test_fit_reaches_scipys_optimum_in_l2():
    x, y = draw_problem()
    least, at = scipy_optimum(x, y, "l2")
    w, values = logistic.fit(jnp.full(D, 0.1), x, y, eps=EPS, norm="l2")
    # Near its minimum, the objective in float32 is off by a few roundings.
    np.testing.assert_allclose(values[-1], least, rtol=1e-6)
    # As it is flat there, errors of 2^-24 in it allow errors of their square root in w.
    np.testing.assert_allclose(w, at, atol=2e-3)
    np.testing.assert_allclose(exact(w, x, y, EPS, "l2").mean(), least, rtol=1e-6)
    assert 0.1 < np.linalg.norm(at) < 10


@pytest.mark.parametrize("norm", ["l1", "linf"])
def test_fit_with_a_decaying_subgradient_method_reaches_scipys_optimum(norm):
    x, y = draw_problem()
    least, at = scipy_optimum(x, y, norm)
    steps = 3000
    tx = optax.sgd(optax.cosine_decay_schedule(0.5, steps))
    w, values = logistic.fit(jnp.full(D, 0.1), x, y, eps=EPS, norm=norm, tx=tx, steps=steps)
    assert values.shape == (steps,)
    np.testing.assert_allclose(values[-1], least, atol=1e-4)
    np.testing.assert_allclose(exact(w, x, y, EPS, norm).mean(), least, atol=1e-4)
    assert least < values[0] - 0.01  # there was something to learn
    assert np.any(at != 0)


def test_fit_reports_the_objective_before_each_update():
    x, y = draw_problem()
    start = jnp.full(D, 0.1)
    w, values = logistic.fit(start, x, y, eps=EPS, norm="l2", tx=optax.sgd(0.1), steps=2)
    objective = partial(logistic.objective, x=x, y=y, eps=EPS, norm="l2")
    value, grad = jax.jit(jax.value_and_grad(objective))(start)
    np.testing.assert_allclose(values, [value, objective(start - 0.1 * grad)], rtol=RTOL)
    assert objective(w) < values[1]


# Proposition D


def separable():
    """Data whose margin, from class to class, is 2 in every norm.

    y is the sign of the first entry, which is 1 away from the hyperplane x_1 = 0; the second
    entries have both signs, so no other hyperplane through 0 does better.
    """
    x = np.array([[1, 0.5], [1, -0.5], [-1, 0.5], [-1, -0.5], [2, 0]], np.float32)
    return x, np.array([1, 1, -1, -1, 1])


def margin(x, y, norm):
    """2 max over w of min_i y_i w.x_i / ||w||_*, over all directions of the plane."""
    angles = np.linspace(0, 2 * np.pi, 3601)
    w = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    sizes = np.array([references.length(row, references.DUAL[norm]) for row in w])
    return 2 * np.max(np.min(y * (w @ x.T), axis=1) / sizes)


@every_norm
def test_proposition_d_a_margin_of_less_than_2_eps_has_a_bounded_minimiser(norm):
    x, y = separable()
    assert margin(x, y, norm) == pytest.approx(2)
    tx = optax.sgd(optax.cosine_decay_schedule(1.0, 2000))
    ends = []
    for start in ([1.0, 0.5], [20.0, -10.0]):
        w, values = logistic.fit(jnp.array(start), x, y, eps=1.1, norm=norm, tx=tx, steps=2000)
        ends.append((w, values[-1]))
    (w, value), (other, other_value) = ends
    # From near and from far, it ends at the same point.
    np.testing.assert_allclose(w, other, atol=0.02)
    np.testing.assert_allclose(value, other_value, atol=1e-4)
    assert np.linalg.norm(w) < 5
    assert 0 < value <= np.log(2) + RTOL  # the loss at w = 0


@every_norm
def test_proposition_d_a_margin_of_more_than_2_eps_lets_w_grow_and_the_loss_vanish(norm):
    x, y = separable()
    # Steps of constant length, since the gradient vanishes with the loss.
    tx = optax.chain(optax.normalize_by_update_norm(), optax.sgd(0.25))
    w, sizes, values = jnp.array([0.1, 0.1]), [], []
    for _ in range(3):
        w, losses = logistic.fit(w, x, y, eps=0.5, norm=norm, tx=tx, steps=30)
        sizes.append(float(np.linalg.norm(w)))
        values.append(float(losses[-1]))
    assert np.all(np.diff(sizes) > 5)
    assert np.all(np.diff(np.log(values)) < -2)
    assert values[-1] < 1e-3


def test_fit_by_default_stays_finite_where_the_loss_vanishes():
    x, y = separable()
    w, values = logistic.fit(jnp.array([0.1, 0.1]), x, y, eps=0.5, norm="l2")
    assert np.all(np.isfinite(w))
    assert values[-1] < 1e-3


@every_norm
def test_at_w_of_0_the_gradient_is_finite(norm):
    _, x, y = draw()
    objective = partial(logistic.objective, x=x, y=y, eps=EPS, norm=norm)
    value, grad = jax.jit(jax.value_and_grad(objective))(jnp.zeros(D))
    np.testing.assert_allclose(value, np.log(2), rtol=RTOL)
    # There, 0 is a subgradient of the norm; the gradient of the plain loss is left.
    np.testing.assert_allclose(grad, -(y[:, None] * x).mean(axis=0) / 2, rtol=1e-5, atol=1e-7)
    assert not np.any(logistic.adversary(jnp.zeros(D), x, y, eps=EPS, norm=norm))


# Transformations and bad input


def test_everything_works_under_jit_with_a_traced_size():
    w, x, y = draw()
    for function in (logistic.loss, logistic.adversary, logistic.objective):
        got = jax.jit(partial(function, norm="l2"))(w, x, y, eps=EPS)
        np.testing.assert_allclose(got, function(w, x, y, eps=EPS, norm="l2"), rtol=RTOL)


FUNCTIONS = (logistic.loss, logistic.adversary, logistic.objective, logistic.fit)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_labels_0_and_1_raise_with_a_remedy(function):
    w, x, y = draw()
    with pytest.raises(ValueError, match=r"-1 and \+1.*got.*2 \* y - 1"):
        function(w, x, (y + 1) // 2, eps=EPS, norm="l2")


# name: how w [D], x [B, D] and y [B] are changed
SHAPES = {
    "w of another size": lambda w, x, y: (w[:-1], x, y),
    "y of another batch": lambda w, x, y: (w, x, y[:-1]),
    "y a column": lambda w, x, y: (w, x, y[:, None]),
    "w and x images": lambda w, x, y: (w.reshape(2, 2), x.reshape(B, 2, 2), y),
    "x one example": lambda w, x, y: (w, x[0], y[0]),
}


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("name", SHAPES)
def test_shapes_that_do_not_match_raise(name, function):
    with pytest.raises(ValueError, match=r"expected .*got"):
        function(*SHAPES[name](*draw()), eps=EPS, norm="l2")


@pytest.mark.parametrize("function", FUNCTIONS)
def test_an_unknown_norm_and_a_negative_size_raise(function):
    for wrong in ({"norm": "l3"}, {"eps": -EPS}):
        with pytest.raises(ValueError, match=r"expected (norm to be one of|a finite eps >= 0)"):
            function(*draw(), **{"eps": EPS, "norm": "l2", **wrong})


def test_no_steps_raise():
    with pytest.raises(ValueError, match="steps"):
        logistic.fit(*draw(), eps=EPS, norm="l2", steps=0)


def test_lists_are_accepted():
    r = logistic.adversary([3.0, 4.0], [[1.0, 1.0]], [1], eps=5.0, norm="l2")
    np.testing.assert_allclose(r, [[-3, -4]], rtol=1e-6)
