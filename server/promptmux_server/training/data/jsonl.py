"""JSON lines: one sample a line, pictures as files of a folder. The one format that is ours (docs/training-data.md)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from promptmux_prompts import InvalidPromptFile, Kind
from promptmux_prompts.strict_json import parse
from promptmux_server.training.data.fields import TARGET_FIELD, box_of, confidence_of, text_of
from promptmux_server.training.data.pictures import UnreadablePicture, picture_in
from promptmux_server.training.data.sample import Defect, Sample

FIELDS = frozenset({"id", "image", "text", "premise", "confidence", "references", *TARGET_FIELD.values()})


class JsonLines:
    """Lines for one kind of task. A line may hold the targets of several kinds; the others are not looked at."""

    inline = False

    def __init__(self, kind: Kind, images: Path) -> None:
        self._kind, self._images = kind, images
        self.identity = f"jsonl {kind} {images.resolve()}"
        """All that decides how a line is read."""

    def parse(self, line: bytes) -> Sample:
        """Raises Defect."""
        try:
            fields = parse(line.removeprefix(b"\xef\xbb\xbf").decode(), "line")  # the mark that some editors put first
        except (InvalidPromptFile, UnicodeDecodeError) as error:
            raise Defect("not one JSON object in UTF-8, with each field once and no NaN") from error
        if not isinstance(fields, dict):
            raise Defect("must be one JSON object")
        return self.sample(fields)

    def sample(self, fields: Mapping[str, Any], entry: str | None = None) -> Sample:
        """The sample of a parsed line; raises Defect."""
        if fields.keys() - FIELDS:
            raise Defect(f"has fields that nothing reads; known are {', '.join(sorted(FIELDS))}")
        name = TARGET_FIELD[self._kind]
        if name not in fields:
            raise Defect(f"lacks `{name}`, which a task of kind {self._kind} learns")
        picture, group = None, f"{fields.get('text')}|{fields.get('premise')}"
        if "image" in fields:
            group = text_of("`image`", fields["image"])
            try:
                picture = picture_in(self._images, group)
            except UnreadablePicture as error:
                raise Defect(str(error)) from error
        box = self._kind == "box"
        return Sample(
            target=box_of("`box`", fields["box"]) if box else text_of(f"`{name}`", fields[name]),
            picture=picture,
            text=text_of("`text`", fields["text"]) if "text" in fields else None,
            premise=text_of("`premise`", fields["premise"]) if "premise" in fields else None,
            confidence=confidence_of("`confidence`", fields.get("confidence", 1.0)),
            references=_references(fields.get("references", {})),
            group=group,
            entry=entry,
        )


def _references(value: Any) -> dict[str, float]:
    if not isinstance(value, dict):
        raise Defect("`references` must be an object of texts and what each is worth, above 0 and at most 1")
    return {
        text_of("a text of `references`", text): confidence_of("a number of `references`", worth)
        for text, worth in value.items()
    }
