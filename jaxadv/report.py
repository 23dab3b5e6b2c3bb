"""A complete report of a net's robustness, for publication, from one call; and its cost beforehand.

- `cost`: the most passes through the net that a report may take, and the time they take.
- `robustness`: the report. It has the accuracies on clean examples, under one step and under
  AutoAttack, and on request a certified one, with their intervals; the flags of `evaluate.check`;
  and the threat model, the key and the versions that the figures depend on. It can be written as
  JSON and as Markdown.

Each figure equals the result of the direct call with the same key. To compare two nets on the same
examples, pass masks of their reports to `evaluate.compare`.
"""

from __future__ import annotations

import json
import os
import platform
import timeit
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
from numpy.typing import NDArray

import jaxadv
from jaxadv import certify, closures, evaluate, host, inputs, meshes, perturb
from jaxadv.evaluate import Outcome, Passes, Progress, Result, _batches, _budget, _check
from jaxadv.types import ApplyFn, Bounds, Norm, Params, PerturbFn

__all__ = ["Cost", "Part", "Robustness", "cost", "robustness"]

_CHECKED = 300  # examples, enough for the differences that `check` looks for
_CHECK_STEPS = 50
_FIRST_DRAWS = 100
_ALPHA = 0.001


class Part(NamedTuple):
    """The maximum cost of a part of a report.

    Attributes:
      examples: maximum number of examples it runs on.
      passes: maximum number of forward and backward passes for each of them, without padding; None
        if unknown, as for your own attacks and those in no ensemble.
      seconds: the time of these passes; None if `passes` is.
    """

    examples: int
    passes: Passes | None
    seconds: float | None


class Cost(NamedTuple):
    """The maximum cost of a report, for a net that nothing fools.

    Attributes:
      one_step: scoring the clean examples and the one-step perturbations.
      attacks: each attack, by name.
      check: `evaluate.check`, on at most 300 examples.
      certify: sampling; None without a certificate.
    """

    one_step: Part
    attacks: dict[str, Part]
    check: Part
    certify: Part | None

    @property
    def seconds(self) -> float | None:
        """The time of all parts; None if one is unknown."""
        parts = [self.one_step, *self.attacks.values(), self.check]
        parts += [] if self.certify is None else [self.certify]
        known = [part.seconds for part in parts if part.seconds is not None]
        return sum(known) if len(known) == len(parts) else None


class Robustness(NamedTuple):
    """A report of a net's robustness.

    Attributes:
      setting: the arguments and the environment, as plain types: `n`, `eps`, `norm`, `bounds`,
        `key`, the `methods` by name with their settings, `checked`, `sigma`, `draws`, `versions`,
        `device`.
      one_step: the score under one step of Adv_Loss (`perturb.loss`).
      attacked: the result of the attacks.
      checked: the report of `evaluate.check` on `checked` evenly spaced examples, at most 300.
      certificate: the certificates of the smoothed classifier, which isn't the net itself; None if
        not requested.
    """

    setting: dict[str, Any]
    one_step: Outcome
    attacked: Result
    checked: evaluate.Report
    certificate: certify.Certificate | None

    @property
    def masks(self) -> dict[str, NDArray[np.bool_]]:
        """Masks of the correctly classified examples, `[n]`, by the name of the accuracy."""
        outcome, sampled = self.attacked.outcome, self.certificate
        masks = {"clean": outcome.clean, "one step": self.one_step.robust, "robust": outcome.robust}
        if sampled is not None:
            # Examples whose A is a wrong class have no draws.
            drawn = sampled.samples > 0
            masks["smoothed"] = drawn & (sampled.prediction == sampled.label)
            masks["certified"] = sampled.radius >= self.setting["eps"]
        return masks

    def figures(self) -> dict[str, Any]:
        """Return the report as plain types, ready for JSON."""
        n, masks = self.setting["n"], self.masks
        outcome = self.attacked.outcome
        # At a size of 0, and where the label is none of the classes, r is 0 by definition.
        zero = self.one_step.zero & ~outcome.invalid & (self.setting["eps"] > 0)
        seen = outcome._replace(zero=zero)._asdict()
        return {
            **self.setting,
            "accuracy": {name: evaluate.accuracy(mask) for name, mask in masks.items()},
            "interval": {name: list(evaluate.interval(mask)) for name, mask in masks.items()},
            "attacks": {
                name: {
                    "tried": int(stage.tried.sum()),
                    "fooled": int(stage.fooled.sum()),
                    "passes": None if stage.executed is None else sum(stage.executed) / n,
                    "seconds": stage.seconds,
                }
                for name, stage in self.attacked.stages.items()
            },
            "counts": {name: int(seen[name].sum()) for name in ("zero", "nonfinite", "invalid")},
            "flags": [flag._asdict() for flag in self.checked.flags],
        }

    def to_json(self) -> str:
        """Return `figures()` as JSON."""
        return json.dumps(self.figures(), indent=1, allow_nan=False)

    def to_markdown(self) -> str:
        """Return the report as Markdown: two tables, and notes on them."""
        found = self.figures()
        n, norm, methods, sigma = (found[name] for name in ("n", "norm", "methods", "sigma"))
        standard = methods == _described(evaluate.autoattack(norm))
        worst = "AutoAttack" if standard else f"Worst of {len(methods)} attacks"
        names = ("Clean", "One step", worst, "Clean, smoothed", "Certified, smoothed")
        figures = zip(found["accuracy"].values(), found["interval"].values(), strict=True)
        accuracies = [
            [name, f"{accuracy:.4f}", f"{low:.4f} to {high:.4f}"]
            for name, (accuracy, (low, high)) in zip(names, figures, strict=False)
        ]
        attacks = [
            [name.replace("|", r"\|"), f"{stage['tried']:,}", f"{stage['fooled']:,}",
             "not counted" if stage["passes"] is None else f"{stage['passes']:,.0f}"]
            for name, stage in found["attacks"].items()
        ]  # fmt: skip
        box = json.dumps(found["bounds"])
        remarks = [f"x + r {'may have any value' if box == 'null' else f'lies within {box}'}."]
        if sigma is not None:
            remarks.append(
                "Smoothed refers to a different classifier: the net's most frequent prediction "
                f"under Gaussian noise of standard deviation {sigma:g}. Each certificate is wrong "
                f"with a probability of at most {_ALPHA:g}. Attacks run on the net itself."
            )
        for count, what in (
            ("zero", "one-step perturbations are exactly 0: no usable gradient"),
            ("nonfinite", "examples have inputs, logits or perturbations that aren't finite"),
            ("invalid", "labels are none of the net's classes, and count as wrong"),
        ):
            if found["counts"][count]:
                remarks.append(f"{found['counts'][count]:,} of {n:,} {what}.")
        remarks += [
            f"Flag `{flag['name']}`, {flag['kind']}: {flag['message']}." for flag in found["flags"]
        ] or [
            f"`evaluate.check` raised no flag on {found['checked']:,} of the examples, which "
            "proves nothing."
        ]
        versions = ", ".join(f"{name} {of}" for name, of in found["versions"].items())
        remarks.append(f"Key {found['key']}; {versions}; {found['device']}.")
        return "\n".join([
            f"# Robustness in {norm} at eps {found['eps']:g}\n",
            _table(f"On {n:,} examples", "Accuracy", "95% interval", rows=accuracies),
            _table("Attack", "Tried", "Misclassified", "Passes per example", rows=attacks),
            *(f"- {remark}" for remark in remarks),
            "",
        ])  # fmt: skip


def _table(*headings: str, rows: Sequence[Sequence[str]]) -> str:
    first, *others = ("| " + " | ".join(cells) + " |" for cells in (headings, *rows))
    return "\n".join([first, "|" + "---|" * len(headings), *others, ""])


def _described(attacks: Mapping[str, PerturbFn]) -> dict[str, str]:
    return {name: _batches.described(method) for name, method in attacks.items()}


def _asked(
    x: Any, attacks: Mapping[str, PerturbFn] | None, norm: Norm | None
) -> tuple[Mapping[str, PerturbFn], Norm]:
    """Return the attacks, AutoAttack by default, and their norm.

    Raises:
      TypeError: if they aren't a mapping, or one doesn't have the signature of attacks.
      ValueError: if there are no examples or attacks; if the attacks' norms differ, or the norm is
        unknown.
    """
    if not len(x):
        raise ValueError("expected at least one example, got none; a thousand is usual")
    if attacks is None:
        attacks = evaluate.autoattack("l2" if norm is None else norm)
    _budget.named(attacks, example='a dict, e.g. {"pgd": attack.pgd}', default="AutoAttack")
    return attacks, _budget.norm_of(attacks.values(), norm)


@meshes.auto_axes()
def cost(
    apply_fn: ApplyFn,
    params: Params,
    x: Any,
    attacks: Mapping[str, PerturbFn] | None = None,
    *,
    norm: Norm | None = None,
    sigma: float | None = None,
    draws: Sequence[int] = certify.STAGES,
    batch_size: int = 500,
) -> Cost:
    """Return the maximum cost of `robustness`, before running it.

    Passes are the most that each part may take, which it takes on a net that nothing fools. Each
    attack runs only on the examples that the attacks before it left robust, so a weak net costs far
    less. Seconds are the time of the net's passes, estimated by timing one forward and one backward
    pass on one batch. The other computations of attacks, and compilation, come on top: little for a
    large net, several times as much for a small one.

    Args:
      apply_fn: `(params, x) -> logits`, `[B, ...]` to `[B, K]`.
      params: the first argument of `apply_fn`.
      x: `[n, ...]`, floating point, n of at least 1.
      attacks: as for `robustness`.
      norm: as for `robustness`.
      sigma: as for `robustness`.
      draws: as for `robustness`.
      batch_size: number of examples per batch.

    Returns:
      `Cost`.

    Raises:
      TypeError: if `x` or the logits are not floating-point arrays; if `attacks` isn't a mapping,
        or an attack has another signature; and under a trace.
      ValueError: if there are no examples; if the attacks' norms differ, or the norm is unknown.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxadv import report
      >>> found = report.cost(lambda w, x: x @ w, jnp.ones((4, 3)), jnp.ones((1000, 4)))
      >>> {name: tuple(part.passes) for name, part in found.attacks.items()}
      {'apgd-ce': (103, 101), 'apgd-t': (204, 202), 'fab-t': (204, 200), 'square': (5003, 0)}
      >>> found.seconds > 0
      True
    """
    x, _ = host.arrays("report.cost", x, np.zeros(np.shape(x)[:1], int), params)
    attacks, norm = _asked(x, attacks, norm)
    shape, on = host.one_batch(x, batch_size), host.spread(x)
    batch = jnp.asarray(*on.take((x,), np.resize(np.arange(len(x)), shape.shape[0])))
    apply_fn = closures.keyed(apply_fn, params, shape)
    logits = jax.eval_shape(partial(inputs.apply, apply_fn), params, batch)
    most = partial(_budget.most, n_classes=logits.shape[1])
    forward = _timed(partial(_batches.forward, apply_fn, params, batch)) / len(batch)
    both = _timed(partial(_gradient, apply_fn, params, batch)) / len(batch)

    def part(examples: int, *passes: Passes | None) -> Part:
        known = [each for each in passes if each is not None]
        if len(known) < len(passes):
            return Part(examples, None, None)
        total = Passes(*map(sum, zip(*known, strict=True)))
        seconds = total.forward * forward + total.backward * max(both - forward, 0)
        return Part(examples, total, examples * seconds)

    n, checks = len(x), _check.attacks_of(norm, _CHECK_STEPS)
    twice = [*checks.values(), checks["pgd"]]  # PGD runs again, without a box
    return Cost(
        # One step; then a look at x before the attacks, and x and x + r to score each of two r.
        one_step=part(n, most(perturb.loss), Passes(5, 0)),
        attacks={name: part(n, most(method), Passes(1, 0)) for name, method in attacks.items()},
        # The last passes score each r, and check outputs and gradients.
        check=part(len(_looked_at(x)), *map(most, twice), Passes(21, 6)),
        certify=None if sigma is None else part(n, Passes(_FIRST_DRAWS + int(np.max(draws)), 0)),
    )


@partial(jax.jit, static_argnums=0)
def _gradient(apply_fn: ApplyFn, params: Params, x: jax.Array) -> jax.Array:
    logits, pull = jax.vjp(partial(inputs.apply, apply_fn, params), x)
    return pull(jnp.ones_like(logits))[0]


def _timed(call: Callable[[], Any]) -> float:
    """Return the seconds of a call, the minimum of four; the first also compiles."""
    return min(timeit.repeat(lambda: jax.block_until_ready(call()), number=1, repeat=4))


@meshes.auto_axes()
def robustness(
    apply_fn: ApplyFn,
    params: Params,
    x: Any,
    y: Any,
    attacks: Mapping[str, PerturbFn] | None = None,
    *,
    eps: float,
    norm: Norm | None = None,
    key: jax.Array,
    bounds: Bounds | None = None,
    sigma: float | None = None,
    draws: Sequence[int] = certify.STAGES,
    batch_size: int = 500,
    store: str | os.PathLike[str] | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Robustness:
    """Report a net's robustness at one size: accuracies, flags, and everything they depend on.

    The robust accuracy is an upper bound: a stronger attack may lower it. With `sigma` there is
    also a lower bound, for another classifier: the net smoothed by noise (`certify`).

    Args:
      apply_fn: `(params, x) -> logits`, `[B, ...]` to `[B, K]`.
      params: the first argument of `apply_fn`.
      x: `[n, ...]`, floating point, n of at least 1, on the host or the device.
      y: integer labels, `[n]`.
      attacks: by name, in order, e.g. `evaluate.fast_autoattack("l2")`; None for AutoAttack.
      eps: the size, a number.
      norm: the norm of that size; None for the norm that the attacks are set to, or l2.
      key: one key, used for each part.
      bounds: `(lo, hi)`, numbers or arrays that broadcast to one example; None for no box.
      sigma: the standard deviation of the noise under which to certify eps, in l2 only; None for no
        certificate.
      draws: numbers of draws at the looks, `stages` of `certify.certify`.
      batch_size: number of examples per batch.
      store: a folder, new or from an earlier call, in which the results of the attacks and of the
        certificate are kept, batch by batch. The same call resumes where the earlier one was
        interrupted.
      progress: called after each of these batches, e.g. `print`.

    Returns:
      `Robustness`.

    Raises:
      TypeError: as `evaluate.attack_and_score` and `certify.certify`; if `attacks` isn't a mapping.
      ValueError: as these; if there are no examples, or `eps` isn't one number.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxadv import attack, report
      >>> x = jnp.array([[3.0, 0.0], [0.0, 1.0], [0.0, 4.0], [2.0, 1.0]])
      >>> y, key = jnp.array([0, 1, 1, 1]), jax.random.key(0)
      >>> net = lambda params, x: x
      >>> found = report.robustness(net, None, x, y, {"pgd": attack.pgd}, eps=1.0, key=key)
      >>> found.figures()["accuracy"]
      {'clean': 0.75, 'one step': 0.5, 'robust': 0.5}
      >>> print(found.to_markdown())  # doctest: +ELLIPSIS
      # Robustness in l2 at eps 1
      ...
      | Clean | 0.7500 | 0.3006 to 0.9544 |
      ...
    """
    x, y = host.arrays("report.robustness", x, y, (params, eps, key, bounds))
    attacks, norm = _asked(x, attacks, norm)
    inputs.one_key(key)
    if np.ndim(eps):
        raise ValueError(
            f"expected one eps for all examples, got shape {np.shape(eps)}; a report is for one "
            "size: evaluate.distances gives the accuracy at every size"
        )
    apply_fn = closures.keyed(apply_fn, params, host.one_batch(x, batch_size))
    _batches.warn_of_probabilities(apply_fn, params, x)
    shared: dict[str, Any] = {"key": key, "batch_size": batch_size}
    attack = partial(evaluate.attack_and_score, apply_fn, params, x, y, eps=eps, bounds=bounds)
    one_step = attack(_check.attacks_of(norm, _CHECK_STEPS)["one step"], **shared).outcome

    def certified(sigma: float, x: Any, y: Any, **others: Any) -> certify.Certificate:
        return certify.certify(
            apply_fn, params, x, y, sigma=sigma, radii=(float(eps),), n0=_FIRST_DRAWS,
            alpha=_ALPHA, stages=draws, norm=norm, **shared, **others,
        )  # fmt: skip

    def kept(part: str) -> dict[str, Any]:
        return {"store": None if store is None else Path(store) / part, "progress": progress}

    if sigma is not None:
        certified(sigma, x[:0], y[:0])  # raise its errors before any attack runs
    attacked = attack(attacks, **shared, **kept("attacks"))
    certificate = None if sigma is None else certified(sigma, x, y, **kept("certificate"))
    rows = _looked_at(x)
    checked = evaluate.check(
        apply_fn, params, *host.spread(x).take((x, y), rows), eps=eps, norm=norm, bounds=bounds,
        steps=_CHECK_STEPS, **shared,
    )  # fmt: skip
    setting = {
        "n": len(y),
        "eps": float(eps),
        "norm": norm,
        "bounds": None if bounds is None else [_plain(bound) for bound in host.fetch(bounds)],
        "key": np.asarray(jax.random.key_data(key)).tolist(),
        "methods": _described(attacks),
        "checked": len(rows),
        "sigma": None if sigma is None else float(sigma),
        "draws": None if sigma is None else np.atleast_1d(draws).tolist(),
        "versions": {
            "python": platform.python_version(),
            **{module.__name__: module.__version__ for module in (jaxadv, jax, jaxlib, np)},
        },
        "device": _device(x),
    }
    return Robustness(setting, one_step, attacked, checked, certificate)


def _looked_at(x: Any) -> NDArray[np.intp]:
    """Return the rows that `check` looks at: evenly spaced, as many for each device."""
    devices = host.spread(x).devices
    m = min(max(_CHECKED // devices, 1) * devices, len(x))
    return np.arange(m) * len(x) // m


def _plain(bound: Any) -> Any:
    """Return a bound as plain types: nested lists, with None for an open end."""
    return np.where(np.isfinite(bound), np.asarray(bound, float), np.array(None)).tolist()


def _device(x: Any) -> str:
    """Return the kind and number of devices that examples are evaluated on."""
    devices = (x if isinstance(x, jax.Array) else jnp.zeros(())).devices()
    return f"{next(iter(devices)).device_kind} x{len(devices)}"
