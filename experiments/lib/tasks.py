"""MNIST and the paper's nets for it, as `train_and_score` takes them."""

from __future__ import annotations

from typing import Literal

import jax.numpy as jnp

from experiments.lib import data, recipes
from experiments.lib.models import Classifier, lenet, mlp
from experiments.lib.recipes import NAMES, Method
from experiments.lib.train_and_score import Images, Settings, Task, hold_out


def mnist(settings: Settings, network: Literal["mlp", "lenet"], normal: Method) -> Task:
    """Return the data and nets of a table.

    Args:
      settings: which images are trained on and scored, and which nets there are.
      network: what kind of net.
      normal: how the net is made that the Fixed set comes from.
    """

    def make_net(method: Method) -> Classifier:
        build = mlp if network == "mlp" else lenet
        return build(method.widths, dropout=method.dropout, **recipes.split_of(method))

    def called(method: Method) -> str:
        widths = "x".join(map(str, method.widths))
        return widths if network == "mlp" else f"conv20-conv50-{widths}"

    images = data.mnist()
    train = images.train_images, images.train_labels
    test = images.test_images, images.test_labels
    if settings.holdout:
        kept, held = hold_out(settings, len(train[1]))
        train, test = (train[0][kept], train[1][kept]), (train[0][held], train[1][held])
    train_x, test_x = (data.MNIST.inputs(x) for x in (train[0], test[0][: settings.n_eval]))
    return Task(
        experiment=f"mnist_{network}",
        methods=settings.nets(),
        normal=normal,
        names=NAMES,
        make_net=make_net,
        network=called,
        train=Images(jnp.asarray(train_x), jnp.asarray(train[1])),
        test=Images(jnp.asarray(test_x), jnp.asarray(test[1][: settings.n_eval])),
        source="the original files, through tensorflow-datasets",
        interface=data.MNIST,
    )
