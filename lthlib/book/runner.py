"""Execute a notebook template with parameters into a page of the book, by papermill, inside this process.

A kernel in a process of its own costs every page the seconds that importing torch, pandas and seaborn takes. So pages
are run by an engine whose kernel lives here, and whoever runs many forks (`lthlib.core.forks`): what is loaded before
the fork is there at once. ``papermill notebooks/calibration.ipynb page.ipynb`` runs the same cells in a kernel of their
own, as anywhere else.

A page appears whole or not at all. Where a cell fails, the notebook up to there is kept beside it as
``<page>.failed.ipynb``, and the error names the cell and that file.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nbformat
import papermill
from ipykernel.inprocess.client import InProcessKernelClient
from ipykernel.inprocess.ipkernel import InProcessInteractiveShell
from ipykernel.inprocess.manager import InProcessKernelManager
from IPython.core.pylabtools import select_figure_formats
from matplotlib import pyplot
from matplotlib_inline.config import InlineBackend
from nbformat import NotebookNode
from nbformat.v4 import output_from_msg
from papermill.engines import Engine, papermill_engines
from papermill.exceptions import PapermillExecutionError
from traitlets.config import Config

from lthlib.core.errors import UserError
from lthlib.core.store import ROOT, write_atomically

ENGINE = "in-process"
OF = "lthlib_of"  # in a page's metadata: the fingerprint of what it was made from
_PROGRESS = re.compile("\r|\x1b\\[A")  # back to the start of the line, or up to the bar above


def execute(template: Path, output: Path, parameters: Mapping[str, Any], *, title: str | None = None, of: str = ""):
    """Execute a template into a page.

    Args:
        template: The notebook to execute; it is not changed.
        output: The page; replaced at the end, in one step.
        parameters: Values for the template's parameters; `lthlib.book.pages.load` checks them.
        title: The page's heading in place of the template's own.
        of: Fingerprint of what the page is made from, kept in its metadata.

    Raises:
        UserError: A cell failed; the message names template, cell, error, and where the notebook up to there lies. An
            older page stays.
    """
    temporary = output.with_name(f".{output.stem}.tmp.ipynb")
    failed = output.with_name(f"{output.stem}.failed.ipynb")
    output.parent.mkdir(parents=True, exist_ok=True)
    papermill_engines.register(ENGINE, _InProcess)
    for name in ("papermill", "asyncio"):  # parameters are checked by whoever reads them; a kernel leaves a task behind
        logging.getLogger(name).setLevel(logging.CRITICAL)
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
        raise UserError(f"{where}: {said}. The notebook up to there: {_shown(failed)}") from None
    finally:
        temporary.unlink(missing_ok=True)
    if not any("image/png" in output.get("data", {}) for cell in page.cells for output in cell.get("outputs", [])):
        raise UserError(f"{_shown(template)} drew no figure, and figures are what a page is for.")
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
    """Runs the cells of a notebook in a kernel that lives in this process."""

    @classmethod
    def execute_managed_notebook(cls, nb_man: Any, kernel_name: str, **_: Any) -> None:
        os.environ["PYDEVD_DISABLE_FILE_VALIDATION"] = "1"  # or the debugger that a kernel loads warns of itself
        # History would take a thread, and a file in the home folder.
        manager = InProcessKernelManager(config=Config(HistoryManager={"enabled": False}))
        manager.start_kernel()
        client = manager.client()
        client.start_channels()
        InlineBackend.clear_instance()  # one that served another kernel would not tell this one how to draw
        manager.kernel.shell.enable_matplotlib("inline")
        select_figure_formats(manager.kernel.shell, {"png"})  # or only the first kernel of a process draws
        pyplot.close("all")  # a figure that this process had open would take the page's lines, and is not shown
        for index, cell in enumerate(nb_man.nb.cells):
            nb_man.cell_start(cell, index)
            ok = cell.cell_type != "code" or _run(client, cell)
            if not ok:
                nb_man.cell_exception(cell, cell_index=index)
            nb_man.cell_complete(cell, cell_index=index)
            if not ok:
                break
        manager.shutdown_kernel()
        InProcessInteractiveShell.clear_instance()


def _run(client: InProcessKernelClient, cell: NotebookNode) -> bool:
    """Run a cell, keep its outputs, and say whether it succeeded."""
    client.execute(cell.source)
    outputs: list[NotebookNode] = []
    while (message := client.get_iopub_msg())["content"].get("execution_state") != "idle":
        with contextlib.suppress(ValueError):  # it is about no output
            output = output_from_msg(message)
            if outputs and output.output_type == "stream" and output.name == outputs[-1].get("name"):
                outputs[-1].text += output.text
            else:
                outputs.append(output)
    reply = client.get_shell_msg()["content"]
    cell.execution_count, cell.outputs = reply["execution_count"], _without_progress(outputs)
    return reply["status"] == "ok"


def _without_progress(outputs: list[NotebookNode]) -> list[NotebookNode]:
    """Leave out the lines of standard error that returned to their start: progress bars, not messages."""
    for output in outputs:
        if output.output_type == "stream" and output.name == "stderr" and _PROGRESS.search(output.text):
            output.text = "\n".join(line for line in output.text.split("\n") if not _PROGRESS.search(line))
    return [output for output in outputs if output.output_type != "stream" or output.text.strip()]
