"""Run a grid to a book: run the workflow under one line of progress, say what failed, and where the book lies.

.venv/bin/python workflow/report.py workflow/grids/quick.yml [--profile local] [--cores all] [-- OPTIONS OF SNAKEMAKE]
.venv/bin/python workflow/report.py --status      how far the run of this checkout is
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

from tqdm import tqdm

from lthlib.core import gpus, lifeline
from lthlib.core.errors import UserError, choose
from lthlib.core.store import ROOT, locked, say, why

LOG, AIMS = Path("_build/snakemake.log"), Path("_build/aims.json")
BOOK_LOG = Path("_build/logs/book.log")
CLUSTER_NUMBERS = ("LTHLIB_MINUTES", "LTHLIB_MB", "LTHLIB_THREADS", "LTHLIB_GPU", "LTHLIB_JOBS")
SLURM_RUN = re.compile(r"^SLURM run ID: (\S+)", re.MULTILINE)
DRY = {"-n", "--dry-run", "--dryrun"}
BUSY = "another run is under way in this checkout: waiting for it"  # one at a time steers it
REFUSED = 3  # the exit status of workflow/snake.py for a grid that cannot be run


def main() -> int:
    """Run the grid named on the command line; return the exit status."""
    given, more = sys.argv[1:], []
    if "--" in given:
        given, more = given[: given.index("--")], given[given.index("--") + 1 :]
    parser = argparse.ArgumentParser(description="Run a grid to a book.")
    parser.add_argument("grid", nargs="?", default="workflow/grids/quick.yml")
    parser.add_argument("--profile", default="local", help="a folder of workflow/profiles")
    parser.add_argument("--cores", default="all", help="a number; on a cluster, of cores in use at once")
    parser.add_argument("--status", action="store_true", help="say how far the run of this checkout is")
    options = parser.parse_args(given)
    os.chdir(ROOT)
    if options.status:
        print(told(*progress(0.0)) if AIMS.exists() else "no run has begun in this checkout")
        return 0
    began = time.time()
    try:
        check(options)
        with locked(Path("_build/run.lock"), BUSY), lifeline.held():
            status = run(options, more, began)
            if not DRY.isdisjoint(more):
                print(LOG.read_text(), end="")
                return status
            return finish(options, status, began)
    except UserError as error:
        say(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        say("\ninterrupted; what was finished is kept, and the same command goes on from there")
        return 130
    except OSError as error:
        if why(error) is None:
            raise
        say(f"error: this checkout or the folder for temporary files cannot be used: {why(error)}.")
        return 1


def check(options: argparse.Namespace) -> None:
    """Raise `UserError` for settings that cannot be."""
    choose(options.profile, sorted(p.name for p in Path("workflow/profiles").iterdir()), "profile")
    if options.cores != "all" and not (options.cores.isdigit() and int(options.cores)):
        raise UserError(f"cores is {options.cores!r}; it must be a whole number from 1 on, or all.")
    for name in CLUSTER_NUMBERS:
        if not os.environ.get(name, "0").isdigit():
            raise UserError(f"{name} is {os.environ[name]!r}; it must be a whole number.")


def run(options: argparse.Namespace, more: list[str], began: float) -> int:
    """Run Snakemake under one line that says how far it is; return its exit status."""
    command = [sys.executable, "workflow/snake.py", options.grid, "--snakefile", "workflow/Snakefile"]
    command += ["--directory", str(ROOT), "--profile", f"workflow/profiles/{options.profile}"]
    if options.profile == "local" or options.cores != "all":  # all: of this machine, which is not the cluster
        command += ["--cores", options.cores]
    devices = gpus.visible() if options.profile == "local" else []
    if devices:
        command += ["--resources", f"gpu={len(devices)}", "--set-resources", "tickets:gpu=1", "chains:gpu=1"]
    environment = {"TQDM_MININTERVAL": "5", **os.environ, "PYTHONUNBUFFERED": "1", gpus.VARIABLE: ",".join(devices)}
    cancel_leftovers()
    at_first = None
    with (
        LOG.open("w") as log,
        subprocess.Popen([*command, *more], env=environment, stdout=log, stderr=subprocess.STDOUT) as process,
        tqdm(total=100, bar_format="{percentage:3.0f}% {bar:10} {elapsed} {desc}") as bar,
    ):
        pause = 1.0 if sys.stderr.isatty() else 15.0
        shown, heard = time.monotonic(), 0
        while process.poll() is None:
            time.sleep(0.2)
            heard = warn(heard, bar)
            if time.monotonic() > shown + pause:
                shown, (done, of) = time.monotonic(), progress(began)
                at_first = done if of and at_first is None else at_first
                bar.n = 100 * done / max(of, 1)
                bar.set_description_str(told(done, of, done - (at_first or 0), time.time() - began))
        warn(heard, bar)
    return process.returncode


def warn(heard: int, bar: tqdm) -> int:
    """Pass on what the store says of damage, from a place in the log on; return the new place."""
    text = LOG.read_text(errors="replace")
    end = text.rfind("\n") + 1
    for line in text[heard:end].splitlines():
        if line.startswith(("damaged: ", "waiting: ")):
            bar.write(line, file=sys.stderr)
    return end


def progress(began: float) -> tuple[int, int]:
    """Return how many tickets, evaluations and pages are there, of how many; 0 of 0 until the run has said which."""
    try:
        made = json.loads(AIMS.read_text())["made"] if AIMS.stat().st_mtime >= began else []
    except (OSError, ValueError, KeyError):
        made = []
    return sum(map(os.path.exists, made)), len(made)


def told(done: int, of: int, new: int = 0, seconds: float = 0.0) -> str:
    """Say how far a run is, and how long it still takes if it goes on as so far: ``new`` things in some seconds."""
    rest = f", {span(seconds / new * (of - done))} left" if new > 10 else ""
    return f"{done} of {of} tickets, measurements and pages{rest}" if of else "preparing"


def span(seconds: float) -> str:
    """Say a time as a person would: ``40 s``, ``12 min``, ``3 h 20 min``."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def cancel_leftovers() -> None:
    """Cancel what a killed run left in Slurm's queue: nothing here would wait for it, and it would be done twice."""
    named = SLURM_RUN.search(LOG.read_text(errors="replace")) if LOG.exists() else None
    if named and shutil.which("scancel"):
        command = ["scancel", "--quiet", "--me", "--name", named[1]]
        try:
            subprocess.run(command, stderr=subprocess.DEVNULL, timeout=60)
        except subprocess.TimeoutExpired:
            raise UserError(
                f"Slurm does not answer, and jobs of a run that was killed may be in its queue: {' '.join(command)}"
            ) from None


def finish(options: argparse.Namespace, status: int, began: float) -> int:
    """Say how it ended and where things lie; after a failure, build the book of what succeeded."""
    book = ROOT / "_build/html/index.html"
    if status == 0:
        print(f"done in {time.time() - began:.0f} s\nbook: {book}")
        print(f"rows: {ROOT / 'book/_generated' / Path(options.grid).stem / 'rows.csv'}")
        return 0
    if status == REFUSED:
        say(LOG.read_text().strip())
        return 1
    aims = json.loads(AIMS.read_text()) if AIMS.exists() and AIMS.stat().st_mtime >= began else {"logs": {}}
    failed = [Path(log) for log in aims["logs"].values() if is_of_failure(Path(log), began)]
    for said, logs in alike(failed).items():  # a full disk stops many, and is one thing to mend
        names = "\n        ".join(f"{log.stem} (log: {log})" for log in logs)
        say(f"\nfailed: {names}\n  " + "\n  ".join(said))
    if failed:
        make = [sys.executable, "-m", "lthlib", "book", options.grid, "--workers", str(os.cpu_count())]
        with BOOK_LOG.open("w") as log:
            subprocess.run(make, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=log, stderr=subprocess.STDOUT)
    words = BOOK_LOG.read_text(errors="replace") if BOOK_LOG.exists() and BOOK_LOG.stat().st_mtime >= began else ""
    say(words.strip() or LOG.read_text()[-3000:])
    say(f"\nwhat succeeded is kept. The workflow's log: {LOG}")
    if "missing: " in words:  # said once the book is built
        say(f"book, with what is missing marked: {book}")
    return 1


def is_of_failure(log: Path, began: float) -> bool:
    """Say whether a job of this run wrote a log and left no stamp."""
    stamp = Path(str(log).replace("/logs/", "/stamps/")).with_suffix(".json")
    return log.exists() and log.stat().st_mtime >= began and not stamp.exists()


def alike(logs: list[Path]) -> dict[tuple[str, ...], list[Path]]:
    """Return logs by what they say last, from the error on where they tell of one that a person can mend."""
    groups: dict[tuple[str, ...], list[Path]] = {}
    for log in logs:
        lines = [line.rsplit("\r", 1)[-1] for line in log.read_text(errors="replace").strip().split("\n")][-4:]
        errors = [n for n, line in enumerate(lines) if line.startswith("error: ")]
        groups.setdefault(tuple(filter(None, lines[errors[-1] if errors else 0 :])), []).append(log)
    return groups


if __name__ == "__main__":
    sys.exit(main())
