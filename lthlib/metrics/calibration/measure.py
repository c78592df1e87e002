"""Calibration: does the network's confidence say how often it is right?

Binned errors (ECE, SCE, adaptive), proper scores (NLL, Brier and its decomposition), reliability diagrams,
temperature scaling, bootstrap intervals. Everything is a pure function of logits or probabilities, (N, C),
and labels, (N,); `softmax` turns the first into the second in float64.

Edge conventions. Bins are equal widths of [0, 1] with the edges k / n_bins. With ``edges="right"`` (Guo et
al., 2017, and the default) bin k is (k / n_bins, (k + 1) / n_bins]: a confidence exactly on an edge belongs
to the bin below it, exactly 1 to the last bin, exactly 0 to the first. With ``edges="left"`` bin k is
[k / n_bins, (k + 1) / n_bins): on an edge to the bin above, exactly 0 to the first, exactly 1 to the last.
A softmax above 1 by rounding counts as 1. Empty bins count nothing, so there may be more bins than images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from lthlib.core.errors import UserError, choose
from lthlib.data.corrupted import corruption_names
from lthlib.metrics import Value, describe
from lthlib.metrics.arrays import check_labels, check_logits, check_probs, chunks, shifted_by_class
from lthlib.metrics.arrays import softmax as softmax
from lthlib.tickets.subject import Subject

N_BINS = 15  # Guo et al., 2017, section 5
LEGACY_BINS = 14  # what linspace(0, 1, 15) makes
FEW_BINS = 50  # up to here comparing with every edge is faster than a binary search


# ------------------------------------------------------------------------------------------ equal-width bins


def _check_bins(n_bins: int, edges: str = "right") -> None:
    if isinstance(n_bins, bool) or not isinstance(n_bins, int | np.integer) or n_bins < 1:
        raise UserError(f"n_bins is {n_bins!r}; a whole number of at least 1 is needed (the paper uses 15).")
    choose(edges, ("right", "left"), "bin edge convention")


def _bin_index(p: np.ndarray, n_bins: int, edges: str = "right") -> np.ndarray:
    """Index of the equal-width bin of each p in [0, 1]: how many inner edges lie below it."""
    inner = np.arange(1, n_bins) / n_bins
    if n_bins > FEW_BINS:
        return np.searchsorted(inner, p, side="left" if edges == "right" else "right")
    bins = np.zeros(p.shape, dtype=np.int8)
    for edge in inner:
        bins += p > edge if edges == "right" else p >= edge
    return bins


def _residuals(p: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """One-hot labels minus probabilities, both class-major (C, N)."""
    residuals = -p
    residuals[labels, np.arange(len(labels))] += 1
    return residuals


def _class_gaps(p: np.ndarray, residuals: np.ndarray, n_bins: int, edges: str = "right") -> np.ndarray:
    """Signed sums (C, n_bins) of the residuals of each class in each bin of its probability; p is (C, N)."""
    cells = _bin_index(p, n_bins, edges) + n_bins * np.arange(len(p))[:, None]
    sums = np.bincount(cells.ravel(), weights=residuals.ravel(), minlength=n_bins * len(p))
    return sums.reshape(len(p), n_bins)


def _top(probs: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Confidence (N,) and whether the top class is right (N,); of equal probabilities the first wins."""
    predicted = probs.argmax(axis=1)
    return probs[np.arange(len(probs)), predicted], (predicted == labels).astype(np.float64)


def _checked(probs: ArrayLike, labels: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    probs = check_probs(probs)
    return probs, check_labels(labels, *probs.shape)


# -------------------------------------------------------------------------------------- calibration errors


def ece(
    probs: ArrayLike, labels: ArrayLike, n_bins: int = N_BINS, edges: str = "right", legacy_lthpass: bool = False
) -> float:
    """Expected calibration error of the top class (Naeini et al., 2015; Guo et al., 2017). Lower is better.

    sum_b (n_b / N) |accuracy_b - confidence_b| over equal-width bins of the confidence max_c p_c. With one
    bin it is |accuracy - mean confidence|, and splitting a bin never lowers it. It is zero for a network that
    always answers the base rates: calibrated is not the same as useful.

    With ``legacy_lthpass`` the number of the paper's published code: its ``linspace(0, 1, 15)`` are 15 edges
    and therefore 14 right-closed bins (``n_bins`` and ``edges`` must be left alone), and a float32 confidence
    that rounding put above 1 is dropped from the sum but not from N. Give it the same float32 probabilities
    to reproduce its number; the sum itself is in float64 here.

    Args:
        probs: Probabilities, (N, C), rows summing to 1.
        labels: True classes, (N,).
        n_bins: Number of bins.
        edges: ``"right"`` for (a, b], as Guo et al. and the default; ``"left"`` for [a, b), as torchmetrics
            and netcal. torchmetrics also puts a confidence of exactly 1 in a bin of its own; this does not.
        legacy_lthpass: Reproduce the published code.

    Returns:
        The error in [0, 1].

    Raises:
        UserError: For bad arrays, bins, or edges, or ``legacy_lthpass`` together with other bins.
    """
    _check_bins(n_bins, edges)
    if legacy_lthpass and (n_bins, edges) != (N_BINS, "right"):
        raise UserError("legacy_lthpass fixes the bins of the published code; leave n_bins and edges alone.")
    confidence, hits = _top(*_checked(probs, labels))
    residuals = hits - confidence
    if legacy_lthpass:
        n_bins = LEGACY_BINS
        residuals[np.asarray(probs).max(axis=1) > 1] = 0
    gaps = np.bincount(_bin_index(confidence, n_bins, edges), weights=residuals)
    return float(np.abs(gaps).sum() / len(hits))


def sce(probs: ArrayLike, labels: ArrayLike, n_bins: int = N_BINS, edges: str = "right") -> float:
    """Static calibration error over all classes (Nixon et al., 2019). Lower is better.

    1/C sum_c sum_b (n_bc / N) |frequency of c - mean p_c| over equal-width bins of p_c, with every image in
    every class's bins; the classwise ECE of Kull et al. (2019) is the same quantity. With many classes most
    of it sits in the first bin, and the mean over C makes it small: compare only at the same C. For two
    classes it is the ECE of p_1 as a binary forecast.

    Args:
        probs: Probabilities, (N, C), rows summing to 1.
        labels: True classes, (N,); a class that never occurs counts with frequency 0.
        n_bins: Number of bins.
        edges: ``"right"`` or ``"left"``, see the head of this module.

    Returns:
        The error in [0, 1].

    Raises:
        UserError: For bad arrays, bins, or edges.
    """
    _check_bins(n_bins, edges)
    probs, labels = _checked(probs, labels)
    p = np.ascontiguousarray(probs.T)
    return float(np.abs(_class_gaps(p, _residuals(p, labels), n_bins, edges)).sum() / probs.size)


classwise_ece = sce  # Kull et al. (2019) define the same quantity under this name


def _mass_bin_index(p: np.ndarray, n_bins: int) -> np.ndarray:
    """Index of the equal-mass bin of each p; equal values stay together, in the lowest bin they reach."""
    ordered = np.sort(p)
    last = -(-np.arange(1, n_bins + 1) * len(p) // n_bins) - 1
    return np.searchsorted(ordered[last], p, side="left")


def adaptive_ece(probs: ArrayLike, labels: ArrayLike, n_bins: int = N_BINS) -> float:
    """ECE of the top class over bins of equal mass instead of equal width. Lower is better.

    Bin k ends with the ceil((k + 1) N / n_bins)-th smallest confidence. Equal confidences are never split, so
    the order of the images does not matter; bins that lose all their images this way are empty. With at least
    N bins and no ties every image is its own bin, and the error is the mean |hit - confidence|.

    Args:
        probs: Probabilities, (N, C), rows summing to 1.
        labels: True classes, (N,).
        n_bins: Number of bins.

    Returns:
        The error in [0, 1].

    Raises:
        UserError: For bad arrays or bins.
    """
    _check_bins(n_bins)
    confidence, hits = _top(*_checked(probs, labels))
    gaps = np.bincount(_mass_bin_index(confidence, n_bins), weights=hits - confidence)
    return float(np.abs(gaps).sum() / len(hits))


def ace(probs: ArrayLike, labels: ArrayLike, n_bins: int = N_BINS, threshold: float = 0.0) -> float:
    """`sce` with bins of equal mass in each class, ACE (Nixon et al., 2019). Lower is better.

    1/C sum_c sum_b (n_bc / n_c) |frequency of c - mean p_c|, where n_c counts the images with p_c >=
    ``threshold``; without ties n_bc / n_c is Nixon's 1 / n_bins. A positive threshold (Nixon: 0.01) gives
    TACE; a class without an image above it counts 0. Not the "average calibration error" that netcal calls
    ACE.

    Args:
        probs: Probabilities, (N, C), rows summing to 1.
        labels: True classes, (N,).
        n_bins: Number of bins per class.
        threshold: Probabilities below it are left out, in [0, 1].

    Returns:
        The error in [0, 1].

    Raises:
        UserError: For bad arrays, bins, or threshold.
    """
    _check_bins(n_bins)
    if not 0 <= threshold <= 1:
        raise UserError(f"threshold is {threshold!r}; a probability in [0, 1] is needed.")
    probs, labels = _checked(probs, labels)
    total = 0.0
    for c, p in enumerate(probs.T):
        kept = p >= threshold
        if kept.any():
            p, hits = p[kept], (labels[kept] == c).astype(np.float64)
            total += np.abs(np.bincount(_mass_bin_index(p, n_bins), weights=hits - p)).sum() / len(p)
    return float(total / probs.shape[1])


# ------------------------------------------------------------------------------------------- proper scores


def nll(logits: ArrayLike, labels: ArrayLike) -> float:
    """Negative log-likelihood of the true class, mean over images, in nats. Lower is better.

    From logits through log-softmax in float64: finite for every finite logit, where the paper's published
    code takes log(softmax) in float32 and reaches infinity beyond about 104 nats.

    Args:
        logits: Network outputs, (N, C).
        labels: True classes, (N,).

    Returns:
        The mean in [0, inf).

    Raises:
        UserError: For bad arrays.
    """
    logits = check_logits(logits)
    labels = check_labels(labels, *logits.shape)
    total = 0.0
    for part in chunks(*logits.shape):
        z = shifted_by_class(logits[part])
        picked = z[labels[part], np.arange(z.shape[1])]
        total += (np.log(np.exp(z).sum(axis=0)) - picked).sum()
    return float(total / len(logits))


def brier(probs: ArrayLike, labels: ArrayLike) -> float:
    """Brier score, mean over images of sum_c (p_c - y_c)^2 (Brier, 1950). Lower is better.

    In [0, 2]: the original definition over all classes, twice the usual binary one for C = 2.

    Args:
        probs: Probabilities, (N, C), rows summing to 1.
        labels: True classes, (N,).

    Returns:
        The score.

    Raises:
        UserError: For bad arrays.
    """
    probs, labels = _checked(probs, labels)
    residuals = _residuals(np.ascontiguousarray(probs.T), labels)
    return float(np.vdot(residuals, residuals) / len(labels))


class BrierDecomposition(NamedTuple):
    """Brier score = reliability - resolution + uncertainty + within_bin, each summed over the classes.

    Attributes:
        reliability: Mean squared gap between forecast and frequency of a bin, >= 0; 0 is calibrated.
        resolution: How far the bins' frequencies lie from the base rates, >= 0; higher is better.
        uncertainty: sum_c f_c (1 - f_c) of the base rates f; a property of the labels alone.
        within_bin: What binning hides: within-bin variance of the forecasts minus twice their within-bin
            covariance with the labels. Zero where the forecasts of each bin are equal.
    """

    reliability: float
    resolution: float
    uncertainty: float
    within_bin: float


def brier_decomposition(
    probs: ArrayLike, labels: ArrayLike, n_bins: int | None = N_BINS, edges: str = "right"
) -> BrierDecomposition:
    """Murphy's (1973) decomposition of `brier`, class by class over bins of p_c, summed over the classes.

    Murphy's three terms are exact only if every forecast of a bin is the same number: ``n_bins=None`` makes
    one bin per distinct value of p_c (exact, ``within_bin`` = 0 up to rounding, but then every image tends to
    be its own bin and reliability means little). With bins of some width the rest is given as ``within_bin``
    (Stephenson, Coelho and Jolliffe, 2008), so the four terms always add up to the score.

    Args:
        probs: Probabilities, (N, C), rows summing to 1.
        labels: True classes, (N,).
        n_bins: Number of equal-width bins, or None for one per distinct forecast.
        edges: ``"right"`` or ``"left"``, see the head of this module.

    Returns:
        The four terms.

    Raises:
        UserError: For bad arrays, bins, or edges.
    """
    _check_bins(1 if n_bins is None else n_bins, edges)
    probs, labels = _checked(probs, labels)
    terms = np.zeros(4)
    for c, p in enumerate(probs.T):
        hits = (labels == c).astype(np.float64)
        bins = np.unique(p, return_inverse=True)[1] if n_bins is None else _bin_index(p, n_bins, edges)
        counts = np.maximum(np.bincount(bins), 1)
        forecast, frequency = np.bincount(bins, p) / counts, np.bincount(bins, hits) / counts
        base, forecasts, frequencies = hits.mean(), forecast[bins], frequency[bins]
        spread = p - forecasts
        terms += (
            np.mean((forecasts - frequencies) ** 2),
            np.mean((frequencies - base) ** 2),
            base * (1 - base),
            np.mean(spread**2) - 2 * np.mean(spread * (hits - frequencies)),
        )
    return BrierDecomposition(*map(float, terms))


# ------------------------------------------------------------------------- diagrams, temperature, summaries


@dataclass(frozen=True)
class ReliabilityDiagram:
    """What a reliability diagram draws, one entry per bin of the top-class confidence.

    Attributes:
        edges: Bin edges, (n_bins + 1,).
        counts: Images per bin, (n_bins,).
        confidence: Mean confidence per bin, NaN where empty.
        accuracy: Fraction right per bin, NaN where empty.
    """

    edges: np.ndarray
    counts: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray


def reliability_diagram(
    probs: ArrayLike, labels: ArrayLike, n_bins: int = N_BINS, edges: str = "right"
) -> ReliabilityDiagram:
    """Confidence and accuracy per equal-width bin of the top-class confidence (DeGroot and Fienberg, 1983).

    sum(counts |accuracy - confidence|) / N over the bins that are not empty is `ece`.

    Args:
        probs: Probabilities, (N, C), rows summing to 1.
        labels: True classes, (N,).
        n_bins: Number of bins.
        edges: ``"right"`` or ``"left"``, see the head of this module.

    Returns:
        The arrays of the diagram.

    Raises:
        UserError: For bad arrays, bins, or edges.
    """
    _check_bins(n_bins, edges)
    confidence, hits = _top(*_checked(probs, labels))
    bins = _bin_index(confidence, n_bins, edges)
    counts = np.bincount(bins, minlength=n_bins)
    filled = np.where(counts, counts, np.nan)
    return ReliabilityDiagram(
        edges=np.arange(n_bins + 1) / n_bins,
        counts=counts,
        confidence=np.bincount(bins, confidence, n_bins) / filled,
        accuracy=np.bincount(bins, hits, n_bins) / filled,
    )


def temperature_scaling(logits: ArrayLike, labels: ArrayLike, bounds: tuple[float, float] = (0.01, 100.0)) -> float:
    """Temperature T that minimises the NLL of softmax(logits / T) (Guo et al., 2017).

    The NLL is convex in 1 / T, so its slope mean(E_p[z] - z_label) changes sign once; that root is found to
    full precision. Fit it on images held out from those it is judged on. T > 1 cools an overconfident
    network; accuracy never changes. Where the minimum lies beyond ``bounds`` (every image right: T -> 0; no
    better than chance: T -> infinity) the nearer bound is returned, which is the minimiser within them.

    Args:
        logits: Network outputs, (N, C).
        labels: True classes, (N,).
        bounds: Smallest and largest temperature allowed.

    Returns:
        The temperature.

    Raises:
        UserError: For bad arrays or bounds.
    """
    from scipy.optimize import brentq

    low, high = bounds
    if not 0 < low < high < np.inf:
        raise UserError(f"bounds are {bounds!r}; two temperatures 0 < smallest < largest are needed.")
    logits = check_logits(logits)
    z = shifted_by_class(logits)
    picked = z[check_labels(labels, *logits.shape), np.arange(len(logits))].mean()

    def slope(inverse: float) -> float:
        weights = np.exp(z * inverse)
        return ((weights * z).sum(axis=0) / weights.sum(axis=0)).mean() - picked

    if slope(1 / high) >= 0:
        return float(high)
    if slope(1 / low) <= 0:
        return float(low)
    return float(1 / brentq(slope, 1 / high, 1 / low, xtol=1e-14, rtol=1e-13))


def calibration_summary(logits: ArrayLike, labels: ArrayLike, n_bins: int = N_BINS) -> dict[str, float]:
    """Accuracy, ECE, the published code's ECE, SCE, NLL and Brier score from one pass over the logits.

    Each equals the function of its name up to rounding (``accuracy``: fraction right; ``ece_lthpass``: 14
    bins, of the float64 softmax). One softmax in float64, in chunks, so that memory does not grow with N.

    Args:
        logits: Network outputs, (N, C).
        labels: True classes, (N,).
        n_bins: Number of bins of ECE and SCE.

    Returns:
        The numbers under ``accuracy``, ``ece``, ``ece_lthpass``, ``sce``, ``nll``, ``brier``.

    Raises:
        UserError: For bad arrays or bins.
    """
    _check_bins(n_bins)
    logits = check_logits(logits)
    labels = check_labels(labels, *logits.shape)
    n, n_classes = logits.shape
    right = log_loss = square = 0.0
    top, legacy = np.zeros(n_bins), np.zeros(LEGACY_BINS)
    by_class = np.zeros((n_classes, n_bins))
    for part in chunks(n, n_classes):
        p, loss, hits = _softmax_and_loss(logits[part], labels[part])
        confidence = p.max(axis=0)
        residuals = _residuals(p, labels[part])
        right, log_loss = right + hits.sum(), log_loss + loss.sum()
        square += np.vdot(residuals, residuals)
        top += np.bincount(_bin_index(confidence, n_bins), hits - confidence, n_bins)
        legacy += np.bincount(_bin_index(confidence, LEGACY_BINS), hits - confidence, LEGACY_BINS)
        by_class += _class_gaps(p, residuals, n_bins)
    return {
        "accuracy": float(right / n),
        "ece": float(np.abs(top).sum() / n),
        "ece_lthpass": float(np.abs(legacy).sum() / n),
        "sce": float(np.abs(by_class).sum() / (n * n_classes)),
        "nll": float(log_loss / n),
        "brier": float(square / n),
    }


def _softmax_and_loss(logits: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Class-major probabilities (C, N), loss in nats (N,) and hits (N,) of one chunk."""
    hits = (logits.argmax(axis=1) == labels).astype(np.float64)
    p = shifted_by_class(logits)
    picked = p[labels, np.arange(len(labels))]
    np.exp(p, out=p)
    norm = p.sum(axis=0)
    p /= norm
    return p, np.log(norm) - picked, hits


# ------------------------------------------------------------------------------------------------ bootstrap


@dataclass(frozen=True)
class Interval:
    """A number with its bootstrap percentile interval.

    Attributes:
        value: On the images as they are.
        low: Lower end.
        high: Upper end.
        bias: Mean of the replicates minus ``value``. Binned errors are sums of absolute values, which
            resampling noise can only raise: where the bias is not small against the width, the interval lies
            too high, and the error itself is as much noise as miscalibration.
    """

    value: float
    low: float
    high: float
    bias: float

    @classmethod
    def of(cls, value: float, replicates: np.ndarray, level: float) -> Interval:
        """The central ``level`` of the replicates."""
        low, high = np.quantile(replicates, [(1 - level) / 2, (1 + level) / 2])
        return cls(float(value), float(low), float(high), float(replicates.mean() - value))


def _check_bootstrap(n: int, level: float) -> None:
    if n < 2 or not 0 < level < 1:
        raise UserError(f"A bootstrap needs n >= 2 replicates and 0 < level < 1; got n={n}, level={level}.")


def bootstrap(
    statistic: Callable[..., float], *arrays: ArrayLike, seed: int, n: int = 1000, level: float = 0.95
) -> Interval:
    """Percentile interval of any statistic of arrays with one entry per image, resampled together.

    For the summary numbers `bootstrap_summary` does the same with the same draws, many times faster.

    Args:
        statistic: Called with the resampled arrays, for instance ``ece``.
        arrays: Arrays of equal length, for instance probabilities and labels.
        seed: Seed of the draws.
        n: Number of replicates.
        level: Coverage of the interval.

    Returns:
        The value on the arrays as they are, its interval, and the replicates' bias.

    Raises:
        UserError: If the arrays differ in length or are empty, or for bad ``n`` or ``level``.
    """
    _check_bootstrap(n, level)
    arrays = [np.asarray(a) for a in arrays]
    if len({len(a) for a in arrays}) != 1 or len(arrays[0]) == 0:
        raise UserError(f"The arrays have the lengths {[len(a) for a in arrays]}; one length >= 1 is needed.")
    rng, size = np.random.default_rng(seed), len(arrays[0])
    draws = (rng.integers(size, size=size) for _ in range(n))
    replicates = np.array([statistic(*(a[rows] for a in arrays)) for rows in draws])
    return Interval.of(statistic(*arrays), replicates, level)


def bootstrap_summary(
    logits: ArrayLike, labels: ArrayLike, *, seed: int, n: int = 1000, level: float = 0.95, n_bins: int = N_BINS
) -> dict[str, Interval]:
    """Percentile intervals of accuracy, ECE, SCE, NLL and Brier score over resampled images.

    Every one of them is a function of sums over images, so that a replicate is a row of draw counts times a
    matrix of per-image terms. All numbers share the draws, which are those of `bootstrap` with the same seed.

    Args:
        logits: Network outputs, (N, C).
        labels: True classes, (N,).
        seed: Seed of the draws.
        n: Number of replicates.
        level: Coverage of the intervals.
        n_bins: Number of bins of ECE and SCE.

    Returns:
        Intervals under ``accuracy``, ``ece``, ``sce``, ``nll``, ``brier``.

    Raises:
        UserError: For bad arrays, bins, ``n`` or ``level``.
    """
    _check_bootstrap(n, level)
    values = calibration_summary(logits, labels, n_bins)
    logits = check_logits(logits)
    terms = _PerImage.of(logits, check_labels(labels, *logits.shape), n_bins)
    rng, size = np.random.default_rng(seed), len(logits)
    block = max(1, 2**22 // size)  # 32 MiB of counts at a time
    rows = [terms.replicate(_counts(rng, min(block, n - done), size)) for done in range(0, n, block)]
    replicates = {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}
    return {name: Interval.of(values[name], sample, level) for name, sample in replicates.items()}


def _counts(rng: np.random.Generator, n: int, size: int) -> np.ndarray:
    """How often each image is drawn in each of n replicates, (n, size)."""
    return np.stack([np.bincount(rng.integers(size, size=size), minlength=size) for _ in range(n)]).astype(float)


@dataclass(frozen=True)
class _PerImage:
    """Per-image terms whose sums make the summary: (N,) each, class-major (C, N) for the last two."""

    hits: np.ndarray
    loss: np.ndarray
    confidence: np.ndarray
    p: np.ndarray
    residuals: np.ndarray
    n_bins: int

    @classmethod
    def of(cls, logits: np.ndarray, labels: np.ndarray, n_bins: int) -> _PerImage:
        p, loss, hits = _softmax_and_loss(logits, labels)
        return cls(hits, loss, p.max(axis=0), p, _residuals(p, labels), n_bins)

    def _gaps(self, counts: np.ndarray, p: np.ndarray, residuals: np.ndarray) -> np.ndarray:
        """Sum over bins of |weighted residual sum|, one number per replicate."""
        terms = np.zeros((len(p), self.n_bins))
        terms[np.arange(len(p)), _bin_index(p, self.n_bins)] = residuals
        return np.abs(counts @ terms).sum(axis=1)

    def replicate(self, counts: np.ndarray) -> dict[str, np.ndarray]:
        """The summary of each row of draw counts (n, N)."""
        size, by_class = counts.shape[1], zip(self.p, self.residuals, strict=True)
        return {
            "accuracy": counts @ self.hits / size,
            "ece": self._gaps(counts, self.confidence, self.hits - self.confidence) / size,
            "sce": sum(self._gaps(counts, p, r) for p, r in by_class) / self.p.size,
            "nll": counts @ self.loss / size,
            "brier": counts @ (self.residuals**2).sum(axis=0) / size,
        }


# ----------------------------------------------------------------------------------------------------- rows


def _row(name: str, title: str, definition: str, reference: str, **more: object) -> None:
    fields = {"higher_is_better": False, "unit": "fraction"} | more
    describe(name, title, dimension="calibration", definition=definition, reference=reference, **fields)


_row(
    "ece",
    "ECE",
    r"$\sum_b \frac{n_b}{N}\,|\mathrm{acc}_b - \mathrm{conf}_b|$ over 15 right-closed bins of the top "
    "class's confidence.",
    "guo2017calibration",
    in_verdict=True,
)
_row(
    "sce",
    "SCE",
    r"$\frac1C\sum_c\sum_b \frac{n_{bc}}{N}\,|\mathrm{acc}_{bc} - \mathrm{conf}_{bc}|$ over 15 bins of each "
    "class's probability; the same quantity as classwise ECE.",
    "nixon2019measuring",
    in_verdict=True,
    over_classes=True,
)
_row(
    "nll",
    "NLL",
    r"$-\frac1N\sum_i \log p_{i,y_i}$ by log-softmax in float64.",
    "gneiting2007strictly",
    unit="nats",
    in_verdict=True,
)
_row("brier", "Brier score", r"$\frac1N\sum_i\sum_c (p_{ic}-y_{ic})^2$, from 0 to 2.", "brier1950verification", unit="")
_row(
    "ece_lthpass",
    "ECE (published code)",
    "ECE as the paper's published code computes it: 15 edges, hence 14 bins.",
    "chen2022can",
)
_row(
    "adaptive_ece",
    "Adaptive ECE",
    r"ECE over 15 bins of equal mass: $\frac{1}{N}\sum_b n_b\,|\mathrm{acc}_b - \mathrm{conf}_b|$.",
    "nixon2019measuring",
)
_row(
    "ace",
    "ACE",
    r"SCE with 15 bins of equal mass in each class: $\frac1C\sum_c\sum_b \frac{n_{bc}}{N}\,"
    r"|\mathrm{acc}_{bc} - \mathrm{conf}_{bc}|$.",
    "nixon2019measuring",
    over_classes=True,
)
_row(
    "brier_reliability",
    "Brier reliability",
    "Mean squared gap between forecast and frequency over 15 bins per class, summed over classes; "
    "the calibration part of the Brier score.",
    "murphy1973new",
    unit="",
)
_row(
    "brier_resolution",
    "Brier resolution",
    "Mean squared distance of the bins' frequencies from the base rates, summed over classes; "
    "the resolution part of the Brier score.",
    "murphy1973new",
    unit="",
    higher_is_better=True,
)
_row(
    "temperature",
    "Temperature",
    r"$T$ that minimises the NLL of $\mathrm{softmax}(z/T)$ on held-out images; above 1 for an overconfident "
    "network.",
    "guo2017calibration",
    unit="",
    higher_is_better=None,
)
for _name, _title in (("ece", "ECE"), ("sce", "SCE"), ("nll", "NLL")):
    _row(
        f"{_name}_recalibrated",
        f"{_title} (recalibrated)",
        f"{_title} of $\\mathrm{{softmax}}(z/T)$, $T$ fitted on images held out from those it is judged on.",
        "guo2017calibration",
        unit="nats" if _name == "nll" else "fraction",
        over_classes=_name == "sce",
    )


for _name, _title in (("ece", "ECE"), ("sce", "SCE"), ("nll", "NLL")):
    _row(
        f"corrupted_{_name}",
        f"{_title} under corruption",
        f"{_title} on test images under one corruption at one severity.",
        "ovadia2019can",
        unit="nats" if _name == "nll" else "fraction",
        over_classes=_name == "sce",
    )


# ------------------------------------------------------------------------------------------------- a ticket


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
        ``interval_<metric>``: value, low and high of a 95 % bootstrap interval over images, and its bias.
    """
    labels = subject.labels("test", n_test).numpy()
    logits = subject.logits("test", n_test)
    probs = softmax(logits)
    numbers = calibration_summary(logits, labels, n_bins)
    numbers["test_accuracy"] = numbers.pop("accuracy")
    numbers["adaptive_ece"] = adaptive_ece(probs, labels, n_bins)
    numbers["ace"] = ace(probs, labels, n_bins)
    parts = brier_decomposition(probs, labels, n_bins)
    numbers |= {"brier_reliability": parts.reliability, "brier_resolution": parts.resolution}
    numbers |= _recalibrated(logits, labels, n_bins)
    diagram = reliability_diagram(probs, labels, n_bins)
    arrays = {"count": diagram.counts, "confidence": diagram.confidence, "accuracy": diagram.accuracy}
    intervals = bootstrap_summary(logits, labels, seed=0, n=n_bootstrap, n_bins=n_bins)
    for name in ("ece", "sce", "nll"):
        found = intervals[name]
        arrays[f"interval_{name}"] = np.array([found.value, found.low, found.high, found.bias])
    values = [Value(name, float(value), len(labels)) for name, value in numbers.items()]
    return values + _under_corruption(subject, corruption_names(extra), n_corrupted, n_bins), arrays


def inputs(subject: Subject, *, extra: bool, **rest: object) -> str:
    """Return the versions of the image sets that `measure` reads beside the test images."""
    return " ".join(subject.input_version(f"corrupted:{name}") for name in corruption_names(extra))


def _under_corruption(subject: Subject, names: Sequence[str], n: int, n_bins: int) -> list[Value]:
    labels, values = subject.labels("test", n).numpy(), []
    for name, severity, logits in subject.corrupted_logits(names, n):
        found = calibration_summary(logits, labels, n_bins)
        values += [
            Value(f"corrupted_{metric}", found[metric], len(labels), name, severity) for metric in ("ece", "sce", "nll")
        ]
    return values


def _recalibrated(logits: np.ndarray, labels: np.ndarray, n_bins: int) -> dict[str, float]:
    """Fit the temperature on one half of the images and scale the other half by it, both ways round."""
    scaled, temperatures = np.empty_like(logits, dtype=np.float64), []
    for fold in (0, 1):
        mine = np.arange(len(labels)) % 2 == fold
        temperatures.append(temperature_scaling(logits[~mine], labels[~mine]))
        scaled[mine] = logits[mine] / temperatures[-1]
    after = calibration_summary(scaled, labels, n_bins)
    found = {f"{name}_recalibrated": after[name] for name in ("ece", "sce", "nll")}
    return {**found, "temperature": float(np.mean(temperatures))}
