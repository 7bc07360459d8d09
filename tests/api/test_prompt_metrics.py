"""Where prompts are, as /metrics says it."""

from __future__ import annotations

import pytest

from api.fake_engine import FakeEngine
from promptmux_server.api.metrics import Metrics
from promptmux_server.engine.request import Budget, EngineLoad, ImageCacheStats, PromptPoolStats

STATS = PromptPoolStats(resident=5, waiting=6, loads=7, evictions=8, wait_s=9.5)
BUDGETS = {"decode_cache": Budget(1, 2), "prompts_host": Budget(3, 4)}
NAMES = {
    "resident": "resident",
    "waiting": "waiting",
    "loads": "loads_total",
    "evictions": "evictions_total",
    "wait_s": "wait_seconds_total",
}


class Loaded(FakeEngine):
    def load(self) -> EngineLoad:
        return EngineLoad(0, 0, ImageCacheStats(), prompts=STATS, budgets=BUDGETS)


@pytest.mark.parametrize("field", NAMES)
def test_every_account_of_the_prompts_is_a_metric(field: str) -> None:
    registry = Metrics(Loaded()).registry
    assert registry.get_sample_value(f"promptmux_prompt_{NAMES[field]}") == getattr(STATS, field)


@pytest.mark.parametrize("memory", BUDGETS)
def test_every_memory_shows_what_is_used_and_what_there_is(memory: str) -> None:
    registry, budget = Metrics(Loaded()).registry, BUDGETS[memory]
    labels = {"memory": memory}
    assert registry.get_sample_value("promptmux_memory_used_bytes", labels) == budget.used_bytes
    assert registry.get_sample_value("promptmux_memory_budget_bytes", labels) == budget.budget_bytes
