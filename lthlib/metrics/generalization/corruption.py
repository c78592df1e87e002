"""Corruption errors: the numbers that go by the name mCE.

All take error rates at each severity by corruption, the same number of severities for all, and are lower for better
networks. They raise `UserError` for a missing corruption, uneven severities, or an error outside [0, 1].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np

from lthlib.core.errors import UserError
from lthlib.data import corruptions
from lthlib.metrics.arrays import as_array
from lthlib.metrics.registry import metric

# Error of AlexNet on ImageNet-C, mean over the five severities: Hendrycks and Dietterich (2019), the
# six-digit values as published with AugMix (github.com/google-research/augmix, imagenet.py).
ALEXNET_ERROR = {
    "gaussian_noise": 0.886428,
    "shot_noise": 0.894468,
    "impulse_noise": 0.922640,
    "defocus_blur": 0.819880,
    "glass_blur": 0.826268,
    "motion_blur": 0.785948,
    "zoom_blur": 0.798360,
    "snow": 0.866816,
    "frost": 0.826572,
    "fog": 0.819324,
    "brightness": 0.564592,
    "contrast": 0.853204,
    "elastic_transform": 0.646056,
    "pixelate": 0.717840,
    "jpeg_compression": 0.606500,
}
# Top-1 error of the same network on the clean images: torchvision's AlexNet, whose accuracy is 56.522 %.
ALEXNET_CLEAN_ERROR = 0.43478
COMMON_CORRUPTIONS = corruptions.common()

Errors = Mapping[str, Sequence[float]]
_row = partial(metric, higher_is_better=False, reference="hendrycks2019benchmarking")

metric(
    "corruption_error_all",
    "mCE (unnormalised, with the extra ones)",
    dimension="generalization",
    higher_is_better=False,
    unit="fraction",
    reference="hendrycks2019benchmarking",
)("Mean error over the 15 common corruptions, the extra ones and all severities, not divided by AlexNet's.")


@_row("corruption_error", "mCE (unnormalised, 15)", in_verdict=True)
def corruption_error(errors: Errors, names: Sequence[str] = COMMON_CORRUPTIONS) -> float:
    """Mean error over the 15 common corruptions and all severities, not divided by AlexNet's.

    What is called mCE on CIFAR-10-C (as in AugMix): no division by AlexNet, clean images not counted. ``names`` are the
    corruptions that count.
    """
    return float(_mean_errors(errors, names).mean())


@_row("relative_corruption_error", "Relative mCE (15)")
def relative_corruption_error(errors: Errors, clean_error: float) -> float:
    """Unnormalised mean corruption error minus the clean error.

    That is the error on the same images before corruption. It rewards a network that is bad on clean images too, so
    read it beside the clean error. The "relative mCE" of Hendrycks and Dietterich divides this difference by AlexNet's:
    `relative_corruption_error_alexnet`.
    """
    return corruption_error(errors) - _checked(clean_error)


@_row("corruption_error_alexnet", "mCE (AlexNet-normalised, 15)", unit="")
def corruption_error_alexnet(errors: Errors) -> float:
    r"""Error relative to AlexNet's: $\frac1{15}\sum_c \sum_s E_{sc} / \sum_s E^\mathrm{AlexNet}_{sc}$, with AlexNet's
    errors on ImageNet-C.

    The mCE of Hendrycks and Dietterich (2019); 1 is as bad as AlexNet, and it may exceed 1. The constants are AlexNet's
    on ImageNet-C: on other data the number is no comparison with it.
    """
    means, alexnet = _beside_alexnet(errors)
    return float((means / alexnet).mean())


@_row("relative_corruption_error_alexnet", "Relative mCE (AlexNet-normalised, 15)", unit="")
def relative_corruption_error_alexnet(errors: Errors, clean_error: float) -> float:
    r"""What corruption adds, relative to AlexNet: $\frac1{15}\sum_c \sum_s (E_{sc} - E_0) / \sum_s
    (E^\mathrm{AlexNet}_{sc} - E^\mathrm{AlexNet}_0)$, with AlexNet's errors on ImageNet-C and on the clean images.

    The relative mCE of Hendrycks and Dietterich (2019). It may be negative.
    """
    means, alexnet = _beside_alexnet(errors)
    return float(((means - _checked(clean_error)) / (alexnet - ALEXNET_CLEAN_ERROR)).mean())


def _beside_alexnet(errors: Errors) -> tuple[np.ndarray, np.ndarray]:
    """Mean errors by corruption, ours and AlexNet's."""
    means, n_severities = _mean_errors(errors, tuple(ALEXNET_ERROR)), len(errors["fog"])
    if n_severities != 5:
        raise UserError(f"AlexNet's errors are means over five severities; {n_severities} are given.")
    return means, np.array(list(ALEXNET_ERROR.values()))


def _checked(clean_error: float) -> float:
    if not 0 <= clean_error <= 1:
        raise UserError(f"The clean error is {clean_error!r}; a fraction in [0, 1] is needed.")
    return float(clean_error)


def _mean_errors(errors: Errors, names: Sequence[str]) -> np.ndarray:
    """Mean over severities of each corruption, (K,), checked."""
    if len(names) == 0 or len(set(names)) < len(names):
        raise UserError("Name at least one corruption, and each only once.")
    missing = [name for name in names if name not in errors]
    if missing:
        raise UserError(f"No error rates for {', '.join(missing)}; all {len(names)} corruptions are needed.")
    rows = [as_array(errors[name], f"errors under {name}") for name in names]
    shapes = {row.shape for row in rows}
    if len(shapes) > 1 or rows[0].ndim != 1 or rows[0].size == 0:
        raise UserError(f"Each corruption needs one error rate per severity, the same number for all; got {shapes}.")
    table = np.array(rows, dtype=np.float64)
    if table.min() < 0 or table.max() > 1:
        raise UserError(f"Error rates run from {table.min():.4g} to {table.max():.4g}; give fractions in [0, 1].")
    return table.mean(axis=1)
