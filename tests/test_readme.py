"""The README is right: its example runs, its table matches the record, its links exist."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
RESULTS = ROOT / "experiments" / "results"
PAGES = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
NETS = {"MLP": "mnist_mlp", "LeNet": "mnist_lenet"}
METHODS = {"Normal": "normal", "LWA": "lwa", "LWA, multi-step": "lwa_multi"}


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 120


def test_the_example_runs_as_printed(capsys):
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(compile(example, "README.md", "exec"), {})
    shape, step, loss = re.fullmatch(r"(\(.*\)) (\d+) (.*)\n", capsys.readouterr().out).groups()
    assert (shape, step) == ("(32, 4)", "1")
    assert 0 < float(loss) < 10


def test_the_table_matches_the_boards_record():
    rows = json.loads((RESULTS / "board" / "results.json").read_text())
    recorded = {
        (row["method"], row["n"], row["attack"]): row["columns"]
        for row in rows
        if row["eps"] == 1.5 and row["norm"] == "l2" and row["attack"] in ("one-step", "standard")
    }
    printed = re.findall(r"^\| (MLP|LeNet), (.+?) \| ([\d,]+) \| (.*) \|$", README, re.MULTILINE)
    assert [line[:2] for line in printed] == [(net, method) for net in NETS for method in METHODS]
    for net, method, images, figures in printed:
        name, n = f"{NETS[net]}/{METHODS[method]}", int(images.replace(",", ""))
        one_step, standard = (recorded[name, n, attack] for attack in ("one-step", "standard"))
        assert one_step["clean"] == standard["clean"]
        expected = (one_step["clean"], one_step["robust"], standard["robust"])
        assert figures.split(" | ") == [f"{accuracy:.3f}" for accuracy in expected]
        if name == "mnist_lenet/lwa":
            assert (
                "keeps {} under the method it was trained against, and\n{} under AutoAttack".format(
                    *figures.split(" | ")[1:]
                )
                in README
            )


def test_the_picture_matches_its_caption():
    content = json.loads((RESULTS / "gallery" / "robust.json").read_text())
    normal, lwa = content["perturbed"]["normal"], content["perturbed"]["lwa"]
    assert len(content["images"]) == len(set(content["labels"])) == 4
    assert normal["before"] == content["labels"]
    right = [np.equal(net["after"], content["labels"]).sum() for net in (normal, lwa)]
    assert right == [0, 3]
    for net in (normal, lwa):
        sizes = np.linalg.norm(np.asarray(net["r"]).reshape(4, -1) / 1000, axis=1)
        np.testing.assert_allclose(sizes, 1.5, atol=28 * 0.5e-3)  # 784 rounded pixels


def test_the_record_of_table_1_has_the_methods_and_seeds_that_the_results_name():
    rows = json.loads((RESULTS / "mnist_mlp" / "results.json").read_text())
    methods = ("normal", "dropout", "goodfellow", "lwa", "lwa_rep")
    seeds = dict.fromkeys(methods, (0, 1, 2)) | {"lwa_noisy": (0,), "lwa_multi": (0,)}
    assert {(row["method"], row["seed"]) for row in rows} == {
        (method, seed) for method in seeds for seed in seeds[method]
    }
    assert {row["n"] for row in rows} == {10_000}


@pytest.mark.parametrize("target", re.findall(r'(?:\]\(|src=")([^)#"]+)', README))
def test_the_readmes_links_exist(target):
    assert (ROOT / target).exists()


def test_commands_that_are_named_exist_and_all_are_on_the_page_of_commands():
    named = {page.name: set(re.findall(r"experiments/\w+\.py", page.read_text())) for page in PAGES}
    there = {f"experiments/{path.name}" for path in (ROOT / "experiments").glob("[a-z]*.py")}
    assert set().union(*named.values()) <= there
    assert named["commands.md"] == there
