"""MNIST as its authors published it, however its preparation went; image folders; CIFAR-10."""

import gzip
import hashlib
import io
import itertools
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from experiments.lib import builders, cache, data, options

ROOT = Path(data.__file__).resolve().parents[2]

# Size and first digits of the sha256, as registered in tensorflow-datasets.
ORIGINALS = {
    "train-images-idx3-ubyte.gz": (9912422, "440fcabf73cc546fa21475e81ea37026"),
    "train-labels-idx1-ubyte.gz": (28881, "3552534a0a558bbed6aed32b30c495cc"),
    "t10k-images-idx3-ubyte.gz": (1648877, "8d422c7b0a1c1c79245a5bcf07fe86e3"),
    "t10k-labels-idx1-ubyte.gz": (4542, "f7ae60f92e00ec6debd23a6088c31dbd"),
}

# Run with warnings as errors; its last line lists what it imported and which hosts it tried.
LOAD = """
import os, socket, sys
os.environ["JAXADV_DATA"] = sys.argv[1]
reached = []
def refuse(*args, **kwargs):
    reached.append(args)
    raise OSError("no network here")
socket.socket.connect = socket.getaddrinfo = refuse
from experiments.lib import data
data.mnist()
packages = {name.partition(".")[0] for name in sys.modules}
print(sorted(packages & {"tensorflow", "tensorflow_datasets"}), reached)
"""


def python(code, *args, **kwargs):
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", code, *map(str, args)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **kwargs,
    )


def finish(process):
    out, err = process.communicate(timeout=180)
    assert process.returncode == 0, err
    return out


class Prepared(NamedTuple):
    directory: Path
    debris: list  # files that the killed process left behind
    outputs: list  # of the two processes that then prepared it concurrently


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    """MNIST, prepared by two concurrent processes after a third was killed by SIGKILL."""
    directory = tmp_path_factory.mktemp("data")
    killed = python(LOAD, directory)
    deadline = time.monotonic() + 60
    while not list(directory.glob("mnist/prepared/mnist/incomplete*/*array_record*")):
        assert killed.poll() is None, killed.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    killed.kill()
    killed.communicate()
    debris = [str(path.relative_to(directory)) for path in directory.rglob("*")]
    processes = [python(LOAD, directory) for _ in range(2)]
    return Prepared(directory, debris, [finish(process) for process in processes])


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    place = tmp_path / "cache"
    monkeypatch.setenv("JAXADV_DATA", str(place))
    return place


@pytest.fixture
def mnist(prepared, own_cache, monkeypatch):
    monkeypatch.setenv("JAXADV_DATA", str(prepared.directory))
    return data.mnist()


class Preparation:
    """Stands in for the real preparation, which takes 15 seconds, and counts its calls."""

    def __init__(self):
        self.count = 0

    def __call__(self, directory):
        self.count += 1
        return tiny(seed=0)


def tiny(seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (7, 28, 28, 1), np.uint8)
    return pixels[:4], np.arange(4, dtype=np.int32), pixels[4:], np.ones(3, np.int32)


@pytest.fixture
def preparation(monkeypatch):
    preparation = Preparation()
    monkeypatch.setattr(data, "_prepare_mnist", preparation)
    return preparation


def assert_same(got, arrays):
    for a, b in zip(got[:4], arrays[:4], strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b, strict=True)


# MNIST


def test_the_embedded_originals_are_byte_exact():
    for name, (size, digest) in ORIGINALS.items():
        content = (data.ORIGINALS / name).read_bytes()
        assert len(content) == size
        assert hashlib.sha256(content).hexdigest().startswith(digest)


def test_the_folder_of_embedded_data_has_the_originals_and_the_crops_only():
    # It is next to the commands, not in lib/ with the module.
    embedded = {path.name for path in data.ORIGINALS.iterdir()}
    assert embedded == {*ORIGINALS, "cifar10_crops.npz"}
    assert Path(data.__file__) == ROOT / "experiments" / "lib" / "data.py"


def test_the_counts_of_each_class_and_the_first_labels_are_the_known_ones(mnist):
    train = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    test = [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    np.testing.assert_array_equal(np.bincount(mnist.train_labels), train)
    np.testing.assert_array_equal(np.bincount(mnist.test_labels), test)
    assert (mnist.train_labels[0], mnist.test_labels[0]) == (5, 7)


@pytest.mark.parametrize(("part", "prefix"), [("train", "train"), ("test", "t10k")])
def test_equals_a_direct_parse_of_the_originals(mnist, part, prefix):
    def idx(name):
        with gzip.open(data.ORIGINALS / f"{prefix}-{name}-ubyte.gz") as file:
            _, _, dtype, axes = file.read(4)
            assert dtype == 8  # unsigned byte
            shape = [int.from_bytes(file.read(4), "big") for _ in range(axes)]
            return np.array(bytearray(file.read())).reshape(shape)

    images, labels = getattr(mnist, f"{part}_images"), getattr(mnist, f"{part}_labels")
    np.testing.assert_array_equal(images[..., 0], idx("images-idx3"), strict=True)
    np.testing.assert_array_equal(labels, idx("labels-idx1").astype(np.int32), strict=True)


def test_arrays_are_mapped_and_read_only(mnist):
    for array in mnist[:4]:
        assert isinstance(array, np.memmap)
        assert not array.flags.writeable


def test_records_have_the_stock_layout(prepared, mnist):
    builder = tfds.builder_from_directory(prepared.directory / "mnist/prepared/mnist/3.0.1")
    features = builder.info.features
    assert (features["image"].shape, features["image"].np_dtype) == ((28, 28, 1), np.uint8)
    assert features["label"].num_classes == 10
    assert {name: part.num_examples for name, part in builder.info.splits.items()} == {
        "train": 60000,
        "test": 10000,
    }
    assert builder.info.file_format == tfds.core.FileFormat.ARRAY_RECORD
    record = builder.as_data_source(split="test")[9999]
    np.testing.assert_array_equal(record["image"], mnist.test_images[9999], strict=True)
    assert record["label"] == mnist.test_labels[9999]


# Preparation


def test_a_killed_preparation_is_recovered_from(prepared, mnist):
    assert any("incomplete" in name for name in prepared.debris)
    assert not any(name.endswith(".npy") for name in prepared.debris)
    assert len(mnist.train_labels) == 60000
    assert not list(prepared.directory.rglob("*incomplete*"))


def test_only_one_of_two_concurrent_processes_prepares(prepared):
    assert sorted("Downloading and preparing" in output for output in prepared.outputs) == [0, 1]


def test_preparing_needs_neither_network_nor_tensorflow(prepared):
    (output,) = (output for output in prepared.outputs if "Downloading and preparing" in output)
    assert output.splitlines()[-1] == "['tensorflow_datasets'] []"


def test_opening_does_not_import_tensorflow_datasets(prepared):
    assert finish(python(LOAD, prepared.directory)).splitlines() == ["[] []"]


@pytest.mark.parametrize("damage", ["missing", "truncated", "altered"])
def test_a_damaged_original_is_reported_with_a_remedy(damage, tmp_path, monkeypatch):
    name = "t10k-labels-idx1-ubyte.gz"
    shutil.copytree(data.ORIGINALS, tmp_path / "originals")
    monkeypatch.setattr(data, "ORIGINALS", tmp_path / "originals")
    path = tmp_path / "originals" / name
    content = bytearray(path.read_bytes())
    cure = re.escape(f"git checkout -- experiments/data/{name}")
    if damage == "missing":
        path.unlink()
        error, message = FileNotFoundError, f"{re.escape(str(path))}.*{cure}"
    else:
        if damage == "truncated":
            del content[-1]
        else:
            content[len(content) // 2] ^= 1
        path.write_bytes(content)
        size, expected = ORIGINALS[name]
        got = hashlib.sha256(content).hexdigest()
        error = ValueError
        message = (
            f"{re.escape(str(path))}.*expected {size} bytes with sha256 {expected}\\w+, "
            f"got {len(content)} with {got}; .*{cure}"
        )
    with pytest.raises(error, match=message):
        data.mnist()


# The cache


def test_the_second_call_opens_what_the_first_stored(preparation):
    first = data.mnist()
    second = data.mnist()
    assert preparation.count == 1
    assert_same(first, tiny(seed=0))
    assert_same(second, first)


@pytest.mark.parametrize("name", ["train_labels", "checksums"])
@pytest.mark.parametrize("damage", ["missing", "empty", "truncated", "first byte", "last byte"])
def test_a_damaged_cache_is_rebuilt(name, damage, preparation, own_cache):
    data.mnist()
    (path,) = (own_cache / "mnist").glob(f"{name}.*")
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(
            {
                "empty": b"",
                "truncated": content[: len(content) // 2],
                "first byte": bytes([content[0] ^ 1]) + content[1:],
                "last byte": content[:-1] + bytes([content[-1] ^ 1]),
            }[damage]
        )
    assert_same(data.mnist(), tiny(seed=0))
    assert preparation.count == 2
    assert_same(data.mnist(), tiny(seed=0))
    assert preparation.count == 2


def test_rebuilding_the_cache_does_not_change_open_arrays(preparation, own_cache):
    old = data.mnist()
    cache.store(own_cache / "mnist", tiny(seed=1))
    assert_same(old, tiny(seed=0))
    assert_same(data.mnist(), tiny(seed=1))


# Stores one data set over another; killed at the given one of its ten fsyncs and renames.
KILLED_STORE = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[3])
import test_data
from experiments.lib import cache
calls = 0
def kill_at(function):
    def counted(*args):
        global calls
        if calls == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)
        calls += 1
        return function(*args)
    return counted
os.fsync, os.replace = kill_at(os.fsync), kill_at(os.replace)
cache.store(Path(sys.argv[1]) / "mnist", test_data.tiny(seed=0))
"""


@pytest.mark.parametrize("moment", [0, 1, 2, 6, 9, 10])
def test_a_killed_store_never_mixes_old_and_new(moment, preparation, own_cache):
    (own_cache / "mnist").mkdir(parents=True)
    cache.store(own_cache / "mnist", tiny(seed=1))
    process = python(KILLED_STORE, own_cache, moment, Path(__file__).parent)
    _, err = process.communicate(timeout=60)
    assert process.returncode == (-signal.SIGKILL if moment < 10 else 0), err
    # Until the first rename, the old one is untouched.
    assert_same(data.mnist(), tiny(seed=1 if moment < 2 else 0))
    assert preparation.count == (moment in range(2, 10))


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"JAXADV_DATA": "chosen", "XDG_CACHE_HOME": "xdg"}, "chosen"),
        ({"XDG_CACHE_HOME": "xdg"}, "xdg/jaxadv"),
        ({"JAXADV_DATA": "", "XDG_CACHE_HOME": ""}, "home/.cache/jaxadv"),
        ({}, "home/.cache/jaxadv"),
        ({"JAXADV_DATA": "~/chosen"}, "home/chosen"),
    ],
)
def test_the_default_directory(variables, expected, preparation, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("JAXADV_DATA", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    data.mnist()
    assert (tmp_path / expected / "mnist" / "train_images.npy").is_file()


# Scaling and splitting


def test_scale_divides_by_256():
    images = np.arange(2 * 28 * 28, dtype=np.uint8).reshape(2, 28, 28, 1)
    scaled = data.MNIST.inputs(images)
    assert (scaled.shape, scaled.dtype, type(scaled)) == (images.shape, np.float32, np.ndarray)
    assert (scaled.min(), scaled.max()) == (0, 0.99609375)
    np.testing.assert_array_equal(scaled * 256, images)


def test_scale_refuses_floats_and_single_images():
    with pytest.raises(TypeError, match="expected uint8 pixels, got float32; pass the pixels"):
        data.MNIST.inputs(np.zeros((2, 28, 28, 1), np.float32))
    with pytest.raises(ValueError, match=r"\[n, H, W, C\], got \[28, 28, 1\]; .*images\[i : i"):
        data.MNIST.inputs(np.zeros((28, 28, 1), np.uint8))


@pytest.mark.parametrize(("n", "holdout"), [(60, 10), (60, 0), (60, 60), (1, 1)])
def test_split_is_a_partition_drawn_by_seed(n, holdout):
    train, held_out = data.split(n, holdout, seed=3)
    assert (len(train), len(held_out)) == (n - holdout, holdout)
    np.testing.assert_array_equal(np.sort(np.concatenate([train, held_out])), np.arange(n))
    np.testing.assert_array_equal(data.split(n, holdout, seed=3)[1], held_out)
    other = data.split(n, holdout, seed=4)[1]
    assert set(held_out) != set(other) or holdout in (0, n)


@pytest.mark.parametrize("holdout", [-1, 61])
def test_split_refuses_a_holdout_that_is_negative_or_too_large(holdout):
    with pytest.raises(ValueError, match=rf"expected holdout in 0\.\.60, got {holdout}; hold out"):
        data.split(60, holdout, seed=3)


# Folders of images, and CIFAR-10


def folder_of(place, sizes=((5, 4),) * 3, mode="RGB", suffix="png"):
    """Write `train` and `test`, classes a and b, three images each; return the pixels."""
    rng = np.random.default_rng(0)
    pixels = {}
    for part in ("test", "train"):
        for name in ("b", "a"):
            (place / part / name).mkdir(parents=True)
            for i, (width, height) in enumerate(sizes):
                shape = (height, width) if mode == "L" else (height, width, 3)
                pixels[part, name, i] = rng.integers(0, 256, shape, dtype=np.uint8)
                path = place / part / name / f"{i}.{suffix}"
                Image.fromarray(pixels[part, name, i]).save(path)
    return pixels


@pytest.mark.parametrize(("mode", "channels"), [("RGB", 3), ("L", 1)])
def test_a_folder_is_read_as_pixels_in_the_order_of_file_names(tmp_path, mode, channels):
    pixels = folder_of(tmp_path / "images", mode=mode)
    read = data.image_folder(tmp_path / "images")
    for part in ("train", "test"):
        images, labels = getattr(read, f"{part}_images"), getattr(read, f"{part}_labels")
        assert images.shape == (6, 4, 5, channels)
        assert (images.dtype, labels.dtype) == (np.uint8, np.int32)
        np.testing.assert_array_equal(labels, [0, 0, 0, 1, 1, 1])
        expected = [pixels[part, name, i] for name in "ab" for i in range(3)]
        np.testing.assert_array_equal(images.reshape(np.shape(expected)), expected)


def test_a_folder_is_read_once_and_again_after_it_changes(tmp_path, monkeypatch):
    place = tmp_path / "images"
    folder_of(place)
    calls = []
    prepare = data._prepare_folder
    monkeypatch.setattr(data, "_prepare_folder", lambda *a: calls.append(1) or prepare(*a))
    data.image_folder(place)
    data.image_folder(place)
    assert len(calls) == 1
    Image.new("RGB", (5, 4), (9, 8, 7)).save(place / "test" / "b" / "1.png")
    read = data.image_folder(place)
    assert len(calls) == 2
    np.testing.assert_array_equal(read.test_images[4], np.broadcast_to([9, 8, 7], (4, 5, 3)))


def test_a_folder_can_be_read_once_its_broken_image_is_repaired(tmp_path):
    place = tmp_path / "images"
    folder_of(place)
    path = place / "test" / "a" / "1.png"
    whole = path.read_bytes()
    path.write_bytes(whole[:60])
    with pytest.raises(ValueError, match=r"image .* in .*test.a.1\.png.*; replace it, or remove"):
        data.image_folder(place)
    path.write_bytes(whole)
    assert len(data.image_folder(place).test_labels) == 6


def test_jpegs_are_decoded_and_hidden_files_are_ignored(tmp_path):
    place = tmp_path / "images"
    folder_of(place, suffix="jpg")
    (place / "train" / ".hidden").mkdir()
    (place / "train" / "a" / ".DS_Store").write_text("")
    read = data.image_folder(place)
    with Image.open(place / "train" / "b" / "2.jpg") as image:
        np.testing.assert_array_equal(read.train_images[5], np.asarray(image))


def test_cifar10_has_the_archives_bytes_in_order(tmp_path, monkeypatch):
    """With the stock builder's own list of files and a small archive."""
    rng = np.random.default_rng(0)
    place = tmp_path / "extracted" / "cifar-10-batches-bin"
    place.mkdir(parents=True)
    names = data.CIFAR10
    (place / "batches.meta.txt").write_text("\n".join(names) + "\n\n")
    records = {}
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        records[name] = rng.integers(0, 256, (3, 3073), dtype=np.uint8)
        records[name][:, 0] %= 10
        records[name].tofile(place / f"{name}.bin")
    asked = []

    def download(self, url):
        asked.append(url)
        return tmp_path / "extracted"

    monkeypatch.setattr(tfds.download.DownloadManager, "download_and_extract", download)
    read = data.cifar10()
    assert asked == ["https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"]
    assert read.classes == names
    train = np.concatenate([records[f"data_batch_{i}"] for i in range(1, 6)])
    for images, labels, expected in (
        (read.train_images, read.train_labels, train),
        (read.test_images, read.test_labels, records["test_batch"]),
    ):
        np.testing.assert_array_equal(labels, expected[:, 0])
        # Red, green and blue planes, each in row-major order.
        for c in range(3):
            plane = expected[:, 1 + 1024 * c : 1 + 1024 * (c + 1)].reshape(-1, 32, 32)
            np.testing.assert_array_equal(images[..., c], plane)


def test_a_failed_download_says_what_to_do(tmp_path, monkeypatch):
    def download(self, url):
        raise tfds.download.DownloadError("no network here")

    monkeypatch.setattr(tfds.download.DownloadManager, "download_and_extract", download)
    message = r"download CIFAR-10 from https://\S+, got DownloadError: no network here; .*--image-f"
    with pytest.raises(options.UnavailableError, match=message):
        data.cifar10()


def test_a_failed_download_from_the_catalogue_says_what_to_do(tmp_path, monkeypatch):
    def download(builder, place):
        raise ConnectionError("no network here")

    monkeypatch.setattr(builders, "prepared", download)
    with pytest.raises(options.UnavailableError, match=r"prepare mnist, got ConnectionError: no n"):
        data.from_tfds("mnist")


def test_with_one_colour_image_all_are_read_in_colour(tmp_path):
    pixels = folder_of(tmp_path / "images", mode="L")
    Image.new("RGB", (5, 4), (9, 8, 7)).save(tmp_path / "images" / "test" / "b" / "1.png")
    read = data.image_folder(tmp_path / "images")
    np.testing.assert_array_equal(read.test_images[4, 0, 0], [9, 8, 7])
    grey = pixels["train", "a", 0]
    np.testing.assert_array_equal(read.train_images[0], np.stack([grey] * 3, -1))


def test_a_description_changes_with_the_pixels_and_mentions_lossy_files(tmp_path):
    texts = []
    for name, suffix in (("one", "png"), ("same", "png"), ("jpeg", "jpg")):
        folder_of(tmp_path / name, suffix=suffix)
        read = data.image_folder(tmp_path / name)
        texts.append(data.describe(tmp_path / name, read))
    assert re.fullmatch(r"a folder of PNG files, crc32 [0-9a-f]{8}", texts[0])
    assert texts[0] == texts[1] != texts[2]
    assert "JPEG (lossy)" in texts[2]
    Image.new("RGB", (5, 4)).save(tmp_path / "one" / "test" / "b" / "1.png")
    changed = data.image_folder(tmp_path / "one")
    assert data.describe(tmp_path / "one", changed) != texts[0]


@pytest.mark.parametrize("where", ["images/train", "images"])
def test_without_a_test_part_every_fifth_image_is_held_out(tmp_path, where):
    pixels = folder_of(tmp_path / "images", sizes=((5, 4),) * 11)
    shutil.rmtree(tmp_path / "images" / "test")
    read = data.image_folder(tmp_path / where)
    order = sorted(range(11), key=str)  # by file name
    for part, kept in (("test", order[::5]), ("train", [i for n, i in enumerate(order) if n % 5])):
        expected = [pixels["train", name, i] for name in "ab" for i in kept]
        np.testing.assert_array_equal(getattr(read, f"{part}_images"), expected)
        np.testing.assert_array_equal(getattr(read, f"{part}_labels"), np.repeat([0, 1], len(kept)))


def test_images_of_any_size_are_cropped_to_their_middle_square_and_resized(tmp_path):
    place = tmp_path / "images"
    folder_of(place, sizes=((5, 4), (9, 30), (8, 8)))
    stripes = np.zeros((8, 40, 3), np.uint8)
    stripes[:, 10:30] = 200  # the middle square is 16:24; interpolation would reach beyond it
    Image.fromarray(stripes).save(place / "train" / "a" / "0.png")
    for side in (4, 6):
        read = data.image_folder(place, resize=side)
        assert read.train_images.shape == (6, side, side, 3)
        np.testing.assert_array_equal(read.train_images[0], 200)
    with pytest.raises(ValueError, match="of one size"):
        data.image_folder(place)


@pytest.mark.parametrize("channels", [1, 3])
def test_named_data_is_resized_like_a_folder(monkeypatch, channels):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (3, 6, 8, channels), dtype=np.uint8)
    labels = np.arange(3, dtype=np.int32)
    monkeypatch.setattr(
        data, "mnist", lambda: data.Dataset(pixels, labels, pixels[:2], labels[:2], tuple("abc"))
    )
    read = data.named("mnist", resize=6)  # this only crops
    np.testing.assert_array_equal(read.train_images, pixels[:, :, 1:7])
    np.testing.assert_array_equal(read.test_images, pixels[:2, :, 1:7])
    assert data.named("mnist").train_images is pixels


# Kinds of files in users' folders


@pytest.fixture
def place(tmp_path):
    """A folder of grey PNG files of 5x4 pixels."""
    folder_of(tmp_path / "images", mode="L")
    return tmp_path / "images"


def images_of(place):
    return [path for path in place.rglob("*") if path.is_file()]


def each_saved(place, change, **options):
    """Apply `change` to each image of a folder; return the first of class a, as saved."""
    for path in images_of(place):
        with Image.open(path) as image:
            image.load()
        change(image).save(path, **options)
    with Image.open(place / "train" / "a" / "0.png") as image:
        image.load()
    return image


@pytest.mark.parametrize("mode", ["1", "LA", "P"])
def test_grey_images_in_any_mode_have_one_channel(place, mode):
    first = each_saved(place, lambda image: image.convert(mode))
    assert first.mode == mode
    images = data.image_folder(place).train_images
    assert images.shape == (6, 4, 5, 1)
    np.testing.assert_array_equal(images[0, ..., 0], np.asarray(first.convert("L")))


def test_a_palette_image_with_a_colour_counts_as_colour(place):
    path = place / "test" / "b" / "1.png"
    Image.fromarray(np.full((4, 5, 3), (9, 8, 7), np.uint8)).quantize(2).save(path)
    np.testing.assert_array_equal(data.image_folder(place).test_images[4, 0, 0], [9, 8, 7])


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_photographs_are_turned_as_their_exif_orientation_says(tmp_path, suffix):
    # The EXIF standard defines them by where the stored first row and column are displayed.
    as_seen = [
        lambda a: a, np.fliplr, lambda a: np.rot90(a, 2), np.flipud, np.transpose,
        lambda a: np.rot90(a, -1), lambda a: np.rot90(a, 2).T, np.rot90,
    ]  # fmt: skip
    stored = np.kron([[10, 100], [60, 200]], np.ones((8, 8))).astype(np.uint8)
    for part, orientation in itertools.product(("train", "test"), range(1, 9)):
        exif = Image.Exif()
        exif[0x0112] = orientation
        path = tmp_path / "images" / part / str(orientation) / f"0.{suffix}"
        path.parent.mkdir(parents=True)
        Image.fromarray(stored).save(path, exif=exif)
    seen = data.image_folder(tmp_path / "images").test_images[..., 0].astype(int)
    for got, turn in zip(seen, as_seen, strict=True):
        np.testing.assert_allclose(got, turn(stored), atol=0 if suffix == "png" else 2)


def test_a_class_name_composed_or_decomposed_in_unicode_is_one_class(place):
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    (place / "train" / "a").rename(place / "train" / composed)
    (place / "test" / "a").rename(place / "test" / decomposed)
    images = data.image_folder(place)
    assert images.classes == ("b", composed)
    np.testing.assert_array_equal(images.test_labels, [0, 0, 0, 1, 1, 1])


@pytest.mark.parametrize("name", ["mnst", "fashion_mnist", "gone/images"])
def test_an_unknown_name_of_data_is_an_error_that_lists_the_choices(name):
    with pytest.raises(FileNotFoundError, match=rf"cifar10, tfds:NAME or a folder .* '{name}', an"):
        data.named(name)


@pytest.mark.parametrize(
    ("name", "is_one"),
    [("mnist", False), ("cifar10", False), ("tfds:emnist/letters", False), ("my/images", True)],
)
def test_a_name_of_data_is_a_folder_unless_it_names_a_data_set(name, is_one):
    assert data.is_folder(name) == is_one


def test_links_to_classes_and_images_are_followed(place):
    (place / "train").rename(place / "elsewhere")
    (place / "train").mkdir()
    for name in "ab":
        (place / "train" / name).symlink_to(place / "elsewhere" / name)
    (place / "train" / "b" / "9.png").symlink_to("0.png")
    images = data.image_folder(place).train_images
    assert len(images) == 7
    np.testing.assert_array_equal(images[3], images[6])


def test_a_class_whose_name_is_not_valid_unicode_is_read(place):
    for part in ("train", "test"):
        os.rename(place / part / "b", os.fsencode(place / part) + b"/\xff\n")
    assert data.image_folder(place).classes == ("a", "\udcff\n")


def test_uppercase_suffixes_are_images(place):
    for path in images_of(place):
        path.rename(path.with_suffix(".PNG"))
    assert len(data.image_folder(place).train_labels) == 6


def test_cmyk_jpegs_become_rgb(place):
    for path in images_of(place):
        path.unlink()
        Image.new("CMYK", (5, 4), (0, 255, 255, 0)).save(path.with_suffix(".jpg"))
    red = data.image_folder(place).test_images[0, 0, 0].astype(int)
    np.testing.assert_allclose(red, [255, 0, 0], atol=4)


def test_an_opaque_alpha_channel_is_dropped(place):
    pixels = np.arange(80, dtype=np.uint8).reshape(4, 5, 4)
    pixels[..., 3] = 255
    each_saved(place, lambda _: Image.fromarray(pixels))
    np.testing.assert_array_equal(data.image_folder(place).train_images[0], pixels[..., :3])


def test_of_a_jpeg_with_a_preview_the_first_image_is_read(place):
    for path in images_of(place):
        path.unlink()
        picture, preview = Image.new("RGB", (5, 4), "white"), Image.new("RGB", (2, 2))
        picture.save(path.with_suffix(".jpg"), format="MPO", save_all=True, append_images=[preview])
    assert (data.image_folder(place).train_images == 255).all()


def test_a_jpeg_named_png_is_described_as_lossy(place):
    each_saved(place, lambda image: image, format="JPEG")
    assert "JPEG (lossy)" in data.describe(place, data.image_folder(place))


def png_of_16_bits(colour_type, channels):
    """A PNG of 5x4 pixels, by hand, since Pillow can't write 16-bit colour."""

    def chunk(name, content):
        checked = name + content
        return struct.pack(">I", len(content)) + checked + struct.pack(">I", zlib.crc32(checked))

    header = struct.pack(">IIBBBBB", 5, 4, 16, colour_type, 0, 0, 0)
    rows = zlib.compress(4 * bytes(1 + 2 * 5 * channels))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        chunk(*part) for part in ((b"IHDR", header), (b"IDAT", rows), (b"IEND", b""))
    )


def large_png(side):
    content = bytearray(png_of_16_bits(0, 1))
    content[16:25] = struct.pack(">IIB", side, side, 8)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    return bytes(content)


def gif():
    file = io.BytesIO()
    Image.new("L", (5, 4)).save(file, "GIF")
    return file.getvalue()


def animation():
    file = io.BytesIO()
    frames = [Image.new("L", (5, 4), level) for level in (0, 9)]
    frames[0].save(file, "PNG", save_all=True, append_images=frames[1:])
    return file.getvalue()


def transparent(mode, colour, **options):
    file = io.BytesIO()
    Image.new(mode, (5, 4), colour).save(file, "PNG", **options)
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (large_png(20_000), r"got one larger than Pillow decodes \(.*400000000 pixels.*make it"),
        (b"", "got a file that can't be decoded .*; replace it, or remove it"),
        (gif(), "got a file that can't be decoded .*; replace it, or remove it"),
        (animation(), "got an animation of 2 frames; choose one of them, or remove it"),
        (png_of_16_bits(2, 3), "got one of 16 bits; scale it to 8 bits, or remove it"),
        (png_of_16_bits(0, 1), "got one of 16 bits; scale it to 8 bits, or remove it"),
        (transparent("LA", (9, 254)), "got one with transparent pixels; lay it on a background"),
        (transparent("RGBA", (9, 8, 7, 0)), "got one with transparent pixels; lay it on a back"),
        (transparent("P", 0, transparency=0), "got one with transparent pixels; lay it on a back"),
        (transparent("L", 9, transparency=9), "got one with transparent pixels; lay it on a back"),
    ],
    ids=[
        "20000x20000", "empty", "GIF", "animated PNG", "16-bit RGB", "16-bit grey",
        "LA", "RGBA", "transparent palette", "transparent grey",
    ],
)  # fmt: skip
def test_an_error_about_an_unusable_image_names_it(place, content, message):
    (place / "test" / "b" / "1.png").write_bytes(content)
    start = r"expected an opaque image of 8 bits for each pixel and colour in .*test.b.1\.png, "
    with pytest.raises(ValueError, match=start + message):
        data.image_folder(place)


def altered(path):
    content = bytearray(path.read_bytes())
    content[content.index(b"IDAT") - 1] -= 20  # the length of the pixels' chunk
    path.write_bytes(content)


def emptied(place):
    for path in place.iterdir():
        path.unlink()


def of_both(place, change):
    for part in ("train", "test"):
        change(place / part)


def twice(classes):
    for name in ("caf\u00e9", "cafe\u0301"):
        shutil.copytree(classes / "a", classes / name)


def alone(classes):
    (classes / "b").mkdir()
    Image.new("L", (5, 4)).save(classes / "b" / "0.png")


# name: how to damage the folder, and the error
BROKEN = {
    "no folder": (shutil.rmtree, r"a folder of images .*images, got none; the layout is"),
    "a file": (lambda p: (shutil.rmtree(p), p.touch()),
               r"a folder of images .*images, got none; the layout is"),
    "no train": (lambda p: shutil.rmtree(p / "train"), r"a folder .*train with a folder of image"),
    "test by another name": (lambda p: (p / "test").rename(p / "val"),
                             r"for testing in .*test, got val beside train; rename their folder"),
    "one image": (lambda p: (shutil.rmtree(p / "test"), shutil.rmtree(p / "train" / "b"),
                             (p / "train" / "a").rename(p / "train" / "c"), alone(p / "train")),
                  r"at least two images of each class, .* got 1 of class 'b' in .*train; add"),
    "no class": (lambda p: shutil.rmtree(p / "test" / "b"), r"of class 'b' in .*test.b, got none"),
    "empty class": (lambda p: emptied(p / "train" / "a"), r"of class 'a' in .*train.a, got none"),
    "one class": (lambda p: of_both(p, lambda q: shutil.rmtree(q / "b")),
                  r"folders of at least two classes in .*train, got 1; the layout is"),
    "class of test only": (lambda p: shutil.copytree(p / "test" / "b", p / "test" / "c"),
                           r"images of class 'c' in .*train.c, got none; each class"),
    "altered": (lambda p: altered(p / "test" / "a" / "1.png"),
                r"image .* in .*test.a.1\.png.*; replace it, or remove"),
    "size": (lambda p: Image.new("RGB", (4, 4)).save(p / "train" / "b" / "2.png"),
             r"images of one size, 5x4 as in .*0\.png, got 4x4 in .*b.2\.png; .* --resize 32"),
    "suffix": (lambda p: (p / "train" / "b" / "notes.txt").write_text("hello"),
               r"PNG or JPEG images in .*b, got .*notes\.txt; convert or"),
    "broken link": (lambda p: (p / "train" / "b" / "9.png").symlink_to("gone.png"),
                    r"image in .*b.9\.png, got a link to gone\.png, which isn't there; mend"),
    "broken link to a class": (lambda p: (p / "train" / "c").symlink_to("gone"),
                               r"only folders in .*train, one for .*, got .*train.c; move it"),
    "stray image": (lambda p: shutil.copy(p / "train" / "b" / "0.png", p / "train" / "0.png"),
                    r"only folders in .*train, one for each class, got .*train.0\.png; move it"),
    "nested folder": (lambda p: (p / "train" / "b" / "more.png").mkdir(),
                      r"JPEG images in .*b, got .*more\.png; convert or remove it"),
    "pipe": (lambda p: os.mkfifo(p / "train" / "b" / "more.png"),
             r"JPEG images in .*b, got .*more\.png; convert or remove it"),
    "names that look alike": (lambda p: twice(p / "train"),
                              r"got two .* alike, 'cafe\\u0301' and 'caf\\xe9'; merge them"),
}  # fmt: skip


@pytest.mark.parametrize("how", BROKEN)
def test_an_error_about_an_unusable_folder_names_the_place(place, how):
    change, message = BROKEN[how]
    change(place)
    with pytest.raises((options.UsageError, FileNotFoundError), match=f"expected .*{message}"):
        data.image_folder(place)


def test_cifar10_is_scaled_and_cropped_as_in_the_paper():
    pixels = np.zeros((1, 32, 33, 3), np.uint8)
    pixels[:, 2:30, 2:30] = 117
    pixels[:, 2, 2], pixels[:, 29, 29] = 1, 255
    scaled = data.CIFAR10_CROPS.inputs(pixels)
    assert (scaled.shape, scaled.dtype) == ((1, 28, 28, 3), np.float32)
    np.testing.assert_array_equal(scaled[0, 0, 0], -116 / 256)
    np.testing.assert_array_equal(scaled[0, -1, -1], 138 / 256)
    assert np.count_nonzero(scaled) == 6
