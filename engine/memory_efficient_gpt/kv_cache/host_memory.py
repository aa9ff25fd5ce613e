"""KV memory on the host: address space of which the pages that are written take memory.

Purpose: tensors of zeros, and pages that go back to the system while their tensors stay.
Does not know: blocks' owners, GPUs.
Invariant: pages of blocks that are kept are never touched; any block can be written at any time.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
import mmap
import sys
from typing import Final

import numpy as np
import torch

from memory_efficient_gpt.kv_cache.pool_memory import Runs

_PAGE: Final = mmap.PAGESIZE
_MADV_DONTNEED: Final = 4  # Linux's: the pages read as zeros afterwards
_MAP_NORESERVE: Final = 0x4000  # Linux's: limits are kept by this engine, not by the system's overcommit rule


class HostMemory:
    """Implements PoolMemory. What is taken comes with its first write, so taking never fails here.

    movable: whether memory will be given back and taken again: then pages are the system's small ones,
    because a huge page would be resident around the first block that is written in it.
    """

    granule_bytes = 1

    def __init__(self, *, movable: bool = False) -> None:
        self._movable = movable
        self._tensors: list[torch.Tensor] = []

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Zeros that take memory only where they are written: torch.zeros would write them all."""
        self._tensors.append(_mapped(shape, dtype) if self._movable else _allocated(shape, dtype))
        return self._tensors[-1]

    def keep_all_but(self, gone: Runs) -> int:
        """Only whole pages go. Nothing goes, and 0 is returned, on other systems than Linux."""
        if sys.platform != "linux":
            return 0
        return sum(_release_pages(t, first, count) for t in self._tensors for first, count in gone)

    def held_bytes(self, gone: Runs) -> int:
        """A page stays for each block in it that is kept. The one at the border of what is gone up to the
        pool's end is rounding, and not counted.
        """
        held = 0
        for tensor in self._tensors:
            size = _block_bytes(tensor)
            held += tensor.shape[0] * size
            for first, count in gone:
                start, end = _whole_pages(tensor, first, count)
                held -= count * size if first + count == tensor.shape[0] else max(0, end - start)
        return held


def _block_bytes(tensor: torch.Tensor) -> int:
    return tensor.stride(0) * tensor.element_size()


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
    size = _block_bytes(tensor)
    begin = tensor.data_ptr() + first * size
    return -(-begin // _PAGE) * _PAGE, (begin + count * size) // _PAGE * _PAGE


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _allocated(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    num_bytes = math.prod(shape) * dtype.itemsize
    return torch.from_numpy(np.zeros(num_bytes, dtype=np.uint8)).view(dtype).view(shape)


def _mapped(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Zeros in host address space of their own, of which exactly the pages that are written take memory."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
    space = mmap.mmap(-1, math.prod(shape) * dtype.itemsize, flags=flags)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without huge pages
            space.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(space, dtype=torch.uint8).view(dtype).view(shape)
