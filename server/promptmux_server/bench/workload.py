"""What is measured: OFA-base with random weights and eight requests with pictures of 480 px and prompts of all lengths.

Owns shapes and the counts of their arithmetic; knows nothing of time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from promptmux_kernels import PromptBatch, pack_prompts
from promptmux_server.backbone.assemble import assemble
from promptmux_server.backbone.config import BackboneConfig
from promptmux_server.backbone.encoder import EncoderRow, ImageTokens
from promptmux_server.backbone.model import OFA
from promptmux_server.backbone.weights import LoadedBackbone
from promptmux_server.backbone.weights.random_init import random_backbone
from promptmux_server.engine.decoding import make_search
from promptmux_server.engine.runner import BatchPrompts, RunningBatch, Work, closed_batch
from promptmux_server.tasks.decoding import DecodingParams

IMAGE_PX = 480
TEXT_LENGTHS = (30, 12, 24, 30, 8, 20, 16, 30)
PROMPT_LENGTHS = (64, 64, 16, 100, 0, 128, 64, 32)
"""Of eight requests; three of them share a task."""
ONE_PROMPT = (64,) * 8
STEPS = 16
BEAM = 5

Pair = tuple[Tensor, Tensor]
"""A prompt's K and V, (L, H, P, D)."""


@dataclass(frozen=True)
class Models:
    """The same weights twice: as loaded, and packed for serving."""

    plain: OFA
    packed: OFA

    @property
    def config(self) -> BackboneConfig:
        return self.plain.config


def build_models(config: BackboneConfig, dtype: torch.dtype) -> Models:
    loaded = LoadedBackbone(config, random_backbone(config, seed=0, dtype=torch.float32))
    return Models(assemble(loaded, dtype=dtype), assemble(loaded, dtype=dtype, packed=True))


def pictures(config: BackboneConfig, count: int, dtype: torch.dtype, pixels: int = IMAGE_PX) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 3, pixels, pixels, generator=generator).to(dtype)


def encoder_rows(config: BackboneConfig, images: Sequence[ImageTokens], count: int) -> list[EncoderRow]:
    """`count` rows that repeat the workload's text lengths, and pictures in turn."""
    lengths = [TEXT_LENGTHS[i % len(TEXT_LENGTHS)] for i in range(count)]
    texts = [tuple((7 * i + j) % (config.vocab_size - 8) + 4 for j in range(n)) for i, n in enumerate(lengths)]
    return [EncoderRow(text, images[i % len(images)]) for i, text in enumerate(texts)]


def prompt_pairs(config: BackboneConfig, lengths: Sequence[int], dtype: torch.dtype) -> list[Pair]:
    """One prompt per distinct length, in the order of `sorted(set(lengths))`."""
    generator = torch.Generator().manual_seed(2)

    def draw(length: int) -> Tensor:
        return torch.randn(config.encoder_layers, config.heads, length, config.head_dim, generator=generator).to(dtype)

    return [(draw(n), draw(n)) for n in sorted(set(lengths))]


def prompt_batch(config: BackboneConfig, lengths: Sequence[int], dtype: torch.dtype) -> PromptBatch:
    kinds = sorted(set(lengths))
    return pack_prompts(prompt_pairs(config, lengths, dtype), [kinds.index(n) for n in lengths])


def repeated(lengths: Sequence[int], count: int) -> list[int]:
    return [lengths[i % len(lengths)] for i in range(count)]


def caption_batch(model: OFA, rows: Sequence[EncoderRow], lengths: Sequence[int]) -> RunningBatch:
    """A batch of captions with their first tokens chosen: beam search over exactly `STEPS` tokens."""
    params = DecodingParams(method="beam", beam_size=BEAM, max_length=STEPS, min_length=STEPS)
    works = [Work(tuple(row.source), (0,), row.image, make_search(params)) for row in rows]
    prompts = prompt_batch(model.config, lengths, model.dtype)
    return closed_batch(model, works, BatchPrompts(prompts, prompts))


def attention_flops(config: BackboneConfig, rows: Sequence[int], prompts: Sequence[int]) -> float:
    """Of one layer: Q K^T and P V over prompt and own keys, nothing for padding."""
    return float(sum(4 * n * (n + p) * config.d_model for n, p in zip(rows, prompts, strict=True)))


def encoder_flops(config: BackboneConfig, rows: Sequence[int], prompts: Sequence[int]) -> float:
    d, tokens = config.d_model, sum(rows)
    projections = 2 * tokens * (4 * d * d + 2 * d * config.ffn_dim)
    return config.encoder_layers * (projections + attention_flops(config, rows, prompts))


def memory_flops(config: BackboneConfig, rows: Sequence[int]) -> float:
    """Cross-attention keys and values of all decoder layers."""
    return float(config.decoder_layers * 4 * sum(rows) * config.d_model**2)


def image_flops(model: OFA, pixels: Tensor) -> float:
    """Of the stem and the projection behind it, counted from the shapes that pass."""
    counts: list[float] = []

    def count(module: nn.Module, _inputs: object, output: Tensor) -> None:
        weight = module.weight
        assert isinstance(weight, Tensor)
        counts.append(2.0 * output.numel() * weight[0].numel())

    modules = [m for m in model.encoder.embed_images.modules() if isinstance(m, nn.Conv2d)]
    hooks = [module.register_forward_hook(count) for module in (*modules, model.encoder.image_proj)]
    model.image_tokens(pixels[:1])
    for hook in hooks:
        hook.remove()
    return sum(counts) * len(pixels)


def step_bytes(config: BackboneConfig, dtype: torch.dtype) -> float:
    """Weights that one decoding step reads whatever the batch: the decoder's layers and the vocabulary.

    Six d x d projections a layer: cross-attention's K and V are made before the first step.
    """
    d = config.d_model
    layers = config.decoder_layers * (6 * d * d + 2 * d * config.ffn_dim)
    return float(dtype.itemsize * (layers + config.vocab_size * d))
