"""Every setting of the server, as one frozen value.

Owns names, defaults and bounds; derived values are properties. The command line builds it once, at the edge, from
`PROMPTMUX_*` variables and flags; nothing else reads the environment.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

ENV_PREFIX = "PROMPTMUX_"

CLIENT_VARIABLES = frozenset({"PROMPTMUX_URL", "PROMPTMUX_API_KEY"})
"""Read by the client; they may stand in the same environment."""

MIB = 1024 * 1024

Port = Annotated[int, Field(ge=0, le=65535)]
Count = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Settings(BaseSettings):
    """Frozen settings of one server process. Raises pydantic's ValidationError, which names the field."""

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, extra="forbid", frozen=True)

    host: str = "127.0.0.1"
    port: Port = 8000
    metrics_port: Port | None = 8001
    """`/metrics` is served here, on loopback only; None = nowhere."""
    api_keys: Path | None = None
    """File of lines `NAME SCOPE[,SCOPE] SHA256 [weight=NUMBER]`, scopes `infer`, `eval` and `admin`; without it every
    caller may do everything, on loopback only. A name of weight 2 gets twice the device time of one of weight 1 when
    both ask for more than there is."""

    backbone: str = "pocket"
    """`pocket`, or a directory in promptmux or transformers format."""
    prompts: Path | None = None
    """Directory of prompt files to take up; None = the shipped library. It is only read."""
    state: Path = Path("var/state")
    """Where the server keeps what it may change: published prompts in `registry`, jobs in `jobs.sqlite`."""
    training_root: Path | None = None
    """Folder that trainings asked for over HTTP may read and write, and nothing outside it; None = none are taken."""
    trainings_per_key: Count = 100
    """Trainings of one API key that wait; beyond it 429."""
    max_prompts: Count = 1000
    """Names in the registry; one more is refused."""
    kept_versions: Count = 10
    """Of each name; older ones are removed."""
    allow_quarantined_fallback: bool = True
    """At the start, a name whose version is damaged stands for the newest good one; False = it is not served."""
    nonfinite_limit: Annotated[int, Field(ge=0)] = 3
    """Answers in a row that are not finite before a version is rolled back; 0 = never."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    device: str = "auto"
    threads: Count | None = None
    """CPU threads of one operation; None = the cores that affinity and container allow."""

    max_batch: Count = 32
    queue_size: Count = 256
    """Items admitted at one time, whoever sent them; beyond it 503."""
    queue_per_key: Count = 64
    """Of them, items of one API key; beyond it 429. Without a key file nothing is counted by key."""
    queue_per_task: Count = 256
    """Of them, items waiting for one task within one key, or of all callers without a key file; beyond it 429."""
    image_cache_bytes: Annotated[int, Field(ge=0)] = 256 * MIB
    """Pictures that the vision stem has seen, kept for other requests about them; 0 keeps none."""
    decode_cache_bytes: Count = 512 * MIB
    """Keys and values of decoded tokens; a request takes the most it can need before it starts."""
    cross_memory_bytes: Count = 2048 * MIB
    """What the encoder said, as the decoder reads it: for OFA-base in float32 35 MB a picture of 480 pixels."""
    deterministic: bool = False
    """Answers that are the same to the last bit whatever the load; slower, see docs/log.md."""
    prompt_device_bytes: Annotated[int, Field(ge=0)] | None = None
    """Prompts on the device, whole pages of both sides; None = room for 64 prompts of 100 positions."""
    prompt_host_bytes: Annotated[int, Field(ge=0)] = 256 * MIB
    """Prompts in host memory (page-locked for a GPU), so that they need not be read from disk again."""
    default_deadline_ms: Count = 10_000
    max_deadline_ms: Count = 60_000

    max_header_bytes: Count = 16 * 1024
    max_body_bytes: Count = 16 * MIB
    max_items: Count = 64
    max_image_bytes: Count = 10_000_000
    max_image_pixels: Count = 16_777_216
    max_image_side: Count = 8192
    concurrent_decodes: Count = 2
    max_stream_pieces: Count = 512
    """Pieces of text that wait for a slow reader of a stream; one more ends the stream."""

    drain_delay_s: Seconds = 5.0
    """After SIGTERM: how long `/readyz` answers 503 while requests are still accepted."""
    drain_timeout_s: Seconds = 30.0
    """After that: how long admitted requests may take before they fail with `draining`."""

    @model_validator(mode="after")
    def _check_exposure(self) -> Self:
        if not self.is_loopback and self.api_keys is None:
            raise ValueError(
                f"refusing to listen on {self.host!r} without API keys: anyone who can reach it could use it. "
                "Name a key file in PROMPTMUX_API_KEYS, or listen on 127.0.0.1"
            )
        return self

    @model_validator(mode="after")
    def _check_deadlines(self) -> Self:
        if self.default_deadline_ms > self.max_deadline_ms:
            raise ValueError("default_deadline_ms is over max_deadline_ms")
        return self

    @model_validator(mode="after")
    def _check_training_root(self) -> Self:
        if self.training_root is not None and self.state.resolve().is_relative_to(self.training_root.resolve()):
            raise ValueError(
                "training_root holds the state directory: trainings could write into it. Name a folder of its own"
            )
        return self

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach the public port."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


def unknown_variables(names: Iterable[str]) -> list[str]:
    """Those of the environment variables `names` that carry our prefix and name no setting, sorted."""
    known = {ENV_PREFIX + field.upper() for field in Settings.model_fields} | CLIENT_VARIABLES
    return sorted(name for name in names if name.upper().startswith(ENV_PREFIX) and name.upper() not in known)
