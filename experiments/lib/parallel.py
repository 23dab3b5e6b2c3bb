"""Several devices, and several processes: where an experiment's arrays lie.

Training images, parameters and the optimiser's state are on every device; batches are spread over
the devices along one named axis, `"data"`. XLA does the rest: `jaxadv.train` and `jaxadv.evaluate`
take such arrays as any others. On one device nothing is placed.

Each process of a run has some of its devices, and all of them run the same command but for
`--process`:

    python experiments/mnist.py --coordinator localhost:1234 --processes 2 --process 0 &
    python experiments/mnist.py --coordinator localhost:1234 --processes 2 --process 1

They share the folder given by `--out`; the first writes the results. When one of them dies, the
others end with an error, and the same commands resume from the last epoch.
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
    """Over how many devices each batch is spread; None for as many as divide it evenly."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(Devices):
    """The devices and processes that an experiment runs on."""

    coordinator: str | None = None
    """Address and port of the first of several processes."""
    processes: Count | None = None
    """How many processes there are."""
    process: Whole | None = None
    """Which of them this is, from 0."""

    def __post_init__(self) -> None:
        """Check that a process is named in full or not at all.

        Raises:
          UsageError: if it isn't.
        """
        super().__post_init__()
        named = self.coordinator, self.processes, self.process
        if named == (None, None, None):
            return
        if self.coordinator is None or self.processes is None or self.process is None:
            raise options.UsageError(
                f"expected --coordinator, --processes and --process together, got {named}; give "
                "all three, or none of them"
            )
        if self.process >= self.processes:
            raise options.UsageError(
                f"expected --process to be less than the {self.processes} of --processes, got "
                f"{self.process}; count from 0"
            )
        if not self.coordinator.rpartition(":")[2].isdecimal():
            raise options.UsageError(
                f"expected --coordinator to be an address and a port, got {self.coordinator}; "
                "write it as in localhost:1234"
            )


def start(settings: Settings = Settings()) -> Console:
    """Join the other processes, if there are any; return where to print, silent but in the first.

    Has to come before anything is computed. What is compiled from then on is kept beside the
    prepared data, or where JAX_COMPILATION_CACHE_DIR says, and found there by the next run.
    """
    if settings.coordinator is not None:
        jax.distributed.initialize(settings.coordinator, settings.processes, settings.process)
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        compiled = cache.directory() / "compiled"
        jax.config.update("jax_compilation_cache_dir", str(compiled))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        # A run compiles a hundred programs; few take the one second from which JAX keeps them.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    return Console(quiet=not first_process())


def first_process() -> bool:
    """Say whether this is the process that writes what all of them found."""
    return jax.process_index() == 0


def mesh(settings: Devices, *sizes: int) -> Mesh | None:
    """Return the devices that batches are spread over, an axis named "data"; None for one.

    Args:
      settings: how many are asked for.
      *sizes: of the batches.

    Raises:
      UsageError: if there are fewer devices, if their number doesn't divide the sizes, or if it
        leaves a process without.
    """
    common = math.gcd(*sizes)
    there = jax.device_count()
    n = settings.devices
    if n is None:
        n = max(k for k in range(1, there + 1) if common % k == 0)
    if n > there or common % n:
        raise options.UsageError(
            f"expected a number of --devices that divides {', '.join(map(str, sizes))}, at most "
            f"the {there} there are, got {n}; choose another, or other batches"
        )
    if jax.process_count() > 1 and n < there:
        raise options.UsageError(
            f"expected all {there} devices of {jax.process_count()} processes to have a part of "
            f"batches of {', '.join(map(str, sizes))}, got {n}; choose sizes that {there} divides"
        )
    if n == 1:
        return None
    # Versions of JAX differ in which axes they make by default.
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
    # Not device_put, which among several processes knows no keys.
    return jax.jit(_same, out_shardings=NamedSharding(mesh, spec))(tree)


def _same(tree: Any) -> Any:
    return tree
