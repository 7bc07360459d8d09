"""Samples' pictures as the encoder reads them: decoded, prepared and passed through the frozen stem, each once.

Every picture passes alone, so that its tokens are the same bits whatever is seen beside it, in this run or another.
Owns what is asked of the cache; where pictures change from epoch to epoch, that is nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from promptmux_server.backbone.encoder import ImageTokens
from promptmux_server.backbone.image_key import ImageKey
from promptmux_server.backbone.images import DecodedImage, ImageLimits, preprocess
from promptmux_server.backbone.model import OFA
from promptmux_server.tasks import TaskSpec
from promptmux_server.training.data.pictures import Picture, decoded
from promptmux_server.training.feature_cache import FeatureCache
from promptmux_server.training.feature_segment import SeenPicture


@dataclass(frozen=True, eq=False)
class PreparedPicture:
    """A picture as a stem reads it that is still to see it, and its size as it is stored, in pixels."""

    image: Tensor  # (3, S, S'), normalised
    width: int
    height: int


Change = Callable[[DecodedImage, int], DecodedImage]
"""An augmentation: another picture of the same content, decided by the sample's number. Boxes must still fit."""


@dataclass(frozen=True)
class Preparation:
    """How a task's pictures are fed to the model."""

    size: int
    mean: float
    std: float

    @classmethod
    def of(cls, spec: TaskSpec) -> Preparation:
        return cls(spec.image_size, spec.image_mean, spec.image_std)

    def key(self, digest: str) -> ImageKey:
        return ImageKey(digest, self.size, self.mean, self.std, alone=True)


class Stem:
    """The stem of one model, for pictures that are prepared in one way."""

    def __init__(
        self,
        model: OFA,
        fingerprint: str,
        preparation: Preparation,
        cache: FeatureCache | None = None,
        *,
        change: Change | None = None,
        limits: ImageLimits | None = None,
    ) -> None:
        """`fingerprint` is the backbone's. With `change` the cache is neither asked nor filled."""
        self._model, self._fingerprint, self._preparation = model, fingerprint, preparation
        self._cache = cache if change is None else None
        self._change, self._limits = change, limits or ImageLimits()

    def see(self, picture: Picture, number: int) -> SeenPicture:
        """The tokens of sample `number`'s picture, on the model's device; raises UnreadablePicture."""
        data = picture.read(self._limits)
        if self._cache is None:
            return self._pass(decoded(data, self._limits), number)
        # By the file's bytes first: what is found so need not even be decoded.
        of_file = self._key(f"file {hashlib.sha256(data).hexdigest()}")
        found = self._cache.find(of_file)
        if found is None:
            image = decoded(data, self._limits)
            of_pixels = self._key(image.digest)
            found = self._cache.find(of_pixels)
            if found is None:
                found = self._pass(image, number)
                self._cache.keep((of_file, of_pixels), found)
        tokens = found.image.tokens.to(self._model.device)
        return SeenPicture(ImageTokens(tokens, found.image.grid), found.width, found.height)

    def _key(self, digest: str) -> str:
        return self._preparation.key(digest).of_model(self._fingerprint, str(self._model.dtype))

    @torch.no_grad()
    def _pass(self, image: DecodedImage, number: int) -> SeenPicture:
        how = self._preparation
        shown = image if self._change is None else self._change(image, number)
        pixels = preprocess(shown, how.size, how.mean, how.std)
        return SeenPicture(self._model.image_tokens(pixels[None])[0], image.width, image.height)


class Pixels:
    """Pictures for a stem that learns: what it says of them changes with every step, so nothing is seen or kept."""

    def __init__(self, preparation: Preparation, *, limits: ImageLimits | None = None) -> None:
        self._preparation, self._limits = preparation, limits or ImageLimits()

    def see(self, picture: Picture, number: int) -> PreparedPicture:
        """The pixels of sample `number`'s picture; raises UnreadablePicture."""
        how = self._preparation
        image = decoded(picture.read(self._limits), self._limits)
        return PreparedPicture(preprocess(image, how.size, how.mean, how.std), image.width, image.height)
