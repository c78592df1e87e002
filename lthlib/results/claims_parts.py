"""The parts that rules of claims are made of: what a study holds, differences between its networks, what they decide.

Every difference is taken seed by seed, since networks of one seed share initial weights and the order of images, at
rounds where all networks compared stand (have not collapsed), and averaged over these rounds. The spread over seeds is
pooled over rounds. Rounds of one seed are taken to say the same: more of them make the spread better known, and the
interval no narrower. It is Student's at 95 %, for other trainings on these images.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
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


@dataclass(frozen=True)
class Evidence:
    """What a study has to say on a claim.

    Attributes:
        label: What a reader sees.
        rows: Tidy rows of all its dimensions, with ``round``.
        n_classes: Number of classes.
        replicates: By ticket, arrays as `lthlib.results.verdict.judge` takes them.
        thresholds: Of the verdict.
        width: How wide its networks are beside others of their family; by default the end of the architecture's name
            (``resnet20s-x2``), else 1.
    """

    label: str
    rows: pd.DataFrame = field(repr=False)
    n_classes: int
    replicates: Mapping[str, Mapping[str, np.ndarray]] = field(default_factory=dict, repr=False)
    thresholds: verdict.Thresholds = verdict.Thresholds()
    width: float | None = None

    @cached_property
    def judged(self) -> pd.DataFrame:
        """The outcome of every metric (`lthlib.results.verdict.judge`)."""
        return verdict.judge(self.rows, self.replicates, self.n_classes, self.thresholds)

    @cached_property
    def values(self) -> pd.DataFrame:
        """The mean of each metric over shifts and severities, of the tickets that have not collapsed."""
        rows = self.rows.drop_duplicates(["method", "round", "seed", "metric", "shift", "severity"])
        values = rows.groupby(["metric", "method", "round", "seed"])["value"].mean().unstack("seed")
        if "test_accuracy" not in values.index:
            return values
        accuracy = values.loc["test_accuracy"].mean(axis=1)
        if "dense" not in accuracy.index:
            return values
        dense = accuracy.loc["dense"].iloc[0]
        gone = accuracy.index[dense - accuracy > self.thresholds.collapse * (dense - 1 / self.n_classes)]
        return values[~values.index.droplevel("metric").isin(gone)]

    def measured(self, methods: Iterable[str], metric: str = "test_accuracy") -> list[str]:
        """Return those of some methods of which a metric was measured, standing or not."""
        there = set(self.rows.loc[self.rows["metric"] == metric, "method"])
        return [name for name in methods if name in there]

    def of(self, metric: str, methods: Sequence[str]) -> pd.DataFrame:
        """Return the mean of a metric over methods, rounds x seeds, at rounds where all of them stand."""
        found = [self.values.loc[(metric, name)] for name in methods if (metric, name) in self._there]
        if not methods or len(found) < len(methods):
            return pd.DataFrame()
        return sum(found[1:], found[0]).dropna(how="all") / len(found)

    @cached_property
    def _there(self) -> set[tuple[str, str]]:
        return set(self.values.index.droplevel("round"))

    @property
    def family(self) -> str:
        """The architecture without its width."""
        return self._named[0]

    @property
    def wide(self) -> float:
        """The width, see `width`."""
        return self._named[1] if self.width is None else self.width

    @property
    def _named(self) -> tuple[str, float]:
        arch = str(self.rows["arch"].iloc[0])
        found = re.fullmatch(r"(.+?)[-_]?(?:x|w|width)(\d+(?:\.\d+)?)", arch)
        return (found[1], float(found[2])) if found else (arch, 1.0)


@dataclass(frozen=True)
class Part:
    """One thing that a rule looked at: what it says of the claim, and the numbers that decided it."""

    outcome: str
    said: str
    seeds: int = 0


def settle(d: pd.DataFrame, tests: int = 1) -> tuple[str, float, float, float]:
    """Say whether differences are above zero (holds), below (fails), or cannot be told from it.

    Args:
        d: Differences, rounds x seeds.
        tests: Number of such tests of which the best is looked for (Bonferroni).

    Returns:
        The outcome, the mean, and the bounds of its interval (NaN for one seed).
    """
    d = d.dropna(how="all").dropna(axis=1, how="any")
    if d.empty:
        return UNMEASURED, math.nan, math.nan, math.nan
    mean, seeds = float(d.to_numpy().mean()), d.shape[1]
    if seeds < 2:
        return CANNOT, mean, math.nan, math.nan
    df = len(d) * (seeds - 1)
    spread = math.sqrt(d.sub(d.mean(axis=1), axis=0).to_numpy().__pow__(2).sum() / df)
    reach = float(student.isf(LEVEL / tests / 2, df)) * spread / math.sqrt(seeds)
    each = np.sign(d.mean().to_numpy())
    alike = abs(each.sum()) == seeds
    outcome = HOLDS if alike and mean - reach > 0 else FAILS if alike and mean + reach < 0 else CANNOT
    return outcome, mean, mean - reach, mean + reach


def ahead(e: Evidence, metric: str, first: Sequence[str], second: Sequence[str]) -> Part:
    """Ask whether some methods are better in a metric than others, or than the dense network."""
    a, b = e.of(metric, e.measured(first, metric)), e.of(metric, e.measured(second, metric))
    if a.empty or b.empty:
        return Part(UNMEASURED, f"{titled(metric)} of {listed(first)} and {listed(second)}")
    if list(second) == ["dense"]:
        b = pd.DataFrame([b.iloc[0]] * len(a), index=a.index)
    rounds = a.index.intersection(b.index)
    a, b = a.loc[rounds], b.loc[rounds]
    return difference(metric, e.measured(first, metric), e.measured(second, metric), a, b)


def difference(metric: str, first: Sequence[str] | str, second: Sequence[str] | str, a: pd.DataFrame, b: pd.DataFrame):
    """Ask whether ``a`` is better than ``b`` in a metric; both rounds x seeds."""
    sign = 1 if METRICS[metric].higher_is_better else -1
    d = sign * (a - b)
    outcome, mean, low, high = settle(d)
    names = [name if isinstance(name, str) else listed(name) for name in (first, second)]
    if outcome == UNMEASURED:
        return Part(UNMEASURED, f"{titled(metric)} of {names[0]} and {names[1]}")
    kept = d.dropna(how="all").dropna(axis=1)
    means = [number(metric, float(x.loc[kept.index, kept.columns].to_numpy().mean())) for x in (a, b)]
    return Part(
        outcome,
        f"{titled(metric)}: {names[0]} {means[0]}, {names[1]} {means[1]}, {gap(metric, mean, low, high)}",
        kept.shape[1],
    )


def gap(metric: str, mean: float, low: float, high: float) -> str:
    """Return how far one side is ahead, in the metric's own direction, with the interval."""
    interval = "one seed" if math.isnan(low) else f"{number(metric, low)} to {number(metric, high)}"
    return f"ahead by {number(metric, mean)} ({interval})"


def keeps(e: Evidence, methods: Sequence[str], metrics: Sequence[str]) -> Part:
    """Ask whether methods keep metrics at moderate sparsities, by the verdict of the whole book."""
    judged = e.judged
    chosen = judged["method"].isin(methods) & judged["metric"].isin(metrics) & (judged["sparsity"] <= MODERATE)
    lines = judged[chosen & judged["dense"].notna()].drop_duplicates(["method", "round", "metric", "shift", "severity"])
    lacking = [m for m in methods if m not in set(lines["method"])] or [
        m for m in metrics if m not in {*lines["metric"]}
    ]
    if lacking:
        return Part(UNMEASURED, f"{listed(methods)} in {len(metrics)} metrics up to {100 * MODERATE:g} %")
    count = lines["outcome"].value_counts()
    lost = lines[lines["outcome"].isin([verdict.LOST, verdict.COLLAPSED])]
    kept, still = count.get(verdict.KEPT, 0), count.get(verdict.NOT_SHOWN, 0)
    what = ", ".join(METRICS[name].title for name in dict.fromkeys(lost["metric"]))
    said = f"{listed(methods)} up to {100 * lines['sparsity'].max():.1f} %: {kept} kept, {len(lost)} lost"
    said += f" ({what})" * bool(what) + f", {still} not shown"
    return Part(FAILS if len(lost) else CANNOT if still else HOLDS, said)


def all_of(parts: Sequence[Part]) -> str:
    """Return the outcome of a claim that needs all of its parts."""
    outcomes = {part.outcome for part in parts}
    return next((o for o in (UNMEASURED, FAILS, CANNOT) if o in outcomes), HOLDS)


# --- words -------------------------------------------------------------------------------------------------------


def listed(methods: Sequence[str]) -> str:
    """Return methods as readers know them: A, B and C."""
    titles = [METHODS[name].title if name != "dense" else "dense" for name in methods]
    return " and ".join(filter(None, [", ".join(titles[:-1]), *titles[-1:]]))


def titled(metric: str) -> str:
    """Return a metric's title and direction."""
    entry = METRICS[metric]
    return f"{entry.title} {entry.arrow}".strip()


def number(metric: str, value: float) -> str:
    """Return a value as readers see it: fractions in percent."""
    return f"{100 * value:.2f} %" if METRICS[metric].unit == "fraction" else f"{value:.3g}"
