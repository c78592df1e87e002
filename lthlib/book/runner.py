"""Execute a notebook template with parameters into a page of the book.

    python -m lthlib.book.runner notebooks/calibration.ipynb pages/lth.ipynb -p method lth

The page appears whole or not at all. Where a cell fails, the notebook up to there is kept beside it as
``<page>.failed.ipynb`` and the last line printed names the cell, the error and that file.

A template has one cell tagged ``parameters`` that holds only ``name = literal`` lines. A parameter takes what
its default is: true or false for a bool, a whole number for an int, any number for a float, text or a list of
texts for a text, a list of such elements or a text (``"all"``) for a list, a mapping for a mapping; anything
where the default is None, and None where the annotation says so.
"""

from __future__ import annotations

import argparse
import ast
import copy
import json
import logging
import math
import os
import re
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
import yaml
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.provisioning import LocalProvisioner
from jupyter_core.utils import run_sync
from nbclient.exceptions import CellTimeoutError, DeadKernelError
from nbformat import NotebookNode
from papermill.clientwrap import PapermillNotebookClient
from papermill.engines import Engine
from papermill.exceptions import PapermillExecutionError
from papermill.execute import raise_for_execution_errors
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook

from lthlib.book import generated, lifeline, zygote
from lthlib.core.errors import UserError, check_plain, choose, shown
from lthlib.core.store import say

KERNEL = {"name": "python3", "display_name": "Python 3", "language": "python"}
PATIENCE = 120  # seconds for a kernel to start and for its last output to arrive, many pages at once

_quiet = logging.getLogger("lthlib.page")  # what goes wrong is said once, by PageError
_quiet.addHandler(logging.NullHandler())
_quiet.propagate = False


_PROGRESS = re.compile("\r|\x1b\\[A")  # back to the start of the line, or up to the bar above


class PageError(Exception):
    """A cell failed, ran out of time, or took its kernel with it; the message names cell, error and file."""


# ------------------------------------------------------------------------------------------------- parameters


@dataclass(frozen=True)
class Parameter:
    """A line of the template's parameters cell."""

    name: str
    default: Any
    optional: bool = False
    """The annotation allows None."""


def parameters_of(notebook: NotebookNode) -> dict[str, Parameter]:
    """Read the parameters that a template declares.

    Raises:
        UserError: There is not exactly one cell tagged ``parameters``, or it holds more than literals.
    """
    cells = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    if len(cells) != 1 or cells[0].cell_type != "code":
        raise UserError(f"A template needs exactly one code cell tagged 'parameters', found {len(cells)}.")
    try:
        statements = ast.parse(cells[0].source).body
    except SyntaxError as problem:
        raise UserError(f"The parameters cell is not Python: {problem.msg} in line {problem.lineno}.") from None
    found: dict[str, Parameter] = {}
    for parameter in map(_declaration, statements):
        if parameter.name in found:
            raise UserError(f"The parameters cell sets {parameter.name!r} twice.")
        found[parameter.name] = parameter
    return found


def _declaration(statement: ast.stmt) -> Parameter:
    annotation = ""
    match statement:
        case ast.Assign(targets=[ast.Name(id=name)], value=value):
            pass
        case ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value):
            annotation = ast.unparse(statement.annotation)
        case _:
            raise UserError(f"The parameters cell may hold only 'name = literal', not {_line(statement)!r}.")
    try:
        default = ast.literal_eval(value)
    except ValueError:
        raise UserError(f"The default of the parameter {name!r} must be a literal, not {_line(value)!r}.") from None
    return Parameter(name, default, optional="None" in annotation or "Optional" in annotation)


def _line(node: ast.AST) -> str:
    return ast.unparse(node).splitlines()[0]


def check(parameters: Mapping[str, Any], declared: Mapping[str, Parameter]) -> None:
    """Raise `UserError` unless every parameter is declared and of its default's type (the rule is above)."""
    for name, value in parameters.items():
        choose(name, declared, "parameter")
        parameter = declared[name]
        if value is None and parameter.optional:
            continue
        why = ""
        try:
            check_plain(value, name)  # JSON can hold it: what is injected into the notebook is the value itself
        except UserError as error:
            why = f" {error}"
        if why or not _fits(value, parameter.default):
            raise UserError(
                f"The parameter {name!r} takes {_kind(parameter)} (default {parameter.default!r}), "
                f"not {shown(value)}.{why}"
            )


def _fits(value: Any, default: Any) -> bool:
    if default is None:
        return True
    if type(default) in (list, tuple):
        elements = type(value) in (list, tuple) and all(_fits(v, d) for v in value for d in default[:1])
        return elements or type(value) is str
    if type(default) is str:
        return type(value) is str or (type(value) in (list, tuple) and all(type(v) is str for v in value))
    return type(value) in ((int, float) if type(default) is float else (type(default),))


def _kind(parameter: Parameter) -> str:
    kinds = {bool: "true or false", int: "a whole number", float: "a number", dict: "a mapping"}
    kinds |= {str: "text or a list of texts", type(None): "any JSON value"}
    default = parameter.default
    if type(default) in (list, tuple):
        kind = f"text or a list like {list(default)!r}"
    else:
        kind = kinds.get(type(default), type(default).__name__)
    return kind + (" or null" if parameter.optional else "")


# ---------------------------------------------------------------------------------------------------- kernels


class PageProvisioner(LocalProvisioner):
    """Starts a kernel on this interpreter: forked by the zygote that the environment names, else plain."""

    async def launch_kernel(self, cmd: list[str], **kwargs: Any) -> dict:
        """Start the kernel and return how to connect to it."""
        address = os.environ.get(zygote.VARIABLE)
        if address:
            arguments = cmd[cmd.index("-f") :]
            directory = str(kwargs.get("cwd") or Path.cwd())
            try:
                self.process = zygote.fork(address, zygote.KERNEL, arguments, kwargs["env"], directory)
            except (OSError, ValueError) as problem:
                say(f"No kernel from {zygote.VARIABLE}={address} ({problem}); starting a plain one.")
            else:
                self.pid = self.process.pid
                return self.connection_info
        return await super().launch_kernel(cmd, **kwargs)

    async def cleanup(self, restart: bool = False) -> None:
        """Remove the folder of the kernel's sockets."""
        await super().cleanup(restart=restart)
        if not restart:
            self.parent.folder.cleanup()

    def _finalize_env(self, env: dict[str, str]) -> None:
        super()._finalize_env(env)
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(zygote.ROOT), env.get("PYTHONPATH")]))


class PageKernelManager(AsyncKernelManager):
    """Runs every page on `sys.executable`, whatever kernel it names, over sockets in a private folder."""

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        self.folder = zygote.TemporaryFolder("lth-kernel-")
        self.transport = "ipc"
        self.ip = str(Path(self.folder.name, "kernel"))
        self.connection_file = str(Path(self.folder.name, "kernel.json"))
        self.provisioner = PageProvisioner(kernel_spec=self.kernel_spec, parent=self)

    @property
    def kernel_spec(self) -> KernelSpec:
        """The one kernel there is."""
        command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}", "--log-level=CRITICAL"]
        return KernelSpec(argv=command, **KERNEL)


class _PageClient(PapermillNotebookClient):
    """Says how a kernel died."""

    async def async_execute_cell(self, *args: Any, **kwargs: Any) -> NotebookNode:
        try:
            return await super().async_execute_cell(*args, **kwargs)
        except DeadKernelError:
            raise DeadKernelError(_death(await self.km.provisioner.poll())) from None

    execute_cell = run_sync(async_execute_cell)


def _death(status: int | None) -> str:
    if status is None or status >= 0:
        return f"the kernel ended with status {status}"
    name = signal.Signals(-status).name
    reasons = {"SIGKILL": " (someone killed it, or memory ran out)"}
    return f"the kernel died of {name}{reasons.get(name, '')}"


class _PageEngine(Engine):
    @classmethod
    def execute_managed_notebook(cls, nb_man: Any, kernel_name: str, **options: Any) -> None:
        _PageClient(
            nb_man,
            kernel_name=kernel_name,
            kernel_manager_class=PageKernelManager,
            timeout=options["timeout"],
            startup_timeout=PATIENCE,
            iopub_timeout=PATIENCE,
            log=_quiet,
        ).execute()


# ------------------------------------------------------------------------------------------------------ pages


def execute(
    template: str | Path,
    output: str | Path,
    parameters: Mapping[str, Any] | None = None,
    *,
    title: str | None = None,
    timeout: float | None = None,
    of: str = "",
) -> None:
    """Execute a template into a page.

    The page runs on this interpreter, in the working directory of the caller, with the checkout on
    `sys.path`. Lines of standard error that a progress bar drew are left out of it.

    Args:
        template: The notebook to execute; it is not changed.
        output: The page, ``*.ipynb``; replaced at the end, in one step.
        parameters: Values for the template's parameters (their types: see the head of this file).
        title: The page's heading in place of the template's own.
        timeout: Seconds that any one cell may take; by default as long as it likes.
        of: What the page is made from (`lthlib.book.generated.page_of`), to be noted where it belongs to the book.

    Raises:
        UserError: The template, a parameter or the output is at fault. Nothing has been executed or written.
        PageError: A cell failed. The notebook up to there is ``<output stem>.failed.ipynb``; an older page
            stays.
        KeyboardInterrupt: As `PageError`.
    """
    template, output = Path(template), Path(output)
    notebook = read_template(template)
    parameters = dict(parameters or {})
    declared = parameters_of(notebook)
    check(parameters, declared)
    _check_output(output, template)
    page = _prepare(notebook, parameters, template, output)
    if title is not None:
        _entitle(page, title, template)
    failed = output.with_name(f"{output.stem}.failed.ipynb")
    limit = None if timeout is None else max(1, math.ceil(timeout))
    try:
        _PageEngine.execute_notebook(page, KERNEL["name"], progress_bar=False, timeout=limit)
        raise_for_execution_errors(page, None)
        if page.metadata.papermill["exception"]:
            raise PageError("SystemExit: the cell ended the page early")  # papermill takes exit(0) for success
    except (PageError, PapermillExecutionError, RuntimeError, TimeoutError, KeyboardInterrupt) as problem:
        message = f"{_where(page, template)}: {_what(problem, timeout)}. {_keep(page, failed)}"
        if isinstance(problem, KeyboardInterrupt):
            raise KeyboardInterrupt(message) from None
        raise PageError(message) from problem
    except OSError as problem:
        raise UserError(f"Cannot start a kernel: {problem}.") from None
    _drop_progress(page)
    failed.unlink(missing_ok=True)  # first: were we killed in between, no page would have a failed one beside it
    _save(page, output, of)


def read_template(path: Path) -> NotebookNode:
    """Read a notebook.

    Raises:
        UserError: There is no such file, or it is not a notebook.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or not isinstance(content.get("cells"), list):
            raise ValueError("it has no cells")
        notebook = nbformat.from_dict(content)
        nbformat.validate(notebook)
    except OSError as problem:
        raise UserError(f"Cannot read the template {path}: {problem.strerror}.") from None
    except (ValueError, nbformat.ValidationError) as problem:
        raise UserError(f"{path} is not a notebook: {str(problem).splitlines()[0]}.") from None
    return load_notebook_node(notebook)


def _check_output(output: Path, template: Path) -> None:
    if output.suffix != ".ipynb" or output.name.endswith(".failed.ipynb"):
        raise UserError(f"The page {output} must be named *.ipynb (and not *.failed.ipynb).")
    if output.resolve() == template.resolve():
        raise UserError(f"The page would overwrite its template {template}; give it another name.")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise UserError(f"Cannot make the folder {output.parent}: {problem.strerror}.") from None
    if output.is_dir() or not os.access(output.parent, os.W_OK | os.X_OK):
        raise UserError(f"Cannot write {output}: it is a folder, or its folder may not be written.")


def _prepare(notebook: NotebookNode, parameters: dict, template: Path, output: Path) -> NotebookNode:
    page = copy.deepcopy(notebook)
    if parameters:
        page = parameterize_notebook(page, parameters, kernel_name=KERNEL["name"], language=KERNEL["language"])
        _fold_parameters(page)
    page.metadata["kernelspec"] = dict(KERNEL)
    page.metadata.papermill["input_path"] = str(template)
    page.metadata.papermill["output_path"] = str(output)
    return page


def _fold_parameters(page: NotebookNode) -> None:
    """Leave the template's defaults out of the rendered page; the values it was made with unfold at a click."""
    shown = {"parameters": "remove-cell", "injected-parameters": "hide-input"}
    for cell in page.cells:
        tags = cell.metadata.get("tags", [])
        cell.metadata["tags"] = tags + [shown[tag] for tag in tags if tag in shown]


def _entitle(page: NotebookNode, title: str, template: Path) -> None:
    heading, _, rest = page.cells[0].source.partition("\n")
    if page.cells[0].cell_type != "markdown" or not heading.startswith("# "):
        raise UserError(f"{template} must begin with a heading (# ...), which the page's title replaces.")
    page.cells[0].source = f"# {title}\n{rest}"


def _where(page: NotebookNode, template: Path) -> str:
    """Name the last cell begun by its number in the template, where the person will look for it."""
    cells = [c for c in page.cells if "papermill" in c.metadata and c.metadata.papermill.get("status")]
    own = [cell for cell in cells if "injected-parameters" not in cell.metadata.get("tags", [])]
    begun = [number for number, cell in enumerate(own, 1) if cell.metadata.papermill["start_time"]]
    if not begun:
        return f"{template}, before the first cell"
    lines = own[begun[-1] - 1].source.strip().splitlines()
    return f"{template}, cell {begun[-1]}" + (f" ({lines[0]})" if lines else "")


def _what(problem: BaseException, timeout: float | None) -> str:
    match problem:
        case PapermillExecutionError():
            return f"{problem.ename}: {problem.evalue}".rstrip(". ")
        case CellTimeoutError() if timeout is not None:
            return f"CellTimeoutError: it took longer than {timeout:g} s"
        case PageError():
            return str(problem)
        case KeyboardInterrupt():
            return "interrupted"
        case _:
            return f"{type(problem).__name__}: {str(problem).strip()}".splitlines()[0]


def _drop_progress(page: NotebookNode) -> None:
    """Leave out the lines of standard error that returned to their start: progress bars, not messages."""
    for cell in page.cells:
        errors = [o for o in cell.get("outputs", []) if o.output_type == "stream" and o.name == "stderr"]
        text = "".join(output.text for output in errors)
        if "\r" not in text:
            continue
        errors[0].text = "\n".join(line for line in text.split("\n") if not _PROGRESS.search(line))
        dropped = [id(output) for output in errors if output is not errors[0] or not output.text.strip()]
        cell.outputs = [output for output in cell.outputs if id(output) not in dropped]


def _keep(page: NotebookNode, failed: Path) -> str:
    try:
        _save(page, failed)
    except UserError as problem:
        return f"The notebook up to there is lost. {problem}"
    return f"The notebook up to there: {failed}"


def _save(page: NotebookNode, path: Path, of: str = "") -> None:
    try:
        generated.write(path, nbformat.writes(page) + "\n", of)
    except OSError as problem:
        raise UserError(f"Cannot write {path}: {problem.strerror}. Nothing was left half-written.") from None


# ----------------------------------------------------------------------------------------------- command line


def _value(text: str) -> Any:
    """Read a value of the command line: JSON (``3``, ``1e-3``, ``true``, ``[0, 1]``, ``null``), else text."""
    try:
        return json.loads(text)
    except ValueError:
        return yaml.safe_load(text) if text[:1] in ("[", "{") else text


def _given(text: str | None, pairs: Sequence[tuple[str, str]]) -> dict[str, Any]:
    try:
        if text is not None and text.endswith((".json", ".yml", ".yaml")):
            text = Path(text).read_text(encoding="utf-8")
        parameters = {} if text is None else _json_or_yaml(text)
        parameters |= {name: _value(value) for name, value in pairs}
    except OSError as problem:
        raise UserError(f"Cannot read the parameters {text}: {problem.strerror}.") from None
    except (ValueError, yaml.YAMLError) as problem:
        raise UserError(f"The parameters are neither JSON nor YAML: {' '.join(str(problem).split())}.") from None
    return parameters


def _json_or_yaml(text: str) -> dict[str, Any]:
    try:
        parameters = json.loads(text)
    except ValueError:
        parameters = yaml.safe_load(text)
    if not isinstance(parameters, dict):
        raise ValueError(f"expected a mapping of names to values, got {text.strip()[:60]!r}")
    return parameters


def main(arguments: Sequence[str] | None = None) -> int:
    """Execute a template from the command line; 0 for a page, 1 for a failed page, 2 for bad input."""
    parser = argparse.ArgumentParser(prog="python -m lthlib.book.runner", description=__doc__.splitlines()[0])
    parser.add_argument("template", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--parameters", metavar="JSON_OR_YAML", help="a mapping, or a *.json, *.yml file with one")
    parser.add_argument("-p", dest="pairs", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"))
    parser.add_argument("--title", help="the page's heading, in place of the template's")
    parser.add_argument("--timeout", type=float, metavar="SECONDS", help="for any one cell (default: none)")
    parser.add_argument("--version", help="of the code behind the page, for a run to know later")
    parser.add_argument("--results", nargs="*", default=[], help="files that tell of its results, likewise")
    options = parser.parse_args(arguments)
    lifeline.watch()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a scheduler's end is an end with a notebook
    # An interrupt leaves tasks of nbclient unfinished, and their complaints would follow the last line.
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    try:
        given, of = _given(options.parameters, options.pairs), ""
        if options.version:
            of = generated.page_of(options.template, given, options.title, options.version, options.results)
        execute(options.template, options.output, given, title=options.title, timeout=options.timeout, of=of)
    except UserError as problem:
        say(str(problem))
        return 2
    except PageError as problem:
        say(str(problem))
        return 1
    except KeyboardInterrupt as problem:
        say(str(problem) or "interrupted")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
