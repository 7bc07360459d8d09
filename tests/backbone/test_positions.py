"""Position buckets have the values of the released tables."""

from __future__ import annotations

import pytest

from promptmux_server.backbone.positions import image_buckets, image_position_ids, token_buckets

TOKEN = {0: 255, 1: 256, -1: 254, 127: 382, 128: 383, 129: 384, 130: 384, 150: 393, 200: 411, 256: 426, 512: 468}
TOKEN |= {1023: 510, -128: 127, -129: 126, -200: 99, -1023: 0}


@pytest.mark.parametrize(("distance", "bucket"), TOKEN.items())
def test_token_buckets(distance: int, bucket: int) -> None:
    table = token_buckets(1024, 256, 1024)
    query, key = max(distance, 0), max(-distance, 0)
    assert int(table[query, key]) == bucket


@pytest.mark.parametrize(("key", "bucket"), [((5, 7), 3444), ((5, 8), 3443), ((6, 7), 3361)])
def test_image_buckets(key: tuple[int, int], bucket: int) -> None:
    table = image_buckets((10, 12), 42)
    assert int(table[5 * 12 + 7, key[0] * 12 + key[1]]) == bucket


def test_image_position_ids_count_rows_of_the_largest_grid() -> None:
    assert image_position_ids((2, 3), 42).tolist() == [1, 2, 3, 43, 44, 45]
