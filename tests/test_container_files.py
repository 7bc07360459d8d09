"""Dockerfile and docker-compose.yml, read without an engine: no root, nothing writable, nothing that is not there."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
import typer
import yaml

from promptmux_server.cli import app
from promptmux_server.settings import Settings, unknown_variables
from shared_files import ROOT

DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
COMPOSE = (ROOT / "docker-compose.yml").read_text(encoding="utf-8")
PORT = Settings.model_fields["port"].default


def instructions(dockerfile: str) -> list[tuple[str, str]]:
    """(INSTRUCTION, arguments), continued lines joined, comments left out."""
    lines = "\n".join(line for line in dockerfile.splitlines() if not line.lstrip().startswith("#"))
    joined = (line.partition(" ") for line in re.sub(r"\\\n\s*", "", lines).splitlines() if line)
    return [(word.upper(), rest.strip()) for word, _, rest in joined]


def last_stage(dockerfile: str) -> list[tuple[str, str]]:
    steps = instructions(dockerfile)
    start = max(index for index, (word, _) in enumerate(steps) if word == "FROM")
    return steps[start:]


def dockerfile_faults(dockerfile: str) -> list[str]:
    return [
        *_faults_of_steps(instructions(dockerfile)),
        *_faults_of_user(last_stage(dockerfile)),
        *_faults_of_command(last_stage(dockerfile)),
    ]


def _faults_of_steps(steps: list[tuple[str, str]]) -> Iterator[str]:
    visible = {line[1:] for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines() if line[0] == "!"}
    for word, rest in steps:
        if word == "ADD":
            yield "ADD may fetch and unpack: use COPY"
        if word == "FROM" and not re.match(r"[\w/.-]+:\d", rest):
            yield f"the base image {rest} has no version"
        if word == "COPY" and not rest.startswith("--from="):
            for source in rest.split()[:-1]:
                if source not in visible or not (ROOT / source).exists():
                    yield f"the build cannot see {source}"


def _faults_of_user(stage: list[tuple[str, str]]) -> Iterator[str]:
    users = [index for index, (word, _) in enumerate(stage) if word == "USER"]
    if not users or not re.fullmatch(r"[1-9]\d*:[1-9]\d*", stage[users[-1]][1]):
        yield "the image does not end as a numeric user other than root"
    elif any(word == "RUN" for word, _ in stage[users[-1] :]):
        yield "a step runs after USER"


def _faults_of_command(stage: list[tuple[str, str]]) -> Iterator[str]:
    given = dict(stage)
    try:
        entry, arguments = json.loads(given["ENTRYPOINT"]), json.loads(given["CMD"])
    except ValueError:
        yield "ENTRYPOINT and CMD are not in exec form: a shell would keep signals from the server"
        return
    command = typer.main.get_command(app).commands.get(arguments[0])
    options = {name for parameter in command.params for name in parameter.opts} if command else set()
    if entry != ["promptmux"] or not {word for word in arguments[1:] if word.startswith("--")} <= options:
        yield f"the command line knows no {arguments}"
    if given.get("EXPOSE") != str(PORT) or f":{PORT}/livez" not in given.get("HEALTHCHECK", ""):
        yield "the port is not the server's"
    names = re.findall(r"([A-Z_]+)=", " ".join(rest for word, rest in stage if word == "ENV"))
    yield from (f"no setting {name}" for name in unknown_variables(names))


def compose_faults(compose: dict[str, Any]) -> list[str]:
    service = compose["services"]["promptmux"]
    mounts = dict(volume.split(":") for volume in service["volumes"])
    state = dict(re.findall(r"(PROMPTMUX_\w+)=(\S+)", DOCKERFILE))["PROMPTMUX_STATE"]
    drain = sum(float(Settings.model_fields[name].default) for name in ("drain_delay_s", "drain_timeout_s"))
    held = {
        "root may be written": service.get("read_only") is True,
        "not the image's user": service.get("user") == dict(last_stage(DOCKERFILE))["USER"],
        "capabilities are kept": service.get("cap_drop") == ["ALL"],
        "privileges may grow": service.get("security_opt") == ["no-new-privileges:true"],
        "no bound on processes or memory": service.get("pids_limit", 0) > 0 and "mem_limit" in service,
        "the state has no volume": any(mounts.get(name) == state for name in compose["volumes"]),
        "a port is open beyond loopback": all(port.startswith("127.0.0.1:") for port in service["ports"]),
        "the port is not the server's": [port.rsplit(":")[-1] for port in service["ports"]] == [str(PORT)],
        "killed before it has drained": float(service["stop_grace_period"].removesuffix("s")) > drain,
        "unknown settings": unknown_variables(service["environment"]) == [],
        "keys that nobody mounts": service["environment"].get("PROMPTMUX_API_KEYS", "/run/secrets/").rpartition("/")[2]
        in set(service["secrets"]) & compose["secrets"].keys(),
        "an argument that the build does not take": all(
            ("ARG", f'{name}=""') in instructions(DOCKERFILE) for name in service["build"]["args"]
        ),
    }
    return [fault for fault, fine in held.items() if not fine]


def test_the_image_is_built_from_what_is_there_and_runs_as_nobody_in_particular() -> None:
    assert dockerfile_faults(DOCKERFILE) == []


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("USER 10001:10001\n", "", "the image does not end as a numeric user other than root"),
        ("USER 10001:10001", "USER 0:0", "the image does not end as a numeric user other than root"),
        ("USER 10001:10001", "USER 10001:10001\nRUN true", "a step runs after USER"),
        ("COPY server server", "COPY serverr serverr", "the build cannot see serverr"),
        ("COPY server server", "COPY tests tests", "the build cannot see tests"),
        ("COPY server server", "ADD server server", "ADD may fetch and unpack: use COPY"),
        ("FROM python:3.11-slim AS build", "FROM python AS build", "the base image python AS build has no version"),
        ('["promptmux"]', "promptmux", "ENTRYPOINT and CMD are not in exec form: a shell would keep signals from"),
        ('"--host"', '"--hots"', "the command line knows no ['serve', '--hots', '0.0.0.0']"),
        ("EXPOSE 8000", "EXPOSE 80", "the port is not the server's"),
        ("PROMPTMUX_STATE=", "PROMPTMUX_STAT=", "no setting PROMPTMUX_STAT"),
    ],
)
def test_a_fault_planted_in_the_dockerfile_is_seen(old: str, new: str, fault: str) -> None:
    assert old in DOCKERFILE
    assert [seen for seen in dockerfile_faults(DOCKERFILE.replace(old, new)) if seen.startswith(fault)] != []


def test_the_composed_service_is_locked_down() -> None:
    assert compose_faults(yaml.safe_load(COMPOSE)) == []


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("read_only: true", "read_only: false", "root may be written"),
        ('user: "10001:10001"', 'user: "0:0"', "not the image's user"),
        ("[ALL]", "[NET_RAW]", "capabilities are kept"),
        ("no-new-privileges:true", "seccomp:unconfined", "privileges may grow"),
        ("pids_limit: 256", "pids_limit: 0", "no bound on processes or memory"),
        ("state:/var/lib/promptmux", "state:/data", "the state has no volume"),
        ("127.0.0.1:8000:8000", "8000:8000", "a port is open beyond loopback"),
        (":8000:8000", ":8000:80", "the port is not the server's"),
        ("45s", "10s", "killed before it has drained"),
        ("PROMPTMUX_API_KEYS:", "PROMPTMUX_APIKEYS:", "unknown settings"),
        ("secrets: [api_keys]", "secrets: []", "keys that nobody mounts"),
        ("PIP_EXTRA_INDEX_URL:", "PIP_INDEX:", "an argument that the build does not take"),
    ],
)
def test_a_fault_planted_in_the_composed_service_is_seen(old: str, new: str, fault: str) -> None:
    assert old in COMPOSE
    assert fault in compose_faults(yaml.safe_load(COMPOSE.replace(old, new)))
