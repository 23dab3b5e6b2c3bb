"""Several devices or processes give the same results as one device."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments.lib import parallel

ROOT = Path(__file__).resolve().parents[1]
EPOCHS = 9  # of 12 steps


def command(directory, *settings, epochs=EPOCHS, axes="Auto"):
    program = [sys.executable, "-m", "tests.on_devices"]
    return [*program, str(directory), str(epochs), axes, *settings]


def environment(devices):
    own = {"JAX_NUM_CPU_DEVICES": str(devices), "JAX_PLATFORMS": "cpu"}
    # Almost every program runs once: conftest says why.
    return {**os.environ, **own, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}


def on(directory, devices, epochs=EPOCHS, axes="Auto"):
    done = subprocess.run(
        command(directory, str(devices), epochs=epochs, axes=axes),
        env=environment(devices), cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return on(tmp_path_factory.mktemp("one"), 1)


def same(got, one):
    # Sums over a batch in another order: a rounding or two at each of 108 steps.
    np.testing.assert_allclose(got["losses"], one["losses"], rtol=1e-5)
    np.testing.assert_allclose(got["w"], one["w"], rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(got["kept"], one["kept"], atol=1e-3)
    assert got["robust"] == one["robust"]
    assert got["several"] == one["several"]
    np.testing.assert_allclose(got["r"], one["r"], atol=1e-3)
    assert got["flags"] == one["flags"]
    # Rounding may change the verdict on one of 96 examples.
    np.testing.assert_allclose(
        list(got["figures"].values()), list(one["figures"].values()), atol=1.01 / 96
    )
    # Rounding may also flip a few of the draws that certify an example.
    assert np.mean(np.abs(np.subtract(got["radius"], one["radius"])) < 1e-3) > 0.97


def on_both_kinds_of_axes(directory, devices):
    auto = on(directory / "auto", devices, axes="Auto")
    explicit = on(directory / "explicit", devices, axes="Explicit")
    assert explicit == auto  # every bit
    return auto


def test_training_and_evaluation_are_those_of_one_device(tmp_path, one):
    assert one["devices"] == 1
    assert 0 < np.mean(one["robust"]["pgd"]) < np.mean(one["robust"]["virtual"]) < 1
    got = on_both_kinds_of_axes(tmp_path, 4)
    assert got["devices"] == 4
    same(got, one)


@pytest.mark.slow
def test_eight_devices_give_the_same(tmp_path, one):
    got = on_both_kinds_of_axes(tmp_path, 8)
    assert got["devices"] == 8
    same(got, one)


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_devices(tmp_path, one):
    on(tmp_path, 4, epochs=4, axes="Explicit")
    same(on(tmp_path, 2), one)


def free_port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


@pytest.mark.slow
@pytest.mark.parametrize("axes", ["Auto", "Explicit"])
def test_two_processes_are_one(tmp_path, one, axes):
    address = f"localhost:{free_port()}"
    processes = [
        subprocess.Popen(
            command(tmp_path, "", address, "2", str(process), axes=axes),
            env=environment(1), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for process in range(2)
    ]  # fmt: skip
    for process in processes:
        out, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
        got = json.loads(out.splitlines()[-1])
        assert (got["devices"], got["processes"]) == (2, 2)
        same(got, one)


@pytest.mark.slow
def test_when_a_process_dies_the_others_end_with_an_error_and_the_run_goes_on(tmp_path, one):
    address = f"localhost:{free_port()}"
    first, second = (
        subprocess.Popen(
            command(tmp_path, "", address, "2", str(process), epochs=100_000),
            env=environment(1), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for process in range(2)
    )  # fmt: skip
    while not any(path.name.isdigit() for path in tmp_path.iterdir()):
        assert first.poll() is None, first.communicate()
    second.kill()
    second.communicate()
    _, errors = first.communicate(timeout=200)  # missed heartbeats are noticed after 20 s
    assert first.returncode != 0
    # The coordinator, which lives in the first process, reports it before any client can abort. If
    # a collective breaks before the 20 s are over, Gloo reports that.
    assert "stopped sending heartbeats" in errors or "Gloo" in errors
    done = max(int(path.name) for path in tmp_path.iterdir() if path.name.isdigit())
    assert on(tmp_path, 1, epochs=done + 1)["losses"][: len(one["losses"])] == pytest.approx(
        one["losses"][: done + 1], rel=1e-5
    )


# Which devices


@pytest.fixture
def eight(monkeypatch):
    """A machine that reports eight devices; meshes become the arguments they are made from."""
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    monkeypatch.setattr(jax, "devices", lambda: list(range(8)))
    monkeypatch.setattr(jax, "make_mesh", lambda shape, *_, devices: (shape, devices))


@pytest.mark.parametrize(
    ("asked", "sizes", "n"),
    [
        (None, (96, 1000), 8),
        (None, (100, 1000), 5),
        (None, (7, 10), 1),
        (2, (100, 10), 2),
        (1, (8,), 1),
    ],
)
def test_batches_are_spread_over_as_many_devices_as_divide_them(eight, asked, sizes, n):
    mesh = parallel.mesh(parallel.Settings(devices=asked), *sizes)
    assert mesh == (None if n == 1 else ((n,), list(range(n))))


@pytest.mark.parametrize("asked", [3, 16])
def test_an_impossible_number_of_devices_is_an_error(eight, asked):
    with pytest.raises(ValueError, match=f"--devices to divide 100, 10000 and .* 8, .*{asked};"):
        parallel.mesh(parallel.Settings(devices=asked), 100, 10000)


def test_a_process_without_a_part_is_an_error(eight, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match=r"of 100 .* all 8 devices of 2 processes, got 5; choose"):
        parallel.mesh(parallel.Settings(), 100)


def test_a_single_process_prints(capsys, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")  # no cache for the tests that follow
    parallel.start(parallel.Settings()).print("here")
    assert "here" in capsys.readouterr().out


def test_programs_that_compile_for_a_tenth_of_a_second_are_cached_by_default(monkeypatch):
    name = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, name)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")
    try:
        monkeypatch.setenv(name.upper(), str(before))
        parallel.start()
        assert getattr(jax.config, name) == before
        monkeypatch.delenv(name.upper())
        parallel.start()
        assert getattr(jax.config, name) == 0.1
    finally:
        jax.config.update(name, before)
