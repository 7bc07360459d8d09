"""Text to token ids and back: byte-level BPE, with OFA's location symbols above it (ofa-spec 6, 10.2).

Owns the tables and the id layout. Knows nothing of instructions or of how many pixels a location stands for.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Self

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from promptmux_server.backbone.config import BOS, EOS, PAD
from promptmux_server.errors import BackboneFileError

SPECIALS = ("<s>", "<pad>", "</s>", "<unk>")
MASK = "<mask>"


class Tokenizer:
    """BPE whose vocabulary ids are the model's; ids from `text_vocab_size` on are `<code_k>`, then `<bin_k>`."""

    def __init__(self, vocab: dict[str, int], merges: list[tuple[str, str]], *, num_codes: int, num_bins: int) -> None:
        if not isinstance(vocab, dict) or any(type(index) is not int for index in vocab.values()):
            raise BackboneFileError("vocab.json must be one object of texts and whole numbers")
        if sorted(vocab.values()) != list(range(len(vocab))):
            raise BackboneFileError("vocab.json must number its entries from 0 without gaps")
        if any(vocab.get(symbol) != index for index, symbol in enumerate(SPECIALS)):
            raise BackboneFileError(f"vocab.json must begin with {', '.join(SPECIALS)}")
        if missing := set(pre_tokenizers.ByteLevel.alphabet()) - vocab.keys():
            raise BackboneFileError(
                f"vocab.json lacks {len(missing)} of the 256 bytes: texts would lose them unnoticed"
            )
        self.text_vocab_size = len(vocab)
        self.num_codes, self.num_bins = num_codes, num_bins
        self._vocab, self._merges = vocab, merges
        try:
            model = models.BPE(vocab=vocab, merges=merges)
        except Exception as error:  # the library raises nothing narrower
            raise BackboneFileError("merges.txt joins pieces that vocab.json does not have") from error
        self._bpe = tokenizers.Tokenizer(model)
        self._bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        self._bpe.decoder = decoders.ByteLevel()

    @classmethod
    def load(cls, directory: Path, *, num_codes: int, num_bins: int) -> Self:
        """Read vocab.json and merges.txt whose ids are the model's; raises BackboneFileError."""
        vocab = _read_json(directory / "vocab.json")
        return cls(vocab, _read_merges(directory / "merges.txt"), num_codes=num_codes, num_bins=num_bins)

    @classmethod
    def from_ofa_tables(cls, directory: Path, *, num_codes: int = 8192, num_bins: int = 1000) -> Self:
        """OFA's own tables: GPT-2's BPE, renumbered by the line numbers of dict.txt (ofa-spec 6).

        Needs encoder.json, vocab.bpe and dict.txt; raises BackboneFileError.
        """
        gpt2 = _read_json(directory / "encoder.json")
        if not isinstance(gpt2, dict):
            raise BackboneFileError("encoder.json must be one object of texts and whole numbers")
        symbols = {str(index): token for token, index in gpt2.items()}
        words = [line.split()[0] for line in _read(directory / "dict.txt").splitlines() if line.strip()]
        vocab = {symbol: index for index, symbol in enumerate(SPECIALS)}
        vocab |= {symbols.get(word, word): index for index, word in enumerate(words, start=len(SPECIALS))}
        vocab[MASK] = len(vocab)
        return cls(vocab, _read_merges(directory / "vocab.bpe"), num_codes=num_codes, num_bins=num_bins)

    def save(self, directory: Path) -> None:
        """Write vocab.json and merges.txt, as `load` reads them."""
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "vocab.json").write_text(json.dumps(self._vocab, ensure_ascii=False), encoding="utf-8")
        lines = ["#version: 0.2", *(f"{a} {b}" for a, b in self._merges)]
        (directory / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")

    @property
    def first_bin_id(self) -> int:
        return self.text_vocab_size + self.num_codes

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without bos and eos; nothing in a text is ever taken for a special or location symbol."""
        ids: list[int] = self._bpe.encode(text, add_special_tokens=False).ids
        return ids

    def source_ids(self, text: str) -> list[int]:
        """An encoder input: bos, the text, eos."""
        return [BOS, *self.encode(text), EOS]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of generated ids: bos, eos and pad dropped, location symbols written as `<bin_k>`, the rest as bytes."""
        parts: list[str] = []
        run: list[int] = []
        for token in ids:
            if token in (BOS, EOS, PAD):
                continue
            if token < self.text_vocab_size:
                run.append(token)
                continue
            parts.append(self._bpe.decode(run, skip_special_tokens=False))
            parts.append(f" {self._symbol(token)}")
            run = []
        return "".join([*parts, self._bpe.decode(run, skip_special_tokens=False)])

    def bin_value(self, token: int) -> int | None:
        """k of a `<bin_k>` id, None for any other id."""
        return token - self.first_bin_id if self.first_bin_id <= token < self.first_bin_id + self.num_bins else None

    def _symbol(self, token: int) -> str:
        value = self.bin_value(token)
        return f"<code_{token - self.text_vocab_size}>" if value is None else f"<bin_{value}>"


def train_tokenizer(corpus: Iterable[str], vocab_size: int, *, num_bins: int) -> Tokenizer:
    """Learn a small byte-level BPE: four specials, all bytes, merges, `<mask>` last; `vocab_size` counts them all."""
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        min_frequency=2,
        show_progress=False,
    )
    bpe.train_from_iterator(corpus, trainer)
    learned = json.loads(bpe.to_str())["model"]
    vocab: dict[str, int] = {**learned["vocab"], MASK: len(learned["vocab"])}
    merges = [(a, b) for a, b in learned["merges"]]
    return Tokenizer(vocab, merges, num_codes=0, num_bins=num_bins)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise BackboneFileError(
            f"the tokenizer lacks {path.name}: vocab.json and merges.txt are needed, or OFA's own encoder.json, "
            "vocab.bpe and dict.txt"
        ) from error
    except ValueError as error:
        raise BackboneFileError(f"{path.name} is not UTF-8 text") from error


def _read_json(path: Path) -> Any:
    try:
        return json.loads(_read(path))
    except (ValueError, RecursionError) as error:
        raise BackboneFileError(f"{path.name} is not JSON") from error


def _read_merges(path: Path) -> list[tuple[str, str]]:
    """Merge rules in order; the first line is a version comment."""
    merges = []
    for line in _read(path).splitlines():
        if line and not line.startswith("#version"):
            left, _, right = line.partition(" ")
            merges.append((left, right))
    return merges
