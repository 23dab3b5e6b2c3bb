"""The success and the cost of attacks: `with_info` returns them, `reports` makes attacks do so."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
from inspect import signature
from typing import Any, NamedTuple, ParamSpec, TypeAlias, cast

import jax

from jaxadv import meshes
from jaxadv.problem import Problem

__all__ = ["AttackInfo", "Found", "reports", "with_info"]

P = ParamSpec("P")

Answer: TypeAlias = tuple[jax.Array, jax.Array, jax.Array]
"""r, forward passes and backward passes: the fields of `Found` after the problem."""


class Found(NamedTuple):
    """The result of a function that `reports` decorates.

    Attributes:
      problem: the attack's problem.
      r: the perturbations, `[B, ...]`.
      forward: number of forward passes until each example was done, including those of gradients,
        integers `[B]`.
      backward: number of backward passes, integers `[B]`.
    """

    problem: Problem
    r: jax.Array
    forward: jax.Array
    backward: jax.Array


class AttackInfo(NamedTuple):
    """The success and the cost of an attack on each example; every leaf is `[B]`.

    Attributes:
      success: whether x + r is misclassified, or as the target if the attack is targeted. False if
        y has no class labels, as for soft labels and `pgd_kl`.
      loss: the attack's loss at x + r; for attacks toward several classes in turn
        (`apgd_multitargeted`, `fab`) the top wrong class's lead, `losses.logit_margin`.
      forward: number of forward passes until the example was done, including those of gradients.
      backward: number of backward passes.
    """

    success: jax.Array
    loss: jax.Array
    forward: jax.Array
    backward: jax.Array


def reports(method: Callable[P, Found]) -> Callable[P, jax.Array]:
    """Turn a function that returns `Found` into an attack that returns r.

    `with_info` returns the rest. The attack also accepts arrays on meshes of Explicit axes.

    Args:
      method: a function with the arguments of `types.PerturbFn`, and optionally others.

    Returns:
      The attack, with the same arguments.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxadv import attack
      >>> from jaxadv.problem import Problem
      >>> @attack.reports
      ... def nothing(apply_fn, params, x, y, /, *, eps, key=None, bounds=None):
      ...     problem = Problem.of(apply_fn, params, x, y, norm="l2", eps=eps, bounds=bounds)
      ...     none = jnp.zeros(len(x), int)
      ...     return attack.Found(problem, jnp.zeros_like(x), none, none)
      >>> nothing(lambda _, x: x, None, jnp.ones((1, 2)), jnp.array([0]), eps=1.0).tolist()
      [[0.0, 0.0]]
    """

    def with_report(*args: P.args, **kwargs: P.kwargs) -> tuple[jax.Array, AttackInfo]:
        problem, r, *passes = method(*args, **kwargs)
        return r, AttackInfo(*_judge(problem.keyed(), r), *passes)

    def both(*args: Any, **kwargs: Any) -> Any:
        return meshes.as_x(*args, **kwargs), meshes.of_rows(*args, **kwargs)

    @wraps(method)
    def only_r(*args: P.args, **kwargs: P.kwargs) -> jax.Array:
        return method(*args, **kwargs).r

    attack: Any = meshes.auto_axes(meshes.as_x)(only_r)
    attack.with_report = meshes.auto_axes(both)(with_report)
    attack.__signature__ = signature(method).replace(return_annotation="jax.Array")
    return cast(Callable[P, jax.Array], attack)


_judge = jax.jit(Problem.judge)


def with_info(method: Callable[..., jax.Array]) -> Callable[..., tuple[jax.Array, AttackInfo]]:
    """Make an attack return `(r, AttackInfo)`, with its success and its cost.

    Args:
      method: an attack of `jaxadv.attack` or one made by `reports`, or a `functools.partial` of it.

    Returns:
      The same attack, with the same arguments.

    Raises:
      TypeError: if it isn't such an attack.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxadv import attack
      >>> w = jnp.array([[3.0, -3.0], [4.0, -4.0]])
      >>> x, y = jnp.array([[1.0, 1.0]]), jnp.array([0])
      >>> r, info = attack.with_info(attack.pgd)(lambda w, x: x @ w, w, x, y, eps=5.0, steps=10)
      >>> info.success.tolist(), info.forward.tolist(), info.backward.tolist()
      ([True], [11], [10])
    """
    if isinstance(method, partial):
        return partial(with_info(method.func), *method.args, **method.keywords)
    with_report = getattr(method, "with_report", None)
    if with_report is None:
        raise TypeError(
            f"expected an attack of jaxadv.attack, or a functools.partial of one, got {method!r}; "
            "others don't count their passes: decorate your own with jaxadv.attack.reports"
        )
    return cast(Callable[..., tuple[jax.Array, AttackInfo]], with_report)
