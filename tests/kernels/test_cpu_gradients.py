"""The compiled CPU form trains: its gradients are the reference's, and a row's are its own whatever the company."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
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
    cpu,
    cross_decode_attention,
    pack_memory,
    pack_prompts,
    prefix_attention,
    use_form,
)
from promptmux_kernels.cpu_autograd import Attention

pytestmark = pytest.mark.skipif(not cpu.available(torch.float32), reason="no compiler, or no AVX2")

HEADS, DIM, SCALE = 2, 16, 0.25
HEAD_SCALE = torch.tensor([1.0, 0.5])
TOLERANCE = 2e-5  # float32 sums of at most 700 terms of size one, forward and backward
DTYPES = [torch.float32, torch.bfloat16]


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class OneLayer:
    """A side of the model of one layer, with a pool or none at all."""

    def __init__(self, prompts: PagedPrompts | None) -> None:
        self.prompts = prompts

    def layer(self, index: int) -> PagedPrompts | None:
        return self.prompts


class Prefill:
    """Self-attention of ragged rows over two bias tables; each row reads one of the prompts."""

    def __init__(
        self,
        lengths: Sequence[int] = (9, 4, 9, 1, 9),
        prompts: Sequence[int] = (40, 3, 0),
        prompt_of_row: Sequence[int] = (0, 1, 2, 0, 0),
        *,
        layers: Sequence[range | None] = (),
        dtype: torch.dtype = torch.float32,
        pool_dtype: torch.dtype | None = None,
    ) -> None:
        self.rows, longest = Rows.packed(lengths), max(lengths) + 3
        # Rounded once, so that every type computes with the same numbers.
        self.qkv = [self._leaf(self.rows.total, HEADS, DIM, seed=i, dtype=dtype) for i in range(3)]
        shapes = [(1, HEADS, n, DIM) for n in prompts for _ in "kv"]
        self.leaves = [self._leaf(*s, seed=31 + i, dtype=pool_dtype or dtype) for i, s in enumerate(shapes)]
        self.prompt_of_row, self.layers = list(prompt_of_row), layers
        self.tables = [normal(HEADS, longest, longest, seed=7 + i) for i in range(2)]
        self.bias = SharedBias(tuple(self.tables), tuple(i % 2 for i in range(len(lengths))))
        self.head_scale = HEAD_SCALE

    @staticmethod
    def _leaf(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
        return normal(*shape, seed=seed).bfloat16().to(dtype).requires_grad_()

    @property
    def prompts(self) -> PromptBatch:
        pairs = list(zip(self.leaves[::2], self.leaves[1::2], strict=True))
        return pack_prompts(pairs, self.prompt_of_row, self.layers)

    @property
    def learned(self) -> list[Tensor]:
        return [x for x in (*self.qkv, *self.leaves) if x.requires_grad and x.numel()]

    def attend(self, form: str | None = "cpu", *, causal: bool = False, prompts: Any = None) -> tuple[Tensor, Tensor]:
        arguments: dict[str, Any] = {
            "rows": self.rows,
            "prompts": (prompts or self.prompts).layer(0),
            "bias": self.bias,
            "scale": SCALE,
            "head_scale": self.head_scale,
            "causal": causal,
        }
        with use_form(form) if form else nullcontext():  # type: ignore[arg-type]
            return prefix_attention(*self.qkv, **arguments)

    def gradients(self, form: str = "cpu", *, causal: bool = False) -> list[Tensor]:
        out, _ = self.attend(form, causal=causal)
        return list(torch.autograd.grad(out, self.learned, normal(*out.shape, seed=9).bfloat16().to(out)))


SHAPES = {
    "short": ((9, 4, 9, 1, 9), (40, 3, 0), (0, 1, 2, 0, 0)),
    "around-a-page": ((5, 6, 7, 8, 9, 10), (0, 1, 31, 32, 33, 64), (0, 1, 2, 3, 4, 5)),
    "around-a-tile": ((63, 64, 65, 130, 17), (64, 100, 7), (0, 1, 1, 2, 0)),
    "one-token": ((1,), (0,), (0,)),
}


@pytest.mark.parametrize("causal", [False, True], ids=["encoder", "decoder"])
@pytest.mark.parametrize("shape", SHAPES)
def test_self_attention_and_its_gradients_are_the_references(shape: str, causal: bool) -> None:
    case = Prefill(*SHAPES[shape])
    torch.testing.assert_close(
        case.attend(causal=causal), case.attend("reference", causal=causal), atol=TOLERANCE, rtol=0
    )
    found, expected = (case.gradients(form, causal=causal) for form in ("cpu", "reference"))
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)


def test_the_tolerance_sees_one_wrong_element() -> None:
    case = Prefill()
    found = case.gradients()
    found[3][0, 1, 39, 3] += 1e-4
    with pytest.raises(AssertionError):
        torch.testing.assert_close(found, case.gradients("reference"), atol=TOLERANCE, rtol=0)


def error(found: Sequence[Tensor], exact: Sequence[Tensor]) -> Tensor:
    """Root of the mean squared difference of each gradient, in parts of what is exact."""
    return torch.stack([(a.double() - b).norm() / b.norm() for a, b in zip(found, exact, strict=True)])


def as_good_as(found: Sequence[Tensor], plain: Sequence[Tensor], exact: Sequence[Tensor]) -> bool:
    """Whether all gradients together are off by no more than PyTorch's own in bfloat16, and none (a prompt of a few
    positions, where luck decides) by more than 1.6 times as much."""
    own, theirs = error(found, exact), error(plain, exact)
    assert theirs.max() < 2**-7
    return bool(own.sum() <= theirs.sum() and (own <= 1.6 * theirs).all())


@pytest.mark.skipif(not cpu.available(torch.bfloat16), reason="no bfloat16 here")
@pytest.mark.parametrize("causal", [False, True], ids=["encoder", "decoder"])
@pytest.mark.parametrize("shape", ["short", "around-a-page", "around-a-tile"])
def test_in_bfloat16_gradients_lose_no_more_than_plain_pytorchs(shape: str, causal: bool) -> None:
    case = Prefill(*SHAPES[shape], dtype=torch.bfloat16)
    exact = Prefill(*SHAPES[shape], dtype=torch.float64).gradients("reference", causal=causal)
    plain = case.gradients("batched", causal=causal)
    found = case.gradients(causal=causal)
    assert as_good_as(found, plain, exact)
    found[1][0, 0] += 0.5
    assert not as_good_as(found, plain, exact)


@pytest.mark.skipif(not cpu.available(torch.bfloat16), reason="no bfloat16 here")
def test_prompts_of_full_precision_learn_in_full_precision_beside_bfloat16() -> None:
    """As under autocast: the pool is rounded for the products, and its gradient is not rounded at all."""
    case, rounded = (Prefill(dtype=torch.bfloat16, pool_dtype=t) for t in DTYPES)
    found, coarse = case.gradients(), rounded.gradients()
    assert [x.dtype for x in found] == [torch.bfloat16] * 3 + [torch.float32] * 4
    assert all(torch.equal(a.to(b.dtype), b) for a, b in zip(found, coarse, strict=True))
    assert any(not torch.equal(a, b.float()) for a, b in zip(found[3:], coarse[3:], strict=True))


def test_a_prompt_learns_nothing_in_a_layer_that_does_not_carry_it() -> None:
    case = Prefill(layers=[None, range(1, 2), None])
    found = torch.autograd.grad(case.attend()[0].sum(), case.leaves)
    assert found[0].any()
    assert not any(x.any() for x in found[2:])
    case = Prefill(layers=[range(1, 2)] * 3)
    nothing = torch.autograd.grad(case.attend()[0].sum(), case.leaves, allow_unused=True, materialize_grads=True)
    assert not any(x.any() for x in nothing)


@pytest.mark.parametrize("causal", [False, True], ids=["encoder", "decoder"])
@pytest.mark.parametrize("learning", [(), (0,), (1, 2), (2,)], ids=["prompts", "queries", "keys", "values"])
def test_what_else_learns_does_not_change_a_gradient(learning: tuple[int, ...], causal: bool) -> None:
    shape = SHAPES["around-a-tile"]
    everything = Prefill(*shape).gradients(causal=causal)
    case = Prefill(*shape)
    for index in range(3):
        case.qkv[index].requires_grad_(index in learning)
    expected = [everything[index] for index in learning] + everything[3:]
    assert all(map(torch.equal, case.gradients(causal=causal), expected))
    for leaf in case.leaves:
        leaf.requires_grad_(False)
    assert all(map(torch.equal, case.gradients(causal=causal) if learning else [], expected))


def test_frozen_queries_cost_no_products_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first layer's tokens do not depend on a prompt: then only the prompt's gradients are asked for."""
    asked: list[tuple[bool, ...]] = []
    real = Attention.backward

    def watched(*arguments: Any) -> list[Tensor]:
        asked.append(arguments[-3:])
        return real(*arguments)

    monkeypatch.setattr(Attention, "backward", watched)
    case = Prefill()
    case.gradients()
    for tensor in case.qkv:
        tensor.requires_grad_(False)
    case.gradients()
    for leaf in case.leaves:
        leaf.requires_grad_(False)
    case.qkv[0].requires_grad_()
    case.gradients()
    assert asked == [(True, True, True), (False, False, True), (True, False, False)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_gets_the_same_bits_in_any_company(dtype: torch.dtype) -> None:
    lengths, prompts, prompt_of_row = SHAPES["around-a-tile"]
    together = Prefill(lengths, prompts, prompt_of_row, dtype=dtype)
    out, _ = together.attend()
    grad = normal(*out.shape, seed=9).to(dtype)
    gradients = torch.autograd.grad(out, [*together.qkv, *together.leaves], grad)
    for row in (1, 3):
        own, alone = together.rows.slice(row), Prefill(lengths, prompts, prompt_of_row, dtype=dtype)
        alone.qkv = [x.detach()[own].requires_grad_() for x in together.qkv]
        alone.rows, alone.bias = Rows.packed([lengths[row]]), together.bias.select([row])
        alone.prompt_of_row = [prompt_of_row[row]]
        single, _ = alone.attend()
        assert torch.equal(single, out[own])
        found = torch.autograd.grad(single, [*alone.qkv, *alone.leaves], grad[own])
        assert all(torch.equal(a, b[own]) for a, b in zip(found, gradients[:3], strict=False))
        if prompt_of_row.count(prompt_of_row[row]) == 1:
            pair = slice(3 + 2 * prompt_of_row[row], 5 + 2 * prompt_of_row[row])
            assert all(map(torch.equal, found[pair], gradients[pair]))


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_are_the_same_bits_on_any_number_of_threads(dtype: torch.dtype, threads: None) -> None:
    """Also of a prompt that many rows read, each adding its part."""
    case = Prefill([30 + i for i in range(9)], [40], [0] * 9, dtype=dtype)
    runs = []
    for count in (1, 2, 3, 2):
        torch.set_num_threads(count)
        runs.append(case.gradients())
    assert all(all(map(torch.equal, run, runs[0])) for run in runs[1:])


POISONS = [float("nan"), float("inf"), 3e38]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("poison", POISONS, ids=str)
def test_a_strangers_poison_reaches_neither_a_rows_values_nor_its_gradients(poison: float, dtype: torch.dtype) -> None:
    shape = ((9, 40, 9, 1, 70), (40, 3, 0), (0, 1, 2, 0, 0))
    case, clean = (Prefill(*shape, dtype=dtype) for _ in range(2))
    with torch.no_grad():
        for leaf in case.leaves[2:4]:  # of row 1's prompt
            leaf.fill_(poison)
    own = torch.ones(case.rows.total, dtype=torch.bool)
    own[case.rows.slice(1)] = False
    found, expected = case.gradients(), clean.gradients()
    assert torch.equal(case.attend()[0][own], clean.attend()[0][own])
    assert all(torch.equal(a[own], b[own]) for a, b in zip(found[:3], expected[:3], strict=True))
    assert all(map(torch.equal, found[3:5], expected[3:5]))
    assert not any(map(torch.equal, found[5:], expected[5:]))
    assert not any(torch.equal(a[~own], b[~own]) for a, b in zip(found[:3], expected[:3], strict=True))


@pytest.mark.parametrize("poison", POISONS, ids=str)
def test_what_lies_behind_a_prompt_in_its_last_page_learns_nothing_and_teaches_nothing(poison: float) -> None:
    case = Prefill()
    prompts = case.prompts.layer(0)
    key, value = (pool.detach().clone() for pool in (prompts.key, prompts.value))
    out = []
    for _ in range(2):
        pools = PagedPrompts(
            key.clone().requires_grad_(), value.clone().requires_grad_(), prompts.table, prompts.lengths
        )
        found, _ = case.attend(prompts=OneLayer(pools))
        out.append(torch.autograd.grad(found.sum(), [*case.qkv, pools.key, pools.value]))
        for pool in (key, value):
            pool[1, :, 8:], pool[2, :, 3:] = poison, poison  # behind 40 of 64, and behind 3 of 32
    assert all(map(torch.equal, *out))
    for gradient in out[1][3:]:
        assert not gradient[1, :, 8:].any()
        assert not gradient[2, :, 3:].any()
        assert gradient[1, :, :8].all()


class Cross:
    """Cross-attention of ragged rows from given first positions."""

    groups, memory_rows = Rows.packed([5, 3, 70]), Rows.packed([7, 65, 130])

    def __init__(
        self, groups: Rows = groups, memory_rows: Rows = memory_rows, dtype: torch.dtype = torch.float32
    ) -> None:
        self.groups, self.memory_rows = groups, memory_rows
        self.end = max(s + n for s, n in zip(memory_rows.starts, memory_rows.lengths, strict=True))
        sizes = (groups.total, self.end, self.end)
        self.inputs = [normal(n, HEADS, DIM, seed=20 + i).bfloat16().to(dtype) for i, n in enumerate(sizes)]
        for tensor in self.inputs:
            tensor.requires_grad_()
        self.tables = tuple(normal(HEADS, 80, 130, seed=23 + i) for i in range(2))

    def attend(self, form: str | None, first: int = 0) -> Tensor:
        q, key, value = self.inputs
        with use_form(form) if form else nullcontext():  # type: ignore[arg-type]
            return cross_decode_attention(
                q,
                groups=self.groups,
                memory=pack_memory(key, value, self.memory_rows),
                bias=SharedBias(self.tables, (0, 1, 0)),
                first_positions=(first,) * 3,
                consecutive=True,
                scale=SCALE,
                head_scale=HEAD_SCALE,
            )

    def gradients(self, form: str | None = "cpu", first: int = 0) -> list[Tensor]:
        out, learned = self.attend(form, first), [x for x in self.inputs if x.requires_grad]
        return list(torch.autograd.grad(out, learned, normal(*out.shape, seed=9).bfloat16().to(out)))


SCATTERED = Rows((40, 0, 9), (7, 9, 7))


@pytest.mark.parametrize("rows", [Cross.memory_rows, SCATTERED], ids=["packed", "handed-on"])
def test_cross_attention_and_its_gradients_are_the_references(rows: Rows) -> None:
    case = Cross(memory_rows=rows)
    torch.testing.assert_close(case.attend("cpu", 2), case.attend("reference", 2), atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(case.gradients("cpu", 2), case.gradients("reference", 2), atol=TOLERANCE, rtol=0)


def test_a_frozen_memory_gets_no_gradient_and_its_queries_get_theirs() -> None:
    """As where the decoder alone has a prompt."""
    case, frozen = Cross(), Cross()
    for tensor in frozen.inputs[1:]:
        tensor.requires_grad_(False)
    found = frozen.gradients(None)
    assert len(found) == 1
    assert torch.equal(found[0], case.gradients()[0])


def test_a_packed_memory_asked_for_a_gradient_is_refused() -> None:
    case = Cross()
    with use_form("cpu"), torch.no_grad():
        memory = pack_memory(case.inputs[1], case.inputs[2], case.memory_rows)
    with pytest.raises(AssertionError):
        cross_decode_attention(
            case.inputs[0],
            groups=case.groups,
            memory=memory,
            bias=SharedBias(case.tables, (0, 1, 0)),
            first_positions=(0,) * 3,
            consecutive=True,
            scale=SCALE,
            head_scale=HEAD_SCALE,
        )


@pytest.mark.skipif(not cpu.available(torch.bfloat16), reason="no bfloat16 here")
def test_cross_attentions_gradients_in_bfloat16_lose_no_more_than_plain_pytorchs() -> None:
    exact = Cross(dtype=torch.float64).gradients("reference")
    case = Cross(dtype=torch.bfloat16)
    assert as_good_as(case.gradients("cpu"), case.gradients("batched"), exact)


def answered_by(monkeypatch: pytest.MonkeyPatch, case: Prefill | Cross, form: str | None = None) -> str:
    """Which form computed a case: the compiled one, or the one that it is handed on to."""
    asked: list[str] = []

    def watched(name: str, real: Any) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            asked.append(name)
            return real(*arguments, **named)

        return call

    monkeypatch.setattr(Attention, "__call__", watched("cpu", Attention.__call__))
    for op in ("prefix_attention", "cross_decode_attention"):
        monkeypatch.setattr(batched, op, watched("batched", getattr(batched, op)))
    case.attend(form)
    return asked[0]


def test_where_a_cpu_is_asked_for_a_gradient_this_form_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    assert answered_by(monkeypatch, Prefill()) == "cpu"


def test_rows_that_lie_scattered_are_handed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    assert answered_by(monkeypatch, Cross(), "cpu") == "cpu"
    assert answered_by(monkeypatch, Cross(memory_rows=SCATTERED), "cpu") == "batched"


def test_float64_is_handed_on_and_its_gradients_are_the_numbers_slopes(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Prefill((3, 2), (2,), (0, 0), dtype=torch.float64)
    assert answered_by(monkeypatch, case, "cpu") == "batched"
    torch.testing.assert_close(case.gradients(), case.gradients("reference"), atol=1e-6, rtol=0)


@pytest.mark.parametrize("what", ["table", "scale"])
def test_biases_and_scales_that_learn_are_handed_on(monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    case = Prefill()
    case.head_scale = HEAD_SCALE.clone()
    learned = case.tables[1] if what == "table" else case.head_scale
    learned.requires_grad_()
    assert answered_by(monkeypatch, case, "cpu") == "batched"
    found, expected = (torch.autograd.grad(case.attend(f)[0].sum(), learned)[0] for f in ("cpu", "reference"))
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)


def test_rows_without_any_prompt() -> None:
    case = Prefill(prompts=[0], prompt_of_row=[0] * 5)
    out, _ = case.attend()
    absent, _ = case.attend(prompts=OneLayer(None))
    assert torch.equal(out, absent)
    found, expected = (torch.autograd.grad(x.sum(), case.qkv) for x in (absent, case.attend("reference")[0]))
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)
