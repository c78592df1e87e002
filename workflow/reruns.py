"""Ask the workflow what it would make again after each of some changes; nothing is made again to find out.

    .venv/bin/python workflow/reruns.py             print the table
    .venv/bin/python workflow/reruns.py --record    and put it into book/results/reruns.json, for the book

A tiny grid is finished in a copy of the checkout. Then each change is made there, ``report.py`` plans a run
(``--dry-run``), and the change is taken back.
"""

from __future__ import annotations

import ast
import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import recording
import yaml
from progress import DETAIL, KINDS, START
from torture import GRID, PATIENCE, Checkout

from lthlib.book.reproducibility import RERUNS, reruns_table
from lthlib.core import machine as compute

STUDIED = {**GRID, "title": "What is made again", "method_pages": ["calibration"]}
OUTDATED = """
import sys
from lthlib import data
from lthlib.book.grid import read_grid
from lthlib.core.store import Store
from lthlib.tickets.ticket import version_of
store = Store()
for study in read_grid(sys.argv[1]).studies:
    images = data.load(study.data, store, study.train_size)
    for ticket in study.tickets():
        if not store.has(f"tickets/{ticket.id}", version_of(ticket, images)):
            print(ticket.id)
"""


def line_in(function: str) -> Callable[[bytes], bytes]:
    """Return an edit that adds a line of code to a function at the top level of a file."""

    def edit(source: bytes) -> bytes:
        (found,) = (n for n in ast.parse(source).body if getattr(n, "name", "") == function)
        lines = source.decode().splitlines(keepends=True)
        first = found.body[1 if ast.get_docstring(found) is not None else 0]
        lines.insert(first.lineno - 1, "    _changed = True\n")
        return "".join(lines).encode()

    return edit


def setting(*path: str, value: object) -> Callable[[bytes], bytes]:
    """Return an edit that sets one key of a grid."""

    def edit(text: bytes) -> bytes:
        grid = part = yaml.safe_load(text)
        for key in path[:-1]:
            part = part.setdefault(key, {})
        part[path[-1]] = value
        return yaml.safe_dump(grid).encode()

    return edit


@dataclass(frozen=True)
class Change:
    """What is changed, in words; in which file (a pattern, its first match; "" is the grid); and how."""

    what: str
    file: str
    edit: Callable[[bytes], bytes]


CHANGES = (
    Change("the date of a file that pages read", "lthlib/book/pages.py", bytes),
    Change("a comment beside a method", "lthlib/pruning/snip.py", lambda text: text + b"# said otherwise\n"),
    Change("a line in the store's own file", "lthlib/core/store.py", line_in("write_atomically")),
    Change("a page of prose", "book/reading.md", lambda text: text + b"\nOne more sentence.\n"),
    Change(
        "the heading of one template",
        "notebooks/calibration.ipynb",
        lambda text: text.replace(b'"# Calibration', b'"# Calibration at a glance', 1),
    ),
    Change("a line in a figure", "lthlib/figures/calibration.py", line_in("reliability")),
    Change("a line in the search for SNIP's masks", "lthlib/pruning/snip.py", line_in("saliency")),
    Change("an option of SNIP", "", setting("options", "snip", "batch", value=64)),
    Change("a line in the measurement of calibration", "lthlib/metrics/calibration/measure.py", line_in("measure")),
    Change("a parameter of calibration", "", setting("dimensions", "calibration", "n_bins", value=10)),
    Change("a line in the training loop", "lthlib/training/loop.py", line_in("train")),
    Change("a setting of the recipe", "", setting("recipe", "lr", value=0.05)),
    Change("one more seed", "", setting("seeds", value=[0, 1])),
    Change(  # the last: what is damaged is set aside, and cannot be taken back
        "damage to a ticket of SNIP",
        "store/tickets/*-snip-*/weights.safetensors",
        lambda content: content[: len(content) // 2],
    ),
)


@contextlib.contextmanager
def made(change: Change, folder: Path, grid: str) -> Iterator[None]:
    """Make a change in a checkout and take it back, date included; what was set aside for its damage stays there."""
    path = sorted(folder.glob(change.file or grid))[0]
    before, status = path.read_bytes(), path.stat()
    path.write_bytes(change.edit(before))
    try:
        yield
    finally:
        if path.exists():
            path.write_bytes(before)
            os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def planned(folder: Path, grid: str) -> dict[str, list[str]]:
    """Return what a run of a grid would make in a checkout: names by kind (job, page, rows, front, book)."""
    _python(folder, "workflow/report.py", grid, "--cores", "1", "--", "--dry-run")
    found: dict[str, list[str]] = {}
    for line in (folder / "_build/snakemake.log").read_text().splitlines():
        if rule := START.match(line):
            mine = found.setdefault(KINDS.get(rule[1], rule[1]), [])
            mine.append("")
        elif (detail := DETAIL.match(line)) and detail[1] == "wildcards":
            mine[-1] = detail[2].partition("=")[2]
    return {kind: sorted(names) for kind, names in found.items() if kind != "all"}


def outdated(folder: Path, grid: str) -> list[str]:
    """Return the tickets of a grid that a checkout's store does not hold as its code would make them."""
    return _python(folder, "-c", OUTDATED, grid).split()


def _python(folder: Path, *arguments: str) -> str:
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": str(folder)}
    environment.pop("LTHLIB_STORE", None)
    done = subprocess.run([sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)} ended with {done.returncode}: {done.stderr[-2000:]}")
    return done.stdout


def survey(folder: Path) -> dict[str, object]:
    """Finish the tiny grid in a new copy of the checkout, make every change there, and return what was planned."""
    file = folder / "reruns.yml"
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(STUDIED))
    checkout = Checkout(folder / "checkout", file)
    here, grid = checkout.folder, str(checkout.grid)
    every = {"tickets": outdated(here, grid), **planned(here, grid)}
    if checkout.start().wait(PATIENCE) != 0:
        raise SystemExit(f"The grid failed:\n{checkout.last_words()}")
    lines = [{"change": "nothing", "tickets": outdated(here, grid), **planned(here, grid)}]
    for change in CHANGES:
        with made(change, here, grid):
            plan = planned(here, grid)  # first: it sets damage aside
            lines.append({"change": change.what, "tickets": outdated(here, grid), **plan})
        print(change.what, file=sys.stderr, flush=True)
    return {"every": every, "changes": lines, "provenance": compute.provenance("auto")}


if __name__ == "__main__":
    recording.main(__doc__.splitlines()[0], survey, reruns_table, RERUNS)
