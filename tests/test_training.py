"""`experiments/lib/training.py`: an interrupted run ends as it would have without."""

import functools
import io
import itertools
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rich.console import Console

from experiments.lib import training
from jaxadv import attack, objectives, perturb

N, D, K = 70, 5, 3
RNG = np.random.default_rng(0)
DATA = jnp.asarray(RNG.normal(size=(N, D)), jnp.float32), jnp.asarray(RNG.integers(0, K, N))
SETTINGS = {"lr": 0.1, "widths": [2, 3]}


def apply_fn(w, x):
    return x @ w


class Interrupted(Exception):
    pass


LWA = objectives.adversarial(apply_fn, perturb.loss, eps=0.1)
STEP = functools.partial(attack.pgd, steps=1, step_size=0.05, keep="last")
REMEMBERING = objectives.with_memory(objectives.adversarial(apply_fn, STEP, eps=0.1))


def fit(directory, *, epochs=4, settings=SETTINGS, interrupt_at=None, file=None, remembering=False):
    """Train by LWA; raise `Interrupted` at update `interrupt_at` of the progress bar."""
    console = Console(file=file or io.StringIO())
    with training.bars(console) as progress:
        if interrupt_at is not None:
            update, calls = progress.update, iter(range(10**6))

            def interrupting(*args, **kwargs):
                if next(calls) == interrupt_at:
                    raise Interrupted
                update(*args, **kwargs)

            progress.update = interrupting
        return training.fit(
            REMEMBERING if remembering else LWA,
            optax.sgd(optax.cosine_decay_schedule(0.1, 40), momentum=0.9),
            jnp.zeros((D, K)),
            (*DATA, jnp.arange(N)) if remembering else DATA,
            model_state=objectives.Memory(jnp.zeros((N, D))) if remembering else None,
            epochs=epochs,
            batch_size=8,
            key=jax.random.key(3),
            directory=directory,
            settings=settings,
            progress=progress,
            name="lwa",
        )


def bits(state):
    state = state._replace(key=jax.random.key_data(state.key))
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state)]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    return fit(tmp_path_factory.mktemp("uninterrupted"))


def test_fit_takes_every_step_of_every_epoch(uninterrupted):
    assert int(uninterrupted.state.step) == 4 * (N // 8)
    assert len(uninterrupted.history) == 4
    assert uninterrupted.history[-1]["loss"] < uninterrupted.history[0]["loss"]
    assert uninterrupted.history[0]["eps"] == pytest.approx(0.1)
    assert uninterrupted.history[0]["nonfinite"] == 0


def test_the_remaining_time_is_printed_once_and_excludes_compilation(tmp_path, monkeypatch):
    clock = itertools.chain([0, 0], range(7000, 10**6, 100))  # 7000 s of compiling
    monkeypatch.setattr(training, "_CHUNK", 4)  # an epoch of 8 steps is two chunks
    monkeypatch.setattr(training.time, "perf_counter", lambda: next(clock))
    said = io.StringIO()
    fit(tmp_path, epochs=4, file=said)
    # The second chunk took 100 s, and six more are left.
    (line,) = [line for line in said.getvalue().splitlines() if "to go" in line]
    assert line.rstrip() == "lwa: about 10 min of training to go"
    for place, epochs in ((tmp_path, 4), (tmp_path / "one", 1)):  # none is left
        said = io.StringIO()
        fit(place, epochs=epochs, file=said)
        assert "to go" not in said.getvalue()


def test_perturbations_of_0_are_counted(uninterrupted):
    # At w = 0 the logits don't depend on x, so the first batch of 8 has no gradient.
    assert uninterrupted.history[0]["zero"] == 8


@pytest.mark.parametrize("at", [0, 1, 2, 3])
def test_an_interrupted_run_ends_bit_for_bit_like_an_uninterrupted_one(tmp_path, at, uninterrupted):
    with pytest.raises(Interrupted):
        fit(tmp_path, interrupt_at=at)
    resumed = fit(tmp_path)
    assert bits(resumed.state) == bits(uninterrupted.state)
    assert resumed.history == uninterrupted.history
    assert resumed.seconds > 0


def test_remembered_perturbations_survive_an_interruption(tmp_path):
    whole = fit(tmp_path / "whole", remembering=True)
    with pytest.raises(Interrupted):
        fit(tmp_path / "interrupted", remembering=True, interrupt_at=2)
    resumed = fit(tmp_path / "interrupted", remembering=True)
    assert bits(resumed.state) == bits(whole.state)
    # Two steps of half the radius get farther than one could.
    sizes = np.linalg.norm(resumed.state.model_state.r, axis=1)
    assert (sizes > 0.075).mean() > 0.9


def test_a_finished_run_is_restored_and_not_trained_again(tmp_path, uninterrupted):
    first, again = fit(tmp_path), fit(tmp_path)
    assert again.seconds == first.seconds
    assert bits(again.state) == bits(uninterrupted.state)


def test_resuming_with_other_settings_is_an_error_with_a_remedy(tmp_path):
    fit(tmp_path, epochs=1)
    with pytest.raises(ValueError, match=r"lr: 0\.1 then, 0\.2 now.*choose another --out"):
        fit(tmp_path, epochs=1, settings={**SETTINGS, "lr": 0.2})


def test_without_a_terminal_every_epoch_prints_a_line(tmp_path):
    log = io.StringIO()
    fit(tmp_path, epochs=2, file=log)
    assert "lwa: epoch 1 of 2, loss" in log.getvalue()
    fit(tmp_path, epochs=2, file=log)
    assert "lwa: resuming after epoch 2 of 2" in log.getvalue()


def test_every_epoch_has_its_own_order_of_examples(tmp_path, monkeypatch):
    orders, make_epoch = [], training.train.make_epoch

    def watched(*args):
        epoch = make_epoch(*args)

        def run(state, data, order):
            orders.append(np.ravel(order))
            return epoch(state, data, order)

        return run

    monkeypatch.setattr(training.train, "make_epoch", watched)
    fit(tmp_path, epochs=3)
    assert all(len(set(order.tolist())) == 8 * (N // 8) for order in orders)  # each example once
    assert len({tuple(order.tolist()) for order in orders}) == 3


@pytest.mark.parametrize(
    "damaged", ["record", "record/metadata", "state/_METADATA", "state/manifest.ocdbt"]
)
def test_a_damaged_checkpoint_is_an_error_that_says_what_to_do(tmp_path, damaged):
    fit(tmp_path, epochs=1)
    path = tmp_path / "1" / damaged
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.write_bytes(b"")
    # In another process, since orbax may leave reads running that fail after the error.
    again = "import pathlib, sys; sys.path.insert(0, 'tests'); from test_training import fit"
    done = subprocess.run(
        [sys.executable, "-c", f"{again}; fit(pathlib.Path({str(tmp_path)!r}))"],
        cwd=Path(__file__).resolve().parents[1], capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1
    assert re.search(rf"UsageError: .*checkpoint in {tmp_path}, got: .*; delete it", done.stderr)
