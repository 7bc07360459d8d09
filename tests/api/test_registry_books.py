"""After all of it the books balance (A-27), and no made-up name becomes a series of the metrics (A-25)."""

from __future__ import annotations

import base64
import hashlib
import random
import socket
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import httpx2
import pytest
from prometheus_client import generate_latest
from structlog.testing import capture_logs

from api.fake_engine import FakeEngine
from api.live_server import until
from api.registry_server import Served, put, serving, small
from promptmux_prompts import write_prompt
from promptmux_server.api.keys import Keys
from promptmux_server.api.metrics import MAX_TASKS, Metrics
from promptmux_server.engine.request import TaskInputs

SECRETS = {"boss": "s3cret-of-boss", "user": "s3cret-of-user"}
TEXT = "the dog nobody should read about"


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    scopes = {"boss": "infer,admin", "user": "infer"}
    digests = {name: hashlib.sha256(secret.encode()).hexdigest() for name, secret in SECRETS.items()}
    (tmp_path / "keys").write_text("\n".join(f"{name} {scopes[name]} {digest}" for name, digest in digests.items()))
    return Keys.read(tmp_path / "keys")


def samples(served: Served, name: str) -> dict[tuple[str, ...], float]:
    found: dict[tuple[str, ...], float] = {}
    for metric in served.application.metrics.registry.collect():
        for sample in metric.samples:
            if sample.name == name:
                found[tuple(sample.labels.values())] = sample.value
    return found


class Traffic:
    """Callers of every kind; how many requests were sent, and what came back."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.statuses: Counter[int] = Counter()
        self.items: Counter[str] = Counter()
        self._lock = threading.Lock()

    def run(self) -> None:
        threads = [threading.Thread(target=self._call, args=(seed,)) for seed in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
            assert not thread.is_alive()

    def _call(self, seed: int) -> None:
        rng = random.Random(seed)
        with httpx2.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=60.0) as client:
            for _ in range(25):
                who = rng.choice(["boss", "boss", "user", "nobody"])
                client.headers["authorization"] = f"Bearer {SECRETS.get(who, 'wrong')}"
                response = rng.choice([self._ask, self._ask, self._publish, self._change, self._look])(client, rng)
                with self._lock:
                    self.statuses[response.status_code] += 1

    def _ask(self, client: httpx2.Client, rng: random.Random) -> httpx2.Response:
        tasks = [rng.choice(["a", "b", "nobody"]) for _ in range(3)]
        body = {"items": [{"task": task, "text": TEXT} for task in tasks], "deadline_ms": rng.choice([1, 20_000])}
        response = client.post("/v1/predict", json=body)
        if response.status_code != 401:
            with self._lock:
                self.items.update(["asked"] * 3)
        return response

    def _publish(self, client: httpx2.Client, rng: random.Random) -> httpx2.Response:
        content: Any = rng.choice([small("any", rng.randrange(5)), b"garbage"])
        return put(client, rng.choice(["a", "b", "c"]), content, if_match=rng.choice(["", '"1"', "bad"]))

    def _change(self, client: httpx2.Client, rng: random.Random) -> httpx2.Response:
        if rng.random() < 0.2:
            return client.delete("/v1/prompts/c")
        return client.post(f"/v1/prompts/{rng.choice('abc')}/rollback", json={})

    def _look(self, client: httpx2.Client, rng: random.Random) -> httpx2.Response:
        return client.get(rng.choice(["/v1/prompts", "/v1/prompts/a/versions", "/v1/tasks/b", "/nowhere"]))


def test_every_request_is_counted_and_logged_once_and_nothing_stays_behind(tmp_path: Path, keys: Keys) -> None:
    with capture_logs() as logs, serving(tmp_path, small("a", 1), small("b", 2), keys=keys) as served:
        traffic = Traffic(served.port)
        traffic.run()
        left = leave_in_the_middle(served, 5)
        total = traffic.statuses.total() + left
        until(lambda: sum(entry["event"] == "request" for entry in logs) >= total)
        requests = [entry for entry in logs if entry["event"] == "request"]
        assert len(requests) == total
        assert len({entry["request_id"] for entry in requests}) == total
        logged = Counter(entry["status"] for entry in requests)
        assert logged == traffic.statuses + Counter({499: left})
        counted: Counter[str] = Counter()
        for (_, status), value in samples(served, "promptmux_http_requests_total").items():
            counted[status] += int(value)
        assert counted == Counter({str(status): count for status, count in logged.items()})
        assert sum(samples(served, "promptmux_items_total").values()) == traffic.items["asked"]
        puts = [entry for entry in requests if entry["method"] == "PUT" and entry["status"] not in (401, 403)]
        assert sum(samples(served, "promptmux_prompt_publishes_total").values()) == len(puts)
        assert not any(status >= 500 and status != 504 for status in traffic.statuses)
        until(lambda: served.engine.load().running == served.engine.load().waiting == 0)
        memory = served.engine.load().memory
        assert (memory.slots_used, memory.places_used, served.engine.load().prompts.waiting) == (0, 0, 0)
        assert not any(version.in_use for version in served.engine._tiers._versions.values())
        assert served.files("tmp") == []
    said = repr(logs) + (served.root / "log" / "audit.jsonl").read_text()
    for secret in (*SECRETS.values(), TEXT, base64.b64encode(write_prompt(small("any", 1))[-60:]).decode()):
        assert secret not in said
    assert "boss" in (served.root / "log" / "audit.jsonl").read_text()  # the control: who changed what is written down


def leave_in_the_middle(served: Served, count: int) -> int:
    """Connections that close while their file is being received."""
    for _ in range(count):
        with socket.create_connection(("127.0.0.1", served.port)) as connection:
            head = [
                "PUT /v1/prompts/a HTTP/1.1",
                "Host: x",
                f"Authorization: Bearer {SECRETS['boss']}",
                "Content-Type: application/octet-stream",
                f"X-Content-SHA256: {'0' * 64}",
                "Content-Length: 100000",
            ]
            connection.sendall("\r\n".join([*head, "", ""]).encode() + b"x" * 1000)
            until(lambda: len(served.files("tmp")) == 1)
        until(lambda: served.files("tmp") == [])
    return count


def test_random_names_and_methods_make_no_series(tmp_path: Path) -> None:
    with serving(tmp_path, small("a", 1)) as served:
        rng = random.Random(1)

        def ask(count: int) -> int:
            for _ in range(count):
                name = "".join(rng.choices("abcdefghij.-_/%", k=12))
                rest = rng.choice(["", "/versions", "/versions/7/file", "/rollback", "/pin", "/unpin", "/x"])
                method = rng.choice(["GET", "PUT", "POST", "DELETE", "PATCH", "OPTIONS"])
                served.client.request(method, f"/v1/prompts/{name}{rest}")
                served.client.post("/v1/predict", json={"task": name, "text": "x"})
            return len(generate_latest(served.application.metrics.registry).splitlines())

        assert abs(ask(150) - ask(300)) <= 40  # a status that a route has not answered before is a series


class Everything(FakeEngine):
    """Serves every name."""

    def inputs(self, task: str) -> TaskInputs | None:
        return TaskInputs("text", True, False, False)


def test_a_thousand_tasks_are_a_bounded_scrape() -> None:
    metrics = Metrics(Everything())
    for number in range(1000):
        metrics.item(f"task-{number}", "ok", dict.fromkeys(("queue", "vision", "encode", "decode", "total"), 1.0))
    text = generate_latest(metrics.registry)
    assert len(text) < 1 << 20
    assert text.count(b"promptmux_items_total{") == MAX_TASKS + 1
    others = metrics.registry.get_sample_value("promptmux_items_total", {"task": "other", "outcome": "ok"})
    assert others == 1000 - MAX_TASKS
