"""Who pays: recall by class, churn and exemplars on made-up answers whose truth is known."""

from dataclasses import replace
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import recall_score

from lthlib.book import who_pays
from lthlib.core.errors import UserError
from lthlib.figures.classes import MOST_CLASSES, exemplar_gallery, recall_map
from lthlib.metrics import METRICS, Value, computed
from lthlib.metrics.generalization.classes import (
    disagreement,
    exemplars,
    kept_answers,
    recall_by_class,
    worst_class_accuracy,
)
from lthlib.metrics.registry import measured_on_test
from lthlib.metrics.resampling import held, resamples
from lthlib.results.classes import churn, exemplar_table, odd_ones, recall_changes
from lthlib.results.collect import rows_of
from lthlib.results.evaluate import Evaluation
from lthlib.results.verdict import judge
from lthlib.tickets.ticket import Ticket

CLASSES = ("cat", "dog", "newt", "owl")  # of owls there are no test images
LABELS = np.repeat([0, 1, 2], [40, 40, 20])


def logits_of(predicted, n_classes=4):
    return np.eye(n_classes)[predicted] * 3.0


def answers(wrong, labels=LABELS, as_=3):
    """Right answers, but for the images at some positions."""
    predicted = labels.copy()
    predicted[list(wrong)] = as_
    return predicted


def study(by_case, seeds=2, classes=CLASSES, labels=LABELS):
    """Evaluations of {(method, round): [answers of each seed]}; None for one that kept no answers."""
    found = []
    for (method, round), each in by_case.items():
        for seed, predicted in enumerate(each[:seeds]):
            ticket = Ticket(method=method, round=round, seed=seed)
            kept = {} if predicted is None else kept_answers(logits_of(predicted, len(classes)), labels, classes)
            accuracy = 1.0 if predicted is None else float((predicted == labels).mean())
            info = {"sparsity": ticket.sparsity}
            found.append(Evaluation(ticket, info, [Value("test_accuracy", accuracy, len(labels))], kept, {}))
    lines = [
        {"method": e.ticket.method, "round": e.ticket.round, "seed": e.ticket.seed, "ticket": e.ticket.id}
        for e in found
    ]
    return found, pd.DataFrame(lines), {e.ticket.id: e.arrays for e in found}


# ------------------------------------------------------------------------------------------- functions of answers


def test_the_worst_class_is_that_of_lowest_recall_among_those_with_images():
    predicted = answers([0, 1, 40, 80, 81, 82])
    assert worst_class_accuracy(logits_of(predicted), LABELS) == 17 / 20
    assert recall_by_class(predicted, LABELS, 4) == pytest.approx([38 / 40, 39 / 40, 17 / 20, np.nan], nan_ok=True)
    assert computed(["worst_class_accuracy"], logits_of(predicted), LABELS) == {"worst_class_accuracy": 17 / 20}


def test_recall_is_not_precision_and_agrees_with_scikit_learn():
    rng = np.random.default_rng(0)
    labels, predicted = rng.integers(0, 5, 300), rng.integers(0, 5, 300)
    expected = recall_score(labels, predicted, average=None)
    np.testing.assert_allclose(recall_by_class(predicted, labels, 5), expected)
    assert worst_class_accuracy(logits_of(predicted, 5), labels) == expected.min()


def test_a_class_that_is_only_ever_answered_wrongly_does_not_count_as_one_without_images():
    assert worst_class_accuracy(logits_of(answers(range(80, 100))), LABELS) == 0


def test_labels_of_another_set_are_refused():
    with pytest.raises(UserError, match="labels run from 0 to 2"):
        worst_class_accuracy(np.zeros((100, 2)), LABELS)


def test_churn_counts_changes_between_two_wrong_answers_too():
    assert disagreement(np.array([0, 1, 2, 3]), np.array([0, 1, 3, 1])) == 0.5


def test_exemplars_need_agreement_on_either_side():
    dense = np.array([[0, 0, 0, 1, 0], [0, 0, 1, 1, 0]])
    sparse = np.array([[0, 1, 1, 1, 1], [0, 1, 1, 1, 2]])
    assert exemplars(dense, sparse).tolist() == [False, True, False, False, False]


# ---------------------------------------------------------------------------------------------- what is kept


def test_what_is_kept_is_small_and_whole():
    many = tuple(f"class {i}" for i in range(300))
    kept = kept_answers(logits_of(answers([0]), 300), LABELS, many)
    assert kept["predicted"].dtype == kept["labels"].dtype == np.uint16
    kept = kept_answers(logits_of(answers([0])), LABELS, CLASSES)
    assert kept["predicted"].dtype == np.uint8
    np.testing.assert_array_equal(kept["predicted"], answers([0]))
    assert tuple(kept["classes"]) == CLASSES


def test_replicates_of_the_worst_class_are_those_of_each_resample_taken_alone():
    rng = np.random.default_rng(1)
    labels, predicted = rng.integers(0, 3, 60), rng.integers(0, 3, 60)
    kept = kept_answers(logits_of(predicted), labels, CLASSES)
    found = held(kept, "worst_class_accuracy", "none", 0)
    value = worst_class_accuracy(logits_of(predicted), labels)
    for replicate, counts in list(zip(found[2:], resamples(60), strict=True))[:20]:
        drawn = np.repeat(np.arange(60), counts.astype(int))
        alone = recall_score(labels[drawn], predicted[drawn], average=None, labels=np.unique(labels)).min()
        assert replicate + value == pytest.approx(alone, abs=1e-3)
    worst = np.nanargmin(recall_by_class(predicted, labels, 3))
    assert found[:2] == pytest.approx([60, 1 / (labels == worst).sum()])


def test_a_rare_class_that_a_resample_misses_is_left_out_of_it():
    labels = np.array([0] * 30 + [1])
    found = held(kept_answers(logits_of(answers([0], labels, 3)), labels, CLASSES), "worst_class_accuracy", "none", 0)
    assert np.isfinite(found).all()


# ------------------------------------------------------------------------------------------------- of a study

PAYING = {  # newts pay: dense seeds miss one each, LTH three more; RP loses the same images in all classes, evenly
    ("dense", 0): [answers([80]), answers([81])],
    ("lth", 3): [answers([80, 90, 91, 92]), answers([81, 90, 91, 93])],
    ("rp", 3): [answers([0, 40, 80]), answers([1, 41, 81])],
}


def test_the_class_that_pays_is_found_and_what_dense_seeds_differ_by_stands_beside():
    dense = [answers([80]), answers([81, 82])]
    _, tickets, arrays = study({**PAYING, ("dense", 0): dense})
    changes = recall_changes(tickets, arrays, [("lth", 3), ("rp", 3)])
    assert list(changes.index) == ["cat", "dog", "newt"]  # no owls
    assert changes["lth", 3].to_list() == pytest.approx([0, 0, (16 + 16 - 19 - 18) / 2 / 20])
    assert changes["rp", 3].to_list() == pytest.approx([-1 / 40, -1 / 40, (19 + 19 - 19 - 18) / 2 / 20])
    assert changes["dense"].to_list() == pytest.approx([0, 0, 1 / 20])


def test_churn_is_beside_the_parent_of_the_same_seed_and_its_floor_between_dense_seeds():
    found, *_ = study(PAYING)
    rows = rows_of(found, "generalization")
    rows = rows[rows["metric"] == "churn"].set_index(["method", "seed"])["value"]
    assert rows.to_dict() == {
        ("dense", 1): 0.02,  # images 80 and 81; the first seed has none before it
        ("lth", 0): 0.03,
        ("lth", 1): 0.03,
        ("rp", 0): 0.02,
        ("rp", 1): 0.02,
    }


def test_churn_never_mixes_dense_networks_of_different_trainings():
    short = Ticket(recipe=replace(Ticket().recipe, epochs=3), seed=1)
    pairs = [(Ticket(seed=0), answers([])), (short, answers([0]))]
    assert churn((t, {"predicted": p}) for t, p in pairs) == {}


def test_planted_exemplars_are_found_with_who_is_right():
    _, tickets, arrays = study(PAYING)
    odd = odd_ones(tickets, arrays, "lth", 3)
    assert odd["image"].to_list() == [90, 91]  # 92 and 93: of one seed each; 80 and 81: the dense seeds differ
    assert odd.iloc[0].to_dict() == {"image": 90, "true": "newt", "dense": "newt", "sparse": "owl"}
    table = exemplar_table(tickets, arrays)
    assert table["exemplars"].to_list() == [2, 0]
    assert (table["dense right"] + table["sparse right"] + table["neither"]).to_list() == [2, 0]


def test_one_seed_has_no_floor_and_no_exemplars_and_is_no_error():
    found, tickets, arrays = study(PAYING, seeds=1)
    assert set(churn((e.ticket, e.arrays) for e in found)) == {e.ticket.id for e in found if e.ticket.round}
    changes = recall_changes(tickets, arrays, [("lth", 3)])
    assert changes["dense"].isna().all()
    assert changes["lth", 3].to_list() == pytest.approx([0, 0, -3 / 20])
    assert odd_ones(tickets, arrays, "lth", 3) is None
    assert exemplar_table(tickets, arrays).empty
    judged = judge(rows_of(found, "generalization"), arrays, 4)
    assert (judged.loc[judged["metric"] == "churn", "outcome"] == "not shown").all()


def test_what_is_not_recorded_is_left_out_and_is_no_error():
    found, tickets, arrays = study({**PAYING, ("rp", 3): [None, None]})
    assert list(recall_changes(tickets, arrays, [("lth", 3), ("rp", 3)])) == [("lth", 3), "dense"]
    assert len(exemplar_table(tickets, arrays)) == 1
    assert odd_ones(tickets, arrays, "rp", 3) is None
    found, tickets, arrays = study({key: [None, None] for key in PAYING})
    assert recall_changes(tickets, arrays, [("lth", 3)]).empty
    assert exemplar_table(tickets, arrays).empty
    assert set(rows_of(found, "generalization")["metric"]) == {"test_accuracy"}


def test_none_of_it_has_a_vote():
    assert not METRICS["worst_class_accuracy"].in_verdict
    assert not METRICS["churn"].in_verdict
    assert "worst_class_accuracy" in measured_on_test("generalization")


# --------------------------------------------------------------------------------------------------- figures


def test_the_map_shows_both_ends_of_many_classes():
    changes = pd.DataFrame({"LTH": np.linspace(-0.3, 0.2, 50), "dense": 0.01}, index=[f"c{i}" for i in range(50)])
    axis = recall_map(changes.sample(frac=1, random_state=0)).axes[0]
    shown = [text.get_text().split()[0] for text in axis.get_yticklabels()]
    half = MOST_CLASSES // 2
    assert shown == [f"c{i}" for i in [*range(half), *range(50 - half, 50)]]
    assert axis.get_yticklabels()[0].get_text() == "c0  (±1.0)"
    plt.close("all")


def test_the_gallery_names_truth_and_both_answers():
    odd = pd.DataFrame({"image": [3], "true": ["newt"], "dense": ["newt"], "sparse": ["owl"]})
    figure = exemplar_gallery({"LTH": (np.zeros((1, 8, 8, 1), np.uint8), odd)})
    assert [text.get_text() for text in figure.axes[0].texts] == ["newt\nnewt → owl"]
    plt.close("all")


@pytest.mark.parametrize("seeds", [1, 2])
def test_a_page_of_older_results_says_so(monkeypatch, seeds):
    shown = []
    monkeypatch.setattr(who_pays.pages, "show", lambda *items: shown.extend(items))
    _, tickets, arrays = study({key: [None, None] for key in PAYING}, seeds)
    page = SimpleNamespace(
        results=SimpleNamespace(tickets=tickets, arrays=arrays),
        is_comparison=True,
        study=SimpleNamespace(methods=["lth", "rp"], rounds=[3], seeds=range(seeds)),
    )
    who_pays.by_class(page, 3)
    who_pays.exemplars(page, 3)
    assert shown[0] is who_pays.NOT_RECORDED
    assert len(shown) == 2
