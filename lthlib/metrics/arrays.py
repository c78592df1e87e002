"""What every metric on logits asks of its input, else `UserError`, and the softmax they share."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike
from scipy import special

from lthlib.core.errors import UserError


def as_array(values: ArrayLike, name: str) -> np.ndarray:
    """Return ``values`` (numpy, torch of any device and float type, nested lists) as an array of finite numbers."""
    if hasattr(values, "detach"):
        values = values.detach().cpu()
        values = (values.float() if values.is_floating_point() and values.itemsize < 4 else values).numpy()
    array = np.asarray(values)
    if array.dtype.kind not in "fiub":
        raise UserError(f"The {name} are of type {array.dtype}; give real numbers.")
    if not np.isfinite(array).all():
        bad = np.argwhere(~np.isfinite(array))
        raise UserError(
            f"The {name} hold {len(bad)} NaN or infinite values, the first at index {tuple(map(int, bad[0]))}; the "
            "network diverged or the file is damaged."
        )
    return array


def check_logits(logits: ArrayLike, name: str = "logits") -> np.ndarray:
    """Return logits as a float64 array (N, C), N >= 1 and C >= 2, all finite."""
    array = as_array(logits, name)
    if array.ndim != 2 or array.shape[1] < 2:
        raise UserError(f"The {name} have the shape {array.shape}; (images, classes >= 2) is needed.")
    if len(array) == 0:
        raise UserError(f"The {name} are empty: there is no image to measure.")
    return array.astype(np.float64, copy=False)


def check_labels(labels: ArrayLike, n_images: int, n_classes: int) -> np.ndarray:
    """Return labels as an (N,) array of integers in [0, C); a class that never occurs is allowed."""
    array = as_array(labels, "labels")
    if array.shape != (n_images,):
        raise UserError(f"The labels have the shape {array.shape}; one per image is needed, ({n_images},).")
    if array.dtype.kind not in "iu":
        raise UserError(f"The labels are of type {array.dtype}; integers in [0, {n_classes}) are needed.")
    low, high = array.min(), array.max()
    if low < 0 or high >= n_classes:
        raise UserError(
            f"The labels run from {low} to {high}, but there are {n_classes} classes: [0, {n_classes - 1}] "
            "is allowed. Are labels and logits of the same data set?"
        )
    return array.astype(np.intp, copy=False)


def check_probs(probs: ArrayLike, labels: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Return probabilities as an (N, C) float64 array inside [0, 1], and labels as `check_labels` does.

    A softmax in float32 or bfloat16 rounds: entries up to 1 + 1e-3 are clipped to 1, row sums may be off by 1e-2. Rows
    that are no distribution are refused (logits given by mistake).
    """
    array = check_logits(probs, "probabilities")
    if array.min() < 0 or array.max() > 1 + 1e-3 or np.abs(array.sum(axis=1) - 1).max() > 1e-2:
        raise UserError(
            f"The probabilities run from {array.min():.4g} to {array.max():.4g}; a row lies in [0, 1] and "
            "sums to 1. If these are logits, pass softmax(logits)."
        )
    return np.minimum(array, 1), check_labels(labels, *array.shape)


def softmax(logits: ArrayLike) -> np.ndarray:
    """Softmax probabilities in float64, (N, C) -> (N, C)."""
    return special.softmax(check_logits(logits), axis=1)
