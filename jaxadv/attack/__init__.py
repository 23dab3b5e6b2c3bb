"""Iterated attacks, with the signature of the one-step methods in `perturb` (`types.PerturbFn`).

They compile their own loop: `apply_fn`, the norm and the number of steps are static, so that there
is one compilation for each `apply_fn` object (pass the same object again, and the weights as its
params: arrays that it has captured are looked at in each call, and each change is another
compilation), and under a caller's `jax.jit` the loop is inlined. Their r is meant as a constant, as
`objectives` take it: reverse-mode derivatives of r don't pass through loops whose end isn't known
beforehand.

In a ball of radius eps:

- `pgd`: projected gradient steps in an l1, l2 or linf ball. `pgd_kl`: the same away from the net's
  own output, for TRADES.
- `apgd`, `apgd_multitargeted`: the same with momentum and step sizes that adapt themselves;
  without eps they search for the least ball.

The least perturbation that changes the answer (with eps: cut to that size):

- `deepfool`: least steps over the nearest linearised boundary, on logits or on probabilities.
- `fmn`: gradient steps in a ball that shrinks onto the boundary.
- `ddn`: the same on a sphere that shrinks and grows, l2 only.
- `fab`: projections onto linearised boundaries inside the box, biased towards x.

Without gradients: `square`, random search by square windows of an image.

AutoAttack, the standard ensemble of four of them, loops on the host: `evaluate.attack_and_score`.
"""

from jaxadv.attack._apgd import apgd, apgd_multitargeted
from jaxadv.attack._ddn import ddn
from jaxadv.attack._deepfool import deepfool
from jaxadv.attack._fab import fab
from jaxadv.attack._fmn import fmn
from jaxadv.attack._info import AttackInfo, Found, reports, with_info
from jaxadv.attack._pgd import pgd, pgd_kl
from jaxadv.attack._square import square

__all__ = [
    "AttackInfo",
    "Found",
    "apgd",
    "apgd_multitargeted",
    "ddn",
    "deepfool",
    "fab",
    "fmn",
    "pgd",
    "pgd_kl",
    "reports",
    "square",
    "with_info",
]
