"""Compare what one grid ends with where workers, processes and threads differ: masks, weights and rows, bit for bit.

    .venv/bin/python benchmarks/agreement.py             print the tables
    .venv/bin/python benchmarks/agreement.py --record    and put them into book/results/agreement.json, for the book

The paper's seven methods are trained and measured in copies of the checkout, in either precision: with one worker of
one thread (the reference), with two workers, and with two threads a job, once trained anew and once given the
reference's networks. How far another seed lies is the scale for what differs.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import safetensors.numpy
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from torture import Checkout

from lthlib.book.grid import read_grid
from lthlib.book.plan import Job, jobs, needs
from lthlib.book.reproducibility import AGREEMENT, agreement_tables, deviation
from lthlib.core import machine
from lthlib.core.store import seal, write_atomically
from lthlib.pruning import METHODS

GRID = {
    "title": "One grid, many machines",
    "data": "mnist5k",
    "arch": "resnet8",
    "methods": [name for name, method in METHODS.items() if method.paper],
    "rounds": [3],
    "seeds": [0],
    "recipe": {"epochs": 1, "batch_size": 100, "warmup": 0.0},
    "train_size": 500,
    "options": {"rigl": {"delta_t": 2}},
    "dimensions": {
        "generalization": {"n_test": 200, "n_ood": 100, "n_corrupted": 20, "n_attack": 40, "n_pgd": 8},
        "calibration": {"n_test": 200, "n_corrupted": 20, "n_bootstrap": 50},
        "interpretability": {"n_images": 3, "n_masks": 100, "n_expo": 0, "n_concept_images": 50, "draws": 19},
        "flatness": {
            "n_weights": 16,
            "n_spectrum": 16,
            "n_pixels": 20,
            "n_noise": 16,
            "n_path": 32,
            "pairs": 2,
            "points": 5,
            "partner": 0,
            "pictured": [0],
            "n_wide": 20,
            "probes": 1,
            "steps": 10,
            "surface_points": 3,
        },
    },
    "method_pages": [],
}
PRECISIONS = ("float32", "bfloat16")
SAME = ["ticket", "dimension", "metric", "shift", "severity"]  # columns that name one number of one network
ALIKE = ["method", "sparsity", *SAME[1:]]  # and one number of a network of any seed


TABLES = """
import sys
import tempfile
import time
from lthlib.book import make
from lthlib.book.grid import read_grid
from lthlib.core.store import Store
make.make_tables(read_grid(sys.argv[1]), Store())
"""


class Place(Checkout):
    """A copy of the checkout in which one precision's grid is run in one way."""

    def __init__(self, folder: Path, precision: str, seeds: list[int]):
        file = folder.parent / "agreement.yml"
        recipe = {**GRID["recipe"], "precision": precision}
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(yaml.safe_dump({**GRID, "recipe": recipe, "precision": precision, "seeds": seeds}))
        super().__init__(folder, file)
        self.rows = folder / "book/_generated/agreement/rows.csv"
        self.threads = 1

    def run(self, *, workers: int = 1, threads: int = 1) -> None:
        """Train and measure everything by the steps of `make report`, and make the table of rows."""
        self.threads = threads
        os.environ["OMP_NUM_THREADS"] = str(threads)
        plan = read_grid(self.folder / self.grid)
        waiting = [(job, needs(plan, job)) for job in jobs(plan)]
        running: dict[Job, subprocess.Popen] = {}
        while waiting or running:
            for job, process in list(running.items()):
                if process.poll() is not None:
                    if process.returncode:
                        raise SystemExit(f"{job.name} failed:\n{self.last_words()}")
                    del running[job]
            left = {job for job, _ in waiting} | set(running)
            ready = [job for job, before in waiting if not left & set(before)]
            for job in ready[: workers - len(running)]:
                running[job] = self.python(
                    "-m", "lthlib", "tickets", str(self.grid), job.study, job.method, str(job.seed)
                )
                waiting = [pair for pair in waiting if pair[0] != job]
            time.sleep(0.1)
        if self.python("-c", TABLES, str(self.grid)).wait():
            raise SystemExit(f"The tables failed:\n{self.last_words()}")

    def take_networks(self, other: Place) -> None:
        """Take over another place's networks, and nothing that was measured of them."""
        for part in ("tickets", "rewind-points"):
            shutil.copytree(other.folder / "store" / part, self.folder / "store" / part)

    def table(self) -> pd.DataFrame:
        """Return the rows, having checked that they were measured with the threads asked for."""
        made = pd.read_csv(self.rows.with_name("provenance.csv"))
        assert set(made["threads"]) == {self.threads}, f"measured with {set(made['threads'])} threads"
        return pd.read_csv(self.rows)


WAYS: dict[str, Callable[[Place, Place], None]] = {
    "two workers": lambda place, _: place.run(workers=2),
    "two threads a job, measuring only": lambda place, reference: (
        place.take_networks(reference),
        place.run(threads=2),
    ),
    "two threads a job, training and measuring": lambda place, _: place.run(threads=2),
}


def compared(place: Place, reference: Place) -> dict[str, object]:
    """Return how many networks, masks and rows of two runs are the same bits, and how far apart the others are."""
    found = {"networks": [0, 0], "masks_at_init": [0, 0, 0, 0], "masks_trained": [0, 0, 0, 0]}
    for ticket in sorted((place.folder / "store/tickets").iterdir()):
        other = reference.folder / "store/tickets" / ticket.name
        weights = [(folder / "weights.safetensors").read_bytes() for folder in (ticket, other)]
        _add(found["networks"], weights[0] == weights[1], 1)
        if (ticket / "masks.safetensors").exists():
            method = METHODS[json.loads((ticket / "ticket.json").read_text())["ticket"]["method"]]
            is_early = method.source == "init" and method.during is None
            differ, kept = _masks(ticket, other)
            when = "masks_at_init" if is_early else "masks_trained"
            _add(found[when], differ == 0, 1, differ, kept)
    pairs = place.table().merge(reference.table(), on=SAME, suffixes=("", "_reference"))
    assert len(pairs) == len(place.table())
    return {**found, "dimensions": _by_dimension(pairs, "value_reference")}


def _add(total: list[int], *more: int) -> None:
    total[:] = [int(a + b) for a, b in zip(total, more, strict=True)]


def _masks(one: Path, two: Path) -> tuple[int, int]:
    """Return how many weights only the first of two tickets keeps, and how many it keeps in all."""
    first, second = (safetensors.numpy.load_file(folder / "masks.safetensors") for folder in (one, two))
    return sum((m & ~second[n]).sum() for n, m in first.items()), sum(m.sum() for m in first.values())


def _by_dimension(pairs: pd.DataFrame, other: str) -> dict[str, dict[str, object]]:
    far = deviation(pairs["value"], pairs[other])
    found = {}
    for dimension, part in far.groupby(pairs["dimension"], sort=False):
        found[dimension] = {
            "rows": len(part),
            "same": int((part == 0).sum()),
            "largest": float(part.max()),
            "median": float(part.median()),
            "metric": pairs.loc[part.idxmax(), "metric"],
        }
    return found


def _between_seeds(table: pd.DataFrame) -> dict[str, dict[str, object]]:
    first, second = (table[table["seed"] == seed] for seed in (0, 1))
    return _by_dimension(first.merge(second, on=ALIKE, suffixes=("", "_seed")), "value_seed")


def survey(folder: Path) -> dict[str, object]:
    """Run the grid in every way and precision; return what `compared` says of each."""
    runs, seeds = [], {}
    places = {  # all copied first: the checkout may change while they run
        precision: (
            Place(folder / precision / "reference", precision, [0, 1]),
            [Place(folder / precision / str(i), precision, [0]) for i in range(len(WAYS))],
        )
        for precision in PRECISIONS
    }
    for precision, (reference, others) in places.items():
        reference.run()
        seeds[precision] = _between_seeds(reference.table())
        for place, (way, run) in zip(others, WAYS.items(), strict=True):
            run(place, reference)
            runs.append({"precision": precision, "way": way, **compared(place, reference)})
            print(f"{precision}: {way}", file=sys.stderr, flush=True)
            shutil.rmtree(place.folder)
    return {"runs": runs, "seeds": seeds, "provenance": machine.provenance("auto")}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", action="store_true", help=f"put it into {AGREEMENT.name}, for the book")
    record = parser.parse_args().record
    with tempfile.TemporaryDirectory() as temporary:
        found = survey(Path(temporary).resolve())
    print(agreement_tables(found))
    if record:
        write_atomically(AGREEMENT, seal(found))
