"""Prepared arrays, stored once and memory-mapped from then on.

A process may be killed at any moment, and two may prepare the same data at once. Hence:

- One process at a time prepares, under a lock that the system releases when its holder ends.
- Each file is renamed into place once it is complete.
- Checksums are written last, and each call checks the arrays against them. Arrays that don't match
  are prepared again.
"""

import fcntl
import json
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

_CHECKSUMS = "checksums.json"


class Arrays(NamedTuple):
    """Images and labels of a data set's training and test parts."""

    train_images: NDArray[Any]  # [N, H, W, C] uint8
    train_labels: NDArray[Any]  # [N] int32
    test_images: NDArray[Any]  # [M, H, W, C] uint8
    test_labels: NDArray[Any]  # [M] int32


def directory() -> Path:
    """Return the folder where prepared data is kept.

    It is `$JAXADV_DATA`, or else `$XDG_CACHE_HOME/jaxadv`, or else `~/.cache/jaxadv`.
    """
    if chosen := os.environ.get("JAXADV_DATA"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "jaxadv"


def arrays(name: str, prepare: Callable[[Path], Arrays]) -> Arrays:
    """Return the arrays stored under a name; prepare and store them if there are none.

    Args:
      name: name of their folder.
      prepare: makes the arrays; it is given a folder that it may use.
    """
    place = directory() / name
    unusable = (OSError, ValueError)
    with suppress(*unusable):
        return _open(place)
    place.mkdir(parents=True, exist_ok=True)
    with locked(place):
        with suppress(*unusable):
            return _open(place)  # another process prepared them while this one waited
        store(place, prepare(place / "prepared"))
        return _open(place)


def _open(place: Path) -> Arrays:
    """Map the stored arrays; raise OSError or ValueError if they are missing or damaged."""
    expected = json.loads((place / _CHECKSUMS).read_text())
    got = _checksums(place)
    if got != expected:
        raise ValueError(f"expected checksums {expected} in {place}, got {got}; delete it")
    return Arrays(*(np.load(file, mmap_mode="r") for file in _files(place)))


def store(place: Path, content: Arrays) -> None:
    """Write arrays and, last, their checksums, without which the arrays are ignored."""
    for path, array in zip(_files(place), content, strict=True):
        with replacing(path) as file:
            np.save(file, array)
    with replacing(place / _CHECKSUMS) as file:
        file.write(json.dumps(_checksums(place)).encode())


def _files(place: Path) -> list[Path]:
    return [place / f"{name}.npy" for name in Arrays._fields]


def _checksums(place: Path) -> dict[str, int]:
    """Return checksums of whole files (55 MB in 0.05 s): headers hold shapes and dtypes."""
    return {path.name: zlib.crc32(path.read_bytes()) for path in _files(place)}


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Wait until no other process holds the folder's lock, then hold it."""
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Replace a file atomically: readers never see half of it, and old mappings stay valid."""
    unfinished = path.with_suffix(".unfinished")
    with unfinished.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)
