"""results.json: the rows that runs record, from which every table and figure is made.

A row is a dataclass, one for each kind of run. Its fields are the keys of its JSON, in the same
order; `load` and `save` convert between the two. `find_or_run` lets a command resume: it runs only
what the file lacks.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import jax
import numpy as np
from numpy.typing import NDArray

import jaxadv
from experiments.lib import cache, options, parallel

RESULTS = Path(__file__).resolve().parents[1] / "results"
"""Folder of the committed records."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """The base class of rows.

    A field's key in the JSON is its name, unless its metadata has a `key`. A field whose default is
    None is omitted if it is None.
    """

    experiment: str

    @classmethod
    def kind_of(cls, content: Mapping[str, Any]) -> type[Row]:
        """Return the class of the row with this JSON."""
        return cls

    def to_json(self) -> dict[str, Any]:
        """Return the row as JSON."""
        values = {field: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {
            _key(field): value
            for field, value in values.items()
            if value is not None or field.default is dataclasses.MISSING
        }


def _key(field: dataclasses.Field[Any]) -> str:
    return field.metadata.get("key", field.name)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TableRow(Row):
    """A trained net, scored by `train_and_score`.

    Attributes:
      settings: everything that the row depends on except the seed.
      groups: in `ablations`, the net's label in each question.
      columns: accuracies, by column of the table.
      counts: statistics of each column's perturbations.
      n_pgd: how many of the n images PGD attacked; None in old rows.
      curves: the accuracy at each size, by column.
      history: losses and accuracies after each epoch.
      ratio_to_lwa: in `remedies`, the time of a training step relative to LWA's, timed in turn.
    """

    network: str
    method: str
    seed: int
    eps: float
    norm: str
    n: int
    settings: dict[str, Any]
    versions: dict[str, str]
    device: str
    groups: dict[str, str] | None = None
    columns: dict[str, float]
    counts: dict[str, dict[str, float]]
    n_pgd: int | None = None
    curves: dict[str, list[float]]
    epochs: int
    train_seconds: float
    history: list[dict[str, float]]
    ratio_to_lwa: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttackRow(Row):
    """An attack on a net and images.

    Attributes:
      method: name of the net.
      weights: checksum of its parameters.
      data: source of the images; `subtract`, `divide` and `crop` turn them into inputs.
      box: whether perturbed images stay in the range of pixels.
      classes: the data's names for the net's classes, if the weights or an option give them.
      notes: what a reader must know about these.
      answers: checksum of a user's function's logits on the first images.
    """

    method: str
    network: str
    weights: str
    data: str
    subtract: float
    divide: float
    crop: int | None
    box: bool
    n: int
    classes: list[str] | None = None
    notes: list[str] | None = None
    answers: str | None = None
    attack: str
    eps: float
    norm: str
    seed: int
    versions: dict[str, str]

    @classmethod
    def kind_of(cls, content: Mapping[str, Any]) -> type[AttackRow]:
        """Return the class of the row of `evaluation`, `board` or `reference` with this JSON."""
        if content.get("attack") == "check":
            return CheckRow
        if content.get("attack") == "certify":
            return SmoothedRow
        return PublishedRow if content.get("experiment") == "reference" else RobustRow


@dataclasses.dataclass(frozen=True, kw_only=True)
class RobustRow(AttackRow):
    """A net's robust accuracy under an attack of ours.

    Attributes:
      columns: accuracies `clean` and `robust`.
      interval: confidence interval of the robust accuracy.
      stages: for each attack of an ensemble, how many images it tried and fooled.
      standing: which images are still classified correctly, a bit each, as hexadecimal digits; None
        in older rows.
    """

    device: str
    columns: dict[str, float]
    interval: list[float]
    standing: str | None = None
    stages: dict[str, dict[str, float]]
    counts: dict[str, float]
    seconds: float
    settings: dict[str, Any]

    @property
    def passes(self) -> float:
        """Passes executed per image; 0 in older rows, which don't count them."""
        return sum(stage.get("passes", 0) for stage in self.stages.values())

    def verdicts(self) -> NDArray[np.bool_]:
        """Return which images are still classified correctly, `[n]`.

        Raises:
          ValueError: for an older row, which doesn't have them.
        """
        if self.standing is None:
            raise ValueError("expected a row with the verdict on each image, got an older one")
        bits = np.frombuffer(bytes.fromhex(self.standing), np.uint8)
        return np.unpackbits(bits, count=self.n).astype(bool)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckRow(AttackRow):
    """Reasons to doubt a net's figures: the flags of `evaluate.check`, and what it measured.

    Attributes:
      flags: by name, the kind, a colon and the message; older rows lack the kind.
      columns: the measurements.
    """

    device: str
    flags: dict[str, str]
    columns: dict[str, float]
    settings: dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SmoothedRow(AttackRow):
    """The certified accuracy of a smoothed net, a different classifier from the attacked net.

    Attributes:
      method: name of the smoothed classifier.
      sigma: standard deviation of the noise.
      radii: all sizes certified with the same draws; the number of draws depends on them.
      alpha: the probability of a wrong certificate, for each image.
      n0: draws that choose an image's class.
      stages: numbers of draws at the looks.
      columns: accuracies `clean` and `certified`.
      interval: confidence interval of the certified accuracy.
      abstained: number of images without a certificate of any size.
      samples: total number of draws that bound p_A, over all images and sizes.
    """

    device: str
    sigma: float
    radii: list[float]
    alpha: float
    n0: int
    stages: list[int]
    columns: dict[str, float]
    interval: list[float]
    abstained: int
    samples: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class PublishedRow(AttackRow):
    """A net's robust accuracy under the published AutoAttack."""

    threads: int
    settings: dict[str, Any]
    columns: dict[str, float]
    counts: dict[str, float]
    seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainRow(Row):
    """The robust accuracy under an attack of a net that `train` trained."""

    settings: dict[str, str]
    attack: str
    n: int
    versions: dict[str, str]
    device: str
    columns: dict[str, float]
    interval: list[float]
    train_seconds: float
    weights: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class PropositionRow(Row):
    """A proposition of Appendix A: its claims, and the data of its figure."""

    proposition: str
    statement: str
    claims: list[dict[str, Any]]
    series: dict[str, Any]
    n: int
    seed: int
    settings: dict[str, Any]
    versions: dict[str, str]
    device: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchmarkRow(Row):
    """A part of the benchmark: its figures, and whether the machine was quiet."""

    part: str
    figures: list[dict[str, Any]]
    machine: dict[str, Any]
    versions: dict[str, str]
    device: str
    settings: dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PartRow(Row):
    """A part of `accelerator`: its figures so far."""

    part: str
    device: str
    versions: dict[str, str]
    settings: dict[str, Any]
    finished: bool
    seconds: float
    figures: list[dict[str, Any]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class KnownRow(Row):
    """The smallest perturbations of a net for which others have published figures.

    Attributes:
      net: its name.
      weights: checksum of its parameters.
      published: the published figures.
      clean: accuracy on all test images.
      median_l2: median l2 size by attack, and of the smallest for each image.
      seconds: duration of each attack.
      flags: reasons for doubt found by `evaluate.check`; `figures` are what it measured.
    """

    net: str
    network: str
    weights: str
    published: dict[str, float]
    clean: float
    median_l2: dict[str, float] = dataclasses.field(metadata={"key": "median l2"})
    seconds: dict[str, float]
    flags: dict[str, str]
    figures: dict[str, float]
    n: int
    seed: int
    settings: dict[str, Any]
    versions: dict[str, str]
    device: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class FastRow(Row):
    """The fast ensemble and AutoAttack, on one net.

    Attributes:
      weights: the net's checksum.
      data: the images' source.
      columns: accuracies `clean`, `standard`, `fast`, and `published` where that was run.
      passes: passes executed per image, by ensemble and kind.
      seconds: duration by ensemble, without `compile_seconds`.
      compile_seconds: time spent on tracing, in older rows not counted, lowering and compilation.
      orders: by order of the targets, the accuracies after growing numbers of targets.
      machine: whether the machine was quiet.
    """

    net: str
    weights: str
    data: str
    norm: str
    eps: float
    n: int
    seed: int
    columns: dict[str, float]
    passes: dict[str, dict[str, float]]
    seconds: dict[str, float]
    compile_seconds: dict[str, float]
    orders: dict[str, list[float]] | None = None
    machine: dict[str, Any]
    versions: dict[str, str]
    device: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class CurveRow(Row):
    """The smallest perturbations of images, and a net's robust accuracy at every size.

    Attributes:
      budget: most forward plus backward passes that the search may take per image.
      median: median size of the perturbations; None if at least half of the images have none.
      curve: `eps`, and the `accuracy` at each.
      accuracy: robust accuracy from these perturbations, by size.
      attacks: robust accuracy under other attacks, by attack and size.
      by: on how many images each attack found the smallest perturbation.
      passes: passes per image, by kind.
      seconds: duration in the session that wrote the row; batches kept from others take none.
    """

    method: str
    network: str
    weights: str
    data: str
    subtract: float
    divide: float
    crop: int | None
    box: bool
    n: int
    norm: str
    seed: int
    budget: int
    median: float | None
    curve: dict[str, list[float]]
    accuracy: dict[str, float]
    attacks: dict[str, dict[str, float]]
    by: dict[str, int]
    passes: dict[str, float]
    seconds: float
    versions: dict[str, str]
    device: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimalityRow(Row):
    """How close an attack comes to the smallest perturbations of a net.

    Attributes:
      weights: the net's checksum.
      data: the images' source.
      budget: most forward plus backward passes that it may take per image.
      pool: the attacks whose envelope optimality is measured against.
      columns: `optimality`, None if no image is classified correctly or none was fooled by any
        attack, and `median` size, None if this one fails on half the images.
      passes: passes per image, by kind.
    """

    net: str
    weights: str
    data: str
    norm: str
    n: int
    seed: int
    budget: int
    attack: str
    library: str
    pool: list[str]
    columns: dict[str, float]
    passes: dict[str, float]
    seconds: float
    versions: dict[str, str]
    device: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class CertifyRow(Row):
    """A smoothed classifier, certified and attacked.

    Attributes:
      method: how the net was trained.
      n: number of images.
      samples: total number of draws that bound p_A, over all images.
      columns: accuracies `clean`, `certified@SIZE` and `attacked@SIZE`.
      curve: `eps`, up to the largest certified size, and the accuracy `certified` at each.
      abstained: number of images without a certificate.
      both: by size, the images that are both certified and broken.
      n0: draws that choose an image's class.
      stages: numbers of draws at the looks.
      sampler: how the noise is drawn.
      seconds: duration of certification, in the session that finished it.
      attack_seconds: duration of the attacks and of the draws that judge them, likewise.
      settings: everything that the row depends on except the method and the seed.
    """

    network: str
    method: str
    sigma: float
    alpha: float
    n: int
    samples: int
    seed: int
    columns: dict[str, float]
    curve: dict[str, list[float]]
    abstained: int
    both: dict[str, list[int]]
    n0: int
    stages: list[int]
    sampler: str
    train_seconds: float
    seconds: float
    attack_seconds: float
    settings: dict[str, Any]
    versions: dict[str, str]
    device: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeaturesRow(Row):
    """Each library's answer to each question."""

    answers: dict[str, dict[str, str]]
    n: int
    eps: float
    versions: dict[str, str]
    device: str


R = TypeVar("R", bound=Row)


def read(path: Path) -> list[dict[str, Any]]:
    """Return the JSON of the rows written so far; none if there is no such file.

    Raises:
      UsageError: if the file isn't a list of objects.
    """
    if not path.exists():
        return []
    try:
        rows = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise options.UsageError(
            f"expected JSON in {path}, got: {error}; move the file, or choose another folder"
        ) from error
    if isinstance(rows, list) and all(isinstance(row, dict) for row in rows):
        return rows
    raise options.UsageError(
        f"expected a list of rows in {path}, got something else; move the file, or choose another "
        "folder"
    )


def load(path: Path, kind: type[R]) -> list[R]:
    """Return the rows written so far; none if there is no such file.

    Raises:
      UsageError: if the file isn't a list of rows of this kind.
    """
    rows: list[Any] = []
    for content in read(path):
        row_kind = kind.kind_of(content)
        fields = {_key(field): field for field in dataclasses.fields(row_kind)}
        lacking = [
            name
            for name, field in fields.items()
            if content.get(name) is None and not str(field.type).endswith("| None")
        ]
        wrong = [f"without {name}" for name in lacking]
        wrong += [f"with {name}" for name in content if name not in fields]
        if wrong:
            raise options.UsageError(
                f"expected a list of rows of the same command in {path}, got some {wrong[0]}; move "
                "the file, or choose another folder"
            )
        rows.append(row_kind(**{fields[key].name: value for key, value in content.items()}))
    return rows


def save(path: Path, rows: Iterable[Row | Mapping[str, Any]]) -> None:
    """Write the rows atomically; numbers that aren't finite, which JSON lacks, become null."""
    content = [row.to_json() if isinstance(row, Row) else row for row in rows]
    text = json.dumps(_finite(content), indent=1, allow_nan=False) + "\n"
    with cache.replacing(path) as file:
        file.write(text.encode())


def _finite(content: Any) -> Any:
    if isinstance(content, Mapping):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def find(rows: Iterable[R], identity: Mapping[str, Any]) -> R | None:
    """Return the first row whose JSON has these entries; None if there is none."""
    return next((row for row in rows if identity.items() <= row.to_json().items()), None)


def find_or_run(
    path: Path,
    kind: type[R],
    identity: Mapping[str, Any],
    run: Callable[[], R],
    *,
    place: Sequence[str],
    enough: Callable[[R], bool] = lambda _: True,
) -> R:
    """Return the row of a file that has these entries; if there is none, make and add it.

    Args:
      path: the file.
      kind: class of its rows.
      identity: the entries that the row depends on.
      run: makes the row.
      place: the fields that tell rows apart; a new row replaces one that is the same in all of
        them.
      enough: whether a row has all that is wanted; else it is made again.
    """
    # Several processes must agree on what to run, whichever files they see.
    found = find(load(path, kind), identity) if jax.process_count() == 1 else None
    if found is not None and enough(found):
        return found
    row = run()
    if parallel.first_process():
        put(path, row, place=place)
    return row


def put(path: Path, row: R, *, place: Sequence[str]) -> list[R]:
    """Write a row to a file, in place of those that are the same in these fields; return all.

    Several processes may write to the same file.
    """
    with cache.locked(path.parent):
        others = [
            old
            for old in load(path, type(row))
            if any(getattr(old, field) != getattr(row, field) for field in place)
        ]
        save(path, [*others, row])
    return [*others, row]


def made_by(others: Mapping[str, str] = MappingProxyType({})) -> dict[str, Any]:
    """Return a row's versions and device.

    Args:
      others: versions of other packages that were used.
    """
    return {"versions": {**versions(), **others}, "device": device()}


def versions() -> dict[str, str]:
    """Return the versions that a result depends on."""
    packages = ("jax", "jaxlib", "flax", "optax", "numpy")
    return {
        "python": platform.python_version(),
        "jaxadv": jaxadv.__version__,  # works in a checkout that isn't installed, too
        **{name: version(name) for name in packages},
    }


def device() -> str:
    """Return the kind and number of devices, e.g. `cpu x1 (2 cores)`."""
    first = jax.devices()[0]
    if first.platform != "cpu":
        return f"{first.device_kind} x{jax.device_count()}"
    n = cores()
    return f"cpu x{jax.device_count()} ({n} core{'' if n == 1 else 's'})"


def cores() -> int:
    """Return the number of cores that this process may use."""
    allowed = getattr(os, "sched_getaffinity", None)  # exists only on Linux
    return len(allowed(0)) if allowed else os.cpu_count() or 1
