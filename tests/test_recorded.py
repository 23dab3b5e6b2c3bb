"""Properties of the library's attacks on the recorded, trained nets."""

from functools import partial

import jax
import numpy as np
import pytest

from experiments.lib import data, models, weights
from experiments.lib.records import RESULTS
from jaxadv import attack, evaluate, perturb

ITERATED = {
    "pgd": partial(attack.pgd, steps=10, random_start=True),
    "apgd": partial(attack.apgd, steps=10),
    "apgd_multitargeted": partial(attack.apgd_multitargeted, steps=5, n_targets=2),
    "fab": partial(attack.fab, steps=5, n_targets=2),
    "square": partial(attack.square, steps=50),
    "deepfool": attack.deepfool,
    "fmn": partial(attack.fmn, steps=20),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("record", "names"), [("mnist_mlp", list(ITERATED)), ("mnist_lenet", ["pgd", "apgd"])]
)
def test_results_on_trained_nets_hardly_depend_on_the_batch_size(record, names):
    params = weights.load(RESULTS / record / "lwa" / "params.safetensors")
    apply_fn = models.function(models.recognised(params, (28, 28, 1)))
    images = data.mnist()
    n = 500
    x, y = data.MNIST.inputs(images.test_images[:n]), images.test_labels[:n]
    kwargs = {"eps": 1.5, "key": jax.random.key(0), "bounds": (0.0, 1.0)}
    for method in (perturb.loss, perturb.alpha):
        many, few = (
            evaluate.attack_and_score(apply_fn, params, x, y, method, **kwargs, batch_size=size).r
            for size in (n, 77)
        )
        apart = np.linalg.norm((many - few).reshape(n, -1), axis=1)
        size = np.linalg.norm(many.reshape(n, -1), axis=1)
        # Sums of a few hundred products in another order; a near tie of two classes may flip.
        assert np.quantile(apart / size, 0.998) < 1e-5, method
    for name in names:
        many, few = (
            evaluate.attack_and_score(
                apply_fn, params, x, y, ITERATED[name], **kwargs, batch_size=size
            ).outcome.robust
            for size in (n, 77)
        )
        assert 0 < many.sum() < n
        assert (many != few).mean() <= 0.002, name


def checked(net, scale, **kwargs):
    """The flags of a recorded MLP with its logits scaled, by name."""
    params = weights.load(RESULTS / "mnist_mlp" / net / "params.safetensors")
    apply_fn = models.function(models.recognised(params, (28, 28, 1)))
    images = data.mnist()
    x, y = data.MNIST.inputs(images.test_images[:100]), images.test_labels[:100]
    result = evaluate.check(
        lambda params, x: scale * apply_fn(params, x),
        params, x, y, key=jax.random.key(0), **kwargs,
    )  # fmt: skip
    return {flag.name: flag for flag in result.flags}


@pytest.mark.slow
def test_on_a_plain_net_the_check_flags_one_step_and_not_the_net():
    flags = checked("normal", 1.0, eps=1.5, bounds=(0.0, 1.0))
    assert "it is on many sound nets; report iterated attacks" in flags["one step"].message
    assert {flag.kind for flag in flags.values()} == {"weak attack"}


@pytest.mark.slow
def test_a_small_logit_scale_that_weakens_pgd_is_flagged():
    assert checked("normal", 1e-6, eps=1.0)["minimal norm"].kind == "weak attack"
