"""Labelled concepts to hold a unit against: the Broden layout from disk, and generated scenes.

A concept set pairs images with *label planes*: maps of label numbers at mask resolution, 0 where nothing
is labelled. An image may have several planes (a pixel is red, striped and part of a disc at once); a label
that holds for a whole image is a plane filled with one number.
"""

from __future__ import annotations

import csv
import io
import re
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lthlib.core.errors import UserError, choose

BRODEN_QUANTILE = 0.005
"""Of NetDissect: most labels of Broden cover less than a hundredth of its pixels (bau2017network)."""

SCENES_QUANTILE = 0.02
"""Labels of the scenes cover 1 to 20 %: at 0.005 a perfect detector of a colour or a texture would end near
the usual limit of 0.04, at 0.04 chance would reach it; at 0.02 chance gives about 0.017."""

CACHE_BYTES = 2**28
"""Decoded planes of a Broden folder are kept up to this size: null floors read them many times."""


@dataclass(frozen=True)
class ConceptSet:
    """Images and the concepts that are visible in them.

    Attributes:
        name: What to call it in rows and captions.
        images: uint8, ``images[a:b]`` is an array (b - a, H, W, C); an array, or read from disk on demand.
        planes: ``planes[i]`` is an integer array (D_i, h, w): 0, or 1 + the index of a label.
        labels: Names of the L labels.
        categories: Names of the categories ("colour", "object", ...).
        category_of: Index of each label's category, (L,).
        quantile: Fraction of a unit's activations above its threshold that suits the labels: a unit active in
            a fraction q of the pixels has an IoU of at most min(q, a) / max(q, a) with a label that covers a.
    """

    name: str
    images: Sequence
    planes: Sequence
    labels: tuple[str, ...]
    categories: tuple[str, ...]
    category_of: np.ndarray
    quantile: float = BRODEN_QUANTILE

    def __len__(self) -> int:
        """Number of images."""
        return len(self.images)

    @property
    def mask_shape(self) -> tuple[int, int]:
        """Height and width of the label planes."""
        return tuple(self.planes[0].shape[-2:])

    def index(self, label: str) -> int:
        """Return the index of a label.

        Raises:
            UserError: If there is no such label, with the nearest name.
        """
        choose(label, self.labels, "concept")
        return self.labels.index(label)

    def mask(self, label: str | int) -> np.ndarray:
        """Return where a label holds, bool (N, h, w)."""
        number = 1 + (self.index(label) if isinstance(label, str) else label)
        return np.stack([(self.planes[i] == number).any(0) for i in range(len(self))])

    def areas(self) -> np.ndarray:
        """Return how many pixels of the whole set each label covers, int64 (L,)."""
        total = np.zeros(len(self.labels), np.int64)
        for i in range(len(self)):
            numbers, masks = present(self.planes[i])
            total[numbers - 1] += masks.sum((1, 2))
        return total

    def subset(self, indices: Sequence[int] | np.ndarray) -> ConceptSet:
        """Return the set of some of the images, in the given order, with the same labels."""
        indices = np.arange(len(self))[indices]
        return ConceptSet(
            self.name,
            _Picked(self.images, indices),
            _Picked(self.planes, indices),
            self.labels,
            self.categories,
            self.category_of,
            self.quantile,
        )


def present(planes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the label numbers (P,) that occur in planes (D, ...) and where, bool (P, ...).

    A label on two planes of one pixel counts once.
    """
    numbers = np.flatnonzero(np.bincount(planes.ravel()))
    numbers = numbers[numbers > 0]
    masks = np.zeros((len(numbers), *planes.shape[1:]), bool)
    for plane in planes:
        masks |= plane == numbers.reshape(-1, *[1] * plane.ndim)
    return numbers, masks


class _Rows(Sequence):
    """A sequence whose slices are stacked arrays; subclasses say how to read one row."""

    def __getitem__(self, key):
        if isinstance(key, slice):
            return np.stack([self.row(i) for i in range(*key.indices(len(self)))])
        return self.row(range(len(self))[key])


class _Picked(_Rows):
    """Some rows of another sequence."""

    def __init__(self, rows: Sequence, indices: np.ndarray):
        self.rows, self.indices = rows, indices

    def __len__(self) -> int:
        return len(self.indices)

    def row(self, i: int) -> np.ndarray:
        return self.rows[int(self.indices[i])]


# --- the Broden layout -----------------------------------------------------------------------------------


def read_broden(path: str | Path, categories: Sequence[str] | None = None) -> ConceptSet:
    """Read a concept set in the directory layout of Broden, from a folder or a zip of one.

    ``index.csv`` lists images (``image,split,ih,iw,sh,sw`` and one column per category), ``category.csv`` the
    categories, ``label.csv`` the labels, ``c_<category>.csv`` the labels of a category with their coverage.
    A category's cell holds mask files (label number = R + 256 G of a pixel) or numbers of labels that hold
    for the whole image, separated by ``;``. Files lie under ``images/`` and are read when they are needed.

    As in NetDissect-Lite, a label that several categories list belongs to the one where its coverage is
    largest (the last of equals), and images without a label in any of the categories are left out.

    Args:
        path: The folder that holds ``index.csv``, or a zip with that folder at its root or one level down.
        categories: Use only these; None uses every row of ``category.csv``.

    Raises:
        UserError: If a table or a category is missing or malformed, if a file that a row names does not
            exist or has another size than the row says, or (when it is read) if a mask holds a number that
            ``label.csv`` does not; the row and the file are named.

    Source: bau2017network, section 2.1.
    """
    files = _Files(Path(path))
    listed = [row["name"] for row in files.table("category.csv", "name")]
    for name in categories or ():
        choose(name, listed, "category of " + files.name)
    categories = tuple(c for c in listed if categories is None or c in categories)
    names = {
        _number(row["number"], "label.csv", i): row["name"]
        for i, row in enumerate(files.table("label.csv", "number", "name"), 2)
    }
    primary = _primary_categories(files, categories)
    numbers = sorted(primary.keys() & names.keys())
    lookup = np.full(max(names, default=0) + 1, -1, np.int64)
    lookup[[0, *names]] = 0
    lookup[numbers] = 1 + np.arange(len(numbers))
    rows = _index_rows(files, categories, lookup)
    return ConceptSet(
        files.name,
        _BrodenImages(files, rows),
        _BrodenPlanes(files, rows, lookup),
        tuple(names[n] for n in numbers),
        categories,
        np.array([primary[n] for n in numbers], int),
    )


class _Files:
    """The files of a folder or a zip, by their names relative to the folder of ``index.csv``."""

    def __init__(self, path: Path):
        self.name = path.stem
        self.path = path
        if path.is_dir():
            self.zip, self.prefix = None, ""
        elif zipfile.is_zipfile(path):
            self.zip = zipfile.ZipFile(path)
            roots = [n for n in self.zip.namelist() if re.fullmatch(r"([^/]+/)?index\.csv", n)]
            self.prefix = min(roots, key=len).removesuffix("index.csv") if roots else ""
            self.members = set(self.zip.namelist())
        else:
            raise UserError(f"{path} is neither a folder nor a zip; give the folder that holds index.csv.")
        if not self.exists("index.csv"):
            raise UserError(f"{path} holds no index.csv; give the folder in Broden's layout itself.")

    def exists(self, name: str) -> bool:
        return self.prefix + name in self.members if self.zip else (self.path / name).is_file()

    def open(self, name: str):
        return self.zip.open(self.prefix + name) if self.zip else open(self.path / name, "rb")

    def table(self, name: str, *columns: str) -> list[dict[str, str]]:
        if not self.exists(name):
            raise UserError(f"{self.path} lacks {name}, a table of Broden's layout.")
        with self.open(name) as file:
            reader = csv.DictReader(io.TextIOWrapper(file, "utf-8-sig", newline=""))
            rows = list(reader)
        for column in columns:
            if column not in (reader.fieldnames or ()):
                raise UserError(f"{self.path}/{name} has no column {column!r}; Broden's layout needs it.")
        return rows

    def picture(self, name: str):
        """Open a picture under ``images/`` without decoding it."""
        from PIL import Image

        if not self.zip:
            return Image.open(self.path / "images" / name)
        return Image.open(io.BytesIO(self.zip.read(f"{self.prefix}images/{name}")))


def _number(text: str, table: str, line: int) -> int:
    if not re.fullmatch(r"\d+", text or ""):
        raise UserError(f"{table}, line {line}: {text!r} is not a whole number.")
    return int(text)


def _primary_categories(files: _Files, categories: Sequence[str]) -> dict[int, int]:
    """Label number -> index of the category that covers most of it, the last of equals."""
    best: dict[int, tuple[float, int]] = {}
    for c, category in enumerate(categories):
        table = f"c_{category}.csv"
        for i, row in enumerate(files.table(table, "number", "coverage"), 2):
            number = _number(row["number"], table, i)
            best[number] = max(best.get(number, (0.0, -1)), (float(row["coverage"] or 0), c))
    return {number: category for number, (_, category) in best.items()}


@dataclass(frozen=True)
class _Row:
    line: int
    image: str
    image_shape: tuple[int, int]
    mask_shape: tuple[int, int]
    entries: tuple[str | int, ...]


def _index_rows(files: _Files, categories: Sequence[str], lookup: np.ndarray) -> list[_Row]:
    sizes = ("ih", "iw", "sh", "sw")
    rows = []
    for line, row in enumerate(files.table("index.csv", "image", *sizes, *categories), 2):
        ih, iw, sh, sw = (_number(row[key], "index.csv", line) for key in sizes)
        cells = [cell for c in categories for cell in (row[c] or "").split(";") if cell]
        entries = tuple(int(cell) if cell.isdigit() else cell for cell in cells)
        if any(entries):
            rows.append(_Row(line, row["image"], (ih, iw), (sh, sw), entries))
    if not rows:
        raise UserError(f"No row of {files.path}/index.csv has a label in: {', '.join(categories)}.")
    for row in rows:
        _check_row(files, row, rows[0], lookup)
    return rows


def _check_row(files: _Files, row: _Row, first: _Row, lookup: np.ndarray) -> None:
    where = f"index.csv, line {row.line}"
    if (row.image_shape, row.mask_shape) != (first.image_shape, first.mask_shape):
        raise UserError(
            f"{where} ({row.image}): sizes {row.image_shape} and {row.mask_shape} differ from those of line "
            f"{first.line}, {first.image_shape} and {first.mask_shape}; a set has one size of each."
        )
    expected = {row.image: row.image_shape} | {e: row.mask_shape for e in row.entries if isinstance(e, str)}
    for name, shape in expected.items():
        if not files.exists(f"images/{name}"):
            raise UserError(f"{where}: images/{name} does not exist.")
        with files.picture(name) as picture:
            if picture.size[::-1] != shape:
                raise UserError(
                    f"{where}: images/{name} is {picture.size[1]}x{picture.size[0]}, the row says "
                    f"{shape[0]}x{shape[1]}."
                )
    for number in row.entries:
        if isinstance(number, int) and (number >= len(lookup) or lookup[number] < 0):
            raise UserError(f"{where} ({row.image}): label {number} is not in label.csv.")


class _BrodenImages(_Rows):
    def __init__(self, files: _Files, rows: list[_Row]):
        self.files, self.rows = files, rows

    def __len__(self) -> int:
        return len(self.rows)

    def row(self, i: int) -> np.ndarray:
        with self.files.picture(self.rows[i].image) as picture:
            return np.asarray(picture.convert("RGB"))


class _BrodenPlanes(_Rows):
    def __init__(self, files: _Files, rows: list[_Row], lookup: np.ndarray):
        self.files, self.rows, self.lookup = files, rows, lookup
        size = sum(len(r.entries) * 4 * r.mask_shape[0] * r.mask_shape[1] for r in rows)
        self.cache: dict[int, np.ndarray] | None = {} if size <= CACHE_BYTES else None

    def __len__(self) -> int:
        return len(self.rows)

    def row(self, i: int) -> np.ndarray:
        if self.cache is None:
            return self._decode(self.rows[i])
        if i not in self.cache:
            self.cache[i] = self._decode(self.rows[i])
        return self.cache[i]

    def _decode(self, row: _Row) -> np.ndarray:
        planes = np.empty((len(row.entries), *row.mask_shape), np.int32)
        for plane, entry in zip(planes, row.entries, strict=True):
            plane[:] = self.lookup[entry] if isinstance(entry, int) else self._mask(row, entry)
        return planes

    def _mask(self, row: _Row, name: str) -> np.ndarray:
        where = f"index.csv, line {row.line}: images/{name}"
        with self.files.picture(name) as picture:
            if picture.mode not in ("RGB", "RGBA"):
                raise UserError(f"{where} has mode {picture.mode}; a mask is an RGB picture, label number = R + 256 G.")
            pixels = np.asarray(picture).astype(np.int64)
        numbers = pixels[..., 0] + 256 * pixels[..., 1]
        inside = numbers < len(self.lookup)
        indices = self.lookup[np.where(inside, numbers, 0)]
        wrong = numbers[~inside | (indices < 0)]
        if len(wrong):
            raise UserError(f"{where} holds label {wrong[0]}, which is not in label.csv.")
        return indices


# --- generated scenes ------------------------------------------------------------------------------------

COLOURS = {
    "black": (16, 16, 16),
    "grey": (128, 128, 128),
    "white": (240, 240, 240),
    "red": (210, 40, 40),
    "orange": (240, 140, 30),
    "yellow": (235, 220, 50),
    "green": (50, 160, 60),
    "cyan": (60, 200, 210),
    "blue": (40, 70, 200),
    "purple": (150, 60, 170),
}
GREYS = {"black": (16,), "dark grey": (72,), "grey": (128,), "light grey": (184,), "white": (240,)}
TEXTURES = ("horizontal stripes", "vertical stripes", "rising stripes", "falling stripes", "checker", "dots", "noise")
SHAPES = ("disc", "square", "triangle", "ring", "cross", "diamond")
PARTS = ("corner", "edge", "centre", "hole")

_PLAIN = len(TEXTURES)
_SQUARE = np.array([(-0.8, -0.8), (-0.8, 0.8), (0.8, -0.8), (0.8, 0.8)])
_TRIANGLE = np.array([(0.0, -1.0), (-0.87, 0.6), (0.87, 0.6)])
_CROSS = np.array([(s * a, t * b) for a, b in ((0.35, 1.0), (1.0, 0.35)) for s in (-1, 1) for t in (-1, 1)])
_DIAMOND = np.array([(-1.0, 0.0), (1.0, 0.0), (0.0, -1.0), (0.0, 1.0)])
_CORNERS = {"square": _SQUARE, "triangle": _TRIANGLE, "cross": _CROSS, "diamond": _DIAMOND}
_DRAWS = 16


def scenes(size: int = 32, channels: int = 3, n: int = 1000, seed: int = 0) -> ConceptSet:
    """Generate textured shapes on textured grounds, labelled to the pixel at image resolution.

    Each scene is a ground and one or two shapes in front of it, the second over the first; each of these has
    two colours, arranged by a texture, or one plain colour (a quarter of them); a shape has colours that its
    ground lacks, a place, a size (radius 0.2 to 0.35 of the side) and a turn of up to 18 degrees. Brightness
    varies by up to 12 grey levels per scene, and "noise" picks its two colours pixel by pixel. The labels say
    for every pixel:

    * colour: the named colour it was painted with (grey levels if ``channels`` is 1);
    * texture: the texture of its ground or shape (plain areas have none);
    * shape: the visible shape it belongs to;
    * part: near a corner of a polygon, else on the edge of its shape (its outermost pixels), else in the
      centre (within 0.35 radii of it); or the hole of a ring, where the ground shows.

    Equal arguments give equal sets, and the first m scenes do not depend on n.

    Args:
        size: Side in pixels, at least 16 (32 for CIFAR networks, 28 for MNIST networks).
        channels: 3 for colour, 1 for grey.
        n: Number of scenes.
        seed: Of the generator.

    Raises:
        UserError: If a size, a number of channels or a number of scenes is not allowed.
    """
    if size < 16 or n < 1:
        raise UserError(f"Scenes need a side of at least 16 and at least one image, not {size} and {n}.")
    choose(channels, (1, 3), "number of channels")
    palette = COLOURS if channels == 3 else GREYS
    draw_rng, noise_rng = (np.random.default_rng(s) for s in np.random.SeedSequence(seed).spawn(2))
    draws = draw_rng.random((n, 3, _DRAWS))
    noise = noise_rng.random((n, size, size), dtype=np.float32) < 0.5
    canvas = _Canvas(size, n, len(palette))
    everywhere, no_colour = np.ones((n, size, size), bool), np.empty((n, 0), np.int64)
    ground = canvas.paint(draws[:, 0], everywhere, noise, no_colour)
    canvas.add_shape(draws[:, 1], noise, ground, np.ones(n, bool))
    canvas.add_shape(draws[:, 2], noise, ground, draws[:, 2, -1] < 0.5)
    table = np.array(list(palette.values()), np.int16)
    light = (24 * draws[:, 0, -1] - 12).round().astype(np.int16)
    images = np.clip(table[canvas.colour] + light[:, None, None, None], 0, 255).astype(np.uint8)
    groups = {"colour": tuple(palette), "texture": TEXTURES, "shape": SHAPES, "part": PARTS}
    return ConceptSet(
        f"scenes-{size}x{size}x{channels}",
        images,
        canvas.planes(),
        tuple(sum(groups.values(), ())),
        tuple(groups),
        np.repeat(np.arange(len(groups)), [len(g) for g in groups.values()]),
        SCENES_QUANTILE,
    )


class _Canvas:
    """The scenes being painted: index of the colour, texture, shape and part of every pixel, -1 for none."""

    def __init__(self, size: int, n: int, colours: int):
        self.size, self.colours = size, colours
        self.y, self.x = np.mgrid[:size, :size].astype(np.float32)
        self.colour, self.texture, self.shape, self.part = np.full((4, n, size, size), -1, np.int8)

    def planes(self) -> np.ndarray:
        """Label planes (n, 4, size, size)."""
        groups = (self.colour, self.colours), (self.texture, len(TEXTURES)), (self.shape, len(SHAPES))
        first = np.cumsum([1, *(count for _, count in groups)])
        maps = (self.colour, self.texture, self.shape, self.part)
        return np.stack([np.where(m >= 0, m + f, 0) for m, f in zip(maps, first, strict=True)], 1).astype(np.int16)

    def paint(self, draw: np.ndarray, where: np.ndarray, noise: np.ndarray, taken: np.ndarray) -> np.ndarray:
        """Cover ``where`` (n, size, size) with two colours in a texture, a quarter plain; return the colours.

        The colours differ from each other and from the ``taken`` ones (n, k).
        """
        first = _skip(_pick(draw[:, 0], self.colours - taken.shape[1]), taken)
        taken = np.column_stack([taken, first])
        second = _skip(_pick(draw[:, 1], self.colours - taken.shape[1]), taken)
        texture = np.where(draw[:, 2] < 0.25, _PLAIN, _pick(draw[:, 3], len(TEXTURES)))
        pattern = self._pattern(texture, draw[:, 4:7], noise)
        colour = np.where(pattern, first[:, None, None], second[:, None, None])
        self.colour[where] = colour[where]
        visible = np.where(texture == _PLAIN, -1, texture)[:, None, None]
        self.texture[where] = np.broadcast_to(visible, where.shape)[where]
        return np.column_stack([first, second])

    def _pattern(self, texture: np.ndarray, draw: np.ndarray, noise: np.ndarray) -> np.ndarray:
        """Where the first colour shows, bool (n, size, size)."""
        period = (4 + 2 * _pick(draw[:, 0], 2))[:, None, None].astype(np.float32)
        y = self.y + (draw[:, 1, None, None] * 8).astype(np.int32)
        x = self.x + (draw[:, 2, None, None] * 8).astype(np.int32)
        half = period / 2
        rows, columns = y % period < half, x % period < half
        dots = (y % period - half + 0.5) ** 2 + (x % period - half + 0.5) ** 2 < (0.35 * period) ** 2
        options = (
            rows,
            columns,
            (x + y) % period < half,
            (x - y) % period < half,
            rows ^ columns,
            dots,
            noise,
            np.ones_like(rows),
        )
        pattern = np.empty(noise.shape, bool)
        for k, option in enumerate(options):
            pattern[texture == k] = option[texture == k]
        return pattern

    def add_shape(self, draw: np.ndarray, noise: np.ndarray, taken: np.ndarray, shown: np.ndarray) -> None:
        """Draw one shape in the scenes that ``shown`` (n,) selects."""
        kind = _pick(draw[:, 7], len(SHAPES))
        radius = self.size * (0.2 + 0.15 * draw[:, 8])
        centre = radius[:, None] + draw[:, 9:11] * (self.size - 2 * radius[:, None])
        u, v = self._coordinates(centre, radius, np.pi / 10 * (2 * draw[:, 11] - 1))
        distance = np.hypot(u, v)
        inside = _inside(kind, u, v, distance) & shown[:, None, None]
        self.paint(draw, inside, noise, taken)
        self.shape[inside] = np.broadcast_to(kind[:, None, None], inside.shape)[inside]
        self.part[inside] = -1
        self.part[inside & (distance < 0.35)] = PARTS.index("centre")
        self.part[inside & ~_eroded(inside)] = PARTS.index("edge")
        self.part[inside & _near_corner(kind, u, v)] = PARTS.index("corner")
        ring = (kind == SHAPES.index("ring")) & shown
        self.part[ring[:, None, None] & (self.shape < 0) & (distance < 0.5)] = PARTS.index("hole")

    def _coordinates(self, centre: np.ndarray, radius: np.ndarray, turn: np.ndarray):
        """Coordinates of the pixels' middles in units of the radius, turned, each (n, size, size)."""
        x = (self.x + 0.5 - centre[:, 0, None, None]) / radius[:, None, None]
        y = (self.y + 0.5 - centre[:, 1, None, None]) / radius[:, None, None]
        cos, sin = np.cos(turn)[:, None, None], np.sin(turn)[:, None, None]
        return cos * x + sin * y, cos * y - sin * x


def _pick(uniform: np.ndarray, options: int) -> np.ndarray:
    return (uniform * options).astype(np.int64)


def _skip(index: np.ndarray, taken: np.ndarray) -> np.ndarray:
    """The index-th of the numbers that are not among ``taken`` (n, k)."""
    for number in np.sort(taken, 1).T:
        index = index + (index >= number)
    return index


def _inside(kind: np.ndarray, u: np.ndarray, v: np.ndarray, distance: np.ndarray) -> np.ndarray:
    au, av = np.abs(u), np.abs(v)
    options = {
        "disc": distance < 1,
        "square": np.maximum(au, av) < 0.8,
        "triangle": (v < 0.6) & (v > -1 + 1.6 / 0.87 * au),
        "ring": (distance < 1) & (distance >= 0.5),
        "cross": (np.minimum(au, av) < 0.35) & (np.maximum(au, av) < 1),
        "diamond": au + av < 1,
    }
    inside = np.empty(u.shape, bool)
    for k, name in enumerate(SHAPES):
        inside[kind == k] = options[name][kind == k]
    return inside


def _near_corner(kind: np.ndarray, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    near = np.zeros(u.shape, bool)
    for name, corners in _CORNERS.items():
        chosen = kind == SHAPES.index(name)
        for cu, cv in corners:
            near[chosen] |= np.hypot(u[chosen] - cu, v[chosen] - cv) < 0.3
    return near


def _eroded(mask: np.ndarray) -> np.ndarray:
    """Pixels whose four neighbours are in the mask too; beyond the border nothing is."""
    padded = np.pad(mask, ((0, 0), (1, 1), (1, 1)))
    return padded[:, :-2, 1:-1] & padded[:, 2:, 1:-1] & padded[:, 1:-1, :-2] & padded[:, 1:-1, 2:]
