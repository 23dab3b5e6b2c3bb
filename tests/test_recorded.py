"""Properties of the library's attacks on the recorded, trained nets."""

import os
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments.lib import data, models, weights
from experiments.lib.records import RESULTS
from jaxadv import attack, evaluate, perturb

ITERATED = {
    "pgd": partial(attack.pgd, steps=10, random_start=True),
    "apgd": partial(attack.apgd, steps=10),
    "apgd_multitargeted": partial(attack.apgd_multitargeted, steps=5, n_targets=2),
    "fab": partial(attack.fab, steps=5, n_targets=2),
    "square": partial(attack.square, steps=50),
    "deepfool": attack.deepfool,
    "fmn": partial(attack.fmn, steps=20),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("record", "names"), [("mnist_mlp", list(ITERATED)), ("mnist_lenet", ["pgd", "apgd"])]
)
def test_results_on_trained_nets_hardly_depend_on_the_batch_size(record, names):
    params = weights.load(RESULTS / record / "lwa" / "params.safetensors")
    apply_fn = models.function(models.recognised(params, (28, 28, 1)))
    images = data.mnist()
    n = 500
    x, y = data.MNIST.inputs(images.test_images[:n]), images.test_labels[:n]
    kwargs = {"eps": 1.5, "key": jax.random.key(0), "bounds": (0.0, 1.0)}
    for method in (perturb.loss, perturb.alpha):
        many, few = (
            evaluate.attack_and_score(apply_fn, params, x, y, method, **kwargs, batch_size=size).r
            for size in (n, 77)
        )
        apart = np.linalg.norm((many - few).reshape(n, -1), axis=1)
        size = np.linalg.norm(many.reshape(n, -1), axis=1)
        # Sums of a few hundred products in another order; a near tie of two classes may flip.
        assert np.quantile(apart / size, 0.998) < 1e-5, method
    for name in names:
        many, few = (
            evaluate.attack_and_score(
                apply_fn, params, x, y, ITERATED[name], **kwargs, batch_size=size
            ).outcome.robust
            for size in (n, 77)
        )
        assert 0 < many.sum() < n
        assert (many != few).mean() <= 0.002, name


def checked(net, scale, **kwargs):
    """The flags of a recorded MLP with its logits scaled, by name."""
    params = weights.load(RESULTS / "mnist_mlp" / net / "params.safetensors")
    apply_fn = models.function(models.recognised(params, (28, 28, 1)))
    images = data.mnist()
    x, y = data.MNIST.inputs(images.test_images[:100]), images.test_labels[:100]
    result = evaluate.check(
        lambda params, x: scale * apply_fn(params, x),
        params, x, y, key=jax.random.key(0), **kwargs,
    )  # fmt: skip
    return {flag.name: flag for flag in result.flags}


@pytest.mark.slow
def test_on_a_plain_net_the_check_flags_one_step_and_not_the_net():
    flags = checked("normal", 1.0, eps=1.5, bounds=(0.0, 1.0))
    assert "it is on many sound nets; report iterated attacks" in flags["one step"].message
    assert {flag.kind for flag in flags.values()} == {"weak attack"}


@pytest.mark.slow
def test_a_small_logit_scale_that_weakens_pgd_is_flagged():
    assert checked("normal", 1e-6, eps=1.0)["minimal norm"].kind == "weak attack"


def evaluated(store, batch_size=100, devices=1, killed_after=0):
    """Evaluate a recorded MLP in another process; return its results, or None if it was killed."""
    environment = {
        **os.environ,
        "JAX_COMPILATION_CACHE_DIR": str(store.parent / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
    }
    process = subprocess.run(
        [sys.executable, "-m", "tests.stored", store, str(batch_size), str(killed_after)],
        cwd=Path(__file__).parents[1], env=environment, capture_output=True, check=False,
    )  # fmt: skip
    if killed_after and process.returncode == -signal.SIGKILL:
        return None
    assert process.returncode == 0, process.stderr.decode()
    return np.load(store / "found.npz")


@pytest.mark.slow
def test_stored_evaluations_survive_ten_kills_other_batches_and_other_devices(tmp_path):
    whole = evaluated(tmp_path / "whole")
    assert 0 < whole["robust"].mean() < 1
    store, elsewhere = tmp_path / "store", tmp_path / "elsewhere"
    for kill in range(10):
        assert evaluated(store, killed_after=2) is None
        if kill == 4:
            shutil.copytree(store, elsewhere)
    found = evaluated(store)
    assert len(found["times"]) <= len(whole["times"]) - 20  # what was finished is kept
    np.testing.assert_array_equal(found["robust"], whole["robust"])
    np.testing.assert_array_equal(found["size"], whole["size"])
    assert len(evaluated(store)["times"]) == 0

    # The rest on four devices, in other batches, whose rounding errors differ.
    other = evaluated(elsewhere, batch_size=120, devices=4)
    assert np.sum(other["robust"] != whole["robust"]) <= 1
    for eps in (1.0, 1.5, 2.0):
        assert np.sum((other["size"] <= eps) != (whole["size"] <= eps)) <= 1
