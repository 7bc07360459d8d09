"""A prompt under training, asked as the server would ask it: its score on held-out samples, and its canaries.

Lives here because training knows no engine, and the engine no training.
"""

from __future__ import annotations

import base64
import io
import time
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from PIL import Image

from promptmux_prompts import Prompt, write_prompt
from promptmux_prompts.header import MAX_HEADER_BYTES
from promptmux_server.backbone.images import DecodedImage
from promptmux_server.cli.publish_gate import Verdict, publish_if_better
from promptmux_server.engine.offline import engine_over
from promptmux_server.engine.options import EngineOptions
from promptmux_server.engine.rehearsal import record_canaries
from promptmux_server.engine.request import Answer, Request
from promptmux_server.errors import NoBoxFound
from promptmux_server.training.curve import write_durably
from promptmux_server.training.job import Job
from promptmux_server.training.job_parts import described
from promptmux_server.training.metrics import METRICS, Score, worth
from promptmux_server.training.validation import OpenBackbone, Question

WAITING = 64
"""Requests submitted before the first answer is awaited: so many pictures are in memory."""
DEADLINE_S = 3600.0
MOST_CANARIES = 3
CANARY_SIDE = 48
"""Pixels: a PNG of noise has 7 KB then, and all canaries fit into a prompt file's header."""
OTHER_HEADER_BYTES = 4096
"""Of the header, what is not manifest: names, shapes and offsets of tensors."""


def score_served(backbone: OpenBackbone, prompt: Prompt, questions: Sequence[Question]) -> Score:
    """Answers by an engine over this prompt alone; each shares no product with another, so load changes nothing."""
    manifest, fingerprint = prompt.manifest, backbone.loaded.fingerprint
    options = EngineOptions(queue_size=2 * WAITING)
    total = 0.0
    with TemporaryDirectory(prefix="promptmux-") as folder:
        Path(folder, f"{manifest.name}.safetensors").write_bytes(write_prompt(prompt))
        with engine_over(Path(folder), backbone.model, backbone.tokenizer, fingerprint, options) as engine:
            for start in range(0, len(questions), WAITING):
                asked = [(q, engine.submit(_request(manifest.name, q))) for q in questions[start : start + WAITING]]
                for question, future in asked:
                    total += _worth(prompt, question, future)
    return Score(METRICS[manifest.kind], total / len(questions), len(questions))


def _request(task: str, question: Question) -> Request:
    sample = question.sample
    return Request(
        request_id=str(question.place),
        task=task,
        text=sample.text,
        premise=sample.premise,
        image=question.image(),
        deadline=time.monotonic() + DEADLINE_S,
        deterministic=True,
    )


def _worth(prompt: Prompt, question: Question, future: Future[Answer]) -> float:
    manifest = prompt.manifest
    try:
        output = future.result().output
    except NoBoxFound:
        output = None
    return worth(manifest.kind, output, question.sample, manifest.labels)  # type: ignore[arg-type]


def with_canaries(backbone: OpenBackbone, prompt: Prompt, questions: Sequence[Question]) -> Prompt:
    """The prompt with a few held-out inputs and what it writes for them, so that servers can rehearse it."""
    inputs = [_canary_input(question) for question in questions[:MOST_CANARIES]]
    while inputs:
        told = record_canaries(backbone.model, backbone.tokenizer, prompt, inputs)
        if len(told.manifest.to_json().encode()) <= MAX_HEADER_BYTES - OTHER_HEADER_BYTES:
            return told
        inputs.pop()
    return prompt


def keep_prompt(job: Job, folder: Path | None = None, **origin: Any) -> tuple[Path, Prompt]:
    """Write the prompt file that a job at its end has learned, and say where; `origin` joins its provenance.

    `folder` None: the job's own.
    """
    learned = job.learned()
    told = described(learned, provenance={**learned.manifest.provenance, **origin})
    prompt = with_canaries(job.backbone, told, job.questions)
    path = (folder or job.config.output) / f"{prompt.manifest.name}.safetensors"
    write_durably(path, write_prompt(prompt))
    return path, prompt


def push_if_better(job: Job, prompt: Prompt, url: str) -> Verdict:
    """Publish what a job has learned into a running server, if it is better than what is served there."""
    return publish_if_better(
        url,
        job.config.publish.name or prompt.manifest.name,
        prompt,
        write_prompt(prompt),
        lambda other: score_served(job.backbone, other, job.questions).value,
        margin=job.config.publish.margin,
        shape=job.backbone.loaded.prompt_shape,
    )


def _canary_input(question: Question) -> dict[str, str]:
    sample, image = question.sample, question.image()
    given = {"text": sample.text, "premise": sample.premise, "image": None if image is None else _small_png(image)}
    return {name: value for name, value in given.items() if value is not None}


def _small_png(image: DecodedImage) -> str:
    picture = Image.fromarray(image.rgb)
    picture.thumbnail((CANARY_SIDE, CANARY_SIDE))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()
