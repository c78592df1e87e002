"""The rules of what was claimed: what a study's rows say of each claim. Pure functions of an `Evidence` or of two.

A rule is as strict as the claim: "both A and B" fails where either is shown to be false. Networks that have collapsed
decide nothing. What was not measured is said to be so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lthlib.metrics import METRICS
from lthlib.pruning import METHODS
from lthlib.results import verdict
from lthlib.results.claims_parts import (
    CANNOT,
    FAILS,
    HOLDS,
    PI,
    UNMEASURED,
    Evidence,
    Mean,
    Part,
    ahead,
    all_of,
    difference,
    gap,
    keeps,
    listed,
    mean_of,
    number,
    percent,
    settle,
    standing,
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
    found = (m for m in e.rows["method"] if METHODS[m].family != "dense" and m != "small-dense")
    return e.measured(dict.fromkeys(found), metric)


def matches(e: Evidence) -> Finding:
    """LTH keeps accuracy, and is ahead of RP."""
    return _of(keeps(e, ["lth"], ["test_accuracy"]), ahead(e, "test_accuracy", ["lth"], ["rp"]))


def beats(e: Evidence) -> Finding:
    """Some ticket is more accurate than dense, corrected for the number of tickets."""
    cells = e.cells("test_accuracy")
    tickets = [key for key in cells.index if key[0] in _sparse(e, "test_accuracy")]
    dense = mean_of(cells, ["dense"], [0])
    if dense is None or not tickets:
        return Finding(UNMEASURED)
    each = [Mean(cells.loc[key].dropna(), dense.variance, dense.df) - dense for key in tickets]
    outcomes = [settle(d, len(tickets))[0] for d in each]
    best = max(range(len(each)), key=lambda i: (outcomes[i] == HOLDS, each[i].value))
    outcome = HOLDS if HOLDS in outcomes else FAILS if set(outcomes) == {FAILS} else CANNOT
    method, n = tickets[best]
    where = f"{listed([method])} at {percent(e, method, n)}"
    told = gap("test_accuracy", each[best].value, *settle(each[best], len(tickets))[1:])
    said = f"{titled('test_accuracy')}: dense {number('test_accuracy', dense.value)}, {where} {told}"
    long = mean_of(cells, ["dense-long"], [n])
    if long is None:
        more = (
            "A lottery ticket inherits a mask for which networks were trained before. Whether that or sparsity makes "
            "it better, only a dense network trained as long in all can tell."
        )
    else:
        beside = Mean(cells.loc[tickets[best]].dropna(), long.variance, long.df) - long
        more = (
            f"A dense network trained as long as this ticket's whole history reaches "
            f"{number('test_accuracy', long.value)}: beside it the ticket is "
            f"{gap('test_accuracy', beside.value, *settle(beside)[1:])}."
        )
    parts = [Part(outcome, f"{said}, the best of {len(tickets)} tickets", len(each[best].each))]
    return Finding(outcome, parts, more if outcome == HOLDS and method == "lth" else "")


def generalizes(e: Evidence) -> Finding:
    """OMP and LTH keep every metric of generalization."""
    return _of(*(keeps(e, [method], GENERALIZATION) for method in ("omp", "lth")))


def hurt_by_corruption(e: Evidence) -> Finding:
    """What corruption adds to the error grows with pruning."""
    metric = "relative_corruption_error"
    return _of(ahead(e, metric, ["dense"], _sparse(e, metric)))


def harder_to_calibrate(e: Evidence) -> Finding:
    """More of calibration is lost for certain than of generalization may be lost at most."""
    if e.judged.empty:
        return Finding(UNMEASURED)
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
    """Say which way the networks are miscalibrated, and what mending that leaves of RP's and LTH's difference."""
    T = e.cells("temperature").to_numpy()
    T = T[np.isfinite(T)]
    if not len(T):
        return ""
    way = "overconfident" if T.min() > 1 else "underconfident" if T.max() < 1 else ""
    ranking = f"All networks are {way} here (temperatures {T.min():.2f} to {T.max():.2f}), " if way else ""
    if way == "overconfident":
        ranking += "so that a network that is less sure of itself has the smaller ECE. "
    elif way:
        ranking += "so that a network that is surer of itself has the smaller ECE. "
    else:
        ranking = f"Some networks are too sure and some not sure enough (temperatures {T.min():.2f} to {T.max():.2f}). "
    metrics = ("ece", "ece_recalibrated", "nll_recalibrated")
    rounds = standing(e.cells(metrics[-1]), ["rp"], ["lth"])
    means = [[mean_of(e.cells(metric), [m], rounds[-1:]) for m in ("rp", "lth")] for metric in metrics]
    if not rounds or any(None in pair for pair in means):
        return ranking.strip()
    said = [" and ".join(number(name, m.value) for m in of) for name, of in zip(metrics, means, strict=True)]
    return (
        f"{ranking}At {percent(e, 'lth', rounds[-1])} RP and LTH have an ECE of {said[0]}; after temperature scaling "
        f"of {said[1]}, and an NLL of {said[2]}."
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
    cells, before = e.cells("composition_iou"), e.cells("composition_iou_random")
    rounds = standing(cells, ["lth"])
    trained, random = mean_of(cells, ["lth"], rounds), mean_of(before, ["lth"], rounds)
    part = difference("composition_iou", ["LTH", "before training"], trained, random)
    beside = ahead(e, "composition_iou", ["lth"], ["dense"])
    more = {HOLDS: "LTH is ahead of dense", FAILS: "LTH is behind dense", CANNOT: "no difference is shown"}
    return _of(part, more=f"Beside dense, {more[beside.outcome]} ({beside.said})." if beside.seeds else "")


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
    if len(voting) < 4 or e.judged.empty:
        return Finding(UNMEASURED)
    found = verdict.lth_pass(e.judged)
    found = found[found["sparsity"].between(0.19, 0.9909)]
    count = found["outcome"].value_counts()
    won, still = count.get(verdict.KEPT, 0), count.get(verdict.NOT_SHOWN, 0)
    outcome = HOLDS if won else CANNOT if still else FAILS
    said = f"of {len(found)} tickets {won} are shown to keep every metric, of {still} it is not shown, the others lose"
    return Finding(outcome, [Part(outcome, said)])


def beats_small(e: Evidence) -> Finding:
    """LTH is ahead of small dense in some metric of the paper and behind in none, corrected for their number."""
    votes = [name for name in dict.fromkeys(e.rows["metric"]) if METRICS[name].in_verdict]
    parts = [ahead(e, name, ["lth"], ["small-dense"], len(votes)) for name in votes]
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
    extra = e.cells(worst) - e.cells("test_accuracy")  # how far the worst class lies below all
    rounds = standing(extra, methods)
    names = "dense", listed(methods)
    return _of(difference(worst, names, mean_of(extra, ["dense"], [0]), mean_of(extra, methods, rounds)))


# --- rules of several studies ------------------------------------------------------------------------------------


def _lost(e: Evidence, methods: Sequence[str], rounds: Sequence[int]) -> Mean | None:
    """Return which share of the distance from dense accuracy to guessing is lost."""
    dense, sparse = (mean_of(e.cells("test_accuracy"), m, rounds) for m in (["dense"], methods))
    if dense is None or sparse is None:
        return None
    return (dense - sparse) * (1 / (dense.value - 1 / e.n_classes))


def _shared(pair: Sequence[Evidence], metric: str) -> tuple[list[str], list[int]]:
    """Return the methods that two studies share, and the rounds at which these stand in both."""
    theirs = _sparse(pair[1], metric)
    methods = [name for name in _sparse(pair[0], metric) if name in theirs]
    rounds = [set(standing(e.cells(metric), methods)) for e in pair]
    return methods, sorted(set.intersection(*rounds))


def _labels(pair: Sequence[Evidence], methods: Sequence[str]) -> list[str]:
    return [f"{listed(methods)} ({e.label})" for e in pair]


def wide_withstand(pair: Sequence[Evidence]) -> Finding:
    """Corruption adds less to the error of the widest networks than to that of the narrowest."""
    metric = "relative_corruption_error"
    methods, rounds = _shared(pair, metric)
    pair = pair[::-1]
    return _of(
        *(
            difference(metric, _labels(pair, m), *(mean_of(e.cells(metric), m, rounds) for e in pair))
            for m in (["dense"], methods)
        )
    )


def wide_win(pair: Sequence[Evidence]) -> Finding:
    """The widest networks tell foreign images better, and lose less accuracy at the same sparsity."""
    methods, rounds = _shared(pair, "ood_auroc")
    pair = pair[::-1]
    names = _labels(pair, methods)
    foreign = difference("ood_auroc", names, *(mean_of(e.cells("ood_auroc"), methods, rounds) for e in pair))
    return _of(foreign, _lost_part(pair, *_shared(pair, "test_accuracy"), -1))


def many_harder(pair: Sequence[Evidence]) -> Finding:
    """With most classes a larger share of the distance to guessing is lost than with fewest."""
    return _of(_lost_part(pair[::-1], *_shared(pair, "test_accuracy"), 1))


def _lost_part(pair: Sequence[Evidence], methods: Sequence[str], rounds: Sequence[int], sign: int) -> Part:
    part = difference("test_accuracy", _labels(pair, methods), *(_lost(e, methods, rounds) for e in pair), sign)
    title = "Share of the distance to guessing that is lost"
    return Part(part.outcome, part.said.replace(titled("test_accuracy"), title, 1), part.seeds)
