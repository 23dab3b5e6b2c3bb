"""Iterated attacks, with the signature of the one-step methods in `perturb` (`types.PerturbFn`).

They compile their own loop: `apply_fn`, the norm and the number of steps are static, so that there
is one compilation for each `apply_fn` object (pass the same object again), and under a caller's
`jax.jit` the loop is inlined.

- `pgd`: projected gradient steps in an l1, l2 or linf ball.
"""

from jaxadv.attack.pgd import pgd

__all__ = ["pgd"]
