"""How a stream looks on a terminal and to a program."""

from __future__ import annotations

import json

import pytest

from promptmux import Answer, Delta
from promptmux_server.cli.answers import show_stream


def piece(item: int, text: str) -> Delta:
    return Delta(id=str(item), text=text)


def answer(item: int, text: str) -> Answer:
    return Answer.model_validate({"id": str(item), "task": "t", "output": {"kind": "text", "text": text}})


def failure(item: int) -> Answer:
    return Answer.model_validate({"id": str(item), "task": "t", "error": {"code": "internal", "message": "No."}})


CASES = {
    "one text": ([piece(0, "a"), piece(0, " dog"), answer(0, "a dog")], "first: a dog\n"),
    "no pieces": ([answer(0, "a dog")], "first: a dog\n"),
    "two texts": (
        [piece(0, "a"), piece(1, "two"), piece(0, " dog"), answer(1, "two"), answer(0, "a dog")],
        "first: a\nsecond: two\nfirst:  dog\n",
    ),
    "a failure": ([piece(0, "a"), failure(0), answer(1, "two")], "first: a\nfirst: error: No.\nsecond: two\n"),
    "nothing": ([], ""),
}


@pytest.mark.parametrize("case", CASES)
def test_pieces_are_lines_that_grow(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    events, shown = CASES[case]
    answers = show_stream(events, ["first", "second"], as_json=False)
    assert capsys.readouterr().out == shown
    assert answers == [event for event in events if isinstance(event, Answer)]


@pytest.mark.parametrize("case", CASES)
def test_json_has_one_event_a_line(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    events, _ = CASES[case]
    show_stream(events, ["first", "second"], as_json=True)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines == [event.model_dump(exclude_none=True) for event in events]
