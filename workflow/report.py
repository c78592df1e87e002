"""Run a grid to a book: check the grid, run the workflow, say what is running, what failed, and where the book lies.

.venv/bin/python workflow/report.py workflow/grids/quick.yml [--profile local] [--cores all] [-- OPTIONS OF SNAKEMAKE]
"""

from __future__ import annotations

import argparse
import fcntl
import os
import queue
import re
import shutil
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TextIO

from progress import DRY, Run, Step, remember, span
from tqdm import tqdm

from lthlib.book import generated, lifeline
from lthlib.book.zygote import TemporaryFolder, zygote
from lthlib.core import gpus
from lthlib.core.errors import UserError, choose
from lthlib.core.store import ROOT, Store, say, why

SLURM_RUN = re.compile(r"^SLURM run ID: (\S+)", re.MULTILINE)
LOG = ROOT / "_build" / "snakemake.log"
UNFINISHED_LOG = Path("_build/unfinished-book.log")
CLUSTER_NUMBERS = ("LTHLIB_MINUTES", "LTHLIB_MB", "LTHLIB_THREADS", "LTHLIB_GPU", "LTHLIB_JOBS")
SECONDS = 2.0  # between looks at the logs of running jobs
REFUSED = 3  # the exit status of workflow/snake.py for a grid that cannot be run
DAMAGED = "damaged: "  # what the store says of results that it sets aside
SNAKEMAKE_LOCKS = ROOT / ".snakemake" / "locks"


def main() -> int:
    """Run the grid named on the command line; return the exit status."""
    parser = argparse.ArgumentParser(description="Run a grid to a book.")
    parser.add_argument("grid")
    parser.add_argument("--profile", default="local", help="a folder of workflow/profiles")
    parser.add_argument("--cores", default="all", help="a number; on a cluster, of cores in use at once")
    given, more = sys.argv[1:], []
    if "--" in given:
        given, more = given[: given.index("--")], given[given.index("--") + 1 :]
    options = parser.parse_args(given)
    options.more = more
    os.chdir(ROOT)
    began = time.monotonic()
    try:
        choose(options.profile, sorted(p.name for p in Path("workflow/profiles").iterdir()), "profile")
        if options.cores != "all" and not (options.cores.isdigit() and int(options.cores)):
            raise UserError(f"cores is {options.cores!r}; it must be a whole number from 1 on, or all.")
        for name in CLUSTER_NUMBERS:
            if not os.environ.get(name, "0").isdigit():
                raise UserError(f"{name} is {os.environ[name]!r}; it must be a whole number.")
        # On a cluster each job is a process of its own, not a child of this one.
        with (
            only_run() as lock,
            scratch(options.profile),
            zygote(holding=lock) if options.profile == "local" else nullcontext(),
        ):
            before = Store().set_aside()
            status, failed = run(options)
            partial = bool(failed) and build_unfinished(options.grid)
            aside = Store().set_aside() - before
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
    if not DRY.isdisjoint(options.more):
        print(LOG.read_text(), end="")
        return status
    said = LOG.read_text()
    for name in (name for name in sorted(aside) if name not in said):
        say(f"damaged: {Store().root / 'damaged' / name} was set aside; what needs it makes it again")
    return finish(options.grid, status, failed, partial, time.monotonic() - began)


@contextmanager
def scratch(profile: str):
    """Let what runs on this machine keep its temporary files in one folder, which the next run removes if need be."""
    if profile != "local":  # other machines do not see it
        yield
        return
    with TemporaryFolder("lth-run-") as folder:
        os.environ["TMPDIR"] = folder
        yield


@contextmanager
def only_run():
    """Let one run at a time steer this checkout; yields the descriptor of the lock.

    The system frees the lock when its last holder is gone, whatever became of it: the zygote and its forks hold it too,
    so that nothing of a killed run still works when the next one begins.
    """
    path = ROOT / ".snakemake" / "run.lock"
    path.parent.mkdir(exist_ok=True)
    with path.open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another run is under way in this checkout: waiting for it")
            fcntl.flock(handle, fcntl.LOCK_EX)
        # We are alone, so Snakemake's own locks and files half-written are those of a run that was killed.
        left = [path for folder in (generated.FOLDER, "_build") for path in Path(folder).rglob(".*.tmp")]
        for stale in (*SNAKEMAKE_LOCKS.glob("*"), *left):
            stale.unlink()
        yield handle.fileno()


def cancel_leftovers(log: Path) -> None:
    """Cancel what a killed run left in Slurm's queue: nothing here would wait for it, and it would be done twice."""
    named = SLURM_RUN.search(log.read_text()) if log.exists() else None
    if named and shutil.which("scancel"):
        command = ["scancel", "--quiet", "--me", "--name", named[1]]
        try:
            subprocess.run(command, stderr=subprocess.DEVNULL, timeout=60)
        except subprocess.TimeoutExpired:
            raise UserError(
                f"Slurm does not answer, and jobs of a run that was killed may be in its queue: {' '.join(command)}"
            ) from None


def run(options: argparse.Namespace) -> tuple[int, list[Step]]:
    """Run Snakemake under one line that says how far it is; return its exit status and the steps that failed."""
    command = [
        sys.executable,
        "-m",
        "lthlib.book.fork",
        "workflow/snake.py",
        options.grid,
        "--snakefile",
        "workflow/Snakefile",
        "--directory",
        str(ROOT),
        "--profile",
        f"workflow/profiles/{options.profile}",
    ]
    if options.profile == "local" or options.cores != "all":  # all: of this machine, which is not the cluster
        command += ["--cores", options.cores]
    devices = gpus.visible() if options.profile == "local" else []
    if devices:
        command += ["--resources", f"gpu={len(devices)}", "--set-resources", "tickets:gpu=1", "chains:gpu=1"]
    command += options.more
    environment = {"TQDM_MININTERVAL": "5", **os.environ, "PYTHONUNBUFFERED": "1"}
    environment |= {lifeline.VARIABLE: str(os.getpid()), gpus.VARIABLE: ",".join(devices)}
    LOG.parent.mkdir(exist_ok=True)
    cancel_leftovers(LOG)
    LOG.unlink(missing_ok=True)  # `make status` may be reading it
    progress, tail = Run(), deque(maxlen=30)
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with (
        LOG.open("w", buffering=1) as record,
        subprocess.Popen(command, env=environment, **pipe) as process,
        tqdm(total=100, bar_format="{percentage:3.0f}% {bar:10} {elapsed} {desc}") as bar,
    ):
        pause, shown = (1.0 if sys.stderr.isatty() else 15.0), 0.0
        for line in heard(process.stdout):
            if line is not None:
                record.write(line)
                tail.append(line)
                progress.read(line)
                if line.startswith(DAMAGED):
                    bar.write(line.rstrip(), file=sys.stderr)
            if time.monotonic() > shown + pause:
                shown = time.monotonic()
                bar.n = max(bar.n, 100 * progress.fraction())
                bar.set_description_str(f"{span(progress.left())} left: {progress.line()}")
    if process.returncode == 0:
        if DRY.isdisjoint(options.more):
            remember(progress)
    elif not progress.failed:
        say("".join(tail).rstrip())
    return process.returncode, list(progress.failed.values())


def heard(stream: TextIO) -> Iterator[str | None]:
    """Yield the lines of a stream as they come, and None whenever a while has passed without one."""
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()

    def listen() -> None:
        with suppress(ValueError):  # it is closed under us, when a run is interrupted
            for line in stream:
                lines.put(line)
        lines.put("")

    threading.Thread(target=listen, daemon=True).start()
    while True:
        try:
            line = lines.get(timeout=SECONDS)
        except queue.Empty:
            yield None
            continue
        if not line:
            return
        yield line


def build_unfinished(grid: str) -> bool:
    """Build the book of what succeeded, a stub in the place of each missing page; say whether there is one."""
    fork = [sys.executable, "-m", "lthlib.book.fork"]
    contents = generated.FOLDER / generated.UNFINISHED
    try:
        with UNFINISHED_LOG.open("w") as log:
            for step in (
                [*fork, "lthlib", "front", grid, str(generated.FOLDER), "--unfinished"],
                [
                    *fork,
                    "workflow/book.py",
                    "--unfinished",
                    "build",
                    "book",
                    "--config",
                    "_config.yml",
                    "--toc",
                    str(ROOT / contents),
                    "--path-output",
                    ".",
                ],
            ):
                if subprocess.run(step, stdout=log, stderr=subprocess.STDOUT).returncode:
                    return False
    finally:
        contents.unlink(missing_ok=True)
    return True


def alike(failed: list[Step]) -> list[tuple[tuple[str, ...], list[Step]]]:
    """Return the steps that failed by what they said last: a full disk stops many, and is one thing to mend."""
    groups: dict[tuple[str, ...], list[Step]] = {}
    for step in failed:
        groups.setdefault(last_words(step), []).append(step)
    return [*groups.items()]


def last_words(step: Step) -> tuple[str, ...]:
    """Return the last lines of a step's log, from the error on where it tells of one the person can mend."""
    text = step.log.read_text(errors="replace") if step.log and step.log.exists() else ""
    lines = [line.rsplit("\r", 1)[-1] for line in text.strip().split("\n")][-4:]
    errors = [n for n, line in enumerate(lines) if line.startswith("error: ")]
    return tuple(filter(None, [*lines[errors[-1] if errors else 0 :], step.message]))


def finish(grid: str, status: int, failed: list[Step], partial: bool, seconds: float) -> int:
    """Say how it ended and where things lie."""
    for last, steps in alike(failed):
        logs = [f"log: {step.log}" for step in steps if step.log]
        say("\nfailed: " + "\n        ".join(map(str, steps)) + "\n  " + "\n  ".join([*last, *logs]))
    book, rows = ROOT / generated.HTML / "index.html", ROOT / generated.FOLDER / Path(grid).stem / "rows.csv"
    if status == REFUSED:
        return 1
    if status:
        say(f"\n{len(failed)} failed; what succeeded is kept. The workflow's log: {LOG.relative_to(ROOT)}")
        if partial:
            say(f"book, with what is missing marked: {book}")
        elif failed:
            say(f"the book of what succeeded could not be built: {UNFINISHED_LOG}")
        return 1
    print(f"done in {seconds:.0f} s")
    print(f"book: {book}")
    print(f"rows: {rows}")
    print(f"store: {Store().root}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
