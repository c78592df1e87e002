"""Contrast, elastic transform, pixelate and JPEG."""

from __future__ import annotations

import functools
import math

import cv2
import numpy as np
import torch
from torch.nn.functional import grid_sample

from lthlib.data.corruptions.registry import LEVEL_SLACK, Draws, corruption, truncate


@corruption("Contrast", "digital", cifar=(0.75, 0.5, 0.4, 0.3, 0.15), imagenet=(0.4, 0.3, 0.2, 0.1, 0.05))
def contrast(x: np.ndarray, factor: float, draws: Draws) -> np.ndarray:
    """Shrink the distance to each channel's mean by ``factor``."""
    n, height, width, channels = x.shape
    columns = x.reshape(n, height, -1).sum(axis=1, dtype=np.uint32)
    mean = columns.reshape(n, width, channels).sum(axis=1) / (height * width)
    offset = np.tile((mean * (1 - factor)).astype(np.float32), width)[:, None]  # as long as a row: no short loops
    return truncate(x.reshape(n, height, -1) * np.float32(factor) + offset).reshape(x.shape)


@corruption(
    "Elastic transform",
    "digital",
    # Displacement, its smoothing and the jitter of the affine map, in pixels of an image with the side that
    # comes last. The published ImageNet table counts in 244ths.
    cifar=((0, 0, 2.56, 32), (1.6, 6.4, 2.24, 32), (2.56, 1.92, 1.92, 32), (3.2, 1.28, 1.6, 32), (3.2, 0.96, 0.96, 32)),
    imagenet=(
        (488, 170.8, 24.4, 224),
        (488, 19.52, 48.8, 224),
        (12.2, 2.44, 4.88, 224),
        (17.08, 2.44, 4.88, 224),
        (29.28, 2.44, 4.88, 224),
    ),
)
def elastic_transform(x: np.ndarray, c: tuple[float, float, float, int], draws: Draws) -> np.ndarray:
    """Warp by a random affine map, then by a smooth random field (bilinear, mirrored at the borders).

    The only corruption whose lengths scale: with the shorter side, from 32 or 224 pixels.
    """
    shift, smoothing, jitter, reference = c
    height, width = x.shape[1:3]
    scale = min(height, width) / reference
    image = torch.from_numpy(x.transpose(0, 3, 1, 2).astype(np.float32))
    affine = torch.from_numpy(_affine_places(height, width, draws.uniform(-jitter * scale, jitter * scale, (3, 2))))
    image = _sample(image, affine, repeat_edge=False)
    if shift:
        field = _smooth_field(height, width, smoothing * scale, draws) * np.float32(shift * scale)
        field += np.stack(np.meshgrid(np.arange(width), np.arange(height)), axis=-1, dtype=np.float32)
        image = _sample(image, torch.from_numpy(field), repeat_edge=True)
    return truncate(image.numpy()).transpose(0, 2, 3, 1)


def _affine_places(height: int, width: int, jitter: np.ndarray) -> np.ndarray:
    """Return where each pixel comes from, float32 (n, H, W, 2), when three points move by ``jitter``."""
    centre, third = np.array([height, width]) // 2, min(height, width) // 3
    points = centre + third * np.array([[1, 1], [1, -1], [-1, -1]])
    moved = np.concatenate([points + jitter.astype(np.float64), np.ones((len(jitter), 3, 1))], axis=2)
    back = np.linalg.solve(moved, np.broadcast_to(points, (len(jitter), 3, 2)))[:, :, None, None, :]
    x, y = np.arange(width)[None, :, None], np.arange(height)[:, None, None]
    return (back[:, 0] * x + back[:, 1] * y + back[:, 2]).astype(np.float32)


def _smooth_field(height: int, width: int, std: float, draws: Draws) -> np.ndarray:
    """Return uniform noise on [-1, 1) blurred to 3 standard deviations, float32 (n, H, W, 2)."""
    noise = draws.uniform(-1, 1, (2, height, width))
    field = _smoothing_matrix(height, std) @ noise @ _smoothing_matrix(width, std).T
    return field.transpose(0, 2, 3, 1)


@functools.lru_cache(maxsize=8)
def _smoothing_matrix(side: int, std: float) -> np.ndarray:
    from scipy.ndimage import gaussian_filter1d

    return gaussian_filter1d(np.eye(side), std, axis=0, mode="reflect", truncate=3).astype(np.float32)


def _sample(image: torch.Tensor, places: torch.Tensor, *, repeat_edge: bool) -> torch.Tensor:
    """Read (n, C, H, W) at pixel coordinates (n, H, W, 2), bilinearly, mirrored outside."""
    height, width = image.shape[2:]
    if repeat_edge:  # mirrored about the outer border of the edge pixel: d c b a | a b c d
        places = (2 * places + 1) / places.new_tensor([width, height]) - 1
    else:  # mirrored about its centre: d c b | a b c d
        places = 2 * places / places.new_tensor([width - 1, height - 1]) - 1
    return grid_sample(image, places, mode="bilinear", padding_mode="reflection", align_corners=not repeat_edge)


@corruption("Pixelate", "digital", cifar=(0.95, 0.9, 0.85, 0.75, 0.65), imagenet=(0.6, 0.5, 0.4, 0.3, 0.25))
def pixelate(x: np.ndarray, factor: float, draws: Draws) -> np.ndarray:
    """Average over boxes down to ``factor`` of each side, enlarge them again (Pillow's BOX filter)."""
    for axis in (2, 1):  # each pass rounds to bytes, so the order counts
        x = _box_mean(x, axis, int(x.shape[axis] * factor))
    return x


def _box_mean(x: np.ndarray, axis: int, boxes: int) -> np.ndarray:
    side, length = x.shape[axis], math.prod(x.shape[axis + 1 :])
    planes = x.reshape(-1, side, length)
    edge = (np.arange(boxes + 1) * (side / boxes) + 0.5).astype(int)
    first, count = edge[:-1], np.diff(edge)[:, None].repeat(length, axis=1)
    total = planes.take(first, axis=1).astype(np.uint16)
    for tap in range(1, count.max()):
        total += planes.take(np.minimum(first + tap, side - 1), axis=1) * (tap < count)
    mean = (total * (1 / count).astype(np.float32) + np.float32(0.5 + LEVEL_SLACK)).astype(np.uint8)
    return mean.take(((np.arange(side) + 0.5) * (boxes / side)).astype(int), axis=1).reshape(x.shape)


@corruption("JPEG", "digital", cifar=(80, 65, 58, 50, 40), imagenet=(25, 18, 15, 10, 7))
def jpeg_compression(x: np.ndarray, quality: int, draws: Draws) -> np.ndarray:
    """Encode and decode as JPEG (baseline, 4:2:0)."""
    options = [cv2.IMWRITE_JPEG_QUALITY, quality]
    flag = cv2.IMREAD_GRAYSCALE if x.shape[3] == 1 else cv2.IMREAD_COLOR
    out = _swap_red_and_blue(x)
    for image in out:
        image[:] = cv2.imdecode(cv2.imencode(".jpg", image, options)[1], flag).reshape(image.shape)
    return _swap_red_and_blue(out)


def _swap_red_and_blue(x: np.ndarray) -> np.ndarray:
    """Return a copy in OpenCV's order of colours."""
    if x.shape[3] == 1 or not len(x):
        return x.copy()
    return cv2.cvtColor(x.reshape(-1, x.shape[2], 3), cv2.COLOR_RGB2BGR).reshape(x.shape)
