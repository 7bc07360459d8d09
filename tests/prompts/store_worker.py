"""Processes of their own that work on a store and may be killed at any moment.

Importing torch takes a second, so one process imports it and forks for each task. Whoever is on the other end is told
the number of each process, and reads what it said, line by line, in a log that all of them share.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any

from promptmux_prompts import ABSENT, Store, VersionMismatch, VersionNotFound, faults
from promptmux_prompts.records import Expected
from prompts.store_cases import publish

Say = Callable[[dict[str, Any]], None]


class Workers:
    """Starts processes and waits for them."""

    def __init__(self, log: Path) -> None:
        self.log = log
        log.touch()
        self._process = subprocess.Popen(
            [sys.executable, "-c", "from prompts.store_worker import serve; serve()"],
            cwd=Path(__file__).parents[1],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        )

    def start(self, task: str, **arguments: Any) -> int:
        """Begin a task; its process."""
        return self._ask(task=task, log=str(self.log), **arguments)

    def wait(self, process: int) -> int:
        """For a process to end; its exit code, or minus the signal that killed it."""
        return self._ask(wait=process)

    def run(self, task: str, **arguments: Any) -> int:
        return self.wait(self.start(task, **arguments))

    def kill(self, process: int) -> None:
        os.kill(process, signal.SIGKILL)
        assert self.wait(process) == -signal.SIGKILL

    def said(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log.read_text().splitlines()]

    def close(self) -> None:
        self._process.communicate(timeout=60)

    def _ask(self, **request: Any) -> int:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())


@contextmanager
def workers(log: Path) -> Iterator[Workers]:
    started = Workers(log)
    try:
        yield started
    finally:
        started.close()


def serve() -> None:
    """The forking process: answers each line of standard input with a number; its children end with it."""
    running = set()
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            _, status = os.waitpid(request["wait"], 0)
            running.discard(request["wait"])
            answer = os.waitstatus_to_exitcode(status)
        else:
            answer = os.fork()
            if answer == 0:
                _work(**request)
            running.add(answer)
        print(answer, flush=True)
    for process in running:
        os.kill(process, signal.SIGKILL)


def _work(task: str, log: str, **arguments: Any) -> None:
    code = 1
    try:
        file = os.open(log, os.O_WRONLY | os.O_APPEND)
        TASKS[task](lambda what: os.write(file, json.dumps(what).encode() + b"\n"), **arguments)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def step(say: Say, *, root: str, act: str, fault: str, **how: Any) -> None:
    """One operation with a fault armed; says so when it is acknowledged."""
    store = Store.open(Path(root), keep_versions=2)
    faults.arm(fault)
    ACTS[act](store, **how)
    say({"acknowledged": act})


def publish_for_ever(say: Say, *, root: str, names: list[str], seed: int) -> None:
    """Publishes one version after the other and says which were acknowledged."""
    store, chance = Store.open(Path(root), keep_versions=10**6), random.Random(seed)
    while True:
        name, number = chance.choice(names), chance.randrange(1000)
        record = publish(store, name, number)
        say({"name": name, "version": record.version, "number": number})


def collect_for_ever(say: Say, *, root: str, keep_versions: int) -> None:
    """Collects without a pause, however young the files are; says what it removed."""
    store = Store.open(Path(root), keep_versions=keep_versions)
    while True:
        collected = store.collect(older_than_s=0)
        say({"collected": collected.versions, "blobs": collected.blobs})


def race(say: Say, *, root: str, names: list[str], threads: int, rounds: int, seed: int) -> None:
    """Many threads that each look at a name and change what they saw, if it is still so."""
    store = Store.open(Path(root), keep_versions=5)
    running = [
        Thread(target=race_alone, args=(store, say, names, rounds, seed * 1000 + number)) for number in range(threads)
    ]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()


def race_alone(store: Store, say: Say, names: list[str], rounds: int, seed: int) -> None:
    """One of them. Says each change while the name is locked, so that the log has them in their true order."""
    chance = random.Random(seed)
    for _ in range(rounds):
        name, number, act = chance.choice(names), chance.randrange(1000), chance.choice("pppprrd")
        head = store.head(name)
        saw = None if head is None or head.deleted else head.version
        expected: Expected = ABSENT if saw is None else saw
        tell = partial(_tell, say, {"act": act, "name": name, "saw": saw, "number": number})
        try:
            if act == "p":
                publish(store, name, number, expected=expected, on_head=tell)
            elif act == "r" and saw is not None:
                store.rollback(name, author="x", expected=expected, on_head=tell)
            elif saw is not None:
                store.delete(name, author="x", expected=expected, on_head=tell)
        except VersionMismatch:
            say({"act": "lost"})
        except VersionNotFound:
            say({"act": "nothing to go back to"})
        except Exception as error:
            say({"act": "failed", "error": repr(error)})


def _tell(say: Say, what: dict[str, Any], record: Any = None) -> None:
    say({**what, "version": None if record is None else record.version, "sha256": record and record.sha256})


ACTS: dict[str, Callable[..., object]] = {
    "publish": publish,
    "rollback": lambda store, **how: store.rollback(author="x", **how),
    "delete": lambda store, **how: store.delete(author="x", **how),
    "pin": lambda store, **how: store.set_pinned(pinned=True, author="x", **how),
    "collect": lambda store: store.collect(older_than_s=0),
    "recover": lambda store: store.recover(),
}
TASKS: dict[str, Callable[..., None]] = {
    function.__name__: function for function in (step, publish_for_ever, collect_for_ever, race)
}
