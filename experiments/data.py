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

import fcntl
import gzip
import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "ORIGINALS",
    "Dataset",
    "cache_directory",
    "cifar10",
    "cifar10_crops",
    "describe",
    "fingerprint",
    "from_tfds",
    "image_folder",
    "mnist",
    "mnist_originals",
    "save_cifar10_crops",
    "scale_cifar10",
    "scale_mnist",
    "split",
]

ORIGINALS = Path(__file__).resolve().parent / "data"
_CHECKSUMS = "checksums.json"
_CROPS = ORIGINALS / "cifar10_crops.npz"
_CIFAR10_PAGE = "https://www.cs.toronto.edu/~kriz/cifar.html"


class Dataset(NamedTuple):
    """A data set's two official parts, as read-only arrays.

    Attributes:
        train_images: [N, H, W, C] uint8.
        train_labels: [N] int32.
        test_images: [M, H, W, C] uint8.
        test_labels: [M] int32.
    """

    train_images: NDArray[np.uint8]
    train_labels: NDArray[np.int32]
    test_images: NDArray[np.uint8]
    test_labels: NDArray[np.int32]


def mnist(*, data_dir: str | os.PathLike[str] | None = None) -> Dataset:
    """MNIST in its original order: 60,000 training and 10,000 test images of 28x28x1 pixels.

    Args:
        data_dir: where prepared data is kept, 80 MB of it. By default `$JAXADV_DATA`, or else
            `$XDG_CACHE_HOME/jaxadv`, or else `~/.cache/jaxadv`.

    Returns:
        The four arrays, memory-mapped.

    Raises:
        FileNotFoundError: an original is missing when there is something to prepare.
        ValueError: an original is truncated or altered then.
    """
    return _cached("mnist", _prepare_mnist, data_dir)


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
    n = len(images.test_labels)
    chosen = split(n, n, seed=0)[1][:1000]
    crops = images.test_images[chosen][:, 2:30, 2:30]
    np.savez_compressed(path, images=crops, labels=images.test_labels[chosen])


def cifar10(*, data_dir: str | os.PathLike[str] | None = None) -> Dataset:
    """CIFAR-10 in its original order: 50,000 training and 10,000 test images of 32x32x3 pixels.

    Args:
        data_dir: where downloaded and prepared data is kept, as for `mnist`.

    Returns:
        The four arrays, memory-mapped.

    Raises:
        OSError: it isn't there yet and can't be downloaded, or what came isn't the original.
    """
    return _cached("cifar10", _prepare_cifar10, data_dir)


def image_folder(
    folder: str | os.PathLike[str], *, data_dir: str | os.PathLike[str] | None = None
) -> Dataset:
    """Images sorted into `train/CLASS/` and `test/CLASS/`, the layout of tfds's ImageFolder.

    Classes are numbered in the order of their names, and images come in the order of theirs. When a
    file is added, removed, renamed or written to, the folder is read anew.

    Args:
        folder: where the folders `train` and `test` are; PNG or JPEG, all of one size.
        data_dir: where prepared data is kept, as for `mnist`.

    Returns:
        The four arrays, memory-mapped; C = 1 where all images are grey, else C = 3.

    Raises:
        FileNotFoundError: the folder, one of its parts, or a class of one of the parts is missing.
        ValueError: a file isn't an image, can't be decoded, or has another size than the first.
    """
    folder = Path(folder)
    files = _image_files(folder)
    listing = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in _paths(files)]
    digest = hashlib.sha256(json.dumps([str(folder.resolve()), listing]).encode()).hexdigest()
    return _cached(
        f"image_folder-{digest[:16]}", lambda where: _prepare_folder(where, files), data_dir
    )


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
        info = tfds.builder(name).info
    except tfds.core.DatasetNotFoundError as error:
        raise ValueError(
            f"expected a data set of the tensorflow-datasets catalogue, got {name!r}: {error}"
        ) from error
    kinds = {"image": tfds.features.Image, "label": tfds.features.ClassLabel}
    found = dict(info.features.items())
    fits = all(isinstance(found.get(key), kind) for key, kind in kinds.items())
    if not fits or None in found["image"].shape:
        raise ValueError(
            f"expected images of one size with a label each, got {name}: {info.features}; write "
            "them as a folder of images"
        )
    try:
        return _cached(
            f"tfds-{name.replace('/', '-')}",
            lambda where: _through_records(partial(tfds.builder, name), where, None),
            data_dir,
        )
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{name} can't be prepared without a package that isn't installed (often TensorFlow); "
            "install it, e.g. pip install tensorflow, or use a folder of images"
        ) from error


def describe(folder: str | os.PathLike[str], images: Dataset) -> str:
    """Says for a record what a folder's images are: their format, and a checksum of the pixels.

    Args:
        folder: as given to `image_folder`.
        images: what that returned.
    """
    jpeg = any(path.suffix.lower() != ".png" for path in _paths(_image_files(Path(folder))))
    return f"a folder of {'JPEG (lossy)' if jpeg else 'PNG'} files, {fingerprint(images)}"


def fingerprint(images: Dataset) -> str:
    """Returns a checksum of a data set's pixels and labels, for a record."""
    checksum = 0
    for array in images:
        checksum = zlib.crc32(array.tobytes(), checksum)
    return f"crc32 {checksum:08x}"


def scale_mnist(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Pixels divided by 256, into the range [0, .996] of the paper's Section 7.

    Args:
        images: [n, 28, 28, 1] uint8.

    Returns:
        [n, 28, 28, 1] float32.

    Raises:
        TypeError: images aren't uint8; dividing scaled ones again would go unnoticed.
        ValueError: images aren't [n, 28, 28, 1].
    """
    if images.dtype != np.uint8:
        raise TypeError(
            f"expected uint8 images, got {images.dtype}; pass the pixels as `mnist` returns them"
        )
    if images.ndim != 4 or images.shape[1:] != (28, 28, 1):
        raise ValueError(
            f"expected images of shape [n, 28, 28, 1], got {list(images.shape)}; "
            "for a single image, pass images[i : i + 1]"
        )
    return np.asarray(images, np.float32) / np.float32(256)


def scale_cifar10(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Pixels less 117, divided by 256, into the range [-.457, .539], as Section 7 has it.

    The paper says (-1, 1), which is the range of its released code, (pixel - 128) / 128: there an
    l2 size of .5 is one of .25 on the scale of this function.

    Args:
        images: [n, H, W, 3] uint8.

    Returns:
        [n, H, W, 3] float32.

    Raises:
        TypeError: images aren't uint8.
        ValueError: images aren't [n, H, W, 3].
    """
    if images.dtype != np.uint8:
        raise TypeError(
            f"expected uint8 images, got {images.dtype}; pass the pixels as `cifar10` returns them"
        )
    if images.ndim != 4 or images.shape[3] != 3:
        raise ValueError(
            f"expected images of shape [n, H, W, 3], got {list(images.shape)}; "
            "convert them to RGB, all of one size"
        )
    return (np.asarray(images, np.float32) - np.float32(117)) / np.float32(256)


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
    order = np.random.default_rng(seed).permutation(n)
    return order[holdout:], order[:holdout]


# The array cache.


def _cached(
    name: str, prepare: Callable[[Path], Dataset], data_dir: str | os.PathLike[str] | None
) -> Dataset:
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


def _open(directory: Path) -> Dataset:
    """The stored arrays; OSError or ValueError where they are missing or not what was stored."""
    expected = json.loads((directory / _CHECKSUMS).read_text())
    got = _checksums(directory)
    if got != expected:
        raise ValueError(f"expected checksums {expected} in {directory}, got {got}; delete it")
    return Dataset(*(np.load(file, mmap_mode="r") for file in _files(directory)))


def _store(directory: Path, arrays: Iterable[NDArray[Any]]) -> None:
    """Writes the arrays and, last, their checksums, without which `_open` takes none of them."""
    for path, array in zip(_files(directory), arrays, strict=True):
        with _replacing(path) as file:
            np.save(file, array)
    with _replacing(directory / _CHECKSUMS) as file:
        file.write(json.dumps(_checksums(directory)).encode())


def _files(directory: Path) -> list[Path]:
    return [directory / f"{name}.npy" for name in Dataset._fields]


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


def _prepare_mnist(directory: Path) -> Dataset:
    """Originals to records to arrays; tensorflow-datasets is imported here, where it's needed."""
    import tensorflow_datasets as tfds
    from PIL import Image

    stock = tfds.image_classification.MNIST
    _check_originals(stock.url_infos.values())

    with tfds.core.registered.skip_registration():

        class Mnist(tfds.core.GeneratorBasedBuilder):
            """The stock builder's layout, without TensorFlow and in the order of the originals."""

            VERSION = stock.VERSION

            def _info(self) -> Any:
                return tfds.core.DatasetInfo(
                    builder=self,
                    description="The MNIST database of handwritten digits.",
                    features=tfds.features.FeaturesDict(
                        {
                            "image": tfds.features.Image(shape=(28, 28, 1)),
                            "label": tfds.features.ClassLabel(num_classes=10),
                        }
                    ),
                    supervised_keys=("image", "label"),
                    disable_shuffling=True,
                )

            def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, Any]]]:
                def examples(prefix: str) -> Iterator[tuple[int, Any]]:
                    names = f"{prefix}-images-idx3-ubyte.gz", f"{prefix}-labels-idx1-ubyte.gz"
                    # A URL is only the key of a checksum: the file is found in manual_dir.
                    return self._generate_examples(
                        *dl_manager.download([stock.URL + n for n in names])
                    )

                return {"train": examples("train"), "test": examples("t10k")}

            def _generate_examples(self, images: Any, labels: Any) -> Iterator[tuple[int, Any]]:
                for i, (image, digit) in enumerate(zip(_idx(images), _idx(labels), strict=True)):
                    yield i, {"image": Image.fromarray(image[..., 0]), "label": int(digit)}

    config = tfds.download.DownloadConfig(
        manual_dir=ORIGINALS, force_checksums_validation=True, try_download_gcs=False
    )
    return _through_records(Mnist, directory, config)


def _prepare_cifar10(directory: Path) -> Dataset:
    """Downloads the original archive; its checksum is the one that tensorflow-datasets has."""
    import tensorflow_datasets as tfds
    from PIL import Image

    with tfds.core.registered.skip_registration():

        class Cifar10(tfds.image_classification.Cifar10):
            """The stock builder without TensorFlow, in the order of the originals."""

            name = "cifar10"

            def _info(self) -> Any:
                info = super()._info()
                return tfds.core.DatasetInfo(
                    builder=self,
                    description=info.description,
                    features=info.features,
                    supervised_keys=info.supervised_keys,
                    disable_shuffling=True,
                )

            def _generate_examples(
                self, split_prefix: str, filepaths: Iterable[str]
            ) -> Iterator[tuple[int, Any]]:
                # A record is a label of one byte and the planes of red, green and blue.
                files = [
                    np.fromfile(path, np.uint8).reshape(-1, 1 + 3 * 32 * 32) for path in filepaths
                ]
                for i, record in enumerate(np.concatenate(files)):
                    pixels = record[1:].reshape(3, 32, 32).transpose(1, 2, 0)
                    yield (
                        i,
                        {
                            "id": f"{split_prefix}{i:05d}",
                            "image": Image.fromarray(pixels),
                            "label": int(record[0]),
                        },
                    )

    config = tfds.download.DownloadConfig(force_checksums_validation=True, try_download_gcs=False)
    try:
        return _through_records(Cifar10, directory, config)
    except Exception as error:  # of a dozen kinds, by what went wrong on the way
        raise OSError(
            f"expected to download CIFAR-10 from {_CIFAR10_PAGE}, got {type(error).__name__}: "
            f"{error}; try again with a network, or give the images as a folder (--image-folder)"
        ) from error


def _prepare_folder(directory: Path, files: Mapping[str, Mapping[str, list[Path]]]) -> Dataset:
    """Images to records to arrays."""
    import tensorflow_datasets as tfds

    first = next(_paths(files))
    grey = all(_decoded(path, None).mode == "L" for path in _paths(files))
    mode = "L" if grey else "RGB"
    width, height = size = _decoded(first, mode).size

    with tfds.core.registered.skip_registration():

        class ImageFolder(tfds.core.GeneratorBasedBuilder):
            """What tfds.ImageFolder reads, as records."""

            VERSION = tfds.core.Version("1.0.0")

            def _info(self) -> Any:
                return tfds.core.DatasetInfo(
                    builder=self,
                    description="Images in one folder for each class.",
                    features=tfds.features.FeaturesDict(
                        {
                            "image": tfds.features.Image(shape=(height, width, 1 if grey else 3)),
                            "label": tfds.features.ClassLabel(names=list(files["train"])),
                        }
                    ),
                    supervised_keys=("image", "label"),
                    disable_shuffling=True,
                )

            def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, Any]]]:
                return {part: self._generate_examples(classes) for part, classes in files.items()}

            def _generate_examples(
                self, classes: Mapping[str, list[Path]]
            ) -> Iterator[tuple[int, Any]]:
                examples = ((path, name) for name, paths in classes.items() for path in paths)
                for i, (path, name) in enumerate(examples):
                    image = _decoded(path, mode)
                    if image.size != size:
                        raise ValueError(
                            f"expected images of one size, {width}x{height} as {first} has, got "
                            f"{image.width}x{image.height} in {path}; resize or remove it"
                        )
                    yield i, {"image": image, "label": name}

    return _through_records(ImageFolder, directory, tfds.download.DownloadConfig())


def _image_files(folder: Path) -> dict[str, dict[str, list[Path]]]:
    """The images of each class of `train` and `test`; an error where some are missing."""
    files: dict[str, dict[str, list[Path]]] = {}
    for part in ("train", "test"):
        if not (folder / part).is_dir():
            raise FileNotFoundError(
                f"expected a folder {folder / part} with a folder of images for each class, got "
                "none; the layout is DIR/train/CLASS/*.png and DIR/test/CLASS/*.png"
            )
        files[part] = {}
        for place in sorted(folder.joinpath(part).iterdir()):
            if place.is_dir() and not place.name.startswith("."):
                shown = sorted(path for path in place.iterdir() if not path.name.startswith("."))
                for path in shown:
                    if path.suffix.lower() not in (".png", ".jpg", ".jpeg"):
                        raise ValueError(
                            f"expected PNG or JPEG images, got {path}; convert or remove it"
                        )
                files[part][place.name] = shown
    for part in files:
        for name in sorted(files["train"].keys() | files["test"].keys()):
            if not files[part].get(name):
                raise FileNotFoundError(
                    f"expected images of class {name!r} in {folder / part / name}, got none; each "
                    "class needs images in both train and test"
                )
    if not files["train"]:
        raise FileNotFoundError(
            f"expected a folder for each class in {folder / 'train'}, got none; the layout is "
            "DIR/train/CLASS/*.png and DIR/test/CLASS/*.png"
        )
    return files


def _paths(files: Mapping[str, Mapping[str, list[Path]]]) -> Iterator[Path]:
    return (path for part in files.values() for paths in part.values() for path in paths)


def _decoded(path: Path, mode: str | None) -> Any:
    """A Pillow image, its pixels read, converted to a mode."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            image.load()
            if image.mode[0] in "IF":  # which Pillow would clip to bytes, not scale
                raise ValueError(
                    f"expected 8 bits for each pixel and colour in {path}, got mode {image.mode}; "
                    "scale the images to bytes"
                )
            return image.convert(mode) if mode else image.copy()
    except (OSError, SyntaxError) as error:  # Pillow raises both for files that are no images
        raise ValueError(
            f"expected an image in {path}, got a file that can't be decoded ({error}); "
            "replace or remove it"
        ) from error


def _through_records(builder_class: Any, directory: Path, config: Any) -> Dataset:
    """Prepares a builder's records and reads them as arrays."""
    import tensorflow_datasets as tfds

    # Whatever is here was left by an interrupted preparation, or led to arrays that don't verify.
    if directory.exists():
        shutil.rmtree(directory)
    builder = builder_class(data_dir=directory, file_format="array_record")
    builder.download_and_prepare(download_config=config)
    if not {"train", "test"} <= set(builder.info.splits):
        raise ValueError(
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

    return Dataset(*arrays("train"), *arrays("test"))


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
            raise ValueError(
                f"{path} isn't the original MNIST file: expected {int(info.size)} bytes of sha256 "
                f"{info.checksum}, got {len(content)} of {checksum}; {cure}"
            )
