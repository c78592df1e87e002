"""What an evaluation keeps so that a verdict can say how far its numbers are known: replicates on resampled images.

Every network that is measured on an image set is measured on the same resamples of it. Differences of two networks'
replicates are therefore paired, whatever the metric is: a mean, an ECE, an area under a curve.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import numpy as np

from lthlib.core.errors import UserError
from lthlib.metrics.registry import Value

REPLICATES = 200  # a standard deviation of as many is off by 5 %
PREFIX = "replicates/"


@lru_cache(maxsize=32)
def resamples(n: int, images: str = "test", replicates: int = REPLICATES) -> np.ndarray:
    """Return how often each of n images is drawn in each resample, (replicates, n), the same for every network.

    The bootstrap is balanced (Davison, Hinkley and Schechtman, 1986): all resamples together hold each image equally
    often. So the replicates of a mean have that mean as their own, exactly, and where those of another statistic do
    not, the difference is its bias and no accident of the draw. ``images`` names the set (or other cases that are drawn
    as wholes); two sets of one size are drawn independently of each other.
    """
    if n < 1 or replicates < 2:
        raise UserError(f"{n} images in {replicates} resamples: at least one image and two resamples are needed.")
    rng = np.random.default_rng([n, replicates, *images.encode()])
    drawn = rng.permutation(np.tile(np.arange(n), replicates)).reshape(replicates, n)
    counts = np.zeros((replicates, n), np.float32)
    np.add.at(counts, (np.arange(replicates)[:, None], drawn), 1)
    counts.flags.writeable = False
    return counts


def resampled_mean(terms: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return the mean over each resample of terms with one entry an image, (n,) or (n, k) -> (B,) or (B, k).

    Images whose term is NaN, because nothing is defined for them, are left out.
    """
    terms, counts = np.asarray(terms, np.float64), counts.astype(np.float64)
    defined = ~np.isnan(terms)
    return counts @ np.where(defined, terms, 0.0) / (counts @ defined.astype(np.float64))


def resampled_auroc(known: np.ndarray, foreign: np.ndarray, of_known: np.ndarray, of_foreign: np.ndarray) -> np.ndarray:
    """Return the area under the ROC curve of each resample, (B,): P(foreign > known) + P(equal) / 2.

    Of scores of in-distribution images (n,) and of foreign ones (m,), higher = more foreign, and their resamples (B,
    n), (B, m).
    """
    _, place = np.unique(np.concatenate([known, foreign]), return_inverse=True)
    levels = place.max() + 1
    found = []
    for mine, others in zip(of_known, of_foreign, strict=True):
        negative = np.bincount(place[: len(known)], mine, levels)
        positive = np.bincount(place[len(known) :], others, levels)
        found.append((positive * (np.cumsum(negative) - negative / 2)).sum())
    return np.array(found) / (len(known) * len(foreign))


def kept(value: Value, replicates: np.ndarray, step: float = 0.0) -> dict[str, np.ndarray]:
    """Return what an evaluation keeps of a metric's replicates, under the name by which a verdict finds it.

    ``value`` is what the metric is on the n images as they are, ``replicates`` (B,) on each resample. ``step`` is the
    least by which the answer for one image can change it, 1/n for an accuracy; 0 where there is no such least. Where
    all answers agree, the replicates do, too; this says how little that shows.
    """
    apart = np.concatenate([[value.n, step], np.asarray(replicates, np.float64) - value.value]).astype(np.float32)
    apart[2:] = _rounded(apart[2:])
    return {f"{PREFIX}{value.metric}|{value.shift}|{value.severity:g}": apart}


def _rounded(numbers: np.ndarray) -> np.ndarray:
    """Round float32 to 11 significant bits: noise in the others would only keep files from being compressed."""
    return ((numbers.view(np.uint32) + 0x1000) & 0xFFFFE000).view(np.float32)


def kept_accuracy(
    logits: np.ndarray, labels: np.ndarray, metric: str = "test_accuracy", shift: str = "none", severity: float = 0
) -> dict[str, np.ndarray]:
    """Return what is kept of an accuracy on test images, see `kept`."""
    right, n = np.asarray(logits).argmax(1) == np.asarray(labels), len(labels)
    value = Value(metric, float(right.mean()), n, shift, severity)
    return kept(value, resampled_mean(right, resamples(n)), 1 / n)


def held(arrays: Mapping[str, np.ndarray], metric: str, shift: str, severity: float) -> np.ndarray | None:
    """Return what `kept` kept of a metric: n, step, and each replicate less the value; None where there is nothing."""
    return arrays.get(f"{PREFIX}{metric}|{shift}|{severity:g}")
