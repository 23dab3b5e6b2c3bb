"""equinox: train the floating-point arrays of a module; apply_fn captures the rest."""

import equinox as eqx
import jax
import optax
from flax_linen import corners

import jaxadv


class Net(eqx.Module):
    conv: eqx.nn.Conv2d
    mlp: eqx.nn.MLP

    def __init__(self, key):
        conv_key, mlp_key = jax.random.split(key)
        self.conv = eqx.nn.Conv2d(1, 8, 3, padding=1, key=conv_key)
        self.mlp = eqx.nn.MLP(512, 4, 32, 1, key=mlp_key)

    def __call__(self, image):  # one image, channels first
        return self.mlp(jax.nn.relu(self.conv(image)).reshape(-1))


def main():
    x, y = corners(jax.random.key(0), 512)
    params, static = eqx.partition(Net(jax.random.key(1)), eqx.is_inexact_array)

    def apply_fn(params, x):
        net = eqx.combine(params, static)
        return jax.vmap(net)(x.transpose(0, 3, 1, 2))

    tx = optax.adam(1e-3)
    lwa = jaxadv.objectives.adversarial(apply_fn, jaxadv.perturb.loss, eps=0.5, bounds=(0.0, 1.0))
    epoch = jaxadv.train.make_epoch(lwa, tx)
    state = jaxadv.train.init(params, tx, key=jax.random.key(2))
    for number in range(10):
        order = jax.random.permutation(jax.random.key(number), len(y)).reshape(-1, 64)
        state, info = epoch(state, (x, y), order)
    net = eqx.combine(state.params, static)  # a module again
    assert net(x[0].transpose(2, 0, 1)).shape == (4,)
    found = jaxadv.evaluate.attack_and_score(
        apply_fn, state.params, x, y, jaxadv.attack.pgd, eps=0.5, bounds=(0.0, 1.0)
    )
    robust = jaxadv.evaluate.accuracy(found.outcome.robust)
    print(f"loss {info.loss[-1]:.3f}, accuracy under PGD {robust:.3f}")
    return robust


if __name__ == "__main__":
    main()
