"""What the notebooks share: from a page's parameters to results, tables and the sentences that read them.

A template's cells call these; anything that a function can hold is here, so that a page stays a page.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
from IPython.display import HTML, Markdown, display

from lthlib import data, figures, verdict
from lthlib.errors import choose
from lthlib.evaluate import Results, Study, collect, study_from
from lthlib.execute import check, parameters_of
from lthlib.masks import sparsity_of
from lthlib.metrics import METRICS
from lthlib.pruners import METHODS
from lthlib.store import ROOT, Store

STUDY = ("data", "arch", "method", "seeds", "rounds", "recipe", "rewind_epoch", "train_size", "options")


@dataclass(frozen=True)
class Page:
    """The results behind a page.

    Attributes:
        study: What was asked.
        results: Rows, tickets and arrays.
        judged: Regions of every method, round and metric (`lthlib.verdict.regions`).
        thresholds: Of the verdict.
        store: Where tickets and evaluations lie.
    """

    study: Study
    results: Results
    judged: pd.DataFrame
    thresholds: verdict.Thresholds
    store: Store

    @property
    def is_comparison(self) -> bool:
        """Whether the page compares methods, or is about one."""
        return len(self.study.methods) != 1

    def arrays(self, method: str, round: int, seed: int) -> Mapping[str, np.ndarray]:
        """Return the small arrays of one ticket."""
        tickets = self.results.tickets
        which = (tickets["method"] == method) & (tickets["round"] == round) & (tickets["seed"] == seed)
        return self.results.arrays[tickets.loc[which, "ticket"].iloc[0]]


def load(dimension: str, namespace: Mapping[str, object]) -> Page:
    """Gather everything a page needs, computing (with a progress bar) what is missing, and say where it lies.

    Args:
        dimension: A name in `lthlib.evaluate.DIMENSIONS`.
        namespace: The notebook's variables (``globals()``), its parameters among them.

    Raises:
        UserError: For an unknown parameter (papermill itself would ignore it) or a value that cannot be.
    """
    given = _parameters(dimension, namespace)
    figures.use_style()
    study = study_from({key: given.pop(key) for key in STUDY if key in given})
    store, recorded = Store(given["store"]), given["recorded"]
    results = collect(
        study, dimension, store, parameters=given["measure"], precision=given["precision"],
        compute_missing=given["compute_missing"], recorded=ROOT / recorded if recorded else None,
    )  # fmt: skip
    limits = verdict.Thresholds(**_known(given["thresholds"], vars(verdict.Thresholds()), "threshold"))
    page = Page(study, results, verdict.regions(results.rows, n_classes(results), limits), limits, store)
    n_recorded = len(results.recorded)
    if n_recorded < len(results.tickets):
        print(
            f"{len(results.tickets) - n_recorded} tickets and their evaluations lie in {_short(store.root)}."
        )
    if n_recorded:
        print(f"{n_recorded} evaluations were read from the recorded results in {recorded}.")
    return page


def _parameters(dimension: str, namespace: Mapping[str, object]) -> dict[str, object]:
    """Return a template's parameters from the notebook's variables; what papermill injected must be declared."""
    template = nbformat.read(ROOT / "notebooks" / f"{dimension}.ipynb", as_version=4)
    declared = parameters_of(template)
    injected = {
        target.id: namespace[target.id]
        for source in namespace.get("In", [])
        if source.startswith("# Parameters")
        for node in ast.parse(source).body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    check(injected, declared)
    return {name: namespace[name] for name in declared}


def _known(given: Mapping[str, object], allowed: Mapping[str, object], kind: str) -> dict[str, object]:
    for name in given:
        choose(name, allowed, kind)
    return dict(given)


def _short(path: Path) -> str:
    path = path.resolve()
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name


def n_classes(results: Results) -> int:
    """Return the number of classes of the study's data set, as the evaluations recorded it."""
    return int(results.provenance[0]["n_classes"])


def summary_line(page: Page) -> Markdown:
    """Say on what the page's numbers were measured."""
    study, first = page.study, page.results.provenance[0]
    seeds = ", ".join(map(str, study.seeds))
    title = data.DATASETS[study.data].title if study.data in data.DATASETS else study.data
    size = f"{study.train_size:,} training images" if study.train_size else "all training images"
    return Markdown(
        f"Measured on **{title}** ({size}), architecture **{study.arch}**, seed{'s' * (len(study.seeds) > 1)} {seeds}, "
        f"{study.recipe.epochs} epochs a training, forward passes in {first['precision']}, on {first['processor']}, "
        f"commit `{first['commit']}`, torch {first['torch']}."
    )


def verdict_table(page: Page) -> HTML:
    """Show how far each method keeps each metric of the paper: the highest sparsity won without a break, in percent."""
    table = verdict.reach(page.judged)
    table.index = [METHODS[name].title for name in table.index]
    table.columns = [f"{METRICS[name].title} {METRICS[name].arrow}" for name in table.columns]
    return _html(table.map(lambda v: "–" if np.isnan(v) else f"{100 * v:.1f}"))


def value_table(page: Page, metrics: Sequence[str] | None = None) -> HTML:
    """Show mean and interval of each metric by sparsity, ✓ winning, ↘ degraded, ✗ collapsed; dense first."""
    judged = page.judged[page.judged["region"] != ""]
    if metrics is not None:
        judged = judged[judged["metric"].isin(metrics)]
    marks = {verdict.WINNING: "✓", verdict.DEGRADED: "↘", verdict.COLLAPSED: "✗"}
    columns: dict[str, dict[tuple[str, str], str]] = {}
    for (metric, shift, severity), group in judged.groupby(["metric", "shift", "severity"], sort=False):
        scale = figures.factor(metric)
        title = (
            figures.label(metric)
            + ("" if shift == "none" else f" {shift}")
            + (f" {severity:g}" if severity else "")
        )
        first = group.iloc[0]
        cells = {("dense", "0"): _interval(first, scale, "dense")}
        for _, line in group.iterrows():
            key = METHODS[line["method"]].title, f"{100 * sparsity_of(line['round']):.1f}"
            cells[key] = f"{_interval(line, scale, '')} {marks[line['region']]}"
        columns[title] = cells
    table = pd.DataFrame(columns)
    table.index = table.index.set_names(["method", "sparsity [%]"])
    return _html(table)


def _interval(line: pd.Series, scale: float, prefix: str) -> str:
    mean, low, high = (
        scale * line[prefix or "mean"], scale * line[f"{prefix}_low" if prefix else "low"],
        scale * line[f"{prefix}_high" if prefix else "high"],
    )  # fmt: skip
    digits = 4 if abs(mean) >= 100 else 3
    return f"{mean:.{digits}g} [{low:.{digits}g}, {high:.{digits}g}]"


def cost_table(page: Page) -> HTML:
    """Show what each ticket costs: weights, multiply-accumulates, checkpoint bytes, training, mask finding."""
    tickets = page.results.tickets.assign(nominal=lambda t: t["round"].map(sparsity_of))
    mean = tickets.groupby(["method", "round"], sort=False).mean(numeric_only=True)
    parent = mean.loc["dense"].iloc[0]
    table = pd.DataFrame({
        "method": [METHODS[m].title for m, _ in mean.index],
        "sparsity [%]": [f"{100 * v:.2f}" for v in mean["sparsity"]],
        "conv weights kept": [f"{v:,.0f}" for v in mean["n_kept"]],
        "parameters": [f"{v:,.0f}" for v in mean["n_parameters"]],
        "MACs of kept weights [%]": [f"{100 * v / parent['macs']:.1f}" for v in mean["macs"]],
        "MACs a dense kernel does [%]": [f"{100 * v / parent['macs']:.1f}" for v in mean["macs_dense_kernel"]],
        "checkpoint [kB]": [f"{v / 1e3:,.0f}" for v in mean["bytes"]],
        "compressed [kB]": [f"{v / 1e3:,.0f}" for v in mean["bytes_compressed"]],
        "training [dense runs]": [f"{v:.2f}" for v in mean["trainings"]],
        "mask finding [s]": [f"{v:.2f}" for v in mean["mask_seconds"]],
    })  # fmt: skip
    return _html(table.set_index("method"))


def reading(page: Page) -> Markdown:
    """Say in sentences what the rows show: how far each method keeps every metric, and what gives way first."""
    dimension = page.results.dimension
    passes = verdict.lth_pass(page.judged)
    sentences = []
    for method, group in passes.groupby("method", sort=False):
        group = group.sort_values("round")
        unbroken = group[group["passed"].cumprod().astype(bool)]
        broken = group[~group["passed"].cumprod().astype(bool)]
        names = ", ".join(METRICS[name].title for name in broken["lost"].iloc[0]) if len(broken) else ""
        if broken.empty:
            text = (
                f"keeps every metric of this page up to {_percent(unbroken)}, the sparsest network measured"
            )
        elif unbroken.empty:
            text = f"loses at the lowest sparsity measured ({_percent(broken.head(1))}) in {names}"
        else:
            text = f"keeps every metric up to {_percent(unbroken)}; at {_percent(broken.head(1))} it loses in {names}"
        sentences.append(f"- **{METHODS[method].title}** {text}.")
    limit = page.thresholds
    intro = (
        f"Of the paper's metrics of {dimension}, at allowances of {100 * limit.tolerance:g} percentage point"
        f"{'s' * (limit.tolerance != 0.01)} (fractions), {100 * limit.relative_tolerance:g} % (other units) or "
        f"{limit.k:g} standard errors, whichever is larger:"
    )
    return Markdown(intro + "\n\n" + "\n".join(sentences))


def _percent(lines: pd.DataFrame) -> str:
    return f"{100 * lines['sparsity'].iloc[-1]:.1f} %"


def show(*items: object) -> None:
    """Display several things in one cell."""
    for item in items:
        display(item)


def _html(table: pd.DataFrame) -> HTML:
    return HTML(f'<div class="scroll">{table.to_html(border=0, classes="table", escape=True)}</div>')


def reliability_diagrams(page: Page) -> dict[str, Mapping[str, np.ndarray]]:
    """Return the reliability diagrams of dense and of each method at the page's highest sparsity, by title.

    A comparison shows dense and the first three methods; the first seed.
    """
    seed, last = page.study.seeds[0], page.study.rounds[-1]
    found = {"dense": page.arrays("dense", 0, seed)}
    for method in page.study.methods[:3]:
        found[f"{METHODS[method].title}, {100 * sparsity_of(last):.1f} %"] = page.arrays(method, last, seed)
    return found
