"""The released model's way of computing, as a yardstick: same weights, same formulas, none of our layout.

Rows are padded to the longest; every layer builds a bias [B, H, N, N] for every request; prompts are padded and put in
front of keys; the decoder gets the encoder's output once per beam, concatenates its caches and computes position biases
for all positions at every step (ofa-spec 2 to 4). Kinder than the release in two ways: the stem is ours (folded norms,
channels last), and the encoder's output is not reordered at every step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from promptmux_server.backbone.config import EOS
from promptmux_server.backbone.encoder import EncoderRow
from promptmux_server.backbone.layers import Attention, DecoderLayer, EncoderLayer, Layer
from promptmux_server.backbone.model import OFA
from promptmux_server.backbone.positions import image_buckets, token_buckets

Pair = tuple[Tensor, Tensor]


class ReleasedForm:
    """One batch of requests with pictures of one size, on the plain modules of `model`."""

    def __init__(self, model: OFA, prompts: Sequence[Pair]) -> None:
        """`prompts`: each row's K and V, (L, H, P, D), the same for both sides."""
        self._model, self._config = model, model.config
        self._lengths = [key.shape[2] for key, _ in prompts]
        longest = max(self._lengths)
        padded = [[F.pad(part, (0, 0, longest - part.shape[2], 0)) for part in pair] for pair in prompts]
        self._prompt = tuple(torch.stack([pair[i] for pair in padded], dim=1) for i in (0, 1))  # (L, B, H, P, D)
        columns = torch.arange(longest)
        self._prompt_padding = columns < torch.tensor([[longest - n] for n in self._lengths])  # (B, P)

    def encode(self, rows: Sequence[EncoderRow]) -> tuple[Tensor, Tensor]:
        """Padded states (B, N, d_model) and their padding mask (B, N)."""
        x, padding = self.embed(rows)
        absolute = self.absolute_bias(rows)
        for index, module in enumerate(self._model.encoder.layers):
            layer = cast(EncoderLayer, module)
            normed = layer.self_attn_layer_norm(x)
            x = x + layer.attn_ln(layer.self_attn.out_proj(self.attend(index, normed, absolute, rows, padding)))
            x = x + feed_forward(layer, x)
        return self._model.encoder.layer_norm(x), padding

    def embed(self, rows: Sequence[EncoderRow]) -> tuple[Tensor, Tensor]:
        encoder = self._model.encoder
        longest = max(len(row.source) for row in rows)
        ids = torch.tensor([[*row.source, *(1,) * (longest - len(row.source))] for row in rows])
        text = encoder.layernorm_embedding(encoder.embed_tokens(ids) + encoder.type_embedding.weight[0])
        images = torch.stack([row.image.tokens for row in rows if row.image])
        padding = torch.cat([torch.zeros(images.shape[:2], dtype=torch.bool), ids == 1], dim=1)
        return torch.cat([images, text], dim=1), padding

    def absolute_bias(self, rows: Sequence[EncoderRow]) -> Tensor:
        """Scores of projected positions, once a batch and for every request: (B, H, N, N)."""
        encoder = self._model.encoder
        positions = encoder.positions(rows[0].grid, max(len(row.source) for row in rows))
        each = positions.expand(len(rows), -1, -1).contiguous()
        q = self.heads(encoder.pos_q_linear(each)) * encoder.scale
        return q @ self.heads(encoder.pos_k_linear(each)).transpose(2, 3)

    def attend(
        self, index: int, normed: Tensor, absolute: Tensor, rows: Sequence[EncoderRow], padding: Tensor
    ) -> Tensor:
        """One layer's attention with its bias, before the output projection; (B, N, d_model)."""
        attention = cast(EncoderLayer, self._model.encoder.layers[index]).self_attn
        q, k, v = (self.heads(projection(normed)) for projection in projections(attention))
        return self.attention(index, q, k, v, self.layer_bias(index, absolute, rows), padding)

    def layer_bias(self, index: int, absolute: Tensor, rows: Sequence[EncoderRow]) -> Tensor:
        """The absolute part plus this layer's relative tables, looked up for every request: (B, H, N, N)."""
        encoder, config, grid = self._model.encoder, self._config, rows[0].grid
        images, texts = grid[0] * grid[1], absolute.shape[2] - grid[0] * grid[1]
        bias = absolute.clone()
        token = token_buckets(texts, config.token_bucket_size, config.max_positions)
        text = encoder.token_rel_pos_table_list[index](token).expand(len(rows), -1, -1, -1)
        bias[:, :, images:, images:] += text.permute(0, 3, 1, 2)
        patch = image_buckets(grid, config.image_bucket_size).expand(len(rows), -1, -1)
        bias[:, :, :images, :images] += encoder.image_rel_pos_table_list[index](patch).permute(0, 3, 1, 2)
        return bias

    def attention(self, index: int, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, padding: Tensor) -> Tensor:
        """Concatenate prompts, softmax in float32, scale heads; q, k, v (B, H, N, D)."""
        layer = cast(EncoderLayer, self._model.encoder.layers[index])
        prompt_key, prompt_value = (side[index] for side in self._prompt)
        k, v = torch.cat([prompt_key, k], dim=2), torch.cat([prompt_value, v], dim=2)
        scores = (q * self._model.encoder.scale) @ k.transpose(2, 3)
        scores[..., prompt_key.shape[2] :] += bias
        hidden = torch.cat([self._prompt_padding, padding], dim=1)
        scores = scores.masked_fill(hidden[:, None, None], -torch.inf)
        out = F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype) @ v
        return (out * layer.self_attn.c_attn[:, None, None]).transpose(1, 2).flatten(2)

    def caption(self, rows: Sequence[EncoderRow], *, beam: int, steps: int) -> Tensor:
        """Encode and search; the beams' tokens (B, beam, steps). The search is the bare top-k of each step."""
        states, padding = self.encode(rows)
        decoder = ReleasedDecoder(self, states.repeat_interleave(beam, 0), padding.repeat_interleave(beam, 0), rows)
        tokens = torch.zeros(len(rows) * beam, 1, dtype=torch.int64)
        totals = torch.full((len(rows), beam), -torch.inf)
        totals[:, 0] = 0.0
        order = torch.arange(len(rows) * beam)
        for _ in range(steps):
            log_probs = F.log_softmax(decoder.step(tokens, order).float(), dim=-1)
            log_probs[:, EOS] = -torch.inf
            vocabulary = log_probs.shape[1]
            best, where = (log_probs.view(len(rows), beam, -1) + totals[..., None]).flatten(1).topk(2 * beam)
            totals, where = best[:, :beam], where[:, :beam]
            order = (where // vocabulary + torch.arange(len(rows))[:, None] * beam).flatten()
            tokens = torch.cat([tokens[order], (where % vocabulary).view(-1, 1)], dim=1)
        return tokens[:, 1:].view(len(rows), beam, steps)

    def heads(self, x: Tensor) -> Tensor:
        """(B, n, d_model) -> (B, H, n, D)."""
        heads: Tensor = x.unflatten(2, (self._config.heads, -1)).transpose(1, 2)
        return heads


class ReleasedDecoder:
    """Steps of a batch whose encoder states (R, N, d_model) were copied for every beam."""

    def __init__(self, form: ReleasedForm, states: Tensor, padding: Tensor, rows: Sequence[EncoderRow]) -> None:
        self._form, self._model = form, form._model
        self._beams = states.shape[0] // len(rows)
        self._padding = padding
        attentions = [cast(DecoderLayer, layer).encoder_attn for layer in self._model.decoder.layers]
        self._memory = [(form.heads(a.k_proj(states)), form.heads(a.v_proj(states))) for a in attentions]
        self._encoder_positions = self._model.encoder.positions(
            rows[0].grid, max(len(row.source) for row in rows)
        ).expand(len(states), -1, -1)
        self._prompt = [side.repeat_interleave(self._beams, 1) for side in form._prompt]
        self._hidden = form._prompt_padding.repeat_interleave(self._beams, 0)
        self._caches: list[Pair | None] = [None] * len(attentions)

    def step(self, tokens: Tensor, order: Tensor) -> Tensor:
        """Logits (R, V) behind all tokens so far (R, t), whose beams descend from rows `order` of the last step."""
        model, decoder = self._model, self._model.decoder
        t = tokens.shape[1]
        positions = decoder.pos_ln(decoder.embed_positions.weight[:t]).expand(len(tokens), -1, -1)
        own = self._scores(decoder.self_pos_q_linear(positions), decoder.self_pos_k_linear(positions))
        cross = self._scores(
            decoder.cross_pos_q_linear(positions), decoder.cross_pos_k_linear(self._encoder_positions)
        )[:, :, -1:]
        buckets = token_buckets(t, self._form._config.token_bucket_size, self._form._config.max_positions)
        x = decoder.layernorm_embedding(model.encoder.embed_tokens(tokens[:, -1:]))
        for index, module in enumerate(decoder.layers):
            layer = cast(DecoderLayer, module)
            relative = decoder.token_rel_pos_table_list[index](buckets).permute(2, 0, 1)
            bias = (own + relative)[:, :, -1:]
            y = self._self_attend(index, layer, layer.self_attn_layer_norm(x), bias, order)
            x = x + layer.self_attn_ln(y)
            x = x + layer.cross_attn_ln(self._cross_attend(index, layer, layer.encoder_attn_layer_norm(x), cross))
            x = x + feed_forward(layer, x)
        return F.linear(decoder.layer_norm(x[:, 0]), model.encoder.embed_tokens.weight)

    def _scores(self, q: Tensor, k: Tensor) -> Tensor:
        return (self._form.heads(q) * self._model.decoder.scale) @ self._form.heads(k).transpose(2, 3)

    def _self_attend(self, index: int, layer: DecoderLayer, x: Tensor, bias: Tensor, order: Tensor) -> Tensor:
        q, k, v = (self._form.heads(projection(x)) for projection in projections(layer.self_attn))
        cache = self._caches[index]
        if cache is not None:
            k = torch.cat([cache[0].index_select(0, order), k], dim=2)
            v = torch.cat([cache[1].index_select(0, order), v], dim=2)
        self._caches[index] = (k, v)
        prompt_key, prompt_value = (side[index] for side in self._prompt)
        scores = (q * self._model.decoder.scale) @ torch.cat([prompt_key, k], dim=2).transpose(2, 3)
        scores[..., prompt_key.shape[2] :] += bias
        scores[..., : prompt_key.shape[2]].masked_fill_(self._hidden[:, None, None], -torch.inf)
        return combine(layer.self_attn, scores, torch.cat([prompt_value, v], dim=2))

    def _cross_attend(self, index: int, layer: DecoderLayer, x: Tensor, bias: Tensor) -> Tensor:
        attention = layer.encoder_attn
        key, value = self._memory[index]
        q = self._form.heads(attention.q_proj(x)) * self._model.decoder.scale
        scores = (q @ key.transpose(2, 3) + bias).masked_fill(self._padding[:, None, None], -torch.inf)
        return combine(attention, scores, value)


def projections(attention: Attention) -> tuple[torch.nn.Module, ...]:
    return attention.q_proj, attention.k_proj, attention.v_proj


def combine(attention: Attention, scores: Tensor, value: Tensor) -> Tensor:
    out = F.softmax(scores, dim=-1, dtype=torch.float32).to(value.dtype) @ value
    projected: Tensor = attention.out_proj((out * attention.c_attn[:, None, None]).transpose(1, 2).flatten(2))
    return projected


def feed_forward(layer: Layer, x: Tensor) -> Tensor:
    out: Tensor = layer.fc2(layer.ffn_layernorm(F.gelu(layer.fc1(layer.final_layer_norm(x)))))
    return out
