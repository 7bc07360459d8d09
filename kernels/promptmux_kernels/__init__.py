"""Attention over ragged rows that each bring their own prompt. Knows tensors; nothing of tasks, requests or models."""

from promptmux_kernels.dispatch import (
    Form,
    cross_decode_attention,
    prefix_attention,
    prefix_decode_attention,
    use_form,
)
from promptmux_kernels.rows import PAGE, PagedPrompts, PromptBatch, Rows, SharedBias, pack_prompts

__all__ = [
    "PAGE",
    "Form",
    "PagedPrompts",
    "PromptBatch",
    "Rows",
    "SharedBias",
    "cross_decode_attention",
    "pack_prompts",
    "prefix_attention",
    "prefix_decode_attention",
    "use_form",
]
