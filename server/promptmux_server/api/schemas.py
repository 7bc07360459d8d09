"""The shapes of requests, and of answers as they are documented in OpenAPI."""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated, Any, Literal, NoReturn

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from promptmux_server.engine.request import Priority
from promptmux_server.errors import InvalidParameter

MAX_TEXT = 4096
MAX_ITEMS = 1024
"""The schema's own bound; the settings' `max_items` is checked beside it."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Decoding(_Strict):
    """Overrides of the task's own decoding parameters; what is left out or null keeps the task's value."""

    method: Literal["greedy", "beam", "sample", "candidates"] | None = None
    beam_size: int | None = Field(None, description="1 to 8.")
    min_length: int | None = None
    max_length: int | None = Field(None, description="Generated tokens, 1 to 256.")
    length_penalty: float | None = None
    normalize: bool | None = None
    no_repeat_ngram: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None
    constrained: bool | None = Field(None, description="Keep to the task's closed answer set.")


class _Question(_Strict):
    """What is asked of one task, whatever picture it is asked about."""

    task: str = Field(max_length=64, description="Name of a task; GET /v1/tasks lists them.")
    text: str | None = Field(None, max_length=MAX_TEXT, description="The question, hypothesis or expression.")
    premise: str | None = Field(None, max_length=MAX_TEXT, description="For tasks whose instruction has a premise.")
    decoding: Decoding | None = None


class PredictItem(_Question):
    """One request of a task."""

    id: str | None = Field(None, max_length=64, description="Returned with the answer; default: the item's position.")
    image: str | None = Field(None, description="A JPEG, PNG or WebP file as base64.")


class CallOptions(_Strict):
    """How a call of many items is answered, whichever route it takes."""

    deadline_ms: int | None = Field(None, ge=1, description="Milliseconds after which nobody waits any more.")
    priority: Priority = Field("interactive", description="`batch` takes what interactive work leaves.")
    stream: bool = Field(False, description="Answer as server-sent events: delta, answer, done.")


class PredictRequest(CallOptions):
    """Many items of any tasks in one call; one item may also be sent as the bare object."""

    items: list[PredictItem] = Field(min_length=1, max_length=MAX_ITEMS)


class FanoutTask(_Question):
    """One task of a fan-out; its own text and premise win over those of the call."""


def _named(value: Any) -> Any:
    return {"task": value} if isinstance(value, str) else value


class FanoutRequest(CallOptions):
    """One picture and text, many tasks. What stands at the top goes to the tasks that take it."""

    tasks: list[Annotated[FanoutTask, BeforeValidator(_named, json_schema_input_type=str | FanoutTask)]] = Field(
        min_length=1, max_length=MAX_ITEMS, description="Names of tasks, or objects; a task may stand here repeatedly."
    )
    image: str | None = Field(None, description="A JPEG, PNG or WebP file as base64; it is decoded once.")
    text: str | None = Field(None, max_length=MAX_TEXT, description="For every task that takes a text.")
    premise: str | None = Field(None, max_length=MAX_TEXT, description="For every task that takes a premise.")


class RollbackRequest(_Strict):
    """Where to; nothing means the newest good version below the present one."""

    version: int | None = Field(None, ge=1, le=999_999_999)


class TrainingPost(_Strict):
    """A training: its configuration, and how it is queued."""

    config: str | dict[str, Any] = Field(description="TOML, or the same as an object: docs/training.md.")
    priority: int = Field(0, ge=-1000, le=1000, description="Higher ones are begun first; of equal ones the older.")
    metadata: Annotated[
        dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]], Field(max_length=16)
    ] = Field(default_factory=dict, description="Your own words, given back with the training.")


_PREDICT_FIELDS = PredictItem.model_fields.keys() | PredictRequest.model_fields.keys() | Decoding.model_fields.keys()
_FANOUT_FIELDS = FanoutTask.model_fields.keys() | FanoutRequest.model_fields.keys() | Decoding.model_fields.keys()


def parse_predict(raw: Any) -> PredictRequest:
    """Validate a parsed body; raises InvalidParameter naming the field, never its value."""
    if isinstance(raw, dict) and "items" not in raw:
        options = {key: value for key, value in raw.items() if key in CallOptions.model_fields}
        raw = {"items": [{key: value for key, value in raw.items() if key not in options}], **options}
    try:
        return PredictRequest.model_validate(raw)
    except ValidationError as error:
        _explain(error, _PREDICT_FIELDS)


def parse_fanout(raw: Any) -> FanoutRequest:
    """The same for the body of a fan-out."""
    try:
        return FanoutRequest.model_validate(raw)
    except ValidationError as error:
        _explain(error, _FANOUT_FIELDS)


def parse_rollback(raw: Any) -> RollbackRequest:
    """The same for the body of a rollback."""
    try:
        return RollbackRequest.model_validate(raw)
    except ValidationError as error:
        _explain(error, RollbackRequest.model_fields.keys())


def parse_training(raw: Any) -> TrainingPost:
    """The same for the body of a training; its configuration is checked by whoever reads it."""
    try:
        return TrainingPost.model_validate(raw)
    except ValidationError as error:
        _explain(error, TrainingPost.model_fields.keys())


def decoding_of(question: PredictItem | FanoutTask) -> dict[str, Any] | None:
    """The overrides that were given, or None."""
    return None if question.decoding is None else question.decoding.model_dump(exclude_none=True)


def _explain(error: ValidationError, known: Collection[str]) -> NoReturn:
    first = error.errors(include_input=False, include_url=False, include_context=False)[0]
    path = [str(part) for part in first["loc"] if isinstance(part, int) or part in known]
    param = ".".join(path) or None
    if first["type"] == "extra_forbidden":
        raise InvalidParameter(f"There is an unknown field; known are {', '.join(sorted(known))}.", param=param)
    raise InvalidParameter(f"{param or 'The body'}: {first['msg']}.", param=param)
