"""The key file: names, scopes and weights, and what a line may not say."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from promptmux_server.api.keys import KeyFileError, Keys


def digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def read(folder: Path, *lines: str) -> Keys:
    (folder / "keys").write_text("\n".join(lines))
    return Keys.read(folder / "keys")


def test_a_key_says_whose_it_is(tmp_path: Path) -> None:
    keys = read(tmp_path, f"ann infer {digest('1')}", f"bob infer,admin {digest('2')} weight=2")
    ann, bob = (keys.identify([(b"authorization", b"Bearer %d" % number)]) for number in (1, 2))
    assert (ann.name, ann.scopes) == ("ann", {"infer"})
    assert (bob.name, bob.scopes) == ("bob", {"infer", "admin"})


def test_weights_are_by_name_and_one_where_none_is_said(tmp_path: Path) -> None:
    lines = [f"ann infer {digest('1')}", f"bob infer {digest('2')}  weight=2.5", f"bob infer {digest('3')} weight=2.50"]
    assert read(tmp_path, *lines).weights() == {"ann": 1.0, "bob": 2.5}


@pytest.mark.parametrize(
    ("lines", "complaint"),
    [
        ([f"a infer {digest('1')} weight=0"], "line 1 .* from 0.01 to 100"),
        ([f"a infer {digest('1')} weight=101"], "line 1 .* from 0.01 to 100"),
        ([f"a infer {digest('1')} weight=-1"], "line 1 .* is not NAME"),
        ([f"a infer {digest('1')} weight=inf"], "line 1 .* is not NAME"),
        ([f"a infer {digest('1')} weigth=2"], "line 1 .* is not NAME"),
        ([f"a infer {digest('1')}weight=2"], "line 1 .* is not NAME"),
        ([f"a infer {digest('1')} weight=2 x"], "line 1 .* is not NAME"),
        ([f"a infer {digest('1')} weight=2", f"a infer {digest('2')}"], "line 2 .* another weight"),
        ([f"a infer {digest('1')}", f"b infer {digest('1')}"], "line 2 .* key of an earlier line"),
    ],
)
def test_a_line_that_cannot_be_meant_is_named_and_not_shown(tmp_path: Path, lines: list[str], complaint: str) -> None:
    with pytest.raises(KeyFileError, match=complaint) as caught:
        read(tmp_path, *lines)
    assert digest("1")[:8] not in str(caught.value)
