"""Arrays that a net captures: evaluation always uses their current values."""

from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from nets import ATTACKS

from jaxadv import attack, closures, evaluate, objectives, perturb

X = np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32)
Y = np.argmax(X, axis=1)
KEY = jax.random.key(0)


class Mutable:
    """A net that is correct at first, and wrong everywhere once it is turned."""

    def __init__(self):
        self.w, self.sign = jnp.eye(3), 1.0

    def turn(self):
        self.w = -self.w

    def logits(self, _, x):
        return self.sign * (x @ self.w)

    def __call__(self, _, x):
        return self.logits(_, x)


class Module(nnx.Module):
    def __init__(self):
        self.linear = nnx.Linear(3, 3, use_bias=False, rngs=nnx.Rngs(0))
        self.linear.kernel[...] = jnp.eye(3)

    def turn(self):
        self.linear.kernel[...] = -self.linear.kernel[...]

    def __call__(self, x):
        return self.linear(x)


class InPlace(Mutable):
    """NumPy weights, which change in place."""

    def __init__(self):
        self.w, self.sign = np.eye(3, dtype=np.float32), 1.0

    def turn(self):
        self.w *= -1


class Switched(Mutable):
    """The weights stay; a number that the program depends on changes, like a mode."""

    def turn(self):
        self.sign = -1.0


def nested(net):
    """A net with its weights in a loop's body, in a branch and under a custom derivative."""

    def apply_fn(_, x):
        @jax.custom_jvp
        def own(x):
            return jax.lax.map(lambda row: row @ net.w, x)

        own.defjvp(lambda primals, tangents: (own(*primals), tangents[0] @ net.w))
        return jax.lax.cond(jnp.all(x < 1e9), own, lambda x: x, x)

    return apply_fn


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_on_a_bound_method_follows_its_weights(name):
    method = partial(ATTACKS[name], eps=0.3, key=KEY)
    net = Mutable()
    for _ in range(2):
        y = jnp.argmax(net.logits(None, X), axis=1)
        want = method(lambda w, x: x @ w, net.w, X, y)
        np.testing.assert_array_equal(method(net.logits, None, X, y), want)
        net.turn()


# name: a net, and how to make the evaluated function from it
STATEFUL = {
    "a bound method": (Mutable, lambda net: net.logits),
    "an object": (Mutable, lambda net: net),
    "a closure": (Mutable, lambda net: lambda _, x: x @ net.w),
    "a partial": (Mutable, lambda net: partial(Mutable.logits, net)),
    "an nnx module in a lambda": (Module, lambda net: lambda _, x: net(x)),
    "NumPy weights changed in place": (InPlace, lambda net: net.logits),
    "a number, not an array": (Switched, lambda net: net.logits),
    "weights inside of loops": (Mutable, nested),
    "weights inside of a jit made anew": (
        Mutable,
        lambda net: lambda _, x: jax.jit(lambda x: x @ net.w)(x),
    ),
}
stateful = pytest.mark.parametrize("name", STATEFUL)


@stateful
def test_a_score_sees_weights_that_have_changed(name):
    make, function = STATEFUL[name]
    net = make()
    apply_fn = function(net)
    assert evaluate.score(apply_fn, None, X, Y).clean.all()
    net.turn()
    assert not evaluate.score(apply_fn, None, X, Y).clean.any()


def attacked(*args, **kwargs):
    return evaluate.attack_and_score(*args, **kwargs).outcome.robust


def fooling(*args):
    r = evaluate.attack_and_score(*args, perturb.loss, eps=5.0).r
    return ~evaluate.score(identity, None, X, Y, r).robust


def checked(*args):
    return np.array(evaluate.check(*args, eps=0.1, key=KEY, steps=2).figures["clean"] == 1)


DRIVERS = {
    "score": lambda *args: evaluate.score(*args, np.zeros_like(X)).robust,
    "a check": checked,
    "one attack": lambda *args: attacked(*args, attack.pgd, eps=1e-3),
    "its perturbations": fooling,
    "several attacks": lambda *args: attacked(*args, {"pgd": attack.pgd}, eps=1e-3),
    "source": lambda net, p, x, y: (
        ~attacked(identity, p, x, y, perturb.loss, eps=5.0, source=(net, p))
    ),
}


def identity(_, x):
    return x


@pytest.mark.parametrize("name", DRIVERS)
def test_every_driver_sees_weights_that_have_changed(name):
    net = Mutable()
    assert DRIVERS[name](net.logits, None, X, Y).all()
    net.turn()
    assert not DRIVERS[name](net.logits, None, X, Y).any()


def same(function, again):
    return closures.keyed(function, None, X) == closures.keyed(again, None, X)


def test_unchanged_constants_cause_no_recompilation():
    mean, table, key = jnp.ones(3), np.arange(3, dtype=np.float32), jax.random.key(3)

    def net(_, x):
        made = jnp.array([1.0, 2.0, 3.0])  # created anew in each trace
        noise = jax.random.normal(key, (3,))
        return jax.nn.relu((x - mean[None]) * table[None]) + (made + noise)[None]

    assert same(net, net)
    assert hash(closures.keyed(net, None, X)) == hash(closures.keyed(net, None, X))


def test_two_functions_differ_even_if_they_compute_the_same():
    assert not same(lambda _, x: x, lambda _, x: x)
    net = Mutable()
    assert same(net.logits, net.logits)  # two bound methods of one object are equal


def test_a_net_that_draws_is_inspected_with_a_key():
    net = Mutable()

    def noisy(params, x, key):
        return net.logits(params, x) + 0.01 * jax.random.normal(key, x.shape)

    before = closures.keyed(noisy, None, X)
    net.turn()
    assert before != closures.keyed(noisy, None, X)


def test_a_net_of_any_arguments_that_draws_is_called_with_a_key():
    def noisy(*args):
        params, x, key = args
        return x @ params + jax.random.normal(key, x[:, :1].shape)

    r = attack.pgd(noisy, jnp.eye(3), X, Y, eps=1.0, samples=2, steps=1, key=jax.random.key(0))
    assert np.isfinite(r).all()


def test_a_net_may_capture_the_tracers_of_several_traces():
    net = Mutable()

    def attacked(w, scale):
        net.w = w
        return scale * attack.pgd(net.logits, None, X, Y, eps=0.1, steps=2)

    for w in (jnp.eye(3), -jnp.eye(3)):
        want = attack.pgd(lambda w, x: x @ w, w, X, Y, eps=0.1, steps=2)
        got = jax.jit(lambda w: attacked(w, 1.0))(w)  # a new function, and so a new trace
        np.testing.assert_allclose(got, want, atol=1e-6)


# Functions that can't be keys


class Equinox(eqx.Module):
    w: jax.Array

    def __call__(self, _, x):
        return x @ self.w


@dataclass
class Attack:
    steps: int

    def __call__(self, *args, **kwargs):
        return attack.pgd(*args, steps=self.steps, **kwargs)


@pytest.mark.parametrize(
    "driver",
    [
        evaluate.score,
        partial(evaluate.attack_and_score, attacks=perturb.loss, eps=1.0),
        partial(evaluate.check, eps=1.0, key=KEY),
    ],
    ids=["score", "attack_and_score", "check"],
)
def test_a_net_without_a_hash_is_refused_with_a_remedy(driver):
    with pytest.raises(TypeError, match=r"apply_fn to be hashable, got Equinox .*eqx\.partition"):
        driver(Equinox(jnp.eye(3)), None, X, Y)


def test_an_attack_without_a_hash_is_refused():
    for attacks, name in ((Attack(3), "the attack"), ({"mine": Attack(3)}, "attack 'mine'")):
        with pytest.raises(TypeError, match=f"expected {name} to be hashable, got Attack"):
            evaluate.attack_and_score(identity, None, X, Y, attacks, eps=1.0)


def test_an_attack_with_bounds_of_its_own_is_refused():
    boxed = partial(attack.pgd, bounds=(0.0, 1.0))
    message = r"without bounds of its own, got bounds=\(0\.0, 1\.0\); leave them out"
    with pytest.raises(TypeError, match=message):
        evaluate.attack_and_score(identity, None, X, Y, boxed, eps=1.0)
    with pytest.raises(TypeError, match=message):
        objectives.adversarial(identity, boxed, eps=1.0)


def test_a_targeted_attack_is_refused_where_true_labels_are_passed():
    toward = partial(attack.pgd, targeted=True)
    message = r"lead away from y, got targeted=True; .*with_info"
    with pytest.raises(TypeError, match=message):
        evaluate.attack_and_score(identity, None, X, Y, toward, eps=1.0)
    with pytest.raises(TypeError, match=message):
        objectives.adversarial(identity, toward, eps=1.0)


@pytest.mark.parametrize("net", [None, {"w": X}, SimpleNamespace(apply=identity)])
def test_a_net_that_is_not_a_function_is_refused(net):
    with pytest.raises(TypeError, match="expected apply_fn to be a function, got"):
        evaluate.score(net, None, X, Y)


def test_parameters_that_are_not_arrays_are_named():
    params = {"w": X, "activation": jax.nn.relu}
    with pytest.raises(TypeError, match=r"params of arrays, got .* at \['activation'\]; keep it"):
        evaluate.score(lambda params, x: x, params, X, Y)


def test_a_net_is_identified_for_any_number_of_examples_and_in_the_context_of_a_mesh():
    def net(w, x):
        return jax.nn.relu(x @ w)

    w, x = jnp.eye(3), jnp.ones((5, 3))
    digest = closures.digest(net, w, x)
    assert digest
    assert digest == closures.digest(net, w, x[:1]) == closures.digest(net, 2 * w, np.asarray(x))
    with jax.set_mesh(jax.make_mesh((1,), ("data",))):
        assert closures.digest(net, w, x) == digest
    assert closures.digest(lambda w, x: -net(w, x), w, x) != digest


def by_vjp(backward):
    """A net through a step function, whose derivative is a rule of its own."""

    @jax.custom_vjp
    def step(x):
        return jnp.sign(x)

    step.defvjp(lambda x: (jnp.sign(x), x), lambda x, g: (backward(x) * g,))
    return lambda w, x: step(x) @ w


def by_jvp(forward):
    @jax.custom_jvp
    def relu(x):  # as JAX's own
        return jnp.sign(x)

    @relu.defjvp
    def rule(primals, tangents):
        (x,), (v,) = primals, tangents
        return relu(x), forward(x) * v

    return lambda w, x: jax.nn.relu(relu(x)) @ w


@pytest.mark.parametrize("of", [by_vjp, by_jvp])
def test_a_net_is_identified_by_its_own_derivative_rules_too(of):
    scale = np.ones(3, np.float32)
    net = of(lambda x: scale[None])
    before = closures.digest(net, X[:3], X)
    assert before == closures.digest(of(lambda x: scale[None]), X[:3], X)
    keyed = closures.keyed(net, X[:3], X)
    assert closures.keyed(net, X[:3], X) == keyed
    scale *= -1
    assert closures.digest(net, X[:3], X) != before
    assert closures.keyed(net, X[:3], X) != keyed
    assert closures.digest(of(jnp.ones_like), X[:3], X) != before


def test_a_net_without_a_derivative_is_identified_by_its_values():
    def net(_, x):
        rounded = jax.pure_callback(np.round, jax.ShapeDtypeStruct(x.shape, x.dtype), x)
        return jax.nn.softplus(rounded)

    assert evaluate.score(net, None, X, Y).clean.shape == (20,)


def test_in_the_context_of_a_mesh_a_call_keeps_its_arguments():
    @jax.jit
    def f(x):  # so short a name that JAX prints a call, its mesh and its argument on one line
        return x * x

    def net(swapped):
        def logits(w, x):
            more, less = x + w, x - w
            one, other = (less, more) if swapped else (more, less)
            return f(one) - 3 * f(other)

        return logits

    w, x = jnp.ones((1, 3)), jnp.ones((5, 3))
    mesh = jax.make_mesh((1,), ("a",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.set_mesh(mesh):
        assert closures.digest(net(True), w, x) != closures.digest(net(False), w, x)
