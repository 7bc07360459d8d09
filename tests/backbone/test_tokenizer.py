"""Text and ids: the released vocabulary's worked examples, and round trips."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from promptmux_server.backbone.tokenizer import Tokenizer
from promptmux_server.errors import BackboneFileError
from shared_files import ofa_bpe_dir

EXAMPLES = {
    " yes": [4420],
    " no": [117],
    " maybe": [2085],
    " what does the image describe?": [99, 473, 5, 2274, 6190, 116],
    " what color is the cat?": [99, 3195, 16, 5, 4758, 116],
    " object: dog cat": [7626, 35, 2335, 4758],
}


@pytest.fixture(scope="module")
def released() -> Tokenizer:
    return Tokenizer.from_ofa_tables(ofa_bpe_dir())


@pytest.mark.parametrize(("text", "ids"), EXAMPLES.items())
def test_released_ids(released: Tokenizer, text: str, ids: list[int]) -> None:
    assert released.encode(text) == ids
    assert released.decode(ids) == text
    assert released.source_ids(text) == [0, *ids, 2]


def test_the_released_layout(released: Tokenizer) -> None:
    assert released.text_vocab_size == 50_265
    assert released.first_bin_id == 58_457
    assert released.decode([0, 99, 58_457, 59_456, 2]) == " what <bin_0> <bin_999>"
    assert released.bin_value(58_456) is None


def test_saved_tables_give_the_same_ids(released: Tokenizer, tmp_path: Path) -> None:
    released.save(tmp_path)
    again = Tokenizer.load(tmp_path, num_codes=8192, num_bins=1000)
    for text in (*EXAMPLES, " Ünïcode — 漢字 😀 <s> <mask> <bin_3>", "\n\t  spaces "):
        assert again.encode(text) == released.encode(text)


@given(st.text(max_size=40))
@settings(max_examples=200, deadline=None)
def test_any_text_survives_and_never_becomes_a_special_symbol(text: str) -> None:
    tokenizer = tiny.tokenizer()
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(3 < token < tokenizer.text_vocab_size - 1 for token in ids)


def test_absent_tables_are_explained(tmp_path: Path) -> None:
    with pytest.raises(BackboneFileError, match=r"vocab\.json and merges\.txt"):
        Tokenizer.load(tmp_path, num_codes=0, num_bins=0)
    with pytest.raises(BackboneFileError, match=r"lacks encoder\.json"):
        Tokenizer.from_ofa_tables(tmp_path)


@pytest.mark.parametrize(
    ("change", "merges", "reason"),
    [
        ({"a": "x"}, "", "whole numbers"),
        ({"<s>": False}, "", "whole numbers"),
        ({}, "a nothing\n", "joins pieces"),
        ({}, "a\n", "joins pieces"),
    ],
    ids=["text as id", "truth value as id", "unknown piece", "half a merge"],
)
def test_broken_tables_are_refused_as_such(tmp_path: Path, change: dict[str, object], merges: str, reason: str) -> None:
    tiny.tokenizer().save(tmp_path)
    sound = json.loads((tmp_path / "vocab.json").read_text())
    (tmp_path / "vocab.json").write_text(json.dumps(sound | change))
    (tmp_path / "merges.txt").write_text(merges)
    with pytest.raises(BackboneFileError, match=reason):
        Tokenizer.load(tmp_path, num_codes=0, num_bins=0)


def test_a_vocabulary_that_would_drop_bytes_is_refused(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text('{"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "a": 4}')
    (tmp_path / "merges.txt").write_text("")
    with pytest.raises(BackboneFileError, match="lacks 255 of the 256 bytes"):
        Tokenizer.load(tmp_path, num_codes=0, num_bins=0)


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt"])
def test_tables_that_are_not_text_are_refused(tmp_path: Path, name: str) -> None:
    tiny.tokenizer().save(tmp_path)
    (tmp_path / name).write_bytes(b"\xff\xfe")
    with pytest.raises(BackboneFileError, match="not UTF-8"):
        Tokenizer.load(tmp_path, num_codes=0, num_bins=0)


def test_a_vocabulary_with_gaps_is_refused(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text('{"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "a": 9}')
    (tmp_path / "merges.txt").write_text("")
    with pytest.raises(BackboneFileError, match="without gaps"):
        Tokenizer.load(tmp_path, num_codes=0, num_bins=0)
