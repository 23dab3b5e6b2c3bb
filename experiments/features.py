"""How several libraries of adversarial attacks answer the same awkward questions.

    pip install -e ".[bench]"
    pip install "git+https://github.com/fra31/auto-attack@a39220048b3c9f2cca9a4d3a54604793c68eca7e"
    python experiments/features.py

Each question is put to each library's l2 PGD of 40 steps (for AutoAttack, to APGD on the
cross-entropy) on the Normal net of Table 1's record, within the pixel range. Writes results.json
and results.md to --out.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import sys
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, from anywhere

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from numpy.typing import NDArray
from rich.console import Console

from experiments.compare import libraries, published, pytorch
from experiments.lib import models, options, problems, records, tables
from experiments.lib.options import Checked, OutputFolder, Range, Size
from experiments.lib.records import FeaturesRow
from jaxadv import attack, evaluate

Images = NDArray[np.float32]
Attack = Callable[[Mapping[str, Any], Any, Any, Any], Images]


@dataclasses.dataclass(frozen=True)
class Settings(Checked):
    """Put the questions to each library."""

    n: Annotated[int, Range(ge=5)] = 50
    """Test images."""
    eps: Size = 1.5
    """l2 size."""
    out: OutputFolder = Path("runs/features")
    """Where results go."""


def by_us(params: Mapping[str, Any], x: Any, y: Any, eps: Any) -> Images:
    """Return images perturbed by `attack.pgd`."""
    x = jnp.asarray(x)
    apply_fn = models.function(models.recognised(dict(params), x.shape[1:]))
    r = attack.pgd(apply_fn, params, x, jnp.asarray(y), eps=eps, steps=40, bounds=(0.0, 1.0))
    return np.asarray(x + r)


def by_autoattack(params: Mapping[str, Any], x: Any, y: Any, eps: Any) -> Images:
    """Return images perturbed by the published APGD."""
    found = published.autoattack(
        pytorch.fixed_net(params), x, y, eps=eps, attacks=["apgd-ce"], batch_size=len(x)
    )
    return np.moveaxis(found.numpy(), 1, -1)


def by_peer(library: str, params: Mapping[str, Any], x: Any, y: Any, eps: Any) -> Images:
    """Return images perturbed by another library's PGD."""
    return libraries.attacks(params, x, y, eps=eps, task="PGD-40")[library]()


PEERS = ("foolbox", "torchattacks", "cleverhans", "ART")
ATTACKS: Mapping[str, Attack] = {
    "jaxadv": by_us,
    **{name: partial(by_peer, name) for name in PEERS},
    "AutoAttack": by_autoattack,
}


def asked(question: Callable[[Attack], str], perturb: Attack) -> str:
    """Return a library's answer, or the error that it raises."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            return question(perturb)
        except Exception as error:
            message = str(error).strip().splitlines() or [""]
            return f"{type(error).__name__}: {message[0][:60]}"


def questions(
    params: Mapping[str, Any], x: Images, y: NDArray[Any], eps: float
) -> dict[str, Callable[[Attack], str]]:
    """Return the questions, as functions from an attack to its answer."""
    net = models.recognised(dict(params), x.shape[1:])
    apply_fn = models.function(net)

    def scaled(by: float) -> dict[str, Any]:
        layers = dict(params["params"])
        layers["logits"] = {name: by * value for name, value in layers["logits"].items()}
        return {"params": layers}

    def right(images: Images) -> float:
        return float((np.asarray(apply_fn(params, jnp.asarray(images))).argmax(-1) == y).mean())

    def confident(by: float, perturb: Attack) -> str:
        return f"{right(perturb(scaled(by), x, y, eps)):.2f}"

    def sizes_of_their_own(perturb: Attack) -> str:
        own = np.linspace(0.5, eps, len(x)).astype(np.float32)
        r = (perturb(params, x, y, own) - x).reshape(len(x), -1)
        ratio = np.linalg.norm(r, axis=1) / own
        clean = np.asarray(apply_fn(params, jnp.asarray(x))).argmax(-1) == y
        return "yes" if np.all(ratio < 1.001) and ratio[clean].min() > 0.5 else "no"

    def in_parts(perturb: Attack) -> str:
        whole = perturb(params, x, y, eps)
        parts = [perturb(params, x[i : i + 1], y[i : i + 1], eps) for i in range(5)]
        furthest = float(np.abs(np.concatenate(parts) - whole[:5]).max())
        return "the same" if furthest < 1e-3 else f"pixels differ by up to {furthest:.1g}"

    def one_hot(perturb: Attack) -> str:
        return f"accuracy {right(perturb(params, x, np.eye(10)[y], eps)):.2f}"

    def bytes_(perturb: Attack) -> str:
        found = perturb(params, x * np.float32(255), y, eps)
        return f"no error; pixels up to {found.max():.0f}"

    return {
        "accuracy left": partial(confident, 1.0),
        "accuracy left, the net's logits times 10": partial(confident, 10.0),
        "accuracy left, the net's logits times 100": partial(confident, 100.0),
        "a size for each image": sizes_of_their_own,
        "images one by one and together": in_parts,
        "one-hot labels": one_hot,
        "pixels from 0 to 255, box from 0 to 1": bytes_,
    }


def flagged(problem: problems.Problem, eps: float) -> dict[str, str]:
    """Return, for each library, whether its checks flag a net that returns probabilities."""
    import torch

    def probabilities(params: Any, x: jax.Array, /) -> jax.Array:
        return jax.nn.softmax(problem.apply_fn(params, x))

    x, y = jnp.asarray(problem.x), jnp.asarray(problem.y)
    report = evaluate.check(
        probabilities, problem.params, x, y, eps=eps, key=jax.random.key(0), bounds=(0.0, 1.0)
    )
    net = torch.nn.Sequential(pytorch.fixed_net(problem.params), torch.nn.Softmax(dim=1))
    printed = io.StringIO()
    with warnings.catch_warnings(record=True) as caught, contextlib.redirect_stdout(printed):
        warnings.simplefilter("always")
        published.autoattack(net, problem.x, problem.y, eps=eps, attacks=["apgd-ce"], verbose=True)
    said = [printed.getvalue(), *(str(warning.message) for warning in caught)]
    return {
        "jaxadv": "flagged" if any(f.name == "probabilities" for f in report.flags) else "nothing",
        "AutoAttack": "flagged" if "probability distribution" in " ".join(said) else "nothing",
        **dict.fromkeys(PEERS, "has no such check"),
    }


def as_markdown(row: FeaturesRow) -> list[str]:
    """Return the answers as a table."""
    cells = [
        [question, *(answers[name].replace("|", "/") for name in ATTACKS)]
        for question, answers in row.answers.items()
    ]
    versions = ", ".join(f"{name} {number}" for name, number in row.versions.items())
    return [
        "# The same questions put to each library",
        "",
        *tables.markdown(["", *ATTACKS], cells),
        "",
        f"{row.n} images of MNIST, l2 size {row.eps:g}. {versions}.",
        "",
    ]


def run(settings: Settings, console: Console) -> FeaturesRow:
    """Put every question to every library; return the answers.

    Raises:
      UnavailableError: if one of the libraries isn't installed.
    """
    pytorch.need(*libraries.PACKAGES, "autoattack")
    problem = problems.recorded("mnist_mlp/normal", settings.n)
    answers = {
        question: {name: asked(ask, perturb) for name, perturb in ATTACKS.items()}
        for question, ask in questions(problem.params, problem.x, problem.y, settings.eps).items()
    }
    row = FeaturesRow(
        experiment="features",
        answers=answers | {"a net that returns probabilities": flagged(problem, settings.eps)},
        n=settings.n,
        eps=settings.eps,
        **records.made_by(libraries.versions() | {"autoattack": version("autoattack")}),
    )
    tables.save(settings.out, [row], as_markdown(row), console)
    return row


@options.command
def main() -> None:
    """Run from the command line."""
    run(tyro.cli(Settings, description=__doc__), Console())


if __name__ == "__main__":
    main()
