"""From training examples to supervised logits: the teacher-forced pass that every method of training shares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from promptmux_kernels import PromptBatch
from promptmux_server.backbone.config import EOS
from promptmux_server.backbone.encoder import EncoderRow, ImageTokens
from promptmux_server.backbone.model import OFA
from promptmux_server.backbone.passes import PLAIN_PASS, PassOptions


@dataclass(frozen=True)
class Example:
    """One supervised text: ids of source (bos ... eos), decoder prefix (bos ...) and target (without eos).

    `image` indexes the pictures of the batch (None: text only), so that several texts share one pass of the stem.
    `confidence` is how far the target is to be trusted (VQA), see `loss`.
    """

    source: tuple[int, ...]
    prefix: tuple[int, ...]
    target: tuple[int, ...]
    image: int | None
    confidence: float = 1.0


def supervised_logits(
    model: OFA,
    examples: Sequence[Example],
    images: Sequence[ImageTokens],
    encoder_prompts: PromptBatch | None = None,
    decoder_prompts: PromptBatch | None = None,
    options: PassOptions = PLAIN_PASS,
) -> tuple[Tensor, Tensor]:
    """Logits (T, V) where target tokens and eos are predicted, and those targets (T,); prefixes are not scored."""
    rows = [EncoderRow(e.source, None if e.image is None else images[e.image]) for e in examples]
    memory = model.remember(model.encode(rows, encoder_prompts, options))
    states = model.teach([e.prefix + e.target for e in examples], memory, decoder_prompts, options=options)
    scored: list[int] = []
    start = 0
    for example in examples:
        end = start + len(example.prefix) + len(example.target)
        scored.extend(range(start + len(example.prefix) - 1, end))
        start = end
    targets = torch.tensor([token for e in examples for token in (*e.target, EOS)], device=states.device)
    return model.logits(states[torch.tensor(scored, device=states.device)]), targets
