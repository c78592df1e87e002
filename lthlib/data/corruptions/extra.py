"""The four extra corruptions, which do not count in the mean corruption error."""

from __future__ import annotations

import functools

import cv2
import numpy as np

from lthlib.data.corruptions.blur import gaussian
from lthlib.data.corruptions.noise import normal_channel, through_channel
from lthlib.data.corruptions.registry import LEVEL_SLACK, Draws, corruption, gray, largest, pair, truncate

MUD, WATER = (63, 42, 20), (175, 238, 238)


@corruption("Speckle noise", "extra", cifar=(0.06, 0.1, 0.12, 0.16, 0.2), imagenet=(0.15, 0.2, 0.35, 0.45, 0.6))
def speckle_noise(x: np.ndarray, std: float, draws: Draws) -> np.ndarray:
    """Multiply by 1 plus normal noise of standard deviation ``std``."""
    return through_channel(x, draws, normal_channel, 0.0, std)


@corruption("Gaussian blur", "extra", cifar=(0.4, 0.6, 0.7, 0.8, 1), imagenet=(1, 2, 3, 4, 6))
def gaussian_blur(x: np.ndarray, std: float, draws: Draws) -> np.ndarray:
    """Convolve with a Gaussian of ``std`` pixels."""
    return truncate(gaussian(x, std))


@corruption(
    "Spatter",
    "extra",
    cifar=(
        (0.62, 0.1, 0.7, 0.7, 0.5, 0),
        (0.65, 0.1, 0.8, 0.7, 0.5, 0),
        (0.65, 0.3, 1, 0.69, 0.5, 0),
        (0.65, 0.1, 0.7, 0.69, 0.6, 1),
        (0.65, 0.1, 0.5, 0.68, 0.6, 1),
    ),
    imagenet=(
        (0.65, 0.3, 4, 0.69, 0.6, 0),
        (0.65, 0.3, 3, 0.68, 0.6, 0),
        (0.65, 0.3, 2, 0.68, 0.5, 0),
        (0.65, 0.3, 1, 0.65, 1.5, 1),
        (0.67, 0.4, 1, 0.65, 1.5, 1),
    ),
)
def spatter(x: np.ndarray, c: tuple, draws: Draws) -> np.ndarray:
    """Splash water or mud: (mean, std, blur, threshold of the noise; strength; 1 for mud)."""
    mean, std, blur, threshold, strength, mud = c
    liquid = gaussian(draws.normal(mean, std, (*x.shape[1:3], 1)), blur)
    if mud:
        wet = gaussian(liquid > threshold, strength)
        wet[wet < 0.8] = 0
        return truncate(x * (1 - wet) + _tint(MUD, x.shape[3]) * wet)
    liquid = np.where(liquid < threshold, 0, np.clip(liquid * 255, 0, 255)).astype(np.uint8)
    wet = np.stack([_water(layer) for layer in liquid[..., 0]])[..., None] * np.float32(strength)
    return truncate(x + _tint(WATER, x.shape[3]) * wet)


def _tint(colour: tuple[int, int, int], channels: int) -> np.ndarray:
    colour = np.array(colour, np.float32)
    return colour if channels == 3 else gray(colour)


def _water(liquid: np.ndarray) -> np.ndarray:
    """Return how strongly each pixel shows the drops, float32 (H, W), at most 1: embossed edges."""
    distance = cv2.distanceTransform(255 - cv2.Canny(liquid, 50, 150), cv2.DIST_L2, 5)
    relief = cv2.equalizeHist(cv2.blur(np.minimum(distance, 20), (3, 3)).astype(np.uint8))
    emboss = np.array([[-2, -1, 0], [-1, 1, 1], [0, 1, 2]], np.float32)
    relief = cv2.blur(cv2.filter2D(relief, cv2.CV_8U, emboss), (3, 3))
    drops = liquid * relief.astype(np.float32)
    return drops / max(drops.max(), np.float32(1))  # an image without a drop stays dry


@corruption(
    "Saturate",
    "extra",
    cifar=((0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2)),
    imagenet=((0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (20, 0.2)),
)
def saturate(x: np.ndarray, c: tuple[float, float], draws: Draws) -> np.ndarray:
    """Change the saturation of HSV to ``factor * s + shift``, clipped; a gray (one-channel) image stays as it is.

    Severities 1 and 2 take colour away, 3 to 5 add some: they are not in the order of distance. Gray pixels of an RGB
    image have the hue red by convention, and turn reddish at severities 4 and 5, as in the published sets.
    """
    if x.shape[3] == 1:
        return x
    high = largest(x)
    low = np.minimum(np.minimum(x[..., 0], x[..., 1]), x[..., 2])
    scale, gray = _saturate_table(*c).take(pair(high, low)), high == low
    out = np.empty_like(x)
    for k in range(3):
        levels = (high - x[..., k]) * scale
        if c[1] and k > 0:
            levels[gray] = high[gray] * np.float32(c[1])
        np.subtract(high + np.float32(LEVEL_SLACK), levels, out=levels)
        out[..., k] = levels.astype(np.uint8)
    return out


@functools.lru_cache(maxsize=16)
def _saturate_table(factor: float, shift: float) -> np.ndarray:
    """Return, for (value, smallest channel), the factor on every channel's distance from the value."""
    high, low = np.arange(256.0)[:, None], np.arange(256.0)[None, :]
    spread = np.maximum(high - low, 1)
    saturation = np.clip((high - low) / np.maximum(high, 1) * factor + shift, 0, 1)
    return (saturation * high / spread).astype(np.float32).ravel()
