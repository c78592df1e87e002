"""Calibration: does the network's confidence say how often it is right?"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lthlib.data.corrupted import corruption_names
from lthlib.metrics.arrays import softmax
from lthlib.metrics.calibration.errors import N_BINS, reliability_diagram
from lthlib.metrics.calibration.intervals import bootstrap_intervals, resampler
from lthlib.metrics.calibration.scores import temperature_scaling
from lthlib.metrics.registry import METRICS, Found, Value, code_of_metrics, computed, measured_on_test, metric, values
from lthlib.metrics.resampling import kept, kept_accuracy, resamples
from lthlib.tickets.subject import Subject

VOTING = ["ece", "sce", "nll"]

for _of in [METRICS[name] for name in VOTING]:
    _like = {"dimension": "calibration", "higher_is_better": False, "unit": _of.unit, "over_classes": _of.over_classes}
    metric(f"{_of.name}_recalibrated", f"{_of.title} (recalibrated)", reference="guo2017calibration", **_like)(
        f"{_of.title} of $\\mathrm{{softmax}}(z/T)$, $T$ fitted on images held out from those it is judged on."
    )
    metric(f"corrupted_{_of.name}", f"{_of.title} under corruption", reference="ovadia2019can", **_like)(
        f"{_of.title} on test images under one corruption at one severity."
    )


def measure(
    subject: Subject,
    *,
    n_test: int = 10_000,
    n_bins: int = N_BINS,
    n_corrupted: int = 10_000,
    extra: bool = True,
    n_bootstrap: int = 1_000,
) -> Found:
    """Measure how far a ticket's confidence can be believed, on clean and on corrupted images.

    Everything reads stored logits; with the same ``n_corrupted`` and ``extra`` those of generalization.

    Args:
        subject: The ticket.
        n_test: Test images at most, spread evenly over the classes.
        n_bins: Bins of every binned error.
        n_corrupted: Test images at most under each corruption and severity.
        extra: Whether the corruptions beside the 15 common ones are measured too.
        n_bootstrap: Replicates of the intervals over images.

    Returns:
        Values, and for figures the reliability diagram (``count``, ``confidence``, ``accuracy`` by bin) and
        ``interval_<metric>``: value, low and high of a 95 % bootstrap interval over images, and its bias; for the
        verdict replicates of the metrics on resampled images (`lthlib.metrics.resampling`).
    """
    labels, logits = subject.labels("test", n_test).numpy(), subject.logits("test", n_test)
    numbers = computed([*measured_on_test("calibration"), "test_accuracy"], logits, labels, n_bins=n_bins)
    numbers |= _recalibrated(logits, labels, n_bins)
    found = values(numbers, len(labels)) + _under_corruption(subject, corruption_names(extra), n_corrupted, n_bins)
    arrays = reliability_diagram(softmax(logits), labels, n_bins)._asdict()
    intervals = bootstrap_intervals(logits, labels, seed=0, n=n_bootstrap, n_bins=n_bins)
    arrays |= {f"interval_{name}": np.array(interval) for name, interval in intervals.items()}
    counts = resamples(len(labels))
    for name, replicates in resampler(logits, labels, n_bins)(counts).items():
        arrays |= kept(Value(name, numbers[name], len(labels)), replicates)
    return found, arrays | kept_accuracy(logits, labels)


def inputs(subject: Subject, *, extra: bool, **rest: object) -> str:
    """Return the versions of what `measure` reads beside the test images: other images, and metrics' own files."""
    images = [subject.input_version(f"corrupted:{name}") for name in corruption_names(extra)]
    return " ".join([code_of_metrics("calibration"), *images])


def _under_corruption(subject: Subject, names: Sequence[str], n: int, n_bins: int) -> list[Value]:
    labels, found = subject.labels("test", n).numpy(), []
    for name, severity, logits in subject.corrupted_logits(names, n):
        numbers = computed(VOTING, logits, labels, n_bins=n_bins)
        found += values({f"corrupted_{key}": number for key, number in numbers.items()}, len(labels), name, severity)
    return found


def _recalibrated(logits: np.ndarray, labels: np.ndarray, n_bins: int) -> dict[str, float]:
    """Fit the temperature on one half of the images and scale the other half by it, both ways round."""
    other = np.array([temperature_scaling(logits[half::2], labels[half::2]) for half in (1, 0)])
    scaled = logits / other.astype(logits.dtype)[np.arange(len(labels)) % 2, None]
    after = computed(VOTING, scaled, labels, n_bins=n_bins)
    return {f"{name}_recalibrated": value for name, value in after.items()} | {"temperature": other.mean()}
