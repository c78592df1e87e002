"""What a corruption is, the random numbers it may draw, and how it is applied to a set of images."""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from lthlib.core.errors import Registry, UserError, choose

SEVERITIES = (1, 2, 3, 4, 5)
GROUPS = ("noise", "blur", "weather", "digital", "extra")
CONSTANTS = ("cifar", "imagenet")

CHUNK_BYTES = 1 << 17  # per step: larger intermediate arrays cost page faults, four times the time of the noises
CIFAR_UP_TO = 64  # longest "small" side: these take the CIFAR-10-C constants by default
MIN_SIDE = 8
LEVEL_SLACK = 1e-4  # grey levels: above float32 rounding, below what a published constant can shift
LUMA = (0.299, 0.587, 0.114)


@dataclass(frozen=True)
class Corruption:
    """One row of the registry.

    Attributes:
        name: Name, also the stem of the published files.
        title: Words for a figure.
        group: One of `GROUPS`.
        function: ``f(images, constant, draws) -> images``, all uint8 (N, H, W, C).
        cifar: The five constants of CIFAR-10-C, severities 1 to 5.
        imagenet: The five constants of ImageNet-C.
    """

    name: str
    title: str
    group: str
    function: Callable[[np.ndarray, object, Draws], np.ndarray]
    cifar: tuple
    imagenet: tuple

    def constant(self, severity: int, constants: str) -> object:
        """Return the constant of a severity from the table ``"cifar"`` or ``"imagenet"``."""
        choose(severity, SEVERITIES, "severity")
        choose(constants, CONSTANTS, "table of constants")
        return (self.cifar if constants == "cifar" else self.imagenet)[severity - 1]


CORRUPTIONS: Registry[Corruption] = Registry("corruption")
"""Every corruption by its name."""


def corruption(title: str, group: str, *, cifar: Sequence, imagenet: Sequence) -> Callable:
    """Register the decorated function under its own name: the one row that a new corruption needs."""
    choose(group, GROUPS, "group of corruptions")

    def register(function: Callable) -> Callable:
        row = Corruption(function.__name__, title, group, function, tuple(cifar), tuple(imagenet))
        if not len(row.cifar) == len(row.imagenet) == len(SEVERITIES):
            raise ValueError(f"{row.name} needs {len(SEVERITIES)} constants in each table")
        CORRUPTIONS[row.name] = row
        return function

    return register


def common() -> tuple[str, ...]:
    """Return the 15 names that count in the mean corruption error, in the published order."""
    return tuple(name for name, row in CORRUPTIONS.items() if row.group != "extra")


class Draws:
    """Random numbers for the images ``start ... start + n - 1`` of a set.

    Every call opens a new stream, in which image i owns a fixed stretch. So what an image gets depends on
    the key, on its index and on nothing else: not on its neighbours, the batch or the chunk.

    Args:
        key: Non-negative integers that name the set (seed, corruption, severity).
        start: Index of the first image.
        n: Number of images.
    """

    def __init__(self, key: Sequence[int], start: int, n: int):
        self.key, self.start, self.n, self.calls = tuple(key), start, n, 0

    def words(self, shape: tuple[int, ...]) -> np.ndarray:
        """Return uniform uint32 of shape ``(n, *shape)``."""
        size = math.prod(shape)
        stretch = (size + 1) // 2  # the generator makes 64 bits at a time
        generator = np.random.PCG64DXSM(np.random.SeedSequence((*self.key, self.calls)))
        self.calls += 1
        raw = generator.advance(self.start * stretch).random_raw(self.n * stretch)
        return raw.view(np.uint32).reshape(self.n, 2 * stretch)[:, :size].reshape(self.n, *shape)

    def uniform(self, low: float, high: float, shape: tuple[int, ...] = ()) -> np.ndarray:
        """Return float32 of shape ``(n, *shape)``, uniform on [low, high) in 2^24 steps."""
        unit = (self.words(shape) >> 8).astype(np.float32)
        unit *= np.float32((high - low) * 2.0**-24)
        unit += np.float32(low)
        return unit

    def normal(self, mean: float, std: float, shape: tuple[int, ...]) -> np.ndarray:
        """Return normal float32 of shape ``(n, *shape)``, by Box and Muller's transform (tails to 5.8 std)."""
        unit = 1.0 - self.uniform(0, 1, shape)
        radius = np.sqrt(np.log(unit, out=unit) * np.float32(-2.0))
        radius *= np.cos(self.uniform(0, 2 * math.pi, shape))
        return radius * np.float32(std) + np.float32(mean)

    def integers(self, high: int, shape: tuple[int, ...] = ()) -> np.ndarray:
        """Return int64 of shape ``(n, *shape)``, uniform on 0 ... high - 1 to within ``high`` 2^-32."""
        return (self.words(shape).astype(np.uint64) * np.uint64(high) >> np.uint64(32)).astype(np.int64)


def default_constants(height: int, width: int) -> str:
    """Return ``"cifar"`` where the longer side is at most `CIFAR_UP_TO` pixels, else ``"imagenet"``."""
    return "cifar" if max(height, width) <= CIFAR_UP_TO else "imagenet"


def corrupt(
    images: np.ndarray, name: str, severity: int, *, constants: str | None = None, seed: int = 0, start: int = 0
) -> np.ndarray:
    """Corrupt every image of a set (Hendrycks & Dietterich, 2019).

    Besides the result the memory needed does not grow with N: images are taken in steps of about `CHUNK_BYTES`.

    Args:
        images: uint8 of shape (N, H, W, 1) or (N, H, W, 3), RGB, sides of at least `MIN_SIDE`. Left as it is.
        name: A name in `CORRUPTIONS`.
        severity: 1 to 5; higher is worse.
        constants: ``"cifar"`` or ``"imagenet"``; by default `default_constants` of the image size.
        seed: Non-negative. The same seed gives the same bytes.
        start: Index of ``images[0]`` in its set. An image's result depends on its pixels, its index and the
            seed, never on the other images: ``corrupt(x)[5:9]`` equals ``corrupt(x[5:9], start=5)``.

    Returns:
        uint8 of the shape of ``images``.
    """
    _check_images(images)
    height, width = images.shape[1:3]
    row = CORRUPTIONS[name]
    constant = row.constant(severity, default_constants(height, width) if constants is None else constants)
    if seed < 0 or start < 0:
        raise UserError(f"seed and start must be 0 or more, not {seed} and {start}.")
    key = (seed, zlib.crc32(name.encode()), severity)
    step = max(1, CHUNK_BYTES // math.prod(images.shape[1:]))
    out = np.empty_like(images, order="C")
    for first in range(0, len(images), step):
        part = np.ascontiguousarray(images[first : first + step])
        out[first : first + step] = row.function(part, constant, Draws(key, start + first, len(part)))
    return out


def _check_images(images: np.ndarray) -> None:
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8:
        kind = getattr(images, "dtype", type(images).__name__)
        raise UserError(f"images must be a NumPy array of uint8 (0 to 255), not {kind}.")
    if images.ndim != 4 or images.shape[3] not in (1, 3) or min(images.shape[1:3]) < MIN_SIDE:
        raise UserError(
            f"images must have the shape (N, H, W, C) with C = 1 or 3 and H and W of at least {MIN_SIDE}, "
            f"not {images.shape}."
        )


def truncate(levels: np.ndarray) -> np.ndarray:
    """Return float levels, which are overwritten, as bytes: clipped to 0 ... 255 and cut."""
    levels += np.float32(LEVEL_SLACK)
    return np.clip(levels, 0, 255, out=levels).astype(np.uint8)


def gray(x: np.ndarray) -> np.ndarray:
    """Return the luminance, float32 (..., 1)."""
    return x if x.shape[-1] == 1 else x @ np.array(LUMA, np.float32)[:, None]


def largest(x: np.ndarray) -> np.ndarray:
    """Return the largest channel."""
    return functools.reduce(np.maximum, (x[..., k] for k in range(x.shape[-1])))


def pair(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return 256 a + b, the index of a pair of bytes in a flat table."""
    return a.astype(np.uint16) << 8 | b
