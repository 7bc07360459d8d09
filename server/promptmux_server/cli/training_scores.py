"""What is under training, asked as the server would ask it: its score on held-out samples, and a prompt's canaries.

Lives here because training knows no engine, and the engine no training.
"""

from __future__ import annotations

import base64
import hashlib
import io
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from PIL import Image

from promptmux_prompts import Prompt, StoreError, write_prompt
from promptmux_prompts.header import MAX_HEADER_BYTES
from promptmux_server.backbone.images import DecodedImage
from promptmux_server.engine.offline import ask_all, engine_over
from promptmux_server.engine.options import EngineOptions
from promptmux_server.engine.rehearsal import record_canaries
from promptmux_server.engine.request import Answer, Request
from promptmux_server.errors import CheckpointNotWritten, NoBoxFound
from promptmux_server.tasks import Output
from promptmux_server.training.checkpoint import not_written
from promptmux_server.training.curve import write_durably
from promptmux_server.training.job import Job, Learned
from promptmux_server.training.metrics import Score, score_of
from promptmux_server.training.validation import Exam, OpenBackbone, Question
from promptmux_server.training.weights_delta import WeightsDelta, write_delta

WAITING = 64
"""Requests submitted before the first answer is awaited: so many pictures are in memory."""
DEADLINE_S = 3600.0
MOST_CANARIES = 3
CANARIES_TRIED = 16
"""Held-out inputs of which the surest become canaries."""
CANARY_SIDE = 48
"""Pixels: a PNG of noise has 7 KB then, and all canaries fit into a prompt file's header."""
LAID_DOWN = "What is to be scored cannot be laid down in the folder of temporary files"
OTHER_HEADER_BYTES = 4096
"""Of the header, what is not manifest: names, shapes and offsets of tensors."""


def score_served(backbone: OpenBackbone, prompt: Prompt, exam: Exam) -> Score:
    """Answers by an engine over this prompt alone; each shares no product with another, so load changes nothing."""
    manifest, fingerprint = prompt.manifest, backbone.loaded.fingerprint
    options = EngineOptions(queue_size=2 * WAITING)
    with _temporary_folder() as folder:
        (folder / f"{manifest.name}.safetensors").write_bytes(write_prompt(prompt))
        with engine_over(folder, backbone.model, backbone.tokenizer, fingerprint, options) as engine:
            asked = (_request(manifest.name, question) for question in exam.questions)
            outputs = [_output(answer) for answer in ask_all(engine, asked, waiting=WAITING)]
    return score_of(exam.metric, outputs, [question.sample for question in exam.questions], manifest.labels)


@contextmanager
def _temporary_folder() -> Iterator[Path]:
    """Raises CheckpointNotWritten where it, or what an engine keeps for itself, cannot be written."""
    try:
        with TemporaryDirectory(prefix="promptmux-") as folder:
            yield Path(folder)
    except OSError as error:
        raise not_written(LAID_DOWN, error) from error
    except StoreError as error:
        raise CheckpointNotWritten(f"{LAID_DOWN}: {error}") from error


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


def _output(future: Future[Answer]) -> Output | None:
    """None: the model wrote something that is no answer."""
    try:
        return future.result().output  # type: ignore[return-value]  # the engine knows no kinds of output
    except NoBoxFound:
        return None


def with_canaries(backbone: OpenBackbone, prompt: Prompt, questions: Sequence[Question]) -> Prompt:
    """The prompt with a few held-out inputs and what it writes for them, so that servers can rehearse it."""
    inputs = [_canary_input(question) for question in questions[:CANARIES_TRIED]]
    for most in range(min(MOST_CANARIES, len(inputs)), 0, -1):
        told = record_canaries(backbone.model, backbone.tokenizer, prompt, inputs, most)
        if len(told.manifest.to_json().encode()) <= MAX_HEADER_BYTES - OTHER_HEADER_BYTES:
            return told
    return prompt


@dataclass(frozen=True)
class Kept:
    """What a job at its end has learned, and the file that holds it."""

    path: Path
    learned: Learned
    sha256: str
    """Of a prompt's content, by which it is served, or of the file of trained weights."""

    def told(self) -> dict[str, Any]:
        """The same for programs."""
        manifest = self.learned.manifest
        said = {key: manifest.provenance[key] for key in ("method", "trainable")}
        step = manifest.provenance["chosen_step"]
        return {"file": str(self.path), "sha256": self.sha256, "metric": manifest.metric, "step": step, **said}


def keep_learned(job: Job, folder: Path | None = None, **origin: Any) -> Kept:
    """Write a prompt file, or a file of trained weights that says its method in its name.

    `folder` None: the job's own. `origin` joins the provenance.
    """
    learned, name, folder = job.learned(**origin), job.config.task.name, folder or job.config.output
    if isinstance(learned, WeightsDelta):
        path, data = folder / f"{name}.{learned.method}.safetensors", write_delta(learned)
        sha256 = hashlib.sha256(data).hexdigest()
    else:
        learned = with_canaries(job.backbone, learned, job.exam.questions)
        path, data, sha256 = folder / f"{name}.safetensors", write_prompt(learned), learned.digest
    write_durably(path, data)
    return Kept(path, learned, sha256)


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
