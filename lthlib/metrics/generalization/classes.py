"""Who pays for an average: the recall of each class, answers that change, and images that every sparse network loses.

All of it needs nothing but the class that each network answers for each test image.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from lthlib.metrics.arrays import check_labels, check_logits
from lthlib.metrics.registry import Value, metric
from lthlib.metrics.resampling import kept, resamples

metric(
    "churn", "Churn", dimension="generalization", higher_is_better=False, unit="fraction", reference="fard2016launch"
)(
    "Fraction of test images to which a sparse network answers another class than its dense parent; of a "
    "dense network, than the dense network of the seed before it."
)


@metric(
    "worst_class_accuracy", "Accuracy of the worst class", higher_is_better=True, reference="hooker2020characterising"
)
def worst_class_accuracy(logits: ArrayLike, labels: ArrayLike) -> float:
    """Smallest recall of any class: the fraction of its images whose largest logit is that class.

    Classes without images do not count. Of logits (N, C) and labels (N,); errors as in `accuracy`.
    """
    logits = check_logits(logits)
    labels = check_labels(labels, *logits.shape)
    return float(np.nanmin(recall_by_class(logits.argmax(1), labels, logits.shape[1])))


def recall_by_class(predicted: np.ndarray, labels: np.ndarray, n_classes: int) -> np.ndarray:
    """Return the fraction of each class's images that are answered right, (C,); NaN for a class without images."""
    right, all_ = (np.bincount(part, minlength=n_classes) for part in (labels[predicted == labels], labels))
    return np.divide(right, all_, out=np.full(n_classes, np.nan), where=all_ > 0)


def disagreement(predicted: np.ndarray, others: np.ndarray) -> float:
    """Return the fraction of images to which two networks answer different classes, right or wrong."""
    return float(np.mean(predicted != others))


def exemplars(dense: np.ndarray, sparse: np.ndarray) -> np.ndarray:
    """Return which images are pruning-identified exemplars, (N,) bool, of answers (seeds, N) of either kind of network.

    On these all sparse networks answer one class and all dense ones another. Hooker et al. (2019) compare the commonest
    answers of thirty networks on either side. Of two or three, one has to ask for unanimity; of one, every answer that
    changed would count, which is churn.
    """
    return (dense == dense[0]).all(0) & (sparse == sparse[0]).all(0) & (dense[0] != sparse[0])


def kept_answers(logits: np.ndarray, labels: np.ndarray, classes: Sequence[str]) -> dict[str, np.ndarray]:
    """Return what an evaluation keeps of its answers on test images, for figures and for the verdict.

    ``predicted`` and ``labels`` (N,), ``recall_by_class`` (C,), ``classes`` (C,) their names, and replicates of
    `worst_class_accuracy` (`lthlib.metrics.resampling`).
    """
    small = np.min_scalar_type(len(classes) - 1)
    predicted, labels = logits.argmax(1).astype(small), np.asarray(labels).astype(small)
    recall = recall_by_class(predicted, labels, len(classes))
    worst = np.nanargmin(recall)
    value = Value("worst_class_accuracy", float(recall[worst]), len(labels))
    answers = {"predicted": predicted, "labels": labels, "classes": np.array(classes)}
    answers["recall_by_class"] = recall.astype(np.float32)
    return answers | kept(value, _resampled_worst(predicted == labels, labels), 1 / int((labels == worst).sum()))


def _resampled_worst(right: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return the smallest recall of each resample, (B,)."""
    order = np.argsort(labels, kind="stable")
    starts = np.unique(labels[order], return_index=True)[1]
    drawn = resamples(len(labels))[:, order]
    hits, all_ = (np.add.reduceat(counts, starts, axis=1) for counts in (drawn * right[order], drawn))
    return np.nanmin(np.divide(hits, all_, out=np.full(all_.shape, np.nan), where=all_ > 0), axis=1)
