"""Folders and zips of class-named image folders as data sets."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np
from tqdm import tqdm

from lthlib.core.errors import UserError
from lthlib.core.store import say
from lthlib.data.files import SUFFIXES, ColourFoundError, Files, ImageFiles
from lthlib.data.images import OnDemand, stratified
from lthlib.data.listing import lines_of, listed_classes

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
    say_what_is_left_out(files, {file for items in labelled.values() for file, _ in items})
    names = {part: [file for file, _ in items] for part, items in labelled.items()}
    try:
        pixels = _pixels({part: ImageFiles(files, listed, name) for part, listed in names.items()})
    except ColourFoundError:
        pixels = _pixels({part: ImageFiles(files, listed, name, "RGB") for part, listed in names.items()})
    return {part: (pixels[part], np.array([label for _, label in items])) for part, items in labelled.items()}, classes


def _pixels(readers: dict[str, ImageFiles]) -> dict[str, np.ndarray | OnDemand]:
    if len({reader.mode for reader in readers.values()}) > 1:
        raise ColourFoundError("one part has colour, another has none")
    return {
        part: _decoded(reader) if reader.n_bytes <= HELD_UP_TO else reader.on_demand()
        for part, reader in readers.items()
    }


def _decoded(reader: ImageFiles) -> np.ndarray:
    """Decode all files to one uint8 array (N, H, W, C)."""
    pixels = np.empty((len(reader.names), *reader.shape), np.uint8)
    with tqdm(total=len(pixels), desc=f"reading {reader.base}", unit="image", delay=2, leave=False) as bar:
        for start in range(0, len(pixels), 256):
            part = np.arange(start, min(start + 256, len(pixels)))
            pixels[part] = reader(part)
            bar.update(len(part))
    return pixels


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


def _labelled(files: Files) -> tuple[dict[str, list[tuple[str, int]]], list[str]]:
    """Return {"train": [(file, label)], "test": ...} and the class names."""
    top, parts = find_parts(files)
    classes = _given_order(files, top)
    if not parts:
        groups = _by_class(files, top, classes)
        _check_not_parts(files, top, groups)
        pairs = [(file, label) for label, group in enumerate(groups.values()) for file in group]
        labels = np.array([label for _, label in pairs])
        try:
            first, rest = stratified(labels, round(0.8 * len(pairs)), seed=0)
        except UserError:
            rest = np.arange(0)
        if few := set(range(len(groups))) - set(labels[rest]):
            smallest = min(((len(groups[c]), c) for i, c in enumerate(groups) if i in few))
            raise UserError(
                f"{files.path}/{top} cannot be split into images to train and to test with all of its {len(groups)} "
                f"classes on both sides: {smallest[1]} has {smallest[0]}. Add images, or make folders train and test."
            )
        return {"train": [pairs[i] for i in first], "test": [pairs[i] for i in rest]}, list(groups)
    found = {}
    for part in (part for part in PARTS if part in parts):
        folder = f"{top}{parts[part]}/"
        is_flat = not any(name.startswith(folder) for name in files.folders)
        groups = (_by_list if is_flat else _by_class)(files, folder, classes)
        classes = list(groups)
        found[part] = [(file, label) for label, group in enumerate(groups.values()) for file in group]
    return found, classes


def _given_order(files: Files, top: str) -> list[str] | None:
    """Return the class names in the order that ``classes.txt`` gives, or None where there is no such file."""
    content = files.maybe(top + ORDER)
    if content is None:
        return None
    names = [line.strip() for line in lines_of(content, f"{files.path}/{top}{ORDER}") if line.strip()]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(
            f"{files.path}/{top}{ORDER} names {twice!r} twice; it needs each class folder once, one a line."
        )
    return names


def _by_list(files: Files, folder: str, classes: list[str] | None) -> dict[str, list[str]]:
    """Return {class: files} of a part whose images lie together, in the order that class folders would have."""
    names = [name for name in files.images if name.startswith(folder)]
    found = listed_classes(files.maybe, folder.rstrip("/"), names, classes, str(files.path))
    groups = {group: [] for group in (sorted(set(found.values())) if classes is None else classes)}
    for name in names:
        groups[found[name]].append(name)
    return groups


def _by_class(files: Files, folder: str, classes: Sequence[str] | None) -> dict[str, list[str]]:
    """Return {class: files} of the class folders in a folder, in the order of the classes or of their names."""
    inside = (name[len(folder) :] for name in files.folders if name.startswith(folder))
    groups: dict[str, list[str]] = {name: [] for name in sorted(inside) if "/" not in name}
    for name in files.images:
        group, below, _ = name[len(folder) :].partition("/")
        if name.startswith(folder) and below:
            groups[group].append(name)
    where = f"{files.path}/{folder}"
    for group, found in groups.items():
        if not found:
            raise UserError(f"The class folder {where}{group} has no images: fill it or remove it.")
    if len(groups) < 2:
        raise UserError(
            f"{where} has {len(groups)} class folder{'s' * (len(groups) != 1)}; a data set needs two at least, "
            f"one folder of images a class."
        )
    if classes is None:
        return groups
    if odd := sorted(set(groups) ^ set(classes)):
        raise UserError(
            f"{where} does not have the same classes as the training part or {ORDER}; see {', '.join(odd[:5])}."
        )
    return {group: groups[group] for group in classes}


def _check_not_parts(files: Files, top: str, groups: dict[str, list[str]]) -> None:
    """Refuse folders that hold the same folders: they may be parts under other names, of the same classes."""
    inside: dict[str, list[str]] = {}
    for group, names in groups.items():
        below = {name[len(f"{top}{group}/") :].partition("/") for name in names}
        for folder in {folder for folder, slash, _ in below if slash}:
            inside.setdefault(folder, []).append(group)
    shared = sorted(folder for folder, around in inside.items() if len(around) > 1)
    if len(shared) > 1:
        raise UserError(
            f"{' and '.join(inside[shared[0]][:2])} in {files.path}/{top} both hold folders {', '.join(shared[:3])}: "
            "parts are called train, validation and test; where these are classes, put them into a folder train."
        )
