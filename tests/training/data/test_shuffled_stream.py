"""Order: every sample once an epoch, another order for every seed, epoch and source, and the same from any cursor."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from promptmux_server.errors import DataError
from promptmux_server.training.data.shuffle import Shuffled
from promptmux_server.training.data.stream import TURNS, Stream
from promptmux_server.training.data.survey import Rows
from training.data.data_files import numbered, opened


@given(length=st.integers(1, 3000), seed=st.integers(0, 1 << 40))
def test_a_shuffle_is_a_permutation(length: int, seed: int) -> None:
    order = Shuffled(length, seed)
    assert sorted(order[position] for position in range(length)) == list(range(length))


def test_beyond_its_length_a_shuffle_has_nothing() -> None:
    for position in (-1, 5):
        with pytest.raises(IndexError):
            Shuffled(5, 1)[position]


def test_every_order_of_few_things_is_as_likely_as_any_other() -> None:
    counts = Counter(tuple(Shuffled(4, seed)[position] for position in range(4)) for seed in range(4800))
    assert len(counts) == 24
    expected = 4800 / 24
    # Chi-square of 23 degrees of freedom: 49.7 is exceeded by one fair shuffle in a thousand.
    assert sum((count - expected) ** 2 / expected for count in counts.values()) < 49.7


def test_neighbours_of_many_things_are_not_neighbours_afterwards() -> None:
    order = np.array([Shuffled(5000, 7)[position] for position in range(5000)])
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.05
    assert abs(np.corrcoef(np.arange(5000), order)[0, 1]) < 0.05


def test_an_order_never_changes_between_versions() -> None:
    """A run that was stopped goes on with a later version of this code: these numbers must stay."""
    assert [Shuffled(10, 1, "rows", 0, 0)[position] for position in range(10)] == [4, 1, 8, 5, 0, 9, 3, 7, 6, 2]


def stream(folder: Path, counts: tuple[int, ...], seed: int = 1, weights: tuple[float, ...] | None = None) -> Stream:
    """Sources of numbered texts, nothing of them held out."""
    sources = []
    for index, count in enumerate(counts):
        source = opened(numbered(folder, count, f"{index}.jsonl"), "text")
        sources.append(Rows(source, np.arange(count, dtype=np.uint32), np.zeros(count, np.uint32)))
    return Stream(sources, seed, weights)


def epoch(made: Stream, number: int) -> list[str | None]:
    start = number * made.epoch_samples
    return [made.sample(start + position).text for position in range(made.epoch_samples)]


def test_an_epoch_has_every_sample_once_in_an_order_of_its_own(tmp_path: Path) -> None:
    made, again, other = stream(tmp_path, (50,)), stream(tmp_path, (50,)), stream(tmp_path, (50,), seed=2)
    epochs = [epoch(made, number) for number in range(3)]
    for one in epochs:
        assert sorted(map(str, one)) == sorted(map(str, range(50)))
    assert all(a != b for a, b in itertools.combinations([*epochs, epoch(other, 0)], 2))
    assert epochs == [epoch(again, number) for number in range(3)]


@given(start=st.integers(0, 260), steps=st.integers(1, 40))
def test_from_any_cursor_the_stream_goes_on_as_it_would_have(
    tmp_path_factory: pytest.TempPathFactory, start: int, steps: int
) -> None:
    folder = tmp_path_factory.mktemp("stream")
    made = stream(folder, (30, 17), weights=(2.0, 1.0))
    whole = [made.place(number) for number in range(300)]
    cursor = json.loads(json.dumps(made.cursor(start)))
    resumed = stream(folder, (30, 17), weights=(2.0, 1.0))
    first = resumed.number(cursor)
    assert [resumed.place(first + step) for step in range(steps)] == whole[start : start + steps]
    assert 0 <= cursor["position"] < 47


def test_sources_come_by_their_weights_and_each_goes_through_all_of_its_own(tmp_path: Path) -> None:
    made = stream(tmp_path, (40, 1000), weights=(3.0, 1.0))
    drawn = [made.place(number) for number in range(2 * TURNS)]
    assert Counter(source for source, _ in drawn) == {0: 1500, 1: 500}
    of_first = [row for source, row in drawn if source == 0]
    for time in range(1500 // 40):
        assert sorted(of_first[40 * time : 40 * time + 40]) == list(range(40))
    assert len({row for source, row in drawn if source == 1}) == 500
    early = Counter(source for source, _ in drawn[:100])
    assert 55 <= early[0] <= 95  # mixed, not one source after the other


def test_without_weights_sources_count_by_their_size(tmp_path: Path) -> None:
    made = stream(tmp_path, (30, 90))
    assert Counter(made.place(number)[0] for number in range(TURNS)) == {0: 250, 1: 750}


def test_without_weights_a_source_too_small_for_a_share_has_the_least_one(tmp_path: Path) -> None:
    made = stream(tmp_path, (2, 3000, 1, 2997))
    assert Counter(made.place(number)[0] for number in range(TURNS)) == {0: 1, 1: 499, 2: 1, 3: 499}
    drawn = [made.place(number)[1] for number in range(4 * TURNS) if made.place(number)[0] == 0]
    assert [sorted(pair) for pair in (drawn[:2], drawn[2:])] == [[0, 1], [0, 1]]


def test_more_sources_than_turns_are_refused(tmp_path: Path) -> None:
    rows = stream(tmp_path, (1,)).sources
    assert Stream([*rows] * TURNS, 1).epoch_samples == TURNS
    with pytest.raises(DataError, match="At most 1000 files"):
        Stream([*rows] * (TURNS + 1), 1)


@pytest.mark.parametrize("weights", [(1.0, 0.0), (1.0, -1.0), (10_000.0, 1.0)])
def test_a_weight_that_would_never_be_drawn_is_refused(tmp_path: Path, weights: tuple[float, float]) -> None:
    with pytest.raises(DataError, match="weight"):
        stream(tmp_path, (5, 5), weights=weights)


@pytest.mark.parametrize(
    "cursor", [{"epoch": 0, "position": 50}, {"epoch": -1, "position": 0}, {"epoch": 0}, 5, [0, 0], {"epoch": "0"}]
)
def test_a_cursor_of_other_data_is_refused(tmp_path: Path, cursor: object) -> None:
    with pytest.raises(DataError, match="does not fit"):
        stream(tmp_path, (50,)).number(cursor)  # type: ignore[arg-type]


def test_the_digest_is_that_of_files_order_and_weights(tmp_path: Path) -> None:
    first = stream(tmp_path, (50, 20)).digest
    assert stream(tmp_path, (50, 20)).digest == first
    assert stream(tmp_path, (50, 20), seed=2).digest != first
    assert stream(tmp_path, (50, 20), weights=(1.0, 1.0)).digest != first
    assert stream(tmp_path, (50, 21)).digest != first


def test_a_shuffle_holds_nothing() -> None:
    """The order of two to the fortieth things would fit into no memory."""
    assert 0 <= Shuffled(1 << 40, 1)[12345] < 1 << 40
