"""Who is admitted next: fair between clients, first come first served within one. No torch.

Purpose: the scheduler's queue of sequences without KV blocks.
Does not know: blocks, budgets.
Invariant: a client that has been served less (in weighted tokens) goes before one that was served more.

Fairness follows the virtual token counter of Sheng et al., "Fairness in Serving Large Language
Models" (2024), section 4: a client's counter grows by what it is served, and a client that comes
back from idleness is lifted to the least counter of those active, so that nobody saves up credit.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Final

from memory_efficient_gpt.sequence import Sequence

OUTPUT_TOKEN_WEIGHT: Final = 2
"""An output token costs about twice a prompt token: it needs a pass of its own over the weights."""


class WaitingQueue:
    """Preempted sequences first, oldest first; then new ones, the least-served client's first."""

    def __init__(self) -> None:
        self._preempted: list[Sequence] = []
        self._by_client: dict[str, deque[Sequence]] = {}
        self._served: dict[str, float] = {}
        self._active: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._preempted) + sum(map(len, self._by_client.values()))

    def __iter__(self) -> Iterator[Sequence]:
        yield from self._preempted
        for queue in self._by_client.values():
            yield from queue

    def arrived(self, client: str, num_sequences: int) -> None:
        """Sequences of `client` came in; one that was idle is lifted to the least active counter."""
        if client not in self._active:
            floor = min((self._served[c] for c in self._active), default=0.0)
            self._served[client] = max(self._served.get(client, 0.0), floor)
            self._active[client] = 0
        self._active[client] += num_sequences

    def add(self, seq: Sequence) -> None:
        """Append a new sequence to its client's queue."""
        self._by_client.setdefault(seq.request.client, deque()).append(seq)

    def add_preempted(self, seq: Sequence) -> None:
        """Put back a sequence that lost its blocks: it goes before everything new."""
        self._preempted.append(seq)
        self._preempted.sort(key=lambda s: s.order)

    def peek(self) -> Sequence | None:
        """The sequence to admit next."""
        if self._preempted:
            return self._preempted[0]
        waiting = [client for client, queue in self._by_client.items() if queue]
        if not waiting:
            return None
        return self._by_client[min(waiting, key=lambda c: (self._served[c], self._by_client[c][0].order))][0]

    def remove(self, seq: Sequence) -> None:
        """Take out a sequence that was admitted or aborted."""
        if seq in self._preempted:
            self._preempted.remove(seq)
            return
        queue = self._by_client[seq.request.client]
        if queue[0] is seq:
            queue.popleft()
        else:
            queue.remove(seq)
        if not queue:
            del self._by_client[seq.request.client]

    def charge(self, client: str, *, prompt_tokens: int = 0, output_tokens: int = 0) -> None:
        """Account what a client was served."""
        if client in self._served:
            self._served[client] += prompt_tokens + OUTPUT_TOKEN_WEIGHT * output_tokens

    def finished(self, client: str) -> None:
        """A sequence of `client` ended; an idle client's counter is kept only while it matters."""
        self._active[client] -= 1
        if self._active[client] == 0:
            del self._active[client]
            self._forget_idle()

    def _forget_idle(self) -> None:
        """Drop the counters to which `arrived` would do the same as to none: those not above the floor."""
        floor = min((self._served[c] for c in self._active), default=float("inf"))
        for client in [c for c in self._served if c not in self._active and self._served[c] <= floor]:
            del self._served[client]
