"""`promptmux data check` as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from promptmux_server.cli import app
from training.data.data_files import picture, pictures, standard, write_json, write_jsonl, write_tsv

CAPTIONS = [{"image": f"{number}.png", "caption": f"picture number {number}"} for number in range(3)]


def check(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["data", "check", *map(str, arguments)], env={"COLUMNS": "200", "NO_COLOR": "1"})


def test_the_first_samples_are_shown_as_the_model_meets_them(tmp_path: Path) -> None:
    pictures(tmp_path / "pets", 3)
    path = write_jsonl(tmp_path / "pets.jsonl", CAPTIONS)
    shown = check(path, "--task", "caption", "--images", tmp_path / "pets", "--show", "2", "--pictures")
    assert shown.exit_code == 0, shown.output
    assert "pets.jsonl, line 2" in shown.output
    assert "line 3" not in shown.output
    assert "what does the image describe?" in shown.output
    assert "picture number 1" in shown.output
    assert "40 x 20" in shown.output
    assert "3 samples can be learned from." in shown.output


def test_programs_get_json(tmp_path: Path) -> None:
    lines = [{"text": "the cat", "answer": "a dog"}] * 2
    path = write_jsonl(tmp_path / "texts.jsonl", lines)
    arguments = (path, "--task", "text", "--no-image", "--instruction", " say {text} again", "--json")
    found = json.loads(check(*arguments).stdout)
    assert found["samples"] == 2
    assert found["first"][0] == {
        "place": "texts.jsonl, line 1",
        "picture": None,
        "reads": "say the cat again",
        "writes": "a dog",
        "confidence": 1.0,
    }
    assert len(found["sha256"]) == 64


def test_wrong_lines_are_refused_by_number_unless_they_are_allowed(tmp_path: Path) -> None:
    pictures(tmp_path, 3)
    path = write_jsonl(tmp_path / "data.jsonl", [*CAPTIONS, {"image": "7.png", "caption": "none"}])
    refused = check(path, "--task", "caption")
    assert refused.exit_code == 1
    assert "data.jsonl, line 4: there is no such picture" in refused.stderr
    allowed = check(path, "--task", "caption", "--skip-bad", "1")
    assert allowed.exit_code == 0
    assert "3 samples" in allowed.output
    assert "left out: data.jsonl, line 4" in allowed.output
    assert json.loads(check(path, "--task", "caption", "--skip-bad", "1", "--json").stdout)["skipped"] == 1


def test_labels_are_those_of_the_data_or_of_a_file(tmp_path: Path) -> None:
    image = standard(picture())
    rows = [["1", "i", image, "a cat", "premise", label] for label in ("entailment", "neutral")]
    path = write_tsv(tmp_path / "snli.tsv", rows)
    found = json.loads(check(path, "--task", "label", "--json").stdout)
    assert [sample["writes"] for sample in found["first"]] == ["yes", "maybe"]
    (tmp_path / "labels.txt").write_text("entailment\nother\n")
    assert check(path, "--task", "label", "--answers", tmp_path / "labels.txt").exit_code == 1


def test_coco_documents_are_read_with_their_options(tmp_path: Path) -> None:
    (tmp_path / "7.png").write_bytes(picture())
    questions = write_json(tmp_path / "q.json", {"questions": [{"question_id": 1, "image_id": 7, "question": "what"}]})
    beside = write_json(tmp_path / "a.json", {"annotations": [{"question_id": 1, "answers": [{"answer": "cat"}]}]})
    options = ("--task", "answer", "--annotations", beside, "--image-name", "%d.png", "--json")
    (sample,) = json.loads(check(questions, *options).stdout)["first"]
    assert (sample["place"], sample["reads"], sample["writes"]) == ("q.json, annotations[0]", "what?", "cat")


def test_help_shows_an_example() -> None:
    assert "Example: promptmux data check pets.jsonl" in " ".join(check("--help").output.split())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--task", "essay"), "--task must be one of"),
        (("--task", "caption", "--backbone", "/nowhere"), "no backbone"),
        (("--task", "caption", "--instruction", " {texts}"), "no such task"),
        (("--task", "caption", "--format", "csv"), "say its format"),
        (("--task", "answer", "--answers", "/nowhere"), "cannot be read"),
    ],
)
def test_mistakes_are_one_line_and_status_one(tmp_path: Path, arguments: tuple[str, ...], said: str) -> None:
    pictures(tmp_path, 3)
    refused = check(write_jsonl(tmp_path / "data.jsonl", CAPTIONS), *arguments)
    assert refused.exit_code == 1
    assert said in refused.stderr
