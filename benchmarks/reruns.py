"""Say what a run would make again after each of some changes; nothing is made again to find out.

    .venv/bin/python benchmarks/reruns.py             print the table
    .venv/bin/python benchmarks/reruns.py --record    and put it into book/results/reruns.json, for the book

What is made again is what has another fingerprint (`lthlib.book.plan`). So each change is made in a copy of the
checkout, the fingerprints of a tiny grid are taken there, and the change is taken back.
"""

from __future__ import annotations

import argparse
import ast
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from torture import GRID, Checkout

FINGERPRINTS = """
import json, sys
from lthlib import data
from lthlib.book import make, plan
from lthlib.book.grid import read_grid
from lthlib.core.store import Store
from lthlib.tickets.obtain import version_of
grid, store = read_grid(sys.argv[1]), Store()
made = {job: plan.job_made_from(grid, job, store) for job in plan.jobs(grid)}
(study,) = grid.studies
images = data.load(study.data, store, study.train_size)
print(json.dumps({
    "tickets": {ticket.id: version_of(ticket, images) for ticket in study.tickets()},
    "job": {job.name: of for job, of in made.items()},
    "page": {page.path: plan.page_made_from(page, made) for page in plan.pages(grid)},
    "book": {"": make.book_made_from(grid, made)},
}))
"""
STUDIED = {**GRID, "title": "What is made again", "method_pages": ["calibration"]}
Edit = Callable[[str], str]


def line_in(function: str) -> Edit:
    """Return an edit that adds a line of code to a function at the top level of a file."""

    def edit(source: str) -> str:
        (found,) = (n for n in ast.parse(source).body if getattr(n, "name", "") == function)
        lines = source.splitlines(keepends=True)
        first = found.body[1 if ast.get_docstring(found) is not None else 0]
        lines.insert(first.lineno - 1, "    _changed = True\n")
        return "".join(lines)

    return edit


def setting(*path: str, value: object) -> Edit:
    """Return an edit that sets one key of a grid."""

    def edit(text: str) -> str:
        grid = part = yaml.safe_load(text)
        for key in path[:-1]:
            part = part.setdefault(key, {})
        part[path[-1]] = value
        return yaml.safe_dump(grid)

    return edit


CHANGES: tuple[tuple[str, str, Edit], ...] = (  # what, in which file ("" is the grid), how
    ("a comment beside a method", "lthlib/pruning/snip.py", lambda text: text + "# said otherwise\n"),
    ("a line in the store's own file", "lthlib/core/store.py", line_in("write_atomically")),
    ("a page of prose", "book/reading.md", lambda text: text + "\nOne more sentence.\n"),
    ("one template", "notebooks/calibration.ipynb", lambda text: text.replace("# Calibration", "# Honesty", 1)),
    ("a line in a figure", "lthlib/figures/calibration.py", line_in("reliability")),
    ("a line in the search for SNIP's masks", "lthlib/pruning/snip.py", line_in("saliency")),
    ("an option of SNIP", "", setting("options", "snip", "batch", value=64)),
    ("a line in the measurement of calibration", "lthlib/metrics/calibration/measure.py", line_in("measure")),
    ("a parameter of calibration", "", setting("dimensions", "calibration", "n_bins", value=10)),
    ("a line in the training loop", "lthlib/training/loop.py", line_in("train")),
    ("a setting of the recipe", "", setting("recipe", "lr", value=0.05)),
    ("one more seed", "", setting("seeds", value=[0, 1])),
)


def fingerprints(checkout: Checkout) -> dict[str, dict[str, str]]:
    """Return what the code of a checkout makes of its grid: fingerprints by kind and name."""
    command = [sys.executable, "-c", FINGERPRINTS, str(checkout.grid)]
    environment = {"PYTHONPATH": str(checkout.folder), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=checkout.folder, capture_output=True, text=True, check=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def survey(folder: Path) -> dict[str, object]:
    """Make every change in a copy of the checkout, and return what has another fingerprint then."""
    file = folder / "reruns.yml"
    file.write_text(yaml.safe_dump(STUDIED))
    checkout = Checkout(folder / "checkout", file)
    before = fingerprints(checkout)
    lines = [{"change": "nothing"}]
    for what, name, edit in CHANGES:
        path = checkout.folder / (name or checkout.grid)
        text = path.read_text()
        path.write_text(edit(text))
        now = fingerprints(checkout)
        path.write_text(text)
        lines.append(
            {"change": what} | {k: [n for n, of in v.items() if before[k].get(n) != of] for k, v in now.items()}
        )
        print(what, file=sys.stderr, flush=True)
    return {"every": {kind: list(names) for kind, names in before.items()}, "changes": lines}


if __name__ == "__main__":
    from lthlib.book.reproducibility import RERUNS, reruns_table
    from lthlib.core import machine
    from lthlib.core.store import seal, write_atomically

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", action="store_true", help=f"put it into {RERUNS.name}, for the book")
    record = parser.parse_args().record
    with tempfile.TemporaryDirectory() as temporary:
        found = survey(Path(temporary).resolve()) | {"provenance": machine.provenance("auto")}
    print(reruns_table(found))
    if record:
        write_atomically(RERUNS, seal(found))
