"""The figure of a claim: a row a study, a panel a metric, in the style of every sparsity curve."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from lthlib.figures import WIDTH, curve, legend
from lthlib.metrics import METRICS
from lthlib.results.claims import Claim
from lthlib.results.verdict import COLLAPSED, KEPT, LOST, NOT_SHOWN

MOST_STUDIES, MOST_METRICS = 3, 4


def claim_figure(claim: Claim, judged: Mapping[str, pd.DataFrame]) -> Figure | None:
    """Draw the metrics and methods that a claim is about, of the first studies that have such; None where none has.

    ``judged``: by study, as `lthlib.results.verdict.judge` returns it.
    """
    chosen = {label: _chosen(claim, table) for label, table in judged.items()}
    chosen = dict([(label, table) for label, table in chosen.items() if len(table)][:MOST_STUDIES])
    metrics = [name for name in claim.figure if any((t["metric"] == name).any() for t in chosen.values())][
        :MOST_METRICS
    ]
    if not metrics:
        return None
    columns = min(2, len(metrics))
    per_study = -(-len(metrics) // columns)
    size = WIDTH, 2.9 * per_study * len(chosen) + 0.7
    figure, axes = plt.subplots(per_study * len(chosen), columns, figsize=size, squeeze=False, layout="constrained")
    for i, (label, table) in enumerate(chosen.items()):
        panels = axes[i * per_study : (i + 1) * per_study].flat
        for axis, metric in zip(panels, [*metrics, *[None] * (columns * per_study - len(metrics))], strict=True):
            part = table[table["metric"] == metric]
            if part.empty:
                axis.remove()
                continue
            curve(axis, _over_shifts(part), metric)
            axis.set_title(label, fontsize=9)
    methods = list(dict.fromkeys(m for table in chosen.values() for m in table["method"]))
    handles = legend(methods)
    figure.legend(handles=handles, loc="outside lower center", ncols=min(6, len(handles)), frameon=False)
    return figure


def _chosen(claim: Claim, judged: pd.DataFrame) -> pd.DataFrame:
    wanted = judged["metric"].isin([name for name in claim.figure if name in METRICS]) & (judged["outcome"] != "")
    return judged[wanted & (judged["method"].isin(claim.methods) if claim.methods else True) & judged["dense"].notna()]


def _over_shifts(part: pd.DataFrame) -> pd.DataFrame:
    """Average a metric over its shifts; the style is that of the worst outcome."""
    worst: Sequence[str] = [KEPT, NOT_SHOWN, LOST, COLLAPSED]
    part = part.assign(rank=part["outcome"].map(worst.index)).drop_duplicates(["method", "round", "shift", "severity"])
    numbers = ["mean", "low", "high", "dense", "dense_low", "dense_high"]
    grouped = part.groupby(["method", "round"], sort=False)
    found = grouped[numbers].mean().assign(rank=grouped["rank"].max()).reset_index()
    return found.assign(outcome=found["rank"].map(worst.__getitem__))
