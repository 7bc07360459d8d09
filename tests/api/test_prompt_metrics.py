"""Where prompts are, as /metrics says it."""

from __future__ import annotations

from dataclasses import fields

import pytest

from api.fake_engine import FakeEngine
from promptmux_server.api.metrics import Metrics
from promptmux_server.engine.request import EngineLoad, ImageCacheStats, PromptPoolStats

STATS = PromptPoolStats(
    device_bytes=1,
    device_budget_bytes=2,
    host_bytes=3,
    host_budget_bytes=4,
    resident=5,
    waiting=6,
    loads=7,
    evictions=8,
    wait_s=9.5,
)
NAMES = {"loads": "loads_total", "evictions": "evictions_total", "wait_s": "wait_seconds_total"}


class Loaded(FakeEngine):
    def load(self) -> EngineLoad:
        return EngineLoad(0, 0, ImageCacheStats(), prompts=STATS)


@pytest.mark.parametrize("field", [field.name for field in fields(PromptPoolStats)])
def test_every_account_of_the_prompts_is_a_metric(field: str) -> None:
    registry = Metrics(Loaded()).registry
    assert registry.get_sample_value(f"promptmux_prompt_{NAMES.get(field, field)}") == getattr(STATS, field)
