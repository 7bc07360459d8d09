"""A loopback server that answers as it is told and keeps what it was asked: for tests of what speaks to one."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Scripted:
    """`answers` has a status and a document (or bytes, or None for no body) for each "METHOD /path"."""

    answers: dict[str, tuple[int, Any]] = field(default_factory=dict)
    asked: list[tuple[str, bytes, dict[str, str]]] = field(default_factory=list)
    """Call, body, headers in lower case."""
    address: str = ""

    @property
    def calls(self) -> list[str]:
        return [call for call, _, _ in self.asked]

    def refuse(self, call: str, status: int, code: str, **error: Any) -> None:
        self.answers[call] = (status, {"error": {"code": code, "message": "No.", **error}})


@contextmanager
def scripted_server() -> Iterator[Scripted]:
    script = Scripted()

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            call = f"{self.command} {self.path}"
            script.asked.append((call, body, {name.lower(): value for name, value in self.headers.items()}))
            missing = (404, {"error": {"code": "prompt_not_found", "message": "No such prompt."}})
            status, document = script.answers.get(call, missing)
            self.send_response(status)
            data, headers = document if isinstance(document, tuple) else (json.dumps(document).encode(), {})
            for name, value in {**headers, "Content-Length": str(0 if document is None else len(data))}.items():
                self.send_header(name, value)
            self.end_headers()
            if document is not None:
                self.wfile.write(data)

        do_GET = do_PUT = do_POST = do_DELETE = answer

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=lambda: server.serve_forever(poll_interval=0.01), daemon=True)
    thread.start()
    script.address = f"http://127.0.0.1:{server.server_port}"
    yield script
    server.shutdown()
    server.server_close()
    thread.join()
