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
`attack` the iterated ones; `objectives` and `train` make a jitted min-max step of one of them and
an optax optimiser; `evaluate` scores a net under attack, `certify` bounds the robustness of a net
under noise from below, and `report` puts what is to be published into one. Below them: `problem`,
what every attack is written with, `losses`, `norms` and `jacobian`. `nets` adapts random nets and
nets of one logit. `logistic` is the paper's Appendix A. `types` names the signatures.
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
