"""Statements about a scene, true, false or undecidable, and expressions that single out one thing.

Knows no tasks and no tokens.
"""

from __future__ import annotations

import random

from promptmux_server.pocket.art import KINDS
from promptmux_server.pocket.colours import COLOURS, TINTS
from promptmux_server.pocket.questions import (
    CLEAR_PX,
    NUMBERS,
    RELATIONS,
    absent_kind,
    article,
    related,
    stands,
    unique_things,
)
from promptmux_server.pocket.scenes import SIDE, Box, Scene, SceneObject

_UNKNOWABLE = (
    "the {} is hungry", "the {} is new", "the {} belongs to a child", "the {} was a present", "the {} is very old",
    "the {} costs a lot", "the {} is from france", "somebody likes the {}", "the {} is famous", "the {} smells good",
)  # fmt: skip


def describe(scene: Scene) -> str:
    """The things of a scene from left to right, counted: "a dog and two apples"."""
    names = list(dict.fromkeys(o.kind for o in scene.left_to_right))
    return _listed([(name, scene.count(name)) for name in names])


def _listed(things: list[tuple[str, int]]) -> str:
    parts = [_counted(name, count) for name, count in things]
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def _counted(kind: str, count: int) -> str:
    return KINDS[kind].with_article if count == 1 else f"{NUMBERS[count]} {KINDS[kind].plural}"


def coloured(thing: SceneObject) -> str:
    """A thing with its article, and its tint if it has one: "an orange heart"."""
    return KINDS[thing.kind].with_article if thing.tint is None else f"{article(thing.tint)} {thing.tint} {thing.kind}"


def place_in_words(thing: SceneObject) -> str:
    """Which ninth of the picture a thing's centre lies in: "at the top left", "in the middle"."""
    column, row = (min(2, int(3 * c / SIDE)) for c in thing.centre)
    words = [word for word in (("top", "", "bottom")[row], ("left", "", "right")[column]) if word]
    return f"at the {' '.join(words)}" if words else "in the middle"


def statement_about(scene: Scene, rng: random.Random) -> tuple[str, bool]:
    """A statement that the picture decides, and whether it is true; about as many are true as false."""
    makers = (_state_relation, _state_presence, _state_count, _state_background, _state_list, _state_tint)
    return rng.choice(makers)(scene, rng)


def unknowable_about(scene: Scene, rng: random.Random) -> str:
    """A statement about a thing in the picture that no picture can decide."""
    return rng.choice(_UNKNOWABLE).format(rng.choice(scene.objects).kind)


def groundless_about(scene: Scene, rng: random.Random) -> str:
    """The same kind of statement about a thing that is not there, which the picture contradicts."""
    return rng.choice(_UNKNOWABLE).format(absent_kind(scene, rng))


def _state_relation(scene: Scene, rng: random.Random) -> tuple[str, bool]:
    found = related(scene, rng)
    if found is None:
        return _state_presence(scene, rng)
    a, relation, b, truth = found
    return f"the {a} is {relation} the {b}", truth


def _state_presence(scene: Scene, rng: random.Random) -> tuple[str, bool]:
    truth = rng.random() < 0.5
    denied = rng.random() < 0.25
    kind = rng.choice(scene.objects).kind if truth != denied else absent_kind(scene, rng)
    return f"there is no {kind}" if denied else f"there is {KINDS[kind].with_article}", truth


def _state_count(scene: Scene, rng: random.Random) -> tuple[str, bool]:
    kind = rng.choice(scene.objects).kind
    count = scene.count(kind)
    claimed = count if rng.random() < 0.5 else rng.choice([n for n in (1, 2, 3, 4) if n != count])
    return (f"there is only one {kind}" if claimed == 1 else f"there are {_counted(kind, claimed)}"), claimed == count


def _state_background(scene: Scene, rng: random.Random) -> tuple[str, bool]:
    truth = rng.random() < 0.5
    colour = scene.background if truth else rng.choice([c for c in COLOURS if c != scene.background])
    return f"the background is {colour}", truth


def _state_tint(scene: Scene, rng: random.Random) -> tuple[str, bool]:
    """The colour of a plain shape; where there is none, that of the background."""
    shapes = [o for o in unique_things(scene) if o.tint]
    if not shapes:
        return _state_background(scene, rng)
    shape, truth, denied = rng.choice(shapes), rng.random() < 0.5, rng.random() < 0.25
    tint = shape.tint if truth != denied else rng.choice([name for name in TINTS if name != shape.tint])
    return f"the {shape.kind} is {'not ' if denied else ''}{tint}", truth


def _state_list(scene: Scene, rng: random.Random) -> tuple[str, bool]:
    """The whole list of things, with one of them exchanged where it is to be false."""
    counts = {o.kind: scene.count(o.kind) for o in scene.left_to_right}
    truth = rng.random() < 0.5
    if not truth:
        wrong = rng.choice(list(counts))
        new = absent_kind(scene, rng)
        counts = {new if kind == wrong else kind: count for kind, count in counts.items()}
    return _listed(list(counts.items())), truth


def referring_expression(scene: Scene, rng: random.Random) -> tuple[str, Box]:
    """An expression that fits exactly one thing, and that thing's box."""
    thing = rng.choice(scene.objects)
    same = scene.of_kind(thing.kind)
    if len(same) == 1:
        return _by_relation(scene, rng) or (f"the {thing.kind}", thing.box)
    for word, axis, sign in (("left", 0, -1), ("right", 0, 1), ("top", 1, -1), ("bottom", 1, 1)):
        ranked = sorted(same, key=lambda o: -sign * o.centre[axis])
        if rng.random() < 0.6 and abs(ranked[0].centre[axis] - ranked[1].centre[axis]) >= CLEAR_PX:
            return f"the {word} {thing.kind}", ranked[0].box
    ranked = sorted(same, key=lambda o: -o.area)
    if ranked[0].area >= 1.4 * ranked[1].area:
        return f"the biggest {thing.kind}", ranked[0].box
    left = min(same, key=lambda o: o.centre)
    return f"the leftmost {thing.kind}", left.box


def _by_relation(scene: Scene, rng: random.Random) -> tuple[str, Box] | None:
    """ "the thing left of the dog", now and then, where only one thing stands so."""
    if rng.random() > 0.3:
        return None
    unique = unique_things(scene)
    anchor, relation = rng.choice(unique), rng.choice(list(RELATIONS))
    standing = {o: stands(o, relation, anchor) for o in scene.objects if o is not anchor}
    fitting = [o for o, truth in standing.items() if truth]
    if len(fitting) != 1 or None in standing.values():
        return None
    return f"the thing {relation} the {anchor.kind}", fitting[0].box
