"""Attacks on many images, block by block: shown, and saved if asked to, as each is done."""

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

from experiments.lib import options, parallel
from experiments.lib.problems import Problem
from jaxadv import evaluate
from jaxadv.types import Norm, PerturbFn

Block = dict[str, NDArray[Any]]


class Attacked(NamedTuple):
    """What an attack leaves of some images.

    Attributes:
      clean: which are right as they are.
      robust: which are right whatever the attack does.
      norm: of each perturbation.
      nonfinite: which have inputs, logits or perturbations that aren't finite.
      invalid: which have labels that are none of the net's classes.
      stages: of each part of the attack, how many it tried and fooled, the accuracy that it and
        those before it left, and its seconds.
      seconds: of the whole.
    """

    clean: NDArray[np.bool_]
    robust: NDArray[np.bool_]
    norm: NDArray[np.float32]
    nonfinite: NDArray[np.bool_]
    invalid: NDArray[np.bool_]
    stages: dict[str, dict[str, float]]
    seconds: float


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
    show: Callable[[int, float], None],
    save: str | None = None,
) -> Attacked:
    """Attack images by each part in turn, on those that the parts before it have left.

    Args:
      problem: the net and the images.
      parts: of the attack, by name.
      eps: size of the perturbations.
      norm: of that size.
      key: what is drawn from; each image has a part of its own, whatever its block.
      block: images of a block.
      batch_size: images perturbed at once.
      mesh: from how many images to the devices that a block of them is spread over.
      show: is told, after each block, how many images are done and what share of them is robust.
      save: what the names of the blocks' files begin with; those that are there aren't attacked
        again. None to write none.

    Raises:
      UsageError: if one of these files is damaged.
    """
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
        show(len(robust), float(robust.mean()))
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
        "clean": found.outcome.clean,
        "robust": found.outcome.robust,
        "norm": found.outcome.norm,
        "nonfinite": found.outcome.nonfinite,
        "invalid": found.outcome.invalid,
        "seconds": np.array(time.perf_counter() - begin),
        "names": np.array(list(found.stages)),
        "tried": np.array([stage.tried for stage in stages]),
        "fooled": np.array([stage.fooled for stage in stages]),
        "stage_seconds": np.array([stage.seconds for stage in stages]),
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
            f"expected the arrays of a block in {path}, got: {error}; delete the file, and the "
            "same command makes it again"
        ) from error


def _together(blocks: list[Block]) -> Attacked:
    names = ("clean", "robust", "norm", "nonfinite", "invalid")
    images = {name: np.concatenate([block[name] for block in blocks]) for name in names}
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
        }
    seconds = round(float(sum(block["seconds"] for block in blocks)), 1)
    return Attacked(**images, stages=stages, seconds=seconds)
