"""Compositional explanations: the logical formula over concepts that best matches where a unit is active.

A formula's value at a pixel depends only on which labels hold there, its *signature*. A whole concept set has few
different ones (12 where 11 labels exclude each other), so pixels are counted once per signature, over the set and over
each unit's active pixels. After that every area and every intersection is a weighted sum over signatures, exact in
integers, and no mask of the set is touched again.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial, reduce

import numpy as np
from scipy import sparse

from lthlib.core.errors import UserError
from lthlib.data.concepts import ConceptSet
from lthlib.metrics import metric
from lthlib.metrics.interpretability.activations import Stream
from lthlib.metrics.interpretability.dissection import by_block
from lthlib.metrics.interpretability.regions import shared_pixels

BEAM = 5
MAX_LENGTH = 10
OPERATORS = ("OR", "AND", "AND NOT")

_row = partial(metric, dimension="interpretability", unit="", reference="mu2020compositional")
_row("composition_iou", "Compositional IoU", higher_is_better=True)(
    "mean over units of the IoU of the best formula of at most three concepts, found by beam search over OR, AND, AND "
    "NOT"
)
_row("composition_gain", "Gain of composition", higher_is_better=None)(
    r"mean over units of the best formula's IoU minus the best single concept's"
)


@dataclass(frozen=True)
class Formula:
    """A formula that grows at the right end, as the search builds it: ((a op b) op c) ...

    Its ``steps`` are pairs of an operator and a label's index, the first with the operator ``""``. Labels that the same
    operator joins (AND and AND NOT count as one) are in order: equal formulas compare equal.
    """

    steps: tuple[tuple[str, int], ...] = ()

    def extend(self, operator: str, label: int) -> Formula:
        """Return ``(self) operator label``, in order and without repetitions."""
        return Formula(tuple(itertools.chain(*_runs((*self.steps, (operator, label))))))

    def __len__(self) -> int:
        """Number of labels."""
        return len(self.steps)

    def holds(self, where: Callable[[int], np.ndarray]) -> np.ndarray:
        """Return where the formula holds, from a function that says where a label does, both boolean arrays."""
        value = where(self.steps[0][1])
        for operator, label in self.steps[1:]:
            other = where(label)
            value = value | other if operator == "OR" else value & (~other if operator == "AND NOT" else other)
        return value

    def text(self, labels: Sequence[str]) -> str:
        """Return the formula as one reads it: ``(water OR river) AND NOT blue``."""
        text = ""
        for run in _runs(self.steps):
            joined = " ".join(f"{operator} {labels[label]}".lstrip() for operator, label in run)
            text = f"({text}) {joined}" if text else joined
        return text


def _runs(steps: Sequence[tuple[str, int]]) -> list[list[tuple[str, int]]]:
    """Split steps where OR and AND alternate; the first label joins the first run, each run is sorted."""
    head = "OR" if steps[1:] and steps[1][0] == "OR" else "AND"
    grouped = itertools.groupby([(head, steps[0][1]), *steps[1:]], lambda step: step[0] == "OR")
    runs = [sorted(set(run)) for _, run in grouped]
    runs[0][0] = "", runs[0][0][1]
    return runs


@dataclass(frozen=True)
class Census:
    """How many pixels of a set have which of S combinations of labels, the signatures.

    ``members`` are the labels of each, (L, S) of 0 and 1; ``pixels`` (S,) counts all pixels, ``units`` (U, S) each
    unit's active ones.
    """

    members: sparse.csr_array
    pixels: np.ndarray
    units: sparse.csr_array


def census(acts: np.ndarray | Stream, limits: np.ndarray, concepts: ConceptSet) -> Census:
    """Count the pixels of a concept set by signature, over the set and over each unit's active pixels; as `tally`."""
    book: dict[tuple[int, ...], int] = {}
    pixels, units = [], [sparse.csr_array((len(limits), 0))]
    for start, up, actives in by_block(acts, limits, concepts):
        found = []
        for i, active in enumerate(actives, start):
            _, signature, masks = up.cells([1 + _signatures(concepts.planes[i], book)[None]])
            pixels.append(np.column_stack([signature, np.bitwise_count(masks).sum((1, 2), dtype=np.int64)]))
            unit, _, both = shared_pixels(active, masks)
            a, p = np.nonzero(both)
            found.append(np.column_stack([unit[a], signature[p], both[a, p]]))
        unit, signature, count = np.concatenate(found).T
        shape = len(limits), len(book)
        units.append(sparse.coo_array((count.astype(np.float64), (unit, signature)), shape=shape).tocsr())
        while len(units) > 1 and units[-2].nnz <= 2 * units[-1].nnz:  # few additions of large ones
            units.append(_plus(units.pop(), units.pop()))
    signature, count = np.concatenate(pixels).T
    rows = np.array([n - 1 for key in book for n in key], int)
    columns = np.repeat(list(book.values()), [len(key) for key in book])
    members = sparse.coo_array((np.ones(len(rows)), (rows, columns)), shape=(len(concepts.labels), len(book))).tocsr()
    return Census(members, np.bincount(signature, count, len(book)).astype(np.int64), reduce(_plus, reversed(units)))


def _plus(newer: sparse.csr_array, older: sparse.csr_array) -> sparse.csr_array:
    """Add counts by signature; those made later know more signatures."""
    older.resize(newer.shape)
    return newer + older


def _signatures(planes: np.ndarray, book: dict[tuple[int, ...], int]) -> np.ndarray:
    """Return the number of each pixel's signature (H, W); new signatures are entered in the book."""
    base = int(planes.max(initial=0)) + 1
    code = np.zeros(planes[0].size, np.int64)
    for plane in planes.reshape(len(planes), -1):
        code = code * base + plane
        seen = np.bincount(code) > 0
        code = (np.cumsum(seen) - 1)[code]  # renumbered after each plane: codes stay small
    first = np.empty(code.max() + 1, np.int64)
    first[code] = np.arange(len(code))
    sets = planes.reshape(len(planes), -1)[:, first].T.tolist()
    numbers = [book.setdefault(tuple(sorted({n for n in labels if n})), len(book)) for labels in sets]
    return np.array(numbers)[code].reshape(planes.shape[1:])


@dataclass(frozen=True)
class BestFormula:
    """What describes one unit best.

    ``formula`` is None for a unit whose active pixels have no label (or that is never active); ``by_length`` is the
    best IoU among formulas of at most 1, 2, ... labels, over the whole set, never decreasing.
    """

    formula: Formula | None
    by_length: tuple[float, ...]

    @property
    def iou(self) -> float:
        """The formula's IoU over the whole set."""
        return self.by_length[-1]


@dataclass(frozen=True)
class _Entry:
    """A formula in the beam, the signatures at which it holds, and its counts of pixels."""

    formula: Formula
    holds: np.ndarray
    both: float
    area: float
    iou: float

    @property
    def rank(self) -> tuple:
        """Best first; of equal ones the shortest, then the one with the earliest labels."""
        return -self.iou, len(self.formula), self.formula.steps


def best_formulas(counts: Census, *, max_length: int = 3, beam: int = BEAM) -> list[BestFormula]:
    """Find the formula that best matches each unit, by beam search (mu2020compositional, section 2).

    The beam starts with a formula that holds nowhere. In each round every formula F in it is extended by every label C
    to F OR C, F AND C and F AND NOT C; the best of these and of the beam itself stay. IoU is over the whole set,
    without NetDissect's restriction to a category. Formulas that hold at the same pixels are one entry of
    the beam (in the published search, where labels exclude each other, ``F AND NOT C`` is F again for most C, and such
    copies fill the beam). A formula has at most ``max_length`` labels.
    """
    if not 1 <= max_length <= MAX_LENGTH or beam < 1:
        raise UserError(
            f"A formula has 1 to {MAX_LENGTH} labels, a beam at least one entry, not {max_length} and {beam}."
        )
    search = _Search(counts, beam)
    return [search.unit(unit, max_length) for unit in range(counts.units.shape[0])]


class _Search:
    """What all units share: the labels' areas, and those of the formulas that were extended so far."""

    def __init__(self, counts: Census, beam: int):
        self.counts, self.beam = counts, beam
        self.pixels = counts.pixels.astype(np.float64)
        self.area = counts.members @ self.pixels
        self.areas_with: dict[Formula, np.ndarray] = {}

    def unit(self, unit: int, max_length: int) -> BestFormula:
        """Search for one unit."""
        weights = self.counts.units[[unit]].toarray()[0]
        both, size = self.counts.members @ weights, weights.sum()
        kept, path = [_Entry(Formula(), np.zeros(len(weights), bool), 0.0, 0.0, 0.0)], []
        while len(path) < max_length:
            grown = self._best(kept, *self._extensions(kept, weights, both, size))
            if [entry.formula for entry in grown] == [entry.formula for entry in kept]:
                path += [kept[0].iou] * (max_length - len(path))
                break
            kept = grown
            path.append(kept[0].iou)
        return BestFormula(kept[0].formula if kept[0].iou > 0 else None, tuple(map(float, path)))

    def _extensions(self, kept: list[_Entry], weights: np.ndarray, both: np.ndarray, size: float):
        """Return the IoU of F op C, (operators, kept, L), 0 where that is F, and what gives formula and counts."""
        holds = np.stack([entry.holds for entry in kept], 1)
        both_and = (self.counts.members @ (weights[:, None] * holds)).T
        area_and = np.array([self._areas_with(entry) for entry in kept])
        own_both, own_area = (np.array([getattr(e, name) for e in kept])[:, None] for name in ("both", "area"))
        shared = np.stack([own_both + both - both_and, both_and, own_both - both_and])
        area = np.stack([own_area + self.area - area_and, area_and, own_area - area_and])
        # F OR C contains F and the others lie in it, so an equal area is an equal mask.
        iou = np.where(area == own_area, 0.0, _ratio(shared, area, size))
        return iou, lambda o, f, c: (kept[f].formula.extend(OPERATORS[o], c), shared[o, f, c], area[o, f, c])

    def _best(self, kept: list[_Entry], iou: np.ndarray, counted: Callable) -> list[_Entry]:
        """Return the best entries with different masks, of those kept and those that ``counted(*index)`` describes."""
        chosen: dict[bytes, _Entry] = {}
        values = np.unique([*iou[iou > 0], *(e.iou for e in kept)])
        for value in values[::-1]:
            equals = [e for e in kept if e.iou == value]
            for index in np.argwhere(iou == value).tolist():
                formula, both, area = counted(*index)
                equals.append(_Entry(formula, formula.holds(self._holds), both, area, value))
            for e in sorted(equals, key=lambda e: e.rank):
                chosen.setdefault(np.packbits(e.holds).tobytes(), e)
                if len(chosen) == self.beam:
                    return list(chosen.values())
        return list(chosen.values())

    def _holds(self, label: int) -> np.ndarray:
        members = self.counts.members
        holds = np.zeros(members.shape[1], bool)
        holds[members.indices[members.indptr[label] : members.indptr[label + 1]]] = True
        return holds

    def _areas_with(self, entry: _Entry) -> np.ndarray:
        """Pixels of the set where the entry's formula and each label hold, (L,): the same for every unit."""
        if entry.formula not in self.areas_with:
            self.areas_with[entry.formula] = self.counts.members @ (self.pixels * entry.holds)
        return self.areas_with[entry.formula]


def _ratio(shared: np.ndarray, area: np.ndarray, size: float) -> np.ndarray:
    union = area + size - shared
    return np.divide(shared, union, out=np.zeros(shared.shape), where=union > 0)


def summary(found: Sequence[BestFormula]) -> dict[str, float]:
    """Return the layer's numbers: see the rows of `METRICS` with these names."""
    best, single = (np.array([f.by_length[i] for f in found]) for i in (-1, 0))
    return {"composition_iou": float(best.mean()), "composition_gain": float((best - single).mean())}
