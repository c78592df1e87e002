"""The classes of images that lie together in one folder, as ImageNet's validation images do: from a list beside it."""

from __future__ import annotations

import csv
import io
import re
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import PurePosixPath

from lthlib.core.errors import UserError, suggest

DEVKIT = "ILSVRC2012_devkit_t12"
TRUTH, SYNSETS = "data/ILSVRC2012_validation_ground_truth.txt", "data/meta.mat"
KAGGLE = "LOC_val_solution.csv"
MEANINGS = ("# names", "# positions")

Read = Callable[[str], bytes | None]


def listed_classes(
    read: Read, part: str, files: Sequence[str], classes: Sequence[str] | None, where: str
) -> dict[str, str]:
    """Return the class of each image of a part (``val``, ``test``) that has no class folders.

    The first of these that lies beside the part's folder decides:

    * ``<part>.txt``: a line for each image, its file name and its class, all as names or all as positions (from 0)
      among the classes. Where both readings are possible and differ, a first line ``# names`` or ``# positions`` says
      which is meant;
    * ``LOC_val_solution.csv``, as Kaggle distributes ImageNet;
    * ``ILSVRC2012_devkit_t12.tar.gz`` or the folder unpacked from it, as image-net.org distributes it. An image's line
      there is the number in its name, so that images may be missing.

    Args:
        read: Returns the content of a file, or None where there is none of that name.
        part: The part's folder, with folders before its name.
        files: The images, with folders before the name.
        classes: Those of the training images, in the order of the labels; None where there are none.
        where: What holds the files, for messages.
    """
    top = part[: -len(PurePosixPath(part).name)]
    for path in (f"{part}.txt", top + KAGGLE):
        content = read(path)
        if content is not None:
            lines, path = lines_of(content, f"{where}/{path}"), f"{where}/{path}"
            found = dict(_entries(lines, files, path, first_word=path.endswith(KAGGLE)))
            if path.endswith(".txt"):
                found = _as_names(found, classes or (), lines[:1], path)
            return _of_each(files, found, classes, path)
    truth = _devkit(read, top, TRUTH, where)
    if truth is None:
        raise UserError(
            f"{where}/{part} has images but no class folders. Put the list of their classes beside it: "
            f"{PurePosixPath(part).name}.txt (a line for each image: file name and class), {KAGGLE}, or "
            f"{DEVKIT}.tar.gz; or sort the images into folders named after the classes."
        )
    path = f"{where}/{top}{DEVKIT}"
    found = _from_devkit(lines_of(truth, TRUTH), _devkit(read, top, SYNSETS, where), files, path)
    return _of_each(files, found, classes, path)


def lines_of(content: bytes, path: str) -> list[str]:
    """Return the lines of a text file, whatever they end in."""
    try:
        return content.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not a text file in UTF-8 ({error}). Save or fetch it again.") from error


def _entries(lines: Sequence[str], files: Sequence[str], path: str, first_word: bool) -> Iterator[tuple[str, str]]:
    """Yield (file, class as it is written) of each line ``file class`` or ``file,class`` about one of the files."""
    known: dict[str, set[str]] = {}
    for file in files:
        place = PurePosixPath(file)
        for name in {file, place.name, place.stem, f"{place.parent.name}/{place.name}", f"./{place.name}"}:
            known.setdefault(name, set()).add(file)
    seen: dict[str, str] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.startswith("#"):
            continue
        name, word = _split(line, known)
        if not word:
            raise UserError(f"Line {number} of {path} is {line[:80]!r}; a file name and its class are needed.")
        word = word.split()[0] if first_word else word
        meant = known.get(name, ())
        if len(meant) > 1:
            raise UserError(f"Line {number} of {path} may mean {' and '.join(sorted(meant))}: write the whole name.")
        for file in meant:
            if seen.setdefault(file, word) != word:
                raise UserError(f"{path} lists {file} twice, as {seen[file]!r} and in line {number} as {word!r}.")
            yield file, word


def _split(line: str, known: dict[str, set[str]]) -> tuple[str, str]:
    """Split a line into file name and class, at a comma, a tab or blanks; either may be quoted or have blanks in it."""
    delimiter = next((mark for mark in ",\t" if mark in line), " ")
    words = [word.strip() for word in next(csv.reader([line], delimiter=delimiter, skipinitialspace=True))]
    if delimiter != " ":
        return words[0], words[1]
    ends = [end for end in range(1, len(words)) if " ".join(words[:end]) in known]
    end = ends[-1] if ends else 1
    return " ".join(words[:end]), " ".join(words[end:])


def _as_names(found: dict[str, str], classes: Sequence[str], first: Sequence[str], path: str) -> dict[str, str]:
    """Read the classes of a list as names, or as positions among the classes."""
    if not classes:
        return found
    words, said = set(found.values()), first[0].strip().lower() if first else ""
    are_names, are_numbers = words <= set(classes), all(word.isdecimal() for word in words)
    positions = {word: int(word) for word in words} if are_numbers else {}
    fit = are_numbers and max(positions.values(), default=0) < len(classes)
    if said == MEANINGS[0] or not are_numbers or (are_names and not fit):
        return found
    if are_names and said != MEANINGS[1] and any(classes[position] != word for word, position in positions.items()):
        raise UserError(
            f"The classes in {path} may be names of class folders or positions among these, and the two differ: begin "
            f"it with a line {MEANINGS[0]!r} or {MEANINGS[1]!r}."
        )
    if not fit or 0 not in positions.values():
        file, word = max(found.items(), key=lambda item: positions[item[1]])
        raise UserError(
            f"{path} gives {file} the class {word}, and the least class is {min(positions.values())}; positions among "
            f"{len(classes)} classes begin at 0 and end at {len(classes) - 1}."
        )
    return {file: classes[positions[word]] for file, word in found.items()}


def _devkit(read: Read, top: str, name: str, where: str) -> bytes | None:
    """Return a file of the development kit, packed or unpacked."""
    content = read(f"{top}{DEVKIT}/{name}")
    packed = None if content is not None else read(f"{top}{DEVKIT}.tar.gz")
    if packed is None:
        return content
    try:
        with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
            return archive.extractfile(f"{DEVKIT}/{name}").read()
    except (tarfile.TarError, OSError, EOFError, KeyError, AttributeError) as error:
        raise UserError(
            f"{where}/{top}{DEVKIT}.tar.gz is damaged or lacks {DEVKIT}/{name} ({error}). Fetch it again."
        ) from error


def _from_devkit(lines: Sequence[str], synsets: bytes | None, files: Sequence[str], where: str) -> dict[str, str]:
    """Look up each image's line by the number in its name, and the WordNet name of the class number in that line."""
    names, found = _wordnet_names(synsets, where), {}
    for file in files:
        number = re.fullmatch(r"ILSVRC2012_val_(\d{8})", PurePosixPath(file).stem)
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
        found[file] = names[word]
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


def _of_each(files: Sequence[str], found: dict[str, str], classes: Sequence[str] | None, path: str) -> dict[str, str]:
    missing = [file for file in files if file not in found]
    if missing:
        raise UserError(f"{path} does not list {missing[0]} ({len(missing):,} images of {len(files):,}).")
    for file in files if classes is not None else ():
        if found[file] not in classes:
            raise UserError(
                f"{path} says that {file} is of class {found[file]!r}, of which there are no training images."
                f"{suggest(found[file], classes)}"
            )
    return found
