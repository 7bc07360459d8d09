"""What a search promises: trials are jobs as any other, the worse ones end, one that fails fails alone."""

from __future__ import annotations

import errno
import json
import math
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from optuna.storages.journal import JournalFileBackend

import tiny
from promptmux_prompts import write_prompt
from promptmux_server.errors import CheckpointNotWritten, TrainingConfigError, TrainingError
from promptmux_server.training import cohort as cohort_module
from promptmux_server.training.job import Job, Stepped
from promptmux_server.training.job_config import BeginConfig
from promptmux_server.training.loss import Loss
from promptmux_server.training.methods import DeepPrompts
from promptmux_server.training.run import Run
from promptmux_server.training.search.record import TrialRecord, best_of
from promptmux_server.training.search.report import read_report
from promptmux_server.training.search.search import Ended, Event, Joined, Search, Stopped
from promptmux_server.training.search.space import Axis, Choice, read_axis
from promptmux_server.training.search.study import LOCK, Study
from training import job_worker
from training.search_cases import config, run, search

Done = tuple[Path, list[Event], list[TrialRecord]]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Done:
    """An undisturbed search: its folder, its events, its trials."""
    folder = tmp_path_factory.mktemp("search")
    return folder, *run(search(folder))


def losses(folder: Path, trial: str) -> list[float]:
    lines = (folder / "search/trials" / trial / "curve.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines if "loss" in line]


def untrained(job: Job) -> dict[str, torch.Tensor]:
    """Where a job's parameters began."""
    method = DeepPrompts(job.backbone.model, job.config.prompt, seed=job.config.steps.seed)
    return {name: value.detach() for name, value in method.parameters.items()}


def test_the_same_seed_and_width_draw_and_score_the_same_trials(done: Done, tmp_path: Path) -> None:
    assert run(search(tmp_path))[1] == done[2]
    other = tmp_path / "other"
    assert [trial.values for trial in run(search(other, seed=2, trials=2))[1]] != [t.values for t in done[2][:2]]


def test_the_batch_is_full_while_trials_are_left(done: Done) -> None:
    learning, most, drawn = set[int](), 0, 0
    for event in done[1]:
        if isinstance(event, Joined):
            learning.add(event.trial.number)
            drawn += 1
        elif isinstance(event, Ended):
            learning.discard(event.trial.number)
        most = max(most, len(learning))
    assert (most, drawn, learning) == (4, 8, set())


def test_trials_in_other_layers_learn_in_one_batch_what_each_learns_alone(tmp_path: Path) -> None:
    space: dict[str, Axis] = {"encoder_layers": read_axis([[0, 1], [1, 2], [0, 3]]), "dropout": Choice((0.0,))}

    def opened(trials: int) -> Search:
        return search(tmp_path, space=space, trials=trials, at_once=3, rungs=[], seed=4, steps=3)

    run(opened(3))
    searched = opened(5)  # goes on with the journal
    _, trials = run(searched)
    assert {trial.values["encoder_layers"] for trial in trials} == {"[0, 1]", "[1, 2]", "[0, 3]"}
    for trial in trials:
        if trial.values["encoder_layers"] == "[0, 3]":
            assert trial.reason == "prompt.encoder_layers must lie within [0, 2], the backbone's layers."
            continue
        job = searched.job_of(trial)
        alone = replace(job.config.prompt, encoder_layers=tuple(json.loads(str(trial.values["encoder_layers"]))))
        assert job.config.prompt == alone
        expected = job_worker.job(tmp_path / trial.name, steps=job.config.steps, prompt=alone, rows=3)
        with expected:
            expected.resume()
            steps = [event.report.loss for event in expected.events() if isinstance(event, Stepped)]
        assert losses(tmp_path, trial.name) == pytest.approx(steps, rel=1e-5)


def test_at_a_rung_the_best_go_on(done: Done) -> None:
    trials = done[2]
    pruned = [trial for trial in trials if trial.state == "pruned"]
    assert pruned
    assert all(max(trial.scores) in (2, 4) for trial in pruned)
    first = sorted(trials[:4], key=lambda trial: -trial.scores[2])  # the first batch stood there together
    assert [max(trial.scores) > 2 for trial in first] == [True, True, False, False]
    best = best_of(trials)
    assert best is not None
    assert best.score == max(best.scores.values())


def test_a_text_to_begin_from_that_is_too_long_is_named_before_anything_is_drawn(tmp_path: Path) -> None:
    space: dict[str, Axis] = {"begin": Choice(("noise", "text"))}
    given = config(tmp_path, space=space).model_copy(update={"begin": BeginConfig(text=[" one" * 2000])})
    with pytest.raises(TrainingConfigError, match=r"begin\.text: a text has \d+ tokens"):
        Search(given, job_worker.backbone(), job_worker.any_score)
    assert not (tmp_path / "search").exists()


def test_without_rungs_all_go_to_the_end(tmp_path: Path) -> None:
    trials = run(search(tmp_path, rungs=[], trials=5, steps=3))[1]
    assert [(trial.state, list(trial.scores)) for trial in trials] == [("complete", [3])] * 5


def test_a_trial_learns_what_the_same_job_learns_alone(done: Done, tmp_path: Path) -> None:
    folder, _, trials = done
    best = best_of(trials)
    assert best is not None
    values = dict(best.values)
    given = config(folder)
    rate = values.pop("learning_rate")
    steps, prompt = replace(given.steps, learning_rate=rate), replace(given.prompt, **values)
    alone = job_worker.config(folder, steps=steps).model_copy(
        update={"output": tmp_path, "prompt": prompt, "run": given.run}
    )
    with Job(alone, job_worker.backbone(), job_worker.any_score) as job:
        job.resume()
        assert list(job.events())
    opened = search(folder)
    with opened:
        trial = opened.job_of(best)
        assert trial.resume() == 6
    for name, value in job.run.saved().items():
        torch.testing.assert_close(trial.run.saved()[name], value, atol=1e-5, rtol=0)
    parameters = trial.run.values()
    assert any(float((value - parameters[name]).abs().max()) > 1e-3 for name, value in untrained(trial).items())


def test_a_trial_that_is_no_number_any_more_fails_alone(
    done: Done, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learned = Run.loss

    def spoilt(run: Run, *arguments: object) -> Loss:
        loss = learned(run, *arguments)  # type: ignore[arg-type]
        return replace(loss, total=loss.total * math.nan) if run.name == "0002" and run.step == 1 else loss

    monkeypatch.setattr(Run, "loss", spoilt)
    trials = run(search(tmp_path))[1]
    assert trials[2].state == "failed"
    assert "Run 0002: the loss is not finite at step 2" in str(trials[2].reason)
    assert [trial.state for trial in trials].count("failed") == 1
    assert best_of(trials) is not None
    assert done[2][2].state != "failed"
    for number in ("0000", "0001", "0003"):
        both = zip(losses(tmp_path, number), losses(done[0], number), strict=False)
        assert all(abs(one - other) <= 1e-5 for one, other in both)
    assert losses(tmp_path, "0002") == pytest.approx(losses(done[0], "0002")[:1])


def test_values_that_do_not_go_with_a_beginning_fail_alone(tmp_path: Path) -> None:
    space: dict[str, Axis] = {"generator": Choice(("table", "mlp")), "begin": Choice(("text",))}
    asked = config(tmp_path, space=space, steps=2, rungs=[], trials=6)
    asked = asked.model_copy(update={"begin": BeginConfig(text=[" how many"])})
    trials = run(Search(asked, job_worker.backbone(), job_worker.any_score))[1]
    ended = {(trial.values["generator"], trial.state) for trial in trials}
    assert ended == {("table", "complete"), ("mlp", "failed")}
    assert all("prompt.generator" in str(trial.reason) for trial in trials if trial.state == "failed")


def test_a_device_without_memory_ends_the_search_with_what_to_change(
    done: Done, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patched:
        patched.setattr(cohort_module, "backward", full)
        with pytest.raises(
            TrainingError, match=r"no memory for step 1: .*compute\.rows_per_pass where many runs learn"
        ):
            run(search(tmp_path))
    assert run(search(tmp_path))[1] == done[2]


def test_prompts_to_begin_from_that_cannot_be_had_fail_no_trial(tmp_path: Path) -> None:
    asked = config(tmp_path, space={"dropout": Choice((0.0,))}, steps=2, rungs=[], trials=2)
    file = tmp_path / "other.safetensors"
    asked = asked.model_copy(update={"begin": BeginConfig(prompt=str(file))})
    with pytest.raises(TrainingConfigError, match=r"begin\.prompt: other cannot be begun from"):
        run(Search(asked, job_worker.backbone(), job_worker.any_score))
    file.write_bytes(write_prompt(tiny.prompt("other")))
    trials = run(Search(asked, job_worker.backbone(), job_worker.any_score))[1]
    assert [trial.state for trial in trials] == ["complete", "complete"]


def test_a_search_of_which_every_trial_fails_says_why(tmp_path: Path) -> None:
    nothing: dict[str, Axis] = {"encoder_length": Choice((0,)), "decoder_length": Choice((0,))}
    with pytest.raises(TrainingError, match=r"No trial came to its end.*encoder_length must be above 0"):
        run(search(tmp_path, space=nothing, trials=3))


def test_a_stopped_search_goes_on_to_the_same_trials(done: Done, tmp_path: Path) -> None:
    left = iter(range(3))
    events, trials = run(search(tmp_path), lambda: next(left, None) is None)
    assert isinstance(events[-1], Stopped)
    assert [trial.state for trial in trials] == ["running"] * len(trials) or len(trials) > 4
    assert run(search(tmp_path))[1] == done[2]


def test_more_trials_may_be_asked_for_later(done: Done, tmp_path: Path) -> None:
    assert len(run(search(tmp_path, trials=3))[1]) == 3
    assert len(run(search(tmp_path, trials=5))[1]) == 5
    with pytest.raises(TrainingError, match=r"of another search: its search, space differ"):
        run(search(tmp_path, trials=5, seed=7, space={"dropout": Choice((0.0,))}))


def test_what_a_dead_process_left_of_the_journal_is_mended(tmp_path: Path) -> None:
    expected = run(search(tmp_path, trials=2))[1]
    journal = tmp_path / "search/journal.jsonl"
    with journal.open("ab") as file:
        file.write(b'{"op_code": 4, "cut o')
    (journal.parent / LOCK).symlink_to(journal)
    assert Study.read(tmp_path / "search").trials() == expected
    assert run(search(tmp_path, trials=2))[1] == expected
    assert journal.read_bytes().endswith(b"}\n")


def test_a_full_disk_ends_the_search_and_it_goes_on(
    done: Done, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    append, written = JournalFileBackend.append_logs, []

    def full(self: JournalFileBackend, logs: list[dict[str, object]]) -> None:
        written.append(logs)
        if len(written) == 30:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        append(self, logs)

    monkeypatch.setattr(JournalFileBackend, "append_logs", full)
    with pytest.raises(CheckpointNotWritten, match=r"journal of the search cannot be written: the disk is full\. Make"):
        run(search(tmp_path))
    assert run(search(tmp_path))[1] == done[2]


def test_the_report_has_every_trial_with_its_curve(done: Done) -> None:
    report = read_report(done[0] / "search")
    assert report.trials == done[2]
    assert report.best == best_of(done[2])
    assert set(report.importances) == {"learning_rate", "encoder_length", "decoder_length", "dropout"}
    assert sum(report.importances.values()) == pytest.approx(1.0)
    for trial in report.trials:
        assert max(report.curves[trial.name].step) == max(trial.scores)
    with pytest.raises(TrainingError, match="no journal"):
        read_report(done[0])


def test_a_drawing_that_was_cut_short_goes_on_to_the_same_values(tmp_path: Path) -> None:
    """Of a trial without a past, and of one that the sampler draws from what others scored."""
    space, drawn = config(tmp_path).search.space, 12
    for folder in ("whole", "cut"):
        (tmp_path / folder).mkdir()
    whole = Study.open(tmp_path / "whole", space, 1)
    journal, cut = tmp_path / "whole/journal.jsonl", tmp_path / "cut/journal.jsonl"
    for number in range(drawn):
        before = journal.read_bytes().count(b"\n") if number in (0, drawn - 1) else None
        trial = whole.draw(0)
        if before is not None:
            lines = journal.read_bytes().splitlines(keepends=True)
            for end in range(before + 1, len(lines)):
                cut.write_bytes(b"".join(lines[:end]))
                assert [t.values for t in Study.open(cut.parent, space, 1).go_on(0)] == [trial.values]
        whole.report(number, 2, float(number % 5))
        whole.end(number, "complete", float(number % 5))
