"""CIDEr-D agrees with pycocoevalcap 1.2 and with a case worked by hand, and behaves as its definition says."""

from __future__ import annotations

import math

import pytest

from promptmux_server.training.cider import cider_d

CAPTIONS = [
    "a man riding a wave",
    "two dogs play in the grass",
    "a plate of food on a table",
    "a a a a red bus",
]
REFERENCES = [
    ["a man rides a wave on a surfboard", "a surfer riding a wave in the ocean"],
    ["two dogs are playing in the grass", "a pair of dogs play outside", "dogs in a field"],
    ["a plate of food on a wooden table", "food on a plate"],
    ["a red bus parked on the street", "a red double decker bus"],
]
PYCOCOEVALCAP = [2.3907560475605805, 2.030985755206079, 5.661440944734849, 2.4485481975056627]
"""Printed by its `Cider().compute_score` for these texts; on 30 random sets they agreed to 2e-15."""


def scores(captions: list[str], references: list[list[str]]) -> list[float]:
    return cider_d([text.split() for text in captions], [[text.split() for text in texts] for texts in references])


def test_it_is_what_the_fields_own_program_computes() -> None:
    assert scores(CAPTIONS, REFERENCES) == pytest.approx(PYCOCOEVALCAP, abs=1e-12)


def test_a_case_worked_by_hand() -> None:
    """Two pictures, "a b" and "c d": every n-gram is in one, so all weigh log 2.

    "a c" has one of two words, cosine 1/2, and no pair of them; "c d d" clips "d" to once: 2/sqrt(5)/sqrt(2) of words,
    and of pairs 1/sqrt(2); it is one word too long. Three and four words there are none, of four orders.
    """
    clipped = (2 / math.sqrt(10) + 1 / math.sqrt(2)) / 4 * math.exp(-1 / 72) * 10
    assert scores(["a c", "c d d"], [["a b"], ["c d"]]) == pytest.approx([0.5 / 4 * 10, clipped], abs=1e-12)


def test_the_only_reference_itself_scores_ten() -> None:
    texts = [f"w{i} x{i} y{i} z{i}" for i in range(3)]
    assert scores(texts, [[text] for text in texts]) == pytest.approx([10.0] * 3)


def test_order_of_pictures_and_references_changes_nothing() -> None:
    turned = scores(CAPTIONS[::-1], [texts[::-1] for texts in REFERENCES[::-1]])
    assert turned[::-1] == pytest.approx(PYCOCOEVALCAP, abs=1e-12)


def test_what_all_pictures_say_weighs_nothing() -> None:
    with_it = [[f"look {text}" for text in texts] for texts in REFERENCES]
    assert scores(["look"] * 4, with_it) == [0.0] * 4
    assert scores(["a red dog"], [["a red dog"]]) == [0.0]  # one picture is all pictures


def test_a_longer_caption_scores_less() -> None:
    first = [scores([CAPTIONS[0] + " again" * more, *CAPTIONS[1:]], REFERENCES)[0] for more in range(4)]
    assert first == sorted(first, reverse=True)
    assert len(set(first)) == 4


def test_no_words_score_nothing() -> None:
    assert scores(["", *CAPTIONS[1:]], REFERENCES)[0] == 0.0
