"""A page: its outputs are those of a kernel, it appears whole or not at all, and what goes wrong is said."""

import os
import signal
import time

import nbformat
import papermill
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from lthlib.book import runner
from lthlib.book.runner import execute, made_from
from lthlib.core import forks
from lthlib.core.errors import UserError
from lthlib.core.forks import in_forks

KERNEL = {"name": "python3", "display_name": "Python 3", "language": "python"}
PARAMETERS = new_code_cell("n = 1", metadata={"tags": ["parameters"]})
DRAW = "import matplotlib.pyplot as plt\nplt.plot([1, 2]);"


@pytest.fixture
def page(tmp_path):
    """Run cells as a page in a fork, as a run does, and return it; or the log where it fails."""

    def run(*cells, title=None, of="", **parameters):
        notebook = new_notebook(metadata={"kernelspec": KERNEL})
        notebook.cells = [new_markdown_cell("# Heading\nText."), PARAMETERS, *map(new_code_cell, cells)]
        nbformat.write(notebook, tmp_path / "template.ipynb")
        log, output = tmp_path / "page.log", tmp_path / "page.ipynb"
        task = lambda: execute(tmp_path / "template.ipynb", output, parameters, title=title, of=of)
        failed = in_forks({"page": task}, tmp_path, 1)
        return log.read_text() if failed else nbformat.read(output, 4)

    return run


def outputs(page):
    return [dict(output) for cell in page.cells for output in cell.get("outputs", [])]


def test_its_outputs_are_those_of_a_kernel(page, tmp_path):
    cells = [
        DRAW,
        "print('a'); print('b'); n",
        "from IPython.display import HTML, display\ndisplay(HTML('<i>x</i>')); 'last'",
        "import pandas as pd\npd.DataFrame({'x': [1.5]})",
    ]
    ours = outputs(page(*cells, n=3))
    papermill.execute_notebook(
        str(tmp_path / "template.ipynb"), str(tmp_path / "kernel.ipynb"), {"n": 3}, progress_bar=False
    )
    theirs = outputs(nbformat.read(tmp_path / "kernel.ipynb", 4))
    assert [o["output_type"] for o in ours] == [o["output_type"] for o in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.get("name") == other.get("name")
        assert set(mine.get("data", {})) == set(other.get("data", {}))
        if "text/html" in mine.get("data", {}):
            assert mine["data"]["text/html"] == other["data"]["text/html"]
        if mine.get("name") == "stdout":
            assert mine["text"] == other["text"]


def test_it_has_its_title_its_parameters_folded_and_what_it_was_made_from(page, tmp_path):
    made = page(DRAW, "print(n)", title="Another", of="abc", n=7)
    assert made.cells[0].source == "# Another\nText."
    tags = [cell.metadata.get("tags") for cell in made.cells]
    assert ["parameters", "remove-cell"] in tags
    assert ["injected-parameters", "hide-input"] in tags
    assert outputs(made)[-1]["text"] == "7\n"
    assert made_from(tmp_path / "page.ipynb") == "abc"


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b'{"metadata": 3}'])
def test_a_damaged_page_was_made_from_nothing(tmp_path, content):
    (tmp_path / "page.ipynb").write_bytes(content)
    assert made_from(tmp_path / "page.ipynb") == ""
    assert made_from(tmp_path / "none.ipynb") == ""


def test_progress_bars_leave_no_trace_and_warnings_stay(page):
    bar = (
        "import sys\nfor i in range(3): print(f'\\r{i}/3', end='', file=sys.stderr)\nprint('\\nkept', file=sys.stderr)"
    )
    said = [o["text"] for o in outputs(page(DRAW, bar)) if o.get("name") == "stderr"]
    assert "".join(said).strip() == "kept"


def test_a_failing_cell_keeps_its_notebook_and_the_older_page(page, tmp_path):
    page(DRAW)
    before = (tmp_path / "page.ipynb").read_bytes()
    said = page(DRAW, "# two\n1 / 0", "print('never')")
    assert "template.ipynb, cell 4 (# two): ZeroDivisionError: division by zero" in said
    failed = nbformat.read(tmp_path / "page.failed.ipynb", 4)
    assert outputs(failed)[-1]["ename"] == "ZeroDivisionError"
    assert not any("never" in str(o) for o in outputs(failed))
    assert (tmp_path / "page.ipynb").read_bytes() == before
    page(DRAW)
    assert not (tmp_path / "page.failed.ipynb").exists()


def test_a_page_without_a_figure_is_a_failure(page):
    assert "drew no figure" in page("print(1)")


def test_figures_are_drawn_whatever_the_backend_of_the_environment(page, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "Agg")
    assert any("image/png" in o.get("data", {}) for o in outputs(page(DRAW)))


def test_a_page_whose_process_dies_is_said_and_leaves_the_next_alone(page, tmp_path):
    said = page("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)")
    assert "its process died of SIGKILL" in said
    assert not [p for p in tmp_path.iterdir() if p.suffix == ".ipynb" and "template" not in p.name and p.name[0] != "."]
    assert outputs(page(DRAW, "print(1)"))[-1]["text"] == "1\n"


def test_a_full_disk_is_said_and_the_older_page_stays(page, tmp_path, monkeypatch):
    page(DRAW)
    before = (tmp_path / "page.ipynb").read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(runner, "write_atomically", full)
    assert "No space left" in page(DRAW)
    assert (tmp_path / "page.ipynb").read_bytes() == before


def test_a_fork_that_cannot_even_write_its_log_has_failed(tmp_path, monkeypatch):
    monkeypatch.setattr(forks, "_run", lambda log, task: os._exit(1))
    assert set(in_forks({"one": lambda: None}, tmp_path, 1)) == {"one"}


def test_forks_run_some_at_a_time_and_keep_the_logs_of_what_failed(tmp_path):
    def task(n):
        def run():
            (tmp_path / f"{n}.began").touch()
            print(f"task {n}", flush=True)
            if n == 1:
                raise UserError("one is wrong")
            if n == 2:
                os.kill(os.getpid(), signal.SIGTERM)

        return run

    failed = in_forks({str(n): task(n) for n in range(4)}, tmp_path, 2)
    assert failed == {"1": "error: one is wrong", "2": "its process died of SIGTERM"}
    assert len(list(tmp_path.glob("*.began"))) == 4
    assert sorted(p.name for p in tmp_path.glob("*.log")) == ["1.log", "2.log"]
    assert (tmp_path / "1.log").read_text() == "task 1\nerror: one is wrong\n"


def test_no_more_run_at_once_than_there_are_workers(tmp_path):
    """A process closes its files a moment before it is gone; here the moment is long."""

    def task():
        began = time.monotonic()
        os.closerange(3, 200)  # the end of the pipe by which its end is seen among them
        time.sleep(0.2)
        (tmp_path / f"{os.getpid()}.txt").write_text(f"{began} {time.monotonic()}")

    assert in_forks({str(n): task for n in range(6)}, tmp_path / "logs", 2) == {}
    spans = [tuple(map(float, path.read_text().split())) for path in tmp_path.glob("*.txt")]
    assert len(spans) == 6
    assert max(sum(begin <= t < end for begin, end in spans) for t, _ in spans) <= 2
