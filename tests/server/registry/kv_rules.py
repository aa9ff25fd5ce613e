"""Rules about KV memory that the auditor checks, as functions of the registry's states.

Purpose: what a variant may have, and what idle ones could have given.
Does not know: events, how the registry decides.
Invariant: the first broken rule raises AssertionError.
"""

from __future__ import annotations

from collections import Counter

from memory_efficient_gpt_server.registry.kv_room import kv_bytes, spare_bytes
from memory_efficient_gpt_server.registry.records import RegistryState, VariantRecord
from memory_efficient_gpt_server.registry.variants import VariantKey


def beyond_limit(state: RegistryState, record: VariantRecord) -> int:
    """KV bytes above what a variant may have, as this file counts them."""
    hard, least = state.entries[record.key.model_id].kv_hard_limit_bytes, record.needs.kv_least_bytes
    if hard is None or least is None:
        return 0
    return kv_bytes(state.ledger, record.key) - max(hard, least)


def at_limit(state: RegistryState, record: VariantRecord) -> bool:
    """Whether it has as much as its hard limit allows."""
    limited = state.entries[record.key.model_id].kv_hard_limit_bytes is not None
    return limited and record.needs.kv_least_bytes is not None and beyond_limit(state, record) == 0


def check_spared(key: VariantKey, old: RegistryState, new: RegistryState) -> None:
    """Nobody was evicted while idle models could give as many KV bytes as that frees."""
    spare: Counter[str] = Counter()
    for record in new.records.values():
        if not record.leases:
            spare[record.needs.device] += spare_bytes(new, record)
    held = {d: old.ledger.held_bytes(key, d) for d in new.ledger.budgets}
    assert any(size > spare[d] for d, size in held.items()), f"{key} left though {spare} could be given"
