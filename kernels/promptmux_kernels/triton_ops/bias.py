"""How a kernel finds the bias of a row: one line of addresses and strides per row of the batch.

Rows of one batch use different tables (image grids, text only), so a table is reached through its address, as a number
that the kernel turns into a pointer. Addresses, not contents, key the cached lines: they stay true for as long as the
tensors live, which the caller sees to. Knows nothing of how a bias is used.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from promptmux_kernels.rows import BiasFactors, SharedBias
from promptmux_kernels.triton_ops import launch, plan

VECTOR_BYTES = 16
"""What one thread loads at once."""

FIELDS = {"dense": 3, "factors": 7}
"""Numbers per line, as the kernels count them."""


@dataclass(frozen=True)
class BiasPart:
    """The rows of a batch whose tables one launch can read: one kind, one element type.

    `fields` has a line for every row of the batch, those of other parts zero. Dense lines hold (address, head stride,
    row stride); factor lines hold the addresses of (query, key, query code, key code, relative), then the tokens and
    the relative size. `aligned` says that every line of a dense table starts at a multiple of 16 bytes.
    """

    kind: Literal["dense", "factors"]
    element: torch.dtype
    rows: tuple[int, ...]
    fields: Tensor
    aligned: bool


def pack_bias(table: Tensor, dtype: torch.dtype) -> Tensor:
    """`dispatch.pack_bias` on a GPU: every line starts at a multiple of 16 bytes; float16 beside 16-bit heads.

    Against float32, float16 halves the bytes and leaves a bfloat16 attention's error as it is; bfloat16 would add half.
    """
    element = torch.float32 if dtype == torch.float32 else torch.float16
    vector = VECTOR_BYTES // element.itemsize
    heads, queries, keys = table.shape
    padded = torch.zeros(heads, queries, -(-keys // vector) * vector, dtype=element, device=table.device)
    padded[..., :keys] = table
    return padded[..., :keys]


def parts(bias: SharedBias, device: torch.device) -> list[BiasPart]:
    """Usually one part: mixing kinds costs one launch each."""
    lines = [_line(table) for table in bias.tables]
    kinds = [_kind(table) for table in bias.tables]
    found = []
    for kind in sorted({kinds[table] for table in bias.table_of_row}, key=str):
        blank = (0,) * FIELDS[kind[0]]
        own = [kinds[table] == kind for table in bias.table_of_row]
        per_row = tuple(lines[t] if mine else blank for t, mine in zip(bias.table_of_row, own, strict=True))
        found.append(
            BiasPart(
                kind=kind[0],
                element=kind[1],
                rows=tuple(row for row, mine in enumerate(own) if mine),
                fields=plan.fields(per_row, device),
                aligned=kind[0] == "dense" and all(_is_aligned(line, kind[1]) for line in per_row),
            )
        )
    return found


def _kind(table: Tensor | BiasFactors) -> tuple[Literal["dense", "factors"], torch.dtype]:
    if isinstance(table, BiasFactors):
        return "factors", table.relative.dtype
    return "dense", table.dtype


def _line(table: Tensor | BiasFactors) -> tuple[int, ...]:
    if isinstance(table, BiasFactors):
        tensors = (table.query, table.key, table.query_code, table.key_code, table.relative)
        assert all(tensor.is_contiguous() for tensor in tensors), "factors are laid out contiguously"
        assert all(tensor.data_ptr() % VECTOR_BYTES == 0 for tensor in tensors), "factors are read by whole vectors"
        assert table.query.dtype == table.key.dtype == table.relative.dtype, "factors are of one type"
        return (*(tensor.data_ptr() for tensor in tensors), table.query.shape[1], table.relative.shape[1])
    assert launch.lies_along_lines(table), "a bias table's keys lie next to one another"
    return table.data_ptr(), table.stride(0), table.stride(1)


def _is_aligned(line: tuple[int, ...], element: torch.dtype) -> bool:
    address, *strides = line
    return address % VECTOR_BYTES == 0 and all(stride * element.itemsize % VECTOR_BYTES == 0 for stride in strides)
