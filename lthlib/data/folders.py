"""Folders and zips of class-named image folders as data sets."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np
from tqdm import tqdm

from lthlib.core.errors import UserError
from lthlib.core.store import say
from lthlib.data.files import SUFFIXES, ColourFoundError, Files, ImageFiles
from lthlib.data.images import OnDemand, stratified
from lthlib.data.listing import listed_classes

HELD_UP_TO = 2**30  # bytes of pixels; larger sets are read on demand
ORDER = "classes.txt"
PARTS = {"train": "train(ing)?", "validation": "val(id|idation)?|dev(elopment)?", "test": "test(ing)?"}


def part_named(folder: str) -> str | None:
    """Return the part ("train", "validation", "test") that a folder's name means, as ``Training`` or ``test_set``."""
    for part, words in PARTS.items():
        if re.fullmatch(rf"({words})[-_ ]?(set|data|images|split)?[-_ ]?\d*", folder.lower()):
            return part
    return None


def find_parts(files: Files) -> tuple[str, dict[str, str]]:
    """Return the folder around everything ("" or ending in /) and the folders in it of the parts of a data set.

    Validation images serve as test images where there are no others.
    """
    if not files.images:
        raise UserError(f"{files.path} has no images: it holds none of {', '.join(sorted(SUFFIXES))}.")
    top = ""
    while True:
        rest = [PurePosixPath(name[len(top) :]).parts for name in files.images]
        tops = {parts[0] for parts in rest if len(parts) > 1}
        if len(tops) > 1 or min(map(len, rest)) < 3 or part_named(*tops):
            break
        top += f"{tops.pop()}/"
    parts: dict[str, str] = {}
    for folder in sorted(tops):
        part = part_named(folder)
        if part in parts:
            raise UserError(f"{files.path}/{top} has two folders for the part {part}: {parts[part]} and {folder}.")
        if part is not None:
            parts[part] = folder
    others = sorted(tops - set(parts.values()))
    if parts and others and "train" not in parts:
        raise UserError(
            f"In {files.path}/{top} {next(iter(parts.values()))!r} names a part of a data set and {others[0]!r} does "
            "not: put classes into a folder train, and other images elsewhere."
        )
    if "test" not in parts and "validation" in parts:
        parts["test"] = parts.pop("validation")
    return top, parts


def load_folder(name: str, path: Path) -> tuple[dict[str, tuple[np.ndarray | OnDemand, np.ndarray]], list[str]]:
    """Return {"train": (pixels, labels), "test": ...} and the class names of a folder or zip.

    Its name is what the data set was asked for by, perhaps with @ and a size.
    """
    files = Files(path)
    labelled, classes = _labelled(files)
    say_what_is_left_out(files, {file for items in labelled.values() for file in items})
    try:
        pixels = _pixels({part: ImageFiles(files, [*items], name) for part, items in labelled.items()})
    except ColourFoundError:
        pixels = _pixels({part: ImageFiles(files, [*items], name, "RGB") for part, items in labelled.items()})
    return {part: (pixels[part], np.array([*items.values()])) for part, items in labelled.items()}, classes


def _pixels(parts: dict[str, ImageFiles]) -> dict[str, np.ndarray | OnDemand]:
    """Decode the parts that can be held in memory."""
    if len({images.mode for images in parts.values()}) > 1:
        raise ColourFoundError("one part has colour, another has none")
    found: dict[str, np.ndarray | OnDemand] = dict(parts)
    for part, images in parts.items():
        if math.prod(images.shape) <= HELD_UP_TO:
            found[part] = np.empty(images.shape, np.uint8)
            with tqdm(total=len(images), desc=f"reading {images.base}", unit="image", delay=2, leave=False) as bar:
                for start, batch in zip(range(0, len(images), 256), images.split(256), strict=True):
                    found[part][start : start + 256] = batch
                    bar.update(len(batch))
    return found


def say_what_is_left_out(files: Files, used: set[str]) -> None:
    """Tell the person about files that may be meant as images and are not used."""
    left = [name for name in files.images if name not in used]
    if left:
        say(f"{files.path}: {len(left):,} images lie in no class folder and are left out, {left[0]} first.")
    if files.not_read:
        say(
            f"{files.path}: {len(files.not_read):,} files are of a format that is not read and are left out, "
            f"{files.not_read[0]} first. Read are {', '.join(sorted(SUFFIXES))}."
        )


def _labelled(files: Files) -> tuple[dict[str, dict[str, int]], list[str]]:
    """Return {"train": {file: label}, "test": ...}, each in the order of the labels, and the class names."""
    top, parts = find_parts(files)
    classes, found = _given_order(files, top), {}
    for part, folder in [(part, f"{top}{parts[part]}/") for part in PARTS if part in parts] or [("all", top)]:
        is_flat = parts and not any(name.startswith(folder) for name in files.folders)
        class_of = (_by_list if is_flat else _by_folder)(files, folder, classes)
        classes = sorted(set(class_of.values())) if classes is None else classes
        label = {name: i for i, name in enumerate(classes)}
        items = sorted((label[group], file) for file, group in class_of.items())
        found[part] = {file: number for number, file in items}
    if parts:
        return found, classes
    _check_not_parts(files, top, class_of)
    pairs, labels = [*found["all"].items()], np.array([*found["all"].values()])
    try:
        first, rest = stratified(labels, round(0.8 * len(pairs)), seed=0)
    except UserError:
        rest = np.arange(0)
    if len(np.unique(labels[rest])) < len(classes):
        counts = np.bincount(labels)
        raise UserError(
            f"{files.path}/{top} cannot be split into images to train and to test with all of its {len(classes)} "
            f"classes on both sides: {classes[counts.argmin()]} has {counts.min()}. Add images, or make folders train "
            "and test."
        )
    return {"train": dict(pairs[i] for i in first), "test": dict(pairs[i] for i in rest)}, classes


def _given_order(files: Files, top: str) -> list[str] | None:
    """Return the class names in the order that ``classes.txt`` gives, or None where there is no such file."""
    if not files.has(top + ORDER):
        return None
    names = [line.strip() for line in files.lines(top + ORDER) if line.strip()]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(
            f"{files.path}/{top}{ORDER} names {twice!r} twice; it needs each class folder once, one a line."
        )
    return names


def _by_list(files: Files, folder: str, classes: Sequence[str] | None) -> dict[str, str]:
    """Return {file: class} of a part whose images lie together."""
    return listed_classes(files, folder.rstrip("/"), [n for n in files.images if n.startswith(folder)], classes)


def _by_folder(files: Files, folder: str, classes: Sequence[str] | None) -> dict[str, str]:
    """Return {file: class} of the images in the class folders in a folder."""
    below = {name: name[len(folder) :].partition("/") for name in files.images if name.startswith(folder)}
    found = {name: group for name, (group, slash, _) in below.items() if slash}
    inside = [name[len(folder) :] for name in files.folders if name.startswith(folder)]
    groups = sorted(name for name in inside if "/" not in name)
    where = f"{files.path}/{folder}"
    if empty := set(groups) - set(found.values()):
        raise UserError(f"The class folder {where}{min(empty)} has no images: fill it or remove it.")
    if len(groups) < 2:
        raise UserError(
            f"{where} has {len(groups)} class folder{'s' * (len(groups) != 1)}; a data set needs two at least, "
            f"one folder of images a class."
        )
    if classes is not None and (odd := sorted(set(groups) ^ set(classes))):
        raise UserError(
            f"{where} does not have the same classes as the training part or {ORDER}; see {', '.join(odd[:5])}."
        )
    return found


def _check_not_parts(files: Files, top: str, class_of: dict[str, str]) -> None:
    """Refuse folders that hold the same folders: they may be parts under other names, of the same classes."""
    around: dict[str, set[str]] = {}
    for name, group in class_of.items():
        folder, slash, _ = name[len(f"{top}{group}/") :].partition("/")
        if slash:
            around.setdefault(folder, set()).add(group)
    shared = sorted(folder for folder, groups in around.items() if len(groups) > 1)
    if len(shared) > 1:
        raise UserError(
            f"{' and '.join(sorted(around[shared[0]])[:2])} in {files.path}/{top} both hold folders "
            f"{', '.join(shared[:3])}: parts are called train, validation and test; where these are classes, put them "
            "into a folder train."
        )
