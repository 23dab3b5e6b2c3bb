"""Folders of images, DIR/{train,test}/CLASS/*.png or jpg: listed, checked and decoded.

Without a folder `test`, every fifth image of each class is held out for testing, in the order of
their names, so that each command that reads the folder holds out the same.
"""

import os
import unicodedata
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from experiments.lib import options

Files = Mapping[str, Mapping[str, list[Path]]]
"""The images of each class of `train` and of `test`."""
_LAYOUT = (
    "the layout is DIR/train/CLASS/*.png and DIR/test/CLASS/*.png, or only DIR/CLASS/*.png, to "
    "hold out every fifth image for testing"
)


def files(folder: Path) -> Files:
    """Return the images of each class of `train` and `test`, in the order of their names.

    Raises:
      FileNotFoundError: if a part, or a class of one of the parts, is missing.
      UsageError: if there is only one class, if a file isn't an image, or if there are too few
        images to hold some out.
    """
    whole = unsplit(folder)
    if whole is None:
        found = {part: _classes(folder / part) for part in ("train", "test")}
    else:
        found = _split(whole)
    for part in found:
        for name in sorted(found["train"].keys() | found["test"].keys()):
            if not found[part].get(name):
                raise FileNotFoundError(
                    f"expected images of class {name!r} in {folder / part / name}, got none; each "
                    "class needs images in both train and test; add some, or remove the class"
                )
    if len(found["train"]) < 2:
        raise options.UsageError(
            f"expected folders of at least two classes in {whole or folder / 'train'}, got "
            f"{len(found['train'])}; {_LAYOUT}"
        )
    return found


def unsplit(folder: Path) -> Path | None:
    """Return the folder of the classes if there is no folder `test`, so that images are held out.

    Raises:
      FileNotFoundError: if there is no such folder.
      UsageError: if there are other folders beside `train`, since one may be meant for testing.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"expected a folder of images {folder}, got none; {_LAYOUT}")
    there = [path.name for path in _visible(folder) if path.is_dir()]
    if "test" in there:
        return None
    if "train" not in there:
        return folder
    if others := [name for name in there if name != "train"]:
        raise options.UsageError(
            f"expected the images for testing in {folder / 'test'}, got {', '.join(others)} beside "
            "train; rename their folder to test, or remove all but train to hold out every fifth "
            "image"
        )
    return folder / "train"


def _split(whole: Path) -> dict[str, dict[str, list[Path]]]:
    """Hold out every fifth image of each class."""
    classes = _classes(whole)
    for name, images in classes.items():
        if len(images) < 2:
            raise options.UsageError(
                f"expected at least two images of each class, one of them for testing, got "
                f"{len(images)} of class {name!r} in {whole}; add some, or remove the class"
            )
    return {
        "train": {
            name: [path for i, path in enumerate(images) if i % 5]
            for name, images in classes.items()
        },
        "test": {name: images[::5] for name, images in classes.items()},
    }


def _classes(part: Path) -> dict[str, list[Path]]:
    if not part.is_dir():
        raise FileNotFoundError(
            f"expected a folder {part} with a folder of images for each class, got none; {_LAYOUT}"
        )
    places: dict[str, Path] = {}
    for place in _visible(part):
        if not place.is_dir():
            raise options.UsageError(
                f"expected only folders in {part}, one for each class, got {place}; "
                "move it into the folder of its class, or remove it"
            )
        other = places.setdefault(composed(place.name), place)
        if other != place:
            raise options.UsageError(
                f"expected one folder for each class, got two in {part} whose names "
                f"look alike, {other.name!a} and {place.name!a}; merge them"
            )
    return {name: _images(places[name]) for name in sorted(places)}


def _images(place: Path) -> list[Path]:
    found = _visible(place)
    for path in found:
        if not path.exists():
            raise options.UsageError(
                f"expected an image in {path}, got a link to {os.readlink(path)}, which isn't "
                "there; mend or remove it"
            )
        if path.suffix.lower() not in (".png", ".jpg", ".jpeg") or not path.is_file():
            raise options.UsageError(
                f"expected PNG or JPEG images in {place}, got {path}; convert or remove it; "
                f"{_LAYOUT}"
            )
    return found


def _visible(place: Path) -> list[Path]:
    return sorted(path for path in place.iterdir() if not path.name.startswith("."))


def paths(found: Files) -> Iterator[Path]:
    """Return the paths of all images."""
    return (path for part in found.values() for images in part.values() for path in images)


def composed(name: str) -> str:
    """Return a name in Unicode NFC, so that names that look equal are equal strings."""
    return unicodedata.normalize("NFC", name)


def is_jpeg(path: Path) -> bool:
    """Return whether a file is a JPEG, whatever its name."""
    return _head(path)[:2] == b"\xff\xd8"


def _head(path: Path) -> bytes:
    """Return a file's first bytes: the format's signature, and the bit depth of a PNG."""
    with path.open("rb") as file:
        return file.read(25)


def decoded(path: Path) -> Any:
    """Return an upright Pillow image, of mode L if it is stored in grey, else RGB.

    Raises:
      UsageError: if it can't be decoded, has several frames, transparent pixels, or 16 bits.
    """
    from PIL import Image, ImageOps

    def refused(got: str, cure: str) -> options.UsageError:
        return options.UsageError(
            f"expected an opaque image of 8 bits for each pixel and colour in {path}, got {got}; "
            f"{cure}, or remove it"
        )

    try:
        with warnings.catch_warnings():
            # Pillow warns above a size, and raises above twice that size only.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            opened: Any = Image.open(path, formats=("PNG", "JPEG"))
        with opened:
            png = opened.format == "PNG"
            frames = opened.n_frames if png else 1  # a JPEG's others are previews of the first
            upright = ImageOps.exif_transpose(opened)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise refused(f"one larger than Pillow decodes ({error})", "make it smaller") from error
    except Exception as error:  # the type depends on what is broken
        raise refused(f"a file that can't be decoded ({error})", "replace it") from error
    if png and _head(path)[24] == 16:  # Pillow keeps the upper 8 bits of colours, and clips greys
        raise refused("one of 16 bits", "scale it to 8 bits")
    if frames > 1:
        raise refused(f"an animation of {frames} frames", "choose one of them")
    image: Any = upright
    if upright.getbands()[-1] == "A" or "transparency" in upright.info:
        image = upright.convert("RGBA")
        if image.getchannel("A").getextrema()[0] < 255:
            raise refused("one with transparent pixels", "lay it on a background of your choice")
    colours = np.asarray(image.convert("RGB"))
    stored_grey = upright.mode in ("1", "L", "LA") or (
        upright.mode in ("P", "PA") and (colours == colours[..., :1]).all()
    )
    return Image.fromarray(colours[..., 0] if stored_grey else colours)


def square(image: Any, side: int) -> Any:
    """Return the middle square of a Pillow image, resized."""
    from PIL import ImageOps

    return ImageOps.fit(image, (side, side))
