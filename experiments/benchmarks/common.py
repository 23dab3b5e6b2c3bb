"""Code that the parts of the benchmark share: settings, nets, steps, and child processes."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax.sharding import Mesh

from experiments.lib import models, parallel, records
from experiments.lib.models import Classifier, function
from experiments.lib.options import Checked, Count, OutputFolder, Several, Size
from experiments.lib.timing import Call
from jaxadv import attack, objectives, perturb, train

Part = Literal["steps", "loops", "attacks", "growth", "devices", "starts"]
NetName = Literal["mlp", "lenet", "vgg-0.25", "vgg-0.5", "vgg-1"]
Figures = list[dict[str, Any]]

ROOT = Path(__file__).resolve().parents[2]
PARTS: tuple[Part, ...] = get_args(Part)


@dataclasses.dataclass(frozen=True)
class Settings(Checked):
    """Time training steps and attacks, and compare with floors and with other libraries."""

    parts: Several[Part] = PARTS
    """What to measure."""
    nets: Several[NetName] = ("mlp", "lenet", "vgg-0.25", "vgg-0.5", "vgg-1")
    """Nets whose steps are timed; vgg-W is the CIFAR-10 net at W times its width."""
    batch_size: Count = 100
    """Images per step."""
    n: Count = 1000
    """Images attacked."""
    rounds: Count = 15
    """How often everything is timed; a third as often where calls take seconds."""
    seconds: Size = 0.1
    """Shortest duration of one timing; calls are repeated until it is reached."""
    out: OutputFolder = Path("runs/benchmark")
    """Where results go."""


def ratio(of: Any, to: Any) -> list[float]:
    """Return the quartiles of the ratio of two times, over the rounds that timed both."""
    of, to = np.atleast_1d(of), np.atleast_1d(to)
    rounds = min(len(of), len(to))  # `timing.in_turn` omits long calls from later rounds
    return np.quantile(of[:rounds] / to[:rounds], [0.25, 0.5, 0.75]).tolist()


def milliseconds(times: Any) -> float:
    """Return the median, in milliseconds, of times in seconds."""
    return float(np.median(times) * 1e3)


def make_net(name: str) -> tuple[Classifier, tuple[int, ...]]:
    """Return the net of this name, and the shape of its images."""
    if name == "mlp":
        return models.mlp((500, 500)), (28, 28, 1)
    if name == "lenet":
        return models.lenet((500,)), (28, 28, 1)
    return models.vgg((2048, 2048), width=float(name.removeprefix("vgg-"))), (28, 28, 3)


def some_images(n: int, shape: tuple[int, ...], classes: int = 10) -> tuple[jax.Array, jax.Array]:
    """Return random images and labels."""
    rng = np.random.default_rng(1)
    y = jnp.asarray(rng.integers(0, classes, n), jnp.int32)
    return jnp.asarray(rng.random((n, *shape)), jnp.float32), y


def training_calls(
    objectives_: Mapping[str, Any],
    params: Any,
    x: jax.Array,
    y: jax.Array,
    epoch_steps: int,
    mesh: Mesh | None = None,
) -> dict[str, Call]:
    """Return a compiled step and epoch of each objective, as calls that update their own state."""
    tx = optax.sgd(1e-3, momentum=0.9)
    order = jnp.tile(jnp.arange(len(x)), (epoch_steps, 1))

    def call(compiled: Any, *arguments: Any) -> Call:
        state = parallel.replicate(mesh, train.init(params, tx, key=jax.random.key(1)))

        def go() -> Any:
            nonlocal state
            state, info = compiled(state, *arguments)
            return info.loss

        return go

    batch, images = parallel.spread(mesh, (x, y)), parallel.replicate(mesh, (x, y))
    order = parallel.spread(mesh, order, axis=1)
    calls = {}
    for name, objective in objectives_.items():
        calls[f"{name}, step"] = call(train.make_step(objective, tx), batch)
        calls[f"{name}, epoch"] = call(train.make_epoch(objective, tx), images, order)
    return calls


def step_objectives(net: nn.Module, *, all_kinds: bool) -> dict[str, Any]:
    """Return the objectives whose steps are timed."""
    apply_fn = function(net)
    kinds = {
        "plain": objectives.natural(apply_fn),
        "LWA": objectives.adversarial(apply_fn, perturb.loss, eps=1.5),
    }
    if all_kinds:
        pgd = partial(attack.pgd, steps=3)
        parts = function(net, "encode"), function(net, "classify")
        kinds |= {
            "LWA, Adv_Alpha": objectives.adversarial(apply_fn, perturb.alpha, eps=1.5),
            "LWA_Rep": objectives.representation(*parts, perturb.loss, eps=1.5),
            "LWA, 3 steps": objectives.adversarial(apply_fn, pgd, eps=1.5),
        }
    return kinds


def in_child(part: Part, settings: Settings, *, devices: int) -> Figures:
    """Run a part in a child process with this many CPU devices; return its figures."""
    script = str(ROOT / "experiments" / "benchmark.py")
    arguments = [script, "--parts", part, "--nets", *settings.nets]
    for name in ("batch_size", "rounds", "seconds"):
        arguments += [f"--{name.replace('_', '-')}", str(getattr(settings, name))]
    environment = {"JAX_NUM_CPU_DEVICES": str(devices)}
    with tempfile.TemporaryDirectory() as folder:
        child([*arguments, "--out", folder], environment)
        (row,) = records.load(Path(folder) / "results.json", records.BenchmarkRow)
        return row.figures


def child(arguments: list[str], environment: Mapping[str, str]) -> str:
    """Run Python with these arguments; return what it prints."""
    command = [sys.executable, *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, **environment}
    )
    if done.returncode and "not valid" not in done.stderr:
        raise RuntimeError(f"expected {command[1:3]} to succeed, got: {done.stderr[-2000:]}")
    return done.stdout
