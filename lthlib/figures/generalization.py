"""Figures of generalization."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from lthlib.data.corruptions import CORRUPTIONS
from lthlib.figures import WIDTH, grid, label, shades
from lthlib.pruning import METHODS, masks


def attack_curves(judged: pd.DataFrame) -> Figure:
    """Draw accuracy under FGSM against its strength, PGD-20 as crosses: dense and sparse, one panel a method."""
    fgsm, pgd = (judged[judged["metric"] == name] for name in ("adversarial_accuracy", "pgd_accuracy"))
    methods, rounds = list(dict.fromkeys(fgsm["method"])), sorted(set(fgsm["round"]))
    figure, axes = grid(len(methods), 4, 2.4, 0.4, sharex=True, sharey=True)
    for axis, method in zip(axes, methods, strict=True):
        by_fgsm, by_pgd = (dict(list(p[p["method"] == method].groupby("round"))) for p in (fgsm, pgd))
        for shade, n in zip(shades(len(rounds)), by_fgsm, strict=False):
            sparsity = f"{100 * masks.sparsity_of(n):.3g} %"
            axis.plot(by_fgsm[n]["severity"], 100 * by_fgsm[n]["mean"], "o-", ms=3, color=shade, label=sparsity)
            axis.plot(by_pgd[n]["severity"], 100 * by_pgd[n]["mean"], "x", ms=5, color=shade)
        first = min(by_fgsm)
        axis.plot(by_pgd[first]["severity"], 100 * by_pgd[first]["dense"], "kx", ms=5, label="dense, PGD-20")
        axis.plot(by_fgsm[first]["severity"], 100 * by_fgsm[first]["dense"], color="black", ls="--", label="dense")
        axis.set_title(METHODS[method].title)
        axis.set_xlabel("ε [1/255]")
    axes[0].set_ylabel(label("adversarial_accuracy"))
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=7, frameon=False)
    return figure


def roc_curves(curves: Mapping[str, Mapping[str, np.ndarray]], colours: Mapping[str, object]) -> Figure:
    """Draw ROC curves of out-of-distribution detection, a panel a foreign set.

    ``curves``: set -> title -> true positive rates on an even grid of false positive rates; dense under "dense", which
    has no colour of its own.
    """
    figure, axes = plt.subplots(1, len(curves), figsize=(WIDTH, 3.8), squeeze=False, sharey=True, layout="constrained")
    for axis, (name, lines) in zip(axes[0], curves.items(), strict=True):
        axis.plot([0, 100], [0, 100], color="grey", lw=0.8)
        for title, curve in lines.items():
            style = {"color": "black", "ls": "--"} if title == "dense" else {"color": colours[title]}
            axis.plot(np.linspace(0, 100, len(curve)), 100 * curve, lw=1.3, label=title, **style)
        axis.set(title=f"against {name}", xlabel="known flagged as foreign [%]", aspect="equal")
    axes[0, 0].set_ylabel("foreign flagged as foreign [%]")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=8, frameon=False)
    return figure


def gallery(pictures: np.ndarray, names: Sequence[str]) -> Figure:
    """Draw an image, clean in the first row and under each corruption: (1 + corruptions, severities, h, w, C)."""
    titles = ["clean", *(CORRUPTIONS[name].title for name in names)]
    figure, axes = grid(len(titles), 10, 2.75, 0)
    for axis, title, row in zip(axes, titles, pictures, strict=False):
        axis.axis("off")
        if title == "clean":
            row = np.concatenate([row[:1], np.full_like(row[1:], 255)])
        axis.imshow(np.concatenate(row).squeeze(), cmap="gray", vmin=0, vmax=255)
        axis.set_title(title.replace(" ", "\n"), fontsize=8)
        axis.set_anchor("N")
    return figure
