"""The engine: one thread that turns waiting requests into batches and batches into answers.

`submit` is the only door. Owns admission, deadlines, cancellation and the futures; what a batch computes is the
runner's, what a text means is the task's.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, InvalidStateError, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from promptmux_server.backbone.encoder import ImageTokens
from promptmux_server.backbone.images import DecodedImage, preprocess
from promptmux_server.backbone.model import OFA
from promptmux_server.backbone.tokenizer import Tokenizer
from promptmux_server.engine.decoding import Search, TextStream, make_search
from promptmux_server.engine.image_cache import ImageCache, ImageKey
from promptmux_server.engine.prompt_table import PromptPools
from promptmux_server.engine.registry import Registry, ServedTask
from promptmux_server.engine.request import Answer, EngineLoad, ReloadReport, Request, TaskStatus
from promptmux_server.engine.runner import RunningBatch, Work
from promptmux_server.engine.scheduler import AdmissionQueue
from promptmux_server.errors import (
    BackendUnhealthy,
    DeadlineExceeded,
    Draining,
    Internal,
    InvalidParameter,
    NonfiniteOutput,
    PromptmuxError,
)
from promptmux_server.tasks import EncodedItem, TaskSpec, decode_outcome, encode_item
from promptmux_server.tasks.decoding import DecodingParams

log = logging.getLogger(__name__)

PICTURES_PER_STEM_PASS = 8


@dataclass(frozen=True, eq=False)
class _Picture:
    """A request's picture: `seen` by the stem already, or else on its way to the model's input, `pixels` (3, S, S)."""

    image: DecodedImage
    key: ImageKey
    seen: ImageTokens | None
    pixels: Future[Tensor] = field(default_factory=Future)


@dataclass(eq=False)
class _Ticket:
    """A request between admission and answer."""

    request: Request
    task: ServedTask
    item: EncodedItem
    search: Search
    text: TextStream
    picture: _Picture | None
    future: Future[Answer]
    admitted: float
    started: float = 0.0


class Engine:
    """Serves the tasks of a prompt directory on one backbone; every public method may be called from any thread."""

    def __init__(
        self,
        model: OFA,
        tokenizer: Tokenizer,
        fingerprint: str,
        prompts: Path,
        *,
        queue_size: int = 256,
        max_batch: int = 32,
        image_cache_bytes: int = 0,
    ) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._pools = PromptPools(model.config, model.dtype, model.device)
        self._registry = Registry(prompts, model.config, fingerprint, self._pools)
        self._queue: AdmissionQueue[_Ticket] = AdmissionQueue(queue_size)
        self._max_batch = max_batch
        self._images = ImageCache(image_cache_bytes)
        self._preparing = ThreadPoolExecutor(2, thread_name_prefix="promptmux-images")
        self._thread = threading.Thread(target=self._run, name="promptmux-engine", daemon=True)
        self._running = 0
        self._stopping = False
        self._drain_deadline = float("inf")

    # -- the door ---------------------------------------------------------------------------------------------------

    def start(self) -> ReloadReport:
        """Read the prompt directory and begin to serve."""
        report = self._registry.reload()
        self._thread.start()
        return report

    def submit(self, request: Request) -> Future[Answer]:
        """Admit one request; see `EnginePort.submit` for what it raises."""
        if self._stopping:
            raise Draining("The server is shutting down. Send the request to another replica.", retry_after_s=5)
        if not self._thread.is_alive():
            raise BackendUnhealthy("The engine has stopped.", retry_after_s=10)
        task = self._registry.resolve(request.task)
        try:
            ticket = self._ticket(request, task)
            ticket.future.add_done_callback(lambda _: self._registry.release(task))
        except BaseException:
            self._registry.release(task)
            raise
        try:
            self._queue.put(ticket)
        except PromptmuxError:
            ticket.future.cancel()
            raise
        if ticket.picture and ticket.picture.seen is None:
            self._preparing.submit(_prepare, ticket.picture)
        return ticket.future

    def tasks(self) -> list[TaskStatus]:
        return self._registry.statuses()

    def reload(self) -> ReloadReport:
        return self._registry.reload()

    def ready(self) -> bool:
        return self._thread.is_alive() and not self._stopping

    def live(self) -> bool:
        return self._thread.is_alive() or self._stopping

    def load(self) -> EngineLoad:
        return EngineLoad(waiting=len(self._queue), running=self._running, images=self._images.stats())

    def stop(self, drain_timeout_s: float) -> None:
        """Refuse new work, finish what is admitted for up to the given time, then fail the rest with `Draining`."""
        self._stopping = True
        self._drain_deadline = time.monotonic() + drain_timeout_s
        self._queue.close()
        if self._thread.ident is not None:
            self._thread.join(drain_timeout_s + 5.0)
        for ticket in self._queue.clear():
            _fail(ticket, Draining("The server shut down before this request ran.", retry_after_s=5))
        self._preparing.shutdown(wait=False, cancel_futures=True)

    # -- admission --------------------------------------------------------------------------------------------------

    def _ticket(self, request: Request, task: ServedTask) -> _Ticket:
        spec = task.spec
        if spec.takes_image and request.image is None and not spec.takes_text:
            raise InvalidParameter("This task needs a picture: send `image` as base64.", param="image")
        if request.image is not None and not spec.takes_image:
            raise InvalidParameter("This task takes no picture: leave `image` out.", param="image")
        params = spec.decoding.merged(request.decoding or {})
        item = encode_item(spec, self._tokenizer, request.text, request.premise)
        self._check_lengths(item, params)
        search = make_search(params, candidates=item.candidates, prefix=item.prefix_ids)
        return _Ticket(
            request=request,
            task=task,
            item=item,
            search=search,
            text=TextStream(search, self._tokenizer, spec.kind, request.on_text),
            picture=self._picture(request.image, spec) if request.image else None,
            future=Future(),
            admitted=time.monotonic(),
        )

    def _picture(self, image: DecodedImage, spec: TaskSpec) -> _Picture:
        key = ImageKey(image.digest, spec.image_size, spec.image_mean, spec.image_std)
        return _Picture(image, key, self._images.get(key))

    def _check_lengths(self, item: EncodedItem, params: DecodingParams) -> None:
        limit = self._model.config.max_positions
        longest = max((len(answer) for answer in item.candidates or ()), default=params.max_length) + 1
        if len(item.source_ids) > limit or len(item.prefix_ids) + longest > limit:
            raise InvalidParameter(f"The text is too long for this backbone's {limit} positions.", param="text")

    # -- the loop ---------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while tickets := self._queue.take(self._max_batch):
            ready = [ticket for ticket in tickets if self._may_start(ticket)]
            self._running = len(ready)
            try:
                self._serve(ready)
            except Exception:
                log.exception("a batch of %d requests failed", len(ready))
                for ticket in ready:
                    _fail(ticket, Internal("The server failed on this request; it is logged under its request id."))
            self._running = 0

    @torch.no_grad()
    def _serve(self, tickets: Sequence[_Ticket]) -> None:
        """Stem, encoder, prefill, then steps until every request has ended."""
        tickets, images = self._see(tickets)
        if not tickets:
            return
        clock = _Clock()
        works = [
            Work(ticket.item.source_ids, ticket.item.prefix_ids, image, ticket.search)
            for ticket, image in zip(tickets, images, strict=True)
        ]
        batch = RunningBatch(self._model, works, self._pools.batch([ticket.task.residence for ticket in tickets]))
        clock.mark("encode")
        batch.prefill()
        self._settle(tickets, batch, clock)
        while batch.live_rows:
            batch.drop({row for row in batch.live_rows if not self._may_go_on(tickets[row])})
            if batch.live_rows:
                batch.step()
            self._settle(tickets, batch, clock)

    def _see(self, tickets: Sequence[_Ticket]) -> tuple[list[_Ticket], list[ImageTokens | None]]:
        """Run the stem once per distinct new picture; a ticket whose picture cannot be prepared fails alone."""
        fresh: dict[ImageKey, Tensor] = {}
        prepared: list[_Ticket] = []
        for ticket in tickets:
            picture = ticket.picture
            if picture is None or picture.seen:
                prepared.append(ticket)
                continue
            try:
                pixels = picture.pixels.result(timeout=max(0.0, ticket.request.deadline - time.monotonic()))
            except TimeoutError:
                _fail(ticket, DeadlineExceeded("The request's deadline passed while its picture was prepared."))
                continue
            except Exception as error:
                _fail(ticket, error if isinstance(error, PromptmuxError) else Internal("The picture was not prepared."))
                continue
            fresh[picture.key] = pixels
            prepared.append(ticket)
        tokens = self._stem(fresh)
        pictures = [ticket.picture for ticket in prepared]
        return prepared, [(picture.seen or tokens[picture.key]) if picture else None for picture in pictures]

    def _stem(self, pictures: dict[ImageKey, Tensor]) -> dict[ImageKey, ImageTokens]:
        """Pictures of one size share a pass of the stem; what it says is kept for later requests."""
        by_shape: dict[torch.Size, list[ImageKey]] = {}
        for key, pixels in pictures.items():
            by_shape.setdefault(pixels.shape, []).append(key)
        tokens: dict[ImageKey, ImageTokens] = {}
        for keys in by_shape.values():
            for start in range(0, len(keys), PICTURES_PER_STEM_PASS):
                part = keys[start : start + PICTURES_PER_STEM_PASS]
                found = self._model.image_tokens(torch.stack([pictures[key] for key in part]))
                tokens.update(zip(part, found, strict=True))
        for key, image in tokens.items():
            self._images.put(key, image)
        return tokens

    # -- endings ----------------------------------------------------------------------------------------------------

    def _may_start(self, ticket: _Ticket) -> bool:
        ticket.started = time.monotonic()
        return self._may_go_on(ticket)

    def _may_go_on(self, ticket: _Ticket) -> bool:
        """Whether somebody still waits for this request; ends it if not."""
        now = time.monotonic()
        if ticket.future.cancelled():
            return False
        if now > ticket.request.deadline:
            _fail(ticket, DeadlineExceeded("The request's deadline passed before its answer was complete."))
            return False
        if now > self._drain_deadline:
            _fail(ticket, Draining("The server shut down before this request was complete.", retry_after_s=5))
            return False
        return True

    def _settle(self, tickets: Sequence[_Ticket], batch: RunningBatch, clock: _Clock) -> None:
        """Pass on what the last step wrote, and answer the rows that ended in it."""
        for row in batch.live_rows:
            tickets[row].text.step()
        for row in batch.take_failed():
            _fail(tickets[row], NonfiniteOutput("This task's prompt produced numbers that are not finite."))
        for row in batch.take_finished():
            ticket = tickets[row]
            try:
                answer = self._answer(ticket, clock)
            except PromptmuxError as error:
                _fail(ticket, error)
            else:
                ticket.text.finish()
                _resolve(ticket, answer)

    def _answer(self, ticket: _Ticket, clock: _Clock) -> Answer:
        outcome = ticket.search.outcome()
        image = ticket.request.image
        size = (image.width, image.height) if image else None
        output, score = decode_outcome(ticket.task.spec, self._tokenizer, outcome, size)
        now = time.monotonic()
        encoded = clock.marks["encode"]
        return Answer(
            task=ticket.task.ref.name,
            output=output,
            score=score,
            prompt=ticket.task.ref,
            timings_ms={
                "queue": _ms(ticket.started - ticket.admitted),
                "vision": _ms(clock.start - ticket.started),
                "encode": _ms(encoded - clock.start),
                "decode": _ms(now - encoded),
                "total": _ms(now - ticket.admitted),
            },
        )


class _Clock:
    """When a batch passed its stages, in `time.monotonic` seconds."""

    def __init__(self) -> None:
        self.start = time.monotonic()
        self.marks: dict[str, float] = {}

    def mark(self, stage: str) -> None:
        self.marks[stage] = time.monotonic()


def _prepare(picture: _Picture) -> None:
    """Resize and normalise a picture, off the engine's thread."""
    key = picture.key
    try:
        picture.pixels.set_result(preprocess(picture.image, key.size, key.mean, key.std))
    except Exception as error:
        picture.pixels.set_exception(error)


def _resolve(ticket: _Ticket, answer: Answer) -> None:
    try:
        ticket.future.set_result(answer)
    except InvalidStateError:
        assert ticket.future.cancelled()  # the client left between the last step and now


def _fail(ticket: _Ticket, error: PromptmuxError) -> None:
    try:
        ticket.future.set_exception(error)
    except InvalidStateError:
        assert ticket.future.done()  # answered, failed or cancelled already


def _ms(seconds: float) -> float:
    return round(1000.0 * seconds, 3)
