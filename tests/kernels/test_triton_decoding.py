"""Decode steps and cross-attention in Triton equal the float64 oracle; beams and requests are independent."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from promptmux_kernels import CrossMemory, Rows, SharedBias, cross_decode_attention, prefix_decode_attention
from promptmux_kernels.triton_ops import launch
from promptmux_kernels.triton_ops.cross_decode_attention import splits
from triton_cases import DEVICE, DTYPES, POISONS, TOLERANCES, Random, assert_near, in_float64, in_triton


def step(
    random: Random, widths: list[int], steps: list[int], prompts: list[int], *, heads: int, dim: int
) -> tuple[Tensor, dict[str, Any]]:
    """Histories name scattered slots; what lies behind a group's step in them is arbitrary but in range."""
    beams, longest = sum(widths), max(steps)
    slots = beams * longest + 9
    history = torch.stack([random.order(slots)[:longest] for _ in range(beams)])
    return random.normal(beams, heads, dim), {
        "groups": Rows.packed(widths),
        "prompts": random.prompts(prompts, heads, dim),
        "cache_key": random.normal(slots, heads, dim),
        "cache_value": random.normal(slots, heads, dim),
        "history": history,
        "history_lengths": tuple(steps),
        "bias": random.normal(heads, longest + 3, longest + 3, dtype=torch.float32),
        "scale": (2 * dim) ** -0.5,
        "head_scale": torch.linspace(0.5, 1.5, heads, device=DEVICE),
    }


def cross(
    random: Random, queries: list[int], keys: list[int], firsts: list[int], *, consecutive: bool, heads: int, dim: int
) -> tuple[Tensor, dict[str, Any]]:
    """Two tables in turn, one with lines that are not aligned."""
    rows = Rows.packed(keys)
    positions = max(firsts) + max(queries)
    tables = tuple(random.normal(heads, positions, max(keys) + extra, dtype=torch.float32) for extra in (0, 5))
    return random.normal(sum(queries), heads, dim), {
        "groups": Rows.packed(queries),
        "memory": CrossMemory(random.normal(rows.total, heads, dim), random.normal(rows.total, heads, dim), rows),
        "bias": SharedBias(tables, tuple(i % 2 for i in range(len(queries)))),
        "first_positions": tuple(firsts),
        "consecutive": consecutive,
        "scale": (2 * dim) ** -0.5,
        "head_scale": torch.linspace(0.5, 1.5, heads, device=DEVICE),
    }


@pytest.mark.parametrize("dim", [64, 80])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_step_equals_the_oracle_for_every_width_step_and_prompt(dtype: torch.dtype, dim: int) -> None:
    widths, steps, prompts = [1, 3, 5, 5, 3, 5], [1, 3, 17, 64, 33, 1], [0, 256, 7, 100, 1, 64]
    q, case = step(Random(1, dtype), widths, steps, prompts, heads=2, dim=dim)
    found = in_triton(prefix_decode_attention, q, **case)
    assert_near(found, in_float64(prefix_decode_attention, q, **case), TOLERANCES[dtype])


def test_more_beams_than_a_tile_holds_and_no_prompts() -> None:
    q, case = step(Random(2, torch.float32), [33, 2], [3, 9], [0, 0], heads=1, dim=16)
    case["prompts"] = None
    found = in_triton(prefix_decode_attention, q, **case)
    assert_near(found, in_float64(prefix_decode_attention, q, **case), TOLERANCES[torch.float32])


def test_beams_of_one_ancestry_share_slots() -> None:
    q, case = step(Random(3, torch.float32), [5], [9], [7], heads=1, dim=16)
    case["history"] = case["history"][:1].repeat(5, 1)
    case["history"][:, 8] = torch.arange(5)
    found = in_triton(prefix_decode_attention, q, **case)
    assert_near(found, in_float64(prefix_decode_attention, q, **case), TOLERANCES[torch.float32])


CROSS_GRID = [
    pytest.param([1, 3, 5, 5, 1], [1, 3, 63, 64, 65], [0, 4, 2, 11, 7], False, id="a step"),
    pytest.param([1, 3, 64, 5, 30], [65, 64, 3, 63, 1], [0, 0, 0, 0, 0], True, id="prefill"),
]


@pytest.mark.parametrize("dim", [64, 80])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("queries", "keys", "firsts", "consecutive"), CROSS_GRID)
def test_cross_attention_equals_the_oracle(
    dtype: torch.dtype, dim: int, queries: list[int], keys: list[int], firsts: list[int], consecutive: bool
) -> None:
    q, case = cross(Random(4, dtype), queries, keys, firsts, consecutive=consecutive, heads=2, dim=dim)
    found = in_triton(cross_decode_attention, q, **case)
    assert_near(found, in_float64(cross_decode_attention, q, **case), TOLERANCES[dtype])


@pytest.mark.parametrize("processors", [1, 132], ids=["whole", "split"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_picture_of_900_patches_is_read_whole_or_in_parts(dtype: torch.dtype, processors: int) -> None:
    """Split, the short row leaves most chunks empty: they must weigh nothing."""
    q, case = cross(Random(5, dtype), [5, 3], [930, 30], [3, 0], consecutive=False, heads=1, dim=64)
    with launch.counting(processors):
        with launch.recorded() as launches:
            in_triton(cross_decode_attention, q, **case)
        found = in_triton(cross_decode_attention, q, **case)
    assert len(launches) == (1 if processors == 1 else 2)
    assert_near(found, in_float64(cross_decode_attention, q, **case), TOLERANCES[dtype])


def test_keys_are_split_only_where_a_device_would_idle() -> None:
    assert splits(12, 15, 132) == 10, "one OFA-base request on an H100: 120 of 132 processors busy"
    assert splits(96, 15, 132) == 4, "eight leave a quarter idle in one wave, 3 % in the last of three"
    assert splits(106, 15, 132) == 1
    assert splits(12, 4, 132) == 1
    assert splits(1, 1000, 132) <= 32


@pytest.mark.parametrize("op", ["step", "cross"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_tolerance_sees_one_wrong_element_and_one_missing_key(dtype: torch.dtype, op: str) -> None:
    attend: Any
    if op == "step":
        q, case = step(Random(6, dtype), [5, 3], [9, 4], [100, 7], heads=2, dim=64)
        attend, shorter = prefix_decode_attention, case | {"history_lengths": (9, 3)}
    else:
        q, case = cross(Random(6, dtype), [5, 3], [65, 40], [3, 0], consecutive=False, heads=2, dim=64)
        memory = case["memory"]
        fewer = CrossMemory(memory.key, memory.value, Rows(memory.rows.starts, (64, 40)))
        attend, shorter = cross_decode_attention, case | {"memory": fewer}
    expected = in_float64(attend, q, **case)
    wrong = in_triton(attend, q, **case)
    wrong[5, 1, 3] += 3 * TOLERANCES[dtype]
    for faulty in (wrong, in_triton(attend, q, **shorter)):
        with pytest.raises(AssertionError):
            assert_near(faulty, expected, TOLERANCES[dtype])


@pytest.mark.parametrize("poison", POISONS, ids=str)
def test_poison_in_unused_slots_pages_and_behind_a_prompt_changes_no_bit(poison: float) -> None:
    q, case = step(Random(7, torch.float32), [5, 3], [9, 4], [7, 33], heads=1, dim=16)
    clean = in_triton(prefix_decode_attention, q, **case)
    used = torch.cat([case["history"][:5, :9].flatten(), case["history"][5:, :4].flatten()]).unique()
    for cache in ("cache_key", "cache_value"):
        kept = torch.full_like(case[cache], poison)
        kept[used] = case[cache][used]
        case[cache] = kept
    prompts = case["prompts"]
    kept_pages = {int(prompts.table[0, 0]): 7, int(prompts.table[1, 0]): 32, int(prompts.table[1, 1]): 1}
    for pool in (prompts.key, prompts.value):
        for page in range(len(pool)):
            pool[page, :, kept_pages.get(page, 0) :] = poison
    assert torch.equal(in_triton(prefix_decode_attention, q, **case), clean)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy remarks on the poisoned beam's own arithmetic
@pytest.mark.parametrize("poison", POISONS, ids=str)
def test_a_poisoned_beam_changes_neither_its_siblings_nor_other_requests(poison: float) -> None:
    """Siblings share tiles, so a value of theirs is multiplied by zero: it must not be one that 0 cannot silence."""
    q, case = step(Random(8, torch.float32), [5, 3], [9, 4], [7, 0], heads=1, dim=16)
    case["history"] = torch.arange(8 * 9).view(8, 9).to(DEVICE)
    clean = in_triton(prefix_decode_attention, q, **case)
    for cache in ("cache_key", "cache_value"):
        case[cache][case["history"][1, 3]] = poison
    found = in_triton(prefix_decode_attention, q, **case)
    others = [0, 2, 3, 4, 5, 6, 7]
    assert torch.equal(found[others], clean[others])
    assert not torch.equal(found[1], clean[1])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("processors", [1, 132], ids=["whole", "split"])
@pytest.mark.parametrize("poison", POISONS, ids=str)
def test_a_poisoned_memory_changes_no_neighbour_by_a_bit(poison: float, processors: int) -> None:
    q, case = cross(Random(9, torch.float32), [5, 3, 5], [9, 40, 300], [3, 0, 1], consecutive=False, heads=1, dim=16)
    with launch.counting(processors):
        clean = in_triton(cross_decode_attention, q, **case)
        for part in (case["memory"].key, case["memory"].value):
            part[9:49] = poison
        found = in_triton(cross_decode_attention, q, **case)
    assert torch.equal(found[:5], clean[:5])
    assert torch.equal(found[8:], clean[8:])
    assert not torch.equal(found[5:8], clean[5:8])


@pytest.mark.parametrize("count", [1, 31, 32, 33, 128])
def test_a_request_is_the_same_to_the_bit_in_any_company(count: int) -> None:
    own = Random(10, torch.float16)
    q, key, value = own.normal(3, 1, 64), own.normal(20, 1, 64), own.normal(20, 1, 64)
    bias = own.normal(1, 12, 25, dtype=torch.float32)
    stepped, crossed = [], []
    for company in (1, 2):
        random, mine = Random(10 + company, torch.float16), count // 2
        widths = [3 if g == mine else 1 + g % 5 for g in range(count)]
        queries, case = step(
            random, widths, [6 if g == mine else 1 + g % 9 for g in range(count)], [0] * count, heads=1, dim=64
        )
        rows = case["groups"].slice(mine)
        queries[rows] = q
        case["history"][rows, :6] = torch.arange(18, device=DEVICE).view(3, 6)
        case["cache_key"][:18], case["cache_value"][:18] = key[:18], value[:18]
        case["bias"] = bias[:, :, :12]
        stepped.append(in_triton(prefix_decode_attention, queries, **case)[rows])
        keys = [20 if g == mine else 1 + g % 25 for g in range(count)]
        queries, case = cross(
            random, widths, keys, [4 if g == mine else g % 7 for g in range(count)], consecutive=False, heads=1, dim=64
        )
        queries[rows] = q
        seen = case["memory"].rows.slice(mine)
        case["memory"].key[seen], case["memory"].value[seen] = key, value
        case["bias"] = SharedBias((bias,), (0,) * count)
        crossed.append(in_triton(cross_decode_attention, queries, **case)[rows])
    assert torch.equal(*stepped)
    assert torch.equal(*crossed)
