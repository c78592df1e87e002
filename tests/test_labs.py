"""A lab: its fragment says and shows what it did, an assert that fails is named, and only what is not current runs."""

import io
import re
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from lthlib.book import labs
from lthlib.core import versions
from lthlib.core.store import ROOT

DRAW = "# A line that rises\nimport matplotlib.pyplot as plt\nplt.plot([1, 2]);"


@pytest.fixture
def lab(tmp_path, monkeypatch):
    """Write a lab into a folder of its own, make all labs there, and return what failed and the fragment."""
    monkeypatch.setattr(labs, "FOLDER", tmp_path / "labs")
    monkeypatch.setattr(labs, "MADE", tmp_path / "made")
    monkeypatch.setattr(labs, "BUILD", tmp_path / "build")
    (tmp_path / "labs").mkdir()

    def make(*cells):
        notebook = new_notebook(metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}})
        notebook.cells = [new_markdown_cell("# Tiny: lab\n\nWhat it does.", id="head"), *cells]
        nbformat.write(notebook, tmp_path / "labs" / "tiny.ipynb")
        labs.lab_made_from.cache_clear()
        return labs.make_labs(1), (tmp_path / "made" / "tiny.md").read_text()

    return make


def test_its_fragment_holds_words_code_output_and_pictures_in_order(lab, tmp_path):
    lost, text = lab(new_markdown_cell("**Look.**"), new_code_cell("x = 3\nprint('a')\nx"), new_code_cell(DRAW))
    assert lost == {}
    assert "# Tiny: lab" not in text
    parts = ["What it does.", "{download}`", "**Look.**", "```python\nx = 3\nprint('a')\nx\n```", "```text\na\n```"]
    parts += ["```text\n3\n```", f"```python\n{DRAW}\n```", "![A line that rises](/_generated/labs/tiny-1.png)"]
    places = [text.index(part) for part in parts]
    assert places == sorted(places)
    assert (tmp_path / "made" / "tiny-1.png").read_bytes().startswith(b"\x89PNG")


def test_an_assert_that_fails_is_named_and_a_notice_stands_in_its_place_until_it_holds(lab):
    good = lab(new_code_cell(DRAW))
    lost, text = lab(new_code_cell(DRAW), new_code_cell("assert 1 + 1 == 3, 'one and one'"))
    assert "tiny.ipynb, cell 3 (assert 1 + 1 == 3, 'one and one'): AssertionError: one and one" in lost["tiny"]
    assert "This lab is missing" in text
    assert "AssertionError: one and one" in text
    assert lab(new_code_cell(DRAW)) == good


def test_it_runs_again_when_the_code_behind_it_changes_and_not_before(lab, tmp_path, monkeypatch):
    cell = new_code_cell(f"{DRAW}\nimport lthlib\nopen({str(tmp_path / 'runs')!r}, 'a').write('x')\nlthlib.prune")
    runs = lambda: (lab(cell), len((tmp_path / "runs").read_text()))[1]
    assert [runs(), runs()] == [1, 1]

    def change(module):
        monkeypatch.setitem(versions._TEXTS, module, versions._TEXTS[module] + "\nchanged = True\n")
        versions._version.cache_clear()

    change("lthlib.metrics.calibration.errors")
    assert runs() == 1
    change("lthlib.pruning.synflow")  # a method is found by its name, no import leads to it
    assert runs() == 2
    monkeypatch.undo()
    versions._version.cache_clear()


IMPORTS = """
import json, sys
from pathlib import Path
for path in Path.cwd().glob("*.ipynb"):
    cells = json.loads(path.read_text())["cells"]
    lines = "".join("".join(cell["source"]) + "\\n" for cell in cells if cell["cell_type"] == "code").splitlines()
    exec("\\n".join(line for line in lines if line.startswith(("import ", "from "))))
print(sys.modules["lthlib"].__file__)
print(*{name.partition(".")[0] for name in sys.modules})
"""


def test_the_archive_needs_nothing_but_itself_and_what_it_says(tmp_path):
    zipfile.ZipFile(io.BytesIO(labs.archive())).extractall(tmp_path)
    asked = (tmp_path / "labs" / "requirements.txt").read_text()
    done = subprocess.run([sys.executable, "-c", IMPORTS], cwd=tmp_path / "labs", capture_output=True, text=True)
    place, modules = done.stdout.splitlines()
    assert place == str(tmp_path / "labs" / "lthlib" / "__init__.py")
    provided = metadata.packages_distributions()
    own = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    used = {name for module in modules.split() for name in provided.get(module, ())}
    used &= {re.match(r"[\w-]+", line)[0] for line in own}
    assert used <= set(re.findall(r"^[\w-]+", asked, flags=re.M))
    assert labs.archive() == labs.archive()
