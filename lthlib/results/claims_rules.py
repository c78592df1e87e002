"""The rules of what was claimed: what a study's rows say of each claim. Pure functions of an `Evidence` or of two.

A rule is as strict as the claim: "both A and B" fails where either is shown to be false. Networks that have collapsed
decide nothing. What was not measured is said to be so.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from lthlib.metrics import METRICS
from lthlib.results import verdict
from lthlib.results.claims_parts import (
    CANNOT,
    FAILS,
    HOLDS,
    PI,
    UNMEASURED,
    Evidence,
    Part,
    ahead,
    all_of,
    difference,
    gap,
    keeps,
    listed,
    number,
    settle,
    titled,
)

GENERALIZATION = ("test_accuracy", "ood_auroc", "corruption_error", "fgsm_accuracy")
FLATNESS = ("weight_hessian_trace", "input_hessian_trace")


@dataclass(frozen=True)
class Finding:
    """What a rule found: the outcome, what it looked at, and what else should be said beside it."""

    outcome: str
    parts: Sequence[Part] = ()
    more: str = ""


# --- rules of one study ------------------------------------------------------------------------------------------


def _of(*parts: Part, more: str = "") -> Finding:
    return Finding(all_of(parts), parts, more)


def _sparse(e: Evidence, metric: str) -> list[str]:
    return e.measured(dict.fromkeys(m for m in e.rows["method"] if m not in ("dense", "small-dense")), metric)


def matches(e: Evidence) -> Finding:
    """LTH keeps accuracy, and is ahead of RP."""
    return _of(keeps(e, ["lth"], ["test_accuracy"]), ahead(e, "test_accuracy", ["lth"], ["rp"]))


def beats(e: Evidence) -> Finding:
    """Some ticket is more accurate than dense, corrected for the number of tickets."""
    dense = e.of("test_accuracy", ["dense"])
    found = []
    for method in _sparse(e, "test_accuracy"):
        for n, line in e.of("test_accuracy", [method]).iterrows() if not dense.empty else ():
            found.append((method, n, pd.DataFrame([line - dense.iloc[0]], index=[n])))
    if not found:
        return Finding(UNMEASURED)
    settled = [(settle(_with_spread(d, found, m), len(found)), m, n) for m, n, d in found]
    (outcome, mean, low, high), method, n = max(settled, key=lambda s: (s[0][0] == HOLDS, s[0][1]))
    every = {s[0][0] for s in settled}
    outcome = HOLDS if outcome == HOLDS else FAILS if every == {FAILS} else CANNOT
    sparsity = e.rows.loc[(e.rows["method"] == method) & (e.rows["round"] == n), "sparsity"].iloc[0]
    said = f"{titled('test_accuracy')}: {listed([method])} at {100 * sparsity:.1f} %, {_gap(mean, low, high)}"
    more = ""
    if outcome == HOLDS and method == "lth":
        more = (
            "A lottery ticket inherits a mask for which a network was trained many times. Whether that or sparsity "
            "makes it better, only a dense network trained as long in all can tell."
        )
    n_seeds = dense.notna().sum(axis=1).min()
    return Finding(outcome, [Part(outcome, said + f", the best of {len(found)} tickets", int(n_seeds))], more)


def _gap(mean: float, low: float, high: float) -> str:
    return gap("test_accuracy", mean, low, high)


def _with_spread(d: pd.DataFrame, found: Sequence[tuple], method: str) -> pd.DataFrame:
    """Give one ticket's differences the spread of its method: other rounds, moved to its mean."""
    mine = pd.concat([other for name, _, other in found if name == method]).dropna(axis=1)
    return mine.sub(mine.mean(axis=1), axis=0).add(d.mean(axis=1).iloc[0]) if len(mine.columns) else d


def generalizes(e: Evidence) -> Finding:
    """OMP and LTH keep every metric of generalization."""
    return _of(*(keeps(e, [method], GENERALIZATION) for method in ("omp", "lth")))


def hurt_by_corruption(e: Evidence) -> Finding:
    """What corruption adds to the error grows with pruning."""
    metric = "relative_corruption_error"
    part = ahead(e, metric, ["dense"], []) if not _sparse(e, metric) else _worse_than_dense(e, metric)
    return _of(part)


def _worse_than_dense(e: Evidence, metric: str, methods: Sequence[str] = ()) -> Part:
    """Ask whether dense is better than the mean of some methods."""
    methods = list(methods) or _sparse(e, metric)
    sparse, dense = e.of(metric, methods), e.of(metric, ["dense"])
    if sparse.empty or dense.empty:
        return Part(UNMEASURED, f"{titled(metric)} of dense and {listed(methods)}")
    dense = pd.DataFrame([dense.iloc[0]] * len(sparse), index=sparse.index)
    return difference(metric, ["dense"], f"the mean of {listed(methods)}", dense, sparse)


def harder_to_calibrate(e: Evidence) -> Finding:
    """More of calibration is lost for certain than of generalization may be lost at most."""
    judged = e.judged[e.judged["metric"].map(lambda name: METRICS[name].in_verdict)]
    judged = judged[~judged["outcome"].isin(["", verdict.COLLAPSED])]
    judged = judged.drop_duplicates(["method", "round", "metric", "shift", "severity"])
    shares = {}
    for dimension in ("calibration", "generalization"):
        mine = judged.loc[judged["metric"].map(lambda name, d=dimension: METRICS[name].dimension == d), "outcome"]
        if mine.empty or set(judged.loc[mine.index, "metric"]) <= {"test_accuracy"}:
            return Finding(UNMEASURED)
        shares[dimension] = [float((mine == o).mean()) for o in (verdict.KEPT, verdict.LOST, verdict.NOT_SHOWN)]
    (_, lost, still), (_, other_lost, other_still) = shares["calibration"], shares["generalization"]
    outcome = HOLDS if lost > other_lost + other_still else FAILS if other_lost > lost + still else CANNOT
    said = [
        f"{dimension}: {100 * k:.0f} % of verdicts kept, {100 * x:.0f} % lost, {100 * o:.0f} % not shown"
        for dimension, (k, x, o) in shares.items()
    ]
    return Finding(outcome, [Part(outcome, "; ".join(said))])


def calibrated_better(e: Evidence) -> Finding:
    """RP and pruning at initialisation have a lower ECE than LTH and OMP."""
    first, second = ["rp", *e.measured(PI, "ece")], ["lth", "omp"]
    part = ahead(e, "ece", first, second)
    if len(first) == 1 or len(e.measured(["rp", *second], "ece")) < 3:
        part = Part(UNMEASURED, "ECE of RP, one method at initialisation, LTH and OMP")
    if part.outcome == UNMEASURED:
        return _of(part)
    return _of(part, more=_sign(e))


def _sign(e: Evidence) -> str:
    """Say which way the networks are miscalibrated, and what is left of RP's and LTH's difference once that is mended."""
    T = e.values.loc["temperature"] if ("temperature", "lth") in e._there else None
    if T is None:
        return ""
    T = T.to_numpy()
    T = T[np.isfinite(T)]
    way = "overconfident" if T.min() > 1 else "underconfident" if T.max() < 1 else ""
    ranking = f"All networks are {way} here (temperatures {T.min():.2f} to {T.max():.2f}), " if way else ""
    if way == "overconfident":
        ranking += "so that a network that is less sure of itself, and less accurate, has the smaller ECE. "
    elif way:
        ranking += "so that a network that is surer of itself, as the more accurate ones are, has the smaller ECE. "
    else:
        ranking = f"Some networks are too sure and some not sure enough (temperatures {T.min():.2f} to {T.max():.2f}). "
    said = []
    for metric in ("ece", "ece_recalibrated", "nll_recalibrated"):
        rp, lth = e.of(metric, ["rp"]), e.of(metric, ["lth"])
        rounds = rp.index.intersection(lth.index)
        if not len(rounds):
            return ranking
        n = max(rounds)
        said.append([number(metric, float(x.loc[n].mean())) for x in (rp, lth)])
    sparsity = e.rows.loc[(e.rows["method"] == "lth") & (e.rows["round"] == n), "sparsity"].iloc[0]
    return (
        f"{ranking}At {100 * sparsity:.1f} % RP has an ECE of {said[0][0]} and LTH of {said[0][1]}; after temperature "
        f"scaling {said[1][0]} and {said[1][1]}, and an NLL of {said[2][0]} and {said[2][1]}."
    )


def explained_better(e: Evidence) -> Finding:
    """RP and pruning at initialisation have better fidelity and stability than LTH."""
    first = ["rp", *e.measured(PI, "fidelity")]
    if len(first) == 1 or not e.measured(["rp"], "fidelity"):
        return Finding(UNMEASURED)
    parts = [ahead(e, metric, first, ["lth"]) for metric in ("fidelity", "stability")]
    scaled = [ahead(e, metric, first, ["lth"]) for metric in ("fidelity_r2", "stability_relative")]
    left = {HOLDS: "the lag of LTH remains", FAILS: "LTH is ahead", CANNOT: "no difference is shown"}
    lines = [f"{left[p.outcome]} ({p.said})" for p in scaled if p.outcome in left]
    more = "Both errors are in units of probability, which a less sure network has smaller for nothing. "
    return _of(*parts, more=more + f"Rescaled, {'; '.join(lines)}." if lines else "")


def composed(e: Evidence) -> Finding:
    """The best formulas fit LTH's units better than those of a network before training."""
    trained, before = e.of("composition_iou", ["lth"]), e.of("composition_iou_random", ["lth"])
    if trained.empty or before.empty:
        return Finding(UNMEASURED)
    part = difference("composition_iou", "LTH", "before training", trained, before)
    beside = ahead(e, "composition_iou", ["lth"], ["dense"])
    more = {HOLDS: "LTH is ahead of dense", FAILS: "LTH is behind dense", CANNOT: "from dense no difference is shown"}
    return _of(part, more=f"Beside the dense network, {more[beside.outcome]} ({beside.said})." if beside.seeds else "")


def init_less_flat(e: Evidence) -> Finding:
    """Pruning at initialisation is less flat than LTH, and LTH keeps the flatness of dense."""
    pi = e.measured(PI, FLATNESS[0])
    if not pi:
        return Finding(UNMEASURED)
    parts = [ahead(e, metric, ["lth"], pi) for metric in FLATNESS]
    return _of(*parts, keeps(e, ["lth"], FLATNESS), more=_relative(e, ["lth"], pi))


def rigl_less_flat(e: Evidence) -> Finding:
    """RigL and GraSP are less flat than the other methods at the same sparsity."""
    parts = []
    for method in ("rigl", "grasp"):
        others = [m for m in _sparse(e, FLATNESS[0]) if m not in ("rigl", "grasp")]
        if not others or not e.measured([method], FLATNESS[0]):
            parts.append(Part(UNMEASURED, f"flatness of {listed([method])} and of other methods"))
            continue
        parts += [ahead(e, metric, others, [method]) for metric in FLATNESS]
    if parts[-1].outcome == UNMEASURED and parts[0].outcome != UNMEASURED:
        parts = [part for part in parts if part.outcome != UNMEASURED]  # GraSP stands in brackets in the claim
    return _of(*parts)


def _relative(e: Evidence, first: Sequence[str], second: Sequence[str]) -> str:
    part = ahead(e, "relative_flatness", first, second)
    return f"In relative flatness, which a rescaled layer does not change: {part.said}." if part.seeds else ""


def passes(e: Evidence) -> Finding:
    """Some ticket between 20 % and 99.08 % keeps every metric of all four dimensions."""
    voting = {METRICS[name].dimension for name in set(e.rows["metric"]) - {"test_accuracy"} if METRICS[name].in_verdict}
    if len(voting) < 4:
        return Finding(UNMEASURED)
    found = verdict.lth_pass(e.judged)
    found = found[found["sparsity"].between(0.19, 0.9909)]
    count = found["outcome"].value_counts()
    won, still = count.get(verdict.KEPT, 0), count.get(verdict.NOT_SHOWN, 0)
    outcome = HOLDS if won else CANNOT if still else FAILS
    said = f"of {len(found)} tickets {won} are shown to keep every metric, of {still} it is not shown, the others lose"
    return Finding(outcome, [Part(outcome, said)])


def beats_small(e: Evidence) -> Finding:
    """LTH is ahead of small dense in some metric of the paper and behind in none."""
    votes = [name for name in dict.fromkeys(e.rows["metric"]) if METRICS[name].in_verdict]
    parts = [ahead(e, name, ["lth"], ["small-dense"]) for name in votes]
    parts = [part for part in parts if part.outcome != UNMEASURED]
    if not parts:
        return Finding(UNMEASURED)
    better, worse = ([part for part in parts if part.outcome == o] for o in (HOLDS, FAILS))
    outcome = CANNOT if bool(better) == bool(worse) else HOLDS if better else FAILS
    more = f"Of {len(parts)} metrics LTH is shown ahead in {len(better)} and behind in {len(worse)}."
    return Finding(outcome, parts, more)


def few_pay(e: Evidence) -> Finding:
    """The worst class loses more accuracy than the average."""
    worst = "worst_class_accuracy"
    if worst not in METRICS or not (methods := _sparse(e, worst)):
        return Finding(UNMEASURED)
    falls = []
    for metric in (worst, "test_accuracy"):
        sparse, dense = e.of(metric, methods), e.of(metric, ["dense"])
        if sparse.empty or dense.empty:
            return Finding(UNMEASURED)
        falls.append(dense.iloc[0] - sparse)
    outcome, mean, low, high = settle(falls[0] - falls[1])
    means = [number(worst, float(fall.to_numpy().mean())) for fall in falls]
    said = f"the worst class loses {means[0]}, all together {means[1]}, {gap(worst, mean, low, high)}"
    return Finding(outcome, [Part(outcome, said, falls[0].shape[1])])


# --- rules of several studies ------------------------------------------------------------------------------------


def _lost_accuracy(e: Evidence, methods: Sequence[str]) -> pd.DataFrame:
    """Return which share of the distance to guessing is lost, rounds x seeds."""
    sparse, dense = e.of("test_accuracy", methods), e.of("test_accuracy", ["dense"])
    if sparse.empty or dense.empty:
        return pd.DataFrame()
    return (dense.iloc[0] - sparse) / (dense.iloc[0] - 1 / e.n_classes)


def _shared(pair: Sequence[Evidence], metric: str) -> list[str]:
    theirs = _sparse(pair[1], metric)
    return [name for name in _sparse(pair[0], metric) if name in theirs]


def _between(metric: str, pair: Sequence[Evidence], what: str, values: Sequence[pd.DataFrame], sign: int) -> Part:
    """Ask whether sign x (the second study's values) is above sign x (the first's); seeds of two studies are paired."""
    if any(value.empty for value in values):
        return Part(UNMEASURED, what)
    outcome, mean, low, high = settle(sign * (values[1] - values[0]))
    if math.isnan(mean):
        return Part(UNMEASURED, what)
    means = [number(metric, float(value.to_numpy().mean())) for value in values]
    said = f"{what}: {means[0]} ({pair[0].label}), {means[1]} ({pair[1].label}), {gap(metric, mean, low, high)}"
    return Part(outcome, said, len(values[0].columns.intersection(values[1].columns)))


def wide_withstand(pair: Sequence[Evidence]) -> Finding:
    """Corruption adds less to the error of the widest networks than to that of the narrowest."""
    metric = "relative_corruption_error"
    methods = ["dense"], _shared(pair, metric)
    return _of(*(_between(metric, pair, _what(metric, m), [e.of(metric, m) for e in pair], -1) for m in methods))


def _what(metric: str, methods: Sequence[str]) -> str:
    return f"{titled(metric)} of {listed(methods)}"


def wide_win(pair: Sequence[Evidence]) -> Finding:
    """The widest networks tell foreign images better, and lose less accuracy at the same sparsity."""
    metric, methods = "ood_auroc", _shared(pair, "ood_auroc")
    foreign = _between(metric, pair, _what(metric, methods), [e.of(metric, methods) for e in pair], 1)
    lost = [_lost_accuracy(e, _shared(pair, "test_accuracy")) for e in pair]
    return _of(foreign, _between("test_accuracy", pair, "share of the distance to guessing that is lost", lost, -1))


def many_harder(pair: Sequence[Evidence]) -> Finding:
    """With most classes a larger share of the distance to guessing is lost than with fewest."""
    lost = [_lost_accuracy(e, _shared(pair, "test_accuracy")) for e in pair]
    return _of(_between("test_accuracy", pair, "share of the distance to guessing that is lost", lost, 1))
