"""What users send becomes what OFA was trained to read, and back."""

from __future__ import annotations

import pytest

import tiny
from promptmux_prompts import InvalidPromptFile
from promptmux_server.backbone.sizes import OFA_SIZES
from promptmux_server.errors import InvalidParameter, NoBoxFound
from promptmux_server.tasks import TaskSpec, decode_outcome, encode_item
from promptmux_server.tasks.boxes import bins_to_box, box_to_bins
from promptmux_server.tasks.decoding import DecodingParams, Hypothesis, Outcome
from promptmux_server.tasks.text import INSTRUCTIONS, as_question, clean, clean_caption

BOX = (230.79, 121.75, 423.66, 463.06)


@pytest.mark.parametrize(("size", "bins"), [(512, (360, 253, 661, 964)), (480, (338, 238, 620, 904))])
def test_boxes_become_the_released_bins(size: int, bins: tuple[int, int, int, int]) -> None:
    config = OFA_SIZES["base"]
    assert box_to_bins(BOX, 640, 480, size, config) == bins
    back = bins_to_box(bins, 640, 480, size, config)
    assert all(abs(a - b) < 1.0 for a, b in zip(back, BOX, strict=True))


@pytest.mark.parametrize(
    ("raw", "cleaned"),
    [
        ("  Two  Dogs\n", "two dogs"),
        (".,!?*#:;~What is it?", "what is it?"),
        ("black-and-white a/b", "black and white a b"),
        ("A\t\tB", "a b"),
        (" ".join(["w"] * 99), " ".join(["w"] * 80)),
    ],
)
def test_cleaning(raw: str, cleaned: str) -> None:
    assert clean(raw) == cleaned


def test_captions_name_people() -> None:
    assert clean_caption("A <person> runs") == clean_caption("A <Person> runs") == "a person runs"


def test_questions_end_with_a_question_mark() -> None:
    assert (as_question("is it"), as_question("is it?")) == ("is it?", "is it?")


def test_the_instructions_have_leading_blanks() -> None:
    assert all(text.startswith(" ") for text in INSTRUCTIONS.values())


def spec(**manifest: object) -> TaskSpec:
    return TaskSpec.from_manifest(tiny.prompt(**manifest).manifest, tiny.config())  # type: ignore[arg-type]


def test_the_instruction_is_filled_and_framed() -> None:
    task = spec(instruction=' where is " {text} "?')
    item = encode_item(task, tiny.tokenizer(), "The DOG", None)
    assert tiny.tokenizer().decode(item.source_ids) == ' where is " the dog "?'
    assert item.source_ids[0] == 0
    assert item.source_ids[-1] == 2
    assert item.prefix_ids == (0,)


def test_the_decoder_may_read_the_source_again() -> None:
    item = encode_item(spec(decoder_input="source"), tiny.tokenizer(), "a dog", None)
    assert item.prefix_ids == item.source_ids[:-1]


def test_answers_become_candidates_with_a_leading_blank() -> None:
    item = encode_item(spec(kind="answer", answers=("yes", "no")), tiny.tokenizer(), "is it", None)
    assert item.candidates == tuple(tuple(tiny.tokenizer().encode(f" {a}")) for a in ("yes", "no"))
    assert tiny.tokenizer().decode(item.source_ids).endswith("it?")


@pytest.mark.parametrize("text", [None, "", "  ", "x" * 4097], ids=["absent", "empty", "blank", "long"])
def test_a_text_that_cannot_be_used_is_refused(text: str | None) -> None:
    with pytest.raises(InvalidParameter) as caught:
        encode_item(spec(), tiny.tokenizer(), text, None)
    assert caught.value.param == "text"


def test_a_text_that_is_not_wanted_is_refused() -> None:
    with pytest.raises(InvalidParameter, match="takes no"):
        encode_item(spec(instruction=" what does the image describe?"), tiny.tokenizer(), "hello", None)


def test_braces_in_a_users_text_stay_text() -> None:
    item = encode_item(spec(instruction=" {text} and {premise}"), tiny.tokenizer(), "{premise} {x}", "p")
    assert tiny.tokenizer().decode(item.source_ids) == " {premise} {x} and p"


def hypothesis(*tokens: int, score: float = -1.0) -> Hypothesis:
    return Hypothesis((*tokens, 2), score, ())


def test_label_probabilities_sum_to_one_and_follow_the_scores() -> None:
    task = spec(
        kind="label",
        answers=("yes", "no", "maybe"),
        labels={"yes": "entailment", "no": "contradiction", "maybe": "neutral"},
    )
    outcome = Outcome((hypothesis(5),), (-3.0, -1.0, -2.0))
    output, _ = decode_outcome(task, tiny.tokenizer(), outcome, None)
    assert output.kind == "label"
    assert output.label == "contradiction"
    assert sum(output.probabilities.values()) == pytest.approx(1.0)
    assert output.probabilities["entailment"] == pytest.approx(0.0900, abs=1e-4)


def test_a_label_is_never_a_text_of_another_search() -> None:
    task = spec(kind="label", answers=("yes", "no"), labels={"yes": "entailment", "no": "contradiction"})
    with pytest.raises(InvalidParameter) as caught:
        decode_outcome(task, tiny.tokenizer(), Outcome((hypothesis(5),)), None)
    assert caught.value.param == "decoding.method"


def test_a_box_comes_back_in_pixels_of_the_picture_sent() -> None:
    task = spec(kind="box")
    first = tiny.tokenizer().first_bin_id
    outcome = Outcome((hypothesis(7, 8), hypothesis(first, first + 31, first + 31, first, score=-2.0)))
    output, score = decode_outcome(task, tiny.tokenizer(), outcome, (200, 100))
    assert output.kind == "box"
    assert output.box == pytest.approx((0.0, 100.0, 200.0, 0.0))
    assert score == -2.0


def test_no_box_is_an_error_not_a_guess() -> None:
    with pytest.raises(NoBoxFound):
        decode_outcome(spec(kind="box"), tiny.tokenizer(), Outcome((hypothesis(7),)), (20, 10))


@pytest.mark.parametrize(
    ("overrides", "param"),
    [
        ({"beam_size": 9}, "decoding.beam_size"),
        ({"beam_size": True}, "decoding.beam_size"),
        ({"beam_size": "5"}, "decoding.beam_size"),
        ({"max_length": 257}, "decoding.max_length"),
        ({"min_length": 17}, "decoding.min_length"),
        ({"temperature": 0}, "decoding.temperature"),
        ({"temperature": float("nan")}, "decoding.temperature"),
        ({"method": "magic"}, "decoding.method"),
        ({"surprise": 1}, "decoding.surprise"),
        ({"constrained": 1}, "decoding.constrained"),
        ({"seed": -1}, "decoding.seed"),
        ({"temperature": 10**400}, "decoding.temperature"),
    ],
)
def test_decoding_overrides_are_checked(overrides: dict[str, object], param: str) -> None:
    with pytest.raises(InvalidParameter) as caught:
        DecodingParams().merged(overrides)
    assert caught.value.param == param


def test_decoding_overrides_are_applied() -> None:
    assert DecodingParams().merged({"beam_size": 8, "seed": None, "temperature": 1}).beam_size == 8


@pytest.mark.parametrize(
    "manifest",
    [
        {"decoding": {"method": "candidates"}},
        {"decoding": {"constrained": True}},
        {"kind": "box", "image": None},
        {"kind": "label", "answers": ("a",), "labels": {"a": "b"}, "decoding": {"method": "beam"}},
        {"decoding": {"temperature": 10**400}},
    ],
    ids=["no answers to score", "no answers to keep to", "box of no picture", "label unscored", "beyond any float"],
)
def test_a_manifest_that_no_request_could_use_is_refused_at_load(manifest: dict[str, object]) -> None:
    with pytest.raises(InvalidPromptFile):
        spec(**manifest)


def test_a_manifest_with_impossible_defaults_is_refused() -> None:
    with pytest.raises(InvalidPromptFile):
        spec(decoding={"beam_size": 99})
    with pytest.raises(InvalidPromptFile):
        spec(image_size=4096)
