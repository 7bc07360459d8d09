"""HTTP/1.1 below the application: what is no HTTP at all is refused in the one error shape too.

uvicorn answers such bytes in plain text, before any application sees them. Knows nothing of routes.
"""

from __future__ import annotations

import uuid

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from promptmux_server.api.errors import error_response
from promptmux_server.errors import BadRequest


class JsonHttpProtocol(HttpToolsProtocol):
    """uvicorn's protocol, with our answer to bytes that cannot be parsed."""

    def send_400_response(self, msg: str) -> None:
        request_id = uuid.uuid4().hex
        response = error_response(BadRequest("This is not a valid HTTP request."), request_id)
        lines = [b"HTTP/1.1 400 Bad Request", b"connection: close", b"x-request-id: " + request_id.encode()]
        lines += [name + b": " + value for name, value in response.raw_headers]
        self.transport.write(b"\r\n".join([*lines, b"", bytes(response.body)]))
        self.transport.close()
