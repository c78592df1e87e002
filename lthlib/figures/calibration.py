"""Figures of calibration."""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from lthlib.figures import WIDTH


def reliability(diagrams: Mapping[str, Mapping[str, np.ndarray]]) -> Figure:
    """Draw reliability diagrams side by side, by title: accuracy against confidence by bin, and the count of images."""
    shape = {"sharex": True, "sharey": "row", "height_ratios": [3, 1], "squeeze": False}
    figure, axes = plt.subplots(2, len(diagrams), figsize=(WIDTH, 3.6), layout="constrained", **shape)
    for (top, bottom), (title, bins) in zip(axes.T, diagrams.items(), strict=True):
        width = 1 / len(bins["count"])
        centres, filled = width * (np.arange(len(bins["count"])) + 0.5), bins["count"] > 0
        top.plot([0, 1], [0, 1], color="black", ls="--", lw=1)
        top.bar(centres[filled], bins["accuracy"][filled], width, color="C0", alpha=0.7, edgecolor="white")
        top.plot(bins["confidence"][filled], bins["accuracy"][filled], "o", color="C3", ms=3)
        bottom.bar(centres, bins["count"], width, color="grey", edgecolor="white")
        bottom.set_yscale("symlog")
        top.set_title(title)
        bottom.set_xlabel("confidence")
    axes[0, 0].set_ylabel("accuracy")
    axes[1, 0].set_ylabel("images")
    return figure
