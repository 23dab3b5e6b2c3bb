"""Train and evaluate on some devices and print the results; a program for `test_parallel`.

    python -m tests.on_devices DIRECTORY EPOCHS AXES [DEVICES [COORDINATOR PROCESSES PROCESS]]

where AXES is the type of the mesh's axes, Auto or Explicit.
"""

import io
import json
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from rich.console import Console

from experiments.lib import parallel, training
from jaxadv import attack, certify, evaluate, objectives, perturb

N, D, H, K = 96, 12, 16, 4


def net(params, x):
    w, v = params
    return jax.nn.relu(x.reshape(len(x), -1) @ w) @ v


def main(directory, epochs, axes, *settings):
    names = "devices", "coordinator", "processes", "process"
    values = (int(value) if value.isdigit() else value or None for value in settings)
    settings = parallel.Settings(**dict(zip(names, values, strict=False)))
    parallel.start(settings)
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(N, 3, 4)), jnp.float32)
    params = [jnp.asarray(rng.normal(size=s) / 3, jnp.float32) for s in ((D, H), (H, K))]
    y = jnp.argmax(net(params, x), axis=1) ^ jnp.asarray(rng.random(N) < 0.1)
    mesh = parallel.mesh(settings, 8, N)
    if mesh is not None:
        mesh = Mesh(mesh.devices, mesh.axis_names, (AxisType[axes],))
    initial = [jnp.asarray(rng.normal(size=w.shape) / 3, jnp.float32) for w in params]
    with training.bars(Console(file=io.StringIO())) as progress:

        def fit(objective, data, directory, model_state=None):
            return training.fit(
                objective,
                optax.sgd(0.1, momentum=0.9),
                initial,
                data,
                model_state=model_state,
                epochs=int(epochs),
                batch_size=8,
                key=jax.random.key(1),
                directory=Path(directory),
                settings={},
                progress=progress,
                name="",
                mesh=mesh,
            )

        fitted = fit(objectives.adversarial(net, perturb.alpha, eps=0.3), (x, y), directory)
        step = partial(attack.pgd, steps=1, step_size=0.1, keep="last")
        remembering = objectives.with_memory(objectives.adversarial(net, step, eps=0.3))
        memory = objectives.Memory(jnp.zeros_like(x))
        kept = fit(remembering, (x, y, jnp.arange(N)), f"{directory}_kept", memory)
    images, key = parallel.spread(mesh, (x, y)), jax.random.key(2)
    attacks = {"loss": perturb.loss, "apgd": partial(attack.apgd, steps=5)}
    found = evaluate.attack_and_score(
        net, fitted.state.params, *images, attacks, eps=0.3, key=key, batch_size=20
    )
    robust = {
        name: evaluate.attack_and_score(
            net, fitted.state.params, *images, method, eps=0.3, key=key, batch_size=20
        ).outcome.robust
        for name, method in (("pgd", attack.pgd), ("virtual", perturb.vat))
    }

    def named(params, x):  # a net that names its sharding, where it may
        logits = net(params, x)
        if mesh is None or axes == "Explicit":
            return logits
        return jax.lax.with_sharding_constraint(logits, NamedSharding(mesh, PartitionSpec("data")))

    report = evaluate.check(
        named, fitted.state.params, *images, eps=0.3, key=key, steps=5, batch_size=20
    )
    certificate = certify.certify(
        named, fitted.state.params, *images, sigma=0.3, radii=(0.1,), stages=(200,), key=key
    )
    result = {
        "devices": jax.device_count() if mesh is None else mesh.size,
        "processes": jax.process_count(),
        "losses": [epoch["loss"] for epoch in fitted.history],
        "kept": np.asarray(kept.state.model_state.r).tolist(),
        "w": np.asarray(fitted.state.params[0]).tolist(),
        "robust": {name: mask.tolist() for name, mask in robust.items()},
        "several": found.outcome.robust.tolist(),
        "r": found.r.tolist(),
        "flags": [flag.name for flag in report.flags],
        "figures": report.figures,
        "radius": certificate.radius.tolist(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    # By default, the death of another process is noticed only after 100 s.
    jax.distributed.initialize = partial(jax.distributed.initialize, heartbeat_timeout_seconds=20)
    main(*sys.argv[1:])
