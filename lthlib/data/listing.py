"""The classes of images that lie together in one folder, as ImageNet's validation images do: from a list beside it."""

from __future__ import annotations

import csv
import io
import tarfile
from collections.abc import Collection, Sequence
from pathlib import PurePosixPath

from lthlib.core.errors import UserError, suggest
from lthlib.data.files import Files

DEVKIT = "ILSVRC2012_devkit_t12"
TRUTH, SYNSETS = "data/ILSVRC2012_validation_ground_truth.txt", "data/meta.mat"
KAGGLE = "LOC_val_solution.csv"
MEANINGS = ("# names", "# positions")

Entries = list[tuple[int, str, str]]
"""Lines of a list: number, image, class, as they are written."""


def listed_classes(files: Files, part: str, images: Sequence[str], classes: Sequence[str] | None) -> dict[str, str]:
    """Return the class of each image of a part (``val``, ``test``) that has no class folders.

    The first of these that lies beside the part's folder decides:

    * ``<part>.txt``: a line for each image, its file name and its class, all as names or all as positions (from 0)
      among the classes. Where both readings are possible and differ, a first line ``# names`` or ``# positions`` says
      which is meant;
    * ``LOC_val_solution.csv``, as Kaggle distributes ImageNet;
    * ``ILSVRC2012_devkit_t12.tar.gz`` or the folder unpacked from it, as image-net.org distributes it. An image's line
      there is the number in its name, so that images may be missing.

    Args:
        files: What holds the images and the list.
        part: The part's folder, with folders before its name.
        images: The images, with folders before the name.
        classes: Those of the training images, in the order of the labels; None where there are none.
    """
    top = part[: -len(PurePosixPath(part).name)]
    meant: dict[str, set[str]] = {}
    for image in images:
        place = PurePosixPath(image)
        for name in {image, place.name, place.stem, f"{place.parent.name}/{place.name}", f"./{place.name}"}:
            meant.setdefault(name, set()).add(image)
    written, kaggle = f"{part}.txt", top + KAGGLE
    path, lines = next(((path, files.lines(path)) for path in (written, kaggle) if files.has(path)), (None, []))
    path, entries = (path, _entries(lines, meant, f"{files.path}/{path}")) if path else _devkit(files, top, part, meant)
    where, found = f"{files.path}/{path}", {}
    for number, name, word in entries:
        word = word.split()[0] if path == kaggle else word
        if len(meant.get(name, ())) > 1:
            raise UserError(
                f"Line {number} of {where} may mean {' and '.join(sorted(meant[name]))}: write the whole name."
            )
        for image in meant.get(name, ()):
            if found.setdefault(image, word) != word:
                raise UserError(f"{where} lists {image} twice, as {found[image]!r} and in line {number} as {word!r}.")
    if path == written:
        found = _as_names(found, classes or (), lines[:1], where)
    if missing := [image for image in images if image not in found]:
        raise UserError(f"{where} does not list {missing[0]} ({len(missing):,} images of {len(images):,}).")
    for image, word in found.items() if classes is not None else ():
        if word not in classes:
            raise UserError(
                f"{where} says that {image} is of class {word!r}, of which there are no training images."
                f"{suggest(word, classes)}"
            )
    return found


def _entries(lines: Sequence[str], known: Collection[str], path: str) -> Entries:
    """Split each line into file name and class, at a comma, a tab or blanks; either may be quoted or have blanks."""
    found = []
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.startswith("#"):
            continue
        delimiter = next((mark for mark in ",\t" if mark in line), " ")
        words = [word.strip() for word in next(csv.reader([line], delimiter=delimiter, skipinitialspace=True))]
        if delimiter == " ":
            end = max((end for end in range(1, len(words)) if " ".join(words[:end]) in known), default=1)
            words = [" ".join(words[:end]), " ".join(words[end:])]
        if len(words) < 2 or not words[1]:
            raise UserError(f"Line {number} of {path} is {line[:80]!r}; a file name and its class are needed.")
        found.append((number, words[0], words[1]))
    return found


def _as_names(found: dict[str, str], classes: Sequence[str], first: Sequence[str], path: str) -> dict[str, str]:
    """Read the classes of a list as names, or as positions among the classes."""
    words, said = set(found.values()), first[0].strip().lower() if first else ""
    are_names, are_numbers = words <= set(classes), all(word.isdecimal() for word in words)
    if not classes or not words or said == MEANINGS[0] or not are_numbers:
        return found
    positions = {word: int(word) for word in words}
    fit = max(positions.values()) < len(classes)
    if are_names and not fit and said != MEANINGS[1]:
        return found
    if are_names and said != MEANINGS[1] and any(classes[position] != word for word, position in positions.items()):
        raise UserError(
            f"The classes in {path} may be names of class folders or positions among these, and the two differ: begin "
            f"it with a line {MEANINGS[0]!r} or {MEANINGS[1]!r}."
        )
    if not fit or 0 not in positions.values():
        image, word = max(found.items(), key=lambda item: positions[item[1]])
        raise UserError(
            f"{path} gives {image} the class {word}, and the least class is {min(positions.values())}; positions among "
            f"{len(classes)} classes begin at 0 and end at {len(classes) - 1}."
        )
    return {image: classes[positions[word]] for image, word in found.items()}


def _devkit(files: Files, top: str, part: str, known: Collection[str]) -> tuple[str, Entries]:
    """Return where ImageNet's development kit lies, packed or unpacked, and the lines of images with their names."""
    from scipy.io import loadmat

    folder = top + DEVKIT
    packed, unpacked = f"{folder}.tar.gz", [files.has(f"{folder}/{name}") for name in (TRUTH, SYNSETS)]
    path = packed if files.has(packed) and not all(unpacked) else folder
    if path == folder and not any(unpacked):
        raise UserError(
            f"{files.path}/{part} has images but no class folders. Put the list of their classes beside it: "
            f"{PurePosixPath(part).name}.txt (a line for each image: file name and class), {KAGGLE}, or "
            f"{DEVKIT}.tar.gz; or sort the images into folders named after the classes."
        )
    try:
        if path == folder:
            truth, synsets = (files.read(f"{folder}/{name}") for name in (TRUTH, SYNSETS))
        else:
            with tarfile.open(fileobj=io.BytesIO(files.read(path))) as archive:
                truth, synsets = (archive.extractfile(f"{DEVKIT}/{name}").read() for name in (TRUTH, SYNSETS))
        table = loadmat(io.BytesIO(synsets), squeeze_me=True)["synsets"]
        pairs = zip(table["ILSVRC2012_ID"].ravel(), table["WNID"].ravel(), strict=True)
        names = {str(int(number)): str(name) for number, name in pairs}
        lines = [line.strip() for line in truth.decode("utf-8-sig").splitlines()]
    except Exception as error:  # tarfile and scipy raise what damaged bytes lead them to
        raise UserError(
            f"{files.path}/{path} is damaged or lacks {TRUTH} or {SYNSETS} ({error}). Fetch it again."
        ) from error
    named = [(number, f"ILSVRC2012_val_{number:08d}", line) for number, line in enumerate(lines, start=1)]
    named = [entry for entry in named if entry[1] in known]
    for number, _, line in named:
        if line not in names:
            raise UserError(
                f"Line {number} of {TRUTH} in {files.path}/{path} is {line[:80]!r}, which is no class number of "
                f"{SYNSETS}."
            )
    return path, [(number, name, names[line]) for number, name, line in named]
