"""`experiments/accelerator.py`: what it needs, compares and keeps, and the CPU's record."""

import itertools
import subprocess
import sys
from functools import partial

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from nets import ATTACKS
from PIL import Image

from experiments import accelerator
from experiments.benchmarks import common, rates
from experiments.lib import data, models, problems, records, timing
from experiments.lib.records import AttackRow, PartRow
from jaxadv import train

KEY = jax.random.key(0)

ABSENT = ("tyro", "tensorflow_datasets", "array_record", "psutil", "PIL", "torch")
"""Packages that a machine with an accelerator may lack."""


def test_it_needs_no_package_that_such_a_machine_may_lack():
    absent = f"import sys; sys.modules.update(dict.fromkeys({ABSENT}))"
    done = subprocess.run(
        [sys.executable, "-c", f"{absent}; import experiments.accelerator"],
        cwd=common.ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_the_embedded_images_are_read_without_a_cache():
    mnist, prepared = data.mnist_originals(), data.mnist()
    for read, expected in zip(mnist, prepared, strict=True):
        np.testing.assert_array_equal(read, expected, strict=True)
    images, labels = data.cifar10_crops()
    assert (images.shape, images.dtype) == ((1000, 28, 28, 3), np.uint8)
    assert set(labels) == set(range(10))


def test_the_crops_are_the_inputs_of_an_evaluation(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    for part, name, i in itertools.product(("train", "test"), data.CIFAR10, range(2)):
        place = tmp_path / "images" / part / name
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(place / f"{i}.png")
    monkeypatch.setenv("JAXADV_DATA", str(tmp_path))
    data.save_cifar10_crops(tmp_path / "images", tmp_path / "crops.npz")
    with np.load(tmp_path / "crops.npz") as saved:
        x, y = data.CIFAR10_CROPS.inputs(saved["images"]), saved["labels"]
    weights = accelerator.RESULTS / "cifar10" / "normal" / "params.safetensors"
    problem = problems.load(
        problems.Settings(
            str(weights), data=str(tmp_path / "images"), subtract=117, divide=256, crop=28
        )
    )
    np.testing.assert_array_equal(x, problem.x, strict=True)
    np.testing.assert_array_equal(y, problem.y, strict=True)
    assert problem.bounds == accelerator.CIFAR10


def test_the_test_files_exist():
    for name in accelerator.TESTS:
        assert (common.ROOT / "tests" / f"test_{name}.py").is_file()


# The CPU's record


def cpu_rows():
    return [figure for row in records.load(accelerator.CPU, PartRow) for figure in row.figures]


def test_the_cpus_record_is_of_all_images():
    found = {(row["net"], row["attack"], row["n"], len(row["verdicts"])) for row in cpu_rows()}
    cases = [case.net for case in accelerator.CASES]
    assert found == {(net, name, 1000, 1000) for net in cases for name in accelerator.ATTACKS}


@pytest.mark.parametrize("row", cpu_rows(), ids=lambda row: f"{row['net']}-{row['attack']}")
def test_the_cpu_found_what_the_board_says(row):
    board = records.load(accelerator.RESULTS / "board" / "results.json", AttackRow)
    same = {"method": row["net"], **{key: row[key] for key in ("attack", "norm", "eps")}}
    recorded = [other for other in board if records.find([other], same) and other.n <= 1000]
    assert recorded or row["attack"] == "pgd"  # the board's PGD starts from ten points
    for other in recorded:
        n = other.n
        assert row["verdicts"][:n].count("1") / n == other.columns["robust"]


# Results of a run


@pytest.fixture
def cpu(tmp_path, monkeypatch):
    """A CPU's record of 4,000 verdicts."""
    figure = {"net": "n", "attack": "pgd", "norm": "l2", "eps": 1.0, "verdicts": "1" * 4000}
    path = tmp_path / "b.json"
    row = PartRow(
        experiment="accelerator", part="b", device="cpu", versions={}, settings={}, finished=True,
        seconds=1.0, figures=[figure],
    )  # fmt: skip
    records.save(path, [row])
    monkeypatch.setattr(accelerator, "CPU", path)
    return figure


@pytest.mark.parametrize(
    ("differing", "n", "precision", "fails"),
    [
        (0, 1000, "highest", False), (4, 1000, "highest", False), (5, 1000, "highest", True),
        (5, 1000, "default", False), (1, 20, "highest", False), (2, 20, "highest", True),
    ],
)  # fmt: skip
def test_four_of_a_thousand_verdicts_may_differ(cpu, differing, n, precision, fails):
    verdicts = "0" * differing + "1" * (n - differing)
    found = accelerator.compared({**cpu, "n": n, "precision": precision, "verdicts": verdicts})
    assert found["differ from CPU"] == differing
    assert ("failure" in found) == fails


def test_figures_that_the_cpu_lacks_are_not_compared(cpu):
    figure = {**cpu, "net": "other", "n": 4, "precision": "highest"}
    assert accelerator.compared(figure) == figure


def test_an_interrupted_part_keeps_its_figures_and_a_finished_one_starts_anew(tmp_path):
    settings = accelerator.Settings(tmp_path)
    record = accelerator.Record("c", settings)
    record.figures.append({"call": "a", "share": 0.5})
    record.save(finished=False)
    again = accelerator.Record("c", settings)
    assert again.done(call="a")
    assert not again.done(call="b")
    again.save(finished=True)
    assert accelerator.Record("c", settings).figures == []


def fails(settings, record):
    yield {"call": "a", "failure": "it is wrong"}


def test_a_part_with_a_failure_says_so_after_writing_it(tmp_path, monkeypatch):
    monkeypatch.setitem(accelerator.PARTS, "c", (fails, 1.0))
    monkeypatch.setattr(accelerator.parallel, "start", lambda: None)  # would set up a cache
    with pytest.raises(SystemExit, match="it is wrong"):
        accelerator.run("c", accelerator.Settings(tmp_path))
    (row,) = records.load(tmp_path / "c.json", PartRow)
    assert row.finished
    assert row.figures == list(fails(None, None))


def test_a_part_that_takes_too_long_is_stopped(tmp_path, capfd):
    assert accelerator.main(["--parts", "d", "--timeout", "0.01", "--out", str(tmp_path)]) == 1
    assert "(d) 0 s, stopped: expected to finish within 0.01 s" in capfd.readouterr().out


def test_the_large_net_has_the_size_of_a_resnet_50():
    net, x = rates.ResNet(), jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    params = jax.eval_shape(net.init, jax.random.key(0), x)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 25_557_032  # as published
    # As docs/scaling.md says.
    assert sum(timing.flops(net, params, x)) == pytest.approx(8.2e9, rel=0.01)


# What can be checked without an accelerator


def net(params, x):
    return x.reshape(len(x), -1) @ params


def lowers(function, *args):
    platforms = ("cuda", "tpu")
    exported = jax.export.export(jax.jit(function), platforms=platforms)(*args)
    return exported.platforms == platforms


@pytest.mark.parametrize("name", ATTACKS)
def test_every_iterated_attack_lowers_for_gpu_and_tpu(name):
    x, y = common.some_images(4, (5, 5, 1), 3)
    attacked = partial(ATTACKS[name], net, eps=0.5, bounds=(0.0, 1.0))
    assert lowers(lambda p, x, y, key: attacked(p, x, y, key=key), jnp.ones((25, 3)), x, y, KEY)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_steps_of_a_net_of_convolutions_lower_for_gpu_and_tpu(dtype):
    net, shape = common.make_net("lenet")
    net = net.clone(dtype=jnp.dtype(dtype))
    batch = common.some_images(4, shape)
    tx = optax.sgd(0.1)
    for objective in common.step_objectives(net, all_kinds=True).values():
        state = train.init(models.init(net, KEY, batch[0]), tx, key=KEY)
        assert lowers(train.make_step(objective, tx, donate=False), state, batch)
