"""The tensors behind the KV blocks.

Purpose: allocate one cache a layer, attach it to its attention module, copy blocks.
Does not know: which block belongs to whom.
Invariant: a block number means the same tokens in every layer.

Letters: N blocks, BS tokens of a block, H kv heads, D head size (key's and value's may differ).
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
import mmap
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import nn

from memory_efficient_gpt.kv_cache.geometry import LayerKV
from memory_efficient_gpt.uploads import upload

_SCALE_BYTES = 4
_PAGE: Final = mmap.PAGESIZE
_MADV_DONTNEED: Final = 4  # Linux's: the pages read as zeros afterwards
_MAP_NORESERVE: Final = 0x4000  # Linux's: limits are kept by this engine, not by the system's overcommit rule
_Zeros = Callable[[tuple[int, ...], torch.dtype], torch.Tensor]
QUANTIZED_DTYPES: Final = (torch.int8, torch.float8_e4m3fn)


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


def block_bytes(layers: Sequence[LayerKV], block_size: int, dtype: torch.dtype) -> int:
    """Bytes of one block over all layers, quantized ones' scales included."""
    total = 0
    for layer in layers:
        total += layer.num_kv_heads * (layer.key_dim + layer.value_dim) * dtype.itemsize
        if dtype in QUANTIZED_DTYPES:
            total += 2 * layer.num_kv_heads * _SCALE_BYTES
    return total * block_size


class KVPool:
    """One `[N, BS, H, D]` key and value tensor a layer, zero at first (untouched pages cost nothing).

    movable: whether memory will be given back and taken again (CPU only): then pages are the system's small
    ones, because a huge page would be resident around the first block that is written in it.
    """

    def __init__(
        self,
        layers: Sequence[LayerKV],
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        movable: bool = False,
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.dtype = dtype
        self.num_bytes = num_blocks * block_bytes(layers, block_size, dtype)
        zeros = _reserved if movable else functools.partial(_zeros, device=device)
        self.caches = [_layer_cache(layer, num_blocks, block_size, dtype, zeros) for layer in layers]

    @property
    def block_bytes(self) -> int:
        """Bytes of one block over all layers."""
        return self.num_bytes // self.num_blocks

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
        """Give back all memory that can be, the trash block's too; returns the bytes. Content is lost.

        On a GPU nothing may touch the pool until `restore`; on a CPU it can be written at any time.
        """
        if self.caches[0].key.device.type == "cpu":
            return self.give_back(range(self.num_blocks))
        for tensor in self.tensors():
            tensor.untyped_storage().resize_(0)
        return self.num_bytes

    def restore(self) -> None:
        """Have memory again after `release`, all zero. Raises RuntimeError if there is none."""
        for tensor in self.tensors():
            storage, size = tensor.untyped_storage(), tensor.numel() * tensor.element_size()
            if storage.nbytes() != size:
                storage.resize_(size)
                with torch.inference_mode():  # whatever mode the pool was made in
                    tensor.zero_()

    def give_back(self, blocks: Sequence[int]) -> int:
        """Give the memory of `blocks` (ascending, owned by nobody) back to the system; returns the bytes.

        Their content is lost, to zeros where a page went; only whole pages go. They can be written again.
        Nothing is given back, and 0 is returned, where pages can't be: on a GPU, on other systems than Linux.
        """
        if self.caches[0].key.device.type != "cpu" or sys.platform != "linux":
            return 0
        runs = _runs(blocks)
        return sum(_release_pages(t, first, count) for t in self.tensors() for first, count in runs)

    def most_resident_bytes(self, released: Sequence[int]) -> int:
        """What can be in memory while the blocks `released` (ascending) are given back and not written.

        A page stays for each block in it that is not released. The one at the border of what is released up
        to the pool's end is rounding, and not counted.
        """
        gone = 0
        for first, count in _runs(released):
            for tensor in self.tensors():
                size = tensor.stride(0) * tensor.element_size()
                start, end = _whole_pages(tensor, first, count)
                gone += count * size if first + count == self.num_blocks else max(0, end - start)
        return self.num_bytes - gone


def _runs(blocks: Sequence[int]) -> list[tuple[int, int]]:
    """Ascending numbers as (first, count) of what is contiguous."""
    runs: list[tuple[int, int]] = []
    for block in blocks:
        if runs and sum(runs[-1]) == block:
            runs[-1] = runs[-1][0], runs[-1][1] + 1
        else:
            runs.append((block, 1))
    return runs


def _release_pages(tensor: torch.Tensor, first: int, count: int) -> int:
    """Tell the system that the pages wholly inside of blocks first..first+count-1 are not needed."""
    start, end = _whole_pages(tensor, first, count)
    if end <= start:
        return 0
    if _libc().madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _MADV_DONTNEED) != 0:
        raise OSError(ctypes.get_errno(), "madvise failed")
    return end - start


def _whole_pages(tensor: torch.Tensor, first: int, count: int) -> tuple[int, int]:
    """Where the pages wholly inside of those blocks begin and end, as addresses."""
    size = tensor.stride(0) * tensor.element_size()
    begin = tensor.data_ptr() + first * size
    return -(-begin // _PAGE) * _PAGE, (begin + count * size) // _PAGE * _PAGE


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _layer_cache(
    layer: LayerKV, num_blocks: int, block_size: int, dtype: torch.dtype, zeros: _Zeros
) -> LayerCache:
    shape = (num_blocks, block_size, layer.num_kv_heads)

    def scales() -> torch.Tensor | None:
        return zeros(shape, torch.float32) if dtype in QUANTIZED_DTYPES else None

    return LayerCache(
        spec=layer,
        key=zeros((*shape, layer.key_dim), dtype),
        value=zeros((*shape, layer.value_dim), dtype),
        key_scale=scales(),
        value_scale=scales(),
    )


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros that take memory only where they are written, on the CPU: torch.zeros would write them all."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    num_bytes = math.prod(shape) * dtype.itemsize
    return torch.from_numpy(np.zeros(num_bytes, dtype=np.uint8)).view(dtype).view(shape)


def _reserved(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Zeros in host address space of their own, of which exactly the pages that are written take memory."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
    space = mmap.mmap(-1, math.prod(shape) * dtype.itemsize, flags=flags)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without huge pages
            space.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(space, dtype=torch.uint8).view(dtype).view(shape)
