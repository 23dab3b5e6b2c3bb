"""Robust accuracy of any net: saved weights or a function of one's own, under any attack.

    python experiments/evaluate.py experiments/results/mnist_mlp/lwa/params.safetensors --eps 1.5
    python experiments/evaluate.py mymodule:apply_fn --weights w.safetensors --data DIR --eps 0.5
    python experiments/evaluate.py --help        # every setting

NET is a file of weights that an experiment of this folder wrote (the net is recognised by their
shapes), or `module:function` for one's own `(params, x) -> logits`, whose params are the arrays of
--weights, nested by the parts of their names between "/" (None without).

A file of weights says which classes its net knows, the size of its images, and how pixels become
its inputs, if `weights.save` was given them, as train.py and the experiments do. Then images
are scaled as it says, labels are matched to its logits by the names of the classes, and what
contradicts it is an error. Otherwise the data's classes are taken to be the net's, in their order.

--attacks names what to run: `standard` is AutoAttack's ensemble, whose members have their own names
too; `check` looks for signs that the figures shouldn't be believed. Images are attacked in blocks;
each block is saved when it is done, and after an interruption the same command resumes. Writes
results.json and results.md to --out, and keeps their rows of other nets, sizes and attacks.

--certify SIGMA adds lower bounds at the same l2 sizes: not for the net that is attacked, but for
the classifier that smoothing by Gaussian noise makes of it, in a line of its own (docs/certify.md).
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
