"""Tables of robust accuracies: nets ranked, AutoAttack ours and published, ways of training."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean
from typing import Any

import numpy as np
from numpy.typing import NDArray

from experiments.lib import tables
from experiments.lib.attacks import LABELS, AttackName
from experiments.lib.recipes import NAMES
from experiments.lib.records import AttackRow, CheckRow, PublishedRow, RobustRow, TableRow
from jaxadv import evaluate

COLUMNS: tuple[AttackName, ...] = ("one-step", "pgd-100x10", "standard")
"""The attacks of the board."""

NETS: dict[str, str] = NAMES | {
    "robust_l2": "multi-step, for l2 size 1.5",
    "robust_linf": "multi-step, for linf size 0.3",
}
"""Names of the board's nets: the methods of `recipes`, and what `train.py` trained."""


def figures_of(rows: Sequence[AttackRow], method: str, norm: str, eps: float) -> list[str]:
    """Return a net's figures under PGD and AutoAttack, and the one-step figure's excess.

    Args:
      rows: rows of the board.
      method: the net, as named in the rows.
      norm: norm of the size.
      eps: size of the perturbations.

    Returns:
      The robust accuracies under PGD-100x10 and AutoAttack, and one step's minus AutoAttack's, all
      on the same images: the most that AutoAttack has been run on. A cell is empty where an attack
      has not been run on them. If PGD has been run only on another number of images, its cell gives
      that number, and AutoAttack's robust accuracy on them.
    """
    here = [
        row
        for row in rows
        if isinstance(row, RobustRow)
        and (row.method, row.norm, row.eps) == (method, norm, eps)
        and row.attack in COLUMNS
    ]
    full = {row.n: row.columns["robust"] for row in here if row.attack == "standard"}
    most = max(full or [row.n for row in here], default=0)
    own = {row.attack: row.columns["robust"] for row in here if row.n == most}
    one, pgd, worst = map(own.get, COLUMNS)
    difference = "" if one is None or worst is None else f"{one - worst:.4f}"
    cells = ["" if figure is None else f"{figure:.4f}" for figure in (pgd, worst)]
    others = {row.n: row.columns["robust"] for row in here if row.attack == "pgd-100x10"}
    if pgd is None and others:
        n = max(others)
        beside = [f" AutoAttack {full[n]:.4f}"] if n in full else []
        cells[0] = f"{others[n]:.4f} ({','.join([f'of {n:,}', *beside])})"
    return [*cells, difference]


def ranked(rows: Sequence[AttackRow]) -> list[str]:
    """Return, for each record and threat of the board, a table with the most robust net first."""
    lines: list[str] = []

    def place(row: AttackRow) -> tuple[str, str, float]:
        return row.method.split("/")[0], row.norm, row.eps

    for key in dict.fromkeys(map(place, rows)):
        record, norm, eps = key
        here = [row for row in rows if place(row) == key]
        attacked = [row for row in here if isinstance(row, RobustRow)]
        by_n = sorted(attacked, key=lambda row: row.n)  # so that the row with the most images wins
        best = {row.method: row for row in by_n}
        best |= {row.method: row for row in by_n if row.attack == "standard"}
        # Nets on which AutoAttack hasn't been run come last.
        order = sorted(
            best.values(), key=lambda row: (row.attack != "standard", -row.columns["robust"])
        )
        cells = []
        for row in order:
            same = row.method, "one-step", row.n
            one = [r for r in attacked if (r.method, r.attack, r.n) == same]
            pgd, full, difference = figures_of(here, row.method, norm, eps)
            low, high = row.interval
            of_full = [f"**{full}**", f"{low:.3f} to {high:.3f}", difference, f"{row.seconds:,.0f}"]
            of_full.append(f"{row.passes:,.0f}" if row.passes else "")
            name = row.method.split("/")[1]
            cells.append([
                NETS.get(name, name), row.network, f"{row.n:,}", f"{row.columns['clean']:.4f}",
                tables.mean_and_spread(one[:1], "robust"), pgd,
                *(of_full if row.attack == "standard" else [""] * len(of_full)),
            ])  # fmt: skip
        headings = (
            "Net", "Layers", "Images", "Clean", "One step", "PGD-100x10", "AutoAttack", "95 %",
            "One step less AutoAttack", "AutoAttack's seconds", "Its passes per image",
        )  # fmt: skip
        lines += [f"## {record}: {norm} size {eps:g}", "", *tables.markdown(headings, cells), ""]
        checks = {row.method: row.flags for row in here if isinstance(row, CheckRow)}
        for method, flags in checks.items():
            lines.append(f"- {method.split('/')[1]}: {tables.doubts(flags)}")
        unchecked = [row.method.split("/")[1] for row in order if row.method not in checks]
        if unchecked:
            lines.append(f"- not checked: {', '.join(unchecked)}")
        lines.append("")
    return lines


def beside_published(ours: Sequence[AttackRow], published: Sequence[AttackRow]) -> list[str]:
    """Return a table of AutoAttack and its members, ours next to the published ones.

    Args:
      ours: rows of `evaluation`.
      published: rows of `reference`.
    """

    def place(row: AttackRow) -> tuple[Any, ...]:
        return row.method, row.norm, row.eps, row.n, row.attack

    cells = []
    for key in dict.fromkeys(map(place, published)):
        theirs = [row for row in published if isinstance(row, PublishedRow) and place(row) == key]
        own = [row for row in ours if isinstance(row, RobustRow) and place(row) == key]
        if not theirs or not own:
            continue
        method, norm, eps, _, attack = key
        difference = mean(row.columns["robust"] for row in own) - mean(
            row.columns["robust"] for row in theirs
        )
        # Times of the first seed: only one run can have had the machine to itself.
        seconds = [
            min(theirs, key=lambda row: row.seed).seconds,
            min(own, key=lambda row: row.seed).seconds,
        ]
        cells.append([
            method, f"{norm} {eps:g}", LABELS[attack], tables.mean_and_spread(theirs, "robust"),
            tables.mean_and_spread(own, "robust"), f"{difference:+.4f}",
            *(f"{taken:.0f}" for taken in seconds),
        ])  # fmt: skip
    headings = (
        "Net", "Norm, size", "Attack", "Published", "Ours", "Difference", "Seconds, published",
        "Ours",
    )  # fmt: skip
    return tables.markdown(headings, cells)


WAYS: dict[str, str] = {
    "from_x": "one step from x (LWA)",
    "start": "from a random start, 1.25 eps, projected",
    "best": "from a random start, 2.5 eps, projected, the better of start and end",
    "noise": "from a random start, 1 eps, not projected",
    "aligned": "from x, gradients aligned",
    "memory": "one step from the last epoch's, projected",
    "memory_two": "two steps from the last epoch's, projected",
    "nearest": "one step from the last epoch's, toward the nearer of two classes",
    "four": "four steps from a random start",
}
"""The ways of training that `remedies` compares."""


def ways(rows: Sequence[TableRow], attacked: Sequence[AttackRow]) -> list[str]:
    """Return a table of the ways of training: accuracies and cost.

    The column of step times relative to LWA's is left out if no row has one. AutoAttack's figures
    are those on the most images that it has been run on.
    """
    cells = []
    timed = any(row.ratio_to_lwa is not None for row in rows)
    for eps in dict.fromkeys(row.eps for row in rows):
        for method, label in WAYS.items():
            ours = [row for row in rows if (row.method, row.eps) == (method, eps)]
            if not ours:
                continue
            names = {f"{method}, seed {row.seed}" for row in ours}
            here = [
                row
                for row in attacked
                if isinstance(row, RobustRow) and row.method in names and row.eps == eps
            ]
            run = [row for row in here if row.attack == "standard"] or here
            most = max((row.n for row in run), default=0)
            ratios = [row.ratio_to_lwa for row in ours if row.ratio_to_lwa is not None]
            cells.append([
                label, f"{eps:g}", f"{mean(row.train_seconds / row.epochs for row in ours):.1f}",
                *([f"{mean(ratios):.2f}" if ratios else ""] if timed else []),
                *(tables.mean_and_spread(ours, name) for name in ("validation", "adv_loss", "pgd")),
                *(
                    tables.mean_and_spread(
                        [row for row in here if (row.attack, row.n) == (attack, most)], "robust"
                    )
                    for attack in ("one-step", "standard")
                ),
                f"{most:,}" if most else "",
            ])  # fmt: skip
    headings = (
        "Training", "l2 size", "Seconds an epoch", *(["Times LWA's"] if timed else []), "Clean",
        "Adv_Loss", "PGD", "One step, in the box", "AutoAttack, in the box", "Images in the box",
    )  # fmt: skip
    return tables.markdown(headings, cells)


_FRESH = ("from_x", "start", "best", "noise", "aligned")

Verdicts = dict[str, dict[int, NDArray[np.bool_]]]
"""Whether each image is still classified correctly, by way of training and seed."""


def gap_closed(rows: Sequence[TableRow], attacked: Sequence[AttackRow]) -> list[str]:
    """Return tables of the gap between the best fresh step and four steps that each way closes.

    Differences under AutoAttack are paired: each is over the same images, pooled over the seeds
    that both ways have. Images are always taken in the same order, so these are the first ones, as
    many as AutoAttack has been run on for both ways and for four steps. Intervals and p-values are
    for other images, not for other seeds: each image counts once for each seed, and the best fresh
    step, of those with the most seeds, is the best of these very images. A size has no table
    without a fresh step and four steps.

    Args:
      rows: the trained nets.
      attacked: AutoAttack's rows, named `METHOD, seed N`; older ones, without verdicts on each
        image, are left out.
    """
    lines: list[str] = []
    for eps in dict.fromkeys(row.eps for row in rows):
        here = [
            row
            for row in attacked
            if isinstance(row, RobustRow)
            and (row.attack, row.eps) == ("standard", eps)
            and row.standing
        ]
        by_name = {row.method: row.verdicts() for row in sorted(here, key=lambda row: row.n)}
        verdicts: Verdicts = {}
        for row in rows:
            if (found := by_name.get(f"{row.method}, seed {row.seed}")) is not None:
                verdicts.setdefault(row.method, {})[row.seed] = found
        fresh = [name for name in _FRESH if name in verdicts]
        if not fresh or "four" not in verdicts:
            continue
        most_seeds = max(len(verdicts[name]) for name in fresh)
        fresh = [name for name in fresh if len(verdicts[name]) == most_seeds]
        common = min(len(found) for name in fresh for found in verdicts[name].values())
        best = max(
            fresh, key=lambda name: np.mean([found[:common] for found in verdicts[name].values()])
        )
        headings = (
            "Training", f"Gain under AutoAttack at l2 {eps:g}, over: {WAYS[best]}", "95 %",
            "McNemar's p", "Share of the gap to four steps", "Images",
        )  # fmt: skip
        lines += [*tables.markdown(headings, _differences(verdicts, best)), ""]
    return lines


def _differences(verdicts: Verdicts, best: str) -> list[list[str]]:
    """Return a line for each way that has a seed in common with the best fresh step."""
    lines = []
    for name in WAYS:
        seeds = sorted(verdicts.get(name, {}).keys() & verdicts[best].keys())
        if not seeds or name == best:
            continue
        both = [s for s in seeds if s in verdicts["four"]]
        compared = [(way, s) for way in (name, best) for s in seeds] + [("four", s) for s in both]
        n = min(len(verdicts[way][s]) for way, s in compared)
        first = {(way, s): verdicts[way][s][:n] for way, s in compared}
        own, fresh = (np.concatenate([first[way, s] for s in seeds]) for way in (name, best))
        found = evaluate.compare(own, fresh)
        closed, gap = (
            sum(float(first[way, s].mean() - first[best, s].mean()) for s in both)
            for way in (name, "four")
        )
        lines.append([
            WAYS[name], f"{found.difference:+.4f}", "{:+.4f} to {:+.4f}".format(*found.interval),
            f"{found.p_value:.2g}", f"{closed / gap:.2f}" if gap > 0 else "", f"{n:,}",
        ])  # fmt: skip
    return lines
