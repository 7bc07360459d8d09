"""OFA's files, column by column, and every way in which a line of them can be wrong."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from promptmux_prompts import Kind
from promptmux_server.backbone.images import ImageLimits
from promptmux_server.errors import DataError
from training.data.data_files import encoder, opened, picture, standard, surveyed, url_safe, write_tsv

LIMITS = ImageLimits()

ROWS: dict[Kind, list[str]] = {
    "box": ["1", "img", "the dog", "1.5,2,20,10.25", "PICTURE"],
    "label": ["1", "img", "PICTURE", "there is a cat", "a cat and a dog", "entailment"],
    "answer": ["1", "img", "what is it?", "0.3|!+a bird&&1.0|!+a cat&&0.6|!+a dog", "dog&&cat", "PICTURE"],
    "caption": ["1", "img", "The cat, left of the dog.", "dog&&cat", "PICTURE"],
}


def row(kind: Kind, *changes: tuple[int, str], image: bytes | None = None) -> list[str]:
    """A good line of a kind, with some columns changed."""
    columns = [standard(image or picture()) if value == "PICTURE" else value for value in ROWS[kind]]
    for column, value in changes:
        columns[column] = value
    return columns


@pytest.mark.parametrize("alphabet", [standard, url_safe])
@pytest.mark.parametrize("kind", ["box", "label", "answer", "caption"])
def test_every_kind_is_read_in_both_alphabets(tmp_path: Path, kind: Kind, alphabet: Callable[[bytes], str]) -> None:
    written = next(p for p in (picture(seed) for seed in range(99)) if {"+", "/"} <= set(standard(p)))
    column = [i for i, value in enumerate(ROWS[kind]) if value == "PICTURE"]
    path = write_tsv(tmp_path / "file.tsv", [row(kind, (column[0], alphabet(written)))])
    sample = opened(path, kind, premise=True).sample(0)
    assert sample.picture is not None
    assert sample.picture.read(LIMITS) == written
    assert (sample.target, sample.confidence) == {
        "box": ((1.5, 2.0, 20.0, 10.25), 1.0),
        "label": ("entailment", 1.0),
        "answer": ("a cat", 1.0),
        "caption": ("The cat left of the dog", 1.0),
    }[kind]
    assert sample.text == {"box": "the dog", "label": "there is a cat", "answer": "what is it?", "caption": None}[kind]
    assert sample.premise == ("a cat and a dog" if kind == "label" else None)
    assert sample.group == "img"


def test_the_premise_is_left_to_tasks_that_take_one(tmp_path: Path) -> None:
    path = write_tsv(tmp_path / "file.tsv", [row("label")])
    assert opened(path, "label").sample(0).premise is None


def test_of_several_answers_the_surest_is_learned_and_all_count(tmp_path: Path) -> None:
    answers = "0.3|!+a bird&&0.9|!+a cat&&0.6|!+a dog"
    sample = opened(write_tsv(tmp_path / "file.tsv", [row("answer", (3, answers))]), "answer").sample(0)
    assert (sample.target, sample.confidence) == ("a cat", 0.9)
    assert sample.references == {"a bird": 0.3, "a cat": 0.9, "a dog": 0.6}


def test_captions_lose_punctuation_and_end_after_twenty_words(tmp_path: Path) -> None:
    long = "A " + "very " * 30 + "long caption."
    path = write_tsv(tmp_path / "file.tsv", [row("caption", (2, long)), row("caption", (2, "A cat!&&One dog."))])
    source = opened(path, "caption")
    assert source.sample(0).target == "A" + " very" * 19
    assert source.sample(1).target == "A cat"
    assert list(source.sample(1).references) == ["A cat", "One dog"]


def test_lines_may_end_as_on_windows_and_the_last_one_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "file.tsv"
    path.write_bytes("\r\n".join("\t".join(row("label")) for _ in range(2)).encode())
    source = opened(path, "label")
    assert [source.sample(number).target for number in range(len(source))] == ["entailment"] * 2


BAD: list[tuple[Kind, Sequence[tuple[int, str]], str]] = [
    ("caption", [(2, " ")], "caption must be a text"),
    ("caption", [(2, "one&&...")], "each caption must be a text"),
    ("caption", [(4, "")], "picture's column must be a text"),
    ("caption", [(4, "!!!!")], "cannot be decoded"),
    ("caption", [(4, standard(b"not a picture"))], "cannot be decoded"),
    ("caption", [(4, standard(picture()[:40]))], "cannot be decoded"),
    ("caption", [(2, "a\tcat")], "has 6 columns, and 5 are needed"),
    ("answer", [(3, "yes")], r"each answer's confidence, as in `1.0\|!\+yes`"),
    ("answer", [(3, "high|!+yes")], "each answer's confidence"),
    ("answer", [(3, "0|!+yes")], "each answer's confidence"),
    ("answer", [(3, "nan|!+yes")], "each answer's confidence"),
    ("answer", [(3, "1.5|!+yes")], "each answer's confidence"),
    ("answer", [(3, "1.0|!+")], "each answer must be a text"),
    ("answer", [(2, "")], "text's column must be a text"),
    ("box", [(3, "1,2,3")], "must be four numbers"),
    ("box", [(3, "1,2,x,4")], "must be four numbers"),
    ("box", [(3, "1,2,inf,4")], "must be four numbers"),
    ("box", [(3, "20,2,10,10")], "x0 < x1"),
    ("box", [(3, "1,2,20,100")], "leaves the picture"),
    ("label", [(5, "perhaps")], "none of the task's answers"),
]


@pytest.mark.parametrize(("kind", "changes", "reason"), BAD, ids=[f"{k}-{r[:24]}" for k, _, r in BAD])
def test_a_bad_line_is_named_and_says_why(
    tmp_path: Path, kind: Kind, changes: Sequence[tuple[int, str]], reason: str
) -> None:
    path = write_tsv(tmp_path / "file.tsv", [row(kind), row(kind, *changes), row(kind)])
    labels = {"yes": "entailment"} if kind == "label" else None
    found = surveyed(path, encoder(kind, labels=labels))
    assert (len(found.found), found.bad_count) == (2, 1)
    with pytest.raises(DataError, match=rf"file.tsv, line 2: .*{reason}"):
        found.allow(0)


def test_bytes_that_are_no_text_are_a_bad_line(tmp_path: Path) -> None:
    path = write_tsv(tmp_path / "file.tsv", [row("caption")])
    path.write_bytes(path.read_bytes() + b"\xff\t\t\t\t\n")
    with pytest.raises(DataError, match="line 2: not UTF-8"):
        surveyed(path, encoder("caption")).allow(0)


def test_there_is_no_such_file_for_plain_texts(tmp_path: Path) -> None:
    path = write_tsv(tmp_path / "file.tsv", [row("caption")])
    with pytest.raises(DataError, match="write JSON lines"):
        opened(path, "text")
