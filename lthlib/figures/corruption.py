"""Figures of what corruption does to a metric: maps, changes by corruption, curves over severity.

``judged`` is a table as `lthlib.results.verdict.judge` returns it, ``metric`` a name that starts with ``corrupted_``.
Where there are several methods they are compared at ``round``; of one method every round is drawn.
"""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from lthlib.data.corruptions import CORRUPTIONS, common
from lthlib.figures import WIDTH, colours, factor, heatmap, label, shades
from lthlib.metrics import METRICS
from lthlib.networks import ARCHITECTURES
from lthlib.pruning import METHODS, masks


def corruption_map(judged: pd.DataFrame, metric: str, round: int) -> Figure:
    """Draw a metric by corruption and severity: dense, and how sparse differs from it at a round.

    One method: dense, sparse, and sparse minus dense, with numbers. Several: dense, then each method minus dense. In
    the differences blue is better than dense and red worse, whichever way the metric points.
    """
    part = judged[(judged["metric"] == metric) & (judged["round"] == round)]
    tables = factor(metric) * part.pivot(index="shift", columns=["method", "severity"], values=["dense", "mean"])
    tables = _in_order(tables)
    methods = list(dict.fromkeys(part["method"]))
    dense, sparse = tables["dense"][methods[0]], tables["mean"]
    values = {"dense": dense} | ({_title(methods[0]): sparse[methods[0]]} if len(methods) == 1 else {})
    changes = {f"{_title(m)} − dense": sparse[m] - dense for m in methods}
    few, better = len(values) + len(changes) <= 3, METRICS[metric].higher_is_better
    digits, names = 0 if METRICS[metric].unit == "fraction" else 2, [CORRUPTIONS[name].title for name in dense.index]
    figure, axes = plt.subplots(
        1, len(values) + len(changes), figsize=(WIDTH, 0.24 * len(dense) + 1.1), sharey=True, layout="constrained"
    )
    for panels, scheme, mine in ((values, "viridis", axes[: len(values)]), (changes, "RdBu", axes[len(values) :])):
        most = max(float(np.abs(table).max().max()) for table in panels.values()) or 1.0
        low = -most if scheme == "RdBu" else min(float(table.min().min()) for table in panels.values())
        style = {"norm": Normalize(low, most), "cmap": scheme if better else f"{scheme}_r"}
        for axis, (title, table) in zip(mine, panels.items(), strict=True):
            text = (table.round(digits) + 0.0).map(f"{{:.{digits}f}}".format) if few else None
            severities = [f"{s:g}" for s in table.columns]
            shown = heatmap(axis, table, text, severities, names, None, lines=0, size=7, degrees=0, **style)
            axis.set_title(title, fontsize="small")
            axis.set_xlabel("severity")
        figure.colorbar(shown, ax=list(mine), orientation="horizontal", pad=0.01, aspect=60, shrink=0.8)
    axes[0].tick_params(axis="y", labelsize=8)
    ours = set(part["arch"]) <= set(ARCHITECTURES)  # of a foreign network it need not be that
    at = f", sparse at {_percent(round)}" if ours else ""
    figure.suptitle(f"{label(metric)}{at}", fontsize="medium")
    return figure


def corruption_change(judged: pd.DataFrame, metric: str, round: int) -> Figure:
    """Draw sparse minus dense by corruption, mean over severities: each sparsity of one method, or each method."""
    part, by, lines = _lines(judged[judged["metric"] == metric], round)
    part = part.assign(change=factor(metric) * (part["mean"] - part["dense"]))
    table = _in_order(part.groupby([by, "shift"])["change"].mean().unstack(0))
    figure, axis = plt.subplots(figsize=(WIDTH, 0.26 * len(table) + 0.9), layout="constrained")
    places = np.arange(len(table))
    for offset, (key, style) in zip(np.linspace(-0.28, 0.28, len(lines)), lines.items(), strict=True):
        axis.plot(table[key], places + offset, "o", ms=4, **style)
    for place in places[::2]:
        axis.axhspan(place - 0.5, place + 0.5, color="black", alpha=0.05, lw=0)
    axis.grid(axis="y", visible=False)
    axis.set_ylim(len(table) - 0.5, -0.5)
    axis.axvline(0, color="black", ls="--", lw=1)
    axis.set_yticks(places, [CORRUPTIONS[name].title for name in table.index])
    at = f", at {_percent(round)}" if by == "method" else ""
    axis.set_xlabel(f"sparse − dense, {label(metric)}{at}")
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    return figure


def severity_curves(judged: pd.DataFrame, metrics: Sequence[str], round: int) -> Figure:
    """Draw metrics against severity, mean over the 15 common corruptions, a panel each: dense, and the sparse ones."""
    figure, axes = plt.subplots(1, len(metrics), figsize=(WIDTH, 3.2), squeeze=False, layout="constrained")
    for axis, metric in zip(axes[0], metrics, strict=True):
        part = judged[(judged["metric"] == metric) & judged["shift"].isin(common())]
        part, by, lines = _lines(part, round)
        mean = factor(metric) * part.groupby([by, "severity"])[["mean", "dense"]].mean()
        for key, style in lines.items():
            axis.plot(mean.loc[key].index, mean.loc[key, "mean"], "o-", ms=3, **style)
        axis.plot(mean.loc[key].index, mean.loc[key, "dense"], "--", color="black", label="dense")
        axis.set(xlabel="severity", ylabel=label(metric), xticks=mean.loc[key].index)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=8, frameon=False)
    return figure


def _in_order(table: pd.DataFrame) -> pd.DataFrame:
    return table.loc[[name for name in CORRUPTIONS if name in table.index]]


def _lines(part: pd.DataFrame, round: int) -> tuple[pd.DataFrame, str, dict[object, dict]]:
    """Return the rows to draw, the column that tells the lines apart, and each line's label and colour."""
    methods = list(dict.fromkeys(part["method"]))
    if len(methods) > 1:
        lines = {name: {"label": METHODS[name].title, "color": colours()[name]} for name in methods}
        return part[part["round"] == round], "method", lines
    rounds = sorted(set(part["round"]))
    of_rounds = zip(rounds, shades(len(rounds)), strict=True)
    return part, "round", {n: {"label": _percent(n), "color": shade} for n, shade in of_rounds}


def _title(method: str) -> str:
    return METHODS[method].title if method in METHODS else method


def _percent(round: int) -> str:
    return f"{100 * masks.sparsity_of(round):.1f} %"
