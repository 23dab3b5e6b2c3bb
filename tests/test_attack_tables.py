"""Tables of robust accuracies show what the rows contain."""

import dataclasses

import numpy as np
import pytest
from rows import check_row, published_row, robust_row, table_row

from experiments.lib import attack_tables
from jaxadv import evaluate


def row(method, attack, robust, **fields):
    columns = {"clean": 0.99, "robust": robust}
    interval = [robust - 0.01, robust + 0.01]
    return robust_row(method=method, attack=attack, columns=columns, interval=interval, **fields)


ROWS = [
    row("mnist_mlp/normal", "one-step", 0.5),
    row("mnist_mlp/normal", "pgd-100x10", 0.2),
    row("mnist_mlp/normal", "standard", 0.1),
    row("mnist_mlp/lwa", "one-step", 0.9),
    row("mnist_mlp/lwa", "pgd-100x10", 0.8),
    row("mnist_mlp/lwa", "standard", 0.75, stages={"a": {"passes": 1000}, "b": {"passes": 234}}),
    row("mnist_mlp/lwa", "standard", 0.3, eps=2.0),
    check_row(method="mnist_mlp/lwa", flags={"far": "far off", "budget": "more helps"}),
]


def figures(rows, method="mnist_mlp/lwa", eps=1.5):
    return attack_tables.figures_of(rows, method, "l2", eps)


def test_columns_added_to_a_table_are_of_the_same_net_and_size():
    assert figures(ROWS) == ["0.8000", "0.7500", "0.1500"]
    assert figures(ROWS, eps=2.0) == ["", "0.3000", ""]
    assert figures(ROWS, "mnist_lenet/lwa") == ["", "", ""]


def test_figures_are_those_on_the_most_images():
    few = [row("mnist_mlp/lwa", "one-step", 1.0, n=10), row("mnist_mlp/lwa", "standard", 1.0, n=10)]
    assert figures([*ROWS, *few])[1:] == ["0.7500", "0.1500"]
    for rows in ([*ROWS, *few], [*few, *ROWS]):
        assert attack_tables.ranked(rows) == attack_tables.ranked(ROWS)
    more = row("mnist_mlp/lwa", "one-step", 0.95, n=1000)  # without AutoAttack
    assert figures([*ROWS, more])[1:] == ["0.7500", "0.1500"]


def test_pgd_on_other_images_says_on_how_many():
    few = row("mnist_mlp/lwa", "pgd-100x10", 0.6, n=10)
    fewer = row("mnist_mlp/lwa", "pgd-100x10", 0.5, n=5)
    here = [r for r in ROWS if r.attack != "pgd-100x10"]
    assert figures([*here, few, fewer]) == ["0.6000 (of 10)", "0.7500", "0.1500"]
    same = row("mnist_mlp/lwa", "standard", 0.55, n=10)
    assert figures([*here, few, same])[0] == "0.6000 (of 10, AutoAttack 0.5500)"
    assert figures([*ROWS, few])[0] == "0.8000"


def test_the_most_robust_net_comes_first_and_flags_are_listed():
    lines = attack_tables.ranked(ROWS)
    nets = [line for line in lines if line.startswith("| ") and "Net" not in line]
    assert nets[0] == (
        "| LWA | 7x5 | 100 | 0.9900 | 0.9000 | 0.8000 | **0.7500** | 0.740 to 0.760 | 0.1500 | 1 "
        "| 1,234 |"
    )
    assert nets[1].endswith("| 0.4000 | 1 |  |")  # an older row
    assert [line.split(" | ")[0] for line in nets] == ["| LWA", "| Normal", "| LWA"]
    assert [line for line in lines if line.startswith("##")] == [
        "## mnist_mlp: l2 size 1.5", "## mnist_mlp: l2 size 2",
    ]  # fmt: skip
    assert [line for line in lines if line.startswith("- ")] == [
        "- lwa: far off; more helps", "- not checked: normal", "- not checked: lwa",
    ]  # fmt: skip
    checked = [*ROWS, check_row(method="mnist_mlp/normal", flags={})]
    assert "- normal: no reason for doubt was found" in attack_tables.ranked(checked)


def test_a_net_without_autoattack_comes_last_with_the_figures_it_has():
    lines = attack_tables.ranked([row("mnist_mlp/lwa_rep", "pgd-100x10", 0.99), *ROWS])
    nets = [line for line in lines if line.startswith("| ") and "Net" not in line]
    assert nets[2] == "| LWA_Rep | 7x5 | 100 | 0.9900 |  | 0.9900 |  |  |  |  |  |"


def test_the_published_ensemble_and_ours_are_compared():
    def fields(seed, robust, seconds, attack="apgd-t", eps=1.5):
        columns = {"clean": 1.0, "robust": robust}
        return {
            "seed": seed, "columns": columns, "seconds": seconds, "attack": attack, "eps": eps
        }  # fmt: skip

    theirs = [fields(1, 0.6, 20.0), fields(0, 0.5, 10.0), fields(0, 0.1, 1.0, attack="square")]
    published = [published_row(**row) for row in theirs]
    own = [fields(0, 0.51, 4.0), fields(1, 0.61, 6.0), fields(0, 0.9, 1.0, eps=2.0)]
    ours = [robust_row(**row) for row in own]
    assert attack_tables.beside_published(ours, published)[2:] == [
        "| mnist_mlp/lwa | l2 1.5 | APGD-T | 0.5500 ± 0.0707 | 0.5600 ± 0.0707 | +0.0100 | 10 | 4 |"
    ]


def trained(method, seed, robust, eps=1.5):
    columns = {"validation": 0.99, "adv_loss": 0.9, "pgd": robust}
    return table_row(
        method=method, seed=seed, eps=eps, train_seconds=40.0, epochs=4, columns=columns
    )


def left(method, seed, robust, attack="standard", eps=1.5, n=500):
    columns = {"clean": 0.99, "robust": robust}
    name = f"{method}, seed {seed}"
    return robust_row(method=name, attack=attack, eps=eps, n=n, columns=columns)


def test_a_line_is_of_one_way_and_size_and_of_autoattack_on_the_most_images():
    rows = [trained("four", 0, 0.8), trained("four", 1, 0.6), trained("four", 0, 0.1, eps=2.0)]
    attacked = [
        left("four", 0, 0.7), left("four", 1, 0.5), left("four", 0, 0.9, n=50),
        left("four", 0, 0.2, eps=2.0), left("start", 0, 0.3), left("four", 0, 0.95, "one-step"),
    ]  # fmt: skip
    label = attack_tables.WAYS["four"]
    assert attack_tables.ways(rows, attacked)[2:] == [
        f"| {label} | 1.5 | 10.0 | 0.9900 ± 0.0000 | 0.9000 ± 0.0000 | 0.7000 ± 0.1414 | 0.9500 "
        "| 0.6000 ± 0.1414 | 500 |",
        f"| {label} | 2 | 10.0 | 0.9900 | 0.9000 | 0.1000 |  | 0.2000 | 500 |",
    ]


def test_step_times_relative_to_lwas_are_shown_if_recorded():
    timed = [dataclasses.replace(trained("memory", seed, 0.8), ratio_to_lwa=r)
             for seed, r in ((0, 1.1), (1, 1.2))]  # fmt: skip
    heading, _, first, second = attack_tables.ways([*timed, trained("four", 0, 0.8)], [])
    assert "| Seconds an epoch | Times LWA's | Clean |" in heading
    assert "| 10.0 | 1.15 | 0.9900" in first
    assert "| 10.0 |  | 0.9900" in second


def judged(method, seed, wrong, **fields):
    """AutoAttack's row for ten images; the net is wrong on those in `wrong`."""
    verdicts = ~np.isin(np.arange(10), wrong)
    row = left(method, seed, float(verdicts.mean()), n=10, **fields)
    return dataclasses.replace(row, standing=np.packbits(verdicts).tobytes().hex())


def test_differences_of_ways_are_paired_and_pooled_over_their_common_seeds():
    attacked = [
        judged("start", 0, [0, 1, 2, 3]), judged("start", 1, [0, 1, 2, 3]),
        judged("noise", 0, [0, 1, 2, 3, 4, 5]), judged("noise", 1, []),  # the best on average
        judged("best", 0, []),  # of one seed only
        judged("memory", 0, [0, 6]), judged("memory", 0, [], attack="one-step"),
        judged("four", 0, [6]), judged("four", 1, [1]), left("aligned", 0, 1.0, n=10),
    ]  # fmt: skip
    rows = [trained(way, seed, 0.8) for way in attack_tables.WAYS for seed in (0, 1)]
    heading, _, *lines, _ = attack_tables.gap_closed(rows, attacked)
    assert f"Gain under AutoAttack at l2 1.5, over: {attack_tables.WAYS['noise']} |" in heading
    names = [attack_tables.WAYS[name] for name in ("start", "best", "memory", "four")]
    assert [line.split(" | ")[:2] for line in lines] == [
        [f"| {name}", difference]
        for name, difference in zip(
            names, ("-0.1000", "+0.6000", "+0.4000", "+0.2000"), strict=True
        )
    ]
    assert [line.split(" | ")[-2] for line in lines] == ["-0.50", "1.20", "0.80", "1.00"]
    assert all(line.endswith(" | 10 |") for line in lines)  # best and memory: of seed 0
    # Six images of seed 0 are right by four steps only; one of each seed, by the fresh step only.
    compared = evaluate.compare(np.arange(20) < 6, np.arange(20) >= 18)
    assert "| {:+.4f} to {:+.4f} |".format(*compared.interval) in lines[3]
    assert f"| {compared.p_value:.2g} |" in lines[3]


def test_ways_are_compared_on_the_images_that_they_have_in_common():
    def first(row, n):
        return dataclasses.replace(
            row, n=n, standing=np.packbits(row.verdicts()[:n]).tobytes().hex()
        )

    start, memory, four = (
        judged(way, 0, wrong)
        for way, wrong in (("start", [1, 2, 8]), ("memory", [1]), ("four", []))
    )
    rows = [trained(way, 0, 0.8) for way in ("start", "memory", "four")]
    *_, of_memory, of_four, _ = attack_tables.gap_closed(
        rows, [start, first(start, 3), first(memory, 6), four]
    )
    assert "+0.1667" in of_memory
    assert of_memory.endswith("| 0.50 | 6 |")
    assert "+0.3000" in of_four
    assert of_four.endswith("| 1.00 | 10 |")


def test_one_step_on_more_images_does_not_hide_autoattack():
    attacked = [left("four", 0, 0.7), left("four", 0, 0.9, "one-step", n=1000)]
    *_, line = attack_tables.ways([trained("four", 0, 0.8)], attacked)
    assert line.endswith("|  | 0.7000 | 500 |")


@pytest.mark.parametrize("missing", ["four", "start"])
def test_without_a_fresh_step_or_four_steps_there_is_no_gap(missing):
    ways = {"start", "four", "memory"} - {missing}
    rows = [trained(way, 0, 0.8) for way in ways]
    assert attack_tables.gap_closed(rows, [judged(way, 0, [1]) for way in ways]) == []
