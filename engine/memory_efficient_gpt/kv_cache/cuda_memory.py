"""KV memory on a GPU that comes and goes in granules of 2 MiB: CUDA's virtual memory management.

Purpose: tensors in reserved address space, of which the granules that kept blocks touch have memory.
Does not know: blocks' owners, streams, how calls are made (cuda_driver.py).
Invariant: the granules that are mapped are those that some kept block touches, and no others, except within
`keep_all_but`. What is unmapped goes back to the driver, so that other processes can have it.

Addresses never change, so captured CUDA graphs stay right. Memory is unmapped only after all that the device
was told is done: a step under way may still use a block that was released meanwhile.
"""

from __future__ import annotations

import functools
import logging
import math
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from memory_efficient_gpt.kv_cache.cuda_driver import CudaDriver, Handle
from memory_efficient_gpt.kv_cache.pool_memory import PoolMemoryError, Runs

logger = logging.getLogger(__name__)

_postponed: list[Callable[[], None]] = []
"""Ranges that the garbage collector found while a CUDA graph was captured; they go with the next move."""


class AddressRange:
    """Address space of one tensor. handles: what is mapped, by the granule's number in the range.

    It goes back to the driver, with all that is mapped, when the last tensor in it is gone.
    """

    def __init__(self, driver: CudaDriver, num_bytes: int) -> None:
        """Raises PoolMemoryError."""
        _give_back_postponed()
        self.granule = driver.granule_bytes
        self.num_granules = -(-num_bytes // self.granule)
        self.num_bytes = num_bytes
        self.address = driver.reserve(self.num_granules * self.granule)
        self.handles: dict[int, Handle] = {}
        size = self.num_granules * self.granule
        end = weakref.finalize(self, _give_back_range, driver, self.address, size, self.handles)
        end.atexit = False  # the process's end gives all back, and the driver may be gone by then

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """By which torch makes a tensor `[num_bytes] uint8` here without a copy, and keeps this alive."""
        return {"shape": (self.num_bytes,), "typestr": "|u1", "data": (self.address, False), "version": 2}

    def at(self, granule: int) -> int:
        """Its address."""
        return self.address + granule * self.granule

    def touched(self, kept: Runs, block_bytes: int) -> npt.NDArray[np.bool_]:
        """Which granules those blocks touch, `[num_granules]`."""
        touched = np.zeros(self.num_granules, dtype=np.bool_)
        for first, count in kept:
            start, end = first * block_bytes, (first + count) * block_bytes
            touched[start // self.granule : -(-end // self.granule)] = True
        return touched


class CudaMemory:
    """Implements PoolMemory. as_bytes: a tensor `[num_bytes] uint8` over an address range."""

    def __init__(self, driver: CudaDriver, as_bytes: Callable[[AddressRange], torch.Tensor]) -> None:
        self._driver = driver
        self._as_bytes = as_bytes
        self._ranges: list[tuple[AddressRange, int]] = []  # with the bytes of a block
        self._num_blocks = 0

    @property
    def granule_bytes(self) -> int:
        """What is mapped at a time."""
        return self._driver.granule_bytes

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Address space; only the first granule has memory, by which torch finds the device."""
        num_bytes = math.prod(shape) * dtype.itemsize
        self._driver.enter()
        place = AddressRange(self._driver, num_bytes)
        _take(self._driver, [(place, [0])], [])
        self._num_blocks = shape[0]
        self._ranges.append((place, num_bytes // shape[0]))
        return self._as_bytes(place).view(dtype).view(shape)

    def keep_all_but(self, gone: Runs) -> int:
        """Granules that become free are used for those that are missing; only the rest is given back."""
        kept = _complement(gone, self._num_blocks)
        wanted = [(place, place.touched(kept, size)) for place, size in self._ranges]
        going = [(place, [g for g in place.handles if not mask[g]]) for place, mask in wanted]
        missing = [(p, [int(g) for g in np.flatnonzero(mask) if g not in p.handles]) for p, mask in wanted]
        num_going, num_missing = (sum(len(granules) for _, granules in x) for x in (going, missing))
        if not num_going and not num_missing:
            return 0
        _give_back_postponed()
        self._driver.enter()
        spare = self._create(num_missing - num_going)
        if num_going:
            self._driver.wait()
            spare += [self._unmap(place, granule) for place, granules in going for granule in granules]
        _take(self._driver, missing, spare)
        for handle in spare:
            self._driver.release(handle)
        return max(0, num_going - num_missing) * self.granule_bytes

    def held_bytes(self, gone: Runs) -> int:
        """Whole granules, each for every block in it that is kept."""
        kept = _complement(gone, self._num_blocks)
        counts: dict[tuple[int, int], int] = {}  # many tensors are of one size
        held = 0
        for place, size in self._ranges:
            kind = place.num_granules, size
            if kind not in counts:
                counts[kind] = int(place.touched(kept, size).sum())
            held += counts[kind]
        return held * self.granule_bytes

    def _create(self, count: int) -> list[Handle]:
        """So many granules of device memory, or none at all. Raises PoolMemoryError."""
        created: list[Handle] = []
        try:
            created.extend(self._driver.create() for _ in range(count))
        except PoolMemoryError as error:
            for handle in created:
                self._driver.release(handle)
            wanted = f"{count * self.granule_bytes:,} bytes more of the GPU's memory"
            raise PoolMemoryError(f"{wanted} can't be had ({error})") from error
        return created

    def _unmap(self, place: AddressRange, granule: int) -> Handle:
        self._driver.unmap(place.at(granule))
        return place.handles.pop(granule)


def _take(driver: CudaDriver, missing: list[tuple[AddressRange, list[int]]], spare: list[Handle]) -> None:
    """Map granules with zeros in them, `spare` ones first; on an error none. Raises PoolMemoryError."""
    done: list[tuple[AddressRange, int]] = []
    try:
        for place, granules in missing:
            for granule in granules:
                handle = spare.pop() if spare else driver.create()
                try:
                    driver.map(place.at(granule), handle)
                except PoolMemoryError:
                    spare.append(handle)
                    raise
                place.handles[granule] = handle
                done.append((place, granule))
            for first, count in _runs(granules):
                driver.allow(place.at(first), count * place.granule)
                driver.clear(place.at(first), count * place.granule)
    except PoolMemoryError:
        driver.wait()  # zeros may be on their way
        for place, granule in done:
            driver.unmap(place.at(granule))
            driver.release(place.handles.pop(granule))
        while spare:
            driver.release(spare.pop())
        raise


def _give_back_range(driver: CudaDriver, address: int, num_bytes: int, handles: dict[int, Handle]) -> None:
    """Runs when the garbage collector finds the range: nothing is raised there."""
    if driver.capturing():
        _postponed.append(functools.partial(_give_back_range, driver, address, num_bytes, handles))
        return
    try:
        driver.enter()
        driver.wait()
        for granule in list(handles):
            driver.unmap(address + granule * driver.granule_bytes)
            driver.release(handles.pop(granule))
        driver.free(address, num_bytes)
    except RuntimeError:  # after an error of the device every call fails; the process's end gives all back
        logger.warning(
            "%d bytes of a KV cache's address space were not given back.", num_bytes, exc_info=True
        )


def _give_back_postponed() -> None:
    postponed = _postponed.copy()
    _postponed.clear()
    for give_back in postponed:
        give_back()


def _complement(gone: Runs, num_blocks: int) -> list[tuple[int, int]]:
    """All blocks but those."""
    kept, at = [], 0
    for first, count in (*gone, (num_blocks, 0)):
        if first > at:
            kept.append((at, first - at))
        at = first + count
    return kept


def _runs(numbers: list[int]) -> Iterator[tuple[int, int]]:
    """Ascending numbers as (first, count) of what is contiguous."""
    start = 0
    for at in range(1, len(numbers) + 1):
        if at == len(numbers) or numbers[at] != numbers[at - 1] + 1:
            yield numbers[start], at - start
            start = at


def bytes_on(device: torch.device) -> Callable[[AddressRange], torch.Tensor]:
    """Tensors over address ranges of a CUDA device."""

    def as_bytes(place: AddressRange) -> torch.Tensor:
        try:
            tensor = torch.as_tensor(place, device=device)
        except (RuntimeError, TypeError, ValueError) as error:
            raise PoolMemoryError(f"torch takes no memory that it did not allocate ({error})") from error
        if tensor.data_ptr() != place.address:
            raise PoolMemoryError("torch copied a tensor that it was to share")
        return tensor

    return as_bytes
