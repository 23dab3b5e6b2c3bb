"""Run named attacks on a net, save their results as rows, and make tables of them.

`Settings.certify` adds certified accuracies of the smoothed net. `curve` finds the smallest
perturbations, and from them the accuracy at every size.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh
from rich.console import Console
from rich.progress import Progress

from experiments.lib import attacks, cache, options, parallel, problems, records, tables, training
from experiments.lib.attacks import LABELS, AttackName
from experiments.lib.options import Count, OutputFolder, Positive, Seed, Several, Size
from experiments.lib.problems import Problem
from experiments.lib.records import AttackRow, CheckRow, CurveRow, RobustRow, SmoothedRow
from jaxadv import certify, evaluate
from jaxadv.types import Norm, PerturbFn

_IMAGES = ("data", "subtract", "divide", "crop", "box")
"""The fields that say which images a net gets, but for their number."""
_PROBLEM = (*_IMAGES, "n", "norm", "eps")
"""The fields that determine which table a row belongs to."""
PLACE = ("method", "attack", "seed", *_PROBLEM)
"""The fields that tell rows apart."""
Name = AttackName | Literal["certify"]
"""What to run: an attack, or certification of the smoothed classifier."""
CERTIFY: dict[str, Any] = {"alpha": 0.001, "n0": 100, "stages": [*certify.STAGES]}
"""How smoothed classifiers are certified."""
_SMOOTHED = ", smoothed by noise "
"""What stands between a net's name and its noise where the net is smoothed."""
_POINTS = 200
"""Number of sizes at which a curve is recorded."""


@dataclasses.dataclass(frozen=True)
class Settings(problems.Settings, parallel.Devices):
    """Attack a net, and report its robust accuracy."""

    attacks: Several[AttackName] = ("one-step", "pgd-100x10", "standard")
    """Attacks to run."""
    eps: Several[Size] = (1.5,)
    """Sizes of the perturbations."""
    norm: Norm = "l2"
    """Norm of the perturbations."""
    certify: Positive | None = None
    """Also certify these sizes: not for the net, but for its smoothing by Gaussian noise of this
    standard deviation. Takes up to 100,000 forward passes per image."""
    seed: Seed = 0
    """Random seed of the attacks."""
    batch_size: Count = 500
    """Images perturbed at once; each batch is saved when finished."""
    out: OutputFolder = Path("runs/evaluate")
    """Where results go."""


def run(settings: Settings, console: Console) -> list[AttackRow]:
    """Run the chosen attacks; return the rows of this and of earlier runs.

    Rows of the same name with other weights, or of another function, are removed.

    Raises:
      ValueError: as `problems.load`.
      UsageError: if the devices don't divide the images evenly, or the sizes can't be certified.
    """
    problem = problems.load(settings)
    mesh = parallel.mesh(settings, len(problem.y))
    names: list[Name] = [*settings.attacks]
    if settings.certify is not None:
        names.append("certify")
        nothing = problem._replace(x=problem.x[:0], y=problem.y[:0])
        _certified(settings, nothing, settings.certify)  # raise its errors before any attack
    settings.out.mkdir(parents=True, exist_ok=True)
    results = settings.out / "results.json"
    with training.bars(console) as progress:
        for name, eps in itertools.product(names, settings.eps):
            identity = {
                **problem.identity,
                "attack": name,
                "eps": eps,
                "norm": settings.norm,
                "seed": settings.seed,
                **records.made_by(),
            }
            if name == "certify":
                identity |= {
                    "method": f"{identity['method']}{_SMOOTHED}{settings.certify:g}",
                    "sigma": settings.certify,
                    "radii": list(settings.eps),
                    **CERTIFY,
                }
            make = partial(_row, settings, problem, name, eps, identity, mesh, progress)
            records.find_or_run(results, AttackRow, identity, make, place=PLACE)
    with cache.locked(settings.out):
        rows = records.load(results, AttackRow)
        current = [row for row in rows if not _of_another_net(row, problem.identity)]
        if len(current) < len(rows) and parallel.first_process():
            records.save(results, current)
            console.print(
                f"Removed {len(rows) - len(current)} rows of {problem.identity['method']} with "
                f"other weights, or of another function, from {results}."
            )
    return current


def _of_another_net(row: AttackRow, identity: Mapping[str, Any]) -> bool:
    """Return whether a row has the name of a net, smoothed or not, but is of another one."""
    if row.method.partition(_SMOOTHED)[0] != identity["method"]:
        return False
    first = all(getattr(row, field) == identity[field] for field in _IMAGES)
    first &= min(row.n, problems.ANSWERED) == min(identity["n"], problems.ANSWERED)
    other_function = first and row.answers != identity.get("answers")
    return row.weights != identity["weights"] or other_function


def _row(
    settings: Settings,
    problem: Problem,
    name: Name,
    eps: float,
    identity: dict[str, Any],
    mesh: Mesh | None,
    progress: Progress,
) -> AttackRow:
    if name == "check":
        return _check(settings, problem, eps, identity)
    if name == "certify":
        return _certify(settings, problem, eps, identity, progress)
    found = attack(
        problem, attacks.methods(name, settings.norm), eps=eps, norm=settings.norm,
        key=jax.random.key(settings.seed), batch_size=settings.batch_size,
        store=store_of(settings.out, identity), mesh=mesh, progress=progress,
        title=f"{identity['method']}: {name}, {eps:g}",
    )  # fmt: skip
    outcome = found.outcome
    return RobustRow(
        **identity,
        **figures(outcome),
        standing=np.packbits(outcome.robust).tobytes().hex(),
        stages=_stages(found),
        counts={
            "nonfinite": int(outcome.nonfinite.sum()),
            "invalid": int(outcome.invalid.sum()),
            "max_norm": float(outcome.norm.max()),
        },
        seconds=round(sum(stage.seconds for stage in found.stages.values()), 1),
        settings={"batch_size": settings.batch_size},
    )


def attack(
    problem: Problem,
    parts: Mapping[str, PerturbFn],
    *,
    eps: float,
    norm: Norm,
    key: jax.Array,
    batch_size: int,
    store: Path,
    mesh: Mesh | None,
    progress: Progress,
    title: str,
) -> evaluate.Result:
    """Attack images by each part in turn; each part attacks the images that are still robust.

    Args:
      problem: the net and the images.
      parts: the attack's parts, by name.
      eps: size of the perturbations.
      norm: norm of that size.
      key: random key.
      batch_size: images perturbed at once.
      store: folder in which to keep finished batches.
      mesh: the devices that the images are spread over; None for one.
      progress: where to show a bar.
      title: title of the bar.
    """
    n = len(problem.y)
    bar = progress.add_task(title, total=n, note="")

    def show(at: evaluate.Progress) -> None:
        note = f"{at.attack} fooled {at.fooled}"
        progress.update(bar, completed=at.done, total=at.of, note=note)

    x, y = parallel.spread(mesh, (problem.x, problem.y))
    found = evaluate.attack_and_score(
        problem.apply_fn, parallel.replicate(mesh, problem.params), x, y, parts, eps=eps, norm=norm,
        key=key, bounds=problem.bounds, batch_size=batch_size, store=store, progress=show,
    )  # fmt: skip
    note = f"robust {evaluate.accuracy(found.outcome.robust):.4f}"
    progress.update(bar, completed=n, total=n, note=note)
    return found


def figures(outcome: evaluate.Outcome) -> dict[str, Any]:
    """Return both accuracies, and the confidence interval of the robust one, for a row."""
    return {
        "columns": {
            "clean": evaluate.accuracy(outcome.clean),
            "robust": evaluate.accuracy(outcome.robust),
        },
        "interval": list(evaluate.interval(outcome.robust)),
    }


def _stages(found: evaluate.Result) -> dict[str, dict[str, float]]:
    """Return for each part how many images it tried and how many it fooled.

    Also the robust accuracy up to and including it, its seconds, and the forward plus backward
    passes executed, averaged over all images (0 for a part that doesn't count them).
    """
    standing, stages = found.outcome.clean.copy(), {}
    for name, stage in found.stages.items():
        standing &= ~stage.fooled
        stages[name] = {
            "tried": int(stage.tried.sum()),
            "fooled": int(stage.fooled.sum()),
            "robust": float(standing.mean()),
            "seconds": round(stage.seconds, 1),
            "passes": round(sum(stage.executed or (0,)) / len(standing), 1),
        }
    return stages


def _check(settings: Settings, problem: Problem, eps: float, identity: dict[str, Any]) -> CheckRow:
    """Look for signs that the figures can't be trusted."""
    n = min(300, len(problem.y))  # enough for the differences that it looks for
    found = evaluate.check(
        problem.apply_fn, problem.params, problem.x[:n], problem.y[:n], eps=eps,
        norm=settings.norm, key=jax.random.key(settings.seed), bounds=problem.bounds,
        batch_size=settings.batch_size,
    )  # fmt: skip
    return CheckRow(
        **identity,
        flags=tables.messages(found.flags),
        columns=dict(found.figures),
        settings={"n": n},
    )


def _certify(
    settings: Settings, problem: Problem, eps: float, identity: dict[str, Any], progress: Progress
) -> SmoothedRow:
    """Certify one size, with draws that are stored and shared by all sizes."""
    n = len(problem.y)
    bar = progress.add_task(f"{identity['method']}: certify, {eps:g}", total=n, note="")
    found = _certified(
        settings, problem, identity["sigma"],
        store=store_of(settings.out, {**identity, "eps": None}),
        progress=lambda at: progress.update(bar, completed=at.done, total=at.of, note=at.attack),
    )  # fmt: skip
    right = found.prediction == problem.y
    certified = right & (found.radius >= eps)
    progress.update(bar, completed=n, total=n, note=f"certified {certified.mean():.4f}")
    return SmoothedRow(
        **identity,
        columns={"clean": evaluate.accuracy(right), "certified": evaluate.accuracy(certified)},
        interval=list(evaluate.interval(certified)),
        abstained=int(found.abstained.sum()),
        samples=int(found.samples.sum()),
    )


def _certified(
    settings: Settings, problem: Problem, sigma: float, **others: Any
) -> certify.Certificate:
    devices = parallel.mesh(settings, len(problem.y))
    x, y = parallel.spread(devices, (problem.x, problem.y))
    params = parallel.replicate(devices, problem.params)
    try:
        return certify.certify(
            problem.apply_fn, params, x, y, sigma=sigma, radii=settings.eps,
            norm=settings.norm, key=jax.random.key(settings.seed), batch_size=settings.batch_size,
            **CERTIFY, **others,
        )  # fmt: skip
    except ValueError as error:
        raise options.UsageError(f"--certify: {error}") from error


def curve(
    problem: Problem,
    *,
    eps: Sequence[float],
    norm: Norm,
    attacks: Mapping[str, dict[str, float]],
    budget: int,
    seed: int,
    batch_size: int,
    out: Path,
    progress: Progress,
) -> tuple[evaluate.Distances, CurveRow]:
    """Find the smallest perturbation of each image.

    Args:
      problem: the net and the images.
      eps: sizes at which to record the exact accuracy.
      norm: norm of the sizes.
      attacks: robust accuracies by attack and size, to compare the curve with.
      budget: forward plus backward passes per image.
      seed: random seed.
      batch_size: images perturbed at once.
      out: folder of the results, in which to keep finished batches.
      progress: where to show a bar.
    """
    identity = {
        **problem.identity, "experiment": "curve", "norm": norm, "seed": seed, "budget": budget,
        **records.made_by(),
    }  # fmt: skip
    fields = {field.name for field in dataclasses.fields(CurveRow)}
    n = len(problem.y)
    bar = progress.add_task(f"{identity['method']}: smallest perturbations", total=n, note="")
    start = time.perf_counter()
    found = evaluate.distances(
        problem.apply_fn, problem.params, problem.x, problem.y, norm=norm, budget=budget,
        key=jax.random.key(seed), bounds=problem.bounds, batch_size=batch_size,
        store=store_of(out, identity),
        progress=lambda at: progress.update(bar, completed=at.done, total=at.of, note=at.attack),
    )  # fmt: skip
    seconds = time.perf_counter() - start
    finite = found.size[np.isfinite(found.size)]
    at = np.linspace(0, finite.max(initial=0), _POINTS)
    row = CurveRow(
        **{name: value for name, value in identity.items() if name in fields},
        median=found.median if np.isfinite(found.median) else None,
        curve={"eps": at.tolist(), "accuracy": found.accuracy(at).tolist()},
        accuracy={f"{size:g}": float(found.accuracy(size)) for size in eps},
        attacks={name: dict(robust) for name, robust in attacks.items()},
        by={name: int(np.sum(found.attack == name)) for name in found.passes},
        passes=mean_passes(found),
        seconds=round(seconds, 1),
    )
    return found, row


def mean_passes(found: evaluate.Distances) -> dict[str, float]:
    """Return the mean number of passes per image, over all attacks together."""
    forward, backward = (sum(of_all) for of_all in zip(*found.passes.values(), strict=True))
    return {"forward": float(np.mean(forward)), "backward": float(np.mean(backward))}


def store_of(out: Path, identity: dict[str, Any]) -> Path:
    """Return the folder for the finished batches of a row with these entries."""
    text = json.dumps(identity, sort_keys=True)
    return out / "batches" / hashlib.sha256(text.encode()).hexdigest()[:16]


def as_markdown(rows: Sequence[AttackRow]) -> list[str]:
    """Return, for each problem, a table of nets and attacks, and remarks on them.

    A smoothed classifier has its own line, without attacks: those are run on the net itself.
    """
    lines: list[str] = []

    def place(row: AttackRow) -> tuple[Any, ...]:
        return tuple(getattr(row, field) for field in _PROBLEM)

    for key in dict.fromkeys(map(place, rows)):
        here = [row for row in rows if place(row) == key]
        source, subtract, divide, crop, box, n, norm, eps = key
        attacked = [row for row in here if isinstance(row, RobustRow | SmoothedRow)]
        shown = [name for name in LABELS if any(row.attack == name for row in attacked)]
        cells = []
        for method in dict.fromkeys(row.method for row in attacked):
            own = [row for row in attacked if row.method == method]
            of_attacks = [_cell([row for row in own if row.attack == name]) for name in shown]
            cells.append([method, f"{own[0].columns['clean']:.4f}", *of_attacks])
        lines += [
            f"# {source}: {norm} size {eps:g}, {n:,} images",
            "",
            *tables.markdown(["Net", "Clean", *(LABELS[name] for name in shown)], cells),
            "",
            f"Inputs are (pixels - {subtract:g}) / {divide:g}"
            + (f", of the middle {crop}x{crop}. " if crop else ". ")
            + ("Perturbed images stay in" if box else "Perturbed images may leave")
            + f" the range of pixels, 0 to {divide:g}.",
            "",
        ]
        remarks = [(row.method, remark) for row in here for remark in _remarks(row)]
        for method, remark in dict.fromkeys(remarks):
            lines += [f"- {method}: {remark}.", ""]
    return lines


def _remarks(row: AttackRow) -> list[str]:
    """Return the remarks to print below a row's figures."""
    remarks = list(row.notes or ())
    if isinstance(row, CheckRow):
        remarks.append(tables.doubts(row.flags))
    if isinstance(row, SmoothedRow):
        remarks.append(
            "this isn't the attacked net but another classifier: the net's most frequent "
            f"prediction under Gaussian noise of standard deviation {row.sigma:g}. Certified is a "
            "lower bound on its robust accuracy; each image's certificate is wrong with "
            f"probability at most {row.alpha:g}. {row.abstained:,} of {row.n:,} images have none; "
            f"{row.samples / row.n:,.0f} draws per image"
        )
    if isinstance(row, RobustRow):
        if row.passes:
            remarks.append(
                f"{LABELS[row.attack]} took {row.passes:,.0f} passes per image, and "
                f"{row.seconds:,.0f} s in all"
            )
        for count, what in (
            ("invalid", "labels aren't among the net's classes, and count as wrong"),
            ("nonfinite", "images have inputs, logits or perturbations that aren't finite"),
        ):
            if n := row.counts.get(count):
                remarks.append(f"{n:,} of {row.n:,} {what}")
    return remarks


def _cell(rows: Sequence[RobustRow | SmoothedRow]) -> str:
    column = "certified" if any(isinstance(row, SmoothedRow) for row in rows) else "robust"
    if len(rows) != 1:
        return tables.mean_and_spread(rows, column)
    low, high = rows[0].interval
    return f"{rows[0].columns[column]:.4f} [{low:.3f}, {high:.3f}]"
