"""What follows by itself from any event or from time: deadlines, drains, evictions and loads.

Purpose: bring a draft forward until nothing more can be done now.
Does not know: events; workers.
Invariant: nobody waits past a deadline (by more than a tick); a model in use is drained, never cut, in
favour of another; bytes freed for a group are not taken by one that came later.
"""

from __future__ import annotations

from typing import Final

from memory_efficient_gpt_server.registry.draft import Draft
from memory_efficient_gpt_server.registry.effects import AbortReason, RefusalKind, UnloadReason
from memory_efficient_gpt_server.registry.kv_sharing import ask_users, keep_gifts, keep_limits
from memory_efficient_gpt_server.registry.load_queue import Waiter
from memory_efficient_gpt_server.registry.planning import (
    LoadRequest,
    Plan,
    Verdict,
    after_drains,
    host_room_bytes,
    missing_bytes,
    needed_amounts,
    plan,
    remaining_s,
)
from memory_efficient_gpt_server.registry.records import RegistryView, VariantRecord
from memory_efficient_gpt_server.registry.states import State
from memory_efficient_gpt_server.registry.variants import HOST, Kind, VariantKey, per_device
from memory_efficient_gpt_server.registry.victims import Victims, Way, can_park, choose_victims, reload_s

RETRY_WHEN_BUSY_S: Final = 5.0
_NEEDS_OTHERS_ROOM: Final = frozenset({Verdict.AFTER_EVICTION, Verdict.BUSY})
_LEAKED: Final = frozenset({Kind.LEAKED})


def advance(draft: Draft) -> None:
    """Do all that can be done now."""
    if draft.queue.groups:
        _refuse_expired(draft)
    for record in list(draft.records.values()):
        if record.yields_to is not None and not waits_to_be_loaded(draft, record.yields_to):
            record = draft.put(record, yields_to=None)
        if record.state is State.DRAINING:
            _continue_drain(draft, record)
        elif record.state in (State.READY, State.ASLEEP) and not record.leases:
            _unload_after_ttl(draft, record)
    for record in list(draft.records.values()):
        if record.state is State.READY:
            keep_limits(draft, record)
    relieve(draft)
    if draft.queue.groups:
        _start_loads(draft)


def relieve(draft: Draft, *, drain: bool = True) -> bool:
    """Evict what can go from overcommitted devices, however young. Returns whether that will be enough.

    drain: whether models in use are drained where idle ones are not enough. If not, and they are not,
    nobody goes in vain.
    """
    over = {d: n for d in draft.ledger.budgets if (n := draft.ledger.overcommitted_bytes(d)) > 0}
    if not over:
        return True
    keep_gifts(draft, over)
    over = after_drains(draft, over)
    if not over:
        return True
    room = 0 if HOST in over else host_room_bytes(draft, {}, {})
    victims = choose_victims(draft, over, draft.now_s, host_room_bytes=room, allow_young=True)
    if drain and not victims.covered:
        ask_users(draft, dict(over))
        over = after_drains(draft, over)
        victims = choose_victims(
            draft, over, draft.now_s, host_room_bytes=room, allow_young=True, allow_busy=True
        )
    if victims.covered or drain:
        _dismiss(draft, victims, UnloadReason.OVERCOMMIT, drain_for=None)
    return victims.covered


# ---- deadlines


def _refuse_expired(draft: Draft) -> None:
    for key, waiter in draft.queue.expired(draft.now_s):
        _refuse_late(draft, key, waiter)
        draft.queue = draft.queue.leave(key, waiter.id)
        draft.settle(key)


def _refuse_late(draft: Draft, key: VariantKey, waiter: Waiter) -> None:
    record = draft.records[key]
    if record.state in (State.LOADING, State.WAKING) or record.recovering:
        left_s = max(1.0, remaining_s(draft, record, draft.now_s))
        draft.refuse(waiter.id, RefusalKind.MODEL_LOADING, left_s)
        return
    churn_s = churn_wait_s(draft, draft.now_s)
    if churn_s > 0:
        draft.refuse(waiter.id, RefusalKind.CHURN_LIMITED, churn_s)
    else:
        draft.refuse(waiter.id, RefusalKind.MODELS_BUSY, RETRY_WHEN_BUSY_S + reload_s(draft, record))


def _continue_drain(draft: Draft, record: VariantRecord) -> None:
    if record.drain_deadline_s is not None and record.drain_deadline_s <= draft.now_s:
        record = draft.abort_leases(record, AbortReason.DRAIN_DEADLINE)
    if record.drain_for is not None and _no_longer_wanted(draft, record, record.drain_for):
        record = draft.enter(record, State.READY, drain_for=None)
        draft.serve_group(record)
    elif not record.leases:
        _end_drained(draft, record)


def _no_longer_wanted(draft: Draft, record: VariantRecord, wanted_by: VariantKey) -> bool:
    """Whether the drain was for a load that has begun, or that nobody waits for who may evict, or its victim
    was pinned."""
    if draft.entries[record.key.model_id].pins(record.key):
        return True
    return draft.queue.spares_others(wanted_by) or not waits_to_be_loaded(draft, wanted_by)


def waits_to_be_loaded(view: RegistryView, key: VariantKey) -> bool:
    """Whether somebody waits for a variant whose load or wake-up has not begun."""
    return key in view.queue and view.records[key].state in (State.QUEUED, State.ASLEEP)


def _end_drained(draft: Draft, record: VariantRecord) -> None:
    if record.operations or record.drain_for is None:
        draft.unload(record, UnloadReason.ADMIN if record.operations else UnloadReason.OVERCOMMIT)
        return
    if record.key not in draft.queue and _sleep_is_enough(draft, record, record.drain_for):
        draft.sleep(record, UnloadReason.BUDGET, yields_to=record.drain_for)
    else:
        draft.unload(record, UnloadReason.BUDGET, yields_to=record.drain_for)


def _sleep_is_enough(draft: Draft, record: VariantRecord, wanted_by: VariantKey) -> bool:
    """Whether the one that the drain is for has room though the drained one keeps some of its bytes."""
    wanting = draft.records[wanted_by]
    needed = per_device(needed_amounts(wanting, wanting.needs))
    if not can_park(record, host_room_bytes(draft, needed, {})):
        return False
    device = record.needs.device
    freed = record.needs.freed_by_sleep
    kept = sum(
        [e.bytes for e in draft.ledger.of(record.key) if e.device == device and e.kind not in freed | _LEAKED]
    )
    needed[device] = needed.get(device, 0) + kept
    return not after_drains(draft, missing_bytes(draft, needed, {}))


def _unload_after_ttl(draft: Draft, record: VariantRecord) -> None:
    entry = draft.entries[record.key.model_id]
    if entry.ttl_s is None or entry.pins(record.key) or record.key in draft.queue:
        return
    if draft.now_s - record.last_used_s >= entry.ttl_s:
        draft.unload(record, UnloadReason.TTL)


# ---- loads


def _start_loads(draft: Draft) -> None:
    """Start what fits, in order; make room for what can't start, and keep that room from later groups."""
    claimed: dict[str, int] = {}
    ahead: list[VariantKey] = []
    under_way = sum([r.state in (State.LOADING, State.WAKING) for r in draft.records.values()])
    for key in loading_order(draft, draft.now_s):
        ahead.append(key)
        record = draft.records[key]
        if record.state not in (State.QUEUED, State.ASLEEP):
            continue
        its_plan = plan(LoadRequest(key, record.needs), draft, draft.now_s, claimed)
        if its_plan.verdict is Verdict.NEVER:
            draft.refuse_group(key, RefusalKind.INSUFFICIENT_MEMORY, plan=its_plan)
        elif its_plan.verdict in _NEEDS_OTHERS_ROOM and draft.queue.spares_others(key):
            draft.refuse_group(key, RefusalKind.EVICTION_NEEDED, plan=its_plan)
        elif under_way >= draft.policy.max_loads:
            continue
        elif its_plan.verdict is Verdict.NOW:
            _start(draft, record)
            under_way += 1
        elif _makes_room(draft, ahead, its_plan, claimed):
            for device, size in its_plan.needed.items():
                claimed[device] = claimed.get(device, 0) + size


def loading_order(view: RegistryView, now_s: float) -> list[VariantKey]:
    """All groups that wait, in the order in which they are served."""

    def yields_to(key: VariantKey) -> VariantKey | None:
        first = view.records[key].yields_to
        return first if first is not None and waits_to_be_loaded(view, first) else None

    return view.queue.in_order(
        now_s, view.policy.patience_s, lambda key: view.entries[key.model_id].priority, yields_to
    )


def _start(draft: Draft, record: VariantRecord) -> None:
    if record.state is State.ASLEEP:
        draft.start_wake(record)
    else:
        draft.start_load(record)


def _makes_room(draft: Draft, ahead: list[VariantKey], its_plan: Plan, claimed: dict[str, int]) -> bool:
    """Begin what the plan of the last one of `ahead` needs. Returns whether later groups must leave the room.

    A group that can't begin yet is overtaken by those that can, until its patience is over.
    """
    key = ahead[-1]
    impatient = draft.queue.impatient(key, draft.now_s, draft.policy.patience_s)
    if its_plan.verdict is Verdict.AFTER_FREEING:
        return True
    if its_plan.verdict is Verdict.BUSY:
        ask_users(draft, after_drains(draft, missing_bytes(draft, its_plan.needed, claimed)))
    if its_plan.fits:
        ways = dict.fromkeys(its_plan.evict, Way.EVICT) | dict.fromkeys(its_plan.sleep, Way.SLEEP)
        ways |= dict.fromkeys(its_plan.shrink, Way.SHRINK)
        victims = Victims(ways, True, its_plan.shrink)
    elif impatient:
        missing = after_drains(draft, missing_bytes(draft, its_plan.needed, claimed))
        if not missing:
            return True
        victims = choose_victims(draft, missing, draft.now_s, exclude=ahead, allow_busy=True)
    else:
        return False
    swaps = any(_is_swap(draft, key, way) for key, way in victims.ways.items())
    if not victims.covered or (swaps and churn_wait_s(draft, draft.now_s) > 0):
        return impatient
    _dismiss(draft, victims, UnloadReason.BUDGET, drain_for=key)
    return True


def churn_wait_s(view: RegistryView, now_s: float) -> float:
    """Seconds until models may be swapped again; 0 while no model is in use: then swaps keep nobody."""
    in_use = any(record.leases for record in view.records.values())
    return view.churn.wait_s(now_s) if in_use else 0.0


def _is_swap(draft: Draft, key: VariantKey, way: Way) -> bool:
    """Whether a model goes that was ready to serve."""
    return way is not Way.SHRINK and draft.records[key].state is State.READY


def _dismiss(draft: Draft, victims: Victims, reason: UnloadReason, drain_for: VariantKey | None) -> None:
    swaps = 0
    for key, way in victims.ways.items():
        record = draft.records[key]
        swaps += _is_swap(draft, key, way)
        match way:
            case Way.SHRINK:
                draft.give_kv(record, None, victims.kv_bytes[key])
            case Way.EVICT:
                draft.unload(record, reason, yields_to=drain_for)
            case Way.SLEEP:
                draft.sleep(record, reason, yields_to=drain_for)
            case Way.DRAIN:
                draft.enter(record, State.DRAINING, reason, drain_for=drain_for)
    if swaps and reason is UnloadReason.BUDGET:
        draft.churn = draft.churn.swapped(draft.now_s, swaps)
