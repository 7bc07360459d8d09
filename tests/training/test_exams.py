"""What a run is scored on: captions of one picture are one question with all of its references."""

from __future__ import annotations

from pathlib import Path

import pytest

from promptmux_prompts import Kind
from promptmux_server.training.data.survey import Rows
from promptmux_server.training.validation import Exam, exam_of
from training.data.data_files import encoder, picture, pictures, standard, surveyed, write_json, write_jsonl, write_tsv


def exam(path: Path, kind: Kind = "caption", most: int = 100) -> Exam:
    return exam_of([rows(path, kind)], most, kind)


def rows(path: Path, kind: Kind = "caption") -> Rows:
    return surveyed(path, encoder(kind)).rows()


def references(found: Exam) -> list[list[str]]:
    return [list(question.sample.references) or [str(question.sample.target)] for question in found.questions]


def test_lines_about_one_picture_are_one_question_wherever_they_stand(tmp_path: Path) -> None:
    pictures(tmp_path, 3)
    said = [(0, "a dog"), (1, "a cat"), (0, "one dog"), (2, "a bird"), (0, "a dog"), (1, "one cat")]
    path = write_jsonl(tmp_path / "data.jsonl", [{"image": f"{i}.png", "caption": text} for i, text in said])
    found = exam(path)
    assert references(found) == [["a dog", "one dog"], ["a cat", "one cat"], ["a bird"]]
    assert [question.place.line for question in found.questions] == [1, 2, 4]
    assert found.metric == "cider"


def test_lines_that_share_a_hash_by_accident_stay_apart(tmp_path: Path) -> None:
    pictures(tmp_path, 2)
    lines = [{"image": f"{i}.png", "caption": text} for i, text in ((0, "a dog"), (1, "a cat"), (0, "one dog"))]
    chosen = rows(write_jsonl(tmp_path / "data.jsonl", lines))
    collided = Rows(chosen.source, chosen.lines, chosen.groups * 0)
    assert references(exam_of([collided], 100, "caption")) == [["a dog", "one dog"], ["a cat"]]


def test_cocos_captions_of_one_picture_are_asked_once(tmp_path: Path) -> None:
    pictures(tmp_path, 2)
    long = " ".join(f"word{i}" for i in range(25))
    captions = [(1, "A dog, asleep."), (2, "a cat"), (1, long)]
    document = {
        "images": [{"id": i, "file_name": f"{i - 1}.png"} for i in (1, 2)],
        "annotations": [{"id": n, "image_id": i, "caption": text} for n, (i, text) in enumerate(captions)],
    }
    found = exam(write_json(tmp_path / "data.json", document))
    assert references(found) == [["A dog asleep", long], ["a cat"]]  # whole, where a target ends after 20 words


def test_ofas_captions_keep_all_words_as_references(tmp_path: Path) -> None:
    long = " ".join(f"word{i}" for i in range(25))
    path = write_tsv(tmp_path / "data.tsv", [("1", "a", f"a dog.&&{long}", "", standard(picture()))])
    found = exam(path)
    assert references(found) == [["a dog", long]]
    assert found.metric == "word_f1"  # one picture


def test_other_kinds_ask_every_line(tmp_path: Path) -> None:
    pictures(tmp_path, 1)
    lines = [{"image": "0.png", "text": "what", "answer": text} for text in ("dog", "cat", "bird")]
    found = exam(write_jsonl(tmp_path / "data.jsonl", lines), "answer")
    assert [question.sample.target for question in found.questions] == ["dog", "cat", "bird"]
    assert found.metric == "accuracy"


@pytest.mark.parametrize("most", [1, 2, 5])
def test_at_most_so_many_pictures_are_asked_about_the_same_every_time(tmp_path: Path, most: int) -> None:
    pictures(tmp_path, 6)
    lines = [{"image": f"{i % 6}.png", "caption": f"number {i % 6}"} for i in range(12)]
    path = write_jsonl(tmp_path / "data.jsonl", lines)
    asked = [question.sample.target for question in exam(path, most=most).questions]
    assert len(asked) == most
    assert asked == [question.sample.target for question in exam(path, most=most).questions]
    assert asked[-1] == f"number {(most - 1) * 6 // most}"


def test_a_metric_that_is_asked_for_is_taken(tmp_path: Path) -> None:
    pictures(tmp_path, 2)
    lines = [{"image": f"{i}.png", "caption": f"number {i}"} for i in range(2)]
    chosen = rows(write_jsonl(tmp_path / "data.jsonl", lines))
    assert exam_of([chosen], 10, "caption", "word_f1").metric == "word_f1"
