"""From a folder of pictures to answers over HTTP alone: a server, workers in their own processes, and the client."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from api.registry_server import OPTIONS, Served, serving
from cli import tiny_training
from cli.tiny_training import prepare
from promptmux import Client, Conflict, TrainingEvent
from promptmux_server.api import training_events
from promptmux_server.cli.working import work
from promptmux_server.jobs import FILE, JobTable
from promptmux_server.settings import Settings

CONFIG = (
    tiny_training.CONFIG.replace('"out"', '"runs/counting"').replace("every = 3", "every = 3, checkpoint_every = 2")
    + "\n[publish]\n"
)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of trainings with data and a backbone."""
    monkeypatch.setattr(training_events, "POLL_S", 0.05)
    folder = tmp_path / "root"
    folder.mkdir()
    prepare(folder, CONFIG)
    return folder


@pytest.fixture
def served(tmp_path: Path, root: Path) -> Iterator[Served]:
    settings = Settings(training_root=root, state=tmp_path / "state")
    with serving(tmp_path / "prompts", options=OPTIONS, settings=settings) as running:
        yield running


@pytest.fixture
def client(served: Served) -> Iterator[Client]:
    with Client(f"http://127.0.0.1:{served.port}") as connected:
        yield connected


@contextmanager
def worker(state: Path, client: Client) -> Iterator[subprocess.Popen[bytes]]:
    """`promptmux worker --push`, killed at the end if it still runs."""
    url = str(client._http.base_url)
    command = [sys.executable, "-m", "promptmux_server", "worker", "--once", "--push", "--url", url]
    process = subprocess.Popen([*command, "--state", str(state)], env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        yield process
    finally:
        process.kill()
        process.wait(30)


def test_a_posted_training_is_followed_published_and_asked(
    tmp_path: Path, root: Path, served: Served, client: Client
) -> None:
    training = client.trainings.submit(CONFIG, metadata={"who": "a test"})
    with worker(tmp_path / "state", client) as process:
        events = list(client.trainings.events(training.id))
        assert process.wait(30) == 0
    names = [event.name for event in events]
    assert names[:3] == ["queued", "started", "step"]
    assert names.count("score") == 2
    assert names[-2:] == ["publish", "succeeded"]
    ended = client.trainings.get(training.id)
    assert ended.result is not None
    assert ended.result.publish is not None
    assert (ended.status, ended.metadata, ended.result.publish.version) == ("succeeded", {"who": "a test"}, 1)
    assert (root / ended.result.file).is_file()
    answer = client.predict(task="counting", text="how many 1", image=root / "1.png")
    assert answer.prompt is not None
    assert (answer.prompt.version, answer.prompt.sha256) == (1, ended.result.sha256)


def test_a_killed_workers_training_is_finished_by_another(tmp_path: Path, served: Served, client: Client) -> None:
    training = client.trainings.submit(CONFIG.replace("steps = 6", "steps = 120").replace("every = 3", "every = 60"))
    with worker(tmp_path / "state", client) as process:
        for event in client.trainings.events(training.id):
            if event.name == "step":
                break
        time.sleep(0.2)
        process.kill()
    with pytest.raises(Conflict, match=training.id):
        client.trainings.submit(CONFIG)
    later = JobTable(tmp_path / "state" / FILE, clock=lambda: time.time() + 1000)  # its lease has run out
    assert work(later, lambda: False, once=True, url=f"http://127.0.0.1:{served.port}") == 1
    names = [event.name for event in client.trainings.events(training.id)]
    assert names.count("started") == 2
    ended = client.trainings.get(training.id)
    assert (ended.status, ended.attempts) == ("succeeded", 2)
    assert client.prompts.get("counting").version == 1


def test_a_running_training_is_cancelled_from_afar(tmp_path: Path, served: Served, client: Client) -> None:
    training = client.trainings.submit(CONFIG.replace("steps = 6", "steps = 100000").replace("every = 3", "every = 99"))
    table = JobTable(tmp_path / "state" / FILE)
    thread = threading.Thread(target=lambda: work(table, lambda: False, once=True, lease_s=0.8))
    thread.start()
    events: list[TrainingEvent] = []
    for event in client.trainings.events(training.id):
        events.append(event)
        if event.name == "step" and len(events) == 3:
            assert client.trainings.cancel(training.id).cancel_requested
    thread.join(30)
    assert events[-1].name == "cancelled"
    assert client.trainings.cancel(training.id).status == "cancelled"
