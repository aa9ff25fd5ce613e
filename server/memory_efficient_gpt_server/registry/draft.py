"""One step's work in progress: the state being changed, and the effects so far.

Purpose: the moves that handlers of events are made of, each keeping record, ledger and effects together.
Does not know: events, policies of when to move.
Invariant: a draft lives inside one call of `step`; the state it began with is never changed.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from memory_efficient_gpt_server.registry.effects import (
    Abort,
    AbortReason,
    Effect,
    Finish,
    GrantLease,
    MoveKv,
    RefusalKind,
    Refuse,
    StartLoad,
    StartSleep,
    StartUnload,
    StartWake,
    UnloadReason,
)
from memory_efficient_gpt_server.registry.kv_room import kept_bytes, kv_limit_bytes, within_limits
from memory_efficient_gpt_server.registry.planning import Plan
from memory_efficient_gpt_server.registry.records import Failure, KvGift, RegistryState, VariantRecord
from memory_efficient_gpt_server.registry.states import State, fail, move
from memory_efficient_gpt_server.registry.variants import Estimate, VariantKey


class Draft:
    """A mutable copy of a RegistryState, at one time. It is a RegistryView."""

    def __init__(self, state: RegistryState, now_s: float) -> None:
        self.now_s = now_s
        self.policy = state.policy
        self.entries = state.entries
        self.records = dict(state.records)
        self.ledger = state.ledger
        self.queue = state.queue
        self.churn = state.churn
        self.effects: list[Effect] = []

    def freeze(self) -> RegistryState:
        """The state after this step."""
        return RegistryState(self.policy, self.entries, self.records, self.ledger, self.queue, self.churn)

    def record(self, key: VariantKey, estimate: Estimate) -> VariantRecord:
        """The variant's record, with this estimate from now on; made if there is none."""
        old = self.records.get(key)
        if old is None:
            self._forget_oldest()
            old = self.records[key] = VariantRecord(key=key, estimate=estimate)
        return old if old.estimate == estimate else self.put(old, estimate=estimate)

    def _forget_oldest(self) -> None:
        if len(self.records) < self.policy.most_records:
            return
        idle = [record for record in self.records.values() if self._forgettable(record)]
        if idle:
            del self.records[min(idle, key=lambda record: record.life.since_s).key]

    def _forgettable(self, record: VariantRecord) -> bool:
        if self.ledger.of(record.key):
            return False  # it has leaked
        retry_at_s = record.life.retry_at_s or 0.0
        return record.state is State.UNLOADED or (record.state is State.FAILED and retry_at_s <= self.now_s)

    def put(self, record: VariantRecord, **changes: Any) -> VariantRecord:
        """Store the record with these fields changed."""
        changed = replace(record, **changes)
        self.records[record.key] = changed
        return changed

    def enter(
        self, record: VariantRecord, to: State, reason: str | None = None, **changes: Any
    ) -> VariantRecord:
        """Make a transition. Raises IllegalTransitionError."""
        return self.put(record, life=move(record.life, to, self.now_s, reason), **changes)

    # ---- answers

    def refuse(
        self,
        waiter: int,
        kind: RefusalKind,
        retry_after_s: float | None = None,
        detail: str | None = None,
        plan: Plan | None = None,
    ) -> None:
        """Answer a waiter or an operation with a refusal."""
        self.effects.append(Refuse(waiter, kind, retry_after_s, detail, plan))

    def refuse_group(
        self,
        key: VariantKey,
        kind: RefusalKind,
        retry_after_s: float | None = None,
        detail: str | None = None,
        plan: Plan | None = None,
    ) -> None:
        """Refuse all who wait for a variant; one that was only queued is unloaded again."""
        for waiter in self.queue.of(key):
            self.refuse(waiter.id, kind, retry_after_s, detail, plan)
        self.queue = self.queue.without(key)
        self.settle(key)

    def settle(self, key: VariantKey) -> None:
        """A variant that is queued for nobody is unloaded."""
        record = self.records.get(key)
        if record is not None and record.state is State.QUEUED and key not in self.queue:
            self.enter(record, State.UNLOADED)

    def finish(self, operations: tuple[int, ...]) -> None:
        """Tell administrators that their wish is done."""
        self.effects.extend([Finish(operation) for operation in operations])

    # ---- leases

    def grant(self, record: VariantRecord, waiters: tuple[int, ...]) -> VariantRecord:
        """Take leases, then tell the waiters: nothing can come between, so none finds its model gone."""
        assert record.serves, f"a lease on {record.key}, which is {record.state}"
        self.effects.extend([GrantLease(waiter, record.key) for waiter in waiters])
        leases = record.leases.union(waiters)
        return self.put(record, leases=leases, last_used_s=self.now_s, kv_floor_bytes=0)

    def serve_group(self, record: VariantRecord) -> VariantRecord:
        """The variant is ready: everyone who waits for it gets an answer, once its worker is there again."""
        if record.recovering:
            return record
        group = self.queue.of(record.key)
        self.queue = self.queue.without(record.key)
        self.finish(tuple([w.id for w in group if not w.wants_lease]))
        leases = tuple([w.id for w in group if w.wants_lease])
        return self.grant(record, leases) if leases else record

    def release(self, record: VariantRecord, lease: int) -> None:
        """A lease ends; unknown ones are fine."""
        if lease in record.leases:
            self.put(record, leases=record.leases - {lease}, last_used_s=self.now_s, kv_floor_bytes=0)

    def abort_leases(self, record: VariantRecord, reason: AbortReason) -> VariantRecord:
        """End all leases now. Only for what is not an eviction."""
        self.effects.extend([Abort(lease, record.key, reason) for lease in sorted(record.leases)])
        return self.put(record, leases=frozenset(), last_used_s=self.now_s) if record.leases else record

    # ---- processes

    def start_load(self, record: VariantRecord) -> None:
        """Reserve and begin to load. Raises LedgerError if there is no room."""
        self.ledger = self.ledger.reserve(record.key, record.needs.awake())
        self.enter(record, State.LOADING)
        self.effects.append(StartLoad(record.key, record.needs))

    def start_wake(self, record: VariantRecord) -> None:
        """Reserve and begin to wake. Raises LedgerError if there is no room."""
        awake = record.needs_awake_again
        self.ledger = self.ledger.reserve(record.key, awake.to_wake())
        self.enter(record, State.WAKING)
        self.effects.append(StartWake(record.key, awake.kv_bytes))

    def become_ready(self, record: VariantRecord) -> VariantRecord:
        """A load or a wake-up has succeeded; those who wait are served. A load makes good for failed ones."""
        strikes_s = () if record.state is State.LOADING else record.strikes_s
        record = self.enter(
            record,
            State.READY,
            resident_since_s=self.now_s,
            last_used_s=self.now_s,
            strikes_s=strikes_s,
            yields_to=None,
        )
        return self.serve_group(record)

    def sleep(
        self,
        record: VariantRecord,
        reason: UnloadReason,
        sleepers: tuple[int, ...] = (),
        yields_to: VariantKey | None = None,
    ) -> None:
        """Begin to put an unleased variant to sleep. Raises LedgerError if the host has no room.

        It wakes with the KV memory that it has now, but at most what it was loaded with or keeps when others
        want some: what it had grown by is free from now on, and must not be in the way of its waking.
        """
        assert not record.leases and not record.recovering, f"{record.key} is put to sleep in use"
        record = self.put(record, kv_floor_bytes=0)  # nothing is in use any more
        most_bytes = max(within_limits(self, record, record.needs.kv_bytes), kept_bytes(self, record))
        on_waking_bytes = min(most_bytes, kv_limit_bytes(self, record.key))
        self.ledger = self.ledger.begin_freeing(record.key, record.needs.freed_by_sleep)
        self.ledger = self.ledger.reserve(record.key, record.needs.parked())
        self.enter(
            record,
            State.SLEEPING,
            reason,
            sleepers=sleepers,
            drain_for=None,
            yields_to=yields_to,
            drain_deadline_s=None,
            giving=None,
            kv_on_waking_bytes=on_waking_bytes,
        )
        self.effects.append(StartSleep(record.key, reason))

    def unload(
        self,
        record: VariantRecord,
        reason: UnloadReason,
        detail: str | None = None,
        yields_to: VariantKey | None = None,
    ) -> None:
        """Begin to end an unleased variant's process; its bytes stay booked until it is gone."""
        assert not record.leases, f"{record.key} is unloaded in use"
        self.ledger = self.ledger.begin_freeing(record.key)
        for sleeper in record.sleepers:
            self.refuse(sleeper, RefusalKind.WRONG_STATE, detail=f"it is being unloaded ({detail or reason})")
        self.enter(
            record,
            State.UNLOADING,
            detail or reason,
            sleepers=(),
            recovering=False,
            drain_for=None,
            yields_to=yields_to or record.yields_to,
            drain_deadline_s=None,
            giving=None,
        )
        self.effects.append(StartUnload(record.key, reason))

    def give_kv(self, record: VariantRecord, target: VariantKey | None, size: int) -> None:
        """Tell a ready variant to unmap KV bytes; they stay booked until it has."""
        assert record.state is State.READY and record.giving is None, f"{record.key} can't give now"
        self.put(record, giving=KvGift(target, size))
        self.effects.append(MoveKv(record.key, target, size))

    def strike(
        self, record: VariantRecord, reason: str, *, fatal: bool, served: bool = False
    ) -> VariantRecord:
        """Count a failure: of a load, or (served) of a worker that was loaded. If it is fatal or one too
        many, who waits is refused and a pause begins."""
        rule = self.policy.failures
        if served:
            record = self.put(record, crashes_s=rule.struck(record.crashes_s, self.now_s))
        else:
            record = self.put(record, strikes_s=rule.struck(record.strikes_s, self.now_s))
        if not (fatal or rule.out(record.failures_s, self.now_s)):
            return record
        failure = Failure(reason, rule.retry_at_s(record.failures_s, self.now_s))
        self.refuse_group(record.key, RefusalKind.LOAD_FAILED, failure.retry_at_s - self.now_s, detail=reason)
        return self.put(record, failure=failure)

    def unusable(self, record: VariantRecord, reason: str) -> None:
        """Its files can't be loaded: a load that has failed before it began."""
        record = self.put(record, strikes_s=self.policy.failures.struck(record.strikes_s, self.now_s))
        retry_at_s = self.policy.failures.retry_at_s(record.failures_s, self.now_s)
        self.put(record, life=fail(record.life, self.now_s, reason, retry_at_s))

    def gone(self, record: VariantRecord, *, lost: bool) -> None:
        """A process that was told to end has ended; one that is lost has not, and its bytes stay booked."""
        end = self.ledger.lose if lost else self.ledger.release
        self.ledger = end(record.key)
        timings = replace(record.timings, unload_s=self.now_s - record.life.since_s)
        self.finish(record.operations)
        if record.relimited:
            record = self.put(record, measured=None, relimited=False)
        if record.failure is not None and record.key not in self.queue:
            failed = fail(record.life, self.now_s, record.failure.reason, record.failure.retry_at_s)
            self.put(record, life=failed, failure=None, timings=timings, operations=())
            return
        record = self.enter(record, State.UNLOADED, failure=None, timings=timings, operations=())
        if record.key in self.queue:  # also those who came when the pause was over, but its process was not
            self.enter(record, State.QUEUED)
