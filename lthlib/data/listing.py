"""The classes of images that lie together in one folder, as ImageNet's validation images do: from a list beside it."""

from __future__ import annotations

import io
import re
import tarfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import PurePosixPath

from lthlib.core.errors import UserError, suggest

DEVKIT = "ILSVRC2012_devkit_t12"
TRUTH, SYNSETS = "data/ILSVRC2012_validation_ground_truth.txt", "data/meta.mat"
KAGGLE = "LOC_val_solution.csv"

Read = Callable[[str], bytes | None]


def listed_classes(
    read: Read, part: str, files: Sequence[str], classes: Sequence[str] | None, where: str
) -> dict[str, str]:
    """Return the class of each image of a part (``val``, ``test``) that has no class folders.

    The first of these that lies beside the part's folder decides:

    * ``<part>.txt``: a line for each image, its file name and its class, as a name or as a position (from 0) among the
      sorted classes;
    * ``LOC_val_solution.csv``, as Kaggle distributes ImageNet;
    * ``ILSVRC2012_devkit_t12.tar.gz`` or the folder unpacked from it, as image-net.org distributes it. An image's line
      there is the number in its name, so that images may be missing.

    Args:
        read: Returns the content of a file beside the part's folder, or None where there is none.
        part: Name of the part's folder.
        files: The images, with or without folders before the name.
        classes: Those of the training images, sorted; None where there are none.
        where: The folder around the part's, for messages.

    Raises:
        UserError: Where no list is found, or one that is damaged, lacks an image, or names another class.
    """
    for name in (f"{part}.txt", KAGGLE):
        content = read(name)
        if content is not None:
            found = _from_lines(_text(content, f"{where}/{name}"), classes or (), f"{where}/{name}")
            return _of_each(files, found, classes, f"{where}/{name}")
    truth = _devkit(read, TRUTH, where)
    if truth is None:
        raise UserError(
            f"{where}/{part} has images but no class folders. Put the list of their classes into {where}: {part}.txt "
            f"(a line for each image: file name and class), {KAGGLE}, or {DEVKIT}.tar.gz; or sort the images into "
            "folders named after the classes."
        )
    found = _from_devkit(_text(truth, TRUTH), _devkit(read, SYNSETS, where), files, f"{where}/{DEVKIT}")
    return _of_each(files, found, classes, f"{where}/{DEVKIT}")


def _text(content: bytes, path: str) -> list[str]:
    try:
        return content.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not a text file ({error}). Fetch it again.") from error


def _from_lines(lines: Sequence[str], classes: Sequence[str], path: str) -> dict[str, str]:
    """Read ``file class ...`` or ``file,class ...`` a line, to {file name without suffix: class}."""
    found, known = {}, frozenset(classes)
    for number, line in enumerate(lines, start=1):
        words = re.split(r"[,\s]+", line.strip())
        if words == [""] or words[0] == "ImageId":
            continue
        if len(words) < 2 or not words[1]:
            raise UserError(f"Line {number} of {path} is {line[:80]!r}; a file name and its class are needed.")
        named = words[1] in known or not words[1].isdecimal() or not classes
        if not named and int(words[1]) >= len(classes):
            raise UserError(
                f"Line {number} of {path} has the class {words[1]}; positions among {len(classes)} classes end at "
                f"{len(classes) - 1}."
            )
        found[_stem(words[0])] = words[1] if named else classes[int(words[1])]
    return found


def _devkit(read: Read, name: str, where: str) -> bytes | None:
    """Return a file of the development kit, packed or unpacked."""
    content = read(f"{DEVKIT}/{name}")
    packed = None if content is not None else read(f"{DEVKIT}.tar.gz")
    if packed is None:
        return content
    try:
        with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
            return archive.extractfile(f"{DEVKIT}/{name}").read()
    except (tarfile.TarError, OSError, EOFError, KeyError, AttributeError) as error:
        raise UserError(
            f"{where}/{DEVKIT}.tar.gz is damaged or lacks {DEVKIT}/{name} ({error}). Fetch it again."
        ) from error


def _from_devkit(lines: Sequence[str], synsets: bytes | None, files: Sequence[str], where: str) -> dict[str, str]:
    """Look up each image's line by the number in its name, and the WordNet name of the class number in that line."""
    names, found = _wordnet_names(synsets, where), {}
    for file in files:
        number = re.fullmatch(r"ILSVRC2012_val_(\d{8})", _stem(file))
        if number is None or not 1 <= int(number[1]) <= len(lines):
            raise UserError(
                f"{file} has no line in {where}/{TRUTH}, which lists ILSVRC2012_val_00000001 to "
                f"ILSVRC2012_val_{len(lines):08d}."
            )
        word = lines[int(number[1]) - 1].strip()
        if word not in names:
            raise UserError(
                f"Line {int(number[1])} of {where}/{TRUTH} is {word[:80]!r}, which is no class number of {SYNSETS}."
            )
        found[_stem(file)] = names[word]
    return found


def _wordnet_names(synsets: bytes | None, where: str) -> dict[str, str]:
    """Return {class number as text: WordNet name} from ``meta.mat``."""
    from scipy.io import loadmat

    try:
        table = loadmat(io.BytesIO(synsets), squeeze_me=True)["synsets"]
        pairs = zip(table["ILSVRC2012_ID"].ravel(), table["WNID"].ravel(), strict=True)
        return {str(int(number)): str(name) for number, name in pairs}
    except Exception as error:  # scipy raises what the damaged bytes lead it to
        raise UserError(f"{where}/{SYNSETS} is missing or damaged ({error}). Fetch it again.") from error


def _of_each(
    files: Sequence[str], found: Mapping[str, str], classes: Sequence[str] | None, path: str
) -> dict[str, str]:
    missing = [file for file in files if _stem(file) not in found]
    if missing:
        raise UserError(f"{path} does not list {missing[0]} ({len(missing):,} images of {len(files):,}).")
    result = {file: found[_stem(file)] for file in files}
    known = frozenset(result.values() if classes is None else classes)
    for file, name in result.items():
        if name not in known:
            raise UserError(
                f"{path} says that {file} is of class {name!r}, of which there are no training images."
                f"{suggest(name, classes)}"
            )
    return result


def _stem(file: str) -> str:
    return PurePosixPath(file).stem
