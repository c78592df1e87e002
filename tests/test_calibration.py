"""Calibration metrics: hand-made cases, laws, and independent libraries where they should agree."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import brier_score_loss, log_loss
from torchmetrics.functional.classification import binary_calibration_error, multiclass_calibration_error

from lthlib.core.errors import UserError
from lthlib.data.corrupted import sample as positions
from lthlib.data.corruptions import corrupt
from lthlib.metrics import METRICS, computed, softmax
from lthlib.metrics.calibration.errors import ace, adaptive_ece, bin_index, ece, ece_lthpass, reliability_diagram, sce
from lthlib.metrics.calibration.intervals import bootstrap_intervals
from lthlib.metrics.calibration.measure import measure
from lthlib.metrics.calibration.scores import brier, brier_decomposition, nll, temperature_scaling
from lthlib.metrics.generalization import measure as generalization
from lthlib.tickets.subject import Subject
from lthlib.tickets.ticket import Ticket
from lthlib.training.loop import as_input

BINNED = [ece, sce, adaptive_ece, ace]
OF_PROBS = [*BINNED, brier]


def sample(seed, n=400, n_classes=5, scale=2.0):
    """Logits with labels that they predict better than chance, but not as well as they claim."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(n_classes, size=n)
    logits = rng.normal(size=(n, n_classes)) * scale
    logits[np.arange(n), labels] += 1.5
    return logits.astype(np.float32), labels


def two_class(confidences, hits):
    """Probabilities with the given confidences in class 0, and labels so that the hits come out."""
    first = np.asarray(confidences, dtype=np.float64)
    return np.stack([first, 1 - first], axis=1), 1 - np.asarray(hits)


def wavy(seed, n=4000):
    """Over- and underconfident in turn, so that every shift of a bin edge changes the error."""
    rng = np.random.default_rng(seed)
    confidence = rng.uniform(0.5, 1, size=n)
    return two_class(confidence, rng.random(n) < 0.5 + 0.4 * np.sin(60 * confidence))


# ------------------------------------------------------------------------------------------------- the bins


@pytest.mark.parametrize("n_bins", [1, 2, 3, 7, 10, 14, 15, 49, 50, 51, 100, 103])
def test_bins_are_decided_by_the_edge_itself_and_its_neighbours(n_bins):
    k = np.arange(1, n_bins)
    edge = k / n_bins
    below, above = np.nextafter(edge, 0), np.nextafter(edge, 1)
    for p, right, left in [(below, k - 1, k - 1), (edge, k - 1, k), (above, k, k)]:
        np.testing.assert_array_equal(bin_index(p, n_bins, "right"), right)
        np.testing.assert_array_equal(bin_index(p, n_bins, "left"), left)
    for edges in ("right", "left"):
        np.testing.assert_array_equal(bin_index(np.array([0.0, 1.0]), n_bins, edges), [0, n_bins - 1])


def test_ece_on_a_shared_edge_is_right_closed_by_default():
    probs, labels = two_class([0.55, 0.6, 0.65], [0, 1, 0])
    right = (abs((0 - 0.55) + (1 - 0.6)) + abs(0 - 0.65)) / 3
    left = (abs(0 - 0.55) + abs((1 - 0.6) + (0 - 0.65))) / 3
    assert ece(probs, labels, n_bins=5) == pytest.approx(right, abs=1e-15)
    assert ece(probs, labels, n_bins=5, edges="left") == pytest.approx(left, abs=1e-15)


def test_confidence_of_exactly_one_shares_the_last_bin_unlike_torchmetrics():
    probs, labels = two_class([0.95, 1.0], [1, 0])
    guo = abs((1 - 0.95) + (0 - 1.0)) / 2
    for edges in ("right", "left"):
        assert ece(probs, labels, edges=edges) == pytest.approx(guo, abs=1e-15)
    theirs = multiclass_calibration_error(torch.tensor(probs), torch.tensor(labels), 2, n_bins=15)
    assert float(theirs) == pytest.approx(((1 - 0.95) + (1.0 - 0)) / 2)


def test_float32_softmax_above_one_counts_as_one():
    over = np.nextafter(np.float32(1), np.float32(2))
    probs = np.array([[over, 0], [1, 0]], dtype=np.float32)
    assert ece(probs, [1, 0]) == pytest.approx(abs((0 - 1) + (1 - 1)) / 2)


def test_sce_counts_probabilities_of_exactly_zero_and_one():
    probs = [[1, 0, 0], [0, 1, 0], [0, 1, 0]]
    # class 0: the 1 is right. Class 1: two 1s, one right. Class 2: three 0s, one is the true class.
    expected = (0 + abs(1 - 2) + 1) / 3 / 3
    assert sce(probs, [0, 1, 2]) == pytest.approx(expected)
    assert sce(np.eye(3), [0, 1, 2]) == 0


# -------------------------------------------------------------------------------- agreement and definitions


@pytest.mark.parametrize("n_bins", [1, 10, 15, 100])
def test_ece_agrees_with_torchmetrics_off_the_edges(n_bins):
    probs, labels = wavy(0)
    theirs = multiclass_calibration_error(torch.tensor(probs), torch.tensor(labels), 2, n_bins=n_bins)
    assert ece(probs, labels, n_bins=n_bins) == pytest.approx(float(theirs), abs=1e-6)
    if n_bins > 1:
        assert abs(ece(probs, labels, n_bins=n_bins) - ece(probs, labels, n_bins=n_bins - 1)) > 1e-3


def official_ece(probs, labels):
    """The published definition, in words: 15 edges, right-closed, the overflow bin never visited."""
    confidence, hits = probs.max(axis=1), probs.argmax(axis=1) == labels
    bins = np.digitize(confidence, np.linspace(0, 1, 15), right=True)
    gaps = [hits[bins == b].sum() - confidence[bins == b].sum(dtype=np.float64) for b in range(15)]
    return np.abs(gaps).sum() / len(labels)


def test_the_published_fourteen_bins_are_reproduced():
    probs, labels = wavy(1)
    probs = probs.astype(np.float32)
    probs[:10] = [0.5, 0.5]  # an edge of 14 bins
    assert ece_lthpass(probs, labels) == pytest.approx(official_ece(probs, labels), abs=1e-12)
    assert ece_lthpass(probs, labels) == ece(probs, labels, n_bins=14)
    assert abs(ece_lthpass(probs, labels) - ece(probs, labels)) > 1e-3
    rough = torch.from_numpy(probs).bfloat16().requires_grad_()
    assert ece_lthpass(rough, labels) == ece_lthpass(rough.detach().float().numpy(), labels)

    probs[10:500] = [np.nextafter(np.float32(1), np.float32(2)), 0]  # never summed there
    assert ece_lthpass(probs, labels) == pytest.approx(official_ece(probs, labels), abs=1e-12)
    assert abs(ece_lthpass(probs, labels) - ece(probs, labels, n_bins=14)) > 1e-3


def test_sce_of_two_classes_is_the_binary_ece_of_either():
    logits, labels = sample(2, n_classes=2)
    probs = softmax(logits)
    for target, p in [(labels, probs[:, 1]), (1 - labels, probs[:, 0])]:
        binary = binary_calibration_error(torch.tensor(p), torch.tensor(target), n_bins=15)
        assert sce(probs, labels) == pytest.approx(float(binary), abs=1e-6)


def test_sce_is_the_mean_over_classes_of_their_binary_errors():
    logits, labels = sample(3)
    probs = softmax(logits)
    parts = [
        float(binary_calibration_error(torch.tensor(probs[:, c]), torch.tensor(labels == c).int(), n_bins=15))
        for c in range(5)
    ]
    assert sce(probs, labels) == pytest.approx(np.mean(parts), abs=1e-6)


def as_the_post_prints_it(probs, labels, n_bins):
    """|Number of images of class c minus mean probability| over bins and classes, divided by N C."""
    total = 0.0
    for c, p in enumerate(probs.T):
        bins = np.digitize(p, np.arange(1, n_bins) / n_bins, right=True)
        total += sum(abs((labels[bins == b] == c).sum() - p[bins == b].mean()) for b in np.unique(bins))
    return total / probs.size


def test_the_page_says_what_the_formula_of_the_post_gives():
    two = np.array([[0.6, 0.3, 0.1], [0.2, 0.7, 0.1]]), np.array([0, 2])
    rng = np.random.default_rng(0)
    probs = softmax(3 * rng.normal(size=(1000, 10)))
    labels = (probs.cumsum(axis=1) < rng.random((1000, 1))).sum(axis=1)  # drawn from the probabilities: calibrated
    page = (Path(__file__).parents[1] / "book/metrics/ece.md").read_text()
    assert f"= {as_the_post_prints_it(*two, 2):.3f}$ instead of {sce(*two, 2):.1f}." in page
    assert f"it is {as_the_post_prints_it(probs, labels, 15):.3f}; the SCE is {sce(probs, labels):.3f}" in page


def test_adaptive_ece_cuts_the_sorted_confidences_into_equal_parts():
    logits, labels = sample(4, n=150)
    probs = softmax(logits)
    order = np.argsort(probs.max(axis=1))
    residual = ((probs.argmax(axis=1) == labels) - probs.max(axis=1))[order]
    assert adaptive_ece(probs, labels, 10) == pytest.approx(
        sum(abs(part.mean()) for part in residual.reshape(10, 15)) / 10
    )
    assert adaptive_ece(probs, labels, 150) == pytest.approx(np.abs(residual).mean())
    assert adaptive_ece(probs, labels, 1000) == pytest.approx(np.abs(residual).mean())


def test_adaptive_ece_rounds_the_ends_of_uneven_parts_up():
    probs, labels = two_class([0.6, 0.7, 0.8, 0.9, 0.95], [0, 1, 1, 1, 1])
    parts = abs((0 - 0.6) + (1 - 0.7) + (1 - 0.8)) + abs((1 - 0.9) + (1 - 0.95))
    assert adaptive_ece(probs, labels, 2) == pytest.approx(parts / 5)


def test_larger_bins_are_spread_evenly_unlike_those_of_array_split():
    probs, labels = two_class([0.6, 0.7, 0.75, 0.8, 0.9, 0.95], [0, 1, 1, 0, 1, 1])
    residuals = np.array([0 - 0.6, 1 - 0.7, 1 - 0.75, 0 - 0.8, 1 - 0.9, 1 - 0.95])

    def gaps(parts):
        return sum(abs(part.sum()) for part in parts) / 6

    ours, others = np.split(residuals, [2, 3, 5]), np.array_split(residuals, 4)  # 2, 1, 2, 1 and 2, 2, 1, 1 images
    assert adaptive_ece(probs, labels, 4) == pytest.approx(gaps(ours))
    assert abs(gaps(ours) - gaps(others)) > 0.05
    other_class = np.split(-residuals[::-1], [2, 3, 5])
    assert ace(probs, labels, 4) == pytest.approx((gaps(ours) + gaps(other_class)) / 2)


def test_adaptive_ece_never_splits_equal_confidences():
    probs, labels = two_class([0.9] * 10, [1, 0] * 5)
    assert adaptive_ece(probs, labels, 5) == pytest.approx(0.9 - 0.5)


def test_ace_is_nixons_double_mean():
    logits, labels = sample(5, n=120)
    probs = softmax(logits)
    gaps = []
    for c in range(5):
        order = np.argsort(probs[:, c])
        residual = ((labels == c) - probs[:, c])[order]
        gaps += [abs(part.mean()) for part in residual.reshape(6, 20)]
    assert ace(probs, labels, n_bins=6) == pytest.approx(np.sum(gaps) / (5 * 6))


def test_nll_agrees_with_sklearn_and_stays_finite_where_log_of_softmax_does_not():
    logits, labels = sample(6)
    assert nll(logits, labels) == pytest.approx(log_loss(labels, softmax(logits)))
    saturated = np.array([[0, 120]], dtype=np.float32)
    assert torch.tensor(saturated).softmax(1).log()[0, 0] == -np.inf
    assert nll(saturated, [0]) == 120.0
    assert nll(np.array([[0, 5000.0]]), [0]) == 5000.0
    assert nll(np.zeros((3, 7)), [0, 3, 6]) == pytest.approx(np.log(7))


def test_brier_agrees_with_sklearn_unhalved():
    logits, labels = sample(7)
    probs = softmax(logits)
    assert brier(probs, labels) == pytest.approx(brier_score_loss(labels, probs, scale_by_half=False))
    assert brier([[1, 0]], [1]) == 2


@pytest.mark.parametrize("n_bins", [1, 15, 1000])
def test_brier_terms_add_up_for_any_binning(n_bins):
    logits, labels = sample(8)
    probs = softmax(logits)
    terms = brier_decomposition(probs, labels, n_bins)
    total = terms.reliability - terms.resolution + terms.uncertainty + terms.within_bin
    assert total == pytest.approx(brier(probs, labels), abs=1e-14)
    frequency = np.bincount(labels) / len(labels)
    assert terms.uncertainty == pytest.approx((frequency * (1 - frequency)).sum())


def test_brier_terms_of_a_hand_made_forecast():
    # Two forecasts of class 0, 0.8 (right 3 of 4) and 0.3 (right 1 of 4): the base rate is 1/2.
    probs, labels = two_class([0.8] * 4 + [0.3] * 4, [1, 1, 1, 0, 1, 0, 0, 0])
    terms = brier_decomposition(probs, labels)
    assert terms.reliability == pytest.approx(2 * ((0.8 - 0.75) ** 2 + (0.3 - 0.25) ** 2) / 2)
    assert terms.resolution == pytest.approx(2 * 0.25**2)
    assert terms.uncertainty == pytest.approx(2 * 0.5 * 0.5)
    assert terms.within_bin == pytest.approx(0, abs=1e-15)
    coarse = brier_decomposition(probs, labels, n_bins=1)
    assert coarse.resolution == pytest.approx(0, abs=1e-15)
    # One bin: variance of the forecasts minus twice their covariance with the outcome, for both classes.
    assert coarse.within_bin == pytest.approx(2 * (0.25**2 - 2 * 0.25 * 0.25))


def test_reliability_diagram_holds_counts_means_and_the_ece():
    probs, labels = two_class([0.55, 0.58, 0.95], [1, 0, 1])
    diagram = reliability_diagram(probs, labels, n_bins=10)
    np.testing.assert_array_equal(diagram.count, [0, 0, 0, 0, 0, 2, 0, 0, 0, 1])
    np.testing.assert_allclose(diagram.confidence[[5, 9]], [(0.55 + 0.58) / 2, 0.95])
    np.testing.assert_allclose(diagram.accuracy[[5, 9]], [0.5, 1])
    assert np.isnan(diagram.confidence[0])
    assert np.isnan(diagram.accuracy[0])
    gaps = np.nansum(diagram.count * np.abs(diagram.accuracy - diagram.confidence))
    assert gaps / 3 == pytest.approx(ece(probs, labels, n_bins=10))


def test_errors_recover_a_known_overconfidence():
    rng = np.random.default_rng(0)
    confidence = rng.uniform(0.6, 1, size=200_000)
    probs, labels = two_class(confidence, rng.random(200_000) < confidence - 0.1)
    for metric in BINNED:
        assert metric(probs, labels) == pytest.approx(0.1, abs=0.004)
    probs, labels = two_class(confidence, rng.random(200_000) < confidence)
    for metric in BINNED:
        assert metric(probs, labels) < 0.006


# -------------------------------------------------------------------------------------- temperature scaling


def test_temperature_of_a_constant_margin_has_a_closed_form():
    # softmax of (a, 0) / T gives sigmoid(a / T); the likelihood peaks where that is the accuracy q.
    logits, labels = np.tile([3.0, 0.0], (10, 1)), np.array([0] * 7 + [1] * 3)
    assert temperature_scaling(logits, labels) == pytest.approx(3 / np.log(0.7 / 0.3), rel=1e-10)


def test_temperature_is_the_minimum_and_scales_with_the_logits():
    logits, labels = sample(9, n=2000)
    temperature = temperature_scaling(logits, labels)
    best = nll(logits / temperature, labels)
    assert all(nll(logits / (temperature * f), labels) > best for f in (0.99, 1.01))
    assert temperature_scaling(7 * logits.astype(np.float64), labels) == pytest.approx(7 * temperature)
    assert ece(softmax(logits / temperature), labels) < ece(softmax(logits), labels) / 2


def test_temperature_of_labels_drawn_from_the_softmax_converges_to_one():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(100_000, 4)) * 2
    labels = (softmax(logits).cumsum(axis=1) < rng.random((100_000, 1))).sum(axis=1)
    assert temperature_scaling(logits, labels) == pytest.approx(1, abs=0.01)


def test_temperature_without_a_finite_minimum_is_the_nearer_bound():
    right, wrong = np.array([[2.0, 0.0], [0.0, 1.0]]), np.array([[0.0, 2.0], [1.0, 0.0]])
    assert temperature_scaling(right, [0, 1]) == 0.01
    assert temperature_scaling(wrong, [0, 1]) == 100
    assert temperature_scaling(np.zeros((2, 2)), [0, 1]) == 100


# ------------------------------------------------------------------------------- many at once, the bootstrap


def test_many_at_once_are_each_from_what_it_takes():
    logits, labels = sample(10)
    probs = softmax(logits)
    found = computed(["nll", "ece", "ace", "test_accuracy"], logits, labels, n_bins=7)
    expected = (nll(logits, labels), ece(probs, labels, 7), ace(probs, labels, 7))
    assert tuple(found.values()) == (*expected, np.mean(logits.argmax(axis=1) == labels))
    assert found["nll"] == pytest.approx(-np.log(probs[np.arange(len(probs)), labels]).mean())


def test_intervals_are_those_of_the_metrics_of_the_resampled_images():
    logits, labels = sample(11, n=300)
    found = bootstrap_intervals(logits, labels, seed=3, n=40)
    for name, interval in found.items():
        rng, replicates = np.random.default_rng(3), []
        for _ in range(40):
            rows = rng.integers(300, size=300)
            replicates.append(computed([name], logits[rows], labels[rows])[name])
        value = computed([name], logits, labels)[name]
        low, high = np.quantile(replicates, [0.025, 0.975])
        assert interval == pytest.approx((value, low, high, np.mean(replicates) - value), rel=1e-9, abs=1e-12)
    assert bootstrap_intervals(logits, labels, seed=3, n=40) == found
    assert bootstrap_intervals(logits, labels, seed=4, n=40) != found


def test_the_interval_of_a_mean_is_the_normal_one():
    logits, labels = sample(12, n=2000)
    interval = bootstrap_intervals(logits, labels, seed=0, n=4000)["nll"]
    sigma = np.std(-np.log(softmax(logits)[np.arange(2000), labels])) / 2000**0.5
    assert (interval.high - interval.low) / 2 == pytest.approx(1.96 * sigma, rel=0.05)
    assert abs(interval.bias) < sigma / 10


def test_bootstrap_shows_the_bias_of_binned_errors():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(200, 4))
    labels = (softmax(logits).cumsum(axis=1) < rng.random((200, 1))).sum(axis=1)
    assert bootstrap_intervals(logits, labels, seed=0, n=200)["sce"].bias > 0.01


# --------------------------------------------------------------------------------------------- general laws

seeds = st.integers(0, 2**32 - 1)


@settings(max_examples=25, deadline=None)
@given(seed=seeds, n_bins=st.integers(1, 60), edges=st.sampled_from(["right", "left"]))
def test_order_of_images_and_names_of_classes_do_not_matter(seed, n_bins, edges):
    logits, labels = sample(seed, n=60)
    rng = np.random.default_rng(seed)
    images, classes = rng.permutation(60), rng.permutation(5)
    renamed = np.argsort(classes)[labels]
    for metric in OF_PROBS:
        options = {} if metric is brier else {"n_bins": n_bins}
        if metric in (ece, sce):
            options["edges"] = edges
        value = metric(softmax(logits), labels, **options)
        assert metric(softmax(logits[images]), labels[images], **options) == pytest.approx(value, abs=1e-12)
        assert metric(softmax(logits[:, classes]), renamed, **options) == pytest.approx(value, abs=1e-12)


@settings(max_examples=25, deadline=None)
@given(seed=seeds, n_bins=st.integers(1, 20), edges=st.sampled_from(["right", "left"]))
def test_splitting_bins_never_lowers_the_error(seed, n_bins, edges):
    logits, labels = sample(seed, n=40)
    probs = softmax(logits)
    for metric in (ece, sce):
        assert metric(probs, labels, n_bins, edges) <= metric(probs, labels, 2 * n_bins, edges) + 1e-12
    mean_gap = abs(np.mean(probs.argmax(axis=1) == labels) - probs.max(axis=1).mean())
    assert ece(probs, labels, n_bins=1) == pytest.approx(mean_gap, abs=1e-12)


def test_a_class_that_never_occurs_counts_with_frequency_zero():
    probs, labels = np.array([[0.7, 0.2, 0.1], [0.2, 0.7, 0.1]]), np.array([0, 1])
    class_two = 0.1
    others = (abs(1 - 0.7) + abs(0 - 0.2)) / 2
    assert sce(probs, labels) == pytest.approx((2 * others + class_two) / 3)
    assert np.isfinite(list(computed(["ece", "ace", "nll"], np.log(probs), labels).values())).all()


def test_more_bins_than_images_is_the_mean_absolute_gap():
    probs, labels = two_class([0.6, 0.7, 0.8], [1, 0, 1])
    assert ece(probs, labels, n_bins=10_000) == pytest.approx((0.4 + 0.7 + 0.2) / 3)


# ------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("logits", "labels", "words"),
    [
        ([[0.0, np.nan]], [0], "NaN"),
        ([[0.0, np.inf]], [0], r"\(0, 1\)"),
        (np.zeros((0, 3)), [], "empty"),
        (np.zeros((2, 3)), [0, 3], "0 to 3"),
        (np.zeros((2, 3)), [-1, 0], "-1 to 0"),
        (np.zeros((2, 3)), [0, 1, 2], "one per image"),
        (np.zeros((2, 3)), [0.0, 1.0], "integers"),
        (np.zeros(3), [0], "shape"),
        (np.zeros((2, 1)), [0, 0], "classes >= 2"),
        ([["a", "b"]], [0], "real numbers"),
    ],
)
@pytest.mark.parametrize("metric", [nll, temperature_scaling, *OF_PROBS], ids=lambda metric: metric.__name__)
def test_bad_arrays_are_named(metric, logits, labels, words):
    probs = metric in OF_PROBS and np.asarray(logits).dtype.kind == "f" and np.isfinite(logits).all()
    inputs = np.asarray(logits) + 1 / max(1, np.shape(logits)[-1]) if probs else logits
    with pytest.raises(UserError, match=words):
        metric(inputs, labels)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda p, y: ece(p, y, n_bins=0), "at least 1"),
        (lambda p, y: sce(p, y, n_bins=2.5), "whole number"),
        (lambda p, y: ece(p, y, edges="rigth"), "Did you mean 'right'"),
        (lambda p, y: ece(4 * p, y), "softmax"),
        (lambda p, y: ece(p - 0.5, y), "softmax"),
        (lambda p, y: bootstrap_intervals(p, y, seed=0, n=1), "at least 2"),
    ],
)
def test_bad_options_are_named(call, words):
    with pytest.raises(UserError, match=words):
        call(np.full((3, 2), 0.5), np.array([0, 1, 0]))


def test_torch_tensors_of_any_float_type_are_taken():
    logits, labels = sample(13)
    half = torch.tensor(logits).bfloat16().requires_grad_()
    assert nll(half, torch.tensor(labels)) == pytest.approx(nll(half.detach().double().numpy(), labels))


def test_rows_tell_the_paper_from_what_stands_beside_it():
    rows = {name: row for name, row in METRICS.items() if row.dimension == "calibration"}
    assert {name for name, row in rows.items() if row.in_verdict} == {"ece", "sce", "nll"}
    assert {name for name, row in rows.items() if row.higher_is_better} == {"brier_resolution"}
    assert rows["nll"].unit == "nats"


# ------------------------------------------------------------------------------------------------- a ticket

FEW = {"n_test": 80, "n_corrupted": 25, "n_bootstrap": 50}


@pytest.fixture
def subject(tiny, store):
    return Subject(Ticket(**tiny), store, "float32")


@pytest.fixture
def measured(subject):
    return measure(subject, **FEW)


def forward(subject, pixels):
    with torch.no_grad():
        return subject.model(as_input(torch.as_tensor(pixels))).numpy()


def table(values):
    found = {(v.metric, v.shift, v.severity): v.value for v in values}
    assert len(found) == len(values)
    return found


def test_rows_are_the_pure_functions_on_the_same_weights(subject, measured):
    value, test = table(measured[0]), subject.data.test
    which = positions(test.labels, 80)
    logits, labels = forward(subject, test.pixels[which]), test.labels[which].numpy()
    for name, metric in (("ece", ece), ("sce", sce), ("brier", brier), ("adaptive_ece", adaptive_ece), ("ace", ace)):
        assert value[name, "none", 0] == pytest.approx(metric(softmax(logits), labels), abs=1e-4)
    assert value["nll", "none", 0] == pytest.approx(nll(logits, labels), abs=1e-4)


def test_rows_under_corruption_are_those_of_the_corrupted_images(subject, measured):
    value, test = table(measured[0]), subject.data.test
    which = positions(test.labels, 25)
    labels = test.labels[which].numpy()
    for name, severity in (("fog", 2), ("shot_noise", 5), ("saturate", 1)):
        logits = forward(subject, corrupt(test.pixels[which].numpy(), name, severity))
        assert value["corrupted_ece", name, severity] == pytest.approx(ece(softmax(logits), labels), abs=1e-4)
        assert value["corrupted_sce", name, severity] == pytest.approx(sce(softmax(logits), labels), abs=1e-4)
        assert value["corrupted_nll", name, severity] == pytest.approx(nll(logits, labels), abs=1e-4)
    assert sum(key[0] == "corrupted_ece" for key in value) == 19 * 5
    fewer = table(measure(subject, **FEW, extra=False)[0])
    assert sum(key[0] == "corrupted_ece" for key in fewer) == 15 * 5


def test_recalibrated_rows_are_judged_on_the_half_that_was_not_fitted(subject, measured):
    value, labels = table(measured[0]), subject.labels("test", 80).numpy()
    logits = subject.logits("test", 80).astype(np.float64)
    even = np.arange(80) % 2 == 0
    on_odd, on_even = (temperature_scaling(logits[half], labels[half]) for half in (even, ~even))
    halves = nll(logits[~even] / on_odd, labels[~even]), nll(logits[even] / on_even, labels[even])
    assert value["nll_recalibrated", "none", 0] == pytest.approx(np.mean(halves))
    assert value["temperature", "none", 0] == pytest.approx((on_odd + on_even) / 2)


def test_intervals_are_the_bootstrap_of_the_rows(subject, measured):
    value, arrays = table(measured[0]), measured[1]
    expected = bootstrap_intervals(subject.logits("test", 80), subject.labels("test", 80), seed=0, n=50)
    for name in ("ece", "sce", "nll"):
        assert tuple(arrays[f"interval_{name}"]) == expected[name]
        assert expected[name].value == pytest.approx(value[name, "none", 0])
        assert expected[name].low < expected[name].high


def test_measuring_again_gives_the_same_and_needs_no_network(subject, measured, monkeypatch):
    monkeypatch.setattr(Subject, "fast_model", property(lambda self: pytest.fail("a second forward pass")))
    again = measure(Subject(subject.ticket, subject.store, "float32"), **FEW)
    assert table(again[0]) == table(measured[0])
    assert all(np.array_equal(again[1][key], array, equal_nan=True) for key, array in measured[1].items())


def test_both_dimensions_share_the_corrupted_logits(subject, measured, monkeypatch):
    monkeypatch.setattr("lthlib.tickets.subject.corrupted_parts", lambda *a, **k: pytest.fail("a second forward pass"))
    generalization.measure(subject, ood=("photos",), n_ood=10, n_test=80, n_corrupted=25, n_attack=10, n_pgd=10)
