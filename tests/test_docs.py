"""The documentation's examples run as printed, and do what the text says they do."""

import doctest
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import jaxadv

DOCS = Path(__file__).resolve().parents[1] / "docs"
EXAMPLES = sorted(DOCS.glob("examples/*.py"))


def run(example, *arguments):
    # Almost every program runs once: conftest says why.
    environment = {**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:__main__", example.name, *arguments],
        cwd=example.parent, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [float(figure) for figure in re.findall(r"\d\.\d+", done.stdout)]


@pytest.mark.slow
def test_a_hand_written_net_becomes_robust():
    normal, lwa = run(DOCS / "examples" / "by_hand.py")
    assert normal < 0.1  # it relies on the small feature
    assert lwa > 0.9


def test_a_users_attack_beats_one_step():
    one_step, many = run(DOCS / "examples" / "new_attack.py")
    assert many < one_step < 1


@pytest.mark.slow
def test_the_tutorial_makes_a_net_robust():
    clean, withstood, clean_after, withstood_after, *ensembles = run(
        DOCS / "examples" / "tutorial.py"
    )
    assert clean > 0.99
    assert clean_after > 0.99
    assert 0.1 < withstood < 0.4  # "about a quarter"
    assert withstood_after > 0.85
    plain, _, _, robust, _, _ = ensembles
    assert plain <= withstood + 0.1
    assert robust > 0.75


@pytest.mark.slow
@pytest.mark.parametrize(
    "example",
    [
        e for e in EXAMPLES
        if e.stem not in ("by_hand", "new_attack", "onnx_net", "own_images", "tutorial")
    ],
    ids=lambda e: e.stem,
)  # fmt: skip
def test_examples_run(example):
    figures = run(example)
    assert figures[-1] > 0.9 if example.stem != "checkpoint" else not figures


@pytest.mark.slow
def test_a_net_learns_the_images_of_a_folder(tmp_path):
    rng = np.random.default_rng(0)
    for part, n in (("train", 75), ("test", 10)):
        for place, name in enumerate(("left", "right")):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(n):
                pixels = rng.integers(0, 120, (8, 8, 3), np.uint8)
                pixels[2:6, 4 * place : 4 * place + 4] += 100
                Image.fromarray(pixels).save(tmp_path / part / name / f"{i}.png")
    *_, robust = run(DOCS / "examples" / "own_images.py", str(tmp_path))
    assert robust > 0.9


@pytest.mark.slow
def test_an_onnx_net_is_attacked_and_onnxruntime_agrees(tmp_path):
    for module in ("onnx", "onnxruntime"):
        pytest.importorskip(module, reason="the extra docs has it")
    wheel = ["--no-deps", "--only-binary=:all:", "--dest", tmp_path, "rapidocr==3.10.0"]
    download = [sys.executable, "-m", "pip", "download", "--quiet", *wheel]
    if subprocess.run(download, capture_output=True).returncode != 0:
        pytest.skip("no package registry, from which the net is downloaded")
    (path,) = tmp_path.glob("*.whl")
    net = tmp_path / "net.onnx"
    with zipfile.ZipFile(path) as packed:
        (name,) = (name for name in packed.namelist() if name.endswith("_cls_mobile.onnx"))
        net.write_bytes(packed.read(name))
    under_pgd, clean, adversarial, in_8_bits = run(DOCS / "examples" / "onnx_net.py", str(net))
    assert clean == 1
    assert adversarial == under_pgd <= 0.5
    assert abs(in_8_bits - adversarial) <= 0.1  # rounding moves each pixel by 1/510 at most


PREAMBLE = """
import jax, jax.numpy as jnp, optax, jaxadv
from functools import partial
key = jax.random.key(0)
x, y = jax.random.uniform(key, (8, 4, 4, 1)), jnp.arange(8) % 3
def apply_fn(params, x):
    return x.reshape(len(x), -1) @ params
params = jax.random.normal(key, (16, 3))
tx = optax.sgd(0.1)
objective = jaxadv.objectives.natural(apply_fn)
step = jaxadv.train.make_step(objective, tx, donate=False)
state = jaxadv.train.init(params, tx, key=key)
batches = x[None], y[None]
"""


@pytest.mark.slow
@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.stem)
def test_a_pages_python_code_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    snippets = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    names = {}
    exec(PREAMBLE, names)
    for snippet in snippets:
        exec(snippet, names)
    if page.stem == "howto":
        r = names["towards_grey"](None, None, names["x"], None, eps=0.5)
        assert r.shape == names["x"].shape
        norm = {"weight": 2.0, "bias": 1.0, "running_mean": 3.0, "running_var": 4.0}
        state_dict = {f"bn.{name}": np.full(2, value) for name, value in norm.items()}
        state_dict |= {"bn.num_batches_tracked": np.int64(7)}
        weights, statistics = names["split_statistics"](state_dict)
        assert set(weights) == {"bn.weight", "bn.bias"}
        assert len(statistics) == 3
        out = names["torch_batch_norm"]((weights, statistics), "bn", np.full(2, 5.0))
        np.testing.assert_allclose(out, 2 * (5 - 3) / 2 + 1, rtol=1e-5)


SESSIONS = {page: re.findall(r"```pycon\n(.*?)```", page.read_text(), re.DOTALL)
            for page in sorted(DOCS.glob("*.md"))}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [page for page in SESSIONS if SESSIONS[page]], ids=lambda page: page.stem
)
def test_a_pages_sessions_print_what_the_page_shows(page):
    session = doctest.DocTestParser().get_doctest(
        "\n".join(SESSIONS[page]), {}, page.name, page.name, 0
    )
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    report = []
    runner.run(session, out=report.append)
    assert runner.failures == 0, "".join(report)


@pytest.mark.parametrize(
    "page", sorted([*DOCS.glob("*.md"), *DOCS.glob("notebooks/*.md")]), ids=lambda page: page.stem
)
def test_a_pages_relative_links_exist_in_the_repository(page):
    targets = re.findall(r"\]\(((?!http)[^)#]+)(?:#[^)]*)?\)", page.read_text())
    assert [target for target in targets if not (page.parent / target).exists()] == []


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda e: e.stem)
def test_an_example_is_short_and_included_in_a_page(example):
    lines = example.read_text().splitlines()
    assert len(lines) <= {"tutorial": 90, "onnx_net": 120}.get(example.stem, 60)
    pages = "".join(page.read_text() for page in DOCS.glob("*.md"))
    assert f"examples/{example.name}" in pages


def names():
    """The public names of each module except `types`, whose names have no pages of their own."""
    return {
        f"{module}.{name}"
        for module in jaxadv.__all__
        if module != "types"
        for name in getattr(jaxadv, module).__all__
    }


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.stem)
def test_the_places_that_a_page_names_in_an_example_are_unique(page):
    quoted = r"```{literalinclude} (\S+)\n((?::.*\n)*)"
    for name, options in re.findall(quoted, page.read_text()):
        text = (page.parent / name).read_text()
        for place in re.findall(r':(?:start-after|end-before): "(.*)"', options):
            assert len(re.findall(re.escape(place), text)) == 1, place


def test_every_module_and_every_name_is_in_the_reference_once():
    text = (DOCS / "api.md").read_text()
    modules = re.findall(r"(?m)^\.\. automodule:: jaxadv\.(\w+)$", text)
    assert sorted(modules) == sorted(jaxadv.__all__)
    assert text.endswith(".. automodule:: jaxadv.types\n   :members:\n```\n")
    assert sorted(re.findall(r"(?m)^   (\w+\.\w+)$", text)) == sorted(names())


@pytest.fixture
def conf(monkeypatch):
    """The site's conf.py as a module."""
    monkeypatch.setattr(shutil, "copytree", lambda *_, **__: None)
    monkeypatch.setattr(sys, "path", list(sys.path))
    spec = importlib.util.spec_from_file_location("conf", DOCS / "conf.py")
    module = importlib.util.module_from_spec(spec)
    module.tags = types.SimpleNamespace(has=lambda name: False)  # Sphinx defines it
    spec.loader.exec_module(module)
    return module


def test_the_records_listed_on_a_functions_page_exist(conf):
    shown = conf.recorded()
    assert {name.removeprefix("jaxadv.") for name in shown} <= names()
    for text in shown.values():
        links = re.findall(r"/results/[^>\n]+", text)
        records = [DOCS.parent / "experiments" / link[1:] for link in links]
        assert records
        assert all(path.with_suffix(path.suffix or ".md").exists() for path in records)


def test_a_source_link_points_to_the_lines_that_define_the_name(conf):
    conf.repository = "https://example.org/jaxadv"
    for name in ("jaxadv.perturb.loss", "jaxadv.attack.pgd", "jaxadv.problem.Problem.of"):
        module, _, attribute = name.partition(".")[2].partition(".")
        link = conf.linkcode_resolve("py", {"module": f"jaxadv.{module}", "fullname": attribute})
        path, first, last = re.fullmatch(
            r"https://example.org/jaxadv/blob/main/(.*)#L(\d+)-L(\d+)", link
        ).groups()
        lines = (DOCS.parent / path).read_text().splitlines()[int(first) - 1 : int(last)]
        head = next(line for line in lines if not line.lstrip().startswith("@"))
        assert re.match(rf"\s*(def|class) {name.rpartition('.')[2]}\b", head)
        assert lines[-1].strip()
    assert conf.linkcode_resolve("py", {"module": "jaxadv.types", "fullname": "Params"}) is None
