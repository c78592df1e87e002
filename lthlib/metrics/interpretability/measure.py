"""A ticket's interpretability: how well simple explanations fit it, and what its units stand for.

This file puts together what its neighbours define, and adds the second floor: the same numbers for the same network
before any training. A unit of random weights prefers bright or striped regions too, so it often beats shuffled labels;
only what exceeds *its* numbers was learned.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from lthlib.core import machine
from lthlib.core.errors import UserError, choose, suggest
from lthlib.core.versions import code_version
from lthlib.data import data_folder
from lthlib.data.broden import read_broden
from lthlib.data.concepts import ConceptSet, Rows
from lthlib.data.corrupted import sample
from lthlib.data.scenes import scenes
from lthlib.metrics import METRICS, Value, metric
from lthlib.metrics.interpretability import composition, dissection, expo, lime, portrait
from lthlib.metrics.interpretability.activations import Stream, activations, chunks, last_maps
from lthlib.metrics.interpretability.superpixels import SEGMENTATIONS, default_segmentation, segment
from lthlib.metrics.registry import Found, values
from lthlib.metrics.resampling import kept, resampled_mean, resamples
from lthlib.tickets.obtain import new_model
from lthlib.tickets.subject import Subject

SCENES = "scenes"
IN_MEMORY = 2**30  # bytes of maps; more are computed anew in each pass
BLOCKS = 50  # of concept images that are resampled as wholes, at most
FEWEST = 20  # concept images
FLOORED = ("fidelity", "stability", "fidelity_r2", "stability_relative")
RANDOM = (*FLOORED, "unique_detectors", "interpretable_units", "mean_best_iou", "units_above_floor", "composition_iou")

beside = partial(metric, dimension="interpretability", higher_is_better=None)
for _name in FLOORED:
    beside(
        f"{_name}_seed_floor", f"{METRICS[_name].title}: mask-seed floor", unit="fraction", reference="ribeiro2016why"
    )(r"$|a - b| \,/\, \tfrac12(|a| + |b|)$ of the means $a$, $b$ with two seeds of the random masks")
for _name in RANDOM:
    beside(
        f"{_name}_random",
        f"{METRICS[_name].title}: random weights",
        unit=METRICS[_name].unit,
        reference=METRICS[_name].reference,
    )("the same for the dense network of this seed before training")


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
) -> Found:
    """Measure how well a ticket can be explained, and what its units stand for.

    A score that no image defines (a scale-free one of a network that answers the same whatever it sees) is left out.

    Args:
        subject: The ticket.
        n_images: Test images to explain at most.
        n_masks: Masked images for each; the official code has 1,000.
        segmentation: A name in `superpixels.SEGMENTATIONS`; None for `superpixels.default_segmentation`.
        n_expo: How many of the test images ExpO's scores are measured on; 0 leaves them out.
        concepts: ``"scenes"``, or a folder or zip in Broden's layout in ``$LTHLIB_DATA``.
        n_concept_images: Images of the concept set at most.
        layer: The layer to dissect; None for `activations.last_maps`.
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
    shape = subject.data.shape
    layer = layer or last_maps(subject.model, shape)
    low = machine.resolve_precision(subject.precision) == torch.bfloat16
    precision = "bfloat16" if low else "float32"
    images = subject.images("test", n_images).numpy()
    segments = _segments(subject, n_images, segmentation or default_segmentation(shape[0], shape[1]))
    if not segments.any():
        raise UserError(
            f"Each of the {len(images)} test images is a single superpixel, so no part of one can be hidden; "
            f"choose another segmentation: {', '.join(SEGMENTATIONS)}."
        )
    labelled = concept_set(concepts, shape[1], shape[0], n_concept_images)
    explain = partial(lime.fidelity_stability, images=images, segments=segments, n_masks=n_masks, precision=precision)
    look = partial(
        dissect, concepts=labelled, layer=layer, quantile=quantile, draws=draws, formula_length=formula_length
    )

    explained, dissected = explain(subject.model), look(subject.model)
    scores = explained[[*lime.SCORES]]
    floors = lime.relative_change(scores.mean(), explain(subject.model, seed=1)[[*lime.SCORES]].mean())
    random = _random_weights(subject, [given, layer, precision], concepts, explain, look)
    scored = explained["n_segments"] > 1  # whatever the network; the others have no score to draw again
    n_scored, n_concepts = int(scored.sum()), len(labelled)
    counts = resamples(max(1, n_scored))
    again = {name: resampled_mean(scores.loc[scored, name], counts) for name in scores if n_scored}
    again |= dissected.replicates
    found = values(scores.mean().dropna(), n_scored) + values(dissected.numbers(), n_concepts)
    replicates = [kept(value, again[value.metric]) for value in found if METRICS[value.metric].in_verdict]
    found += values(floors[[*FLOORED]].add_suffix("_seed_floor").dropna(), n_scored)
    for name, value in random["numbers"].items():
        found.append(Value(f"{name}_random", value, n_scored if name in FLOORED else n_concepts))
    if n_expo > 0:
        near = expo.expo(subject.model, images[:n_expo], segments=segments[:n_expo])
        found += values(near[[*expo.SCORES]].mean().dropna(), len(near))

    errors = {**scores.sem(), **{name: drawn.std(ddof=1) for name, drawn in dissected.replicates.items()}}
    arrays = {
        "error_names": np.array(list(errors)),
        "errors": np.array(list(errors.values())),
        "scores": scores[[*FLOORED]].to_numpy(np.float32),
        "categories": np.array(labelled.categories),
        "detectors": dissected.detectors,
        "by_length": dissected.by_length(),
        "layer": np.array(layer),
        "concepts": np.array(labelled.name),
        "random_detectors": np.array(random["detectors"]),
        "random_by_length": np.array(random["by_length"]),
    }
    for held in replicates:
        arrays |= held
    arrays |= portrait.explained(images, segments, explained)
    arrays |= portrait.best_units(subject.model, labelled, dissected)
    return found, arrays | (portrait.gallery(labelled) if subject.is_dense else {})


def inputs(subject: Subject, *, concepts: str, **_: object) -> str:
    """Return what a measurement reads beside the ticket and its data: the files of a foreign concept set."""
    if concepts == SCENES:
        return ""
    path = _broden_path(concepts)
    table = path / "index.csv" if path.is_dir() else path
    if not table.exists():
        raise UserError(f"{path} holds no index.csv; give the folder in Broden's layout itself.")
    return f"{table.stat().st_size} {table.stat().st_mtime_ns}"


def _segments(subject: Subject, n: int, method: str) -> np.ndarray:
    """Superpixels (n, H, W) of the test images; no network changes them, so all tickets share them."""
    choose(method, SEGMENTATIONS, "segmentation")

    def make(folder: Path) -> None:
        found = [segment(image, method) for image in subject.images("test", n).numpy()]
        np.savez_compressed(folder / "segments.npz", segments=np.stack(found).astype(np.uint16))

    key = f"segments/{subject.ticket.data.replace('@', '+').lower()}-{n}-{method}"
    version = f"{subject.data.digest}-{code_version(segment, sample)}"
    with np.load(subject.store.get(key, version, make) / "segments.npz") as file:
        return file["segments"].astype(np.int64)


def _random_weights(subject: Subject, question: Sequence, concepts: str, explain: Callable, look: Callable) -> dict:
    """Measure the dense network of this architecture, data set and seed before training: once for all tickets.

    It is known by its family and by what it is asked. A ticket's family is all that its untrained network is built
    from: architecture, data set (whose pixels are in the version) and seed; a foreign one's says what it answers, too.
    """

    def make(folder: Path) -> None:
        model = subject.untrained().eval().to(machine.device())
        dissected = look(model)
        numbers = {**explain(model)[[*lime.SCORES]].mean().dropna(), **dissected.numbers()}
        found = {"numbers": {name: float(numbers[name]) for name in RANDOM if name in numbers}}
        found |= {"detectors": dissected.detectors.tolist(), "by_length": dissected.by_length().tolist()}
        (folder / "random.json").write_text(json.dumps(found))

    text = json.dumps(question, sort_keys=True, default=list)
    key = f"random-weights/{subject.family}-{hashlib.sha256(text.encode()).hexdigest()[:10]}"
    code = code_version(_random_weights, lime.fidelity_stability, dissect, new_model, sample)
    version = f"{subject.data.digest}-{code}-{inputs(subject, concepts=concepts)}"
    return json.loads((subject.store.get(key, version, make) / "random.json").read_text())


def concept_set(name: str, size: int, channels: int, n: int) -> ConceptSet:
    """Return at most n images with labelled concepts, fit for a network's input.

    ``name`` is "scenes", the embedded set, or a folder or zip in Broden's layout in ``$LTHLIB_DATA``, of which evenly
    spaced pictures are taken and resized to ``size``, gray for one channel (the labels stay as they are). `UserError`
    for an unknown name, or what `read_broden` refuses.
    """
    if n < FEWEST:
        raise UserError(f"n_concept_images is {n}; dissection needs at least {FEWEST} images.")
    if name == SCENES:
        return _scenes(size, channels, n)
    found = read_broden(_broden_path(name))
    if len(found) < FEWEST:
        raise UserError(f"{name} has {len(found)} labelled images; dissection needs at least {FEWEST}.")
    n = min(n, len(found))
    found = found.subset(np.arange(n) * len(found) // n)  # neighbours in a list are often alike
    return replace(found, images=Rows(lambda i: portrait.resized(found.images[i], size, channels), n))


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


@dataclass(frozen=True)
class Dissection:
    """What the U units of one layer stand for.

    ``scores`` (U, L) are their IoU with every concept at the activation thresholds ``limits`` (U,), ``replicates`` the
    numbers of `dissection.summary` on resampled images, ``floor`` (U,) the best IoU that a unit must exceed to be above
    chance. ``detectors`` counts unique ones by category; ``peaks`` (N, U) are the largest activations in every image.
    """

    layer: str
    limits: np.ndarray
    scores: np.ndarray
    replicates: Mapping[str, np.ndarray]
    floor: np.ndarray
    formulas: Sequence[composition.BestFormula]
    detectors: np.ndarray
    peaks: np.ndarray

    @property
    def above(self) -> np.ndarray:
        """Units above their floor, bool (U,)."""
        return self.scores.max(1) > self.floor

    def numbers(self) -> dict[str, float]:
        """Return the layer's numbers, by their names in `METRICS`."""
        found = dissection.summary(self.scores) | composition.summary(self.formulas)
        return found | {"units_above_floor": float(self.above.mean())}

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

    The concept set's images fit the network. The other arguments are those of `measure`. `UserError` for an unknown
    layer (with a near name), too few draws, or a length that is not allowed.
    """
    maps = Stream(model, layer, concepts.images)
    if next(iter(maps[:1])).nbytes * len(concepts) <= IN_MEMORY:
        maps = activations(model, layer, concepts.images)
    limits = dissection.thresholds(maps, concepts.quantile if quantile is None else quantile)
    blocks = min(BLOCKS, len(concepts) // 2)
    edges = itertools.pairwise(np.linspace(0, len(concepts), blocks + 1).astype(int).tolist())
    parts = [dissection.tally(maps[i:j], limits, concepts.subset(np.arange(i, j))) for i, j in edges]
    scores = dissection.iou(dissection.combined(parts, [1] * blocks))
    return Dissection(
        layer=layer,
        limits=limits,
        scores=scores,
        replicates=dissection.summary_replicates(parts, resamples(blocks, "concepts")),
        floor=dissection.null_floor(maps, limits, concepts, draws=draws),
        formulas=composition.best_formulas(composition.census(maps, limits, concepts), max_length=formula_length),
        detectors=dissection.detectors_by_category(scores, concepts),
        peaks=np.concatenate([block.max((2, 3)) for block in chunks(maps)]),
    )
