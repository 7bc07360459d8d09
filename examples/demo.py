"""`make demo`: start a server, answer real pictures of seven tasks in one batch, show the answers, stop the server.

Everything here is public: the command `promptmux serve`, and the client.
"""

from __future__ import annotations

import argparse
import json
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.table import Table

from promptmux import Answer, Client, Item

HERE = Path(__file__).parent
START_TIMEOUT_S = 120.0


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


@contextmanager
def server() -> Iterator[str]:
    """A server of the embedded backbone and the shipped prompts on a free loopback port; yields its address."""
    address = f"http://127.0.0.1:{(port := free_port())}"
    command = [sys.executable, "-m", "promptmux_server", "serve", "--port", str(port), "--metrics-port", "0"]
    with tempfile.TemporaryDirectory() as state, tempfile.TemporaryFile("w+") as log:
        environment = {"PROMPTMUX_STATE": state, "PROMPTMUX_DRAIN_DELAY_S": "0"}
        process = subprocess.Popen(["env", *(f"{k}={v}" for k, v in environment.items()), *command], stderr=log)
        try:
            _wait_until_ready(address, process, log.name)
            yield address
        finally:
            process.terminate()
            process.wait(60)


def _wait_until_ready(address: str, process: subprocess.Popen[bytes], log: object) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    with Client(address) as client:
        while not client.ready():
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"the server did not start (exit status {process.poll()}, log {log})")
            time.sleep(0.1)


def items() -> list[Item]:
    raw = json.loads((HERE / "items.json").read_text())
    return [Item(task=entry["task"], image=HERE / entry["image"], text=entry.get("text")) for entry in raw]


def show(asked: list[Item], answers: list[Answer], seconds: float) -> None:
    table = Table("picture", "task", "asked", "answer", "score", box=None, header_style="bold")
    for item, answer in zip(asked, answers, strict=True):
        said = str(answer.output) if answer.output else f"error: {answer.error.message if answer.error else ''}"
        table.add_row(Path(str(item.image)).name, item.task, item.text or "", said, f"{answer.score:.2f}")
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table)
    tasks = len({item.task for item in asked})
    console.print(f"{len(answers)} answers of {tasks} tasks from one POST /v1/predict in {seconds:.2f} s")


def main() -> int:
    argparse.ArgumentParser(description=__doc__).parse_args()
    asked = items()
    with server() as address, Client(address) as client:
        client.predict_many(asked)  # the first call builds the position tables
        started = time.monotonic()
        answers = client.predict_many(asked)
        show(asked, answers, time.monotonic() - started)
    return int(any(answer.error for answer in answers))


if __name__ == "__main__":
    sys.exit(main())
