"""A served task: what its manifest says, made ready to use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from promptmux_prompts import InvalidPromptFile, Kind, Manifest
from promptmux_server.backbone.config import BackboneConfig
from promptmux_server.errors import InvalidParameter
from promptmux_server.tasks.decoding import DecodingParams

DEFAULT_DECODING: Mapping[Kind, DecodingParams] = MappingProxyType(
    {
        "caption": DecodingParams(no_repeat_ngram=3),
        "answer": DecodingParams(normalize=False),
        "label": DecodingParams(method="candidates"),
        "box": DecodingParams(min_length=4, max_length=4),
        "text": DecodingParams(max_length=64),
    }
)
"""ofa-spec 9.4; an answer task with a closed answer set scores all of it (9.3)."""


@dataclass(frozen=True)
class TaskSpec:
    """How one task reads and answers; `config` is the backbone's."""

    manifest: Manifest
    config: BackboneConfig
    decoding: DecodingParams

    @classmethod
    def from_manifest(cls, manifest: Manifest, config: BackboneConfig) -> TaskSpec:
        """Raises InvalidPromptFile if the manifest's decoding defaults or picture do not fit this server."""
        default = DEFAULT_DECODING[manifest.kind]
        if manifest.kind == "answer" and manifest.answers is not None:
            default = DecodingParams(method="candidates")
        try:
            decoding = default.merged(manifest.decoding)
        except InvalidParameter as error:
            raise InvalidPromptFile(f"the manifest's decoding defaults are not usable: {error.message}") from error
        _check_answerable(manifest, config, decoding)
        if manifest.image is not None:
            patches = config.patches(manifest.image.size)
            if not config.interpolate_position and patches > config.image_bucket_size:
                raise InvalidPromptFile(f"pictures of {manifest.image.size} px are too large for this backbone")
        return cls(manifest, config, decoding)

    @property
    def name(self) -> str:
        return self.manifest.name

    @property
    def kind(self) -> Kind:
        return self.manifest.kind

    @property
    def takes_text(self) -> bool:
        return self.manifest.takes_text

    @property
    def takes_image(self) -> bool:
        return self.manifest.image is not None

    @property
    def image_size(self) -> int:
        return self.manifest.image.size if self.manifest.image else self.config.image_size

    @property
    def image_mean(self) -> float:
        return self.manifest.image.mean if self.manifest.image else self.config.image_mean

    @property
    def image_std(self) -> float:
        return self.manifest.image.std if self.manifest.image else self.config.image_std


def _check_answerable(manifest: Manifest, config: BackboneConfig, decoding: DecodingParams) -> None:
    """Refuse at load what could only fail at each request."""
    if manifest.kind == "box" and not config.num_bins:
        raise InvalidPromptFile("this backbone has no location symbols to answer with boxes")
    if manifest.kind == "box" and manifest.image is None:
        raise InvalidPromptFile("a box task needs a picture: the manifest's image is null")
    if manifest.kind == "label" and decoding.method != "candidates":
        raise InvalidPromptFile("a label task scores all its answers: decoding.method must be candidates")
    if manifest.answers is None and (decoding.method == "candidates" or decoding.constrained):
        raise InvalidPromptFile("decoding asks for a closed answer set, and the manifest has no answers")
