"""How much of the machine the engine may use, and how."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

MIB = 1 << 20


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """See `settings.Settings`, whose fields of the same names say more."""

    max_batch: int = 32
    """Requests in the running batch."""
    queue_size: int = 256
    queue_per_key: int = 256
    queue_per_task: int = 256
    key_weights: Mapping[str, float] = field(default_factory=dict)
    """Parts of the device by key name, relative to each other; 1.0 for a key that is not named."""
    joining_ms: float = 250.0
    """About how long running requests wait at most, at each step, for others to be encoded."""
    image_cache_bytes: int = 0
    decode_cache_bytes: int = 512 * MIB
    cross_memory_bytes: int = 2048 * MIB
    prompt_device_bytes: int | None = None
    """None makes room for 64 prompts of 100 positions."""
    prompt_host_bytes: int = 256 * MIB
    fall_back: bool = True
    """At the start, serve the newest good version of a prompt whose current one is damaged."""
    nonfinite_limit: int = 3
    """Answers in a row that are not finite before a version is taken back; 0 = never."""
    deterministic: bool = False
    """Every request alone in its products: the same answer to the last bit whatever the load, and slower."""
    warm_up: bool = False
    """Answer a few made-up requests before the first real one; the server does."""
    stalled_after_s: float = 30.0
    """A step that takes longer means that the device hangs."""
