"""What a job promises: it stops and goes on, refuses what is of another run, and loses no checkpoint to a fault."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import tiny
from promptmux_prompts import Prompt
from promptmux_server.backbone.weights import LoadedBackbone
from promptmux_server.errors import (
    CheckpointNotWritten,
    DataError,
    RunHeld,
    TrainingConfigError,
    TrainingDiverged,
    TrainingError,
)
from promptmux_server.training import cohort as cohort_module
from promptmux_server.training import run as run_module
from promptmux_server.training.checkpoint import Checkpoints
from promptmux_server.training.job import Event, Job, Scored, Stopped, held
from promptmux_server.training.metrics import Score
from promptmux_server.training.recipe import PromptRecipe, StepRecipe
from promptmux_server.training.validation import Exam, OpenBackbone
from training.data.data_files import picture
from training.job_worker import any_score, backbone, config, data, job

SHORT = StepRecipe(steps=8, learning_rate=0.05)


def go(opened: Job, stop_at: int | None = None, *, changed_recipe: bool = False) -> list[Event]:
    with opened:
        opened.resume(changed_recipe=changed_recipe)
        return list(opened.events(lambda: opened.run.step == stop_at))


def kept(folder: Path) -> list[int]:
    return [mark.step for mark in Checkpoints(folder / "out" / "checkpoints").marks()]


def short(folder: Path, **changes: object) -> Job:
    return job(folder, **{"steps": SHORT, **changes})  # type: ignore[arg-type]


def test_a_stopped_job_keeps_where_it_stands_and_goes_on_to_the_same_prompt(tmp_path: Path) -> None:
    whole, parts = short(tmp_path / "whole"), tmp_path / "parts"
    go(whole)
    assert go(short(parts), 3)[-1] == Stopped(3)
    assert kept(parts) == [2, 3]
    opened = short(parts)
    events = go(opened)
    assert not any(isinstance(event, Stopped) for event in events)
    assert opened.learned().digest == whole.learned().digest


def test_the_prompt_of_the_best_score_is_what_was_learned(tmp_path: Path) -> None:
    asked: list[str] = []

    def fading(backbone: OpenBackbone, prompt: Prompt, exam: Exam) -> Score:
        asked.append(prompt.digest)
        return Score("any", 1.0 / len(asked), len(exam.questions))

    opened = short(tmp_path, scorer=fading, validate_every=3)
    events = [event for event in go(opened) if isinstance(event, Scored)]
    assert [(event.step, event.best) for event in events] == [(3, 1.0), (6, 1.0), (8, 1.0)]
    learned = opened.learned()
    assert learned.manifest.metric == {"name": "accuracy", "value": 1.0, "n": len(opened.exam.questions)}
    assert learned.manifest.provenance["chosen_step"] == 3
    assert learned.manifest.provenance["learning_rate"] == 0.05
    again = short(tmp_path, scorer=fading, validate_every=3)
    with again:
        assert again.resume() == 8
        assert list(again.events()) == []
    assert again.learned().digest == learned.digest


def test_a_finished_job_without_a_score_has_nothing_to_give(tmp_path: Path) -> None:
    opened = short(tmp_path)
    go(opened, 3)
    with pytest.raises(TrainingError, match="not at its end"):
        opened.learned()


def test_the_curve_has_every_step_once(tmp_path: Path) -> None:
    go(short(tmp_path), 5)
    curve = tmp_path / "out" / "curve.jsonl"
    with curve.open("a") as file:
        file.write('{"step": 6, "loss": 9}\n{"step": 7, "lo')  # what a process leaves that dies before its checkpoint
    go(short(tmp_path))
    lines = [json.loads(line) for line in curve.read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 9))
    assert [line["step"] for line in lines if "value" in line] == [8]


def another_backbone() -> OpenBackbone:
    mine = backbone()
    tensors = {name: tensor + 0.0 for name, tensor in mine.loaded.tensors.items()}
    tensors[next(iter(tensors))] += 1.0
    return replace(mine, loaded=LoadedBackbone(tiny.config(), tensors))


def test_checkpoints_of_another_backbone_are_refused(tmp_path: Path) -> None:
    go(short(tmp_path), 3)
    other = Job(config(tmp_path, steps=SHORT), another_backbone(), any_score)
    with pytest.raises(TrainingError, match="of another run: its backbone, task differ") as refused:
        go(other)
    assert "changed-recipe" not in refused.value.message
    assert kept(tmp_path) == [2, 3]
    go(short(tmp_path))  # the control: its own backbone


def test_another_recipe_is_refused_unless_it_is_allowed(tmp_path: Path) -> None:
    go(short(tmp_path), 3)
    gentler = replace(SHORT, learning_rate=0.001)
    with pytest.raises(TrainingError, match=r"its steps differ.*--changed-recipe"):
        go(short(tmp_path, steps=gentler))
    go(short(tmp_path, steps=gentler), changed_recipe=True)
    assert kept(tmp_path)[-1] == 8


@pytest.mark.parametrize(("before", "after"), [(None, 0.5), (0.5, None)])
def test_a_recipe_may_ask_for_an_average_from_now_on_or_no_longer(
    tmp_path: Path, before: float | None, after: float | None
) -> None:
    asked: list[Prompt] = []

    def fading(backbone: OpenBackbone, prompt: Prompt, exam: Exam) -> Score:
        asked.append(prompt)
        return Score("any", 1.0 / len(asked), len(exam.questions))

    def averaged(decay: float | None) -> Job:
        return short(tmp_path, scorer=fading, validate_every=2, steps=replace(SHORT, average_decay=decay))

    go(averaged(before), 3)
    opened = averaged(after)
    go(opened, changed_recipe=True)
    learned = opened.learned()
    assert learned.manifest.provenance["chosen_step"] == 2  # under the recipe before
    assert isinstance(learned, Prompt)
    assert torch.equal(learned.encoder_key, asked[0].encoder_key)
    parameters = opened.run.method.parameters
    same = [torch.equal(value, parameters[name]) for name, value in opened.run.values().items()]
    assert all(same) == (after is None)


@pytest.mark.parametrize("scored", [False, True])
def test_a_recipe_of_fewer_steps_than_were_taken_ends_with_what_there_is(tmp_path: Path, scored: bool) -> None:
    go(short(tmp_path, validate_every=5 if scored else 8), 5)
    opened = short(tmp_path, steps=replace(SHORT, steps=4))
    events = go(opened, changed_recipe=True)
    assert [(type(event), event.step) for event in events if isinstance(event, Scored)] == [(Scored, 5)] * (not scored)
    assert opened.learned().manifest.provenance["chosen_step"] == 5


def in_layers(encoder: tuple[int, int] | None) -> PromptRecipe:
    return PromptRecipe(encoder_length=4, decoder_length=3, encoder_layers=encoder)


def test_a_prompt_of_other_layers_is_another_run(tmp_path: Path) -> None:
    go(short(tmp_path, prompt=in_layers((1, 2))), 3)
    for other in (None, (0, 1), (0, 2)):
        with pytest.raises(TrainingError, match="of another run: its task, prompt differ"):
            go(short(tmp_path, prompt=in_layers(other)))
    opened = short(tmp_path, prompt=in_layers((1, 2)))
    go(opened)
    learned = opened.learned()
    assert (learned.manifest.encoder_layers, learned.manifest.decoder_layers) == ((1, 2), None)
    assert isinstance(learned, Prompt)
    assert not learned.encoder_key[0].any()
    assert learned.encoder_key[1].any()
    assert learned.manifest.provenance["trainable"] == (4 * 1 + 3 * 3) * 2 * 64


def test_all_layers_written_out_are_all_layers(tmp_path: Path) -> None:
    opened = short(tmp_path, prompt=in_layers((0, 2)))
    go(opened)
    assert opened.learned().manifest.encoder_layers is None


def test_layers_that_the_backbone_has_not_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainingConfigError, match=r"prompt.encoder_layers must lie within \[0, 2\], the backbone's"):
        short(tmp_path, prompt=in_layers((1, 3)))


def test_changed_data_are_refused(tmp_path: Path) -> None:
    go(short(tmp_path), 3)
    path = data(tmp_path)
    path.write_text(path.read_text().replace("how many 1", "how many of 1"))
    with pytest.raises(TrainingError, match="of another run: its data"):
        go(short(tmp_path))


def test_changed_pictures_are_refused(tmp_path: Path) -> None:
    go(short(tmp_path), 3)
    path = tmp_path / "7.png"
    good, state = path.read_bytes(), path.stat()
    for other in (picture(99), good + b"more"):
        path.write_bytes(other)
        os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
        with pytest.raises(TrainingError, match=r"of another run: its pictures differ.*--changed-pictures"):
            go(short(tmp_path))
    path.write_bytes(good[:60] + bytes([good[60] ^ 1]) + good[61:])
    with pytest.raises(DataError, match=r"data\.jsonl, line 8: the picture cannot be decoded"):
        short(tmp_path)
    path.unlink()
    with pytest.raises(DataError, match=r"data\.jsonl, line 8: there is no such picture"):
        short(tmp_path)
    assert kept(tmp_path) == [2, 3]
    path.write_bytes(good)  # with another time, as a copy has
    go(short(tmp_path))
    assert kept(tmp_path)[-1] == 8


def test_a_run_goes_on_with_other_pictures_where_that_is_allowed(tmp_path: Path) -> None:
    go(short(tmp_path), 3)
    (tmp_path / "7.png").write_bytes(picture(99))
    gentler = replace(SHORT, learning_rate=0.001)
    with pytest.raises(TrainingError, match=r"its pictures, steps differ.*--changed-pictures --changed-recipe"):
        go(short(tmp_path, steps=gentler))
    with pytest.raises(TrainingError, match=r"its steps differ"), short(tmp_path, steps=gentler) as opened:
        opened.resume(changed_pictures=True)
    with short(tmp_path) as opened:
        assert opened.resume(changed_pictures=True) == 3
        list(opened.events())
    assert kept(tmp_path)[-1] == 8
    with short(tmp_path) as opened:
        assert opened.resume() == 8  # it is the run of these pictures now


def test_a_loss_that_is_not_finite_ends_the_run_and_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go(short(tmp_path), 3)
    loss = run_module.label_smoothed_loss

    def spoilt(logits: object, *arguments: object, **options: object) -> object:
        return loss(logits * float("nan"), *arguments, **options)  # type: ignore[arg-type,operator]

    with monkeypatch.context() as patched:
        patched.setattr(run_module, "label_smoothed_loss", spoilt)
        with pytest.raises(TrainingDiverged, match=r"not finite at step 4.*000002-step-3.*lower learning"):
            go(short(tmp_path))
    assert kept(tmp_path) == [2, 3]
    go(short(tmp_path))
    assert kept(tmp_path)[-1] == 8


def test_a_device_without_memory_says_what_to_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go(short(tmp_path), 3)

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patched:
        patched.setattr(cohort_module, "backward", full)
        with pytest.raises(TrainingError, match=r"no memory for step 4: set compute\.recompute"):
            go(short(tmp_path))
    assert kept(tmp_path) == [2, 3]


def test_a_corrupt_line_is_named_before_anything_is_learned(tmp_path: Path) -> None:
    go(short(tmp_path), 3)
    path = data(tmp_path)
    good = path.read_text()
    path.write_text(good + "{broken\n")
    with pytest.raises(DataError, match=r"data\.jsonl, line 13"):
        short(tmp_path)
    assert kept(tmp_path) == [2, 3]
    path.write_text(good)
    go(short(tmp_path))


def test_a_picture_that_is_spoilt_while_a_job_runs_is_named(tmp_path: Path) -> None:
    go(short(tmp_path), 3)
    opened = short(tmp_path)
    good = {path: path.read_bytes() for path in tmp_path.glob("*.png")}
    for path in good:
        path.write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"data\.jsonl, line \d+: the picture cannot be decoded"):
        go(opened)
    assert kept(tmp_path) == [2, 3]
    with pytest.raises(DataError, match="12 of 12 lines cannot be used"):
        short(tmp_path)
    for path, whole in good.items():
        path.write_bytes(whole)
    with short(tmp_path) as mended:
        assert mended.resume() == 3
        list(mended.events())
    assert kept(tmp_path)[-1] == 8


def test_a_picture_that_breaks_off_is_refused_or_left_out_before_the_first_step(tmp_path: Path) -> None:
    data(tmp_path)
    whole = picture(5, "JPEG")
    (tmp_path / "5.png").write_bytes(whole[: len(whole) * 2 // 3])  # its header is good
    with pytest.raises(DataError, match=r"1 of 12 lines.*\n.*data\.jsonl, line 6: the picture cannot be decoded"):
        short(tmp_path)
    made = config(tmp_path, steps=SHORT)
    opened = Job(made.model_copy(update={"data": replace(made.data, skip_bad=1)}), backbone(), any_score)
    go(opened)
    assert opened.data.skipped == 1
    assert opened.learned()


def test_a_full_disk_ends_the_run_and_loses_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go(short(tmp_path), 3)
    write = Checkpoints._write

    def full(self: Checkpoints, *arguments: object) -> None:
        self._disk.make_folder("unfinished-1")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(Checkpoints, "_write", full)
        with pytest.raises(CheckpointNotWritten, match=r"step 4 cannot be written: the disk is full\. Make room"):
            go(short(tmp_path))
    assert Checkpoints._write is write
    assert kept(tmp_path) == [2, 3]
    go(short(tmp_path))
    assert kept(tmp_path)[-1] == 8


def test_a_job_has_one_process_at_a_time(tmp_path: Path) -> None:
    made = config(tmp_path)
    with held(made), pytest.raises(RunHeld, match="Another process"), held(made):
        pass
