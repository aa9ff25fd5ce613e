"""Everything the registry knows, as one frozen value.

Purpose: the state that `step` takes and gives, and the view of it that planning needs.
Does not know: how it changes.
Invariant: a record without a process has no leases and no bytes but leaked ones (`check_integrity`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Protocol

from memory_efficient_gpt_server.registry.ledger import Budget, Ledger, Stage
from memory_efficient_gpt_server.registry.load_queue import ChurnGuard, FailureRule, LoadQueue
from memory_efficient_gpt_server.registry.states import HAS_PROCESS, Life, State
from memory_efficient_gpt_server.registry.variants import Estimate, ModelEntry, VariantKey


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """Bounds and rates. Times in seconds.

    max_wait_s: longest that anyone waits for a model. patience_s: how long a group waits before models in use
    are drained for it. max_waiters: more are refused. max_loads: loads and wake-ups at a time. most_swaps
    within churn_window_s: see ChurnGuard. most_records: variants whose history is kept, as clients choose
    options and there is no end of variants; one with a process is never forgotten. load_bytes_per_s,
    wake_bytes_per_s, unload_s: guesses until something was measured.
    """

    max_wait_s: float = 300.0
    patience_s: float = 20.0
    max_waiters: int = 512
    max_loads: int = 2
    most_swaps: int = 20
    churn_window_s: float = 120.0
    most_records: int = 256
    failures: FailureRule = field(default_factory=FailureRule)
    load_bytes_per_s: float = 1e9
    wake_bytes_per_s: float = 1e10
    unload_s: float = 2.0


@dataclass(frozen=True, slots=True)
class Timings:
    """How long the last load and so on of a variant took, in seconds; None: not measured yet."""

    load_s: float | None = None
    wake_s: float | None = None
    unload_s: float | None = None


@dataclass(frozen=True, slots=True)
class Failure:
    """What a variant becomes once its process is gone."""

    reason: str
    retry_at_s: float


@dataclass(frozen=True, slots=True)
class KvGift:
    """KV bytes that a worker was told to unmap. target: who gets them; None: whoever reserves them next."""

    target: VariantKey | None
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class VariantRecord:
    """One variant as the registry sees it. Times in seconds of the caller's clock.

    measured: what it really took when it was last loaded; the next load reserves that. leases: ids of those
    who use it. last_used_s: when the last lease was granted or released. resident_since_s: when it last
    became ready. strikes_s: its recent failed loads; one that succeeds clears them. crashes_s: when its
    workers were given up while they served. failure: set while a failed process is being ended. recovering:
    its worker has died and the next one is not ready yet. drain_for: the variant it is drained in favour of.
    yields_to: the one that it left for, as long as that waits to be loaded: the room is that one's.
    drain_deadline_s: when its leases are aborted (an administrator's wish). operations: administrators to be
    told when its process is gone. sleepers: those to be told when it is asleep. giving: what it is giving
    away now. kv_floor_bytes: below which its KV cache could not go when it was last asked and not used since;
    0: not known. kv_wanted_s: when it last wanted more KV memory. kv_on_waking_bytes: what its KV cache will
    have after its sleep; None: it never slept. relimited: whether limits of its KV cache were
    changed since its process began, so that what was measured of that is not what the next one takes.
    """

    key: VariantKey
    estimate: Estimate
    measured: Estimate | None = None
    life: Life = field(default_factory=Life)
    leases: frozenset[int] = frozenset()
    last_used_s: float = 0.0
    resident_since_s: float = 0.0
    timings: Timings = field(default_factory=Timings)
    strikes_s: tuple[float, ...] = ()
    crashes_s: tuple[float, ...] = ()
    failure: Failure | None = None
    recovering: bool = False
    drain_for: VariantKey | None = None
    yields_to: VariantKey | None = None
    drain_deadline_s: float | None = None
    operations: tuple[int, ...] = ()
    sleepers: tuple[int, ...] = ()
    giving: KvGift | None = None
    kv_floor_bytes: int = 0
    kv_wanted_s: float | None = None
    kv_on_waking_bytes: int | None = None
    relimited: bool = False

    @property
    def state(self) -> State:
        """Where it is in its life."""
        return self.life.state

    @property
    def serves(self) -> bool:
        """Whether a request could be computed now."""
        return self.state is State.READY and not self.recovering

    @property
    def failures_s(self) -> tuple[float, ...]:
        """All its failures, the oldest first."""
        return tuple(sorted(self.strikes_s + self.crashes_s))

    @property
    def needs(self) -> Estimate:
        """The best knowledge of what it takes when it is loaded."""
        return self.measured or self.estimate

    @property
    def needs_awake_again(self) -> Estimate:
        """What it takes once it has woken: its KV cache may have another size than when it was loaded."""
        kv_bytes = self.kv_on_waking_bytes
        return self.needs if kv_bytes is None else replace(self.needs, kv_bytes=kv_bytes)


class RegistryView(Protocol):
    """What planning reads. RegistryState is one; so is a step's unfinished work."""

    @property
    def policy(self) -> Policy: ...
    @property
    def entries(self) -> Mapping[str, ModelEntry]: ...
    @property
    def records(self) -> Mapping[VariantKey, VariantRecord]: ...
    @property
    def ledger(self) -> Ledger: ...
    @property
    def queue(self) -> LoadQueue: ...
    @property
    def churn(self) -> ChurnGuard: ...


@dataclass(frozen=True, slots=True)
class RegistryState:
    """All of it. `entries` by model id."""

    policy: Policy
    entries: Mapping[str, ModelEntry]
    records: Mapping[VariantKey, VariantRecord]
    ledger: Ledger
    queue: LoadQueue
    churn: ChurnGuard

    @classmethod
    def initial(
        cls,
        budgets: Mapping[str, Budget],
        entries: Mapping[str, ModelEntry] = MappingProxyType({}),
        policy: Policy | None = None,
    ) -> RegistryState:
        """Nothing is loaded and nobody waits."""
        policy = policy or Policy()
        churn = ChurnGuard(policy.most_swaps, policy.churn_window_s)
        return cls(policy, dict(entries), {}, Ledger.empty(budgets), LoadQueue(), churn)

    def check_integrity(self) -> None:
        """Prove that states, leases, queue and ledger tell the same story. Raises AssertionError."""
        self.ledger.check_integrity()
        for record in self.records.values():
            _check_record(record, self.ledger)
            waited = record.key in self.queue
            if record.state is State.QUEUED:
                assert waited, f"{record.key} is queued for nobody"
            elif record.serves or record.state in (State.UNLOADED, State.FAILED):
                assert not waited, f"{record.key} is {record.state} and someone waits for it"
        for owner in self.ledger.entries:
            assert owner in self.records or isinstance(owner, str), f"{owner} has bytes and no record"
        ids = [w.id for group in self.queue.groups.values() for w in group]
        ids += [lease for record in self.records.values() for lease in record.leases]
        assert len(ids) == len(set(ids)), "someone waits or holds a lease twice"
        assert all(group for group in self.queue.groups.values()), "a group is empty"
        assert all(key in self.records for key in self.queue.groups), "a group waits for an unknown variant"


def _check_record(record: VariantRecord, ledger: Ledger) -> None:
    state, stages = record.state, {e.stage for e in ledger.of(record.key)}
    if record.leases:
        assert state in (State.READY, State.DRAINING), f"{record.key} is {state} and has leases"
    if record.recovering:
        assert state in (State.READY, State.DRAINING), f"{record.key} is {state} and recovers"
    if record.giving is not None:
        assert state in (State.READY, State.DRAINING), f"{record.key} is {state} and gives KV bytes"
    if state not in HAS_PROCESS:
        assert stages <= {Stage.LEAKED}, f"{record.key} is {state} and has bytes: {stages}"
        return
    if state is State.UNLOADING:
        assert stages <= {Stage.FREEING, Stage.LEAKED}, f"{record.key} is unloading and has {stages}"
    elif state in (State.READY, State.DRAINING, State.ASLEEP):
        assert Stage.FREEING not in stages, f"{record.key} is {state} and frees bytes"
    assert stages - {Stage.LEAKED}, f"{record.key} is {state} and has no bytes"
    assert record.failure is None or state is State.UNLOADING, f"{record.key} is {state} and has failed"
    assert record.drain_for is None or state is State.DRAINING, f"{record.key} is {state} and drains"
