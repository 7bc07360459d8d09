"""A batch's pool holds what each row should read, gradients are those of plain steps, and no copy reaches another."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from promptmux_kernels import RowsPrompt, Thinning, pack_prompts, pack_rows

LAYERS, HEADS, DIM, SCALE = 3, 2, 16, 1.25
LENGTHS = [40, 3, 0]
ROWS = [2, 3, 1]


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def leaves() -> list[tuple[Tensor, Tensor]]:
    """K and V of three prompts, the last of them empty."""
    shapes = [(LAYERS, HEADS, length, DIM) for length in LENGTHS]
    return [
        (normal(*s, seed=2 * i).requires_grad_(), normal(*s, seed=2 * i + 1).requires_grad_())
        for i, s in enumerate(shapes)
    ]


def thinned(prompt: RowsPrompt, seed: int) -> RowsPrompt:
    kept = [(normal(2, *prompt.key.shape, seed=seed + row) > -1).byte() for row in range(prompt.rows)]
    return replace(prompt, thinning=Thinning(kept, SCALE))


def prompts_of(sides: list[tuple[Tensor, Tensor]], thin: set[int]) -> list[RowsPrompt]:
    plain = [RowsPrompt.of(*pair, rows) for pair, rows in zip(sides, ROWS, strict=True)]
    return [thinned(prompt, 100 * i) if i in thin else prompt for i, prompt in enumerate(plain)]


def read(prompts: list[RowsPrompt], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """What each row reads in each layer, K and V."""
    packed = pack_rows(prompts, dtype)
    return [part for layer in range(LAYERS) for row in range(sum(ROWS)) for part in packed.layer(layer).gather(row)]


def expected(prompts: list[RowsPrompt], sides: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """The same, row by row: a prompt times what it keeps, laid out by `pack_prompts`."""
    found = []
    for prompt, pair in zip(prompts, sides, strict=True):
        for row in range(prompt.rows):
            whole = pack_prompts([pair], [0])
            key, value = whole.key, whole.value
            if prompt.thinning:
                keys, values = prompt.thinning.kept[row]
                key, value = key * keys * SCALE, value * values * SCALE
            own = replace(whole, key=key, value=value)
            found.append([own.layer(layer).gather(0) for layer in range(LAYERS)])
    return [part for layer in range(LAYERS) for row in found for part in row[layer]]


@pytest.mark.parametrize("thin", [{0, 1, 2}, {0}, set()], ids=["all", "one", "none"])
def test_rows_and_gradients_are_those_of_plain_steps(thin: set[int]) -> None:
    sides = leaves()
    prompts = prompts_of(sides, thin)
    found, wanted = read(prompts), expected(prompts, sides)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0)
    behind = [normal(*part.shape, seed=500 + i) for i, part in enumerate(found)]
    inputs = [tensor for pair in sides[:2] for tensor in pair]
    gradients, right = (torch.autograd.grad(parts, inputs, behind) for parts in (found, wanted))
    torch.testing.assert_close(gradients, right, rtol=1e-5, atol=1e-6)


def test_a_row_that_read_its_neighbours_copy_would_be_seen() -> None:
    sides = leaves()
    prompts = prompts_of(sides, {0, 1, 2})
    swapped = replace(prompts[0], thinning=Thinning(prompts[0].thinning.kept[::-1], SCALE))  # type: ignore[union-attr]
    with pytest.raises(AssertionError):
        torch.testing.assert_close(read([swapped, *prompts[1:]]), expected(prompts, sides), rtol=1e-6, atol=0)


def test_copies_of_one_row_each_are_rounded_and_shared_ones_are_not() -> None:
    sides = leaves()
    apart, mixed = prompts_of(sides, {0, 1, 2}), prompts_of(sides, {0})
    assert {part.dtype for part in read(apart, torch.bfloat16)} == {torch.bfloat16}
    assert {part.dtype for part in read(mixed, torch.bfloat16)} == {torch.float32}
    rounded = [part.bfloat16() for part in read(apart)]
    assert all(torch.equal(found, right) for found, right in zip(read(apart, torch.bfloat16), rounded, strict=True))
    loss = torch.stack([part.float().sum() for part in read(apart, torch.bfloat16)]).sum()
    assert {gradient.dtype for gradient in torch.autograd.grad(loss, sides[0])} == {torch.float32}


def test_a_strangers_nan_stays_in_its_own_pages_and_gradients() -> None:
    sides = leaves()
    with torch.no_grad():
        sides[1][0].fill_(float("nan"))
    found = read(prompts_of(sides, {0, 1, 2}))
    rows = [i // 2 % sum(ROWS) for i in range(len(found))]
    own = [part for part, row in zip(found, rows, strict=True) if row not in (2, 3, 4)]
    assert all(bool(part.isfinite().all()) for part in own)
    assert not all(bool(part.isfinite().all()) for part in found)
    loss = torch.stack([part.square().sum() for part in own]).sum()
    assert all(bool(gradient.isfinite().all()) for gradient in torch.autograd.grad(loss, sides[0]))


def test_layers_lengths_and_rows_are_laid_out_in_the_order_of_the_prompts() -> None:
    first, second, empty = prompts_of(leaves(), {0})
    packed = pack_rows([replace(first, layers=range(1, 2)), second, empty], torch.float32)
    assert packed.lengths == (40, 40, 3, 3, 3, 0)
    assert packed.layer(0).lengths == (0, 0, 3, 3, 3, 0)
    assert packed.layer(1).lengths == packed.lengths
    assert packed.table.tolist() == [[0, 1], [2, 3], [4, 0], [4, 0], [4, 0], [0, 0]]
