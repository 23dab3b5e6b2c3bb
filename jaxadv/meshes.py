"""Arrays on meshes of Explicit axes, which `jax.make_mesh` makes by default.

On such a mesh an array's sharding is part of its type, and each operation must say how its result
lies. Neither the arithmetic of this library nor most nets do. So its public functions run with Auto
axes, on which the compiler decides: `auto_axes` changes the axes of the arguments on the way in,
which moves no data, and those of the results on the way out. Arrays on meshes of Auto axes, or on
none, pass through.

A net is part of what runs with Auto axes. One that names shardings itself (`out_sharding`,
`jax.sharding.reshard`), or has arrays on the mesh that aren't among its parameters, is wrapped in
`jax.sharding.explicit_axes`, which brings its own axes back.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
from typing import Any, TypeVar, cast

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

__all__ = ["as_objective", "as_state", "as_x", "auto_axes", "of_rows"]

F = TypeVar("F", bound=Callable[..., Any])


def auto_axes(results: Callable[..., Any] | None = None) -> Callable[[F], F]:
    """Return a decorator: the function's arrays are on Auto axes inside, Explicit ones outside.

    Args:
      results: from the function's arguments to the `PartitionSpec` of its results, or a prefix of
        their tree; None for results on the host.
    """

    def decorate(function: F) -> F:
        @wraps(function)
        def with_auto_axes(*args: Any, **kwargs: Any) -> Any:
            leaves = jax.tree.leaves((args, kwargs))
            arrays = [leaf for leaf in leaves if isinstance(leaf, jax.Array)]
            context = jax.sharding.get_abstract_mesh()
            mesh = next((m for m in (context, *map(_mesh, arrays)) if m.explicit_axes), None)
            if mesh is None:
                return function(*args, **kwargs)
            traced = any(isinstance(array, jax.core.Tracer) for array in arrays)
            with jax.sharding.use_abstract_mesh(_auto(mesh if traced else context)):
                named = {name: _to_auto(argument) for name, argument in kwargs.items()}
                out = function(*map(_to_auto, args), **named)
            if results is None:
                return out

            def lay(spec: P, part: Any) -> Any:
                return jax.tree.map(partial(_to_explicit, NamedSharding(mesh, spec)), part)

            specs = results(*args, **kwargs)
            return jax.tree.map(lay, specs, out, is_leaf=lambda tree: isinstance(tree, P))

        return cast(F, with_auto_axes)

    return decorate


def as_x(apply_fn: Any, params: Any, x: Any, *others: Any, **named: Any) -> P:
    """Lay a perturbation as x lies."""
    return _spec(x)


def of_rows(apply_fn: Any, params: Any, x: Any, *others: Any, **named: Any) -> P:
    """Lay one number of each example, `[B]`, as the examples lie."""
    return P(*_spec(x)[:1])


def as_state(state: Any, *others: Any) -> tuple[Any, P]:
    """Lay a training state as it was before the step, and its report on every device."""
    return jax.tree.map(_spec, state), P()


def as_objective(params: Any, model_state: Any, *others: Any, **named: Any) -> tuple[P, Any]:
    """Lay an objective's loss and report on every device, its model's state as it was."""
    return P(), (jax.tree.map(_spec, model_state), P())


def _mesh(a: jax.Array) -> AbstractMesh:
    return jax.typeof(a).sharding.mesh


def _spec(a: Any) -> P:
    return jax.typeof(a).sharding.spec if isinstance(a, jax.Array) else P()


def _auto(mesh: AbstractMesh) -> AbstractMesh:
    return mesh.update_axis_types(dict.fromkeys(mesh.explicit_axes, AxisType.Auto))


def _to_auto(argument: Any) -> Any:
    """Return an argument with its arrays on Auto axes; one that has none on Explicit ones itself.

    To rebuild it would sort a dict, which holds attacks in the order they are to run in.
    """
    if not any(map(_is_explicit, jax.tree.leaves(argument))):
        return argument
    return jax.tree.map(lambda leaf: _on_auto(leaf) if _is_explicit(leaf) else leaf, argument)


def _is_explicit(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and bool(_mesh(leaf).explicit_axes)


def _on_auto(leaf: jax.Array) -> jax.Array:
    """Return an array that lies where it does, on the same mesh with Auto axes."""
    if isinstance(leaf, jax.core.Tracer):
        return jax.sharding.reshard(leaf, P())
    # The same buffers: outside of a jit, resharding would copy them.
    held: Any = leaf.sharding
    mesh = Mesh(held.mesh.devices, held.mesh.axis_names, (AxisType.Auto,) * held.mesh.devices.ndim)
    sharding = NamedSharding(mesh, held.spec, memory_kind=held.memory_kind)
    shards = [shard.data for shard in leaf.addressable_shards]
    return jax.make_array_from_single_device_arrays(leaf.shape, sharding, shards)


def _to_explicit(sharding: NamedSharding, leaf: Any) -> Any:
    """Return an array that is on a mesh with this sharding, and any other as it is."""
    return leaf if _mesh(leaf).empty else jax.sharding.reshard(leaf, sharding)
