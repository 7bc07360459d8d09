"""Prometheus metrics, on a registry of their own. Labels come from closed sets: routes, error codes, and tasks.

Of these, the first `MAX_TASKS` that are asked: each is some ninety series, and a scrape is to stay below 1 MB.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.types import Scope

from promptmux_server.engine.request import EnginePort, PromptPoolStats

BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
OTHER = "other"
MAX_TASKS = 64


class Metrics:
    """What the server counts; `registry` is what /metrics shows."""

    def __init__(self, engine: EnginePort) -> None:
        self.registry = CollectorRegistry()
        self._engine = engine
        self._http = Counter(
            "promptmux_http_requests", "Answers by route and status.", ["route", "status"], registry=self.registry
        )
        self._latency = Histogram(
            "promptmux_http_request_seconds", "Time to answer.", ["route"], buckets=BUCKETS_S, registry=self.registry
        )
        self._items = Counter(
            "promptmux_items", "Items answered, by task and outcome.", ["task", "outcome"], registry=self.registry
        )
        self._stages = Histogram(
            "promptmux_item_stage_seconds",
            "Time of an item in each stage.",
            ["task", "stage"],
            buckets=BUCKETS_S,
            registry=self.registry,
        )
        self._publishes = Counter(
            "promptmux_prompt_publishes", "Publications, by outcome.", ["outcome"], registry=self.registry
        )
        self._tasks: set[str] = set()
        """Those that are labels of their own."""
        self.registry.register(_LoadCollector(engine))

    def http(self, scope: Scope, status: int, seconds: float) -> None:
        """Count one answer."""
        route = route_of(scope)
        self._http.labels(route, str(status)).inc()
        self._latency.labels(route).observe(seconds)

    def item(self, task: str, outcome: str, timings_ms: Mapping[str, float]) -> None:
        """Count one item: `outcome` is "ok" or an error code; names that are not served count as one task."""
        label = self._label(task)
        self._items.labels(label, outcome).inc()
        for stage, milliseconds in timings_ms.items():
            self._stages.labels(label, stage).observe(milliseconds / 1000.0)

    def published(self, outcome: str) -> None:
        """Count one publication: `outcome` is "ok", "unchanged" or an error code."""
        self._publishes.labels(outcome).inc()

    def _label(self, task: str) -> str:
        if task not in self._tasks:
            if len(self._tasks) == MAX_TASKS or self._engine.inputs(task) is None:
                return OTHER
            self._tasks.add(task)
        return task


def route_of(scope: Scope) -> str:
    """The template of the route that matched; every path that is no route counts as one, `other`."""
    return getattr(scope.get("route"), "path", OTHER)


class _LoadCollector(Collector):
    """The engine's load, asked for when /metrics is read."""

    def __init__(self, engine: EnginePort) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        load = self._engine.load()
        yield GaugeMetricFamily("promptmux_num_requests_waiting", "Items in the queue.", value=load.waiting)
        yield GaugeMetricFamily("promptmux_num_requests_running", "Items in the running batch.", value=load.running)
        images = load.images
        yield GaugeMetricFamily("promptmux_image_cache_pictures", "Pictures kept.", value=images.pictures)
        yield CounterMetricFamily("promptmux_image_cache_hits", "Pictures found at admission.", value=images.hits)
        yield CounterMetricFamily(
            "promptmux_image_cache_misses", "Pictures not found at admission.", value=images.misses
        )
        used = GaugeMetricFamily("promptmux_memory_used_bytes", "Handed out, by memory.", labels=["memory"])
        budget = GaugeMetricFamily("promptmux_memory_budget_bytes", "The most there is, by memory.", labels=["memory"])
        for name, account in load.budgets.items():
            used.add_metric([name], account.used_bytes)
            budget.add_metric([name], account.budget_bytes)
        yield used
        yield budget
        errors = GaugeMetricFamily(
            "promptmux_cost_model_error_ratio", "|predicted - measured| / measured of a pass.", labels=["stage"]
        )
        for stage, ratio in load.cost_errors.items():
            errors.add_metric([stage], ratio)
        yield errors
        yield from _prompt_metrics(load.prompts)
        names = load.registry
        yield GaugeMetricFamily("promptmux_prompts_registered", "Names that are served.", value=names.names)
        yield GaugeMetricFamily("promptmux_prompts_quarantined", "Names known and not served.", value=names.quarantined)
        yield CounterMetricFamily(
            "promptmux_prompt_nonfinite_rollbacks", "Versions taken back for their numbers.", value=names.rolled_back
        )


def _prompt_metrics(prompts: PromptPoolStats) -> Iterator[Metric]:
    gauges: dict[str, tuple[float, str]] = {
        "resident": (prompts.resident, "Prompts on the device."),
        "waiting": (prompts.waiting, "Items whose prompt is not on the device yet."),
    }
    counters: dict[str, tuple[float, str]] = {
        "loads": (prompts.loads, "Prompts brought to the device."),
        "evictions": (prompts.evictions, "Prompts that left the device to make room."),
        "wait_seconds": (prompts.wait_s, "Time that items have waited for their prompts."),
    }
    for name, (value, text) in gauges.items():
        yield GaugeMetricFamily(f"promptmux_prompt_{name}", text, value=value)
    for name, (value, text) in counters.items():
        yield CounterMetricFamily(f"promptmux_prompt_{name}", text, value=value)
