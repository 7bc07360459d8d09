"""Bad publications and damaged files never harm what is good (A-06)."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from prometheus_client import generate_latest

from api.live_server import until
from api.registry_server import OPTIONS, Served, code, put, serving, small
from api.steady import RATE_HZ, Steady
from promptmux_prompts import Canary, Prompt, Store, write_prompt
from promptmux_prompts.faults import arm, disarm
from promptmux_server.engine.keeper import Keeper
from promptmux_server.engine.options import EngineOptions
from promptmux_server.engine.prompt_table import PromptPools
from promptmux_server.engine.request import PromptRef


@pytest.fixture(autouse=True)
def unarmed() -> Iterator[None]:
    yield
    disarm()


def malformed(number: int) -> bytes:
    good = write_prompt(small("a", 1))
    kinds = [
        good[: 10 + number],
        good + b"x" * number,
        b"",
        b"PK\x03\x04" + bytes(number),
        good.replace(b"F32", b"F64"),
    ]
    return kinds[number % len(kinds)]


def failing(number: int) -> Prompt:
    return small("a", 100 + number, canary=(Canary(tokens=(9, number), text="the dog"),))


def test_a_good_version_answers_while_bad_ones_are_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(tmp_path) as served:
        assert served.put("a", small("a", 1)).status_code == 201
        before = served.ask("a")
        with Steady(served, "a") as steady:
            for number in range(25):
                response = put(served.client, "a", malformed(number))
                assert code(response) == (422, "invalid_prompt_file"), number
            for number in range(15):
                assert code(put(served.client, "a", failing(number))) == (422, "canary_failed")
            with monkeypatch.context() as full:
                full.setattr(PromptPools, "store", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("full")))
                for number in range(10):
                    assert code(put(served.client, "a", small("a", 200 + number))) == (503, "overloaded")
            arm("publish.checked:delay_2000:1")
            slow = threading.Thread(target=put, args=(served.client, "a", failing(99)))
            slow.start()
            time.sleep(0.5)
            asked = len(steady.answers)
            slow.join(60)
        assert steady.wrong == []
        assert len(steady.answers) > asked + RATE_HZ / 2  # while the slow one waited too
        assert {answer["prompt"]["version"] for answer in steady.answers} == {1}
        assert all(answer["output"] == before["output"] for answer in steady.answers)
        assert sorted(steady.probes_s)[len(steady.probes_s) * 9 // 10] < 0.2
        assert served.files("tmp") == []
        assert len(served.files("blobs")) == 1
        assert served.put("a", small("a", 2)).status_code == 201
        assert served.ask("a")["prompt"]["version"] == 2
        exposed = generate_latest(served.application.metrics.registry).decode()
        assert 'promptmux_prompt_publishes_total{outcome="canary_failed"} 16.0' in exposed
        assert 'promptmux_prompt_publishes_total{outcome="invalid_prompt_file"} 25.0' in exposed
        assert 'promptmux_prompt_publishes_total{outcome="ok"} 2.0' in exposed


def test_a_failed_canary_tells_what_was_said_instead(tmp_path: Path) -> None:
    with serving(tmp_path) as served:
        response = served.put("a", failing(7))
        assert code(response) == (422, "canary_failed")
        details = response.json()["error"]["details"]
        assert (details["index"], details["expected"]) == (0, [9, 7])
        assert details["got"]
        right = small("a", 107, canary=(Canary(tokens=tuple(details["got"]), text="the dog"),))
        assert served.put("a", right).status_code == 201  # the control: what it says is what would pass


@pytest.mark.parametrize(
    ("point", "expected"),
    [("publish.blob_synced:enospc:1", (507, "storage_full")), ("publish.head_synced:eio:1", (503, "storage_failed"))],
)
def test_a_failing_disk_leaves_the_old_version_and_the_next_publication_works(
    tmp_path: Path, point: str, expected: tuple[int, str]
) -> None:
    with serving(tmp_path) as served:
        served.put("a", small("a", 1))
        arm(point)
        assert code(served.put("a", small("a", 2))) == expected
        disarm()
        assert served.ask("a")["prompt"]["version"] == 1
        assert served.put("a", small("a", 2)).status_code == 201
        assert served.ask("a")["prompt"]["sha256"] == small("a", 2).digest


# -- at the start ---------------------------------------------------------------------------------------------------


def stored(store: Store, name: str, prompt: Prompt) -> None:
    with store.upload() as upload:
        upload.write(write_prompt(prompt))
        store.publish(name, upload, prompt, author="local")


def damaged(tmp_path: Path, versions: int) -> str:
    """A registry of 50 names, the file of one of them damaged; its name."""
    store = Store.open(tmp_path / "registry")
    for number in range(50):
        for version in range(versions if number == 7 else 1):
            stored(store, f"t{number}", small("any", 100 * version + number))
    path = store.blob_path(store.record("t7", versions))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    return "t7"


def quarantined(served: Served) -> float:
    found = served.application.metrics.registry.get_sample_value("promptmux_prompts_quarantined")
    assert found is not None
    return found


def test_one_damaged_file_of_fifty_is_quarantined_until_it_is_published_again(tmp_path: Path) -> None:
    bad = damaged(tmp_path, versions=1)
    with serving(tmp_path) as served:
        assert served.client.get("/readyz").status_code == 200
        tasks = {task["name"]: task for task in served.client.get("/v1/tasks").json()["tasks"]}
        assert {name for name, task in tasks.items() if task["state"] == "refused"} == {bad}
        assert tasks[bad]["error"]["code"] == "prompt_quarantined"
        assert quarantined(served) == 1
        for number in range(50):
            response = served.client.post("/v1/predict", json={"task": f"t{number}", "text": "the dog"})
            assert response.status_code == (503 if f"t{number}" == bad else 200)
        refused = served.client.post("/v1/predict", json={"task": bad, "text": "the dog"})
        assert code(refused) == (503, "prompt_quarantined")
        assert code(served.client.get(f"/v1/prompts/{bad}")) == (503, "prompt_quarantined")
        assert served.put(bad, small("any", 7)).status_code == 201
        assert served.ask(bad)["prompt"]["version"] == 2
        assert quarantined(served) == 0


@pytest.mark.parametrize("fall_back", [True, False])
def test_a_damaged_version_gives_way_to_the_one_before_it_if_it_may(tmp_path: Path, fall_back: bool) -> None:
    bad = damaged(tmp_path, versions=2)
    options = EngineOptions(**{**OPTIONS.__dict__, "fall_back": fall_back})
    with serving(tmp_path, options=options) as served:
        response = served.client.post("/v1/predict", json={"task": bad, "text": "the dog"})
        if fall_back:
            assert response.json()["answers"][0]["prompt"]["version"] == 1
        else:
            assert code(response) == (503, "prompt_quarantined")
        assert quarantined(served) == (0 if fall_back else 1)


# -- numbers that turn out not to be finite --------------------------------------------------------------------------


def poison(served: Served, name: str) -> None:
    """Let a version's pages on the device hold NaN."""
    served.ask(name)
    version = served.engine._tiers._versions[served.engine._registry.listed(name).source.digest]
    assert version.home is not None
    served.engine._pools.encoder.value[:, list(version.home.encoder_pages)] = float("nan")


def test_a_version_that_gives_no_finite_numbers_three_times_is_taken_back(tmp_path: Path) -> None:
    with serving(tmp_path) as served:
        for seed in (1, 2):
            served.put("a", small("a", seed))
        poison(served, "a")
        question = {"task": "a", "text": "the dog"}
        for _ in range(3):
            assert code(served.client.post("/v1/predict", json=question)) == (503, "nonfinite_output")
        until(lambda: served.engine.load().registry.rolled_back == 1)
        assert served.ask("a")["prompt"]["sha256"] == small("a", 1).digest
        assert served.client.get("/v1/prompts/a").json()["version"] == 1
        served.put("a", small("a", 3))
        back = served.client.post("/v1/prompts/a/rollback", json={})
        assert back.json()["version"] == 1  # nobody is sent back to the version that was flagged


def test_an_only_version_stays_whatever_its_numbers(tmp_path: Path) -> None:
    with serving(tmp_path) as served:
        served.put("a", small("a", 1))
        poison(served, "a")
        for _ in range(4):
            response = served.client.post("/v1/predict", json={"task": "a", "text": "the dog"})
            assert code(response) == (503, "nonfinite_output")
        assert served.client.get("/v1/prompts/a").json()["version"] == 1


@pytest.mark.parametrize(("limit", "taken"), [(3, ["bad"]), (5, []), (0, [])])
def test_only_failures_in_a_row_count(limit: int, taken: list[str]) -> None:
    seen: list[str] = []
    keeper = Keeper(lambda ref: seen.append(ref.name), lambda: None, limit)
    keeper.start()
    bad, mixed = PromptRef("bad", 1, "aa"), PromptRef("mixed", 1, "bb")
    for _ in range(4):
        keeper.nonfinite(bad)
        keeper.nonfinite(mixed)
        keeper.nonfinite(mixed)
        keeper.finite(mixed)
    keeper.close()
    assert seen == taken
