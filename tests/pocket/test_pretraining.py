"""The stem's lesson has exact truth, naming begins as copying, and a killed run goes on as if it never stopped."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from promptmux_server.backbone.tokenizer import Tokenizer
from promptmux_server.backbone.vision import VisionStem
from promptmux_server.backbone.weights import load_backbone
from promptmux_server.pocket import WEIGHTS
from promptmux_server.pocket.dataset import Pixels, SceneDataset
from promptmux_server.pocket.pretrain import Pretraining, run
from promptmux_server.pocket.recipe import NUM_BINS, Recipe, pocket_config
from promptmux_server.pocket.scenes import Scene, SceneObject
from promptmux_server.pocket.stem import ANSWERS, EDGE_BINS, GRID, WORDS, edge_targets, patch_truth

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


def pretraining(begin: Path, folder: Path) -> Pretraining:
    recipe = Recipe(steps=4, images=2, texts=3, warmup_steps=1)
    return Pretraining(recipe, Tokenizer.load(WEIGHTS, num_codes=0, num_bins=NUM_BINS), begin, folder)


@pytest.fixture
def lesson(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = pocket_config(500)
    stem, head = VisionStem(config, folded=False), nn.Linear(config.image_feature_dim, ANSWERS)
    tensors = stem.state_dict() | {f"head.{name}": tensor for name, tensor in head.state_dict().items()}
    save_file(tensors, tmp_path / "stem.safetensors")
    return tmp_path / "stem.safetensors"


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


def test_a_run_may_go_on_from_a_backbone_directory(tmp_path: Path) -> None:
    begun = pretraining(WEIGHTS, tmp_path).model.state_dict()
    shipped = load_backbone(WEIGHTS).tensors
    assert all(torch.equal(begun[name], tensor.float()) for name, tensor in shipped.items())


@torch.no_grad()
def test_a_patch_begins_close_to_the_word_that_the_lesson_gave_it(lesson: Path, tmp_path: Path) -> None:
    training = pretraining(lesson, tmp_path)
    encoder, head = training.model.encoder, training.head
    feature = head.weight[WORDS.index("dog")].detach()
    patch = encoder.image_proj(feature) - encoder.image_proj.bias
    names = {word: encoder.embed_tokens.weight[training.tokenizer.encode(f" {word}")[0]] for word in ("dog", "cat")}
    likeness = {word: float(torch.cosine_similarity(patch, name, dim=0)) for word, name in names.items()}
    assert likeness["dog"] > 0.5 > likeness["cat"]
