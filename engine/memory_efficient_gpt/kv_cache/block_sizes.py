"""Bytes of KV blocks, and of pools whose memory comes in granules.

Purpose: from layers and a number of blocks to bytes, and back.
Does not know: tensors, devices.
Invariant: `blocks_within` is the inverse of `bytes_of`: the most blocks that take no more than so many bytes.

A granule is what memory is taken and given back by: a pool holds whole granules of each of its tensors. With
a granule of 1 a pool takes what its blocks take.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from typing import Final

import torch

from memory_efficient_gpt.kv_cache.geometry import LayerKV

QUANTIZED_DTYPES: Final = (torch.int8, torch.float8_e4m3fn)
_SCALE_BYTES: Final = 4


class BlockSizes:
    """What a block takes in each tensor of a pool: of keys, values and (8-bit types) scales."""

    def __init__(self, layers: Sequence[LayerKV], block_size: int, dtype: torch.dtype) -> None:
        self._tensors: Counter[int] = Counter()
        for layer in layers:
            rows = block_size * layer.num_kv_heads
            self._tensors[rows * layer.key_dim * dtype.itemsize] += 1
            self._tensors[rows * layer.value_dim * dtype.itemsize] += 1
            if dtype in QUANTIZED_DTYPES:
                self._tensors[rows * _SCALE_BYTES] += 2
        self.block_bytes = sum(size * count for size, count in self._tensors.items())
        self.num_tensors = sum(self._tensors.values())

    def bytes_of(self, num_blocks: int, granule: int = 1) -> int:
        """Of the first `num_blocks` blocks."""
        return sum(
            -(-num_blocks * size // granule) * granule * count for size, count in self._tensors.items()
        )

    def blocks_within(self, num_bytes: int, granule: int = 1) -> int:
        """Most blocks for `num_bytes`; 0 if there is room for none."""
        tried = range(max(0, num_bytes) // self.block_bytes + 1)
        return max(0, bisect_right(tried, num_bytes, key=lambda blocks: self.bytes_of(blocks, granule)) - 1)


def block_bytes(layers: Sequence[LayerKV], block_size: int, dtype: torch.dtype) -> int:
    """Bytes of one block over all layers, quantized ones' scales included."""
    return BlockSizes(layers, block_size, dtype).block_bytes
