"""From files to batches that a run learns from: the same from any cursor, with the cache or without, any workers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import tiny
from promptmux_server.backbone.encoder import ImageTokens
from promptmux_server.errors import DataError
from promptmux_server.training.batch import TrainingBatch
from promptmux_server.training.cohort import Cohort
from promptmux_server.training.data.batches import FileBatches
from promptmux_server.training.data.encode import SampleEncoder
from promptmux_server.training.data.stream import Stream
from promptmux_server.training.feature_cache import FeatureCache
from promptmux_server.training.forward import supervised_logits
from promptmux_server.training.methods import DeepPrompts
from promptmux_server.training.recipe import PromptRecipe, StepRecipe
from promptmux_server.training.run import Run
from promptmux_server.training.seeing import Preparation, Stem
from training.data.data_files import encoder, numbered, pictures, surveyed, write_jsonl

TASK = encoder("answer", answers=["one", "two"])


def answers(folder: Path, count: int = 10) -> Path:
    """Questions about pictures, some of them doubtful."""
    pictures(folder, count)
    return write_jsonl(
        folder / "data.jsonl",
        (
            {
                "image": f"{i}.png",
                "text": f"how many {i}",
                "answer": "two" if i % 2 else "one",
                "confidence": 1 - i / 20,
            }
            for i in range(count)
        ),
    )


def made(
    path: Path,
    task: SampleEncoder = TASK,
    cache: FeatureCache | None = None,
    *,
    seed: int = 1,
    rows: int = 4,
    **workers: int,
) -> FileBatches:
    stem = Stem(tiny.model(), tiny.backbone().fingerprint, Preparation.of(task.spec), cache)
    stream = Stream([surveyed(path, task).allow(0).rows()], seed)
    return FileBatches(stream, task, stem, rows, **workers)


def tokens(batch: TrainingBatch) -> list[torch.Tensor]:
    found = []
    for picture in batch.pictures:
        assert isinstance(picture, ImageTokens)
        found.append(picture.tokens)
    return found


def test_a_batch_is_what_a_run_learns_from(tmp_path: Path) -> None:
    batch, cursor = made(answers(tmp_path)).take(None)
    assert cursor == {"epoch": 0, "position": 4}
    assert [example.image for example in batch.examples] == [0, 1, 2, 3]
    assert batch.answers is TASK.answers
    confidence = batch.confidence()
    assert confidence is not None
    assert confidence.unique().numel() > 1
    images = [picture for picture in batch.pictures if isinstance(picture, ImageTokens)]
    logits, targets = supervised_logits(tiny.model(), batch.examples, images)
    assert len(logits) == len(targets) == sum(len(example.target) + 1 for example in batch.examples)


def test_texts_need_no_pictures(tmp_path: Path) -> None:
    batch, _ = made(numbered(tmp_path, 5), encoder("text", takes_image=False)).take(None)
    assert [example.image for example in batch.examples] == [None] * 4
    assert batch.pictures == []
    assert batch.answers is None


def test_the_cache_changes_no_bit(tmp_path: Path) -> None:
    path = answers(tmp_path)
    plain = made(path)
    with FeatureCache(tmp_path / "features") as cache:
        cached, cursor = made(path, cache=cache), None
        for _ in range(5):
            expected, _ = plain.take(cursor)
            found, cursor = cached.take(cursor)
            assert found.examples == expected.examples
            assert all(torch.equal(a, b) for a, b in zip(tokens(found), tokens(expected), strict=True))
    assert cache.stats().misses == 20  # ten pictures, each asked for by its file and by its pixels


@given(steps=st.integers(0, 12), rows=st.integers(1, 7), seed=st.integers(0, 5))
def test_a_resumed_stream_is_the_undisturbed_one(
    tmp_path_factory: pytest.TempPathFactory, steps: int, rows: int, seed: int
) -> None:
    path = numbered(tmp_path_factory.mktemp("resume"), 11)
    task = encoder("text", takes_image=False)
    whole, cursor = made(path, task, seed=seed, rows=rows), None
    for _ in range(steps):
        _, cursor = whole.take(cursor)
    saved = json.dumps(cursor)
    assert len(saved) < 60
    resumed, other = made(path, task, seed=seed, rows=rows), json.loads(saved)
    for _ in range(4):
        expected, cursor = whole.take(cursor)
        found, other = resumed.take(other)
        assert (found.examples, other) == (expected.examples, cursor)


def test_workers_share_a_batch_without_gap_or_overlap(tmp_path: Path) -> None:
    path = answers(tmp_path)
    whole, cursor = made(path, rows=5).take(None)
    shares = [made(path, rows=5, worker=worker, workers=2).take(None) for worker in range(2)]
    sources = [[example.source for example in batch.examples] for batch, _ in shares]
    assert [len(share) for share in sources] == [3, 2]
    assert sorted(sources[0] + sources[1]) == sorted(example.source for example in whole.examples)
    assert [cursor] * 2 == [position for _, position in shares]


def test_a_picture_that_is_gone_is_named_with_its_line(tmp_path: Path) -> None:
    path = answers(tmp_path, 1)
    batches = made(path, rows=1)
    (tmp_path / "0.png").unlink()
    with pytest.raises(DataError, match=r"data\.jsonl, line 1: there is no such picture"):
        batches.take(None)


def test_a_line_that_was_changed_behind_our_back_is_named(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "data.jsonl", [{"image": "0.png", "text": "the cat", "box": [0, 0, 40, 20]}])
    pictures(tmp_path, 1)
    batches = made(path, encoder("box"), rows=1)
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    with pytest.raises(DataError, match=r"data\.jsonl, line 1: its box leaves the picture.*changed since"):
        batches.take(None)


def trial(name: str, data: FileBatches, **recipe: object) -> Run:
    """A short run of deep prompts."""
    prompt = PromptRecipe(encoder_length=3, decoder_length=2, dropout=0.0)
    steps = StepRecipe(**{"steps": 12, "learning_rate": 0.1, "smoothing": 0.0, **recipe})  # type: ignore[arg-type]
    return Run(name, DeepPrompts(tiny.model(), prompt, seed=1), steps, data)


def test_trials_learn_from_one_file_in_one_batch_and_the_stem_sees_each_picture_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[int] = []
    original = tiny.model().image_tokens
    monkeypatch.setattr(
        tiny.model(), "image_tokens", lambda pixels: passes.append(len(pixels)) or original(pixels), raising=False
    )
    path, cohort = answers(tmp_path), Cohort()
    with FeatureCache(tmp_path / "features") as cache:
        for name, rate in (("slow", 0.01), ("fast", 0.1)):
            cohort.join(trial(name, made(path, cache=cache), learning_rate=rate))
        reports = [report for _ in range(12) for report in cohort.advance().steps]
    assert passes == [1] * 10
    fast = [report.nll for report in reports if report.run == "fast"]
    assert len(fast) == 12
    assert sum(fast[-3:]) < 0.8 * sum(fast[:3])


def test_a_run_whose_data_fail_leaves_and_its_neighbours_go_on(tmp_path: Path) -> None:
    cohort = Cohort()
    for name in ("fails", "goes-on"):
        cohort.join(trial(name, made(answers(tmp_path / name)), steps=2))
    for picture in (tmp_path / "fails").glob("*.png"):
        picture.unlink()
    advance = cohort.advance()
    assert [(failure.run.name, type(failure.error)) for failure in advance.failed] == [("fails", DataError)]
    assert [report.run for report in advance.steps] == ["goes-on"]
    assert [run.name for run in cohort.advance().finished] == ["goes-on"]
