"""Figures of who pays: change of recall by class, and the images that every sparse network answers otherwise."""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from lthlib.figures import WIDTH, heatmap

MOST_CLASSES = 20  # rows that a heat map still shows legibly
IN_A_ROW = 8


def recall_map(changes: pd.DataFrame) -> Figure:
    """Draw by how much the recall of each class changes, in percentage points: red loses, blue gains.

    Of more than `MOST_CLASSES` classes, those that lose most and gain most on average. The table has a line a class, a
    column a sparse network by its title, as fractions; ``"dense"``, what two dense networks differ by, stands beside
    the name of each class.
    """
    dense, changes = 100 * changes["dense"], 100 * changes.drop(columns="dense")
    changes = changes.loc[changes.mean(axis=1).sort_values(kind="stable").index]
    if len(changes) > MOST_CLASSES:
        changes = pd.concat([changes.head(MOST_CLASSES // 2), changes.tail(MOST_CLASSES // 2)])
    names = [name if np.isnan(dense[name]) else f"{name}  (±{dense[name]:.1f})" for name in changes.index]
    most = max(1.0, float(np.nanmax(np.abs(changes.to_numpy()))))
    figure, axis = plt.subplots(figsize=(WIDTH, 0.32 * len(changes) + 1.5), layout="constrained")
    style = {"cmap": "RdBu", "norm": Normalize(-most, most), "lines": 0.5}
    text, bar = changes.map("{:+.1f}".format), {"label": "change of recall [points]"}
    heatmap(axis, changes, text, list(changes), names, bar, **style)
    axis.set_ylabel("class (two dense seeds)")
    return figure


def exemplar_gallery(rows: Mapping[str, tuple[np.ndarray, pd.DataFrame]]) -> Figure:
    """Draw some exemplars of each sparse network, a row each, with true class, dense answer and sparse answer.

    By title, uint8 images (n, h, w, channels) and the lines of `lthlib.results.classes.odd_ones` about them.
    """
    figure, axes = plt.subplots(len(rows), 1, figsize=(WIDTH, 1.75 * len(rows)), squeeze=False, layout="constrained")
    for axis, (title, (images, odd)) in zip(axes.flat, rows.items(), strict=True):
        _, height, width, channels = images.shape
        step = width + max(1, width // 10)
        strip = np.full((height, IN_A_ROW * step, channels), 255, np.uint8)  # one axis a row: many would be slow
        for at, image, of in zip(range(0, len(strip[0]), step), images, odd.itertuples(), strict=False):
            strip[:, at : at + width] = image
            said = f"{of.true}\n{of.dense} → {of.sparse}"
            axis.text(at + width / 2, -0.05 * height, said, ha="center", va="bottom", fontsize=7)
        axis.imshow(strip.squeeze(-1) if channels == 1 else strip, cmap="gray", vmin=0, vmax=255)
        axis.set(xticks=[], yticks=[], frame_on=False)
        axis.set_ylabel(title, fontsize=8)
    return figure
