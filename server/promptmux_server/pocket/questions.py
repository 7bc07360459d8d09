"""Questions about a scene that have one right answer, as a word and as a sentence.

Also owns the relations between things that questions, statements and expressions share. Knows no tasks and no tokens.
"""

from __future__ import annotations

import random

from promptmux_server.pocket.art import CATEGORIES, KINDS, TRAINING_KINDS
from promptmux_server.pocket.scenes import Scene, SceneObject

NUMBERS = ("zero", "one", "two", "three", "four")

CLEAR_PX = 12.0
"""Centres at least this far apart stand left, right, above or below one another without doubt."""


def question_about(scene: Scene, rng: random.Random) -> tuple[str, str, str]:
    """(question, answer word, answer sentence); only questions with one right answer are asked."""
    makers = [_ask_count, _ask_presence, _ask_presence, _ask_background, _ask_side, _ask_relation, _ask_neighbour]
    makers += [_ask_category, _ask_total]
    while True:
        asked = rng.choice(makers)(scene, rng)
        if asked is not None:
            return asked


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
    """A kind that the scene does not show."""
    shown = {o.kind for o in scene.objects}
    return rng.choice([kind for kind in TRAINING_KINDS if kind not in shown])
