"""The engine: one thread that keeps one running batch; requests join and leave it at every step.

`submit` is the only door. Owns the loop, deadlines, cancellation and the end of every request; who goes next is the
scheduler's, what a batch computes the runner's, what a text means the task's.
"""

from __future__ import annotations

import logging
import math
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from weakref import ref

import torch

from promptmux_prompts import Prompt, Store
from promptmux_server.backbone.cache import DecodeCache
from promptmux_server.backbone.memory_pool import MemoryPool
from promptmux_server.backbone.model import OFA
from promptmux_server.backbone.tokenizer import Tokenizer
from promptmux_server.engine.admission import Admission
from promptmux_server.engine.cost_model import CostModel, Stage, WorkSize
from promptmux_server.engine.decoding import NonFiniteLogits
from promptmux_server.engine.device_faults import is_device_lost, is_out_of_memory
from promptmux_server.engine.keeper import Keeper
from promptmux_server.engine.memory import DecodingMemory
from promptmux_server.engine.options import EngineOptions
from promptmux_server.engine.pictures import Pictures
from promptmux_server.engine.prompt_copies import PromptCopies
from promptmux_server.engine.prompt_files import PromptFiles
from promptmux_server.engine.prompt_loader import PromptLoader
from promptmux_server.engine.prompt_table import PromptPools
from promptmux_server.engine.prompt_tiers import PromptTiers
from promptmux_server.engine.prompt_versions import Lease
from promptmux_server.engine.publisher import Publisher
from promptmux_server.engine.registry import Registry
from promptmux_server.engine.rehearsal import Rehearsal
from promptmux_server.engine.rehearsals import Rehearsals
from promptmux_server.engine.request import Answer, Budget, EngineLoad, ReloadReport, Request, TaskInputs, TaskStatus
from promptmux_server.engine.runner import RunningBatch
from promptmux_server.engine.scheduler import FairQueue, QueueLimits
from promptmux_server.engine.shelf import Shelf
from promptmux_server.engine.task_specs import TaskSpecs
from promptmux_server.engine.ticket import Ticket
from promptmux_server.engine.warm_up import warm_up
from promptmux_server.errors import (
    BackendUnhealthy,
    DeadlineExceeded,
    Draining,
    Internal,
    NonfiniteOutput,
    Overloaded,
    PromptmuxError,
)
from promptmux_server.tasks import TaskSpec, decode_outcome

log = logging.getLogger(__name__)

IDLE_S = 0.5
"""The longest the loop sleeps; what it waits for wakes it sooner."""

LATENESS_MARGIN = 0.2
"""Part of a request's expected time in the batch: with so much less time left it is not begun, for it would be late and
the device's work lost; with so much more it is admitted. Between the two, estimates may err."""


class Engine:
    """Serves the prompts of one store on one backbone; every public method may be called from any thread."""

    def __init__(
        self,
        model: OFA,
        tokenizer: Tokenizer,
        fingerprint: str,
        store: Store,
        options: EngineOptions | None = None,
        *,
        seeds: Path | None = None,
    ) -> None:
        """`seeds`: a directory of prompt files to take up at the start and at each reload."""
        options = options or EngineOptions()
        self._model, self._tokenizer, self._options = model, tokenizer, options
        limits = QueueLimits(options.queue_size, options.queue_per_key, options.queue_per_task)
        self._queue: FairQueue[Ticket] = FairQueue(limits, options.key_weights, random.Random())
        self._costs = CostModel()
        files = PromptFiles.of(model.config, fingerprint, model.dtype)
        self._pools = PromptPools(model.config, model.dtype, model.device, options.prompt_device_bytes)
        copies = PromptCopies(self._pools)
        self._tiers = PromptTiers(self._pools, copies, options.prompt_host_bytes, options.max_batch)
        self._loader = PromptLoader(self._tiers, copies, files.read, self._queue.wake)
        shelf = Shelf(store, files, TaskSpecs(files, model.config))
        self._registry = Registry(shelf.specs, self._tiers)
        self._publisher = Publisher(shelf, self._registry, self._rehearse, seeds)
        self._keeper = Keeper(self._publisher.roll_back_nonfinite, store.collect, options.nonfinite_limit)
        self._rehearsals = Rehearsals(self._queue.wake)
        self._pictures = Pictures(model, options.image_cache_bytes, self._queue.wake)
        self._slot_bytes = DecodeCache.bytes_per_slot(model.config, model.dtype)
        self._place_bytes = MemoryPool.bytes_per_place(model.config, model.dtype, model.device)
        self._memory = DecodingMemory(
            slots=options.decode_cache_bytes // self._slot_bytes, places=options.cross_memory_bytes // self._place_bytes
        )
        self._admission = Admission(model, tokenizer, self._pictures, self._memory, deterministic=options.deterministic)
        self._batch = RunningBatch(model, self._pools, self._memory.stats())
        self._running: dict[int, Ticket] = {}
        self._thread = threading.Thread(target=self._run, name="promptmux-engine", daemon=True)
        self._stopping = self._warm = False
        self._drain_deadline = float("inf")
        self._last_turn = time.monotonic()
        self._lost: str | None = None

    # -- the door ---------------------------------------------------------------------------------------------------

    def start(self) -> ReloadReport:
        """Recover what is stored, take up what is new in the prompt directory, and begin to serve."""
        for part in (self._loader, self._thread, self._keeper):
            part.start()  # first: the warm-up takes seconds, as does reading thousands of files
        self._publisher.follower.recover(fall_back=self._options.fall_back)
        return self.reload()

    def submit(self, request: Request) -> Future[Answer]:
        """Admit one request; see `EnginePort.submit` for what it raises."""
        if self._stopping:
            raise Draining("The server is shutting down. Send the request to another replica.", retry_after_s=5)
        if self._lost is not None or not self._thread.is_alive():
            raise BackendUnhealthy("The engine has stopped.", retry_after_s=10)
        task, lease = self._registry.resolve(request.task)
        try:
            ticket = self._admission.ticket(request, task, lease)
            ticket.expected_steps = self._costs.expected_steps(request.task, ticket.most_steps)
            cost_ms = self._estimate(ticket, ticket.expected_steps)
            in_batch_ms = self._time_in_batch_ms(ticket)
            patience_ms = 1000.0 * (request.deadline - time.monotonic()) - in_batch_ms * (1.0 + LATENESS_MARGIN)
            start_by = request.deadline - in_batch_ms * (1.0 - LATENESS_MARGIN) / 1000.0
            # Costs that were never measured refuse nobody.
            self._queue.put(ticket, ticket.share, cost_ms, start_by, patience_ms if self._options.warm_up else math.inf)
        except BaseException:
            self._tiers.release(lease)
            raise
        waiting = ref(ticket)  # weak: else future and ticket would keep each other, and the picture, until a collection
        ticket.future.add_done_callback(lambda _: self._ended(waiting(), lease))
        if ticket.picture:
            self._pictures.prepare(ticket.picture)
        return ticket.future

    def _estimate(self, ticket: Ticket, steps: float) -> float:
        """Milliseconds of the device for a request whose answer takes so many steps, in a batch half full."""
        return self._costs.estimate(_size(ticket, steps), shared_by=(self._options.max_batch + 1) / 2)

    def _time_in_batch_ms(self, ticket: Ticket) -> float:
        """How long a request runs once its turn has come; 0 where nothing waits, for then the batch may be empty soon
        and what turns took under load says nothing."""
        return self._costs.time_in_batch_ms(_size(ticket, ticket.expected_steps)) if len(self._queue) else 0.0

    def _ended(self, ticket: Ticket | None, lease: Lease) -> None:
        """Answered, failed or cancelled, on whatever thread: nothing of it waits any longer.

        A prompt that is held by then is given back when its row is dropped, which may be reading still.
        """
        if ticket is not None:
            self._queue.discard(ticket)
        self._tiers.cancel(lease)

    @property
    def prompts(self) -> Publisher:
        return self._publisher

    def _rehearse(self, prompt: Prompt, spec: TaskSpec) -> None:
        """Prepare a prompt's rehearsal on this thread, have it played between the requests' passes, and wait for it."""
        rehearsal = Rehearsal(self._model, self._tokenizer, prompt, spec, self._memory.fits)
        try:
            self._rehearsals.run(rehearsal.passes())
        except Exception as error:
            raise _error(error) from error

    def inputs(self, task: str) -> TaskInputs | None:
        return self._registry.inputs(task)

    def tasks(self, after: str = "", limit: int | None = None) -> list[TaskStatus]:
        return self._registry.statuses(after, limit)

    def task(self, name: str) -> TaskStatus | None:
        return self._registry.status(name)

    def reload(self) -> ReloadReport:
        return self._publisher.follower.reload()

    def ready(self) -> bool:
        return self._warm and self.live() and not self._stopping

    def live(self) -> bool:
        if self._lost is not None or self._is_stalled():
            return False
        return self._thread.is_alive() or self._stopping

    def failed(self) -> bool:
        return self._lost is not None

    def _is_stalled(self) -> bool:
        """Whether the turn that runs now has taken too long; an idle engine begins a turn every `IDLE_S`."""
        return (
            self._warm
            and time.monotonic() - self._last_turn > self._options.stalled_after_s
            and self._thread.is_alive()
        )

    def load(self) -> EngineLoad:
        memory, images, prompts = self._memory.stats(), self._pictures.cache.stats(), self._tiers.stats()
        slot, place = self._slot_bytes, self._place_bytes
        return EngineLoad(
            waiting=len(self._queue),
            running=len(self._running),
            images=images,
            memory=memory,
            prompts=prompts,
            budgets={
                "decode_cache": Budget(memory.slots_used * slot, memory.slots * slot),
                "cross_memory": Budget(memory.places_used * place, memory.places * place),
                "image_cache": Budget(images.bytes, self._options.image_cache_bytes),
                "prompts_device": Budget(prompts.device_bytes, prompts.device_budget_bytes),
                "prompts_host": Budget(prompts.host_bytes, prompts.host_budget_bytes),
            },
            cost_errors={str(stage): ratio for stage, ratio in self._costs.error_ratios.items()},
            registry=replace(self._registry.stats(), rolled_back=self._publisher.rolled_back),
        )

    def stop(self, drain_timeout_s: float) -> None:
        """Refuse new work, finish what is admitted for up to the given time, then fail the rest with `Draining`."""
        self._stopping = True
        self._drain_deadline = time.monotonic() + drain_timeout_s
        self._queue.close()
        if self._thread.ident is not None:
            self._thread.join(drain_timeout_s + 5.0)
        self._pictures.close()
        self._drain()
        self._keeper.close()
        self._loader.close()

    # -- the loop ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _run(self) -> None:
        try:
            if self._options.warm_up:
                warm_up(self._model, self._batch, self._memory, self._costs)
            self._warm = True
            while not self._stopping or self._running or len(self._queue) or len(self._rehearsals):
                self._last_turn = time.monotonic()
                self._turn()
        except Exception as error:
            log.exception("the device is lost")
            self._lost = str(error)
            self._queue.close()
            self._fail_all(BackendUnhealthy, "The device failed; the server restarts.", retry_after_s=10)

    def _turn(self) -> None:
        """A rehearsal takes a step; nobody waits in vain; who fits joins; everyone in the batch takes one step."""
        self._rehearsals.step()
        self._let_go()
        began = time.perf_counter()
        room = self._options.max_batch - len(self._running)
        self._join(self._queue.take(room, self._options.joining_ms, self._may_join))
        if not self._running:
            if not len(self._rehearsals):
                self._queue.wait(min(IDLE_S, self._queue.until_next_deadline(time.monotonic())))
            return
        self._guarded(self._step, list(self._running.values()))
        self._settle()
        self._costs.observe_turn(1000.0 * (time.perf_counter() - began))

    def _step(self) -> None:
        with self._measured("step", self._batch.beams):
            self._batch.step()
        for ticket in self._running.values():
            ticket.steps += 1

    @contextmanager
    def _measured(self, stage: Stage, count: int) -> Iterator[None]:
        """Let the cost model learn from a pass of so many units; one that fails teaches nothing."""
        started = time.perf_counter()
        yield
        if count:
            self._costs.observe(stage, count, 1000.0 * (time.perf_counter() - started))

    def _let_go(self) -> None:
        """End what is late, drop what nobody waits for."""
        now = time.monotonic()
        late = [*self._queue.expire(now), *(t for t in self._running.values() if now > t.request.deadline)]
        for ticket in late:
            ticket.fail(DeadlineExceeded("The request's deadline passes before its answer is complete."))
        if now > self._drain_deadline:
            self._drain()
        self._drop([ticket for ticket in self._running.values() if ticket.future.done()])

    def _may_join(self, ticket: Ticket) -> bool:
        """Whether picture, prompt and memory are there, both claimed then; a request told no is asked again."""
        if ticket.picture and not ticket.picture.ready:
            return False
        ticket.claim = self._memory.claim(ticket.slots, ticket.memory_length)
        if ticket.claim is None:
            return False
        try:
            if self._tiers.hold(ticket.lease) is not None:
                return True
        except PromptmuxError as error:
            ticket.refusal = error
            return True
        self._memory.release(ticket.claim)
        ticket.claim = None
        return False

    def _join(self, tickets: Sequence[Ticket]) -> None:
        """Stem, encoder and decoder prefixes of those who come in."""
        for ticket in tickets:
            ticket.marks.started = time.monotonic()
            self._running[ticket.row] = ticket
            if ticket.refusal is not None:
                ticket.fail(ticket.refusal)
        self._drop([ticket for ticket in tickets if ticket.future.done()])
        joining = [ticket for ticket in tickets if ticket.row in self._running]
        if joining:
            self._guarded(lambda: self._encode(joining), joining)
            self._settle()

    def _drop(self, tickets: Sequence[Ticket]) -> None:
        """Let requests leave the batch and give back what they held, those that the batch has ended among them."""
        self._batch.drop({ticket.row for ticket in tickets})
        for ticket in tickets:
            if self._running.pop(ticket.row, None) is None:
                continue
            assert ticket.claim
            self._memory.release(ticket.claim)
            self._tiers.release(ticket.lease)
            # Both estimates now: by its end a picture is seen, and one made at admission would give the stem back.
            extra_ms = self._estimate(ticket, ticket.steps) - self._estimate(ticket, ticket.expected_steps)
            self._queue.charge(ticket.share, extra_ms)
            ticket.picture = None  # megabytes, which whoever still knows the ticket must not keep

    def _encode(self, tickets: Sequence[Ticket]) -> None:
        pictures = {ticket.picture for ticket in tickets if ticket.picture and ticket.picture.seen is None}
        with self._measured("stem", len(pictures)):
            self._pictures.see(list(pictures))
        unseen = [ticket for ticket in tickets if ticket.picture and ticket.picture.failure]
        for ticket in unseen:
            assert ticket.picture
            assert ticket.picture.failure
            ticket.fail(_error(ticket.picture.failure))
        self._drop(unseen)
        seen = [ticket for ticket in tickets if ticket.row in self._running]
        for ticket in seen:
            ticket.marks.seen = time.monotonic()
        with self._measured("encode", sum(ticket.memory_length for ticket in seen)):
            self._batch.join([(ticket.row, ticket.work(), ticket.claim) for ticket in seen if ticket.claim])
        for ticket in seen:
            ticket.marks.encoded = time.monotonic()

    def _guarded(self, compute: Callable[[], None], tickets: Sequence[Ticket]) -> None:
        """A fault of ours ends the requests that it met and no other; a lost device ends the engine."""
        try:
            compute()
        except Exception as error:
            if is_device_lost(error):
                raise
            log.exception("%d requests failed", len(tickets))
            for ticket in tickets:
                ticket.fail(Internal("The server failed on this request; it is logged under its request id."))
            self._drop(tickets)

    # -- endings ----------------------------------------------------------------------------------------------------

    def _drain(self) -> None:
        self._fail_all(Draining, "The server shut down before this request was complete.", retry_after_s=5)

    def _fail_all(self, kind: type[PromptmuxError], message: str, retry_after_s: int) -> None:
        """End whatever waits or runs; rows leave the batch at the next turn, if there is one."""
        self._rehearsals.close(lambda: kind(message, retry_after_s=retry_after_s))
        for ticket in [*self._queue.clear(), *self._running.values()]:
            ticket.fail(kind(message, retry_after_s=retry_after_s))

    def _settle(self) -> None:
        """Pass on what the last step wrote, and answer the rows that ended in it."""
        for row in self._batch.live_rows:
            self._running[row].text.step()
        for row, error in self._batch.take_failed().items():
            if isinstance(error, NonFiniteLogits):
                self._keeper.nonfinite(self._running[row].task.ref)
            self._running[row].fail(_error(error))
            self._drop([self._running[row]])
        for row in self._batch.take_finished():
            ticket = self._running[row]
            self._costs.learn_steps(ticket.request.task, ticket.steps)
            self._keeper.finite(ticket.task.ref)
            try:
                answer = self._answer(ticket)
            except PromptmuxError as error:
                ticket.fail(error)
            else:
                ticket.text.finish()
                ticket.resolve(answer)
            self._drop([ticket])

    def _answer(self, ticket: Ticket) -> Answer:
        image = ticket.request.image
        size = (image.width, image.height) if image else None
        output, score = decode_outcome(ticket.task.spec, self._tokenizer, ticket.search.outcome(), size)
        return Answer(
            task=ticket.task.ref.name,
            output=output,
            score=score,
            prompt=ticket.task.ref,
            timings_ms=ticket.marks.timings_ms(),
        )


def _size(ticket: Ticket, steps: float) -> WorkSize:
    unseen = ticket.picture is not None and ticket.picture.seen is None
    return WorkSize(unseen, ticket.memory_length, ticket.search.width, steps)


def _error(cause: Exception) -> PromptmuxError:
    """A request's failure as its caller is told it."""
    if isinstance(cause, PromptmuxError):
        return cause
    if isinstance(cause, NonFiniteLogits):
        return NonfiniteOutput("This task's prompt produced numbers that are not finite.")
    if is_out_of_memory(cause):
        return Overloaded("The device has too little memory free for this request.", retry_after_s=5)
    return Internal("The server failed on this request; it is logged under its request id.")
