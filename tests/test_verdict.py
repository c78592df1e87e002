import math

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binom

from lthlib.core.errors import UserError
from lthlib.metrics import METRICS, Value, ece, sce
from lthlib.metrics.resampling import kept, resampled_auroc, resampled_mean, resamples
from lthlib.results.noninferiority import BOTH, IMAGES, TRAININGS, moderated
from lthlib.results.simulation import outcomes, simulate
from lthlib.results.verdict import (
    Thresholds,
    ends,
    judge,
    lth_pass,
    reach,
    scorecard,
    summarise,
    thresholds_from,
    what_would_decide,
)

VOTES = [metric.name for metric in METRICS.values() if metric.in_verdict]


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


def known(table, error=1e-4, n=100, step=0.0):
    """Replicates of a table: every network's own, independent of the others', with one standard deviation."""
    found, rng = {}, np.random.default_rng(0)
    for line in table.itertuples():
        deviations = error * rng.standard_normal(200)
        found.setdefault(line.ticket, {}).update(
            kept(Value(line.metric, line.value, n), line.value + deviations - deviations.mean(), step)
        )
    return found


def outcome(judged, method, n, metric):
    return judged.set_index(["method", "round", "metric"])["outcome"][method, n, metric]


def judged_surely(*entries, n_classes=10):
    table = rows(*entries)
    return judge(table, known(table), n_classes)


# --- the thresholds ----------------------------------------------------------------------------------------


def test_directions_and_absolute_tolerance():
    judged = judged_surely(
        ("dense", 0, "test_accuracy", [0.90]),
        ("lth", 1, "test_accuracy", [0.891]),
        ("lth", 2, "test_accuracy", [0.889]),
        ("lth", 3, "test_accuracy", [0.89]),
        ("dense", 0, "ece", [0.05]),
        ("lth", 1, "ece", [0.059]),
        ("lth", 2, "ece", [0.0611]),
        ("lth", 3, "ece", [0.01]),
    )
    assert outcome(judged, "lth", 1, "test_accuracy") == "kept"
    assert outcome(judged, "lth", 2, "test_accuracy") == "lost"
    assert outcome(judged, "lth", 3, "test_accuracy") == "not shown"  # the interval holds the tolerance
    assert outcome(judged, "lth", 1, "ece") == "kept"
    assert outcome(judged, "lth", 2, "ece") == "lost"
    assert outcome(judged, "lth", 3, "ece") == "kept"  # lower is better


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
    judged = judge(table, known(table, 1e-7), n)
    assert outcome(judged, "lth", 1, "sce") == "kept"
    assert outcome(judged, "lth", 2, "sce") == "lost"


def test_relative_tolerance_for_other_units():
    judged = judged_surely(
        ("dense", 0, "test_accuracy", [0.9]),
        ("lth", 1, "test_accuracy", [0.9]),
        ("lth", 2, "test_accuracy", [0.9]),
        ("dense", 0, "nll", [0.200]),
        ("lth", 1, "nll", [0.2090]),
        ("lth", 2, "nll", [0.2110]),
    )
    assert outcome(judged, "lth", 1, "nll") == "kept"
    assert outcome(judged, "lth", 2, "nll") == "lost"


def test_collapse_is_told_by_accuracy_and_marks_every_metric():
    """Half-way from 0.9 to 0.1 is 0.5."""
    judged = judged_surely(
        ("dense", 0, "test_accuracy", [0.9]),
        ("lth", 1, "test_accuracy", [0.51]),
        ("lth", 2, "test_accuracy", [0.49]),
        ("dense", 0, "ece", [0.1]),
        ("lth", 1, "ece", [0.0]),
        ("lth", 2, "ece", [0.0]),
    )
    assert outcome(judged, "lth", 1, "test_accuracy") == "lost"
    assert outcome(judged, "lth", 1, "ece") == "kept"
    assert outcome(judged, "lth", 2, "ece") == "collapsed"


def test_a_metric_without_direction_has_no_outcome():
    judged = judged_surely(
        ("dense", 0, "test_accuracy", [0.9]),
        ("lth", 1, "test_accuracy", [0.9]),
        ("dense", 0, "temperature", [1.5]),
        ("lth", 1, "temperature", [9.0]),
    )
    assert outcome(judged, "lth", 1, "temperature") == ""
    assert lth_pass(judged)["passed"].tolist() == [True]


def test_lth_pass_needs_every_metric_and_reach_ends_at_the_first_break():
    judged = judged_surely(
        *[("dense", 0, m, [v]) for m, v in (("test_accuracy", 0.9), ("ece", 0.05))],
        ("lth", 1, "test_accuracy", [0.9]),
        ("lth", 1, "ece", [0.05]),
        ("lth", 2, "test_accuracy", [0.9]),
        ("lth", 2, "ece", [0.2]),
        ("lth", 3, "test_accuracy", [0.9]),
        ("lth", 3, "ece", [0.05]),
        ("lth", 4, "test_accuracy", [0.89]),
        ("lth", 4, "ece", [0.05]),
        ("lth", 5, "test_accuracy", [0.9]),
    )
    passes = lth_pass(judged).set_index("round")
    assert passes["outcome"].tolist() == ["kept", "lost", "kept", "not shown", "not shown"]  # the last: ECE is missing
    assert passes["passed"].tolist() == [True, False, True, False, False]
    assert passes.loc[2, "lost"] == ["ece"]
    assert passes.loc[4, "open"] == ["test_accuracy"]
    reached, ended = reach(judged).loc["lth"], ends(judged).loc["lth"]
    assert reached["test_accuracy"] == pytest.approx(1 - 0.8**3)
    assert reached["ece"] == pytest.approx(0.2)
    assert (ended["test_accuracy"], ended["ece"]) == ("not shown", "lost")
    assert ends(judged, by="dimension").loc["lth", "calibration"] == "lost"


# --- the interval ------------------------------------------------------------------------------------------


def test_the_example_of_the_chapter_by_hand():
    """One network a side, eight images: dense is right on 7, sparse on 6, one image apart in either direction more.

    Paired differences dense - sparse are 1, 1, -1, 0, 0, 0, 0, 0: mean 1/8, population variance 3/8 - 1/64 = 23/64, so
    the error is sqrt(23/64/8) = 0.212. Unpaired it would be sqrt((7/64 + 12/64)/8) = 0.193: these answers disagree.
    """
    dense, sparse = np.array([1, 1, 0, 1, 1, 1, 1, 1.0]), np.array([0, 0, 1, 1, 1, 1, 1, 1.0])
    counts = resamples(8, replicates=4000)
    table = rows(("dense", 0, "test_accuracy", [7 / 8]), ("lth", 1, "test_accuracy", [6 / 8]))
    replicates = {
        f"{name}0": kept(Value("test_accuracy", a.mean(), 8), resampled_mean(a, counts))
        for name, a in (("dense0", dense), ("lth1", sparse))
    }
    (line,) = judge(table, replicates, 10).to_dict("records")
    assert line["images_error"] == pytest.approx(math.sqrt(23 / 64 / 8), rel=0.03)
    assert line["most"] == pytest.approx(1 / 8 + 1.895 * line["images_error"], rel=0.01)  # t(0.95, 7)
    assert (line["outcome"], line["scope"]) == ("not shown", IMAGES)


def test_images_that_both_sides_share_are_not_noise():
    """An image that all networks fail alike says nothing of their difference; each network's own noise does."""
    rng, counts = np.random.default_rng(0), resamples(400)
    shared = rng.random(400)
    table = rows(("dense", 0, "test_accuracy", [0.5, 0.5]), ("lth", 1, "test_accuracy", [0.5, 0.5]))
    again = {
        ticket: kept(Value("test_accuracy", 0.5, 400), resampled_mean(shared, counts)) for ticket in table["ticket"]
    }
    (line,) = judge(table, again, 10).to_dict("records")
    assert line["images_error"] == pytest.approx(0, abs=1e-6)
    assert line["scope"] == BOTH


def test_resamples_are_balanced_shared_and_those_of_the_set():
    counts = resamples(30)
    assert (counts.sum(0) == 200).all()
    assert (counts.sum(1) == 30).all()
    assert resampled_mean(np.arange(30.0) ** 3, counts).mean() == pytest.approx((np.arange(30.0) ** 3).mean())
    assert (counts == resamples(30)).all()
    assert (counts != resamples(30, "ood:digits")).any()
    terms = np.random.default_rng(0).random(500)
    assert resampled_mean(terms, resamples(500)).std() == pytest.approx(terms.std() / math.sqrt(500), rel=0.15)


def test_resampled_auroc_is_that_of_the_resample():
    rng = np.random.default_rng(0)
    known_, foreign = rng.integers(0, 9, 20), rng.integers(3, 12, 15)
    ours, theirs = resamples(20, replicates=5), resamples(15, "other", 5)
    found = resampled_auroc(known_, foreign, ours, theirs)
    for b in range(5):
        a, f = np.repeat(known_, ours[b].astype(int)), np.repeat(foreign, theirs[b].astype(int))
        pairs = (f[:, None] > a).mean() + 0.5 * (f[:, None] == a).mean()
        assert found[b] == pytest.approx(pairs)


def test_alike_tickets_lend_degrees_of_freedom_and_unlike_ones_do_not():
    rng, rounds = np.random.default_rng(0), np.repeat(np.arange(1, 7), 50)
    chance = rng.chisquare(1, 300)
    everyone = np.ones(300, bool)
    variance, df = moderated(chance, np.ones(300, int), rounds, everyone)
    assert df[0] == 6
    assert np.median(variance) == pytest.approx(1, rel=0.2)
    _, few = moderated(chance * np.exp(3 * rng.standard_normal(300)), np.ones(300, int), rounds, everyone)
    assert few[0] < 2.5
    grown, _ = moderated(chance * np.exp(rounds), np.ones(300, int), rounds, everyone)
    slope = np.polyfit(rounds, np.log(grown), 1)[0]
    assert slope == pytest.approx(1, abs=0.2)


def test_what_the_older_rule_forgave_is_now_not_shown():
    """Dense 0.9 +- 0.02 (two seeds), sparse alike 0.055 below: two errors forgave 0.0566."""
    table = rows(("dense", 0, "test_accuracy", [0.88, 0.92]), ("lth", 1, "test_accuracy", [0.825, 0.865]))
    (line,) = judge(table, known(table, 0.001), 10).to_dict("records")
    assert (line["older"], line["outcome"]) == ("winning", "not shown")
    assert line["seeds_error"] == pytest.approx(math.hypot(0.02, 0.02))
    assert "seeds (2 now)" in what_would_decide(line)
    assert line["images_needed"] == math.inf


# --- simulated studies whose truth is known ----------------------------------------------------------------


@pytest.mark.parametrize(("seeds", "trainings"), [(1, 0.0), (2, 0.3), (2, 3.0), (3, 10.0)])
def test_dense_against_dense_is_rarely_called_a_loss(seeds, trainings):
    tries = 250
    found = outcomes(simulate(tries, 100, seeds, trainings=trainings, metrics=VOTES))
    assert found["any lost"] <= binom.ppf(0.999, tries, 0.05) / tries  # what a true rate of 5 % may come to by chance


@pytest.mark.parametrize(("seeds", "trainings"), [(1, 0.0), (2, 0.3), (2, 3.0)])
def test_twice_the_tolerance_is_rarely_called_kept(seeds, trainings):
    assert outcomes(simulate(30, 300, seeds, trainings=trainings, loss=2, metrics=VOTES))["kept"] <= 0.06


def test_images_and_seeds_buy_power_and_the_forecast_is_right():
    few, many = (simulate(60, n, 3, metrics=VOTES[:4]) for n in (100, 3000))
    assert outcomes(few)["kept"] < 0.3
    assert outcomes(many)["kept"] > 0.75
    assert many["power"].mean() == pytest.approx(outcomes(many)["kept"], abs=0.1)
    assert outcomes(simulate(30, 3000, 3, loss=3, metrics=VOTES[:4]))["lost"] > 0.9


# --- bad input ---------------------------------------------------------------------------------------------

PAIR = ("dense", 0, "test_accuracy", [0.9]), ("lth", 1, "test_accuracy", [0.9])


def test_no_rows_no_dense_run_and_bad_thresholds_are_refused():
    with pytest.raises(UserError, match="no rows"):
        judge(rows(("lth", 1, "ece", [])), {}, 10)
    with pytest.raises(UserError, match="no dense run of d a"):
        judge(rows(("lth", 1, "ece", [0.1])), {}, 10)
    for bad in ({"tolerance": -1}, {"alpha": 0}, {"alpha": 0.7}, {"relative_tolerance": True}):
        with pytest.raises(UserError, match=next(iter(bad))):
            Thresholds(**bad)
    with pytest.raises(UserError, match="must be a mapping"):
        thresholds_from([0.01])
    with pytest.raises(UserError, match="tolerance"):
        thresholds_from({"tolerence": 0.02})


def test_what_is_not_known_is_not_shown():
    table = rows(*PAIR)
    (line,) = judge(table, {}, 10).to_dict("records")  # recorded without replicates, one seed
    assert (line["outcome"], line["scope"]) == ("not shown", "")
    assert "second seed" in what_would_decide(line)
    (line,) = judge(table, known(table, 0, n=1), 10).to_dict("records")  # one image
    assert line["outcome"] == "not shown"
    two = rows(("dense", 0, "test_accuracy", [0.9, 0.9001]), ("lth", 1, "test_accuracy", [0.9, 0.9001]))
    (line,) = judge(two, {}, 10).to_dict("records")
    assert (line["outcome"], line["scope"]) == ("kept", TRAININGS)
    alone = judge(rows(*PAIR, ("lth", 1, "nll", [0.1])), {}, 10).set_index("metric").loc["nll"]
    assert alone["outcome"] == "not shown"
    assert "missing" in what_would_decide(alone)


def test_a_resample_without_any_number_tells_nothing_of_other_images():
    table = rows(("dense", 0, "ece", [0.1]), ("lth", 1, "ece", [0.2]), ("rp", 1, "ece", [0.2]))
    found = known(table)
    for array in found["lth10"].values():
        array[5] = np.nan
    judged = judge(table, found, 10)
    assert outcome(judged, "rp", 1, "ece") == "lost"
    assert outcome(judged, "lth", 1, "ece") == "not shown"


@pytest.mark.parametrize(("n", "expected"), [(100, "not shown"), (400, "kept")])
def test_answers_that_all_agree_show_only_what_their_number_shows(n, expected):
    """No image told the networks apart: that bounds the rate of those which would below 3/n, 0.75 points of 400."""
    table = rows(*PAIR)
    (line,) = judge(table, known(table, 0, n, step=1 / n), 10).to_dict("records")
    assert line["most"] == pytest.approx(3 / n, rel=0.02)
    assert line["outcome"] == expected


def test_a_tolerance_of_zero_asks_for_proof_that_there_is_no_loss():
    table = rows(
        ("dense", 0, "test_accuracy", [0.9]), ("lth", 1, "test_accuracy", [0.9]), ("lth", 2, "test_accuracy", [0.91])
    )
    judged = judge(table, known(table), 10, Thresholds(tolerance=0))
    assert judged["outcome"].tolist() == ["not shown", "kept"]
    assert "too near the tolerance" in what_would_decide(judged.iloc[0])
    same = judge(table, known(table, 0), 10, Thresholds(tolerance=0))  # constant terms: a point, not an interval
    assert same["outcome"].tolist() == ["kept", "kept"]


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
