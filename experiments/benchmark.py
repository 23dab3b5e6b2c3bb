"""Speed of training steps and attacks, relative to the machine's limit and to other libraries.

    python experiments/benchmark.py                  # everything, about half an hour on 2 cores
    python experiments/benchmark.py --parts steps    # one part; the other parts' figures are kept

Each part times its calls in turn over several rounds and reports medians. Ratios are taken within
each round and come with their quartiles. If other programs loaded the machine during a part, the
part is marked as not valid and the command ends with an error.

- `steps`: a training step, called by itself (`train.make_step`) and within an epoch on the device
  (`train.make_epoch`), compared with a floor (roughly the least time it can take) and with a
  hand-written step in PyTorch. On CPU also on as many simulated devices as there are cores.
- `loops`: the library's loops over a net of plain `flax.linen.Conv`, compared with a Python loop
  over a jitted step; XLA is slow at such loops on CPU (see `jaxadv/_cpu`).
- `attacks`: perturbations of 1,000 test images, compared with the floor and other libraries.
- `growth`: time and memory as batch, classes, steps and input size grow.
- `devices`: a training step on one batch spread over more and more devices, simulated on CPU.
- `starts`: how long compilation takes, and how much of it the compilation cache saves.

The floor is the time of the matrix products that are unavoidable. For dense nets each product is
timed by itself, at its own shape, forward or transposed; convolutions are converted at the rate of
2048x2048 products. A step needs, for each layer, one forward product, one for the gradient of its
weights and, except in the first layer, one for the gradient of its input. An adversary needs one
forward pass, and one backward pass to the image, or K - 1 of them for Adv_Alpha.

Other libraries are timed where they are installed (`pip install -e ".[bench]"`). Writes
results.json, results.md and figures to --out.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, from anywhere

import tyro
from rich.console import Console

from experiments.benchmarks import attacks, devices, growth, loops, starts, steps
from experiments.benchmarks.common import PARTS, Figures, Part, Settings
from experiments.compare import libraries
from experiments.lib import figures, options, records, tables, timing
from experiments.lib.records import BenchmarkRow

RUN: Mapping[Part, Callable[[Settings], Figures]] = {
    "steps": steps.run,
    "loops": loops.run,
    "attacks": attacks.run,
    "growth": growth.run,
    "devices": devices.run,
    "starts": starts.run,
}


def as_markdown(rows: Iterable[BenchmarkRow]) -> str:
    """Return a table of figures for each part."""
    lines = ["# Benchmark", ""]
    for row in rows:
        machine = row.machine
        lines += [
            f"## {row.part}",
            "",
            f"On {tables.machines([row])}, {machine['gflops_at_start']:.0f} "
            f"GFLOP/s in 2048x2048 products before and {machine['gflops_at_end']:.0f} after; other "
            f"programs used {machine['cpu_of_others']:.1%} of the cores' time. Medians of "
            f"{row.settings['rounds']} rounds (a third as many for slow calls), with quartiles in "
            "parentheses.",
            "",
            *(f"Not valid: {reason}.\n" for reason in machine["reasons"]),
        ]
        headings = list(dict.fromkeys(itertools.chain.from_iterable(row.figures)))
        cells = [[_cell(figure.get(name, "")) for name in headings] for figure in row.figures]
        lines += [*tables.markdown(headings, cells), ""]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if isinstance(value, list):
        low, median, high = value
        return f"{median:.2f} ({low:.2f} to {high:.2f})"
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)


def run(settings: Settings, console: Console) -> list[BenchmarkRow]:
    """Measure the chosen parts; return the rows of this and of earlier runs."""
    results = settings.out / "results.json"
    settings.out.mkdir(parents=True, exist_ok=True)
    rows = records.load(results, BenchmarkRow)
    for part in settings.parts:
        quiet = timing.Quiet()
        start = time.perf_counter()
        row = BenchmarkRow(
            experiment="benchmark",
            part=part,
            figures=RUN[part](settings),
            machine=quiet.report(),
            settings=settings.without("out", "parts"),
            **records.made_by(libraries.versions()),
        )
        rows = [*(row for row in rows if row.part != part), row]
        rows.sort(key=lambda row: PARTS.index(row.part))
        records.save(results, rows)
        (settings.out / "results.md").write_text(as_markdown(rows))
        console.print(f"{part}: {time.perf_counter() - start:.0f} s")
        for reason in row.machine["reasons"]:
            console.print(f"  not valid: {reason}")
    figures.draw(settings.out)
    console.print(f"Results and figures are in {settings.out}.")
    return rows


@options.command
def main() -> None:
    """Run the benchmark from the command line."""
    settings = tyro.cli(Settings, description=__doc__)
    rows = run(settings, Console())
    invalid = [row.part for row in rows if not row.machine["valid"]]
    if set(invalid) & set(settings.parts):
        sys.exit(
            f"not valid, since the machine wasn't quiet: {', '.join(invalid)}; stop other programs "
            f"and measure again with --parts {' '.join(invalid)}"
        )


if __name__ == "__main__":
    main()
