"""Snow, frost, fog and brightness."""

from __future__ import annotations

import functools

import cv2
import numpy as np

from lthlib.data.corruptions.blur import motion, zoom_matrix
from lthlib.data.corruptions.registry import LEVEL_SLACK, Draws, corruption, gray, largest, pair, truncate


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
        rows, columns = (zoom_matrix(side, zoom).astype(np.float32) for side in (height, width))
        flakes = rows @ flakes @ columns.T
    flakes = truncate(np.where(flakes < threshold, np.float32(0), flakes * 255))
    flakes = motion(flakes[..., None], (radius, motion_std), draws.uniform(-135, -45)).astype(np.float32)
    flakes += flakes[:, ::-1, ::-1].copy()
    old = x.astype(np.float32)
    white = np.maximum(old, 1.5 * gray(old) + 127.5)
    white *= np.float32(1 - share)
    old *= np.float32(share)
    old += white
    old += flakes
    return truncate(old)


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
    return _frost_table(share, frost_share).take(pair(x, crops))


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
    textures = frost_textures()
    if scale != 1:
        textures = np.stack([cv2.resize(t, (0, 0), fx=scale, fy=scale) for t in textures])
    if channels == 1:
        textures = truncate(gray(textures.astype(np.float32)))
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
    return truncate(hazy)


def plasma_fractal(size: int, decay: float, draws: Draws) -> np.ndarray:
    """Return diamond-square height maps, float32 (n, size, size) in [0, 1], periodic; ``size`` a power of two.

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
    table, high, out = _brightness_table(shift), largest(x), np.empty_like(x)
    for k in range(x.shape[3]):
        out[..., k] = table.take(pair(high, x[..., k]))
    return out


@functools.lru_cache(maxsize=16)
def _brightness_table(shift: float) -> np.ndarray:
    """Return the new byte for (value, channel): at fixed hue and saturation a channel scales with value."""
    value, channel = np.arange(256)[:, None] / 255, np.arange(256)[None, :] / 255
    with np.errstate(divide="ignore", invalid="ignore"):
        saturation = np.where(value > 0, (value - channel) / value, 0)
    levels = np.clip(value + shift, 0, 1) * (1 - saturation) * 255
    return np.clip(levels + LEVEL_SLACK, 0, 255).astype(np.uint8).ravel()
