"""The colours of backgrounds and of plain shapes, by their names."""

from __future__ import annotations

Rgb = tuple[int, int, int]

COLOURS: dict[str, Rgb] = {
    "red": (214, 64, 58),
    "orange": (240, 150, 60),
    "yellow": (245, 222, 95),
    "green": (110, 190, 105),
    "blue": (85, 140, 225),
    "purple": (150, 100, 200),
    "pink": (245, 170, 200),
    "white": (244, 244, 240),
    "gray": (140, 142, 146),
    "black": (38, 38, 44),
}
"""What a background can be."""

TINTS: dict[str, Rgb] = {
    "red": (228, 34, 34),
    "orange": (242, 138, 28),
    "yellow": (244, 228, 38),
    "green": (32, 200, 48),
    "blue": (28, 62, 232),
    "purple": (134, 52, 190),
    "pink": (248, 130, 190),
    "white": (248, 248, 248),
    "gray": (128, 128, 128),
    "black": (18, 18, 18),
    "teal": (18, 132, 132),
    "brown": (146, 62, 38),
}
"""What a plain shape can be; stronger than the backgrounds of the same name."""
