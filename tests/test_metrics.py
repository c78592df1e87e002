"""The registry of metrics, and what the package offers by name."""

import numpy as np
import pytest

import lthlib.metrics
from lthlib.core.versions import code_version
from lthlib.metrics import METRICS, computed, metric
from lthlib.metrics.registry import code_of_metrics, measured_on_test


def test_everything_offered_is_there():
    offered = " ".join(lthlib.metrics.FUNCTIONS.values()).split()
    names = set(offered) - {"hessian_trace"}  # with the rooms of flatness
    assert all(callable(getattr(lthlib.metrics, name)) for name in names)
    with pytest.raises(AttributeError, match="Did you mean 'roc_auc'"):
        lthlib.metrics.rocauc  # noqa: B018


def test_a_function_under_its_row_is_a_metric_of_its_folders_dimension():
    def confident_errors(probs, labels, n_bins=15):
        """Share of images that are wrong
        with a confidence above 0.9.

        More is not in the definition.
        """
        assert n_bins == 3
        return np.mean((probs.argmax(1) != labels) & (probs.max(1) > 0.9))

    confident_errors.__module__ = "lthlib.metrics.calibration.mine"
    try:
        metric("confident_errors", "Confident errors", higher_is_better=False, reference="")(confident_errors)
        row = METRICS["confident_errors"]
        assert (row.dimension, row.unit, row.arrow) == ("calibration", "fraction", "↓")
        assert row.definition == "Share of images that are wrong with a confidence above 0.9."
        assert "confident_errors" in measured_on_test("calibration")
        logits = np.array([[9, 0], [9, 0], [0, 1]])
        assert computed(["confident_errors"], logits, [0, 1, 0], n_bins=3) == {"confident_errors": 1 / 3}
        assert " at 0x" not in repr(row)  # pages are made again when the rows' text changes
    finally:
        METRICS.pop("confident_errors", None)


def test_the_code_of_every_metric_of_a_dimension_is_known_by():
    functions = [METRICS[name].function for name in measured_on_test("calibration")]
    assert len(functions) == 9
    assert code_of_metrics("calibration") == code_version(*functions)


def test_a_metric_says_by_its_first_argument_what_it_takes():
    with pytest.raises(ValueError, match="name it logits or probs"):
        metric("mine", "Mine", higher_is_better=True, reference="")(lambda p, labels: 0.0)
