"""Self-attention in Triton equals the float64 oracle over odd shapes; nothing of a stranger reaches a row."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from promptmux_kernels import Rows, SharedBias, prefix_attention
from promptmux_kernels.rows import PAGE
from promptmux_kernels.triton_ops import configs
from triton_cases import DEVICE, DTYPES, POISONS, TOLERANCES, Random, assert_near, in_float64, in_triton, ragged

LENGTHS = [1, 3, 63, 64, 65, 130]
PROMPTS = [256, 0, 1, 7, 64, 100]
WAYS = ["pointer", "descriptor", "factors"]
CONFIGS = {
    "pointer": configs.Config(rows=64, keys=64, warps=4, stages=1),
    "descriptor": configs.Config(rows=64, keys=64, warps=4, stages=1, descriptor=True),
    "factors": configs.Config(rows=32, keys=64, warps=4, stages=1),
}


def tables(random: Random, sizes: list[int], heads: int, dim: int, way: str) -> tuple[Any, ...]:
    """Odd sizes give lines that are not aligned, which no copy engine and no vector load can read."""
    if way == "factors":
        return tuple(random.factors(size, heads, dim) for size in sizes)
    return tuple(random.normal(heads, size, size) for size in sizes)


def batch(
    random: Random, lengths: list[int], prompts: list[int], sizes: list[int], *, heads: int, dim: int, way: str
) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    rows = Rows.packed(lengths)
    inputs = tuple(random.normal(rows.total, heads, dim) for _ in range(3))
    fitting = [[i for i, size in enumerate(sizes) if size >= length] for length in lengths]
    return inputs, {
        "rows": rows,
        "prompts": random.prompts(prompts, heads, dim),
        "bias": SharedBias(
            tables(random, sizes, heads, dim, way),
            tuple(choices[row % len(choices)] for row, choices in enumerate(fitting)),
        ),
        "scale": (2 * dim) ** -0.5,
        "head_scale": torch.linspace(0.5, 1.5, heads, device=DEVICE),
        "causal": False,
    }


@pytest.mark.parametrize("causal", [False, True], ids=["encoder", "decoder"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dim", [64, 80])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_mixed_batch_equals_the_oracle(dtype: torch.dtype, dim: int, way: str, causal: bool) -> None:
    inputs, case = batch(Random(1, dtype), LENGTHS, PROMPTS, [136, 131, 65], heads=2, dim=dim, way=way)
    case["causal"] = causal
    with configs.forced(CONFIGS[way]):
        found = in_triton(prefix_attention, *inputs, **case)
    assert_near(found, in_float64(prefix_attention, *inputs, **case), TOLERANCES[dtype])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_picture_of_900_patches_beside_a_text_equals_the_oracle(dtype: torch.dtype, way: str) -> None:
    inputs, case = batch(Random(2, dtype), [930, 30], [64, 256], [932, 32], heads=1, dim=64, way=way)
    with configs.forced(CONFIGS[way]):
        found = in_triton(prefix_attention, *inputs, **case)
    assert_near(found, in_float64(prefix_attention, *inputs, **case), TOLERANCES[dtype])


def test_half_precision_tables_serve_float32_heads_and_one_batch_may_mix_kinds() -> None:
    random = Random(3, torch.float32)
    inputs, case = batch(random, [9, 40, 17], [0, 7, 33], [40], heads=2, dim=16, way="pointer")
    mixed = (random.normal(2, 40, 40), random.normal(2, 40, 40, dtype=torch.float16), random.factors(40, 2, 16))
    case["bias"] = SharedBias(mixed, (2, 1, 0))
    found = in_triton(prefix_attention, *inputs, **case)
    assert_near(found, in_float64(prefix_attention, *inputs, **case), TOLERANCES[torch.float32])


def test_rows_need_not_touch_and_a_batch_needs_no_prompts() -> None:
    random = Random(4, torch.float32)
    inputs, case = batch(random, [30], [0], [32], heads=2, dim=16, way="pointer")
    case |= {
        "rows": Rows((20, 3), (9, 5)),
        "prompts": None,
        "bias": SharedBias(case["bias"].tables, (0, 0)),
    }
    found = in_triton(prefix_attention, *inputs, **case)
    assert_near(found, in_float64(prefix_attention, *inputs, **case), TOLERANCES[torch.float32])
    assert not found[0][10:20].any()


def test_heads_may_lie_in_one_fused_projection() -> None:
    inputs, case = batch(Random(5, torch.float32), [9, 4], [0, 7], [16], heads=2, dim=16, way="pointer")
    fused = torch.stack(inputs, dim=1)  # (T, 3, H, D)
    found = in_triton(prefix_attention, *fused.unbind(1), **case)
    assert torch.equal(found[0], in_triton(prefix_attention, *inputs, **case)[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_tolerance_sees_one_wrong_element_and_one_missing_key(dtype: torch.dtype) -> None:
    inputs, case = batch(Random(6, dtype), [65, 4], [100, 3], [65], heads=2, dim=64, way="pointer")
    expected = in_float64(prefix_attention, *inputs, **case)
    found = in_triton(prefix_attention, *inputs, **case)
    wrong = found[0].clone()
    wrong[5, 1, 3] += 3 * TOLERANCES[dtype]
    shorter = case | {"prompts": case["prompts"].__class__(*(*vars(case["prompts"]).values(),)[:3], (99, 3))}
    for faulty in (wrong, in_triton(prefix_attention, *inputs, **shorter)[0]):
        with pytest.raises(AssertionError):
            assert_near(faulty, expected[0], TOLERANCES[dtype])


def poisoned(case: dict[str, Any], poison: float) -> dict[str, Any]:
    """Foreign pages, and what lies behind each prompt's end, hold `poison`."""
    prompts = case["prompts"]
    key, value = prompts.key.clone(), prompts.value.clone()
    used: dict[int, int] = {}
    for row, length in enumerate(prompts.lengths):
        for i, page in enumerate(prompts.table[row, : -(-length // PAGE)].tolist()):
            used[page] = min(PAGE, length - i * PAGE)
    for page in range(len(key)):
        key[page, :, used.get(page, 0) :] = poison
        value[page, :, used.get(page, 0) :] = poison
    return case | {"prompts": type(prompts)(key, value, prompts.table, prompts.lengths)}


@pytest.mark.parametrize("poison", POISONS, ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_poison_in_foreign_pages_behind_prompts_and_behind_rows_changes_no_bit(way: str, poison: float) -> None:
    random = Random(7, torch.float32)
    inputs, case = batch(random, [5, 70, 9], [7, 33, 0], [70, 72], heads=1, dim=16, way=way)
    with configs.forced(CONFIGS[way]):
        clean = in_triton(prefix_attention, *inputs, **case)
        behind = torch.full_like(inputs[0][:64], poison)
        padded = tuple(torch.cat([x, behind]) for x in inputs)
        found = in_triton(prefix_attention, *padded, **poisoned(case, poison))
    for part, expected in zip(found, clean, strict=True):
        assert torch.equal(part[: len(expected)], expected)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy remarks on the poisoned row's own arithmetic
@pytest.mark.parametrize("poison", POISONS, ids=str)
def test_a_poisoned_row_changes_no_neighbour_by_a_bit(poison: float) -> None:
    inputs, case = batch(Random(8, torch.float32), [5, 40, 9], [7, 33, 40], [40], heads=1, dim=16, way="pointer")
    clean, _ = in_triton(prefix_attention, *inputs, **case)
    faulty = tuple(x.clone() for x in inputs)
    for x in faulty:
        x[5:45] = poison
    found, _ = in_triton(prefix_attention, *faulty, **case)
    assert torch.equal(found[:5], clean[:5])
    assert torch.equal(found[45:], clean[45:])
    assert not torch.equal(found[5:45], clean[5:45])


@pytest.mark.parametrize("count", [1, 31, 32, 33, 128])
def test_a_row_is_the_same_to_the_bit_in_any_company(count: int) -> None:
    own = Random(9, torch.float16)
    inputs, prompt = [own.normal(7, 1, 64) for _ in range(3)], own.prompts([40], 1, 64, spare=0)
    table = own.normal(1, 10, 10)
    outputs = []
    for company in (1, 2):
        random, row = Random(10 + company, torch.float16), count // 2
        rows = ragged(count, row, seed=count)
        flat = [random.normal(rows.total, 1, 64) for _ in range(3)]
        for x, mine in zip(flat, inputs, strict=True):
            x[rows.slice(row)] = mine
        lengths = [40 if r == row else r % 5 for r in range(count)]
        pool = random.prompts(lengths, 1, 64)
        for pages, mine in ((pool.key, prompt.key), (pool.value, prompt.value)):
            pages[pool.table[row, :2]] = mine[prompt.table[0]]
        case = {"rows": rows, "prompts": pool, "bias": SharedBias((table,), (0,) * count)}
        head_scale = torch.ones(1, device=DEVICE)
        out, _ = in_triton(prefix_attention, *flat, **case, scale=0.1, head_scale=head_scale, causal=False)
        outputs.append(out[rows.slice(row)])
    assert torch.equal(*outputs)
