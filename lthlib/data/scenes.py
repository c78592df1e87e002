"""Generated scenes: textured shapes on textured grounds, labelled to the pixel."""

from __future__ import annotations

import numpy as np

from lthlib.core.errors import UserError, choose
from lthlib.data.concepts import ConceptSet

SCENES_QUANTILE = 0.02
"""Labels of the scenes cover 1 to 20 %: at 0.005 a perfect detector of a colour or a texture would end near
the usual limit of 0.04, at 0.04 chance would reach it; at 0.02 chance gives about 0.017."""

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
_CORNERS = {
    "square": [(-0.8, -0.8), (-0.8, 0.8), (0.8, -0.8), (0.8, 0.8)],
    "triangle": [(0.0, -1.0), (-0.87, 0.6), (0.87, 0.6)],
    "cross": [(s * a, t * b) for a, b in ((0.35, 1.0), (1.0, 0.35)) for s in (-1, 1) for t in (-1, 1)],
    "diamond": [(-1.0, 0.0), (1.0, 0.0), (0.0, -1.0), (0.0, 1.0)],
}
_DRAWS = 16


def scenes(size: int = 32, channels: int = 3, n: int = 1000, seed: int = 0) -> ConceptSet:
    """Generate textured shapes on textured grounds, labelled to the pixel at image resolution.

    Each scene is a ground and one or two shapes in front of it, the second over the first; each of these has two
    colours, arranged by a texture, or one plain colour (a quarter of them); a shape has colours that its ground lacks,
    a place, a size (radius 0.2 to 0.35 of the side) and a turn of up to 18 degrees. Brightness varies by up to 12 grey
    levels per scene, and "noise" picks its two colours pixel by pixel. The labels say for every pixel:

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
        first = np.cumsum([1, self.colours, len(TEXTURES), len(SHAPES)])[:, None, None]
        maps = np.stack([self.colour, self.texture, self.shape, self.part], axis=1)
        return np.where(maps >= 0, maps + first, 0).astype(np.int16)

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
        slanted = (x + y) % period < half, (x - y) % period < half
        options = np.stack([rows, columns, *slanted, rows ^ columns, dots, noise, np.ones_like(rows)])
        return options[texture, np.arange(len(texture))]

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
    return np.stack([options[name] for name in SHAPES])[kind, np.arange(len(kind))]


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
