"""orbax saves and restores the whole training state, including its key."""

import tempfile
from pathlib import Path

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
from by_hand import apply_fn, init, rings

import jaxadv


def main():
    batch = rings(jax.random.key(0), 200)
    tx = optax.adam(1e-2)
    lwa = jaxadv.objectives.adversarial(apply_fn, jaxadv.perturb.loss, eps=0.3)
    step = jaxadv.train.make_step(lwa, tx, donate=False)
    state = jaxadv.train.init(init(jax.random.key(1)), tx, key=jax.random.key(2))
    with tempfile.TemporaryDirectory() as folder, ocp.StandardCheckpointer() as checkpointer:
        path = Path(folder).absolute() / "state"
        checkpointer.save(path, state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(path, state)
    there, here = step(state, batch)[0].params, step(restored, batch)[0].params
    for a, b in zip(jax.tree.leaves(there), jax.tree.leaves(here), strict=True):
        np.testing.assert_array_equal(a, b)
    print("the restored state continues bit for bit")
    return here


if __name__ == "__main__":
    main()
