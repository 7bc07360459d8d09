"""A server that answers by a script, for tests of the client."""

from __future__ import annotations

from typing import Any

import httpx2

from promptmux import Client
from promptmux._retry import RetryPolicy

NO_WAIT = RetryPolicy(first_delay_s=0.0)


class Script:
    """A transport that answers with the given responses in turn and keeps what was sent."""

    def __init__(self, *responses: httpx2.Response | Exception) -> None:
        self.responses = list(responses)
        self.requests: list[httpx2.Request] = []

    def __call__(self, request: httpx2.Request) -> httpx2.Response:
        self.requests.append(request)
        answer = self.responses.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    @property
    def sent(self) -> list[str]:
        return [f"{request.method} {request.url.raw_path.decode()}" for request in self.requests]

    def client(self, **options: Any) -> Client:
        return Client("http://server", transport=httpx2.MockTransport(self), retry=NO_WAIT, **options)
