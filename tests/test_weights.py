"""`experiments/lib/weights.py`: files of weights, with the interface of their net."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from experiments.lib import data, weights

PHOTOS = data.Interface(("caf\u00e9", "\udcff\n"), (28, 28, 3), subtract=117, divide=256, crop=28)


def test_weights_are_named_by_their_paths(tmp_path):
    params = {"params": {"hidden_0": {"kernel": jnp.arange(6.0).reshape(2, 3)}}}
    weights.save(tmp_path / "lwa" / "params.safetensors", params)
    stored = load_file(tmp_path / "lwa" / "params.safetensors")
    assert list(stored) == ["params/hidden_0/kernel"]
    np.testing.assert_array_equal(stored["params/hidden_0/kernel"], np.arange(6.0).reshape(2, 3))


def test_weights_are_stored_with_how_they_were_made_and_their_interface(tmp_path):
    full, bare = tmp_path / "full.safetensors", tmp_path / "bare.safetensors"
    made = {"seed": 3, "widths": [4, 5]}
    weights.save(str(full), {"w": jnp.ones(2)}, interface=PHOTOS, made=made)
    weights.save(bare, {"w": jnp.ones(2)})
    assert (weights.made(full), weights.interface(full)) == (made, PHOTOS)
    assert (weights.made(bare), weights.interface(bare)) == (None, None)
    assert weights.made(tmp_path / "none.safetensors") is None
    older = PHOTOS._asdict()
    del older["resize"]
    save_file({"w": np.ones(2)}, bare, {"interface": json.dumps(older)})
    assert weights.interface(bare) == PHOTOS
    np.testing.assert_array_equal(weights.load(full)["w"], np.ones(2))


def test_a_file_of_weights_is_the_same_every_time(tmp_path):
    def content():
        params = {"w": {"caf\u00e9": jnp.ones(3)}, "b": jnp.ones(2)}
        weights.save(tmp_path / "w.safetensors", params, interface=PHOTOS, made={"seed": 3})
        return (tmp_path / "w.safetensors").read_bytes()

    assert len({content() for _ in range(20)}) == 1
    assert load_file(tmp_path / "w.safetensors").keys() == {"w/caf\u00e9", "b"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "pixels",
            r"expected a JSON object as 'interface' in .*w\.safetensors, got 'pixels'; write",
        ),
        ("[1]", r"expected a JSON object as 'interface' in .*w\.safetensors, got '\[1\]'; write"),
        (
            '{"classes": []}',
            r"expected classes, shape, subtract, divide, crop, resize of .*, got classes;",
        ),
    ],
)
def test_an_interface_that_cant_be_parsed_is_an_error(tmp_path, text, message):
    save_file({"w": np.ones(2)}, tmp_path / "w.safetensors", {"interface": text})
    with pytest.raises(ValueError, match=message):
        weights.interface(tmp_path / "w.safetensors")


@pytest.mark.parametrize("read", [weights.load, weights.interface, weights.made])
def test_a_truncated_file_of_weights_is_an_error_for_every_reader(tmp_path, read):
    path = tmp_path / "params.safetensors"
    weights.save(path, {"w": jnp.ones(20)})
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"safetensors in .*params\.safetensors, got: .*write it"):
        read(path)


@pytest.mark.parametrize("read", [weights.load, weights.interface])
def test_a_missing_file_of_weights_is_an_error(tmp_path, read):
    with pytest.raises(FileNotFoundError, match=r"expected a file of weights, got .*gone"):
        read(tmp_path / "gone.safetensors")


def test_a_name_that_is_both_an_array_and_a_folder_is_an_error(tmp_path):
    path = tmp_path / "w.safetensors"
    save_file({"a/b": np.ones(2), "a": np.ones(2), "a-b": np.ones(2)}, path)
    with pytest.raises(ValueError, match=r"an array or a folder .* on the way to a/b; rename"):
        weights.load(path)


def test_paths_that_would_get_the_same_name_are_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"different name for each array, .* called a/b; use no"):
        weights.save(tmp_path / "w.safetensors", {"a": {"b": np.ones(2)}, "a/b": np.ones(2)})


def test_arrays_that_arent_in_row_major_order_are_read_back_as_saved(tmp_path):
    array = np.arange(6.0, dtype=np.float32).reshape(2, 3).T
    weights.save(tmp_path / "w.safetensors", {"w": array, "s": np.float32(2)})
    params = weights.load(tmp_path / "w.safetensors")
    np.testing.assert_array_equal(params["w"], array)
    assert params["s"].shape == ()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_weights_of_any_precision_are_read_as_float32(tmp_path, dtype):
    save_file({"w": np.arange(3).astype(jnp.dtype(dtype))}, tmp_path / "w.safetensors")
    params = weights.load(tmp_path / "w.safetensors", jnp.float32)
    np.testing.assert_array_equal(params["w"], np.arange(3, dtype=np.float32), strict=True)


@pytest.mark.parametrize("dtype", ["int8", "bool", "complex64"])
def test_weights_that_arent_floating_point_are_an_error(tmp_path, dtype):
    save_file({"w": np.ones(3, dtype), "b": np.ones(3)}, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=rf"floating-point weights in .*, got {dtype} in w; write"):
        weights.load(tmp_path / "w.safetensors", jnp.float32)
