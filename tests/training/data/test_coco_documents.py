"""COCO-style documents: what is joined with what, and entries that cannot be joined."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from promptmux_prompts import Kind
from promptmux_server.errors import DataError
from promptmux_server.training.data.coco import consensus
from promptmux_server.training.data.json_entries import entries
from promptmux_server.training.data.sample import Defect, Sample
from training.data.data_files import encoder, opened, pictures, surveyed, write_json

IMAGES = [{"id": 5, "file_name": "0.png"}, {"id": 6, "file_name": "1.png"}]
CAPTIONS = {
    "images": IMAGES,
    "annotations": [
        {"id": 1, "image_id": 5, "caption": "A cat."},
        {"id": 2, "image_id": 6, "caption": "A dog!"},
        {"id": 3, "image_id": 5, "caption": "One cat"},
    ],
}


def samples(path: Path, kind: Kind, **config: Any) -> list[Sample]:
    source = opened(path, kind, **config)
    return [source.sample(number) for number in range(len(source))]


def facts(found: list[Sample]) -> list[tuple[Any, ...]]:
    return [(s.group, s.text, s.target, s.entry) for s in found]


def test_captions_are_joined_with_their_pictures_and_their_siblings(tmp_path: Path) -> None:
    found = samples(write_json(tmp_path / "captions.json", CAPTIONS), "caption")
    assert facts(found) == [
        ("0.png", None, "A cat", "annotations[0]"),
        ("1.png", None, "A dog", "annotations[1]"),
        ("0.png", None, "One cat", "annotations[2]"),
    ]
    assert list(found[0].references) == ["A cat", "One cat"]
    pictures(tmp_path, 2)
    assert surveyed(tmp_path / "captions.json", encoder("caption")).bad_count == 0


def test_sentences_of_pictures_are_captions_of_the_chosen_split(tmp_path: Path) -> None:
    def image(number: int, split: str) -> dict[str, Any]:
        sentences = [{"raw": f"Cat {number}."}, {"raw": f"Dog {number}."}]
        return {"imgid": number, "filepath": "val", "filename": f"{number}.png", "split": split, "sentences": sentences}

    path = write_json(tmp_path / "karpathy.json", {"images": [image(0, "train"), image(1, "val"), image(2, "restval")]})
    found = samples(path, "caption", split="train,restval")
    assert [(s.group, s.target, s.entry) for s in found] == [
        ("val/0.png", "Cat 0", "images[0].sentences[0]"),
        ("val/0.png", "Dog 0", "images[0].sentences[1]"),
        ("val/2.png", "Cat 2", "images[2].sentences[0]"),
        ("val/2.png", "Dog 2", "images[2].sentences[1]"),
    ]
    for split in (None, "test", "train,test"):
        with pytest.raises(DataError, match=r"karpathy\.json: choose a split of restval, train, val"):
            opened(path, "caption", split=split)


def test_a_split_of_entries_that_name_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="name no splits"):
        opened(write_json(tmp_path / "captions.json", CAPTIONS), "caption", split="train")


QUESTIONS = {
    "data_subtype": "train2014",
    "questions": [
        {"question_id": 10, "image_id": 5, "question": "what is it?"},
        {"question_id": 11, "image_id": 7, "question": "how many?"},
    ],
}
ANSWERS = {
    "annotations": [
        {"question_id": 11, "image_id": 7, "answers": [{"answer": "two"}] * 9 + [{"answer": "one"}]},
        {"question_id": 10, "image_id": 5, "answers": [{"answer": a} for a in ("cat", "dog", "dog", *"abcdefg")]},
    ]
}


def test_questions_are_joined_with_annotations_and_pictures_named_by_their_ids(tmp_path: Path) -> None:
    path = write_json(tmp_path / "questions.json", QUESTIONS)
    beside = write_json(tmp_path / "annotations.json", ANSWERS)
    found = samples(path, "answer", annotations=beside)
    assert facts(found) == [
        ("COCO_train2014_000000000007.jpg", "how many?", "two", "annotations[0]"),
        ("COCO_train2014_000000000005.jpg", "what is it?", "dog", "annotations[1]"),
    ]
    assert found[1].confidence == pytest.approx(0.6)
    assert found[0].references == pytest.approx({"two": 1.0, "one": 0.3})
    named = samples(path, "answer", annotations=beside, image_name="%d.png")
    assert [s.group for s in named] == ["7.png", "5.png"]
    with pytest.raises(DataError, match="need one number"):
        opened(path, "answer", annotations=beside, image_name="every.png")


@pytest.mark.parametrize(("agreeing", "worth"), [(1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_answers_of_ten_people_are_worth_what_the_metric_gives(agreeing: int, worth: float) -> None:
    others = [{"answer": f"other {number}"} for number in range(10 - agreeing)]
    assert consensus([{"answer": "yes"}] * agreeing + others)["yes"] == pytest.approx(worth)


REGION = {"id": 3, "image_id": 5, "bbox": [10, 4, 20, 10]}


@pytest.mark.parametrize(
    "document",
    [
        {"images": IMAGES, "annotations": [{**REGION, "caption": "the cat"}]},
        {"images": IMAGES, "annotations": [{**REGION, "sentences": ["the cat"]}]},
        {"images": [{"id": 5, "file_name": "0.png", "caption": "the cat"}], "annotations": [REGION]},
        {
            "refs": [{"ann_id": 3, "image_id": 5, "split": "val", "sentences": [{"sent": "the cat"}]}],
            "images": IMAGES,
            "annotations": [REGION, {"id": 4, "image_id": 6, "bbox": [0, 0, 1, 1], "segmentation": [[1, 2, 3]]}],
        },
    ],
    ids=["annotation", "sentences", "picture", "refs"],
)
def test_expressions_are_joined_with_their_regions(tmp_path: Path, document: object) -> None:
    (found,) = samples(write_json(tmp_path / "regions.json", document), "box")
    assert (found.group, found.text, found.target) == ("0.png", "the cat", (10.0, 4.0, 30.0, 14.0))


def test_entries_that_cannot_be_joined_are_bad_lines_with_their_place(tmp_path: Path) -> None:
    pictures(tmp_path, 2)
    regions = [
        {**REGION, "caption": "the cat"},
        {**REGION, "image_id": 99, "caption": "the cat"},
        {**REGION, "bbox": [1, 2, 0, 4], "caption": "the cat"},
        {**REGION, "bbox": [30, 2, 20, 4], "caption": "the cat"},
        {**REGION, "caption": None},
        "no object",
    ]
    path = write_json(tmp_path / "regions.json", {"annotations": regions, "images": IMAGES})
    found = surveyed(path, encoder("box"))
    assert [(line.place.entry, line.reason) for line in found.bad] == [
        ("annotations[1]", "its picture is not in `images`: add it, or say how pictures are named by their ids"),
        (
            "annotations[2]",
            "`bbox` must be four numbers [x, y, width, height] in pixels, with a width and height above 0",
        ),
        ("annotations[3]", "its box leaves the picture: give corners in pixels of the picture as it is stored"),
        ("annotations[4]", "the expression must be a text that is not empty"),
        ("annotations[5]", "its picture is not in `images`: add it, or say how pictures are named by their ids"),
    ]
    with pytest.raises(DataError, match=r"regions.json, annotations\[1\]: its picture"):
        found.allow(4)
    assert len(found.allow(5).rows()) == 1


def test_answers_that_are_none_are_bad_lines(tmp_path: Path) -> None:
    lists: list[object] = [[], "yes", [{"answer": ""}], [{}]]
    annotations = [{"question_id": 10, "answers": answers} for answers in lists]
    path = write_json(tmp_path / "vqa.json", QUESTIONS | {"annotations": annotations})
    source = opened(path, "answer")
    for number in range(len(lists)):
        with pytest.raises(Defect, match="answer"):
            source.parse(number)


def test_a_document_is_rewritten_once_and_again_when_it_has_changed(tmp_path: Path) -> None:
    path = write_json(tmp_path / "captions.json", CAPTIONS)
    first = opened(path, "caption").sha256
    (lines,) = (tmp_path / "cache").glob("coco-*.jsonl")
    written_ns = lines.stat().st_mtime_ns
    assert opened(path, "caption").sha256 == first
    assert lines.stat().st_mtime_ns == written_ns
    write_json(path, {**CAPTIONS, "annotations": CAPTIONS["annotations"][:1]})
    assert len(opened(path, "caption")) == 1


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('{"images": [],\n "annotations": [{"id": 1},\n {"id": ]}', "captions.json, line 3"),
        ('{"images": []', "captions.json, line 1"),
        ('{"images": []} {}', "captions.json, line 1"),
        ("[]", "one object at its top"),
        ("", "one object at its top"),
        ("{}", "holds nothing that a task of kind caption learns"),
    ],
)
def test_a_document_that_is_not_whole_is_refused(tmp_path: Path, text: str, complaint: str) -> None:
    (tmp_path / "captions.json").write_text(text)
    with pytest.raises(DataError, match=complaint):
        opened(tmp_path / "captions.json", "caption")


@pytest.mark.parametrize(
    ("document", "place"),
    [
        ({"images": [IMAGES[0], {"id": 5, "file_name": "other.png"}]}, r"images\[1\]"),
        ({"questions": [QUESTIONS["questions"][0], {"question_id": 10, "question": "why?"}]}, r"questions\[1\]"),
    ],
    ids=["images", "questions"],
)
def test_one_id_for_two_entries_is_refused(tmp_path: Path, document: object, place: str) -> None:
    with pytest.raises(DataError, match=rf"twice\.json, {place}: its id is another entry's too"):
        opened(write_json(tmp_path / "twice.json", document), "answer")


def test_entries_without_ids_are_joined_with_nothing(tmp_path: Path) -> None:
    document = {"images": [{"file_name": "0.png"}], "annotations": [{"caption": "A cat."}]}
    source = opened(write_json(tmp_path / "captions.json", document), "caption")
    with pytest.raises(Defect, match="its picture is not in `images`"):
        source.parse(0)
    refs = {"refs": [{"sentences": ["the cat"]}], "annotations": [REGION], "images": IMAGES}
    with pytest.raises(Defect, match="its picture is not in `images`"):
        opened(write_json(tmp_path / "refs.json", refs), "box").parse(0)


def test_labels_and_texts_are_not_in_such_documents(tmp_path: Path) -> None:
    path = write_json(tmp_path / "captions.json", CAPTIONS)
    for kind in ("label", "text"):
        with pytest.raises(DataError, match="write JSON lines"):
            opened(path, kind)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=12,
)


@given(st.dictionaries(st.text(max_size=4), JSON, max_size=4), st.sampled_from([None, 1]))
def test_walking_a_document_finds_what_parsing_it_whole_finds(
    tmp_path_factory: pytest.TempPathFactory, document: dict[str, Any], indent: int | None
) -> None:
    path = tmp_path_factory.mktemp("walk") / "document.json"
    path.write_text(json.dumps(document, indent=indent))
    expected = [
        (key, number, value)
        for key, values in document.items()
        for number, value in (enumerate(values) if isinstance(values, list) else [(0, values)])
    ]
    assert list(entries(path)) == expected
