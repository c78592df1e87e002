"""Dissection and composition search against loops that do the same work unit by unit, and memory at scale.

Prints seconds and ratios of one run: `python benchmarks/dissection.py [images [units]]` (400, 512).
"""

import resource
import sys
import time

import numpy as np
import torch
from PIL import Image
from ratios import tell

from lthlib.data.concepts import ConceptSet
from lthlib.metrics.interpretability import composition, dissection
from lthlib.metrics.interpretability.regions import activation_regions

LABELS, SIZE, LOW, LENGTH = 11, 112, 7, 3
MANY, BRODEN = 60_000, 1_197  # images that must fit in 8 GB, and labels of the full Broden
GIB = 2**30


def street_like(n: int, rng: np.random.Generator) -> ConceptSet:
    """Smooth regions of 11 labels that exclude each other, as in a street scene."""
    coarse = torch.from_numpy(rng.normal(size=(n, LABELS + 1, 6, 6)).astype(np.float32))
    planes = torch.nn.functional.interpolate(coarse, (SIZE, SIZE), mode="bicubic").argmax(1, keepdim=True)
    return concept_set(planes.numpy().astype(np.int16))


def concept_set(planes) -> ConceptSet:
    names = tuple(f"label {i}" for i in range(LABELS))
    images = np.zeros((len(planes), 1, 1, 3), np.uint8)
    return ConceptSet("street-like", images, planes, names, ("object",), np.zeros(LABELS, int))


def clumped(n: int, units: int, rng: np.random.Generator) -> np.ndarray:
    """Activations with heavy tails that differ between images, as a ReLU layer's."""
    return (rng.gamma(0.5, size=(n, units, LOW, LOW)) * rng.gamma(1, size=(n, units, 1, 1))).astype(np.float32)


def unit_by_unit(acts, limits, concepts):
    """The published procedure: image by image, unit by unit, skipping maps under their threshold."""
    units, labels = len(limits), len(concepts.labels)
    both, area, touching = np.zeros((units, labels + 1)), np.zeros(units), np.zeros(units)
    concept = np.zeros(labels + 1)
    for maps, planes in zip(acts, concepts.planes, strict=True):
        concept += np.bincount(planes.ravel(), minlength=labels + 1)
        for u in range(units):
            if maps[u].max() > limits[u]:
                big = np.asarray(Image.fromarray(maps[u]).resize((SIZE, SIZE), Image.BILINEAR))
                where = np.argwhere(big > limits[u])
                area[u] += len(where)
                seen = np.bincount(planes[:, where[:, 0], where[:, 1]].ravel(), minlength=labels + 1)
                both[u] += seen
                touching[u] += len(where) * (seen[1:].sum() > 0)
    return both[:, 1:], concept[1:], area, touching


def boolean_search(region, masks, areas):
    """The published search on boolean arrays: every candidate evaluated over the whole set."""
    size = region.sum()

    def score(mask, area=None):
        both = np.count_nonzero(mask & region)
        return both / ((np.count_nonzero(mask) if area is None else area) + size - both + 1e-10)

    beam = {(c,): (score(m, areas[c]), m) for c, m in enumerate(masks)}
    beam = dict(sorted(((k, v) for k, v in beam.items() if v[0] > 0), key=lambda kv: -kv[1][0])[:5])
    for _ in range(LENGTH - 1):
        grown = dict(beam)
        for key, (_, mask) in beam.items():
            for c, label in enumerate(masks):
                for name, new in (("or", mask | label), ("and", mask & label), ("not", mask & ~label)):
                    grown[(*key, name, c)] = (score(new), new)
        beam = dict(sorted(grown.items(), key=lambda kv: -kv[1][0])[:5])
    return max(iou for iou, _ in beam.values())


def timed(function, *args, **options):
    start = time.perf_counter()
    result = function(*args, **options)
    return time.perf_counter() - start, result


def compare_tally(acts, limits, concepts) -> None:
    dissection.tally(acts[:8], limits, concepts.subset(range(8)))
    fast, ours = timed(dissection.tally, acts, limits, concepts)
    slow, (both, concept, _, touching) = timed(unit_by_unit, acts, limits, concepts)
    assert (ours.both == both).all()
    assert (ours.concept == concept).all()
    assert (ours.touching[:, 0] == touching).all()
    tell("dissection, the same counts", "a loop over units", fast, slow)


def compare_search(acts, limits, concepts, tried: int = 4) -> None:
    count, counts = timed(composition.census, acts, limits, concepts)
    search, found = timed(composition.best_formulas, counts, max_length=LENGTH)
    masks = [concepts.mask(c) for c in range(LABELS)]
    areas = [np.count_nonzero(m) for m in masks]
    picked = np.linspace(0, len(limits) - 1, tried).astype(int)
    slow = 0.0
    for u in picked:
        region = activation_regions(acts[:, [u]], limits[[u]], concepts.mask_shape)[:, 0]
        seconds, iou = timed(boolean_search, region, masks, areas)
        slow += seconds / tried
        assert found[u].iou >= iou - 1e-9
    ours = (count + search) / len(limits)
    print(
        f"search to length {LENGTH}, per unit, IoU never below: booleans {slow:.3f} s ({tried} units), "
        f"ours {ours:.2e} s with the census ({count:.2f} s for all)"
    )
    tell(f"compositions to length {LENGTH}, a unit", "a search over masks of booleans", ours, slow)


class Repeatable:
    """Maps of 2,048 units at 7 x 7 that are made anew in every pass, as a `Stream` does."""

    def __init__(self, images: int, units: int = 2048, chunk: int = 64):
        self.images, self.units, self.chunk = images, units, chunk

    def __len__(self) -> int:
        return self.images

    def __iter__(self):
        generator = torch.Generator().manual_seed(0)
        for start in range(0, self.images, self.chunk):
            n = min(self.chunk, self.images - start)
            yield torch.rand((n, self.units, LOW, LOW), generator=generator).numpy()


def peak() -> float:
    """GiB that this process held at most so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (GIB if sys.platform == "darwin" else 2**20)


def show_memory(images: int) -> None:
    planes = np.broadcast_to(street_like(1, np.random.default_rng(0)).planes, (images, 1, SIZE, SIZE))
    maps, before = Repeatable(images), peak()
    seconds, limits = timed(dissection.thresholds, maps)
    tallied, _ = timed(dissection.tally, maps, limits, concept_set(planes))
    counted, _ = timed(composition.census, maps, limits, concept_set(planes))
    held = images * maps.units * LOW**2 * 4 / GIB
    print(
        f"streamed, {maps.units} units x {images} images (maps: {held:.2f} GiB): peak {peak():.2f} GiB, "
        f"{before:.2f} before; thresholds {seconds:.1f} s, tally {tallied:.1f} s, "
        f"census {counted:.1f} s"
    )


def project(images: int, units: int = 2048) -> None:
    """Calculate the peak for `MANY` images from the one measured: what grows with the images, and with the labels."""

    def top(n: int) -> float:  # each unit's largest activations: kept, with a chunk's appended, and partitioned
        return 3 * units * 4 * (int(dissection.BRODEN_QUANTILE * n * LOW**2) + 1) / GIB

    peaks = 4 * units * MANY / GIB
    counts = 8 * units * (BRODEN - LABELS) * 40 / GIB
    total = peak() - top(images) + top(MANY) + peaks + counts
    print(f"calculated for {units} units x {MANY} images: {peak():.2f} GiB measured at {images}")
    print(f"  + {top(MANY) - top(images):.2f} for the thresholds")
    print(f"  + {peaks:.2f} for each unit's largest activation in each image")
    print(f"  + {counts:.2f} for a null floor of 39 draws over {BRODEN} labels instead of {LABELS}")
    print(f"  = {total:.1f} GiB of the 7.45 that are 8 GB")


def main(images: int, units: int = 512) -> None:
    rng = np.random.default_rng(0)
    for n in (images, 4 * images):
        show_memory(n)
    project(4 * images)
    concepts, acts = street_like(images, rng), clumped(images, units, rng)
    limits = dissection.thresholds(acts)
    print(f"{units} units x {images} images x {LABELS} concepts, {SIZE} x {SIZE} masks, one thread")
    compare_tally(acts, limits, concepts)
    compare_search(acts, limits, concepts)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*map(int, sys.argv[1:3] or ("400", "512")))
