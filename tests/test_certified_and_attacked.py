"""`experiments/certify.py`: the two bounds, on small nets."""

import dataclasses
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

import jaxadv
from experiments import certify as command
from experiments.lib import data, figures, models, options, records, weights

SMALL = {
    "widths": (20,), "epochs": 10, "warmup": 1, "average": 0.9, "consistency": 0.5,
    "batch_size": 20, "sigma": 0.25, "radii": (0.6, 0.1), "stages": (200, 1000), "alpha": 0.01,
    "attack_steps": 2, "attack_samples": 2, "attack_draws": 200, "every": 2, "train_steps": 1,
}  # fmt: skip


@pytest.fixture
def images(monkeypatch):
    """200 training and 20 test images, and an MLP in place of LeNet."""
    whole = data.mnist()
    few = data.Dataset(
        whole.train_images[:200], whole.train_labels[:200],
        whole.test_images[:20], whole.test_labels[:20], whole.classes,
    )  # fmt: skip
    monkeypatch.setattr(command.data, "mnist", lambda: few)
    monkeypatch.setattr(command.models, "lenet", models.mlp)


@pytest.mark.parametrize("way", command.WAYS)
def test_each_way_of_training_has_a_finite_loss_and_gradients(way):
    settings = command.Settings(**SMALL)
    net = models.mlp((20,))
    x = jnp.asarray(data.MNIST.inputs(data.mnist().train_images[:4]))
    params = models.init(net, jax.random.key(0), x[:1])
    objective = command.objective_of(way, settings, models.function(net), 0.5)
    batch = x, jnp.arange(4)
    run = jax.value_and_grad(objective, has_aux=True)
    (loss, _), grad = run(params, None, batch, key=jax.random.key(1), step=jnp.int32(0))
    assert np.isfinite(loss)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(grad))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 2}, "--warmup to be at most 2, the number of epochs, got 3"),
        ({"copies": 1}, "--copies to be at least 2, got 1"),
    ],
    ids=["warmup", "copies"],
)
def test_settings_that_training_cant_use_are_refused(changes, message):
    with pytest.raises(options.UsageError, match=message):
        command.Settings(**changes)


def test_hidden_layers_may_be_equal():
    assert command.Settings(widths=(500, 500)).widths == (500, 500)


@pytest.mark.slow
def test_both_bounds_are_measured_and_kept(tmp_path, images, monkeypatch):
    # As if interrupted at the end: finished batches are left, and must not stop other settings.
    monkeypatch.setattr(command.shutil, "rmtree", lambda *args, **kwargs: None)
    settings = command.Settings(methods=("consistency",), out=tmp_path, **SMALL)
    (row,) = command.run(settings, Console(file=io.StringIO()))
    assert records.load(tmp_path / "results.json", records.CertifyRow) == [row]
    assert (row.n, row.sigma, row.stages) == (10, 0.25, [200, 1000])
    with np.load(tmp_path / "consistency-0.npz") as found:
        assert found["image"].tolist() == list(range(0, 20, 2))
        right = found["label"] == data.mnist().test_labels[:20:2]
        for size, broken in zip(found["sizes"], found["broken"], strict=True):
            certified = right & (found["radius"] >= size)
            assert row.columns[f"certified@{size:g}"] == certified.mean()
            assert row.columns[f"attacked@{size:g}"] == (~broken).mean()
            assert row.both[f"{size:g}"] == (2 * np.flatnonzero(certified & broken)).tolist()
        assert not np.any(found["broken"][1] & ~found["broken"][0])
        assert row.samples == found["samples"].sum()
        eps = np.array(row.curve["eps"])
        assert eps[[0, -1]].tolist() == [0, 0.6]
        reach = np.where(right, found["radius"], 0)
        want = np.mean((reach >= eps[:, None]) & (reach > 0), axis=1)
        np.testing.assert_array_equal(row.curve["certified"], want)
        assert row.curve["certified"][0] == np.mean(right & (found["radius"] > 0))
        answered = right & (2 * found["count"] > found["samples"])  # so no class has more draws
        assert answered.mean() <= row.columns["clean"] <= right.mean()
    assert (tmp_path / "certify.png").is_file()
    assert row.columns["certified@0.6"] <= row.columns["attacked@0.6"]
    assert 0.3 < row.columns["attacked@0.6"] < row.columns["attacked@0.1"]
    assert row.columns["certified@0.1"] <= row.columns["clean"]
    net, _ = weights.load_net(tmp_path / "consistency-0.safetensors", (28, 28, 1))
    assert net == models.mlp((20,))
    assert "| Consistency | 0.25 | 0 | 10 |" in "\n".join(command.as_markdown([row]))
    again = command.run(settings, Console(file=io.StringIO()))
    assert again == [row]  # read back, not run again
    stronger = dataclasses.replace(settings, attack_steps=3)
    (other,) = command.run(stronger, Console(file=io.StringIO()))  # measured, but not trained again
    assert other.settings["attack_steps"] == 3
    assert other.train_seconds == row.train_seconds
    with monkeypatch.context() as upgraded:  # batches of another version are left behind
        upgraded.setattr(jaxadv, "__version__", "99.0")
        (later,) = command.run(stronger, Console(file=io.StringIO()))
    assert (later.columns, later.versions["jaxadv"]) == (other.columns, "99.0")
    with pytest.raises(options.UsageError, match=r"expected radii below 0\.65"):  # before it trains
        command.run(dataclasses.replace(settings, radii=(1.0,)), Console(file=io.StringIO()))
    held = dataclasses.replace(settings, holdout=10, every=1, seeds=(1,))
    assert [other.n for other in command.run(held, Console(file=io.StringIO()))] == [10, 10]


def test_the_band_lies_between_certified_and_attacked_accuracy(tmp_path):
    curve = {"eps": [0.0, 0.5, 1.0, 1.25, 1.5], "certified": [0.9, 0.8, 0.6, 0.5, 0.3]}
    columns = {"clean": 0.9, "attacked@1": 0.7, "attacked@0.5": 0.85, "attacked@1.5": 0.4}
    row = records.CertifyRow(
        experiment="certify", network="7x5", method="gaussian", sigma=0.5, alpha=0.001, n=10,
        samples=1, seed=3, columns=columns, curve=curve, abstained=0, both={}, n0=1, stages=[1],
        sampler="", train_seconds=0.0, seconds=0.0, attack_seconds=0.0, settings={}, versions={},
        device="",
    )  # fmt: skip
    records.save(tmp_path / "results.json", [row, row])
    assert [path.name for path in figures.draw(tmp_path)] == ["certify.png"]
    first, second = figures.plot_sandwich([row, dataclasses.replace(row, sigma=0.25)]).axes
    assert first.get_title() == "gaussian, sigma 0.5, seed 3"
    assert second.get_title() == "gaussian, sigma 0.25, seed 3"
    lines = {line.get_label(): line.get_xydata().T.tolist() for line in first.get_lines()}
    assert lines == {
        "certified": [curve["eps"], curve["certified"]],
        "attacked": [[0.5, 1.0, 1.5], [0.85, 0.7, 0.4]],
    }
    (band,) = first.collections
    corners = {tuple(corner) for corner in band.get_paths()[0].vertices.tolist()}
    # From the smallest attacked size on; at 1.25, images broken at 1 count as broken.
    assert corners == {
        (0.5, 0.8), (1.0, 0.6), (1.25, 0.5), (1.5, 0.3),
        (0.5, 0.85), (1.0, 0.7), (1.25, 0.7), (1.5, 0.4),
    }  # fmt: skip
