"""An order of n things that a seed decides, by position: nothing is held in memory, and any place is found at once.

A Feistel network is a permutation of 2^b numbers whatever its rounds compute; what lands beyond n goes through it again
until it does not. Python's and numpy's own shuffles hold all n, and may differ between versions.
"""

from __future__ import annotations

import hashlib

ROUNDS = 6
FEWEST_HALF_BITS = 3
_WORD = (1 << 64) - 1


class Shuffled:
    """A permutation of range(length), always the same for the same names."""

    def __init__(self, length: int, *names: int | str) -> None:
        self._length = length
        self._half_bits = max(FEWEST_HALF_BITS, -(-(length - 1).bit_length() // 2))
        self._mask = (1 << self._half_bits) - 1
        text = "/".join(str(name) for name in names)
        keys = hashlib.blake2b(text.encode(), digest_size=8 * ROUNDS).digest()
        self._keys = [int.from_bytes(keys[8 * i : 8 * i + 8], "big") for i in range(ROUNDS)]

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, position: int) -> int:
        if not 0 <= position < self._length:
            raise IndexError(position)
        value = self._once(position)
        while value >= self._length:
            value = self._once(value)
        return value

    def _once(self, value: int) -> int:
        left, right = value >> self._half_bits, value & self._mask
        for key in self._keys:
            left, right = right, left ^ (_mixed(right ^ key) & self._mask)
        return left << self._half_bits | right


def _mixed(value: int) -> int:
    """64 bits, each depending on all of the input's (the finaliser of splitmix64)."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _WORD
    return value ^ (value >> 31)
