"""Scenes: a few objects on a background, drawn from a seed, with the exact truth about what is where.

`compose` decides, `render` paints; the same seed gives the same scene and the same picture for ever. Knows nothing of
questions or training.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image, ImageEnhance

from promptmux_server.pocket.art import ART_KINDS, HELD_OUT, Art
from promptmux_server.pocket.colours import COLOURS, TINTS
from promptmux_server.pocket.shapes import SHAPES, draw_shape

SIDE = 128
"""Pixels of a scene's side."""


Split = Literal["train", "heldout"]
_SPLIT_OFFSET: dict[Split, int] = {"train": 0, "heldout": 1 << 40}

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class SceneObject:
    """A thing in the picture; `box` is (x0, y0, x1, y1) in pixels, tight around what the sprite shows.

    `tint` is the colour of a plain shape; other things have many colours, and None.
    """

    kind: str
    box: Box
    tint: str | None = None

    @property
    def centre(self) -> tuple[float, float]:
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2

    @property
    def area(self) -> float:
        return (self.box[2] - self.box[0]) * (self.box[3] - self.box[1])


@dataclass(frozen=True)
class Scene:
    """The truth of one picture. Objects are in painting order: later ones may cover earlier ones a little."""

    seed: int
    background: str
    objects: tuple[SceneObject, ...]

    @property
    def left_to_right(self) -> tuple[SceneObject, ...]:
        return tuple(sorted(self.objects, key=lambda o: o.centre))

    def count(self, kind: str) -> int:
        return sum(o.kind == kind for o in self.objects)

    def of_kind(self, kind: str) -> list[SceneObject]:
        return [o for o in self.objects if o.kind == kind]


def compose(
    index: int, split: Split, art: Art, *, novel: bool = False, shapes: float = 0.0
) -> tuple[Scene, Image.Image]:
    """Scene number `index` of a split and its picture.

    `novel` draws its things from the held-out kinds instead; `shapes` is the share of plain shapes among them.
    """
    seed = _SPLIT_OFFSET[split] + index
    rng = random.Random(seed)
    background = rng.choice(list(COLOURS))
    canvas = _background(background, rng)
    objects: list[SceneObject] = []
    for kind in _kinds(rng, novel, shapes):
        tint = rng.choice([name for name in TINTS if name != background]) if kind in SHAPES else None
        placed = _place(kind, tint, objects, art, rng)
        if placed is not None:
            sprite, where = placed
            canvas.paste(sprite, (int(where[0]), int(where[1])), sprite)
            objects.append(SceneObject(kind, where, tint))
    picture = ImageEnhance.Brightness(canvas).enhance(rng.uniform(0.88, 1.1))
    noise = np.random.default_rng(seed).normal(0.0, rng.uniform(0.0, 6.0), (SIDE, SIDE, 3))
    pixels = np.clip(np.asarray(picture, dtype=np.float32) + noise, 0, 255).astype(np.uint8)
    return Scene(seed, background, tuple(objects)), Image.fromarray(pixels)


def _kinds(rng: random.Random, novel: bool, shapes: float) -> list[str]:
    """One to four things; a third of the scenes repeat a kind, so that there is something to count."""
    pool = sorted(HELD_OUT) if novel else ART_KINDS
    count = rng.choice((1, 2, 2, 3, 3, 4))
    chosen: list[str] = []
    while len(chosen) < count:
        kind = rng.choice(SHAPES if rng.random() < shapes else pool)
        if kind not in chosen:
            chosen.append(kind)
    if rng.random() < 0.35 and count > 1:
        repeated = rng.randint(2, count)
        chosen = chosen[:1] * repeated + chosen[repeated:]
    return chosen


def _place(
    kind: str, tint: str | None, placed: list[SceneObject], art: Art, rng: random.Random
) -> tuple[Image.Image, Box] | None:
    """Find room for a thing: at most a fifth of any thing may be covered. None if 40 tries find none."""
    for _ in range(40):
        sprite = _sprite(kind, tint, art, rng)
        x, y = rng.randint(0, SIDE - sprite.width), rng.randint(0, SIDE - sprite.height)
        box = (float(x), float(y), float(x + sprite.width), float(y + sprite.height))
        if all(_overlap(box, other.box) <= 0.2 * min(_area(box), other.area) for other in placed):
            return sprite, box
    return None


def _sprite(kind: str, tint: str | None, art: Art, rng: random.Random) -> Image.Image:
    sprite = art.sprite(kind) if tint is None else draw_shape(kind, tint, rng)
    if rng.random() < 0.5:
        sprite = sprite.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    sprite = sprite.rotate(rng.uniform(-18, 18), Image.Resampling.BILINEAR, expand=True)
    scale = rng.randint(28 if tint is None else 18, 60) / max(sprite.size)
    sprite = sprite.resize(
        (max(8, round(sprite.width * scale)), max(8, round(sprite.height * scale))), Image.Resampling.BILINEAR
    )
    return sprite.crop(sprite.getchannel("A").point(lambda a: 255 * (a > 60)).getbbox())


def _background(colour: str, rng: random.Random) -> Image.Image:
    """A flat, shaded, striped or chequered background of one colour."""
    base = np.array(COLOURS[colour], dtype=np.float32)
    style = rng.choice(("flat", "shade", "stripes", "checks"))
    y, x = np.mgrid[0:SIDE, 0:SIDE].astype(np.float32)
    direction = rng.uniform(0, 2 * np.pi)
    ramp = (np.cos(direction) * x + np.sin(direction) * y) / SIDE
    step = rng.randint(8, 24)
    pattern = {
        "flat": np.zeros_like(ramp),
        "shade": ramp - ramp.mean(),
        "stripes": ((ramp * SIDE // step) % 2) - 0.5,
        "checks": ((x // step + y // step) % 2) - 0.5,
    }[style]
    pixels = base + pattern[..., None] * rng.uniform(12, 36)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def _area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def _overlap(a: Box, b: Box) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
