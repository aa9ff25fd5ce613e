"""A model of the registry and its variants as JSON objects.

Purpose: what administrators see of one model.
Does not know: HTTP.
Invariant: sizes are bytes, times seconds; what is not known is null.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from memory_efficient_gpt_server.registry.kv_room import kv_bytes
from memory_efficient_gpt_server.registry.ledger import Ledger
from memory_efficient_gpt_server.registry.owner import Registry
from memory_efficient_gpt_server.registry.records import VariantRecord
from memory_efficient_gpt_server.registry.states import HAS_PROCESS, State
from memory_efficient_gpt_server.registry.variants import Estimate, VariantKey


def model_view(registry: Registry, key: VariantKey) -> dict[str, Any]:
    """A registered model: the facts of the variant `key`, its settings, and all its variants in short.

    Raises ModelNotFoundError.
    """
    model, entry = registry.hosted(key.model_id), registry.entry(key.model_id)
    return {
        "id": model.id,
        "aliases": list(entry.aliases),
        **variant_view(registry, key),
        "pinned": entry.pins(key),
        "ttl_s": entry.ttl_s,
        "min_residency_s": entry.min_residency_s,
        "priority": entry.priority,
        "kv_soft_limit_bytes": entry.kv_soft_limit_bytes,
        "kv_hard_limit_bytes": entry.kv_hard_limit_bytes,
        "load": "start" if model.at_start and key == model.key else "on_demand",
        "any_variant": model.choices.any,
        "variants": [variant_view(registry, variant) for variant in registry.variants(model.id)],
    }


def variant_view(registry: Registry, key: VariantKey) -> dict[str, Any]:
    """One variant. quantization, kv_cache_dtype: what is special about it; null: as configured."""
    record, engine, pid = registry.record(key), registry.engine(key), registry.pid(key)
    life = None if record is None else record.life
    return {
        "variant": str(key),
        "quantization": key.quantization,
        "kv_cache_dtype": None if key.kv_cache_dtype == "auto" else key.kv_cache_dtype,
        "state": engine.state,
        "reason": engine.reason,
        "state_age_s": None if life is None else registry.age_s(life.since_s),
        "retry_in_s": None if life is None or life.retry_at_s is None else -registry.age_s(life.retry_at_s),
        "idle_s": None if record is None else _idle_s(registry, record),
        "leases": 0 if record is None else len(record.leases),
        "waiting": len(registry.state.queue.of(key)),
        "estimated_bytes": None if record is None else _sizes(record.estimate) or None,
        "measured_bytes": None if record is None else _measured_sizes(registry.state.ledger, record),
        "kv_bytes": kv_bytes(registry.state.ledger, key),
        "kv_least_bytes": None if record is None else record.needs.kv_least_bytes,
        "kv_most_bytes": None if record is None else record.needs.kv_most_bytes,
        "process_rss_bytes": None if pid is None else _rss_bytes(pid),
        "last_load_s": None if record is None else record.timings.load_s,
        "last_unload_s": None if record is None else record.timings.unload_s,
        "last_wake_s": None if record is None else record.timings.wake_s,
        "can_sleep": None if record is None else record.needs.can_sleep,
    }


def _idle_s(registry: Registry, record: VariantRecord) -> float | None:
    """None while it is used, and before it was loaded for the first time."""
    never = record.timings.load_s is None
    return None if record.leases or never else registry.age_s(record.last_used_s)


def _measured_sizes(ledger: Ledger, record: VariantRecord) -> dict[str, int] | None:
    """While it is loaded: what it took then, with the KV memory that it has now. Asleep: what it has kept."""
    measured = record.measured
    if measured is None or record.state not in HAS_PROCESS or record.state is State.LOADING:
        return None
    if record.state is State.ASLEEP:
        return {str(e.kind): e.bytes for e in ledger.of(record.key)}
    if record.state in (State.READY, State.DRAINING):
        measured = replace(measured, kv_bytes=kv_bytes(ledger, record.key))
    return _sizes(measured)


def _sizes(estimate: Estimate) -> dict[str, int]:
    return {str(kind): size for kind, size in estimate.by_kind().items()}


def _rss_bytes(pid: int) -> int | None:
    """What a process has in RAM, pages shared with others included; None where /proc does not tell."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return None
    found = [line for line in status.splitlines() if line.startswith("VmRSS:")]
    return int(found[0].split()[1]) * 1024 if found else None
