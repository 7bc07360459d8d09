"""A prompt's rehearsal: what it lets pass, what it finds, and that nobody else notices it."""

from __future__ import annotations

import base64
import io
import threading
import time
from collections.abc import Generator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import tiny
from promptmux_prompts import Canary, Prompt, write_prompt
from promptmux_server.backbone.assemble import assemble
from promptmux_server.backbone.model import OFA
from promptmux_server.backbone.weights import LoadedBackbone
from promptmux_server.backbone.weights.random_init import random_backbone
from promptmux_server.engine.engine import Engine
from promptmux_server.engine.prompt_table import NO_PROMPT, PromptPools
from promptmux_server.engine.rehearsal import NEAR_PLACES, Rehearsal, record_canaries
from promptmux_server.engine.request import Request
from promptmux_server.errors import (
    BackendUnhealthy,
    CanaryFailed,
    Draining,
    PromptmuxError,
    PromptNonfinite,
    PromptRefused,
)
from promptmux_server.tasks import TaskSpec
from promptmux_server.tasks.decoding import Hypothesis

GREEDY = {"method": "greedy", "max_length": 5}


def picture(color: str) -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (24, 16), color).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def rehearse(prompt: Prompt, model: OFA | None = None, fits: Any = lambda slots, tokens: True) -> int:
    """Play it all; the number of passes."""
    model = model or tiny.model()
    spec = TaskSpec.from_manifest(prompt.manifest, model.config)
    with torch.no_grad():
        return sum(1 for _ in Rehearsal(model, tiny.tokenizer(), prompt, spec, fits).passes())


def recorded(prompt: Prompt, *inputs: dict[str, str], model: OFA | None = None) -> Prompt:
    return record_canaries(model or tiny.model(), tiny.tokenizer(), prompt, inputs)


def test_what_was_recorded_passes_and_is_a_version_of_its_own() -> None:
    plain = tiny.prompt(scale=3.0)
    told = recorded(plain, {"text": "the dog", "image": picture("red")}, {"text": "a cat"})
    canaries = told.manifest.canary
    assert canaries is not None
    assert [canary.tokens[-1] for canary in canaries] == [2, 2]  # eos ends what greedy search wrote
    assert told.digest != plain.digest
    assert rehearse(told) > rehearse(plain) > 0


def test_greedy_tokens_are_those_that_requests_get(tmp_path: Path) -> None:
    told = recorded(tiny.prompt("a", scale=3.0, image_size=None, decoding=GREEDY), {"text": "the dog"})
    tiny.write(tmp_path, told)
    engine = tiny.engine(tmp_path)
    engine.start()
    try:
        request = Request(request_id="r", task="a", text="the dog", deadline=time.monotonic() + 30)
        answer = engine.submit(request).result(30)
    finally:
        engine.stop(2.0)
    assert told.manifest.canary is not None
    assert answer.output.text == tiny.tokenizer().decode(told.manifest.canary[0].tokens[:-1]).strip()  # type: ignore[attr-defined]


def test_other_tokens_fail_and_both_are_shown() -> None:
    told = recorded(tiny.prompt(scale=3.0), {"text": "the dog"}, {"text": "a cat"})
    assert told.manifest.canary is not None
    right = told.manifest.canary[1].tokens
    wrong = replace(told.manifest.canary[1], tokens=(9,) * 40)
    bad = tiny.prompt(scale=3.0, canary=(told.manifest.canary[0], wrong))
    with pytest.raises(CanaryFailed) as caught:
        rehearse(bad)
    assert caught.value.details == {"index": 1, "expected": [9] * 32, "got": list(right[:32])}


def test_the_surest_are_kept_where_there_are_more_than_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A text is as sure as its least likely token."""
    scores = iter([(-0.1, -3.0), (-0.5, -0.5), (-0.9, -0.1)])

    def write(*_: object) -> Generator[None, None, Hypothesis]:
        yield
        return Hypothesis((7, 2), 0.0, next(scores))

    monkeypatch.setattr(Rehearsal, "_written", write)
    inputs = [{"text": text} for text in ("two are as good", "sure", "almost as sure")]
    told = record_canaries(tiny.model(), tiny.tokenizer(), tiny.prompt(scale=3.0), inputs, most=2)
    assert [canary.text for canary in told.manifest.canary or ()] == ["sure", "almost as sure"]


FIRST_BIN = tiny.model().config.first_bin_id
NEAR = int(NEAR_PLACES * (tiny.model().config.num_bins - 1))


@pytest.mark.parametrize(
    ("written", "passes"),
    [
        ((7, FIRST_BIN + 1, 2), True),
        ((7, FIRST_BIN + 1 + NEAR, 2), True),
        ((7, FIRST_BIN + 2 + NEAR, 2), False),
        ((8, FIRST_BIN + 1, 2), False),  # words are not near one another
        ((7, FIRST_BIN - 1, 2), False),
        ((7, FIRST_BIN + 1), False),
    ],
)
def test_places_may_lie_a_little_apart_and_nothing_else(
    written: tuple[int, ...], passes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(*_: object) -> Generator[None, None, Hypothesis]:
        yield
        return Hypothesis(written, 0.0, (0.0,) * len(written))

    monkeypatch.setattr(Rehearsal, "_written", write)
    told = tiny.prompt(scale=3.0, canary=(Canary(tokens=(7, FIRST_BIN + 1, 2), text="the dog"),))
    if passes:
        assert rehearse(told) > 0
    else:
        with pytest.raises(CanaryFailed):
            rehearse(told)


def test_swapped_sides_of_one_shape_are_found() -> None:
    """A backbone as deep on either side: no shape tells an encoder's prompt from a decoder's."""
    config = replace(tiny.config(), decoder_layers=tiny.config().encoder_layers)
    tensors = random_backbone(config, seed=3, dtype=torch.float32)
    larger = {name: tensor * 4 if tensor.ndim == 2 else tensor for name, tensor in tensors.items()}
    model = assemble(LoadedBackbone(config, larger), dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    sides = [torch.randn(2, config.heads, 4, config.head_dim, generator=generator) for _ in range(4)]
    manifest = replace(tiny.prompt(image_size=None).manifest, decoder_length=4)
    right = recorded(Prompt.build(manifest, *(3 * side for side in sides)), {"text": "the dog"}, model=model)
    rehearse(right, model)
    key, value = (right.encoder_key, right.encoder_value)
    swapped = Prompt.build(right.manifest, right.decoder_key, right.decoder_value, key, value)
    with pytest.raises(CanaryFailed):
        rehearse(swapped, model)


def test_a_prompt_that_is_not_read_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a server does that loads a prompt and then serves the backbone alone."""
    rehearse(tiny.prompt())
    monkeypatch.setattr(PromptPools, "store", lambda self, prompt: replace(NO_PROMPT, encoder_pages=(0,)))
    with pytest.raises(CanaryFailed) as caught:
        rehearse(tiny.prompt())
    assert caught.value.details == {"reason": "no_effect"}


def test_a_prompt_of_no_length_need_not_make_a_difference() -> None:
    assert rehearse(tiny.prompt(encoder_length=0, decoder_length=0)) == 0


def test_numbers_that_are_not_finite_are_the_prompts_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = tiny.model().logits
    monkeypatch.setattr(tiny.model(), "logits", lambda states: logits(states) / 0, raising=False)
    with pytest.raises(PromptNonfinite):
        rehearse(tiny.prompt())


@pytest.mark.parametrize(
    ("fields", "canary"),
    [
        ({}, Canary(tokens=(2,))),
        ({}, Canary(tokens=(2,), text="a", premise="b")),
        ({"instruction": " what?"}, Canary(tokens=(2,), text="a")),
        ({"image_size": None}, Canary(tokens=(2,), text="a", image=picture("red"))),
        ({}, Canary(tokens=(2,), text="a", image="no picture")),
    ],
    ids=["no text", "a premise", "a text", "a picture", "no picture"],
)
def test_an_input_that_the_task_could_not_be_asked_is_refused(fields: dict[str, Any], canary: Canary) -> None:
    with pytest.raises(PromptRefused, match="canary 0"):
        rehearse(tiny.prompt(canary=(canary,), **fields))


def test_a_task_that_no_request_could_fit_into_is_refused() -> None:
    with pytest.raises(PromptRefused, match="decoding memory"):
        rehearse(tiny.prompt(), fits=lambda slots, tokens: False)
    with pytest.raises(PromptRefused, match="positions"):
        rehearse(tiny.prompt(instruction=" {text}" + " the" * 130))


# -- on the engine's thread -----------------------------------------------------------------------------------------


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    tiny.write(tmp_path, tiny.prompt("a", image_size=None, decoding=GREEDY))
    started = tiny.engine(tmp_path)
    started.start()
    yield started
    started.stop(2.0)


def publish(engine: Engine, prompt: Prompt) -> None:
    with engine.prompts.upload() as upload:
        upload.write(write_prompt(prompt))
        engine.prompts.publish("a", upload, sha256=upload.sha256, author="local", expected=None)


def ask(engine: Engine) -> Any:
    return engine.submit(Request(request_id="r", task="a", text="the dog", deadline=time.monotonic() + 30)).result(30)


class Pause:
    """Stops the model inside the first pass of a rehearsal until told to go on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, failure: Exception | None = None) -> None:
        self.begun, self.go_on = threading.Event(), threading.Event()
        store = PromptPools.store

        def pause(pools: PromptPools, prompt: Prompt) -> Any:
            self.begun.set()
            assert self.go_on.wait(20)
            if failure is not None:
                raise failure
            return store(pools, prompt)

        monkeypatch.setattr(PromptPools, "store", pause)


def in_background(engine: Engine, prompt: Prompt) -> tuple[threading.Thread, list[BaseException]]:
    failures: list[BaseException] = []

    def run() -> None:
        try:
            publish(engine, prompt)
        except PromptmuxError as error:
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, failures


def test_requests_are_served_between_the_passes_of_a_rehearsal(engine: Engine) -> None:
    """Not one pass longer than one of its own does a rehearsal keep a request waiting."""
    order: list[str] = []
    over = threading.Event()

    def passes() -> Iterator[None]:
        while not over.is_set():
            time.sleep(0.002)
            order.append("pass")
            yield

    rehearsal = threading.Thread(target=lambda: engine._rehearsals.run(passes()))  # type: ignore[arg-type]
    rehearsal.start()
    for _ in range(3):
        assert ask(engine)
        order.append("answer")
    over.set()
    rehearsal.join(30)
    first = order.index("answer")
    assert "pass" in order[:first]
    assert "pass" in order[first:]


def test_a_rehearsal_takes_nothing_from_what_is_served(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    before = ask(engine)
    held = engine.load().prompts.device_bytes
    pause = Pause(monkeypatch)
    wrong = (Canary(tokens=(9, 9), text="the dog"),)
    bad = tiny.prompt("a", seed=9, image_size=None, decoding=GREEDY, canary=wrong)
    thread, failures = in_background(engine, bad)
    assert pause.begun.wait(20)
    assert engine.load().prompts.device_bytes == held
    pause.go_on.set()
    thread.join(20)
    assert [error.code for error in failures] == ["canary_failed"]  # type: ignore[attr-defined]
    assert engine.load().prompts.device_bytes == held
    assert ask(engine).prompt == before.prompt


def test_a_lost_device_ends_the_rehearsal_and_the_engine(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    pause = Pause(monkeypatch, torch.AcceleratorError("an assertion on the device"))
    pause.go_on.set()
    with pytest.raises((BackendUnhealthy, PromptmuxError)):
        publish(engine, tiny.prompt("a", seed=9))
    deadline = time.monotonic() + 10
    while not engine.failed():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    with pytest.raises(BackendUnhealthy):
        publish(engine, tiny.prompt("a", seed=10))


def test_a_bug_in_a_rehearsal_is_its_own(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as broken:
        Pause(broken, ValueError("a bug")).go_on.set()
        with pytest.raises(PromptmuxError, match="The server failed"):
            publish(engine, tiny.prompt("a", seed=9))
    assert ask(engine)
    publish(engine, tiny.prompt("a", seed=9, image_size=None, decoding=GREEDY))
    assert ask(engine).prompt.version == 2


def test_stopping_the_engine_refuses_what_is_rehearsed(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    pause = Pause(monkeypatch)
    thread, failures = in_background(engine, tiny.prompt("a", seed=9))
    assert pause.begun.wait(20)
    threading.Timer(0.3, pause.go_on.set).start()
    engine.stop(0.0)
    thread.join(20)
    assert [type(error) for error in failures] == [Draining]
    with pytest.raises(Draining):
        publish(engine, tiny.prompt("a", seed=10))
