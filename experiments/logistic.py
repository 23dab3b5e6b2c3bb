"""Appendix A of the paper, measured on two digits of MNIST.

    python experiments/logistic.py          # about a minute on 2 CPU cores
    python experiments/logistic.py --help   # every setting

Logistic regression without a bias has an optimal adversary in closed form (`jaxadv.logistic`). For
each proposition, in corrected form (errors in the paper are noted below), the command measures
numbers that must lie within stated bounds, and draws a figure. It fails if a bound is violated.

Writes results.json, results.md and figures to --out.
"""

from __future__ import annotations

import dataclasses
import operator
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, from anywhere

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console
from scipy.optimize import minimize

from experiments.lib import data, figures, options, parallel, records, tables
from experiments.lib.options import Checked, OutputFolder, Range, Seed, distinct
from experiments.lib.records import PropositionRow
from jaxadv import logistic, norms
from jaxadv.types import Norm

NORMS: tuple[Norm, ...] = ("l1", "l2", "linf")
Digit = Annotated[int, Range(ge=0, le=9)]


@dataclasses.dataclass(frozen=True)
class Settings(Checked):
    """Measure the propositions of Appendix A on two digits."""

    digits: Annotated[tuple[Digit, Digit], distinct] = (3, 8)
    """The two classes, labelled -1 and +1."""
    n: Annotated[int, Range(ge=2)] = 400
    """Number of images, half of each class: the first ones of the training set."""
    seed: Seed = 0
    """Random seed of weights and segments."""
    out: OutputFolder = Path("runs/logistic")
    """Where results and figures go."""


class Claim(NamedTuple):
    """A number, and the bound that it must satisfy."""

    what: str
    value: float
    relation: str  # "<=", ">=" or ">"
    bound: float

    @property
    def holds(self) -> bool:
        """Whether the number satisfies the bound."""
        relations = {"<=": operator.le, ">=": operator.ge, ">": operator.gt}
        return bool(relations[self.relation](self.value, self.bound))


class Finding(NamedTuple):
    """A proposition, its claims, and the data of its figure."""

    proposition: str
    statement: str
    claims: list[Claim]
    series: dict[str, Any]


def load(settings: Settings) -> tuple[jax.Array, jax.Array]:
    """Return images `[n, 784]` in float64 and labels -1 and +1."""
    mnist = data.mnist()
    chosen = np.concatenate(
        [np.flatnonzero(mnist.train_labels == d)[: settings.n // 2] for d in settings.digits]
    )
    pixels = data.MNIST.inputs(mnist.train_images[chosen]).reshape(len(chosen), -1)
    labels = np.where(mnist.train_labels[chosen] == settings.digits[1], 1, -1)
    return jnp.asarray(pixels, jnp.float64), jnp.asarray(labels)


def margin(x: jax.Array, y: jax.Array) -> float:
    r"""Return the l2 width of the widest gap between the classes about a hyperplane through 0.

    That is :math:`2 \max_w \min_i y_i w^\top x_i / \|w\|_2`. It is computed by the dual of the
    hard-margin support vector machine, as twice the distance from 0 to the convex hull of all
    :math:`y_i x_i`.
    """
    z = np.asarray(y[:, None] * x)
    gram = z @ z.T

    def dual(a: np.ndarray) -> tuple[float, np.ndarray]:
        product = gram @ a
        return float(a @ product / 2 - a.sum()), product - 1

    found = minimize(
        dual, np.full(len(z), 1 / np.trace(gram)), jac=True, method="L-BFGS-B",
        bounds=[(0, None)] * len(z),
        options={"maxiter": 100_000, "maxfun": 200_000, "ftol": 1e-15, "gtol": 1e-10},
    )  # fmt: skip
    w = z.T @ found.x
    least = float((z @ w).min() / np.linalg.norm(w))
    if not least > 0:
        raise options.UsageError(
            f"expected {len(z)} digits that a hyperplane through 0 separates, got a margin of "
            f"{least:g}; lower --n"
        )
    return 2 * least


def equation_6(x: jax.Array, y: jax.Array, rng: np.random.Generator) -> Finding:
    """Check the closed form of the inner maximum, and Proposition 6 (Danskin) on it."""
    eps = 0.5
    gap, danskin = 0.0, 0.0
    for norm in NORMS:
        w = jnp.asarray(rng.normal(size=x.shape[1]))
        r = logistic.adversary(w, x, y, eps=eps, norm=norm)
        reached = jax.nn.softplus(-y * ((x + r) @ w))
        exact = logistic.loss(w, x, y, eps=eps, norm=norm)
        gap = max(gap, float(jnp.abs(reached - exact).max()))

        def at(v: jax.Array, r: jax.Array = r) -> jax.Array:  # r is a constant, as in training
            return jnp.mean(jax.nn.softplus(-y * ((x + r) @ v)))

        gradient = jax.grad(at)(w)
        direction = jnp.asarray(rng.normal(size=x.shape[1]))
        h = 1e-6
        ends = [logistic.objective(w + s * direction, x, y, eps=eps, norm=norm) for s in (h, -h)]
        difference = float((ends[0] - ends[1]) / (2 * h))
        danskin = max(danskin, abs(float(gradient @ direction) / difference - 1))
    return Finding(
        "Equation 6, Proposition 6",
        "The maximum over ||r|| <= c of log(1 + exp(-y w.(x + r))) is log(1 + exp(-y w.x + "
        "c ||w||_*)) in l1, l2 and linf (the paper prints the logarithm with the opposite sign), "
        "and its gradient is the gradient at the maximiser, held constant.",
        [
            Claim("loss at the adversary's point less the closed form", gap, "<=", 1e-12),
            Claim("gradient at the maximiser against a central difference, relative", danskin,
                  "<=", 1e-6),
        ],
        {},
    )  # fmt: skip


def proposition_b(x: jax.Array, y: jax.Array, rng: np.random.Generator) -> Finding:
    """Check convexity along random segments."""
    t = jnp.linspace(0, 1, 41)
    worst = -np.inf
    lines: dict[str, list[float]] = {}
    for norm in NORMS:
        values = jax.jit(
            jax.vmap(lambda w, norm=norm: logistic.objective(w, x, y, eps=0.3, norm=norm))
        )
        for draw in range(50):
            scale = 0.1 if draw == 0 else 10.0 ** rng.uniform(-3, 0)  # the first one is plotted
            ends = jnp.asarray(rng.normal(size=(2, x.shape[1]))) * scale
            along = values(ends[:1] + jnp.outer(t, ends[1] - ends[0]))
            # On an even grid, a convex function is at most the mean of its neighbours.
            excess = (along[1:-1] - (along[:-2] + along[2:]) / 2) / along.max()
            worst = max(worst, float(excess.max()))
            if draw == 0:
                lines[norm] = np.asarray(along).tolist()
    return Finding(
        "B",
        "The objective of Equation 6 is convex in w, whatever the norm.",
        [Claim("height above the mean of the neighbours, 150 segments, relative", worst, "<=",
               1e-13)],
        {"t": t.tolist(), "objective": lines},
    )  # fmt: skip


def proposition_c() -> Finding:
    """Check that the induced regulariser of the paper's example isn't convex."""
    c = 0.5
    w = jnp.linspace(-8, 8, 161)

    def induced(w: jax.Array) -> jax.Array:
        one = jnp.ones((1, 1)), jnp.ones(1)
        exact = logistic.loss(w[None], *one, eps=c, norm="l2")
        return (exact - logistic.loss(w[None], *one, eps=0.0, norm="l2"))[0]

    r = jax.vmap(induced)(w)
    printed = jax.nn.softplus(-c * w) - jax.nn.softplus(-w)
    ends = [float(induced(jnp.asarray(v))) for v in (0.0, 4.0, 8.0)]
    at = w >= 0
    return Finding(
        "C",
        "R(w) = log(1 + exp(-(w - c|w|))) - log(1 + exp(-w)), for x = y = 1 and c = .5, isn't "
        "convex. (The paper prints exp(-.5 w), which is right only for w >= 0; for w < 0 it makes "
        "R negative, which R never is.)",
        [
            Claim("R(4) - (R(0) + R(8)) / 2", ends[1] - (ends[0] + ends[2]) / 2, ">", 0.05),
            Claim("least R(w)", float(r.min()), ">=", 0.0),
            Claim("difference from the printed form where w >= 0",
                  float(jnp.abs(r - printed)[at].max()), "<=", 1e-15),
            Claim("difference from it where w < 0", float(jnp.abs(r - printed)[~at].max()), ">", 1),
        ],
        {"w": w.tolist(), "induced": r.tolist(), "printed": printed.tolist()},
    )  # fmt: skip


def proposition_d(x: jax.Array, y: jax.Array, rng: np.random.Generator) -> Finding:
    """Check that there is a unique, bounded solution if the margin is below 2c, and else none."""
    half = margin(x, y) / 2

    @partial(jax.jit, static_argnames="steps")  # compiled once for all sizes
    def fit(w: jax.Array, eps: float, steps: int) -> jax.Array:
        return logistic.fit(w, x, y, eps=eps, norm="l2", steps=steps)[0]

    steps = [3, 10, 30, 100, 300]
    growth: dict[str, list[float]] = {}
    losses: dict[str, list[float]] = {}
    ratios = (0.0, 0.5, 0.9, 1.1, 1.5, 3.0)
    start = jnp.asarray(rng.normal(size=x.shape[1])) * 1e-3
    for ratio in ratios:
        w = start
        growth[f"{ratio:g}"], losses[f"{ratio:g}"] = [], []
        for n in np.diff([0, *steps]):
            w = fit(w, ratio * half, steps=int(n))
            growth[f"{ratio:g}"].append(float(jnp.linalg.norm(w)))
            losses[f"{ratio:g}"].append(
                float(logistic.objective(w, x, y, eps=ratio * half, norm="l2"))
            )
    eps = 1.2 * half
    found = [
        fit(jnp.asarray(rng.normal(size=x.shape[1])) * size, eps, steps=200)
        for size in (1e-3, 1e-2, 0.1)
    ]
    spread = max(float(jnp.linalg.norm(w - found[0])) for w in found)
    size = float(jnp.linalg.norm(found[0]))
    slope, hessian = (
        f(lambda w: logistic.objective(w, x, y, eps=eps, norm="l2"))(found[0])
        for f in (jax.grad, jax.hessian)
    )
    sizes = norms.norm(x, "l2")
    return Finding(
        "D",
        "For data that a hyperplane through 0 separates, let the margin be the gap between the "
        "classes: twice the smallest distance to that hyperplane, in the adversary's norm. If the "
        "margin is less than 2c, solutions are bounded; if it is greater, the infimum 0 isn't "
        "attained and w grows without bound. In l2 the bounded solution is unique: with Q_i = "
        "-y_i w.x_i + c ||w||_* (the paper omits c) and s = logistic(Q_i), the Hessian is the sum "
        "of s(1 - s) dQ dQ' + s d2Q (the paper has s(1 - s) in both terms), which is positive "
        "definite at w != 0.",
        [
            Claim("margin of the data, l2", 2 * half, ">", 0.0),
            Claim("mean ||x||, for comparison", float(sizes.mean()), ">", 2 * half),
            Claim("c = .9 margin/2: objective after 300 steps", losses["0.9"][-1], "<=", 1e-12),
            Claim("c = .9 margin/2: ||w|| after 300 steps over that with c = 1.1 margin/2",
                  growth["0.9"][-1] / growth["1.1"][-1], ">", 5),
            Claim("c = 1.1 margin/2: objective after 300 steps", losses["1.1"][-1], ">", 1e-2),
            Claim("c = 1.1 margin/2: ||w|| after 300 steps over ||w|| after 100, less 1",
                  abs(growth["1.1"][-1] / growth["1.1"][-2] - 1), "<=", 1e-4),
            Claim("c = 1.2 margin/2: norm of the gradient at the solution",
                  float(jnp.linalg.norm(slope)), "<=", 1e-7),
            Claim("the same from three starts: greatest distance of the solutions over ||w||",
                  spread / size, "<=", 1e-4),
            Claim("least eigenvalue of the Hessian there",
                  float(jnp.linalg.eigvalsh(hessian).min()), ">", 0.0),
        ],
        {"steps": steps, "norm": growth, "objective": losses, "margin": 2 * half},
    )  # fmt: skip


def as_markdown(rows: Sequence[PropositionRow]) -> list[str]:
    """Return a table of its claims for each proposition."""
    first, last = rows[0].settings["digits"]
    lines = [f"# Appendix A on the digits {first} and {last}", ""]
    for row in rows:
        cells = [
            [claim["what"].replace("|", "\\|"), f"{claim['value']:.4g}",
             f"{claim['relation']} {claim['bound']:.4g}"]
            for claim in row.claims
        ]  # fmt: skip
        lines += [f"**{row.proposition}.** {row.statement}", ""]
        lines += [*tables.markdown(("measured", "value", "must be"), cells), ""]
    return [*lines, f"- {rows[0].n} images, float64, seed {rows[0].seed}, {rows[0].device}.", ""]


def run(settings: Settings, console: Console) -> list[PropositionRow]:
    """Measure everything and write it; raise an error if a claim fails."""
    x, y = load(settings)
    rng = np.random.default_rng(settings.seed)
    findings = [
        equation_6(x, y, rng), proposition_b(x, y, rng), proposition_c(), proposition_d(x, y, rng),
    ]  # fmt: skip
    rows = [
        PropositionRow(
            experiment="logistic",
            proposition=finding.proposition,
            statement=finding.statement,
            claims=[claim._asdict() | {"holds": claim.holds} for claim in finding.claims],
            series=finding.series,
            n=len(y),
            seed=settings.seed,
            settings={"digits": list(settings.digits), "n": settings.n},
            **records.made_by(),
        )
        for finding in findings
    ]
    tables.save(settings.out, rows, as_markdown(rows), console)
    figures.draw(settings.out)
    broken = [claim for finding in findings for claim in finding.claims if not claim.holds]
    if broken:
        raise ArithmeticError(
            "expected all claims of Appendix A to hold, got "
            + "; ".join(f"{c.what}: {c.value:.4g}, not {c.relation} {c.bound:.4g}" for c in broken)
        )
    return rows


@options.command
def main() -> None:
    """Run the experiment from the command line."""
    settings = tyro.cli(Settings, description=__doc__)
    with jax.enable_x64(True):
        run(settings, parallel.start())


if __name__ == "__main__":
    main()
