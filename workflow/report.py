"""Run a grid to a book: check the grid, run the workflow, say what is running, what failed, and where the book lies.

.venv/bin/python workflow/report.py workflow/grids/quick.yml [--profile local] [--cores all] [-- OPTIONS OF SNAKEMAKE]
"""

from __future__ import annotations

import argparse
import fcntl
import os
import re
import shutil
import subprocess
import sys
import time
from collections import deque
from contextlib import contextmanager, nullcontext
from pathlib import Path

from tqdm import tqdm

from lthlib import gpus, lifeline
from lthlib.errors import UserError, choose
from lthlib.store import ROOT, Store, say, why
from lthlib.zygote import TemporaryFolder, zygote

DONE = re.compile(r"(\d+) of (\d+) steps")
RULE = re.compile(r"^(?:local)?rule (\w+):")
SLURM_RUN = re.compile(r"^SLURM run ID: (\S+)", re.MULTILINE)
LOG = re.compile(r"^\s+log: (\S+)")
REFUSED = 3  # the exit status of workflow/snake.py for a grid that cannot be run
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
    began, before = time.monotonic(), set_aside()
    try:
        choose(options.profile, sorted(p.name for p in Path("workflow/profiles").iterdir()), "profile")
        if options.cores != "all" and not (options.cores.isdigit() and int(options.cores)):
            raise UserError(f"cores is {options.cores!r}; it must be a whole number from 1 on, or all.")
        # On a cluster each job is a process of its own, not a child of this one.
        with (
            only_run() as lock,
            scratch(options.profile),
            zygote(holding=lock) if options.profile == "local" else nullcontext(),
        ):
            status, failed = run(options)
    except UserError as error:
        say(f"error: {error}")
        return 1
    except OSError as error:
        if why(error) is None:
            raise
        say(f"error: this checkout or the folder for temporary files cannot be used: {why(error)}.")
        return 1
    for name in sorted(set_aside() - before):
        say(f"damaged: {Store().root / 'damaged' / name} was set aside; what needs it makes it again")
    return finish(options.grid, status, failed, time.monotonic() - began)


def set_aside() -> set[str]:
    """Return the names of the damaged results that the store has set aside so far."""
    return {path.name for path in (Store().root / "damaged").glob("*")}


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
        for stale in (*SNAKEMAKE_LOCKS.glob("*"), *Path("book/_generated").rglob(".*.tmp")):
            stale.unlink()
        yield handle.fileno()


def cancel_leftovers(log: Path) -> None:
    """Cancel what a killed run left in Slurm's queue: nothing here would wait for it, and it would be done twice."""
    named = SLURM_RUN.search(log.read_text()) if log.exists() else None
    if named and shutil.which("scancel"):
        subprocess.run(
            ["scancel", "--quiet", "--me", "--name", named[1]], stderr=subprocess.DEVNULL, timeout=60
        )


def run(options: argparse.Namespace) -> tuple[int, list[Path]]:
    """Run Snakemake under a progress bar; return its exit status and the logs of the jobs that failed."""
    command = [
        sys.executable, "-m", "lthlib.fork", "workflow/snake.py", options.grid, "--snakefile", "workflow/Snakefile",
        "--directory", str(ROOT), "--profile", f"workflow/profiles/{options.profile}",
    ]  # fmt: skip
    if options.profile == "local" or options.cores != "all":  # all: of this machine, which is not the cluster
        command += ["--cores", options.cores]
    devices = gpus.visible() if options.profile == "local" else []
    if devices:
        command += ["--resources", f"gpu={len(devices)}", "--set-resources", "tickets:gpu=1", "chains:gpu=1"]
    command += options.more
    environment = {"TQDM_MININTERVAL": "5", **os.environ, "PYTHONUNBUFFERED": "1"}
    environment |= {lifeline.VARIABLE: str(os.getpid()), gpus.VARIABLE: ",".join(devices)}
    failed: list[Path] = []
    tail: deque[str] = deque(maxlen=30)
    log = ROOT / "_build" / "snakemake.log"
    log.parent.mkdir(exist_ok=True)
    cancel_leftovers(log)
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    shape = "{desc}: {n}/{total} jobs {bar} {elapsed}, {remaining} left"
    with (
        log.open("w") as record,
        subprocess.Popen(command, env=environment, **pipe) as process,
        tqdm(desc="report", unit="job", bar_format=shape) as bar,
    ):
        in_error = False
        for line in process.stdout:
            record.write(line)
            tail.append(line)
            in_error = line.startswith("Error in rule") or (in_error and line.startswith(" "))
            if in_error and (found := LOG.match(line)):
                failed.append(Path(found[1]))
            if found := RULE.match(line):
                bar.set_description_str(found[1])
            if found := DONE.search(line):
                bar.total = int(found[2])
                bar.update(int(found[1]) - bar.n)
    if process.returncode and not failed:
        say("".join(tail).rstrip())
    return process.returncode, list(dict.fromkeys(failed))


def finish(grid: str, status: int, failed: list[Path], seconds: float) -> int:
    """Say how it ended and where things lie."""
    for log in failed:
        lines = log.read_text().strip().splitlines()[-4:] if log.exists() else ["(no log)"]
        say(f"\nfailed: {log}\n  " + "\n  ".join(line.split("\r")[-1] for line in lines))
    book, rows = ROOT / "_build/html/index.html", ROOT / f"book/_generated/{Path(grid).stem}/rows.csv"
    if status == REFUSED:
        return 1
    if status:
        say(f"\n{len(failed)} jobs failed; what succeeded is kept. The workflow's log: _build/snakemake.log")
        return 1
    print(f"done in {seconds:.0f} s")
    print(f"book: {book}")
    print(f"rows: {rows}")
    print(f"store: {Store().root}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
