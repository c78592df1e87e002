"""Who pays, over a study: churn, change of recall by class, and pruning-identified exemplars, from recorded answers.

An evaluation of generalization keeps its answers (`lthlib.metrics.generalization.classes.kept_answers`); one recorded
before it did is left out. Nothing here needs a network or an image.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import combinations

import numpy as np
import pandas as pd

from lthlib.metrics import Value
from lthlib.metrics.generalization.classes import disagreement, exemplars
from lthlib.pruning import METHODS
from lthlib.pruning.masks import sparsity_of
from lthlib.tickets.ticket import Ticket

Arrays = Mapping[str, Mapping[str, np.ndarray]]


def churn(answers: Iterable[tuple[Ticket, Mapping[str, np.ndarray]]]) -> dict[str, Value]:
    """Return the churn of each ticket of which it is known, by id, from the arrays of their evaluations.

    A sparse network is compared with its dense parent, a dense one with that of the seed before it.
    """
    known = {ticket: arrays["predicted"] for ticket, arrays in answers if "predicted" in arrays}
    by_id, before, found = {ticket.id: predicted for ticket, predicted in known.items()}, {}, {}
    for ticket in sorted(known, key=lambda ticket: ticket.seed):
        other = by_id.get(ticket.dense.id)
        if ticket.method == "dense":
            family = replace(ticket, seed=0).id
            other, before[family] = before.get(family), known[ticket]
        if other is not None:
            found[ticket.id] = Value("churn", disagreement(known[ticket], other), len(other))
    return found


def kept_of(tickets: pd.DataFrame, arrays: Arrays, method: str, round: int, name: str) -> np.ndarray | None:
    """Return an array of each seed of a method and round, stacked in the order of seeds; None where one is missing."""
    mine = tickets[(tickets["method"] == method) & (tickets["round"] == round)].sort_values("seed")["ticket"]
    held = [arrays[ticket].get(name) for ticket in mine]
    return np.stack(held) if held and all(array is not None for array in held) else None


def recall_changes(tickets: pd.DataFrame, arrays: Arrays, cases: Sequence[tuple[str, int]]) -> pd.DataFrame:
    """Return by how much each class's recall differs from that of the dense parent, mean over seeds.

    A line a class that has test images, by name; a column a case (method, round) of which answers are kept; and
    ``"dense"``: by how much two dense networks of different seeds differ, mean over pairs without sign (NaN for one
    seed). No columns where nothing is kept.
    """
    dense = kept_of(tickets, arrays, "dense", 0, "recall_by_class")
    found = {case: kept_of(tickets, arrays, *case, "recall_by_class") for case in cases}
    found = {case: recall for case, recall in found.items() if recall is not None}
    if dense is None or not found:
        return pd.DataFrame()
    names = kept_of(tickets, arrays, "dense", 0, "classes")[0]
    pairs = [np.abs(a - b) for a, b in combinations(dense, 2)]
    columns: dict[object, np.ndarray] = {case: (recall - dense).mean(0) for case, recall in found.items()}
    columns["dense"] = np.mean(pairs, axis=0) if pairs else np.full(len(names), np.nan)
    return pd.DataFrame(columns, index=names)[~np.isnan(dense[0])]


def odd_ones(tickets: pd.DataFrame, arrays: Arrays, method: str, round: int) -> pd.DataFrame | None:
    """Return the pruning-identified exemplars of a method and round: positions, and true, dense and sparse class.

    None where answers are not kept, or of one seed, which nobody can agree with.
    """
    names, labels, dense = (kept_of(tickets, arrays, "dense", 0, key) for key in ("classes", "labels", "predicted"))
    sparse = kept_of(tickets, arrays, method, round, "predicted")
    if dense is None or sparse is None or min(len(dense), len(sparse)) < 2:
        return None
    at = np.flatnonzero(exemplars(dense, sparse))
    true, before, after = (names[0][answers[0][at]] for answers in (labels, dense, sparse))
    return pd.DataFrame({"image": at, "true": true, "dense": before, "sparse": after})


def exemplar_table(tickets: pd.DataFrame, arrays: Arrays) -> pd.DataFrame:
    """Return how many exemplars each method and round has, and of how many of them dense and sparse are right.

    A line a method and round of which it is known; there are none where nothing is kept, or of one seed.
    """
    lines = []
    cases = tickets.loc[tickets["round"] > 0, ["method", "round"]].drop_duplicates()
    for method, round in cases.itertuples(index=False):
        odd = odd_ones(tickets, arrays, method, round)
        if odd is not None:
            right = {f"{side} right": int((odd[side] == odd["true"]).sum()) for side in ("dense", "sparse")}
            which = {"method": METHODS[method].title, "sparsity [%]": f"{100 * sparsity_of(round):.1f}"}
            lines.append({**which, "exemplars": len(odd), **right, "neither": len(odd) - sum(right.values())})
    return pd.DataFrame(lines)
