"""The commands as a user runs them: real processes, the shipped backbone, loopback only."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from promptmux import BoxOutput, CaptionOutput, Client, Item, LabelOutput
from promptmux_server.pocket.recipes import POCKET_TASKS
from shared_files import ROOT, golden_dir

sys.path.insert(0, str(ROOT / "examples"))
import demo

import fanout
import publish

EXAMPLES = ROOT / "examples"


def promptmux(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "promptmux_server", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "COLUMNS": "160", "NO_COLOR": "1", **environment},
    )


@pytest.mark.parametrize("command", ["serve", "predict", "fanout", "tasks", "convert"])
def test_every_command_shows_an_example(command: str) -> None:
    shown = promptmux(command, "--help")
    assert shown.returncode == 0
    assert f"promptmux {command}" in shown.stdout
    assert "Example" in shown.stdout


def test_help_needs_no_torch() -> None:
    code = "import sys; import promptmux_server.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "environment", "said"),
    [
        (("serve", "--host", "0.0.0.0"), {}, "refusing to listen"),
        (("serve", "--backbone", "/nowhere"), {}, "no backbone"),
        (("serve", "--prompts", "/nowhere"), {}, "no prompt directory"),
        (("serve",), {"PROMPTMUX_TYPO": "1"}, "PROMPTMUX_TYPO"),
        (("serve",), {"PROMPTMUX_API_KEYS": "/nowhere"}, "key file cannot be read"),
        (("serve",), {"PROMPTMUX_FAULT": "publish.checked:kill"}, "for tests of this server"),
        (("serve", "--allow-faults"), {"PROMPTMUX_FAULT": "nonsense"}, "a fault is written"),
        (("tasks", "--url", "http://127.0.0.1:9"), {}, "Cannot reach"),
        (("convert", "/nowhere", "/tmp/x"), {}, "no backbone"),
    ],
)
def test_a_mistake_is_explained_and_ends_with_status_1(
    arguments: tuple[str, ...], environment: dict[str, str], said: str
) -> None:
    done = promptmux(*arguments, **environment)
    assert done.returncode == 1
    assert said in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("source", ["fairseq_prefix.pt", "hf"])
def test_convert_says_what_it_wrote(source: str, tmp_path: Path) -> None:
    done = promptmux("convert", str(golden_dir() / source), str(tmp_path / "out"), "--json")
    report = json.loads(done.stdout)
    assert (tmp_path / "out" / "model.safetensors").exists()
    assert re.fullmatch("[0-9a-f]{64}", report["fingerprint"])
    assert len(report["prompts"]) == (source == "fairseq_prefix.pt")


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with demo.server() as address:
        yield address


def test_the_shipped_tasks_answer_the_example_pictures_in_one_call(address: str) -> None:
    asked = demo.items()
    with Client(address) as client:
        answers = client.predict_many(asked)
    assert len(answers) >= 8
    assert len({answer.task for answer in answers}) == 7
    assert not [answer.error for answer in answers if answer.error]
    kinds = {type(answer.output) for answer in answers}
    assert {CaptionOutput, LabelOutput, BoxOutput} <= kinds


def test_the_same_item_answers_the_same_alone_and_in_company(address: str) -> None:
    asked = demo.items()
    with Client(address) as client:
        together = client.predict_many(asked)
        for item, mixed in zip(asked, together, strict=True):
            alone = client.predict(task=item.task, image=item.image, text=item.text)
            if isinstance(mixed.output, LabelOutput):
                assert isinstance(alone.output, LabelOutput)
                assert alone.output.label == mixed.output.label
            else:
                assert alone.output == mixed.output


def test_tasks_list_the_library_with_its_scores(address: str) -> None:
    done = promptmux("tasks", "--url", address, "--json")
    found = {task["name"]: task for task in json.loads(done.stdout)}
    assert set(found) == set(POCKET_TASKS)
    for task in found.values():
        assert task["metric"]["n"] >= 780
        assert task["encoder_length"] <= 64


def test_predict_prints_a_table_or_json(address: str) -> None:
    picture = str(EXAMPLES / "scene-01.png")
    table = promptmux("predict", "--url", address, "--task", "scene-caption", "--image", picture)
    assert "scene-caption" in table.stdout
    raw = promptmux("predict", "--url", address, "--task", "scene-caption", "--image", picture, "--json")
    assert json.loads(raw.stdout)[0]["output"]["kind"] == "caption"
    failed = promptmux("predict", "--url", address, "--task", "nobody", "--image", picture)
    assert failed.returncode == 1


def test_fanout_asks_what_fits_or_what_is_named(address: str) -> None:
    picture = str(EXAMPLES / "scene-01.png")

    def tasks_of(*arguments: str) -> set[str]:
        done = promptmux("fanout", picture, "--url", address, "--json", *arguments)
        assert done.returncode == 0, done.stderr
        return {answer["task"] for answer in json.loads(done.stdout)}

    assert tasks_of() == {"scene-caption", "scene-odd-one-out"}
    assert {"scene-caption", "scene-vqa", "scene-entailment"} <= tasks_of("--text", "there is a cat")
    assert tasks_of("--tasks", "scene-caption,scene-vqa", "--text", "is there a cat?") == {"scene-caption", "scene-vqa"}
    failed = promptmux("fanout", picture, "--url", address, "--tasks", "scene-caption,nobody")
    assert failed.returncode == 1
    assert "nobody" in failed.stdout


def test_predict_prints_a_text_while_it_grows(address: str) -> None:
    arguments = ("--task", "scene-caption", "--image", str(EXAMPLES / "scene-01.png"), "--url", address, "--stream")
    events = [json.loads(line) for line in promptmux("predict", *arguments, "--json").stdout.splitlines()]
    *deltas, answer = events
    assert len(deltas) > 2
    assert "".join(delta["text"] for delta in deltas) == answer["output"]["text"]
    assert promptmux("predict", *arguments).stdout == f"scene-caption: {answer['output']['text']}\n"
    assert promptmux("predict", *arguments[2:], "--task", "nobody").returncode == 1


def test_the_example_asks_many_tasks_and_spells_a_caption(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert fanout.main(address) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["scene-caption", "scene-entailment", "scene-vqa", "word by word"]
    assert len(lines[-1]) > 20


def test_a_prompt_is_fetched_published_rolled_back_and_deleted(address: str, tmp_path: Path) -> None:
    def prompts(*arguments: str) -> str:
        done = promptmux("prompts", *arguments, "--url", address)
        assert done.returncode == 0, done.stderr
        return done.stdout

    file, worse = tmp_path / "caption.safetensors", tmp_path / "worse.safetensors"
    assert prompts("pull", "scene-caption", "-o", str(file)).startswith("scene-caption@1 -> ")
    worse.write_bytes(publish.weaker(file.read_bytes()))
    assert prompts("push", str(file), "--name", "mine", "--new").startswith("mine@1 is served now")
    assert prompts("push", str(worse), "--name", "mine", "--if-version", "1").startswith("mine@2 is served now")
    assert json.loads(prompts("rollback", "mine", "--json"))["version"] == 1
    present = {version["name"]: version["version"] for version in json.loads(prompts("list", "--json"))}
    assert present["mine"] == 1
    assert prompts("delete", "mine", "--yes") == "mine is deleted\n"


def test_the_example_publishes_and_rolls_back(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert publish.main(address) == 0
    good, worse, again = (line.split(": ", 2)[2] for line in capsys.readouterr().out.splitlines())
    assert good == again != worse


def test_sigterm_turns_readiness_off_finishes_and_exits_0(tmp_path: Path) -> None:
    port = demo.free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "promptmux_server", "serve", "--port", str(port), "--metrics-port", "0"],
        env={**os.environ, "PROMPTMUX_STATE": str(tmp_path), "PROMPTMUX_DRAIN_DELAY_S": "1.5"},
        stderr=subprocess.DEVNULL,
    )
    try:
        with Client(f"http://127.0.0.1:{port}") as client:
            deadline = time.monotonic() + 120
            while not client.ready():
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.1)
            process.send_signal(signal.SIGTERM)
            time.sleep(0.5)
            assert not client.ready()
            item = Item(task="scene-caption", image=EXAMPLES / "scene-01.png")
            assert client.predict_many([item])[0].output is not None  # still served during the delay
            assert process.wait(30) == 0
    finally:
        process.kill()
