"""Timing of calls, done so that their ratios are meaningful.

A machine's speed drifts, and other programs take a share of it. `in_turn` therefore times calls in
turn over several rounds; take ratios within each round. `Quiet` watches the load from other
programs, and the machine's own speed within seconds and from start to end: what a virtual machine
loses to its neighbours shows only there.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Hashable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.typing import DTypeLike
from numpy.typing import NDArray
from rich.progress import track

from jaxadv.types import Params

Call = Callable[[], Any]
K = TypeVar("K", bound=Hashable)

LONG = 10.0
"""Calls that take more seconds than this are timed in one round only."""
LARGEST_SHARE = 0.05
"""Largest share of the cores' time that other programs may take in a valid run."""
LARGEST_DRIFT = 0.15
"""Largest relative change of the machine's speed from start to end of a valid run."""
LARGEST_SPREAD = 0.15
"""Largest gap between the quartiles of its speed within seconds, relative to the lower one."""


def in_turn(
    calls: Mapping[K, Call], rounds: int, *, seconds: float
) -> dict[K, NDArray[np.float64]]:
    """Time calls one after the other, several times over.

    Args:
      calls: what to time; each is called once beforehand, to compile it.
      rounds: how often to time each.
      seconds: shortest duration of a timing; the call is repeated until it is reached.

    Returns:
      The seconds per call in each round; for a call longer than `LONG`, in one round only.
    """
    for call in track(calls.values(), "compiling", transient=True):
        jax.block_until_ready(call())
    taken: dict[K, list[float]] = {name: [] for name in calls}
    for _ in track(range(rounds), "timing", transient=True):
        for name, call in calls.items():
            if max(taken[name], default=0) < LONG:
                taken[name].append(_time(call, seconds))
    return {name: np.array(times) for name, times in taken.items()}


def _time(call: Call, seconds: float) -> float:
    n, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds or n == 0:
        result = call()
        n += 1
        if n % 5 == 1 or elapsed > seconds / 5:  # short calls may queue up, long ones may not
            jax.block_until_ready(result)
    jax.block_until_ready(result)
    return (time.perf_counter() - start) / n


def matrix_products(size: int = 2048, dtype: DTypeLike = jnp.float32) -> Call:
    """Return a call that multiplies two square matrices, which takes `2 size**3` operations."""
    a = jnp.ones((size, size), dtype)
    return lambda: _dot(a, a)


_dot = jax.jit(jnp.matmul)


def flops(net: nn.Module, params: Params, x: jax.Array) -> list[int]:
    """Return the operations of each layer's products for one image, in the order of layer names.

    A forward pass takes their sum. So does a backward pass to the input, and so do the gradients of
    the weights. Only matrix products and convolutions are counted.

    Args:
      net: the net.
      params: its parameters.
      x: images.
    """

    def layers(params: Params, x: jax.Array) -> Any:
        return net.apply(params, x, capture_intermediates=True)[1]["intermediates"]

    outputs = jax.eval_shape(layers, params, x)
    counts = []
    for name, layer in sorted(params["params"].items()):
        if "kernel" in layer:  # used once for every position of the output
            places = math.prod(outputs[name]["__call__"][0].shape[1:-1])
            counts.append(2 * places * math.prod(layer["kernel"].shape))
    return counts


class Quiet:
    """Tells whether a run had the machine to itself.

    Example:
      >>> from experiments.lib.timing import Quiet
      >>> quiet = Quiet()
      >>> record = quiet.report()  # after the measurements
      >>> sorted(record)[:4]
      ['cpu_of_others', 'cpu_stolen', 'gflops_at_end', 'gflops_at_start']
      >>> sorted(record)[4:]
      ['gflops_spread', 'reasons', 'valid']
    """

    def __init__(self) -> None:
        self._rates = self._gflops()
        self._start = self._now()

    def report(self) -> dict[str, Any]:
        """Return the load from others since creation, and whether timings are valid, or why not."""
        elapsed, busy, stolen, own = (
            now - before for now, before in zip(self._now(), self._start, strict=True)
        )
        share = max(0.0, busy - own) / elapsed
        samples = self._rates, self._gflops()
        # The best rate shows what the machine can do, whatever else it did meanwhile.
        first, last = (float(rates.max()) for rates in samples)
        drift = abs(last / first - 1)
        low, high = max(
            (np.quantile(rates, [0.25, 0.75]) for rates in samples), key=lambda q: q[1] / q[0]
        )
        spread = high / low - 1
        reasons = []
        if share > LARGEST_SHARE:
            reasons.append(
                f"other programs used {share:.0%} of the cores' time, more than the "
                f"{LARGEST_SHARE:.0%} that a timing tolerates"
            )
        if drift > LARGEST_DRIFT:
            reasons.append(
                f"matrix products ran at {first:.0f} GFLOP/s before and {last:.0f} after, "
                f"more than {LARGEST_DRIFT:.0%} apart"
            )
        if spread > LARGEST_SPREAD:
            reasons.append(
                f"the same matrix product ran at {low:.0f} and at {high:.0f} GFLOP/s within "
                f"seconds (quartiles), more than {LARGEST_SPREAD:.0%} apart"
            )
        return {
            "valid": not reasons,
            "reasons": reasons,
            "cpu_of_others": round(share, 3),
            "cpu_stolen": round(stolen / elapsed, 3),
            "gflops_at_start": round(first, 1),
            "gflops_at_end": round(last, 1),
            "gflops_spread": round(spread, 3),
        }

    @staticmethod
    def _gflops() -> NDArray[np.float64]:
        times = in_turn({"products": matrix_products()}, 20, seconds=0.1)["products"]
        return 2 * 2048**3 / times / 1e9

    @staticmethod
    def _now() -> tuple[float, float, float, float]:
        """Return seconds over all cores: elapsed, busy, stolen by the host, used by this run."""
        import psutil  # here, since nothing else needs it, and a GPU machine may lack it

        cores = psutil.cpu_times()
        busy = cores.user + cores.system + getattr(cores, "nice", 0.0)
        own = psutil.Process().cpu_times()
        children = getattr(own, "children_user", 0.0) + getattr(own, "children_system", 0.0)
        elapsed = time.perf_counter() * (psutil.cpu_count() or 1)
        return elapsed, busy, getattr(cores, "steal", 0.0), own.user + own.system + children
