"""The parts that claims are made of: what a study holds, means over its networks, and what differences decide.

Means are over methods and over the rounds at which all networks compared stand (have not collapsed). How much another
training would change such a mean is estimated from all methods of the study at these rounds, each as one estimate with
seeds - 1 degrees of freedom: the rounds of one method may go together. A difference is told where the 95 % interval of
Student's t excludes zero and every seed has the same sign. It is about other trainings, on these images.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import pandas as pd
from scipy.stats import t as student

from lthlib.metrics import METRICS
from lthlib.pruning import METHODS
from lthlib.results import verdict

HOLDS, FAILS, CANNOT, UNMEASURED = "holds", "fails", "cannot be told", "not measured"
LEVEL = 0.05  # the probability, at most about, that a difference of nothing is called one, by convention
MODERATE = 0.9  # "matches" is asked up to this sparsity: the paper compares at 67 %, at the far end everything loses
PI = ("snip", "grasp", "synflow")
ALONE, WIDTHS, CLASSES = "study", "widths", "classes"
SUMMARY = "the paper {cite}`chen2022can`, as its summary reports it {cite}`siddhartha2023can`, under *%s*"


@dataclass(frozen=True)
class Evidence:
    """What a study has to say on a claim.

    Attributes:
        label: What a reader sees.
        rows: Tidy rows of all its dimensions, with ``round``.
        n_classes: Number of classes.
        replicates: By ticket, arrays as `lthlib.results.verdict.judge` takes them.
        thresholds: Of the verdict.
        grid: The name of the grid it is part of: within one, studies differ in what the grid varies alone.
        passes: How many images one training sees; 0 where that is not known.
    """

    label: str
    rows: pd.DataFrame = field(repr=False)
    n_classes: int
    replicates: Mapping[str, Mapping[str, np.ndarray]] = field(default_factory=dict, repr=False)
    thresholds: verdict.Thresholds = field(default_factory=verdict.Thresholds)
    grid: str = ""
    passes: int = 0

    @cached_property
    def judged(self) -> pd.DataFrame:
        """The outcome of every metric (`lthlib.results.verdict.judge`); no lines where there is no dense network."""
        if "dense" not in set(self.rows["method"]) or set(self.rows["method"]) == {"dense"}:
            return pd.DataFrame(columns=[*verdict.KEYS, "sparsity", "dense", "outcome"])
        return verdict.judge(self.rows, self.replicates, self.n_classes, self.thresholds)

    @cached_property
    def values(self) -> pd.DataFrame:
        """Each metric's mean over shifts and severities, (metric, method, round) x seeds, of what has not collapsed.

        Those of flatness, which span orders of magnitude, are logarithms.
        """
        rows = self.rows.drop_duplicates(["method", "round", "seed", "metric", "shift", "severity"])
        values = rows.groupby(["metric", "method", "round", "seed"])["value"].mean().unstack("seed")
        log = [name in METRICS and is_log(name) for name in values.index.get_level_values("metric")]
        values[log] = np.log(values[log].where(values[log] > 0))
        gone = verdict.collapsed(verdict.summarise(self.rows), self.n_classes, self.thresholds.collapse)
        return values[~values.index.droplevel("metric").isin([ticket[2:] for ticket in gone])]

    def cells(self, metric: str) -> pd.DataFrame:
        """Return a metric's values, (method, round) x seeds; empty where it was not measured."""
        return self.values[self.values.index.get_level_values("metric") == metric].droplevel("metric")

    def measured(self, methods: Iterable[str], metric: str) -> list[str]:
        """Return those of some methods of which a metric was measured, standing or not."""
        there = set(self.rows.loc[self.rows["metric"] == metric, "method"])
        return [name for name in methods if name in there]

    def sparse(self, metric: str) -> list[str]:
        """Return the sparse methods of which a metric was measured; a small dense network is none."""
        found = dict.fromkeys(m for m in self.rows["method"] if METHODS[m].family != "dense" and m != "small-dense")
        return self.measured(found, metric)

    @property
    def arch(self) -> tuple[str, float]:
        """The architecture without its width, and how wide it is: the end of ``resnet20s-x2``, else 1."""
        name = str(self.rows["arch"].iloc[0])
        found = re.fullmatch(r"(.+?)[-_]?(?:x|w|width)(\d+(?:\.\d+)?)", name)
        return (found[1], float(found[2])) if found else (name, 1.0)


@dataclass(frozen=True)
class Part:
    """One thing that a rule looked at: what it says of the claim, and the numbers that decided it."""

    outcome: str
    said: str
    seeds: int = 0


@dataclass(frozen=True)
class Finding:
    """What a rule found: the outcome, what it looked at, and what else should be said beside it."""

    outcome: str
    parts: Sequence[Part] = ()
    more: str = ""


@dataclass(frozen=True)
class Claim:
    """A claim and how it is judged.

    Attributes:
        name: An identifier.
        title: A few words.
        statement: The claim in one sentence.
        source: Who made it, as Markdown.
        needs: Which rows the rule reads.
        says: Two sentences for each of holds, fails and cannot be told.
        find: The rule: a function of the evidence, or of that at both ends of a group where ``over`` is not `ALONE`.
        figure: Metrics that are drawn.
        methods: Methods that are drawn; all where empty.
        over: `ALONE`, or what the studies compared differ in: `WIDTHS`, `CLASSES`.
    """

    name: str
    title: str
    statement: str
    source: str
    needs: str
    says: Mapping[str, str]
    find: Callable[..., Finding]
    figure: Sequence[str]
    methods: Sequence[str] = ()
    over: str = ALONE

    @property
    def rule(self) -> str:
        """The rule in words."""
        return " ".join(inspect.getdoc(self.find).split())


CLAIMS: list[Claim] = []
"""All claims, in the paper's order; full once `lthlib.results.claims` is imported."""


def claim(
    name: str, title: str, statement: str, source: str, *, holds: str, fails: str, cannot: str, **fields: object
) -> Callable[[Callable[..., Finding]], Callable[..., Finding]]:
    """Register the function below as the rule of a claim, its docstring as the rule in words."""

    def register(find: Callable[..., Finding]) -> Callable[..., Finding]:
        says = {HOLDS: holds, FAILS: fails, CANNOT: cannot}
        CLAIMS.append(Claim(name, title, statement, source, says=says, find=find, **fields))
        return find

    return register


@dataclass(frozen=True)
class Mean:
    """A mean by seed, the variance over trainings of one seed's, and the degrees of freedom behind that."""

    each: pd.Series
    variance: float
    df: int

    @property
    def value(self) -> float:
        """The mean over seeds."""
        return float(self.each.mean())

    def __sub__(self, other: Mean) -> Mean:
        return Mean((self.each - other.each).dropna(), self.variance + other.variance, min(self.df, other.df))

    def __mul__(self, factor: float) -> Mean:
        return Mean(factor * self.each, factor**2 * self.variance, self.df)


def standing(cells: pd.DataFrame, *groups: Sequence[str]) -> list[int]:
    """Return the rounds at which all methods of some groups stand; the dense network's is 0, and asked of nobody."""
    rounds = [set(cells.loc[[m]].index.get_level_values("round")) for g in groups for m in g if m in cells.index]
    others = [r for r in rounds if r != {0}]
    return sorted(set.intersection(*others)) if others else []


def mean_of(cells: pd.DataFrame, methods: Sequence[str], rounds: Sequence[int]) -> Mean | None:
    """Return the mean of cells over methods and rounds; of dense, over seeds alone; None where there is nothing."""
    rounds = [0] if list(methods) == ["dense"] else rounds
    chosen = cells[cells.index.isin(pd.MultiIndex.from_product([methods, rounds]))].dropna(axis=1)
    if chosen.empty or not len(methods) or len(chosen) < len(methods) * len(rounds):
        return None
    if rounds == [0]:  # of dense there is one network a seed: its variance is taken for that of any single one
        variances = cells.var(axis=1).groupby(level="method").mean()
    else:
        mine = cells[cells.index.isin(rounds, level="round")]
        variances = mine.groupby(level="method").mean().var(axis=1) / len(methods)
    df = int(variances.count()) * (chosen.shape[1] - 1)
    return Mean(chosen.mean(), float(variances.mean()), df)


def settle(d: Mean, tests: int = 1) -> tuple[str, float, float]:
    """Say whether a difference is above zero (holds), below (fails), or cannot be told; and its interval's bounds.

    The bounds are NaN for one seed. ``tests`` is the number of such tests of which the best is looked for (Bonferroni).
    """
    if d.each.empty:
        return UNMEASURED, math.nan, math.nan
    if d.df < 1 or len(d.each) < 2:
        return CANNOT, math.nan, math.nan
    reach = float(student.isf(LEVEL / tests / 2, d.df)) * math.sqrt(d.variance / len(d.each))
    low, high = d.value - reach, d.value + reach
    outcome = HOLDS if low > 0 and (d.each > 0).all() else FAILS if high < 0 and (d.each < 0).all() else CANNOT
    return outcome, low, high


def difference(
    metric: str, names: Sequence[str], a: Mean | None, b: Mean | None, *, sign: int = 0, title: str = "", tests: int = 1
) -> Part:
    """Ask whether the first of two ``names``, of mean ``a``, is better in a metric than the second, of mean ``b``.

    A mean is None where it was not measured. ``sign`` is 1 where more is asked for, -1 where less is; by default the
    metric's own, as is the ``title``.
    """
    title = title or titled(metric)
    if a is None or b is None or (a - b).each.empty:
        return Part(UNMEASURED, f"{title} of {names[0]} and {names[1]}")
    d = (a - b) * (sign or (1 if METRICS[metric].higher_is_better else -1))
    outcome, low, high = settle(d, tests)
    said = f"{title}: {names[0]} {number(metric, a.value)}, {names[1]} {number(metric, b.value)}, "
    return Part(outcome, said + gap(metric, d.value, low, high), len(d.each))


def ahead(e: Evidence, metric: str, first: Sequence[str], second: Sequence[str], tests: int = 1) -> Part:
    """Ask whether some methods are better in a metric than others, at the rounds where all of them stand."""
    groups = [e.measured(methods, metric) for methods in (first, second)]
    names = [listed(group or given) for group, given in zip(groups, (first, second), strict=True)]
    cells = e.cells(metric)
    rounds = standing(cells, *groups)
    return difference(metric, names, *(mean_of(cells, group, rounds) for group in groups), tests=tests)


def gap(metric: str, mean: float, low: float, high: float) -> str:
    """Return how far one side is ahead or behind, in the metric's own direction, with the interval."""
    way, sign = ("behind", -1) if mean < 0 else ("ahead", 1)
    bounds = sorted([sign * low, sign * high])
    interval = "one seed" if math.isnan(low) else f"{number(metric, bounds[0])} to {number(metric, bounds[1])}"
    return f"{way} by {'a factor of ' * is_log(metric)}{number(metric, sign * mean)} ({interval})"


def keeps(e: Evidence, methods: Sequence[str], metrics: Sequence[str]) -> Part:
    """Ask whether methods keep metrics at moderate sparsities, by the verdict of the whole book.

    It fails where one method loses one metric at more than half of these sparsities: a single loss among many verdicts
    may be luck.
    """
    judged = e.judged
    chosen = judged["method"].isin(methods) & judged["metric"].isin(metrics) & (judged["sparsity"] <= MODERATE)
    lines = judged[chosen & judged["dense"].notna()].drop_duplicates(["method", "round", "metric", "shift", "severity"])
    if not set(methods) <= set(lines["method"]) or not set(metrics) <= set(lines["metric"]):
        return Part(UNMEASURED, f"{listed(methods)} in {len(metrics)} metrics up to {100 * MODERATE:g} %")
    lost = lines["outcome"].isin([verdict.LOST, verdict.COLLAPSED])
    share = lost.groupby([lines["method"], lines["metric"], lines["shift"]]).mean()
    kept, still = ((lines["outcome"] == o).sum() for o in (verdict.KEPT, verdict.NOT_SHOWN))
    named = lines.assign(title=lines["metric"].map(lambda name: METRICS[name].title))
    foreign = named["metric"] == "ood_auroc"  # which has several sets, and noise is not like photographs
    named.loc[foreign, "title"] += " on " + named.loc[foreign, "shift"]
    what = ", ".join(dict.fromkeys(named.loc[lost, "title"]))
    said = f"{listed(methods)} up to {100 * lines['sparsity'].max():.1f} %: {kept} kept, {lost.sum()} lost"
    said += f" ({what})" * bool(what) + f", {still} not shown"
    outcome = FAILS if share.max() > 0.5 else HOLDS if kept == len(lines) else CANNOT
    return Part(outcome, said, e.rows["seed"].nunique())


def all_of(*parts: Part, more: str = "") -> Finding:
    """Return what is found of a claim that needs all of its parts: it fails where one is shown to be false."""
    outcomes = {part.outcome for part in parts}
    return Finding(next((o for o in (UNMEASURED, FAILS, CANNOT) if o in outcomes), HOLDS), parts, more)


# --- words -------------------------------------------------------------------------------------------------------


def listed(methods: Sequence[str]) -> str:
    """Return methods as readers know them: A, B and C."""
    titles = [METHODS[name].title if name != "dense" else "dense" for name in methods]
    return " and ".join(filter(None, [", ".join(titles[:-1]), *titles[-1:]]))


def titled(metric: str) -> str:
    """Return a metric's title and direction."""
    entry = METRICS[metric]
    return f"{entry.title} {entry.arrow}".strip()


def is_log(metric: str) -> bool:
    """Say whether a metric's values are compared by their ratio."""
    return METRICS[metric].dimension == "flatness"


def number(metric: str, value: float) -> str:
    """Return a value of `Evidence.values` as readers see it: fractions in percent."""
    value = math.exp(value) if is_log(metric) else value
    return f"{100 * value:.2f} %" if METRICS[metric].unit == "fraction" else f"{value:.3g}"


def percent(e: Evidence, method: str, round: int) -> str:
    """Return the sparsity of a method at a round, in percent."""
    which = (e.rows["method"] == method) & (e.rows["round"] == round)
    return f"{100 * e.rows.loc[which, 'sparsity'].mean():.1f} %"
