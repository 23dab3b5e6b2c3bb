"""The smallest perturbation of each example, kept along the way and shortened at its end.

What attacks that walk to the boundary and across it have in common: `fmn` and `ddn`.
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
    """Each example's smallest perturbation so far; by more than rounding comes before barely.

    Attributes:
      clearly: those that succeed by more than rounding (`problem.beyond_rounding`).
      barely: those that succeed at all.
    """

    clearly: Least
    barely: Least

    @classmethod
    def at_x(cls, problem: Problem, clear: Callable[..., jax.Array]) -> Closest:
        """Return r = 0, of size 0 where x is where it should be, however later programs round."""
        none = Least.empty(problem.x)
        there = clear(*problem.value(none.r))
        return cls(none._replace(size=jnp.where(there, 0, none.size)), none)

    def with_point(
        self, r: jax.Array, size: jax.Array, success: jax.Array, clearly: jax.Array
    ) -> Closest:
        """Return the smaller of these and another point, for each example that it succeeds on."""
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
        """Return r scaled down to the boundary, cut to eps if given; how often each was tried."""
        clearly, barely = self.clearly.found, self.barely.found

        def misleads(r: jax.Array) -> jax.Array:
            success, loss = problem.value(r)
            return jnp.where(clearly, clear(success, loss), success)

        r, tries = bisect_to_boundary(misleads, self.r, clearly | barely)
        return problem.clip_to_ball(r), tries
