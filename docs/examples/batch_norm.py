"""flax.linen with batch norm and dropout: the statistics are the model state."""

import jax
import optax
from flax import linen as nn
from flax_linen import corners

import jaxadv


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(8, (3, 3))(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
        x = nn.relu(nn.Dense(32)(x.reshape(len(x), -1)))
        return nn.Dense(4)(nn.Dropout(0.2, deterministic=not train)(x))


net = Net()


def apply_fn(variables, x):
    params, statistics = variables  # with a model state, apply_fn gets this pair
    return net.apply({"params": params, "batch_stats": statistics}, x)


def train_fn(params, statistics, x, key):
    logits, moved = net.apply(
        {"params": params, "batch_stats": statistics},
        x, train=True, rngs={"dropout": key}, mutable=["batch_stats"],
    )  # fmt: skip
    return logits, moved["batch_stats"]


def main():
    x, y = corners(jax.random.key(0), 512)
    variables = net.init(jax.random.key(1), x[:1])
    tx = optax.adam(1e-3)
    lwa = jaxadv.objectives.adversarial(
        apply_fn, jaxadv.perturb.loss, eps=0.5, train_fn=train_fn, bounds=(0.0, 1.0)
    )
    step = jaxadv.train.make_step(lwa, tx)
    state = jaxadv.train.init(
        variables["params"], tx, key=jax.random.key(2), model_state=variables["batch_stats"]
    )
    for number in range(80):
        rows = jax.random.choice(jax.random.key(number), len(y), (64,), replace=False)
        state, info = step(state, (x[rows], y[rows]))
    found = jaxadv.evaluate.attack_and_score(
        apply_fn, (state.params, state.model_state), x, y, jaxadv.attack.pgd,
        eps=0.5, bounds=(0.0, 1.0),
    )  # fmt: skip
    robust = jaxadv.evaluate.accuracy(found.outcome.robust)
    print(f"loss {info.loss:.3f}, accuracy under PGD {robust:.3f}")


if __name__ == "__main__":
    main()
