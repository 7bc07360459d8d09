"""Examples are what the server would read and what it should answer, token by token."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

import tiny
from promptmux_server.backbone.config import BOS, EOS
from promptmux_server.tasks import TaskSpec, encode_item
from promptmux_server.tasks.boxes import box_to_bins
from promptmux_server.training.data.encode import SampleEncoder
from promptmux_server.training.data.pictures import InlinePicture
from promptmux_server.training.data.sample import Defect, Sample
from training.data.data_files import encoder

SIZE = (40, 20)
PICTURE = InlinePicture("")


def sample(target: Any, **fields: Any) -> Sample:
    return Sample(target=target, group="", **{"picture": PICTURE, **fields})


def ids(text: str) -> tuple[int, ...]:
    return tuple(tiny.tokenizer().encode(text))


def test_an_examples_source_is_the_servers() -> None:
    task = encoder("answer")
    made = task.example(sample("a cat", text="WHAT  is it"), 3, SIZE)
    served = encode_item(task.spec, tiny.tokenizer(), "WHAT  is it", None)
    assert (made.source, made.prefix, made.image) == (served.source_ids, served.prefix_ids, 3)
    assert made.source == (BOS, *ids(" what is it?"), EOS)
    assert made.target == ids(" a cat")


def test_a_task_whose_decoder_reads_the_source_again_learns_so() -> None:
    manifest = replace(encoder("answer").spec.manifest, decoder_input="source")
    task = SampleEncoder(TaskSpec.from_manifest(manifest, tiny.config()), tiny.tokenizer())
    made = task.example(sample("yes", text="is it?"))
    assert made.prefix == made.source[:-1] != (BOS,)


def test_a_label_is_learned_as_the_answer_that_stands_for_it() -> None:
    task = encoder("label", labels={"yes": "entailment", "no": "contradiction", "nope": "contradiction"})
    assert task.example(sample("entailment", text="a cat")).target == ids(" yes")
    assert task.example(sample("contradiction", text="a cat")).target == ids(" no")
    assert task.example(sample("nope", text="a cat")).target == ids(" nope")
    assert task.answers is not None
    assert task.answers.children(()) == tuple(dict.fromkeys(ids(f" {a}")[0] for a in ("yes", "no", "nope")))


def test_beyond_the_answer_set_the_best_answer_within_it_is_learned_with_its_confidence() -> None:
    task = encoder("answer", answers=["cat", "dog"])
    made = task.example(sample("bird", text="what", confidence=0.9, references={"bird": 0.9, "dog": 0.6, "cat": 0.3}))
    assert (made.target, made.confidence) == (ids(" dog"), 0.6)
    with pytest.raises(Defect, match="none of the task's answers"):
        task.example(sample("bird", text="what", references={"bird": 1.0}))
    assert encoder("answer").example(sample("bird", text="what", confidence=0.9)).confidence == 0.9


@pytest.mark.parametrize("box", [(0.0, 0.0, 40.0, 20.0), (1.5, 2.5, 30.0, 19.0), (-0.4, 0.0, 40.9, 20.2)])
def test_a_box_is_learned_as_bins_of_the_stored_picture(box: tuple[float, float, float, float]) -> None:
    made = encoder("box").example(sample(box, text="the cat"), 0, SIZE)
    within = (max(0.0, box[0]), box[1], min(40.0, box[2]), min(20.0, box[3]))
    expected = box_to_bins(within, *SIZE, 64, tiny.config())
    assert made.target == tuple(tiny.config().first_bin_id + value for value in expected)
    assert [tiny.tokenizer().bin_value(token) for token in made.target] == list(expected)


@pytest.mark.parametrize("box", [(-2.0, 0.0, 4.0, 4.0), (0.0, 0.0, 41.5, 4.0), (0.0, 0.0, 4.0, 22.0)])
def test_a_box_outside_its_picture_is_refused(box: tuple[float, float, float, float]) -> None:
    with pytest.raises(Defect, match="leaves the picture"):
        encoder("box").example(sample(box, text="the cat"), 0, SIZE)


def test_a_picture_too_many_or_too_few_is_refused() -> None:
    with pytest.raises(Defect, match="needs a picture"):
        encoder("text").example(sample("one", text="a", picture=None))
    with pytest.raises(Defect, match="takes no picture"):
        encoder("text", takes_image=False).example(sample("one", text="a"))
