"""Labs: short notebooks beside the chapters on methods and metrics, executed like pages, included there as Markdown.

``notebooks/labs/<chapter>.ipynb`` becomes ``book/_generated/labs/<chapter>.ipynb``, and from that comes
``<chapter>.md`` with its pictures, which the chapter includes. A lab computes what it shows within seconds. All of them
go with the library into one archive for a class, ``labs.zip``.
"""

from __future__ import annotations

import base64
import functools
import io
import json
import re
import tomllib
import zipfile
from pathlib import Path

import nbformat
from nbformat import NotebookNode

import lthlib
from lthlib.book.plan import BUILD, GENERATED, template_made_from, vocabulary
from lthlib.book.runner import execute, made_from
from lthlib.core.forks import in_forks
from lthlib.core.store import ROOT, sha256, write_atomically
from lthlib.core.versions import code_version, digest, modules_of

FOLDER, MADE = ROOT / "notebooks" / "labs", GENERATED / "labs"
EXAMPLE = ROOT / "book" / "own-example"
"""Two networks compared, as `benchmarks/own_example.py` recorded them: the report on them is a page of the book."""
NEEDED = ("matplotlib", "numpy", "opencv-python-headless", "pandas", "pillow", "safetensors", "scikit-image")
NEEDED += ("scikit-learn", "scipy", "torch", "tqdm")
"""The dependencies in ``pyproject.toml`` that the labs, and what they import of the library, use."""
README = """# The labs

Short notebooks from the book "Can You Win Everything with a Lottery Ticket?", one for each chapter on a method or a
metric, and the library that they use. They load nothing from the network, train nothing, and take seconds each.

    python -m venv env && . env/bin/activate
    pip install torch --index-url https://download.pytorch.org/whl/cpu   # without CUDA, much smaller
    pip install -r requirements.txt
    jupyter lab

Python 3.11 to 3.13. Open a notebook here, beside the folder lthlib. Guess, change the line marked `# change this`, run.
"""
SHOWN = GENERATED / f"{EXAMPLE.name}.ipynb"
_REPORT, _TITLE = "notebooks/own.ipynb", "Such a report"
_TOUCHED = re.compile(r"lthlib\.(\w+)|from lthlib import ([\w, ]+)")


def labs() -> list[str]:
    """Return the names of all labs, which are those of their chapters."""
    return sorted(path.stem for path in FOLDER.glob("*.ipynb"))


@functools.cache
def lab_made_from(name: str) -> str:
    """Return the fingerprint of a lab: its text, and the code of each room of the library that it touches."""
    text = (FOLDER / f"{name}.ipynb").read_text()
    code = "\n".join("".join(cell["source"]) for cell in json.loads(text)["cells"] if cell["cell_type"] == "code")
    touched = [n for pair in _TOUCHED.findall(code) for n in re.split(r"[,\s]+", "".join(pair)) if n]
    rooms = {lthlib.PLACES.get(n, f"lthlib.{n}").split(".")[1] for n in touched}
    return digest([text, code_version(*(module for room in sorted(rooms) for module in modules_of(room)))])


def make_labs(workers: int) -> dict[str, str]:
    """Run the labs that are not current and write what the chapters include: a notice in the place of one that fails.

    The report on the example is made beside them.

    Returns:
        Name -> why, of the labs that failed.
    """
    todo = [name for name in labs() if made_from(MADE / f"{name}.ipynb") != lab_made_from(name)]
    if todo:
        import torch._dynamo  # noqa: F401  # what the first optimizer loads, for seconds: the forks have it at once
    tasks = {name: functools.partial(_run, name) for name in todo}
    if made_from(SHOWN) != example_made_from():
        tasks[EXAMPLE.name] = _run_example
    lost = in_forks(tasks, BUILD / "logs" / "labs", workers)
    for name in labs():
        if name in lost:
            text = _missing("lab", lost[name])
        else:
            text = fragment(nbformat.read(MADE / f"{name}.ipynb", as_version=4), name)
        _write(MADE / f"{name}.md", text.encode())
    _write(MADE / "labs.zip", archive())
    SHOWN.with_suffix(".md").unlink(missing_ok=True)
    if EXAMPLE.name in lost:
        SHOWN.unlink(missing_ok=True)
        _write(SHOWN.with_suffix(".md"), f"# {_TITLE}\n\n{_missing('report', lost[EXAMPLE.name])}".encode())
    return lost


def _missing(what: str, reason: str) -> str:
    return f"```{{warning}}\nThis {what} is missing: it could not be made.\n```\n\n`````text\n{reason}\n`````\n"


def _run(name: str) -> None:
    import torch

    torch.set_num_threads(1)
    execute(FOLDER / f"{name}.ipynb", MADE / f"{name}.ipynb", {}, of=lab_made_from(name))


@functools.cache
def example_made_from() -> str:
    """Return the fingerprint of the report on the example: what it tells of, its text, and the code behind it."""
    recorded = (sha256(path) for path in sorted(EXAMPLE.glob("*")))
    return digest([template_made_from(_REPORT), vocabulary(), *recorded])


def _run_example() -> None:
    execute(ROOT / _REPORT, SHOWN, {"found": str(EXAMPLE)}, title=_TITLE, of=example_made_from())


def fragment(lab: NotebookNode, name: str) -> str:
    """Return an executed lab as Markdown, without its heading; its pictures are written beside it.

    The comment at the head of a cell that draws is the text for those who do not see the picture.
    """
    link = f"{{download}}`The notebook of this lab </../notebooks/labs/{name}.ipynb>` runs in seconds, on any machine."
    parts = [lab.cells[0].source.partition("\n")[2].strip(), link]
    pictures = 0
    for cell in lab.cells[1:]:
        parts.append(f"```python\n{cell.source}\n```" if cell.cell_type == "code" else cell.source)
        for output in cell.get("outputs", []):
            data = output.get("data", {"text/plain": output.get("text", "")})
            if "image/png" in data:
                pictures += 1
                _write(MADE / f"{name}-{pictures}.png", base64.b64decode(data["image/png"]))
                comment = re.match(r"#\s*([^\n\]]+)", cell.source)
                parts.append(f"![{comment[1] if comment else 'Figure'}](/_generated/labs/{name}-{pictures}.png)")
            elif text := data.get("text/plain", "").strip("\n"):
                parts.append(f"```text\n{text}\n```")
    return "\n\n".join(part for part in parts if part) + "\n"


def archive() -> bytes:
    """Return the labs, the library and what to install as a ZIP file, the same bytes for the same contents."""
    asked = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    wanted = ["jupyterlab", *(line for line in asked if re.match(r"[\w-]+", line)[0] in NEEDED)]
    files = {"README.md": README.encode(), "requirements.txt": "\n".join([*wanted, ""]).encode()}
    files |= {path.name: path.read_bytes() for path in [ROOT / "LICENSE", *sorted(FOLDER.glob("*.ipynb"))]}
    files |= {str(p.relative_to(ROOT)): p.read_bytes() for p in sorted((ROOT / "lthlib").rglob("*.py"))}
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in files.items():
            entry = zipfile.ZipInfo(f"labs/{name}")  # dated 1980
            entry.external_attr = 0o644 << 16
            file.writestr(entry, content, zipfile.ZIP_DEFLATED)
    return packed.getvalue()


def _write(path: Path, content: bytes) -> None:
    """Write what is new: Sphinx reads a page again whose parts have another date."""
    if not path.exists() or path.read_bytes() != content:
        write_atomically(path, content)
