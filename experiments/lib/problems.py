"""The net and the images that a command line names, brought together.

A file of weights says which classes its net knows, the size of its images, and how pixels become
its inputs, if `weights.save` was given them, as train.py and the experiments do. Then images are
scaled as it says, labels are matched to its logits by the names of the classes, and what
contradicts it is an error. Otherwise the data's classes are taken to be the net's, in their order.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax.typing import ArrayLike
from numpy.typing import NDArray

from experiments.lib import data, folders, models, options, records, weights
from experiments.lib.options import Checked, Count, Positive, Range, distinct
from jaxadv.types import ApplyFn, Bounds, Params

_USUAL = {"mnist": data.MNIST, "cifar10": data.CIFAR10_CROPS}
"""How pixels are scaled where no weights say."""


@dataclasses.dataclass(frozen=True)
class Settings(Checked):
    """A net, and images for it."""

    net: Annotated[str, tyro.conf.Positional]
    """A file of weights, or `module:function`."""
    name: str = ""
    """What to call the net in the table; by default the function, and the weights' place."""
    weights: Path | None = None
    """Parameters for a function of one's own."""
    data: str = "mnist"
    """`mnist`, `cifar10`, `tfds:NAME`, or a folder with {train,test}/CLASS/*.png or jpg; test is
    evaluated."""
    subtract: Annotated[float, Range()] | None = None
    """Inputs are (pixels - subtract) / divide. By default as the weights say; if they don't, 0 and
    256 for mnist, 117 and 256 for cifar10, 0 and 255 for others."""
    divide: Positive | None = None
    """See subtract. The box is where pixels from 0 to this end up."""
    crop: Count | None = None
    """Side of the part of the images' middle that is used. By default as the weights say; if they
    don't, 28 for cifar10, else all."""
    resize: Count | None = None
    """Side of the square that each image's middle is resized to, before all else. By default as
    the weights say; if they don't, images stay as they are."""
    classes: Annotated[tuple[str, ...], distinct] = ()
    """The data's names of the net's classes, in the order of its logits. By default what the
    weights call them; if they don't say, the data's classes in their order."""
    box: bool = True
    """Whether perturbed images stay in the range of pixels."""
    n: Count = 1000
    """How many test images."""

    def __post_init__(self) -> None:
        """Check what goes together.

        Raises:
          UsageError: if there are weights beside a file of weights.
        """
        super().__post_init__()
        if self.weights is not None and ":" not in self.net:
            raise options.UsageError(
                f"expected --weights with a net as module:function only, got {self.weights} beside "
                f"{self.net}, whose weights are its own; leave one of them out"
            )


class Problem(NamedTuple):
    """What is evaluated."""

    apply_fn: ApplyFn
    params: Params
    x: np.ndarray
    y: np.ndarray
    bounds: Bounds | None
    identity: dict[str, Any]  # all that the figures depend on but attack, size and seed

    def correct(self, x: ArrayLike) -> jax.Array:
        """Say which of these images, perturbed or not, are classified correctly."""
        return self.apply_fn(self.params, jnp.asarray(x)).argmax(-1) == self.y


def load_net(settings: Settings, x: NDArray[np.float32]) -> tuple[ApplyFn, Params, str, int]:
    """Return the net, its parameters, its description, and its number of classes.

    Args:
      settings: what names it.
      x: an input, `[1, H, W, C]`.

    Raises:
      FileNotFoundError: if a file of weights isn't there.
      ValueError: if the module or its function isn't there, or if the weights aren't those of a net
        of this folder, or of the function, for such inputs.
    """
    if ":" not in settings.net:
        net, params = weights.load_net(Path(settings.net), x.shape[1:])
        return models.function(net), params, models.describe(net), net.classes
    apply_fn = options.imported(settings.net)
    params = None if settings.weights is None else weights.load(settings.weights)
    return apply_fn, params, settings.net, _classes_of(settings, apply_fn, params, x)


def _classes_of(
    settings: Settings, apply_fn: ApplyFn, params: Params, x: NDArray[np.float32]
) -> int:
    """Return the number of classes of a user's function; an error if it can't be run."""
    asked = f"expected {settings.net} to give logits [1, K] of an input {list(x.shape)}"
    try:
        logits = jax.eval_shape(apply_fn, params, jax.ShapeDtypeStruct(x.shape, x.dtype))
    except Exception as error:  # of any kind: it is the caller's function
        arrays = [f"{name} {list(leaf.shape)}" for name, leaf in models.by_path(params).items()]
        given = f"{', '.join(arrays)} of {settings.weights}" if arrays else "no parameters"
        raise options.UsageError(
            f"{asked} and {given}, got {type(error).__name__}: {error}; give the weights of this "
            "net by --weights, and images like those that it was trained on"
        ) from error
    if getattr(logits, "ndim", None) != 2 or logits.shape[0] != 1:
        got = getattr(logits, "shape", type(logits).__name__)
        raise options.UsageError(
            f"{asked}, got {got}; return the logits of each image, nothing else"
        )
    return int(logits.shape[1])


def load(settings: Settings) -> Problem:
    """Return the net and the images.

    Raises:
      FileNotFoundError: as `load_net`.
      UsageError: as `load_net`; if the crop is larger than the images; if inputs would overflow, or
        leave the box; if the net's classes aren't the data's, or an option or the images contradict
        what the weights say.
    """
    path = settings.weights if ":" in settings.net else Path(settings.net)
    said = None if path is None else weights.interface(path)
    resize = (said and said.resize) or settings.resize
    images = data.named(settings.data, resize=resize)
    taken = _interface(settings, said, images)
    greatest = images.test_images.max() if settings.box else None
    _check_scale(taken.subtract, taken.divide, greatest)
    chosen = data.order(settings.data, len(images.test_labels))[: settings.n]
    x = taken.inputs(images.test_images[chosen])
    apply_fn, params, network, n_classes = load_net(settings, x[:1])
    if len(taken.classes) != n_classes:
        of = "--classes" if settings.classes else "the data" if said is None else "its weights"
        raise options.UsageError(
            f"expected {n_classes} classes, as the net has logits, got {len(taken.classes)} of "
            f"{of} ({_listed(taken.classes)}); choose data like what the net was trained on, or "
            "give the data's name for each of its classes by --classes, in the order of its logits"
        )
    number = {i: taken.classes.index(name) for i, name in enumerate(images.classes)}
    y = np.array([number.get(label, -1) for label in images.test_labels[chosen].tolist()], np.int32)
    low = -taken.subtract / taken.divide
    bounds = (low, (taken.divide - taken.subtract) / taken.divide) if settings.box else None
    folder = settings.data not in _USUAL and not settings.data.startswith("tfds:")
    identity: dict[str, Any] = {
        "experiment": "evaluate",
        "method": settings.name or _short_name(settings),
        "network": network,
        "weights": digest(params),
        "data": (data.describe(settings.data, images) if folder else settings.data)
        + (f", resized to {resize}x{resize}" if resize else ""),
        "subtract": taken.subtract,
        "divide": taken.divide,
        "crop": taken.crop,
        "box": settings.box,
        "n": len(chosen),
    }
    if said is not None or settings.classes:
        identity["classes"] = list(taken.classes)
        identity["notes"] = _notes(taken, said, images)
    if held_out := data.held_out(settings.data):
        identity.setdefault("notes", []).append(held_out)
    if ":" in settings.net:  # what a function does, no weights tell
        identity["answers"] = digest(apply_fn(params, jnp.asarray(x[:8])))
    return Problem(apply_fn, params, x, y, bounds, identity)


def on_record(net: str, folder: Path, n: int, image_folder: Path | None) -> Problem:
    """Return a net on record, RECORD/METHOD, and its first n test images.

    Args:
      net: e.g. `mnist_mlp/lwa`.
      folder: where the records are.
      n: how many images.
      image_folder: where CIFAR-10's are, for its nets; None to download it.
    """
    weights = str(folder / net / "params.safetensors")
    if not net.startswith("cifar10"):
        return load(Settings(net=weights, n=n))
    images = str(image_folder or "cifar10")
    return load(Settings(net=weights, data=images, subtract=117, divide=256, crop=28, n=n))


def _interface(
    settings: Settings, said: data.Interface | None, images: data.Dataset
) -> data.Interface:
    """Return how pixels become inputs, and the data's name for each logit's class.

    Args:
      settings: the options.
      said: what the weights say; None if nothing.
      images: the data.

    Raises:
      UsageError: if an option or the data contradicts what the weights say; if a class of the data
        is none of the net's; or if the crop is larger than the images.
    """
    height, width, channels = images.test_images.shape[1:]
    usual = _USUAL.get(settings.data, data.WHOLE)._replace(classes=images.classes)
    scale = {name: getattr(settings, name) for name in ("subtract", "divide", "crop", "resize")}
    given = {name: value for name, value in scale.items() if value is not None}
    taken = (said or usual)._replace(**given)
    if taken.crop and taken.crop > min(height, width):
        raise options.UsageError(
            f"expected --crop to be at most {min(height, width)}, got {taken.crop}; images are "
            f"{height}x{width}; choose larger ones, or a smaller --crop"
        )
    if settings.classes:
        taken = taken._replace(classes=tuple(map(folders.composed, settings.classes)))
    taken = taken._replace(shape=(taken.crop or height, taken.crop or width, channels))

    wrong = []
    if said is not None:
        other = {name: value for name, value in given.items() if value != getattr(said, name)}
        if taken.shape == said.shape:  # a crop of the whole is none
            other.pop("crop", None)
        if said.resize is None:  # other images may have to be resized to the size of its own
            other.pop("resize", None)
        if other:
            wrong.append(
                f"expected images scaled as the weights say, (pixels - {said.subtract:g}) / "
                f"{said.divide:g}"
                + (f" of the middle {said.crop}x{said.crop}" if said.crop else "")
                + (f", resized to {said.resize}x{said.resize}" if said.resize else "")
                + f", got {' '.join(f'--{name} {value:g}' for name, value in other.items())}; "
                "leave these options out"
            )
        taken = taken._replace(crop=said.crop)
        if taken.shape != said.shape:
            wrong.append(
                f"expected images of {_by(said.shape)}, as the weights say, got "
                f"{_by(taken.shape)}; choose others, or resize them, e.g. to NxN by --resize N, or "
                "convert them"
            )
    unknown = [name for name in images.classes if name not in taken.classes]
    if unknown or len(set(taken.classes)) < len(taken.classes):
        wrong.append(
            f"expected the {len(images.classes)} classes of the data ({_listed(images.classes)}) "
            f"among the {len(taken.classes)} of the net ({_listed(taken.classes)}), once each; "
            "choose other data, or, if they are the same by other names, give the data's name for "
            "each class of the net by --classes, in the order of its logits"
        )
    if wrong:
        raise options.UsageError("\n".join(wrong))
    return taken


def _notes(taken: data.Interface, said: data.Interface | None, images: data.Dataset) -> list[str]:
    """Return notes on the classes, for readers of the figures."""
    notes = []
    if said is not None and said.classes != taken.classes:
        notes.append(
            f"the classes that its weights call {_listed(said.classes)} were taken for the data's "
            f"{_listed(taken.classes)}"
        )
    if absent := [name for name in taken.classes if name not in images.classes]:
        notes.append(f"the data has no images of its classes {_listed(absent)}")
    return notes


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def _by(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def _check_scale(subtract: float, divide: float, greatest: int | None) -> None:
    """Refuse inputs that overflow; and a box that the greatest pixel, if it is given, is out of."""
    if max(abs(pixel - subtract) for pixel in (0, 255)) / divide > float(np.finfo(np.float32).max):
        raise options.UsageError(
            f"expected --subtract and --divide to give inputs within float32's range, got "
            f"{subtract:g} and {divide:g}; choose a larger --divide"
        )
    if greatest is not None and greatest > divide:
        raise options.UsageError(
            f"expected --divide to be at least {greatest}, the greatest pixel, got {divide:g}; "
            "choose a larger one, or --no-box"
        )


def _short_name(settings: Settings) -> str:
    """Return a net's default name: its function, and the place of its weights."""

    def place(path: Path) -> str:
        *_, group, folder, name = "", *path.resolve().with_suffix("").parts
        return f"{group}/{folder}" + ("" if name == "params" else f"/{name}")

    if ":" not in settings.net:
        return place(Path(settings.net))
    return settings.net + ("" if settings.weights is None else f", {place(settings.weights)}")


def digest(params: Params) -> str:
    """Return a checksum of parameters."""
    content = hashlib.sha256()
    for leaf in jax.tree.leaves(params):
        content.update(np.ascontiguousarray(leaf).tobytes())
    return content.hexdigest()[:16]


def recorded(net: str, n: int) -> Problem:
    """Return a recorded net, e.g. `mnist_mlp/lwa`, and the first n test images of MNIST."""
    return load(Settings(net=str(records.RESULTS / net / "params.safetensors"), n=n))
