"""Calibration errors: confidence against frequency, bin by bin; lower is better, in [0, 1].

Everything takes probabilities (N, C), rows summing to 1, and labels (N,), and raises `UserError` for NaN, rows that are
no distribution, labels out of range, or less than one bin. A class that never occurs counts with frequency 0.

Bins of equal width have the edges k / n_bins. With ``edges="right"`` (Guo et al., 2017, and the default) bin k is
(k / n_bins, (k + 1) / n_bins]: a confidence exactly on an edge belongs to the bin below it, exactly 1 to the last bin,
exactly 0 to the first. With ``edges="left"`` it is [k / n_bins, (k + 1) / n_bins), and exactly 1 in the last bin. A
softmax above 1 by rounding counts as 1. Empty bins count nothing, so there may be more bins than images.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from lthlib.core.errors import UserError, choose
from lthlib.metrics.arrays import as_array, check_probs
from lthlib.metrics.registry import metric

N_BINS = 15  # Guo et al., 2017, section 5
PUBLISHED_BINS = 14  # what linspace(0, 1, 15) makes


def check_bins(n_bins: int) -> None:
    """Raise `UserError` unless ``n_bins`` is a whole number of at least 1."""
    if isinstance(n_bins, bool) or not isinstance(n_bins, int | np.integer) or n_bins < 1:
        raise UserError(f"n_bins is {n_bins!r}; a whole number of at least 1 is needed (the paper uses 15).")


def bin_index(p: np.ndarray, n_bins: int, edges: str = "right") -> np.ndarray:
    """Index of the equal-width bin of each p in [0, 1]: how many inner edges lie below it."""
    check_bins(n_bins)
    choose(edges, ("right", "left"), "bin edge convention")
    return np.digitize(p, np.arange(1, n_bins) / n_bins, right=edges == "right")


def one_hot(probs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """1.0 for the true class of each image and 0.0 elsewhere, (N, C)."""
    return (labels[:, None] == np.arange(probs.shape[1])).astype(np.float64)


def top(probs: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Confidence (N,) and whether the top class is right (N,); of equal probabilities the first wins."""
    return probs.max(axis=1), (probs.argmax(axis=1) == labels).astype(np.float64)


def _gaps(bins: np.ndarray, p: np.ndarray, hits: np.ndarray) -> float:
    """Sum over bins of |sum of hits minus sum of probabilities|."""
    return float(np.abs(np.bincount(bins.ravel(), weights=(hits - p).ravel())).sum())


@metric("ece", "ECE", higher_is_better=False, reference="guo2017calibration", in_verdict=True)
def ece(probs: ArrayLike, labels: ArrayLike, n_bins: int = N_BINS, edges: str = "right") -> float:
    r"""Expected calibration error: $\sum_b \frac{n_b}{N}\,|\mathrm{acc}_b - \mathrm{conf}_b|$ over 15 right-closed bins
    of the top class's confidence.

    By Naeini et al. (2015) and Guo et al. (2017). With one bin it is ``|accuracy - mean confidence|``, and splitting a
    bin never lowers it. It is zero for a network that always answers the base rates: calibrated is not the same as
    useful. ``edges="left"`` is the convention of torchmetrics and netcal, but for a confidence of exactly 1, which
    torchmetrics puts in a bin of its own.
    """
    confidence, hits = top(*check_probs(probs, labels))
    return _gaps(bin_index(confidence, n_bins, edges), confidence, hits) / len(hits)


@metric("sce", "SCE", higher_is_better=False, reference="nixon2019measuring", in_verdict=True, over_classes=True)
def sce(probs: ArrayLike, labels: ArrayLike, n_bins: int = N_BINS, edges: str = "right") -> float:
    r"""Static calibration error: $\frac1C\sum_c\sum_b \frac{n_{bc}}{N}\,|\mathrm{freq}_{bc} - \mathrm{conf}_{bc}|$ over
    15 bins of each class's probability; the same quantity as classwise ECE.

    By Nixon et al. (2019), classwise ECE by Kull et al. (2019); every image is in every class's bins. With many classes
    most of it sits in the first bin, and the mean over C makes it small: compare only at the same C. For two classes it
    is the ECE of p_1 as a binary forecast.
    """
    probs, labels = check_probs(probs, labels)
    cells = bin_index(probs, n_bins, edges) + n_bins * np.arange(probs.shape[1])
    return _gaps(cells, probs, one_hot(probs, labels)) / probs.size


@metric("ece_lthpass", "ECE (published code)", higher_is_better=False, reference="chen2022can")
def ece_lthpass(probs: ArrayLike, labels: ArrayLike) -> float:
    """ECE as the paper's published code computes it: 15 edges, hence 14 bins.

    The sum is in float64. Its ``linspace(0, 1, 15)`` are 15 edges and therefore 14 right-closed bins, and a float32
    confidence that rounding put above 1 is dropped from the sum but not from N: give it the same float32 probabilities
    to reproduce its number.
    """
    confidence, hits = top(*check_probs(probs, labels))
    counted = as_array(probs, "probabilities").max(axis=1) <= 1
    bins = bin_index(confidence, PUBLISHED_BINS)
    return _gaps(bins[counted], confidence[counted], hits[counted]) / len(hits)


def _equal_mass(p: np.ndarray, n_bins: int) -> np.ndarray:
    """Index of the equal-mass bin of each p; equal values stay together, in the lowest bin they reach."""
    check_bins(n_bins)
    last = -(-np.arange(1, n_bins + 1) * len(p) // n_bins) - 1
    return np.searchsorted(np.sort(p)[last], p, side="left")


@metric("adaptive_ece", "Adaptive ECE", higher_is_better=False, reference="nixon2019measuring")
def adaptive_ece(probs: ArrayLike, labels: ArrayLike, n_bins: int = N_BINS) -> float:
    r"""ECE over 15 bins of equal mass: $\frac{1}{N}\sum_b n_b\,|\mathrm{acc}_b - \mathrm{conf}_b|$.

    Bin k ends with the ceil((k + 1) N / n_bins)-th smallest confidence: where N is no multiple of n_bins, the larger
    bins are spread evenly (as in Nixon's program, which rounds to the nearest instead of up), where `numpy.array_split`
    makes the first ones larger. Equal confidences are never split, so the order of the images does not matter; bins
    that lose all their images this way are empty. With N bins and no ties the error is the mean ``|hit - confidence|``.
    """
    confidence, hits = top(*check_probs(probs, labels))
    return _gaps(_equal_mass(confidence, n_bins), confidence, hits) / len(hits)


@metric("ace", "ACE", higher_is_better=False, reference="nixon2019measuring", over_classes=True)
def ace(probs: ArrayLike, labels: ArrayLike, n_bins: int = N_BINS) -> float:
    r"""SCE with 15 bins of equal mass in each class: $\frac1C\sum_c\sum_b \frac{n_{bc}}{N}\,|\mathrm{freq}_{bc} -
    \mathrm{conf}_{bc}|$.

    The bins are cut as in `adaptive_ece` (Nixon et al., 2019); without ties n_bc / N is Nixon's 1 / n_bins. Not the
    "average calibration error" that netcal calls ACE.
    """
    probs, labels = check_probs(probs, labels)
    classes = zip(probs.T, one_hot(probs, labels).T, strict=True)
    return sum(_gaps(_equal_mass(p, n_bins), p, hits) for p, hits in classes) / probs.size


class ReliabilityDiagram(NamedTuple):
    """What a reliability diagram draws: images, mean confidence and accuracy by bin, NaN where a bin is empty."""

    count: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray


def reliability_diagram(probs: ArrayLike, labels: ArrayLike, n_bins: int = N_BINS) -> ReliabilityDiagram:
    """Confidence and accuracy by equal-width bin of the top-class confidence (DeGroot and Fienberg, 1983).

    ``sum(count |accuracy - confidence|) / N`` over the bins that are not empty is `ece`.
    """
    confidence, hits = top(*check_probs(probs, labels))
    bins = bin_index(confidence, n_bins)
    count = np.bincount(bins, minlength=n_bins)
    filled = np.where(count, count, np.nan)
    means = (np.bincount(bins, weights, n_bins) / filled for weights in (confidence, hits))
    return ReliabilityDiagram(count, *means)
