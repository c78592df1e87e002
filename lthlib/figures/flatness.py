"""Figures and tables of flatness; each takes the arrays of some tickets by title, "dense" among them.

They are those that `lthlib.metrics.flatness.measure.measure` returns.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from scipy.stats import bootstrap, kendalltau

from lthlib.figures import WIDTH, colours, label
from lthlib.metrics import METRICS
from lthlib.pruning import METHODS
from lthlib.pruning.masks import sparsity_of

Arrays = Mapping[str, np.ndarray]
PANELS = (
    "weight_hessian_trace",
    "input_hessian_trace",
    "weight_hessian_trace_per_weight",
    "relative_flatness",
    "weight_hessian_top",
    "input_hessian_top",
    "pac_bayes_weight_sigma",
    "pac_bayes_input_sigma",
    "error_barrier",
)
RAW = "weight_hessian_trace"
RANKED = (
    "weight_hessian_trace_per_weight",
    "relative_flatness",
    "weight_hessian_top",
    "pac_bayes_weight_sigma",
    "input_hessian_trace",
)


def panels(judged: pd.DataFrame) -> list[tuple[str, str]]:
    """Return the panels for `lthlib.figures.curves`; a network of other widths has no barrier to the dense one."""
    measured = set(judged["metric"])
    return [(name, "none") for name in PANELS if name in measured]


def arranged(figure: Figure, ratio: float = 30.0) -> Figure:
    """Shorten the labels of `lthlib.figures.curves`, and make axes logarithmic where values spread over a ratio."""
    for axis in figure.axes:
        title = " ".join(axis.get_title().split())  # it may be wrapped
        axis.set_ylabel(axis.get_ylabel().removeprefix(title).strip())
        values = np.concatenate([np.asarray(line.get_ydata(), dtype=float) for line in axis.lines])
        if values.min() > 0 and values.max() > ratio * values.min():
            axis.set_yscale("log")
    return figure


def _drawn(tickets: Mapping[str, Arrays]) -> Iterator[tuple[str, dict, Arrays]]:
    """Yield title, line style and arrays: dense black and dashed, a method in its colour, darker when sparser."""
    colour = {METHODS[name].title: shade for name, shade in colours().items()}
    shared = {method: [t for t in tickets if t.partition(",")[0] == method] for method in colour}
    for title, arrays in tickets.items():
        method = title.partition(",")[0]
        if method not in colour:
            yield title, {"color": "black", "ls": "--"}, arrays
            continue
        shades = sns.light_palette(colour[method], len(shared[method]) + 2)[2:]
        yield title, {"color": shades[shared[method].index(title)], "ls": "-"}, arrays


def input_traces(tickets: Mapping[str, Arrays]) -> Figure:
    """Draw the distribution of the input-Hessian trace over images: quartiles, 5 to 95 %, mean and its interval."""
    figure, axis = plt.subplots(figsize=(WIDTH, 0.36 * len(tickets) + 1.1), layout="constrained")
    for place, (_, style, arrays) in enumerate(_drawn(tickets)):
        values = np.maximum(arrays["input_traces"].astype(float), 1e-12)
        shape = {"orientation": "horizontal", "widths": 0.6, "whis": (5, 95), "showfliers": False}
        box = axis.boxplot([values], positions=[-place], manage_ticks=False, **shape)
        for part in (part for parts in box.values() for part in parts):
            part.set_color(style["color"])
        axis.plot(image_interval(values), [-place] * 2, color=style["color"], lw=4, alpha=0.35)
        axis.plot(values.mean(), -place, "D", color=style["color"], ms=5)
    axis.set_xscale("log")
    axis.set_yticks([-place for place in range(len(tickets))], list(tickets))
    axis.set_xlabel(f"{label('input_hessian_trace')} of an image")
    return figure


def layers(tickets: Mapping[str, Arrays]) -> Figure:
    """Draw the trace layer by layer: per active weight, and scale-invariant."""
    figure, axes = plt.subplots(2, 1, figsize=(WIDTH, 5.6), sharex=True, layout="constrained")
    for title, style, arrays in _drawn(tickets):
        where = np.arange(len(arrays["layers"]))
        per_weight = arrays["layer_trace"] / np.maximum(arrays["layer_active"], 1)
        for axis, values in zip(axes, (per_weight, arrays["layer_relative"]), strict=True):
            axis.plot(where, np.where(values > 0, values, np.nan), "o", ms=3, lw=1.3, label=title, **style)
            axis.set_yscale("log")
    names = next(iter(tickets.values()))["layers"]
    every = -(-len(names) // 40)
    axes[1].set_xticks(range(0, len(names), every), names[::every], rotation=60, ha="right")
    for axis, name in zip(axes, ("weight_hessian_trace_per_weight", "relative_flatness"), strict=True):
        axis.set(title=METRICS[name].title, ylabel="[nats] ↓")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)
    return figure


def lines(tickets: Mapping[str, Arrays], start: str) -> Figure:
    """Draw loss and error on the line from ``start``, "dense" or "partner" (t = 0), to each ticket (t = 1)."""
    figure, axes = plt.subplots(1, 2, figsize=(WIDTH, 3.4), layout="constrained")
    for title, style, arrays in _drawn(tickets):
        for axis, part, scale in zip(axes, ("loss", "error"), (1, 100), strict=True):
            axis.plot(arrays[f"{start}_t"], scale * arrays[f"{start}_{part}"], label=title, **style)
    for axis, text in zip(axes, ("loss [nats]", "error [%]"), strict=True):
        way = f"from the {'dense network' if start == 'dense' else 'other seed'} to the ticket"
        axis.set(xlabel=way, ylabel=text)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return figure


def densities(tickets: Mapping[str, Arrays]) -> Figure:
    """Draw the spectrum of the weight Hessian: how many eigenvalues there are, per unit of their size."""
    figure, axis = plt.subplots(figsize=(WIDTH, 3.4), layout="constrained")
    for title, style, arrays in _drawn(tickets):
        count = arrays["density"] * arrays["layer_active"].sum()
        axis.plot(arrays["density_at"], count, label=title, lw=1.3, **style)
    axis.set(xlabel="eigenvalue of the weight Hessian [nats]", ylabel="eigenvalues per nat", yscale="log")
    axis.set_ylim(1e-3, 2 * max(line.get_ydata().max() for line in axis.lines))
    axis.legend(frameon=False)
    return figure


def surfaces(tickets: Mapping[str, Arrays], most: int = 4) -> Figure:
    """Draw the loss on a plane of weights (above) and on a plane of pixels (below), at most so many columns."""
    shown = dict(list(tickets.items())[:most])
    figure, axes = plt.subplots(
        2, len(shown), figsize=(WIDTH, 6.0), squeeze=False, sharex="row", sharey="row", layout="constrained"
    )
    for row, kind in zip(axes, ("surface", "slice"), strict=True):
        unit = 255 if kind == "slice" else 1
        losses = [np.clip(arrays[f"{kind}_loss"], 1e-4, 1e3) for arrays in shown.values()]
        levels = np.geomspace(min(map(np.min, losses)), max(map(np.max, losses)), 15)
        for axis, (title, arrays), loss in zip(row, shown.items(), losses, strict=True):
            surface, norm = (
                (unit * arrays[f"{kind}_b"], unit * arrays[f"{kind}_a"], loss, levels),
                LogNorm(*levels[[0, -1]]),
            )
            axis.contour(*surface, colors="white", linewidths=0.4, norm=norm)
            drawn = axis.contourf(*surface, cmap="viridis", norm=norm, extend="both")
            axis.grid(visible=False)
            axis.set_title(title if kind == "surface" else "", fontsize="medium")
            axis.locator_params(axis="x", nbins=3)
            axis.set_xlabel("second direction" if kind == "surface" else "random sign [1/255]")
        bar = figure.colorbar(drawn, ax=list(row), label="loss [nats]", format="%.3g")
        bar.minorticks_off()
    axes[0, 0].set_ylabel("first direction")
    axes[1, 0].set_ylabel("sign of the gradient [1/255]")
    return figure


# ----------------------------------------------------------------------------------------------------- tables


def batch_table(tickets: Mapping[str, Arrays], batch: int = 50) -> pd.DataFrame:
    """Say what another choice of images would change in the exact weight-Hessian trace.

    All tickets see the same images, so a difference to dense, which comes first, is more certain than either trace.
    Where there is ``wide_per_image``, its mean is shown, and it is cut into batches.
    """
    dense = next(iter(tickets.values()))["weight_per_image"].astype(float)
    rows = {}
    for title, arrays in tickets.items():
        mine = arrays["weight_per_image"].astype(float)
        wide = arrays.get("wide_per_image", np.empty(0)).astype(float)
        batches = wide[: len(wide) // batch * batch].reshape(-1, batch)
        rows[title] = {
            f"trace on {len(mine)} images": f"{mine.mean():.4g}",
            "95 % over images": _range(image_interval(mine)),
            "minus dense, same images": "" if mine is dense or title == "dense" else f"{(mine - dense).mean():.4g}",
            "95 % of that": "" if title == "dense" else _range(image_interval(mine - dense)),
            "on more images": f"{wide.mean():.4g} ({len(wide)})" if len(wide) else "",
            f"batches of {batch}": ", ".join(f"{mean:.4g}" for mean in batches.mean(1)),
        }
    return pd.DataFrame.from_dict(rows, orient="index")


def rescaled_table(tickets: Mapping[str, Arrays]) -> pd.DataFrame:
    """Show what multiplying one convolution, undone by the norm behind it, does to the trace."""
    rows = []
    for title, arrays in tickets.items():
        traces = [arrays[name].astype(float).mean() for name in ("weight_per_image", "weight_relative_per_image")]
        columns = (arrays[f"rescaled_{name}"] for name in ("factor", "change", "trace", "relative"))
        for factor, change, *both in [(1.0, 0.0, *traces), *zip(*columns, strict=True)]:
            numbers = f"{factor:g}", f"{change:.1e}", *(f"{trace:.4g}" for trace in both)
            rows.append((title, str(arrays["rescaled_layer"]), *numbers))
    names = ["ticket", "layer", "times", "change of a logit", label("weight_hessian_trace"), label("relative_flatness")]
    return pd.DataFrame(rows, columns=names).set_index("ticket")


def method_table(tickets: Mapping[str, Arrays]) -> pd.DataFrame:
    """Say how each number was found, and how far it may be off for other reasons than the choice of images."""
    rows = {}
    for title, arrays in tickets.items():
        error = float(arrays["weight_standard_error"][0])
        rows[title] = {
            "weight trace": str(arrays["weight_method"]) + (f" ± {error:.2g}" if error else ""),
            "input trace": str(arrays["input_method"]),
            "top eigenvalue off by": f"≤ {float(arrays['top_bound'][0]):.2g}",
            "eigenvalue farthest from 0": f"{float(arrays['top_magnitude'][0]):.4g}",
            "weight noise borne, 95 %": _range(arrays["weight_sigma"]),
            "input noise borne, 95 %": _range(arrays["input_sigma"]),
        }
    return pd.DataFrame.from_dict(rows, orient="index")


def ranking_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Ask whether tickets that are flat by the raw weight trace are flat by other measures: Kendall's tau.

    "Flatter" is lower or higher as each metric has it. Methods are ranked at each round (means over seeds); with fewer
    than three methods, rounds of each method instead. "–": no order.
    """
    sparse = rows[(rows["method"] != "dense") & (rows["shift"] == "none")]
    table = sparse.pivot_table(index=["method", "round"], columns="metric", values="value")
    by_round = table.index.get_level_values("method").nunique() >= 3
    found = {}
    for key, group in table.groupby(level="round" if by_round else "method"):
        line = found[f"{100 * sparsity_of(key):.1f} %" if by_round else METHODS[key].title] = {}
        flatter = {name: group[name] * (1 if METRICS[name].higher_is_better else -1) for name in (RAW, *RANKED)}
        for name in RANKED:
            tau = kendalltau(flatter[RAW], flatter[name]).statistic if len(group) > 1 else np.nan
            line[METRICS[name].title] = "–" if np.isnan(tau) else f"{tau:.2f}"
    return pd.DataFrame.from_dict(found, orient="index").rename_axis("methods at" if by_round else "rounds of")


def image_interval(per_image: np.ndarray) -> tuple[float, float]:
    """Return a 95 % bootstrap interval (BCa) for the mean over two images or more, as if they were drawn again."""
    values = np.asarray(per_image, dtype=float)
    if np.ptp(values) == 0:
        return float(values[0]), float(values[0])
    return tuple(bootstrap((values,), np.mean, n_resamples=2000, rng=np.random.default_rng(0)).confidence_interval)


def _range(interval: tuple[float, float] | np.ndarray) -> str:
    low, high = interval
    return f"[{low:.3g}, {high:.3g}]"
