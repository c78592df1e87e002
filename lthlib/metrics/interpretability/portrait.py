"""Small arrays for figures: some images with their explanations, the best units, the concepts."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
from PIL import Image
from torch import nn

from lthlib.data.concepts import ConceptSet, present
from lthlib.metrics.interpretability.activations import activations
from lthlib.metrics.interpretability.dissection import best_labels
from lthlib.metrics.interpretability.regions import activation_regions

SHOWN_IMAGES, SHOWN_UNITS, TOP_IMAGES, GALLERY = 6, 4, 3, 8
SHOWN_SIDE = 48  # pixels; larger images are kept reduced to this


def resized(picture: np.ndarray, size: int, channels: int) -> np.ndarray:
    """Return a picture (H, W, C) as (size, size, channels), bilinear; the same where it has that size already."""
    picture = Image.fromarray(picture.squeeze(2) if picture.shape[2] == 1 else picture)
    picture = picture.convert("L" if channels == 1 else "RGB")
    if picture.size != (size, size):
        picture = picture.resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(picture).reshape(size, size, channels)


def _reduced(picture: np.ndarray) -> np.ndarray:
    return picture if max(picture.shape[:2]) <= SHOWN_SIDE else resized(picture, SHOWN_SIDE, picture.shape[2])


def _nearest(planes: np.ndarray, side: int) -> np.ndarray:
    """Return maps (..., H, W) at the size at which images are shown, by the nearest position."""
    rows, columns = (((np.arange(side) + 0.5) * n / side).astype(int) for n in planes.shape[-2:])
    return planes[..., rows[:, None], columns]


def explained(images: np.ndarray, segments: np.ndarray, table: pd.DataFrame) -> Mapping[str, np.ndarray]:
    """Return the first images that can be explained: pixels, each pixel's coefficient, class and probability."""
    chosen = table[table["n_segments"] > 1].head(SHOWN_IMAGES)
    pictures = np.stack([_reduced(images[i]) for i in chosen.index])
    maps = [coef[_nearest(segments[i], pictures.shape[1])] for i, coef in chosen["coef"].items()]
    return {
        "explained_images": pictures,
        "explained_maps": np.stack(maps).astype(np.float16),
        "explained_label": chosen["label"].to_numpy(),
        "explained_probability": chosen["probability"].to_numpy(np.float32),
    }


def best_units(model: nn.Module, concepts: ConceptSet, found) -> Mapping[str, np.ndarray]:
    """Return the best units of a `measure.Dissection`: the images they like most, their regions there, what they are.

    Those above chance come first, then those with the larger IoU; of these the first of every label.
    """
    label, score = best_labels(found.scores)
    ranked = np.lexsort((-score, ~found.above))
    first = [u for i, u in enumerate(ranked) if label[u] not in label[ranked[:i]]]
    units = [*first, *(u for u in ranked if u not in first)][:SHOWN_UNITS]
    top = np.argsort(-found.peaks[:, units], axis=0, kind="stable")[:TOP_IMAGES].T
    pictures = np.stack([concepts.images[int(i)] for i in top.ravel()])
    active = activation_regions(activations(model, found.layer, pictures), found.limits, concepts.mask_shape)
    active = active[np.arange(top.size), np.repeat(units, top.shape[1])].reshape(*top.shape, *active.shape[2:])
    shown = np.stack([_reduced(picture) for picture in pictures])
    formulas = [found.formulas[u] for u in units]
    return {
        "unit_number": np.array(units),
        "unit_label": np.array([concepts.labels[label[u]] if score[u] > 0 else "" for u in units]),
        "unit_category": np.array([concepts.categories[concepts.category_of[label[u]]] for u in units]),
        "unit_iou": score[units].astype(np.float32),
        "unit_floor": found.floor[units].astype(np.float32),
        "unit_formula": np.array([f.formula.text(concepts.labels) if f.formula else "" for f in formulas]),
        "unit_formula_iou": np.array([f.iou for f in formulas], np.float32),
        "unit_images": shown.reshape(*top.shape, *shown.shape[1:]),
        "unit_regions": _nearest(active, shown.shape[1]),
    }


def gallery(concepts: ConceptSet) -> Mapping[str, np.ndarray]:
    """Return some images and, category by category, the label of each pixel (0 none, else 1 + its index)."""
    shown = range(min(GALLERY, len(concepts)))
    pictures = np.stack([_reduced(concepts.images[i]) for i in shown])
    planes = np.zeros((len(shown), len(concepts.categories), *concepts.mask_shape), np.int16)
    for i in shown:
        for number, mask in zip(*present(concepts.planes[i]), strict=True):
            planes[i, concepts.category_of[number - 1]][mask] = number
    return {
        "gallery_images": pictures,
        "gallery_planes": _nearest(planes, pictures.shape[1]),
        "gallery_labels": np.array(concepts.labels),
    }
