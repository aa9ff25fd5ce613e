"""The registry's numbers for Prometheus.

Purpose: states, loads, evictions, sleeps, queue and bytes of models that are loaded on demand.
Does not know: how any of it comes about.
Invariant: only ids of registered models become labels, as clients can choose many variants: these are added
up; every model has exactly one state, and every counter from the start (a counter that begins with 1 has no
increase).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import product
from typing import Final

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric

from memory_efficient_gpt_server.registry.effects import UnloadReason
from memory_efficient_gpt_server.registry.owner import Registry
from memory_efficient_gpt_server.registry.records import VariantRecord
from memory_efficient_gpt_server.registry.states import State, liveliest
from memory_efficient_gpt_server.registry.variants import MEASURED_KINDS, Estimate

_EVICTIONS: Final = (UnloadReason.BUDGET, UnloadReason.OVERCOMMIT, UnloadReason.TTL, UnloadReason.ADMIN)
_SLEEPS: Final = (UnloadReason.BUDGET, UnloadReason.OVERCOMMIT, UnloadReason.ADMIN)
_LOAD_RESULTS: Final = ("success", "failure")


def registry_metrics(registry: Registry) -> Iterator[Metric]:
    """All of them."""
    yield _states(registry)
    yield from _loads(registry)
    yield _evictions(registry)
    yield from _sleeps(registry)
    yield from _estimates(registry)
    yield from _queue(registry)
    yield _leases(registry)
    yield from _memory(registry)


def _states(registry: Registry) -> Metric:
    family = GaugeMetricFamily(
        "megpt_model_state",
        "1 for the state of the model's liveliest variant, else 0.",
        labels=["model_name", "state"],
    )
    for model_id in registry.models:
        present = liveliest(record.state for record in _records(registry, model_id))
        for state in State:
            family.add_metric([model_id, state], float(state == present))
    return family


def _records(registry: Registry, model_id: str) -> list[VariantRecord]:
    return [record for key, record in registry.state.records.items() if key.model_id == model_id]


def _loads(registry: Registry) -> Iterator[Metric]:
    loads = CounterMetricFamily(
        "megpt_model_loads", "Loads ended, by result.", labels=["model_name", "result"]
    )
    for model_id, result in product(registry.models, _LOAD_RESULTS):
        loads.add_metric([model_id, result], registry.tally.loads[model_id, result])
    yield loads
    seconds = HistogramMetricFamily(
        "megpt_model_load_seconds", "Time from the start of a load to a ready model.", labels=["model_name"]
    )
    for model_id in registry.models:
        buckets, total = registry.tally.load_s[model_id].cumulative()
        seconds.add_metric([model_id], buckets, total)
    yield seconds


def _estimates(registry: Registry) -> Iterator[Metric]:
    family = GaugeMetricFamily(
        "megpt_model_estimate_error_ratio",
        "By how much the weights and the KV cache of the last load took more than was estimated before it, "
        "as a share; of the variant that is furthest off.",
        labels=["model_name"],
    )
    for model_id in registry.models:
        errors = [_error(r.estimate, r.measured) for r in _records(registry, model_id) if r.measured]
        if errors:
            family.add_metric([model_id], max(errors, key=abs))
    yield family


def _error(estimate: Estimate, measured: Estimate) -> float:
    """Of what is measured: the rest is booked as it was estimated."""
    said, took = (
        sum([n for kind, n in size.by_kind().items() if kind in MEASURED_KINDS])
        for size in (estimate, measured)
    )
    return took / said - 1.0 if said else 0.0


def _queue(registry: Registry) -> Iterator[Metric]:
    yield GaugeMetricFamily(
        "megpt_load_queue_depth", "Requests that wait for a model.", value=len(registry.state.queue)
    )
    seconds = HistogramMetricFamily(
        "megpt_load_queue_wait_seconds",
        "Time that a request waited for a model that was not ready, whatever came of it.",
        labels=["model_name"],
    )
    for model_id in registry.models:
        buckets, total = registry.tally.wait_s[model_id].cumulative()
        seconds.add_metric([model_id], buckets, total)
    yield seconds


def _evictions(registry: Registry) -> Metric:
    family = CounterMetricFamily(
        "megpt_model_evictions",
        "Models unloaded, by reason; failures are loads.",
        labels=["model_name", "reason"],
    )
    for model_id, reason in product(registry.models, _EVICTIONS):
        family.add_metric([model_id, reason], registry.tally.unloads[model_id, reason])
    return family


def _sleeps(registry: Registry) -> Iterator[Metric]:
    sleeps = CounterMetricFamily(
        "megpt_model_sleeps",
        "Models put to sleep instead of being unloaded, by reason.",
        labels=["model_name", "reason"],
    )
    for model_id, reason in product(registry.models, _SLEEPS):
        sleeps.add_metric([model_id, reason], registry.tally.sleeps[model_id, reason])
    yield sleeps
    seconds = HistogramMetricFamily(
        "megpt_model_wake_seconds", "Time from asleep to ready.", labels=["model_name"]
    )
    for model_id in registry.models:
        buckets, total = registry.tally.wake_s[model_id].cumulative()
        seconds.add_metric([model_id], buckets, total)
    yield seconds


def _leases(registry: Registry) -> Metric:
    family = GaugeMetricFamily(
        "megpt_model_leases", "Requests that keep a model loaded.", labels=["model_name"]
    )
    for model_id in registry.models:
        family.add_metric([model_id], sum(len(record.leases) for record in _records(registry, model_id)))
    return family


def _memory(registry: Registry) -> Iterator[Metric]:
    ledger = registry.state.ledger
    budget = GaugeMetricFamily("megpt_memory_budget_bytes", "What models may take.", labels=["device"])
    for device, limits in ledger.budgets.items():
        budget.add_metric([device], limits.total_bytes)
    yield budget
    held = GaugeMetricFamily(
        "megpt_memory_bytes", "What models take, by kind.", labels=["model_name", "device", "kind"]
    )
    sums: Counter[tuple[str, str, str]] = Counter()  # one sample for all variants of a model
    for owner, entries in ledger.entries.items():
        for entry in entries:
            sums[getattr(owner, "model_id", str(owner)), entry.device, entry.kind] += entry.bytes
    for labels, size in sums.items():
        held.add_metric(labels, size)
    yield held
