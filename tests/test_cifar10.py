"""Table 3's experiment, on small generated images."""

import dataclasses
import io
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from rows import table_row
from safetensors.numpy import load_file

from experiments import cifar10
from experiments.lib import options, recipes, records, tables, train_and_score
from experiments.lib.models import vgg

CLASSES = "abcdefghij"


def pictures(folder, n, seed):
    """Images whose colour tells the class, so that a few steps learn them."""
    rng = np.random.default_rng(seed)
    for k, name in enumerate(CLASSES):
        place = folder / name
        place.mkdir(parents=True)
        for i in range(n):
            pixels = rng.integers(0, 80, (32, 32, 3), dtype=np.uint8)
            pixels[..., k % 3] += 50 * (1 + k // 3)
            Image.fromarray(pixels).save(place / f"{i:03d}.png")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("pictures")
    pictures(place / "train", 12, 0)
    pictures(place / "test", 4, 1)
    return place


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("JAXADV_DATA", str(tmp_path_factory.getbasetemp() / "cifar_cache"))


@pytest.fixture
def small(folder):
    default = cifar10.Settings()
    tiny = {
        name: dataclasses.replace(getattr(default, name), widths=(256, 256), epochs=2)
        for name in cifar10.Settings().methods
    }
    for name in ("goodfellow", "lwa", "lwa_rep"):
        tiny[name] = dataclasses.replace(tiny[name], warmup=1)
    return dataclasses.replace(
        default, image_folder=folder, width=0.125, batch_size=20, pgd_steps=2, n_eval=30, n_pgd=10,
        eval_batch=15, **tiny,
    )  # fmt: skip


def run(settings, out):
    return cifar10.run(dataclasses.replace(settings, out=out), Console(file=io.StringIO()))


@pytest.mark.slow
def test_it_scores_each_method_at_both_sizes(small, tmp_path):
    rows = run(dataclasses.replace(small, methods=("normal", "lwa")), tmp_path)
    assert records.load(tmp_path / "results.json", records.TableRow) == rows
    assert [(row.method, row.eps) for row in rows] == [
        (method, eps) for method in ("normal", "lwa") for eps in (0.5, 0.25)
    ]
    for row in rows:
        assert row.columns.keys() >= set(tables.LABELS)
        assert (row.n, row.network) == (30, "vgg, width 0.125")
        assert row.settings["data"].startswith("a folder of PNG files, crc32 ")
        assert row.n_pgd == 10
        assert row.settings["n_pgd"] == 10
        for column, counted in row.counts.items():
            assert counted["nonfinite"] == counted["invalid"] == 0, column
            assert counted["max_norm"] == pytest.approx(row.eps, rel=1e-6), (column, counted)
    for large, little in zip(rows[::2], rows[1::2], strict=True):
        assert large.columns["validation"] == little.columns["validation"]
        assert large.columns["adv_loss"] <= little.columns["adv_loss"]
        assert large.curves == little.curves
    stored = load_file(tmp_path / "lwa" / "params.safetensors")
    assert stored["params/convs_1_2/kernel"].shape == (3, 3, 32, 32)
    for name in ("accuracy_vs_eps.png", "learning_curves.png"):
        assert (tmp_path / name).stat().st_size > 10_000


def test_crops_are_windows_of_the_image_mirrored_half_the_time():
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (400, 32, 30, 3), dtype=np.uint8)
    made = np.asarray(cifar10.crop_and_mirror(jax.random.key(0), jnp.asarray(pixels)))
    assert made.shape == (400, 28, 28, 3)
    assert made.dtype == np.float32
    whole = (pixels.astype(np.float32) - 117) / 256
    places = []
    for image, crop in zip(whole, made, strict=True):
        found = [
            (i, j, mirrored)
            for i in range(5)
            for j in range(3)
            for mirrored in (False, True)
            if np.array_equal(image[i : i + 28, j : j + 28][:, :: -1 if mirrored else 1], crop)
        ]
        assert len(found) == 1
        places += found
    assert len(set(places)) == 5 * 3 * 2  # 400 draws miss each of 30 with probability 1e-6
    # Binomial(400, 1/2), to 5 standard deviations.
    assert abs(sum(mirrored for _, _, mirrored in places) - 200) < 50


def test_images_are_drawn_anew_in_every_step():
    seen = []

    def objective(params, model_state, batch, /, *, key, step):
        seen.append(batch[0])
        return 0.0, (model_state, None)

    pixels = jnp.asarray(np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3)), jnp.uint8)
    drawn = recipes.augmented(objective, cifar10.crop_and_mirror)
    for k in (0, 1, 0):
        drawn(None, None, (pixels, jnp.zeros(4)), key=jax.random.key(k), step=0)
    np.testing.assert_array_equal(seen[0], seen[2])
    assert not np.array_equal(seen[0], seen[1])


def test_scored_images_are_centre_crops_in_mixed_order(small):
    settings = dataclasses.replace(small, n_eval=30)
    train, test, *_ = cifar10.load(settings)
    assert train.x.shape == (120, 32, 32, 3)
    assert train.x.dtype == jnp.uint8
    assert test.x.shape == (30, 28, 28, 3)
    assert len(set(np.asarray(test.y).tolist())) > 5
    first = cifar10.data.image_folder(small.image_folder)
    _, order = cifar10.data.split(40, 40, seed=0)
    centre = first.test_images[order[0], 2:30, 2:30].astype(np.float32)
    np.testing.assert_array_equal(test.x[0], (centre - 117) / 256)


def test_held_out_images_come_from_training(small):
    train, held, *_ = cifar10.load(dataclasses.replace(small, holdout=25))
    assert (len(train.y), len(held.y)) == (95, 25)


def test_small_images_are_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"at least 28x28 pixels, got 32x20 in .*resize"):
        cifar10.load(folder_with(tmp_path, CLASSES, size=(20, 32)))


def folder_with(place, classes, mode="RGB", size=(32, 32)):
    for part in ("train", "test"):
        for name in classes:
            (place / part / name).mkdir(parents=True)
            Image.new(mode, size).save(place / part / name / "0.png")
    return cifar10.Settings(image_folder=place)


def test_another_number_of_classes_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"expected the 10 classes of CIFAR-10, got 11 in .*"):
        cifar10.load(folder_with(tmp_path, "abcdefghijk"))


def test_grey_images_are_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"colour images, got greyscale ones in .*convert"):
        cifar10.load(folder_with(tmp_path, CLASSES, "L"))


def test_images_that_are_all_held_out_are_an_error(small):
    with pytest.raises(options.UsageError, match=r"--holdout to be less than (\d+), .*; hold out"):
        cifar10.load(dataclasses.replace(small, holdout=10**6))


def test_width_one_is_the_papers_net(small):
    task = cifar10.make_task(dataclasses.replace(small, width=1.0))
    method = cifar10.Settings().lwa_rep
    net = task.make_net(method)
    assert net == vgg((2048, 2048), width=1.0)
    assert net.split == 3  # after the first dense layer: the last two are the classifier


def test_the_command_line_sets_everything(small, tmp_path, monkeypatch, capsys):
    arguments = [
        "cifar10.py", "--quick", "--methods", "normal", "--image-folder", str(small.image_folder),
        "--out", str(tmp_path), "--batch-size", "20", "--n-eval", "10", "--eps", "0.5",
    ]  # fmt: skip
    asked = []

    def protocol_run(settings, task, console):
        asked.append((settings, task))
        fields = {
            "experiment": "cifar10", "network": task.network(settings.normal), "eps": 0.5,
            "n": len(task.test.y), "settings": {"data": task.source}, "n_pgd": 10,
            "columns": dict.fromkeys([*tables.LABELS, "fixed_source"], 0.5),
        }  # fmt: skip
        row = table_row(method="normal", epochs=settings.normal.epochs, **fields)
        earlier = table_row(method="lwa", epochs=3, **fields)
        records.save(settings.out / "results.json", [row, earlier])
        return [row], {}

    monkeypatch.setattr(train_and_score, "run", protocol_run)
    monkeypatch.setattr(cifar10.figures, "draw", lambda folder: [])
    monkeypatch.setattr(sys, "argv", arguments)
    cifar10.main()
    ((settings, task),) = asked
    assert (settings.batch_size, settings.width, settings.eps) == (20, 0.0625, (0.5,))
    assert {name: method.epochs for name, method in task.methods.items()} == {"normal": 1}
    text = (tmp_path / "results.md").read_text()
    assert "are 0.0625 times the paper's" in text
    assert "epochs: Normal 1, LWA 3;" in text
    assert "| LWA | 0.5000 | " in text
    assert "images from a folder of PNG files, crc32" in text
    assert "| paper | 0.878 | 0.582 | 0.486 | 0.416 | 0.282 |  |" in text
    printed = capsys.readouterr().out
    assert "accuracy on 10 test images" in " ".join(printed.split())
