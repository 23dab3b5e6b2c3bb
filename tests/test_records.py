"""Rows of records: written, read back, and refused if they are another command's."""

import json
import os
import threading
from typing import NamedTuple

import jax
import numpy as np
import pytest
from rows import check_row, published_row, robust_row

from experiments.lib import cache, options, records


def test_rows_are_read_back_as_written(tmp_path):
    path = tmp_path / "results.json"
    assert records.load(path, records.AttackRow) == []
    rows = [robust_row(crop=28), check_row(flags={"far": "far off"}), published_row(n=3)]
    records.save(path, rows)
    assert records.load(path, records.AttackRow) == rows
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]


def test_nonfinite_numbers_are_written_as_null(tmp_path):
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
        (
            b"[{}]",
            "expected a list of rows of the same command in .*, got some without experiment;",
        ),
        (b'[{"experiment": "train", "settings": null}]', "got some without settings"),
    ],
    ids=["cut off", "not text", "no list", "no rows", "empty row", "null"],
)
def test_the_error_about_a_broken_file_names_it_and_a_remedy(tmp_path, content, message):
    path = tmp_path / "results.json"
    path.write_bytes(content)
    with pytest.raises(options.UsageError, match=message + ".*move the file"):
        records.load(path, records.TrainRow)


def test_a_folder_in_the_place_of_the_file_is_the_same_error(tmp_path):
    with pytest.raises(options.UsageError, match=r"expected JSON in .*Is a directory.*move the"):
        records.load(tmp_path, records.TrainRow)


def test_versions_and_device_are_plain_json():
    record = json.loads(json.dumps({"versions": records.versions(), "device": records.device()}))
    assert set(record["versions"]) >= {"jax", "jaxlib", "jaxadv", "python"}
    assert record["device"].startswith("cpu x1")


class Device(NamedTuple):
    platform: str
    device_kind: str


def test_a_cpus_description_has_its_number_of_cores_and_another_devices_its_kind(monkeypatch):
    kinds = iter([("cpu", "Xeon"), ("cpu", "Xeon"), ("gpu", "H100")])
    monkeypatch.setattr(jax, "devices", lambda: [Device(*next(kinds))])
    monkeypatch.setattr(jax, "device_count", lambda: 2)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3}, raising=False)
    assert records.device() == "cpu x2 (1 core)"
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    assert records.device() == "cpu x2 (7 cores)"
    assert records.device() == "H100 x2"


RECORDED = {
    **dict.fromkeys(
        (
            *("autoattack", "autoattack/reference", "board", "certify/all", "remedies/autoattack"),
            "remedies/longer/autoattack",
            *("cifar10/representation/attacks", "curve/attacks"),
        ),
        records.AttackRow,
    ),
    **dict.fromkeys(
        (
            *("ablations", "cifar10", "cifar10/representation", "mnist_lenet", "mnist_mlp"),
            *("remedies", "remedies/longer"),
        ),
        records.TableRow,
    ),
    **dict.fromkeys(("benchmark", "benchmark/slower_machine"), records.BenchmarkRow),
    **dict.fromkeys(
        (
            *("mnist_lenet/robust_l2", "mnist_lenet/robust_linf", "mnist_mlp/robust_l2"),
            "mnist_mlp/robust_l2/held_out",
        ),
        records.TrainRow,
    ),
    "certify": records.CertifyRow,
    "curve": records.CurveRow,
    "fast": records.FastRow,
    "optimality": records.OptimalityRow,
    "logistic": records.PropositionRow,
    "known": records.KnownRow,
    "features": records.FeaturesRow,
}


@pytest.mark.parametrize("name", RECORDED)
def test_saving_a_records_rows_reproduces_its_json_exactly(name, tmp_path):
    path = records.RESULTS / name / "results.json"
    records.save(tmp_path / "again.json", records.load(path, RECORDED[name]))
    assert (tmp_path / "again.json").read_bytes() == path.read_bytes()


def test_a_row_with_an_unknown_key_is_an_error(tmp_path):
    content = robust_row().to_json() | {"unheard": 1}
    records.save(tmp_path / "results.json", [content])
    with pytest.raises(options.UsageError, match="got some with unheard; move the file"):
        records.load(tmp_path / "results.json", records.AttackRow)


def test_a_stored_row_is_found_and_a_missing_one_is_run(tmp_path):
    path = tmp_path / "results.json"
    rows = [robust_row(seed=seed, eps=eps) for seed in (0, 1) for eps in (1.0, 2.0)]
    records.save(path, rows)

    def found(run, **identity):
        return records.find_or_run(path, records.AttackRow, identity, run, place=("seed", "eps"))

    assert found(pytest.fail, seed=1, eps=2.0) == rows[3]
    new = robust_row(seed=1, eps=2.0, n=7)
    assert found(lambda: new, seed=1, eps=2.0, n=7) == new
    assert records.load(path, records.AttackRow) == [*rows[:3], new]  # in place of the old one


def test_a_row_is_put_only_once_no_other_process_holds_the_folder(tmp_path):
    path = tmp_path / "results.json"
    ours, theirs = robust_row(seed=0), robust_row(seed=1)
    putting = threading.Thread(target=records.put, args=(path, theirs), kwargs={"place": ("seed",)})
    with cache.locked(tmp_path):
        putting.start()
        putting.join(0.2)
        assert not path.exists()
        records.save(path, [ours])
    putting.join()
    assert records.load(path, records.AttackRow) == [ours, theirs]
