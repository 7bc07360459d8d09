"""Two processes that pretrain together take one mean, learn from texts of their own, and go on after a kill."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn

from pocket.lessons import untaught
from promptmux_server.backbone.tokenizer import Tokenizer
from promptmux_server.pocket import WEIGHTS, pretrain
from promptmux_server.pocket.averaging import processes, take_mean
from promptmux_server.pocket.dataset import Pixels, SceneDataset
from promptmux_server.pocket.pretrain import Pretraining, run
from promptmux_server.pocket.recipe import NUM_BINS, Recipe
from promptmux_server.pocket.scenes import Scene, SceneObject

TOKENIZER = Tokenizer.load(WEIGHTS, num_codes=0, num_bins=NUM_BINS)
COUNT, STEPS, KILLED_AT = 2, 6, 3


class OneScene:
    """The least that pretraining asks of a data set; it is killed when a picture too many is asked for."""

    def __init__(self, lasting: int = 1000) -> None:
        self.lasting = lasting

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> tuple[Pixels, Scene]:
        self.lasting -= 1
        if self.lasting < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        dog = SceneObject("dog", (20.0, 40.0, 60.0, 90.0))
        return np.full((128, 128, 3), 60, dtype=np.uint8), Scene(0, "red", (dog,))


def learn(number: int, folder: str, group: str, lasting: int) -> None:
    """What one process does; both leave the weights that they end with."""
    torch.set_num_threads(1)
    pretrain.AVERAGE_EVERY = pretrain.CHECKPOINT_EVERY = 2
    dist.init_process_group("gloo", init_method=f"file://{group}", rank=number, world_size=COUNT)
    lesson, recipe = Path(folder).parent / "stem.safetensors", Recipe(steps=STEPS, images=1, texts=2, warmup_steps=1)
    training = Pretraining(recipe, TOKENIZER, lesson, None, Path(folder))
    run(training, cast(SceneDataset, OneScene(lasting)), number, COUNT)
    trained = {name: p.detach() for name, p in training.model.named_parameters() if p.requires_grad}
    save_file(trained, Path(folder) / f"{number}.safetensors")
    dist.destroy_process_group()


def in_processes(work: Callable[..., None], *arguments: object) -> list[int | None]:
    """Let COUNT new processes work, each with its number, and answer what they end with."""
    new = multiprocessing.get_context("spawn")
    working = [new.Process(target=work, args=(number, *arguments)) for number in range(COUNT)]
    for process in working:
        process.start()
    for process in working:
        process.join()
    return [process.exitcode for process in working]


def learn_together(folder: Path, lasting: int = 1000) -> list[int | None]:
    folder.mkdir(exist_ok=True)
    group = folder / f"group-{random.randrange(1 << 40)}"
    return in_processes(learn, str(folder), str(group), lasting)


def test_both_end_with_the_same_bits_also_after_a_kill(tmp_path: Path) -> None:
    untaught(tmp_path)
    assert learn_together(tmp_path / "whole") == [0, 0]
    assert learn_together(tmp_path / "killed", lasting=KILLED_AT) == [-signal.SIGKILL, -signal.SIGKILL]
    assert not (tmp_path / "killed" / "1.safetensors").exists()
    assert learn_together(tmp_path / "killed") == [0, 0]
    whole, resumed = (load_file(tmp_path / name / "1.safetensors") for name in ("whole", "killed"))
    led = load_file(tmp_path / "whole" / "0.safetensors")
    for name, tensor in whole.items():
        assert torch.equal(tensor, led[name]), name
        assert torch.equal(tensor, resumed[name]), name


def average(number: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=number, world_size=COUNT)
    weight = nn.Parameter(torch.tensor([1.0 + number]))
    optimizer = torch.optim.AdamW([weight], lr=0.0)
    (weight * (2.0 + 4.0 * number)).sum().backward()
    optimizer.step()
    take_mean(optimizer)
    state = optimizer.state[weight]
    save_file(
        {"weight": weight.detach(), "moments": torch.cat([state["exp_avg"], state["exp_avg_sq"]])},
        f"{folder}/{number}.safetensors",
    )
    dist.destroy_process_group()


def test_the_mean_is_that_of_weights_and_of_moments(tmp_path: Path) -> None:
    assert in_processes(average, str(tmp_path)) == [0, 0]
    for number in range(COUNT):
        found = load_file(tmp_path / f"{number}.safetensors")
        assert found["weight"].item() == 1.5
        # gradients 2 and 6; Adam's first moments are a tenth of them, its second a thousandth of their squares
        torch.testing.assert_close(found["moments"], torch.tensor([0.4, 0.020]))


def test_a_process_that_torchrun_did_not_start_is_alone() -> None:
    with processes() as (number, count):
        assert (number, count) == (0, 1)


class AskedError(Exception):
    """Carries the first number drawn for a text."""


def test_processes_learn_from_texts_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def texts(*arguments: Any) -> None:
        raise AskedError(arguments[-1].random())

    monkeypatch.setattr(pretrain, "training_examples", texts)
    training = Pretraining(Recipe(images=1), TOKENIZER, untaught(tmp_path), None, tmp_path)
    drawn = []
    for number in (0, 1, 0):
        with pytest.raises(AskedError) as asked:
            training.train_step(cast(SceneDataset, OneScene()), number)
        drawn.append(asked.value.args)
    assert drawn[0] == drawn[2] != drawn[1]
