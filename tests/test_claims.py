"""The rules of what was claimed, on made-up studies whose answer is known."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from lthlib.book.claims import claims_pages
from lthlib.metrics import METRICS
from lthlib.results.claims import ALONE, CLAIMS, find_all, interpreted
from lthlib.results.claims_parts import CANNOT, FAILS, HOLDS, UNMEASURED, Evidence, Mean, mean_of, settle, standing

BY_NAME = {claim.name: claim for claim in CLAIMS}
ROUNDS = (3, 6, 9)
WORST = "worst_class_accuracy"


def made(spec, noise=0.001, seeds=4, label="study", arch="net", dataset="d", n_classes=10):
    """A study with the means of {metric: {method: value}}, normal noise relative to each, else an accuracy of 0.9."""
    noisy = set(spec)
    spec = {"test_accuracy": {}, **spec}
    methods = dict.fromkeys(["dense", *(m for of in spec.values() for m in of)])
    spec["test_accuracy"] = {**dict.fromkeys(methods, 0.9), **spec["test_accuracy"]}
    draw, lines = np.random.default_rng(1), []
    for metric, of in spec.items():
        for method, value in of.items():
            for n in (0,) if method == "dense" else ROUNDS:
                for seed in range(seeds):
                    which = dataset, arch, method, n, 1 - 0.8**n, seed, METRICS[metric].dimension, metric, "none", 0.0
                    drawn = value * (1 + noise * draw.normal() * (metric in noisy))
                    lines.append((*which, 1000, drawn, f"{method}-{n}-{seed}"))
    names = [
        "dataset",
        "arch",
        "method",
        "round",
        "sparsity",
        "seed",
        "dimension",
        "metric",
        "shift",
        "severity",
        "n",
        "value",
        "ticket",
    ]
    return Evidence(label, pd.DataFrame(lines, columns=names), n_classes)


def each(metrics, **of):
    return {metric: dict(of) for metric in metrics}


GENERAL = ("test_accuracy", "ood_auroc", "corruption_error", "fgsm_accuracy")
TRACES = ("weight_hessian_trace", "input_hessian_trace")
FLAT = {"dense": 1.0, "lth": 1.0, "snip": 2.0}
FOUR = each(("ood_auroc", "ece", "fidelity", "weight_hessian_trace"), dense=0.5, lth=0.5)

# Relative, so large that nothing is told; of accuracies so small that none collapses.
NOISE = {
    "accuracy": 0.1,
    "initialisation": 0.2,
    "dynamic": 0.2,
    "generalization": 0.05,
    "calibrated": 1.0,
    "small-dense": 1.5,
}
# name: (holds, fails, which method's absence leaves it unmeasured)
ALONE_CASES = {
    "accuracy": (
        {"test_accuracy": {"dense": 0.9, "lth": 0.9, "rp": 0.8}},
        {"test_accuracy": {"dense": 0.9, "lth": 0.8, "rp": 0.7}},
        "rp",
    ),
    "beats-dense": (
        {"test_accuracy": {"dense": 0.8, "lth": 0.9, "rp": 0.7}},
        {"test_accuracy": {"dense": 0.9, "lth": 0.8, "rp": 0.7}},
        "dense",
    ),
    "generalization": (
        each(GENERAL, dense=0.5, omp=0.5, lth=0.5),
        each(GENERAL[:3], dense=0.5, omp=0.5, lth=0.5) | {"fgsm_accuracy": {"dense": 0.5, "omp": 0.3, "lth": 0.5}},
        "omp",
    ),
    "corruption": (
        {"relative_corruption_error": {"dense": 0.2, "lth": 0.3}},
        {"relative_corruption_error": {"dense": 0.3, "lth": 0.2}},
        "lth",
    ),
    "calibration-harder": (
        each(("ece", "nll"), dense=0.1, lth=0.5) | each(GENERAL, dense=0.5, lth=0.5),
        each(("ece", "nll"), dense=0.1, lth=0.1) | {"fgsm_accuracy": {"dense": 0.5, "lth": 0.2}},
        "dense",
    ),
    "calibrated": (
        {"ece": {"dense": 0.1, "rp": 0.1, "snip": 0.1, "lth": 0.2, "omp": 0.2}},
        {"ece": {"dense": 0.1, "rp": 0.2, "snip": 0.2, "lth": 0.1, "omp": 0.1}},
        "snip",
    ),
    "explained": (
        each(("fidelity", "stability"), rp=0.1, snip=0.1, lth=0.2),
        {"fidelity": {"rp": 0.1, "snip": 0.1, "lth": 0.2}, "stability": {"rp": 0.2, "snip": 0.2, "lth": 0.1}},
        "lth",
    ),
    "composition": (
        {"composition_iou": {"lth": 0.2}, "composition_iou_random": {"lth": 0.1}},
        {"composition_iou": {"lth": 0.1}, "composition_iou_random": {"lth": 0.2}},
        "lth",
    ),
    "init-flatness": (each(TRACES, **FLAT), {TRACES[0]: FLAT, TRACES[1]: {**FLAT, "lth": 3.0}}, "snip"),
    "rigl-flatness": (
        each(TRACES, rp=1.0, omp=1.0, rigl=2.0, grasp=2.0),
        {TRACES[0]: {"rp": 1.0, "rigl": 2.0}, TRACES[1]: {"rp": 2.0, "rigl": 1.0}},
        "rigl",
    ),
    "lth-pass": (FOUR, FOUR | {"ece": {"dense": 0.1, "lth": 0.3}}, "dense"),
    "small-dense": (
        each(("ece", "nll"), **{"lth": 0.1, "small-dense": 0.2}),
        each(("ece", "nll"), **{"lth": 0.2, "small-dense": 0.1}),
        "small-dense",
    ),
    "initialisation": (
        {"test_accuracy": {"rp": 0.7, "snip": 0.8, "grasp": 0.8, "lth": 0.9}},
        {"test_accuracy": {"rp": 0.7, "snip": 0.9, "grasp": 0.9, "lth": 0.8}},
        "rp",
    ),
    "dynamic": (
        {"test_accuracy": {"rp": 0.7, "snip": 0.7, "rigl": 0.8}},
        {"test_accuracy": {"rp": 0.6, "snip": 0.8, "rigl": 0.7}},
        "snip",
    ),
    "few-pay": (
        {WORST: {"dense": 0.8, "lth": 0.6}, "test_accuracy": {"dense": 0.9, "lth": 0.85}},
        {WORST: {"dense": 0.8, "lth": 0.79}, "test_accuracy": {"dense": 0.9, "lth": 0.8}},
        "dense",
    ),
}
EXTRA = ({"relative_corruption_error": {"dense": v, "lth": v}} for v in (0.3, 0.2))
NARROW, WIDE = EXTRA
FEW, MANY = ({"test_accuracy": {"dense": 0.9, "lth": v}} for v in (0.88, 0.7))
PAIRS = {
    "width-corruption": (NARROW, WIDE),
    "width-ood": ({"ood_auroc": {"dense": 0.8, "lth": 0.8}, **MANY}, {"ood_auroc": {"dense": 0.9, "lth": 0.9}, **FEW}),
    "classes": (FEW, MANY),
}


def found(name, *studies):
    return find_all(BY_NAME[name], studies)[studies[0].label].outcome


def test_every_claim_has_its_cases():
    assert {**ALONE_CASES, **PAIRS}.keys() == BY_NAME.keys()
    assert all((claim.over == ALONE) == (claim.name in ALONE_CASES) for claim in CLAIMS)


@pytest.mark.parametrize("name", ALONE_CASES)
class TestAlone:
    def test_it_holds_and_fails(self, name):
        holds, fails, _ = ALONE_CASES[name]
        assert found(name, made(holds)) == HOLDS
        assert found(name, made(fails)) == FAILS

    def test_one_seed_tells_nothing(self, name):
        study = made(ALONE_CASES[name][0], seeds=1)
        assert found(name, study) == CANNOT

    def test_noise_tells_nothing(self, name):
        assert found(name, made(ALONE_CASES[name][0], noise=NOISE.get(name, 0.5), seeds=2)) == CANNOT

    def test_what_lacks_is_not_measured(self, name):
        holds, _, method = ALONE_CASES[name]
        study = made(holds)
        without = Evidence("study", study.rows[study.rows["method"] != method], 10)
        assert found(name, without) == UNMEASURED
        assert found(name, made({})) == UNMEASURED


def test_of_rigl_both_traces_are_asked_for_and_of_grasp_what_there_is():
    few = {TRACES[0]: {"rp": 1.0, "rigl": 2.0, "grasp": 2.0}, TRACES[1]: {"rp": 1.0, "grasp": 2.0}}
    assert found("rigl-flatness", made(few)) == UNMEASURED
    assert found("rigl-flatness", made(few | {TRACES[1]: {"rp": 1.0, "rigl": 2.0}})) == HOLDS


@pytest.mark.parametrize("name", PAIRS)
class TestPairs:
    def pair(self, name, specs, **given):
        if name == "classes":
            return [made(s, label=str(i), dataset=str(i), n_classes=10**i, **given) for i, s in enumerate(specs, 1)]
        return [made(s, label=str(i), arch=f"net-x{i}", **given) for i, s in enumerate(specs, 1)]

    def test_it_holds_in_any_order_and_fails(self, name):
        pair = self.pair(name, PAIRS[name])
        assert found(name, *pair) == found(name, *pair[::-1]) == HOLDS
        # Guessing is harder with a hundred classes, so that reversing the fractions reverses the order of the shares.
        assert found(name, *self.pair(name, PAIRS[name][::-1])) == FAILS

    def test_studies_of_different_grids_are_not_compared(self, name):
        first, last = self.pair(name, PAIRS[name])
        assert found(name, first, replace(last, grid="another")) == UNMEASURED
        assert found(name, *(replace(e, grid="another") for e in (first, last))) == HOLDS

    def test_noise_one_seed_and_one_study(self, name):
        assert found(name, *self.pair(name, PAIRS[name], noise=NOISE.get(name, 0.5), seeds=2)) == CANNOT
        assert found(name, *self.pair(name, PAIRS[name], seeds=1)) == CANNOT
        assert found(name, self.pair(name, PAIRS[name])[0]) == UNMEASURED

    def test_unlike_studies_are_not_compared(self, name):
        pair = self.pair(name, PAIRS[name])
        pair[1].rows["arch"] = "other-x2"
        assert found(name, *pair) == UNMEASURED


@pytest.mark.parametrize("arch", ["resnet8", "wrn-28-10", "vgg16"])
def test_a_plain_name_has_width_one(arch):
    assert made({}, arch=arch).arch == (arch, 1.0)


def test_a_width_in_the_name():
    assert made({}, arch="resnet20s-x0.5").arch == ("resnet20s", 0.5)


def test_collapsed_tickets_decide_nothing():
    ece = {"dense": 0.1, "rp": 0.01, "snip": 0.1, "lth": 0.2, "omp": 0.2}
    study = made({"ece": ece, "test_accuracy": dict.fromkeys(ece, 0.9) | {"rp": 0.2}})
    assert found("calibrated", study) == UNMEASURED


@pytest.mark.parametrize(("temperature", "way"), [(1.3, "overconfident"), (0.7, "underconfident")])
def test_calibration_names_the_direction_of_miscalibration(temperature, way):
    methods = ("dense", "rp", "snip", "lth", "omp")
    more = each(("ece_recalibrated", "nll_recalibrated"), **dict.fromkeys(methods, 0.123))
    study = made(ALONE_CASES["calibrated"][0] | more | {"temperature": dict.fromkeys(methods, temperature)}, noise=1e-6)
    said = interpreted(BY_NAME["calibrated"], find_all(BY_NAME["calibrated"], [study])["study"])
    assert way in said
    assert "RP and LTH have an ECE of 10.00 % and 20.00 %; after temperature scaling of 12.30 % and 12.30 %" in said


def test_explanations_say_what_rescaling_leaves():
    claim, holds = BY_NAME["explained"], ALONE_CASES["explained"][0]
    for lth, said in ((0.2, "the lag of LTH remains"), (0.9, "LTH is ahead")):
        study = made(holds | {"fidelity_r2": {"rp": 0.5, "snip": 0.5, "lth": lth}})
        assert said in interpreted(claim, find_all(claim, [study])["study"])


def test_a_dense_network_trained_as_long_is_no_ticket_and_stands_beside_the_best():
    claim = BY_NAME["beats-dense"]
    accuracy = {"dense": 0.8, "lth": 0.9, "dense-long": 0.95}
    study = made({"test_accuracy": accuracy}, noise=1e-9)
    finding = find_all(claim, [study])["study"]
    assert finding.outcome == HOLDS
    assert "LTH" in finding.parts[0].said  # dense-long has more, and prunes nothing
    assert "reaches 95.00 %: beside it the ticket is behind by 5.00" in interpreted(claim, finding)
    del accuracy["lth"]
    assert found("beats-dense", made({"test_accuracy": accuracy})) == UNMEASURED


@pytest.mark.parametrize("together", [0.0, 0.95])
def test_equal_methods_are_told_apart_in_few_tries(together):
    """Eight methods, two seeds, whose rounds share a part of their deviation: about one in twenty, or fewer, is told."""
    draw, wrong, tries = np.random.default_rng(0), [0, 0], 120
    index = pd.MultiIndex.from_tuples([("dense", 0), *((m, n) for m in "abcdefg" for n in ROUNDS)])
    index.names = ["method", "round"]
    for _ in range(tries):
        own = pd.DataFrame(draw.normal(size=(8, 2)), index=["dense", *"abcdefg"])
        values = np.sqrt(together) * own.loc[index.get_level_values(0)].to_numpy()
        cells = pd.DataFrame(values + np.sqrt(1 - together) * draw.normal(size=(len(index), 2)), index=index)
        rounds = standing(cells, "a", "b")
        a, b, dense = (mean_of(cells, m, rounds) for m in (["a"], ["b"], ["dense"]))
        wrong = [n + (settle(d)[0] != CANNOT) for n, d in zip(wrong, (a - b, a - dense), strict=True)]
    assert max(wrong) / tries <= 0.1


def test_a_difference_needs_the_same_sign_at_every_seed():
    assert settle(Mean(pd.Series([1.0, 2.0]), 0.0001, 8))[0] == HOLDS
    assert settle(Mean(pd.Series([-0.1, 2.0]), 0.0001, 8))[0] == CANNOT


def test_the_chapter_names_every_claim_and_study_once():
    studies = [made(ALONE_CASES["accuracy"][0], label="one"), made(ALONE_CASES["accuracy"][1], label="t|w*o")]
    files = claims_pages(studies)
    head = files["claims-table.md"].splitlines()
    assert head[0] == "| claim | 1 | 2 |"
    rows = [line.split(" | ")[:2] for line in files["studies.md"].splitlines()[2:4]]
    assert rows == [["| 1", "one"], ["| 2", "t&#124;w&#42;o"]]
    assert [line.count("|") for line in head[: len(CLAIMS) + 2]] == [4] * (len(CLAIMS) + 2)
    assert "| ✓ | ✗ |" in head[2]
    for claim in CLAIMS:
        assert files["claims.md"].count(f"(claim-{claim.name})=") == 1
        assert (f"claim-{claim.name}.svg" in files) == (f"_generated/claim-{claim.name}.svg" in files["claims.md"])
    assert "**Study 1, one: ✓ holds.**" in files["claims.md"]
    assert "**Studies 1 and 2: – not measured.** The rule needs metrics of all four" in files["claims.md"]
    assert files["claim-accuracy.svg"].lstrip().startswith(b"<?xml")
    assert "claim-few-pay.svg" not in files


def test_studies_that_were_judged_together_are_told_together():
    pair = [made(spec, label=str(i), arch=f"net-x{i}") for i, spec in enumerate(PAIRS["width-corruption"], 1)]
    said = claims_pages([*pair, made({}, label="alone", dataset="other")])["claims.md"]
    section = said.partition("(claim-width-corruption)=")[2].partition("(claim-width-ood)=")[0]
    assert section.count("holds.**") == section.count("**Studies 1 and 2: ✓ holds.**") == 1
    assert "dense of net-x2" in section
    assert "**Study 3, alone: – not measured.**" in section


def test_where_there_is_no_ticket_there_is_no_verdict_on_tickets():
    spec = {metric: {"dense": 0.5, "dense-long": 0.5} for metric in FOUR}
    assert found("lth-pass", made(spec)) == UNMEASURED


def test_many_foreign_sets_weigh_no_more_than_one():
    lost = {"dense": 0.5, "lth": 0.2}
    kept = each(("corruption_error", "fgsm_accuracy", "ece"), dense=0.5, lth=0.5)
    study = made({**kept, "ood_auroc": lost, "nll": {"dense": 0.5, "lth": 0.9}})
    foreign = study.rows[study.rows["metric"] == "ood_auroc"]
    sets = [foreign.assign(shift=name) for name in "abcde"]
    more = replace(study, rows=pd.concat([study.rows.drop(foreign.index), *sets]))
    for e in (study, more):  # one of two metrics lost in calibration, one of four in generalization
        assert found("calibration-harder", e) == HOLDS


def test_of_each_foreign_set_chance_over_seeds_and_ranks_beside_accuracy_are_told():
    accuracy = {"dense": 0.9, "lth": 0.8, "rp": 0.7}
    study = made({"test_accuracy": accuracy, "ood_auroc": {"dense": 0.6, "lth": 0.7, "rp": 0.8}}, noise=0.01)
    noise = study.rows[study.rows["metric"] == "ood_auroc"]
    near = noise.assign(shift="near", value=1.5 - noise["value"] + 0.2 * (noise["seed"] % 2))
    rows = pd.concat([study.rows[study.rows["metric"] == "test_accuracy"], noise.assign(shift="noise"), near])
    said = claims_pages([replace(study, rows=rows), made({})])["foreign.md"].splitlines()[2:]
    found = dict(line.strip("| ").split(" | ") for line in said)
    assert [*found] == ["accuracy, seeds", "`near`, seeds", "`noise`, seeds", "`near`, ranks", "`noise`, ranks"]
    for name, of in (("noise", noise), ("near", near)):
        expected = 100 * of.groupby(["method", "round"])["value"].var().mean() ** 0.5
        assert float(found[f"`{name}`, seeds"]) == pytest.approx(expected, abs=0.05)
    assert float(found["`near`, seeds"]) > 5 * float(found["`noise`, seeds"])
    assert float(found["`near`, ranks"]) > 0.5
    assert float(found["`noise`, ranks"]) < -0.5


def test_studies_that_disagree_are_named_with_the_side_on_which_they_are_miscalibrated():
    sure = each(("ece", "sce", "nll"), dense=0.3, rp=0.1, snip=0.1, grasp=0.1, synflow=0.1, lth=0.2, omp=0.2)
    unsure = {name: {m: 0.4 - value for m, value in of.items()} for name, of in sure.items()}
    studies = [
        made(sure | {"temperature": {"dense": 1.5}}, label="a"),
        made(unsure | {"temperature": {"dense": 0.7}}, label="b"),
    ]
    files = claims_pages([replace(studies[0], passes=12_000), studies[1]])
    assert [line.split(" | ")[2] for line in files["studies.md"].splitlines()[2:4]] == ["12,000", "–"]
    assert [line.split(" | ")[5] for line in files["studies.md"].splitlines()[2:4]] == ["1.50", "0.70"]
    (line,) = [line for line in files["disagreements.md"].splitlines() if "claim-calibrated" in line]
    assert line.endswith(
        "holds in 1 (dense accuracy 90 %); fails in 2 (dense accuracy 90 %). Where it holds the dense network is too "
        "sure of its answers, where it fails too unsure."
    )
    assert claims_pages(studies[:1])["disagreements.md"].startswith("No claim")


def test_rankings_name_the_best_first_and_say_whether_a_metric_sorts_as_accuracy_does():
    accuracy = {"dense": 0.9, "lth": 0.8, "rp": 0.7}
    calibration = {"dense": 0.3, "lth": 0.2, "rp": 0.1}  # lower is better: the least accurate is the best
    nll = {"dense": 1.0, "lth": 2.0, "rp": 3.0}
    files = claims_pages([made({"test_accuracy": accuracy, "ece": calibration, "nll": nll}, noise=0)])
    (ece,) = [line for line in files["rankings.md"].splitlines() if line.startswith("| ECE")]
    assert ece == "| ECE ↓ | RP 10.00 %, LTH 20.00 %, dense 30.00 % |"
    (first,) = [line for line in files["rankings.md"].splitlines() if line.startswith("| Accuracy")]
    assert first == "| Accuracy ↑ | dense 90.00 %, LTH 80.00 %, RP 70.00 % |"
    beside = dict(line.strip("| ").split(" | ") for line in files["beside-accuracy.md"].splitlines()[2:])
    assert beside == {"ECE ↓": "-1.00", "NLL ↓": "+1.00"}
    few = claims_pages([made({"test_accuracy": {"dense": 0.9, "rp": 0.7}, "ece": {"dense": 0.3, "rp": 0.1}})])
    assert few["beside-accuracy.md"] == "No study has networks enough."
