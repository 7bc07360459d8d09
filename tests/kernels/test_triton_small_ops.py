"""Fused norms, cache writes, the running softmax and the launch plans: the small parts of the Triton form."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from promptmux_kernels import (
    Rows,
    SharedBias,
    gelu_norm,
    norm_add_norm,
    pack_bias,
    reference,
    use_form,
    write_cache,
)
from promptmux_kernels.triton_ops import online, plan
from promptmux_kernels.triton_ops.bias import parts
from promptmux_kernels.triton_ops.paging import gather_slots
from triton_cases import DEVICE, DTYPES, Random, assert_near, in_float64, in_triton

NORM_TOLERANCES = {torch.float32: 1e-5, torch.float16: 1e-2}
"""Normalised values reach 5 and their sums 10, where float16 steps by 2**-7."""


@pytest.mark.parametrize("width", [1, 80, 768, 1280])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_joining_branches_equals_the_oracle(dtype: torch.dtype, width: int) -> None:
    random = Random(1, dtype)
    x, y = random.normal(5, width), random.normal(5, width) * 3 + 1
    inner, outer = ((random.normal(width), random.normal(width)) for _ in range(2))
    case = {"inner": inner, "outer": outer, "eps": 1e-5}
    found = in_triton(norm_add_norm, x, y, **case)
    assert_near(found, in_float64(norm_add_norm, x, y, **case), NORM_TOLERANCES[dtype] * 2)


@pytest.mark.parametrize("width", [3, 320, 3072])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gelu_norm_equals_the_oracle(dtype: torch.dtype, width: int) -> None:
    random = Random(2, dtype)
    x, affine = random.normal(5, width) * 2, (random.normal(width), random.normal(width))
    found = in_triton(gelu_norm, x, affine=affine, eps=1e-5)
    assert_near(found, in_float64(gelu_norm, x, affine=affine, eps=1e-5), NORM_TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_norms_tolerance_sees_one_wrong_element(dtype: torch.dtype) -> None:
    random = Random(3, dtype)
    x, affine = random.normal(5, 320), (random.normal(320), random.normal(320))
    found = in_triton(gelu_norm, x, affine=affine, eps=1e-5)
    found[4, 300] += 3 * NORM_TOLERANCES[dtype]
    with pytest.raises(AssertionError):
        assert_near(found, in_float64(gelu_norm, x, affine=affine, eps=1e-5), NORM_TOLERANCES[dtype])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_broken_token_breaks_no_other_in_the_norms() -> None:
    random = Random(4, torch.float32)
    x, affine = random.normal(3, 80), (random.normal(80), random.normal(80))
    clean = in_triton(gelu_norm, x, affine=affine, eps=1e-5)
    x[1] = float("nan")
    found = in_triton(gelu_norm, x, affine=affine, eps=1e-5)
    assert torch.equal(found[[0, 2]], clean[[0, 2]])
    assert found[1].isnan().all()


def test_written_slots_hold_the_new_tokens_and_no_other_slot_changes() -> None:
    random = Random(5, torch.float32)
    caches = [random.normal(20, 2, 16) for _ in range(2)]
    slots, fused = torch.tensor([7, 0, 19], device=DEVICE), random.normal(3, 2, 2, 16)
    key, value = fused.unbind(1)  # strided, as from one projection
    expected = [cache.clone() for cache in caches]
    reference.write_cache(expected[0], expected[1], slots, key, value)
    with use_form("triton"):
        write_cache(caches[0], caches[1], slots, key, value)
    assert torch.equal(caches[0], expected[0])
    assert torch.equal(caches[1], expected[1])


@pytest.mark.parametrize("poison", [float("nan"), float("inf")], ids=str)
def test_a_slot_that_is_not_valid_is_gathered_as_zero_whatever_it_holds(poison: float) -> None:
    pool = Random(6, torch.float32).normal(9, 2, 16)
    pool[3] = poison
    slots, valid = torch.tensor([3, 5, 3, 0], device=DEVICE), torch.tensor([False, True, False, True], device=DEVICE)
    found = gather_slots(pool, slots, valid)
    assert torch.equal(found, reference.gather_slots(pool, slots, valid))
    assert not found[[0, 2]].any()


@triton.jit
def one_tile(scores_ptr, value_ptr, seen_ptr, out_ptr, ZERO_VALUES: tl.constexpr):
    """Attention over one tile of 16 keys of which some are masked, with or without their values zeroed."""
    at = tl.arange(0, 16)
    square = at[:, None] * 16 + at[None, :]
    seen = tl.load(seen_ptr + at) != 0
    out, top, total = online.empty(16, 16)
    everything = at < 16
    readable = seen if ZERO_VALUES else everything
    value = tl.load(value_ptr + square, mask=readable[:, None], other=0.0)
    scores = tl.where(seen[None, :], tl.load(scores_ptr + square), float("-inf"))
    out, top, total = online.fold(scores, value, out, top, total)
    tl.store(out_ptr + square, out / total[:, None])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("zero_values", [True, False], ids=["values zeroed", "scores masked only"])
def test_a_kernel_that_masks_scores_alone_leaks(zero_values: bool) -> None:
    """The control of every isolation test here: the kernels pass them because they zero values as well."""
    random = Random(7, torch.float32)
    scores, value = random.normal(16, 16), random.normal(16, 16)
    seen = torch.arange(16, device=DEVICE) < 9
    outputs = []
    for poison in (0.0, float("nan")):
        value[9:] = poison
        out = torch.empty_like(value)
        one_tile[(1,)](scores, value, seen, out, ZERO_VALUES=zero_values)
        outputs.append(out)
    assert torch.equal(*outputs) == zero_values


@pytest.mark.parametrize(("dtype", "step"), [(torch.float32, 4), (torch.float16, 8)], ids=["float32", "float16"])
def test_a_packed_bias_has_aligned_lines_and_the_same_values(dtype: torch.dtype, step: int) -> None:
    """Lines of 13 keys start wherever; packed, a copy engine and vector loads can read them."""
    table = Random(8, torch.float32).normal(2, 5, 13)
    packed = in_triton(pack_bias, table, dtype=dtype)
    assert packed.dtype == dtype
    assert torch.equal(packed, table.to(dtype))
    aligned = [parts(SharedBias((t,), (0,)), table.device)[0].aligned for t in (table, packed)]
    assert aligned == [False, True]
    assert packed.stride()[:2] == (5 * -(-13 // step) * step, -(-13 // step) * step)


def test_tiles_cover_every_query_once_blocks_outermost() -> None:
    rows = Rows((40, 0, 9), (7, 130, 31))
    tiles = plan.tiles(rows, (0, 1, 2), 64, torch.device("cpu")).tolist()
    assert tiles == [[0, 40, 7, 0], [1, 0, 130, 0], [2, 9, 31, 0], [1, 0, 130, 64], [1, 0, 130, 128]]


def test_a_plan_is_built_once_for_all_layers_of_a_batch() -> None:
    rows = Rows.packed([5, 3])
    first = plan.tiles(rows, (0, 1), 64, torch.device("cpu"))
    assert plan.tiles(Rows.packed([5, 3]), (0, 1), 64, torch.device("cpu")) is first
