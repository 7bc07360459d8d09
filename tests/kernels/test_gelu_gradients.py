"""The compiled gradient of `gelu_norm` is the reference's, from the input alone; learning weights are handed on."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from promptmux_kernels import batched, cpu, gelu_norm, reference
from promptmux_kernels.gelu_autograd import GeluNorm
from promptmux_kernels.rows import Affine

compiled = pytest.mark.skipif(not cpu.available(torch.float32), reason="no compiler, or no AVX2")

DTYPES = [torch.float32, torch.bfloat16]
EPS = 1e-5


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


class Case:
    """Tokens from far below to far above zero, a frozen norm, and what comes back from behind it."""

    def __init__(self, width: int, dtype: torch.dtype, tokens: int = 33) -> None:
        self.x = (3 * normal(tokens, width, seed=1)).to(dtype)
        self.affine: Affine = (normal(width, seed=2, dtype=dtype), normal(width, seed=3, dtype=dtype))
        self.behind = normal(tokens, width, seed=4, dtype=dtype)

    def gradient(self, form: object, dtype: torch.dtype | None = None) -> Tensor:
        dtype = dtype or self.x.dtype
        x = self.x.detach().to(dtype).clone().requires_grad_()
        weight, bias = (part.to(dtype) for part in self.affine)
        out = form.gelu_norm(x, (weight, bias), EPS)  # type: ignore[attr-defined]
        (found,) = torch.autograd.grad(out, x, self.behind.to(dtype))
        return found

    def error(self, found: Tensor) -> float:
        """Relative to the largest number of the exact gradient."""
        exact = self.gradient(reference, torch.float64)
        return float((found.double() - exact).abs().max() / exact.abs().max()) if exact.numel() else 0.0


@compiled
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [16, 48, 192, 3072])
def test_the_gradient_is_as_exact_as_pytorchs(width: int, dtype: torch.dtype) -> None:
    case = Case(width, dtype)
    limit = (
        1e-6 if dtype == torch.float32 else 2**-8
    )  # a few roundings of float32; one of bfloat16, of the largest number
    error = case.error(case.gradient(cpu))
    assert error <= limit
    assert error <= 1.5 * case.error(case.gradient(batched))


@compiled
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_limit_sees_one_wrong_element(dtype: torch.dtype) -> None:
    case = Case(192, dtype)
    wrong = case.gradient(cpu)
    wrong[5, 7] += 2**-6 * wrong.abs().max()
    assert case.error(wrong) > 2**-8


def test_the_references_gradient_is_that_of_its_values() -> None:
    x = normal(3, 6, seed=1).double().requires_grad_()
    affine = normal(6, seed=2).double(), normal(6, seed=3).double()
    assert torch.autograd.gradcheck(lambda x: reference.gelu_norm(x, affine, EPS), x)


@compiled
def test_far_and_tiny_inputs_have_their_slopes() -> None:
    case = Case(16, torch.float32)
    case.x = torch.tensor([-30.0, -6.0, -1e-4, 0.0, 1e-4, 6.0, 30.0, -0.5]).repeat(2)[None]
    case.behind = case.behind[:1]
    assert case.error(case.gradient(cpu)) <= 1e-6


@compiled
def test_no_token_and_tokens_that_lie_apart() -> None:
    assert Case(48, torch.float32, tokens=0).gradient(cpu).shape == (0, 48)
    case = Case(48, torch.float32)
    apart = torch.stack([case.x, case.x], 1).clone().requires_grad_()
    out = cpu.gelu_norm(apart[:, 1], case.affine, EPS)
    (found,) = torch.autograd.grad(out, apart, case.behind.t().contiguous().t())
    assert torch.equal(found[:, 1], case.gradient(cpu))
    assert not bool(found[:, 0].any())


@compiled
def test_a_token_gets_the_same_bits_in_any_company_and_a_nan_stays_with_its_own() -> None:
    case = Case(48, torch.float32)
    together = case.gradient(cpu)
    case.x[4] = float("nan")
    others = [row for row in range(33) if row != 4]
    found = case.gradient(cpu)
    assert torch.equal(found[others], together[others])
    assert bool(found[4].isnan().all())
    case.x, case.behind = case.x[7:8], case.behind[7:8]
    assert torch.equal(case.gradient(cpu)[0], together[7])


def kept(case: Case, weight_learns: bool) -> list[tuple[int, ...]]:
    """Shapes of what a pass that dispatch answers keeps for the way back."""
    shapes: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (shapes.append(tuple(t.shape)), t)[1], lambda t: t):
        gelu_norm(case.x.clone().requires_grad_(), (case.affine[0].requires_grad_(weight_learns), case.affine[1]), EPS)
    return shapes


@compiled
def test_the_input_alone_is_kept_unless_weights_learn() -> None:
    case = Case(192, torch.float32)
    assert kept(case, weight_learns=False) == [(33, 192)]
    assert kept(case, weight_learns=True).count((33, 192)) == 2


@pytest.mark.parametrize("why", ["odd-width", "float64", "weights-learn"])
def test_what_the_library_cannot_is_handed_on(why: str) -> None:
    case = Case(20 if why == "odd-width" else 32, torch.float64 if why == "float64" else torch.float32)
    case.affine[0].requires_grad_(why == "weights-learn")
    assert torch.equal(case.gradient(cpu), case.gradient(batched))


@compiled
def test_a_library_whose_gradient_is_wrong_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    right = GeluNorm.backward
    monkeypatch.setattr(GeluNorm, "backward", lambda ctx, grad: right(ctx, 1.1 * grad))
    assert not cpu.available.__wrapped__(torch.float32)
