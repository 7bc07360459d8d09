"""The application: routes, their documentation, and the edge around them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import anyio
from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp

from promptmux_server import __version__
from promptmux_server.api.access import Access
from promptmux_server.api.answering import Answerer
from promptmux_server.api.conditions import LARGEST_PAGE, page
from promptmux_server.api.desk import Desk
from promptmux_server.api.documents import (
    PredictAnswer,
    Reload,
    Status,
    Task,
    TaskList,
    Version,
    answers,
    complete,
    streams,
    takes,
)
from promptmux_server.api.edge import Edge
from promptmux_server.api.errors import handle
from promptmux_server.api.fanout import Fanout
from promptmux_server.api.keys import Keys
from promptmux_server.api.lifecycle import Lifecycle
from promptmux_server.api.metrics import Metrics
from promptmux_server.api.predict import Predictor
from promptmux_server.api.prompts import Prompts, add_prompts
from promptmux_server.api.schemas import FanoutRequest, PredictItem, PredictRequest
from promptmux_server.api.trainings import Trainings, add_trainings
from promptmux_server.engine.request import EnginePort
from promptmux_server.errors import BackendUnhealthy, Draining, PromptmuxError, PromptNotFound
from promptmux_server.settings import Settings


@dataclass(frozen=True)
class Application:
    """The ASGI application with what the process around it needs."""

    asgi: ASGIApp
    metrics: Metrics
    lifecycle: Lifecycle


def build_app(engine: EnginePort, settings: Settings, backbone_name: str, keys: Keys | None = None) -> Application:
    """Wire the routes to an engine; no thread and no socket is opened here."""
    metrics, lifecycle = Metrics(engine), Lifecycle()
    app = FastAPI(
        title="promptmux",
        version=__version__,
        description="Many prompt-tuned tasks on one frozen backbone, in one batch.",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        exception_handlers={HTTPException: handle, PromptmuxError: handle, Exception: handle},
    )
    desk = Desk(Answerer(engine, settings, metrics), settings)
    predictor, fanning = Predictor(desk), Fanout(desk, engine)

    @app.post(
        "/v1/predict",
        summary="Answer items of any tasks in one batch",
        responses=streams(PredictAnswer),
        openapi_extra=takes(PredictRequest, PredictItem),
    )
    async def predict(request: Request) -> Response:
        return await predictor(request)

    @app.post(
        "/v1/fanout",
        summary="Ask many tasks about one picture and text",
        responses=streams(PredictAnswer),
        openapi_extra=takes(FanoutRequest),
    )
    async def fanout(request: Request) -> Response:
        return await fanning(request)

    desk_of_prompts = Prompts(engine.prompts, lifecycle, metrics)
    _add_tasks(app, engine, desk_of_prompts)
    add_prompts(app, desk_of_prompts)
    add_trainings(app, Trainings(settings, lifecycle))
    _add_health(app, engine, settings, lifecycle, backbone_name)
    complete(app)
    edge = Edge(app, settings, metrics, Access(app.routes, keys), engine.prompts.max_bytes)
    return Application(edge, metrics, lifecycle)


def _add_tasks(app: FastAPI, engine: EnginePort, desk: Prompts) -> None:
    @app.get("/v1/tasks", summary="Tasks, served or refused", responses=answers(TaskList))
    async def tasks(request: Request) -> JSONResponse:
        after, limit = page(request, default=LARGEST_PAGE)
        found = await desk.read(lambda: engine.tasks(after, limit + 1))
        body: dict[str, Any] = {
            "tasks": [asdict(status) for status in found[:limit]],
            "memory": {name: asdict(account) for name, account in engine.load().budgets.items()},
            "next": found[limit - 1].name if len(found) > limit else None,
        }
        return JSONResponse(body)

    @app.get("/v1/tasks/{name}", summary="One task", responses=answers(Task))
    async def task(name: str) -> JSONResponse:
        status = await desk.read(lambda: engine.task(name))
        if status is None:
            raise PromptNotFound("No such task. GET /v1/tasks lists those that are served.", param="name")
        return JSONResponse(asdict(status))

    @app.post("/v1/tasks:reload", summary="Read the prompt directory again", responses=answers(Reload))
    async def reload() -> JSONResponse:
        return JSONResponse(asdict(await anyio.to_thread.run_sync(engine.reload)))


def _add_health(app: FastAPI, engine: EnginePort, settings: Settings, lifecycle: Lifecycle, backbone_name: str) -> None:
    @app.get("/livez", summary="The process works", responses=answers(Status))
    async def livez() -> JSONResponse:
        if not engine.live():
            raise BackendUnhealthy("The engine has stopped.", retry_after_s=10)
        return JSONResponse({"status": "ok"})

    @app.get("/readyz", summary="Requests are welcome", responses=answers(Status))
    async def readyz() -> JSONResponse:
        if lifecycle.draining:
            raise Draining("The server is shutting down.", retry_after_s=5)
        if not engine.ready():
            raise BackendUnhealthy("The engine is not ready.", retry_after_s=5)
        return JSONResponse({"status": "ok"})

    app.get("/health", summary="The same as /readyz", responses=answers(Status))(readyz)

    @app.get("/version", summary="Versions of server and backbone", responses=answers(Version))
    async def version() -> JSONResponse:
        return JSONResponse({"version": __version__, "backbone": backbone_name})
