"""Every route asks for its scope, and one that nobody thought of asks for more than anybody has."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from fastapi import FastAPI
from starlette.responses import JSONResponse

from api.fake_engine import FakeEngine
from api.live_server import live_server
from promptmux_server.api.access import RULES
from promptmux_server.api.app import build_app
from promptmux_server.api.keys import Keys
from promptmux_server.settings import Settings

METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE")
SCOPES = ("infer", "eval", "admin", "infer,eval,admin")


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    path = tmp_path_factory.mktemp("keys") / "keys"
    lines = [f"{scope.replace(',', '-')} {scope} {hashlib.sha256(scope.encode()).hexdigest()}" for scope in SCOPES]
    path.write_text("\n".join(lines))
    return Keys.read(path)


@pytest.fixture(scope="module")
def application(keys: Keys) -> Any:
    return build_app(FakeEngine(), Settings(), "fake", keys).asgi


@pytest.fixture(scope="module")
def client(application: Any) -> Iterator[httpx2.Client]:
    with live_server(application) as port, httpx2.Client(base_url=f"http://127.0.0.1:{port}") as connected:
        yield connected


def routes(app: FastAPI) -> set[tuple[str, str]]:
    """Method and template of everything that the application answers."""
    return {(method, route.path) for route in app.routes for method in route.methods}  # type: ignore[attr-defined]


def as_(scope: str) -> dict[str, str]:
    return {"authorization": f"Bearer {scope}"}


def concrete(template: str) -> str:
    return template.replace("{name}", "echo").replace("{version}", "1")


def test_every_route_has_a_rule_and_every_rule_a_route(application: Any) -> None:
    assert routes(application._app) == set(RULES)


def test_without_a_key_all_but_two_routes_are_closed_to_every_method(client: httpx2.Client) -> None:
    for template in {path for _, path in RULES}:
        for method in METHODS:
            rule = RULES.get((method, template))
            for headers in ({}, as_("wrong"), {"authorization": "Basic eDp5"}):
                status = client.request(method, concrete(template), headers=headers).status_code
                assert (status == 401) == (rule is None or rule.scope is not None), (method, template)


@pytest.mark.parametrize("scope", SCOPES)
def test_a_key_reaches_what_its_scopes_name_and_nothing_else(client: httpx2.Client, scope: str) -> None:
    for (method, template), rule in RULES.items():
        status = client.request(method, concrete(template), headers=as_(scope)).status_code
        allowed = rule.scope is None or rule.scope in scope.split(",")
        assert (status == 403) != allowed, (method, template)
        assert status != 401


def test_a_route_without_a_rule_is_closed_to_everybody(keys: Keys) -> None:
    """The control: one that was added and forgotten here, with keys and without."""
    for given in (keys, None):
        application: Any = build_app(FakeEngine(), Settings(), "fake", given).asgi

        @application._app.get("/v1/planted")
        async def planted() -> JSONResponse:
            return JSONResponse({})

        assert routes(application._app) != set(RULES)
        with live_server(application) as port, httpx2.Client(base_url=f"http://127.0.0.1:{port}") as client:
            response = client.get("/v1/planted", headers=as_("infer,eval,admin"))
            assert (response.status_code, response.json()["error"]["code"]) == (403, "forbidden")


@pytest.mark.parametrize(
    "path",
    [
        "//v1/prompts/x",
        "/v1//prompts/x",
        "/v1/prompts/x/",
        "/V1/prompts/x",
        "/v1/prompts/x/../../livez",
        "/livez/../v1/prompts/x",
    ],
)
def test_no_spelling_of_a_path_goes_around_its_rule(client: httpx2.Client, path: str) -> None:
    for method in ("PUT", "DELETE"):
        assert client.request(method, path).status_code == 401
        assert client.request(method, path, headers=as_("infer")).status_code in (403, 404, 405)


def test_a_file_is_not_read_before_its_key_is_known(client: httpx2.Client, tmp_path: Path) -> None:
    sent = 0

    def body() -> Iterator[bytes]:
        nonlocal sent
        for _ in range(200):
            sent += 1
            yield b"x" * (1 << 20)

    for headers, status in (({}, 401), (as_("infer"), 403)):
        sent = 0
        octets = {"content-type": "application/octet-stream", "x-content-sha256": "0" * 64, **headers}
        response = client.put("/v1/prompts/x", content=body(), headers=octets)
        assert response.status_code == status
        assert response.headers["connection"] == "close"
        assert sent < 50
