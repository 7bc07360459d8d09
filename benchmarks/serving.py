"""A real `promptmux serve` in a process of its own, for benchmarks of what happens over HTTP, and how large it is."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from promptmux import Client
from promptmux_server.cli.machine import ALLOCATOR_VARIABLE, RESTARTED_VARIABLE

START_TIMEOUT_S = 300.0


@dataclass(frozen=True)
class Served:
    """A server that is ready."""

    address: str
    pid: int
    start_s: float
    """From the start of the process until it welcomes requests."""

    @property
    def resident_mb(self) -> float:
        """Memory of the process that is in RAM now, in 10^6 bytes."""
        line = next(line for line in Path(f"/proc/{self.pid}/status").read_text().splitlines() if "VmRSS" in line)
        return int(line.split()[1]) * 1024 / 1e6


@contextmanager
def serving(state: Path, *, backbone: str = "pocket", **settings: object) -> Iterator[Served]:
    """Serve what `state` holds beside the shipped prompts; `settings` are those of `PROMPTMUX_*`."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    variables = {"state": state, "drain_delay_s": 0, **settings}
    environment = {f"PROMPTMUX_{name.upper()}": str(value) for name, value in variables.items()}
    command = ["-m", "promptmux_server", "serve", "--port", str(port), "--metrics-port", "0", "--backbone", backbone]
    started = time.perf_counter()
    with (state.parent / "serve.log").open("w+") as log:
        process = subprocess.Popen([sys.executable, *command], env={**_as_a_user_has_it(), **environment}, stderr=log)
        try:
            with Client(address := f"http://127.0.0.1:{port}") as client:
                while not client.ready():
                    if process.poll() is not None or time.perf_counter() > started + START_TIMEOUT_S:
                        log.seek(0)
                        raise SystemExit(f"the server did not start:\n{log.read()[-2000:]}")
                    time.sleep(0.02)
            yield Served(address, process.pid, time.perf_counter() - started)
        finally:
            process.terminate()
            process.wait(60)


def _as_a_user_has_it() -> dict[str, str]:
    """The environment without what a benchmark was started again with: the server starts itself again, which counts."""
    ours = (ALLOCATOR_VARIABLE, RESTARTED_VARIABLE) if RESTARTED_VARIABLE in os.environ else ()
    return {name: value for name, value in os.environ.items() if name not in ours}
