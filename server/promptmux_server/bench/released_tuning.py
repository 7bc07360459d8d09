"""Prompt tuning the way the released trainer does it, as a yardstick: same weights, same loss, none of our layout.

Every epoch passes every picture through the stem; rows are padded to the longest; every layer builds a bias for every
request; logits are made of padding, too (ofa-spec 2 to 4, 9.1). Kinder than the release in leaving out the frozen
backbone's dropout and drop-path, and in a stem that is ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from promptmux_prompts.importers.ofa import split_table
from promptmux_server.backbone.config import EOS, PAD
from promptmux_server.backbone.encoder import EncoderRow
from promptmux_server.backbone.layers import DecoderLayer
from promptmux_server.backbone.model import OFA
from promptmux_server.backbone.positions import token_buckets
from promptmux_server.bench.released import ReleasedForm, combine, feed_forward, projections
from promptmux_server.training.forward import Example
from promptmux_server.training.initial import initial_table

CLIP_NORM = 1.0
BETAS = (0.9, 0.999)


class ReleasedTuner:
    """Tables of both sides and their Adam, in front of a frozen model; the numbers are those of the release."""

    def __init__(
        self, model: OFA, length: int, *, learning_rate: float = 0.03, smoothing: float = 0.1, dropout: float = 0.2
    ) -> None:
        self._model, self._smoothing, self._dropout = model, smoothing, dropout
        layers = (model.config.encoder_layers, model.config.decoder_layers)
        self.tables = [
            nn.Parameter(initial_table(length, n * 2 * model.config.d_model, seed))
            for seed, n in enumerate(layers, start=1)
        ]
        self._optimizer = torch.optim.AdamW(self.tables, learning_rate, BETAS, weight_decay=0.01)

    def step(self, pixels: Tensor, examples: Sequence[Example]) -> float:
        """Learn from one batch; the picture of example i is pixels[i]. Returns the mean loss."""
        total, tokens = self.loss(pixels, examples)
        (total / tokens).backward()
        nn.utils.clip_grad_norm_(self.tables, CLIP_NORM)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return float(total.detach()) / tokens

    def loss(self, pixels: Tensor, examples: Sequence[Example]) -> tuple[Tensor, int]:
        """Label-smoothed loss of all target tokens, and how many there are."""
        images = self._model.image_tokens(pixels)
        rows = [EncoderRow(e.source, image) for e, image in zip(examples, images, strict=True)]
        encoder, decoder = (self._prompts(side, len(rows)) for side in (0, 1))
        form = ReleasedForm(self._model, encoder)
        states, padding = form.encode(rows)
        inputs = _padded([(*e.prefix, *e.target) for e in examples])
        targets = _padded([(*(PAD,) * (len(e.prefix) - 1), *e.target, EOS) for e in examples]).flatten()
        logits = self._teach(form, decoder, inputs, states, padding, rows).flatten(0, 1)
        log_probs = F.log_softmax(logits.float(), dim=-1)
        scored = targets != PAD
        log_probs, targets = log_probs[scored], targets[scored]
        share = self._smoothing / (log_probs.shape[1] - 1)
        nll = -log_probs.gather(1, targets[:, None])[:, 0]
        return ((1.0 - self._smoothing - share) * nll - share * log_probs.sum(1)).sum(), len(targets)

    def _prompts(self, side: int, rows: int) -> list[tuple[Tensor, Tensor]]:
        """A copy for every row, thinned by itself."""
        config = self._model.config
        layers = (config.encoder_layers, config.decoder_layers)[side]
        copies = F.dropout(self.tables[side].expand(rows, -1, -1), self._dropout).to(self._model.dtype)
        return [split_table(copy, layers, config.heads) for copy in copies]

    def _teach(
        self,
        form: ReleasedForm,
        prompts: Sequence[tuple[Tensor, Tensor]],
        inputs: Tensor,
        states: Tensor,
        padding: Tensor,
        rows: Sequence[EncoderRow],
    ) -> Tensor:
        """Logits (B, T, V) of teacher-forced inputs (B, T) over padded encoder states (B, N, d_model)."""
        model, decoder, config = self._model, self._model.decoder, self._model.config
        t = inputs.shape[1]
        own_positions = decoder.pos_ln(decoder.embed_positions.weight[:t]).expand(len(rows), -1, -1)
        longest = max(len(row.source) for row in rows)
        memory_positions = model.encoder.positions(rows[0].grid, longest).expand(len(rows), -1, -1)
        queries = form.heads(decoder.self_pos_q_linear(own_positions)) * decoder.scale
        own = queries @ form.heads(decoder.self_pos_k_linear(own_positions)).transpose(2, 3)
        queries = form.heads(decoder.cross_pos_q_linear(own_positions)) * decoder.scale
        cross = queries @ form.heads(decoder.cross_pos_k_linear(memory_positions)).transpose(2, 3)
        buckets = token_buckets(t, config.token_bucket_size, config.max_positions).expand(len(rows), -1, -1)
        future = torch.ones(t, t, dtype=torch.bool).triu(1)
        x = decoder.layernorm_embedding(model.encoder.embed_tokens(inputs))
        for index, module in enumerate(decoder.layers):
            layer = cast(DecoderLayer, module)
            normed = layer.self_attn_layer_norm(x)
            q, k, v = (form.heads(projection(normed)) for projection in projections(layer.self_attn))
            key, value = (torch.stack([pair[part][index] for pair in prompts]) for part in (0, 1))
            bias = own + decoder.token_rel_pos_table_list[index](buckets).permute(0, 3, 1, 2)
            scores = (q * decoder.scale) @ torch.cat([key, k], dim=2).transpose(2, 3)
            scores[..., key.shape[2] :] += bias.masked_fill(future, -torch.inf)
            x = x + layer.self_attn_ln(combine(layer.self_attn, scores, torch.cat([value, v], dim=2)))
            attention, normed = layer.encoder_attn, layer.encoder_attn_layer_norm(x)
            key, value = form.heads(attention.k_proj(states)), form.heads(attention.v_proj(states))
            scores = (form.heads(attention.q_proj(normed)) * decoder.scale) @ key.transpose(2, 3) + cross
            scores = scores.masked_fill(padding[:, None, None], -torch.inf)
            x = x + layer.cross_attn_ln(combine(attention, scores, value))
            x = x + feed_forward(layer, x)
        return F.linear(decoder.layer_norm(x), model.encoder.embed_tokens.weight)


def _padded(texts: Sequence[Sequence[int]]) -> Tensor:
    """Texts as one matrix of ids, PAD behind their ends."""
    longest = max(len(text) for text in texts)
    return torch.tensor([[*text, *(PAD,) * (longest - len(text))] for text in texts])
