"""The net and the images that a command line names, made to fit each other.

A file of weights written by train.py or the experiments also records the net's classes, the size of
its images, and how pixels are scaled to inputs (`weights.save`). Images are then scaled in this
way, labels are matched to logits by class name, and anything that contradicts the file is an error.
For other files and functions, the data's classes are taken to be the net's, in the same order.
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
"""How pixels are scaled if the weights don't say."""


@dataclasses.dataclass(frozen=True)
class Settings(Checked):
    """A net, and images for it."""

    net: Annotated[str, tyro.conf.Positional]
    """A file of weights, or `module:function`."""
    name: str = ""
    """What to call the net in the table; by default its function and the folder of its weights."""
    weights: Path | None = None
    """File of parameters for a net given as a function."""
    data: str = "mnist"
    """`mnist`, `cifar10`, `tfds:NAME`, or a folder with {train,test}/CLASS/*.png or jpg. Its test
    images are used."""
    subtract: Annotated[float, Range()] | None = None
    """Inputs are (pixels - subtract) / divide. By default as recorded in the weights; failing that,
    0 and 256 for mnist, 117 and 256 for cifar10, 0 and 255 for others."""
    divide: Positive | None = None
    """See subtract. The box is the range of inputs for pixels from 0 to this."""
    crop: Count | None = None
    """Side of the centre crop that is used. By default as recorded in the weights; failing that, 28
    for cifar10, and whole images for others."""
    resize: Count | None = None
    """Side of the square that each image's largest centre square is resized to, before anything
    else. By default as recorded in the weights; failing that, images keep their size."""
    classes: Annotated[tuple[str, ...], distinct] = ()
    """The data's names for the net's classes, in the order of its logits. By default the names
    recorded in the weights; failing that, the data's classes in their own order."""
    box: bool = True
    """Whether perturbed images stay in the range of pixels."""
    n: Count = 1000
    """How many test images."""

    def __post_init__(self) -> None:
        """Check options against each other.

        Raises:
          UsageError: if --weights is given and the net is itself a file of weights.
        """
        super().__post_init__()
        if self.weights is not None and ":" not in self.net:
            raise options.UsageError(
                f"expected --weights only with a net given as module:function, got {self.weights} "
                f"with {self.net}, which is a file of weights itself; leave one of them out"
            )


ANSWERED = 8
"""How many images identify a user's function, by its logits."""


class Problem(NamedTuple):
    """A net and the images to evaluate it on."""

    apply_fn: ApplyFn
    params: Params
    x: np.ndarray
    y: np.ndarray
    bounds: Bounds | None
    identity: dict[str, Any]  # everything the figures depend on except attack, size and seed

    @property
    def low(self) -> float:
        """The lowest value of a pixel; 0 without a box."""
        return float(np.min(self.bounds[0])) if self.bounds else 0.0

    def correct(self, x: ArrayLike) -> jax.Array:
        """Return which of these images, perturbed or not, are classified correctly."""
        return self.apply_fn(self.params, jnp.asarray(x)).argmax(-1) == self.y


def load_net(settings: Settings, x: NDArray[np.float32]) -> tuple[ApplyFn, Params, str, int]:
    """Return the net, its parameters, its description, and its number of classes.

    Args:
      settings: the options that name it.
      x: an input, `[1, H, W, C]`.

    Raises:
      FileNotFoundError: if there is no such file of weights.
      ValueError: if there is no such module or function, or if the weights don't fit a net of
        `models`, or the function, for such inputs.
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
    """Return the number of classes of a user's function; raise an error if it can't be run."""
    asked = f"expected {settings.net} to give logits [1, K] for an input {list(x.shape)}"
    try:
        logits = jax.eval_shape(apply_fn, params, jax.ShapeDtypeStruct(x.shape, x.dtype))
    except Exception as error:  # a user's function may raise anything
        arrays = [f"{name} {list(leaf.shape)}" for name, leaf in models.by_path(params).items()]
        given = f"{', '.join(arrays)} of {settings.weights}" if arrays else "no parameters"
        raise options.UsageError(
            f"{asked} and {given}, got {type(error).__name__}: {error}; pass this net's weights "
            "with --weights, and images like those that it was trained on"
        ) from error
    if getattr(logits, "ndim", None) != 2 or logits.shape[0] != 1:
        got = getattr(logits, "shape", type(logits).__name__)
        raise options.UsageError(f"{asked}, got {got}; return only the logits of each image")
    return int(logits.shape[1])


def load(settings: Settings) -> Problem:
    """Return the net and the images.

    Raises:
      FileNotFoundError: as `load_net`.
      UsageError: as `load_net`; if the crop is larger than the images; if inputs would overflow or
        leave the box; if the net's classes aren't the data's; or if an option or the images
        contradict what the weights record.
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
            f"expected {n_classes} classes, one per logit, got {len(taken.classes)} from {of} "
            f"({_listed(taken.classes)}); choose data like what the net was trained on, or give "
            "the data's name for each of its classes with --classes, in the order of its logits"
        )
    number = {i: taken.classes.index(name) for i, name in enumerate(images.classes)}
    y = np.array([number.get(label, -1) for label in images.test_labels[chosen].tolist()], np.int32)
    bounds = taken.box if settings.box else None
    folder = data.is_folder(settings.data)
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
        taught = path and (weights.made(path) or {}).get("images")
        if taught and taught != data.fingerprint(images):
            identity["notes"].append(
                "the net was trained on other images than these; if they are of the same folder, "
                "training images may be among the test images, and the accuracies too high"
            )
    if ":" in settings.net:  # the weights don't identify the function
        identity["answers"] = digest(apply_fn(params, jnp.asarray(x[:ANSWERED])))
    return Problem(apply_fn, params, x, y, bounds, identity)


def recorded(
    net: str, n: int, folder: Path = records.RESULTS, image_folder: Path | None = None
) -> Problem:
    """Return a recorded net, RECORD/METHOD, and the first n test images of its data.

    Args:
      net: e.g. `mnist_mlp/lwa`.
      n: number of images.
      folder: folder of the records.
      image_folder: folder of CIFAR-10's images, for its nets; None to download them.
    """
    weights = str(folder / net / "params.safetensors")
    return load(Settings(net=weights, n=n, **images_of(net.split("/")[0], image_folder)))


def images_of(record: str, image_folder: Path | None = None) -> dict[str, Any]:
    """Return the options for the images that the nets of a record are for."""
    if record != "cifar10":
        return {}
    crops = data.CIFAR10_CROPS
    return {
        "data": str(image_folder or "cifar10"), "subtract": crops.subtract, "divide": crops.divide,
        "crop": crops.crop,
    }  # fmt: skip


def _interface(
    settings: Settings, said: data.Interface | None, images: data.Dataset
) -> data.Interface:
    """Return how pixels become inputs, and the data's name for each logit's class.

    Args:
      settings: the options.
      said: what the weights record; None if nothing.
      images: the data.

    Raises:
      UsageError: if an option or the data contradicts what the weights record; if the data has a
        class that the net doesn't; or if the crop is larger than the images.
    """
    height, width, channels = images.test_images.shape[1:]
    usual = _USUAL.get(settings.data, data.WHOLE)._replace(classes=images.classes)
    scale = {name: getattr(settings, name) for name in ("subtract", "divide", "crop", "resize")}
    given = {name: value for name, value in scale.items() if value is not None}
    taken = (said or usual)._replace(**given)
    if taken.crop and taken.crop > min(height, width):
        raise options.UsageError(
            f"expected --crop to be at most {min(height, width)}, since images are "
            f"{height}x{width}, got {taken.crop}; choose larger images, or a smaller --crop"
        )
    if settings.classes:
        taken = taken._replace(classes=tuple(map(folders.composed, settings.classes)))
    taken = taken._replace(shape=(taken.crop or height, taken.crop or width, channels))

    wrong = []
    if said is not None:
        other = {name: value for name, value in given.items() if value != getattr(said, name)}
        if taken.shape == said.shape:  # cropping to the whole image changes nothing
            other.pop("crop", None)
        if said.resize is None:  # images of another size may need it
            other.pop("resize", None)
        if other:
            wrong.append(
                f"expected images scaled as the weights record, (pixels - {said.subtract:g}) / "
                f"{said.divide:g}"
                + (f" of the middle {said.crop}x{said.crop}" if said.crop else "")
                + (f", resized to {said.resize}x{said.resize}" if said.resize else "")
                + f", got {' '.join(f'--{name} {value:g}' for name, value in other.items())}; "
                "leave these options out"
            )
        taken = taken._replace(crop=said.crop)
        if taken.shape != said.shape:
            wrong.append(
                f"expected images of {_by(said.shape)}, as the weights record, got "
                f"{_by(taken.shape)}; choose others, convert them, or resize them, e.g. to NxN "
                "with --resize N"
            )
    unknown = [name for name in images.classes if name not in taken.classes]
    if unknown or len(set(taken.classes)) < len(taken.classes):
        wrong.append(
            f"expected the {len(images.classes)} classes of the data ({_listed(images.classes)}) "
            f"to be among the {len(taken.classes)} of the net ({_listed(taken.classes)}), once "
            "each; choose other data, or, if only the names differ, give the data's name for each "
            "class of the net with --classes, in the order of its logits"
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
    """Refuse inputs that overflow, and a box that doesn't contain the greatest pixel, if given."""
    if max(abs(pixel - subtract) for pixel in (0, 255)) / divide > float(np.finfo(np.float32).max):
        raise options.UsageError(
            f"expected --subtract and --divide to give inputs within float32's range, got "
            f"{subtract:g} and {divide:g}; choose a larger --divide"
        )
    if greatest is not None and greatest > divide:
        raise options.UsageError(
            f"expected --divide to be at least {greatest}, the largest pixel, got {divide:g}; "
            "choose a larger one, or --no-box; for a net whose inputs aren't from 0 to 1, scale "
            "them in a function of your own"
        )


def _short_name(settings: Settings) -> str:
    """Return a net's default name: its function, and the folder of its weights."""

    def place(path: Path) -> str:
        *_, table, group, folder, name = "", "", *path.resolve().with_suffix("").parts
        if folder.startswith("seed_"):
            group = f"{table}/{group}"
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
