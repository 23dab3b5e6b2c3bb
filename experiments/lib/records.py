"""Rows of results.json: what a run leaves behind, and the source of every table and figure.

The JSON is a list of rows; tables and figures can be drawn again from it alone.
"""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

import jaxadv
from experiments.lib import options

__all__ = ["RESULTS", "cores", "device", "load", "save", "versions"]

RESULTS = Path(__file__).resolve().parents[1] / "results"
"""The records that are committed."""

Row = dict[str, Any]


def versions() -> dict[str, str]:
    """Return the versions that a result depends on."""
    packages = ("jax", "jaxlib", "flax", "optax", "numpy")
    return {
        "python": platform.python_version(),
        "jaxadv": jaxadv.__version__,  # known to a checkout that isn't installed, too
        **{name: version(name) for name in packages},
    }


def device() -> str:
    """Return the kind and number of devices, e.g. `cpu x1 (2 cores)`."""
    first = jax.devices()[0]
    if first.platform != "cpu":
        return f"{first.device_kind} x{jax.device_count()}"
    n = cores()
    return f"cpu x{jax.device_count()} ({n} core{'' if n == 1 else 's'})"


def cores() -> int:
    """Return how many of the machine's cores this process may use."""
    allowed = getattr(os, "sched_getaffinity", None)  # which of them, no system but Linux's says
    return len(allowed(0)) if allowed else os.cpu_count() or 1


def load(path: Path, fields: Sequence[str] = ("experiment",)) -> list[Row]:
    """Return the rows written so far; none if there is no such file.

    Args:
      path: of the file.
      fields: what every row must have.

    Raises:
      UsageError: if the file isn't a list of such rows.
    """
    if not path.exists():
        return []
    try:
        rows = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise options.UsageError(
            f"expected JSON in {path}, got: {error}; move it away, or choose another folder"
        ) from error
    found = "something else"
    if isinstance(rows, list) and all(isinstance(row, dict) for row in rows):
        lacking = [name for name in fields if any(row.get(name) is None for row in rows)]
        if not lacking:
            return rows
        found = f"some without {lacking[0]}"
    raise options.UsageError(
        f"expected a list of rows with {', '.join(fields)} in {path}, got {found}; move it away, "
        "or choose another folder"
    )


def save(path: Path, rows: Sequence[Row]) -> None:
    """Write the rows, whole or not at all; what isn't finite, which JSON has not, as null."""
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(_finite(rows), indent=1, allow_nan=False) + "\n")
    os.replace(unfinished, path)


def _finite(content: Any) -> Any:
    if isinstance(content, Mapping):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content
