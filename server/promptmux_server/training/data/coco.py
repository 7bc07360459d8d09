"""COCO-style documents, rewritten once as JSON lines: captions, questions with answers, regions with expressions.

Joins pictures, annotations, questions and references by their ids. An entry that cannot be joined becomes a line that
says so, and is counted with all other bad lines. While it is rewritten, a document's text and joins are in memory.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from promptmux_prompts import Kind
from promptmux_server.errors import DataError
from promptmux_server.training.data.coco_joins import CocoEntries, Joined, joined
from promptmux_server.training.data.fields import best_of, corners_of, text_of
from promptmux_server.training.data.jsonl import JsonLines
from promptmux_server.training.data.ofa_tsv import caption_target, without_punctuation
from promptmux_server.training.data.sample import Defect, Sample

FORMAT = 2
"""Of the lines; a change makes those that were written before unused."""


class CocoLines:
    """Rewritten lines for one kind of task."""

    inline = False

    def __init__(self, kind: Kind, images: Path) -> None:
        self._lines = JsonLines(kind, images)
        self.identity = f"coco {FORMAT} {self._lines.identity}"

    def parse(self, line: bytes) -> Sample:
        """Raises Defect."""
        fields = json.loads(line)
        entry = fields.pop("entry")
        if "error" in fields:
            raise Defect(fields["error"], entry)
        try:
            return self._lines.sample(fields, entry)
        except Defect as defect:
            raise Defect(defect.reason, entry) from defect


@dataclass(frozen=True)
class CocoFiles:
    """A document, beside it the one with VQA's annotations, and how they are read."""

    document: Path
    annotations: Path | None = None
    split: str | None = None
    """Names of splits, separated by commas, where entries say theirs (RefCOCO's refs, Karpathy's captions)."""
    image_name: str | None = None
    """Names of pictures by their id, as in "COCO_train2014_%012d.jpg", where the document has no list of pictures."""

    @property
    def paths(self) -> Sequence[Path]:
        return [self.document] if self.annotations is None else [self.document, self.annotations]


def rewritten(files: CocoFiles, kind: Kind, cache: Path) -> Path:
    """The lines of a document, written unless they are there from an earlier time; raises DataError."""
    if kind not in WRITERS:
        raise DataError(f"COCO-style documents hold no {kind}s: write JSON lines (docs/training-data.md).")
    target = cache / f"coco-{_key(files, kind)}.jsonl"
    if target.exists():
        return target
    unfinished = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with unfinished.open("w", encoding="ascii") as file:
            for line in _lines(files, kind):
                file.write(json.dumps(line) + "\n")
        unfinished.rename(target)
    except OSError as error:
        raise DataError(
            f"{files.document.name} cannot be rewritten as lines: make room on the disk, or name another folder for "
            f"what training keeps ({error.strerror})."
        ) from error
    finally:
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)
    return target


def _key(files: CocoFiles, kind: Kind) -> str:
    try:
        states = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in files.paths]
    except OSError as error:
        raise DataError(f"{files.document.name} or its annotations cannot be read: check their names.") from error
    text = json.dumps([FORMAT, kind, states, files.split, files.image_name])
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _lines(files: CocoFiles, kind: Kind) -> Iterator[Mapping[str, Any]]:
    entries = CocoEntries.read(files.paths, files.image_name)
    for item in joined(entries, kind, files.split):
        try:
            yield {"entry": item.entry, "image": item.picture(), **WRITERS[kind](item)}
        except Defect as defect:
            yield {"entry": item.entry, "error": defect.reason}


def _caption(item: Joined) -> dict[str, Any]:
    references = {text: 1.0 for text in map(without_punctuation, item.siblings) if text}
    return {
        "caption": text_of("the caption", caption_target(text_of("the caption", item.text))),
        "references": references,
    }


def _answer(item: Joined) -> dict[str, Any]:
    references = consensus(item.answers)
    target, confidence = best_of(references)
    question = text_of("the question", item.text)
    return {"text": question, "answer": target, "confidence": confidence, "references": references}


def _box(item: Joined) -> dict[str, Any]:
    return {"text": text_of("the expression", item.text), "box": corners_of("`bbox`", item.region)}


WRITERS: Mapping[Kind, Callable[[Joined], dict[str, Any]]] = {"caption": _caption, "answer": _answer, "box": _box}


def consensus(answers: Any) -> dict[str, float]:
    """What each of several people's answers is worth by VQA's metric; raises Defect.

    The metric gives min(agreeing / 3, 1), averaged over all ways of leaving one person out.
    """
    if not isinstance(answers, list) or not answers:
        raise Defect('`answers` must be a list of {"answer": text}, one for each person asked')
    texts = [text_of("each answer", a.get("answer") if isinstance(a, dict) else a) for a in answers]
    if len(texts) == 1:
        return {texts[0]: 1.0}
    return {text: _worth(agreeing, len(texts)) for text, agreeing in Counter(texts).items()}


def _worth(agreeing: int, people: int) -> float:
    without_one_of_them = agreeing * min((agreeing - 1) / 3, 1.0)
    without_another = (people - agreeing) * min(agreeing / 3, 1.0)
    return (without_one_of_them + without_another) / people
