"""The engine's promises: deadlines, cancellation, bounds, reloads, and nobody harmed by a neighbour."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tiny
from promptmux_server.backbone.images import DecodedImage, from_array
from promptmux_server.engine.engine import Engine
from promptmux_server.engine.options import EngineOptions
from promptmux_server.engine.prompt_table import Residence
from promptmux_server.engine.request import Request
from promptmux_server.engine.runner import RunningBatch
from promptmux_server.errors import (
    DeadlineExceeded,
    Draining,
    Internal,
    InvalidParameter,
    NonfiniteOutput,
    Overloaded,
    PromptNotFound,
    PromptQuarantined,
)

Start = Callable[..., Engine]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    engines: list[Engine] = []

    def make(*prompts: object, **options: int) -> Engine:
        tiny.write(tmp_path, *(prompts or (tiny.prompt("a"), tiny.prompt("b", seed=2, encoder_length=40))))  # type: ignore[arg-type]
        engine = tiny.engine(tmp_path, EngineOptions(**options))  # type: ignore[arg-type]
        engine.start()
        engines.append(engine)
        for status in engine.tasks():
            if status.sha256:
                until_resident(engine, status.sha256)
        return engine

    yield make
    for engine in engines:
        engine.stop(2.0)


def picture(seed: int = 0) -> DecodedImage:
    return from_array(np.random.default_rng(seed).integers(0, 256, (40, 50, 3), dtype=np.uint8))


def ask(task: str = "a", text: str = "the dog", *, within_s: float = 30.0, **fields: object) -> Request:
    image = fields.pop("image", picture())
    return Request(request_id="r", task=task, text=text, image=image, deadline=time.monotonic() + within_s, **fields)  # type: ignore[arg-type]


def until_resident(engine: Engine, digest: str) -> Residence:
    """Wait until a prompt is on the device, so that requests for it wait for nothing but the engine."""
    lease = engine._tiers.prefetch(digest)
    deadline = time.monotonic() + 20
    while (home := engine._tiers.hold(lease)) is None:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    engine._tiers.release(lease)
    return home


def until_running(engine: Engine) -> None:
    """Wait until the engine has taken what was submitted, so that what follows forms a batch of its own."""
    deadline = time.monotonic() + 20
    while engine.load().running == 0:
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """While the event is not set, whoever would join the running batch waits, and all behind it."""
    release = threading.Event()
    original = RunningBatch.join

    def join(self: RunningBatch, entries: Sequence[Any]) -> None:
        assert release.wait(20.0)
        original(self, entries)

    monkeypatch.setattr(RunningBatch, "join", join)
    yield release
    release.set()


def test_an_answer_names_the_prompt_version_that_gave_it(start: Start) -> None:
    answer = start().submit(ask()).result(20)
    assert answer.prompt.sha256 == tiny.prompt("a").digest
    assert answer.prompt.version == 1
    assert set(answer.timings_ms) == {"queue", "vision", "encode", "decode", "total"}


def test_tasks_in_one_batch_answer_as_they_do_alone(start: Start, held: threading.Event) -> None:
    engine = start(max_batch=16)
    requests = [
        ask("ab"[i % 2], tiny.WORDS[i : i + 12].strip(), image=picture(i % 3) if i % 4 else None) for i in range(12)
    ]
    first = engine.submit(requests[0])  # occupies the engine, so that the rest forms one batch
    together = [engine.submit(request) for request in requests[1:]]
    held.set()
    answers = [first.result(20), *(future.result(20) for future in together)]
    alone = [engine.submit(request).result(20) for request in requests]
    for mixed, single in zip(answers, alone, strict=True):
        assert mixed.output == single.output
        assert mixed.score == pytest.approx(single.score, abs=1e-3)


def test_the_same_picture_passes_the_stem_once_a_batch(
    start: Start, held: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    original = tiny.model().image_tokens
    monkeypatch.setattr(
        tiny.model(), "image_tokens", lambda pixels: seen.append(len(pixels)) or original(pixels), raising=False
    )
    engine = start()
    first = engine.submit(ask(image=None))
    until_running(engine)
    futures = [engine.submit(ask("ab"[i % 2], image=picture(i % 2))) for i in range(6)]
    held.set()
    for future in [first, *futures]:
        future.result(20)
    assert seen == [2]


def test_preparing_pictures_takes_no_core_from_the_engine(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[int] = []
    original = RunningBatch.join

    def join(self: RunningBatch, entries: Sequence[Any]) -> None:
        used.append(torch.get_num_threads())
        original(self, entries)

    monkeypatch.setattr(RunningBatch, "join", join)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        engine = start()
        for seed in range(3):
            engine.submit(ask(image=picture(seed))).result(20)
    finally:
        torch.set_num_threads(before)
    assert used == [2, 2, 2]


def test_an_unknown_task_is_named_so(start: Start) -> None:
    with pytest.raises(PromptNotFound):
        start().submit(ask("nobody"))


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"decoding": {"beam_size": 99}}, "decoding.beam_size"),
        ({"decoding": {"method": "candidates"}}, "decoding.method"),
        ({"premise": "x"}, "premise"),
        ({"text": "word " * 80, "decoding": {"max_length": 120}}, "text"),
    ],
)
def test_a_bad_request_is_refused_at_the_door(start: Start, fields: dict[str, object], param: str) -> None:
    with pytest.raises(InvalidParameter) as caught:
        start().submit(ask(**fields))  # type: ignore[arg-type]
    assert caught.value.param == param


def test_a_picture_task_without_text_needs_its_picture(start: Start) -> None:
    engine = start(tiny.prompt("c", kind="caption", instruction=" what is it"))
    with pytest.raises(InvalidParameter) as caught:
        engine.submit(Request(request_id="r", task="c", deadline=time.monotonic() + 9))
    assert caught.value.param == "image"


def test_a_task_without_picture_takes_none(start: Start) -> None:
    engine = start(tiny.prompt("t", image_size=None))
    assert engine.submit(ask("t", image=None)).result(20)
    with pytest.raises(InvalidParameter):
        engine.submit(ask("t"))


def test_a_full_queue_refuses_and_later_accepts(start: Start, held: threading.Event) -> None:
    engine = start(queue_size=2, max_batch=1)
    running = engine.submit(ask())
    until_running(engine)
    waiting = [engine.submit(ask()) for _ in range(2)]
    with pytest.raises(Overloaded) as caught:
        engine.submit(ask())
    assert caught.value.retry_after_s in range(1, 31)  # how long exactly is the queue's, and tested there
    held.set()
    for future in [running, *waiting]:
        assert future.result(20)
    assert engine.submit(ask()).result(20)


def test_a_deadline_ends_a_request_and_no_other(start: Start, held: threading.Event) -> None:
    engine = start()
    late, patient = engine.submit(ask(within_s=0.05)), engine.submit(ask())
    time.sleep(0.15)
    held.set()
    with pytest.raises(DeadlineExceeded):
        late.result(20)
    assert patient.result(20)


def test_nothing_is_computed_for_a_request_that_is_late_already(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = start()
    monkeypatch.setattr(RunningBatch, "join", lambda *_: pytest.fail("computed for nobody"))
    with pytest.raises(DeadlineExceeded):
        engine.submit(ask(within_s=-1.0)).result(20)


def test_a_cancelled_request_is_dropped_and_its_neighbour_answers(start: Start, held: threading.Event) -> None:
    engine = start()
    leaving, staying = engine.submit(ask()), engine.submit(ask("b"))
    assert leaving.cancel()
    held.set()
    assert staying.result(20)
    with pytest.raises(CancelledError):
        leaving.result(0)


def test_a_poisoned_prompt_fails_alone(start: Start, held: threading.Event) -> None:
    engine = start()
    home = until_resident(engine, tiny.prompt("b", seed=2, encoder_length=40).digest)
    engine._pools.encoder.value[:, list(home.encoder_pages)] = float("nan")
    futures = [engine.submit(ask("ab"[i % 2])) for i in range(6)]
    held.set()
    for i, future in enumerate(futures):
        if i % 2:
            with pytest.raises(NonfiniteOutput):
                future.result(20)
        else:
            assert future.result(20)


def test_a_bug_in_one_batch_ends_that_batch_and_not_the_engine(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = start()
    with monkeypatch.context() as broken:
        broken.setattr(RunningBatch, "join", lambda *_: 1 / 0)
        with pytest.raises(Internal):
            engine.submit(ask()).result(20)
    assert engine.submit(ask()).result(20)
    assert engine.live()


def test_stopping_finishes_what_was_admitted_and_refuses_the_rest(start: Start) -> None:
    engine = start()
    futures = [engine.submit(ask()) for _ in range(4)]
    engine.stop(20.0)
    assert all(future.result(0) for future in futures)
    with pytest.raises(Draining):
        engine.submit(ask())
    assert not engine.ready()


def test_stopping_in_a_hurry_fails_what_is_left(start: Start, held: threading.Event) -> None:
    engine = start(max_batch=1)
    futures = [engine.submit(ask()) for _ in range(3)]
    threading.Timer(0.3, held.set).start()
    engine.stop(0.0)
    for future in futures:
        with pytest.raises(Draining):
            future.result(10)


def test_a_reload_serves_new_versions_and_frees_old_ones(start: Start, tmp_path: Path, held: threading.Event) -> None:
    engine = start()
    old = engine.submit(ask("a"))
    tiny.write(tmp_path, tiny.prompt("a", seed=50), tiny.prompt("new", seed=51))
    engine.prompts.delete("b", author="local", expected=None)
    report = engine.reload()
    assert (report.added, report.changed, report.removed) == (("new",), ("a",), ())
    fresh = engine.submit(ask("a"))
    held.set()
    assert old.result(20).prompt.sha256 == tiny.prompt("a").digest
    assert (fresh.result(20).prompt.sha256, fresh.result(20).prompt.version) == (tiny.prompt("a", seed=50).digest, 2)
    with pytest.raises(PromptNotFound):
        engine.submit(ask("b"))
    engine.stop(2.0)
    while engine._loader.step():
        pass
    # The new version of a (1 page), which was asked for; the old one is gone with its request.
    assert engine._pools.encoder.used == 1


def test_a_file_that_turns_bad_keeps_its_good_version(start: Start, tmp_path: Path) -> None:
    engine = start()
    (tmp_path / "a.safetensors").write_bytes(b"garbage")
    assert engine.reload().refused["a"].code == "invalid_prompt_file"
    assert engine.submit(ask("a")).result(20)


def test_a_bad_file_at_start_is_quarantined_and_the_others_serve(start: Start, tmp_path: Path) -> None:
    tmp_path.mkdir(exist_ok=True)
    (tmp_path / "bad.safetensors").write_bytes(b"garbage")
    engine = start()
    with pytest.raises(PromptQuarantined):
        engine.submit(ask("bad"))
    assert engine.submit(ask("a")).result(20)
    states = {status.name: status.state for status in engine.tasks()}
    assert states == {"a": "ready", "b": "ready", "bad": "refused"}
