"""Every function of arrays lowers for CPU, GPU and TPU; no accelerator is needed for that."""

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from jaxadv import attack, evaluate, jacobian, logistic, losses, norms, perturb

NORMS = ("l1", "l2", "linf")
B, D, K = 4, 5, 3
KEY = jax.random.split(jax.random.key(0), B)
EPS = np.linspace(0.1, 0.6, B).astype(np.float32)
W = np.random.default_rng(0).normal(size=(D, K)).astype(np.float32)
X = np.random.default_rng(1).normal(size=(B, D)).astype(np.float32)
Y = (X @ W).argmax(axis=1)
SIGNS = np.sign(X[:, 0])


def net(w, x):
    return jnp.tanh(x @ w)


def in_each_norm(fn):
    return lambda *args: {norm: fn(*args, norm) for norm in NORMS}


FUNCTIONS = {  # and their arguments
    "perturb.alpha": (in_each_norm(lambda w, x, e, n: (
        perturb.alpha(net, w, x, Y, norm=n), perturb.alpha(net, w, x, Y, norm=n, eps=e)
    )), (W, X, EPS)),
    "perturb.loss": (in_each_norm(lambda w, x, e, n: perturb.loss(net, w, x, Y, norm=n, eps=e)),
                     (W, X, EPS)),
    "perturb.loss_sign": (lambda w, x, e: perturb.loss_sign(net, w, x, Y, eps=e), (W, X, EPS)),
    "perturb.vat": (in_each_norm(
        lambda w, x, e, n: perturb.vat(net, w, x, norm=n, eps=e, key=KEY)
    ), (W, X, EPS)),
    "attack.pgd": (in_each_norm(
        lambda w, x, e, n: attack.pgd(net, w, x, Y, norm=n, eps=e, steps=3)
    ), (W, X, EPS)),
    "norms.norm": (in_each_norm(norms.norm), (X,)),
    "norms.steepest": (in_each_norm(norms.steepest), (X,)),
    "norms.rescale": (in_each_norm(norms.rescale), (X, EPS)),
    "norms.project": (in_each_norm(norms.project), (X, EPS)),
    "norms.sample": (in_each_norm(norms.sample), (KEY, X, EPS)),
    "norms.clip_to_box": (norms.clip_to_box, (X, X, (np.float32(-1), np.float32(1)))),
    "losses.margin": (losses.margin, (X @ W, Y)),
    "jacobian.softmax_jacobian": (
        lambda w, x: jacobian.softmax_jacobian(net, w, x), (W, X)
    ),
    "jacobian.class_differences": (
        lambda w, x: jacobian.class_differences(net, w, x, Y)._asdict(), (W, X)
    ),
    "evaluate.measure": (in_each_norm(
        lambda w, x, n: (
            evaluate.measure(net, w, x, Y, x, norm=n), evaluate.measure(net, w, x, Y)
        )
    ), (W, X)),
    "logistic.adversary": (in_each_norm(
        lambda w, x, e, n: logistic.adversary(w, x, SIGNS, eps=e, norm=n)
    ), (W[:, 0], X, EPS)),
    "logistic.loss": (in_each_norm(
        lambda w, x, e, n: logistic.loss(w, x, SIGNS, eps=e, norm=n)
    ), (W[:, 0], X, EPS)),
    "logistic.objective": (in_each_norm(
        lambda w, x, e, n: logistic.objective(w, x, SIGNS, eps=e, norm=n)
    ), (W[:, 0], X, EPS)),
    "logistic.logits": (logistic.logits, (W[:, 0], X)),
    "logistic.fit": (
        lambda w, x: logistic.fit(w, x, SIGNS, eps=0.1, norm="l2", steps=2), (W[:, 0], X)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_function_of_arrays_lowers_for_cpu_gpu_and_tpu(name):
    fn, args = FUNCTIONS[name]
    platforms = ("cpu", "cuda", "tpu")
    assert jax.export.export(jax.jit(fn), platforms=platforms)(*args).platforms == platforms
