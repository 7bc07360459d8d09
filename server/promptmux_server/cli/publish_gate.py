"""A trained prompt is published only if it is better than the one that is served, on the same samples.

Both are scored here, by the same engine; what the served one's manifest says of itself is not asked.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from promptmux import Client, NotFound
from promptmux_prompts import Prompt, PromptFileError, PromptShape, read_prompt, write_prompt
from promptmux_server.cli.prompt_refusals import connected
from promptmux_server.cli.training_scores import score_served
from promptmux_server.training.job import Job, Learned
from promptmux_server.training.job_config import JobConfig

Measure = Callable[[Prompt], float]
"""The score of any prompt on the samples that the trained one was scored on."""


@dataclass(frozen=True)
class Verdict:
    """What became of a trained prompt, and why."""

    published: bool
    reason: str
    version: int | None = None
    """That it became."""
    served_score: float | None = None
    """None: nothing was served under the name, or nothing that could be compared."""

    def __str__(self) -> str:
        did = f"published as version {self.version}" if self.published else "not published, the file is kept"
        return f"{did}: {self.reason}"


def publish_if_better(
    client: Client, name: str, prompt: Prompt, data: bytes, measure: Measure, *, margin: float, shape: PromptShape
) -> Verdict:
    """Ask the server what it serves, compare, and publish against exactly that version; `data` is the prompt's file.

    Done again, it publishes nothing twice. Raises the client's PromptmuxError, and ValueError for what is no name.
    """
    score = _own_score(prompt)
    try:
        current = client.prompts.get(name)
    except NotFound:
        pushed = client.prompts.push(name, data, create_only=True)
        return Verdict(True, "nothing was served under this name", pushed.version)
    if current.sha256 == prompt.digest:
        return Verdict(True, f"version {current.version} is this prompt already", current.version)
    try:
        file = client.prompts.pull(name, current.version)
        served = read_prompt(file, shape=shape, fingerprint=prompt.manifest.fingerprint, dtype=torch.float32)
    except PromptFileError as error:
        return Verdict(False, f"version {current.version} cannot be compared with it: {error}")
    before = measure(served)
    against = f"it scores {score:.4f}, and version {current.version} scores {before:.4f}"
    if score <= before + margin:
        return Verdict(False, f"{against} (margin {margin:g})", served_score=before)
    pushed = client.prompts.push(name, data, if_version=current.version)
    return Verdict(True, against, pushed.version, before)


def gate_of(client: Client, job: Job, prompt: Prompt) -> Verdict:
    """The same for what a job has learned, under the name and by the margin of its configuration."""
    return publish_if_better(
        client,
        published_name(job.config),
        prompt,
        write_prompt(prompt),
        lambda other: score_served(job.backbone, other, job.exam).value,
        margin=job.config.publish.margin,
        shape=job.backbone.loaded.prompt_shape,
    )


def push_if_better(url: str, job: Job, learned: Learned) -> Verdict:
    """The same into a running server, where mistakes and refusals end the command with a message."""
    assert isinstance(learned, Prompt), "commands publish prompts alone"
    with connected(url, published_name(job.config)) as client:
        return gate_of(client, job, learned)


def published_name(config: JobConfig) -> str:
    return config.publish.name or config.task.name


def _own_score(prompt: Prompt) -> float:
    metric: Any = prompt.manifest.metric
    return float(metric["value"])
