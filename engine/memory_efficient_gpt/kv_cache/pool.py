"""The tensors behind the KV blocks.

Purpose: lay out one cache a layer, attach it to its attention module, copy blocks.
Does not know: which block belongs to whom; where memory comes from.
Invariant: a block number means the same tokens in every layer.

Letters: N blocks, BS tokens of a block, H kv heads, D head size (key's and value's may differ).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from memory_efficient_gpt.kv_cache.block_sizes import QUANTIZED_DTYPES, BlockSizes
from memory_efficient_gpt.kv_cache.geometry import LayerKV
from memory_efficient_gpt.kv_cache.host_memory import HostMemory
from memory_efficient_gpt.kv_cache.pool_memory import FixedMemory, PoolMemory
from memory_efficient_gpt.uploads import upload


@dataclass(slots=True)
class LayerCache:
    """One layer's part of the KV pool; attached to its attention module as `paged_kv`.

    key `[N, BS, H, Dk]`, value `[N, BS, H, Dv]` (float32, bfloat16, float16, int8 or float8_e4m3fn);
    scales `[N, BS, H] float32` with the last two: x = scale * q, one scale per token and head.
    """

    spec: LayerKV
    key: torch.Tensor
    value: torch.Tensor
    key_scale: torch.Tensor | None = None
    value_scale: torch.Tensor | None = None


class KVPool:
    """One `[N, BS, H, D]` key and value tensor a layer, zero at first.

    memory: of this pool alone; None: of fixed size. With memory that moves, blocks may be used once they are
    kept (`keep_all_but`).
    """

    def __init__(
        self,
        layers: Sequence[LayerKV],
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        memory: PoolMemory | None = None,
    ) -> None:
        """Raises PoolMemoryError or torch.OutOfMemoryError."""
        if memory is None:
            memory = HostMemory() if device.type == "cpu" else FixedMemory(device)
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.dtype = dtype
        self._memory = memory
        self._sizes = BlockSizes(layers, block_size, dtype)
        self._released = False
        self.num_bytes = num_blocks * self._sizes.block_bytes
        self.caches = [_layer_cache(layer, num_blocks, block_size, dtype, memory) for layer in layers]

    @property
    def block_bytes(self) -> int:
        """Bytes of one block over all layers."""
        return self._sizes.block_bytes

    @property
    def granule_bytes(self) -> int:
        """What one granule in every tensor takes: by about as much it grows and shrinks at least."""
        return self._memory.granule_bytes * self._sizes.num_tensors

    @property
    def shares_granules(self) -> bool:
        """Whether memory moves in pieces of many blocks, so that those to be kept should be neighbours."""
        return self._memory.granule_bytes > 1

    def bytes_of(self, num_blocks: int) -> int:
        """What is held for the first `num_blocks` blocks."""
        return self._sizes.bytes_of(num_blocks, self._memory.granule_bytes)

    def blocks_within(self, num_bytes: int) -> int:
        """Most blocks for which no more than `num_bytes` are held."""
        return self._sizes.blocks_within(num_bytes, self._memory.granule_bytes)

    def attach(self, model: nn.Module) -> None:
        """Give each attention module its cache as `paged_kv` (a plain attribute: not saved, not moved)."""
        for cache in self.caches:
            object.__setattr__(model.get_submodule(cache.spec.module), "paged_kv", cache)

    def copy_blocks(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy whole blocks (source, target) in every layer; targets are overwritten."""
        device = self.caches[0].key.device
        source, target = upload(np.asarray(copies, dtype=np.int64).T, device)
        for cache in self.caches:
            for tensor in (cache.key, cache.value, cache.key_scale, cache.value_scale):
                if tensor is not None:
                    bits = tensor.view(torch.uint8) if tensor.dtype is torch.float8_e4m3fn else tensor
                    bits[target] = bits[source]

    def tensors(self) -> list[torch.Tensor]:
        """All tensors of all layers."""
        parts = ((c.key, c.value, c.key_scale, c.value_scale) for c in self.caches)
        return [tensor for layer in parts for tensor in layer if tensor is not None]

    def release(self) -> int:
        """Give back all memory, the trash block's too; returns the bytes. Content is lost.

        Nothing may touch the pool until `restore`.
        """
        self._released = True
        return self._memory.keep_all_but([(0, self.num_blocks)])

    def restore(self, gone: Sequence[int] = ()) -> None:
        """Have memory again after `release` for all blocks but `gone` (ascending), all zero.

        Raises RuntimeError if there is none.
        """
        self._memory.keep_all_but(_runs(gone))
        self._released = False

    def keep_all_but(self, gone: Sequence[int]) -> int:
        """Have memory for all blocks but `gone` (ascending, owned by nobody); returns the bytes given back.

        The content of `gone` is lost. Between `release` and `restore` nothing happens. Raises
        PoolMemoryError, with everything as it was, if there is too little.
        """
        return 0 if self._released else self._memory.keep_all_but(_runs(gone))

    def held_bytes(self, gone: Sequence[int]) -> int:
        """What can be in memory while the blocks `gone` (ascending) are given back and not written."""
        return self._memory.held_bytes(_runs(gone))


def _runs(blocks: Sequence[int]) -> list[tuple[int, int]]:
    """Ascending numbers as (first, count) of what is contiguous."""
    runs: list[tuple[int, int]] = []
    for block in blocks:
        if runs and sum(runs[-1]) == block:
            runs[-1] = runs[-1][0], runs[-1][1] + 1
        else:
            runs.append((block, 1))
    return runs


def _layer_cache(
    layer: LayerKV, num_blocks: int, block_size: int, dtype: torch.dtype, memory: PoolMemory
) -> LayerCache:
    shape = (num_blocks, block_size, layer.num_kv_heads)

    def scales() -> torch.Tensor | None:
        return memory.zeros(shape, torch.float32) if dtype in QUANTIZED_DTYPES else None

    return LayerCache(
        spec=layer,
        key=memory.zeros((*shape, layer.key_dim), dtype),
        value=memory.zeros((*shape, layer.value_dim), dtype),
        key_scale=scales(),
        value_scale=scales(),
    )
