"""fairseq's names of search arguments, as golden files write them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from promptmux_server.tasks.decoding import DecodingParams

_NAMES = {
    "beam_size": "beam_size",
    "max_len_b": "max_length",
    "min_len": "min_length",
    "len_penalty": "length_penalty",
    "normalize_scores": "normalize",
    "no_repeat_ngram_size": "no_repeat_ngram",
    "temperature": "temperature",
}


def params_from_fairseq(arguments: Mapping[str, Any], *, constrained: bool = False) -> DecodingParams:
    """Raises KeyError for an argument without counterpart, so that none is ignored in silence."""
    translated = {_NAMES[name]: value for name, value in arguments.items()}
    return DecodingParams(constrained=constrained).merged(translated)
