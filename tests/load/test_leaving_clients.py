"""Clients that cut the connection at any moment: nothing is computed for them, nothing of them stays (A-16)."""

from __future__ import annotations

import asyncio
import os
import random
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import wait
from pathlib import Path
from typing import Any

import pytest
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import tiny
from api.live_server import until
from load.callers import Reply, call, leave, predict
from load.served import Served, SlowDevice, served
from promptmux_server.engine.engine import Engine
from promptmux_server.engine.options import EngineOptions
from promptmux_server.engine.request import Answer, Request
from promptmux_server.engine.runner import RunningBatch
from promptmux_server.settings import Settings

CUT, STEPS = 200, 60
LONG = {"method": "greedy", "min_length": STEPS, "max_length": STEPS}
SHORT = {"method": "greedy", "min_length": 2, "max_length": 2}
OPTIONS = EngineOptions(max_batch=4, queue_size=1000, queue_per_key=1000, queue_per_task=1000)
BODY = {"task": "a", "text": "the dog", "deadline_ms": 60_000}

Around = Callable[[ASGIApp], ASGIApp]


def serve(folder: Path, around: Around = lambda app: app) -> Any:
    prompt = tiny.prompt("a", image_size=None, decoding=LONG)
    return served(folder, prompt, options=OPTIONS, settings=Settings(queue_size=1000), around=around)


async def cut_all(port: int, others: int) -> list[Reply]:
    """Clients that leave within half a second, some before they have said everything; and `others` that stay."""
    chance = random.Random(7)
    whole = predict({**BODY, "decoding": LONG})
    head = whole.index(b"\r\n\r\n")
    lengths = [head // 2, head + 6, *[len(whole)] * 6]
    leaving = [
        leave(port, whole[: chance.choice(lengths)], 0.5 * chance.random(), "RST" if index % 2 else "FIN")
        for index in range(CUT)
    ]
    staying: list[Awaitable[Reply]] = [call(port, predict({**BODY, "decoding": SHORT})) for _ in range(others)]
    replies, _ = await asyncio.gather(asyncio.gather(*staying), asyncio.gather(*leaving))
    return list(replies)


def threads() -> set[str]:
    """Those of ours; anyio's workers end by themselves after ten idle seconds."""
    return {thread.name for thread in threading.enumerate() if "AnyIO" not in thread.name}


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_work_that_nobody_waits_for_is_not_done_and_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = SlowDevice(monkeypatch, encode_s=0.005, step_s=0.02)
    with serve(tmp_path) as server:
        expected = asyncio.run(call(server.port, predict({**BODY, "decoding": SHORT})))
        asyncio.run(cut_all(server.port, 0))  # whatever is opened once is open
        until(server.is_idle)
        files, names, stepped, left = open_files(), threads(), device.stepped, server.answers(499)
        replies = asyncio.run(cut_all(server.port, 4))
        cut = time.monotonic()
        until(server.is_idle)
        assert time.monotonic() - cut <= 0.1 + device.turn_s(4) + 1.0  # the last: other processes want the same cores
        assert [reply.body["answers"][0]["output"] for reply in replies] == [expected.body["answers"][0]["output"]] * 4
        whole = server.answers(499) - left
        assert whole > CUT // 2  # the control: they were requests, and they were cut
        assert device.stepped - stepped <= 0.05 * whole * STEPS
        until(lambda: open_files() <= files)
        assert threads() == names
        check_books(server)


def check_books(server: Served) -> None:
    """Everybody was answered or has left; all that was answered was good (A-27)."""
    until(lambda: server.answers() == server.answers(200) + server.answers(499))
    assert server.items("ok") == server.answers(200)
    assert not any(server.gauges().values())


class Deaf:
    """An application around ours that never says that the client has left."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def hear() -> Message:
            message = await receive()
            if message["type"] == "http.disconnect":
                await asyncio.sleep(20)
            return message

        await self._app(scope, hear, send)


def steps_of_a_client_that_leaves(server: Served, device: SlowDevice) -> int:
    asyncio.run(leave(server.port, predict({**BODY, "decoding": LONG}), 0.2, "FIN"))
    stepped = device.stepped
    until(server.is_idle)
    return device.stepped - stepped


def wrapped(app: ASGIApp) -> ASGIApp:
    """Behind a middleware that hides the departure from whoever polls for it; ours waits to be told."""

    async def pass_on(request: Any, call_next: Any) -> Any:
        return await call_next(request)

    return BaseHTTPMiddleware(app, dispatch=pass_on)


@pytest.mark.parametrize("around", [lambda app: app, wrapped, Deaf], ids=["as it is", "wrapped", "deaf"])
def test_only_a_server_that_does_not_hear_of_it_does_all_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, around: Around
) -> None:
    """The last is the control: what the test above measures is there to be lost."""
    device = SlowDevice(monkeypatch, encode_s=0.005, step_s=0.02)
    with serve(tmp_path, around) as server:
        wasted = steps_of_a_client_that_leaves(server, device)
    assert (wasted > STEPS // 2) == (around is Deaf)


# -- neighbours -----------------------------------------------------------------------------------------------------


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    tiny.write(tmp_path, *(tiny.prompt(name, seed=seed, image_size=None) for seed, name in enumerate("abc")))
    engine = tiny.engine(tmp_path, OPTIONS)
    engine.start()
    yield engine
    engine.stop(2.0)


class Gate:
    """Holds the engine between turns, so that who joins and who leaves does so at one known moment."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.steps, self.done = threading.Semaphore(0), threading.Semaphore(0)
        self.joins = threading.Event()
        original, may_join = RunningBatch.step, Engine._may_join

        def step(batch: RunningBatch) -> None:
            assert self.steps.acquire(timeout=20)
            original(batch)
            self.done.release()

        monkeypatch.setattr(RunningBatch, "step", step)
        monkeypatch.setattr(Engine, "_may_join", lambda own, ticket: self.joins.is_set() and may_join(own, ticket))

    def let(self, steps: int) -> None:
        """Let so many steps happen, and wait for them."""
        for _ in range(steps):
            self.steps.release()
            assert self.done.acquire(timeout=20)


def stayers(engine: Engine, gate: Gate, leaver: tuple[str, str], cut_after: int) -> list[Answer]:
    """The answers of two requests beside two that leave after so many steps."""

    def ask(task: str, text: str, priority: Any = "interactive") -> Any:
        fields = {"method": "greedy", "min_length": 12, "max_length": 12}
        request = Request(request_id="r", task=task, text=text, deadline=time.monotonic() + 60, decoding=fields)
        return engine.submit(request)

    gate.joins.clear()
    first, *leaving, last = ask("a", "the dog"), ask(*leaver), ask(*leaver), ask("a", "the bird")
    until(lambda: engine.load().prompts.waiting == 0)
    gate.joins.set()
    engine._queue.wake()
    gate.let(cut_after)
    for future in leaving:
        assert future.cancel()
    for _ in range(20):
        gate.steps.release()
    wait([first, last], timeout=20)
    until(lambda: engine.load().running == 0)
    while gate.steps.acquire(blocking=False):
        pass
    while gate.done.acquire(blocking=False):
        pass
    assert engine.load().memory.slots_used == 0
    return [first.result(0), last.result(0)]


def bits(answers: list[Answer]) -> list[tuple[str, float]]:
    return [(str(answer.output), answer.score) for answer in answers]


@pytest.mark.parametrize("cut_after", [1, 4])
def test_who_stays_gets_the_same_bits_whoever_has_left_beside_them(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, cut_after: int
) -> None:
    """Same shapes, other prompts and texts, cut at the same step."""
    gate = Gate(monkeypatch)
    found = [bits(stayers(engine, gate, leaver, cut_after)) for leaver in [("b", "the cat"), ("c", "red two")]]
    assert found[0] == found[1]
    assert found[0][0] != found[0][1]  # the control: a score tells what it was computed from
