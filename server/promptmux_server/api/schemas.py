"""The shapes of requests, and of answers as they are documented in OpenAPI."""

from __future__ import annotations

from typing import Any, Literal, NoReturn

from pydantic import BaseModel, ConfigDict, Field, ValidationError

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


class PredictItem(_Strict):
    """One request of a task."""

    id: str | None = Field(None, max_length=64, description="Returned with the answer; default: the item's position.")
    task: str = Field(max_length=64, description="Name of a task; GET /v1/tasks lists them.")
    image: str | None = Field(None, description="A JPEG, PNG or WebP file as base64.")
    text: str | None = Field(None, max_length=MAX_TEXT, description="The question, hypothesis or expression.")
    premise: str | None = Field(None, max_length=MAX_TEXT, description="For tasks whose instruction has a premise.")
    decoding: Decoding | None = None


class PredictRequest(_Strict):
    """Many items of any tasks in one call; one item may also be sent as the bare object."""

    items: list[PredictItem] = Field(min_length=1, max_length=MAX_ITEMS)
    deadline_ms: int | None = Field(None, ge=1, description="Milliseconds after which nobody waits any more.")


def parse_predict(raw: Any) -> PredictRequest:
    """Validate a parsed body; raises InvalidParameter naming the field, never its value."""
    try:
        if isinstance(raw, dict) and "items" not in raw:
            bare = {key: value for key, value in raw.items() if key != "deadline_ms"}
            wrapped: dict[str, Any] = {"items": [bare]}
            if "deadline_ms" in raw:
                wrapped["deadline_ms"] = raw["deadline_ms"]
            return PredictRequest.model_validate(wrapped)
        return PredictRequest.model_validate(raw)
    except ValidationError as error:
        _explain(error)


_KNOWN = PredictItem.model_fields.keys() | PredictRequest.model_fields.keys() | Decoding.model_fields.keys()


def _explain(error: ValidationError) -> NoReturn:
    first = error.errors(include_input=False, include_url=False, include_context=False)[0]
    path = [str(part) for part in first["loc"] if isinstance(part, int) or part in _KNOWN]
    param = ".".join(path) or None
    if first["type"] == "extra_forbidden":
        raise InvalidParameter(f"There is an unknown field; known are {', '.join(sorted(_KNOWN))}.", param=param)
    raise InvalidParameter(f"{param or 'The body'}: {first['msg']}.", param=param)
