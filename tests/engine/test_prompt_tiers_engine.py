"""An engine with more tasks than places answers as one with room for all, and nobody waits for another's load."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch

import tiny
from promptmux_prompts import Prompt, write_prompt
from promptmux_server.engine.engine import Engine
from promptmux_server.engine.options import EngineOptions
from promptmux_server.engine.prompt_table import pool_bytes
from promptmux_server.engine.prompt_versions import PromptSource
from promptmux_server.engine.request import Answer, Request
from promptmux_server.errors import DeadlineExceeded, PinRefused, PromptNotFound, PromptQuarantined

PROMPT_BYTES = 4 * 2 * (2 * 4 + 3 * 3) * 64
"""Of a tiny prompt: 4 positions in 2 layers and 3 in 3 layers, K and V, 64 wide, float32."""

Start = Callable[..., Engine]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    engines: list[Engine] = []

    def make(*prompts: Prompt, places: int, **options: int) -> Engine:
        tiny.write(tmp_path, *prompts)
        budget = pool_bytes(tiny.config(), torch.float32, places)
        engine = tiny.engine(tmp_path, EngineOptions(prompt_device_bytes=budget, **options))  # type: ignore[arg-type]
        engine.start()
        engines.append(engine)
        return engine

    yield make
    for engine in engines:
        engine.stop(2.0)


def small(name: str, seed: int = 0, **fields: object) -> Prompt:
    return tiny.prompt(name, seed=seed, image_size=None, decoding={"method": "greedy", "max_length": 3}, **fields)  # type: ignore[arg-type]


def plain() -> Prompt:
    return small("plain", encoder_length=0, decoder_length=0)


def ask(task: str, text: str = "the dog", within_s: float = 60.0) -> Request:
    return Request(request_id="r", task=task, text=text, deadline=time.monotonic() + within_s)


def test_64_tasks_on_8_places_answer_as_with_room_for_all(start: Start) -> None:
    prompts = [small(f"t{i}", i) for i in range(64)]
    tasks = [item.manifest.name for item in (*prompts, plain())]
    roomy = start(*prompts, plain(), places=64)
    expected = {task: roomy.submit(ask(task)).result(60) for task in tasks}
    engine = start(places=8, prompt_host_bytes=16 * PROMPT_BYTES)
    for wave in range(10):
        order = [tasks[(7 * i + wave) % 65] for i in range(200)]
        futures: list[tuple[str, Future[Answer]]] = [(task, engine.submit(ask(task))) for task in order]
        for task, future in futures:
            answer = future.result(60)
            assert answer.output == expected[task].output
            assert answer.score == pytest.approx(expected[task].score, abs=1e-3)
    stats = engine.load().prompts
    assert stats.evictions > 64  # the control: places were short
    assert stats.device_bytes <= stats.device_budget_bytes
    assert 0 < stats.host_bytes <= stats.host_budget_bytes == 16 * PROMPT_BYTES
    assert len({expected[task].score for task in tasks}) == 65  # the control: prompts tell


def test_a_thousand_tasks_are_served_with_places_for_64(start: Start) -> None:
    engine = start(
        *(small(f"t{i}", i, encoder_length=1, decoder_length=0) for i in range(1000)),
        places=64,
        prompt_host_bytes=100 * PROMPT_BYTES,
    )
    names = [status.name for status in engine.tasks()]
    assert len(names) == 1000
    for part in range(0, 1000, 200):
        for future in [engine.submit(ask(name)) for name in names[part : part + 200]]:
            assert future.result(60)
    stats = engine.load().prompts
    assert stats.loads >= 1000
    assert stats.resident <= 64
    assert stats.host_bytes <= 100 * PROMPT_BYTES


def blob(engine: Engine, name: str) -> Path:
    """The file of the version that a task stands for."""
    return engine._registry.listed(name).source.path


def blocked(engine: Engine, monkeypatch: pytest.MonkeyPatch, name: str) -> tuple[threading.Event, threading.Event]:
    """Reading this task's file begins (first event) and then waits (for the second)."""
    begun, go_on = threading.Event(), threading.Event()
    read = engine._loader._read

    def slow(source: PromptSource) -> Prompt:
        if source.path == blob(engine, name):
            begun.set()
            assert go_on.wait(30)
        return read(source)

    monkeypatch.setattr(engine._loader, "_read", slow)
    return begun, go_on


def test_a_slow_load_holds_up_its_own_requests_only(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = start(small("here", 1), small("slow", 2), plain(), places=1, prompt_host_bytes=0)
    assert engine.submit(ask("here")).result(30)
    begun, go_on = blocked(engine, monkeypatch, "slow")
    late, waiting = engine.submit(ask("slow", within_s=0.2)), engine.submit(ask("slow"))
    assert begun.wait(10)
    assert engine.submit(ask("plain")).result(30)
    with pytest.raises(DeadlineExceeded):
        late.result(30)
    assert not waiting.done()
    deadline = time.monotonic() + 10
    while engine.load().prompts.waiting != 1:  # a future's waiters may be told before the lease is ended
        assert time.monotonic() < deadline
        time.sleep(0.001)
    go_on.set()
    assert waiting.result(30)
    assert engine.load().prompts.wait_s > 0


def test_a_cancelled_request_leaves_nothing_behind(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = start(small("a", 1), small("slow", 2), places=1, prompt_host_bytes=0)
    begun, go_on = blocked(engine, monkeypatch, "slow")
    leaving = engine.submit(ask("slow"))
    assert begun.wait(10)
    assert leaving.cancel()
    assert engine.load().prompts.waiting == 0
    go_on.set()
    for _ in range(3):
        assert engine.submit(ask("a")).result(30)
    engine.stop(5.0)
    assert not any(version.in_use for version in engine._tiers._versions.values())


def test_a_file_damaged_after_the_start_harms_its_own_task_only(start: Start) -> None:
    engine = start(small("a", 1), small("b", 2), places=2, prompt_host_bytes=0)
    blob(engine, "a").write_bytes(b"garbage")
    bad, good = engine.submit(ask("a")), engine.submit(ask("b"))
    with pytest.raises(PromptQuarantined, match="invalid_prompt_file"):
        bad.result(30)
    assert good.result(30)
    blob(engine, "a").write_bytes(write_prompt(small("a", 1)))
    assert engine.submit(ask("a")).result(30)


def test_another_version_in_the_file_is_not_served_as_this_one(start: Start, tmp_path: Path) -> None:
    engine = start(small("a", 1), places=1, prompt_host_bytes=0)
    blob(engine, "a").write_bytes(write_prompt(small("a", 2)))
    with pytest.raises(PromptQuarantined, match="prompt_digest_mismatch"):
        engine.submit(ask("a")).result(30)
    tiny.write(tmp_path, small("a", 2))
    engine.reload()
    assert engine.submit(ask("a")).result(30).prompt.sha256 == small("a", 2).digest


def test_a_prompt_larger_than_the_pool_is_refused_at_reload(start: Start, tmp_path: Path) -> None:
    engine = start(small("a", 1), small("large", 2, encoder_length=33), places=1)
    statuses = {status.name: status for status in engine.tasks()}
    problem = statuses["large"].error
    assert problem is not None
    assert problem.code == "prompt_too_large"
    with pytest.raises(PromptQuarantined, match="prompt_too_large"):
        engine.submit(ask("large"))
    assert engine.submit(ask("a")).result(30)
    tiny.write(tmp_path, small("a", 9, encoder_length=64))
    assert engine.reload().refused["a"].code == "prompt_too_large"
    assert engine.submit(ask("a")).result(30).prompt.sha256 == small("a", 1).digest


def test_the_backbone_alone_is_served_without_any_place(start: Start) -> None:
    engine = start(small("a", 1), plain(), places=0)
    assert engine.submit(ask("plain")).result(30)
    assert {status.name: status.state for status in engine.tasks()} == {"a": "refused", "plain": "ready"}


def pin(engine: Engine, name: str, pinned: bool = True) -> None:
    engine.prompts.set_pinned(name, pinned, author="local")


def test_a_pin_follows_its_name_to_a_new_version(start: Start, tmp_path: Path) -> None:
    engine = start(small("a", 1), small("b", 2), places=2)
    pin(engine, "a")
    with pytest.raises(PinRefused):
        pin(engine, "b")
    with pytest.raises(PromptNotFound):
        pin(engine, "nobody")
    tiny.write(tmp_path, small("a", 3))
    engine.reload()
    statuses = {status.name: status for status in engine.tasks()}
    assert (statuses["a"].version, statuses["a"].pinned, statuses["b"].pinned) == (2, True, False)
    assert engine.submit(ask("a")).result(30)
    pin(engine, "a", False)
    pin(engine, "b")
    assert not engine.tasks()[0].pinned


def test_a_status_says_where_a_prompt_is(start: Start) -> None:
    engine = start(small("a", 1), small("b", 2), small("c", 3), places=1, prompt_host_bytes=2 * PROMPT_BYTES)
    engine.submit(ask("a")).result(30)
    assert {status.name: status.tier for status in engine.tasks()} == {"a": "device", "b": "host", "c": "disk"}
