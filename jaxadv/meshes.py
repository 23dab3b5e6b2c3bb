"""Arrays on meshes of Explicit axes, which `jax.make_mesh` makes by default.

On such a mesh an array's sharding is part of its type, and an operation whose result could be
sharded in several ways must name one. Neither the arithmetic of this library nor most nets do so.
Therefore the public functions run with Auto axes, where the compiler decides: `auto_axes` converts
the arguments to Auto axes, which moves no data, and the results back to Explicit ones. Arrays on
meshes of Auto axes, or on no mesh, pass through.

The net runs with Auto axes too. If it names shardings itself (`out_sharding`,
`jax.sharding.reshard`), or uses arrays on the mesh that aren't among its parameters, wrap it in
`jax.sharding.explicit_axes`, which restores Explicit axes inside it.
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
    """Decorate a function to compute with Auto axes where its caller's arrays have Explicit ones.

    Args:
      results: function from the arguments to the `PartitionSpec`s of the results, as a tree prefix;
        None for results on the host.
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
    """Shard a perturbation as x."""
    return _spec(x)


def of_rows(apply_fn: Any, params: Any, x: Any, *others: Any, **named: Any) -> P:
    """Shard one number per example, `[B]`, as the examples are."""
    return P(*_spec(x)[:1])


def as_state(state: Any, *others: Any, **named: Any) -> tuple[Any, P]:
    """Shard a training state as before the step, and replicate the report."""
    return jax.tree.map(_spec, state), P()


def as_objective(params: Any, model_state: Any, *others: Any, **named: Any) -> tuple[P, Any]:
    """Replicate an objective's loss and report, and shard the model state as it was."""
    return P(), (jax.tree.map(_spec, model_state), P())


def _mesh(a: jax.Array) -> AbstractMesh:
    return jax.typeof(a).sharding.mesh


def _spec(a: Any) -> P:
    return jax.typeof(a).sharding.spec if isinstance(a, jax.Array) else P()


def _auto(mesh: AbstractMesh) -> AbstractMesh:
    return mesh.update_axis_types(dict.fromkeys(mesh.explicit_axes, AxisType.Auto))


def _to_auto(argument: Any) -> Any:
    """Convert an argument's arrays to Auto axes; return it unchanged if it has no Explicit axes.

    Rebuilding a dict would sort it, and a dict of attacks is run in its own order.
    """
    if not any(map(_is_explicit, jax.tree.leaves(argument))):
        return argument
    return jax.tree.map(lambda leaf: _on_auto(leaf) if _is_explicit(leaf) else leaf, argument)


def _is_explicit(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and bool(_mesh(leaf).explicit_axes)


def _on_auto(leaf: jax.Array) -> jax.Array:
    """Return an array with the same sharding, on the same mesh with Auto axes."""
    if isinstance(leaf, jax.core.Tracer):
        return jax.sharding.reshard(leaf, P())
    # Reuse the buffers: outside of jit, resharding would copy them.
    held: Any = leaf.sharding
    mesh = Mesh(held.mesh.devices, held.mesh.axis_names, (AxisType.Auto,) * held.mesh.devices.ndim)
    sharding = NamedSharding(mesh, held.spec, memory_kind=held.memory_kind)
    shards = [shard.data for shard in leaf.addressable_shards]
    return jax.make_array_from_single_device_arrays(leaf.shape, sharding, shards)


def _to_explicit(sharding: NamedSharding, leaf: Any) -> Any:
    """Reshard an array that is on a mesh, and return any other as it is."""
    return leaf if _mesh(leaf).empty else jax.sharding.reshard(leaf, sharding)
