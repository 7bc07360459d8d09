"""Copies between host memory and the device's pools, beside the work of the engine and never across it.

On a GPU they run on a stream of their own: what is zeroed waits for the engine's kernels that may still read it,
and the engine's stream waits for what is written before it reads. On a CPU they are plain copies.
"""

from __future__ import annotations

import threading

import torch

from promptmux_prompts import Prompt
from promptmux_server.engine.prompt_table import PromptPools, Residence


class PromptCopies:
    """Writes and zeroes pages of the pools; `upload` and `zero` belong to one thread, `before_use` to the engine's."""

    def __init__(self, pools: PromptPools) -> None:
        self._pools = pools
        device = pools.encoder.key.device
        self._device = device
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._reader: torch.cuda.Stream | None = None
        """The stream that last read prompts: the engine's."""
        self._lock = threading.Lock()
        if self._side is not None:
            self._side.wait_stream(torch.cuda.current_stream(device))  # the pools were zeroed there

    @property
    def pinned(self) -> bool:
        """Whether host copies should be page-locked."""
        return self._side is not None

    @torch.no_grad()
    def upload(self, home: Residence, prompt: Prompt) -> torch.cuda.Event | None:
        """Fill pages; the event is what a reader must wait for."""
        if self._side is None:
            self._pools.write(home, prompt)
            return None
        with torch.cuda.stream(self._side):
            self._pools.write(home, prompt)
            written: torch.cuda.Event = self._side.record_event()
            return written

    @torch.no_grad()
    def zero(self, home: Residence) -> None:
        """Zero pages that nobody holds any more."""
        if self._side is None:
            self._pools.zero(home)
            return
        with self._lock:
            reader = self._reader
        if reader is not None:
            self._side.wait_stream(reader)
        with torch.cuda.stream(self._side):
            self._pools.zero(home)

    def before_use(self, written: torch.cuda.Event | None) -> None:
        """Order the calling thread's stream behind an upload."""
        if self._side is None:
            return
        stream = torch.cuda.current_stream(self._device)
        with self._lock:
            self._reader = stream
        if written is not None:
            stream.wait_event(written)
