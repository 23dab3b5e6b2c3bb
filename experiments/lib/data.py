"""MNIST, CIFAR-10 and folders of images as arrays, through tensorflow-datasets.

MNIST's four originals lie in `experiments/data/`, so a fresh machine without a network runs the
real thing; `cifar10` downloads; `image_folder` takes any images sorted into folders by class. The
first call takes three steps, seconds to a minute together; every later one takes none:

1. Files are checked: originals against the size and sha256 under which tensorflow-datasets
   registers them, images by decoding each.
2. A builder prepares them as array_record, in the order of the files. tensorflow-datasets' own
   builders need TensorFlow to gunzip, to read files and to write PNG; Python's gzip, its open and
   Pillow do the same.
3. The records are read once into arrays, which are stored and from then on memory-mapped: decoding
   70,000 of them for every run would cost more than many a run does.

A process may be killed at any of these moments, and two may prepare at once. So a lock, which the
system frees however its holder ends, admits one at a time; each file is renamed into place whole;
and the checksums, by which every call verifies the arrays before it trusts them, are written last.
Whatever doesn't verify is prepared anew from the originals.
"""

import difflib
import fcntl
import gzip
import hashlib
import json
import os
import re
import shutil
import unicodedata
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from experiments.lib import options

ORIGINALS = Path(__file__).resolve().parents[1] / "data"
DIGITS = tuple("0123456789")
"""MNIST's classes."""
CIFAR10 = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip
"""CIFAR-10's classes."""
_CHECKSUMS = "checksums.json"
_READING = 2
"""Raised when a folder's files are read as other pixels than before: what is cached is old then."""
_CROPS = ORIGINALS / "cifar10_crops.npz"
_CIFAR10_PAGE = "https://www.cs.toronto.edu/~kriz/cifar.html"
_CIFAR10_ARCHIVE = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"

Examples = Iterator[tuple[Any, Any]]
"""Pillow images and their labels."""


class Dataset(NamedTuple):
    """A data set's two official parts, as read-only arrays, and its classes.

    Attributes:
        train_images: [N, H, W, C] uint8.
        train_labels: [N] int32, each in 0..K-1.
        test_images: [M, H, W, C] uint8.
        test_labels: [M] int32, each in 0..K-1.
        classes: the K names, in the order of the labels.
    """

    train_images: NDArray[np.uint8]
    train_labels: NDArray[np.int32]
    test_images: NDArray[np.uint8]
    test_labels: NDArray[np.int32]
    classes: tuple[str, ...]


class Interface(NamedTuple):
    """What a net's inputs and logits stand for: what its weights need to be used rightly.

    Attributes:
        classes: the K classes, in the order of the logits.
        shape: of an input, (H, W, C).
        subtract: inputs are (pixels - subtract) / divide, with pixels from 0 to 255.
        divide: see subtract.
        crop: side of the part of the images' middle that is used; None for whole images.
    """

    classes: tuple[str, ...]
    shape: tuple[int, ...]
    subtract: float
    divide: float
    crop: int | None = None

    def inputs(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Returns the middle of images as the net takes it: cropped to the shape, and scaled.

        Args:
            pixels: [n, H, W, C] uint8, with H and W at least those of the shape.

        Raises:
            TypeError: pixels aren't uint8; scaling scaled ones again would go unnoticed.
            ValueError: pixels have another number of axes.
        """
        if pixels.dtype != np.uint8:
            raise TypeError(
                f"expected uint8 pixels, got {pixels.dtype}; pass them as a `Dataset` has them"
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
"""Pixels divided by 256, into the range [0, .996] of the paper's Section 7."""
WHOLE = Interface((), (), subtract=0, divide=255)
"""Whole images, with pixels divided by 255."""
CIFAR10_CROPS = Interface(CIFAR10, (28, 28, 3), subtract=117, divide=256, crop=28)
"""The middle 28x28 pixels less 117, divided by 256, into [-.457, .539], as Section 7 has it.

The paper says (-1, 1), which is the range of its released code, (pixel - 128) / 128: there an l2
size of .5 is one of .25 on this scale.
"""


def named(name: str) -> Dataset:
    """The data set that a command line names.

    Args:
        name: `mnist`, `cifar10`, `tfds:NAME` as for `from_tfds`, or else a folder.

    Raises:
        FileNotFoundError: if it is none of these.
        OSError: as the function that reads it.
        ValueError: likewise.
    """
    if name.startswith("tfds:"):
        return from_tfds(name.removeprefix("tfds:"))
    known = {"mnist": mnist, "cifar10": cifar10}
    if name in known:
        return known[name]()
    if not Path(name).is_dir():
        raise FileNotFoundError(
            f"expected mnist, cifar10, tfds:NAME or a folder of images, got {name!r}, and no such "
            "folder is there; mend the name, or its path"
        )
    return image_folder(name)


def mnist(*, data_dir: str | os.PathLike[str] | None = None) -> Dataset:
    """MNIST in its original order: 60,000 training and 10,000 test images of 28x28x1 pixels.

    Args:
        data_dir: where prepared data is kept, 80 MB of it. By default `$JAXADV_DATA`, or else
            `$XDG_CACHE_HOME/jaxadv`, or else `~/.cache/jaxadv`.

    Returns:
        The arrays, memory-mapped.

    Raises:
        FileNotFoundError: an original is missing when there is something to prepare.
        ValueError: an original is truncated or altered then.
    """
    return Dataset(*_cached("mnist", _prepare_mnist, data_dir), DIGITS)


def mnist_originals() -> Dataset:
    """The arrays of `mnist`, read without tensorflow-datasets, a cache or their checksums.

    For machines that have little beside JAX.

    Raises:
        FileNotFoundError: an original is missing.
    """
    return Dataset(
        _idx(ORIGINALS / "train-images-idx3-ubyte.gz"),
        _idx(ORIGINALS / "train-labels-idx1-ubyte.gz").astype(np.int32),
        _idx(ORIGINALS / "t10k-images-idx3-ubyte.gz"),
        _idx(ORIGINALS / "t10k-labels-idx1-ubyte.gz").astype(np.int32),
        DIGITS,
    )


def _idx(path: Path) -> NDArray[np.uint8]:
    """The images [N, 28, 28, 1] or labels [N] of an idx file."""
    content = gzip.decompress(path.read_bytes())
    # A header of four bytes, the last of which is the number of axes, and four more for each axis.
    n_axes = content[3]
    values = np.frombuffer(content, np.uint8, offset=4 + 4 * n_axes)
    return values if n_axes == 1 else values.reshape(-1, 28, 28, 1)


def cifar10_crops() -> tuple[NDArray[np.uint8], NDArray[np.int32]]:
    """The middle 28x28 of 1,000 CIFAR-10 test images, embedded in the repository.

    The first 1,000 in the order in which experiments/evaluate.py draws them, from JPEG files of
    quality 75 (lossy). `save_cifar10_crops` wrote them.

    Returns:
        Images [1000, 28, 28, 3] and labels [1000].
    """
    with np.load(_CROPS) as saved:
        return saved["images"], saved["labels"]


def save_cifar10_crops(folder: str | os.PathLike[str], path: Path = _CROPS) -> None:
    """Writes the file that `cifar10_crops` reads.

    Args:
        folder: all of CIFAR-10, as given to `image_folder`.
        path: where to write.
    """
    images = image_folder(folder)
    chosen = order("cifar10", len(images.test_labels))[:1000]
    crops = images.test_images[chosen][:, 2:30, 2:30]
    np.savez_compressed(path, images=crops, labels=images.test_labels[chosen])


def cifar10(*, data_dir: str | os.PathLike[str] | None = None) -> Dataset:
    """CIFAR-10 in its original order: 50,000 training and 10,000 test images of 32x32x3 pixels.

    Args:
        data_dir: where downloaded and prepared data is kept, as for `mnist`.

    Returns:
        The arrays, memory-mapped.

    Raises:
        OSError: it isn't there yet and can't be downloaded, or what came isn't the original.
    """
    return Dataset(*_cached("cifar10", _prepare_cifar10, data_dir), CIFAR10)


def image_folder(
    folder: str | os.PathLike[str], *, data_dir: str | os.PathLike[str] | None = None
) -> Dataset:
    """Images sorted into `train/CLASS/` and `test/CLASS/`, the layout of tfds's ImageFolder.

    Classes are numbered in the order of their names, and images come in the order of theirs. When a
    file is added, removed, renamed or written to, the folder is read anew.

    Photographs are turned upright, as their EXIF orientation says. Transparency is an error, since
    what would show through it isn't known.

    Args:
        folder: where the folders `train` and `test` are, each with a folder for each of at least
            two classes; PNG or JPEG of 8 bits for each pixel and colour, all of one size. Names
            that begin with a dot are passed over.
        data_dir: where prepared data is kept, as for `mnist`.

    Returns:
        The arrays, memory-mapped; C = 1 where all images are stored as grey (bilevel, with an
        opaque alpha channel, or a palette of greys), else C = 3. A class's name is the folder's,
        its characters composed (Unicode NFC): systems differ in how they write them.

    Raises:
        FileNotFoundError: the folder, one of its parts, or a class of one of the parts is missing.
        ValueError: there is only one class; a file isn't in a class's folder, isn't a PNG or JPEG
            image of one frame and 8 bits, can't be decoded, has transparent pixels, or has another
            size than the first.
    """
    folder = Path(folder)
    files = _image_files(folder)
    listing = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in _paths(files)]
    content = json.dumps([_READING, str(folder.resolve()), listing])
    digest = hashlib.sha256(content.encode()).hexdigest()
    arrays = _cached(
        f"image_folder-{digest[:16]}", lambda where: _prepare_folder(where, files), data_dir
    )
    return Dataset(*arrays, tuple(files["train"]))


def from_tfds(name: str, *, data_dir: str | os.PathLike[str] | None = None) -> Dataset:
    """A data set of the tensorflow-datasets catalogue: images of one size, labels, train and test.

    Args:
        name: as the catalogue has it, e.g. `fashion_mnist` or `emnist/letters`.
        data_dir: where downloaded and prepared data is kept, as for `mnist`.

    Raises:
        ValueError: if the catalogue has no such data set, or it isn't of this kind.
        ModuleNotFoundError: if preparing it takes a package that isn't installed; the older ones
            of the catalogue take TensorFlow.

    Returns:
        The two parts, prepared on the first call and read from the cache afterwards.
    """
    import tensorflow_datasets as tfds

    try:
        features = _builder(name).info.features
        kinds = {"image": tfds.features.Image, "label": tfds.features.ClassLabel}
        found = dict(features.items())
        fits = all(isinstance(found.get(key), kind) for key, kind in kinds.items())
        if not fits or None in found["image"].shape:
            raise options.UsageError(
                f"expected images of one size with a label each, got {name}: {features}; write "
                "them as a folder of images"
            )
        arrays = _cached(
            f"tfds-{name.replace('/', '-')}",
            lambda where: _through_records(partial(tfds.builder, name), where, None),
            data_dir,
        )
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{name} can't be prepared without a package that isn't installed (often TensorFlow); "
            "install it, e.g. pip install tensorflow, or use a folder of images"
        ) from error
    images = Dataset(*arrays, tuple(map(composed, found["label"].names)))
    _check_labels(name, images)
    return images


def _builder(name: str) -> Any:
    """The catalogue's builder of that name; an error that suggests others if it has none."""
    import tensorflow_datasets as tfds

    try:
        return tfds.builder(name)
    except (ValueError, AssertionError):  # of names and configurations; of versions
        # Without the cause, whose message is the whole catalogue.
        raise options.UsageError(
            f"expected a data set of the tensorflow-datasets catalogue, got {name!r}; "
            + _suggestion(name)
        ) from None


def _suggestion(name: str) -> str:
    """What may have been meant by a name that the catalogue doesn't have."""
    import tensorflow_datasets as tfds

    known = tfds.list_builders(with_community_datasets=False)
    base = re.split("[/:]", name)[0]
    if base in known:
        known = [base, *(f"{base}/{config}" for config in tfds.builder_cls(base).builder_configs)]
    close = difflib.get_close_matches(name, known)
    page = "https://www.tensorflow.org/datasets/catalog has them all"
    return f"did you mean {' or '.join(close)}? {page}" if close else page


def _check_labels(name: str, images: Dataset) -> None:
    """An error where a part isn't labelled, which the catalogue writes as -1."""
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
                f"{len(labels)} of {name}'s part {part}, which means that they aren't known; "
                "write the images whose labels are known as a folder of images"
            )


def composed(name: str) -> str:
    """A name with its characters composed (NFC), so that equal looks are equal strings."""
    return unicodedata.normalize("NFC", name)


def describe(folder: str | os.PathLike[str], images: Dataset) -> str:
    """Says for a record what a folder's images are: their format, and a checksum of the pixels.

    Args:
        folder: as given to `image_folder`.
        images: what that returned.
    """
    jpeg = any(_head(path)[:2] == b"\xff\xd8" for path in _paths(_image_files(Path(folder))))
    return f"a folder of {'JPEG (lossy)' if jpeg else 'PNG'} files, {fingerprint(images)}"


def fingerprint(images: Dataset) -> str:
    """Returns a checksum of a data set's pixels and labels, for a record."""
    checksum = 0
    for array in images[:4]:
        checksum = zlib.crc32(array.tobytes(), checksum)
    return f"crc32 {checksum:08x}"


def split(n: int, holdout: int, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Draws which of n training examples are held out, for every choice made before the test.

    Args:
        n: how many examples there are.
        holdout: how many of them to hold out.
        seed: the same seed draws the same split.

    Returns:
        Indices [n - holdout] to train on and indices [holdout] held out, each in random order.

    Raises:
        ValueError: holdout isn't in 0..n.
    """
    if not 0 <= holdout <= n:
        raise ValueError(f"expected holdout in 0..{n}, got {holdout}; hold out fewer examples")
    drawn = np.random.default_rng(seed).permutation(n)
    return drawn[holdout:], drawn[:holdout]


def order(name: str, n: int) -> NDArray[np.int64]:
    """The order in which the n test images of a set are taken, the first ones when not all.

    Args:
        name: of the set. A folder's images come class by class: theirs is drawn once and for all.
            MNIST's have no order, and everybody takes its first ones.
        n: how many there are.

    Returns:
        Indices [n].
    """
    return np.arange(n) if name == "mnist" else split(n, n, seed=0)[1]


# The array cache.

_Arrays = tuple[NDArray[Any], NDArray[Any], NDArray[Any], NDArray[Any]]  # those of a `Dataset`


def _cached(
    name: str, prepare: Callable[[Path], _Arrays], data_dir: str | os.PathLike[str] | None
) -> _Arrays:
    """The arrays of that name, prepared if they aren't there or don't verify."""
    directory = (cache_directory() if data_dir is None else Path(data_dir)) / name
    unusable = (OSError, ValueError)
    with suppress(*unusable):
        return _open(directory)
    directory.mkdir(parents=True, exist_ok=True)
    with _locked(directory / "lock"):
        with suppress(*unusable):
            return _open(directory)  # another process prepared it while this one waited
        _store(directory, prepare(directory / "prepared"))
        return _open(directory)


def cache_directory() -> Path:
    """Return where prepared data is kept unless a caller says otherwise."""
    if chosen := os.environ.get("JAXADV_DATA"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "jaxadv"


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _open(directory: Path) -> _Arrays:
    """The stored arrays; OSError or ValueError where they are missing or not what was stored."""
    expected = json.loads((directory / _CHECKSUMS).read_text())
    got = _checksums(directory)
    if got != expected:
        raise ValueError(f"expected checksums {expected} in {directory}, got {got}; delete it")
    train_images, train_labels, test_images, test_labels = (
        np.load(file, mmap_mode="r") for file in _files(directory)
    )
    return train_images, train_labels, test_images, test_labels


def _store(directory: Path, arrays: _Arrays) -> None:
    """Writes the arrays and, last, their checksums, without which `_open` takes none of them."""
    for path, array in zip(_files(directory), arrays, strict=True):
        with _replacing(path) as file:
            np.save(file, array)
    with _replacing(directory / _CHECKSUMS) as file:
        file.write(json.dumps(_checksums(directory)).encode())


def _files(directory: Path) -> list[Path]:
    return [directory / f"{name}.npy" for name in Dataset._fields[:4]]


def _checksums(directory: Path) -> dict[str, int]:
    """Of whole files, 55 MB in 0.05 s: where the headers are right, so are shapes and dtypes."""
    return {path.name: zlib.crc32(path.read_bytes()) for path in _files(directory)}


@contextmanager
def _replacing(path: Path) -> Iterator[IO[bytes]]:
    """Replaces a file whole: who has the old one mapped keeps it, and nobody sees half of one."""
    unfinished = path.with_suffix(".unfinished")
    with unfinished.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)


# The preparation.


def _prepare_mnist(directory: Path) -> _Arrays:
    """Originals to records to arrays; tensorflow-datasets is imported here, where it's needed."""
    import tensorflow_datasets as tfds
    from PIL import Image

    stock = tfds.image_classification.MNIST
    _check_originals(stock.url_infos.values())

    def parts(dl_manager: Any) -> Iterator[tuple[str, Examples]]:
        for part, prefix in (("train", "train"), ("test", "t10k")):
            names = f"{prefix}-images-idx3-ubyte.gz", f"{prefix}-labels-idx1-ubyte.gz"
            # A URL is only the key of a checksum: the file is found in manual_dir.
            images, labels = map(_idx, dl_manager.download([stock.URL + n for n in names]))
            yield part, zip((Image.fromarray(x[..., 0]) for x in images), labels, strict=True)

    config = tfds.download.DownloadConfig(
        manual_dir=ORIGINALS, force_checksums_validation=True, try_download_gcs=False
    )
    return _through_records(
        _builder_of("mnist", stock.VERSION, (28, 28, 1), 10, parts), directory, config
    )


def _prepare_cifar10(directory: Path) -> _Arrays:
    """Downloads the original archive; its checksum is the one that tensorflow-datasets has."""
    import tensorflow_datasets as tfds
    from PIL import Image

    stock = tfds.image_classification.Cifar10

    def examples(files: Iterable[Path]) -> Examples:
        # A record is a label of one byte and the planes of red, green and blue.
        for file in files:
            for record in np.fromfile(file, np.uint8).reshape(-1, 1 + 3 * 32 * 32):
                pixels = record[1:].reshape(3, 32, 32).transpose(1, 2, 0)
                yield Image.fromarray(np.ascontiguousarray(pixels)), record[0]

    def parts(dl_manager: Any) -> Iterator[tuple[str, Examples]]:
        place = Path(dl_manager.download_and_extract(_CIFAR10_ARCHIVE)) / "cifar-10-batches-bin"
        yield "train", examples(place / f"data_batch_{i}.bin" for i in range(1, 6))
        yield "test", examples([place / "test_batch.bin"])

    config = tfds.download.DownloadConfig(force_checksums_validation=True, try_download_gcs=False)
    try:
        return _through_records(
            _builder_of("cifar10", stock.VERSION, (32, 32, 3), 10, parts), directory, config
        )
    except Exception as error:  # of a dozen kinds, by what went wrong on the way
        raise OSError(
            f"expected to download CIFAR-10 from {_CIFAR10_PAGE}, got {type(error).__name__}: "
            f"{error}; try again with a network, or give the images as a folder (--image-folder)"
        ) from error


def _prepare_folder(directory: Path, files: Mapping[str, Mapping[str, list[Path]]]) -> _Arrays:
    """Images to records to arrays."""
    import tensorflow_datasets as tfds

    first = next(_paths(files))
    grey = all(_decoded(path).mode == "L" for path in _paths(files))
    width, height = size = _decoded(first).size

    def examples(classes: Mapping[str, list[Path]]) -> Examples:
        labelled = ((i, path) for i, paths in enumerate(classes.values()) for path in paths)
        for label, path in labelled:
            image = _decoded(path)
            if image.size != size:
                raise options.UsageError(
                    f"expected images of one size, {width}x{height} as {first} has, got "
                    f"{image.width}x{image.height} in {path}; resize or remove it"
                )
            yield image if grey else image.convert("RGB"), label

    def parts(dl_manager: Any) -> Iterator[tuple[str, Examples]]:
        return ((part, examples(classes)) for part, classes in files.items())

    shape = (height, width, 1 if grey else 3)
    version = tfds.core.Version("1.0.0")
    builder = _builder_of("image_folder", version, shape, len(files["train"]), parts)
    return _through_records(builder, directory, tfds.download.DownloadConfig())


def _builder_of(
    called: str,
    version: Any,
    shape: tuple[int, ...],
    n_classes: int,
    parts: Callable[[Any], Iterable[tuple[str, Examples]]],
) -> Any:
    """A builder without TensorFlow, of images in the order of their files.

    Args:
        called: its name.
        version: of the data.
        shape: of the images.
        n_classes: how many classes they have.
        parts: from a download manager to the examples of each part, by its name.
    """
    import tensorflow_datasets as tfds

    with tfds.core.registered.skip_registration():

        class Images(tfds.core.GeneratorBasedBuilder):
            """Images with labels."""

            name = called
            VERSION = version

            def _info(self) -> Any:
                features = {
                    "image": tfds.features.Image(shape=shape),
                    "label": tfds.features.ClassLabel(num_classes=n_classes),
                }
                return tfds.core.DatasetInfo(
                    builder=self,
                    features=tfds.features.FeaturesDict(features),
                    disable_shuffling=True,
                )

            def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, Any]]]:
                found = parts(dl_manager)
                return {part: self._generate_examples(examples) for part, examples in found}

            def _generate_examples(self, examples: Examples) -> Iterator[tuple[int, Any]]:
                for i, (image, label) in enumerate(examples):
                    yield i, {"image": image, "label": int(label)}

    return Images


def _image_files(folder: Path) -> dict[str, dict[str, list[Path]]]:
    """The images of each class of `train` and `test`; an error where some are missing."""
    layout = "the layout is DIR/train/CLASS/*.png and DIR/test/CLASS/*.png"
    files: dict[str, dict[str, list[Path]]] = {}
    for part in ("train", "test"):
        if not (folder / part).is_dir():
            raise FileNotFoundError(
                f"expected a folder {folder / part} with a folder of images for each class, got "
                f"none; {layout}"
            )
        places: dict[str, Path] = {}
        for place in _shown(folder / part):
            if not place.is_dir():
                raise options.UsageError(
                    f"expected only folders in {folder / part}, one for each class, got {place}; "
                    "move it into the folder of its class, or remove it"
                )
            other = places.setdefault(composed(place.name), place)
            if other != place:
                raise options.UsageError(
                    f"expected one folder for each class, got two in {folder / part} whose names "
                    f"look alike, {other.name!a} and {place.name!a}; merge them"
                )
        files[part] = {name: _images_in(places[name]) for name in sorted(places)}
    for part in files:
        for name in sorted(files["train"].keys() | files["test"].keys()):
            if not files[part].get(name):
                raise FileNotFoundError(
                    f"expected images of class {name!r} in {folder / part / name}, got none; each "
                    "class needs images in both train and test"
                )
    if len(files["train"]) < 2:
        raise options.UsageError(
            f"expected folders of at least two classes in {folder / 'train'}, got "
            f"{len(files['train'])}; {layout}"
        )
    return files


def _shown(place: Path) -> list[Path]:
    return sorted(path for path in place.iterdir() if not path.name.startswith("."))


def _images_in(place: Path) -> list[Path]:
    """A class's images, in the order of their names."""
    paths = _shown(place)
    for path in paths:
        if not path.exists():
            raise options.UsageError(
                f"expected an image in {path}, got a link to {os.readlink(path)}, which isn't "
                "there; mend or remove it"
            )
        if path.suffix.lower() not in (".png", ".jpg", ".jpeg") or not path.is_file():
            raise options.UsageError(
                f"expected PNG or JPEG images in {place}, got {path}; convert or remove it"
            )
    return paths


def _paths(files: Mapping[str, Mapping[str, list[Path]]]) -> Iterator[Path]:
    return (path for part in files.values() for paths in part.values() for path in paths)


def _decoded(path: Path) -> Any:
    """A Pillow image, upright, its pixels read: of mode L if it is stored as grey, else RGB."""
    from PIL import Image, ImageOps

    def refused(got: str, cure: str) -> ValueError:
        return ValueError(
            f"expected an opaque image of 8 bits for each pixel and colour in {path}, got {got}; "
            f"{cure}, or remove it"
        )

    try:
        with warnings.catch_warnings():
            # Half of what Pillow refuses, it only warns of.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            opened: Any = Image.open(path, formats=("PNG", "JPEG"))
        with opened:
            png = opened.format == "PNG"
            frames = opened.n_frames if png else 1  # a JPEG's others are previews of the first
            upright = ImageOps.exif_transpose(opened)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise refused(f"one larger than Pillow decodes ({error})", "make it smaller") from error
    except Exception as error:  # of several kinds, by what is broken
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


def _head(path: Path) -> bytes:
    """A file's first bytes: its format's mark, and of PNG the header with the bit depth."""
    with path.open("rb") as file:
        return file.read(25)


def _through_records(builder_class: Any, directory: Path, config: Any) -> _Arrays:
    """Prepares a builder's records and reads them as arrays."""
    import tensorflow_datasets as tfds

    # Whatever is here was left by an interrupted preparation, or led to arrays that don't verify.
    if directory.exists():
        shutil.rmtree(directory)
    builder = builder_class(data_dir=directory, file_format="array_record")
    builder.download_and_prepare(download_config=config)
    if not {"train", "test"} <= set(builder.info.splits):
        raise options.UsageError(
            f"expected parts train and test, got {sorted(builder.info.splits)}; write the images "
            "as a folder with these parts"
        )

    def arrays(part: str) -> tuple[NDArray[np.uint8], NDArray[np.int32]]:
        source = builder.as_data_source(split=part)
        images = np.empty((len(source), *builder.info.features["image"].shape), np.uint8)
        labels = np.empty(len(source), np.int32)
        # In blocks, since a record at a time takes twice as long.
        for start in tfds.core.utils.tqdm(range(0, len(source), 1000), f"Reading {part} records"):
            block = slice(start, min(start + 1000, len(source)))
            records = source.__getitems__(range(block.start, block.stop))
            images[block] = [record["image"] for record in records]
            labels[block] = [record["label"] for record in records]
        return images, labels

    return (*arrays("train"), *arrays("test"))


def _check_originals(registered: Any) -> None:
    """Before tensorflow-datasets looks, which would turn to the network for a missing file."""
    for info in registered:
        path = ORIGINALS / info.filename
        cure = f"restore it with `git checkout -- experiments/data/{path.name}`"
        if not path.is_file():
            raise FileNotFoundError(f"expected an original MNIST file at {path}, got none; {cure}")
        content = path.read_bytes()
        checksum = hashlib.sha256(content).hexdigest()
        if checksum != info.checksum:
            raise options.UsageError(
                f"{path} isn't the original MNIST file: expected {int(info.size)} bytes of sha256 "
                f"{info.checksum}, got {len(content)} of {checksum}; {cure}"
            )
