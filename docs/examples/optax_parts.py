"""optax in one step: clipping, a schedule, gradient accumulation and averaged weights."""

import jax
import jax.numpy as jnp
import optax
from by_hand import apply_fn, init, rings

import jaxadv


def main():
    x, y = rings(jax.random.key(0), 1000)
    tx = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(optax.cosine_decay_schedule(1e-2, 150)),
    )
    tx = optax.MultiSteps(tx, every_k_schedule=2).gradient_transformation()
    # The perturbation size may follow a schedule, too.
    eps = optax.linear_schedule(0.0, 0.3, 100)
    lwa = jaxadv.objectives.adversarial(apply_fn, jaxadv.perturb.loss, eps=eps)
    step = jaxadv.train.make_step(lwa, tx)
    state = jaxadv.train.init(init(jax.random.key(1)), tx, key=jax.random.key(2))
    ema = optax.ema(0.95)
    ema_state, average_of = ema.init(state.params), jax.jit(ema.update)
    for number in range(300):
        state, info = step(state, (x[number % 2 :: 2], y[number % 2 :: 2]))
        average, ema_state = average_of(state.params, ema_state)
    found = jaxadv.evaluate.attack_and_score(apply_fn, average, x, y, jaxadv.attack.pgd, eps=0.3)
    robust = jaxadv.evaluate.accuracy(found.outcome.robust)
    print(f"eps {info.aux.eps:.2f}, accuracy of the averaged weights under PGD {robust:.3f}")
    assert jnp.isclose(info.aux.eps, 0.3)
    return robust


if __name__ == "__main__":
    main()
