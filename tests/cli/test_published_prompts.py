"""Prompts to begin from are the same whether they lie in a folder, in a registry, or behind a server."""

from __future__ import annotations

from pathlib import Path

import pytest

import tiny
from api.registry_server import serving
from cli.scripted_server import scripted_server
from promptmux._prompt_wire import PAGE
from promptmux_prompts import Refusal
from promptmux_server.cli.published import published
from promptmux_server.errors import TrainingConfigError
from promptmux_server.training.published import Found, Published


def contents(place: Published) -> dict[str, str]:
    read = [place.read(name) for name in place.names()]
    return {found.name: found.prompt.digest for found in read if isinstance(found, Found)}


def test_every_place_gives_the_same_prompts(tmp_path: Path) -> None:
    prompts = [tiny.prompt("vqa", seed=1), tiny.prompt("caption", seed=2)]
    expected = {prompt.manifest.name: prompt.digest for prompt in prompts}
    with serving(tmp_path, *prompts) as served:
        served.client.delete("/v1/prompts/gone")
        for place in (str(tmp_path), str(served.root), f"http://127.0.0.1:{served.port}"):
            opened = published(place, tiny.backbone())
            assert contents(opened) == expected
            missing = opened.read("nothing")
            assert isinstance(missing, Refusal)
            assert missing.name == "nothing"


def test_a_name_that_was_deleted_or_replaced_stands_for_what_it_stands_for_now(tmp_path: Path) -> None:
    newer = tiny.prompt("vqa", seed=5)
    with serving(tmp_path, tiny.prompt("vqa", seed=1), tiny.prompt("caption", seed=2)) as served:
        assert served.put("vqa", newer).status_code == 201
        assert served.client.delete("/v1/prompts/caption").status_code == 204
        for place in (str(served.root), f"http://127.0.0.1:{served.port}"):
            assert contents(published(place, tiny.backbone())) == {"vqa": newer.digest}


def test_a_damaged_blob_is_refused_and_the_others_are_read(tmp_path: Path) -> None:
    with serving(tmp_path, tiny.prompt("vqa", seed=1)) as served:
        for blob in (served.root / "blobs").rglob("*"):
            if blob.is_file():
                blob.chmod(0o644)
                blob.write_bytes(b"damaged")
        found = published(str(served.root), tiny.backbone()).read("vqa")
    assert isinstance(found, Refusal)


def test_a_server_that_does_not_help_is_an_error_with_a_way_on() -> None:
    with scripted_server() as server:
        server.refuse(f"GET /v1/prompts?limit={PAGE}", 401, "unauthorized")
        with pytest.raises(TrainingConfigError, match=r"begin\.among: the server does not help: .*PROMPTMUX_API_KEY"):
            list(published(server.address, tiny.backbone()).names())
    with pytest.raises(TrainingConfigError, match=r"begin\.among: the server does not help"):
        list(published("http://127.0.0.1:9", tiny.backbone()).names())
