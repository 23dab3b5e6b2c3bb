"""`experiments/evaluate.py`: robust accuracy of saved weights and of users' functions."""

import dataclasses
import importlib
import io
import itertools
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from rich.progress import Progress

from experiments.lib import (
    attacks,
    data,
    evaluation,
    models,
    options,
    problems,
    records,
    weights,
)
from jaxadv import certify

RECORD = Path(__file__).resolve().parents[1] / "experiments" / "results" / "mnist_mlp"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Grey 8x8 squares in two classes, darker and lighter than one half."""
    return squares(tmp_path_factory.mktemp("squares"), 6, dark=60, light=190)


def squares(place, n, **levels):
    """Write grey 8x8 squares, n for each class, each lighter than the one before."""
    for part, (name, level) in itertools.product(("train", "test"), levels.items()):
        (place / part / name).mkdir(parents=True)
        for i in range(n):
            Image.new("L", (8, 8), level + 5 * i).save(place / part / name / f"{i}.png")
    return place


@pytest.fixture(autouse=True)
def own_module(tmp_path, monkeypatch):
    """A module in a new working directory."""
    (tmp_path / "brightness.py").write_text(
        "import jax.numpy as jnp\n"
        "def apply_fn(params, x):\n"
        "    half = 0.5 if params is None else params['at']\n"
        "    light = x.reshape(len(x), -1).mean(axis=1) - half\n"
        "    return jnp.stack([-light, light], axis=1)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))


def load(net, data="mnist", **options):
    return problems.load(problems.Settings(net, data=str(data), **options))


def run(folder, **kwargs):
    settings = evaluation.Settings(
        "brightness:apply_fn", data=str(folder), attacks=("one-step", "pgd"), eps=(1.0,), n=100,
        batch_size=4, out=Path("out"),
    )  # fmt: skip
    settings = dataclasses.replace(settings, **kwargs)
    return evaluation.run(settings, Console(file=io.StringIO()))


# Images and nets


def test_saved_weights_are_recognised(tmp_path):
    net = models.vgg((32, 32), width=1 / 32)
    x = jax.random.normal(jax.random.key(1), (2, 28, 28, 3))
    params = models.init(net, jax.random.key(0), x)
    weights.save(tmp_path / "run" / "lwa" / "params.safetensors", params)
    settings = problems.Settings(str(tmp_path / "run" / "lwa" / "params.safetensors"))
    apply_fn, loaded, _, classes = problems.load_net(settings, x[:1])
    assert classes == 10
    np.testing.assert_array_equal(apply_fn(loaded, x), models.function(net)(params, x))


def test_committed_weights_have_the_accuracy_of_their_record():
    problem = load(str(RECORD / "lwa" / "params.safetensors"), n=300)
    assert problem.identity["network"] == "500x500"
    assert problem.identity["method"] == "mnist_mlp/lwa"
    assert problem.bounds == (0, 1)
    mnist = data.mnist()
    np.testing.assert_array_equal(problem.x, data.MNIST.inputs(mnist.test_images[:300]))
    right = np.asarray(problem.apply_fn(problem.params, problem.x)).argmax(axis=1) == problem.y
    assert right.mean() > 0.98


def test_images_are_cropped_and_scaled_and_so_is_their_box(folder):
    scale = {"subtract": 51.0, "divide": 255.0, "crop": 4}
    problem = load("brightness:apply_fn", folder, **scale)
    assert problem.x.shape == (12, 4, 4, 1)
    want = [(level + 5 * i - 51) / 255 for level in (60, 190) for i in range(6)]
    np.testing.assert_allclose(np.sort(problem.x[:, 0, 0, 0]), want, rtol=1e-6)
    assert problem.bounds == (-0.2, 0.8)
    assert load("brightness:apply_fn", folder, **scale, box=False).bounds is None
    whole = load("brightness:apply_fn", folder)
    assert whole.x.shape == (12, 8, 8, 1)
    assert whole.bounds == (0, 1)
    np.testing.assert_array_equal(whole.y, whole.x.mean(axis=(1, 2, 3)) > 0.5)


def test_a_users_function_gets_its_weights_as_a_tree(tmp_path, folder):
    weights.save(Path("w.safetensors"), {"at": jnp.asarray(0.9)})
    settings = problems.Settings("brightness:apply_fn", weights=Path("w.safetensors"))
    apply_fn, params, name, classes = problems.load_net(
        settings, np.zeros((1, 8, 8, 1), np.float32)
    )
    assert classes == 2
    assert name == "brightness:apply_fn"
    assert apply_fn(params, jnp.full((1, 2), 0.7)).argmax() == 0


# The interface that weights record


SQUARES = data.Interface(("dark", "light"), (8, 8, 1), subtract=0, divide=255)


def saved(interface=SQUARES, classes=2, at=Path("run/net/params.safetensors")):
    """Save a net of 8x8 images; return the path."""
    net = models.mlp((4,)).clone(classes=classes)
    params = models.init(net, jax.random.key(3), jnp.zeros((1, 8, 8, 1)))
    weights.save(at, params, interface=interface)
    return str(at)


@pytest.fixture
def three(tmp_path):
    """Squares in three classes."""
    return str(squares(tmp_path / "three", 1, dark=60, light=190, white=255))


@pytest.fixture
def renamed(tmp_path):
    """The squares under other names, which sort as light, night."""
    return str(squares(tmp_path / "renamed", 6, night=60, light=190))


def test_a_net_of_two_classes_on_data_of_three_is_an_error(three):
    message = r"expected 2 classes, .* got 3 from the data \(dark, light, white\); .*--classes"
    for net in (saved(interface=None), "brightness:apply_fn"):
        with pytest.raises(ValueError, match=message):
            load(net, three)


def test_classes_that_the_weights_dont_name_are_an_error(three, renamed):
    net = saved()
    for place, listed in ((three, "dark, light, white"), (renamed, "light, night")):
        message = rf"of the data \({listed}\) to be among the 2 of the net \(dark, light\)"
        with pytest.raises(ValueError, match=message):
            load(net, place)


def test_class_names_assign_the_logits_to_classes(folder):
    usual = load(saved(), folder)
    turned = saved(SQUARES._replace(classes=("light", "dark")))
    problem = load(turned, folder)
    np.testing.assert_array_equal(problem.y, 1 - usual.y)
    np.testing.assert_array_equal(problem.x, usual.x)


def test_classes_gives_the_nets_classes_the_datas_names(folder, renamed):
    usual = load(saved(), folder)
    for net in (saved(), saved(interface=None)):
        problem = load(net, renamed, classes=("night", "light"))
        dark = problem.x.mean(axis=(1, 2, 3)) < 0.5
        np.testing.assert_array_equal(problem.y, np.where(dark, 0, 1))
        assert sorted(problem.y) == sorted(usual.y)
    rows = run(renamed, net=saved(), classes=("night", "light"), attacks=("one-step",))
    assert rows[0].classes == ["night", "light"]
    assert (
        "- run/net: the classes that its weights call dark, light were taken for the data's night, "
        "light." in evaluation.as_markdown(rows)
    )


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (("night", "night"), r"--classes to be different values, got night night"),
        (("night",), r"data \(light, night\) to be among the 1 of the net \(night\)"),
        (
            ("night", "light", "day"),
            r"expected 2 classes, .* got 3 from --classes \(night, light, day",
        ),
    ],
    ids=["one twice", "too few", "too many"],
)
def test_classes_must_be_one_different_name_for_each_class(renamed, classes, message):
    with pytest.raises(ValueError, match=message):
        load(saved(), renamed, classes=classes)


def test_classes_of_the_net_that_the_data_lacks_are_reported(folder):
    net = saved(SQUARES._replace(classes=("black", "dark", "light")), classes=3)
    rows = run(folder, net=net, attacks=("one-step",))
    assert "- run/net: the data has no images of its classes black." in evaluation.as_markdown(rows)


def test_images_are_scaled_as_the_weights_say(folder):
    small = SQUARES._replace(shape=(4, 4, 1), subtract=51, divide=204, crop=4)
    net = models.mlp((4,)).clone(classes=2)
    params = models.init(net, jax.random.key(3), jnp.zeros((1, 4, 4, 1)))
    weights.save(Path("small.safetensors"), params, interface=small)
    recorded = load("small.safetensors", folder, box=False)
    options = {"box": False, "subtract": 51.0, "divide": 204.0, "crop": 4}
    given = load("brightness:apply_fn", folder, **options)
    np.testing.assert_array_equal(recorded.x, given.x)
    assert recorded.bounds == given.bounds
    assert {name: recorded.identity[name] for name in options} == options
    load("small.safetensors", folder, **options)
    with pytest.raises(
        ValueError, match=r"\(pixels - 51\) / 204 of the middle 4x4, got --subtract "
    ):
        load("small.safetensors", folder, subtract=0.0, box=False)


def test_images_are_resized_as_the_weights_say(folder):
    resized = load(saved(SQUARES._replace(resize=8)), folder)  # 8x8 already
    np.testing.assert_array_equal(resized.x, load(saved(), folder).x)
    with pytest.raises(ValueError, match=r"255, resized to 8x8, got --resize 9; leave"):
        load(saved(SQUARES._replace(resize=8)), folder, resize=9)
    net = models.mlp((4,)).clone(classes=2)
    params = models.init(net, jax.random.key(3), jnp.zeros((1, 4, 4, 1)))
    small = SQUARES._replace(shape=(4, 4, 1))
    for resize in (4, None):
        weights.save(Path("small.safetensors"), params, interface=small._replace(resize=resize))
        problem = load("small.safetensors", folder, resize=4)
        assert problem.identity["data"].endswith(", resized to 4x4")
        assert problem.x.shape[1:] == (4, 4, 1)
    weights.save(Path("said.safetensors"), params, interface=small._replace(resize=4))
    np.testing.assert_array_equal(load("said.safetensors", folder).x, problem.x)
    with pytest.raises(ValueError, match=r"4x4x1, as the weights record, got 8x8x1; .* --resize N"):
        load("small.safetensors", folder)


def test_a_note_says_if_every_fifth_image_was_held_out(folder):
    for place in (Path(folder, "test"), Path(folder)):
        for net in (saved(), saved(interface=None)):
            notes = load(net, str(place)).identity.get("notes", [])
            assert ("every fifth image of each class is held" in " ".join(notes)) == (
                place.name == "test"
            )


def test_a_note_warns_of_a_folder_that_has_changed_since_the_training(folder):
    whole = Path(folder, "test")  # has no folder test, so that some of its images are held out
    images = data.fingerprint(data.named(str(whole)))
    params = weights.load(Path(saved()))
    for taught, place, warned in (
        (images, whole, False), ("crc32 00000000", whole, True), ("crc32 00000000", folder, False),
    ):  # fmt: skip
        weights.save(Path("said.safetensors"), params, made={"images": taught})
        notes = load("said.safetensors", str(place)).identity.get("notes", [])
        assert ("training images may be among the test images" in " ".join(notes)) == warned


def test_the_interface_recorded_with_a_users_functions_weights_is_used_too(folder):
    turned = SQUARES._replace(classes=("light", "dark"), divide=204)
    weights.save(Path("w.safetensors"), {"at": jnp.asarray(0.5)}, interface=turned)
    problem = load("brightness:apply_fn", folder, weights=Path("w.safetensors"), box=False)
    assert problem.identity["divide"] == 204
    np.testing.assert_array_equal(problem.y, problem.x.mean(axis=(1, 2, 3)) < 0.5)


def test_all_contradictions_of_the_weights_are_in_one_error(three):
    net = saved(SQUARES._replace(shape=(9, 9, 1)))
    message = (
        r"scaled as the weights record, \(pixels - 0\) / 255, got --divide 256 --crop 7; leave .*\n"
        r"expected images of 9x9x1, as the weights record, got 7x7x1; choose others, .* resize .*\n"
        r"expected the 3 classes of the data \(dark, light, white\) to be among the 2 of the net"
    )
    with pytest.raises(ValueError, match=message):
        load(net, three, divide=256.0, crop=7)


def test_a_crop_to_the_whole_image_is_recorded_as_none(folder):
    problem = load(saved(), folder, crop=8)
    assert problem.identity["crop"] is None


def test_weights_without_an_interface_are_evaluated_with_the_default_one():
    identity = load(str(RECORD / "lwa" / "params.safetensors")).identity
    assert list(identity) == [
        "experiment", "method", "network", "weights", "data", "subtract", "divide", "crop", "box",
        "n",
    ]  # fmt: skip
    assert (identity["subtract"], identity["divide"], identity["crop"]) == (0, 256, None)


# Runs


def test_each_attack_is_reported_with_its_interval_and_counts(folder):
    rows = run(folder)
    assert [row.to_json() for row in rows] == json.loads(Path("out/results.json").read_text())
    assert [row.attack for row in rows] == ["one-step", "pgd"]
    for row in rows:
        # Size 1 in l2 over 64 pixels moves the mean by 1/8 = 32/255: no square crosses 1/2.
        assert row.columns == {"clean": 1, "robust": 1}
        assert row.interval[0] < 1 == row.interval[1]
        assert row.n == 12
        assert row.counts["nonfinite"] == 0


def test_at_a_larger_size_the_attack_succeeds_where_the_boundary_is_in_reach(folder):
    (row,) = run(folder, attacks=("pgd",), eps=(2.0,))
    # Size 2 moves the mean by 2/8, which is 64 of the pixels' 255 levels.
    levels = np.array([level + 5 * i for level in (60, 190) for i in range(6)])
    reach = np.abs(levels - 127.5) <= 2 / 8 * 255
    assert row.columns["robust"] == 1 - reach.mean()
    x = load("brightness:apply_fn", folder).x
    near = np.abs(255 * x.mean(axis=(1, 2, 3)) - 127.5) <= 2 / 8 * 255
    np.testing.assert_array_equal(row.verdicts(), ~near)
    stage = row.stages["pgd"]
    assert (stage["tried"], stage["fooled"]) == (12, reach.sum())
    assert stage["passes"] == 202  # 100 forward and backward, the last point and the check
    assert "- " + row.method + ": PGD-100 took 202 passes per image, and " in "\n".join(
        evaluation.as_markdown([row])
    )
    assert 1.9 < row.counts["max_norm"] <= 2 * (1 + 1e-6)


def test_stored_results_are_not_computed_again(folder, monkeypatch):
    first = run(folder)

    def none(*args, **kwargs):
        raise AssertionError("attacked again")

    monkeypatch.setattr(evaluation.evaluate, "attack_and_score", none)
    assert run(folder) == first


def test_an_interrupted_run_resumes_and_its_bar_shows_how_it_fares(folder, monkeypatch):
    whole = run(folder, out=Path("whole"), attacks=("pgd",), eps=(2.0,))
    shown, update = [], Progress.update

    def breaking(self, bar, *, completed, total, note):
        update(self, bar, completed=completed, total=total, note=note)
        shown.append((completed, total, note))
        if len(shown) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Progress, "update", breaking)
    with pytest.raises(KeyboardInterrupt):
        run(folder, attacks=("pgd",), eps=(2.0,))
    cut = run(folder, attacks=("pgd",), eps=(2.0,))
    robust = whole[0].columns["robust"]
    assert [each[:2] for each in shown] == [(4, 12), (8, 12), (12, 12), (12, 12)]
    assert shown[-2][2] == f"pgd fooled {12 - round(12 * robust)}"
    assert shown[-1][2] == f"robust {robust:.4f}"
    for key in ("columns", "interval", "counts"):
        assert getattr(cut[0], key) == getattr(whole[0], key)
    Path("out/results.json").unlink()  # interrupted after the last batch
    assert run(folder, attacks=("pgd",), eps=(2.0,)) == cut


def test_results_of_other_nets_and_sizes_stay_in_the_record_and_its_tables(folder):
    run(folder, name="first")
    run(folder, name="second", attacks=("pgd",), eps=(1.0, 2.0))
    rows = run(folder, name="second", attacks=("pgd",), seed=1)
    assert len(rows) == 5
    text = "\n".join(evaluation.as_markdown(rows))
    assert text.count("# a folder of PNG") == 2
    first, second = (
        next(line for line in text.splitlines() if line.startswith(f"| {name} |"))
        for name in ("first", "second")
    )
    assert first.count("1.0000 [") == 2
    assert "1.0000 ± 0.0000" in second
    want = "Inputs are (pixels - 0) / 255. Perturbed images stay in the range of pixels, 0 to 255."
    assert text.count(want) == 2


def test_results_of_a_nets_earlier_weights_are_removed(folder, tmp_path):
    def ran(at, attack, **options):
        path = tmp_path / "net.safetensors"
        weights.save(path, {"at": jnp.asarray(at)})
        rows = run(folder, weights=path, attacks=(attack,), name="net", **options)
        assert records.load(Path("out/results.json"), records.AttackRow) == rows
        return [(row.method, row.attack) for row in rows]

    run(folder, attacks=("one-step",), name="other")
    kept = [("other", "one-step"), ("net", "one-step")]
    assert ran(0.2, "one-step") == kept
    kept += [("net", "pgd"), ("net, smoothed by noise 0.5", "certify")]
    assert ran(0.2, "pgd", certify=0.5) == kept
    assert ran(0.5, "pgd") == [("other", "one-step"), ("net", "pgd")]


def test_results_on_different_inputs_are_kept_in_separate_tables(folder):
    run(folder, attacks=("pgd",))
    run(folder, attacks=("pgd",), box=False)
    rows = run(folder, attacks=("pgd",), crop=4, subtract=51.0)
    assert [(row.box, row.crop, row.subtract) for row in rows] == [
        (True, None, 0), (False, None, 0), (True, 4, 51),
    ]  # fmt: skip
    text = "\n".join(evaluation.as_markdown(rows))
    assert text.count("# a folder of PNG") == 3
    assert "(pixels - 0) / 255. Perturbed images may leave the range" in text
    assert "(pixels - 51) / 255, of the middle 4x4. Perturbed images stay" in text


def test_a_function_whose_outputs_changed_is_evaluated_anew(folder, monkeypatch):
    before, _ = run(folder, attacks=("pgd", "one-step"))
    module = importlib.import_module("brightness")
    apply_fn = module.apply_fn
    monkeypatch.setattr(module, "apply_fn", lambda params, x: -apply_fn(params, x))
    (after,) = run(folder, attacks=("pgd",))
    assert (before.columns["clean"], after.columns["clean"]) == (1, 0)


@pytest.mark.slow
def test_flags_of_the_check_are_reported_with_the_table(folder):
    Path("rounded.py").write_text(
        "import jax.numpy as jnp, brightness\n"
        "def apply_fn(params, x):\n"
        "    return jnp.round(9 * brightness.apply_fn(params, x))\n"
    )
    rows = run(folder, net="rounded:apply_fn", attacks=("check", "pgd"))
    assert rows[0].flags["zero gradients"].startswith("gradient masking: ")
    assert "gradient of exactly 0" in "\n".join(evaluation.as_markdown(rows))


def test_a_net_is_named_after_the_folder_of_its_weights(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for net in ("params.safetensors", str(tmp_path / "params.safetensors")):
        name = problems._short_name(problems.Settings(net))
        assert name == f"{tmp_path.parent.name}/{tmp_path.name}"


def test_nets_in_one_folder_have_different_names(folder, tmp_path):
    for at in (0.2, 0.5):
        weights.save(tmp_path / "run" / f"at{at}.safetensors", {"at": jnp.asarray(at)})
        rows = run(folder, weights=tmp_path / "run" / f"at{at}.safetensors", attacks=("one-step",))
    place = f"{tmp_path.name}/run"
    assert [row.method for row in rows] == [
        f"brightness:apply_fn, {place}/at0.2", f"brightness:apply_fn, {place}/at0.5",
    ]  # fmt: skip
    name = problems._short_name(problems.Settings("run/epoch3.safetensors"))
    assert name == f"{place}/epoch3"
    name = problems._short_name(problems.Settings("run/lwa/seed_1/params.safetensors"))
    assert name == "run/lwa/seed_1"


# Errors


def test_errors_name_what_is_wrong(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected a file of weights, got .*gone"):
        load("gone.safetensors")
    with pytest.raises(ValueError, match="expected a function f in a module nowhere, got: No mod"):
        load("nowhere:f")
    with pytest.raises(ValueError, match="expected a function f in a module brightness"):
        load("brightness:f")
    weights.save(tmp_path / "other.safetensors", {"params": {"dense": jnp.ones(3)}})
    with pytest.raises(ValueError, match=r"got params/dense; for a net of your own"):
        load(str(tmp_path / "other.safetensors"))
    with pytest.raises(ValueError, match="--crop to be at most 8, since images are 8x8, got 9"):
        load("brightness:apply_fn", folder, crop=9)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"divide": 1e-300}, "within float32's range, got 0 and 1e-300; choose a larger --divide"),
        ({"subtract": 3e38, "divide": 0.1}, "within float32's range, got 3e\\+38 and 0.1; choose"),
        ({"divide": 200.0}, "--divide to be at least 215, the largest pixel, got 200; .*--no-box"),
    ],
    ids=["tiny divisor", "huge offset", "outside the box"],
)
def test_an_unusable_scale_is_an_error(folder, changes, message):
    with pytest.raises(options.UsageError, match=message):
        run(folder, **changes)
    assert not Path("out").exists()


def test_stored_results_that_lack_a_key_are_an_error_before_any_attack(folder, monkeypatch):
    (row, _) = run(folder)
    monkeypatch.setattr(evaluation.evaluate, "attack_and_score", pytest.fail)
    content = row.to_json()
    for rows, lacking in (([{}], "experiment"), ([content | {"subtract": None}], "subtract")):
        Path("out/results.json").write_text(json.dumps(rows))
        with pytest.raises(options.UsageError, match=f"in out/results.json, .*without {lacking};"):
            run(folder, eps=(2.0,))


def test_the_error_about_weights_that_dont_fit_names_the_file(folder):
    net = saved(interface=None)
    message = (
        r"in run/net/params\.safetensors: expected the parameters of 4 for images of 5x5x1, got "
        r"params/hidden_0/kernel of shape \[64, 4\] and not \[25, 4\]\. Choose"
    )
    with pytest.raises(ValueError, match=message):
        load(net, folder, crop=5)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ("x.reshape(len(x), -1) @ params['w']", r"and w \[9, 2\] of w\.safetensors, got TypeError"),
        ("params['v']", r"and w \[9, 2\] of w\.safetensors, got KeyError: 'v'; pass this net's"),
        ("x.mean((1, 2, 3))", r"got \(1,\); return only the logits of each image"),
        ("(x, x)", r"got tuple; return only the logits of each image"),
    ],
    ids=["other shapes", "other names", "a number", "a tuple"],
)
def test_a_function_that_doesnt_take_its_weights_and_images_is_an_error(folder, returned, message):
    Path("own.py").write_text(f"def f(params, x):\n    return {returned}\n")
    sys.modules.pop("own", None)
    weights.save(Path("w.safetensors"), {"w": jnp.zeros((9, 2))})
    start = r"expected own:f to give logits \[1, K\] for an input \[1, 8, 8, 1\].*"
    with pytest.raises(ValueError, match=start + message):
        load("own:f", folder, weights=Path("w.safetensors"))


def test_labels_outside_the_classes_are_counted_and_reported(folder, monkeypatch):
    images = data.image_folder(folder)
    labels = np.array([-1, 2, *images.test_labels[2:]], np.int32)
    monkeypatch.setattr(data, "named", lambda *_, **__: images._replace(test_labels=labels))
    rows = run(folder, attacks=("pgd",))
    assert rows[0].counts["invalid"] == 2
    assert rows[0].columns["clean"] == 10 / 12
    remark = (
        "- brightness:apply_fn: 2 of 12 labels aren't among the net's classes, and count as wrong."
    )
    assert remark in evaluation.as_markdown(rows)


def test_devices_that_cant_share_the_images_are_an_error_before_anything_runs(folder, monkeypatch):
    monkeypatch.setattr(evaluation, "attack", pytest.fail)
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    with pytest.raises(ValueError, match="--devices to divide 12 "):
        run(folder, devices=8)


def test_ten_starts_of_pgd_are_ten_attacks_on_the_survivors(folder):
    (row,) = run(folder, attacks=("pgd-100x10",), eps=(1.6,))
    stages = list(row.stages.values())
    assert len(stages) == 10
    left = round(row.columns["clean"] * row.n)
    for stage in stages:
        assert stage["tried"] == left
        left -= stage["fooled"]
    assert 0 < left < stages[0]["tried"]
    assert row.columns["robust"] == left / row.n
    at_x, *at_random = attacks.methods("pgd-100x10", "l2").values()
    assert at_x.keywords == {"norm": "l2"}
    assert len(set(at_random)) == 1  # compiled once
    assert at_random[0].keywords == {"norm": "l2", "random_start": True}


# The smoothed classifier


@pytest.fixture
def few_draws(monkeypatch):
    """Certificates from few draws."""
    monkeypatch.setitem(evaluation.CERTIFY, "stages", [100, 400])


def test_certified_accuracy_of_the_smoothed_net_is_in_the_attacks_table(folder, few_draws):
    settings = {"attacks": ("pgd",), "eps": (0.5, 1.4)}
    plain = run(folder, **settings, out=Path("plain"))
    rows = run(folder, **settings, certify=1.0)
    assert [row.to_json() for row in rows] == json.loads(Path("out/results.json").read_text())
    assert [(row.attack, row.eps) for row in rows] == [
        ("pgd", 0.5), ("pgd", 1.4), ("certify", 0.5), ("certify", 1.4),
    ]  # fmt: skip
    assert [row.columns for row in rows[:2]] == [row.columns for row in plain]
    problem = load("brightness:apply_fn", folder)
    found = certify.certify(
        problem.apply_fn, None, problem.x, problem.y, sigma=1.0, radii=(0.5, 1.4),
        stages=(100, 400), key=jax.random.key(0),
    )  # fmt: skip
    # The net is linear, so the exact radius is the distance to the boundary: 8 |mean - 1/2|.
    exact = 8 * np.abs(problem.x.mean(axis=(1, 2, 3)) - 0.5)
    for row in rows[2:]:
        assert row.method == "brightness:apply_fn, smoothed by noise 1"
        assert row.columns["certified"] == np.mean(found.radius >= row.eps)
        assert row.columns["certified"] <= np.mean(exact >= row.eps)
        assert row.columns["clean"] == np.mean(exact > 0)
        assert row.samples == found.samples.sum()
    assert 0 < rows[3].columns["certified"] < rows[2].columns["certified"]
    text = "\n".join(evaluation.as_markdown(rows)).split("# a folder of PNG")[2]
    low, high = rows[3].interval
    certified = f"{rows[3].columns['certified']:.4f} [{low:.3f}, {high:.3f}]"
    clean = f"{rows[3].columns['clean']:.4f}"
    assert "| Net | Clean | PGD-100 | Certified |" in text
    assert f"| {rows[3].method} | {clean} |  | {certified} |" in text
    assert f"- {rows[3].method}: this isn't the attacked net but another classifier" in text


def test_what_no_certificate_reaches_is_classified_all_the_same(folder, few_draws):
    *_, row = run(folder, attacks=("one-step",), eps=(2.0,), certify=1.0)
    assert row.abstained > 0
    assert row.columns["clean"] == 1 > row.columns["certified"]


def test_certificates_are_stored_once_for_all_sizes_and_separately_for_each_noise(
    folder, few_draws, monkeypatch
):
    settings = {"attacks": ("one-step",), "eps": (0.2, 0.8)}
    first = run(folder, **settings, certify=0.5)
    # Both sizes use the same draws.
    stores = Path("out/batches").glob("*/evaluation.json")
    assert [json.loads(path.read_text())["attacks"] for path in stores].count([]) == 1
    rows = run(folder, **settings, certify=0.4)
    assert rows[: len(first)] == first
    assert [row.sigma for row in rows if row.attack == "certify"] == [0.5, 0.5, 0.4, 0.4]
    Path("out/results.json").unlink()

    def none(*args, **kwargs):
        raise AssertionError("drawn again")

    monkeypatch.setattr(certify, "_count", none)
    assert run(folder, **settings, certify=0.5) == first


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"norm": "linf"}, r"--certify: expected norm 'l2', got 'linf'; .*pass these radii"),
        ({"eps": (0.0, 1.0)}, r"--certify: expected positive radii, got \(0\.0, 1\.0\)"),
        ({"eps": (5.0,)}, r"--certify: expected radii below 1\.9.*, got 5; raise .*, or sigma"),
    ],
    ids=["norm", "size 0", "large size"],
)
def test_sizes_that_no_noise_certifies_are_an_error_before_any_attack(
    folder, monkeypatch, settings, message
):
    monkeypatch.setattr(evaluation.evaluate, "attack_and_score", pytest.fail)
    with pytest.raises(options.UsageError, match=message):
        run(folder, certify=0.5, **settings)
    assert not Path("out/results.json").exists()
