"""What the paper and its summary claim, in the paper's order, each with the rule that judges it (`claims_rules`)."""

# ruff: noqa: E501  # sentences, one a line

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from lthlib.results import claims_rules as rules
from lthlib.results.claims_parts import CANNOT, FAILS, HOLDS, UNMEASURED, Evidence
from lthlib.results.claims_rules import Finding

ABSTRACT = "the paper's abstract {cite}`chen2022can`"
SUMMARY = "the paper {cite}`chen2022can`, as its summary reports it {cite}`siddhartha2023can`, under *%s*"
ALONE, WIDTHS, CLASSES = "study", "widths", "classes"


@dataclass(frozen=True)
class Claim:
    """A claim and how it is judged.

    Attributes:
        name: An identifier.
        title: A few words.
        statement: The claim in one sentence.
        source: Who made it, as Markdown.
        needs: Which rows the rule reads.
        rule: The rule in words; `find` is the rule itself.
        find: A function of the evidence (a list of it where ``over`` is not `ALONE`) to a `Finding`.
        says: Two sentences for each of holds, fails and cannot be told.
        figure: Metrics that are drawn.
        methods: Methods that are drawn; all where empty.
        over: `ALONE`, or what the studies compared differ in: `WIDTHS`, `CLASSES`.
    """

    name: str
    title: str
    statement: str
    source: str
    needs: str
    rule: str
    find: Callable[..., Finding]
    says: Mapping[str, str]
    figure: Sequence[str]
    methods: Sequence[str] = ()
    over: str = ALONE


def find_all(claim: Claim, studies: Sequence[Evidence]) -> dict[str, Finding]:
    """Judge a claim in each study, by its label; a claim about several studies in each group of comparable ones."""
    if claim.over == ALONE:
        return {e.label: claim.find(e) for e in studies}
    found = {}
    for e in studies:
        group = [other for other in studies if _comparable(claim.over, e, other)]
        sizes = {_size(claim.over, other) for other in group}
        found[e.label] = claim.find(_ends(claim.over, group)) if len(sizes) > 1 else Finding(UNMEASURED)
    return found


def _comparable(over: str, one: Evidence, other: Evidence) -> bool:
    data = [set(e.rows["dataset"]) for e in (one, other)]
    if over == WIDTHS:
        return data[0] == data[1] and one.family == other.family
    same = one.family == other.family and one.wide == other.wide
    return same and (one is other or data[0] != data[1])


def _size(over: str, e: Evidence) -> float:
    return e.wide if over == WIDTHS else e.n_classes


def _ends(over: str, group: Sequence[Evidence]) -> list[Evidence]:
    """Return the study with the narrowest networks (fewest classes) and that with the widest (most)."""
    ordered = sorted(group, key=lambda e: _size(over, e))
    return [ordered[0], ordered[-1]]


def interpreted(claim: Claim, finding: Finding) -> str:
    """Return what a finding means in words: the claim's sentences, then what the rule has to add."""
    if finding.outcome == UNMEASURED:
        return f"Not measured here: the rule needs {claim.needs}."
    text = claim.says[finding.outcome]
    if finding.outcome == CANNOT and any(part.seeds == 1 for part in finding.parts):
        text += " There is one seed, so that nothing is known of other trainings."
    return f"{text} {finding.more}".strip()


CLAIMS: tuple[Claim, ...] = (
    Claim(
        "accuracy",
        "LTH matches dense accuracy, RP lags",
        "Lottery tickets are as accurate as the dense network, and randomly pruned networks are not.",
        SUMMARY % "Generalization Results, first figure",
        "accuracy of dense, LTH and RP",
        "LTH keeps accuracy at every sparsity up to 90 %, and LTH is more accurate than RP. It fails where LTH loses accuracy at more than half of these sparsities, or RP is the more accurate one.",
        rules.matches,
        {
            HOLDS: "A lottery ticket costs no accuracy that can be seen here. Which weights are left matters, since as many random ones do worse.",
            FAILS: "One half of the claim is shown to be false in this study. The numbers say which.",
            CANNOT: "No half is shown to be false, but not both are shown to be true. More seeds or more images would decide it.",
        },
        ["test_accuracy"],
        ["lth", "rp"],
    ),
    Claim(
        "beats-dense",
        "Sparse can beat dense",
        "A sparse network can be more accurate than its dense parent.",
        SUMMARY % "Generalization Results, Discussion",
        "accuracy of dense and of at least one method",
        "One ticket is more accurate than dense, in an interval corrected for the number of tickets. It fails where each ticket is shown to be less accurate.",
        rules.beats,
        {
            HOLDS: "Pruning can improve accuracy here, and by more than chance among the tickets explains. This says that such a network exists, and not why.",
            FAILS: "Every sparse network is shown to be less accurate than dense. In this study weights are not free.",
            CANNOT: "The best ticket is not surely above dense. The best of many is above by luck alone, which is why the interval is wider here.",
        },
        ["test_accuracy"],
    ),
    Claim(
        "generalization",
        "OMP and LTH generalize well",
        "One-shot magnitude and lottery tickets do well in every metric of generalization.",
        SUMMARY % "Generalization Results, Discussion",
        "accuracy, OoD ROC-AUC, mCE and FGSM accuracy of dense, OMP and LTH",
        "OMP and LTH keep all four metrics at every sparsity up to 90 %. It fails where one of them is lost at more than half of these sparsities.",
        rules.generalizes,
        {
            HOLDS: "Magnitude pruning keeps accuracy and robustness together. Nothing of what was measured has to be paid for sparsity.",
            FAILS: "Accuracy alone would not have shown the loss named above. Magnitude pruning does not win all of generalization here.",
            CANNOT: "No loss is certain, but not every metric is shown to be kept. What is open needs more images or seeds.",
        },
        ["test_accuracy", "ood_auroc", "corruption_error", "fgsm_accuracy"],
        ["omp", "lth"],
    ),
    Claim(
        "width-corruption",
        "Wider networks are hurt less by corruption",
        "Corrupted images cost wide networks less accuracy than narrow ones.",
        SUMMARY % "Generalization Results, second figure",
        "two studies of the same images and one family of networks, at two widths, with corruptions",
        "What corruption adds to the error is smaller for the widest networks than for the narrowest, dense and sparse.",
        rules.wide_withstand,
        {
            HOLDS: "Width helps beyond clean accuracy. The sparse networks of a wide parent keep that advantage.",
            FAILS: "For dense or for sparse networks the wider ones are hurt more. Width is no protection in this study.",
            CANNOT: "The two widths are too alike for their seeds. A larger factor or more seeds would decide it.",
        },
        ["relative_corruption_error", "corruption_error"],
        over=WIDTHS,
    ),
    Claim(
        "width-ood",
        "Over-parameterised networks win more",
        "Networks with more parameters tell foreign images better, and win at higher sparsity.",
        SUMMARY % "Generalization Results, third figure and Discussion",
        "two studies of the same images and one family of networks, at two widths, with foreign images",
        "OoD ROC-AUC is higher for the widest networks, and these lose a smaller share of their distance to guessing at the same sparsity.",
        rules.wide_win,
        {
            HOLDS: "Who has more weights can spare more of them. That holds for foreign images too.",
            FAILS: "More parameters do not help in one of the two ways. The numbers say in which.",
            CANNOT: "One of the two differences is within the noise. More seeds would decide it.",
        },
        ["ood_auroc", "test_accuracy"],
        over=WIDTHS,
    ),
    Claim(
        "classes",
        "More classes are harder",
        "With more classes, sparse networks lose more.",
        SUMMARY % "Generalization Results, Discussion",
        "two studies of one network on images of different numbers of classes",
        "At the same sparsity, the share of the distance from dense accuracy to guessing that is lost is larger for most classes than for fewest.",
        rules.many_harder,
        {
            HOLDS: "The same weights have to tell more things apart, and fewer can be spared. The images differ in more than their number of classes, which the rule cannot take out.",
            FAILS: "The task with more classes loses the smaller share. The images differ in more than their number of classes, which the rule cannot take out.",
            CANNOT: "The two tasks are too alike for their seeds. More seeds would decide it.",
        },
        ["test_accuracy"],
        over=CLASSES,
    ),
    Claim(
        "corruption",
        "Corruption hurts pruned networks more",
        "Corruption costs pruned networks more than their loss of accuracy on clean images explains.",
        SUMMARY % "Generalization Results, Discussion",
        "mCE of dense and of at least one method",
        "What corruption adds to the error, averaged over the methods, is larger than for dense.",
        rules.hurt_by_corruption,
        {
            HOLDS: "Pruned networks are more fragile than their clean accuracy says. Who tests on clean images alone does not see it.",
            FAILS: "What corruption adds is smaller for pruned networks. An error that begins higher has less room to grow, so that this is no proof of robustness.",
            CANNOT: "What corruption adds is not surely different. An error that begins higher has less room to grow, which works against the claim.",
        },
        ["relative_corruption_error", "corruption_error"],
    ),
    Claim(
        "calibration-harder",
        "Calibration is harder than generalization",
        "It is harder to match the dense network in calibration than in generalization.",
        SUMMARY % "Calibration and Reliability Results, Discussion",
        "metrics of calibration and of generalization beside dense",
        "The share of verdicts lost in calibration is larger than the share that is lost or not shown in generalization. It fails where the reverse is true.",
        rules.harder_to_calibrate,
        {
            HOLDS: "Even if all that is open in generalization were lost, calibration would lose more often. Its metrics ask more of a sparse network.",
            FAILS: "Even if all that is open in calibration were lost, generalization would lose more often. It is generalization that is hard here.",
            CANNOT: "Too many verdicts are open to compare the two dimensions. The open ones could turn the order.",
        },
        ["ece", "nll", "test_accuracy", "corruption_error"],
    ),
    Claim(
        "calibrated",
        "RP and pruning at initialisation are calibrated better",
        "Random pruning and pruning at initialisation are calibrated better than lottery tickets and one-shot magnitude.",
        SUMMARY % "Calibration and Reliability Results, Discussion",
        "ECE of RP, of one method at initialisation, of LTH and of OMP",
        "The mean ECE of RP and the methods at initialisation is lower than that of LTH and OMP at the same sparsity.",
        rules.calibrated_better,
        {
            HOLDS: "Random pruning and pruning at initialisation have the smaller calibration error. Whether that is a merit depends on the way in which the networks err.",
            FAILS: "The order is the other way round here. Lottery tickets and one-shot magnitude have the smaller calibration error.",
            CANNOT: "The two groups are not surely different. Which is better calibrated depends on the sparsity or the seed.",
        },
        ["ece", "ece_recalibrated"],
        ["rp", "snip", "grasp", "synflow", "lth", "omp"],
    ),
    Claim(
        "explained",
        "RP and pruning at initialisation are easier to explain, LTH lags",
        "Explanations of randomly pruned networks and of those pruned at initialisation are more faithful and more stable than those of lottery tickets.",
        SUMMARY % "Interpretability Results, Discussion",
        "LIME's fidelity and stability of RP, of one method at initialisation and of LTH",
        "The mean errors of fidelity and of stability of RP and the methods at initialisation are both lower than those of LTH at the same sparsity.",
        rules.explained_better,
        {
            HOLDS: "A linear model follows these networks more closely than lottery tickets. What of it is confidence, the rescaled numbers say.",
            FAILS: "LTH is ahead in one of the two. The claim needs both.",
            CANNOT: "At least one of the two differences is within the noise of the seeds. Fewer images are explained than classified, so that this is soon so.",
        },
        ["fidelity", "stability", "fidelity_r2", "stability_relative"],
        ["rp", "snip", "grasp", "synflow", "lth"],
    ),
    Claim(
        "composition",
        "LTH's units can be explained by compositions",
        "Units of lottery tickets stand for compositions of concepts.",
        SUMMARY % "Interpretability Results, first figure (the paper's seventh, by its file's name) and Discussion",
        "the compositional IoU of LTH and of a network before training",
        "The mean IoU of the best formulas is higher for LTH than for the network before training.",
        rules.composed,
        {
            HOLDS: "Training a ticket brings its units nearer to nameable concepts than chance does. The size of the IoU says how near, and it is small.",
            FAILS: "The units of a network before training fit formulas better. What formulas fit is then no sign of having learnt.",
            CANNOT: "The units are not surely nearer to concepts than before training. A search over many formulas finds something that fits in any case.",
        },
        ["composition_iou", "mean_best_iou"],
    ),
    Claim(
        "init-flatness",
        "Pruning at initialisation is less flat, LTH competitive",
        "On CIFAR-10, networks pruned at initialisation are in sharper minima, while lottery tickets are about as flat as dense.",
        SUMMARY % "Geometry of loss landscapes, Discussion",
        "traces of both Hessians of dense, LTH and one method at initialisation",
        "LTH is ahead of the mean of the methods at initialisation in both traces, and keeps both up to 90 % beside dense. It fails where LTH is behind, or loses one at more than half of these sparsities. On other images than CIFAR-10 the same is asked.",
        rules.init_less_flat,
        {
            HOLDS: "Lottery tickets end in minima as flat as those of dense networks, and others do not. This is so in the weights and in the pixels.",
            FAILS: "Flatness in the weights and in the pixels are two things, and both are asked for. One part of the claim is shown to be false.",
            CANNOT: "No part is shown to be false, but not all are shown to be true. Traces spread widely over seeds.",
        },
        ["weight_hessian_trace", "input_hessian_trace", "relative_flatness"],
        ["snip", "grasp", "synflow", "lth"],
    ),
    Claim(
        "rigl-flatness",
        "RigL and GraSP are less flat",
        "RigL, and GraSP, end in sharper minima than other methods.",
        SUMMARY % "Geometry of loss landscapes, Discussion",
        "traces of both Hessians of RigL and of at least one other method",
        "The mean of the other methods is ahead of RigL, and of GraSP where it was measured, in both traces at the same sparsity.",
        rules.rigl_less_flat,
        {
            HOLDS: "Both are sharper than what else was measured, in weights and in pixels. At equal sparsity the number of weights is no reason.",
            FAILS: "At least one of them is flatter than the others in one of the traces. The claim does not hold as a whole.",
            CANNOT: "The traces overlap. They spread widely over seeds.",
        },
        ["weight_hessian_trace", "input_hessian_trace"],
    ),
    Claim(
        "lth-pass",
        "There is an LTH-PASS",
        "Between 20 % and 99.08 % sparsity there are networks that match dense in all four dimensions.",
        ABSTRACT,
        "metrics of all four dimensions beside dense",
        "At least one ticket is shown to keep every metric ([](#regions)). It fails where each loses at least one for certain.",
        rules.passes,
        {
            HOLDS: "One can win everything here, as far as it was measured. The front page names the networks.",
            FAILS: "Each sparse network is shown to lose something. By our thresholds, which are ours and not the paper's, one cannot win everything here.",
            CANNOT: "No network is shown to keep everything, and not all are shown to lose something. The noisiest metric decides this claim, so that it takes the most images.",
        },
        ["test_accuracy", "ece", "fidelity", "weight_hessian_trace"],
    ),
    Claim(
        "small-dense",
        "Sparse beats small dense",
        "A sparse network is better than a small dense one with as many parameters.",
        ABSTRACT,
        "LTH and small dense beside each other",
        "LTH is shown to be ahead in at least one metric of the paper and behind in none, in intervals corrected for the number of metrics. It fails where small dense is.",
        rules.beats_small,
        {
            HOLDS: "At equal parameters it is better to remove weights than channels. What they cost to run is another question.",
            FAILS: "The small dense network is the better choice here. It is the faster one on common hardware, too.",
            CANNOT: "Each is ahead somewhere, or no difference is shown. Which to take depends on the metric.",
        },
        ["test_accuracy", "corruption_error", "nll", "ece"],
        ["lth", "small-dense"],
    ),
    Claim(
        "few-pay",
        "Few classes pay",
        "The damage of pruning falls on few classes and odd images.",
        "{cite:t}`hooker2019what`",
        "the accuracy of the worst class, of dense and of at least one method",
        "The accuracy of the worst class falls by more than that of all together, averaged over the methods.",
        rules.few_pay,
        {
            HOLDS: "The average hides who pays. The worst class is always chosen after the fact, so that part of its fall is luck.",
            FAILS: "The worst class falls by less than the average. Here the damage is spread.",
            CANNOT: "The worst class does not surely fall by more than the average. It has few images.",
        },
        ["worst_class_accuracy", "test_accuracy"],
    ),
)
