"""The stem's lesson has exact truth, the model begins by matching, and a killed run goes on as if it never stopped."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from promptmux_server.backbone.model import OFA
from promptmux_server.backbone.tokenizer import Tokenizer
from promptmux_server.backbone.vision import VisionStem
from promptmux_server.pocket import WEIGHTS
from promptmux_server.pocket.dataset import Pixels
from promptmux_server.pocket.pretrain import Pretraining, run
from promptmux_server.pocket.recipe import (
    NUM_BINS,
    Recipe,
    begin_by_matching,
    initialise,
    place_waves,
    pocket_config,
)
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


def test_attention_begins_by_finding_like_and_copying_it() -> None:
    model = OFA(pocket_config(500), folded=False)
    initialise(model)
    begin_by_matching(model)
    own = model.encoder.layers[0].self_attn  # type: ignore[union-attr]
    cross = model.decoder.layers[0].encoder_attn  # type: ignore[union-attr]
    assert torch.equal(own.q_proj.weight, own.k_proj.weight)  # type: ignore[union-attr]
    assert not torch.equal(cross.q_proj.weight, cross.k_proj.weight)  # type: ignore[union-attr]
    for attention in (own, cross):
        copied = attention.out_proj.weight @ attention.v_proj.weight  # type: ignore[union-attr, operator]
        torch.testing.assert_close(copied, torch.eye(len(copied)), atol=1e-5, rtol=0)


def test_near_places_look_more_alike_than_far_ones() -> None:
    waves = place_waves(torch.tensor([40, 42, 60, 120]), 192)
    likeness = waves @ waves[0] / 192
    assert likeness[0] == pytest.approx(1.0, abs=1e-5)
    assert likeness[1] > likeness[2] + 0.2 > likeness[3]


class TwoScenes:
    """The least that pretraining asks of a data set."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> tuple[Pixels, Scene]:
        scene = Scene(index, ("red", "blue")[index], ((DOG, CAT), (CAT,))[index])
        return np.full((128, 128, 3), 60 * index, dtype=np.uint8), scene


def pretraining(lesson: Path, folder: Path) -> Pretraining:
    recipe = Recipe(steps=4, images=2, texts=3, warmup_steps=1)
    tokenizer = Tokenizer.load(WEIGHTS, num_codes=0, num_bins=NUM_BINS)
    return Pretraining(recipe, tokenizer, lesson, TwoScenes(), 2, folder)  # type: ignore[arg-type]


@pytest.fixture
def lesson(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = pocket_config(500)
    stem, head = VisionStem(config, folded=False), nn.Linear(config.image_feature_dim, ANSWERS)
    tensors = stem.state_dict() | {f"head.{name}": tensor for name, tensor in head.state_dict().items()}
    save_file(tensors, tmp_path / "stem.safetensors")
    return tmp_path / "stem.safetensors"


def test_a_killed_run_ends_with_the_weights_of_an_undisturbed_one(lesson: Path, tmp_path: Path) -> None:
    run(pretraining(lesson, tmp_path / "whole"))
    killed = pretraining(lesson, tmp_path / "killed")
    (tmp_path / "killed").mkdir()
    for _ in range(2):
        killed.train_step()
    killed.save()
    run(pretraining(lesson, tmp_path / "killed"))
    whole, resumed = (load_file(tmp_path / name / "checkpoint.safetensors") for name in ("whole", "killed"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_pretraining_leaves_the_stem_as_it_was_taught(lesson: Path, tmp_path: Path) -> None:
    training = pretraining(lesson, tmp_path / "run")
    taught = {name: tensor.clone() for name, tensor in load_file(lesson).items() if not name.startswith("head.")}
    before = training.model.encoder.image_proj.weight.detach().clone()
    training.train_step()
    stem = training.model.encoder.embed_images.state_dict()
    assert all(torch.equal(stem[name], tensor) for name, tensor in taught.items())
    assert not torch.equal(before, training.model.encoder.image_proj.weight)
