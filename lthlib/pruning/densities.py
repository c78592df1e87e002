"""How many weights each layer keeps: the same share of all, or Erdos-Renyi-kernel densities (Evci et al. 2020).

Counts are exact in total, and none grows when the total falls, so rounds can nest.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction

from lthlib.core.errors import UserError

Shapes = Mapping[str, Sequence[int]]


def erk_densities(shapes: Shapes, density: float) -> dict[str, float]:
    """Return the Erdos-Renyi-kernel density of each layer: eps * sum(shape) / prod(shape), at most 1.

    eps is the same for every layer that is not full, and such that ``density`` of all weights stays; layers that would
    pass 1 are made dense and eps is solved for again (rigl/sparse_utils.py).
    """
    size = {name: math.prod(shape) for name, shape in shapes.items()}
    raw = {name: sum(shape) / size[name] for name, shape in shapes.items()}
    budget = density * sum(size.values())
    full: set[str] = set()
    while len(full) < len(raw):
        room = budget - sum(size[name] for name in full)
        eps = room / sum(raw[name] * size[name] for name in raw if name not in full)
        highest = max(raw[name] for name in raw if name not in full)
        if eps * highest <= 1:
            return {name: 1.0 if name in full else eps * raw[name] for name in raw}
        full |= {name for name in raw if raw[name] == highest}
    return dict.fromkeys(raw, 1.0)


def erk_counts(shapes: Shapes, n_keep: int) -> dict[str, int]:
    """Return how many weights each layer keeps under `erk_densities`, in total ``n_keep``."""
    size = {name: math.prod(shape) for name, shape in shapes.items()}
    densities = erk_densities(shapes, _fraction(n_keep, size))
    shares = {name: sum(shape) for name, shape in shapes.items()}
    return _apportion({name: densities[name] * size[name] for name in size}, shares, size, n_keep)


def uniform_counts(shapes: Shapes, n_keep: int, full: Sequence[str] = ()) -> dict[str, int]:
    """Return how many weights each layer keeps at one density for all, in total ``n_keep``.

    Layers that are ``full`` stay dense, the others share what is left; `UserError` where that is less than nothing.
    """
    size = {name: math.prod(shape) for name, shape in shapes.items()}
    _fraction(n_keep, size)
    counts = {name: size.pop(name) for name in full}
    room = n_keep - sum(counts.values())
    if room < 0:
        raise UserError(
            f"{', '.join(map(repr, full))} alone has {n_keep - room} weights, but only {n_keep} may stay: "
            "choose a lower sparsity or let the first layer be pruned too."
        )
    share = _fraction(room, size)
    counts |= _apportion({name: share * n for name, n in size.items()}, size, size, room)
    return {name: counts[name] for name in shapes}


def _fraction(n_keep: int, size: Mapping[str, int]) -> float:
    total = sum(size.values())
    if not 0 <= n_keep <= total:
        raise UserError(f"Cannot keep {n_keep} weights of {total}.")
    return n_keep / total if total else 0.0


def _apportion(
    targets: Mapping[str, float], shares: Mapping[str, int], size: Mapping[str, int], total: int
) -> dict[str, int]:
    """Round targets, proportional to ``shares`` below ``size``, to whole numbers of sum ``total``.

    Each seat goes to the layer with the smallest (count + 1/2) / share (Webster's method). Unlike largest remainders it
    never takes a weight from one layer because another total grew.
    """
    counts = {name: max(0, min(math.floor(t), size[name]) - len(targets)) for name, t in targets.items()}
    queue = [
        (Fraction(2 * counts[name] + 1, shares[name]), i, name)
        for i, name in enumerate(targets)
        if counts[name] < size[name]
    ]
    heapq.heapify(queue)
    for _ in range(total - sum(counts.values())):
        _, i, name = heapq.heappop(queue)
        counts[name] += 1
        if counts[name] < size[name]:
            heapq.heappush(queue, (Fraction(2 * counts[name] + 1, shares[name]), i, name))
    return counts
