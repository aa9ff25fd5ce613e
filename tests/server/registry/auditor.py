"""What must be true of the registry after every event, checked against what really happened.

Purpose: an account of its own of leases, waiters, processes and bytes, kept from events and effects alone.
Does not know: how the registry decides.
Invariant: the first broken rule raises AssertionError.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from memory_efficient_gpt_server.registry.effects import (
    Abort,
    AbortReason,
    Effect,
    Finish,
    GrantLease,
    GrowKv,
    MoveKv,
    RefusalKind,
    Refuse,
    StartLoad,
    StartSleep,
    StartUnload,
    StartWake,
    UnloadReason,
)
from memory_efficient_gpt_server.registry.events import (
    AdminLoad,
    AdminUnload,
    AdminWake,
    Asked,
    BudgetPatched,
    Event,
    KvMoved,
    KvWanted,
    LeaseReleased,
    Left,
    Loaded,
    Patched,
    ProcessGone,
    Removed,
    Slept,
    Tick,
    UnloadMode,
    Woke,
    WorkerDied,
)
from memory_efficient_gpt_server.registry.kv_room import kv_bytes
from memory_efficient_gpt_server.registry.ledger import Stage
from memory_efficient_gpt_server.registry.records import RegistryState
from memory_efficient_gpt_server.registry.states import State
from memory_efficient_gpt_server.registry.variants import VariantKey
from tests.server.registry.audited_failures import Failures
from tests.server.registry.audited_line import Line
from tests.server.registry.audited_swaps import Swaps
from tests.server.registry.fake_workers import FakeWorkers
from tests.server.registry.kv_rules import at_limit, beyond_limit, check_spared

MEASURES = (Loaded, Woke, Slept, ProcessGone, KvMoved, BudgetPatched)
"""Events that tell the ledger what is, so that it may show more than the budget."""
BUSY_STATES = frozenset({State.LOADING, State.SLEEPING, State.WAKING, State.DRAINING, State.UNLOADING})


@dataclass(slots=True)
class Auditor:
    """Its own books. longest_use_s: no lease is held longer; tick_s: time between ticks at most."""

    workers: FakeWorkers
    longest_use_s: float
    tick_s: float
    waiting: dict[int, tuple[VariantKey, float]] = field(default_factory=dict)
    """Waiter or operation -> its variant and the latest time for its answer."""
    leases: dict[int, VariantKey] = field(default_factory=dict)
    ready_s: dict[VariantKey, float] = field(default_factory=dict)
    over_since_s: dict[str, float] = field(default_factory=dict)
    may_evict: set[int] = field(default_factory=set)
    """Of those who ever waited, those for whom others may leave."""
    relimited: set[VariantKey] = field(default_factory=set)
    beyond_since_s: dict[VariantKey, float] = field(default_factory=dict)
    line: Line = field(default_factory=Line)
    failures: Failures = field(default_factory=Failures)
    swaps: Swaps = field(default_factory=Swaps)
    counts: Counter[str] = field(default_factory=Counter)

    def expect(self, waiter: int, key: VariantKey, deadline_s: float) -> None:
        """Somebody asks and must be answered by then."""
        assert waiter not in self.waiting, "an id was used twice"
        self.waiting[waiter] = (key, deadline_s)

    def before(self, event: Event, now_s: float) -> None:
        """Book what the event itself does."""
        phases = {key: worker.phase for key, worker in self.workers.workers.items()}
        self.failures.before(event, phases, now_s)
        match event:
            case Asked(waiter) | AdminWake(waiter):
                self.may_evict.add(waiter)
            case AdminLoad(operation, may_evict=True):
                self.may_evict.add(operation)
            case LeaseReleased(lease, _):
                self.leases.pop(lease, None)
            case Removed():
                self.counts["removals"] += 1
            case Left(waiter, _):
                self.waiting.pop(waiter, None)
                self.leases.pop(waiter, None)
            case Loaded(key, _) | Woke(key, _):
                self.ready_s[key] = -1.0
            case _:
                pass

    def effect(
        self, effect: Effect, event: Event, old: RegistryState, new: RegistryState, now_s: float
    ) -> None:
        """One effect, in its order."""
        match effect:
            case GrantLease(waiter, key):
                self._answered(waiter, now_s)
                assert self.workers.workers[key].phase == "ready", f"a lease on {self.workers.workers[key]}"
                self.leases[waiter] = key
            case Refuse(waiter, kind, retry_s):
                key, _ = self.waiting[waiter]
                self._answered(waiter, now_s)
                if kind is RefusalKind.LOAD_FAILED:
                    self.failures.check_refusal(key, retry_s, new.policy.failures, now_s)
                self.counts[f"refused: {kind}"] += 1
            case Finish(operation):
                self._answered(operation, now_s)
            case Abort(lease, key, reason):
                assert self.leases.pop(lease) == key, "the lease was another model's"
                self._check_abort(key, reason, event, old, now_s)
            case StartUnload(key, reason) | StartSleep(key, reason):
                self._check_dismissal(key, reason, old, new, now_s)
                self._check_wanted(key, reason, event, old)
                if reason is UnloadReason.BUDGET:
                    self.swaps.left(key, new)
            case StartWake(key, size):
                self.swaps.started(key, new, now_s)
                self._check_waking(key, size, new)
            case GrowKv(key, _):
                self._check_growth(key, event, new)
            case MoveKv(source, _, size):
                self._check_gift(source, size, event, old, new)
            case StartLoad(key, _):
                self.swaps.started(key, new, now_s)
                assert any(k == key for k, _ in self.waiting.values()), f"{key} is loaded for nobody"
        self.counts[type(effect).__name__] += 1

    def after(self, event: Event, old: RegistryState, new: RegistryState, now_s: float) -> None:
        """The new state against the books and the machine."""
        new.check_integrity()
        if isinstance(event, Removed) and event.model_id not in new.entries:
            self.counts["removed"] += 1
            assert all(key.model_id != event.model_id for key in new.records), "a record of no model is left"
            assert all(key.model_id != event.model_id for key in self.workers.workers), "a process is left"
        if isinstance(event, Patched) and event.estimates:
            self._note_limits(event, new)
        self.swaps.after(new)
        self.failures.after(event, old, new)
        self._check_leases(new)
        self._check_kv_limits(event, new, now_s)
        self._check_waiters(new, now_s)
        self._check_drains(old, new, now_s)
        for device in new.ledger.budgets:
            self._check_device(device, event, old, new, now_s)
        for key, ready_s in self.ready_s.items():
            if ready_s < 0:
                self.ready_s[key] = now_s

    def check_not_stuck(self, state: RegistryState, now_s: float) -> None:
        """If nothing moves and nobody uses anything, nobody may be waiting for what could be loaded.

        Without this, refusals at the deadline would hide a registry that has come to a standstill.
        """
        if not state.queue.groups or self.leases:
            return
        for record in state.records.values():
            entry = state.entries[record.key.model_id]
            young = now_s - record.resident_since_s < entry.min_residency_s
            if record.giving is not None or record.recovering or record.state in BUSY_STATES:
                return
            if record.state is State.READY and young:
                return
        raise AssertionError(f"nothing moves and yet {list(map(str, state.queue.groups))} wait")

    def check_empty(self, state: RegistryState) -> None:
        """Everything was unloaded: nobody has a byte, nobody waits, no process is left."""
        assert not self.waiting, f"never answered: {self.waiting}"
        assert not self.leases, f"never ended: {self.leases}"
        assert not self.workers.workers, f"still there: {self.workers.workers}"
        assert not state.ledger.entries, f"bytes are left: {state.ledger.entries}"
        assert not state.queue.groups, "a queue for nothing is left"
        assert not any(state.ledger.used.values()) and not any(state.ledger.freeing.values())

    def check_first_in_line(self, state: RegistryState, now_s: float) -> None:
        """The group that is first in line and has lost patience is loaded soon, however busy others are.

        Soon: after a load under way, the longest use and residency of victims, their unloading, and a churn
        window.
        """
        bound_s = self.longest_use_s + 30.0 + 2 * self.tick_s + state.policy.churn_window_s
        self.line.check(state, now_s, bound_s)

    # ---- rules

    def _answered(self, waiter: int, now_s: float) -> None:
        assert waiter in self.waiting, f"{waiter} is answered twice, or did not ask"
        _, deadline_s = self.waiting.pop(waiter)
        assert now_s <= deadline_s, f"{waiter} is answered {now_s - deadline_s:.1f} s too late"

    def _check_abort(
        self, key: VariantKey, reason: AbortReason, event: Event, old: RegistryState, now_s: float
    ) -> None:
        self.counts[f"aborted: {reason}"] += 1
        match reason:
            case AbortReason.ADMIN:
                assert isinstance(event, AdminUnload) and event.mode is UnloadMode.ABORT and event.key == key
            case AbortReason.WORKER_DIED:
                assert isinstance(event, WorkerDied) and event.key == key
            case AbortReason.DRAIN_DEADLINE:
                if isinstance(event, AdminUnload) and event.key == key:
                    return  # a deadline of 0 s
                deadline_s = old.records[key].drain_deadline_s
                assert deadline_s is not None and deadline_s <= now_s, "a stream was cut before its deadline"

    def _check_dismissal(
        self, key: VariantKey, reason: UnloadReason, old: RegistryState, new: RegistryState, now_s: float
    ) -> None:
        """A dismissed model has no lease; what pins and residency promise is kept."""
        assert key not in self.leases.values(), f"{key} is dismissed ({reason}) under someone's lease"
        self.counts[f"dismissed: {reason}"] += 1
        if reason not in (UnloadReason.BUDGET, UnloadReason.TTL):
            return
        entry = new.entries[key.model_id]
        assert not (entry.pinned and key == VariantKey(key.model_id)), (
            f"{key} is pinned and goes for {reason}"
        )
        if reason is UnloadReason.BUDGET and old.records[key].state not in (State.SLEEPING, State.ASLEEP):
            resident_s = now_s - self.ready_s[key]
            assert resident_s >= entry.min_residency_s, f"{key} was evicted after {resident_s} s"
        if reason is UnloadReason.BUDGET and old.records[key].state is State.READY:
            check_spared(key, old, new)

    def _check_wanted(self, key: VariantKey, reason: UnloadReason, event: Event, old: RegistryState) -> None:
        """Nobody goes for those who wanted nobody to: somebody waits who did not mind."""
        if reason is UnloadReason.BUDGET:
            others = [waiter for waiter, (wanted, _) in self.waiting.items() if wanted != key]
            assert not self.may_evict.isdisjoint(others), f"{key} goes though nobody may for those who wait"
        if reason is UnloadReason.OVERCOMMIT and isinstance(event, Loaded | Woke) and event.key != key:
            waiters = [waiter for waiter, (wanted, _) in self.waiting.items() if wanted == event.key]
            over = any(old.ledger.overcommitted_bytes(device) for device in old.ledger.budgets)
            spared = waiters and self.may_evict.isdisjoint(waiters) and not over
            assert not spared, f"{key} goes for {event.key}, which took too much, and nobody may for that"

    def _check_growth(self, key: VariantKey, event: Event, new: RegistryState) -> None:
        """Nobody grows beyond its limits, nor takes what a load waits for."""
        record, hard = new.records[key], new.entries[key.model_id].kv_hard_limit_bytes
        most = record.needs.kv_most_bytes
        assert most is not None, f"{key} can't grow"
        assert kv_bytes(new.ledger, key) <= min(most, most if hard is None else hard), f"{key} grew too far"
        if isinstance(event, KvWanted):
            assert not new.queue.groups, f"{key} took free bytes while a load waits"
        self.counts["grown by another's bytes"] += isinstance(event, KvMoved)

    def _check_waking(self, key: VariantKey, size: int, new: RegistryState) -> None:
        """Nobody wakes with KV memory that was not booked, or more than a load takes and it keeps."""
        needs, entry = new.records[key].needs, new.entries[key.model_id]
        soft, hard = entry.kv_soft_limit_bytes, entry.kv_hard_limit_bytes
        assert kv_bytes(new.ledger, key) == size, f"{key} wakes with {size} KV bytes that are not booked"
        if needs.kv_least_bytes is not None:
            self.counts["woke with less KV than loaded"] += size < needs.kv_bytes
            if hard is not None:
                assert size <= max(hard, needs.kv_least_bytes), f"{key} wakes with {size}, beyond its limit"
            if key not in self.relimited:  # what it kept when it fell asleep may have been more than now
                assert size <= max(needs.kv_bytes, needs.kv_least_bytes, soft or 0), (
                    f"{key} wakes with {size}"
                )

    def _check_gift(
        self, source: VariantKey, size: int, event: Event, old: RegistryState, new: RegistryState
    ) -> None:
        """A giver keeps its soft limit, unless its hard limit is less, and gives to one at a time."""
        record, before, entry = new.records[source], old.records[source], new.entries[source.model_id]
        needs, soft, hard = record.needs, entry.kv_soft_limit_bytes, entry.kv_hard_limit_bytes
        assert needs.kv_least_bytes is not None, f"{source} can't give"
        kept = needs.kv_bytes if soft is None else soft
        kept = max(needs.kv_least_bytes, kept if hard is None else min(kept, hard))
        assert size > 0 and kv_bytes(new.ledger, source) - size >= kept, f"{source} must keep {kept}"
        answered = isinstance(event, KvMoved) and event.source == source
        assert before.giving is None or answered, f"{source} gives twice at a time"
        self.counts["gave KV in use"] += bool(record.leases)

    def _note_limits(self, event: Patched, new: RegistryState) -> None:
        self.counts["limits changed"] += 1
        self.relimited |= set(event.estimates)
        for key in event.estimates:
            record = new.records.get(key)
            self.counts["limits changed below what is held"] += (
                record is not None and beyond_limit(new, record) > 0
            )

    def _check_kv_limits(self, event: Event, new: RegistryState, now_s: float) -> None:
        """Who has more KV memory than its hard limit is giving it back, and has when nobody uses it any more.

        A worker may give less than it was told to: an idle one is asked again at the next tick.
        """
        for key, record in new.records.items():
            if record.state is not State.READY or beyond_limit(new, record) <= 0:
                self.beyond_since_s.pop(key, None)
                continue
            asked = record.giving is not None or record.kv_floor_bytes > 0
            assert asked, (
                f"{key} has {beyond_limit(new, record)} KV bytes too many and was not asked for them"
            )
            if record.leases:
                self.beyond_since_s.pop(key, None)
                continue
            told = record.giving is not None or not isinstance(event, Tick)
            assert told, f"{key} is idle beyond its limit, and is not asked again"
            since_s = self.beyond_since_s.setdefault(key, now_s)
            bound_s = 12 * (self.tick_s + 2.0)
            assert now_s - since_s <= bound_s, f"{key} is idle beyond its limit for {now_s - since_s:.1f} s"
        if isinstance(event, KvMoved) and (giver := new.records.get(event.source)) is not None:
            self.counts["gave up what is beyond its limit"] += event.source in self.relimited and bool(
                giver.state is State.READY and at_limit(new, giver)
            )

    def _check_drains(self, old: RegistryState, new: RegistryState, now_s: float) -> None:
        """Models in use are drained for others only after patience, and are cut when a deadline says so."""
        for key, record in new.records.items():
            if record.state is not State.DRAINING:
                continue
            deadline_s = record.drain_deadline_s
            assert deadline_s is None or now_s < deadline_s, f"{key} drains past its deadline"
            began = old.records[key].state is State.READY
            if began and record.drain_for is not None:
                patience_s = new.policy.patience_s
                assert new.queue.impatient(record.drain_for, now_s, patience_s), f"{key} drains too early"
                self.counts["drained for another model"] += 1

    def _check_leases(self, new: RegistryState) -> None:
        total = 0
        for record in new.records.values():
            total += len(record.leases)
        assert total == len(self.leases), "the registry counts other leases than there are"
        for lease, key in self.leases.items():
            assert lease in new.records[key].leases, f"lease {lease} of {key} is lost"

    def _check_waiters(self, new: RegistryState, now_s: float) -> None:
        for waiter, (key, deadline_s) in self.waiting.items():
            assert now_s <= deadline_s, f"{waiter} waits for {key} since {now_s - deadline_s:.1f} s too long"
        queued = sum(map(len, new.queue.groups.values()))
        told_later = sum(len(r.operations) + len(r.sleepers) for r in new.records.values())
        assert queued + told_later == len(self.waiting), "somebody who waits is forgotten"

    def _check_device(
        self, device: str, event: Event, old: RegistryState, new: RegistryState, now_s: float
    ) -> None:
        used, held = new.ledger.used[device], self.workers.held_bytes(device)
        assert used >= held, f"{device}: {held} bytes are in use and {used} are booked"
        grew = used > old.ledger.used[device]
        if grew and not isinstance(event, MEASURES):
            assert new.ledger.available_bytes(device) >= 0, f"{device}: reserved beyond the budget"
        over_bytes = new.ledger.overcommitted_bytes(device)
        if over_bytes > old.ledger.overcommitted_bytes(device):
            assert isinstance(event, MEASURES), f"{device} is overcommitted by {type(event).__name__}"
            self.counts["overcommitted"] += 1
        if over_bytes == 0 or self._explained(device, new):
            self.over_since_s.pop(device, None)
            return
        since_s = self.over_since_s.setdefault(device, now_s)
        bound_s = 2 * self.longest_use_s + 30.0 + 4 * self.tick_s
        assert now_s - since_s <= bound_s, f"{device} is overcommitted for {now_s - since_s:.1f} s"

    def _explained(self, device: str, state: RegistryState) -> bool:
        """Whether leaks and pinned models alone are more than the budget: then nothing can be done."""
        fixed = 0
        for owner, entries in state.ledger.entries.items():
            record = state.records[owner] if isinstance(owner, VariantKey) else None
            stays = record is None or (
                state.entries[record.key.model_id].pinned and owner == VariantKey(record.key.model_id)
            )
            for e in entries:
                if e.device == device and (stays or e.stage is Stage.LEAKED):
                    fixed += e.bytes
        return fixed > state.ledger.budgets[device].total_bytes


def deadline_of(event: Asked, now_s: float, max_wait_s: float, tick_s: float) -> float:
    """When an asker must have its answer at the latest."""
    wait_s = max_wait_s if event.wait_s is None else min(event.wait_s, max_wait_s)
    return now_s + wait_s + tick_s + 1e-6
