"""The process around the application: sockets, signals, and an orderly end.

SIGTERM: /readyz turns 503 while requests are still taken, then no more are accepted, then what runs is finished, then
the process exits 0. A second signal ends it at once. SIGHUP reads the prompt directory again.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Iterator

import structlog
import uvicorn
from prometheus_client import start_http_server

from promptmux_server.api.app import Application
from promptmux_server.engine.request import EnginePort
from promptmux_server.settings import Settings

log = structlog.get_logger(__name__)


class _Server(uvicorn.Server):
    """uvicorn without its own signal handling: its handler would close the listener before /readyz can say so."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def serve(application: Application, engine: EnginePort, settings: Settings) -> None:
    """Run until a signal ends it; the engine is stopped before this returns."""
    config = uvicorn.Config(
        application.asgi,
        host=settings.host,
        port=settings.port,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=60,
        timeout_graceful_shutdown=max(1, round(settings.drain_timeout_s)),
        lifespan="off",
    )
    asyncio.run(_run(_Server(config), application, engine, settings))


async def _run(server: _Server, application: Application, engine: EnginePort, settings: Settings) -> None:
    loop = asyncio.get_running_loop()
    drains: list[asyncio.Task[None]] = []

    def end() -> None:
        if drains:
            log.warning("second signal: exiting at once")
            server.should_exit = server.force_exit = True
            return
        drains.append(loop.create_task(_drain(server, application, settings)))

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, end)
    loop.add_signal_handler(signal.SIGHUP, lambda: loop.run_in_executor(None, _reload, engine))
    if settings.metrics_port is not None:
        start_http_server(settings.metrics_port, "127.0.0.1", application.metrics.registry)
    try:
        await server.serve()
    finally:
        engine.stop(0.0 if server.force_exit else settings.drain_timeout_s)


def _reload(engine: EnginePort) -> None:
    log.info("prompts reloaded", report=str(engine.reload()))


async def _drain(server: _Server, application: Application, settings: Settings) -> None:
    application.lifecycle.draining = True
    log.info("draining", delay_s=settings.drain_delay_s)
    await asyncio.sleep(settings.drain_delay_s)
    server.should_exit = True
