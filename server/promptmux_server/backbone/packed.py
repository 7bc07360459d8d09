"""A frozen model's projections, packed for serving on a CPU: fused Q, K, V and weights in oneDNN's layout.

Swaps modules in place, after loading; what is computed stays the same formula. A packed model cannot be trained, saved
or moved. Costs one extra copy of the vocabulary (the embedding table stays for look-ups: 183 MB in float32 for
OFA-base) and, in float32, of the decoder's weights (198 MB), which steps of few rows read as they were.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from promptmux_kernels.linear import PackedLinear, Use, WideLinear
from promptmux_server.backbone.layers import Attention, DecoderLayer, EncoderLayer, Layer
from promptmux_server.backbone.model import OFA


def pack(model: OFA) -> None:
    """Replace the projections of all layers, and the tied vocabulary's, in place."""
    for module in model.encoder.layers:
        encoder_layer = cast(EncoderLayer, module)
        _pack_feed_forward(encoder_layer, "many rows")
        encoder_layer.self_attn = FusedAttention(encoder_layer.self_attn, "many rows")
    for module in model.decoder.layers:
        decoder_layer = cast(DecoderLayer, module)
        _pack_feed_forward(decoder_layer, "few rows")
        decoder_layer.self_attn = FusedAttention(decoder_layer.self_attn, "few rows")
        cross = decoder_layer.encoder_attn
        cross.q_proj = _packed(cross.q_proj, "few rows")
        cross.out_proj = _packed(cross.out_proj, "few rows")
        cross.k_proj = _packed(cross.k_proj, "many rows")
        cross.v_proj = _packed(cross.v_proj, "many rows")
    model.output_projection = WideLinear(model.encoder.embed_tokens.weight)


class FusedAttention(Attention):
    """Self-attention whose Q, K and V are one product: one pass over the input, one wide output."""

    def __init__(self, plain: Attention, use: Use) -> None:
        nn.Module.__init__(self)
        self.heads, self.c_attn = plain.heads, plain.c_attn
        parts = [cast(nn.Linear, part) for part in (plain.q_proj, plain.k_proj, plain.v_proj)]
        self.qkv_proj = PackedLinear(
            torch.cat([part.weight for part in parts]), torch.cat([part.bias for part in parts]), use
        )
        self.out_proj = _packed(plain.out_proj, use)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.qkv_proj(x).chunk(3, dim=-1)
        return self.split(q), self.split(k), self.split(v)


def _pack_feed_forward(layer: Layer, use: Use) -> None:
    layer.fc1 = _packed(layer.fc1, use)
    layer.fc2 = _packed(layer.fc2, use)


def _packed(linear: nn.Module, use: Use) -> PackedLinear:
    plain = cast(nn.Linear, linear)
    return PackedLinear(plain.weight, plain.bias, use)
