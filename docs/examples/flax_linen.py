"""flax.linen with dropout in training; attacks use the net without dropout."""

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

import jaxadv


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.relu(nn.Conv(8, (3, 3))(x))
        x = nn.relu(nn.Dense(32)(x.reshape(len(x), -1)))
        x = nn.Dropout(0.2, deterministic=not train)(x)
        return nn.Dense(4)(x)


net = Net()


def train_fn(params, model_state, x, key):
    return net.apply(params, x, train=True, rngs={"dropout": key}), model_state


def corners(key, n, size=8):
    """Noisy images with one bright corner; the class is the corner."""
    y = jnp.arange(n) % 4
    x = 0.3 * jax.random.uniform(key, (n, size, size, 1))
    square = jnp.zeros((4, size, size, 1))
    for k, (i, j) in enumerate([(0, 0), (0, 5), (5, 0), (5, 5)]):
        square = square.at[k, i : i + 3, j : j + 3].set(0.5)
    return x + square[y], y


def main():
    x, y = corners(jax.random.key(0), 512)
    tx = optax.adam(1e-3)
    params = net.init(jax.random.key(1), x[:1])
    lwa = jaxadv.objectives.adversarial(
        net.apply, jaxadv.perturb.loss, eps=0.5, train_fn=train_fn, bounds=(0.0, 1.0)
    )
    epoch = jaxadv.train.make_epoch(lwa, tx)
    state = jaxadv.train.init(params, tx, key=jax.random.key(2))
    for number in range(10):
        order = jax.random.permutation(jax.random.key(number), len(y)).reshape(-1, 64)
        state, info = epoch(state, (x, y), order)
    found = jaxadv.evaluate.attack_and_score(
        net.apply, state.params, x, y, eps=0.5, key=jax.random.key(2), bounds=(0.0, 1.0)
    )
    robust = jaxadv.evaluate.accuracy(found.outcome.robust)
    print(f"loss {info.loss[-1]:.3f}, robust accuracy {robust:.3f}")
    return robust


if __name__ == "__main__":
    main()
