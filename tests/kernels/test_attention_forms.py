"""The batched form equals the reference, row by row, whatever the mixture; nothing of a stranger reaches a row."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from torch import Tensor

from promptmux_kernels import (
    PAGE,
    CrossMemory,
    PagedPrompts,
    Rows,
    SharedBias,
    cpu,
    cross_decode_attention,
    pack_memory,
    pack_prompts,
    prefix_attention,
    prefix_decode_attention,
    prepare,
    use_form,
)

HEADS, DIM = 2, 16
TOLERANCE = 2e-6  # float32 sums of at most 300 terms of size one


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def prompts_of(lengths: list[int], seed: int = 1) -> PagedPrompts:
    pairs = [
        (normal(1, HEADS, n, DIM, seed=seed + i), normal(1, HEADS, n, DIM, seed=seed + 99 + i))
        for i, n in enumerate(lengths)
    ]
    return pack_prompts(pairs, range(len(lengths))).layer(0)


def prefill_case(lengths: list[int], prompt_lengths: list[int], seed: int = 0) -> dict[str, object]:
    rows = Rows.packed(lengths)
    tables = tuple(normal(HEADS, max(lengths), max(lengths), seed=seed + 7 + i) for i in range(2))
    return {
        "rows": rows,
        "prompts": prompts_of(prompt_lengths),
        "bias": SharedBias(tables, tuple(i % 2 for i in range(len(lengths)))),
        "scale": 0.25,
        "head_scale": torch.tensor([1.0, 0.5]),
    }


def attend(case: dict[str, object], form: str, *, causal: bool, seed: int = 3) -> tuple[Tensor, Tensor]:
    rows = case["rows"]
    assert isinstance(rows, Rows)
    q, k, v = (normal(rows.total, HEADS, DIM, seed=seed + i) for i in range(3))
    with use_form(form):  # type: ignore[arg-type]
        return prefix_attention(q, k, v, causal=causal, **case)  # type: ignore[arg-type]


def prefill(case: dict[str, object], form: str, *, causal: bool) -> Tensor:
    return attend(case, form, causal=causal)[0]


@pytest.mark.parametrize("causal", [False, True], ids=["encoder", "decoder"])
@pytest.mark.parametrize(
    ("lengths", "prompt_lengths"),
    [
        ([1], [0]),
        ([3, 3, 3], [7, 7, 7]),
        ([1, 63, 64, 65], [0, 1, 64, 100]),
        ([5, 130, 2, 9, 130], [256, 0, 31, 32, 33]),
    ],
    ids=["one-token", "equal-rows", "around-a-tile", "mixed"],
)
def test_prefill_equals_the_reference(lengths: list[int], prompt_lengths: list[int], causal: bool) -> None:
    case = prefill_case(lengths, prompt_lengths)
    found, expected = (attend(case, form, causal=causal) for form in ("batched", "reference"))
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)


def test_the_tolerance_sees_one_wrong_element() -> None:
    case = prefill_case([9, 4], [3, 0])
    found = prefill(case, "batched", causal=False)
    found[5, 1, 3] += 1e-5
    with pytest.raises(AssertionError):
        torch.testing.assert_close(found, prefill(case, "reference", causal=False), atol=TOLERANCE, rtol=0)


def test_prompt_keys_carry_no_bias() -> None:
    """With equal keys everywhere, a bias of +20 on own keys must take all weight from the prompt."""
    rows = Rows.packed([2])
    zeros, ones = torch.zeros(2, HEADS, DIM), torch.ones(2, HEADS, DIM)
    prompt = pack_prompts([(torch.zeros(1, HEADS, 1, DIM), torch.full((1, HEADS, 1, DIM), 50.0))], [0]).layer(0)
    bias = SharedBias((torch.full((HEADS, 2, 2), 20.0),), (0,))
    for form in ("batched", "reference"):
        with use_form(form):  # type: ignore[arg-type]
            out, _ = prefix_attention(
                zeros,
                zeros,
                ones,
                rows=rows,
                prompts=prompt,
                bias=bias,
                scale=1.0,
                head_scale=torch.ones(HEADS),
                causal=False,
            )
        torch.testing.assert_close(out, ones, atol=1e-4, rtol=0)


@pytest.mark.parametrize("form", ["batched", "cpu", "reference", "triton"])
def test_a_row_has_its_prompt_in_its_own_layers_and_none_in_others(form: str) -> None:
    pairs = [(normal(2, HEADS, n, DIM, seed=n), normal(2, HEADS, n, DIM, seed=n + 1)) for n in (7, 40)]
    everywhere = pack_prompts(pairs, [0, 1, 1])
    limited = pack_prompts(pairs, [0, 1, 1], [range(1), None])
    assert limited.layer(0).lengths == everywhere.layer(1).lengths == (7, 40, 40)
    assert limited.layer(1).lengths == (0, 40, 40)
    assert limited.select([2, 0]).layer(1).lengths == (40, 0)
    own, nothing = pack_prompts([pairs[0]], [0, 0], [range(1)]), pack_prompts([pairs[0]], [0, 0])
    case = prefill_case([4, 30], [0, 0])

    def attended(prompts: PagedPrompts | None) -> Tensor:
        return prefill(case | {"prompts": prompts}, form, causal=False)

    torch.testing.assert_close(attended(own.layer(1)), attended(None), atol=0, rtol=0)
    zeros = PagedPrompts(torch.zeros_like(own.layer(1).key), torch.zeros_like(own.layer(1).value), own.table, (7, 7))
    assert float((attended(zeros) - attended(None)).abs().max()) > 0.05  # keys of zeros draw attention
    assert torch.equal(attended(own.layer(0)), attended(nothing.layer(0)))


def decode_case(widths: list[int], steps: list[int], prompt_lengths: list[int]) -> dict[str, object]:
    rng = random.Random(4)
    slots, longest = 200, max(steps)
    history = torch.tensor([[rng.randrange(slots) for _ in range(longest)] for _ in range(sum(widths))])
    return {
        "groups": Rows.packed(widths),
        "prompts": prompts_of(prompt_lengths),
        "cache_key": normal(slots, HEADS, DIM, seed=11),
        "cache_value": normal(slots, HEADS, DIM, seed=12),
        "history": history,
        "history_lengths": tuple(steps),
        "bias": normal(HEADS, longest, longest, seed=13),
        "scale": 0.25,
        "head_scale": torch.tensor([1.0, 0.5]),
    }


@pytest.mark.parametrize(
    ("widths", "steps", "prompt_lengths"),
    [([1], [1], [0]), ([5, 5], [3, 9], [64, 0]), ([1, 5, 3, 5], [17, 2, 9, 1], [7, 100, 0, 33])],
    ids=["first-step", "two-beams", "mixed"],
)
def test_a_decode_step_equals_the_reference(widths: list[int], steps: list[int], prompt_lengths: list[int]) -> None:
    case = decode_case(widths, steps, prompt_lengths)
    q = normal(sum(widths), HEADS, DIM, seed=5)
    outputs = []
    for form in ("batched", "reference"):
        with use_form(form):  # type: ignore[arg-type]
            outputs.append(prefix_decode_attention(q, **case))  # type: ignore[arg-type]
    torch.testing.assert_close(outputs[0], outputs[1], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("consecutive", [True, False], ids=["prefill", "step"])
def test_cross_attention_equals_the_reference(consecutive: bool) -> None:
    groups, memory = Rows.packed([5, 1, 3]), Rows((40, 0, 9), (7, 9, 30))
    first = (0, 0, 0) if consecutive else (4, 0, 11)
    arguments = {
        "groups": groups,
        "memory": pack_memory(normal(60, HEADS, DIM, seed=21), normal(60, HEADS, DIM, seed=22), memory),
        "bias": SharedBias((normal(HEADS, 12, 30, seed=23), normal(HEADS, 12, 30, seed=24)), (0, 1, 0)),
        "first_positions": first,
        "consecutive": consecutive,
        "scale": 0.25,
        "head_scale": torch.tensor([1.0, 0.5]),
    }
    q = normal(9, HEADS, DIM, seed=25)
    outputs = []
    for form in ("batched", "reference"):
        with use_form(form):  # type: ignore[arg-type]
            outputs.append(cross_decode_attention(q, **arguments))  # type: ignore[arg-type]
    torch.testing.assert_close(outputs[0], outputs[1], atol=TOLERANCE, rtol=0)


def test_while_gradients_are_recorded_memory_stays_readable_by_the_form_with_a_backward() -> None:
    """A prompt of the decoder alone: the memory is frozen, the query that reads it is not."""
    keys, values = (normal(30, HEADS, DIM, seed=seed) for seed in (21, 22))
    memory = pack_memory(keys, values, Rows.packed([30]))
    arguments = {
        "groups": Rows.packed([3]),
        "bias": SharedBias((normal(HEADS, 12, 30, seed=23),), (0,)),
        "first_positions": (0,),
        "consecutive": True,
        "scale": 0.25,
        "head_scale": torch.tensor([1.0, 0.5]),
    }
    q = normal(3, HEADS, DIM, seed=25)
    with torch.no_grad():
        served = cross_decode_attention(q, memory=pack_memory(keys, values, Rows.packed([30])), **arguments)  # type: ignore[arg-type]
    trained = cross_decode_attention(q.requires_grad_(), memory=memory, **arguments)  # type: ignore[arg-type]
    trained.sum().backward()
    torch.testing.assert_close(trained.detach(), served, atol=TOLERANCE, rtol=0)
    assert q.grad is not None


@pytest.mark.parametrize("form", ["batched", "reference"])
def test_a_memory_of_another_layout_is_not_misread(form: str) -> None:
    memory = CrossMemory(normal(32, HEADS, DIM, seed=1), normal(32, HEADS, DIM, seed=2), Rows.packed([30]), "cpu")
    bias = SharedBias((normal(HEADS, 1, 30, seed=3),), (0,))
    with use_form(form), pytest.raises(AssertionError):  # type: ignore[arg-type]
        cross_decode_attention(
            normal(1, HEADS, DIM, seed=4),
            groups=Rows.packed([1]),
            memory=memory,
            bias=bias,
            first_positions=(0,),
            consecutive=True,
            scale=1.0,
            head_scale=torch.ones(HEADS),
        )


POISONS = [float("nan"), float("inf"), float("-inf"), 3e38]


@pytest.mark.parametrize("form", ["batched", "reference"])
@pytest.mark.parametrize("poison", POISONS, ids=str)
def test_a_poisoned_prompt_changes_no_neighbour_by_a_bit(form: str, poison: float) -> None:
    case = prefill_case([4, 30, 9], [7, 64, 33])
    prompts = case["prompts"]
    assert isinstance(prompts, PagedPrompts)
    clean = prefill(case, form, causal=False)
    own = prompts.table[1, : 64 // PAGE]
    for pool in (prompts.key, prompts.value):
        pool[own] = poison
    poisoned = prefill(case, form, causal=False)
    assert torch.equal(poisoned[:4], clean[:4])
    assert torch.equal(poisoned[34:], clean[34:])
    assert not torch.equal(poisoned[4:34], clean[4:34])


@pytest.mark.parametrize("form", ["batched", "reference"])
def test_what_lies_behind_a_prompt_in_its_last_page_counts_for_nothing(form: str) -> None:
    case = prefill_case([4, 6], [7, 40])
    prompts = case["prompts"]
    assert isinstance(prompts, PagedPrompts)
    clean = prefill(case, form, causal=False)
    for pool in (prompts.key, prompts.value):
        pool[prompts.table[0, 0], :, 7:] = float("nan")
        pool[prompts.table[1, 1], :, 8:] = float("inf")
    assert torch.equal(prefill(case, form, causal=False), clean)


def test_masking_scores_alone_would_leak() -> None:
    """The control of the two tests above: zero times NaN is NaN, so values must be zeroed as well."""
    value = torch.tensor([[1.0], [float("nan")]])
    weights = torch.tensor([0.0, -torch.inf]).softmax(0)
    assert torch.isnan(weights @ value).all()


def test_gradients_of_prompts_agree_between_the_forms() -> None:
    gradients = []
    for form in ("batched", "reference"):
        key, value = (normal(1, HEADS, 5, DIM, seed=31 + i).requires_grad_() for i in range(2))
        case = prefill_case([3, 8], [0, 0]) | {"prompts": pack_prompts([(key, value)], [0, 0]).layer(0)}
        prefill(case, form, causal=True).square().sum().backward()
        assert key.grad is not None
        assert value.grad is not None
        gradients.append((key.grad, value.grad))
    for first, second in zip(*gradients, strict=True):
        torch.testing.assert_close(first, second, atol=1e-5, rtol=1e-5)


def test_preparing_a_cpu_loads_the_compiled_form_before_the_first_request() -> None:
    ready = prepare(
        heads=2, head_dim=16, ffn_dim=32, dtype=torch.float32, device=torch.device("cpu"), tuned_in=Path("unused")
    )
    assert ready == int(cpu.available(torch.float32))
    assert not Path("unused").exists()
