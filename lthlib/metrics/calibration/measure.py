"""Calibration: does the network's confidence say how often it is right?"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lthlib.data.corrupted import corruption_names
from lthlib.metrics.arrays import softmax
from lthlib.metrics.calibration.errors import N_BINS, reliability_diagram
from lthlib.metrics.calibration.intervals import bootstrap_intervals, resampler
from lthlib.metrics.calibration.scores import temperature_scaling
from lthlib.metrics.registry import METRICS, Value, code_of_metrics, computed, describe, measured_on_test
from lthlib.metrics.resampling import kept, kept_accuracy, resamples
from lthlib.tickets.subject import Subject

VOTING = ["ece", "sce", "nll"]

for _name in VOTING:
    _like = {"dimension": "calibration", "higher_is_better": False}
    _like |= {"unit": METRICS[_name].unit, "over_classes": METRICS[_name].over_classes}
    _title = METRICS[_name].title
    describe(
        f"{_name}_recalibrated",
        f"{_title} (recalibrated)",
        definition=f"{_title} of $\\mathrm{{softmax}}(z/T)$, $T$ fitted on images held out from those it is judged on.",
        reference="guo2017calibration",
        **_like,
    )
    describe(
        f"corrupted_{_name}",
        f"{_title} under corruption",
        definition=f"{_title} on test images under one corruption at one severity.",
        reference="ovadia2019can",
        **_like,
    )


def measure(
    subject: Subject,
    *,
    n_test: int = 10_000,
    n_bins: int = N_BINS,
    n_corrupted: int = 10_000,
    extra: bool = True,
    n_bootstrap: int = 1_000,
) -> tuple[list[Value], dict[str, np.ndarray]]:
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
    values = [Value(name, value, len(labels)) for name, value in numbers.items()]
    values += _under_corruption(subject, corruption_names(extra), n_corrupted, n_bins)
    arrays = reliability_diagram(softmax(logits), labels, n_bins)._asdict()
    intervals = bootstrap_intervals(logits, labels, seed=0, n=n_bootstrap, n_bins=n_bins)
    arrays |= {f"interval_{name}": np.array(found) for name, found in intervals.items()}
    counts = resamples(len(labels))
    for name, replicates in resampler(logits, labels, n_bins)(counts).items():
        arrays |= kept(Value(name, numbers[name], len(labels)), replicates)
    return values, arrays | kept_accuracy(logits, labels)


def inputs(subject: Subject, *, extra: bool, **rest: object) -> str:
    """Return the versions of what `measure` reads beside the test images: other images, and metrics' own files."""
    images = [subject.input_version(f"corrupted:{name}") for name in corruption_names(extra)]
    return " ".join([code_of_metrics("calibration"), *images])


def _under_corruption(subject: Subject, names: Sequence[str], n: int, n_bins: int) -> list[Value]:
    labels, values = subject.labels("test", n).numpy(), []
    for name, severity, logits in subject.corrupted_logits(names, n):
        found = computed(VOTING, logits, labels, n_bins=n_bins)
        values += [Value(f"corrupted_{key}", value, len(labels), name, severity) for key, value in found.items()]
    return values


def _recalibrated(logits: np.ndarray, labels: np.ndarray, n_bins: int) -> dict[str, float]:
    """Fit the temperature on one half of the images and scale the other half by it, both ways round."""
    scaled, temperatures = np.empty_like(logits, dtype=np.float64), []
    for fold in (0, 1):
        mine = np.arange(len(labels)) % 2 == fold
        temperatures.append(temperature_scaling(logits[~mine], labels[~mine]))
        scaled[mine] = logits[mine] / temperatures[-1]
    after = computed(VOTING, scaled, labels, n_bins=n_bins)
    found = {f"{name}_recalibrated": value for name, value in after.items()}
    return found | {"temperature": float(np.mean(temperatures))}
