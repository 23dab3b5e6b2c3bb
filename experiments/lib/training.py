"""Training that shows its progress and resumes after any interruption.

`fit` runs epochs of `jaxadv.train.make_epoch` and saves the whole training state after each, with
orbax, whose checkpoints are atomic. If it is killed at any moment, the same call restores the last
checkpoint and repeats only the interrupted epoch. Every epoch's order of examples and every step's
key derive from the run's key, so the result is bit-for-bit the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
from jax.sharding import Mesh
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)

from experiments.lib import options, parallel
from jaxadv import train
from jaxadv.types import Objective, Params

_CHUNK = 50  # steps between two updates of the progress bar


class Fitted(NamedTuple):
    """A trained net.

    Attributes:
      state: the final training state.
      seconds: time spent training, over all sessions, compilation included.
      history: one entry per epoch: mean loss and accuracy over its training batches, and the
        results of `watch`.
    """

    state: train.TrainState
    seconds: float
    history: list[dict[str, float]]


def bars(console: Console) -> Progress:
    """Return progress bars that show a note, e.g. loss and accuracy, and the remaining time."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console)


def fit(
    objective: Objective,
    tx: optax.GradientTransformation,
    params: Params,
    data: tuple[jax.Array, ...],
    *,
    epochs: int,
    batch_size: int,
    key: jax.Array,
    directory: Path,
    settings: dict[str, Any],
    progress: Progress,
    name: str,
    model_state: Any = None,
    watch: Callable[[train.TrainState], dict[str, float]] | None = None,
    mesh: Mesh | None = None,
) -> Fitted:
    """Train for some epochs, from scratch or from the last checkpoint in `directory`.

    Args:
      objective: the objective to minimise.
      tx: the optax transformation.
      params: the initial parameters.
      data: all training examples, `x [N, ...]`, `y [N]` and other arrays of a batch, on the device.
        The last N mod batch_size examples of an epoch's random order are left out of that epoch.
      epochs: number of epochs.
      batch_size: B.
      key: random key that the order of examples and all other keys derive from.
      directory: folder of the checkpoints.
      settings: everything that determines the run, saved with the checkpoint.
      progress: where to show a bar.
      name: title of the bar.
      model_state: the initial model state.
      watch: computes entries of the history from the state after each epoch; not counted as
        training time.
      mesh: the devices that each batch is spread over; None for the default device.

    Returns:
      `Fitted`.

    Raises:
      UsageError: if the checkpoint is damaged, or was made with other settings.
    """
    order_key, step_key = jax.random.split(key)
    state = parallel.replicate(mesh, train.init(params, tx, model_state=model_state, key=step_key))
    data = parallel.replicate(mesh, data)
    n_steps = len(data[1]) // batch_size
    epoch_fn = train.make_epoch(objective, tx)
    seconds, history = 0.0, []
    told, compiled = False, set[int]()
    timed_seconds, timed_steps = 0.0, 0  # except the first chunk of each length, which compiles
    task = progress.add_task(name, total=epochs * n_steps, note="")

    with ocp.CheckpointManager(
        directory.absolute(), options=ocp.CheckpointManagerOptions(max_to_keep=1)
    ) as manager:
        done = manager.latest_step() or 0
        if done:
            # First the record: with other settings, the state may have other shapes.
            args = ocp.args.Composite(record=ocp.args.JsonRestore())
            record = _restored(manager, args).record
            _check_same(record["settings"], settings, directory)
            args = ocp.args.Composite(state=ocp.args.StandardRestore(state))
            state = _restored(manager, args).state
            seconds, history = record["seconds"], record["history"]
            progress.console.print(f"{name}: resuming after epoch {done} of {epochs}")
        for epoch in range(done, epochs):
            start = time.perf_counter()
            order = jax.random.permutation(jax.random.fold_in(order_key, epoch), len(data[1]))
            order = order[: n_steps * batch_size].reshape(n_steps, batch_size)
            order = parallel.spread(mesh, order, axis=1)
            infos = []
            for first in range(0, n_steps, _CHUNK):
                begin, chunk = time.perf_counter(), order[first : first + _CHUNK]
                state, info = epoch_fn(state, data, chunk)
                infos.append(info)
                loss, accuracy = info.loss.mean(), info.aux.accuracy.mean()
                progress.update(
                    task,
                    completed=epoch * n_steps + min(first + _CHUNK, n_steps),
                    note=f"loss {loss:.3f}  accuracy {accuracy:.3f}",
                )
                if len(chunk) in compiled:
                    timed_seconds += time.perf_counter() - begin
                    timed_steps += len(chunk)
                compiled.add(len(chunk))
            history.append(_summary(infos))
            seconds += time.perf_counter() - start
            if watch is not None:
                history[-1] |= watch(state)
            record = {"settings": settings, "seconds": seconds, "history": history}
            manager.save(
                epoch + 1,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state), record=ocp.args.JsonSave(record)
                ),
            )
            if timed_steps and not told and epoch + 1 < epochs:
                left = timed_seconds / timed_steps * n_steps * (epochs - epoch - 1)
                progress.console.print(f"{name}: about {_duration(left)} of training to go")
                told = True
            if not progress.console.is_terminal:
                last = history[-1]
                progress.console.print(
                    f"{name}: epoch {epoch + 1} of {epochs}, loss {last['loss']:.4f}, "
                    f"accuracy {last['accuracy']:.4f}, {seconds:.0f} s"
                )
    progress.update(task, completed=epochs * n_steps)
    return Fitted(state, seconds, history)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _summary(infos: list[train.StepInfo]) -> dict[str, float]:
    """Return an epoch's means, and its counts of perturbations that are zero or not finite."""
    loss, aux = jax.tree.map(lambda *chunks: jnp.concatenate(chunks), *infos)
    return {
        "loss": float(loss.mean()),
        "accuracy": float(aux.accuracy.mean()),
        "eps": float(aux.eps.mean()),
        "zero": int(aux.zero.sum()),
        "nonfinite": int(aux.nonfinite.sum()),
    }


def _restored(manager: ocp.CheckpointManager, args: ocp.args.Composite) -> Any:
    """Restore parts of the last checkpoint."""
    try:
        return manager.restore(manager.latest_step(), args=args)
    except (OSError, ValueError, KeyError) as error:
        raise options.UsageError(
            f"expected an intact checkpoint in {manager.directory}, got: {error}; delete it to "
            "start again"
        ) from error


def _check_same(stored: dict[str, Any], settings: dict[str, Any], directory: Path) -> None:
    other = [
        f"{name}: {stored.get(name)!r} then, {settings.get(name)!r} now"
        for name in sorted(stored.keys() | settings.keys())
        if stored.get(name) != settings.get(name)
    ]
    if other:
        raise options.UsageError(
            f"expected the settings that the checkpoint in {directory} was made with, got "
            f"different ones ({'; '.join(other)}); choose another --out, or delete the checkpoint "
            "to start again"
        )
