"""What a request costs its engine: KV memory over time, and the time until it was first computed.

Purpose: measure one request that asked for it, as its blocks come and go.
Does not know: sequences, allocators, who pays.
Invariant: a block counts once for a request, however many of its sequences hold it, and in full though
other requests share it; the integral is exact, since it is added up whenever the number of blocks changes.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable

from memory_efficient_gpt.request import Cost


class KvMeter:
    """Measures one request from now on.

    block_bytes: of one KV block in all layers; 0 where the blocks stand for no memory, so that the costs have
    no KV figures. clock: monotonic, in seconds. resumed: whether another engine began the request.
    """

    def __init__(
        self, block_bytes: int, *, resumed: bool = False, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._block_bytes = block_bytes
        self._resumed = resumed
        self._clock = clock
        self._held: Counter[int] = Counter()
        self._peak_blocks = 0
        self._block_seconds = 0.0
        self._since_s = self._submitted_s = clock()
        self._started_s: float | None = None

    def started(self) -> None:
        """The request is being computed; the first call counts."""
        if self._started_s is None:
            self._started_s = self._clock()

    def take(self, blocks: Iterable[int]) -> None:
        """One of its sequences holds these blocks, too."""
        self._add_up()
        self._held.update(blocks)
        self._peak_blocks = max(self._peak_blocks, len(self._held))

    def give(self, blocks: Iterable[int]) -> None:
        """One of its sequences holds these blocks no more."""
        self._add_up()
        for block in blocks:
            self._held[block] -= 1
            assert self._held[block] >= 0, f"block {block} was given back more often than taken"
            if not self._held[block]:
                del self._held[block]

    def cost(self) -> Cost:
        """All up to now."""
        self._add_up()
        started_s = self._since_s if self._started_s is None else self._started_s
        known = self._block_bytes > 0
        return Cost(
            queue_s=started_s - self._submitted_s,
            kv_peak_bytes=self._peak_blocks * self._block_bytes if known else None,
            kv_byte_seconds=self._block_seconds * self._block_bytes if known else None,
            resumed=self._resumed,
        )

    def _add_up(self) -> None:
        now_s = self._clock()
        self._block_seconds += len(self._held) * (now_s - self._since_s)
        self._since_s = now_s
