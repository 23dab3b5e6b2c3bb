"""MNIST and the paper's nets for it, as a task for `train_and_score`."""

from __future__ import annotations

from typing import Literal

import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from experiments.lib import data, recipes
from experiments.lib.models import Classifier, describe, lenet, mlp
from experiments.lib.recipes import NAMES, Method
from experiments.lib.train_and_score import Images, Settings, Task, parts


def mnist(
    settings: Settings,
    network: Literal["mlp", "lenet"],
    normal: Method,
    images: data.Dataset | None = None,
) -> Task:
    """Return the data and nets of a table.

    Args:
      settings: chooses the images to train on and to score, and the nets.
      network: kind of net.
      normal: how to train the net that the Fixed set is made on.
      images: the data; None for `data.mnist()`.
    """

    def make_net(method: Method) -> Classifier:
        build = mlp if network == "mlp" else lenet
        return build(method.widths, dropout=method.dropout, **recipes.split_of(method))

    def scaled(pixels: NDArray[np.uint8], labels: NDArray[np.int32]) -> Images:
        return Images(jnp.asarray(data.MNIST.inputs(pixels)), jnp.asarray(labels))

    train, test = parts(settings.holdout, images or data.mnist())
    n = settings.n_eval
    return Task(
        experiment=f"mnist_{network}",
        methods=settings.nets(),
        normal=normal,
        names=NAMES,
        make_net=make_net,
        network=lambda method: describe(make_net(method)),
        train=scaled(*train),
        test=scaled(test[0][:n], test[1][:n]),
        source="the original files, through tensorflow-datasets",
        interface=data.MNIST,
    )
