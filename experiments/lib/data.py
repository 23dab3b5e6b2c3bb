"""MNIST, CIFAR-10, the tensorflow-datasets catalogue and folders of images, as arrays.

The four files of MNIST are in `experiments/data/`, so that its experiments run without a network;
`cifar10` downloads; `image_folder` takes any images sorted into folders by class. The first call
checks the files (originals against the size and sha256 that tensorflow-datasets records, images by
decoding each), prepares them as array_record (`builders`), and stores them as arrays (`cache`).
This takes seconds to a minute; later calls only map the arrays into memory.
"""

import difflib
import gzip
import hashlib
import json
import os
import re
import zlib
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from experiments.lib import cache, folders, options
from experiments.lib.cache import Arrays

ORIGINALS = Path(__file__).resolve().parents[1] / "data"
DIGITS = tuple("0123456789")
"""MNIST's classes."""
CIFAR10 = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip
"""CIFAR-10's classes."""
_READING = 2
"""Incremented whenever the same files give other pixels than before, to renew the caches."""
_CROPS = ORIGINALS / "cifar10_crops.npz"
_CIFAR10_PAGE = "https://www.cs.toronto.edu/~kriz/cifar.html"
_CIFAR10_ARCHIVE = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"


class Dataset(NamedTuple):
    """A data set's official training and test parts, as read-only arrays, and its classes.

    Attributes:
        train_images: [N, H, W, C] uint8.
        train_labels: [N] int32, each in 0..K-1.
        test_images: [M, H, W, C] uint8.
        test_labels: [M] int32, each in 0..K-1.
        classes: the K class names, in the order of the labels.
    """

    train_images: NDArray[np.uint8]
    train_labels: NDArray[np.int32]
    test_images: NDArray[np.uint8]
    test_labels: NDArray[np.int32]
    classes: tuple[str, ...]


class Interface(NamedTuple):
    """How images become a net's inputs, and which classes its logits stand for.

    Attributes:
        classes: the K class names, in the order of the logits.
        shape: shape of an input, (H, W, C).
        subtract: inputs are (pixels - subtract) / divide, with pixels from 0 to 255.
        divide: see subtract.
        crop: side of the centre crop that is used; None for whole images.
        resize: side of the square that each image's largest centre square was resized to when it
            was read, before the crop; None for images as they are.
    """

    classes: tuple[str, ...]
    shape: tuple[int, ...]
    subtract: float
    divide: float
    crop: int | None = None
    resize: int | None = None

    @property
    def box(self) -> tuple[float, float]:
        """The range of the inputs, from a pixel of 0 to one of `divide`."""
        return -self.subtract / self.divide, (self.divide - self.subtract) / self.divide

    def inputs(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return the net's inputs: centre crops of this shape, scaled.

        Args:
            pixels: [n, H, W, C] uint8, with H and W at least those of the shape.

        Raises:
            TypeError: if pixels aren't uint8; otherwise scaling them twice would go unnoticed.
            ValueError: if pixels have another number of axes.
        """
        if pixels.dtype != np.uint8:
            raise TypeError(
                f"expected uint8 pixels, got {pixels.dtype}; pass the pixels of a `Dataset`"
            )
        if pixels.ndim != 4:
            raise ValueError(
                f"expected images of shape [n, H, W, C], got {list(pixels.shape)}; for a single "
                "image, pass images[i : i + 1]"
            )
        top, left = (
            (whole - part) // 2
            for whole, part in zip(pixels.shape[1:3], self.shape[:2], strict=True)
        )
        middle = pixels[:, top : top + self.shape[0], left : left + self.shape[1]]
        return (np.asarray(middle, np.float32) - np.float32(self.subtract)) / np.float32(
            self.divide
        )


MNIST = Interface(DIGITS, (28, 28, 1), subtract=0, divide=256)
"""Pixels divided by 256, so in the range [0, .996] of the paper's Section 7."""
WHOLE = Interface((), (), subtract=0, divide=255)
"""Whole images, with pixels divided by 255."""
CIFAR10_CROPS = Interface(CIFAR10, (28, 28, 3), subtract=117, divide=256, crop=28)
"""The middle 28x28 pixels, (pixels - 117) / 256 as in Section 7, so in [-.457, .539].

The paper gives the range (-1, 1), but that is the range of its released code, which uses
(pixels - 128) / 128: an l2 size of .5 there is .25 on this scale.
"""


def named(name: str, *, resize: int | None = None) -> Dataset:
    """Return the data set that a command line names.

    Args:
        name: `mnist`, `cifar10`, `tfds:NAME` as for `from_tfds`, or a folder.
        resize: side of the square that each image's largest centre square is resized to; None to
            keep images as they are.

    Raises:
        FileNotFoundError: if it is none of these.
        UnavailableError: as the function that reads it.
        ValueError: as the function that reads it.
    """
    if name.startswith("tfds:"):
        return _resized(from_tfds(name.removeprefix("tfds:")), resize)
    known = {"mnist": mnist, "cifar10": cifar10}
    if name in known:
        return _resized(known[name](), resize)
    if not Path(name).is_dir():
        raise FileNotFoundError(
            f"expected mnist, cifar10, tfds:NAME or a folder of images, got {name!r}, and there is "
            "no such folder; correct the name or the path"
        )
    return image_folder(name, resize=resize)


def is_folder(name: str) -> bool:
    """Return whether `named` takes this name for a folder's."""
    return name not in ("mnist", "cifar10") and not name.startswith("tfds:")


def held_out(name: str) -> str:
    """Return a note if `named` holds test images out of a folder's own; "" if it doesn't."""
    if not is_folder(name) or folders.unsplit(Path(name)) is None:
        return ""
    return "there is no folder test, so every fifth image of each class is held out for testing"


def _resized(images: Dataset, side: int | None) -> Dataset:
    if side is None:
        return images
    from PIL import Image

    def part(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        channels = pixels.shape[-1]
        squares = [
            np.asarray(folders.square(Image.fromarray(x[..., 0] if channels == 1 else x), side))
            for x in pixels
        ]
        return np.stack(squares).reshape(-1, side, side, channels)

    return images._replace(
        train_images=part(images.train_images), test_images=part(images.test_images)
    )


def mnist() -> Dataset:
    """Return MNIST in its original order: 60,000 training and 10,000 test images of 28x28x1.

    Returns:
        The arrays, memory-mapped: 80 MB in `cache.directory()`.

    Raises:
        FileNotFoundError: if the data isn't prepared yet and an original file is missing.
        ValueError: if the data isn't prepared yet and an original file is truncated or altered.
    """
    return Dataset(*cache.arrays("mnist", _prepare_mnist), DIGITS)


def mnist_originals() -> Dataset:
    """Return the arrays of `mnist` without tensorflow-datasets, cache or checksums.

    For machines with little more than JAX.

    Raises:
        FileNotFoundError: if an original file is missing.
    """
    return Dataset(
        _idx(ORIGINALS / "train-images-idx3-ubyte.gz"),
        _idx(ORIGINALS / "train-labels-idx1-ubyte.gz").astype(np.int32),
        _idx(ORIGINALS / "t10k-images-idx3-ubyte.gz"),
        _idx(ORIGINALS / "t10k-labels-idx1-ubyte.gz").astype(np.int32),
        DIGITS,
    )


def _idx(path: Path) -> NDArray[np.uint8]:
    """Return the images [N, 28, 28, 1] or labels [N] of an idx file."""
    content = gzip.decompress(path.read_bytes())
    # The header is four bytes, the last being the number of axes, then four bytes per axis.
    n_axes = content[3]
    values = np.frombuffer(content, np.uint8, offset=4 + 4 * n_axes)
    return values if n_axes == 1 else values.reshape(-1, 28, 28, 1)


def cifar10_crops() -> tuple[NDArray[np.uint8], NDArray[np.int32]]:
    """Return the 28x28 centre crops of 1,000 CIFAR-10 test images, kept in the repository.

    They are the first 1,000 in the order in which experiments/evaluate.py draws them, from JPEG
    files of quality 75 (lossy). `save_cifar10_crops` wrote them.

    Returns:
        Images [1000, 28, 28, 3] and labels [1000].
    """
    with np.load(_CROPS) as saved:
        return saved["images"], saved["labels"]


def save_cifar10_crops(folder: str | os.PathLike[str], path: Path = _CROPS) -> None:
    """Write the file that `cifar10_crops` reads.

    Args:
        folder: the whole of CIFAR-10, as a folder for `image_folder`.
        path: where to write the file.
    """
    images = image_folder(folder)
    chosen = order("cifar10", len(images.test_labels))[:1000]
    crops = images.test_images[chosen][:, 2:30, 2:30]
    np.savez_compressed(path, images=crops, labels=images.test_labels[chosen])


def cifar10() -> Dataset:
    """Return CIFAR-10 in its original order: 50,000 training and 10,000 test images of 32x32x3.

    Returns:
        The arrays, memory-mapped.

    Raises:
        UnavailableError: if it isn't prepared yet and can't be downloaded, or the download was
            altered.
    """
    return Dataset(*cache.arrays("cifar10", _prepare_cifar10), CIFAR10)


def image_folder(folder: str | os.PathLike[str], *, resize: int | None = None) -> Dataset:
    """Return images sorted into `train/CLASS/` and `test/CLASS/`, as for tfds's ImageFolder.

    Classes, and the images of each, are in the order of their names. When a file is added, removed,
    renamed or changed, the folder is read again.

    Photographs are turned upright by their EXIF orientation. Transparency is an error, since the
    background isn't known.

    Args:
        folder: contains the folders `train` and `test`, each with a folder for each of at least
            two classes. Images are PNG or JPEG with 8 bits per channel, all of one size. Names
            that begin with a dot are ignored. Without a folder `test`, every fifth image of each
            class is held out for testing, and the classes may be in the folder itself.
        resize: side of the square that each image's largest centre square is resized to, whatever
            its size; None to keep images as they are.

    Returns:
        The arrays, memory-mapped; C = 1 if all images are greyscale (bilevel, with an opaque alpha
        channel and with a palette of greys included), else C = 3. A class's name is its folder's,
        in Unicode NFC, since systems store names in different forms.

    Raises:
        FileNotFoundError: if the folder, one of its parts, or a class of a part is missing.
        ValueError: if there is only one class, or a file isn't in a class's folder, isn't a PNG or
            JPEG image of one frame and 8 bits, can't be decoded, has transparent pixels, or differs
            from the first in size.
    """
    folder = Path(folder)
    files = folders.files(folder)
    stats = [(str(path), path.stat()) for path in folders.paths(files)]
    listing = [(path, stat.st_size, stat.st_mtime_ns) for path, stat in stats]
    content = json.dumps([_READING, str(folder.resolve()), listing, *filter(None, [resize])])
    name = f"image_folder-{hashlib.sha256(content.encode()).hexdigest()[:16]}"
    arrays = cache.arrays(name, lambda where: _prepare_folder(where, files, resize))
    return Dataset(*arrays, tuple(files["train"]))


def from_tfds(name: str) -> Dataset:
    """Return a data set of the tensorflow-datasets catalogue that has splits train and test.

    Args:
        name: its name in the catalogue, e.g. `fashion_mnist` or `emnist/letters`.

    Raises:
        ValueError: if the catalogue has no such data set, or it isn't one of labelled images.
        UnavailableError: if it can't be downloaded or prepared; the older data sets need
            TensorFlow.
    """
    import tensorflow_datasets as tfds

    from experiments.lib import builders

    try:
        features = _catalogued(name).info.features
        kinds = {"image": tfds.features.Image, "label": tfds.features.ClassLabel}
        found = dict(features.items())
        fits = all(isinstance(found.get(key), kind) for key, kind in kinds.items())
        if not fits or None in found["image"].shape:
            raise options.UsageError(
                f"expected images of one size with a label each, got {name}: {features}; write "
                "its images as a folder of images"
            )
        prepare = partial(builders.prepared, partial(tfds.builder, name))
        arrays = cache.arrays(f"tfds-{name.replace('/', '-')}", prepare)
    except options.UsageError:
        raise
    except ModuleNotFoundError as error:
        raise options.UnavailableError(
            f"{name} can't be prepared without a package that isn't installed (often TensorFlow); "
            "install it, e.g. pip install tensorflow, or use a folder of images"
        ) from error
    except Exception as error:  # many kinds, depending on what went wrong
        raise options.UnavailableError(
            f"expected to prepare {name}, got {type(error).__name__}: {error}; try again with a "
            "network, or use a folder of images"
        ) from error
    images = Dataset(*arrays, tuple(map(folders.composed, found["label"].names)))
    _check_labels(name, images)
    return images


def _catalogued(name: str) -> Any:
    """Return the catalogue's builder of this name; if there is none, an error suggests others."""
    import tensorflow_datasets as tfds

    try:
        return tfds.builder(name)
    except (ValueError, AssertionError):  # for unknown names or configurations; unknown versions
        pass  # the error's message lists the whole catalogue
    known = tfds.list_builders(with_community_datasets=False)
    base = re.split("[/:]", name)[0]
    if base in known:
        known = [base, *(f"{base}/{config}" for config in tfds.builder_cls(base).builder_configs)]
    close = difflib.get_close_matches(name, known)
    suggestion = f"did you mean {' or '.join(close)}? " if close else ""
    raise options.UsageError(
        f"expected a data set of the tensorflow-datasets catalogue, got {name!r}; {suggestion}"
        "https://www.tensorflow.org/datasets/catalog lists them all"
    )


def _check_labels(name: str, images: Dataset) -> None:
    """Raise an error if a split isn't labelled; the catalogue then gives labels of -1."""
    n_classes = len(images.classes)
    if n_classes < 2:
        raise options.UsageError(
            f"expected at least two classes, got {n_classes} in {name}; choose another data set"
        )
    for part, labels in (("train", images.train_labels), ("test", images.test_labels)):
        outside = int(np.sum((labels < 0) | (labels >= n_classes)))
        if outside:
            raise options.UsageError(
                f"expected labels in 0..{n_classes - 1}, got {outside} others among the "
                f"{len(labels)} of {name}'s split {part}, which stand for unknown labels; "
                "write the images whose labels are known as a folder of images"
            )


def describe(folder: str | os.PathLike[str], images: Dataset) -> str:
    """Return a description of a folder's images, for records: their format and a checksum.

    Args:
        folder: the folder that `image_folder` read.
        images: what `image_folder` returned.
    """
    jpeg = any(map(folders.is_jpeg, folders.paths(folders.files(Path(folder)))))
    return f"a folder of {'JPEG (lossy)' if jpeg else 'PNG'} files, {fingerprint(images)}"


def fingerprint(images: Dataset) -> str:
    """Return a checksum of a data set's pixels and labels, for records."""
    checksum = 0
    for array in images[:4]:
        checksum = zlib.crc32(array.tobytes(), checksum)
    return f"crc32 {checksum:08x}"


def split(n: int, holdout: int, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Split n training examples at random into those to train on and those held out.

    Settings are chosen on the held-out examples, never on the test images.

    Args:
        n: number of examples.
        holdout: how many of them to hold out.
        seed: the same seed gives the same split.

    Returns:
        Indices [n - holdout] to train on and indices [holdout] held out, each in random order.

    Raises:
        ValueError: if holdout isn't in 0..n.
    """
    if not 0 <= holdout <= n:
        raise ValueError(f"expected holdout in 0..{n}, got {holdout}; hold out fewer examples")
    drawn = np.random.default_rng(seed).permutation(n)
    return drawn[holdout:], drawn[:holdout]


def order(name: str, n: int) -> NDArray[np.int64]:
    """Return the order in which the n test images of a data set are taken.

    Args:
        name: name of the data set. MNIST's images are taken in their own order, which is random
            already; others may be sorted by class, so theirs is drawn, always with the same seed.
        n: number of test images.

    Returns:
        Indices [n].
    """
    return np.arange(n) if name == "mnist" else split(n, n, seed=0)[1]


# Preparation. Imports tensorflow-datasets only where needed, since most calls just open the cache.


def _prepare_mnist(place: Path) -> Arrays:
    import tensorflow_datasets as tfds
    from PIL import Image

    from experiments.lib import builders

    stock = tfds.image_classification.MNIST
    _check_originals(stock.url_infos.values())

    def examples(dl_manager: Any, prefix: str) -> builders.Examples:
        names = f"{prefix}-images-idx3-ubyte.gz", f"{prefix}-labels-idx1-ubyte.gz"
        # The URLs serve only as keys of checksums: the files are found in manual_dir.
        images, labels = map(_idx, dl_manager.download([stock.URL + name for name in names]))
        return zip((Image.fromarray(x[..., 0]) for x in images), labels, strict=True)

    def parts(dl_manager: Any) -> dict[str, builders.Examples]:
        prefixes = {"train": "train", "test": "t10k"}
        return {part: examples(dl_manager, prefix) for part, prefix in prefixes.items()}

    made = builders.builder("mnist", stock.VERSION, (28, 28, 1), 10, parts)
    return builders.prepared(
        made, place, manual_dir=ORIGINALS, force_checksums_validation=True, try_download_gcs=False
    )


def _prepare_cifar10(place: Path) -> Arrays:
    """Download the original archive, checked against tensorflow-datasets' checksum."""
    import tensorflow_datasets as tfds
    from PIL import Image

    from experiments.lib import builders

    def examples(files: Iterable[Path]) -> builders.Examples:
        # A record is one byte of label, then the red, green and blue planes.
        for file in files:
            for record in np.fromfile(file, np.uint8).reshape(-1, 1 + 3 * 32 * 32):
                pixels = record[1:].reshape(3, 32, 32).transpose(1, 2, 0)
                yield Image.fromarray(np.ascontiguousarray(pixels)), record[0]

    def parts(dl_manager: Any) -> dict[str, builders.Examples]:
        folder = Path(dl_manager.download_and_extract(_CIFAR10_ARCHIVE)) / "cifar-10-batches-bin"
        train = [folder / f"data_batch_{i}.bin" for i in range(1, 6)]
        return {"train": examples(train), "test": examples([folder / "test_batch.bin"])}

    version = tfds.image_classification.Cifar10.VERSION
    made = builders.builder("cifar10", version, (32, 32, 3), 10, parts)
    try:
        return builders.prepared(
            made, place, force_checksums_validation=True, try_download_gcs=False
        )
    except Exception as error:  # many kinds, depending on what went wrong
        raise options.UnavailableError(
            f"expected to download CIFAR-10 from {_CIFAR10_PAGE}, got {type(error).__name__}: "
            f"{error}; try again with a network, or pass the images as a folder (--image-folder)"
        ) from error


def _prepare_folder(place: Path, files: folders.Files, resize: int | None) -> Arrays:
    import tensorflow_datasets as tfds

    from experiments.lib import builders

    images: dict[Path, Any] = {}
    for path in tfds.core.utils.tqdm(list(folders.paths(files)), "Decoding images"):
        image = folders.decoded(path)
        images[path] = image if resize is None else folders.square(image, resize)
    first, *_ = images
    width, height = size = images[first].size
    for path, image in images.items():
        if image.size != size:
            raise options.UsageError(
                f"expected images of one size, {width}x{height} as in {first}, got "
                f"{image.width}x{image.height} in {path}; resize all of them, e.g. with --resize "
                "32, or resize or remove this one"
            )
    grey = all(image.mode == "L" for image in images.values())

    def examples(classes: Mapping[str, list[Path]]) -> builders.Examples:
        for label, paths in enumerate(classes.values()):
            for path in paths:
                yield images[path] if grey else images[path].convert("RGB"), label

    made = builders.builder(
        "image_folder", "1.0.0", (height, width, 1 if grey else 3), len(files["train"]),
        lambda _: {part: examples(classes) for part, classes in files.items()},
    )  # fmt: skip
    return builders.prepared(made, place)


def _check_originals(registered: Any) -> None:
    """Check MNIST's files before tensorflow-datasets does, as it would download missing ones."""
    for info in registered:
        path = ORIGINALS / info.filename
        cure = f"restore it with `git checkout -- experiments/data/{path.name}`"
        if not path.is_file():
            raise FileNotFoundError(f"expected an original MNIST file at {path}, got none; {cure}")
        content = path.read_bytes()
        checksum = hashlib.sha256(content).hexdigest()
        if checksum != info.checksum:
            raise options.UsageError(
                f"{path} isn't the original MNIST file: expected {int(info.size)} bytes with "
                f"sha256 {info.checksum}, got {len(content)} with {checksum}; {cure}"
            )
