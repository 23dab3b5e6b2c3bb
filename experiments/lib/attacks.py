"""The attacks that commands take by name."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache, partial
from typing import Literal

from jaxadv import attack, evaluate, perturb
from jaxadv.types import Norm, PerturbFn

Attack = Literal[
    "one-step", "alpha", "deepfool", "fmn", "pgd", "pgd-100x10", "apgd-ce", "apgd-t", "fab-t",
    "square", "standard", "fast",
]  # fmt: skip
AttackName = Attack | Literal["check"]

LABELS = {
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
    "fast": "Fast ensemble",
    "certify": "Certified",
}


@cache
def methods(name: Attack, norm: Norm) -> Mapping[str, PerturbFn]:
    """Return the parts of an attack, by name; the same objects each time."""
    standard = evaluate.autoattack(norm)
    if name == "standard":
        return standard
    if name == "fast":
        return evaluate.fast_autoattack(norm)
    if name in standard:
        return {name: standard[name]}
    if name == "pgd-100x10":  # each start attacks the examples that are still robust
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
