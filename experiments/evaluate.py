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

--attacks names what to run: `standard` is AutoAttack's ensemble, whose members have names of their
own too; `check` looks for signs that the figures shouldn't be believed. The images go through in
blocks; each is saved when it is done, and the same command goes on where it was interrupted. Writes
results.json and results.md to --out, beside what is there of other nets, sizes and attacks.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import itertools
import json
import sys
import time
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, from anywhere

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from numpy.typing import NDArray
from rich.console import Console

from experiments.lib import data, models, options, parallel, records, training, weights
from experiments.lib.options import (
    Count,
    Distinct,
    OutputFolder,
    Positive,
    Range,
    Seed,
    Several,
    Size,
)
from jaxadv import attack, evaluate, perturb
from jaxadv.types import ApplyFn, Bounds, Norm, Params, PerturbFn

Attack = Literal[
    "one-step", "alpha", "deepfool", "fmn", "pgd", "pgd-100x10", "apgd-ce", "apgd-t", "fab-t",
    "square", "standard",
]  # fmt: skip
AttackName = Attack | Literal["check"]

LABELS = {
    "clean": "Clean",
    "one-step": "One step",
    "alpha": "Adv_Alpha",
    "deepfool": "DeepFool",
    "fmn": "FMN",
    "fab-t": "FAB-T",
    "square": "Square",
    "apgd-ce": "APGD-CE",
    "apgd-t": "APGD-T",
    "pgd": "PGD-100",
    "pgd-100x10": "PGD-100x10",
    "standard": "AutoAttack",
}

_USUAL: dict[str, tuple[Any, ...]] = {"mnist": (0, 256), "cifar10": (117, 256, 28)}
"""How pixels are scaled where no weights say: subtract, divide, crop."""
_PROBLEM = ("data", "subtract", "divide", "crop", "box", "n", "norm", "eps")
"""What of a row says which table it belongs to."""
_FIELDS = ("method", "attack", "seed", "columns", *(name for name in _PROBLEM if name != "crop"))
"""What every row has; a crop may be none."""


@dataclasses.dataclass(frozen=True)
class Settings(parallel.Devices):
    """Attack a net and report its robust accuracy."""

    net: Annotated[str, tyro.conf.Positional]
    """A file of weights, or `module:function`."""
    name: str = ""
    """What to call the net in the table; by default the function, and the weights' place."""
    weights: Path | None = None
    """Parameters for a function of one's own."""
    data: str = "mnist"
    """`mnist`, `cifar10`, `tfds:NAME`, or a folder with {train,test}/CLASS/*.png or jpg; test is
    evaluated."""
    subtract: Annotated[float, Range()] | None = None
    """Inputs are (pixels - subtract) / divide. By default as the weights say; if they don't, 0 and
    256 for mnist, 117 and 256 for cifar10, 0 and 255 for others."""
    divide: Positive | None = None
    """See subtract. The box is where pixels from 0 to this end up."""
    crop: Count | None = None
    """Side of the part of the images' middle that is used. By default as the weights say; if they
    don't, 28 for cifar10, else all."""
    classes: Annotated[tuple[str, ...], Distinct()] = ()
    """What the data calls the net's classes, in the order of its logits. By default what the
    weights call them; if they don't say, the data's classes in their order."""
    attacks: Several[AttackName] = ("one-step", "pgd-100x10", "standard")
    """What to run."""
    eps: Several[Size] = (1.5,)
    """Sizes of the perturbations."""
    norm: Norm = "l2"
    """Of these sizes."""
    box: bool = True
    """Whether perturbed images stay in the range of pixels."""
    n: Count = 1000
    """How many test images."""
    seed: Seed = 0
    """Of the attacks' random numbers."""
    block: Count = 500
    """Images between two savings."""
    batch_size: Count = 500
    """Images perturbed at once."""
    out: OutputFolder = Path("runs/evaluate")
    """Where results go."""

    def __post_init__(self) -> None:
        """Check what goes together.

        Raises:
          UsageError: if there are weights beside a file of weights, or as `methods`.
        """
        super().__post_init__()
        if self.weights is not None and ":" not in self.net:
            raise options.UsageError(
                f"expected --weights with a net as module:function only, got {self.weights} beside "
                f"{self.net}, whose weights are its own; leave one of them out"
            )
        for name in self.attacks:
            if name != "check":
                methods(name, self.norm)


class Problem(NamedTuple):
    """What is evaluated."""

    apply_fn: ApplyFn
    params: Params
    x: np.ndarray
    y: np.ndarray
    bounds: Bounds | None
    identity: dict[str, Any]  # all that the figures depend on but attack, size and seed


@cache
def methods(name: Attack, norm: Norm) -> Mapping[str, PerturbFn]:
    """Return an attack's parts by name; the same objects each time.

    Raises:
      UsageError: if the attack isn't made for the norm.
    """
    standard = attack.standard(norm)
    if name == "standard":
        return standard
    if name in standard:
        return {name: standard[name]}
    if name == "square":
        raise options.UsageError(
            "expected --norm l2 or linf for the attack square, got l1; leave it out of --attacks"
        )
    if name == "pgd-100x10":  # each start works on the examples that those before it left
        at_random = partial(attack.pgd, norm=norm, random_start=True)
        starts = {f"start {number}": at_random for number in range(2, 11)}
        return {"start 1": partial(attack.pgd, norm=norm), **starts}  # at x
    known: dict[str, PerturbFn] = {
        "one-step": partial(perturb.loss, norm=norm),
        "alpha": partial(perturb.alpha, norm=norm),
        "deepfool": partial(attack.deepfool, norm=norm),
        "fmn": partial(attack.fmn, norm=norm, steps=1000),
        "pgd": partial(attack.pgd, norm=norm),
    }
    return {name: known[name]}


def load_net(settings: Settings, x: NDArray[np.float32]) -> tuple[ApplyFn, Params, str, int]:
    """Return the net, its parameters, what it is, and its number of classes.

    Args:
      settings: what names it.
      x: an input, `[1, H, W, C]`.

    Raises:
      FileNotFoundError: if a file of weights isn't there.
      ValueError: if the module or its function isn't there, or if the weights aren't those of a net
        of this folder, or of the function, for such inputs.
    """
    if ":" not in settings.net:
        params = weights.load(Path(settings.net), jnp.float32)
        try:
            net = models.recognised(params, x.shape[1:])
        except ValueError as error:
            raise options.UsageError(f"in {settings.net}: {error}") from error
        return models.function(net), params, models.describe(net), net.classes
    module_name, function_name = settings.net.split(":", 1)
    sys.path.insert(0, str(Path.cwd()))
    try:
        apply_fn = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError) as error:
        raise options.UsageError(
            f"expected a function {function_name} in a module {module_name}, got: {error}; "
            "name it module:function, from the folder that the module is in"
        ) from error
    params = None if settings.weights is None else weights.load(settings.weights)
    return apply_fn, params, settings.net, _classes_of(settings, apply_fn, params, x)


def _classes_of(
    settings: Settings, apply_fn: ApplyFn, params: Params, x: NDArray[np.float32]
) -> int:
    """Return how many classes a function of one's own tells apart; an error if it can't be run."""
    asked = f"expected {settings.net} to give logits [1, K] of an input {list(x.shape)}"
    try:
        logits = jax.eval_shape(apply_fn, params, jax.ShapeDtypeStruct(x.shape, x.dtype))
    except Exception as error:  # of any kind: it is the caller's function
        arrays = [f"{name} {list(leaf.shape)}" for name, leaf in models.by_path(params).items()]
        given = f"{', '.join(arrays)} of {settings.weights}" if arrays else "no parameters"
        raise options.UsageError(
            f"{asked} and {given}, got {type(error).__name__}: {error}; give the weights of this "
            "net by --weights, and images like those that it was trained on"
        ) from error
    if getattr(logits, "ndim", None) != 2 or logits.shape[0] != 1:
        got = getattr(logits, "shape", type(logits).__name__)
        raise options.UsageError(
            f"{asked}, got {got}; return the logits of each image, nothing else"
        )
    return int(logits.shape[1])


def load(settings: Settings) -> Problem:
    """Return the net and the images.

    Raises:
      FileNotFoundError: as `load_net`.
      UsageError: as `load_net`; if the crop is larger than the images; if inputs would overflow, or
        leave the box; if the net's classes aren't the data's, or an option or the images contradict
        what the weights say.
    """
    path = settings.weights if ":" in settings.net else Path(settings.net)
    said = None if path is None else weights.interface(path)
    images = data.named(settings.data)
    taken = _interface(settings, said, images)
    greatest = images.test_images.max() if settings.box else None
    _check_scale(taken.subtract, taken.divide, greatest)
    chosen = order(settings.data, len(images.test_labels))[: settings.n]
    top, left = (
        (whole - part) // 2
        for whole, part in zip(images.test_images.shape[1:3], taken.shape[:2], strict=True)
    )
    bottom, right = top + taken.shape[0], left + taken.shape[1]
    x = np.asarray(images.test_images[chosen][:, top:bottom, left:right], np.float32)
    x = (x - np.float32(taken.subtract)) / np.float32(taken.divide)
    apply_fn, params, network, n_classes = load_net(settings, x[:1])
    if len(taken.classes) != n_classes:
        of = "--classes" if settings.classes else "the data" if said is None else "its weights"
        raise options.UsageError(
            f"expected {n_classes} classes, as the net has logits, got {len(taken.classes)} of "
            f"{of} ({_listed(taken.classes)}); choose data like what the net was trained on, or "
            "give the data's name for each of its classes by --classes, in the order of its logits"
        )
    number = {i: taken.classes.index(name) for i, name in enumerate(images.classes)}
    y = np.array([number.get(label, -1) for label in images.test_labels[chosen].tolist()], np.int32)
    low = -taken.subtract / taken.divide
    bounds = (low, (taken.divide - taken.subtract) / taken.divide) if settings.box else None
    folder = settings.data not in _USUAL and not settings.data.startswith("tfds:")
    identity = {
        "experiment": "evaluate",
        "method": settings.name or _short_name(settings),
        "network": network,
        "weights": digest(params),
        "data": data.describe(settings.data, images) if folder else settings.data,
        "subtract": taken.subtract,
        "divide": taken.divide,
        "crop": taken.crop,
        "box": settings.box,
        "n": len(chosen),
    }
    if said is not None or settings.classes:
        identity["classes"] = list(taken.classes)
        identity["notes"] = _notes(taken, said, images)
    if ":" in settings.net:  # what a function does, no weights tell
        identity["answers"] = digest(apply_fn(params, jnp.asarray(x[:8])))
    return Problem(apply_fn, params, x, y, bounds, identity)


def _interface(
    settings: Settings, said: data.Interface | None, images: data.Dataset
) -> data.Interface:
    """Return how pixels become inputs, and the data's name for each logit's class.

    Args:
      settings: the options.
      said: what the weights say; None if nothing.
      images: the data.

    Raises:
      UsageError: if an option or the data contradicts what the weights say; if a class of the data
        is none of the net's; or if the crop is larger than the images.
    """
    height, width, channels = images.test_images.shape[1:]
    usual = data.Interface(images.classes, (), *_USUAL.get(settings.data, (0, 255)))
    scale = {name: getattr(settings, name) for name in ("subtract", "divide", "crop")}
    given = {name: value for name, value in scale.items() if value is not None}
    taken = (said or usual)._replace(**given)
    if taken.crop and taken.crop > min(height, width):
        raise options.UsageError(
            f"expected --crop to be at most {min(height, width)}, got {taken.crop}; images are "
            f"{height}x{width}; choose larger ones, or a smaller --crop"
        )
    if settings.classes:
        taken = taken._replace(classes=tuple(map(data.composed, settings.classes)))
    taken = taken._replace(shape=(taken.crop or height, taken.crop or width, channels))

    wrong = []
    if said is not None:
        other = {name: value for name, value in given.items() if value != getattr(said, name)}
        if taken.shape == said.shape:  # a crop of the whole is none
            other.pop("crop", None)
        if other:
            wrong.append(
                f"expected images scaled as the weights say, (pixels - {said.subtract:g}) / "
                f"{said.divide:g}"
                + (f" of the middle {said.crop}x{said.crop}" if said.crop else "")
                + f", got {' '.join(f'--{name} {value:g}' for name, value in other.items())}; "
                "leave these options out"
            )
        taken = taken._replace(crop=said.crop)
        if taken.shape != said.shape:
            wrong.append(
                f"expected images of {_by(said.shape)}, as the weights say, got "
                f"{_by(taken.shape)}; choose others, or resize or convert them"
            )
    unknown = [name for name in images.classes if name not in taken.classes]
    if unknown or len(set(taken.classes)) < len(taken.classes):
        wrong.append(
            f"expected the {len(images.classes)} classes of the data ({_listed(images.classes)}) "
            f"among the {len(taken.classes)} of the net ({_listed(taken.classes)}), once each; "
            "choose other data, or, if they are the same by other names, give the data's name for "
            "each class of the net by --classes, in the order of its logits"
        )
    if wrong:
        raise options.UsageError("\n".join(wrong))
    return taken


def _notes(taken: data.Interface, said: data.Interface | None, images: data.Dataset) -> list[str]:
    """Return what a reader of the figures must know of the classes."""
    notes = []
    if said is not None and said.classes != taken.classes:
        notes.append(
            f"the classes that its weights call {_listed(said.classes)} were taken for the data's "
            f"{_listed(taken.classes)}"
        )
    if absent := [name for name in taken.classes if name not in images.classes]:
        notes.append(f"the data has no images of its classes {_listed(absent)}")
    return notes


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def _by(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def _check_scale(subtract: float, divide: float, greatest: int | None) -> None:
    """Refuse inputs that overflow; and a box that the greatest pixel, if it is given, is out of."""
    if max(abs(pixel - subtract) for pixel in (0, 255)) / divide > float(np.finfo(np.float32).max):
        raise options.UsageError(
            f"expected --subtract and --divide to give inputs within float32's range, got "
            f"{subtract:g} and {divide:g}; choose a larger --divide"
        )
    if greatest is not None and greatest > divide:
        raise options.UsageError(
            f"expected --divide to be at least {greatest}, the greatest pixel, got {divide:g}; "
            "choose a larger one, or --no-box"
        )


def _short_name(settings: Settings) -> str:
    """Return what a net is called: its function, and where its weights lie."""

    def place(path: Path) -> str:
        *_, group, folder, name = "", *path.resolve().with_suffix("").parts
        return f"{group}/{folder}" + ("" if name == "params" else f"/{name}")

    if ":" not in settings.net:
        return place(Path(settings.net))
    return settings.net + ("" if settings.weights is None else f", {place(settings.weights)}")


def order(name: str, n: int) -> NDArray[np.int64]:
    """Return the order in which the n test images of a set are taken, the first ones when not all.

    Args:
      name: of the set. A folder's images come class by class: theirs is drawn once and for all.
        MNIST's have no order, and everybody takes its first ones.
      n: how many there are.

    Returns:
      Indices, `[n]`.
    """
    return np.arange(n) if name == "mnist" else data.split(n, n, seed=0)[1]


def digest(params: Params) -> str:
    """Return what identifies the parameters of a row."""
    content = hashlib.sha256()
    for leaf in jax.tree.leaves(params):
        content.update(np.ascontiguousarray(leaf).tobytes())
    return content.hexdigest()[:16]


def run(settings: Settings, console: Console) -> list[records.Row]:
    """Attack in every way that is asked for; return the rows of these and of earlier runs.

    Raises:
      ValueError: as `load`.
      UsageError: if the devices don't divide the blocks.
    """
    problem = load(settings)
    starts = range(0, len(problem.y), settings.block)
    sizes = dict.fromkeys(len(problem.y[start:][: settings.block]) for start in starts)
    parallel.mesh(settings, *sizes)
    settings.out.mkdir(parents=True, exist_ok=True)
    results = settings.out / "results.json"
    with training.bars(console) as progress:
        for name, eps in itertools.product(settings.attacks, settings.eps):
            identity = {
                **problem.identity,
                "attack": name,
                "eps": eps,
                "norm": settings.norm,
                "seed": settings.seed,
                "versions": records.versions(),
                "device": records.device(),
            }
            rows = records.load(results, _FIELDS)
            if any(identity.items() <= row.items() for row in rows):
                continue
            if name == "check":
                row = {**identity, **check(settings, problem, eps)}
            else:
                bar = progress.add_task(
                    f"{identity['method']}: {name}, {eps:g}", total=len(starts), note=""
                )
                blocks = []
                for start in starts:
                    blocks.append(_block(settings, problem, identity, start))
                    standing = np.concatenate([block["robust"] for block in blocks])
                    progress.update(bar, advance=1, note=f"robust {standing.mean():.4f}")
                row = {**identity, **_row(problem, blocks, settings)}

            def place(row: records.Row) -> list[Any]:
                return [row[k] for k in ("method", "attack", "seed", *_PROBLEM)]

            kept = [old for old in rows if place(old) != place(row)]
            records.save(results, [*kept, row])
    return records.load(results, _FIELDS)


def _block(
    settings: Settings, problem: Problem, identity: dict[str, Any], start: int
) -> dict[str, Any]:
    """Attack some images, or read what came of it."""
    rows = slice(start, start + settings.block)
    name = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    path = settings.out / "blocks" / f"{name}-{settings.block}-{start}.npz"
    if not path.exists():
        parts = methods(identity["attack"], settings.norm)
        keys = jax.random.split(jax.random.key(settings.seed), len(problem.y))
        mesh = parallel.mesh(settings, len(problem.y[rows]))
        params = parallel.replicate(mesh, problem.params)
        x, y = parallel.spread(mesh, (problem.x[rows], problem.y[rows]))
        begin = time.perf_counter()
        found = evaluate.ensemble(
            problem.apply_fn, params, x, y, parts,
            eps=identity["eps"], norm=settings.norm, key=keys[rows], bounds=problem.bounds,
            batch_size=settings.batch_size,
        )  # fmt: skip
        path.parent.mkdir(exist_ok=True)
        unfinished = path.with_suffix(".unfinished.npz")
        np.savez_compressed(
            unfinished,
            r=found.r,
            clean=found.outcome.clean,
            robust=found.outcome.robust,
            norm=found.outcome.norm,
            nonfinite=found.outcome.nonfinite,
            invalid=found.outcome.invalid,
            seconds=time.perf_counter() - begin,
            names=np.array(list(found.stages)),
            tried=np.array([stage.tried for stage in found.stages.values()]),
            fooled=np.array([stage.fooled for stage in found.stages.values()]),
            stage_seconds=np.array([stage.seconds for stage in found.stages.values()]),
        )
        unfinished.replace(path)
    try:
        with path.open("rb") as file, np.load(file) as saved:
            return dict(saved)
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise options.UsageError(
            f"expected the arrays of a block in {path}, got: {error}; delete the file, and the "
            "same command makes it again"
        ) from error


def _row(problem: Problem, blocks: Sequence[dict[str, Any]], settings: Settings) -> dict[str, Any]:
    """Return what a row says of an attack."""
    together = {key: np.concatenate([block[key] for block in blocks])
                for key in ("clean", "robust", "norm", "nonfinite", "invalid")}  # fmt: skip
    low, high = evaluate.interval(together["robust"])
    stages = {}
    standing = together["clean"].copy()
    for i, name in enumerate(blocks[0]["names"].tolist()):
        fooled = np.concatenate([block["fooled"][i] for block in blocks])
        standing &= ~fooled
        stages[name] = {
            "tried": int(sum(block["tried"][i].sum() for block in blocks)),
            "fooled": int(fooled.sum()),
            "robust": float(standing.mean()),
            "seconds": round(float(sum(block["stage_seconds"][i] for block in blocks)), 1),
        }
    return {
        "columns": {
            "clean": evaluate.accuracy(together["clean"]),
            "robust": evaluate.accuracy(together["robust"]),
        },
        "interval": [low, high],
        "stages": stages,
        "counts": {
            "nonfinite": int(together["nonfinite"].sum()),
            "invalid": int(together["invalid"].sum()),
            "max_norm": float(together["norm"].max()),
        },
        "seconds": round(float(sum(block["seconds"] for block in blocks)), 1),
        "settings": {"batch_size": settings.batch_size, "block": settings.block},
    }


def check(settings: Settings, problem: Problem, eps: float) -> dict[str, Any]:
    """Return what a row says of signs that figures shouldn't be believed."""
    n = min(300, len(problem.y))  # as many as the differences that it looks for need
    found = evaluate.check(
        problem.apply_fn, problem.params, problem.x[:n], problem.y[:n], eps=eps,
        norm=settings.norm, key=jax.random.key(settings.seed), bounds=problem.bounds,
        batch_size=settings.batch_size,
    )  # fmt: skip
    return {
        "flags": {flag.name: flag.message for flag in found.flags},
        "columns": found.figures,
        "settings": {"n": n},
    }


def tables(rows: Sequence[records.Row]) -> list[str]:
    """Return Markdown: for each problem a table of nets and attacks, with its flags."""
    lines: list[str] = []

    def place(row: records.Row) -> tuple[Any, ...]:
        return tuple(row[k] for k in _PROBLEM)

    for key in dict.fromkeys(map(place, rows)):
        here = [row for row in rows if place(row) == key]
        source, subtract, divide, crop, box, n, norm, eps = key
        lines += [f"# {source}: {norm} size {eps:g}, {n:,} images", ""]
        attacked = [row for row in here if row["attack"] != "check"]
        shown = [name for name in LABELS if any(row["attack"] == name for row in attacked)]
        labels = LABELS | ({"standard": "APGD and FAB-T"} if norm == "l1" else {})  # no Square
        lines.append("| Net | Clean | " + " | ".join(labels[name] for name in shown) + " |")
        lines.append("|---|---|" + "---|" * len(shown))
        for method in dict.fromkeys(row["method"] for row in attacked):
            own = [row for row in attacked if row["method"] == method]
            cells = [_cell([row for row in own if row["attack"] == name]) for name in shown]
            clean = own[0]["columns"]["clean"]
            lines.append(f"| {method} | {clean:.4f} | " + " | ".join(cells) + " |")
        lines += [
            "",
            f"Inputs are (pixels - {subtract:g}) / {divide:g}"
            + (f", of the middle {crop}x{crop}. " if crop else ". ")
            + ("Perturbed images stay in" if box else "Perturbed images may leave")
            + f" the range of pixels, 0 to {divide:g}.",
            "",
        ]
        remarks = [(row["method"], remark) for row in here for remark in _remarks(row)]
        for method, remark in dict.fromkeys(remarks):
            lines += [f"- {method}: {remark}.", ""]
    return lines


def _remarks(row: records.Row) -> list[str]:
    """Return what must be said beside a row's figures."""
    remarks = list(row.get("notes", ()))
    if row["attack"] == "check":
        return [*remarks, "; ".join(row["flags"].values()) or "nothing to doubt was found"]
    for count, what in (
        ("invalid", "labels are none of the net's classes, and count as wrong"),
        ("nonfinite", "images have inputs, logits or perturbations that aren't finite"),
    ):
        if n := row["counts"].get(count):
            remarks.append(f"{n:,} of {row['n']:,} {what}")
    return remarks


def _cell(rows: Sequence[records.Row]) -> str:
    if not rows:
        return ""
    if len(rows) > 1:
        values = [row["columns"]["robust"] for row in rows]
        return f"{np.mean(values):.4f} ± {np.std(values, ddof=1):.4f}"
    low, high = rows[0]["interval"]
    return f"{rows[0]['columns']['robust']:.4f} [{low:.3f}, {high:.3f}]"


@options.command
def main() -> None:
    """Run from the command line."""
    settings = tyro.cli(Settings, description=__doc__)
    console = parallel.start()
    lines = tables(run(settings, console))
    (settings.out / "results.md").write_text("\n".join(lines))
    console.print("\n".join(lines), highlight=False, markup=False)


if __name__ == "__main__":
    main()
