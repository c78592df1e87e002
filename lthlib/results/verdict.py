"""Who wins: regions of each metric, LTH-PASS across metrics, and the normalised scorecard.

The paper draws winning and degraded regions and calls a sparse network that is no worse than its dense parent in
everything an LTH-PASS, but publishes no thresholds. Those here are ours; each is a parameter with its reason.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from lthlib.core.errors import UserError, choose, shown
from lthlib.metrics import METRICS

WINNING, DEGRADED, COLLAPSED = "winning", "degraded", "collapsed"
KEYS = ["dataset", "arch", "method", "round", "dimension", "metric", "shift", "severity"]


@dataclass(frozen=True)
class Thresholds:
    """When a sparse network counts as no worse than its dense parent.

    A metric's shortfall is how much worse the sparse mean over seeds is than the dense mean, in the metric's own
    direction. It is forgiven up to the larger of two allowances.

    Attributes:
        tolerance: For metrics that are fractions (accuracy, ROC-AUC, ECE, ...): an absolute shortfall of one
            percentage point, what the pruning literature calls "matching" in practice; 2/C of it for a mean over C
            classes (SCE), which is so much smaller than its counterpart without classes.
        relative_tolerance: For metrics with another unit (nats, curvatures, ...): a shortfall of five percent of the
            dense mean, since no absolute number would suit every unit.
        k: Standard errors of the difference of the two means that are put down to chance: two, about 95 % with many
            seeds, 82 % with two of each. It matters only with two seeds at least.
        collapse: A ticket has collapsed when its test accuracy has lost more than this share of the dense network's
            distance to guessing; half-way, it is another classifier, and its other numbers say nothing of pruning.
    """

    tolerance: float = 0.01
    relative_tolerance: float = 0.05
    k: float = 2.0
    collapse: float = 0.5

    def __post_init__(self) -> None:
        for name in ("tolerance", "relative_tolerance", "k", "collapse"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
                raise UserError(f"Threshold {name} is {value!r}; it must be a number from 0 on.")


def thresholds_from(given: object) -> Thresholds:
    """Return thresholds from plain values, the defaults in the place of those not given.

    Raises:
        UserError: For an unknown one, or a value that cannot be.
    """
    if not isinstance(given, Mapping):
        raise UserError(f"thresholds is {shown(given)}; it must be a mapping of {', '.join(vars(Thresholds()))}.")
    for name in given:
        choose(name, vars(Thresholds()), "threshold")
    return Thresholds(**given)


def regions(rows: pd.DataFrame, n_classes: int, thresholds: Thresholds | None = None) -> pd.DataFrame:
    """Judge every method x round x metric against the dense runs.

    Args:
        rows: The table of `lthlib.results.evaluate.Results`: a line a number, dense tickets (round 0) among them.
        n_classes: Number of classes, for the accuracy of guessing.
        thresholds: The allowances; the defaults of `Thresholds`.

    Returns:
        One line for each method, round, metric, shift and severity, dense excluded: ``mean``, ``low`` and ``high`` over
        seeds (`spread`), ``dense``, ``dense_low``, ``dense_high``, ``shortfall`` (positive: worse than dense),
        ``allowed``, ``region`` and ``sparsity``. Metrics without direction have an empty region.
    """
    thresholds = thresholds or Thresholds()
    summary = summarise(rows)
    dense = summary[summary["method"] == "dense"].set_index([k for k in KEYS if k not in ("method", "round")])
    if dense.empty:
        raise UserError("There is no dense run among the rows; regions compare with it.")
    sparse = summary[summary["method"] != "dense"].reset_index(drop=True)
    parent = dense.loc[list(map(tuple, sparse[dense.index.names].to_numpy(dtype=object)))] if len(sparse) else dense
    lines = (
        sparse.assign(
            dense=parent["mean"].to_numpy(), dense_low=parent["low"].to_numpy(), dense_high=parent["high"].to_numpy()
        )
        if len(sparse)
        else sparse.assign(dense=[], dense_low=[], dense_high=[])
    )
    better = lines["metric"].map(lambda name: METRICS[name].higher_is_better)
    sign = better.map({True: 1.0, False: -1.0, None: np.nan}).astype(float)
    lines["shortfall"] = sign * (lines["dense"] - lines["mean"])
    fraction = lines["metric"].map(lambda name: METRICS[name].unit == "fraction").astype(bool)
    over_classes = lines["metric"].map(lambda name: METRICS[name].over_classes).astype(bool)
    absolute = thresholds.tolerance * np.where(over_classes, 2 / n_classes, 1.0)
    allowance = np.where(fraction, absolute, thresholds.relative_tolerance * lines["dense"].abs())
    error = np.hypot(lines["error"], parent["error"].to_numpy() if len(sparse) else [])
    lines["allowed"] = np.maximum(allowance, thresholds.k * error)
    lines["region"] = np.where(lines["shortfall"] <= lines["allowed"], WINNING, DEGRADED)
    lines["region"] = lines["region"].where(sign.notna(), "")
    gone = _collapsed(summary, n_classes, thresholds.collapse)
    fallen = pd.MultiIndex.from_frame(lines[["dataset", "arch", "method", "round"]]).isin(gone)
    lines["region"] = lines["region"].mask(fallen & sign.notna().to_numpy(), COLLAPSED)
    return lines


def _collapsed(summary: pd.DataFrame, n_classes: int, share: float) -> list[tuple]:
    accuracy = summary[(summary["metric"] == "test_accuracy") & (summary["shift"] == "none")]
    accuracy = accuracy.groupby(["dataset", "arch", "method", "round"])["mean"].first()
    dense = accuracy.xs("dense", level="method").droplevel("round")
    return [
        key
        for key, value in accuracy.items()
        if key[2] != "dense" and dense[key[:2]] - value > share * (dense[key[:2]] - 1 / n_classes)
    ]


def summarise(rows: pd.DataFrame) -> pd.DataFrame:
    """Reduce rows over seeds to ``mean``, ``low``, ``high``, ``error`` (standard error; 0 for one seed), ``seeds``."""
    grouped = rows.groupby(KEYS, sort=False)
    summary = grouped.agg(
        mean=("value", "mean"),
        deviation=("value", "std"),
        seeds=("value", "size"),
        least=("value", "min"),
        most=("value", "max"),
        sparsity=("sparsity", "mean"),
        n=("n", "first"),
    ).reset_index()
    summary["error"] = (summary.pop("deviation") / np.sqrt(summary["seeds"])).fillna(0.0)
    low, high = spread(summary)
    return summary.drop(columns=["least", "most"]).assign(low=low, high=high)


def spread(summary: pd.DataFrame) -> tuple[pd.Series, pd.Series]:
    """Return the interval drawn around a mean: the range of the seeds up to four, from five on 95 % of Student's t.

    Below five seeds Student's interval is so wide (2 seeds: 9 standard deviations either side) that it hides the data;
    the range shows what was seen and claims no more.
    """
    from scipy.stats import t

    many = summary["seeds"] >= 5
    reach = t.ppf(0.975, np.maximum(summary["seeds"] - 1, 1)) * summary["error"]
    low = (summary["mean"] - reach).where(many, summary["least"])
    return low, (summary["mean"] + reach).where(many, summary["most"])


def lth_pass(judged: pd.DataFrame, metrics: Iterable[str] | None = None) -> pd.DataFrame:
    """Say which tickets win everything: LTH-PASS is winning in every metric of the paper that is present.

    Args:
        judged: As `regions` returns it.
        metrics: Which metrics count; by default those with ``in_verdict``.

    Returns:
        One line a method and round: ``sparsity``, ``passed``, ``won`` and ``of`` (how many), ``lost`` (names).
    """
    wanted = set(metrics) if metrics is not None else {m.name for m in METRICS.values() if m.in_verdict}
    counted = judged[judged["metric"].isin(wanted) & (judged["region"] != "")].copy()
    counted = counted.drop_duplicates(["dataset", "arch", "method", "round", "metric", "shift", "severity"])
    counted["win"] = counted["region"] == WINNING
    lines = []
    for key, group in counted.groupby(["dataset", "arch", "method", "round"], sort=False):
        lost = list(dict.fromkeys(group.loc[~group["win"], "metric"]))
        lines.append(
            (*key, group["sparsity"].iloc[0], bool(group["win"].all()), int(group["win"].sum()), len(group), lost)
        )
    return pd.DataFrame(
        lines, columns=["dataset", "arch", "method", "round", "sparsity", "passed", "won", "of", "lost"]
    )


def reach(judged: pd.DataFrame, by: str = "metric") -> pd.DataFrame:
    """Return the highest sparsity up to which each method wins without a break, by metric or dimension.

    Args:
        judged: As `regions` returns it; only metrics in the verdict count.
        by: ``"metric"`` or ``"dimension"`` (all of its metrics must win).

    Returns:
        Table methods x metrics (or dimensions) of sparsities; NaN where not even the lowest sparsity wins.
    """
    counted = judged[judged["metric"].map(lambda name: METRICS[name].in_verdict)]
    if by == "dimension":
        counted = counted.assign(dimension=counted["metric"].map(lambda name: METRICS[name].dimension))
    won = counted.assign(win=counted["region"] == WINNING).groupby(["method", by, "round"], sort=False)
    table: dict[str, dict[str, float]] = {}
    for (method, column), group in won.agg(win=("win", "all"), sparsity=("sparsity", "mean")).groupby(
        level=[0, 1], sort=False
    ):
        group = group.sort_index(level="round")
        unbroken = group[group["win"].cumprod().astype(bool)]
        table.setdefault(method, {})[column] = unbroken["sparsity"].iloc[-1] if len(unbroken) else math.nan
    return pd.DataFrame.from_dict(table, orient="index")


def standing_round(judged: pd.DataFrame) -> int:
    """Return the highest round at which at least half of the methods have not collapsed, else the lowest."""
    each = judged[judged["region"] != ""].drop_duplicates(["method", "round"])
    share = (each["region"] != COLLAPSED).groupby(each["round"]).mean()
    standing = share[share >= 0.5]
    return int(standing.index.max() if len(standing) else share.index.min())


def scorecard(summary: pd.DataFrame) -> pd.DataFrame:
    """Scale each metric of the verdict to [0, 1], 1 the best: (x - min) / (max - min), as in the paper's Fig. 1.

    Args:
        summary: As `summarise` returns it, restricted to what is to be compared (one round, and dense).

    Returns:
        Table methods x metrics; a metric in which all are equal is 1 for all.
    """
    counted = summary[summary["metric"].map(lambda name: METRICS[name].in_verdict)]
    table = counted.pivot_table(index="method", columns="metric", values="mean", sort=False)
    for name in table:
        low, high = table[name].min(), table[name].max()
        scaled = (table[name] - low) / (high - low) if high > low else table[name] * 0 + 1
        table[name] = scaled if METRICS[name].higher_is_better or high == low else 1 - scaled
    return table
