"""Rows and arrays -> figures, in the paper's conventions.

Dense is a black dashed line with the spread of its seeds; a method is solid where it keeps what dense has, dashed where
it has lost it, dash-dotted where neither is shown, dotted where it has collapsed; sparsity is in percent on the ladder
1 - 0.8^n; each metric carries ↑ or ↓.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import textwrap
from collections.abc import Iterable, Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from IPython import get_ipython
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from PIL import Image

from lthlib.metrics import METRICS
from lthlib.pruning import METHODS, masks
from lthlib.results.verdict import COLLAPSED, KEPT, LOST, NOT_SHOWN

STYLES = {KEPT: "-", LOST: "--", NOT_SHOWN: "-.", COLLAPSED: ":"}
FILLS = {KEPT: "full", LOST: "none", NOT_SHOWN: "bottom", COLLAPSED: "none"}  # of marks: half shown, half filled
MARKS = {KEPT: "✓", LOST: "↘", NOT_SHOWN: "?", COLLAPSED: "✗", "": ""}
WIDTH = 10.0  # inches; the book's column
MANY = 12  # cases of one metric that a table or a set of panels still shows legibly


def use_style() -> None:
    """Set the look of every figure of the book (call once a page)."""
    # One font: each text would look through a list of them.
    sns.set_theme(context="notebook", style="whitegrid", font="DejaVu Sans", font_scale=0.85)
    plt.rcParams.update({"figure.dpi": 110, "axes.spines.top": False, "axes.spines.right": False})
    plt.rcParams["axes.titley"] = 1.0  # or each drawing measures all labels, lest one be as high
    if get_ipython() is not None:
        get_ipython().display_formatter.formatters["image/png"].for_type(Figure, png)
        with contextlib.suppress(ValueError):  # it is not there
            plt.uninstall_repl_displayhook()  # it draws every open figure after each cell, for windows


def png(figure: Figure) -> bytes:
    """Return a figure of constrained layout, where nothing is cut off, as PNG: drawn once.

    Matplotlib's own way lays out and draws a figure first, to find its extent, and then again.
    """
    canvas, file = FigureCanvasAgg(figure), io.BytesIO()
    engine = figure.get_layout_engine()
    if engine is not None and any(axis.get_aspect() != "auto" for axis in figure.axes):
        engine.execute(figure)  # what has a fixed shape settles only at the second time
    canvas.draw()
    Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3]).save(file, "png", compress_level=4)
    return file.getvalue()


def colours() -> dict[str, tuple[float, float, float]]:
    """Return one colour a method, the same on every page."""
    names = sorted((name for name in METHODS if name != "dense"), key=lambda name: METHODS[name].family == "dense")
    palette = [*sns.color_palette("colorblind"), *sns.color_palette("husl", max(0, len(names) - 10))]
    return dict(zip(names, palette, strict=False))


def shades(n: int) -> list[tuple[float, float, float]]:
    """Return one colour a sparsity, darker the sparser, for figures with a line a sparsity."""
    return list(sns.color_palette("flare", n))


def label(metric: str) -> str:
    """Return the axis label of a metric: title, unit and direction."""
    entry = METRICS[metric]
    unit = "%" if entry.unit == "fraction" else entry.unit
    return f"{entry.title}{f' [{unit}]' if unit else ''} {entry.arrow}".strip()


def factor(metric: str) -> float:
    """Return what a value is multiplied by before it is drawn: fractions are shown in percent."""
    return 100.0 if METRICS[metric].unit == "fraction" else 1.0


def readable(judged: pd.DataFrame) -> list[str]:
    """Return the metrics measured under at most `MANY` shifts and severities; the others have figures of their own."""
    cases = judged.drop_duplicates(["metric", "shift", "severity"]).groupby("metric", sort=False).size()
    return [name for name, count in cases.items() if count <= MANY]


def voting(judged: pd.DataFrame, also: Sequence[str] = ()) -> list[tuple[str, str]]:
    """Return the pairs (metric, shift) of the metrics in the verdict, and of some others, as `curves` takes them."""
    pairs = judged.drop_duplicates(["metric", "shift"])[["metric", "shift"]].itertuples(index=False)
    return [(metric, shift) for metric, shift in pairs if METRICS[metric].in_verdict or metric in also]


def curves(
    judged: pd.DataFrame, panels: Sequence[tuple[str, str]], *, columns: int = 2, also: Sequence[Artist] = ()
) -> Figure:
    """Draw metric against sparsity, one panel a metric and shift, of what `lthlib.results.verdict.judge` returns.

    ``also`` comes at the end of the legend.
    """
    figure, axes = grid(len(panels), columns, 3.1, 0.6)
    for axis, (metric, shift) in zip(axes, panels, strict=True):
        part = judged[(judged["metric"] == metric) & (judged["shift"] == shift)]
        curve(axis, part, metric)
        only = judged.loc[judged["metric"] == metric, "shift"].nunique() == 1
        title = METRICS[metric].title + ("" if only else f": {shift}")
        axis.set_title(textwrap.fill(title, 99 // min(columns, len(panels))))  # a longer line would run off the figure
    legend(figure, judged["method"], also)
    return figure


def grid(n: int, columns: int, height: float, margin: float, **style: object) -> tuple[Figure, list[Axes]]:
    """Return a figure with n axes, at most so many side by side; each is ``height`` inches high."""
    columns = min(columns, n)
    rows = -(-n // columns)
    size = WIDTH, height * rows + margin
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained", **style)
    for axis in axes.flat[n:]:
        axis.remove()
    return figure, list(axes.flat[:n])


def curve(axis: Axes, part: pd.DataFrame, metric: str) -> None:
    """Draw one metric of one shift on an axis: a line a method, its interval over seeds, and the dense run's."""
    scale, colour = factor(metric), colours()
    first = part.iloc[0]
    axis.axhline(scale * first["dense"], color="black", ls="--", lw=1.5, zorder=3)
    axis.axhspan(scale * first["dense_low"], scale * first["dense_high"], color="black", alpha=0.1, lw=0)
    for method, line in part.groupby("method", sort=False):
        line = line.sort_values("round")
        x, y = line["round"].to_numpy(), scale * line["mean"].to_numpy()
        axis.fill_between(x, scale * line["low"], scale * line["high"], color=colour[method], alpha=0.15, lw=0)
        outcomes = line["outcome"].to_numpy()
        for outcome, run in itertools.groupby(range(1, len(x)), outcomes.__getitem__):
            run = list(run)  # a segment has the style of the point it leads to
            along = slice(run[0] - 1, run[-1] + 1)
            axis.plot(x[along], y[along], STYLES[outcome], color=colour[method], lw=1.6)
        for outcome, fill in FILLS.items():
            there = outcomes == outcome
            if there.any():
                style = {"color": colour[method], "ms": 5, "fillstyle": fill, "markerfacecoloralt": "white"}
                axis.plot(x[there], y[there], "o", **style)
    sparsity_axis(axis, sorted(set(part["round"])))
    axis.set_ylabel(label(metric))


def sparsity_axis(axis: Axes, rounds: Sequence[int]) -> None:
    """Label an axis whose positions are rounds with the sparsity in percent."""
    axis.set_xticks(rounds, [f"{100 * masks.sparsity_of(n):.3g}" for n in rounds])
    axis.set_xlabel("sparsity [%]")
    axis.grid(axis="x", visible=False)


def legend(figure: Figure, methods: Iterable[str], also: Sequence[Artist] = ()) -> None:
    """Put a legend below: dense, the methods, the outcomes, and what there is besides."""
    handles = [Line2D([], [], color="black", ls="--", label="dense")]
    for method in dict.fromkeys(methods):
        handles.append(Line2D([], [], color=colours()[method], marker="o", ms=4, label=METHODS[method].title))
    for outcome, fill in FILLS.items():
        style = {"ls": STYLES[outcome], "marker": "o", "ms": 5, "fillstyle": fill, "mfcalt": "white"}
        handles.append(Line2D([], [], color="grey", label=outcome, **style))
    handles += also
    in_a_row = len(handles) if len(handles) <= 7 else 6  # more would run off the figure
    figure.legend(handles=handles, loc="outside lower center", ncols=in_a_row, frameon=False)


def reach_map(table: pd.DataFrame, ends: pd.DataFrame) -> Figure:
    """Draw how far each method keeps each metric or dimension, and what ended it: a loss, or that no more is shown.

    Of what `lthlib.results.verdict.reach` and ``ends`` return. Cells that end in "not shown" are hatched.
    """
    figure, axis = plt.subplots(figsize=(WIDTH, 0.42 * len(table) + 1.6), layout="constrained")
    titles = [METRICS[c].title + " " + METRICS[c].arrow if c in METRICS else c.capitalize() for c in table]
    text = table.map(lambda v: "–" if np.isnan(v) else f"{100 * v:.1f}") + " " + ends.map(MARKS.__getitem__)
    methods, bar = [METHODS[m].title for m in table.index], {"label": "kept up to sparsity [%]"}
    heatmap(axis, 100 * table.fillna(0.0), text, titles, methods, bar, norm=Normalize(0, 100))
    for row, column in np.argwhere((ends == NOT_SHOWN).to_numpy()):
        axis.add_patch(Rectangle((column, row), 1, 1, fill=False, hatch="///", ec="white", lw=0, alpha=0.5))
    return figure


def heatmap(
    axis: Axes,
    table: pd.DataFrame,
    text: pd.DataFrame | None,
    columns: Sequence[str],
    rows: Sequence[str],
    bar: Mapping[str, object] | None,
    *,
    norm: Normalize,
    cmap: str = "crest",
    lines: float = 1,
    size: float | None = None,
    degrees: int = 25,
) -> ScalarMappable:
    """Draw a table as coloured cells with numbers, as seaborn does, which draws the whole figure once more for it.

    Cells that are NaN stay empty; ``text``, if any, is written into the others in a ``size``. ``columns`` are names
    below, slanted by ``degrees``, ``rows`` those on the left, ``bar`` options of the colour bar, None for no bar.
    ``lines`` is the width between cells.
    """
    values = np.ma.masked_invalid(table.to_numpy(float))
    shown = axis.pcolormesh(values, cmap=cmap, norm=norm, linewidths=lines, edgecolors="white")
    colours = shown.to_rgba(values)
    for (y, x), value in np.ndenumerate(np.empty((0, 0)) if text is None else text.to_numpy()):
        if not np.ma.getmaskarray(values)[y, x]:
            colour = ".15" if sns.utils.relative_luminance(colours[y, x]) > 0.408 else "w"
            axis.text(x + 0.5, y + 0.5, value, color=colour, ha="center", va="center", size=size, in_layout=False)
    if bar is not None:
        axis.figure.colorbar(shown, ax=axis, **bar).outline.set_linewidth(0)
    axis.set(xlim=(0, len(columns)), ylim=(len(rows), 0))
    slant = {"ha": "center"} if degrees in (0, 90) else {"ha": "right", "rotation_mode": "anchor"}
    axis.set_xticks(np.arange(len(columns)) + 0.5, columns, rotation=degrees, **slant)
    axis.set_yticks(np.arange(len(rows)) + 0.5, rows)
    axis.spines[:].set_visible(False)
    return shown


def power_curves(table: pd.DataFrame) -> Figure:
    """Draw how often a metric is called kept, against images, a line for each number of seeds.

    Of what ``benchmarks/verdict.py`` records. On the left networks equal to their parent, which are to be called so in
    80 % of tries; on the right such as lost twice the tolerance, in at most 5 %.
    """
    figure, axes = plt.subplots(1, 2, figsize=(WIDTH, 3.6), sharey=True, layout="constrained")
    titles = {0.0: ("equal to its parent", 80), 2.0: ("worse by twice the tolerance", 5)}
    for axis, (loss, (title, wanted)) in zip(axes, titles.items(), strict=True):
        part = table[table["loss"] == loss]
        for colour, (seeds, line) in zip(shades(part["seeds"].nunique()), part.groupby("seeds"), strict=True):
            name = f"{seeds} seed{'s' * (seeds > 1)}"
            axis.plot(line["images"], 100 * line["kept"], "o-", ms=4, color=colour, label=name)
        axis.axhline(wanted, color="black", ls=":", lw=1)
        axis.set(xscale="log", xlabel="images", title=f"A network {title}", ylim=(-3, 103))
    axes[0].set_ylabel("called kept [%]")
    axes[1].legend(frameon=False)
    return figure


def limit_bars(table: pd.DataFrame) -> Figure:
    """Draw what a training reaches beside its limits, a group of bars a processor.

    Args:
        table: Images a second, a line a processor: of one training (``images``), of several at once (``beside``), and
            what the rates of multiplying (``multiply``) and of memory (``memory``) allow.
    """
    figure, axis = plt.subplots(figsize=(WIDTH, 0.8 + 0.9 * len(table)), layout="constrained")
    said = {"images": "one training", "beside": "a training a thread"}
    said |= {"multiply": "multiplying allows", "memory": "memory allows"}
    table[list(said)].rename(columns=said).plot.barh(ax=axis, color=["black", "grey", *shades(2)], width=0.8)
    for bars in axis.containers:
        axis.bar_label(bars, fmt="{:,.0f}", padding=3, fontsize="small")
    axis.set(xlabel="images a second", ylabel="")
    axis.margins(x=0.1)
    axis.legend(frameon=False, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1))
    return figure


def radar(table: pd.DataFrame) -> Figure:
    """Draw the scorecard of `lthlib.results.verdict.scorecard`: an axis a metric, the best at the rim."""
    angles = np.linspace(0, 2 * np.pi, len(table.columns), endpoint=False)
    figure, axis = plt.subplots(figsize=(6.5, 5), subplot_kw={"projection": "polar"}, layout="constrained")
    colour = {"dense": "black", **colours()}
    for method, line in table.iterrows():
        closed = np.append(line.to_numpy(), line.iloc[0])
        style = "--" if method == "dense" else "-"
        axis.plot(np.append(angles, angles[0]), closed, style, color=colour[method], label=METHODS[method].title)
    axis.set_xticks(angles, [METRICS[name].title for name in table.columns])
    for angle, text in zip(angles, axis.get_xticklabels(), strict=True):
        text.set_horizontalalignment("left" if np.cos(angle) > 0.1 else "right" if np.cos(angle) < -0.1 else "center")
    axis.set_yticks([0, 0.5, 1], ["", "", ""])
    axis.set_ylim(0, 1.02)
    axis.legend(loc="center left", bbox_to_anchor=(1.4, 0.5), frameon=False)
    return figure
