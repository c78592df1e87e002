"""The evaluations of a study as tables: read from recorded results, else from the store, else computed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm import tqdm

from lthlib.core.errors import UserError
from lthlib.core.store import Store
from lthlib.metrics import Value
from lthlib.results.classes import churn
from lthlib.results.evaluate import DIMENSIONS, Evaluation, evaluate, question
from lthlib.results.noninferiority import CASE
from lthlib.results.recorded import read_records
from lthlib.tickets.study import Study
from lthlib.tickets.ticket import Ticket

COLUMNS = ("dataset", "arch", "method", "sparsity", "seed", "dimension", *CASE, "n", "value", "ticket")
COUNTS = ("sparsity", "n_kept", "n_prunable", "n_parameters", "macs", "macs_dense_kernel", "macs_parent")


@dataclass(frozen=True)
class Results:
    """The evaluations of a study, as tables.

    Attributes:
        study: What was asked.
        dimension: In which dimension.
        rows: Tidy table with the columns `COLUMNS` and ``round``.
        tickets: One line a ticket: method, round, seed, counts, cost.
        arrays: Small arrays by ticket id.
        provenance: One mapping a ticket.
        recorded: Ids of the tickets that were read from recorded results.
    """

    study: Study
    dimension: str
    rows: pd.DataFrame
    tickets: pd.DataFrame
    arrays: Mapping[str, Mapping[str, np.ndarray]]
    provenance: Sequence[Mapping]
    recorded: frozenset[str]


def collect(
    study: Study,
    dimension: str,
    store: Store,
    *,
    parameters: Mapping | None = None,
    recorded: Path | str | None = None,
    compute_missing: bool = True,
    precision: str = "auto",
) -> Results:
    """Gather the evaluations of every ticket of a study, computing (with a progress bar) what is missing.

    Args:
        study, dimension, store, parameters, precision: As `evaluate` takes them.
        recorded: Folder of recorded results (``book/results``), read before anything is computed; None to ignore.
        compute_missing: Whether to compute what is not recorded; else that is an error.
    """
    settings = DIMENSIONS[dimension].parameters(parameters)
    name = question(dimension, settings, precision)
    records = read_records(recorded) if recorded else {}
    tickets = {ticket: records.get((ticket.id, name)) for ticket in study.tickets()}
    missing = [ticket.id for ticket, record in tickets.items() if record is None]
    if missing and not compute_missing:
        raise UserError(
            f"{len(missing)} of {len(tickets)} evaluations are not among the recorded results in {recorded}, the first "
            f"is {missing[0]}: record the grid again, or allow computing."
        )
    found = [
        evaluate(ticket, dimension, store, settings, precision) if record is None else record.evaluation(ticket)
        for ticket, record in tqdm(tickets.items(), desc=dimension, unit="ticket", delay=2, leave=False)
    ]
    return Results(
        study,
        dimension,
        rows_of(found, dimension),
        ticket_table(found),
        {e.ticket.id: e.arrays for e in found},
        [e.provenance for e in found],
        frozenset(ticket.id for ticket in tickets) - {*missing},
    )


def rows_of(evaluations: Iterable[Evaluation], dimension: str) -> pd.DataFrame:
    """Return the tidy table of a study's evaluations: one line a number, those of pairs of networks among them."""
    found = list(evaluations)
    pairs = churn((e.ticket, e.arrays) for e in found)
    also = {ticket: [value] for ticket, value in pairs.items()}
    return table_of([(e.ticket, e.info["sparsity"], [*e.values, *also.get(e.ticket.id, [])]) for e in found], dimension)


def table_of(found: Iterable[tuple[Ticket, float, Sequence[Value]]], dimension: str) -> pd.DataFrame:
    """Return the tidy table of what one dimension found: tickets with their sparsity and values."""
    lines = []
    for ticket, sparsity, values in found:
        which = ticket.data, ticket.arch, ticket.method, sparsity, ticket.seed, dimension
        of = ticket.id, ticket.round  # named once: an id is hashed anew each time
        lines += [(*which, v.metric, v.shift, v.severity, v.n, v.value, *of) for v in values]
    return pd.DataFrame(lines, columns=[*COLUMNS, "round"])


def ticket_table(evaluations: Iterable[Evaluation]) -> pd.DataFrame:
    """Return a line a ticket: what it is, its counts and what it cost."""
    lines = []
    for e in evaluations:
        which = {"ticket": e.ticket.id, "method": e.ticket.method, "round": e.ticket.round, "seed": e.ticket.seed}
        counts = {name: e.info[name] for name in COUNTS}
        lines.append({**which, **counts, **e.info["cost"], "density_by_layer": e.info["density_by_layer"]})
    return pd.DataFrame(lines)
