"""Figures of generalization."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from lthlib import masks
from lthlib.figures import WIDTH, label
from lthlib.pruners import METHODS


def attack_curves(judged: pd.DataFrame) -> Figure:
    """Draw accuracy against attack strength: dense beside each method at its sparsities, one panel a method."""
    part = judged[judged["metric"] == "adversarial_accuracy"]
    methods = list(dict.fromkeys(part["method"]))
    columns = min(4, len(methods))
    rows = -(-len(methods) // columns)
    figure, axes = plt.subplots(
        rows,
        columns,
        figsize=(WIDTH, 2.4 * rows + 0.4),
        squeeze=False,
        sharex=True,
        sharey=True,
        layout="constrained",
    )
    shades = sns.color_palette("flare", part["round"].nunique())
    for axis in axes.flat[len(methods) :]:
        axis.remove()
    for axis, method in zip(axes.flat, methods, strict=False):
        mine = part[part["method"] == method]
        for shade, (n, line) in zip(shades, mine.groupby("round"), strict=False):
            axis.plot(
                line["severity"],
                100 * line["mean"],
                "o-",
                ms=3,
                color=shade,
                label=f"{100 * masks.sparsity_of(n):.3g} %",
            )
        first = mine[mine["round"] == mine["round"].min()]
        axis.plot(first["severity"], 100 * first["dense"], color="black", ls="--", label="dense")
        axis.set_title(METHODS[method].title)
        axis.set_xlabel("ε [1/255]")
    axes[0, 0].set_ylabel(label("adversarial_accuracy"))
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=7, frameon=False)
    return figure
