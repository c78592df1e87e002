"""How often the verdict errs, and what it takes to decide: made-up studies whose truth is known.

python benchmarks/verdict.py [--record]
"""

import argparse
import itertools
import sys
from pathlib import Path

import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from lthlib.book.reproducibility import POWER
from lthlib.core import machine
from lthlib.core.store import seal, write_atomically
from lthlib.metrics import METRICS
from lthlib.results.simulation import outcomes, simulate

SETTINGS = (
    {"seeds": 1, "trainings": 0.0},
    {"seeds": 2, "trainings": 0.3},
    {"seeds": 2, "trainings": 3.0},
    {"seeds": 2, "trainings": 3.0, "rounds": 6},
    {"seeds": 2, "trainings": 3.0, "rounds": 6, "unlike": 0.5},
    {"seeds": 3, "trainings": 3.0},
    {"seeds": 5, "trainings": 3.0},
)


def errors(studies: int) -> list[dict[str, float]]:
    """Return, for each setting, how often equal networks are said to have lost, and lossy ones to have kept."""
    votes, lines = [m.name for m in METRICS.values() if m.in_verdict], []
    for setting in SETTINGS:
        equal = outcomes(simulate(studies, 200, metrics=votes, **setting))
        worse = outcomes(simulate(studies // 5, 200, metrics=votes, loss=2.0, **setting))
        lines.append({"rounds": 1, "unlike": 0.0, **setting, "lost": equal["any lost"], "kept": worse["kept"]})
        print(lines[-1], file=sys.stderr, flush=True)
    return lines


def power(studies: int) -> list[dict[str, float]]:
    """Return how often a network is shown to keep a metric: equal to its parent, or worse by twice the tolerance."""
    cases = itertools.product((100, 300, 1000, 3000), (1, 2, 3, 5, 10), (0.0, 2.0))
    return [{"images": n, "seeds": k, "loss": x, **outcomes(simulate(studies, n, k, loss=x))} for n, k, x in cases]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", action="store_true", help=f"put it into {POWER.name}, for the book")
    parser.add_argument("--studies", type=int, default=1000, help="made-up studies for each setting")
    options = parser.parse_args()
    found = {
        "studies": options.studies,
        "errors": errors(options.studies),
        "power": power(max(20, options.studies // 5)),
        "provenance": machine.provenance("auto"),
    }
    print(pd.DataFrame(found["power"]).to_string(index=False))
    if options.record:
        write_atomically(POWER, seal(found))
