"""Where tokens stand: relative-position buckets and the biases that follow from an image grid alone.

In OFA neither position ids nor biases depend on the request, only on (image grid, text length): they are computed
once per grid and shared by every row (ofa-spec 2.3, 2.4, 3). Knows nothing of attention itself.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from functools import lru_cache
from typing import Generic, TypeVar

import torch
from torch import Tensor

Grid = tuple[int, int]
"""Patch rows and columns of an image; (0, 0) is a row without image."""

NO_IMAGE: Grid = (0, 0)


@lru_cache(maxsize=8)
def token_buckets(length: int, bucket_size: int, max_positions: int) -> Tensor:
    """Bucket of each (query, key) text distance, (length, length) int64 (ofa-spec 2.4).

    Distances up to half of `bucket_size` have a bucket each; further ones share logarithmically.
    """
    middle = bucket_size // 2
    distance = torch.arange(length)[:, None] - torch.arange(length)[None, :]
    far = torch.ceil(
        torch.log(distance.abs().clamp(min=1) / middle) / math.log((max_positions - 1) / middle) * (middle - 1)
    )
    bucket = torch.where(distance.abs() <= middle, distance, distance.sign() * (far.long() + middle))
    return bucket + bucket_size - 1


@lru_cache(maxsize=8)
def image_buckets(grid: Grid, bucket_size: int) -> Tensor:
    """Bucket of each (query, key) pair of patches, (N, N) int64, by row and column distance (ofa-spec 2.4)."""
    rows, columns = grid
    row = torch.arange(rows).repeat_interleave(columns)
    column = torch.arange(columns).repeat(rows)
    span = 2 * bucket_size - 1
    down = row[:, None] - row[None, :] + bucket_size - 1
    across = column[:, None] - column[None, :] + bucket_size - 1
    return down * span + across


APART = 1 << 20
"""Keeps the codes of image and text tokens so far apart that no sum of the two falls into a table."""


def relative_codes(grid: Grid, text_length: int, bucket_size: int) -> tuple[Tensor, Tensor]:
    """Codes of queries and keys, (N + text_length,) int32 each, whose sums index `relative_table`.

    A picture's pair of patches has its bucket (row * span + column is linear in the distance), a pair of text tokens
    the place of its distance behind all buckets, a mixed pair nothing.
    """
    rows, columns = grid
    span = 2 * bucket_size - 1
    patch = (torch.arange(rows)[:, None] * span + torch.arange(columns)[None, :]).flatten()
    text = torch.arange(text_length)
    query = torch.cat([patch + (bucket_size - 1) * (span + 1), text + span * span + text_length - 1 - APART])
    key = torch.cat([-patch, APART - text])
    return query.int(), key.int()


def relative_table(image: Tensor, text: Tensor, text_buckets: Tensor) -> Tensor:
    """One table (H, size) of the image block's buckets and the text block's distances -(T - 1) to T - 1.

    `image` is (buckets, H) without the entries of image generation, `text` (buckets, H), `text_buckets` (T, T).
    """
    by_distance = torch.cat([text_buckets[0, 1:].flip(0), text_buckets[:, 0]])
    return torch.cat([image, text[by_distance]]).T.contiguous()


def image_position_ids(grid: Grid, bucket_size: int) -> Tensor:
    """Position id of each patch, (N,) int64: row * bucket_size + column + 1 (id 0 is not an image patch)."""
    rows, columns = grid
    return (torch.arange(rows)[:, None] * bucket_size + torch.arange(columns)[None, :] + 1).flatten()


def text_capacity(length: int, limit: int) -> int:
    """Text positions a bias table is built for: the next multiple of 32, so that tables are few, at most `limit`."""
    assert length <= limit, "texts longer than the position table are refused at admission"
    return min(-(-length // 32) * 32, limit)


Key = TypeVar("Key")
Value = TypeVar("Value")


class BiasCache(Generic[Key, Value]):
    """The most recently used bias tables of a frozen model; a model under training bypasses it."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._entries: OrderedDict[Key, Value] = OrderedDict()

    def get(self, key: Key, device: torch.device, build: Callable[[], Value]) -> Value:
        """What stands under the key, or else is built on the device, in the model's own type whoever asks first."""
        if key not in self._entries:
            with torch.autocast(device.type, enabled=False):
                self._entries[key] = build()
            if len(self._entries) > self._capacity:
                self._entries.popitem(last=False)
        self._entries.move_to_end(key)
        return self._entries[key]

    def clear(self) -> None:
        self._entries.clear()
