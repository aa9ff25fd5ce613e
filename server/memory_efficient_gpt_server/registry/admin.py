"""What administrators wish: load, unload, sleep, wake, call that off, register, change, forget.

Purpose: handlers of the admin events.
Does not know: HTTP, keys, who asks.
Invariant: every operation is answered once: at once, when its model is ready or asleep, or when its process
is gone. Only an administrator's abort or deadline ends a lease.
"""

from __future__ import annotations

from typing import Final

from memory_efficient_gpt_server.registry.draft import Draft
from memory_efficient_gpt_server.registry.effects import AbortReason, RefusalKind, UnloadReason
from memory_efficient_gpt_server.registry.events import (
    AdminCancel,
    AdminLoad,
    AdminUnload,
    Patched,
    Removed,
    UnloadMode,
)
from memory_efficient_gpt_server.registry.kv_room import within_limits
from memory_efficient_gpt_server.registry.load_queue import Waiter
from memory_efficient_gpt_server.registry.records import VariantRecord
from memory_efficient_gpt_server.registry.states import HAS_PROCESS, State
from memory_efficient_gpt_server.registry.variants import HOST, Estimate, VariantKey

RETRY_WHEN_FULL_S: Final = 5.0
_CANNOT_SLEEP: Final = "it has nothing to give back: its weights are in host memory, its KV cache is not ours"


def load(draft: Draft, event: AdminLoad) -> None:
    """Queue a load for nobody's request, whatever failed before; if it fails, that counts with the others."""
    if event.key.model_id not in draft.entries:
        draft.refuse(event.operation, RefusalKind.MODEL_NOT_FOUND)
        return
    record = draft.record(event.key, event.estimate)
    if event.problem is not None:
        refuse_unusable(draft, record, event.operation, event.problem)
        return
    record = draft.put(record, failure=None)
    wait_s = draft.policy.max_wait_s
    wait_for_load(draft, record, event.operation, wait_s, wants_lease=False, may_evict=event.may_evict)


def wait_for_load(
    draft: Draft,
    record: VariantRecord,
    waiter: int,
    wait_s: float,
    *,
    wants_lease: bool,
    may_evict: bool = True,
) -> None:
    """Put someone into the queue; what can never fit is refused from there, in the same step, and so is what
    would need an eviction that nobody in the group wants."""
    if record.serves:
        draft.finish((waiter,))
        return
    if len(draft.queue) >= draft.policy.max_waiters:
        draft.refuse(waiter, RefusalKind.QUEUE_FULL, RETRY_WHEN_FULL_S)
        return
    queued = Waiter(waiter, draft.now_s, draft.now_s + wait_s, wants_lease, may_evict)
    draft.queue = draft.queue.join(record.key, queued)
    if record.state in (State.UNLOADED, State.FAILED):
        draft.enter(record, State.QUEUED)


def refuse_unusable(draft: Draft, record: VariantRecord, waiter: int, problem: str) -> None:
    """What somebody wants can't be loaded, which is a failure like that of a load."""
    if record.state in (State.UNLOADED, State.FAILED):
        draft.unusable(record, problem)
        retry_at_s = draft.records[record.key].life.retry_at_s
        retry_s = None if retry_at_s is None else retry_at_s - draft.now_s
        draft.refuse(waiter, RefusalKind.LOAD_FAILED, retry_s, detail=problem)
    else:  # its files were damaged only now; what is loaded stays
        draft.refuse(waiter, RefusalKind.LOAD_FAILED, detail=problem)


def unload(draft: Draft, event: AdminUnload) -> None:
    """Unload a variant, in whatever state it is."""
    record = draft.records.get(event.key)
    if record is None or record.state is State.UNLOADED:
        draft.finish((event.operation,))
    elif draft.entries[event.key.model_id].pins(event.key) and record.state is not State.FAILED:
        draft.refuse(event.operation, RefusalKind.MODEL_PINNED)
    elif event.mode is UnloadMode.IF_IDLE and (record.leases or event.key in draft.queue):
        draft.refuse(event.operation, RefusalKind.MODEL_BUSY)
    else:
        _unload(draft, record, event)


def _unload(draft: Draft, record: VariantRecord, event: AdminUnload) -> None:
    draft.refuse_group(record.key, RefusalKind.DRAINING, draft.policy.unload_s)
    record = draft.records[record.key]
    if record.state not in HAS_PROCESS:
        if record.state is State.FAILED:
            draft.enter(record, State.UNLOADED, strikes_s=(), crashes_s=())
        draft.finish((event.operation,))
        return
    record = draft.put(record, operations=(*record.operations, event.operation))
    if record.state is State.UNLOADING:
        return
    if event.mode is UnloadMode.ABORT:
        record = draft.abort_leases(record, AbortReason.ADMIN)
    if record.leases:
        _drain(draft, record, event.deadline_s)
    else:
        draft.unload(record, UnloadReason.ADMIN)


def _drain(draft: Draft, record: VariantRecord, deadline_s: float | None) -> None:
    if record.state is State.READY:
        record = draft.enter(record, State.DRAINING, UnloadReason.ADMIN)
    deadlines = [d for d in (record.drain_deadline_s,) if d is not None]
    deadlines += [draft.now_s + deadline_s] if deadline_s is not None else []
    draft.put(record, drain_for=None, drain_deadline_s=min(deadlines, default=None))


def sleep(draft: Draft, operation: int, key: VariantKey) -> None:
    """Put an idle ready variant to sleep, if it can and the host has room."""
    record = draft.records.get(key)
    if record is None or record.state not in (State.READY, State.SLEEPING, State.ASLEEP):
        state = State.UNLOADED if record is None else record.state
        draft.refuse(operation, RefusalKind.WRONG_STATE, detail=f"it is {state}; only a ready one can sleep")
    elif record.state is State.ASLEEP and key not in draft.queue:
        draft.finish((operation,))
    elif record.state is State.SLEEPING and key not in draft.queue:
        draft.put(record, sleepers=(*record.sleepers, operation))
    elif record.leases or key in draft.queue:
        draft.refuse(operation, RefusalKind.MODEL_BUSY, detail="try again when it is idle")
    elif draft.entries[key.model_id].pins(key):
        draft.refuse(operation, RefusalKind.MODEL_PINNED)
    elif record.recovering:
        draft.refuse(operation, RefusalKind.WRONG_STATE, detail="its worker has died and is being replaced")
    elif not record.needs.can_sleep:
        draft.refuse(operation, RefusalKind.WRONG_STATE, detail=_CANNOT_SLEEP)
    elif record.needs.parked_bytes > _host_room_bytes(draft):
        draft.refuse(operation, RefusalKind.INSUFFICIENT_MEMORY, detail=_host_shortage(draft, record))
    else:
        draft.sleep(record, UnloadReason.ADMIN, sleepers=(operation,))


def _host_room_bytes(draft: Draft) -> int:
    return max(0, draft.ledger.available_bytes(HOST)) if HOST in draft.ledger.budgets else 0


def _host_shortage(draft: Draft, record: VariantRecord) -> str:
    return (
        f"its weights take {record.needs.parked_bytes:,} bytes of host memory, where "
        f"{_host_room_bytes(draft):,} are left"
    )


def wake(draft: Draft, operation: int, key: VariantKey) -> None:
    """Wake a variant that sleeps or is about to."""
    record = draft.records.get(key)
    if record is None or record.state not in (State.SLEEPING, State.ASLEEP, State.WAKING, State.READY):
        state = State.UNLOADED if record is None else record.state
        draft.refuse(
            operation, RefusalKind.WRONG_STATE, detail=f"it is {state}; only a sleeping one can wake"
        )
    else:
        wait_for_load(draft, record, operation, draft.policy.max_wait_s, wants_lease=False)


def cancel(draft: Draft, event: AdminCancel) -> None:
    """Call an operation off: who waits for a load does so no more, and one that nobody else waits for is
    stopped; a drain ends unless others want it, too. What can't be stopped half-way is refused."""
    record = draft.records.get(event.key)
    if record is not None and any(waiter.id == event.target for waiter in draft.queue.of(event.key)):
        _answer_cancelled(draft, event)
        _cancel_load(draft, record, event.target)
    elif record is not None and event.target in record.operations and record.state is State.DRAINING:
        _answer_cancelled(draft, event)
        _cancel_unload(draft, record, event.target)
    else:
        draft.refuse(event.operation, RefusalKind.WRONG_STATE, detail=_why_not(record, event.target))


def _answer_cancelled(draft: Draft, event: AdminCancel) -> None:
    draft.refuse(event.target, RefusalKind.CANCELLED)
    draft.finish((event.operation,))


def _cancel_load(draft: Draft, record: VariantRecord, target: int) -> None:
    """A wake-up goes on: it is over in no time, and stopping it would cost the process."""
    draft.queue = draft.queue.leave(record.key, target)
    draft.settle(record.key)
    if record.state is State.LOADING and record.key not in draft.queue:
        draft.unload(record, UnloadReason.ADMIN, "its load was called off")


def _cancel_unload(draft: Draft, record: VariantRecord, target: int) -> None:
    """If somebody else wants the unload as well, it goes on, by the earliest deadline that was given."""
    left = tuple([operation for operation in record.operations if operation != target])
    record = draft.put(record, operations=left)
    if not left:
        record = draft.enter(record, State.READY, drain_for=None, drain_deadline_s=None)
        draft.serve_group(record)


def _why_not(record: VariantRecord | None, target: int) -> str:
    if record is not None and target in record.sleepers:
        return "falling asleep is not stopped half-way; wake it instead"
    if record is not None and target in record.operations:
        return "its process is being ended already"
    return "the operation has ended"


def patch(draft: Draft, event: Patched) -> None:
    """Register a model or change its settings; what follows from a pin, a TTL or a limit follows at once."""
    draft.entries = {**draft.entries, event.entry.id: event.entry}
    for key, estimate in event.estimates.items():
        if (record := draft.records.get(key)) is not None:
            _relimit(draft, record, estimate)


def _relimit(draft: Draft, record: VariantRecord, estimate: Estimate) -> None:
    """Its next load takes `estimate`; a process that there is keeps what was measured of it."""
    if record.state not in HAS_PROCESS:
        draft.put(record, estimate=estimate, measured=None)
        return
    on_waking = record.kv_on_waking_bytes
    if on_waking is not None and record.state in (State.SLEEPING, State.ASLEEP):
        on_waking = within_limits(draft, record, on_waking)
    draft.put(record, estimate=estimate, relimited=True, kv_on_waking_bytes=on_waking)


def remove(draft: Draft, event: Removed) -> None:
    """Forget a model and its variants' history, unless one of them is loaded, waited for or leaking."""
    mine = [r for r in draft.records.values() if r.key.model_id == event.model_id]
    idle = (State.UNLOADED, State.FAILED)
    if event.model_id not in draft.entries:
        draft.refuse(event.operation, RefusalKind.MODEL_NOT_FOUND)
    elif any(r.state not in idle or draft.ledger.of(r.key) for r in mine):
        draft.refuse(event.operation, RefusalKind.MODEL_BUSY)
    else:
        draft.entries = {i: entry for i, entry in draft.entries.items() if i != event.model_id}
        for record in mine:
            del draft.records[record.key]
        draft.finish((event.operation,))
