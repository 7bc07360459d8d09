"""A request between admission and answer, and how it ends: once, whoever is first to end it."""

from __future__ import annotations

import time
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field

from promptmux_server.engine.decoding import Search, TextStream
from promptmux_server.engine.memory import Claim
from promptmux_server.engine.pictures import Picture
from promptmux_server.engine.prompt_versions import Lease
from promptmux_server.engine.registry import ServedTask
from promptmux_server.engine.request import Answer, Request
from promptmux_server.engine.runner import Work
from promptmux_server.engine.scheduler import Share
from promptmux_server.errors import PromptmuxError
from promptmux_server.tasks import EncodedItem


@dataclass
class Marks:
    """When a request passed its stages, in `time.monotonic` seconds; a stage not reached yet is 0."""

    admitted: float = field(default_factory=time.monotonic)
    started: float = 0.0
    seen: float = 0.0
    encoded: float = 0.0

    def timings_ms(self) -> dict[str, float]:
        """Milliseconds of each stage of a request that ends now."""
        now = time.monotonic()
        spans = {
            "queue": self.started - self.admitted,
            "vision": self.seen - self.started,
            "encode": self.encoded - self.seen,
            "decode": now - self.encoded,
            "total": now - self.admitted,
        }
        return {stage: round(1000.0 * seconds, 3) for stage, seconds in spans.items()}


@dataclass(eq=False)
class Ticket:
    """What the engine knows of one request."""

    request: Request
    task: ServedTask
    lease: Lease
    item: EncodedItem
    search: Search
    text: TextStream
    picture: Picture | None
    deterministic: bool
    row: int
    future: Future[Answer] = field(default_factory=Future)
    marks: Marks = field(default_factory=Marks)
    claim: Claim | None = None
    refusal: PromptmuxError | None = None
    """Why it cannot run, found while it waited."""
    expected_steps: float = 0.0
    """Decoding steps for which it was charged at admission."""
    steps: int = 0
    """Decoding steps it has taken."""

    @property
    def share(self) -> Share:
        return Share(self.request.key, self.request.task, self.request.priority)

    @property
    def most_steps(self) -> int:
        return -(-self.search.most_tokens // self.search.width)

    @property
    def memory_length(self) -> int:
        """Tokens of its encoder row: picture, then text."""
        return len(self.item.source_ids) + (self.picture.length if self.picture else 0)

    @property
    def slots(self) -> int:
        """The most decode cache slots it can use."""
        return len(self.item.prefix_ids) + self.search.most_tokens

    def work(self) -> Work:
        """The request as the running batch takes it, once its picture is seen and its prompt held."""
        return Work(
            self.item.source_ids,
            self.item.prefix_ids,
            self.picture.seen if self.picture else None,
            self.search,
            prompt=self.lease.residence,
            alone=self.deterministic,
        )

    def resolve(self, answer: Answer) -> None:
        try:
            self.future.set_result(answer)
        except InvalidStateError:
            assert self.future.cancelled()  # the client left between the last step and now

    def fail(self, error: PromptmuxError) -> None:
        try:
            self.future.set_exception(error)
        except InvalidStateError:
            assert self.future.done()  # answered, failed or cancelled already
