"""Many publishers at once (A-05): what is acknowledged is there, numbers never repeat, and losers are told so."""

from __future__ import annotations

import random
import threading
from dataclasses import dataclass, field
from pathlib import Path

import httpx2
import pytest

from api.registry_server import Served, put, serving, small
from promptmux_prompts import Prompt

STUCK_S = 1200.0
NAMES = [f"shared-{number}" for number in range(5)]
LOST = {(412, "version_mismatch"), (404, "prompt_not_found"), (404, "version_not_found")}
"""The last two where another has deleted the name, or there is no version to go back to."""


@dataclass
class Publishers:
    """Threads that publish, roll back and delete under `If-Match`, and what they were told."""

    port: int
    prompts: list[Prompt]
    acknowledged: dict[tuple[str, int], str] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    won: int = 0
    lost: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def run(self, threads: int, each: int) -> None:
        workers = [threading.Thread(target=self._work, args=(seed, each)) for seed in range(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(STUCK_S)
            assert not worker.is_alive(), "somebody is stuck"

    def _work(self, seed: int, each: int) -> None:
        rng = random.Random(seed)
        with httpx2.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=60.0) as client:
            for _ in range(each):
                try:
                    self._once(client, rng)
                except Exception as error:
                    self.wrong.append(f"{type(error).__name__}: {error}")

    def _once(self, client: httpx2.Client, rng: random.Random) -> None:
        name, kind = rng.choice(NAMES), rng.choice(["publish"] * 6 + ["rollback", "delete"])
        etag = client.get(f"/v1/prompts/{name}").headers.get("etag")
        condition = {"if_match": etag} if etag else {"if_none_match": "*"}
        headers = {key.replace("_", "-"): value for key, value in condition.items()}
        if kind == "publish":
            response = put(client, name, rng.choice(self.prompts), **condition)
        elif kind == "rollback":
            response = client.post(f"/v1/prompts/{name}/rollback", json={}, headers=headers)
        else:
            response = client.delete(f"/v1/prompts/{name}", headers=headers)
        with self._lock:
            self._note(name, response)

    def _note(self, name: str, response: httpx2.Response) -> None:
        if response.is_success:
            self.won += 1
        elif (response.status_code, response.json()["error"]["code"]) in LOST:
            self.lost += 1
        else:
            self.wrong.append(response.text)
        if response.status_code == 201:
            version = (name, response.json()["version"])
            if version in self.acknowledged:
                self.wrong.append(f"{version} was given twice")
            self.acknowledged[version] = response.json()["sha256"]


def collect(served: Served, over: threading.Event) -> None:
    while not over.wait(0.05):
        served.engine.prompts._store.collect(older_than_s=0.5)


def publish_together(served: Served, threads: int, each: int) -> Publishers:
    publishers, over = Publishers(served.port, [small("shared", seed) for seed in range(12)]), threading.Event()
    collector = threading.Thread(target=collect, args=(served, over))
    collector.start()
    try:
        publishers.run(threads, each)
    finally:
        over.set()
        collector.join(60)
    return publishers


def check(served: Served, publishers: Publishers) -> None:
    assert publishers.wrong == []
    assert publishers.won
    assert publishers.lost  # the control: they were in one another's way
    for name in NAMES:
        last = max((version for known, version in publishers.acknowledged if known == name), default=0)
        listed = served.client.get(f"/v1/prompts/{name}/versions")
        if listed.status_code == 200:
            for version in listed.json()["versions"]:
                assert publishers.acknowledged[name, version["version"]] == version["sha256"]
                file = served.client.get(f"/v1/prompts/{name}/versions/{version['version']}/file")
                assert file.status_code == 200
            answer = served.ask(name)
            assert publishers.acknowledged[name, answer["prompt"]["version"]] == answer["prompt"]["sha256"]
        after = served.put(name, small("shared", 99))
        assert (after.status_code, after.json()["version"]) == (201, last + 1)
    assert served.client.get("/readyz").status_code == 200
    assert served.files("tmp") == []


def test_publishers_with_conditions_lose_nothing_to_one_another(tmp_path: Path) -> None:
    with serving(tmp_path) as served:
        check(served, publish_together(served, threads=32, each=6))


@pytest.mark.soak
def test_32_publishers_lose_nothing_in_a_thousand_turns_each(tmp_path: Path) -> None:
    with serving(tmp_path) as served:
        check(served, publish_together(served, threads=32, each=1024))
