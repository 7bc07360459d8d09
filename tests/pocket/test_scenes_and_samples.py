"""Scenes are what their truth says, and every question has the answer that the truth gives."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from promptmux_server.pocket.art import HELD_OUT, KINDS, TRAINING_KINDS
from promptmux_server.pocket.colours import COLOURS, TINTS
from promptmux_server.pocket.dataset import SceneDataset, render_shard
from promptmux_server.pocket.questions import HARD_ONES, NUMBERS, question_about, standing_of_two
from promptmux_server.pocket.samples import pretrain_samples
from promptmux_server.pocket.scenes import SIDE, Scene, SceneObject, compose
from promptmux_server.pocket.shapes import SHAPES, draw_shape
from promptmux_server.pocket.statements import coloured, describe, place_in_words, referring_expression, statement_about


class DiscArt:
    """Every kind is a disc in a colour of its own, so that tests need no art."""

    def sprite(self, kind: str) -> Image.Image:
        number = list(KINDS).index(kind)
        disc = Image.new("RGBA", (80, 60))
        ImageDraw.Draw(disc).ellipse((0, 0, 79, 59), (number * 2, 255 - number * 2, 77, 255))
        return disc


ART = DiscArt()
SCENES = [compose(i, "train", ART, shapes=0.2)[0] for i in range(300)]


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


def test_plain_shapes_have_a_tint_that_the_background_has_not() -> None:
    shapes = [(scene, thing) for scene in SCENES for thing in scene.objects if thing.kind in SHAPES]
    assert len(shapes) > 60
    assert all(thing.tint in TINTS and thing.tint != scene.background for scene, thing in shapes)
    assert all(thing.tint is None for scene in SCENES for thing in scene.objects if thing.kind not in SHAPES)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_is_filled_with_about_its_tint(shape: str) -> None:
    pixels = np.asarray(draw_shape(shape, "teal", random.Random(1))).reshape(-1, 4).astype(int)
    filled = pixels[pixels[:, 3] > 0]
    assert 0.1 < len(filled) / len(pixels) < 0.8
    assert abs(filled[:, :3] - np.array(TINTS["teal"])).max() <= 18


def test_boxes_hold_the_objects() -> None:
    for index in range(20):
        scene, picture = compose(index, "train", ART)
        pixels = np.asarray(picture).astype(int)
        x0, y0, x1, y1 = (int(v) for v in scene.objects[-1].box)  # painted last, covered by nothing
        centre = pixels[(y0 + y1) // 2, (x0 + x1) // 2]
        if scene.objects[-1].tint:
            continue  # a ring shows the background at its centre
        number = list(KINDS).index(scene.objects[-1].kind)
        assert abs(centre - np.array([number * 2, 255 - number * 2, 77])).max() < 60


def truth_of(scene: Scene, question: str) -> str | None:
    """The answer by another way than the question was made; None for the kinds of question that others test."""
    yes = {True: "yes", False: "no"}
    if question == "how many things are there?":
        return NUMBERS[len(scene.objects)]
    if question.startswith("how many"):
        plural = question.removeprefix("how many ").removesuffix(" are there?")
        return NUMBERS[sum(KINDS[o.kind].plural == plural for o in scene.objects)]
    if question.startswith("is there"):
        thing = question.removesuffix("?").split(" ", 3)[3]
        tint, _, kind = thing.partition(" ")
        if tint in TINTS:
            return yes[any(o.tint == tint and kind in (o.kind, "shape") for o in scene.objects)]
        return yes[scene.count(thing) > 0]
    if question == "what color is the background?":
        return scene.background
    if question.startswith("what color is the"):
        kind = question.removeprefix("what color is the ").removesuffix("?")
        return next(o.tint for o in scene.objects if o.kind == kind)
    return None


@pytest.mark.parametrize("mix", ["evenly", "hard ones"])
def test_questions_have_the_answers_of_the_truth(mix: str) -> None:
    rng = random.Random(1)
    checked = 0
    for scene in SCENES:
        question, answer, sentence = question_about(scene, rng, *([HARD_ONES] if mix == "hard ones" else []))
        assert sentence == sentence.lower()
        truth = truth_of(scene, question)
        assert truth in (None, answer)
        checked += truth is not None
    assert checked > 100


def test_a_denial_is_true_of_what_is_not_there() -> None:
    rng = random.Random(7)
    denied = 0
    for scene in SCENES * 3:
        statement, truth = statement_about(scene, rng)
        if statement.startswith("there is no "):
            denied += 1
            assert truth == (scene.count(statement.removeprefix("there is no ")) == 0)
    assert denied > 10


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


def test_a_picture_is_described_or_asked_about() -> None:
    rng = random.Random(4)
    for scene in SCENES[:50]:
        described = [sample.kind for sample in pretrain_samples(scene, rng, 6, described=True)]
        assert described[:2] == ["caption", "detection"]
        assert 2 < len(described) <= 6
        asked = [sample.kind for sample in pretrain_samples(scene, rng, 6, described=False)]
        assert asked[0] in ("caption", "inventory", "detection")
        assert not {"inventory", "detection"} & set(asked[1:])


def test_no_text_about_a_picture_comes_twice() -> None:
    rng = random.Random(6)
    for scene in SCENES[:100]:
        samples = pretrain_samples(scene, rng, 6, described=False)
        assert len(set(samples)) == len(samples) <= 6


def test_words_that_no_picture_shows_are_repeated() -> None:
    rng = random.Random(8)
    samples = [s for scene in SCENES * 2 for s in pretrain_samples(scene, rng, 6, described=False) if s.kind == "echo"]
    assert all(sample.source == (f" repeat:{sample.target[0]}",) for sample in samples)
    said = " ".join(str(sample.target[0]) for sample in samples)
    assert all(word in said for word in ("circle", "neutral", *HELD_OUT))


def test_two_things_stand_on_every_side_that_is_clear() -> None:
    dog, cat = SceneObject("dog", (0.0, 0.0, 20.0, 20.0)), SceneObject("cat", (60.0, 4.0, 80.0, 24.0))
    owl = SceneObject("owl", (60.0, 60.0, 80.0, 80.0))
    rng = random.Random(0)
    told = {standing_of_two(Scene(0, "red", (dog, cat)), rng) for _ in range(20)}
    assert told == {("dog", "cat", "left"), ("cat", "dog", "right")}
    told = {standing_of_two(Scene(0, "red", (dog, owl)), rng) for _ in range(20)}
    assert told == {("dog", "owl", "left and above"), ("owl", "dog", "right and below")}
    assert standing_of_two(Scene(0, "red", (dog, dog, cat)), rng) is None


def test_an_inventory_tells_colours_and_places() -> None:
    heart = SceneObject("heart", (0.0, 0.0, 20.0, 20.0), "orange")
    assert coloured(heart) == "an orange heart"
    assert place_in_words(heart) == "at the top left"
    assert place_in_words(SceneObject("dog", (50.0, 50.0, 70.0, 70.0))) == "in the middle"
    assert place_in_words(SceneObject("dog", (100.0, 50.0, 120.0, 70.0))) == "at the right"
    assert coloured(SceneObject("owl", (0.0, 0.0, 9.0, 9.0))) == "an owl"


def test_descriptions_count() -> None:
    scene = next(s for s in SCENES if any(s.count(o.kind) == 2 for o in s.objects))
    kind = next(o.kind for o in scene.objects if scene.count(o.kind) == 2)
    assert f"two {KINDS[kind].plural}" in describe(scene)


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
