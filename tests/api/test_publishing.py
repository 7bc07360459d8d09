"""The routes of published prompts, on a real engine: what each answers, and every way in which it refuses."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

import tiny
from api.registry_server import Served, code, put, serving, small
from promptmux_prompts import Prompt, read_prompt, write_prompt
from promptmux_server.api import prompt_documents
from promptmux_server.api.conditions import LARGEST_PAGE
from promptmux_server.engine.rehearsal import record_canaries


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """One server for all tests here: each has names of its own."""
    with serving(tmp_path_factory.mktemp("served"), small("seeded", 99)) as running:
        yield running


# -- publishing -----------------------------------------------------------------------------------------------------


def test_a_published_version_is_described_and_answers(served: Served) -> None:
    prompt = small("first", 1, metric={"name": "accuracy", "value": 0.5}, provenance={"steps": 7})
    response = served.put("first", prompt)
    assert (response.status_code, response.headers["etag"]) == (201, '"1"')
    data = write_prompt(prompt)
    described = prompt_documents.DescribedVersion.model_validate(response.json())
    assert (described.name, described.version, described.author, described.current) == ("first", 1, "local", True)
    assert (described.sha256, described.bytes) == (prompt.digest, len(data))
    assert described.file_sha256 == hashlib.sha256(data).hexdigest()
    assert (described.encoder_length, described.decoder_length) == (4, 3)
    assert described.manifest == json.loads(prompt.manifest.to_json())
    assert served.ask("first")["prompt"] == {"name": "first", "version": 1, "sha256": prompt.digest}
    assert served.client.get("/v1/prompts/first").json() == response.json()
    task = served.client.get("/v1/tasks/first").json()
    assert (task["provenance"], task["author"], task["created"]) == ({"steps": 7}, "local", described.created)
    assert (task["hits"], task["tier"]) == (1, "device")


def in_some_layers() -> Prompt:
    """With a canary."""
    bottom = small("bottom", encoder_layers=(0, 1), decoder_layers=(1, 2))
    return record_canaries(tiny.model(), tiny.tokenizer(), bottom, [{"text": "the dog"}])


def test_a_prompt_is_served_in_its_own_layers_and_says_so(served: Served) -> None:
    bottom = in_some_layers()
    response = served.put("bottom", bottom)
    assert response.status_code == 201
    assert response.json()["manifest"]["decoder_layers"] == [1, 2]
    task = served.client.get("/v1/tasks/bottom").json()
    assert (task["encoder_layers"], task["decoder_layers"]) == ([0, 1], [1, 2])
    assert served.client.get("/v1/tasks/seeded").json()["encoder_layers"] is None
    assert bottom.manifest.canary is not None
    tokens = bottom.manifest.canary[0].tokens
    assert served.ask("bottom")["output"]["text"] == tiny.tokenizer().decode(tokens[:-1])


def test_the_same_numbers_in_all_layers_are_another_prompt(served: Served) -> None:
    """The control: with zeros in place of nothing, the canary is answered otherwise."""
    bottom = in_some_layers()
    everywhere = replace(bottom.manifest, encoder_layers=None, decoder_layers=None)
    sides = (bottom.encoder_key, bottom.encoder_value, bottom.decoder_key, bottom.decoder_value)
    assert code(served.put("zeros", Prompt.build(everywhere, *sides))) == (422, "canary_failed")


def test_the_same_content_again_makes_no_version(served: Served) -> None:
    assert served.put("same", small(seed=1)).status_code == 201
    again = served.put("same", small(seed=1))
    assert (again.status_code, again.headers["etag"]) == (200, '"1"')
    assert served.put("same", small(seed=2)).headers["etag"] == '"2"'
    back = served.put("same", small(seed=1))
    assert (back.status_code, back.headers["etag"]) == (201, '"3"')
    assert served.ask("same")["prompt"]["version"] == 3


def test_a_condition_guards_against_others(served: Served) -> None:
    assert served.put("mine", small(seed=1), if_none_match="*").status_code == 201
    assert code(served.put("mine", small(seed=2), if_none_match="*")) == (412, "version_mismatch")
    assert served.put("mine", small(seed=2), if_match='"1"').status_code == 201
    late = served.put("mine", small(seed=3), if_match='"1"')
    assert code(late) == (412, "version_mismatch")
    assert "version 2" in late.json()["error"]["message"]
    assert code(served.put("nobodys", small(), if_match='"1"')) == (412, "version_mismatch")
    assert served.ask("mine")["prompt"]["version"] == 2


@pytest.mark.parametrize(
    ("headers", "status", "param"),
    [
        ({"x_content_sha256": ""}, 422, "X-Content-SHA256"),
        ({"x_content_sha256": "abc"}, 422, "X-Content-SHA256"),
        ({"x_content_sha256": "A" * 64}, 422, "X-Content-SHA256"),
        ({"if_match": "1"}, 422, "If-Match"),
        ({"if_match": 'W/"1"'}, 422, "If-Match"),
        ({"if_match": '"1", "2"'}, 422, "If-Match"),
        ({"if_match": "*"}, 422, "If-Match"),
        ({"if_none_match": '"1"'}, 422, "If-None-Match"),
        ({"if_match": '"1"', "if_none_match": "*"}, 422, "If-Match"),
    ],
)
def test_headers_that_cannot_be_meant_are_named(
    served: Served, headers: dict[str, str], status: int, param: str
) -> None:
    response = served.put("headers", small(), **headers)
    assert code(response) == (status, "invalid_parameter")
    assert response.json()["error"]["param"] == param


@pytest.mark.parametrize("kind", ["application/json", "multipart/form-data", "text/plain", "application/zip", ""])
def test_only_raw_bytes_are_a_file(served: Served, kind: str) -> None:
    assert code(served.put("typed", small(), content_type=kind)) == (415, "unsupported_media_type")


def test_bytes_that_are_not_those_announced_are_refused(served: Served) -> None:
    assert code(served.put("other", small(), x_content_sha256="0" * 64)) == (422, "prompt_digest_mismatch")


def test_a_body_over_the_largest_file_is_refused_unread_and_while_it_comes(served: Served) -> None:
    most = tiny.shape().max_bytes
    assert code(served.put("large", b"x" * (most + 1))) == (413, "body_too_large")
    pieces = (b"x" * 50_000 for _ in range(most // 50_000 + 2))
    headers = {"content-type": "application/octet-stream", "x-content-sha256": "0" * 64}
    assert code(served.client.put("/v1/prompts/large", content=pieces, headers=headers)) == (413, "body_too_large")
    assert code(served.put("large", b"x" * most)) == (422, "invalid_prompt_file")
    assert served.files("tmp") == []


def bad_values() -> Prompt:
    good = small("bad")
    return replace(good, encoder_key=good.encoder_key.index_fill(2, torch.tensor(0), float("nan")))


def foreign() -> Prompt:
    return small("bad", fingerprint="of another backbone")


def too_wide() -> Prompt:
    c = tiny.config()
    lengths = ((c.encoder_layers, 4), (c.encoder_layers, 4), (c.decoder_layers, 3), (c.decoder_layers, 3))
    sides = [torch.zeros(layers, 2 * c.heads, length, c.head_dim) for layers, length in lengths]
    return Prompt.build(small("bad").manifest, *sides)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (bad_values, "prompt_nonfinite"),
        (foreign, "prompt_backbone_mismatch"),
        (too_wide, "prompt_shape_mismatch"),
        (lambda: small("bad", decoding={"method": "nonsense"}), "invalid_prompt_file"),
    ],
    ids=["not finite", "another backbone", "another width", "decoding"],
)
def test_a_file_that_cannot_be_served_says_why_and_changes_nothing(served: Served, make: object, expected: str) -> None:
    before = served.client.get("/v1/prompts").json()
    assert callable(make)
    assert code(served.put("bad", make())) == (422, expected)
    assert served.client.get("/v1/prompts").json() == before
    assert served.files("tmp") == []


def test_a_name_may_differ_from_the_manifests(served: Served) -> None:
    """Two names of one content: deleting one leaves the other."""
    prompt = small("origin", 5)
    assert served.put("one", prompt).status_code == served.put("two", prompt).status_code == 201
    assert served.ask("one")["output"] == served.ask("two")["output"]
    assert served.client.delete("/v1/prompts/one").status_code == 204
    assert served.ask("two")["prompt"] == {"name": "two", "version": 1, "sha256": prompt.digest}


def test_a_seed_is_a_version_like_any_other(served: Served) -> None:
    assert served.client.get("/v1/prompts/seeded").json()["author"] == "seed"
    assert served.put("seeded", small("seeded", 100)).headers["etag"] == '"2"'
    assert served.client.post("/v1/tasks:reload").json()["changed"] == []
    assert served.ask("seeded")["prompt"]["version"] == 2


# -- looking --------------------------------------------------------------------------------------------------------


def test_versions_are_kept_newest_first_and_can_be_fetched(served: Served) -> None:
    prompts = [small("many", seed) for seed in range(3)]
    for prompt in prompts:
        served.put("many", prompt)
    listed = served.client.get("/v1/prompts/many/versions").json()
    prompt_documents.VersionList.model_validate(listed)
    assert (listed["name"], listed["current"]) == ("many", 3)
    assert [version["version"] for version in listed["versions"]] == [3, 2, 1]
    assert [version["current"] for version in listed["versions"]] == [True, False, False]
    for number, prompt in enumerate(prompts, start=1):
        file = served.client.get(f"/v1/prompts/many/versions/{number}/file")
        assert file.headers["content-type"] == "application/octet-stream"
        assert file.headers["etag"] == f'"{number}"'
        assert file.headers["content-disposition"] == f'attachment; filename="many-{number}.safetensors"'
        assert file.headers["x-content-sha256"] == hashlib.sha256(file.content).hexdigest()
        again = read_prompt(file.content, shape=tiny.shape(), fingerprint=None, dtype=torch.float32)
        assert again.digest == prompt.digest
        assert served.put("fetched", file.content).status_code == 201


def test_names_are_listed_in_pages(served: Served) -> None:
    for number in range(5):
        served.put(f"page-{number}", small(seed=number))
    first = served.client.get("/v1/prompts?after=page-&limit=2").json()
    prompt_documents.PromptPage.model_validate(first)
    assert ([item["name"] for item in first["prompts"]], first["next"]) == (["page-0", "page-1"], "page-1")
    rest = served.client.get(f"/v1/prompts?after={first['next']}&limit=3").json()
    assert [item["name"] for item in rest["prompts"]] == ["page-2", "page-3", "page-4"]
    everyone = served.client.get(f"/v1/prompts?limit={LARGEST_PAGE}").json()
    names = [item["name"] for item in everyone["prompts"]]
    assert (names, everyone["next"]) == (sorted(names), None)
    tasks = served.client.get("/v1/tasks?after=page-1&limit=2").json()
    assert ([task["name"] for task in tasks["tasks"]], tasks["next"]) == (["page-2", "page-3"], "page-3")
    assert served.client.get("/v1/tasks").json()["next"] is None


@pytest.mark.parametrize("query", ["limit=0", f"limit={LARGEST_PAGE + 1}", "limit=x", "limit=-1", f"after={'x' * 256}"])
@pytest.mark.parametrize("route", ["/v1/prompts", "/v1/tasks"])
def test_a_page_has_bounds(served: Served, route: str, query: str) -> None:
    assert code(served.client.get(f"{route}?{query}")) == (422, "invalid_parameter")


@pytest.mark.parametrize(
    ("method", "path", "error"),
    [
        ("GET", "/v1/prompts/nobody", "prompt_not_found"),
        ("GET", "/v1/prompts/nobody/versions", "prompt_not_found"),
        ("GET", "/v1/prompts/nobody/versions/1/file", "prompt_not_found"),
        ("GET", "/v1/prompts/seeded/versions/99/file", "version_not_found"),
        ("GET", "/v1/prompts/seeded/versions/x/file", "version_not_found"),
        ("GET", "/v1/prompts/seeded/versions/-1/file", "version_not_found"),
        ("POST", "/v1/prompts/nobody/rollback", "prompt_not_found"),
        ("POST", "/v1/prompts/nobody/pin", "prompt_not_found"),
        ("POST", "/v1/prompts/nobody/unpin", "prompt_not_found"),
        ("DELETE", "/v1/prompts/nobody", "prompt_not_found"),
    ],
)
def test_what_is_not_there_is_not_found(served: Served, method: str, path: str, error: str) -> None:
    body = {"json": {}} if path.endswith("rollback") else {}
    assert code(served.client.request(method, path, **body)) == (404, error)  # type: ignore[arg-type]


def test_a_wrong_method_is_told_all_the_right_ones(served: Served) -> None:
    response = served.client.post("/v1/prompts/seeded", json={})
    assert code(response) == (405, "method_not_allowed")
    assert response.headers["allow"] == "DELETE, GET, PUT"


# -- changing -------------------------------------------------------------------------------------------------------


def test_a_rollback_serves_the_version_before_or_the_one_named(served: Served) -> None:
    for seed in range(4):
        served.put("back", small("back", seed))
    rolled = served.client.post("/v1/prompts/back/rollback", json={})
    assert (rolled.status_code, rolled.headers["etag"], rolled.json()["current"]) == (200, '"3"', True)
    assert served.ask("back")["prompt"]["sha256"] == small("back", 2).digest
    rolled = served.client.post("/v1/prompts/back/rollback", json={"version": 1}, headers={"if-match": '"3"'})
    assert rolled.json()["version"] == served.ask("back")["prompt"]["version"] == 1
    late = served.client.post("/v1/prompts/back/rollback", json={"version": 2}, headers={"if-match": '"3"'})
    assert code(late) == (412, "version_mismatch")
    assert code(served.client.post("/v1/prompts/back/rollback", json={})) == (404, "version_not_found")
    assert code(served.client.post("/v1/prompts/back/rollback", json={"version": 9})) == (404, "version_not_found")
    assert served.put("back", small("back", 9)).headers["etag"] == '"5"'  # numbers go on


@pytest.mark.parametrize("body", [{"version": 0}, {"version": "1"}, {"version": 10**12}, {"surprise": 1}, [], 3])
def test_a_rollback_says_one_version_or_none(served: Served, body: object) -> None:
    assert code(served.client.post("/v1/prompts/seeded/rollback", json=body)) == (422, "invalid_parameter")


def test_a_deleted_name_is_gone_and_its_numbers_are_not_given_again(served: Served) -> None:
    served.put("gone", small("gone", 1))
    served.put("gone", small("gone", 2))
    late = served.client.delete("/v1/prompts/gone", headers={"if-match": '"1"'})
    assert code(late) == (412, "version_mismatch")
    assert served.client.delete("/v1/prompts/gone", headers={"if-match": '"2"'}).status_code == 204
    for path in ("/v1/prompts/gone", "/v1/prompts/gone/versions", "/v1/prompts/gone/versions/2/file", "/v1/tasks/gone"):
        assert code(served.client.get(path)) == (404, "prompt_not_found")
    refused = served.client.post("/v1/predict", json={"task": "gone", "text": "x"})
    assert code(refused) == (404, "prompt_not_found")
    assert served.put("gone", small("gone", 1), if_none_match="*").headers["etag"] == '"3"'


def test_a_pin_is_shown_and_follows_the_name(served: Served) -> None:
    served.put("kept", small("kept", 1))
    assert served.client.post("/v1/prompts/kept/pin").json()["pinned"] is True
    assert served.put("kept", small("kept", 2)).json()["pinned"] is True
    assert served.client.get("/v1/tasks/kept").json()["pinned"] is True
    assert served.client.post("/v1/prompts/kept/unpin").json()["pinned"] is False
    assert served.client.get("/v1/tasks/kept").json()["pinned"] is False


def test_a_full_registry_takes_new_versions_and_no_new_names(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    served.put("last", small("last", 1))
    monkeypatch.setattr(served.engine.prompts._store, "_max_names", 1)
    assert code(served.put("one-more", small())) == (409, "registry_full")
    assert served.put("last", small("last", 2)).status_code == 201


def test_nothing_is_changed_while_the_server_drains(served: Served) -> None:
    served.put("late", small("late", 1))
    served.application.lifecycle.draining = True
    try:
        assert code(served.put("late", small("late", 2))) == (503, "draining")
        for method, path in (("POST", "late/rollback"), ("POST", "late/pin"), ("DELETE", "late")):
            body = {"json": {}} if path.endswith("rollback") else {}
            assert code(served.client.request(method, f"/v1/prompts/{path}", **body)) == (503, "draining")  # type: ignore[arg-type]
        assert served.ask("late")["prompt"]["version"] == 1
    finally:
        served.application.lifecycle.draining = False
    assert put(served.client, "late", small("late", 2)).status_code == 201


def test_a_registry_outlives_its_server(tmp_path: object, served: Served) -> None:
    """Another engine on the same registry sees what was published, rolled back, pinned and deleted."""
    served.put("durable", small("durable", 1))
    served.put("durable", small("durable", 2))
    served.client.post("/v1/prompts/durable/rollback", json={})
    served.client.post("/v1/prompts/durable/pin")
    served.put("dropped", small("dropped", 1))
    served.client.delete("/v1/prompts/dropped")
    other = tiny.engine(served.root.parent)
    try:
        other.start()
        assert other.prompts.current("durable") == served.engine.prompts.current("durable")
        assert (other.prompts.current("durable").record.version, other.prompts.current("durable").pinned) == (1, True)
        assert other.task("dropped") is None
        served.put("durable", small("durable", 3))
        assert "durable" in other.reload().changed
    finally:
        other.stop(2.0)
