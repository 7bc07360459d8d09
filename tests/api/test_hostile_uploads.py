"""Whatever is uploaded (A-02): it is served or refused, quickly, and what is refused leaves nothing behind."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load as load_with_the_library_alone

import tiny
from api.hostile_files import GOOD, cast, empty_tensors, mutated, named
from api.registry_server import Served, code, serving
from api.steady import Steady
from load.served import resident_bytes
from promptmux_prompts import InvalidPromptFile, PromptFileError, read_prompt
from promptmux_server.errors import PromptmuxError
from promptmux_server.tasks import TaskSpec

REFUSALS = {400, 413, 415, 422}
SEED = 20_260


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("served")) as running:
        assert running.put("target", GOOD).status_code == 201
        yield running


def state(served: Served) -> object:
    """Everything that a refused file must not change."""
    log = served.root / "log" / "audit.jsonl"
    return served.client.get("/v1/prompts").json(), served.files("blobs"), served.files("tmp"), log.read_bytes()


@pytest.mark.parametrize("case", named())
def test_each_trick_is_refused_and_leaves_nothing(served: Served, case: str) -> None:
    before = state(served)
    response = served.put("target", named()[case])
    status, error = code(response)
    assert status in REFUSALS
    assert error.startswith(("prompt_", "invalid_prompt_file", "body_too_large"))
    assert state(served) == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_every_type_of_numbers_that_is_allowed_is_served(served: Served, dtype: torch.dtype) -> None:
    """The control: what differs from a refused file in nothing but the mistake is good."""
    assert served.put("typed", cast(dtype)).status_code in (200, 201)


def test_a_file_cut_anywhere_in_its_header_is_refused(served: Served) -> None:
    before = state(served)
    size = 8 + int.from_bytes(GOOD[:8], "little")
    for end in range(0, size, 37):
        assert code(served.put("target", GOOD[:end]))[0] in REFUSALS
    assert state(served) == before


def is_good(data: bytes) -> bool:
    """Whether a mutation happens to be a prompt still."""
    try:
        prompt = read_prompt(data, shape=tiny.shape(), fingerprint=tiny.backbone().fingerprint, dtype=torch.float32)
        TaskSpec.from_manifest(prompt.manifest, tiny.config())
    except (PromptFileError, PromptmuxError):
        return False
    return True


def damage(served: Served, count: int) -> None:
    """Upload so many mutations of a good file; a seed and a number name the one that fails."""
    seconds: list[float] = []
    accepted = 0
    with Steady(served, "target") as steady:
        for number in range(count):
            data = mutated(random.Random(SEED + number))
            before = state(served)
            started = time.monotonic()
            response = served.put("mutated", data)
            seconds.append(time.monotonic() - started)
            if number == count // 10:
                resident = resident_bytes()
            if is_good(data) and response.status_code in (200, 201):
                accepted += 1
                continue
            status, _ = code(response)
            assert status in REFUSALS, (SEED, number, response.text)
            assert state(served) == before, (SEED, number)
    assert steady.wrong == []
    assert accepted < count // 2
    assert resident_bytes() - resident < 32 << 20
    assert sorted(seconds)[len(seconds) * 99 // 100] < 0.5


def test_mutations_of_a_good_file_are_served_or_refused(served: Served) -> None:
    damage(served, 300)


@pytest.mark.soak
def test_ten_thousand_mutations_are_served_or_refused(tmp_path: Path) -> None:
    with serving(tmp_path) as fresh:
        assert fresh.put("target", GOOD).status_code == 201
        damage(fresh, 10_000)


def seconds_of(work: object) -> float:
    assert callable(work)
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def test_empty_tensors_cost_nothing_because_the_header_is_checked_first() -> None:
    """The control: the library alone reads them all, which with a million takes seconds and a gigabyte."""
    data = empty_tensors(30_000)

    def checked() -> None:
        with pytest.raises(InvalidPromptFile):
            read_prompt(data, shape=tiny.shape(), fingerprint=None, dtype=torch.float32)

    checked()
    assert seconds_of(lambda: load_with_the_library_alone(data)) > 20 * min(seconds_of(checked) for _ in range(5))
