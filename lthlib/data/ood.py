"""Out-of-distribution sets: images of none of a data set's classes, in its size and colours."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from lthlib.core.errors import Registry, UserError, suggest
from lthlib.core.store import Store
from lthlib.core.versions import code_version
from lthlib.data import folders
from lthlib.data.files import Files, ImageFiles, in_data_folder, names_in_data_folder
from lthlib.data.images import OnDemand, Pixels, taken
from lthlib.data.sets import DATASETS, DataSet, check_name, decoded, kept_part, store_name

OOD: Registry[Callable[[DataSet, int], Iterable[np.ndarray]]] = Registry("out-of-distribution set")
"""The out-of-distribution sets that are made or shipped, by name; see `ood_images`."""


def ood_set(name: str) -> Callable:
    """Register the decorated maker ``(like, n) -> n`` images, uint8 (H, W, C), as an out-of-distribution set."""

    def register(make: Callable) -> Callable:
        OOD[name] = make
        return make

    return register


def check_ood(name: str) -> None:
    """Raise `UserError` unless there is an out-of-distribution set of that name: in `OOD`, or a data set or folder."""
    check_name(name)
    if "@tail" in name:
        raise UserError(f"{name!r} is a choice of training images; an out-of-distribution set has no tail.")
    if name not in OOD and name not in DATASETS and in_data_folder(name.split("@")[0]) is None:
        known = [*OOD, *DATASETS, *names_in_data_folder()]
        raise UserError(f"Unknown out-of-distribution set {name!r}.{suggest(name, known)} Allowed: {', '.join(known)}.")


def ood_images(name: str, like: DataSet, n: int, store: Store) -> Pixels:
    """Return n out-of-distribution images of the same shape as a data set's, uint8 (n, H, W, C), made once and kept.

    Args:
        name: A name of `OOD`, of another data set, or of a folder or zip in ``$LTHLIB_DATA`` (its test images).
        like: The in-distribution data set, whose size and channels the images get.
        n: How many; a set that has fewer gives all it has.
        store: Where they are kept.
    """

    def make(folder: Path) -> None:
        images = OOD[name](like, n) if name in OOD else _fitted(name, like, n, store)
        with (folder / "pixels").open("wb") as file:
            for image in images:
                file.write(np.ascontiguousarray(image, np.uint8).data)
            if file.tell() == 0:
                raise UserError(f"The out-of-distribution set {name!r} has no images.")

    version = f"{like.digest}-{ood_version(name)}"
    path = store.get(f"ood/{store_name(like.name)}-{n}/{store_name(name)}", version, make) / "pixels"
    image_shape = (like.size, like.size, like.channels)
    shape = (path.stat().st_size // int(np.prod(image_shape)), *image_shape)
    if path.stat().st_size <= folders.HELD_UP_TO:
        return torch.from_numpy(np.fromfile(path, np.uint8).reshape(shape))
    return OnDemand(
        lambda positions: np.memmap(path, np.uint8, "r", shape=shape)[positions], np.arange(shape[0]), image_shape
    )


def ood_version(name: str) -> str:
    """Return what identifies an out-of-distribution set's images: the code that makes them, the files they are in."""
    check_ood(name)
    if name in OOD:
        return f"{name}-{code_version(ood_images, OOD[name])}"
    files = None if name in DATASETS else Files(in_data_folder(name.split("@")[0]))
    return code_version(ood_images) + ("" if files is None else f"-{files.stamp}")


def ood_classes(name: str, like: DataSet) -> tuple[str, ...]:
    """Return the classes that an out-of-distribution set is foreign *to*, or none where it is foreign to all.

    ImageNet-O sorts its images into folders named after 200 of ImageNet's classes: those that a network takes them
    for. Likewise any folder whose class folders all bear names of some of the data set's classes.
    """
    check_ood(name)
    if name in OOD or name in DATASETS:
        return ()
    _, inside, top = _files_of(name)
    classes = {file[len(top) :].partition("/")[0] for file in inside if "/" in file[len(top) :]}
    return tuple(sorted(classes)) if 2 <= len(classes) < len(like.classes) and classes <= set(like.classes) else ()


def fit(image: Image.Image, like: DataSet, box: tuple[int, int, int, int] | None = None) -> np.ndarray:
    """Return an image, or a box of it, in the size and colours of a data set, uint8 (H, W, C)."""
    image = image.resize((like.size, like.size), resample=2, box=box).convert("L" if like.channels == 1 else "RGB")
    return np.asarray(image).reshape(like.size, like.size, like.channels)


def _fitted(name: str, like: DataSet, n: int, store: Store) -> Iterator[np.ndarray]:
    """Yield n images of another set, spread over all of it (many sets are sorted by class), fitted to a data set."""
    if name in DATASETS:
        pixels = kept_part(name, decoded(name, store), "test").pixels
    else:
        files, inside, _ = _files_of(name)
        folders.say_what_is_left_out(files, {*files.images})
        pixels = ImageFiles(files, inside, name, "RGB")
    n = min(n, len(pixels))
    for batch in taken(pixels, torch.arange(n) * len(pixels) // n).split(64):
        for image in batch.numpy():
            yield fit(Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image), like)


def _files_of(name: str) -> tuple[Files, list[str], str]:
    """Return a folder or zip, the images in it that serve as out-of-distribution set, and the folder around them.

    All its images, wherever they lie, or those of its test or validation part where it has one.
    """
    files = Files(in_data_folder(name.split("@")[0]))
    top, parts = folders.find_parts(files)
    top += f"{parts['test']}/" if "test" in parts else ""
    return files, [file for file in files.images if file.startswith(top)], top
