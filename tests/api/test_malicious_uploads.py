"""Files that would run code if anything unpickled them, to every route that takes a body, as every type (A-07)."""

from __future__ import annotations

import base64
import hashlib
import io
import os
import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from api.hostile_files import joined
from api.registry_server import OCTETS, Served, code, serving, small

TYPES = (
    OCTETS,
    "application/json",
    "application/x-python-pickle",
    "application/vnd.pytorch",
    "application/x-numpy",
    "application/zip",
    "application/yaml",
    "multipart/form-data; boundary=x",
    "application/x-www-form-urlencoded",
    "text/plain",
    "",
)


class Malice:
    """Creates a file when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.canary}",)


def payloads(canary: Path) -> dict[str, bytes]:
    """Twelve ways to ask for it."""
    malice = Malice(canary)
    torch_file, array, archive, bomb = (io.BytesIO() for _ in range(4))
    torch.save({"weights": malice}, torch_file)
    np.save(array, np.array([malice], dtype=object), allow_pickle=True)
    with zipfile.ZipFile(archive, "w") as made:
        made.writestr("archive/data.pkl", pickle.dumps(malice))
        made.writestr("../../escaped", b"x")
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as made:
        made.writestr("archive/data.pkl", bytes(50 << 20))
    pickles = {f"a pickle of protocol {number}": pickle.dumps(malice, number) for number in (0, 2, 4, 5)}
    encoded = base64.b64encode(pickle.dumps(malice))
    return {
        **pickles,
        "a torch file": torch_file.getvalue(),
        "an old torch file": pickle.dumps(0x1950A86A20F9469CFC6C) + pickle.dumps(malice),
        "an array of objects": array.getvalue(),
        "an archive": archive.getvalue(),
        "a bomb": bomb.getvalue(),
        "yaml": f"!!python/object/apply:os.system ['touch {canary}']".encode(),
        "a template": f"{{{{ ''.__class__.__mro__[1].__subclasses__() }}}} $(touch {canary}) `touch {canary}`".encode(),
        "a pickle in a header": joined(b'{"__metadata__":{"promptmux":"' + encoded + b'"}}', b""),
    }


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("served")) as running:
        assert running.put("good", small("good")).status_code == 201
        yield running


def refuse(*_: object, **__: object) -> None:
    raise AssertionError("something asked for code out of a file")


def test_nothing_runs_whatever_is_sent_to_whatever_route(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    canary = tmp_path / "canary"
    sent = payloads(canary)
    assert len(sent) == 12
    for module, name in ((pickle, "loads"), (pickle, "load"), (pickle, "Unpickler"), (torch, "load"), (os, "system")):
        monkeypatch.setattr(module, name, refuse)
    before = served.client.get("/v1/prompts").json()
    routes = [("PUT", "/v1/prompts/good"), ("PUT", "/v1/prompts/new"), ("POST", "/v1/prompts/good/rollback")]
    routes += [("POST", "/v1/predict"), ("POST", "/v1/fanout")]
    for data in sent.values():
        for method, path in routes:
            for kind in TYPES:
                headers = {"content-type": kind, "x-content-sha256": hashlib.sha256(data).hexdigest()}
                response = served.client.request(method, path, content=data, headers=headers)
                assert code(response)[0] in (400, 413, 415, 422), (path, kind)
        picture = {"task": "good", "text": "x", "image": base64.b64encode(data).decode()}
        assert code(served.client.post("/v1/predict", json=picture))[0] in (400, 422)
    assert not canary.exists()
    assert served.client.get("/v1/prompts").json() == before
    assert served.files("tmp") == []


def test_the_control_the_payload_works_on_whoever_unpickles_it(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    pickle.loads(payloads(canary)["a pickle of protocol 4"])
    assert canary.exists()
