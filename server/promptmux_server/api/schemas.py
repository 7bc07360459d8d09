"""Request and response bodies, as strict pydantic models; `/openapi.json` is made of these.

Owns field names, types and fixed bounds. Limits that a setting decides (items per call, characters of text) are
checked by the route; what a task accepts is the engine's business.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


# -- requests -----------------------------------------------------------------------------------------------------------


class Decoding(_Strict):
    """Overrides of the task's own decoding parameters; fields left out keep the task's value."""

    method: Literal["greedy", "beam", "sample", "candidates"] | None = None
    beam_size: int | None = Field(None, ge=1, le=8)
    min_length: int | None = Field(None, ge=0, le=256)
    max_length: int | None = Field(None, ge=1, le=256)
    length_penalty: float | None = Field(None, ge=-10, le=10)
    normalize: bool | None = None
    no_repeat_ngram: int | None = Field(None, ge=0, le=256)
    temperature: float | None = Field(None, ge=0.001, le=100)
    top_k: int | None = Field(None, ge=0, le=1 << 20)
    top_p: float | None = Field(None, ge=0.001, le=1)
    seed: int | None = Field(None, ge=0, le=(1 << 63) - 1)
    constrained: bool | None = None

    def overrides(self) -> dict[str, object]:
        """What was really sent."""
        return self.model_dump(exclude_none=True)


class Item(_Strict):
    """One question to one task."""

    id: str | None = Field(None, max_length=128, description="Returned with the answer; not looked at.")
    task: str = Field(max_length=256, description="Name of a task of GET /v1/tasks.")
    image: str | None = Field(None, description="Base64 of a PNG, JPEG or WebP file.")
    text: str | None = Field(None, description="The question, hypothesis or phrase, where the task takes one.")
    premise: str | None = Field(None, description="A second text, for tasks that compare two.")
    decoding: Decoding | None = None


DeadlineMs = Annotated[
    int | None, Field(ge=1, description="Milliseconds from arrival after which the answer is of no use.")
]


class PredictMany(_Strict):
    """Several items, of any mixture of tasks, answered in order."""

    items: list[Item] = Field(min_length=1)
    deadline_ms: DeadlineMs = None


class PredictOne(Item):
    """One item, written without the list around it."""

    deadline_ms: DeadlineMs = None


def _one_or_many(value: Any) -> str:
    return "many" if isinstance(value, dict) and "items" in value else "one"


PredictBody = Annotated[
    Annotated[PredictMany, Tag("many")] | Annotated[PredictOne, Tag("one")], Discriminator(_one_or_many)
]


# -- responses ----------------------------------------------------------------------------------------------------------


class ErrorObject(BaseModel):
    """What went wrong. `code` is stable; `message` is for people."""

    code: str
    message: str
    type: str
    param: str | None
    request_id: str
    retryable: bool


class ErrorBody(BaseModel):
    """RFC 9457 problem details that also carry OpenAI's `error` object."""

    type: str
    title: str
    status: int
    detail: str
    instance: str
    error: ErrorObject


class TextualOutput(BaseModel):
    kind: Literal["caption", "answer", "text"]
    text: str


class LabelOutput(BaseModel):
    kind: Literal["label"]
    label: str
    probabilities: dict[str, float]


class BoxOutput(BaseModel):
    kind: Literal["box"]
    box: tuple[float, float, float, float] = Field(description="x0, y0, x1, y1 in pixels of the image sent.")


class Prompt(BaseModel):
    """The immutable prompt version that answered."""

    name: str
    version: int
    sha256: str


class AnsweredItem(BaseModel):
    id: str | None
    task: str
    output: Annotated[TextualOutput | LabelOutput | BoxOutput, Field(discriminator="kind")]
    score: float
    prompt: Prompt
    timings_ms: dict[str, float]


class FailedItem(BaseModel):
    id: str | None
    task: str
    error: ErrorObject


class PredictAnswer(BaseModel):
    """Answers in the order of the items; an item that failed carries `error` in place of `output`."""

    request_id: str
    answers: list[AnsweredItem | FailedItem]


class TaskProblem(BaseModel):
    code: str
    message: str


class Task(BaseModel):
    """One task: served (`ready`), or known and not served (`refused`) with the reason in `error`."""

    model_config = ConfigDict(from_attributes=True)

    name: str
    state: Literal["ready", "refused"]
    kind: str | None
    version: int | None
    sha256: str | None
    encoder_length: int
    decoder_length: int
    bytes: int
    takes_text: bool
    takes_image: bool
    metric: Mapping[str, Any] | None
    hits: int
    last_used_s: float | None
    error: TaskProblem | None


class TaskList(BaseModel):
    tasks: list[Task]


class Reload(BaseModel):
    """What reading the prompt directory again has changed, by task name."""

    model_config = ConfigDict(from_attributes=True)

    added: list[str]
    changed: list[str]
    removed: list[str]
    unchanged: list[str]
    refused: dict[str, TaskProblem]


class Health(BaseModel):
    status: Literal["ok"]


class Version(BaseModel):
    name: str
    version: str
    backbone: str
