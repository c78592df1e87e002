"""Test images under the corruptions of `lthlib.data.corruptions`: made here once and kept, or the published files.

Where the published files lie in the data folder (``CIFAR-10-C``, ``CIFAR-100-C``, ``ImageNet-C``), these are read: as
``name.npy``, uint8 (5 N, H, W, C) with severity 1 first, beside ``labels.npy``, or ``name/severity/class/*.JPEG``.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from lthlib import data
from lthlib.core.errors import UserError, choose
from lthlib.core.store import Store
from lthlib.core.versions import code_version
from lthlib.data.corruptions import CORRUPTIONS, SEVERITIES, common, corrupt
from lthlib.data.files import Files, ImageFiles
from lthlib.data.images import OnDemand
from lthlib.data.sets import store_name

PIECE = 250  # corrupted images made or read at a time
KEPT_UP_TO = 2**28  # bytes of one corruption's images; more are made again for each ticket, batch by batch
OFFICIAL = {"cifar10": ("CIFAR-10-C", 32), "cifar100": ("CIFAR-100-C", 32), "imagenet": ("ImageNet-C", 224)}


def sample(labels: torch.Tensor, n: int) -> torch.Tensor:
    """Return the positions of n images, ascending, every class in proportion; of all where there are not more.

    Evenly spaced in the order by class: many sets are sorted by class, and their first n images are all alike.
    """
    if n < 1:
        raise UserError(f"{n} images are asked for; at least 1 is needed.")
    n = min(n, len(labels))
    return labels.argsort(stable=True)[torch.arange(n) * len(labels) // n].sort().values


def corruption_names(extra: bool) -> tuple[str, ...]:
    """Return the names of the 15 common corruptions, or with the extra ones of all that are registered."""
    return tuple(CORRUPTIONS) if extra else common()


def official_folder(like: data.DataSet, name: str) -> Path | None:
    """Return the folder in the data folder that holds the published files of a corruption of a data set, if any."""
    folder, size = OFFICIAL.get(like.name.split("@")[0], ("", 0))
    root = data.data_folder() / folder
    is_there = (root / f"{name}.npy").is_file() or (root / name).is_dir()
    return root if folder and like.size == size and is_there else None


def corrupted_parts(
    like: data.DataSet, name: str, n: int, store: Store, severities: Sequence[int] = SEVERITIES
) -> Iterator[tuple[int, int, torch.Tensor]]:
    """Yield the sampled test images under a corruption, in parts that fit in memory.

    They are made once and kept in the store, unless they are larger than `KEPT_UP_TO`: then each caller makes them
    again, a batch at a time.

    Args:
        like: The data set; ``sample(like.test.labels, n)`` of its test images are taken.
        name: A name in `lthlib.data.corruptions.CORRUPTIONS`.
        n, store: How many, and where they are kept.
        severities: Consecutive ones.

    Yields:
        The first severity of the part, how many images of each severity it has, and its pixels, uint8
        (severities x count, H, W, C), severity by severity.
    """
    choose(name, CORRUPTIONS, "corruption")
    positions = sample(like.test.labels, n).numpy()
    shape = (len(SEVERITIES), len(positions), *like.test.pixels.shape[1:])
    if math.prod(shape) > KEPT_UP_TO:
        for severity, pixels in _batches(like, name, severities, positions):
            yield severity, len(pixels), torch.from_numpy(pixels)
        return

    def make(folder: Path) -> None:
        made = _batches(like, name, SEVERITIES, positions)
        write_array(folder / "pixels.npy", np.uint8, shape, ((severity - 1, pixels) for severity, pixels in made))

    key = f"corrupted/{store_name(like.name)}-{len(positions)}/{name}"
    folder = store.get(key, f"{like.digest}-{corrupted_version(like, name)}", make)
    pixels = np.load(folder / "pixels.npy", mmap_mode="c")[severities[0] - 1 : severities[-1]]
    yield severities[0], len(positions), torch.from_numpy(pixels.reshape(-1, *shape[2:]))


def write_array(path: Path, dtype: type, shape: tuple[int, ...], parts: Iterable[tuple[int, np.ndarray]]) -> None:
    """Write an array that need not fit in memory to a ``.npy`` file.

    `numpy.save` does not say when a disk is full, and a mapping that the disk cannot take is fatal. The parts, (index
    along the first axis, what comes next there), fill the shape; more than fits goes on at the next index.
    """
    row, written = math.prod(shape[1:]) * np.dtype(dtype).itemsize, Counter()
    with path.open("wb") as file:
        header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        start = file.tell()
        for index, part in parts:
            file.seek(start + index * row + written[index])
            written[index] += file.write(np.ascontiguousarray(part, dtype).data)


def corrupted_version(like: data.DataSet, name: str) -> str:
    """Return what identifies a data set's images under a corruption: code and files they come from."""
    folder = official_folder(like, name)
    if folder is None:
        return code_version(sample, _batches, CORRUPTIONS[name].function)
    files = [path for path in (folder / f"{name}.npy", folder / "labels.npy", folder / name) if path.exists()]
    facts = " ".join(f"{p.name}:{p.stat().st_size}:{p.stat().st_mtime_ns}" for p in files)
    return f"{code_version(sample, _batches)}-{hashlib.sha256(facts.encode()).hexdigest()[:12]}"


def _batches(
    like: data.DataSet, name: str, severities: Sequence[int], positions: np.ndarray
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (severity, uint8 (m, H, W, C)), for each severity the test images at the positions, in their order."""
    folder = official_folder(like, name)
    if folder is not None:
        for severity in severities:
            pixels = official(folder, name, severity, like).at(torch.from_numpy(positions))
            yield from ((severity, part.numpy()) for part in pixels.split(PIECE))
        return
    start = 0
    for batch in like.test.subset(torch.from_numpy(positions)).pixels.split(PIECE):
        for severity in severities:
            yield severity, corrupt(batch.numpy(), name, severity, start=start)
        start += len(batch)


def official(folder: Path, name: str, severity: int, like: data.DataSet) -> OnDemand:
    """Return the published test images of a data set under a corruption, in its order, read when they are asked for.

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


def _in_arrays(folder: Path, name: str, severity: int, like: data.DataSet) -> OnDemand | None:
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


def _in_folders(folder: Path, name: str, severity: int, like: data.DataSet) -> OnDemand | None:
    root = folder / name / str(severity)
    if not root.is_dir():
        raise UserError(f"{root} is missing. ImageNet-C lies there as class folders of JPEG files.")
    files, label_of = Files(root), {wnid: label for label, wnid in enumerate(like.classes)}
    listed = sorted((label_of.get(file.split("/")[0], -1), file) for file in files.images)
    if [label for label, _ in listed] != like.test.labels.tolist():
        return None
    return ImageFiles(files, [file for _, file in listed], "", "RGB")
