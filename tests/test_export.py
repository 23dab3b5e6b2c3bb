"""Every function of arrays lowers for CPU, GPU and TPU, which needs no accelerator."""

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from references import NORMS

from jaxadv import evaluate, jacobian, logistic, losses, norms, perturb

B, D, K = 4, 5, 3
KEY = jax.random.split(jax.random.key(0), B)
EPS = np.linspace(0.1, 0.6, B).astype(np.float32)
W = np.random.default_rng(0).normal(size=(D, K)).astype(np.float32)
X = np.random.default_rng(1).normal(size=(B, D)).astype(np.float32)
Y = (X @ W).argmax(axis=1)
SIGNS = np.sign(X[:, 0])


def net(w, x):
    return jnp.tanh(x @ w)


def methods(norm, w, x, e):
    of = {"norm": norm, "eps": e}
    return (
        perturb.alpha(net, w, x, Y, norm=norm), perturb.alpha(net, w, x, Y, **of),
        perturb.loss(net, w, x, Y, **of), perturb.loss_sign(net, w, x, Y, eps=e),
        perturb.vat(net, w, x, key=KEY, **of), jacobian.softmax_jacobian(net, w, x),
        jacobian.class_differences(net, w, x, Y).d, evaluate.measure(net, w, x, Y, x, norm=norm)[:],
    )  # fmt: skip


def geometry(norm, w, x, e):
    return (
        norms.norm(x, norm), norms.steepest(x, norm), norms.rescale(x, e, norm),
        norms.project(x, e, norm), norms.sample(KEY, x, e, norm), losses.margin(x @ w, Y),
        norms.clip_to_box(x, x, (-e[0], e[0])), losses.dlr(x @ w, Y),
    )  # fmt: skip


def regression(norm, w, x, e):
    w, of = w[:, 0], {"eps": e, "norm": norm}
    return (
        logistic.adversary(w, x, SIGNS, **of), logistic.loss(w, x, SIGNS, **of),
        logistic.objective(w, x, SIGNS, **of), logistic.logits(w, x),
        logistic.fit(w, x, SIGNS, steps=2, **of),
    )  # fmt: skip


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("functions", [methods, geometry, regression])
def test_every_function_of_arrays_lowers_for_cpu_gpu_and_tpu(functions, norm):
    platforms = ("cpu", "cuda", "tpu")
    lowered = jax.jit(functions, static_argnums=0)
    assert jax.export.export(lowered, platforms=platforms)(norm, W, X, EPS).platforms == platforms
