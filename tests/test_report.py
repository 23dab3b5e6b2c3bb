"""Results: rows written whole, tables that say what the rows say, weights by path."""

import io
import json

import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import load_file

from experiments import report

NAMES = {"normal": "Normal", "lwa": "LWA"}
PAPER = {"lwa": {"validation": 0.99, "adv_loss": 0.861}}


def row(method, seed, value):
    curve = {"eps": [0.0, 1.0], **{c: [0.9, 0.5] for c in report.LABELS}}
    columns = dict.fromkeys(report.LABELS, value)
    return {"method": method, "seed": seed, "columns": columns, "curves": curve}


ROWS = [row("normal", 0, 0.5), row("lwa", 0, 0.7), row("lwa", 1, 0.8)]


def test_rows_come_back_as_they_were_written(tmp_path):
    path = tmp_path / "results.json"
    assert report.load_rows(path) == []
    report.save_rows(path, ROWS)
    assert report.load_rows(path) == ROWS
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]


@pytest.mark.parametrize(
    ("content", "message"),
    [("[{", "expected JSON in .*results.json"), ("{}", "expected a list of rows")],
)
def test_a_broken_file_is_an_error_naming_it_and_the_cure(tmp_path, content, message):
    path = tmp_path / "results.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message + ".*delete the file"):
        report.load_rows(path)


def test_several_seeds_are_a_mean_with_their_standard_deviation():
    assert report.mean_and_spread(ROWS[:1], "pgd") == "0.5000"
    # sqrt(((.05)^2 + (.05)^2) / 1) = .0707
    assert report.mean_and_spread(ROWS[1:], "pgd") == "0.7500 ± 0.0707"


def test_the_markdown_table_has_a_row_for_ours_and_one_for_the_paper(tmp_path):
    path = tmp_path / "results.md"
    report.write_markdown(path, "A title", ROWS, NAMES, PAPER, ["a note"])
    lines = path.read_text().splitlines()
    assert lines[0] == "# A title"
    assert lines[2].split(" | ")[1:] == [*list(report.LABELS.values())[:-1], "PGD |"]
    assert lines[4] == "| Normal | " + " | ".join(["0.5000"] * 6) + " |"
    assert lines[6].startswith("| LWA | 0.7500 ± 0.0707 | ")
    assert lines[7] == "| paper | 0.990 |  |  | 0.861 |  |  |"
    assert lines[-1] == "- a note"


def test_the_printed_table_shows_whole_figures_in_80_columns():
    out = io.StringIO()
    report.print_table(Console(file=out, width=80), "t", ROWS[:2], NAMES, PAPER)
    assert "LWA" in out.getvalue()
    assert "…" not in out.getvalue()
    assert out.getvalue().count("0.7000") == 6


def test_weights_are_named_by_their_paths(tmp_path):
    params = {"params": {"hidden_0": {"kernel": jnp.arange(6.0).reshape(2, 3)}}}
    report.save_params(tmp_path / "lwa" / "params.safetensors", params)
    stored = load_file(tmp_path / "lwa" / "params.safetensors")
    assert list(stored) == ["params/hidden_0/kernel"]
    np.testing.assert_array_equal(stored["params/hidden_0/kernel"], np.arange(6.0).reshape(2, 3))


def test_figures_are_drawn(tmp_path):
    report.plot_curves(tmp_path / "curves.png", ROWS, NAMES, 1.5)
    r = np.linspace(-0.1, 0.1, 2 * 784).reshape(2, 28, 28, 1)
    digits = report.Digits(r, np.array([1, 2]), np.array([1, 3]))
    report.plot_digits(tmp_path / "digits.png", np.abs(r), {"LWA": digits}, np.array([1, 2]))
    for name in ("curves.png", "digits.png"):
        assert (tmp_path / name).read_bytes()[:4] == b"\x89PNG"


def test_versions_and_device_are_plain_json():
    record = json.loads(json.dumps({"versions": report.versions(), "device": report.device()}))
    assert set(record["versions"]) >= {"jax", "jaxlib", "jaxadv", "python"}
    assert record["device"].startswith("cpu x1")
