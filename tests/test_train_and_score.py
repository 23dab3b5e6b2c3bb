"""`experiments/lib/train_and_score.py`: nets trained by a recipe, scored and recorded."""

import dataclasses
import io
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console
from rows import table_row

from experiments.lib import data, options, recipes, records, train_and_score, training, weights
from experiments.lib.models import init, mlp
from experiments.lib.recipes import FewSteps, MultiStep, OneStep
from jaxadv import objectives

NET = mlp((6, 5))
SQUARES = data.Interface(data.DIGITS, (6, 6, 1), subtract=0, divide=1)
METHOD = recipes.Method((6, 5), 1, 0.1)


def task_of(methods, make_net=lambda _: NET, **more):
    """A task with forty small images, for both training and scoring."""
    x, y = jax.random.uniform(jax.random.key(2), (40, 6, 6, 1)), jnp.arange(40) % 10
    images = train_and_score.Images(x, y)
    return train_and_score.Task(
        "test", methods, METHOD, {}, make_net, lambda _: "6x5", images, images, "squares", SQUARES,
        **more,
    )  # fmt: skip


def test_training_shifts_images_if_the_method_says_so(tmp_path):
    trained = []
    for shift in (0, 1):
        method = MultiStep((6, 5), 1, 0.1, eps=0.7, steps=1, shift=shift)
        task = task_of({"lwa_noisy": method})
        settings = train_and_score.Settings(out=tmp_path / str(shift), batch_size=10, eval_batch=20)
        with training.bars(Console(file=io.StringIO())) as progress:
            net = train_and_score.train("lwa_noisy", method, 0, settings, task, progress)
        trained.append(jax.tree.leaves(net.params)[-1])
    assert not np.array_equal(*trained)


def test_the_final_state_of_a_method_with_a_memory_has_its_perturbations(tmp_path):
    method = FewSteps((6, 5), 2, 0.1, eps=0.7, memory=2, stride=0.6, shift=1)
    settings = train_and_score.Settings(out=tmp_path, batch_size=10, eval_batch=20)
    with training.bars(Console(file=io.StringIO())) as progress:
        net = train_and_score.train("kept", method, 0, settings, task_of({}), progress)
    r = net.fitted.state.model_state.r
    assert r.shape == (40, 6, 6, 1)
    sizes = np.linalg.norm(r.reshape(40, -1), axis=1)
    assert np.median(sizes) > 0.3  # the box limits some


def test_new_perturbations_replace_the_whole_of_the_old_ones_of_shifted_images():
    method = FewSteps((6, 5), 2, 0.1, eps=0.7, memory=2, shift=1)
    task = task_of({})
    made = train_and_score.prepare(method, train_and_score.Settings(batch_size=40), task)
    params = init(task.make_net(method), jax.random.key(0), task.train.x[:1])
    old = objectives.Memory(jnp.full(task.train.x.shape, 3.0))
    largest = []
    for step in (0, 1):  # epochs of one step
        _, (new, _) = made.objective(
            params, old, made.data, key=jax.random.key(0), step=jnp.int32(step)
        )
        largest.append(jnp.abs(new.r).max())
    assert largest[0] <= 0.7
    assert largest[1] == 3.0  # where the shift put a pixel out of the image


def test_a_step_with_a_memory_is_timed_without_drawing_new_perturbations(monkeypatch):
    method, task = FewSteps((6, 5), 2, 0.1, memory=2, noise=1.0), task_of({})
    settings, stepped = train_and_score.Settings(batch_size=10), []
    make_epoch = train_and_score.make_epoch

    def noted(*args):
        epoch = make_epoch(*args)
        return lambda state, *rest: stepped.append(int(state.step)) or epoch(state, *rest)

    monkeypatch.setattr(train_and_score, "make_epoch", noted)
    train_and_score.step_seconds({"kept": method}, settings, task, steps=2, rounds=2)
    assert stepped == 3 * [len(task.train.y) // 10]  # the first of an epoch that doesn't draw


def test_steps_of_every_method_are_timed_in_every_round():
    methods = {"one": OneStep((6, 5), 2, 0.1), "kept": FewSteps((6, 5), 2, 0.1, memory=2)}
    settings = train_and_score.Settings(batch_size=10)
    taken = train_and_score.step_seconds(methods, settings, task_of({}), steps=3, rounds=4)
    assert {name: times.shape for name, times in taken.items()} == {"one": (4,), "kept": (4,)}
    assert all((times > 0).all() for times in taken.values())


def test_the_fixed_sets_net_is_trained_once_for_equal_settings(tmp_path, monkeypatch):
    task = task_of({})
    settings = train_and_score.Settings(out=tmp_path, batch_size=10, eval_batch=20)
    trained = []
    train = train_and_score.train

    def counted(name, method, seed, *others):
        trained.append(seed)
        return train(name, method, seed, *others)

    monkeypatch.setattr(train_and_score, "train", counted)

    def fixed(**changes):
        shutil.rmtree(tmp_path / "checkpoints", ignore_errors=True)
        with training.bars(Console(file=io.StringIO())) as progress:
            changed = dataclasses.replace(settings, **changes)
            return train_and_score._make_fixed(changed, task, progress)[1.5].r

    first, again = fixed(), fixed()
    assert trained == [1000]
    np.testing.assert_array_equal(first, again)
    fixed(fixed_seed=7)
    fixed(fixed_seed=7, batch_size=20)
    assert trained == [1000, 7, 7]
    path = tmp_path / "fixed" / "params.safetensors"
    params = weights.load(path)
    del params["params"]["logits"]["bias"]
    weights.save(path, params, made=weights.made(path))
    with pytest.raises(ValueError, match=r"no params/logits/bias, which should be \[10\]"):
        fixed(fixed_seed=7, batch_size=20)


def test_a_record_keeps_earlier_rows_that_were_scored_with_the_same_settings(tmp_path):
    def row(method, seed=0, eps=1.5, run=1, **scored):
        settings = {"data": "squares", "holdout": 0, "n_eval": 10, "epochs": run, **scored}
        return table_row(method=method, seed=seed, eps=eps, settings=settings)

    others = [row("lwa", run=2), row("normal", seed=1), row("normal", eps=1.0)]
    elsewhere = [row("dropout", n_eval=9), row("dropout", data="circles"), row("dropout", n_pgd=1)]
    # A table averages over a method's seeds, so they must be trained with the same settings.
    otherwise = [row("normal", seed=2, run=2), row("lwa", seed=1)]
    rows = [row("normal")]
    assert train_and_score.record(tmp_path, rows) == rows
    known = [row("normal", run=3), *elsewhere, *others, *otherwise]
    records.save(tmp_path / "results.json", known)
    assert train_and_score.record(tmp_path, rows) == [*rows, *others]


def test_the_scored_weights_are_the_stored_ones(tmp_path):
    task = task_of({"normal": METHOD}, stored=jnp.float16)
    settings = train_and_score.Settings(out=tmp_path, batch_size=10, eval_batch=20, pgd_steps=2)
    (row,), nets = train_and_score.run(settings, task, Console(file=io.StringIO()))
    assert row.settings["weights"] == "float16"
    for name in ("normal", "fixed"):
        path = tmp_path / name / "params.safetensors"
        stored = jax.tree.leaves(weights.load(path))
        assert {leaf.dtype for leaf in stored} == {jnp.dtype(jnp.float16)}
    chex.assert_trees_all_equal(
        nets["normal"].params,
        weights.load(tmp_path / "normal" / "params.safetensors", jnp.float32),
        strict=True,
    )
    # The Fixed set is the same if its net is read from the file.
    with training.bars(Console(file=io.StringIO())) as progress:
        read = train_and_score._make_fixed(settings, task, progress)[1.5]
    assert read.accuracy == row.columns["fixed_source"]


def test_each_seed_keeps_its_weights_whatever_the_order_of_the_runs(tmp_path):
    task = task_of({"normal": METHOD})
    console = Console(file=io.StringIO())
    made = {}
    for seeds in ((2,), (1,), (1, 0), (2,)):
        settings = train_and_score.Settings(
            out=tmp_path, seed=seeds, batch_size=10, eval_batch=20, pgd_steps=1
        )
        for seed in seeds:
            one = dataclasses.replace(settings, seed=(seed,), out=tmp_path / "one by one")
            made[seed] = train_and_score.run(one, task, console)[1]["normal"].params
        train_and_score.run(settings, task, console)
        for seed, params in made.items():
            folder = tmp_path / "normal" / ("" if seed == min(made) else f"seed_{seed}")
            chex.assert_trees_all_equal(weights.load(folder / "params.safetensors"), params)
    assert len([*(tmp_path / "normal").rglob("*.safetensors")]) == len(made)


def test_a_run_keeps_the_rows_that_another_one_saves_meanwhile(tmp_path, monkeypatch):
    other, score = table_row(method="normal", seed=1), train_and_score.score

    def meanwhile(*args):
        records.put(tmp_path / "results.json", other, place=("seed",))
        return score(*args)

    monkeypatch.setattr(train_and_score, "score", meanwhile)
    settings = train_and_score.Settings(out=tmp_path, batch_size=10, eval_batch=20, pgd_steps=1)
    rows, _ = train_and_score.run(
        settings, task_of({"normal": METHOD}), Console(file=io.StringIO())
    )
    assert records.load(tmp_path / "results.json", records.TableRow) == [*rows, other]


@pytest.mark.parametrize(
    ("done", "killed", "then", "place"),
    [(2, 1, 1, "seed_2"), (2, 1, 0, "seed_2"), (1, 2, 1, "")],
    ids=["the same run again", "another seed", "a larger seed was killed"],
)
def test_a_run_killed_before_it_saves_its_weights_endangers_no_others(
    tmp_path, monkeypatch, done, killed, then, place
):
    def run(seed):
        settings = train_and_score.Settings(
            out=tmp_path, seed=(seed,), batch_size=10, eval_batch=20, pgd_steps=1
        )
        train_and_score.run(settings, task_of({"normal": METHOD}), Console(file=io.StringIO()))

    def kill(*_):
        raise KeyboardInterrupt

    run(done)
    before = (tmp_path / "normal" / "params.safetensors").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(train_and_score, "weights_path", kill)
        with pytest.raises(KeyboardInterrupt):
            run(killed)
    run(then)
    assert (tmp_path / "normal" / place / "params.safetensors").read_bytes() == before


def test_weights_that_do_not_say_their_seed_are_of_seed_0(tmp_path):
    path = tmp_path / "lwa" / "params.safetensors"
    weights.save(path, {"w": jnp.ones(2)})
    settings = train_and_score.Settings(out=tmp_path)
    places = [train_and_score.weights_path(settings, "lwa", seed) for seed in (0, 1)]
    assert places == [path, tmp_path / "lwa" / "seed_1" / path.name]


def test_a_row_of_another_fixed_set_is_scored_again(tmp_path):
    task = task_of({"normal": METHOD})
    settings = train_and_score.Settings(out=tmp_path, batch_size=10, eval_batch=20, pgd_steps=1)
    console = Console(file=io.StringIO())
    (first,), _ = train_and_score.run(settings, task, console)
    of_another = {**first.columns, "fixed": 1.0, "fixed_source": 1.0}
    records.save(tmp_path / "results.json", [dataclasses.replace(first, columns=of_another)])
    (row,), _ = train_and_score.run(settings, task, console)
    assert row.columns == first.columns


def test_the_description_of_a_net_names_another_precision():
    task = task_of({}, lambda method: mlp(method.widths))
    low = train_and_score.in_precision(task, "bfloat16")
    assert low.network(task.normal) == "6x5, bfloat16"
    assert low.make_net(task.normal).dtype == jnp.bfloat16
    assert train_and_score.in_precision(task, "float32") is task


def test_a_net_split_above_its_last_layer_is_refused_before_any_training(tmp_path, monkeypatch):
    monkeypatch.setattr(train_and_score, "train", pytest.fail)
    task = task_of({"lwa_rep": recipes.Method((), 1, 0.1)}, lambda m: mlp(m.widths, split=1))
    with pytest.raises(options.UsageError, match=r"at least 1 blocks .*, got 0; .*--.*\.widths"):
        train_and_score.run(
            train_and_score.Settings(out=tmp_path), task, Console(file=io.StringIO())
        )


def test_another_commands_rows_in_the_folder_are_an_error(tmp_path):
    records.save(tmp_path / "results.json", [{"experiment": "benchmark", "part": "steps"}])
    with pytest.raises(
        options.UsageError, match=r"of the same command in .*, got some without network; move"
    ):
        train_and_score.record(tmp_path, [])
