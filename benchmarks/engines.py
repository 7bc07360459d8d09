"""What the serving benchmarks share: an engine with many made-up tasks, requests of known length, a clock.

Prompts are random, so answers mean nothing; every answer has exactly as many tokens as its task says, so that two ways
of serving the same requests do the same arithmetic.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lines import write_line
from ofa_base_picture import placeholder_tokenizer
from promptmux_prompts import ImageInput, Manifest, Prompt, write_prompt
from promptmux_server.backbone.assemble import assemble, serving_dtype
from promptmux_server.backbone.images import DecodedImage, from_array
from promptmux_server.backbone.model import OFA
from promptmux_server.backbone.sizes import OFA_SIZES
from promptmux_server.backbone.tokenizer import Tokenizer
from promptmux_server.backbone.weights import LoadedBackbone, load_backbone
from promptmux_server.backbone.weights.random_init import random_backbone
from promptmux_server.cli.machine import restart_tuned
from promptmux_server.engine.engine import Engine
from promptmux_server.engine.offline import engine_over
from promptmux_server.engine.options import EngineOptions
from promptmux_server.engine.request import Answer, Request
from promptmux_server.pocket import WEIGHTS

PROMPT_LENGTH = 64
CAPTION_TOKENS, ANSWER_TOKENS = 16, 3
BEAMS = 5


@dataclass(frozen=True)
class Bench:
    """A backbone and a directory of tasks `t0`, `t1`, ...: even ones caption, odd ones answer a question."""

    name: str
    model: OFA
    tokenizer: Tokenizer
    fingerprint: str
    prompts: Path
    side: int

    @contextmanager
    def engine(self, **options: Any) -> Iterator[Engine]:
        """A started engine that keeps no pictures unless told to."""
        settings = EngineOptions(**{"queue_size": 4096, "queue_per_key": 4096, "queue_per_task": 4096, **options})
        with engine_over(self.prompts, self.model, self.tokenizer, self.fingerprint, settings) as engine:
            yield engine

    def picture(self, seed: int) -> DecodedImage:
        pixels = np.random.default_rng(seed).integers(0, 256, (self.side, self.side, 3), dtype=np.uint8)
        return from_array(pixels)

    def request(self, task: int, picture: DecodedImage | None, tokens: int | None = None) -> Request:
        """A request of a task; `tokens` overrides the length of its answer."""
        length = tokens or (ANSWER_TOKENS if task % 2 else CAPTION_TOKENS)
        return Request(
            request_id=f"t{task}",
            task=f"t{task}",
            text="what is in the picture" if self.name == "pocket" else "w10 w11 w12",
            image=picture,
            deadline=time.monotonic() + 3600,
            decoding={"min_length": length, "max_length": length},
        )


@contextmanager
def bench(name: str, tasks: int, prompt_length: int = PROMPT_LENGTH) -> Iterator[Bench]:
    """`pocket`, or an OFA size with random weights at 384 px."""
    if name == "pocket":
        backbone = load_backbone(WEIGHTS)
        tokenizer, side = backbone.tokenizer(), backbone.config.image_size
    else:
        config, side = OFA_SIZES[name.removeprefix("ofa-")], 384
        backbone = LoadedBackbone(config, random_backbone(config, seed=0, dtype=torch.float32))
        tokenizer = placeholder_tokenizer(config)
    dtype = serving_dtype("cpu")
    model = assemble(backbone, dtype=dtype, packed=True)
    with tempfile.TemporaryDirectory() as folder:
        for task in range(tasks):
            made = _prompt(backbone, f"t{task}", task, prompt_length, side)
            Path(folder, f"t{task}.safetensors").write_bytes(write_prompt(made))
        yield Bench(name, model, tokenizer, backbone.fingerprint, Path(folder), side)


def _prompt(backbone: LoadedBackbone, name: str, seed: int, length: int, side: int) -> Prompt:
    config = backbone.config
    generator = torch.Generator().manual_seed(seed)
    manifest = Manifest(
        name=name,
        kind="text",
        backbone_name=config.name,
        fingerprint=backbone.fingerprint,
        encoder_length=length,
        decoder_length=length,
        instruction=" {text}",
        image=ImageInput(side),
        decoding={"method": "beam", "beam_size": BEAMS},
    )
    layers = (config.encoder_layers, config.encoder_layers, config.decoder_layers, config.decoder_layers)
    sides = [torch.randn(n, config.heads, length, config.head_dim, generator=generator) * 0.02 for n in layers]
    return Prompt.build(manifest, *sides)


def answer_all(engine: Engine, requests: Sequence[Request]) -> list[Answer]:
    return [future.result() for future in [engine.submit(request) for request in requests]]


def side_by_side(ways: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each way, measured in turns so that what disturbs the machine disturbs all of them alike."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for way in ways.values():
        way()
    for _ in range(rounds):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def report(claim: str, backbone: str, *, dtype: torch.dtype | None = None, **numbers: object) -> None:
    """One line of JSON, with where it was measured; `dtype` if it was another than serving's."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False, cwd=Path(__file__).parent
    ).stdout.strip()
    where = {
        "cpu": platform.processor() or platform.machine(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "dtype": str(dtype or serving_dtype("cpu")).removeprefix("torch."),
        "load_1min": round(os.getloadavg()[0], 1),
        "commit": commit,
    }
    rounded = {key: round(value, 4) if isinstance(value, float) else value for key, value in numbers.items()}
    write_line({"claim": claim, "backbone": backbone, **rounded, **where})


def arguments(description: str | None, **defaults: int) -> argparse.Namespace:
    """`--backbone` and an integer option for each default; the process starts again with the allocator that serves."""
    restart_tuned()
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--backbone", choices=["pocket", *(f"ofa-{size}" for size in OFA_SIZES)], default="pocket")
    for name, value in defaults.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    return parser.parse_args()
