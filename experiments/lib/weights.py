"""Weights as safetensors, with the meaning of the net's inputs and logits."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as serialised

from experiments.lib import cache, data, models, options
from jaxadv.types import Params


def save(
    path: str | os.PathLike[str],
    params: Any,
    dtype: DTypeLike | None = None,
    *,
    interface: data.Interface | None = None,
    made: Mapping[str, Any] | None = None,
) -> None:
    """Write parameters as safetensors, named by their paths joined by "/".

    Args:
      path: the file.
      params: a pytree.
      dtype: dtype to round arrays to; None for their own.
      interface: meaning of the net's inputs and logits; the function `interface` reads it back.
      made: how the weights were made, in JSON's types; the function `made` reads it back.

    Raises:
      ValueError: if two of the pytree's paths give the same name.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # In C order, since safetensors ignores strides and copies an array's memory as it is.
    named = {
        name: np.asarray(leaf, dtype, order="C") for name, leaf in models.by_path(params).items()
    }
    said: dict[str, Any] = {} if made is None else {"made": made}
    if interface is not None:
        said["interface"] = interface._asdict()
    metadata = {key: json.dumps(value) for key, value in said.items()} or None
    with cache.replacing(path) as file:
        file.write(_sorted(serialised(named, metadata)))


def _sorted(content: bytes) -> bytes:
    """Return safetensors with a sorted header: the library writes metadata in a random order."""
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    text = json.dumps(header, ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the arrays start at a multiple of 8
    return len(text).to_bytes(8, "little") + text + content[end:]


def load(path: Path, dtype: DTypeLike | None = None) -> Params:
    """Return the arrays of a safetensors file, nested by the parts of their names.

    Args:
      path: the file.
      dtype: floating-point dtype to convert the arrays to; None to keep their own.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if it isn't an intact safetensors file, if a name is both an array and a folder of
        arrays, or if arrays that aren't floating-point would be converted.
    """
    with _opened(path) as file:
        names = sorted(file.keys())  # a name sorts before the names inside it
        arrays = [file.get_tensor(name) for name in names]
    others = [
        f"{array.dtype} in {name}"
        for name, array in zip(names, arrays, strict=True)
        if not jnp.issubdtype(array.dtype, jnp.floating)
    ]
    if dtype is not None and others:
        raise options.UsageError(
            f"expected floating-point weights in {path}, got {', '.join(others)}; write them as "
            "floating-point numbers, scaled as the net uses them"
        )
    params: dict[str, Any] = {}
    for name, array in zip(names, arrays, strict=True):
        *folders, leaf = name.split("/")
        inner = params
        for folder in folders:
            inner = inner.setdefault(folder, {})
            if not isinstance(inner, dict):
                raise options.UsageError(
                    f"expected each name in {path} to be an array or a folder of arrays, got one "
                    f"that is both, on the way to {name}; rename one of them"
                )
        inner[leaf] = jnp.asarray(array, dtype)
    return params


def load_net(path: Path, shape: Sequence[int]) -> tuple[models.Classifier, Params]:
    """Return the net that a file of weights belongs to, and its parameters, as float32.

    Args:
      path: the file.
      shape: shape of the images that the net is for, (H, W, C).

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: as `load`; or if the weights aren't those of a net of `models` for such images.
    """
    params = load(path, jnp.float32)
    try:
        return models.recognised(params, shape), params
    except ValueError as error:
        raise options.UsageError(f"in {path}: {error}") from error


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    if not path.is_file():
        raise FileNotFoundError(
            f"expected a file of weights, got {path}, which doesn't exist; "
            "name a .safetensors file, or module:function"
        )
    try:
        with safe_open(path, "numpy") as file:
            yield file
    except SafetensorError as error:
        raise options.UsageError(
            f"expected safetensors in {path}, got: {error}; write it again, e.g. with "
            "safetensors.flax.save_file"
        ) from error


def made(path: Path) -> dict[str, Any] | None:
    """Return how a file's weights were made; None if that isn't recorded, or there is no file."""
    return _said(path, "made") if path.is_file() else None


def interface(path: Path) -> data.Interface | None:
    """Return the interface of the weights' net; None if it isn't recorded.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if what is recorded isn't an interface.
    """
    said = _said(path, "interface")
    if said is None:
        return None
    optional = data.Interface._field_defaults.keys()  # older files lack some
    if said.keys() | optional != set(data.Interface._fields):
        raise options.UsageError(
            f"expected {', '.join(data.Interface._fields)} of the interface in {path}, got "
            f"{', '.join(said)}; write it again by weights.save"
        )
    return data.Interface(**said | {name: tuple(said[name]) for name in ("classes", "shape")})


def _said(path: Path, key: str) -> dict[str, Any] | None:
    with _opened(path) as file:
        text = (file.metadata() or {}).get(key)
    try:
        return None if text is None else dict(json.loads(text))
    except (TypeError, ValueError) as error:
        raise options.UsageError(
            f"expected a JSON object as {key!r} in the metadata of {path}, got {text!r}; write it "
            "again by weights.save"
        ) from error
