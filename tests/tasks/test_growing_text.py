"""Pieces of a growing text against the text that the answer will have, over all tokens that a model could write."""

from __future__ import annotations

from hypothesis import example, given
from hypothesis import strategies as st

import tiny
from promptmux_server.backbone.config import BOS, EOS, PAD
from promptmux_server.tasks.growing import UNFINISHED, GrowingText

TOKENIZER = tiny.tokenizer()
ANY_TOKEN = st.integers(0, TOKENIZER.text_vocab_size + tiny.BINS - 1)
BYTES = [token for token in range(TOKENIZER.text_vocab_size) if TOKENIZER.decode([token]) == UNFINISHED]
BLANKS = TOKENIZER.encode(" \n\t\u2003")
HARD = st.sampled_from([*BYTES, *BLANKS, *TOKENIZER.encode(" dog 犬é🐕"), BOS, EOS, PAD, TOKENIZER.first_bin_id + 3])


def pieces(tokens: list[int], steps: list[int] | None = None) -> list[str]:
    """What is given out as the tokens come, `steps` of them at a time, and at the end."""
    text, seen, found = GrowingText(TOKENIZER.decode), 0, []
    for size in steps or [1] * len(tokens):
        seen += size
        found.append(text.grow(tuple(tokens[:seen])))
    found.append(text.grow(tuple(tokens)))
    return [*found, text.finish()]


@given(st.lists(ANY_TOKEN | HARD, max_size=40), st.lists(st.integers(0, 3), max_size=20))
@example(TOKENIZER.encode("犬 🐕é"), [])
@example([*BLANKS, *TOKENIZER.encode("a"), *BLANKS, *TOKENIZER.encode("b"), *BLANKS], [])
@example([BYTES[0], BYTES[0], TOKENIZER.first_bin_id, BYTES[0], EOS], [])
def test_the_pieces_are_the_final_text_whatever_was_written(tokens: list[int], steps: list[int]) -> None:
    assert "".join(pieces(tokens, steps)) == TOKENIZER.decode(tokens).strip()


@given(st.text(max_size=20))
@example("ࠀ퟿𐀀􏿿")
def test_no_piece_ends_within_a_character(text: str) -> None:
    """Each token is a byte here: a text without the sign for broken bytes never shows it."""
    by_byte = [TOKENIZER.encode(chr(value))[-1] if value < 128 else BYTE_TOKENS[value] for value in text.encode()]
    found = pieces(by_byte)
    assert "".join(found) == text.strip()
    assert all(UNFINISHED not in piece for piece in found) or UNFINISHED in text


@given(st.text(alphabet="abc", min_size=1, max_size=20))
def test_what_is_certain_is_not_held_back(text: str) -> None:
    *found, last, rest = pieces(TOKENIZER.encode(text))
    assert all(found)
    assert (last, rest) == ("", "")


def test_the_controls_trip() -> None:
    """Decoding token by token breaks characters, and stripping each piece loses blanks: the cases above see both."""
    tokens = TOKENIZER.encode("a 犬 b")
    assert "".join(TOKENIZER.decode([token]) for token in tokens) != "a 犬 b"
    assert "".join(piece.strip() for piece in pieces(tokens)) != "a 犬 b"


def _byte_tokens() -> dict[int, int]:
    """Ids of the bytes from 128 on that UTF-8 uses, found through characters that have them."""
    leads_of_three = [0x800, *(code << 12 for code in range(1, 16))]
    found: dict[int, int] = {}
    for code in [*range(128, 2048), *leads_of_three, *(code << 16 for code in range(1, 17))]:
        letter = chr(code)
        found |= dict(zip(letter.encode(), TOKENIZER.encode(letter), strict=True))
    return found


BYTE_TOKENS = _byte_tokens()
