"""`experiments/known.py`: other people's nets and their published figures."""

import io
from pathlib import Path

import pytest
from rich.console import Console
from rows import drawn

from experiments import known
from experiments.lib import records


@pytest.mark.slow
def test_both_nets_are_attacked_and_checked(tmp_path, monkeypatch):
    nets = {"clntrained": drawn(0), "advtrained": drawn(1)}
    monkeypatch.setattr(known, "load", lambda path: nets[path.stem.removeprefix("mnist_lenet5_")])
    settings = known.Settings(Path("there"), n=12, steps=20, n_check=8, out=tmp_path)
    rows = known.run(settings, Console(file=io.StringIO()))
    assert records.load(tmp_path / "results.json", records.KnownRow) == rows
    assert all(row.figures["fmn, median size"] < 1 for row in rows)
    assert [(row.net, row.n) for row in rows] == [("clntrained", 12), ("advtrained", 12)]
    for row in rows:
        assert row.network == "conv3-conv5-6"
        *medians, least = row.median_l2.values()
        assert 0 < least <= min(medians) < 28
    text = (tmp_path / "results.md").read_text()
    assert f"| advtrained | 0.9864 | {rows[1].clean:.4f} | 1.872 | 3.04 |" in text
    assert text.count("\n- ") == 2


def test_missing_weights_are_an_error(tmp_path):
    pytest.importorskip("torch", reason="the extra bench has it")
    with pytest.raises(ValueError, match=r"advertorch's weights, got no .*--help show where"):
        known.load(tmp_path / "gone.pt")
