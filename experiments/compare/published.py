"""AutoAttack in its authors' implementation, on our nets.

pip install "git+https://github.com/fra31/auto-attack@a39220048b3c9f2cca9a4d3a54604793c68eca7e"
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from experiments.compare.pytorch import images


def autoattack(
    net: Any,
    x: NDArray[np.float32],
    y: NDArray[Any],
    *,
    eps: float,
    norm: str = "l2",
    attacks: Sequence[str] = (),
    seed: int = 0,
    batch_size: int = 250,
    low: float = 0.0,
    verbose: bool = False,
) -> Any:
    """Return images perturbed by the published AutoAttack, in PyTorch's layout.

    Args:
      net: a PyTorch module.
      x: images `[n, H, W, C]`.
      y: labels `[n]`.
      eps: size of the perturbations.
      norm: l2 or linf.
      attacks: members of the ensemble to run, with the standard budget; all of them if empty.
      seed: random seed.
      batch_size: images perturbed at once.
      low: the smallest pixel. AutoAttack's pixels are in [0, 1], so they are shifted for it.
      verbose: whether to print progress.
    """
    import torch
    from autoattack import AutoAttack

    name = {"l2": "L2", "linf": "Linf"}[norm]

    class Shifted(torch.nn.Module):
        def forward(self, points: Any) -> Any:
            return net(points + low)

    adversary = AutoAttack(Shifted(), norm=name, eps=eps, seed=seed, device="cpu", verbose=verbose)
    if attacks:
        adversary.attacks_to_run = list(attacks)
    labels = torch.from_numpy(np.asarray(y).astype(np.int64))
    return adversary.run_standard_evaluation(images(x - low), labels, bs=batch_size) + low
