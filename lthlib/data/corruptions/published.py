"""The published files: CIFAR-10-C, CIFAR-100-C and ImageNet-C."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from lthlib.core.errors import UserError
from lthlib.data.corruptions.registry import SEVERITIES
from lthlib.data.files import Files, ImageFiles
from lthlib.data.images import OnDemand
from lthlib.data.sets import DataSet


def has_official(folder: Path, name: str) -> bool:
    """Tell whether a folder holds the published set of a corruption, as ``name.npy`` or as a folder ``name``."""
    return (folder / f"{name}.npy").is_file() or (folder / name).is_dir()


def official(folder: Path, name: str, severity: int, like: DataSet) -> OnDemand:
    """Return the published test images of a data set under a corruption, read when they are asked for.

    Args:
        folder: Holds ``name.npy``, uint8 (5 N, H, W, C) with severity 1 first, and ``labels.npy`` (CIFAR-10-C,
            CIFAR-100-C), or ``name/severity/class/*.JPEG`` (ImageNet-C).
        name: A name in `CORRUPTIONS`.
        severity: 1 to 5.
        like: The data set, whose test images these are, in the same order.

    Raises:
        UserError: For a file that is missing or damaged, and for files of other images.
    """
    is_array = (folder / f"{name}.npy").is_file()
    found = (_in_arrays if is_array else _in_folders)(folder, name, severity, like)
    if found is None or found.shape != tuple(like.test.pixels.shape):
        raise UserError(
            f"{folder} does not belong to {like.name}: number, labels or size of the images of {name} differ from the "
            f"{len(like.test):,} of the test set. Fetch the published files again, or move the folder away to generate."
        )
    return found


def _in_arrays(folder: Path, name: str, severity: int, like: DataSet) -> OnDemand | None:
    arrays = []
    for path in (folder / f"{name}.npy", folder / "labels.npy"):
        try:
            arrays.append(np.lib.format.open_memmap(path, mode="r"))
        except (ValueError, EOFError, OSError) as error:
            raise UserError(f"{path} is not a readable .npy file ({error}). Fetch it again.") from error
    images, labels = arrays
    every = np.tile(like.test.labels.numpy(), len(SEVERITIES))
    if images.dtype != np.uint8 or images.shape[:1] != every.shape or not np.array_equal(labels, every):
        return None
    first = (severity - 1) * len(like.test)
    return OnDemand(lambda at: np.array(images[at]), first + np.arange(len(like.test)), images.shape[1:])


def _in_folders(folder: Path, name: str, severity: int, like: DataSet) -> OnDemand | None:
    root = folder / name / str(severity)
    if not root.is_dir():
        raise UserError(f"{root} is missing. ImageNet-C lies there as class folders of JPEG files.")
    files, label_of = Files(root), {wnid: label for label, wnid in enumerate(like.classes)}
    listed = sorted((label_of.get(file.split("/")[0], -1), file) for file in files.images)
    if [label for label, _ in listed] != like.test.labels.tolist():
        return None
    return ImageFiles(files, [file for _, file in listed], "", "RGB").on_demand()
