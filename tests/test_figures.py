"""One command draws every record's figures from its JSON."""

import dataclasses
import json
import re
import shutil
import sys

import numpy as np
import pytest
from PIL import Image
from rows import table_row

from experiments import figures as command
from experiments.lib import figures, records

RECORDS = sorted(path.parent for path in records.RESULTS.glob("*/results.json"))
EPS = [0.0, 1.0, 2.0]


def row(experiment, method, seed=0, **extra):
    curve = {"eps": EPS, **{column: [0.9, 0.5, 0.1] for column in figures.CURVES}}
    history = [
        {"validation": 0.5, "adv_loss": 0.1, "watched_eps": 1.0},
        {"validation": 0.9, "adv_loss": 0.5, "watched_eps": 1.0},
    ]
    usual = {"settings": {"holdout": 0}, "eps": 1.0, "curves": curve, "history": history}
    return table_row(experiment=experiment, method=method, seed=seed, **usual | extra)


def lines_of(figure):
    """The lines of each panel by label."""
    return [
        {line.get_label(): (np.asarray(line.get_xdata()), np.asarray(line.get_ydata()), line)
         for line in panel.get_lines()}
        for panel in figure.axes
    ]  # fmt: skip


def drawn(tmp_path, rows):
    records.save(tmp_path / "results.json", rows)
    written = figures.draw(tmp_path)
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in written)
    return {path.name for path in written}


def test_each_experiment_gets_its_figures(tmp_path):
    plain = {"accuracy_vs_eps.png", "learning_curves.png"}
    assert drawn(tmp_path, [row("mnist_mlp", "normal"), row("mnist_mlp", "lwa")]) == plain
    assert drawn(tmp_path, [row("cifar10", "lwa")]) == plain
    lenet = [row("mnist_lenet", "normal")]
    assert drawn(tmp_path, lenet) == {*plain, "figure_1.png"}
    lenet.append(row("mnist_lenet", "lwa"))
    assert drawn(tmp_path, lenet) == {*plain, "figure_1.png", "figure_2.png"}
    groups = {"objective": "LWA", "size": "1"}
    assert drawn(tmp_path, [row("ablations", "lwa", groups=groups)]) == {"ablations.png"}


def test_figure_1_has_the_authors_curves_dashed():
    figure = figures.plot_figure_1([row("mnist_lenet", "normal")])
    (lines,) = lines_of(figure)
    assert {"Adv_Alpha", "Adv_Loss", "Adv_Loss_Sign", "the authors' notebook"} <= lines.keys()
    x, y, _ = lines["Adv_Alpha"]
    np.testing.assert_array_equal(x, EPS)
    np.testing.assert_array_equal(y, [0.9, 0.5, 0.1])
    dashed = [
        line for line in figure.axes[0].get_lines()
        if line.get_linestyle() == "--" and len(line.get_xdata())
    ]  # fmt: skip
    assert len(dashed) == 3
    by_colour = {line.get_color(): line for line in dashed}
    alpha = by_colour[lines["Adv_Alpha"][2].get_color()]
    # The notebook's accuracies at sizes 0.4 and 3.8.
    assert (alpha.get_xdata()[0], alpha.get_ydata()[0]) == (0.4, 0.9545)
    assert (alpha.get_xdata()[-1], alpha.get_ydata()[-1]) == (3.8, 0.0684)
    (panel,) = figure.axes
    assert panel.get_title() == "Figure 1: Normal LeNet, 100 test images"
    assert panel.get_xlabel() == "l2 size of the perturbation"
    assert panel.get_ylabel() == "accuracy"


def test_figure_2_shows_both_nets_against_size_and_over_training():
    rows = [row("mnist_lenet", "normal"), row("mnist_lenet", "lwa")]
    sizes, epochs = lines_of(figures.plot_figure_2(rows))
    assert len(sizes) == 6
    assert set(epochs) == {
        "Normal, Validation", "LWA, Validation", "Normal, Adv_Loss, 1", "LWA, Adv_Loss, 1",
    }  # fmt: skip
    x, y, _ = epochs["LWA, Validation"]
    np.testing.assert_array_equal(x, [1, 2])
    np.testing.assert_array_equal(y, [0.5, 0.9])


def test_histories_at_different_sizes_arent_mixed():
    history = [{**epoch, "watched_eps": 0.5} for epoch in row("cifar10", "normal").history]
    other = row("cifar10", "normal", history=history)
    with pytest.raises(ValueError, match=r"at a single l2 size, got \[0\.5, 1\.0\]"):
        figures.plot_learning([row("cifar10", "lwa"), other])


def test_of_several_runs_only_comparable_ones_are_drawn_together(tmp_path):
    plain = {"accuracy_vs_eps.png", "learning_curves.png"}
    watched = [{**epoch, "watched_eps": 0.5} for epoch in row("mnist_lenet", "lwa").history]
    last = row("mnist_lenet", "normal")
    at_other_size = row("mnist_lenet", "lwa", history=watched, eps=0.5)
    assert drawn(tmp_path, [last, at_other_size]) == {*plain, "figure_1.png"}
    # Of a method's seeds, those trained with the same settings.
    longer = row(
        "mnist_lenet", "normal", seed=1, settings={"holdout": 0, "epochs": 3},
        history=[*last.history, last.history[0]],
    )  # fmt: skip
    assert drawn(tmp_path, [longer, last]) == {*plain, "figure_1.png"}


def test_seeds_are_averaged_and_a_second_size_is_not():
    first = row("cifar10", "lwa")
    curves = {**first.curves, "adv_loss": [0.7, 0.3, 0.1]}
    second = row("cifar10", "lwa", seed=1, curves=curves)
    other_size = row("cifar10", "lwa", eps=0.25)
    panels = lines_of(figures.plot_curves([first, other_size, second]))
    np.testing.assert_allclose(panels[1]["LWA"][1], [0.8, 0.4, 0.1])


def test_without_results_there_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"expected rows in .*results\.json.*run the experiment"):
        figures.draw(tmp_path)


@pytest.mark.parametrize("record", RECORDS, ids=lambda path: path.name)
def test_one_command_redraws_all_figures_of_a_record(record, tmp_path, monkeypatch, capsys):
    for path in record.glob("*.json"):
        shutil.copy(path, tmp_path)
    monkeypatch.setattr(sys, "argv", ["figures.py", str(tmp_path)])
    command.main()
    again = {path.name for path in tmp_path.glob("*.png")}
    assert again == {path.name for path in record.glob("*.png")}
    for name in again:  # few colours take little space
        with Image.open(tmp_path / name) as picture:
            assert picture.mode == "P"
    printed = re.sub(r"\s", "", capsys.readouterr().out)
    assert all(name in printed for name in again)


@pytest.mark.parametrize("channels", [1, 3])
def test_the_worst_images_are_drawn_with_any_class_names(tmp_path, monkeypatch, channels):
    kept = []
    save = figures.save
    monkeypatch.setattr(
        figures, "save", lambda figure, path: kept.append(figure) or save(figure, path)
    )
    x = np.full((2, 3, 5, channels), 0.75, np.float32)
    r = np.full_like(x, -0.25)
    r[1, 0] = 0.5
    names = [("a $_{$", "d"), ("a class of a very long name", "a")]
    path = figures.draw_worst(tmp_path / "worst.png", x, r, [0.123456, 2], names)
    assert path.read_bytes()[:4] == b"\x89PNG"
    axes = kept[0].axes
    shown = [np.asarray(axis.get_images()[0].get_array()).ravel() for axis in axes]
    np.testing.assert_array_equal(shown[0], 0.75)
    np.testing.assert_array_equal(shown[2], 0)  # every pixel has the largest change
    np.testing.assert_array_equal(shown[4], 0.5)
    assert shown[5].max() == 1  # clipped from 1.25
    assert [axis.get_title() for axis in axes] == [
        "a $_{$", "a class of a very l…", "size 0.123", "size 2", "d", "a",
    ]  # fmt: skip


def test_digits_show_what_was_saved(tmp_path):
    images = np.linspace(0, 1, 2 * 784).reshape(2, 28, 28, 1)
    digits = figures.Digits(-images / 2, np.array([1, 2]), np.array([1, 3]))
    path = tmp_path / "digits.json"
    figures.save_digits(path, images, np.array([1, 2]), {"lwa": digits}, 1.5)
    content = json.loads(path.read_text())
    figure = figures.plot_digits(content)
    shown = [axis.get_images()[0].get_array() for axis in figure.axes]
    np.testing.assert_allclose(shown[0], images[0, ..., 0], atol=5e-4)  # saved to three decimals
    np.testing.assert_allclose(shown[2], -images[0, ..., 0] / 2, atol=5e-4)
    assert [axis.get_title() for axis in figure.axes] == [
        "label 1", "label 2", "", "", "1 → 1", "2 → 3",
    ]  # fmt: skip


def test_digits_are_replaced_at_once(tmp_path):
    path, earlier = tmp_path / "digits.json", tmp_path / "earlier.json"
    digits = figures.Digits(np.zeros((1, 28, 28, 1)), np.array([1]), np.array([1]))
    figures.save_digits(path, digits.r, np.array([1]), {"lwa": digits}, 1.5)
    earlier.hardlink_to(path)
    before = path.read_text()
    figures.save_digits(path, digits.r, np.array([1]), {"lwa": digits}, 2.0)
    assert earlier.read_text() == before != path.read_text()


def test_digits_of_several_runs_are_kept_as_long_as_they_are_the_same(tmp_path):
    path, images = tmp_path / "digits.json", np.linspace(0, 1, 784).reshape(1, 28, 28, 1)
    digits = figures.Digits(-images, np.array([1]), np.array([1]))

    def saved(images, name, eps=1.5):
        figures.save_digits(path, images, np.array([1]), {name: digits}, eps)
        return list(json.loads(path.read_text())["perturbed"])

    assert saved(images, "lwa") == ["lwa"]
    assert saved(images, "normal") == ["lwa", "normal"]
    assert saved(images, "lwa", eps=2.0) == ["lwa"]
    assert saved(1 - images, "normal", eps=2.0) == ["normal"]


def test_curves_at_other_sizes_than_the_first_seeds_are_left_out():
    first = row("mnist_mlp", "lwa")
    column = figures.CURVES[0]
    other = dataclasses.replace(first, seed=1, curves={"eps": [0.0, 3.0], column: [0.2, 0.1]})
    sizes, mean = figures._curve([first, other], "lwa", column)
    assert sizes == EPS
    np.testing.assert_array_equal(mean, [0.9, 0.5, 0.1])
