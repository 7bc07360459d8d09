"""Prompts in host memory: copies of what lies on disk, least recently used out, bounded in bytes.

Owns the copies and their order. Which of them must stay is the caller's to say. Not safe to use from two threads at a
time: `prompt_tiers` holds its lock around every call.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from promptmux_prompts import Prompt


class HostCopies:
    """Prompts by digest, at most `budget_bytes` of tensors."""

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self.bytes = 0
        self._copies: OrderedDict[str, Prompt] = OrderedDict()

    def __contains__(self, digest: str) -> bool:
        return digest in self._copies

    def __len__(self) -> int:
        return len(self._copies)

    def get(self, digest: str) -> Prompt | None:
        """The copy, now the one used last."""
        found = self._copies.get(digest)
        if found is not None:
            self._copies.move_to_end(digest)
        return found

    def victims(self, size: int, may_drop: Callable[[str], bool]) -> list[str] | None:
        """The oldest copies that must go before `size` bytes fit, of those that may; None if those are too few."""
        need = size - (self.budget_bytes - self.bytes)
        found: list[str] = []
        for digest, copy in self._copies.items():
            if need <= 0:
                break
            if may_drop(digest):
                found.append(digest)
                need -= prompt_bytes(copy)
        return found if need <= 0 else None

    def put(self, prompt: Prompt, may_drop: Callable[[str], bool]) -> None:
        """Keep a prompt where there is room, or can be; else nothing changes."""
        if prompt.digest in self._copies:
            return
        doomed = self.victims(prompt_bytes(prompt), may_drop)
        if doomed is None:
            return
        for digest in doomed:
            self.drop(digest)
        self._copies[prompt.digest] = prompt
        self.bytes += prompt_bytes(prompt)

    def drop(self, digest: str) -> None:
        """Let a copy go, if there is one."""
        copy = self._copies.pop(digest, None)
        if copy is not None:
            self.bytes -= prompt_bytes(copy)


def prompt_bytes(prompt: Prompt) -> int:
    """Of its tensors, in the type they are served in."""
    tensors = (prompt.encoder_key, prompt.encoder_value, prompt.decoder_key, prompt.decoder_value)
    return sum(tensor.nbytes for tensor in tensors)


def own_copy(prompt: Prompt, pinned: bool) -> Prompt:
    """The prompt in memory of its own, which is not a view of the file it was read from; page-locked for a GPU."""

    def copy(tensor: Tensor) -> Tensor:
        return tensor.contiguous().pin_memory() if pinned and tensor.numel() else tensor.clone()

    return replace(
        prompt,
        encoder_key=copy(prompt.encoder_key),
        encoder_value=copy(prompt.encoder_value),
        decoder_key=copy(prompt.decoder_key),
        decoder_value=copy(prompt.decoder_value),
    )
