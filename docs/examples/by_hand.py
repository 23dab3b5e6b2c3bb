"""A net by hand: params is any pytree, and apply_fn any function of params and a batch."""

import jax
import jax.numpy as jnp
import optax

import jaxadv


def init(key, sizes=(3, 64, 64, 2)):
    keys = jax.random.split(key, len(sizes) - 1)
    return [
        {"w": jax.random.normal(k, (m, n)) * (2 / m) ** 0.5, "b": jnp.zeros(n)}
        for k, m, n in zip(keys, sizes, sizes[1:], strict=False)
    ]


def apply_fn(params, x):
    *hidden, last = params
    for layer in hidden:
        x = jax.nn.relu(x @ layer["w"] + layer["b"])
    return x @ last["w"] + last["b"]


def rings(key, n):
    """Points on two rings; the class is the ring. A third feature tells it too, but is small."""
    angle, noise = jax.random.uniform(key, (n,), maxval=6.28), jax.random.normal(key, (n, 2))
    y = jnp.arange(n) % 2
    ring = jnp.stack([jnp.cos(angle), jnp.sin(angle)], axis=1) * (1 + y)[:, None]
    small = 0.15 * (2 * y - 1.0)[:, None]
    return jnp.concatenate([ring + 0.1 * noise, small], axis=1), y


def main():
    x, y = rings(jax.random.key(0), 1000)
    tx = optax.adam(1e-2)
    accuracies = {}
    for name, objective in {
        "normal": jaxadv.objectives.natural(apply_fn),
        "LWA": jaxadv.objectives.adversarial(apply_fn, jaxadv.perturb.alpha, eps=0.3),
    }.items():
        step = jaxadv.train.make_step(objective, tx)
        state = jaxadv.train.init(init(jax.random.key(1)), tx, key=jax.random.key(2))
        for _ in range(300):
            state, _ = step(state, (x, y))
        found = jaxadv.evaluate.attack_and_score(
            apply_fn, state.params, x, y, eps=0.3, key=jax.random.key(3)
        )
        accuracies[name] = jaxadv.evaluate.accuracy(found.outcome.robust)
        print(f"{name}: robust accuracy {accuracies[name]:.3f}")
    return accuracies


if __name__ == "__main__":
    main()
