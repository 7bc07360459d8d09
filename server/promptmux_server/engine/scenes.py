"""What a prompt is asked at its rehearsal, made ready for the model: its canaries' inputs, and a question of our own.

Owns which inputs are refused, and how greedy search is set for them. Runs nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from promptmux_prompts import Canary
from promptmux_prompts.canary import MAX_PICTURE_BYTES
from promptmux_server.backbone.images import ImageLimits, decode_base64_image, preprocess
from promptmux_server.backbone.tokenizer import Tokenizer
from promptmux_server.engine.admission import check_lengths
from promptmux_server.errors import InvalidParameter, PromptmuxError, PromptRefused
from promptmux_server.tasks import EncodedItem, TaskSpec, encode_item
from promptmux_server.tasks.decoding import DecodingParams

WORD = "a"
"""Our own question, to whatever text a task takes."""

Fits = Callable[[int, int], bool]
"""Whether the server's memory has room for so many decode slots and encoder tokens."""


@dataclass(frozen=True, eq=False)
class Scene:
    """One input, and the tokens that are expected."""

    item: EncodedItem
    pixels: Tensor | None  # (3, size, size)
    expected: tuple[int, ...] = ()


def greedy(spec: TaskSpec) -> DecodingParams:
    """The task's own lengths and n-grams, searched greedily over the whole vocabulary: a canary shows what the model
    says of itself, whatever answers the task would choose from."""
    return spec.decoding.merged({"method": "greedy", "constrained": False, "temperature": 1.0})


def question(spec: TaskSpec, tokenizer: Tokenizer, fits: Fits) -> Scene:
    """The instruction with a word for its text, and no picture: a prompt shows in the first logits without one too.

    Raises PromptRefused for a task that no request of this server could ask.
    """

    def ask() -> Scene:
        text = WORD if spec.takes_text else None
        item = encode_item(spec, tokenizer, text, WORD if spec.manifest.takes_premise else None)
        _check(spec, item, fits, with_picture=spec.takes_image)
        return Scene(item, None)

    return _refusing("anything", ask)


def canaries(spec: TaskSpec, tokenizer: Tokenizer, fits: Fits) -> list[Scene]:
    """One scene for each; raises PromptRefused for an input that the task could not be asked."""
    told = spec.manifest.canary or ()
    return [
        _refusing(f"canary {index}", partial(_canary, canary, spec, tokenizer, fits))
        for index, canary in enumerate(told)
    ]


def _canary(canary: Canary, spec: TaskSpec, tokenizer: Tokenizer, fits: Fits) -> Scene:
    item = encode_item(spec, tokenizer, canary.text, canary.premise)
    _check(spec, item, fits, with_picture=canary.image is not None)
    if canary.image is None:
        return Scene(item, None, canary.tokens)
    if not spec.takes_image:
        raise InvalidParameter("This task takes no picture.")
    picture = decode_base64_image(canary.image, ImageLimits(max_bytes=MAX_PICTURE_BYTES))
    pixels = preprocess(picture, spec.image_size, spec.image_mean, spec.image_std)
    return Scene(item, pixels, canary.tokens)


def _check(spec: TaskSpec, item: EncodedItem, fits: Fits, *, with_picture: bool) -> None:
    params = greedy(spec)
    check_lengths(item, params, spec.config.max_positions)
    patches = spec.config.patches(spec.image_size) if with_picture else 0
    if not fits(len(item.prefix_ids) + params.max_length, len(item.source_ids) + patches):
        raise InvalidParameter("It needs more decoding memory than this server has.")


def _refusing(what: str, make: Callable[[], Scene]) -> Scene:
    """A scene; what a request would be told is the prompt's fault here."""
    try:
        return make()
    except PromptmuxError as error:
        raise PromptRefused(f"This task cannot be asked {what}: {error.message}") from error
