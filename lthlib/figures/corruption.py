"""Figures of what corruption does to a metric: maps, changes by corruption, curves over severity."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from lthlib.data.corruptions import CORRUPTIONS, common
from lthlib.figures import WIDTH, colours, factor, label, shades
from lthlib.metrics import METRICS
from lthlib.pruning import METHODS, masks


def corruption_map(judged: pd.DataFrame, metric: str, round: int) -> Figure:
    """Draw a metric by corruption and severity: dense, and how sparse differs from it.

    One method: dense, sparse, and sparse minus dense, with numbers. Several: dense, then each method minus dense. In
    the differences blue is better than dense and red worse, whichever way the metric points.

    Args:
        judged: As `lthlib.results.verdict.regions` returns it.
        metric: A name that starts with ``corrupted_``.
        round: Of the sparse networks.
    """
    part = judged[(judged["metric"] == metric) & (judged["round"] == round)]
    methods = list(dict.fromkeys(part["method"]))
    dense = _table(part[part["method"] == methods[0]], metric, "dense")
    sparse = {method: _table(part[part["method"] == method], metric, "mean") for method in methods}
    panels = [("dense", dense, False)]
    if len(methods) == 1:
        panels.append((METHODS[methods[0]].title, sparse[methods[0]], False))
    panels += [(f"{METHODS[m].title} − dense", table - dense, True) for m, table in sparse.items()]
    figure, axes = plt.subplots(
        1, len(panels), figsize=(WIDTH, 0.24 * len(dense) + 1.1), sharey=True, layout="constrained"
    )
    better = METRICS[metric].higher_is_better
    for change, scheme in ((False, "viridis"), (True, "RdBu")):
        mine = [(a, title, t) for a, (title, t, c) in zip(axes, panels, strict=True) if c == change]
        most = max(float(np.abs(t).max().max()) for _, _, t in mine) or 1.0
        low = -most if change else min(float(t.min().min()) for _, _, t in mine)
        for axis, title, table in mine:
            shown = axis.imshow(table, cmap=scheme if better else f"{scheme}_r", vmin=low, vmax=most, aspect="auto")
            if len(panels) <= 3:
                _write(axis, table, shown, metric)
            axis.set_title(title, fontsize="small")
            axis.set_xticks(range(len(table.columns)), [f"{s:g}" for s in table.columns])
            axis.set_xlabel("severity")
            axis.grid(visible=False)
        figure.colorbar(shown, ax=[a for a, _, _ in mine], orientation="horizontal", pad=0.01, aspect=60, shrink=0.8)
    axes[0].set_yticks(range(len(dense)), [CORRUPTIONS[name].title for name in dense.index], fontsize=8)
    figure.suptitle(f"{label(metric)}, sparse at {_percent(round)}", fontsize="medium")
    return figure


def _write(axis: Axes, table: pd.DataFrame, shown: AxesImage, metric: str) -> None:
    """Put the numbers into the cells, light on dark."""
    digits = 0 if METRICS[metric].unit == "fraction" else 2
    for (y, x), value in np.ndenumerate(table.to_numpy()):
        light = np.mean(shown.cmap(shown.norm(value))[:3]) < 0.45
        axis.text(
            x,
            y,
            f"{round(value, digits) + 0.0:.{digits}f}",
            ha="center",
            va="center",
            fontsize=7,
            color="white" if light else "black",
        )


def _table(part: pd.DataFrame, metric: str, column: str) -> pd.DataFrame:
    table = factor(metric) * part.pivot(index="shift", columns="severity", values=column)
    return table.loc[[name for name in CORRUPTIONS if name in table.index]]


def corruption_change(judged: pd.DataFrame, metric: str, round: int) -> Figure:
    """Draw sparse minus dense by corruption, mean over severities: each sparsity of one method, or each method.

    Args:
        judged: As `lthlib.results.verdict.regions` returns it.
        metric: A name that starts with ``corrupted_``.
        round: The round at which several methods are compared.
    """
    part = judged[judged["metric"] == metric]
    part = part.assign(change=factor(metric) * (part["mean"] - part["dense"]))
    methods = list(dict.fromkeys(part["method"]))
    several = len(methods) > 1
    part = part[part["round"] == round] if several else part
    keys, colour = _lines(part, methods)
    table = part.groupby(["method" if several else "round", "shift"])["change"].mean().unstack(0)
    table = table.loc[[name for name in CORRUPTIONS if name in table.index]]
    figure, axis = plt.subplots(figsize=(WIDTH, 0.26 * len(table) + 0.9), layout="constrained")
    places = np.arange(len(table))
    for offset, (key, title) in zip(np.linspace(-0.28, 0.28, len(keys)), keys.items(), strict=True):
        axis.plot(table[key], places + offset, "o", ms=4, color=colour[key], label=title)
    for place in places[::2]:
        axis.axhspan(place - 0.5, place + 0.5, color="black", alpha=0.05, lw=0)
    axis.grid(axis="y", visible=False)
    axis.set_ylim(-0.5, len(table) - 0.5)
    axis.axvline(0, color="black", ls="--", lw=1)
    axis.set_yticks(places, [CORRUPTIONS[name].title for name in table.index])
    axis.invert_yaxis()
    axis.set_xlabel(f"sparse − dense, {label(metric)}" + (f", at {_percent(round)}" if several else ""))
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    return figure


def severity_curves(judged: pd.DataFrame, metrics: Sequence[str], round: int) -> Figure:
    """Draw metrics against severity, mean over the 15 common corruptions: dense, and the sparse ones.

    Args:
        judged: As `lthlib.results.verdict.regions` returns it.
        metrics: Names that start with ``corrupted_``; a panel each.
        round: The round at which several methods are compared; of one method every round is drawn.
    """
    figure, axes = plt.subplots(1, len(metrics), figsize=(WIDTH, 3.2), squeeze=False, layout="constrained")
    for axis, metric in zip(axes[0], metrics, strict=True):
        part = judged[(judged["metric"] == metric) & judged["shift"].isin(common())]
        methods = list(dict.fromkeys(part["method"]))
        several = len(methods) > 1
        part = part[part["round"] == round] if several else part
        keys, colour = _lines(part, methods)
        mean = factor(metric) * part.groupby(["method" if several else "round", "severity"])[["mean", "dense"]].mean()
        for key, title in keys.items():
            axis.plot(mean.loc[key].index, mean.loc[key, "mean"], "o-", ms=3, color=colour[key], label=title)
        axis.plot(mean.loc[key].index, mean.loc[key, "dense"], "--", color="black", label="dense")
        axis.set(xlabel="severity", ylabel=label(metric), xticks=mean.loc[key].index)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=8, frameon=False)
    return figure


def _lines(part: pd.DataFrame, methods: Sequence[str]) -> tuple[dict, dict]:
    """Return the titles and colours of the lines: the methods, or the rounds of the only one."""
    if len(methods) > 1:
        return {name: METHODS[name].title for name in methods}, colours()
    rounds = sorted(set(part["round"]))
    return {n: _percent(n) for n in rounds}, dict(zip(rounds, shades(len(rounds)), strict=True))


def _percent(round: int) -> str:
    return f"{100 * masks.sparsity_of(round):.1f} %"
