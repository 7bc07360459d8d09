"""The nouns that cross the engine's door, and the door itself as a Protocol.

Owns what a request, an answer and a task's status are. Knows nothing of HTTP, tensors or scheduling, so that
the API and its tests need no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    from promptmux_server.backbone.images import DecodedImage
    from promptmux_server.engine.publications import PromptsPort


Priority = Literal["interactive", "batch"]
"""Somebody waits for an interactive answer; batch work (evaluation jobs) takes what is left."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """One item of work, as the API admits it."""

    request_id: str
    """Of the HTTP call; the items of one call share it."""
    task: str
    deadline: float
    """`time.monotonic()` seconds; no work starts after it."""
    text: str | None = None
    premise: str | None = None
    image: DecodedImage | None = None
    decoding: Mapping[str, object] | None = None
    """Overrides of the prompt's own decoding parameters; the engine validates them at submit."""
    key: str = ""
    """Name of the API key that asks; "" where the server has none. Its share of the device is counted by it."""
    priority: Priority = "interactive"
    deterministic: bool = False
    """Share no product with another request: the same numbers to the last bit, whatever the load (evaluations)."""
    on_text: Callable[[str], None] | None = None
    """Called on the engine's thread with each new piece of a text that grows token by token (greedy and sampling); it
    must return at once. The pieces together are the answer's text. A beam search calls it never."""


@dataclass(frozen=True)
class PromptRef:
    """The immutable prompt version that a request was resolved to at admission."""

    name: str
    version: int
    sha256: str


class Output(Protocol):
    """A typed result: one of the frozen dataclasses of `tasks`, told apart by `kind`."""

    @property
    def kind(self) -> Literal["caption", "answer", "label", "box", "text"]:
        """Which of the output shapes this is."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What the engine returns for one request."""

    task: str
    output: Output
    score: float
    """Log-probability of the output, normalised as the decoding parameters say."""
    prompt: PromptRef
    timings_ms: Mapping[str, float] = field(default_factory=dict)
    """Milliseconds spent in: queue, vision, encode, decode, total."""


@dataclass(frozen=True)
class TaskInputs:
    """What a task answers with, and what it takes."""

    kind: str
    takes_text: bool
    takes_premise: bool
    takes_image: bool


@dataclass(frozen=True)
class TaskProblem:
    """Why a task is not served."""

    code: str
    message: str


@dataclass(frozen=True, kw_only=True)
class TaskStatus:
    """One task: served, or refused with its reason."""

    name: str
    state: Literal["ready", "refused"]
    kind: str | None = None
    version: int | None = None
    sha256: str | None = None
    encoder_length: int = 0
    decoder_length: int = 0
    encoder_layers: tuple[int, int] | None = None
    """The first of the layers that carry the prompt, and the one behind the last; None: all layers do."""
    decoder_layers: tuple[int, int] | None = None
    bytes: int = 0
    takes_text: bool = False
    takes_premise: bool = False
    takes_image: bool = False
    metric: Mapping[str, object] | None = None
    provenance: Mapping[str, object] | None = None
    """Where the prompt came from, as its manifest tells it."""
    author: str | None = None
    """Who published the version: the name of a key, `seed` for a file of the prompt directory, `local`."""
    created: str | None = None
    """When, as RFC 3339 in UTC."""
    hits: int = 0
    """Requests admitted since the name was first served by this process."""
    tier: Literal["device", "host", "disk"] = "disk"
    """The fastest memory that holds the prompt now."""
    pinned: bool = False
    """Kept on the device, whoever else wants room there."""
    last_used_s: float | None = None
    """Seconds since the last request; None = never used."""
    error: TaskProblem | None = None
    """Set when, and only when, the state is "refused"."""


@dataclass(frozen=True, kw_only=True)
class ReloadReport:
    """What has changed since the last look at the prompt directory and the registry, by task name."""

    added: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    unchanged: tuple[str, ...] = ()
    refused: Mapping[str, TaskProblem] = field(default_factory=dict)


@dataclass(frozen=True)
class ImageCacheStats:
    """What the image cache holds now, and how often a picture was found there at admission."""

    bytes: int = 0
    pictures: int = 0
    hits: int = 0
    misses: int = 0


@dataclass(frozen=True, kw_only=True)
class PromptPoolStats:
    """Where prompts are now, and how they have moved since the start."""

    device_bytes: int = 0
    """Of the pages handed out."""
    device_budget_bytes: int = 0
    host_bytes: int = 0
    host_budget_bytes: int = 0
    resident: int = 0
    """Prompts that have pages on the device."""
    waiting: int = 0
    """Requests whose prompt is not on the device yet."""
    loads: int = 0
    """Prompts brought to the device."""
    evictions: int = 0
    """Prompts that left the device to make room."""
    wait_s: float = 0.0
    """Seconds that requests have waited for their prompts, all together."""


@dataclass(frozen=True)
class MemoryStats:
    """Decoding memory handed out and there: slots of decoded tokens, places of encoder tokens."""

    slots_used: int = 0
    slots: int = 0
    places_used: int = 0
    places: int = 0


@dataclass(frozen=True)
class Budget:
    """One of the engine's memories, in bytes."""

    used_bytes: int
    budget_bytes: int


@dataclass(frozen=True)
class RegistryStats:
    """How many names there are, and what became of bad ones."""

    names: int = 0
    """That are served."""
    quarantined: int = 0
    """That are known and not served."""
    rolled_back: int = 0
    """Versions taken back because their numbers were not finite, since the start."""


@dataclass(frozen=True)
class EngineLoad:
    """How busy the engine is at this moment, and how full its memories."""

    waiting: int
    running: int
    images: ImageCacheStats
    memory: MemoryStats = MemoryStats()
    budgets: Mapping[str, Budget] = field(default_factory=dict)
    """By memory: `decode_cache`, `cross_memory`, `image_cache`, `prompts_device`, `prompts_host`."""
    cost_errors: Mapping[str, float] = field(default_factory=dict)
    """By stage: how far off the cost model's predictions are, relative to what was measured."""
    prompts: PromptPoolStats = PromptPoolStats()
    registry: RegistryStats = RegistryStats()


class EnginePort(Protocol):
    """The engine as the API sees it. Every method may be called from any thread."""

    def submit(self, request: Request) -> Future[Answer]:
        """Queue one request; returns at once.

        Raises `Overloaded`, `Draining`, `BackendUnhealthy`, `PromptNotFound`, `PromptQuarantined` or
        `InvalidParameter`. Cancelling the future removes a queued request and drops a running one at the next
        step. The future fails with a `PromptmuxError` (`DeadlineExceeded`, `NonfiniteOutput`, ...).
        """

    @property
    def prompts(self) -> PromptsPort:
        """What changes the tasks."""

    def inputs(self, task: str) -> TaskInputs | None:
        """What a task takes; None for one that is not served. Returns at once."""

    def tasks(self, after: str = "", limit: int | None = None) -> list[TaskStatus]:
        """Tasks whose names come behind `after`, by name; may read files."""

    def task(self, name: str) -> TaskStatus | None:
        """One task; None for a name that there is not. May read a file."""

    def reload(self) -> ReloadReport:
        """Take up new files of the prompt directory, and what other processes have published.

        Admitted requests keep the version they were resolved to.
        """

    def ready(self) -> bool:
        """Backbone loaded and warm, and not stopping."""

    def live(self) -> bool:
        """The engine thread is alive and has made progress recently."""

    def failed(self) -> bool:
        """The device is lost: nothing but a new process helps."""

    def load(self) -> EngineLoad:
        """Requests waiting and running now."""

    def stop(self, drain_timeout_s: float) -> None:
        """Refuse new work, finish what is admitted within the given time, fail the rest with `Draining`."""
