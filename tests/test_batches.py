"""Evaluations that are stored batch by batch, resumed, and watched."""

import dataclasses
import functools
import itertools
import json
import os
import subprocess
import sys
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxadv import attack, evaluate
from jaxadv.evaluate import _batches

N, D, K = 23, 5, 4
KEY = jax.random.key(2)
ATTACKS = {
    "weak": functools.partial(attack.pgd, steps=2),
    "apgd": functools.partial(attack.apgd, steps=8),
    "square": functools.partial(attack.square, steps=9),
}


class Stopped(Exception):
    """Raised in the middle of an evaluation."""


def net(params, x):
    w, v = params
    return jnp.tanh(x @ w) @ v


def problem():
    rng = np.random.default_rng(1)
    params = tuple(rng.normal(size=shape).astype(np.float32) for shape in ((D, 9), (9, K)))
    x = rng.normal(size=(N, D)).astype(np.float32)
    y = np.asarray(net(params, x)).argmax(axis=1)
    y[3] = (y[3] + 1) % K
    return params, x, y


def ensemble(apply_fn=net, attacks=ATTACKS, eps=0.4, norm="l2", seed=2, batch_size=8, **kwargs):
    params, x, y = kwargs.pop("of", problem())
    kwargs = {"bounds": (-5.0, 5.0), **kwargs}
    return evaluate.attack_and_score(
        apply_fn, params, x, y, attacks, eps=eps, norm=norm, key=jax.random.key(seed),
        batch_size=batch_size, **kwargs,
    )  # fmt: skip


def single(**kwargs):
    return ensemble(attacks=ATTACKS["apgd"], **kwargs)


def distances(batch_size=8, **kwargs):
    # Over many steps, FMN amplifies rounding error, which depends on the size of batches.
    attacks = {name: functools.partial(getattr(attack, name), steps=9) for name in ("ddn", "fmn")}
    return evaluate.distances(net, *problem(), attacks=attacks, batch_size=batch_size, **kwargs)


def results(found):
    """The results except times."""
    if isinstance(found, evaluate.Distances):
        return found.size, found.r, found.passes
    stages = [stage._replace(seconds=0) for stage in found.stages.values()]
    return found.outcome, found.r, stages


def stop_after(batches):
    """A callback that stops an evaluation after this many batches."""
    seen = []

    def progress(at):
        seen.append(at)
        if len(seen) == batches:
            raise Stopped

    return progress


# Stored and resumed


@pytest.mark.parametrize("run", [ensemble, single, distances])
def test_an_interrupted_evaluation_resumes_where_it_stopped(run, tmp_path):
    seen = []
    whole = run(progress=seen.append)
    for batches in range(1, len(seen) + 1):
        store = tmp_path / str(batches)
        with pytest.raises(Stopped):
            run(store=store, progress=stop_after(batches))
        rest = []
        chex.assert_trees_all_equal(results(run(store=store, progress=rest.append)), results(whole))
        assert rest == seen[batches:]


@pytest.mark.parametrize("run", [ensemble, distances])
def test_batches_stored_at_one_batch_size_serve_another(run, tmp_path):
    whole = run()
    with pytest.raises(Stopped):
        run(store=tmp_path, progress=stop_after(3))
    before = {path: path.read_bytes() for path in tmp_path.glob("*.npz")}
    found = run(store=tmp_path, batch_size=5)
    chex.assert_trees_all_close(found.r, whole.r, rtol=0, atol=3e-6)  # 4e-7 were seen
    assert len(before) == 3
    assert before == {path: path.read_bytes() for path in before}


def test_a_batch_that_was_being_written_is_computed_again(tmp_path):
    whole = ensemble(store=tmp_path)
    last = sorted(tmp_path.glob("*.npz"))[-1]
    last.rename(last.with_suffix(".unfinished"))
    chex.assert_trees_all_equal(results(ensemble(store=tmp_path)), results(whole))


def test_a_damaged_batch_is_named(tmp_path):
    ensemble(store=tmp_path)
    damaged = sorted(tmp_path.glob("*.npz"))[1]
    damaged.write_bytes(damaged.read_bytes()[:99])
    with pytest.raises(ValueError, match=rf"expected arrays in {damaged}, got: .*; delete this"):
        ensemble(store=tmp_path)
    damaged.unlink()
    ensemble(store=tmp_path)


def test_bfloat16_results_are_stored_too(tmp_path):
    params, x, y = problem()
    of = jax.tree.map(jnp.asarray, (params, x.astype(jnp.bfloat16), y))
    whole = single(of=of, eps=0.5, store=tmp_path)
    again = single(of=of, eps=0.5, store=tmp_path)
    chex.assert_trees_all_equal(again.r, whole.r)
    assert again.r.dtype == whole.r.dtype == jnp.bfloat16


def altered(part):
    params, x, y = problem()
    if part == "params":
        params = params[0], params[1] + 1e-6
    elif part == "x":
        x = x + np.float32(1e-6)
    else:
        y = np.roll(y, 1)
    return params, x, y


OTHERS = {
    "params": {"of": altered("params")},
    "x": {"of": altered("x")},
    "y": {"of": altered("y")},
    "eps": {"eps": 0.5},
    "norm": {"norm": "linf", "attacks": {"l": functools.partial(attack.pgd, norm="linf")}},
    "attacks": {"attacks": {**ATTACKS, "weak": functools.partial(attack.pgd, steps=3)}},
    "key": {"seed": 3},
    "source": {"source": (net, problem()[0])},
    "kind": {},
    "apply_fn": {"apply_fn": lambda params, x: net(params, x) + 1e-6 * x[:, :4]},
}


@pytest.mark.parametrize("field", OTHERS)
def test_a_store_of_another_evaluation_is_refused(field, tmp_path):
    if field == "kind":
        distances(store=tmp_path)
    else:
        ensemble(store=tmp_path)
    with pytest.raises(ValueError, match=rf"same evaluation as in store=.*, got other .*{field}"):
        ensemble(store=tmp_path, **OTHERS[field])


def test_equal_labels_and_bounds_of_other_dtypes_are_the_same_evaluation(tmp_path):
    params, x, y = problem()
    wide = params, x, np.asarray(y, np.int64)
    ensemble(store=tmp_path, of=(params, x, np.asarray(y, np.int32)), bounds=(-9.0, 9.0))
    ensemble(store=tmp_path, of=wide, bounds=(-9, 9), progress=pytest.fail)


@pytest.mark.parametrize("damage", ["cut", "other", "missing", "file"])
def test_a_folder_that_does_not_say_which_evaluation_it_holds_is_refused(damage, tmp_path):
    store = tmp_path / "store"
    if damage == "file":
        store.write_text("")
    else:
        ensemble(store=store)
        place = store / "evaluation.json"
        if damage == "missing":
            place.unlink()
        else:
            place.write_text("{}" if damage == "other" else place.read_text()[:40])
    message = "a folder, got the file" if damage == "file" else "which evaluation .*; delete the fo"
    with pytest.raises(ValueError, match=message):
        ensemble(store=store)


def test_a_store_tells_nets_apart_that_capture_their_weights(tmp_path):
    params, *_ = problem()

    def capturing(params):
        return lambda _, x: net(params, x)

    ensemble(store=tmp_path, apply_fn=capturing(params))
    ensemble(store=tmp_path, apply_fn=capturing(params), progress=pytest.fail)
    moved = jax.tree.map(lambda leaf: leaf * (1 + 1e-6), params)
    with pytest.raises(ValueError, match="got other apply_fn; choose"):
        ensemble(store=tmp_path, apply_fn=capturing(moved))


@pytest.mark.parametrize(("change", "same"), [(1e-3, True), (1e-1, False), (np.nan, False)])
def test_a_store_whose_net_gave_other_logits_is_refused(change, same, tmp_path):
    def small(params, x):
        return 1e-5 * net(params, x)

    ensemble(store=tmp_path, apply_fn=small)
    described = tmp_path / "evaluation.json"
    kept = json.loads(described.read_text())
    logits = np.array(kept["logits"])
    logits[0, 0] += change * np.abs(logits).max()
    described.write_text(json.dumps({**kept, "logits": logits.tolist()}))
    if same:  # rounded otherwise
        ensemble(store=tmp_path, apply_fn=small)
    else:
        with pytest.raises(ValueError, match="got other logits of the first examples; choose"):
            ensemble(store=tmp_path, apply_fn=small)


def shift(size):
    """A user's attack, which differs from others of the same name only in what it captures."""

    def method(apply_fn, params, x, y, /, *, eps, key=None, bounds=None):
        return jnp.zeros_like(x).at[:, 0].set(size)

    return method


@pytest.mark.parametrize(
    "others",
    [
        {"b": shift(0.2), "a": shift(0.1)},  # in another order
        {"a": shift(0.1), "b": shift(0.3)},
        {"a": shift(0.1), "b": functools.partial(attack.pgd, steps=2)},
    ],
)
def test_a_store_tells_users_own_attacks_apart(others, tmp_path):
    ensemble(attacks={"a": shift(0.1), "b": shift(0.2)}, store=tmp_path)
    ensemble(attacks={"a": shift(0.1), "b": shift(0.2)}, store=tmp_path, progress=pytest.fail)
    with pytest.raises(ValueError, match="got other attacks; choose"):
        ensemble(attacks=others, store=tmp_path)


class Moves:
    """A user's attack as an object of an ordinary class."""

    def __init__(self, size):
        self.size = size
        self.own = self  # as objects that know each other have it

    def __call__(self, apply_fn, params, x, y, /, *, eps, key=None, bounds=None):
        return jnp.full_like(x, self.size)


@dataclasses.dataclass(frozen=True)
class Halves:
    size: float

    def __call__(self, apply_fn, params, x, y, /, *, eps, key=None, bounds=None):
        return jnp.full_like(x, self.size / 2)


class Thirds(Halves):
    def __call__(self, apply_fn, params, x, y, /, *, eps, key=None, bounds=None):
        return jnp.full_like(x, self.size / 3)


Thirds.__name__ = "Halves"


class Named(NamedTuple):
    size: float


class Renamed(NamedTuple):
    size: float


def callable_tuple(sign):
    class Called(NamedTuple):
        size: float

        def __call__(self, x):
            return x if sign else -x

    return Called(0.1)


def with_jitted(sign):
    class Jitted(Moves):
        @functools.partial(jax.jit, static_argnums=0)
        def __call__(self, x):
            return x if sign else -x

        @property
        def half(self):
            return 0.5

    return Jitted(0.1)


def in_a_set(size):
    made = Moves(size)
    made.own = {made}
    return made


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (lambda: Moves(0.1), lambda: Moves(0.2)),
        (lambda: Moves(0.1).__call__, lambda: Moves(0.2).__call__),
        (lambda: jax.jit(shift(0.1)), lambda: jax.jit(shift(0.2))),
        (lambda: lambda x: jax.grad(lambda z: z)(x), lambda: lambda x: jax.grad(lambda z: -z)(x)),
        (lambda: Halves(0.1), lambda: Halves(0.2)),
        (lambda: Halves(0.1), lambda: Thirds(0.1)),
        (lambda: Helped(0.1), lambda: HelpedOtherwise(0.1)),
        (lambda: Named(0.1), lambda: Renamed(0.1)),
        (lambda: callable_tuple(True), lambda: callable_tuple(False)),
        (lambda: with_jitted(True), lambda: with_jitted(False)),
        (lambda: in_a_set(0.1), lambda: in_a_set(0.2)),
        (lambda: Moves([shift(0.1)]), lambda: Moves([shift(0.2)])),
        (lambda: Moves({"a": shift(0.1)}), lambda: Moves({"a": shift(0.2)})),
        (lambda: Moves([np.zeros(2000)]), lambda: Moves([np.eye(1, 2000, 1000)[0]])),
    ],
    ids=[
        *("object", "method", "jitted", "function inside", "dataclass", "code of a dataclass"),
        *("method called", "tuples with names", "tuple with code", "jitted method", "cycle"),
        *("list", "dict", "long array in a list"),
    ],
)
def test_attacks_that_differ_are_described_differently(one, other):
    assert _batches.described(one()) == _batches.described(one())
    assert _batches.described(one()) != _batches.described(other())


SIZES = np.full(D, 0.1)


weakly = functools.partial(attack.pgd, steps=1)
this = sys.modules[__name__]


def scaled(x):
    return jnp.broadcast_to(SIZES, x.shape)


def turned(x):
    return -x


class Same:
    def of(self, x):
        return x


class Twice:
    def of(self, x):
        return 2 * x


Twice.__qualname__ = "Same"


def through_a_helper(apply_fn, params, x, y, /, *, eps, key=None, bounds=None):
    r = weakly(apply_fn, params, x, y, eps=eps, key=key, bounds=bounds)
    return this.turned(Same().of(r)) + jax.vmap(lambda row: scaled(row[None])[0])(x)


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("SIZES", np.full(D, 0.2)),
        ("scaled", lambda x: 2 * jnp.ones_like(x)),
        ("weakly", functools.partial(attack.pgd, steps=2)),
        ("turned", lambda x: 2 * x),
        ("Same", Twice),
    ],
)
def test_the_globals_that_an_attack_uses_belong_to_its_description(name, other, monkeypatch):
    before = _batches.described(through_a_helper)
    assert before == _batches.described(through_a_helper)
    monkeypatch.setitem(globals(), name, other)
    assert _batches.described(through_a_helper) != before


def test_what_attacks_share_is_described_once():
    calls = []

    class Counted:
        def __init__(self):
            self.calls = calls

        def __repr__(self):
            calls.append(0)
            return "counted"

    layers = [Counted()]
    for _ in range(30):
        layers = [lambda x, below=layers: [of(x) for of in below] for _ in range(2)]
    _batches.described(layers[0])
    assert len(calls) == 1


class Helped(Moves):
    def __call__(self, apply_fn, params, x, y, /, *, eps, key=None, bounds=None):
        return self.moved(x)

    def moved(self, x):
        return jnp.full_like(x, self.size)


class HelpedOtherwise(Helped):
    def moved(self, x):
        return -jnp.full_like(x, self.size)


HelpedOtherwise.__name__ = "Helped"


def test_parameters_with_functions_in_their_structure_are_stored_and_found():
    # In a new process, the function is at another address.
    one, other = (jax.tree_util.Partial(shift(0.1), jnp.ones(2)) for _ in range(2))
    assert jax.tree.structure(one) != jax.tree.structure(other)
    assert _batches._digest(one) == _batches._digest(other)


def test_a_description_is_the_same_in_each_process():
    code = (
        "from functools import partial\nfrom jaxadv.evaluate import _batches\n"
        "def attack(norm, norms=()):\n    return norm in {'l1', 'l2', 'linf', 'l0'}\n"
        "print(_batches.described(partial(attack, norms={'l1', 'l2', 'linf', 'l0'})))"
    )
    said = {
        subprocess.run(
            [sys.executable, "-c", code], env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True, text=True, check=True,
        ).stdout
        for seed in "123"
    }  # fmt: skip
    assert len(said) == 1


def test_a_store_tells_sources_without_parameters_apart(tmp_path):
    ensemble(store=tmp_path, source=(lambda params, x: x[:, :4], None))
    with pytest.raises(ValueError, match="got other source"):
        ensemble(store=tmp_path, source=(lambda params, x: 2 * x[:, :4], None))


def test_refused_arguments_leave_no_store(tmp_path):
    store = tmp_path / "store"
    for wrong in ({"eps": -1.0}, {"attacks": {"a": functools.partial(attack.pgd, steps=-1)}}):
        with pytest.raises(ValueError, match="expected"):
            ensemble(store=store, **wrong)
    assert not store.exists()


@pytest.mark.parametrize("package", ["jax", "jaxadv"])
def test_a_store_of_another_version_is_refused(package, tmp_path):
    ensemble(store=tmp_path)
    described = tmp_path / "evaluation.json"
    kept = json.loads(described.read_text())
    described.write_text(json.dumps({**kept, package: "0.0.1"}))
    with pytest.raises(ValueError, match=f"got other {package}; choose another folder"):
        ensemble(store=tmp_path)


# How examples are split


@given(st.integers(0, 3000), st.integers(1, 600))
def test_batches_hold_every_index_once_at_the_lowest_cost(n, batch_size):
    rows = 7 * np.arange(n)
    sizes = [max(1, batch_size // part) for part in (1, 8, 64)]
    overhead = batch_size // 80
    batches = _batches.split(rows, sizes, overhead)
    np.testing.assert_array_equal(np.concatenate([rows[:0], *(part for part, _ in batches)]), rows)
    assert all(0 < len(part) <= size for part, size in batches)
    assert {size for _, size in batches} <= set(sizes)
    # Padding is at most an eighth of a batch.
    assert sum(size for _, size in batches) - n <= batch_size // 8
    cost = sum(size + overhead for _, size in batches)
    for only in sizes:
        assert cost <= -(-n // only) * (only + overhead)


def test_a_few_remaining_examples_use_small_batches():
    for n, expected in [(14, [7, 7]), (71, [62, 7, 7]), (40, [62]), (450, [500])]:
        batches = _batches.split(np.arange(n), (500, 62, 7), 6)
        assert [size for _, size in batches] == expected


# Progress and passes


def test_progress_is_reported_after_each_batch():
    seen = []
    stages = ensemble(progress=seen.append).stages
    for name, stage in stages.items():
        own = [at for at in seen if at.attack == name]
        assert own[-1].done == own[-1].of == stage.tried.sum()
        assert own[-1].fooled == stage.fooled.sum()
        assert all(before.done < after.done for before, after in itertools.pairwise(own))
    assert list(dict.fromkeys(at.attack for at in seen)) == list(stages)


def test_passes_are_charged_for_each_example_and_executed_for_whole_batches():
    pgd = ensemble(attacks={"pgd": ATTACKS["weak"]}).stages["pgd"]
    square = ensemble(attacks={"square": ATTACKS["square"]}, eps=1.2).stages["square"]
    assert pgd.tried.sum() == N - 1
    # Gradients at x and at one more point, a forward pass at the last point, and the check.
    np.testing.assert_array_equal(pgd.passes.forward, np.where(pgd.tried, 4, 0))
    np.testing.assert_array_equal(pgd.passes.backward, np.where(pgd.tried, 2, 0))
    # Batches of 8, 8 and six times 1 rows.
    assert pgd.executed == (22 * 4, 22 * 2)
    # x, the start, 9 queries and the check; fewer where it succeeds.
    assert square.passes.forward.max() == 12
    assert square.passes.forward[square.fooled].min() < 12
    np.testing.assert_array_equal(square.passes.forward > 0, square.tried)
    assert square.executed.forward >= square.passes.forward.sum()
    assert square.executed.backward == 0


def test_an_attack_that_does_not_count_has_no_passes():
    def shift(apply_fn, params, x, y, /, *, eps, key=None, bounds=None):
        return jnp.zeros_like(x).at[:, 0].set(eps)

    stage = ensemble(attacks={"shift": shift}).stages["shift"]
    assert stage.passes is None
    assert stage.executed is None


# Audits


def test_an_audit_runs_autoattack_on_a_share_of_the_examples(tmp_path):
    weak = {"weak": functools.partial(attack.pgd, steps=1)}
    found = ensemble(attacks=weak, eps=0.6, audit=0.25, store=tmp_path)
    audit = found.audit
    assert audit.rows.tolist() == [0, 3, 7, 11, 15, 19]
    params, x, y = problem()
    alone = evaluate.attack_and_score(
        net, params, x[audit.rows], y[audit.rows], eps=0.6, bounds=(-5.0, 5.0), batch_size=8,
        key=jax.random.split(KEY, N)[audit.rows],
    )  # fmt: skip
    np.testing.assert_array_equal(audit.robust, alone.outcome.robust)
    np.testing.assert_array_equal(audit.result.r, alone.r)
    ours = found.outcome.robust[audit.rows]
    assert audit.difference == ours.mean() - audit.robust.mean()
    assert audit.interval == evaluate.compare(ours, audit.robust).interval
    assert list(audit.result.stages) == list(evaluate.autoattack("l2"))
    again = ensemble(attacks=weak, eps=0.6, audit=0.25, store=tmp_path, progress=pytest.fail)
    chex.assert_trees_all_equal(again.audit.robust, audit.robust)


@pytest.mark.parametrize("audit", [-0.1, 1.1])
def test_an_audit_must_be_a_share(audit):
    with pytest.raises(ValueError, match=r"expected audit in 0\.\.1, got"):
        ensemble(audit=audit)


@pytest.mark.parametrize("audit", [0.07, 0.13, 0.99, 1.0])
def test_an_audit_takes_no_row_twice_and_none_that_is_not_there(audit):
    params, x, y = problem()
    many = params, np.resize(x, (100, D)), np.resize(y, 100)
    rows = ensemble(attacks={"a": shift(0.0)}, of=many, audit=audit, eps=1e-6).audit.rows
    assert len(rows) == len(set(rows)) == round(100 * audit)
    assert rows.max() < 100


def test_an_audit_that_can_not_run_is_refused_before_anything_runs():
    with pytest.raises(TypeError, match="expected eps to be a number"):
        ensemble(attacks={"fmn": attack.fmn}, eps=None, audit=0.5, progress=pytest.fail)


def test_progress_must_be_a_function():
    with pytest.raises(TypeError, match="expected progress to be a function, got int"):
        ensemble(progress=3)


def test_a_class_masked_by_a_finite_logit_hides_no_difference():
    z, other = np.array([[3.0, -3, -1e9]]), np.array([[-3.0, 3, -1e9]])
    assert _batches.apart(z, other) == 2
    assert _batches.apart(z, z + np.array([[0, 0, 64]])) == 64 / 1e9  # relative to its own size
    assert _batches.apart(z[:, :2], z[:, :2] + 1e-6) == pytest.approx(1e-6 / 3)
    assert _batches.apart(np.array([[np.nan]]), np.array([[1.0]])) == np.inf
