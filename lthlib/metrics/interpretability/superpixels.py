"""Superpixels: the parts of an image that an explanation speaks of, as integers (H, W) numbered 0, 1, ..."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
from torch import Tensor

from lthlib.core.errors import UserError, choose

SEGMENTATIONS: dict[str, dict[str, float]] = {
    "felzenszwalb": {"scale": 10, "sigma": 0.4, "min_size": 20},
    "quickshift": {"kernel_size": 4, "max_dist": 200, "ratio": 0.2},
    "grid": {"cell": 4},
}
"""The paper's parameters: felzenszwalb for 32-pixel images, LIME's default quickshift for ImageNet.

The grid of square cells is ours, for digits: felzenszwalb finds about three segments in one, background
included, which leaves a handful of different masked images and nothing for a linear model to miss.
"""


def default_segmentation(channels: int, size: int) -> str:
    """Return the superpixels that suit images: those of the paper for colour, square cells for gray digits."""
    if channels == 1:
        return "grid"
    return "felzenszwalb" if size < 64 else "quickshift"


def segment(image: np.ndarray | Tensor, method: str = "felzenszwalb", **parameters: float) -> np.ndarray:
    """Split a uint8 image (H, W), (H, W, 1) or (H, W, 3) into superpixels; one without structure is one, all zeros.

    A gray image is repeated to three channels first, as LIME does: the paper's thresholds are meant for three. The
    method is ``"felzenszwalb"`` (Felzenszwalb & Huttenlocher, 2004), ``"quickshift"`` (Vedaldi & Soatto, 2008), or
    ``"grid"``: square cells of ``cell`` pixels. Parameters replace the values in `SEGMENTATIONS`.
    """
    from skimage import segmentation

    choose(method, SEGMENTATIONS, "segmentation")
    for name in parameters:
        choose(name, SEGMENTATIONS[method], f"parameter of {method}")
    image, settings = check_image(image), SEGMENTATIONS[method] | parameters
    if method == "grid":
        check_at_least(1, cell=settings["cell"])
        rows, columns = (np.arange(side) // settings["cell"] for side in image.shape[:2])
        return rows[:, None] * (columns[-1] + 1) + columns
    if image.shape[2] == 1:
        image = np.repeat(image, 3, axis=2)
    return _consecutive(getattr(segmentation, method)(image, **settings))


def _consecutive(labels: np.ndarray) -> np.ndarray:
    return np.unique(labels, return_inverse=True)[1].reshape(labels.shape)


def check_at_least(least: int, **counts: int) -> None:
    """Raise `UserError` for a number that is too small."""
    for name, value in counts.items():
        if value < least:
            raise UserError(f"{name} is {value}; it must be at least {least}.")


def check_image(image: np.ndarray | Tensor) -> np.ndarray:
    """Return an image as a contiguous array (H, W, C), or raise `UserError`."""
    array = np.ascontiguousarray(image)
    if array.ndim == 2:
        array = array[..., None]
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] not in (1, 3):
        raise UserError(
            f"An image to explain is uint8 of shape (H, W), (H, W, 1) or (H, W, 3), got {array.dtype} of "
            f"shape {np.shape(image)}; give pixels in 0..255, channels last."
        )
    return array


def with_segments(
    images: Iterable, segments: Iterable[np.ndarray] | None, method: str
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield each image (H, W, C) and its superpixels, those given or, for None, those that the method finds.

    Raises:
        UserError: For one image where several are expected, or segments that do not fit.
    """
    choose(method, SEGMENTATIONS, "segmentation")
    if getattr(images, "ndim", None) == 3 and images.shape[2] in (1, 3):
        raise UserError(
            f"Images come as (N, H, W, C), got shape {tuple(images.shape)}; pass image[None] for one image."
        )
    given = None if segments is None else iter(segments)
    number = -1
    for number, image in enumerate(images):
        image = check_image(image)
        labels = segment(image, method) if given is None else next(given, None)
        if labels is None or np.shape(labels) != image.shape[:2]:
            raise UserError(
                f"Image {number} of shape {image.shape} has segments of shape {np.shape(labels)}; "
                "give one (H, W) array of segment numbers for each image."
            )
        yield image, _consecutive(np.asarray(labels))
    if number < 0:
        raise UserError("There is no image to explain; give at least one.")
