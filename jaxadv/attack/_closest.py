"""Each example's smallest perturbation, recorded by an attack and scaled down at its end.

Used by attacks whose iterates cross the decision boundary: `fmn`, `ddn`, and the search of `apgd`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxadv import inputs
from jaxadv.problem import Least, Problem, bisect_to_boundary

__all__ = ["Closest"]


class Closest(NamedTuple):
    """Each example's smallest perturbation so far; clear successes take precedence over bare ones.

    Attributes:
      clearly: those that succeed by more than rounding error (`problem.beyond_rounding`).
      barely: those that succeed at all.
    """

    clearly: Least
    barely: Least

    @classmethod
    def at_x(cls, problem: Problem, clear: Callable[..., jax.Array]) -> Closest:
        """Return r = 0, with size 0 where x itself clearly succeeds, and else inf."""
        none = Least.empty(problem.x)
        there = clear(*problem.value(none.r))
        return cls(none._replace(size=jnp.where(there, 0, none.size)), none)

    def with_point(
        self, r: jax.Array, size: jax.Array, success: jax.Array, clearly: jax.Array
    ) -> Closest:
        """Return the smaller of this point and another, where the other succeeds."""
        return Closest(
            self.clearly.with_point(r, size, clearly), self.barely.with_point(r, size, success)
        )

    @property
    def r(self) -> jax.Array:
        """The perturbations, `[B, ...]`; 0 where none was found."""
        found = inputs.expand_like(self.clearly.found, self.clearly.r)
        return jnp.where(found, self.clearly.r, self.barely.r)

    def shortened(
        self, problem: Problem, clear: Callable[..., jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        """Return r scaled down to the boundary and clipped to eps if given; number of tries."""
        clearly, barely = self.clearly.found, self.barely.found

        def misleads(r: jax.Array) -> jax.Array:
            success, loss = problem.value(r)
            return jnp.where(clearly, clear(success, loss), success)

        r, tries = bisect_to_boundary(misleads, self.r, clearly | barely)
        return problem.clip_to_ball(r), tries
