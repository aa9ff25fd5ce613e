"""KV memory that wanders from models that don't use it to busy ones without a reload.

Purpose: who may have more, and who gives it.
Does not know: how pages are mapped; how much is in use.
Invariant: bytes are booked for the taker before it may map them, and stay booked for the giver until it has
unmapped them; a giver gives to one at a time and keeps its soft limit, a taker stays below its hard limit.

    KvWanted -> MoveKv -> the source unmaps -> KvMoved -> the bytes change owner -> GrowKv of the target

A model in use gives too, unless it wanted more itself of late: its worker keeps whatever is in use.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Final

from memory_efficient_gpt_server.registry.draft import Draft
from memory_efficient_gpt_server.registry.effects import GrowKv
from memory_efficient_gpt_server.registry.kv_room import (
    excess_bytes,
    kv_bytes,
    room_bytes,
    spare_bytes,
)
from memory_efficient_gpt_server.registry.records import VariantRecord
from memory_efficient_gpt_server.registry.states import State
from memory_efficient_gpt_server.registry.variants import Kind, VariantKey

QUIET_S: Final = 2.0
"""A model in use gives nothing to others for so long after it wanted more itself."""


def want_kv(draft: Draft, key: VariantKey, wanted_bytes: int) -> None:
    """Give a ready variant free bytes, then have others on its device give theirs, idle ones first.

    Free bytes are for loads while any load waits.
    """
    record = draft.records.get(key)
    if record is None or record.state is not State.READY or wanted_bytes <= 0:
        return
    record = draft.put(record, kv_wanted_s=draft.now_s)
    if record.giving is not None:
        return
    device = record.needs.device
    wanted_bytes = min(wanted_bytes, room_bytes(draft, record))
    free = 0 if draft.queue.groups else draft.ledger.available_bytes(device)
    taken = min(wanted_bytes, free)
    if taken > 0:
        _grow(draft, record, taken)
        wanted_bytes -= taken
    givers = [r for r in draft.records.values() if r.key != key and _gives(draft, r, device)]
    for giver in sorted(givers, key=lambda r: (bool(r.leases), r.last_used_s)):
        size = min(wanted_bytes, spare_bytes(draft, giver))
        if size > 0:
            draft.give_kv(giver, key, size)
            wanted_bytes -= size


def kv_moved(draft: Draft, source: VariantKey, unmapped_bytes: int) -> None:
    """Give what `source` has unmapped to whom it was for; to nobody if that one can't take it any more, or
    if the device has less to give than when it was told.

    A source that was unloaded meanwhile gives its bytes back with its process, and not twice.
    """
    giver = draft.records.get(source)
    if giver is None or giver.giving is None:
        return
    gift = giver.giving
    given = min(unmapped_bytes, kv_bytes(draft.ledger, source))
    if given > 0:
        draft.ledger = draft.ledger.grow(source, giver.needs.device, Kind.KV, -given)
    floor = kv_bytes(draft.ledger, source) if given < gift.bytes else 0
    draft.put(giver, giving=None, kv_floor_bytes=floor)
    taker = draft.records.get(gift.target) if gift.target is not None else None
    if taker is None or taker.state is not State.READY:
        return
    free = draft.ledger.available_bytes(taker.needs.device)
    taken = min(given, gift.bytes, room_bytes(draft, taker), free)
    if taken > 0:
        _grow(draft, taker, taken)


def ask_users(draft: Draft, missing: dict[str, int]) -> None:
    """Have models in use give back what they don't use, as far as a load is `missing` bytes by device."""
    for record in sorted(draft.records.values(), key=lambda r: r.last_used_s):
        device = record.needs.device
        size = min(spare_bytes(draft, record), missing.get(device, 0)) if record.leases else 0
        if size > 0:
            draft.give_kv(record, None, size)
            missing[device] -= size


def keep_limits(draft: Draft, record: VariantRecord) -> None:
    """Have a ready variant give back what it has beyond its hard limit, as far as it can be spared."""
    if (excess := excess_bytes(draft, record)) > 0:
        size = min(excess, spare_bytes(draft, record))
        if size > 0:
            draft.give_kv(record, None, size)


def forget_floors(draft: Draft) -> None:
    """Idle variants beyond their hard limits may be asked again: what was in use may have ended since."""
    for record in list(draft.records.values()):
        idle = record.state is State.READY and not record.leases
        if idle and record.kv_floor_bytes and excess_bytes(draft, record) > 0:
            draft.put(record, kv_floor_bytes=0)


def keep_gifts(draft: Draft, over: Mapping[str, int]) -> None:
    """What is on its way to another model on these devices goes to nobody: it is missing there."""
    for record in list(draft.records.values()):
        gift = record.giving
        if gift is not None and gift.target is not None and record.needs.device in over:
            draft.put(record, giving=replace(gift, target=None))


def _grow(draft: Draft, record: VariantRecord, size: int) -> None:
    draft.ledger = draft.ledger.grow(record.key, record.needs.device, Kind.KV, size)
    draft.effects.append(GrowKv(record.key, size))


def _gives(draft: Draft, record: VariantRecord, device: str) -> bool:
    if record.needs.device != device:
        return False
    wanted_s = record.kv_wanted_s
    return not record.leases or wanted_s is None or draft.now_s - wanted_s >= QUIET_S
