"""Compile times, and how much of them the compilation cache saves."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import optax

from experiments.benchmarks import common
from experiments.benchmarks.attacks import METHODS
from experiments.lib.models import function, init
from jaxadv import train


def run(settings: common.Settings) -> common.Figures:
    """Time the compilation of steps and attacks, and starting an experiment twice."""
    found: common.Figures = []
    for name in ("mlp", "lenet"):
        net, shape = common.make_net(name)
        x, y = common.some_images(settings.batch_size, shape)
        params = init(net, jax.random.key(0), x)
        tx = optax.sgd(1e-3, momentum=0.9)
        state = train.init(params, tx, key=jax.random.key(1))
        programs: dict[str, Callable[[], Any]] = {}
        for kind, objective in common.step_objectives(net, all_kinds=True).items():
            step: Any = train.make_step(objective, tx)
            programs[f"step: {kind}"] = partial(step.lower, state, (x, y))
        for kind, (method, _) in METHODS.items():
            compiled: Any = jax.jit(partial(method, function(net)))
            programs[f"attack: {kind}"] = partial(compiled.lower, params, x, y)
        for kind, lower in programs.items():
            start = time.perf_counter()
            lowered = lower()
            traced = time.perf_counter()
            lowered.compile()
            found.append(
                {
                    "net": name,
                    "program": kind,
                    "seconds to trace": round(traced - start, 2),
                    "to compile": round(time.perf_counter() - traced, 2),
                }
            )
    with tempfile.TemporaryDirectory() as folder:
        for start_ in ("first", "second"):
            found.append(
                {"program": f"mnist.py --quick, {start_} start", **_quick(Path(folder), start_)}
            )
    return found


QUICK = """
import sys, time
import jax.monitoring
seconds = {"compile": 0.0, "all": 0.0}
def heard(event, duration, **_):
    if event == "/jax/core/compile/backend_compile_duration":
        seconds["compile"] += duration
jax.monitoring.register_event_duration_secs_listener(heard)
from experiments import mnist
sys.argv = ["mnist.py", "--quick", "--out", sys.argv[1]]
start = time.perf_counter()
mnist.main()
seconds["all"] = time.perf_counter() - start
import json
print(json.dumps(seconds))
"""


def _quick(folder: Path, name: str) -> dict[str, Any]:
    environment = {
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
        "PYTHONPATH": str(common.ROOT),
    }
    printed = common.child(["-c", QUICK, str(folder / name)], environment)
    seconds = json.loads(printed.splitlines()[-1])
    return {
        "to compile": round(seconds["compile"], 2),
        "seconds in all": round(seconds["all"], 2),
    }
