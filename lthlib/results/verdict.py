"""Who keeps what: a test of non-inferiority for each metric, LTH-PASS across metrics, and the normalised scorecard.

The paper draws winning and degraded regions and calls a sparse network that is no worse than its dense parent in
everything an LTH-PASS, but publishes no thresholds. Those here are ours; each is a parameter with its reason.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.stats import t as student

from lthlib.core.errors import UserError, choose, shown
from lthlib.metrics import METRICS
from lthlib.pruning import METHODS
from lthlib.results.noninferiority import CASE, KEPT, LOST, NOT_SHOWN, TICKET, decided, pooled, votes, with_images

COLLAPSED = "collapsed"
WORSE = pd.CategoricalDtype([KEPT, NOT_SHOWN, LOST, COLLAPSED], ordered=True)
"""Outcomes from the best to the worst."""
KEYS = [*TICKET, "dimension", *CASE]
MOST_TIMES = 100  # as many images or seeds as were measured: more is no advice


@dataclass(frozen=True)
class Thresholds:
    """When a sparse network counts as no worse than its dense parent, and when that counts as shown.

    A metric's shortfall is how much worse the sparse mean over seeds is than the dense mean, in the metric's own
    direction. A tolerance of 0 asks for proof that there is none at all.

    Attributes:
        tolerance: For metrics that are fractions (accuracy, ROC-AUC, ECE, ...): an absolute shortfall of one
            percentage point, what the pruning literature calls "matching" in practice; 2/C of it for a mean over C
            classes (SCE), which is so much smaller than its counterpart without classes.
        relative_tolerance: For metrics with another unit (nats, curvatures, ...): a shortfall of five percent of the
            dense mean, since no absolute number would suit every unit.
        alpha: The probability, at most, of calling a metric kept whose true shortfall is above the tolerance, and of
            calling any metric of a ticket lost where none is: one in twenty, by convention.
        collapse: A ticket has collapsed when its test accuracy has lost more than this share of the dense network's
            distance to guessing; half-way, it is another classifier, and its other numbers say nothing of pruning.
    """

    tolerance: float = 0.01
    relative_tolerance: float = 0.05
    alpha: float = 0.05
    collapse: float = 0.5

    def __post_init__(self) -> None:
        for name, below in (("tolerance", math.inf), ("relative_tolerance", 1), ("alpha", 0.5), ("collapse", math.inf)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < below:
                limit = "" if below == math.inf else f" to below {below:g}"
                raise UserError(f"Threshold {name} is {value!r}; it must be a number from 0{limit or ' on'}.")
        if self.alpha == 0:
            raise UserError("Threshold alpha is 0; no measurement shows anything with certainty: 0.05, for instance.")

    def allowed(self, metric: str, dense: float, n_classes: int) -> float:
        """Return the shortfall that is tolerated of a metric, given its dense mean."""
        entry = METRICS[metric]
        if entry.unit != "fraction":
            return self.relative_tolerance * abs(dense)
        return self.tolerance * (2 / n_classes if entry.over_classes else 1)


def thresholds_from(given: object) -> Thresholds:
    """Return thresholds from plain values, the defaults in the place of those not given."""
    if not isinstance(given, Mapping):
        raise UserError(f"thresholds is {shown(given)}; it must be a mapping of {', '.join(vars(Thresholds()))}.")
    for name in given:
        choose(name, vars(Thresholds()), "threshold")
    return Thresholds(**given)


def judge(
    rows: pd.DataFrame,
    replicates: Mapping[str, Mapping[str, np.ndarray]],
    n_classes: int,
    thresholds: Thresholds | None = None,
) -> pd.DataFrame:
    """Judge every method x round x metric against the dense runs.

    A metric is *kept* when the interval of its shortfall lies below the tolerance, *lost* when it lies above, *not
    shown* when it does neither. The interval is one-sided at ``alpha`` on either side. "Kept" needs no correction for
    the number of metrics: whoever claims that *all* are kept is wrong only if a given one is wrongly called so, with
    probability ``alpha`` at most (an intersection-union test; Berger, 1982). "Lost" does, since the more one looks the
    more one finds: its p-values are corrected over the metrics of a ticket that have a vote (Holm, 1979). Metrics
    without a vote are judged one at a time.

    Args:
        rows: The table of `lthlib.results.collect.Results`: a line a number, dense tickets (round 0) among them.
        replicates: By ticket, arrays among which are those of `lthlib.metrics.resampling.kept`. Without them only the
            trainings are known to differ, and the verdict is about these images.
        n_classes: Number of classes, for the accuracy of guessing.
        thresholds: The allowances; the defaults of `Thresholds`.

    Returns:
        One line for each method, round, metric, shift and severity, dense excluded: ``mean``, ``low`` and ``high`` over
        seeds (`spread`), ``dense``, ``dense_low``, ``dense_high``, ``sparsity``; ``shortfall`` (positive: worse than
        dense) with its bounds ``least`` and ``most``, ``allowed``, and the ``outcome``; what it is about (``scope``);
        the standard errors over trainings and images (``seeds_error``, ``images_error``); ``images_needed`` and
        ``seeds_needed`` to decide what is not shown, each with the other as it is (infinite: that alone cannot);
        ``power``, the probability that a network equal to its parent is shown to keep the metric, and what would make
        it 80 % (``images_for_power``, ``seeds_for_power``); and ``older``, what
        the rule of earlier editions (forgive two standard errors over seeds) would have said. Metrics without
        direction have an empty outcome.
    """
    thresholds = thresholds or Thresholds()
    if rows.empty:
        raise UserError("There are no rows to judge.")
    summary = summarise(rows)
    for (dataset, arch), of in summary.groupby(["dataset", "arch"]):
        if "dense" not in set(of["method"]):
            raise UserError(f"There is no dense run of {dataset} {arch} among the rows; a verdict compares with it.")
    gone = collapsed(summary, n_classes, thresholds.collapse)
    standing = ~pd.MultiIndex.from_frame(summary[TICKET]).isin(gone)
    lines = _beside_dense(pooled(summary, standing), n_classes, thresholds)
    lines = with_images(lines, rows, replicates)
    lines = decided(lines, thresholds.alpha)
    fallen = pd.MultiIndex.from_frame(lines[TICKET]).isin(gone)
    contest = lines["sign"].notna()
    for column in ("outcome", "older"):
        lines[column] = lines[column].where(contest, "").mask(fallen & contest, COLLAPSED)
    return lines.drop(columns=["sign", "weight", "bias", "step", "variance", "dense_variance", "pooled_df", "dense_df"])


def _beside_dense(summary: pd.DataFrame, n_classes: int, thresholds: Thresholds) -> pd.DataFrame:
    """Set every sparse line beside its dense parent's (NaN where only the sparse network was measured)."""
    beside = ["dataset", "arch", "dimension", *CASE]
    names = {"mean": "dense", "low": "dense_low", "high": "dense_high", "error": "dense_error", "seeds": "dense_seeds"}
    names |= {"variance": "dense_variance", "pooled_df": "dense_df"}
    dense = summary.loc[summary["method"] == "dense", [*beside, *names]].rename(columns=names)
    lines = summary[summary["method"] != "dense"].merge(dense, on=beside, how="left")
    entries = [METRICS[name] for name in lines["metric"]]
    lines["sign"] = np.array([{True: 1, False: -1, None: np.nan}[m.higher_is_better] for m in entries], float)
    fraction = np.array([m.unit == "fraction" for m in entries], bool)
    lines["shortfall"] = lines["sign"] * (lines["dense"] - lines["mean"])
    pairs = zip(lines["metric"], lines["dense"], strict=True)
    lines["allowed"] = np.array([thresholds.allowed(*pair, n_classes) for pair in pairs], float)
    # A relative allowance is as uncertain as the dense mean, which therefore has this weight in shortfall - allowed.
    share = np.where(fraction, 0.0, thresholds.relative_tolerance)
    lines["weight"] = 1 - lines["sign"] * share * np.sign(lines["dense"])
    forgiven = np.maximum(lines["allowed"], 2 * np.hypot(lines["error"], lines["dense_error"]))
    lines["older"] = np.where(lines["shortfall"] <= forgiven, "winning", "degraded")
    return lines


def what_would_decide(line: Mapping[str, object]) -> str:
    """Say of a line of `judge` that is not shown how many images or seeds would decide it, at the present spread."""
    if line["outcome"] != NOT_SHOWN:
        return ""
    if math.isnan(line["dense"]):
        return "the dense parent's number, which is missing"
    if not line["scope"]:
        return "a second seed, or a measurement that keeps what resampled images say (measure again)"
    counts = {name: (line[f"{name}_needed"], line[name]) for name in ("images", "seeds")}
    enough = [f"{n:,.0f} {name} ({now:,.0f} now)" for name, (n, now) in counts.items() if n < MOST_TIMES * now]
    if enough:
        return " or ".join(enough)
    if line["times_needed"] >= MOST_TIMES:
        return f"nothing within {MOST_TIMES} times what was measured: the shortfall is too near the tolerance"
    return " and ".join(
        f"{math.ceil(line['times_needed'] * now):,} {name} ({now:,.0f} now)"
        for name, (needed, now) in counts.items()
        if needed > 0
    )


def collapsed(summary: pd.DataFrame, n_classes: int, share: float) -> list[tuple]:
    """Name the tickets that have collapsed; where accuracy was not measured, none is known to have."""
    accuracy = summary[(summary["metric"] == "test_accuracy") & (summary["shift"] == "none")]
    accuracy = accuracy.groupby(TICKET)["mean"].first()
    dense = {key[:2]: value for key, value in accuracy.items() if key[2] == "dense"}
    return [
        key
        for key, value in accuracy.items()
        if key[2] != "dense" and key[:2] in dense and dense[key[:2]] - value > share * (dense[key[:2]] - 1 / n_classes)
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
    many = summary["seeds"] >= 5
    reach = student.ppf(0.975, np.maximum(summary["seeds"] - 1, 1)) * summary["error"]
    low = (summary["mean"] - reach).where(many, summary["least"])
    return low, (summary["mean"] + reach).where(many, summary["most"])


def lth_pass(judged: pd.DataFrame) -> pd.DataFrame:
    """Say which tickets win everything: LTH-PASS is every metric of the paper kept that was measured in the study.

    Returns:
        One line a method and round: ``sparsity``, ``passed``, the ``outcome`` of all together (lost where any is; kept
        where all are), ``kept`` and ``of`` (how many), ``lost`` and ``open`` (names; open: not shown).
    """
    counted = votes(judged)
    is_sparse = ~counted["method"].isin([name for name, method in METHODS.items() if method.family == "dense"])
    counted = counted[(counted["outcome"] != "") & is_sparse].drop_duplicates([*TICKET, *CASE])
    asked = counted.drop_duplicates(["dataset", "arch", *CASE]).groupby(["dataset", "arch"]).size()
    lines = []
    for key, group in counted.groupby(TICKET, sort=False):
        worst, of = group["outcome"].astype(WORSE).max(), int(asked[key[:2]])
        lost, still = (
            list(group.loc[group["outcome"].isin(which), "metric"].unique())
            for which in ([LOST, COLLAPSED], [NOT_SHOWN])
        )
        n_kept = int((group["outcome"] == KEPT).sum())
        outcome = NOT_SHOWN if worst == KEPT and n_kept < of else worst
        lines.append((*key, group["sparsity"].iloc[0], outcome == KEPT, outcome, n_kept, of, lost, still))
    return pd.DataFrame(lines, columns=[*TICKET, "sparsity", "passed", "outcome", "kept", "of", "lost", "open"])


def reach(judged: pd.DataFrame, by: str = "metric") -> pd.DataFrame:
    """Return the highest sparsity up to which each method is shown to keep, without a break, by metric or dimension.

    The table is methods x metrics, or dimensions (all of whose metrics must be kept); only metrics in the verdict
    count. NaN where not even the lowest sparsity is reached.
    """
    return _climbed(judged, by, lambda kept, _: kept["sparsity"].iloc[-1] if len(kept) else math.nan)


def ends(judged: pd.DataFrame, by: str = "metric") -> pd.DataFrame:
    """Return the outcome that ends each `reach`, in the same table; "" where it goes to the last round."""
    return _climbed(judged, by, lambda _, others: others["outcome"].iloc[0] if len(others) else "")


def _climbed(judged: pd.DataFrame, by: str, say: Callable[[pd.DataFrame, pd.DataFrame], object]) -> pd.DataFrame:
    """Ask of the rounds that are kept without a break and of the others, methods x metrics or dimensions."""
    counted = votes(judged)
    if by == "dimension":
        counted = counted.assign(dimension=counted["metric"].map(lambda name: METRICS[name].dimension))
    ranked = counted.astype({"outcome": WORSE}).groupby(["method", by, "round"], sort=False)
    rounds = ranked.agg(outcome=("outcome", "max"), sparsity=("sparsity", "mean"))
    table: dict[str, dict[str, object]] = {}
    for (method, column), lines in rounds.groupby(level=[0, 1], sort=False):
        lines = lines.sort_index(level="round")
        kept = (lines["outcome"] == KEPT).cumprod().astype(bool)
        table.setdefault(method, {})[column] = say(lines[kept], lines[~kept])
    return pd.DataFrame.from_dict(table, orient="index")


def standing_round(judged: pd.DataFrame) -> int:
    """Return the highest round at which at least half of the methods have not collapsed, else the lowest."""
    each = judged[judged["outcome"] != ""].drop_duplicates(["method", "round"])
    share = (each["outcome"] != COLLAPSED).groupby(each["round"]).mean()
    standing = share[share >= 0.5]
    return int(standing.index.max() if len(standing) else share.index.min())


def scorecard(summary: pd.DataFrame) -> pd.DataFrame:
    """Scale each metric of the verdict to [0, 1], 1 the best: (x - min) / (max - min), as in the paper's Fig. 1.

    Methods x metrics, of a summary restricted to what is to be compared (one round, and dense); a metric in which all
    are equal is 1 for all.
    """
    table = votes(summary).pivot_table(index="method", columns="metric", values="mean", sort=False)
    turned = table * [1 if METRICS[name].higher_is_better else -1 for name in table]
    best, span = turned.max(), turned.max() - turned.min()
    return 1 - (best - turned) / span.replace(0, 1)
