"""haiku: a transformed function is an apply_fn once it takes no random key."""

import haiku as hk
import jax
import optax
from flax_linen import corners

import jaxadv


@hk.without_apply_rng
@hk.transform
def net(x):
    x = jax.nn.relu(hk.Conv2D(8, 3)(x))
    return hk.nets.MLP([32, 4])(hk.Flatten()(x))


def main():
    x, y = corners(jax.random.key(0), 512)
    tx = optax.adam(1e-3)
    params = net.init(jax.random.key(1), x[:1])
    lwa = jaxadv.objectives.adversarial(net.apply, jaxadv.perturb.loss, eps=0.5, bounds=(0.0, 1.0))
    epoch = jaxadv.train.make_epoch(lwa, tx)
    state = jaxadv.train.init(params, tx, key=jax.random.key(2))
    for number in range(10):
        order = jax.random.permutation(jax.random.key(number), len(y)).reshape(-1, 64)
        state, info = epoch(state, (x, y), order)
    found = jaxadv.evaluate.attack_and_score(
        net.apply, state.params, x, y, jaxadv.attack.pgd, eps=0.5, bounds=(0.0, 1.0)
    )
    robust = jaxadv.evaluate.accuracy(found.outcome.robust)
    print(f"loss {info.loss[-1]:.3f}, accuracy under PGD {robust:.3f}")
    return robust


if __name__ == "__main__":
    main()
