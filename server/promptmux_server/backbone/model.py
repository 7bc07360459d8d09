"""OFA as one module: the forward pass that serving, evaluation and training share (ofa-spec 1 to 4).

Owns how encoder and decoder meet (shared embeddings, tied projection). Everything is asked of it in the same terms:
rows, prompts, memory; nothing here knows a task.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from promptmux_kernels import PromptBatch, Rows
from promptmux_kernels.linear import wide_linear
from promptmux_server.backbone.cache import DecodeCache
from promptmux_server.backbone.config import BackboneConfig
from promptmux_server.backbone.decoder import BeamRows, Decoder, Memory
from promptmux_server.backbone.encoder import Encoder, EncoderOutput, EncoderRow, ImageTokens
from promptmux_server.backbone.passes import PLAIN_PASS, PassOptions


class OFA(nn.Module):
    """The backbone. `folded` expects batch normalisation folded into the stem (see `weights.fold_batch_norm`)."""

    def __init__(self, config: BackboneConfig, *, folded: bool = True) -> None:
        super().__init__()
        self.config, self.folded = config, folded
        self.encoder = Encoder(config, folded=folded)
        self.decoder = Decoder(config)
        self.output_projection: nn.Module | None = None
        """The tied embedding once more, packed for a faster product (see `packed`)."""

    @property
    def device(self) -> torch.device:
        return self.encoder.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.encoder.embed_tokens.weight.dtype

    def image_tokens(self, pixels: Tensor) -> list[ImageTokens]:
        """(B, 3, S, S') normalised pixels -> one ImageTokens per picture."""
        return self.encoder.image_tokens(pixels)

    def encode(
        self, rows: Sequence[EncoderRow], prompts: PromptBatch | None = None, options: PassOptions = PLAIN_PASS
    ) -> EncoderOutput:
        """Encode rows of any mixture; row b reads prompt row b."""
        out: EncoderOutput = self.encoder(rows, prompts, options)
        return out

    def remember(self, encoded: EncoderOutput) -> Memory:
        """Cross-attention keys and values of the whole batch."""
        return self.decoder.remember(encoded)

    def teach(
        self,
        texts: Sequence[Sequence[int]],
        memory: Memory,
        prompts: PromptBatch | None = None,
        cache: tuple[DecodeCache, Tensor] | None = None,
        options: PassOptions = PLAIN_PASS,
    ) -> Tensor:
        """Run decoder input texts (one per memory row) at once -> states (sum of lengths, d_model), row after row."""
        ids = torch.tensor([token for text in texts for token in text], device=self.device)
        rows = Rows.packed([len(text) for text in texts])
        return self.decoder.prefill(self.encoder.embed_tokens(ids), rows, memory, self.encoder, prompts, cache, options)

    def step(self, beams: BeamRows, memory: Memory, cache: DecodeCache, prompts: PromptBatch | None = None) -> Tensor:
        """Feed one token per beam -> states (R, d_model)."""
        embedded = self.encoder.embed_tokens(beams.tokens)
        return self.decoder.step(embedded, beams, memory, self.encoder, cache, prompts)

    def logits(self, states: Tensor) -> Tensor:
        """States (T, d_model) -> logits (T, vocab_size) float32, by the tied embedding, without bias."""
        if self.output_projection is None:
            return wide_linear(states, self.encoder.embed_tokens.weight)
        out: Tensor = self.output_projection(states)
        return out
