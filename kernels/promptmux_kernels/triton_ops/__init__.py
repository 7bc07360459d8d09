"""The ops as Triton kernels: one file per op, the formula on top, then the kernel, then what launches it.

Imported only when a call needs it: triton is optional, and TRITON_INTERPRET must be set before its first import.
Contracts: `dispatch`.
"""

from promptmux_kernels.triton_ops.bias import pack_bias
from promptmux_kernels.triton_ops.cross_decode_attention import cross_decode_attention
from promptmux_kernels.triton_ops.norms import gelu_norm, norm_add_norm
from promptmux_kernels.triton_ops.paging import gather_slots, pack_memory, write_cache
from promptmux_kernels.triton_ops.prefix_attention import prefix_attention
from promptmux_kernels.triton_ops.prefix_decode_attention import prefix_decode_attention

__all__ = [
    "cross_decode_attention",
    "gather_slots",
    "gelu_norm",
    "norm_add_norm",
    "pack_bias",
    "pack_memory",
    "prefix_attention",
    "prefix_decode_attention",
    "write_cache",
]
