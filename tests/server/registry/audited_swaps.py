"""The auditor's account of models that left for others.

Purpose: prove that no swap was for nothing.
Does not know: for whom a model left; it sees who waited when it did.
Invariant: as the auditor's: the first broken rule raises AssertionError.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from memory_efficient_gpt_server.registry.planning import needed_amounts
from memory_efficient_gpt_server.registry.records import RegistryState, VariantRecord
from memory_efficient_gpt_server.registry.states import State
from memory_efficient_gpt_server.registry.variants import Amount, VariantKey, per_device

_WAITING = (State.QUEUED, State.ASLEEP)


@dataclass(slots=True)
class Swaps:
    """left_for: variants that left for others since anything was last started, and the groups that waited
    to be loaded then, or None if one of those has gone since: it may have been the one."""

    left_for: dict[VariantKey, frozenset[VariantKey] | None] = field(default_factory=dict)
    _started: set[VariantKey] = field(default_factory=set)

    def left(self, key: VariantKey, new: RegistryState) -> None:
        """It was told to leave for another one."""
        waiting = [k for k in new.queue.groups if k != key and new.records[k].state in _WAITING]
        self.left_for[key] = frozenset(waiting) or None

    def started(self, key: VariantKey, new: RegistryState, now_s: float) -> None:
        """It is being loaded or woken. If it had left for others, these may not have been able to: one of
        those that come before it by priority anyway, or all, since any may be the one that it left for."""
        waiting = self.left_for.get(key) or frozenset()
        if any(k not in new.queue for k in waiting):  # refused in this very step
            waiting = frozenset()
        able = [other for other in waiting if self._could_have(other, key, new, now_s)]
        own = new.entries[key.model_id].priority
        overtaken = [other for other in able if new.entries[other.model_id].priority >= own]
        assert not overtaken and (not able or len(able) < len(waiting)), (
            f"{key} left for others and comes back before {(overtaken or able)[0]}, which could have been "
            "loaded"
        )
        self._started.add(key)

    def after(self, new: RegistryState) -> None:
        """All effects of a step were told."""
        if self._started:
            self.left_for.clear()
            self._started.clear()
        for key, waiting in self.left_for.items():
            if waiting is not None and any(k not in new.queue for k in waiting):
                self.left_for[key] = None

    def _could_have(self, other: VariantKey, key: VariantKey, new: RegistryState, now_s: float) -> bool:
        """Whether `other` would have had room where `key` was started, and was not overtaken in patience."""
        record, started = new.records[other], new.records[key]
        if record.state not in _WAITING or self._overtaken(other, key, new, now_s):
            return False
        taken = per_device(_taken(started))
        needed = per_device(needed_amounts(record, record.needs))
        return all(n <= new.ledger.available_bytes(d) + taken.get(d, 0) for d, n in needed.items())

    def _overtaken(self, other: VariantKey, key: VariantKey, new: RegistryState, now_s: float) -> bool:
        queue, patience_s = new.queue, new.policy.patience_s
        impatient = queue.impatient(key, now_s, patience_s)
        if not impatient:
            return False
        return (
            not queue.impatient(other, now_s, patience_s)
            or queue.of(key)[0].asked_s < queue.of(other)[0].asked_s
        )


def _taken(record: VariantRecord) -> tuple[Amount, ...]:
    awake = record.state is State.WAKING
    return record.needs_awake_again.to_wake() if awake else record.needs.awake()
