"""A ticket's interpretability: how well simple explanations fit it, and what its units stand for.

This file puts together what `explanations`, `dissection` and `composition` define, and adds the second floor:
the same numbers for the same network before any training. A unit of random weights prefers bright or striped
regions too, so it often beats shuffled labels; only what exceeds *its* numbers was learned.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from lthlib.core import machine as compute
from lthlib.core.errors import UserError, choose, suggest
from lthlib.core.versions import code_version
from lthlib.data import data_folder
from lthlib.data.broden import read_broden
from lthlib.data.concepts import ConceptSet, present
from lthlib.data.scenes import scenes
from lthlib.metrics import METRICS, Value, describe
from lthlib.metrics.interpretability import composition, dissection
from lthlib.metrics.interpretability.dissection import Floor, Tally, null_floor, tally, thresholds
from lthlib.metrics.interpretability.explanations import (
    SEGMENTATIONS,
    Explanations,
    differences,
    expo,
    fidelity_stability,
    segment,
)
from lthlib.metrics.interpretability.regions import CHUNK, Stream, activations, chunks, regions
from lthlib.tickets.predictions import Subject, sample
from lthlib.tickets.ticket import new_model

SCENES = "scenes"
LEAST_SIDE = 4  # positions; on smaller maps a region is a quarter of the image or more
IN_MEMORY = 2**30  # bytes of maps; more are computed anew in each pass
BLOCKS = 10  # of images left out in turn, for the standard errors of a dissection
SHOWN_IMAGES, SHOWN_UNITS, TOP_IMAGES, GALLERY = 6, 4, 3, 8
SHOWN_SIDE = 48  # pixels; larger images are kept reduced to this
FLOORED = ("fidelity", "stability", "fidelity_r2", "stability_relative")
RANDOM = (*FLOORED, "unique_detectors", "interpretable_units", "mean_best_iou", "units_above_floor", "composition_iou")

for _name in FLOORED:
    describe(
        f"{_name}_seed_floor",
        f"{METRICS[_name].title}: mask-seed floor",
        dimension="interpretability",
        higher_is_better=None,
        unit="fraction",
        reference="ribeiro2016why",
        definition=r"$|a - b| \,/\, \tfrac12(|a| + |b|)$ of the means $a$, $b$ with two seeds of the random masks",
    )
for _name in RANDOM:
    describe(
        f"{_name}_random",
        f"{METRICS[_name].title}: random weights",
        dimension="interpretability",
        higher_is_better=None,
        unit=METRICS[_name].unit,
        reference=METRICS[_name].reference,
        definition="the same for the dense network of this seed before training",
    )


# --- which layer, which superpixels, which concepts --------------------------------------------------------


def last_maps(model: nn.Module, shape: tuple[int, int, int], least: int = LEAST_SIDE) -> str:
    """Return the name of the last module that gives maps of at least ``least`` x ``least`` positions.

    Of modules with the same output the outermost counts. That is the last stage of every residual network of the
    book (``layer4`` of ResNet-50, as in the paper); the chain of VGG-16 pools further, and ends three convolutions
    earlier for images of 32 pixels.

    Args:
        model: Any network, left as found.
        shape: (C, H, W) of an image.
        least: Positions on each side.

    Raises:
        UserError: If there is none.
    """
    twin = copy.deepcopy(model).eval()
    calls: list[tuple[str, object]] = []
    for name, module in twin.named_modules():
        if name:
            module.register_forward_hook(lambda _m, _i, output, name=name: calls.append((name, output)))
    with torch.no_grad():
        twin(torch.zeros(1, *shape, device=next(twin.parameters()).device))
    names = [name for name, _ in calls]
    for name, output in reversed(calls):
        is_maps = isinstance(output, torch.Tensor) and output.ndim == 4 and min(output.shape[2:]) >= least
        if is_maps and names.count(name) == 1:
            return name
    raise UserError(f"No layer gives maps of at least {least}x{least} positions; name one as `layer`.")


def default_segmentation(channels: int, size: int) -> str:
    """Return the superpixels that suit images: those of the paper for colour, square cells for gray digits."""
    if channels == 1:
        return "grid"
    return "felzenszwalb" if size < 64 else "quickshift"


def concept_set(name: str, size: int, channels: int, n: int) -> ConceptSet:
    """Return at most n images with labelled concepts, fit for a network's input.

    Args:
        name: ``"scenes"``, the embedded set, or a folder or zip in Broden's layout in ``$LTHLIB_DATA``.
        size: Side of the network's input; pictures of another size are resized (the labels stay as they are).
        channels: 1 or 3; colour pictures become gray where the network is.
        n: How many; of a folder evenly spaced ones.

    Raises:
        UserError: For an unknown name, or what `read_broden` refuses.
    """
    if n < 2 * BLOCKS:
        raise UserError(f"n_concept_images is {n}; dissection needs at least {2 * BLOCKS} images.")
    if name == SCENES:
        return _scenes(size, channels, n)
    found = read_broden(_broden_path(name))
    if len(found) < 2 * BLOCKS:
        raise UserError(f"{name} has {len(found)} labelled images; dissection needs at least {2 * BLOCKS}.")
    n = min(n, len(found))
    found = found.subset(np.arange(n) * len(found) // n)  # neighbours in a list are often alike
    return ConceptSet(
        found.name,
        _Resized(found.images, size, channels),
        found.planes,
        found.labels,
        found.categories,
        found.category_of,
        found.quantile,
    )


_scenes = functools.lru_cache(maxsize=2)(scenes)


def _broden_path(name: str) -> Path:
    root = data_folder()
    for path in (root / name, root / f"{name}.zip"):
        if path.exists():
            return path
    there = sorted(p.name for p in root.iterdir()) if root.is_dir() else []
    raise UserError(
        f"Unknown concept set {name!r}.{suggest(name, [SCENES, *there])} Allowed: {SCENES}, or a folder or zip in "
        f"Broden's layout in {root} (set LTHLIB_DATA to change it), which holds: {', '.join(there) or 'nothing'}."
    )


class _Resized(Sequence):
    """Pictures at a network's input size and channels, resized when they are read."""

    def __init__(self, pictures: Sequence, size: int, channels: int):
        self.pictures, self.size, self.channels = pictures, size, channels

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, key):
        if isinstance(key, slice):
            return np.stack([self[i] for i in range(*key.indices(len(self)))])
        return _resize(self.pictures[key], self.size, self.channels)


def _resize(picture: np.ndarray, size: int, channels: int) -> np.ndarray:
    from PIL import Image

    picture = Image.fromarray(picture.squeeze(2) if picture.shape[2] == 1 else picture)
    picture = picture.convert("L" if channels == 1 else "RGB")
    if picture.size != (size, size):
        picture = picture.resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(picture).reshape(size, size, channels)


# --- units -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Dissection:
    """What the units of one layer stand for.

    Attributes:
        layer: Its name.
        limits: The units' activation thresholds, (U,).
        scores: IoU of every unit with every concept, (U, L).
        errors: Standard errors of the numbers of `dissection.summary`, over the concept set's images (a jackknife
            that leaves out a tenth of them in turn; the thresholds stay; for counts too wide rather than too narrow).
        floor: What shuffled labels give.
        formulas: The best formula of every unit.
        peaks: Every unit's largest activation in every image, (N, U).
    """

    layer: str
    limits: np.ndarray
    scores: np.ndarray
    errors: Mapping[str, float]
    floor: Floor
    formulas: Sequence[composition.Explanation]
    peaks: np.ndarray

    def numbers(self) -> dict[str, float]:
        """Return the layer's numbers, by their names in `METRICS`."""
        return {
            **dissection.summary(self.scores),
            "units_above_floor": self.floor.units_above_floor,
            **composition.summary(self.formulas),
        }

    def by_length(self) -> np.ndarray:
        """Return the best IoU with formulas of at most 1, 2, ... concepts, mean over units."""
        return np.mean([formula.by_length for formula in self.formulas], axis=0)


def dissect(
    model: nn.Module,
    concepts: ConceptSet,
    layer: str,
    *,
    quantile: float | None = None,
    draws: int = 39,
    formula_length: int = 3,
) -> Dissection:
    """Find what every unit of a layer stands for: a concept, a formula, or nothing beyond chance.

    Args:
        model: Left as found.
        concepts: Images that fit the network, and their labels.
        layer: A module's name.
        quantile: Fraction of a unit's activations above its threshold; None for what suits the concept set.
        draws: Shuffles of the labels for the floor, at least 19.
        formula_length: Concepts in a formula at most.

    Raises:
        UserError: For an unknown layer (with near names), too few draws, or a length that is not allowed.
    """
    stream = Stream(model, layer, concepts.images)
    first = next(iter(Stream(model, layer, concepts.images[:1])))
    fits = first.nbytes * len(concepts) <= IN_MEMORY
    maps = activations(model, layer, concepts.images) if fits else stream
    limits = thresholds(maps, concepts.quantile if quantile is None else quantile)
    parts = [
        tally(maps[i:j] if fits else Stream(model, layer, concepts.images[i:j]), limits, part)
        for i, j, part in _blocks(concepts)
    ]
    return Dissection(
        layer,
        limits,
        dissection.iou(_sum(parts)),
        _jackknife(parts),
        null_floor(maps, limits, concepts, draws=draws),
        composition.explain(composition.census(maps, limits, concepts), max_length=formula_length),
        np.concatenate([block.max((2, 3)) for block in chunks(maps)]),
    )


def _blocks(concepts: ConceptSet):
    edges = np.linspace(0, len(concepts), BLOCKS + 1).astype(int).tolist()
    for i, j in itertools.pairwise(edges):
        yield i, j, concepts.subset(np.arange(i, j))


def _sum(parts: Sequence[Tally]) -> Tally:
    counts = {name: sum(vars(part)[name] for part in parts) for name in vars(parts[0])}
    return Tally(**{**counts, "category_of": parts[0].category_of})


def _jackknife(parts: Sequence[Tally]) -> dict[str, float]:
    left_out = [dissection.summary(dissection.iou(_sum([*parts[:i], *parts[i + 1 :]]))) for i in range(len(parts))]
    spread = (len(parts) - 1) ** 0.5
    return {name: spread * float(np.std([one[name] for one in left_out])) for name in left_out[0]}


# --- a network's portrait ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Probe:
    """Everything that two networks must share for their numbers to be compared."""

    images: np.ndarray
    segments: np.ndarray
    n_masks: int
    precision: str
    concepts: ConceptSet
    layer: str
    quantile: float | None
    draws: int
    formula_length: int

    def explain(self, model: nn.Module, seed: int = 0) -> Explanations:
        return fidelity_stability(
            model, self.images, segments=self.segments, n_masks=self.n_masks, seed=seed, precision=self.precision
        )

    def dissect(self, model: nn.Module) -> Dissection:
        return dissect(
            model,
            self.concepts,
            self.layer,
            quantile=self.quantile,
            draws=self.draws,
            formula_length=self.formula_length,
        )


def measure(
    subject: Subject,
    *,
    n_images: int = 100,
    n_masks: int = 1000,
    segmentation: str | None = None,
    n_expo: int = 20,
    concepts: str = SCENES,
    n_concept_images: int = 1000,
    layer: str | None = None,
    quantile: float | None = None,
    draws: int = 39,
    formula_length: int = 3,
) -> tuple[list[Value], dict[str, np.ndarray]]:
    """Measure how well a ticket can be explained, and what its units stand for.

    A score of explanations that no image defines (the scale-free ones of a network that answers the same whatever
    it sees) is left out.

    Args:
        subject: The ticket.
        n_images: Test images to explain at most.
        n_masks: Masked images for each; the official code has 1,000.
        segmentation: A name in `explanations.SEGMENTATIONS`; None for `default_segmentation`.
        n_expo: How many of the test images ExpO's scores are measured on; 0 leaves them out.
        concepts: ``"scenes"``, or a folder or zip in Broden's layout in ``$LTHLIB_DATA``.
        n_concept_images: Images of the concept set at most.
        layer: The layer to dissect; None for `last_maps`.
        quantile: Fraction of a unit's activations above its threshold; None for what suits the concept set.
        draws: Shuffles of the labels for the floor of each unit.
        formula_length: Concepts in a formula at most.

    Returns:
        Values; and for figures ``scores`` of each image, ``errors`` (standard errors) of ``error_names``,
        ``detectors`` of ``categories``, ``by_length``, the same of random weights (``random_...``), some explained
        images (``explained_...``), the best units (``unit_...``), and of dense tickets the ``gallery_...``.

    Raises:
        UserError: For a name that does not exist, a number that is too small, or images that are one superpixel.
    """
    given = {name: value for name, value in locals().items() if name != "subject"}
    probe = _probe(subject, **given)
    explained, dissected = probe.explain(subject.model), probe.dissect(subject.model)
    if explained.single_segment.all():
        raise UserError(
            f"Each of the {len(explained)} test images is a single superpixel, so no part of one can be hidden; "
            f"choose another segmentation: {', '.join(SEGMENTATIONS)}."
        )
    apart = differences(explained, probe.explain(subject.model, seed=1))
    floors = {f"{name}_seed_floor": apart[name].mean for name in FLOORED}
    random, random_arrays = _random_weights(subject, probe, given)
    n_scored, n_concepts = int((~explained.single_segment).sum()), len(probe.concepts)
    values = _values(explained.summary() | floors, n_scored) + _values(dissected.numbers(), n_concepts)
    values += [Value(f"{name}_random", random[name], n_scored if name in FLOORED else n_concepts) for name in random]
    if n_expo > 0:
        few = expo(subject.model, probe.images[:n_expo], segments=probe.segments[:n_expo])
        values += _values(few.summary(), len(few))
    errors = explained.standard_errors() | dissected.errors
    arrays = {"error_names": np.array(list(errors)), "errors": np.array(list(errors.values()))}
    arrays |= _portrait_arrays(dissected, probe.concepts) | random_arrays
    arrays |= _explained_arrays(probe, explained) | _unit_arrays(subject.model, probe.concepts, dissected)
    if subject.is_dense:
        arrays |= _gallery(probe.concepts)
    return values, arrays


def inputs(subject: Subject, *, concepts: str, **_: object) -> str:
    """Return what a measurement reads beside the ticket and its data: the files of a foreign concept set."""
    if concepts == SCENES:
        return ""
    path = _broden_path(concepts)
    table = path / "index.csv" if path.is_dir() else path
    if not table.exists():
        raise UserError(f"{path} holds no index.csv; give the folder in Broden's layout itself.")
    return f"{table.stat().st_size} {table.stat().st_mtime_ns}"


def _values(numbers: Mapping[str, float], n: int) -> list[Value]:
    return [Value(name, float(value), n) for name, value in numbers.items() if not np.isnan(value)]


def _probe(
    subject: Subject,
    *,
    n_images: int,
    n_masks: int,
    segmentation: str | None,
    concepts: str,
    n_concept_images: int,
    layer: str | None,
    quantile: float | None,
    draws: int,
    formula_length: int,
    **_: object,
) -> _Probe:
    shape = subject.data.shape
    segmentation = segmentation or default_segmentation(shape[0], shape[1])
    choose(segmentation, SEGMENTATIONS, "segmentation")
    low = compute.resolve_precision(subject.precision) == torch.bfloat16
    return _Probe(
        subject.images("test", n_images).numpy(),
        _segments(subject, n_images, segmentation),
        n_masks,
        "bfloat16" if low else "float32",
        concept_set(concepts, shape[1], shape[0], n_concept_images),
        layer or last_maps(subject.model, shape),
        quantile,
        draws,
        formula_length,
    )


def _segments(subject: Subject, n: int, method: str) -> np.ndarray:
    """Superpixels (n, H, W) of the test images; no network changes them, so all tickets share them."""

    def make(folder: Path) -> None:
        found = [segment(image, method) for image in subject.images("test", n).numpy()]
        np.savez_compressed(folder / "segments.npz", segments=np.stack(found).astype(np.uint16))

    key = f"segments/{_plain(subject.ticket.data)}-{n}-{method}"
    version = f"{subject.data.digest}-{code_version(segment, sample)}"
    with np.load(subject.store.get(key, version, make) / "segments.npz") as file:
        return file["segments"].astype(np.int64)


def _plain(name: str) -> str:
    return name.replace("@", "+").lower()


def _random_weights(
    subject: Subject, probe: _Probe, given: Mapping[str, object]
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Measure the dense network of this architecture, data set and seed before training: once for all tickets."""

    def make(folder: Path) -> None:
        numbers, arrays = _untrained(subject.untrained(), probe)
        (folder / "numbers.json").write_text(json.dumps(numbers))
        np.savez_compressed(folder / "arrays.npz", **arrays)

    question = json.dumps([given, probe.layer, probe.precision], sort_keys=True, default=list)
    digest = hashlib.sha256(question.encode()).hexdigest()[:10]
    key = f"random-weights/{subject.family}-{digest}"
    version = f"{subject.data.digest}-{code_version(_untrained, new_model, sample)}"
    foreign = inputs(subject, concepts=given["concepts"])
    folder = subject.store.get(key, f"{version}-{hashlib.sha256(foreign.encode()).hexdigest()[:12]}", make)
    with np.load(folder / "arrays.npz") as file:
        arrays = {f"random_{name}": file[name] for name in ("detectors", "by_length")}
    return json.loads((folder / "numbers.json").read_text()), arrays


def _untrained(model: nn.Module, probe: _Probe) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    model = model.eval().to(compute.device())
    dissected = probe.dissect(model)
    numbers = probe.explain(model).summary() | dissected.numbers()
    kept = {name: float(numbers[name]) for name in RANDOM if not np.isnan(numbers[name])}
    return kept, _portrait_arrays(dissected, probe.concepts)


# --- small arrays for figures ------------------------------------------------------------------------------


def _portrait_arrays(dissected: Dissection, concepts: ConceptSet) -> dict[str, np.ndarray]:
    counts = dissection.detectors_by_category(dissected.scores, concepts)
    return {
        "categories": np.array(list(counts)),
        "detectors": np.array(list(counts.values())),
        "by_length": dissected.by_length(),
        "layer": np.array(dissected.layer),
        "concepts": np.array(concepts.name),
    }


def _explained_arrays(probe: _Probe, explained: Explanations) -> dict[str, np.ndarray]:
    """The first images that can be explained: pixels, each pixel's coefficient, class and probability."""
    chosen = np.flatnonzero(~explained.single_segment)[:SHOWN_IMAGES]
    maps = [explained.coef[i][_nearest(probe.segments[i])] for i in chosen]
    return {
        "explained_images": np.stack([_reduced(probe.images[i]) for i in chosen]),
        "explained_maps": np.stack(maps).astype(np.float16),
        "explained_label": explained.label[chosen],
        "explained_probability": explained.probability[chosen].astype(np.float32),
        "scores": np.stack([explained.score(name) for name in FLOORED], 1).astype(np.float32),
    }


def _unit_arrays(model: nn.Module, concepts: ConceptSet, found: Dissection) -> dict[str, np.ndarray]:
    """The best units: the images they like most, their regions there, what they are.

    Those above chance come first, then those with the larger IoU; of these the first of every label.
    """
    label, score = dissection.best_labels(found.scores)
    ranked = np.lexsort((-score, ~found.floor.above))
    first = [u for i, u in enumerate(ranked) if label[u] not in label[ranked[:i]]]
    units = [*first, *(u for u in ranked if u not in first)][:SHOWN_UNITS]
    top = np.argsort(-found.peaks[:, units], axis=0, kind="stable")[:TOP_IMAGES].T
    pictures = np.stack([concepts.images[int(i)] for i in top.ravel()])
    active = regions(activations(model, found.layer, pictures, CHUNK), found.limits, concepts.mask_shape)
    active = active.reshape(*top.shape, *active.shape[1:])
    formulas = [found.formulas[u] for u in units]
    return {
        "unit_number": np.array(units),
        "unit_label": np.array([concepts.labels[label[u]] if score[u] > 0 else "" for u in units]),
        "unit_category": np.array([concepts.categories[concepts.category_of[label[u]]] for u in units]),
        "unit_iou": score[units].astype(np.float32),
        "unit_floor": found.floor.floor[units].astype(np.float32),
        "unit_formula": np.array([f.formula.text(concepts.labels) if f.formula else "" for f in formulas]),
        "unit_formula_iou": np.array([f.iou for f in formulas], np.float32),
        "unit_images": np.stack([_reduced(p) for p in pictures]).reshape(*top.shape, *_reduced(pictures[0]).shape),
        "unit_regions": np.stack(
            [
                np.stack([_nearest(active[k, i, u], len(_reduced(pictures[0]))) for i in range(top.shape[1])])
                for k, u in enumerate(units)
            ]
        ),
    }


def _gallery(concepts: ConceptSet) -> dict[str, np.ndarray]:
    """Some images and, category by category, the label of each pixel (0 none, else 1 + its index)."""
    shown = range(min(GALLERY, len(concepts)))
    pictures = np.stack([_reduced(concepts.images[i]) for i in shown])
    planes = np.stack([_by_category(concepts, i, pictures.shape[1]) for i in shown])
    return {
        "gallery_images": pictures,
        "gallery_planes": planes.astype(np.int16),
        "gallery_labels": np.array(concepts.labels),
        "gallery_category_of": concepts.category_of,
    }


def _by_category(concepts: ConceptSet, i: int, side: int) -> np.ndarray:
    numbers, masks = present(concepts.planes[i])
    planes = np.zeros((len(concepts.categories), *masks.shape[1:]), np.int64)
    for number, mask in zip(numbers, masks, strict=True):
        planes[concepts.category_of[number - 1]][mask] = number
    return np.stack([_nearest(plane, side) for plane in planes])


def _reduced(picture: np.ndarray) -> np.ndarray:
    if max(picture.shape[:2]) <= SHOWN_SIDE:
        return picture
    return _resize(picture, SHOWN_SIDE, picture.shape[2])


def _nearest(plane: np.ndarray, side: int | None = None) -> np.ndarray:
    """Return a map (H, W) at the size at which images are shown, by the nearest position."""
    side = min(SHOWN_SIDE, len(plane)) if side is None else side
    rows, columns = (((np.arange(side) + 0.5) * n / side).astype(int) for n in plane.shape)
    return plane[rows][:, columns]
