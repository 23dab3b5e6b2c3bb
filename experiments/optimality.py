"""How close attacks come to the smallest perturbations: ours and those of other libraries.

    python experiments/optimality.py --nets mnist_mlp/lwa --norms l2   # half an hour on 2 CPU cores
    python experiments/optimality.py                                   # a day
    python experiments/optimality.py --libraries jaxadv                # without PyTorch

Every attack perturbs the same test images of the recorded nets, within the pixel range, with 2,000
and with 10,000 forward plus backward passes per image. Its local optimality (AttackBench, Cina et
al., 2025) is 1 if its curve of accuracy against size is the lower envelope of all attacks run here,
and 0 if it finds nothing:

    optimality = 1 - (area - best area) / (clean accuracy * largest size - best area)

where area is that below the curve, up to the largest size of the envelope. How to install the other
libraries is shown in `experiments/compare/minimal.py`. For their attacks, every point at which they
evaluated the net counts; for ours, only the point returned, checked by a plain forward pass.

Writes results.json, results.md, and the sizes for each image to NET-NORM.npz. It does so after each
attack, so the same command resumes, and another one adds nets, budgets and libraries. Every attack
that is added may lower the envelope, so the optimality of the others is computed anew.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
import time
from collections.abc import Mapping, Sequence
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal, cast, get_args

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, from anywhere

import jax
import numpy as np
import tyro
from numpy.typing import NDArray
from rich.console import Console

from experiments.compare import minimal, pytorch
from experiments.lib import evaluation, options, parallel, problems, records, tables
from experiments.lib.cache import locked, replacing
from experiments.lib.options import Checked, Count, OutputFolder, Range, Seed, Several
from experiments.lib.problems import Problem
from experiments.lib.records import RESULTS, OptimalityRow
from jaxadv import attack, evaluate
from jaxadv.types import Norm, PerturbFn

NetName = Literal["mnist_mlp/lwa", "mnist_mlp/lwa_multi", "mnist_lenet/lwa_multi", "cifar10/lwa"]
NETS: tuple[NetName, ...] = get_args(NetName)
Library = Literal["jaxadv", "adversarial-library", "foolbox"]
PACKAGES = {"adversarial-library": "adv-lib", "foolbox": "foolbox"}
ENSEMBLE = "distances"
"""Name of the row for the best of several attacks."""


@dataclasses.dataclass(frozen=True)
class Settings(Checked):
    """Measure how close attacks come to the smallest perturbations."""

    nets: Several[NetName] = NETS
    """Which recorded nets."""
    norms: Several[Literal["l2", "linf"]] = ("l2", "linf")
    """Which norms."""
    budgets: Several[Annotated[int, Range(ge=600)]] = (2000, 10000)
    """Forward plus backward passes per image."""
    libraries: Several[Library] = ("jaxadv", "adversarial-library", "foolbox")
    """Whose attacks."""
    n: Count = 500
    """How many test images."""
    seed: Seed = 0
    """Random seed."""
    image_folder: Path | None = None
    """Read CIFAR-10 from here, DIR/{train,test}/CLASS/*, instead of downloading it."""
    folder: Path = RESULTS
    """Where the records are."""
    out: OutputFolder = Path("runs/optimality")
    """Where results go."""


@cache
def ours(norm: Norm, budget: int) -> Mapping[str, PerturbFn]:
    """Return our attacks, with as many steps as the budget allows."""
    targets = 3
    attacks: dict[str, PerturbFn] = {
        "FMN": partial(attack.fmn, norm=norm, steps=(budget - 45) // 2),
        "FAB": partial(attack.fab, norm=norm, steps=budget // 18 - 1),
        "APGD": partial(attack.apgd, norm=norm, steps=(budget - 184) // 40),
        "APGD-T": partial(
            attack.apgd_multitargeted, norm=norm, n_targets=targets, order="distance",
            steps=(budget - 204) // (40 * targets) - 1,
        ),
    }  # fmt: skip
    if norm == "l2":
        attacks["DDN"] = partial(attack.ddn, steps=(budget - 45) // 2)
    return attacks


def optimality(sizes: NDArray[np.float64], best: NDArray[np.float64]) -> float:
    """Return AttackBench's local optimality of sizes `[n]`, given those of the envelope, `[n]`.

    As its `eval_optimality` (analysis/utils.py, commit cb475a2). NaN for an envelope of no size.
    """
    largest = best.max(where=np.isfinite(best), initial=0)
    if not largest:
        return np.nan  # no image is classified correctly, or none was fooled

    def area(sizes: NDArray[np.float64]) -> float:
        # From 0 on, as in AttackBench when some image is misclassified without perturbation.
        at, counts = np.unique([0, *np.minimum(sizes, largest)], return_counts=True)
        accuracy = 1 - (np.cumsum(counts) - 1) / len(sizes)
        if len(at) > 1 and not np.isfinite(sizes).all():
            accuracy[-1] = accuracy[-2]  # images it fails on stay correct
        return float(np.trapezoid(accuracy, at))

    least, clean = area(best), np.count_nonzero(best) / len(best)
    return 1 - (area(sizes) - least) / (clean * largest - least)


def by_ours(
    name: str, method: PerturbFn | None, problem: Problem, norm: Norm, budget: int, seed: int
) -> dict[str, Any]:
    """Run an attack of ours, or the best of several; return the sizes and passes."""
    found = evaluate.distances(
        problem.apply_fn, problem.params, problem.x, problem.y, norm=norm, budget=budget,
        attacks=None if method is None else {name: method}, key=jax.random.key(seed),
        bounds=problem.bounds,
    )  # fmt: skip
    return {"size": found.size.astype(np.float64), **evaluation.mean_passes(found)}


def by_theirs(
    library: str, name: str, problem: Problem, norm: Norm, budget: int, seed: int
) -> dict[str, Any]:
    """Run an attack of another library; return the sizes and passes."""
    import torch

    torch.manual_seed(seed)
    attacks = minimal.attacks(norm, budget)
    found = minimal.run(
        attacks[library, name], problem.params, problem.x, problem.y, norm, budget, problem.low
    )
    return found._asdict()


def run(settings: Settings, console: Console) -> list[OptimalityRow]:
    """Run the attacks that haven't been run yet; return the rows of all attacks."""
    others = [library for library in settings.libraries if library != "jaxadv"]
    if others:
        pytorch.need("torch", "adv_lib", "foolbox")
    settings.out.mkdir(parents=True, exist_ok=True)
    results = settings.out / "results.json"
    for net in settings.nets:
        problem = problems.recorded(net, settings.n, settings.folder, settings.image_folder)
        of: dict[str, Any] = {
            "n": len(problem.y),
            "seed": settings.seed,
            **{name: problem.identity[name] for name in ("weights", "data")},
        }
        _check_same(results, net, of)
        for norm, budget in itertools.product(settings.norms, settings.budgets):
            jobs: dict[tuple[str, str], Any] = {}
            if "jaxadv" in settings.libraries:
                for name, method in {**ours(norm, budget), ENSEMBLE: None}.items():
                    jobs["jaxadv", name] = partial(by_ours, name, method)
            for library, name in minimal.attacks(norm, budget) if others else ():
                if library in others:
                    jobs[library, name] = partial(by_theirs, library, name)
            for (library, name), job in jobs.items():
                here: dict[str, Any] = {
                    "net": net, "norm": norm, "budget": budget, "attack": name, "library": library
                }  # fmt: skip
                if records.find(records.load(results, OptimalityRow), here):
                    continue
                start = time.perf_counter()
                found = job(problem, norm, budget, settings.seed)
                seconds = time.perf_counter() - start
                package = PACKAGES.get(library)
                row = OptimalityRow(
                    experiment="optimality", **here, **of, pool=[], columns={},
                    passes={way: round(float(found[way]), 1) for way in ("forward", "backward")},
                    seconds=round(seconds, 1),
                    **records.made_by({package: version(package)} if package else {}),
                )  # fmt: skip
                with locked(settings.out):
                    _add(settings.out, row, found["size"])
                console.print(
                    f"{net} {norm}, {library} {name}, {budget}: median "
                    f"{np.median(found['size']):.4f}, {seconds:.0f} s"
                )
    return records.load(results, OptimalityRow)


def _check_same(results: Path, net: str, of: Mapping[str, Any]) -> None:
    """Check that the rows of a net, which share an envelope, are for the same images.

    Raises:
      UsageError: if they aren't.
    """
    for row in records.load(results, OptimalityRow):
        others = [name for name, value in of.items() if getattr(row, name) != value]
        if row.net == net and others:
            raise options.UsageError(
                f"expected the rows of {net} in {results} to have the same "
                f"{', '.join(others)} as this run, since their sizes are compared image by image; "
                "choose another --out"
            )


def _add(folder: Path, row: OptimalityRow, size: NDArray[Any]) -> None:
    """Add an attack's sizes and row, and measure all attacks on its net by the new envelope."""
    path = folder / f"{row.net.replace('/', '-')}-{row.norm}.npz"
    sizes: dict[str, NDArray[Any]] = {}
    if path.exists():
        with np.load(path) as kept:
            sizes = dict(kept)
    sizes[_name(row)] = size.astype(np.float32)
    with replacing(path) as file:
        np.savez_compressed(file, allow_pickle=False, **sizes)
    results = folder / "results.json"
    rows = [*records.load(results, OptimalityRow), row]
    rows.sort(key=lambda row: (NETS.index(cast(NetName, row.net)), row.norm, _name(row)))
    pool = [_name(old) for old in rows if (old.net, old.norm) == (row.net, row.norm)]
    best = np.min([sizes[name] for name in pool], axis=0).astype(np.float64)

    def measured(row: OptimalityRow) -> OptimalityRow:
        own = sizes[_name(row)].astype(np.float64)
        columns = {
            "optimality": round(optimality(own, best), 4),
            "median": round(float(np.median(own)), 4),
        }
        return dataclasses.replace(row, pool=pool, columns=columns)

    is_same = [(old.net, old.norm) == (row.net, row.norm) for old in rows]
    records.save(
        results, [measured(old) if same else old for old, same in zip(rows, is_same, strict=True)]
    )


def _name(row: OptimalityRow) -> str:
    return f"{row.library} {row.attack} {row.budget}"


def as_markdown(rows: Sequence[OptimalityRow]) -> list[str]:
    """Return a table for each norm and budget: optimality and median size by net."""
    lines = ["# Local optimality of minimal-norm attacks", ""]
    for norm, budget in dict.fromkeys((row.norm, row.budget) for row in rows):
        here = [row for row in rows if (row.norm, row.budget) == (norm, budget)]
        nets = list(dict.fromkeys(row.net for row in here))
        headings = ("Attack", "Library", *(f"{net}{of}" for net in nets for of in ("", ", median")))
        cells = []
        for name, library in dict.fromkeys((row.attack, row.library) for row in here):
            line: list[str] = [name, library]
            for net in nets:
                own = [r for r in here if (r.net, r.attack, r.library) == (net, name, library)]
                figures = [row.columns[of] for row in own for of in ("optimality", "median")]
                line += ["none" if figure is None else f"{figure:.4f}" for figure in figures]
                line += [""] * (0 if own else 2)
            cells.append(line)
        lines += [f"## {norm}, {budget:,} passes", "", *tables.markdown(headings, cells), ""]
    images = " or ".join(f"{n:,}" for n in sorted({row.n for row in rows}))
    return [
        *lines,
        f"{images} test images, perturbed within the pixel range. Optimality is 1 for the lower "
        f"envelope of all attacks on this page. {tables.machines(rows)}.",
        "",
    ]


@options.command
def main() -> None:
    """Run from the command line."""
    settings = tyro.cli(Settings, description=__doc__)
    console = parallel.start()
    tables.write(settings.out, as_markdown(run(settings, console)), console)


if __name__ == "__main__":
    main()
