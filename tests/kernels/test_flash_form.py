"""The form that trains on a CPU: values and gradients of the reference, row by row, whatever the company."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from promptmux_kernels import (
    PagedPrompts,
    PromptBatch,
    Rows,
    SharedBias,
    batched,
    cross_decode_attention,
    flash,
    pack_memory,
    pack_prompts,
    prefix_attention,
    use_form,
)

HEADS, DIM, SCALE = 2, 16, 0.25
HEAD_SCALE = torch.tensor([1.0, 0.5])
TOLERANCE = 1e-5  # float32 sums of at most 300 terms of size one, forward and backward


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pool(lengths: list[int], of_row: list[int]) -> tuple[PromptBatch, list[Tensor]]:
    """Prompts of the given lengths, and the tensors that gradients flow to."""
    leaves = [
        normal(1, HEADS, n, DIM, seed=31 + i).requires_grad_() for i, n in enumerate([n for n in lengths for _ in "kv"])
    ]
    return pack_prompts(list(zip(leaves[::2], leaves[1::2], strict=True)), of_row), leaves


class Prefill:
    """Self-attention of five rows of three lengths, two bias tables and three prompts, one of them empty."""

    rows = Rows.packed([9, 4, 9, 1, 9])
    table_of_row = (0, 1, 0, 1, 0)
    prompt_of_row = (0, 1, 2, 0, 0)

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.qkv = [normal(self.rows.total, HEADS, DIM, seed=i).to(dtype).requires_grad_() for i in range(3)]
        self.prompts, self.leaves = pool([40, 3, 0], list(self.prompt_of_row))
        self.tables = [normal(HEADS, 12, 12, seed=7 + i) for i in range(2)]

    def attend(self, form: str, *, causal: bool = False) -> tuple[Tensor, Tensor]:
        bias = SharedBias(tuple(self.tables), self.table_of_row)
        arguments: dict[str, Any] = {"rows": self.rows, "bias": bias, "scale": SCALE, "head_scale": HEAD_SCALE}
        with use_form(form):  # type: ignore[arg-type]
            return prefix_attention(*self.qkv, prompts=self.prompts.layer(0), causal=causal, **arguments)

    def gradients(self, form: str, *, causal: bool = False) -> list[Tensor]:
        out, _ = self.attend(form, causal=causal)
        inputs = [*self.qkv, *(leaf for leaf in self.leaves if leaf.numel())]
        return list(torch.autograd.grad(out, inputs, normal(*out.shape, seed=9).to(out)))


@pytest.mark.parametrize("causal", [False, True], ids=["encoder", "decoder"])
def test_self_attention_and_its_gradients_are_the_references(causal: bool) -> None:
    case = Prefill()
    torch.testing.assert_close(
        case.attend("flash", causal=causal), case.attend("reference", causal=causal), atol=TOLERANCE, rtol=0
    )
    torch.testing.assert_close(
        case.gradients("flash", causal=causal), case.gradients("reference", causal=causal), atol=TOLERANCE, rtol=0
    )


def test_the_tolerance_sees_one_wrong_element() -> None:
    case = Prefill()
    found = [gradient.clone() for gradient in case.gradients("flash")]
    found[3][0, 1, 39, 3] += 1e-4
    with pytest.raises(AssertionError):
        torch.testing.assert_close(found, case.gradients("reference"), atol=TOLERANCE, rtol=0)


def test_a_row_gets_the_same_bits_in_any_company() -> None:
    case = Prefill()
    together, _ = case.attend("flash")
    for row in range(len(case.rows)):
        own = case.rows.slice(row)
        alone, _ = flash.prefix_attention(
            *(x[own] for x in case.qkv),
            rows=Rows.packed([case.rows.lengths[row]]),
            prompts=case.prompts.select([row]).layer(0),
            bias=SharedBias((case.tables[case.table_of_row[row]],), (0,)),
            scale=SCALE,
            head_scale=HEAD_SCALE,
            causal=False,
        )
        assert torch.equal(together[own], alone)


def test_a_strangers_nan_reaches_neither_a_rows_values_nor_its_gradients() -> None:
    case, clean = Prefill(), Prefill()
    with torch.no_grad():
        case.leaves[2].fill_(float("nan"))  # the key of row 1's prompt
    case.prompts = pack_prompts(list(zip(case.leaves[::2], case.leaves[1::2], strict=True)), list(case.prompt_of_row))
    own = torch.ones(case.rows.total, dtype=torch.bool)
    own[case.rows.slice(1)] = False
    out, _ = case.attend("flash")
    assert torch.equal(out[own], clean.attend("flash")[0][own])
    assert not bool(out[~own].isfinite().any())
    weights = own[:, None, None] * normal(*out.shape, seed=9)
    found, expected = (
        torch.autograd.grad(one.attend("flash")[0][own], [one.leaves[0], one.qkv[0]], weights[own])
        for one in (case, clean)
    )
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1][own], expected[1][own])


class Cross:
    """Cross-attention of three rows, two of them alike, from given first positions."""

    groups, memory_rows = Rows.packed([5, 3, 5]), Rows.packed([7, 9, 7])

    def __init__(self, memory_rows: Rows = memory_rows) -> None:
        self.memory_rows = memory_rows
        self.inputs = [normal(n, HEADS, DIM, seed=20 + n).requires_grad_() for n in (13, 60, 61)]
        self.tables = tuple(normal(HEADS, 12, 30, seed=23 + i) for i in range(2))

    def attend(self, form: str, first: int = 0) -> Tensor:
        q, key, value = self.inputs
        end = max(s + n for s, n in zip(self.memory_rows.starts, self.memory_rows.lengths, strict=True))
        with use_form(form):  # type: ignore[arg-type]
            return cross_decode_attention(
                q,
                groups=self.groups,
                memory=pack_memory(key[:end], value[:end], self.memory_rows),
                bias=SharedBias(self.tables, (0, 1, 0)),
                first_positions=(first,) * 3,
                consecutive=True,
                scale=SCALE,
                head_scale=HEAD_SCALE,
            )

    def gradients(self, form: str) -> tuple[Tensor, ...]:
        out = self.attend(form)
        return torch.autograd.grad(out, self.inputs, normal(*out.shape, seed=9))


@pytest.mark.parametrize("rows", [Cross.memory_rows, Rows((40, 0, 9), (7, 9, 7))], ids=["packed", "handed-on"])
def test_cross_attention_and_its_gradients_are_the_references(rows: Rows) -> None:
    case = Cross(rows)
    torch.testing.assert_close(case.attend("flash", 2), case.attend("reference", 2), atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(case.gradients("flash"), case.gradients("reference"), atol=TOLERANCE, rtol=0)


def answered_by(monkeypatch: pytest.MonkeyPatch, case: Prefill, form: str | None = None) -> str:
    """Which form computed a case: the operator inside torch, or the one that it is handed on to."""
    asked: list[str] = []
    monkeypatch.setattr(flash, "_flash", lambda *a, real=flash._flash: (asked.append("flash"), real(*a))[1])
    monkeypatch.setattr(
        batched,
        "prefix_attention",
        lambda *a, real=batched.prefix_attention, **k: (asked.append("batched"), real(*a, **k))[1],
    )
    if form:
        case.attend(form)
    else:
        bias = SharedBias(tuple(case.tables), case.table_of_row)
        prefix_attention(
            *case.qkv,
            rows=case.rows,
            prompts=case.prompts.layer(0),
            bias=bias,
            scale=SCALE,
            head_scale=HEAD_SCALE,
            causal=False,
        )
    return asked[0]


def test_where_a_cpu_is_asked_for_a_gradient_this_form_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    assert answered_by(monkeypatch, Prefill()) == "flash"


def test_biases_that_learn_are_handed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Prefill()
    case.tables[1].requires_grad_()
    assert answered_by(monkeypatch, case, "flash") == "batched"
    found, expected = (torch.autograd.grad(case.attend(f)[0].sum(), case.tables[1])[0] for f in ("flash", "reference"))
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)


def test_short_rows_in_16_bits_are_handed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    assert answered_by(monkeypatch, Prefill(torch.bfloat16), "flash") == "batched"


def test_long_rows_in_16_bits_are_the_references_up_to_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash, "LONG_ROW", 1)
    case, exact = Prefill(torch.bfloat16), Prefill()
    torch.testing.assert_close(case.attend("flash")[0].float(), exact.attend("reference")[0], atol=0.05, rtol=0)
    assert answered_by(monkeypatch, case, "flash") == "flash"


def test_rows_without_any_prompt() -> None:
    case = Prefill()
    case.prompts, _ = pool([0], [0] * 5)
    nothing = case.attend("flash")[0]
    case.prompts = PromptlessBatch()  # type: ignore[assignment]
    assert torch.equal(nothing, case.attend("flash")[0])


class PromptlessBatch:
    """A side of the model that has no pool at all."""

    def layer(self, index: int) -> PagedPrompts | None:
        return None
