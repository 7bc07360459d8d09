"""Every line is looked at before training: what is counted, what is kept for the next start, and what is held out."""

from __future__ import annotations

from pathlib import Path

import pytest

from promptmux_server.errors import DataError
from promptmux_server.training.data import survey as survey_module
from promptmux_server.training.data import whole_pictures
from promptmux_server.training.data.encode import SampleEncoder
from promptmux_server.training.data.source import distinct_targets
from promptmux_server.training.data.survey import survey
from promptmux_server.training.data.task_data import DataConfig, SourceConfig, open_task_data
from training.data.data_files import (
    encoder,
    numbered,
    opened,
    picture,
    pictures,
    standard,
    surveyed,
    write_jsonl,
    write_tsv,
)

TEXTS = encoder("text", takes_image=False)


def test_the_allowance_is_counted_and_the_first_bad_lines_are_named(tmp_path: Path) -> None:
    lines = [{"text": "a", "answer": "one"}] * 5 + ["{"] * 25
    found = surveyed(write_jsonl(tmp_path / "data.jsonl", lines), TEXTS)
    assert found.allow(25).bad_count == 25
    assert len(found.rows()) == 5
    with pytest.raises(DataError) as refusal:
        found.allow(24)
    assert "25 of 30 lines cannot be used" in refusal.value.message
    assert "data.jsonl, line 6: " in refusal.value.message
    assert "and 5 more" in refusal.value.message


def looked_at(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that grows whenever lines are really looked at."""
    looks: list[int] = []
    original = survey_module._Look.rows
    monkeypatch.setattr(survey_module._Look, "rows", lambda *given: looks.append(1) or original(*given))
    return looks


def test_a_good_file_is_looked_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looks, path = looked_at(monkeypatch), numbered(tmp_path, 10)
    for _ in range(2):
        assert list(surveyed(path, TEXTS).rows().lines) == list(range(10))
    assert len(looks) == 1
    surveyed(path, encoder("text", takes_image=False, instruction=" say {text}"))
    numbered(tmp_path, 11)
    surveyed(path, TEXTS)
    assert len(looks) == 3  # another task, another file


def test_a_file_with_faults_is_looked_at_again_since_pictures_may_come(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "data.jsonl", [{"image": "0.png", "caption": "a cat"}])
    assert surveyed(path, encoder("caption")).bad_count == 1
    pictures(tmp_path, 1)
    assert surveyed(path, encoder("caption")).bad_count == 0


def test_a_picture_that_breaks_off_is_found_when_pixels_are_asked_for(tmp_path: Path) -> None:
    whole = picture(form="JPEG")
    (tmp_path / "0.jpg").write_bytes(whole[: len(whole) * 2 // 3])
    path = write_jsonl(tmp_path / "data.jsonl", [{"image": "0.jpg", "caption": "a cat"}] * 2)
    source = opened(path, "caption")
    assert survey(source, encoder("caption"), tmp_path / "cache").bad_count == 0
    assert survey(source, encoder("caption"), tmp_path / "cache", pixels=True).bad_count == 2


def decoded_pictures(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that grows whenever a picture is decoded."""
    looks: list[int] = []
    original = whole_pictures.decoded
    monkeypatch.setattr(whole_pictures, "decoded", lambda *given: looks.append(1) or original(*given))
    return looks


def captions(folder: Path, count: int) -> Path:
    lines = [{"image": f"{i}.png", "caption": "a cat"} for i in range(count)]
    return write_jsonl(pictures(folder, count) / "data.jsonl", lines)


def test_a_picture_is_decoded_once_whatever_the_task_and_again_when_it_was_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, looks = opened(captions(tmp_path, 4), "caption"), decoded_pictures(monkeypatch)

    def bad(task: SampleEncoder) -> int:
        return survey(source, task, tmp_path / "cache", pixels=True).bad_count

    for task in (encoder("caption"), encoder("caption"), encoder("caption", instruction=" say")):
        assert bad(task) == 0
        assert len(looks) == 4
    (tmp_path / "2.png").write_bytes(picture(99))
    assert (bad(encoder("caption")), len(looks)) == (0, 5)
    whole = (tmp_path / "3.png").read_bytes()
    (tmp_path / "3.png").write_bytes(whole[: len(whole) // 2])
    assert (bad(encoder("caption")), bad(encoder("caption")), len(looks)) == (1, 1, 7)  # of a bad one nothing is kept
    (tmp_path / "3.png").unlink()
    assert (bad(encoder("caption")), len(looks)) == (1, 7)
    (tmp_path / "3.png").write_bytes(whole)
    assert (bad(encoder("caption")), len(looks)) == (0, 7)


def test_pictures_within_lines_are_decoded_once_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = picture(1, "JPEG")
    cut = standard(whole[: len(whole) * 2 // 3])
    rows = [["1", "1", "a cat", "", standard(picture(0))], ["2", "2", "a dog", "", cut]]
    source, looks = opened(write_tsv(tmp_path / "data.tsv", rows), "caption"), decoded_pictures(monkeypatch)
    for seen in (2, 3):
        assert survey(source, encoder("caption"), tmp_path / "cache", pixels=True).bad_count == 1
        assert len(looks) == seen


def test_who_is_stopped_while_pictures_are_decoded_has_not_looked_in_vain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    source, looks = opened(captions(tmp_path, 5), "caption"), decoded_pictures(monkeypatch)
    monkeypatch.setattr(survey_module, "ROWS_AT_ONCE", 2)

    def stop(done: int) -> None:
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        survey(source, encoder("caption"), tmp_path / "cache", pixels=True, progress=stop)
    monkeypatch.setattr(survey_module, "TOLD_EVERY_S", 0.0)
    assert survey(source, encoder("caption"), tmp_path / "cache", pixels=True).bad_count == 0
    assert len(looks) == 5
    assert "data.jsonl: 4 of 5 lines are looked at" in caplog.text


def groups(found: survey_module.Rows) -> set[str]:
    return {found.sample(number).group for number in range(len(found))}


def test_a_split_keeps_pictures_whole_and_holds_out_about_its_share(tmp_path: Path) -> None:
    path = write_jsonl(
        tmp_path / "data.jsonl",
        ({"text": f"question {i}", "answer": answer} for answer in ("one", "two") for i in range(400)),
    )
    found = surveyed(path, TEXTS)
    train, heldout = found.rows("train", 0.2), found.rows("heldout", 0.2)
    assert not groups(train) & groups(heldout)
    assert len(train) + len(heldout) == 800
    assert 50 <= len(groups(heldout)) <= 112  # 80 expected, standard deviation 8
    assert len(heldout) == 2 * len(groups(heldout))


def test_a_split_is_by_content_so_new_lines_move_no_old_ones(tmp_path: Path) -> None:
    before = groups(surveyed(numbered(tmp_path, 100), TEXTS).rows("heldout", 0.3))
    after = groups(surveyed(numbered(tmp_path, 200), TEXTS).rows("heldout", 0.3))
    assert before < after
    assert before == {group for group in after if int(group.split("|")[0]) < 100}


def test_a_side_without_samples_is_refused(tmp_path: Path) -> None:
    found = surveyed(numbered(tmp_path, 3), TEXTS)
    with pytest.raises(DataError, match="no sample is left"):
        found.rows("heldout", 1e-6)


def test_a_task_reads_one_file_and_is_scored_on_what_is_held_out(tmp_path: Path) -> None:
    path = numbered(tmp_path, 60)
    made = open_task_data(DataConfig(train=[SourceConfig(path=path)], heldout=0.25), TEXTS, tmp_path / "cache")
    learned = {made.train.sample(number).group for number in range(made.train.epoch_samples)}
    scored = set.union(*(groups(rows) for rows in made.validation))
    assert len(learned) + len(scored) == 60
    assert not learned & scored


def test_a_task_reads_several_files_and_is_scored_on_another(tmp_path: Path) -> None:
    train = [SourceConfig(path=numbered(tmp_path, count, f"{count}.jsonl")) for count in (10, 20)]
    bad = write_jsonl(tmp_path / "bad.jsonl", [{"text": "a", "answer": "one"}, "{"])
    config = DataConfig(train=train, validation=SourceConfig(path=bad), skip_bad=1, weights=[1, 1])
    made = open_task_data(config, TEXTS, tmp_path / "cache")
    assert (made.train.epoch_samples, len(made.validation[0]), made.skipped) == (30, 1, 1)
    with pytest.raises(DataError, match=r"bad.jsonl, line 2"):
        open_task_data(DataConfig(train=train, validation=SourceConfig(path=bad)), TEXTS, tmp_path / "cache")


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        (DataConfig(train=[]), "at least one file"),
        (DataConfig(train=[SourceConfig(path=Path("a.jsonl"))], weights=[1, 2]), "one weight for each"),
        (DataConfig(train=[SourceConfig(path=Path("a.jsonl"))], heldout=1.0), "above 0 and below 1"),
    ],
)
def test_a_configuration_that_makes_no_sense_is_refused(tmp_path: Path, config: DataConfig, complaint: str) -> None:
    with pytest.raises(DataError, match=complaint):
        open_task_data(config, TEXTS, tmp_path)


def test_labels_are_found_in_the_data(tmp_path: Path) -> None:
    lines = [{"image": "0.png", "text": "a", "label": label} for label in ("cat", "dog", "cat")]
    source = opened(write_jsonl(tmp_path / "data.jsonl", [*lines, "{"]), "label")
    assert distinct_targets(source, 2) == ["cat", "dog"]
    with pytest.raises(DataError, match="more than 1 different"):
        distinct_targets(source, 1)
    with pytest.raises(DataError, match="no line with a label"):
        distinct_targets(opened(numbered(tmp_path, 2), "label"), 2)
