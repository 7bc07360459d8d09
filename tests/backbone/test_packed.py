"""Packed weights change where numbers lie, not what is computed; where packing is not possible plain products serve."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import tiny
from promptmux_kernels import cpu, linear
from promptmux_kernels.linear import STREAMED_ROWS, PackedLinear
from promptmux_server.backbone.assemble import assemble
from promptmux_server.backbone.encoder import EncoderRow
from promptmux_server.backbone.model import OFA

pytestmark = pytest.mark.skipif(not linear.works(torch.float32), reason="torch without oneDNN")


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def answers(model: OFA) -> tuple[Tensor, Tensor]:
    """Encoder states and logits of a batch with and without a picture."""
    with torch.no_grad():
        image = model.image_tokens(normal(1, 3, 64, 64, seed=1))[0]
        encoded = model.encode([EncoderRow((0, 5, 6, 2), image), EncoderRow((0, 9, 2))])
        return encoded.states, model.logits(model.teach([(0, 4), (0,)], model.remember(encoded)))


def test_a_packed_model_answers_as_the_plain_one() -> None:
    packed = answers(assemble(tiny.backbone(), dtype=torch.float32, packed=True))
    torch.testing.assert_close(packed, answers(tiny.model()), atol=5e-6, rtol=1e-6)


def test_every_projection_of_a_layer_is_packed() -> None:
    model = assemble(tiny.backbone(), dtype=torch.float32, packed=True)
    linears = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    assert linears
    assert not [name for name in linears if ".layers." in name]


@pytest.mark.parametrize("rows", [1, 5, 6, 7, 16, 17, 33])
@pytest.mark.parametrize("use", ["few rows", "many rows"])
def test_a_packed_product_equals_the_plain_one(rows: int, use: linear.Use) -> None:
    weight, bias, x, residual = normal(49, 64, seed=1), normal(49, seed=2), normal(rows, 64, seed=3), normal(49, seed=4)
    packed = PackedLinear(weight, bias, use)
    expected = torch.nn.functional.linear(x.double(), weight.double(), bias.double()).float()
    # Sums of 64 products reach 30: a few float32 roundings of that.
    torch.testing.assert_close(packed(x), expected, atol=4e-5, rtol=0)
    summed = packed.add_to(residual.expand(rows, -1).contiguous(), x)
    torch.testing.assert_close(summed, expected + residual, atol=4e-5, rtol=0)


@pytest.mark.skipif(not cpu.available(torch.float32), reason="no compiled CPU form on this machine")
def test_a_streamed_product_is_the_same_bits_whatever_rows_are_beside_it() -> None:
    weight, bias, x = normal(49, 64, seed=1), normal(49, seed=2), normal(STREAMED_ROWS, 64, seed=3)
    packed = PackedLinear(weight, bias, "few rows")
    together = packed(x)
    for row in range(STREAMED_ROWS):
        assert torch.equal(packed(x[row : row + 1])[0], together[row])
        assert torch.equal(packed(x.flip(0)[: row + 1])[row], together[-1 - row])


def test_without_onednn_plain_products_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "works", lambda dtype: False)
    monkeypatch.setattr(cpu, "can_stream", lambda weight: False)
    weight, x = normal(48, 64, seed=1), normal(5, 64, seed=3)
    assert torch.equal(PackedLinear(weight, None, "few rows")(x), torch.nn.functional.linear(x, weight))


def test_a_product_that_computes_in_less_precision_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """As float32 products do on a machine that quietly multiplies them in bfloat16."""
    exact = torch.ops.mkldnn._linear_pointwise

    class Coarse:
        _reorder_linear_weight = torch.ops.mkldnn._reorder_linear_weight

        @staticmethod
        def _linear_pointwise(x: Tensor, *rest: object) -> Tensor:
            return exact(x.bfloat16().float(), *rest)

    monkeypatch.setattr(torch.ops, "mkldnn", Coarse)
    assert not linear.works.__wrapped__(torch.float32)


def test_float32_is_packed_for_many_rows_only_where_that_was_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "works", lambda dtype: True)
    for capability, pays in (("AVX2", False), ("AVX512", True)):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda capability=capability: capability)
        assert linear.pays(torch.float32, "few rows")
        assert linear.pays(torch.float32, "many rows") is pays
        assert linear.pays(torch.bfloat16, "many rows")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 5, 9, 70])
def test_logits_are_not_rounded_to_the_type_of_the_weights(rows: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(rows)
    x, weight = (torch.randn(n, 64, generator=generator).to(dtype) for n in (rows, 133))
    found = linear.WideLinear(weight)(x)
    error = (found.double() - x.double() @ weight.double().T).abs().max()
    assert found.dtype == torch.float32
    assert found.shape == (rows, 133)
    rounded = dtype == torch.bfloat16 and not cpu.can_widen(weight)  # this CPU does not multiply bfloat16
    assert error < (0.2 if rounded else 2e-5)


def test_a_rounded_logit_would_be_seen() -> None:
    x, weight = torch.randn(5, 64), torch.randn(133, 64)
    exact = x @ weight.T
    assert (exact.bfloat16().float() - exact).abs().max() > 2e-5


def test_a_wide_product_is_the_same_bits_whatever_rows_are_beside_it() -> None:
    weight = torch.randn(133, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    if not cpu.can_widen(weight):
        pytest.skip("this CPU does not multiply bfloat16")
    x = torch.randn(70, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    product = linear.WideLinear(weight)
    for rows in (8, 16, 40):
        assert torch.equal(product(x[:rows]), product(x)[:rows])
