"""The manifest of a prompt file: everything about a task that is not a tensor.

Owns the fields, their checks and their canonical JSON. Knows nothing of files or of how a task is run.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, Self, get_args

from promptmux_prompts.canary import MAX_CANARIES, Canary
from promptmux_prompts.errors import InvalidPromptFile
from promptmux_prompts.strict_json import canonical, parse

Kind = Literal["caption", "answer", "label", "box", "text"]
DecoderInput = Literal["bos", "source"]

SCHEMA = 1
NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
MAX_LENGTH = 256
MAX_ANSWERS = 4096
_LAYERS = ("encoder_layers", "decoder_layers")


@dataclass(frozen=True)
class ImageInput:
    """How a picture is fed to the model: the side of its square in pixels, and normalisation."""

    size: int
    mean: float = 0.5
    std: float = 0.5


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Checked on construction: a Manifest that exists is well-formed. Raises InvalidPromptFile."""

    name: str
    kind: Kind
    backbone_name: str
    fingerprint: str
    """Of the backbone that the prompt was trained on."""
    encoder_length: int
    decoder_length: int
    encoder_layers: tuple[int, int] | None = None
    """The first of the layers that carry the prompt, and the one behind the last; None: all layers do."""
    decoder_layers: tuple[int, int] | None = None
    instruction: str
    """Template of the encoder text; "{text}" and "{premise}" stand for what a request sends."""
    image: ImageInput | None
    """None: the task takes no picture."""
    decoder_input: DecoderInput = "bos"
    """"source" lets the decoder read the source again before it answers (ofa-spec 7, prev_output)."""
    answers: tuple[str, ...] | None = None
    """Closed answer set, without leading blanks."""
    labels: Mapping[str, str] | None = None
    """Answer -> label name, for kind "label"."""
    decoding: Mapping[str, Any] = field(default_factory=dict)
    """Only what differs from the kind's defaults."""
    metric: Mapping[str, Any] | None = None
    canary: tuple[Canary, ...] | None = None
    """Inputs with the tokens that the publisher saw; they are replayed before the prompt is served."""
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _require(bool(NAME.fullmatch(self.name)) and ".." not in self.name, "name must match [a-z0-9][a-z0-9._-]{0,63}")
        _require(self.kind in get_args(Kind), f"kind must be one of {', '.join(get_args(Kind))}")
        _require(self.decoder_input in get_args(DecoderInput), "decoder_input must be bos or source")
        for length in (self.encoder_length, self.decoder_length):
            _require(_is_int(length) and 0 <= length <= MAX_LENGTH, f"prompt lengths must be 0 to {MAX_LENGTH}")
        self._check_layers("encoder", self.encoder_layers, self.encoder_length)
        self._check_layers("decoder", self.decoder_layers, self.decoder_length)
        for text in (self.instruction, self.backbone_name, self.fingerprint):
            _require(isinstance(text, str) and len(text) <= 4096, "instruction and backbone must be short texts")
        _require(
            not set(_placeholders(self.instruction)) - {"text", "premise"}, "instruction may hold {text}, {premise}"
        )
        if self.image is not None:
            _require(_is_int(self.image.size) and 16 <= self.image.size <= 4096, "image.size must be 16 to 4096")
            _require(_is_number(self.image.mean) and _is_number(self.image.std), "image.mean and std must be numbers")
            _require(self.image.std > 0, "image.std must be positive")
        _require(self.canary is None or 0 < len(self.canary) <= MAX_CANARIES, f"canary must be 1 to {MAX_CANARIES}")
        self._check_answers()

    def _check_layers(self, side: str, layers: tuple[int, int] | None, length: int) -> None:
        if layers is not None:
            _require(
                len(layers) == 2 and all(map(_is_int, layers)) and 0 <= layers[0] < layers[1],
                f"{side}_layers must be two numbers, the first layer and the one behind the last",
            )
            _require(length > 0, f"{side}_layers must be left out where {side}_length is 0")

    def _check_answers(self) -> None:
        if self.answers is not None:
            _require(0 < len(self.answers) <= MAX_ANSWERS, f"answers must be 1 to {MAX_ANSWERS}")
            _require(all(isinstance(a, str) and 0 < len(a) <= 256 for a in self.answers), "answers must be short texts")
            _require(len(set(self.answers)) == len(self.answers), "answers must differ from one another")
        if self.kind == "label":
            _require(self.answers is not None and self.labels is not None, "a label task needs answers and labels")
        if self.labels is not None:
            _require(set(self.labels) == set(self.answers or ()), "labels must name every answer, and no other")
            _require(all(isinstance(label, str) for label in self.labels.values()), "labels must be texts")

    @property
    def takes_text(self) -> bool:
        return "text" in _placeholders(self.instruction)

    @property
    def takes_premise(self) -> bool:
        return "premise" in _placeholders(self.instruction)

    def to_json(self) -> str:
        """Canonical JSON: equal manifests give equal bytes. Layers are said only where they are not all."""
        raw = {f.name: getattr(self, f.name) for f in fields(self)} | {"schema": SCHEMA}
        raw = {key: value for key, value in raw.items() if key not in _LAYERS or value is not None}
        if self.image is not None:
            raw["image"] = {f.name: getattr(self.image, f.name) for f in fields(self.image)}
        if self.canary is not None:
            raw["canary"] = [canary.to_dict() for canary in self.canary]
        return canonical(raw)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Parse; unknown or missing keys, wrong types and values out of bounds raise InvalidPromptFile."""
        raw = parse(text, "manifest")
        _require(isinstance(raw, dict) and raw.pop("schema", None) == SCHEMA, f"manifest schema must be {SCHEMA}")
        known = {f.name for f in fields(cls)}
        _require(not raw.keys() - known, "unknown keys: " + ", ".join(sorted(raw.keys() - known))[:200])
        try:
            if raw.get("image") is not None:
                raw["image"] = ImageInput(**_object(raw["image"], "image"))
            for key in ("answers", "canary", *_LAYERS):
                _require(isinstance(raw.get(key), list | None), f"{key} must be a list")
            for key in ("answers", *_LAYERS):
                if raw.get(key) is not None:
                    raw[key] = tuple(raw[key])
            if raw.get("canary") is not None:
                raw["canary"] = tuple(Canary.from_dict(_object(canary, "canary")) for canary in raw["canary"])
            for key in ("labels", "metric"):
                if raw.get(key) is not None:
                    _object(raw[key], key)
            for key in ("decoding", "provenance"):
                _object(raw.get(key, {}), key)
            return cls(**raw)
        except TypeError as error:
            raise InvalidPromptFile("the manifest lacks keys or has some of the wrong type") from error

    @classmethod
    def minimal(
        cls, *, name: str, backbone_name: str, fingerprint: str, encoder_length: int, decoder_length: int
    ) -> Self:
        """A manifest for tensors that came without a task: text in, text out."""
        return cls(
            name=name,
            kind="text",
            backbone_name=backbone_name,
            fingerprint=fingerprint,
            encoder_length=encoder_length,
            decoder_length=decoder_length,
            instruction=" {text}",
            image=None,
        )


def _placeholders(template: str) -> list[str]:
    return re.findall(r"\{([^{}]*)\}", template)


def _object(value: object, key: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InvalidPromptFile(f"{key} must be an object")
    return value


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return _is_int(value) or isinstance(value, float)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise InvalidPromptFile(message)
