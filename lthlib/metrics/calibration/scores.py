"""Proper scores, what they are made of, and the one temperature that would improve them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import special

from lthlib.metrics.arrays import check_labels, check_logits, check_probs
from lthlib.metrics.calibration.errors import N_BINS, bin_index, one_hot
from lthlib.metrics.registry import metric


@metric("nll", "NLL", higher_is_better=False, unit="nats", reference="gneiting2007strictly", in_verdict=True)
def nll(logits: ArrayLike, labels: ArrayLike) -> float:
    r"""Negative log-likelihood: $-\frac1N\sum_i \log p_{i,y_i}$ by log-softmax in float64.

    From logits (N, C) and labels (N,), in nats: finite for every finite logit, where the paper's published code takes
    log(softmax) in float32 and reaches infinity beyond about 104 nats.
    """
    return float(losses(logits, labels).mean())


def losses(logits: ArrayLike, labels: ArrayLike) -> np.ndarray:
    """The terms of `nll`, (N,)."""
    logits = check_logits(logits)
    labels = check_labels(labels, *logits.shape)
    return -special.log_softmax(logits, axis=1)[np.arange(len(labels)), labels]


@metric("brier", "Brier score", higher_is_better=False, unit="", reference="brier1950verification")
def brier(probs: ArrayLike, labels: ArrayLike) -> float:
    r"""Mean squared error of the probabilities: $\frac1N\sum_i\sum_c (p_{ic}-y_{ic})^2$, from 0 to 2.

    The original definition over all classes, twice the usual binary one for C = 2. Of probabilities (N, C) whose rows
    sum to 1; `UserError` for others.
    """
    probs, labels = check_probs(probs, labels)
    return float(((probs - one_hot(probs, labels)) ** 2).sum(axis=1).mean())


class BrierDecomposition(NamedTuple):
    """Brier score = reliability - resolution + uncertainty + within_bin, each summed over the classes.

    Reliability is the mean squared gap between forecast and frequency of a bin (0 is calibrated), resolution how far
    the bins' frequencies lie from the base rates (higher is better), uncertainty sum_c f_c (1 - f_c) of the base rates
    f, and within_bin what binning hides: the forecasts' variance minus twice their covariance with the labels.
    """

    reliability: float
    resolution: float
    uncertainty: float
    within_bin: float


def brier_decomposition(probs: ArrayLike, labels: ArrayLike, n_bins: int = N_BINS) -> BrierDecomposition:
    """Murphy's (1973) decomposition of `brier`, class by class over right-closed bins of p_c, summed over the classes.

    Murphy's three terms are exact only if every forecast of a bin is the same number; the rest is given as
    ``within_bin`` (Stephenson, Coelho and Jolliffe, 2008), so the four terms always add up.
    """
    probs, labels = check_probs(probs, labels)
    terms = np.zeros(4)
    for p, hits in zip(probs.T, one_hot(probs, labels).T, strict=True):
        bins = bin_index(p, n_bins)
        counts = np.maximum(np.bincount(bins), 1)
        forecasts, frequencies = (np.bincount(bins, weights) / counts for weights in (p, hits))
        forecasts, frequencies, base = forecasts[bins], frequencies[bins], hits.mean()
        spread = p - forecasts
        terms += (
            np.mean((forecasts - frequencies) ** 2),
            np.mean((frequencies - base) ** 2),
            base * (1 - base),
            np.mean(spread**2) - 2 * np.mean(spread * (hits - frequencies)),
        )
    return BrierDecomposition(*map(float, terms))


@metric("brier_reliability", "Brier reliability", higher_is_better=False, unit="", reference="murphy1973new")
def brier_reliability(probs: ArrayLike, labels: ArrayLike, n_bins: int = N_BINS) -> float:
    """Mean squared gap between forecast and frequency over 15 bins per class, summed over classes; the calibration part
    of the Brier score.
    """
    return brier_decomposition(probs, labels, n_bins).reliability


@metric("brier_resolution", "Brier resolution", higher_is_better=True, unit="", reference="murphy1973new")
def brier_resolution(probs: ArrayLike, labels: ArrayLike, n_bins: int = N_BINS) -> float:
    """Mean squared distance of the bins' frequencies from the base rates, summed over classes; the resolution part of
    the Brier score.
    """
    return brier_decomposition(probs, labels, n_bins).resolution


metric(
    "temperature",
    "Temperature",
    dimension="calibration",
    higher_is_better=None,
    unit="",
    reference="guo2017calibration",
)(r"$T$ that minimises the NLL of $\mathrm{softmax}(z/T)$ on held-out images; above 1 for an overconfident network.")


def temperature_scaling(logits: ArrayLike, labels: ArrayLike) -> float:
    """Temperature T that minimises the NLL of softmax(logits / T) (Guo et al., 2017).

    The NLL is convex in 1 / T, so its slope mean(E_p[z] - z_label) changes sign once; that root is found to full
    precision. Fit it on images held out from those it is judged on. T > 1 cools an overconfident network and never
    changes accuracy. Where the minimum lies outside [0.01, 100] (every image right: T -> 0; no better than chance: T ->
    infinity) the nearer bound is returned, which is the minimiser within them. Errors as in `nll`.
    """
    from scipy.optimize import brentq

    low, high = 0.01, 100.0
    z = check_logits(logits)
    z = z - z.max(axis=1, keepdims=True)
    picked = z[np.arange(len(z)), check_labels(labels, *z.shape)].mean()

    def slope(inverse: float) -> float:
        return (special.softmax(z * inverse, axis=1) * z).sum(axis=1).mean() - picked

    if slope(1 / high) >= 0:
        return high
    if slope(1 / low) <= 0:
        return low
    return float(1 / brentq(slope, 1 / high, 1 / low, xtol=1e-14, rtol=1e-13))
