"""From settings to a serving process: load the backbone, start the engine, run the application."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from pathlib import Path

import structlog
import torch

from promptmux_kernels import prepare
from promptmux_prompts import Store
from promptmux_server.api.app import build_app
from promptmux_server.api.keys import Keys
from promptmux_server.api.serving import serve
from promptmux_server.backbone.assemble import assemble, serving_dtype
from promptmux_server.backbone.weights import load_backbone
from promptmux_server.cli.machine import usable_cores
from promptmux_server.engine.engine import Engine
from promptmux_server.engine.options import EngineOptions
from promptmux_server.errors import BackboneNotFound
from promptmux_server.pocket import LIBRARY, WEIGHTS
from promptmux_server.settings import Settings

log = structlog.get_logger(__name__)


def run_server(settings: Settings) -> None:
    """Serve until a signal ends the process. Raises BackboneError, KeyFileError."""
    configure_logging()
    torch.set_num_threads(settings.threads or usable_cores())
    torch.set_num_interop_threads(1)
    keys = Keys.read(settings.api_keys) if settings.api_keys else None
    engine, name = build_engine(settings, keys.weights() if keys else {})
    report = engine.start()
    for task, problem in report.refused.items():
        log.warning("prompt refused", task=task, code=problem.code, reason=problem.message)
    log.info("serving", backbone=name, tasks=len(report.added), host=settings.host, port=settings.port)
    serve(build_app(engine, settings, name, keys), engine, settings)


def build_engine(settings: Settings, key_weights: Mapping[str, float]) -> tuple[Engine, str]:
    """The engine of these settings, not started, and its backbone's name."""
    seeds = prompt_directory(settings)
    device = ("cuda" if torch.cuda.is_available() else "cpu") if settings.device == "auto" else settings.device
    dtype = serving_dtype(device) if settings.dtype == "auto" else getattr(torch, settings.dtype)
    backbone = load_backbone(WEIGHTS if settings.backbone == "pocket" else Path(settings.backbone))
    config, tokenizer = backbone.config, backbone.tokenizer()
    ready = prepare(
        heads=config.heads,
        head_dim=config.head_dim,
        ffn_dim=config.ffn_dim,
        dtype=dtype,
        device=torch.device(device),
        tuned_in=settings.state / "kernels",
    )
    log.info("kernels ready", variants=ready)
    engine = Engine(
        assemble(backbone, dtype=dtype, device=device, packed=True),
        tokenizer,
        backbone.fingerprint,
        Store.open(settings.state / "registry", keep_versions=settings.kept_versions, max_names=settings.max_prompts),
        EngineOptions(
            max_batch=settings.max_batch,
            queue_size=settings.queue_size,
            queue_per_key=settings.queue_per_key,
            queue_per_task=settings.queue_per_task,
            key_weights=key_weights,
            image_cache_bytes=settings.image_cache_bytes,
            decode_cache_bytes=settings.decode_cache_bytes,
            cross_memory_bytes=settings.cross_memory_bytes,
            prompt_device_bytes=settings.prompt_device_bytes,
            prompt_host_bytes=settings.prompt_host_bytes,
            fall_back=settings.allow_quarantined_fallback,
            nonfinite_limit=settings.nonfinite_limit,
            deterministic=settings.deterministic,
            warm_up=True,
        ),
        seeds=seeds,
    )
    return engine, config.name


def prompt_directory(settings: Settings) -> Path:
    """The directory whose files are taken up: the one asked for, or that of the shipped prompts."""
    directory = LIBRARY if settings.prompts is None else settings.prompts
    if not directory.is_dir():
        raise BackboneNotFound(f"There is no prompt directory {directory}.")
    return directory


def configure_logging() -> None:
    """Lines for people on a terminal, JSON elsewhere, all on standard error."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    renderer = structlog.dev.ConsoleRenderer() if sys.stderr.isatty() else structlog.processors.JSONRenderer()
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso"),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
