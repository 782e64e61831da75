"""Metrics for Prometheus. Labels never contain client data."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from admtrt import __version__

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from prometheus_client.core import Metric

    from admtrt.serve.engine import Engine

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_STEP_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_COUNTS = {
    "accepted": "Requests let in",
    "done": "Requests drawn",
    "cancelled": "Requests whose client left",
    "expired": "Requests whose time was over",
    "fault": "Requests that the backend could not compute",
    "cut": "Requests that a stop cut off",
    "refused": "Requests whose samples were not finite",
    "steps": "Steps of the engine",
    "rows": "Rows of all steps",
    "padded_rows": "Rows that filled batches up",
    "previews": "Previews made",
}
_REASONS = ("queue_full", "client_share", "deadline", "draining", "not_ready")


class Metrics:
    """The metrics of a server."""

    def __init__(self, engines: Mapping[str, Engine]) -> None:
        self._registry = CollectorRegistry()
        self.requests = Counter(
            "admtrt_requests", "Answers by route and status", ["route", "code"], registry=self._registry
        )
        labels = ["model"]
        self.request_seconds = Histogram(
            "admtrt_request_seconds", "From admission to the last image", labels, buckets=_SECONDS,
            registry=self._registry,
        )  # fmt: skip
        self.queue_seconds = Histogram(
            "admtrt_queue_seconds", "From admission to the first step", labels, buckets=_SECONDS,
            registry=self._registry,
        )  # fmt: skip
        self.step_seconds = Histogram(
            "admtrt_step_seconds",
            "Of a step",
            [*labels, "size"],
            buckets=_STEP_SECONDS,
            registry=self._registry,
        )
        self._engines = engines
        self._registry.register(self)

    def collect(self) -> Iterator[Metric]:
        """Collect the engines' counters; called by the library."""
        info = GaugeMetricFamily("admtrt_build_info", "Version", labels=["version"])
        info.add_metric([__version__], 1)
        yield info
        for name, text in _COUNTS.items():
            family = CounterMetricFamily(f"admtrt_{name}", text, labels=["model"])
            for model, engine in self._engines.items():
                family.add_metric([model], engine.counts[name])
            yield family
        refusals = CounterMetricFamily(
            "admtrt_not_admitted", "Requests not let in", labels=["model", "reason"]
        )
        gauges = {
            "ready": "Whether requests are taken",
            "requests_in_flight": "Requests that are in",
            "rows_waiting": "Rows that have not begun",
            "row_steps_ahead": "Row-steps that are to come",
            "cap": "Most rows of a step",
            "busy_seconds": "Seconds in steps",
            "graph_seconds": "Seconds in graphs",
        }
        families = {
            name: GaugeMetricFamily(f"admtrt_{name}", gauges[name], labels=["model"]) for name in gauges
        }
        for model, engine in self._engines.items():
            for reason in _REASONS:
                refusals.add_metric([model, reason], engine.counts[f"refused_{reason}"])
            rows = [row for flight in engine.flights for row in flight.rows]
            values = {
                "ready": float(engine.ready),
                "requests_in_flight": len(engine.flights),
                "rows_waiting": sum(row.done == 0 for row in rows),
                "row_steps_ahead": sum(row.flight.total - row.done for row in rows),
                "cap": engine.stations[0].sizes.cap if engine.stations else 0,
                "busy_seconds": engine.busy,
                "graph_seconds": engine.graph_seconds,
            }
            for gauge, value in values.items():
                families[gauge].add_metric([model], value)
        yield refusals
        yield from families.values()

    def text(self) -> bytes:
        """The metrics in Prometheus' text format."""
        return generate_latest(self._registry)
