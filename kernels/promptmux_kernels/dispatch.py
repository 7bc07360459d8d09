"""The one door to the ops: their contract, and which form answers a call.

The form follows the tensors' device at each call (never at import) and can be overridden for tests by `use_form`: on a
GPU the Triton form, where triton is installed; on a CPU the compiled form, which hands on what it cannot do; where a
gradient is asked for, a form that has one.
Each docstring below is the op's formula; `reference` is that formula in code.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor

from promptmux_kernels import batched, cpu, reference
from promptmux_kernels.rows import PLAIN, Affine, CrossMemory, PagedPrompts, Rows, SharedBias

log = logging.getLogger(__name__)

Form = Literal["reference", "batched", "cpu", "triton"]

_FORMS: dict[Form, ModuleType] = {"reference": reference, "batched": batched, "cpu": cpu}
_LAZY_FORMS: dict[Form, str] = {"triton": "promptmux_kernels.triton_ops"}
COMPILED: tuple[Form, ...] = ("cpu", "triton")
"""Where a gradient is asked for, `batched` answers in their place, unless they have a backward for that op."""
_refused: set[Form] = set()
"""Forms that `prepare` found not to work on this machine."""
_override: ContextVar[Form | None] = ContextVar("promptmux_kernels_form", default=None)


@contextmanager
def use_form(form: Form) -> Iterator[None]:
    """Answer every call inside the block with this form, whatever the device."""
    token = _override.set(form)
    try:
        yield
    finally:
        _override.reset(token)


def _form(*inputs: Tensor, backward: tuple[Form, ...] = ()) -> ModuleType:
    """The form that answers a call of these inputs; `backward` names the compiled ones that differentiate the op."""
    form = _override.get() or _fastest(inputs[0].device)
    wanted = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    if form in COMPILED and wanted and form not in backward:
        form = "batched"
    if form in _LAZY_FORMS and form not in _FORMS:
        _FORMS[form] = import_module(_LAZY_FORMS[form])
    return _FORMS[form]


def _fastest(device: torch.device) -> Form:
    if device.type == "cuda":  # ROCm's devices are called so, too
        return "triton" if _has_triton() and "triton" not in _refused else "batched"
    return "cpu" if device.type == "cpu" else "batched"


def _pool(prompts: PagedPrompts | None) -> tuple[Tensor, ...]:
    return () if prompts is None else (prompts.key, prompts.value)


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


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
    """Self-attention of ragged rows, each behind its own prompt (OFA: ofa-spec 2.6, 4.3).

    For row r with tokens Q, K, V (n, D) of a head h, prompt PK, PV (P, D) and bias table B (n, n):

        S = [scale * Q PK^T, scale * Q K^T + B]
        out = head_scale[h] * softmax(S) [PV; V]
        lse = log(sum(exp(S)))

    Prompt keys carry no bias and are visible to every query; `causal` hides later own keys only.
    q, k, v are (T, H, D) of one dtype; out is (T, H, D) of that dtype, lse (T, H) float32; softmax runs in float32.
    """
    form = _form(q, k, v, *_pool(prompts), *bias.values, head_scale, backward=("cpu",))
    out: tuple[Tensor, Tensor] = form.prefix_attention(
        q, k, v, rows=rows, prompts=prompts, bias=bias, scale=scale, head_scale=head_scale, causal=causal
    )
    return out


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
    """One decoding step of self-attention: one query per beam, beams of a request forming a group.

    Group g is at step t = history_lengths[g]; beam b of it sees its prompt and the cache slots
    S = history[b, :t], its own new token last (the ancestor table: beams reorder by index, never by copy):

        out = head_scale[h] * softmax([scale * q PK^T, scale * q K^T + bias[h, t-1, :t]]) [PV; V]

    with K, V = cache_key[S], cache_value[S].

    q is (R, H, D), cache_* (slots, H, D), history (R, T_max) int64, bias (H, T, T); `prompts` has one row per group.
    """
    out: Tensor = _form(q, *_pool(prompts), cache_key, cache_value, bias, head_scale).prefix_decode_attention(
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
    """Cross-attention: all queries of group g (beams at a step, or tokens at prefill) read memory row g once.

        out = head_scale[h] * softmax(scale * q K^T + B[h, p, :]) V

    Query i of group g stands at decoder position p = first_positions[g] + i if `consecutive` (prefill), else at
    first_positions[g] (a step, where all beams stand at one position). Prompts never enter (ofa-spec 4.3).
    q is (R, H, D), bias tables (H, positions, n_k).
    """
    backward: tuple[Form, ...] = ("cpu",) if memory.layout == PLAIN else ()
    form = _form(q, memory.key, memory.value, *bias.values, head_scale, backward=backward)
    out: Tensor = form.cross_decode_attention(
        q,
        groups=groups,
        memory=memory,
        bias=bias,
        first_positions=first_positions,
        consecutive=consecutive,
        scale=scale,
        head_scale=head_scale,
    )
    return out


def pack_memory(key: Tensor, value: Tensor, rows: Rows) -> CrossMemory:
    """Lay cross-attention keys and values (T, H, D) out as this device reads them fastest; done once per request.

    While gradients are recorded they stay as they are: a query that depends on a prompt in training will ask for the
    form with a backward, which reads no other layout.
    """
    form = batched if torch.is_grad_enabled() and _override.get() is None else _form(key, value)
    out: CrossMemory = form.pack_memory(key, value, rows)
    return out


def pack_bias(table: Tensor, dtype: torch.dtype) -> Tensor:
    """Lay a bias table (H, Q, K) out as this device reads it fastest beside heads of `dtype`; done once per image grid.

    The result is float32 or float16 and holds the same values, to float16's precision.
    """
    out: Tensor = _form(table).pack_bias(table, dtype)
    return out


def write_cache(cache_key: Tensor, cache_value: Tensor, slots: Tensor, key: Tensor, value: Tensor) -> None:
    """cache_key[slots] = key, cache_value[slots] = value; slots (T,) int64 are distinct, key and value (T, H, D)."""
    _form(key, value).write_cache(cache_key, cache_value, slots, key, value)


def norm_add_norm(x: Tensor, y: Tensor, inner: Affine, outer: Affine, eps: float) -> tuple[Tensor, Tensor]:
    """Close one residual branch and open the next (ofa-spec 2.5): total = x + LN_inner(y); (total, LN_outer(total)).

    x and y are (T, d_model); LayerNorm in float32.
    """
    out: tuple[Tensor, Tensor] = _form(x, y, *inner, *outer).norm_add_norm(x, y, inner, outer, eps)
    return out


def gelu_norm(x: Tensor, affine: Affine, eps: float) -> Tensor:
    """LN(gelu(x)) over the feed-forward width (ofa-spec 2.5), exact (erf) GELU in float32; x is (T, ffn_dim)."""
    out: Tensor = _form(x, *affine, backward=("cpu",)).gelu_norm(x, affine, eps)
    return out


def prepare(
    *, heads: int, head_dim: int, ffn_dim: int, dtype: torch.dtype, device: torch.device, tuned_in: Path | None
) -> int:
    """Compile, and on a GPU tune, what a model of these widths will need; returns how many variants were made ready.

    To be called before the first request: what is compiled later holds up a batch for seconds. The tuner's record lies
    in `tuned_in`, which only its owner may write (else UnsafeDirectory, a PermissionError); None leaves tuning out.
    Where a device's form cannot be made ready, the log says why, and `batched` answers for as long as the process runs.
    """
    form = _fastest(device)
    if form == "cpu":
        return int(cpu.available(dtype))
    if form != "triton":
        return 0
    try:
        warm_up = import_module("promptmux_kernels.triton_ops.warm_up")
        ready: int = warm_up.warm_up(warm_up.Widths(heads, head_dim, ffn_dim, dtype, device), tuned_in)
    except (PermissionError, torch.AcceleratorError):  # the owner's to mend; a device that no form can use any more
        raise
    except Exception:  # a compiler, a linker or a driver that triton cannot work with, each with errors of its own
        log.exception("GPU kernels: they cannot be made ready here; plain PyTorch is used instead")
        _refused.add("triton")
        return 0
    return ready
