"""Evaluate a recorded net with stores, and be killed meanwhile; a program for `test_recorded`.

    python -m tests.stored STORE BATCH_SIZE BATCHES

After this many batches, at least 2, it kills itself at a random moment within the time that the
last one took; with 0 it doesn't. Results go to STORE/found.npz.
"""

import os
import random
import signal
import sys
import threading
import time
from functools import partial

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from experiments.lib import data, models, weights
from experiments.lib.records import RESULTS
from jaxadv import attack, evaluate

BREAKING = {"apgd": partial(attack.apgd, steps=20), "square": partial(attack.square, steps=200)}
NEAREST = {"ddn": partial(attack.ddn, steps=20), "fmn": partial(attack.fmn, steps=20)}


def main(store, batch_size, batches):
    params = weights.load(RESULTS / "mnist_mlp" / "lwa_multi" / "params.safetensors")
    net = models.function(models.recognised(params, (28, 28, 1)))
    images = data.mnist()
    x, y = data.MNIST.inputs(images.test_images[:1000]), images.test_labels[:1000]
    mesh = jax.make_mesh((len(jax.devices()),), ("data",), (AxisType.Auto,))
    x, y = jax.device_put((x, y), NamedSharding(mesh, PartitionSpec("data")))
    params = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
    times = []  # of each batch

    def progress(at):
        times.append(time.perf_counter())
        if len(times) == int(batches):
            moment = random.uniform(0, times[-1] - times[-2])
            timer = threading.Timer(moment, os.kill, (os.getpid(), signal.SIGKILL))
            timer.daemon = True
            timer.start()

    shared = {
        "norm": "l2", "key": jax.random.key(0), "bounds": (0.0, 1.0),
        "batch_size": int(batch_size), "progress": progress,
    }  # fmt: skip
    found = evaluate.attack_and_score(
        net, params, x, y, BREAKING, eps=1.5, store=f"{store}/ensemble", **shared
    )
    distances = evaluate.distances(
        net, params, x, y, attacks=NEAREST, budget=200, store=f"{store}/distances", **shared
    )
    np.savez(f"{store}/found.npz", robust=found.outcome.robust, size=distances.size, times=times)


if __name__ == "__main__":
    main(*sys.argv[1:])
