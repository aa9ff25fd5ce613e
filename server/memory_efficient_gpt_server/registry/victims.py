"""Who gives KV memory, and whom to evict, to put to sleep or to drain, when a device has too few free bytes.

Purpose: the choice of victims, pure.
Does not know: who needs the bytes; how a victim is ended.
Invariant: nobody goes while KV memory that idle models have to spare is enough. A victim is unpinned; one in
use is only ever drained, and only if the caller allows it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType
from typing import Final

from memory_efficient_gpt_server.registry.kv_room import spare_bytes
from memory_efficient_gpt_server.registry.ledger import Ledger
from memory_efficient_gpt_server.registry.records import RegistryView, VariantRecord
from memory_efficient_gpt_server.registry.states import State
from memory_efficient_gpt_server.registry.variants import HOST, VariantKey

LEAST_RELOAD_S: Final = 0.05


class Way(StrEnum):
    """How a victim gives its bytes back."""

    SHRINK = "shrink"
    """It stays, and gives KV memory that it does not use."""
    EVICT = "evict"
    SLEEP = "sleep"
    DRAIN = "drain"


@dataclass(frozen=True, slots=True)
class Victims:
    """The chosen ones. covered: whether their bytes are enough. kv_bytes: what those that shrink give."""

    ways: Mapping[VariantKey, Way]
    covered: bool
    kv_bytes: Mapping[VariantKey, int] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def anyone_goes(self) -> bool:
        """Whether they include more than KV memory."""
        return any(way is not Way.SHRINK for way in self.ways.values())

    def by(self, way: Way) -> tuple[VariantKey, ...]:
        """Those that go this way, the most willing first."""
        return tuple([key for key, its_way in self.ways.items() if its_way is way])


def choose_victims(
    view: RegistryView,
    deficits: Mapping[str, int],
    now_s: float,
    *,
    exclude: Collection[VariantKey] = (),
    staying: Collection[VariantKey] = (),
    host_room_bytes: int = 0,
    allow_young: bool = False,
    allow_busy: bool = False,
) -> Victims:
    """The fewest good victims that give back `deficits` (bytes by device, all positive).

    KV memory that idle models have to spare is taken first, also of pinned and of young ones. Of those that
    go, those of lower priority go first. Among equals the score decides: idle seconds / reload seconds x the
    bytes that help. It is least recently used, corrected for what getting the model back costs and for how
    far it helps: a model idle for twice as long goes first, unless it takes more than twice as long to reload
    or frees less than half as much of what is missing. Who can be parked in `host_room_bytes` of host
    memory, or needs no room there, sleeps instead of being unloaded if that is enough. exclude: those that
    do nothing for it; staying: those that give KV memory at most. allow_young: also before min_residency_s
    is over. allow_busy: also those in use and sleeping ones that someone waits for, after all idle ones.
    """
    candidates = [
        record
        for record in view.records.values()
        if record.key not in exclude
        and record.key not in staying
        and _may_go(view, record, now_s, allow_young, allow_busy)
    ]
    ranked = sorted(candidates, key=lambda record: _rank(view, record, deficits, now_s))
    spare = _spare(view, deficits, exclude)
    chosen = _cover(view.ledger, spare, ranked, deficits, 0 if HOST in deficits else host_room_bytes)
    if not chosen.covered and chosen.by(Way.SLEEP):
        return _cover(view.ledger, spare, ranked, deficits, None)
    return chosen


def _spare(
    view: RegistryView, deficits: Mapping[str, int], exclude: Collection[VariantKey]
) -> dict[VariantKey, tuple[str, int]]:
    """KV memory to spare of idle models, (device, bytes) each, the least recently used first."""
    idle = [
        r for r in view.records.values()
        if not r.leases and r.needs.device in deficits and r.key not in exclude
    ]  # fmt: skip
    sizes = [(r, spare_bytes(view, r)) for r in sorted(idle, key=lambda r: r.last_used_s)]
    return {r.key: (r.needs.device, size) for r, size in sizes if size > 0}


def load_rate(view: RegistryView) -> float:
    """Bytes per second of the loads measured so far; the policy's guess before there was one."""
    measured = [
        (sum([amount.bytes for amount in r.measured.awake()]), r.timings.load_s)
        for r in view.records.values()
        if r.measured is not None and r.timings.load_s is not None
    ]
    seconds = sum([s for _, s in measured])
    return sum([n for n, _ in measured]) / seconds if seconds > 0 else view.policy.load_bytes_per_s


def reload_s(view: RegistryView, record: VariantRecord) -> float:
    """Seconds to load the variant again, from its own last load or else from the rate of all loads."""
    if record.timings.load_s is not None:
        return record.timings.load_s
    return sum([amount.bytes for amount in record.needs.awake()]) / load_rate(view)


def _may_go(
    view: RegistryView, record: VariantRecord, now_s: float, allow_young: bool, allow_busy: bool
) -> bool:
    if record.state is State.ASLEEP:
        allow_young = True  # it serves nobody: all it costs is host memory
    elif record.state is not State.READY or (record.leases and not allow_busy):
        return False
    entry = view.entries[record.key.model_id]
    if entry.pins(record.key) or (record.key in view.queue and not allow_busy):
        return False
    return allow_young or now_s - record.resident_since_s >= entry.min_residency_s


def _rank(
    view: RegistryView, record: VariantRecord, deficits: Mapping[str, int], now_s: float
) -> tuple[bool, int, float]:
    held = view.ledger.held_by_device(record.key)
    helping_bytes = sum([min(held.get(device, 0), missing) for device, missing in deficits.items()])
    idle_s = now_s - record.last_used_s
    score = idle_s / max(reload_s(view, record), LEAST_RELOAD_S) * helping_bytes
    busy = bool(record.leases) or record.key in view.queue
    return busy, view.entries[record.key.model_id].priority, -score


def _cover(
    ledger: Ledger,
    spare: Mapping[VariantKey, tuple[str, int]],
    ranked: list[VariantRecord],
    deficits: Mapping[str, int],
    host_room_bytes: int | None,
) -> Victims:
    """host_room_bytes: for parked weights; None: nobody sleeps."""
    ways: dict[VariantKey, Way] = {}
    frees: dict[VariantKey, dict[str, int]] = {}
    missing = dict(deficits)
    for key, (device, size) in spare.items():
        if missing[device] > 0:
            ways[key], frees[key] = Way.SHRINK, {device: size}
            missing[device] -= size
    for record in ranked:
        if all(n <= 0 for n in missing.values()):
            break
        given = frees.get(record.key, {})
        way, freed = _way_of(ledger, record, missing, given, host_room_bytes)
        more = _beyond(freed, given)
        if not _helps(more, missing):
            continue
        if way is Way.SLEEP and host_room_bytes is not None:
            host_room_bytes -= record.needs.parked_bytes
        ways.pop(record.key, None)
        ways[record.key], frees[record.key] = way, freed
        missing = {device: n - more.get(device, 0) for device, n in missing.items()}
    if any(n > 0 for n in missing.values()):
        return Victims(ways, False, _sizes(ways, frees, {}))
    for key in list(reversed(ways)):  # the last one may have made an earlier, smaller one unnecessary
        left = {device: n + frees[key].get(device, 0) for device, n in missing.items()}
        if all(n <= 0 for n in left.values()):
            del ways[key]
            missing = left
    return Victims(ways, True, _sizes(ways, frees, missing))


def _sizes(
    ways: Mapping[VariantKey, Way], frees: Mapping[VariantKey, Mapping[str, int]], missing: Mapping[str, int]
) -> dict[VariantKey, int]:
    """What each that shrinks gives: all it can, but no more than what is missing (negative: too much)."""
    too_much = {device: max(0, -n) for device, n in missing.items()}
    sizes = {}
    for key, way in ways.items():
        if way is Way.SHRINK:
            ((device, size),) = frees[key].items()
            cut = min(size - 1, too_much.get(device, 0))
            too_much[device] = too_much.get(device, 0) - cut
            sizes[key] = size - cut
    return sizes


def _helps(freed: Mapping[str, int], missing: Mapping[str, int]) -> bool:
    return any(n > 0 and freed.get(device, 0) > 0 for device, n in missing.items())


def _beyond(freed: Mapping[str, int], given: Mapping[str, int]) -> dict[str, int]:
    """What going frees that shrinking (`given`) would not."""
    return {device: n - given.get(device, 0) for device, n in freed.items()}


def _way_of(
    ledger: Ledger,
    record: VariantRecord,
    missing: Mapping[str, int],
    given: Mapping[str, int],
    host_room_bytes: int | None,
) -> tuple[Way, dict[str, int]]:
    """How the victim would go, and the bytes that frees by device. given: what it gives without going."""
    way, freed = Way.EVICT, ledger.held_by_device(record.key)
    if record.leases:
        way = Way.DRAIN
    elif record.state is State.READY and host_room_bytes is not None and can_park(record, host_room_bytes):
        kinds = [e.bytes for e in ledger.of(record.key) if e.kind in record.needs.freed_by_sleep]
        asleep = _without_gift(record, {record.needs.device: sum(kinds)})
        if _helps(_beyond(asleep, given), missing):
            return Way.SLEEP, asleep
    return way, _without_gift(record, freed)


def _without_gift(record: VariantRecord, freed: dict[str, int]) -> dict[str, int]:
    """But for what it is giving to nobody: that comes anyway."""
    if record.giving is not None and record.giving.target is None:
        freed[record.needs.device] -= record.giving.bytes
    return freed


def can_park(record: VariantRecord, host_room_bytes: int) -> bool:
    """Whether the variant can sleep and what it parks fits into that much host memory."""
    can_sleep = record.needs.can_sleep and not record.recovering
    return can_sleep and record.needs.parked_bytes <= max(0, host_room_bytes)
