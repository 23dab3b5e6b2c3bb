"""The README says what is so: its example runs, its table is the record's, its links lead on."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
RECORD = ROOT / "experiments" / "results" / "mnist_mlp"


def table(text):
    return [line for line in text.splitlines() if re.match(r"\| (Method|\w+) \|.*(\.\d|PGD)", line)]


def test_the_example_runs_as_printed(capsys):
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(compile(example, "README.md", "exec"), {})
    shape, step, loss = re.fullmatch(r"(\(.*\)) (\d+) (.*)\n", capsys.readouterr().out).groups()
    assert (shape, step) == ("(32, 4)", "1")
    assert 0 < float(loss) < 10


def test_the_table_is_the_record():
    record = table((RECORD / "results.md").read_text())
    assert len(record) == 11
    assert table(README) == record


def test_the_record_is_what_the_results_say():
    rows = json.loads((RECORD / "results.json").read_text())
    methods = ("normal", "dropout", "goodfellow", "lwa", "lwa_rep")
    seeds = dict.fromkeys(methods, (0, 1, 2)) | {"lwa_noisy": (0,), "lwa_multi": (0,)}
    assert {(row["method"], row["seed"]) for row in rows} == {
        (method, seed) for method in seeds for seed in seeds[method]
    }
    assert {row["n"] for row in rows} == {10_000}
    lwa = [row["columns"]["adv_loss"] for row in rows if row["method"] == "lwa"]
    (line,) = (line for line in table(README) if line.startswith("| LWA |"))
    assert f"{sum(lwa) / 3:.4f} ±" in line


@pytest.mark.parametrize("target", re.findall(r"\]\(([^)#]+)\)", README))
def test_its_links_lead_somewhere(target):
    assert (ROOT / target).exists()
