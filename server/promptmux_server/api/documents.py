"""The answers as `/openapi.json` documents them. Routes write plain dictionaries; a test holds both together."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field

from promptmux_server.api.schemas import FanoutRequest, PredictRequest, RollbackRequest, TrainingPost

REF = "#/components/schemas/{model}"


class Document(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class ErrorObject(Document):
    """What went wrong: `code` is stable, `message` is for people."""

    code: str
    message: str
    type: str
    param: str | None
    request_id: str
    retryable: bool
    details: dict[str, Any] | None = None
    """For programs; only of errors that have some, such as `canary_failed`."""


class ErrorBody(Document):
    """RFC 9457 problem details around OpenAI's `error` object."""

    type: str
    title: str
    status: int
    detail: str
    instance: str
    error: ErrorObject


class TextOutput(Document):
    kind: Literal["caption", "answer", "text"]
    text: str


class LabelOutput(Document):
    kind: Literal["label"]
    label: str
    probabilities: dict[str, float]


class BoxOutput(Document):
    kind: Literal["box"]
    box: list[float] = Field(min_length=4, max_length=4, description="x0, y0, x1, y1 in pixels of the image sent.")


class PromptVersion(Document):
    """The immutable prompt version that answered."""

    name: str
    version: int
    sha256: str


class AnsweredItem(Document):
    id: str
    task: str
    output: Annotated[TextOutput | LabelOutput | BoxOutput, Field(discriminator="kind")]
    score: float
    prompt: PromptVersion
    timings_ms: dict[str, float]


class FailedItem(Document):
    id: str
    task: str
    error: ErrorObject


class PredictAnswer(Document):
    """Answers in the order of the items; one that failed carries `error` in place of `output`."""

    request_id: str
    answers: list[AnsweredItem | FailedItem]


class Reason(Document):
    code: str
    message: str


class Task(Document):
    """Served (`ready`), or known and not served (`refused`) for the reason in `error`.

    `encoder_layers` and `decoder_layers`: the first that carries the prompt, and the one behind the last; null: all do.
    """

    name: str
    state: Literal["ready", "refused"]
    kind: str | None
    version: int | None
    sha256: str | None
    encoder_length: int
    decoder_length: int
    encoder_layers: tuple[int, int] | None
    decoder_layers: tuple[int, int] | None
    bytes: int
    takes_text: bool
    takes_premise: bool
    takes_image: bool
    metric: dict[str, Any] | None
    provenance: dict[str, Any] | None
    author: str | None
    created: str | None
    hits: int
    tier: Literal["device", "host", "disk"]
    pinned: bool
    last_used_s: float | None
    error: Reason | None


class Memory(Document):
    """One of the engine's memories: bytes handed out, and the most there is."""

    used_bytes: int
    budget_bytes: int


class TaskList(Document):
    """By name; `next` is the last of them if more follow, to be sent as `after`."""

    tasks: list[Task]
    next: str | None
    memory: dict[str, Memory]
    """`decode_cache`, `cross_memory`, `image_cache`, `prompts_device`, `prompts_host`."""


class Reload(Document):
    """What reading the prompt directory and the registry again has changed, by task name."""

    added: list[str]
    changed: list[str]
    removed: list[str]
    unchanged: list[str]
    refused: dict[str, Reason]


class Status(Document):
    status: Literal["ok"]


class Version(Document):
    version: str
    backbone: str


FAILURES: dict[int | str, dict[str, Any]] = {"4XX": {"model": ErrorBody}, "5XX": {"model": ErrorBody}}
"""What any route may answer instead."""

EVENTS = """event: delta
data: {"id": "0", "text": "a red"}

event: answer
data: {"id": "0", "task": "caption", "output": {"kind": "caption", "text": "a red apple"}, "score": -0.2, ...}

event: done
data: {"request_id": "c093cc6a6a934e4784df4b54832f2592"}

"""
"""`delta`: a text has grown; `answer`: one member of `answers`; `done`: nothing more comes. Comments keep it alive."""


def answers(model: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    """The `responses` of a route whose good answer is `model`."""
    return {200: {"model": model}, **FAILURES}


def streams(model: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    """The same for a route that answers as server-sent events where the request says `stream`."""
    form = {"schema": {"type": "string"}, "example": EVENTS}
    return {**answers(model), 200: {"model": model, "content": {"text/event-stream": form}}}


def takes(*models: type[BaseModel]) -> dict[str, Any]:
    """The body of a route that reads and checks it by itself."""
    schemas = [{"$ref": REF.format(model=model.__name__)} for model in models]
    schema = schemas[0] if len(schemas) == 1 else {"anyOf": schemas}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def complete(app: FastAPI) -> None:
    """Add the request models to the document, which FastAPI makes of the routes alone; call it after the last one."""
    for model in (PredictRequest, FanoutRequest, RollbackRequest, TrainingPost):
        schema = model.model_json_schema(ref_template=REF)
        parts = schema.pop("$defs", {})
        app.openapi()["components"]["schemas"] |= {**parts, model.__name__: schema}
