"""Results: rows written whole, tables that say what the rows say, weights by path."""

import io
import json
import os
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import load_file, save_file

from experiments import data, options, report

NAMES = {"normal": "Normal", "lwa": "LWA"}
PAPER = {"lwa": (0.99, 0.972, 0.939, 0.861, 0.854)}


def row(method, seed, value):
    curve = {"eps": [0.0, 1.0], **{c: [0.9, 0.5] for c in report.LABELS}}
    columns = dict.fromkeys(report.LABELS, value)
    return {
        "experiment": "mnist_mlp", "method": method, "seed": seed, "eps": 1.5, "columns": columns,
        "curves": curve, "history": [{"validation": 0.8, "adv_loss": 0.2}] * 2,
        "train_seconds": 2.0, "device": "cpu x1", "versions": {"jax": "0"},
    }  # fmt: skip


ROWS = [row("normal", 0, 0.5), row("lwa", 0, 0.7), row("lwa", 1, 0.8)]


def test_rows_come_back_as_they_were_written(tmp_path):
    path = tmp_path / "results.json"
    assert report.load_rows(path) == []
    report.save_rows(path, ROWS)
    assert report.load_rows(path) == ROWS
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]


def test_what_is_not_finite_is_null_which_json_has(tmp_path):
    path = tmp_path / "results.json"
    report.save_rows(path, [{"loss": [1.0, float("nan")], "sizes": {"fmn": np.inf, "n": 3}}])
    assert json.loads(path.read_text(), parse_constant=pytest.fail) == [
        {"loss": [1.0, None], "sizes": {"fmn": None, "n": 3}}
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[{", "expected JSON in .*results.json"),
        (b"\xff\xfe", "expected JSON in .*results.json"),
        (b"{}", "expected a list of rows.*got something else"),
        (b"[1]", "expected a list of rows.*got something else"),
        (b"[{}]", "expected a list of rows with experiment, seed .*some without experiment;"),
        (b'[{"experiment": "train", "seed": null}]', "got some without seed"),
    ],
    ids=["cut off", "not text", "no list", "no rows", "empty row", "null"],
)
def test_a_broken_file_is_an_error_naming_it_and_the_cure(tmp_path, content, message):
    path = tmp_path / "results.json"
    path.write_bytes(content)
    with pytest.raises(options.UsageError, match=message + ".*move it away"):
        report.load_rows(path, ("experiment", "seed"))


def test_a_folder_in_the_place_of_the_file_is_the_same_error(tmp_path):
    with pytest.raises(options.UsageError, match=r"expected JSON in .*Is a directory.*move it"):
        report.load_rows(tmp_path)


def test_several_seeds_are_a_mean_with_their_standard_deviation():
    assert report.mean_and_spread(ROWS[:1], "pgd") == "0.5000"
    # sqrt(((.05)^2 + (.05)^2) / 1) = .0707
    assert report.mean_and_spread(ROWS[1:], "pgd") == "0.7500 ± 0.0707"


def test_a_note_says_which_methods_seeds_differ():
    assert report.seeds(ROWS[:2], NAMES) == "Seeds 0."
    note = "Seeds 0, 1 (mean ± standard deviation); of Normal 0."
    assert report.seeds(ROWS, NAMES) == report.seeds(ROWS[::-1], NAMES) == note


def test_a_note_names_the_figure_of_each_net_that_a_fixed_set_was_made_on():
    def of(eps, value):
        return {"eps": eps, "columns": {"fixed_source": value}}

    rows = [of(1.5, 0.2), of(1.5, 0.25), of(1.5, 0.2), of(1.0, 0.4)]
    assert report.fixed_source(rows) == "0.2000 or 0.2500"


def tables(tmp_path, rows=ROWS, width=80):
    out = io.StringIO()
    report.tables(Console(file=out, width=width), tmp_path, "A title", rows, NAMES, PAPER, ["note"])
    return out.getvalue(), (tmp_path / "results.md").read_text().splitlines()


def test_the_markdown_table_has_a_row_for_ours_and_one_for_the_paper(tmp_path):
    _, lines = tables(tmp_path)
    assert lines[:3] == ["# A title", "", "## l2 size 1.5"]
    assert lines[4].split(" | ")[1:] == [*list(report.LABELS.values())[:-1], "PGD |"]
    assert lines[6] == "| Normal | " + " | ".join(["0.5000"] * 6) + " |"
    assert lines[7].startswith("| LWA | 0.7500 ± 0.0707 | ")
    assert lines[8] == "| paper | 0.990 | 0.972 | 0.939 | 0.861 | 0.854 |  |"
    assert lines[-2:] == ["- note", "- Training took 6 s in all, on cpu x1, jax 0."]


def test_figures_printed_with_four_digits_keep_them(tmp_path):
    out = io.StringIO()
    paper = {"lwa": (0.9932, 0.9817, 0.98, 0.9533, 0.9529)}
    report.tables(Console(file=out), tmp_path, "t", ROWS, NAMES, paper, [])
    assert (
        "| paper | 0.9932 | 0.9817 | 0.9800 | 0.9533 | 0.9529 |  |"
        in (tmp_path / "results.md").read_text()
    )


def test_each_size_has_a_table_and_the_paper_stands_beside_the_first(tmp_path):
    small = [{**r, "eps": 0.251, "columns": dict.fromkeys(report.LABELS, 0.9)} for r in ROWS]
    _, lines = tables(tmp_path, [*ROWS, *small])
    assert [line for line in lines if line.startswith("#")] == [
        "# A title", "## l2 size 1.5", "## l2 size 0.251",
    ]  # fmt: skip
    assert sum(line.startswith("| paper |") for line in lines) == 1
    assert "| Normal | " + " | ".join(["0.9000"] * 6) + " |" in lines
    assert lines[-1].startswith("- Training took 6 s")  # each net was trained once


def test_grouped_tables_have_one_for_each_question(tmp_path):
    out = io.StringIO()
    groups = {"normal": {"objective": "none"}, "lwa": {"objective": "LWA", "size": "1.5"}}
    rows = [{**r, "groups": groups[r["method"]]} for r in ROWS]
    report.grouped_tables(Console(file=out), tmp_path, "A title", rows, ["objective", "size"], [])
    lines = (tmp_path / "results.md").read_text().splitlines()
    assert [line for line in lines if line.startswith("#")] == [
        "# A title", "## objective, l2 size 1.5", "## size, l2 size 1.5",
    ]  # fmt: skip
    assert [line.split(" | ")[0] for line in lines if "0." in line and line[0] == "|"] == [
        "| none", "| LWA", "| 1.5",
    ]  # fmt: skip


def test_sizes_arent_averaged_as_if_they_were_seeds(tmp_path):
    rows = [
        {**row("lwa", 0, v), "eps": e, "groups": {"q": "a"}} for e, v in ((1.5, 0.2), (1.0, 0.4))
    ]
    report.grouped_tables(Console(file=io.StringIO()), tmp_path, "A title", rows, ["q"], [])
    lines = (tmp_path / "results.md").read_text().splitlines()
    assert [line for line in lines if line.startswith("#")] == [
        "# A title", "## q, l2 size 1.5", "## q, l2 size 1",
    ]  # fmt: skip
    assert [line.split(" | ")[1] for line in lines if line.startswith("| a |")] == [
        "0.2000", "0.4000",
    ]  # fmt: skip


def test_the_printed_table_shows_whole_figures_in_80_columns(tmp_path):
    printed, _ = tables(tmp_path, ROWS[:2])
    assert "LWA" in printed
    assert "…" not in printed
    assert printed.count("0.7000") == 6


def test_weights_are_named_by_their_paths(tmp_path):
    params = {"params": {"hidden_0": {"kernel": jnp.arange(6.0).reshape(2, 3)}}}
    report.save_params(tmp_path / "lwa" / "params.safetensors", params)
    stored = load_file(tmp_path / "lwa" / "params.safetensors")
    assert list(stored) == ["params/hidden_0/kernel"]
    np.testing.assert_array_equal(stored["params/hidden_0/kernel"], np.arange(6.0).reshape(2, 3))


def test_weights_say_how_they_were_made_if_they_were_told(tmp_path):
    told, untold = tmp_path / "told.safetensors", tmp_path / "untold.safetensors"
    report.save_params(told, {"w": jnp.ones(2)}, made={"seed": 3, "widths": [4, 5]})
    report.save_params(untold, {"w": jnp.ones(2)})
    assert report.made(told) == {"seed": 3, "widths": [4, 5]}
    assert report.made(untold) is None
    assert report.made(tmp_path / "none.safetensors") is None
    np.testing.assert_array_equal(report.load_params(told)["w"], np.ones(2))


PHOTOS = data.Interface(("caf\u00e9", "\udcff\n"), (28, 28, 3), subtract=117, divide=256, crop=28)


def test_weights_say_what_their_net_takes_and_gives_if_they_were_told(tmp_path):
    told, untold = tmp_path / "told.safetensors", tmp_path / "untold.safetensors"
    report.save_params(told, {"w": jnp.ones(2)}, interface=PHOTOS, made={"seed": 3})
    report.save_params(untold, {"w": jnp.ones(2)}, made={"seed": 3})
    assert report.interface(told) == PHOTOS
    assert report.made(told) == {"seed": 3}
    assert report.interface(untold) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "pixels",
            r"expected a JSON object as 'interface' in .*w\.safetensors, got 'pixels'; write",
        ),
        ("[1]", r"expected a JSON object as 'interface' in .*w\.safetensors, got '\[1\]'; write"),
        ('{"classes": []}', r"expected classes, shape, subtract, divide, crop of .*, got classes;"),
    ],
)
def test_another_text_in_its_place_is_an_error(tmp_path, text, message):
    save_file({"w": np.ones(2)}, tmp_path / "w.safetensors", {"interface": text})
    with pytest.raises(ValueError, match=message):
        report.interface(tmp_path / "w.safetensors")


@pytest.mark.parametrize("read", [report.load_params, report.interface, report.made])
def test_a_truncated_file_of_weights_is_an_error_whatever_is_read(tmp_path, read):
    path = tmp_path / "params.safetensors"
    report.save_params(path, {"w": jnp.ones(20)})
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"safetensors in .*params\.safetensors, got .*write it"):
        read(path)


@pytest.mark.parametrize("read", [report.load_params, report.interface])
def test_a_file_of_weights_that_isnt_there_is_an_error(tmp_path, read):
    with pytest.raises(FileNotFoundError, match=r"expected a file of weights, got .*gone"):
        read(tmp_path / "gone.safetensors")


def test_a_name_that_is_both_an_array_and_a_folder_is_an_error(tmp_path):
    path = tmp_path / "w.safetensors"
    save_file({"a/b": np.ones(2), "a": np.ones(2), "a-b": np.ones(2)}, path)
    with pytest.raises(ValueError, match=r"either arrays or folders .* on the way to a/b; rename"):
        report.load_params(path)


def test_paths_that_would_be_one_name_are_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"name of its own for each array, .* called a/b; use no"):
        report.save_params(tmp_path / "w.safetensors", {"a": {"b": np.ones(2)}, "a/b": np.ones(2)})


def test_arrays_that_arent_laid_out_by_rows_come_back_as_they_were(tmp_path):
    array = np.arange(6.0, dtype=np.float32).reshape(2, 3).T
    report.save_params(tmp_path / "w.safetensors", {"w": array, "s": np.float32(2)})
    params = report.load_params(tmp_path / "w.safetensors")
    np.testing.assert_array_equal(params["w"], array)
    assert params["s"].shape == ()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_weights_of_any_precision_are_read_as_float32(tmp_path, dtype):
    save_file({"w": np.arange(3).astype(jnp.dtype(dtype))}, tmp_path / "w.safetensors")
    params = report.load_params(tmp_path / "w.safetensors", jnp.float32)
    np.testing.assert_array_equal(params["w"], np.arange(3, dtype=np.float32), strict=True)


@pytest.mark.parametrize("dtype", ["int8", "bool", "complex64"])
def test_weights_that_arent_floating_point_are_an_error(tmp_path, dtype):
    save_file({"w": np.ones(3, dtype), "b": np.ones(3)}, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=rf"floating-point weights in .*, got {dtype} in w; write"):
        report.load_params(tmp_path / "w.safetensors", jnp.float32)


def test_versions_and_device_are_plain_json():
    record = json.loads(json.dumps({"versions": report.versions(), "device": report.device()}))
    assert set(record["versions"]) >= {"jax", "jaxlib", "jaxadv", "python"}
    assert record["device"].startswith("cpu x1")


class Device(NamedTuple):
    platform: str
    device_kind: str


def test_a_cpu_says_how_many_cores_a_run_may_use_and_another_device_its_kind(monkeypatch):
    kinds = iter([("cpu", "Xeon"), ("cpu", "Xeon"), ("gpu", "H100")])
    monkeypatch.setattr(jax, "devices", lambda: [Device(*next(kinds))])
    monkeypatch.setattr(jax, "device_count", lambda: 2)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3}, raising=False)
    assert report.device() == "cpu x2 (1 core)"
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    assert report.device() == "cpu x2 (7 cores)"
    assert report.device() == "H100 x2"
