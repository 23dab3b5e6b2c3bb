"""MNIST is what its authors published, pixel for pixel, whatever happened while it was prepared."""

import gzip
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from experiments import data

ROOT = Path(data.__file__).resolve().parents[1]

# Size and sha256 as tensorflow-datasets registers them.
ORIGINALS = {
    "train-images-idx3-ubyte.gz": (
        9912422,
        "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
    ),
    "train-labels-idx1-ubyte.gz": (
        28881,
        "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
    ),
    "t10k-images-idx3-ubyte.gz": (
        1648877,
        "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
    ),
    "t10k-labels-idx1-ubyte.gz": (
        4542,
        "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
    ),
}

# Run where warnings are errors; says on its last line what it imported and whom it tried to reach.
LOAD = """
import socket, sys
reached = []
def refuse(*args, **kwargs):
    reached.append(args)
    raise OSError("no network here")
socket.socket.connect = socket.getaddrinfo = refuse
from experiments import data
data.mnist(data_dir=sys.argv[1])
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
    debris: list  # what the killed process left
    outputs: list  # of the two processes that then prepared at once


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    """MNIST, prepared after a kill -9 by two processes at once."""
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


@pytest.fixture
def mnist(prepared):
    return data.mnist(data_dir=prepared.directory)


class Preparation:
    """Stands in for the 15 seconds of the real one, and counts how often it was needed."""

    def __init__(self):
        self.count = 0

    def __call__(self, directory):
        self.count += 1
        return tiny(seed=0)


def tiny(seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (7, 28, 28, 1), np.uint8)
    return data.Dataset(pixels[:4], np.arange(4, dtype=np.int32), pixels[4:], np.ones(3, np.int32))


@pytest.fixture
def preparation(monkeypatch):
    preparation = Preparation()
    monkeypatch.setattr(data, "_prepare_mnist", preparation)
    return preparation


def assert_same(got, expected):
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b, strict=True)


# What MNIST is.


@pytest.mark.parametrize("name", ORIGINALS)
def test_embedded_original_is_byte_exact(name):
    content = (data.ORIGINALS / name).read_bytes()
    assert (len(content), hashlib.sha256(content).hexdigest()) == ORIGINALS[name]


def test_embedded_originals_are_all_there_is():
    # An __init__.py here would make `experiments.data` this folder and not the module.
    assert {path.name for path in data.ORIGINALS.iterdir()} == set(ORIGINALS)
    assert Path(data.__file__) == ROOT / "experiments" / "data.py"


def test_shapes_and_dtypes(mnist):
    assert [(array.shape, array.dtype) for array in mnist] == [
        ((60000, 28, 28, 1), np.uint8),
        ((60000,), np.int32),
        ((10000, 28, 28, 1), np.uint8),
        ((10000,), np.int32),
    ]


def test_known_facts(mnist):
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
    for array in mnist:
        assert isinstance(array, np.memmap)
        assert not array.flags.writeable


def test_records_have_the_stock_layout(prepared, mnist):
    import tensorflow_datasets as tfds

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


# How it is prepared.


def test_a_killed_preparation_is_recovered_from(prepared, mnist):
    assert any("incomplete" in name for name in prepared.debris)
    assert not any(name.endswith(".npy") for name in prepared.debris)
    assert len(mnist.train_labels) == 60000
    assert not list(prepared.directory.rglob("*incomplete*"))


def test_of_two_processes_at_once_one_prepares(prepared):
    assert sorted("Downloading and preparing" in output for output in prepared.outputs) == [0, 1]


def test_preparing_needs_neither_network_nor_tensorflow(prepared):
    (output,) = (output for output in prepared.outputs if "Downloading and preparing" in output)
    assert output.splitlines()[-1] == "['tensorflow_datasets'] []"


def test_opening_does_not_import_tensorflow_datasets(prepared):
    assert finish(python(LOAD, prepared.directory)).splitlines() == ["[] []"]


@pytest.mark.parametrize("name", ["train-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"])
@pytest.mark.parametrize("damage", ["missing", "truncated", "altered"])
def test_a_damaged_original_is_named_with_its_cure(name, damage, tmp_path, monkeypatch):
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
            f"{re.escape(str(path))}.*expected {size} bytes of sha256 {expected}, "
            f"got {len(content)} of {got}; .*{cure}"
        )
    with pytest.raises(error, match=message):
        data.mnist(data_dir=tmp_path / "cache")


# How it is kept.


def test_the_second_call_opens_what_the_first_stored(preparation, tmp_path):
    first = data.mnist(data_dir=tmp_path)
    second = data.mnist(data_dir=tmp_path)
    assert preparation.count == 1
    assert_same(first, tiny(seed=0))
    assert_same(second, first)


@pytest.mark.parametrize("name", [*data.Dataset._fields, "checksums"])
@pytest.mark.parametrize("damage", ["missing", "empty", "truncated", "first byte", "last byte"])
def test_a_damaged_cache_is_rebuilt(name, damage, preparation, tmp_path):
    data.mnist(data_dir=tmp_path)
    (path,) = (tmp_path / "mnist").glob(f"{name}.*")
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
    assert_same(data.mnist(data_dir=tmp_path), tiny(seed=0))
    assert preparation.count == 2
    assert_same(data.mnist(data_dir=tmp_path), tiny(seed=0))
    assert preparation.count == 2


def test_a_rebuilt_cache_leaves_open_arrays_alone(preparation, tmp_path):
    old = data.mnist(data_dir=tmp_path)
    data._store(tmp_path / "mnist", tiny(seed=1))
    assert_same(old, tiny(seed=0))
    assert_same(data.mnist(data_dir=tmp_path), tiny(seed=1))


# Stores one data set over another; killed at a numbered fsync or rename, of ten.
KILLED_STORE = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[3])
import test_data
from experiments import data
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
data._store(Path(sys.argv[1]) / "mnist", test_data.tiny(seed=0))
"""


@pytest.mark.parametrize("moment", range(11))
def test_a_killed_store_never_mixes_old_and_new(moment, preparation, tmp_path):
    (tmp_path / "mnist").mkdir()
    data._store(tmp_path / "mnist", tiny(seed=1))
    process = python(KILLED_STORE, tmp_path, moment, Path(__file__).parent)
    _, err = process.communicate(timeout=60)
    assert process.returncode == (-signal.SIGKILL if moment < 10 else 0), err
    # Until the first rename, nothing of the old one is touched.
    assert_same(data.mnist(data_dir=tmp_path), tiny(seed=1 if moment < 2 else 0))
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


# What is made of it.


def test_scale_divides_by_256():
    images = np.arange(2 * 28 * 28, dtype=np.uint8).reshape(2, 28, 28, 1)
    scaled = data.scale_mnist(images)
    assert (scaled.shape, scaled.dtype, type(scaled)) == (images.shape, np.float32, np.ndarray)
    assert (scaled.min(), scaled.max()) == (0, 0.99609375)
    np.testing.assert_array_equal(scaled * 256, images)


def test_scale_refuses_what_is_not_pixels():
    with pytest.raises(TypeError, match="expected uint8 images, got float32; pass the pixels"):
        data.scale_mnist(np.zeros((2, 28, 28, 1), np.float32))
    with pytest.raises(ValueError, match=r"\[n, 28, 28, 1\], got \[28, 28, 1\]; .*images\[i : i"):
        data.scale_mnist(np.zeros((28, 28, 1), np.uint8))


@pytest.mark.parametrize(("n", "holdout"), [(60, 10), (60, 0), (60, 60), (1, 1)])
def test_split_is_a_partition(n, holdout):
    train, held_out = data.split(n, holdout, seed=3)
    assert (len(train), len(held_out)) == (n - holdout, holdout)
    np.testing.assert_array_equal(np.sort(np.concatenate([train, held_out])), np.arange(n))


def test_split_is_drawn_by_seed():
    first, again, other = (data.split(60, 10, seed=seed) for seed in (3, 3, 4))
    np.testing.assert_array_equal(first[0], again[0])
    np.testing.assert_array_equal(first[1], again[1])
    assert set(first[1]) != set(other[1])
    assert set(first[1]) != set(range(10))


@pytest.mark.parametrize("holdout", [-1, 61])
def test_split_refuses_more_than_there_is(holdout):
    with pytest.raises(ValueError, match=rf"expected holdout in 0\.\.60, got {holdout}; hold out"):
        data.split(60, holdout, seed=3)
