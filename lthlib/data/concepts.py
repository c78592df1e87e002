"""Labelled concepts to hold a unit against: Broden's layout (`lthlib.data.broden`) or scenes (`lthlib.data.scenes`).

A concept set pairs images with *label planes*: maps of label numbers at mask resolution, 0 where nothing
is labelled. An image may have several planes (a pixel is red, striped and part of a disc at once); a label
that holds for a whole image is a plane filled with one number.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from lthlib.core.errors import choose

BRODEN_QUANTILE = 0.005
"""Of NetDissect: most labels of Broden cover less than a hundredth of its pixels (bau2017network)."""


@dataclass(frozen=True)
class ConceptSet:
    """Images and the concepts that are visible in them.

    Attributes:
        name: What to call it in rows and captions.
        images: uint8, ``images[a:b]`` is an array (b - a, H, W, C); an array, or read from disk on demand.
        planes: ``planes[i]`` is an integer array (D_i, h, w): 0, or 1 + the index of a label.
        labels: Names of the L labels.
        categories: Names of the categories ("colour", "object", ...).
        category_of: Index of each label's category, (L,).
        quantile: Fraction of a unit's activations above its threshold that suits the labels: a unit active in
            a fraction q of the pixels has an IoU of at most min(q, a) / max(q, a) with a label that covers a.
    """

    name: str
    images: Sequence
    planes: Sequence
    labels: tuple[str, ...]
    categories: tuple[str, ...]
    category_of: np.ndarray
    quantile: float = BRODEN_QUANTILE

    def __len__(self) -> int:
        """Number of images."""
        return len(self.images)

    @property
    def mask_shape(self) -> tuple[int, int]:
        """Height and width of the label planes."""
        return tuple(self.planes[0].shape[-2:])

    def index(self, label: str) -> int:
        """Return the index of a label."""
        choose(label, self.labels, "concept")
        return self.labels.index(label)

    def mask(self, label: str | int) -> np.ndarray:
        """Return where a label holds, bool (N, h, w)."""
        number = 1 + (self.index(label) if isinstance(label, str) else label)
        return np.stack([(self.planes[i] == number).any(0) for i in range(len(self))])

    def subset(self, indices: Sequence[int] | np.ndarray) -> ConceptSet:
        """Return the set of some of the images, in the given order, with the same labels."""
        indices = np.arange(len(self))[indices]
        images, planes = (
            Rows(lambda i, r=rows: r[int(indices[i])], len(indices)) for rows in (self.images, self.planes)
        )
        return replace(self, images=images, planes=planes)


def present(planes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the label numbers (P,) that occur in planes (D, ...) and where, bool (P, ...).

    A label on two planes of one pixel counts once.
    """
    numbers = np.flatnonzero(np.bincount(planes.ravel()))
    numbers = numbers[numbers > 0]
    masks = np.zeros((len(numbers), *planes.shape[1:]), bool)
    for plane in planes:
        masks |= plane == numbers.reshape(-1, *[1] * plane.ndim)
    return numbers, masks


class Rows(Sequence):
    """A sequence of n rows, of which ``read(i)`` is asked for the i-th; its slices are stacked arrays."""

    def __init__(self, read: Callable[[int], np.ndarray], n: int):
        self.read, self.n = read, n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, key: int | slice) -> np.ndarray:
        if isinstance(key, slice):
            return np.stack([self.read(i) for i in range(*key.indices(self.n))])
        return self.read(range(self.n)[key])
