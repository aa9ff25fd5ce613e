"""KV memory that wanders from idle models to busy ones without a reload.

Purpose: who may have more, and who gives it.
Does not know: how pages are mapped.
Invariant: bytes are booked for the taker before it may map them, and stay booked for the giver until it has
unmapped them; a giver is idle and keeps its soft limit, a taker stays below its hard limit.
"""

from __future__ import annotations

from memory_efficient_gpt_server.registry.draft import Draft
from memory_efficient_gpt_server.registry.effects import GrowKv, MoveKv
from memory_efficient_gpt_server.registry.records import VariantRecord
from memory_efficient_gpt_server.registry.states import State
from memory_efficient_gpt_server.registry.variants import Kind, VariantKey


def want_kv(draft: Draft, key: VariantKey, wanted_bytes: int) -> None:
    """Give a ready variant free bytes, then have idle models on its device give theirs.

    Free bytes are for loads while any load waits.
    """
    record = draft.records.get(key)
    if record is None or record.state is not State.READY or wanted_bytes <= 0:
        return
    hard = draft.entries[key.model_id].kv_hard_limit_bytes
    if hard is not None:
        wanted_bytes = min(wanted_bytes, hard - draft.kind_bytes(key, Kind.KV))
    device = record.needs.device
    free = 0 if draft.queue.groups else draft.ledger.available_bytes(device)
    taken = min(wanted_bytes, free)
    if taken > 0:
        draft.ledger = draft.ledger.grow(key, device, Kind.KV, taken)
        draft.effects.append(GrowKv(key, taken))
        wanted_bytes -= taken
    givers = [r for r in draft.records.values() if r.key != key and _gives(r, device)]
    for giver in sorted(givers, key=lambda r: r.last_used_s):
        size = min(wanted_bytes, _spare_bytes(draft, giver))
        if size > 0:
            draft.effects.append(MoveKv(giver.key, key, size))
            wanted_bytes -= size


def kv_moved(draft: Draft, source: VariantKey, target: VariantKey | None, size: int) -> None:
    """Book what has happened. A side that was unloaded meanwhile has nothing to give or to keep."""
    giver = draft.records.get(source)
    given = min(size, draft.kind_bytes(source, Kind.KV))
    if giver is not None and given > 0:
        draft.ledger = draft.ledger.grow(source, giver.needs.device, Kind.KV, -given)
    taker = draft.records.get(target) if target is not None else None
    if taker is not None and taker.state in (State.READY, State.DRAINING):
        draft.ledger = draft.ledger.grow(taker.key, taker.needs.device, Kind.KV, size)


def _gives(record: VariantRecord, device: str) -> bool:
    return record.state is State.READY and not record.leases and record.needs.device == device


def _spare_bytes(draft: Draft, giver: VariantRecord) -> int:
    kept = draft.entries[giver.key.model_id].kv_soft_limit_bytes
    return 0 if kept is None else draft.kind_bytes(giver.key, Kind.KV) - kept
