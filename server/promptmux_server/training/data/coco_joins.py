"""Which entries of COCO-style documents belong together: by picture, question and annotation ids.

Knows the shapes that are common: COCO's captions, Karpathy's sentences, VQA's questions, and regions whose expressions
stand in `refs` (RefCOCO), in the annotation, or in the picture's caption.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from promptmux_prompts import Kind
from promptmux_server.errors import DataError
from promptmux_server.training.data.json_entries import entries
from promptmux_server.training.data.sample import Defect

ANNOTATION_FIELDS = ("id", "image_id", "question_id", "caption", "sentences", "bbox", "answers", "question")
"""What is kept of an annotation; outlines of objects, most of a document, are not."""
IMAGE_FIELDS = ("file_name", "filename", "filepath", "sentences", "caption", "split", "id", "imgid")
NO_IMAGE: tuple[str, dict[str, Any]] = ("", {})
LISTS = ("images", "annotations", "questions", "refs")


@dataclass
class CocoEntries:
    """What documents say, by kind of entry: each its place and its fields."""

    name: str
    """Of the first document, for messages."""
    images: dict[Any, tuple[str, dict[str, Any]]] = field(default_factory=dict)
    questions: dict[Any, dict[str, Any]] = field(default_factory=dict)
    annotations: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    refs: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    image_name: str | None = None

    @classmethod
    def read(cls, paths: Sequence[Path], image_name: str | None) -> CocoEntries:
        """Raises DataError."""
        found = cls(paths[0].name, image_name=image_name)
        for path in paths:
            for key, number, value in entries(path):
                found._add(key, f"{key}[{number}]", value)
        return found

    def _add(self, key: str, entry: str, value: Any) -> None:
        if key == "data_subtype" and self.image_name is None:
            self.image_name = f"COCO_{value}_%012d.jpg"  # how VQA's documents, which list no pictures, mean it
        if key not in LISTS:
            return
        fields = value if isinstance(value, dict) else {}
        if key == "images":
            kept = {name: fields[name] for name in IMAGE_FIELDS if name in fields}
            _, before = self.images.setdefault(_id(kept.get("id", kept.get("imgid")), entry), (entry, kept))
            self._refuse_another(entry, kept, before)
        elif key == "questions":
            before = self.questions.setdefault(_id(fields.get("question_id"), entry), fields)
            self._refuse_another(entry, fields, before)
        elif key == "refs":
            self.refs.append((entry, fields))
        else:
            self.annotations.append((entry, {name: fields[name] for name in ANNOTATION_FIELDS if name in fields}))

    def _refuse_another(self, entry: str, fields: object, before: object) -> None:
        if fields != before:
            raise DataError(f"{self.name}, {entry}: its id is another entry's too: give each its own.")

    def picture(self, image_id: Any) -> str:
        """A picture's name; raises Defect."""
        _, image = self.images.get(_id(image_id), NO_IMAGE)
        name = image.get("file_name", image.get("filename"))
        if isinstance(name, str):
            return f"{image['filepath']}/{name}" if image.get("filepath") else name
        if self.image_name is None or not isinstance(image_id, int):
            raise Defect("its picture is not in `images`: add it, or say how pictures are named by their ids")
        try:
            return self.image_name % image_id
        except (TypeError, ValueError) as error:
            raise DataError('Names of pictures need one number, as in "COCO_train2014_%012d.jpg".') from error


@dataclass(frozen=True)
class Joined:
    """One supervised text about one picture; what is missing is None, and whoever needs it says so."""

    entry: str
    entries: CocoEntries
    image_id: Any
    text: Any = None
    siblings: Sequence[Any] = ()
    """Texts about the same picture, this one among them."""
    answers: Any = None
    region: Any = None
    split: str | None = None

    def picture(self) -> str:
        return self.entries.picture(self.image_id)


def joined(found: CocoEntries, kind: Kind, split: str | None) -> Iterator[Joined]:
    """All supervised texts of the chosen splits; raises DataError if splits are there and none that fits is chosen."""
    make = MAKERS[kind]
    splits = {item.split for item in make(found)}
    chosen = set(split.split(",")) if split is not None else splits
    if not splits:
        raise DataError(f"{found.name} holds nothing that a task of kind {kind} learns (docs/training-data.md).")
    if chosen - splits or (split is None and len(splits) > 1):
        named = ", ".join(sorted(name for name in splits if name is not None)[:8])
        remedy = f"choose a split of {named}" if named else "its entries name no splits, so choose none"
        raise DataError(f"{found.name}: {remedy}.")
    return (item for item in make(found) if item.split in chosen)


def _captions(found: CocoEntries) -> Iterator[Joined]:
    by_image: dict[Any, list[Any]] = {}
    for _, fields in found.annotations:
        if isinstance(fields.get("caption"), str):
            by_image.setdefault(_id(fields.get("image_id")), []).append(fields["caption"])
    for entry, fields in found.annotations:
        image_id = fields.get("image_id")
        siblings = by_image.get(_id(image_id), ())
        yield Joined(entry, found, image_id, fields.get("caption"), siblings)
    for image_id, (entry, fields) in found.images.items():
        texts = _texts(fields.get("sentences", ()))
        for number, text in enumerate(texts):
            place = f"{entry}.sentences[{number}]"
            yield Joined(place, found, image_id, text, [t for t in texts if isinstance(t, str)], split=_split(fields))


def _answers(found: CocoEntries) -> Iterator[Joined]:
    for entry, fields in found.annotations:
        asked = found.questions.get(_id(fields.get("question_id")), fields)
        image_id = asked.get("image_id", fields.get("image_id"))
        yield Joined(entry, found, image_id, asked.get("question"), answers=fields.get("answers"))


def _regions(found: CocoEntries) -> Iterator[Joined]:
    regions = {_id(fields.get("id")): fields for _, fields in found.annotations if _id(fields.get("id")) is not None}
    for entry, ref in found.refs:
        region = regions.get(_id(ref.get("ann_id")), {})
        image_id = ref.get("image_id", region.get("image_id"))
        for number, text in enumerate(_texts(ref.get("sentences")) or [None]):
            place = f"{entry}.sentences[{number}]"
            yield Joined(place, found, image_id, text, region=region.get("bbox"), split=_split(ref))
    for entry, fields in () if found.refs else found.annotations:
        _, image = found.images.get(_id(fields.get("image_id")), NO_IMAGE)
        texts = _texts(fields.get("sentences", ())) or [fields.get("caption", image.get("caption"))]
        for text in texts:
            yield Joined(entry, found, fields.get("image_id"), text, region=fields.get("bbox"))


MAKERS: Mapping[Kind, Callable[[CocoEntries], Iterator[Joined]]] = {
    "caption": _captions,
    "answer": _answers,
    "box": _regions,
}


def _texts(sentences: Any) -> list[Any]:
    """Sentences, which are texts or objects around one."""
    if not isinstance(sentences, list | tuple):
        return [None]
    return [s.get("raw", s.get("sent")) if isinstance(s, dict) else s for s in sentences]


def _split(fields: Mapping[str, Any]) -> str | None:
    split = fields.get("split")
    return split if isinstance(split, str) else None


def _id(value: Any, otherwise: str | None = None) -> Any:
    """Something that a dictionary takes; what is no id joins nothing."""
    return value if isinstance(value, int | str) else otherwise
