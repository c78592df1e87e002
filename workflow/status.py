"""Say how far a grid is, from another terminal: what is done, runs, failed and waits, and how long it still takes.

.venv/bin/python workflow/status.py [GRID]      the grid of the last run, where none is named

Reads files only, and imports nothing that takes time; as good during a run on a cluster, and when nothing runs.
"""

from __future__ import annotations

import fcntl
import os
import sys
import time
from pathlib import Path

from progress import Run, Step, clock, follow, plan, span

ROOT = Path(__file__).resolve().parent.parent
LOG = Path("_build/snakemake.log")
LOCK = Path(".snakemake/run.lock")
SHOWN = 20


def main(arguments: list[str]) -> int:
    """Print the state of a grid; 0 where nothing failed, 1 where something did or the grid is unknown here."""
    if len(arguments) > 1 or any(argument.startswith("-") for argument in arguments):
        print(__doc__.strip(), file=sys.stderr)
        return 2
    os.chdir(ROOT)
    run = follow(LOG.open(errors="replace")) if LOG.exists() else Run()
    grid = arguments[0] if arguments and arguments[0] else run.grid
    known = plan(grid)
    if not known and is_running() and not arguments:
        print("a run is being prepared")
        return 0
    if not known:
        print(f"No run of {grid or 'any grid'} has begun in this checkout: make report GRID=...", file=sys.stderr)
        return 1
    current = Path(run.grid).stem == Path(grid).stem
    if not current:
        run = Run()
    alive = current and is_running()
    print(headline(grid, run, alive, current))
    failed = list(run.failed.values())
    for kind in ("job", "page"):
        print(count(kind, known.get(f"{kind}s", {}), Path(grid).stem, run, alive))
    if alive:
        for step in [s for s in run.running.values() if s.rule != "all"][:SHOWN]:
            print(f"  {'runs' if step.begun() else 'queued'}  {describe(step)}")
    for step in failed[-SHOWN:]:
        print(f"  failed {step}: {last_words(step)}\n         log: {step.log}")
    return 1 if failed else 0


def is_running() -> bool:
    """Say whether a run holds the lock of this checkout."""
    if not LOCK.exists():
        return False
    with LOCK.open() as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def headline(grid: str, run: Run, alive: bool, current: bool) -> str:
    """Return the first line."""
    if not alive:
        ended = f"; the last run ended at {clock(run.now)}" if current and run.now else ""
        return f"{grid}: nothing runs{ended}"
    if not run.began:
        return f"{grid}: a run is being prepared"
    so_far = span(time.time() - run.began)
    return f"{grid}: {100 * run.fraction():.0f} % after {so_far}, about {span(run.left())} left"


def count(kind: str, names: dict[str, float], grid: str, run: Run, alive: bool) -> str:
    """Return how many of the grid's jobs or pages are done, run, failed and wait."""
    failed = {step.name for step in run.failed.values() if step.kind == kind} & set(names)
    running = {s.name for s in run.running.values() if s.kind == kind and s.begun()} & set(names) if alive else set()
    there = {name for name in names if output(kind, name, grid).exists()} - failed - running
    waiting = len(names) - len(failed) - len(running) - len(there)
    parts = [f"{len(there)} of {len(names)} done", f"{len(running)} running", f"{len(failed)} failed"]
    return f"  {kind + 's:':7} {', '.join([*parts, f'{waiting} waiting'])}"


def output(kind: str, name: str, grid: str) -> Path:
    """Return the file that says that a job or page is done."""
    if kind == "job":
        return Path(f"_build/jobs/{grid}/{name}.json")
    return Path(f"book/_generated/{name}.ipynb")


def describe(step: Step) -> str:
    """Return a line on a step that runs."""
    part = step.done()
    ticket = f", ticket {min(part[0] + 1, part[1])} of {part[1]}" if part else ""
    return f"{step}{ticket}, since {clock(step.since)} ({span(time.time() - step.since)})"


def last_words(step: Step) -> str:
    """Return the last line of a step's log, or what Snakemake said of it."""
    text = step.log.read_text(errors="replace") if step.log and step.log.exists() else ""
    said = [line.rsplit("\r", 1)[-1].strip() for line in text.split("\n")]
    return next((line for line in reversed(said) if line), "") or step.message or "(it wrote no log)"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
