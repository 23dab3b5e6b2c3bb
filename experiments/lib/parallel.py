"""Placing an experiment's arrays on several devices, in one or several processes.

Training images, parameters and the optimiser's state are replicated on every device; batches are
sharded over the devices along one named axis, `"data"`. XLA does the rest: `jaxadv.train` and
`jaxadv.evaluate` take such arrays like any others. With one device, arrays stay where they are.

Each process of a run has some of its devices, and all processes run the same command except for
`--process`:

    python experiments/mnist.py --coordinator localhost:1234 --processes 2 --process 0 &
    python experiments/mnist.py --coordinator localhost:1234 --processes 2 --process 1

They share the folder given by `--out`, and the first process writes the results. If one of them
dies, the others end with an error, and the same commands resume from the last epoch.
"""

from __future__ import annotations

import dataclasses
import math
import os
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from rich.console import Console

from experiments.lib import cache, options
from experiments.lib.options import Checked, Count, Whole


@dataclasses.dataclass(frozen=True, kw_only=True)
class Devices(Checked):
    """The devices that an experiment runs on."""

    devices: Count | None = None
    """Number of devices to spread each batch over; by default the most that divide it evenly."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(Devices):
    """The devices and processes that an experiment runs on."""

    coordinator: str | None = None
    """Address and port of the first of several processes."""
    processes: Count | None = None
    """Number of processes."""
    process: Whole | None = None
    """Index of this process, from 0."""

    def __post_init__(self) -> None:
        """Check that the options of a process are all given or all left out.

        Raises:
          UsageError: if they aren't, or if one is out of range.
        """
        super().__post_init__()
        named = self.coordinator, self.processes, self.process
        if named == (None, None, None):
            return
        if self.coordinator is None or self.processes is None or self.process is None:
            raise options.UsageError(
                f"expected --coordinator, --processes and --process together, got {named}; give "
                "all three or none of them"
            )
        if self.process >= self.processes:
            raise options.UsageError(
                f"expected --process to be less than --processes, {self.processes}, got "
                f"{self.process}; count from 0"
            )
        if not self.coordinator.rpartition(":")[2].isdecimal():
            raise options.UsageError(
                f"expected --coordinator to be an address and a port, got {self.coordinator}; "
                "write it like localhost:1234"
            )


def start(settings: Settings = Settings()) -> Console:
    """Join the other processes, if any; return a console, which is silent except in the first.

    Call this before any computation. Programs compiled from then on are cached for later runs, next
    to the prepared data or in JAX_COMPILATION_CACHE_DIR.
    """
    if settings.coordinator is not None:
        jax.distributed.initialize(settings.coordinator, settings.processes, settings.process)
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        compiled = cache.directory() / "compiled"
        jax.config.update("jax_compilation_cache_dir", str(compiled))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        # A run compiles a hundred programs, and most take less than JAX's threshold of one second.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    return Console(quiet=not first_process())


def first_process() -> bool:
    """Return whether this is the process that writes the results."""
    return jax.process_index() == 0


def mesh(settings: Devices, *sizes: int) -> Mesh | None:
    """Return the devices to spread batches over, along an axis named "data"; None for one device.

    Args:
      settings: how many devices to use.
      *sizes: the batch sizes.

    Raises:
      UsageError: if there are too few devices, if their number doesn't divide the sizes, or if a
        process would be left without a device.
    """
    common = math.gcd(*sizes)
    there = jax.device_count()
    n = settings.devices
    if n is None:
        n = max(k for k in range(1, there + 1) if common % k == 0)
    if n > there or common % n:
        raise options.UsageError(
            f"expected --devices to divide {', '.join(map(str, sizes))} and to be at most {there}, "
            f"the number there are, got {n}; choose another number, or other batch sizes"
        )
    if jax.process_count() > 1 and n < there:
        raise options.UsageError(
            f"expected batches of {', '.join(map(str, sizes))} to be spread over all {there} "
            f"devices of {jax.process_count()} processes, got {n}; choose sizes that {there} "
            "divides"
        )
    if n == 1:
        return None
    # The default axis type differs between versions of JAX.
    return jax.make_mesh((n,), ("data",), (AxisType.Auto,), devices=jax.devices()[:n])


def replicate(mesh: Mesh | None, tree: Any) -> Any:
    """Put arrays on every device."""
    return _put(tree, mesh, PartitionSpec())


def spread(mesh: Mesh | None, tree: Any, *, axis: int = 0) -> Any:
    """Spread arrays over the devices, along one of their axes."""
    return _put(tree, mesh, PartitionSpec(*[None] * axis, "data"))


def _put(tree: Any, mesh: Mesh | None, spec: PartitionSpec) -> Any:
    if mesh is None:
        return tree
    # Not device_put, which doesn't take random keys when there are several processes.
    return jax.jit(_same, out_shardings=NamedSharding(mesh, spec))(tree)


def _same(tree: Any) -> Any:
    return tree
