"""Attention over ragged rows that each bring their own prompt. Knows tensors; nothing of tasks, requests or models."""

from promptmux_kernels.dispatch import (
    Form,
    cross_decode_attention,
    gelu_norm,
    norm_add_norm,
    pack_bias,
    pack_memory,
    prefix_attention,
    prefix_decode_attention,
    prepare,
    use_form,
    write_cache,
)
from promptmux_kernels.rows import (
    PAGE,
    Affine,
    BiasFactors,
    CrossMemory,
    PagedPrompts,
    PromptBatch,
    Rows,
    SharedBias,
    pack_prompts,
)

__all__ = [
    "PAGE",
    "Affine",
    "BiasFactors",
    "CrossMemory",
    "Form",
    "PagedPrompts",
    "PromptBatch",
    "Rows",
    "SharedBias",
    "cross_decode_attention",
    "gelu_norm",
    "norm_add_norm",
    "pack_bias",
    "pack_memory",
    "pack_prompts",
    "prefix_attention",
    "prefix_decode_attention",
    "prepare",
    "use_form",
    "write_cache",
]
