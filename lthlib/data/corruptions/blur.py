"""The blurs, with lengths in pixels."""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING

import cv2
import numpy as np

from lthlib.data.corruptions.registry import Draws, corruption, truncate

if TYPE_CHECKING:
    from scipy import sparse

MOTION_PIECE = 11  # pixels of a line per filter: OpenCV turns to the slower Fourier transform above 129 elements


@corruption(
    "Defocus blur",
    "blur",
    cifar=((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
    imagenet=((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),
)
def defocus_blur(x: np.ndarray, c: tuple[float, float], draws: Draws) -> np.ndarray:
    """Convolve with a disk (radius, smoothing of its edge), mirrored at the borders."""
    kernel, out = _disk(*c), x.astype(np.float32)
    for image in out:
        cv2.filter2D(image, -1, kernel, dst=image, borderType=cv2.BORDER_REFLECT_101)
    return truncate(out)


def _disk(radius: float, smoothing: float) -> np.ndarray:
    reach = max(8, math.ceil(radius))
    square = np.arange(-reach, reach + 1) ** 2
    disk = (square[:, None] + square[None, :] <= radius**2).astype(np.float32)
    side = 3 if radius <= 8 else 5
    kernel = cv2.GaussianBlur(disk / disk.sum(), (side, side), smoothing)
    inside = np.flatnonzero(kernel.max(axis=0) > 1e-7)  # smaller ones cost time and cannot move a level
    return kernel[inside[0] : inside[-1] + 1, inside[0] : inside[-1] + 1].copy()


@corruption(
    "Glass blur",
    "blur",
    cifar=((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)),
    imagenet=((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)),
)
def glass_blur(x: np.ndarray, c: tuple[float, int, int], draws: Draws) -> np.ndarray:
    """Blur, displace pixels, blur again: (standard deviation, farthest step, rounds).

    The published loop means to swap neighbours, but ``a, b = b, a`` on NumPy views copies: the second pixel
    keeps its value. The official sets were made so, and so are these.
    """
    std, reach, rounds = c
    x = truncate(gaussian(x, std))
    for _ in range(rounds):
        x = _displace(x, reach, draws)
    return truncate(gaussian(x, std))


def _displace(x: np.ndarray, reach: int, draws: Draws) -> np.ndarray:
    """Give every inner pixel the value of a neighbour up to ``reach`` away, last pixel first."""
    n, height, width, channels = x.shape
    inner = (slice(None), slice(reach + 1, height - reach + 1), slice(reach + 1, width - reach + 1))
    site = np.arange(n * height * width).reshape(n, height, width)
    source = site.copy()
    for stride in (1, width):
        source[inner] += (draws.integers(2 * reach, source[inner].shape[1:]) - reach) * stride
    source, site = source.ravel(), site.ravel()
    # A pixel later in the raster was rewritten before this one reads it: follow it to what it took. Pixels outside the
    # inner region are their own source. Doubling the hops ends a chain of any length in a few steps.
    late = np.where(source > site, source, site)
    while (source[late] > late).any():
        late = late[late]
    return x.reshape(-1, channels).take(source[late], axis=0).reshape(x.shape)


@corruption(
    "Motion blur",
    "blur",
    cifar=((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),
    imagenet=((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)),
)
def motion_blur(x: np.ndarray, c: tuple[int, float], draws: Draws) -> np.ndarray:
    """Smear along a line at an angle between -45 and 45 degrees: (radius, standard deviation)."""
    return motion(x, c, draws.uniform(-45, 45))


def motion(x: np.ndarray, c: tuple[int, float], degrees: np.ndarray) -> np.ndarray:
    """Blur as ImageMagick does: half a Gaussian on 2 radius + 1 pixels of a line, edges repeated, rounded."""
    radius, std = c
    n, height, width = x.shape[:3]
    weight = np.exp(-0.5 * (np.arange(2 * radius + 1) / std) ** 2)
    weight = weight[weight > 1e-6 * weight.sum()]  # the rest cannot move a result by 1e-3 of a level
    along, angle = np.arange(len(weight)), np.deg2rad(degrees.astype(np.float64))[:, None]
    dx = np.ceil(along * np.cos(angle) - 0.5).astype(int)
    dy = np.ceil(along * np.sin(angle) - 0.5).astype(int)
    above, before = (-d.min(initial=0) for d in (dy, dx))
    below, after = (d.max(initial=0) for d in (dy, dx))
    padded = np.pad(x, ((0, 0), (above, below), (before, after), (0, 0)), mode="edge").astype(np.float32)
    levels = np.full(x.shape, 0.5, np.float32)
    for first in range(0, len(weight), MOTION_PIECE):
        piece = slice(first, first + MOTION_PIECE)
        top, left = (d[:, piece].min(axis=1, keepdims=True) for d in (dy, dx))
        kernels = np.zeros((n, MOTION_PIECE, MOTION_PIECE), np.float32)
        place = (np.arange(n)[:, None], dy[:, piece] - top, dx[:, piece] - left)
        np.add.at(kernels, place, (weight / weight.sum())[piece].astype(np.float32))
        used = (p.max(axis=1) + 1 for p in place[1:])  # rows and columns of each kernel
        boxes = np.stack([top[:, 0] + above, left[:, 0] + before, *used], axis=1).tolist()
        for level, image, kernel, (y, x, rows, columns) in zip(levels, padded, kernels, boxes, strict=True):
            view = image[y : y + height + rows - 1, x : x + width + columns - 1]
            blurred = cv2.filter2D(view, -1, kernel[:rows, :columns], anchor=(0, 0))
            level += blurred.reshape(view.shape)[:height, :width]
    return levels.astype(np.uint8)


@corruption(
    "Zoom blur",
    "blur",
    cifar=((1.06, 0.01), (1.11, 0.01), (1.16, 0.01), (1.21, 0.01), (1.26, 0.01)),
    imagenet=((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03)),
)
def zoom_blur(x: np.ndarray, c: tuple[float, float], draws: Draws) -> np.ndarray:
    """Average the image with its enlargements by 1, 1 + step, ... below the stop: (stop, step)."""
    n, height, width, channels = x.shape
    pixels = x.transpose(1, 2, 0, 3).reshape(height * width, -1).astype(np.float32)
    blurred = truncate(_zoom_operator(height, width, *c) @ pixels)
    return blurred.reshape(height, width, n, channels).transpose(2, 0, 1, 3)


@functools.lru_cache(maxsize=2)  # tens of megabytes at 224 pixels
def _zoom_operator(height: int, width: int, stop: float, step: float) -> sparse.csr_array:
    """Return the whole blur, which is linear, as one sparse float32 matrix on the H W pixels of a plane."""
    from scipy import sparse

    factors = np.arange(1, stop, step)
    total = sparse.eye_array(height * width, format="csr")
    for factor in factors:
        rows, columns = (sparse.csr_array(zoom_matrix(side, factor)) for side in (height, width))
        total = total + sparse.kron(rows, columns, format="csr")
    return (total / (len(factors) + 1)).astype(np.float32)


def zoom_matrix(side: int, factor: float) -> np.ndarray:
    """Return the (side, side) matrix that enlarges the centre of a line linearly and crops it again."""
    crop = math.ceil(side / factor)
    size = round(crop * factor)
    at = (np.arange(side) + (size - side) // 2) * (crop - 1) / max(size - 1, 1)
    low = np.minimum(at.astype(int), crop - 2)
    matrix, rows, first = np.zeros((side, side)), np.arange(side), (side - crop) // 2
    matrix[rows, first + low] = 1 - (at - low)
    matrix[rows, first + low + 1] = at - low
    return matrix


def gaussian(x: np.ndarray, std: float) -> np.ndarray:
    """Return float32 of x blurred to 4 standard deviations, edges repeated (scikit-image's default)."""
    radius = int(4 * std + 0.5)
    out = x.astype(np.float32)
    if radius:
        for image in out:
            cv2.GaussianBlur(image, (2 * radius + 1,) * 2, std, dst=image, borderType=cv2.BORDER_REPLICATE)
    return out
