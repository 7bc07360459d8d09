"""Position tables that a model keeps are its own, whoever asked for them first."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

import tiny
from promptmux_server.backbone.assemble import assemble
from promptmux_server.backbone.encoder import EncoderRow
from promptmux_server.backbone.model import OFA

SOURCE = (0, 7, 9, 11, 2)


def fresh() -> OFA:
    return assemble(tiny.backbone(), dtype=torch.float32)


@torch.no_grad()
def states(model: OFA) -> Tensor:
    image = model.image_tokens(torch.linspace(-1, 1, 3 * 64 * 64).view(1, 3, 64, 64))[0]
    return model.teach([SOURCE[:-1]], model.remember(model.encode([EncoderRow(SOURCE, image)])))


def behind_autocast() -> Tensor:
    """What a model computes in float32 that has computed the same under autocast before."""
    model = fresh()
    with torch.autocast("cpu", torch.bfloat16):
        rounded = states(model)
    found = states(model)
    assert not torch.equal(rounded.float(), found)
    return found


def test_tables_built_under_autocast_are_those_of_a_model_that_never_rounded() -> None:
    assert torch.equal(behind_autocast(), states(fresh()))


def test_without_leaving_autocast_they_would_not_be(monkeypatch: pytest.MonkeyPatch) -> None:
    expected, autocast = states(fresh()), torch.autocast

    def never_left(kind: str, dtype: torch.dtype | None = None, *, enabled: bool = True) -> object:
        return autocast(kind, dtype) if enabled else nullcontext()

    monkeypatch.setattr(torch, "autocast", never_left)
    assert not torch.equal(behind_autocast(), expected)
