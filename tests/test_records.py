"""Rows written whole, read back, and refused where they are others."""

import json
import os
from typing import NamedTuple

import jax
import numpy as np
import pytest

from experiments.lib import options, records


def test_rows_come_back_as_they_were_written(tmp_path):
    path = tmp_path / "results.json"
    assert records.load(path) == []
    rows = [{"experiment": "x", "n": 1}, {"experiment": "x", "columns": {"pgd": 0.5}}]
    records.save(path, rows)
    assert records.load(path) == rows
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]


def test_what_is_not_finite_is_null_which_json_has(tmp_path):
    path = tmp_path / "results.json"
    records.save(path, [{"loss": [1.0, float("nan")], "sizes": {"fmn": np.inf, "n": 3}}])
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
        records.load(path, ("experiment", "seed"))


def test_a_folder_in_the_place_of_the_file_is_the_same_error(tmp_path):
    with pytest.raises(options.UsageError, match=r"expected JSON in .*Is a directory.*move it"):
        records.load(tmp_path)


def test_versions_and_device_are_plain_json():
    record = json.loads(json.dumps({"versions": records.versions(), "device": records.device()}))
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
    assert records.device() == "cpu x2 (1 core)"
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    assert records.device() == "cpu x2 (7 cores)"
    assert records.device() == "H100 x2"
