"""The compiled CPU form equals the reference over odd shapes, in float32 and bfloat16; rows see nothing of each other.

Skipped where the library cannot be built: `batched` answers there, and is tested on its own.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from promptmux_kernels import (
    PAGE,
    PagedPrompts,
    Rows,
    SharedBias,
    batched,
    cpu,
    pack_prompts,
    prefix_attention,
    reference,
    use_form,
)

pytestmark = pytest.mark.skipif(not cpu.available(torch.float32), reason="no compiler, or no AVX2")

HEADS = 2
DIMS = [16, 64, 80]
DTYPES = [torch.float32, torch.bfloat16]

FLOAT32_ERROR = 5e-6
"""Scores reach 8, so float32 leaves 8 * 2**-24 * 4 = 2e-6 in an exponent and in its weight; values are of size one."""


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def tolerance(*values: Tensor) -> float:
    """How far an output may lie from the exact one: a sum, weighted with weights of sum one, of these values.

    In bfloat16 the output is rounded once, and its weights once where the CPU multiplies bfloat16: each is at most
    2**-9 of the largest value.
    """
    rounding = 2**-8 if values[0].dtype == torch.bfloat16 else 0.0
    return rounding * max(float(value.float().abs().max()) for value in values if value.numel()) + FLOAT32_ERROR


def exact(*tensors: Tensor) -> list[Tensor]:
    """The same numbers in float32, so that the reference rounds nothing."""
    return [tensor.float() for tensor in tensors]


def prompts_of(lengths: list[int], dim: int, dtype: torch.dtype) -> PagedPrompts:
    shapes = [(1, HEADS, length, dim) for length in lengths]
    pairs = [
        (normal(*s, seed=50 + i, dtype=dtype), normal(*s, seed=150 + i, dtype=dtype)) for i, s in enumerate(shapes)
    ]
    return pack_prompts(pairs, range(len(lengths))).layer(0)


def as_float(prompts: PagedPrompts) -> PagedPrompts:
    return PagedPrompts(prompts.key.float(), prompts.value.float(), prompts.table, prompts.lengths)


def prefill_case(lengths: list[int], prompt_lengths: list[int], dim: int, dtype: torch.dtype) -> dict[str, Any]:
    size = max(lengths)
    tables = (normal(HEADS, size, size, seed=7), normal(HEADS, size, size + 5, seed=8)[:, :, :size])
    return {
        "rows": Rows.packed(lengths),
        "prompts": prompts_of(prompt_lengths, dim, dtype),
        "bias": SharedBias(tables, tuple(i % 2 for i in range(len(lengths)))),
        "scale": dim**-0.5,
        "head_scale": torch.tensor([1.0, 0.5]),
    }


def tokens(count: int, dim: int, dtype: torch.dtype, seed: int = 3) -> list[Tensor]:
    """q, k, v as slices of one fused projection: tokens lie apart, heads together."""
    fused = normal(count, 3 * HEADS * dim, seed=seed, dtype=dtype)
    return [part.view(count, HEADS, dim) for part in fused.split(HEADS * dim, dim=1)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("causal", [False, True], ids=["encoder", "decoder"])
@pytest.mark.parametrize(
    ("lengths", "prompt_lengths"),
    [([1], [0]), ([1, 3, 63, 64, 65], [256, 0, 1, 100, 7]), ([65, 64, 1, 3], [64, 31, 33, 256])],
    ids=["one-token", "around-a-tile", "mixed"],
)
def test_prefill_equals_the_reference(
    lengths: list[int], prompt_lengths: list[int], causal: bool, dim: int, dtype: torch.dtype
) -> None:
    case = prefill_case(lengths, prompt_lengths, dim, dtype)
    q, k, v = tokens(sum(lengths), dim, dtype)
    found, lse = cpu.prefix_attention(q, k, v, causal=causal, **case)
    case["prompts"] = as_float(case["prompts"])
    expected, expected_lse = reference.prefix_attention(*exact(q, k, v), causal=causal, **case)
    limit = tolerance(v, prompts_of(prompt_lengths, dim, dtype).value)
    torch.testing.assert_close(found.float(), expected, atol=limit, rtol=0)
    torch.testing.assert_close(lse, expected_lse, atol=FLOAT32_ERROR, rtol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_ofa_row_equals_the_reference(dtype: torch.dtype) -> None:
    case = prefill_case([930, 20], [100, 256], 64, dtype)
    q, k, v = tokens(950, 64, dtype)
    found, _ = cpu.prefix_attention(q, k, v, causal=False, **case)
    case["prompts"] = as_float(case["prompts"])
    expected, _ = reference.prefix_attention(*exact(q, k, v), causal=False, **case)
    torch.testing.assert_close(found.float(), expected, atol=tolerance(v), rtol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_tolerance_sees_one_wrong_element(dtype: torch.dtype) -> None:
    case = prefill_case([9, 4], [3, 0], 16, dtype)
    q, k, v = tokens(13, 16, dtype)
    found, _ = cpu.prefix_attention(q, k, v, causal=False, **case)
    wrong = found.float()
    wrong[5, 1, 3] += 2 * tolerance(v)
    case["prompts"] = as_float(case["prompts"])
    expected, _ = reference.prefix_attention(*exact(q, k, v), causal=False, **case)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(wrong, expected, atol=tolerance(v), rtol=0)


def test_half_precision_tables_cost_no_more_than_their_rounding() -> None:
    case = prefill_case([65, 64], [7, 0], 64, torch.float32)
    q, k, v = tokens(129, 64, torch.float32)
    half = SharedBias(tuple(table.half() for table in case["bias"].tables), case["bias"].table_of_row)
    found, _ = cpu.prefix_attention(q, k, v, causal=False, **case | {"bias": half})
    widened = SharedBias(tuple(table.float() for table in half.tables), half.table_of_row)
    expected, _ = reference.prefix_attention(q, k, v, causal=False, **case | {"bias": widened})
    torch.testing.assert_close(found, expected, atol=FLOAT32_ERROR, rtol=0)


def decode_case(beams: list[int], steps: list[int], prompt_lengths: list[int], dim: int, dtype: torch.dtype) -> Any:
    slots, longest = 400, max(steps)
    history = torch.randint(slots, (sum(beams), longest), generator=torch.Generator().manual_seed(9))
    return {
        "groups": Rows.packed(beams),
        "prompts": prompts_of(prompt_lengths, dim, dtype),
        "cache_key": normal(slots, HEADS, dim, seed=11, dtype=dtype),
        "cache_value": normal(slots, HEADS, dim, seed=12, dtype=dtype),
        "history": history,
        "history_lengths": tuple(steps),
        "bias": normal(HEADS, longest, longest, seed=13),
        "scale": dim**-0.5,
        "head_scale": torch.tensor([1.0, 0.5]),
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize(
    ("beams", "steps", "prompt_lengths"),
    [([1], [1], [0]), ([1, 3, 5, 5], [17, 2, 65, 1], [7, 100, 0, 256]), ([5, 3], [64, 63], [64, 1])],
    ids=["first-step", "mixed", "long"],
)
def test_a_decode_step_equals_the_reference(
    beams: list[int], steps: list[int], prompt_lengths: list[int], dim: int, dtype: torch.dtype
) -> None:
    case = decode_case(beams, steps, prompt_lengths, dim, dtype)
    q = normal(sum(beams), HEADS, dim, seed=5, dtype=dtype)
    found = cpu.prefix_decode_attention(q, **case)
    limit = tolerance(case["cache_value"], case["prompts"].value)
    case |= {name: case[name].float() for name in ("cache_key", "cache_value")}
    case["prompts"] = as_float(case["prompts"])
    expected = reference.prefix_decode_attention(q.float(), **case)
    torch.testing.assert_close(found.float(), expected, atol=limit, rtol=0)


def cross_case(counts: list[int], keys: list[int], consecutive: bool, dim: int) -> dict[str, Any]:
    tables = tuple(normal(HEADS, 70, max(keys), seed=23 + i) for i in range(2))
    return {
        "groups": Rows.packed(counts),
        "bias": SharedBias(tables, tuple(i % 2 for i in range(len(keys)))),
        "first_positions": (0,) * len(keys) if consecutive else tuple(range(4, 4 + len(keys))),
        "consecutive": consecutive,
        "scale": dim**-0.5,
        "head_scale": torch.tensor([1.0, 0.5]),
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("consecutive", [True, False], ids=["prefill", "step"])
def test_cross_attention_equals_the_reference(consecutive: bool, dim: int, dtype: torch.dtype) -> None:
    counts, keys = [5, 1, 3, 66 if consecutive else 5, 5, 2], [1, 3, 63, 64, 65, 930]
    rows = Rows.packed(keys)
    case = cross_case(counts, keys, consecutive, dim)
    key, value = (normal(rows.total, HEADS, dim, seed=seed, dtype=dtype) for seed in (21, 22))
    q = normal(sum(counts), HEADS, dim, seed=25, dtype=dtype)
    memory = cpu.pack_memory(key, value, rows)
    assert memory.layout == cpu.PACKED
    found = cpu.cross_decode_attention(q, memory=memory, **case)
    expected = reference.cross_decode_attention(
        q.float(), memory=reference.pack_memory(*exact(key, value), rows), **case
    )
    torch.testing.assert_close(found.float(), expected, atol=tolerance(value), rtol=0)


def test_a_selection_of_packed_memory_is_read_without_a_copy() -> None:
    rows, dim = Rows.packed([17, 40, 3]), 16
    memory = cpu.pack_memory(normal(60, HEADS, dim, seed=1), normal(60, HEADS, dim, seed=2), rows)
    whole = cpu.cross_decode_attention(
        normal(3, HEADS, dim, seed=3), memory=memory, **cross_case([1, 1, 1], list(rows.lengths), False, dim)
    )
    case = cross_case([1, 1, 1], list(rows.lengths), False, dim)
    case |= {"groups": Rows.packed([1, 1]), "bias": case["bias"].select([2, 0])}
    case["first_positions"] = tuple(case["first_positions"][row] for row in (2, 0))
    q = normal(3, HEADS, dim, seed=3)[[2, 0]]
    assert torch.equal(cpu.cross_decode_attention(q, memory=memory.select([2, 0]), **case), whole[[2, 0]])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [64, 768, 3072])
def test_a_fused_norm_equals_the_reference(width: int, dtype: torch.dtype) -> None:
    x = 3 * normal(33, width, seed=1, dtype=dtype)
    affine = (normal(width, seed=3, dtype=dtype), normal(width, seed=4, dtype=dtype))
    # One rounding of the result, and in float32 a few of numbers up to 16 (4 deviations, weights up to 4).
    rtol, atol = (2**-8, 2**-8) if dtype == torch.bfloat16 else (6e-7, 5e-6)
    found = cpu.gelu_norm(x, affine, 1e-5)
    expected = reference.gelu_norm(x.float(), tuple(exact(*affine)), 1e-5)  # type: ignore[arg-type]
    torch.testing.assert_close(found.float(), expected, rtol=rtol, atol=atol)


def test_gelu_keeps_far_and_tiny_inputs() -> None:
    x = torch.tensor([-30.0, -6.0, -1e-4, 0.0, 1e-4, 6.0, 30.0, -0.5]).repeat(2)[None]
    plain = (torch.ones(16), torch.zeros(16))
    expected = torch.nn.functional.layer_norm(torch.nn.functional.gelu(x.double()), (16,)).float()
    torch.testing.assert_close(cpu.gelu_norm(x, plain, 1e-5), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cache_writes_land_in_their_slots_alone(dtype: torch.dtype) -> None:
    key, value = (normal(3, HEADS, 16, seed=s, dtype=dtype) for s in (1, 2))
    slots = torch.tensor([7, 0, 3])
    caches = [torch.zeros(9, HEADS, 16, dtype=dtype) for _ in range(2)]
    cpu.write_cache(*caches, slots, key, value)
    for cache, rows in zip(caches, (key, value), strict=True):
        assert torch.equal(cache[slots], rows)
        assert not cache[[1, 2, 4, 5, 6, 8]].any()


def test_a_slot_outside_the_cache_is_refused() -> None:
    caches = [torch.zeros(4, HEADS, 16) for _ in range(2)]
    row = normal(1, HEADS, 16, seed=1)
    with pytest.raises(IndexError, match="out of range"):
        cpu.write_cache(*caches, torch.tensor([4]), row, row)


POISONS = [float("nan"), float("inf"), float("-inf"), 3e38]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("poison", POISONS, ids=str)
def test_a_poisoned_prompt_changes_no_neighbour_by_a_bit(poison: float, dtype: torch.dtype) -> None:
    case = prefill_case([4, 30, 9], [7, 64, 33], 16, dtype)
    q, k, v = tokens(43, 16, dtype)
    clean, _ = cpu.prefix_attention(q, k, v, causal=False, **case)
    own = case["prompts"].table[1, : 64 // PAGE]
    for pool in (case["prompts"].key, case["prompts"].value):
        pool[own] = poison
    poisoned, _ = cpu.prefix_attention(q, k, v, causal=False, **case)
    assert torch.equal(poisoned[:4], clean[:4])
    assert torch.equal(poisoned[34:], clean[34:])
    assert not torch.equal(poisoned[4:34], clean[4:34])


@pytest.mark.parametrize("poison", POISONS, ids=str)
def test_what_lies_behind_a_prompt_or_in_foreign_slots_counts_for_nothing(poison: float) -> None:
    case = decode_case([3, 2], [9, 4], [7, 40], 16, torch.float32)
    q = normal(5, HEADS, 16, seed=5)
    clean = cpu.prefix_decode_attention(q, **case)
    used = {int(slot) for row, t in zip(case["history"], [9] * 3 + [4] * 2, strict=True) for slot in row[:t]}
    foreign = [slot for slot in range(400) if slot not in used]
    for cache in (case["cache_key"], case["cache_value"]):
        cache[foreign] = poison
    for pool in (case["prompts"].key, case["prompts"].value):
        pool[case["prompts"].table[0, 0], :, 7:] = poison
        pool[case["prompts"].table[1, 1], :, 8:] = poison
    assert torch.equal(cpu.prefix_decode_attention(q, **case), clean)


@pytest.mark.parametrize("poison", POISONS, ids=str)
def test_a_poisoned_request_reaches_no_other_memory(poison: float) -> None:
    rows, dim = Rows.packed([17, 40, 3]), 16
    case = cross_case([2, 2, 2], list(rows.lengths), False, dim)
    key, value = (normal(60, HEADS, dim, seed=s) for s in (1, 2))
    q = normal(6, HEADS, dim, seed=3)
    clean = cpu.cross_decode_attention(q, memory=cpu.pack_memory(key, value, rows), **case)
    key[17:57] = value[17:57] = poison
    poisoned = cpu.cross_decode_attention(q, memory=cpu.pack_memory(key, value, rows), **case)
    assert torch.equal(poisoned[[0, 1, 4, 5]], clean[[0, 1, 4, 5]])
    assert not torch.equal(poisoned[2:4], clean[2:4])


def test_masking_scores_alone_would_leak() -> None:
    """The control of the tests above: packed keys end at a multiple of 16, and zero times what lies there is NaN."""
    weights, behind = torch.zeros(1, 16), torch.full((16, 4), float("nan"))
    assert torch.isnan(weights @ behind).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch", [31, 32, 33, 128])
def test_a_row_is_bitwise_the_same_alone_and_in_any_batch(batch: int, dtype: torch.dtype) -> None:
    lengths = [1 + 7 * i % 67 for i in range(batch)]
    prompt_lengths = [13 * i % 70 for i in range(batch)]
    case = prefill_case(lengths, prompt_lengths, 16, dtype)
    rows = case["rows"]
    q, k, v = tokens(rows.total, 16, dtype)
    together, _ = cpu.prefix_attention(q, k, v, causal=False, **case)
    for row in (0, batch // 2, batch - 1):
        prompts = case["prompts"]
        alone = case | {
            "rows": Rows.packed([lengths[row]]),
            "prompts": PagedPrompts(prompts.key, prompts.value, prompts.table[[row]], (prompt_lengths[row],)),
            "bias": case["bias"].select([row]),
        }
        own = rows.slice(row)
        single, _ = cpu.prefix_attention(q[own], k[own], v[own], causal=False, **alone)
        assert torch.equal(single, together[own])


@pytest.mark.parametrize("batch", [31, 32, 33, 128])
def test_a_decode_group_is_bitwise_the_same_alone_and_in_any_batch(batch: int) -> None:
    beams, steps = [1 + i % 5 for i in range(batch)], [1 + i % 9 for i in range(batch)]
    case = decode_case(beams, steps, [11 * i % 70 for i in range(batch)], 16, torch.float32)
    groups, prompts = case["groups"], case["prompts"]
    q = normal(groups.total, HEADS, 16, seed=5)
    together = cpu.prefix_decode_attention(q, **case)
    keys = [1 + 5 * i % 90 for i in range(batch)]
    rows = Rows.packed(keys)
    memory = cpu.pack_memory(normal(rows.total, HEADS, 16, seed=6), normal(rows.total, HEADS, 16, seed=7), rows)
    cross = cross_case(beams, keys, False, 16) | {"first_positions": (3,) * batch}
    crossed = cpu.cross_decode_attention(q, memory=memory, **cross)
    for row in (0, batch // 2, batch - 1):
        own = groups.slice(row)
        alone = {"groups": Rows.packed([beams[row]])}
        single = cpu.prefix_decode_attention(
            q[own],
            **case
            | alone
            | {
                "history": case["history"][own],
                "history_lengths": (steps[row],),
                "prompts": PagedPrompts(prompts.key, prompts.value, prompts.table[[row]], (prompts.lengths[row],)),
            },
        )
        assert torch.equal(single, together[own])
        part = cross | alone | {"bias": cross["bias"].select([row]), "first_positions": (3,)}
        assert torch.equal(cpu.cross_decode_attention(q[own], memory=memory.select([row]), **part), crossed[own])


@pytest.mark.parametrize(("dim", "dtype"), [(24, torch.float32), (144, torch.float32), (16, torch.float16)], ids=str)
def test_what_the_library_cannot_do_goes_to_the_batched_form(dim: int, dtype: torch.dtype) -> None:
    case = prefill_case([9, 4], [3, 0], dim, dtype)
    q, k, v = tokens(13, dim, dtype)
    found, _ = cpu.prefix_attention(q, k, v, causal=False, **case)
    expected, _ = batched.prefix_attention(q, k, v, causal=False, **case)
    assert torch.equal(found, expected)
    memory = cpu.pack_memory(k, v, case["rows"])
    assert memory.layout == "plain"
    crossed = cpu.cross_decode_attention(q[:2], memory=memory, **cross_case([1, 1], [9, 4], False, dim))
    assert crossed.shape == (2, HEADS, dim)


def test_gradients_flow_where_they_are_asked_for() -> None:
    case = prefill_case([9, 4], [3, 0], 16, torch.float32)
    case["prompts"].key.requires_grad_()
    q, k, v = tokens(13, 16, torch.float32)
    with use_form("cpu"):
        out, _ = prefix_attention(q, k, v, causal=False, **case)
        out.sum().backward()
        assert case["prompts"].key.grad is not None
        with torch.no_grad():
            served, _ = prefix_attention(q, k, v, causal=False, **case)
    assert not served.requires_grad
    torch.testing.assert_close(served, out.detach(), atol=1e-5, rtol=0)
