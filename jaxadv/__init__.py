"""Perturbations, min-max training and robust evaluation for classifiers in JAX.

Everything is a function of your own `apply_fn(params, x) -> logits` and `params`:

>>> import jax.numpy as jnp
>>> import jaxadv
>>> def apply_fn(params, x):
...     return x @ params["w"]
>>> params = {"w": jnp.array([[1.0, -1.0], [0.0, 2.0]])}
>>> x, y = jnp.array([[2.0, 0.5]]), jnp.array([0])
>>> r = jaxadv.perturb.alpha(apply_fn, params, x, y, eps=1.5)
>>> outcome = jaxadv.evaluate.measure(apply_fn, params, x, y, r)
>>> outcome.clean.tolist(), outcome.robust.tolist()
([True], [False])

`perturb` has the one-step methods of Huang et al., "Learning with a Strong Adversary", 2015, and
`attack` the iterated ones. `objectives` and `train` combine one of these and an optax optimiser
into a jitted min-max training step. `evaluate` scores a net under attack, `certify` certifies l2
radii by randomized smoothing, and `report` collects the figures to publish. At a lower level,
`problem` is the base of every attack, with `losses`, `norms` and `jacobian`. `nets` adapts random
nets and nets with one logit. `logistic` is the paper's Appendix A. `types` has the signatures.
"""

from jaxadv import (
    attack,
    certify,
    evaluate,
    jacobian,
    logistic,
    losses,
    nets,
    norms,
    objectives,
    perturb,
    problem,
    report,
    train,
    types,
)

__version__ = "0.2.0"

__all__ = [
    "attack",
    "certify",
    "evaluate",
    "jacobian",
    "logistic",
    "losses",
    "nets",
    "norms",
    "objectives",
    "perturb",
    "problem",
    "report",
    "train",
    "types",
]
