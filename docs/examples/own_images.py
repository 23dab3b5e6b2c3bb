"""Train a robust classifier on FOLDER/{train,test}/CLASS/: python own_images.py FOLDER."""

import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from PIL import Image, ImageOps

import jaxadv

EPS, EPOCHS, BATCH = 0.5, 30, 50


def images(folder):
    classes = sorted(folder.iterdir())
    files = [(path, y) for y, place in enumerate(classes) for path in sorted(place.iterdir())]
    x = [np.asarray(ImageOps.exif_transpose(Image.open(path)).convert("RGB")) for path, _ in files]
    return np.stack(x).astype(np.float32) / 255, np.int32([y for _, y in files]), len(classes)


class Net(nn.Module):
    classes: int

    @nn.compact
    def __call__(self, x):
        for features in (16, 32):
            x = nn.relu(nn.Conv(features, (3, 3), strides=2)(x))
        return nn.Dense(self.classes)(nn.relu(nn.Dense(128)(x.reshape(len(x), -1))))


def main(folder):
    *data, classes = images(folder / "train")
    x, y = map(jnp.asarray, data)
    net, key, steps = Net(classes), jax.random.key(0), len(x) // BATCH
    tx = optax.adam(optax.cosine_decay_schedule(1e-3, EPOCHS * steps))
    size = optax.linear_schedule(0, EPS, 2 * steps)  # rises from 0 over two epochs
    pgd = partial(jaxadv.attack.pgd, steps=5, random_start=True)
    lwa = jaxadv.objectives.adversarial(net.apply, pgd, eps=size, bounds=(0.0, 1.0))
    epoch = jaxadv.train.make_epoch(lwa, tx)
    state = jaxadv.train.init(net.init(key, x[:1]), tx, key=key)
    for number in range(EPOCHS):
        order = jax.random.permutation(jax.random.key(number), len(x))[: steps * BATCH]
        state, info = epoch(state, (x, y), order.reshape(steps, BATCH))
        print(f"epoch {number + 1} of {EPOCHS}: loss {info.loss.mean():.3f}")
    x, y, _ = images(folder / "test")
    found = jaxadv.evaluate.attack_and_score(
        net.apply, state.params, x, y, eps=EPS, bounds=(0.0, 1.0), key=key
    )
    clean, robust = map(jaxadv.evaluate.accuracy, (found.outcome.clean, found.outcome.robust))
    print(f"accuracy {clean:.3f}, under AutoAttack {robust:.3f}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
