"""What a worker does with a prompt whose job asks for it: publish it if it is better, and say what became of it.

Whatever goes wrong here, the training has succeeded and its file is kept.
"""

from __future__ import annotations

import logging
from dataclasses import asdict
from typing import Any

from promptmux import Client, PromptmuxError
from promptmux_prompts import Prompt
from promptmux_server.cli.prompt_refusals import told
from promptmux_server.cli.publish_gate import Verdict, gate_of, published_name
from promptmux_server.training.job import Job

KEPT = "The file is kept: `promptmux prompts push` publishes it."

log = logging.getLogger(__name__)


def publish(job: Job, prompt: Prompt, url: str | None) -> dict[str, Any]:
    """The verdict as a job's result tells it; None as `url` is a worker that publishes nothing."""
    name = published_name(job.config)
    if url is None:
        verdict = Verdict(False, f"This worker publishes nothing; `promptmux worker --push` does. {KEPT}")
    else:
        with Client(url) as client:
            verdict = _asked(client, name, job, prompt)
    return {"name": name, **asdict(verdict)}


def _asked(client: Client, name: str, job: Job, prompt: Prompt) -> Verdict:
    try:
        return gate_of(client, job, prompt)
    except (PromptmuxError, ValueError) as error:
        return Verdict(False, f"{told(error, client, name)} {KEPT}")
    except Exception:  # of the comparison: hours of training are not given up for it
        log.exception("what is served as %s could not be scored", name)
        return Verdict(False, f"What is served could not be scored; the worker's log says why. {KEPT}")
