"""What the records say of a function, for its page of the reference: figures and pictures."""

import json
from pathlib import Path
from statistics import fmean

_RESULTS = Path(__file__).resolve().parents[1] / "experiments" / "results"
_LWA = "The LWA net of Table 1 (500x500, MNIST)"
_ALT = {
    "gallery/digits": "Digits, perturbations and predictions, one pair of lines for each method",
    "gallery/accuracy": "Accuracy under one step, PGD and AutoAttack, by size",
    "gallery/surface": "The margin around an image, for two nets",
    "gallery/saturation": "Direction and size of float32 gradients as logits grow",
    "logistic/appendix_a": "The objective's convexity, the regulariser it induces, its minimiser",
}


def _rows(record, **wanted):
    """Return the rows of a record that have these values."""
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
        f"{_LWA} has an accuracy of {_mean(rows, 'validation')} on clean images; at l2 size 1.5 of "
        f"{_mean(rows, column)} under this one step, and {_mean(rows, 'pgd')} under 100 steps of "
        "PGD",
    )


def _attack(name):
    rows, whole = (
        _rows("autoattack", method="mnist_mlp/lwa", attack=attack, norm="l2", eps=1.5)
        for attack in (name, "standard")
    )
    return _in(
        "autoattack",
        f"{_LWA} has an accuracy of {_mean(rows, 'clean')} on 1,000 clean images; at l2 size 1.5, "
        f"in the range of pixels, of {_mean(rows, 'robust')} under this attack with AutoAttack's "
        f"settings, and {_mean(whole, 'robust')} under the whole AutoAttack",
    )


def _least(name):
    rows = _rows("optimality", net="mnist_mlp/lwa", norm="l2", budget=2000)
    (own,) = (row for row in rows if (row["attack"], row["library"]) == (name, "jaxadv"))
    best = min(row["columns"]["median"] for row in rows)
    return _in(
        "optimality",
        f"For {_LWA[0].lower()}{_LWA[1:]}, the median l2 size that this finds on 500 images within "
        f"2,000 passes is {own['columns']['median']:.3f}; the smallest on record, of all attacks "
        f"and libraries, is {best:.3f}",
    )


def _deepfool():
    (row,) = _rows("known", net="clntrained")
    found = row["median l2"]
    return _in(
        "known",
        f"For a net that others have published, the median l2 size is {found['DeepFool']:.2f} by "
        f"DeepFool and {found['the best']:.2f} by the best attack",
    )


def _trained(method, how):
    (row,) = _rows(
        "board", method=f"mnist_mlp/{method}", attack="standard", eps=1.5, norm="l2", n=10_000
    )
    return _in(
        "board",
        f"The net of Table 1 that is trained {how} classifies {row['columns']['clean']:.3f} of "
        f"MNIST's test images correctly, and {row['columns']['robust']:.3f} under AutoAttack of l2 "
        "size 1.5, in the range of pixels",
    )


def _pgd():
    (row,) = _rows(
        "board", method="mnist_mlp/lwa", attack="pgd-100x10", eps=1.5, norm="l2", n=10_000
    )
    return _in(
        "board",
        f"{_LWA} classifies {row['columns']['clean']:.3f} of the test images correctly, and "
        f"{row['columns']['robust']:.3f} under 100 steps from 10 starts, at l2 size 1.5 and in the "
        "range of pixels",
    )


def _fast():
    rows = [row for row in _rows("fast") if "standard" in row["passes"]]
    apart = max(abs(row["columns"]["standard"] - row["columns"]["fast"]) for row in rows)
    standard, fast = (
        sum(sum(row["passes"][name].values()) for row in rows) for name in ("standard", "fast")
    )
    return _in(
        "fast",
        f"In {len(rows)} comparisons it took {fast / standard:.0%} of AutoAttack's passes, and the "
        f"accuracies differ by at most {apart:.3f}",
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
        f"On 2 CPU cores, a step takes {ms['mlp', 'plain']} ms for a 500x500 net, "
        f"{ms['mlp', 'LWA']} ms with LWA; for a LeNet {ms['lenet', 'plain']} ms and "
        f"{ms['lenet', 'LWA']} ms",
    )


def recorded():
    """Return reStructuredText by a function's full name."""
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
        "objectives.mixed": [_trained("goodfellow", "by Goodfellow's objective")],
        "objectives.representation": [_trained("lwa_rep", "at a representation (LWA_Rep)")],
        "train.make_step": [_step()],
        "evaluate.attack_and_score": [_trained("lwa", "by LWA"), accuracy],
        "evaluate.fast_autoattack": [_fast()],
        "evaluate.distances": [_least("distances")],
        "evaluate.check": [_picture("gallery/surface")],
        "jacobian.class_differences": [_picture("gallery/saturation")],
        "logistic.objective": [_picture("logistic/appendix_a")],
    }
    return {
        f"jaxadv.{name}": "\n\n".join([".. rubric:: On record", *shown])
        for name, shown in parts.items()
    }
