"""Kill a run again and again, damage what it made; say whether it ends with the same bits as one that was left alone.

    make torture                                                    20 kills, then 40 damaged files, of a tiny grid
    .venv/bin/python tests/torture.py --kills 50 --damage 0 --seed 1 --grid workflow/grids/quick.yml

In copies of the checkout, each with a store of its own: one run undisturbed, as the reference; then runs of which one
process, drawn among all that work there, is lost to ``kill -9`` at a random moment, each followed by the next; at times
a line of code is added to a figure or to a measurement before it goes on, and taken back later. Where a run reaches the
end, all is compared, and begun again with an empty store. Compared bit for bit: ``rows.csv``, masks, weights, rewind
points, logits, numbers and arrays of every evaluation. Of pages and of the built book, which tell times: that each is
there. And: nothing whole is made twice, no process outlives its run.

Damage: files of the store are shortened, flipped, emptied, removed, exchanged or made folders, some before a run, which
has to end with the same bits; recorded results are damaged, and the run has to refuse and say how to get them back.
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
from pathlib import Path

import numpy as np
import psutil
import yaml

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
EDITED = ("lthlib/figures/calibration.py", "lthlib/metrics/calibration/measure.py", "lthlib/pruning/snip.py")
PATIENCE = 900.0  # seconds without an end after which a run counts as stuck
GRACE = 5.0  # seconds within which a killed run's processes have to be gone
UNTIMED = ("cost", "provenance", "history")  # of ticket.json


class Checkout:
    """A copy of this checkout, without recorded results, with a store of its own."""

    def __init__(self, folder: Path, grid: Path | None = None):
        self.folder, self.grid = folder, Path("workflow/grids") / (grid.name if grid else "torture.yml")
        self.log = folder.parent / f"{folder.name}.log"
        self.records = folder / "book/results" / self.grid.stem
        command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
        for name in listed:
            if (ROOT / name).is_file() and not name.startswith("book/results/"):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, folder / name)
        (folder / self.grid).write_text(grid.read_text() if grid else yaml.safe_dump(GRID))

    def clear(self) -> None:
        """Remove all that runs have made."""
        for name in ("store", "_build", ".snakemake", "book/_generated"):
            shutil.rmtree(self.folder / name, ignore_errors=True)

    def python(self, *arguments: str) -> subprocess.Popen:
        """Start Python in the checkout; what it says goes to the log."""
        environment = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": str(self.folder)}
        environment.pop("LTHLIB_STORE", None)
        with self.log.open("w") as log:
            command = [sys.executable, *arguments]
            return subprocess.Popen(command, cwd=self.folder, env=environment, stdout=log, stderr=subprocess.STDOUT)

    def start(self) -> subprocess.Popen:
        """Start a run."""
        return self.python("workflow/report.py", str(self.grid))

    def last_words(self) -> str:
        """Return the last lines of the latest run."""
        return "\n".join(self.log.read_text().replace("\r", "\n").splitlines()[-10:])

    def processes(self) -> Iterator[psutil.Process]:
        """Yield every process that works in the checkout."""
        for pid in psutil.pids():
            with contextlib.suppress(OSError, psutil.Error):  # another's, ended, or without parents to bury it
                if os.readlink(f"/proc/{pid}/cwd") == str(self.folder):
                    yield psutil.Process(pid)

    def left(self) -> list[str]:
        """Return what still runs here once everything has had the time to notice the end."""
        deadline = time.monotonic() + GRACE
        while (left := list(self.processes())) and time.monotonic() < deadline:
            time.sleep(0.1)
        return [f"process {p.pid} lived on" for p in left]

    def whole(self) -> dict[str, tuple[int, int]]:
        """Return the artifacts that are whole by now, each with what tells it from one made anew."""
        found = {}
        for path in (self.folder / "store").rglob("manifest.json"):
            name = path.parent.relative_to(self.folder / "store").as_posix()
            if not name.startswith(("tmp/", "damaged/")):
                found[name] = path.stat().st_ino, path.stat().st_mtime_ns
        return found

    def contents(self) -> dict[str, object]:
        """Return everything that must not depend on what happened on the way, by name."""
        store, generated = self.folder / "store", self.folder / "book/_generated"
        found: dict[str, object] = {"rows.csv": (generated / self.grid.stem / "rows.csv").read_bytes()}
        for name in self.whole():
            for path in sorted((store / name).iterdir()):
                key = f"{name}/{path.name}"
                if path.suffix in (".safetensors", ".npy"):
                    found[key] = path.read_bytes()
                elif path.name == "ticket.json":
                    found[key] = {k: v for k, v in json.loads(path.read_text()).items() if k not in UNTIMED}
                elif path.name == "values.json":
                    found[key] = json.loads(path.read_text())["values"]
                elif path.suffix == ".npz":
                    with np.load(path) as arrays:
                        found[key] = {k: (a.dtype.str, a.shape, a.tobytes()) for k, a in arrays.items()}
        pages = [p for folder in (generated, self.folder / "_build/html") for p in folder.rglob("*")]
        shown = [p for p in pages if p.suffix in (".ipynb", ".md", ".html", ".csv")]
        return found | {p.relative_to(self.folder).as_posix(): True for p in shown}


def differences(checkout: Checkout, expected: dict[str, object]) -> list[str]:
    """Compare a finished checkout with the reference; what only the next need would make may lack."""
    found = checkout.contents()
    lacking = [name for name in expected.keys() - found.keys() if not name.startswith("rewind-points/")]
    faults = [f"missing: {name}" for name in lacking]
    faults += [f"not in the reference: {name}" for name in found.keys() - expected.keys()]
    return faults + [f"different: {name}" for name in expected.keys() & found.keys() if expected[name] != found[name]]


@contextlib.contextmanager
def edited(checkout: Checkout, rng: random.Random) -> Iterator[str | None]:
    """Add a line of code to a file for a while, or to none; yield its name."""
    name = rng.choice((*EDITED, None, None, None))
    if name is None:
        yield None
        return
    path = checkout.folder / name
    text = path.read_text()
    path.write_text(text + "\n_ADDED = True\n")
    try:
        yield name
    finally:
        path.write_text(text)


def killed(checkout: Checkout, rng: random.Random, seconds: float) -> tuple[str, list[str]]:
    """Start a run and kill one of its processes within some seconds; return which, and what went wrong."""
    faults: list[str] = []
    run, moment = checkout.start(), time.monotonic() + seconds * rng.random() ** 2
    while run.poll() is None and time.monotonic() < moment:
        time.sleep(0.05)
    victims = [*checkout.processes()]
    name = "nothing"
    if run.poll() is None and victims:
        with contextlib.suppress(psutil.Error, IndexError):
            victim = rng.choice(victims)
            words = [Path(word).name for word in victim.cmdline()]
            victim.send_signal(signal.SIGKILL)
            name = next((w for w in ("report.py", "snake.py", "tickets", "book") if w in words), "another")
    with contextlib.suppress(subprocess.TimeoutExpired):
        run.wait(PATIENCE)
    if run.poll() is None:
        run.kill()
        faults.append(f"the run after the kill of {name} did not end in {PATIENCE:.0f} s")
    faults += checkout.left()
    return name, faults


def torture(folder: Path, grid: Path | None, n_kills: int, n_damages: int, rng: random.Random) -> list[str]:
    """Run a grid undisturbed, then kill and damage it so often; return every fault."""
    reference, victim = Checkout(folder / "reference", grid), Checkout(folder / "tortured", grid)
    began = time.monotonic()
    if reference.start().wait(PATIENCE) != 0:
        raise SystemExit(f"The undisturbed run failed:\n{reference.last_words()}")
    seconds, expected = time.monotonic() - began, reference.contents()
    faults: list[str] = []
    counted: Counter[str] = Counter()
    pure = True  # whether no code was changed since the store was empty: then nothing is made twice
    while counted.total() < n_kills:
        before = victim.whole()
        with edited(victim, rng) as change:
            pure = pure and change is None
            name, wrong = killed(victim, rng, seconds)
        counted[name] += name != "nothing"
        if pure:
            now = victim.whole()
            wrong += [f"made twice around the kill of {name}: {n}" for n, made in before.items() if now.get(n) != made]
        if rng.random() < 0.3 or counted.total() == n_kills:
            if victim.start().wait(PATIENCE) != 0:
                wrong.append(f"a run that nobody disturbed failed: {victim.last_words()}")
            else:
                wrong += differences(victim, expected)
                print("an end compared", flush=True)
            victim.clear()
            pure = True
        print(f"killed {name}; {counted.total()} kills, {len(wrong)} faults", flush=True)
        faults += wrong
    return faults + damage(reference, expected, n_damages, rng)


def damage(checkout: Checkout, expected: dict[str, object], n: int, rng: random.Random) -> list[str]:
    """Damage so many files of the store and of recorded results of a finished checkout, ten before a run."""
    faults: list[str] = []
    if n and checkout.python("-m", "lthlib", "record", str(checkout.grid)).wait(PATIENCE) != 0:
        return [f"recording failed: {checkout.last_words()}"]
    kept = checkout.folder.parent / "records"
    if n:
        shutil.copytree(checkout.records, kept)
    for first in range(0, n, 10):
        here = [p for p in (checkout.folder / "store").rglob("*") if p.is_file()]
        here = [p for p in here if p.relative_to(checkout.folder / "store").parts[0] not in ("tmp", "damaged", "locks")]
        some = rng.sample(here, min(8, n - first))
        for path in some:
            if path.is_file():  # another of these may have been made a folder around it
                rng.choice(WAYS)(path, rng)
        if checkout.start().wait(PATIENCE) != 0:
            faults.append(f"the run after damage failed: {checkout.last_words()}")
        faults += differences(checkout, expected)
        for path in rng.sample(sorted(checkout.records.iterdir()), min(2, max(0, n - first - 8))):
            path.write_bytes(path.read_bytes()[:-1])
            status = checkout.start().wait(PATIENCE)
            if status != 1 or "git checkout -- book/results/" not in checkout.last_words():
                faults.append(f"a damaged record ({path.name}): status {status}, {checkout.last_words()}")
            shutil.copy2(kept / path.name, path)
        print(f"{min(first + 10, n)} files damaged, {len(faults)} faults", flush=True)
    return faults


def _flip(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes() or b"\0")
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def _make_a_folder(path: Path, rng: random.Random) -> None:
    path.unlink()
    path.mkdir()


WAYS = (
    lambda path, rng: path.write_bytes(path.read_bytes()[: rng.randrange(max(1, path.stat().st_size))]),
    lambda path, rng: path.write_bytes(b""),
    lambda path, rng: path.write_bytes(path.read_bytes() + b"x"),
    lambda path, rng: path.unlink(),
    _flip,
    _make_a_folder,
)
"""Ways to damage a file."""


def main() -> int:
    """Torture a grid; return 0 if nothing was lost, wasted or left behind."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--damage", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn")
    parser.add_argument("--grid", type=Path, help="a grid file (default: a tiny grid of its own)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="torture-") as folder:
        faults = torture(
            Path(folder).resolve(), options.grid, options.kills, options.damage, random.Random(options.seed)
        )
    for fault in faults:
        print(f"FAULT: {fault}", file=sys.stderr)
    print(f"{options.kills} kills, {options.damage} damaged files, {len(faults)} faults")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
