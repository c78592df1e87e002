"""The studies that a book rests on: what each was trained on, how well it learned, and where they disagree."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import pandas as pd

from lthlib.book import markdown
from lthlib.book.cost import sizes
from lthlib.book.markdown import plain
from lthlib.core.errors import UserError
from lthlib.metrics import METRICS
from lthlib.results import verdict
from lthlib.results.claims import CLAIMS, Claim, Finding
from lthlib.results.claims_parts import FAILS, HOLDS, Evidence, listed, mean_of, number, standing, titled
from lthlib.tickets.study import Study

FEW = 6  # networks from which on a correlation of ranks is told
RANKS = ", ranks"  # ends the name of a line of such correlations


def passes(study: Study) -> int:
    """Return how many images one training of a study sees, those seen again counted again; 0 where it is not known."""
    try:
        steps = study.recipe.steps_per_epoch(study.train_size or sizes(study).n)
    except UserError:  # recorded elsewhere, on images that are not here
        return 0
    return study.recipe.epochs * steps * study.recipe.batch_size


def studies_table(studies: Sequence[Evidence]) -> str:
    """Return what the studies differ in, by their numbers in the table of claims, as Markdown."""
    told = (
        "*Images seen*: in one training, those seen again counted again. *Dense*: its accuracy, and the temperature "
        "*τ* that would calibrate it: above 1 it is too sure of its answers, below 1 too unsure. Of the *sparse* "
        "networks some *win* (are shown to keep everything), some *lose* (something, for certain)."
    )
    return f"{markdown.table(_line(n, e) for n, e in enumerate(studies, 1))}\n\n{told}"


def _line(number: int, e: Evidence) -> dict[str, str]:
    outcomes = verdict.lth_pass(e.judged)["outcome"].value_counts()
    lost = outcomes.get(verdict.LOST, 0) + outcomes.get(verdict.COLLAPSED, 0)
    temperature = _dense(e, "temperature")
    return {
        "no.": str(number),
        "study": plain(e.label),
        "images seen": f"{e.passes:,}" if e.passes else "–",
        "seeds": str(e.rows["seed"].nunique()),
        "dense": f"{100 * _dense(e, 'test_accuracy'):.1f}\N{NO-BREAK SPACE}%",
        "τ": "–" if math.isnan(temperature) else f"{temperature:.2f}",
        "sparse": str(outcomes.sum()),
        "win": str(outcomes.get(verdict.KEPT, 0)),
        "lose": str(lost),
    }


def _dense(e: Evidence, metric: str) -> float:
    """Return the dense mean over seeds; NaN where it was not measured."""
    rows = e.rows[(e.rows["method"] == "dense") & (e.rows["metric"] == metric) & (e.rows["shift"] == "none")]
    return float(rows["value"].mean())


def _side(temperature: float) -> str:
    if math.isnan(temperature):
        return ""
    return "too sure" if temperature > 1 else "too unsure"


def rankings_table(studies: Sequence[Evidence]) -> str:
    """Return who is best and who is worst in each metric of the paper, in the first study that has most of them."""
    if not any(map(_asked, studies)):
        return "No study has sparse networks to compare."
    e = max(studies, key=lambda e: len(_asked(e)))
    lines = []
    for metric in _asked(e):
        cells, methods = e.cells(metric), e.sparse(metric)
        rounds = standing(cells, methods)
        means = {name: mean_of(cells, [name], rounds) for name in ("dense", *methods)}
        known = {name: mean.value for name, mean in means.items() if mean is not None}
        order = sorted(known, key=known.get, reverse=METRICS[metric].higher_is_better)
        said = ", ".join(f"{listed([name])} {number(metric, known[name])}" for name in order)
        lines.append({"metric": titled(metric), "from the best to the worst": said})
    return f"{plain(e.label)}, means over the sparsities at which all of these stand:\n\n{markdown.table(lines)}"


def beside_accuracy_table(studies: Sequence[Evidence]) -> str:
    """Return how each metric of the paper sorts networks beside how accuracy does, by the studies' numbers.

    It is Spearman's correlation over all networks (seeds averaged) that have not collapsed: 1 where a metric sorts
    them as accuracy does, each from its own worst to its best, -1 where the other way round.
    """
    columns = {}
    for n, e in enumerate(studies, 1):
        accuracy, found = e.cells("test_accuracy").mean(axis=1), {}
        for metric in _asked(e):
            values = e.cells(metric).mean(axis=1)
            if metric != "test_accuracy" and len(values) >= FEW and min(values.nunique(), accuracy.nunique()) > 1:
                way = 1 if METRICS[metric].higher_is_better else -1
                found[titled(metric)] = _sorted_alike(way * values, accuracy)
        columns[str(n)] = found
    return _by_study("metric", columns)


def foreign_table(studies: Sequence[Evidence]) -> str:
    """Return of each set of foreign images what its ROC-AUC depends on, by the studies' numbers.

    That is chance (the standard deviation over trainings that differ in nothing but their seed, in points, pooled over
    networks that have not collapsed; that of accuracy in the first line) and, as above, accuracy.
    """
    columns = {}
    for n, e in enumerate(studies, 1):
        accuracy, rows = e.cells("test_accuracy"), e.rows[e.rows["metric"] == "ood_auroc"]
        spreads, ranks = {"accuracy": accuracy} if len(rows) else {}, {}
        for name, of in rows.groupby("shift"):
            cells = of.pivot_table(index=["method", "round"], columns="seed", values="value")
            spreads[f"`{name}`"] = cells = cells[cells.index.isin(accuracy.index)]
            if len(cells) >= FEW:
                ranks[f"`{name}`{RANKS}"] = _sorted_alike(cells.mean(axis=1), accuracy.mean(axis=1))
        deviations = {name: 100 * cells.var(axis=1).mean() ** 0.5 for name, cells in spreads.items()}
        told = {f"{name}, seeds": f"{value:.1f}" for name, value in deviations.items() if not math.isnan(value)}
        columns[str(n)] = told | ranks
    return _by_study("ROC-AUC of", columns)


def _sorted_alike(values: pd.Series, accuracy: pd.Series) -> str:
    """Return Spearman's correlation, short: ten columns have to fit on a page."""
    return f"{values.corr(accuracy, method='spearman'):+.2f}".replace("0.", ".")


def _by_study(first: str, columns: Mapping[str, Mapping[str, str]]) -> str:
    """Return a table with a column a study that has anything to say, and a line for what any of them says."""
    names = dict.fromkeys(name for found in columns.values() for name in found)
    names = sorted(names, key=lambda name: name.endswith(RANKS))
    lines = [{first: name, **{n: found.get(name, "–") for n, found in columns.items() if found}} for name in names]
    return markdown.table(lines, "--:") if lines else "No study has networks enough."


def _asked(e: Evidence) -> list[str]:
    """Return the metrics of the paper that a study has of sparse networks."""
    return [name for name, metric in METRICS.items() if metric.in_verdict and e.sparse(name)]


def disagreements(studies: Sequence[Evidence], found: Mapping[str, Mapping[str, Finding]]) -> str:
    """Return a line for each claim that holds in one study and fails in another, as Markdown."""
    lines = [_disagreement(claim, studies, found[claim.name]) for claim in CLAIMS]
    return "\n".join(filter(None, lines)) or "No claim holds in one study and fails in another."


def _disagreement(claim: Claim, studies: Sequence[Evidence], found: Mapping[str, Finding]) -> str:
    holds, fails = (
        {n: e for n, e in enumerate(studies, 1) if found[e.label].outcome == outcome} for outcome in (HOLDS, FAILS)
    )
    if not (holds and fails):
        return ""
    line = f"- [{claim.title}](#claim-{claim.name}): holds in {_told(holds)}; fails in {_told(fails)}."
    sides = [{_side(_dense(e, "temperature")) for e in of.values()} for of in (holds, fails)]
    is_calibration = any(METRICS[name].dimension == "calibration" for name in claim.figure if name in METRICS)
    if is_calibration and sorted(map(sorted, sides)) == [["too sure"], ["too unsure"]]:
        here, there = (side.pop() for side in sides)
        line += f" Where it holds the dense network is {here} of its answers, where it fails {there}."
    return line


def _told(studies: Mapping[int, Evidence]) -> str:
    values = [f"{100 * _dense(e, 'test_accuracy'):.0f}" for e in studies.values()]
    low, high = min(values, key=float), max(values, key=float)
    accuracy = f"{low} %" if low == high else f"{low} to {high} %"
    return f"{', '.join(map(str, studies))} (dense accuracy {accuracy})"
