"""The same attacks from Foolbox, torchattacks, CleverHans and ART.

pip install -e ".[bench]"
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from experiments.compare.pytorch import fixed_net, images

PACKAGES = {
    **{name: name for name in ("torch", "foolbox", "torchattacks", "cleverhans")},
    "art": "adversarial-robustness-toolbox",
}
"""The name of each package, by the module that it is imported as."""

Task = Literal["one step", "PGD-40", "DeepFool"]
TASKS: tuple[Task, ...] = get_args(Task)
Attack = Callable[[], NDArray[np.float32]]


def installed() -> bool:
    """Return whether all of these libraries are installed."""
    return all(map(importlib.util.find_spec, PACKAGES))


def versions() -> dict[str, str]:
    """Return the versions of the libraries; empty unless all of them are installed."""
    return {name: version(name) for name in PACKAGES.values()} if installed() else {}


def attacks(
    params: Mapping[str, Any],
    x: NDArray[np.float32],
    y: NDArray[np.int32],
    *,
    eps: float | NDArray[np.float32],
    task: Task,
) -> dict[str, Attack]:
    """Return each library's attack for a task, in the l2 norm and within the box [0, 1].

    Args:
      params: parameters of the net.
      x: images `[B, H, W, C]`, between 0 and 1.
      y: labels `[B]`.
      eps: size of the perturbations, a scalar or `[B]`; DeepFool finds its own.
      task: one step along the gradient, 40 steps of `2.5 eps / 40`, or DeepFool of at most 50 steps
        to the nearest of all classes. (torchattacks' DeepFool is left out: it takes one image at a
        time.)

    Returns:
      For each library, a call that perturbs all the images at once and returns them,
      `[B, H, W, C]`.
    """
    import foolbox
    import torch
    import torchattacks
    from art.attacks import evasion as art_attacks
    from art.estimators.classification import PyTorchClassifier
    from cleverhans.torch.attacks.fast_gradient_method import fast_gradient_method
    from cleverhans.torch.attacks.projected_gradient_descent import projected_gradient_descent

    net = fixed_net(params)
    batch, labels = images(x), torch.from_numpy(y.astype(np.int64))
    size = 2.5 * eps / 40
    own = eps if np.ndim(eps) == 0 else np.reshape(eps, (-1, 1, 1, 1))  # ART broadcasts sizes
    pixels = batch.numpy()
    for_foolbox = foolbox.PyTorchModel(net, bounds=(0, 1), device="cpu")
    for_art = PyTorchClassifier(
        net,
        loss=torch.nn.CrossEntropyLoss(),
        input_shape=pixels.shape[1:],
        nb_classes=int(net.logits_bias.shape[0]),
        clip_values=(0.0, 1.0),
        device_type="cpu",
    )

    def by_foolbox(attack: Any, epsilon: Any) -> Callable[[], Any]:
        return lambda: attack(for_foolbox, batch, labels, epsilons=epsilon)[1]

    def by_art(kind: Any, **settings: Any) -> Callable[[], Any]:
        def call() -> Any:
            attack = kind(for_art, batch_size=len(pixels), **settings)
            return torch.from_numpy(attack.generate(x=pixels, y=labels.numpy()))

        return call

    calls: dict[Task, dict[str, Callable[[], Any]]] = {
        "one step": {
            "foolbox": by_foolbox(foolbox.attacks.L2FastGradientAttack(), eps),
            "torchattacks": lambda: torchattacks.PGDL2(
                net, eps=eps, alpha=eps, steps=1, random_start=False
            )(batch, labels),
            "cleverhans": lambda: fast_gradient_method(
                net, batch, eps, 2, clip_min=0.0, clip_max=1.0, y=labels
            ),
            "ART": by_art(art_attacks.FastGradientMethod, norm=2, eps=own),
        },
        "PGD-40": {
            "foolbox": by_foolbox(
                foolbox.attacks.L2PGD(abs_stepsize=size, steps=40, random_start=False), eps
            ),
            "torchattacks": lambda: torchattacks.PGDL2(
                net, eps=eps, alpha=size, steps=40, random_start=False
            )(batch, labels),
            "cleverhans": lambda: projected_gradient_descent(
                net, batch, eps, size, 40, 2, clip_min=0.0, clip_max=1.0, y=labels,
                rand_init=False, sanity_checks=False,
            ),
            "ART": by_art(
                art_attacks.ProjectedGradientDescentPyTorch, norm=2, eps=own,
                eps_step=2.5 * own / 40, max_iter=40, verbose=False,
            ),
        },
        "DeepFool": {
            "foolbox": by_foolbox(foolbox.attacks.L2DeepFoolAttack(steps=50), None),
            "ART": by_art(art_attacks.DeepFool, max_iter=50, nb_grads=10, verbose=False),
        },
    }  # fmt: skip

    def quiet(call: Callable[[], Any]) -> Attack:
        def go() -> NDArray[np.float32]:
            with contextlib.redirect_stdout(io.StringIO()):
                found = call()
            return np.moveaxis(found.detach().numpy(), 1, -1)

        return go

    return {name: quiet(call) for name, call in calls[task].items()}
