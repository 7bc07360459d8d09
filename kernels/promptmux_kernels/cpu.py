"""The compiled CPU form: hands each op to the C++ library, or to `batched` what the library cannot do.

Owns the choice per call (element types, head dims) and the packed layout of cross-attention memory. Attention has
gradients (`cpu_autograd`), and so has `gelu_norm`; the other ops have none.
Contracts: `dispatch`; the arithmetic: `native/*.h`.
"""

from __future__ import annotations

import logging
from functools import cache

import torch
from torch import Tensor

from promptmux_kernels import batched, reference
from promptmux_kernels.batched import norm_add_norm as norm_add_norm  # PyTorch's own is faster than a fused pass
from promptmux_kernels.cpu_autograd import (
    CrossAttention,
    SelfAttention,
    adjacent,
    dense_tables,
    packed_places,
    page_arguments,
)
from promptmux_kernels.gelu_autograd import GeluNorm
from promptmux_kernels.native import library_loaded
from promptmux_kernels.rows import FILL, PAGE, PLAIN, Affine, CrossMemory, PagedPrompts, Rows, SharedBias

log = logging.getLogger(__name__)

PACKED = "cpu"
"""Layout of a memory packed here: (places, H, D) whose row of n keys has n rounded up to `FILL` places, each head's
packed keys (native/pack.h) in one piece."""

TYPES = (torch.float32, torch.bfloat16)
HEAD_DIMS = range(16, 129, 16)
SELF_TEST_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
"""Absolute up to one, relative above: 100 float32 and 4 bfloat16 roundings. It tells a wrong kernel, not a rounding."""


@cache
def available(dtype: torch.dtype) -> bool:
    """Whether the compiled form serves this type here: the library loads and agrees with the reference."""
    if dtype not in TYPES or not library_loaded():
        return False
    try:
        error = max(_self_test(dtype), _gelu_self_test(dtype))
    except RuntimeError as problem:  # an instruction that the compiler has and oneDNN, say, has not
        log.warning("CPU kernels: %s is not supported here (%s); plain PyTorch is used instead", dtype, problem)
        return False
    if not error <= SELF_TEST_TOLERANCE[dtype]:
        log.error("CPU kernels: %s is off by %.1e in the self test; plain PyTorch is used instead", dtype, error)
        return False
    return True


def prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    rows: Rows,
    prompts: PagedPrompts | None,
    bias: SharedBias,
    scale: float,
    head_scale: Tensor,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    shown = prompts if prompts and any(prompts.lengths) else None
    attend = SelfAttention(rows, rows, shown, bias, (0,) * len(rows), causal, scale, head_scale)
    if not _can(q) or not attend.can_learn(q, k, v):
        return batched.prefix_attention(
            q, k, v, rows=rows, prompts=prompts, bias=bias, scale=scale, head_scale=head_scale, causal=causal
        )
    return attend(q, k, v)


def prefix_decode_attention(
    q: Tensor,
    *,
    groups: Rows,
    prompts: PagedPrompts | None,
    cache_key: Tensor,
    cache_value: Tensor,
    history: Tensor,
    history_lengths: tuple[int, ...],
    bias: Tensor,
    scale: float,
    head_scale: Tensor,
) -> Tensor:
    pools = (prompts.key, prompts.value) if prompts else ()
    same_type = all(x.dtype == q.dtype for x in (cache_key, cache_value, *pools))
    if not _can(q) or not same_type:
        return batched.prefix_decode_attention(
            q,
            groups=groups,
            prompts=prompts,
            cache_key=cache_key,
            cache_value=cache_value,
            history=history,
            history_lengths=history_lengths,
            bias=bias,
            scale=scale,
            head_scale=head_scale,
        )
    out: Tensor = torch.ops.promptmux_cpu.prefix_decode_attention(
        adjacent(q),
        groups.starts,
        groups.lengths,
        *page_arguments(prompts, len(groups), q),
        cache_key.contiguous(),
        cache_value.contiguous(),
        history.contiguous(),
        history_lengths,
        bias.float(),
        scale,
        head_scale.float(),
    )
    return out


def cross_decode_attention(
    q: Tensor,
    *,
    groups: Rows,
    memory: CrossMemory,
    bias: SharedBias,
    first_positions: tuple[int, ...],
    consecutive: bool,
    scale: float,
    head_scale: Tensor,
) -> Tensor:
    if memory.layout == PLAIN and consecutive and _can(q):
        attend = CrossAttention(groups, memory.rows, None, bias, first_positions, False, scale, head_scale)
        if attend.can_learn(q, memory.key, memory.value):
            return attend(q, memory.key, memory.value)[0]
    if memory.layout != PACKED:
        return batched.cross_decode_attention(
            q,
            groups=groups,
            memory=memory,
            bias=bias,
            first_positions=first_positions,
            consecutive=consecutive,
            scale=scale,
            head_scale=head_scale,
        )
    out: Tensor
    out, _ = torch.ops.promptmux_cpu.cross_attention(
        adjacent(q),
        groups.starts,
        groups.lengths,
        memory.key,
        memory.value,
        memory.rows.starts,
        memory.rows.lengths,
        dense_tables(bias),
        bias.table_of_row,
        first_positions,
        consecutive,
        scale,
        head_scale.float(),
    )
    return out


def pack_memory(key: Tensor, value: Tensor, rows: Rows) -> CrossMemory:
    if not _can(key):
        return batched.pack_memory(key, value, rows)
    places = packed_places(rows)
    keys, values = torch.ops.promptmux_cpu.pack_memory(
        adjacent(key), adjacent(value), rows.starts, rows.lengths, places.starts
    )
    return CrossMemory(keys, values, Rows(places.starts, rows.lengths), PACKED)


def pack_bias(table: Tensor, dtype: torch.dtype) -> Tensor:
    """Relative error of a bfloat16 layer's attention: 2.25e-3 with float16 tables, 3.55e-3 with bfloat16 ones, 2.22e-3
    with float32, which take twice the memory."""
    return table if dtype == torch.float32 else table.half()


def write_cache(cache_key: Tensor, cache_value: Tensor, slots: Tensor, key: Tensor, value: Tensor) -> None:
    same_type = cache_key.dtype == cache_value.dtype == key.dtype == value.dtype
    if not _can(key) or not same_type or not (cache_key.is_contiguous() and cache_value.is_contiguous()):
        batched.write_cache(cache_key, cache_value, slots, key, value)
        return
    torch.ops.promptmux_cpu.write_cache(cache_key, cache_value, slots, *(adjacent(x) for x in (key, value)))


def gelu_norm(x: Tensor, affine: Affine, eps: float) -> Tensor:
    learn = torch.is_grad_enabled() and any(part.requires_grad for part in affine)
    if learn or not _can_norm(x, *affine):
        return batched.gelu_norm(x, affine, eps)
    out: Tensor = GeluNorm.apply(x, affine, eps)  # type: ignore[no-untyped-call]
    return out


def can_stream(weight: Tensor) -> bool:
    """Whether `few_rows` serves this weight (N, K)."""
    return weight.dtype == torch.float32 and weight.shape[1] % FILL == 0 and available(weight.dtype)


def few_rows(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None = None) -> Tensor:
    """x W^T + bias + residual for x (M, K) and a contiguous W (N, K) for which `can_stream` holds."""
    rows = x if x.stride(1) == 1 else x.contiguous()
    more = residual.contiguous() if residual is not None else None
    out: Tensor = torch.ops.promptmux_cpu.few_rows(rows, weight, bias, more)
    return out


def can_widen(weight: Tensor) -> bool:
    """Whether `wide_product` serves this weight (N, K): where bfloat16 is multiplied as it is."""
    native = weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return native and weight.shape[1] % FILL == 0 and available(weight.dtype)


def pack_weight(weight: Tensor) -> Tensor:
    """W (N, K) as `wide_product` reads it."""
    packed: Tensor = torch.ops.promptmux_cpu.pack_weight(weight.contiguous())
    return packed


def wide_product(x: Tensor, packed: Tensor, neurons: int) -> Tensor:
    """x W^T (M, N) in float32 from x (M, K) and a packed W of N = `neurons` rows."""
    out: Tensor = torch.ops.promptmux_cpu.wide_product(x if x.stride(1) == 1 else x.contiguous(), packed, neurons)
    return out


def _can(x: Tensor) -> bool:
    """Whether the library serves tensors like x (T, H, D)."""
    return x.shape[2] in HEAD_DIMS and available(x.dtype)


def _can_norm(x: Tensor, *others: Tensor) -> bool:
    fits = x.ndim == 2 and x.shape[1] % FILL == 0 and all(o.dtype == x.dtype and o.stride(-1) == 1 for o in others)
    return fits and x.stride(-1) == 1 and available(x.dtype)


def _self_test(dtype: torch.dtype) -> float:
    """Largest difference from the reference, of outputs and gradients, on a small batch of ragged rows that share a
    page."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    rows, heads, dim = Rows.packed([5, 70]), 2, 32
    with torch.inference_mode(False), torch.enable_grad():
        learned = [normal(*(rows.total, heads, dim)).requires_grad_() for _ in range(3)]
        learned += [normal(2, heads, PAGE, dim).requires_grad_() for _ in range(2)]
        *qkv, key, value = learned
        prompts = PagedPrompts(key, value, torch.tensor([[0, 1], [1, 0]]), (40, 3))
        bias, ones = SharedBias((normal(heads, 70, 70).float(),), (0, 0)), torch.ones(heads)
        attend = SelfAttention(rows, rows, prompts, bias, (0, 0), False, dim**-0.5, ones)
        found, _ = attend(*qkv)
        expected, _ = reference.prefix_attention(
            *qkv, rows=rows, prompts=prompts, bias=bias, scale=dim**-0.5, head_scale=ones, causal=False
        )
        grad = normal(*found.shape)
        pairs = [(found, expected)]
        pairs += zip(*(torch.autograd.grad(out, learned, grad) for out in (found, expected)), strict=True)
        # A tensor's maximum keeps what is not a number, Python's may not.
        errors = [((a - b).abs() / b.abs().clamp(min=1)).max() for a, b in pairs]
        return float(torch.stack(errors).max().detach())


def _gelu_self_test(dtype: torch.dtype) -> float:
    """As `_self_test`, of `gelu_norm`'s gradient alone."""
    x, weight, grad = (
        torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
        for seed, shape in enumerate(((3, 48), (48,), (3, 48)))
    )
    with torch.inference_mode(False), torch.enable_grad():
        exact = x.float().clone().requires_grad_()
        out = reference.gelu_norm(exact, (weight.float(), torch.zeros(48)), 1e-5)
        (expected,) = torch.autograd.grad(out, exact, grad.float())
        out = GeluNorm.apply(x.requires_grad_(), (weight, torch.zeros_like(weight)), 1e-5)  # type: ignore[no-untyped-call]
        (found,) = torch.autograd.grad(out, x, grad)
    return float((found.float() - expected).abs().max())
