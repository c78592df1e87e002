"""The figure of a claim: a row a study, a panel a metric, in the style of every sparsity curve."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import pandas as pd
from matplotlib.figure import Figure

from lthlib.figures import curve, grid, legend
from lthlib.metrics import METRICS
from lthlib.results.claims import Claim
from lthlib.results.verdict import WORSE

MOST_STUDIES, MOST_METRICS = 3, 4


def claim_figure(claim: Claim, judged: Mapping[str, pd.DataFrame]) -> Figure | None:
    """Draw the metrics and methods that a claim is about, of the first studies that have such; None where none has.

    ``judged``: by study, as `lthlib.results.verdict.judge` returns it.
    """
    chosen = {label: _chosen(claim, table) for label, table in judged.items()}
    chosen = dict([(label, table) for label, table in chosen.items() if len(table)][:MOST_STUDIES])
    metrics = [name for name in claim.figure if any((t["metric"] == name).any() for t in chosen.values())]
    if not metrics:
        return None
    columns, metrics = min(2, len(metrics)), metrics[:MOST_METRICS]
    metrics += [None] * (len(metrics) % columns)  # a study begins a row
    figure, axes = grid(len(metrics) * len(chosen), columns, 2.9, 0.7)
    for axis, ((label, table), metric) in zip(axes, itertools.product(chosen.items(), metrics), strict=True):
        part = table[table["metric"] == metric]
        if part.empty:
            axis.remove()
            continue
        curve(axis, _over_shifts(part), metric)
        axis.set_title(label, fontsize=9)
    legend(figure, pd.concat(chosen.values())["method"])
    return figure


def _chosen(claim: Claim, judged: pd.DataFrame) -> pd.DataFrame:
    wanted = judged["metric"].isin([name for name in claim.figure if name in METRICS]) & (judged["outcome"] != "")
    return judged[wanted & (judged["method"].isin(claim.methods) if claim.methods else True) & judged["dense"].notna()]


def _over_shifts(part: pd.DataFrame) -> pd.DataFrame:
    """Average a metric over its shifts; the style is that of the worst outcome."""
    part = part.astype({"outcome": WORSE}).drop_duplicates(["method", "round", "shift", "severity"])
    grouped = part.groupby(["method", "round"], sort=False)
    numbers = ["mean", "low", "high", "dense", "dense_low", "dense_high"]
    return grouped[numbers].mean().assign(outcome=grouped["outcome"].max()).reset_index()
