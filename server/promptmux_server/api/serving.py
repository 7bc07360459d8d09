"""The process around the application: sockets, signals, and an orderly end.

SIGTERM: /readyz turns 503 while requests are still taken, then no more are accepted, then what runs is finished, then
the process exits 0; what runs longer than the drain timeout gets 503. A second signal ends it at once, and SIGINT,
which comes from a person, skips the wait. SIGHUP reads the prompt directory again. A device that is lost ends the
process with `EXIT_DEVICE_LOST`, so that whatever started it starts it again.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Iterator

import structlog
import uvicorn
from prometheus_client import start_http_server
from starlette.types import ASGIApp

from promptmux_prompts import StoreError
from promptmux_server.api.app import Application
from promptmux_server.api.protocol import JsonHttpProtocol
from promptmux_server.engine.request import EnginePort
from promptmux_server.settings import Settings

log = structlog.get_logger(__name__)

EXIT_DEVICE_LOST = 70
"""sysexits' EX_SOFTWARE: no setting and no request is to blame."""

WATCH_S = 0.5
LAST_ANSWERS_S = 2.0
"""From the loss of the device to the end of the process: what was in flight gets its 503."""


class _Server(uvicorn.Server):
    """uvicorn without its own signal handling: its handler would close the listener before /readyz can say so."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def server_config(asgi: ASGIApp, settings: Settings) -> uvicorn.Config:
    """uvicorn as this server uses it; tests that need a socket use the same."""
    return uvicorn.Config(
        asgi,
        host=settings.host,
        port=settings.port,
        http=JsonHttpProtocol,
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=60,
        timeout_graceful_shutdown=max(1, round(settings.drain_timeout_s)),
        lifespan="off",
    )


def serve(application: Application, engine: EnginePort, settings: Settings) -> None:
    """Run until a signal ends it; the engine is stopped before this returns. Raises SystemExit for a lost device."""
    server = _Server(server_config(application.asgi, settings))
    asyncio.run(_run(server, application, engine, settings))
    if engine.failed():
        raise SystemExit(EXIT_DEVICE_LOST)


async def _run(server: _Server, application: Application, engine: EnginePort, settings: Settings) -> None:
    loop = asyncio.get_running_loop()
    drains: list[asyncio.Task[None]] = []

    def end(delay_s: float) -> None:
        if drains:
            log.warning("second signal: exiting at once")
            server.should_exit = server.force_exit = True
            return
        drains.append(loop.create_task(_drain(server, application, delay_s)))

    loop.add_signal_handler(signal.SIGTERM, end, settings.drain_delay_s)
    loop.add_signal_handler(signal.SIGINT, end, 0.0)
    loop.add_signal_handler(signal.SIGHUP, lambda: loop.run_in_executor(None, _reload, engine))
    watch = loop.create_task(_watch(server, engine))
    if settings.metrics_port is not None:
        start_http_server(settings.metrics_port, "127.0.0.1", application.metrics.registry)
    try:
        await server.serve()
    finally:
        watch.cancel()
        # The drain is over: requests have ended, or were cancelled and must find the loop running to say so.
        if not server.force_exit:
            await asyncio.to_thread(engine.stop, 0.0)


def _reload(engine: EnginePort) -> None:
    try:
        report = engine.reload()
    except StoreError as error:
        log.error("prompts not reloaded", code=error.code, reason=str(error))
        return
    refused = {name: problem.code for name, problem in report.refused.items()}
    log.info("prompts reloaded", added=report.added, changed=report.changed, removed=report.removed, refused=refused)


async def _watch(server: _Server, engine: EnginePort) -> None:
    while not engine.failed():
        await asyncio.sleep(WATCH_S)
    log.error("the device is lost: exiting")
    await asyncio.sleep(LAST_ANSWERS_S)
    server.should_exit = True


async def _drain(server: _Server, application: Application, delay_s: float) -> None:
    application.lifecycle.draining = True
    log.info("draining", delay_s=delay_s)
    await asyncio.sleep(delay_s)
    server.should_exit = True
