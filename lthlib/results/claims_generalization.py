"""What was claimed of generalization, each claim above the rule that judges it.

A rule is as strict as the claim: "both A and B" fails where either is shown to be false. Networks that have collapsed
decide nothing. What was not measured is said to be so.
"""

# ruff: noqa: E501  # sentences, one a line

from __future__ import annotations

from collections.abc import Callable, Sequence

import pandas as pd

from lthlib.results import claims_parts as parts
from lthlib.results.claims_parts import CANNOT, FAILS, HOLDS, SUMMARY, UNMEASURED, Evidence, Finding, Mean, Part, claim

GENERALIZATION = ("test_accuracy", "ood_auroc", "corruption_error", "fgsm_accuracy")
EXTRA = "relative_corruption_error"  # what corruption adds to the error
LOST_SHARE = "Share of the distance to guessing that is lost"


@claim(
    "accuracy",
    "LTH matches dense accuracy, RP lags",
    "Lottery tickets are as accurate as the dense network, and randomly pruned networks are not.",
    SUMMARY % "Generalization Results, first figure",
    needs="accuracy of dense, LTH and RP",
    holds="A lottery ticket costs no accuracy that can be seen here. Which weights are left matters, since as many random ones do worse.",
    fails="One half of the claim is shown to be false in this study. The numbers say which.",
    cannot="No half is shown to be false, but not both are shown to be true. More seeds or more images would decide it.",
    figure=["test_accuracy"],
    methods=["lth", "rp"],
)
def matches(e: Evidence) -> Finding:
    """LTH keeps accuracy at every sparsity up to 90 %, and LTH is more accurate than RP. It fails where LTH loses
    accuracy at more than half of these sparsities, or RP is the more accurate one.
    """
    return parts.all_of(parts.keeps(e, ["lth"], ["test_accuracy"]), parts.ahead(e, "test_accuracy", ["lth"], ["rp"]))


@claim(
    "beats-dense",
    "Sparse can beat dense",
    "A sparse network can be more accurate than its dense parent.",
    SUMMARY % "Generalization Results, Discussion",
    needs="accuracy of dense and of at least one method",
    holds="Pruning can improve accuracy here, and by more than chance among the tickets explains. This says that such a network exists, and not why.",
    fails="Every sparse network is shown to be less accurate than dense. In this study weights are not free.",
    cannot="The best ticket is not surely above dense. The best of many is above by luck alone, which is why the interval is wider here.",
    figure=["test_accuracy"],
)
def beats(e: Evidence) -> Finding:
    """One ticket is more accurate than dense, in an interval corrected for the number of tickets. It fails where
    each ticket is shown to be less accurate.
    """
    cells, methods = e.cells("test_accuracy"), e.sparse("test_accuracy")
    dense, keys = parts.mean_of(cells, ["dense"], [0]), [key for key in cells.index if key[0] in methods]
    if dense is None or not keys:
        return Finding(UNMEASURED)
    # Of a ticket there is one network a seed, as of dense: its variance is taken for the same.
    tickets = [Mean(cells.loc[key].dropna(), dense.variance, dense.df) for key in keys]
    names = [f"{parts.listed([method])} at {parts.percent(e, method, n)} sparsity" for method, n in keys]
    told = [
        parts.difference("test_accuracy", [name, "dense"], ticket, dense, tests=len(keys))
        for name, ticket in zip(names, tickets, strict=True)
    ]
    best = max(range(len(keys)), key=lambda i: (told[i].outcome == HOLDS, (tickets[i] - dense).value))
    outcomes = {part.outcome for part in told}
    outcome = HOLDS if HOLDS in outcomes else FAILS if outcomes == {FAILS} else CANNOT
    part = Part(outcome, f"{told[best].said}, the best of {len(keys)} tickets", told[best].seeds)
    more = _beside_long(cells, tickets[best], keys[best][1]) if (outcome, keys[best][0]) == (HOLDS, "lth") else ""
    return Finding(outcome, [part], more)


def _beside_long(cells: pd.DataFrame, ticket: Mean, round: int) -> str:
    """Say how a lottery ticket stands beside a dense network that was trained as long as its whole history."""
    long = parts.mean_of(cells, ["dense-long"], [round])
    if long is None:
        return (
            "A lottery ticket inherits a mask for which networks were trained before. Whether that or sparsity makes "
            "it better, only a dense network trained as long in all can tell."
        )
    beside = Mean(ticket.each, long.variance, long.df) - long
    return (
        f"A dense network trained as long as this ticket's whole history reaches "
        f"{parts.number('test_accuracy', long.value)}: beside it the ticket is "
        f"{parts.gap('test_accuracy', beside.value, *parts.settle(beside)[1:])}."
    )


@claim(
    "generalization",
    "OMP and LTH generalize well",
    "One-shot magnitude and lottery tickets do well in every metric of generalization.",
    SUMMARY % "Generalization Results, Discussion",
    needs="accuracy, OoD ROC-AUC, mCE and FGSM accuracy of dense, OMP and LTH",
    holds="Magnitude pruning keeps accuracy and robustness together. Nothing of what was measured has to be paid for sparsity.",
    fails="Accuracy alone would not have shown the loss named below. Magnitude pruning does not win all of generalization here.",
    cannot="No loss is certain, but not every metric is shown to be kept. What is open needs more images or seeds.",
    figure=["test_accuracy", "ood_auroc", "corruption_error", "fgsm_accuracy"],
    methods=["omp", "lth"],
)
def generalizes(e: Evidence) -> Finding:
    """OMP and LTH keep all four metrics at every sparsity up to 90 %. It fails where one of them is lost at more
    than half of these sparsities.
    """
    return parts.all_of(*(parts.keeps(e, [method], GENERALIZATION) for method in ("omp", "lth")))


@claim(
    "width-corruption",
    "Wider networks are hurt less by corruption",
    "Corrupted images cost wide networks less accuracy than narrow ones.",
    SUMMARY % "Generalization Results, second figure",
    needs="two studies of one grid on the same images, with one family of networks at two widths, with corruptions",
    holds="Width helps beyond clean accuracy. The sparse networks of a wide parent keep that advantage.",
    fails="For dense or for sparse networks the wider ones are hurt more. Width is no protection in this study.",
    cannot="The two widths are too alike for their seeds. A larger factor or more seeds would decide it.",
    figure=["relative_corruption_error", "corruption_error"],
    over=parts.WIDTHS,
)
def wide_withstand(narrow: Evidence, wide: Evidence) -> Finding:
    """What corruption adds to the error is smaller for the widest networks than for the narrowest, dense and sparse."""
    return parts.all_of(*(_between(narrow, wide, EXTRA, _mean, methods) for methods in (["dense"], [])))


@claim(
    "width-ood",
    "Over-parameterised networks win more",
    "Networks with more parameters tell foreign images better, and win at higher sparsity.",
    SUMMARY % "Generalization Results, third figure and Discussion",
    needs="two studies of one grid on the same images, with one family of networks at two widths, with foreign images",
    holds="Who has more weights can spare more of them. That holds for foreign images too.",
    fails="More parameters do not help in one of the two ways. The numbers say in which.",
    cannot="One of the two differences is within the noise. More seeds would decide it.",
    figure=["ood_auroc", "test_accuracy"],
    over=parts.WIDTHS,
)
def wide_win(narrow: Evidence, wide: Evidence) -> Finding:
    """OoD ROC-AUC is higher for the widest networks, and these lose a smaller share of their distance to guessing
    at the same sparsity.
    """
    lost = _between(narrow, wide, "test_accuracy", _lost, sign=-1, title=LOST_SHARE)
    return parts.all_of(_between(narrow, wide, "ood_auroc", _mean), lost)


@claim(
    "classes",
    "More classes are harder",
    "With more classes, sparse networks lose more.",
    SUMMARY % "Generalization Results, Discussion",
    needs="two studies of one grid with one network, on images of different numbers of classes",
    holds="The same weights have to tell more things apart, and fewer can be spared. The images differ in more than their number of classes, which the rule cannot take out.",
    fails="The task with more classes loses the smaller share. The images differ in more than their number of classes, which the rule cannot take out.",
    cannot="The two tasks are too alike for their seeds. More seeds would decide it.",
    figure=["test_accuracy"],
    over=parts.CLASSES,
)
def many_harder(few: Evidence, many: Evidence) -> Finding:
    """At the same sparsity, the share of the distance from dense accuracy to guessing that is lost is larger for
    most classes than for fewest.
    """
    return parts.all_of(_between(few, many, "test_accuracy", _lost, sign=1, title=LOST_SHARE))


def _between(
    first: Evidence, last: Evidence, metric: str, of: Callable, methods: Sequence[str] = (), **how: object
) -> Part:
    """Compare the last of two studies with the first, where the sparse methods that both have stand in both."""
    shared = [name for name in first.sparse(metric) if name in last.sparse(metric)]
    rounds = sorted(set.intersection(*(set(parts.standing(e.cells(metric), shared)) for e in (first, last))))
    methods, pair = methods or shared, (last, first)
    what = "dataset" if set(first.rows["arch"]) == set(last.rows["arch"]) else "arch"
    names = [f"{parts.listed(methods)} of {e.rows[what].iloc[0]}" for e in pair]
    return parts.difference(metric, names, *(of(e, metric, methods, rounds) for e in pair), **how)


def _mean(e: Evidence, metric: str, methods: Sequence[str], rounds: Sequence[int]) -> Mean | None:
    return parts.mean_of(e.cells(metric), methods, rounds)


def _lost(e: Evidence, metric: str, methods: Sequence[str], rounds: Sequence[int]) -> Mean | None:
    """Return which share of the distance from dense accuracy to guessing is lost."""
    dense, sparse = (_mean(e, metric, m, rounds) for m in (["dense"], methods))
    if dense is None or sparse is None or dense.value <= 1 / e.n_classes:
        return None
    return (dense - sparse) * (1 / (dense.value - 1 / e.n_classes))


@claim(
    "corruption",
    "Corruption hurts pruned networks more",
    "Corruption costs pruned networks more than their loss of accuracy on clean images explains.",
    SUMMARY % "Generalization Results, Discussion",
    needs="mCE of dense and of at least one method",
    holds="Pruned networks are more fragile than their clean accuracy says. Who tests on clean images alone does not see it.",
    fails="What corruption adds is smaller for pruned networks. An error that begins higher has less room to grow, so that this is no proof of robustness.",
    cannot="What corruption adds is not surely different. An error that begins higher has less room to grow, which works against the claim.",
    figure=["relative_corruption_error", "corruption_error"],
)
def hurt_by_corruption(e: Evidence) -> Finding:
    """What corruption adds to the error, averaged over the methods, is larger than for dense."""
    return parts.all_of(parts.ahead(e, EXTRA, ["dense"], e.sparse(EXTRA)))
