"""Robust accuracy of any net, from saved weights or as your own function, under any attack.

    python experiments/evaluate.py experiments/results/mnist_mlp/lwa/params.safetensors --eps 1.5
    python experiments/evaluate.py mymodule:apply_fn --weights w.safetensors --data DIR --eps 0.5
    python experiments/evaluate.py --help        # every setting

NET is a file of weights that a command of this folder wrote (the net is recognised by their
shapes), or `module:function` for your own `(params, x) -> logits`. The function's params are the
arrays of --weights, nested by the parts of their names between "/" (None without --weights).

A file of weights written by train.py or the experiments also records the net's classes, the size of
its images, and how pixels are scaled to inputs. Images are then scaled in this way, labels are
matched to logits by class name, and anything that contradicts the file is an error. For other files
and functions, the data's classes are taken to be the net's, in the same order.

--attacks names what to run: `standard` is AutoAttack's ensemble, whose members also have names of
their own; `check` looks for signs that the figures can't be trusted, on the first 300 images.
Images are attacked in batches; each is saved once it is finished, and after an interruption the
same command resumes. Writes results.json and results.md to --out, and keeps the rows there of other
nets, sizes and attacks; a net whose weights or function have changed starts anew. Use --name to
distinguish nets whose files are in folders with the same names.

--certify SIGMA adds lower bounds at the same l2 sizes. They hold not for the attacked net itself
but for its smoothing by Gaussian noise, which has its own line in the table (docs/certify.md).
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, from anywhere

import tyro

from experiments.lib import evaluation, options, parallel, tables


@options.command
def main() -> None:
    """Run from the command line."""
    settings = tyro.cli(evaluation.Settings, description=__doc__)
    console = parallel.start()
    tables.write(settings.out, evaluation.as_markdown(evaluation.run(settings, console)), console)


if __name__ == "__main__":
    main()
