"""Numbers for Prometheus: of the calls, and of the engine at the moment it is asked."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from rankfold.serve.engine import Engine

_FIRST = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_NEXT = (0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)


class Metrics:
    """What /metrics shows. Nothing in it is named by a client: no labels of adapters, no raw paths."""

    def __init__(self, engine: Engine):
        self._registry = registry = CollectorRegistry()
        self.requests = Counter("rankfold_requests", "HTTP requests", ["path", "status"], registry=registry)
        self.seconds = Histogram("rankfold_request_seconds", "From request to end", ["path"], registry=registry)
        self.prompt_tokens = Counter("rankfold_prompt_tokens", "Tokens of accepted prompts", registry=registry)
        self.tokens = Counter("rankfold_generated_tokens", "Tokens that were made", registry=registry)
        self.first_token = Histogram(
            "rankfold_time_to_first_token_seconds", "From request to first token", buckets=_FIRST, registry=registry
        )
        self.next_token = Histogram(
            "rankfold_time_per_token_seconds", "From one token to the next", buckets=_NEXT, registry=registry
        )
        registry.register(_Stats(engine))

    def text(self) -> bytes:
        return generate_latest(self._registry)


class _Stats(Collector):
    """The engine's own numbers, by `Engine.stats`."""

    def __init__(self, engine: Engine):
        self._engine = engine

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        stats = self._engine.stats()
        for name, of, help_ in (
            ("running_requests", "running", "Requests in the batch"),
            ("waiting_requests", "waiting", "Requests that wait"),
            ("pool_adapters", "adapters_in_pool", "Adapters in the pool"),
        ):
            yield GaugeMetricFamily(f"rankfold_{name}", help_, stats[of])
        pages = GaugeMetricFamily("rankfold_pages", "Pages of the pool, by what is in them", labels=["of"])
        pages.add_metric(["free"], stats["pages"] - stats["pages_used"])
        for of in ("tokens", "adapters"):
            pages.add_metric([of], stats[f"pages_{of}"])
        yield pages
        for name, of, help_ in (
            ("steps", "steps", "Forwards of the model"),
            ("rows", "rows", "Tokens that went through the model"),
            ("trained_tokens", "trained", "Tokens that fine-tuning jobs took"),
            ("trained_beside_tokens", "trained_beside", "Those of them that went through the model with requests"),
            ("adapter_reads", "adapters_reads", "Adapters read from disk"),
            ("adapter_loads", "adapters_placed", "Adapters brought into the pool"),
            ("adapter_evictions", "adapters_evicted", "Adapters that left the pool"),
        ):
            yield CounterMetricFamily(f"rankfold_{name}", help_, stats[of])
