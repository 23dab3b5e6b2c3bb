"""`experiments/mnist.py` on a small data set; with `-m slow`, on MNIST, killed ten times."""

import dataclasses
import io
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from rich.console import Console
from safetensors.numpy import load_file

from experiments import mnist
from experiments.lib import data, models, recipes, records, tables, train_and_score

ROOT = Path(__file__).resolve().parents[1]


def digits(n, seed):
    """Images with a bright bar whose position is the label, learnt in a few steps."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 10, n).astype(np.int32)
    images = rng.integers(0, 60, (n, 28, 28, 1), dtype=np.uint8)
    for image, label in zip(images, labels, strict=True):
        image[:, 2 * label + 4 : 2 * label + 6] += 180
    return images, labels


@pytest.fixture
def small(monkeypatch):
    """Settings for a small data set, which replaces MNIST."""
    monkeypatch.setattr(
        data, "mnist", lambda: data.Dataset(*digits(300, 0), *digits(120, 1), data.DIGITS)
    )
    tiny = {
        name: dataclasses.replace(getattr(mnist.MLP, name), widths=(12, 11), epochs=2)
        for name in recipes.NAMES
    }
    tiny["lwa_rep"] = dataclasses.replace(tiny["lwa_rep"], warmup=1)
    for name in ("lwa_noisy", "lwa_multi"):
        tiny[name] = dataclasses.replace(tiny[name], warmup=1)
    return mnist.Settings(batch_size=20, pgd_steps=3, n_eval=100, **tiny)


def run(settings, out):
    return mnist.run(dataclasses.replace(settings, out=out), Console(file=io.StringIO()))


def test_a_run_writes_rows_tables_figures_and_weights(small, tmp_path):
    rows = run(small, tmp_path)
    assert [row.to_json() for row in rows] == json.loads((tmp_path / "results.json").read_text())
    assert [row.method for row in rows] == list(small.methods)
    for row in rows:
        assert (row.n, row.eps, row.norm, row.network) == (100, 1.5, "l2", "12x11")
        assert row.columns.keys() >= set(tables.LABELS)
        assert all(0 <= value <= 1 for value in row.columns.values())
        assert row.columns["pgd"] <= row.columns["adv_loss"] + 0.02
        assert row.curves["adv_loss"][0] == row.columns["validation"]
        assert [epoch.keys() >= {"validation", "adv_loss", "loss"} for epoch in row.history] == [
            True, True,
        ]  # fmt: skip
        assert row.history[-1]["validation"] == row.columns["validation"]
        assert row.history[-1]["adv_loss"] == row.columns["adv_loss"]
        for counted in row.counts.values():
            assert counted["nonfinite"] == counted["invalid"] == 0
            assert counted["max_norm"] == pytest.approx(1.5, rel=1e-6)
        stored = load_file(tmp_path / row.method / "params.safetensors")
        assert stored["params/hidden_0/kernel"].shape == (784, 12)
    assert rows[0].columns["validation"] > 0.9  # learnt in 30 steps
    for name in ("accuracy_vs_eps.png", "learning_curves.png", "adversarial_digits.png"):
        assert (tmp_path / name).stat().st_size > 10_000


@pytest.mark.slow
def test_an_interrupted_run_keeps_the_scores_it_has_not_reached(small, tmp_path, monkeypatch):
    small = dataclasses.replace(small, methods=("normal", "lwa"))
    before = run(small, tmp_path)
    scored = []
    score = train_and_score.score

    def counting(net, *args):
        scored.append(net)
        if len(scored) == 1:
            raise KeyboardInterrupt
        return score(net, *args)

    monkeypatch.setattr(train_and_score, "score", counting)
    with pytest.raises(KeyboardInterrupt):
        run(dataclasses.replace(small, pgd_steps=4), tmp_path)  # everything must be scored anew
    assert records.load(tmp_path / "results.json", records.TableRow) == before
    assert run(small, tmp_path) == before
    assert len(scored) == 1


def test_each_seed_has_a_row_and_weights_and_running_again_changes_nothing(small, tmp_path):
    small = dataclasses.replace(small, methods=("lwa",), seed=(4, 5))
    rows = run(small, tmp_path)
    assert [row.seed for row in rows] == [4, 5]
    files = [
        tmp_path / name
        for name in ("results.json", "lwa/params.safetensors", "lwa/seed_5/params.safetensors")
    ]
    before = [file.read_bytes() for file in files]
    assert before[1] != before[2]
    assert run(small, tmp_path) == rows
    assert [file.read_bytes() for file in files] == before
    run(dataclasses.replace(small, seed=(5,)), tmp_path)  # in a run of its own, too
    assert [file.read_bytes() for file in files[1:]] == before[1:]


@pytest.mark.slow
def test_held_out_images_are_scored_without_touching_the_test_images(small, tmp_path, monkeypatch):
    empty = np.zeros((0, 28, 28, 1), np.uint8), np.zeros(0, np.int32)
    monkeypatch.setattr(data, "mnist", lambda: data.Dataset(*digits(300, 0), *empty, data.DIGITS))
    small = dataclasses.replace(small, methods=("normal",), holdout=90)
    (row,) = run(small, tmp_path)
    assert row.n == 90


def test_quick_and_full_runs_have_different_folders():
    for network in ("mlp", "lenet"):
        whole = mnist.defaults(["--network", network])
        quick = mnist.defaults(["--network", network, "--quick"])
        assert whole.out.name == f"mnist_{network}"
        assert quick.out.name == f"mnist_{network}_quick"
        assert {getattr(quick, name).epochs for name in quick.methods} == {1}
        assert whole.network == quick.network == network


def test_dropout_acts_with_every_method():
    x = np.random.default_rng(0).random((6, 28, 28, 1), np.float32)
    y = np.arange(6)
    for name in mnist.MLP.methods:
        method = dataclasses.replace(getattr(mnist.MLP, name), widths=(5, 4), dropout=0.5)
        net = models.mlp(method.widths, dropout=method.dropout)
        params = models.init(net, jax.random.key(0), x)
        objective = jax.jit(recipes.make_objective(net, method, 10))
        losses = [
            float(objective(params, None, (x, y), key=jax.random.key(k), step=0)[0]) for k in (1, 2)
        ]
        assert losses[0] != losses[1], name


def command(out):
    arguments = [
        "--methods", "normal", "lwa", "--out", str(out), "--normal.epochs", "3", "--lwa.epochs",
        "3", "--lwa.widths", "100", "100", "--n-eval", "200", "--pgd-steps", "5", "--holdout",
        "50000",
    ]  # fmt: skip
    return subprocess.Popen(
        [sys.executable, str(ROOT / "experiments" / "mnist.py"), *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def complete(process):
    _, errors = process.communicate()
    assert process.returncode == 0, errors.decode()


def final_states(out):
    """Every array of every training state, optimiser included, as bytes."""

    def bits(leaf):
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        return np.asarray(leaf).tobytes()

    states = {}
    for directory in sorted((out / "checkpoints").iterdir()):
        with ocp.CheckpointManager(directory) as manager:
            restored = manager.restore(
                manager.latest_step(), args=ocp.args.Composite(state=ocp.args.StandardRestore())
            )
        states[directory.name] = [
            (jax.tree_util.keystr(path), bits(leaf))
            for path, leaf in jax.tree_util.tree_leaves_with_path(restored.state)
        ]
    return states


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Couldn't find sharding info:UserWarning")  # no devices
def test_a_run_killed_at_ten_random_moments_ends_bit_for_bit_the_same(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXADV_DATA", str(tmp_path / "cache"))
    data.mnist()
    start = time.perf_counter()
    complete(command(tmp_path / "reference"))
    whole = time.perf_counter() - start

    moments = random.Random(0)
    for _ in range(10):
        process = command(tmp_path / "killed")
        time.sleep(moments.uniform(0.2, 0.6 * whole))
        process.send_signal(signal.SIGKILL)
        process.communicate()
    complete(command(tmp_path / "killed"))

    expected, got = final_states(tmp_path / "reference"), final_states(tmp_path / "killed")
    assert expected.keys() == {"lwa-0", "normal-0", "normal-1000"}
    assert got == expected
    for method in ("normal", "lwa"):
        weights = [
            (tmp_path / run / method / "params.safetensors").read_bytes()
            for run in ("reference", "killed")
        ]
        assert weights[0] == weights[1]
