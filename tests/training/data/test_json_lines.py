"""Our own format: its fields, and every way in which a line can be wrong."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from promptmux_prompts import Kind
from promptmux_server.errors import DataError
from training.data.data_files import encoder, opened, pictures, surveyed, write_jsonl

GOOD: dict[Kind, dict[str, Any]] = {
    "caption": {"image": "0.png", "caption": "a cat"},
    "answer": {
        "image": "0.png",
        "text": "what is it",
        "answer": "a cat",
        "confidence": 0.5,
        "references": {"a cat": 0.5},
    },
    "label": {"image": "0.png", "text": "there is a cat", "label": "entailment"},
    "box": {"image": "0.png", "text": "the cat", "box": [1, 2.5, 30, 20]},
    "text": {"image": "0.png", "text": "what is it", "answer": "a cat"},
}


def task(kind: Kind) -> Any:
    return encoder(kind, labels={"yes": "entailment", "no": "contradiction"} if kind == "label" else None)


@pytest.mark.parametrize("kind", list(GOOD))
def test_every_kind_is_read(tmp_path: Path, kind: Kind) -> None:
    pictures(tmp_path, 1)
    path = write_jsonl(tmp_path / "data.jsonl", [GOOD[kind]])
    assert surveyed(path, task(kind)).allow(0).bad_count == 0
    sample = opened(path, kind).sample(0)
    assert sample.target == {"caption": "a cat", "label": "entailment", "box": (1.0, 2.5, 30.0, 20.0)}.get(
        kind, "a cat"
    )
    assert sample.text == GOOD[kind].get("text")
    assert sample.group == "0.png"
    assert (sample.confidence, sample.references) == ((0.5, {"a cat": 0.5}) if kind == "answer" else (1.0, {}))


def test_one_file_may_serve_tasks_of_several_kinds(tmp_path: Path) -> None:
    line = {"id": 7, "image": "0.png", "text": "the cat", "label": "cat", "box": [0, 0, 4, 4]}
    path = write_jsonl(tmp_path / "data.jsonl", [line])
    assert opened(path, "label").sample(0).target == "cat"
    assert opened(path, "box").sample(0).target == (0.0, 0.0, 4.0, 4.0)


def test_pictures_lie_in_a_folder_of_their_own_if_one_is_named(tmp_path: Path) -> None:
    pictures(tmp_path / "else" / "deep", 1)
    path = write_jsonl(tmp_path / "data.jsonl", [{"image": "deep/0.png", "caption": "a cat"}])
    assert surveyed(path, task("caption"), images=tmp_path / "else").bad_count == 0
    assert surveyed(path, task("caption")).bad_count == 1
    with pytest.raises(DataError, match="folder of pictures is not there"):
        opened(path, "caption", images=tmp_path / "nowhere")


def test_a_byte_order_mark_in_front_is_no_fault(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "data.jsonl", ['\ufeff{"text": "a", "answer": "one"}'])
    assert opened(path, "text").sample(0).target == "one"


BAD: list[tuple[Kind, Mapping[str, Any] | str, str]] = [
    ("caption", "", "not one JSON object"),
    ("caption", "{", "not one JSON object"),
    ("caption", "[]", "must be one JSON object"),
    ("caption", '{"caption": "a", "caption": "b"}', "each field once"),
    ("text", '{"text": "a", "answer": "b", "confidence": NaN}', "no NaN"),
    ("caption", {**GOOD["caption"], "captoin": "typo"}, "fields that nothing reads"),
    ("caption", {"image": "0.png"}, "lacks `caption`"),
    ("caption", {"image": "0.png", "caption": 5}, "`caption` must be a text"),
    ("caption", {"image": "0.png", "caption": " "}, "`caption` must be a text"),
    ("caption", {"image": "0.png", "caption": "\ud800"}, "half a character|not one JSON"),
    ("caption", {"caption": "a cat"}, "needs a picture"),
    ("caption", {"image": 7, "caption": "a cat"}, "`image` must be a text"),
    ("caption", {"image": "9.png", "caption": "a cat"}, "there is no such picture"),
    ("caption", {"image": "../0.png", "caption": "a cat"}, "within the folder"),
    ("caption", {"image": "/etc/passwd", "caption": "a cat"}, "within the folder"),
    ("caption", {"image": "0.png\0", "caption": "a cat"}, "within the folder"),
    ("caption", {"image": "folder", "caption": "a cat"}, "file cannot be read"),
    ("caption", {"image": "broken.png", "caption": "a cat"}, "cannot be decoded"),
    ("caption", {**GOOD["caption"], "text": "a text"}, "takes no `text`"),
    ("answer", {"image": "0.png", "answer": "a cat"}, "needs `text`"),
    ("answer", {**GOOD["answer"], "premise": "a premise"}, "takes no `premise`"),
    ("answer", {**GOOD["answer"], "confidence": 0}, "`confidence` must be a number above 0"),
    ("answer", {**GOOD["answer"], "confidence": True}, "`confidence` must be a number above 0"),
    ("answer", {**GOOD["answer"], "references": ["a"]}, "`references` must be an object"),
    ("answer", {**GOOD["answer"], "references": {"a": 2}}, "number of `references`"),
    ("answer", {**GOOD["answer"], "text": "dog " * 3000}, "more than 4096 characters"),
    ("answer", {**GOOD["answer"], "answer": "x" * 200}, "tokens, and the backbone reads 128"),
    ("box", {**GOOD["box"], "box": [1, 2, 3]}, "`box` must be four numbers"),
    ("box", {**GOOD["box"], "box": "1,2,3,4"}, "`box` must be four numbers"),
    ("box", {**GOOD["box"], "box": [1, 2, 42, 20]}, "leaves the picture"),
    ("label", {**GOOD["label"], "label": "neutral"}, "none of the task's answers"),
]


@pytest.mark.parametrize(("kind", "line", "reason"), BAD, ids=[f"{k}-{r[:28]}" for k, _, r in BAD])
def test_a_bad_line_is_named_and_says_why(
    tmp_path: Path, kind: Kind, line: Mapping[str, Any] | str, reason: str
) -> None:
    pictures(tmp_path, 1)
    (tmp_path / "folder").mkdir()
    (tmp_path / "broken.png").write_bytes(b"no picture")
    found = surveyed(write_jsonl(tmp_path / "data.jsonl", [GOOD[kind], line, GOOD[kind]]), task(kind))
    assert (len(found.found), found.bad_count) == (2, 1)
    with pytest.raises(DataError, match=rf"data.jsonl, line 2: .*({reason})"):
        found.allow(0)


def test_a_file_without_a_known_suffix_needs_its_format(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "data.txt", [{"text": "a", "answer": "one"}])
    with pytest.raises(DataError, match="say its format"):
        opened(path, "text")
    assert opened(path, "text", format="jsonl").sample(0).target == "one"
