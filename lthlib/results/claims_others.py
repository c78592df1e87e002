"""What was claimed of calibration, interpretability, flatness, and all together, and by others, each above its rule."""

# ruff: noqa: E501  # sentences, one a line

from __future__ import annotations

import numpy as np

from lthlib.metrics import METRICS
from lthlib.results import claims_parts as parts
from lthlib.results import verdict
from lthlib.results.claims_parts import CANNOT, FAILS, HOLDS, SUMMARY, UNMEASURED, Evidence, Finding, Part, claim

ABSTRACT = "the paper's abstract {cite}`chen2022can`"
TRACES = ("weight_hessian_trace", "input_hessian_trace")


@claim(
    "calibration-harder",
    "Calibration is harder than generalization",
    "It is harder to match the dense network in calibration than in generalization.",
    SUMMARY % "Calibration and Reliability Results, Discussion",
    needs="metrics of calibration and of generalization beside dense",
    holds="Even if all that is open in generalization were lost, calibration would lose more often. Its metrics ask more of a sparse network.",
    fails="Even if all that is open in calibration were lost, generalization would lose more often. It is generalization that is hard here.",
    cannot="Too many verdicts are open to compare the two dimensions. The open ones could turn the order.",
    figure=["ece", "nll", "test_accuracy", "corruption_error"],
)
def harder_to_calibrate(e: Evidence) -> Finding:
    """The share of verdicts lost in calibration is larger than the share that is lost or not shown in
    generalization. It fails where the reverse is true. In a dimension each metric weighs the same, on however many
    sets of foreign images it was measured.
    """
    lines = verdict.votes(e.judged)
    lines = lines[lines["method"].isin(e.sparse("test_accuracy"))]
    lines = lines[~lines["outcome"].isin(["", verdict.COLLAPSED])].drop_duplicates([*verdict.TICKET, *verdict.CASE])
    dimensions, shares = lines["metric"].map(lambda name: METRICS[name].dimension), {}
    for dimension in ("calibration", "generalization"):
        mine = lines[dimensions == dimension]
        if set(mine["metric"]) <= {"test_accuracy"}:
            return Finding(UNMEASURED)
        by_metric = mine["outcome"].groupby(mine["metric"])
        outcomes = (verdict.KEPT, verdict.LOST, verdict.NOT_SHOWN)
        shares[dimension] = [float(by_metric.agg(lambda of, o=o: (of == o).mean()).mean()) for o in outcomes]
    (_, lost, still), (_, other_lost, other_still) = shares.values()
    outcome = HOLDS if lost > other_lost + other_still else FAILS if other_lost > lost + still else CANNOT
    said = [
        f"{dimension}: {100 * k:.0f} % of verdicts kept, {100 * x:.0f} % lost, {100 * o:.0f} % not shown"
        for dimension, (k, x, o) in shares.items()
    ]
    return Finding(outcome, [Part(outcome, "; ".join(said), e.rows["seed"].nunique())])


@claim(
    "calibrated",
    "RP and pruning at initialisation are calibrated better",
    "Random pruning and pruning at initialisation are calibrated better than lottery tickets and one-shot magnitude.",
    SUMMARY % "Calibration and Reliability Results, Discussion",
    needs="ECE of RP, of one method at initialisation, of LTH and of OMP",
    holds="Random pruning and pruning at initialisation have the smaller calibration error. Whether that is a merit depends on the way in which the networks err.",
    fails="The order is the other way round here. Lottery tickets and one-shot magnitude have the smaller calibration error.",
    cannot="The two groups are not surely different. Which is better calibrated depends on the sparsity or the seed.",
    figure=["ece", "ece_recalibrated"],
    methods=["rp", "snip", "grasp", "synflow", "lth", "omp"],
)
def calibrated_better(e: Evidence) -> Finding:
    """The mean ECE of RP and the methods at initialisation is lower than that of LTH and OMP at the same sparsity."""
    first, second = ["rp", *e.measured(parts.PI, "ece")], ["lth", "omp"]
    if len(first) == 1 or len(e.measured(["rp", *second], "ece")) < 3:
        return parts.all_of(Part(UNMEASURED, "ECE of RP, one method at initialisation, LTH and OMP"))
    part = parts.ahead(e, "ece", first, second)
    return parts.all_of(part, more="" if part.outcome == UNMEASURED else _sign(e))


def _sign(e: Evidence) -> str:
    """Say which way the networks are miscalibrated, and what mending that leaves of RP's and LTH's difference."""
    T = e.cells("temperature").to_numpy()
    T = T[np.isfinite(T)]
    if not len(T):
        return ""
    span = f"(temperatures {T.min():.2f} to {T.max():.2f})"
    if T.min() > 1 or T.max() < 1:
        way, better = ("overconfident", "less sure") if T.min() > 1 else ("underconfident", "surer")
        said = f"All networks are {way} here {span}, so that a network that is {better} of itself has the smaller ECE."
    else:
        said = f"Some networks are too sure and some not sure enough {span}."
    metrics = ("ece", "ece_recalibrated", "nll_recalibrated")
    rounds = parts.standing(e.cells(metrics[-1]), ["rp"], ["lth"])
    means = [[parts.mean_of(e.cells(metric), [m], rounds[-1:]) for m in ("rp", "lth")] for metric in metrics]
    if not rounds or any(None in pair for pair in means):
        return said
    ece, mended, nll = (
        " and ".join(parts.number(name, m.value) for m in of) for name, of in zip(metrics, means, strict=True)
    )
    return (
        f"{said} At {parts.percent(e, 'lth', rounds[-1])} RP and LTH have an ECE of {ece}; after temperature scaling of "
        f"{mended}, and an NLL of {nll}."
    )


@claim(
    "explained",
    "RP and pruning at initialisation are easier to explain, LTH lags",
    "Explanations of randomly pruned networks and of those pruned at initialisation are more faithful and more stable than those of lottery tickets.",
    SUMMARY % "Interpretability Results, Discussion",
    needs="LIME's fidelity and stability of RP, of one method at initialisation and of LTH",
    holds="A linear model follows these networks more closely than lottery tickets. What of it is confidence, the rescaled numbers say.",
    fails="LTH is ahead in one of the two. The claim needs both.",
    cannot="At least one of the two differences is within the noise of the seeds. Fewer images are explained than classified, so that this is soon so.",
    figure=["fidelity", "stability", "fidelity_r2", "stability_relative"],
    methods=["rp", "snip", "grasp", "synflow", "lth"],
)
def explained_better(e: Evidence) -> Finding:
    """The mean errors of fidelity and of stability of RP and the methods at initialisation are both lower than
    those of LTH at the same sparsity.
    """
    first = ["rp", *e.measured(parts.PI, "fidelity")]
    if len(first) == 1 or not e.measured(["rp"], "fidelity"):
        return Finding(UNMEASURED)
    told = [parts.ahead(e, metric, first, ["lth"]) for metric in ("fidelity", "stability")]
    scaled = [parts.ahead(e, metric, first, ["lth"]) for metric in ("fidelity_r2", "stability_relative")]
    left = {HOLDS: "the lag of LTH remains", FAILS: "LTH is ahead", CANNOT: "no difference is shown"}
    lines = [f"{left[p.outcome]} ({p.said})" for p in scaled if p.outcome in left]
    more = "Both errors are in units of probability, which a less sure network has smaller for nothing. "
    return parts.all_of(*told, more=more + f"Rescaled, {'; '.join(lines)}." if lines else "")


@claim(
    "composition",
    "LTH's units can be explained by compositions",
    "Units of lottery tickets stand for compositions of concepts.",
    SUMMARY % "Interpretability Results, first figure (the paper's seventh, by its file's name) and Discussion",
    needs="the compositional IoU of LTH and of a network before training",
    holds="Training a ticket brings its units nearer to nameable concepts than chance does. The size of the IoU says how near, and it is small.",
    fails="The units of a network before training fit formulas better. What formulas fit is then no sign of having learnt.",
    cannot="The units are not surely nearer to concepts than before training. A search over many formulas finds something that fits in any case.",
    figure=["composition_iou", "mean_best_iou"],
)
def composed(e: Evidence) -> Finding:
    """The mean IoU of the best formulas is higher for LTH than for the network before training."""
    cells, before = e.cells("composition_iou"), e.cells("composition_iou_random")
    rounds = parts.standing(cells, ["lth"])
    trained, random = parts.mean_of(cells, ["lth"], rounds), parts.mean_of(before, ["lth"], rounds)
    part = parts.difference("composition_iou", ["LTH", "before training"], trained, random)
    beside = parts.ahead(e, "composition_iou", ["lth"], ["dense"])
    more = {HOLDS: "LTH is ahead of dense", FAILS: "LTH is behind dense", CANNOT: "no difference is shown"}
    return parts.all_of(part, more=f"Beside dense, {more[beside.outcome]} ({beside.said})." if beside.seeds else "")


@claim(
    "init-flatness",
    "Pruning at initialisation is less flat, LTH competitive",
    "On CIFAR-10, networks pruned at initialisation are in sharper minima, while lottery tickets are about as flat as dense.",
    SUMMARY % "Geometry of loss landscapes, Discussion",
    needs="traces of both Hessians of dense, LTH and one method at initialisation",
    holds="Lottery tickets end in minima as flat as those of dense networks, and others do not. This is so in the weights and in the pixels.",
    fails="Flatness in the weights and in the pixels are two things, and both are asked for. One part of the claim is shown to be false.",
    cannot="No part is shown to be false, but not all are shown to be true. Traces spread widely over seeds.",
    figure=["weight_hessian_trace", "input_hessian_trace", "relative_flatness"],
    methods=["snip", "grasp", "synflow", "lth"],
)
def init_less_flat(e: Evidence) -> Finding:
    """LTH is ahead of the mean of the methods at initialisation in both traces, and keeps both up to 90 % beside
    dense. It fails where LTH is behind, or loses one at more than half of these sparsities. On other images than
    CIFAR-10 the same is asked.
    """
    pi = e.measured(parts.PI, TRACES[0])
    if not pi:
        return Finding(UNMEASURED)
    relative = parts.ahead(e, "relative_flatness", ["lth"], pi)
    more = f"In relative flatness, which a rescaled layer does not change: {relative.said}." if relative.seeds else ""
    return parts.all_of(
        *(parts.ahead(e, metric, ["lth"], pi) for metric in TRACES), parts.keeps(e, ["lth"], TRACES), more=more
    )


@claim(
    "rigl-flatness",
    "RigL and GraSP are less flat",
    "RigL, and GraSP, end in sharper minima than other methods.",
    SUMMARY % "Geometry of loss landscapes, Discussion",
    needs="traces of both Hessians of RigL and of at least one other method",
    holds="Both are sharper than what else was measured, in weights and in pixels. At equal sparsity the number of weights is no reason.",
    fails="At least one of them is flatter than the others in one of the traces. The claim does not hold as a whole.",
    cannot="The traces overlap. They spread widely over seeds.",
    figure=["weight_hessian_trace", "input_hessian_trace"],
)
def rigl_less_flat(e: Evidence) -> Finding:
    """The mean of the other methods is ahead of RigL, and of GraSP where it was measured, in both traces at the
    same sparsity.
    """
    others = [m for m in e.sparse(TRACES[0]) if m not in ("rigl", "grasp")]
    rigl, grasp = ([parts.ahead(e, metric, others, [method]) for metric in TRACES] for method in ("rigl", "grasp"))
    return parts.all_of(*rigl, *(part for part in grasp if part.outcome != UNMEASURED))  # the claim has it in brackets


@claim(
    "lth-pass",
    "There is an LTH-PASS",
    "Between 20 % and 99.08 % sparsity there are networks that match dense in all four dimensions.",
    ABSTRACT,
    needs="metrics of all four dimensions beside dense",
    holds="One can win everything here, as far as it was measured. The front page names the networks.",
    fails="Each sparse network is shown to lose something. By our thresholds, which are ours and not the paper's, one cannot win everything here.",
    cannot="No network is shown to keep everything, and not all are shown to lose something. The noisiest metric decides this claim, so that it takes the most images.",
    figure=["test_accuracy", "ece", "fidelity", "weight_hessian_trace"],
)
def passes(e: Evidence) -> Finding:
    """At least one ticket is shown to keep every metric ([](#regions)). It fails where each loses at least one for
    certain.
    """
    voting = {METRICS[name].dimension for name in set(e.rows["metric"]) - {"test_accuracy"} if METRICS[name].in_verdict}
    if len(voting) < 4 or e.judged.empty:
        return Finding(UNMEASURED)
    found = verdict.lth_pass(e.judged)
    found = found[found["sparsity"].between(0.19, 0.9909)]
    if found.empty:  # no sparse network, or none as sparse as that
        return Finding(UNMEASURED)
    count = found["outcome"].value_counts()
    won, still = count.get(verdict.KEPT, 0), count.get(verdict.NOT_SHOWN, 0)
    outcome = HOLDS if won else CANNOT if still else FAILS
    said = f"of {len(found)} tickets {won} are shown to keep every metric, of {still} it is not shown, the others lose"
    return Finding(outcome, [Part(outcome, said, e.rows["seed"].nunique())])


@claim(
    "small-dense",
    "Sparse beats small dense",
    "A sparse network is better than a small dense one with as many parameters.",
    ABSTRACT,
    needs="LTH and small dense beside each other",
    holds="At equal parameters it is better to remove weights than channels. What they cost to run is another question.",
    fails="The small dense network is the better choice here. It is the faster one on common hardware, too.",
    cannot="Each is ahead somewhere, or no difference is shown. Which to take depends on the metric.",
    figure=["test_accuracy", "corruption_error", "nll", "ece"],
    methods=["lth", "small-dense"],
)
def beats_small(e: Evidence) -> Finding:
    """LTH is shown to be ahead in at least one metric of the paper and behind in none, in intervals corrected for
    the number of metrics. It fails where small dense is.
    """
    votes = verdict.votes(e.rows)["metric"].unique()
    told = [parts.ahead(e, name, ["lth"], ["small-dense"], len(votes)) for name in votes]
    told = [part for part in told if part.outcome != UNMEASURED]
    if not told:
        return Finding(UNMEASURED)
    better, worse = (sum(part.outcome == o for part in told) for o in (HOLDS, FAILS))
    outcome = CANNOT if bool(better) == bool(worse) else HOLDS if better else FAILS
    more = f"Of {len(told)} metrics LTH is shown ahead in {better} and behind in {worse}."
    return Finding(outcome, told, more)


@claim(
    "initialisation",
    "Pruning at initialisation: above random, below magnitude",
    "Networks pruned at initialisation are more accurate than randomly pruned ones, and less accurate than those that magnitude has pruned after training.",
    "{cite:t}`frankle2021pruning`",
    needs="accuracy of RP, LTH and at least one method at initialisation",
    holds="The order is the published one. To look at weights before training helps, and to look at them after it helps more.",
    fails="One half of the published order is turned round here. The published networks were trained for longer; whether that is the reason was not tried.",
    cannot="No half of the published order is shown to be false, but not both are shown to be true.",
    figure=["test_accuracy"],
    methods=["rp", *parts.PI, "lth"],
)
def between_random_and_magnitude(e: Evidence) -> Finding:
    """The methods at initialisation are more accurate than RP, and LTH is more accurate than they are, at the same
    sparsity. It fails where one of the two is the other way round.
    """
    pi = e.measured(parts.PI, "test_accuracy") or parts.PI
    told = [parts.ahead(e, "test_accuracy", a, b) for a, b in ((pi, ["rp"]), (["lth"], pi))]
    return parts.all_of(*told)


@claim(
    "dynamic",
    "Masks that move beat masks that stay",
    "Trained sparse from the start, RigL is more accurate than random masks and than those of SNIP.",
    "{cite:t}`evci2020rigging`",
    needs="accuracy of RigL, RP and SNIP",
    holds="The order is the published one. Letting the mask move pays.",
    fails="One of the fixed masks is the better one here. RigL's mask moves only as long as it trains, and these trainings are short; whether that is the reason was not tried.",
    cannot="RigL is not surely different from one of the fixed masks. Its mask moves only as long as it trains, and these trainings are short; whether that is the reason was not tried.",
    figure=["test_accuracy"],
    methods=["rp", "snip", "rigl"],
)
def moving_beats_fixed(e: Evidence) -> Finding:
    """RigL is more accurate than RP, and more accurate than SNIP, at the same sparsity. It fails where one of the two
    is the other way round.
    """
    return parts.all_of(*(parts.ahead(e, "test_accuracy", ["rigl"], [other]) for other in ("rp", "snip")))


@claim(
    "few-pay",
    "Few classes pay",
    "The damage of pruning falls on few classes and odd images.",
    "{cite:t}`hooker2019what`",
    needs="the accuracy of the worst class, of dense and of at least one method",
    holds="The average hides who pays. The worst class is always chosen after the fact, so that part of its fall is luck.",
    fails="The worst class falls by less than the average. Here the damage is spread.",
    cannot="The worst class does not surely fall by more than the average. It has few images.",
    figure=["worst_class_accuracy", "test_accuracy"],
)
def few_pay(e: Evidence) -> Finding:
    """The accuracy of the worst class falls by more than that of all together, averaged over the methods."""
    worst = "worst_class_accuracy"
    if not (methods := e.sparse(worst)):
        return Finding(UNMEASURED)
    extra = e.cells(worst) - e.cells("test_accuracy")  # how far the worst class lies below all
    means = parts.mean_of(extra, ["dense"], [0]), parts.mean_of(extra, methods, parts.standing(extra, methods))
    title = "Accuracy of the worst class less that of all ↑"
    return parts.all_of(parts.difference(worst, ["dense", parts.listed(methods)], *means, title=title))
