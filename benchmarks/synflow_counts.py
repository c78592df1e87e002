"""Say whether the counts by which SynFlow steps down move accuracy: networks trained on the masks of either.

    .venv/bin/python benchmarks/synflow_counts.py             print the numbers
    .venv/bin/python benchmarks/synflow_counts.py --record    and put them into book/results/synflow-counts.json

Both masks hold the same number of weights; the networks start from the same weights and see the same batches.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable

import numpy as np
import torch
from tqdm import tqdm

from lthlib import data
from lthlib.book.reproducibility import SYNFLOW
from lthlib.core import machine
from lthlib.core.store import Store, seal, write_atomically
from lthlib.networks.inputs import as_input
from lthlib.pruning import masks, synflow
from lthlib.tickets.obtain import obtain
from lthlib.tickets.ticket import Ticket
from lthlib.training.recipe import Recipe

ROUNDS = (14, 17, 20)  # 95.6, 97.7, 98.8 %
RECIPE = Recipe(epochs=4, warmup=1.0)
Schedule = Callable[[int, int, float, int, str], list[int]]


def nearest(n_weights: int, n_keep: int, density: float, rounds: int, kind: str) -> list[int]:
    """Return the counts that this book took at first: the nearest whole numbers to a geometric sequence."""
    return [round(n_weights * (n_keep / n_weights) ** (k / rounds)) for k in range(1, rounds + 1)]


def trained(schedule: Schedule, rounds: int, seed: int) -> tuple[masks.Masks, float]:
    """Return the masks and the test accuracy of SynFlow's ticket with the counts of a schedule."""
    published, synflow.schedule = synflow.schedule, schedule
    try:
        with tempfile.TemporaryDirectory() as folder:
            store = Store(folder)
            found = obtain(Ticket("mnist5k", "resnet8", "synflow", rounds, seed, RECIPE), store)
            test = data.load("mnist5k", store).test
    finally:
        synflow.schedule = published
    with torch.no_grad():
        right = found.model(as_input(test.pixels)).argmax(1) == test.labels
    return found.masks, float(right.double().mean())


def compare(seeds: int) -> list[dict[str, float]]:
    """Return one line a sparsity: overlap of the masks, mean accuracies, and the differences seed by seed."""
    lines = []
    for n in tqdm(ROUNDS, unit="sparsity"):
        pairs = [[trained(schedule, n, seed) for schedule in (synflow.schedule, nearest)] for seed in range(seeds)]
        ours = pairs[0][0][0]
        weights, kept = sum(mask.numel() for mask in ours.values()), masks.n_kept(ours)
        counts = [make(weights, kept, 0.8**n, 100, "exponential") for make in (synflow.schedule, nearest)]
        accuracy = np.array([[value for _, value in pair] for pair in pairs])
        apart = accuracy[:, 0] - accuracy[:, 1]
        lines.append(
            {
                "sparsity": masks.sparsity_of(n),
                "counts": sum(a != b for a, b in zip(*counts, strict=True)),
                "overlap": float(np.mean([masks.jaccard(ours, theirs) for (ours, _), (theirs, _) in pairs])),
                "published": float(accuracy[:, 0].mean()),
                "nearest": float(accuracy[:, 1].mean()),
                "difference": float(apart.mean()),
                "standard_error": float(apart.std(ddof=1) / len(apart) ** 0.5),
                "over_seeds": float(accuracy[:, 0].std(ddof=1)),
            }
        )
    return lines


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", action="store_true", help=f"put it into {SYNFLOW.name}, for the book")
    parser.add_argument("--seeds", type=int, default=10, help="trainings of each kind and sparsity")
    options = parser.parse_args()
    found = {"seeds": options.seeds, "lines": compare(options.seeds), "provenance": machine.provenance("auto")}
    print(json.dumps(found["lines"], indent=1))
    if options.record:
        write_atomically(SYNFLOW, seal(found))
