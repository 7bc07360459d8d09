"""What goes to the server and what comes back. Fields that a newer server adds are ignored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Tag

from promptmux._images import ImageSource

Priority = Literal["interactive", "batch"]
"""Somebody waits for an interactive answer; batch work takes what is left."""


@dataclass(frozen=True, kw_only=True)
class Item:
    """One request of a task. `image` is a path, bytes, or a PIL image."""

    task: str
    image: ImageSource | None = None
    text: str | None = None
    premise: str | None = None
    decoding: Mapping[str, Any] | None = None
    id: str | None = None


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class CaptionOutput(_Model):
    kind: Literal["caption"] = "caption"
    text: str

    def __str__(self) -> str:
        return self.text


class AnswerOutput(_Model):
    kind: Literal["answer"] = "answer"
    text: str

    def __str__(self) -> str:
        return self.text


class TextOutput(_Model):
    kind: Literal["text"] = "text"
    text: str

    def __str__(self) -> str:
        return self.text


class LabelOutput(_Model):
    """`probabilities` over all labels sum to one."""

    kind: Literal["label"] = "label"
    label: str
    probabilities: dict[str, float]

    def __str__(self) -> str:
        return f"{self.label} ({self.probabilities.get(self.label, 0.0):.0%})"


class BoxOutput(_Model):
    """(x0, y0, x1, y1) in pixels of the picture that was sent."""

    kind: Literal["box"] = "box"
    box: tuple[float, float, float, float]

    def __str__(self) -> str:
        return "[" + ", ".join(f"{value:.0f}" for value in self.box) + "]"


class OtherOutput(BaseModel):
    """A kind that this version of the client does not know; its fields are in `model_extra`."""

    model_config = ConfigDict(frozen=True, extra="allow")
    kind: str


_KINDS = ("caption", "answer", "text", "label", "box")


def _kind(value: Any) -> str:
    kind = value.get("kind") if isinstance(value, dict) else getattr(value, "kind", None)
    return str(kind) if kind in _KINDS else "other"


Output = Annotated[
    Annotated[CaptionOutput, Tag("caption")]
    | Annotated[AnswerOutput, Tag("answer")]
    | Annotated[TextOutput, Tag("text")]
    | Annotated[LabelOutput, Tag("label")]
    | Annotated[BoxOutput, Tag("box")]
    | Annotated[OtherOutput, Tag("other")],
    Discriminator(_kind),
]


class PromptRef(_Model):
    """The immutable prompt version that answered."""

    name: str
    version: int
    sha256: str


class ErrorDetail(_Model):
    code: str
    message: str
    param: str | None = None
    request_id: str | None = None
    retryable: bool = False


class Answer(_Model):
    """Of one item: `output`, or `error` if only this item failed."""

    id: str
    task: str
    output: Output | None = None
    score: float = 0.0
    prompt: PromptRef | None = None
    timings_ms: dict[str, float] = {}
    error: ErrorDetail | None = None


class Delta(_Model):
    """A piece by which the text of the item `id` has grown; all of them together are its answer's text."""

    id: str
    text: str

    def __str__(self) -> str:
        return self.text


class Task(_Model):
    """A task of the server: served, or refused with its `error`."""

    name: str
    state: str
    kind: str | None = None
    version: int | None = None
    sha256: str | None = None
    encoder_length: int = 0
    decoder_length: int = 0
    encoder_layers: tuple[int, int] | None = None
    """The first of the layers that carry its prompt, and the one behind the last; None: all layers do."""
    decoder_layers: tuple[int, int] | None = None
    bytes: int = 0
    takes_text: bool = False
    takes_premise: bool = False
    takes_image: bool = False
    metric: dict[str, Any] | None = None
    provenance: dict[str, Any] | None = None
    author: str | None = None
    created: datetime | None = None
    hits: int = 0
    tier: str | None = None
    """Where its prompt is: `device`, `host` or `disk`; None from a server that does not say."""
    pinned: bool = False
    last_used_s: float | None = None
    error: ErrorDetail | None = None
