"""The OFA encoder: pictures and texts of a mixed batch in, one flat axis of states out (ofa-spec 2).

Rows differ freely in picture, grid, text length and prompt; nothing is padded. Owns embeddings and position biases;
knows nothing of tasks, requests or where a prompt came from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from promptmux_kernels import (
    BiasFactors,
    PagedPrompts,
    PromptBatch,
    Rows,
    SharedBias,
    pack_bias,
    prefix_attention,
)
from promptmux_server.backbone.config import BackboneConfig
from promptmux_server.backbone.layers import EncoderLayer, SelfAttend
from promptmux_server.backbone.passes import PLAIN_PASS, PassOptions, depth
from promptmux_server.backbone.positions import (
    NO_IMAGE,
    BiasCache,
    Grid,
    image_buckets,
    image_position_ids,
    relative_codes,
    relative_table,
    text_capacity,
    token_buckets,
)
from promptmux_server.backbone.vision import VisionStem

Bias = Tensor | BiasFactors

GRIDS_CACHED = 4
"""Image grids whose biases stay resident: 125 MB each for OFA-base at 480 px in 16 bits."""


@dataclass(frozen=True)
class ImageTokens:
    """A picture after the vision stem, ready to enter the encoder: independent of prompt and text.

    `tokens` is (N, d_model), projected, typed and normalised; N = grid rows * columns.
    """

    tokens: Tensor
    grid: Grid


@dataclass(frozen=True)
class EncoderRow:
    """One row of an encoder batch: source token ids (bos ... eos) and at most one picture."""

    source: Sequence[int]
    image: ImageTokens | None = None

    @property
    def grid(self) -> Grid:
        return self.image.grid if self.image else NO_IMAGE


@dataclass(frozen=True)
class EncoderOutput:
    """Final states (T, d_model) of all rows, image tokens before text tokens, and each row's grid."""

    states: Tensor
    rows: Rows
    grids: tuple[Grid, ...]


class Encoder(nn.Module):
    """Parameters carry the released model's names."""

    def __init__(self, config: BackboneConfig, *, folded: bool) -> None:
        super().__init__()
        d = config.d_model
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, d, padding_idx=None)
        self.layernorm_embedding = nn.LayerNorm(d)
        self.type_embedding = nn.Embedding(2, d)
        self.embed_images = VisionStem(config, folded=folded)
        self.image_proj = nn.Linear(config.image_feature_dim, d)
        self.patch_layernorm_embedding = nn.LayerNorm(d)
        self.embed_positions = nn.Embedding(config.max_positions + 2, d)
        self.embed_image_positions = nn.Embedding(config.image_bucket_size**2 + 1, d)
        self.pos_ln = nn.LayerNorm(d)
        self.image_pos_ln = nn.LayerNorm(d)
        self.pos_q_linear = nn.Linear(d, d)
        self.pos_k_linear = nn.Linear(d, d)
        layers = range(config.encoder_layers)
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in layers)
        self.layer_norm = nn.LayerNorm(d)
        token_table, image_table = 2 * config.token_bucket_size - 1, (2 * config.image_bucket_size - 1) ** 2 + 3
        self.token_rel_pos_table_list = nn.ModuleList(nn.Embedding(token_table, config.heads) for _ in layers)
        self.image_rel_pos_table_list = nn.ModuleList(nn.Embedding(image_table, config.heads) for _ in layers)
        self.factored_above: int | None = None
        """Bytes of a grid's dense bias tables beyond which they stay in factors; None where no kernel reads factors."""
        self._biases: BiasCache[tuple[Grid, int], tuple[Bias, ...]] = BiasCache(GRIDS_CACHED)

    @property
    def scale(self) -> float:
        """Of content and position scores alike: (head_dim * attn_scale_factor) ** -0.5."""
        return float((self.config.head_dim * self.config.attn_scale_factor) ** -0.5)

    def image_tokens(self, pixels: Tensor) -> list[ImageTokens]:
        """Run the vision stem on (B, 3, S, S') normalised pixels; one entry per picture."""
        weight = self.image_proj.weight
        pixels = pixels.to(device=weight.device, dtype=weight.dtype, memory_format=torch.channels_last)
        features = self.embed_images(pixels)  # (B, C, rows, columns)
        return self.project(features.flatten(2).transpose(1, 2), (features.shape[2], features.shape[3]))

    def project(self, features: Tensor, grid: Grid) -> list[ImageTokens]:
        """Patch features (B, N, C) of the stem -> tokens; what is left of `image_tokens` behind the stem."""
        x = self.image_proj(features) + self.type_embedding.weight[1]
        return [ImageTokens(tokens, grid) for tokens in self.patch_layernorm_embedding(x)]

    def forward(
        self, rows: Sequence[EncoderRow], prompts: PromptBatch | None = None, options: PassOptions = PLAIN_PASS
    ) -> EncoderOutput:
        """Encode a mixed batch; row b reads its own prompt of `prompts`."""
        x, layout = self._embed(rows)
        if (drops := options.drops("encoder", 0.0, layout)) is not None:
            x = drops.elements(x)
        grids = tuple(row.grid for row in rows)
        capacity = text_capacity(max(len(row.source) for row in rows), self.config.max_positions)
        kinds = sorted(set(grids))
        tables = [self.biases(grid, capacity) for grid in kinds]
        table_of_row = tuple(kinds.index(grid) for grid in grids)
        for index, layer in enumerate(self.layers):
            bias = SharedBias(tuple(table[index] for table in tables), table_of_row)
            paged = prompts.layer(index) if prompts else None

            def attend(
                q: Tensor,
                k: Tensor,
                v: Tensor,
                head_scale: Tensor,
                bias: SharedBias = bias,
                paged: PagedPrompts | None = paged,
            ) -> Tensor:
                out, _ = prefix_attention(
                    q,
                    k,
                    v,
                    rows=layout,
                    prompts=paged,
                    bias=bias,
                    scale=self.scale,
                    head_scale=head_scale,
                    causal=False,
                )
                return out

            def run(x: Tensor, layer: nn.Module = layer, attend: SelfAttend = attend, index: int = index) -> Tensor:
                drops = options.drops(f"encoder.{index}", depth(index, len(self.layers)), layout)
                out: Tensor = layer(x, attend, drops)
                return out

            x = options.through(run, x)
        return EncoderOutput(self.layer_norm(x), layout, grids)

    def _embed(self, rows: Sequence[EncoderRow]) -> tuple[Tensor, Rows]:
        device = self.embed_tokens.weight.device
        ids = torch.tensor([token for row in rows for token in row.source], device=device)
        text = self.layernorm_embedding(self.embed_tokens(ids) + self.type_embedding.weight[0])
        texts = text.split([len(row.source) for row in rows])
        parts = [part for row, own in zip(rows, texts, strict=True) for part in _image_then_text(row, own)]
        return torch.cat(parts), Rows.packed([len(row.source) + row.grid[0] * row.grid[1] for row in rows])

    def positions(self, grid: Grid, text_length: int) -> Tensor:
        """Normalised position vectors of image then text tokens, (N + text_length, d_model)."""
        text: Tensor = self.pos_ln(self.embed_positions.weight[:text_length])
        if grid == NO_IMAGE:
            return text
        return torch.cat([self.image_pos_ln(self._image_positions(grid)), text])

    def _image_positions(self, grid: Grid) -> Tensor:
        """Position embeddings of a grid (N, d_model), resized from the original grid where the model asks for it."""
        bucket, patch = self.config.image_bucket_size, self.config.patch_pixels
        side = self.config.orig_patch_image_size // patch
        table = self.embed_image_positions
        if not self.config.interpolate_position or grid[0] * grid[1] <= side * side:
            out: Tensor = table(image_position_ids(grid, bucket).to(table.weight.device))
            return out
        known = table(image_position_ids((side, side), bucket).to(table.weight.device))
        resized = F.interpolate(known.T.reshape(1, -1, side, side), size=grid, mode="bilinear")
        return resized[0].flatten(1).T

    def biases(self, grid: Grid, text_length: int) -> tuple[Bias, ...]:
        """Per layer, the bias (H, N + text_length, N + text_length) that every row of this grid shares."""
        if any(p.requires_grad for p in self.pos_q_linear.parameters()):
            return self._build_biases(grid, text_length)
        device = self.pos_q_linear.weight.device
        return self._biases.get((grid, text_length), device, lambda: self._finished_biases(grid, text_length))

    def _finished_biases(self, grid: Grid, text_length: int) -> tuple[Bias, ...]:
        """A frozen model's tables: dense, as the device reads them fastest, or in factors where that is too much."""
        config, weight = self.config, self.pos_q_linear.weight
        # By the picture alone: the longest text of a batch must not decide how its neighbours' numbers are rounded.
        dense_bytes = config.encoder_layers * config.heads * (grid[0] * grid[1]) ** 2 * weight.dtype.itemsize
        if self.factored_above is not None and dense_bytes > self.factored_above:
            return self._build_factors(grid, text_length)
        return tuple(pack_bias(table, weight.dtype) for table in self._build_biases(grid, text_length))

    def _build_factors(self, grid: Grid, text_length: int) -> tuple[BiasFactors, ...]:
        config, dtype = self.config, self.pos_q_linear.weight.dtype
        p = self.positions(grid, text_length)
        query, key = (
            x.view(len(p), config.heads, -1).transpose(0, 1).contiguous()
            for x in (self.pos_q_linear(p) * self.scale, self.pos_k_linear(p))
        )
        query_code, key_code = (x.to(p.device) for x in relative_codes(grid, text_length, config.image_bucket_size))
        buckets = token_buckets(text_length, config.token_bucket_size, config.max_positions).to(p.device)
        texts, images = (
            [cast("nn.Embedding", table).weight for table in tables]
            for tables in (self.token_rel_pos_table_list, self.image_rel_pos_table_list)
        )
        seen = (2 * config.image_bucket_size - 1) ** 2  # the last three entries are for generating images
        relative = (relative_table(i[:seen], t, buckets).to(dtype) for t, i in zip(texts, images, strict=True))
        return tuple(BiasFactors(query, key, query_code, key_code, table) for table in relative)

    def _build_biases(self, grid: Grid, text_length: int) -> tuple[Tensor, ...]:
        config = self.config
        p = self.positions(grid, text_length)
        absolute = position_scores(self.pos_q_linear(p), self.pos_k_linear(p), config.heads, self.scale)
        images = grid[0] * grid[1]
        device = p.device
        text_index = token_buckets(text_length, config.token_bucket_size, config.max_positions).to(device)
        image_index = image_buckets(grid, config.image_bucket_size).to(device)
        biases = []
        for text_table, image_table in zip(self.token_rel_pos_table_list, self.image_rel_pos_table_list, strict=True):
            relative = torch.zeros_like(absolute)
            relative[:, images:, images:] = text_table(text_index).permute(2, 0, 1)
            relative[:, :images, :images] = image_table(image_index).permute(2, 0, 1)
            biases.append(absolute + relative)
        return tuple(biases)


def position_scores(queries: Tensor, keys: Tensor, heads: int, scale: float) -> Tensor:
    """Scores of projected positions, (n, d_model) x (m, d_model) -> (H, n, m), computed in float32."""
    q, k = (x.float().view(x.shape[0], heads, -1).transpose(0, 1) for x in (queries, keys))
    return (q * scale) @ k.transpose(1, 2)


def _image_then_text(row: EncoderRow, text: Tensor) -> list[Tensor]:
    return [row.image.tokens, text] if row.image else [text]
