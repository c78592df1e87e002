"""Execute a notebook template with parameters into a page of the book, by papermill, inside this process.

A kernel in a process of its own costs every page the seconds that importing torch, pandas and seaborn takes. So pages
are run by an engine that hands their cells to IPython here, and whoever runs many forks (`lthlib.core.forks`): what is
loaded before the fork is there at once. ``papermill notebooks/calibration.ipynb page.ipynb`` runs the same cells in a
kernel, as anywhere else.

A page appears whole or not at all. Where a cell fails, the notebook up to there is kept beside it as
``<page>.failed.ipynb``, and the error names the cell and that file.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nbformat
import papermill
from IPython.core.displayhook import DisplayHook
from IPython.core.displaypub import DisplayPublisher
from IPython.core.interactiveshell import InteractiveShell
from IPython.core.pylabtools import select_figure_formats
from matplotlib import pyplot
from matplotlib_inline.config import InlineBackend
from nbformat import NotebookNode
from nbformat.v4 import new_output
from papermill.engines import Engine, papermill_engines
from papermill.exceptions import PapermillExecutionError

from lthlib.core.errors import UserError
from lthlib.core.store import ROOT, write_atomically

ENGINE = "in-process"
OF = "lthlib_of"  # in a page's metadata: the fingerprint of what it was made from
_PROGRESS = re.compile("\r|\x1b\\[A")  # back to the start of the line, or up to the bar above


class PageError(UserError):
    """A cell failed; the message names the template, the cell, the error, and where the notebook up to there lies."""


def execute(template: Path, output: Path, parameters: Mapping[str, Any], *, title: str | None = None, of: str = ""):
    """Execute a template into a page.

    Args:
        template: The notebook to execute; it is not changed.
        output: The page; replaced at the end, in one step.
        parameters: Values for the template's parameters; `lthlib.book.pages.load` checks them.
        title: The page's heading in place of the template's own.
        of: Fingerprint of what the page is made from, kept in its metadata.

    Raises:
        PageError: A cell failed. An older page stays.
    """
    temporary = output.with_name(f".{output.stem}.tmp.ipynb")
    failed = output.with_name(f"{output.stem}.failed.ipynb")
    output.parent.mkdir(parents=True, exist_ok=True)
    papermill_engines.register(ENGINE, _InProcess)
    logging.getLogger("papermill").setLevel(logging.ERROR)  # parameters are checked by whoever reads them
    try:
        page = papermill.execute_notebook(
            template,
            temporary,
            dict(parameters),
            engine_name=ENGINE,
            kernel_name="python3",
            progress_bar=False,
            request_save_on_cell_execute=False,
        )
    except PapermillExecutionError as error:
        os.replace(temporary, failed)
        cell = error.source.strip().splitlines()
        said = f"{error.ename}: {error.evalue}".rstrip(". ")
        number = error.cell_index + (0 if parameters else 1)  # in the template, which has no injected cell
        where = f"{_shown(template)}, cell {number}" + (f" ({cell[0]})" if cell else "")
        raise PageError(f"{where}: {said}. The notebook up to there: {_shown(failed)}") from None
    finally:
        temporary.unlink(missing_ok=True)
    if not any("image/png" in output.get("data", {}) for cell in page.cells for output in cell.get("outputs", [])):
        raise PageError(f"{_shown(template)} drew no figure, and figures are what a page is for.")
    _furnish(page, title)
    page.metadata[OF] = of
    failed.unlink(missing_ok=True)
    write_atomically(output, nbformat.writes(page) + "\n")


def made_from(page: Path) -> str:
    """Return the fingerprint of what a page was made from; empty where there is no whole page."""
    try:
        return json.loads(page.read_bytes())["metadata"][OF]
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _shown(path: Path) -> Path:
    """Return a path as messages name it: relative to the checkout where it lies there."""
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path


def _furnish(page: NotebookNode, title: str | None) -> None:
    """Set the heading, and fold the values of parameters: the template's defaults are left out of the rendered page."""
    if title is not None:
        _, _, rest = page.cells[0].source.partition("\n")
        page.cells[0].source = f"# {title}\n{rest}"
    folded = {"parameters": "remove-cell", "injected-parameters": "hide-input"}
    for cell in page.cells:
        tags = cell.metadata.get("tags", [])
        cell.metadata["tags"] = tags + [folded[tag] for tag in tags if tag in folded]


class _InProcess(Engine):
    """Runs the cells of a notebook in an IPython shell of this process, and keeps their outputs as a kernel would."""

    @classmethod
    def execute_managed_notebook(cls, nb_man: Any, kernel_name: str, **_: Any) -> None:
        shell = _Shell(user_ns={"__name__": "__main__"})
        InlineBackend.clear_instance()  # one that served another shell would not tell this one how to draw
        shell.enable_matplotlib("inline")
        select_figure_formats(shell, {"png"})  # matplotlib-inline does that for the first shell of a process alone
        pyplot.close("all")  # a figure that this process had open would take the page's lines, and is not shown
        for index, cell in enumerate(nb_man.nb.cells):
            nb_man.cell_start(cell, index)
            if cell.cell_type == "code":
                cell.outputs, ok = shell.outputs_of(cell.source)
                if not ok:
                    nb_man.cell_exception(cell, cell_index=index)
                cell.execution_count = shell.execution_count - 1
            nb_man.cell_complete(cell, cell_index=index)
            if cell.cell_type == "code" and not ok:
                break
        InteractiveShell.clear_instance()


class _Publisher(DisplayPublisher):
    def publish(self, data: dict, metadata: dict | None = None, **_: Any) -> None:
        self.shell.outputs.append(new_output("display_data", data=_plain(data), metadata=metadata or {}))


class _Hook(DisplayHook):
    def write_output_prompt(self) -> None:
        pass

    def write_format_data(self, format_dict: dict, md_dict: dict | None = None) -> None:
        found = {"data": _plain(format_dict), "metadata": md_dict or {}}
        self.shell.outputs.append(new_output("execute_result", execution_count=self.shell.execution_count, **found))


class _Shell(InteractiveShell):
    """An IPython shell whose outputs are notebook outputs."""

    def __init__(self, **kwargs: Any):
        self.outputs: list[NotebookNode] = []
        super().__init__(display_pub_class=_Publisher, displayhook_class=_Hook, **kwargs)
        InteractiveShell._instance = self  # what `get_ipython` and matplotlib ask for
        self.history_manager.enabled = False  # a thread, and a file in the home folder

    def enable_gui(self, gui: str | None = None) -> None:
        """Do nothing: pictures go into the page."""

    def outputs_of(self, source: str) -> tuple[list[NotebookNode], bool]:
        """Run a cell; return its outputs and whether it succeeded."""
        self.outputs = []
        streams = _Stream(self, "stdout"), _Stream(self, "stderr")
        with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]):
            ok = self.run_cell(source, store_history=True).success
        return _without_progress(self.outputs), ok

    def _showtraceback(self, etype: type, evalue: BaseException, stb: list[str]) -> None:
        self.outputs.append(new_output("error", ename=etype.__name__, evalue=str(evalue), traceback=stb))


class _Stream(io.TextIOBase):
    """Appends what is written to the outputs of the running cell."""

    def __init__(self, shell: _Shell, name: str):
        self.shell, self.name = shell, name

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        last = self.shell.outputs[-1] if self.shell.outputs else None
        if last is not None and last.output_type == "stream" and last.name == self.name:
            last.text += text
        else:
            self.shell.outputs.append(new_output("stream", name=self.name, text=text))
        return len(text)


def _plain(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return display data as JSON can hold it: pictures come as bytes."""
    return {kind: base64.b64encode(v).decode() if isinstance(v, bytes) else v for kind, v in data.items()}


def _without_progress(outputs: list[NotebookNode]) -> list[NotebookNode]:
    """Leave out the lines of standard error that returned to their start: progress bars, not messages."""
    for output in outputs:
        if output.output_type == "stream" and output.name == "stderr" and _PROGRESS.search(output.text):
            output.text = "\n".join(line for line in output.text.split("\n") if not _PROGRESS.search(line))
    return [output for output in outputs if output.output_type != "stream" or output.text.strip()]
