"""What the notebooks share: from a page's parameters to results, tables and the sentences that read them.

A template's cells call these; anything that a function can hold is here, so that a page stays a page.
"""

from __future__ import annotations

import ast
import itertools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from IPython import get_ipython
from IPython.display import HTML, Markdown, display

from lthlib import data, figures
from lthlib.core import machine
from lthlib.core.errors import check_plain, choose, require
from lthlib.core.store import ROOT, Store
from lthlib.pruning import METHODS
from lthlib.pruning.masks import sparsity_of
from lthlib.results import verdict
from lthlib.results.collect import Results, collect
from lthlib.tickets.study import Study, study_from

STUDY = ("data", "arch", "method", "seeds", "rounds", "recipe", "rewind_epoch", "train_size", "options")


@dataclass(frozen=True)
class Page:
    """The results behind a page.

    Attributes:
        study: What was asked.
        results: Rows, tickets and arrays.
        judged: Outcome of every method, round and metric (`lthlib.results.verdict.judge`).
        thresholds: Of the verdict.
        store: Where tickets and evaluations lie.
        recorded: Folder of recorded results, None to ignore them.
        compute_missing: Whether to compute what is not recorded.
    """

    study: Study
    results: Results
    judged: pd.DataFrame
    thresholds: verdict.Thresholds
    store: Store
    recorded: Path | None
    compute_missing: bool

    @property
    def is_comparison(self) -> bool:
        """Whether the page compares methods, or is about one."""
        return len(self.study.methods) != 1

    def arrays(self, method: str, round: int, seed: int) -> Mapping[str, np.ndarray]:
        """Return the small arrays of one ticket."""
        tickets = self.results.tickets
        which = (tickets["method"] == method) & (tickets["round"] == round) & (tickets["seed"] == seed)
        return self.results.arrays[tickets.loc[which, "ticket"].iloc[0]]


def load(dimension: str, namespace: Mapping[str, object], template: str | None = None) -> Page:
    """Gather everything a page needs, computing (with a progress bar) what is missing, and say where it lies.

    Args:
        dimension: A name in `lthlib.results.evaluate.DIMENSIONS`.
        namespace: The notebook's variables (``globals()``), its parameters among them.
        template: Name of the notebook in ``notebooks/``; that of the dimension if None.

    Raises:
        UserError: For an unknown parameter (papermill itself would ignore it) or a value that cannot be.
    """
    given = _parameters(template or dimension, namespace)
    if get_ipython() is not None:  # whatever MPLBACKEND says: figures are what a page is for
        get_ipython().run_line_magic("matplotlib", "inline")
    figures.use_style()
    choose(given["precision"], machine.PRECISIONS, "precision")
    study = study_from({key: given.pop(key) for key in STUDY if key in given})
    store, recorded = Store(given["store"]), ROOT / given["recorded"] if given["recorded"] else None
    results = collect(
        study,
        dimension,
        store,
        parameters=given["measure"],
        precision=given["precision"],
        compute_missing=given["compute_missing"],
        recorded=recorded,
    )
    limits = verdict.thresholds_from(given["thresholds"])
    judged = verdict.judge(results.rows, results.arrays, n_classes(results), limits)
    page = Page(study, results, judged, limits, store, recorded, given["compute_missing"])
    n_recorded = len(results.recorded)
    if n_recorded < len(results.tickets):
        print(f"{len(results.tickets) - n_recorded} tickets and their evaluations lie in {_short(store.root)}.")
    if n_recorded:
        print(f"{n_recorded} evaluations were read from the recorded results in {_short(recorded)}.")
    return page


def _parameters(template: str, namespace: Mapping[str, object]) -> dict[str, object]:
    """Return a template's parameters from the notebook's variables; what papermill injected must be declared."""
    cells = json.loads((ROOT / "notebooks" / f"{template}.ipynb").read_text())["cells"]
    declared = [
        name
        for cell in cells
        if "parameters" in cell["metadata"].get("tags", [])
        for name in _assigned("".join(cell["source"]))
    ]
    for source in namespace.get("In", []):
        if source.startswith("# Parameters"):
            for name in _assigned(source):
                choose(name, declared, "parameter")
    given = {name: namespace[name] for name in declared}
    kinds = dict.fromkeys(("store", "recorded"), (str | None, "be the name of a folder, or null"))
    kinds |= dict.fromkeys(("measure", "thresholds"), (Mapping, "be a mapping"))
    for name, (kind, must) in {**kinds, "compute_missing": (bool, "be true or false")}.items():
        check_plain(given[name], name)
        require(isinstance(given[name], kind), f"The parameter {name}", given[name], must)
    return given


def _assigned(code: str) -> list[str]:
    """Return the names that lines of ``name = literal`` set."""
    lines = ast.parse(code).body
    return [(line.targets[0] if isinstance(line, ast.Assign) else line.target).id for line in lines]


def _short(path: Path) -> str:
    path = path.resolve()
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name


def n_classes(results: Results) -> int:
    """Return the number of classes of the study's data set, as the evaluations recorded it."""
    return int(results.provenance[0]["n_classes"])


def summary_line(page: Page) -> Markdown:
    """Say on what the page's numbers were measured."""
    study, every = page.study, page.results.provenance
    seeds = ", ".join(map(str, study.seeds))
    precisions = " or ".join(dict.fromkeys(of["precision"] for of in every))
    made = "; ".join(dict.fromkeys(f"{of['processor']}, commit `{of['commit']}`, torch {of['torch']}" for of in every))
    title = data.title_of(study.data)
    size = f"{study.train_size:,} training images" if study.train_size else "all training images"
    return Markdown(
        f"Networks: **{study.arch}**, trained on **{title}** ({size}), seed{'s' * (len(study.seeds) > 1)} {seeds}, "
        f"{study.recipe.epochs} epochs a training. Logits and explanations are computed in {precisions}; "
        f"attacks, units and curvatures in float32. On {made}."
    )


def cost_table(page: Page) -> HTML:
    """Show what each ticket costs: weights, multiply-accumulates, checkpoint bytes, training, mask finding."""
    tickets = page.results.tickets.assign(nominal=lambda t: t["round"].map(sparsity_of))
    mean = tickets.groupby(["method", "round"], sort=False).mean(numeric_only=True)
    parent = mean.loc["dense"].iloc[0]
    lines = [
        {
            "method": METHODS[method].title,
            "sparsity [%]": f"{100 * of['sparsity']:.2f}",
            "conv weights kept": f"{of['n_kept']:,.0f}",
            "parameters": f"{of['n_parameters']:,.0f}",
            "MACs of kept weights [%]": f"{100 * of['macs'] / parent['macs']:.1f}",
            "MACs a dense kernel does [%]": f"{100 * of['macs_dense_kernel'] / parent['macs']:.1f}",
            "checkpoint [kB]": f"{of['bytes'] / 1e3:,.0f}",
            "compressed [kB]": f"{of['bytes_compressed'] / 1e3:,.0f}",
            "training [dense runs]": f"{of['trainings']:.2f}",
            "mask finding [s]": f"{of['mask_seconds']:.2f}",
        }
        for (method, _), of in mean.iterrows()
    ]
    return html_table(pd.DataFrame(lines).set_index("method"))


def show(*items: object) -> None:
    """Display several things in one cell."""
    for item in items:
        display(item)


def html_table(table: pd.DataFrame, *, words: bool = False) -> HTML:
    """Return a table as the book shows it, wide ones behind a scroll bar; one of ``words`` has room for them."""
    classes = "table words" if words else "table"
    return HTML(f'<div class="scroll">{table.to_html(border=0, classes=classes, escape=True)}</div>')


def standing_round(page: Page) -> int:
    """Return `verdict.standing_round` of the page's methods."""
    return verdict.standing_round(page.judged)


def cases(page: Page, round: int | None = None) -> list[tuple[str, int]]:
    """Return what a page compares: every method at a round, by default the standing one, or its method's rounds."""
    rounds = [round or standing_round(page)] if page.is_comparison else page.study.rounds
    return list(itertools.product(page.study.methods, rounds))


def roc_curves(page: Page) -> dict[str, dict[str, np.ndarray]]:
    """Return ROC curves by foreign set and title, of the first seed: dense, and every round or every method."""
    found = {"dense": page.arrays("dense", 0, page.study.seeds[0])}
    for method, n in cases(page):
        title = METHODS[method].title if page.is_comparison else f"{100 * sparsity_of(n):.1f} %"
        found[title] = page.arrays(method, n, page.study.seeds[0])
    sets = [key for key in found["dense"] if key.startswith("roc_")]
    return {key.removeprefix("roc_"): {title: a[key] for title, a in found.items()} for key in sets}


def line_colours(page: Page) -> dict[str, object]:
    """Return the colours of `roc_curves`, by title."""
    if page.is_comparison:
        return {METHODS[name].title: colour for name, colour in figures.colours().items()}
    titles = [f"{100 * sparsity_of(n):.1f} %" for n in page.study.rounds]
    return dict(zip(titles, figures.shades(len(titles)), strict=True))


def gallery(page: Page) -> tuple[np.ndarray, list[str]]:
    """Return a test image under every corruption, as the dense evaluation kept it, and the corruptions' names."""
    rows = page.results.rows
    names = list(dict.fromkeys(rows.loc[rows["metric"] == "corrupted_accuracy", "shift"]))
    return page.arrays("dense", 0, page.study.seeds[0])["gallery"], names


def sample_sizes(page: Page) -> Markdown:
    """Say on how many images each kind of number rests, and how far an accuracy on them is known at best."""
    rows = page.results.rows
    measured = (
        ("test_accuracy", "clean test images"),
        ("ood_auroc", "known and foreign images, for each foreign set"),
        ("corrupted_accuracy", "images under each corruption and severity"),
        ("corrupted_ece", "images under each corruption and severity"),
        ("fgsm_accuracy", "attacked by FGSM"),
        ("pgd_accuracy", "of these also by PGD-20"),
        ("fidelity", "test images explained"),
        ("unique_detectors", "scenes dissected"),
        ("weight_hessian_trace", "training images, as they are, for the curvature in weights"),
        ("input_hessian_trace", "for that in pixels"),
        ("pac_bayes_weight_sigma", "for noise"),
        ("loss_barrier", "along lines"),
    )
    lines = []
    for metric, what in measured:
        about_accuracy = metric.endswith(("accuracy", "corrupted_ece"))
        for n in rows.loc[rows["metric"] == metric, "n"].unique():
            lines.append(f"{n:,} {what}" + f": ±{196 * (0.25 / n) ** 0.5:.1f}" * about_accuracy)
    text = f"**Images:** {'; '.join(lines)}."
    if "±" in text:
        text += (
            " After the colon, in percentage points, the widest 95 % interval that an accuracy on so many images can "
            "have (at 50 %)."
        )
    text += " All networks see the same images, so differences between them are known better."
    if masks := page.results.provenance[0]["parameters"].get("n_masks"):
        text += f" Each explanation is fitted to {masks:,} masks."
    official = rows.loc[rows["metric"] == "official_corruptions", ["value", "n"]]
    if len(official):
        value, n = official.iloc[0]
        text += f" Of the {n:.0f} corruptions {value:.0f} were read from published files, {n - value:.0f} made here."
    return Markdown(text)


def noise_floor(page: Page) -> Markdown:
    """Say what ECE an honest network would show on as few images as there are under each corruption."""
    rows = page.results.rows
    n = int(rows.loc[rows["metric"] == "corrupted_ece", "n"].iloc[0])
    floor = 100 * (2 / np.pi) ** 0.5 * (0.8 * 0.2 / n) ** 0.5
    return Markdown(
        f"An ECE has a floor: from {n:,} images of a perfectly calibrated network that always answers with confidence "
        f"0.8 it is {floor:.1f} points on average ([](#metric-ece), exercise 3), and more with more bins filled. Dense "
        "and sparse share that floor; their difference is what counts."
    )


def interval_table(page: Page) -> HTML:
    """Show ECE, SCE and NLL of the first seed with 95 % bootstrap intervals over test images, and their bias."""
    lines = []
    for method, n in [("dense", 0), *cases(page)]:
        line = {"method": METHODS[method].title, "sparsity [%]": f"{100 * sparsity_of(n):.1f}"}
        for metric in ("ece", "sce", "nll"):
            found = page.arrays(method, n, page.study.seeds[0])[f"interval_{metric}"]
            value, low, high, bias = figures.factor(metric) * found
            line[figures.label(metric)] = f"{value:.3g} [{low:.3g}, {high:.3g}], bias {bias:+.2g}"
        lines.append(line)
    return html_table(pd.DataFrame(lines).set_index(["method", "sparsity [%]"]))


def sparsest(page: Page, most: int | None = None) -> dict[str, Mapping[str, np.ndarray]]:
    """Return the arrays of dense and of each method (``most`` at most) at the page's highest sparsity, first seed."""
    methods = {"dense": 0, **dict.fromkeys(page.study.methods[:most], page.study.rounds[-1])}
    return {title_of(method, n): page.arrays(method, n, page.study.seeds[0]) for method, n in methods.items()}


def holding(page: Page, array: str) -> dict[str, Mapping[str, np.ndarray]]:
    """Return the arrays of the tickets that hold one of a name, by title; of each method and round the first seed.

    A comparison shows the highest sparsity at which each method holds it.
    """
    tickets = page.results.tickets
    held = tickets[[array in page.results.arrays[ticket] for ticket in tickets["ticket"]]]
    held = held.drop_duplicates(["method", "round"])
    if page.is_comparison:
        held = held.sort_values("round", kind="stable").drop_duplicates("method", keep="last")
    return {title_of(t.method, t.round): page.results.arrays[t.ticket] for t in held.itertuples()}


def title_of(method: str, n: int) -> str:
    """Return a method and its sparsity at a round as figures name them."""
    return "dense" if n == 0 else f"{METHODS[method].title}, {100 * sparsity_of(n):.1f} %"


def drawn(draw: Callable, tickets: Mapping[str, Mapping[str, np.ndarray]], *arguments: object) -> object:
    """Return what ``draw(tickets, *arguments)`` returns, a table ready to be shown; a note where nothing is held."""
    if not tickets:
        return Markdown("*Not recorded for the tickets of this page: `measure` says of which it is.*")
    found = draw(tickets, *arguments)
    if isinstance(found, pd.DataFrame):
        return html_table(found)
    plt.close(found)  # what a cell returns is shown once; what stays open would be shown again
    return found
