"""An engine over a directory of prompt files, for a program of its own: nothing of its registry outlives it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

from promptmux_prompts import Store
from promptmux_server.backbone.model import OFA
from promptmux_server.backbone.tokenizer import Tokenizer
from promptmux_server.engine.engine import Engine
from promptmux_server.engine.options import EngineOptions
from promptmux_server.engine.request import Answer, Request
from promptmux_server.errors import PromptRefused

MOST_PROMPTS = 100_000
STOP_S = 5.0


@contextmanager
def engine_over(
    prompts: Path, model: OFA, tokenizer: Tokenizer, fingerprint: str, options: EngineOptions | None = None
) -> Iterator[Engine]:
    """A started engine that serves every file of the directory.

    Raises PromptRefused for a file that it cannot serve, StoreError where its registry cannot be laid down.
    """
    with TemporaryDirectory(prefix="promptmux-") as folder:
        store = Store.open(Path(folder), max_names=MOST_PROMPTS)
        engine = Engine(model, tokenizer, fingerprint, store, options, seeds=prompts)
        try:
            for name, problem in engine.start().refused.items():
                raise PromptRefused(f"{name} cannot be served: {problem.message}")
            yield engine
        finally:
            engine.stop(STOP_S)


def ask_all(engine: Engine, requests: Iterable[Request], *, waiting: int) -> Iterator[Future[Answer]]:
    """The answers in the requests' order; at most `waiting` requests, with their pictures, are taken ahead of them."""
    remaining = iter(requests)
    while window := [engine.submit(request) for request in islice(remaining, waiting)]:
        yield from window
