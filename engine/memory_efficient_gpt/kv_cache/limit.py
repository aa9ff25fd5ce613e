"""How much of a KV pool may be in memory, changed while it is used.

Purpose: let a pool grow into the address space that it reserved, and shrink again without losing a sequence.
Does not know: who else wants the memory; when blocks are short; where the memory is.
Invariant: a block in use is never taken, and none is free whose memory is not there; the limit never falls
below one sequence of full length, so that whatever was accepted can be computed; memory above the limit is
given back before the new limit is told.
"""

from __future__ import annotations

import logging
import math
from typing import Final

from memory_efficient_gpt.kv_cache.blocks import BlockAllocator
from memory_efficient_gpt.kv_cache.pool import KVPool
from memory_efficient_gpt.kv_cache.pool_memory import PoolMemoryError

logger = logging.getLogger(__name__)

WASTE: Final = 0.125
"""Share of a limit that pages and granules may take in vain before the prefix cache is given up for them."""


class KVLimit:
    """The limit of one pool, in bytes that include the trash block. Owned by the engine's thread.

    num_blocks: usable ones at the start, the trash block included. max_len: tokens of the longest sequence.
    """

    def __init__(self, pool: KVPool, allocator: BlockAllocator, num_blocks: int, max_len: int) -> None:
        """Raises PoolMemoryError if there is no memory for so many."""
        self._pool = pool
        self._allocator = allocator
        self._least = math.ceil(max_len / pool.block_size)
        allocator.set_limit(num_blocks - 1)
        allocator.take_withheld()
        pool.keep_all_but(allocator.withheld())

    @property
    def least_bytes(self) -> int:
        """Below this it never falls."""
        return self._pool.bytes_of(self._least + 1)

    @property
    def most_bytes(self) -> int:
        """Address space: above this it never grows."""
        return self._pool.bytes_of(self._pool.num_blocks)

    @property
    def held_bytes(self) -> int:
        """What the pool can have in memory now."""
        return self._pool.held_bytes(self._allocator.withheld())

    def set(self, num_bytes: int) -> int:
        """Let the pool have `num_bytes`, or the nearest that it can; returns what it can have in memory now.

        It shrinks as far as blocks in use allow: free blocks go first, then cached ones (on a GPU the highest
        of both), and some more where pages or granules would else hold more than `num_bytes`. All of it is
        done when this returns. If there is no memory to grow by, it stays as it was, and the log says why.
        """
        floor = max(self._least, self._allocator.num_used)
        limit = min(max(self._pool.blocks_within(num_bytes) - 1, floor), self._pool.num_blocks - 1)
        if not self._can_have(limit):
            return self.held_bytes
        self._set_limit(limit)
        if self.held_bytes > (1 + WASTE) * max(num_bytes, self._pool.bytes_of(floor + 1)):
            self._compact()
        while (excess := self.held_bytes - num_bytes) > 0 and self._allocator.limit > floor:
            fewer = math.ceil(excess / self._pool.block_bytes)
            self._set_limit(max(floor, self._allocator.limit - fewer))
        if self._allocator.take_withheld():
            self._pool.keep_all_but(self._allocator.withheld())
        return self.held_bytes

    def restore(self) -> None:
        """Have the pool's memory again after its release. Raises RuntimeError if there is none."""
        self._pool.restore(self._allocator.withheld())

    def _can_have(self, limit: int) -> bool:
        """Have memory for the blocks that `limit` lets be used again, before anybody can get them."""
        returned = set(self._allocator.returned_by(limit))
        if not returned:
            return True
        try:
            self._pool.keep_all_but([block for block in self._allocator.withheld() if block not in returned])
        except PoolMemoryError as error:
            logger.warning(
                "The KV cache stays at %s bytes instead of %s: %s.",
                f"{self.held_bytes:,}", f"{self._pool.bytes_of(limit + 1):,}", error,
            )  # fmt: skip
            return False
        return True

    def _set_limit(self, limit: int) -> None:
        """Where blocks share granules, the least recently used ones would rarely leave a granule free."""
        self._allocator.set_limit(limit, highest_first=self._pool.shares_granules)

    def _compact(self) -> None:
        """Keep low numbers instead of the cached blocks, which lie scattered and hold memory of others.

        Only if less is held then: what must be mapped anew is mapped with what was given up for it.
        """
        limit = self._allocator.limit
        if self._pool.held_bytes(self._allocator.withheld_if_compact(limit)) >= self.held_bytes:
            return
        self._allocator.clear_cache()
        self._allocator.set_limit(self._pool.num_blocks - 1)
        self._allocator.set_limit(limit)
