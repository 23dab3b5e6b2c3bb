"""Speed of training steps and attacks, next to the machine's limit and to other libraries.

    python experiments/benchmark.py                  # everything, about half an hour on 2 cores
    python experiments/benchmark.py --parts steps    # one part; the others' figures stay

Each part times its calls in turn over several rounds, and quotes medians; a ratio is of times of
the same round and has its quartiles beside it. A part during which other programs loaded the
machine is marked as not valid, and the command ends with an error.

- `steps`: a training step, called by itself (`train.make_step`) and within an epoch on the device
  (`train.make_epoch`), against a floor, about the least that it can take, and against a step
  written by hand in PyTorch. On CPU also over as many simulated devices as there are cores.
- `loops`: the library's loops over a net of plain `flax.linen.Conv`, against a Python loop over a
  jitted step; XLA has a trap there on CPU (see `jaxadv/_cpu`).
- `attacks`: perturbations of 1,000 test images, against the floor and against other libraries.
- `growth`: what batch, classes, steps and input size cost, in time and memory.
- `devices`: a step of one batch over more and more devices; on CPU, simulated ones.
- `starts`: how long compiling takes, and what the cache of compiled programs saves.

The floor is the time of the matrix products that can't be done without. For dense nets each product
is timed by itself, of the same shape, forward or transposed; convolutions are counted at the rate
of 2048x2048 products. A step needs, of each layer, one forward product and one for the gradient of
its weights, and one for the gradient of its input but in the first layer; an adversary one forward
pass, and one back to the image, or K - 1 of them for Adv_Alpha.

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
    """Return the figures of each part as a table."""
    lines = ["# Benchmark", ""]
    for row in rows:
        machine = row.machine
        lines += [
            f"## {row.part}",
            "",
            f"On {row.device}, jax {row.versions['jax']}, {machine['gflops_at_start']:.0f} "
            f"GFLOP/s in 2048x2048 products before and {machine['gflops_at_end']:.0f} after; other "
            f"programs had {machine['cpu_of_others']:.1%} of the cores' time. Medians of "
            f"{row.settings['rounds']} rounds, a third of it where calls take long; in brackets "
            "quartiles.",
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
    """Measure the parts that are asked for; return the rows of these and of earlier runs."""
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
            f"not valid, since the machine wasn't quiet: {', '.join(invalid)}; end what else runs, "
            f"and measure again with --parts {' '.join(invalid)}"
        )


if __name__ == "__main__":
    main()
