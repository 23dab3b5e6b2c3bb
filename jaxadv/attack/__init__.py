"""Iterated attacks, with the signature of the one-step methods in `perturb` (`types.PerturbFn`).

They compile their own loop: `apply_fn`, the norm and the number of steps (in `fab`, only
`apply_fn` and the norm) are static, so there is one compilation for each `apply_fn` object. Pass
the same object again, with the weights as its params: each call checks the arrays that `apply_fn`
has captured, and a change means recompilation. Under a caller's `jax.jit` the loop is inlined. r is
meant to be used as a constant, as in `objectives`: attacks that stop early (`while_loop`) support
no reverse-mode derivatives.

In a ball of radius eps:

- `pgd`: projected gradient steps in an l1, l2 or linf ball. `pgd_kl`: the same, away from the net's
  own output, for TRADES.
- `apgd`, `apgd_multitargeted`: projected gradient steps with momentum and adaptive step sizes;
  without eps they search for the smallest ball in which they succeed.

The smallest perturbation that changes the prediction (if eps is given, projected to that size):

- `deepfool`: smallest steps across the nearest linearised boundary, of logits or probabilities.
- `fmn`: gradient steps in a ball whose radius adapts to the boundary.
- `ddn`: gradient steps on a sphere whose radius adapts to the boundary, l2 only.
- `fab`: projections onto linearised boundaries within the box, biased toward x.

Without gradients: `square`, a random search over square windows of an image.

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
