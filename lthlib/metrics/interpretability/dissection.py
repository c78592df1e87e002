"""Network dissection: which concept does a unit stand for, and would chance do as well?

A unit's activation map, upsampled to the mask and cut at the unit's own high threshold, is a region; a concept's label
is another; their intersection over union (IoU) says how far the unit detects the concept (bau2017network, section 2.3).
Everything is counted exactly, in integers (see `lthlib.metrics.interpretability.regions` for how).

Everywhere ``acts`` are the maps (N, U, h, w) of the concept set's N images, an array or a `Stream`, ``limits`` are the
units' `thresholds`, (U,), and ``scores`` are `iou`, (U, L). Numbers that do not agree raise `UserError`.

The maps of a layer take 4 N U h w bytes, 24 GB for 2,048 units on 60,000 images at 7 x 7. A `Stream` is computed in
chunks, once per pass; memory then stays below 1 GB, whatever the images (`benchmarks/dissection.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from math import ceil, floor

import numpy as np

from lthlib.core.errors import UserError
from lthlib.data.concepts import BRODEN_QUANTILE, ConceptSet
from lthlib.metrics import metric
from lthlib.metrics.interpretability.activations import Stream, chunks
from lthlib.metrics.interpretability.regions import Active, Upsampler, shared_pixels

DETECTOR_IOU = 0.04
"""A unit with a larger IoU is a detector (bau2017network, section 2.3)."""

unit_metric = partial(metric, dimension="interpretability", higher_is_better=True, reference="bau2017network")
unit_metric("unique_detectors", "Unique detectors", unit="concepts", in_verdict=True)(
    "number of distinct concepts that are the best concept of a unit with IoU > 0.04"
)
unit_metric("interpretable_units", "Interpretable units", unit="fraction")(
    r"fraction of the layer's units whose best IoU exceeds 0.04"
)
unit_metric("mean_best_iou", "Mean best IoU", unit="")(r"mean over units of $\max_c \mathrm{IoU}_{k,c}$")
unit_metric("units_above_floor", "Units above chance", unit="fraction")(
    r"fraction of units whose best IoU exceeds the $1-\alpha$ quantile of their own best IoU with "
    r"shuffled labels; without any association it is about $\alpha$ = 5 %"
)


def thresholds(acts: np.ndarray | Stream, quantile: float = BRODEN_QUANTILE) -> np.ndarray:
    """Return each unit's activation threshold, float32 (U,).

    T is the (k + 1)-th largest of the n = N h w activations with k = floor(quantile n), an exact order statistic: at
    most a fraction ``quantile`` of them is strictly greater, exactly k/n where no two are equal. The published code
    estimates it by a sketch that keeps a sample, and reads entry int(1000 (1 - q) - 1) of 1,000 off that, counted from
    0: entry 994, the quantile 994/999, for q = 0.005, and 899/999 for q = 0.1. ``quantile=1 - 994/999`` (0.005005) asks
    for the same point here; on 367 street photographs it moved no IoU by more than 2.4e-4.
    """
    if not 0 < quantile < 1:
        raise UserError(f"The quantile is the fraction of activations above the threshold, in (0, 1), not {quantile}.")
    top = None
    for block in chunks(acts):
        if not np.isfinite(block).all():
            raise UserError("The layer has activations that are not finite; check the network's weights.")
        values = np.moveaxis(block, 1, 0).reshape(block.shape[1], -1)
        keep = floor(quantile * len(acts) * block[0, 0].size + 1e-9) + 1
        top = values if top is None else np.concatenate([top, values], 1)
        if top.shape[1] > keep:
            top = np.partition(top, -keep, 1)[:, -keep:]
    return top.min(1)


@dataclass(frozen=True)
class Tally:
    """Pixel counts over a concept set, int64.

    ``both`` (U, L): unit and label hold; ``concept`` (L,): the label holds; ``touching`` (U, categories): the unit is
    active, in images where one of its active pixels has a label of the category; ``category_of`` (L,) each label.
    """

    both: np.ndarray
    concept: np.ndarray
    touching: np.ndarray
    category_of: np.ndarray


def combined(parts: Sequence[Tally], times: Sequence[float]) -> Tally:
    """Return the tally of a set from tallies of its parts, each counted so many times."""
    names = ("both", "concept", "touching")
    sums = (sum(n * getattr(part, name) for n, part in zip(times, parts, strict=True) if n) for name in names)
    return Tally(*sums, parts[0].category_of)


def tally(acts: np.ndarray | Stream, limits: np.ndarray, concepts: ConceptSet) -> Tally:
    """Count the pixels that units and concepts share.

    A unit is active where its bilinearly enlarged map is strictly above its threshold. NetDissect-Lite counts a label
    twice where two masks of one pixel name it; here a pixel counts once.
    """
    return _tallies(acts, limits, concepts, np.arange(len(concepts))[None])[0]


def _tallies(
    acts: np.ndarray | Stream,
    limits: np.ndarray,
    concepts: ConceptSet,
    source: np.ndarray,
    shift: np.ndarray | None = None,
) -> list[Tally]:
    """Tally against K labellings at once: image i has the planes of ``source[k, i]``, rolled by ``shift[k, i]``."""
    units, labels, categories, n = len(limits), len(concepts.labels), len(concepts.categories), len(source)
    both, concept = np.zeros((n, units, labels), np.int64), np.zeros((n, labels), np.int64)
    touching = np.zeros((n, units, categories), np.int64)
    for start, up, actives in by_block(acts, limits, concepts):
        for i, active in enumerate(actives, start):
            pictures = [concepts.planes[j] for j in source[:, i]]
            if shift is not None:
                pictures = [np.roll(*rolled, (1, 2)) for rolled in zip(pictures, shift[:, i], strict=True)]
            labelling, label, masks = up.cells(pictures)
            concept[labelling, label] += np.bitwise_count(masks).sum((1, 2), dtype=np.int64)
            who, area, shared = shared_pixels(active, masks)
            both[labelling, who[:, None], label] += shared
            member = (labelling * categories + concepts.category_of[label])[:, None] == np.arange(n * categories)
            touched = (shared > 0).astype(np.float32) @ member > 0
            touching[:, who] += area[:, None] * touched.reshape(len(who), n, categories).swapaxes(0, 1)
    return [Tally(*counts, concepts.category_of) for counts in zip(both, concept, touching, strict=True)]


def by_block(
    acts: np.ndarray | Stream, limits: np.ndarray, concepts: ConceptSet
) -> Iterator[tuple[int, Upsampler, list[Active]]]:
    """Yield blocks of images: the first one's index, what enlarges their maps, and where each one's units are active.

    `UserError` unless maps, thresholds and labels belong together.
    """
    if len(acts) != len(concepts):
        raise UserError(f"There are maps of {len(acts)} images and labels of {len(concepts)}; use the same images.")
    units = acts.shape[1] if isinstance(acts, np.ndarray) else len(limits)
    if units != len(limits):
        raise UserError(f"There are {units} units and {len(limits)} thresholds; one threshold belongs to one unit.")
    start = 0
    for block in chunks(acts):
        up = Upsampler(block.shape[2:], concepts.mask_shape)
        active = up.active(block, limits)
        yield start, up, [active.of(i) for i in range(len(block))]
        start += len(block)


def iou(counts: Tally) -> np.ndarray:
    """Return the IoU of every unit with every concept, float64 (U, L), in [0, 1]; 0 where both are empty.

    The union is the concept's area plus the unit's area minus the intersection. The unit's area is counted as
    NetDissect-Lite does, in images where its active pixels touch a label of the concept's category. (bau2017network,
    section 2.3, counts it in all images that have such a label.) A unit is not charged for firing elsewhere.
    """
    union = counts.touching[:, counts.category_of] + counts.concept - counts.both
    return np.divide(counts.both, union, out=np.zeros(union.shape), where=union > 0)


def best_labels(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return every unit's best concept (the first of equals) and its IoU."""
    best = scores.argmax(1)
    return best, scores[np.arange(len(scores)), best]


def summary(scores: np.ndarray) -> dict[str, float]:
    """Return a layer's numbers: see the rows of `METRICS` with these names."""
    label, score = best_labels(scores)
    detector = score > DETECTOR_IOU
    return {
        "unique_detectors": len(np.unique(label[detector])),
        "interpretable_units": float(detector.mean()),
        "mean_best_iou": float(score.mean()),
    }


def summary_replicates(parts: Sequence[Tally], counts: np.ndarray) -> dict[str, np.ndarray]:
    """Return the numbers of `summary` on resampled images, (B,) each; the thresholds stay.

    ``parts`` are tallies of parts of the images, which are resampled as wholes: each ``counts`` (B, P) times.
    """
    found = [summary(iou(combined(parts, times))) for times in counts]
    return {name: np.array([one[name] for one in found]) for name in found[0]}


def detectors_by_category(scores: np.ndarray, concepts: ConceptSet) -> np.ndarray:
    """Return the number of unique detectors in each category."""
    label, score = best_labels(scores)
    unique = np.unique(label[score > DETECTOR_IOU])
    return np.bincount(concepts.category_of[unique], minlength=len(concepts.categories))


def null_floor(
    acts: np.ndarray | Stream, limits: np.ndarray, concepts: ConceptSet, *, draws: int = 39, seed: int = 0
) -> np.ndarray:
    """Return the best IoU that each unit must exceed, (U,), judged by labels that have nothing to do with the images.

    Each draw gives every image the label planes of another (a random permutation), shifted around the torus by a random
    offset. The areas, the clumping and the co-occurrence of labels stay, and so do the unit's regions; only their
    association goes. Taking the best of all concepts in each draw accounts for having tried them all. The floor is the
    ceil(0.95 (draws + 1))-th smallest of these: exceeding it is a permutation test per unit. Its level is 5 % for units
    without a preferred place; enlarged noise keeps to the map's border, where scenes have ground alone: 3 %.
    """
    if draws < 19:
        raise UserError(f"A level of 5 % needs at least 19 draws, not {draws}.")
    n, source, shift = len(concepts), [], []
    for rng in np.random.default_rng(seed).spawn(draws):
        source.append(rng.permutation(n))
        shift.append(rng.integers(0, concepts.mask_shape, (n, 2)))
    shuffled = _tallies(acts, limits, concepts, np.array(source), np.array(shift))
    return np.sort([iou(counts).max(1) for counts in shuffled], 0)[ceil(0.95 * (draws + 1) - 1e-9) - 1]
