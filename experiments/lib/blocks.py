"""Attacks on many images, block by block, with a progress bar. Each block can be saved."""

from __future__ import annotations

import time
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from numpy.typing import NDArray
from rich.progress import Progress

from experiments.lib import options, parallel
from experiments.lib.problems import Problem
from jaxadv import evaluate
from jaxadv.types import Norm, PerturbFn

Block = dict[str, NDArray[Any]]
_OF_IMAGES = ("clean", "robust", "norm", "nonfinite", "invalid")


class Attacked(NamedTuple):
    """The results of an attack on some images.

    Attributes:
      clean: which images are classified correctly.
      robust: which of them still are under the attack.
      norm: size of each perturbation.
      nonfinite: which images have inputs, logits or perturbations that aren't finite.
      invalid: which images have labels outside the net's classes.
      stages: for each part of the attack, how many images it tried and how many it fooled, the
        robust accuracy up to and including it, its seconds, and the forward and backward passes
        executed, averaged over all images (0 for a part that doesn't count them).
      seconds: duration of the whole attack.
    """

    clean: NDArray[np.bool_]
    robust: NDArray[np.bool_]
    norm: NDArray[np.float32]
    nonfinite: NDArray[np.bool_]
    invalid: NDArray[np.bool_]
    stages: dict[str, dict[str, float]]
    seconds: float

    def figures(self) -> dict[str, Any]:
        """Return the accuracies, and the confidence interval of the robust one, for a row."""
        return {
            "columns": {
                "clean": evaluate.accuracy(self.clean),
                "robust": evaluate.accuracy(self.robust),
            },
            "interval": list(evaluate.interval(self.robust)),
        }


def attack(
    problem: Problem,
    parts: Mapping[str, PerturbFn],
    *,
    eps: float,
    norm: Norm,
    key: jax.Array,
    block: int,
    batch_size: int,
    mesh: Callable[[int], Mesh | None],
    progress: Progress,
    title: str,
    save: str | None = None,
) -> Attacked:
    """Attack images by each part in turn; each part attacks the images that are still robust.

    Args:
      problem: the net and the images.
      parts: the attack's parts, by name.
      eps: size of the perturbations.
      norm: norm of that size.
      key: random key; each image draws from its own part of it, whatever its block.
      block: images per block.
      batch_size: images perturbed at once.
      mesh: maps a block's number of images to the devices that it is spread over.
      progress: where to show a bar, with the robust accuracy so far.
      title: title of the bar.
      save: prefix of the blocks' file names; a block whose file exists isn't attacked again. None
        to write no files.

    Raises:
      UsageError: if one of these files is damaged.
    """
    bar = progress.add_task(title, total=len(problem.y), note="")
    keys = jax.random.split(key, len(problem.y))
    blocks: list[Block] = []
    for start in range(0, len(problem.y), block):
        rows = slice(start, start + block)
        path = None if save is None else Path(f"{save}-{block}-{start}.npz")
        if path is not None and path.exists():
            blocks.append(_read(path))
        else:
            done = _attacked(
                problem, parts, rows, mesh, eps=eps, norm=norm, key=keys[rows],
                batch_size=batch_size,
            )  # fmt: skip
            blocks.append(done)
            if path is not None:
                _write(path, done)
        robust = np.concatenate([done["robust"] for done in blocks])
        progress.update(bar, completed=len(robust), note=f"robust {robust.mean():.4f}")
    return _together(blocks)


def _attacked(
    problem: Problem,
    parts: Mapping[str, PerturbFn],
    rows: slice,
    mesh: Callable[[int], Mesh | None],
    **how: Any,
) -> Block:
    devices = mesh(len(problem.y[rows]))
    params = parallel.replicate(devices, problem.params)
    x, y = parallel.spread(devices, (problem.x[rows], problem.y[rows]))
    begin = time.perf_counter()
    found = evaluate.attack_and_score(
        problem.apply_fn, params, x, y, parts, bounds=problem.bounds, **how
    )
    stages = found.stages.values()
    return {
        "r": found.r,
        **{name: getattr(found.outcome, name) for name in _OF_IMAGES},
        "seconds": np.array(time.perf_counter() - begin),
        "names": np.array(list(found.stages)),
        "tried": np.array([stage.tried for stage in stages]),
        "fooled": np.array([stage.fooled for stage in stages]),
        "stage_seconds": np.array([stage.seconds for stage in stages]),
        "stage_passes": np.array([sum(stage.executed or (0,)) for stage in stages]),
    }


def _write(path: Path, block: Block) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished.npz")
    np.savez_compressed(unfinished, allow_pickle=False, **block)
    unfinished.replace(path)


def _read(path: Path) -> Block:
    try:
        with path.open("rb") as file, np.load(file) as saved:
            return dict(saved)
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise options.UsageError(
            f"expected the arrays of a block in {path}, got: {error}; delete the file and run the "
            "same command again"
        ) from error


def _together(blocks: list[Block]) -> Attacked:
    images = {name: np.concatenate([block[name] for block in blocks]) for name in _OF_IMAGES}
    stages = {}
    standing = images["clean"].copy()
    for i, name in enumerate(blocks[0]["names"].tolist()):
        fooled = np.concatenate([block["fooled"][i] for block in blocks])
        standing &= ~fooled
        stages[name] = {
            "tried": int(sum(block["tried"][i].sum() for block in blocks)),
            "fooled": int(fooled.sum()),
            "robust": float(standing.mean()),
            "seconds": round(float(sum(block["stage_seconds"][i] for block in blocks)), 1),
            "passes": round(
                int(sum(block["stage_passes"][i] for block in blocks)) / len(fooled), 1
            ),
        }
    seconds = round(float(sum(block["seconds"] for block in blocks)), 1)
    return Attacked(**images, stages=stages, seconds=seconds)
