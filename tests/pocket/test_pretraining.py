"""The stem's lesson has exact truth, naming begins as copying, and a killed run goes on as if it never stopped."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from pocket.lessons import untaught
from promptmux_server.backbone.config import BOS, EOS
from promptmux_server.backbone.tokenizer import Tokenizer, train_tokenizer
from promptmux_server.backbone.weights import load_backbone
from promptmux_server.pocket import WEIGHTS, export, pretrain
from promptmux_server.pocket import stem as stem_lesson
from promptmux_server.pocket.colours import TINTS
from promptmux_server.pocket.dataset import Pixels, SceneDataset
from promptmux_server.pocket.losses import place_targets
from promptmux_server.pocket.patches import (
    ANSWERS,
    EDGE_BINS,
    GRID,
    UNTINTED,
    WORDS,
    edge_targets,
    lesson_losses,
    lesson_measures,
    patch_truth,
)
from promptmux_server.pocket.pretrain import Pretraining, run
from promptmux_server.pocket.recipe import NUM_BINS, Recipe
from promptmux_server.pocket.scenes import Scene, SceneObject
from promptmux_server.pocket.stem import mirrored, new_stem, train_stem
from promptmux_server.pocket.vocabulary import carried_over
from promptmux_server.training.forward import Example

STEM = "encoder.embed_images"

DOG = SceneObject("dog", (20.0, 40.0, 60.0, 90.0))
CAT = SceneObject("cat", (50.0, 80.0, 100.0, 120.0))


def test_a_patch_is_named_by_the_last_thing_painted_over_its_middle() -> None:
    truth = patch_truth(Scene(0, "blue", (DOG, CAT)))
    word = truth.word.view(GRID, GRID)
    assert WORDS[int(word[0, 0])] == "blue"
    assert WORDS[int(word[3, 2])] == "dog"
    assert WORDS[int(word[5, 3])] == "cat"  # its middle (56, 88) lies in both boxes


def test_edges_are_those_of_the_thing_or_of_the_patch_itself() -> None:
    edges = patch_truth(Scene(0, "blue", (DOG,))).edges.view(GRID, GRID, 4)
    assert edges[3, 2].tolist() == list(DOG.box)
    assert edges[0, 1].tolist() == [16.0, 0.0, 32.0, 16.0]


def test_a_patch_of_a_plain_shape_has_its_tint() -> None:
    heart = SceneObject("heart", (16.0, 16.0, 48.0, 48.0), "teal")
    tint = patch_truth(Scene(0, "blue", (DOG, heart))).tint.view(GRID, GRID)
    assert list(TINTS)[int(tint[1, 1])] == "teal"
    assert tint[4, 2] == tint[0, 0] == UNTINTED


def test_a_lesson_without_shapes_costs_nothing_for_tints() -> None:
    answers = torch.zeros(1, GRID * GRID, ANSWERS)
    losses = lesson_losses(answers, [patch_truth(Scene(0, "blue", (DOG,)))])
    assert losses["tint"] == 0.0
    assert float(losses["word"]) == pytest.approx(math.log(len(WORDS)))
    assert lesson_measures(answers, [patch_truth(Scene(0, "blue", (DOG,)))])["kinds"] in (0.0, 1.0)


def test_every_thing_has_one_centre() -> None:
    centre = patch_truth(Scene(0, "blue", (DOG, CAT))).centre.view(GRID, GRID)
    assert centre.nonzero().tolist() == [[4, 2], [6, 4]]


def test_an_edges_target_is_a_distribution_around_its_bin() -> None:
    target = edge_targets(torch.tensor([[0.0, 61.0, 62.0, 128.0]]))
    torch.testing.assert_close(target.sum(-1), torch.ones(1, 4))
    assert target.argmax(-1).tolist() == [[0, 15, 15, EDGE_BINS - 1]]


class TwoScenes:
    """The least that pretraining asks of a data set."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> tuple[Pixels, Scene]:
        scene = Scene(index, ("red", "blue")[index], ((DOG, CAT), (CAT,))[index])
        return np.full((128, 128, 3), 60 * index, dtype=np.uint8), scene


SCENES = cast(SceneDataset, TwoScenes())


def pretraining(lesson: Path, folder: Path, begin: Path | None = None) -> Pretraining:
    recipe = Recipe(steps=4, images=2, texts=3, warmup_steps=1)
    return Pretraining(recipe, Tokenizer.load(WEIGHTS, num_codes=0, num_bins=NUM_BINS), lesson, begin, folder)


@pytest.fixture
def lesson(tmp_path: Path) -> Path:
    return untaught(tmp_path)


def test_a_killed_run_ends_with_the_weights_of_an_undisturbed_one(lesson: Path, tmp_path: Path) -> None:
    run(pretraining(lesson, tmp_path / "whole"), SCENES)
    killed = pretraining(lesson, tmp_path / "killed")
    (tmp_path / "killed").mkdir()
    for _ in range(2):
        killed.train_step(SCENES)
    killed.save()
    run(pretraining(lesson, tmp_path / "killed"), SCENES)
    whole, resumed = (load_file(tmp_path / name / "checkpoint.safetensors") for name in ("whole", "killed"))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_run_may_go_on_from_a_backbone_directory_with_the_lessons_stem(lesson: Path, tmp_path: Path) -> None:
    begun = pretraining(lesson, tmp_path, WEIGHTS).model.state_dict()
    shipped, taught = load_backbone(WEIGHTS).tensors, load_file(lesson)
    names = "encoder.embed_tokens.weight"
    for name, tensor in shipped.items():
        if name != names and "image_proj" not in name:
            assert torch.equal(begun[name], taught.get(name.removeprefix(f"{STEM}."), tensor).float()), name
    dog = Tokenizer.load(WEIGHTS, num_codes=0, num_bins=NUM_BINS).encode(" dog")[0]
    assert torch.equal(begun[names][dog], shipped[names][dog].float())
    assert torch.equal(begun[names][-NUM_BINS:], shipped[names][-NUM_BINS:].float())


@torch.no_grad()
def test_a_backbone_that_is_gone_on_from_hears_half_as_loud_what_the_lesson_reads(lesson: Path, tmp_path: Path) -> None:
    said = pretraining(lesson, tmp_path, WEIGHTS).model.encoder.image_proj.weight
    before = load_backbone(WEIGHTS).tensors["encoder.image_proj.weight"].float()
    assert float((said - before).norm() / before.norm()) == pytest.approx(0.5, abs=1e-3)


def test_a_stem_may_be_read_without_being_changed(tmp_path: Path) -> None:
    stem, head = new_stem(WEIGHTS)
    before = {name: tensor.clone() for name, tensor in stem.state_dict().items()}
    untaught = head.weight.detach().clone()
    train_stem(stem.requires_grad_(False), head, SCENES, 1, tmp_path / "stem.safetensors")
    assert all(torch.equal(tensor, before[name]) for name, tensor in stem.state_dict().items())
    assert not torch.equal(head.weight, untaught)
    assert torch.equal(before["conv1.weight"], load_backbone(WEIGHTS).tensors[f"{STEM}.conv1.weight"].float())


def test_a_killed_lesson_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stem_lesson, "CHECKPOINT_EVERY", 1)
    monkeypatch.setattr(stem_lesson, "BATCH", 2)
    train_stem(*new_stem(), SCENES, 2, tmp_path / "whole.safetensors")
    calls = iter(range(2))
    with monkeypatch.context() as killing:
        killing.setattr(stem_lesson, "patch_truth", lambda scene: (next(calls), patch_truth(scene))[1])
        with pytest.raises(StopIteration):
            train_stem(*new_stem(), SCENES, 2, tmp_path / "killed.safetensors")
    train_stem(*new_stem(), SCENES, 2, tmp_path / "killed.safetensors")
    whole, resumed = (load_file(tmp_path / f"{name}.safetensors") for name in ("whole", "killed"))
    assert whole.keys() == resumed.keys()
    assert torch.equal(whole["conv1.weight"], resumed["conv1.weight"])


def test_a_mirrored_scene_is_what_the_mirrored_picture_shows() -> None:
    scene = mirrored(Scene(0, "blue", (DOG,)))
    assert scene.objects[0].box == (68.0, 40.0, 108.0, 90.0)
    assert mirrored(scene) == Scene(0, "blue", (DOG,))


def test_a_new_vocabularys_words_begin_near_the_mean_of_their_pieces_and_apart_from_one_another() -> None:
    old = Tokenizer.load(WEIGHTS, num_codes=0, num_bins=NUM_BINS)
    new = train_tokenizer([" zzyzx dog", " yzxzz"] * 9, 300, num_bins=NUM_BINS)
    rows = torch.randn(old.first_bin_id + NUM_BINS, 64)
    carried = carried_over(rows, old, new)
    assert len(carried) == new.first_bin_id + NUM_BINS
    torch.testing.assert_close(carried[new.first_bin_id :], rows[old.first_bin_id :])
    (kept,), (known,) = new.encode(" dog"), old.encode(" dog")
    assert torch.equal(carried[kept], rows[known])
    words = [" zzyzx", " yzxzz"]  # of the same letters, so of one mean
    (first,), (second,) = map(new.encode, words)
    means = [rows[torch.tensor(old.encode(word))].mean(0) for word in words]
    own = [carried[first] - means[0], carried[second] - means[1]]
    assert [float(each.std()) for each in own] == pytest.approx([1.0, 1.0], abs=0.25)
    assert abs(float(torch.cosine_similarity(own[0], own[1], dim=0))) < 0.5


def test_what_was_learned_is_shipped_with_its_logs(
    lesson: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(pretraining(lesson, tmp_path / "run"), SCENES)
    lesson.with_suffix(".jsonl").write_text("{}\n")
    given = {
        "run": tmp_path / "run",
        "tokenizer": WEIGHTS,
        "lesson": lesson.with_suffix(".jsonl"),
        "out": tmp_path / "out",
    }
    monkeypatch.setattr("sys.argv", ["export", *(f"--{name}={path}" for name, path in given.items())])
    export.main()
    shipped, learned = load_backbone(tmp_path / "out"), load_file(tmp_path / "run" / "checkpoint.safetensors")
    name = "decoder.layers.0.fc1.weight"
    assert torch.equal(shipped.tensors[name], learned[f"model/{name}"].to(torch.bfloat16))
    assert (tmp_path / "out" / "stem.jsonl").exists()
    assert (tmp_path / "out" / "train.jsonl").exists()


def test_an_export_that_fails_leaves_what_was_there(
    lesson: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(pretraining(lesson, tmp_path / "run"), SCENES)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "weights").write_text("old")
    given = {"run": tmp_path / "run", "tokenizer": WEIGHTS, "lesson": tmp_path / "none", "out": tmp_path / "out"}
    monkeypatch.setattr("sys.argv", ["export", *(f"--{name}={path}" for name, path in given.items())])
    with pytest.raises(FileNotFoundError):
        export.main()
    assert (tmp_path / "out" / "weights").read_text() == "old"


def test_a_log_goes_back_with_its_run(lesson: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrain, "LOG_EVERY", 1)
    (tmp_path / pretrain.LOG).write_text('{"step": 1}\n{"step": 2')  # no checkpoint: steps that were lost by a kill
    run(pretraining(lesson, tmp_path), SCENES)
    logged = [json.loads(line)["step"] for line in (tmp_path / pretrain.LOG).read_text().splitlines()]
    assert logged == [1, 2, 3, 4]


def test_heads_read_the_states_of_what_they_judge(lesson: Path, tmp_path: Path) -> None:
    """On the flat axis of a batch: a picture's patches are as many patches, a name is its last token."""
    training = pretraining(lesson, tmp_path)
    texts = (" what is there?", " is the dog left of the cat?", " where is the cat?")
    sources = [(BOS, *training.tokenizer.encode(text), EOS) for text in texts]
    examples = [Example(source, (BOS,), (EOS,), image) for source, image in zip(sources, (0, 0, 1), strict=True)]
    axis = [part for source in sources for part in (*["patch"] * GRID * GRID, *source)]
    scenes = [SCENES[0][1], SCENES[1][1]]
    for place, scene in training._seen(examples, scenes):
        assert axis[place : place + GRID * GRID] == ["patch"] * GRID * GRID
        assert axis[place - 1] != "patch"
        first = sources[0] if scene is scenes[0] else sources[2]
        assert axis[place + GRID * GRID :][: len(first)] == [*first]
    named = training._named(examples, scenes)
    said = [training.tokenizer.decode([cast(int, axis[name.place])]) for name in named]
    assert [text.strip() for text in said] == [name.kind for name in named] == ["dog", "cat", "cat"]
    assert [name.scene for name in named] == [scenes[0], scenes[0], scenes[1]]


def test_a_place_is_taught_as_a_bell_over_its_neighbours() -> None:
    bells = place_targets(torch.tensor([0, 60]), NUM_BINS)
    torch.testing.assert_close(bells.sum(1), torch.ones(2))
    assert bells.argmax(1).tolist() == [0, 60]
    assert bells[1, 61] == bells[1, 59] > bells[1, 58]


def test_texts_leave_the_stem_as_it_was_taught(lesson: Path, tmp_path: Path) -> None:
    training = pretraining(lesson, tmp_path)
    training.train_step(SCENES)
    taught, now = load_file(lesson), training.model.state_dict()
    assert all(torch.equal(now[f"{STEM}.{n}"], t) for n, t in taught.items() if not n.startswith("head."))


@torch.no_grad()
def test_a_patch_begins_close_to_the_word_that_the_lesson_gave_it(lesson: Path, tmp_path: Path) -> None:
    training = pretraining(lesson, tmp_path)
    encoder = training.model.encoder
    feature = load_file(lesson)["head.weight"][WORDS.index("dog")]
    patch = encoder.image_proj(feature) - encoder.image_proj.bias
    names = {word: encoder.embed_tokens.weight[training.tokenizer.encode(f" {word}")[0]] for word in ("dog", "cat")}
    likeness = {word: float(torch.cosine_similarity(patch, name, dim=0)) for word, name in names.items()}
    assert likeness["dog"] > 0.5 > likeness["cat"]
