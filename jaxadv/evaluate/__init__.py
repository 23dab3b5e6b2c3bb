"""Accuracies that can be counted on: a mask per example, and what went wrong in making it.

The unit is one example, not a batch's mean: every function here gives arrays `[n]` that cover every
example, the last short batch included, so that worst case and transfer are logical operations on
masks, and counts add up over batches.

An example that is misclassified to begin with is wrong whatever its r is. So is one with a label
outside 0..K-1, or with NaN or infinity in its input or +inf or NaN in its logits. These are
counted, and so are perturbations that are exactly 0 (no usable gradient), since a zero gradient
makes a net look robust that isn't.

Pure, for use under `jax.jit`: `correct`, `measure`, `count`, `merge`. On the host, over a data set
in batches: `clean`, `robust`, `curve`, and in two parts what `robust` does, `perturbations` and
`outcome`. They compile once for each `apply_fn` and `perturb_fn` object: make a `functools.partial`
once and pass it again.

For a figure to publish: `ensemble` takes the worst of several attacks (`attack.standard` for those
of AutoAttack), `interval` says how far the draw of the examples matters, and `check` looks for
signs that the figure shouldn't be believed.
"""

from jaxadv.evaluate.check import Flag, Report, check
from jaxadv.evaluate.ensemble import Ensemble, ensemble, interval
from jaxadv.evaluate.masks import (
    Counts,
    Outcome,
    accuracy,
    clean,
    correct,
    count,
    curve,
    measure,
    merge,
    outcome,
    perturbations,
    robust,
    worst_case,
)

__all__ = [
    "Counts",
    "Ensemble",
    "Flag",
    "Outcome",
    "Report",
    "accuracy",
    "check",
    "clean",
    "correct",
    "count",
    "curve",
    "ensemble",
    "interval",
    "measure",
    "merge",
    "outcome",
    "perturbations",
    "robust",
    "worst_case",
]
