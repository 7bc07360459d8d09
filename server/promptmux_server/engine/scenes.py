"""What a prompt is asked at its rehearsal: its canaries' inputs, or a neutral one, made ready for the model.

Owns which inputs are refused, and how greedy search is set for them. Runs nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from promptmux_prompts import Canary
from promptmux_prompts.canary import MAX_PICTURE_BYTES
from promptmux_server.backbone.images import DecodedImage, ImageLimits, decode_base64_image, from_array, preprocess
from promptmux_server.backbone.tokenizer import Tokenizer
from promptmux_server.engine.admission import check_lengths
from promptmux_server.errors import InvalidParameter, PromptmuxError, PromptRefused
from promptmux_server.tasks import EncodedItem, TaskSpec, encode_item
from promptmux_server.tasks.decoding import DecodingParams

WORD = "a"
"""Whatever text a task takes, a prompt without canaries is asked this."""
GREY = 128
"""Of its picture."""

Fits = Callable[[int, int], bool]
"""Whether the server's memory has room for so many decode slots and encoder tokens."""


@dataclass(frozen=True, eq=False)
class Scene:
    """One input, and the tokens that are expected; none are for the neutral one."""

    item: EncodedItem
    pixels: Tensor | None  # (3, size, size)
    expected: tuple[int, ...]


def greedy(spec: TaskSpec) -> DecodingParams:
    """The task's own lengths and n-grams, searched greedily over the whole vocabulary: a canary shows what the model
    says of itself, whatever answers the task would choose from."""
    return spec.decoding.merged({"method": "greedy", "constrained": False, "temperature": 1.0})


def scenes(spec: TaskSpec, tokenizer: Tokenizer, fits: Fits) -> list[Scene]:
    """One for each canary, or the neutral one; raises PromptRefused for an input that the task could not be asked."""
    canaries = spec.manifest.canary
    if canaries is None:
        text = WORD if spec.takes_text else None
        premise = WORD if spec.manifest.takes_premise else None
        return [_checked("a request", lambda: _scene(spec, tokenizer, fits, text, premise, _grey(spec)))]
    return [
        _checked(
            f"canary {index}",
            lambda c=canary: _scene(spec, tokenizer, fits, c.text, c.premise, _picture(c, spec), c.tokens),  # type: ignore[misc]
        )
        for index, canary in enumerate(canaries)
    ]


def _scene(
    spec: TaskSpec,
    tokenizer: Tokenizer,
    fits: Fits,
    text: str | None,
    premise: str | None,
    picture: DecodedImage | None,
    expected: tuple[int, ...] = (),
) -> Scene:
    item, params = encode_item(spec, tokenizer, text, premise), greedy(spec)
    check_lengths(item, params, spec.config.max_positions)
    patches = 0 if picture is None else spec.config.patches(spec.image_size)
    if not fits(len(item.prefix_ids) + params.max_length, len(item.source_ids) + patches):
        raise InvalidParameter("It needs more decoding memory than this server has.")
    pixels = None if picture is None else preprocess(picture, spec.image_size, spec.image_mean, spec.image_std)
    return Scene(item, pixels, expected)


def _picture(canary: Canary, spec: TaskSpec) -> DecodedImage | None:
    if canary.image is None:
        return None
    if not spec.takes_image:
        raise InvalidParameter("This task takes no picture.")
    return decode_base64_image(canary.image, ImageLimits(max_bytes=MAX_PICTURE_BYTES))


def _grey(spec: TaskSpec) -> DecodedImage | None:
    if not spec.takes_image:
        return None
    return from_array(np.full((spec.image_size, spec.image_size, 3), GREY, dtype=np.uint8))


def _checked(what: str, make: Callable[[], Scene]) -> Scene:
    """A scene; what a request would be told is the prompt's fault here."""
    try:
        return make()
    except PromptmuxError as error:
        raise PromptRefused(f"This task cannot be asked {what}: {error.message}") from error
