"""LIME's explanations of a network, and two questions about them: do they fit (fidelity), do they last (stability)?

The superpixels of an image are hidden at random; a ridge regression of the predicted class's probability on the 0/1
rows is the explanation. Its plain in-sample error is the fidelity, and its change when the *same* rows are weighted
around another row is the stability, as the official code of "Can You Win Everything with a Lottery Ticket?" has them:
no pixel is perturbed and nothing is predicted anew. (`expo` is what the paper cited for both words.)

Raw values are squared probabilities, which an under-confident network makes small without explaining anything; each
has a scale-free form beside it.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from functools import partial

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from lthlib.core.errors import UserError, choose
from lthlib.metrics import metric
from lthlib.metrics.interpretability.superpixels import check_at_least, check_image, with_segments
from lthlib.networks.checks import check_rows
from lthlib.networks.fast import inference_copy
from lthlib.networks.inputs import as_input

error = partial(metric, dimension="interpretability", higher_is_better=False, unit="probability²")
scale_free = partial(metric, dimension="interpretability", unit="")
error("fidelity", "LIME fidelity", reference="chen2022can", in_verdict=True)(
    r"$\frac{1}{n}\sum_z (f(z) - g(z))^2$, unweighted, over the masks $z$ that LIME's ridge model $g$ was fitted to; "
    "$f$ is the probability of the class predicted for the whole image."
)
error("stability", "LIME stability", reference="chen2022can", in_verdict=True)(
    r"$\frac{1}{5}\sum_k \lVert c_k - c_0 \rVert^2$: the coefficients with the kernel around the image against those "
    "with the kernel around another of the same masked images."
)
error("causal", "LIME causal error", reference="chen2022can")(
    "The error of `fidelity`, averaged over the fit around the image and five re-weighted ones."
)
scale_free("fidelity_r2", "fidelity, R²", higher_is_better=True, reference="ribeiro2016why")(
    r"$1 - \text{fidelity} / \mathrm{Var}_z f(z)$: scale-free, so confidence does not decide."
)
scale_free("stability_relative", "stability, relative", higher_is_better=False, reference="chen2022can")(
    r"$\text{stability} / \lVert c_0 \rVert^2$: scale-free, so confidence does not decide."
)
scale_free("lime_r2", "LIME's R²", higher_is_better=True, reference="ribeiro2016why")(
    r"$1 - \sum_z w_z (f - g)^2 / \sum_z w_z (f - \bar f_w)^2$: LIME's locality-weighted score."
)

SCORES = ("fidelity", "stability", "causal", "fidelity_r2", "stability_relative", "lime_r2")
KERNEL_WIDTH, RIDGE = 0.25, 1.0  # LIME's
PRECISIONS = ("float32", "bfloat16")
PIXELS = {"cpu": 51_200, "cuda": 5_120_000}  # in one pass


def explain(
    model: nn.Module,
    image: np.ndarray | Tensor,
    segments: np.ndarray | None = None,
    *,
    masks: np.ndarray | None = None,
    references: np.ndarray | None = None,
) -> dict[str, object]:
    """Explain a network's prediction for one image, with masks and reference rows of your own where you have some.

    Args:
        model: Any network that gives logits (N, classes) for float pixels in [0, 1], NCHW; evaluated as in
            ``model.eval()`` and left as found.
        image: uint8, (H, W), (H, W, 1) or (H, W, 3).
        segments: Numbers of the d superpixels, (H, W); None for those of `superpixels.segment`.
        masks: (n, d) of 0 and 1: which superpixels, in the order of their numbers, each row shows; the others are
            black. None for `draw_masks`.
        references: (K, d) of 0 and 1: the rows around which the fits are weighted, by `lime_kernel`. The first gives
            the explanation, the change to the others its stability (NaN where there is no other). None for those of
            `draw_masks`, or for the whole image alone where masks are given.

    Returns:
        ``label``, the class predicted for the whole image, and its ``probability``; ``n_segments`` and ``n_evaluated``,
        the distinct masked images; ``variance`` of f over the masks, 0 where f is constant to float32 rounding; the
        scores in `SCORES`; ``coef`` (d,), positive where a superpixel speaks for the class. Scale-free scores of a
        constant f are NaN, and so is every score where d is 1: any network would be explained perfectly.

    Raises:
        UserError: For an image, segments, masks or reference rows that do not fit, or outputs that are not logits.

    Source: Chen et al. (2022), official ``Metrics/Explanation.py``; Ribeiro et al. (2016).
    """
    ((image, labels),) = with_segments([image], None if segments is None else [segments], "felzenszwalb")
    d = int(labels.max()) + 1
    drawn = draw_masks(image, d) if masks is None else (masks, np.ones((1, d)))
    given = [np.asarray(drawn[0]), np.asarray(drawn[1] if references is None else references)]
    for rows, name in zip(given, ("masks", "reference rows"), strict=True):
        if rows.ndim != 2 or not rows.size or rows.shape[1] != d or not np.isin(rows, (0, 1)).all():
            raise UserError(
                f"The {name} have the shape {rows.shape}; give rows of 0 and 1, one column for each of the {d} "
                "superpixels."
            )
    return _explain(fast_copy(model, image), image, labels, *(rows.astype(np.uint8) for rows in given))


def fidelity_stability(
    model: nn.Module,
    images: Iterable,
    *,
    segments: Iterable[np.ndarray] | None = None,
    method: str = "felzenszwalb",
    n_masks: int = 1000,
    n_perturb: int = 5,
    seed: int = 0,
    precision: str = "float32",
) -> pd.DataFrame:
    """Measure LIME's explanations of a network's predictions as the official code of the paper does.

    Where this differs: masks and reference rows are seeded, by ``seed`` and the image (`draw_masks`), so the numbers of
    an image do not depend on the others and every network is asked about the same masked images; equal masked images
    are evaluated once; ImageNet pictures are segmented at the size the network sees, not before resizing; and an image
    that is one superpixel is not scored.

    Args:
        model: As in `explain`.
        images: uint8 images, (N, H, W, C) or (N, H, W), or an iterator that yields them one at a time.
        segments: One (H, W) array of superpixel numbers for each image; None for those of `segment` by ``method``.
            They do not depend on the network: make them once where many networks are compared.
        n_masks, n_perturb, seed: Rows, and other reference rows, for each image, and the seed of both.
        precision: ``"float32"`` or ``"bfloat16"``, which is faster on some processors, and moves a score by
            much less than another seed of the masks does.

    Returns:
        A row an image, the columns as `explain` returns them; it refuses the same.
    """
    check_at_least(2, n_masks=n_masks)
    check_at_least(1, n_perturb=n_perturb)
    network, rows = None, []
    for image, labels in with_segments(images, segments, method):
        network = network or fast_copy(model, image, precision)
        drawn = draw_masks(image, labels.max() + 1, n_masks=n_masks, n_perturb=n_perturb, seed=seed)
        rows.append(_explain(network, image, labels, *drawn))
    return pd.DataFrame(rows)


def draw_masks(
    image: np.ndarray | Tensor, n_segments: int, *, n_masks: int = 1000, n_perturb: int = 5, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Draw an image's masks, uint8 (n, d): fair coins, the first row all ones; and reference rows, (1 + n_perturb, d).

    The reference rows are the first mask and others drawn uniformly with replacement, as the official permutations do.
    The seed is joined by the image, so that images get different masks and keep them in any company.
    """
    rng = generator(seed, check_image(image))
    masks = rng.integers(0, 2, size=(n_masks, n_segments), dtype=np.uint8)
    masks[0] = 1
    return masks, masks[[0, *rng.integers(n_masks, size=n_perturb)]]


def lime_kernel(masks: np.ndarray, references: np.ndarray) -> np.ndarray:
    """Return LIME's weights (K, n) ``sqrt(exp(-d² / 0.25²))``, d the cosine distance of masks to reference rows."""
    # A row of 0 and 1 has length 0 or at least 1; one that hides all is at distance 1 from every row.
    along, to = (rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1) for rows in (masks, references))
    return np.exp(-0.5 * ((1 - to @ along.T) / KERNEL_WIDTH) ** 2)


def relative_change(a: pd.DataFrame | pd.Series, b: pd.DataFrame | pd.Series) -> pd.DataFrame | pd.Series:
    """Return how far two measurements are apart, as fractions of their common size: ``|a - b| / ((|a| + |b|) / 2)``.

    What two seeds of the masks give is a floor: no smaller difference of two networks says anything about them.
    """
    size = (abs(a) + abs(b)) / 2
    return abs(a - b) / size.where(size > 0, 1)


def generator(seed: int, image: np.ndarray) -> np.random.Generator:
    """A stream of the seed and the image alone, so that neither order nor company changes an image's numbers."""
    return np.random.default_rng([seed, zlib.crc32(image)])


def fast_copy(model: nn.Module, image: np.ndarray, precision: str = "float32") -> tuple[nn.Module, torch.device]:
    """A copy for evaluation of images such as this, and the device that it is on."""
    choose(precision, PRECISIONS, "precision")
    tensor = next(model.parameters(), next(model.buffers(), None))
    device = torch.device("cpu") if tensor is None else tensor.device
    return inference_copy(model, as_input(torch.from_numpy(image[None])), getattr(torch, precision)), device


def images_per_pass(pixels: int, device: torch.device) -> int:
    """50 images of 32 x 32 on a processor, whose caches hold the maps, 5,000 on an accelerator."""
    return max(8, PIXELS[device.type] // pixels)


def probabilities(network: nn.Module, batch: Tensor) -> Tensor:
    """Softmax in float64 of a network's answers, checked."""
    return check_rows(network(batch), len(batch)).double().softmax(dim=1)


def is_constant(values: np.ndarray) -> bool:
    """Whether values computed from float32 logits differ by no more than their rounding."""
    return bool(np.ptp(values) <= 16 * np.finfo(np.float32).eps * np.abs(values).max())


def _explain(network: tuple[nn.Module, torch.device], image, labels, masks, references) -> dict[str, object]:
    f, facts = _answers(*network, image, labels, masks)
    weights = lime_kernel(masks, references)
    # The normal equations, with a column of ones whose coefficient, the intercept, is free of the penalty; for rows so
    # few and short scikit-learn's ridge takes ten times as long.
    design = np.column_stack([np.ones(len(masks)), masks])
    penalty = RIDGE * np.diag([0.0, *np.ones(masks.shape[1])])
    fits = [np.linalg.solve((w * design.T) @ design + penalty, (w * f) @ design) for w in weights]
    squares = [(f - design @ fit) ** 2 for fit in fits]
    first, errors = fits[0][1:], np.mean(squares, axis=1)
    stability = np.mean([np.sum((fit[1:] - first) ** 2) for fit in fits[1:]]) if len(fits) > 1 else np.nan
    scores = {"variance": f.var(), "fidelity": errors[0], "stability": stability, "causal": errors.mean()}
    if is_constant(f):
        scores |= {"variance": 0.0, "fidelity_r2": np.nan, "stability_relative": np.nan, "lime_r2": np.nan}
    else:
        spread = weights[0] @ (f - np.average(f, weights=weights[0])) ** 2
        scores["fidelity_r2"] = 1 - errors[0] / f.var()
        scores["stability_relative"] = stability / np.sum(first**2)
        scores["lime_r2"] = 1 - weights[0] @ squares[0] / spread
    if masks.shape[1] == 1:
        scores = dict.fromkeys(scores, np.nan)
    return facts | {"n_segments": masks.shape[1]} | scores | {"coef": first}


@torch.inference_mode()
def _answers(network, device, image, labels, masks) -> tuple[np.ndarray, dict[str, object]]:
    """Return f for every mask, and the explained class, its probability and the number of images evaluated."""
    # Hiding a superpixel that is black already changes nothing: only the others tell masked images apart.
    visible = np.bincount(labels.ravel(), weights=image.sum(axis=2).ravel()) > 0
    rows = np.vstack([np.ones_like(masks[:1]), masks])  # the whole image first: it decides the class
    _, first, inverse = np.unique(rows[:, visible], axis=0, return_index=True, return_inverse=True)
    pixels = torch.from_numpy(image).to(device).float() / 255
    where = torch.from_numpy(labels).to(device)
    kept = torch.from_numpy(rows[first]).to(device, pixels.dtype)
    # Channels last in memory, NCHW in shape.
    passes = kept.split(images_per_pass(labels.size, device))
    parts = ((pixels * shown[:, where][..., None]).permute(0, 3, 1, 2) for shown in passes)
    found = torch.cat([probabilities(network, part).cpu() for part in parts]).numpy()[inverse.ravel()]
    label = int(found[0].argmax())
    return found[1:, label], {"label": label, "probability": found[0, label], "n_evaluated": len(first)}
