"""Reliable accuracies: masks of correctly classified examples, and counts of what went wrong.

Results are per example, not means of batches: arrays `[n]` that cover every example, including the
last, short batch. The worst case over attacks is a logical operation on masks
(`one.robust & other.robust`), and counts are sums of masks (`outcome.zero.sum()`).

An example that is misclassified at x counts as wrong whatever its r. So does one with a label
outside 0..K-1, with NaN or infinity in x, or with NaN or +inf in its logits. These are counted, and
so are perturbations that are exactly 0 (no usable gradient), since a zero gradient makes a net look
robust when it isn't.

- `measure`: score a batch, under `jax.jit`. `score`: the same over a data set, on the host in
  batches.
- `attack_and_score`: attack a data set, then score it, by default under the worst of the attacks of
  `autoattack`; `fast_autoattack` gives nearly the same masks for a fraction of the passes.
- `distances`: the smallest perturbation of each example by the best of several attacks, and from it
  the accuracy at every eps.
- `accuracy` and `interval`: the accuracy of a mask, and its confidence interval. `compare`: two
  masks of the same examples.
- `check`: signs that a robust accuracy shouldn't be trusted.

The host functions compile once for each `apply_fn` and attack object: make a `functools.partial`
once and reuse it.
"""

from jaxadv.evaluate._accuracy import (
    Comparison,
    Outcome,
    accuracy,
    compare,
    interval,
    measure,
    score,
)
from jaxadv.evaluate._attacks import NearBoundary, autoattack, fast_autoattack
from jaxadv.evaluate._batches import Passes, Progress
from jaxadv.evaluate._check import Flag, Report, check
from jaxadv.evaluate._distances import Distances, distances, minimal_attacks
from jaxadv.evaluate._ensemble import Audit, Result, Stage, attack_and_score

__all__ = [
    "Audit",
    "Comparison",
    "Distances",
    "Flag",
    "NearBoundary",
    "Outcome",
    "Passes",
    "Progress",
    "Report",
    "Result",
    "Stage",
    "accuracy",
    "attack_and_score",
    "autoattack",
    "check",
    "compare",
    "distances",
    "fast_autoattack",
    "interval",
    "measure",
    "minimal_attacks",
    "score",
]
