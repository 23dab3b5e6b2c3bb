"""flax.nnx: split the module once and merge it inside; all but the params is model state."""

import jax
import optax
from flax import nnx
from flax_linen import corners

import jaxadv


class Net(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(1, 8, (3, 3), rngs=rngs)
        self.hidden = nnx.Linear(512, 32, rngs=rngs)
        self.norm = nnx.BatchNorm(32, rngs=rngs)
        self.out = nnx.Linear(32, 4, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.conv(x))
        x = self.hidden(x.reshape(len(x), -1))
        return self.out(nnx.relu(self.norm(x)))


def main():
    x, y = corners(jax.random.key(0), 512)
    graph, params, statistics = nnx.split(Net(nnx.Rngs(1)), nnx.Param, ...)

    # The adversary attacks the net in evaluation mode: batch norm uses its running statistics.
    # These are the model state, which apply_fn gets together with the parameters.
    def apply_fn(params, x):
        net = nnx.merge(graph, *params, copy=True)
        net.eval()
        return net(x)

    def train_fn(params, statistics, x, key):
        net = nnx.merge(graph, params, statistics, copy=True)
        net.train()
        logits = net(x)
        return logits, nnx.split(net, nnx.Param, ...)[2]

    lwa = jaxadv.objectives.adversarial(
        apply_fn, jaxadv.perturb.loss, eps=0.5, train_fn=train_fn, bounds=(0.0, 1.0)
    )
    tx = optax.adam(1e-3)
    epoch = jaxadv.train.make_epoch(lwa, tx)
    state = jaxadv.train.init(params, tx, model_state=statistics, key=jax.random.key(2))
    for number in range(10):
        order = jax.random.permutation(jax.random.key(number), len(y)).reshape(-1, 64)
        state, info = epoch(state, (x, y), order)
    found = jaxadv.evaluate.attack_and_score(
        apply_fn, (state.params, state.model_state), x, y, jaxadv.attack.pgd,
        eps=0.5, bounds=(0.0, 1.0),
    )  # fmt: skip
    robust = jaxadv.evaluate.accuracy(found.outcome.robust)
    print(f"loss {info.loss[-1]:.3f}, accuracy under PGD {robust:.3f}")
    return robust


if __name__ == "__main__":
    main()
