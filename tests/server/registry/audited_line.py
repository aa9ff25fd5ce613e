"""The auditor's account of who is first in line.

Purpose: prove that whoever is first in line comes to be loaded.
Does not know: why a group is not loaded yet; how long that may take at most.
Invariant: as the auditor's: the first broken rule raises AssertionError.
"""

from __future__ import annotations

from dataclasses import dataclass

from memory_efficient_gpt_server.registry.records import RegistryState
from memory_efficient_gpt_server.registry.states import State
from memory_efficient_gpt_server.registry.variants import VariantKey


@dataclass(slots=True)
class Line:
    """first: the group that was first and without patience, if any; since_s: for how long. oldest: its oldest
    waiter, with whom it has been first since oldest_since_s."""

    first: VariantKey | None = None
    since_s: float = 0.0
    oldest: int = 0
    oldest_since_s: float = 0.0

    def check(self, state: RegistryState, now_s: float, bound_s: float) -> None:
        """Nobody is first for longer than bound_s, and no group for longer than twice that.

        A group's place is that of its oldest waiter: when that one leaves, another group may go first, once.
        """
        order = state.queue.in_order(now_s, state.policy.patience_s, lambda key: 0)
        first = next((k for k in order if state.records[k].state in (State.QUEUED, State.ASLEEP)), None)
        if first is None or not state.queue.impatient(first, now_s, state.policy.patience_s):
            self.first = None
            return
        oldest = state.queue.of(first)[0].id
        if first != self.first:
            self.first, self.since_s = first, now_s
            self.oldest, self.oldest_since_s = oldest, now_s
        elif oldest != self.oldest:
            self.oldest, self.oldest_since_s = oldest, now_s
        waited_s = max(now_s - self.oldest_since_s, (now_s - self.since_s) / 2)
        assert waited_s <= bound_s, f"{first} is first in line for {now_s - self.since_s} s"
