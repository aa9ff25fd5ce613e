"""A fake of `cuda.bindings.driver`: virtual memory as the real driver has it, over memory of the host.

It refuses what the real one refuses or leaves undefined: mapping twice, unmapping what is not mapped or only
a part, releasing what is mapped, access to what is not mapped throughout, freeing ranges in use. What is
unmapped, or mapped and not cleared yet, holds POISON, so that reading it changes results.
"""

from __future__ import annotations

import ctypes
import enum
import mmap
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch

from memory_efficient_gpt.kv_cache.cuda_driver import CudaDriver
from memory_efficient_gpt.kv_cache.cuda_memory import AddressRange, CudaMemory

POISON = 0xFF
"""NaN in every float type."""


class CUresult(enum.IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_VALUE = 1
    CUDA_ERROR_OUT_OF_MEMORY = 2


@dataclass
class _Mapping:
    handle: int
    allowed: bool = False
    cleared: bool = False


@dataclass
class FakeCuda:
    """capacity: granules of the device. fails: names of calls that fail, after so many successes."""

    granule: int = mmap.PAGESIZE
    capacity: int = 10**6
    fails: dict[str, int] = field(default_factory=dict)
    supported: int = 1
    capturing: bool = False
    calls: list[str] = field(default_factory=list)
    created: set[int] = field(default_factory=set)
    ranges: dict[int, mmap.mmap] = field(default_factory=dict)
    mapped: dict[int, _Mapping] = field(default_factory=dict)
    _made: int = 0

    CUdevice_attribute = SimpleNamespace(CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED=102)
    CUmemAllocationType = SimpleNamespace(CU_MEM_ALLOCATION_TYPE_PINNED=1)
    CUmemAccess_flags = SimpleNamespace(CU_MEM_ACCESS_FLAGS_PROT_READWRITE=3)
    CUmemLocationType = SimpleNamespace(CU_MEM_LOCATION_TYPE_DEVICE=1)
    CUmemAllocationGranularity_flags = SimpleNamespace(CU_MEM_ALLOC_GRANULARITY_MINIMUM=0)

    @staticmethod
    def CUmemAllocationProp() -> SimpleNamespace:  # noqa: N802
        return SimpleNamespace(location=SimpleNamespace())

    CUmemAccessDesc = CUmemAllocationProp

    @staticmethod
    def CUstream(number: int) -> int:  # noqa: N802
        return number

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        if not name.startswith("cu") or not callable(found):
            return found

        def call(*arguments: Any) -> tuple[Any, ...]:
            self.calls.append(name)
            left = self.fails.get(name)
            if left is not None:
                self.fails[name] = left - 1
                if left <= 0:
                    return CUresult.CUDA_ERROR_OUT_OF_MEMORY, None
            result: tuple[Any, ...] = found(*arguments)
            return result

        return call

    def cuDeviceGet(self, index: int) -> tuple[Any, ...]:  # noqa: N802
        return CUresult.CUDA_SUCCESS, index

    def cuDeviceGetAttribute(self, attribute: int, device: int) -> tuple[Any, ...]:  # noqa: N802
        return CUresult.CUDA_SUCCESS, self.supported

    def cuCtxGetCurrent(self) -> tuple[Any, ...]:  # noqa: N802
        return CUresult.CUDA_SUCCESS, "context"

    def cuCtxSetCurrent(self, context: str) -> tuple[Any, ...]:  # noqa: N802
        assert context == "context"
        return (CUresult.CUDA_SUCCESS,)

    def cuMemGetAllocationGranularity(self, kind: Any, option: int) -> tuple[Any, ...]:  # noqa: N802
        assert (kind.type, kind.location.type, kind.location.id, option) == (1, 1, 0, 0)
        return CUresult.CUDA_SUCCESS, self.granule

    def cuMemAddressReserve(self, size: int, alignment: int, near: int, flags: int) -> tuple[Any, ...]:  # noqa: N802
        assert size > 0 and size % self.granule == 0 and alignment % self.granule == near == flags == 0
        space = mmap.mmap(-1, size)
        address = ctypes.addressof(ctypes.c_char.from_buffer(space))
        self.ranges[address] = space
        ctypes.memset(address, POISON, size)
        return CUresult.CUDA_SUCCESS, address

    def cuMemAddressFree(self, address: int, size: int) -> tuple[Any, ...]:  # noqa: N802
        assert len(self.ranges.pop(address)) == size
        assert not [at for at in self.mapped if address <= at < address + size], "a range in use"
        return (CUresult.CUDA_SUCCESS,)

    def cuMemCreate(self, size: int, kind: Any, flags: int) -> tuple[Any, ...]:  # noqa: N802
        assert size == self.granule and flags == 0
        if len(self.created) >= self.capacity:
            return CUresult.CUDA_ERROR_OUT_OF_MEMORY, None
        self._made += 1
        self.created.add(self._made)
        return CUresult.CUDA_SUCCESS, self._made

    def cuMemRelease(self, handle: int) -> tuple[Any, ...]:  # noqa: N802
        assert handle not in [m.handle for m in self.mapped.values()], "it is mapped"
        self.created.remove(handle)
        return (CUresult.CUDA_SUCCESS,)

    def cuMemMap(self, address: int, size: int, offset: int, handle: int, flags: int) -> tuple[Any, ...]:  # noqa: N802
        assert size == self.granule and offset == flags == 0 and handle in self.created
        assert any(start <= address < start + len(space) for start, space in self.ranges.items())
        assert address not in self.mapped, "mapped twice"
        assert handle not in [m.handle for m in self.mapped.values()], "at two addresses"
        self.mapped[address] = _Mapping(handle)
        return (CUresult.CUDA_SUCCESS,)

    def cuMemSetAccess(self, address: int, size: int, access: list[Any], count: int) -> tuple[Any, ...]:  # noqa: N802
        assert len(access) == count == 1 and (access[0].flags, access[0].location.id) == (3, 0)
        for at in range(address, address + size, self.granule):
            self.mapped[at].allowed = True
        return (CUresult.CUDA_SUCCESS,)

    def cuMemsetD8Async(self, address: int, value: int, size: int, stream: int) -> tuple[Any, ...]:  # noqa: N802
        for at in range(address, address + size, self.granule):
            assert self.mapped[at].allowed, "touched without access"
            self.mapped[at].cleared = True
        ctypes.memset(address, value, size)
        return (CUresult.CUDA_SUCCESS,)

    def cuMemUnmap(self, address: int, size: int) -> tuple[Any, ...]:  # noqa: N802
        assert size == self.granule
        assert "wait" in self.calls[-1 - self.calls[::-1].index("cuCtxSetCurrent") :], "work may be under way"
        del self.mapped[address]
        ctypes.memset(address, POISON, size)
        return (CUresult.CUDA_SUCCESS,)

    def check(self) -> None:
        """Everything that is mapped can be used, and nothing unmapped was written."""
        assert all(mapping.allowed and mapping.cleared for mapping in self.mapped.values())
        for start, space in self.ranges.items():
            for at in range(0, len(space), self.granule):
                if start + at not in self.mapped:
                    assert space[at : at + self.granule] == bytes([POISON]) * self.granule, "it was written"

    @property
    def is_empty(self) -> bool:
        return not (self.created or self.ranges or self.mapped)


def fake_driver(cuda: FakeCuda) -> CudaDriver:
    return CudaDriver(
        cuda,
        0,
        stream=lambda: 7,
        wait=lambda: cuda.calls.append("wait"),
        capturing=lambda: cuda.capturing,
    )


def fake_memory(cuda: FakeCuda) -> CudaMemory:
    """Memory that moves as on a GPU, with tensors of the host over it."""
    return CudaMemory(fake_driver(cuda), host_bytes)


def host_bytes(place: AddressRange) -> torch.Tensor:
    """torch.frombuffer keeps its buffer alive, and that the range."""
    buffer = (ctypes.c_ubyte * place.num_bytes).from_address(place.address)
    buffer.owner = place  # type: ignore[attr-defined]
    return torch.frombuffer(buffer, dtype=torch.uint8)
