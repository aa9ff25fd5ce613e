"""How much KV memory each model could give away or take: reads, changes nothing.

Purpose: the arithmetic that planning, victims and kv_sharing have in common.
Does not know: who wants memory; effects.
Invariant: bytes that are promised already (`giving`) are nobody's to give again.
"""

from __future__ import annotations

from collections.abc import Mapping

from memory_efficient_gpt_server.registry.ledger import Ledger
from memory_efficient_gpt_server.registry.records import RegistryView, VariantRecord
from memory_efficient_gpt_server.registry.states import State
from memory_efficient_gpt_server.registry.variants import Kind, VariantKey


def kv_bytes(ledger: Ledger, key: VariantKey) -> int:
    """KV bytes that are booked for a variant."""
    return sum([e.bytes for e in ledger.of(key) if e.kind is Kind.KV])


def kv_limit_bytes(view: RegistryView, key: VariantKey) -> int:
    """What its worker may have mapped: what is booked, without what it is giving."""
    record = view.records.get(key)
    giving = 0 if record is None or record.giving is None else record.giving.bytes
    return max(0, kv_bytes(view.ledger, key) - giving)


def kept_bytes(view: RegistryView, record: VariantRecord, *, at_best: bool = False) -> int:
    """What a variant keeps when others want KV bytes: its soft limit, and never less than it can work with.

    What it could not go below when it was last asked counts until a use of it begins or ends; at_best: not
    even then if it is in use, because that will end.
    """
    held, least = kv_bytes(view.ledger, record.key), record.needs.kv_least_bytes
    if least is None:
        return held
    soft = view.entries[record.key.model_id].kv_soft_limit_bytes
    kept = within_limits(view, record, record.needs.kv_bytes if soft is None else soft)
    in_the_way = 0 if at_best and record.leases else record.kv_floor_bytes
    return min(held, max(kept, in_the_way))


def within_limits(view: RegistryView, record: VariantRecord, size: int) -> int:
    """`size` KV bytes, but no more than the hard limit, and never less than the variant can work with."""
    least, hard = record.needs.kv_least_bytes, view.entries[record.key.model_id].kv_hard_limit_bytes
    if least is None:
        return size  # it keeps its size
    return max(least, size if hard is None else min(size, hard))


def excess_bytes(view: RegistryView, record: VariantRecord) -> int:
    """What a variant has beyond its hard limit, which was higher before."""
    if view.entries[record.key.model_id].kv_hard_limit_bytes is None:
        return 0  # as nearly always
    held = kv_bytes(view.ledger, record.key)
    return held - within_limits(view, record, held)


def spare_bytes(view: RegistryView, record: VariantRecord) -> int:
    """What a ready variant could give now."""
    if record.state is not State.READY or record.giving is not None:
        return 0
    return kv_bytes(view.ledger, record.key) - kept_bytes(view, record)


def room_bytes(view: RegistryView, record: VariantRecord) -> int:
    """By how much a ready variant may grow, what is on its way to it left out."""
    most, hard = record.needs.kv_most_bytes, view.entries[record.key.model_id].kv_hard_limit_bytes
    if most is None:
        return 0
    limit = most if hard is None else min(hard, most)
    coming = sum(
        [r.giving.bytes for r in view.records.values() if r.giving and r.giving.target == record.key]
    )
    return max(0, limit - kv_bytes(view.ledger, record.key) - coming)


def given_to_nobody(view: RegistryView) -> Mapping[str, int]:
    """By device, KV bytes that are being given back to be reserved by whoever comes next."""
    sums: dict[str, int] = {}
    for record in view.records.values():
        if record.giving is not None and record.giving.target is None:
            device = record.needs.device
            sums[device] = sums.get(device, 0) + record.giving.bytes
    return sums
