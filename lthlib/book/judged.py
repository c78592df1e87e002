"""What a page says of its verdict: tables and sentences, from the outcomes of `lthlib.results.verdict`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd
from IPython.display import HTML, Markdown

from lthlib import figures
from lthlib.book import pages
from lthlib.metrics import METRICS
from lthlib.pruning import METHODS
from lthlib.pruning.masks import sparsity_of
from lthlib.results import verdict


def verdict_table(page: pages.Page) -> HTML:
    """Show how far each method keeps each metric of the paper, in percent, without a break, and what ends it."""
    reached, ends = verdict.reach(page.judged), verdict.ends(page.judged)
    table = reached.map(lambda v: "–" if np.isnan(v) else f"{100 * v:.1f}") + " " + ends.map(figures.MARKS.__getitem__)
    table.index = [METHODS[name].title for name in table.index]
    table.columns = [f"{METRICS[name].title} {METRICS[name].arrow}" for name in table.columns]
    return pages.html_table(table)


def decidable_table(page: pages.Page) -> HTML:
    """Show of each metric of the paper what is tolerated, how far it is known, and what deciding it would take.

    The numbers are medians over the tickets that have not collapsed. A metric with a small chance cannot be decided on
    this page: the interval of a network that equals its parent in truth would reach across the tolerance.
    """
    judged = page.judged[page.judged["outcome"].isin([verdict.KEPT, verdict.LOST, verdict.NOT_SHOWN])]
    if judged.empty:
        return HTML("<p>Every ticket has collapsed to chance: there is nothing to decide.</p>")
    lines = []
    for metric, shift in figures.voting(judged):
        of = judged[(judged["metric"] == metric) & (judged["shift"] == shift)]
        scale, middle = figures.factor(metric), of.median(numeric_only=True)
        count = of["outcome"].value_counts()
        lines.append(
            {
                "metric": _label(metric, shift),
                "kept": count.get(verdict.KEPT, 0),
                "lost": count.get(verdict.LOST, 0),
                "not shown": count.get(verdict.NOT_SHOWN, 0),
                "tolerated": f"{scale * middle['allowed']:.3g}",
                "± trainings": _known(scale * middle["seeds_error"]),
                "± images": _known(scale * middle["images_error"]),
                "chance to be shown": "–" if np.isnan(middle["power"]) else f"{100 * middle['power']:.0f} %",
                "images needed": _needed(of, "images"),
                "seeds needed": _needed(of, "seeds"),
            }
        )
    return pages.html_table(pd.DataFrame(lines).set_index("metric"))


def _known(error: float) -> str:
    return "not known" if np.isnan(error) else f"{error:.2g}"


def _needed(lines: pd.DataFrame, name: str) -> str:
    """Say how many images or seeds an equal network needs to be shown with a chance of 80 %, and how many there are."""
    now, needed = lines[name].median(), lines[f"{name}_for_power"].median()
    if np.isnan(now) or np.isnan(needed):
        return "–"
    enough = needed < verdict.MOST_TIMES * now
    return (f"{needed:,.0f}" if enough else "these alone cannot") + f" ({now:,.0f} now)"


def open_table(page: pages.Page) -> HTML:
    """Show every outcome that is not shown: shortfall with its bounds, what is tolerated, and what would decide it."""
    voting = page.judged["metric"].map(lambda name: METRICS[name].in_verdict)
    lines = page.judged[voting & (page.judged["outcome"] == verdict.NOT_SHOWN)]
    if lines.empty:
        return HTML("<p>Nothing is left open.</p>")
    cells = []
    for line in lines.to_dict("records"):
        scale, shift = figures.factor(line["metric"]), "" if line["shift"] == "none" else f" ({line['shift']})"
        shortfall, low, high = (scale * line[name] for name in ("shortfall", "least", "most"))
        cells.append(
            {
                "method": METHODS[line["method"]].title,
                "sparsity [%]": f"{100 * line['sparsity']:.1f}",
                "metric": METRICS[line["metric"]].title + shift,
                "worse by": f"{shortfall:.3g} [{low:.3g}, {high:.3g}]",
                "tolerated": f"{scale * line['allowed']:.3g}",
                "would be decided by": verdict.what_would_decide(line),
                "the older rule": line["older"],
            }
        )
    return pages.html_table(pd.DataFrame(cells).set_index("method"))


def value_table(page: pages.Page, metrics: Sequence[str] | None = None) -> HTML:
    """Show mean and interval of each metric by sparsity, ✓ kept, ↘ lost, ? not shown, ✗ collapsed; dense first.

    All metrics that are a contest and not measured under too many shifts, or those that are named.
    """
    judged = page.judged if metrics is not None else page.judged[page.judged["outcome"] != ""]
    judged = judged[judged["metric"].isin(figures.readable(judged) if metrics is None else metrics)]
    columns: dict[str, dict[tuple[str, str], str]] = {}
    for (metric, shift, severity), group in judged.groupby(["metric", "shift", "severity"], sort=False):
        cells = {("dense", "0"): _interval(group.iloc[0], metric, "dense", "dense_low", "dense_high")}
        for _, line in group.iterrows():
            key = METHODS[line["method"]].title, f"{100 * sparsity_of(line['round']):.1f}"
            cells[key] = f"{_interval(line, metric, 'mean', 'low', 'high')} {figures.MARKS[line['outcome']]}"
        columns[_label(metric, shift) + (f" {severity:g}" if severity else "")] = cells
    table = pd.DataFrame(columns)
    table.index = table.index.set_names(["method", "sparsity [%]"])
    return pages.html_table(table)


def _label(metric: str, shift: str) -> str:
    return figures.label(metric) + ("" if shift == "none" else f" {shift}")


def _interval(line: pd.Series, metric: str, *names: str) -> str:
    mean, low, high = (figures.factor(metric) * line[name] for name in names)
    digits = 4 if abs(mean) >= 100 else 3
    spread = f" [{low:.{digits}g}, {high:.{digits}g}]" if line["seeds"] > 1 else ""
    return f"{mean:.{digits}g}{spread}"


def reading(page: pages.Page) -> Markdown:
    """Say in sentences what the rows show: how far each method keeps every metric, what it loses, what stays open."""
    passes, sentences = verdict.lth_pass(page.judged), []
    for method, group in passes.groupby("method", sort=False):
        group = group.sort_values("round")
        kept = group[group["passed"].cumprod().astype(bool)]
        lost = group[group["outcome"].isin([verdict.LOST, verdict.COLLAPSED])]
        parts = [
            f"keeps every metric up to {_percent(kept)}" if len(kept) else "is not shown to keep everything anywhere"
        ]
        if len(lost):
            parts.append(f"loses in {_titles(lost['lost'].iloc[0])} at {_percent(lost.head(1))}")
        else:
            parts.append("loses nothing for certain")
        between = group[~group["passed"] & ~group.index.isin(lost.index)]
        if len(between):
            open_ = dict.fromkeys(name for names in between["open"] for name in names)
            parts.append(f"in between it is not shown whether it keeps {_titles(open_)}")
        sentences.append(f"- **{METHODS[method].title}** {'; '.join(parts)}.")
    limit, dimension = page.thresholds, page.results.dimension
    what = ("" if dimension == "generalization" else "accuracy and ") + f"the paper's metrics of {dimension}"
    points = f"{100 * limit.tolerance:g} percentage point{'s' * (limit.tolerance != 0.01)}"
    of_sce = f"; of SCE, a mean over classes, {200 * limit.tolerance / pages.n_classes(page.results):g}"
    intro = (
        f"Of {what}, at tolerances of {points} (fractions{of_sce * (dimension == 'calibration')}) or "
        f"{100 * limit.relative_tolerance:g} % (other units), each wrong with a probability of {limit.alpha:g} at most:"
    )
    return Markdown(intro + "\n\n" + "\n".join(sentences))


def _titles(names: Iterable[str]) -> str:
    return ", ".join(METRICS[name].title for name in names)


def _percent(lines: pd.DataFrame) -> str:
    return f"{100 * lines['sparsity'].iloc[-1]:.1f} %"
