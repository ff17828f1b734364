"""Figures for Prometheus. The names are vLLM's, with our prefix, so that its dashboards serve here too."""

from bisect import bisect_left
from collections.abc import Iterable
from itertools import accumulate

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, HistogramMetricFamily, Metric

from receptance.server.served import Models

SECONDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 30.0, 60.0)
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    def __init__(self, models: Models):
        self.registry = CollectorRegistry()
        labels = ["model_name"]

        def counter(name: str, text: str, more: Iterable[str] = ()) -> Counter:
            return Counter(f"receptance:{name}", text, [*labels, *more], registry=self.registry)

        def histogram(name: str, text: str) -> Histogram:
            return Histogram(f"receptance:{name}", text, labels, buckets=SECONDS, registry=self.registry)

        self._prompt = counter("prompt_tokens_total", "Tokens of prompts.")
        self._written = counter("generation_tokens_total", "Tokens that were written.")
        self._queries = counter("prefix_cache_queries_total", "Tokens of prompts that were looked up in the cache.")
        self._hits = counter("prefix_cache_hits_total", "Tokens of prompts that were not read again.")
        self._success = counter("request_success_total", "Texts that ended.", ["finished_reason"])
        self._first = histogram("time_to_first_token_seconds", "From the request to its first token.")
        self._between = _Between()
        self._whole = histogram("e2e_request_latency_seconds", "From the request to its end.")
        self.http = Counter("receptance:http_requests_total", "Answers.", ["method", "status"], registry=self.registry)
        self.connections = Gauge("receptance:http_requests_active", "Requests under way.", registry=self.registry)
        self.registry.register(_Load(models))
        self.registry.register(self._between)

    def first_token(self, model: str, seconds: float) -> None:
        self._first.labels(model).observe(seconds)

    def between_tokens(self, model: str, seconds: float) -> None:
        self._between.observe(model, seconds)

    def finished(self, model: str, reasons: list[str], prompt: int, cached: int, written: int, seconds: float) -> None:
        self._prompt.labels(model).inc(prompt)
        self._queries.labels(model).inc(prompt)
        self._hits.labels(model).inc(cached)
        self._written.labels(model).inc(written)
        self._whole.labels(model).observe(seconds)
        for reason in reasons:
            self._success.labels(model, reason).inc()

    def render(self) -> bytes:
        return generate_latest(self.registry)


class _Between:
    """A histogram of one thread, without locks: it is told of every token."""

    def __init__(self) -> None:
        self._counts: dict[str, list[int]] = {}
        self._sums: dict[str, float] = {}

    def observe(self, model: str, seconds: float) -> None:
        if model not in self._counts:
            self._counts[model], self._sums[model] = [0] * (len(SECONDS) + 1), 0.0
        self._counts[model][bisect_left(SECONDS, seconds)] += 1
        self._sums[model] += seconds

    def describe(self) -> Iterable[Metric]:
        return []

    def collect(self) -> Iterable[Metric]:
        family = HistogramMetricFamily(
            "receptance:inter_token_latency_seconds", "Between two tokens of a text.", labels=["model_name"]
        )
        names = [*map(str, SECONDS), "+Inf"]
        for model, counts in self._counts.items():
            family.add_metric([model], list(zip(names, accumulate(counts))), self._sums[model])
        return [family]


class _Load:
    """Read when somebody asks."""

    def __init__(self, models: Models):
        self._models = models

    def describe(self) -> Iterable[Metric]:
        return []

    def collect(self) -> Iterable[Metric]:
        running = GaugeMetricFamily(
            "receptance:num_requests_running", "Texts being read or written.", labels=["model_name"]
        )
        waiting = GaugeMetricFamily("receptance:num_requests_waiting", "Texts that wait.", labels=["model_name"])
        for model in self._models:
            now, later = model.engine.load
            running.add_metric([model.name], now)
            waiting.add_metric([model.name], later)
        return [running, waiting]
