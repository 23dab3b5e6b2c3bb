"""Accuracies that can be relied on: a mask per example, and what went wrong in making it.

The unit is one example, not a batch's mean: every function here gives arrays `[n]` that cover every
example, the last short batch included. Worst cases are logical operations on masks
(`one.robust & other.robust`), and counts are their sums (`outcome.zero.sum()`).

An example that is misclassified to begin with is wrong whatever its r is. So is one with a label
outside 0..K-1, or with NaN or infinity in its input or +inf or NaN in its logits. These are
counted, and so are perturbations that are exactly 0 (no usable gradient), since a zero gradient
makes a net look robust that isn't.

- `measure`: a batch, under `jax.jit`. `score`: the same over a data set, on the host in batches.
- `attack_and_score`: attack a data set, then score it. The worst of the attacks of `autoattack`,
  unless it is given others; `fast_autoattack` gives nearly the same verdicts for a fraction of the
  passes.
- `distances`: the least perturbation of each example by the best of several attacks, and from it
  the accuracy at every eps.
- `accuracy` and `interval`: the share of a mask, and how far the draw of the examples matters.
  `compare`: two masks of the same examples.
- `check`: signs that a robust accuracy shouldn't be believed.

The host functions compile once for each `apply_fn` and attack object: make a `functools.partial`
once and pass it again.
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
