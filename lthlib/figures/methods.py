"""Figures of the methods themselves: where their weights are, whether they are the same, what accuracy costs."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lthlib.figures import WIDTH, colours, curve, heatmap, label, shades
from lthlib.pruning import METHODS, masks

ANNOTATED = 16  # layers; more numbers side by side cannot be read
MARKERS = {"structured": "s", "control": "^"}
COSTS = {
    "n_parameters": "parameters [% of dense]",
    "macs": "MACs of kept weights [% of dense]",
    "macs_dense_kernel": "MACs a dense kernel does [% of dense]",
}
TICKS = [0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100]


def density_map(densities: pd.DataFrame, round: int) -> Figure:
    """Draw the density of each layer in percent, a row a method, at one round; `lthlib.book` makes the table."""
    table = 100 * densities.xs(round, level="round")
    few = len(table.columns) <= ANNOTATED
    floor = max(table.to_numpy()[table.to_numpy() > 0].min(), 0.01)
    bar, titles = {"label": "density [%]", "format": "%g"}, [METHODS[m].title for m in table.index]
    style = {"norm": LogNorm(floor, 100), "lines": 1 if few else 0, "size": 8, "degrees": 35 if few else 90}
    figure, axis = plt.subplots(figsize=(WIDTH, 0.34 * len(table) + 2.0), layout="constrained")
    text, layers = table.map("{:.3g}".format) if few else None, [name.removesuffix(".weight") for name in table]
    heatmap(axis, table.clip(lower=floor), text, layers, titles, bar, **style)
    axis.set_title(f"density by layer at sparsity {100 * masks.sparsity_of(round):.1f} %, mean over seeds")
    axis.set(xlabel="layer, from input to output", ylabel="")
    return figure


def overlap_map(overlaps: pd.DataFrame) -> Figure:
    """Draw the overlap of every two masks, mean over seeds: below the diagonal measured, above it by chance."""
    names = list(dict.fromkeys([*overlaps["a"], *overlaps["b"]]))
    table = pd.DataFrame(np.nan, index=names, columns=names)
    for (a, b), pair in overlaps.groupby(["a", "b"], sort=False):
        table.loc[b, a], table.loc[a, b] = 100 * pair["jaccard"].mean(), 100 * pair["chance"].mean()
    bar, titles = {"label": "overlap (Jaccard) [%]"}, [METHODS[m].title for m in names]
    figure, axis = plt.subplots(figsize=(WIDTH, 0.42 * len(table) + 2.2), layout="constrained")
    text = table.map("{:.1f}".format)
    heatmap(axis, table, text, titles, titles, bar, norm=Normalize(0, 100), size=8, degrees=35)
    axis.set_title("below the diagonal: measured; above: random masks of the same layer densities")
    return figure


def density_lines(densities: pd.DataFrame, about: str, round: int) -> Figure:
    """Draw densities by layer of one method: at all its rounds, and at one round in front of the other methods."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(WIDTH, 3.9), sharey=True, layout="constrained")
    mine, peers = 100 * densities.loc[about], 100 * densities.xs(round, level="round")
    for shade, (n, line) in zip(shades(len(mine)), mine.iterrows(), strict=True):
        left.plot(line.to_numpy(), color=shade, marker="o", ms=4, label=f"{100 * masks.sparsity_of(n):.3g} %")
    left.legend(title="sparsity", fontsize=8, title_fontsize=8)
    left.set(title=f"{METHODS[about].title}, by sparsity", ylabel="density [%]")
    for name, line in peers.drop(index=about).iterrows():
        right.plot(line.to_numpy(), color=colours()[name], lw=1, alpha=0.7, label=METHODS[name].title)
    right.plot(peers.loc[about].to_numpy(), color="black", lw=2.5, marker="o", ms=4, label=METHODS[about].title)
    right.axhline(100 * (1 - masks.sparsity_of(round)), color="grey", ls=":", label="the same in all layers")
    right.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.01, 1))
    right.set_title(f"beside the others at {100 * masks.sparsity_of(round):.1f} %")
    layers = [name.removesuffix(".weight") for name in mine]
    for axis in (left, right):
        axis.set_xticks(np.arange(len(layers)), layers, rotation=90, fontsize=8)
    values = np.concatenate([mine.to_numpy().ravel(), peers.to_numpy().ravel()])
    floor = 10 ** np.floor(np.log10(values[values > 0].min()))
    left.set_yscale("symlog", linthresh=floor)  # a logarithm that has room for empty layers
    left.set_ylim(floor if values.all() else 0, 130)
    return figure


def overlap_bars(overlaps: pd.DataFrame, about: str) -> Figure:
    """Draw the overlap of one method's mask with each other's, mean over seeds, beside that of random masks."""
    other = np.where(overlaps["a"] == about, overlaps["b"], overlaps["a"])
    means = 100 * overlaps.groupby(other, sort=False)[["jaccard", "chance"]].mean().iloc[::-1]
    figure, axis = plt.subplots(figsize=(WIDTH, 0.34 * len(means) + 1.2), layout="constrained")
    places = np.arange(len(means))
    axis.barh(places, means["jaccard"], color=[colours()[m] for m in means.index], label="measured")
    axis.plot(means["chance"], places, "|", color="black", ms=16, mew=2, label="random, same layer densities")
    axis.set_yticks(places, [METHODS[m].title for m in means.index])
    axis.set_xlabel(f"overlap with the mask of {METHODS[about].title} (Jaccard) [%]")
    axis.legend(handles=axis.lines, loc="lower right", bbox_to_anchor=(1, 1), frameon=False)
    axis.set_xlim(0, 100)
    axis.grid(axis="y", visible=False)
    return figure


def accuracy_beside(judged: pd.DataFrame, about: str) -> Figure:
    """Draw test accuracy against sparsity: one method in the style of every curve, the others of its study in grey."""
    part = judged[(judged["metric"] == "test_accuracy") & (judged["shift"] == "none")]
    part = part.drop_duplicates(["method", "round"]).sort_values("round")
    figure, axis = plt.subplots(
        figsize=(4.6, 3.1), gridspec_kw={"left": 0.13, "right": 0.97, "bottom": 0.24, "top": 0.95}
    )
    for _, line in part[part["method"] != about].groupby("method"):
        axis.plot(line["round"], 100 * line["mean"], color="grey", lw=1, alpha=0.5)
    curve(axis, part[part["method"] == about], "test_accuracy")
    named = {METHODS[about].title: (colours()[about], "-"), "dense": ("black", "--"), "other methods": ("grey", "-")}
    lines = [Line2D([], [], color=colour, ls=style, label=name) for name, (colour, style) in named.items()]
    figure.legend(handles=lines, loc="lower center", ncols=3, frameon=False)
    return figure


def accuracy_by_cost(costs: pd.DataFrame, about: str | None = None) -> Figure:
    """Draw test accuracy against parameters, MACs of kept weights, and MACs that a dense kernel does.

    Circles are unstructured masks, triangles controls, squares smaller dense networks (structured, small dense), the
    star is the dense network. The method that it is ``about`` stands in front of the others.
    """
    figure, axes = plt.subplots(1, len(COSTS), figsize=(WIDTH, 4.6), sharey=True, layout="constrained")
    dense = costs[costs["method"] == "dense"].iloc[0]
    for axis, (column, title) in zip(axes, COSTS.items(), strict=True):
        for method, line in costs.groupby("method", sort=False):
            line = line.sort_values(column)
            style = {"marker": "*", "ms": 13, "ls": "", "color": "black", "label": "dense"}
            if method != "dense":
                marker, front = MARKERS.get(METHODS[method].family, "o"), about in (None, method)
                style = {"marker": marker, "ms": 5, "lw": 1.4, "color": colours()[method]}
                style |= {"label": METHODS[method].title, "alpha": 1 if front else 0.25, "zorder": 3 if front else 2}
            axis.plot(100 * line[column] / dense[column], 100 * line["accuracy"], **style)
        axis.set_xscale("log")
        least = 100 * (costs[column] / dense[column]).min()
        axis.set_xticks([t for t in TICKS if t >= 0.7 * least], [f"{t:g}" for t in TICKS if t >= 0.7 * least])
        axis.minorticks_off()
        axis.set_xlabel(title)
    axes[0].set_ylabel(label("test_accuracy"))
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    return figure
