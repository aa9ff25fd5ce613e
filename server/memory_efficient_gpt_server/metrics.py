"""What Prometheus is told: vLLM's metrics under the prefix `megpt_`.

Purpose: count what passes through the server, and read the engines' own counters when scraped.
Does not know: routes, text.
Invariant: everything is recorded and read on the event loop, so plain numbers do without locks; only ids
of registered models and paths of registered routes become labels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Final

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from memory_efficient_gpt.engine_info import EngineStats
from memory_efficient_gpt_server.admission import Admission
from memory_efficient_gpt_server.counters import total
from memory_efficient_gpt_server.histogram import Histogram
from memory_efficient_gpt_server.models import ModelCatalog
from memory_efficient_gpt_server.registry_metrics import registry_metrics

TTFT_BUCKETS: Final = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0,
    80.0, 160.0, 640.0, 2560.0,
)  # fmt: skip
ITL_BUCKETS: Final = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)  # fmt: skip
E2E_BUCKETS: Final = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0,
    960.0, 1920.0, 7680.0,
)  # fmt: skip
TOKEN_BUCKETS: Final = tuple(
    float(m * 10**e) for e in range(6) for m in (1, 2, 5) if m * 10**e <= 200_000
)  # 1 2 5 10 .. 200000


class ModelMetrics:
    """What the server itself measures of one model."""

    def __init__(self) -> None:
        self.ttft = Histogram(TTFT_BUCKETS)
        self.itl = Histogram(ITL_BUCKETS)
        self.e2e = Histogram(E2E_BUCKETS)
        self.prompt_tokens = Histogram(TOKEN_BUCKETS)
        self.generation_tokens = Histogram(TOKEN_BUCKETS)
        self.finished: Counter[str] = Counter()


_HISTOGRAMS: Final = (
    ("time_to_first_token_seconds", "Time from a request's arrival to its first token.", "ttft"),
    ("inter_token_latency_seconds", "Time between tokens of a sequence.", "itl"),
    ("e2e_request_latency_seconds", "Time from a request's arrival to its end.", "e2e"),
    ("request_prompt_tokens", "Prompt tokens of a request.", "prompt_tokens"),
    ("request_generation_tokens", "Tokens generated for a request.", "generation_tokens"),
)
_ENGINE_GAUGES: Final[tuple[tuple[str, str, Callable[[EngineStats], float]], ...]] = (
    ("num_requests_running", "Sequences being computed.", lambda s: s.num_running),
    ("num_requests_waiting", "Sequences waiting for room.", lambda s: s.num_waiting),
    (
        "kv_cache_usage_perc",
        "Share of the KV cache in use (1 is all).",
        lambda s: 1 - s.num_free_blocks / s.num_kv_blocks if s.num_kv_blocks else 0.0,
    ),
    ("kv_cache_cached_blocks", "KV blocks kept for the prefix cache.", lambda s: s.num_cached_blocks),
)
_ENGINE_COUNTERS: Final[tuple[tuple[str, str, Callable[[EngineStats], float]], ...]] = (
    ("prompt_tokens", "Prompt tokens processed.", lambda s: s.prompt_tokens),
    ("generation_tokens", "Tokens generated.", lambda s: s.generated_tokens),
    (
        "prefix_cache_queries",
        "Prompt tokens looked up in the prefix cache.",
        lambda s: s.prefix_queries_tokens,
    ),
    ("prefix_cache_hits", "Prompt tokens found in the prefix cache.", lambda s: s.prefix_hits_tokens),
    ("num_preemptions", "Sequences preempted by the engine.", lambda s: s.num_preemptions),
    ("engine_steps", "Steps of the engine.", lambda s: s.steps),
    ("engine_step_seconds", "Time spent in steps.", lambda s: s.step_seconds),
    (
        "engine_host_seconds",
        "Time of steps outside the model: planning, laying out, handing on results.",
        lambda s: s.host_seconds,
    ),
)


class Metrics(Collector):
    """All numbers of this server. `expose` renders them."""

    def __init__(self, catalog: ModelCatalog, admission: Admission) -> None:
        self._catalog = catalog
        self._admission = admission
        self._models: dict[str, ModelMetrics] = {}
        self._http: Counter[tuple[str, str, int]] = Counter()
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def of(self, model_id: str) -> ModelMetrics:
        """The numbers of a registered model."""
        return self._models.setdefault(model_id, ModelMetrics())

    def count_http(self, route: str, method: str, status: int) -> None:
        """An HTTP request has been answered (499: the client left first)."""
        self._http[route, method, status] += 1

    def expose(self) -> bytes:
        """Prometheus' text format."""
        return generate_latest(self._registry)

    def describe(self) -> Iterable[Metric]:
        """Nothing: registration must not read engines."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """Everything, for prometheus_client."""
        yield from self._model_histograms()
        yield from self._engine_metrics()
        yield self._finished()
        yield self._states()
        yield self._http_requests()
        yield _gauge("admitted_sequences", "Sequences admitted and not finished.", self._admission.sequences)
        yield _gauge("admitted_tokens", "Tokens admitted and not finished.", self._admission.tokens)
        if self._catalog.registry is not None:
            yield from registry_metrics(self._catalog.registry)

    def _model_histograms(self) -> Iterator[Metric]:
        for name, text, attribute in _HISTOGRAMS:
            family = HistogramMetricFamily(f"megpt_{name}", text, labels=["model_name"])
            for model in self._catalog:
                buckets, total = getattr(self.of(model.id), attribute).cumulative()
                family.add_metric([model.id], buckets, total)
            yield family

    def _engine_metrics(self) -> Iterator[Metric]:
        for name, text, read in _ENGINE_GAUGES:
            gauge = GaugeMetricFamily(f"megpt_{name}", text, labels=["model_name"])
            for model in self._catalog:
                gauge.add_metric([model.id], read(total(engine.stats for engine in model.engines)))
            yield gauge
        for name, text, read in _ENGINE_COUNTERS:
            counter = CounterMetricFamily(f"megpt_{name}", text, labels=["model_name"])
            for model in self._catalog:
                lives = [stats for e in model.engines for stats in (e.ended_stats, e.stats)]
                counter.add_metric([model.id], read(total(lives)))  # restarts must not make it fall
            yield counter

    def _finished(self) -> Metric:
        family = CounterMetricFamily(
            "megpt_request_success",
            "Sequences finished, by reason.",
            labels=["model_name", "finished_reason"],
        )
        for model in self._catalog:
            for reason, count in sorted(self.of(model.id).finished.items()):
                family.add_metric([model.id, reason], count)
        return family

    def _states(self) -> Metric:
        family = GaugeMetricFamily(
            "megpt_model_ready", "1 if the model takes requests.", labels=["model_name"]
        )
        for model in self._catalog:
            family.add_metric([model.id], float(model.ready))
        return family

    def _http_requests(self) -> Metric:
        family = CounterMetricFamily(
            "megpt_http_requests", "HTTP requests answered.", labels=["route", "method", "status"]
        )
        for (route, method, status), count in sorted(self._http.items()):
            family.add_metric([route, method, str(status)], count)
        return family


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"megpt_{name}", text, value=value)
