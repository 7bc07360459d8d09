"""Plain shapes in one colour: things that scenes show beside the art. Knows how they look, not where they stand."""

from __future__ import annotations

import math
import random

from PIL import Image, ImageDraw

from promptmux_server.pocket.colours import TINTS

_SIDE = 192
"""Pixels they are drawn at; scenes scale them down, which smooths their edges."""

Point = tuple[float, float]

_SQUARE: tuple[Point, ...] = ((0.08, 0.08), (0.92, 0.08), (0.92, 0.92), (0.08, 0.92))
_DIAMOND: tuple[Point, ...] = ((0.5, 0.0), (0.85, 0.5), (0.5, 1.0), (0.15, 0.5))
_ARROW: tuple[Point, ...] = ((0.0, 0.35), (0.5, 0.35), (0.5, 0.1), (1.0, 0.5), (0.5, 0.9), (0.5, 0.65), (0.0, 0.65))
_CROSS: tuple[Point, ...] = (
    (0.35, 0.0), (0.65, 0.0), (0.65, 0.35), (1.0, 0.35), (1.0, 0.65), (0.65, 0.65),
    (0.65, 1.0), (0.35, 1.0), (0.35, 0.65), (0.0, 0.65), (0.0, 0.35), (0.35, 0.35),
)  # fmt: skip
_HEXAGON: tuple[Point, ...] = tuple(
    (0.5 + 0.5 * math.cos(k * math.pi / 3), 0.5 + 0.5 * math.sin(k * math.pi / 3)) for k in range(6)
)
_HEART: tuple[Point, ...] = tuple(
    (
        0.5 + math.sin(t) ** 3 / 2,
        0.45 - (13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 34,
    )
    for t in (k * math.pi / 32 for k in range(64))
)
_POLYGONS: dict[str, tuple[Point, ...]] = {
    "square": _SQUARE,
    "diamond": _DIAMOND,
    "arrow": _ARROW,
    "cross": _CROSS,
    "hexagon": _HEXAGON,
    "heart": _HEART,
}
SHAPES: tuple[str, ...] = (*_POLYGONS, "ring", "oval")
"""Circles, triangles and rectangles are left out on purpose: a shipped task asks for those, in pictures of others."""


def draw_shape(shape: str, tint: str, rng: random.Random) -> Image.Image:
    """A shape (RGBA), filled with about its tint: no two reds are quite the same."""
    colour = tuple(max(0, min(255, channel + rng.randint(-18, 18))) for channel in TINTS[tint])
    picture = Image.new("RGBA", (_SIDE, _SIDE))
    pen = ImageDraw.Draw(picture)
    if shape == "oval":
        pen.ellipse((0, _SIDE * 0.2, _SIDE - 1, _SIDE * 0.8), fill=colour)
    elif shape == "ring":
        pen.ellipse((4, 4, _SIDE - 5, _SIDE - 5), outline=colour, width=_SIDE // 6)
    else:
        pen.polygon([(x * (_SIDE - 1), y * (_SIDE - 1)) for x, y in _POLYGONS[shape]], fill=colour)
    return picture
