"""Figures of interpretability: curves over their floors, units, formulas, explanations.

``networks`` are the arrays of some tickets by title, dense first.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from lthlib import figures
from lthlib.figures import WIDTH, factor
from lthlib.metrics import METRICS
from lthlib.pruning import METHODS
from lthlib.pruning.masks import sparsity_of
from lthlib.results.collect import Results

EXPLANATIONS = ("fidelity", "fidelity_r2", "stability", "stability_relative")
UNITS = ("unique_detectors", "interpretable_units", "units_above_floor", "mean_best_iou", "composition_iou")
_RANDOM = {"color": "black", "ls": "-.", "lw": 1.0}
_MOVED = {"facecolor": "none", "edgecolor": "grey", "hatch": "////"}

Arrays = Mapping[str, np.ndarray]


def curves(judged: pd.DataFrame, rows: pd.DataFrame, metrics: Sequence[str]) -> Figure:
    """Draw metrics against sparsity over their floors: random weights, and what the mask seed alone moves.

    Of what `lthlib.results.verdict.judge` returns, and the rows behind it; metrics that nothing defined are left out.
    """
    metrics = [metric for metric in metrics if (judged["metric"] == metric).any()]
    also: list[Artist] = [Line2D([], [], **_RANDOM, label="random weights")]
    if any(f"{metric}_seed_floor" in METRICS for metric in metrics):
        also.append(Patch(**_MOVED, label="mask seed alone"))
    figure = figures.curves(judged, [(metric, "none") for metric in metrics], also=also)
    dense = rows[rows["method"] == "dense"].groupby("metric")["value"].mean()
    for axis, metric in zip(figure.axes, metrics, strict=True):
        scale = factor(metric)
        if f"{metric}_random" in dense:
            axis.axhline(scale * dense[f"{metric}_random"], **_RANDOM, zorder=2)
        if f"{metric}_seed_floor" in dense:
            low, high = (scale * dense[metric] * (1 + sign * dense[f"{metric}_seed_floor"]) for sign in (-1, 1))
            axis.axhspan(low, high, **_MOVED, alpha=0.4, lw=0)
    return figure


def floors(results: Results) -> pd.DataFrame:
    """Say on what the dense networks' numbers stand: a line a metric.

    Columns: on what it was measured; the mean over seeds; half the 95 % interval that the sample of images leaves (1.96
    standard errors, first seed); how far the mask seed alone moves it; the same with random weights.
    """
    rows = results.rows[results.rows["method"] == "dense"]
    first = results.arrays[rows["ticket"].iloc[0]]
    errors = pd.Series(first["errors"], first["error_names"])
    dense, n = rows.groupby("metric")["value"].mean(), rows.groupby("metric")["n"].first()
    metrics = [metric for metric in (*EXPLANATIONS, *UNITS) if metric in dense]
    numbers = {
        "dense": dense.reindex(metrics),
        "± 95 % (images)": 1.96 * errors.reindex(metrics),
        "± mask seed": dense.reindex(metrics) * dense.reindex([f"{m}_seed_floor" for m in metrics]).to_numpy(),
        "random weights": dense.reindex([f"{m}_random" for m in metrics]).set_axis(metrics),
    }
    table = pd.DataFrame(numbers).mul(pd.Series({m: factor(m) for m in metrics}), axis=0)
    table = table.map(lambda value: "–" if np.isnan(value) else f"{value:.3g}")
    units = f"of {first['concepts']}, {first['layer']}"
    table.insert(0, "measured on", [f"{n[m]} {'test images' if m in EXPLANATIONS else units}" for m in metrics])
    return table.set_axis([figures.label(m) for m in metrics])


def detectors_by_category(results: Results) -> Figure:
    """Draw unique detectors by category against sparsity, one panel a method, and those of random weights."""
    table = _by_category(results)
    methods = [m for m in dict.fromkeys(table["method"]) if m not in ("dense", "random")]
    figure, axes = figures.grid(len(methods), 4, 2.3, 0.9, sharex=True, sharey=True)
    categories = list(dict.fromkeys(table["category"]))
    colours = dict(zip(categories, sns.color_palette("deep", len(categories)), strict=True))
    rounds = sorted(set(table["round"]))
    for axis, method in zip(axes, methods, strict=True):
        for category, colour in colours.items():
            part = table[table["category"] == category]
            mine = part[part["method"].isin(["dense", method])].groupby("round")["detectors"].mean()
            axis.plot(mine.index, mine, "o-", ms=4, color=colour, label=category)
            floor = part[part["method"] == "random"]["detectors"].mean()
            axis.axhline(floor, color=colour, ls="-.", lw=1.0)
        figures.sparsity_axis(axis, rounds)
        axis.tick_params(axis="x", labelsize="small")
        axis.set_title(METHODS[method].title)
    means = table.groupby(["method", "round", "category"])["detectors"].mean()
    axes[0].set_ylim(-0.15, max(1, means.max()) + 0.15)
    axes[0].set_ylabel("unique detectors")
    handles, names = axes[0].get_legend_handles_labels()
    handles.append(Line2D([], [], **_RANDOM, label="random weights"))
    figure.legend(handles, [*names, "random weights"], loc="outside lower center", ncols=6, frameon=False)
    return figure


def _by_category(results: Results) -> pd.DataFrame:
    lines = []
    for ticket in results.tickets.itertuples():
        found = results.arrays[ticket.ticket]
        names = {ticket.method: "detectors"} | ({"random": "random_detectors"} if ticket.method == "dense" else {})
        for method, name in names.items():
            pairs = zip(found["categories"], found[name], strict=True)
            lines += [(method, ticket.round, *pair) for pair in pairs]
    return pd.DataFrame(lines, columns=["method", "round", "category", "detectors"])


def formula_length(results: Results) -> Figure:
    """Draw the best IoU against the length of the formula, mean over units and seeds: one method by sparsity, or all.

    A comparison shows every method at the highest sparsity.
    """
    tickets, last = results.tickets, results.tickets["round"].max()
    methods = [m for m in dict.fromkeys(tickets["method"]) if m != "dense"]
    rounds = sorted(set(tickets["round"]) - {0})
    shown = {"dense": (tickets["method"] == "dense", "by_length", {"color": "black", "ls": "--"})}
    if len(methods) == 1:
        for n, colour in zip(rounds, figures.shades(len(rounds)), strict=True):
            shown[f"{100 * sparsity_of(n):.3g} %"] = tickets["round"] == n, "by_length", {"color": colour}
    else:
        for m in methods:
            chosen = (tickets["method"] == m) & (tickets["round"] == last)
            shown[METHODS[m].title] = chosen, "by_length", {"color": figures.colours()[m]}
    shown["random weights"] = tickets["method"] == "dense", "random_by_length", {"marker": None, **_RANDOM}
    figure, axis = plt.subplots(figsize=(0.62 * WIDTH, 3.4), layout="constrained")
    for title, (chosen, name, style) in shown.items():
        values = np.mean([results.arrays[t][name] for t in tickets.loc[chosen, "ticket"]], axis=0)
        axis.plot(np.arange(1, len(values) + 1), values, **{"marker": "o", "ms": 4, "label": title, **style})
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set_xlabel("concepts in the formula, at most")
    axis.set_ylabel("best IoU ↑, mean over units")
    if len(methods) > 1:
        axis.set_title(f"at {100 * sparsity_of(last):.3g} % sparsity")
    axis.legend(loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False)
    return figure


def units(networks: Mapping[str, Arrays]) -> Figure:
    """Draw the best units of some networks: the images each likes most, its region outlined, label, formula, IoU."""
    rows, count = len(networks), max(len(arrays["unit_number"]) for arrays in networks.values())
    figure, axes = plt.subplots(rows, count, figsize=(WIDTH, 1.6 * rows), squeeze=False, layout="constrained")
    for line, (title, arrays) in zip(axes, networks.items(), strict=True):
        for k, axis in enumerate(line):
            axis.axis("off")
            if k < len(arrays["unit_number"]):
                _unit(axis, arrays, k)
        # An axis without frame still shows its text.
        title = textwrap.fill(title, 16)
        line[0].text(-0.06, 0.5, title, rotation=90, ha="right", va="center", transform=line[0].transAxes)
    return figure


def _unit(axis: Axes, arrays: Arrays, k: int) -> None:
    axis.imshow(_strip(arrays["unit_images"][k], 255), cmap="gray", vmin=0, vmax=255)
    outline = _strip(arrays["unit_regions"][k].astype(np.uint8), 0)
    if outline.any():
        axis.contour(outline, [0.5], colors="#ff9900", linewidths=1.4)
    label, formula = arrays["unit_label"][k], arrays["unit_formula"][k]
    named = f"{label} ({arrays['unit_category'][k]})" if label else "no concept"
    lines = textwrap.wrap(f"unit {arrays['unit_number'][k]}: {named}", 34)
    lines.append(f"IoU {arrays['unit_iou'][k]:.3f}, shuffled {arrays['unit_floor'][k]:.3f}")
    if formula:
        lines += textwrap.wrap(f"{formula}: {arrays['unit_formula_iou'][k]:.3f}", 34)
    axis.set_title("\n".join(lines), fontsize="xx-small", loc="left")


def _strip(pictures: np.ndarray, fill: int) -> np.ndarray:
    """Set pictures (n, H, W) or (n, H, W, C) side by side, a gap between them."""
    gap = np.full((*pictures.shape[1:2], 2, *pictures.shape[3:]), fill, pictures.dtype)
    parts = [part for picture in pictures for part in (picture, gap)][:-1]
    strip = np.concatenate(parts, axis=1)
    return strip[..., 0] if strip.ndim == 3 and strip.shape[2] == 1 else strip


def explanations(networks: Mapping[str, Arrays]) -> Figure:
    """Draw explanations of the same test images by some networks: red speaks for the predicted class, blue against.

    Full tint is the largest coefficient that any of these networks has on the image.
    """
    pictures = next(iter(networks.values()))["explained_images"]
    rows, bare = len(networks) + 1, {"xticks": [], "yticks": []}
    style = {"figsize": (WIDTH, 1.75 * rows), "squeeze": False, "layout": "constrained", "subplot_kw": bare}
    figure, axes = plt.subplots(rows, len(pictures), **style)
    for axis, picture in zip(axes[0], pictures, strict=True):
        axis.imshow(picture.squeeze(), cmap="gray", vmin=0, vmax=255)
    axes[0, 0].set_ylabel("image")
    scale = np.max([np.abs(arrays["explained_maps"]).max((1, 2)) for arrays in networks.values()], axis=0)
    for line, (title, arrays) in zip(axes[1:], networks.items(), strict=True):
        line[0].set_ylabel(textwrap.fill(title, 16))
        for i, axis in enumerate(line):
            axis.imshow(explanation_map(pictures[i], arrays["explained_maps"][i].astype(float), scale[i]))
            label, probability = arrays["explained_label"][i], arrays["explained_probability"][i]
            axis.set_title(f"class {label}, {100 * probability:.0f} %", fontsize="small")
    return figure


def explanation_map(image: np.ndarray, coef: np.ndarray, scale: float) -> np.ndarray:
    """Return a uint8 image in gray, RGB in [0, 1], tinted red where a superpixel speaks for the class, else blue.

    ``coef`` is each pixel's coefficient, (H, W); that of size ``scale`` gets the full tint.
    """
    strength = np.clip(coef / scale if scale > 0 else 0 * coef, -1, 1)[..., None]
    gray = image.reshape(*image.shape[:2], -1).mean(axis=2, keepdims=True) / 255
    tint = np.where(strength > 0, [0.84, 0.10, 0.11], [0.17, 0.32, 0.75])
    opacity = 0.75 * np.abs(strength)
    return (1 - opacity) * gray + opacity * tint


def gallery(arrays: Arrays) -> Figure:
    """Draw some images of the concept set and, category by category, which concept each pixel has."""
    pictures, planes = arrays["gallery_images"], arrays["gallery_planes"]
    categories = arrays["categories"]
    rows = 1 + len(categories)
    figure, axes = plt.subplots(rows, figsize=(WIDTH, 1.15 * rows), layout="constrained")
    for axis, title in zip(axes, ["image", *categories], strict=True):
        axis.set(xticks=[], yticks=[], ylabel=str(title))
        axis.spines[:].set_visible(False)
    axes[0].imshow(_strip(pictures, 255), cmap="gray", vmin=0, vmax=255)
    for c, axis in enumerate(axes[1:]):
        _label_row(axis, planes[:, c], arrays["gallery_labels"])
    return figure


def _label_row(axis: Axes, planes: np.ndarray, labels: np.ndarray) -> None:
    """Draw one category's labels of some images, a colour a label, and name them beside."""
    shown = [n for n in np.unique(planes) if n > 0]
    palette = np.array([(0.93, 0.93, 0.93), *sns.color_palette("husl", len(shown)), (1.0, 1.0, 1.0)])
    ranks = np.where(planes > 0, 1 + np.searchsorted(shown, planes), 0)  # 0 where nothing is labelled
    axis.imshow(palette[_strip(ranks, -1)])
    handles = [Patch(color=palette[1 + i], label=str(labels[n - 1])) for i, n in enumerate(shown[:12])]
    style = {"fontsize": "xx-small", "handlelength": 1, "labelspacing": 0.2, "columnspacing": 0.8, "frameon": False}
    axis.legend(handles=handles, loc="center left", bbox_to_anchor=(1.01, 0.5), ncols=1 + (len(shown) > 7), **style)
