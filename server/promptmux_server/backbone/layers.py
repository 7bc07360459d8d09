"""Transformer layers of OFA: pre-norm with the NormFormer extras, over flat token axes (ofa-spec 2.5, 2.6, 3).

A layer projects, normalises and adds; how attention reaches other tokens (ragged rows, caches, prompts) is a function
that the caller passes in. Tokens of all rows lie on one axis: (T, d_model).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from promptmux_kernels import gelu_norm, norm_add_norm
from promptmux_kernels.linear import PackedLinear
from promptmux_server.backbone.config import BackboneConfig
from promptmux_server.backbone.passes import Drops

SelfAttend = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(q, k, v, head_scale) -> attended values; q, k, v and the result are (T, H, D), head_scale is (H,)."""
CrossAttend = Callable[[Tensor, Tensor], Tensor]
"""(q, head_scale) -> values read from the encoder, (T, H, D)."""


class Attention(nn.Module):
    """The projections of one attention, with OFA's learned scale per head (`c_attn`)."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.q_proj: nn.Module = nn.Linear(config.d_model, config.d_model)
        self.k_proj: nn.Module = nn.Linear(config.d_model, config.d_model)
        self.v_proj: nn.Module = nn.Linear(config.d_model, config.d_model)
        self.out_proj: nn.Module = nn.Linear(config.d_model, config.d_model)
        self.c_attn = nn.Parameter(torch.ones(config.heads))

    def split(self, x: Tensor) -> Tensor:
        """(T, d_model) -> (T, H, D)."""
        return x.view(*x.shape[:-1], self.heads, -1)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of the same tokens."""
        return self.split(self.q_proj(x)), self.split(self.k_proj(x)), self.split(self.v_proj(x))

    def self_attend(self, x: Tensor, attend: SelfAttend) -> Tensor:
        out: Tensor = self.out_proj(attend(*self.project(x), self.c_attn).flatten(-2))
        return out

    def cross_attend(self, x: Tensor, attend: CrossAttend) -> Tensor:
        out: Tensor = self.out_proj(attend(self.split(self.q_proj(x)), self.c_attn).flatten(-2))
        return out


class Adapter(nn.Module):
    """Bottleneck adapter behind the feed-forward network: y + up(relu(down(y))) (ofa-spec 5.2)."""

    def __init__(self, config: BackboneConfig, width: int) -> None:
        super().__init__()
        self.down_proj = nn.Linear(config.d_model, width)
        self.up_proj = nn.Linear(width, config.d_model)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.up_proj(F.relu(self.down_proj(x)))
        return out


class Layer(nn.Module):
    """What encoder and decoder layers share: the feed-forward half, and how a branch is added."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.fc1: nn.Module = nn.Linear(config.d_model, config.ffn_dim)
        self.fc2: nn.Module = nn.Linear(config.ffn_dim, config.d_model)
        self.ffn_layernorm = nn.LayerNorm(config.ffn_dim)
        self.final_layer_norm = nn.LayerNorm(config.d_model)
        self.adapter: nn.Module = Adapter(config, config.adapter_dim) if config.adapter_dim else nn.Identity()

    def join(
        self, x: Tensor, y: Tensor, inner: nn.LayerNorm, outer: nn.LayerNorm, drops: Drops | None
    ) -> tuple[Tensor, Tensor]:
        """Add a branch's output y, normalised, to x; return the sum and the sum normalised for the next branch."""
        if drops is not None:
            x = x + drops.branches(drops.elements(inner(y)))
            return x, outer(x)
        return norm_add_norm(x, y, (inner.weight, inner.bias), (outer.weight, outer.bias), inner.eps)

    def feed_forward(self, x: Tensor, normed: Tensor, drops: Drops | None) -> Tensor:
        """x plus the feed-forward branch of the normalised x."""
        norm = self.ffn_layernorm
        y = gelu_norm(self.fc1(normed), (norm.weight, norm.bias), norm.eps)
        if isinstance(self.fc2, PackedLinear) and isinstance(self.adapter, nn.Identity):
            return self.fc2.add_to(x, y)
        if drops is not None:
            return x + drops.branches(self.adapter(drops.elements(self.fc2(y))))
        out: Tensor = x + self.adapter(self.fc2(y))
        return out


class EncoderLayer(Layer):
    """Self-attention (behind a prompt, where there is one) and feed-forward."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__(config)
        self.self_attn = Attention(config)
        self.self_attn_layer_norm = nn.LayerNorm(config.d_model)
        self.attn_ln = nn.LayerNorm(config.d_model)

    def forward(self, x: Tensor, attend: SelfAttend, drops: Drops | None) -> Tensor:
        y = self.self_attn.self_attend(self.self_attn_layer_norm(x), attend)
        x, normed = self.join(x, y, self.attn_ln, self.final_layer_norm, drops)
        return self.feed_forward(x, normed, drops)


class DecoderLayer(Layer):
    """Self-attention (behind a prompt), cross-attention to the encoder's output, feed-forward."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__(config)
        self.self_attn = Attention(config)
        self.self_attn_layer_norm = nn.LayerNorm(config.d_model)
        self.self_attn_ln = nn.LayerNorm(config.d_model)
        self.encoder_attn = Attention(config)
        self.encoder_attn_layer_norm = nn.LayerNorm(config.d_model)
        self.cross_attn_ln = nn.LayerNorm(config.d_model)

    def forward(self, x: Tensor, attend: SelfAttend, cross: CrossAttend, drops: Drops | None) -> Tensor:
        y = self.self_attn.self_attend(self.self_attn_layer_norm(x), attend)
        x, normed = self.join(x, y, self.self_attn_ln, self.encoder_attn_layer_norm, drops)
        y = self.encoder_attn.cross_attend(normed, cross)
        x, normed = self.join(x, y, self.cross_attn_ln, self.final_layer_norm, drops)
        return self.feed_forward(x, normed, drops)
