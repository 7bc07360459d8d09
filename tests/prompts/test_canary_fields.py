"""Canaries in a manifest: what they hold, and what is refused before anything is run."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

import tiny
from promptmux_prompts import Canary, InvalidPromptFile, Manifest
from promptmux_prompts.canary import MAX_CANARIES, MAX_PICTURE_CHARACTERS, MAX_TEXT, MAX_TOKENS

CANARIES = (Canary(tokens=(7, 2), text="a"), Canary(tokens=(5,), premise="b", image="cGljdHVyZQ=="))


def with_canary(raw: object) -> str:
    manifest = json.loads(tiny.prompt().manifest.to_json())
    return json.dumps(manifest | {"canary": raw})


def test_canaries_survive_their_json_and_change_the_digest() -> None:
    plain = tiny.prompt()
    told = tiny.prompt(canary=CANARIES)
    assert Manifest.from_json(told.manifest.to_json()) == replace(plain.manifest, canary=CANARIES)
    assert json.loads(told.manifest.to_json())["canary"][0] == {"text": "a", "tokens": [7, 2]}
    assert told.digest != plain.digest


@pytest.mark.parametrize(
    "raw",
    [
        [],
        [{"tokens": [1]}] * (MAX_CANARIES + 1),
        [{"text": "no tokens"}],
        [{"tokens": []}],
        [{"tokens": [1] * (MAX_TOKENS + 1)}],
        [{"tokens": "12"}],
        [{"tokens": [-1]}],
        [{"tokens": [True]}],
        [{"tokens": [1.5]}],
        [{"tokens": [1], "surprise": 1}],
        [{"tokens": [1], "text": 3}],
        [{"tokens": [1], "text": "x" * (MAX_TEXT + 1)}],
        [{"tokens": [1], "image": "x" * (MAX_PICTURE_CHARACTERS + 1)}],
        ["text"],
        {"tokens": [1]},
    ],
)
def test_what_is_no_canary_is_refused(raw: Any) -> None:
    with pytest.raises(InvalidPromptFile, match="canary"):
        Manifest.from_json(with_canary(raw))


def test_the_largest_canary_is_none_too_large() -> None:
    """The control of the bounds above."""
    raw = {"tokens": [1] * MAX_TOKENS, "text": "x" * MAX_TEXT, "image": "x" * MAX_PICTURE_CHARACTERS}
    [canary] = Manifest.from_json(with_canary([raw])).canary or ()
    assert (len(canary.tokens), canary.text) == (MAX_TOKENS, "x" * MAX_TEXT)
