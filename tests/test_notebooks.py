"""The documentation's notebooks: errors in cells, and links to Colab."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parents[1] / "docs"
NOTEBOOK = """---
jupytext:
  text_representation:
    extension: .md
    format_name: myst
kernelspec:
  display_name: Python 3
  language: python
  name: python3
---

# A notebook

Back to [the site](../index.md).

```{{code-cell}} ipython3
{cell}
```
"""


def build(folder, cell, *options):
    """Build a site of one notebook like the documentation; return the process and the site."""
    source = folder / "docs"
    (source / "notebooks").mkdir(parents=True)
    (source / "index.md").write_text("# A site\n\n```{toctree}\nnotebooks/one\n```\n")
    (source / "notebooks" / "one.md").write_text(NOTEBOOK.format(cell=cell))
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", "-qTW", "-c", DOCS, *options, source, folder / "site"],
        capture_output=True, text=True,
    )  # fmt: skip
    return done, folder / "site"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ("1 / 0", "ZeroDivisionError"),
        ("import warnings\nwarnings.warn('of an old name')", "stderr"),
    ],
)
def test_an_error_or_a_warning_in_a_cell_fails_the_build(tmp_path, cell, message):
    done, _ = build(tmp_path, cell)
    assert done.returncode != 0
    assert message in done.stderr


@pytest.mark.slow
def test_a_notebook_is_run_and_without_a_repository_has_no_link_to_colab(tmp_path):
    table = "Markdown(f'| a | b |\\n|---|---|\\n| {6 * 7} | |')"
    done, site = build(tmp_path, f"from IPython.display import Markdown\n{table}")
    assert done.returncode == 0, done.stderr
    page = (site / "notebooks" / "one.html").read_text()
    assert "<td><p>42</p></td>" in page
    assert "colab" not in page.lower()
    assert not list(site.rglob("*.ipynb"))


@pytest.mark.slow
def test_with_a_repository_a_notebook_has_a_link_to_colab(tmp_path):
    address = "https://github.com/somebody/jaxadv"
    done, site = build(tmp_path, "print(6 * 7)", "-D", f"repository={address}")
    assert done.returncode == 0, done.stderr
    page = (site / "notebooks" / "one.html").read_text()
    there = "github/somebody/jaxadv/blob/gh-pages/notebooks/one.ipynb"
    assert f'href="https://colab.research.google.com/{there}"' in page
    setup, text, cell = json.loads((site / "notebooks" / "one.ipynb").read_text())["cells"]
    assert f"git clone -q {address}" in "".join(setup["source"])
    assert f"]({address}/blob/main/docs/notebooks/../index.md)" in "".join(text["source"])
    assert "".join(cell["source"]) == "print(6 * 7)"
    assert cell["outputs"] == []
