"""Kill a run again and again; say whether it ends with the same bits as one that was left alone.

    make torture                             20 kills of a tiny grid, a quarter of an hour on two cores
    .venv/bin/python workflow/torture.py --kills 50 --seed 1 --grid workflow/grids/quick.yml
    .venv/bin/python workflow/torture.py --damage 100

In copies of the checkout, each with a store of its own: one run undisturbed, as the reference; then runs that lose a
random process, or several, to ``kill -9`` at random moments, each followed by the next, until one reaches the end. Then
everything is compared, removed, and begun again, until the number of kills is reached. What is killed is drawn first,
of the kinds killed least (the driver, the zygote, Snakemake, a worker, a page, its kernel, the table of rows, the
book's front and build, the client of one of them), then how long that kind has been seen running by then: whoever lives
for a second only is hit as often as who lives throughout.

Compared bit for bit: ``rows.csv`` with every column (it holds no time), masks, weights, rewind points and logits, the
numbers and arrays of every evaluation. Of pages and the built book, which tell times, only that each is there. Not
compared: when and how long, which `provenance` and `cost` hold.
And: nothing whole is made twice, no process outlives its run, no temporary file stays, no run waits for a dead one.

``--damage`` does to files what the rest does to processes: in the finished checkout it shortens, flips a bit in,
empties, removes, replaces and exchanges files, some at a time, in the store, among the recorded results, among the
files that say which jobs are done, in pages, tables and the built book. The next run has to name each, set it aside and
end with the same bits; of recorded results, which nobody can make again, it has to say how to get them back, and to do
nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil
import yaml
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
GRID = {
    "title": "A tiny grid",
    "data": "mnist5k",
    "arch": "resnet8",
    "methods": ["lth", "snip"],
    "rounds": [1, 2],
    "seeds": [0],
    "recipe": {"epochs": 1, "batch_size": 100, "warmup": 0.0},
    "train_size": 300,
    "dimensions": {
        "generalization": {"n_test": 200, "n_ood": 50, "n_corrupted": 10, "n_attack": 20, "n_pgd": 4},
        "calibration": {"n_test": 200, "n_corrupted": 10, "n_bootstrap": 50},
    },
    "method_pages": [],
}
ROLES = ("driver", "zygote", "snakemake", "worker", "page", "kernel", "rows", "front", "book", "client")
PATIENCE = 900.0  # seconds without an end after which a run counts as stuck
GRACE = 5.0  # seconds within which a killed run's processes have to be gone
MORE = 0.75  # probability of another kill in the same run
AT_ONCE = 20  # files damaged before a run
LOOK = 0.05  # seconds between looks at what runs
WIDTHS = (4, 32, 8, 14, 0)  # of the columns of what is printed
READ = (".ipynb", ".md", ".yml", ".csv", ".html")  # of generated files, those named alike in every run
UNTIMED = ("cost", "provenance", "history")  # of ticket.json


def main() -> int:
    """Torture a grid; return 0 if nothing was lost, wasted or left behind."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, help="how many processes to kill (20, or none beside --damage)")
    parser.add_argument("--damage", type=int, default=0, help="how many files to damage")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn")
    parser.add_argument("--grid", type=Path, help="a grid file (default: a tiny grid of its own)")
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary folder, removed at the end)")
    options = parser.parse_args()
    n_kills = (0 if options.damage else 20) if options.kills is None else options.kills
    with tempfile.TemporaryDirectory(prefix="torture-") as temporary:
        folder = (options.folder or Path(temporary)).resolve()
        outcome = torture(folder, options.grid, n_kills, options.damage, random.Random(options.seed))
    outcome.tell_faults()
    for word, counted in (("killed", outcome.killed), ("damaged", outcome.damaged)):
        if counted:
            print(f"{word}: " + ", ".join(f"{name} {n}" for name, n in sorted(counted.items())))
    print(
        f"{outcome.n_kills} kills, {outcome.damaged.total()} damages, {outcome.n_ends} ends compared with the "
        f"reference, {len(outcome.faults)} faults"
    )
    return 1 if outcome.faults else 0


@dataclass
class Outcome:
    """What was killed, what became of it, and what went wrong."""

    n_runs: int = 0
    n_told: int = 0
    faults: list[str] = field(default_factory=list)
    killed: Counter[str] = field(default_factory=Counter)
    damaged: Counter[str] = field(default_factory=Counter)
    n_ends: int = 0

    @property
    def n_kills(self) -> int:
        """How many processes were killed."""
        return self.killed.total()

    def tell(self, *line: object) -> None:
        """Print one line for a run: victims, moment, how it ended, what was finished by then; at first, their names."""
        head = ("run", "killed", "last at", "the run then", "whole artifacts")
        for cells in (head, line) if not self.n_runs else (line,):
            tqdm.write("  ".join(str(cell).ljust(width) for cell, width in zip(cells, WIDTHS, strict=True)))
        self.n_runs += 1
        self.tell_faults()

    def tell_faults(self) -> None:
        """Print the faults not yet printed: a torture of an hour may be stopped at its first."""
        for fault in self.faults[self.n_told :]:
            tqdm.write(f"FAULT: {fault}", file=sys.stderr)
        self.n_told = len(self.faults)


def torture(folder: Path, grid: Path | None, n_kills: int, n_damages: int, rng: random.Random) -> Outcome:
    """Run a grid undisturbed, then kill and damage it so often; compare every end with the undisturbed one."""
    reference, victim = Checkout(folder / "reference", grid), Checkout(folder / "tortured", grid)
    outcome = Outcome()
    run = reference.start()
    lives = dict.fromkeys(ROLES, 0.0)
    if watch(reference, run, lives) != 0:
        raise SystemExit(f"The undisturbed run failed:\n{reference.last_words()}")
    expected = contents(reference)
    if n_kills:
        kill(victim, expected, lives, n_kills, rng, outcome)
    if n_damages:
        damage(reference, expected, n_damages, rng, outcome)
    return outcome


def kill(
    victim: Checkout,
    expected: dict[str, object],
    lives: dict[str, float],
    n_kills: int,
    rng: random.Random,
    outcome: Outcome,
) -> None:
    """Kill runs again and again, each going on from what the last one left."""
    with tqdm(total=n_kills, desc="kills", unit="kill") as bar:
        while outcome.n_kills < n_kills:
            before = outcome.n_kills
            one_run(victim, lives, rng, outcome, n_kills - before)
            bar.update(outcome.n_kills - before)
            if victim.ended:
                judge(victim, expected, outcome)
    while not victim.ended:
        one_run(victim, lives, rng, outcome, 0)
    if victim.rows.exists():  # else the last kill's run ended well, and was judged and cleared away
        judge(victim, expected, outcome)


def one_run(checkout: Checkout, lives: dict[str, float], rng: random.Random, outcome: Outcome, most: int) -> None:
    """Start a run and kill at most so many of its processes, one after the other, unless it ends before."""
    whole = checkout.finished()
    began = time.monotonic()
    run = checkout.start()
    killed: list[str] = []
    while len(killed) < most and (not killed or rng.random() < MORE):
        role = min(ROLES, key=lambda name: (outcome.killed[name], rng.random()))
        moment = lives[role] * rng.random() ** 3  # rather early: a run that ends first was in vain
        if watch(checkout, run, {}, (role, moment, rng)) is not None:
            lives[role] *= 0.7
            break
        outcome.killed[role] += 1
        killed.append(role)
    after = f"{time.monotonic() - began:.0f} s" if killed else "-"
    names = ", ".join(killed) or "-"
    try:
        status = run.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        outcome.faults.append(f"the run after the kill of {names} did not end in {PATIENCE:.0f} s")
        status = None
        run.kill()
    if rng.random() < 0.5 or status == 0 or not killed:  # else the next one starts beside what is dying
        left = checkout.processes_left()
        outcome.faults += [f"after the kill of {names}, {name} lived on" for name in left]
    again = checkout.made_again(whole)
    outcome.faults += [f"made twice around the kill of {names}: {name}" for name in again]
    checkout.ended = status == 0
    if status != 0 and not killed:
        outcome.faults.append(f"a run that nobody disturbed ended with {status}: {checkout.last_words()}")
    ending = "ended well" if status == 0 else "was dead" if "driver" in killed else f"ended with {status}"
    outcome.tell(outcome.n_runs + 1, names, after, ending, len(checkout.finished()))


def watch(
    checkout: Checkout,
    run: subprocess.Popen,
    lives: dict[str, float],
    victim: tuple[str, float, random.Random] | None = None,
) -> int | None:
    """Watch a run to its end and return its exit status; None after the kill of a process, or if it seems stuck.

    Args:
        checkout: Where it runs.
        run: Its driver.
        lives: Takes the seconds during which a process of each role was there.
        victim: A role, the seconds that it may be there, and what draws one of several.
    """
    last = began = time.monotonic()
    while run.poll() is None and last < began + PATIENCE:
        time.sleep(LOOK)
        present = checkout.processes(run.pid)
        passed, last = time.monotonic() - last, time.monotonic()
        for role in present:
            lives[role] = lives.get(role, 0.0) + passed
        if victim and victim[0] in present and lives[victim[0]] > victim[1]:
            with contextlib.suppress(ProcessLookupError):  # it has just ended: the next one, then
                os.kill(victim[2].choice(present[victim[0]]), signal.SIGKILL)
                return None
    return run.poll()


def judge(
    checkout: Checkout,
    expected: dict[str, object],
    outcome: Outcome,
    may_lack: tuple[str, ...] = (),
    clear: bool = True,
) -> None:
    """Compare a finished run with the reference, and look for what it should not have left; then remove it."""
    found = contents(checkout)
    outcome.n_ends += 1
    lacking = [name for name in expected.keys() - found.keys() if not name.startswith(may_lack)]
    outcome.faults += [f"missing: {name}" for name in lacking]
    outcome.faults += [f"not in the reference: {name}" for name in found.keys() - expected.keys()]
    outcome.faults += [f"different: {n}" for n in expected.keys() & found.keys() if not same(expected[n], found[n])]
    outcome.faults += [f"left behind: {path}" for path in checkout.rubbish()]
    if clear:
        checkout.clear()


def damage(checkout: Checkout, expected: dict[str, object], n: int, rng: random.Random, outcome: Outcome) -> None:
    """Damage files of a finished checkout, some before each run, and see what the run makes of it."""
    checkout.record()
    with tqdm(total=n, desc="damages", unit="file") as bar:
        while outcome.damaged.total() < n:
            most, spoilt, recorded = min(AT_ONCE, n - outcome.damaged.total()), {}, set()
            while len(spoilt) + len(recorded) < most:
                place = rng.choice(("store", "store", "store", "done", "recorded", "generated", "book"))
                path = checkout.a_file(place, rng)
                if path is None:
                    continue
                whole = path.parent if place == "store" else path
                way = rng.choice(sorted(WAYS))
                if whole in spoilt or path in recorded or not WAYS[way](path, checkout.alike(path), rng):
                    continue
                outcome.damaged[f"{way} ({place})"] += 1
                recorded.add(path) if place == "recorded" else spoilt.update({whole: way})
            bar.update(most)
            if recorded:
                mourn(checkout, recorded, outcome)
            mend(checkout, expected, spoilt, outcome)


def mourn(checkout: Checkout, recorded: set[Path], outcome: Outcome) -> None:
    """Run beside damaged recorded results, which must be refused; then get these back."""
    status = checkout.start().wait(PATIENCE)
    if status != 1 or "git checkout -- book/results/" not in checkout.last_words():
        names = ", ".join(sorted(path.name for path in recorded))
        outcome.faults.append(f"damaged records ({names}): status {status}, {checkout.last_words()}")
    checkout.get_records_back()


def mend(checkout: Checkout, expected: dict[str, object], spoilt: dict[Path, str], outcome: Outcome) -> None:
    """Run after damage; everything has to be named and set aside, and to be as before or absent until it is needed."""
    status, said = checkout.start().wait(PATIENCE), checkout.log.read_text()
    if status != 0:
        outcome.faults.append(f"the run after damage ended with {status}: {checkout.last_words()}")
    store = checkout.folder / "store"
    artifacts = {path for path in spoilt if path.is_relative_to(store)}
    for path, way in spoilt.items():
        names = [f"damaged: {path}"]
        if path in artifacts:
            names.append(f"damaged: {store}/damaged/{'--'.join(path.relative_to(store).parts)}")
        elif way == "removed":  # the job is gone through again, and that is all
            continue
        if not any(name in said for name in names):
            outcome.faults.append(f"not reported: {path} ({way})")
    aside = checkout.folder / "store/damaged"
    n_aside = len([*aside.glob("*")])
    if n_aside != len(artifacts):
        outcome.faults.append(f"{len(artifacts)} artifacts damaged, {n_aside} set aside")
    shutil.rmtree(aside, ignore_errors=True)
    judge(checkout, expected, outcome, may_lack=("rewind-points/",), clear=False)
    n = outcome.n_runs + 1
    outcome.tell(n, f"{len(spoilt)} files damaged", "-", f"ended with {status}", len(checkout.finished()))


def _write(path: Path, content: bytes) -> bool:
    if path.read_bytes() == content:
        return False
    path.write_bytes(content)
    return True


def _flip(path: Path, _: list[Path], rng: random.Random) -> bool:
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    return _write(path, bytes(content))


def _remove(path: Path, _: list[Path], rng: random.Random) -> bool:
    path.unlink()
    return True


def _make_a_folder(path: Path, _: list[Path], rng: random.Random) -> bool:
    path.unlink()
    path.mkdir()
    return True


def _take_anothers(path: Path, alike: list[Path], rng: random.Random) -> bool:
    return bool(alike) and _write(path, rng.choice(alike).read_bytes())


WAYS = {
    "truncated": lambda path, _, rng: _write(path, path.read_bytes()[: rng.randrange(path.stat().st_size - 1)]),
    "bit flipped": _flip,
    "emptied": lambda path, _, rng: _write(path, b""),
    "lengthened": lambda path, _, rng: _write(path, path.read_bytes() + b"x"),
    "removed": _remove,
    "made a folder": _make_a_folder,
    "another's": _take_anothers,
}
"""Ways to damage a file, given those of its kind; each says whether it did."""


def contents(checkout: Checkout) -> dict[str, object]:
    """Return everything that must not depend on what happened on the way, by name."""
    store, found = checkout.folder / "store", {}
    found["rows.csv"] = checkout.rows.read_bytes()
    for path in sorted(store.rglob("*.safetensors")):
        found[str(path.relative_to(store))] = path.read_bytes()
    for path in sorted(store.glob("evaluations/*/*")):
        values = json.loads((path / "values.json").read_text())
        with np.load(path / "arrays.npz") as arrays:
            found[str(path.relative_to(store))] = {"values": values["values"], **dict(arrays)}
    for path in sorted(store.glob("predictions/**/*.npy")):
        found[str(path.relative_to(store))] = path.read_bytes()
    for path in sorted(store.glob("tickets/*/ticket.json")):
        info = json.loads(path.read_text())
        found[str(path.relative_to(store))] = {k: v for k, v in info.items() if k not in UNTIMED}
    for path in sorted(p for name in ("book/_generated", "_build/html") for p in (checkout.folder / name).rglob("*")):
        if path.suffix in READ:
            found[str(path.relative_to(checkout.folder))] = path.is_file()
    return {name: value for name, value in found.items() if not name.startswith(("damaged/", "tmp/"))}


def same(one: object, two: object) -> bool:
    """Say whether two contents are the same, arrays bit for bit."""
    if isinstance(one, dict) and isinstance(two, dict):
        return one.keys() == two.keys() and all(same(one[key], two[key]) for key in one)
    if isinstance(one, np.ndarray) and isinstance(two, np.ndarray):
        return (one.dtype, one.shape, one.tobytes()) == (two.dtype, two.shape, two.tobytes())
    return one == two


class Checkout:
    """A copy of this checkout with a store and a folder for temporary files of its own."""

    def __init__(self, folder: Path, grid: Path | None):
        self.folder, self.grid = folder, Path("workflow/grids") / (grid.name if grid else "torture.yml")
        self.temporary = folder.parent / f"{folder.name}-tmp"
        self.log = folder.parent / f"{folder.name}.log"
        self.rows = folder / "book/_generated" / self.grid.stem / "rows.csv"
        self.ended = False
        command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
        for name in listed:
            if (ROOT / name).is_file() and not name.startswith("book/results/"):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, folder / name)
        content = grid.read_text() if grid else yaml.safe_dump(GRID)
        (folder / self.grid).write_text(content)
        self.clear()

    def clear(self) -> None:
        """Remove all that runs have made."""
        for name in ("store", "_build", ".snakemake", "book/_generated"):
            shutil.rmtree(self.folder / name, ignore_errors=True)
        shutil.rmtree(self.temporary, ignore_errors=True)
        self.temporary.mkdir()

    def start(self) -> subprocess.Popen:
        """Start a run."""
        environment = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": str(self.folder)}
        environment["TMPDIR"] = str(self.temporary)
        environment.pop("LTHLIB_STORE", None)
        with self.log.open("w") as log:
            return subprocess.Popen(
                [sys.executable, "workflow/report.py", str(self.grid)],
                cwd=self.folder,
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def record(self) -> None:
        """Record the results of its grid, and keep a copy of the record."""
        command = [sys.executable, "-m", "lthlib", "record", str(self.grid)]
        environment = {**os.environ, "PYTHONPATH": str(self.folder), "LTHLIB_STORE": str(self.folder / "store")}
        subprocess.run(command, cwd=self.folder, env=environment, check=True, stderr=subprocess.DEVNULL)
        shutil.copytree(self.records, self.folder.parent / "records", dirs_exist_ok=True)

    def get_records_back(self) -> None:
        """Do what ``git checkout`` does where the results are committed."""
        shutil.rmtree(self.records)
        shutil.copytree(self.folder.parent / "records", self.records)

    @property
    def records(self) -> Path:
        """Where the recorded results of its grid are."""
        return self.folder / "book/results" / self.grid.stem

    def a_file(self, place: str, rng: random.Random) -> Path | None:
        """Draw a file of the store (first one of its parts), or of another place (`damage`)."""
        folder = {
            "done": self.folder / "_build/jobs",
            "recorded": self.records,
            "generated": self.folder / "book/_generated",
            "book": self.folder / "_build/html",
        }.get(place)
        if folder is None:
            parts = {p for p in (self.folder / "store").iterdir() if p.name not in ("tmp", "damaged", "locks")}
            folder = rng.choice(sorted(p for p in parts if any(p.rglob("manifest.json"))))
        suffix = ".json" if place == "done" else ""
        found = sorted(p for p in folder.rglob(f"*{suffix}") if p.is_file())
        return rng.choice(found) if found else None

    def alike(self, path: Path) -> list[Path]:
        """Return the other files of its name in the same part of the store; elsewhere those of its kind beside it."""
        parts = path.relative_to(self.folder).parts
        if parts[0] == "store":
            found = (self.folder / "store" / parts[1]).rglob(path.name)
        else:
            found = path.parent.glob(f"*{path.suffix}")
        return sorted(p for p in found if p != path and p.is_file())

    def last_words(self) -> str:
        """Return the last lines of the latest run."""
        return "\n".join(self.log.read_text().replace("\r", "\n").splitlines()[-10:])

    def processes(self, driver: int) -> dict[str, list[int]]:
        """Return the process ids of a run by role."""
        found: dict[str, list[int]] = {}
        pages: dict[str, list[psutil.Process]] = {}
        for process in self._processes():
            role, log = _role(process, driver)
            if role == "page":
                pages.setdefault(log, []).append(process)
            else:
                found.setdefault(role, []).append(process.pid)
        for group in pages.values():  # a page's process starts its kernel, which writes to the same log
            first, *kernels = sorted(group, key=_age)
            found.setdefault("page", []).append(first.pid)
            if kernels:
                found.setdefault("kernel", []).extend(kernel.pid for kernel in kernels)
        return found

    def processes_left(self) -> list[str]:
        """Return what still runs here once everything has had the time to notice the end."""
        deadline = time.monotonic() + GRACE
        while (left := list(self._processes())) and time.monotonic() < deadline:
            time.sleep(0.1)
        return [_describe(process) for process in left]

    def _processes(self) -> Iterator[psutil.Process]:
        for pid in psutil.pids():
            with contextlib.suppress(OSError, psutil.Error):  # another's, ended, or without parents to bury it
                if os.readlink(f"/proc/{pid}/cwd") == str(self.folder):
                    yield psutil.Process(pid)

    def finished(self) -> dict[str, tuple[int, int]]:
        """Return what is whole by now and must not be made again: artifacts, and pages that the workflow has noted."""
        whole = [path.parent for path in (self.folder / "store").rglob("manifest.json")]
        unfinished = _unescaped(self.folder / ".snakemake/incomplete")
        noted = _unescaped(self.folder / ".snakemake/metadata") - unfinished
        pages = [self.folder / name for name in noted if name.endswith(".ipynb")]
        found = {}
        for path in [*whole, *pages]:
            if path.exists() and not {"tmp", "damaged"} & set(path.relative_to(self.folder).parts):
                stat = path.stat()
                found[str(path.relative_to(self.folder))] = stat.st_ino, stat.st_mtime_ns
        return found

    def made_again(self, whole: dict[str, tuple[int, int]]) -> list[str]:
        """Return what was whole before and has been made again since, or is gone."""
        now = self.finished()
        return [name for name, identity in whole.items() if now.get(name) != identity]

    def rubbish(self) -> list[Path]:
        """Return the temporary files that nobody needs any more."""
        store = self.folder / "store"
        left = [*self.temporary.iterdir(), *(store / "tmp").iterdir(), *(store / "damaged").glob("*")]
        hidden = [p for p in self.folder.rglob(".*.tmp") if p.is_file()]
        return left + hidden + list((self.folder / "book/_generated").rglob("*.failed.ipynb"))


def _role(process: psutil.Process, driver: int) -> tuple[str, str]:
    """Return what a process of a run does, and the log it writes to."""
    if process.pid == driver:
        return "driver", ""
    try:
        command, parent = " ".join(process.cmdline()), process.ppid()
        open_files = [os.readlink(file) for file in Path(f"/proc/{process.pid}/fd").iterdir()]
    except (psutil.Error, OSError):
        return "client", ""  # it is ending
    if "lthlib.book.zygote" not in command:
        return "client", ""
    if parent == driver:
        return "zygote", ""
    # A kernel's standard output is a pipe to itself; the page's log it keeps open beside that.
    logs = [name for name in open_files if "/_build/" in name and name.endswith(".log")]
    if not logs:
        return "snakemake", ""
    name = Path(logs[0]).stem
    if "/pages/" in logs[0]:
        return "page", logs[0]
    return {"rows": "rows", "front": "front", "book": "book", "unfinished-book": "book"}.get(name, "worker"), logs[0]


def _age(process: psutil.Process) -> tuple[float, int]:
    try:
        return process.create_time(), process.pid
    except psutil.Error:
        return float("inf"), process.pid


def _describe(process: psutil.Process) -> str:
    try:
        return f"process {process.pid} ({' '.join(process.cmdline()[:6])}, {_role(process, 0)[0]})"
    except psutil.Error:
        return f"process {process.pid}"


def _unescaped(folder: Path) -> set[str]:
    """Return the names of files in Snakemake's own notes, which are in base 64."""
    import base64

    names = [
        p.relative_to(folder).as_posix().replace("@", "").replace("/", "") for p in folder.rglob("*") if p.is_file()
    ]
    return {base64.b64decode(name).decode() for name in names}


if __name__ == "__main__":
    sys.exit(main())
