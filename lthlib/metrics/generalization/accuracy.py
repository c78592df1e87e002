"""Accuracy, and by how much an image is right."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from lthlib.metrics.arrays import check_labels, check_logits, softmax
from lthlib.metrics.registry import metric


@metric("test_accuracy", "Accuracy", higher_is_better=True, reference="chen2022can", in_verdict=True)
def accuracy(logits: ArrayLike, labels: ArrayLike) -> float:
    """Fraction of images whose largest logit is the true class.

    Of equal logits the first class wins. Of logits (N, C) and labels (N,); `UserError` for NaN or infinite logits,
    labels out of range, or an empty set.
    """
    logits = check_logits(logits)
    return float(np.mean(logits.argmax(axis=1) == check_labels(labels, *logits.shape)))


def true_class_margin(logits: ArrayLike, labels: ArrayLike) -> np.ndarray:
    """Probability of the true class minus the largest other probability, (N,), in [-1, 1].

    Positive where the network is right. In probabilities, so that networks of different logit scale compare. The
    arguments and errors are those of `accuracy`.
    """
    probs = softmax(logits)
    rows, labels = np.arange(len(probs)), check_labels(labels, *probs.shape)
    true = probs[rows, labels]
    probs[rows, labels] = -np.inf
    return true - probs.max(axis=1)
