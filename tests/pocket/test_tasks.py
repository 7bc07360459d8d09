"""The shipped tasks: true answers, wordings of their own, files that training reads, recipes that are up to date."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import cast

import numpy as np
import pytest
from PIL import Image

from promptmux_prompts import load_manifest
from promptmux_server.backbone.weights import load_backbone
from promptmux_server.pocket import LIBRARY, WEIGHTS
from promptmux_server.pocket.art import KINDS
from promptmux_server.pocket.dataset import Pixels, SceneDataset
from promptmux_server.pocket.easy_vqa import EASY_VQA, write_files
from promptmux_server.pocket.questions import NUMBERS
from promptmux_server.pocket.recipes import LEARNING, POCKET_TASKS, recipe
from promptmux_server.pocket.samples import pretrain_samples
from promptmux_server.pocket.scenes import Scene, SceneObject, compose
from promptmux_server.pocket.scores import held_out, named_kinds
from promptmux_server.pocket.task_files import Cut, write_task_files
from promptmux_server.pocket.tasks import COUNTED, TASKS
from promptmux_server.training.job_config import parse_job

from .test_scenes_and_samples import ART, SCENES

RECIPES = Path(__file__).parents[2] / "prompts" / "recipes"


def thing(kind: str, x: float) -> SceneObject:
    return SceneObject(kind, (x, 0.0, x + 20.0, 20.0))


def test_tasks_speak_another_language_than_pretraining() -> None:
    rng = random.Random(4)
    taught = {str(sample.source[0]) for scene in SCENES for sample in pretrain_samples(scene, rng, 6, described=True)}
    for task in TASKS.values():
        for scene in SCENES[:50]:
            if sample := task.sample(scene, rng):
                assert task.instruction.format(text=sample.text) not in taught


def test_every_answer_is_one_that_the_task_can_give() -> None:
    rng = random.Random(5)
    for task in TASKS.values():
        samples = [sample for scene in SCENES if (sample := task.sample(scene, rng))]
        assert len(samples) > 15, task.name
        if task.answers:
            assert {str(sample.target) for sample in samples} <= set(task.answers)


def test_entailment_uses_its_three_labels_evenly() -> None:
    rng = random.Random(5)
    labels = [sample.target for scene in SCENES if (sample := TASKS["scene-entailment"].sample(scene, rng))]
    assert all(0.2 < count / len(labels) < 0.47 for count in Counter(labels).values())


def test_things_are_counted_by_their_category() -> None:
    rng = random.Random(6)
    for scene in SCENES:
        sample = TASKS["scene-counting"].sample(scene, rng)
        assert sample is not None
        category = next(name for name, plural in COUNTED.items() if plural == sample.text)
        assert NUMBERS.index(str(sample.target)) == sum(KINDS[o.kind].category == category for o in scene.objects)


@pytest.mark.parametrize(
    ("kinds", "odd"),
    [
        (["dog", "cat", "car"], "car"),
        (["dog", "dog", "cat"], "cat"),
        (["car", "bus", "taxi", "pear"], "pear"),
        (["dog", "car"], None),
        (["dog", "cat", "cow"], None),
        (["dog", "dog", "car", "car"], None),
        (["dog", "car", "apple"], None),
    ],
)
def test_one_is_odd_where_all_others_agree(kinds: list[str], odd: str | None) -> None:
    scene = Scene(0, "red", tuple(thing(kind, 30.0 * place) for place, kind in enumerate(kinds)))
    sample = TASKS["scene-odd-one-out"].sample(scene, random.Random(0))
    assert (sample and sample.target) == odd


def test_a_side_is_asked_about_only_where_it_is_clear() -> None:
    apart = Scene(0, "red", (thing("dog", 0.0), thing("car", 60.0)))
    found = {
        sample.text: sample.target
        for seed in range(40)
        if (sample := TASKS["scene-category"].sample(apart, random.Random(seed)))
    }
    assert found == {"at the left": "animal", "at the right": "vehicle"}


def test_a_caption_names_the_kinds_that_it_lists() -> None:
    assert named_kinds("a hot dog, two butterflies and a key, the background is red") == {"hot dog", "butterfly", "key"}
    assert named_kinds("a dog and a dogfish on blue") == {"dog"}


class FewScenes:
    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> tuple[Pixels, Scene]:
        scene, picture = compose(index, "train", ART)
        return np.asarray(picture), scene


def test_files_hold_what_the_tasks_ask_and_the_pictures_they_ask_about(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "00010.png").write_bytes(b"what a kill left")
    write_task_files(cast(SceneDataset, FewScenes()), Cut("train", 10, 30, 2, 12), tmp_path)
    lines = held_out(tmp_path / "scene-grounding.train.jsonl", "box")
    assert len(lines) == 12
    first = lines[0]
    assert first.image.name == "00010.png"
    scene, picture = compose(int(first.image.stem), "train", ART)
    assert np.array_equal(np.asarray(Image.open(first.image)), np.asarray(picture))
    assert tuple(first.truth) in {o.box for o in scene.objects}
    assert {10} <= {int(line.image.stem) for line in lines} <= set(range(10, 30))


def test_easy_vqa_keeps_its_own_test_split_for_the_score(tmp_path: Path) -> None:
    data = tmp_path / "data"
    for split in ("train", "test"):
        (data / split / "images").mkdir(parents=True)
        asked = [[f"is there a {split} shape?", "yes", image] for image in range(40)]
        (data / split / "questions.json").write_text(json.dumps(asked))
        for image in range(40):
            Image.new("RGB", (8, 8)).save(data / split / "images" / f"{image}.png")
    write_files(data, tmp_path)
    cuts = {cut: held_out(tmp_path / f"easy-vqa.{cut}.jsonl", "answer") for cut in ("train", "validation", "heldout")}
    assert {cut: len(lines) for cut, lines in cuts.items()} == {"train": 38, "validation": 2, "heldout": 40}
    assert all(line.image.exists() for lines in cuts.values() for line in lines)
    assert all("test" in str(line.text) for line in cuts["heldout"])
    pictures = {cut: {line.image for line in lines} for cut, lines in cuts.items()}
    assert not pictures["train"] & pictures["validation"]


@pytest.mark.parametrize("name", POCKET_TASKS)
def test_recipes_are_those_that_the_program_writes_and_training_reads(name: str) -> None:
    text = (RECIPES / f"{name}.toml").read_text()
    assert text == recipe(POCKET_TASKS[name], load_backbone(WEIGHTS).fingerprint)
    job = parse_job(text, f"{name}.toml", RECIPES)
    assert job.task.name == name
    assert job.steps.steps == LEARNING[name].steps


def test_easy_vqa_asks_for_shapes_that_no_scene_shows() -> None:
    assert EASY_VQA.answers is not None
    assert not {"circle", "rectangle", "triangle"} & set(KINDS)


@pytest.mark.parametrize("name", POCKET_TASKS)
def test_what_is_shipped_said_and_scored_agrees(name: str) -> None:
    scores = json.loads((RECIPES / f"{name}.score.json").read_text())
    backbone = load_backbone(WEIGHTS)
    path = LIBRARY / f"{name}.safetensors"
    manifest = load_manifest(path, shape=backbone.prompt_shape, fingerprint=backbone.fingerprint)
    tuned = scores["prompt"]
    assert manifest.metric == {"name": tuned["metric"], "value": round(tuned["value"], 4), "n": tuned["n"]}
    curve = [json.loads(line) for line in (RECIPES / f"{name}.curve.jsonl").read_text().splitlines()]
    assert max(line["step"] for line in curve) == LEARNING[name].steps
    for document in ("README.md", "docs/pocket.md"):
        lines = (RECIPES.parent.parent / document).read_text().splitlines()
        (row,) = (line for line in lines if line.startswith(f"| `{name}` |"))
        assert f"| {percent(scores['alone']['value'])} | {percent(tuned['value'])}" in row


def percent(share: float) -> str:
    return f"{100 * share:.1f}%"
