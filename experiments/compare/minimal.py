"""Minimal-norm attacks from adversarial-library and Foolbox, within a budget of passes.

pip install -e ".[bench]" torchvision visdom
pip install --no-deps \
    "git+https://github.com/jeromerony/adversarial-library@9dec220e418e2da8e799f682822209277ab8c31d"
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from experiments.compare.pytorch import fixed_net, images

ORDER = {"l2": 2.0, "linf": float("inf")}
FIRST_EPS = {"l2": 1.0, "linf": 1 / 255}
"""Size of the first ball of APGD's search, as in AttackBench."""
ROUNDS = 20
"""How many balls the search tries."""


class Found(NamedTuple):
    """The smallest perturbations that an attack found.

    Attributes:
      size: their sizes `[n]`, inf where none was found within the budget.
      forward: mean number of forward passes per image.
      backward: mean number of backward passes per image.
    """

    size: NDArray[np.float64]
    forward: float
    backward: float


def run(
    attack: Callable[[Any, Any, Any], Any],
    params: Mapping[str, Any],
    x: NDArray[np.float32],
    y: NDArray[Any],
    norm: str,
    budget: int,
    low: float = 0,
) -> Found:
    """Run an attack until its budget is spent, as AttackBench does.

    The nearest adversarial point that the attack evaluated counts, whether the attack returns it or
    not. Once the budget is spent the net returns zeros.

    Args:
      attack: one of `attacks`.
      params: parameters of the net.
      x: images `[n, H, W, C]`, between `low` and `low + 1`.
      y: labels `[n]`.
      norm: l2 or linf.
      budget: forward plus backward passes per image.
      low: lower bound of the pixels; the attack is given `x - low`.
    """
    import torch
    from torch import nn

    inner, clean, labels = fixed_net(params), images(x - low), torch.from_numpy(y.astype(np.int64))

    class Watched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.forwards = torch.zeros(len(x), dtype=torch.int64)
            self.backwards = torch.zeros(len(x), dtype=torch.int64)
            with torch.no_grad():
                wrong = inner(clean + low).argmax(1) != labels
            self.least = torch.where(wrong, 0.0, float("inf")).double()

        def forward(self, points: Any) -> Any:
            logits = inner(points + low)
            with torch.no_grad():
                which = torch.arange(len(clean))
                if len(points) != len(clean):  # a subset: match each point to its nearest image
                    which = torch.cdist(points.flatten(1), clean.flatten(1)).argmin(1)
                paid = (self.forwards + self.backwards)[which] < budget
                self.forwards.index_add_(0, which, paid.long())
                size = (points - clean[which]).flatten(1).double().norm(p=ORDER[norm], dim=1)
                size[~paid | (logits.argmax(1) == labels[which])] = float("inf")
                self.least.index_reduce_(0, which, size, "amin")
            if logits.requires_grad:
                logits.register_hook(lambda _: self.count(which, paid))
            return torch.where(paid[:, None], logits, logits * 0)

        def count(self, which: Any, paid: Any) -> None:
            self.backwards.index_add_(0, which, paid.long())

    net = Watched()
    attack(net, clean.clone(), labels)
    forward, backward = (float(n.double().mean()) for n in (net.forwards, net.backwards))
    return Found(net.least.numpy(), forward, backward)


def attacks(norm: str, budget: int) -> dict[tuple[str, str], Callable[[Any, Any, Any], Any]]:
    """Return the attacks by library and name, with as many steps as the budget allows."""
    import foolbox
    from adv_lib.attacks import apgd, apgd_targeted, ddn, fab, fmn, pdgd, pdpgd, tr

    p, half = ORDER[norm], budget // 2
    by: dict[str, Callable[..., Any]] = {
        "FMN": partial(fmn, norm=p, steps=half),
        "APGD": partial(_search, partial(apgd, norm=p, n_iter=half // ROUNDS), norm),
        "APGD-T": partial(
            _search, partial(apgd_targeted, norm=p, n_iter=max(half // (9 * ROUNDS), 5)), norm
        ),
        "FAB": partial(fab, norm=p, n_iter=budget // 11),
        "TR": partial(tr, p=p, iter=budget // 13, adaptive=True),
    }
    if norm == "l2":
        by["DDN"] = partial(ddn, steps=half, levels=None)
        by["PDGD"] = partial(pdgd, num_steps=half)
    else:
        by["PDPGD"] = partial(pdpgd, norm=p, num_steps=half)

    def of_foolbox(kind: Any) -> Callable[[Any, Any, Any], Any]:
        def attack(net: Any, x: Any, y: Any) -> Any:
            wrapped = foolbox.PyTorchModel(net.eval(), bounds=(0, 1), device="cpu")
            return kind(steps=half).run(wrapped, x, foolbox.criteria.Misclassification(y))

        return attack

    theirs = {"FMN": {"l2": "L2FMNAttack", "linf": "LInfFMNAttack"}[norm]}
    if norm == "l2":
        theirs["DDN"] = "DDNAttack"
    return {
        **{("adversarial-library", name): attack for name, attack in by.items()},
        **{
            ("foolbox", name): of_foolbox(getattr(foolbox.attacks, kind))
            for name, kind in theirs.items()
        },
    }


def _search(attack: Callable[..., Any], norm: str, net: Any, x: Any, y: Any) -> None:
    """Search, for each image by itself, for the smallest ball in which an attack succeeds."""
    import torch

    low, found = torch.zeros(len(x)), torch.zeros(len(x), dtype=torch.bool)
    high = torch.full((len(x),), float("inf"))
    eps = torch.full((len(x),), FIRST_EPS[norm])
    for _ in range(ROUNDS):
        hit = net(attack(net, x, y, eps=eps)).argmax(1) != y
        low, high = torch.where(hit, low, eps), torch.where(hit, eps, high)
        found |= hit
        eps = torch.where(found, (low + high) / 2, 2 * eps)
