"""Labelled images: uint8 pixels in memory, or read when they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from lthlib.core.errors import UserError


class OnDemand:
    """The pixels of many images, read when they are asked for, so that memory does not grow with their number.

    It stands where a uint8 tensor (N, H, W, C) stands for smaller sets: ``pixels[index]`` and ``pixels.split(count)``
    give tensors.

    Args:
        read: ``read(positions) -> uint8 (m, H, W, C)`` for an array of m positions; kept as an attribute.
        positions: Those of the N images.
        image_shape: (H, W, C).
    """

    def __init__(
        self, read: Callable[[np.ndarray], np.ndarray], positions: np.ndarray, image_shape: tuple[int, int, int]
    ):
        self.read, self._positions, self.shape = read, positions, (len(positions), *image_shape)

    def __len__(self) -> int:
        return len(self._positions)

    def __getitem__(self, index: int | slice | torch.Tensor) -> torch.Tensor:
        """Read the images at an index along the first axis."""
        positions = self._positions[_numpy_index(index)]
        images = torch.from_numpy(self.read(np.atleast_1d(positions)))
        return images if np.ndim(positions) else images[0]

    def at(self, index: slice | torch.Tensor) -> OnDemand:
        """Return the images at an index along the first axis, unread."""
        return OnDemand(self.read, self._positions[_numpy_index(index)], self.shape[1:])

    def split(self, count: int) -> Iterator[torch.Tensor]:
        """Read the images in batches; the next is on its way while one is used."""
        starts, threads = range(0, len(self), count), torch.get_num_threads()
        with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(threads,)) as reader:
            ahead = [reader.submit(self.__getitem__, slice(start, start + count)) for start in starts[:1]]
            for start in starts:
                batch = ahead.pop().result()
                if start + count < len(self):
                    ahead.append(reader.submit(self.__getitem__, slice(start + count, start + 2 * count)))
                yield batch


Pixels = torch.Tensor | OnDemand


def _numpy_index(index: int | slice | torch.Tensor) -> int | slice | np.ndarray:
    return index if isinstance(index, slice) else np.asarray(index)


@dataclass(frozen=True)
class Images:
    """Labelled images.

    Attributes:
        pixels: uint8 (N, H, W, C), C 1 or 3: a tensor, or `OnDemand` where there is too much to hold in memory.
        labels: int64 tensor (N,).
    """

    pixels: Pixels
    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, index: torch.Tensor) -> Images:
        """Return the images at the given positions."""
        return Images(taken(self.pixels, index), self.labels[index])


def taken(pixels: Pixels, index: torch.Tensor) -> Pixels:
    """Return the images at the given positions; those that are read on demand stay unread."""
    return pixels.at(index) if isinstance(pixels, OnDemand) else pixels[index]


def stratified(labels: np.ndarray, n_first: int, *, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Split positions into ``n_first`` with every class in proportion, and the rest; both sorted."""
    from sklearn.model_selection import train_test_split

    if n_first == len(labels):
        return np.arange(len(labels)), np.arange(0)
    try:
        first, rest = train_test_split(np.arange(len(labels)), train_size=n_first, stratify=labels, random_state=seed)
    except ValueError:
        raise UserError(
            f"{len(labels)} images of {len(np.unique(labels))} classes, {np.bincount(labels).min()} of the smallest, "
            f"cannot be split into {n_first} and the rest with every class on both sides: add images."
        ) from None
    return np.sort(first), np.sort(rest)


def long_tailed(labels: np.ndarray, n_classes: int, ratio: float, total: int | None, *, seed: int) -> np.ndarray:
    """Return sorted positions of images whose classes fall in size, class by class, by one factor.

    Class c of C has a share in proportion to ratio^(-c / (C - 1)), as in Cui et al. (2019); shares are rounded down.

    Args:
        labels: Of all images, (N,).
        n_classes: C.
        ratio: How many times the first class outnumbers the last.
        total: How many images in all; by default as many as there are.
        seed: Of the choice within each class.

    Raises:
        UserError: Where a class is too small for its share, or its share is no image.
    """
    shares = float(ratio) ** (-np.arange(n_classes) / max(1, n_classes - 1))
    there = np.bincount(labels, minlength=n_classes)
    most = (there / shares).min()
    first = most if total is None else total / shares.sum()
    counts = np.floor(first * shares * (1 + 1e-12)).astype(int)
    if first > most or counts[-1] < 1:
        least = np.ceil(shares.sum() / shares[-1])
        raise UserError(
            f"{counts.sum()} images of {n_classes} classes, the first {ratio:g} times as frequent as the last, cannot "
            f"be taken here: train_size may be {least:.0f} to {np.floor(most * shares.sum()):.0f}."
        )
    order = np.random.default_rng(seed).permutation(len(labels))
    return np.sort(np.concatenate([order[labels[order] == c][:n] for c, n in enumerate(counts)]))
