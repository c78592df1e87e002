"""Bootstrap intervals over images of ECE, SCE and NLL."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import sparse

from lthlib.core.errors import UserError
from lthlib.metrics.arrays import check_labels, check_logits, softmax
from lthlib.metrics.calibration.errors import N_BINS, bin_index, one_hot, top
from lthlib.metrics.calibration.scores import losses
from lthlib.metrics.registry import computed

BLOCK = 2**22  # counts at a time: 32 MiB


class Interval(NamedTuple):
    """A number on the images as they are, its bootstrap percentile interval, and the replicates' mean minus the number.

    Binned errors are sums of absolute values, which resampling noise can only raise: where that bias is not small
    against the width, the interval lies too high, and the error itself is as much noise as miscalibration.
    """

    value: float
    low: float
    high: float
    bias: float


def bootstrap_intervals(
    logits: ArrayLike, labels: ArrayLike, *, seed: int, n: int = 1000, n_bins: int = N_BINS
) -> dict[str, Interval]:
    """95 % percentile intervals of ``ece``, ``sce``, ``nll`` over n resamplings of the images, all from the same draws.

    Raises:
        UserError: For bad arrays or bins, or n < 2.
    """
    if n < 2:
        raise UserError(f"A bootstrap needs at least 2 replicates; got {n}.")
    logits = check_logits(logits)
    labels = check_labels(labels, *logits.shape)
    values = computed(["ece", "sce", "nll"], logits, labels, n_bins=n_bins)
    resampled, parts = resampler(logits, labels, n_bins), []
    rng, size = np.random.default_rng(seed), len(labels)
    for start in range(0, n, max(1, BLOCK // size)):
        draws = range(start, min(n, start + max(1, BLOCK // size)))
        parts.append(resampled(np.stack([np.bincount(rng.integers(size, size=size), minlength=size) for _ in draws])))
    found = {}
    for name, value in values.items():
        drawn = np.concatenate([part[name] for part in parts])
        low, high = np.quantile(drawn, [0.025, 0.975])
        found[name] = Interval(value, float(low), float(high), float(drawn.mean() - value))
    return found


def resampler(
    logits: np.ndarray, labels: np.ndarray, n_bins: int = N_BINS
) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
    """Return what turns counts of each image in each resample, (B, N), into ``ece``, ``sce`` and ``nll``, (B,) each.

    Each is a function of sums over images, so that a replicate is a row of draw counts times a sparse matrix of what
    each image adds to each bin: the same numbers as the metrics of the resampled images, many times faster.
    """
    probs, loss = softmax(logits), losses(logits, labels)
    confidence, hits = top(probs, labels)
    in_bins = {
        "ece": _by_bin(confidence[:, None], hits[:, None], n_bins),
        "sce": _by_bin(probs, one_hot(probs, labels), n_bins) / probs.shape[1],
    }

    def resampled(counts: np.ndarray) -> dict[str, np.ndarray]:
        shares = counts / len(labels)
        found = {name: np.abs(shares @ terms).sum(axis=1) for name, terms in in_bins.items()}
        return found | {"nll": shares @ loss}

    return resampled


def _by_bin(probs: np.ndarray, hits: np.ndarray, n_bins: int) -> sparse.csr_array:
    """What each image adds to the gap of each class's bins, (N, C * n_bins)."""
    columns = bin_index(probs, n_bins) + n_bins * np.arange(probs.shape[1])
    rows = np.arange(len(probs) + 1) * probs.shape[1]
    shape = len(probs), n_bins * probs.shape[1]
    return sparse.csr_array(((hits - probs).ravel(), columns.ravel(), rows), shape)
