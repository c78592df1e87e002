"""The project as a whole: the direction of imports, the environments, the notebooks in git."""

import ast
import re
import subprocess
import tomllib
from pathlib import Path

import nbformat
import pytest
import yaml

from lthlib.book.pages import STUDY
from lthlib.book.plan import TOPICS
from lthlib.book.reference import ROOMS, reference_pages
from lthlib.metrics import METRICS
from lthlib.results.evaluate import DIMENSIONS

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted(p for p in ROOT.glob("notebooks/*.ipynb") if p.stem != "own")  # that one is about no study
LABS = sorted(ROOT.glob("notebooks/labs/*.ipynb"))


def room(path):
    return path.relative_to(ROOT / "lthlib").parts[0].removesuffix(".py")


def imports_of(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lthlib"):
            parts = node.module.split(".")
            yield from [parts[1]] if len(parts) > 1 else [alias.name for alias in node.names]


FILES = [p for p in sorted(ROOT.glob("lthlib/**/*.py")) if room(p) not in ("__init__", "__main__")]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_follow_the_arrow(path):
    allowed = ROOMS[: ROOMS.index(room(path)) + 1]
    assert set(imports_of(path)) - {"__version__"} <= set(allowed)


def test_the_reference_shows_every_module_and_its_pages_are_in_the_contents():
    pages = reference_pages()
    shown = re.findall(r"automodule:: (\S+)", "".join(pages.values()))
    found = [".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for p in FILES]
    assert sorted(shown) == sorted(found)
    contents = (ROOT / "book/contents.yml").read_text()
    assert all(f"file: _generated/{name.removesuffix('.md')}\n" in contents for name in pages)


def bounds(line):
    name = re.match(r"[A-Za-z0-9._-]+", line)[0]
    return name.lower(), frozenset(filter(None, line[len(name) :].replace(" ", "").split(",")))


def test_conda_and_pip_ask_for_the_same():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wanted = dict(map(bounds, project["project"]["dependencies"] + project["dependency-groups"]["test"]))
    wanted["python"] = frozenset(project["project"]["requires-python"].split(","))
    conda = dict(map(bounds, yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]))
    renamed = {"pytorch": "torch", "py-opencv": "opencv-python-headless"}
    assert {renamed.get(name, name): bound for name, bound in conda.items()} == wanted


def test_the_lock_is_hashed_and_names_no_index():
    text = (ROOT / "requirements.lock").read_text()
    pins = re.findall(r"^[A-Za-z0-9._-]+==\S+.*\\$", text, flags=re.M)
    assert len(pins) > 100
    assert len(re.findall(r"^[A-Za-z0-9._-]+==", text, flags=re.M)) == len(pins)  # each goes on to its hashes
    assert "http://" not in text
    assert "https://" not in text


def parameters_of(notebook):
    """Name -> default of the parameters cell."""
    (cell,) = (c for c in notebook.cells if "parameters" in c.metadata.get("tags", []))
    lines = ast.parse(cell.source).body
    names = [(line.targets[0] if isinstance(line, ast.Assign) else line.target).id for line in lines]
    return dict(zip(names, (ast.literal_eval(line.value) for line in lines), strict=True))


@pytest.mark.parametrize("path", NOTEBOOKS + LABS, ids=lambda p: p.stem)
def test_a_notebook_is_stripped(path):
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None


@pytest.mark.parametrize("path", LABS, ids=lambda p: p.stem)
def test_a_lab_is_short_and_has_a_line_to_change(path):
    cells = [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert max(len(cell.splitlines()) for cell in cells) <= 16
    assert sum("# change this" in cell for cell in cells) >= 1


def test_each_lab_is_included_by_the_chapter_of_its_name():
    chapters = [p for room in ("methods", "metrics") for p in (ROOT / "book" / room).glob("*.md")]
    included = {p.stem for p in chapters if f"../_generated/labs/{p.stem}.md" in p.read_text()}
    assert included == {p.stem for p in LABS}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
class TestNotebook:
    def test_its_parameters_are_those_of_a_study(self, path):
        declared = parameters_of(nbformat.read(path, as_version=4))
        assert set(STUDY) <= set(declared)
        assert path.stem in TOPICS

    def test_it_is_thin(self, path):
        for cell in nbformat.read(path, as_version=4).cells:
            if cell.cell_type == "code" and "parameters" not in cell.metadata.get("tags", []):
                assert len(cell.source.splitlines()) <= 10

    def test_it_shows_how_it_loads_then_rows_then_one_curve_then_figures(self, path):
        cells = [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]
        seen = [c.source for c in cells if not {"parameters", "hide-input"} & set(c.metadata.get("tags", []))]
        places = [next(i for i, s in enumerate(seen) if word in s) for word in ("pages.load(", ".head(10)", "sns.")]
        assert places == [0, 1, 2]
        assert len(seen) >= 7  # and the figures


@pytest.mark.parametrize("name", DIMENSIONS)
def test_a_templates_defaults_are_those_of_the_default_grid(name):
    template = nbformat.read(ROOT / f"notebooks/{name}.ipynb", as_version=4)
    declared = parameters_of(template)
    grid = yaml.safe_load((ROOT / "workflow/grids/quick.yml").read_text())
    assert declared["measure"] == (grid["dimensions"][name] or {})
    for field in ("data", "arch", "rounds", "seeds", "recipe", "rewind_epoch", "options"):
        assert declared[field] == grid[field], field


def test_every_topic_has_its_notebook():
    assert {p.stem for p in NOTEBOOKS} == set(TOPICS)
    assert set(DIMENSIONS) < set(TOPICS)


def test_the_page_on_methods_asks_for_what_its_dimension_computes_anyway():
    def declared(name):
        return parameters_of(nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4))

    mine = declared("methods")
    theirs = declared(mine["dimension"])
    assert {name: mine[name] for name in theirs} == theirs


def test_every_reference_of_a_registry_is_in_the_bibliography():
    from lthlib.networks import ARCHITECTURES
    from lthlib.pruning import METHODS

    keys = set(re.findall(r"^@\w+\{([^,]+),", (ROOT / "book/references.bib").read_text(), flags=re.M))
    used = {entry.reference for registry in (METRICS, METHODS, ARCHITECTURES) for entry in registry.values()}
    assert used - {""} <= keys


def test_nothing_generated_is_in_git():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert not [p for p in tracked if p.startswith(("_build/", "store/", "book/_generated/", ".snakemake/"))]
