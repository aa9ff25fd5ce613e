"""A KV cache for a model: pool, allocator, and the limit that moves its memory.

Purpose: choose sizes and memory, and make them.
Does not know: models, weights.
Invariant: where memory that moves was asked for and can't be had, the pool keeps its size, and the notes and
the log say why.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from memory_efficient_gpt.config import EngineConfig
from memory_efficient_gpt.kv_cache.blocks import BlockAllocator
from memory_efficient_gpt.kv_cache.cuda_driver import load_driver
from memory_efficient_gpt.kv_cache.cuda_memory import CudaMemory, bytes_on
from memory_efficient_gpt.kv_cache.geometry import LayerKV
from memory_efficient_gpt.kv_cache.host_memory import HostMemory
from memory_efficient_gpt.kv_cache.limit import KVLimit
from memory_efficient_gpt.kv_cache.pool import KVPool
from memory_efficient_gpt.kv_cache.pool_memory import PoolMemory, PoolMemoryError
from memory_efficient_gpt.kv_cache.pool_size import (
    kv_block_size,
    moving_obstacle,
    num_pool_blocks,
    num_reserved_blocks,
    pool_context,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class KVCache:
    """num_blocks: usable ones at the start, the trash block included. max_len: positions of a request.

    limit: None if the pool keeps its size; then, if it should not, notes say why.
    """

    pool: KVPool
    allocator: BlockAllocator
    limit: KVLimit | None
    num_blocks: int
    max_len: int
    notes: tuple[str, ...]

    @property
    def held_bytes(self) -> int:
        """What the pool can have in memory now."""
        return self.pool.num_bytes if self.limit is None else self.limit.held_bytes


def build_cache(
    config: EngineConfig,
    layers: Sequence[LayerKV],
    dtype: torch.dtype,
    device: torch.device,
    *,
    wanted_len: int,
    free_bytes: int,
) -> KVCache:
    """The cache for requests of `wanted_len` positions. free_bytes: on `device`, which an automatic size
    shares.

    Raises ConfigError where there is no room for two blocks, torch.OutOfMemoryError.
    """
    builder = _Builder(config, layers, dtype, device, wanted_len, free_bytes)
    if config.kv_reserve_bytes is None:
        return builder.fixed()
    try:
        return builder.movable()
    except PoolMemoryError as error:
        reason = str(error)
    logger.warning("%s: the KV cache keeps its size: %s", config.model, reason)
    return builder.fixed((keeps_its_size(reason),))


def keeps_its_size(reason: str) -> str:
    """The note of a model whose KV cache should move and can't."""
    return f"the KV cache keeps its size: {reason}"


@dataclass(frozen=True, slots=True)
class _Builder:
    config: EngineConfig
    layers: Sequence[LayerKV]
    dtype: torch.dtype
    device: torch.device
    wanted_len: int
    free_bytes: int

    @property
    def block_size(self) -> int:
        return kv_block_size(self.config, self.device)

    def fixed(self, notes: tuple[str, ...] = ()) -> KVCache:
        num_blocks, max_len, own_notes = self._size(1)
        pool = KVPool(self.layers, num_blocks, self.block_size, self.dtype, self.device)
        return KVCache(pool, self._allocator(num_blocks), None, num_blocks, max_len, (*own_notes, *notes))

    def movable(self) -> KVCache:
        """Raises PoolMemoryError with the reason why not."""
        memory = self._memory()
        granule = memory.granule_bytes
        num_blocks, max_len, notes = self._size(granule)
        reserved = num_reserved_blocks(
            self.config, self.layers, self.block_size, self.dtype, num_blocks, granule
        )
        pool = KVPool(self.layers, reserved, self.block_size, self.dtype, self.device, memory=memory)
        allocator = self._allocator(reserved)
        return KVCache(
            pool, allocator, KVLimit(pool, allocator, num_blocks, max_len), num_blocks, max_len, notes
        )

    def _memory(self) -> PoolMemory:
        self._require_movable(1)
        if self.device.type == "cpu":
            return HostMemory(movable=True)
        memory = CudaMemory(load_driver(self.device), bytes_on(self.device))
        self._require_movable(memory.granule_bytes)
        return memory

    def _require_movable(self, granule: int) -> None:
        reason = moving_obstacle(self.config, self.layers, self.block_size, self.dtype, self.device, granule)
        if reason is not None:
            raise PoolMemoryError(reason)

    def _size(self, granule: int) -> tuple[int, int, tuple[str, ...]]:
        num_blocks = num_pool_blocks(
            self.config, self.layers, self.block_size, self.dtype, self.device, self.wanted_len,
            self.free_bytes, granule,
        )  # fmt: skip
        return num_blocks, *pool_context(num_blocks, self.block_size, self.wanted_len)

    def _allocator(self, num_blocks: int) -> BlockAllocator:
        return BlockAllocator(num_blocks, self.block_size, prefix_cache=self.config.prefix_cache)
