"""Where the units of a layer are active: maps enlarged, cut at a threshold and packed.

Between two neighbouring positions of the low-resolution map a bilinear surface never leaves the range of the four
corners, so only *cells* with a corner above the threshold can hold active pixels: about one in ten at the usual
quantile. Only they are computed, packed into machine words and counted against packed labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

import numpy as np
import torch


def _axis(low: int, high: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One axis of the enlargement: cell c lies between the low-resolution positions c - 1 and c.

    Returns these two, clamped, (cells, 2); their weights at the cell's output positions (cells, B, 2); and the
    positions (cells, B), -1 where a cell has fewer.
    """
    # Half-pixel centres: output j lies at (j + 1/2) low/high - 1/2; in units of 1/(2 high), exactly.
    cell, remainder = np.divmod((2 * np.arange(high) + 1) * low - high, 2 * high)
    cell += 1
    rank = np.arange(high) - np.searchsorted(cell, cell)
    weight = np.zeros((low + 1, rank.max() + 1))
    position = np.full(weight.shape, -1)
    weight[cell, rank] = remainder / (2 * high)
    position[cell, rank] = np.arange(high)
    ends = np.clip(np.arange(low + 1)[:, None] + [-1, 0], 0, low - 1)
    return ends, np.stack([1 - weight, weight], -1), position


def _triangle(low: int, high: int) -> np.ndarray:
    """PIL's bilinear filter where it reduces, weights (high, low); torch's errs on maps of width one."""
    scale = low / high
    centres = (np.arange(high)[:, None] + 0.5) * scale
    weights = np.maximum(0, 1 - np.abs(np.arange(low) + 0.5 - centres) / scale)
    return weights / weights.sum(1, keepdims=True)


@dataclass(frozen=True)
class Active:
    """The active pixels of a chunk, cell by cell, sorted by image, then unit.

    ``image``, ``unit`` and ``cell`` (K,) name a cell; ``words`` (K, W) are its pixels, packed.
    """

    image: np.ndarray
    unit: np.ndarray
    cell: np.ndarray
    words: np.ndarray

    def of(self, image: int) -> Active:
        """Return the cells of one image."""
        rows = slice(*np.searchsorted(self.image, [image, image + 1]))
        return Active(self.image[rows], self.unit[rows], self.cell[rows], self.words[rows])


def _occurring(planes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return plane and number (E,), in this order, of every label on planes (R, H, W); 0 is none."""
    numbers = [np.flatnonzero(np.bincount(plane.ravel())) for plane in planes]
    numbers = [found[found > 0] for found in numbers]
    return np.repeat(np.arange(len(planes)), [len(found) for found in numbers]), np.concatenate(numbers)


class Upsampler:
    """Bilinear enlargement with half-pixel centres of maps (h, w) to masks (H, W).

    As PIL's and torch's (``align_corners=False``). The arithmetic is PIL's: rows, then columns, each summed in double
    and rounded to single precision. A map finer than the mask is first reduced by the triangle filter that PIL uses.
    """

    def __init__(self, low: tuple[int, int], high: tuple[int, int]):
        self.low = tuple(np.minimum(low, high).tolist())
        self.ends, self.blend, (y, x) = zip(*map(_axis, self.low, high), strict=True)
        y, x = y[:, None, :, None], x[None, :, None, :]
        position = np.where((y < 0) | (x < 0), high[0] * high[1], y * high[1] + x)
        position = position.reshape(y.shape[0] * x.shape[1], -1)
        size = position.shape[1]
        self.bytes = next((b for b in (1, 2, 4) if size <= 8 * b), 8 * ceil(size / 64))
        self.word = np.dtype(f"u{min(self.bytes, 8)}")
        pad = 8 * self.bytes - size
        self.pixels = np.pad(position, ((0, 0), (0, pad)), constant_values=high[0] * high[1])
        self.slots = np.minimum(self.pixels.ravel(), high[0] * high[1] - 1)  # any pixel where there is none
        self.inside = self.pack(self.pixels < high[0] * high[1])

    def pack(self, bits: np.ndarray) -> np.ndarray:
        """Pack C-ordered booleans (..., 8 * bytes) into words (..., W)."""
        packed = np.packbits(bits.reshape(-1), bitorder="little").view(self.word)
        return packed.reshape(*bits.shape[:-1], self.bytes // self.word.itemsize)

    def cells(self, pictures: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return which labels hold in K pictures, and where; pictures are label planes (D, H, W), 0 for none.

        Returned are picture and index of each label that occurs (P,), and its packed pixels (P, cells, W). A label on
        several planes of one picture is one.
        """
        rows, numbers = zip(*map(_occurring, pictures), strict=True)
        ends = np.cumsum([0, *map(len, rows)]).tolist()
        bits = np.empty((ends[-1], self.pixels.size), bool)
        for k, planes in enumerate(pictures):
            values = planes.reshape(len(planes), -1).take(self.slots, 1)
            values = values[rows[k]] if len(values) > 1 else values
            np.equal(values, numbers[k][:, None].astype(planes.dtype), out=bits[ends[k] : ends[k + 1]])
        words = self.pack(bits.reshape(-1, *self.pixels.shape)) & self.inside
        of, number = np.repeat(np.arange(len(rows)), np.diff(ends)), np.concatenate(numbers)
        if max(map(len, pictures)) > 1:
            key = of * (number.max(initial=0) + 1) + number
            order = np.argsort(key, kind="stable")
            first = np.flatnonzero(np.diff(key[order], prepend=-1))
            if len(first) < len(order):
                words = np.bitwise_or.reduceat(words[order], first, 0)
                of, number = of[order[first]], number[order[first]]
        return of, number - 1, words

    def active(self, maps: np.ndarray, limits: np.ndarray) -> Active:
        """Return where the enlarged maps (n, U, h, w), float32, exceed the units' ``limits`` (U,)."""
        if maps.shape[2:] != self.low:
            rows, columns = (_triangle(a, b) for a, b in zip(maps.shape[2:], self.low, strict=True))
            maps = (rows @ (maps @ columns.T).astype(np.float32)).astype(np.float32)
        highest = torch.from_numpy(np.ascontiguousarray(maps)).amax((2, 3)).numpy()
        image, unit = np.nonzero(highest > limits)
        maps, limits = maps[image, unit], limits[unit]
        above = np.pad(maps > limits[:, None, None], ((0, 0), (1, 1), (1, 1)))
        rows = above[:, :-1] | above[:, 1:]
        pair, cy, cx = np.nonzero(rows[:, :, :-1] | rows[:, :, 1:])  # cells with a corner above
        words = np.empty((len(pair), self.bytes // self.word.itemsize), self.word)
        for part in (slice(i, i + 256) for i in range(0, len(pair), 256)):  # stays in the processor's cache
            words[part] = self._fill(maps, limits, pair[part], cy[part], cx[part])
        some = words.any(1)
        pair, cell = pair[some], (cy * (self.low[1] + 1) + cx)[some]
        return Active(image[pair], unit[pair], cell, words[some])

    def _fill(self, maps, limits, pair, cy, cx) -> np.ndarray:
        """Interpolate inside cells (K,), compare, and pack."""
        corners = maps[pair[:, None, None], self.ends[0][cy][:, :, None], self.ends[1][cx][:, None, :]]
        rows = (corners.astype(np.float64) @ self.blend[1][cx].transpose(0, 2, 1)).astype(np.float32)
        values = (self.blend[0][cy] @ rows.astype(np.float64)).astype(np.float32)
        above = (values > limits[pair, None, None]).reshape(len(values), -1)
        bits = np.zeros((len(values), self.pixels.shape[1]), bool)
        bits[:, : above.shape[1]] = above
        return self.pack(bits) & self.inside[cy * (self.low[1] + 1) + cx]


def activation_regions(maps: np.ndarray, limits: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Return where units are active at mask resolution, bool (n, U, H, W): for figures and small sets.

    Of low-resolution maps (n, U, h, w) with the units' `dissection.thresholds`, (U,).
    """
    up = Upsampler(maps.shape[2:], tuple(shape))
    active = up.active(maps.astype(np.float32, copy=False), limits)
    flat = np.zeros((*maps.shape[:2], shape[0] * shape[1] + 1), bool)
    bits = np.unpackbits(active.words.view(np.uint8), axis=1, bitorder="little").astype(bool)
    k, pixel = np.nonzero(bits)
    flat[active.image[k], active.unit[k], up.pixels[active.cell[k], pixel]] = True
    return flat[..., :-1].reshape(*maps.shape[:2], *shape)


def shared_pixels(active: Active, masks: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the units that are active in an image (A,), their active pixels (A,), and those under each mask (A, P).

    The P masks are packed, (P, cells, W).
    """
    starts = np.flatnonzero(np.diff(active.unit, prepend=-1))
    if not len(starts):
        return starts, starts, np.empty((0, len(masks)), np.int64)
    shared = _count(masks.take(active.cell, 1) & active.words, starts)
    return active.unit[starts], _count(active.words, starts), shared.T


def _count(words: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Set bits of words (..., K, W), summed over W and over the runs of K that begin at ``starts``."""
    bits = np.bitwise_count(words)
    flat = bits.reshape(*bits.shape[:-2], bits.shape[-2] * bits.shape[-1])
    return np.add.reduceat(flat, starts * bits.shape[-1], axis=-1, dtype=np.int64)
