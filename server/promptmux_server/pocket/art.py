"""The things that scenes are composed of: kinds, their names, the sprites of those that are not plain shapes.

Owns the list of kinds (names after the CLDR short names, shortened where plain English has a shorter word) and reads
the sprites fetched by `make art`. Knows nothing of scenes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from PIL import Image

from promptmux_server.pocket.shapes import SHAPES

_ART = {
    "animal": {
        "dog": "1f436", "cat": "1f431", "horse": "1f434", "cow": "1f404", "pig": "1f416", "sheep": "1f411",
        "rooster": "1f413", "penguin": "1f427", "duck": "1f986", "owl": "1f989", "frog": "1f438", "turtle": "1f422",
        "snake": "1f40d", "shark": "1f988", "octopus": "1f419", "crab": "1f980", "bee": "1f41d", "butterfly": "1f98b",
        "snail": "1f40c", "elephant": "1f418", "giraffe": "1f992", "zebra": "1f993", "lion": "1f981", "panda": "1f43c",
        "koala": "1f428", "rabbit": "1f430", "fox": "1f98a", "monkey": "1f435", "whale": "1f433", "hedgehog": "1f994",
    },
    "food": {
        "apple": "1f34e", "banana": "1f34c", "watermelon": "1f349", "strawberry": "1f353", "pineapple": "1f34d",
        "lemon": "1f34b", "carrot": "1f955", "pizza": "1f355", "burger": "1f354", "hot dog": "1f32d", "donut": "1f369",
        "cookie": "1f36a", "cake": "1f382", "cucumber": "1f952", "avocado": "1f951", "egg": "1f95a", "cheese": "1f9c0",
        "pear": "1f350",
    },
    "vehicle": {
        "car": "1f697", "bus": "1f68c", "taxi": "1f695", "tractor": "1f69c", "bicycle": "1f6b2", "rocket": "1f680",
        "helicopter": "1f681", "airplane": "2708", "ship": "1f6a2", "train": "1f682", "scooter": "1f6f4",
        "truck": "1f69a", "ambulance": "1f691", "sailboat": "26f5",
    },
    "object": {
        "guitar": "1f3b8", "trumpet": "1f3ba", "drum": "1f941", "piano": "1f3b9", "football": "26bd",
        "basketball": "1f3c0", "balloon": "1f388", "gift": "1f381", "key": "1f511", "hammer": "1f528",
        "camera": "1f4f7", "book": "1f4d5", "umbrella": "2602", "crown": "1f451", "hat": "1f3a9", "watch": "231a",
        "clock": "23f0", "chair": "1fa91", "laptop": "1f4bb", "bell": "1f514", "trophy": "1f3c6", "robot": "1f916",
        "backpack": "1f392", "magnet": "1f9f2", "telescope": "1f52d", "kite": "1fa81",
    },
    "nature": {
        "tree": "1f333", "cactus": "1f335", "sunflower": "1f33b", "rose": "1f339", "mushroom": "1f344", "star": "2b50",
        "moon": "1f319", "cloud": "2601", "rainbow": "1f308", "volcano": "1f30b", "globe": "1f30d", "snowman": "26c4",
        "house": "1f3e0",
    },
}  # fmt: skip

CATEGORIES = (*_ART, "shape")

HELD_OUT = frozenset(
    [
        "owl",
        "shark",
        "zebra",
        "fox",
        "pineapple",
        "cheese",
        "donut",
        "helicopter",
        "tractor",
        "trumpet",
        "camera",
        "crown",
        "clock",
        "cactus",
        "moon",
        "snowman",
    ]
)
"""Kinds that no training scene shows."""

_PLURALS = {"sheep": "sheep", "octopus": "octopuses", "bus": "buses", "watch": "watches", "mushroom": "mushrooms"}
_PLURALS |= {"butterfly": "butterflies", "strawberry": "strawberries", "cactus": "cactuses", "trophy": "trophies"}
_PLURALS |= {"fox": "foxes", "cheese": "cheeses", "cross": "crosses"}


@dataclass(frozen=True)
class Kind:
    """A kind of thing; `code` is the code point that its sprite file is named after, None for a shape."""

    name: str
    category: str
    code: str | None

    @property
    def plural(self) -> str:
        return _PLURALS.get(self.name, self.name + "s")

    @property
    def with_article(self) -> str:
        return ("an " if self.name[0] in "aeiou" else "a ") + self.name


KINDS: dict[str, Kind] = {
    name: Kind(name, category, code) for category, codes in _ART.items() for name, code in codes.items()
} | {name: Kind(name, "shape", None) for name in SHAPES}
ART_KINDS: tuple[str, ...] = tuple(name for name, kind in KINDS.items() if kind.code and name not in HELD_OUT)
"""Those of the art that training scenes may show."""
TRAINING_KINDS: tuple[str, ...] = (*ART_KINDS, *SHAPES)


class Art(Protocol):
    """Where sprites come from: RGBA pictures, cropped to what is visible."""

    def sprite(self, kind: str) -> Image.Image:
        """The sprite of a kind; raises KeyError for a name that is not one of the art."""


class FluentArt:
    """Sprites of the Fluent emoji set, fetched by `make art`."""

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise FileNotFoundError(f"no art in {folder}: run `make art` first")
        self._folder = folder
        self._sprites: dict[str, Image.Image] = {}

    def sprite(self, kind: str) -> Image.Image:
        if kind not in self._sprites:
            code = KINDS[kind].code
            path = next(p for p in (self._folder / f"{code}{end}.webp" for end in ("", "-fe0f")) if p.exists())
            picture = Image.open(path).convert("RGBA")
            self._sprites[kind] = picture.crop(picture.getchannel("A").point(lambda a: 255 * (a > 40)).getbbox())
        return self._sprites[kind]
