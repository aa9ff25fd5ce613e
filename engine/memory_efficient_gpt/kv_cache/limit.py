"""How much of a KV pool may be in memory, changed while it is used.

Purpose: let a pool grow into the address space that it reserved, and shrink again without losing a sequence.
Does not know: who else wants the memory; when blocks are short.
Invariant: a block in use is never taken; the limit never falls below one sequence of full length, so that
whatever was accepted can be computed; memory above the limit is given back before the new limit is told.
"""

from __future__ import annotations

import math
import sys
from typing import Final

import torch

from memory_efficient_gpt.kv_cache.blocks import BlockAllocator
from memory_efficient_gpt.kv_cache.pool import KVPool

WASTE: Final = 0.125
"""Share of a limit that pages may take in vain before the prefix cache is given up for them. Only small
models have several blocks in a page."""


def can_move(device: torch.device) -> bool:
    """Whether memory of a pool on `device` can be given back and taken again."""
    return device.type == "cpu" and sys.platform == "linux"


class KVLimit:
    """The limit of one pool, in bytes that include the trash block. Owned by the engine's thread.

    num_blocks: usable ones at the start, the trash block included. max_len: tokens of the longest sequence.
    """

    def __init__(self, pool: KVPool, allocator: BlockAllocator, num_blocks: int, max_len: int) -> None:
        self._pool = pool
        self._allocator = allocator
        self._least = math.ceil(max_len / pool.block_size)
        allocator.set_limit(num_blocks - 1)
        allocator.take_withheld()  # nobody wrote them: there is nothing to give back

    @property
    def least_bytes(self) -> int:
        """Below this it never falls."""
        return (self._least + 1) * self._pool.block_bytes

    @property
    def most_bytes(self) -> int:
        """Address space: above this it never grows."""
        return self._pool.num_bytes

    @property
    def held_bytes(self) -> int:
        """What the pool can have in memory now."""
        return self._pool.most_resident_bytes(self._allocator.withheld())

    def set(self, num_bytes: int) -> int:
        """Let the pool have `num_bytes`, or the nearest that it can; returns what it can have in memory now.

        It shrinks as far as blocks in use allow: free blocks go first, then cached ones, and some more where
        pages of small blocks would else hold more than `num_bytes`. All of it is done when this returns.
        """
        floor = max(self._least, self._allocator.num_used)
        limit = max(num_bytes // self._pool.block_bytes - 1, floor)
        self._apply(min(limit, self._pool.num_blocks - 1))
        if self.held_bytes > (1 + WASTE) * max(num_bytes, (floor + 1) * self._pool.block_bytes):
            self._compact()
        while (excess := self.held_bytes - num_bytes) > 0 and self._allocator.limit > floor:
            fewer = math.ceil(excess / self._pool.block_bytes)
            self._apply(max(floor, self._allocator.limit - fewer))
        return self.held_bytes

    def _apply(self, limit: int) -> None:
        self._allocator.set_limit(limit)
        if self._allocator.take_withheld():
            self._pool.give_back(self._allocator.withheld())  # all: a page may hold one of earlier times

    def _compact(self) -> None:
        """Keep low numbers instead of the cached blocks, which lie scattered and hold pages of others."""
        limit = self._allocator.limit
        self._allocator.clear_cache()
        self._allocator.set_limit(self._pool.num_blocks - 1)
        self._apply(limit)
