"""MI-FGSM (Dong et al., 2018), which the library doesn't have: sign steps with momentum."""

from functools import partial

import jax
import jax.numpy as jnp

import jaxadv
from jaxadv import losses, norms
from jaxadv.attack import Found, reports
from jaxadv.problem import Best, Problem, iterate


@reports
def mifgsm(apply_fn, params, x, y, /, *, eps, steps=10, decay=1.0, key=None, bounds=None):
    problem = Problem.of(
        apply_fn, params, x, y, norm="linf", eps=eps, bounds=bounds, loss_fn=losses.margin
    ).keyed()
    return Found(problem, *_run(problem, decay, steps=steps))


@partial(jax.jit, static_argnames="steps")
def _run(problem, decay, *, steps):
    problem = problem.start()
    size = problem.eps[:, None] / steps

    def step(_, carry):
        r, velocity, best = carry
        success, loss, g = problem.gradient(r)
        best = best.with_point(r, success, loss)
        velocity = decay * velocity + norms.rescale(g, 1.0, "l1")
        return problem.project(r + size * jnp.sign(velocity)), velocity, best

    zero = jnp.zeros_like(problem.x)
    r, _, best = iterate(step, (zero, zero, Best.empty(zero)), steps)
    best = best.with_point(r, *problem.value(r))
    passes = jnp.full(best.success.shape, steps)
    return problem.answer(best.r), passes + 2, passes


def main():
    def apply_fn(params, x):
        return jnp.tanh(x @ params["hidden"]) @ params["out"]

    hidden, out, images = jax.random.split(jax.random.key(0), 3)
    hidden, out = jax.random.normal(hidden, (20, 30)), jax.random.normal(out, (30, 5))
    params = {"hidden": hidden, "out": out}
    x = jax.random.normal(images, (400, 20))
    y = apply_fn(params, x).argmax(axis=1)
    one_step = partial(jaxadv.perturb.loss, norm="linf")
    for name, method in {"one step": one_step, "MI-FGSM": mifgsm}.items():
        r = method(apply_fn, params, x, y, eps=0.1)
        robust = jaxadv.evaluate.score(apply_fn, params, x, y, r, norm="linf").robust
        print(f"{name}: {jaxadv.evaluate.accuracy(robust):.3f} classified correctly")


if __name__ == "__main__":
    main()
