"""The OFA decoder: teacher-forced over whole texts, or one token per beam at a time (ofa-spec 3).

Both ways run the same layers; they differ in how attention reaches earlier tokens. Owns the decoder's position biases;
knows nothing of searches or tasks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from promptmux_kernels import (
    CrossMemory,
    PagedPrompts,
    PromptBatch,
    Rows,
    SharedBias,
    cross_decode_attention,
    pack_bias,
    pack_memory,
    prefix_attention,
    prefix_decode_attention,
)
from promptmux_server.backbone.cache import DecodeCache
from promptmux_server.backbone.config import BackboneConfig
from promptmux_server.backbone.encoder import GRIDS_CACHED, Encoder, EncoderOutput, position_scores
from promptmux_server.backbone.layers import CrossAttend, DecoderLayer, SelfAttend
from promptmux_server.backbone.passes import PLAIN_PASS, PassOptions, depth
from promptmux_server.backbone.positions import BiasCache, Grid, text_capacity, token_buckets


@dataclass(frozen=True)
class Memory:
    """The encoder's output as the decoder reads it: every layer's keys and values, computed once per request.

    Beams of a request share them by construction.
    """

    layers: tuple[CrossMemory, ...]
    grids: tuple[Grid, ...]

    @property
    def rows(self) -> Rows:
        return self.layers[0].rows

    def select(self, rows: Sequence[int]) -> Memory:
        """The memory of some requests of the batch, without a copy."""
        return Memory(tuple(layer.select(rows) for layer in self.layers), tuple(self.grids[r] for r in rows))


@dataclass(frozen=True)
class BeamRows:
    """One decoding step: which beams of which requests feed which token, and the cache slots they descend from.

    `tokens` is (R,) int64; `groups` are the beams of each request on that axis; `history` is (R, T_max) int64, row r's
    ancestors in order, the slot of its own new token last; `lengths[g]` counts them for request g.
    """

    tokens: Tensor
    groups: Rows
    history: Tensor
    lengths: tuple[int, ...]


class Decoder(nn.Module):
    """Parameters carry the released model's names; token embeddings are the encoder's."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        d = config.d_model
        self.config = config
        self.layernorm_embedding = nn.LayerNorm(d)
        self.embed_positions = nn.Embedding(config.max_positions + 2, d)
        self.pos_ln = nn.LayerNorm(d)
        self.self_pos_q_linear = nn.Linear(d, d)
        self.self_pos_k_linear = nn.Linear(d, d)
        self.cross_pos_q_linear = nn.Linear(d, d)
        self.cross_pos_k_linear = nn.Linear(d, d)
        layers = range(config.decoder_layers)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in layers)
        self.layer_norm = nn.LayerNorm(d)
        table = 2 * config.token_bucket_size - 1
        self.token_rel_pos_table_list = nn.ModuleList(nn.Embedding(table, config.heads) for _ in layers)
        self._self_biases: BiasCache[int, tuple[Tensor, ...]] = BiasCache(GRIDS_CACHED)
        self._cross_biases: BiasCache[tuple[Grid, int, int], Tensor] = BiasCache(GRIDS_CACHED * 4)

    @property
    def scale(self) -> float:
        return float((self.config.head_dim * self.config.attn_scale_factor) ** -0.5)

    def remember(self, encoded: EncoderOutput) -> Memory:
        """Project the encoder's output to cross-attention keys and values, once for all steps and beams."""
        attentions = [cast(DecoderLayer, layer).encoder_attn for layer in self.layers]
        states = encoded.states
        layers = (pack_memory(a.split(a.k_proj(states)), a.split(a.v_proj(states)), encoded.rows) for a in attentions)
        return Memory(tuple(layers), encoded.grids)

    def prefill(
        self,
        embedded: Tensor,
        rows: Rows,
        memory: Memory,
        encoder: Encoder,
        prompts: PromptBatch | None = None,
        cache: tuple[DecodeCache, Tensor] | None = None,
        options: PassOptions = PLAIN_PASS,
    ) -> Tensor:
        """Teacher-forced pass over ragged rows of token embeddings (T, d_model) -> final states (T, d_model).

        With `cache` (the cache and one slot per token) the keys and values are kept for later steps.
        """
        capacity = text_capacity(max(rows.lengths), self.config.max_positions)
        own_biases = self._own_biases(capacity)
        cross_bias = self._cross_bias(memory, capacity, encoder)
        start = (0,) * len(rows)
        x = self.layernorm_embedding(embedded)
        if (drops := options.drops("decoder", 0.0, rows)) is not None:
            x = drops.elements(x)
        for index, layer in enumerate(self.layers):
            own = SharedBias((own_biases[index],), start)
            paged = prompts.layer(index) if prompts else None

            def attend(
                q: Tensor,
                k: Tensor,
                v: Tensor,
                head_scale: Tensor,
                index: int = index,
                own: SharedBias = own,
                paged: PagedPrompts | None = paged,
            ) -> Tensor:
                if cache is not None:
                    cache[0].write(index, cache[1], k, v)
                out, _ = prefix_attention(
                    q, k, v, rows=rows, prompts=paged, bias=own, scale=self.scale, head_scale=head_scale, causal=True
                )
                return out

            def cross(q: Tensor, head_scale: Tensor, index: int = index) -> Tensor:
                return cross_decode_attention(
                    q,
                    groups=rows,
                    memory=memory.layers[index],
                    bias=cross_bias,
                    first_positions=start,
                    consecutive=True,
                    scale=self.scale,
                    head_scale=head_scale,
                )

            def run(
                x: Tensor,
                layer: nn.Module = layer,
                attend: SelfAttend = attend,
                cross: CrossAttend = cross,
                index: int = index,
            ) -> Tensor:
                drops = options.drops(f"decoder.{index}", depth(index, len(self.layers)), rows)
                out: Tensor = layer(x, attend, cross, drops)
                return out

            x = options.through(run, x)
        out: Tensor = self.layer_norm(x)
        return out

    def step(
        self,
        embedded: Tensor,
        beams: BeamRows,
        memory: Memory,
        encoder: Encoder,
        cache: DecodeCache,
        prompts: PromptBatch | None = None,
    ) -> Tensor:
        """One token per beam: embeddings (R, d_model) -> final states (R, d_model); new K/V go to the cache."""
        capacity = text_capacity(max(beams.lengths), self.config.max_positions)
        own_biases = self._own_biases(capacity)
        cross_bias = self._cross_bias(memory, capacity, encoder)
        last = torch.tensor(
            [n - 1 for n, width in zip(beams.lengths, beams.groups.lengths, strict=True) for _ in range(width)],
            device=embedded.device,
        )
        slots = beams.history.gather(1, last[:, None])[:, 0]  # (R,)
        positions = tuple(length - 1 for length in beams.lengths)
        x = self.layernorm_embedding(embedded)
        for index, layer in enumerate(self.layers):

            def attend(q: Tensor, k: Tensor, v: Tensor, head_scale: Tensor, index: int = index) -> Tensor:
                cache.write(index, slots, k, v)
                return prefix_decode_attention(
                    q,
                    groups=beams.groups,
                    prompts=prompts.layer(index) if prompts else None,
                    cache_key=cache.key[index],
                    cache_value=cache.value[index],
                    history=beams.history,
                    history_lengths=beams.lengths,
                    bias=own_biases[index],
                    scale=self.scale,
                    head_scale=head_scale,
                )

            def cross(q: Tensor, head_scale: Tensor, index: int = index) -> Tensor:
                return cross_decode_attention(
                    q,
                    groups=beams.groups,
                    memory=memory.layers[index],
                    bias=cross_bias,
                    first_positions=positions,
                    consecutive=False,
                    scale=self.scale,
                    head_scale=head_scale,
                )

            x = layer(x, attend, cross, None)
        out: Tensor = self.layer_norm(x)
        return out

    def _own_biases(self, length: int) -> tuple[Tensor, ...]:
        """Per layer, the self-attention bias (H, length, length)."""
        if any(p.requires_grad for p in self.self_pos_q_linear.parameters()):
            return self._build_own_biases(length)
        device = self.self_pos_q_linear.weight.device
        return self._self_biases.get(length, device, lambda: self._build_own_biases(length))

    def _build_own_biases(self, length: int) -> tuple[Tensor, ...]:
        config = self.config
        u = self.pos_ln(self.embed_positions.weight[:length])
        absolute = position_scores(self.self_pos_q_linear(u), self.self_pos_k_linear(u), config.heads, self.scale)
        index = token_buckets(length, config.token_bucket_size, config.max_positions).to(u.device)
        return tuple(absolute + table(index).permute(2, 0, 1) for table in self.token_rel_pos_table_list)

    def _cross_bias(self, memory: Memory, length: int, encoder: Encoder) -> SharedBias:
        """Position bias of decoder positions on encoder tokens, the same in all layers; one table per image grid."""
        kinds = sorted(set(memory.grids))
        pairs = list(zip(memory.grids, memory.rows.lengths, strict=True))
        tables = []
        for grid in kinds:
            longest = max(n - grid[0] * grid[1] for g, n in pairs if g == grid)
            text = text_capacity(longest, self.config.max_positions)
            tables.append(self._cross_table(grid, length, text, encoder))
        return SharedBias(tuple(tables), tuple(kinds.index(grid) for grid in memory.grids))

    def _cross_table(self, grid: Grid, length: int, text_length: int, encoder: Encoder) -> Tensor:
        if any(p.requires_grad for p in self.cross_pos_q_linear.parameters()):
            return self._build_cross_table(grid, length, text_length, encoder)
        key = (grid, length, text_length)
        weight = self.cross_pos_q_linear.weight
        return self._cross_biases.get(
            key,
            weight.device,
            lambda: pack_bias(self._build_cross_table(grid, length, text_length, encoder), weight.dtype),
        )

    def _build_cross_table(self, grid: Grid, length: int, text_length: int, encoder: Encoder) -> Tensor:
        u = self.pos_ln(self.embed_positions.weight[:length])
        p = encoder.positions(grid, text_length)
        return position_scores(self.cross_pos_q_linear(u), self.cross_pos_k_linear(p), self.config.heads, self.scale)
