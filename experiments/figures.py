"""Every figure of the results, drawn from nothing but their JSON files.

    python experiments/figures.py                   # the records in experiments/results
    python experiments/figures.py runs/mnist_mlp    # one run

Figures are written next to the JSON files. For a record within another one, name its folder.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, from anywhere

import tyro

from experiments.lib import figures, options
from experiments.lib.records import RESULTS


@options.command
def main() -> None:
    """Draw the figures of the folders named on the command line, or of the records."""
    folders = tyro.cli(tuple[Path, ...], default=(), description=__doc__)
    for folder in folders or sorted(path.parent for path in RESULTS.glob("*/results.json")):
        for path in figures.draw(folder):
            print(path)


if __name__ == "__main__":
    main()
