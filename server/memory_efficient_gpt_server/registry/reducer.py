"""The registry's one function: state and event in, state and effects out.

Purpose: what each event means, and then whatever follows from it by itself.
Does not know: asyncio, processes, clocks. One owner calls `step`, keeps the state and runs the effects.
Invariant: `step` is pure. News of a process that is being ended already is ignored; news that can't be true
in the present state raises IllegalTransitionError, a bug of the owner.
"""

from __future__ import annotations

from dataclasses import replace

from memory_efficient_gpt_server.registry import admin, kv_sharing
from memory_efficient_gpt_server.registry.draft import Draft
from memory_efficient_gpt_server.registry.effects import AbortReason, Effect, RefusalKind, UnloadReason
from memory_efficient_gpt_server.registry.events import (
    AdminCancel,
    AdminLoad,
    AdminSleep,
    AdminUnload,
    AdminWake,
    Asked,
    BudgetPatched,
    Event,
    KvMoved,
    KvWanted,
    LeaksCleared,
    LeaseReleased,
    Left,
    Loaded,
    LoadFailed,
    Patched,
    ProcessGone,
    Removed,
    Slept,
    Tick,
    Woke,
    WorkerBack,
    WorkerDied,
    WorkerLost,
)
from memory_efficient_gpt_server.registry.planning import wake_s
from memory_efficient_gpt_server.registry.records import RegistryState, Timings, VariantRecord
from memory_efficient_gpt_server.registry.scheduling import advance, relieve
from memory_efficient_gpt_server.registry.states import HAS_PROCESS, IllegalTransitionError, State
from memory_efficient_gpt_server.registry.variants import HOST, Estimate, Kind, VariantKey
from memory_efficient_gpt_server.registry.victims import reload_s


def step(state: RegistryState, event: Event, now_s: float) -> tuple[RegistryState, tuple[Effect, ...]]:
    """The next state and what the owner must do, in order. `now_s` never goes back.

    Raises IllegalTransitionError or LedgerError for an event that can't be true; the state is unchanged then.
    """
    draft = Draft(state, now_s)
    _apply(draft, event)
    advance(draft)
    return draft.freeze(), tuple(draft.effects)


def _apply(draft: Draft, event: Event) -> None:
    match event:
        case Tick():
            kv_sharing.forget_floors(draft)
        case Asked():
            _asked(draft, event)
        case Left(waiter, key):
            _left(draft, waiter, key)
        case LeaseReleased(lease, key):
            _released(draft, lease, key)
        case KvWanted(key, size):
            kv_sharing.want_kv(draft, key, size)
        case KvMoved(source, size):
            kv_sharing.kv_moved(draft, source, size)
        case (
            AdminLoad() | AdminUnload() | AdminSleep() | AdminWake() | AdminCancel()
            | Patched() | Removed() | BudgetPatched()
        ):  # fmt: skip
            _apply_admin(draft, event)
        case _:
            _apply_news(draft, event)


def _apply_admin(
    draft: Draft,
    event: AdminLoad | AdminUnload | AdminSleep | AdminWake | AdminCancel | Patched | Removed | BudgetPatched,
) -> None:
    match event:
        case AdminLoad():
            admin.load(draft, event)
        case AdminUnload():
            admin.unload(draft, event)
        case AdminSleep(operation, key):
            admin.sleep(draft, operation, key)
        case AdminWake(operation, key):
            admin.wake(draft, operation, key)
        case AdminCancel():
            admin.cancel(draft, event)
        case Patched():
            admin.patch(draft, event)
        case Removed():
            admin.remove(draft, event)
        case BudgetPatched(device, budget):
            draft.ledger = draft.ledger.with_budget(device, budget)


def _apply_news(
    draft: Draft,
    event: Loaded
    | LoadFailed
    | WorkerLost
    | WorkerBack
    | WorkerDied
    | ProcessGone
    | LeaksCleared
    | Slept
    | Woke,
) -> None:
    """News of workers."""
    if isinstance(event, LeaksCleared):
        draft.ledger = draft.ledger.forget_leaks(event.key)
        return
    record = draft.records.get(event.key)
    if record is None or record.state not in HAS_PROCESS:
        raise IllegalTransitionError(f"{type(event).__name__} of {event.key}, which has no process")
    if isinstance(event, ProcessGone):
        draft.gone(record, lost=event.lost)
        return
    if record.state is State.UNLOADING:
        _late_news(draft, record, event)
        return
    match event:
        case Loaded(_, measured):
            _require(record, State.LOADING, event)
            load_s = draft.now_s - record.life.since_s
            record = draft.put(record, measured=measured)
            _arrived(draft, record, measured, replace(record.timings, load_s=load_s))
        case Woke(_, measured):
            _require(record, State.WAKING, event)
            wake_s = draft.now_s - record.life.since_s
            record = draft.put(record, measured=_as_loaded(record, measured))
            _arrived(draft, record, measured, replace(record.timings, wake_s=wake_s))
        case Slept():
            _slept(draft, record, event)
        case LoadFailed(_, reason):
            _require(record, State.LOADING, event)
            record = draft.strike(record, reason, fatal=True)
            draft.unload(record, UnloadReason.FAILURE, reason)
        case WorkerLost() | WorkerBack():
            _replaced(draft, record, lost=isinstance(event, WorkerLost))
        case WorkerDied(_, reason):
            _died(draft, record, reason)


def _require(record: VariantRecord, state: State, event: Event) -> None:
    if record.state is not state:
        raise IllegalTransitionError(f"{type(event).__name__} of {record.key}, which is {record.state}")


# ---- clients


def _asked(draft: Draft, event: Asked) -> None:
    if event.key.model_id not in draft.entries:
        draft.refuse(event.waiter, RefusalKind.MODEL_NOT_FOUND)
        return
    record = draft.record(event.key, event.estimate)
    failure_s, why = _failed_until(record)
    if event.problem is not None and failure_s <= draft.now_s:
        admin.refuse_unusable(draft, record, event.waiter, event.problem)
    elif record.serves:
        draft.grant(record, (event.waiter,))
    elif record.operations:
        draft.refuse(event.waiter, RefusalKind.DRAINING, draft.policy.unload_s)
    elif failure_s > draft.now_s:
        draft.refuse(event.waiter, RefusalKind.LOAD_FAILED, failure_s - draft.now_s, detail=why)
    elif event.wait_s is not None and event.wait_s <= 0:
        retry_s = wake_s(draft, record) if record.state is State.ASLEEP else reload_s(draft, record)
        draft.refuse(event.waiter, RefusalKind.MODEL_NOT_LOADED, retry_s)
    else:
        longest_s = draft.policy.max_wait_s
        wait_s = longest_s if event.wait_s is None else min(event.wait_s, longest_s)
        admin.wait_for_load(draft, record, event.waiter, wait_s, wants_lease=True)


def _failed_until(record: VariantRecord) -> tuple[float, str | None]:
    if record.failure is not None:
        return record.failure.retry_at_s, record.failure.reason
    if record.state is State.FAILED and record.life.retry_at_s is not None:
        return record.life.retry_at_s, record.life.reason
    return 0.0, None


def _left(draft: Draft, waiter: int, key: VariantKey) -> None:
    """A load that has begun goes on for whoever comes next; one that has not is forgotten."""
    draft.queue = draft.queue.leave(key, waiter)
    draft.settle(key)
    _released(draft, waiter, key)


def _released(draft: Draft, lease: int, key: VariantKey) -> None:
    record = draft.records.get(key)
    if record is not None:
        draft.release(record, lease)


# ---- workers


def _arrived(draft: Draft, record: VariantRecord, measured: Estimate, timings: Timings) -> None:
    """A load or wake-up ended well, unless it took so much more than reserved that there is no room."""
    draft.ledger = draft.ledger.reconcile(record.key, measured.awake())
    record = draft.put(record, timings=timings)
    if _has_room(draft, record):
        draft.become_ready(record)
        return
    # Those in use were here first. It goes, and queues again for what it really takes.
    reason = f"it took {sum(measured.by_kind().values())} bytes, more than there was room for"
    record = draft.strike(record, reason, fatal=False)
    draft.unload(record, UnloadReason.OVERCOMMIT, reason)


def _has_room(draft: Draft, record: VariantRecord) -> bool:
    """Whether what has arrived may stay. If it took too much, idle models leave, unless nobody may for it."""
    over = any(draft.ledger.overcommitted_bytes(device) for device in draft.ledger.budgets)
    return not over or (not draft.queue.spares_others(record.key) and relieve(draft, drain=False))


def _slept(draft: Draft, record: VariantRecord, event: Slept) -> None:
    ledger = draft.ledger.finish_freeing(record.key)
    ledger = ledger.measure(record.key, Kind.CONTEXT, record.needs.device, event.context_bytes)
    if event.parked_bytes is not None:
        ledger = ledger.measure(record.key, Kind.PARKED, HOST, event.parked_bytes)
    draft.ledger = ledger
    draft.finish(record.sleepers)
    draft.enter(record, State.ASLEEP, record.life.reason, sleepers=())


def _late_news(draft: Draft, record: VariantRecord, event: Event) -> None:
    """Sent before the process heard that it must end. All that matters of it is what it really holds."""
    if isinstance(event, Loaded | Woke):
        ledger = draft.ledger.reconcile(record.key, event.measured.awake())
        draft.ledger = ledger.begin_freeing(record.key)
    elif isinstance(event, Slept) and event.parked_bytes is not None:
        ledger = draft.ledger.measure(record.key, Kind.PARKED, HOST, event.parked_bytes)
        draft.ledger = ledger.begin_freeing(record.key)


def _as_loaded(record: VariantRecord, measured: Estimate) -> Estimate:
    """What a later load takes: it begins with the KV memory of the first, whatever the cache has now."""
    return replace(measured, kv_bytes=record.needs.kv_bytes)


def _replaced(draft: Draft, record: VariantRecord, *, lost: bool) -> None:
    """Leases stay, for what is aboard goes on in the next worker; whoever comes meanwhile waits for it."""
    if record.state not in (State.READY, State.DRAINING):
        return  # it was told to sleep while this was on the way, and will answer to that
    record = draft.put(record, recovering=lost)
    if record.state is State.READY:
        draft.serve_group(record)


def _died(draft: Draft, record: VariantRecord, reason: str) -> None:
    """Its leases are lost. Who waits for it is served by the next process, unless it fails too often.

    One that dies asleep, or on the way there or back, says nothing about loads: it was loaded well.
    """
    state = record.state
    record = draft.abort_leases(record, AbortReason.WORKER_DIED)
    if state is State.LOADING:
        record = draft.strike(record, reason, fatal=True)
    elif state in (State.READY, State.DRAINING):
        record = draft.strike(record, reason, fatal=False, served=True)
    draft.unload(record, UnloadReason.FAILURE, reason)
