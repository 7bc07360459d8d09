"""Questions about a scene that have one right answer, as a word and as a sentence.

Also owns the relations between things that questions, statements and expressions share. Knows no tasks and no tokens.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping

from promptmux_server.pocket.art import ART_KINDS, CATEGORIES, KINDS, TRAINING_KINDS
from promptmux_server.pocket.colours import TINTS
from promptmux_server.pocket.scenes import Scene, SceneObject

NUMBERS = ("zero", "one", "two", "three", "four")

CLEAR_PX = 12.0
"""Centres at least this far apart stand left, right, above or below one another without doubt."""


_Asked = tuple[str, str, str] | None


def _ask_count(scene: Scene, rng: random.Random) -> _Asked:
    kind = absent_kind(scene, rng) if rng.random() < 0.1 else rng.choice(scene.objects).kind
    count = scene.count(kind)
    counted = f"there is one {kind}" if count == 1 else f"there are {NUMBERS[count]} {KINDS[kind].plural}"
    return f"how many {KINDS[kind].plural} are there?", NUMBERS[count], counted


def _ask_total(scene: Scene, rng: random.Random) -> _Asked:
    count = len(scene.objects)
    sentence = "there is one thing" if count == 1 else f"there are {NUMBERS[count]} things"
    return "how many things are there?", NUMBERS[count], sentence


def _ask_presence(scene: Scene, rng: random.Random) -> _Asked:
    if rng.random() < 0.5:
        thing = KINDS[rng.choice(scene.objects).kind]
        return f"is there {thing.with_article}?", "yes", f"yes, there is {thing.with_article}"
    thing = KINDS[absent_kind(scene, rng)]
    return f"is there {thing.with_article}?", "no", f"no, there is no {thing.name}"


def _ask_background(scene: Scene, rng: random.Random) -> _Asked:
    return "what color is the background?", scene.background, f"the background is {scene.background}"


def _ask_category(scene: Scene, rng: random.Random) -> _Asked:
    category = rng.choice(CATEGORIES)
    kinds = {o.kind for o in scene.objects if KINDS[o.kind].category == category}
    if len(kinds) != 1 or category in ("object", "nature"):
        return None
    kind = kinds.pop()
    return f"what {category} is there?", kind, f"the {category} is {KINDS[kind].with_article}"


def _ask_tint(scene: Scene, rng: random.Random) -> _Asked:
    shapes = [o for o in unique_things(scene) if o.tint]
    if not shapes:
        return None
    shape = rng.choice(shapes)
    return f"what color is the {shape.kind}?", str(shape.tint), f"the {shape.kind} is {shape.tint}"


def _ask_tinted(scene: Scene, rng: random.Random) -> _Asked:
    """Whether there is a shape, or any thing of one colour, of a colour: as often as not, and about what is there."""
    shapes = [o for o in scene.objects if o.tint]
    if not shapes:
        return None
    shape = rng.choice(shapes)
    tint = str(shape.tint) if rng.random() < 0.5 else rng.choice(list(TINTS))
    kind = shape.kind if rng.random() < 0.6 else "shape"
    truth = any(o.tint == tint and kind in (o.kind, "shape") for o in shapes)
    thing = f"{article(tint)} {tint} {kind}"
    return f"is there {thing}?", *(
        ("yes", f"yes, there is {thing}") if truth else ("no", f"no, there is no {tint} {kind}")
    )


def article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


SIDES = {"left": (0, -1), "right": (0, 1), "top": (1, -1), "bottom": (1, 1)}


def _ask_side(scene: Scene, rng: random.Random) -> _Asked:
    side, (axis, sign) = rng.choice(list(SIDES.items()))
    ranked = sorted(scene.objects, key=lambda o: -sign * o.centre[axis])
    if len(ranked) < 2 or abs(ranked[0].centre[axis] - ranked[1].centre[axis]) < CLEAR_PX:
        return None
    kind = ranked[0].kind
    return f"what is at the {side}?", kind, f"at the {side} is {KINDS[kind].with_article}"


RELATIONS = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}


def unique_things(scene: Scene) -> list[SceneObject]:
    return [o for o in scene.objects if scene.count(o.kind) == 1]


def stands(a: SceneObject, relation: str, b: SceneObject) -> bool | None:
    """Whether a stands so to b; None if it is too close to say."""
    axis, sign = RELATIONS[relation]
    distance = sign * (a.centre[axis] - b.centre[axis])
    return None if abs(distance) < CLEAR_PX else distance > 0


def related(scene: Scene, rng: random.Random) -> tuple[str, str, str, bool] | None:
    """(kind, relation, other kind, truth) of two things that each occur once."""
    unique = unique_things(scene)
    if len(unique) < 2:
        return None
    a, b = rng.sample(unique, 2)
    relation = rng.choice(list(RELATIONS))
    truth = stands(a, relation, b)
    return None if truth is None else (a.kind, relation, b.kind, truth)


def standing_of_two(scene: Scene, rng: random.Random) -> tuple[str, str, str] | None:
    """(kind, other kind, "left and above") of two things that each occur once: every side without doubt, or None."""
    unique = unique_things(scene)
    if len(unique) < 2:
        return None
    a, b = rng.sample(unique, 2)
    sides = [relation.removesuffix(" of") for relation in RELATIONS if stands(a, relation, b)]
    return (a.kind, b.kind, " and ".join(sides)) if sides else None


def _ask_relation(scene: Scene, rng: random.Random) -> _Asked:
    found = related(scene, rng)
    if found is None:
        return None
    a, relation, b, truth = found
    sentence = f"yes, the {a} is {relation} the {b}" if truth else f"no, the {a} is not {relation} the {b}"
    return f"is the {a} {relation} the {b}?", "yes" if truth else "no", sentence


def _ask_neighbour(scene: Scene, rng: random.Random) -> _Asked:
    unique = unique_things(scene)
    if not unique:
        return None
    anchor, relation = rng.choice(unique), rng.choice(list(RELATIONS))
    others = {o: stands(o, relation, anchor) for o in scene.objects if o is not anchor}
    standing = [o for o, truth in others.items() if truth]
    if len(standing) != 1 or None in others.values():
        return None
    kind = standing[0].kind
    where = f"{relation} the {anchor.kind}"
    return f"what is {where}?", kind, f"{where} is {KINDS[kind].with_article}"


def absent_kind(scene: Scene, rng: random.Random) -> str:
    """A kind that the scene does not show; a plain shape only where it shows another."""
    shown = {o.kind for o in scene.objects}
    possible = TRAINING_KINDS if any(o.tint for o in scene.objects) else ART_KINDS
    return rng.choice([kind for kind in possible if kind not in shown])


Maker = Callable[[Scene, random.Random], _Asked]

EVENLY: Mapping[Maker, int] = {
    _ask_count: 1,
    _ask_presence: 2,
    _ask_background: 1,
    _ask_side: 1,
    _ask_relation: 1,
    _ask_neighbour: 1,
    _ask_category: 1,
    _ask_total: 1,
    _ask_tint: 1,
    _ask_tinted: 1,
}
"""How often the shipped task asks what, where the scene allows it."""
HARD_ONES: Mapping[Maker, int] = {
    **EVENLY,
    _ask_count: 3,
    _ask_side: 3,
    _ask_relation: 2,
    _ask_neighbour: 4,
    _ask_category: 3,
    _ask_tint: 2,
    _ask_tinted: 4,
}
"""What pretraining asks: asked evenly, relations and counts were still guesses when presence was known."""


def question_about(scene: Scene, rng: random.Random, mix: Mapping[Maker, int] = EVENLY) -> tuple[str, str, str]:
    """(question, answer word, answer sentence); only questions with one right answer are asked."""
    while True:
        asked = rng.choices(list(mix), weights=list(mix.values()))[0](scene, rng)
        if asked is not None:
            return asked
