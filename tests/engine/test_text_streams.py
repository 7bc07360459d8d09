"""Texts that are handed out while they grow: the same text as the answer's, from real searches on a tiny backbone."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest

import tiny
from promptmux_server.backbone.images import from_array
from promptmux_server.engine.engine import Engine
from promptmux_server.engine.request import Request
from promptmux_server.errors import NoBoxFound

PICTURE = from_array(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8))
GREEDY = {"method": "greedy", "max_length": 24, "min_length": 8, "no_repeat_ngram": 1}
"""Without repetition: a random model would write one token over and over."""


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    folder = tiny.write(
        tmp_path_factory.mktemp("prompts"),
        tiny.prompt("a", scale=3.0),
        tiny.prompt("cap", kind="caption", seed=4, scale=3.0, instruction=" what?"),
        tiny.prompt("choice", kind="answer", seed=5, answers=("dog", "cat", "red bird")),
        tiny.prompt("where", kind="box", seed=6),
    )
    started = tiny.engine(folder)
    started.start()
    yield started
    started.stop(2.0)


def ask(task: str, on_text: Callable[[str], None] | None, **decoding: object) -> Request:
    return Request(
        request_id="r",
        task=task,
        text=None if task == "cap" else "the dog",
        image=PICTURE,
        deadline=time.monotonic() + 60,
        decoding=decoding,
        on_text=on_text,
    )


def text_of(engine: Engine, request: Request) -> str:
    output = engine.submit(request).result(60).output
    assert hasattr(output, "text")
    return str(output.text)


@pytest.mark.parametrize("task", ["a", "cap"])
@pytest.mark.parametrize(
    "decoding",
    [
        GREEDY,
        {**GREEDY, "method": "beam", "beam_size": 1},
        *({**GREEDY, "method": "sample", "seed": n} for n in range(8)),
    ],
    ids=["greedy", "a beam of one", *(f"sample {n}" for n in range(8))],
)
def test_the_pieces_are_the_answers_text(engine: Engine, task: str, decoding: dict[str, object]) -> None:
    pieces: list[str] = []
    text = text_of(engine, ask(task, pieces.append, **decoding))
    assert "".join(pieces) == text
    assert all(pieces)
    assert len(pieces) > 1


def test_a_text_kept_to_an_answer_set_grows_too(engine: Engine) -> None:
    pieces: list[str] = []
    decoding = {"method": "greedy", "constrained": True}
    text = text_of(engine, ask("choice", pieces.append, **decoding))
    assert text in ("dog", "cat", "red bird")
    assert "".join(pieces) == text


@pytest.mark.parametrize("decoding", [{"beam_size": 3}, {}], ids=["beams", "the task's own"])
def test_beams_hand_out_nothing(engine: Engine, decoding: dict[str, object]) -> None:
    pieces: list[str] = []
    text_of(engine, ask("a", pieces.append, **decoding))
    assert pieces == []


def test_a_closed_answer_set_that_is_scored_hands_out_nothing(engine: Engine) -> None:
    pieces: list[str] = []
    text_of(engine, ask("choice", pieces.append))
    assert pieces == []


def test_a_box_hands_out_nothing(engine: Engine) -> None:
    pieces: list[str] = []
    error = engine.submit(ask("where", pieces.append, beam_size=1)).exception(60)
    assert error is None or isinstance(error, NoBoxFound)
    assert pieces == []


def test_a_listener_that_raises_harms_neither_its_request_nor_the_neighbours(engine: Engine) -> None:
    calls: list[str] = []

    def broken(piece: str) -> None:
        calls.append(piece)
        raise ValueError("no")

    pieces: list[str] = []
    futures = [engine.submit(ask("a", listener, **GREEDY)) for listener in (broken, pieces.append, None)]
    texts = {str(future.result(60).output.text) for future in futures}  # type: ignore[attr-defined]
    assert len(texts) == 1
    assert "".join(pieces) in texts
    assert len(calls) == 1
