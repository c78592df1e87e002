"""How well a linear model of superpixels explains a network: fidelity and stability of LIME and ExpO.

Two families share the words *fidelity* and *stability* and mean different things, so they are named apart.

* `fidelity_stability` is what the official code of "Can You Win Everything with a Lottery Ticket?" computes:
  LIME's superpixels are hidden at random, a ridge regression of the predicted probability on the 0/1 rows is
  the explanation, its plain in-sample error is the fidelity, and its change when the *same* rows are weighted
  around another row is the stability. No pixel is perturbed for the stability and no new prediction is made.
* `expo` is what the paper cited for both words (Plumb et al., 2020) defines: Gaussian neighbours of the
  pixels, a linear model fitted around the image, and a second one fitted around each neighbour.

Raw values are squared probabilities, which an under-confident network makes small without explaining
anything; each has a scale-free form beside it, and `seed_floor` says how far a change of the random masks
alone moves it.

Images are uint8, NHWC or NHW; a network takes float pixels in [0, 1], NCHW, and gives logits.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor, nn

from lthlib.core.errors import UserError, choose
from lthlib.metrics import describe
from lthlib.networks.fast import inference_copy

describe(
    "fidelity",
    "LIME fidelity",
    dimension="interpretability",
    higher_is_better=False,
    unit="probability²",
    definition=r"$\frac{1}{n}\sum_z (f(z) - g(z))^2$, unweighted, over the masks $z$ that LIME's ridge model "
    "$g$ was fitted to; $f$ is the probability of the class predicted for the whole image.",
    reference="chen2022can",
    in_verdict=True,
)
describe(
    "stability",
    "LIME stability",
    dimension="interpretability",
    higher_is_better=False,
    unit="probability²",
    definition=r"$\frac{1}{5}\sum_k \lVert c_k - c_0 \rVert^2$: the coefficients with the kernel around the "
    "image against those with the kernel around another of the same masked images.",
    reference="chen2022can",
    in_verdict=True,
)
describe(
    "causal",
    "LIME causal error",
    dimension="interpretability",
    higher_is_better=False,
    unit="probability²",
    definition="The error of `fidelity`, averaged over the fit around the image and five re-weighted ones.",
    reference="chen2022can",
)
describe(
    "fidelity_r2",
    "fidelity, R²",
    dimension="interpretability",
    higher_is_better=True,
    unit="",
    definition=r"$1 - \text{fidelity} / \mathrm{Var}_z f(z)$: scale-free, so confidence does not decide.",
    reference="ribeiro2016why",
)
describe(
    "stability_relative",
    "stability, relative",
    dimension="interpretability",
    higher_is_better=False,
    unit="",
    reference="chen2022can",
    definition=r"$\text{stability} / \lVert c_0 \rVert^2$: scale-free, so confidence does not decide.",
)
describe(
    "lime_r2",
    "LIME's R²",
    dimension="interpretability",
    higher_is_better=True,
    unit="",
    definition=r"$1 - \sum_z w_z (f - g)^2 / \sum_z w_z (f - \bar f_w)^2$: LIME's locality-weighted score.",
    reference="ribeiro2016why",
)
describe(
    "expo_fidelity",
    "ExpO neighbourhood fidelity",
    dimension="interpretability",
    higher_is_better=False,
    unit="probability²",
    reference="plumb2020regularizing",
    definition=r"$E_{x'}(f(x') - g_x(x'))^2$ on fresh neighbours $x' = x + \sigma N(0, I)$, $g_x$ linear.",
)
describe(
    "expo_stability",
    "ExpO stability",
    dimension="interpretability",
    higher_is_better=False,
    unit="probability²",
    reference="plumb2020regularizing",
    definition=r"$E_{x'}\lVert c_x - c_{x'} \rVert^2$ with $g_{x'}$ fitted around $x'$, not around $x$.",
)
describe(
    "expo_r2",
    "ExpO fidelity, R²",
    dimension="interpretability",
    higher_is_better=True,
    unit="",
    definition=r"$1 - \text{expo\_fidelity} / \mathrm{Var}_{x'} f(x')$ on the same fresh neighbours.",
    reference="plumb2020regularizing",
)
describe(
    "expo_stability_relative",
    "ExpO stability, relative",
    dimension="interpretability",
    higher_is_better=False,
    unit="",
    reference="plumb2020regularizing",
    definition=r"$\text{expo\_stability} / \lVert c_x \rVert^2$.",
)

SEGMENTATIONS: dict[str, dict[str, float]] = {
    "felzenszwalb": {"scale": 10, "sigma": 0.4, "min_size": 20},
    "quickshift": {"kernel_size": 4, "max_dist": 200, "ratio": 0.2},
    "grid": {"cell": 4},
}
"""The paper's parameters: felzenszwalb for 32-pixel images, LIME's default quickshift for ImageNet.

The grid of square cells is ours, for digits: felzenszwalb finds about three segments in one, background
included, which leaves a handful of different masked images and nothing for a linear model to miss.
"""

PRECISIONS = ("float32", "bfloat16")
FEATURES = ("superpixels", "pixels")
FITS = ("gradient", "samples")

KERNEL_WIDTH = 0.25
RIDGE = 1.0


# Segments -------------------------------------------------------------------------------------------------


def segment(image: np.ndarray | Tensor, method: str = "felzenszwalb", **parameters: float) -> np.ndarray:
    """Split an image into superpixels numbered 0, 1, ...

    A gray image is repeated to three channels first, as LIME does: both algorithms measure colour distances,
    and the thresholds of the paper are meant for three channels.

    Args:
        image: uint8, (H, W), (H, W, 1) or (H, W, 3).
        method: ``"felzenszwalb"`` (Felzenszwalb & Huttenlocher, 2004), ``"quickshift"`` (Vedaldi & Soatto,
            2008), or ``"grid"``: square cells of ``cell`` pixels.
        **parameters: Replace the values in `SEGMENTATIONS`.

    Returns:
        Integers (H, W). An image without structure is one segment, all zeros.

    Raises:
        UserError: For an unknown method or parameter, or an image of another type or shape.
    """
    from skimage import segmentation

    choose(method, SEGMENTATIONS, "segmentation")
    for name in parameters:
        choose(name, SEGMENTATIONS[method], f"parameter of {method}")
    image = _as_image(image)
    settings = SEGMENTATIONS[method] | parameters
    if method == "grid":
        return _cells(*image.shape[:2], **settings)
    if image.shape[2] == 1:
        image = np.repeat(image, 3, axis=2)
    return _consecutive(getattr(segmentation, method)(image, **settings))


def _cells(height: int, width: int, cell: int) -> np.ndarray:
    _check_counts(cell=(cell, 1))
    rows, columns = np.arange(height) // cell, np.arange(width) // cell
    return rows[:, None] * (columns[-1] + 1) + columns


def _consecutive(labels: np.ndarray) -> np.ndarray:
    return np.unique(labels, return_inverse=True)[1].reshape(labels.shape)


def explanation_map(
    image: np.ndarray | Tensor, segments: np.ndarray, coef: np.ndarray, *, scale: float | None = None
) -> np.ndarray:
    """Return the image in gray, tinted red where a superpixel speaks for the class and blue where against.

    Args:
        image: uint8, (H, W), (H, W, 1) or (H, W, 3).
        segments: Integers (H, W) as from `segment`.
        coef: One coefficient for each segment, as in `Explanations.coef`.
        scale: The coefficient that gets the full tint; the largest magnitude in ``coef`` if None. Give the
            same value for maps that will be compared.

    Returns:
        Float RGB (H, W, 3) in [0, 1].

    Raises:
        UserError: If the coefficients do not fit the segments.
    """
    image, coef = _as_image(image), np.asarray(coef, dtype=float)
    if segments.shape != image.shape[:2] or segments.max() + 1 != len(coef):
        raise UserError(
            f"{len(coef)} coefficients and segments of shape {segments.shape} numbered to {segments.max()} "
            f"do not fit an image of shape {image.shape}; use the coefficients and segments of this image."
        )
    scale = np.abs(coef).max() if scale is None else scale
    strength = np.clip(coef / scale if scale > 0 else coef, -1, 1)[segments][..., None]
    gray = image.mean(axis=2, keepdims=True) / 255
    tint = np.where(strength > 0, [0.84, 0.10, 0.11], [0.17, 0.32, 0.75])
    opacity = 0.75 * np.abs(strength)
    return (1 - opacity) * np.repeat(gray, 3, axis=2) + opacity * tint


# The explanation: one weighted ridge regression for each reference row --------------------------------------


@dataclass(frozen=True)
class LinearFits:
    """K ridge models of the same n rows.

    Attributes:
        coef: (K, d) coefficients.
        intercept: (K,).
        error: (K,) unweighted mean squared error on the rows.
        r2: (K,) weighted coefficient of determination on the rows, LIME's score; NaN for constant values.
    """

    coef: np.ndarray
    intercept: np.ndarray
    error: np.ndarray
    r2: np.ndarray


def lime_kernel(masks: np.ndarray, references: Sequence[int]) -> np.ndarray:
    """Return LIME's weights ``sqrt(exp(-d² / 0.25²))``, d the cosine distance of each row to a reference row.

    Args:
        masks: (n, d) rows of 0 and 1. A row of zeros has distance 1 to every row, itself included.
        references: K row numbers.

    Returns:
        Weights (K, n) in (0, 1].
    """
    rows = np.asarray(masks, dtype=np.float64)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    directions = rows / np.where(norms == 0, 1, norms)
    distances = 1 - directions[list(references)] @ directions.T
    return np.exp(-0.5 * (distances / KERNEL_WIDTH) ** 2)


def weighted_ridge(masks: np.ndarray, values: np.ndarray, weights: np.ndarray, alpha: float = RIDGE) -> LinearFits:
    r"""Minimise :math:`\sum_i w_{ki} (y_i - b_k - z_i c_k)^2 + \alpha \lVert c_k \rVert^2` for all k at once.

    Closed form in float64: the intercept is free of the penalty, so rows and values are centred by their
    weighted means, and K systems of d equations are solved together.

    Args:
        masks: (n, d) rows.
        values: (n,) what is explained.
        weights: (K, n) one weighting of the rows for each fit.
        alpha: The penalty; LIME uses 1.
    """
    rows, values = np.asarray(masks, dtype=np.float64), np.asarray(values, dtype=np.float64)
    total = weights.sum(axis=1, keepdims=True)
    row_mean, value_mean = weights @ rows / total, weights @ values / total[:, 0]
    gram = (weights[:, None, :] * rows.T) @ rows - total[..., None] * row_mean[:, :, None] * row_mean[:, None, :]
    target = (weights * (values - value_mean[:, None])) @ rows
    coef = np.linalg.solve(gram + alpha * np.eye(rows.shape[1]), target[..., None])[..., 0]
    intercept = value_mean - (row_mean * coef).sum(axis=1)
    residual = values - coef @ rows.T - intercept[:, None]
    explained = (weights * residual**2).sum(axis=1)
    spread = (weights * (values - value_mean[:, None]) ** 2).sum(axis=1)
    r2 = 1 - _ratio(explained, spread)
    return LinearFits(coef, intercept, (residual**2).mean(axis=1), r2)


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.full(np.shape(whole), np.nan), where=np.asarray(whole) > 0)


# The network ----------------------------------------------------------------------------------------------


def _device(model: nn.Module) -> torch.device:
    tensor = next(model.parameters(), next(model.buffers(), None))
    return torch.device("cpu") if tensor is None else tensor.device


def _rows_per_pass(pixels: int, device: torch.device, batch: int | None) -> int:
    """Default: 50 images of 32 x 32 on a processor (its caches hold the maps), 5,000 on an accelerator."""
    if batch is not None:
        return batch
    budget = 51_200 if device.type == "cpu" else 5_120_000
    return max(8, budget // pixels)


def _probabilities(network: nn.Module, batch: Tensor) -> Tensor:
    logits = network(batch)
    if not torch.isfinite(logits).all():
        raise UserError("The network's output is not finite, so nothing can be explained; was it trained to the end?")
    return logits.double().softmax(dim=1)


def _as_image(image: np.ndarray | Tensor) -> np.ndarray:
    array = np.ascontiguousarray(image)
    if array.ndim == 2:
        array = array[..., None]
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] not in (1, 3):
        raise UserError(
            f"An image to explain is uint8 of shape (H, W), (H, W, 1) or (H, W, 3), got {array.dtype} of "
            f"shape {np.shape(image)}; give pixels in 0..255, channels last."
        )
    return array


def _with_segments(
    images: Iterable, segments: Iterable[np.ndarray] | None, method: str | None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    if getattr(images, "ndim", None) == 3 and images.shape[2] in (1, 3):
        raise UserError(
            f"Images come as (N, H, W, C), got shape {tuple(images.shape)}; pass image[None] for one image."
        )
    given = None if segments is None else iter(segments)
    for number, image in enumerate(images):
        image = _as_image(image)
        if given is None:
            yield image, _pixel_numbers(image) if method is None else segment(image, method)
            continue
        labels = next(given, None)
        if labels is None or np.shape(labels) != image.shape[:2]:
            raise UserError(
                f"Image {number} of shape {image.shape} has segments of shape {np.shape(labels)}; "
                "give one (H, W) array of segment numbers for each image."
            )
        yield image, _consecutive(np.asarray(labels))


def _pixel_numbers(image: np.ndarray) -> np.ndarray:
    height, width, _ = image.shape
    return np.arange(height * width).reshape(height, width)


def _generator(seed: int, image: np.ndarray) -> np.random.Generator:
    """A stream of the seed and the image alone, so that neither order nor company changes an image's
    numbers."""
    return np.random.default_rng([seed, zlib.crc32(image)])


def draw_masks(
    image: np.ndarray | Tensor, n_segments: int, *, n_masks: int = 1000, n_perturb: int = 5, seed: int = 0
) -> tuple[np.ndarray, list[int]]:
    """Draw the masks and reference rows that `fidelity_stability` uses for an image.

    Args:
        image: uint8; part of the seed, so that images get different masks and keep them in any company.
        n_segments: Number of superpixels d.
        n_masks: Number of rows n.
        n_perturb: Number of other reference rows, drawn uniformly with replacement.
        seed: Of both.

    Returns:
        Masks (n, d) of fair 0/1 draws, uint8, row 0 all ones; and the reference rows, row 0 first.
    """
    rng = _generator(seed, _as_image(image))
    masks = rng.integers(0, 2, size=(n_masks, n_segments), dtype=np.uint8)
    masks[0] = 1
    return masks, [0, *rng.integers(n_masks, size=n_perturb).tolist()]


def _check_counts(**counts: int | None) -> None:
    for name, (value, least) in counts.items():
        if value is not None and value < least:
            raise UserError(f"{name} is {value}; it must be at least {least}.")


# LIME as the official code measures it --------------------------------------------------------------------


class _Scores:
    """Shared reading of per-image scores: names, means over the images where each is defined, counts."""

    SCORES: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.label)

    def score(self, name: str) -> np.ndarray:
        """Return the per-image values of one metric, under its name in `lthlib.metrics.METRICS`."""
        choose(name, self.SCORES, "explanation score")
        return getattr(self, name.removeprefix("expo_"))

    def summary(self) -> dict[str, float]:
        """Return the mean of every score over the images where it is defined, NaN where there is none."""
        return {name: _mean(self.score(name)) for name in self.SCORES}

    def standard_errors(self) -> dict[str, float]:
        """Return the standard error of each mean in `summary`: what the sample of images leaves open."""
        defined = {name: self.score(name)[~np.isnan(self.score(name))] for name in self.SCORES}
        return {name: np.std(v, ddof=1) / np.sqrt(len(v)) if len(v) > 1 else np.nan for name, v in defined.items()}


def _mean(values: np.ndarray) -> float:
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if len(defined) else float("nan")


@dataclass(frozen=True)
class Explanations(_Scores):
    """One value for each of N images, from `fidelity_stability`; NaN in the scores of one-segment images.

    Attributes:
        label: (N,) the explained class: the prediction for the whole image.
        probability: (N,) its probability.
        n_segments: (N,) the number of superpixels.
        n_evaluated: (N,) distinct masked images that went through the network.
        variance: (N,) variance of f over the masks; 0 where f is constant to float32 rounding.
        fidelity: (N,) lower is better.
        stability: (N,) lower is better.
        causal: (N,) lower is better.
        lime_r2: (N,) LIME's weighted R², higher is better; NaN where f is constant.
        coef: N arrays, the coefficients c_0 of the explanation around the image.
    """

    SCORES = ("fidelity", "stability", "causal", "fidelity_r2", "stability_relative", "lime_r2")

    label: np.ndarray
    probability: np.ndarray
    n_segments: np.ndarray
    n_evaluated: np.ndarray
    variance: np.ndarray
    fidelity: np.ndarray
    stability: np.ndarray
    causal: np.ndarray
    lime_r2: np.ndarray
    coef: tuple[np.ndarray, ...]

    @property
    def single_segment(self) -> np.ndarray:
        """(N,) True where the image is one superpixel, which no mask can vary: its scores are NaN."""
        return self.n_segments == 1

    @property
    def constant(self) -> np.ndarray:
        """(N,) True where f is the same for all masks: raw scores are 0 to rounding, scale-free ones NaN."""
        return self.variance == 0

    @property
    def fidelity_r2(self) -> np.ndarray:
        """(N,) ``1 - fidelity / variance``, higher is better."""
        return 1 - _ratio(self.fidelity, self.variance)

    @property
    def stability_relative(self) -> np.ndarray:
        """(N,) ``stability / |c_0|²``, lower is better."""
        size = np.array([(c**2).sum() for c in self.coef])
        return _ratio(self.stability, np.where(self.constant, 0, size))


def fidelity_stability(
    model: nn.Module,
    images: Iterable,
    *,
    segments: Iterable[np.ndarray] | None = None,
    method: str = "felzenszwalb",
    n_masks: int = 1000,
    n_perturb: int = 5,
    seed: int = 0,
    batch: int | None = None,
    precision: str = "float32",
) -> Explanations:
    """Measure LIME's explanations of a network's predictions as the official code of the paper does.

    For each image: superpixels; ``n_masks`` rows of fair 0/1 draws, the first all ones; pixels of superpixels
    with a 0 are set to 0; f is the softmax probability of the class predicted for the whole image; the
    explanation is a ridge model (penalty 1, free intercept) of f on the rows, weighted by `lime_kernel`
    around row 0. For the stability the same rows and values are weighted around ``n_perturb`` rows drawn
    uniformly (with replacement, as the official permutations do) and fitted again.

    Where this differs from the official code: masks and reference rows are seeded, by ``seed`` and the image,
    so the numbers of an image do not depend on the others and every network is asked about the same masked
    images; equal masked images are evaluated once; ImageNet pictures are segmented at the size the network
    sees, not before resizing; and an image that is one superpixel is not scored (NaN, counted by
    `Explanations.single_segment`), because two points on a line are explained perfectly by any network.

    Args:
        model: Gives logits for float pixels in [0, 1], NCHW; evaluated as in ``model.eval()``, left as found.
        images: uint8 images, (N, H, W, C) or (N, H, W), or an iterator that yields them one at a time.
        segments: One (H, W) array of superpixel numbers for each image; made by `segment` if None.
            Superpixels do not depend on the network: make them once where many networks are compared.
        method: The segmentation to use where ``segments`` is None.
        n_masks: Rows for each image.
        n_perturb: Other reference rows for each image.
        seed: Of masks and reference rows.
        batch: Masked images in one pass; None chooses about 51,200 pixels on a processor.
        precision: ``"float32"``, or ``"bfloat16"``: faster where the processor multiplies it, with
            a deviation well below that of `seed_floor`.

    Raises:
        UserError: For images of another type or shape, unknown names, or a network whose output is not
            finite.

    Reference: Chen et al. (2022), official ``Metrics/Explanation.py``; Ribeiro et al. (2016).
    """
    choose(precision, PRECISIONS, "precision")
    choose(method, SEGMENTATIONS, "segmentation")
    _check_counts(n_masks=(n_masks, 2), n_perturb=(n_perturb, 1), batch=(batch or 1, 1))
    network, device = inference_copy(model, getattr(torch, precision)), _device(model)
    rows = []
    for image, labels in _with_segments(images, segments, method):
        n_segments = labels.max() + 1
        masks, references = draw_masks(image, n_segments, n_masks=n_masks, n_perturb=n_perturb, seed=seed)
        size = _rows_per_pass(labels.size, device, batch)
        evaluation = _evaluate_masks(network, device, image, labels, masks, size)
        rows.append(_score_masks(masks, references, *evaluation))
    return _gather(Explanations, rows)


@torch.inference_mode()
def _evaluate_masks(
    network: nn.Module, device: torch.device, image: np.ndarray, labels: np.ndarray, masks: np.ndarray, batch: int
) -> tuple[np.ndarray, int, int]:
    """Return f for every mask, the explained class and the number of images evaluated."""
    # Hiding a superpixel that is black already changes nothing: only the others tell masked images apart.
    visible = np.bincount(labels.ravel(), weights=image.sum(axis=2).ravel()) > 0
    _, first, inverse = np.unique(masks[:, visible], axis=0, return_index=True, return_inverse=True)
    pixels = torch.from_numpy(image).to(device).float() / 255
    where = torch.from_numpy(labels).to(device)
    kept = torch.from_numpy(masks[first]).to(device, pixels.dtype)
    # Channels last in memory, NCHW in shape.
    passes = ((pixels * rows[:, where][..., None]).permute(0, 3, 1, 2) for rows in kept.split(batch))
    probabilities = torch.cat([_probabilities(network, chunk).cpu() for chunk in passes]).numpy()
    inverse = inverse.ravel()
    label = int(probabilities[inverse[0]].argmax())
    return probabilities[inverse, label], label, len(first)


def _score_masks(masks: np.ndarray, references: Sequence[int], values: np.ndarray, label: int, evaluated: int) -> dict:
    fits = weighted_ridge(masks, values, lime_kernel(masks, references))
    changes = ((fits.coef[1:] - fits.coef[0]) ** 2).sum(axis=1)
    constant = _is_constant(values)
    scores = {
        "variance": 0.0 if constant else values.var(),
        "fidelity": fits.error[0],
        "stability": changes.mean(),
        "causal": fits.error.mean(),
        "lime_r2": np.nan if constant else fits.r2[0],
    }
    if masks.shape[1] == 1:
        scores = dict.fromkeys(scores, np.nan)  # two points: any network would be explained perfectly
    return {
        "label": label,
        "probability": values[0],
        "n_segments": masks.shape[1],
        "n_evaluated": evaluated,
        "coef": fits.coef[0],
    } | scores


def _is_constant(values: np.ndarray) -> bool:
    """Whether values computed from float32 logits differ by no more than their rounding."""
    return bool(np.ptp(values) <= 16 * np.finfo(np.float32).eps * np.abs(values).max())


def _gather(kind: Callable, rows: list[dict]):
    if not rows:
        raise UserError("There is no image to explain; give at least one.")
    ragged = {"coef"}
    columns = {field.name: [row[field.name] for row in rows] for field in fields(kind)}
    return kind(**{name: tuple(v) if name in ragged else np.array(v) for name, v in columns.items()})


# What chance alone does -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Difference:
    """How far two measurements of the same images are apart, as fractions of their common size.

    Attributes:
        image: (N,) ``|a - b| / ((|a| + |b|) / 2)`` for each image, NaN where undefined.
        mean: The same for the means over the images.
    """

    image: np.ndarray
    mean: float


def differences(first: _Scores, second: _Scores) -> dict[str, Difference]:
    """Compare two measurements of the same images, score by score.

    Args:
        first: From `fidelity_stability` or `expo`.
        second: From the same function on the same images, with another seed, precision or network.

    Raises:
        UserError: If the two do not hold the same number of images or the same scores.
    """
    if first.SCORES != second.SCORES or len(first) != len(second):
        raise UserError(
            f"Cannot compare {len(first)} {type(first).__name__} with {len(second)} {type(second).__name__}; "
            "measure the same images with the same function."
        )
    pairs = {name: (first.score(name), second.score(name)) for name in first.SCORES}
    return {name: Difference(_apart(a, b), float(_apart(_mean(a), _mean(b)))) for name, (a, b) in pairs.items()}


def _apart(a: np.ndarray | float, b: np.ndarray | float) -> np.ndarray:
    gap, size = np.abs(np.subtract(a, b)), (np.abs(a) + np.abs(b)) / 2
    return np.where(size == 0, 0.0, gap / np.where(size == 0, 1, size))


def seed_floor(
    model: nn.Module, images: Sequence | np.ndarray | Tensor, *, seeds: tuple[int, int] = (0, 1), **settings
) -> dict[str, Difference]:
    """Measure what a change of the random masks alone does to every score of `fidelity_stability`.

    A difference between two networks that is not larger than this says nothing about them.

    Args:
        model: As in `fidelity_stability`.
        images: As in `fidelity_stability`, but not an iterator: they are read twice.
        seeds: The two mask seeds.
        **settings: Passed to `fidelity_stability`.

    Returns:
        For each score the `Difference` per image and of the mean; 0.2 means that the seed moves it by 20 %.

    Raises:
        UserError: If both seeds are the same, or for what `fidelity_stability` refuses.
    """
    if seeds[0] == seeds[1]:
        raise UserError(f"The floor needs two different seeds, got {seeds[0]} twice.")
    return differences(*(fidelity_stability(model, images, seed=seed, **settings) for seed in seeds))


# ExpO: neighbours of the pixels, explanations refitted around them ------------------------------------------


@dataclass(frozen=True)
class Neighbourhoods(_Scores):
    """One value for each of N images, from `expo`.

    Attributes:
        label: (N,) the explained class: the prediction for the image.
        n_features: (N,) coefficients of the linear model.
        fidelity: (N,) neighbourhood fidelity, lower is better.
        variance: (N,) variance of f over the same fresh neighbours.
        stability: (N,) lower is better.
        stability_floor: (N,) the stability that sampling alone gives: the model fitted twice around x itself.
        coef: N arrays (C, segments), the coefficients of g_x.
    """

    SCORES = ("expo_fidelity", "expo_stability", "expo_r2", "expo_stability_relative")

    label: np.ndarray
    n_features: np.ndarray
    fidelity: np.ndarray
    variance: np.ndarray
    stability: np.ndarray
    stability_floor: np.ndarray
    coef: tuple[np.ndarray, ...]

    @property
    def r2(self) -> np.ndarray:
        """(N,) ``1 - fidelity / variance``, higher is better, NaN where f is constant."""
        return 1 - _ratio(self.fidelity, self.variance)

    @property
    def stability_relative(self) -> np.ndarray:
        """(N,) ``stability / |c_x|²``, lower is better, NaN where f is constant."""
        size = np.array([(c**2).sum() for c in self.coef])
        return _ratio(self.stability, np.where(self.variance == 0, 0, size))


def expo(
    model: nn.Module,
    images: Iterable,
    *,
    segments: Iterable[np.ndarray] | None = None,
    method: str = "felzenszwalb",
    features: str = "superpixels",
    fit: str = "gradient",
    sigma: float = 0.1,
    n_fit: int = 100,
    n_eval: int = 200,
    n_neighbours: int = 5,
    seed: int = 0,
    batch: int | None = None,
) -> Neighbourhoods:
    r"""Measure neighbourhood fidelity and stability as Plumb et al. (2020) define them.

    The neighbourhood of x is :math:`x' = x + \sigma N(0, I)` in pixels (not clipped). f is the softmax
    probability of the class predicted for x. g_x is the linear model with intercept that is nearest to f in
    the mean square over that neighbourhood; its features are the means of each superpixel and channel, or the
    pixels.

    * fidelity :math:`E_{x'} (f(x') - g_x(x'))^2`, on neighbours that g_x was not fitted to;
    * stability :math:`E_{x'} \lVert c_x - c_{x'} \rVert^2`, g_x' fitted to neighbours *of x'*; intercepts
      left out.

    The code published with that paper fits the second model around x again (it passes ``x`` where ``x_pert``
    is meant), so its stability is the noise of sampling; `Neighbourhoods.stability_floor` is that number.

    Args:
        model: As in `fidelity_stability`, left as found.
        images: As in `fidelity_stability`.
        segments: As in `fidelity_stability`; not used for pixels.
        method: The segmentation to use where ``segments`` is None.
        features: ``"superpixels"`` or ``"pixels"``.
        fit: ``"gradient"``: by Stein's lemma the least-squares coefficients of a Gaussian neighbourhood are
            the mean gradient there (SmoothGrad; summed over each superpixel), which needs far fewer draws;
            ``"samples"``: the regression itself, for which ``n_fit`` must exceed the number of coefficients.
        sigma: Standard deviation of the neighbours, in units of the [0, 1] pixel range.
        n_fit: Neighbours that each linear model is fitted to.
        n_eval: Fresh neighbours for the fidelity.
        n_neighbours: Neighbours around which g is fitted again.
        seed: Of all noise, together with the image.
        batch: Images in one pass, as in `fidelity_stability`.

    Raises:
        UserError: For unknown names, a sigma that is not positive, or too few samples for the regression.
    """
    choose(features, FEATURES, "kind of features")
    choose(fit, FITS, "fit")
    choose(method, SEGMENTATIONS, "segmentation")
    _check_counts(n_fit=(n_fit, 1), n_eval=(n_eval, 2), n_neighbours=(n_neighbours, 1), batch=(batch or 1, 1))
    if not sigma > 0:
        raise UserError(f"sigma is {sigma}; it must be positive (0.1 is the paper's).")
    network, device = inference_copy(model), _device(model)
    if features == "pixels":
        segments, method = None, None
    rows = []
    for image, labels in _with_segments(images, segments, method):
        size = _rows_per_pass(labels.size, device, batch)
        local = _Neighbourhood(network, device, image, labels, sigma, size, _generator(seed, image))
        rows.append(_score_neighbourhood(local, fit, n_fit, n_eval, n_neighbours))
    return _gather(Neighbourhoods, rows)


class _Neighbourhood:
    """Draws neighbours of an image, asks the network about them and fits linear models to its answers."""

    def __init__(self, network, device, image, labels, sigma, batch, rng):
        self.network, self.sigma, self.batch, self.rng = network, sigma, batch, rng
        self.image = torch.from_numpy(image).to(device).float().permute(2, 0, 1) / 255
        self.segment = torch.from_numpy(labels).to(device).ravel()
        self.area = torch.bincount(self.segment).double()
        with torch.inference_mode():
            self.label = int(_probabilities(network, self.image[None]).argmax())

    def neighbours(self, centre: Tensor, count: int) -> Iterator[Tensor]:
        """Yield ``count`` neighbours of ``centre`` in chunks (B, C, H, W)."""
        for start in range(0, count, self.batch):
            shape = (min(self.batch, count - start), *centre.shape)
            noise = torch.from_numpy(self.rng.standard_normal(shape, dtype=np.float32))
            chunk = centre + self.sigma * noise.to(centre.device)
            yield chunk.contiguous(memory_format=torch.channels_last)

    def values(self, batch: Tensor) -> Tensor:
        return _probabilities(self.network, batch)[:, self.label]

    def total(self, batch: Tensor) -> Tensor:
        """Sum pixels (..., H, W) over each superpixel: (..., segments)."""
        flat = batch.double().flatten(-2)
        sums = flat.new_zeros(*flat.shape[:-1], len(self.area))
        return sums.index_add_(-1, self.segment, flat)

    def features(self, batch: Tensor) -> Tensor:
        return self.total(batch) / self.area

    def fit_gradient(self, centre: Tensor, count: int) -> tuple[Tensor, Tensor]:
        slope, value, feature = 0.0, 0.0, 0.0
        for chunk in self.neighbours(centre, count):
            chunk.requires_grad_(True)
            with torch.enable_grad():
                f = self.values(chunk)
                (gradient,) = torch.autograd.grad(f.sum(), chunk)
            slope = slope + self.total(gradient).sum(0) / count
            value = value + f.detach().sum() / count
            feature = feature + self.features(chunk.detach()).sum(0) / count
        return slope, value - (slope * feature).sum()

    @torch.inference_mode()
    def fit_samples(self, centre: Tensor, count: int) -> tuple[Tensor, Tensor]:
        pairs = [(self.features(chunk), self.values(chunk)) for chunk in self.neighbours(centre, count)]
        feature, value = (torch.cat(part) for part in zip(*pairs, strict=True))
        shape = feature.shape[1:]
        if count <= shape.numel() + 1:
            raise UserError(
                f"A regression on {shape.numel()} features needs more than {shape.numel() + 1} samples, "
                f'got {count}; raise n_fit or use fit="gradient".'
            )
        feature = feature.flatten(1)
        centred = feature - feature.mean(0)
        slope = torch.linalg.lstsq(centred, (value - value.mean())[:, None]).solution[:, 0]
        return slope.reshape(shape), value.mean() - feature.mean(0) @ slope

    @torch.inference_mode()
    def judge(self, slope: Tensor, intercept: Tensor, count: int) -> tuple[float, float]:
        """Return the mean squared error of a linear model on fresh neighbours, and the variance of f
        there."""
        answers = [
            (self.values(chunk), (self.features(chunk) * slope).sum((1, 2)) + intercept)
            for chunk in self.neighbours(self.image, count)
        ]
        value, linear = (torch.cat(part) for part in zip(*answers, strict=True))
        spread = 0.0 if _is_constant(value.cpu().numpy()) else float(value.var(correction=0))
        return float(((value - linear) ** 2).mean()), spread


def _score_neighbourhood(local: _Neighbourhood, fit: str, n_fit: int, n_eval: int, n_neighbours: int) -> dict:
    explain = local.fit_gradient if fit == "gradient" else local.fit_samples
    slope, intercept = explain(local.image, n_fit)
    fidelity, variance = local.judge(slope, intercept, n_eval)
    centres = torch.cat(list(local.neighbours(local.image, n_neighbours)))
    changes = [float(((explain(centre, n_fit)[0] - slope) ** 2).sum()) for centre in centres]
    again, _ = explain(local.image, n_fit)
    return {
        "label": local.label,
        "n_features": slope.numel(),
        "fidelity": fidelity,
        "variance": variance,
        "stability": float(np.mean(changes)),
        "stability_floor": float(((again - slope) ** 2).sum()),
        "coef": slope.cpu().numpy(),
    }
