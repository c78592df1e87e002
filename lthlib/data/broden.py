"""Concept sets in the directory layout of Broden."""

from __future__ import annotations

import csv
import functools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from lthlib.core.errors import UserError
from lthlib.data.concepts import ConceptSet, Rows
from lthlib.data.files import Files, decode_image

CACHE_BYTES = 2**28
"""Decoded planes of a Broden folder are kept up to this size: null floors read them many times."""


def read_broden(path: str | Path) -> ConceptSet:
    """Read a concept set in the directory layout of Broden, from a folder or a zip of one.

    ``index.csv`` lists images (``image,split,ih,iw,sh,sw`` and one column per category), ``category.csv`` the
    categories, ``label.csv`` the labels, ``c_<category>.csv`` the labels of a category with their coverage.
    A category's cell holds mask files (label number = R + 256 G of a pixel) or numbers of labels that hold
    for the whole image, separated by ``;``. Files lie under ``images/`` and are read when they are needed.

    As in NetDissect-Lite, a label that several categories list belongs to the one where its coverage is
    largest (the last of equals), and images without a label in any of the categories are left out.

    Args:
        path: The folder that holds ``index.csv``, or a zip with that folder at its root or one level down.

    Source: bau2017network, section 2.1.
    """
    broden = _Broden(Path(path))
    categories = tuple(row["name"] for row in broden.table("category.csv", "name"))
    names = {
        _number(row["number"], "label.csv", i): row["name"]
        for i, row in enumerate(broden.table("label.csv", "number", "name"), 2)
    }
    primary = _primary_categories(broden, categories)
    numbers = sorted(primary.keys() & names.keys())
    lookup = np.full(max(2**16, *names, 0) + 1, -1, np.int64)  # a mask's pixel is below 2^16
    lookup[[0, *names]] = 0
    lookup[numbers] = 1 + np.arange(len(numbers))
    rows = _index_rows(broden, categories, lookup)
    planes = functools.partial(_planes, broden, rows, lookup)
    fits = sum(len(r.entries) * 4 * r.mask_shape[0] * r.mask_shape[1] for r in rows) <= CACHE_BYTES
    return ConceptSet(
        broden.path.stem,
        Rows(lambda i: broden.pixels(rows[i].image), len(rows)),
        Rows(functools.cache(planes) if fits else planes, len(rows)),
        tuple(names[n] for n in numbers),
        categories,
        np.array([primary[n] for n in numbers], int),
    )


class _Broden:
    """The tables and pictures of a folder or a zip, by their names relative to the folder of ``index.csv``."""

    def __init__(self, path: Path):
        self.path = path
        if not path.exists():
            raise UserError(f"{path} is neither a folder nor a zip; give the folder that holds index.csv.")
        self.files = Files(path)
        tops = ("", *(f"{folder}/" for folder in sorted(self.files.folders) if "/" not in folder))
        self.top = next((top for top in tops if self.files.has(f"{top}index.csv")), None)
        if self.top is None:
            raise UserError(f"{path} holds no index.csv; give the folder in Broden's layout itself.")

    def table(self, name: str, *columns: str) -> list[dict[str, str]]:
        if not self.files.has(self.top + name):
            raise UserError(f"{self.path} lacks {name}, a table of Broden's layout.")
        reader = csv.DictReader(self.files.lines(self.top + name))
        for column in columns:
            if column not in (reader.fieldnames or ()):
                raise UserError(f"{self.path}/{name} has no column {column!r}; Broden's layout needs it.")
        return list(reader)

    def picture(self, name: str) -> Image.Image:
        """Open a picture under ``images/`` without decoding it."""
        return self.files.open_image(f"{self.top}images/{name}")

    def pixels(self, name: str) -> np.ndarray:
        """Return a picture in colour, as it lies on its masks."""
        return np.asarray(decode_image(self.picture(name), "RGB", f"{self.path}/images/{name}", upright=False))


def _number(text: str, table: str, line: int) -> int:
    if not re.fullmatch(r"\d+", text or ""):
        raise UserError(f"{table}, line {line}: {text!r} is not a whole number.")
    return int(text)


def _primary_categories(broden: _Broden, categories: Sequence[str]) -> dict[int, int]:
    """Label number -> index of the category that covers most of it, the last of equals."""
    best: dict[int, tuple[float, int]] = {}
    for c, category in enumerate(categories):
        table = f"c_{category}.csv"
        for i, row in enumerate(broden.table(table, "number", "coverage"), 2):
            number = _number(row["number"], table, i)
            best[number] = max(best.get(number, (0.0, -1)), (float(row["coverage"] or 0), c))
    return {number: category for number, (_, category) in best.items()}


class _Row(NamedTuple):
    line: int
    image: str
    image_shape: tuple[int, int]
    mask_shape: tuple[int, int]
    entries: tuple[str | int, ...]


def _index_rows(broden: _Broden, categories: Sequence[str], lookup: np.ndarray) -> list[_Row]:
    sizes = ("ih", "iw", "sh", "sw")
    rows = []
    for line, row in enumerate(broden.table("index.csv", "image", *sizes, *categories), 2):
        ih, iw, sh, sw = (_number(row[key], "index.csv", line) for key in sizes)
        cells = [cell for c in categories for cell in (row[c] or "").split(";") if cell]
        entries = tuple(int(cell) if cell.isdigit() else cell for cell in cells)
        if any(entries):
            rows.append(_Row(line, row["image"], (ih, iw), (sh, sw), entries))
            _check_row(broden, rows[-1], rows[0], lookup)
    if not rows:
        raise UserError(f"No row of {broden.path}/index.csv has a label in: {', '.join(categories)}.")
    return rows


def _check_row(broden: _Broden, row: _Row, first: _Row, lookup: np.ndarray) -> None:
    where = f"index.csv, line {row.line}"
    if row[2:4] != first[2:4]:
        raise UserError(
            f"{where} ({row.image}): sizes {row.image_shape} and {row.mask_shape} differ from those of line "
            f"{first.line}, {first.image_shape} and {first.mask_shape}; a set has one size of each."
        )
    expected = {row.image: row.image_shape} | {e: row.mask_shape for e in row.entries if isinstance(e, str)}
    for name, shape in expected.items():
        if not broden.files.has(f"{broden.top}images/{name}"):
            raise UserError(f"{where}: images/{name} does not exist.")
        width, height = broden.picture(name).size
        if (height, width) != shape:
            raise UserError(f"{where}: images/{name} is {height}x{width}, the row says {shape[0]}x{shape[1]}.")
    for number in row.entries:
        if isinstance(number, int) and (number >= len(lookup) or lookup[number] < 0):
            raise UserError(f"{where} ({row.image}): label {number} is not in label.csv.")


def _planes(broden: _Broden, rows: list[_Row], lookup: np.ndarray, i: int) -> np.ndarray:
    """Return the label planes of the i-th image, int32 (D, h, w)."""
    planes = np.empty((len(rows[i].entries), *rows[i].mask_shape), np.int32)
    for plane, entry in zip(planes, rows[i].entries, strict=True):
        plane[:] = lookup[entry] if isinstance(entry, int) else _mask(broden, rows[i], entry, lookup)
    return planes


def _mask(broden: _Broden, row: _Row, name: str, lookup: np.ndarray) -> np.ndarray:
    where, picture = f"index.csv, line {row.line}: images/{name}", broden.picture(name)
    if picture.mode not in ("RGB", "RGBA"):
        raise UserError(f"{where} has mode {picture.mode}; a mask is an RGB picture, label number = R + 256 G.")
    try:
        pixels = np.asarray(picture).astype(np.int64)
    except Exception as error:  # Pillow raises what damaged bytes lead it to
        raise UserError(f"{where} is not a readable image ({error}). Fetch it again.") from error
    numbers = pixels[..., 0] + 256 * pixels[..., 1]
    if (lookup[numbers] < 0).any():
        raise UserError(f"{where} holds label {numbers[lookup[numbers] < 0][0]}, which is not in label.csv.")
    return lookup[numbers]
