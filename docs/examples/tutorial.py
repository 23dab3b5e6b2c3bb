"""The tutorial: a plain flax training loop, and its robust version."""

# -- the net and the data
from functools import partial

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

import jaxadv
from jaxadv.attack import pgd


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (3, 3), strides=2)(x))
        x = nn.relu(nn.Dense(64)(x.reshape(len(x), -1)))
        return nn.Dense(4)(x)


def draw(key, n):
    y = jnp.arange(n) % 4
    bright = jnp.zeros((4, 10, 10, 1))
    for k, (i, j) in enumerate([(0, 0), (0, 6), (6, 0), (6, 6)]):
        bright = bright.at[k, i : i + 4, j : j + 4].set(0.3)
    return bright[y] + 0.5 * jax.random.uniform(key, (n, 10, 10, 1)), y


x, y = draw(jax.random.key(0), 2000)
x_test, y_test = draw(jax.random.key(1), 500)
net = Net()
params = net.init(jax.random.key(2), x[:1])
tx = optax.adam(1e-3)


# -- plain training
@jax.jit
def update(params, opt_state, x, y):
    def loss_fn(params):
        logits = net.apply(params, x)
        return optax.losses.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    loss, grads = jax.value_and_grad(loss_fn)(params)
    updates, opt_state = tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, loss


plain, opt_state = params, tx.init(params)
for _ in range(10):
    for i in range(0, len(x), 100):
        plain, opt_state, loss = update(plain, opt_state, x[i : i + 100], y[i : i + 100])


# -- how robust is plain training
def robust_accuracy(params, eps=0.6):
    outcome = jaxadv.evaluate.attack_and_score(
        net.apply, params, x_test, y_test, pgd, eps=eps, bounds=(0.0, 1.0)
    ).outcome
    return jaxadv.evaluate.accuracy(outcome.clean), jaxadv.evaluate.accuracy(outcome.robust)


print("plain: accuracy and robust accuracy", robust_accuracy(plain))

# -- robust training
lwa = jaxadv.objectives.adversarial(net.apply, partial(pgd, steps=5), eps=0.6, bounds=(0, 1))
update = jaxadv.train.make_step(lwa, tx)
state = jaxadv.train.init(params, tx, key=jax.random.key(3))
for _ in range(10):
    for i in range(0, len(x), 100):
        state, info = update(state, (x[i : i + 100], y[i : i + 100]))
robust = state.params

print("robust: accuracy and robust accuracy", robust_accuracy(robust))

# -- under AutoAttack
for name, params in {"plain": plain, "robust": robust}.items():
    found = jaxadv.evaluate.attack_and_score(
        net.apply, params, x_test[:100], y_test[:100],
        eps=0.6, bounds=(0.0, 1.0), key=jax.random.key(4),
    )  # fmt: skip
    low, high = jaxadv.evaluate.interval(found.outcome.robust)
    mean = jaxadv.evaluate.accuracy(found.outcome.robust)
    print(f"{name}: AutoAttack {mean:.3f} (95% interval {low:.3f} to {high:.3f})")
# -- end
