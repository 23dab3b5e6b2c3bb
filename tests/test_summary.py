"""The results' README: its tables match the records, and everything it names exists."""

import importlib
import re
from pathlib import Path

import pytest
from rows import robust_row, table_row

from experiments import summary
from experiments.lib import records, tables

ROOT = Path(__file__).resolve().parents[1]
TEXT = (summary.RESULTS / "README.md").read_text()
TESTS = "\n".join(path.read_text() for path in ROOT.glob("tests/test_*.py"))


def test_the_tables_match_the_records():
    assert summary.fill(TEXT) == TEXT


def test_a_table_has_the_papers_rows_above_ours_and_columns_of_the_board(monkeypatch, tmp_path):
    columns = dict.fromkeys(tables.LABELS, 0.5)
    rows = [table_row(experiment="cifar10", eps=eps, columns=columns) for eps in (0.5, 0.25)]
    (tmp_path / "cifar10").mkdir()
    records.save(tmp_path / "cifar10" / "results.json", rows)
    full = robust_row(method="cifar10/lwa", eps=0.5, n=9, columns={"clean": 1.0, "robust": 0.4})
    (tmp_path / "board").mkdir()
    records.save(tmp_path / "board" / "results.json", [full])
    monkeypatch.setattr(summary, "RESULTS", tmp_path)
    text = "a\n<!-- table cifar10 -->\nold\n<!-- end -->\nb\n<!-- table none -->\n<!-- end -->\n"
    lines = summary.fill(text).splitlines()
    assert lines[:2] == ["a", "<!-- table cifar10 -->"]
    ours = "| LWA | ours | " + " | ".join(["0.5000"] * 6) + " |  | 0.4000 |  |"
    plain = "| LWA | ours | " + " | ".join(["0.5000"] * 6) + " |"  # not on the board
    # First the size in the paper, then the effective size of its code.
    assert lines[lines.index("l2 size 0.5:") + 4 :][:2] == [
        "| LWA | printed | 0.838 | 0.776 | 0.606 | 0.492 | 0.520 |  |  |  |  |", ours,
    ]  # fmt: skip
    assert lines[lines.index("l2 size 0.25:") + 4 :][:3] == [
        "| LWA | notebook | 0.864 | 0.831 | 0.803 | 0.760 | 0.750 |  |", plain,
        "<!-- end -->",
    ]  # fmt: skip
    assert lines[-3:] == ["b", "<!-- table none -->", "<!-- end -->"]
    assert summary.fill("\n".join(lines)) == "\n".join(lines)


def test_the_table_of_splits_has_a_line_for_each_net(monkeypatch, tmp_path):
    def row(split, size, **fields):
        settings = {"split": split, "train_eps": size, "holdout": 5}
        return table_row(experiment="cifar10", method="lwa_rep", settings=settings, **fields)

    rows = [row(3, 0.1), row(1, 0.02), row(1, 0.01, epochs=9, n=5000)]
    (tmp_path / "cifar10" / "representation").mkdir(parents=True)
    records.save(tmp_path / "cifar10" / "representation" / "results.json", rows)
    monkeypatch.setattr(summary, "RESULTS", tmp_path)
    text = "<!-- table cifar10/representation -->\n<!-- end -->"
    figures = " | ".join(["0.5000"] * 6)
    assert summary.fill(text).splitlines()[3:-1] == [
        f"| first block | 0.01 | 9 | 5,000 held out | {figures} |",
        f"| first block | 0.02 | 2 | 100 held out | {figures} |",
        f"| first dense layer | 0.1 | 2 | 100 held out | {figures} |",
    ]


def test_the_table_of_remedies_has_accuracy_under_autoattack(monkeypatch, tmp_path):
    columns = {"validation": 0.99, "adv_loss": 0.95, "pgd": 0.7}
    row = table_row(method="four", epochs=2, train_seconds=10.0, columns=columns)
    left = robust_row(method="four, seed 0", n=5, columns={"clean": 1.0, "robust": 0.6})
    (tmp_path / "remedies" / "autoattack").mkdir(parents=True)
    records.save(tmp_path / "remedies" / "results.json", [row])
    records.save(tmp_path / "remedies" / "autoattack" / "results.json", [left])
    monkeypatch.setattr(summary, "RESULTS", tmp_path)
    _, _, _, line, _ = summary.fill("<!-- table remedies -->\n<!-- end -->").splitlines()
    assert line.startswith("| four steps from a random start | 1.5 | 5.0 | 0.9900 |")
    assert line.endswith("|  | 0.6000 | 5 |")


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\(([^)#]+)\)", TEXT))))
def test_the_links_exist(target):
    assert (summary.RESULTS / target).exists()


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`(test_\w+)`", TEXT))))
def test_the_named_tests_exist(name):
    assert re.search(rf"^def {name}\(", TESTS, re.MULTILINE)


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`(jaxadv\.\w+\.\w+)`", TEXT))))
def test_the_named_functions_exist(name):
    module, _, function = name.rpartition(".")
    assert callable(getattr(importlib.import_module(module), function))


@pytest.mark.parametrize(
    "name", sorted(set(re.findall(r"`(?:python )?(experiments/\w+\.py)", TEXT)))
)
def test_the_named_commands_exist(name):
    assert (ROOT / name).exists()


@pytest.mark.parametrize(
    "item",
    [
        *(f"Equation {n}" for n in (1, 6)), "Equations 2 and 3", "Equation 4", "Equation 5",
        *(f"Proposition {n}" for n in "346BCD"), *(f"Algorithm {n}" for n in "123"),
        *(f"Table {n}" for n in "123"), "Figures 1 and 2",
    ],
)  # fmt: skip
def test_each_item_of_the_paper_has_a_row(item):
    rows = [line for line in TEXT.splitlines() if line.startswith("|")]
    assert any(item in row.split("|")[1] for row in rows)
