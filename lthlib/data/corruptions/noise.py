"""The noises: every byte goes through a channel of its own.

Each acts on each byte alone, so it is a 256 x 256 matrix: the probability of every output byte given the input byte,
known in closed form. One 32-bit word per byte then draws from it by the alias method.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import numpy as np

from lthlib.data.corruptions.registry import Draws, corruption, pair


@corruption("Gaussian noise", "noise", cifar=(0.04, 0.06, 0.08, 0.09, 0.10), imagenet=(0.08, 0.12, 0.18, 0.26, 0.38))
def gaussian_noise(x: np.ndarray, std: float, draws: Draws) -> np.ndarray:
    """Add normal noise of standard deviation ``std`` (1 = white)."""
    return through_channel(x, draws, normal_channel, 255.0 * std, 0.0)


@corruption("Shot noise", "noise", cifar=(500, 250, 100, 75, 50), imagenet=(60, 25, 12, 5, 3))
def shot_noise(x: np.ndarray, photons: float, draws: Draws) -> np.ndarray:
    """Count photons: Poisson with ``photons`` per pixel at white."""
    return through_channel(x, draws, shot_channel, photons)


@corruption("Impulse noise", "noise", cifar=(0.01, 0.02, 0.03, 0.05, 0.07), imagenet=(0.03, 0.06, 0.09, 0.17, 0.27))
def impulse_noise(x: np.ndarray, amount: float, draws: Draws) -> np.ndarray:
    """Replace the fraction ``amount`` of the bytes, half by 0, half by 255 (each colour on its own)."""
    return through_channel(x, draws, impulse_channel, amount)


def normal_channel(std: float, per_level: float) -> np.ndarray:
    """Return P[v, o], the probability that v plus normal noise, clipped and truncated to a byte, is o.

    Its standard deviation is ``std + per_level * v``, in grey levels.
    """
    from scipy.special import ndtr

    value = np.arange(256)
    std = std + per_level * value
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
def _alias_table(channel: Callable[..., np.ndarray], *constants: float) -> np.ndarray:
    """Return Walker's alias table of ``channel(*constants)``: uint32 (65536,), entry 256 v + column.

    The upper 24 bits hold the probability of keeping the column, the lower 8 bits what to XOR to it otherwise.
    """
    mass = channel(*constants) * 256
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


def through_channel(x: np.ndarray, draws: Draws, channel: Callable[..., np.ndarray], *constants: float) -> np.ndarray:
    """Return every byte v of x replaced by a draw from row v of ``channel(*constants)``."""
    word = draws.words(x.shape[1:])
    column = word.astype(np.uint8)
    entry = _alias_table(channel, *constants).take(pair(x, column))
    column ^= entry.astype(np.uint8) * (word >= entry)
    return column
