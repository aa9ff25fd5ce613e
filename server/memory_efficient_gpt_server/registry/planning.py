"""Whether a load fits, what must go for it, and when it would be ready.

Purpose: one pure function for both the scheduling of loads and for whoever asks beforehand.
Does not know: waiters' deadlines, workers.
Invariant: a plan changes nothing; what is larger than the budget minus what can't move evicts nobody.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from types import MappingProxyType
from typing import Final

from memory_efficient_gpt_server.registry.kv_room import given_to_nobody, kept_bytes, kv_bytes
from memory_efficient_gpt_server.registry.records import RegistryView, VariantRecord
from memory_efficient_gpt_server.registry.states import State
from memory_efficient_gpt_server.registry.variants import HOST, Amount, Estimate, Kind, VariantKey, per_device
from memory_efficient_gpt_server.registry.victims import (
    Victims,
    Way,
    choose_victims,
    load_rate,
    reload_s,
)

UP: Final = frozenset({State.READY, State.LOADING, State.WAKING})
"""A variant in these states needs no load: it is ready, or will be."""

_NO_CLAIMS: Final[Mapping[str, int]] = MappingProxyType({})
_NO_VICTIMS: Final = Victims({}, covered=False)


class Verdict(StrEnum):
    """What stands between a load and its beginning."""

    NOW = "now"
    AFTER_FREEING = "after_freeing"
    """Bytes that are being freed already will do."""
    AFTER_SHRINKING = "after_shrinking"
    """KV memory that idle models give will do; nobody leaves."""
    AFTER_EVICTION = "after_eviction"
    BUSY = "busy"
    """It would fit, but what holds the bytes is in use, draining, loading or too young to be evicted."""
    NEVER = "never"


@dataclass(frozen=True, slots=True)
class Candidate:
    """Another way to load the model: `label` for people ("int4", "8k context")."""

    label: str
    key: VariantKey
    estimate: Estimate


@dataclass(frozen=True, slots=True)
class LoadRequest:
    """What somebody would like to be loaded, and what they might take instead."""

    key: VariantKey
    estimate: Estimate
    candidates: tuple[Candidate, ...] = ()


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is to be loaded in the end. loads: what has to be loaded for that; staying: what is there already,
    and must not go for them (it may give KV memory)."""

    loads: tuple[VariantKey, ...]
    staying: tuple[VariantKey, ...] = ()


@dataclass(frozen=True, slots=True)
class Alternative:
    """A candidate that fits."""

    label: str
    key: VariantKey
    plan: Plan


@dataclass(frozen=True, slots=True)
class Plan:
    """What loading would mean. Sizes in bytes.

    bytes: by kind. needed: by device, what has to be reserved. reservable: by device, what pins and leaks
    leave. evict, sleep: who would go now. shrink: who would give how much KV memory. blocked_by: who holds
    bytes but can't go now (BUSY only). eta_s: seconds until it could serve, from measured times where there
    are some; None: depends on others' requests.
    """

    verdict: Verdict
    bytes: Mapping[Kind, int]
    needed: Mapping[str, int]
    reservable: Mapping[str, int]
    evict: tuple[VariantKey, ...] = ()
    sleep: tuple[VariantKey, ...] = ()
    shrink: Mapping[VariantKey, int] = field(default_factory=lambda: MappingProxyType({}))
    blocked_by: tuple[VariantKey, ...] = ()
    eta_s: float | None = None
    alternatives: tuple[Alternative, ...] = ()

    @property
    def fits(self) -> bool:
        """Whether it can be loaded without cutting or awaiting anyone's requests."""
        return self.verdict not in (Verdict.BUSY, Verdict.NEVER)


def plan(
    request: LoadRequest, view: RegistryView, now_s: float, claimed: Mapping[str, int] = _NO_CLAIMS
) -> Plan:
    """The plan for one load. `claimed`: bytes by device that are promised to loads before this one.

    A variant that was measured before is planned with what it really took. Raises LedgerError for an unknown
    device.
    """
    record = view.records.get(request.key)
    estimate = best_estimate(request, view)
    if record is not None and record.state in UP:
        eta_s = remaining_s(view, record, now_s)
        return Plan(Verdict.NOW, estimate.by_kind(), {}, {}, eta_s=eta_s)
    needed = per_device(needed_amounts(record, estimate))
    wanted = Wanted((request.key,))
    reservable = reservable_bytes(view, wanted, needed)
    verdict, victims = judge(view, wanted, needed, reservable, now_s, claimed)
    makes_room = verdict in (Verdict.AFTER_SHRINKING, Verdict.AFTER_EVICTION)
    chosen = victims if makes_room else _NO_VICTIMS
    return Plan(
        verdict,
        estimate.by_kind(),
        needed,
        reservable,
        chosen.by(Way.EVICT),
        chosen.by(Way.SLEEP),
        chosen.kv_bytes,
        blockers(view, wanted, needed) if verdict is Verdict.BUSY else (),
        _eta_s(view, record, estimate, verdict, chosen, now_s),
        _alternatives(request, view, now_s, claimed),
    )


def best_estimate(request: LoadRequest, view: RegistryView) -> Estimate:
    """What the variant takes, or would: what was measured goes before what was estimated.

    A ready one has the KV memory that is booked now. One that leaves after its limits changed comes back with
    another KV cache than was measured.
    """
    record = view.records.get(request.key)
    if record is None or record.measured is None:
        return request.estimate
    match record.state:
        case State.ASLEEP:
            return record.needs_awake_again
        case State.READY:
            return replace(record.measured, kv_bytes=kv_bytes(view.ledger, record.key))
        case State.DRAINING | State.UNLOADING if record.relimited:
            return request.estimate
        case _:
            return record.measured


def needed_amounts(record: VariantRecord | None, estimate: Estimate) -> tuple[Amount, ...]:
    """What a load has to reserve; less for a model that only has to wake."""
    if record is not None and record.state is State.ASLEEP:
        return record.needs_awake_again.to_wake()
    return estimate.awake()


def missing_bytes(
    view: RegistryView, needed: Mapping[str, int], claimed: Mapping[str, int]
) -> dict[str, int]:
    """Bytes by device that can't be reserved at present."""
    missing = {}
    for device, size in needed.items():
        short = size + claimed.get(device, 0) - view.ledger.available_bytes(device)
        if short > 0:
            missing[device] = short
    return missing


def after_freeing(view: RegistryView, missing: Mapping[str, int]) -> dict[str, int]:
    """What is missing even when all that is being freed is free, KV memory that idle models give included."""
    given = given_to_nobody(view) if missing else {}
    coming = {device: view.ledger.freeing[device] + given.get(device, 0) for device in missing}
    return {device: n - coming[device] for device, n in missing.items() if n > coming[device]}


def after_drains(view: RegistryView, missing: Mapping[str, int]) -> dict[str, int]:
    """What is missing even when all that is being freed or drained is free."""
    left = after_freeing(view, missing)
    for record in view.records.values():
        if left and record.state is State.DRAINING:
            held = view.ledger.held_by_device(record.key)
            if record.giving is not None:  # counted already, or another model's
                held[record.needs.device] -= record.giving.bytes
            left = {device: n - held.get(device, 0) for device, n in left.items()}
    return {device: n for device, n in left.items() if n > 0}


def remaining_s(view: RegistryView, record: VariantRecord, now_s: float) -> float:
    """Seconds until a variant that is loading or waking should be ready; 0 once it is."""
    match record.state:
        case State.LOADING:
            return max(0.0, reload_s(view, record) - (now_s - record.life.since_s))
        case State.WAKING:
            return max(0.0, wake_s(view, record) - (now_s - record.life.since_s))
        case _:
            return 0.0


def judge(
    view: RegistryView,
    wanted: Wanted,
    needed: Mapping[str, int],
    reservable: Mapping[str, int],
    now_s: float,
    claimed: Mapping[str, int],
) -> tuple[Verdict, Victims]:
    """What stands between loads of so many bytes and their beginning, and who would go for them."""
    if any(size > reservable[device] for device, size in needed.items()):
        return Verdict.NEVER, _NO_VICTIMS
    records = [view.records[key] for key in wanted.loads if key in view.records]
    has_process = any(r.state in (State.DRAINING, State.UNLOADING, State.SLEEPING) for r in records)
    missing = missing_bytes(view, needed, claimed)
    if not missing:
        return (Verdict.AFTER_FREEING if has_process else Verdict.NOW), _NO_VICTIMS
    missing = after_freeing(view, missing)
    if not missing:
        return Verdict.AFTER_FREEING, _NO_VICTIMS
    room = host_room_bytes(view, needed, claimed)
    victims = choose_victims(
        view, missing, now_s, exclude=wanted.loads, staying=wanted.staying, host_room_bytes=room
    )
    if not victims.covered:
        return Verdict.BUSY, victims
    return (Verdict.AFTER_EVICTION if victims.anyone_goes else Verdict.AFTER_SHRINKING), victims


def host_room_bytes(view: RegistryView, needed: Mapping[str, int], claimed: Mapping[str, int]) -> int:
    """Host memory in which victims may be parked without being in the way of the load itself."""
    if HOST not in view.ledger.budgets:
        return 0
    return view.ledger.available_bytes(HOST) - needed.get(HOST, 0) - claimed.get(HOST, 0)


def reservable_bytes(view: RegistryView, wanted: Wanted, needed: Mapping[str, int]) -> dict[str, int]:
    """By device, what the loads could have at best: everything but what can't be made to go."""
    left = {d: view.ledger.available_bytes(d) + view.ledger.used[d] for d in needed}
    for owner in view.ledger.entries:
        record = view.records.get(owner) if isinstance(owner, VariantKey) else None
        own_asleep = owner in wanted.loads and record is not None and record.state is State.ASLEEP
        fixed = record is None or own_asleep or _stays(view, record, wanted)
        for e in view.ledger.of(owner):
            if e.device in left and (fixed or e.kind is Kind.LEAKED):
                moves = record is not None and e.kind is Kind.KV
                left[e.device] -= kept_bytes(view, record, at_best=True) if moves and record else e.bytes
    return left


def _stays(view: RegistryView, record: VariantRecord, wanted: Wanted) -> bool:
    pinned = view.entries[record.key.model_id].pins(record.key) or record.key in wanted.staying
    return pinned and record.key not in wanted.loads and record.state is not State.UNLOADING


def blockers(view: RegistryView, wanted: Wanted, needed: Mapping[str, int]) -> tuple[VariantKey, ...]:
    """Who else holds bytes where the loads need some."""
    mine = (*wanted.loads, *wanted.staying)
    return tuple(
        record.key
        for record in view.records.values()
        if record.key not in mine and any(view.ledger.held_bytes(record.key, device) for device in needed)
    )


def wake_s(view: RegistryView, record: VariantRecord) -> float:
    """Seconds to wake the variant, from its own last time or else from a guess."""
    if record.timings.wake_s is not None:
        return record.timings.wake_s
    return record.needs.parked_bytes / view.policy.wake_bytes_per_s


def _eta_s(
    view: RegistryView,
    record: VariantRecord | None,
    estimate: Estimate,
    verdict: Verdict,
    victims: Victims,
    now_s: float,
) -> float | None:
    if verdict in (Verdict.BUSY, Verdict.NEVER):
        return None
    if record is None:
        own_s = sum(amount.bytes for amount in estimate.awake()) / load_rate(view)
    else:
        own_s = wake_s(view, record) if record.state is State.ASLEEP else reload_s(view, record)
    going = [view.records[key] for key, way in victims.ways.items() if way is not Way.SHRINK]
    going += [r for r in view.records.values() if r.state is State.UNLOADING and verdict is not Verdict.NOW]
    room_s = max([r.timings.unload_s or view.policy.unload_s for r in going], default=0.0)
    loading = [r for r in view.records.values() if r.state in (State.LOADING, State.WAKING)]
    if len(loading) >= view.policy.max_loads:
        room_s = max(room_s, min(remaining_s(view, r, now_s) for r in loading))
    return own_s + room_s


def _alternatives(
    request: LoadRequest, view: RegistryView, now_s: float, claimed: Mapping[str, int]
) -> tuple[Alternative, ...]:
    if not request.candidates:
        return ()
    plans = [
        (c, plan(LoadRequest(c.key, c.estimate), view, now_s, claimed))
        for c in request.candidates
        if c.key != request.key
    ]
    return tuple([Alternative(c.label, c.key, its_plan) for c, its_plan in plans if its_plan.fits])
