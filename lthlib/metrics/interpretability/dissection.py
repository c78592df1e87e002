"""Network dissection: which concept does a unit stand for, and would chance do as well?

A unit's activation map, upsampled to the mask and cut at the unit's own high threshold, is a region; a
concept's label is another; their intersection over union (IoU) says how far the unit detects the concept.

Everything is counted exactly, in integers (see `lthlib.metrics.interpretability.regions` for how).

Memory: the maps of a layer take 4 N U h w bytes, 24 GB for 2,048 units on 60,000 images at 7 x 7. Therefore
every function takes a `Stream` where it takes an array: it is computed in chunks, once per pass (one for the
thresholds, one for the tally). Then the thresholds hold 0.5 % of the values (2,048 x 14,701 x 4 bytes =
120 MB, plus as much again and a chunk's maps while they are merged), and the tally holds one chunk: at 64
images 26 MB of maps and, where every unit has 10 active cells of 256 pixels in every image, 1.3 M cells x
(32 bytes of packed pixels + 36 of indices) = 90 MB, plus the labels of one image. The allocator keeps a
multiple of that; `benchmarks/dissection.py` shows that it levels off, below 1 GB, whatever the images.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from math import ceil, floor

import numpy as np

from lthlib.core.errors import UserError, choose
from lthlib.data.concepts import BRODEN_QUANTILE, ConceptSet
from lthlib.metrics import describe
from lthlib.metrics.interpretability.regions import Active, Stream, Upsampler, chunks, occurring, shared_pixels

DETECTOR_IOU = 0.04
"""A unit with a larger IoU is a detector (bau2017network, section 2.3)."""
DENOMINATORS = ("lite", "paper", "plain")
SHUFFLES = ("both", "images", "shift")

describe(
    "unique_detectors",
    "Unique detectors",
    dimension="interpretability",
    higher_is_better=True,
    unit="concepts",
    definition=r"number of distinct concepts that are the best concept of a unit with IoU > 0.04",
    reference="bau2017network",
    in_verdict=True,
)
describe(
    "interpretable_units",
    "Interpretable units",
    dimension="interpretability",
    higher_is_better=True,
    unit="fraction",
    definition=r"fraction of the layer's units whose best IoU exceeds 0.04",
    reference="bau2017network",
)
describe(
    "mean_best_iou",
    "Mean best IoU",
    dimension="interpretability",
    higher_is_better=True,
    unit="",
    definition=r"mean over units of $\max_c \mathrm{IoU}_{k,c}$",
    reference="bau2017network",
)
describe(
    "units_above_floor",
    "Units above chance",
    dimension="interpretability",
    higher_is_better=True,
    unit="fraction",
    definition=r"fraction of units whose best IoU exceeds the $1-\alpha$ quantile of their own best IoU with "
    r"shuffled labels; without any association it is about $\alpha$ = 5 %",
    reference="bau2017network",
)


# --- thresholds ------------------------------------------------------------------------------------------


def thresholds(acts: np.ndarray | Stream, quantile: float = BRODEN_QUANTILE) -> np.ndarray:
    """Return each unit's activation threshold, float32 (U,).

    T is the (k + 1)-th largest of the n = N h w activations with k = floor(quantile n): at most a fraction
    ``quantile`` of them is strictly greater, exactly k/n where no two are equal. NetDissect-Lite reads entry
    994 of 1,000 off a sketch that keeps a sample, which is quantile 1 - 994/999 = 0.00501 of an estimate.

    Args:
        acts: Maps (N, U, h, w), an array or a `Stream`.
        quantile: Fraction in (0, 1); pass ``concepts.quantile`` for what suits a concept set.

    Raises:
        UserError: If the quantile is outside (0, 1) or an activation is not finite.

    Source: bau2017network, section 2.3.
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


# --- tally -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tally:
    """Pixel counts over a concept set, int64.

    Attributes:
        both: Pixels where unit and label hold, (U, L).
        concept: Pixels where the label holds, (L,).
        unit: Pixels where the unit is active, (U,).
        touching: The same, in images where an *active pixel* has a label of the category, (U, categories).
        labelled: The same, in images where *any pixel* has a label of the category, (U, categories).
        images: Images with an active pixel, (U,).
        category_of: Category of each label, (L,).
    """

    both: np.ndarray
    concept: np.ndarray
    unit: np.ndarray
    touching: np.ndarray
    labelled: np.ndarray
    images: np.ndarray
    category_of: np.ndarray


class _Counter:
    """Tallies one image after the other against K labellings of it: the arrays of `Tally`, stacked."""

    def __init__(self, labellings: int, units: int, concepts: ConceptSet):
        labels, categories = len(concepts.labels), len(concepts.categories)
        self.both = np.zeros((labellings, units, labels), np.int64)
        self.concept = np.zeros((labellings, labels), np.int64)
        self.touching, self.labelled = np.zeros((2, labellings, units, categories), np.int64)
        self.unit, self.images = np.zeros((2, units), np.int64)
        self.category_of = concepts.category_of

    def add(self, active: Active, labelling: np.ndarray, label: np.ndarray, masks: np.ndarray) -> None:
        """Count the active cells of one image against masks (P, cells, W) and the labelling and label of each."""
        self.concept[labelling, label] += np.bitwise_count(masks).sum((1, 2), dtype=np.int64)
        units, area, both = shared_pixels(active, masks)
        self.unit[units] += area
        self.images[units] += 1
        self.both[labelling, units[:, None], label] += both
        labellings, _, categories = self.touching.shape
        group = labelling * categories + self.category_of[label]
        member = group[:, None] == np.arange(labellings * categories)
        touched = (both > 0).astype(np.float32) @ member > 0
        touched = touched.reshape(len(units), labellings, categories).swapaxes(0, 1)
        self.touching[:, units] += area[:, None] * touched
        self.labelled[:, units] += area[:, None] * member.any(0).reshape(labellings, 1, categories)

    def tallies(self) -> list[Tally]:
        """Return what was counted under each labelling."""
        stacked = zip(self.both, self.concept, self.touching, self.labelled, strict=True)
        return [
            Tally(both, concept, self.unit, touching, labelled, self.images, self.category_of)
            for both, concept, touching, labelled in stacked
        ]


def tally(acts: np.ndarray | Stream, limits: np.ndarray, concepts: ConceptSet) -> Tally:
    """Count the pixels that units and concepts share.

    A unit is active where its bilinearly enlarged map is strictly above its threshold; only images in which
    the low-resolution map exceeds it contribute (no other can: interpolation stays below the map's maximum).
    NetDissect-Lite counts a label twice where two masks of one pixel name it; here a pixel counts once.

    Args:
        acts: Maps (N, U, h, w) of the concept set's images, an array or a `Stream`.
        limits: `thresholds`, (U,).
        concepts: The labels, N images.

    Raises:
        UserError: If the number of maps, thresholds and images do not agree.

    Source: bau2017network, section 2.3.
    """
    return _tallies(acts, limits, concepts, None)[0]


def _tallies(acts, limits, concepts: ConceptSet, shuffles: _Shuffles | None) -> list[Tally]:
    """Tally against the images' own labels, and against shuffled ones in the same pass."""
    check_sizes(acts, limits, concepts)
    counter = _Counter(1 if shuffles is None else len(shuffles.source), len(limits), concepts)
    entries = functools.cache(lambda i: occurring(concepts.planes[i]))
    start = 0
    for block in chunks(acts):
        up = Upsampler(block.shape[2:], concepts.mask_shape)
        active = up.active(block, limits)
        for i in range(len(block)):
            if shuffles is None:
                labels = up.cells([concepts.planes[start + i]])
            else:
                source = shuffles.source[:, start + i].tolist()
                pictures, known = [concepts.planes[j] for j in source], [entries(j) for j in source]
                labels = up.cells(pictures, shuffles.shift[:, start + i], known)
            counter.add(active.of(i), *labels)
        start += len(block)
    return counter.tallies()


def check_sizes(acts: np.ndarray | Stream, limits: np.ndarray, concepts: ConceptSet) -> None:
    """Check that maps, thresholds and labels belong together.

    Raises:
        UserError: If the numbers of images or units differ.
    """
    if len(acts) != len(concepts):
        raise UserError(f"There are maps of {len(acts)} images and labels of {len(concepts)}; use the same images.")
    units = acts.shape[1] if isinstance(acts, np.ndarray) else len(limits)
    if units != len(limits):
        raise UserError(f"There are {units} units and {len(limits)} thresholds; one threshold belongs to one unit.")


def iou(counts: Tally, denominator: str = "lite") -> np.ndarray:
    """Return the IoU of every unit with every concept, float64 (U, L), in [0, 1]; 0 where both are empty.

    The union is the concept's area plus the unit's area minus the intersection. The unit's area is counted

    * ``"lite"``: in images where its active pixels touch a label of the concept's category (NetDissect-Lite);
    * ``"paper"``: in images that have a label of the concept's category (bau2017network, section 2.3);
    * ``"plain"``: everywhere. Never the largest of the three, and the only one that charges a unit for firing
      in images that nobody labelled in this category.

    Raises:
        UserError: If the denominator has another name.
    """
    choose(denominator, DENOMINATORS, "denominator")
    union = unit_area(counts, denominator) + counts.concept - counts.both
    return np.divide(counts.both, union, out=np.zeros(union.shape), where=union > 0)


def unit_area(counts: Tally, denominator: str) -> np.ndarray:
    """Return the unit's area in each concept's denominator, int64 (U, L): see `iou`."""
    if denominator == "plain":
        return np.broadcast_to(counts.unit[:, None], counts.both.shape)
    per_category = {"lite": counts.touching, "paper": counts.labelled}[denominator]
    return per_category[:, counts.category_of]


def attainable_iou(concepts: ConceptSet, quantile: float) -> np.ndarray:
    """Return the plain IoU that a unit active in a fraction ``quantile`` of the pixels cannot exceed, (L,).

    It is min(q, a) / max(q, a) for a label that covers a fraction a: a perfect detector of a common concept
    shows in its few strongest activations only. An enlarged region covers about, not exactly, its quantile.
    """
    height, width = concepts.mask_shape
    coverage = concepts.areas() / (len(concepts) * height * width)
    return np.minimum(coverage, quantile) / np.maximum(coverage, quantile)


# --- labels of units -------------------------------------------------------------------------------------


def best_labels(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return every unit's best concept (the first of equals) and its IoU from `iou` (U, L)."""
    best = scores.argmax(1)
    return best, scores[np.arange(len(scores)), best]


def summary(scores: np.ndarray, limit: float = DETECTOR_IOU) -> dict[str, float]:
    """Return the layer's numbers from `iou` (U, L): see the rows of `METRICS` with these names.

    Args:
        scores: IoU of every unit with every concept.
        limit: A unit with a larger best IoU is a detector.
    """
    label, score = best_labels(scores)
    detector = score > limit
    return {
        "unique_detectors": len(np.unique(label[detector])),
        "interpretable_units": float(detector.mean()),
        "mean_best_iou": float(score.mean()),
    }


def detectors_by_category(scores: np.ndarray, concepts: ConceptSet, limit: float = DETECTOR_IOU) -> dict[str, int]:
    """Return the number of unique detectors in each category, from `iou` (U, L)."""
    label, score = best_labels(scores)
    unique = np.unique(label[score > limit])
    counts = np.bincount(concepts.category_of[unique], minlength=len(concepts.categories))
    return dict(zip(concepts.categories, counts.tolist(), strict=True))


def table(counts: Tally, concepts: ConceptSet, denominator: str = "lite"):
    """Return one row per unit in NetDissect-Lite's columns, best units first; ``.to_csv(path, index=False)``.

    ``unit`` (from 1), ``category``, ``label``, ``score``, then for each category its best label, the label's
    pixels (``-truth``), the unit's pixels in the denominator (``-activation``), their intersection and IoU.
    A category in which the unit meets no label has an empty label and zeros.

    Returns:
        A `pandas.DataFrame`.

    Raises:
        UserError: If the denominator has another name.
    """
    import pandas as pd

    scores, area = iou(counts, denominator), unit_area(counts, denominator)
    units = np.arange(len(scores))
    names = np.array([*concepts.labels, ""], dtype=object)
    columns: dict[str, np.ndarray] = {"unit": units + 1}
    best, label = scores.argmax(1), np.where(scores.max(1) > 0, scores.argmax(1), -1)
    columns["category"] = np.array(concepts.categories, dtype=object)[concepts.category_of[best]]
    columns |= {"label": names[label], "score": scores.max(1)}
    for c, category in enumerate(concepts.categories):
        own = np.where(concepts.category_of == c, scores, -1.0)
        j = own.argmax(1)
        met = own[units, j] > 0
        columns[f"{category}-label"] = names[np.where(met, j, -1)]
        columns[f"{category}-truth"] = met * counts.concept[j]
        columns[f"{category}-activation"] = met * area[units, j]
        columns[f"{category}-intersect"] = met * counts.both[units, j]
        columns[f"{category}-iou"] = np.maximum(own[units, j], 0.0) * met
    return pd.DataFrame(columns).sort_values("score", ascending=False, kind="stable", ignore_index=True)


# --- null floor ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Floor:
    """What chance gives each unit.

    Attributes:
        observed: Best IoU over all concepts, (U,).
        null: The same with shuffled labels, (draws, U).
        alpha: Accepted rate of units above the floor where there is no association.
    """

    observed: np.ndarray
    null: np.ndarray
    alpha: float

    @property
    def floor(self) -> np.ndarray:
        """The best IoU that a unit must exceed, (U,): the ceil((1 - alpha)(draws + 1))-th smallest draw."""
        rank = ceil((1 - self.alpha) * (len(self.null) + 1) - 1e-9)
        return np.sort(self.null, 0)[rank - 1]

    @property
    def p_values(self) -> np.ndarray:
        """Fraction of the draws, the observation among them, that reach the observation, (U,)."""
        return (1 + (self.null >= self.observed).sum(0)) / (1 + len(self.null))

    @property
    def above(self) -> np.ndarray:
        """Units above their floor, bool (U,)."""
        return self.observed > self.floor

    @property
    def units_above_floor(self) -> float:
        """Fraction of units above their floor."""
        return float(self.above.mean())


def null_floor(
    acts: np.ndarray | Stream,
    limits: np.ndarray,
    concepts: ConceptSet,
    *,
    draws: int = 39,
    alpha: float = 0.05,
    shuffle: str = "both",
    denominator: str = "lite",
    seed: int = 0,
) -> Floor:
    """Return the best IoU that each unit reaches with labels that have nothing to do with the images.

    Each draw gives every image the label planes of another (a random permutation), shifted around the torus
    by a random offset. The areas, the clumping and the co-occurrence of labels stay, and so do the unit's
    regions; only their association goes. Taking the best of all concepts in each draw accounts for having
    tried them all. Exceeding the floor is a permutation test per unit. Its level is ``alpha`` where only images
    are permuted. With shifts it is for units without a preferred place: noise that is enlarged keeps to the
    border of the map, where scenes have ground alone, and exceeds the floor less often (3 % for 5 %).

    Args:
        acts: Maps (N, U, h, w) of the concept set's images, an array or a `Stream`.
        limits: `thresholds`, (U,).
        concepts: The labels.
        draws: Number of shuffles, at least 1/alpha - 1.
        alpha: Level.
        shuffle: ``"both"``; ``"images"`` permutes only the images (a unit that always fires at the top keeps
            what that gives it with "sky"); ``"shift"`` moves labels only within their image (a unit that
            fires in the right images, anywhere, keeps that; labels of whole images are never above it).
        denominator: See `iou`.
        seed: Of the shuffles.

    Raises:
        UserError: If a name is unknown, the draws are too few for the level, or the sizes do not agree.
    """
    choose(shuffle, SHUFFLES, "shuffle")
    choose(denominator, DENOMINATORS, "denominator")
    if not 0 < alpha < 1 or draws + 1 < 1 / alpha - 1e-9:
        raise UserError(f"A level in (0, 1) needs at least 1/level - 1 draws (19 for 0.05), not {draws} for {alpha}.")
    shuffles = _Shuffles.draw(draws, len(concepts), concepts.mask_shape, shuffle, seed)
    observed, *null = (best_labels(iou(t, denominator))[1] for t in _tallies(acts, limits, concepts, shuffles))
    return Floor(observed, np.array(null), alpha)


@dataclass(frozen=True)
class _Shuffles:
    """K labellings of N images, the first their own: image i gets the planes of ``source[k, i]``, rolled by
    ``shift[k, i]``."""

    source: np.ndarray
    shift: np.ndarray

    @staticmethod
    def draw(draws: int, n: int, shape: tuple[int, int], shuffle: str, seed: int) -> _Shuffles:
        """Return the images' own labels and ``draws`` shuffled ones."""
        source, shift = np.tile(np.arange(n), (draws + 1, 1)), np.zeros((draws + 1, n, 2), int)
        for k, rng in enumerate(np.random.default_rng(seed).spawn(draws), 1):
            if shuffle != "shift":
                source[k] = rng.permutation(n)
            if shuffle != "images":
                shift[k] = rng.integers(0, shape, (n, 2))
        return _Shuffles(source, shift)
