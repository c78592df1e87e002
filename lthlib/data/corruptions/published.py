"""The published files: CIFAR-10-C, CIFAR-100-C and ImageNet-C."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from lthlib.core.errors import UserError, choose
from lthlib.data.corruptions.registry import CORRUPTIONS, SEVERITIES, check_images
from lthlib.data.files import Files, ImageFiles


def has_official(folder: str | Path, name: str) -> bool:
    """Tell whether ``folder`` holds the published set, as ``name.npy`` or as a folder ``name``."""
    choose(name, CORRUPTIONS, "corruption")
    return (Path(folder) / f"{name}.npy").is_file() or (Path(folder) / name).is_dir()


def load_official(folder: str | Path, name: str, severity: int, *, rows: int = 50_000) -> tuple[np.ndarray, np.ndarray]:
    """Read one severity from CIFAR-10-C or CIFAR-100-C; no other is read into memory.

    Args:
        folder: Holds ``name.npy``, uint8 (rows, H, W, C) with severity 1 first, and ``labels.npy``, (rows,),
            which repeats the labels of the test set for each severity.
        name: A name in `CORRUPTIONS`.
        severity: 1 to 5.
        rows: Rows of each file: 5 times the number of test images.

    Returns:
        Images, uint8 (rows / 5, H, W, C), and their labels, int64 (rows / 5,).

    Raises:
        UserError: For a missing or unreadable file, another number of rows, images or labels of another kind.
    """
    choose(name, CORRUPTIONS, "corruption")
    choose(severity, SEVERITIES, "severity")
    n = rows // len(SEVERITIES)
    paths = Path(folder) / f"{name}.npy", Path(folder) / "labels.npy"
    images, labels = (_map_array(path, rows)[(severity - 1) * n : severity * n] for path in paths)
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise UserError(f"{paths[1]} must hold 5 x n whole numbers, not {labels.dtype} {labels.shape}.")
    images = np.array(images)
    try:
        check_images(images)
    except UserError as error:
        raise UserError(f"{paths[0]}: {error} Fetch the published file again.") from None
    return images, np.array(labels, np.int64)


def _map_array(path: Path, rows: int) -> np.ndarray:
    if not path.is_file():
        raise UserError(f"{path} is missing. Put the published file there, or move the folder away to generate.")
    try:
        array = np.lib.format.open_memmap(path, mode="r")
    except (ValueError, EOFError, OSError) as error:
        raise UserError(f"{path} is not a readable .npy file ({error}). Fetch it again.") from error
    if array.shape[:1] != (rows,):
        raise UserError(
            f"{path} has {array.shape[0] if array.ndim else 0} rows where {rows:,} are expected (5 severities of "
            f"{rows / 5:,g} images). Put the whole published file there, or move the folder away to generate."
        )
    return array


def stream_official(
    folder: str | Path,
    name: str,
    severity: int,
    *,
    classes: Sequence[str],
    rows: int = 50_000,
    positions: np.ndarray | None = None,
    batch_size: int = 64,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Read one severity from ImageNet-C, batch by batch, in the order of class folder and file name.

    Args:
        folder: Holds ``name/severity/class/*.JPEG``; all images of one size (224 pixels as published).
        name: A name in `CORRUPTIONS`.
        severity: 1 to 5.
        classes: Class folders in the order of the labels.
        rows: Number of images of the severity.
        positions: Which of them to read, in this order; by default all.
        batch_size: Images held at a time.

    Returns:
        An iterator of images, uint8 (n, H, W, 3), and labels, int64 (n,). The folder is checked at once,
        before the first batch.

    Raises:
        UserError: For a missing folder or class, another number of images or classes, an image that cannot
            be read or has another size.
    """
    choose(name, CORRUPTIONS, "corruption")
    choose(severity, SEVERITIES, "severity")
    root = Path(folder) / name / str(severity)
    if not root.is_dir():
        raise UserError(f"{root} is missing. ImageNet-C lies there as class folders of JPEG files.")
    files = Files(root)
    found = {folder for folder in files.folders if "/" not in folder}
    if odd := sorted(found ^ set(classes))[:3]:
        raise UserError(
            f"{root} has {len(found)} class folders where {len(classes)} are expected; the two lists differ in "
            f"{', '.join(odd)}."
        )
    label_of = {wnid: label for label, wnid in enumerate(classes)}
    listed = sorted((label_of[file.split("/")[0]], file) for file in files.images if "/" in file)
    if len(listed) != rows:
        raise UserError(f"{root} has {len(listed):,} images where {rows:,} are expected.")
    labels, names = zip(*listed, strict=True)
    index = np.arange(rows) if positions is None else positions
    pixels = ImageFiles(files, names, "", "RGB").on_demand().at(torch.from_numpy(index))
    chosen = np.array(labels, np.int64)[index]
    starts = range(0, len(index), batch_size)
    batches = zip(pixels.split(batch_size), starts, strict=True)
    return ((images.numpy(), chosen[start : start + batch_size]) for images, start in batches)
