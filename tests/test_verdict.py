import math

import numpy as np
import pandas as pd
import pytest

from lthlib.core.errors import UserError
from lthlib.metrics import ece, sce
from lthlib.results.verdict import Thresholds, lth_pass, reach, regions, scorecard, summarise


def rows(*entries):
    """Rows from (method, round, metric, [a value a seed])."""
    return pd.DataFrame(
        [
            {
                "dataset": "d",
                "arch": "a",
                "method": method,
                "round": n,
                "sparsity": 1 - 0.8**n,
                "seed": seed,
                "dimension": "x",
                "metric": metric,
                "shift": "none",
                "severity": 0,
                "n": 100,
                "value": value,
                "ticket": f"{method}{n}{seed}",
            }
            for method, n, metric, values in entries
            for seed, value in enumerate(values)
        ]
    )


def region(judged, method, n, metric):
    return judged.set_index(["method", "round", "metric"])["region"][method, n, metric]


def test_directions_and_absolute_tolerance():
    table = rows(
        ("dense", 0, "test_accuracy", [0.90]),
        ("lth", 1, "test_accuracy", [0.891]),
        ("lth", 2, "test_accuracy", [0.889]),
        ("dense", 0, "ece", [0.05]),
        ("lth", 1, "ece", [0.059]),
        ("lth", 2, "ece", [0.0611]),
        ("lth", 3, "ece", [0.01]),
        ("lth", 3, "test_accuracy", [0.95]),
    )
    judged = regions(table, 10)
    assert region(judged, "lth", 1, "test_accuracy") == "winning"
    assert region(judged, "lth", 2, "test_accuracy") == "degraded"
    assert region(judged, "lth", 1, "ece") == "winning"
    assert region(judged, "lth", 2, "ece") == "degraded"
    assert region(judged, "lth", 3, "ece") == "winning"  # lower is better


@pytest.mark.parametrize("n", [2, 3, 12, 23])
def test_a_mean_over_classes_is_forgiven_what_the_same_error_is_in_it(n):
    """Of each class 100 images are given 0.79, the rest evenly to the others; 78 are right, 22 evenly the others'.

    ECE is 0.01; each class is 0.01/n off where it is predicted and as much where it is not, so SCE is 0.02/n.
    """
    predicted, image = np.repeat(np.arange(n), 100), np.tile(np.arange(100), n)
    probs = np.full((100 * n, n), 0.21 / (n - 1))
    probs[np.arange(100 * n), predicted] = 0.79
    labels = np.where(image < 78, predicted, (predicted + 1 + image % (n - 1)) % n)
    assert ece(probs, labels) == pytest.approx(0.01)
    assert sce(probs, labels) == pytest.approx(0.02 / n)
    table = rows(
        ("dense", 0, "test_accuracy", [0.9]),
        ("lth", 1, "test_accuracy", [0.9]),
        ("lth", 2, "test_accuracy", [0.9]),
        ("dense", 0, "sce", [0.02]),
        ("lth", 1, "sce", [0.02 + 0.0199 / n]),
        ("lth", 2, "sce", [0.02 + 0.0201 / n]),
    )
    judged = regions(table, n)
    assert region(judged, "lth", 1, "sce") == "winning"
    assert region(judged, "lth", 2, "sce") == "degraded"


def test_relative_tolerance_for_other_units():
    table = rows(
        ("dense", 0, "test_accuracy", [0.9]),
        ("lth", 1, "test_accuracy", [0.9]),
        ("lth", 2, "test_accuracy", [0.9]),
        ("dense", 0, "nll", [0.200]),
        ("lth", 1, "nll", [0.2099]),
        ("lth", 2, "nll", [0.2101]),
    )
    judged = regions(table, 10)
    assert region(judged, "lth", 1, "nll") == "winning"
    assert region(judged, "lth", 2, "nll") == "degraded"


def test_chance_is_forgiven_in_standard_errors_of_the_difference():
    """Dense 0.9 +- 0.02 (two seeds): error 0.02; sparse alike; difference 0.0283; twice that forgives 0.0566."""
    table = rows(("dense", 0, "test_accuracy", [0.88, 0.92]), ("lth", 1, "test_accuracy", [0.825, 0.865]))
    judged = regions(table, 10)
    assert judged["allowed"].iloc[0] == pytest.approx(2 * math.hypot(0.02, 0.02))
    assert judged["shortfall"].iloc[0] == pytest.approx(0.055)
    assert judged["region"].iloc[0] == "winning"
    assert regions(table, 10, Thresholds(k=1.9))["region"].iloc[0] == "degraded"


def test_collapse_is_told_by_accuracy_and_marks_every_metric():
    """Half-way from 0.9 to 0.1 is 0.5."""
    table = rows(
        ("dense", 0, "test_accuracy", [0.9]),
        ("lth", 1, "test_accuracy", [0.51]),
        ("lth", 2, "test_accuracy", [0.49]),
        ("dense", 0, "ece", [0.1]),
        ("lth", 1, "ece", [0.0]),
        ("lth", 2, "ece", [0.0]),
    )
    judged = regions(table, 10)
    assert region(judged, "lth", 1, "test_accuracy") == "degraded"
    assert region(judged, "lth", 1, "ece") == "winning"
    assert region(judged, "lth", 2, "ece") == "collapsed"


def test_a_metric_without_direction_has_no_region():
    table = rows(
        ("dense", 0, "test_accuracy", [0.9]),
        ("lth", 1, "test_accuracy", [0.9]),
        ("dense", 0, "temperature", [1.5]),
        ("lth", 1, "temperature", [9.0]),
    )
    judged = regions(table, 10)
    assert region(judged, "lth", 1, "temperature") == ""
    assert lth_pass(judged)["passed"].tolist() == [True]


def test_lth_pass_needs_every_metric_and_reach_ends_at_the_first_break():
    table = rows(
        *[("dense", 0, m, [v]) for m, v in (("test_accuracy", 0.9), ("ece", 0.05))],
        ("lth", 1, "test_accuracy", [0.9]),
        ("lth", 1, "ece", [0.05]),
        ("lth", 2, "test_accuracy", [0.9]),
        ("lth", 2, "ece", [0.2]),
        ("lth", 3, "test_accuracy", [0.9]),
        ("lth", 3, "ece", [0.05]),
    )
    judged = regions(table, 10)
    passes = lth_pass(judged).set_index("round")
    assert passes["passed"].tolist() == [True, False, True]
    assert passes.loc[2, "lost"] == ["ece"]
    reached = reach(judged).loc["lth"]
    assert reached["test_accuracy"] == pytest.approx(1 - 0.8**3)
    assert reached["ece"] == pytest.approx(0.2)


def test_the_spread_is_the_range_below_five_seeds_and_students_from_five_on():
    few = summarise(rows(("dense", 0, "ece", [0.1, 0.2, 0.6])))
    assert (few["low"][0], few["high"][0]) == (0.1, 0.6)
    five = summarise(rows(("dense", 0, "ece", [1.0, 2.0, 3.0, 4.0, 5.0])))
    half = 2.776445 * math.sqrt(2.5) / math.sqrt(5)  # t(0.975, 4 degrees of freedom)
    assert five["low"][0] == pytest.approx(3 - half, rel=1e-6)
    assert five["high"][0] == pytest.approx(3 + half, rel=1e-6)


def test_the_scorecard_turns_every_metric_so_that_one_is_best():
    table = rows(
        ("dense", 0, "test_accuracy", [0.9]),
        ("lth", 1, "test_accuracy", [0.8]),
        ("rp", 1, "test_accuracy", [0.7]),
        ("dense", 0, "ece", [0.1]),
        ("lth", 1, "ece", [0.2]),
        ("rp", 1, "ece", [0.3]),
    )
    card = scorecard(summarise(table))
    assert card.loc["dense"].tolist() == [1, 1]
    assert card.loc["lth"].tolist() == pytest.approx([0.5, 0.5])
    assert card.loc["rp"].tolist() == [0, 0]


def test_rows_without_dense_and_bad_thresholds_are_refused():
    with pytest.raises(UserError, match="dense"):
        regions(rows(("lth", 1, "ece", [0.1])), 10)
    with pytest.raises(UserError, match="tolerance"):
        Thresholds(tolerance=-1)
