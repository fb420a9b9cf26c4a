"""Figures for Prometheus. What the engine counts is asked of it; what a request's way tells is observed here."""

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from ktransformers.engine.requests import Load

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_BETWEEN = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5, 5)

_GAUGES = {
    "running": ("kt_running", "Answers that get tokens at every step"),
    "waiting": ("kt_waiting", "Requests whose prompt is not computed yet"),
    "cache_bytes": ("kt_cache_bytes", "Bytes of keys and values that are kept"),
    "cache_limit": ("kt_cache_limit_bytes", "Most bytes of keys and values"),
}
_COUNTERS = {
    "prompt_tokens": ("kt_prompt_tokens", "Tokens of prompts that were computed"),
    "cached_tokens": ("kt_cached_tokens", "Tokens of prompts that were in a cache"),
    "new_tokens": ("kt_new_tokens", "Tokens of answers"),
    "preemptions": ("kt_preemptions", "Answers that gave up their memory for a while"),
    "steps": ("kt_steps", "Steps of the engine"),
}
"""Field of Load -> name and meaning."""


class _Engine:
    """Asks for the engine's load when the figures are asked for."""

    def __init__(self, load: Callable[[], Load | None]) -> None:
        self._load = load

    def collect(self) -> Iterator[Metric]:
        load = self._load()
        if load is None:
            return
        for field, (name, meaning) in _GAUGES.items():
            yield GaugeMetricFamily(name, meaning, value=getattr(load, field))
        for field, (name, meaning) in _COUNTERS.items():
            yield CounterMetricFamily(name, meaning, value=getattr(load, field))


class Metrics:
    """The figures of one server. `load`: the engine's, None while there is no engine."""

    def __init__(self, load: Callable[[], Load | None]) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_Engine(load))
        self.requests = Counter(
            "kt_requests", "Requests that were answered", ["endpoint", "status"], registry=self._registry
        )
        self.seconds = Histogram(
            "kt_request_seconds", "Time of a request", ["endpoint"], buckets=_SECONDS, registry=self._registry
        )
        self.first = Histogram(
            "kt_time_to_first_token_seconds", "Time to an answer's first token, waiting included",
            buckets=_SECONDS, registry=self._registry,
        )  # fmt: skip
        self.between = Histogram(
            "kt_inter_token_seconds", "Time from a token of an answer to its next", buckets=_BETWEEN,
            registry=self._registry,
        )  # fmt: skip
        self.cancelled = Counter("kt_cancelled", "Requests ended early, by reason", ["reason"], registry=self._registry)

    def text(self) -> bytes:
        """In the format that Prometheus reads."""
        return generate_latest(self._registry)
