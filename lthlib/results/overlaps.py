"""Do two methods keep the same weights? The masks of a study compared pair by pair, at equal sparsity and seed."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from functools import cache
from pathlib import Path

import pandas as pd

from lthlib.core.errors import UserError
from lthlib.core.store import Store
from lthlib.pruning import METHODS
from lthlib.pruning.masks import chance_jaccard, jaccard
from lthlib.results.recorded import check_records
from lthlib.tickets.obtain import obtain
from lthlib.tickets.study import Study
from lthlib.tickets.ticket import Ticket

FILE = "overlaps.csv"
COLUMNS = ("first", "second", "jaccard", "chance")


def pairs(study: Study, round: int, seed: int, about: str | None = None) -> list[tuple[Ticket, Ticket]]:
    """Return every two masked tickets of one round and seed; with ``about``, those of which that method is one."""
    mine = [t for t in study.tickets() if (t.round, t.seed) == (round, seed)]
    mine = [t for t in mine if METHODS[t.method].family not in ("dense", "structured")]  # these have no mask
    return [(a, b) for a, b in itertools.combinations(mine, 2) if about in (None, a.method, b.method)]


def compare(
    study: Study,
    store: Store,
    *,
    rounds: Sequence[int] | None = None,
    about: str | None = None,
    among: Collection[str] | None = None,
    recorded: Path | str | None = None,
    compute_missing: bool = True,
) -> pd.DataFrame:
    """Compare masks, those of different methods at the same round and seed.

    Args:
        study, store: Whose tickets, and where they are kept; they are trained where they are missing.
        rounds: Which of the study's rounds; all of them if None.
        about: Compare this method with the others only.
        among: Ids of the tickets to compare; all of the study's if None.
        recorded: Folder of recorded results (``book/results``), read before any mask is.
        compute_missing: Whether to look at masks where nothing is recorded; else that is an error.

    Returns:
        One line a pair: ``round``, ``seed``, ``a`` and ``b`` (methods), ``first`` and ``second`` (ids of tickets),
        ``jaccard`` and ``chance``, see `lthlib.pruning.masks.jaccard` and `lthlib.pruning.masks.chance_jaccard`; both
        are NaN of a pair that was recorded in parts, on two machines.
    """
    known = _recorded(recorded) if recorded else {}
    lines = []
    for round, seed in itertools.product(rounds or study.rounds, study.seeds):
        masks_of = cache(lambda ticket: obtain(ticket, store).masks)
        for a, b in pairs(study, round, seed, about):
            if among is not None and not {a.id, b.id} <= {*among}:
                continue
            found = known.get((a.id, b.id)) or known.get((b.id, a.id))
            if found is None and not compute_missing:
                raise UserError(
                    f"The overlap of {a.id} and {b.id} is not among the recorded results in {recorded}: record the "
                    "grid again, or allow computing."
                )
            if found is None:
                found = [overlap(masks_of(a), masks_of(b)) for overlap in (jaccard, chance_jaccard)]
            lines.append((round, seed, a.method, b.method, a.id, b.id, *found))
    return pd.DataFrame(lines, columns=["round", "seed", "a", "b", *COLUMNS])


def _recorded(root: Path | str) -> dict[tuple[str, str], tuple[float, float]]:
    found = {}
    for file in sorted(Path(root).glob(f"*/{FILE}")):
        check_records(file.parent)
        for first, second, *values in pd.read_csv(file)[list(COLUMNS)].itertuples(index=False, name=None):
            found[first, second] = tuple(values)
    return found
