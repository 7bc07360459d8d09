"""The running batch: rows join and leave at every step, and none can tell; faults of the device end few requests."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from promptmux_server.backbone.images import DecodedImage, from_array
from promptmux_server.engine.decoding import make_search
from promptmux_server.engine.engine import Engine
from promptmux_server.engine.memory import Claim, DecodingMemory
from promptmux_server.engine.options import EngineOptions
from promptmux_server.engine.prompt_table import NO_PROMPT, PromptPools
from promptmux_server.engine.request import Answer, Request
from promptmux_server.engine.runner import RunningBatch, Work
from promptmux_server.engine.scheduler import FairQueue
from promptmux_server.errors import BackendUnhealthy, Overloaded
from promptmux_server.tasks.decoding import DecodingParams, Outcome

ANSWERS = ((10, 11), (10, 12), (20,), (30, 31, 32))
SEARCHES = (
    DecodingParams(method="greedy", max_length=3, min_length=3),
    DecodingParams(method="beam", beam_size=4, max_length=9, min_length=2),
    DecodingParams(method="sample", seed=7, max_length=6, top_k=20),
    DecodingParams(method="candidates"),
    DecodingParams(method="beam", beam_size=2, max_length=5, constrained=True),
)


@pytest.fixture(scope="module")
def prompts() -> tuple[PromptPools, list[Any]]:
    pools = PromptPools(tiny.config(), torch.float32, torch.device("cpu"))
    homes = [pools.store(tiny.prompt(f"p{i}", seed=i, encoder_length=n)) for i, n in enumerate((1, 40, 64))]
    return pools, [NO_PROMPT, *homes]


def work(seed: int, homes: Sequence[Any]) -> Work:
    rng = random.Random(seed)
    source = (0, *(rng.randrange(4, 100) for _ in range(rng.randrange(1, 30))), 2)
    params = SEARCHES[seed % len(SEARCHES)]
    search = make_search(params, candidates=ANSWERS)
    return Work(source, (0,), None, search, prompt=homes[seed % len(homes)])


def held(memory: DecodingMemory, work: Work) -> Claim:
    claim = memory.claim(work.slots, work.memory_length)
    assert claim
    return claim


def alone(work: Work, pools: PromptPools) -> Outcome:
    memory = DecodingMemory(200, 256)
    batch = RunningBatch(tiny.model(), pools, memory.stats())
    with torch.no_grad():
        batch.join([(0, work, held(memory, work))])
        while batch.live_rows:
            batch.step()
    return work.search.outcome()


@settings(max_examples=25, deadline=None)
@given(arrivals=st.lists(st.lists(st.integers(0, 59), max_size=4), min_size=1, max_size=8))
def test_whoever_joins_whenever_answers_as_if_alone(
    prompts: tuple[PromptPools, list[Any]], arrivals: list[list[int]]
) -> None:
    """Memory is so small that slots and places are used again and again, by rows of every kind."""
    pools, homes = prompts
    memory = DecodingMemory(200, 256)
    batch = RunningBatch(tiny.model(), pools, memory.stats())
    works: dict[int, tuple[int, Work]] = {}
    claims: dict[int, Claim] = {}
    waiting = [seed for turn in arrivals for seed in turn]
    row = 0

    def leave() -> None:
        for finished in batch.take_finished():
            memory.release(claims.pop(finished))

    with torch.no_grad():
        while waiting or batch.live_rows:
            joining = []
            for _ in range(min(len(waiting), 3)):
                one = work(waiting[0], homes)
                claim = memory.claim(one.slots, one.memory_length)
                if claim is None:
                    break
                works[row], claims[row] = (waiting.pop(0), one), claim
                joining.append((row, one, claim))
                row += 1
            if joining:
                batch.join(joining)
                leave()
            if batch.live_rows:
                batch.step()
                leave()
    assert (memory.stats().slots_used, memory.stats().places_used) == (0, 0)
    for seed, mixed in works.values():
        expected = alone(work(seed, homes), pools)
        found = mixed.search.outcome()
        assert [h.tokens for h in found.hypotheses] == [h.tokens for h in expected.hypotheses]
        assert found.hypotheses[0].score == pytest.approx(expected.hypotheses[0].score, abs=1e-3)


Start = Callable[..., Engine]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    engines: list[Engine] = []

    def make(**options: Any) -> Engine:
        tiny.write(tmp_path, tiny.prompt("a"), tiny.prompt("b", seed=2, encoder_length=40))
        engine = tiny.engine(tmp_path, EngineOptions(**options))
        engine.start()
        engines.append(engine)
        return engine

    yield make
    for engine in engines:
        engine.stop(2.0)


def picture(seed: int = 0) -> DecodedImage:
    return from_array(np.random.default_rng(seed).integers(0, 256, (40, 50, 3), dtype=np.uint8))


def ask(task: str = "a", text: str = "the dog", **fields: Any) -> Request:
    return Request(request_id="r", task=task, text=text, deadline=time.monotonic() + 30, **fields)


def until_idle(engine: Engine) -> None:
    deadline = time.monotonic() + 5
    while engine.load().running:
        assert time.monotonic() < deadline
        time.sleep(0.01)


LONG = {"method": "greedy", "min_length": 60, "max_length": 60}
SHORT = {"method": "greedy", "min_length": 2, "max_length": 2}


def test_a_short_request_does_not_wait_for_a_long_one(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = threading.Semaphore(0)
    original = RunningBatch.step
    monkeypatch.setattr(RunningBatch, "step", lambda self: (steps.acquire(timeout=20), original(self))[1])
    engine = start()
    long = engine.submit(ask(decoding=LONG))
    steps.release()
    short = engine.submit(ask("b", decoding=SHORT))
    for _ in range(8):
        steps.release()
    assert short.result(20)
    assert not long.done()
    steps.release(100)
    assert long.result(20)


def test_memory_is_all_there_again_whatever_ended_its_requests(start: Start) -> None:
    engine = start()
    futures = [engine.submit(ask("ab"[i % 2], decoding=LONG if i % 3 else SHORT)) for i in range(12)]
    for future in futures[::4]:
        future.cancel()
    for future in futures:
        if not future.cancelled():
            future.result(20)
    until_idle(engine)
    stats = engine.load().memory
    assert (stats.slots_used, stats.places_used) == (0, 0)


def test_more_requests_than_memory_wait_and_are_all_answered(start: Start) -> None:
    bytes_per_token = 2 * tiny.config().decoder_layers * tiny.config().d_model * 4
    engine = start(decode_cache_bytes=70 * bytes_per_token, cross_memory_bytes=80 * bytes_per_token)
    futures = [engine.submit(ask("ab"[i % 2], decoding=LONG if i % 2 else SHORT)) for i in range(8)]
    most = 0
    while not all(future.done() for future in futures):
        most = max(most, engine.load().memory.slots_used)
        time.sleep(0.001)
    assert all(future.result(0) for future in futures)
    assert most <= 70


def test_a_request_that_can_never_fit_is_told_so_at_the_door(start: Start) -> None:
    engine = start(decode_cache_bytes=70_000)
    with pytest.raises(Exception, match="more decoding memory than the server has"):
        engine.submit(ask(decoding=LONG))
    assert engine.submit(ask(decoding=SHORT)).result(20)


def test_a_request_that_takes_the_steps_expected_is_charged_no_more_and_no_less(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stem's time too, which its picture cost when it came in."""
    charged: list[float] = []
    monkeypatch.setattr(FairQueue, "charge", lambda self, share, extra_ms: charged.append(extra_ms))
    engine = start()
    engine.submit(ask(image=picture(), decoding=SHORT)).result(20)
    until_idle(engine)
    assert charged == [0.0]


# -- the same picture -----------------------------------------------------------------------------------------------


def test_a_picture_asked_about_while_the_stem_is_at_it_passes_once(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside, go = threading.Event(), threading.Event()
    original, passes = tiny.model().image_tokens, []

    def stem(pixels: torch.Tensor) -> Any:
        passes.append(len(pixels))
        inside.set()
        assert go.wait(20)
        return original(pixels)

    monkeypatch.setattr(tiny.model(), "image_tokens", stem, raising=False)
    engine = start()  # nothing is cached beyond the requests that hold a picture
    first = engine.submit(ask(image=picture()))
    assert inside.wait(20)
    second = engine.submit(ask("b", image=picture()))
    go.set()
    assert first.result(20)
    assert second.result(20)
    assert passes == [1]


# -- deterministic mode (A-20) --------------------------------------------------------------------------------------


def scores_under_load(engine: Engine, needle: Callable[[], Request], seed: int) -> Answer:
    rng = random.Random(seed)
    crowd = [
        engine.submit(
            ask(rng.choice("ab"), "the dog and the cat"[: rng.randrange(3, 18)], image=picture(rng.randrange(4)))
        )
        for _ in range(rng.choice((0, 1, 2, 6, 15)))
    ]
    found = engine.submit(needle())
    for future in crowd:
        future.result(20)
    return found.result(20)


def needle(**fields: Any) -> Request:
    return ask("b", "where is the red bird", image=picture(9), **fields)


@pytest.mark.parametrize("how", ["server", "request"])
def test_deterministic_answers_are_the_same_bits_under_any_load(start: Start, how: str) -> None:
    engine = start(deterministic=how == "server", image_cache_bytes=1 << 20)
    fields = {"deterministic": True} if how == "request" else {}
    answers = [scores_under_load(engine, lambda: needle(**fields), seed) for seed in range(12)]
    assert len({(str(answer.output), answer.score) for answer in answers}) == 1


def test_without_it_some_bit_differs(start: Start) -> None:
    """The control: were batches the same bits anyway, the test above would show nothing."""
    engine = start()
    found: set[tuple[str, float]] = set()
    for seed in range(150):  # on a busy machine the crowd may come too late for dozens of them
        answer = scores_under_load(engine, needle, seed)
        found.add((str(answer.output), answer.score))
        if len(found) > 1:
            break
    assert len({score for _, score in found}) > 1
    assert len({output for output, _ in found}) == 1


# -- a device that fails (A-21, A-22) -------------------------------------------------------------------------------


class Cramped:
    """A model whose device holds at most `rows` requests at a time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
        self.rows, self.refused = rows, 0
        self._encode, self._step = tiny.model().encode, tiny.model().step
        monkeypatch.setattr(tiny.model(), "encode", self.encode, raising=False)
        monkeypatch.setattr(tiny.model(), "step", self.step, raising=False)

    def _check(self, count: int) -> None:
        if count > self.rows:
            self.refused += 1
            raise torch.OutOfMemoryError("injected")

    def encode(self, rows: Sequence[Any], prompts: Any) -> Any:
        self._check(len(rows))
        return self._encode(rows, prompts)

    def step(self, beams: Any, *rest: Any) -> Any:
        self._check(len(beams.groups))
        return self._step(beams, *rest)


@pytest.fixture
def held_back(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """While the event is not set nobody joins the running batch."""
    go = threading.Event()
    original = Engine._may_join
    monkeypatch.setattr(Engine, "_may_join", lambda self, ticket: go.is_set() and original(self, ticket))
    return go


@pytest.mark.parametrize("rows", [1, 3])
def test_a_batch_too_large_for_the_device_is_split_and_answers_as_ever(
    start: Start, monkeypatch: pytest.MonkeyPatch, held_back: threading.Event, rows: int
) -> None:
    engine = start()
    held_back.set()
    expected = [engine.submit(ask("ab"[i % 2])).result(20).output for i in range(8)]
    held_back.clear()
    device = Cramped(monkeypatch, rows)
    futures = [engine.submit(ask("ab"[i % 2])) for i in range(8)]
    held_back.set()
    assert [future.result(20).output for future in futures] == expected
    assert device.refused > 0


def test_a_request_that_does_not_fit_alone_is_refused_and_the_next_is_served(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = start()
    with monkeypatch.context() as context:
        Cramped(context, 0)
        for _ in range(3):
            with pytest.raises(Overloaded) as refused:
                engine.submit(ask()).result(20)
            assert refused.value.retry_after_s
    assert all(engine.submit(ask()).result(20) for _ in range(20))
    assert engine.load().memory.slots_used == 0


def test_a_lost_device_fails_everyone_and_the_engine_says_so(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = start()

    def lost(*_: object) -> None:
        raise torch.AcceleratorError("CUDA error: device-side assert triggered")

    monkeypatch.setattr(tiny.model(), "encode", lost, raising=False)
    futures = [engine.submit(ask()) for _ in range(3)]
    for future in futures:
        with pytest.raises(BackendUnhealthy):
            future.result(20)
    assert not engine.live()
    assert not engine.ready()
    assert engine.failed()
    with pytest.raises(BackendUnhealthy):
        engine.submit(ask())


def test_a_device_that_hangs_turns_the_engine_unhealthy(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    go = threading.Event()
    original = tiny.model().encode
    monkeypatch.setattr(tiny.model(), "encode", lambda *rest: (go.wait(20), original(*rest))[1], raising=False)
    engine = start(stalled_after_s=0.6)
    assert engine.live()
    future = engine.submit(ask())
    deadline = time.monotonic() + 5
    while engine.live():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert not engine.ready()
    go.set()
    assert future.result(20)
    assert engine.live()
