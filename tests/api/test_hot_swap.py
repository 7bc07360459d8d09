"""Hot swaps under load (A-04): every answer is the reported version's own, and none is older than was acknowledged.

The numbers of a version show in its answers: what a server says that has never served anything else is the measure.
"""

from __future__ import annotations

import base64
import io
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
from PIL import Image

import tiny
from api.registry_server import OPTIONS, Served, code, put, serving
from promptmux_prompts import Prompt, write_prompt
from promptmux_server.engine.options import EngineOptions
from promptmux_server.engine.prompt_versions import Lease
from promptmux_server.engine.registry import Registry, ServedTask

NAMES = [f"n{number}" for number in range(8)]
TEXT = "the dog is left of a cat"
CLOSE = 1e-3
"""Between the scores of one version in different batches; versions differ by more."""


def swapped(content: int) -> Prompt:
    """One of the contents that names are swapped between."""
    decoding = {"method": "greedy", "max_length": 4}
    return tiny.prompt("swapped", seed=content, scale=3.0, decoding=decoding, encoder_length=2 + content % 5)


def png(pixels: np.ndarray[Any, Any], palette: bytes | None = None) -> str:
    image = Image.fromarray(pixels, "P" if palette else None)
    if palette:
        image.putpalette(palette)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def alike() -> list[str]:
    """Pictures that a careless digest takes for one another: the same bytes, read as another shape or palette."""
    noise = np.random.default_rng(0).integers(0, 256, (30, 150, 3), dtype=np.uint8)
    indices = np.random.default_rng(1).integers(0, 2, (40, 40), dtype=np.uint8)
    black_and_white = bytes([0, 0, 0, 255, 255, 255])
    return [
        png(noise),
        png(noise.reshape(150, 30, 3)),
        png(indices, black_and_white),
        png(indices, black_and_white[::-1]),
    ]


PICTURES = alike()


def question(name: str, picture: int) -> dict[str, Any]:
    return {"task": name, "text": TEXT, "image": PICTURES[picture]}


def said(answer: dict[str, Any]) -> tuple[Any, float]:
    return answer["output"], answer["score"]


def cold_answers(folder: Path, contents: range) -> dict[tuple[str, int], tuple[Any, float]]:
    """By content digest and picture: what a server says that was never swapped, with no cache of pictures."""
    found = {}
    with serving(folder, options=EngineOptions()) as cold:
        for content in contents:
            prompt = swapped(content)
            assert put(cold.client, f"cold-{content}", prompt).status_code == 201
            for picture in range(len(PICTURES)):
                reply = cold.client.post("/v1/predict", json=question(f"cold-{content}", picture)).json()
                found[prompt.digest, picture] = said(reply["answers"][0])
    return found


@dataclass
class Swapping:
    """Publishers and clients at work on one server, and what was wrong in what they saw."""

    port: int
    cold: dict[tuple[str, int], tuple[Any, float]]
    contents: range
    wrong: list[str] = field(default_factory=list)
    answers: int = 0
    versions: set[tuple[str, int]] = field(default_factory=set)
    acknowledged: dict[str, int] = field(default_factory=dict)
    digests: dict[tuple[str, int], str] = field(default_factory=dict)

    def run(self, clients: int, each: int, publishes: int, every_s: float) -> None:
        publisher = threading.Thread(target=self._guarded, args=(self._publish, publishes, every_s))
        threads = [threading.Thread(target=self._guarded, args=(self._ask, seed, each)) for seed in range(clients)]
        for thread in (publisher, *threads):
            thread.start()
        for thread in (publisher, *threads):
            thread.join(240)
            assert not thread.is_alive()

    def _guarded(self, work: Callable[..., None], *arguments: Any) -> None:
        with httpx2.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=60.0) as client:
            try:
                work(client, *arguments)
            except Exception as error:
                self.wrong.append(f"{type(error).__name__}: {error}")

    def _publish(self, client: httpx2.Client, publishes: int, every_s: float) -> None:
        for number in range(publishes):
            name, content = NAMES[number % len(NAMES)], self.contents[(number * 5 + 1) % len(self.contents)]
            response = put(client, name, swapped(content))
            assert response.status_code in (200, 201), response.text
            self.acknowledged[name] = response.json()["version"]
            time.sleep(every_s)

    def _ask(self, client: httpx2.Client, seed: int, each: int) -> None:
        rng = random.Random(seed)
        for _ in range(each):
            name, picture = rng.choice(NAMES), rng.randrange(len(PICTURES))
            least = self.acknowledged.get(name, 1)
            response = client.post("/v1/predict", json=question(name, picture))
            if response.status_code != 200:
                self.wrong.append(f"status {response.status_code}: {response.text[:200]}")
                continue
            self._check(response.json()["answers"][0], name, picture, least)

    def _check(self, answer: dict[str, Any], name: str, picture: int, least: int) -> None:
        prompt = answer["prompt"]
        self.answers += 1
        self.versions.add((name, prompt["version"]))
        if prompt["version"] < least:
            self.wrong.append(f"version {prompt['version']} after {least} was acknowledged")
        if self.digests.setdefault((name, prompt["version"]), prompt["sha256"]) != prompt["sha256"]:
            self.wrong.append("one version, two digests")
        output, score = self.cold[prompt["sha256"], picture]
        if (answer["output"], answer["score"]) != (output, pytest.approx(score, abs=CLOSE)):
            self.wrong.append("an answer is not its version's")


@pytest.fixture(scope="module")
def cold(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], tuple[Any, float]]:
    """Every content answers every picture otherwise than the others do: else a mistake could not show."""
    found = cold_answers(tmp_path_factory.mktemp("cold"), range(6))
    for picture in range(len(PICTURES)):
        scores = sorted(score for (_, shown), (_, score) in found.items() if shown == picture)
        assert min(later - sooner for sooner, later in pairwise(scores)) > 2 * CLOSE
    for one, other in ((0, 1), (2, 3)):
        assert found[swapped(0).digest, one] != found[swapped(0).digest, other]
    return found


def swap(
    folder: Path,
    cold: dict[tuple[str, int], tuple[Any, float]],
    patch: Callable[[Served], None] = lambda served: None,
    *,
    clients: int = 32,
    each: int = 12,
    publishes: int = 48,
) -> Swapping:
    # Room for fewer versions than are swapped, so that they move between device, host memory and disk as well.
    options = EngineOptions(**{**OPTIONS.__dict__, "image_cache_bytes": 1 << 22, "prompt_host_bytes": 1 << 15})
    with serving(folder, options=options) as served:
        for name in NAMES:
            assert served.put(name, swapped(0)).status_code == 201
        patch(served)
        swapping = Swapping(served.port, cold, range(6), acknowledged=dict.fromkeys(NAMES, 1))
        swapping.run(clients, each, publishes, every_s=0.05)
        for name in NAMES:  # afterwards everything is as on a server that never saw a swap
            for picture in range(len(PICTURES)):
                answer = served.client.post("/v1/predict", json=question(name, picture)).json()["answers"][0]
                swapping._check(answer, name, picture, swapping.acknowledged[name])
        assert served.engine.load().images.hits > 0
        assert served.files("tmp") == []
    return swapping


def test_answers_are_their_versions_own_while_names_are_swapped(
    tmp_path: Path, cold: dict[tuple[str, int], tuple[Any, float]]
) -> None:
    swapping = swap(tmp_path, cold)
    assert swapping.wrong == []
    assert swapping.answers == 32 * 12 + len(NAMES) * len(PICTURES)
    assert len(swapping.versions) > 2 * len(NAMES)  # the control: swaps were seen


@pytest.mark.soak
def test_ten_thousand_answers_are_their_versions_own(
    tmp_path: Path, cold: dict[tuple[str, int], tuple[Any, float]]
) -> None:
    swapping = swap(tmp_path, cold, each=313, publishes=1000)
    assert swapping.wrong == []
    assert swapping.answers > 10_000


def test_prompts_kept_by_name_are_noticed(tmp_path: Path, cold: dict[tuple[str, int], tuple[Any, float]]) -> None:
    """The control: numbers that are found by name, as caches are that do not know digests."""

    def by_name(served: Served) -> None:
        registry, tiers = served.engine._registry, served.engine._tiers
        first: dict[str, Lease] = {}

        def resolve(name: str) -> tuple[ServedTask, Lease]:
            task, lease = Registry.resolve(registry, name)
            kept = first.setdefault(name, lease)
            if kept is lease:
                return task, tiers.prefetch(lease.version.source.digest)
            tiers.release(lease)
            return task, tiers.prefetch(kept.version.source.digest)

        registry.resolve = resolve  # type: ignore[method-assign]

    swapping = swap(tmp_path, cold, by_name, clients=8, publishes=24)
    assert "an answer is not its version's" in swapping.wrong


def test_renamed_tensors_are_refused_and_do_not_serve_the_backbone_alone(tmp_path: Path) -> None:
    data = write_prompt(swapped(1))
    with serving(tmp_path) as served:
        assert served.put("renamed", swapped(0)).status_code == 201
        for old, new in ((b"encoder.prefix.key", b"encoder.prefix.kex"), (b"decoder.prefix", b"encoder.prefix")):
            assert code(served.put("renamed", data.replace(old, new))) == (422, "invalid_prompt_file")
        assert served.client.get("/v1/prompts/renamed").json()["version"] == 1
