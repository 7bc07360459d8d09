"""Scenes are what their truth says, and every question has the answer that the truth gives."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from promptmux_server.pocket.art import HELD_OUT, KINDS, TRAINING_KINDS
from promptmux_server.pocket.dataset import SceneDataset, render_shard
from promptmux_server.pocket.questions import NUMBERS, question_about
from promptmux_server.pocket.samples import (
    ENTAILMENT_LABELS,
    INSTRUCTIONS,
    TASKS,
    pretrain_samples,
    task_sample,
    vqa_answers,
)
from promptmux_server.pocket.scenes import COLOURS, SIDE, Scene, compose
from promptmux_server.pocket.scores import intersection_over_union
from promptmux_server.pocket.statements import describe, referring_expression, statement_about


class DiscArt:
    """Every kind is a disc in a colour of its own, so that tests need no art."""

    def sprite(self, kind: str) -> Image.Image:
        number = list(KINDS).index(kind)
        disc = Image.new("RGBA", (80, 60))
        ImageDraw.Draw(disc).ellipse((0, 0, 79, 59), (number * 2, 255 - number * 2, 77, 255))
        return disc


ART = DiscArt()
SCENES = [compose(i, "train", ART)[0] for i in range(300)]


def test_the_same_seed_gives_the_same_scene_and_picture() -> None:
    first, second = compose(5, "train", ART), compose(5, "train", ART)
    assert first[0] == second[0]
    assert np.array_equal(np.asarray(first[1]), np.asarray(second[1]))
    assert compose(5, "heldout", ART)[0] != first[0]


def test_scenes_keep_their_bounds() -> None:
    for scene in SCENES:
        assert 1 <= len(scene.objects) <= 4
        assert scene.background in COLOURS
        for thing in scene.objects:
            assert 0 <= thing.box[0] < thing.box[2] <= SIDE
            assert 0 <= thing.box[1] < thing.box[3] <= SIDE
            assert thing.kind in TRAINING_KINDS


def test_held_out_kinds_are_shown_only_when_asked_for() -> None:
    novel = compose(1, "train", ART, novel=True)[0]
    assert {thing.kind for thing in novel.objects} <= HELD_OUT
    assert not HELD_OUT & {thing.kind for scene in SCENES for thing in scene.objects}


def test_boxes_hold_the_objects() -> None:
    for index in range(20):
        scene, picture = compose(index, "train", ART)
        pixels = np.asarray(picture).astype(int)
        x0, y0, x1, y1 = (int(v) for v in scene.objects[-1].box)  # painted last, covered by nothing
        centre = pixels[(y0 + y1) // 2, (x0 + x1) // 2]
        number = list(KINDS).index(scene.objects[-1].kind)
        assert abs(centre - np.array([number * 2, 255 - number * 2, 77])).max() < 60


def check_count(scene: Scene, question: str, answer: str) -> bool:
    if question == "how many things are there?":
        return NUMBERS[len(scene.objects)] == answer
    plural = question.removeprefix("how many ").removesuffix(" are there?")
    return NUMBERS[sum(KINDS[o.kind].plural == plural for o in scene.objects)] == answer


def test_questions_have_the_answers_of_the_truth() -> None:
    rng = random.Random(1)
    checked = 0
    for scene in SCENES:
        question, answer, sentence = question_about(scene, rng)
        assert answer in vqa_answers()
        assert sentence == sentence.lower()
        if question.startswith("how many"):
            assert check_count(scene, question, answer)
            checked += 1
        elif question.startswith("is there"):
            kind = question.removesuffix("?").split(" ", 3)[3]
            assert (scene.count(kind) > 0) == (answer == "yes")
            checked += 1
        elif "background" in question:
            assert answer == scene.background
            checked += 1
    assert checked > 100


def test_statements_are_true_and_false_about_equally_often() -> None:
    rng = random.Random(2)
    truths = [statement_about(scene, rng)[1] for scene in SCENES for _ in range(3)]
    assert 0.4 < sum(truths) / len(truths) < 0.6


def test_referring_expressions_point_at_things_that_are_there() -> None:
    rng = random.Random(3)
    for scene in SCENES:
        expression, box = referring_expression(scene, rng)
        assert box in {thing.box for thing in scene.objects}
        assert expression.startswith("the ")


def test_tasks_speak_another_language_than_pretraining() -> None:
    rng = random.Random(4)
    taught = {str(sample.source[0]) for scene in SCENES for sample in pretrain_samples(scene, rng, 6)}
    for task in TASKS:
        for scene in SCENES[:50]:
            assert INSTRUCTIONS[task].format(text=task_sample(task, scene, rng).text) not in taught


def test_entailment_uses_its_three_answers_evenly() -> None:
    rng = random.Random(5)
    targets = [str(task_sample("scene-entailment", scene, rng).target).strip() for scene in SCENES]
    assert all(0.2 < targets.count(answer) / len(targets) < 0.47 for answer in ENTAILMENT_LABELS)


def test_descriptions_count() -> None:
    scene = next(s for s in SCENES if any(s.count(o.kind) == 2 for o in s.objects))
    kind = next(o.kind for o in scene.objects if scene.count(o.kind) == 2)
    assert f"two {KINDS[kind].plural}" in describe(scene)


def test_intersection_over_union() -> None:
    assert intersection_over_union((0, 0, 2, 2), (0, 0, 2, 2)) == pytest.approx(1.0, abs=1e-6)
    assert intersection_over_union((0, 0, 2, 2), (1, 0, 3, 2)) == pytest.approx(1 / 3, abs=1e-6)
    assert intersection_over_union((0, 0, 1, 1), (2, 2, 3, 3)) == 0.0


def test_a_dataset_reads_back_what_was_rendered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("promptmux_server.pocket.dataset.SHARD", 5)
    monkeypatch.setattr("promptmux_server.pocket.dataset.FluentArt", lambda _: ART)
    for shard in range(2):
        render_shard(tmp_path, shard, "train", tmp_path, novel=False)
    data = SceneDataset(tmp_path)
    assert len(data) == 10
    scene, picture = compose(7, "train", ART)
    assert data[7][1] == scene
    assert np.array_equal(data[7][0], np.asarray(picture))


def test_absent_data_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="make scenes"):
        SceneDataset(tmp_path)
