"""An engine that answers from a script: the API's tests need no model."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future
from typing import Any

from promptmux_prompts import Upload
from promptmux_server.engine.publications import PromptVersion
from promptmux_server.engine.request import (
    Answer,
    EngineLoad,
    ImageCacheStats,
    PromptRef,
    ReloadReport,
    Request,
    TaskInputs,
    TaskStatus,
)
from promptmux_server.errors import (
    BackendUnhealthy,
    DeadlineExceeded,
    InvalidParameter,
    NonfiniteOutput,
    PromptmuxError,
    PromptNotFound,
)
from promptmux_server.tasks import AnswerOutput

SHA = "ab" * 32


class NoPrompts:
    """A registry that nobody has published to, and nobody can."""

    max_bytes = 64 * 1024

    def upload(self) -> Upload:
        raise AssertionError("nothing is published to an engine that only pretends")

    def publish(self, *_: object, **__: object) -> Any:
        raise AssertionError("nothing is published to an engine that only pretends")

    def page(self, after: str, limit: int) -> tuple[list[PromptVersion], str | None]:
        return [], None

    def _no_such(self, *_: object, **__: object) -> Any:
        raise PromptNotFound("No such prompt.")

    rollback = delete = set_pinned = current = versions = file = _no_such


class FakeEngine:
    """Task "echo" answers at once with the text, "slow" when told to, "late" misses its deadline, "nan" fails alone.

    "spell" hands its text out letter by letter, "pause" waits before the last letter; "caption" takes no text;
    "assert" loses the device.
    """

    def __init__(self) -> None:
        self.prompts = NoPrompts()
        self.requests: list[Request] = []
        self.futures: list[Future[Answer]] = []
        self.healthy = True
        self.device_lost = False
        self.stopped_with: float | None = None
        self.release = threading.Event()

    def submit(self, request: Request) -> Future[Answer]:
        self.requests.append(request)
        future: Future[Answer] = Future()
        self.futures.append(future)
        errors: dict[str, PromptmuxError] = {
            "late": DeadlineExceeded("Too late."),
            "nan": NonfiniteOutput("Not finite."),
            "assert": BackendUnhealthy("The device failed."),
        }
        if request.task == "broken":
            raise RuntimeError("a bug with a /secret/path.py inside")
        if request.task not in ("echo", "slow", "spell", "pause", "caption", *errors):
            raise PromptNotFound("No such task.", param="task")
        if request.task == "caption" and request.text is not None:
            raise InvalidParameter("This task takes no `text`: leave it out.", param="text")
        if request.decoding:
            raise InvalidParameter("No.", param="decoding.beam_size")
        if request.task == "assert":
            self.healthy, self.device_lost = False, True
        if request.task in errors:
            future.set_exception(errors[request.task])
        elif request.task in ("echo", "caption"):
            future.set_result(self.answer(request))
        elif request.task in ("spell", "pause"):
            threading.Thread(target=self._spell, args=(request, future), daemon=True).start()
        else:
            threading.Thread(target=self._finish_later, args=(request, future), daemon=True).start()
        return future

    def _finish_later(self, request: Request, future: Future[Answer]) -> None:
        self.release.wait(10.0)
        time.sleep(0.01)
        if not future.cancelled():
            future.set_result(self.answer(request))

    def _spell(self, request: Request, future: Future[Answer]) -> None:
        text = request.text or ""
        for place, letter in enumerate(text, start=1):
            if request.task == "pause" and place == len(text):
                self.release.wait(10.0)
            if request.on_text is not None:
                request.on_text(letter)
        if future.set_running_or_notify_cancel():
            future.set_result(self.answer(request))

    def answer(self, request: Request) -> Answer:
        return Answer(
            task=request.task,
            output=AnswerOutput(request.text or ""),
            score=-0.5,
            prompt=PromptRef(request.task, 1, SHA),
            timings_ms={"total": 1.0},
        )

    def tasks(self, after: str = "", limit: int | None = None) -> list[TaskStatus]:
        def task(name: str, *, takes_text: bool) -> TaskStatus:
            kind = "answer" if takes_text else "caption"
            return TaskStatus(
                name=name,
                state="ready",
                kind=kind,
                version=1,
                sha256=SHA,
                takes_text=takes_text,
                takes_image=name != "spell",
            )

        found = [task("caption", takes_text=False), task("echo", takes_text=True), task("spell", takes_text=True)]
        return [status for status in found if status.name > after][:limit]

    def inputs(self, task: str) -> TaskInputs | None:
        found = self.task(task)
        if found is None:
            return None
        return TaskInputs(found.kind or "", found.takes_text, found.takes_premise, found.takes_image)

    def task(self, name: str) -> TaskStatus | None:
        return next((status for status in self.tasks() if status.name == name), None)

    def reload(self) -> ReloadReport:
        return ReloadReport(unchanged=("echo",))

    def ready(self) -> bool:
        return self.healthy

    def live(self) -> bool:
        return self.healthy

    def failed(self) -> bool:
        return self.device_lost

    def load(self) -> EngineLoad:
        return EngineLoad(waiting=0, running=0, images=ImageCacheStats())

    def stop(self, drain_timeout_s: float) -> None:
        self.stopped_with = drain_timeout_s
