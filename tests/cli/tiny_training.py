"""A training for the command line on the tiny backbone: a folder with its configuration, data, pictures and weights."""

from __future__ import annotations

from pathlib import Path

import tiny
from promptmux_server.backbone.weights import write_backbone
from training.job_worker import data

CONFIG = """\
backbone = "tiny"
output = "out"
task = {name = "counting", kind = "answer"}
prompt = {encoder_length = 4, decoder_length = 3}
steps = {steps = 6}
run = {rows = 3, validate_every = 3}
machine = {threads = 1}

[data]
heldout = 0.3
train = [{path = "data.jsonl"}]
"""


def prepare(folder: Path, config: str = CONFIG) -> Path:
    """Fill a folder; the configuration's path."""
    data(folder)
    write_backbone(folder / "tiny", tiny.backbone())
    tiny.tokenizer().save(folder / "tiny")
    (folder / "job.toml").write_text(config)
    return folder / "job.toml"
