"""`experiments/lib/tables.py`: the tables of the records."""

import dataclasses
import io

from rich.console import Console
from rows import table_row

from experiments.lib import tables

NAMES = {"normal": "Normal", "lwa": "LWA"}


PAPER = {"lwa": (0.99, 0.972, 0.939, 0.861, 0.854)}


def row(method, seed, value, **fields):
    columns = dict.fromkeys(tables.LABELS, value)
    return table_row(method=method, seed=seed, columns=columns, **fields)


ROWS = [row("normal", 0, 0.5), row("lwa", 0, 0.7), row("lwa", 1, 0.8)]


def test_several_seeds_are_a_mean_with_their_standard_deviation():
    assert tables.mean_and_spread(ROWS[:1], "pgd") == "0.5000"
    # sqrt(((.05)^2 + (.05)^2) / 1) = .0707
    assert tables.mean_and_spread(ROWS[1:], "pgd") == "0.7500 ± 0.0707"


def test_a_note_lists_the_seeds_and_methods_with_others():
    assert tables.seeds(ROWS[:2], NAMES) == "Seeds 0."
    note = "Seeds 0, 1 (mean ± standard deviation); of Normal 0."
    assert tables.seeds(ROWS, NAMES) == tables.seeds(ROWS[::-1], NAMES) == note


def test_a_note_gives_the_accuracy_of_each_net_that_a_fixed_set_was_made_on():
    def of(eps, value):
        return table_row(eps=eps, columns={"fixed_source": value})

    rows = [of(1.5, 0.2), of(1.5, 0.25), of(1.5, 0.2), of(1.0, 0.4)]
    assert tables.fixed_source(rows) == "0.2000 or 0.2500"


def shown(tmp_path, rows=ROWS, width=80):
    out = io.StringIO()
    sections = tables.by_size(rows, NAMES, PAPER, 1.5)
    tables.show(Console(file=out, width=width), tmp_path, "A title", rows, sections, ["note"])
    return out.getvalue(), (tmp_path / "results.md").read_text().splitlines()


def test_the_markdown_table_has_a_row_for_ours_and_one_for_the_paper(tmp_path):
    _, lines = shown(tmp_path)
    assert lines[:3] == ["# A title", "", "## l2 size 1.5"]
    assert lines[4].split(" | ")[1:] == [*list(tables.LABELS.values())[:-1], "PGD |"]
    assert lines[6] == "| Normal | " + " | ".join(["0.5000"] * 6) + " |"
    assert lines[7].startswith("| LWA | 0.7500 ± 0.0707 | ")
    assert lines[8] == "| paper | 0.990 | 0.972 | 0.939 | 0.861 | 0.854 |  |"
    assert lines[-2:] == ["- note", "- Training took 6 s in all, on cpu x1, jax 0."]


def written(tmp_path, rows, sections):
    tables.show(Console(file=io.StringIO()), tmp_path, "A title", rows, sections, [])
    return (tmp_path / "results.md").read_text().splitlines()


def headings(lines):
    return [line for line in lines if line.startswith("#")]


def test_the_papers_figures_of_four_digits_keep_them(tmp_path):
    paper = {"lwa": (0.9932, 0.9817, 0.98, 0.9533, 0.9529)}
    lines = written(tmp_path, ROWS, tables.by_size(ROWS, NAMES, paper, 1.5))
    assert "| paper | 0.9932 | 0.9817 | 0.9800 | 0.9533 | 0.9529 |  |" in lines


def test_each_size_has_a_table_and_the_papers_row_is_in_that_of_its_size(tmp_path):
    small = [row(r.method, r.seed, 0.9, eps=0.251) for r in ROWS]
    _, lines = shown(tmp_path, [*small, *ROWS])
    assert headings(lines) == ["# A title", "## l2 size 0.251", "## l2 size 1.5"]
    (papers,) = (i for i, line in enumerate(lines) if line.startswith("| paper |"))
    assert papers > lines.index("## l2 size 1.5")
    assert "| Normal | " + " | ".join(["0.9000"] * 6) + " |" in lines
    assert lines[-1].startswith("- Training took 6 s")  # each net was trained once


def test_there_is_a_table_for_each_group(tmp_path):
    groups = {"normal": {"objective": "none"}, "lwa": {"objective": "LWA", "size": "1.5"}}
    rows = [dataclasses.replace(r, groups=groups[r.method]) for r in ROWS]
    lines = written(tmp_path, rows, tables.by_group(rows, ["objective", "size"]))
    assert headings(lines) == ["# A title", "## objective, l2 size 1.5", "## size, l2 size 1.5"]
    assert [line.split(" | ")[0] for line in lines if "0." in line and line[0] == "|"] == [
        "| none", "| LWA", "| 1.5",
    ]  # fmt: skip


def test_different_sizes_are_not_averaged(tmp_path):
    rows = [row("lwa", 0, v, eps=e, groups={"q": "a"}) for e, v in ((1.5, 0.2), (1.0, 0.4))]
    lines = written(tmp_path, rows, tables.by_group(rows, ["q"]))
    assert headings(lines) == ["# A title", "## q, l2 size 1.5", "## q, l2 size 1"]
    assert [line.split(" | ")[1] for line in lines if line.startswith("| a |")] == [
        "0.2000", "0.4000",
    ]  # fmt: skip


def test_the_printed_table_fits_80_columns_without_cutting_figures(tmp_path):
    printed, _ = shown(tmp_path, ROWS[:2])
    assert "LWA" in printed
    assert "…" not in printed
    assert printed.count("0.7000") == 6
