"""MNIST as arrays: from the four original files in this repository, through tensorflow-datasets.

The originals lie in `experiments/data/`, so a fresh machine without a network runs the real thing.
The first call of `mnist` takes three steps, about 20 seconds together; every later one takes none:

1. Each original is compared with the size and sha256 under which tensorflow-datasets registers it.
2. A builder, the stock one in all that a reader of its records sees but their order, which is that
   of the originals, prepares them as array_record. The stock one needs TensorFlow to gunzip and to
   write PNG; Python's gzip and Pillow do the same.
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
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["ORIGINALS", "Dataset", "mnist", "scale_mnist", "split"]

ORIGINALS = Path(__file__).resolve().parent / "data"
_CHECKSUMS = "checksums.json"


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
    directory = (_cache_directory() if data_dir is None else Path(data_dir)) / "mnist"
    unusable = (OSError, ValueError)
    with suppress(*unusable):
        return _open(directory)
    directory.mkdir(parents=True, exist_ok=True)
    with _locked(directory / "lock"):
        with suppress(*unusable):
            return _open(directory)  # another process prepared it while this one waited
        _store(directory, _prepare_mnist(directory / "prepared"))
        return _open(directory)


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


def _cache_directory() -> Path:
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

    # tensorflow-datasets has no types, so a type checker knows neither the base nor its argument.
    class Mnist(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg, misc]
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
                return self._generate_examples(*dl_manager.download([stock.URL + n for n in names]))

            return {"train": examples("train"), "test": examples("t10k")}

        def _generate_examples(self, images: Any, labels: Any) -> Iterator[tuple[int, Any]]:
            # An idx file is a header of four bytes and four more for each axis, then the values.
            pixels = np.frombuffer(gzip.decompress(images.read_bytes()), np.uint8, offset=16)
            digits = np.frombuffer(gzip.decompress(labels.read_bytes()), np.uint8, offset=8)
            for i, image in enumerate(pixels.reshape(len(digits), 28, 28)):
                yield i, {"image": Image.fromarray(image), "label": int(digits[i])}

    # Whatever is here was left by an interrupted preparation, or led to arrays that don't verify.
    if directory.exists():
        shutil.rmtree(directory)
    builder = Mnist(data_dir=directory, file_format="array_record")
    builder.download_and_prepare(
        download_config=tfds.download.DownloadConfig(
            manual_dir=ORIGINALS, force_checksums_validation=True, try_download_gcs=False
        )
    )

    def arrays(part: str) -> tuple[NDArray[np.uint8], NDArray[np.int32]]:
        source = builder.as_data_source(split=part)
        images = np.empty((len(source), 28, 28, 1), np.uint8)
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
