"""Recorded figures and pictures for the functions' pages in the reference."""

import json
from pathlib import Path
from statistics import fmean

_RESULTS = Path(__file__).resolve().parents[1] / "experiments" / "results"
_LWA = "The LWA net of Table 1 (500x500, MNIST)"
_ALT = {
    "gallery/digits": "Digits, perturbations and predictions, a pair of rows for each method",
    "gallery/accuracy": "Accuracy under one step, PGD and AutoAttack, by size",
    "gallery/surface": "The margin around an image, for two nets",
    "gallery/saturation": "Direction and size of float32 gradients as logits grow",
    "certify/certify": "Certified and attacked accuracy of a smoothed LeNet, by size",
    "logistic/appendix_a": "The objective's convexity, the regulariser it induces, its minimiser",
}


def _rows(record, **wanted):
    """Return the rows of a record whose columns have the given values."""
    rows = json.loads((_RESULTS / record / "results.json").read_text())
    rows = [row for row in rows if all(row.get(name) == value for name, value in wanted.items())]
    if not rows:
        raise ValueError(f"expected rows of {wanted} in the record {record}, got none")
    return rows


def _mean(rows, column):
    return f"{fmean(row['columns'][column] for row in rows):.3f}"


def _in(record, sentence):
    return f"{sentence} (:doc:`record </results/{record}/results>`)."


def _picture(name):
    return f".. image:: /results/{name}.png\n   :alt: {_ALT[name]}\n"


def _one_step(column):
    rows = _rows("mnist_mlp", method="lwa")
    return _in(
        "mnist_mlp",
        f"{_LWA} has an accuracy of {_mean(rows, 'validation')} on clean images. At l2 size 1.5, "
        f"its accuracy is {_mean(rows, column)} under this one step, and {_mean(rows, 'pgd')} "
        "under 100 steps of PGD",
    )


def _attack(name):
    rows, whole = (
        _rows("autoattack", method="mnist_mlp/lwa", attack=attack, norm="l2", eps=1.5)
        for attack in (name, "standard")
    )
    return _in(
        "autoattack",
        f"{_LWA} has an accuracy of {_mean(rows, 'clean')} on 1,000 clean images. At l2 size 1.5, "
        f"in the range of pixels, its accuracy is {_mean(rows, 'robust')} under this attack with "
        f"AutoAttack's settings, and {_mean(whole, 'robust')} under all of AutoAttack",
    )


def _least(name):
    rows = _rows("optimality", net="mnist_mlp/lwa", norm="l2", budget=2000)
    (own,) = (row for row in rows if (row["attack"], row["library"]) == (name, "jaxadv"))
    best = min(row["columns"]["median"] for row in rows)
    return _in(
        "optimality",
        f"For {_LWA[0].lower()}{_LWA[1:]}, the median l2 size that this finds on 500 images within "
        f"2,000 passes is {own['columns']['median']:.3f}. The smallest recorded median of all "
        f"attacks and libraries is {best:.3f}",
    )


def _deepfool():
    (row,) = _rows("known", net="clntrained")
    found = row["median l2"]
    return _in(
        "known",
        f"For a published net (advertorch's), the median l2 size is {found['DeepFool']:.2f} with "
        f"DeepFool, and {found['the best']:.2f} with the best attack for each image",
    )


def _trained(method, how):
    (row,) = _rows(
        "board", method=f"mnist_mlp/{method}", attack="standard", eps=1.5, norm="l2", n=10_000
    )
    return _in(
        "board",
        f"The net of Table 1 that was trained {how} has an accuracy of "
        f"{row['columns']['clean']:.3f} on MNIST's test images, and of "
        f"{row['columns']['robust']:.3f} under AutoAttack at l2 size 1.5, in the range of pixels",
    )


def _pgd():
    (row,) = _rows(
        "board", method="mnist_mlp/lwa", attack="pgd-100x10", eps=1.5, norm="l2", n=10_000
    )
    return _in(
        "board",
        f"{_LWA} has an accuracy of {row['columns']['clean']:.3f} on the test images, and of "
        f"{row['columns']['robust']:.3f} under PGD of 100 steps from 10 starts, at l2 size 1.5 and "
        "in the range of pixels",
    )


def _fast():
    rows = [row for row in _rows("fast") if "standard" in row["passes"]]
    apart = max(abs(row["columns"]["standard"] - row["columns"]["fast"]) for row in rows)
    standard, fast = (
        sum(sum(row["passes"][name].values()) for row in rows) for name in ("standard", "fast")
    )
    return _in(
        "fast",
        f"In {len(rows)} comparisons, it took {fast / standard:.0%} of AutoAttack's passes, and "
        f"the accuracies differed by at most {apart:.3f}",
    )


def _certified():
    (row,) = _rows("certify", method="both")
    found = row["columns"]
    return _in(
        "certify",
        f"For a LeNet trained under noise of standard deviation {row['sigma']:g}, on {row['n']:,} "
        f"of MNIST's test images, the certified accuracy at l2 size 1 is "
        f"{found['certified@1']:.3f}, and the accuracy of the same smoothed classifier under "
        f"attack {found['attacked@1']:.3f}",
    )


def _step():
    (steps,) = _rows("benchmark", part="steps")
    ms = {
        (row["net"], row["objective"]): f"{row['ms']:.1f}"
        for row in steps["figures"]
        if row["called"] == "by itself" and row["devices"] == 1
    }
    return _in(
        "benchmark",
        f"On 2 CPU cores, a plain training step takes {ms['mlp', 'plain']} ms for a 500x500 net "
        f"and an LWA step {ms['mlp', 'LWA']} ms; for a LeNet, {ms['lenet', 'plain']} ms and "
        f"{ms['lenet', 'LWA']} ms",
    )


def recorded():
    """Return each function's text in reStructuredText, by the function's full name."""
    digits, accuracy = _picture("gallery/digits"), _picture("gallery/accuracy")
    parts = {
        "perturb.alpha": [_one_step("adv_alpha"), digits],
        "perturb.loss": [_one_step("adv_loss"), digits],
        "perturb.loss_sign": [_one_step("adv_loss_sign"), digits],
        "attack.pgd": [_pgd(), digits],
        "attack.apgd": [_attack("apgd-ce"), _least("APGD")],
        "attack.apgd_multitargeted": [_attack("apgd-t"), _least("APGD-T")],
        "attack.square": [_attack("square"), digits],
        "attack.fab": [_attack("fab-t"), _least("FAB"), digits],
        "attack.fmn": [_least("FMN")],
        "attack.ddn": [_least("DDN")],
        "attack.deepfool": [_deepfool(), digits],
        "objectives.natural": [_trained("normal", "on clean images")],
        "objectives.adversarial": [_trained("lwa", "by LWA"), accuracy],
        "objectives.mixed": [_trained("goodfellow", "with Goodfellow's objective")],
        "objectives.representation": [_trained("lwa_rep", "at a representation (LWA_Rep)")],
        "train.make_step": [_step()],
        "evaluate.attack_and_score": [_trained("lwa", "by LWA"), accuracy],
        "evaluate.fast_autoattack": [_fast()],
        "evaluate.distances": [_least("distances")],
        "evaluate.check": [_picture("gallery/surface")],
        "jacobian.class_differences": [_picture("gallery/saturation")],
        "certify.certify": [_certified(), _picture("certify/certify")],
        "logistic.objective": [_picture("logistic/appendix_a")],
    }
    return {
        f"jaxadv.{name}": "\n\n".join([".. rubric:: Recorded results", *shown])
        for name, shown in parts.items()
    }
