"""The 15 common corruptions of Hendrycks & Dietterich (2019) and their 4 extra ones, batched, seeded and
exact.

Images are uint8 arrays of shape (N, H, W, C) with C = 1 (gray) or 3 (RGB); so are the results. `corrupt`
makes one set, `corrupt_stream` does it for batches that never lie in memory together, `load_official` and
`stream_official` read the published CIFAR-10-C, CIFAR-100-C and ImageNet-C files. Where those exist they
should be used: the authors ask for it, since library and JPEG versions change pixels. `SOURCES` names the
two kinds.

Which constants. ``"cifar"`` is the table of CIFAR-10-C (32 pixels), ``"imagenet"`` that of ImageNet-C (224
pixels). Lengths (blur widths, shuffle distances) are pixels and are used as they are at any size; only the
elastic transform, whose published constants are fractions of the image side, scales with the shorter side.

Rounding. The published scripts truncate to bytes; so does this file, after adding a ten-thousandth of a grey
level, so that a value that is an integer in exact arithmetic does not lose a level to rounding noise.

Where this file knowingly differs from the published sets: the frost photographs are replaced by synthetic
textures with their means and standard deviations; motion is ImageMagick's formula, computed without
ImageMagick; random numbers are other numbers of the same distribution.
"""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lthlib.core.errors import Registry, UserError, choose

if TYPE_CHECKING:
    import torch
    from scipy import sparse

SEVERITIES = (1, 2, 3, 4, 5)
GROUPS = ("noise", "blur", "weather", "digital", "extra")
CONSTANTS = ("cifar", "imagenet")
SOURCES = ("official", "generated")

CHUNK_BYTES = 1 << 17  # per step: larger intermediate arrays cost page faults, four times the time of the noises
CIFAR_UP_TO = 64  # longest "small" side: these take the CIFAR-10-C constants by default
MIN_SIDE = 8
LEVEL_SLACK = 1e-4  # grey levels: above float32 rounding, below what a published constant can shift
MUD, WATER = (63, 42, 20), (175, 238, 238)
LUMA = (0.299, 0.587, 0.114)
MOTION_PIECE = 11  # pixels of a line per filter: OpenCV turns to the slower Fourier transform above 129 elements


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
        """Return uniform uint32 of shape (n, *shape)."""
        size = math.prod(shape)
        stretch = (size + 1) // 2  # the generator makes 64 bits at a time
        generator = np.random.PCG64DXSM(np.random.SeedSequence((*self.key, self.calls)))
        self.calls += 1
        raw = generator.advance(self.start * stretch).random_raw(self.n * stretch)
        return raw.view(np.uint32).reshape(self.n, 2 * stretch)[:, :size].reshape(self.n, *shape)

    def uniform(self, low: float, high: float, shape: tuple[int, ...] = ()) -> np.ndarray:
        """Return float32 of shape (n, *shape), uniform on [low, high) in 2^24 steps."""
        unit = (self.words(shape) >> 8).astype(np.float32)
        unit *= np.float32((high - low) * 2.0**-24)
        unit += np.float32(low)
        return unit

    def normal(self, mean: float, std: float, shape: tuple[int, ...]) -> np.ndarray:
        """Return normal float32 of shape (n, *shape), by Box and Muller's transform (tails to 5.8 std)."""
        unit = 1.0 - self.uniform(0, 1, shape)
        radius = np.sqrt(np.log(unit, out=unit) * np.float32(-2.0))
        radius *= np.cos(self.uniform(0, 2 * math.pi, shape))
        return radius * np.float32(std) + np.float32(mean)

    def integers(self, high: int, shape: tuple[int, ...] = ()) -> np.ndarray:
        """Return int64 of shape (n, *shape), uniform on 0 ... high - 1 to within ``high`` 2^-32."""
        return (self.words(shape).astype(np.uint64) * np.uint64(high) >> np.uint64(32)).astype(np.int64)


# --- Making corrupted sets ----------------------------------------------------------------------------------


def default_constants(height: int, width: int) -> str:
    """Return ``"cifar"`` where the longer side is at most `CIFAR_UP_TO` pixels, else ``"imagenet"``."""
    return "cifar" if max(height, width) <= CIFAR_UP_TO else "imagenet"


def corrupt(
    images: np.ndarray, name: str, severity: int, *, constants: str | None = None, seed: int = 0, start: int = 0
) -> np.ndarray:
    """Corrupt every image of a set.

    Besides the result the memory needed does not grow with N: images are taken in steps of about
    `CHUNK_BYTES`.

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

    Raises:
        UserError: For an unknown name, severity or table, a negative seed, or images of another kind.

    References:
        Hendrycks & Dietterich, Benchmarking Neural Network Robustness to Common Corruptions and
        Perturbations, 2019.
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


def corrupt_stream(
    batches: Iterable[np.ndarray], name: str, severity: int, *, constants: str | None = None, seed: int = 0
) -> Iterator[np.ndarray]:
    """Corrupt batch after batch, for sets that do not fit in memory.

    The batches may be of any sizes: together the results are what `corrupt` makes of the batches joined.

    Args:
        batches: uint8 arrays of shape (n, H, W, C), read one at a time.
        name: As for `corrupt`.
        severity: As for `corrupt`.
        constants: As for `corrupt`.
        seed: As for `corrupt`.

    Yields:
        uint8 array of the shape of each batch.

    Raises:
        UserError: As `corrupt`.
    """
    start = 0
    for batch in batches:
        yield corrupt(batch, name, severity, constants=constants, seed=seed, start=start)
        start += len(batch)


def _check_images(images: np.ndarray) -> None:
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8:
        kind = getattr(images, "dtype", type(images).__name__)
        raise UserError(f"images must be a NumPy array of uint8 (0 to 255), not {kind}.")
    if images.ndim != 4 or images.shape[3] not in (1, 3) or min(images.shape[1:3]) < MIN_SIDE:
        raise UserError(
            f"images must have the shape (N, H, W, C) with C = 1 or 3 and H and W of at least {MIN_SIDE}, "
            f"not {images.shape}."
        )


# --- Noise: every byte goes through a channel of its own ----------------------------------------------------
#
# These four act on each byte alone, so each is a 256 x 256 matrix: the probability of every output byte
# given the input byte, known in closed form. One 32-bit word per byte then draws from it by the alias method.


@corruption("Gaussian noise", "noise", cifar=(0.04, 0.06, 0.08, 0.09, 0.10), imagenet=(0.08, 0.12, 0.18, 0.26, 0.38))
def gaussian_noise(x: np.ndarray, std: float, draws: Draws) -> np.ndarray:
    """Add normal noise of standard deviation ``std`` (1 = white)."""
    return _through_channel(x, _alias_table(gaussian_channel, std), draws)


@corruption("Shot noise", "noise", cifar=(500, 250, 100, 75, 50), imagenet=(60, 25, 12, 5, 3))
def shot_noise(x: np.ndarray, photons: float, draws: Draws) -> np.ndarray:
    """Count photons: Poisson with ``photons`` per pixel at white."""
    return _through_channel(x, _alias_table(shot_channel, photons), draws)


@corruption("Impulse noise", "noise", cifar=(0.01, 0.02, 0.03, 0.05, 0.07), imagenet=(0.03, 0.06, 0.09, 0.17, 0.27))
def impulse_noise(x: np.ndarray, amount: float, draws: Draws) -> np.ndarray:
    """Replace the fraction ``amount`` of the bytes, half by 0, half by 255 (each colour on its own)."""
    return _through_channel(x, _alias_table(impulse_channel, amount), draws)


def gaussian_channel(std: float) -> np.ndarray:
    """Return P[v, o], the probability that v plus normal noise, clipped and truncated to a byte, is o."""
    return _normal_channel(np.full(256, 255.0 * std))


def speckle_channel(std: float) -> np.ndarray:
    """Return P[v, o] for noise whose standard deviation is ``std`` times the value itself."""
    return _normal_channel(std * np.arange(256.0))


def _normal_channel(std: np.ndarray) -> np.ndarray:
    from scipy.special import ndtr

    value = np.arange(256)
    with np.errstate(divide="ignore", invalid="ignore"):
        below = ndtr((value[None, 1:] - value[:, None]) / std[:, None])
    below[std == 0] = value[None, 1:] > value[std == 0, None]
    return np.diff(below, axis=1, prepend=0.0, append=1.0)


def shot_channel(photons: float) -> np.ndarray:
    """Return P[v, o] for o = min(k / photons, 1) in bytes, k Poisson with mean photons v / 255."""
    from scipy.stats import poisson

    counts = np.arange(math.ceil(photons) + 1)
    mass = poisson.pmf(counts, np.arange(256)[:, None] / 255 * photons)
    mass[:, -1] = 1.0 - mass[:, :-1].sum(axis=1)
    matrix = np.zeros((256, 256))
    level = (np.minimum(counts / photons, 1) * 255).astype(int)
    np.add.at(matrix, (slice(None), level), mass)
    return np.clip(matrix, 0.0, 1.0)


def impulse_channel(amount: float) -> np.ndarray:
    """Return P[v, o] for salt and pepper, each with the probability amount / 2."""
    matrix = (1.0 - amount) * np.eye(256)
    matrix[:, [0, 255]] += amount / 2
    return matrix


@functools.lru_cache(maxsize=64)
def _alias_table(channel: Callable[[float], np.ndarray], constant: float) -> np.ndarray:
    """Return Walker's alias table of ``channel(constant)``: uint32 (65536,), entry 256 v + column.

    The upper 24 bits hold the probability of keeping the column, the lower 8 bits what to XOR to it
    otherwise.
    """
    mass = channel(constant) * 256
    column = np.arange(256)
    keep, alias = np.ones((256, 256)), np.tile(column, (256, 1))
    for _ in range(256):  # give the poorest column what it lacks of 1, from the richest
        poor, rich = mass.argmin(axis=1), mass.argmax(axis=1)
        rows = np.flatnonzero(mass[column, poor] < 1 - 1e-9)
        poor, rich = poor[rows], rich[rows]
        keep[rows, poor], alias[rows, poor] = mass[rows, poor], rich
        mass[rows, rich] -= 1 - mass[rows, poor]
        mass[rows, poor] = 1
    threshold = np.minimum(np.rint(keep * 2.0**24), 2.0**24 - 1).astype(np.uint32)
    flip = np.where(keep < 1.0, alias ^ column, 0).astype(np.uint32)
    return (threshold << 8 | flip).ravel()


def _through_channel(x: np.ndarray, table: np.ndarray, draws: Draws) -> np.ndarray:
    word = draws.words(x.shape[1:])
    column = word.astype(np.uint8)
    entry = table.take(_pair(x, column))
    column ^= entry.astype(np.uint8) * (word >= entry)
    return column


def _pair(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return 256 a + b, the index of a pair of bytes in a flat table."""
    return a.astype(np.uint16) << 8 | b


# --- Blur ---------------------------------------------------------------------------------------------------


@corruption(
    "Defocus blur",
    "blur",
    cifar=((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
    imagenet=((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),
)
def defocus_blur(x: np.ndarray, c: tuple[float, float], draws: Draws) -> np.ndarray:
    """Convolve with a disk (radius, smoothing of its edge), mirrored at the borders."""
    import cv2

    kernel, out = _disk(*c), x.astype(np.float32)
    for image in out:
        cv2.filter2D(image, -1, kernel, dst=image, borderType=cv2.BORDER_REFLECT_101)
    return _truncate(out)


def _disk(radius: float, smoothing: float) -> np.ndarray:
    import cv2

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
    x = _truncate(_gaussian(x, std))
    for _ in range(rounds):
        x = _displace(x, reach, draws)
    return _truncate(_gaussian(x, std))


def _displace(x: np.ndarray, reach: int, draws: Draws) -> np.ndarray:
    """Give every inner pixel the value of a neighbour up to ``reach`` away, last pixel first."""
    n, height, width, channels = x.shape
    inner = (slice(None), slice(reach + 1, height - reach + 1), slice(reach + 1, width - reach + 1))
    site = np.arange(n * height * width).reshape(n, height, width)
    source = site.copy()
    for stride in (1, width):
        source[inner] += (draws.integers(2 * reach, source[inner].shape[1:]) - reach) * stride
    source, site = source.ravel(), site.ravel()
    # A pixel later in the raster was rewritten before this one reads it: follow it to what it took. Pixels
    # outside the inner region are their own source. Doubling the hops ends a chain of any length in a few
    # steps.
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
    return _motion(x, c, draws.uniform(-45, 45))


def _motion(x: np.ndarray, c: tuple[int, float], degrees: np.ndarray) -> np.ndarray:
    """Blur as ImageMagick does: half a Gaussian on 2 radius + 1 pixels of a line, edges repeated, rounded."""
    radius, std = c
    n = len(x)
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
        rows, columns = (p.max(axis=1) + 1 for p in place[1:])
        boxes = np.stack([top[:, 0] + above, left[:, 0] + before, rows, columns], axis=1)
        _add_filtered(levels, padded, kernels, boxes)
    return levels.astype(np.uint8)


def _add_filtered(levels: np.ndarray, padded: np.ndarray, kernels: np.ndarray, boxes: np.ndarray) -> None:
    """Add to each image in ``levels`` its padded version correlated with its kernel.

    A box is where in the padded image to begin (top, left) and how much of the kernel is used (rows, columns).
    """
    import cv2

    height, width = levels.shape[1:3]
    for level, image, kernel, (y, x, rows, columns) in zip(levels, padded, kernels, boxes.tolist(), strict=True):
        view = image[y : y + height + rows - 1, x : x + width + columns - 1]
        blurred = cv2.filter2D(view, -1, kernel[:rows, :columns], anchor=(0, 0))
        level += blurred.reshape(view.shape)[:height, :width]


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
    blurred = _truncate(_zoom_operator(height, width, *c) @ pixels)
    return blurred.reshape(height, width, n, channels).transpose(2, 0, 1, 3)


@functools.lru_cache(maxsize=2)  # tens of megabytes at 224 pixels
def _zoom_operator(height: int, width: int, stop: float, step: float) -> sparse.csr_array:
    """Return the whole blur, which is linear, as one sparse float32 matrix on the H W pixels of a plane."""
    from scipy import sparse

    factors = np.arange(1, stop, step)
    total = sparse.eye_array(height * width, format="csr")
    for factor in factors:
        rows, columns = (sparse.csr_array(_zoom_matrix(side, factor)) for side in (height, width))
        total = total + sparse.kron(rows, columns, format="csr")
    return (total / (len(factors) + 1)).astype(np.float32)


def _zoom_matrix(side: int, factor: float) -> np.ndarray:
    """Return the (side, side) matrix that enlarges the centre of a line linearly and crops it again."""
    crop = math.ceil(side / factor)
    size = round(crop * factor)
    at = (np.arange(side) + (size - side) // 2) * (crop - 1) / max(size - 1, 1)
    low = np.minimum(at.astype(int), crop - 2)
    matrix, rows, first = np.zeros((side, side)), np.arange(side), (side - crop) // 2
    matrix[rows, first + low] = 1 - (at - low)
    matrix[rows, first + low + 1] = at - low
    return matrix


def _gaussian(x: np.ndarray, std: float) -> np.ndarray:
    """Return float32 of x blurred to 4 standard deviations, edges repeated (scikit-image's default)."""
    import cv2

    radius = int(4 * std + 0.5)
    out = x.astype(np.float32)
    if radius:
        kernel = np.exp(-0.5 * (np.arange(-radius, radius + 1) / std) ** 2)
        kernel /= kernel.sum()
        for image in out:
            cv2.sepFilter2D(image, -1, kernel, kernel, dst=image, borderType=cv2.BORDER_REPLICATE)
    return out


def _truncate(levels: np.ndarray) -> np.ndarray:
    """Return float levels, which are overwritten, as bytes: clipped to 0 ... 255 and cut."""
    levels += np.float32(LEVEL_SLACK)
    return np.clip(levels, 0, 255, out=levels).astype(np.uint8)


# --- Weather ------------------------------------------------------------------------------------------------


@corruption(
    "Snow",
    "weather",
    cifar=(
        (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
        (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
        (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
        (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
        (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
    ),
    imagenet=(
        (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
        (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
        (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
        (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
        (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
    ),
)
def snow(x: np.ndarray, c: tuple, draws: Draws) -> np.ndarray:
    """Whiten, and add flakes: (mean, std, zoom, threshold of the noise; motion radius and std; old share)."""
    mean, std, zoom, threshold, radius, motion_std, share = c
    height, width = x.shape[1:3]
    flakes = draws.normal(mean, std, (height, width))
    if zoom != 1:
        rows, columns = (_zoom_matrix(side, zoom).astype(np.float32) for side in (height, width))
        flakes = rows @ flakes @ columns.T
    flakes = _truncate(np.where(flakes < threshold, np.float32(0), flakes * 255))
    flakes = _motion(flakes[..., None], (radius, motion_std), draws.uniform(-135, -45)).astype(np.float32)
    flakes += flakes[:, ::-1, ::-1].copy()
    old = x.astype(np.float32)
    white = np.maximum(old, 1.5 * _gray(old) + 127.5)
    white *= np.float32(1 - share)
    old *= np.float32(share)
    old += white
    old += flakes
    return _truncate(old)


def _gray(x: np.ndarray) -> np.ndarray:
    """Return the luminance, float32 (..., 1)."""
    return x if x.shape[-1] == 1 else x @ np.array(LUMA, np.float32)[:, None]


@corruption(
    "Frost",
    "weather",
    cifar=((1, 0.2, 0.2), (1, 0.3, 0.2), (0.9, 0.4, 0.2), (0.85, 0.4, 0.2), (0.75, 0.45, 0.2)),
    imagenet=((1, 0.4, 1), (0.8, 0.6, 1), (0.7, 0.7, 1), (0.65, 0.7, 1), (0.6, 0.75, 1)),
)
def frost(x: np.ndarray, c: tuple[float, float, float], draws: Draws) -> np.ndarray:
    """Add a random crop of a frost texture: (share of the image, share of the frost, size of the texture).

    The textures are synthetic (`frost_textures`), not the published photographs, so that frost differs from
    the published sets even where every constant agrees.
    """
    share, frost_share, scale = c
    _, height, width, channels = x.shape
    textures = _frost_tiles(channels, max(height, width), scale)
    side = textures.shape[1] - max(height, width)
    crops = np.empty_like(x)
    places = np.stack([draws.integers(len(textures)), draws.integers(side), draws.integers(side)], axis=1)
    for crop, (which, top, left) in zip(crops, places.tolist(), strict=True):
        crop[:] = textures[which, top : top + height, left : left + width]
    return _frost_table(share, frost_share).take(_pair(x, crops))


@functools.lru_cache(maxsize=16)
def _frost_table(share: float, frost_share: float) -> np.ndarray:
    level = np.arange(256)
    return np.clip(share * level[:, None] + frost_share * level[None, :], 0, 255).astype(np.uint8).ravel()


# Mean red, green, blue and standard deviation of the luminance of the five photographs that the published
# scripts draw from (their sixth file is never drawn, and their second and third are one picture).
FROST_LOOKS = (
    ((78, 149, 166), 18),
    ((201, 205, 214), 22),
    ((201, 205, 214), 22),
    ((138, 153, 165), 29),
    ((112, 123, 135), 43),
)


@functools.lru_cache(maxsize=1)
def frost_textures(side: int = 512) -> np.ndarray:
    """Return five frost-like textures, uint8 (5, side, side, 3), which continue across their borders.

    Domains with a random direction each, filled with needles along it, over clouds with a 1/f spectrum; mean
    colour and contrast are those of the photographs (`FROST_LOOKS`). Deterministic.
    """
    textures = np.empty((len(FROST_LOOKS), side, side, 3), np.uint8)
    for texture, seed, (colour, std) in zip(textures, range(len(FROST_LOOKS)), FROST_LOOKS, strict=True):
        light = _frost_light(side, np.random.default_rng(seed))
        texture[:] = np.clip(light[..., None] * std + np.array(colour), 0, 255)
    return textures


def _frost_light(side: int, rng: np.random.Generator, directions: int = 7) -> np.ndarray:
    """Return one texture's luminance, (side, side), with mean 0 and standard deviation 1."""
    from scipy.spatial import cKDTree

    fy, fx = np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None, :]
    radius = np.hypot(fy, fx)
    radius[0, 0] = np.inf
    noise = np.fft.rfft2(rng.standard_normal((side, side)))
    centres = rng.uniform(0, side, (side * side // 800, 2))
    pixels = np.stack(np.mgrid[:side, :side], axis=-1).reshape(-1, 2)
    domain = cKDTree(centres, boxsize=side).query(pixels)[1].reshape(side, side) % directions
    needles = np.empty((side, side))
    for k in range(directions):
        across = np.sin(np.arctan2(fy, fx) - np.pi * k / directions)
        needle = np.fft.irfft2(noise * np.exp(-((across / 0.15) ** 2) - (radius / 0.3) ** 2) / radius**0.5)
        needles[domain == k] = (needle / needle.std())[domain == k]
    clouds = np.fft.irfft2(noise / radius)
    light = needles / needles.std() + clouds / clouds.std()
    return (light - light.mean()) / light.std()


@functools.lru_cache(maxsize=4)
def _frost_tiles(channels: int, extra: int, scale: float) -> np.ndarray:
    """Return the textures, scaled and continued by ``extra`` pixels so that any crop is a plain slice."""
    import cv2

    textures = frost_textures()
    if scale != 1:
        textures = np.stack([cv2.resize(t, (0, 0), fx=scale, fy=scale) for t in textures])
    if channels == 1:
        textures = _truncate(_gray(textures.astype(np.float32)))
    return np.pad(textures, ((0, 0), (0, extra), (0, extra), (0, 0)), mode="wrap")


@corruption(
    "Fog",
    "weather",
    cifar=((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),
    imagenet=((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)),
)
def fog(x: np.ndarray, c: tuple[float, float], draws: Draws) -> np.ndarray:
    """Add a plasma fractal, rescale to the image's brightest value: (thickness, decay of the roughness)."""
    thickness, decay = c
    n, height, width, _ = x.shape
    size = 1 << (max(height, width) - 1).bit_length()
    haze = plasma_fractal(size, decay, draws)[:, :height, :width, None]
    brightest = x.reshape(n, -1).max(axis=1).astype(np.float32).reshape(n, 1, 1, 1)
    hazy = x + haze * np.float32(255 * thickness)
    hazy *= brightest / (brightest + np.float32(255 * thickness))
    return _truncate(hazy)


def plasma_fractal(size: int, decay: float, draws: Draws) -> np.ndarray:
    """Return diamond-square height maps, float32 (n, size, size) in [0, 1], periodic; ``size`` a power of
    two.

    Each halving of the grid divides the amplitude of the uniform noise by ``decay`` squared: the published
    code multiplies the noise by its shrinking scale twice.
    """
    noise = draws.uniform(-1, 1, (size * size - 1,)).T.copy()  # images last: every step is contiguous over them
    height = np.zeros((size, size, draws.n), np.float32)
    used, amplitude, step = 0, 1.0, size
    while step >= 2:
        half, points = step // 2, (size // step) ** 2
        corner, shape = height[::step, ::step], (size // step, size // step, draws.n)
        bumps = [noise[used + k * points : used + (k + 1) * points].reshape(shape) * amplitude for k in range(3)]
        across, down = corner + np.roll(corner, -1, axis=1), corner + np.roll(corner, -1, axis=0)
        centre = (across + np.roll(across, -1, axis=0)) / 4 + bumps[0]
        height[half::step, half::step] = centre
        height[::step, half::step] = (across + centre + np.roll(centre, 1, axis=0)) / 4 + bumps[1]
        height[half::step, ::step] = (down + centre + np.roll(centre, 1, axis=1)) / 4 + bumps[2]
        used, amplitude, step = used + 3 * points, amplitude / decay**2, half
    height -= height.min(axis=(0, 1))
    height /= height.max(axis=(0, 1))
    return height.transpose(2, 0, 1)


@corruption("Brightness", "weather", cifar=(0.05, 0.1, 0.15, 0.2, 0.3), imagenet=(0.1, 0.2, 0.3, 0.4, 0.5))
def brightness(x: np.ndarray, shift: float, draws: Draws) -> np.ndarray:
    """Raise the value of HSV by ``shift`` (1 = white), hue and saturation kept."""
    table, high, out = _brightness_table(shift), _value(x), np.empty_like(x)
    for k in range(x.shape[3]):
        out[..., k] = table.take(_pair(high, x[..., k]))
    return out


@functools.lru_cache(maxsize=16)
def _brightness_table(shift: float) -> np.ndarray:
    """Return the new byte for (value, channel): at fixed hue and saturation a channel scales with value."""
    value, channel = np.arange(256)[:, None] / 255, np.arange(256)[None, :] / 255
    with np.errstate(divide="ignore", invalid="ignore"):
        saturation = np.where(value > 0, (value - channel) / value, 0)
    levels = np.clip(value + shift, 0, 1) * (1 - saturation) * 255
    return np.clip(levels + LEVEL_SLACK, 0, 255).astype(np.uint8).ravel()


def _value(x: np.ndarray) -> np.ndarray:
    """Return the largest channel."""
    return functools.reduce(np.maximum, (x[..., k] for k in range(x.shape[-1])))


# --- Digital ------------------------------------------------------------------------------------------------


@corruption("Contrast", "digital", cifar=(0.75, 0.5, 0.4, 0.3, 0.15), imagenet=(0.4, 0.3, 0.2, 0.1, 0.05))
def contrast(x: np.ndarray, factor: float, draws: Draws) -> np.ndarray:
    """Shrink the distance to each channel's mean by ``factor``."""
    n, height, width, channels = x.shape
    columns = x.reshape(n, height, -1).sum(axis=1, dtype=np.uint32)
    mean = columns.reshape(n, width, channels).sum(axis=1) / (height * width)
    offset = np.tile((mean * (1 - factor)).astype(np.float32), width)[:, None]  # as long as a row: no short loops
    return _truncate(x.reshape(n, height, -1) * np.float32(factor) + offset).reshape(x.shape)


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
    import torch

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
    return _truncate(image.numpy()).transpose(0, 2, 3, 1)


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
    from torch.nn.functional import grid_sample

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
    import cv2

    options = [cv2.IMWRITE_JPEG_QUALITY, quality]
    flag = cv2.IMREAD_GRAYSCALE if x.shape[3] == 1 else cv2.IMREAD_COLOR
    out = _swap_red_and_blue(x)
    for image in out:
        image[:] = cv2.imdecode(cv2.imencode(".jpg", image, options)[1], flag).reshape(image.shape)
    return _swap_red_and_blue(out)


def _swap_red_and_blue(x: np.ndarray) -> np.ndarray:
    """Return a copy in OpenCV's order of colours."""
    import cv2

    if x.shape[3] == 1 or not len(x):
        return x.copy()
    return cv2.cvtColor(x.reshape(-1, x.shape[2], 3), cv2.COLOR_RGB2BGR).reshape(x.shape)


# --- The four extra ones ------------------------------------------------------------------------------------


@corruption("Speckle noise", "extra", cifar=(0.06, 0.1, 0.12, 0.16, 0.2), imagenet=(0.15, 0.2, 0.35, 0.45, 0.6))
def speckle_noise(x: np.ndarray, std: float, draws: Draws) -> np.ndarray:
    """Multiply by 1 plus normal noise of standard deviation ``std``."""
    return _through_channel(x, _alias_table(speckle_channel, std), draws)


@corruption("Gaussian blur", "extra", cifar=(0.4, 0.6, 0.7, 0.8, 1), imagenet=(1, 2, 3, 4, 6))
def gaussian_blur(x: np.ndarray, std: float, draws: Draws) -> np.ndarray:
    """Convolve with a Gaussian of ``std`` pixels."""
    return _truncate(_gaussian(x, std))


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
    liquid = _gaussian(draws.normal(mean, std, (*x.shape[1:3], 1)), blur)
    if mud:
        wet = _gaussian(liquid > threshold, strength)
        wet[wet < 0.8] = 0
        return _truncate(x * (1 - wet) + _tint(MUD, x.shape[3]) * wet)
    liquid = np.where(liquid < threshold, 0, np.clip(liquid * 255, 0, 255)).astype(np.uint8)
    wet = np.stack([_water(layer) for layer in liquid[..., 0]])[..., None] * np.float32(strength)
    return _truncate(x + _tint(WATER, x.shape[3]) * wet)


def _tint(colour: tuple[int, int, int], channels: int) -> np.ndarray:
    colour = np.array(colour, np.float32)
    return colour if channels == 3 else _gray(colour)


def _water(liquid: np.ndarray) -> np.ndarray:
    """Return how strongly each pixel shows the drops, float32 (H, W), at most 1: embossed edges."""
    import cv2

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
    """Change the saturation of HSV to ``factor * s + shift``, clipped; a gray (one-channel) image stays as
    it is.

    Severities 1 and 2 take colour away, 3 to 5 add some: they are not in the order of distance. Gray pixels
    of an RGB image have the hue red by convention, and turn reddish at severities 4 and 5, as in the
    published sets.
    """
    if x.shape[3] == 1:
        return x
    high = _value(x)
    low = np.minimum(np.minimum(x[..., 0], x[..., 1]), x[..., 2])
    scale, gray = _saturate_table(*c).take(_pair(high, low)), high == low
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


# --- The published files ------------------------------------------------------------------------------------


def has_official(folder: str | Path, name: str) -> bool:
    """Tell whether ``folder`` holds the published set, as ``name.npy`` or as a folder ``name``."""
    choose(name, CORRUPTIONS, "corruption")
    folder = Path(folder)
    return (folder / f"{name}.npy").is_file() or (folder / name).is_dir()


def load_official(
    folder: str | Path, name: str, severity: int, *, rows: int = 50_000, num_classes: int = 10
) -> tuple[np.ndarray, np.ndarray]:
    """Read one severity from CIFAR-10-C or CIFAR-100-C.

    Args:
        folder: Holds ``name.npy``, uint8 (rows, H, W, C) with severity 1 first, and ``labels.npy``, (rows,),
            which repeats the labels of the test set for each severity.
        name: A name in `CORRUPTIONS`.
        severity: 1 to 5.
        rows: Rows of each file: 5 times the number of test images.
        num_classes: 100 for CIFAR-100-C.

    Returns:
        Images, uint8 (rows / 5, H, W, C), and labels, int64 (rows / 5,). Only this severity is read into
        memory.

    Raises:
        UserError: For a missing or unreadable file, another number of rows, images of another kind, labels
            out of range or not repeated.
    """
    choose(name, CORRUPTIONS, "corruption")
    choose(severity, SEVERITIES, "severity")
    labels_path, images_path = Path(folder) / "labels.npy", Path(folder) / f"{name}.npy"
    labels, images = _map_array(labels_path, rows), _map_array(images_path, rows)
    if rows % len(SEVERITIES) or labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise UserError(f"{labels_path} must hold 5 x n whole numbers, not {labels.dtype} {labels.shape}.")
    blocks = np.array(labels, np.int64).reshape(len(SEVERITIES), -1)
    _check_labels(blocks, num_classes, labels_path)
    if (blocks != blocks[0]).any():
        raise UserError(f"{labels_path} must repeat the same labels for each of the 5 severities; it does not.")
    part = slice((severity - 1) * blocks.shape[1], severity * blocks.shape[1])
    images = np.array(images[part])
    try:
        _check_images(images)
    except UserError as error:
        raise UserError(f"{images_path}: {error} Fetch the published file again.") from None
    return images, blocks[0]


def _map_array(path: Path, rows: int) -> np.ndarray:
    if not path.is_file():
        raise UserError(f"{path} is missing. Put the published file there, or move the folder away to generate.")
    try:
        array = np.lib.format.open_memmap(path, mode="r")
    except (ValueError, EOFError, OSError) as error:
        raise UserError(f"{path} is not a readable .npy file ({error}). Fetch it again.") from error
    if array.ndim == 0 or len(array) != rows:
        found = len(array) if array.ndim else "no"
        raise UserError(
            f"{path} has {found} rows where {rows:,} are expected (5 severities of {rows / 5:,g} images). Put the "
            "whole published file there, or move the folder away to generate."
        )
    return array


def _check_labels(labels: np.ndarray, num_classes: int, path: Path) -> None:
    if labels.min() < 0 or labels.max() >= num_classes:
        raise UserError(
            f"{path} has labels from {labels.min()} to {labels.max()}; {num_classes} classes allow 0 to "
            f"{num_classes - 1}. Give num_classes as the set has it (100 for CIFAR-100-C)."
        )


def stream_official(
    folder: str | Path,
    name: str,
    severity: int,
    *,
    classes: Sequence[str] | None = None,
    num_classes: int = 1000,
    rows: int = 50_000,
    positions: np.ndarray | None = None,
    batch_size: int = 64,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Read one severity from ImageNet-C, batch by batch, in the order of class folder and file name.

    Args:
        folder: Holds ``name/severity/class/*.JPEG``; all images of one size (224 pixels as published).
        name: A name in `CORRUPTIONS`.
        severity: 1 to 5.
        classes: Class folders in the order of the labels; by default the sorted names, which must be
            ``num_classes``.
        num_classes: Number of classes when ``classes`` is not given.
        rows: Number of images of the severity.
        positions: Which of them to read, in this order; by default all.
        batch_size: Images held at a time.

    Returns:
        An iterator of images, uint8 (n, H, W, 3), and labels, int64 (n,). The folder is checked at once,
        before the first batch.

    Raises:
        UserError: For a missing folder or class, another number of images or classes, an image that cannot
            be read or has another size.
    """
    choose(name, CORRUPTIONS, "corruption")
    choose(severity, SEVERITIES, "severity")
    root = Path(folder) / name / str(severity)
    if not root.is_dir():
        raise UserError(f"{root} is missing. ImageNet-C lies there as class folders of JPEG files.")
    found = sorted(path.name for path in root.iterdir() if path.is_dir())
    wanted = found if classes is None else list(classes)
    expected = num_classes if classes is None else len(wanted)
    if set(found) != set(wanted) or len(wanted) != expected:
        odd = sorted(set(found) ^ set(wanted))[:3]
        raise UserError(
            f"{root} has {len(found)} class folders where {expected} are expected"
            + (f"; the two lists differ in {', '.join(odd)}." if odd else ". Give num_classes or classes.")
        )
    files = [(path, label) for label, wnid in enumerate(wanted) for path in sorted((root / wnid).glob("*.JPEG"))]
    if len(files) != rows:
        raise UserError(f"{root} has {len(files):,} JPEG files where {rows:,} are expected.")
    return _read_batches(files if positions is None else [files[i] for i in positions], batch_size)


def _read_batches(files: list[tuple[Path, int]], batch_size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    shape = None
    for first in range(0, len(files), batch_size):
        part = files[first : first + batch_size]
        images = []
        for path, _ in part:
            image = _read_image(path)
            shape = shape or image.shape
            if image.shape != shape:
                raise UserError(f"{path} has the shape {image.shape} where the images before have {shape}.")
            images.append(image)
        yield np.stack(images), np.array([label for _, label in part], np.int64)


def _read_image(path: Path) -> np.ndarray:
    from PIL import Image

    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except OSError as error:
        raise UserError(f"{path} cannot be read as an image ({error}). Fetch it again.") from error
